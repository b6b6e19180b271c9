"""Risk: closed forms, halves and step limits are off by a little, and the methods still seem to learn."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from evaluation_worlds import make_split

from fedjax_rec.algorithms.fcf import fcf, fcf_score, user_vector
from fedjax_rec.algorithms.fedrecon import SHARED_ONLY, fedrecon, reconstruct
from fedjax_rec.algorithms.pfedrec import PERSONAL_FIRST, personal_scorer
from fedjax_rec.data.clients import client_data, client_data_from_examples
from fedjax_rec.data.negatives import Negatives
from fedjax_rec.federated import local
from fedjax_rec.federated.algorithm import client_key
from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.transforms import chain
from fedjax_rec.models.matrix_factorization import matrix_factorization
from fedjax_rec.privacy.mechanisms import clip_by_global_norm, user_level_dp

NUM_ITEMS, DIM = 23, 3
LENGTHS = (1, 4, 0, 9, 2, 22, 15)


def keys():
    return RoundKeys(*(jax.random.key(seed) for seed in (1, 2, 3)))


@cache
def ratings():
    """Item ids and ratings of each client, one of which has none."""
    rng = np.random.default_rng(0)
    return [(rng.permutation(NUM_ITEMS)[:n], rng.integers(1, 6, n).astype(np.float32)) for n in LENGTHS]


def drawn(lists, *, num_items=NUM_ITEMS, num_buckets=1):
    """Clients whose ratings are shuffled in each round."""
    split = make_split([items for items, _ in lists], [[] for _ in lists], num_items=num_items)
    values = np.concatenate([values for _, values in lists]).astype(np.float32)
    split = dataclasses.replace(split, train=dataclasses.replace(split.train, ratings=values))
    return client_data(split, use_ratings=True, num_buckets=num_buckets)


def given(lists):
    """Clients whose ratings keep their order."""
    return client_data_from_examples(lists, num_items=NUM_ITEMS, num_buckets=1)


def bucket_of(clients):
    """All clients, in order of their ids."""
    (bucket,) = clients.buckets
    order = np.argsort(bucket.client_id)
    return jax.tree.map(lambda x: jnp.asarray(x)[order], bucket)


def run(algorithm, clients, num_rounds=1, *, links=None, chunk_size=3):
    """(shared before, state, private) of some rounds that everybody takes part in."""
    sampler = full_participation(clients.num_clients)
    rounds = make_rounds(algorithm, links or chain(), sampler, clients, span_size=num_rounds, chunk_size=chunk_size)
    state, private = rounds.init(jax.random.key(0))
    before = jax.device_get(state.shared)
    state, private, _ = rounds.run(state, private, keys(), num_rounds)
    return before, jax.device_get(state), jax.device_get(private)


ALPHA, L2 = 0.7, 0.4


def dense_confidence():
    """Preferences and confidences, float64 ``[clients, items]``."""
    r = np.zeros((len(LENGTHS), NUM_ITEMS))
    for row, (items, values) in zip(r, ratings(), strict=True):
        row[items] = values
    return (r > 0).astype(np.float64), 1 + ALPHA * r


def solve(table, preference, confidence):
    """x_u with the diagonal matrix of confidences written out."""
    left = table.T @ np.diag(confidence) @ table + L2 * np.eye(DIM)
    return np.linalg.solve(left, table.T @ np.diag(confidence) @ preference)


def objective(table, users, preference, confidence):
    """J, and what server_update may scale."""
    error = confidence * np.square(preference - users @ table.T)
    return error.sum() + L2 * (np.square(users).sum() + np.square(table).sum())


def derivative(function, at, step=1e-5):
    """Central differences in float64; exact here, where the function is quadratic."""
    found = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        moved = np.zeros_like(at)
        moved[index] = step
        found[index] = (function(at + moved) - function(at - moved)) / (2 * step)
    return found


def fcf_here(**settings):
    settings = {"server_optimizer": optax.sgd(0.02)} | settings
    return fcf(NUM_ITEMS, cohort_size=len(LENGTHS), dim=DIM, alpha=ALPHA, l2=L2, **settings)


def test_fcf_steps_along_the_gradient_of_the_whole_objective():
    """Two rounds, against the objective over all clients and all items, differentiated by differences."""
    preference, confidence = dense_confidence()
    before, state, private = run(fcf_here(), drawn(ratings(), num_buckets=2), 2)
    table = before.tables["item"].astype(np.float64)
    for _ in range(2):
        users = np.stack([solve(table, *pair) for pair in zip(preference, confidence, strict=True)])
        gradient = derivative(lambda y, users=users: objective(y, users, preference, confidence), table)
        table = table - 0.02 * gradient / len(LENGTHS)
    np.testing.assert_allclose(state.shared.tables["item"], table, rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(private["user"], users, rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(state.shared.dense["gram"], table.T @ table, rtol=5e-4, atol=1e-5)
    assert np.linalg.norm(table - before.tables["item"]) > 0.05


def test_a_clipped_fcf_client_weighs_less_in_both_parts_of_its_upload():
    """The sum is that of whole gradients f(u, .), each scaled by the factor of the joint norm of rows and matrix."""
    preference, confidence = dense_confidence()
    clip = 1.5
    before, state, private = run(fcf_here(), drawn(ratings()), links=chain(clip_by_global_norm(clip)))
    table = before.tables["item"].astype(np.float64)
    total, factors = np.zeros_like(table), []
    for p, c, user in zip(preference, confidence, private["user"].astype(np.float64), strict=True):
        scores = table @ user
        rows = (p * (c - (c - 1) * scores))[:, None] * user
        norm = np.sqrt(np.square(rows).sum() + np.square(np.outer(user, user)).sum())
        factors.append(min(1.0, clip / max(norm, 1e-9)))
        total += factors[-1] * (c * (p - scores))[:, None] * user
    expected = table - 0.02 * (-2 * total + 2 * L2 * table) / len(LENGTHS)
    np.testing.assert_allclose(state.shared.tables["item"], expected, rtol=2e-4, atol=1e-5)
    assert min(factors) < 0.9
    assert max(factors) == 1.0


def test_fcf_serves_a_client_that_it_has_never_seen():
    """Its vector is the minimum of its own part of the objective, and is zero for a client without data."""
    _, state, _ = run(fcf_here(), drawn(ratings()[:3] + ratings()[4:]))
    shared = state.shared
    table = shared.tables["item"].astype(np.float64)
    everybody = bucket_of(drawn(ratings()))
    serve = jax.jit(jax.vmap(partial(user_vector, alpha=ALPHA, l2=L2), in_axes=(None, 0)))
    vectors = np.asarray(serve(jax.tree.map(jnp.asarray, shared), everybody))
    for vector, *pair in zip(vectors, *dense_confidence(), strict=True):
        np.testing.assert_allclose(vector, solve(table, *pair), rtol=2e-4, atol=1e-5)
    assert np.all(vectors[LENGTHS.index(0)] == 0)
    assert np.linalg.norm(vectors[3]) > 0.1
    np.testing.assert_allclose(fcf_score(shared, {"user": vectors[3]}), table @ vectors[3], rtol=1e-4, atol=1e-5)


def test_an_fcf_upload_does_not_grow_with_the_catalogue():
    bits = []
    for num_items in (NUM_ITEMS, 40 * NUM_ITEMS):
        clients = drawn(ratings(), num_items=num_items)
        algorithm = fcf(num_items, cohort_size=len(LENGTHS), dim=DIM)
        bits.append(make_rounds(algorithm, chain(), full_participation(len(LENGTHS)), clients).upload_bits)
    assert bits == [32 * (max(LENGTHS) * (1 + DIM) + DIM**2)] * 2


def test_noise_cannot_drive_fcf_items_away_for_ever():
    """A noised sum of x x^T may have any sign; along its negative directions items would grow from round to round."""
    algorithm = fcf_here()
    state = algorithm.init(jax.random.key(0))
    noised = jnp.asarray([[-3.0, 0.4, 0.0], [0.2, 1.0, 0.0], [0.0, 0.0, -0.5]])
    aggregate = jax.tree.map(jnp.zeros_like, state.shared)._replace(dense={"gram": noised})
    first = np.asarray(state.shared.tables["item"])
    for _ in range(50):
        state = algorithm.server_update(state, aggregate)
    last = np.asarray(state.shared.tables["item"])
    assert np.all(np.linalg.norm(last, axis=1) < np.linalg.norm(first, axis=1))


@pytest.mark.parametrize("wrong", [{"alpha": -1.0}, {"l2": 0.0}, {"cohort_size": 0}])
def test_fcf_refuses_equations_without_one_answer(wrong):
    with pytest.raises(ValueError, match="FCF needs alpha >= 0, l2 > 0 and cohort_size > 0"):
        fcf(NUM_ITEMS, **({"cohort_size": 5} | wrong))


def test_fcf_refuses_repeated_items():
    with pytest.raises(ValueError, match="each item of a client once"):
        run(fcf_here(), given(ratings()))


RECON_RATE, ITEM_RATE, OWN_RATE = 0.3, 0.4, 0.2
LIMITS = {"reconstruction_epochs": 3, "reconstruction_steps": 7, "update_epochs": 2, "update_steps": 4, "batch_size": 2}
START = np.array([0.3, -0.2, 0.5])
OPTIMIZERS = {
    "reconstruction_optimizer": optax.sgd(RECON_RATE),
    "client_optimizer": optax.partition(
        {"shared": optax.sgd(ITEM_RATE), "own": optax.sgd(OWN_RATE)},
        {"rows": "shared", "dense": "shared", "private": "own"},
    ),
}


def factors(**settings):
    """Matrix factorisation whose clients all start from one vector, so that a reference can start from it too."""
    model = matrix_factorization(NUM_ITEMS, dim=DIM, loss="squared", label_mean=3.0, **settings)
    return model._replace(init_private=lambda key: {"user": jnp.asarray(START, jnp.float32)})


def reference_client(table, bias, items, values, *, share, dual):
    """FedRecon on one client, as loops over its batches; returns its tables, its vector and its number of queries."""
    table, bias, user = table.copy(), bias.copy(), START.copy()
    size = LIMITS["batch_size"]
    num_support = int(np.ceil(share * len(items)))
    places = np.arange(len(items))
    support = [places[i : min(i + size, num_support)] for i in range(0, num_support, size)]
    query = [places[i : i + size] for i in range(num_support, len(items), size)][: LIMITS["update_steps"]]

    def error(batch):
        return table[items[batch]] @ user + bias[items[batch], 0] + 3.0 - values[batch]

    for batch in (support * LIMITS["reconstruction_epochs"])[: LIMITS["reconstruction_steps"]]:
        user = user - RECON_RATE * np.mean(error(batch)[:, None] * table[items[batch]], 0)
    for batch in query * LIMITS["update_epochs"]:
        if dual:
            user = user - OWN_RATE * np.mean(error(batch)[:, None] * table[items[batch]], 0)
        off = error(batch) / len(batch)
        table[items[batch]] -= ITEM_RATE * off[:, None] * user
        bias[items[batch], 0] -= ITEM_RATE * off
    return table, bias, user, sum(map(len, query))


def orders(clients):
    """The items and ratings of each client in the order of the first round."""

    @jax.jit
    @jax.vmap
    def draw(client):
        train_key, _ = jax.random.split(client_key(jax.random.fold_in(keys().client, 0), client.client_id))
        draw_key = jax.random.split(train_key, 4)[0]
        return local.draw_epoch(client, None, LIMITS["batch_size"], draw_key).examples

    ids, labels, weights = (x.reshape(len(LENGTHS), -1) for x in jax.device_get(draw(bucket_of(clients))))
    return [(a[real], b[real].astype(np.float64)) for a, b, real in zip(ids, labels, weights > 0, strict=True)]


@pytest.mark.parametrize(
    ("layout", "share", "phases"),
    [(given, 0.5, SHARED_ONLY), (drawn, 0.3, SHARED_ONLY), (given, 0.7, PERSONAL_FIRST)],
)
def test_a_fedrecon_round_is_its_loops(layout, share, phases):
    """Clients of 0 to 22 ratings side by side: epochs and step limits of each are its own."""
    clients, mean = layout(ratings()), 4.0
    model = factors(init_stddev=0.5)
    algorithm = fedrecon(model, **OPTIMIZERS, **LIMITS, support_share=share, phases=phases, mean_examples=mean)
    before, state, private = run(algorithm, clients)
    table, bias = (before.tables[name].astype(np.float64) for name in ("item", "bias"))
    changes = [np.zeros_like(table), np.zeros_like(bias)]
    for client, (items, values) in enumerate(orders(clients)):
        assert len(items) == LENGTHS[client]
        *after, user, num = reference_client(table, bias, items, values, share=share, dual=phases == PERSONAL_FIRST)
        for change, new, old in zip(changes, after, (table, bias), strict=True):
            change += num / mean * (new - old) / len(LENGTHS)
        np.testing.assert_allclose(private["user"][client], user, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.shared.tables["item"], table + changes[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.shared.tables["bias"], bias + changes[1], rtol=1e-4, atol=1e-5)
    assert np.abs(changes[0]).max() > 0.05


def test_fedrecon_clients_keep_nothing():
    """What a client had after an earlier round has no influence on the next, not even as NaN."""
    clients = given(ratings())
    algorithm = fedrecon(factors(), **OPTIMIZERS, **LIMITS)
    rounds = make_rounds(algorithm, chain(), full_participation(len(LENGTHS)), clients, chunk_size=3)
    state, private = rounds.init(jax.random.key(0))
    lost = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), private)
    expected = jax.device_get(rounds.run(*jax.tree.map(jnp.array, (state, private)), keys())[:2])
    found = jax.device_get(rounds.run(state, lost, keys())[:2])
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert not np.isnan(expected[1]["user"]).any()


def of_one_client(algorithm):
    """``(ratings, key) -> ClientOutput`` of one client with 22 of them, on fresh shared parameters."""
    shared, client = algorithm.init(jax.random.key(0)).shared, bucket_of(given([ratings()[5]]))
    client = jax.tree.map(lambda x: x[0], client)
    start = algorithm.init_private(jax.random.key(0))

    @jax.jit
    def update(labels):
        mine = dataclasses.replace(client, labels=labels)
        return algorithm.client_update(shared, start, mine, mine.length, jax.random.key(1))

    return lambda labels: jax.device_get(update(jnp.asarray(labels)))


def test_fedrecon_halves_do_not_mix():
    """Ratings of the query half do not reach the private parameters, those of the support half do."""
    update, values = of_one_client(fedrecon(factors(init_stddev=0.5), **OPTIMIZERS, **LIMITS)), ratings()[5][1]
    is_query = np.arange(22) >= 11
    before = update(values)
    query, support = (update(np.where(part, 6 - values, values)) for part in (is_query, ~is_query))
    np.testing.assert_array_equal(query.private["user"], before.private["user"])
    assert not np.allclose(query.update.tables["item"].values, before.update.tables["item"].values)
    assert not np.allclose(support.private["user"], before.private["user"])


def test_reconstruction_for_serving_is_that_of_training():
    """From the support half as all of its data a client gets the very vector that it trained items with."""
    model, lists = factors(init_stddev=0.5), ratings()
    before, _, private = run(fedrecon(model, **OPTIMIZERS, **LIMITS), given(lists))
    halves = [(items[: -(-len(items) // 2)], values[: -(-len(items) // 2)]) for items, values in lists]
    settings = {"epochs": LIMITS["reconstruction_epochs"], "steps": LIMITS["reconstruction_steps"], "batch_size": 2}
    serve = partial(reconstruct, model, optimizer=optax.sgd(RECON_RATE), **settings)
    clients = bucket_of(given(halves))
    each = jax.random.split(jax.random.key(7), len(lists))
    served = jax.jit(jax.vmap(serve, in_axes=(None, 0, 0)))(jax.tree.map(jnp.asarray, before), clients, each)
    np.testing.assert_allclose(served["user"], private["user"], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(served["user"][LENGTHS.index(0)], START.astype(np.float32))


def test_reconstruction_recovers_unseen_clients_ratings():
    """Two tastes, opposite: clients that training never saw tell theirs by half of the catalogue, and get the rest."""
    num_clients, shown = 16, np.arange(0, NUM_ITEMS, 2)
    truth = np.where((np.arange(num_clients)[:, None] + np.arange(NUM_ITEMS) // 6) % 2 == 0, 5.0, 1.0)
    model = matrix_factorization(NUM_ITEMS, dim=DIM, loss="squared", label_mean=3.0)
    seen = drawn([(np.arange(NUM_ITEMS), row) for row in truth])
    rates = {"reconstruction_optimizer": optax.sgd(0.2), "client_optimizer": optax.sgd(0.5)}
    _, state, _ = run(fedrecon(model, **rates), seen, 60, chunk_size=8)
    unseen = bucket_of(drawn([(shown, row[shown]) for row in truth[:4]]))
    serve = partial(reconstruct, model, optimizer=rates["reconstruction_optimizer"])
    each = jax.random.split(jax.random.key(7), 4)
    shared = jax.tree.map(jnp.asarray, state.shared)
    private = jax.jit(jax.vmap(serve, in_axes=(None, 0, 0)))(shared, unseen, each)
    scores = np.asarray(jax.vmap(model.score, in_axes=(None, 0))(shared, private))
    hidden = np.setdiff1d(np.arange(NUM_ITEMS), shown)
    assert np.abs(scores - truth[:4])[:, hidden].max() < 1.0  # without a vector of its own: two stars off, each


def test_any_model_with_private_parameters_is_reconstructed():
    """PFedRec's scorer, with negatives, on a checkerboard: an unseen client's own colour ranks above the other."""
    model = personal_scorer(16, dim=4, init_stddev=0.3)
    lists = [(np.arange(user % 2, 16, 2), np.ones(8)) for user in range(12)]
    draw = {"negatives": Negatives(1), "batch_size": 4}
    rates = {"reconstruction_optimizer": optax.sgd(0.5), "client_optimizer": optax.sgd(2.0)}
    _, state, _ = run(fedrecon(model, **rates, **draw), drawn(lists, num_items=16), 80, chunk_size=12)
    serve = jax.jit(partial(reconstruct, model, optimizer=rates["reconstruction_optimizer"], **draw))
    shared = jax.tree.map(jnp.asarray, state.shared)
    for colour in (0, 1):
        mine = np.arange(colour, 16, 2)
        client = jax.tree.map(lambda x: x[0], bucket_of(drawn([(mine[:5], np.ones(5))], num_items=16)))
        scores = np.asarray(model.score(shared, serve(shared, client, jax.random.key(colour))))
        assert scores[mine[5:]].min() > np.delete(scores, mine).max()


def test_fedrecon_uploads_no_more_rows_than_it_may_train():
    clients = drawn(ratings())
    limits = LIMITS | {"update_steps": 1}
    rounds = make_rounds(
        fedrecon(factors(), **OPTIMIZERS, **limits), chain(), full_participation(len(LENGTHS)), clients
    )
    assert rounds.upload_bits == 32 * 2 * ((1 + DIM) + (1 + 1))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"support_share": 1.0}, "support_share must lie between 0 and 1.*got 1.0"),
        ({"update_steps": 0}, r"must be at least 1; got \(3, 7, 2, 0, 2\)"),
        ({"client_optimizer": optax.adam(0.1)}, "keeps state for item rows"),
        ({"max_examples": 5, "mean_examples": 5.0}, "pass one of them"),
    ],
)
def test_fedrecon_refuses_what_it_cannot_do(wrong, message):
    with pytest.raises(ValueError, match=message):
        fedrecon(factors(), **(OPTIMIZERS | LIMITS | wrong))


def test_fedrecon_weights_without_a_public_bound_refuse_dp_and_bounded_ones_do_not():
    clients, sampler = given(ratings()), full_participation(len(LENGTHS))
    noise = user_level_dp(l2_clip_norm=1.0, noise_multiplier=1.0)
    with pytest.raises(ValueError, match="DP is refused"):
        make_rounds(fedrecon(factors(), **OPTIMIZERS, **LIMITS, mean_examples=4.0), noise, sampler, clients)
    bounded = fedrecon(factors(), **OPTIMIZERS, **LIMITS, max_examples=4)
    assert make_rounds(bounded, noise, sampler, clients).private
    plain, halved = (
        of_one_client(fedrecon(factors(), **OPTIMIZERS, **LIMITS, **weights))(ratings()[5][1]).update.tables["item"]
        for weights in ({}, {"max_examples": 16})
    )
    np.testing.assert_allclose(halved.values, plain.values / 2, rtol=1e-5, atol=1e-7)  # 8 queries, 16 the most
    assert np.abs(plain.values).max() > 0.01
