"""Risk: a compressed update is off on average, longer than its bound, or counted with fewer bits than it takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from test_sensitivity import (
    CLIP,
    COHORTS,
    NUM_CLIENTS,
    PROBE,
    SAMPLER,
    TOLERANCE,
    adversaries,
    cohorts,
    moved,
    nothing_but_clients,
    uploads,
    users,
    with_and_without,
)

from fedjax_rec.compression.drive import drive
from fedjax_rec.compression.flat import ravel_update, update_size
from fedjax_rec.compression.half import half_precision_download, half_precision_upload, to_half
from fedjax_rec.compression.quantize import quantize, random_offsets, to_grid
from fedjax_rec.compression.top_k import largest_numbers, top_k
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.rows import Rows, to_dense
from fedjax_rec.federated.transforms import UNBOUNDED, Bound, chain, plain_wire
from fedjax_rec.privacy.mechanisms import clip_by_global_norm, gaussian_noise

NUM_KEYS = 10_000


def decoded(links, vectors, seed=0):
    """What the server makes of each vector, each in a round of its own, for all links in one program."""

    def one(vector, key):
        def through(link):
            public, own = jax.random.split(jax.random.clone(key))
            return link.client(vector, link.prepare((), None, public), own)[0]

        return {name: through(link) for name, link in links.items()}

    return jax.device_get(jax.jit(jax.vmap(one))(vectors, jax.random.split(jax.random.key(seed), len(vectors))))


def repeated(vector, count):
    return jnp.broadcast_to(vector, (count, len(vector)))


NORMAL = jax.random.normal(jax.random.key(1), (256,))


def test_unbiased():
    """10,000 keys: each number's mean is within three standard errors, Bonferroni-corrected for 256 numbers."""
    links = {
        "1 bit": quantize(1, rotation=False),
        "3 bits": quantize(3, rotation=False),
        "2 bits rotated": quantize(2),
        "drive": drive(),  # unbiased where numbers resemble normal ones
        "nearest": quantize(3, rounding="nearest", rotation=False),
    }
    allowed = stats.norm.isf(stats.norm.sf(3) / 256)
    for name, found in decoded(links, repeated(NORMAL, NUM_KEYS)).items():
        error = found.mean(0, np.float64) - NORMAL
        # A number that is a level has no error; float32 is all that its mean is off by.
        largest = np.max(np.abs(error) / np.maximum(found.std(0, np.float64) / np.sqrt(NUM_KEYS), 1e-7))
        assert largest < allowed if name != "nearest" else largest > 1000, name


def test_drive_leaves_a_bias_on_a_few_large_numbers():
    """As its docstring says: along the update it is exact, across it 0.3 of it is left."""
    vector = jnp.zeros(64).at[0].set(1.0).at[1].set(0.3)
    found = decoded({"drive": drive()}, repeated(vector, 200))["drive"]
    np.testing.assert_allclose(found @ vector, np.full(200, vector @ vector), rtol=1e-5)
    assert 0.25 < np.linalg.norm(found.mean(0) - vector) < 0.35


def test_offsets_are_uniform_though_they_share_a_word():
    """Each of them is; and the squared error is that of independent ones, f (1 - f) steps^2 a number."""
    draws = np.asarray(jax.vmap(lambda k: random_offsets(k, 130))(jax.random.split(jax.random.key(1), 3000)))
    assert draws.min() > 0
    assert draws.max() < 1
    for place in (0, 1, 2, 3, 64, 129):
        assert stats.kstest(draws[:, place], "uniform").pvalue > 1e-3
    x = np.asarray(NORMAL[:130])
    steps, unit = (x.astype(np.float64) / np.max(np.abs(x)) + 1) * 7, np.max(np.abs(x)) / 7
    rest = steps - np.floor(steps)
    errors = unit**2 * np.sum(np.where(draws < rest, 1 - rest, rest) ** 2, axis=1)
    assert abs(errors.mean() - unit**2 * np.sum(rest * (1 - rest))) < 3 * errors.std() / np.sqrt(3000)


def test_errors_that_the_papers_promise():
    """d = 16,384; a bit each: pi / 2 - 1 = 0.571 of the squared norm. Without rotation, one large number ruins all."""
    x = jax.random.normal(jax.random.key(0), (3, 16_384))
    both = jnp.concatenate([x, x * jnp.exp(1.2 * jax.random.normal(jax.random.key(1), x.shape))])
    links = {
        "drive": drive(),
        "least": drive(unbiased=False),
        "4 bits": quantize(4),
        "1 bit": quantize(1, rotation=False),
    }
    found = decoded(links, both)
    errors = {k: np.sum((v - both) ** 2, axis=1) / np.sum(both**2, axis=1) for k, v in found.items()}
    normal, heavy = ({k: float(v[part].mean()) for k, v in errors.items()} for part in (slice(3), slice(3, 6)))
    assert abs(normal["drive"] - (np.pi / 2 - 1)) < 0.02
    assert abs(normal["least"] - (1 - 2 / np.pi)) < 0.02
    assert heavy["drive"] < 0.59
    assert all(0.015 < e["4 bits"] < 0.045 for e in (normal, heavy))
    assert heavy["1 bit"] > 300
    assert np.all(np.linalg.norm(found["least"], axis=1) <= np.linalg.norm(both, axis=1))


def test_a_grid_by_hand():
    x, zeros = jnp.array([[-2.0, -0.5, 0.0, 0.6, 2.0]]).T, jnp.zeros((5, 1))
    np.testing.assert_array_equal(to_grid(x, zeros + 0.5, 2)[:, 0], [-2, 0, 0, 0, 2])
    np.testing.assert_array_equal(to_grid(x, zeros + 0.1, 2)[:, 0], [-2, 0, 0, 2, 2])  # 0.6 is 0.3 of a step above 0
    np.testing.assert_array_equal(to_grid(x, zeros + 0.9, 2)[:, 0], [-2, -2, 0, 0, 2])
    np.testing.assert_array_equal(to_grid(x, zeros + 0.4, 1)[:, 0], [-2, -2, 2, 2, 2])
    np.testing.assert_array_equal(to_grid(zeros, zeros + 0.4, 1), zeros)
    for bad in (jnp.nan, jnp.inf):
        assert not np.all(np.isfinite(to_grid(x.at[1, 0].set(bad), zeros + 0.5, 2)))


# Five numbers and a table of 8 rows, of which a client touched two; its third row is padding.
UPDATE = {
    "dense": jnp.array([1.0, -2.0, 3.0, -4.0, 5.0]),
    "item": Rows(jnp.array([6, 1, 8]), jnp.array([[9.0, 0.1, 0, 0], [1.0, 1.0, 1.0, 1.0], [0, 0, 0, 0]]), 8),
}
IDS = 3 * 32
BITS = {
    "1 bit": (drive(), 32 * 1 + 32 + IDS),  # 17 numbers are rotated as 32
    "4 bits rotated": (quantize(4), 32 * 4 + 32 + IDS),
    "4 bits": (quantize(4, rotation=False), 17 * 4 + 32 + IDS),
    "4 bits nearest": (quantize(4, rounding="nearest", rotation=False), 17 * 4 + 32 + IDS),
    "4 numbers": (top_k(0.2), 4 * (32 + 6)),  # of 8 * 4 + 5 = 37 places
    "2 rows": (top_k(0.5, rows=True), (2 * 4 + 5) * 32 + 2 * 3),
    "half": (half_precision_upload(), 17 * 16 + IDS),
}


def test_bits_by_hand_and_padding():
    prepared = {name: link.prepare((), None, jax.random.key(0)) for name, (link, _) in BITS.items()}
    found = jax.jit(
        lambda update: {
            name: link.client(update, prepared[name], jax.random.key(1))[0] for name, (link, _) in BITS.items()
        }
    )(UPDATE)
    for name, (link, bits) in BITS.items():
        assert link.upload(plain_wire(UPDATE), UPDATE).total == bits, name
        assert link.linear == (name == "half")
        rows = found[name]["item"]
        assert np.all(np.asarray(rows.values)[np.asarray(rows.ids) == 8] == 0), name
        assert not np.asarray(to_dense(found[name])["item"])[[0, 2, 3, 4, 5, 7]].any()
        assert found[name]["dense"].shape == (5,)
        assert link.server({}, prepared[name], jax.random.key(2)) == ({}, ())


def test_long_updates_pay_for_each_scale():
    update = jax.ShapeDtypeStruct((5000,), jnp.float32)
    assert drive().upload(plain_wire(update), update).total == 5120 + 20 * 32


def test_one_vector_and_back():
    vector, unravel = ravel_update(UPDATE)
    assert vector.shape == (update_size(UPDATE),) == (17,)
    jax.tree.map(np.testing.assert_array_equal, unravel(vector), UPDATE)
    assert float(jnp.abs(unravel(vector + 1)["item"].values[2]).sum()) == 0


def test_top_k_by_hand():
    found, _ = top_k(0.2).client(UPDATE, (), jax.random.key(0))
    np.testing.assert_array_equal(found["dense"], [0, 0, 3, -4, 5])
    np.testing.assert_array_equal(found["item"].values, [[9, 0, 0, 0], [0] * 4, [0] * 4])
    repeated = Rows(jnp.array([2, 0, 2]), jnp.array([[1.0], [1.5], [1.0]]), 4, unique=False)
    found, _ = top_k(0.3, rows=True).client(repeated, (), jax.random.key(0))
    np.testing.assert_array_equal(to_dense(found)[:, 0], [0, 0, 2, 0])  # the merged row is the longest
    with pytest.raises(ValueError, match="share must be above 0"):
        top_k(0.0)


def test_the_largest_numbers_are_those_of_a_sort():
    """Ties and zeros too: exactly k are kept, the first ones of equals."""
    vectors = jnp.stack([NORMAL, jnp.round(NORMAL), jnp.ones(256), jnp.zeros(256), NORMAL.at[9].set(-jnp.inf)])
    found = np.asarray(jax.jit(jax.vmap(lambda v: largest_numbers(v, 37)))(vectors))
    for mask, vector in zip(found, np.asarray(vectors), strict=True):
        order = np.argsort(-np.abs(vector), stable=True)[:37]
        np.testing.assert_array_equal(np.flatnonzero(mask), np.sort(order))


def test_half_precision_is_that_of_the_types():
    x = jax.random.normal(jax.random.key(0), (2000,)) * 10.0 ** jnp.linspace(-4, 3, 2000)
    np.testing.assert_array_equal(to_half(x, "bfloat16"), x.astype(jnp.bfloat16).astype(jnp.float32))
    half = x[jnp.abs(x) > 6.2e-5]
    np.testing.assert_array_equal(to_half(half, "float16"), half.astype(jnp.float16).astype(jnp.float32))
    np.testing.assert_array_equal(to_half(jnp.array([1e6, -1e6, jnp.inf]), "float16"), [65504, -65504, np.inf])
    link = half_precision_download()
    shared = {"item": x, "count": jnp.arange(3)}
    sent = jax.jit(lambda s: link.broadcast(s, ()))(shared)  # compiled, where a cast there and back may vanish
    assert np.any(sent["item"] != x)
    assert np.all(np.abs(sent["item"] - x) <= 2**-8 * np.abs(x))
    np.testing.assert_array_equal(sent["count"], shared["count"])
    assert link.download(plain_wire(UPDATE), UPDATE).total == 17 * 16 + IDS
    assert half_precision_upload().sensitivity(Bound(l2=1.0)).l2 == 1 + 2**-8
    with pytest.raises(ValueError, match="bfloat16, float16"):
        half_precision_download("float8")


def test_chains_that_no_bound_holds_for():
    clip, noise = clip_by_global_norm(CLIP), gaussian_noise(1.0)
    for link in (drive(), quantize(4), quantize(8, rotation=False, rounding="nearest")):
        assert link.sensitivity(Bound(l2=CLIP)) == UNBOUNDED
        with pytest.raises(ValueError, match="put a clip before it"):
            chain(clip, link, noise)
        with pytest.raises(ValueError, match="after the noise raises the bound"):
            chain(clip, noise, link)
        assert chain(clip, link, clip, noise).sensitivity(UNBOUNDED).l2 == CLIP
    assert CLIP <= chain(clip, drive(unbiased=False), noise).sensitivity(UNBOUNDED).l2 <= CLIP * (1 + TOLERANCE)
    for bits in (0, 17, 2.5):
        with pytest.raises(ValueError, match="whole number between 1 and 16"):
            quantize(bits)
    with pytest.raises(ValueError, match="rounding must be one of"):
        quantize(4, rounding="up")


CHAINS = {
    "clip last": (clip_by_global_norm(CLIP), drive(), quantize(2, rotation=False), clip_by_global_norm(CLIP)),
    "no clip needed": (clip_by_global_norm(CLIP), top_k(0.5), drive(unbiased=False)),
}


@pytest.fixture(scope="module", params=CHAINS)
def compressed_rounds(request):
    links = chain(*CHAINS[request.param], gaussian_noise(1.0), PROBE)
    return make_rounds(adversaries(), links, SAMPLER, nothing_but_clients(), span_size=1)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(uploads=uploads, cohort=cohorts, user=users, seed=st.integers(0, 1000))
def test_whatever_a_client_sends(compressed_rounds, uploads, cohort, user, seed):
    """The real round, with and without one client: the sum that noise is added to moves by at most C."""
    sums = []
    for mask in with_and_without(cohort, user):
        keys = RoundKeys(jax.random.key(COHORTS[tuple(mask)]), jax.random.key(seed), jax.random.key(1))
        state, _ = compressed_rounds.init(jax.random.key(0))
        state, _, metrics = compressed_rounds.run(state, jax.tree.map(jnp.array, uploads), keys)
        assert metrics["cohort_size"][0] == np.sum(mask)
        sums.append(jax.device_get(state.transforms[-1]))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(sums))
    assert moved(*sums) <= CLIP * (1 + 2 * TOLERANCE)
    assert len(mask) == NUM_CLIENTS
