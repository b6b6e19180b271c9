"""Risk: the sum's noise is of another law than the event's, or fewer shares of it are in the sum than were planned."""

import math

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dp_accounting.rdp import compute_epsilon
from dp_accounting.rdp.rdp_privacy_accountant import DEFAULT_RDP_ORDERS
from hypothesis import given, settings
from scipy import stats
from test_laplace import l1_norm
from test_noise import ones, population
from test_sensitivity import (
    CLIP,
    DIM,
    NUM_CLIENTS,
    NUM_ITEMS,
    adversaries,
    joint_norm,
    nothing_but_clients,
    pre_noise_sum,
    uploads,
    users,
)

from fedjax_rec.federated.cohort import fixed_size, full_participation, in_turn, poisson
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.transforms import UNBOUNDED, Bound, UpdateTransform, chain, scale
from fedjax_rec.privacy.accounting import privacy_spent
from fedjax_rec.privacy.discrete import rounded_norm_bound
from fedjax_rec.privacy.mechanisms import clip_by_global_norm
from fedjax_rec.privacy.skellam import SkellamDpEvent
from fedjax_rec.security.distributed import discrete_gaussian_shares, skellam_shares, without_colluders
from fedjax_rec.security.ring import fixed_point, ring_sum
from fedjax_rec.security.simulated import simulated_secure_sum

REPORTING = full_participation(NUM_CLIENTS, relation="replace_one")
WHOLE = NUM_ITEMS * DIM + 3
CLIPPED = chain(
    clip_by_global_norm(CLIP), fixed_point(largest=100.0, max_clients=NUM_CLIENTS, bits=12, num_numbers=5 * DIM + 3)
)
BOUND = CLIPPED.sensitivity(UNBOUNDED)


def secure(min_clients, dropout_prob=0.0):
    return simulated_secure_sum(min_clients=min_clients, degree=6, threshold=2, dropout_prob=dropout_prob)


def recorder(size):
    """Keeps what the server has added up, in steps of the grid."""

    def server(total, prepared, key):
        return total, jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(total)])

    return UpdateTransform(init=lambda params: jnp.zeros(size), server=server)


# The law of the noise, through the round: updates are zero, so the sum is its noise.

MANY = 40_000
SURVIVORS = 4
NOISES = {
    "Skellam": (3.0, lambda std: skellam_shares(std, min_clients=SURVIVORS)),
    "discrete Gaussian": (
        3.0,
        lambda std: discrete_gaussian_shares(std, min_clients=SURVIVORS, num_numbers=MANY + 21),
    ),
}
PMF = {
    "Skellam": lambda k, std: stats.skellam.pmf(k, std**2 / 2, std**2 / 2),
    "discrete Gaussian": lambda k, std: np.exp(-(k**2) / (2 * std**2)) / (std * math.sqrt(2 * math.pi)),
}


@pytest.fixture(scope="module", params=NOISES)
def noisy_sums(request):
    """Sums of rounds with three to six survivors of six, in which nobody sends anything but noise."""
    stddev, make = NOISES[request.param]
    links = chain(
        clip_by_global_norm(1e-9),  # ones become less than a step, and are rounded to zero
        fixed_point(largest=1.0, max_clients=6, rounding="nearest", num_numbers=MANY + 3),
        make(stddev),
        recorder(MANY + 21),
        secure(SURVIVORS, dropout_prob=0.25),
    )
    sampler = full_participation(6, relation="replace_one")
    rounds = make_rounds(ones(7, 2, MANY), links, sampler, population(num_clients=6), span_size=1)
    found = {}
    for seed in range(40):
        run_keys = RoundKeys(jax.random.key(0), jax.random.key(seed), jax.random.key(1))
        state, _, metrics = rounds.run(*rounds.init(jax.random.key(0)), run_keys)
        survivors = int(metrics["survivors"][0])
        found[survivors] = np.asarray(state.transforms[3]), metrics["secure_sum_refused"][0]
        if {3, 4, 6} <= set(found):
            return request.param, stddev, found
    raise AssertionError(f"Only {set(found)} survivors in 40 rounds.")


def distance(name, numbers, stddev):
    """p value of Kolmogorov and Smirnov's distance; for integers it is too large, never too small."""
    k = np.arange(-200, 201)
    law, seen = np.cumsum(PMF[name](k, stddev)), np.searchsorted(np.sort(numbers), k, side="right") / len(numbers)
    return stats.kstwobign.sf(np.sqrt(len(numbers)) * np.abs(law - seen).max())


def test_the_sum_carries_the_noise_of_its_event(noisy_sums):
    """Exactly so many survivors as planned: all numbers, tables' untouched rows among them; 2/3 and 3/2 are refused."""
    name, stddev, found = noisy_sums
    total, refused = found[SURVIVORS]
    assert not refused
    assert np.array_equal(total, np.trunc(total))
    assert abs(total.var(dtype=np.float64) / stddev**2 - 1) < 0.02
    assert abs(total.mean(dtype=np.float64)) < 4 * stddev / math.sqrt(total.size)
    assert distance(name, total, stddev) > 1e-3
    assert max(distance(name, total, stddev * factor) for factor in (2 / 3, 3 / 2)) < 1e-6
    assert np.count_nonzero(total[:21]) > 12  # seven rows of a table of two and one of one column; one row was touched


def test_more_survivors_bring_more_noise_and_fewer_no_sum(noisy_sums):
    name, stddev, found = noisy_sums
    del name
    total, refused = found[6]
    assert not refused
    assert abs(total.var(dtype=np.float64) / (stddev**2 * 6 / SURVIVORS) - 1) < 0.02
    total, refused = found[3]
    assert refused
    assert not total.any()


# What one client moves, through the round: all clients' noise is the same in both, and goes out of the difference.


@pytest.fixture(scope="module")
def adversarial_rounds():
    links = chain(CLIPPED, skellam_shares(20.0, min_clients=NUM_CLIENTS), recorder(WHOLE), secure(NUM_CLIENTS))
    return make_rounds(adversaries(), links, REPORTING, nothing_but_clients(), span_size=3)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(sent=uploads, user=users)
def test_whatever_a_client_sends(adversarial_rounds, sent, user):
    """Any data of one client against none of it: integers within the bound. Two data sets are within twice that."""
    state, _ = adversarial_rounds.init(jax.random.key(0))
    nothing = {k: np.where((np.arange(6) == user).reshape(-1, *[1] * (v.ndim - 1)), 0, v) for k, v in sent.items()}
    sums = [pre_noise_sum(adversarial_rounds, state, p, np.ones(6, bool)) for p in (sent, nothing)]
    moved = sums[0].astype(np.float64) - sums[1]
    assert np.array_equal(moved, np.trunc(moved))
    assert joint_norm(moved) <= BOUND.l2
    assert l1_norm(moved) <= BOUND.l1
    assert np.abs(sums[0]).max() > 20  # there is noise


def test_a_resumed_run_is_the_unbroken_one(adversarial_rounds):
    """Three rounds at once, and one and two more: every bit the same, and other noise in every round."""
    nothing = {"ids": np.zeros((6, 5), np.int32), "values": np.zeros((6, 5, DIM)), "dense": np.zeros((6, 3))}
    keys = RoundKeys(*(jax.random.key(seed) for seed in range(3)))

    def run(start, num_rounds):
        state, private, _ = adversarial_rounds.run(*jax.tree.map(jnp.asarray, start), keys, num_rounds)
        return jax.device_get((state, private))

    start = adversarial_rounds.init(jax.random.key(0))[0], jax.tree.map(jnp.float32, nothing) | {"ids": nothing["ids"]}
    start = jax.device_get(start)
    parts = [run(start, 1), run(start, 2), run(start, 3)]
    jax.tree.map(np.testing.assert_array_equal, parts[2], run(parts[0], 2))
    noises = [state.transforms[2] for state, _ in parts]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert np.mean(noises[a] == noises[b]) < 0.4


# The event.


def test_events_by_hand():
    event = chain(CLIPPED, skellam_shares(20.0, min_clients=4), secure(4)).dp_event(UNBOUNDED, 0)
    assert event == SkellamDpEvent(20.0, BOUND.l1, BOUND.l2)
    gaussian = discrete_gaussian_shares(20.0, min_clients=4, num_numbers=WHOLE).dp_event(BOUND, 0)
    assert gaussian == dp_accounting.ZCDpEvent(rho=pytest.approx(BOUND.l2**2 / 800))
    # Shares of half a step: 10 (exp(-pi^2 / 4) + exp(-pi^2 / 3)) is tau of three shares, and it matters.
    tau = 10 * (math.exp(-(math.pi**2) / 4) + math.exp(-(math.pi**2) / 3))
    small = discrete_gaussian_shares(math.sqrt(3) / 2, min_clients=3, num_numbers=100).dp_event(BOUND, 0)
    ratio = BOUND.l2 / (math.sqrt(3) / 2)
    epsilon = min(math.sqrt(ratio**2 + 200 * tau), ratio + 10 * tau)
    assert small.rho == pytest.approx(epsilon**2 / 2)


@pytest.mark.parametrize(("bits", "ratio", "within"), [(16, 1.0, 0.01), (14, 1.056, 0.005), (12, 1.89, 0.02)])
def test_what_rounding_costs(bits, ratio, within):
    """65,536 numbers, z = 5, 100 rounds, delta 1e-5, four standard deviations of noise in the range: over a Gaussian.

    The formula written out here, and a Gaussian through the same orders; the accountant is close to that, or below.
    """
    d, z, rounds, clip = 65_536, 5.0, 100, 0.7
    largest = 4 * z * clip
    step = largest / (2 ** (bits - 1) - 1)
    links = chain(
        clip_by_global_norm(clip),
        fixed_point(largest=largest, max_clients=100, bits=bits, num_numbers=d),
        skellam_shares(z * clip / step, min_clients=100),
    )
    event = links.dp_event(UNBOUNDED, 0)
    l2 = rounded_norm_bound(clip / step, d)
    assert event.l2_sensitivity == pytest.approx(l2, rel=3e-5)
    assert event.l1_sensitivity == pytest.approx(min(math.sqrt(d) * l2, l2**2), rel=1e-4)
    orders, variance = np.array([a for a in DEFAULT_RDP_ORDERS if a == int(a)]), event.stddev**2
    second = np.minimum(
        ((2 * orders - 1) * l2**2 + 6 * event.l1_sensitivity) / (4 * variance**2),
        3 * event.l1_sensitivity / (2 * variance),
    )
    by_hand = compute_epsilon(orders, rounds * (orders * l2**2 / (2 * variance) + second), 1e-5)[0]
    gaussian = compute_epsilon(orders, rounds * orders / (2 * z**2), 1e-5)[0]
    assert by_hand / gaussian == pytest.approx(ratio, abs=within)
    spent = privacy_spent(dp_accounting.SelfComposedDpEvent(event, rounds), delta=1e-5).epsilon
    assert spent == pytest.approx(by_hand, rel=0.02)


def test_colluders_take_their_noise_along():
    event = SkellamDpEvent(10.0, 5.0, 2.0)
    assert without_colluders(event, colluding=0, min_clients=4) == event
    left = without_colluders(event, colluding=3, min_clients=4)
    assert (left.stddev, left.l1_sensitivity, left.l2_sensitivity) == (5.0, 5.0, 2.0)
    left = without_colluders(dp_accounting.ZCDpEvent(rho=0.1), colluding=1, min_clients=4)
    assert left.rho == pytest.approx(0.1 * 4 / 3)
    for colluding in (-1, 4):
        with pytest.raises(ValueError, match="from 0 to 3: somebody's noise has to be left"):
            without_colluders(event, colluding=colluding, min_clients=4)
    with pytest.raises(ValueError, match="GaussianDpEvent is no event of noise in shares"):
        without_colluders(dp_accounting.GaussianDpEvent(1.0), colluding=1, min_clients=4)


# What is refused.


def rounds_with(*links, sampler=REPORTING):
    return make_rounds(adversaries(), chain(*links), sampler, nothing_but_clients())


def test_shares_whose_number_nothing_guarantees():
    shares = skellam_shares(20.0, min_clients=4)
    assert rounds_with(CLIPPED, shares, secure(4)).private
    with pytest.raises(ValueError, match="Give the secure sum min_clients=4"):
        rounds_with(CLIPPED, shares, secure(3))
    for links in ((), (ring_sum(),)):  # in the open
        with pytest.raises(ValueError, match="Put a secure sum of min_clients=4 last"):
            rounds_with(CLIPPED, shares, *links)


@pytest.mark.parametrize(
    "sampler",
    [full_participation(6), poisson(6, cohort_size=5), in_turn(6, num_groups=1), fixed_size(6, cohort_size=5)],
    ids=["all", "poisson", "in turn", "fixed size"],
)
def test_cohorts_for_which_the_noise_has_no_guarantee(sampler):
    message = "cohorts without sampling" if sampler.name == "fixed_size" else "leaves the sum with whoever is removed"
    with pytest.raises(ValueError, match=message):
        rounds_with(CLIPPED, skellam_shares(20.0, min_clients=4), secure(4), sampler=sampler)


def test_integers_of_bounded_norm_are_needed():
    makes = (
        lambda std: skellam_shares(std, min_clients=2),
        lambda std: discrete_gaussian_shares(std, min_clients=2, num_numbers=9),
    )
    point = fixed_point(largest=1.0, max_clients=6)
    for make in makes:
        for before in ((), (clip_by_global_norm(1.0),), (clip_by_global_norm(1.0), point), (CLIPPED, scale(0.5))):
            with pytest.raises(ValueError, match="put a clip and fixed_point with num_numbers before it"):
                chain(*before, make(4.0))
        for after in (scale(0.5), clip_by_global_norm(1.0)):
            with pytest.raises(ValueError, match="A link after the noise"):
                chain(CLIPPED, make(4.0), after)
        with pytest.raises(ValueError, match="2 links of this chain add noise"):
            chain(CLIPPED, make(4.0), make(4.0))
        for stddev in (0.0, 1e6):
            with pytest.raises(ValueError, match="standard deviation of integer noise"):
                make(stddev)
    with pytest.raises(ValueError, match="min_clients must be at least 1"):
        skellam_shares(1.0, min_clients=0)
    with pytest.raises(ValueError, match="bits=11"):
        fixed_point(largest=1.0, max_clients=6, bits=11)
    assert skellam_shares(4.0, min_clients=2).sensitivity(Bound(3.0, 2.0, integers=True)).noised
