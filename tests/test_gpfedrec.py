"""Risk: the user graph is made of the wrong tables or of clients that are not there, or the regulariser misses rows.

Rounds are compared with a plain NumPy loop, for both similarities, with all clients and with some.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_worlds import make_split
from reference_round import one_by_one

from fedjax_rec.algorithms.gpfedrec import gpfedrec, private_tower
from fedjax_rec.algorithms.pfedrec import personal_scorer
from fedjax_rec.data.clients import client_data
from fedjax_rec.data.negatives import Negatives
from fedjax_rec.federated.cohort import full_participation, poisson
from fedjax_rec.federated.grouping import neighbour_weights
from fedjax_rec.federated.local import draw_epoch, num_batches
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.rows import add_to_total, zero_total
from fedjax_rec.federated.transforms import chain
from fedjax_rec.federated.uploads import own_score
from fedjax_rec.models.base import View
from fedjax_rec.models.matrix_factorization import matrix_factorization
from fedjax_rec.privacy.mechanisms import user_level_dp

NUM_CLIENTS, NUM_ITEMS, DIM = 7, 11, 4
KEYS = RoundKeys(*(jax.random.key(seed) for seed in (1, 2, 3)))
LR, FACTOR, LAMBDA, BATCH = 0.1, 1.5, 2.0, 3
NEGATIVES = Negatives(2)
draw = jax.jit(lambda client, key: draw_epoch(client, NEGATIVES, BATCH, key).examples)


def population():
    """Clients of length 0 to 4, so that some take two steps, some one, and one none."""
    lists = [[(3 * user + 2 * i) % NUM_ITEMS for i in range(user % 5)] for user in range(NUM_CLIENTS)]
    return client_data(make_split(lists, [[] for _ in lists], num_items=NUM_ITEMS), num_buckets=1)


def method(model=None, **changes):
    model = personal_scorer(NUM_ITEMS, dim=DIM) if model is None else model
    options = {"lr": LR, "item_lr_factor": FACTOR, "regularization": LAMBDA, "batch_size": BATCH}
    return gpfedrec(
        model, num_clients=NUM_CLIENTS, num_items=NUM_ITEMS, **(options | {"negatives": NEGATIVES} | changes)
    )


def plain_client(item, neighbours, head, client, key):
    """A client's table and head after the round, by loops over examples."""
    draw_key, _ = jax.random.split(jax.random.split(key)[0])
    examples = jax.device_get(draw(client, draw_key))
    table, weights, bias = item.copy(), head["weights"].copy(), head["bias"].copy()
    for step in range(int(num_batches(client, BATCH))):
        batch = [(i, y, w) for i, y, w in zip(*(np.ravel(x[step]) for x in examples), strict=True) if w]
        table_gradient = 2 * LAMBDA / table.size * (table - neighbours)
        weights_gradient, bias_gradient = np.zeros(DIM), 0.0
        total = max(sum(weight for _, _, weight in batch), 1.0)
        for i, label, weight in batch:
            error = weight / total * (1 / (1 + np.exp(-(table[i] @ weights + bias))) - label)
            table_gradient[i] += error * weights
            weights_gradient += error * table[i]
            bias_gradient += error
        table -= LR * (NUM_ITEMS * FACTOR - 1) * table_gradient
        weights -= LR * weights_gradient
        bias -= LR * bias_gradient
    return table, {"weights": weights, "bias": bias}


def plain_graph(uploads, similarity, threshold):
    """Each present client's neighbours, as lists."""
    names, values = list(uploads), {}
    for u in names:
        for v in names:
            a, b = uploads[u].ravel(), uploads[v].ravel()
            cosine = 1.0 if u == v else a @ b / np.sqrt((a @ a) * (b @ b))
            values[u, v] = cosine if similarity == "cosine" else 1 - cosine
    mean = np.mean(list(values.values()))
    return {u: [v for v in names if values[u, v] > threshold * mean] or [u] for u in names}


def plain_round(item, personal, heads, clients, present, round_number, similarity, threshold):
    uploads = {}
    for u in present:
        key = jax.random.fold_in(jax.random.fold_in(KEYS.client, round_number), u)
        uploads[u], heads[u] = plain_client(item, personal[u], heads[u], clients[u], key)
    graph = plain_graph(uploads, similarity, threshold)
    for u in present:
        personal[u] = np.mean([uploads[v] for v in graph[u]], axis=0)
    item = np.mean([personal[u] for u in present], axis=0)
    return item, uploads, graph


SAMPLERS = {"all": full_participation(NUM_CLIENTS), "some": poisson(NUM_CLIENTS, cohort_size=4)}


@pytest.mark.parametrize(
    ("similarity", "threshold", "cohort"),
    [("cosine", 1.0, "all"), ("distance", 1.0, "all"), ("distance", 0.5, "some"), ("cosine", 1.0, "some")],
)
def test_three_rounds_are_a_plain_loop(similarity, threshold, cohort):
    """Tables for all, for each, and scores; chunks of 4 of 7 clients, so the last chunk has one that is nobody."""
    clients, sampler = population(), SAMPLERS[cohort]
    algorithm = method(similarity=similarity, threshold=threshold)
    rounds = make_rounds(algorithm, chain(), sampler, clients, span_size=1, chunk_size=4)
    state, private = rounds.init(jax.random.key(0))
    item = np.array(state.shared.tables["item"], np.float64)
    personal = {u: item.copy() for u in range(NUM_CLIENTS)}
    own = jax.device_get(private["own"])
    heads = {u: {name: np.array(x[u], np.float64) for name, x in own.items()} for u in range(NUM_CLIENTS)}
    seen = set()
    for number in range(3):
        mask = np.asarray(sampler.draw(KEYS.cohort, number))
        present = [int(u) for u in np.flatnonzero(mask)]
        seen.add(len(present))
        item, uploads, graph = plain_round(
            item, personal, heads, one_by_one(clients), present, number, similarity, threshold
        )
        state, private, _ = rounds.run(state, private, KEYS, 1)
        tables = state.shared.tables
        np.testing.assert_allclose(tables["item"], item, atol=1e-5)
        for u in range(NUM_CLIENTS):
            np.testing.assert_allclose(tables["personal"][u].reshape(NUM_ITEMS, DIM), personal[u], atol=1e-5)
        for u in present:
            scores = uploads[u] @ heads[u]["weights"] + heads[u]["bias"]
            np.testing.assert_allclose(private["scores"][u], scores, atol=1e-4)
    assert max(map(len, graph.values())) > 1  # somebody has neighbours in the last round
    assert seen == {NUM_CLIENTS} if cohort == "all" else min(seen) < NUM_CLIENTS


def test_as_coded_links_those_least_alike_and_as_written_those_most():
    """Two cliques of two: the paper's users end up with their own clique, the code's with the other one."""
    tables = jnp.array([[1.0, 0.1], [1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [9.0, -9.0]])
    present = jnp.array([True, True, True, True, False])
    near = neighbour_weights(tables, present, similarity="cosine", threshold=1.0)
    far = neighbour_weights(tables, present, similarity="distance", threshold=1.0)
    own, other = np.kron(np.eye(2), np.full((2, 2), 0.5)), np.kron(1 - np.eye(2), np.full((2, 2), 0.5))
    np.testing.assert_allclose(near[:4, :4], own)
    np.testing.assert_allclose(far[:4, :4], other)
    assert not np.any(near[4])
    assert not np.any(near[:, 4])
    assert not np.any(far[4])
    assert not np.any(far[:, 4])


def test_a_client_without_neighbours_is_its_own():
    weights = neighbour_weights(jnp.eye(3), jnp.ones(3, bool), similarity="cosine", threshold=9.0)
    np.testing.assert_array_equal(weights, np.eye(3))


def test_a_padding_client_adds_to_nothing():
    """Its id is the number of clients; the last client's row must not take what it sends."""
    algorithm = method()
    state = algorithm.init(jax.random.key(0))
    (bucket,) = population().buckets
    client = jax.tree.map(lambda x: jnp.asarray(x[-1]), bucket)
    nobody = dataclasses.replace(client, client_id=jnp.int32(NUM_CLIENTS))

    @jax.jit
    def total(one):
        private = algorithm.init_private(jax.random.key(1))
        update = algorithm.client_update(state.shared, private, one, jnp.int32(2), jax.random.key(2)).update
        return add_to_total(zero_total(update), jax.tree.map(lambda x: x[None], update)).tables

    assert not np.any(total(nobody)["personal"])
    assert not np.any(total(nobody)["present"])
    assert np.any(total(client)["personal"][client.client_id])
    assert total(client)["present"].sum() == 1


def test_the_user_vector_and_the_tower_have_their_own_rates():
    """One batch of one client, against gradients of the loss on whole tables."""
    model = private_tower(NUM_ITEMS, dim=DIM, hidden=(5, 3))
    algorithm = method(model, batch_size=None, regularization=0.0)
    state, private = algorithm.init(jax.random.key(0)), algorithm.init_private(jax.random.key(1))
    (bucket,) = population().buckets
    client, key = jax.tree.map(lambda x: jnp.asarray(x[-1]), bucket), jax.random.key(2)
    output = jax.jit(algorithm.client_update)(state.shared, private, client, jnp.int32(1), key)
    whole = jax.jit(lambda client, key: draw_epoch(client, NEGATIVES, None, key).examples)
    batch = jax.tree.map(lambda x: x[0], whole(client, jax.random.split(jax.random.key(2))[0]))

    def loss(table, own):
        rows = {"item": jnp.take(table, batch.ids, axis=0, mode="clip")}
        return model.loss(View(rows, {}), own, batch, jax.random.key(3))

    item, own = state.shared.tables["item"], private["own"]
    item_gradient, gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))(item, own)
    rates = {"user": LR * (FACTOR - 1), "tower": LR}
    for part, rate in rates.items():
        want = jax.tree.map(lambda x, g, rate=rate: x - rate * g, own[part], gradient[part])
        jax.tree.map(lambda got, x: np.testing.assert_allclose(got, x, atol=1e-6), output.private["own"][part], want)
    trained = item - LR * (NUM_ITEMS * FACTOR - 1) * item_gradient
    np.testing.assert_allclose(output.update.tables["personal"].values.reshape(item.shape), trained, atol=1e-5)
    np.testing.assert_allclose(
        own_score(state.shared, output.private),
        model.score(state.shared._replace(tables={"item": trained}), output.private["own"]),
        atol=1e-4,
    )
    assert np.any(gradient["user"])
    assert np.any(item_gradient)


def test_tables_that_do_not_fit_are_refused_with_their_bytes():
    model = personal_scorer(1682, dim=32)
    needed = 2 * 943 * 1682 * 32 * 4
    with pytest.raises(ValueError, match=f"takes {needed} bytes.*max_private_bytes={needed - 1}"):
        gpfedrec(model, num_clients=943, num_items=1682, max_private_bytes=needed - 1)
    gpfedrec(model, num_clients=943, num_items=1682, max_private_bytes=needed)


def test_central_dp_is_refused_because_the_server_sees_single_uploads():
    dp = user_level_dp(l2_clip_norm=1.0, noise_multiplier=1.0)
    with pytest.raises(ValueError, match="looks at single uploads"):
        make_rounds(method(), dp, SAMPLERS["all"], population())


def test_other_similarities_and_models_are_refused():
    with pytest.raises(ValueError, match="cosine, distance; got 'euclidean'"):
        method(similarity="euclidean")
    with pytest.raises(ValueError, match="it shares bias, item"):
        method(matrix_factorization(NUM_ITEMS, dim=DIM))
