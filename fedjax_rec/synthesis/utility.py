"""Train on virtual users, test on real ones: what of a recommender's quality virtual users carry.

For each recommender and each set of users that it is trained on, ndcg@20 on the same real held-out users, and

    ratio            = ndcg(virtual) / ndcg(real)
    above popularity = (ndcg(virtual) - ndcg(popularity)) / (ndcg(real) - ndcg(popularity)),

where "real" is the same recommender trained on the real train users and popularity the list of their most popular
items: 0 is what needs no generator, 1 is as good as the data. Intervals are percentiles of a bootstrap over test users
(Efron, 1979, "Bootstrap Methods: Another Look at the Jackknife") that resamples users for all terms together. They say
nothing about the draw of virtual users or the seed of a generator.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedjax_rec.data.interactions import Interactions
from fedjax_rec.data.split import Split
from fedjax_rec.evaluation.exact import evaluate
from fedjax_rec.evaluation.heldout import cases
from fedjax_rec.models.popularity import popularity_scorer
from fedjax_rec.reporting.formatting import Estimate
from fedjax_rec.synthesis.downstream import CUT_OFF, METRIC, Downstream, as_downstream, choose, tested
from fedjax_rec.synthesis.methods import Report, quiet
from fedjax_rec.synthesis.populations import on_catalogue, populations, stack_users, take_users

REAL, VIRTUAL, MIXED, FEW, FEW_MIXED = "real", "virtual", "real + virtual", "few real", "few real + virtual"
_NUM_RESAMPLES, _AT_ONCE = 2000, 250


@dataclass(frozen=True)
class UtilityRow:
    """One recommender trained on one set of users.

    Attributes:
      downstream: the recommender.
      trained_on: "real", "virtual", "real + virtual", "few real", "few real + virtual", or the name of another set.
      num_users: trained on.
      setting: the one of the grid that did best on real validation users.
      ndcg: ndcg@20 on real test users, with its 95 % interval.
      ratio: to the same recommender trained on "real".
      above_popularity: share of what "real" gains on the list of popular items.
      gain: ndcg less that of the same real users without the virtual ones; None where nothing was added.
    """

    downstream: str
    trained_on: str
    num_users: int
    setting: Mapping[str, float]
    ndcg: Estimate
    ratio: Estimate
    above_popularity: Estimate
    gain: Estimate | None


@dataclass(frozen=True, eq=False)
class Utility:
    """Utility of virtual users.

    Attributes:
      metric: "ndcg@20".
      rows: by recommender and training set.
      popularity: the metric of the list of popular items.
      num_test_users: real users asked.
      per_user: the metric of each test user, float32 ``[test users]``, by ``(downstream, trained_on)``.
    """

    metric: str
    rows: tuple[UtilityRow, ...]
    popularity: float
    num_test_users: int
    per_user: Mapping[tuple[str, str], np.ndarray]

    def row(self, downstream: str, trained_on: str) -> UtilityRow:
        """The row of a recommender and a training set; KeyError if it was not trained."""
        for row in self.rows:
            if (row.downstream, row.trained_on) == (downstream, trained_on):
                return row
        raise KeyError((downstream, trained_on))


def utility(
    split: Split,
    virtual: Interactions,
    *,
    downstream: Sequence[str | Downstream] = ("ease",),
    others: Mapping[str, Interactions] | None = None,
    few_share: float = 0.1,
    mixed: bool = True,
    seed: int = 0,
    report: Report = quiet,
) -> Utility:
    """Trains recommenders on virtual, real and both kinds of users, and tests them on real users.

    Args:
      split: by whole users, see `populations`; its validation users choose settings, its test users are asked.
      virtual: virtual users; as many as train users make the fairest comparison.
      downstream: recommenders, by name or given; one that learns from order needs virtual users with time order.
      others: more sets to train on alone, by name, such as {"popularity sampler": ...}; sets without time order are
        left out for recommenders that need it.
      few_share: share of train users that "few real" has, drawn with ``seed``.
      mixed: whether real and virtual users are also trained on together.
      seed: of the few users, of training and of the bootstrap.
      report: progress.

    Raises:
      ValueError: for another catalogue, no virtual users, no held-out users, or an unknown recommender.
    """
    recommenders = as_downstream(downstream)
    real = populations(split).members
    virtual = on_catalogue(virtual, split.train)
    sets = {REAL: real, VIRTUAL: virtual}
    sets |= {name: on_catalogue(users, split.train) for name, users in (others or {}).items()}
    if mixed:
        num_few = max(round(few_share * real.num_users), 1)
        few = take_users(real, np.sort(np.random.default_rng([seed, 3]).permutation(real.num_users)[:num_few]))
        sets[MIXED] = stack_users(real, virtual, name=MIXED)
        sets[FEW] = few
        sets[FEW_MIXED] = stack_users(few, virtual, name=FEW_MIXED)
    validation, asked = cases(split, "validation"), cases(split, "test")
    popular = evaluate(popularity_scorer(split.train), asked, ks=(CUT_OFF,)).per_user[METRIC]
    per_user, settings = {}, {}
    for recommender in recommenders:
        for name, users in sets.items():
            if recommender.ordered and users.timestamps is None and name not in (REAL, VIRTUAL):
                continue  # a set beside the virtual one that has no order; of the virtual one it is refused
            report(len(per_user), len(recommenders) * len(sets), f"{recommender.name} trained on {name} users")
            chosen = choose(recommender, users, split.history, validation, seed=seed)
            settings[recommender.name, name] = chosen.setting
            per_user[recommender.name, name] = tested(chosen, split.history, asked).per_user[METRIC]
    resample = _bootstrap(asked.num_cases, seed)
    rows = []
    for (recommender, name), values in per_user.items():
        best = per_user[recommender, REAL]
        base = {MIXED: REAL, FEW_MIXED: FEW}.get(name)
        rows.append(
            UtilityRow(
                downstream=recommender,
                trained_on=name,
                num_users=sets[name].num_users,
                setting=settings[recommender, name],
                ndcg=resample(lambda x: x, values),
                ratio=resample(lambda x, top: x / top, values, best),
                above_popularity=resample(lambda x, top, low: (x - low) / (top - low), values, best, popular),
                gain=None if base is None else resample(lambda x, y: x - y, values, per_user[recommender, base]),
            )
        )
    return Utility(METRIC, tuple(rows), float(popular.mean(dtype=np.float64)), asked.num_cases, per_user)


def _bootstrap(num_users: int, seed: int) -> Callable[..., Estimate]:
    """``(function, values [users], ...) -> Estimate`` of a function of means; all terms see the same resamples."""
    weights = np.empty((_NUM_RESAMPLES, num_users), np.float32)
    rng = np.random.default_rng([seed, 4])
    for start in range(0, _NUM_RESAMPLES, _AT_ONCE):
        counts = rng.multinomial(num_users, np.full(num_users, 1 / num_users), size=_AT_ONCE)
        weights[start : start + _AT_ONCE] = counts / num_users

    def estimate(function, *values: np.ndarray) -> Estimate:
        means = [float(np.mean(column, dtype=np.float64)) for column in values]
        with np.errstate(divide="ignore", invalid="ignore"):
            drawn = function(*(weights @ np.asarray(column, np.float32) for column in values))
            value = float(np.float64(function(*(np.float64(mean) for mean in means))))
        low, high = np.nanquantile(drawn, [0.025, 0.975]) if np.isfinite(drawn).any() else (np.nan, np.nan)
        return Estimate(value, float(low), float(high))

    return estimate
