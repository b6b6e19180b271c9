"""Risk: a part of DPALS's release is more sensitive than its noise is for, or a sweep is not least squares."""

import dataclasses
from functools import cache

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_worlds import make_split
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from test_sensitivity import COHORTS, MILD, NUM_CLIENTS, PROBE, SAMPLER, cohorts, joint_norm, moved, users

import fedjax_rec as fr
from fedjax_rec.algorithms.dpals import Shares, dpals, dpals_score, frequency_weights, head_weights, pack, unpack
from fedjax_rec.data.clients import client_data, client_data_from_examples
from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.transforms import chain
from fedjax_rec.models.ials import train_ials
from fedjax_rec.models.user_solve import RatingScale, UserSolve, user_vectors
from fedjax_rec.privacy.mechanisms import clip_by_global_norm, gaussian_noise, user_level_dp

NUM_ITEMS, DIM, L2, UNOBSERVED = 9, 3, 0.5, 0.2
LENGTHS = (3, 0, 6, 1, 4, 9)
STARS = RatingScale(1.0, 5.0, 3.5)


@cache
def world():
    """Six users, one empty, one with everything."""
    rng = np.random.default_rng(1)
    lists = [rng.permutation(NUM_ITEMS)[:n].tolist() for n in LENGTHS]
    split = make_split(lists, [[] for _ in lists], num_items=NUM_ITEMS)
    ratings = rng.integers(1, 6, split.train.num_interactions).astype(np.float32)
    return dataclasses.replace(split, train=dataclasses.replace(split.train, ratings=ratings))


def clients(ratings=None, *, strange=False):
    """The population; strange ones have ratings that are NaN (client 4), infinite and huge."""
    data = client_data(world(), use_ratings=ratings is not None, num_buckets=1)
    if not strange:
        return data
    (bucket,) = data.buckets
    labels = np.array(bucket.labels)
    for client, place, rating in ((4, 1, np.nan), (0, 0, np.inf), (2, 3, 1e30), (2, 4, -np.inf)):
        labels[np.flatnonzero(bucket.client_id == client), place] = rating
    return dataclasses.replace(data, buckets=(dataclasses.replace(bucket, labels=labels),))


def method(**options):
    settings = {"dim": DIM, "l2": L2, "unobserved_weight": UNOBSERVED, "max_user_norm": 100.0} | options
    return dpals(NUM_ITEMS, **({"cohort_size": NUM_CLIENTS, "max_items_per_user": NUM_ITEMS} | settings))


def keys(noise=3):
    return RoundKeys(*(jax.random.key(seed) for seed in (1, 2, noise)))


def rounds_of(algorithm, links=None, *, data=None, sampler=None):
    sampler = full_participation(NUM_CLIENTS) if sampler is None else sampler
    return make_rounds(algorithm, links or chain(), sampler, data or clients(), span_size=3, chunk_size=4)


def start(rounds, items):
    """Server state with these item vectors, and the private state."""
    state, private = rounds.init(jax.random.key(0))
    tables = state.shared.tables | {"item": jnp.asarray(items, jnp.float32)}
    dense = {name: jnp.asarray(items.T @ items, jnp.float32) for name in state.shared.dense}
    return state._replace(shared=state.shared._replace(tables=tables, dense=dense)), private


def items_of(seed=0):
    return np.asarray(0.1 / np.sqrt(DIM) * jax.random.normal(jax.random.key(seed), (NUM_ITEMS, DIM)))


def test_without_noise_and_clips_it_is_ials():
    """Three sweeps from the same start, whatever the shares and the bounds, as long as those are not reached."""
    settings = {"l2": L2, "unobserved_weight": UNOBSERVED, "frequency_exponent": 0.0}
    expected = train_ials(world().train, dim=DIM, num_sweeps=3, **settings)
    algorithm = method(shares=Shares(1.0, 4.0, 0.5), max_user_norm=7.0, max_items_per_user=20)
    rounds = rounds_of(algorithm, user_level_dp(l2_clip_norm=1.0, noise_multiplier=0.0))
    state, private, metrics = rounds.run(*start(rounds, items_of()), keys(), 3)
    np.testing.assert_allclose(state.shared.tables["item"], expected.item_vectors, atol=1e-4)
    np.testing.assert_allclose(private["user"], expected.user_vectors, atol=1e-4)
    assert np.all(np.asarray(metrics["clipped"][:3]) == 0)
    assert np.linalg.norm(expected.item_vectors) > 1.0
    scores = np.asarray(jax.vmap(dpals_score, in_axes=(None, 0))(state.shared, private))
    np.testing.assert_allclose(scores, expected.user_vectors @ expected.item_vectors.T, atol=1e-3)


def test_explicit_ratings_without_noise_are_ridge_regressions():
    """A sweep by hand on centred ratings, without zeros for the rest, where no part of the budget goes to K."""
    algorithm = method(ratings=STARS, unobserved_weight=0.0)
    rounds = rounds_of(algorithm, data=clients(STARS))
    state, private, _ = rounds.run(*start(rounds, items_of()), keys(), 1)
    train, items = world().train, items_of().astype(np.float64)
    found = np.zeros((NUM_CLIENTS, DIM))
    targets = np.full((NUM_CLIENTS, NUM_ITEMS), np.nan)
    targets[train.user_ids, train.item_ids] = train.ratings - STARS.mean
    has = ~np.isnan(targets)

    def ridge(vectors, wanted):
        return np.linalg.solve(vectors.T @ vectors + L2 * np.eye(DIM), vectors.T @ wanted)

    for u in range(NUM_CLIENTS):
        found[u] = ridge(items[has[u]], targets[u, has[u]])
    np.testing.assert_allclose(private["user"], found, atol=1e-5)
    expected = [ridge(found[has[:, i]], targets[has[:, i], i]) for i in range(NUM_ITEMS)]
    np.testing.assert_allclose(state.shared.tables["item"], expected, atol=1e-5)
    assert not state.shared.dense


def test_the_light_form_solves_one_matrix_for_all_items():
    shares = Shares(gram=0.0)
    rounds = rounds_of(method(shares=shares, observed_weight=0.0))
    state, private, _ = rounds.run(*start(rounds, items_of()), keys(), 1)
    has = np.zeros((NUM_CLIENTS, NUM_ITEMS))
    has[world().train.user_ids, world().train.item_ids] = 1.0
    items = items_of().astype(np.float64)
    vectors = np.linalg.solve(UNOBSERVED * items.T @ items + L2 * np.eye(DIM), items.T @ has.T).T
    np.testing.assert_allclose(private["user"], vectors, atol=1e-5)
    expected = np.linalg.solve(UNOBSERVED * vectors.T @ vectors + L2 * np.eye(DIM), vectors.T @ has).T
    np.testing.assert_allclose(state.shared.tables["item"], expected, atol=1e-5)
    assert set(state.shared.tables) == {"item"}


# Sensitivity, through the real round. Without the clip the same must hold: statistics are scaled to fit.

PLANS = {
    "three parts": {},
    "light": {"shares": Shares(0.0, 3.0, 1.0), "recency": 2.0},
    "ratings": {"item_weights": np.geomspace(1e-3, 1.0, NUM_ITEMS), "max_rows": 4, "ratings": STARS},
}
NOISY = chain(clip_by_global_norm(1.0), gaussian_noise(1.0), PROBE)


@pytest.fixture(scope="module", params=PLANS)
def private_rounds(request):
    ratings = PLANS[request.param].get("ratings")
    algorithm = method(max_user_norm=0.3, max_items_per_user=2, **PLANS[request.param])
    data = clients(ratings, strange=ratings is not None)
    return rounds_of(algorithm, NOISY, data=data, sampler=SAMPLER), ratings


def pre_noise_sum(rounds, items, mask):
    run_keys = RoundKeys(jax.random.key(COHORTS[tuple(mask)]), jax.random.key(0), jax.random.key(1))
    state, _, metrics = rounds.run(*start(rounds, items), run_keys)
    assert metrics["cohort_size"][0] == np.sum(mask)
    assert metrics["clipped"][0] == 0 or not np.all(np.isfinite(items))  # the clip never acts
    return jax.device_get(state.transforms[2])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    items=hnp.arrays(np.float32, (NUM_ITEMS, DIM), elements=MILD | st.sampled_from([0.0, 1e-3, 30.0, np.nan])),
    cohort=cohorts,
    user=users,
)
def test_one_user_moves_the_joint_statistics_by_at_most_one(private_rounds, items, cohort, user):
    """25 neighbouring cases a plan, all parts together, for any item vectors; a client with a NaN moves nothing."""
    rounds, ratings = private_rounds
    masks = np.where(np.arange(NUM_CLIENTS) == user, [[True], [False]], cohort)
    sums = [pre_noise_sum(rounds, items, mask) for mask in masks]
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(sums))
    assert moved(*sums) <= 1 + 1e-5
    if LENGTHS[user] == 0 or (user == 4 and ratings):
        assert moved(*sums) < 1e-6


def test_the_bound_is_reached_and_its_shares_are_kept():
    """A user who is clipped in every way, ratings too, moves each part by the root of its share."""
    shares, data = Shares(1.0, 2.0, 5.0), clients(STARS)
    (bucket,) = data.buckets
    labels = np.where(bucket.client_id[:, None] == LENGTHS.index(9), np.float32(-7), bucket.labels)
    data = dataclasses.replace(data, buckets=(dataclasses.replace(bucket, labels=labels),))
    algorithm = method(max_user_norm=1e-3, max_items_per_user=2, shares=shares, ratings=STARS)
    rounds = rounds_of(algorithm, NOISY, data=data, sampler=SAMPLER)
    masks = np.array([[0, 0, 1, 0, 0, 1], [0, 0, 1, 0, 0, 0]], bool)
    change = jax.tree.map(lambda a, b: a - b, *(pre_noise_sum(rounds, items_of(), mask) for mask in masks))
    parts = [joint_norm(change.tables["item_gram"]), joint_norm(change.tables["item"]), joint_norm(change.dense)]
    np.testing.assert_allclose(np.square(parts), np.array(shares) / sum(shares), rtol=1e-3)
    assert 0.999 < joint_norm(change) <= 1 + 1e-6


# Noise and its account.


def test_the_noise_of_the_released_matrices_is_what_the_chain_says():
    """KS over the released A_i, in their own units: z sqrt(k) R^2 over the root of the share; others are rejected."""
    num_items, k, norm, z = 3000, 2.0, 0.7, 1.3
    algorithm = dpals(
        num_items,
        cohort_size=NUM_CLIENTS,
        dim=7,
        max_user_norm=norm,
        max_items_per_user=k,
        shares=Shares(1.0, 2.0, 1.0),
    )
    one = (np.arange(3), np.ones(3))
    data = client_data_from_examples([one] * NUM_CLIENTS, num_items=num_items)
    bucket = dataclasses.replace(data.buckets[0], row_ids=None, slots=None)  # its items are distinct
    data = dataclasses.replace(data, buckets=(bucket,))
    links = chain(clip_by_global_norm(1.0), gaussian_noise(z), PROBE)
    rounds = rounds_of(algorithm, links, data=data)
    state, _, _ = rounds.run(*rounds.init(jax.random.key(0)), keys())
    scale = np.sqrt(0.25) / (np.sqrt(k) * norm**2)
    noise = np.asarray(state.shared.tables["item_gram"]) - np.asarray(state.transforms[2].tables["item_gram"]) / scale
    stddev = z * np.sqrt(k) * norm**2 / np.sqrt(0.25)
    accepted = {factor: stats.kstest(noise.ravel() / (stddev * factor), "norm").pvalue for factor in (1, 2 / 3, 3 / 2)}
    assert accepted[1] > 1e-3
    assert max(accepted[2 / 3], accepted[3 / 2]) < 1e-9


def test_the_ledger_composes_sweeps_and_popularity():
    """T sweeps at z, and counts at z', are one Gaussian; against the analytic formula."""
    rounds = rounds_of(method(), user_level_dp(l2_clip_norm=1.0, noise_multiplier=3.0))
    ledger = rounds.charge(fr.Ledger(), first_round=0, num_rounds=2)
    ledger = rounds.charge(ledger, first_round=2, num_rounds=1)
    ledger = ledger.record(dp_accounting.GaussianDpEvent(8.0), phase="popularity", released="counts of items")
    together = (3 / 3.0**2 + 1 / 8.0**2) ** -0.5
    expected = dp_accounting.get_epsilon_gaussian(together, 1e-5)
    np.testing.assert_allclose(ledger.spent(1e-5).epsilon, expected, rtol=1e-3)


# Weights, heads, and what clients do after training.


def test_items_outside_the_head_are_nobodys():
    """Zero vectors, whatever the noise; and a flood of noise leaves the others finite."""
    weights = head_weights(np.array([1, 4, 5]), NUM_ITEMS, weights=frequency_weights(np.arange(9.0), exponent=-0.25))
    assert np.all((np.asarray(weights) > 0) == np.isin(np.arange(9), [1, 4, 5]))
    rounds = rounds_of(method(item_weights=weights), chain(clip_by_global_norm(1.0), gaussian_noise(1e6), PROBE))
    state, _, _ = rounds.run(*rounds.init(jax.random.key(0)), keys(), 3)
    outside = np.asarray(weights) == 0
    assert not np.any(np.asarray(state.shared.tables["item"])[outside])
    assert not np.any(np.asarray(state.transforms[2].tables["item_gram"])[outside])
    assert np.all(np.any(np.asarray(state.shared.tables["item"])[~outside], axis=1))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state.shared))


def test_frequency_weights_fall_with_frequency():
    weights = frequency_weights(np.array([-3.0, 1.0, 16.0, 81.0]), exponent=-0.25)
    np.testing.assert_allclose(weights, [1.0, 1.0, 1 / 2, 1 / 3], rtol=1e-6)
    np.testing.assert_array_equal(frequency_weights(np.array([-3.0, 9.0]), exponent=0.0), 1.0)


def test_drawn_rows_are_distinct_items_of_the_client():
    algorithm = method(max_rows=4)
    received = algorithm.init(jax.random.key(0)).shared
    (bucket,) = clients().buckets
    update = jax.jit(algorithm.client_update)
    seen = set()
    for seed in range(5):
        for row in range(NUM_CLIENTS):
            client = jax.tree.map(lambda x, row=row: jnp.asarray(x[row]), bucket)
            rows = update(received, (), client, 1, jax.random.key(seed)).update.tables["item"]
            ids = np.asarray(rows.ids)[np.any(rows.values, axis=1)]
            own = set(np.asarray(client.item_ids)[: int(client.length)].tolist())
            assert len(ids) == len(set(ids.tolist())) == min(4, len(own))
            assert set(ids.tolist()) <= own
            seen.add((row, tuple(sorted(ids.tolist()))))
    assert len(seen) > NUM_CLIENTS  # and not always the same ones


@pytest.mark.parametrize("recency", [np.inf, 1.5])
def test_users_solve_for_themselves_after_training(recency):
    """From the last items, weighing recent ones more if they like: against normal equations by hand."""
    algorithm = method()
    received = algorithm.init(jax.random.key(3)).shared
    found = user_vectors(received, clients(), UserSolve(L2, UNOBSERVED, recency=recency))
    items, train = np.asarray(received.tables["item"], np.float64), world().train
    for user in range(NUM_CLIENTS):
        own = train.item_ids[train.offsets[user] : train.offsets[user + 1]]
        fresh = np.exp(-np.arange(len(own))[::-1] / recency)
        left = UNOBSERVED * items.T @ items + L2 * np.eye(DIM) + (items[own].T * fresh) @ items[own]
        np.testing.assert_allclose(found[user], np.linalg.solve(left, fresh @ items[own]), atol=1e-5)
    assert not np.any(found[LENGTHS.index(0)])


def test_packing_keeps_norms_and_comes_back():
    vectors = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    matrices = vectors[:, :, None] * vectors[:, None, :]
    packed = jax.vmap(pack)(matrices)
    np.testing.assert_allclose(np.linalg.norm(packed, axis=1), np.square(vectors).sum(1), rtol=1e-5)
    np.testing.assert_allclose(unpack(packed, 5), matrices, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"l2": 0.0}, "positive, finite l2; got 0"),
        ({"max_user_norm": np.inf}, "positive, finite max_user_norm"),
        ({"max_items_per_user": -1}, "positive, finite max_items_per_user"),
        ({"shares": Shares(right=0.0)}, r"positive, finite shares.right"),
        ({"shares": Shares(gram=-1.0)}, "must not be negative"),
        ({"unobserved_weight": 0.0, "shares": Shares(gram=0.0)}, "no left side"),
        ({"item_weights": np.ones(3)}, r"must have shape \[9\]"),
    ],
)
def test_settings_without_a_meaning_refuse(wrong, words):
    with pytest.raises(ValueError, match=words):
        method(**wrong)


def test_repeated_items_refuse():
    data = client_data_from_examples([(np.zeros(2, np.int64), np.ones(2))] * NUM_CLIENTS, num_items=NUM_ITEMS)
    with pytest.raises(ValueError, match="each item of a client once"):
        rounds_of(method(), data=data).run(*rounds_of(method()).init(jax.random.key(0)), keys())
