"""One evaluation of virtual users: what they are good for, how close they are, and what they give away.

    report = evaluate_virtual(split, virtual, privacy=fitted.spent)
    print(to_markdown(report_table(report)))

Every figure is there for the virtual users and for the popularity sampler, which is what costs nothing to make.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedjax_rec.attacks.generator_membership import GeneratorMembership, Released, generator_membership
from fedjax_rec.attacks.membership import ceiling_for
from fedjax_rec.attacks.singling_out import GroupRisk, group_risks
from fedjax_rec.data.interactions import Interactions
from fedjax_rec.data.split import Split
from fedjax_rec.privacy.accounting import PrivacySpent
from fedjax_rec.reporting.formatting import MISSING, Estimate
from fedjax_rec.reporting.tables import Table
from fedjax_rec.synthesis.downstream import Downstream
from fedjax_rec.synthesis.fidelity import Fidelity, fidelity
from fedjax_rec.synthesis.methods import Report, quiet
from fedjax_rec.synthesis.populations import on_catalogue, popularity_sampler, populations
from fedjax_rec.synthesis.utility import VIRTUAL, Utility, utility

SAMPLER = "popularity sampler"


@dataclass(frozen=True)
class SetReport:
    """How one set of virtual users does apart from utility.

    Attributes:
      name: of the set.
      fidelity: distances to the real train users, with their control.
      membership: attacks on who was in, with control and ceiling; None if not asked for.
      risks: singling out, linkability and inference, with control and baseline; empty if not asked for.
    """

    name: str
    fidelity: Fidelity
    membership: GeneratorMembership | None
    risks: tuple[GroupRisk, ...]


@dataclass(frozen=True)
class VirtualReport:
    """Utility and risk of virtual users, beside the popularity sampler.

    Attributes:
      data: name of the real data set.
      split_fingerprint: of the split that all figures are of.
      seed: of every draw in the evaluation.
      num_real_users, num_virtual_users, num_held_out_users: sizes.
      privacy: epsilon, delta, unit, relation and "gaussian" of the generator; None without a guarantee.
      utility: of recommenders trained on virtual users; its rows hold the popularity sampler too.
      virtual: the set that is judged.
      sampler: the popularity sampler: not private, and the least that a generator must beat.
    """

    data: str
    split_fingerprint: str
    seed: int
    num_real_users: int
    num_virtual_users: int
    num_held_out_users: int
    privacy: Mapping[str, Any] | None
    utility: Utility
    virtual: SetReport
    sampler: SetReport

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON values; what is not a finite number is None."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return _plain(values)


def evaluate_virtual(
    split: Split,
    virtual: Interactions,
    *,
    privacy: PrivacySpent | Mapping[str, Any] | None = None,
    gaussian: bool = False,
    downstream: Sequence[str | Downstream] = ("ease", "mf"),
    attacks: bool = True,
    refit: Callable[[Interactions, int], Interactions] | None = None,
    released: Mapping[str, Released] | None = None,
    seed: int = 0,
    report: Report = quiet,
) -> VirtualReport:
    """Judges virtual users by everything that this library can measure of them.

    Args:
      split: by whole users (`strong_generalization`); the generator saw its train users, with all of their train rows.
      virtual: virtual users, also as read back from a file.
      privacy: the generator's guarantee, with epsilon, delta and relation; None = without. A guarantee for adding or
        removing a user, which is what the attack decides.
      gaussian: whether all releases are Gaussians without amplification by sampling; the ceiling is then exact, and
        else the wider one of (epsilon, delta).
      downstream: recommenders to train, by name or given.
      attacks: whether to attack at all; without, only utility and distances.
      refit: ``(users, num_users) -> virtual users`` of the same generator fitted on other users, for the membership
        attack's control; None = the popularity sampler of those users.
      released: further membership scores from released parameters, see `generator_membership`.
      seed: of every draw.
      report: progress.

    Raises:
      ValueError: for another catalogue, no virtual users, or a split without users held out whole.
    """
    virtual = on_catalogue(virtual, split.train)
    people = populations(split, seed=seed)
    num_virtual = int(np.count_nonzero(virtual.counts_per_user))
    sampler = popularity_sampler(people.members, num_users=num_virtual, seed=seed)
    guarantee = _privacy(privacy, gaussian)
    found = utility(split, virtual, downstream=downstream, others={SAMPLER: sampler}, seed=seed, report=report)

    def judged(name: str, users: Interactions, control: Interactions | None, **claims) -> SetReport:
        report(0, 3, f"distances of {name} users")
        distances = fidelity(people.members, users, held_out=people.held_out, seed=seed)
        if not attacks:
            return SetReport(name, distances, None, ())
        report(1, 3, f"membership attacks on {name} users")
        membership = generator_membership(
            people.members, people.others, users, reference=people.reference, control=control, seed=seed, **claims
        )
        report(2, 3, f"singling out, linking and inference from {name} users")
        return SetReport(name, distances, membership, group_risks(people.members, people.held_out, users, seed=seed))

    control = fresh = None
    if attacks:
        fresh = popularity_sampler(people.reference, num_users=num_virtual, seed=seed + 1)
        control = fresh if refit is None else refit(people.reference, num_virtual)
    ceiling = ceiling_for(guarantee, "user")
    return VirtualReport(
        data=split.train.name,
        split_fingerprint=split.fingerprint,
        seed=seed,
        num_real_users=people.members.num_users,
        num_virtual_users=num_virtual,
        num_held_out_users=people.held_out.num_users,
        privacy=guarantee,
        utility=found,
        virtual=judged("virtual", virtual, control, ceiling=ceiling, released=released),
        sampler=judged(SAMPLER, sampler, fresh),
    )


def report_table(report: VirtualReport) -> Table:
    """The figures that decide, one a row, for virtual users and the popularity sampler."""
    rows = []
    floor = {row.downstream: row for row in report.utility.rows if row.trained_on == SAMPLER}
    for row in report.utility.rows:
        if row.trained_on == VIRTUAL:
            both = (row, floor.get(row.downstream))
            for label, name in (
                (report.utility.metric, "ndcg"),
                ("ratio to real", "ratio"),
                ("above popularity", "above_popularity"),
            ):
                cells = [MISSING if one is None else _text(getattr(one, name)) for one in both]
                rows.append((f"{row.downstream}: {label}", *cells))
        elif row.gain is not None:
            rows.append((f"{row.downstream}: gain of {row.trained_on}", _text(row.gain, sign="+"), MISSING))
    sides = (report.virtual, report.sampler)
    for name in ("popularity_jensen_shannon", "length_kolmogorov", "cooccurrence_correlation", "lift_correlation"):
        control = getattr(report.virtual.fidelity.control, name)
        label = f"{name.replace('_', ' ')} (real users among themselves {control:.3f})"
        rows.append((label, *(f"{getattr(side.fidelity.distances_same_size, name):.3f}" for side in sides)))
    if report.virtual.membership is not None:
        for kind, weak in (("strongest membership AUC, corrected", False), ("nearest-neighbour AUC (weak)", True)):
            best = [max((r for r in s.membership.rows if r.weak == weak), key=lambda r: r.corrected_auc) for s in sides]
            rows.append((kind, *(f"{r.corrected_auc:.3f} ± {2 * r.corrected_error:.3f}" for r in best)))
        ceiling = report.virtual.membership.ceiling_auc
        rows.append(("ceiling of the guarantee", MISSING if ceiling is None else f"{ceiling:.3f}", MISSING))
    others = {risk.name: _text(risk.risk) for risk in report.sampler.risks}
    rows += [(f"risk: {risk.name}", _text(risk.risk), others.get(risk.name, MISSING)) for risk in report.virtual.risks]
    notes = ["Intervals are 95 %; of membership, two standard errors."]
    if report.virtual.membership is not None:
        notes += [report.virtual.membership.verdict, report.virtual.membership.warning]
    return Table(("figure", "virtual users", SAMPLER), rows, notes=tuple(notes))


def _privacy(privacy: PrivacySpent | Mapping[str, Any] | None, gaussian: bool) -> dict[str, Any] | None:
    if privacy is None:
        return None
    names = ("epsilon", "delta", "unit", "relation")
    if isinstance(privacy, PrivacySpent):
        values = {name: getattr(privacy, name) for name in names} | {"gaussian": gaussian}
    else:
        values = {"unit": "user", "relation": "add_or_remove_one", "gaussian": gaussian, **privacy}
    return None if math.isinf(values["epsilon"]) else values


def _text(value: Estimate, *, sign: str = "") -> str:
    return f"{value.value:{sign}.3f} ({value.low:{sign}.3f} to {value.high:{sign}.3f})"


def _plain(value: Any) -> Any:
    """JSON values of dataclasses; arrays by user are left out."""
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.name != "per_user"}
    if isinstance(value, Mapping):
        return {f"{key:g}" if isinstance(key, float) else str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value
