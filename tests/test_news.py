"""Risk: the user tower reads padding, its loss takes the wrong positive, or an impression is scored against another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_rec.models.items import id_table
from fedjax_rec.models.news import impression_loss, init_tower, nrms, user_vector

NUM_ITEMS, DIM = 11, 6
MODEL = nrms(id_table(NUM_ITEMS, dim=DIM, init_stddev=1.0), max_length=4, num_heads=2, pool_size=3, num_negatives=None)
PARAMS = MODEL.init(jax.random.key(0))
QUERY = jax.jit(MODEL.query)


def history(*items, width=7):
    return jnp.array([*items, *[NUM_ITEMS] * (width - len(items))], jnp.int32)


def test_the_tower_is_the_papers_attention():
    """Against loops over heads, places and clicks."""
    tower = jax.tree.map(np.asarray, init_tower(jax.random.key(1), DIM, 3))
    clicked = np.random.default_rng(0).normal(size=(5, DIM)).astype(np.float32)
    real = np.array([True, True, False, True, False])
    shown = [i for i in range(5) if real[i]]
    places = []
    for i in shown:
        heads = []
        for h in range(2):
            part = slice(3 * h, 3 * h + 3)
            q = clicked[i] @ tower["query"][:, part]
            logits = np.array([q @ (clicked[j] @ tower["key"][:, part]) for j in shown]) / np.sqrt(3)
            weights = np.exp(logits) / np.exp(logits).sum()
            heads.append(sum(w * clicked[j] @ tower["value"][:, part] for w, j in zip(weights, shown, strict=True)))
        places.append(np.concatenate(heads))
    asked = np.array([np.tanh(h @ tower["pool"] + tower["pool_bias"]) @ tower["pool_query"] for h in places])
    expected = (np.exp(asked) / np.exp(asked).sum()) @ np.array(places)
    found = user_vector(tower, jnp.asarray(clicked), jnp.asarray(real), num_heads=2)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_padding_length_and_old_clicks_change_nothing():
    asked = QUERY(PARAMS, history(3, 1, 4), None)
    np.testing.assert_allclose(QUERY(PARAMS, history(3, 1, 4, width=3), None), asked, rtol=1e-5)
    newest = QUERY(PARAMS, history(9, 8, 7, 3, 1, 4), None)
    np.testing.assert_allclose(newest, QUERY(PARAMS, history(7, 3, 1, 4), None), rtol=1e-5)
    np.testing.assert_allclose(newest, QUERY(PARAMS, history(9, 8, 7, 3, 1, 4), jnp.ones(7)), rtol=1e-5)
    gone = QUERY(PARAMS, history(9, 8, 7, 3, 1, 4), jnp.array([1, 1, 1, 1, 1, 0, 1.0]))
    assert not np.allclose(gone, newest)  # the newest click is where presence says that it is
    assert np.all(QUERY(PARAMS, history(), None) == 0)


def test_the_first_tower_asks_for_about_what_was_clicked():
    asked = QUERY(PARAMS, history(3, 1, 4), None)
    mean = PARAMS.tables["item"][jnp.array([3, 1, 4])].mean(0)
    assert np.dot(asked, mean) / np.linalg.norm(asked) / np.linalg.norm(mean) > 0.8


def test_the_loss_is_of_the_click_after_the_drawn_place():
    """Every place that it can draw gives one value; the keys reach all of them and nothing else."""
    clicks = [3, 1, 4, 9]
    expected = []
    for place in range(1, len(clicks)):
        scores = np.asarray(MODEL.score(PARAMS, history(*clicks[:place])), np.float64)
        expected.append(np.log(np.exp(scores).sum()) - scores[clicks[place]])
    values = jax.jit(jax.vmap(lambda key: MODEL.loss(PARAMS, history(*clicks), key)))(
        jax.random.split(jax.random.key(0), 40)
    )
    nearest = np.abs(np.asarray(values)[:, None] - np.array(expected)).min(axis=0)
    assert np.all(nearest < 1e-4)
    assert np.abs(np.asarray(values)[:, None] - np.array(expected)).min(axis=1).max() < 1e-4
    for nothing in (history(), history(5)):
        value, gradient = jax.value_and_grad(MODEL.loss)(PARAMS, nothing, jax.random.key(0))
        assert value == 0
        assert all(np.all(x == 0) for x in jax.tree.leaves(gradient))


def test_drawn_negatives_never_are_the_positive():
    """In a catalogue of two, the one other news is the only negative there can be: the loss takes two values."""
    model = nrms(id_table(2, dim=4, init_stddev=1.0), num_heads=1, num_negatives=3, pool_size=2)
    params = model.init(jax.random.key(0))
    values = jax.jit(jax.vmap(lambda key: model.loss(params, jnp.array([0, 1]), key)))(
        jax.random.split(jax.random.key(1), 60)
    )
    scores = np.asarray(model.score(params, jnp.array([0, 2])), np.float64)
    allowed = [np.log(1 + m * np.exp(scores[0] - scores[1])) for m in range(4)]
    assert np.abs(np.asarray(values)[:, None] - np.array(allowed)).min(axis=1).max() < 1e-5
    assert np.unique(np.round(values, 4)).size > 2


LOSS = impression_loss(MODEL, num_negatives=2)


def test_an_impressions_loss_is_against_its_own_others():
    """History 3 1; impression 1 shows 5 (clicked), 6, 7; impression 2 shows 8 (clicked) and 9; 3 shows only a click."""
    ids = jnp.array([3, 1, 5, 6, 7, 9, 8, 10, NUM_ITEMS], jnp.int32)
    labels = jnp.array([0, 0, 1, -1, -1, -2, 2, 3, 0], jnp.float32)
    scores = np.asarray(MODEL.score(PARAMS, history(3, 1)), np.float64)

    def nll(positive, others):
        return np.log(np.exp(scores[[positive, *others]]).sum()) - scores[positive]

    value = LOSS(PARAMS, ids, labels, jax.random.key(0))
    np.testing.assert_allclose(value, (nll(5, [6, 7]) + nll(8, [9])) / 2, rtol=1e-5)
    one = jax.jit(jax.vmap(lambda key: impression_loss(MODEL, num_negatives=1)(PARAMS, ids, labels, key)))
    values = np.asarray(one(jax.random.split(jax.random.key(2), 30)))
    allowed = np.array([(nll(5, [n]) + nll(8, [9])) / 2 for n in (6, 7)])
    assert np.abs(values[:, None] - allowed).min(axis=1).max() < 1e-4
    assert np.all(np.abs(values[:, None] - allowed).min(axis=0) < 1e-4)


def test_a_client_without_impressions_has_no_gradient():
    value, gradient = jax.value_and_grad(LOSS)(PARAMS, history(), jnp.zeros(7), jax.random.key(0))
    assert value == 0
    assert all(np.all(x == 0) for x in jax.tree.leaves(gradient))


def test_refusals():
    with pytest.raises(ValueError, match="num_heads must divide"):
        nrms(id_table(3, dim=5), num_heads=2)
    with pytest.raises(ValueError, match="at least 1"):
        nrms(id_table(3, dim=4), num_negatives=0)
