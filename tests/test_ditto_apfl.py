"""Risk: the personal model drifts from its objective, leaks into the shared one, or forgets where it started.

One NumPy loop per method on matrix factorisation, and the ends of lambda and alpha, where the answer is known.
"""

import jax
import numpy as np
import optax
import pytest
from evaluation_worlds import make_split
from reference_round import one_by_one

from fedjax_rec.algorithms.apfl import apfl, apfl_score
from fedjax_rec.algorithms.ditto import ditto, ditto_score
from fedjax_rec.algorithms.fedavg import fedavg
from fedjax_rec.data.clients import client_data
from fedjax_rec.data.negatives import Negatives
from fedjax_rec.federated.cohort import fixed_size, full_participation
from fedjax_rec.federated.local import draw_epoch
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.transforms import chain
from fedjax_rec.models.matrix_factorization import matrix_factorization
from fedjax_rec.models.neural_cf import mlp

NUM_CLIENTS, NUM_ITEMS, NUM_ROUNDS = 5, 13, 3
KEYS = RoundKeys(*(jax.random.key(seed) for seed in (1, 2, 3)))
MF = matrix_factorization(NUM_ITEMS, dim=3, init_stddev=0.5)
MLP = mlp(NUM_ITEMS, dim=2, hidden=(3,), init_stddev=0.5)
RATES = {"lr": 0.5, "item_lr": 2.0, "dense_lr": 0.3}
DRAWS = {"distinct": Negatives(2), "independent": Negatives(2, replacement=True)}
SIZE = {"num_clients": NUM_CLIENTS, "negatives": Negatives(2)}


def population(shift=0):
    """Clients with 0 to 4 items; ``shift`` changes the items of all but the last one."""
    shifts = [shift] * (NUM_CLIENTS - 1) + [0]
    lists = [[(3 * u + i + s) % NUM_ITEMS for i in range(u % NUM_CLIENTS)] for u, s in enumerate(shifts)]
    return client_data(make_split(lists, [[] for _ in lists], num_items=NUM_ITEMS), num_buckets=1)


def after(algorithm, num_rounds=NUM_ROUNDS, *, clients=None, sampler=None):
    clients = population() if clients is None else clients
    sampler = full_participation(NUM_CLIENTS) if sampler is None else sampler
    rounds = make_rounds(algorithm, chain(), sampler, clients, span_size=NUM_ROUNDS, chunk_size=2)
    state, private = jax.jit(rounds.init)(jax.random.key(0))
    if num_rounds:
        state, private, metrics = rounds.run(state, private, KEYS, num_rounds)
        assert np.isfinite(np.asarray(metrics["loss"])[:num_rounds]).all()
    return jax.device_get((state.shared, private))


def scores(score, shared, private):
    return np.asarray(jax.vmap(score, in_axes=(None, 0))(shared, private))


def assert_close(a, b, tolerance=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def plain(model, **changes):
    optimizer = optax.partition(
        {"own": optax.sgd(0.5), "rows": optax.sgd(2.0), "dense": optax.sgd(0.3)},
        {"rows": "rows", "dense": "dense", "private": "own"},
    )
    return fedavg(model, client_optimizer=optimizer, negatives=Negatives(2), **changes)


# Against a plain loop.


def gradient(params, examples):
    """Of the mean logistic loss of one batch of matrix factorisation, by hand."""
    ids, labels, weights = (np.asarray(x).reshape(-1) for x in examples)
    ids, labels, weights = ids[weights > 0], labels[weights > 0], weights[weights > 0]
    out = {name: np.zeros_like(x) for name, x in params.items()}
    if len(ids):
        logits = params["item"][ids] @ params["user"] + params["bias"][ids, 0]
        error = weights * (1 / (1 + np.exp(-logits)) - labels) / weights.sum()
        np.add.at(out["item"], ids, error[:, None] * params["user"])
        np.add.at(out["bias"], ids, error[:, None])
        out["user"] = error @ params["item"][ids]
    return out


def step(params, grads, factor=1.0):
    rates = {"item": 2.0, "bias": 2.0, "user": 0.5}
    return {name: x - rates[name] * factor * grads[name] for name, x in params.items()}


def mix(a, v, w):
    return {name: a * v[name] + (1 - a) * w[name] for name in w}


def scores_by_hand(models):
    return np.array([m["item"] @ m["user"] + m["bias"][:, 0] for m in models])


def by_hand(personal_round, negatives, extra):
    """Rounds of two epochs of batches of two interactions; returns (w's tables, each client's state).

    Client 0 has no data, so no v either.
    """
    clients = one_by_one(population())
    draw = jax.jit(lambda client, key: draw_epoch(client, negatives, 2, key).examples)
    shared, private = after(ditto(MF, num_clients=NUM_CLIENTS, pull=0.0), num_rounds=0)
    tables = {name: np.float64(table) for name, table in shared.tables.items()}
    users = [np.float64(private["own"]["user"][k]) for k in range(NUM_CLIENTS)]
    states = [{"v": None, **extra} for _ in clients]
    for number in range(NUM_ROUNDS):
        sums = {name: np.zeros_like(table) for name, table in tables.items()}
        for k, client in enumerate(clients):
            key = jax.random.fold_in(jax.random.fold_in(KEYS.client, number), k)
            draw_key, _ = jax.random.split(jax.random.split(key)[0])
            epoch = jax.device_get(draw(client, draw_key))
            num_steps = -(-int(client.length) // 2)
            batches = [jax.tree.map(lambda x, i=i: x[i], epoch) for _ in range(2) for i in range(num_steps)]
            w = tables | {"user": users[k]}
            if not batches:
                continue
            states[k]["v"] = states[k]["v"] or w
            trained = personal_round(states[k], w, batches)
            users[k] = trained["user"]
            for name in sums:
                sums[name] += trained[name] - tables[name]
        tables = {name: table + sums[name] / NUM_CLIENTS for name, table in tables.items()}
    return tables, states


def ditto_round(state, w, batches):
    start, v = w, state["v"]
    for batch in batches:
        w, v = step(w, gradient(w, batch)), step(v, gradient(v, batch))
    kept = {"item": 1 / (1 + 2.0 * 0.4), "bias": 1 / (1 + 2.0 * 0.4), "user": 1 / (1 + 0.5 * 0.4)}
    state["v"] = {name: start[name] + kept[name] ** len(batches) * (v[name] - start[name]) for name in v}
    return w


def apfl_round(state, w, batches):
    for batch in batches:
        v, a = state["v"], state["alpha"]
        grads = gradient(mix(a, v, w), batch)
        slope = sum(np.sum((v[name] - w[name]) * grads[name]) for name in w)
        state["v"], state["alpha"] = step(v, grads, a), np.clip(a - 5.0 * slope, 0.0, 1.0)
        w = step(w, gradient(w, batch))
    return w


@pytest.mark.parametrize("draws", DRAWS)
def test_ditto_is_the_loop(draws):
    settings = {"negatives": DRAWS[draws], "batch_size": 2, "local_epochs": 2}
    shared, private = after(ditto(MF, num_clients=NUM_CLIENTS, pull=0.4, **settings, **RATES))
    tables, states = by_hand(ditto_round, DRAWS[draws], {})
    assert_close(shared.tables, tables)
    personal, own = private["personal"]
    for k in range(1, NUM_CLIENTS):
        for name, value in states[k]["v"].items():
            mine = own["user"][k] if name == "user" else personal.tables[name][k]
            np.testing.assert_allclose(mine, value, rtol=1e-5, atol=1e-5)
    models = [states[k]["v"] or tables | {"user": private["own"]["user"][k]} for k in range(NUM_CLIENTS)]
    assert_close(scores(ditto_score(MF), shared, private), scores_by_hand(models))


def test_apfl_is_the_loop():
    negatives = Negatives(2, replacement=True)
    settings = {"negatives": negatives, "batch_size": 2, "local_epochs": 2, "alpha": 0.6, "alpha_lr": 5.0}
    shared, private = after(apfl(MF, num_clients=NUM_CLIENTS, **settings, **RATES))
    tables, states = by_hand(apfl_round, negatives, {"alpha": 0.6})
    assert_close(shared.tables, tables)
    alphas = [state["alpha"] for state in states]
    np.testing.assert_allclose(private["alpha"], alphas, rtol=1e-5, atol=1e-5)
    assert min(alphas) < 0.59
    assert all(0 <= a <= 1 for a in alphas)
    models = []
    for k, state in enumerate(states):
        w = tables | {"user": private["own"]["user"][k]}
        models.append(mix(state["alpha"], state["v"] or w, w))
    assert_close(scores(apfl_score(MF), shared, private), scores_by_hand(models))


# The ends of lambda and alpha.


def test_with_infinite_pull_or_alpha_zero_nothing_is_personal():
    """The shared model is FedAvg's; Ditto scores with what a client received, APFL with what all have now."""
    received, expected = (after(plain(MLP), num_rounds) for num_rounds in (NUM_ROUNDS - 1, NUM_ROUNDS))
    pulled = after(ditto(MLP, pull=np.inf, **SIZE, **RATES))
    mixed = after(apfl(MLP, alpha=0.0, alpha_lr=0.0, **SIZE, **RATES))
    for shared, private in (pulled, mixed):
        assert_close((shared, private["own"]), expected)
    now = scores(MLP.score, *expected)
    assert_close(scores(ditto_score(MLP), *pulled)[1:], scores(MLP.score, *received)[1:])
    assert_close(scores(ditto_score(MLP), *pulled)[0], now[0])  # a client without data has no model of its own
    assert_close(scores(apfl_score(MLP), *mixed), now)


def test_without_pull_and_with_alpha_one_a_client_trains_alone():
    """The two methods agree, and what the others have changes nothing, but for the start that all receive."""
    alone, other = (after(ditto(MLP, pull=0.0, **SIZE, **RATES), clients=population(shift))[1] for shift in (0, 1))
    mixed = after(apfl(MLP, alpha=1.0, alpha_lr=0.0, **SIZE, **RATES))[1]
    assert_close(alone["personal"], mixed["personal"])
    assert_close(*(jax.tree.map(lambda x: x[-1], private["personal"]) for private in (alone, other)))
    assert not np.allclose(alone["own"]["mlp"][-1], other["own"]["mlp"][-1])  # trained with w, which the others moved


@pytest.mark.parametrize(("method", "score"), [(ditto, ditto_score), (apfl, apfl_score)], ids=["ditto", "apfl"])
def test_a_client_outside_all_cohorts_scores_with_the_shared_model(method, score):
    settings = {"pull": 0.0} if method is ditto else {"alpha": 0.7}
    shared, private = after(method(MF, **settings, **SIZE, **RATES), 1, sampler=fixed_size(NUM_CLIENTS, cohort_size=2))
    newcomers = ~private["started"]
    assert newcomers.sum() == NUM_CLIENTS - 2
    expected = scores(MF.score, shared, private["own"])
    np.testing.assert_allclose(scores(score(MF), shared, private)[newcomers], expected[newcomers], rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ditto(MF, num_clients=5, pull=0.1, max_private_bytes=1039), "takes 1040 bytes in all"),
        (lambda: apfl(MF, num_clients=5, max_private_bytes=1039), "takes 1040 bytes in all"),
        (lambda: ditto(MF, num_clients=5, pull=-0.1), r"must not be negative; got -0\.1"),
        (lambda: ditto(MF, num_clients=5, pull=float("nan")), "must not be negative; got nan"),
        (lambda: apfl(MF, num_clients=5, alpha=1.5), r"between 0 and 1; got 1\.5"),
        (lambda: apfl(MF, num_clients=5, local_epochs=0), "at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
