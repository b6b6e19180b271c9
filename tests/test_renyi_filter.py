"""Risk: a run that reacts to its own outputs spends more than its budget, because its filter summed what may not be."""

import dataclasses
import json
import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting import dp_event

from fedjax_rec.privacy.accounting import RDP, privacy_spent
from fedjax_rec.privacy.ledger import BudgetExceeded, Ledger
from fedjax_rec.privacy.renyi_filter import RenyiFilter, filter_for, from_json, rebuild

GAUSSIAN = dp_event.GaussianDpEvent
EPSILON, DELTA = 4.0, 1e-5
# What an adaptive run may do next: noise, sampled rounds, a Laplace count.
CHOICES = (
    *(GAUSSIAN(z) for z in (2.0, 3.0, 5.0, 9.0)),
    *(dp_event.PoissonSampledDpEvent(0.05, GAUSSIAN(z)) for z in (0.8, 1.2, 2.0)),
    dp_event.LaplaceDpEvent(4.0),
)
ONE = RenyiFilter(EPSILON, DELTA, orders=(6.0,))
SEVERAL = RenyiFilter(EPSILON, DELTA, orders=(4.0, 6.0, 12.0))


def adaptive_run(start: RenyiFilter, rng) -> tuple[RenyiFilter, list]:
    """Releases noised values and lets them choose what comes next, until the filter says no."""
    filter_, made, outcome = start, [], 0.0
    while True:
        lean = int(4 * abs(outcome)) + rng.integers(0, 4)
        event, count = CHOICES[lean % len(CHOICES)], 1 + int(10 * abs(outcome)) % 5
        if not filter_.allows(event, count=count):
            with pytest.raises(BudgetExceeded, match="nothing released"):
                filter_.spend(event, count=count)
            return filter_, made
        filter_ = filter_.spend(event, count=count)
        made.append((event, count))
        outcome = rng.normal()


def composed(made):
    return dp_event.ComposedDpEvent([dp_event.SelfComposedDpEvent(event, count) for event, count in made])


@pytest.mark.parametrize("start", [ONE, SEVERAL], ids=["one order", "several"])
def test_a_thousand_adaptive_runs_stop_before_the_bound(start):
    rng = np.random.default_rng(0)
    lengths, ledgers = set(), []
    for run in range(1000):
        filter_, made = adaptive_run(start, rng)
        sums = [0.0] * len(start.orders)  # by hand, in the order of the releases
        for event, count in made:
            sums = [s + count * COSTS[event][INDEX[order]] for s, order in zip(sums, start.orders, strict=True)]
        share = DELTA / len(start.orders)
        epsilons = [
            dp_accounting.rdp.compute_epsilon([o], [s], share)[0] for o, s in zip(start.orders, sums, strict=True)
        ]
        assert min(epsilons) <= EPSILON * (1 + 1e-12)
        np.testing.assert_allclose(filter_.divergences, sums, rtol=1e-12)
        lengths.add(len(made))
        if run % 100 == 0:
            ledgers.append(made)
    assert len(lengths) > 10  # where a run stops depends on what it saw
    # The realised sequences, as if they had been planned: each below the filter's epsilon, most not far below.
    spent = [privacy_spent(composed(made), delta=DELTA, accountant=RDP).epsilon for made in ledgers]
    assert max(spent) <= EPSILON
    assert np.median(spent) > 0.4 * EPSILON


ALL_ORDERS = [4.0, 6.0, 12.0]
INDEX = {order: place for place, order in enumerate(ALL_ORDERS)}
COSTS = {event: dp_accounting.rdp.RdpAccountant(ALL_ORDERS).compose(event).rdp for event in CHOICES}


def test_one_order_allows_what_its_closed_form_allows():
    """n Gaussians of multiplier z have divergence n alpha / (2 z^2)."""
    alpha, z = 6.0, 5.0
    bound = EPSILON - math.log((alpha - 1) / alpha) + math.log(DELTA * alpha) / (alpha - 1)
    most = math.floor(bound / (alpha / (2 * z**2)))
    assert ONE.allows(GAUSSIAN(z), count=most)
    assert not ONE.allows(GAUSSIAN(z), count=most + 1)
    spent = dp_accounting.rdp.compute_epsilon([alpha], [most * alpha / (2 * z**2)], DELTA)[0]
    assert EPSILON * 0.98 < spent <= EPSILON


def test_each_order_has_only_its_share_of_delta():
    """An order alone, with all of delta, would allow more than the same order beside others."""
    for order, bound in zip(SEVERAL.orders, SEVERAL.bounds, strict=True):
        (alone,) = RenyiFilter(EPSILON, DELTA, orders=(order,)).bounds
        assert alone - bound == pytest.approx(math.log(3) / (order - 1))
    with pytest.raises(ValueError, match="share of delta"):
        RenyiFilter(EPSILON, DELTA, orders=(4.0, 4.0))


def test_a_plan_of_equal_rounds_gets_the_best_order():
    event = dp_event.PoissonSampledDpEvent(256 / 6040, GAUSSIAN(1.2))
    plan = dp_event.SelfComposedDpEvent(event, 300)
    planned = privacy_spent(plan, delta=1e-5, accountant=RDP).epsilon
    filter_ = filter_for(plan, epsilon=planned * 1.001, delta=1e-5)
    assert filter_.allows(event, count=300)
    assert not filter_.allows(event, count=304)
    poor = RenyiFilter(planned * 1.001, 1e-5, orders=(64.0,))
    assert not poor.allows(event, count=300)
    assert len(filter_for(plan, epsilon=4.0, delta=1e-5, num_orders=3).orders) == 3


def test_the_filter_survives_a_kill_by_json_and_by_the_ledger():
    rng = np.random.default_rng(1)
    filter_, made = adaptive_run(SEVERAL, rng)
    assert from_json(filter_.to_json()) == filter_
    ledger = Ledger()
    for event, count in made:
        for _ in range(count):  # charged one by one, where the filter was asked for all at once
            ledger = ledger.record(event, phase="training", released="sum")
    rebuilt = rebuild(SEVERAL, Ledger.from_json(ledger.to_json()))
    assert rebuilt.divergences == filter_.divergences
    assert {(str(event), count) for event, count in rebuilt.spent} == {(str(e), count) for e, count in filter_.spent}
    for event in CHOICES:
        for count in (1, 2, 5):
            assert rebuilt.allows(event, count=count) == filter_.allows(event, count=count)


def test_spending_changes_no_filter():
    after = ONE.spend(CHOICES[0])
    assert ONE.spent == ()
    assert after.spent == ((CHOICES[0], 1),)
    with pytest.raises(dataclasses.FrozenInstanceError):
        ONE.epsilon = 100.0


def test_replace_one_doubles_the_sensitivity():
    event = GAUSSIAN(6.0)
    (removed,) = ONE.spend(event).divergences
    (replaced,) = RenyiFilter(EPSILON, DELTA, "replace_one", (6.0,)).spend(event).divergences
    assert replaced == pytest.approx(4 * removed)


def test_releases_without_a_divergence_are_not_allowed():
    assert not ONE.allows(dp_event.NonPrivateDpEvent())
    assert not ONE.allows(GAUSSIAN(0.0))
    with pytest.raises(ValueError, match="RDP does not apply"):
        ONE.allows(dp_event.DiscreteLaplaceDpEvent(0.1, 1))
    with pytest.raises(BudgetExceeded):
        RenyiFilter(0.1, 1e-9, orders=(2.0,)).spend(GAUSSIAN(1e6))  # no budget at all at such an order


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epsilon": 0.0}, "positive and finite"),
        ({"epsilon": math.inf}, "positive and finite"),
        ({"delta": 0.0}, "delta"),
        ({"relation": "swap"}, "relation"),
        ({"orders": ()}, "above 1"),
        ({"orders": (1.0,)}, "above 1"),
    ],
)
def test_a_filter_that_means_nothing_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(ONE, **changes)


def test_a_wrong_file_or_ledger_is_a_sentence():
    with pytest.raises(ValueError, match="no saved Renyi filter"):
        from_json("[]")
    with pytest.raises(ValueError, match="schema version"):
        from_json(json.dumps({**json.loads(ONE.to_json()), "schema_version": 0}))
    with pytest.raises(ValueError, match="replace_one"):
        rebuild(ONE, Ledger(relation="replace_one"))
    with pytest.raises(ValueError, match="spent nothing"):
        rebuild(ONE.spend(CHOICES[0]), Ledger())
    with pytest.raises(BudgetExceeded):
        rebuild(ONE, Ledger().record(GAUSSIAN(1.0), phase="x", released="y", count=99))
    with pytest.raises(ValueError, match="positive integer"):
        ONE.allows(CHOICES[0], count=0)
    with pytest.raises(ValueError, match="No 1 Renyi orders"):
        filter_for(dp_event.NonPrivateDpEvent(), epsilon=1.0, delta=1e-5)
