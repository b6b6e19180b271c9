"""Risk: a query sees later items or padding, or drawn negatives push popular items down."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_worlds import make_split

from fedjax_rec.algorithms.fedsequence import fedsequence, fedsequence_score
from fedjax_rec.data.clients import client_data
from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.transforms import chain
from fedjax_rec.models.items import id_table
from fedjax_rec.models.two_tower import in_batch_loss, two_tower, unit

NUM_ITEMS, DIM = 6, 3
ITEMS = id_table(NUM_ITEMS, dim=DIM, init_stddev=1.0)
PROBS = np.array([0.4, 0.3, 0.1, 0.1, 0.05, 0.05], np.float32)
PLAIN = two_tower(ITEMS, max_length=3, temperature=0.5)
PARAMS = PLAIN.init(jax.random.key(0))
QUERY = jax.jit(PLAIN.query)
VECTORS = np.asarray(PARAMS.tables["item"], np.float64)
LONG = jnp.array([5, 0, 3, 1, 6, 6], jnp.int32)  # of four items only the last three count


def normed(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_the_mean_is_of_the_last_items_that_are_there():
    expected = normed(VECTORS[[0, 3, 1]].mean(0)) / 0.5
    np.testing.assert_allclose(QUERY(PARAMS, LONG, None), expected, rtol=1e-5)
    presence = jnp.array([1.0, 1.0, 0.0, 0.5, 1.0, 1.0])
    expected = normed(VECTORS[0] + 0.5 * VECTORS[1]) / 0.5
    np.testing.assert_allclose(QUERY(PARAMS, LONG, presence), expected, rtol=1e-5)
    np.testing.assert_allclose(PLAIN.score(PARAMS, LONG[:1]), normed(VECTORS) @ normed(VECTORS[5]) / 0.5, rtol=1e-4)
    np.testing.assert_array_equal(QUERY(PARAMS, jnp.full(6, NUM_ITEMS), None), np.zeros(DIM))


def test_attention_weighs_and_no_place_sees_later_ones():
    model = two_tower(ITEMS, max_length=4, pooling="attention", hidden=(5,))
    params = model.init(jax.random.key(1))
    w = jax.tree.map(lambda x: np.asarray(x, np.float64), params.dense["user"])
    rows = np.asarray(params.tables["item"], np.float64)[[2, 4, 1]]
    logits = np.tanh(rows @ w["attention.kernel"] + w["attention.bias"]) @ w["weigh.kernel"][:, 0]
    hidden = np.exp(logits) @ rows / np.exp(logits).sum()
    hidden = np.maximum(hidden @ w["deep.layers.0.kernel"] + w["deep.layers.0.bias"], 0)
    expected = normed(hidden @ w["out.kernel"] + w["out.bias"]) / 0.05
    np.testing.assert_allclose(jax.jit(model.query)(params, jnp.array([2, 4, 1, 6]), None), expected, rtol=1e-4)
    at_places = jax.jit(model.places)
    places, other = (at_places(params, jnp.array([2, 4, 1, last])) for last in (3, 6))
    np.testing.assert_allclose(places[2], expected, rtol=1e-4)
    np.testing.assert_allclose(places[:3], other[:3], rtol=1e-4, atol=1e-5)


def full_softmax(query, target):
    scores = normed(VECTORS) @ np.asarray(query, np.float64)
    return np.log(np.exp(scores).sum()) - scores[target]


def test_drawn_negatives_cost_what_the_whole_catalogue_costs_whatever_they_are_drawn_from():
    history = jnp.array([2, 0, 4, 6], jnp.int32)
    expected = np.mean(
        [
            full_softmax(QUERY(PARAMS, jnp.where(jnp.arange(4) < n, history, NUM_ITEMS), None), history[n])
            for n in (1, 2)
        ]
    )
    for probs in (None, PROBS):
        model = two_tower(ITEMS, max_length=3, temperature=0.5, num_negatives=40_000, item_probs=probs)
        assert abs(jax.jit(model.loss)(PARAMS, history, jax.random.key(3)) - expected) < 0.03
    value_and_gradient = jax.jit(jax.value_and_grad(PLAIN.loss))
    for nothing in ([6, 6, 6, 6], [2, 6, 6, 6]):
        loss, gradient = value_and_gradient(PARAMS, jnp.array(nothing), jax.random.key(0))
        assert loss == 0
        assert not any(np.any(x) for x in jax.tree.leaves(gradient))


def test_other_users_targets_are_corrected_for_how_often_they_come():
    rng = np.random.default_rng(0)
    targets = rng.choice(NUM_ITEMS, 4000, p=PROBS / PROBS.sum())
    histories = rng.integers(0, NUM_ITEMS, (4000, 2)).astype(np.int32)
    queries = jax.jit(jax.vmap(lambda history: PLAIN.query(PARAMS, history, None)))(histories)
    expected = np.mean([full_softmax(q, t) for q, t in zip(queries, targets, strict=True)])
    loss = jax.jit(lambda probs: in_batch_loss(PLAIN, PARAMS, histories, targets, probs))
    found, wrong = loss(PROBS), loss(np.full(NUM_ITEMS, 1 / NUM_ITEMS, np.float32))
    assert abs(found - expected) < 0.02 < abs(wrong - expected)
    with pytest.raises(ValueError, match="batch of one user"):
        in_batch_loss(PLAIN, PARAMS, histories[:1], targets[:1], PROBS)


def test_clients_learn_what_comes_next_together():
    """Each client has seen some steps of one circle; what follows a client's last item, others have seen."""
    lists = [[(start + step) % NUM_ITEMS for step in range(2)] for start in range(NUM_ITEMS)] * 2
    split = make_split(lists, [[] for _ in lists], num_items=NUM_ITEMS)
    model = two_tower(ITEMS, max_length=1, hidden=(16,), temperature=0.2, num_negatives=16)
    rounds = make_rounds(
        fedsequence(model, server_optimizer=None, client_lr=10.0),
        chain(),
        full_participation(len(lists)),
        client_data(split, num_buckets=1),
        span_size=300,
    )
    state, private = rounds.init(jax.random.key(0))
    keys = RoundKeys(*(jax.random.key(i) for i in range(3)))
    state, private, metrics = rounds.run(state, private, keys, 300)
    assert metrics["loss"][299] < 0.5 * metrics["loss"][0]
    for user, items in enumerate(lists[:NUM_ITEMS]):
        own = fedsequence_score(model)(state.shared, {"query": private["query"][user]})
        assert int(jnp.argmax(own)) == (items[-1] + 1) % NUM_ITEMS


def test_a_zero_vector_has_a_zero_unit_and_gradient():
    gradient = jax.grad(lambda x: unit(x).sum())(jnp.zeros(3))
    np.testing.assert_array_equal(gradient, np.zeros(3))


def test_bad_settings_are_refused_with_the_value():
    with pytest.raises(ValueError, match="got 'max'"):
        two_tower(ITEMS, pooling="max")
    with pytest.raises(ValueError, match="got 0, 128"):
        two_tower(ITEMS, max_length=0)
    with pytest.raises(ValueError, match=r"item_probs must be \[6\], one an item; got \[2\]"):
        two_tower(ITEMS, item_probs=jnp.ones(2))
