"""Canary clients: synthetic updates, some of them hostile, streamed through the real rounds of a chain and a sampler.

A canary owns a few rows of the tables, so thousands of them in one run do not disturb each other: what the released
sums show in those rows is that canary and the noise. Whether it is in the run at all is a fair coin of the auditor's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_rec.data.clients import client_data_from_examples
from fedjax_rec.federated.algorithm import Algorithm, ClientOutput, ServerState
from fedjax_rec.federated.cohort import Sampler
from fedjax_rec.federated.round import RoundKeys, Rounds, make_rounds
from fedjax_rec.federated.rows import Rows
from fedjax_rec.federated.transforms import UNBOUNDED, UpdateTransform
from fedjax_rec.models.base import Shared

QUIET_ROWS = 256  # that nobody touches, from which the crowd's canary measures the noise
MOST_OTHERS = 64  # in that crowd


@dataclass(frozen=True)
class Layout:
    """The shape of the canaries' updates, for chains that name tables or bound the size of an update.

    Attributes:
      tables: names; each canary owns the same rows in all of them, one number each.
      rows: that a canary owns. A bug that bounds rows one by one shows the square root of this too large.
      dense: numbers of a dense leaf, one for each canary that goes in the same run; 0 for no such leaf.
    """

    tables: tuple[str, ...] = ("item",)
    rows: int = 16
    dense: int = 256


class Kind(NamedTuple):
    """What one sort of canary sends, in every table.

    Attributes:
      name: of its score.
      sends: in words.
      places: int ``[rows]``, which of its own rows, repeats allowed.
      values: float32 ``[rows]``, in units of the chain's bound.
      flips: whether its sign changes every time that it may take part.
      dense: whether its first value goes into the dense leaf, and no row is sent.
    """

    name: str
    sends: str
    places: np.ndarray
    values: np.ndarray
    flips: bool = False
    dense: bool = False


Scores = dict[str, np.ndarray]


def kinds(layout: Layout) -> tuple[Kind, ...]:
    """The canaries that own rows. What a crowd's canary shows is in no row: see `crowd_stream`."""
    rows = layout.rows
    distinct, same, every = np.arange(rows), np.zeros(rows, int), np.ones(rows, np.float32)

    def first(*values):
        return np.array([*values, *[0.0] * (rows - len(values))], np.float32)

    found = (
        Kind("huge norm", "one row, a million times the bound", distinct, first(1e6)),
        Kind("many rows", f"{rows} rows, each at the bound", distinct, every),
        Kind("duplicate rows", f"one row, listed {rows} times", same, every * rows**-0.5),
        Kind("not a number", "a NaN", distinct, first(np.nan, 1.0)),
        Kind("alternating", "one row at the bound, its sign turning", distinct, first(1.0), flips=True),
    )
    dense = Kind("dense leaf", "one number of a dense leaf, at the bound", distinct, first(1.0), dense=True)
    return (*found, dense) if layout.dense else found


def canary_stream(
    transforms: UpdateTransform,
    sampler: Sampler,
    *,
    num_canaries: int,
    num_rounds: int,
    layout: Layout,
    make: Callable[..., Rounds] = make_rounds,
) -> tuple[Rounds, Callable[[Kind, jax.Array], tuple[np.ndarray, Scores]]]:
    """Compiles the rounds that canaries go through, once for all kinds and seeds.

    Under add-or-remove a canary that the coin leaves out is in no cohort. Under replace-one it takes part, and sends
    the opposite instead. The population is that of the sampler: where it has fewer clients than the canaries asked for,
    independent runs are pooled, each coin still being private by itself; where it has more, the others stay away.

    Args:
      transforms: the chain.
      sampler: who takes part.
      num_canaries: trials in all.
      num_rounds: of each run.
      layout: of their updates.
      make: builds the rounds; `make_rounds`, or another round's code to audit.

    Returns:
      The rounds, and ``stream(kind, key) -> (coins bool [trials], {score name: float64 [trials]})``: higher scores
      speak for taking part, and a number that is not finite is infinite.
    """
    num_clients, replaces = population_size(sampler), sampler.relation == "replace_one"
    size = min(num_clients, num_canaries)
    rounds = make(
        _canaries(layout, size, sampler.num_groups),
        transforms,
        _with_coins(sampler, everyone=replaces),
        _nobodys_data(num_clients),
        span_size=num_rounds,
        chunk_size=min(num_clients, 256),
    )
    init = jax.jit(rounds.init)
    bound = contribution(transforms)

    def one_run(kind, canaries, key):
        coin, cohort, client, noise, start = jax.random.split(key, 5)
        coins = np.zeros(num_clients, bool)
        coins[canaries] = _toss(coin, len(canaries))
        private = _uploads(kind, canaries, bound, num_clients=num_clients, num_rows=size * layout.rows)
        if replaces:
            private = {name: _turned(values, coins) for name, values in private.items()}
        state, _ = init(start)
        state = state._replace(opt_state=state.opt_state | {"flips": jnp.asarray(kind.flips)})
        keys = RoundKeys((cohort, jnp.asarray(coins)), client, noise)
        state, _, _ = rounds.run(state, jax.tree.map(jnp.array, private), keys, num_rounds)
        return coins[canaries], _scores(kind, canaries, jax.device_get(state.opt_state))

    def stream(kind, key):
        together = min(size, layout.dense) if kind.dense else size
        found = []
        for run in range(-(-num_canaries // together)):
            canaries = (run * together + np.arange(together)) % size
            found.append(one_run(kind, canaries, jax.random.fold_in(key, run)))
        coins = np.concatenate([coins for coins, _ in found])
        return coins, {name: np.concatenate([scores[name] for _, scores in found]) for name in found[0][1]}

    return rounds, stream


def crowd_stream(
    transforms: UpdateTransform,
    sampler: Sampler,
    *,
    num_runs: int,
    num_rounds: int,
    layout: Layout,
    make: Callable[..., Rounds] = make_rounds,
) -> Callable[[jax.Array], tuple[np.ndarray, Scores]] | None:
    """One canary among a few others, in many short runs: does the size of the noise tell who was there?

    A sum over the realised cohort divides its noise by that cohort's size too. Rows that nobody touches then show the
    size of a small cohort, and so whether one more was in it, however well the sum itself is protected.

    Args:
      transforms: the chain.
      sampler: who takes part.
      num_runs: trials.
      num_rounds: of each.
      layout: whose tables the updates have.
      make: builds the rounds.

    Returns:
      ``stream(key)`` as of `canary_stream`; None where no cohort's size can tell anything: under replace-one, or where
      a client is alone in its group.
    """
    num_clients, groups = population_size(sampler), sampler.num_groups
    if sampler.relation == "replace_one" or num_clients <= groups:
        return None
    prob = sampler.sampling_prob * groups
    num_others = int(min(max(round(1 / prob) - 1, 1), (num_clients - 1) // groups, MOST_OTHERS))
    canary, crowd = np.arange(num_clients) == 0, np.zeros(num_clients, bool)
    crowd[groups * (1 + np.arange(num_others))] = True  # the canary is client 0; these are of its group
    rounds = make(
        _quiet_rows(layout, groups),
        transforms,
        _with_coins(sampler, everyone=False),
        _nobodys_data(num_clients),
        span_size=num_rounds,
        chunk_size=min(num_clients, MOST_OTHERS),
    )
    init = jax.jit(rounds.init)
    bound, here = contribution(transforms), jnp.asarray([crowd, crowd | canary])

    def stream(key):
        coin_key, key = jax.random.split(key)
        coins, scores = _toss(coin_key, num_runs), []
        for run, coin in enumerate(coins):
            cohort, client, noise, start = jax.random.split(jax.random.fold_in(key, run), 4)
            state, private = init(start)
            keys = RoundKeys((cohort, here[int(coin)]), client, noise)
            state, _, _ = rounds.run(state, jnp.full_like(private, bound), keys, num_rounds)
            scores.append(state.opt_state)
        return coins, {"cohort size in the noise": _finite(np.array(jax.device_get(scores)))}

    return stream


def contribution(transforms: UpdateTransform) -> float:
    """The largest update that the chain says it lets through unchanged; 1 where it names none."""
    bound = transforms.sensitivity(UNBOUNDED)
    size = min(bound.l1, bound.l2)
    return float(size) if 1e-12 <= size <= 1e12 else 1.0


def population_size(sampler: Sampler) -> int:
    """Clients that the sampler draws from."""
    return jax.eval_shape(sampler.draw, jax.random.key(0), 0).shape[0]


def _toss(key: jax.Array, num: int) -> np.ndarray:
    """The auditor's coins, tossed on the host."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel().tolist()).random(num) < 0.5


def _with_coins(sampler: Sampler, *, everyone: bool) -> Sampler:
    """The sampler, drawing only those whose coin says so: coins travel beside the key, so new ones are no new program.

    Args:
      sampler: the real one.
      everyone: True where all that it draws take part, whatever their coins say.
    """

    def draw(keys, round_index):
        if not isinstance(keys, tuple):  # of whoever asks for shapes
            return sampler.draw(keys, round_index)
        key, coins = keys
        drawn = sampler.draw(key, round_index)
        return drawn if everyone else drawn & coins

    return sampler._replace(draw=draw)


def _nobodys_data(num_clients: int):
    return client_data_from_examples([(np.zeros(1, np.int64), np.ones(1))] * num_clients, num_items=1)


def _uploads(kind: Kind, canaries: np.ndarray, bound: float, *, num_clients: int, num_rows: int) -> dict[str, Any]:
    """What every client sends, as its private state: nothing, but for the canaries."""
    rows = len(kind.places)
    sent = {
        "ids": np.full((num_clients, rows), num_rows, np.int32),
        "values": np.zeros((num_clients, rows), np.float32),
        "dense": np.zeros(num_clients, np.float32),
        "place": np.zeros(num_clients, np.int32),
    }
    if kind.dense:
        sent["dense"][canaries], sent["place"][canaries] = kind.values[0] * bound, np.arange(len(canaries))
    else:
        sent["ids"][canaries] = canaries[:, None] * rows + kind.places
        sent["values"][canaries] = kind.values * np.float32(bound)
    return sent


def _turned(values: np.ndarray, coins: np.ndarray) -> np.ndarray:
    """Numbers of clients whose coin fell the other way: the opposite ones, and zero for NaN."""
    if values.dtype != np.float32:
        return values
    return np.where(coins.reshape(-1, *[1] * (values.ndim - 1)), values, -np.nan_to_num(values))


def _canaries(layout: Layout, num_canaries: int, num_groups: int) -> Algorithm:
    """Clients send their private state as it is; the server adds up what it is given, and learns nothing."""
    num_rows = num_canaries * layout.rows
    sign_of = layout.tables[0]  # its first number carries the sign that canaries send, where a model's parameters are

    def init(key):
        del key
        tables = {name: jnp.zeros((num_rows, 1)).at[0, 0].set(1.0) for name in layout.tables}
        dense = {"out": jnp.zeros(layout.dense)} if layout.dense else {}
        empty = {"rows": jnp.zeros((num_canaries, layout.rows))} | dense
        sums = {name: empty for name in ("signed", "plain", "squares")}
        sums |= {"rounds": jnp.zeros(num_canaries), "flips": jnp.zeros((), bool)}
        return ServerState(jnp.zeros((), jnp.int32), Shared(tables, dense), sums)

    def client_update(shared, private, client, num_steps, key):
        del client, num_steps, key
        sign = shared.tables[sign_of][0, 0]
        rows = Rows(private["ids"], sign * private["values"][:, None], num_rows, unique=False)
        dense = {}
        if layout.dense:
            dense = {"out": jnp.zeros(layout.dense).at[private["place"]].set(sign * private["dense"])}
        return ClientOutput(Shared(dict.fromkeys(layout.tables, rows), dense), private, {})

    def server_update(state, aggregate):
        sums, sign = state.opt_state, state.shared.tables[sign_of][0, 0]
        turn = jnp.arange(num_canaries) % num_groups == state.round % num_groups
        rows = sum(aggregate.tables[name] for name in layout.tables).reshape(num_canaries, layout.rows)
        # Rounds of other groups hold only noise.
        seen = {"rows": jnp.where(turn[:, None], rows, 0.0)} | aggregate.dense
        sums = sums | {
            "signed": jax.tree.map(lambda s, x: s + sign * x, sums["signed"], seen),
            "plain": jax.tree.map(jnp.add, sums["plain"], seen),
            "squares": jax.tree.map(lambda s, x: s + jnp.square(x), sums["squares"], seen),
            "rounds": sums["rounds"] + turn,
        }
        odd = ((state.round + 1) // num_groups) % 2 == 1
        table = state.shared.tables[sign_of].at[0, 0].set(jnp.where(sums["flips"] & odd, -1.0, 1.0))
        shared = state.shared._replace(tables=state.shared.tables | {sign_of: table})
        return state._replace(shared=shared, opt_state=sums)

    return Algorithm(
        init=init,
        init_private=lambda key: {
            "ids": jnp.zeros(layout.rows, jnp.int32),
            "values": jnp.zeros(layout.rows),
            "dense": jnp.zeros(()),
            "place": jnp.int32(0),
        },
        client_update=client_update,
        num_steps=lambda client: jnp.int32(1),
        server_update=server_update,
    )


def _quiet_rows(layout: Layout, num_groups: int) -> Algorithm:
    """All clients send the same row; the server measures the noise in the others, as one over its size."""

    def init(key):
        del key
        tables = {name: jnp.zeros((QUIET_ROWS, 1)) for name in layout.tables}
        return ServerState(jnp.zeros((), jnp.int32), Shared(tables, {}), jnp.zeros(()))

    def client_update(shared, private, client, num_steps, key):
        del shared, client, num_steps, key
        row = Rows(jnp.zeros(1, jnp.int32), private[None, None], QUIET_ROWS, unique=False)
        return ClientOutput(Shared(dict.fromkeys(layout.tables, row), {}), private, {})

    def server_update(state, aggregate):
        noise = jnp.sqrt(jnp.mean(jnp.square(aggregate.tables[layout.tables[0]][1:])))
        own = state.round % num_groups == 0
        seen = jnp.where(own & (noise > 0), 1 / jnp.where(noise > 0, noise, 1.0), 0.0)
        return state._replace(opt_state=state.opt_state + seen)

    return Algorithm(
        init=init,
        init_private=lambda key: jnp.zeros(()),
        client_update=client_update,
        num_steps=lambda client: jnp.int32(1),
        server_update=server_update,
    )


def _scores(kind: Kind, canaries: np.ndarray, sums: dict[str, Any]) -> Scores:
    """How strongly the released sums speak for each canary: along its direction, and by how much they vary there."""
    if kind.dense:
        return {kind.name: _finite(sums["signed"]["out"][: len(canaries)])}
    touched = np.unique(kind.places[kind.values != 0])
    own = {
        name: np.asarray(sums[name]["rows"], np.float64)[canaries][:, touched]
        for name in ("signed", "plain", "squares")
    }
    scores = {kind.name: _finite(own["signed"].sum(1))}
    if kind.flips:
        times = np.maximum(np.asarray(sums["rounds"], np.float64)[canaries], 1.0)
        scores[f"{kind.name}, spread"] = _finite((own["squares"] - np.square(own["plain"]) / times[:, None]).sum(1))
    return scores


def _finite(scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores, np.float64)
    return np.where(np.isfinite(scores), scores, np.inf)
