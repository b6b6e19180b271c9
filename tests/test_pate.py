"""Risk: a teacher's vote moves more than its noise is for, or queries are answered that nobody has paid for."""

import math

import jax
import numpy as np
import pytest
from dp_accounting import get_epsilon_gaussian
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from experiments._intents import Queries, World, teacher_votes
from fedjax_rec.models.class_sums import NameSpace
from fedjax_rec.models.labelled_vectors import LabelledVectors
from fedjax_rec.privacy.ledger import Ledger
from fedjax_rec.privacy.pate import UNANSWERED, charge, confident_gnmax, noise_for, vote_counts

TEACHERS, QUERIES, CLASSES = 5, 4, 3
classes = st.integers(0, CLASSES - 1)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    predictions=hnp.arrays(np.int32, (TEACHERS, QUERIES), elements=classes),
    others=hnp.arrays(np.int32, QUERIES, elements=classes),
    teacher=st.integers(0, TEACHERS - 1),
)
def test_one_teacher_moves_a_query_by_root_two_and_its_largest_count_by_one(predictions, others, teacher):
    neighbour = predictions.copy()
    neighbour[teacher] = others
    a, b = (vote_counts(one, CLASSES) for one in (predictions, neighbour))
    assert np.all(a.sum(1) == TEACHERS)
    np.testing.assert_allclose(np.linalg.norm(a - b, axis=1), np.where(predictions[teacher] == others, 0, math.sqrt(2)))
    assert np.all(np.abs(a.max(1) - b.max(1)) <= 1)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(user=st.integers(0, 8), seed=st.integers(0, 1000))
def test_one_client_is_in_one_teacher(user, seed):
    """The study's teachers, a client's rows replaced, or gone: at most one vote of each query moves."""
    rng = np.random.default_rng(seed)
    names, queries = rng.normal(size=(CLASSES, 2)).astype(np.float32), rng.normal(size=(6, 2)).astype(np.float32)
    vectors, labels = rng.normal(size=(9, 4, 2)).astype(np.float32), rng.integers(0, CLASSES, (9, 4))
    space = NameSpace(np.zeros(2, np.float32), np.eye(2, dtype=np.float32), names)
    world = World(["a", "b", "c"], space, *[Queries(queries, np.zeros(6))] * 3, queries, 9, 4)
    neighbour = vectors.copy(), labels.copy()
    neighbour[0][user], neighbour[1][user] = rng.normal(size=(4, 2)), rng.integers(-1, CLASSES, 4)
    a, b = (
        teacher_votes(world, LabelledVectors(*one), queries, num_teachers=3) for one in ((vectors, labels), neighbour)
    )
    assert np.all(np.abs(a - b).sum(1) <= 2)


def chances(sigma_threshold, sigma_vote, num=20_000):
    """Share of equal queries that pass, and that are answered with the class of fewer votes."""
    votes = np.tile([12, 9], (num, 1))
    sigmas = {"sigma_threshold": sigma_threshold, "sigma_vote": sigma_vote}
    passed = confident_gnmax(votes, threshold=14.0, **sigmas, key=jax.random.key(5))
    every = confident_gnmax(votes, threshold=-1e6, **sigmas, key=jax.random.key(6))
    return passed.answered.sum(), (every.labels == 1).sum(), num


def test_the_noise_is_that_of_the_claim():
    """How often a check passes and an answer is wrong, by normal probabilities; two thirds and three halves fail."""
    passed, wrong, num = chances(3.0, 4.0)
    for found, z in ((passed, 2 / 3.0), (wrong, 3 / (4.0 * math.sqrt(2)))):
        p = {factor: stats.binomtest(int(found), num, stats.norm.sf(z / factor)).pvalue for factor in (1, 2 / 3, 3 / 2)}
        assert p[1] > 1e-3
        assert max(p[2 / 3], p[3 / 2]) < 1e-9


def test_the_two_noises_of_a_query_are_not_one():
    votes, ask = np.full((4000, 2), 5), {"threshold": 5.0, "sigma_threshold": 1.0, "sigma_vote": 1.0}
    answers = confident_gnmax(votes, **ask, key=jax.random.key(5))
    assert abs(answers.answered.mean() - 0.5) < 0.03
    assert abs(answers.labels[answers.answered].mean() - 0.5) < 0.04  # whether it passed says nothing about the answer
    other = confident_gnmax(votes, **ask, key=jax.random.key(6))
    assert 0.4 < (other.answered == answers.answered).mean() < 0.6


def test_without_noise_it_is_the_plurality_of_those_who_agree():
    votes = np.array([[5, 0, 1], [2, 2, 2], [0, 1, 5], [1, 4, 1], [0, 0, 6]])
    ask = {"threshold": 4, "sigma_threshold": 0.0, "sigma_vote": 0.0}
    assert confident_gnmax(votes, **ask, key=jax.random.key(5)).labels.tolist() == [0, UNANSWERED, 2, 1, 2]
    two = confident_gnmax(votes, **ask, max_answers=2, key=jax.random.key(5))
    assert two.labels.tolist() == [0, UNANSWERED, 2, UNANSWERED, UNANSWERED]
    assert two.answered.tolist() == [True, False, True, False, False]


def test_epsilon_is_that_of_the_gaussians_and_below_their_renyi_bound():
    """mu^2 = Q / sigma_1^2 + 2 A / sigma_2^2; Renyi: least alpha mu^2 / 2 + log(1 / delta) / (alpha - 1)."""
    numbers = {"num_queries": 50, "max_answers": 20, "sigma_threshold": 60.0, "sigma_vote": 25.0}
    delta, square = 1e-5, 50 / 60.0**2 + 2 * 20 / 25.0**2
    spent = charge(Ledger(), **numbers).spent(delta)
    np.testing.assert_allclose(spent.epsilon, get_epsilon_gaussian(square**-0.5, delta), rtol=1e-3)
    renyi = square / 2 + math.sqrt(2 * square * math.log(1 / delta))
    assert 0.7 * renyi < spent.epsilon < renyi
    everything = charge(Ledger(), num_queries=50, sigma_threshold=60.0, sigma_vote=25.0)
    assert everything.spent(delta).epsilon > spent.epsilon
    assert [entry.count for entry in everything.entries] == [50, 50]


def test_noise_for_a_cost_costs_it():
    sigma_threshold, sigma_vote = noise_for(1.7, num_queries=300, max_answers=100, check_share=0.25)
    ledger = charge(Ledger(), num_queries=300, max_answers=100, sigma_threshold=sigma_threshold, sigma_vote=sigma_vote)
    np.testing.assert_allclose(ledger.spent(1e-5).epsilon, get_epsilon_gaussian(1.7, 1e-5), rtol=1e-3)


def test_refusals_say_why():
    numbers = {"num_queries": 5, "sigma_threshold": 1.0, "sigma_vote": 1.0}
    with pytest.raises(ValueError, match="replace_one"):
        charge(Ledger(relation="replace_one"), **numbers)
    with pytest.raises(ValueError, match="sigma_vote=0"):
        charge(Ledger(), **numbers | {"sigma_vote": 0})
    with pytest.raises(ValueError, match="from 1 to the 5 queries; got 6"):
        charge(Ledger(), **numbers, max_answers=6)
    with pytest.raises(ValueError, match="check_share"):
        noise_for(1.0, num_queries=5, max_answers=5, check_share=1.0)
    with pytest.raises(ValueError, match="not negative; got -1"):
        confident_gnmax(np.ones((2, 2)), threshold=1, sigma_threshold=-1, sigma_vote=1, key=jax.random.key(5))
