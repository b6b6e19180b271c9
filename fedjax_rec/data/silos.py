"""Users grouped into silos (hospitals, shops, regions): a client of the round is then a silo that holds many users.

What is public about a silo: its id, which users it serves, the catalogue, and a declared size. Its interactions are
not. `ClientData` with `Silo` buckets goes through the same round as any other population.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_rec.data.clients import ClientData, Examples, choose_capacities
from fedjax_rec.data.negatives import permute
from fedjax_rec.data.split import Split


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["client_id", "length", "item_ids", "labels", "user_slots", "public_size", "weight"],
    meta_fields=["num_items"],
)
@dataclasses.dataclass(frozen=True)
class Silo:
    """One silo's padded interactions; in a bucket every array has a leading ``[silos]`` axis.

    Attributes:
      client_id: int32 scalar, the silo's place in ``Silos.labels``.
      length: int32 scalar, real interactions; secret, so only to be used where the privacy proof allows it.
      item_ids: int32 ``[L]``, padded with ``num_items``; repeats allowed.
      labels: float32 ``[L]``: ratings, or ones for implicit feedback; zero on padding.
      user_slots: int32 ``[L]``, the user's row in the silo's private tables; zero on padding.
      public_size: float32 scalar, the declared number of interactions, by which gradient sums are divided.
      weight: float32 scalar, public weight of the silo in the server's mean; 1 on average over the silos.
      num_items: catalogue size.
    """

    client_id: jax.Array
    length: jax.Array
    item_ids: jax.Array
    labels: jax.Array
    user_slots: jax.Array
    public_size: jax.Array
    weight: jax.Array
    num_items: int


@dataclasses.dataclass(frozen=True, eq=False)
class Silos:
    """A population of silos, and where each user is in it.

    Attributes:
      clients: the population as the round sees it; its buckets are `Silo`.
      labels: the group label of each silo, ``[num_silos]``.
      silo_ids: int32 ``[num_users]``, the silo of each user.
      user_slots: int32 ``[num_users]``, the user's row within its silo.
      users_per_silo: rows of a silo's private tables, the most users that a silo has.
      public_sizes: int64 ``[num_silos]``, declared interactions.
    """

    clients: ClientData
    labels: np.ndarray
    silo_ids: np.ndarray
    user_slots: np.ndarray
    users_per_silo: int
    public_sizes: np.ndarray


def equal_groups(num_users: int, *, num_silos: int, seed: int = 0) -> np.ndarray:
    """Deals users to silos at random, sizes differing by at most one: int32 ``[num_users]``.

    Args:
      num_users: users.
      num_silos: groups to make, between 1 and ``num_users``.
      seed: of the deal.

    Raises:
      ValueError: if there are fewer users than silos, or no silo.
    """
    if not 1 <= num_silos <= num_users:
        raise ValueError(f"num_silos must be between 1 and the {num_users} users; got {num_silos}.")
    return np.random.default_rng(seed).permutation(np.arange(num_users) % num_silos).astype(np.int32)


def silo_data(
    split: Split,
    groups: np.ndarray,
    *,
    public_sizes: np.ndarray | None = None,
    weigh_by_size: bool = True,
    use_ratings: bool = False,
    num_buckets: int = 1,
) -> Silos:
    """Groups a split's training interactions into silos.

    Privacy: who is in which silo is public. So are the declared sizes: by default the true counts are declared, once
    and before training, and neighbouring data sets are compared under the same declaration. Declare a rounded number
    instead where a count is itself a secret; only the scale of the steps depends on it.

    Args:
      split: train, validation and test; users without training rows keep their place.
      groups: ``[num_users]``, a label for each user: an attribute such as the occupation, or `equal_groups`.
      public_sizes: ``[num_silos]``, positive, in the order of the sorted labels; None declares the true counts (1 if
        empty).
      weigh_by_size: silos weigh in proportion to their declared size, as in FedAvg, instead of equally.
      use_ratings: labels are ratings, all known, instead of ones.
      num_buckets: most length buckets to make. Each is compiled, and padding is cheap: only batches are computed.

    Raises:
      ValueError: if ``groups`` or ``public_sizes`` has another length, a size is not positive, there are no rows, or
        ratings are asked for and missing.
    """
    train, groups = split.train, np.asarray(groups)
    if groups.shape != (train.num_users,):
        raise ValueError(f"groups must hold one label for each of the {train.num_users} users; got {groups.shape}.")
    if not train.num_interactions:
        raise ValueError("There is nothing to train on: every silo is empty.")
    if use_ratings and (train.ratings is None or np.isnan(train.ratings).any()):
        raise ValueError(f"{train.name} has rows without ratings; drop them, or train with use_ratings=False.")
    labels, silo_ids, users_in = np.unique(groups, return_inverse=True, return_counts=True)
    row_silos = silo_ids[train.user_ids]
    lengths = np.bincount(row_silos, minlength=len(labels))
    public_sizes = np.maximum(lengths, 1) if public_sizes is None else np.asarray(public_sizes)
    if public_sizes.shape != labels.shape or not (public_sizes > 0).all():
        raise ValueError(f"public_sizes must be {len(labels)} positive numbers; got {public_sizes.tolist()}.")

    by_silo = np.argsort(silo_ids, kind="stable")
    user_slots = np.empty(len(silo_ids), np.int32)
    user_slots[by_silo] = np.arange(len(silo_ids)) - np.repeat(np.cumsum(users_in) - users_in, users_in)
    weights = public_sizes / public_sizes.mean() if weigh_by_size else np.ones(len(labels))

    def bucket(members: np.ndarray, capacity: int) -> Silo:
        item_ids = np.full((len(members), capacity), train.num_items, np.int32)
        slots = np.zeros((len(members), capacity), np.int32)
        of_rows = np.zeros((len(members), capacity), np.float32)
        for row, silo in enumerate(members):
            own = row_silos == silo
            item_ids[row, : lengths[silo]] = train.item_ids[own]
            slots[row, : lengths[silo]] = user_slots[train.user_ids[own]]
            of_rows[row, : lengths[silo]] = train.ratings[own] if use_ratings else 1.0
        return Silo(
            client_id=members.astype(np.int32),
            length=lengths[members].astype(np.int32),
            item_ids=item_ids,
            labels=of_rows,
            user_slots=slots,
            public_size=public_sizes[members].astype(np.float32),
            weight=weights[members].astype(np.float32),
            num_items=train.num_items,
        )

    capacities = choose_capacities(lengths[lengths > 0], num_buckets=num_buckets)
    bucket_of = np.searchsorted(capacities, lengths)
    by_length = np.argsort(lengths, kind="stable")  # silos side by side take as many trips as the largest of them
    buckets = tuple(bucket(by_length[bucket_of[by_length] == i], capacity) for i, capacity in enumerate(capacities))
    clients = ClientData(
        buckets=buckets,
        num_clients=len(labels),
        num_items=train.num_items,
        num_shards=1,
        exclusion="nothing",
        padding_waste=1.0 - train.num_interactions / sum(b.item_ids.size for b in buckets),
        num_interactions=train.num_interactions,
    )
    return Silos(clients, labels, silo_ids.astype(np.int32), user_slots, int(users_in.max()), public_sizes)


def private_of_users(private: Any, silos: Silos) -> Any:
    """Every user's private parameters out of the silos' tables, for evaluation.

    Args:
      private: leaves ``[num_silos, users_per_silo, ...]``, as the round returns them.
      silos: who is where.

    Returns:
      The same tree with leaves ``[num_users, ...]``.
    """
    return jax.tree.map(lambda x: x[silos.silo_ids, silos.user_slots], private)


def draw_batch(silo: Silo, sampling_prob: float, key: jax.Array) -> jax.Array:
    """Who takes part in a step: bool ``[L]``, each real example independently with probability ``sampling_prob``.

    The probability is rounded down to a multiple of 2^-32, so it never exceeds the one that is accounted.
    """
    capacity = silo.item_ids.shape[0]
    real = jnp.arange(capacity) < silo.length
    if sampling_prob == 1:
        return real
    return real & (jax.random.bits(key, (capacity,), jnp.uint32) < np.uint32(int(sampling_prob * 2**32)))


def draw_examples(silo: Silo, place: jax.Array, *, num_negatives: int, key: jax.Array) -> Examples:
    """The examples at some places of a silo, each with negatives that depend on nothing but its place and the key.

    Args:
      silo: its data.
      place: int32 ``[B]`` in ``[0, L]``; L gives an empty example.
      num_negatives: distinct items, uniform over the catalogue; one that equals the example's own item is masked.
      key: of the step.

    Returns:
      ``[B, 1 + num_negatives]``; in column 0 the silo's own. No real id occurs twice in an example.

    Raises:
      ValueError: if the catalogue has fewer items than negatives.
    """
    if not 0 <= num_negatives <= silo.num_items:
        raise ValueError(f"num_negatives must be between 0 and the {silo.num_items} items; got {num_negatives}.")

    def negatives(place):
        return permute(jax.random.fold_in(key, place), jnp.arange(num_negatives, dtype=jnp.int32), silo.num_items)

    own = silo.item_ids.at[place].get(mode="fill", fill_value=silo.num_items)[:, None]
    label = silo.labels.at[place].get(mode="fill", fill_value=0)[:, None]
    drawn = jax.vmap(negatives)(place)
    real = (own < silo.num_items) & (drawn != own)
    return Examples(
        ids=jnp.concatenate([own, jnp.where(real, drawn, silo.num_items)], axis=1),
        labels=jnp.concatenate([label, jnp.zeros(drawn.shape)], axis=1),
        weights=jnp.concatenate([own < silo.num_items, real], axis=1).astype(jnp.float32),
    )
