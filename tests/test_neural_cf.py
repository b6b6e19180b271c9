"""Risk: a tower scores or trains by another formula than the paper's, or user vectors leave their clients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_worlds import make_split
from flax import nnx

from fedjax_rec.algorithms.fedncf import fedncf
from fedjax_rec.algorithms.pfedrec import PERSONAL_FIRST
from fedjax_rec.data.clients import client_data
from fedjax_rec.data.negatives import Negatives
from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.local import ONE_PHASE, draw_epoch
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.transforms import UpdateTransform, chain
from fedjax_rec.models.neural_cf import gmf, mlp, neumf
from fedjax_rec.models.nnx import pure_module
from fedjax_rec.privacy.mechanisms import clip_by_global_norm, gaussian_noise, user_level_dp

NUM_USERS, NUM_ITEMS = 16, 16
MODELS = {
    "gmf": gmf(NUM_ITEMS, dim=4, init_stddev=0.5),
    "mlp": mlp(NUM_ITEMS, dim=4, hidden=(16, 8), init_stddev=0.5),
    "neumf": neumf(NUM_ITEMS, gmf_dim=4, mlp_dim=3, hidden=(6,), init_stddev=0.5),
}
KEYS = RoundKeys(*(jax.random.key(seed) for seed in (1, 2, 3)))


def population(absent=()):
    """Users with 1 to 7 items; absent ones have none."""
    lists = [[(3 * user + i) % NUM_ITEMS for i in range(user % 7 + 1)] for user in range(7)]
    lists = [[] if user in absent else items for user, items in enumerate(lists)]
    return client_data(make_split(lists, [[] for _ in lists], num_items=NUM_ITEMS), num_buckets=1)


def small_fedncf(model, **settings):
    settings = {
        "lr": 0.5,
        "tower_lr": 0.3,
        "item_lr_factor": 0.2,
        "batch_size": 3,
        "negatives": Negatives(1),
    } | settings
    return fedncf(model, num_items=NUM_ITEMS, **settings)


def one_round(algorithm, links=(), clients=None, **settings):
    clients = population() if clients is None else clients
    sampler = full_participation(clients.num_clients)
    rounds = make_rounds(algorithm, chain(*links), sampler, clients, span_size=1, **settings)
    before = jax.jit(rounds.init)(jax.random.key(0))
    copy = jax.device_get(before)
    return copy, jax.device_get(rounds.run(*before, KEYS))


def assert_close(a, b, tolerance=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


# The adapter.


def two_layers(rngs):
    return nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.relu, nnx.Linear(4, 1, rngs=rngs))


def test_a_module_is_pure_functions_over_a_flat_dict():
    module = pure_module(two_layers)
    params = jax.jit(module.init)(jax.random.key(0))
    assert {name: x.shape for name, x in params.items()} == {
        "layers.0.kernel": (3, 4),
        "layers.0.bias": (4,),
        "layers.2.kernel": (4, 1),
        "layers.2.bias": (1,),
    }
    assert all(x.dtype == jnp.float32 and not x.weak_type for x in params.values())
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    expected = two_layers(nnx.Rngs(jax.random.key(0)))(x)
    assert_close(module.apply(params, x), expected)
    assert_close(jax.jit(module.apply)(params, x), expected)

    @jax.jit
    def several(keys):
        params = jax.vmap(module.init)(keys)
        gradient = jax.vmap(jax.grad(lambda p: module.apply(p, x).sum()))(params)
        return params, jax.vmap(module.apply, in_axes=(0, None))(params, x), gradient

    stacked, outputs, gradient = several(jax.random.split(jax.random.key(0), 3))
    assert outputs.shape == (3, 5, 1)
    assert not np.allclose(outputs[0], outputs[1])
    assert jax.tree.map(jnp.shape, gradient) == jax.tree.map(jnp.shape, stacked)
    assert_close(gradient["layers.2.bias"], np.full((3, 1), 5.0))


def test_init_depends_on_the_key_alone():
    module = pure_module(two_layers)
    assert_close(module.init(jax.random.key(4)), jax.jit(module.init)(jax.random.key(4)))


@pytest.mark.parametrize(
    "build",
    [
        lambda rngs: nnx.Dropout(0.5, rngs=rngs),
        lambda rngs: nnx.BatchNorm(3, rngs=rngs),
        lambda rngs: nnx.Linear(3, 1, param_dtype=jnp.bfloat16, rngs=rngs),
    ],
)
def test_modules_with_more_than_float32_parameters_are_refused(build):
    with pytest.raises(ValueError, match=r"beside its parameters|param_dtype"):
        pure_module(build)


# The models.


def numpy_scores(shared, private):
    """The formulas of the paper, layer by layer, for one user."""
    tables, dense = shared
    parts = []
    if "gmf" in tables:
        parts.append(private["gmf"] * tables["gmf"])
    if "mlp" in tables:
        x = np.concatenate([np.tile(private["mlp"], (NUM_ITEMS, 1)), tables["mlp"]], axis=1)
        for layer in range(sum(name.startswith("hidden") for name in dense) // 2):
            x = np.maximum(x @ dense[f"hidden.{layer}.kernel"] + dense[f"hidden.{layer}.bias"], 0)
        parts.append(x)
    return (np.concatenate(parts, axis=1) @ dense["out.kernel"] + dense["out.bias"])[:, 0]


@pytest.mark.parametrize("name", MODELS)
def test_scores_follow_the_paper(name):
    model = MODELS[name]

    @jax.jit
    def initial_and_scores(key):
        shared, private = model.init_shared(key), model.init_private(jax.random.fold_in(key, 1))
        shared = shared._replace(dense=jax.tree.map(lambda x: x + 0.1, shared.dense))  # biases that are not zero
        return shared, private, model.score(shared, private)

    shared, private, scores = jax.device_get(initial_and_scores(jax.random.key(0)))
    assert_close(scores, numpy_scores(shared, private))


def test_default_widths_are_the_papers():
    shared = jax.eval_shape(neumf(NUM_ITEMS).init_shared, jax.random.key(0))
    kernels = [shared.dense[f"hidden.{layer}.kernel"].shape for layer in range(3)]
    assert kernels == [(64, 32), (32, 16), (16, 8)]
    assert shared.dense["out.kernel"].shape == (8 + 8, 1)


def test_a_tower_without_layers_is_refused():
    with pytest.raises(ValueError, match="one hidden layer or more"):
        mlp(NUM_ITEMS, hidden=())


@pytest.mark.parametrize("name", MODELS)
def test_checkerboard(name):
    """Users touch items of their colour; every withheld item ranks above every item of the other colour."""
    colours = [list(range(user % 2, NUM_ITEMS, 2)) for user in range(NUM_USERS)]
    withheld = np.array([items.pop(user // 2) for user, items in enumerate(colours)])
    clients = client_data(make_split(colours, [[] for _ in colours], num_items=NUM_ITEMS), num_buckets=1)
    model = MODELS[name]
    algorithm = small_fedncf(model, item_lr_factor=0.25, batch_size=4)
    rounds = make_rounds(algorithm, chain(), full_participation(NUM_USERS), clients, span_size=150, chunk_size=16)
    state, private, metrics = rounds.run(*jax.jit(rounds.init)(jax.random.key(0)), KEYS, 100)
    scores = np.asarray(jax.vmap(model.score, in_axes=(None, 0))(state.shared, private))
    users = np.arange(NUM_USERS)
    other_colour = np.where((users[:, None] + np.arange(NUM_ITEMS)) % 2 == 1, scores, -np.inf)
    assert metrics["loss"][99] < 0.8 * metrics["loss"][0]
    assert np.all(scores[users, withheld] - other_colour.max(1) > 0)


# The method.


def numpy_client(tables, dense, private, batches, phases, lr, tower_lr):
    """One client of GMF by hand: two passes of gradient steps on copies of everything."""
    q, p = tables["gmf"].copy(), private["gmf"].copy()
    h, b = dense["out.kernel"][:, 0].copy(), dense["out.bias"].copy()
    for ids, labels, weights in [*batches, *batches]:
        if not weights.any():
            continue
        for phase in phases:
            rows = q[np.minimum(ids, NUM_ITEMS - 1)]
            error = weights * (1 / (1 + np.exp(-((p * rows) @ h + b))) - labels) / max(weights.sum(), 1)
            step_p, step_q = (error[..., None] * rows * h).sum((0, 1)), error[..., None] * p * h
            step_h, step_b = (error[..., None] * p * rows).sum((0, 1)), error.sum()
            if "private" in phase:
                p -= lr * step_p
            if "rows" in phase:
                np.subtract.at(q, ids[ids < NUM_ITEMS], lr * step_q[ids < NUM_ITEMS])
            if "dense" in phase:
                h, b = h - tower_lr * step_h, b - tower_lr * step_b
    return q - tables["gmf"], h - dense["out.kernel"][:, 0], b - dense["out.bias"], p


@pytest.mark.parametrize("phases", [ONE_PHASE, PERSONAL_FIRST])
def test_one_round_by_hand(phases):
    clients = population()
    (bucket,) = clients.buckets
    (state, private), (after, new_private, _) = one_round(small_fedncf(MODELS["gmf"], phases=phases))
    tables, dense = jax.tree.map(lambda x: np.asarray(x, np.float64), state.shared)
    sums = [0, 0, 0]
    draw = jax.jit(lambda client, key: draw_epoch(client, Negatives(1), 3, key).examples)
    for row, user in enumerate(bucket.client_id):
        client = jax.tree.map(lambda x, row=row: x[row], bucket)
        key = jax.random.fold_in(jax.random.fold_in(KEYS.client, 0), user)
        draw_key, _ = jax.random.split(jax.random.split(key)[0])
        examples = jax.device_get(draw(client, draw_key))
        batches = list(zip(*examples, strict=True))
        *update, vector = numpy_client(tables, dense, {"gmf": private["gmf"][user]}, batches, phases, 0.5, 0.3)
        sums = [total + part for total, part in zip(sums, update, strict=True)]
        assert_close(new_private["gmf"][user], vector)
    item, out, bias = (total / clients.num_clients for total in sums)
    assert_close(after.shared.tables["gmf"], tables["gmf"] + NUM_ITEMS * 0.2 * item)
    assert_close(
        after.shared.dense, {"out.kernel": dense["out.kernel"] + out[:, None], "out.bias": dense["out.bias"] + bias}
    )
    assert np.abs(item).max() > 1e-3


def test_chunks_do_not_change_a_round():
    """Clients of 1 to 7 items, so that most run steps past their own data."""
    algorithm = small_fedncf(MODELS["mlp"])
    _, one = one_round(algorithm, chunk_size=1)
    _, three = one_round(algorithm, chunk_size=3)
    assert_close(one[:2], three[:2])


@pytest.mark.parametrize("name", MODELS)
def test_the_server_sees_no_user_vector(name):
    """State and update hold item tables and the tower; no leaf of them is named or shaped like a user's vector."""
    model = MODELS[name]
    algorithm = small_fedncf(model)
    shared, private = (jax.eval_shape(f, jax.random.key(0)) for f in (model.init_shared, model.init_private))
    client = jax.tree.map(lambda x: x[0], population().buckets[0])
    state = jax.eval_shape(algorithm.init, jax.random.key(0))
    steps = jax.ShapeDtypeStruct((), jnp.int32)
    output = jax.eval_shape(algorithm.client_update, shared, private, client, steps, jax.eval_shape(jax.random.key, 0))
    assert {rows.num_rows for rows in output.update.tables.values()} == {NUM_ITEMS}
    assert jax.tree.structure(output.update.dense) == jax.tree.structure(shared.dense)
    assert jax.tree.structure(state.shared) == jax.tree.structure(shared)
    assert not any("user" in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state))
    assert jax.tree.structure(output.private) == jax.tree.structure(private)
    vectors = {x.shape for x in jax.tree.leaves(private)}
    assert not vectors & {x.shape for x in jax.tree.leaves((state.shared.tables, state.opt_state))}


PROBE = UpdateTransform(
    init=lambda params: jax.tree.map(jnp.zeros_like, params), server=lambda total, *_: (total, total)
)


def test_one_user_moves_the_sum_by_the_clip_norm_at_most():
    """The chain of `user_level_dp` with a probe before its noise; the user's update is larger than the clip norm."""
    clip = 0.01
    links = (clip_by_global_norm(clip), gaussian_noise(clip), PROBE)
    algorithm = small_fedncf(MODELS["gmf"])
    sums = [one_round(algorithm, links, population(absent))[1][0].transforms[-1] for absent in ((), (5,))]
    moved = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, *sums)
    norm = np.sqrt(sum(np.square(x).sum() for x in jax.tree.leaves(moved)))
    assert 0.99 * clip < norm <= clip * (1 + 1e-5)


def test_it_runs_with_user_level_dp():
    algorithm = small_fedncf(MODELS["mlp"])
    dp = user_level_dp(l2_clip_norm=0.1, noise_multiplier=1.0)
    rounds = make_rounds(algorithm, dp, full_participation(7), population(), span_size=1)
    assert rounds.releases(0, 1)[0][0].noise_multiplier == 1.0
