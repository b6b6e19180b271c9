"""Risk: rounds of a sequence model are no descent on its loss, depend on the chunk, or obey one user too much."""

from functools import cache

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
    CHAIN,
    CLIP,
    MILD,
    NUM_CLIENTS,
    SAMPLER,
    TOLERANCE,
    cohorts,
    moved,
    pre_noise_sum,
    users,
    with_and_without,
)

from fedjax_rec.algorithms.fedsequence import fedsequence, fedsequence_score
from fedjax_rec.data.clients import client_data
from fedjax_rec.federated.algorithm import client_key
from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.transforms import chain
from fedjax_rec.models.items import id_table
from fedjax_rec.models.sasrec import sasrec

NUM_ITEMS, DIM, LR = 9, 4, 0.1
LISTS = [[0, 3, 4], [], [8], [1, 2, 5, 6, 7], [4, 0], [3, 8, 1, 0]]
WITH_TARGETS = [0, 3, 4, 5]
CLIENTS = client_data(make_split(LISTS, [[] for _ in LISTS], num_items=NUM_ITEMS), num_buckets=1)
MODEL = sasrec(id_table(NUM_ITEMS, dim=DIM, init_stddev=0.5), max_length=4, num_blocks=1, dropout=0.2)


def keys():
    return RoundKeys(*(jax.random.key(i) for i in range(3)))


@cache
def two_rounds(chunk_size):
    """Parameters at the start, private ones after the first round, metrics of it, and parameters after each."""
    rounds = make_rounds(
        fedsequence(MODEL, server_optimizer=optax.sgd(LR)),
        chain(),
        full_participation(NUM_CLIENTS),
        CLIENTS,
        span_size=1,
        chunk_size=chunk_size,
    )
    state, private = rounds.init(jax.random.key(0))
    before = jax.device_get(state.shared)
    state, private, metrics = rounds.run(state, private, keys())
    first, queries = jax.device_get((state.shared, private["query"]))
    state, _, _ = rounds.run(state, private, keys())
    return before, queries, metrics, first, jax.device_get(state.shared)


def test_a_round_of_everybody_is_a_gradient_step_on_all_histories():
    """Each client with its own key for dropout; who has nothing to predict adds nothing."""
    before, queries, metrics, first, _ = two_rounds(4)
    histories = np.full((NUM_CLIENTS, 5), NUM_ITEMS, np.int32)
    for user, items in enumerate(LISTS):
        histories[user, : len(items)] = items

    @jax.jit
    def expected(params, key):
        def own_loss(params, user, history):
            training_key, _ = jax.random.split(client_key(jax.random.fold_in(key, 0), user))
            return MODEL.loss(params, history, jax.random.fold_in(training_key, 0))

        def mean_loss(params):
            losses = jax.vmap(own_loss, in_axes=(None, 0, 0))(params, jnp.arange(NUM_CLIENTS), histories)
            return losses.mean(), losses

        (loss, losses), gradient = jax.value_and_grad(mean_loss, has_aux=True)(params)
        asked = jax.vmap(lambda history: MODEL.query(params, history, None))(histories)
        return loss, losses, jax.tree.map(lambda w, g: w - LR * g, params, gradient), asked

    loss, losses, after, asked = expected(before, keys().client)
    assert np.flatnonzero(losses).tolist() == WITH_TARGETS
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"][0], loss, rtol=1e-5)
    np.testing.assert_allclose(queries, asked, rtol=1e-5, atol=1e-6)
    scores = fedsequence_score(MODEL)(first, {"query": queries[3]})
    np.testing.assert_allclose(scores, first.tables["item"] @ queries[3], rtol=1e-5, atol=1e-6)


def test_chunks_change_nothing():
    before, one = two_rounds(1)[0], two_rounds(1)[-1]
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two_rounds(4)[-1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert np.abs(one.tables["item"] - before.tables["item"]).max() > 1e-3


# One user, with and without, through the real round.

PLAIN = sasrec(id_table(NUM_ITEMS, dim=DIM, init_stddev=0.5), max_length=4, num_blocks=1, dropout=0.0)
PRIVATE = make_rounds(fedsequence(PLAIN, local_steps=2, client_lr=5.0), CHAIN, SAMPLER, CLIENTS, span_size=1)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    items=hnp.arrays(np.float32, (NUM_ITEMS, DIM), elements=MILD | st.sampled_from([0.0, 1e3, 1e18, 1e30]), fill=MILD),
    cohort=cohorts,
    user=users,
    seed=st.integers(0, 1000),
)
def test_with_and_without_one_user(items, cohort, user, seed):
    state, private = PRIVATE.init(jax.random.key(0))
    state = state._replace(shared=state.shared._replace(tables={"item": items}))
    sums = [pre_noise_sum(PRIVATE, state, private, mask, seed) for mask in with_and_without(cohort, user)]
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(sums))
    assert moved(*sums) <= CLIP * (1 + TOLERANCE)


def test_the_bound_is_reached_by_who_has_targets():
    state, private = PRIVATE.init(jax.random.key(0))
    for user in range(NUM_CLIENTS):
        sums = [pre_noise_sum(PRIVATE, state, private, mask) for mask in with_and_without(np.ones(6, bool), user)]
        assert moved(*sums) > 0.9 * CLIP if user in WITH_TARGETS else moved(*sums) < 1e-6


def test_bad_settings_are_refused_with_the_value():
    with pytest.raises(ValueError, match="local_steps=0"):
        fedsequence(MODEL, local_steps=0)
    with pytest.raises(ValueError, match="client_lr=0"):
        fedsequence(MODEL, client_lr=0)
