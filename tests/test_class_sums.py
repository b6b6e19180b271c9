"""Risk: one client moves the released class sums by more than their noise is for, or the prior is not what it says."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dp_accounting import GaussianDpEvent
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import optimize, stats
from test_sensitivity import ANY, MILD, PROBE, TOLERANCE, moved

from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.transforms import chain
from fedjax_rec.models.class_sums import (
    COUNT_WEIGHT,
    MEAN_SPREAD,
    NAME_SHARE,
    ROW_SPREAD,
    DpClassSums,
    class_means,
    class_sums,
    cosine_scores,
    denoised_counts,
    dp_class_sums,
    name_space,
    prior_weight,
)
from fedjax_rec.models.labelled_vectors import LabelledVectors, clients_without_items, deal, group_rows
from fedjax_rec.privacy.ledger import Ledger
from fedjax_rec.privacy.mechanisms import clip_by_global_norm, gaussian_noise
from fedjax_rec.text.head import linear_head

CLIENTS, SLOTS, CLASSES, DIM = 5, 4, 3, 2
NAMES = np.array([[1.0, 0.0], [0.0, 1.0], [-0.6, 0.8]], np.float32)
KEYS = RoundKeys(*(jax.random.key(i) for i in range(3)))
LABELS = np.array([[0, 0, 2, 1], [1, -1, -1, -1], [-1, -1, -1, -1], [2, 2, 2, 2], [0, 1, 2, -1]], np.int32)
VECTORS = np.random.default_rng(0).normal(size=(CLIENTS, SLOTS, DIM)).astype(np.float32)
DATA = LabelledVectors(VECTORS, LABELS)


def released(noise_multiplier, **options):
    return dp_class_sums(
        DATA,
        names=NAMES,
        rows_per_client=SLOTS,
        noise_multiplier=noise_multiplier,
        noise_key=jax.random.key(7),
        **options,
    )


EXACT = released(0.0)


def test_it_is_the_sum_of_what_clients_have_beyond_half_the_names():
    """By hand: classes that repeat, empty slots, a client with nothing; each client's part has norm 1."""
    sums, counts = np.zeros((CLASSES, DIM)), np.zeros(CLASSES)
    for vectors, labels in zip(VECTORS, LABELS, strict=True):
        own, number = np.zeros((CLASSES, DIM)), np.zeros(CLASSES)
        for x, y in zip(vectors, labels, strict=True):
            if y >= 0:
                own[y] += x - 0.5 * NAMES[y]
                number[y] += 1
        norm = math.sqrt((own**2).sum() + COUNT_WEIGHT**2 * (number @ number))
        if norm:
            sums, counts = sums + own / norm, counts + number / norm
    np.testing.assert_allclose(EXACT.sums, sums, atol=1e-5)
    np.testing.assert_allclose(EXACT.counts, counts, atol=1e-5)


ROUNDS = {
    "sums": make_rounds(
        class_sums(NAMES, num_slots=SLOTS),
        chain(clip_by_global_norm(1.0), gaussian_noise(1.0), PROBE),
        full_participation(CLIENTS),
        clients_without_items(CLIENTS),
        span_size=1,
    ),
    "head": make_rounds(
        linear_head(NAMES, num_slots=SLOTS, inverse_temperature=5.0, local_steps=2),
        chain(clip_by_global_norm(1.0), gaussian_noise(1.0), PROBE),
        full_participation(CLIENTS),
        clients_without_items(CLIENTS),
        span_size=1,
    ),
}


def pre_noise(method, vectors, labels):
    state, _ = ROUNDS[method].init(jax.random.key(0))
    own = LabelledVectors(jnp.array(vectors), jnp.array(labels))
    return jax.device_get(ROUNDS[method].run(state, own, KEYS)[0].transforms[2])


@pytest.mark.parametrize("method", ROUNDS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    vectors=hnp.arrays(np.float32, (CLIENTS, SLOTS, DIM), elements=ANY | MILD, fill=MILD),
    labels=hnp.arrays(np.int32, (CLIENTS, SLOTS), elements=st.integers(-1, CLASSES - 1)),
    user=st.integers(0, CLIENTS - 1),
)
def test_with_and_without_one_client(method, vectors, labels, user):
    """Whatever it holds, the pre-noise sums of the real round move by at most 1; and for the sums by just that."""
    without = np.where(np.arange(CLIENTS)[:, None] == user, -1, labels)
    sums = [pre_noise(method, vectors, own) for own in (labels, without)]
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(sums))
    assert moved(*sums) <= 1 + TOLERANCE
    if method == "sums" and np.all(np.abs(vectors[user]) <= 3) and np.any(labels[user] >= 0):
        assert moved(*sums) > 1 - 1e-4


Z, WIDE = 0.7, np.zeros((500, 8), np.float32)


@functools.cache
def noisy():
    """Two clients with nothing: what is released is noise. Charged after another release of the same."""
    nobody = LabelledVectors(np.zeros((2, 1, 8), np.float32), np.full((2, 1), -1, np.int32))
    before = Ledger().record(GaussianDpEvent(Z), phase="class sums", released="another one")
    return dp_class_sums(
        nobody, names=WIDE, rows_per_client=1, noise_multiplier=Z, noise_key=jax.random.key(7), ledger=before
    )


def test_the_noise_is_that_of_the_claim():
    """KS on sums and counts in the units that were clipped; rejected at two thirds and three halves."""
    assert noisy().noise_stddev == Z
    for noise, most in ((np.ravel(noisy().sums), 1e-9), (COUNT_WEIGHT * noisy().counts, 1e-4)):
        p = {factor: stats.kstest(noise / (Z * factor), "norm").pvalue for factor in (1, 2 / 3, 3 / 2)}
        assert p[1] > 1e-2
        assert max(p[2 / 3], p[3 / 2]) < most


def test_epsilon_is_that_of_gaussians():
    """Balle and Wang, 2018: delta of two Gaussians, at distance sqrt(2) / z together, solved for epsilon."""
    mu, delta = math.sqrt(2) / Z, 1e-5

    def excess(epsilon):
        far, near = stats.norm.cdf(mu / 2 - epsilon / mu), stats.norm.cdf(-mu / 2 - epsilon / mu)
        return far - math.exp(epsilon) * near - delta

    spent = noisy().ledger.spent(delta)
    np.testing.assert_allclose(spent.epsilon, optimize.brentq(excess, 0.01, 50), rtol=1e-3)
    assert (spent.unit, spent.relation) == ("user", "add_or_remove_one")
    assert EXACT.ledger.spent(delta).epsilon == math.inf


def test_another_ledgers_epsilon_is_not_added_to():
    with pytest.raises(ValueError, match="do not compose"):
        released(1.0, ledger=Ledger(unit="example"))
    with pytest.raises(ValueError, match=r"count_weight must be positive and finite; got 0"):
        released(1.0, count_weight=0)
    with pytest.raises(ValueError, match=r"noise_multiplier must not be negative; got -1"):
        released(-1.0)


def test_the_weight_is_the_best_one_in_the_world_that_it_assumes():
    """Class means drawn around half their names, rows around them: half or twice the weight has a larger error."""
    rng, num_classes, dim, rows, stddev, kappa = np.random.default_rng(1), 300, 40, 9, 1.1, 0.4
    names = rng.normal(size=(num_classes, dim)) / np.sqrt(dim)
    beyond = math.sqrt(MEAN_SPREAD / dim) * rng.normal(size=names.shape)
    sampling = math.sqrt(ROW_SPREAD / dim / rows) * rng.normal(size=names.shape)
    sums = kappa * rows * (beyond + sampling) + stddev * rng.normal(size=names.shape)
    counts = np.full(num_classes, kappa * rows)
    one = DpClassSums(sums, counts, stddev, kappa, Ledger())
    weight = prior_weight(counts, noise_stddev=stddev, row_weight=kappa, dim=dim)

    def error(factor):
        means = class_means(one, names, weight=factor * weight)
        return np.square(means - NAME_SHARE * names - beyond).sum()

    assert error(1.0) < min(error(0.5), error(2.0))
    np.testing.assert_allclose(class_means(one, names), class_means(one, names, weight=weight))


def test_a_class_of_none_is_its_name():
    one = DpClassSums(np.ones((2, 3)), np.array([0.0, 4.0]), 0.0, 1.0, Ledger())
    names = np.array([[0.0, 2.0, 0.0], [4.0, 0.0, 0.0]])
    np.testing.assert_allclose(class_means(one, names), [[0, 1, 0], [2 + 1 / 6, 1 / 6, 1 / 6]])


def test_counts_lose_their_noise_towards_their_mean():
    rng = np.random.default_rng(0)
    true = rng.uniform(20, 60, 400)
    noisy = DpClassSums(None, true + 10 * rng.normal(size=400), 10 * COUNT_WEIGHT, 1.0, Ledger())
    found = denoised_counts(noisy)
    assert np.square(found - true).mean() < 0.7 * np.square(noisy.counts - true).mean()
    alike = DpClassSums(None, 30 + 10 * rng.normal(size=400), 20 * COUNT_WEIGHT, 1.0, Ledger())
    assert np.ptp(denoised_counts(alike)) < 1e-9  # all of the spread is noise


def test_coordinates_keep_what_tells_names_apart():
    rng = np.random.default_rng(0)
    names = rng.normal(size=(4, 9))
    space = name_space(names)
    assert space.basis.shape == (3, 9)
    for a, b in ((0, 1), (2, 3)):
        far = np.linalg.norm(names[a] - names[b])
        np.testing.assert_allclose(np.linalg.norm(space.names[a] - space.names[b]), far, rtol=1e-5)
    vectors = rng.normal(size=(20, 9))
    assert np.all(np.linalg.norm(space.coordinates(vectors), axis=1) <= np.linalg.norm(vectors - space.center, axis=1))
    assert cosine_scores(space.names, space.names).argmax(1).tolist() == [0, 1, 2, 3]


def test_queries_are_dealt_once():
    vectors, labels = np.arange(24.0).reshape(12, 2), np.arange(12)
    one = deal(vectors, labels, num_clients=3, per_client=3, seed=1)
    assert len(np.unique(one.labels)) == 9
    np.testing.assert_array_equal(one.vectors[..., 0], 2 * np.asarray(one.labels))
    assert not np.array_equal(one.labels, deal(vectors, labels, num_clients=3, per_client=3, seed=2).labels)
    with pytest.raises(ValueError, match="4 clients of 4 rows take 16, and there are 12"):
        deal(vectors, labels, num_clients=4, per_client=4, seed=1)
    own = group_rows(vectors, labels, np.array([2, 0, 2, 2] * 3), slots=4)
    assert own.labels.tolist() == [[1, 5, 9, -1], [-1] * 4, [0, 2, 3, 4]]
    np.testing.assert_array_equal(own.vectors[2, :, 0], [0, 4, 6, 8])


def test_a_round_of_the_head_is_a_step_down_the_mean_loss():
    """Everybody, one local step, no chain: the gradient of the mean over clients of their mean losses."""
    rounds = make_rounds(
        linear_head(NAMES, num_slots=SLOTS, inverse_temperature=2.0, client_lr=0.3),
        chain(),
        full_participation(CLIENTS),
        clients_without_items(CLIENTS),
        span_size=1,
    )
    state, _ = rounds.init(jax.random.key(0))
    after = rounds.run(state, LabelledVectors(*map(jnp.array, DATA)), KEYS)[0].shared.dense
    weights, bias = np.zeros((CLASSES, DIM)), np.zeros(CLASSES)
    for vectors, labels in zip(VECTORS.astype(np.float64), LABELS, strict=True):
        real = labels >= 0
        odds = np.exp(2.0 * vectors[real] @ NAMES.T)
        error = np.eye(CLASSES)[labels[real]] - odds / odds.sum(1, keepdims=True)
        weights += 2.0 * error.T @ vectors[real] / max(real.sum(), 1)
        bias += 2.0 * error.sum(0) / max(real.sum(), 1)
    np.testing.assert_allclose(after["weights"], NAMES + 0.3 * weights / CLIENTS, atol=1e-5)
    np.testing.assert_allclose(after["bias"], 0.3 * bias / CLIENTS, atol=1e-5)
    with pytest.raises(ValueError, match="local_steps=0"):
        linear_head(NAMES, num_slots=SLOTS, local_steps=0)
