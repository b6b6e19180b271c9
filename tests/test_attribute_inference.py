"""Risk: an attribute attack is weak, peeks at those it is scored on, or finds something where there is nothing."""

import dataclasses

import numpy as np
import pytest
from evaluation_worlds import interactions

from fedjax_rec.attacks.attributes import binary_attributes, infer_attributes, item_features, upload_features
from fedjax_rec.attacks.ridge import PENALTIES, fit_ridge
from fedjax_rec.attacks.uploads import Uploads, secure_sums

NUM_CLIENTS, NUM_ITEMS = 300, 40
RNG = np.random.default_rng(0)
WOMEN = RNG.random(NUM_CLIENTS) < 0.4
YOUNG = RNG.random(NUM_CLIENTS) < 0.5
# Women like the first half of the items a little better; age leaves no trace.
CHANCES = np.where(WOMEN[:, None] == (np.arange(NUM_ITEMS) < NUM_ITEMS // 2)[None, :], 0.35, 0.2)
ITEMS = RNG.random((NUM_CLIENTS, NUM_ITEMS)) < CHANCES
ALONE = np.arange(NUM_CLIENTS)


def uploads():
    """Rows of the items touched, with residuals that say nothing."""
    bias = np.where(ITEMS, RNG.normal(size=ITEMS.shape), 0)[:, :, None].astype(np.float32)
    return Uploads({"bias": bias, "item": np.repeat(bias, 2, axis=2)}, ITEMS)


def infer(features, labels=None, groups=ALONE):
    labels = {"gender": WOMEN, "age": YOUNG} if labels is None else labels
    return infer_attributes(features, labels, seed=0, groups=groups)


def near_half(curve):
    return abs(curve.auc - 0.5) < 2.5 * curve.auc_error


def test_uploads_give_away_what_they_correlate_with_and_no_more():
    found = infer(upload_features(uploads()))
    gender = found["gender"]
    assert gender.curve.auc > 0.85
    assert gender.majority == pytest.approx(1 - WOMEN.mean())
    assert gender.accuracy > gender.majority + 0.05
    assert near_half(gender.control)
    assert near_half(found["age"].curve)


def test_a_sum_of_many_tells_little_of_one_member():
    order = np.random.default_rng(1).permutation(NUM_CLIENTS)
    cohorts = order.reshape(-1, 20)
    features = np.repeat(upload_features(secure_sums(uploads(), cohorts)), 20, axis=0)
    found = infer(features, {"gender": WOMEN[order]}, groups=np.repeat(np.arange(len(cohorts)), 20))["gender"]
    assert found.curve.auc < 0.65


def test_those_who_share_features_share_a_fold():
    """Each pair has features of its own and a label by coin: who had seen the other of the pair would know it."""
    features, labels = np.repeat(np.eye(100), 2, axis=0), np.repeat(RNG.random(100) < 0.5, 2)
    peeking = infer(features, {"coin": labels}, groups=np.arange(200))["coin"]
    honest = infer(features, {"coin": labels}, groups=np.repeat(np.arange(100), 2))["coin"]
    assert peeking.curve.auc > 0.7
    assert honest.curve.auc < 0.6  # pairs tie, so its standard error says nothing


def test_a_table_that_knows_which_items_are_alike_helps_with_few_known_ones():
    luck = np.where(ITEMS, RNG.random(ITEMS.shape), np.inf)
    few = ITEMS & (np.argsort(np.argsort(luck, axis=1), axis=1) < 3)
    side = np.where(np.arange(NUM_ITEMS) < NUM_ITEMS // 2, 1.0, -1.0)[:, None]
    table = (side + 0.2 * RNG.normal(size=(NUM_ITEMS, 3))).astype(np.float32)
    alone, released = (infer(item_features(few, given), {"gender": WOMEN})["gender"] for given in (None, table))
    assert released.curve.auc > alone.curve.auc > 0.5
    assert item_features(few, table).shape == (NUM_CLIENTS, 3)


@pytest.mark.parametrize("shape", [(30, 5), (12, 40)])
def test_ridge_is_the_closed_form_at_the_penalty_of_least_leave_one_out_error(shape):
    rng = np.random.default_rng(3)
    features = rng.normal(size=shape) + 2.0
    target = features @ rng.normal(size=(shape[1], 1)) + rng.normal(size=(shape[0], 1))

    def fit(features, target, penalty):
        centred, offset = features - features.mean(0), target.mean(0)
        weights = np.linalg.solve(centred.T @ centred + penalty * np.eye(shape[1]), centred.T @ (target - offset))
        return lambda x: (x - features.mean(0)) @ weights + offset

    largest = np.linalg.norm(features - features.mean(0), 2) ** 2
    keep = ~np.eye(shape[0], dtype=bool)
    errors = []
    for penalty in PENALTIES * largest:
        left = [fit(features[k], target[k], penalty)(features[i]) - target[i] for i, k in enumerate(keep)]
        errors.append(np.square(left).sum())
    # Leaving a row out also moves the mean, which the closed form takes into account up to second order.
    best = PENALTIES[int(np.argmin(errors))]
    found = fit_ridge(features, target)
    candidates = [
        fit(features, target, penalty * largest)(features) for penalty in (best / 10**0.5, best, best * 10**0.5)
    ]
    assert any(np.allclose(found(features), candidate, atol=1e-6) for candidate in candidates)


def test_attributes_come_from_the_data_set():
    people = {"gender": np.array(["F", "M", ""]), "age": np.array([29, 30, 0])}
    world = dataclasses.replace(interactions([[0], [1], [1]], num_items=2), user_attributes=people)
    found = binary_attributes(world)
    assert found["gender"].tolist() == [True, False, False]
    assert found["age"].tolist() == [True, False, False]
    assert binary_attributes(world, age=31)["age"].tolist() == [True, True, False]
    assert binary_attributes(interactions([[0]], num_items=1)) == {}
    with pytest.raises(ValueError, match="same gender"):
        infer(upload_features(uploads()), {"gender": np.ones(NUM_CLIENTS, bool)})
