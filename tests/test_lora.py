"""Risk: adapters that train what should be frozen, average to another model than the clients', or fit no device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from evaluation_worlds import make_split

from benchmarks import text as benchmark
from fedjax_rec.algorithms.fedsequence import fedsequence
from fedjax_rec.data.clients import client_data
from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.transforms import chain
from fedjax_rec.models.items import id_table
from fedjax_rec.models.lora import add_lora, init_lora, trained_part, whole_adapters, with_lora
from fedjax_rec.models.sasrec import sasrec

NUM_ITEMS, RANK = 12, 2
NAMES = ("query", "value")
MODEL = sasrec(id_table(NUM_ITEMS, dim=8, init_stddev=1.0), max_length=6, num_blocks=1, dropout=0.0)
PARAMS = MODEL.init(jax.random.key(0))
HISTORIES = [[1, 2, 3, 4], [5, 3, 2, 8, 9], [0, 11, 7, 6], [10, 1, 0, 2, 5, 7]]


def tuned(freeze_a):
    return with_lora(MODEL, PARAMS, rank=RANK, names=NAMES, key=jax.random.key(1), freeze_a=freeze_a)


@pytest.fixture(scope="module", params=[False, True], ids=["LoRA", "FFA-LoRA"])
def one_round(request):
    """Two rounds of the real engine and of a loop over clients: (freeze_a, before, each client's adapters, after)."""
    model = tuned(request.param)
    algorithm = fedsequence(model, client_lr=3.0, server_optimizer=optax.sgd(1.0))
    split = make_split(HISTORIES, [[] for _ in HISTORIES], num_items=NUM_ITEMS)
    clients = client_data(split, num_buckets=1)
    rounds = make_rounds(algorithm, chain(), full_participation(len(HISTORIES)), clients)
    init_key, *keys = jax.random.split(jax.random.key(2), 4)
    # The second round: in the first one B is 0, and A has no gradient yet.
    (state, private), keys = rounds.init(init_key), RoundKeys(*keys)
    state, private, _ = rounds.run(state, private, keys, 1)
    before = jax.device_get(state.shared)
    state, _, _ = rounds.run(state, private, keys, 1)
    (bucket,) = clients.buckets
    key = jax.random.key(9)  # without dropout and drawn negatives nothing reads it
    outputs = jax.jit(jax.vmap(lambda client: algorithm.client_update(before, {}, client, 1, key)))(bucket)
    trained = jax.tree.map(lambda w, u: w[None] + u, before.dense, outputs.update.dense)
    return request.param, before, trained, jax.device_get(state.shared)


def products(adapters):
    """A B of each kernel, for one model or with a leading axis of clients."""
    return {
        name: np.asarray(pair["a"], np.float64) @ np.asarray(pair["b"], np.float64) for name, pair in adapters.items()
    }


def test_the_mean_of_the_clients_products_is_the_product_of_the_means_exactly_where_a_is_frozen(one_round):
    freeze_a, _, trained, after = one_round
    frozen = init_lora(PARAMS.dense, NAMES, rank=RANK, key=jax.random.key(1))
    together = products(whole_adapters(frozen, after.dense))
    each = products(whole_adapters(frozen, trained))
    worst = max(np.abs(each[name].mean(0) - together[name]).max() for name in together)
    moved = max(np.abs(product).max() for product in together.values())
    assert moved > 0.01
    assert (worst < 1e-6) if freeze_a else (worst > 1e-3 * moved)


def test_an_update_is_the_adapters_and_nothing_else(one_round):
    freeze_a, before, _, after = one_round
    assert before.tables == after.tables == {}
    kernels = [f"body.blocks.0.{name}.kernel" for name in NAMES]
    sizes = {"a": (8, RANK), "b": (RANK, 8)}
    kept = {"b"} if freeze_a else {"a", "b"}
    assert jax.tree.map(np.shape, after.dense) == {name: {part: sizes[part] for part in kept} for name in kernels}
    for name in kernels:
        for part in kept:
            assert np.abs(after.dense[name][part] - before.dense[name][part]).max() > 1e-4


@pytest.mark.parametrize("freeze_a", [False, True])
def test_before_training_the_model_scores_as_it_did_and_then_by_the_kernels_with_the_product(freeze_a):
    model, history = tuned(freeze_a), jnp.array([3, 1, 4, NUM_ITEMS])
    fresh = model.init(jax.random.key(3))
    np.testing.assert_array_equal(model.score(fresh, history), MODEL.score(PARAMS, history))
    moved = fresh._replace(dense=jax.tree.map(lambda x: x + 0.5, fresh.dense))
    frozen = init_lora(PARAMS.dense, NAMES, rank=RANK, key=jax.random.key(1))
    dense = dict(PARAMS.dense["body"])
    for name, product in products(whole_adapters(frozen, moved.dense)).items():
        dense[name.removeprefix("body.")] = dense[name.removeprefix("body.")] + product.astype(np.float32)
    expected = PARAMS._replace(dense=PARAMS.dense | {"body": dense})
    np.testing.assert_allclose(model.score(moved, history), MODEL.score(expected, history), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model.places(moved, history)[2], model.query(moved, history, None), rtol=1e-5, atol=1e-5)


def test_a_is_drawn_by_its_scale_and_b_is_zero():
    params = {"layers": {"wide.kernel": jnp.zeros((3, 400, 30)), "bias": jnp.zeros(30)}}
    drawn = init_lora(params, ("wide",), rank=20, key=jax.random.key(0), alpha=40.0)["layers.wide.kernel"]
    assert drawn["a"].shape == (3, 400, 20)
    assert float(drawn["a"].std()) == pytest.approx(40 / 20 / 400**0.5, rel=0.03)
    np.testing.assert_array_equal(drawn["b"], np.zeros((3, 20, 30)))
    np.testing.assert_array_equal(add_lora(params, {"layers.wide.kernel": drawn})["layers"]["wide.kernel"], 0)


def test_a_wrong_name_or_rank_is_refused_with_what_there_is():
    with pytest.raises(ValueError, match=r"'querry'.*body\.blocks\.0\.query\.kernel"):
        with_lora(MODEL, PARAMS, rank=RANK, names=("value", "querry"), key=jax.random.key(0))
    for rank in (0, 9):
        with pytest.raises(ValueError, match=rf"1\.\.8 for .*got {rank}"):
            init_lora(PARAMS.dense, NAMES, rank=rank, key=jax.random.key(0))


def test_a_client_of_a_minilm_fits_and_sends_little():
    """20 texts of 32 tokens, rank 8 on queries and values; compiled, never run."""
    shape = benchmark.Shape()
    assert benchmark.payload(shape, freeze_a=False) == 73_728  # 288 KiB
    assert benchmark.payload(shape, freeze_a=True) == 36_864
    assert 1 < benchmark.client_memory(shape) / 2**20 <= 60


def test_trained_part_and_frozen_part_make_the_whole():
    whole = init_lora(PARAMS.dense, NAMES, rank=RANK, key=jax.random.key(1))
    for freeze_a in (False, True):
        again = whole_adapters(whole, trained_part(whole, freeze_a=freeze_a))
        jax.tree.map(np.testing.assert_array_equal, again, whole)
