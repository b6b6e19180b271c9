"""Risk: the fast round (rows, buckets, chunks, vmap, several devices) computes something else than the paper's loop."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from evaluation_worlds import make_split
from reference_round import one_by_one, reference_rounds
from test_compilation import compilations

from fedjax_rec.algorithms.fedavg import fedavg, fedsgd
from fedjax_rec.data.clients import client_data, client_data_from_examples
from fedjax_rec.data.negatives import Negatives, popularity_cdf
from fedjax_rec.federated.cohort import fixed_size, full_participation, poisson
from fedjax_rec.federated.local import draw_epoch
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.transforms import chain
from fedjax_rec.models.base import Examples, Model, Shared, View
from fedjax_rec.models.matrix_factorization import linear_scorer, matrix_factorization
from fedjax_rec.privacy.mechanisms import clip_by_global_norm, user_level_dp
from fedjax_rec.security.ring import fixed_point
from fedjax_rec.security.simulated import simulated_secure_sum

NUM_CLIENTS, NUM_ITEMS = 11, 17
LENGTHS = (0, 1, 1, 2, 3, 4, 5, 7, 9, 9, 16)  # an empty client, one who touched nearly everything, five buckets
PRIVATE_ADAM = optax.partition(
    {"shared": optax.sgd(0.4), "private": optax.adam(0.05)}, {"rows": "shared", "dense": "shared", "private": "private"}
)


def keys():
    return RoundKeys(*(jax.random.key(seed) for seed in (1, 2, 3)))


def drawn(num_buckets, num_shards=1):
    """Distinct items; what is missing is drawn."""
    rng = np.random.default_rng(0)
    train = [rng.permutation(NUM_ITEMS)[:n].tolist() for n in rng.permutation(LENGTHS)]
    split = make_split(train, [[] for _ in train], num_items=NUM_ITEMS)
    return client_data(split, num_buckets=num_buckets, num_shards=num_shards)


def given(num_buckets, num_shards=1, num_items=NUM_ITEMS):
    """Ready-made examples in which items repeat, within a batch and across batches."""
    rng = np.random.default_rng(1)
    examples = [(rng.integers(0, num_items, n), rng.random(n).astype(np.float32)) for n in rng.permutation(LENGTHS)]
    return client_data_from_examples(examples, num_items=num_items, num_buckets=num_buckets, num_shards=num_shards)


def dropout_model():
    """A loss with its own randomness, a dense leaf and two tables of different widths."""
    base = matrix_factorization(NUM_ITEMS, dim=3)

    def init_shared(key):
        shared = base.init_shared(key)
        return Shared(shared.tables, {"gain": jnp.ones(3)})

    def loss(view, private, examples, key):
        mask = jax.random.bernoulli(key, 0.5, (3,)) * 2.0
        user = private["user"] * view.dense["gain"] * mask
        return base.loss(View(view.rows, {}), {"user": user}, examples, key)

    return Model(init_shared, base.init_private, loss, base.score)


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    model: Model
    data: object
    optimizer: optax.GradientTransformation = dataclasses.field(default_factory=lambda: optax.sgd(0.3))
    server_optimizer: optax.GradientTransformation = dataclasses.field(default_factory=lambda: optax.sgd(1.0))
    negatives: Negatives | None = None
    batch_size: int | None = None
    local_epochs: int = 1
    clip: float = np.inf
    layouts: tuple = ((4, 1),)  # (chunk size, length buckets)


POPULARITY = popularity_cdf(np.arange(NUM_ITEMS) + 1.0)
SETTINGS = {
    "logistic-uniform": Setting(
        matrix_factorization(NUM_ITEMS, dim=3, l2=0.1),
        drawn,
        optimizer=PRIVATE_ADAM,
        negatives=Negatives(2),
        batch_size=3,
        local_epochs=2,
        clip=0.05,
        layouts=((64, 2),),
    ),
    "squared-given": Setting(
        matrix_factorization(NUM_ITEMS, dim=3, loss="squared", label_mean=0.5),
        given,
        server_optimizer=optax.adam(0.1),
        batch_size=4,
        local_epochs=3,
        layouts=((1, 1), (64, 5)),
    ),
    "bpr-popularity": Setting(
        matrix_factorization(NUM_ITEMS, dim=3, loss="bpr"),
        drawn,
        server_optimizer=optax.sgd(0.5, momentum=0.9),
        negatives=Negatives(3, "popularity", POPULARITY),
        batch_size=2,
    ),
    "linear-given": Setting(linear_scorer(NUM_ITEMS, dim=3), given, batch_size=3, local_epochs=2, clip=0.1),
    "dropout-uniform": Setting(
        dropout_model(), drawn, negatives=Negatives(1), batch_size=3, local_epochs=2, layouts=((64, 1),)
    ),
}


def algorithm_of(s):
    return fedavg(
        s.model,
        client_optimizer=s.optimizer,
        server_optimizer=s.server_optimizer,
        local_epochs=s.local_epochs,
        batch_size=s.batch_size,
        negatives=s.negatives,
    )


def engine(s, chunk_size, num_buckets, sampler):
    links = [] if s.clip == np.inf else [clip_by_global_norm(s.clip)]
    return make_rounds(algorithm_of(s), chain(*links), sampler, s.data(num_buckets), chunk_size=chunk_size, span_size=4)


def assert_close(actual, expected, tolerance=1e-5):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def only_server(state):
    return state.round, state.shared, state.opt_state


@pytest.mark.parametrize("name", SETTINGS)
def test_every_layout_is_the_python_loop(name):
    """Rows == dense, padded == unpadded, chunk 1 == chunk 64, vmapped == loop; three rounds, Poisson cohorts."""
    s = SETTINGS[name]
    sampler = poisson(NUM_CLIENTS, cohort_size=6)
    expected, losses = None, []
    for chunk_size, num_buckets in s.layouts:
        rounds = engine(s, chunk_size, num_buckets, sampler)
        state, private = rounds.init(jax.random.key(0))
        if expected is None:
            reference = reference_rounds(
                s.model,
                s.data(1),
                sampler,
                optimizer=s.optimizer,
                server_optimizer=s.server_optimizer,
                negatives=s.negatives,
                batch_size=s.batch_size,
                local_epochs=s.local_epochs,
                clip=s.clip,
            )
            expected = state, private
            for _ in range(3):
                *expected, loss = reference(*expected, keys())
                losses.append(loss)
        state, private, metrics = rounds.run(state, private, keys(), 3)
        assert_close(only_server(state), only_server(expected[0]))
        assert_close(private, expected[1])
        np.testing.assert_allclose(metrics["loss"][:3], losses, rtol=1e-5)
        if s.clip < np.inf:
            assert 0 < float(jnp.nanmean(metrics["clipped"])) <= 1  # or the comparison says nothing about clipping


def test_the_population_has_many_buckets():
    assert [len(drawn(n).buckets) for n in (1, 2)] == [1, 2]
    assert len(given(5).buckets) == 5


def test_draws_do_not_depend_on_padding():
    tight, loose = ({int(c.client_id): c for b in drawn(n).buckets for c in unstack(b)} for n in (5, 1))
    assert sorted(tight) == sorted(loose) == list(range(NUM_CLIENTS))
    client_id = next(i for i, c in tight.items() if c.length == 7)
    assert tight[client_id].item_ids.shape == (9,)
    assert loose[client_id].item_ids.shape == (16,)
    for negatives in (Negatives(2), Negatives(3, "popularity", POPULARITY)):
        draw = jax.jit(lambda client, key, n=negatives: draw_epoch(client, n, None, key).examples)
        a, b = (draw(population[client_id], jax.random.key(5)) for population in (tight, loose))
        length = 7
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x[0, :length], y[0, :length])
        assert not np.any(b.weights[0, length:])


def unstack(bucket):
    return [jax.tree.map(lambda x, i=i: jnp.asarray(x[i]), bucket) for i in range(len(bucket.client_id))]


def test_spans_bucket_order_and_row_order_change_nothing():
    """run(3) == three times run(1); buckets and the clients in them may come in any order."""
    s = SETTINGS["squared-given"]
    sampler = fixed_size(NUM_CLIENTS, cohort_size=5)
    rounds = engine(s, 2, 2, sampler)
    whole, private, metrics = rounds.run(*rounds.init(jax.random.key(0)), keys(), 3)
    state, stepwise_private = rounds.init(jax.random.key(0))
    for done in range(3):
        state, stepwise_private, step_metrics = rounds.run(state, stepwise_private, keys())
        assert step_metrics["loss"][0] == metrics["loss"][done]
        assert np.all(np.isnan(step_metrics["loss"][1:]))
    for a, b in zip(jax.tree.leaves((state, stepwise_private)), jax.tree.leaves((whole, private)), strict=True):
        np.testing.assert_array_equal(a, b)

    clients = s.data(2)
    rng = np.random.default_rng(0)
    buckets = []
    for bucket in reversed(clients.buckets):
        order = rng.permutation(len(bucket.client_id))
        buckets.append(jax.tree.map(lambda x, order=order: x[order], bucket))
    shuffled = dataclasses.replace(clients, buckets=tuple(buckets))
    other = make_rounds(algorithm_of(s), chain(), sampler, shuffled, chunk_size=3, span_size=4)
    state, private_again, _ = other.run(*other.init(jax.random.key(0)), keys(), 3)
    assert_close((state, private_again), (whole, private))


def test_fedsgd_with_everyone_is_gradient_descent_on_all_data():
    """Full batches, full participation, server SGD: one round is one step on the mean of the clients' losses."""
    model = matrix_factorization(NUM_ITEMS, dim=3, loss="squared", l2=0.01)
    data = given(1)
    algorithm = fedsgd(model, server_optimizer=optax.sgd(0.7), private_optimizer=optax.sgd(0.2))
    rounds = make_rounds(algorithm, chain(), full_participation(NUM_CLIENTS), data, span_size=4)
    state, private = rounds.init(jax.random.key(0))
    params = jax.tree.map(jnp.copy, (state.shared, private))

    def objective(shared, private):
        total = 0.0
        for client in one_by_one(data):
            real = (np.arange(len(client.item_ids)) < client.length)[:, None]
            batch = Examples(client.item_ids[:, None], client.labels[:, None], real.astype(np.float32))
            view = View({n: jnp.take(t, batch.ids, axis=0, mode="clip") for n, t in shared.tables.items()}, {})
            own = jax.tree.map(lambda x, client=client: x[client.client_id], private)
            if client.length > 0:  # an empty client has no data and no regulariser
                total += model.loss(view, own, batch, jax.random.key(0))
        return total

    gradient = jax.jit(jax.grad(objective, argnums=(0, 1)))
    for _ in range(4):
        by_shared, by_private = gradient(*params)
        shared = jax.tree.map(lambda x, g: x - 0.7 * g / NUM_CLIENTS, params[0], by_shared)
        params = shared, jax.tree.map(lambda x, g: x - 0.2 * g, params[1], by_private)
    state, private, _ = rounds.run(state, private, keys(), 4)
    assert_close((state.shared, private), params)


FOUR_DEVICES = """
import jax
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
import numpy as np
from test_round_equivalence import compare_devices, secure_sum
assert len(jax.devices()) == 4
compare_devices(num_items=17)
compare_devices(num_items=20, links=secure_sum())
compare_devices(num_items=24_000)  # a table whose noise is drawn in pieces
print("devices agree")
"""


def secure_sum():
    """A secure sum that some drop out of, in steps too small for the comparison to see."""
    masked = simulated_secure_sum(degree=4, threshold=2, dropout_prob=0.3)
    return chain(clip_by_global_norm(0.3), fixed_point(largest=0.3, max_clients=NUM_CLIENTS, bits=22), masked)


def compare_devices(num_items, links=None):
    """One device against a mesh of four. The population, 11, is no multiple of four; tables of 20 rows are."""
    model = matrix_factorization(num_items, dim=3, loss="squared", label_mean=0.5)
    s = dataclasses.replace(SETTINGS["squared-given"], model=model)
    links = user_level_dp(l2_clip_norm=0.3, noise_multiplier=0.5) if links is None else links
    sampler = poisson(NUM_CLIENTS, cohort_size=6)
    results = []
    for mesh in (None, jax.make_mesh((4,), ("clients",))):
        clients = given(2, num_shards=1 if mesh is None else 4, num_items=num_items)
        rounds = make_rounds(algorithm_of(s), links, sampler, clients, span_size=3, chunk_size=2, mesh=mesh)
        state, private, first = rounds.run(*rounds.init(jax.random.key(0)), keys(), 2)
        with compilations() as events:
            state, private, second = rounds.run(state, private, keys(), 1)
        assert events == []
        by_client = jax.tree.map(lambda x: np.asarray(x)[:NUM_CLIENTS], private)
        results.append((only_server(jax.device_get(state)), by_client, first, second))
    assert_close(*reversed(results))


def test_one_device_equals_four():
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", FOUR_DEVICES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "devices agree" in done.stdout
