"""Risk: the noise that runs is not the noise that is accounted: its scale, its count, its keys, or its divisor."""

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from fedjax_rec.algorithms.fedavg import fedsgd
from fedjax_rec.data.clients import client_data_from_examples
from fedjax_rec.federated.algorithm import Algorithm, ClientOutput, ServerState
from fedjax_rec.federated.cohort import fixed_size, full_participation, poisson
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.rows import Rows
from fedjax_rec.federated.transforms import UpdateTransform, chain
from fedjax_rec.models.base import Shared
from fedjax_rec.models.matrix_factorization import linear_scorer
from fedjax_rec.privacy.mechanisms import clip_by_global_norm, gaussian_noise, user_level_dp
from fedjax_rec.privacy.noise import standard_normal

NUM_CLIENTS = 6
STDDEV = 0.75
PROBE = UpdateTransform(
    init=lambda params: jax.tree.map(jnp.zeros_like, params), server=lambda total, *_: (total, total)
)


def ones(num_items, dim, num_dense):
    """Every client sends ones in row 1 and in the dense leaf; the server replaces its parameters by the aggregate."""

    def init(key):
        del key
        tables = {"item": jnp.zeros((num_items, dim)), "bias": jnp.zeros((num_items, 1))}
        return ServerState(jnp.zeros((), jnp.int32), Shared(tables, {"out": jnp.zeros(num_dense)}), ())

    def client_update(shared, private, client, num_steps, key):
        del shared, num_steps, key
        one_row = jnp.ones(1, jnp.int32)
        rows = {
            "item": Rows(one_row, jnp.ones((1, dim)), num_items),
            "bias": Rows(one_row, jnp.ones((1, 1)), num_items),
        }
        return ClientOutput(Shared(rows, {"out": jnp.ones(num_dense)}), private, {"loss": jnp.zeros(())})

    return Algorithm(
        init=init,
        init_private=lambda key: (),
        client_update=client_update,
        num_steps=lambda client: jnp.int32(1),
        server_update=lambda state, aggregate: state._replace(shared=aggregate),
    )


def population(num_clients=NUM_CLIENTS, num_items=7):
    return client_data_from_examples([(np.zeros(1, np.int64), np.ones(1))] * num_clients, num_items=num_items)


def keys(cohort=1, client=2, noise=3):
    return RoundKeys(*(jax.random.key(seed) for seed in (cohort, client, noise)))


def small_rounds(transforms, sampler, **options):
    return make_rounds(ones(7, 2, 3), transforms, sampler, population(), span_size=3, **options)


def aggregate_of(rounds, run_keys, num_rounds=1):
    state, _, _ = rounds.run(*rounds.init(jax.random.key(0)), run_keys, num_rounds)
    return jax.device_get(state.shared)


def leaves(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def test_scale_over_a_million_draws():
    """Through the real round: table, bias and dense leaf each Gaussian, to 1 %, by KS, at sum over expected cohort."""
    transforms = chain(clip_by_global_norm(2.0), gaussian_noise(STDDEV), PROBE)
    expected_size = 4
    rounds = make_rounds(
        ones(16_000, 64, 1_000_000),
        transforms,
        poisson(NUM_CLIENTS, cohort_size=expected_size),
        population(num_items=16_000),
        span_size=1,
    )
    state, _, _ = rounds.run(*rounds.init(jax.random.key(0)), keys())
    pre_noise, released = state.transforms[2], state.shared
    noise = jax.tree.map(lambda a, b: np.asarray(a, np.float64) * expected_size - np.asarray(b), released, pre_noise)
    for leaf in (noise.tables["item"], noise.dense["out"]):
        assert leaf.size >= 1_000_000
        assert abs(leaf.std() / STDDEV - 1) < 0.01
        assert abs(leaf.mean()) < 4 * STDDEV / np.sqrt(leaf.size)
        assert stats.kstest(leaf.ravel(), "norm", args=(0, STDDEV)).pvalue > 1e-3
    assert abs(noise.tables["bias"].std() / STDDEV - 1) < 0.03
    table = noise.tables["item"]
    assert abs(np.corrcoef(table.ravel()[:1_000_000], noise.dense["out"])[0, 1]) < 0.005
    assert abs(np.corrcoef(table[:-1].ravel(), table[1:].ravel())[0, 1]) < 0.005  # rows are independent
    assert abs(np.corrcoef(table[:, :-1].ravel(), table[:, 1:].ravel())[0, 1]) < 0.005  # and so are columns
    event = dp_accounting.PoissonSampledDpEvent(
        expected_size / NUM_CLIENTS, dp_accounting.GaussianDpEvent(STDDEV / 2.0)
    )
    assert rounds.releases(0, 3) == ((event, 3),)


@pytest.mark.parametrize("shape", [(5,), (3, 7), (16_000, 32), (3_706, 64), (20_011, 8), (100_003,)])
def test_numbers_drawn_in_pieces_are_those_drawn_at_once(shape, monkeypatch):
    """Shapes that one piece holds, that pieces divide, that they do not, and an odd number of rows."""
    one_by_one = np.asarray(standard_normal(jax.random.key(3), shape))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    np.testing.assert_array_equal(one_by_one, np.asarray(standard_normal(jax.random.key(3), shape)))
    assert one_by_one.shape == shape
    if one_by_one.size < 1_000:
        return
    assert stats.kstest(one_by_one.ravel(), "norm").pvalue > 1e-3
    flat = one_by_one.ravel()
    for lag in (1, 1 << 12, flat.size // 16):  # the next number, the next piece, the next part
        assert abs(np.corrcoef(flat[:-lag], flat[lag:])[0, 1]) < 5 / np.sqrt(flat.size)


@pytest.fixture(scope="module")
def rare_rounds():
    """A cohort is nearly always empty."""
    return small_rounds(user_level_dp(l2_clip_norm=0.5, noise_multiplier=1.5), poisson(NUM_CLIENTS, cohort_size=1e-6))


def test_an_empty_cohort_is_noised(rare_rounds):
    state, _, metrics = rare_rounds.run(*rare_rounds.init(jax.random.key(0)), keys())
    assert metrics["cohort_size"][0] == 0
    noise = leaves(state.shared) * 1e-6
    assert np.all(noise != 0)
    assert 0.3 * 0.75 < noise.std() < 2 * 0.75


def test_noise_is_fixed_by_its_key_the_round_and_the_leaf(rare_rounds):
    first = aggregate_of(rare_rounds, keys())
    np.testing.assert_array_equal(leaves(first), leaves(aggregate_of(rare_rounds, keys())))
    np.testing.assert_array_equal(leaves(first), leaves(aggregate_of(rare_rounds, keys(cohort=8, client=9))))
    others = [aggregate_of(rare_rounds, keys(noise=4)), aggregate_of(rare_rounds, keys(), num_rounds=2)]
    draws = np.concatenate([leaves(tree) for tree in (first, *others)])
    assert len(np.unique(draws)) == len(draws)  # no value twice: over keys, rounds, leaves and entries


@pytest.mark.parametrize("sampler", [poisson(NUM_CLIENTS, cohort_size=3), fixed_size(NUM_CLIENTS, cohort_size=3)])
def test_noise_is_added_once_and_divided_by_the_expected_cohort(sampler):
    """The released value is (sum of the cohort + the one noise) / expected size: for every chunk size and cohort."""
    clip = 0.1
    noiseless = small_rounds(chain(clip_by_global_norm(clip)), sampler, chunk_size=1)
    noised = [
        small_rounds(user_level_dp(l2_clip_norm=clip, noise_multiplier=STDDEV), sampler, chunk_size=size)
        for size in (1, 4)
    ]
    one_client = clip / np.sqrt(2 + 1 + 3)  # each of the six numbers it sends
    sizes, noises = set(), []
    for seed in range(8):
        _, _, metrics = noiseless.run(*noiseless.init(jax.random.key(0)), keys(seed))
        size = int(metrics["cohort_size"][0])
        plain = aggregate_of(noiseless, keys(seed))
        np.testing.assert_allclose(plain.dense["out"], size * one_client / 3, rtol=1e-5)
        np.testing.assert_allclose(plain.tables["item"][1], size * one_client / 3, rtol=1e-5)
        assert not plain.tables["item"][2:].any()
        noises += [3 * (leaves(aggregate_of(rounds, keys(seed))) - leaves(plain)) for rounds in noised]
        sizes.add(size)
    assert sizes == {3} if sampler.name == "fixed_size" else len(sizes) > 2
    for noise in noises[1:]:  # the same key: the same noise, whatever the cohort and the chunk
        np.testing.assert_allclose(noise, noises[0], atol=1e-6)


def test_without_noise_nothing_is_claimed():
    rounds = small_rounds(chain(clip_by_global_norm(1.0)), full_participation(NUM_CLIENTS))
    assert not rounds.private
    rounds = small_rounds(user_level_dp(l2_clip_norm=1.0, noise_multiplier=0.0), full_participation(NUM_CLIENTS))
    assert rounds.releases(0, 1) == ((dp_accounting.NonPrivateDpEvent(), 1),)
    assert not aggregate_of(rounds, keys()).tables["item"][2:].any()


def test_the_server_optimizer_sees_only_the_noised_mean():
    """Noise goes in before the server's step, so that momentum is post-processing: an empty cohort moves it too."""
    algorithm = fedsgd(linear_scorer(7, dim=2), server_optimizer=optax.sgd(1.0, momentum=0.9))
    sampler = poisson(NUM_CLIENTS, cohort_size=1e-6)
    rounds = make_rounds(algorithm, user_level_dp(l2_clip_norm=1.0, noise_multiplier=1.0), sampler, population())
    before, private = rounds.init(jax.random.key(0))
    received = leaves(jax.device_get(before.shared))
    state, _, _ = rounds.run(before, private, keys())
    momentum = leaves(state.opt_state) * 1e-6
    assert 0.3 < momentum.std() < 2
    np.testing.assert_allclose(leaves(state.shared) * 1e-6, received * 1e-6 - momentum, atol=1e-5)
