"""Risk: virtual users look useful because a recommender saw test users, or chose its settings on them."""

import dataclasses
import json

import numpy as np
import pytest
from evaluation_worlds import interactions, make_split
from taste_world import taste_world

from fedjax_rec.data import leave_one_out, strong_generalization
from fedjax_rec.evaluation import cases, constant_scorer, evaluate
from fedjax_rec.models.ials import fold_in
from fedjax_rec.models.popularity import popularity_scorer
from fedjax_rec.reporting.tables import to_markdown
from fedjax_rec.synthesis.downstream import Downstream, choose, ease, markov, mf
from fedjax_rec.synthesis.downstream import tested as metrics_of  # another name, or pytest takes it for a test
from fedjax_rec.synthesis.populations import (
    dense_rows,
    on_catalogue,
    popularity_sampler,
    populations,
    stack_users,
    take_users,
)
from fedjax_rec.synthesis.report import SAMPLER, evaluate_virtual, report_table
from fedjax_rec.synthesis.utility import utility

DATA = taste_world(160)
SPLIT = strong_generalization(DATA, num_validation_users=20, num_test_users=40, seed=0)
PEOPLE = populations(SPLIT)
EASE = ease(l2=(3.0, 30.0))


def test_roles_share_nobody_and_lose_no_row():
    assert [users.num_users for users in PEOPLE] == [100, 60, 30, 30]
    labels = [set(users.user_labels.tolist()) for users in (PEOPLE.members, PEOPLE.others, PEOPLE.reference)]
    assert sum(map(len, labels)) == len(set.union(*labels)) == 160
    for users in PEOPLE:
        for place, label in enumerate(users.user_labels):
            own = DATA.items_of(int(np.searchsorted(DATA.user_labels, label)))
            np.testing.assert_array_equal(users.items_of(place), own)  # in time order


def test_real_users_in_place_of_virtual_ones_are_worth_exactly_themselves():
    sampler = popularity_sampler(PEOPLE.members, num_users=100, seed=0)
    found = utility(SPLIT, PEOPLE.members, downstream=(EASE,), others={SAMPLER: sampler})
    same = found.row("ease", "virtual")
    assert same.ndcg == found.row("ease", "real").ndcg
    assert (same.ratio.value, same.ratio.low, same.ratio.high) == (1.0, 1.0, 1.0)
    assert same.above_popularity.value == 1.0
    assert found.row("ease", SAMPLER).above_popularity.high < 0.7
    assert [row.num_users for row in found.rows] == [100, 100, 100, 200, 10, 110]
    assert found.row("ease", "few real + virtual").gain.low > 0
    assert found.row("ease", "real").gain is None
    assert found.num_test_users == 40


def test_the_interval_of_a_ratio_is_that_of_the_delta_method():
    sampler = popularity_sampler(PEOPLE.members, num_users=100, seed=0)
    found = utility(SPLIT, sampler, downstream=(EASE,), mixed=False)
    y, x = (found.per_user["ease", name].astype(np.float64) for name in ("virtual", "real"))
    ratio = y.mean() / x.mean()
    error = np.std(y - ratio * x) / x.mean() / np.sqrt(len(x))
    estimate = found.row("ease", "virtual").ratio
    assert estimate.value == pytest.approx(ratio)
    assert (estimate.high - estimate.low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    share = found.row("ease", "virtual").above_popularity
    assert share.value == pytest.approx((y.mean() - found.popularity) / (x.mean() - found.popularity))
    assert share.low < share.value < share.high


def test_settings_are_chosen_on_validation_users_and_never_on_test_users():
    # Item 3 is what validation users want, item 4 what test users want.
    train, shown = [[0, 1], [1, 2], [0], [1]], [[], [], [0], [1]]
    split = make_split(
        [*train[:2], [], []], [[], [], [], [4]], validation=[[], [], [3], []], history=shown, num_items=30
    )
    grid = ({"item": 3}, {"item": 4})

    def train_both(users, seed):
        for setting in grid:
            scores = (np.arange(30) == setting["item"]).astype(np.float32)
            yield setting, lambda history, scores=scores: constant_scorer(scores)

    chosen = choose(Downstream("fixed", train_both), split.train, split.history, cases(split, "validation"), seed=0)
    assert chosen.setting == {"item": 3}
    assert chosen.validation == 1.0
    assert metrics_of(chosen, split.history, cases(split, "test")).values["ndcg@20"] < 0.5


def test_vectors_of_new_users_solve_their_own_equations():
    items = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    shown = take_users(PEOPLE.held_out, np.arange(5))
    found = np.asarray(fold_in(items, shown, l2=0.1, unobserved_weight=0.3))
    for user, row in enumerate(dense_rows(shown)):
        own = items[row > 0]
        left = own.T @ own + 0.3 * items.T @ items + 0.1 * (len(own) + 0.3 * 60) * np.eye(4)
        np.testing.assert_allclose(found[user], np.linalg.solve(left, own.sum(0)), rtol=2e-4, atol=2e-5)


def test_matrix_factorisation_and_the_chain_rank_for_users_they_never_saw():
    validation = cases(SPLIT, "validation")
    list_of_popular = evaluate(popularity_scorer(SPLIT.train), validation, ks=(20,)).values["ndcg@20"]
    assert choose(mf(dim=8, num_sweeps=4, l2=(0.03,)), PEOPLE.members, SPLIT.history, validation, seed=0).validation > (
        list_of_popular
    )
    assert choose(markov(), PEOPLE.members, SPLIT.history, validation, seed=0).validation > 0
    sampler = popularity_sampler(PEOPLE.members, num_users=100, seed=0)
    ordered = utility(SPLIT, PEOPLE.members, downstream=("markov",), others={SAMPLER: sampler}, mixed=False)
    assert [row.trained_on for row in ordered.rows] == ["real", "virtual"]
    with pytest.raises(ValueError, match="learns from the order"):
        choose(markov(), sampler, SPLIT.history, validation, seed=0)


def test_stacked_users_are_those_of_both_parts():
    few = take_users(PEOPLE.members, np.array([7, 3]))
    both = stack_users(few, PEOPLE.others, name="both")
    assert both.num_users == 2 + PEOPLE.others.num_users
    np.testing.assert_array_equal(both.items_of(1), PEOPLE.members.items_of(3))
    np.testing.assert_array_equal(both.items_of(2), PEOPLE.others.items_of(0))
    assert len(set(both.user_labels.tolist())) == both.num_users


def test_a_data_set_that_lost_unseen_items_comes_back_onto_the_catalogue():
    rows = interactions([[0, 1], [1]], num_items=2)
    written = dataclasses.replace(rows, item_labels=np.array([11, 30]))
    catalogue = dataclasses.replace(interactions([[0]], num_items=4), item_labels=np.array([5, 11, 20, 30]))
    assert [on_catalogue(written, catalogue).items_of(user).tolist() for user in (0, 1)] == [[1, 3], [3]]
    unknown = dataclasses.replace(rows, item_labels=np.array([11, 31]))
    with pytest.raises(ValueError, match="1 items that the catalogue"):
        on_catalogue(unknown, catalogue)
    with pytest.raises(ValueError, match="no virtual user with a row"):
        on_catalogue(interactions([[], []], num_items=4), catalogue)


def test_splits_without_whole_users_and_unknown_recommenders_are_refused():
    with pytest.raises(ValueError, match="0 users held out whole"):
        utility(leave_one_out(DATA), PEOPLE.members)
    with pytest.raises(ValueError, match="at least one recommender"):
        utility(SPLIT, PEOPLE.members, downstream=("bert",))


def test_the_whole_report_is_json_and_finds_copies():
    told = []
    found = evaluate_virtual(
        SPLIT,
        PEOPLE.members,
        privacy={"epsilon": 1.0, "delta": 1e-3},
        gaussian=True,
        downstream=(EASE,),
        refit=lambda users, num: popularity_sampler(users, num_users=num, seed=9),
        report=lambda step, total, text: told.append(text),
    )
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["virtual"]["membership"]["bug"]
    assert not values["sampler"]["membership"]["bug"]
    assert values["privacy"]["relation"] == "add_or_remove_one"
    assert values["virtual"]["fidelity"]["distances"]["popularity_total_variation"] == 0
    assert len(told) >= 6 + 6
    table = to_markdown(report_table(found))
    assert "BUG" in table
    assert "weak" in table
    assert all(other in table for other in ("ease: ratio to real", "risk: linkability", SAMPLER))
