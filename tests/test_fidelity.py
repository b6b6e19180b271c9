"""Risk: a distance between virtual and real users is wrong, or read without what real users are from each other."""

import dataclasses
import math

import numpy as np
import pytest
from evaluation_worlds import interactions
from hypothesis import given, settings
from hypothesis import strategies as st
from taste_world import taste_world

from fedjax_rec.synthesis.fidelity import distances, fidelity, shape
from fedjax_rec.synthesis.populations import popularity_sampler, take_users

AGREEMENTS = ("popularity_spearman", "cooccurrence_correlation", "cosine_correlation", "lift_correlation")
ROWS = st.lists(st.sets(st.integers(0, 5), min_size=1).map(sorted), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(ROWS, ROWS)
def test_distances_are_symmetric_and_zero_only_apart(first, second):
    one, other = interactions(first, num_items=6), interactions(second, num_items=6)
    there, back = dataclasses.asdict(distances(one, other)), dataclasses.asdict(distances(other, one))
    assert there == pytest.approx(back, abs=1e-9)
    for name, value in dataclasses.asdict(distances(one, one)).items():
        assert value == pytest.approx(1.0 if name in AGREEMENTS else 0.0, abs=1e-12), name
    assert 0 <= there["popularity_jensen_shannon"] <= 1 + 1e-12
    assert 0 <= there["popularity_total_variation"] <= 1 + 1e-12


def test_distances_by_hand():
    one = interactions([[0, 1], [0, 1], [0], [2]], num_items=4)  # counts 3 2 1 0 of 6 rows
    other = interactions([[0, 2], [0, 2], [1], []], num_items=4)  # counts 2 1 2 0 of 5 rows, 3 users
    found = distances(one, other)
    p, q = np.array([3, 2, 1]) / 6, np.array([2, 1, 2]) / 5
    assert found.popularity_total_variation == pytest.approx(np.abs(p - q).sum() / 2)
    entropy = [-(x * np.log2(x)).sum() for x in ((p + q) / 2, p, q)]
    assert found.popularity_jensen_shannon == pytest.approx(entropy[0] - (entropy[1] + entropy[2]) / 2)
    # Lengths 2 2 1 1 and 2 2 1: the shares of 1 are a half and a third.
    assert found.length_kolmogorov == pytest.approx(1 / 6)
    assert found.length_wasserstein == pytest.approx(1 / 6)
    # Pairs (0,1), (0,2), (1,2): a half of the users have the first, two thirds of the others the second.
    assert found.cooccurrence_frobenius == pytest.approx(math.hypot(1 / 2, 2 / 3) / ((1 / 2 + 2 / 3) / 2))
    assert found.cooccurrence_correlation == pytest.approx(-0.5)
    with np.errstate(all="raise"):
        pairs = np.array([[2, 0, 0], [0, 2, 0]])
        counts = np.array([[3, 2, 1], [2, 1, 2]])
        shrunk = [
            [n / (math.sqrt(c[i] * c[j]) + 10) for n, (i, j) in zip(row, ((0, 1), (0, 2), (1, 2)), strict=True)]
            for row, c in zip(pairs, counts, strict=True)
        ]
    size = (np.linalg.norm(shrunk[0]) + np.linalg.norm(shrunk[1])) / 2
    assert found.cosine_frobenius == pytest.approx(np.linalg.norm(np.subtract(*shrunk)) / size)


def test_the_shape_of_a_set_by_hand():
    found = shape(interactions([[0, 1, 2], [0], []], num_items=4))
    assert (found.num_users, found.num_interactions, found.mean_length, found.median_length) == (2, 4, 2.0, 2.0)
    assert found.coverage == 0.75
    assert found.gini == pytest.approx(((-1) * 1 + 1 * 1 + 3 * 2) / (4 * 4))


def test_real_users_are_closer_to_each_other_than_popularity_users_are_in_what_goes_together():
    world = taste_world(400)
    real, held_out = take_users(world, np.arange(200)), take_users(world, np.arange(200, 400))
    sampler = popularity_sampler(real, num_users=200, seed=0)
    found = fidelity(real, sampler, held_out=held_out)
    assert found.control_users == 200
    assert found.control.lift_correlation > found.distances_same_size.lift_correlation + 0.2
    assert found.control.cooccurrence_frobenius < found.distances_same_size.cooccurrence_frobenius
    # In popularity and length the sampler is as close as held-out users: that distance alone says nothing.
    assert found.distances_same_size.popularity_jensen_shannon < 2 * found.control.popularity_jensen_shannon
    few = fidelity(real, take_users(sampler, np.arange(50)), held_out=held_out)
    assert few.control_users == 50


def test_copies_are_at_distance_zero_and_empty_sets_are_refused():
    world = taste_world(60)
    real, held_out = take_users(world, np.arange(30)), take_users(world, np.arange(30, 60))
    found = fidelity(real, real, held_out=held_out)
    assert found.distances.cooccurrence_frobenius == 0
    assert found.distances.popularity_total_variation == 0
    assert found.virtual == found.real
    with pytest.raises(ValueError, match="no virtual user with a row"):
        fidelity(real, interactions([[]], num_items=60), held_out=held_out)
    with pytest.raises(ValueError, match="another catalogue"):
        fidelity(real, interactions([[69]], num_items=70), held_out=held_out)
