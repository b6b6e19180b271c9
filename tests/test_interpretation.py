"""Risk: an explanation names items that do not carry the recommendation, or effects that removal does not have."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_rec.data.clients import Client
from fedjax_rec.interpretation.explain import attribute, explain, padded, recommend
from fedjax_rec.interpretation.gradients import integrated_gradients
from fedjax_rec.interpretation.refit import Refit, expected_loss, refitted_history_model, solved_history_model
from fedjax_rec.interpretation.removal import pushed_out, removals
from fedjax_rec.interpretation.sentences import sentences, signed
from fedjax_rec.interpretation.shapley import exact_shapley, sampled_shapley
from fedjax_rec.interpretation.value import (
    HistoryModel,
    by_deletion,
    by_presence,
    linear_history_model,
    log_prob,
    score,
    sequence_history_model,
    without,
)
from fedjax_rec.models.base import Shared
from fedjax_rec.models.items import id_table
from fedjax_rec.models.sasrec import sasrec
from fedjax_rec.models.user_solve import UserSolve, user_vector

NUM_ITEMS, ITEM = 12, 7
HISTORY = np.array([3, 1, 4, 10, 5], np.int32)
SHOWN = padded(HISTORY, NUM_ITEMS)
REAL = SHOWN < NUM_ITEMS


@pytest.fixture(scope="module", autouse=True)
def quickly_compiled():
    """Nearly all the time of this file is compilation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def weights():
    return np.random.default_rng(0).normal(size=(NUM_ITEMS, NUM_ITEMS)).astype(np.float32)


def _crossed(weights, history, presence):
    """Items help each other, so that the order in which they come matters."""
    linear = presence @ weights.at[history].get(mode="fill", fill_value=0.0)
    return jnp.tanh(linear) + 0.3 * jnp.square(linear)


@pytest.fixture(scope="module")
def crossed(weights):
    return HistoryModel(_crossed, jnp.asarray(weights), NUM_ITEMS)


@pytest.fixture(scope="module")
def sequence():
    """A small SASRec with weights large enough to bend, which counts the last 6 items; and its scores, compiled."""
    model = sasrec(id_table(NUM_ITEMS, dim=8), max_length=6, num_blocks=1, dropout=0.0)
    params = jax.jit(model.init)(jax.random.key(1))
    params = jax.tree.map(lambda leaf: leaf if leaf.ndim == 1 or leaf.std() > 0.1 else 30 * leaf, params)
    return sequence_history_model(model, params), jax.jit(partial(model.score, params))


@pytest.mark.parametrize("method", ["integrated_gradients", "shapley", "removal"])
def test_of_a_linear_model_every_method_finds_the_weights(weights, method):
    expected = weights[HISTORY, ITEM] - weights[HISTORY].mean(axis=1)
    values, total, error = attribute(
        linear_history_model(weights), SHOWN, ITEM, method=method, key=jax.random.key(0), num_pairs=4
    )
    np.testing.assert_allclose(values[:5], expected, atol=2e-5)
    np.testing.assert_array_equal(values[5:], 0)
    assert total == pytest.approx(expected.sum(), abs=1e-4)
    assert error < 1e-5


def test_exact_shapley_values_are_means_over_all_orders(crossed):
    value = jax.jit(by_deletion(crossed, SHOWN, ITEM))
    of_set = {}
    for present in itertools.product((0.0, 1.0), repeat=5):
        of_set[present] = float(value(jnp.array([*present, 0, 0, 0])))
    expected = np.zeros(5)
    for order in itertools.permutations(range(5)):
        present = [0.0] * 5
        for place in order:
            before = of_set[tuple(present)]
            present[place] = 1.0
            expected[place] += (of_set[tuple(present)] - before) / math.factorial(5)
    found = exact_shapley(by_deletion(crossed, SHOWN, ITEM), REAL)
    np.testing.assert_allclose(found[:5], expected, atol=1e-5)
    assert found.sum() == pytest.approx(of_set[(1.0,) * 5] - of_set[(0.0,) * 5], abs=1e-5)
    with pytest.raises(ValueError, match="2\\^11 sets"):
        exact_shapley(by_deletion(crossed, SHOWN, ITEM), np.ones(11, bool))


def test_sampled_shapley_values_are_as_close_as_their_errors_say_and_sum_to_the_total(crossed):
    value = by_deletion(crossed, SHOWN, ITEM)
    sample = jax.jit(lambda key: sampled_shapley(value, REAL, key, num_pairs=20))
    runs = jax.lax.map(sample, jax.random.split(jax.random.key(3), 40))
    exact = exact_shapley(value, REAL)
    errors = np.sqrt(np.square(runs.errors[:, :5]).mean(axis=0))
    assert errors.min() > 0.005
    scores = (runs.values[:, :5] - exact[None, :5]) / errors[None, :]
    assert np.abs(scores.mean(axis=0)).max() < 4 / math.sqrt(40)
    assert 0.7 < float(scores.std()) < 1.3
    np.testing.assert_allclose(runs.values.sum(axis=1), runs.total, atol=1e-4)
    with pytest.raises(ValueError, match="at least 2"):
        sampled_shapley(value, REAL, jax.random.key(0), num_pairs=1)


def test_integrated_gradients_are_complete_on_a_transformer(sequence):
    model, _ = sequence
    value = by_presence(model, SHOWN, ITEM)

    @jax.jit
    def integrate(tolerance):
        return integrated_gradients(value, REAL, tolerance=tolerance)

    fine, coarse = integrate(0.002), integrate(jnp.inf)
    assert abs(fine.gap) < 0.01 * abs(fine.total)
    assert (fine.num_points > coarse.num_points, coarse.num_points) == (True, 8)
    assert abs(coarse.gap) > 0.01 * abs(coarse.total), "the world is too easy to tell a right number of points"
    assert fine.values.sum() - fine.total == pytest.approx(float(fine.gap), abs=1e-6)


def test_deletion_closes_the_history_up_and_presence_leaves_places_behind(sequence):
    model, scores = sequence
    deleted = np.isin(np.arange(8), [1, 3])
    np.testing.assert_array_equal(without(SHOWN, jnp.asarray(deleted), NUM_ITEMS)[:4], [3, 4, 5, NUM_ITEMS])
    whole = REAL.astype(jnp.float32)
    presences = jnp.stack([whole, jnp.where(deleted, 0.0, whole), jnp.zeros(8)])
    by_deleting, by_leaving = (
        jax.jit(jax.vmap(kind(model, SHOWN, ITEM, log_prob)))(presences) for kind in (by_deletion, by_presence)
    )

    def expected(history):
        return float(jax.nn.log_softmax(scores(padded(np.array(history, np.int32), NUM_ITEMS)))[ITEM])

    np.testing.assert_allclose(by_deleting, [expected(HISTORY), expected([3, 4, 5]), by_deleting[2]], atol=1e-5)
    assert by_leaving[0] == pytest.approx(expected(HISTORY), abs=1e-5)
    assert abs(by_leaving[1] - by_deleting[1]) > 0.01
    assert np.isfinite(by_deleting[2])


def test_deleting_an_item_lets_an_older_one_into_the_window(sequence):
    model, scores = sequence
    long = np.array([0, 2, 3, 1, 4, 10, 5, 6], np.int32)
    found = removals(model, jnp.asarray(long), ITEM, quantity=score)
    np.testing.assert_allclose(found.values[:2], 0, atol=1e-5)  # older than the last six
    whole = scores(jnp.asarray(long))[ITEM]
    for place in (2, 7):
        expected = float(whole - scores(padded(np.delete(long, place), NUM_ITEMS))[ITEM])
        assert found.values[place] == pytest.approx(expected, abs=1e-4)
        assert abs(expected) > 0.01


def test_places_are_those_of_the_list_without_the_item(weights):
    model = linear_history_model(weights)
    found = removals(model, SHOWN, ITEM)
    others = [item for item in range(NUM_ITEMS) if item not in HISTORY and item != ITEM]

    def place(history):
        scores = weights[history].sum(axis=0)
        return 1 + sum(scores[other] > scores[ITEM] for other in others)

    assert found.place == place(HISTORY)
    assert list(found.places[:5]) == [place(np.delete(HISTORY, one)) for one in range(5)]
    assert len(set(found.places[:5].tolist())) > 1
    top = recommend(model, HISTORY, top=4)
    assert list(top) == sorted([*others, ITEM], key=lambda item: -weights[HISTORY, item].sum())[:4]
    assert len(recommend(model, HISTORY, top=99)) == NUM_ITEMS - 5


def test_a_small_set_pushes_an_item_out_and_no_member_is_idle():
    weights = np.zeros((NUM_ITEMS, NUM_ITEMS), np.float32)
    weights[[3, 4], ITEM] = 1.0, 1.1  # two items carry the recommendation
    weights[1, [8, 9]] = 0.5  # what else could be recommended
    weights[10, [ITEM, 8]] = 0.3, 0.45  # removing it would only help
    model = linear_history_model(weights)
    found = pushed_out(model, SHOWN, ITEM, k=1)
    assert sorted(HISTORY[list(found.history_places)]) == [3, 4]
    assert found.place == 3
    assert pushed_out(model, SHOWN, ITEM, k=1, most=1) is None
    assert pushed_out(model, SHOWN, ITEM, k=NUM_ITEMS) is None
    already = pushed_out(model, SHOWN, 2, k=1)
    assert already.history_places == ()


def test_members_that_a_greedy_start_did_not_need_are_put_back():
    """The first step takes the strongest item; the two that follow push the recommended one out without it."""

    weights = np.zeros((NUM_ITEMS, NUM_ITEMS), np.float32)
    weights[3, ITEM] = 2.0
    weights[3, 8] = 1.5  # its removal takes from the rival too, so that more must go
    weights[[1, 4], ITEM] = 0.4
    weights[5, 8] = 1.2
    model = linear_history_model(weights)
    found = pushed_out(model, SHOWN, ITEM, k=1)
    for member in found.history_places:
        fewer = [place for place in found.history_places if place != member]
        scores = weights[np.delete(HISTORY, fewer)].sum(axis=0)
        assert scores[ITEM] >= scores[8], "a part of the set would have done"


@pytest.mark.parametrize("loss", ["logistic", "bpr"])
def test_a_refitted_user_vector_is_the_minimum_and_its_gradient_is_right(loss):
    rng = np.random.default_rng(2)
    items, bias = jnp.asarray(rng.normal(size=(NUM_ITEMS, 3)), jnp.float32), jnp.zeros(NUM_ITEMS).at[2].set(0.5)
    refit = Refit(loss, l2=0.05, num_negatives=2)
    model = refitted_history_model(items, bias, refit)
    full = np.asarray(REAL, np.float32)
    step = 0.02 * np.eye(8, dtype=np.float32)[:2]
    tried = jnp.asarray(np.concatenate([[full, 0 * full], full / 2 + step, full / 2 - step]))
    presences = jax.jit(lambda tried: jax.vmap(partial(model.scores, SHOWN))(tried))(tried)
    user = np.linalg.lstsq(items, presences[0] - bias)[0]
    loss_at = partial(expected_loss, refit, model.params, SHOWN, jnp.asarray(full))
    around = user[None, :] + 0.01 * np.concatenate([np.zeros((1, 3)), np.eye(3), -np.eye(3)]).astype(np.float32)
    losses = jax.jit(jax.vmap(loss_at))(jnp.asarray(around))
    assert losses[0] < losses[1:].min()
    np.testing.assert_allclose((losses[1:4] - losses[4:]) / 0.02, 0, atol=1e-4)
    np.testing.assert_allclose(presences[1], bias, atol=1e-5)  # of somebody without a history the vector is zero
    differences = (presences[2:4, ITEM] - presences[4:, ITEM]) / 0.04
    slope = jax.jit(jax.grad(by_presence(model, SHOWN, ITEM, score)))(jnp.asarray(full / 2))
    np.testing.assert_allclose(slope[:2], differences, rtol=0.02, atol=2e-3)


def test_a_refit_on_a_deleted_history_is_the_refit_of_who_never_met_the_item():
    rng = np.random.default_rng(2)
    items = jnp.asarray(2 * rng.normal(size=(NUM_ITEMS, 3)), jnp.float32)
    model = refitted_history_model(items, jnp.zeros(NUM_ITEMS), Refit("logistic", l2=0.05))
    scores = jax.jit(model.scores)
    after = scores(without(SHOWN, jnp.arange(8) == 1, NUM_ITEMS))[ITEM]
    never = scores(padded(np.delete(HISTORY, 1), NUM_ITEMS))[ITEM]
    kept = REAL.astype(jnp.float32).at[1].set(0.0)
    assert abs(after - jax.jit(model.scores)(SHOWN, kept)[ITEM]) > 1e-3  # its share of the loss stays empty
    assert after == pytest.approx(float(never), abs=1e-6)
    for bad in (Refit("hinge", 0.1), Refit("logistic", 0.0), Refit("bpr", 0.1, num_negatives=0)):
        with pytest.raises(ValueError, match="A re-fit needs a loss among"):
            refitted_history_model(items, jnp.zeros(NUM_ITEMS), bad)


def test_a_solved_user_vector_is_that_of_training():
    items = jnp.asarray(np.random.default_rng(2).normal(size=(NUM_ITEMS, 3)), jnp.float32)
    solve = UserSolve(l2=0.3, unobserved_weight=0.1, recency=4.0)
    client = Client(jnp.int32(0), jnp.int32(5), SHOWN, jnp.ones(8), SHOWN, jnp.int32(5), None, None, NUM_ITEMS)
    shared = Shared({"item": items}, {"gram": items.T @ items})
    expected = items @ jax.jit(partial(user_vector, solve=solve))(shared, client)
    np.testing.assert_allclose(jax.jit(solved_history_model(items, solve).scores)(SHOWN), expected, atol=1e-5)


def test_an_explanation_in_words():
    weights = np.zeros((NUM_ITEMS, NUM_ITEMS), np.float32)
    weights[[3, 4, 5], ITEM] = 1.2, 0.9, -0.4
    weights[10, 8] = 1.0
    model = linear_history_model(weights)
    found = explain(model, HISTORY, ITEM, quantity=score, k=1)
    assert (found.place, found.remainder) == (1, pytest.approx(0, abs=1e-5))
    said = sentences(found, "item {}".format)
    assert said == [
        "item 7 is recommended because of item 3 (+1.2) and item 4 (+0.9); without item 3 it would fall from place 1 "
        "to 2.",
        "Against it: item 5 (-0.4).",
    ]
    alone = sentences(explain(model, HISTORY[:2], 9, quantity=score, k=1), "item {}".format)
    assert alone == ["item 9 is at place 8, and nothing in the history speaks for it."]
    assert [signed(x) for x in (0.834, -0.0124, 12.4, 0.00002)] == ["+0.83", "-0.012", "+12", "+2.0e-05"]


def test_what_cannot_be_explained_is_refused(weights):
    model = linear_history_model(weights)
    with pytest.raises(ValueError, match="history is empty"):
        explain(model, np.zeros(0, np.int32), ITEM)
    with pytest.raises(ValueError, match="Item 3 is in the history"):
        explain(model, HISTORY, 3)
    with pytest.raises(ValueError, match="give a key"):
        explain(model, HISTORY, ITEM, method="shapley")
