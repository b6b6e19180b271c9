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
from fedjax_rec.federated.algorithm import ServerState, all_private, client_key
from fedjax_rec.federated.cohort import poisson
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.rows import zero_total
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
    return np.asarray(SAMPLER.draw(jax.random.fold_in(keys().cohort, 0)))


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


def test_the_servers_state_has_no_client_axis(case):
    _, rounds = case
    (state, _), before, private = run(rounds)
    assert isinstance(state, ServerState)
    assert not any(NUM_CLIENTS in leaf.shape for leaf in jax.tree.leaves(state))
    for leaf in jax.tree.leaves((before, private)):
        assert leaf.shape[0] == NUM_CLIENTS  # and the private parameters of every client do


def test_an_update_has_the_servers_structure(case):
    """A client can send numbers for the shared parameters and for nothing else."""
    algorithm, _ = case
    shared = jax.eval_shape(algorithm.init, jax.random.key(0)).shared
    private = jax.eval_shape(algorithm.init_private, jax.random.key(0))
    client = jax.tree.map(lambda x: x[0], population().buckets[0])
    key = jax.eval_shape(jax.random.key, 0)
    steps = jax.ShapeDtypeStruct((), jnp.int32)
    output = jax.eval_shape(algorithm.client_update, shared, private, client, steps, key)
    total = jax.eval_shape(lambda: zero_total(output.update))
    assert jax.tree.structure(total) == jax.tree.structure(shared)
    assert [x.shape for x in jax.tree.leaves(total)] == [x.shape for x in jax.tree.leaves(shared)]
    assert jax.tree.structure(output.private) == jax.tree.structure(private)


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_clients_outside_the_cohort_have_no_influence_and_stay_as_they_are(case):
    """Bit for bit, even where their private parameters are NaN: on the server, the metrics and each other."""
    _, rounds = case
    outside = ~cohort()

    def others_are(value):
        return lambda private: jax.tree.map(
            lambda x: jnp.where(jnp.asarray(outside).reshape(-1, *[1] * (x.ndim - 1)), value, x), private
        )

    server, _, private = run(rounds)
    for value in (0.0, 12345.678, np.nan):
        server_again, before, private_again = run(rounds, others_are(value))
        assert equal(server, server_again)
        for x, y, z in zip(*map(jax.tree.leaves, (before, private, private_again)), strict=True):
            np.testing.assert_array_equal(z[outside], x[outside])
            np.testing.assert_array_equal(z[~outside], y[~outside])
            assert not np.any(np.all((z == x).reshape(NUM_CLIENTS, -1), 1) & ~outside)  # the cohort did train


def test_clients_of_the_cohort_do_influence_the_server(case):
    """Or the test above could not fail."""
    _, rounds = case
    server, _, _ = run(rounds)
    changed, _, _ = run(rounds, lambda private: jax.tree.map(lambda x: x + 1.0, private))
    assert not equal(server[0].shared, changed[0].shared)


def test_private_values_do_not_appear_on_the_server(case):
    """Every private number is a marker; none of them, nor one of the trained ones, is found in the server's state."""
    _, rounds = case
    (state, _), before, private = run(rounds, lambda p: jax.tree.map(lambda x: x * 0 + 0.1234567, p))
    secrets = np.concatenate([np.ravel(x) for x in jax.tree.leaves((before, private))])
    public = np.concatenate([np.ravel(x) for x in jax.tree.leaves(state)])
    assert not np.any(np.isin(public[public != 0], secrets))


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
