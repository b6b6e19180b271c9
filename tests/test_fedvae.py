"""Risk: rounds of an autoencoder are not gradient descent on its loss, or one user moves them by more than the clip."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from evaluation_worlds import make_split
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
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

from fedjax_rec.algorithms.fedvae import fedvae, fedvae_score, own_row, vae_params
from fedjax_rec.data.clients import client_data
from fedjax_rec.federated.algorithm import client_key
from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.transforms import chain
from fedjax_rec.models.base import Shared
from fedjax_rec.models.mult_vae import decode, mult_vae
from fedjax_rec.privacy.mechanisms import clip_by_global_norm
from fedjax_rec.privacy.schedule import scheduled_gaussian

NUM_ITEMS, LR = 9, 0.1
LISTS = [[0, 3, 4], [], [8], [1, 2, 5, 6, 7], [4, 0], [3]]
CLIENTS = client_data(make_split(LISTS, [[] for _ in LISTS], num_items=NUM_ITEMS), num_buckets=1)
VAE = mult_vae(NUM_ITEMS, width=4, latent=4, tied=True, linear=True, dropout=0.5, init_stddev=0.5)
KEYS = RoundKeys(*(jax.random.key(i) for i in range(3)))


def trained(chunk_size, num_rounds=1, **settings):
    algorithm = fedvae(VAE, server_optimizer=optax.sgd(LR), **settings)
    rounds = make_rounds(
        algorithm, chain(), full_participation(NUM_CLIENTS), CLIENTS, span_size=3, chunk_size=chunk_size
    )
    before = rounds.init(jax.random.key(0))[0].shared
    return before, *rounds.run(*rounds.init(jax.random.key(0)), KEYS, num_rounds)


def test_a_round_of_everybody_is_a_gradient_step_on_all_rows():
    """Each client with its own key for dropout and z; annealing gives the first round no divergence."""
    before, state, private, metrics = trained(4, beta=0.7, anneal_rounds=2)

    def mean_loss(params, beta):
        losses = []
        for user, items in enumerate(LISTS):
            row = np.zeros(NUM_ITEMS, np.float32)
            row[items] = 1.0
            key, _ = jax.random.split(client_key(jax.random.fold_in(KEYS.client, 0), user))
            losses.append(VAE.loss(params, params, jnp.asarray(row), jax.random.fold_in(key, 0), beta).total)
        return sum(losses) / NUM_CLIENTS

    params = vae_params(before)
    loss, gradient = jax.jit(jax.value_and_grad(mean_loss))(params, jnp.float32(0))
    expected = jax.tree.map(lambda w, g: w - LR * g, params, gradient)
    for a, b in zip(jax.tree.leaves(vae_params(state.shared)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"][0], loss, rtol=1e-5)
    assert before.dense["beta"] == 0
    assert np.isclose(state.shared.dense["beta"], 0.35)
    own = {"mean": private["mean"][3]}
    np.testing.assert_array_equal(fedvae_score(state.shared, own), decode(vae_params(state.shared), own["mean"]))


def test_chunks_and_several_local_steps():
    _, one, _, _ = trained(1, 3, local_steps=2, client_lr=0.05)
    _, other, _, _ = trained(64, 3, local_steps=2, client_lr=0.05)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_clients_row_is_what_it_touched():
    rows = jax.vmap(own_row)(jax.tree.map(jnp.asarray, CLIENTS.buckets[0]))
    for user, row in zip(CLIENTS.buckets[0].client_id, rows, strict=True):
        assert np.flatnonzero(row).tolist() == sorted(LISTS[user])


# One user, with and without, through the real round.

STDDEV = 0.3
PRIVATE = make_rounds(
    fedvae(VAE),
    chain(clip_by_global_norm(CLIP), scheduled_gaussian([STDDEV, 2 * STDDEV]), PROBE),
    SAMPLER,
    CLIENTS,
    span_size=1,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    items=hnp.arrays(np.float32, (NUM_ITEMS, 4), elements=MILD | st.sampled_from([0.0, 1e3, 1e18, 1e30]), fill=MILD),
    cohort=cohorts,
    user=users,
    seed=st.integers(0, 1000),
)
def test_with_and_without_one_user(items, cohort, user, seed):
    state, private = PRIVATE.init(jax.random.key(0))
    shared = state.shared
    state = state._replace(shared=Shared(shared.tables | {"item": items}, shared.dense))
    sums = [pre_noise_sum(PRIVATE, state, private, mask, seed) for mask in with_and_without(cohort, user)]
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(sums))
    assert moved(*sums) <= CLIP * (1 + TOLERANCE)
    if np.all(np.abs(items) <= 3) and LISTS[user]:
        assert moved(*sums) > 0.9 * CLIP  # the bound is reached, or it was not tested


def test_the_noise_is_the_schedules_and_another_in_each_round():
    """What the server steps by, less the sum before noise: over tables and dense leaves of many seeds."""
    found = {0: [], 1: []}
    for seed in range(12):
        state, private = PRIVATE.init(jax.random.key(0))
        keys = RoundKeys(KEYS.cohort, KEYS.client, jax.random.key(100 + seed))
        for round_index in (0, 1):
            before = jax.tree.map(np.asarray, state.opt_state[0].mu)
            state, private, _ = PRIVATE.run(state, private, keys)
            # Adam's first moment, mu' = 0.9 mu + 0.1 g, gives back the aggregate that the server saw.
            seen = jax.tree.map(lambda new, old: -(new - 0.9 * old) * 10, state.opt_state[0].mu, before)
            total = vae_params(state.transforms[2])
            noise = jax.tree.map(lambda x, t: x * SAMPLER.expected_size - t, seen, total)
            found[round_index].append(np.concatenate([np.ravel(x) for x in jax.tree.leaves(noise)]))
    for round_index, stddev in ((0, STDDEV), (1, 2 * STDDEV)):
        noise = np.concatenate(found[round_index])
        assert stats.kstest(noise, "norm", args=(0, stddev)).pvalue > 1e-3
        for wrong in (2 / 3, 3 / 2):
            assert stats.kstest(noise, "norm", args=(0, wrong * stddev)).pvalue < 1e-6
    assert abs(np.corrcoef(found[0][0], found[1][0])[0, 1]) < 0.4


def test_bad_settings_are_refused_with_the_value():
    with pytest.raises(ValueError, match="local_steps=0"):
        fedvae(VAE, local_steps=0)
    with pytest.raises(ValueError, match="client_lr=0"):
        fedvae(VAE, client_lr=0)
    with pytest.raises(ValueError, match=r"beta=-1"):
        fedvae(VAE, beta=-1)
