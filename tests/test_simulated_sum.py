"""Risk: masks that do not cancel, that cancel too early, or a sum of so few clients that it shows one of them."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from secagg_world import plain_sum, vectors

from fedjax_rec.security.graph import graph_parameters, neighbors
from fedjax_rec.security.masks import _mask, _seeds, add_masked, plan_masks
from fedjax_rec.security.secagg.config import SecAggConfig
from fedjax_rec.security.secagg.session import secure_sum
from fedjax_rec.security.secagg.stages import ProtocolError
from fedjax_rec.security.simulated import resolve_graph, simulated_secure_sum, simulated_sum


def without(num_clients, num_dropped, seed=0):
    survives = np.ones(num_clients, bool)
    survives[np.random.default_rng(seed).permutation(num_clients)[:num_dropped]] = False
    return survives


MOST, WORDS = 8, 5  # small cases are padded to so many clients and words, so that they share a program

# Clients, words, degree, threshold, dropouts.
CASES = {
    "two": (2, 5, 2, 2, (0, 1)),
    "three": (3, 1, 2, 2, (0, 1, 2)),
    "ten": (10, 7, 9, 6, (0, 1, 3, 4, 5)),
    "ten, sparse": (10, 7, 4, 3, (0, 1)),
    "a hundred": (100, 3, 14, 6, (0, 10, 30)),
    "a large update": (100, 59_296, 14, 6, (30,)),
}


def padded_sum(table, survives, *, seed, **options):
    """`simulated_sum` of a cohort that may be smaller than the population."""
    n, words = table.shape
    more, most = max(MOST - n, 0), max(WORDS - words, 0)
    table = np.pad(table, ((0, more), (0, most)), constant_values=7)
    in_cohort = np.arange(n + more) < n
    survives = np.pad(survives, (0, more), constant_values=True)
    total, enough = simulated_sum(table, survives, key=jax.random.key(seed), in_cohort=in_cohort, **options)
    return total[:words], enough


@pytest.mark.parametrize("case", CASES)
def test_the_sum_is_exact(case):
    n, words, degree, threshold, dropouts = CASES[case]
    table = vectors(n, words)
    for dropped in dropouts:
        survives = without(n, dropped)
        total, enough = padded_sum(table, survives, seed=dropped, degree=degree, threshold=threshold)
        complete = degree >= n - 1
        assert bool(enough) == (n - dropped >= max(threshold, 2) or not complete)
        np.testing.assert_array_equal(total, plain_sum(table, np.flatnonzero(survives)) if enough else 0)
        assert total.dtype == np.uint32
    if words > 1000:
        start = time.perf_counter()
        jax.block_until_ready(simulated_sum(table, survives, key=jax.random.key(0), degree=degree, threshold=threshold))
        print(f"{case}: {time.perf_counter() - start:.2f} s")


PLAN = jax.jit(lambda in_cohort, survives, seed: plan_masks(in_cohort, survives, jax.random.key(seed)))


def enough_by_hand(in_cohort, survives, place, degree, threshold, min_clients):
    """Some client with fewer than t of its holders left, or too few survivors: no sum. On sets, without masks."""
    cohort, alive = np.flatnonzero(in_cohort), set(np.flatnonzero(survives))
    n = len(cohort)
    if n < 2 or len(alive) < min_clients:
        return len(alive) >= min_clients and len(alive) >= threshold
    order = np.argsort(np.asarray(place)[cohort])  # of the cohort's clients, by place
    near = neighbors(n, degree=min(degree, n - 1), permutation=order)
    holders = [{cohort[i], *cohort[near[i]]} for i in range(n)]
    return all(len(alive & h) >= threshold for h in holders)


@settings(max_examples=700, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31 - 1),
    cohort=st.integers(0, 2**MOST - 1),
    alive=st.integers(0, 2**MOST - 1) | st.just(2**MOST - 1),
    words=st.integers(1, WORDS),
    degree=st.sampled_from([2, 4]),
    threshold=st.integers(2, 3),
    min_clients=st.integers(2, 5),
)
def test_refused_or_exact(seed, cohort, alive, words, degree, threshold, min_clients):
    """700 cases of up to 8 clients on sparse and complete graphs, in one program for each degree."""
    table = vectors(MOST, WORDS, seed)
    table[:, words:] = 0
    in_cohort, survives = (np.array([(mask >> i) & 1 for i in range(MOST)], bool) for mask in (cohort, alive))
    options = {"degree": degree, "threshold": threshold, "min_clients": min_clients}
    total, enough = simulated_sum(table, survives, key=jax.random.key(seed), in_cohort=in_cohort, **options)
    survives = survives & in_cohort
    place = PLAN(in_cohort, survives, seed).place
    assert bool(enough) == enough_by_hand(in_cohort, survives, place, **options)
    np.testing.assert_array_equal(total, plain_sum(table, np.flatnonzero(survives)) if enough else 0)


@pytest.mark.parametrize("case", ["two", "ten", "ten, sparse", "a hundred"])
def test_the_protocol_with_real_keys_gives_the_same(case):
    """The same vectors, the same dropouts: the same sum, or none where so few are left on the complete graph."""
    n, words, degree, threshold, dropouts = CASES[case]
    table, refused = vectors(n, words), 0
    for dropped in dropouts if n < 100 else (30,):
        survives = without(n, dropped)
        config = SecAggConfig(num_words=words, session="test", degree=degree, threshold=threshold)
        total, enough = padded_sum(table, survives, seed=0, degree=degree, threshold=threshold)
        try:
            real = secure_sum(table, config=config, dropped=dict.fromkeys(np.flatnonzero(~survives), "upload"))
        except ProtocolError:
            refused += 1
            assert not enough
        else:
            assert enough
            np.testing.assert_array_equal(total, real.total)
    assert refused == (case in ("two", "ten"))  # with one of two, and five of ten


def test_what_the_server_adds_up_is_masked():
    """Zeros of each client alone, and of all survivors: uniform words, none of which is what was sent, nor repeated."""
    n, words = 12, 4096
    survives = jnp.arange(n) != 3

    @jax.jit
    def uploads(key):
        plan = plan_masks(jnp.ones(n, bool), survives, key)

        def one(client):
            zeros = jnp.zeros(words, jnp.uint32)
            return add_masked(zeros, zeros[None], client[None], jnp.ones(1, bool), plan, 4)

        return jax.lax.map(one, jnp.arange(n))

    sent = np.asarray(uploads(jax.random.key(0)))
    assert not sent[3].any()  # it dropped out
    sent = np.delete(sent, 3, 0)
    seen = np.vstack([sent, sent.sum(0, dtype=np.uint32), sent[:5].sum(0, dtype=np.uint32)])
    assert np.sum(seen == 0) <= 1  # by chance in one of 76,000 runs
    for row in seen:
        assert stats.kstest(row / 2.0**32, "uniform").pvalue > 1e-4
    assert np.abs(np.corrcoef(seen[:-2] / 2.0**32) - np.eye(11)).max() < 6 / np.sqrt(words)
    other = np.delete(np.asarray(uploads(jax.random.key(1))), 3, 0)
    assert np.mean(sent == other) < 1e-3


def test_numbers_out_of_range():
    """Defaults follow the cohort's size; what would show one client's upload, or cannot be rebuilt, is refused."""
    assert resolve_graph(None, None, 100) == tuple(graph_parameters(100))
    assert resolve_graph(6, None, None) == (6, 4)
    key, two = jax.random.key(0), np.ones(2, bool)
    for options, message in (
        ({"min_clients": 1, "num_clients": 5}, "min_clients must be at least 2"),
        ({"dropout_prob": 1.0, "num_clients": 5}, "dropout_prob must be at least 0 and below 1"),
        ({"degree": 4, "threshold": 1}, "threshold must be from 2 to 5"),
        ({"degree": 4, "threshold": 6}, "threshold must be from 2 to 5"),
        ({"degree": 5, "num_clients": 7}, "degree must be even for 7 clients"),
        ({"threshold": 3}, "Give degree and threshold, or num_clients"),
        ({}, "Give degree and threshold, or num_clients"),
    ):
        with pytest.raises(ValueError, match=message):
            simulated_secure_sum(**options)
    with pytest.raises(ValueError, match="min_clients must be at least 2"):
        simulated_sum(vectors(2, 1), two, key=key, degree=1, threshold=2, min_clients=1)
    with pytest.raises(ValueError, match="threshold must be from 2 to 2"):
        simulated_sum(vectors(2, 1), two, key=key, degree=1, threshold=3)


# What masks look like.


@pytest.fixture(scope="module")
def draws():
    """200 masks of one round, 4,096 words each."""

    @jax.jit
    def words():
        plan = plan_masks(jnp.ones(200, bool), jnp.ones(200, bool), jax.random.key(0))
        numbers = jnp.arange(200, dtype=jnp.uint32)
        return jax.vmap(lambda *seed: _mask(jnp.arange(4096, dtype=jnp.uint32), *seed))(*_seeds(numbers, plan))

    return np.asarray(words())


def test_words_are_uniform(draws):
    uniform = draws / 2.0**32
    assert stats.kstest(uniform.reshape(-1), "uniform").pvalue > 1e-3
    assert stats.kstest([stats.kstest(row, "uniform").pvalue for row in uniform], "uniform").pvalue > 1e-3
    bits = (draws[..., None] >> np.arange(32, dtype=np.uint32)) & 1
    assert np.abs(bits.mean((0, 1)) - 0.5).max() < 4.5 * 0.5 / np.sqrt(draws.size)
    repeats = draws.size - len(np.unique(draws))
    assert repeats < 150  # 78 are expected


def test_words_are_uncorrelated(draws):
    centred = draws / 2.0**32 - 0.5
    keys = np.corrcoef(centred) - np.eye(200)
    assert np.abs(keys).max() < 6 / 64
    for lag in (1, 2, 3, 4, 8, 63, 64, 65, 1024):
        product = centred[:, lag:] * centred[:, :-lag]
        assert abs(product.mean()) < 4.5 / 12 / np.sqrt(product.size), lag
