"""Risk: rounds compile again (for another cohort, span or call), or memory grows while they run."""

import contextlib
import gc
from pathlib import Path

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from evaluation_worlds import make_split

from fedjax_rec.algorithms.fedavg import fedavg
from fedjax_rec.data.clients import client_data, client_data_from_examples
from fedjax_rec.data.negatives import Negatives
from fedjax_rec.federated.cohort import fixed_size, full_participation, poisson
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.models.base import Shared
from fedjax_rec.models.matrix_factorization import linear_scorer, matrix_factorization
from fedjax_rec.privacy.mechanisms import user_level_dp

NUM_CLIENTS, NUM_ITEMS = 12, 9
COMPILED = "/jax/core/compile/backend_compile_duration"
TRACED = "/jax/core/compile/jaxpr_trace_duration"


@contextlib.contextmanager
def compilations():
    """The list of what was traced and compiled inside the block."""
    events = []

    def listen(name, seconds, **details):
        if name in (COMPILED, TRACED):
            events.append((name, details))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def given_data():
    rng = np.random.default_rng(0)
    examples = [(rng.integers(0, NUM_ITEMS, n), np.ones(n)) for n in range(NUM_CLIENTS)]
    return client_data_from_examples(examples, num_items=NUM_ITEMS, num_buckets=2)


def drawn_data():
    lists = [[(user + i) % NUM_ITEMS for i in range(user % 5)] for user in range(NUM_CLIENTS)]
    return client_data(make_split(lists, [[] for _ in lists], num_items=NUM_ITEMS), num_buckets=2)


def dp_rounds(model, data, sampler, **training):
    scheduled = optax.inject_hyperparams(optax.adam)(optax.linear_schedule(0.1, 0.0, 9), eps=1e-6)
    algorithm = fedavg(model, client_optimizer=optax.sgd(0.1), server_optimizer=scheduled, **training)
    transforms = user_level_dp(l2_clip_norm=1.0, noise_multiplier=1.0)
    return make_rounds(algorithm, transforms, sampler, data, span_size=7, chunk_size=3)


def weakly_typed():
    """A model whose dense leaf is of Python's number type until something says otherwise."""
    model = linear_scorer(NUM_ITEMS, dim=2)

    def init_shared(key):
        return Shared(model.init_shared(key).tables, {"out": jnp.full(2, 0.1), "bias": jnp.zeros(())})

    assert init_shared(jax.random.key(0)).dense["out"].weak_type
    return model._replace(init_shared=init_shared)


CASES = {
    "poisson": lambda: dp_rounds(
        matrix_factorization(NUM_ITEMS, dim=2),
        drawn_data(),
        poisson(NUM_CLIENTS, cohort_size=4),
        negatives=Negatives(2),
        batch_size=2,
    ),
    "fixed_size": lambda: dp_rounds(
        linear_scorer(NUM_ITEMS, dim=2), given_data(), fixed_size(NUM_CLIENTS, cohort_size=5)
    ),
    "weakly typed": lambda: dp_rounds(weakly_typed(), given_data(), full_participation(NUM_CLIENTS)),
}


def keys(seed=0):
    return RoundKeys(*(jax.random.key(3 * seed + i) for i in range(3)))


def test_the_listener_hears_a_compilation():
    with compilations() as events:
        jax.jit(lambda x: x * 3 + 1)(jnp.ones(3)).block_until_ready()
    assert {name for name, _ in events} == {COMPILED, TRACED}


@pytest.mark.parametrize("case", CASES)
def test_after_the_first_round_nothing_compiles(case):
    """Not a second round, a span of another length, a cohort of another size, other keys, nor a new start."""
    rounds = CASES[case]()
    received = rounds.init(jax.random.key(0))
    with compilations() as events:
        state, private, _ = rounds.run(*received, keys())
    assert sum(name == COMPILED for name, _ in events) == 1  # the round itself, and nothing around it
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(received))  # donated
    all_keys = [keys(seed) for seed in range(4)]
    again = rounds.init(jax.random.key(1))
    sizes = []
    with compilations() as events:
        state, private, _ = rounds.run(state, private, all_keys[0])
        for length in (1, 2, 5, 7):
            state, private, metrics = rounds.run(state, private, all_keys[1], length)
            sizes.append(metrics["cohort_size"])
        rounds.run(*again, all_keys[2], 3)
    assert events == []
    if case == "poisson":
        sizes = np.concatenate(sizes)
        assert len(set(sizes[~np.isnan(sizes)])) > 3


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the process's memory from /proc")
def test_memory_does_not_grow_over_a_thousand_rounds():
    """A thousand calls of one round each: no array is left behind, and the process stays as large as after 100."""
    rounds = dp_rounds(linear_scorer(5_000, dim=8), given_data(), full_participation(NUM_CLIENTS))
    state, private = rounds.init(jax.random.key(0))
    run_keys = keys()
    table_bytes = 5_000 * 8 * 4
    measured = {}
    for done in range(1, 1001):
        state, private, metrics = rounds.run(state, private, run_keys)
        if done in (100, 1000):
            jax.block_until_ready((state, metrics))
            gc.collect()
            measured[done] = len(jax.live_arrays()), resident_bytes()
    assert int(state.round) == 1000
    assert measured[1000][0] == measured[100][0]
    assert measured[1000][1] - measured[100][1] < 100 * table_bytes  # one table kept a round would be 900
