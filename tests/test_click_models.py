"""Risk: crosses are not those of the paper, fields land in the wrong rows, or what a user says of itself leaves it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from evaluation_worlds import make_split
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_sensitivity import (
    CHAIN,
    CLIP,
    NUM_CLIENTS,
    SAMPLER,
    TOLERANCE,
    cohorts,
    moved,
    pre_noise_sum,
    users,
    with_and_without,
)

from fedjax_rec.algorithms.fedavg import fedavg
from fedjax_rec.algorithms.silo_dpsgd import ExampleLevelDp, silo_dpsgd
from fedjax_rec.data.clients import Examples, client_data_from_examples
from fedjax_rec.data.silos import silo_data
from fedjax_rec.evaluation.clicks import auc
from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.transforms import chain
from fedjax_rec.models.base import View
from fedjax_rec.models.clicks import client_clicks, with_user_values
from fedjax_rec.models.cross_network import dcn_v2
from fedjax_rec.models.deep_fm import deep_fm, factorization_machine, logistic_regression, pairs
from fedjax_rec.models.fields import (
    dense_values,
    embed,
    embed_dense,
    enumerated,
    hashed,
    join,
    many_valued,
    numeric,
    placed,
    take_examples,
)

# Fields.

COLUMNS = [
    enumerated("size", np.array(["m", "s", "xl"]), vocabulary=["s", "m", "l"]),
    many_valued("genres", np.array([[True, False, True], [False, False, False], [False, True, False]])),
    numeric("price", np.array([np.e - 1, np.nan, -3.0])),
]


def test_fields_lie_side_by_side_and_a_field_is_the_sum_of_its_rows():
    fields, batch = join(COLUMNS)
    assert (fields.names, fields.sizes, fields.widths) == (("size", "genres", "price"), (3, 3, 1), (1, 2, 1))
    assert (fields.offsets, fields.num_rows) == ((0, 3, 6), 7)
    assert batch.ids.tolist() == [[1, 3, 5, 6], [0, 7, 7, 7], [7, 4, 7, 6]]
    np.testing.assert_allclose(batch.values, [[1, 0.5, 0.5, 1], [1, 0, 0, 0], [0, 1, 0, -np.log(4)]], rtol=1e-6)
    table = np.random.default_rng(0).normal(size=(7, 2)).astype(np.float32)
    expected = [
        [table[1], (table[3] + table[5]) / 2, table[6]],
        [table[0], [0, 0], [0, 0]],
        [[0, 0], table[4], -np.log(4) * table[6]],
    ]
    dense = dense_values(fields, batch)
    for index in range(3):
        example = take_examples(batch, jnp.int32(index))
        np.testing.assert_allclose(embed(fields, table, example), expected[index], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(embed_dense(fields, table, dense[index]), expected[index], rtol=1e-5, atol=1e-6)


def test_an_empty_slot_takes_nothing_of_the_table():
    fields, batch = join(COLUMNS[2:])
    vector = embed(fields, jnp.full((1, 2), jnp.nan), take_examples(batch, jnp.int32(1)))
    np.testing.assert_array_equal(vector, np.zeros((1, 2)))


def test_hashes_are_fixed_and_differ_by_field():
    words = np.array(["a", "", "b", "a"])
    column = hashed("city", words, num_buckets=1000)
    assert column.ids[:, 0].tolist() == hashed("city", words, num_buckets=1000).ids[:, 0].tolist()
    assert column.ids[0, 0] == column.ids[3, 0] != column.ids[2, 0]
    assert (column.ids[1, 0], column.values[1, 0]) == (1000, 0)
    assert column.ids[0, 0] != hashed("town", words, num_buckets=1000).ids[0, 0]
    assert hashed("n", np.array([5, 6]), num_buckets=1).ids.tolist() == [[0], [0]]


def test_fields_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="distinct values"):
        enumerated("size", np.array(["s"]), vocabulary=["s", "s"])
    with pytest.raises(ValueError, match="num_buckets must be at least 1; got 0 for city"):
        hashed("city", np.array(["a"]), num_buckets=0)
    with pytest.raises(ValueError, match=r"C1 has places -1 \.\. 5, and needs -1 \.\. 4"):
        placed("C1", np.array([-1, 5]), size=5)
    with pytest.raises(ValueError, match="distinct names and one length"):
        join([numeric("a", np.zeros(2)), numeric("b", np.zeros(3))])
    with pytest.raises(ValueError, match="got none"):
        join([])


# Networks.


def test_crosses_are_those_of_the_paper():
    network = dcn_v2(3, dim=2, num_cross=2, hidden=(5, 4))
    dense = network.init(jax.random.key(0))
    dense = {name: x + 0.1 for name, x in dense.items()}  # biases start at zero
    embedded = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)
    w = jax.tree.map(lambda x: np.asarray(x, np.float64), dense)
    first = x = embedded.reshape(-1)
    for layer in (0, 1):
        x = first * (w[f"cross.{layer}.kernel"].T @ x + w[f"cross.{layer}.bias"]) + x
    deep = first
    for layer in (0, 1):
        deep = np.maximum(w[f"deep.layers.{layer}.kernel"].T @ deep + w[f"deep.layers.{layer}.bias"], 0)
    expected = w["out.kernel"].T @ np.concatenate([x, deep]) + w["out.bias"]
    np.testing.assert_allclose(network.logit(dense, embedded), expected[0], rtol=1e-5)
    assert (network.columns, network.num_fields) == (2, 3)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(vectors=hnp.arrays(np.float32, (4, 3), elements=st.floats(-2, 2, width=32)))
def test_pairs_in_linear_time_are_all_pairs(vectors):
    double_loop = sum(vectors[f].astype(np.float64) @ vectors[g] for f in range(4) for g in range(f))
    np.testing.assert_allclose(pairs(vectors), double_loop, rtol=1e-4, atol=1e-4)


def test_deep_fm_is_its_parts():
    network = deep_fm(3, dim=2, hidden=(4,))
    dense = network.init(jax.random.key(1)) | {"bias": jnp.float32(0.3)}
    embedded = np.random.default_rng(1).normal(size=(3, 3)).astype(np.float32)
    weights, vectors = embedded[:, 0], embedded[:, 1:]
    linear = 0.3 + weights.sum()
    crossed = linear + sum(vectors[f] @ vectors[g] for f in range(3) for g in range(f))
    hidden = np.maximum(vectors.reshape(-1) @ dense["deep.layers.0.kernel"] + dense["deep.layers.0.bias"], 0)
    np.testing.assert_allclose(network.logit(dense, embedded), crossed + hidden @ dense["out.kernel"][:, 0], rtol=1e-5)
    own = {"bias": jnp.float32(0.3)}
    np.testing.assert_allclose(factorization_machine(3, dim=2).logit(own, embedded), crossed, rtol=1e-5)
    np.testing.assert_allclose(logistic_regression(3).logit(own, embedded[:, :1]), linear, rtol=1e-6)


def test_networks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="num_cross must be at least 1; got 0"):
        dcn_v2(3, num_cross=0)
    with pytest.raises(ValueError, match="one hidden layer or more"):
        deep_fm(3, hidden=())
    with pytest.raises(ValueError, match="got 0 fields of 1 columns"):
        logistic_regression(0)
    with pytest.raises(ValueError, match="each of the 4 items; got 3"):
        client_clicks(logistic_regression, num_items=4, item_fields=join(COLUMNS))
    with pytest.raises(ValueError, match="reads 5 fields, and examples have 2"):
        client_clicks(lambda n: logistic_regression(5), num_items=4)


# A world whose only secret is a cross: users of two kinds, items of two kinds, clicked where the kinds are the same.

NUM_ITEMS, KINDS = 7, np.array([0, 1, 0, 1, 0, 1, 1])
USER_KINDS = np.array([0, 1, 1, 0, 1, 0])
ITEM_FIELDS = join([enumerated("kind", KINDS, vocabulary=[0, 1])])
USER_FIELDS, USER_BATCH = join([enumerated("kind", USER_KINDS, vocabulary=[0, 1])])
USER_VALUES = dense_values(USER_FIELDS, USER_BATCH)
ITEMS = np.tile(np.arange(6, dtype=np.int32), (6, 1))[..., None]
LABELS = (USER_KINDS[:, None] == KINDS[None, :6]).astype(np.float32)  # of six items, three of each kind: balanced
CLIENTS = client_data_from_examples([(np.arange(6), row) for row in LABELS], num_items=NUM_ITEMS, num_buckets=1)
KEYS = RoundKeys(*(jax.random.key(i) for i in range(3)))


def model_of(network, **kwargs):
    return client_clicks(
        network,
        num_items=NUM_ITEMS,
        item_fields=ITEM_FIELDS,
        user_fields=USER_FIELDS,
        init_stddev=0.3,
        **{"item_ids": False, "own_vector": False} | kwargs,
    )


@pytest.mark.parametrize(
    ("network", "finds"),
    [
        (logistic_regression, False),
        (lambda n: deep_fm(n, dim=2, hidden=(8,)), True),
        (lambda n: dcn_v2(n, dim=2, num_cross=2, hidden=()), True),
    ],
    ids=["LR", "DeepFM", "DCN-V2"],
)
def test_only_a_cross_predicts(network, finds):
    model = model_of(network)
    shared = model.model.init_shared(jax.random.key(0))
    examples, optimizer = Examples(ITEMS, LABELS[..., None], np.ones((6, 6, 1))), optax.adam(0.05)

    def client_loss(dense, said, batch):
        return model.model.loss(View({}, dense), {"user": said}, batch, None)

    def step(carry, _):
        gradients = jax.vmap(jax.grad(client_loss), in_axes=(None, 0, 0))(carry[0], USER_VALUES, examples)
        changes, opt_state = optimizer.update(jax.tree.map(lambda g: g.mean(0), gradients), carry[1])
        return (optax.apply_updates(carry[0], changes), opt_state), None

    train = jax.jit(lambda dense: jax.lax.scan(step, (dense, optimizer.init(dense)), length=200)[0][0])
    shared = shared._replace(dense=train(shared.dense))
    user_ids, item_ids = np.divmod(np.arange(36), 6)
    logits = np.asarray(model.logits(shared, {"user": USER_VALUES}, user_ids, item_ids)).round(3)
    score = model.model.score(shared, {"user": USER_VALUES[2]})
    np.testing.assert_allclose(score[:6], logits[12:18], atol=1e-3)
    assert score.shape == (NUM_ITEMS,)
    if finds:
        assert auc(LABELS.reshape(-1), logits) == 1.0
        assert np.abs(logits).min() > 1
    else:
        assert abs(auc(LABELS.reshape(-1), logits) - 0.5) < 0.1


# One user, with and without, through the real round; and one silo, whose noise must spare what users say.

PRIVATE_MODEL = model_of(lambda n: factorization_machine(n, dim=2), item_ids=True, own_vector=True)


@pytest.fixture(scope="module")
def private_rounds():
    algorithm = fedavg(PRIVATE_MODEL.model, client_optimizer=optax.sgd(2.0), batch_size=3)
    return make_rounds(algorithm, CHAIN, SAMPLER, CLIENTS, span_size=1)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    said=hnp.arrays(np.float32, (NUM_CLIENTS, 2), elements=st.sampled_from([0.0, 1.0, -1e3, 1e18, np.inf, np.nan])),
    cohort=cohorts,
    user=users,
)
def test_with_and_without_one_user(private_rounds, said, cohort, user):
    """Whatever users claim of themselves, the sum before the noise moves by no more than the clip norm."""
    state, private = private_rounds.init(jax.random.key(0))
    private = with_user_values(private, said)
    sums = [pre_noise_sum(private_rounds, state, private, mask) for mask in with_and_without(cohort, user)]
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(sums))
    assert moved(*sums) <= CLIP * (1 + TOLERANCE)


def test_a_users_fields_move_nothing_where_it_is_absent_and_the_bound_is_reached(private_rounds):
    state, private = private_rounds.init(jax.random.key(0))
    private = with_user_values(private, USER_VALUES)
    masks = with_and_without(np.ones(NUM_CLIENTS, bool), 2)
    sums = [pre_noise_sum(private_rounds, state, private, mask) for mask in masks]
    assert 0.99 * CLIP < moved(*sums) <= CLIP * (1 + TOLERANCE)
    other = with_user_values(private, np.where(np.arange(NUM_CLIENTS)[:, None] == 2, 1 - USER_VALUES, USER_VALUES))
    absent = [pre_noise_sum(private_rounds, state, p, masks[1]) for p in (private, other)]
    assert moved(*absent) == 0
    assert moved(*[pre_noise_sum(private_rounds, state, p, masks[0]) for p in (private, other)]) > 0


def test_what_users_say_is_never_trained():
    """A method that takes gradients of private leaves finds none in a user's fields."""
    shared = PRIVATE_MODEL.model.init_shared(jax.random.key(0))
    private = {"own": jnp.ones(3), "user": jnp.asarray(USER_VALUES[0])}
    view = View({"item": shared.tables["item"][:6, None]}, shared.dense)
    batch = Examples(ITEMS[0], LABELS[0, :, None], np.ones((6, 1)))
    gradient = jax.jit(jax.grad(PRIVATE_MODEL.model.loss, argnums=1))(view, private, batch, None)
    assert not np.any(gradient["user"])
    assert np.any(gradient["own"])


def test_silos_train_on_clicks_and_keep_what_users_say():
    lists = [list(range(6)) for _ in USER_KINDS]
    split = make_split(lists, [[] for _ in lists], num_items=NUM_ITEMS)
    with pytest.raises(ValueError, match="rows without ratings"):
        silo_data(split, USER_KINDS, use_ratings=True)
    object.__setattr__(split.train, "ratings", LABELS.reshape(-1))
    silos = silo_data(split, np.array([0, 0, 0, 0, 1, 1]), use_ratings=True)
    (bucket,) = silos.clients.buckets
    for row, silo in enumerate(bucket.client_id):
        users_in = np.flatnonzero(silos.silo_ids == silo)
        np.testing.assert_array_equal(bucket.labels[row, : bucket.length[row]], LABELS[users_in].reshape(-1))
        assert not bucket.labels[row, bucket.length[row] :].any()
    trained = {"train": optax.sgd(0.5), "keep": optax.set_to_zero()}
    algorithm = silo_dpsgd(
        PRIVATE_MODEL.model,
        privacy=ExampleLevelDp(1.0, 1.0, 0.5, num_local_steps=2),
        users_per_silo=silos.users_per_silo,
        client_optimizer=optax.partition(trained, ("train", {"own": "train", "user": "keep"})),
        num_negatives=0,
    )
    rounds = make_rounds(algorithm, chain(), full_participation(2), silos.clients, span_size=1)
    state, private = rounds.init(jax.random.key(0))
    values = np.zeros(private["user"].shape, np.float32)
    values[silos.silo_ids, silos.user_slots] = USER_VALUES
    before, own = np.asarray(state.shared.tables["item"]), np.asarray(private["own"])
    state, private, metrics = rounds.run(state, with_user_values(private, values), KEYS)
    np.testing.assert_array_equal(private["user"], values)
    assert np.all(np.asarray(private["own"]) != own)
    assert np.all(np.asarray(state.shared.tables["item"]) != before)  # noise on every row, touched or not
    assert metrics["nonfinite"][0] == 0
