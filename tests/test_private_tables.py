"""Risk: a private item table per client reaches the server, trains on other steps than it should, or flatters a method.

Both methods are judged in worlds whose answer is known, against a plain NumPy loop, and at the trust boundary.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_worlds import make_split
from reference_round import one_by_one
from test_known_worlds import NUM_ITEMS, NUM_USERS, checkerboard

from fedjax_rec.algorithms.fedrap import additive_scorer, fedrap
from fedjax_rec.algorithms.local_only import local_only, local_score
from fedjax_rec.algorithms.pfedrec import personal_scorer
from fedjax_rec.data.clients import client_data
from fedjax_rec.data.negatives import Negatives
from fedjax_rec.evaluation.on_client import Question, ranked_on_clients
from fedjax_rec.federated.cohort import full_participation, poisson
from fedjax_rec.federated.local import draw_epoch
from fedjax_rec.federated.private_tables import private_bytes
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.rows import zero_total
from fedjax_rec.federated.transforms import UpdateTransform, chain
from fedjax_rec.privacy.mechanisms import user_level_dp

DIM = 4
KEYS = RoundKeys(*(jax.random.key(seed) for seed in (1, 2, 3)))
EVERY_NEGATIVE = Negatives(2)  # in 16 x 16 worlds two for each positive are all there are, so nothing hangs on chance


def local(num_clients, num_items, **changes):
    model = personal_scorer(num_items, dim=DIM)
    options = {"lr": 0.1, "item_lr_factor": 1.0, "batch_size": 3, "local_epochs": 2, "negatives": Negatives(2)}
    algorithm = local_only(model, num_clients=num_clients, num_items=num_items, **(options | changes))
    return algorithm, local_score(model)


def additive(num_clients, num_items, *, separation=0.1, sparsity=0.05, **changes):
    model = additive_scorer(num_items, dim=DIM, separation=separation, sparsity=sparsity)
    options = {"table_lr": 1.0, "head_lr": 0.1, "batch_size": 3, "local_epochs": 2, "negatives": Negatives(2)}
    return fedrap(model, num_clients=num_clients, **(options | changes)), model.score


METHODS = {"local_only": local, "fedrap": additive}
# With the head all but frozen, as at the paper's rate, the tables need larger steps.
WORLD_RATES = {"local_only": {}, "fedrap": {"table_lr": 4.0, "head_lr": 1e-4, "separation": 0.01, "sparsity": 1e-3}}


# Worlds with a known answer.


def beaten(scores, withheld, rivals):
    """bool ``[users]``: the withheld item ranks above every rival."""
    return scores[np.arange(len(withheld)), withheld] > np.where(rivals, scores, -np.inf).max(1)


def other_colour(num_users):
    return (np.arange(num_users)[:, None] + np.arange(NUM_ITEMS)) % 2 == 1


def scores_after(name, split, *, exclusion, num_rounds=60):
    clients = client_data(split, exclusion=exclusion, num_buckets=1)
    num_users = clients.num_clients
    algorithm, score = METHODS[name](
        num_users, NUM_ITEMS, negatives=EVERY_NEGATIVE, batch_size=None, **WORLD_RATES[name]
    )
    rounds = make_rounds(algorithm, chain(), full_participation(num_users), clients, span_size=num_rounds, chunk_size=8)
    state, private, metrics = rounds.run(*rounds.init(jax.random.key(0)), KEYS, num_rounds)
    assert metrics["loss"][-1] < 0.5 * metrics["loss"][0]
    return np.asarray(jax.vmap(score, in_axes=(None, 0))(state.shared, private))


def test_local_training_knows_no_more_than_the_protocol_leaks():
    """The checkerboard twice, in one run under the paper's rule: once as it is, once with nothing held out to exclude.

    There the leak alone ranks every withheld item above the other colour; here the withheld item is one of nine that
    a client draws as negatives and cannot tell apart.
    """
    split, withheld = checkerboard()
    train = [split.train.item_ids[a:b].tolist() for a, b in itertools.pairwise(split.train.offsets)]
    both = make_split(2 * train, [[item] for item in withheld] + [[]] * NUM_USERS, num_items=NUM_ITEMS)
    scores = scores_after("local_only", both, exclusion="paper")
    won = beaten(scores, np.tile(withheld, 2), other_colour(2 * NUM_USERS))
    assert won[:NUM_USERS].all()
    assert won[NUM_USERS:].sum() <= NUM_USERS // 4


def test_paper_negatives_leak_the_withheld_item_to_fedrap():
    """The checkerboard with the head all but frozen, as in the paper: private memory tells the colours apart."""
    split, withheld = checkerboard()
    scores = scores_after("fedrap", split, exclusion="paper")
    assert beaten(scores, withheld, other_colour(NUM_USERS)).all()


def test_the_shared_table_knows_what_others_like():
    """Everyone likes the even items and has one of them withheld: it is drawn as a negative, and C still lifts it."""
    lists = [list(range(0, NUM_ITEMS, 2)) for _ in range(NUM_USERS)]
    withheld = np.array([items.pop(user // 2) for user, items in enumerate(lists)])
    split = make_split(lists, [[item] for item in withheld], num_items=NUM_ITEMS)
    odd = np.broadcast_to(np.arange(NUM_ITEMS) % 2 == 1, (NUM_USERS, NUM_ITEMS))
    scores = scores_after("fedrap", split, exclusion="strict")
    assert beaten(scores, withheld, odd).all()


# Against a plain loop.


def population(num_clients, num_items):
    lists = [[(3 * user + i) % num_items for i in range(user % 5)] for user in range(num_clients)]
    return client_data(make_split(lists, [[] for _ in lists], num_items=num_items), num_buckets=1)


@jax.jit
def epoch_of(client, round_number):
    """One client's examples of a round, as the engine draws them."""
    key = jax.random.fold_in(jax.random.fold_in(KEYS.client, round_number), client.client_id)
    draw_key, _ = jax.random.split(jax.random.split(key)[0])
    return draw_epoch(client, Negatives(2), 3, draw_key).examples


def slope(rows, head, batch):
    """The gradient of the mean logistic loss with respect to the scores, ``[batch, 1 + negatives]``."""
    scores = rows @ head["weights"] + head["bias"]
    return batch.weights * (1 / (1 + np.exp(-scores)) - batch.labels) / max(batch.weights.sum(), 1.0)


def step_head(head, error, rows, lr):
    head["weights"] -= lr * np.einsum("be,bed->d", error, rows)
    head["bias"] -= lr * error.sum()


def batches(client, round_number):
    examples = jax.device_get(epoch_of(client, round_number))
    num_steps = -(-int(client.length) // 3)
    for index in [*range(num_steps)] * 2:
        batch = jax.tree.map(lambda x, index=index: x[index], examples)
        yield batch, np.minimum(batch.ids, NUM_ROWS - 1)


def plain_local_round(state, private, clients, round_number):
    item_lr = 0.1 * NUM_ROWS
    for client_id, client in enumerate(clients):
        table, head = private["shared"].tables["item"][client_id], own_head(private["own"], client_id)
        for batch, ids in batches(client, round_number):
            step_head(head, slope(table[ids], head, batch), table[ids], 0.1)
            change = slope(table[ids], head, batch)[..., None] * head["weights"]
            np.add.at(table, ids, -item_lr * change)
        keep_head(private["own"], client_id, head)


def plain_fedrap_round(state, private, clients, round_number):
    shared = state.shared.tables["common"]
    received = shared.copy()
    for client_id, client in enumerate(clients):
        common, personal = received.copy(), private["tables"]["personal"][client_id]
        head = own_head(private["head"], client_id)
        for step, (batch, ids) in enumerate(batches(client, round_number)):
            scale = 0.97**round_number * 0.95**step
            c, d = common[ids], personal[ids]
            error = slope(c + d, head, batch)
            share = (batch.weights / max(batch.weights.sum(), 1.0))[..., None] / DIM
            bce = error[..., None] * head["weights"]
            step_head(head, error, c + d, 0.1 * scale)
            np.add.at(personal, ids, -scale * (bce - 0.1 * share * 2 * (d - c)))
            np.add.at(common, ids, -scale * (bce - 0.1 * share * 2 * (c - d) + 0.05 * share * np.sign(c)))
        keep_head(private["head"], client_id, head)
        shared += (common - received) / len(clients)
    private["lr_scale"] *= 0.97


def own_head(heads, client_id):
    return {name: np.array(values[client_id]) for name, values in heads.items()}


def keep_head(heads, client_id, head):
    for name, value in head.items():
        heads[name][client_id] = value


NUM_CLIENTS, NUM_ROWS = 7, 11
PLAIN_ROUNDS = {"local_only": plain_local_round, "fedrap": plain_fedrap_round}


def ranks(scores, positive):
    return [(np.delete(scores, positive) > scores[positive]).sum(), 0]


@pytest.mark.parametrize("name", METHODS)
def test_two_rounds_are_a_plain_loop_for_every_chunk_size(name):
    """Tables, heads and ranks; clients of length 0 to 4 in batches of 3, so some steps of a chunk are not their own."""
    clients = population(NUM_CLIENTS, NUM_ROWS)
    positive = np.arange(NUM_CLIENTS) % NUM_ROWS
    ask = Question(jnp.asarray(positive, jnp.int32), jnp.full((NUM_CLIENTS, 1), NUM_ROWS, jnp.int32))
    algorithm, score = METHODS[name](NUM_CLIENTS, NUM_ROWS)
    ranked = ranked_on_clients(algorithm, score, {"test": ask})
    results = []
    for chunk_size in (1, 3):
        sampler = full_participation(NUM_CLIENTS)
        rounds = make_rounds(ranked, chain(), sampler, clients, span_size=2, chunk_size=chunk_size)
        state, private = rounds.init(jax.random.key(0))
        before = jax.device_get((state, private["own"]))
        results.append(jax.device_get(rounds.run(state, private, KEYS, 2)[:2]))
    for x, y in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)

    state, private = jax.tree.map(lambda x: np.array(x, np.float64), before)
    for round_number in range(2):
        received = jax.tree.map(np.copy, state.shared)
        PLAIN_ROUNDS[name](state, private, one_by_one(clients), round_number)
    for x, y in zip(jax.tree.leaves(private), jax.tree.leaves(results[0][1]["own"]), strict=True):
        np.testing.assert_allclose(y, x, atol=1e-5)
    for x, y in zip(jax.tree.leaves(state.shared), jax.tree.leaves(results[0][0].shared), strict=True):
        np.testing.assert_allclose(y, x, atol=1e-5)
    # A client without data ranks with what it received.
    own = jax.tree.map(lambda x: jnp.asarray(x[0], jnp.float32), private)
    scores = np.asarray(score(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), received), own))
    assert results[0][1]["ranks"]["test"][0].tolist() == ranks(scores, positive[0])
    assert len(np.unique(results[0][1]["ranks"]["test"][:, 0])) > 1


# The trust boundary, with the chain of user-level DP.

CLIP = 0.05
PROBE = UpdateTransform(
    init=lambda params: jax.tree.map(jnp.zeros_like, params), server=lambda total, *_: (total, total)
)
DP_CHAIN = chain(user_level_dp(l2_clip_norm=CLIP, noise_multiplier=1.0), PROBE)
SAMPLER = poisson(NUM_CLIENTS, cohort_size=4)


@pytest.fixture(scope="module", params=METHODS)
def private_rounds(request):
    algorithm, _ = METHODS[request.param](NUM_CLIENTS, NUM_ROWS)
    return request.param, algorithm, make_rounds(algorithm, DP_CHAIN, SAMPLER, population(NUM_CLIENTS, NUM_ROWS))


def cohorts():
    """Cohort keys by who takes part in the first round."""
    draw = jax.jit(jax.vmap(lambda seed: SAMPLER.draw(jax.random.key(seed), 0)))
    return {tuple(mask): seed for seed, mask in enumerate(np.asarray(draw(jnp.arange(5000))).tolist())}


def run(rounds, cohort_seed, change=lambda private: private):
    state, private = rounds.init(jax.random.key(0))
    before = jax.tree.map(jnp.array, change(private))
    after = rounds.run(state, jax.tree.map(jnp.array, before), KEYS._replace(cohort=jax.random.key(cohort_seed)))
    return *jax.device_get(after[:2]), jax.device_get(before)


def test_an_update_has_the_servers_structure_and_no_private_leaf(private_rounds):
    name, algorithm, rounds = private_rounds
    shared = jax.eval_shape(algorithm.init, jax.random.key(0)).shared
    private = jax.eval_shape(algorithm.init_private, jax.random.key(0))
    client = one_by_one(population(NUM_CLIENTS, NUM_ROWS))[3]
    output = jax.eval_shape(algorithm.client_update, shared, private, client, jnp.int32(1), jax.random.key(0))
    total = jax.eval_shape(lambda: zero_total(output.update))
    assert jax.tree.structure(total) == jax.tree.structure(shared)
    assert [x.shape for x in jax.tree.leaves(total)] == [x.shape for x in jax.tree.leaves(shared)]
    assert jax.tree.structure(output.private) == jax.tree.structure(private)
    if name == "local_only":
        assert jax.tree.leaves(shared) == []
        assert rounds.upload_bits == rounds.download_bits == 0


def test_private_numbers_stay_private(private_rounds):
    """Markers in every private leaf are not found on the server; clients outside the cohort have no influence."""
    _, _, rounds = private_rounds
    mask = np.array([True, True, False, True, True, False, True])
    seed = cohorts()[tuple(mask.tolist())]
    state, private, before = run(rounds, seed, lambda p: jax.tree.map(lambda x: x * 0 + 0.1234567, p))
    secrets = np.concatenate([np.ravel(x) for x in jax.tree.leaves((before, private))])
    public = np.concatenate([np.zeros(1), *(np.ravel(x) for x in jax.tree.leaves(state))])
    assert not np.isin(public[public != 0], secrets).any()
    assert not any(NUM_CLIENTS in x.shape for x in jax.tree.leaves(state))

    def others_are_nan(private):
        return jax.tree.map(
            lambda x: jnp.where(jnp.asarray(mask).reshape(-1, *[1] * (x.ndim - 1)), x, jnp.nan), private
        )

    plain, own, _ = run(rounds, seed)
    changed, own_again, started = run(rounds, seed, others_are_nan)
    for x, y in zip(jax.tree.leaves(plain), jax.tree.leaves(changed), strict=True):
        np.testing.assert_array_equal(x, y)
    for x, y, z in zip(*map(jax.tree.leaves, (own, own_again, started)), strict=True):
        np.testing.assert_array_equal(x[mask], y[mask])
        np.testing.assert_array_equal(y[~mask], z[~mask])


def test_one_user_moves_the_pre_noise_sum_by_at_most_the_clip_norm(private_rounds):
    """With and without each user, in a cohort of everyone; local training moves nothing at all."""
    name, _, rounds = private_rounds
    seeds = cohorts()
    everyone, _, _ = run(rounds, seeds[(True,) * NUM_CLIENTS])
    reached = []
    for user in range(NUM_CLIENTS):
        without, _, _ = run(rounds, seeds[tuple(i != user for i in range(NUM_CLIENTS))])
        pairs = zip(jax.tree.leaves(everyone.transforms[1]), jax.tree.leaves(without.transforms[1]), strict=True)
        reached.append(np.sqrt(sum(np.square(np.float64(x) - np.float64(y)).sum() for x, y in pairs)))
    assert max(reached) <= CLIP * (1 + 1e-5)
    assert np.max(reached) > 0.99 * CLIP if name == "fedrap" else np.max(reached) == 0


def test_tables_that_do_not_fit_are_refused_with_the_number():
    needed = 5 * 3 * DIM * 4
    assert private_bytes(5, 3, DIM) == needed
    for method in METHODS.values():
        method(5, 3, max_private_bytes=needed)
        with pytest.raises(ValueError, match=f"takes {needed} bytes.*max_private_bytes={needed - 1}"):
            method(5, 3, max_private_bytes=needed - 1)
        with pytest.raises(ValueError, match="local_epochs must be at least 1; got 0"):
            method(5, 3, local_epochs=0)
