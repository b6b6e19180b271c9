"""Risk: noise that is put off is lost, counted twice, or not yet there when somebody reads the row."""

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from evaluation_worlds import make_split
from hypothesis import given, settings
from scipy import stats
from test_sensitivity import (
    CLIP,
    COHORTS,
    NUM_CLIENTS,
    SAMPLER,
    TOLERANCE,
    adversaries,
    cohorts,
    moved,
    nothing_but_clients,
    uploads,
    users,
    with_and_without,
)

from fedjax_rec.algorithms.fedavg import fedsgd
from fedjax_rec.data.clients import client_data, client_data_from_examples
from fedjax_rec.data.negatives import Negatives
from fedjax_rec.federated.algorithm import Algorithm, ClientOutput, ServerState
from fedjax_rec.federated.cohort import full_participation, poisson
from fedjax_rec.federated.lazy_rounds import lazy_rounds
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.rows import Rows, take_rows
from fedjax_rec.models.base import Shared
from fedjax_rec.models.matrix_factorization import matrix_factorization
from fedjax_rec.privacy.lazy_noise import apply, catch_up, flush, lazy_table, read
from fedjax_rec.privacy.mechanisms import user_level_dp

KEY = jax.random.key(7)


def keys(cohort=1, client=2, noise=3):
    return RoundKeys(*(jax.random.key(seed) for seed in (cohort, client, noise)))


# The functions by themselves.


def test_a_row_gets_the_noise_of_the_rounds_that_it_missed_and_no_other():
    """Read before rounds 3 and 5, flushed before 9: independent steps of 3, 2 and 4 times the variance."""
    num_rows, stddev = 20_000, 0.3
    table = lazy_table(jnp.full((num_rows, 2), 5.0), 0)
    half = jnp.arange(0, num_rows, 2, dtype=jnp.int32)
    first, table = read(table, half, jnp.int32(3), KEY, stddev)
    again, table = read(table, half, jnp.int32(3), KEY, stddev)
    np.testing.assert_array_equal(first, again)
    second, table = read(table, half, jnp.int32(5), KEY, stddev)
    whole = flush(table, jnp.int32(9), KEY, stddev)
    steps = [np.asarray(x, np.float64) for x in (first - 5.0, second - first, whole[half] - second, whole[1::2] - 5.0)]
    for step, rounds in zip(steps, (3, 2, 4, 9), strict=True):
        scale = stddev * np.sqrt(rounds)
        assert stats.kstest(step.ravel(), "norm", args=(0, scale)).pvalue > 1e-3
        for wrong in (2 / 3, 3 / 2):
            assert stats.kstest(step.ravel(), "norm", args=(0, wrong * scale)).pvalue < 1e-6
    correlations = np.corrcoef([step.ravel() for step in steps]) - np.eye(4)
    assert np.abs(correlations).max() < 0.03
    assert abs(np.corrcoef(steps[3][:, 0], steps[3][:, 1])[0, 1]) < 0.04
    assert abs(np.corrcoef(steps[3][1:, 0], steps[3][:-1, 0])[0, 1]) < 0.04


def test_order_and_repeats_of_reads_change_nothing():
    values = jax.random.normal(jax.random.key(1), (6, 3))
    at_once = catch_up(lazy_table(values, 2), jnp.array([[4, 1], [1, 6]]), jnp.int32(5), KEY, 1.0)  # 6 is padding
    in_turn = lazy_table(values, 2)
    for row in (1, 4, 4):
        in_turn = catch_up(in_turn, jnp.array([row]), jnp.int32(5), KEY, 1.0)
    np.testing.assert_allclose(at_once.values, in_turn.values, rtol=1e-6)
    for table in (at_once, in_turn):
        np.testing.assert_array_equal(table.noised, [2, 5, 2, 2, 5, 2])
    np.testing.assert_array_equal(at_once.values[jnp.array([0, 2, 3, 5])], values[jnp.array([0, 2, 3, 5])])
    whole = flush(at_once, jnp.int32(5), KEY, 1.0)
    np.testing.assert_array_equal(whole[1], at_once.values[1])
    row = catch_up(lazy_table(values, 2), jnp.array([0]), jnp.int32(5), KEY, 1.0).values[0]
    np.testing.assert_allclose(whole[0], row, rtol=1e-6)


def test_apply_steps_each_row_once_and_clears_its_sum():
    total = jnp.array([[1.0], [2.0], [0.0], [4.0]])
    table, left = apply(lazy_table(jnp.ones((4, 1)), 0), total, jnp.array([3, 1, 3, 4]), 0.5)
    np.testing.assert_array_equal(table.values[:, 0], [1, 2, 1, 3])
    np.testing.assert_array_equal(left[:, 0], [1, 0, 0, 0])


# Through real rounds.


def test_without_noise_these_are_the_rounds_of_the_engine():
    """Drawn negatives, several chunks, empty clients: the same cohorts, updates and metrics."""
    rng = np.random.default_rng(1)
    train = [rng.permutation(12)[:n].tolist() for n in (3, 0, 6, 1, 4, 7)]
    clients = client_data(make_split(train, [[] for _ in train], num_items=12), num_buckets=1)
    method = fedsgd(matrix_factorization(12, dim=2), server_optimizer=optax.sgd(0.5), negatives=Negatives(2))
    options = {"l2_clip_norm": 0.1, "noise_multiplier": 0.0}
    lazy = lazy_rounds(method, SAMPLER, clients, learning_rate=0.5, span_size=4, chunk_size=2, **options)
    dense = make_rounds(method, user_level_dp(**options), SAMPLER, clients, span_size=4, chunk_size=2)
    ends = [rounds.run(*rounds.init(jax.random.key(0)), keys(), 4) for rounds in (lazy, dense)]
    (state, private, metrics), (dense_state, dense_private, dense_metrics) = ends
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state.shared, dense_state.shared)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), private, dense_private)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), metrics, dense_metrics)
    assert state.round == 4


NUM_ROWS, DIM, RATE, NOISE = 2_000, 8, 0.5, 2.0


def echoes():
    """Each client reads 500 rows and sends what it read: noise that was read comes back into the table."""

    def init(key):
        del key
        tables = {"item": jnp.zeros((NUM_ROWS, DIM))}
        return ServerState(jnp.zeros((), jnp.int32), Shared(tables, {"out": jnp.zeros(2_000)}), ())

    def client_update(shared, private, client, num_steps, key):
        del num_steps, key
        ids = client.client_id * 500 + jnp.arange(500)
        rows = Rows(ids, take_rows(shared.tables["item"], ids), NUM_ROWS)
        return ClientOutput(Shared({"item": rows}, {"out": jnp.zeros(2_000)}), private, {"loss": jnp.zeros(())})

    return Algorithm(init, lambda key: (), client_update, lambda client: jnp.int32(1), lambda state, aggregate: state)


@pytest.fixture(scope="module")
def echo_rounds():
    """Two of four quarters of the table are read, in every round; clips are far above what is sent."""
    clients = client_data_from_examples([(np.zeros(1, np.int64), np.ones(1))] * 2, num_items=NUM_ROWS)
    options = {"l2_clip_norm": 1e4, "noise_multiplier": NOISE * 1e-4, "learning_rate": RATE}
    return lazy_rounds(echoes(), full_participation(2), clients, span_size=4, **options)


def test_noise_through_rounds_has_the_distribution_of_dense_noise(echo_rounds):
    """A read row doubles by a quarter a round, noise and all: sum of 1.25^(2 k); a row that owes noise would not."""
    state, _, _ = echo_rounds.run(*echo_rounds.init(jax.random.key(0)), keys(), 4)
    one = RATE / 2 * NOISE
    growth = 1 + RATE / 2
    table = np.asarray(state.shared.tables["item"], np.float64)
    expected = {
        "read": (table[:1000].ravel(), one * np.sqrt(sum(growth ** (2 * k) for k in range(4)))),
        "not read": (table[1000:].ravel(), one * np.sqrt(4)),
        "dense": (np.asarray(state.shared.dense["out"], np.float64), one * np.sqrt(4)),
    }
    for noise, scale in expected.values():
        assert stats.kstest(noise, "norm", args=(0, scale)).pvalue > 1e-3
        for wrong in (2 / 3, 3 / 2):
            assert stats.kstest(noise, "norm", args=(0, wrong * scale)).pvalue < 1e-6
    assert stats.kstest(expected["read"][0], "norm", args=(0, one * 2)).pvalue < 1e-6  # noise that nobody read


def test_a_call_after_a_resume_is_the_same_and_calls_differ(echo_rounds):
    state, private, _ = echo_rounds.run(*echo_rounds.init(jax.random.key(0)), keys(), 2)
    saved = jax.tree.map(np.asarray, (state, private))
    ends = [echo_rounds.run(*jax.tree.map(jnp.asarray, saved), keys(), 2)[0] for _ in range(2)]
    jax.tree.map(np.testing.assert_array_equal, *ends)
    first, second = (
        saved[0].shared.tables["item"][1000:],
        ends[0].shared.tables["item"][1000:] - saved[0].shared.tables["item"][1000:],
    )
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.05
    with pytest.raises(ValueError, match="span_size=4"):
        echo_rounds.run(*echo_rounds.init(jax.random.key(0)), keys(), 5)


@pytest.fixture(scope="module")
def adversarial_rounds():
    return lazy_rounds(
        adversaries(), SAMPLER, nothing_but_clients(), l2_clip_norm=CLIP, noise_multiplier=0.0, span_size=1
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(uploads=uploads, cohort=cohorts, user=users)
def test_whatever_a_client_sends(adversarial_rounds, uploads, cohort, user):
    """Without noise, a client moves the tables and dense leaves by at most the clip over the expected cohort."""
    ends = []
    for mask in with_and_without(cohort, user):
        state, _ = adversarial_rounds.init(jax.random.key(0))
        run_keys = RoundKeys(jax.random.key(COHORTS[tuple(mask)]), jax.random.key(0), jax.random.key(1))
        state, _, metrics = adversarial_rounds.run(state, jax.tree.map(jnp.array, uploads), run_keys)
        assert metrics["cohort_size"][0] == np.sum(mask)
        ends.append(jax.device_get(state.shared))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(ends))
    assert moved(*ends) <= CLIP / SAMPLER.expected_size * (1 + TOLERANCE)


def test_the_events_are_those_of_dense_noise():
    options = {"l2_clip_norm": 0.5, "noise_multiplier": 1.5}
    clients, sampler = nothing_but_clients(), poisson(NUM_CLIENTS, cohort_size=2)
    lazy = lazy_rounds(adversaries(), sampler, clients, **options)
    event = dp_accounting.PoissonSampledDpEvent(2 / NUM_CLIENTS, dp_accounting.GaussianDpEvent(1.5))
    dense = make_rounds(adversaries(), user_level_dp(**options), sampler, clients)
    assert lazy.releases(0, 5) == dense.releases(0, 5) == ((event, 5),)
    assert (lazy.relation, lazy.sampler, lazy.upload_bits) == (dense.relation, dense.sampler, dense.upload_bits)
    everyone = lazy_rounds(adversaries(), full_participation(NUM_CLIENTS), clients, **options)
    ((event, count),) = everyone.releases(0, 4)
    closed = dp_accounting.get_epsilon_gaussian(event.noise_multiplier / np.sqrt(count), 1e-5)
    np.testing.assert_allclose(closed, dp_accounting.get_epsilon_gaussian(0.75, 1e-5), rtol=1e-9)


def test_pairs_without_a_bound_refuse():
    options = {"l2_clip_norm": 0.5, "noise_multiplier": 1.5}
    looks_at_each = adversaries()._replace(individual=True)
    with pytest.raises(ValueError, match="single uploads"):
        lazy_rounds(looks_at_each, SAMPLER, nothing_but_clients(), **options)
    with pytest.raises(ValueError, match="draws from 5 clients"):
        lazy_rounds(adversaries(), full_participation(5), nothing_but_clients(), **options)
    with pytest.raises(ValueError, match="noise_multiplier must not be negative"):
        lazy_rounds(adversaries(), SAMPLER, nothing_but_clients(), l2_clip_norm=0.5, noise_multiplier=-1.0)
