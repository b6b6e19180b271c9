"""Risk: a small device trains, sends or reveals what it does not hold, or tiers change what no tier should change."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from evaluation_worlds import interactions
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_sensitivity import (
    ANY,
    CHAIN,
    CLIP,
    MILD,
    NUM_CLIENTS,
    NUM_ITEMS,
    SAMPLER,
    TOLERANCE,
    cohorts,
    drawn_examples,
    joint_norm,
    moved,
    pre_noise_sum,
    strange_examples,
    users,
    with_and_without,
)

from fedjax_rec.algorithms.fedavg import fedavg
from fedjax_rec.algorithms.fednova import fednova
from fedjax_rec.algorithms.fedsequence import fedsequence
from fedjax_rec.algorithms.scaffold import scaffold
from fedjax_rec.data.negatives import Negatives
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.rows import to_dense
from fedjax_rec.federated.tiers import (
    Tier,
    axes_of_size,
    held,
    named_axes,
    narrowed,
    num_held,
    recent,
    shortened,
    with_tiers,
)
from fedjax_rec.federated.transforms import chain
from fedjax_rec.models.base import Shared
from fedjax_rec.models.matrix_factorization import matrix_factorization
from fedjax_rec.models.sequence import SequenceModel
from fedjax_rec.privacy.ledger import Ledger

DIM, NUM_ROUNDS = 4, 4
LARGE, SMALL = Tier("large"), Tier("small", width=0.5, rank=0.5, history=2)
AXES = named_axes({"tables.item": (None, "width"), "private.user": ("width",)})
MODEL = matrix_factorization(NUM_ITEMS, dim=DIM)
BASE = fedavg(MODEL, client_optimizer=optax.sgd(0.5), local_epochs=2)
IS_SMALL = np.array([False, False, True, False, True, True])  # three of six clients; lengths 3, 0, 6, 1, 4, 7


def compiled(algorithm):
    return make_rounds(algorithm, CHAIN, SAMPLER, drawn_examples(), span_size=NUM_ROUNDS)


@pytest.fixture(scope="module")
def homogeneous():
    return compiled(BASE)


@pytest.fixture(scope="module")
def tiered():
    return compiled(with_tiers(BASE, [LARGE, SMALL], IS_SMALL, AXES))


def run(rounds, num_rounds=NUM_ROUNDS):
    keys = RoundKeys(*jax.random.split(jax.random.key(1), 3))
    return jax.device_get(rounds.run(*rounds.init(jax.random.key(0)), keys, num_rounds))


def start(rounds, table=None):
    state, private = rounds.init(jax.random.key(0))
    if table is not None:
        state = state._replace(shared=state.shared._replace(tables=state.shared.tables | {"item": jnp.asarray(table)}))
    return state, private


def test_full_devices_are_the_homogeneous_run_bit_for_bit(homogeneous):
    """Several rounds with clip and noise; all masks are looked up in the round, and nobody is in the tier they cut."""
    state, private, metrics = run(compiled(with_tiers(BASE, [LARGE, SMALL], np.zeros(NUM_CLIENTS, int), AXES)))
    assert np.all(metrics.pop("outside_tier") == 0)
    jax.tree.map(np.testing.assert_array_equal, (state, private, metrics), run(homogeneous))


def test_one_full_tier_is_the_method_itself():
    assert with_tiers(BASE, [LARGE], np.zeros(NUM_CLIENTS, int), AXES) is BASE
    assert with_tiers(BASE, [LARGE, SMALL], np.zeros(NUM_CLIENTS, int), AXES) is not BASE


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    table=hnp.arrays(np.float32, (NUM_ITEMS, DIM), elements=MILD | st.sampled_from([0.0, 1e3, 1e18, 1e30]), fill=MILD),
    vectors=hnp.arrays(np.float32, (NUM_CLIENTS, DIM), elements=ANY | MILD, fill=MILD),
    cohort=cohorts,
    user=users,
)
def test_one_user_moves_the_sum_by_no_more_than_the_clip(tiered, table, vectors, cohort, user):
    state, _ = start(tiered, table)
    sums = [pre_noise_sum(tiered, state, {"user": vectors}, mask) for mask in with_and_without(cohort, user)]
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(sums))
    assert moved(*sums) <= CLIP * (1 + TOLERANCE)


def test_the_bound_is_reached(tiered):
    state, _ = start(tiered, np.full((NUM_ITEMS, DIM), 30.0))
    vectors = np.full((NUM_CLIENTS, DIM), -30.0, np.float32)
    sums = [pre_noise_sum(tiered, state, {"user": vectors}, m) for m in with_and_without(np.ones(6, bool), 5)]
    assert moved(*sums) == pytest.approx(CLIP, rel=1e-3)


def test_small_devices_send_nothing_outside_their_tier(tiered, homogeneous):
    state, private = start(tiered)
    sums = pre_noise_sum(tiered, state, private, IS_SMALL).tables["item"]
    assert np.abs(sums[:, :2]).max() > 0
    assert np.all(sums[:, 2:] == 0)
    assert np.abs(pre_noise_sum(homogeneous, state, private, IS_SMALL).tables["item"][:, 2:]).max() > 0
    state, private, metrics = run(tiered)
    assert np.all(metrics["outside_tier"] == 0)
    assert np.all(private["user"][IS_SMALL & (np.arange(6) > 0), 2:] == 0)
    assert np.all(private["user"][~IS_SMALL, 2:] != 0)


def test_small_devices_read_nothing_outside_their_tier(tiered):
    """Other numbers outside, on the server and in their private vectors, and the same bits come out."""
    state, private = start(tiered)
    other = np.array(state.shared.tables["item"])
    other[:, 2:] = 7.0
    sums = pre_noise_sum(tiered, state, private, IS_SMALL)
    vectors = np.array(private["user"])
    vectors[:, 2:] = -9.0
    for changed, mine in ((start(tiered, other)[0], private), (state, {"user": vectors})):
        jax.tree.map(np.testing.assert_array_equal, pre_noise_sum(tiered, changed, mine, IS_SMALL), sums)
    large = [pre_noise_sum(tiered, s, private, ~IS_SMALL) for s in (state, start(tiered, other)[0])]
    assert moved(*large) > 1e-3  # large devices do read them


def test_small_devices_train_on_their_last_items(tiered):
    """Labels of the older items change, and nothing else does."""
    (bucket,) = drawn_examples().buckets
    place, length = np.arange(bucket.labels.shape[1]), np.asarray(bucket.length)[:, None]
    keys = RoundKeys(*jax.random.split(jax.random.key(1), 3))

    def train(changed):
        population = (dataclasses.replace(bucket, labels=np.where(changed, 0.0, bucket.labels).astype(np.float32)),)
        _, private, _ = tiered.run(*tiered.init(jax.random.key(0)), keys, 1, population=population)
        return np.asarray(private["user"])

    took_part = np.asarray(SAMPLER.draw(keys.cohort, 0))
    whole = train(np.zeros_like(bucket.labels, bool))
    older, last = train(place < length - 2), train((place >= length - 2) & (place < length))
    np.testing.assert_array_equal(older[IS_SMALL], whole[IS_SMALL])
    differs = np.any(older != whole, axis=1)
    assert np.all(differs[took_part & ~IS_SMALL & (np.array([3, 0, 6, 1, 4, 7]) > 2)])
    assert np.all(np.any(last != whole, axis=1)[took_part & IS_SMALL])


def test_the_ledger_is_that_of_the_homogeneous_run(tiered, homogeneous):
    charged = [rounds.charge(Ledger(), first_round=0, num_rounds=3).entries for rounds in (tiered, homogeneous)]
    assert charged[0] == charged[1] != ()


def server_step(algorithm):
    """The change of each column for an aggregate of ones."""
    shared = Shared({"item": jnp.zeros((NUM_ITEMS, DIM)), "bias": jnp.zeros((NUM_ITEMS, 1))}, {})
    state = algorithm.init(jax.random.key(0))._replace(shared=shared)
    new = algorithm.server_update(state, jax.tree.map(jnp.ones_like, shared)).shared
    return np.asarray(new.tables["item"][0]), float(new.tables["bias"][0, 0])


def test_coordinates_are_averaged_over_expected_holders():
    """Three of six clients hold the last two columns, so their mean is twice the cohort's."""
    item, bias = server_step(with_tiers(BASE, [LARGE, SMALL], IS_SMALL, AXES))
    np.testing.assert_array_equal(item, [1, 1, 2, 2])
    assert bias == 1
    # Where small devices send half as often, 3 of 4.5 expected clients hold them.
    item, _ = server_step(with_tiers(BASE, [LARGE, SMALL], IS_SMALL, AXES, take_part=(1.0, 0.5)))
    np.testing.assert_array_equal(item, [1, 1, 1.5, 1.5])
    # What nobody holds stays as it is, noise and all.
    item, _ = server_step(with_tiers(BASE, [LARGE, SMALL], np.ones(6, int), AXES))
    np.testing.assert_array_equal(item, [1, 1, 0, 0])


def test_shortened_clients():
    (bucket,) = strange_examples().buckets  # with repeated items, hence slots
    for row, length in enumerate(bucket.length):
        client = jax.tree.map(lambda x, row=row: jnp.asarray(x[row]), bucket)
        most = 2
        short, same = shortened(client, most), shortened(client, length)
        kept = slice(max(length - most, 0), length)
        num = min(length, most)
        assert short.length == num
        for name, fill in (("item_ids", NUM_ITEMS), ("labels", 0), ("slots", bucket.row_ids.shape[1])):
            np.testing.assert_array_equal(getattr(short, name)[:num], getattr(bucket, name)[row, kept])
            assert np.all(np.asarray(getattr(short, name))[num:] == fill)
        jax.tree.map(np.testing.assert_array_equal, same, client)


def test_recent_histories():
    histories = interactions([[4, 1, 3], [2], [], [0, 1, 2, 3]], num_items=5)
    found = recent(histories, [LARGE, SMALL], np.array([1, 1, 1, 0]))
    assert [found.items_of(user).tolist() for user in range(4)] == [[1, 3], [2], [], [0, 1, 2, 3]]


# A recommender of the next item with hidden units and an adapter: what comes next follows from the sum of the history.


def bag_of_history(num_items=5, dim=4, rank=2):
    def init(key):
        keys = jax.random.split(key, 4)
        shapes = {"hidden": (dim, 6), "out": (6, dim), "a": (dim, rank), "b": (rank, dim)}
        dense = {name: jax.random.normal(k, shapes[name]) for name, k in zip(shapes, keys, strict=True)}
        return Shared({"item": jax.random.normal(jax.random.fold_in(key, 9), (num_items, dim))}, dense)

    def query(params, history, presence):
        del presence
        bag = params.tables["item"].at[history].get(mode="fill", fill_value=0).sum(0)
        hidden = jnp.tanh(bag @ params.dense["hidden"])
        return hidden @ params.dense["out"] + bag @ params.dense["a"] @ params.dense["b"]

    def loss(params, history, key):
        del key
        last = jnp.sum(history < num_items) - 1
        before = jnp.where(jnp.arange(len(history)) < last, history, num_items)
        scores = params.tables["item"] @ query(params, before, None)
        target = history.at[last].get(mode="clip")
        return jnp.where(last > 0, jax.nn.logsumexp(scores) - scores.at[target].get(mode="clip"), 0.0)

    return SequenceModel(init, loss, query, lambda params: params.tables["item"], num_items, 9)


BAG = bag_of_history()
CUTS = {
    "tables.item": (None, "width"),
    "dense.hidden": ("width", "width"),
    "dense.out": ("width", "width"),
    "dense.a": ("width", "rank"),
    "dense.b": ("rank", "width"),
}


@pytest.fixture(scope="module")
def one_bag_client():
    """``(history, tier, whether an axis is forgotten) -> ClientOutput`` of one client of that tier."""
    inner = fedsequence(BAG, local_steps=3, client_lr=0.1)
    (bucket,) = drawn_examples().buckets
    one = jax.tree.map(lambda x: jnp.asarray(x[0]), bucket)
    client = dataclasses.replace(one, client_id=jnp.int32(0), length=jnp.int32(4), labels=jnp.ones(6), num_items=5)
    private = {"query": jnp.zeros(4)}

    @partial(jax.jit, static_argnames=("tier", "forgotten"))
    def of(items, tier=SMALL, forgotten=False):
        axes = CUTS | ({"dense.out": ("width", None)} if forgotten else {})
        algorithm = with_tiers(inner, [tier], np.zeros(1, int), named_axes(axes))
        mine = dataclasses.replace(client, item_ids=items)
        output = algorithm.client_update(SHARED, private, mine, jnp.int32(1), jax.random.key(3))
        return output._replace(update=to_dense(output.update))

    return of


HISTORY = jnp.array([0, 3, 1, 4, 5, 5], jnp.int32)
SHARED = BAG.init(jax.random.key(0))


def test_sequence_models_are_cut_in_width_rank_and_history(one_bag_client):
    output = one_bag_client(HISTORY)
    masks = held(SHARED, SMALL, named_axes(CUTS))
    jax.tree.map(lambda u, m: np.testing.assert_array_equal(np.where(m, 0, u), 0), output.update, masks)
    assert all(joint_norm(leaf) > 0 for leaf in jax.tree.leaves(output.update))
    assert output.metrics["outside_tier"] == 0  # three local steps never left the tier: nothing normalises
    small = narrowed(SHARED, SMALL, named_axes(CUTS))
    expected = BAG.query(small, jnp.array([1, 4, 5, 5, 5, 5]), None)
    np.testing.assert_allclose(output.private["query"], expected, rtol=1e-5)
    other_start = one_bag_client(jnp.array([2, 2, 1, 4, 5, 5], jnp.int32))
    jax.tree.map(np.testing.assert_array_equal, other_start.update, output.update)


def test_a_small_device_computes_as_a_small_model(one_bag_client):
    """The cut arrays alone, as a real device would hold them, give the same update."""
    inner = fedsequence(bag_of_history(dim=2, rank=1), local_steps=3, client_lr=0.1)
    sizes = {"hidden": (2, 3), "out": (3, 2), "a": (2, 1), "b": (1, 2)}
    dense = {name: SHARED.dense[name][:rows, :columns] for name, (rows, columns) in sizes.items()}
    params = Shared({"item": SHARED.tables["item"][:, :2]}, dense)
    (bucket,) = drawn_examples().buckets
    one = dataclasses.replace(jax.tree.map(lambda x: x[0], bucket), item_ids=HISTORY, num_items=5)
    run_small = jax.jit(lambda p: inner.client_update(p, None, one, jnp.int32(1), jax.random.key(3)).update)
    small, masked = to_dense(run_small(params)), one_bag_client(HISTORY, dataclasses.replace(SMALL, history=None))
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    close(masked.update.tables["item"][:, :2], small.tables["item"])
    for name, (rows, columns) in sizes.items():
        close(masked.update.dense[name][:rows, :columns], small.dense[name])


def test_a_forgotten_axis_shows(one_bag_client):
    """Outputs that nobody said are cut still train whole, and so ask for columns that the device does not hold."""
    output = one_bag_client(HISTORY, forgotten=True)
    assert output.metrics["outside_tier"] > 0
    assert np.all(output.update.tables["item"][:, 2:] == 0)  # and they are not sent


def test_sizes_by_hand():
    axes = named_axes(CUTS)
    assert num_held(SHARED, LARGE, axes) == 5 * 4 + 4 * 6 + 6 * 4 + 4 * 2 + 2 * 4
    assert num_held(SHARED, SMALL, axes) == 5 * 2 + 2 * 3 + 3 * 2 + 2 * 1 + 1 * 2
    by_size = axes_of_size(width={4, 6}, rank={2})
    same = jax.tree.map(np.array_equal, held(SHARED, SMALL, by_size), held(SHARED, SMALL, axes))
    assert all(jax.tree.leaves(same))
    wide = held({"private": {"user": np.zeros(10)}}, Tier("x", width=0.3), axes_of_size(width={10}))
    assert wide["private"]["user"].tolist() == [True] * 3 + [False] * 7
    assert held({"private": {"user": np.zeros(3)}}, Tier("x", width=0.01), axes_of_size(width={3}))["private"][
        "user"
    ].any()


def test_nested():
    """What a small device holds, every larger one holds."""
    shares = [0.1, 0.25, 0.5, 0.9, 1.0]
    masks = [held(SHARED, Tier("x", width=s, rank=s), named_axes(CUTS)) for s in shares]
    for small, large in itertools.pairwise(masks):
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: np.all(a <= b), small, large)))


def test_refusals():
    with pytest.raises(ValueError, match="in \\(0, 1\\]; got 0"):
        Tier("none", width=0)
    with pytest.raises(ValueError, match="at least 1 item"):
        Tier("none", history=0)
    with pytest.raises(ValueError, match="one of the 1 tiers"):
        with_tiers(BASE, [LARGE], IS_SMALL, AXES)
    with pytest.raises(ValueError, match="not all 0"):
        with_tiers(BASE, [LARGE], np.zeros(6, int), AXES, take_part=(0.0,))
    with pytest.raises(ValueError, match="are items"):
        with_tiers(BASE, [LARGE], np.zeros(6, int), named_axes({"tables.item": ("width", None)}))
    with pytest.raises(ValueError, match="for each axis"):
        with_tiers(BASE, [LARGE], np.zeros(6, int), named_axes({"tables.item": ("width",)}))
    with pytest.raises(ValueError, match="for width and for rank"):
        axes_of_size(width={4}, rank={4})
    other = scaffold(MODEL, lr=0.1, num_control_rows=7, mean_local_steps=1.0, sampling_prob=0.5, negatives=Negatives(1))
    normalized = fednova(MODEL, lr=0.1)
    with pytest.raises(ValueError, match="sends other numbers"):
        with_tiers(other, [LARGE], np.zeros(6, int), AXES)
    with pytest.raises(ValueError, match="sends other numbers"):
        make_rounds(with_tiers(normalized, [LARGE, SMALL], np.zeros(6, int), AXES), chain(), SAMPLER, drawn_examples())
