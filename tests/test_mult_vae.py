"""Risk: the autoencoder's loss is not the bound it claims, or it learns something else than who likes what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_worlds import interactions

from fedjax_rec.models.base import Shared
from fedjax_rec.models.mult_vae import (
    Posterior,
    decode,
    drop_items,
    encode,
    kl_to_standard_normal,
    mult_vae,
    mult_vae_scorer,
)
from fedjax_rec.models.rec_vae import log_prior, rec_vae, rec_vae_encode, rec_vae_scorer
from fedjax_rec.models.user_rows import dense_rows, user_rows
from fedjax_rec.models.vae_training import train_mult_vae, train_vae, vae_training

NUM_ITEMS = 11
ROWS = np.array([[1, 0, 1, 0, 0, 1, 0, 0, 0, 0, 1], [0] * 11, [0, 1] + [0] * 9], np.float32)
VARIANTS = {
    "untied": mult_vae(NUM_ITEMS, width=6, latent=4, dropout=0.0, init_stddev=0.5),
    "tied": mult_vae(NUM_ITEMS, width=6, latent=4, tied=True, dropout=0.0, init_stddev=0.5),
    "linear": mult_vae(NUM_ITEMS, width=4, latent=4, tied=True, linear=True, dropout=0.0, init_stddev=0.5),
}


def random_params(vae, seed=0):
    """Every number drawn, biases too, so that none of them can be forgotten unseen."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(vae.init, jax.random.key(0))
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


def numpy_posterior(params, row):
    row = row / max(np.linalg.norm(row), 1e-9)
    hidden = np.tanh(row @ params.tables["item"] + params.dense["encoder_bias"])
    ((weights, bias),) = params.dense["encoder"]
    out = hidden @ weights + bias
    return out[: len(out) // 2], out[len(out) // 2 :]


def numpy_logits(params, z):
    for weights, bias in params.dense["decoder"]:
        z = np.tanh(z @ weights + bias)
    table = params.tables["out"] if "out" in params.tables else params.tables["item"]
    return table @ z + params.tables["bias"][:, 0]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_loss_is_the_bound_written_out_in_numpy(name):
    """With the posterior's variance forced to 0, z is its mean: nothing is left to chance."""
    vae = VARIANTS[name]
    params = random_params(vae)
    weights, bias = params.dense["encoder"][-1]
    weights[:, vae.latent :], bias[vae.latent :] = 0.0, -30.0
    for row in ROWS:
        mean, log_variance = numpy_posterior(params, row)
        logits = numpy_logits(params, mean)
        nll = -np.sum(row * (logits - np.log(np.sum(np.exp(logits)))))
        divergence = 0.5 * np.sum(np.exp(log_variance) + mean**2 - 1 - log_variance)
        loss = vae.loss(params, params, jnp.asarray(row), jax.random.key(1), jnp.float32(0.3))
        np.testing.assert_allclose(loss.nll, nll, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(loss.divergence, divergence, rtol=1e-5)
        np.testing.assert_allclose(loss.total, nll + 0.3 * divergence, rtol=1e-5)


def test_a_batch_is_its_users_one_by_one():
    for vae, encoder in ((VARIANTS["untied"], encode), (rec_vae(NUM_ITEMS, width=6, latent=4), rec_vae_encode)):
        params = random_params(vae)
        together = encoder(params, jnp.asarray(ROWS))
        logits = decode(params, together.mean)
        for index, row in enumerate(ROWS):
            alone = encoder(params, jnp.asarray(row))
            np.testing.assert_allclose(alone.mean, together.mean[index], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(decode(params, alone.mean), logits[index], rtol=1e-5, atol=1e-6)
            assert np.all(np.isfinite(alone.mean))
            assert np.all(np.isfinite(alone.log_variance))


def test_kl_by_hand():
    """KL(N(1, 4) || N(0, 1)) = (4 + 1 - 1 - ln 4) / 2, and 0 for the prior itself."""
    posterior = Posterior(jnp.array([1.0, 0.0]), jnp.array([np.log(4.0), 0.0]))
    np.testing.assert_allclose(kl_to_standard_normal(posterior), (4 - np.log(4)) / 2, rtol=1e-6)


def test_z_has_the_posteriors_mean_and_variance():
    vae = VARIANTS["linear"]
    params = random_params(vae)
    params.tables["bias"][:] = 0.0
    row = jnp.asarray(ROWS[0])
    mean, log_variance = numpy_posterior(params, ROWS[0])
    nll = jax.vmap(lambda key: vae.loss(params, params, row, key, jnp.float32(0)).nll)
    drawn = np.asarray(nll(jax.random.split(jax.random.key(0), 4000)))
    z = np.random.default_rng(0).normal(mean, np.exp(log_variance / 2), (4000, 4))
    logits = z @ params.tables["item"].T
    expected = 4 * np.log(np.exp(logits).sum(1)) - logits @ ROWS[0]
    error = np.hypot(drawn.std(), expected.std()) / np.sqrt(4000)
    assert abs(drawn.mean() - expected.mean()) < 4 * error


def test_dropout_drops_the_stated_share_of_items():
    row = jnp.ones(20_000)
    kept = drop_items(row, 0.3, jax.random.key(0))
    assert abs(float(kept.mean()) - 0.7) < 0.015
    assert set(np.unique(kept)) == {0.0, 1.0}
    assert drop_items(row, 0.0, jax.random.key(0)) is row


def test_composite_prior_by_hand():
    z, old = np.array([0.5]), Posterior(np.array([1.0]), np.array([np.log(0.25)]))

    def density(mean, variance):
        return np.exp(-((0.5 - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)

    expected = np.log(0.15 * density(0, 1) + 0.75 * density(1, 0.25) + 0.1 * density(0, np.exp(10)))
    np.testing.assert_allclose(log_prior(jnp.asarray(z, jnp.float32), old), expected, rtol=1e-5)


def test_recvae_weighs_the_divergence_by_the_history_and_has_no_gradient_in_what_was_received():
    vae = rec_vae(NUM_ITEMS, width=4, latent=4, gamma=0.1, dropout=0.0)
    params = random_params(vae)
    row = jnp.asarray(ROWS[0])

    def total(received):
        return vae.loss(params, received, row, jax.random.key(0), jnp.float32(1)).total

    loss = vae.loss(params, params, row, jax.random.key(0), jnp.float32(1))
    np.testing.assert_allclose(loss.total, loss.nll + 0.1 * 4 * loss.divergence, rtol=1e-6)
    assert all(not np.any(g) for g in jax.tree.leaves(jax.grad(total)(params)))


# Two cliques: users of the first half of the items, users of the second; each lacks one item of its own half.

LISTS = [[i for i in range(4 * (u % 2), 4 * (u % 2) + 4) if i != 4 * (u % 2) + u // 2 % 4] for u in range(24)]
CLIQUES = interactions([*LISTS, []], num_items=8)
WITHHELD = [4 * (u % 2) + u // 2 % 4 for u in range(24)]


@pytest.mark.parametrize("name", ["mult", "rec"])
def test_the_withheld_item_ranks_first(name):
    if name == "mult":
        params = train_mult_vae(
            CLIQUES, seed=0, latent=3, width=6, tied=False, dropout=0.5, beta=0.2, batch_size=8, learning_rate=0.03
        )
        scorer = mult_vae_scorer(params, CLIQUES)
    else:
        vae = rec_vae(8, width=6, latent=6, num_layers=2, gamma=0.01)
        params = train_vae(vae, CLIQUES, key=jax.random.key(0), num_epochs=60, batch_size=8, learning_rate=0.03)
        scorer = rec_vae_scorer(params, CLIQUES)
    scores = np.array(scorer.fn(scorer.params, jnp.arange(24)))
    for user, items in enumerate(LISTS):
        scores[user, items] = -np.inf
    assert scores.argmax(1).tolist() == WITHHELD


def test_training_is_deterministic_reports_each_epoch_and_anneals():
    said = []
    args = {"num_epochs": 3, "width": 6, "latent": 3, "batch_size": 7}
    one = train_mult_vae(CLIQUES, seed=1, report=lambda *x: said.append(x[:2]), **args)
    two = train_mult_vae(CLIQUES, seed=1, **args)
    other = train_mult_vae(CLIQUES, seed=2, **args)
    same = [np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)]
    assert all(same)
    assert said == [(1, 3), (2, 3), (3, 3)]
    assert not np.array_equal(one.tables["item"], other.tables["item"])


def test_rows_past_the_last_user_are_empty_and_others_are_theirs():
    rows = dense_rows(user_rows(CLIQUES), jnp.array([3, 24, 25, 999]), 8)
    assert np.flatnonzero(rows[0]).tolist() == LISTS[3]
    assert not np.any(rows[1:])


def test_bad_settings_are_refused_with_the_value():
    with pytest.raises(ValueError, match=r"dropout must lie in \[0, 1\).*got 1.0"):
        mult_vae(5, dropout=1.0)
    with pytest.raises(ValueError, match="latent must be at least 1; got 0"):
        mult_vae(5, latent=0)
    with pytest.raises(ValueError, match="width 6 must be latent 4"):
        mult_vae(5, width=6, latent=4, linear=True)
    with pytest.raises(ValueError, match="width 6 must be latent 4"):
        rec_vae(5, width=6, latent=4, tied=True)
    with pytest.raises(ValueError, match="num_epochs=0"):
        vae_training(VARIANTS["tied"], CLIQUES, num_epochs=0)
    with pytest.raises(ValueError, match="no user with a row"):
        train_mult_vae(interactions([[], []], num_items=3), seed=0)
    assert isinstance(VARIANTS["tied"].init(jax.random.key(0)), Shared)
