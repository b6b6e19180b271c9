"""Risk: a group's loss is hidden, or invented, by how changes are compared between groups."""

import numpy as np
import pytest

from fedjax_rec.evaluation.fairness import group_changes, mdac, mdac_interval

GROUPS = np.array(["low", "high", "low", "high", "high"])
BEFORE = np.array([0.2, 0.5, 0.6, 0.1, 0.0])  # means .4 and .2
AFTER = np.array([0.1, 0.2, 0.5, 0.2, 0.2])  # means .3 and .2


def test_changes_by_hand():
    found = group_changes(BEFORE, AFTER, GROUPS)
    assert found.before.means == pytest.approx({"high": 0.2, "low": 0.4})
    assert found.after.means == pytest.approx({"high": 0.2, "low": 0.3})
    assert found.relative == pytest.approx({"high": 0.0, "low": -0.25}, abs=1e-12)
    assert found.mdac == pytest.approx(0.25)
    assert mdac(BEFORE, AFTER, GROUPS) == found.mdac


def test_mdac_is_the_largest_of_all_pairs():
    """Relative changes +1, -1/2 and 0: neither neighbours in order nor distances from the mean change."""
    before, after = np.ones(3), np.array([2.0, 0.5, 1.0])
    assert mdac(before, after, np.array([3, 1, 2])) == pytest.approx(1.5)


def test_equal_shares_lost_are_fair():
    assert mdac(BEFORE, 0.7 * BEFORE, GROUPS) == pytest.approx(0, abs=1e-12)
    equal_loss = BEFORE - 0.05  # equal in points, and unequal in shares: -.125 and -.25
    assert mdac(BEFORE, equal_loss, GROUPS) == pytest.approx(0.125)


def test_a_group_without_anything_is_refused():
    with pytest.raises(ValueError, match="'low' was 0 before"):
        group_changes(np.where(GROUPS == "low", 0.0, BEFORE), AFTER, GROUPS)
    with pytest.raises(ValueError, match="one group a user"):
        group_changes(BEFORE, AFTER, GROUPS[:3])


def test_interval_covers_a_known_change():
    rng = np.random.default_rng(0)
    groups = np.repeat(["a", "b"], 400)
    before = rng.uniform(0.2, 0.8, 800)
    after = before * np.where(groups == "a", 0.9, 0.6) + rng.normal(0, 0.02, 800)
    found = mdac_interval(before, after, groups, num_resamples=300)
    assert found.low <= 0.3 <= found.high < found.low + 0.02
    assert found.mean == pytest.approx(0.3, abs=0.01)


def test_users_are_resampled_in_pairs():
    """A change that is the same share for each user has no uncertainty, however different users are."""
    rng = np.random.default_rng(1)
    before = rng.exponential(size=60)
    found = mdac_interval(before, before * np.where(np.arange(60) < 30, 0.9, 0.5), np.arange(60) < 30)
    assert (found.low, found.high) == pytest.approx((0.4, 0.4))


def test_interval_refuses_groups_that_may_be_empty():
    with pytest.raises(ValueError, match="too few users above 0"):
        mdac_interval(BEFORE, AFTER, GROUPS)
