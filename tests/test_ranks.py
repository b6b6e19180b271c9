"""Risk: a rank that depends on chunks, blocks, padding, masks or rounding, or a bad score that passes in silence."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_worlds import make_cases, make_split
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.evaluate import measure
from fedjax_rec.evaluation import Scorer, cases, client_scorer, constant_scorer, evaluate, factor_scorer
from fedjax_rec.evaluation.exact import chunks
from fedjax_rec.evaluation.lists import exposure_counts
from fedjax_rec.evaluation.metrics import empty_state, finalize, metric_names, metric_state, user_metrics
from fedjax_rec.evaluation.ranks import count_ranks


def table_scores(params, user_ids):
    return params[user_ids]


def table_scorer(scores) -> Scorer:
    return Scorer(table_scores, jnp.asarray(scores, jnp.float32))


def random_world(*, num_users=23, num_items=40, seed=0, most_positives=4):
    """Small integers as vectors, so that scores are exact and often equal, whatever the order of summation."""
    rng = np.random.default_rng(seed)
    train, test = [], []
    for _ in range(num_users):
        items = rng.permutation(num_items)[: rng.integers(6, 20)]
        num_test = rng.integers(1, most_positives + 1)
        train.append(items[num_test:].tolist())
        test.append(items[:num_test].tolist())
    vectors = [rng.integers(-2, 3, (rows, 3)).astype(np.float32) for rows in (num_users, num_items)]
    return make_cases(train, test, num_items=num_items), factor_scorer(*map(jnp.asarray, vectors))


def numpy_metrics(ranking, positives, k):
    """The definitions, in ten lines, for one list without ties; `ranking` holds all candidates, best first."""
    relevant = np.isin(ranking, positives)
    rank = np.flatnonzero(relevant) + 1
    inside, capped = rank[rank <= k], min(k, len(positives))
    ideal = (1 / np.log2(1 + np.arange(1, capped + 1))).sum()
    return {
        "hit": float(len(inside) > 0),
        "recall": len(inside) / len(positives),
        "recall_capped": len(inside) / capped,
        "precision": len(inside) / k,
        "ndcg": (1 / np.log2(1 + inside)).sum() / ideal,
        "mrr": 1 / inside[0] if len(inside) else 0.0,
        "map": sum(relevant[:r].mean() for r in inside) / capped,
    }


def brute_force(scores, positives, seen, *, ks, ties):
    """Averages `numpy_metrics` over every order of equal scores, or takes the order that `ties` names."""
    candidates = [item for item in range(len(scores)) if item not in seen]
    if ties == "expected":
        orders = list(itertools.permutations(candidates))
    else:
        worst_first = ties == "pessimistic"
        orders = [sorted(candidates, key=lambda item: (item in positives) == worst_first)]
    lists = {tuple(sorted(order, key=lambda item: -scores[item])) for order in orders}  # each as likely as any other
    values = {}
    for k in ks:
        found = [numpy_metrics(ranking, positives, k) for ranking in lists]
        values |= {f"{name}@{k}": np.mean([metrics[name] for metrics in found]) for name in found[0]}
    negatives = [item for item in candidates if item not in positives]
    half = {"expected": 0.5, "pessimistic": 0.0, "optimistic": 1.0}[ties]
    wins = [
        1.0 if scores[p] > scores[n] else half if scores[p] == scores[n] else 0.0 for p in positives for n in negatives
    ]
    return values | {"auc": np.mean(wins) if wins else 0.5}


@st.composite
def small_worlds(draw):
    num_items = 6
    users = []
    for _ in range(2):
        scores = draw(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=num_items, max_size=num_items))
        items = draw(st.permutations(range(num_items)))
        num_positives = draw(st.integers(1, 3))
        num_seen = draw(st.integers(0, num_items - num_positives))
        users.append((scores, items[:num_positives], items[num_positives : num_positives + num_seen]))
    return users


@settings(max_examples=40, deadline=None, derandomize=True)
@given(small_worlds(), st.sampled_from(["expected", "pessimistic", "optimistic"]))
def test_matches_every_order_of_ties(users, ties):
    scores, positives, seen = zip(*users, strict=True)
    # A third user keeps the padded width of positives at 3 and of masked items constant, so that nothing recompiles.
    world = make_cases([*map(list, seen), [3, 4, 5]], [*map(list, positives), [0, 1, 2]], num_items=6)
    ks = (1, 2, 6)
    evaluation = evaluate(table_scorer([*scores, [0.0] * 6]), world, ks=ks, ties=ties)
    for user in range(2):
        expected = brute_force(scores[user], positives[user], seen[user], ks=ks, ties=ties)
        for name, value in expected.items():
            assert evaluation.per_user[name][user] == pytest.approx(value, abs=2e-6), (name, user)


@pytest.mark.parametrize("batch_size", [1, 4, 23])
def test_chunks_never_change_a_result(batch_size):
    world, scorer = random_world()
    whole = evaluate(scorer, world, ks=(3, 10))
    chunked = evaluate(scorer, world, ks=(3, 10), batch_size=batch_size)
    np.testing.assert_array_equal(chunked.ranks.better, whole.ranks.better)
    np.testing.assert_array_equal(chunked.ranks.tied, whole.ranks.tied)
    np.testing.assert_array_equal(chunked.exposure[10], whole.exposure[10])
    for name, value in whole.values.items():
        assert chunked.values[name] == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize("block_size", [1, 7, 20, 39])
def test_item_blocks_never_change_a_rank_or_a_list(block_size):
    world, scorer = random_world(seed=1)
    whole = evaluate(scorer, world, ks=(3, 10))
    blocked = evaluate(scorer, world, ks=(3, 10), block_size=block_size)
    np.testing.assert_array_equal(blocked.ranks.better, whole.ranks.better)
    np.testing.assert_array_equal(blocked.ranks.tied, whole.ranks.tied)
    assert blocked.values == whole.values


def test_blocks_handle_minus_infinity_and_a_constant_scorer():
    world, _ = random_world(seed=2)
    scores = np.where(np.arange(40) % 3 == 0, -np.inf, 1.0)
    whole = evaluate(constant_scorer(scores), world, ks=(5,))
    blocked = evaluate(constant_scorer(scores), world, ks=(5,), block_size=16)
    np.testing.assert_array_equal(blocked.ranks.tied, whole.ranks.tied)
    assert blocked.values == whole.values


def test_blocks_need_a_scorer_that_can_take_items():
    world, _ = random_world()
    with pytest.raises(ValueError, match="needs a scorer with take_items"):
        evaluate(table_scorer(np.zeros((23, 40))), world, ks=(5,), block_size=10)


def test_masked_items_do_not_tie_with_a_positive_scored_minus_infinity():
    world = make_cases([[0, 1, 2]], [[3]], num_items=6)
    scores = [[5, 5, 5, -np.inf, -np.inf, 1.0]]
    evaluation = evaluate(table_scorer(scores), world, ks=(1, 3))
    assert (evaluation.ranks.better[0, 0], evaluation.ranks.tied[0, 0]) == (1, 1)
    assert evaluation.values["hit@3"] == 1.0
    assert evaluation.exposure[3].tolist() == [0, 0, 0, 0, 0, 1]  # -inf and masked items are in no list


@pytest.mark.parametrize("most_positives", [1, 4])
def test_constant_scores_give_chance_level(most_positives):
    world, _ = random_world(seed=3, most_positives=most_positives)
    evaluation = evaluate(constant_scorer(np.zeros(40)), world, ks=(1, 5, 20))
    for k in (1, 5, 20):
        chance = np.minimum(k / evaluation.ranks.num_candidates, 1)
        np.testing.assert_allclose(evaluation.per_user[f"recall@{k}"], chance, rtol=1e-5)
        if most_positives == 1:
            np.testing.assert_allclose(evaluation.per_user[f"hit@{k}"], chance, rtol=1e-5)
    assert evaluation.values["auc"] == pytest.approx(0.5)


def test_nan_scores_raise_and_name_the_user():
    world = make_cases([[0], [0], []], [[1], [2], [3]], num_items=4)
    scores = np.zeros((3, 4))
    scores[1, 0] = np.nan  # even on a masked item: the model is broken
    with pytest.raises(ValueError, match=r"NaN scores to 1 of 3 users, first to user id 1"):
        evaluate(table_scorer(scores), world, ks=(2,))


def test_fewer_items_than_k_raises_a_sentence():
    world = make_cases([[0]], [[1]], num_items=4)
    with pytest.raises(ValueError, match="between 1 and the 4 items"):
        evaluate(table_scorer(np.zeros((1, 4))), world, ks=(5,))
    with pytest.raises(ValueError, match="between 1 and the 4 items"):
        evaluate(table_scorer(np.zeros((1, 4))), world, ks=(0, 2))


def test_k_beyond_a_users_candidates_is_a_short_list():
    world = make_cases([[0, 1]], [[2]], num_items=4)
    evaluation = evaluate(table_scorer([[9, 9, 1, 2.0]]), world, ks=(4,))
    assert evaluation.values["hit@4"] == 1.0
    assert evaluation.values["precision@4"] == 0.25
    assert evaluation.exposure[4].tolist() == [0, 0, 1, 1]


def test_unknown_ties_raise():
    world = make_cases([[0]], [[1]], num_items=4)
    with pytest.raises(ValueError, match="Unknown ties 'average'"):
        evaluate(table_scorer(np.zeros((1, 4))), world, ks=(2,), ties="average")


def test_second_call_with_new_params_compiles_nothing():
    world, scorer = random_world(seed=4)
    evaluate(scorer, world, ks=(3, 10), batch_size=8)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
    )
    new = scorer._replace(params=jax.tree.map(lambda leaf: leaf + 1, scorer.params))
    compiled.clear()  # the addition above is a computation of its own
    second = evaluate(new, world, ks=(3, 10), batch_size=8)
    assert compiled == []
    jax.jit(lambda x: x * 3 - 1)(jnp.arange(5.0))
    assert compiled  # the listener does hear compilations
    assert second.num_users == 23


def test_client_scores_equal_the_factorised_ones_and_share_a_compilation():
    world, scorer = random_world(seed=5)
    users, items, _ = scorer.params

    def score(shared, private):
        return shared @ private["user"]

    by_client = client_scorer(score, shared=items, private={"user": users})
    assert by_client.fn == client_scorer(score, shared=items, private=()).fn
    assert evaluate(by_client, world, ks=(3,)).values == evaluate(scorer, world, ks=(3,)).values


def test_users_without_positives_leave_the_mean_and_are_counted():
    world = make_cases([[0], [0], [1]], [[1], [], [2]], num_items=4)
    evaluation = evaluate(table_scorer(np.eye(3, 4)), world, ks=(1,))
    assert evaluation.user_ids.tolist() == [0, 2]
    assert (evaluation.num_users, evaluation.num_users_without_positives) == (2, 1)
    # User 0's best unmasked item is a tie of 1, 2 and 3; user 2's is item 2.
    np.testing.assert_allclose(evaluation.per_user["hit@1"], [1 / 3, 1])


def test_cases_mask_train_history_and_at_test_time_validation():
    split = make_split([[0, 1], []], [[3], [4]], num_items=6, validation=[[2], []], history=[[], [5]])
    test, validation = cases(split), cases(split, "validation")
    assert [test.seen_item_ids[a:b].tolist() for a, b in itertools.pairwise(test.seen_offsets)] == [[0, 1, 2], [5]]
    assert validation.user_ids.tolist() == [0]
    assert validation.seen_item_ids.tolist() == [0, 1]
    assert cases(split, mask_validation=False).seen_item_ids.tolist() == [0, 1, 5]
    assert validation.num_users_without_positives == 1
    assert (test.num_train_users, test.item_counts.tolist()) == (1, [1, 1, 0, 0, 0, 0])


def test_positive_that_is_also_masked_raises():
    with pytest.raises(ValueError, match="Item 1 of user 0 is a test positive and also in train"):
        make_cases([[0, 1]], [[1]], num_items=3)
    with pytest.raises(ValueError, match="test positive and also"):
        make_cases([[0]], [[1]], num_items=3, validation=[[1]])


def test_parts_without_positives_and_unknown_parts_raise():
    split = make_split([[0]], [[1]], num_items=3)
    with pytest.raises(ValueError, match="No user has a validation item"):
        cases(split, "validation")
    with pytest.raises(ValueError, match="Unknown part 'tests'"):
        cases(split, "tests")


def test_states_add_up_over_any_cut_of_the_users():
    world, scorer = random_world(seed=6)
    ks = (3, 10)
    whole = evaluate(scorer, world, ks=ks)

    @jax.jit
    def state_of(chunk):
        counted = count_ranks(scorer, chunk, num_items=40, list_size=10, block_size=40)
        exposure = exposure_counts(counted.top_item_ids, chunk.real, ks=ks, num_items=40)
        return metric_state(user_metrics(counted.ranks, ks=ks), real=chunk.real, exposure=exposure)

    states = []
    for size in (1, 5):
        total = empty_state(ks=ks, num_items=40)
        for _, chunk in chunks(world, size):
            total = jax.tree.map(jnp.add, total, state_of(chunk))
        states.append(total)
    np.testing.assert_array_equal(states[0].exposure, states[1].exposure)
    for state in states:
        means = finalize(state, ks=ks)
        assert list(means) == list(metric_names(ks))
        for name, value in means.items():
            assert value == pytest.approx(whole.values[name], abs=1e-6)


def test_a_mean_over_nobody_raises():
    with pytest.raises(ValueError, match="mean over 0 users"):
        finalize(empty_state(ks=(1,), num_items=3), ks=(1,))


def test_full_ranking_at_movielens_1m_shape_is_fast():
    record = measure(num_users=6040, num_items=3706, dim=64, num_seen=165, repeats=3)
    assert record["quartiles_s"][0] < 1.5  # seconds, every metric, on two CPU cores
    assert record["num_metrics"] == 7 * 4 + 1 + 4 * 4
