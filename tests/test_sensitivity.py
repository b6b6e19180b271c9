"""Risk: one user moves what the server sees by more than the clip norm, so that no epsilon holds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from evaluation_worlds import make_split
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedjax_rec.algorithms.fedavg import fedavg
from fedjax_rec.data.clients import client_data, client_data_from_examples
from fedjax_rec.data.negatives import Negatives
from fedjax_rec.federated.algorithm import Algorithm, ClientOutput, ServerState
from fedjax_rec.federated.cohort import full_participation, poisson
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.rows import Rows, to_dense
from fedjax_rec.federated.transforms import UpdateTransform, chain
from fedjax_rec.models.base import Shared
from fedjax_rec.models.matrix_factorization import matrix_factorization
from fedjax_rec.privacy.mechanisms import clip_by_global_norm, gaussian_noise

CLIP, NUM_CLIENTS, NUM_ITEMS, DIM = 0.5, 6, 7, 2
PROBE = UpdateTransform(
    init=lambda params: jax.tree.map(jnp.zeros_like, params), server=lambda total, *_: (total, total)
)
CHAIN = chain(clip_by_global_norm(CLIP), gaussian_noise(1.0), PROBE)  # the server runs it from the right
TOLERANCE = 1e-5

ANY = st.floats(width=32) | st.sampled_from([0.0, -0.0, 1e-30, 1e-42, 1e18, 1e19, 1e30, -3e38, np.inf, -np.inf, np.nan])
MILD = st.floats(-3, 3, width=32)


def joint_norm(tree) -> float:
    return float(np.sqrt(sum(np.square(np.asarray(x, np.float64)).sum() for x in jax.tree.leaves(tree))))


def moved(a, b) -> float:
    """Joint L2 distance of two pre-noise sums, in float64."""
    return joint_norm(jax.tree.map(lambda x, y: np.asarray(x, np.float64) - np.asarray(y, np.float64), a, b))


def keys_of_every_cohort(sampler, num_clients):
    """A cohort key for each subset of clients: the same coins for all but one client are then one key and another."""
    draw = jax.jit(jax.vmap(lambda seed: sampler.draw(jax.random.key(seed), 0)))
    masks = np.asarray(draw(jnp.arange(40 * 2**num_clients)))
    return {tuple(mask): seed for seed, mask in enumerate(masks)}


SAMPLER = poisson(NUM_CLIENTS, cohort_size=3)
COHORTS = keys_of_every_cohort(SAMPLER, NUM_CLIENTS)
cohorts = hnp.arrays(bool, NUM_CLIENTS)
users = st.integers(0, NUM_CLIENTS - 1)


def pre_noise_sum(rounds, state, private, cohort, seed=0):
    """Runs the real round for a cohort and returns the sum that the noise was added to."""
    keys = RoundKeys(jax.random.key(COHORTS[tuple(cohort)]), jax.random.key(seed), jax.random.key(1))
    state, _, metrics = rounds.run(*jax.tree.map(jnp.array, (state, private)), keys)
    assert metrics["cohort_size"][0] == np.sum(cohort)
    return jax.device_get(state.transforms[2])


def with_and_without(cohort, user):
    return np.where(np.arange(NUM_CLIENTS) == user, [[True], [False]], cohort)


def test_every_cohort_has_a_key():
    assert len(COHORTS) == 2**NUM_CLIENTS


# Clients that send whatever they like: their update is their private state.


def adversaries():
    def client_update(shared, private, client, num_steps, key):
        del shared, num_steps, key
        rows = Rows(private["ids"], private["values"], NUM_ITEMS, unique=False)
        return ClientOutput(Shared({"item": rows}, {"out": private["dense"]}), private, {"loss": jnp.zeros(())})

    def init(key):
        del key
        shared = Shared({"item": jnp.zeros((NUM_ITEMS, DIM))}, {"out": jnp.zeros(3)})
        return ServerState(jnp.zeros((), jnp.int32), shared, ())

    return Algorithm(
        init=init,
        init_private=lambda key: {
            "ids": jnp.zeros(5, jnp.int32),
            "values": jnp.zeros((5, DIM)),
            "dense": jnp.zeros(3),
        },
        client_update=client_update,
        num_steps=lambda client: jnp.int32(1),
        server_update=lambda state, aggregate: state,
    )


def nothing_but_clients():
    one = (np.zeros(1, np.int64), np.ones(1))
    return client_data_from_examples([one] * NUM_CLIENTS, num_items=NUM_ITEMS)


@pytest.fixture(scope="module", params=["poisson", "all"])
def adversarial_rounds(request):
    sampler = SAMPLER if request.param == "poisson" else full_participation(NUM_CLIENTS)
    return request.param, make_rounds(adversaries(), CHAIN, sampler, nothing_but_clients(), span_size=1)


uploads = st.fixed_dictionaries(
    {
        "ids": hnp.arrays(np.int32, (NUM_CLIENTS, 5), elements=st.integers(0, NUM_ITEMS)),  # NUM_ITEMS is padding
        "values": hnp.arrays(np.float32, (NUM_CLIENTS, 5, DIM), elements=ANY | MILD, fill=MILD),
        "dense": hnp.arrays(np.float32, (NUM_CLIENTS, 3), elements=ANY | MILD, fill=MILD),
    }
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(uploads=uploads, cohort=cohorts, user=users)
def test_whatever_a_client_sends(adversarial_rounds, uploads, cohort, user):
    """200 neighbouring cases a sampler: add one client with any update, and the pre-noise sum moves by at most C."""
    name, rounds = adversarial_rounds
    state, _ = rounds.init(jax.random.key(0))
    if name == "poisson":
        sums = [pre_noise_sum(rounds, state, uploads, mask) for mask in with_and_without(cohort, user)]
    else:  # everyone takes part, so an absent client is one that adds nothing
        absent = {
            k: np.where((np.arange(NUM_CLIENTS) == user).reshape(-1, *[1] * (v.ndim - 1)), np.zeros_like(v), v)
            for k, v in uploads.items()
        }
        everyone = np.ones(NUM_CLIENTS, bool)
        sums = [pre_noise_sum(rounds, state, p, everyone) for p in (uploads, absent)]
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(sums))
    assert moved(*sums) <= CLIP * (1 + TOLERANCE)
    sent = {k: v[user] for k, v in uploads.items()}
    if np.all(np.abs(sent["values"]) <= 3) and np.all(np.abs(sent["dense"]) <= 3):  # and exactly so where it is plain
        table = np.zeros((NUM_ITEMS + 1, DIM))
        np.add.at(table, sent["ids"], sent["values"].astype(np.float64))
        norm = joint_norm((table[:NUM_ITEMS], sent["dense"]))
        np.testing.assert_allclose(moved(*sums), min(norm, CLIP), rtol=1e-4, atol=1e-5)


# Clients that run FedAvg on data of every kind, on server and user parameters of every size.


def strange_examples():
    """Repeated items, NaN, infinite and huge ratings, nobody's data, and ordinary ones."""
    rng = np.random.default_rng(0)
    labels = [[1.0, 0.0, 3.0, -2.0], [np.nan, 1.0], [1e30, -1e30, 1.0], [], [np.inf], list(rng.normal(size=9))]
    items = [[2, 2, 2, 5], [0, 1], [3, 3, 4], [], [6], rng.integers(0, NUM_ITEMS, 9)]
    pairs = [(np.asarray(i, np.int64), np.asarray(r)) for i, r in zip(items, labels, strict=True)]
    return client_data_from_examples(pairs, num_items=NUM_ITEMS, num_buckets=1)


def drawn_examples():
    rng = np.random.default_rng(1)
    train = [rng.permutation(NUM_ITEMS)[:n].tolist() for n in (3, 0, 6, 1, 4, 7)]
    split = make_split(train, [[] for _ in train], num_items=NUM_ITEMS)
    return client_data(split, num_buckets=1)


WORLDS = {
    "given": (strange_examples, {"loss": "squared"}, {}),
    "drawn": (drawn_examples, {"loss": "bpr"}, {"negatives": Negatives(2)}),
}


@pytest.fixture(scope="module", params=WORLDS)
def training_rounds(request):
    data, model, training = WORLDS[request.param]
    model = matrix_factorization(NUM_ITEMS, dim=DIM, **model)
    algorithm = fedavg(model, client_optimizer=optax.sgd(0.5), local_epochs=2, batch_size=3, **training)
    return make_rounds(algorithm, CHAIN, SAMPLER, data(), span_size=1)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    tables=hnp.arrays(np.float32, (NUM_ITEMS, DIM), elements=MILD | st.sampled_from([0.0, 1e3, 1e18, 1e30]), fill=MILD),
    vectors=hnp.arrays(np.float32, (NUM_CLIENTS, DIM), elements=ANY | MILD, fill=MILD),
    cohort=cohorts,
    user=users,
    seed=st.integers(0, 1000),
)
def test_fedavg_with_and_without_one_user(training_rounds, tables, vectors, cohort, user, seed):
    """The same over FedAvg, two epochs of batches: 100 cases each with given examples and with drawn negatives."""
    state, _ = training_rounds.init(jax.random.key(0))
    state = state._replace(shared=state.shared._replace(tables=state.shared.tables | {"item": tables}))
    masks = with_and_without(cohort, user)
    sums = [pre_noise_sum(training_rounds, state, {"user": vectors}, mask, seed) for mask in masks]
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(sums))
    assert moved(*sums) <= CLIP * (1 + TOLERANCE)


def test_with_and_without_one_users_rows():
    """Neighbouring populations laid out anew: the user's rows are gone, the buckets and the chunks are others."""
    model = matrix_factorization(NUM_ITEMS, dim=DIM, loss="squared")
    algorithm = fedavg(model, client_optimizer=optax.sgd(5.0), batch_size=2)
    (bucket,) = strange_examples().buckets
    examples = [(bucket.item_ids[row, :n], bucket.labels[row, :n]) for row, n in enumerate(bucket.length)]
    examples = [examples[row] for row in np.argsort(bucket.client_id)]
    sums = []
    for absent in (None, 0, 5):
        population = [(i, r) if user != absent else (i[:0], r[:0]) for user, (i, r) in enumerate(examples)]
        clients = client_data_from_examples(population, num_items=NUM_ITEMS, num_buckets=2)
        rounds = make_rounds(algorithm, CHAIN, full_participation(NUM_CLIENTS), clients, span_size=1)
        keys = RoundKeys(*(jax.random.key(i) for i in range(3)))
        state, _, metrics = rounds.run(*rounds.init(jax.random.key(0)), keys)
        sums.append(state.transforms[2])
        assert metrics["nonfinite"][0] > 0
    for without in sums[1:]:
        assert 0.99 * CLIP < moved(sums[0], without) <= CLIP * (1 + TOLERANCE)  # they are clipped: the bound is reached


# The clip alone, where shapes may be large.


def clip(update, l2_clip_norm=CLIP):
    return jax.jit(lambda u: clip_by_global_norm(l2_clip_norm).client(u, (), jax.random.key(0)))(update)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    ids=hnp.arrays(np.int32, 6, elements=st.integers(0, 4)),
    values=hnp.arrays(np.float32, (6, 2), elements=ANY | MILD, fill=MILD),
    dense=hnp.arrays(np.float32, 3, elements=ANY | MILD, fill=MILD),
    scalar=ANY,
)
@example(ids=np.zeros(6, np.int32), values=np.full((6, 2), 1e18, np.float32), dense=np.zeros(3), scalar=0.0)
def test_clipped_norm(ids, values, dense, scalar):
    rows = Rows(jnp.asarray(ids), jnp.asarray(values), 4, unique=False)
    update = {"rows": rows, "dense": jnp.asarray(dense, jnp.float32), "scalar": jnp.float32(scalar)}
    clipped, metrics = JITTED(update)
    assert joint_norm(to_dense(clipped)) <= CLIP * (1 + TOLERANCE)
    before = to_dense(update)
    if joint_norm(before) <= CLIP * (1 - TOLERANCE):  # short updates pass as they are
        assert metrics["clipped"] == metrics["nonfinite"] == 0
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), to_dense(clipped), before)


JITTED = jax.jit(lambda u: clip_by_global_norm(CLIP).client(u, (), jax.random.key(0)))


@pytest.mark.parametrize("shape", [(4000, 64), (100_000, 32)])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 123.456])
def test_large_updates_do_not_drift_past_the_clip(shape, value):
    """Equal addends are the worst case of float32 accumulation."""
    values = jnp.full(shape, value, jnp.float32)
    clipped, _ = clip({"rows": Rows(jnp.arange(shape[0]), values, shape[0]), "dense": jnp.float32(value)})
    assert joint_norm(clipped["rows"].values) <= CLIP * (1 + TOLERANCE)
    assert joint_norm(clipped["rows"].values) >= CLIP * (1 - 1e-4)


@pytest.mark.parametrize("l2_clip_norm", [1e-12, 1e-3, 1e3, 1e12])
def test_the_bound_holds_for_every_clip_norm(l2_clip_norm):
    """Small updates must not vanish in the squares of their norm, nor large ones."""
    for magnitude in (1e-21, 1e-13, 1.0, 1e15):
        values = jnp.full((5000, 4), magnitude, jnp.float32)
        clipped, _ = clip({"rows": Rows(jnp.arange(5000), values, 5000)}, l2_clip_norm)
        assert joint_norm(clipped["rows"].values) <= l2_clip_norm * (1 + TOLERANCE)


def test_a_nonfinite_update_is_a_zero_update():
    for bad in (np.nan, np.inf, -np.inf, 1e30):
        update = {"rows": Rows(jnp.arange(3), jnp.array([[1.0], [bad], [2.0]]), 3), "dense": jnp.ones(2)}
        clipped, metrics = clip(update)
        assert joint_norm(to_dense(clipped)) == 0
        assert (metrics["nonfinite"], metrics["clipped"], metrics["update_norm"]) == (1, 0, 0)
