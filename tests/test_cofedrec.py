"""Risk: the contrast, the K-means, the elbow or the group's mean is not what the paper's steps say.

Each is compared with loops in NumPy, and the server's round with all its parts together.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_worlds import make_split
from reference_round import one_by_one

from fedjax_rec.algorithms.cofedrec import cofedrec, contrast
from fedjax_rec.algorithms.pfedrec import personal_scorer
from fedjax_rec.data.clients import client_data
from fedjax_rec.data.negatives import Negatives
from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.grouping import k_means, up_to_elbow
from fedjax_rec.federated.local import draw_epoch
from fedjax_rec.federated.round import make_rounds
from fedjax_rec.models.base import Shared
from fedjax_rec.privacy.mechanisms import user_level_dp

NUM_CLIENTS, NUM_ITEMS, DIM = 8, 11, 4
NEGATIVES = Negatives(2)
TAUS = {"temperature": 0.2, "base_temperature": 0.5}
LR, FACTOR, LAMBDA = 0.1, 1.5, 0.3


def method(**changes):
    options = {"lr": LR, "item_lr_factor": FACTOR, "contrast_weight": LAMBDA, "num_contrasted": None, "num_groups": 3}
    options |= TAUS | {"negatives": NEGATIVES, "batch_size": None, "local_epochs": 2}
    model = personal_scorer(NUM_ITEMS, dim=DIM)
    return cofedrec(model, num_clients=NUM_CLIENTS, num_items=NUM_ITEMS, **(options | changes))


def population():
    lists = [[(3 * user + 2 * i) % NUM_ITEMS for i in range(user % 4)] for user in range(NUM_CLIENTS)]
    return client_data(make_split(lists, [[] for _ in lists], num_items=NUM_ITEMS), num_buckets=1)


def plain_contrast(items, groups):
    """L_sup by loops."""
    unit = [v / np.linalg.norm(v) for v in items]
    total = 0.0
    for i, group in enumerate(groups):
        below = sum(np.exp(unit[i] @ unit[a] / TAUS["temperature"]) for a in range(len(unit)) if a != i)
        same = [z for z in range(len(unit)) if z != i and groups[z] == group]
        terms = [np.log(np.exp(unit[i] @ unit[z] / TAUS["temperature"]) / below) for z in same]
        total += sum(terms) / max(len(same), 1)
    return -TAUS["temperature"] / TAUS["base_temperature"] * total / len(unit)


def test_the_contrast_is_its_formula_and_nothing_if_no_two_items_share_a_group():
    items = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    groups = np.array([0, 1, 0, 2, 2, 1, 0, 3, 2])  # group 3 has one item
    np.testing.assert_allclose(
        contrast(jnp.asarray(items), jnp.asarray(groups), **TAUS), plain_contrast(items, groups), rtol=1e-5
    )
    alone = jax.jit(partial(jax.value_and_grad(contrast), **TAUS))(jnp.asarray(items), jnp.arange(9))
    assert alone[0] == 0
    assert not np.any(alone[1])
    zero_row = jnp.asarray(items).at[0].set(0.0)
    assert np.all(np.isfinite(jax.jit(partial(jax.grad(contrast), **TAUS))(zero_row, jnp.asarray(groups))))


def test_k_means_is_lloyds_loop_and_finds_blobs():
    rng, (key, other_key) = np.random.default_rng(1), jax.random.split(jax.random.key(4))
    rows = rng.normal(size=(40, 3)).astype(np.float32)
    first = jax.random.choice(jax.random.clone(key), 40, (5,), replace=False)
    centres = rows[np.asarray(first)].astype(np.float64)
    for _ in range(6):
        groups = np.array([np.argmin([np.sum((row - c) ** 2) for c in centres]) for row in rows])
        centres = np.array([rows[groups == g].mean(0) if np.any(groups == g) else c for g, c in enumerate(centres)])
    groups = np.array([np.argmin([np.sum((row - c) ** 2) for c in centres]) for row in rows])
    np.testing.assert_array_equal(k_means(jnp.asarray(rows), 5, num_steps=6, key=key), groups)
    blobs = np.repeat([[9.0, 0.0], [0.0, 9.0]], 10, axis=0) + rng.normal(size=(20, 2))
    found = np.asarray(k_means(jnp.asarray(blobs, jnp.float32), 2, num_steps=10, key=other_key))
    assert len(set(found[:10])) == len(set(found[10:])) == 1
    assert found[0] != found[10]


def plain_elbow(similarities):
    """The clients up to the point farthest from the line between the first and the last, by distances in the plane."""
    order = np.argsort(-similarities)
    points = np.array([[rank, similarities[client]] for rank, client in enumerate(order)])
    along = (points[-1] - points[0]) / np.linalg.norm(points[-1] - points[0])
    distances = [np.linalg.norm((p - points[0]) - ((p - points[0]) @ along) * along) for p in points]
    return set(order[: int(np.argmax(distances)) + 1].tolist())


@pytest.mark.parametrize("seed", range(5))
def test_the_elbow_is_the_point_farthest_from_the_line_and_absent_clients_do_not_count(seed):
    rng = np.random.default_rng(seed)
    similarities = (rng.normal(size=12) * 10).astype(np.float32)
    present = np.ones(12, bool)
    present[[3, 7]] = False
    inside = np.flatnonzero(present)
    want = {int(inside[i]) for i in plain_elbow(similarities[inside])}
    similarities[3], similarities[7] = 1e6, -1e6
    similar = np.asarray(up_to_elbow(jnp.asarray(similarities), jnp.asarray(present)))
    assert set(np.flatnonzero(similar).tolist()) == want
    assert 1 <= len(want) < 10


def test_a_client_pulls_the_items_of_a_group_together_in_every_step():
    """Two epochs of one batch, by gradients of the whole objective on the whole table."""
    algorithm = method()
    state = algorithm.init(jax.random.key(0))
    groups = jnp.arange(NUM_ITEMS) % 3
    tables = state.shared.tables | {"group": groups[:, None].astype(jnp.float32)}
    client = jax.tree.map(jnp.asarray, one_by_one(population())[3])
    private, key = algorithm.init_private(jax.random.key(1)), jax.random.key(2)
    output = jax.jit(algorithm.client_update)(Shared(tables, {}), private, client, jnp.int32(1), key)
    draw = jax.jit(lambda client, key: draw_epoch(client, NEGATIVES, None, key).examples)
    batch = jax.tree.map(jnp.ravel, draw(client, jax.random.split(jax.random.key(2), 3)[0]))
    real = batch.weights > 0

    def objective(table, own):
        scores = jnp.take(table, batch.ids, axis=0, mode="clip") @ own["weights"] + own["bias"]
        losses = jnp.where(batch.labels > 0, -jax.nn.log_sigmoid(scores), -jax.nn.log_sigmoid(-scores))
        return jnp.sum(jnp.where(real, losses * batch.weights, 0.0)) / batch.weights.sum() + LAMBDA * contrast(
            table, groups, **TAUS
        )

    slopes = jax.jit(jax.grad(objective, argnums=(0, 1)))
    table, own = state.shared.tables["item"], private["own"]
    for _ in range(2):
        gradient, own_gradient = slopes(table, own)
        table = table - LR * (NUM_ITEMS * FACTOR - 1) * gradient
        own = jax.tree.map(lambda x, g: x - LR * g, own, own_gradient)
    np.testing.assert_allclose(output.update.tables["personal"].values.reshape(table.shape), table, atol=1e-4)
    np.testing.assert_allclose(output.private["own"]["weights"], own["weights"], atol=1e-5)
    np.testing.assert_allclose(output.private["scores"], table @ own["weights"] + own["bias"], atol=1e-4)


def test_the_servers_round_is_the_papers_steps():
    """Clients 0 to 4 agree, 5 to 7 do not, and 2 is absent; the group's mean goes to those up to the elbow alone."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(NUM_ITEMS, DIM))
    uploads = np.array([base + 0.3 * rng.normal(size=base.shape) for _ in range(NUM_CLIENTS)])
    uploads[5:] = rng.normal(size=(3, *base.shape))
    present = np.arange(NUM_CLIENTS) != 2
    algorithm = method(num_groups=2)
    state = algorithm.init(jax.random.key(0))
    expected_size = 5.0  # what the round divides by, whoever came
    sent = {
        "item": jnp.zeros((NUM_ITEMS, DIM)),
        "personal": jnp.asarray(
            (uploads * present[:, None, None]).reshape(NUM_CLIENTS, -1) / expected_size, jnp.float32
        ),
        "present": jnp.asarray(present[:, None] / expected_size, jnp.float32),
        "group": jnp.zeros((NUM_ITEMS, 1)),
    }
    after = jax.jit(algorithm.server_update)(state, Shared(sent, {})).shared.tables
    np.testing.assert_allclose(after["item"], uploads[present].mean(0), atol=1e-6)
    groups = np.asarray(after["group"])[:, 0]
    assert set(groups) == {0.0, 1.0}

    def similar_clients(core, group):
        items = np.flatnonzero(groups == group)
        cosine = lambda a, b: a @ b / (np.linalg.norm(a) * np.linalg.norm(b))  # noqa: E731
        who = np.flatnonzero(present)
        s = np.array([sum(cosine(uploads[core, i], uploads[u, i]) for i in items) for u in who])
        return {int(who[i]) for i in plain_elbow(s)}

    received = np.asarray(after["personal"]).reshape(uploads.shape)
    changed = {u for u in range(NUM_CLIENTS) if present[u] and not np.allclose(received[u], uploads[u], atol=1e-6)}
    assert changed in [similar_clients(core, group) for core in np.flatnonzero(present) for group in (0.0, 1.0)]
    assert 2 <= len(changed) < 7
    for u in changed:
        np.testing.assert_allclose(received[u], uploads[sorted(changed)].mean(0), atol=1e-6)
    np.testing.assert_array_equal(received[2], state.shared.tables["personal"][2].reshape(base.shape))


def test_it_is_refused_where_it_does_not_fit():
    with pytest.raises(ValueError, match="num_groups must be between 1 and num_items=11; got 12"):
        method(num_groups=12)
    needed = 2 * NUM_CLIENTS * NUM_ITEMS * DIM * 4
    with pytest.raises(ValueError, match=f"takes {needed} bytes"):
        method(max_private_bytes=needed - 1)
    dp = user_level_dp(l2_clip_norm=1.0, noise_multiplier=1.0)
    with pytest.raises(ValueError, match="looks at single uploads"):
        make_rounds(method(), dp, full_participation(NUM_CLIENTS), population())
