"""Risk: what an item lacks, or an id nobody trained, leaks into its vector, and unseen items are ranked by noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_worlds import interactions

from experiments._cold_world import hold_out_items, known_only
from experiments._mean_user import mean_user
from fedjax_rec.models.base import Shared
from fedjax_rec.models.content import Modality, content_tower, load_vectors, with_id_dropout
from fedjax_rec.models.sequence_training import train_sequence

NUM_ITEMS, DIM = 6, 4
RNG = np.random.default_rng(0)
# Item 0 has all, 1 only text, 2 only genres, 3 only its id, 4 all but the id, 5 nothing.
KNOWN = np.array([True, False, False, True, False, False])
MODALITIES = {
    "text": Modality(RNG.normal(size=(NUM_ITEMS, 3)), np.array([True, True, False, False, True, False])),
    "genres": Modality(RNG.normal(size=(NUM_ITEMS, 2)), np.array([True, False, True, False, True, False])),
}
TOWER = content_tower(NUM_ITEMS, dim=DIM, modalities=MODALITIES, known=jnp.asarray(KNOWN))


def drawn_params(tower=TOWER, seed=1):
    """Every number drawn, gates too, so that none of them can be forgotten unseen."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(tower.init, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), shapes)


PARAMS = drawn_params()
VECTORS = jax.jit(TOWER.all)(PARAMS)


def numpy_vector(item):
    """One item, a loop over what it has."""
    dense = {name: np.asarray(value, np.float64) for name, value in PARAMS.dense.items()}
    parts = {}
    for name, modality in MODALITIES.items():
        if modality.present[item]:
            x = modality.values[item] / np.linalg.norm(modality.values[item])
            parts[name] = x @ dense[f"{name}.kernel"] + dense[f"{name}.bias"]
    if KNOWN[item]:
        parts["id"] = np.asarray(PARAMS.tables["item"][item], np.float64)
    if not parts:
        return np.zeros(DIM)
    gates = {name: np.exp(part @ dense[f"{name}.gate"] + dense[f"{name}.gate_bias"]) for name, part in parts.items()}
    return sum(gates[name] * part for name, part in parts.items()) / sum(gates.values())


def test_vectors_are_the_gated_sum_of_what_an_item_has():
    np.testing.assert_allclose(VECTORS, [numpy_vector(item) for item in range(NUM_ITEMS)], atol=1e-5)
    ids = jnp.array([[4, 0], [2, 5]])
    per_client = jax.jit(jax.vmap(TOWER.take))(jax.tree.map(lambda x: jnp.stack([x, 2 * x]), PARAMS), ids)
    np.testing.assert_allclose(per_client[0], VECTORS[ids[0]], atol=1e-6)
    assert np.abs(per_client[1] - VECTORS[ids[1]]).max() > 0.1


def test_what_stands_where_nothing_is_present_is_never_read():
    spoilt = {
        name: Modality(np.where(modality.present[:, None], modality.values, np.nan), modality.present)
        for name, modality in MODALITIES.items()
    }
    tower = content_tower(NUM_ITEMS, dim=DIM, modalities=spoilt, known=jnp.asarray(KNOWN))
    np.testing.assert_array_equal(jax.jit(tower.all)(PARAMS), VECTORS)
    with pytest.raises(ValueError, match=r"'text'.*not finite"):
        content_tower(2, dim=DIM, modalities={"text": Modality(np.full((2, 3), np.nan), np.ones(2, bool))})


def test_only_the_ids_of_known_items_are_trained_and_every_gradient_is_finite():
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(TOWER.all(params) ** 2)))(PARAMS)
    moved = np.abs(gradient.tables["item"]).max(axis=1) > 0
    np.testing.assert_array_equal(moved, KNOWN)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_without_ids_there_is_no_table_and_without_anything_a_sentence():
    tower = content_tower(NUM_ITEMS, dim=DIM, modalities=MODALITIES, ids=False)
    assert tower.init(jax.random.key(0)).tables == {}
    content_alone = np.array([1, 2, 4])
    vectors = np.asarray(tower.all(Shared({}, PARAMS.dense)))
    np.testing.assert_allclose(vectors[content_alone], np.asarray(VECTORS)[content_alone], atol=1e-6)
    with pytest.raises(ValueError, match="give ids or modalities"):
        content_tower(NUM_ITEMS, dim=DIM, modalities={}, ids=False)
    for name, modality, said in (
        ("text", Modality(np.zeros((5, 3)), np.ones(5, bool)), r"\[5, 3\].*must be \[6, size\]"),
        ("id", MODALITIES["text"], "cannot be called"),
    ):
        with pytest.raises(ValueError, match=said):
            content_tower(NUM_ITEMS, dim=DIM, modalities={name: modality})


def test_hidden_ids_are_those_of_a_tower_that_does_not_know_them():
    """At a rate near 1 the loss is that of content alone; at 0 that of all; serving hides nothing."""

    def build(items):
        return mean_user(items, max_length=4)

    def tower(known):
        return content_tower(NUM_ITEMS, dim=DIM, modalities=MODALITIES, known=known)

    history = jnp.array([0, 3, 4, 1])
    params = build(TOWER).init(jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.3, params)
    for rate, known in ((1 - 1e-7, np.zeros(NUM_ITEMS, bool)), (0.0, KNOWN)):
        model = with_id_dropout(build, tower, KNOWN, rate=rate)
        loss_key = jax.random.split(jax.random.key(5))[1]
        expected = jax.jit(build(tower(jnp.asarray(known))).loss)(params, history, loss_key)
        np.testing.assert_allclose(jax.jit(model.loss)(params, history, jax.random.key(5)), expected, rtol=1e-5)
    np.testing.assert_array_equal(jax.jit(model.catalogue)(params), jax.jit(build(TOWER).catalogue)(params))
    with pytest.raises(ValueError, match=r"rate must lie in \[0, 1\)"):
        with_id_dropout(build, tower, KNOWN, rate=1.0)


def test_an_unseen_item_is_ranked_by_what_it_is():
    """Users like one of two kinds; items 10 and 11 are held out whole, one of each kind."""
    num_items = 12
    rng = np.random.default_rng(0)
    kinds = np.arange(num_items) % 2
    lists = [rng.permutation(np.flatnonzero(kinds[:10] == user % 2))[:4].tolist() for user in range(24)]
    modalities = {"kind": Modality(np.eye(2)[kinds], np.ones(num_items, bool))}
    known = np.arange(num_items) < 10

    def tower(ids):
        return content_tower(num_items, dim=DIM, modalities=modalities, known=ids)

    model = with_id_dropout(lambda items: mean_user(items, max_length=4), tower, known, rate=0.5)
    histories = interactions(lists, num_items=num_items)
    settings = {"num_epochs": 30, "batch_size": 24, "learning_rate": 0.05, "num_buckets": 1}
    params = train_sequence(model, histories, seed=0, **settings)
    scores = jax.vmap(lambda history: model.score(params, history))(jnp.array([lists[0], lists[1]]))
    assert scores[0, 10] > scores[0, 11] + 0.5
    assert scores[1, 11] > scores[1, 10] + 0.5


def test_vectors_from_a_file_come_in_the_order_of_the_catalogue(tmp_path):
    file, labels = tmp_path / "posters.npy", np.array([10, 20, 30, 40])
    np.save(file, np.arange(6, dtype=np.float64).reshape(3, 2))
    np.save(tmp_path / "posters.ids.npy", np.array([40, 99, 10]))
    found = load_vectors(file, labels)
    np.testing.assert_array_equal(found.present, [True, False, False, True])
    np.testing.assert_array_equal(found.values, [[4, 5], [0, 0], [0, 0], [0, 1]])
    assert found.values.dtype == np.float32
    np.testing.assert_array_equal(load_vectors(file, labels.astype(str)).values, found.values)
    for ids, said in (
        ([40, 40, 10], "Item 40 has two rows"),
        ([1, 2, 3], "no item of the catalogue"),
        ([1, 2], r"\[2\]"),
    ):
        np.save(tmp_path / "posters.ids.npy", np.array(ids))
        with pytest.raises(ValueError, match=said):
            load_vectors(file, labels)
    (tmp_path / "posters.ids.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"posters\.ids\.npy"):
        load_vectors(file, labels)


def test_held_out_items_are_in_no_row_of_train_and_nothing_after_the_question_is():
    rng = np.random.default_rng(3)
    rows = interactions([rng.permutation(20)[:12].tolist() for _ in range(30)], num_items=20)
    unseen = hold_out_items(rows, seed=0)
    split, folds = unseen.split, unseen.folds
    assert [int((folds == fold).sum()) for fold in (1, 2)] == [2, 2]
    assert (folds[split.train.item_ids] == 0).all()
    assert (folds[split.test.item_ids] == 2).all()
    assert (folds[split.validation.item_ids] == 1).all()
    for user in range(30):
        mine, asked = rows.items_of(user).tolist(), split.test.items_of(user)
        end = len(mine)
        if len(asked):
            end = mine.index(asked[0])
            assert not any(folds[item] == 2 for item in mine[end + 1 :])
        assert split.train.items_of(user).tolist() == [item for item in mine[:end] if folds[item] == 0]
        others = {item for part in (split.validation, split.history) for item in part.items_of(user)}
        assert others == {item for item in mine[:end] if folds[item] > 0}
    own, ids = known_only(split.train, folds == 0)
    np.testing.assert_array_equal(ids[own.item_ids], split.train.item_ids)
    np.testing.assert_array_equal(ids, np.flatnonzero(folds == 0))
    assert own.num_items == 16
