"""Risk: AUC counts ties for one side, users of one kind shift the mean, or logloss overflows where a model is sure."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_rec.evaluation.clicks import auc, logloss, user_auc


def pairwise(labels, scores):
    """By definition: every click against every other example."""
    clicked = [s for y, s in zip(labels, scores, strict=True) if y]
    others = [s for y, s in zip(labels, scores, strict=True) if not y]
    return np.mean([(a > b) + 0.5 * (a == b) for a in clicked for b in others])


EXAMPLES = st.lists(st.tuples(st.integers(0, 1), st.sampled_from([-1.0, 0.0, 0.0, 0.5, 2.0])), min_size=2, max_size=30)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(examples=EXAMPLES)
def test_auc_is_that_of_all_pairs(examples):
    labels, scores = map(np.array, zip(*examples, strict=True))
    if 0 < labels.sum() < len(labels):
        assert auc(labels, scores) == pytest.approx(pairwise(labels, scores), abs=1e-12)
        assert auc(labels, np.exp(scores)) == pytest.approx(auc(labels, scores))
        assert auc(labels, -scores) == pytest.approx(1 - auc(labels, scores))


def test_worked_cases():
    assert auc([1, 0, 1, 0], [0.9, 0.1, 0.8, 0.2]) == 1.0
    assert auc([1, 0], [3.0, 3.0]) == 0.5
    assert auc([1, 0, 0, 1], [3.0, 2.0, 4.0, 2.0]) == pytest.approx((1 + 0 + 0.5 + 0) / 4)


def test_users_weigh_their_examples_and_those_of_one_kind_are_left_out():
    users = np.array([7, 7, 7, 9, 9, 3, 3, 3])  # 3 clicks everything
    labels = np.array([1, 0, 0, 1, 0, 1, 1, 1])
    scores = np.array([0.5, 0.9, 0.1, 5.0, 4.0, 100.0, 100.0, 100.0])
    found = user_auc(labels, scores, users)
    assert (found.num_users, found.left_out) == (2, 1)
    assert found.value == pytest.approx((3 * 0.5 + 2 * 1.0) / 5)
    order = np.random.default_rng(0).permutation(8)
    assert user_auc(labels[order], scores[order], users[order]) == found


def test_logloss_is_the_cross_entropy_in_nats_also_where_a_model_is_sure():
    logits, labels = np.array([0.3, -1.2, 2.0]), np.array([1, 0, 0])
    probabilities = 1 / (1 + np.exp(-logits))
    expected = -np.mean(np.where(labels, np.log(probabilities), np.log(1 - probabilities)))
    assert logloss(labels, logits) == pytest.approx(expected, rel=1e-12)
    assert logloss([1, 0], [1000.0, -1000.0]) == 0
    assert logloss([0, 1], [1000.0, -1000.0]) == 1000


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="3 clicks among 3"):
        auc([1, 1, 1], [0.0, 1.0, 2.0])
    with pytest.raises(ValueError, match="No user has clicks and other"):
        user_auc([1, 0], [0.0, 1.0], [0, 1])
    with pytest.raises(ValueError, match="turn ratings into clicks"):
        logloss([4, 5], [0.0, 1.0])
    with pytest.raises(ValueError, match="1 of 2 scores are NaN"):
        auc([1, 0], [0.0, np.nan])
    with pytest.raises(ValueError, match=r"got \(2,\) and \(3,\)"):
        logloss([1, 0], [0.0, 1.0, 2.0])
