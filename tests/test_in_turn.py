"""Risk: groups that take turns overlap, or a turn is charged too rarely, so that epsilon covers fewer releases."""

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, NoOpDpEvent, PoissonSampledDpEvent

from fedjax_rec.federated.cohort import in_turn, poisson
from fedjax_rec.federated.releases import check_pair, releases
from fedjax_rec.federated.transforms import UpdateTransform, chain
from fedjax_rec.privacy.events import flatten
from fedjax_rec.privacy.mechanisms import user_level_dp

NOTHING = NoOpDpEvent()
RELEASE = GaussianDpEvent(1.5)
NOISY = user_level_dp(l2_clip_norm=2.0, noise_multiplier=1.5)


def cohorts(sampler, num_rounds, seed=0):
    """bool ``[rounds, clients]``."""
    draw = jax.jit(jax.vmap(sampler.draw, in_axes=(None, 0)))
    return np.asarray(draw(jax.random.key(seed), jnp.arange(num_rounds)))


def noise_by_round(multiplier):
    return UpdateTransform(dp_event=lambda bound, index: GaussianDpEvent(multiplier(index)))


@pytest.mark.parametrize(("num_clients", "num_groups"), [(7, 3), (6, 3), (5, 5), (4, 1)])
def test_each_client_once_a_turn_in_its_fixed_round(num_clients, num_groups):
    sampler = in_turn(num_clients, num_groups=num_groups)
    drawn = cohorts(sampler, 3 * num_groups)
    np.testing.assert_array_equal(
        drawn, np.arange(num_clients) % num_groups == (np.arange(len(drawn)) % num_groups)[:, None]
    )
    np.testing.assert_array_equal(drawn, cohorts(sampler, 3 * num_groups, seed=5))  # no secret in it
    assert drawn.mean(0) == pytest.approx(sampler.sampling_prob)
    assert drawn.sum(1).mean() == pytest.approx(sampler.expected_size)


@pytest.mark.parametrize("sampling_prob", [0.3, 0.9, 1.0])
def test_never_twice_in_a_window(sampling_prob):
    num_groups, num_rounds = 4, 400
    drawn = cohorts(in_turn(30, num_groups=num_groups, sampling_prob=sampling_prob), num_rounds)
    windows = np.lib.stride_tricks.sliding_window_view(drawn, num_groups, axis=0)
    assert windows.sum(-1).max() == 1
    rounds, clients = np.nonzero(drawn)
    np.testing.assert_array_equal(rounds % num_groups, clients % num_groups)


def test_coins_are_independent_over_rounds_and_clients():
    num_clients, num_groups, prob, turns = 40, 2, 0.3, 10_000
    sampler = in_turn(num_clients, num_groups=num_groups, sampling_prob=prob)
    drawn = cohorts(sampler, turns * num_groups)
    coins = drawn.reshape(turns, num_groups, num_clients).any(1).astype(np.float64)
    noise = 5 * np.sqrt(prob * (1 - prob) / turns)
    assert np.all(np.abs(coins.mean(0) - prob) < noise)
    assert np.all(np.abs(np.corrcoef(coins.T)[np.triu_indices(num_clients, 1)]) < 5 / np.sqrt(turns))
    for client in (0, 1):  # from one turn to the next
        assert abs(np.corrcoef(coins[:-1, client], coins[1:, client])[0, 1]) < 5 / np.sqrt(turns)
    assert drawn.mean(0) == pytest.approx(sampler.sampling_prob, abs=noise)
    assert drawn.sum(1).mean() == pytest.approx(sampler.expected_size, abs=noise * np.sqrt(num_clients))
    assert sampler.expected_size == pytest.approx(6.0)
    assert np.any(drawn != cohorts(sampler, turns * num_groups, seed=1))


def test_the_event_has_the_coins_probability_and_not_that_of_a_round():
    assert in_turn(30, num_groups=3).dp_event(RELEASE) == RELEASE
    sampler = in_turn(30, num_groups=3, sampling_prob=0.4)
    assert sampler.dp_event(RELEASE) == PoissonSampledDpEvent(0.4, RELEASE)
    assert (sampler.name, sampler.relation, sampler.num_groups) == ("poisson_in_turn", "add_or_remove_one", 3)
    assert in_turn(30, num_groups=3).name == "in_turn"
    assert (sampler.expected_size, sampler.sampling_prob) == (pytest.approx(4.0), pytest.approx(0.4 / 3))


def test_one_group_is_poisson():
    turn, plain = in_turn(20, num_groups=1, sampling_prob=0.25), poisson(20, cohort_size=5)
    np.testing.assert_array_equal(cohorts(turn, 9), cohorts(plain, 9))
    assert releases(NOISY, turn, 0, 9) == releases(NOISY, plain, 0, 9)


@pytest.mark.parametrize("sampling_prob", [1.0, 0.5])
def test_a_turn_is_charged_at_its_first_round(sampling_prob):
    sampler = in_turn(9, num_groups=3, sampling_prob=sampling_prob)
    charged = sampler.dp_event(RELEASE)
    for num_rounds, turns in ((1, 1), (3, 1), (4, 2), (6, 2), (7, 3)):  # a turn begun counts whole
        assert releases(NOISY, sampler, 0, num_rounds) == ((charged, turns),)
    assert releases(NOISY, sampler, 1, 2) == ((NOTHING, 1),)  # private, and paid for
    assert releases(NOISY, sampler, 2, 3) == ((NOTHING, 1), (charged, 1))
    assert releases(NOISY, sampler, 3, 3) == ((charged, 1),)
    assert releases(NOISY, in_turn(9, num_groups=1), 0, 4) == ((RELEASE, 4),)


@pytest.mark.parametrize("sampling_prob", [1.0, 0.5])
def test_charges_cover_every_participation_however_a_run_is_cut(sampling_prob):
    """Any client's rounds so far are at most the releases charged so far, after each round, for every cut."""
    num_groups, num_rounds = 4, 15
    sampler = in_turn(9, num_groups=num_groups, sampling_prob=sampling_prob)
    took_part = np.cumsum(cohorts(sampler, num_rounds), axis=0).max(1)
    for cut in range(1, num_rounds):
        charged = [releases(NOISY, sampler, start, size) for start, size in ((0, cut), (cut, num_rounds - cut))]
        counts = [sum(count for event, count in part if event != NOTHING) for part in charged]
        assert counts[0] == -(-cut // num_groups) >= took_part[cut - 1]
        assert sum(counts) == -(-num_rounds // num_groups) >= took_part[-1]
    if sampling_prob == 1:
        assert took_part[-1] == sum(counts)  # and no release too many


def test_noise_that_changes_within_a_turn_is_refused():
    sampler = in_turn(9, num_groups=3)
    within, between = noise_by_round(lambda i: 1.0 + i // 2), noise_by_round(lambda i: 1.0 + i // 3)
    with pytest.raises(ValueError, match="turns of 3 rounds, and the noise changes within a turn, at round 2"):
        releases(within, sampler, 0, 3)
    with pytest.raises(ValueError, match=r"at round 2: .* Change the noise between turns only"):
        releases(within, sampler, 2, 1)  # also where the turn began before these rounds
    assert releases(between, sampler, 0, 5) == ((GaussianDpEvent(1.0), 1), (GaussianDpEvent(2.0), 1))
    assert releases(within, in_turn(9, num_groups=1), 0, 3) == ((GaussianDpEvent(1.0), 2), (GaussianDpEvent(2.0), 1))


def test_without_noise_nothing_is_charged():
    assert releases(chain(), in_turn(9, num_groups=3), 0, 5) == ()


def test_turns_cost_what_their_releases_cost_together():
    charged = releases(NOISY, in_turn(9, num_groups=3), 0, 12)
    composed = dp_accounting.ComposedDpEvent([dp_accounting.SelfComposedDpEvent(*entry) for entry in charged])
    ((event, count),) = flatten(composed)
    assert (event.noise_multiplier, count) == (pytest.approx(1.5 / 2), 1)  # four turns


@pytest.mark.parametrize("separation", [1, 2, 3])
def test_as_many_groups_as_the_noise_needs(separation):
    correlated = NOISY._replace(min_separation=separation)
    check_pair(correlated, in_turn(9, num_groups=3))
    if separation > 1:
        with pytest.raises(ValueError, match=rf"over {separation} rounds, .* num_groups={separation}"):
            check_pair(correlated, in_turn(9, num_groups=separation - 1))


@pytest.mark.parametrize("num_groups", [0, -1, 10, 2.5])
def test_impossible_groups_refuse(num_groups):
    with pytest.raises(ValueError, match=f"whole number from 1 to 9 clients; got {num_groups}"):
        in_turn(9, num_groups=num_groups)


@pytest.mark.parametrize("sampling_prob", [0.0, -0.1, 1.1, float("nan")])
def test_impossible_probabilities_refuse(sampling_prob):
    with pytest.raises(ValueError, match=f"above 0 and at most 1; got {sampling_prob}"):
        in_turn(9, num_groups=3, sampling_prob=sampling_prob)
