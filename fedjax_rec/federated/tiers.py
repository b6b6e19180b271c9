"""Device tiers: small devices train the leading part of the model that large ones train whole.

A tier holds a leading share of the columns of item vectors and hidden layers (width) and of the components of adapters
(rank), and trains on a client's last items only (history). Nested parts of one model: what a small device trains, a
large one trains too. With mask m_k of client k's tier, received parameters w, and update u_k of the model m_k * w,

    w <- server(w, aggregate),   aggregate_j = sum_k (m_k * u_k)_j / E|{k in the cohort : m_kj = 1}|,

so a coordinate is averaged over the clients that hold it. All tiers have the shapes of the whole model and one compiled
program, with zeros outside the tier; a real device would store and send `num_held` numbers.

Diao, Ding and Tarokh, 2021, "HeteroFL: Computation and Communication Efficient Federated Learning for Heterogeneous
Clients" (ICLR).

Differs from the paper: the divisor is the expected number of holders, a public constant, and never the realised one;
a layer norm averages over the whole width, of which a narrow device knows that the rest is zero, and no scaler makes up
for it. Through that average zeros outside the tier get gradients too. They are cut away before anything is sent, so one
local step on such a model (`fedsequence` with SASRec) is exact; with more, the later ones would train numbers that the
device does not hold, and the metric "outside_tier" says so.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_rec.data.clients import Client
from fedjax_rec.data.interactions import Interactions
from fedjax_rec.federated.algorithm import Algorithm
from fedjax_rec.federated.rows import is_rows
from fedjax_rec.models.base import Shared

Axes = Callable[[str, tuple[int, ...]], Sequence[str | None]]
"""``(leaf name, shape) -> one of "width", "rank", None for each axis``: which axes a tier cuts, and by what.

Leaves are named by their path: "tables.item", "dense.blocks.kernel", "private.user".
"""

_CUTS = (None, "width", "rank")
_NO_LIMIT = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Tier:
    """What one class of devices can hold. A client's tier is public.

    Attributes:
      name: of the class.
      width: share of the columns of item vectors and hidden layers, in (0, 1].
      rank: share of the components of adapters, in (0, 1].
      history: most items of a client that it trains on, the last ones; None for all. It still knows its older items,
        at four bytes each, and does not draw them as negatives.
    """

    name: str
    width: float = 1.0
    rank: float = 1.0
    history: int | None = None

    def __post_init__(self):
        for share in ("width", "rank"):
            if not 0 < getattr(self, share) <= 1:
                raise ValueError(f"{share} of tier {self.name!r} must be in (0, 1]; got {getattr(self, share)}.")
        if self.history is not None and self.history < 1:
            raise ValueError(f"history of tier {self.name!r} must be at least 1 item, or None; got {self.history}.")


def named_axes(axes: Mapping[str, Sequence[str | None]]) -> Axes:
    """Axes by leaf name, such as ``{"tables.item": (None, "width")}``; leaves not named are held whole."""
    return lambda name, shape: axes.get(name, (None,) * len(shape))


def axes_of_size(*, width: Collection[int] = (), rank: Collection[int] = (), whole: Collection[str] = ()) -> Axes:
    """Every axis of one of these lengths, but for rows of tables: for networks whose sizes tell their axes apart.

    Args:
      width: lengths of axes that the width cuts.
      rank: lengths of axes that the rank cuts.
      whole: names of leaves that every tier holds whole.
    """
    if set(width) & set(rank):
        raise ValueError(f"Lengths {sorted(set(width) & set(rank))} are given for width and for rank; name the axes.")

    def axes(name, shape):
        if name in whole:
            return (None,) * len(shape)
        cuts = ["width" if size in width else "rank" if size in rank else None for size in shape]
        return (None, *cuts[1:]) if name.startswith("tables.") else cuts

    return axes


def held(params: Any, tier: Tier, axes: Axes) -> Any:
    """Which parameters a tier holds: for each leaf a bool array that broadcasts to it, length 1 where nothing is cut.

    Args:
      params: `Shared`, or ``{"private": pytree}``; arrays or ``jax.ShapeDtypeStruct``.
      tier: the class of devices.
      axes: what it cuts.

    Raises:
      ValueError: for axes that do not fit a leaf, or cut the rows of a table.
    """

    def mask(path, leaf):
        name, shape = jax.tree_util.keystr(path, simple=True, separator="."), leaf.shape
        cuts = tuple(axes(name, shape))
        if len(cuts) != len(shape) or not set(cuts) <= set(_CUTS):
            raise ValueError(f'{name} {list(shape)} needs "width", "rank" or None for each axis; got {cuts}.')
        if name.startswith("tables.") and cuts[0] is not None:
            raise ValueError(f"Rows of {name} are items, which every device ranks; cut its columns.")
        out = np.ones([1] * len(shape), bool)
        for axis, cut in enumerate(cuts):
            if cut is not None:
                most = max(1, round(getattr(tier, cut) * shape[axis]))
                along = np.arange(shape[axis]) < most
                out = out & along.reshape([-1 if a == axis else 1 for a in range(len(shape))])
        return out

    return jax.tree_util.tree_map_with_path(mask, params)


def narrowed(params: Any, tier: Tier, axes: Axes) -> Any:
    """What a device of the tier holds of ``params`` (as in `held`): zeros outside."""
    return jax.tree.map(lambda x, mask: _select(mask, x), params, held(params, tier, axes))


def num_held(params: Any, tier: Tier, axes: Axes) -> int:
    """How many of these numbers a tier holds: what a device stores, receives and sends of a whole model."""
    masks = held(params, tier, axes)
    sizes = jax.tree.map(lambda x, mask: int(mask.sum()) * math.prod(x.shape) // mask.size, params, masks)
    return sum(jax.tree.leaves(sizes))


def shortened(client: Client, most: jax.Array | int) -> Client:
    """The client with its last ``most`` interactions alone, moved to the front; the same arrays if it has no more."""
    capacity = client.item_ids.shape[0]
    length = jnp.minimum(client.length, most)
    place = jnp.arange(capacity, dtype=jnp.int32)
    source = jnp.where(place < length, place + client.length - length, capacity)

    def moved(values, fill):
        return values.at[source].get(mode="fill", fill_value=fill)

    slots = None if client.slots is None else moved(client.slots, client.row_ids.shape[0])
    items, labels = moved(client.item_ids, client.num_items), moved(client.labels, 0)
    return dataclasses.replace(client, length=length, item_ids=items, labels=labels, slots=slots)


def recent(histories: Interactions, tiers: Sequence[Tier], tier_of: np.ndarray) -> Interactions:
    """Each user's last rows, as many as its tier takes: for scorers that read histories."""
    most = np.array([_NO_LIMIT if tier.history is None else tier.history for tier in tiers])[tier_of]
    behind = histories.offsets[1:][histories.user_ids] - np.arange(histories.num_interactions)
    return histories.take(behind <= most[histories.user_ids])


def with_tiers(
    algorithm: Algorithm,
    tiers: Sequence[Tier],
    tier_of: np.ndarray,
    axes: Axes,
    *,
    take_part: Sequence[float] | None = None,
) -> Algorithm:
    """The same method on devices of several tiers.

    A client receives, trains and sends the part that its tier holds, and trains on its last items; its private
    parameters are cut alike. The metric "outside_tier" is the largest number of an update outside the tier before it
    is cut. Where it is 0, any number of local steps stays within the tier; above, ``axes`` forget an axis, or layers
    normalise over the width, and only a method with one local step may be used. Tiers that cut nothing give
    ``algorithm`` back.

    Guarantee: that of the chain and the sampler, unchanged. What a client sends is a function of the server's state,
    of its own data and of its public tier, and the clip comes after. The server divides by a constant that tiers and
    ``take_part`` give, never by who came. Dividing the noised sum is post-processing: coordinates that few hold get
    more noise in the mean.

    Args:
      algorithm: its update is like the shared parameters: fedavg, fedprox, fedsequence and their kind.
      tiers: the classes of devices. A coordinate that none of the clients' tiers holds stays as it is.
      tier_of: int ``[clients]``, public.
      axes: what tiers cut, see `named_axes` and `axes_of_size`.
      take_part: for each tier, its clients' chance to send in a round, relative to the other tiers'; public. The same
        for all by default; `survival` of the deadline if some tiers often miss it.

    Raises:
      ValueError: for tiers out of range, an update that is not like the shared parameters, or axes that do not fit.
    """
    tier_of = np.asarray(tier_of, np.int32)
    if not len(tiers) or not len(tier_of) or not 0 <= tier_of.min() <= tier_of.max() < len(tiers):
        raise ValueError(f"tier_of must name one of the {len(tiers)} tiers for each client; got {np.unique(tier_of)}.")
    weights = np.bincount(tier_of, minlength=len(tiers)) * np.asarray(
        np.ones(len(tiers)) if take_part is None else take_part, np.float64
    )
    if weights.shape != (len(tiers),) or not np.all(weights >= 0) or not weights.any():
        raise ValueError(f"take_part must be a chance for each of the {len(tiers)} tiers, not all 0; got {take_part}.")
    shared = jax.eval_shape(algorithm.init, jax.random.key(0)).shared
    _check_like(shared, shared)
    private = {"private": jax.eval_shape(algorithm.init_private, jax.random.key(0))}
    shared_masks, private_masks = (_stacked([held(x, tier, axes) for tier in tiers]) for x in (shared, private))
    per_holder = jax.tree.map(lambda masks: _per_holder(masks, weights), shared_masks)
    unlimited = all(tier.history is None for tier in tiers)
    if unlimited and all(mask.all() for mask in jax.tree.leaves((shared_masks, private_masks))):
        return algorithm
    histories = jnp.array([_NO_LIMIT if tier.history is None else tier.history for tier in tiers], jnp.int32)
    on_device = jnp.asarray(tier_of)

    def tier_and_data(client):
        tier = on_device.at[client.client_id].get(mode="clip")
        return tier, client if unlimited else shortened(client, histories[tier])

    def client_update(shared, private, client, num_steps, key):
        tier, client = tier_and_data(client)
        mine = {"private": private}
        mine = _cut(mine, private_masks, tier)["private"]
        output = algorithm.client_update(_cut(shared, shared_masks, tier), mine, client, num_steps, key)
        _check_like(output.update, shared)
        outside = _outside(output.update, shared_masks, tier)
        kept = _cut({"private": output.private}, private_masks, tier)["private"]
        update = _cut(output.update, shared_masks, tier)
        return output._replace(update=update, private=kept, metrics=output.metrics | outside)

    def server_update(state, aggregate):
        def over_holders(leaf, factor):
            if np.all(factor == 1):
                return leaf
            if is_rows(leaf):
                return dataclasses.replace(leaf, values=leaf.values * factor)
            return leaf * factor

        aggregate = jax.tree.map(over_holders, aggregate, per_holder, is_leaf=is_rows)
        return algorithm.server_update(state, aggregate)

    return algorithm._replace(
        client_update=client_update,
        num_steps=lambda client: algorithm.num_steps(tier_and_data(client)[1]),
        server_update=server_update,
    )


def _stacked(masks: Sequence[Any]) -> Any:
    """Masks of all tiers, bool ``[tiers, ...]`` a leaf; on the host, so that what nobody cuts can be left alone."""
    return jax.tree.map(lambda *leaves: np.stack(np.broadcast_arrays(*leaves)), *masks)


def _per_holder(masks: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Clients over those that hold a coordinate, in expectation; 0 for a coordinate that nobody holds."""
    holders = sum(weight * mask for weight, mask in zip(weights, masks, strict=True))
    return np.divide(sum(weights), holders, out=np.zeros(holders.shape), where=holders > 0).astype(np.float32)


def _select(mask, leaf):
    if is_rows(leaf):
        return dataclasses.replace(leaf, values=jnp.where(mask, leaf.values, 0))
    return jnp.where(mask, leaf, jnp.zeros_like(leaf))


def _cut(tree: Any, masks: Any, tier: jax.Array) -> Any:
    """The tree with zeros outside the tier; leaves that every tier holds whole pass untouched."""

    def cut(leaf, mask):
        return leaf if mask.all() else _select(jnp.asarray(mask)[tier], leaf)

    return jax.tree.map(cut, tree, masks, is_leaf=is_rows)


def _outside(update: Any, masks: Any, tier: jax.Array) -> dict[str, jax.Array]:
    largest = []

    def look(leaf, mask):
        if not mask.all():
            values = leaf.values if is_rows(leaf) else leaf
            largest.append(jnp.max(jnp.where(jnp.asarray(mask)[tier], 0.0, jnp.abs(values))))

    jax.tree.map(look, update, masks, is_leaf=is_rows)
    return {"outside_tier": jnp.max(jnp.stack(largest))} if largest else {}


def _check_like(update: Any, shared: Any) -> None:
    """Refuses an update whose numbers are not those of a model's shared parameters, one by one."""
    one = jax.tree.map(lambda leaf: 0, update, is_leaf=is_rows)
    if not isinstance(shared, Shared) or jax.tree.structure(one) != jax.tree.structure(shared):
        raise ValueError(
            "Tiers cut updates that are like the shared parameters, and this method sends other numbers (statistics, "
            "control variates). Use fedavg, fedprox or fedsequence; with_staleness goes around with_tiers."
        )
