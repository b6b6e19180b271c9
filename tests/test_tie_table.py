"""Risk: results that hinge on which of several rows with the same time is the latest, without saying so."""

import numpy as np
import pytest

from experiments import tie_rules
from fedjax_rec.data import leave_one_out
from fedjax_rec.data.files import load_file
from fedjax_rec.data.sources import load
from fedjax_rec.evaluation import cases, evaluate, expect_sampled
from fedjax_rec.models.popularity import popularity_scorer


@pytest.fixture(scope="module")
def movielens(data_dir):
    return load("movielens/100k", data_dir=data_dir, cache=False)


@pytest.fixture(scope="module")
def found(movielens):
    return {rule: tie_rules.measure_rule(movielens, tie_rule=rule, with_ials=False) for rule in tie_rules.REFERENCE}


@pytest.mark.parametrize("tie_rule", tie_rules.REFERENCE)
def test_ease_column_is_reproduced(found, tie_rule):
    assert found[tie_rule]["EASE"] == pytest.approx(tie_rules.REFERENCE[tie_rule][1], abs=tie_rules.TOLERANCE)


@pytest.mark.parametrize("tie_rule", tie_rules.REFERENCE)
def test_popularity_column_is_reproduced(found, tie_rule):
    # The reference sorted scores: with equal items by ascending id every cell is there, and all hit@10 to four digits.
    reference = tie_rules.REFERENCE[tie_rule][0]
    by_id = found[tie_rule]["popularity, by item id"]
    assert by_id == pytest.approx(reference, abs=tie_rules.TOLERANCE)
    assert round(by_id[0], 4) == reference[0]
    low, high = (np.array(found[tie_rule][f"popularity, {ties}"]) for ties in ("pessimistic", "optimistic"))
    assert np.all((low <= by_id) & (by_id <= high))
    expected = np.array(found[tie_rule]["popularity"])
    assert np.all((low <= expected) & (expected <= high))
    assert tie_rules.agrees(found[tie_rule], tie_rule)


def test_agreement_is_not_claimed_for_another_rule(found):
    assert not tie_rules.agrees(found["item_smallest"], "item_largest")


def test_rule_moves_the_table_twofold(found):
    for model in ("popularity", "EASE"):
        assert found["item_smallest"][model][1] > 2 * found["item_largest"][model][1]


def test_seeded_hash_lies_between_the_extremes(movielens, found):
    values = [
        evaluate(popularity_scorer(split.train), cases(split), ks=(10,)).values["hit@10"]
        for split in (leave_one_out(movielens, seed=seed) for seed in range(3))
    ]
    assert found["item_largest"]["popularity"][0] < min(values)
    assert max(values) < found["item_smallest"]["popularity"][0]


def test_popularity_with_99_negatives_by_the_published_rule(data_dir):
    """The rule of the PFedRec code base: of tied rows the first in its own file order is latest; ties lose."""
    order = load_file(data_dir / "ml-100k" / "pfedrec_order.csv", format="triplets", separator=",")
    split = leave_one_out(order, tie_rule="file_first")
    evaluation = evaluate(popularity_scorer(split.train), cases(split), ks=(10,), ties="pessimistic")
    assert (evaluation.values["hit@10"], evaluation.values["ndcg@10"]) == pytest.approx((0.0817, 0.0393), abs=0.001)
    values = expect_sampled(evaluation, num_negatives=99, ks=(10,), ties="pessimistic").values
    assert (values["hit@10/99neg"], values["ndcg@10/99neg"]) == pytest.approx((0.4115, 0.2231), abs=0.01)
