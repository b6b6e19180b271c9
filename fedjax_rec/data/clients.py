"""From ragged users to a few length buckets of padded arrays: the population as the round sees it."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from fedjax_rec.data.split import Split

EXCLUSION_RULES = ("strict", "paper", "candidates")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["client_id", "length", "item_ids", "labels", "excluded", "num_excluded", "row_ids", "slots"],
    meta_fields=["num_items"],
)
@dataclasses.dataclass(frozen=True)
class Client:
    """One client's padded data; in a bucket every array has a leading ``[clients]`` axis.

    Attributes:
      client_id: int32 scalar; padding clients have ``num_clients``.
      length: int32 scalar, real interactions.
      item_ids: int32 ``[L]`` in time order, padded with ``num_items``.
      labels: float32 ``[L]``: ratings, or ones for implicit feedback; zero on padding.
      excluded: int32 ``[E]``, sorted items that a drawn negative must avoid, padded with ``num_items``.
      num_excluded: int32 scalar.
      row_ids: int32 ``[S]`` distinct items, or None if ``item_ids`` are distinct already.
      slots: int32 ``[L]``, the place of each interaction's item in ``row_ids``, padded with S, or None.
      num_items: catalogue size.
    """

    client_id: jax.Array
    length: jax.Array
    item_ids: jax.Array
    labels: jax.Array
    excluded: jax.Array
    num_excluded: jax.Array
    row_ids: jax.Array | None
    slots: jax.Array | None
    num_items: int


class Examples(NamedTuple):
    """A batch of one client, ``[batch, 1 + negatives]``: column 0 holds its own items, the rest what it drew.

    Attributes:
      ids: int32 item ids, padded with ``num_items``.
      labels: float32: 1 or a rating in column 0, 0 for negatives.
      weights: float32: 0 on padding.
    """

    ids: jax.Array
    labels: jax.Array
    weights: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class ClientData:
    """A population of clients in buckets of similar length, shortest first, each sorted by length.

    Attributes:
      buckets: one `Client` each, arrays with a leading ``[clients]`` axis (``num_shards`` equal blocks).
      num_clients: clients in the population; ids are ``0 .. num_clients - 1``.
      num_items: catalogue size.
      num_shards: devices that the client axis is laid out for. Shard s holds the ids from ``s * clients_per_shard``.
      exclusion: the rule for what negatives avoid, printed with every result.
      padding_waste: share of padded interaction slots, in [0, 1).
      num_interactions: real interactions over all clients.
    """

    buckets: tuple[Client, ...]
    num_clients: int
    num_items: int
    num_shards: int
    exclusion: str
    padding_waste: float
    num_interactions: int

    @property
    def clients_per_shard(self) -> int:
        """Rows of per-client state on each device (the last shard may be padded)."""
        return -(-self.num_clients // self.num_shards)


def client_data(
    split: Split, *, exclusion: str = "strict", use_ratings: bool = False, num_buckets: int = 5, num_shards: int = 1
) -> ClientData:
    """Lays out a split's training interactions as clients.

    Args:
      split: train, validation and test over one user and item id space. Users without training rows stay in the id
        space as clients of length zero.
      exclusion: what drawn negatives avoid. ``"strict"``: the client's training items only (the default);
        ``"paper"``: everything it ever touched, held-out items too, as much published code does, which leaks the
        test item to methods that remember negatives; ``"candidates"``: training items and the published candidates.
      use_ratings: labels are ratings instead of ones; rows with unknown ratings are then left out.
      num_buckets: most length buckets to make; each one is compiled, and more of them waste less padding.
      num_shards: devices to lay the client axis out for.

    Raises:
      ValueError: for an unknown rule, ratings or candidates that are not there, a user with an item twice in train,
        or no training interactions.
    """
    if exclusion not in EXCLUSION_RULES:
        raise ValueError(f"exclusion must be one of {', '.join(EXCLUSION_RULES)}; got {exclusion!r}.")
    train = split.train
    if use_ratings and train.ratings is None:
        raise ValueError(f"{train.name} has no ratings; use_ratings=False trains on implicit feedback.")
    keep = np.ones(train.num_interactions, bool)
    if use_ratings:
        keep = ~np.isnan(train.ratings)
    rows = train if keep.all() else train.take(keep)
    labels = rows.ratings if use_ratings else np.ones(rows.num_interactions, np.float32)
    excluded = _excluded_pairs(split, exclusion)
    return _lay_out(
        items=rows.item_ids,
        labels=labels,
        offsets=rows.offsets,
        excluded=excluded,
        num_items=train.num_items,
        exclusion=exclusion,
        num_buckets=num_buckets,
        num_shards=num_shards,
    )


def client_data_from_examples(
    examples: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    num_items: int,
    batch_size: int = 1,
    num_buckets: int = 5,
    num_shards: int = 1,
) -> ClientData:
    """Lays out ready-made examples, repeats allowed, in their given order: nothing is drawn later.

    Args:
      examples: for each client, item ids int ``[n]`` and labels float ``[n]``.
      num_items: catalogue size.
      batch_size: of the training to come: capacities are multiples of it, so that no round pads the last batch anew.
      num_buckets: see `client_data`.
      num_shards: see `client_data`.
    """
    lengths = [len(items) for items, _ in examples]
    return _lay_out(
        items=np.concatenate([items for items, _ in examples]).astype(np.int32),
        labels=np.concatenate([labels for _, labels in examples]).astype(np.float32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        excluded=None,
        num_items=num_items,
        exclusion="given examples",
        multiple=batch_size,
        num_buckets=num_buckets,
        num_shards=num_shards,
    )


def _excluded_pairs(split: Split, exclusion: str) -> tuple[np.ndarray, np.ndarray]:
    """(offsets, item_ids) of the items each user's negatives avoid, sorted and distinct."""
    parts = [split.train] if exclusion != "paper" else [split.train, split.validation, split.test, split.history]
    users = [part.user_ids for part in parts]
    items = [part.item_ids for part in parts]
    if exclusion == "candidates":
        if split.candidates is None:
            raise ValueError("exclusion='candidates' needs a split with a candidate file; use 'strict' or 'paper'.")
        width = split.candidates.shape[1]
        users.append(np.repeat(np.arange(split.train.num_users), width))
        items.append(split.candidates.reshape(-1))
    num_items = split.train.num_items
    pairs = np.concatenate(users).astype(np.int64) * (num_items + 1) + np.concatenate(items)
    num_train = split.train.num_interactions
    if len(np.unique(pairs[:num_train])) < num_train:  # rows would count twice in a sum and once in its norm
        raise ValueError(
            f"{split.train.name} has users who touch an item twice in train; drop the repeats (Interactions.from_rows "
            "does), or pass the rows to client_data_from_examples."
        )
    pairs = np.unique(pairs)
    pairs = pairs[pairs % (num_items + 1) < num_items]
    offsets = np.searchsorted(pairs, np.arange(split.train.num_users + 1) * (num_items + 1))
    return offsets, (pairs % (num_items + 1)).astype(np.int32)


def choose_capacities(lengths: np.ndarray, *, num_buckets: int) -> list[int]:
    """The bucket capacities, ascending, that waste the least padding over all clients.

    Exact dynamic programming over at most 256 candidate capacities (quantiles of the lengths when there are more).

    Args:
      lengths: int ``[clients]``, positive.
      num_buckets: most capacities to return.
    """
    capacities = np.unique(lengths)
    if len(capacities) > 256:
        capacities = np.unique(np.quantile(lengths, np.linspace(0, 1, 256), method="higher"))
    clients = np.bincount(np.searchsorted(capacities, lengths), minlength=len(capacities))
    below = np.concatenate([[0], np.cumsum(clients)])
    cost = np.full(len(capacities) + 1, np.inf)
    cost[0] = 0.0
    choices = []
    for _ in range(min(num_buckets, len(capacities))):
        # cost of covering the first j candidates whose last bucket starts after the first i
        last = cost[:, None] + (below[None, 1:] - below[:, None]) * capacities[None, :]
        last = np.where(np.arange(len(cost))[:, None] <= np.arange(len(capacities))[None, :], last, np.inf)
        choices.append(np.concatenate([[0], last.argmin(0)]))
        cost = np.concatenate([[0.0], last.min(0)])
    chosen, end = [], len(capacities)
    for choice in reversed(choices):
        if end == 0:
            break
        chosen.append(int(capacities[end - 1]))
        end = int(choice[end])
    return chosen[::-1]


def _pad(values, offsets, users, width, fill, dtype):
    """Rows ``offsets[u]:offsets[u+1]`` of ``values`` for each user, padded: [len(users), width]."""
    out = np.full((len(users), width), fill, dtype)
    counts = np.where(users >= 0, offsets[users + 1] - offsets[users], 0)
    place = np.arange(width) < counts[:, None]
    source = np.where(users >= 0, offsets[users], 0)[:, None] + np.arange(width)
    out[place] = values[source[place]]
    return out, counts.astype(np.int32)


def _lay_out(
    *, items, labels, offsets, excluded, num_items, exclusion, num_buckets, num_shards, multiple=1
) -> ClientData:
    num_clients = len(offsets) - 1
    lengths = np.diff(offsets)
    if num_clients == 0 or lengths.max(initial=0) == 0:
        raise ValueError("There is nothing to train on: every client is empty.")
    if num_buckets < 1:
        raise ValueError(f"num_buckets must be at least 1; got {num_buckets}.")
    if num_shards < 1 or num_shards > num_clients:
        raise ValueError(f"num_shards must be between 1 and the {num_clients} clients; got {num_shards}.")
    padded = -(-lengths // multiple) * multiple
    capacities = choose_capacities(padded[padded > 0], num_buckets=num_buckets)
    bucket_of = np.searchsorted(capacities, lengths)
    per_shard = -(-num_clients // num_shards)
    shard_of = np.arange(num_clients) // per_shard
    buckets, slots_total = [], 0
    for index, capacity in enumerate(capacities):
        members = [np.flatnonzero((bucket_of == index) & (shard_of == shard)) for shard in range(num_shards)]
        block = max(len(m) for m in members)
        if block == 0:
            continue
        users = np.full((num_shards, block), -1, np.int64)
        for shard, member in enumerate(members):
            users[shard, : len(member)] = member[np.argsort(lengths[member], kind="stable")]
        users = users.reshape(-1)
        buckets.append(_bucket(users, items, labels, offsets, excluded, capacity, num_items, num_clients))
        slots_total += users.size * capacity
    return ClientData(
        buckets=tuple(buckets),
        num_clients=num_clients,
        num_items=num_items,
        num_shards=num_shards,
        exclusion=exclusion,
        padding_waste=1.0 - len(items) / slots_total,
        num_interactions=len(items),
    )


def _bucket(users, items, labels, offsets, excluded, capacity, num_items, num_clients) -> Client:
    item_ids, length = _pad(items, offsets, users, capacity, num_items, np.int32)
    padded_labels, _ = _pad(labels, offsets, users, capacity, 0, np.float32)
    if excluded is None:  # ready-made examples: items may repeat, and nothing is drawn
        distinct = [np.unique(row[:n], return_inverse=True) for row, n in zip(item_ids, length, strict=True)]
        width = max(len(ids) for ids, _ in distinct)
        row_ids = np.full((len(users), width), num_items, np.int32)
        slots = np.full(item_ids.shape, width, np.int32)
        for row, (ids, slot) in enumerate(distinct):
            row_ids[row, : len(ids)] = ids
            slots[row, : len(slot)] = slot
        avoid, num_avoid = np.zeros((len(users), 0), np.int32), np.zeros(len(users), np.int32)
    else:
        row_ids = slots = None
        counts = np.where(users >= 0, excluded[0][users + 1] - excluded[0][users], 0)
        avoid, num_avoid = _pad(excluded[1], excluded[0], users, max(int(counts.max()), 1), num_items, np.int32)
    return Client(
        client_id=np.where(users >= 0, users, num_clients).astype(np.int32),
        length=length,
        item_ids=item_ids,
        labels=padded_labels,
        excluded=avoid,
        num_excluded=num_avoid,
        row_ids=row_ids,
        slots=slots,
        num_items=num_items,
    )
