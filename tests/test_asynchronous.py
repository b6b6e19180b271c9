"""Risk: rounds that do not wait train on the wrong parameters, or spend more privacy than the ledger says."""

import math

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_sensitivity import (
    ANY,
    CLIP,
    DIM,
    MILD,
    NUM_CLIENTS,
    NUM_ITEMS,
    SAMPLER,
    TOLERANCE,
    cohorts,
    drawn_examples,
    moved,
    pre_noise_sum,
    users,
    with_and_without,
)

from fedjax_rec.algorithms.fedavg import fedavg
from fedjax_rec.algorithms.scaffold import scaffold
from fedjax_rec.federated.asynchronous import Stale, stragglers, with_staleness
from fedjax_rec.federated.cohort import fixed_size, poisson
from fedjax_rec.federated.device_times import (
    Arrivals,
    DeviceTimes,
    arrival_sampler,
    simulate_arrivals,
    synchronous_seconds,
)
from fedjax_rec.federated.releases import releases
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.transforms import UpdateTransform, chain
from fedjax_rec.models.base import Shared
from fedjax_rec.models.matrix_factorization import matrix_factorization
from fedjax_rec.privacy.accounting import privacy_spent
from fedjax_rec.privacy.ledger import Ledger
from fedjax_rec.privacy.mechanisms import clip_by_global_norm, gaussian_noise, user_level_dp

MOST, NUM_ROUNDS = 2, 5
MODEL = matrix_factorization(NUM_ITEMS, dim=DIM)
BASE = fedavg(MODEL, client_optimizer=optax.sgd(0.5), local_epochs=2)
# Client 0 is never late, 1 one round, 2 two, 3 three (too late for two kept states), 4 alternates, 5 is never late.
LATE = np.array([[0, 1, 2, 3, t % 3, 0] for t in range(NUM_ROUNDS)], np.int32)


PROBE = UpdateTransform(
    init=lambda params: jax.tree.map(jnp.zeros_like, Shared(params.tables, params.dense)),
    server=lambda total, *_: (total, total),
)
CHAIN = chain(clip_by_global_norm(CLIP), gaussian_noise(1.0), PROBE)  # the server runs it from the right


def of_table(round_index):
    return jnp.asarray(LATE).at[round_index].get(mode="clip")


def nobody(round_index):
    del round_index
    return jnp.zeros(NUM_CLIENTS, jnp.int32)


def compiled(algorithm):
    return make_rounds(algorithm, CHAIN, SAMPLER, drawn_examples(), span_size=NUM_ROUNDS)


@pytest.fixture(scope="module")
def synchronous():
    return compiled(BASE)


@pytest.fixture(scope="module")
def stale():
    return compiled(with_staleness(BASE, of_table, max_staleness=MOST))


KEYS = RoundKeys(*(jax.random.key(seed) for seed in (3, 0, 1)))


def run(rounds, num_rounds=NUM_ROUNDS, start=None):
    start = rounds.init(jax.random.key(0)) if start is None else jax.tree.map(jnp.array, start)
    return jax.device_get(rounds.run(*start, KEYS, num_rounds))


def test_nobody_late_is_the_synchronous_run_bit_for_bit(synchronous):
    """Several rounds with clip and noise; old states are kept, and who reads them is decided in the round."""
    state, private, metrics = run(compiled(with_staleness(BASE, nobody, max_staleness=MOST)))
    plain, plain_private, plain_metrics = run(synchronous)
    assert np.all(metrics.pop("late") == 0)
    same = np.testing.assert_array_equal
    jax.tree.map(same, (state.shared.tables, private, metrics), (plain.shared.tables, plain_private, plain_metrics))
    jax.tree.map(same, (state.opt_state, state.transforms[2]), (plain.opt_state, plain.transforms[2]))


def test_a_late_client_sends_what_it_would_have_sent_then_and_weighs_less(synchronous, stale):
    """Each client alone, in round 3, against a synchronous round whose server holds the old parameters."""
    states = [run(stale, rounds)[0] for rounds in (1, 2, 3)]
    state, private = jax.device_get(stale.init(jax.random.key(0)))[0], run(stale, 3)[1]
    history = [state, *states]  # history[t].shared is what the server holds before round t
    now = history[3]._replace(round=jnp.int32(0))  # the test's cohorts are those of round 0
    for lag, past in ((1, history[2]), (2, history[1])):
        for name, table in past.shared.tables.items():
            np.testing.assert_array_equal(now.shared.past.tables[name][lag - 1], table)
    np.testing.assert_array_equal(now.shared.late, LATE[3])
    for client, late in enumerate(LATE[3]):
        alone = np.arange(NUM_CLIENTS) == client
        sent = pre_noise_sum(stale, now, private, alone)
        if late > MOST:
            assert moved(sent, jax.tree.map(np.zeros_like, sent)) == 0
            continue
        old = history[3 - late].shared
        reference = jax.device_get(synchronous.init(jax.random.key(0)))[0]
        reference = reference._replace(shared=reference.shared._replace(tables=old.tables))
        expected = pre_noise_sum(synchronous, reference, private, alone)
        for name, table in expected.tables.items():
            np.testing.assert_allclose(sent.tables[name], table / math.sqrt(1 + late), rtol=1e-5, atol=1e-7)
        assert (moved(expected, jax.tree.map(np.zeros_like, expected)) > 1e-3) == (client != 1)  # client 1 has no data


def test_first_rounds_read_the_initial_parameters(stale):
    state, _ = jax.device_get(stale.init(jax.random.key(0)))
    assert isinstance(state.shared, Stale)
    for name, past in state.shared.past.tables.items():
        np.testing.assert_array_equal(past, np.stack([state.shared.tables[name]] * MOST))


def test_a_resumed_run_is_the_unbroken_one(stale):
    state, private, _ = run(stale, 2)
    jax.tree.map(np.testing.assert_array_equal, run(stale, 2, (state, private))[:2], run(stale, 4)[:2])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    past=hnp.arrays(np.float32, (MOST, NUM_ITEMS, DIM), elements=MILD | st.sampled_from([0.0, 1e3, 1e30]), fill=MILD),
    vectors=hnp.arrays(np.float32, (NUM_CLIENTS, DIM), elements=ANY | MILD, fill=MILD),
    late=hnp.arrays(np.int32, NUM_CLIENTS, elements=st.integers(0, MOST + 1)),
    cohort=cohorts,
    user=users,
)
def test_one_user_moves_the_sum_by_no_more_than_the_clip(stale, past, vectors, late, cohort, user):
    """Whatever old states the clients read, and however late each of them is."""
    state, _ = stale.init(jax.random.key(0))
    old = state.shared.past._replace(tables=state.shared.past.tables | {"item": jnp.asarray(past)})
    state = state._replace(shared=state.shared._replace(past=old, late=jnp.asarray(late, jnp.float32)))
    sums = [pre_noise_sum(stale, state, {"user": vectors}, mask) for mask in with_and_without(cohort, user)]
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(sums))
    assert moved(*sums) <= CLIP * (1 + TOLERANCE)


def test_the_bound_is_reached_by_a_late_client(stale):
    state, _ = stale.init(jax.random.key(0))
    old = state.shared.past._replace(tables=state.shared.past.tables | {"item": jnp.full((MOST, NUM_ITEMS, DIM), 30.0)})
    state = state._replace(shared=state.shared._replace(past=old))
    vectors = {"user": np.full((NUM_CLIENTS, DIM), -30.0, np.float32)}
    sums = [pre_noise_sum(stale, state, vectors, mask) for mask in with_and_without(np.ones(NUM_CLIENTS, bool), 2)]
    assert moved(*sums) == pytest.approx(CLIP, rel=1e-3)


def test_the_ledger_is_that_of_the_synchronous_run(stale, synchronous):
    charged = [rounds.charge(Ledger(), first_round=0, num_rounds=3).entries for rounds in (stale, synchronous)]
    assert charged[0] == charged[1] != ()


def test_refused_staleness():
    with pytest.raises(ValueError, match="at least 0; got -1"):
        with_staleness(BASE, nobody, max_staleness=-1)
    other = scaffold(MODEL, lr=0.1, num_control_rows=7, mean_local_steps=1.0, sampling_prob=0.5)
    with pytest.raises(ValueError, match="other state too"):
        with_staleness(other, nobody, max_staleness=1)


# Stragglers.

TIER_OF = np.repeat([0, 1, 2], 20)


def draws(sampler, num_rounds=400):
    draw = jax.jit(jax.vmap(lambda t: sampler.draw(jax.random.key(5), t)))
    return np.asarray(draw(jnp.arange(num_rounds)))


def test_stragglers_are_missing_by_tier():
    base = poisson(60, cohort_size=30)
    late = stragglers(base, TIER_OF, (1.0, 0.5, 0.0))
    called, sent = draws(base), draws(late)
    assert np.all(sent <= called)
    np.testing.assert_array_equal(sent[:, :20], called[:, :20])
    assert not sent[:, 40:].any()
    assert sent[:, 20:40].mean() == pytest.approx(0.25, abs=0.02)
    assert np.ptp(sent[:, 20:40].mean(0)) > 0  # each by coins of its own
    assert late.expected_size == pytest.approx(30 * (20 + 10) / 60)
    assert late.sampling_prob == pytest.approx(0.25)
    assert sent.sum(1).mean() == pytest.approx(late.expected_size, rel=0.03)


@pytest.mark.parametrize("base", [poisson(60, cohort_size=30), fixed_size(60, cohort_size=30)], ids=lambda s: s.name)
def test_stragglers_are_charged_as_if_all_were_in_time(base):
    late, event = stragglers(base, TIER_OF, (1.0, 0.5, 0.0)), dp_accounting.GaussianDpEvent(1.0)
    assert (late.dp_event(event), late.relation, late.name) == (base.dp_event(event), base.relation, base.name)


def test_refused_stragglers():
    for chances in ((1.1, 0, 0), (0.0, 0.0, 0.0)):
        with pytest.raises(ValueError, match="chances in"):
            stragglers(poisson(60, cohort_size=5), TIER_OF, chances)


# The clock.


def test_times_follow_their_distribution():
    times = DeviceTimes((10.0, 80.0), spread=0.5)
    taken = times.draw(np.repeat([0, 1], 20_000), np.random.default_rng(0)).reshape(2, -1)
    np.testing.assert_allclose(np.median(taken, axis=1), [10, 80], rtol=0.02)
    np.testing.assert_allclose(np.log(taken).std(axis=1), 0.5, rtol=0.02)
    np.testing.assert_allclose((taken <= 30).mean(axis=1), times.survival(30.0), atol=0.01)
    late = times.lateness(np.repeat([0, 1], 20_000), tick=15.0, key=jax.random.key(0))
    drawn, again, next_round = (np.asarray(late(t)) for t in (0, 0, 1))
    np.testing.assert_array_equal(drawn, again)
    assert np.any(drawn != next_round)
    expected = (np.ceil(taken / 15) - 1).mean(axis=1)
    np.testing.assert_allclose(drawn.reshape(2, -1).mean(axis=1), expected, rtol=0.03)
    assert DeviceTimes((2.0, 8.0)).survival(5.0).tolist() == [1, 0]
    exact = DeviceTimes((2.0, 8.0)).lateness(np.array([0, 1]), tick=2.0, key=jax.random.key(0))
    assert exact(4).tolist() == [0, 3]


def test_synchronous_rounds_wait_for_the_slowest_or_the_deadline():
    cohorts_of_rounds = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 1], [0, 0, 0]], bool)
    times, tiers = DeviceTimes((1.0, 4.0, 20.0)), np.arange(3)
    found = synchronous_seconds(cohorts_of_rounds, times, tiers, seed=0)
    assert found.tolist() == [1, 5, 25, 25]
    assert synchronous_seconds(cohorts_of_rounds, times, tiers, seed=0, deadline=6.0).tolist() == [1, 5, 11, 11]


def test_buffered_arrivals_by_hand():
    """One fast client (1 s) and one slow (3.5 s), both always busy, a step for each update: F F F S F F F F S ..."""
    found = simulate_arrivals(
        *(DeviceTimes((1.0, 3.5)), np.array([0, 1])),
        num_rounds=9,
        buffer_size=1,
        concurrency=2,
        max_staleness=9,
        seed=0,
    )
    assert found.who[:, 1].tolist() == [False] * 3 + [True] + [False] * 4 + [True]
    assert found.seconds.tolist() == [1, 2, 3, 3.5, 4, 5, 6, 7, 7]  # at 7 s both are done, the client of lower id first
    assert found.late[3, 1] == 3  # called at step 0, in step 3
    assert found.late[4, 0] == 1  # called at 3 s in step 3, done at 4 s in step 4
    impatient = simulate_arrivals(
        *(DeviceTimes((1.0, 3.5)), np.array([0, 1])),
        num_rounds=9,
        buffer_size=1,
        concurrency=2,
        max_staleness=2,
        seed=0,
    )
    assert not impatient.who[:, 1].any()


@pytest.fixture(scope="module")
def arrivals():
    times = DeviceTimes((1.0, 2.0, 8.0), spread=0.4)
    limits = {"buffer_size": 4, "concurrency": 12, "max_staleness": 6, "rest": 3}
    return simulate_arrivals(times, TIER_OF, num_rounds=200, **limits, seed=1)


def test_buffered_arrivals_keep_their_promises(arrivals):
    assert np.all(arrivals.who.sum(1) == 4)
    assert arrivals.late.max() == 6
    assert not arrivals.late[~arrivals.who].any()
    assert np.all(np.diff(arrivals.seconds) >= 0)
    gaps = [np.diff(np.flatnonzero(mine)) for mine in arrivals.who.T]
    assert min(gap.min() for gap in gaps if len(gap)) == 3
    rounds, clients = np.nonzero(arrivals.who)
    begun = rounds - arrivals.late[rounds, clients]
    assert np.all(begun >= 0)
    by_tier = [arrivals.who[:, tier == TIER_OF].sum() for tier in range(3)]
    assert min(by_tier[:2]) > by_tier[2] > 0  # the slow come less often, being busy longer
    lateness = [arrivals.late[:, tier == TIER_OF].sum() / by_tier[tier] for tier in range(3)]
    assert lateness[0] < lateness[1] < lateness[2]


def test_arrivals_are_charged_for_every_participation(arrivals):
    """Without amplification, and against the analytic Gaussian: replacing a user moves each sum by twice the clip."""
    sampler, num_rounds = arrival_sampler(arrivals), 20
    np.testing.assert_array_equal(draws(sampler, 210)[:200], arrivals.who)
    assert not draws(sampler, 210)[200:].any()
    assert (sampler.expected_size, sampler.relation, sampler.num_groups) == (4, "replace_one", 3)
    found = releases(user_level_dp(l2_clip_norm=CLIP, noise_multiplier=9.0), sampler, 0, num_rounds)
    charged = [count for event, count in found if isinstance(event, dp_accounting.GaussianDpEvent)]
    participations = max(
        arrivals.who[start : start + num_rounds].sum(0).max() for start in range(0, 200 - num_rounds, 3)
    )
    assert participations <= sum(charged) == 7  # ceil(20 / 3)
    events = dp_accounting.ComposedDpEvent([dp_accounting.SelfComposedDpEvent(e, n) for e, n in found])
    spent = privacy_spent(events, delta=1e-5, relation=sampler.relation).epsilon
    closed = dp_accounting.get_epsilon_gaussian(9.0 / (2 * math.sqrt(7)), 1e-5)
    assert spent == pytest.approx(closed, rel=1e-3)
    open_buffer = arrival_sampler(arrivals, relation="add_or_remove_one")
    assert open_buffer.relation == "add_or_remove_one"
    with pytest.raises(ValueError, match="zero_out"):
        arrival_sampler(arrivals, relation="zero_out")


def test_arrivals_through_the_round():
    """The buffer's clients train in the round in which they arrive, each as late as the table says."""
    who, late = np.zeros((2, 2, NUM_CLIENTS), int)
    who[0, [0, 2]] = who[1, [4, 5]] = 1
    late[1, 4] = 1
    table = Arrivals(who.astype(bool), late, np.array([1.0, 2.0]), 2)
    algorithm = with_staleness(BASE, table.lateness, max_staleness=1)
    rounds = make_rounds(algorithm, CHAIN, arrival_sampler(table), drawn_examples(), span_size=2)
    _, private, metrics = rounds.run(*rounds.init(jax.random.key(0)), KEYS, 2)
    assert metrics["cohort_size"].tolist() == [2, 2]
    assert metrics["late"].tolist() == [0, 0.5]
    before = rounds.init(jax.random.key(0))[1]["user"]
    moved_clients = np.any(np.asarray(private["user"]) != np.asarray(before), axis=1)
    assert moved_clients.tolist() == [True, False, True, False, True, True]
    assert (
        sum(entry.count for entry in rounds.charge(Ledger(relation="replace_one"), first_round=0, num_rounds=2).entries)
        == 1
    )  # one turn of two rounds


def test_refused_clocks():
    times, one = DeviceTimes((1.0,)), np.zeros(6, int)
    with pytest.raises(ValueError, match="must be positive"):
        DeviceTimes((0.0, 1.0))
    with pytest.raises(ValueError, match="positive number of seconds"):
        times.survival(0.0)
    with pytest.raises(ValueError, match="between 1 and the 6 clients"):
        simulate_arrivals(times, one, num_rounds=1, buffer_size=7, concurrency=1, max_staleness=0, seed=0)
    with pytest.raises(ValueError, match="All clients rest at step 2"):
        simulate_arrivals(times, one, num_rounds=9, buffer_size=3, concurrency=3, max_staleness=9, rest=4, seed=0)
