"""Risk: a compressor that is said to be linear, unbiased or short is not, and sums, bounds or byte counts are wrong."""

from functools import cache

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from test_sensitivity import (
    CLIP,
    COHORTS,
    NUM_CLIENTS,
    NUM_ITEMS,
    PROBE,
    SAMPLER,
    TOLERANCE,
    adversaries,
    cohorts,
    joint_norm,
    moved,
    nothing_but_clients,
    uploads,
    users,
    with_and_without,
)

from fedjax_rec.compression.item_subset import draw_systematically, inclusion_probs, item_subset
from fedjax_rec.compression.low_rank import low_rank
from fedjax_rec.compression.rand_k import rand_k
from fedjax_rec.compression.sketch import count_sketch
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.rows import Rows, is_rows, to_dense, zero_total
from fedjax_rec.federated.transforms import UNBOUNDED, Bound, RoundContext, UpdateTransform, chain, plain_wire
from fedjax_rec.models.base import Shared
from fedjax_rec.privacy.laplace import clip_by_l1_norm
from fedjax_rec.privacy.mechanisms import clip_by_global_norm, gaussian_noise

N, DIM, K = 12, 4, 3
WEIGHTS = 1.0 + np.arange(N) ** 2
LINKS = {
    "rand_k": rand_k(0.25),
    "item_subset": item_subset(0.25),
    "item_subset by weights": item_subset(0.25, weights=WEIGHTS),
    "count_sketch": count_sketch(3, depth=2),
    "low_rank": low_rank(2),
    "low_rank of all rows": low_rank(2, all_rows=True),
}
PARAMS = Shared(
    {"item": jnp.zeros((N, DIM)), "bias": jnp.zeros((N, 1))}, {"out": jnp.zeros((2, 4)), "one": jnp.zeros(())}
)


def context(params=PARAMS):
    return RoundContext(params, jnp.ones(2, bool), jnp.zeros((), jnp.int32))


def client_rows(ids, dim, seed):
    values = np.random.default_rng(seed).normal(size=(len(ids), dim)) * (np.asarray(ids) < N)[:, None]
    return Rows(jnp.asarray(ids, jnp.int32), jnp.asarray(values, jnp.float32), N)


def example(seed=0):
    """Five rows, of which one is padding."""
    rng = np.random.default_rng(seed)
    tables = {"item": client_rows([4, 0, 11, 7, N], DIM, seed), "bias": client_rows([4, 0, 11, 7, N], 1, seed + 1)}
    return Shared(tables, {"out": jnp.asarray(rng.normal(size=(2, 4)), jnp.float32), "one": jnp.float32(0.5)})


def through(link, update, key):
    """What clients of one round send, and what the server makes of it."""
    prepared = link.prepare((), context(), key)
    sent = to_dense(link.client(update, prepared, jax.random.key(0))[0])
    total, state = link.server(sent, prepared, jax.random.key(1))
    assert state == ()
    return sent, total


once = jax.jit(through, static_argnums=0)
many = jax.jit(jax.vmap(through, in_axes=(None, 0, 0)), static_argnums=0)
COMPILED = [name for name in LINKS if "all" not in name]
NUM_KEYS = 10_000


def flat(tree):
    """float64 ``[NUM_KEYS, numbers]``."""
    return np.concatenate([np.asarray(x, np.float64).reshape(NUM_KEYS, -1) for x in jax.tree.leaves(tree)], 1)


@cache
def estimates(name):
    """Estimates of one update under so many public keys, and the update itself."""
    updates = jax.tree.map(lambda x: jnp.broadcast_to(x, (NUM_KEYS, *x.shape)), example())
    _, totals = many(LINKS[name], updates, jax.random.split(jax.random.key(3), NUM_KEYS))
    return flat(totals), np.concatenate([np.ravel(x) for x in jax.tree.leaves(to_dense(example()))]).astype(np.float64)


@pytest.mark.parametrize("name", COMPILED)
def test_the_mean_over_public_keys_is_the_update(name):
    """Within 3 standard errors along the update over 10,000 keys, and within 5 in each number."""
    found, truth = estimates(name)
    along = found @ truth / (truth @ truth)
    assert abs(along.mean() - 1) < 3 * along.std() / np.sqrt(len(along)) + 1e-6
    error = found.std(0) / np.sqrt(len(found))
    assert np.all(np.abs(found.mean(0) - truth) < 5 * error + 1e-6)
    assert np.abs(found - truth).max() > 0.1  # it does compress


@pytest.mark.parametrize("name", COMPILED)
def test_what_stands_in_padding_is_not_sent(name):
    def dirty(rows):
        return Rows(rows.ids, jnp.where((rows.ids == N)[:, None], jnp.nan, rows.values), N)

    update = example()._replace(tables={table: dirty(rows) for table, rows in example().tables.items()})
    updates = jax.tree.map(lambda x: jnp.broadcast_to(x, (NUM_KEYS, *x.shape)), update)
    _, totals = many(LINKS[name], updates, jax.random.split(jax.random.key(3), NUM_KEYS))
    np.testing.assert_array_equal(flat(totals), estimates(name)[0])


@pytest.mark.parametrize("name", ["rand_k", "item_subset", "count_sketch", "low_rank"])
def test_the_error_is_as_long_as_documented(name):
    """(n / k - 1), (n / width - 1) / depth and (dim / rank - 1) times the squared norm of the item table."""
    factor = {"rand_k": 3, "item_subset": 3, "count_sketch": 1.5, "low_rank": 1}[name]
    found, truth = estimates(name)
    item = slice(N, N + N * DIM)  # after "bias"
    assert joint_norm(truth[item]) == pytest.approx(joint_norm(to_dense(example().tables["item"])), rel=1e-6)
    error = np.square(found[:, item] - truth[item]).sum(1).mean()
    assert error == pytest.approx(factor * np.square(truth[item]).sum(), rel=0.03)


def test_nothing_is_lost_where_everything_is_sent():
    for link in (rand_k(1.0), low_rank(DIM)):
        _, total = once(link, example(), jax.random.key(0))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), total, to_dense(example()))
    _, plain = once(item_subset(0.25, unbiased=False), example(), jax.random.key(0))
    kept = np.any(np.asarray(plain.tables["item"]), 1)
    assert kept.sum() <= K
    np.testing.assert_array_equal(plain.tables["item"][kept], to_dense(example()).tables["item"][kept])
    np.testing.assert_array_equal(plain.dense["out"], example().dense["out"])


def test_a_median_follows_a_large_row():
    row = Rows(jnp.array([3]), jnp.full((1, DIM), 9.0), N)
    update = Shared({"item": row, "bias": client_rows([N], 1, 0)}, PARAMS.dense)
    _, total = once(count_sketch(3, depth=3, estimate="median"), update, jax.random.key(2))
    np.testing.assert_allclose(total.tables["item"][3], 9.0)


@pytest.mark.parametrize("name", LINKS)
def test_the_wire_is_what_clients_send(name):
    link, update = LINKS[name], example()
    prepared = jax.eval_shape(link.prepare, (), context(), jax.random.key(0))
    sent, _ = jax.eval_shape(link.client, update, prepared, jax.random.key(0))
    leaves = jax.tree.leaves(sent, is_leaf=is_rows)
    wire = link.upload(plain_wire(update), update)
    assert wire.numbers == sum((x.values if is_rows(x) else x).size for x in leaves)
    assert wire.side_bits == sum(32 * x.ids.size for x in leaves if is_rows(x))
    assert wire.total < plain_wire(update).total or "all" in name
    with_scale = link.upload(plain_wire(update)._replace(bits=16.0, side_bits=2 * 5 * 32 + 7.0), update)
    assert (with_scale.bits, with_scale.side_bits) == (16.0, wire.side_bits + 7.0)  # what others have added stays
    assert link.download(plain_wire(update), update) == plain_wire(update)


def test_exact_bits():
    def total(link):
        return link.upload(plain_wire(example()), example()).total

    assert plain_wire(example()).total == 32 * (5 * DIM + 5 + 8 + 1) + 32 * 10
    assert total(rand_k(0.25)) == 32 * (K * DIM + K + 2 + 1)
    assert total(item_subset(0.25)) == total(item_subset(0.25, weights=WEIGHTS)) == 32 * (K * DIM + K + 8 + 1)
    assert total(count_sketch(3, depth=2)) == 32 * (6 * DIM + 6 + 8 + 1)
    assert total(low_rank(2)) == 32 * (5 * 2 + 5 + 8 + 1) + 32 * 10
    assert total(low_rank(2, all_rows=True)) == 32 * (N * 2 + N + 8 + 1)


def test_clients_can_receive_the_subset_alone():
    link = item_subset(0.25, weights=WEIGHTS, receive=True)
    params = jax.tree.map(jnp.ones_like, PARAMS)
    prepared = link.prepare((), context(params), jax.random.key(0))
    received = link.broadcast(params, prepared)
    drawn = np.zeros(N, bool)
    drawn[prepared["item"].ids] = True
    assert drawn.sum() == K
    for table in received.tables.values():
        np.testing.assert_array_equal(table, np.broadcast_to(drawn[:, None], table.shape))
    np.testing.assert_array_equal(received.dense["out"], 1.0)
    assert link.download(plain_wire(example()), example()).total == 32 * (K * DIM + K + 8 + 1)


def test_items_are_drawn_with_the_probabilities_that_the_server_divides_by():
    probs = inclusion_probs(WEIGHTS, K)
    assert probs.sum() == pytest.approx(K)
    uncapped = probs < 1
    assert 0 < uncapped.sum() < N or np.allclose(probs / WEIGHTS, probs[0] / WEIGHTS[0])
    np.testing.assert_allclose((probs / WEIGHTS)[uncapped], (probs / WEIGHTS)[uncapped][0])
    heavy = inclusion_probs([100.0, 1, 1, 1], 2)
    np.testing.assert_allclose(heavy, [1, 1 / 3, 1 / 3, 1 / 3])
    draws = jax.vmap(lambda key: draw_systematically(key, probs))(jax.random.split(jax.random.key(0), 20_000))
    drawn = np.asarray(draws.place) < K
    np.testing.assert_array_equal(drawn.sum(1), K)
    np.testing.assert_array_equal(np.take_along_axis(np.asarray(draws.place), np.asarray(draws.ids), 1)[:100, 0], 0)
    assert np.all(np.abs(drawn.mean(0) - probs) < 5 * np.sqrt(probs * (1 - probs) / 20_000) + 1e-9)


# Bounds and sums, through the real round with clients that send whatever they like.

SMALL = {
    "rand_k": rand_k(0.5),
    "item_subset": item_subset(0.5),
    "count_sketch": count_sketch(2, depth=2),
    "low_rank": low_rank(1, all_rows=True),
}


def sent_probe(link):
    """Keeps the sum as clients sent it."""

    def init(params):
        context = RoundContext(params, jnp.ones(NUM_CLIENTS, bool), jnp.zeros((), jnp.int32))
        prepared = jax.eval_shape(link.prepare, (), context, jax.random.key(0))
        sent, _ = jax.eval_shape(link.client, params, prepared, jax.random.key(0))
        return zero_total(sent)

    return UpdateTransform(init=init, server=lambda total, *_: (total, total))


def links_of(name):
    """The link and a clip, in the order that has a bound."""
    clip = clip_by_global_norm(CLIP)
    return (SMALL[name], clip) if name == "count_sketch" else (clip, SMALL[name])


@cache
def small_rounds(name):
    transforms = chain(PROBE, *links_of(name), sent_probe(SMALL[name]))
    return make_rounds(adversaries(), transforms, SAMPLER, nothing_but_clients(), span_size=2)


def sums(rounds, private, cohort, num_rounds=1):
    """What the server made of the sum, and the sum as it was sent."""
    keys = RoundKeys(jax.random.key(COHORTS[tuple(cohort)]), jax.random.key(0), jax.random.key(1))
    state, _ = rounds.init(jax.random.key(0))
    state, _, metrics = rounds.run(state, jax.tree.map(jnp.array, private), keys, num_rounds)
    assert metrics["cohort_size"][0] == np.sum(cohort)
    return jax.device_get((state.transforms[0], state.transforms[-1]))


@pytest.mark.parametrize("name", SMALL)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(sent=uploads, cohort=cohorts, user=users)
def test_one_user_moves_what_is_summed_by_no_more_than_the_bound(name, sent, cohort, user):
    """With and without a client that sends anything."""
    assert chain(*links_of(name)).sensitivity(UNBOUNDED).l2 == CLIP
    pair = [sums(small_rounds(name), sent, mask)[1] for mask in with_and_without(cohort, user)]
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(pair))
    assert moved(*pair) <= CLIP * (1 + TOLERANCE)


def plain_uploads():
    rng = np.random.default_rng(0)
    shapes = {"values": (NUM_CLIENTS, 5, 2), "dense": (NUM_CLIENTS, 3)}
    ids = np.stack([rng.permutation(NUM_ITEMS)[:5] for _ in range(NUM_CLIENTS)]).astype(np.int32)
    return {"ids": ids} | {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", SMALL)
def test_the_sum_of_what_clients_send_is_what_the_sum_would_send(name):
    """Two clients together against each alone, on the wire and decoded; so they had the round's draws in common."""
    rounds = small_rounds(name)
    clients = np.arange(NUM_CLIENTS)
    one, other, both = (sums(rounds, plain_uploads(), mask) for mask in (clients == 1, clients == 4, clients % 3 == 1))
    assert joint_norm(both[1]) > 0.01
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a + b, c, atol=1e-6), one, other, both)


@pytest.mark.parametrize("name", SMALL)
def test_each_round_draws_anew_and_a_resumed_one_draws_the_same(name):
    rounds = small_rounds(name)
    everyone = np.ones(NUM_CLIENTS, bool)
    keys = RoundKeys(jax.random.key(COHORTS[tuple(everyone)]), jax.random.key(0), jax.random.key(1))
    private = jax.tree.map(jnp.array, plain_uploads())
    state, private, _ = rounds.run(rounds.init(jax.random.key(0))[0], private, keys)
    first = jax.device_get(state.transforms)
    again = jax.device_get(rounds.run(state, private, keys)[0].transforms)
    unbroken = rounds.run(rounds.init(jax.random.key(0))[0], jax.tree.map(jnp.array, plain_uploads()), keys, 2)[0]
    jax.tree.map(np.testing.assert_array_equal, again, jax.device_get(unbroken.transforms))
    assert moved(first, again) > 0.01


@pytest.mark.parametrize("name", COMPILED)
def test_norms_after_a_link_are_within_its_bound(name):
    """Of both kinds, over 10,000 updates from one large number to rows that are all alike."""
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((NUM_KEYS, N)), 1)[:, :5].astype(np.int32)
    alike = rng.random((NUM_KEYS, 1, 1)) < 0.5
    values = np.where(alike, 1.0, rng.normal(size=(NUM_KEYS, 5, DIM)) * (rng.random((NUM_KEYS, 5, DIM)) < 0.15))
    tables = {"item": Rows(jnp.asarray(ids), jnp.asarray(values, jnp.float32), N)}
    tables["bias"] = Rows(jnp.asarray(ids), jnp.asarray(values[..., :1], jnp.float32), N)
    dense = jax.tree.map(lambda x: jnp.ones((NUM_KEYS, *x.shape)), PARAMS.dense)
    before = np.concatenate([flat((tables["item"].values, tables["bias"].values, dense))], 1)
    keys = jax.random.split(jax.random.key(3), NUM_KEYS)
    after = flat(many(LINKS[name], Shared(tables, dense), keys)[0])
    l1, l2 = np.abs(before).sum(1), np.sqrt(np.square(before).sum(1))
    unit = LINKS[name].sensitivity(Bound(1.0, np.inf, integers=True))
    assert np.all(np.abs(after).sum(1) <= unit.l1 * l1 * (1 + TOLERANCE))
    assert np.all(np.sqrt(np.square(after).sum(1)) <= unit.l2 * l1 * (1 + TOLERANCE))
    longest = LINKS[name].sensitivity(Bound(np.inf, 1.0, noised=True))
    assert np.all(np.sqrt(np.square(after).sum(1)) <= longest.l2 * l2 * (1 + TOLERANCE))
    assert longest.noised
    assert unit.integers == (name != "low_rank")


@pytest.mark.parametrize("name", LINKS)
def test_noise_acts_on_what_is_summed(name):
    link, clip, noise = LINKS[name], clip_by_global_norm(0.5), gaussian_noise(1.0)
    assert link.linear
    event = dp_accounting.GaussianDpEvent(2.0)
    assert chain(link, clip, noise).dp_event(UNBOUNDED, 0) == event
    if name == "count_sketch":
        with pytest.raises(ValueError, match="put a clip before"):
            chain(clip, link, noise)
        l1 = chain(clip_by_l1_norm(0.5), link, noise).dp_event(UNBOUNDED, 0)
        assert l1.noise_multiplier == pytest.approx(2.0 / np.sqrt(2))
    else:
        assert chain(clip, link, noise).dp_event(UNBOUNDED, 0) == event
    with pytest.raises(ValueError, match="put the noise last"):
        chain(clip, noise, link)
    with pytest.raises(ValueError, match="put the noise last"):
        chain(chain(clip, noise), chain(link))


def test_rows_put_back_unscaled_may_meet_noise_on_either_side():
    link = item_subset(0.25, unbiased=False)
    assert chain(clip_by_global_norm(0.5), gaussian_noise(1.0), link).dp_event(UNBOUNDED, 0).noise_multiplier == 2.0


def test_clear_errors():
    for share in (0.0, 1.5, float("nan")):
        for link in (rand_k, item_subset):
            with pytest.raises(ValueError, match="above 0 and at most 1"):
                link(share)
    with pytest.raises(ValueError, match="rank must be at least 1; got 0"):
        low_rank(0)
    with pytest.raises(ValueError, match="rank 5 is more than the 4 numbers"):
        low_rank(DIM + 1).upload(plain_wire(example()), example())
    with pytest.raises(ValueError, match="width=0"):
        count_sketch(0)
    with pytest.raises(ValueError, match="mean, median"):
        count_sketch(2, estimate="mode")
    with pytest.raises(ValueError, match="6 x 2 = 12 rows is no smaller"):
        count_sketch(2, depth=6).upload(plain_wire(example()), example())
    with pytest.raises(ValueError, match="one positive, finite number"):
        item_subset(0.5, weights=[1.0, 0.0])
    with pytest.raises(ValueError, match="2 weights, and table 'item' has 12 rows"):
        item_subset(0.5, weights=[1.0, 2.0]).prepare((), context(), jax.random.key(0))


@pytest.mark.parametrize("second", ["rand_k", "item_subset", "count_sketch", "low_rank"])
def test_a_link_that_gets_no_whole_tables_says_so(second):
    first = low_rank(1) if second == "low_rank" else item_subset(0.5)
    both = chain(first, LINKS[second])
    prepared = jax.eval_shape(both.prepare, ((), ()), context(), jax.random.key(0))
    with pytest.raises(ValueError, match="earlier link sends something else"):
        jax.eval_shape(both.client, example(), prepared, jax.random.key(0))
