"""Risk: the clip norm's count is released beside the update at a cost that nobody pays, or the norm goes astray."""

import math

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from scipy import stats
from test_laplace import difference, noise_of_a_round, resumes_bit_for_bit
from test_noise import keys, ones, population
from test_sensitivity import (
    MILD,
    NUM_CLIENTS,
    NUM_ITEMS,
    SAMPLER,
    adversaries,
    cohorts,
    joint_norm,
    nothing_but_clients,
    pre_noise_sum,
    uploads,
    users,
    with_and_without,
)

from fedjax_rec.federated.cohort import full_participation, poisson
from fedjax_rec.federated.round import make_rounds
from fedjax_rec.federated.transforms import UNBOUNDED, Bound, UpdateTransform, Wire, chain
from fedjax_rec.models.base import Shared
from fedjax_rec.privacy import formulas
from fedjax_rec.privacy.accounting import privacy_spent
from fedjax_rec.privacy.adaptive_clip import Counted, adaptive_clip, user_level_adaptive_clip
from fedjax_rec.privacy.mechanisms import gaussian_noise

SHARE = 0.19
PROBE = UpdateTransform(
    init=lambda params: Counted(jax.tree.map(jnp.zeros_like, params), jnp.zeros(())),
    server=lambda total, *_: (total, total),
)


def link(**changes):
    options = {"target_quantile": 0.5, "cohort_size": 3, "initial_l2_clip_norm": 0.5, "count_share": SHARE}
    return adaptive_clip(**{**options, **changes})


@pytest.fixture(scope="module")
def adversarial_rounds():
    transforms = chain(link(), gaussian_noise(1.0), PROBE)
    return make_rounds(adversaries(), transforms, SAMPLER, nothing_but_clients(), span_size=1)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(uploads=uploads, cohort=cohorts, user=users, log_clip=MILD)
def test_whatever_a_client_sends(adversarial_rounds, uploads, cohort, user, log_clip):
    """Add one client with any update, at any clip norm: update and count together move by at most 1."""
    clip_norm = np.float32(10.0**log_clip)
    state, _ = adversarial_rounds.init(jax.random.key(0))
    state = state._replace(transforms=(clip_norm, *state.transforms[1:]))
    sums = [pre_noise_sum(adversarial_rounds, state, uploads, mask) for mask in with_and_without(cohort, user)]
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(sums))
    moved = difference(sums)
    assert joint_norm(moved) <= 1 + 1e-5
    assert abs(moved.within) == pytest.approx(math.sqrt(SHARE), rel=1e-5)  # a client always moves the count
    sent = {k: v[user].astype(np.float64) for k, v in uploads.items()}
    if np.all(np.abs(sent["values"]) <= 3) and np.all(np.abs(sent["dense"]) <= 3):
        table = np.zeros((NUM_ITEMS + 1, 2))
        np.add.at(table, uploads["ids"][user], sent["values"])
        norm = joint_norm((table[:NUM_ITEMS], sent["dense"]))
        expected = math.sqrt(1 - SHARE) * min(norm / clip_norm, 1)
        np.testing.assert_allclose(joint_norm(moved.update), expected, rtol=1e-4, atol=1e-5)
        if abs(norm - clip_norm) > 1e-4 * clip_norm:
            assert np.sign(moved.within) == (1 if norm < clip_norm else -1)


def test_both_noises_are_those_of_the_paper():
    """The update's by KS through the real round, at z_update C; the count's over many keys, at sigma_b."""
    z, sigma_b, clip_norm = 0.8, 1.0, 0.5
    z_update = formulas.adaptive_clipping_noise_multiplier(z, quantile_noise_std=sigma_b)
    assert z_update == pytest.approx((z**-2 - (2 * sigma_b) ** -2) ** -0.5)
    mechanism = user_level_adaptive_clip(
        noise_multiplier=z,
        target_quantile=0.5,
        cohort_size=6,
        initial_l2_clip_norm=clip_norm,
        count_noise_std=sigma_b,
    )
    released, _ = noise_of_a_round(mechanism, PROBE)
    noise = np.asarray(released.dense["out"], np.float64) * 6 - 6 * clip_norm / math.sqrt(60_003)
    assert stats.kstest(noise, "norm", args=(0, z_update * clip_norm)).pvalue > 1e-3
    for factor in (2 / 3, 3 / 2):
        assert stats.kstest(noise, "norm", args=(0, factor * z_update * clip_norm)).pvalue < 1e-6
    clips = mechanism.init(None)

    def count(key):  # read back from the norm's move: log(C' / C) = -0.2 (1/2 + count / 6 - 1/2)
        total = Counted(jnp.zeros(1), jnp.zeros(()))
        return jnp.log(mechanism.server(total, clips, key)[1][0] / clip_norm) / -0.2 * 6

    counts = jax.jit(jax.vmap(count))(jax.random.split(jax.random.key(0), 20_000))
    assert stats.kstest(counts, "norm", args=(0, sigma_b)).pvalue > 1e-3
    for factor in (2 / 3, 3 / 2):
        assert stats.kstest(counts, "norm", args=(0, factor * sigma_b)).pvalue < 1e-6


def test_one_noise_is_accounted_for_both():
    transforms = user_level_adaptive_clip(
        noise_multiplier=1.1, target_quantile=0.5, cohort_size=256, initial_l2_clip_norm=0.1
    )
    assert transforms.dp_event(UNBOUNDED, 0) == dp_accounting.GaussianDpEvent(1.1)
    together = formulas.combined_noise_multiplier(
        formulas.adaptive_clipping_noise_multiplier(1.1, quantile_noise_std=12.8), 2 * 12.8
    )
    spent = privacy_spent(transforms.dp_event(UNBOUNDED, 0), delta=1e-5)
    assert spent.epsilon == pytest.approx(dp_accounting.get_epsilon_gaussian(together, 1e-5), rel=1e-3)
    assert link().sensitivity(Bound(1.0, 0.1, noised=True)) == Bound(l2=1.0)
    assert link().upload(Wire(10), None).total == 352.0


def test_a_resumed_run_is_the_unbroken_one():
    transforms = chain(link(), gaussian_noise(1.0))
    state = resumes_bit_for_bit(transforms, poisson(NUM_CLIENTS, cohort_size=3))
    assert state.transforms[0].dtype == np.float32
    assert state.transforms[0] != 0.5  # the clip norm moved, and was part of what resumed


NORMS = np.exp(np.random.default_rng(0).normal(size=400)).astype(np.float32)


@pytest.fixture(scope="module")
def known_norms():
    """400 clients whose updates have norms that are known, and half of whom take part."""
    algorithm = ones(NUM_ITEMS, 1, 1)

    def client_update(shared, private, client, num_steps, key):
        output = algorithm.client_update(shared, private, client, num_steps, key)
        norm = jnp.asarray(NORMS)[client.client_id]
        dense = {"out": jnp.zeros(1).at[0].set(norm)}
        none = jax.tree.map(lambda rows: rows * 0, shared.tables)
        return output._replace(update=Shared(none, dense))

    def rounds(transforms):
        return make_rounds(
            algorithm._replace(client_update=client_update),
            transforms,
            poisson(400, cohort_size=200),
            population(400),
            span_size=120,
            chunk_size=64,
        )

    return rounds


@pytest.mark.parametrize("target_quantile", [0.5, 0.9])
def test_the_norm_finds_the_quantile(known_norms, target_quantile):
    """From 30 times too small, with the noise on: within a tenth of the quantile, in the share of clients below."""
    rounds = known_norms(
        user_level_adaptive_clip(
            noise_multiplier=1.0, target_quantile=target_quantile, cohort_size=200, initial_l2_clip_norm=0.03
        )
    )
    state, _, metrics = rounds.run(*rounds.init(jax.random.key(0)), keys(), 120)
    norms = np.asarray(metrics["l2_clip_norm"])
    assert norms[0] == pytest.approx(0.03)
    below = [(norm >= NORMS).mean() for norm in norms[-30:]]
    assert np.mean(below) == pytest.approx(target_quantile, abs=0.03)
    assert np.max(np.abs(np.array(below) - target_quantile)) < 0.1
    assert state.transforms[0] == pytest.approx(norms[-1], rel=0.1)


def test_updates_that_are_not_finite_count_as_zero_updates():
    client = jax.jit(lambda update: link().client(update, jnp.float32(0.5), None))
    for bad in (np.nan, np.inf, 1e30):
        counted, metrics = client({"dense": jnp.array([1.0, bad])})
        assert not np.any(counted.update["dense"])
        assert counted.within == pytest.approx(math.sqrt(SHARE))
        assert (metrics["nonfinite"], metrics["clipped"]) == (1, 0)


def test_the_norm_stays_in_range():
    far = link(learning_rate=1e3)
    for within, limit in [(1e6, 1e-12), (-1e6, 1e12)]:
        _, clip_norm = far.server(Counted(jnp.zeros(2), jnp.float32(within)), jnp.float32(0.5), None)
        assert clip_norm == pytest.approx(limit)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"target_quantile": 1.5}, "target_quantile"),
        ({"count_share": 0.0}, "count_share is of one budget"),
        ({"count_share": 1.0}, "count_share is of one budget"),
        ({"initial_l2_clip_norm": 0.0}, "initial_l2_clip_norm must be between"),
        ({"learning_rate": 0.0}, "must be positive"),
        ({"cohort_size": math.nan}, "must be positive"),
    ],
)
def test_what_is_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        link(**changes)


def test_a_count_that_costs_more_than_all_is_refused():
    with pytest.raises(ValueError, match="does not fit into 1; raise the count's noise"):
        user_level_adaptive_clip(noise_multiplier=1.0, target_quantile=0.5, cohort_size=10, initial_l2_clip_norm=0.1)
    plain = chain(link(), gaussian_noise(1.0))
    assert make_rounds(ones(7, 2, 3), plain, full_participation(6), population()).private
