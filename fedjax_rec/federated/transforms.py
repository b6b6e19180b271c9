"""Update transforms: what happens to an update between a client's training and the server's step.

Each link is a NamedTuple of pure functions, as in optax. ``client`` runs for one client, inside the vmap and before
the sum; ``server`` runs on the sum, in reverse order. A link also declares what it means for privacy and for the
wire, so epsilon and communication cost are computed from the chain that really ran.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import dp_accounting
import jax
import jax.numpy as jnp

from fedjax_rec.federated.rows import add_to_total, is_rows, zero_total

Metrics = dict[str, jax.Array]


class RoundContext(NamedTuple):
    """What is known before a round's clients start.

    Attributes:
      shared: the server's shared parameters.
      in_cohort: bool ``[clients]``, who takes part.
      round_index: int32 scalar; the first round is 0.
    """

    shared: Any
    in_cohort: jax.Array
    round_index: jax.Array


class Wire(NamedTuple):
    """What one client sends or receives in a round.

    Attributes:
      numbers: how many numbers, padding included.
      bits: of each of them.
      side_bits: beside them: row ids, scales, keys.
    """

    numbers: float
    bits: float = 32.0
    side_bits: float = 0.0

    @property
    def total(self) -> float:
        """Bits in all."""
        return self.numbers * self.bits + self.side_bits


class Summation(NamedTuple):
    """How uploads become their sum, where it is not plain addition: secure sums, and rules that look at each upload.

    Attributes:
      zero: ``zero(update) -> total`` before anybody has sent; reads shapes only.
      add: ``add(total, updates, client_ids, active, prepared) -> total`` for a chunk of clients: leaves of ``updates``
        have a leading ``[chunk]`` axis and are zero where ``active`` is False, ``client_ids`` are int32 ``[chunk]``.
      end: ``end(total, prepared) -> (total, metrics)``, what the links' servers get; metrics are float32 scalars.
      individual: True if the server sees single uploads; then no central DP.
      host: True if it calls back to the host, which one device can do.
      min_clients: sums of fewer clients are refused, and zeros come out.
      dropout_prob: chance of each client of the cohort not to be in the sum.
    """

    zero: Callable[[Any], Any]
    add: Callable[[Any, Any, jax.Array, jax.Array, Any], Any]
    end: Callable[[Any, Any], tuple[Any, Metrics]] = lambda total, prepared: (total, {})
    individual: bool = False
    host: bool = False
    min_clients: int = 0
    dropout_prob: float = 0.0


PLAIN_SUM = Summation(
    zero=zero_total,
    add=lambda total, updates, client_ids, active, prepared: add_to_total(total, updates),
)


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


def _same_prepared(state, context, key):
    del context, key
    return state


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
      prepare: ``prepare(state, context, key) -> prepared``, once a round, before any client: what all of them share,
        such as a common mask or the graph of a secure sum. ``key`` is the round's, and known to everybody. What it
        returns stands for the state in the functions below; where that is no state, ``server`` returns one.
      broadcast: ``broadcast(shared, prepared) -> shared``, what clients receive of the server's shared parameters.
      client: ``client(update, prepared, key) -> (update, metrics)`` for one client. Metrics are scalars that are
        averaged over the cohort for the person who runs the simulation; no epsilon covers them.
      summation: how the sum is taken, on the last link of a chain only; None for plain addition.
      server: ``server(total, prepared, key) -> (total, state)`` on the sum over clients; ``key`` is the noise key.
      sensitivity: maps the `Bound` of a client's update before the link to the bound after it.
      dp_event: ``dp_event(bound, round_index)``, the event of what its ``server`` releases in that round (the first is
        0), where the update is within the bound; None = it protects nothing. All rounds or none have an event.
      local_dp_event: the same for what one client sends after the link, about that client's data alone.
      local_unit: whose change ``local_dp_event`` is about: "user", all of that data, or "example", one interaction.
      min_clients: the event holds for sums of at least so many clients, each with its share of the noise.
      min_separation: the event holds for clients that take part at most once in any so many rounds in a row.
      upload: ``upload(wire, update) -> Wire``, what one client sends after the link; ``update`` is what the method
        gives (shapes only), before any link.
      download: the same for what it receives.
      linear: whether what clients send can be added up before it is decoded, as secure sums need.
      decodes: whether ``server`` can lengthen the sum, such as by scaling what a mask left; noise must then come after
        the link, so that it is added to what clients sent, of which ``sensitivity`` is the bound.
    """

    init: Callable[[Any], Any] = _no_init
    prepare: Callable[[Any, RoundContext, jax.Array], Any] = _same_prepared
    broadcast: Callable[[Any, Any], Any] = lambda shared, prepared: shared
    client: Callable[[Any, Any, jax.Array], tuple[Any, Metrics]] = _same_client
    summation: Summation | None = None
    server: Callable[[Any, Any, jax.Array], tuple[Any, Any]] = _same_server
    sensitivity: Callable[[Bound], Bound] = lambda bound: bound
    dp_event: Callable[[Bound, int], dp_accounting.DpEvent | None] = lambda bound, round_index: None
    local_dp_event: Callable[[Bound, int], dp_accounting.DpEvent | None] = lambda bound, round_index: None
    local_unit: str = "user"
    min_clients: int = 0
    min_separation: int = 1
    upload: Callable[[Wire, Any], Wire] = lambda wire, update: wire
    download: Callable[[Wire, Any], Wire] = lambda wire, update: wire
    linear: bool = True
    decodes: bool = False


def chain(*links: UpdateTransform) -> UpdateTransform:
    """Composes links: clients run them left to right, the server right to left.

    Raises:
      ValueError: if a link needs a sensitivity bound that no earlier link gives, if two links add noise on the server,
        or two on the client (a chain makes one release per round, so that one event describes it), if a link after
        the server's noise raises the bound, or if the sum cannot be taken as a link says.
    """
    summation = _summation_of(links)

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
        if any(link.decodes for link in links[noisy + 1 :]):
            raise ValueError(
                "A link after the noise decodes the sum before the noise is added, and what it decodes to is longer "
                "than the bound of what clients send; put the noise last."
            )

    def init(params):
        return tuple(link.init(params) for link in links)

    def prepare(state, context, key):
        pairs = enumerate(zip(links, state, strict=True))
        return tuple(link.prepare(mine, context, jax.random.fold_in(key, index)) for index, (link, mine) in pairs)

    def broadcast(shared, prepared):
        for link, mine in zip(links, prepared, strict=True):
            shared = link.broadcast(shared, mine)
        return shared

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

    def wire_after(direction, wire, update):
        for link in links:
            wire = getattr(link, direction)(wire, update)
        return wire

    return UpdateTransform(
        init=init,
        prepare=prepare,
        broadcast=broadcast,
        client=client,
        summation=summation,
        server=server,
        sensitivity=lambda bound: bounds_from(bound)[-1],
        dp_event=dp_event,
        local_dp_event=local_dp_event,
        local_unit="example" if any(link.local_unit == "example" for link in links) else "user",
        min_clients=max((link.min_clients for link in links), default=0),
        min_separation=max((link.min_separation for link in links), default=1),
        upload=partial(wire_after, "upload"),
        download=partial(wire_after, "download"),
        linear=all(link.linear for link in links),
        decodes=any(link.decodes for link in links),
    )


def _summation_of(links) -> Summation | None:
    """The last link's way to sum, reading that link's part of what the chain has prepared."""
    *others, last = links or [None]
    if len({link.summation.individual for link in links if link.summation}) == 2:
        raise ValueError(
            "A robust rule compares single uploads, and a secure sum shows the server none of them. Keep only one."
        )
    if any(link.summation for link in others):
        raise ValueError("A link that says how the sum is taken must be the last one of the chain, and the only one.")
    if last is None or last.summation is None:
        return None
    summation = last.summation
    if not summation.individual and not all(link.linear for link in links):
        raise ValueError(
            "A secure sum, and the open one that it equals, adds up what clients send before anything is decoded, and "
            "a link before it is decoded client by client (top-k, scales or factors of a client's own). Use a linear "
            "one: rand_k, count_sketch, low_rank or item_subset."
        )
    return summation._replace(
        add=lambda total, updates, ids, active, prepared: summation.add(total, updates, ids, active, prepared[-1]),
        end=lambda total, prepared: summation.end(total, prepared[-1]),
    )


def plain_wire(update: Any) -> Wire:
    """An update uncompressed: 32 bits a number, and 32 an id for rows.

    Args:
      update: one client's update (arrays or ``jax.ShapeDtypeStruct``), padding counted as sent.
    """
    leaves = jax.tree.leaves(update, is_leaf=is_rows)
    numbers = sum(leaf.values.size if is_rows(leaf) else leaf.size for leaf in leaves)
    return Wire(float(numbers), side_bits=32.0 * sum(leaf.ids.size for leaf in leaves if is_rows(leaf)))


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
