"""Risk: a randomised item set is truer than its epsilon says, or its epsilon is quoted for another unit."""

import itertools
import json
import math

import dp_accounting
import numpy as np
import pytest
from anonymous_worlds import assert_nothing_old, make_interactions, random_world
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedjax_rec.anonymization.randomized_sets import bit_epsilons, randomize_sets

NUM_USERS, NUM_ITEMS = 4000, 5
SAME = make_interactions([[0, 1]] * NUM_USERS, num_items=NUM_ITEMS)  # one record, many independent coins
DESIGNS = [(1.0, None), (3.0, None), (2.0, 1.5), (0.3, 2.5)]


def released_bits(world, **options):
    release, statement = randomize_sets(world, **options)
    bits = np.zeros((world.num_users, world.num_items), int)
    bits[release.user_ids, release.item_ids] = 1
    return bits, statement


@pytest.mark.parametrize(("epsilon", "expected"), DESIGNS)
def test_bits_are_kept_and_added_as_often_as_stated(epsilon, expected):
    bits, statement = released_bits(SAME, epsilon_per_item=epsilon, seed=0, expected_items=expected)
    p, q = statement["keep_prob"], statement["add_prob"]
    for part, prob in ((bits[:, :2], p), (bits[:, 2:], q)):
        ones = int(part.sum())
        assert stats.binomtest(ones, part.size, prob).pvalue > 1e-4
        for wrong in (prob * 2 / 3, 1 - (1 - prob) * 2 / 3):
            assert stats.binomtest(ones, part.size, wrong).pvalue < 1e-6
    # Independent coins: how many of the five are set has the distribution of a sum of two binomials.
    counts = np.bincount(bits.sum(1), minlength=6)
    odds = np.convolve(stats.binom.pmf(range(3), 2, p), stats.binom.pmf(range(4), 3, q))
    assert stats.chisquare(counts, odds * NUM_USERS).pvalue > 1e-4


def likelihood(record, output, p, q):
    present = [p if item in record else q for item in range(NUM_ITEMS)]
    return math.prod(prob if bit else 1 - prob for prob, bit in zip(present, output, strict=True))


@pytest.mark.parametrize(("epsilon", "expected"), DESIGNS)
def test_epsilons_are_the_largest_likelihood_ratios(epsilon, expected):
    """Over all 32 outputs and all pairs of records of each kind, from the very probabilities of the coins."""
    _, statement = randomize_sets(SAME, epsilon_per_item=epsilon, seed=0, expected_items=expected)
    p, q = statement["keep_prob"], statement["add_prob"]
    records = [set(one) for n in range(NUM_ITEMS + 1) for one in itertools.combinations(range(NUM_ITEMS), n)]
    worst = dict.fromkeys(statement["epsilon"], 0.0)
    for a, b in itertools.permutations(records, 2):
        ratio = max(
            math.log(likelihood(a, output, p, q) / likelihood(b, output, p, q))
            for output in itertools.product((0, 1), repeat=NUM_ITEMS)
        )
        kinds = ["user, another history altogether"]
        kinds += ["interaction added or removed"] if len(a ^ b) == 1 else []
        kinds += ["interaction swapped for another"] if len(a - b) == len(b - a) == 1 else []
        for kind in kinds:
            worst[kind] = max(worst[kind], ratio)
    assert statement["epsilon"] == pytest.approx(worst)
    assert statement["epsilon"]["interaction added or removed"] <= epsilon  # rounded towards less information
    assert statement["epsilon"]["interaction added or removed"] == pytest.approx(epsilon, rel=1e-6)
    assert statement["epsilon"]["user, another history altogether"] == pytest.approx(NUM_ITEMS * epsilon, rel=1e-6)


def test_presence_and_absence_both_count():
    assert bit_epsilons(0.9, 0.5) == pytest.approx((math.log(0.5 / 0.1), math.log(9)))
    assert bit_epsilons(0.5, 0.1) == pytest.approx((math.log(0.5 / 0.1), math.log(9)))


def test_one_plain_bit_costs_what_dp_accounting_says():
    _, statement = randomize_sets(SAME, epsilon_per_item=1.5, seed=0)
    accountant = dp_accounting.pld.PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_ONE)
    accountant.compose(dp_accounting.RandomizedResponseDpEvent(2 * statement["add_prob"], 2))
    assert accountant.get_epsilon(1e-12) == pytest.approx(
        statement["epsilon"]["interaction added or removed"], abs=1e-3
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.floats(1e-4, 40), st.integers(1, 50), st.floats(0.01, 0.5))
def test_no_design_exceeds_its_epsilon(epsilon, num_items, share):
    world = make_interactions([[0]], num_items=num_items)
    for expected in (None, share * num_items):
        _, statement = randomize_sets(world, epsilon_per_item=epsilon, seed=0, expected_items=expected)
        p, q = statement["keep_prob"], statement["add_prob"]
        assert 0 < q < p < 1
        assert bit_epsilons(p, q)[0] <= epsilon * (1 + 1e-12)
        if expected is not None and epsilon < 10:
            one_coin = num_items * (math.exp(epsilon) + 1) / 2**32  # what rounding q up by one adds to a record
            assert p * expected + q * (num_items - expected) == pytest.approx(expected, abs=one_coin)


def test_density_stays_where_it_is_asked_to():
    world = make_interactions([list(range(10))] * 2000, num_items=100)
    sparse, _ = released_bits(world, epsilon_per_item=2.0, seed=0, expected_items=10)
    plain, _ = released_bits(world, epsilon_per_item=2.0, seed=0)
    assert sparse.sum(1).mean() == pytest.approx(10, abs=0.3)
    assert plain.sum(1).mean() == pytest.approx(0.8808 * 10 + 0.1192 * 90, abs=0.4)


def test_nothing_but_the_bits_is_released():
    world = random_world()
    release, statement = randomize_sets(world, epsilon_per_item=2.0, seed=0)
    assert release.ratings is None
    assert release.timestamps is None
    assert not release.user_attributes
    assert_nothing_old(release, world)
    assert json.loads(json.dumps(statement)) == statement
    measured = statement["measured"]
    assert measured["items_kept"] + measured["items_added"] == release.num_interactions
    assert measured["items_kept"] + measured["items_removed"] == world.num_interactions
    bare = randomize_sets(random_world(explicit=False), epsilon_per_item=2.0, seed=0)
    assert np.array_equal(bare.interactions.item_ids, release.item_ids)  # ratings and times decide no coin


def test_coins_of_a_release_are_the_systems_and_of_a_study_repeatable():
    world = random_world()

    def run(seed):
        release, statement = randomize_sets(world, epsilon_per_item=1.0, seed=seed)
        return release.fingerprint, statement["coins"]

    assert run(0) == run(0)
    assert run(0)[0] != run(1)[0]
    assert run(None)[0] != run(None)[0]
    assert "seeded" in run(0)[1]
    assert run(None)[1] == "operating system"
    bits, statement = released_bits(SAME, epsilon_per_item=1.0, seed=None)
    assert abs(bits[:, 2:].mean() - statement["add_prob"]) < 0.03  # six standard errors


def test_users_without_rows_are_hidden_among_the_others():
    bits, _ = released_bits(make_interactions([[], [0]] * 500, num_items=8), epsilon_per_item=0.1, seed=0)
    assert abs(bits[::2].sum(1).mean() - bits[1::2].sum(1).mean()) < 0.5


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan, math.inf])
def test_odd_epsilons_are_refused(epsilon):
    with pytest.raises(ValueError, match="positive and finite; got"):
        randomize_sets(SAME, epsilon_per_item=epsilon, seed=0)


def test_what_says_nothing_or_is_not_sparse_is_refused():
    with pytest.raises(ValueError, match="nothing would be said"):
        randomize_sets(SAME, epsilon_per_item=1e-10, seed=0)
    for expected in (0, 2.6, math.nan):
        with pytest.raises(ValueError, match="at most half of the 5 items"):
            randomize_sets(SAME, epsilon_per_item=1.0, seed=0, expected_items=expected)
    huge = randomize_sets(SAME, epsilon_per_item=1000.0, seed=0).statement
    assert huge["epsilon"]["interaction added or removed"] == pytest.approx(32 * math.log(2), rel=1e-3)
