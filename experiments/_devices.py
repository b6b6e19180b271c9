"""What the study of devices trains: populations on devices of three tiers, and four ways to spend an hour."""

import itertools
import math
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_rec.algorithms.fedavg import fedsgd
from fedjax_rec.data import leave_one_out, load
from fedjax_rec.data.clients import client_data
from fedjax_rec.data.interactions import Interactions
from fedjax_rec.data.negatives import Negatives
from fedjax_rec.evaluation import cases, evaluate
from fedjax_rec.evaluation.scorers import Scorer, factor_scorer
from fedjax_rec.federated.asynchronous import stragglers, with_staleness
from fedjax_rec.federated.cohort import Sampler, poisson
from fedjax_rec.federated.device_times import (
    DeviceTimes,
    arrival_sampler,
    simulate_arrivals,
    synchronous_seconds,
)
from fedjax_rec.federated.releases import releases
from fedjax_rec.federated.round import RoundKeys, Rounds, make_rounds
from fedjax_rec.federated.tiers import Tier, held, named_axes, num_held, recent, with_tiers
from fedjax_rec.federated.transforms import chain
from fedjax_rec.models.matrix_factorization import matrix_factorization
from fedjax_rec.models.popularity import popularity_scorer
from fedjax_rec.privacy.accounting import privacy_spent
from fedjax_rec.privacy.calibration import calibrate_noise_multiplier
from fedjax_rec.privacy.mechanisms import user_level_dp

TIERS = (Tier("large"), Tier("medium", width=0.5), Tier("small", width=0.25, history=50))
SHARES = (0.25, 0.25, 0.5)
TIMES = DeviceTimes((30.0, 60.0, 240.0), spread=0.5)
HOURS, CHECKPOINTS, DEADLINE, BUFFER, REST, MAX_STALENESS = 8.0, 4, 120.0, 47, 15, 12
DIM, L2, L2_CLIP_NORM, DELTA, COHORT_SIZE, NUM_ROUNDS = 32, 0.01, 0.02, 1e-4, 94, 200
METRIC = "ndcg@10"
AXES = named_axes({"tables.item": (None, "width"), "private.user": ("width",)})
SERVED = {
    "all devices large": (0, 0, 0),
    "all devices small": (2, 2, 2),
    "tiers": (0, 1, 2),
    "large devices alone train": (0, 1, 2),
    "wait for all": (0, 0, 0),
    "deadline": (0, 0, 0),
    "stale": (0, 0, 0),
    "buffered": (0, 0, 0),
}


@dataclass(frozen=True)
class Method:
    """A compiled contender.

    Attributes:
      rounds: to run.
      stops: numbers of rounds after which it is evaluated, ascending.
      hours: simulated time of each stop; None where no clock runs.
      epsilon: what all rounds spend.
      noise_multiplier: of each of them.
      devices: index of the tier that each client's device behaves like.
    """

    rounds: Rounds
    stops: tuple[int, ...]
    hours: tuple[float | None, ...]
    epsilon: float
    noise_multiplier: float
    devices: np.ndarray


@cache
def world(data_dir: Path | None, smoke: bool):
    """Split, clients, and questions by part."""
    data = load("synthetic", num_users=60, num_items=80) if smoke else load("movielens/100k", data_dir=data_dir)
    split = leave_one_out(data)
    asked = {part: cases(split, part) for part in ("validation", "test")}
    return split, client_data(split, num_buckets=1 if smoke else 2), asked


def assign(train: Interactions, how: str) -> np.ndarray:
    """The tier of each user: by lot, or the small devices to who has the shortest history."""
    count = np.round(np.cumsum((0, *SHARES)) * train.num_users).astype(int)
    order = np.random.default_rng(0).permutation(train.num_users)
    if how == "activity":
        order = order[np.argsort(-train.counts_per_user[order], kind="stable")]
    tier_of = np.empty(train.num_users, np.int32)
    for tier, (start, end) in enumerate(itertools.pairwise(count)):
        tier_of[order[start:end]] = tier
    return tier_of


def noise_for(sampler: Sampler, num_rounds: int, epsilon: float | None) -> tuple[float, float]:
    """The least noise multiplier for so many rounds, and the epsilon that they then spend."""
    if epsilon is None:
        return 0.0, math.inf

    def event(noise):
        mine = user_level_dp(l2_clip_norm=L2_CLIP_NORM, noise_multiplier=noise)
        same = [dp_accounting.SelfComposedDpEvent(e, count) for e, count in releases(mine, sampler, 0, num_rounds)]
        return dp_accounting.ComposedDpEvent(same)

    claim = {"delta": DELTA, "relation": sampler.relation}
    found = calibrate_noise_multiplier(event, target_epsilon=epsilon, **claim).noise_multiplier
    return found, privacy_spent(event(found), **claim).epsilon


@cache
def method(name: str, assigned: str, epsilon: float | None, data_dir: Path | None, smoke: bool) -> Method:
    """A contender, compiled once for its seeds and learning rates."""
    split, clients, _ = world(data_dir, smoke)
    tier_of = assign(split.train, assigned)
    devices = np.asarray(SERVED[name], np.int32)[tier_of]
    num, scale = clients.num_clients, clients.num_clients / 943
    model = matrix_factorization(split.num_items, dim=DIM, l2=L2)
    server = optax.inject_hyperparams(optax.adam)(learning_rate=0.02)
    algorithm = fedsgd(model, server_optimizer=server, negatives=Negatives(4))
    sampler, num_rounds, hours = poisson(num, cohort_size=COHORT_SIZE * scale), 4 if smoke else NUM_ROUNDS, None
    limit = 3600 * (0.2 if smoke else HOURS)
    tick = BUFFER / COHORT_SIZE * float(np.dot(SHARES, TIMES.medians)) * math.exp(TIMES.spread**2 / 2)
    if name == "large devices alone train":
        share = np.mean(tier_of == 0)  # as many of them in a round as of all devices elsewhere
        sampler = stragglers(poisson(num, cohort_size=sampler.expected_size / share), tier_of, (1.0, 0.0, 0.0))
    elif name in ("tiers", "all devices small"):
        algorithm = with_tiers(algorithm, TIERS, devices, AXES)
    elif name == "wait for all":
        hours = _synchronous(sampler, tier_of, limit, math.inf)
    elif name == "deadline":
        hours = _synchronous(sampler, tier_of, limit, DEADLINE)
        sampler = stragglers(sampler, tier_of, TIMES.survival(DEADLINE))
    elif name == "stale":
        sampler = poisson(num, cohort_size=BUFFER * scale)
        late = TIMES.lateness(tier_of, tick=tick, key=jax.random.key(7))
        algorithm = with_staleness(algorithm, late, max_staleness=MAX_STALENESS)
        hours = tick * np.arange(1, int(limit / tick) + 1) / 3600
    elif name == "buffered":
        sizes = {"buffer_size": round(BUFFER * scale), "concurrency": round(COHORT_SIZE * scale)}
        arrivals = simulate_arrivals(
            *(TIMES, tier_of),
            num_rounds=int(1.5 * limit / tick),
            **sizes,
            max_staleness=MAX_STALENESS,
            rest=REST,
            seed=0,
        )
        sampler = arrival_sampler(arrivals)
        algorithm = with_staleness(algorithm, arrivals.lateness, max_staleness=MAX_STALENESS)
        hours = arrivals.seconds[arrivals.seconds <= limit] / 3600
    if hours is not None:
        num_rounds = len(hours)
    stops = np.unique(np.linspace(0, num_rounds, 1 + (1 if hours is None else CHECKPOINTS)).astype(int)[1:])
    noise, spent = noise_for(sampler, num_rounds, epsilon)
    links = user_level_dp(l2_clip_norm=L2_CLIP_NORM, noise_multiplier=noise) if noise else chain()
    rounds = make_rounds(algorithm, links, sampler, clients, span_size=num_rounds)
    at = tuple(None if hours is None else float(hours[stop - 1]) for stop in stops)
    return Method(rounds, tuple(int(stop) for stop in stops), at, spent, noise, devices)


def _synchronous(sampler: Sampler, tier_of: np.ndarray, limit: float, deadline: float) -> np.ndarray:
    """Hours at which rounds end, up to the limit."""
    draw = jax.jit(jax.vmap(partial(sampler.draw, jax.random.key(0))))
    cohorts = np.asarray(draw(jnp.arange(int(limit / TIMES.medians[0]))))
    seconds = synchronous_seconds(cohorts, TIMES, tier_of, seed=0, deadline=deadline)
    return seconds[seconds <= limit] / 3600


@partial(jax.jit, static_argnames="num_steps")
def fit_users(items: jax.Array, bias: jax.Array, labels: jax.Array, weights: jax.Array, mask: jax.Array, num_steps=60):
    """What every device does in the end: fit its user vector to the items, by Adam on its own logistic loss.

    Args:
      items: float32 ``[items, dim]``.
      bias: float32 ``[items]``.
      labels: float32 ``[users, items]``, 1 for what the device trains on.
      weights: float32, alike; an expectation over drawn negatives.
      mask: float32 ``[users, dim]``, 1 for what the device holds.
      num_steps: of Adam, from zero.
    """
    optimizer = optax.adam(0.1)

    def loss(users):
        scores = users @ items.T + bias[None, :]
        fit = jnp.sum(weights * (jnp.logaddexp(0.0, scores) - labels * scores), 1)
        return jnp.sum(fit + 0.5 * L2 * jnp.sum(users**2, 1))

    def step(_, carry):
        users, state = carry
        updates, state = optimizer.update(jax.grad(loss)(users) * mask, state)
        return users + updates, state

    users = jnp.zeros(mask.shape)
    return jax.lax.fori_loop(0, num_steps, step, (users, optimizer.init(users)))[0]


@cache
def readout(assigned: str, name: str, data_dir: Path | None, smoke: bool):
    """Labels, weights and masks of `fit_users` for the devices of a method."""
    split, _, _ = world(data_dir, smoke)
    train, devices = split.train, np.asarray(SERVED[name])[assign(split.train, assigned)]
    known, seen = np.zeros((2, train.num_users, train.num_items), np.float32)
    last = recent(train, TIERS, devices)
    known[train.user_ids, train.item_ids] = 1
    seen[last.user_ids, last.item_ids] = 1
    positive, unknown = seen.sum(1, keepdims=True), (1 - known).sum(1, keepdims=True)
    weights = (seen + (1 - known) * 4 * positive / np.maximum(unknown, 1)) / np.maximum(5 * positive, 1)
    user = {"private": {"user": jax.ShapeDtypeStruct((DIM,), jnp.float32)}}
    masks = np.stack([held(user, tier, AXES)["private"]["user"] for tier in TIERS]).astype(np.float32)
    return jnp.asarray(seen), jnp.asarray(weights), jnp.asarray(masks[devices])


def served(shared: Any, labels: jax.Array, weights: jax.Array, mask: jax.Array) -> Scorer:
    """What each device shows with the parameters that it holds."""
    items, bias = shared.tables["item"], shared.tables["bias"][:, 0]
    return factor_scorer(fit_users(items, bias, labels, weights, mask), items, item_bias=bias)


def trained(name: str, assigned: str, epsilon: float | None, lr: float, seed: int, data_dir, smoke) -> dict:
    """One run: the metric at every stop, of every user at the last, and what it cost."""
    split, _, asked = world(data_dir, smoke)
    made = method(name, assigned, epsilon, data_dir, smoke)
    init_key, *keys = jax.random.split(jax.random.key(seed), 4)
    state, private = made.rounds.init(init_key)
    adam = state.opt_state
    adam = adam._replace(hyperparams=adam.hyperparams | {"learning_rate": jnp.float32(lr)})
    state, curve, done = state._replace(opt_state=adam), [], 0
    for stop, hour in zip(made.stops, made.hours, strict=True):
        state, private, metrics = made.rounds.run(state, private, RoundKeys(*keys), stop - done)
        done = stop
        scorer = served(state.shared, *readout(assigned, name, data_dir, smoke))
        found = {part: evaluate(scorer, asked[part], ks=(10,)) for part in asked}
        curve.append([hour, *(found[part].values[METRIC] for part in asked)])
    per_user = found["test"].per_user[METRIC]
    ranked = np.flatnonzero(per_user)
    cohort, late = (float(np.nanmean(metrics[k])) if k in metrics else 0.0 for k in ("cohort_size", "late"))
    return {
        "validation": curve[-1][1],
        METRIC: curve[-1][2],
        "curve": [[None if x is None else round(x, 5) for x in point] for point in curve],
        "hits": [found["test"].user_ids[ranked].tolist(), [round(float(x), 4) for x in per_user[ranked]]],
        "tiers": "".join(str(t) for t in assign(split.train, assigned)),
        "rounds": done,
        "cohort": cohort,
        "late": late,
        "epsilon": made.epsilon if epsilon else None,
        "noise multiplier": made.noise_multiplier,
        "relation": made.rounds.relation,
        "numbers": numbers(split.num_items),
        "split": split.fingerprint,
    }


def popularity(data_dir: Path | None, smoke: bool) -> dict:
    """What everybody likes, counted without noise: the floor."""
    split, _, asked = world(data_dir, smoke)
    value = evaluate(popularity_scorer(split.train), asked["test"], ks=(10,)).values[METRIC]
    return {METRIC: value, "split": split.fingerprint}


def numbers(num_items: int) -> dict[str, int]:
    """Shared parameters that each tier holds."""
    model = matrix_factorization(num_items, dim=DIM)
    shared = jax.eval_shape(model.init_shared, jax.random.key(0))
    return {tier.name: num_held(shared, tier, AXES) for tier in TIERS}
