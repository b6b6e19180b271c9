"""Risk: groups clipped apart that together exceed the one bound, or noise that a group gets at another's scale."""

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
    NUM_CLIENTS,
    PROBE,
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
from fedjax_rec.federated.rows import Rows
from fedjax_rec.federated.transforms import UNBOUNDED, Bound, chain
from fedjax_rec.models.base import Shared
from fedjax_rec.privacy.accounting import privacy_spent
from fedjax_rec.privacy.group_clip import clip_by_group_norm
from fedjax_rec.privacy.mechanisms import gaussian_noise

NORMS, WEIGHTS = {"tables": 0.5, "dense": 0.02}, {"tables": 0.8, "dense": 0.6}


@pytest.fixture(scope="module")
def adversarial_rounds():
    transforms = chain(clip_by_group_norm(NORMS, weights=WEIGHTS), gaussian_noise(1.0), PROBE)
    return make_rounds(adversaries(), transforms, SAMPLER, nothing_but_clients(), span_size=1)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(uploads=uploads, cohort=cohorts, user=users)
def test_whatever_a_client_sends(adversarial_rounds, uploads, cohort, user):
    """Add one client with any update: the sum before the noise moves by at most 1, and each group by its weight."""
    state, _ = adversarial_rounds.init(jax.random.key(0))
    sums = [pre_noise_sum(adversarial_rounds, state, uploads, mask) for mask in with_and_without(cohort, user)]
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(sums))
    moved = difference(sums)
    assert joint_norm(moved) <= 1 + 1e-5
    sent = {k: v[user].astype(np.float64) for k, v in uploads.items()}
    table = np.zeros((8, 2))
    plain = np.all(np.abs(sent["values"]) <= 3) and np.all(np.abs(sent["dense"]) <= 3)
    np.add.at(table, uploads["ids"][user], np.where(plain, sent["values"], 0))
    for group, leaf in [("tables", table[:7]), ("dense", sent["dense"])]:
        norm = joint_norm(getattr(moved, group))
        assert norm <= WEIGHTS[group] * (1 + 1e-5)
        if plain:
            np.testing.assert_allclose(
                norm, WEIGHTS[group] * min(joint_norm(leaf) / NORMS[group], 1), rtol=1e-4, atol=1e-5
            )


def test_each_group_has_noise_of_its_own_scale():
    """z C_g / w_g on group g, z C_g sqrt(G) where no weights are given; without noise, the clipped sum comes back."""
    z = 0.7
    for weights in (None, WEIGHTS):
        released, states = noise_of_a_round(chain(clip_by_group_norm(NORMS, weights=weights), gaussian_noise(z)))
        weight = (weights or {"dense": 1 / math.sqrt(2)})["dense"]
        back, stddev = NORMS["dense"] / weight, z * NORMS["dense"] / weight
        noise = np.asarray(released.dense["out"], np.float64) * 6 - np.float64(states[1].dense["out"]) * back
        assert stats.kstest(noise, "norm", args=(0, stddev)).pvalue > 1e-3
        for factor in (2 / 3, 3 / 2):
            assert stats.kstest(noise, "norm", args=(0, factor * stddev)).pvalue < 1e-6
        np.testing.assert_allclose(states[1].dense["out"], 6 * weight / math.sqrt(60_000), rtol=1e-4)


def test_the_servers_sum_is_that_of_the_clipped_updates():
    """Groups by a function, three of them; two of the same table's."""
    norms = {"item": 0.5, "bias": 4.0, "rest": 0.1}
    link = clip_by_group_norm(norms, group_of=lambda path: path[1] if path[0] == "tables" else "rest")
    rounds = make_rounds(ones(7, 2, 3), chain(link), full_participation(NUM_CLIENTS), population(), span_size=1)
    state, _, metrics = rounds.run(*rounds.init(jax.random.key(0)), keys())
    np.testing.assert_allclose(state.shared.tables["item"][1], 0.5 / math.sqrt(2), rtol=1e-5)
    np.testing.assert_allclose(state.shared.tables["bias"][1], 1.0, rtol=1e-5)  # shorter than its norm
    np.testing.assert_allclose(state.shared.dense["out"], 0.1 / math.sqrt(3), rtol=1e-5)
    assert [metrics[f"clipped/{group}"][0] for group in norms] == [1, 0, 1]
    assert metrics["update_norm/item"][0] == pytest.approx(math.sqrt(2))


def test_an_update_that_is_not_finite_in_one_group_is_none_at_all():
    client = jax.jit(lambda update: clip_by_group_norm(NORMS).client(update, (), None))
    for bad in (np.nan, np.inf, 1e30):
        update = Shared({"item": Rows(jnp.arange(2), jnp.ones((2, 2)), 7)}, {"out": jnp.array([1.0, bad])})
        clipped, metrics = client(update)
        assert metrics["nonfinite"] == 1
        assert metrics["clipped/tables"] == metrics["clipped/dense"] == 0
        assert joint_norm((clipped.tables["item"].values, clipped.dense)) == 0
    zero = Shared({"item": Rows(jnp.arange(2), jnp.zeros((2, 2)), 7)}, {"out": jnp.zeros(2)})
    clipped, metrics = client(zero)
    assert metrics["nonfinite"] == 0
    assert joint_norm((clipped.tables["item"].values, clipped.dense)) == 0


def test_one_noise_is_accounted():
    transforms = chain(clip_by_group_norm(NORMS), gaussian_noise(1.3))
    assert transforms.dp_event(UNBOUNDED, 0) == dp_accounting.GaussianDpEvent(1.3)
    assert clip_by_group_norm(NORMS).sensitivity(Bound(1.0, 0.1, noised=True)) == Bound(l2=1.0)
    spent = privacy_spent(transforms.dp_event(UNBOUNDED, 0), delta=1e-5)
    assert spent.epsilon == pytest.approx(dp_accounting.get_epsilon_gaussian(1.3, 1e-5), rel=1e-3)


def test_a_resumed_run_is_the_unbroken_one():
    resumes_bit_for_bit(chain(clip_by_group_norm(NORMS), gaussian_noise(1.0)), poisson(NUM_CLIENTS, cohort_size=3))


@pytest.mark.parametrize(
    ("norms", "options", "match"),
    [
        ({}, {}, "at least one group"),
        ({"tables": 0.0}, {}, "The clip norm of group 'tables' must be between"),
        (NORMS, {"weights": {"tables": 1.0}}, "name the same groups"),
        (NORMS, {"weights": {"tables": 0.8, "dense": 0.7}}, "their squares sum to 1"),
        (NORMS, {"weights": {"tables": 1.0, "dense": 0.0}}, "must be positive"),
    ],
)
def test_wrong_groups_are_refused(norms, options, match):
    with pytest.raises(ValueError, match=match):
        clip_by_group_norm(norms, **options)


@pytest.mark.parametrize(
    ("norms", "group_of", "match"),
    [
        ({"tables": 1.0}, None, "The leaf dense/out is in 0 of the groups"),
        ({"tables": 1.0, "item": 1.0, "dense": 1.0}, None, "The leaf tables/item is in 2 of the groups"),
        ({"all": 1.0, "none": 1.0}, lambda path: "all", "give one for each group that there is"),
    ],
)
def test_groups_that_do_not_cover_the_update_once_are_refused(norms, group_of, match):
    update = Shared({"item": Rows(jnp.arange(2), jnp.ones((2, 2)), 7)}, {"out": jnp.ones(2)})
    with pytest.raises(ValueError, match=match):
        clip_by_group_norm(norms, group_of=group_of).client(update, (), None)
