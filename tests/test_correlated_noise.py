"""Risk: noise that rounds share is less than epsilon says: in scale, for some pattern of rounds, or after a resume."""

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dp_accounting import GaussianDpEvent
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from test_noise import keys, ones, population
from test_sensitivity import NUM_CLIENTS, PROBE, TOLERANCE, adversaries, joint_norm, nothing_but_clients, uploads

from fedjax_rec.federated.cohort import fixed_size, full_participation, in_turn, poisson
from fedjax_rec.federated.round import make_rounds
from fedjax_rec.federated.transforms import UNBOUNDED, UpdateTransform, chain
from fedjax_rec.privacy.calibration import calibrate_noise_multiplier
from fedjax_rec.privacy.correlated import best_bands, correlated_noise, published, run_event, user_level_correlated
from fedjax_rec.privacy.events import flatten
from fedjax_rec.privacy.ledger import Ledger
from fedjax_rec.privacy.mechanisms import clip_by_global_norm, gaussian_noise
from fedjax_rec.privacy.strategies import banded_toeplitz, expected_prefix_error, identity, tree
from fedjax_rec.runs import checkpoint

NUM_GROUPS, NUM_ROUNDS, CLIP, STDDEV = 3, 8, 0.5, 0.75
SUMS = np.tril(np.ones((NUM_ROUNDS, NUM_ROUNDS)))


def noising_matrix(strategy, num_rounds=NUM_ROUNDS):
    """C^-1 by streaming the unit vectors through it, float64."""
    return np.asarray(strategy.noising.materialize(num_rounds), np.float64)


STRATEGIES = {s.name: s for s in (banded_toeplitz(NUM_ROUNDS, 3), banded_toeplitz(5, 2), tree(3), tree(2), identity())}
MATRICES = {name: np.linalg.inv(noising_matrix(strategy)) for name, strategy in STRATEGIES.items()}
BANDED, TREE = (STRATEGIES[name] for name in (f"banded_toeplitz({NUM_ROUNDS}, 3)", "tree(3)"))


# The matrices.


@pytest.mark.parametrize(
    "strategy", [*STRATEGIES.values(), tree(4), tree(5), banded_toeplitz(8, 8)], ids=lambda s: s.name
)
def test_what_a_strategy_declares_is_true_of_its_matrix(strategy):
    inverse = noising_matrix(strategy)
    matrix = np.linalg.inv(inverse)
    np.testing.assert_allclose(matrix, np.tril(matrix), atol=1e-6)
    norms, reach = (
        np.linalg.norm(matrix, axis=0),
        (np.abs(matrix) > 1e-4).cumsum(0).argmax(0) - np.arange(NUM_ROUNDS) + 1,
    )
    assert norms.max() == pytest.approx(strategy.column_norm, rel=1e-5)
    assert reach.max() <= strategy.min_separation
    np.testing.assert_allclose(np.square(SUMS @ inverse).sum(1), strategy.prefix_variances(NUM_ROUNDS), rtol=1e-5)
    error = np.sqrt(np.square(SUMS @ inverse).sum() / NUM_ROUNDS)
    assert expected_prefix_error(strategy, NUM_ROUNDS) == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize(
    ("bands", "error"), [(2, 11.306578), (4, 8.190034), (8, 6.086155), (16, 4.701735), (23, 4.187920)]
)
def test_bands_are_the_best_ones(bands, error):
    """Errors times column norms at 500 rounds are those of jax_privacy's `toeplitz.optimize_banded_toeplitz`."""
    strategy = banded_toeplitz(500, bands)
    assert strategy.column_norm * expected_prefix_error(strategy, 500) == pytest.approx(error, rel=1e-6)


def test_a_tree_pays_a_level_for_each_doubling():
    assert [tree(n).column_norm ** 2 for n in (1, 2, 3, 4, 7, 8)] == pytest.approx([1, 2, 2, 3, 3, 4])
    np.testing.assert_array_equal(tree(4).prefix_variances(9), [1, 1, 2, 1, 2, 2, 3, 2, 3])


# Sensitivity: the real round on neighbouring data, over several rounds.


RECORDER = UpdateTransform(
    init=lambda params: (jnp.int32(0), jax.tree.map(lambda x: jnp.zeros((NUM_ROUNDS, *x.shape)), params)),
    server=lambda total, state, key: (
        total,
        (state[0] + 1, jax.tree.map(lambda sums, x: sums.at[state[0]].set(x), state[1], total)),
    ),
)


def moody_adversaries():
    """Clients that send whatever they like, times a factor of their choice for each time that they take part."""
    base = adversaries()

    def client_update(shared, private, client, num_steps, key):
        factor, upload = private["factors"][private["times"]], private["upload"]
        upload = {name: x if name == "ids" else factor * x for name, x in upload.items()}
        output = base.client_update(shared, upload, client, num_steps, key)
        return output._replace(private=private | {"times": private["times"] + 1})

    def init_private(key):
        return {"upload": base.init_private(key), "factors": jnp.ones(NUM_ROUNDS), "times": jnp.int32(0)}

    return base._replace(init_private=init_private, client_update=client_update)


@pytest.fixture(scope="module", params=[1.0, 0.5])
def rounds_in_turn(request):
    sampler = in_turn(NUM_CLIENTS, num_groups=NUM_GROUPS, sampling_prob=request.param)
    transforms = chain(clip_by_global_norm(CLIP), correlated_noise(1.0, BANDED), RECORDER)
    rounds = make_rounds(moody_adversaries(), transforms, sampler, nothing_but_clients(), span_size=NUM_ROUNDS)
    return rounds, jax.device_get(rounds.init(jax.random.key(0)))


def pre_noise_sums(rounds_in_turn, uploads, user, factors, seed):
    """The sums before the noise, ``[rounds, entries]``, where the user sends its upload times ``factors``."""
    rounds, (state, private) = rounds_in_turn
    all_factors = np.ones((NUM_CLIENTS, NUM_ROUNDS), np.float32)
    all_factors[user] = factors
    start = state, private | {"upload": uploads, "factors": all_factors}
    state, _, _ = rounds.run(*jax.tree.map(jnp.array, start), keys(seed), NUM_ROUNDS)
    sums = [np.asarray(x, np.float64).reshape(NUM_ROUNDS, -1) for x in jax.tree.leaves(state.transforms[2][1])]
    return np.concatenate(sums, axis=1)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    uploads=uploads,
    user=st.integers(0, NUM_CLIENTS - 1),
    factors=hnp.arrays(np.int32, NUM_ROUNDS, elements=st.sampled_from([1, -1, 0])),
    seed=st.integers(0, 99),
)
def test_k_rounds_of_a_user_move_it_all_by_the_root_of_k(rounds_in_turn, uploads, user, factors, seed):
    """Whatever a user sends and when: ``|C (G - G')| <= sqrt(k) * column_norm * clip`` with k the rounds it was in."""
    # Absent is to add nothing: 0 times NaN is a NaN, which the clip makes nothing.
    runs = [pre_noise_sums(rounds_in_turn, uploads, user, f, seed) for f in (factors, 0 * factors)]
    moved = runs[0] - runs[1]
    took_part = np.flatnonzero(np.any(moved != 0, axis=1))
    assert np.all(took_part % NUM_GROUPS == user % NUM_GROUPS)
    assert len(took_part) <= -(-NUM_ROUNDS // NUM_GROUPS)
    for name, strategy in STRATEGIES.items():
        bound = np.sqrt(len(took_part)) * strategy.column_norm * CLIP
        assert joint_norm(MATRICES[name] @ moved) <= bound * (1 + 10 * TOLERANCE)


@pytest.fixture(scope="module")
def large_uploads():
    rng = np.random.default_rng(0)
    shapes = {"values": (NUM_CLIENTS, 5, 2), "dense": (NUM_CLIENTS, 3)}
    sent = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return sent | {"ids": np.tile(np.arange(5, dtype=np.int32), (NUM_CLIENTS, 1))}


def test_the_bound_is_reached_in_turn_and_passed_out_of_turn(rounds_in_turn, large_uploads):
    """Columns of one user are orthogonal in turn; in every round, as if all took part, they add up."""
    if rounds_in_turn[0].sampler != "in_turn":
        return
    runs = [pre_noise_sums(rounds_in_turn, large_uploads, 2, f, seed=1) for f in (1, 0)]
    moved = runs[0] - runs[1]
    everywhere = np.tile(moved[2], (NUM_ROUNDS, 1))
    for name, strategy in STRATEGIES.items():
        columns = np.linalg.norm(MATRICES[name][:, [2, 5]])
        assert joint_norm(MATRICES[name] @ moved) == pytest.approx(columns * CLIP, rel=1e-4)
        if strategy.min_separation > 1:  # more than even a release for each round would pay for
            bound = np.sqrt(NUM_ROUNDS) * strategy.column_norm * CLIP
            assert joint_norm(MATRICES[name] @ everywhere) > 1.02 * bound


# The noise: through the real round.


def noisy_rounds(strategy, span_size=NUM_ROUNDS, num_rows=2_000):
    transforms = chain(clip_by_global_norm(2.0), correlated_noise(STDDEV, strategy), PROBE)
    sampler = in_turn(NUM_CLIENTS, num_groups=NUM_GROUPS, sampling_prob=0.5)
    clients = population(NUM_CLIENTS, num_items=num_rows)
    return make_rounds(ones(num_rows, 8, 4_000), transforms, sampler, clients, span_size=span_size)


def noise_in(state, expected_size):
    """What was added to the table and to the dense leaf, float64 ``[entries]``."""
    added = jax.tree.map(
        lambda a, b: np.asarray(a, np.float64) * expected_size - np.asarray(b), state.shared, state.transforms[2]
    )
    return np.concatenate([added.tables["item"].ravel(), added.dense["out"]])


@pytest.fixture(scope="module", params=[BANDED, TREE], ids=lambda s: s.name)
def noise(request):
    """The strategy, the noise ``[rounds, entries]`` of a run of it, round by round, and its states after 5 and all."""
    rounds = noisy_rounds(request.param)
    state, private = rounds.init(jax.random.key(0))
    rows, states = [], []
    for _ in range(NUM_ROUNDS):
        state, private, _ = rounds.run(state, private, keys())
        rows.append(noise_in(state, expected_size=1.0))
        states.append(jax.device_get(state))
    at_once, _, _ = rounds.run(*rounds.init(jax.random.key(0)), keys(), NUM_ROUNDS)
    jax.tree.map(np.testing.assert_array_equal, state, at_once)  # however a run is cut
    return request.param, np.stack(rows), (states[4], states[-1])


def looks_normal(sample, stddev):
    return stats.kstest(sample, "norm", args=(0, stddev)).pvalue > 1e-3


def test_each_round_has_the_noise_of_its_row(noise):
    strategy, rows, _ = noise
    stddevs = STDDEV * np.linalg.norm(noising_matrix(strategy), axis=1)
    for row, stddev in zip(rows, stddevs, strict=True):
        assert looks_normal(row, stddev)
        assert not looks_normal(row, stddev * 2 / 3)
        assert not looks_normal(row, stddev * 3 / 2)
    if strategy is BANDED:
        assert stddevs.max() > 1.1 * STDDEV


def test_rounds_are_correlated_as_declared(noise):
    """Their covariance is (C' C)^-1, entries are independent, and prefix sums have the noise that is promised."""
    strategy, rows, _ = noise
    inverse, num_entries = noising_matrix(strategy), rows.shape[1]
    covariance = STDDEV**2 * inverse @ inverse.T
    scale = np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)) + covariance**2)
    off = np.abs(rows @ rows.T / num_entries - covariance) / scale * np.sqrt(num_entries)
    assert off.max() < 4.5
    for factor in (2 / 3, 3 / 2):
        off = np.abs(rows @ rows.T / num_entries - factor**2 * covariance) / scale * np.sqrt(num_entries)
        assert np.diag(off).min() > 10
    prefixes = np.cumsum(rows, axis=0).std(1) / STDDEV
    np.testing.assert_allclose(prefixes, np.sqrt(strategy.prefix_variances(NUM_ROUNDS)), rtol=0.02)
    assert np.abs(np.corrcoef(rows[:, :-1].ravel(), rows[:, 1:].ravel())[0, 1]) < 5 / np.sqrt(rows.size)
    assert np.abs(np.corrcoef(rows[0, :4_000], rows[0, 16_000:])[0, 1]) < 5 / np.sqrt(
        4_000
    )  # the table, the dense leaf


def test_multiplied_by_c_it_is_independent_noise_of_the_accounted_scale(noise):
    strategy, rows, _ = noise
    fresh = MATRICES[strategy.name] @ rows
    for row in fresh:
        assert looks_normal(row, STDDEV)
        assert not looks_normal(row, STDDEV * 2 / 3)
        assert not looks_normal(row, STDDEV * 3 / 2)
    correlations = np.corrcoef(fresh)[np.triu_indices(NUM_ROUNDS, 1)]
    assert np.abs(correlations).max() < 4.5 / np.sqrt(rows.shape[1])  # no round's key serves twice


def test_identity_is_gaussian_noise_bit_for_bit():
    total = {"table": jnp.ones((5, 2)), "dense": jnp.zeros(3)}
    key = jax.random.key(3)
    plain, _ = gaussian_noise(STDDEV).server(total, (), key)
    same, state = correlated_noise(STDDEV, identity()).server(total, (), jax.random.clone(key))
    jax.tree.map(np.testing.assert_array_equal, plain, same)
    assert jax.tree.leaves(state) == []


# Resuming.


def test_a_resumed_run_goes_on_with_the_same_noise(noise, tmp_path):
    """From a checkpoint, in the middle of a turn, with rounds compiled anew: bit for bit."""
    strategy, _, (middle, last) = noise
    if strategy is not TREE:  # its state has the place in the turn too, and one compilation is enough
        return
    checkpoint.save(tmp_path, checkpoint.Checkpoint(middle, (), keys(), None, {"round": 5}, {}, ""))
    rounds = noisy_rounds(strategy)
    saved = checkpoint.restore(tmp_path, state=rounds.init(jax.random.key(1))[0], private=())
    resumed, _, _ = rounds.run(saved.state, saved.private, saved.keys, NUM_ROUNDS - 5)
    jax.tree.map(np.testing.assert_array_equal, resumed, last)


def test_the_state_of_the_noise_uncovers_the_sum_and_is_not_published(noise):
    strategy, _, (_, state) = noise
    if strategy is BANDED:
        last_noise = jax.tree.map(lambda buffers: buffers[0], state.transforms[1])
        uncovered = jax.tree.map(lambda a, b: np.asarray(a - b), state.shared, last_noise)  # the expected cohort is one
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), uncovered, state.transforms[2])
    assert published(state) == (state.round, state.shared, state.opt_state, ())


# The price.


@pytest.mark.parametrize(("num_rounds", "turns", "sampling_prob"), [(3, 1, 1.0), (7, 3, 1.0), (9, 3, 1.0), (7, 3, 0.5)])
def test_epsilon_is_that_of_one_gaussian_a_turn(num_rounds, turns, sampling_prob):
    transforms = user_level_correlated(l2_clip_norm=2.0, noise_multiplier=1.3, strategy=BANDED)
    sampler = in_turn(NUM_CLIENTS, num_groups=NUM_GROUPS, sampling_prob=sampling_prob)
    rounds = make_rounds(ones(7, 2, 3), transforms, sampler, population())
    spent = rounds.charge(Ledger(), first_round=0, num_rounds=num_rounds).spent(1e-5).epsilon
    if sampling_prob == 1:
        expected = dp_accounting.get_epsilon_gaussian(1.3 / np.sqrt(turns), 1e-5)
    else:
        event = dp_accounting.PoissonSampledDpEvent(sampling_prob, GaussianDpEvent(1.3))
        expected = PLDAccountant().compose(event, turns).get_epsilon(1e-5)
    assert spent == pytest.approx(expected, rel=1e-3)
    charged = [dp_accounting.SelfComposedDpEvent(*entry) for entry in rounds.releases(0, num_rounds)]
    together = flatten(dp_accounting.ComposedDpEvent(charged))
    assert [str(term) for term in together] == [str(term) for term in flatten(run_event(1.3, sampler, num_rounds))]


def test_calibrated_noise_is_the_closed_form():
    """k Gaussians of z are one of z / sqrt(k)."""
    sampler = in_turn(40, num_groups=4)
    found = calibrate_noise_multiplier(lambda z: run_event(z, sampler, 30), target_epsilon=2.0, delta=1e-6)
    one = dp_accounting.get_sigma_gaussian(2.0, 1e-6)
    assert found.noise_multiplier == pytest.approx(np.sqrt(8) * one, rel=5e-3)


def test_the_event_divides_by_clip_and_column_norm():
    for strategy in (BANDED, TREE):
        link = chain(clip_by_global_norm(0.5), correlated_noise(3.0, strategy))
        assert link.dp_event(UNBOUNDED, 7) == GaussianDpEvent(3 / (0.5 * strategy.column_norm))
        assert link.min_separation == 3
        whole = user_level_correlated(l2_clip_norm=0.5, noise_multiplier=1.3, strategy=strategy)
        assert whole.dp_event(UNBOUNDED, 0).noise_multiplier == pytest.approx(1.3)
    nothing = user_level_correlated(l2_clip_norm=0.5, noise_multiplier=0.0, strategy=TREE)
    assert nothing.dp_event(UNBOUNDED, 0) == dp_accounting.NonPrivateDpEvent()


def test_bands_are_weighed_against_amplification():
    common = {"num_clients": 64, "cohort_size": 8, "num_rounds": 24, "delta": 1e-5}
    weak = best_bands(**common, epsilon=50.0, candidates=(1, 8))
    assert [choice.bands for choice in weak] == [8, 1]
    best, independent = weak
    assert (best.sampling_prob, independent.sampling_prob) == (1.0, 1 / 8)
    assert best.noise_multiplier == pytest.approx(np.sqrt(3) * dp_accounting.get_sigma_gaussian(50.0, 1e-5), rel=5e-3)
    assert independent.prefix_error == pytest.approx(independent.noise_multiplier * np.sqrt(25 / 2))
    strong = best_bands(**common, epsilon=0.5, candidates=(1, 8))
    assert [choice.bands for choice in strong] == [1, 8]
    with pytest.raises(ValueError, match=r"between 1 and 8 bands; got \(9,\)"):
        best_bands(**common, epsilon=1.0, candidates=(9,))


# Refusals.


@pytest.mark.parametrize(
    "sampler",
    [
        poisson(NUM_CLIENTS, cohort_size=2),
        fixed_size(NUM_CLIENTS, cohort_size=2),
        full_participation(NUM_CLIENTS),
        in_turn(NUM_CLIENTS, num_groups=2),
    ],
    ids=lambda sampler: f"{sampler.name}-{sampler.num_groups}",
)
@pytest.mark.parametrize("strategy", [BANDED, TREE], ids=lambda s: s.name)
def test_cohorts_that_do_not_keep_apart_are_refused(sampler, strategy):
    transforms = user_level_correlated(l2_clip_norm=1.0, noise_multiplier=1.0, strategy=strategy)
    with pytest.raises(ValueError, match=r"correlated over 3 rounds, and its bound .* num_groups=3"):
        make_rounds(ones(7, 2, 3), transforms, sampler, population())


def test_other_unsound_uses_are_refused():
    with pytest.raises(ValueError, match="put a clip before it"):
        chain(correlated_noise(1.0, BANDED))
    with pytest.raises(ValueError, match="2 links of this chain add noise"):
        chain(clip_by_global_norm(1.0), correlated_noise(1.0, BANDED), correlated_noise(1.0, TREE))
    for stddev in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"finite and not negative; got {stddev}"):
            correlated_noise(stddev, BANDED)
    with pytest.raises(ValueError, match=r"must not be negative; got -1\.0"):
        user_level_correlated(l2_clip_norm=1.0, noise_multiplier=-1.0, strategy=TREE)
    with pytest.raises(ValueError, match="between 1 and the number of rounds, 5; got 6"):
        banded_toeplitz(5, 6)
    with pytest.raises(ValueError, match="at least one round; got 0"):
        tree(0)


@pytest.mark.parametrize("strategy", [BANDED, TREE], ids=lambda s: s.name)
def test_sums_of_another_shape_are_refused(strategy):
    link = correlated_noise(1.0, strategy)
    state = link.init({"table": jnp.zeros((5, 2))})
    with pytest.raises(ValueError, match=r"shaped like the shared parameters, .* Use gaussian_noise"):
        link.server({"table": jnp.zeros((5, 3))}, state, jax.random.key(0))
    with pytest.raises(ValueError, match=r"shaped like the shared parameters, .* Use gaussian_noise"):
        link.server({"gram": jnp.zeros((5, 2))}, state, jax.random.key(1))
