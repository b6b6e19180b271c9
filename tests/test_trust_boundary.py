"""Risk: what a client keeps to itself reaches the server's state by another way than its transformed update."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from evaluation_worlds import make_split
from test_known_worlds import ALGORITHMS

from fedjax_rec.data.clients import client_data
from fedjax_rec.data.negatives import Negatives
from fedjax_rec.federated.algorithm import all_private, client_key
from fedjax_rec.federated.cohort import poisson
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.transforms import chain
from fedjax_rec.models.matrix_factorization import matrix_factorization
from fedjax_rec.privacy.mechanisms import clip_by_global_norm, user_level_dp

NUM_CLIENTS, NUM_ITEMS, DIM = 13, 17, 5  # all different, so that an axis can be told by its length
SAMPLER = poisson(NUM_CLIENTS, cohort_size=5)
MODEL = matrix_factorization(NUM_ITEMS, dim=DIM, l2=0.1)


def keys():
    return RoundKeys(*(jax.random.key(seed) for seed in (1, 2, 3)))


def cohort():
    """bool ``[clients]`` of the first round."""
    return np.asarray(SAMPLER.draw(keys().cohort, 0))


def population():
    lists = [[(3 * user + i) % NUM_ITEMS for i in range(user % 7 + 1)] for user in range(NUM_CLIENTS)]
    return client_data(make_split(lists, [[] for _ in lists], num_items=NUM_ITEMS), num_buckets=1)


@pytest.fixture(scope="module", params=ALGORITHMS)
def case(request):
    algorithm = ALGORITHMS[request.param](MODEL, optax.adam(0.1), Negatives(2))
    rounds = make_rounds(algorithm, chain(clip_by_global_norm(0.1)), SAMPLER, population(), span_size=1, chunk_size=4)
    return algorithm, rounds


def run(rounds, change=lambda private: private):
    state, private = rounds.init(jax.random.key(0))
    private = jax.tree.map(jnp.array, change(private))
    before = jax.device_get(private)
    state, private, metrics = rounds.run(state, private, keys())
    return jax.device_get((state, metrics)), before, jax.device_get(private)


def test_the_cohort_is_neither_nobody_nor_everybody():
    assert 2 <= cohort().sum() <= 11


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_clients_of_the_cohort_do_influence_the_server(case):
    """Or the contract's test of those outside it could not fail."""
    _, rounds = case
    server, _, _ = run(rounds)
    changed, _, _ = run(rounds, lambda private: jax.tree.map(lambda x: x + 1.0, private))
    assert not equal(server[0].shared, changed[0].shared)


def test_noise_hides_the_sum_and_not_the_private_state():
    """With user-level DP the private parameters still train, noiselessly: they never leave."""
    algorithm = ALGORITHMS["fedsgd"](MODEL, optax.sgd(1.0), Negatives(1))
    results = []
    for noise_multiplier in (0.0, 10.0):
        transforms = user_level_dp(l2_clip_norm=0.1, noise_multiplier=noise_multiplier)
        rounds = make_rounds(algorithm, transforms, SAMPLER, population(), span_size=1, chunk_size=4)
        results.append(run(rounds))
    (plain, _, plain_private), (noised, _, noised_private) = results
    assert equal(plain_private, noised_private)
    assert not equal(plain[0].shared, noised[0].shared)


def test_private_parameters_start_apart_and_do_not_depend_on_the_population():
    """Each client's own key: the same whoever else is there."""
    algorithm = ALGORITHMS["fedsgd"](MODEL, optax.sgd(1.0), None)
    few, many = (all_private(algorithm, jax.random.key(0), n)["user"] for n in (5, 9))
    np.testing.assert_array_equal(few, many[:5])
    assert len(np.unique(np.asarray(many), axis=0)) == 9
    ids = np.arange(100)
    raw = [tuple(jax.random.key_data(client_key(jax.random.key(0), i)).tolist()) for i in ids]
    assert len(set(raw)) == 100
