"""Risk: a method learns the wrong thing, leaks what a client keeps, or gives other numbers in another layout."""

import subprocess
import sys
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import METHODS, checkerboard, population, ragged

from fedjax_rec.federated.algorithm import ServerState
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.rows import zero_total
from fedjax_rec.federated.transforms import UpdateTransform, chain
from fedjax_rec.privacy.mechanisms import clip_by_global_norm, gaussian_noise, user_level_dp
from fedjax_rec.runs import checkpoint

CLIP, NUM_ROUNDS = 0.05, 3
PROBE = UpdateTransform(
    init=lambda params: jax.tree.map(jnp.zeros_like, params), server=lambda total, *_: (total, total)
)
PRIVATE = chain(clip_by_global_norm(CLIP), gaussian_noise(1.0), PROBE)  # the server runs it from the right
NOT_PRIVATE = chain(clip_by_global_norm(CLIP), PROBE)
NAMES = sorted(METHODS)


def keys(seed=0):
    return RoundKeys(*(jax.random.key(3 * seed + i) for i in (1, 2, 3)))


@cache
def made(name, *, chunk_size=4, num_buckets=1, num_shards=1):
    """A method on the ragged world, clipped and noised where that is allowed: entry, rounds, sampler."""
    world = ragged(num_buckets=num_buckets, num_shards=num_shards)
    entry = METHODS[name](world)
    clients, sampler = population(entry, world)
    links = NOT_PRIVATE if entry.algorithm.individual or entry.algorithm.no_dp else PRIVATE
    layout = {"chunk_size": chunk_size, "mesh": None if num_shards == 1 else jax.make_mesh((num_shards,), ("clients",))}
    return entry, make_rounds(entry.algorithm, links, sampler, clients, span_size=5, **layout), sampler


def run(rounds, num_rounds=1, change=lambda private: private, seed=0):
    """(state, metrics) after some rounds, and private parameters before and after."""
    state, private = rounds.init(jax.random.key(0))
    private = jax.tree.map(jnp.array, change(private))
    before = jax.device_get(private)
    state, private, metrics = rounds.run(state, private, keys(seed), num_rounds)
    return jax.device_get((state, metrics)), before, jax.device_get(private)


def before_noise(state):
    """The sum of clipped updates, which the probe kept."""
    return state.transforms[-1]


def floats(tree):
    return [x for x in map(np.asarray, jax.tree.leaves(tree)) if x.dtype == np.float32]


def equal(a, b):
    return all(
        np.array_equal(x, y, equal_nan=True) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_withheld_item_is_found(name):
    """Every withheld item ranks above every item of the other colour; a method that shares nothing cannot know it."""
    world = checkerboard()
    entry = METHODS[name](world)
    clients, sampler = population(entry, world)
    rounds = make_rounds(entry.algorithm, chain(), sampler, clients, span_size=entry.num_rounds, chunk_size=16)
    state, private, metrics = rounds.run(*rounds.init(jax.random.key(0)), keys(), entry.num_rounds)
    scores = np.asarray(jax.vmap(entry.score, in_axes=(None, 0))(state.shared, private))
    loss = np.asarray(metrics["loss"])
    users, items = np.arange(world.num_clients), np.arange(scores.shape[1])
    other_colour = np.where((users[:, None] + items) % 2 == 1, scores, -np.inf)
    margin = scores[users, world.withheld] - other_colour.max(1)
    assert np.nanmean(loss[-10:]) < 0.8 * np.nanmean(loss[:10])
    if entry.finds is None:
        return
    if entry.finds:
        assert np.all(margin > 0), np.round(margin, 2)
    else:
        assert np.mean(margin > 0) < 0.5


@pytest.mark.parametrize("name", NAMES)
def test_the_servers_state_has_no_client_axis(name):
    entry, rounds, sampler = made(name)
    num_clients = len(sampler.draw(jax.random.key(0), 0))
    (state, _), before, private = run(rounds)
    assert isinstance(state, ServerState)
    if not entry.algorithm.individual:
        assert not any(num_clients in leaf.shape for leaf in jax.tree.leaves(state))
    for leaf in jax.tree.leaves((before, private)):
        assert leaf.shape[0] == num_clients  # and the private parameters of every client do


@pytest.mark.parametrize("name", NAMES)
def test_an_update_has_the_servers_structure(name):
    """A client can send numbers for the shared parameters and for nothing else."""
    world = ragged()
    entry = METHODS[name](world)
    clients, _ = population(entry, world)
    shared = jax.eval_shape(entry.algorithm.init, jax.random.key(0)).shared
    private = jax.eval_shape(entry.algorithm.init_private, jax.random.key(0))
    client, steps = jax.tree.map(lambda x: x[0], clients.buckets[0]), jax.ShapeDtypeStruct((), jnp.int32)
    output = jax.eval_shape(entry.algorithm.client_update, shared, private, client, steps, jax.random.key(0))
    total = jax.eval_shape(lambda: zero_total(output.update))
    assert jax.tree.structure(total) == jax.tree.structure(shared)
    assert [x.shape for x in jax.tree.leaves(total)] == [x.shape for x in jax.tree.leaves(shared)]
    assert jax.tree.structure(output.private) == jax.tree.structure(private)
    assert [x.shape for x in jax.tree.leaves(output.private)] == [x.shape for x in jax.tree.leaves(private)]


@pytest.mark.parametrize("name", NAMES)
def test_clients_outside_the_cohort_have_no_influence_and_stay_as_they_are(name):
    """Bit for bit, even where their private parameters are NaN: on the server, the metrics and each other."""
    entry, rounds, sampler = made(name)
    if entry.everyone:
        pytest.skip("all clients take part in each round")
    outside = ~np.asarray(sampler.draw(keys().cohort, 0))
    assert 2 <= outside.sum() <= len(outside) - 2

    def others_are(value):
        def change(x):
            is_outside = jnp.asarray(outside).reshape(-1, *[1] * (x.ndim - 1))
            return jnp.where(is_outside, value, x) if x.dtype == jnp.float32 else x

        return lambda private: jax.tree.map(change, private)

    server, _, private = run(rounds)
    for value in (12345.678, np.nan):
        server_again, before, private_again = run(rounds, change=others_are(value))
        assert equal(server, server_again)
        for x, y, z in zip(*map(jax.tree.leaves, (before, private, private_again)), strict=True):
            np.testing.assert_array_equal(z[outside], x[outside])
            np.testing.assert_array_equal(z[~outside], y[~outside])
    trained = [
        np.any((new != old).reshape(len(outside), -1), 1)
        for new, old in zip(floats(private), floats(before), strict=True)
    ]
    assert not trained or np.all(np.any(trained, 0)[~outside])  # and the cohort did train


@pytest.mark.parametrize("name", NAMES)
def test_private_values_do_not_appear_on_the_server(name):
    """Every private number is a marker; none of them, nor one of the trained ones, is in the state or the sum."""
    _, rounds, _ = made(name)

    def mark(x):
        return x * 0 + 0.1234567 if x.dtype == jnp.float32 else x

    (state, _), before, private = run(rounds, change=lambda private: jax.tree.map(mark, private))
    secrets = np.concatenate([np.zeros(0), *map(np.ravel, floats((before, private)))])
    public = np.concatenate([np.zeros(0), *map(np.ravel, floats(state))])
    assert not np.any(np.isin(public[public != 0], secrets))


@pytest.mark.parametrize("name", NAMES)
def test_chunks_and_buckets_change_nothing(name):
    one, _, private = run(made(name)[1], NUM_ROUNDS)
    other, _, private_too = run(made(name, chunk_size=1, num_buckets=2)[1], NUM_ROUNDS)
    for a, b in zip(floats((one, private)), floats((other, private_too)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(name, tmp_path):
    """Through a checkpoint on disk, bit for bit."""
    _, rounds, _ = made(name)
    expected = rounds.run(*rounds.init(jax.random.key(0)), keys(), NUM_ROUNDS)[:2]
    state, private, _ = rounds.run(*rounds.init(jax.random.key(0)), keys(), 1)
    checkpoint.save(tmp_path, checkpoint.Checkpoint(state, private, keys(), None, {"round": 1}, {}, ""))
    saved = checkpoint.restore(tmp_path, state=state, private=private)
    again = rounds.run(saved.state, saved.private, saved.keys, NUM_ROUNDS - 1)[:2]
    assert equal(jax.device_get(expected), jax.device_get(again))


@cache
def cohorts():
    """Cohort keys by who takes part, for neighbouring cohorts."""
    draw = jax.jit(jax.vmap(lambda seed: ragged().sampler.draw(jax.random.key(seed), 0)))
    masks = np.asarray(draw(jnp.arange(60_000)))
    return {tuple(mask): seed for seed, mask in enumerate(masks)}


@pytest.mark.parametrize("name", NAMES)
def test_one_user_moves_the_sum_by_no_more_than_the_clip_norm_or_dp_is_refused(name):
    """With and without a user, all else equal: the distance of the two sums before noise, over tables and dense."""
    entry, rounds, _ = made(name)
    algorithm = entry.algorithm
    if algorithm.individual or algorithm.no_dp:
        clients, sampler = population(entry, ragged())
        reason = "single uploads" if algorithm.individual else "DP is refused"
        with pytest.raises(ValueError, match=reason):
            make_rounds(algorithm, user_level_dp(l2_clip_norm=1.0, noise_multiplier=1.0), sampler, clients)
        return
    assert rounds.private
    state, private, _ = rounds.run(*rounds.init(jax.random.key(0)), keys(), NUM_ROUNDS)
    state = state._replace(round=jnp.zeros((), jnp.int32))

    def pre_noise_sum(mask):
        run_keys = RoundKeys(jax.random.key(cohorts()[tuple(mask)]), *keys()[1:])
        after, _, metrics = rounds.run(*jax.tree.map(jnp.array, (state, private)), run_keys, 1)
        assert metrics["cohort_size"][0] == np.sum(mask)
        return jax.device_get(before_noise(after))

    rng, distances = np.random.default_rng(0), []
    while len(distances) < 8:
        without = rng.random(13) < 0.4
        user = rng.integers(13)
        without[user] = False
        with_user = without | (np.arange(13) == user)
        if tuple(without) in cohorts() and tuple(with_user) in cohorts():
            pair = pre_noise_sum(with_user), pre_noise_sum(without)
            apart = jax.tree.map(lambda a, b: np.square(a.astype(np.float64) - b).sum(), *pair)
            distances.append(np.sqrt(sum(jax.tree.leaves(apart))))
    sends = bool(jax.tree.leaves(state.shared))
    assert max(distances) <= CLIP * (1 + 1e-5)
    assert max(distances) > 0.99 * CLIP or not sends  # and reaches it, or the bound was not tested


FOUR_DEVICES = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
sys.path.insert(0, sys.argv[1])
import numpy as np
from test_contract import METHODS, NUM_ROUNDS, floats, made, run

ends = {}
for name in METHODS:
    ends[name], _, private = run(made(name, num_shards=4)[1], NUM_ROUNDS)
    ends[name] = floats((ends[name], jax.tree.map(lambda x: x[:13], private)))
np.savez(sys.argv[2], **{f"{name} {i}": x for name, leaves in ends.items() for i, x in enumerate(leaves)})
"""


@pytest.fixture(scope="module")
def on_four_devices(tmp_path_factory):
    """Every number after some rounds, by method and place in the tree."""
    file = tmp_path_factory.mktemp("devices") / "ends.npz"
    command = [sys.executable, "-c", FOUR_DEVICES, str(Path(__file__).parent), str(file)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-3000:]
    return np.load(file)


@pytest.mark.parametrize("name", NAMES)
def test_four_devices_change_nothing(name, on_four_devices):
    """Noise and all: server, metrics and private parameters."""
    end, _, private = run(made(name)[1], NUM_ROUNDS)
    for index, leaf in enumerate(floats((end, private))):
        np.testing.assert_allclose(on_four_devices[f"{name} {index}"], leaf, rtol=1e-5, atol=1e-5)
