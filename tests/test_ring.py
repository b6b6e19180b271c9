"""Risk: an integer sum that overflows, is off on average, moves by more than its bound, or is counted too cheap."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from test_laplace import l1_norm
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

from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.round import make_rounds
from fedjax_rec.federated.rows import Rows, to_dense
from fedjax_rec.federated.transforms import UNBOUNDED, Bound, UpdateTransform, chain, plain_wire
from fedjax_rec.privacy.discrete import rounded_norm_bound
from fedjax_rec.privacy.mechanisms import clip_by_global_norm, gaussian_noise
from fedjax_rec.security import ring
from fedjax_rec.security.ring import check_headroom, fixed_point, from_words, ring_sum, to_words

NUM_KEYS = 10_000
STEPS = {"largest": 32767.0, "max_clients": 8}  # 16 bits, in steps of 1


def through(link, updates, seed=0):
    """The integers of each update, leading axis, under one public key; their metrics; the server's decoded sum."""

    @jax.jit
    def run(updates):
        public, own = jax.random.split(jax.random.key(seed))
        prepared = link.prepare((), None, public)
        keys = jax.random.split(own, len(jax.tree.leaves(updates)[0]))
        sent, metrics = jax.vmap(link.client, in_axes=(0, None, 0))(updates, prepared, keys)
        total = jax.tree.map(lambda x: x.sum(0), sent)
        return sent, metrics, link.server(total, prepared, jax.random.key(1))[0]

    return jax.device_get(run(updates))


# Words.


def test_what_could_overflow_or_is_too_coarse_is_refused():
    for bits, most in itertools.chain(((12, 2**20), (16, 2**16), (22, 2**10)), ((12, 1), (22, 1))):
        check_headroom(bits, most)
        assert most * (2 ** (bits - 1) - 1) < 2**31
    for bits, most in ((12, 2**20 + 1), (17, 2**16), (22, 2**10 + 1), (11, 2), (23, 2)):
        with pytest.raises(ValueError, match=rf"sum of {most} clients modulo 2\^32 has room for 12 to .* bits={bits}"):
            check_headroom(bits, most)
    with pytest.raises(ValueError, match="max_clients must be at least 1; got 0"):
        fixed_point(largest=1.0, max_clients=0)
    for largest in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="largest must be a positive number"):
            fixed_point(largest=largest, max_clients=2)
    with pytest.raises(ValueError, match="stochastic, nearest; got 'up'"):
        fixed_point(largest=1.0, max_clients=2, rounding="up")


WORDS, NUMBERS = jax.jit(to_words), jax.jit(from_words)
signed = st.integers(-(2**22) + 1, 2**22 - 1)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(values=hnp.arrays(np.int32, (8, 5), elements=signed), words=hnp.arrays(np.uint32, 5))
def test_sums_of_words_are_the_integers_own(values, words):
    """Eight clients' integers of either sign; and any words at all, as an unfinished secure sum has them."""
    sent = np.asarray(WORDS(values.astype(np.float32)))
    assert sent.dtype == np.uint32
    np.testing.assert_array_equal(sent, values.astype(np.int64) % 2**32)
    total = sent.sum(0, dtype=np.uint32)
    np.testing.assert_array_equal(NUMBERS(total), values.sum(0).astype(np.float32))
    np.testing.assert_array_equal(NUMBERS(words), words.view(np.int32).astype(np.float32))


# Rounding.

NORMAL = 3 * np.random.default_rng(0).normal(size=64).astype(np.float32)


def test_rounding_keeps_the_mean():
    """10,000 keys: each number within three standard errors, Bonferroni-corrected; nearest, the control, is not."""
    allowed = stats.norm.isf(stats.norm.sf(3) / len(NORMAL))
    many = np.broadcast_to(NORMAL, (NUM_KEYS, len(NORMAL)))
    sent, metrics, _ = through(fixed_point(**STEPS), many)
    assert np.array_equal(sent, np.floor(NORMAL) + (sent > NORMAL))  # up or down, and nowhere else
    errors = np.abs(sent.mean(0, np.float64) - NORMAL) / (sent.std(0, np.float64) / np.sqrt(NUM_KEYS))
    assert errors.max() < allowed
    clients = np.corrcoef(sent[:200] - NORMAL) - np.eye(200)
    assert abs(clients.mean()) < 0.01  # what one client's numbers have in common, another's have not
    assert not np.any(metrics["out_of_range"])
    nearest, _, total = through(fixed_point(rounding="nearest", **STEPS), many[:3])
    np.testing.assert_array_equal(nearest, np.broadcast_to(np.rint(NORMAL), (3, 64)))  # the same whatever the key
    np.testing.assert_array_equal(total, 3 * np.rint(NORMAL))


def test_rotated_sums_come_back():
    """The sum of three clients, each number within 7 of the rounding's standard deviations, tables written out."""
    rows = Rows(jnp.array([[3, 0, 5]] * 3), 40 * jax.random.normal(jax.random.key(0), (3, 3, 4)), 5)
    rows = Rows(rows.ids, rows.values.at[:, 2].set(0), 5)
    updates = {"dense": 40 * jax.random.normal(jax.random.key(1), (3, 5)), "item": rows}
    link = fixed_point(rotation=True, **STEPS)
    sent, _, total = through(link, updates)
    assert sent.vector.shape == (3, 32)
    assert np.array_equal(sent.vector, np.trunc(sent.vector))
    assert np.abs(sent.vector).max() < 250  # spread out
    wanted = jax.tree.map(lambda x: np.sum(x, 0), jax.vmap(to_dense)(updates))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=7 * math.sqrt(3 / 4)), total, wanted)
    other, _, again = through(link, updates, seed=1)
    assert np.mean(np.abs(other.vector - sent.vector) > 2) > 0.5  # signs are of the round
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=7 * math.sqrt(3 / 4)), again, wanted)


def test_numbers_that_do_not_fit():
    """NaN becomes zero, what is too large the largest; both are counted. Zeros and padding stay zeros."""
    values = np.array([[5.0, -7.0, np.nan, np.inf, -np.inf, 1.0, 0.0, -4.0]], np.float32)
    for rounding in ("stochastic", "nearest"):
        sent, metrics, total = through(fixed_point(largest=4.0, max_clients=8, rounding=rounding), values)
        limit = 32767
        np.testing.assert_array_equal(sent[0, [0, 1, 2, 3, 4, 6]], [limit, -limit, 0, limit, -limit, 0])
        np.testing.assert_allclose(sent[0, [5, 7]], [limit / 4, -limit], atol=1)
        assert metrics["out_of_range"][0] == 5 / 8
        np.testing.assert_allclose(total, sent[0] * (4.0 / limit), rtol=1e-6)


def test_rows_are_merged_before_they_are_rounded():
    """0.3 + 0.3 rounds to 1, and twice 0.3 to nothing."""
    rows = Rows(np.array([[2, 0, 2, 5]]), np.array([[[0.3], [0.7], [0.3], [0.0]]], np.float32), 5, unique=False)
    sent, _, _ = through(fixed_point(rounding="nearest", **STEPS), {"item": rows})
    assert sent["item"].unique
    np.testing.assert_array_equal(to_dense(jax.tree.map(lambda x: x[0], sent))["item"][:, 0], [1, 0, 1, 0, 0])
    padded = Rows(np.full((500, 2), 5), np.zeros((500, 2, 1), np.float32), 5)
    sent, _, _ = through(fixed_point(**STEPS), {"item": padded})
    assert not np.any(sent["item"].values)


def test_the_bound_is_met_by_redrawing(monkeypatch):
    """Half steps, the worst for the norm, and independent draws: some miss the bound."""
    monkeypatch.setattr(ring, "random_offsets", lambda key, size: jax.random.uniform(key, (size,), minval=1e-7))
    halves = np.random.default_rng(0).choice([-0.5, 0.5], size=(1, 203)).astype(np.float32)
    sent, metrics, _ = through(fixed_point(num_numbers=203, **STEPS), np.repeat(halves, 1000, 0))
    limit = rounded_norm_bound(joint_norm(halves), 203)
    free, _, _ = through(fixed_point(**STEPS), np.repeat(halves, 1000, 0))
    assert np.mean(np.linalg.norm(free, axis=1) > limit) > 0.001
    assert np.all(np.linalg.norm(sent, axis=1) <= limit * (1 + 1e-6))
    assert metrics["truncated"].mean() == 0
    assert np.abs(sent.mean(0) - halves).mean() < 0.03
    with pytest.raises(ValueError, match="203 numbers, more than num_numbers=202"):
        through(fixed_point(num_numbers=202, **STEPS), halves)


# The bound, through the round.

COARSE = {"largest": 100.0, "max_clients": NUM_CLIENTS, "bits": 12}  # a step is a tenth of the clip norm
RECORD = UpdateTransform(
    init=lambda params: jnp.zeros(32),
    server=lambda total, *_: (total, jnp.zeros(32).at[: sum(x.size for x in jax.tree.leaves(total))].set(flat(total))),
)
LINKS = {
    "stochastic": fixed_point(num_numbers=5 * DIM + 3, **COARSE),
    "nearest": fixed_point(num_numbers=5 * DIM + 3, rounding="nearest", **COARSE),
    "rotated": fixed_point(num_numbers=NUM_ITEMS * DIM + 3, rotation=True, **COARSE),
}


def flat(total):
    return jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(total)])


@pytest.fixture(scope="module", params=LINKS)
def adversarial_rounds(request):
    before = chain(clip_by_global_norm(CLIP), LINKS[request.param])
    transforms = chain(clip_by_global_norm(CLIP), LINKS[request.param], RECORD, ring_sum())
    rounds = make_rounds(adversaries(), transforms, full_participation(NUM_CLIENTS), nothing_but_clients(), span_size=1)
    assert rounds.upload_bits == 32 * (32 if request.param == "rotated" else 17)
    return rounds, before.sensitivity(UNBOUNDED)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(uploads=uploads, user=users)
def test_whatever_a_client_sends(adversarial_rounds, uploads, user):
    """With any update of one client, and with none: integers that differ by at most the bound, without a tolerance."""
    rounds, bound = adversarial_rounds
    state, _ = rounds.init(jax.random.key(0))
    absent = {k: np.where((np.arange(6) == user).reshape(-1, *[1] * (v.ndim - 1)), 0, v) for k, v in uploads.items()}
    sums = [pre_noise_sum(rounds, state, p, np.ones(6, bool)) for p in (uploads, absent)]
    assert all(np.array_equal(x, np.trunc(x)) for x in sums)
    moved = sums[0].astype(np.float64) - sums[1]
    assert joint_norm(moved) <= bound.l2
    assert l1_norm(moved) <= bound.l1
    assert bound.integers


def test_bounds_by_hand():
    step = 100 / 2047
    for name, link in LINKS.items():
        bound = link.sensitivity(Bound(l2=CLIP))
        size = 32 if name == "rotated" else 13
        wanted = rounded_norm_bound(CLIP / step, size) if name != "nearest" else CLIP / step + math.sqrt(size) / 2
        assert 1 <= bound.l2 / wanted < 1 + 3e-5
        assert bound == Bound(min(math.sqrt(size) * bound.l2, bound.l2**2), bound.l2, integers=True)
        assert link.sensitivity(UNBOUNDED) == Bound(integers=True)
        noised = link.sensitivity(Bound(l2=CLIP, noised=True))
        assert noised.noised
        assert not noised.integers
    assert fixed_point(**COARSE).sensitivity(Bound(l2=CLIP)) == Bound(integers=True)
    with pytest.raises(ValueError, match="put a clip before it"):
        chain(clip_by_global_norm(CLIP), fixed_point(**COARSE), gaussian_noise(1.0), ring_sum())


def test_bits_by_hand():
    dense = jnp.zeros(5)
    update = {"dense": dense, "item": Rows(jnp.zeros(3, jnp.int32), jnp.zeros((3, 4)), 8)}
    for link, tree, words in (
        (fixed_point(**STEPS), update, 5 + 8 * 4),
        (fixed_point(**STEPS), {"dense": dense}, 5),
        (fixed_point(rotation=True, **STEPS), update, 64),
        (fixed_point(rotation=True, **STEPS), {"dense": dense}, 8),
    ):
        assert link.upload(plain_wire(tree), tree).total == 32 * words


def test_words_are_summed_last():
    """Noise on words would be noise on something else."""
    with pytest.raises(ValueError, match="last one of the chain"):
        chain(clip_by_global_norm(1.0), fixed_point(num_numbers=3, **STEPS), ring_sum(), gaussian_noise(1.0))
