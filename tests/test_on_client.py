"""Risk: clients rank something else than what they trained, or ranking changes the training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from evaluation_worlds import make_split

from fedjax_rec.algorithms.fedavg import fedavg
from fedjax_rec.algorithms.pfedrec import PERSONAL_FIRST, personal_scorer, pfedrec
from fedjax_rec.data.clients import client_data
from fedjax_rec.data.negatives import Negatives
from fedjax_rec.evaluation import cases, client_scorer, evaluate
from fedjax_rec.evaluation.on_client import evaluate_on_clients, question, ranked_on_clients
from fedjax_rec.federated.cohort import fixed_size, full_participation
from fedjax_rec.federated.local import check_client_optimizer
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.transforms import UpdateTransform, chain
from fedjax_rec.models.matrix_factorization import matrix_factorization
from fedjax_rec.privacy.mechanisms import clip_by_global_norm, gaussian_noise

NUM_USERS, NUM_ITEMS = 12, 16
KEYS = RoundKeys(*(jax.random.key(i) for i in (1, 2, 3)))


def checkerboard():
    """Even users touch even items, odd users odd ones; one item of its colour is held out for test, one to validate."""
    colours = [list(range(user % 2, NUM_ITEMS, 2)) for user in range(NUM_USERS)]
    test = [[items.pop(user // 2 % 8)] for user, items in enumerate(colours)]
    return make_split(colours, test, num_items=NUM_ITEMS)


def rounds_of(algorithm, split, *, sampler=None, exclusion="strict", chunk_size=4):
    clients = client_data(split, num_buckets=1, exclusion=exclusion)
    sampler = full_participation(NUM_USERS) if sampler is None else sampler
    return make_rounds(algorithm, chain(), sampler, clients, span_size=200, chunk_size=chunk_size)


def small_pfedrec(**settings):
    model = personal_scorer(NUM_ITEMS, dim=4)
    return pfedrec(model, num_items=NUM_ITEMS, lr=0.3, item_lr_factor=2.0, batch_size=4, **settings), model


@pytest.mark.parametrize("replacement", [False, True])
def test_ranks_are_those_of_the_tables_that_clients_hold(replacement):
    """Against a round whose server does not average: each client alone, its table read off the server's state."""
    split = checkerboard()
    asked = cases(split)
    algorithm, model = small_pfedrec(negatives=Negatives(2, replacement=replacement))
    ranked = ranked_on_clients(algorithm, model.score, {"test": question(asked, num_clients=NUM_USERS)})
    rounds = rounds_of(ranked, split)
    state, private = rounds.init(jax.random.key(0))
    start = jax.tree.map(jnp.copy, (state, private))
    _, private, _ = rounds.run(state, private, KEYS)
    found = evaluate_on_clients(private["ranks"]["test"], asked, ks=(1, 5))
    clients = client_data(split, num_buckets=1)
    key = jax.random.fold_in(KEYS.client, 0)
    for user in range(NUM_USERS):
        place = int(np.flatnonzero(np.asarray(clients.buckets[0].client_id) == user)[0])
        client = jax.tree.map(lambda x: jnp.asarray(x[place]), clients.buckets[0])  # noqa: B023
        train_key, _ = jax.random.split(jax.random.fold_in(key, user))
        own = jax.tree.map(lambda x: x[user], start[1]["own"])  # noqa: B023
        output = algorithm.client_update(start[0].shared, own, client, algorithm.num_steps(client), train_key)
        rows = output.update.tables["item"]
        table = np.array(start[0].shared.tables["item"])
        np.add.at(
            table,
            np.asarray(rows.ids)[np.asarray(rows.ids) < NUM_ITEMS],
            np.asarray(rows.values)[np.asarray(rows.ids) < NUM_ITEMS],
        )
        scores = table @ np.asarray(output.private["weights"]) + float(output.private["bias"])
        positive = asked.positives[user, 0]
        seen = asked.seen_item_ids[asked.seen_offsets[user] : asked.seen_offsets[user + 1]]
        rivals = np.delete(scores, [*seen, positive])
        margin = np.abs(rivals - scores[positive]).min()
        if margin > 1e-5:  # nearer ones may fall either way by rounding
            assert found.ranks.better[user, 0] == (rivals > scores[positive]).sum()


def test_ranking_does_not_touch_training():
    split = checkerboard()
    algorithm, model = small_pfedrec()
    plain = rounds_of(algorithm, split)
    ranked = rounds_of(
        ranked_on_clients(algorithm, model.score, {"test": question(cases(split), num_clients=NUM_USERS)}), split
    )
    state, private, _ = plain.run(*plain.init(jax.random.key(0)), KEYS, 3)
    other, with_ranks, _ = ranked.run(*ranked.init(jax.random.key(0)), KEYS, 3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state, other)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), private, with_ranks["own"])


def test_a_method_without_local_change_agrees_with_evaluation():
    """Learning rate zero: what clients find is what the evaluation of the shared model finds."""
    split = checkerboard()
    model = matrix_factorization(NUM_ITEMS, dim=4)
    algorithm = fedavg(model, client_optimizer=optax.sgd(0.0), negatives=Negatives(1))
    asked = cases(split)
    rounds = rounds_of(
        ranked_on_clients(algorithm, model.score, {"test": question(asked, num_clients=NUM_USERS)}), split
    )
    state, private, _ = rounds.run(*rounds.init(jax.random.key(0)), KEYS)
    here = evaluate_on_clients(private["ranks"]["test"], asked, ks=(1, 5, 10))
    there = evaluate(client_scorer(model.score, shared=state.shared, private=private["own"]), asked, ks=(1, 5, 10))
    np.testing.assert_array_equal(here.ranks.better, there.ranks.better)
    np.testing.assert_array_equal(here.ranks.num_candidates, there.ranks.num_candidates)
    assert {k: here.values[k] for k in ("hit@5", "ndcg@10")} == pytest.approx(
        {k: there.values[k] for k in ("hit@5", "ndcg@10")}
    )


def test_clients_that_were_not_asked_are_named():
    split = checkerboard()
    algorithm, model = small_pfedrec()
    asked = cases(split)
    rounds = rounds_of(
        ranked_on_clients(algorithm, model.score, {"test": question(asked, num_clients=NUM_USERS)}),
        split,
        sampler=fixed_size(NUM_USERS, cohort_size=3),
    )
    _, private, _ = rounds.run(*rounds.init(jax.random.key(0)), KEYS)
    with pytest.raises(ValueError, match=r"has not taken part in a round yet.*\(9 such users\)"):
        evaluate_on_clients(private["ranks"]["test"], asked, ks=(1,))
    broken = private["ranks"]["test"].at[:].set(-2)
    with pytest.raises(ValueError, match="scores an item as NaN"):
        evaluate_on_clients(broken, asked, ks=(1,))


def test_pfedrec_learns_the_checkerboard():
    """Every withheld item ranks above every item of the other colour, by the client's own table."""
    split = checkerboard()
    algorithm, model = small_pfedrec(negatives=Negatives(1))
    asked = cases(split)
    rounds = rounds_of(
        ranked_on_clients(algorithm, model.score, {"test": question(asked, num_clients=NUM_USERS)}),
        split,
        exclusion="paper",
    )
    _, private, metrics = rounds.run(*rounds.init(jax.random.key(0)), KEYS, 200)
    found = evaluate_on_clients(private["ranks"]["test"], asked, ks=(1,))
    assert float(metrics["loss"][199]) < 0.5 * float(metrics["loss"][0])
    assert found.values["hit@1"] == 1.0


def test_chunks_do_not_change_ranks_or_parameters():
    split = checkerboard()
    algorithm, model = small_pfedrec(negatives=Negatives(2, replacement=True))
    ranked = ranked_on_clients(algorithm, model.score, {"test": question(cases(split), num_clients=NUM_USERS)})
    results = []
    for chunk_size in (1, 5):
        rounds = rounds_of(ranked, split, chunk_size=chunk_size)
        state, private, _ = rounds.run(*rounds.init(jax.random.key(0)), KEYS, 2)
        results.append((state.shared, private["own"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *results)


def test_private_parameters_move_before_the_item_table():
    """One batch, by hand: the layer's step with the received table, then the table's step with the new layer."""
    model = personal_scorer(3, dim=2)
    split = make_split([[0, 1], [0, 1]], [[2], [2]], num_items=3)
    algorithm = pfedrec(model, num_items=3, lr=0.5, item_lr_factor=1.0, batch_size=2, negatives=Negatives(0))
    clients = client_data(split, num_buckets=1)
    client = jax.tree.map(lambda x: jnp.asarray(x[0]), clients.buckets[0])
    shared, private = model.init_shared(jax.random.key(0)), model.init_private(jax.random.key(1))
    output = algorithm.client_update(shared, private, client, jnp.int32(1), jax.random.key(2))
    table, w, b = np.array(shared.tables["item"], np.float64)[:2], np.array(private["weights"]), float(private["bias"])
    slope = -1 / (1 + np.exp(table @ w + b)) / 2  # of the mean loss of two positives
    new_w, new_b = w - 0.5 * slope @ table, b - 0.5 * slope.sum()
    np.testing.assert_allclose(output.private["weights"], new_w, rtol=1e-5)
    np.testing.assert_allclose(output.private["bias"], new_b, rtol=1e-5)
    slope = -1 / (1 + np.exp(table @ new_w + new_b)) / 2
    rows = output.update.tables["item"]
    change = np.zeros((3, 2))
    np.add.at(change, np.asarray(rows.ids), np.asarray(rows.values))
    np.testing.assert_allclose(change[:2], -0.5 * 3 * slope[:, None] * new_w, rtol=1e-4, atol=1e-6)


def test_phases_are_checked():
    model = personal_scorer(3, dim=2)
    with pytest.raises(ValueError, match="must name each of rows, dense, private once"):
        check_client_optimizer(optax.sgd(0.1), model, (("rows",), ("rows", "dense")))
    momentum = optax.partition(
        {"s": optax.sgd(0.1), "p": optax.sgd(0.1, momentum=0.9)}, {"rows": "s", "dense": "s", "private": "p"}
    )
    check_client_optimizer(momentum, model)
    with pytest.raises(ValueError, match="step the client optimizer's state several times"):
        check_client_optimizer(momentum, model, PERSONAL_FIRST)


@pytest.mark.parametrize("negatives", [Negatives(2), Negatives(2, replacement=True, mixed=True)])
def test_one_user_moves_the_sum_by_the_clip_norm_at_most(negatives):
    """The real round with and without user 3, its chain that of `user_level_dp` with a probe before the noise."""
    clip = 0.01
    probe = UpdateTransform(
        init=lambda params: jax.tree.map(jnp.zeros_like, params), server=lambda total, *_: (total, total)
    )
    split = checkerboard()
    algorithm, _ = small_pfedrec(negatives=negatives)
    links = chain(clip_by_global_norm(clip), gaussian_noise(clip), probe)
    sums = []
    for present in (True, False):
        who = full_participation(NUM_USERS)
        sampler = who._replace(draw=lambda key, round_index: jnp.arange(NUM_USERS) != (-1 if present else 3))  # noqa: B023
        rounds = make_rounds(algorithm, links, sampler, client_data(split, num_buckets=1), span_size=1)
        state, _, _ = rounds.run(*rounds.init(jax.random.key(0)), KEYS)
        sums.append(state.transforms[-1])
    leaves = zip(*map(jax.tree.leaves, sums), strict=True)
    moved = np.sqrt(sum(np.sum((np.asarray(a) - np.asarray(b)) ** 2) for a, b in leaves))
    assert 0.99 * clip < moved <= clip * (1 + 1e-5)
