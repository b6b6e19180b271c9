"""Update transforms: what happens to an update between a client's training and the server's step.

Each link is a NamedTuple of pure functions, as in optax. ``client`` runs for one client, inside the vmap and before
the sum; ``server`` runs on the sum, in reverse order. A link also declares what it means for privacy and for the
wire, so epsilon and communication cost are computed from the chain that really ran.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import dp_accounting
import jax
import jax.numpy as jnp

from fedjax_rec.federated.rows import is_rows

Metrics = dict[str, jax.Array]


class Bound(NamedTuple):
    """What one client's update cannot exceed, whatever its data; norms are joint, over row values and dense leaves.

    Attributes:
      l1: L1 norm, infinite if nothing bounds it.
      l2: L2 norm, infinite if nothing bounds it.
      noised: True once the client has added noise of its own to an update within these norms. That noise is the same
        for any data, so replacing a client's data still moves a sum by at most twice the norms; but who is removed
        takes its noise along, so a central guarantee then holds under replace-one only.
      integers: True if every number of the update is an integer, as integer noise needs.
    """

    l1: float = math.inf
    l2: float = math.inf
    noised: bool = False
    integers: bool = False

    def scaled(self, factor: float) -> "Bound":
        """The bound of ``factor`` times the update."""
        return self._replace(l1=abs(factor) * self.l1, l2=abs(factor) * self.l2, integers=False)

    def within(self, other: "Bound") -> bool:
        """Whether every update in this bound is in the other."""
        alike = self.noised <= other.noised and self.integers >= other.integers
        return self.l1 <= other.l1 and self.l2 <= other.l2 and alike


UNBOUNDED = Bound()


def _no_init(params):
    del params
    return ()


def _same_client(update, state, key):
    del state, key
    return update, {}


def _same_server(total, state, key):
    del key
    return total, state


class UpdateTransform(NamedTuple):
    """One link of the chain; every field has the identity as its default.

    Attributes:
      init: ``init(params) -> state``, server-side state of the link.
      client: ``client(update, state, key) -> (update, metrics)`` for one client. Metrics are scalars that are
        averaged over the cohort for the person who runs the simulation; no epsilon covers them.
      server: ``server(total, state, key) -> (total, state)`` on the sum over clients; ``key`` is the noise key.
      sensitivity: maps the `Bound` of a client's update before the link to the bound after it.
      dp_event: ``dp_event(bound, round_index)``, the event of what its ``server`` releases in that round (the first is
        0), where the update is within the bound; None = it protects nothing. All rounds or none have an event.
      local_dp_event: the same for what one client sends after the link, about that client's data alone.
      local_unit: whose change ``local_dp_event`` is about: "user", all of that data, or "example", one interaction.
      min_separation: the event holds for clients that take part at most once in any so many rounds in a row.
      upload_bits: maps (bits before, update) to the bits that one client sends after the link.
      linear: whether the link commutes with the sum, as secure aggregation needs.
    """

    init: Callable[[Any], Any] = _no_init
    client: Callable[[Any, Any, jax.Array], tuple[Any, Metrics]] = _same_client
    server: Callable[[Any, Any, jax.Array], tuple[Any, Any]] = _same_server
    sensitivity: Callable[[Bound], Bound] = lambda bound: bound
    dp_event: Callable[[Bound, int], dp_accounting.DpEvent | None] = lambda bound, round_index: None
    local_dp_event: Callable[[Bound, int], dp_accounting.DpEvent | None] = lambda bound, round_index: None
    local_unit: str = "user"
    min_separation: int = 1
    upload_bits: Callable[[float, Any], float] = lambda bits, update: bits
    linear: bool = True


def chain(*links: UpdateTransform) -> UpdateTransform:
    """Composes links: clients run them left to right, the server right to left.

    Raises:
      ValueError: if a link needs a sensitivity bound that no earlier link gives, if two links add noise on the server,
        or two on the client (a chain makes one release per round, so that one event describes it), or if a link after
        the server's noise raises the bound.
    """

    def bounds_from(bound):
        bounds = [bound]
        for link in links:
            bounds.append(link.sensitivity(bounds[-1]))
        return bounds

    def only_event(kind, bound, round_index):
        bounds = bounds_from(bound)[1:]
        events = [getattr(link, kind)(b, round_index) for link, b in zip(links, bounds, strict=True)]
        released = [index for index, event in enumerate(events) if event is not None]
        if len(released) > 1:
            raise ValueError(f"{len(released)} links of this chain add noise; use one, with all of the noise in it.")
        return (released[0], events[released[0]]) if released else (None, None)

    def dp_event(bound, round_index):
        return only_event("dp_event", bound, round_index)[1]

    def local_dp_event(bound, round_index):
        return only_event("local_dp_event", bound, round_index)[1]

    local_dp_event(UNBOUNDED, 0)
    noisy, event = only_event("dp_event", UNBOUNDED, 0)
    if event is not None and not isinstance(event, dp_accounting.NonPrivateDpEvent):
        # Clients run every link before the server adds noise, so a later link could undo the bound that it relies on.
        bound, *later = bounds_from(UNBOUNDED)[noisy + 1 :]
        if not all(b.within(bound) for b in later):
            raise ValueError(f"A link after the noise raises the bound from {bound} to {later}; put the noise last.")

    def init(params):
        return tuple(link.init(params) for link in links)

    def client(update, state, key):
        metrics = {}
        for index, (link, link_state) in enumerate(zip(links, state, strict=True)):
            update, new = link.client(update, link_state, jax.random.fold_in(key, index))
            metrics |= new
        return update, metrics

    def server(total, state, key):
        states = list(state)
        for index in reversed(range(len(links))):
            total, states[index] = links[index].server(total, state[index], jax.random.fold_in(key, index))
        return total, tuple(states)

    def upload_bits(bits, update):
        for link in links:
            bits = link.upload_bits(bits, update)
        return bits

    return UpdateTransform(
        init=init,
        client=client,
        server=server,
        sensitivity=lambda bound: bounds_from(bound)[-1],
        dp_event=dp_event,
        local_dp_event=local_dp_event,
        local_unit="example" if any(link.local_unit == "example" for link in links) else "user",
        min_separation=max((link.min_separation for link in links), default=1),
        upload_bits=upload_bits,
        linear=all(link.linear for link in links),
    )


def update_bits(update: Any) -> float:
    """Bits that an update takes uncompressed: 32 a number, and 32 an id for rows.

    Args:
      update: one client's update (arrays or ``jax.ShapeDtypeStruct``), padding counted as sent.
    """

    def bits(leaf):
        return 32 * (leaf.ids.size + leaf.values.size) if is_rows(leaf) else 32 * leaf.size

    return float(sum(bits(leaf) for leaf in jax.tree.leaves(update, is_leaf=is_rows)))


def scale(factor: float) -> UpdateTransform:
    """Multiplies every client's update by a public constant."""

    def client(update, state, key):
        del state, key
        return scale_update(update, factor), {}

    return UpdateTransform(client=client, sensitivity=lambda bound: bound.scaled(factor))


def scale_update(update: Any, factor: jax.Array | float) -> Any:
    """Multiplies an update's numbers, and not its row ids, by a scalar."""

    def multiply(leaf):
        if is_rows(leaf):
            return dataclasses.replace(leaf, values=leaf.values * factor)
        return leaf * factor

    return jax.tree.map(multiply, update, is_leaf=is_rows)


def select_update(keep: jax.Array, update: Any) -> Any:
    """Returns ``update`` where the scalar ``keep`` is True, else a zero update: a select, because NaN * 0 is NaN."""

    def select(leaf):
        if is_rows(leaf):
            ids = jnp.where(keep, leaf.ids, leaf.num_rows)
            return dataclasses.replace(leaf, ids=ids, values=jnp.where(keep, leaf.values, 0))
        return jnp.where(keep, leaf, jnp.zeros_like(leaf))

    return jax.tree.map(select, update, is_leaf=is_rows)
