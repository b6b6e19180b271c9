"""Risk: an attack without power is taken for privacy of virtual users, or a leak for who the candidates are."""

from functools import cache

import numpy as np
import pytest
from evaluation_worlds import interactions

from fedjax_rec.attacks.generator_membership import (
    candidate_scores,
    generator_membership,
    span_score,
)
from fedjax_rec.attacks.roc import gaussian_ceiling, gaussian_dp_mu, roc
from fedjax_rec.data.synthetic import synthetic
from fedjax_rec.synthesis.populations import dense_rows, popularity_sampler, take_users
from fedjax_rec.synthesis.virtual import from_histories


@cache
def world(seed=0, num_users=400):
    return synthetic(num_users=num_users, num_items=60, num_interactions=12 * num_users, min_per_user=5, seed=seed)


def groups(seed=0, *, size=80):
    """Members, others, reference and fresh users, all drawn alike; shuffled, so that order means nothing."""
    order = np.random.default_rng(seed).permutation(400)
    return [take_users(world(), order[start : start + size]) for start in range(0, 4 * size, size)]


def noiseless_gaussian(users, num_users, *, seed=0):
    """Top-n of mean + z V with all directions: nothing is private in it, and no virtual user is near a real one."""
    rng = np.random.default_rng(seed)
    rows = dense_rows(users)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    mean = rows.mean(0)
    _, values, basis = np.linalg.svd(rows - mean[None, :], full_matrices=False)
    basis = basis[values > 1e-4 * values[0]]
    values = values[: len(basis)]
    scores = (
        mean[None, :] + (rng.standard_normal((num_users, len(values))) * values[None, :] / len(rows) ** 0.5) @ basis
    )
    lengths = rng.choice(users.counts_per_user, num_users)
    drawn = np.full((num_users, lengths.max()), users.num_items, np.int32)
    for user, length in enumerate(lengths):
        drawn[user, :length] = np.argsort(-scores[user])[:length]
    return from_histories(drawn, catalogue=users, name="noiseless Gaussian", ordered=False), mean, basis


def test_copies_are_found_and_called_a_bug_where_a_guarantee_was_claimed():
    members, others, reference, fresh = groups()
    ceiling = gaussian_ceiling(gaussian_dp_mu(8.0, delta=1e-3))
    found = generator_membership(members, others, members, reference=reference, control=fresh, ceiling=ceiling)
    assert found.row("nearest cosine").corrected_auc > 0.95
    assert found.row("EASE ratio").corrected_auc > 0.9
    assert found.row("kernel ratio").corrected_auc > 0.9
    assert found.row("transitions ratio").corrected_auc > 0.9
    assert found.bug
    assert found.verdict.startswith("BUG")
    assert found.ceiling_auc == ceiling.auc
    assert found.num_members == found.num_others == 80


def test_the_density_ratio_finds_what_nearest_neighbours_miss():
    few = [take_users(users, np.arange(40)) for users in groups()]
    members, others, reference, fresh = few
    virtual, mean, basis = noiseless_gaussian(members, 400)
    control, _, _ = noiseless_gaussian(fresh, 400, seed=1)
    released = {"span of the release": span_score(mean, basis)}
    found = generator_membership(members, others, virtual, reference=reference, control=control, released=released)
    assert found.row("EASE ratio").auc > max(row.auc for row in found.rows if row.weak) + 0.05
    assert found.row("EASE ratio").corrected_auc > 0.85
    # What was released holds every member: rank is the number of users, and there is no noise.
    assert found.row("span of the release").auc > 0.99
    assert found.strongest == "span of the release"
    assert "weak" in found.warning
    assert found.control == "noiseless Gaussian"


def test_virtual_users_that_know_nothing_give_nobody_away():
    ceiling = gaussian_ceiling(0.05)
    z = []
    for seed in range(12):
        members, others, reference, fresh = groups(seed)
        control = popularity_sampler(reference, num_users=80, seed=seed)
        found = generator_membership(members, others, fresh, reference=reference, control=control, ceiling=ceiling)
        z += [(row.corrected_auc - 0.5) / row.corrected_error for row in found.rows]
        z += [(row.auc - 0.5) / row.auc_error for row in found.rows]
    z = np.array(z)
    assert np.mean(np.abs(z) > 2) < 0.15  # scores of one draw go together, so their share varies
    assert abs(z.mean()) < 0.5


def test_the_control_takes_out_who_the_candidates_are():
    # Members are the users with long histories: every score tells them apart, and the generator saw none of them.
    lengths = world().counts_per_user
    order = np.argsort(-lengths, kind="stable")
    members, others = take_users(world(), order[:60]), take_users(world(), order[60:120])
    rest = np.random.default_rng(0).permutation(order[120:])
    reference, fresh, more = (take_users(world(), rest[start : start + 90]) for start in (0, 90, 180))
    found = generator_membership(members, others, fresh, reference=reference, control=more)
    row = found.row("kernel likelihood")
    assert abs(row.auc - 0.5) > 0.3
    assert abs(row.corrected_auc - 0.5) < 2.5 * row.corrected_error
    assert row.corrected_error < row.auc_error


def test_areas_and_errors_are_those_of_the_scores():
    members, others, reference, fresh = groups()
    found = generator_membership(members, others, fresh, reference=reference)
    parts = [candidate_scores(users, fresh, reference)["EASE ratio"] for users in (members, others)]
    curve = roc([np.concatenate(parts)], [np.repeat([True, False], 80)])
    row = found.row("EASE ratio")
    assert (row.auc, row.auc_error) == pytest.approx((curve.auc, curve.auc_error))
    assert (row.corrected_auc, row.control_auc) == (row.auc, None)
    same = generator_membership(members, others, fresh, reference=reference, control=fresh).row("EASE ratio")
    assert (same.corrected_auc, same.corrected_error) == (0.5, 0.0)


def test_the_nearest_neighbour_scores_by_hand():
    candidate = interactions([[0, 1, 2]], num_items=6)
    virtual = interactions([[0, 1], [0, 1, 2, 3, 4, 5], [5]], num_items=6)
    scores = candidate_scores(candidate, virtual, interactions([[0, 3], [1, 4]], num_items=6))
    assert scores["nearest cosine"][0] == pytest.approx(2 / 6**0.5)
    assert scores["nearest Jaccard"][0] == pytest.approx(2 / 3)
    assert scores["nearest Hamming"][0] == -1


def test_too_few_others_and_other_catalogues_are_refused():
    members, others, reference, fresh = groups()
    with pytest.raises(ValueError, match="Hold whole users out"):
        generator_membership(members, take_users(others, np.arange(1)), fresh, reference=reference)
    with pytest.raises(ValueError, match="no virtual user with a row"):
        generator_membership(members, others, interactions([[]], num_items=60), reference=reference)
    with pytest.raises(ValueError, match="another catalogue"):
        generator_membership(members, others, interactions([[90]], num_items=91), reference=reference)


def test_a_sample_of_the_members_is_enough():
    members, others, reference, _ = groups()
    found = generator_membership(members, others, members, reference=reference, max_members=20)
    assert found.num_members == 20
    assert found.row("nearest cosine").auc > 0.95
