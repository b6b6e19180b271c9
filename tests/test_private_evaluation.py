"""Risk: metrics that leak: more sensitive than their noise, divided by a secret, or stopping a run for free."""

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from fedjax_rec.evaluation.exact import evaluate
from fedjax_rec.evaluation.heldout import cases
from fedjax_rec.evaluation.metrics import MetricState, metric_names, metric_state, user_metrics
from fedjax_rec.evaluation.private import (
    PrivateEarlyStopping,
    PrivateMetrics,
    StoppingState,
    release_metrics,
    state_of,
)
from fedjax_rec.evaluation.ranks import Ranks
from fedjax_rec.models.popularity import popularity_scorer
from fedjax_rec.privacy.ledger import Ledger

KS = (2, 5)
NAMES = metric_names(KS)
NUM_USERS, NUM_ITEMS, NUM_POSITIVES = 6, 9, 3
EXPOSURE = np.zeros((len(KS), NUM_ITEMS), np.float32)


def state(sums):
    return MetricState(jnp.asarray(sums, jnp.float32), jnp.float32(NUM_USERS), EXPOSURE)


@jax.jit
def summed(better, tied, positives, real):
    ranks = Ranks(better, tied, positives, jnp.full(NUM_USERS, NUM_ITEMS))
    return metric_state(user_metrics(ranks, ks=KS), real=real, exposure=EXPOSURE).sums


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    scores=hnp.arrays(np.int32, (NUM_USERS, NUM_ITEMS), elements=st.integers(0, 4)),
    user=st.integers(0, NUM_USERS - 1),
)
def test_one_user_moves_m_metrics_by_at_most_sqrt_m(scores, user):
    """The real metrics of the real sum, with and without one user, whatever the scores and ties."""
    of_positives = scores[:, :NUM_POSITIVES, None]
    better = (scores[:, None] > of_positives).sum(axis=2).astype(np.int32)
    tied = ((scores[:, None] == of_positives).sum(axis=2) - 1).astype(np.int32)
    positives = np.ones((NUM_USERS, NUM_POSITIVES), bool)
    everyone = np.ones(NUM_USERS, bool)
    difference = np.asarray(summed(better, tied, positives, everyone)) - np.asarray(
        summed(better, tied, positives, everyone & (np.arange(NUM_USERS) != user))
    )
    assert np.all(np.abs(difference) <= 1 + 1e-5)
    assert np.linalg.norm(difference) <= np.sqrt(len(NAMES)) * (1 + 1e-5)


def test_the_noise_is_the_one_that_is_charged():
    """Over many keys: sums plus noise of z sqrt(m), over the public number of users."""
    z, names, public = 3.0, ("ndcg@5", "hit@2"), 50
    sums = np.linspace(0, 5, len(NAMES))
    found = [
        release_metrics(state(sums), ks=KS, names=names, noise_multiplier=z, num_users=public, key=jax.random.key(seed))
        for seed in range(600)
    ]
    true = np.array([sums[NAMES.index(name)] for name in names])
    noise = np.array([[one.values[name] * public for name in names] for one in found]) - true
    stddev = z * np.sqrt(2)
    assert stats.kstest(noise.ravel(), "norm", args=(0, stddev)).pvalue > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(noise.ravel(), "norm", args=(0, wrong * stddev)).pvalue < 1e-9
    assert abs(np.corrcoef(noise.T)[0, 1]) < 0.15
    assert found[0].event == dp_accounting.GaussianDpEvent(z)
    assert found[0].standard_errors == dict.fromkeys(names, stddev / public)
    spent = found[0].charge(Ledger()).spent(1e-5)
    assert spent.epsilon == pytest.approx(dp_accounting.get_epsilon_gaussian(z, 1e-5), rel=1e-3)


def test_only_the_chosen_metrics_leave_and_the_true_number_of_users_does_not():
    sums = np.ones(len(NAMES))

    def release(state, seed=0):
        options = {"ks": KS, "names": ("auc",), "noise_multiplier": 1.0, "num_users": 10}
        return release_metrics(state, key=jax.random.key(seed), **options)

    first = release(state(sums))
    assert list(first.values) == ["auc"]
    fewer = state(sums)._replace(num_users=jnp.float32(3), exposure=EXPOSURE + 7)
    assert release(fewer) == first
    other = release(state(sums), seed=1)
    assert other.values != first.values


def test_the_state_of_an_evaluation_gives_its_means(evaluated):
    evaluation, num_users = evaluated
    names = metric_names((5,))
    means = state_of(evaluation).sums / num_users
    np.testing.assert_allclose(means, [evaluation.values[name] for name in names], rtol=1e-5)
    near = release_metrics(
        state_of(evaluation), ks=(5,), names=names, noise_multiplier=1e-6, num_users=num_users, key=jax.random.key(0)
    )
    assert near.values["ndcg@5"] == pytest.approx(evaluation.values["ndcg@5"], abs=1e-6)


@pytest.fixture(scope="module")
def evaluated():
    import fedjax_rec as fr

    split = fr.leave_one_out(fr.load("synthetic", num_users=30, num_items=40))
    return evaluate(popularity_scorer(split.train), cases(split), ks=(5,)), 30


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"names": ("ndcg@10",)}, "Choose one or more different metrics of hit@2"),
        ({"names": ()}, "Choose one"),
        ({"names": ("auc", "auc")}, "different"),
        ({"noise_multiplier": 0.0}, "must be positive"),
        ({"num_users": 0}, "public number of users"),
    ],
)
def test_unsound_releases_are_refused(changes, words):
    known = {"ks": KS, "names": ("auc",), "noise_multiplier": 1.0, "num_users": 10, "key": jax.random.key(0)}
    with pytest.raises(ValueError, match=words):
        release_metrics(state(np.ones(len(NAMES))), **known | changes)
    with pytest.raises(ValueError, match="not finite"):
        release_metrics(state(np.full(len(NAMES), np.nan)), **known)


STOPPING = PrivateEarlyStopping(patience=2, max_releases=6)


def followed(stopping, values, **options):
    found, states = StoppingState(), []
    for value in values:
        found = stopping.step(found, value, **options)
        states.append(found)
        if found.stopped:
            break
    return states


def test_a_run_stops_after_patience_and_keeps_the_best_release():
    states = followed(STOPPING, [0.1, 0.3, 0.2, 0.25, 0.9])
    assert [s.stopped for s in states] == [False, False, False, True]
    assert (states[-1].best, states[-1].best_release, states[-1].num_releases) == (0.3, 1, 4)
    rising = followed(STOPPING, np.arange(10.0))
    assert (len(rising), rising[-1].stopped) == (6, True)  # the plan ends


def test_improvements_within_the_noise_need_not_count():
    careful = PrivateEarlyStopping(patience=2, max_releases=9, min_improvement=2.0)
    assert len(followed(careful, [0.1, 0.15, 0.19, 0.9], standard_error=0.05)) == 3
    assert len(followed(careful, [0.1, 0.25, 0.4, 0.9], standard_error=0.05)) == 4


def test_no_release_is_made_that_was_not_planned():
    for over in (StoppingState(stopped=True), StoppingState(num_releases=6)):
        with pytest.raises(ValueError, match="is not planned"):
            STOPPING.step(over, 1.0)
    for options in ({"patience": 0}, {"max_releases": 0}, {"min_improvement": -1.0}):
        with pytest.raises(ValueError, match=r"at least 1|not negative"):
            PrivateEarlyStopping(**{"patience": 1, "max_releases": 1} | options)


def test_each_release_is_charged_and_the_rest_of_the_plan_at_the_end():
    """Wherever it stops, the ledger's epsilon is that of the plan."""
    z, spent = 4.0, []
    for values in ([0.1, 0.3, 0.2, 0.2], [0.5, 0.4, 0.3], np.arange(6.0)):
        found, ledger = StoppingState(), Ledger()
        for value in values:
            released = PrivateMetrics({"auc": float(value)}, {"auc": 0.01}, dp_accounting.GaussianDpEvent(z))
            found, ledger = STOPPING.observe(found, released, ledger, metric="auc")
        assert found.stopped
        assert sum(entry.count for entry in ledger.entries) == len(values)
        assert {entry.phase for entry in ledger.entries} == {"evaluation"}
        ledger = STOPPING.charge_plan(found, ledger, noise_multiplier=z)
        spent.append(ledger.spent(1e-5).epsilon)
    assert spent == pytest.approx([dp_accounting.get_epsilon_gaussian(z / np.sqrt(6), 1e-5)] * 3, rel=1e-6)
    assert STOPPING.planned(z) == dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(z), 6)


def test_decisions_are_a_function_of_released_numbers_alone():
    """Two worlds with the same released values decide alike, whatever their true metrics."""
    values = [0.2, 0.1, 0.3, 0.1, 0.1]
    assert followed(STOPPING, values) == followed(STOPPING, list(values))
    assert StoppingState._fields == ("num_releases", "best", "best_release", "since_best", "stopped")
