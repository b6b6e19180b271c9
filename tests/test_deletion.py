"""Risk: a deletion curve that measures something else than deletion, or a test that cannot tell a good order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_rec.evaluation.statistics import difference_test
from fedjax_rec.interpretation.deletion import deletion_area, deletion_curve, random_area
from fedjax_rec.interpretation.explain import padded
from fedjax_rec.interpretation.value import HistoryModel, by_deletion, linear_history_model, score

NUM_ITEMS, ITEM = 9, 8
HISTORY = np.array([2, 0, 5], np.int32)
SHOWN = padded(HISTORY, NUM_ITEMS, multiple=5)
REAL = SHOWN < NUM_ITEMS


@pytest.fixture(scope="module", autouse=True)
def quickly_compiled():
    """Nearly all the time of this file is compilation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def value():
    weights = np.zeros((NUM_ITEMS, NUM_ITEMS), np.float32)
    weights[HISTORY, ITEM] = 1.0, 4.0, 2.0
    return by_deletion(linear_history_model(weights), SHOWN, ITEM, score)


def test_a_curve_removes_the_largest_attribution_first_and_is_flat_at_the_end(value):
    curve = deletion_curve(value, REAL, jnp.array([0.1, 0.9, 0.5, 7.0, 7.0]))
    np.testing.assert_allclose(curve, [7, 3, 1, 0, 0, 0])
    backwards = deletion_curve(value, REAL, -jnp.array([0.1, 0.9, 0.5, 0.0, 0.0]))
    np.testing.assert_allclose(backwards, [7, 6, 4, 0, 0, 0])


def test_an_area_is_that_of_trapezoids_over_the_real_places(value):
    of = jax.jit(lambda attributions: deletion_area(value, REAL, attributions))
    best = of(jnp.array([1.0, 4.0, 2.0, 0.0, 0.0]))
    assert best == pytest.approx((3.5 + 3 + 1 + 0) / 3)
    assert of(jnp.array([1.0, -4.0, 2.0, 0.0, 0.0])) > best


def test_random_orders_average_over_all_orders(value):
    """For a linear model the mean curve is a line, and the area half the first height."""
    found = jax.jit(lambda key: random_area(value, REAL, key, num_orders=3000))(jax.random.key(0))
    assert found == pytest.approx(3.5, abs=0.05)


def _last_two(params, history, presence):
    """Reads an order: the last item counts, and the one before it, each by what it is."""
    real = history < NUM_ITEMS
    age = real.sum() - 1 - jnp.arange(len(history))
    read = jnp.where(real & (age >= 0) & (age < 2), presence * params.at[history].get(mode="fill", fill_value=0.0), 0.0)
    return jnp.zeros(NUM_ITEMS).at[ITEM].set(read.sum())


def test_a_deleted_item_makes_room_for_an_older_one():
    model = HistoryModel(_last_two, jnp.arange(NUM_ITEMS, dtype=jnp.float32), NUM_ITEMS)
    value = by_deletion(model, SHOWN, ITEM, score)
    curve = deletion_curve(value, REAL, jnp.array([0.5, 1.0, 0.0, 0.0, 0.0]))  # the one in the middle first
    np.testing.assert_allclose(curve, [0 + 5, 2 + 5, 5, 0, 0, 0])


def test_a_paired_test_tells_an_order_that_is_right_from_one_that_is_not():
    """Attributions that are the weights beat random orders; those of somebody else do not."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(30, 6, 6)).astype(np.float32)  # 30 users, each with a model of its own
    shown = jnp.arange(6, dtype=jnp.int32)
    real = jnp.ones(6, bool)

    def areas(weights, other, key):
        value = by_deletion(HistoryModel(_own, weights, 6), shown, 5, score)
        own, wrong = (deletion_area(value, real, matrix[:, 5]) for matrix in (weights, other))
        return own, wrong, random_area(value, real, key, num_orders=8)

    keys = jax.random.split(jax.random.key(1), 30)
    own, wrong, chance = jax.jit(jax.vmap(areas))(jnp.asarray(weights), jnp.asarray(np.roll(weights, 1, axis=0)), keys)
    right = difference_test(np.asarray(chance - own))
    assert right.difference.low > 0
    assert max(right.permutation_p, right.wilcoxon_p) < 0.01
    assert min(difference_test(np.asarray(chance - wrong)).permutation_p, 1) > 0.05


def _own(weights, history, presence):
    return presence @ weights.at[history].get(mode="fill", fill_value=0.0)
