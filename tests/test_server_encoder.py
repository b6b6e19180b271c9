"""Risk: the server's backward pass is not the joint gradient, costs privacy, or sees more than the clipped sum."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from evaluation_worlds import make_split
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_sensitivity import (
    CLIP,
    MILD,
    NUM_CLIENTS,
    PROBE,
    SAMPLER,
    TOLERANCE,
    cohorts,
    moved,
    pre_noise_sum,
    users,
    with_and_without,
)

from fedjax_rec.algorithms.server_encoder import encode_items, on_slate, pull_back, server_encoder
from fedjax_rec.data.clients import client_data
from fedjax_rec.federated.algorithm import client_key
from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.transforms import chain
from fedjax_rec.models.base import Shared
from fedjax_rec.models.sequence import SequenceModel
from fedjax_rec.privacy import Ledger
from fedjax_rec.privacy.mechanisms import clip_by_global_norm, gaussian_noise

NUM_ITEMS, WORDS, DIM, LR = 9, 5, 4, 0.1
LISTS = [[0, 3, 4], [], [8, 2], [1, 2, 5, 6, 7], [4, 0], [3]]
CLIENTS = client_data(make_split(LISTS, [[] for _ in LISTS], num_items=NUM_ITEMS), num_buckets=1)


def mean_tower(num_items):
    """The least model there is: the mean of the history through one matrix, asked for a drawn item of it."""

    def query(params, history, presence=None):
        del presence
        real = (history < num_items)[:, None]
        vectors = jnp.where(real, params.tables["item"].at[history].get(mode="clip"), 0.0)
        return vectors.sum(0) / jnp.maximum(real.sum(), 1) @ params.dense["tower"]

    def loss(params, history, key):
        length = jnp.sum(history < num_items)
        target = history[jax.random.randint(key, (), 0, jnp.maximum(length, 1))]
        scores = params.tables["item"] @ query(params, history)
        return jnp.where(length > 0, jax.nn.logsumexp(scores) - scores.at[target].get(mode="clip"), 0.0)

    def init(key):
        return Shared({"item": jnp.zeros((num_items, DIM))}, {"tower": jnp.eye(DIM)})

    return SequenceModel(init, loss, query, lambda params: params.tables["item"], num_items, 4)


MODEL = mean_tower(NUM_ITEMS)
CONTENT = {"bag": np.random.default_rng(0).normal(size=(NUM_ITEMS, WORDS)).astype(np.float32)}
KEYS = RoundKeys(*(jax.random.key(i) for i in range(3)))


def init_theta(key):
    one, two = jax.random.split(key)
    return {"in": jax.random.normal(one, (WORDS, 7)) / 2, "out": jax.random.normal(two, (7, DIM)) / 2}


def encode(theta, content):
    return jnp.tanh(content["bag"] @ theta["in"]) @ theta["out"]


def method(**changes):
    sgd = optax.sgd(LR)
    settings = {"encoder_optimizer": sgd, "tower_optimizer": sgd, "batch_size": 4} | changes
    return server_encoder(MODEL, encode, CONTENT, init_theta, **settings)


def made(links, **changes):
    return make_rounds(method(**changes), links, full_participation(NUM_CLIENTS), CLIENTS, span_size=2)


def after_a_round(rounds):
    """The server before and after, private parameters and metrics."""
    before = jax.tree.map(jnp.array, rounds.init(jax.random.key(0))[0])
    return before, *rounds.run(*rounds.init(jax.random.key(0)), KEYS)


def assert_close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_a_round_of_everybody_is_a_step_on_the_joint_loss():
    """End to end: the gradient of the mean client loss in theta and tower, through the encoder at once."""
    before, state, private, metrics = after_a_round(made(chain()))
    content = jax.tree.map(jnp.asarray, CONTENT)

    def mean_loss(theta, tower):
        shared = Shared({"item": encode(theta, content)}, tower)
        losses = []
        for user, items in enumerate(LISTS):
            history = jnp.array([*items, *[NUM_ITEMS] * (5 - len(items))], jnp.int32)
            key, _ = jax.random.split(client_key(jax.random.fold_in(KEYS.client, 0), user))
            losses.append(MODEL.loss(shared, history, key))
        return sum(losses) / NUM_CLIENTS

    start = before.opt_state.theta, before.shared.dense
    loss, gradients = jax.jit(jax.value_and_grad(mean_loss, argnums=(0, 1)))(*start)
    theta, tower = jax.tree.map(lambda w, g: w - LR * g, start, gradients)
    assert max(np.abs(x).max() for x in jax.tree.leaves(gradients[0])) > 0.01
    assert_close(state.opt_state.theta, theta)
    assert_close(state.shared.dense, tower)
    assert_close(state.shared.tables["item"], encode(theta, content))  # and clients get the new vectors
    np.testing.assert_allclose(metrics["loss"][0], loss, rtol=1e-5)
    asked = MODEL.query(before.shared, jnp.array([0, 3, 4, NUM_ITEMS, NUM_ITEMS], jnp.int32), None)
    np.testing.assert_allclose(private["query"][0], asked, rtol=1e-5)


@jax.jit
def in_batches(theta, content, cotangents):
    vectors, vjp = jax.vjp(lambda theta: encode(theta, content), theta)
    whole = vectors, vjp(cotangents)[0]
    return whole, [
        (
            encode_items(encode, theta, content, batch_size=size),
            pull_back(encode, theta, content, cotangents, batch_size=size),
        )
        for size in (4, 20)
    ]


def test_batches_of_the_encoder_change_nothing():
    cotangents = np.random.default_rng(4).normal(size=(NUM_ITEMS, DIM)).astype(np.float32)
    whole, parts = in_batches(init_theta(jax.random.key(3)), CONTENT, cotangents)
    for part in parts:
        assert_close(part, whole)


STDDEV = 0.3
NOISED = chain(clip_by_global_norm(CLIP), gaussian_noise(STDDEV))


def test_a_frozen_encoder_stays_and_costs_the_same():
    """Clients send the tower's gradient alone; the ledger does not know whether the encoder is trained."""
    trained, frozen = made(NOISED), made(NOISED, backward=False)
    before, state, _, _ = after_a_round(frozen)
    for old, new in zip(
        jax.tree.leaves((before.opt_state.theta, before.shared.tables)),
        jax.tree.leaves((state.opt_state.theta, state.shared.tables)),
        strict=True,
    ):
        np.testing.assert_array_equal(old, new)
    assert not np.array_equal(before.shared.dense["tower"], state.shared.dense["tower"])
    ledgers = [rounds.charge(Ledger(), first_round=0, num_rounds=2) for rounds in (trained, frozen)]
    assert ledgers[0].entries == ledgers[1].entries
    assert len(ledgers[0].entries) == 1
    assert trained.upload_bits - frozen.upload_bits == 32 * NUM_ITEMS * (DIM + 1)  # rows carry their ids


PRIVATE = make_rounds(
    method(), chain(clip_by_global_norm(CLIP), gaussian_noise(STDDEV), PROBE), SAMPLER, CLIENTS, span_size=1
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    items=hnp.arrays(np.float32, (NUM_ITEMS, DIM), elements=MILD | st.sampled_from([0.0, 1e3, 1e18, 1e30]), fill=MILD),
    cohort=cohorts,
    user=users,
    seed=st.integers(0, 1000),
)
def test_with_and_without_one_user(items, cohort, user, seed):
    """Vectors and tower together move by no more than one clip norm."""
    state, private = PRIVATE.init(jax.random.key(0))
    state = state._replace(shared=Shared({"item": items}, state.shared.dense))
    sums = [pre_noise_sum(PRIVATE, state, private, mask, seed) for mask in with_and_without(cohort, user)]
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(sums))
    assert moved(*sums) <= CLIP * (1 + TOLERANCE)


def test_the_bound_is_reached():
    """By vectors and tower together, and by neither alone."""
    state, private = PRIVATE.init(jax.random.key(0))
    items = 3 * jax.random.normal(jax.random.key(5), (NUM_ITEMS, DIM))
    state = state._replace(shared=Shared({"item": items}, state.shared.dense))
    masks = with_and_without(np.zeros(NUM_CLIENTS, bool), 3)
    one, other = (pre_noise_sum(PRIVATE, state, private, mask) for mask in masks)
    assert moved(one, other) > 0.99 * CLIP
    parts = [moved(one.tables, other.tables), moved(one.dense, other.dense)]
    assert all(0.05 * CLIP < part < 0.999 * CLIP for part in parts)


SLATE = np.array([0, 2, 4, 7])


def test_items_outside_the_slate_are_left_out():
    bucket = jax.tree.map(jnp.asarray, CLIENTS.buckets[0])
    ids, labels = jax.vmap(lambda client: on_slate(client, SLATE))(bucket)
    for user, row, label in zip(bucket.client_id, ids, labels, strict=True):
        kept = [int(np.searchsorted(SLATE, item)) for item in LISTS[user] if item in SLATE]
        assert row.tolist() == kept + [len(SLATE)] * (len(row) - len(kept))
        assert label.tolist() == [1.0] * len(kept) + [0.0] * (len(row) - len(kept))


def test_a_slate_is_a_catalogue_of_its_own():
    """What clients send for a slate is what they would send if they had never had anything else."""
    lists = [[int(np.searchsorted(SLATE, i)) for i in items if i in SLATE] for items in LISTS]
    small = client_data(make_split(lists, [[] for _ in lists], num_items=4), num_buckets=1)
    shared = Shared({"item": np.eye(4, DIM, dtype=np.float32)}, {"tower": jnp.eye(DIM)})
    updates = []
    for clients, content, slate in ((CLIENTS, CONTENT, SLATE), (small, {"bag": CONTENT["bag"][SLATE]}, None)):
        algorithm = server_encoder(mean_tower(4), encode, content, init_theta, slate=slate)
        (bucket,) = clients.buckets
        order = np.argsort(bucket.client_id)
        bucket = jax.tree.map(lambda x, order=order: x[order], bucket)
        keys = jax.vmap(lambda i: jax.random.fold_in(KEYS.client, i))(np.arange(NUM_CLIENTS))
        sent = jax.jit(jax.vmap(algorithm.client_update, in_axes=(None, None, 0, None, 0)))(shared, (), bucket, 1, keys)
        updates.append(sent.update.tables["item"].values)
    assert np.abs(updates[0]).max() > 0.1
    assert_close(*updates)


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="model has 9 items and the slate 4"):
        method(slate=SLATE)
    with pytest.raises(ValueError, match="rising item ids"):
        method(slate=np.array([2, 1]))
    with pytest.raises(ValueError, match="for one item"):
        server_encoder(MODEL, lambda theta, content: content["bag"], CONTENT, init_theta)
    with pytest.raises(ValueError, match="batch_size"):
        method(batch_size=0)
    with pytest.raises(ValueError, match=r"have \[8, 9\] rows"):
        server_encoder(MODEL, encode, CONTENT | {"other": np.zeros(8)}, init_theta)
    two = MODEL._replace(init=lambda key: Shared({"item": jnp.zeros((9, 4)), "bias": jnp.zeros((9, 1))}, {}))
    with pytest.raises(ValueError, match="tables"):
        server_encoder(two, encode, CONTENT, init_theta)
