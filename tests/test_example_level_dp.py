"""Risk: one interaction moves a silo's noised gradient sums by more than the clip norm, or is accounted as less."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from evaluation_worlds import make_split
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedjax_rec.algorithms.silo_dpsgd import ExampleLevelDp, clipped_sum, record_rounds, silo_dpsgd
from fedjax_rec.data.silos import Silo, draw_batch, draw_examples, equal_groups, private_of_users, silo_data
from fedjax_rec.evaluation import cases, client_scorer, evaluate
from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.transforms import chain
from fedjax_rec.models.base import Model, Shared
from fedjax_rec.models.matrix_factorization import matrix_factorization
from fedjax_rec.privacy.accounting import privacy_spent
from fedjax_rec.privacy.ledger import Ledger
from fedjax_rec.privacy.mechanisms import global_norm

NUM_ITEMS, NUM_USERS, DIM, CAPACITY = 9, 3, 2, 12
CLIP = 0.5


def full_model(num_items=NUM_ITEMS, dim=DIM) -> Model:
    """Every kind of leaf: two tables, a dense pytree, and two private leaves of different rank; squared loss."""

    def init_shared(key):
        keys = jax.random.split(key, 3)
        tables = {"item": jax.random.normal(keys[0], (num_items, dim)), "bias": jnp.zeros((num_items, 1))}
        return Shared(tables, {"out": jax.random.normal(keys[1], (dim,)), "mean": jnp.zeros(())})

    def init_private(key):
        return {"user": 0.5 * jax.random.normal(key, (dim,)), "offset": jnp.zeros(())}

    def loss(view, private, examples, key):
        del key
        scores = view.rows["item"] @ (private["user"] + view.dense["out"]) + view.rows["bias"][..., 0]
        errors = scores + private["offset"] + view.dense["mean"] - examples.labels
        return jnp.sum(examples.weights * jnp.square(errors)) / jnp.maximum(examples.weights.sum(), 1.0)

    def score(shared, private):
        return shared.tables["item"] @ (private["user"] + shared.dense["out"]) + shared.tables["bias"][:, 0]

    return Model(init_shared, init_private, loss, score)


def make_silo(item_ids, users, *, length=None, labels=None, public_size=None, capacity=CAPACITY, num_items=NUM_ITEMS):
    """A silo of the given rows, the first ``length`` of them real."""
    length = len(item_ids) if length is None else length
    labels = np.ones(len(item_ids), np.float32) if labels is None else np.asarray(labels, np.float32)

    def padded(values, fill, dtype):
        return jnp.full(capacity, fill, dtype).at[: len(values)].set(jnp.asarray(values, dtype))

    return Silo(
        client_id=jnp.int32(0),
        length=jnp.int32(length),
        item_ids=padded(item_ids, num_items, jnp.int32),
        labels=padded(labels, 0, jnp.float32),
        user_slots=padded(users, 0, jnp.int32),
        public_size=jnp.float32(len(item_ids) if public_size is None else public_size),
        weight=jnp.float32(1),
        num_items=num_items,
    )


def random_silo(seed, *, num=CAPACITY, **fields):
    rng = np.random.default_rng(seed)
    return make_silo(rng.integers(0, NUM_ITEMS, num), rng.integers(0, NUM_USERS, num), **fields)


def parameters(model, seed=0, num_users=NUM_USERS):
    shared_key, private_key = jax.random.split(jax.random.key(seed))
    return model.init_shared(shared_key), jax.vmap(model.init_private)(jax.random.split(private_key, num_users))


def algorithm(privacy, *, model=None, optimizer=None, num_users=NUM_USERS, **options):
    return silo_dpsgd(
        full_model() if model is None else model,
        privacy=privacy,
        users_per_silo=num_users,
        client_optimizer=optax.sgd(1.0) if optimizer is None else optimizer,
        **{"num_negatives": 3, "example_chunk_size": 5} | options,
    )


def tree_distance(a, b):
    return float(global_norm(jax.tree.map(jnp.subtract, a, b)))


@partial(jax.jit, static_argnames="chunk_size")
def sum_of_batch(params, silo, in_batch, key, chunk_size=5):
    mechanism = ExampleLevelDp(1.0, CLIP, 0.0).mechanism
    return clipped_sum(
        full_model(), mechanism, params, silo, in_batch, num_negatives=3, chunk_size=chunk_size, key=key
    )[0]


MAGNITUDES = st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e4, 1e18, 1e30, np.inf, np.nan])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    items=st.lists(st.integers(0, NUM_ITEMS - 1), min_size=CAPACITY, max_size=CAPACITY),
    users=st.lists(st.integers(0, NUM_USERS - 1), min_size=CAPACITY, max_size=CAPACITY),
    in_batch=st.lists(st.booleans(), min_size=CAPACITY, max_size=CAPACITY),
    one=st.integers(0, CAPACITY - 1),
    label=MAGNITUDES,
    scale=MAGNITUDES,
    seed=st.integers(0, 2**31 - 1),
)
def test_one_example_moves_the_sum_by_at_most_the_clip_norm(items, users, in_batch, one, label, scale, seed):
    shared, private = parameters(full_model(), seed % 5)
    params = jax.tree.map(lambda x: x * scale, shared), private
    silo = make_silo(items, users, labels=np.where(np.arange(CAPACITY) == one, label, 1.0))
    with_one = np.array(in_batch) | (np.arange(CAPACITY) == one)
    without = with_one & (np.arange(CAPACITY) != one)
    key = jax.random.key(seed)
    moved = tree_distance(sum_of_batch(params, silo, with_one, key), sum_of_batch(params, silo, without, key))
    assert moved <= CLIP * (1 + 1e-5)  # false for NaN too


@pytest.mark.parametrize(("label", "expected"), [(1e4, CLIP), (1e18, CLIP), (np.nan, 0.0), (np.inf, 0.0)])
def test_a_huge_example_counts_with_the_clip_norm_and_a_broken_one_with_nothing(label, expected):
    params, silo = parameters(full_model()), random_silo(0, labels=[label] + [1.0] * (CAPACITY - 1))
    everyone, key = np.ones(CAPACITY, bool), jax.random.key(0)
    whole, rest = (sum_of_batch(params, silo, batch, key) for batch in (everyone, np.arange(CAPACITY) > 0))
    moved = tree_distance(whole, rest)
    assert moved == pytest.approx(expected, abs=1e-5)
    if expected:  # rows, dense and private leaves share one norm
        change = jax.tree.map(jnp.subtract, whole, rest)
        parts = [float(global_norm(part)) for part in (change[0].tables, change[0].dense, change[1])]
        assert min(parts) > 0.01
        assert np.linalg.norm(parts) == pytest.approx(CLIP, rel=1e-4)


@pytest.mark.parametrize("label", [1.0, 1e4, 1e30, np.nan])
@pytest.mark.parametrize("seed", range(3))
def test_one_example_moves_the_real_local_step_by_at_most_the_clip_norm(label, seed):
    privacy = ExampleLevelDp(0.6, CLIP, 0.0)
    update = jax.jit(algorithm(privacy).client_update)
    shared, private = parameters(full_model(), seed)
    labels = [1.0] * (CAPACITY - 1) + [label]
    moves = []
    for step_seed in range(8):
        outputs = []
        for length in (CAPACITY, CAPACITY - 1):  # the same key: the same draws for all that both have
            silo = random_silo(seed, labels=labels, length=length, public_size=CAPACITY)
            output = update(shared, private, silo, 1, jax.random.key(step_seed))
            outputs.append((output.update, output.private))
        moves.append(0.6 * CAPACITY * tree_distance(*outputs))  # times the expected batch: the sum itself
    assert max(moves) <= CLIP * (1 + 1e-4)  # the parameters' own rounding comes on top
    if np.isfinite(label):  # 8 draws at 0.6 take the last example in (fails once in 1500 seeds; these are fixed)
        assert max(moves) > 0.01
    else:
        assert max(moves) < 1e-4


def dense_reference(model, privacy, shared, private, silo, key, optimizer, num_negatives):
    """The algorithm box, one example at a time, with gradients of whole tables."""
    params = (shared, private)
    opt_state = optimizer.init(params)
    for step in range(privacy.num_local_steps):
        batch_key, example_key, noise_key = jax.random.split(jax.random.fold_in(key, step), 3)
        total = jax.tree.map(np.zeros_like, params)
        negative_key, _ = jax.random.split(example_key)
        for place in np.flatnonzero(draw_batch(silo, privacy.sampling_prob, batch_key)):
            example = draw_examples(silo, jnp.array([place]), num_negatives=num_negatives, key=negative_key)
            ids, user = np.array(example.ids), silo.user_slots[place]

            def loss(params, ids=ids, user=user, example=example):
                rows = {name: table.at[ids].get(mode="fill") for name, table in params[0].tables.items()}
                own = jax.tree.map(lambda x: x[user], params[1])
                return model.loss(params[0]._replace(tables=rows)._replace_view(), own, example, None)

            gradient = jax.grad(loss)(params)
            norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(gradient)))
            factor = min(1.0, privacy.l2_clip_norm / norm)
            total = jax.tree.map(lambda t, g, factor=factor: t + factor * g, total, gradient)
        mean = jax.tree.map(lambda t: t / (privacy.sampling_prob * float(silo.public_size)), total)
        updates, opt_state = optimizer.update(mean, opt_state, params)
        params = optax.apply_updates(params, updates)
    return jax.tree.map(jnp.subtract, params[0], shared), params[1]
