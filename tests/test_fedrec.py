"""Risk: FedRec's algebra drifts from the paper's loops, its counts or virtual ratings leak or mislead."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_worlds import make_split

from fedjax_rec.algorithms.fedrec import client_vector, fedrec
from fedjax_rec.data.clients import client_data, client_data_from_examples
from fedjax_rec.federated.cohort import fixed_size, full_participation, poisson
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.transforms import UpdateTransform, chain
from fedjax_rec.models.base import Shared
from fedjax_rec.privacy.mechanisms import clip_by_global_norm, gaussian_noise

NUM_USERS, NUM_ITEMS, DIM = 16, 16, 4
LR, L2 = 0.1, 0.05  # large, so that a forgotten factor shows
KEYS = RoundKeys(*(jax.random.key(seed) for seed in (1, 2, 3)))
HYBRID = {"rho": 1, "average_visits": 1, "predict_steps": 2}
SVDPP = {"style": "stochastic", "implicit": True, "lr": LR, "l2": L2, "dim": DIM}
PMF = {"style": "batch", "lr": LR, "l2": L2, "dim": DIM}


def rated(lists, ratings, num_items=NUM_ITEMS):
    """A population with ``ratings[user, item]`` for the items in its lists."""
    split = make_split(lists, [[] for _ in lists], num_items=num_items)
    values = np.array([ratings[user, item] for user, items in enumerate(lists) for item in items], np.float32)
    split = dataclasses.replace(split, train=dataclasses.replace(split.train, ratings=values))
    return client_data(split, use_ratings=True, num_buckets=1)


def colours():
    """Even users give even items 5 and odd items 1, odd users the reverse; an item of each colour is withheld."""
    ratings = np.where((np.arange(NUM_USERS)[:, None] + np.arange(NUM_ITEMS)) % 2 == 0, 5.0, 1.0)
    withheld = [{user % NUM_ITEMS, (user + 5) % NUM_ITEMS} for user in range(NUM_USERS)]
    return [[i for i in range(NUM_ITEMS) if i not in out] for out in withheld], ratings, withheld


def ragged():
    """Clients of different lengths, one of them empty and one with a single rating."""
    rng = np.random.default_rng(0)
    lists = [sorted(rng.permutation(NUM_ITEMS)[:n].tolist()) for n in (5, 1, 0, 7, 3, 12)]
    return lists, rng.integers(1, 6, (len(lists), NUM_ITEMS)).astype(float)


def predictions(state, private, clients):
    """float ``[clients, items]``."""
    (bucket,) = clients.buckets
    own = jax.tree.map(lambda x: x[bucket.client_id], private)
    vectors = jax.vmap(client_vector, in_axes=(None, 0, 0))(state.shared, own, jax.tree.map(jnp.asarray, bucket))
    return np.asarray(vectors @ state.shared.tables["item"].T)[np.argsort(bucket.client_id)]


WORLDS = {
    "batch": ({"lr": 0.1}, None, 200),
    "hybrid filling": ({"lr": 0.1, "rho": 1, "average_visits": 20}, None, 200),
    "svd++": ({"style": "stochastic", "lr": 0.1, "implicit": True, **HYBRID}, 4, 600),
}


@pytest.mark.parametrize("name", WORLDS)
def test_checkerboard(name):
    """A withheld item of a client's colour ranks above every item of the other colour, and is predicted in stars."""
    settings, cohort_size, num_rounds = WORLDS[name]
    lists, ratings, withheld = colours()
    clients = rated(lists, ratings)
    sampler = full_participation(NUM_USERS) if cohort_size is None else fixed_size(NUM_USERS, cohort_size=cohort_size)
    algorithm = fedrec(NUM_ITEMS, dim=DIM, l2=0.001, lr_decay=1.0, **settings)
    rounds = make_rounds(algorithm, chain(), sampler, clients, span_size=num_rounds, chunk_size=16)
    state, private = rounds.init(jax.random.key(0))
    state, private, metrics = rounds.run(state, private, KEYS, num_rounds)
    scores = predictions(state, private, clients)
    loss = np.asarray(metrics["loss"])
    assert loss[-10:].mean() < 0.2 * loss[:10].mean()
    for user, out in enumerate(withheld):
        liked, disliked = sorted(out, key=lambda item: -ratings[user, item])
        assert scores[user, liked] > scores[user, ratings[user] == 1].max()
        assert abs(scores[user, liked] - 5) < 1
        assert abs(scores[user, disliked] - 1) < 1


# The paper's client, one number at a time.


def reference_client(tables, user, items, ratings, sampled, settings, hybrid):
    """New user vector, gradients and feedback changes by item, as nested loops over ratings and items."""
    lr, l2 = settings["lr"], settings["l2"]
    weight = 1.0 if settings.get("implicit") else 0.0
    V = tables["item"].astype(np.float64)
    feedback = tables.get("feedback", np.zeros_like(V)).astype(np.float64)
    user, gradients, truth = user.astype(np.float64), {}, dict(zip(items, ratings, strict=True))

    def near(item, Q):
        others = [j for j in items if j != item]
        return sum((Q[j] for j in others), np.zeros(DIM)) / np.sqrt(max(len(others), 1)), len(others)

    def visit(item, rating, U, Q, everyone=False):
        mean, num = near(item, Q)
        error = rating - (U + weight * mean) @ V[item]
        gradient = -error * (U + weight * mean) + l2 * V[item]
        if num:
            for j in items if everyone else [j for j in items if j != item] + [item] * (item not in items):
                Q[j] += lr * (weight * error * V[item] / np.sqrt(num) - l2 * Q[j])
        return U + lr * (error * V[item] - l2 * U), gradient

    def mean_step(U, pairs):
        total = sum((-(r - U @ V[i]) * V[i] + l2 * U for i, r in pairs), np.zeros(DIM))
        return U - lr * total / max(len(pairs), 1)

    virtual = {i: np.mean(ratings) if len(ratings) else 0.0 for i in sampled}
    if settings["style"] == "batch":
        ahead = user
        for _ in range(settings.get("predict_steps", 0)):
            ahead = mean_step(ahead, list(truth.items()))
        if hybrid:
            virtual = {i: ahead @ V[i] for i in sampled}
        pairs = list((truth | virtual).items())
        gradients = {i: -(r - user @ V[i]) * user + l2 * V[i] for i, r in pairs}
        return mean_step(user, pairs), gradients, {}
    Q = feedback.copy()
    for item in items:
        user, gradients[item] = visit(item, truth[item], user, Q)
    if hybrid:
        U, copy = user, Q.copy()
        for item in items * settings["predict_steps"]:
            U, _ = visit(item, truth[item], U, copy, everyone=True)
        vector = U + weight * sum((copy[j] for j in items), np.zeros(DIM)) / np.sqrt(max(len(items), 1))
        virtual = {i: vector @ V[i] for i in sampled}
    for item in sampled:
        user, gradients[item] = visit(item, virtual[item], user, Q)
    return user, gradients, {i: Q[i] - feedback[i] for i in gradients}


def sent(algorithm, state, private, clients, key):
    """Each client's own upload: ids in the order of its visits, values by table, its new private state."""
    (bucket,) = clients.buckets
    for row in np.argsort(bucket.client_id):
        client = jax.tree.map(lambda x, row=row: jnp.asarray(x[row]), bucket)
        own = jax.tree.map(lambda x, i=int(bucket.client_id[row]): x[i], private)
        steps = jnp.int32(len(client.item_ids))  # more than its own: they must change nothing
        output = CLIENT(
            algorithm, state.shared, own, client, steps, jax.random.fold_in(key, int(bucket.client_id[row]))
        )
        yield client, own, jax.device_get(output)


CLIENT = jax.jit(lambda algorithm, *args: algorithm.client_update(*args), static_argnums=0)
LOOPS = {
    "batch": PMF | HYBRID,
    "stochastic": PMF | {"style": "stochastic"},
    "svd++": SVDPP | HYBRID,
}


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("visits", [0, 1])
def test_a_client_does_what_the_papers_loops_do(name, visits):
    """On shared and private parameters of ordinary size; at the second visit virtual ratings are predictions."""
    settings = LOOPS[name]
    clients = rated(*ragged())
    algorithm = fedrec(NUM_ITEMS, **settings)
    state, num = algorithm.init(jax.random.key(0)), clients.num_clients
    rng = np.random.default_rng(3)
    tables = {k: jnp.asarray(rng.normal(size=v.shape) * 0.5, jnp.float32) for k, v in state.shared.tables.items()}
    state = state._replace(shared=Shared(tables, {}))
    private = {"user": jnp.asarray(rng.normal(size=(num, DIM)), jnp.float32), "visits": jnp.full(num, float(visits))}
    rate = settings["lr"] * 0.9**visits
    for client, own, output in sent(algorithm, state, private, clients, jax.random.key(7)):
        length, table = int(client.length), output.update.tables["item"]
        items, capacity = table.ids[:length].tolist(), len(client.item_ids)
        labels = dict(zip(np.asarray(client.item_ids).tolist(), np.asarray(client.labels).tolist(), strict=True))
        sampled = [int(i) for i in table.ids[capacity:] if i < NUM_ITEMS]
        rho = settings.get("rho", 0)
        assert sorted(items) == sorted(np.asarray(client.item_ids)[:length].tolist())
        assert len(set(sampled) - set(items)) == len(sampled) == min(rho * length, NUM_ITEMS - length)
        shared = jax.device_get(state.shared.tables)
        hybrid = bool(rho) and visits >= 1
        user, gradients, changes = reference_client(
            shared, np.asarray(own["user"]), items, [labels[i] for i in items], sampled, settings | {"lr": rate}, hybrid
        )
        np.testing.assert_allclose(output.private["user"], user, atol=1e-5)
        assert output.private["visits"] == visits + 1
        for place, item in enumerate(table.ids):
            if item == NUM_ITEMS:
                assert all(not np.any(rows.values[place]) for rows in output.update.tables.values())
                continue
            assert output.update.tables["count"].values[place] == 1
            np.testing.assert_allclose(table.values[place], gradients[int(item)], atol=1e-5)
            if "feedback" in output.update.tables:
                got = output.update.tables["feedback"].values[place]
                np.testing.assert_allclose(got, changes[int(item)], atol=1e-5)


# The server, and the round around both.


def run(settings, *, clients=None, chunk_size=4):
    """One round: the algorithm, and the state and private parameters before and after."""
    clients = rated(*ragged()) if clients is None else clients
    algorithm = fedrec(clients.num_items, **settings)
    sampler = full_participation(clients.num_clients)
    rounds = make_rounds(algorithm, chain(), sampler, clients, span_size=1, chunk_size=chunk_size)
    state, private = rounds.init(jax.random.key(0))
    before = jax.device_get((state, private))
    state, private, _ = rounds.run(state, private, KEYS)
    return algorithm, before, jax.device_get((state, private))


def test_the_server_takes_the_mean_over_the_clients_that_sent_an_item():
    """And leaves items alone that nobody sent; the rate decays with the iteration."""
    clients = rated(*ragged())
    algorithm, (before, private), (after, _) = run(PMF, clients=clients)
    totals, counts = np.zeros((NUM_ITEMS, DIM)), np.zeros((NUM_ITEMS, 1))
    for _, _, output in sent(algorithm, before, private, clients, jax.random.key(0)):
        rows = output.update.tables["item"]
        real = rows.ids < NUM_ITEMS
        np.add.at(totals, rows.ids[real], rows.values[real])
        np.add.at(counts, rows.ids[real], 1.0)
    step = LR * totals / np.maximum(counts, 1)
    np.testing.assert_allclose(after.shared.tables["item"], before.shared.tables["item"] - step, atol=1e-6)
    np.testing.assert_allclose(after.shared.tables["count"] * clients.num_clients, counts, atol=1e-5)
    assert (counts == 0).any()
    assert (counts > 1).any()
    later = before._replace(round=jnp.int32(5))
    aggregate = Shared({"item": jnp.asarray(totals / 6), "count": jnp.asarray(counts / 6)}, {})
    moved = algorithm.server_update(later, aggregate).shared.tables["item"] - before.shared.tables["item"]
    np.testing.assert_allclose(moved, -(0.9**5) * step, atol=1e-6)


@pytest.mark.parametrize("name", ["batch", "svd++"])
def test_chunks_do_not_change_the_result(name):
    results = [run(LOOPS[name], chunk_size=size)[2] for size in (1, 3)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *results)


def test_private_state_stays_with_the_client():
    """The update has the server's structure, and no user vector is found in the server's state."""
    algorithm, (_, private), (state, trained) = run(SVDPP | HYBRID)
    assert set(state.shared.tables) == {"item", "feedback", "count"}
    assert set(trained) == {"user", "visits"}
    assert not any(6 in leaf.shape for leaf in jax.tree.leaves(state))  # six clients
    client = jax.tree.map(lambda x: jnp.asarray(x[0]), rated(*ragged()).buckets[0])
    own = jax.tree.map(lambda x: x[0], private)
    update = jax.eval_shape(algorithm.client_update, state.shared, own, client, jnp.int32(1), jax.random.key(0)).update
    assert {k: (v.num_rows, v.values.shape[1]) for k, v in update.tables.items()} == {
        k: v.shape for k, v in state.shared.tables.items()
    }
    secrets = np.concatenate([np.ravel(private["user"]), np.ravel(trained["user"])])
    assert not np.any(np.isin(np.concatenate([np.ravel(x) for x in jax.tree.leaves(state)]), secrets))


PROBE = UpdateTransform(
    init=lambda params: jax.tree.map(jnp.zeros_like, params), server=lambda total, *_: (total, total)
)


@pytest.mark.parametrize("settings", [PMF | {"rho": 1}, SVDPP | HYBRID], ids=["batch", "svd++"])
def test_one_user_moves_the_sum_by_at_most_the_clip_norm(settings):
    """Gradients, feedback changes and counts together; the user with a huge rating is in the cohort, or not."""
    lists, ratings = ragged()
    ratings[3] = 1e4
    clip, user, sums = 0.5, 3, []
    clients = rated(lists, ratings)
    sampler = poisson(clients.num_clients, cohort_size=3)
    cohorts = jax.vmap(lambda seed: sampler.draw(jax.random.key(seed), 0))(jnp.arange(2000))
    cohorts = [tuple(cohort) for cohort in np.asarray(cohorts).tolist()]
    present = next(cohort for cohort in cohorts if cohort[user] and sum(cohort) == 4)
    absent = tuple(taken and place != user for place, taken in enumerate(present))
    transforms = chain(clip_by_global_norm(clip), gaussian_noise(1.0), PROBE)
    algorithm = fedrec(NUM_ITEMS, min_share=0.1, **settings)
    rounds = make_rounds(algorithm, transforms, sampler, clients, span_size=1, chunk_size=4)
    for cohort in (present, absent):
        keys = KEYS._replace(cohort=jax.random.key(cohorts.index(cohort)))
        state, _, metrics = rounds.run(*rounds.init(jax.random.key(0)), keys)
        assert metrics["cohort_size"][0] == sum(cohort)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))
        sums.append(jax.device_get(state.transforms[2]))
    moved = np.sqrt(sum(np.square(a - b).sum() for a, b in zip(*map(jax.tree.leaves, sums), strict=True)))
    assert 0.99 * clip < moved <= clip * (1 + 1e-5)


def test_a_floor_keeps_noise_over_noise_small():
    """Items that nobody sent: their noised sum is divided by the floor, and not by their noised count of zero."""
    algorithm = fedrec(NUM_ITEMS, lr=1.0, dim=DIM, min_share=0.1)
    state = algorithm.init(jax.random.key(0))
    noised = Shared({"item": jnp.full((NUM_ITEMS, DIM), 0.01), "count": jnp.full((NUM_ITEMS, 1), -1e-6)}, {})
    moved = algorithm.server_update(state, noised).shared.tables["item"] - state.shared.tables["item"]
    np.testing.assert_allclose(moved, -0.1, rtol=1e-4)


def test_what_does_not_fit_is_refused():
    for settings, words in (
        ({"style": "sgd"}, "style must be one of"),
        ({"rho": -1}, "rho must be"),
        ({"implicit": True}, "stochastic style only"),
    ):
        with pytest.raises(ValueError, match=words):
            fedrec(NUM_ITEMS, **settings)
    repeated = client_data_from_examples([(np.array([1, 1]), np.array([4.0, 5.0]))], num_items=NUM_ITEMS)
    with pytest.raises(ValueError, match="one rating an item"):
        run({}, clients=repeated)
