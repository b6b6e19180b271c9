"""Update transforms: what happens to an update between a client's training and the server's step.

Each link is a NamedTuple of pure functions, as in optax. ``client`` runs for one client, inside the vmap and before
the sum; ``server`` runs on the sum, in reverse order. A link also declares what it means for privacy and for the
wire, so epsilon and communication cost are computed from the chain that really ran.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import dp_accounting
import jax
import jax.numpy as jnp

from fedjax_rec.federated.rows import is_rows

Metrics = dict[str, jax.Array]


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
      sensitivity: maps the L2 norm bound of a client's update before the link to the bound after it; None = unbounded.
      dp_event: maps the bound at the link to the event of what its ``server`` releases; None = it protects nothing.
      upload_bits: maps (bits before, update) to the bits that one client sends after the link.
      linear: whether the link commutes with the sum, as secure aggregation needs.
    """

    init: Callable[[Any], Any] = _no_init
    client: Callable[[Any, Any, jax.Array], tuple[Any, Metrics]] = _same_client
    server: Callable[[Any, Any, jax.Array], tuple[Any, Any]] = _same_server
    sensitivity: Callable[[float | None], float | None] = lambda bound: bound
    dp_event: Callable[[float | None], dp_accounting.DpEvent | None] = lambda bound: None
    upload_bits: Callable[[float, Any], float] = lambda bits, update: bits
    linear: bool = True


def chain(*links: UpdateTransform) -> UpdateTransform:
    """Composes links: clients run them left to right, the server right to left.

    Raises:
      ValueError: if a link needs a sensitivity bound that no earlier link gives, if two links add noise (a chain
        makes one release per round, so that one event describes it), or if a link after the noise raises the bound.
    """
    bounds: list[float | None] = [None]
    for link in links:
        bounds.append(link.sensitivity(bounds[-1]))
    events = [link.dp_event(bound) for link, bound in zip(links, bounds[1:], strict=True)]
    released = [event for event in events if event is not None]
    if len(released) > 1:
        raise ValueError(f"{len(released)} links of this chain add noise; use one, with all of the noise in it.")
    for index, event in enumerate(events):
        # Clients run every link before the server adds noise, so a later link could undo the bound that it relies on.
        bound, later = bounds[index + 1], bounds[index + 2 :]
        if event is not None and bound is not None and any(b is None or b > bound for b in later):
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

    def sensitivity(bound):
        for link in links:
            bound = link.sensitivity(bound)
        return bound

    def upload_bits(bits, update):
        for link in links:
            bits = link.upload_bits(bits, update)
        return bits

    return UpdateTransform(
        init=init,
        client=client,
        server=server,
        sensitivity=sensitivity,
        dp_event=lambda bound: released[0] if released else None,
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

    return UpdateTransform(client=client, sensitivity=lambda bound: None if bound is None else abs(factor) * bound)


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
