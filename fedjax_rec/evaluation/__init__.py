"""Exact ranks on device, additive metric states, one report: how good is a model, for whom, and how sure is that?"""

from fedjax_rec.evaluation.exact import Evaluation, evaluate
from fedjax_rec.evaluation.heldout import Cases, cases
from fedjax_rec.evaluation.lists import list_metrics
from fedjax_rec.evaluation.metrics import MetricState, finalize, metric_names, user_metrics
from fedjax_rec.evaluation.ratings import RatingErrors, rating_errors
from fedjax_rec.evaluation.sampled import evaluate_candidates, expect_sampled
from fedjax_rec.evaluation.scorers import Scorer, client_scorer, constant_scorer, factor_scorer, history_scorer
from fedjax_rec.evaluation.statistics import (
    activity_quartiles,
    bootstrap_interval,
    group_means,
    paired_test,
    spread,
)

__all__ = [
    "Cases",
    "Evaluation",
    "MetricState",
    "RatingErrors",
    "Scorer",
    "activity_quartiles",
    "bootstrap_interval",
    "cases",
    "client_scorer",
    "constant_scorer",
    "evaluate",
    "evaluate_candidates",
    "expect_sampled",
    "factor_scorer",
    "finalize",
    "group_means",
    "history_scorer",
    "list_metrics",
    "metric_names",
    "paired_test",
    "rating_errors",
    "spread",
    "user_metrics",
]
