"""Risk: PrivUnit's reports are truer than its epsilon says, are biased, or have another shape than the update."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dp_accounting import get_sigma_gaussian
from scipy import integrate, stats
from test_noise import keys, ones, population

from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.round import make_rounds
from fedjax_rec.federated.rows import Rows, to_dense
from fedjax_rec.federated.transforms import UNBOUNDED, Bound, UpdateTransform, chain
from fedjax_rec.privacy.ledger import Ledger
from fedjax_rec.privacy.local_noise import charge_local, local_epsilon, local_laplace
from fedjax_rec.privacy.mechanisms import clip_by_global_norm, gaussian_noise
from fedjax_rec.privacy.privunit import privunit, privunit_parameters

C = 2.0
NUM_NUMBERS = 7 * 2 + 7 + 3  # of the update of `ones`


def reports(epsilon, vectors, num):
    """Reports of C times each of some vectors ``[D]`` under many keys, over C, float64 ``[num, D]``."""
    link = privunit(epsilon, l2_norm=C, num_numbers=len(vectors[0]))

    @jax.jit
    @jax.vmap
    def one(update, key):
        return link.client({"x": update}, (), key)[0]["x"]

    tiled = [jnp.tile(C * jnp.asarray(v, jnp.float32), (num, 1)) for v in vectors]
    return [np.asarray(one(x, jax.random.split(jax.random.key(i), num)), np.float64) / C for i, x in enumerate(tiled)]


def cdf(chosen, x):
    """Of the report's component along v, written down from the definition: a normal whose two sides are reweighted."""
    a, t, q, p = x * chosen.scale, chosen.threshold, chosen.tail_prob, chosen.top_prob
    below = (1 - p) / (1 - q) * stats.norm.cdf(np.minimum(a, t))
    return below + p / q * (stats.norm.cdf(np.maximum(a, t)) - stats.norm.cdf(t))


def density(chosen, a):
    """Of the same, before the division by m: a normal density times p / q or (1 - p) / (1 - q)."""
    t, q, p = chosen.threshold, chosen.tail_prob, chosen.top_prob
    return stats.norm.pdf(a) * np.where(a >= t, p / q, (1 - p) / (1 - q))


# The smallest case: one number, a circle. The report along v is the report itself if |x| = C.


@pytest.fixture(scope="module", params=[1.0, 6.0])
def on_a_circle(request):
    epsilon = request.param
    return privunit_parameters(epsilon, dim=2), reports(epsilon, ([1.0], [-1.0], [0.0]), 60_000)


def test_a_report_has_the_stated_distribution(on_a_circle):
    """By KS; with another threshold, or another probability of its side, it is another one."""
    chosen, (plus, minus, across) = on_a_circle
    assert stats.kstest(plus[:, 0], lambda x: cdf(chosen, x)).pvalue > 1e-3
    assert stats.kstest(-minus[:, 0], lambda x: cdf(chosen, x)).pvalue > 1e-3
    assert stats.kstest(across[:, 0], "norm", args=(0, 1 / chosen.scale)).pvalue > 1e-3
    for factor in (2 / 3, 3 / 2):
        wrong = chosen._replace(scale=factor * chosen.scale)
        assert stats.kstest(plus[:, 0], lambda x, wrong=wrong: cdf(wrong, x)).pvalue < 1e-6
    wrong = chosen._replace(top_prob=0.95 * chosen.top_prob)
    assert stats.kstest(plus[:, 0], lambda x: cdf(wrong, x)).pvalue < 1e-6


def test_the_density_ratio_is_the_epsilon(on_a_circle):
    """Of opposite vectors, which are the farthest apart: never more, and that much on a side of its own."""
    chosen, (plus, minus, _) = on_a_circle
    grid = np.linspace(-6, 6, 4001) + 1e-9  # on no edge
    ratio = np.log(density(chosen, grid) / density(chosen, -grid))
    assert np.abs(ratio).max() == pytest.approx(chosen.epsilon, rel=1e-6)
    side = chosen.threshold / chosen.scale  # what was drawn, not what was written down
    counts = [np.sum(x[:, 0] >= side) for x in (plus, minus)]
    noise = 4 * np.sqrt(sum(1 / n for n in counts))
    assert abs(np.log(counts[0] / counts[1]) - chosen.epsilon) < noise
    assert noise < 1.3


def test_the_written_density_is_one_with_the_stated_mean(on_a_circle):
    chosen, _ = on_a_circle
    how = {"a": -9, "b": 9, "points": [chosen.threshold]}
    total = integrate.quad(lambda a: density(chosen, a), **how)[0]
    mean = integrate.quad(lambda a: a * density(chosen, a), **how)[0]
    assert (total, mean) == (pytest.approx(1), pytest.approx(chosen.scale))
    np.testing.assert_allclose(
        cdf(chosen, 2 / chosen.scale), integrate.quad(lambda a: density(chosen, a), -9, 2, points=[chosen.threshold])[0]
    )


# Longer vectors.


def test_reports_are_unbiased_with_the_stated_error_and_beat_gaussian_noise():
    dim, num, epsilon = 20, 40_000, 4.0
    rng = np.random.default_rng(0)
    unit = rng.normal(size=dim) / np.sqrt(dim)
    vectors = [0.99 * unit / np.linalg.norm(unit), 0.3 * unit, np.zeros(dim)]
    chosen = privunit_parameters(epsilon, dim=dim + 1)
    gaussian = dim * (2 * get_sigma_gaussian(epsilon, 1e-6)) ** 2  # and that even has a delta
    for vector, found in zip(vectors, reports(epsilon, vectors, num), strict=True):
        error = np.square(found - vector).sum(1).mean()
        spread = np.sqrt(error / dim / num)
        assert np.all(np.abs(found.mean(0) - vector) < 4.5 * spread)
        last = 1 - np.square(vector).sum()  # what the embedding's own number takes of the error
        expected = chosen.squared_error
        expected -= (1 + last * chosen.threshold * chosen.scale) / chosen.scale**2 - last
        assert error == pytest.approx(expected, rel=0.02)
        assert error < 0.2 * gaussian


@pytest.mark.parametrize("dim", [2, 30, 100_000])
@pytest.mark.parametrize("epsilon", [0.01, 1.0, 8.0, 30.0])
def test_the_parameters_keep_the_epsilon_and_are_the_best(epsilon, dim):
    chosen = privunit_parameters(epsilon, dim=dim)
    assert epsilon * (1 - 1e-4) < chosen.epsilon <= epsilon * (1 + 1e-12)
    assert chosen.tail_prob == pytest.approx(stats.norm.sf(chosen.threshold), rel=1e-12)
    r = math.exp(epsilon)
    t = np.linspace(-2, 9, 3000)
    scale = stats.norm.pdf(t) * (r - 1) / (1 + (r - 1) * stats.norm.sf(t))
    assert chosen.squared_error <= np.min((dim + t * scale) / scale**2 - 1) * (1 + 1e-3)


def test_rare_tails_are_drawn_finely():
    """Where float32 near 1 has few numbers, the component above the threshold is still a normal one's."""
    chosen = privunit_parameters(30.0, dim=2)
    (found,) = reports(30.0, ([1.0],), 20_000)
    top = found[found[:, 0] >= chosen.threshold / chosen.scale, 0]
    assert len(np.unique(top)) > 0.9 * len(top)
    assert stats.kstest(found[:, 0], lambda x: cdf(chosen, x)).pvalue > 1e-3


# Through the real round.


@pytest.fixture(scope="module")
def rounds():
    links = chain(clip_by_global_norm(C), privunit(25.0, l2_norm=C, num_numbers=NUM_NUMBERS))
    return make_rounds(ones(7, 2, 3), links, full_participation(6, relation="replace_one"), population(6), span_size=40)


def test_the_round_sums_reports_of_the_whole_update(rounds):
    """Tables and dense leaf: six equal clients a round, thirty rounds, each a new report."""
    state, private = rounds.init(jax.random.key(0))
    found = []
    for _ in range(30):
        state, private, _ = rounds.run(state, private, keys())
        found.append(np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.shared)]))
    sent = np.concatenate([np.ravel(x) for x in jax.tree.leaves(to_dense(_sent()))])
    error = privunit_parameters(25.0, dim=NUM_NUMBERS + 1).squared_error * C**2 / NUM_NUMBERS
    assert np.all(np.abs(np.mean(found, 0) - sent) < 4.5 * np.sqrt(error / 6 / 30))
    assert len(np.unique(np.concatenate(found))) == 30 * NUM_NUMBERS  # no number twice, over rounds and entries
    assert rounds.upload_bits == 32 * NUM_NUMBERS


def _sent():
    value = C / np.sqrt(2 + 1 + 3)
    row = jnp.ones(1, jnp.int32)
    tables = {"item": Rows(row, jnp.full((1, 2), value), 7), "bias": Rows(row, jnp.full((1, 1), value), 7)}
    method = ones(7, 2, 3)
    return method.init(jax.random.key(0)).shared._replace(tables=tables, dense={"out": jnp.full(3, value)})


def test_a_resumed_round_has_the_same_report(rounds):
    whole, _, _ = rounds.run(*rounds.init(jax.random.key(0)), keys(), 2)
    state, private, _ = rounds.run(*rounds.init(jax.random.key(0)), keys(), 1)
    again, _, _ = rounds.run(state, private, keys(), 1)
    for a, b in zip(jax.tree.leaves(whole.shared), jax.tree.leaves(again.shared), strict=True):
        np.testing.assert_array_equal(a, b)


def test_rounds_are_charged_one_by_one(rounds):
    ledger = Ledger(relation="replace_one", trust_model="local")
    spent = charge_local(ledger, rounds, first_round=0, num_rounds=3).spent(1e-12)
    assert spent.epsilon == pytest.approx(75, rel=1e-3)
    ((event, count),) = rounds.local_releases(0, 3)
    assert (local_epsilon(event), count) == (pytest.approx(25, rel=1e-6), 3)


def test_a_vector_out_of_the_ball_is_still_private():
    """The norm on the sphere is forced, so a wrong bound costs accuracy only: the report is that of the unit vector."""
    chosen = privunit_parameters(1.0, dim=2)
    (found,) = reports(1.0, ([50.0],), 60_000)
    assert stats.kstest(found[:, 0], lambda x: cdf(chosen, x)).pvalue > 1e-3


# What it composes with, and what it refuses.


def test_central_noise_needs_a_second_clip():
    link = privunit(4.0, l2_norm=1.0, num_numbers=NUM_NUMBERS)
    assert link.sensitivity(Bound(1.0, 1.0)) == Bound(noised=True)
    with pytest.raises(ValueError, match="bounds the update"):
        chain(clip_by_global_norm(1.0), link, gaussian_noise(1.0))
    twice = chain(clip_by_global_norm(1.0), link, clip_by_global_norm(3.0), gaussian_noise(6.0))
    assert twice.dp_event(UNBOUNDED, 0).noise_multiplier == 2.0
    assert local_epsilon(twice.local_dp_event(UNBOUNDED, 0)) == pytest.approx(4.0, rel=1e-6)


def test_chains_without_a_meaning_refuse():
    link = privunit(4.0, l2_norm=1.0, num_numbers=NUM_NUMBERS)
    in_l1 = UpdateTransform(sensitivity=lambda bound: Bound(1.0, 1.0))  # declares a norm
    for links, words in (
        ([link], "bounds the L2 norm by 1"),
        ([clip_by_global_norm(2.0), link], "bounds the L2 norm by 1, and got a bound of 2"),
        ([in_l1, local_laplace(1.0), link], "bounds the L2 norm by 1"),
        ([clip_by_global_norm(1.0), link, clip_by_global_norm(1.0), link], "2 links"),
    ):
        with pytest.raises(ValueError, match=words):
            chain(*links)


def test_numbers_and_updates_out_of_range_refuse():
    for bad in (0.0, -1.0, math.nan, 31.0):
        with pytest.raises(ValueError, match="above 0 and at most 30; got"):
            privunit(bad, l2_norm=1.0, num_numbers=5)
    with pytest.raises(ValueError, match="must be positive; got 0"):
        privunit(1.0, l2_norm=0.0, num_numbers=5)
    with pytest.raises(ValueError, match="at least 2 numbers; got 1"):
        privunit_parameters(1.0, dim=1)
    with pytest.raises(ValueError, match="coins of 32 bits"):
        privunit(1e-13, l2_norm=1.0, num_numbers=5)
    sampler = full_participation(6, relation="replace_one")
    for options, words in (
        ({"num_numbers": 9}, "whole update has 24 numbers, and privunit was made for 9"),
        ({"num_numbers": 24, "max_update_bytes": 95}, "96 bytes, above the limit of 95"),
    ):
        links = chain(clip_by_global_norm(1.0), privunit(1.0, l2_norm=1.0, **options))
        with pytest.raises(ValueError, match=words):
            make_rounds(ones(7, 2, 3), links, sampler, population(6))
