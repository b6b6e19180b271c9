"""A Renyi filter: stops a run whose releases are chosen as it goes, by what it has released so far.

A ledger's epsilon is of releases that were fixed in advance. Where the next noise, or whether there is a next round,
depends on earlier outputs, the sum of what was spent is itself random, and an accountant's epsilon of the realised
sequence is no guarantee (Rogers, Roth, Ullman and Vadhan, 2016, "Privacy Odometers and Filters: Pay-as-you-Go
Composition"). A filter is a rule that may be asked before each release and that keeps the promise for every way of
choosing.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from dp_accounting.dp_event import DpEvent
from dp_accounting.rdp.rdp_privacy_accountant import DEFAULT_RDP_ORDERS

from fedjax_rec.privacy import accounting
from fedjax_rec.privacy.events import Terms, describe, flatten, from_dict, to_dict
from fedjax_rec.privacy.ledger import BudgetExceeded, Ledger

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class RenyiFilter:
    """A budget for adaptively chosen releases; an immutable value that remembers what was spent.

    With one order alpha, a release is allowed while the sum of the Renyi divergences of order alpha, that of the
    release included, is at most

        B = epsilon - log((alpha - 1) / alpha) + log(delta alpha) / (alpha - 1).

    Feldman and Zrnic, 2021, "Individual Privacy Accounting via a Renyi Filter", fully adaptive composition: for one
    order that is fixed in advance, if these sums are at most B on every path, whatever the choices, then the whole is
    (alpha, B)-RDP. B is what converts to (epsilon, delta) (Canonne, Kamath and Steinke, 2020, "The Discrete Gaussian
    for Differential Privacy", Proposition 12). See also Lecuyer, 2021, "Practical Privacy Filters and Odometers with
    Renyi Differential Privacy and Applications to Differentially Private Deep Learning".

    With k orders, a release is allowed while the sum is within the bound for SOME order, and each bound is for
    delta / k. Without the division the theorem gives nothing: which order holds in the end depends on the outputs. With
    it, each order answers for the paths on which it is the first that holds. For each order exp((alpha - 1) (L - sum)),
    L the privacy loss so far, is a supermartingale that starts at 1 (that is the proof of the theorem); cut down to
    some of the paths its mean is still at most 1, so by the same conversion these paths add at most delta / k to the
    hockey-stick divergence at epsilon, and all k sets of paths at most delta.

    Guarantee: for every adaptive choice of events, (epsilon, delta)-differential privacy of all that is released while
    each release was allowed and spent, for the unit that the noise multipliers are relative to and the given relation;
    sampling must be fresh for each release. Orders, epsilon and delta must be chosen before the first release.

    Attributes:
      epsilon: positive and finite.
      delta: in (0, 1).
      relation: "add_or_remove_one" or "replace_one".
      orders: each above 1; see `filter_for`, which picks the one that is best for a plan.
      spent: the releases so far, equal ones together.
    """

    epsilon: float
    delta: float
    relation: str = "add_or_remove_one"
    orders: tuple[float, ...] = (8.0,)
    spent: Terms = ()

    def __post_init__(self):
        if not 0 < self.epsilon < math.inf:
            raise ValueError(f"The filter's epsilon must be positive and finite; got {self.epsilon!r}.")
        accounting.check_claim(delta=self.delta, relation=self.relation, unit="user")
        if not self.orders or not all(1 < order < math.inf for order in self.orders):
            raise ValueError(f"The filter's Renyi orders must be above 1 and finite; got {self.orders!r}.")
        if len(set(self.orders)) != len(self.orders):
            raise ValueError(
                f"Each order of the filter costs a share of delta, so none may be twice in {self.orders!r}."
            )

    @property
    def bounds(self) -> tuple[float, ...]:
        """The most Renyi divergence that may be spent, for each order; at or below zero an order allows nothing."""
        share = self.delta / len(self.orders)
        return tuple(_bound(self.epsilon, share, order) for order in self.orders)

    @property
    def divergences(self) -> tuple[float, ...]:
        """The Renyi divergence spent so far, for each order; does not depend on the order of the releases."""
        return _sums(self.spent, self.relation, self.orders)

    def allows(self, event: DpEvent, *, count: int = 1) -> bool:
        """Whether ``count`` more releases of ``event`` may be made.

        Raises:
          ValueError: a sentence, if the event is malformed or has no Renyi divergence under the relation.
        """
        after = _added(self.spent, event, count)
        sums = _sums(after, self.relation, self.orders)
        return any(total <= bound for total, bound in zip(sums, self.bounds, strict=True))

    def spend(self, event: DpEvent, *, count: int = 1) -> "RenyiFilter":
        """A filter that has ``count`` more releases behind it; this one is unchanged. Spend first, then release.

        Raises:
          BudgetExceeded: a sentence, if they are not allowed; then nothing may be released.
          ValueError: as `allows`.
        """
        if not self.allows(event, count=count):
            raise BudgetExceeded(
                f"{count} x {describe(event)} would pass the Renyi filter of epsilon {self.epsilon:g} at delta "
                f"{self.delta:g}; nothing released. Add noise, or stop here."
            )
        return replace(self, spent=_added(self.spent, event, count))

    def to_json(self) -> str:
        """The filter as JSON, losslessly."""
        spent = [{"event": to_dict(event), "count": count} for event, count in self.spent]
        return json.dumps({"schema_version": SCHEMA_VERSION, **vars(self), "spent": spent}, indent=2) + "\n"


def from_json(text: str) -> RenyiFilter:
    """The inverse of ``RenyiFilter.to_json``.

    Raises:
      ValueError: a sentence, if the text is no filter.
    """
    try:
        values = json.loads(text)
        if values.pop("schema_version") != SCHEMA_VERSION:
            raise ValueError("it is of another schema version")
        spent = tuple((from_dict(term["event"]), int(term["count"])) for term in values.pop("spent"))
        return RenyiFilter(**{**values, "orders": tuple(values["orders"])}, spent=spent)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"This is no saved Renyi filter: {error}.") from error


def filter_for(
    planned: DpEvent, *, epsilon: float, delta: float, relation: str = "add_or_remove_one", num_orders: int = 1
) -> RenyiFilter:
    """A filter whose orders suit a plan: those at which the planned events cost the smallest part of the bound.

    The run need not follow the plan; the plan must not depend on the data.

    Args:
      planned: what will probably be released, all of it.
      epsilon: as in `RenyiFilter`.
      delta: as in `RenyiFilter`.
      relation: as in `RenyiFilter`.
      num_orders: of the filter; more orders forgive a wrong plan and cost a share of delta each.

    Raises:
      ValueError: a sentence, if the plan has no Renyi divergence, or no order can hold the epsilon.
    """
    orders = [order for order in DEFAULT_RDP_ORDERS if order >= 1.5]  # below, series may not converge
    sums = _sums(_added((), planned, 1), relation, tuple(orders))
    shares = []
    for order, total in zip(orders, sums, strict=True):
        bound = _bound(epsilon, delta / num_orders, order)
        if bound > 0 and math.isfinite(total):
            shares.append((total / bound, order))
    if len(shares) < num_orders:
        raise ValueError(
            f"No {num_orders} Renyi orders can hold epsilon {epsilon:g} at delta {delta:g}; raise one of them."
        )
    return RenyiFilter(epsilon, delta, relation, tuple(sorted(order for _, order in sorted(shares)[:num_orders])))


def rebuild(empty: RenyiFilter, ledger: Ledger) -> RenyiFilter:
    """The filter of a resumed run: ``empty`` with all entries of the ledger spent, equal to the one that was saved.

    Raises:
      ValueError: if the ledger's relation is another, or ``empty`` has spent something.
      BudgetExceeded: if the ledger holds more than the filter allows.
    """
    if ledger.relation != empty.relation:
        raise ValueError(f"The filter is for {empty.relation}, and the ledger for {ledger.relation}.")
    if empty.spent:
        raise ValueError("Rebuild from a filter that has spent nothing: the ledger holds all of it.")
    for entry in ledger.entries:
        empty = empty.spend(entry.event, count=entry.count)
    return empty


def _bound(epsilon: float, delta: float, order: float) -> float:
    """The largest Renyi divergence of an order that implies (epsilon, delta)."""
    return epsilon - math.log1p(-1 / order) + math.log(delta * order) / (order - 1)


def _added(spent: Terms, event: DpEvent, count: int) -> Terms:
    """Terms with one more, merged with the equal one, so that one by one and all at once give the same value."""
    if count != int(count) or count < 1:
        raise ValueError(f"The number of releases must be a positive integer; got {count!r}.")
    for place, (other, other_count) in enumerate(spent):
        if other == event:
            return (*spent[:place], (event, other_count + int(count)), *spent[place + 1 :])
    return (*spent, (event, int(count)))


def _sums(terms: Terms, relation: str, orders: tuple[float, ...]) -> tuple[float, ...]:
    costs = [(count, _divergences(json.dumps(to_dict(event)), relation, orders)) for event, count in terms]
    return tuple(math.fsum(count * cost[place] for count, cost in costs) for place in range(len(orders)))


@lru_cache(maxsize=4096)
def _divergences(event: str, relation: str, orders: Sequence[float]) -> tuple[float, ...]:
    """Renyi divergences of one application of an event, given as JSON."""
    terms = flatten(from_dict(json.loads(event)))
    trivial = accounting.trivial_epsilon(terms)
    if trivial is not None:
        return (trivial,) * len(orders)
    accounting.choose_accountant(terms, delta=0.5, relation=relation, accountant=accounting.RDP)
    # Selection's divergence at one order is the least over those of others: they are asked along.
    asked = (*orders, *(order for order in DEFAULT_RDP_ORDERS if order not in orders))
    asked = asked if "RepeatAndSelect" in event else orders
    found = accounting.rdp(terms, relation, asked)[: len(orders)]
    return tuple(max(float(value), 0.0) for value in found)
