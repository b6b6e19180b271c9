"""Membership inference against a generator: was this person among those it was fitted on, judged from virtual users?

The attacker holds a candidate's whole record, the virtual users, and a *reference*: real users that no generator saw.
Candidates are the generator's own users (members) and users held out whole (others). Three families of scores:

- nearest virtual neighbour, by cosine, Jaccard or Hamming distance. Weak: a generator can leak what it was fitted on
  and place no virtual user near any real one, so a low area here proves nothing. It finds copies.
- density ratio: how much better a model of the virtual users fits the candidate than the same model of the reference,

      log p(x | virtual) - log p(x | reference),

  in the manner of van Breugel, Sun, Qian and van der Schaar (2023), "Membership Inference Attacks against Synthetic
  Data through Overfitting Detection"; the models are EASE, a low-rank Gaussian, a mixture with one kernel a
  user, and, where both have time order, item-to-item transitions.
- likelihood alone: the same models of the virtual users without a reference; each item is predicted from the others.

Control: the same attack against virtual users that know nothing of the candidates, because their generator was fitted
on other people. Whatever area it has is due to which candidates these are, and is subtracted:

    corrected = 1/2 + AUC(virtual) - AUC(control),    with the standard error of a difference of paired areas.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp

from fedjax_rec.attacks.roc import STANDARD_ERRORS, Ceiling, placements, roc
from fedjax_rec.data.interactions import Interactions
from fedjax_rec.models.ease import weights_from_gram
from fedjax_rec.synthesis.populations import dense_rows, on_catalogue, stack_users, take_users

WEAK = "nearest "
WARNING = (
    "Nearest-neighbour distances are a weak test: a generator may leak its users and place nobody near them. They find "
    "copies; their failure proves nothing."
)
RATES = (0.01, 0.1)  # false positive rates reported; with few others, lower ones are noise
_EASE_L2 = 30.0  # little, so that the fit remembers: this EASE is to be attacked, not used
_DIMENSIONS, _POWER_STEPS, _OWN_WEIGHT = 64, 5, 0.5

Released = Callable[[np.ndarray], np.ndarray]
"""A score from a generator's released parameters: rows float32 ``[candidates, items]`` -> ``[candidates]``."""


@dataclass(frozen=True)
class AttackRow:
    """One attack.

    Attributes:
      name: of the score.
      weak: whether it is only a nearest neighbour.
      auc, auc_error: area against the virtual users, and its standard error (DeLong).
      control_auc: against the control's virtual users; None without a control.
      corrected_auc, corrected_error: 1/2 + auc - control_auc; auc itself without a control.
      tpr: true positive rate by false positive rate, not corrected.
    """

    name: str
    weak: bool
    auc: float
    auc_error: float
    control_auc: float | None
    corrected_auc: float
    corrected_error: float
    tpr: Mapping[float, float]


@dataclass(frozen=True)
class GeneratorMembership:
    """What membership attacks find in virtual users.

    Attributes:
      rows: by attack.
      strongest: name of the attack with the largest corrected area.
      num_members, num_others, num_reference: users.
      control: what the control's virtual users are, in words; None without.
      ceiling_auc, ceiling_label: what the guarantee leaves to any attack; None without a guarantee.
      bug: whether an area passes the ceiling by more than two standard errors: the corrected one, or the one as it is
        where the corrected one is above the ceiling too.
      verdict: that in a sentence.
      warning: what nearest-neighbour distances cannot show.
    """

    rows: tuple[AttackRow, ...]
    strongest: str
    num_members: int
    num_others: int
    num_reference: int
    control: str | None
    ceiling_auc: float | None
    ceiling_label: str | None
    bug: bool
    verdict: str
    warning: str = WARNING

    def row(self, name: str) -> AttackRow:
        """The row of an attack."""
        return next(row for row in self.rows if row.name == name)


def generator_membership(
    members: Interactions,
    others: Interactions,
    virtual: Interactions,
    *,
    reference: Interactions,
    control: Interactions | None = None,
    ceiling: Ceiling | None = None,
    released: Mapping[str, Released] | None = None,
    max_members: int = 2000,
    seed: int = 0,
) -> GeneratorMembership:
    """Attacks virtual users with every score, and compares with a control and a ceiling.

    Args:
      members: users that the generator was fitted on, with all rows it saw.
      others: users it never saw, of the same population, at least two; all their rows.
      virtual: what is attacked.
      reference: real users of the same population who are neither.
      control: virtual users of the same kind of generator, fitted on other users than the candidates.
      ceiling: of the generator's guarantee, see `attacks.roc`.
      released: further scores, from released parameters, by name. They have no control.
      max_members: members that are scored, drawn with ``seed``.
      seed: of that draw.

    Raises:
      ValueError: for another catalogue, no virtual users, or too few others or reference users.
    """
    if others.num_users < 2 or reference.num_users < 2:
        raise ValueError(
            f"A membership attack needs users that the generator never saw: two others and two reference users at "
            f"least; got {others.num_users} and {reference.num_users}. Hold whole users out (strong_generalization)."
        )
    if members.num_users > max_members:
        chosen = np.random.default_rng([seed, 6]).permutation(members.num_users)[:max_members]
        members = take_users(members, np.sort(chosen))
    groups = [on_catalogue(users, members) for users in (members, others)]
    virtual, reference = on_catalogue(virtual, members), on_catalogue(reference, members)
    truth = np.repeat([True, False], [users.num_users for users in groups])

    candidates = stack_users(*groups, name="candidates")
    known = user_fits(candidates, reference)
    scores = _scores(candidates, virtual, known)
    if released:
        rows = dense_rows(candidates)
        scores |= {name: np.asarray(score(rows)) for name, score in released.items()}
    controls = {} if control is None else _scores(candidates, on_catalogue(control, members), known)
    rows = tuple(_row(name, values, controls.get(name), truth) for name, values in scores.items())
    broken = [row for row in rows if ceiling is not None and _passes(row, ceiling)]
    return GeneratorMembership(
        rows=rows,
        strongest=max(rows, key=lambda row: row.corrected_auc).name,
        num_members=groups[0].num_users,
        num_others=groups[1].num_users,
        num_reference=reference.num_users,
        control=None if control is None else control.name,
        ceiling_auc=None if ceiling is None else ceiling.auc,
        ceiling_label=None if ceiling is None else ceiling.label,
        bug=bool(broken),
        verdict=_verdict(rows, broken, ceiling),
    )


def candidate_scores(candidates: Interactions, virtual: Interactions, reference: Interactions) -> dict[str, np.ndarray]:
    """Every score of every candidate, float64 ``[candidates]``, higher = rather a member.

    Args:
      candidates, virtual, reference: users on one catalogue. Transitions are scored where all three have times.
    """
    return _scores(candidates, virtual, user_fits(candidates, reference))


def user_fits(candidates: Interactions, users: Interactions) -> dict[str, np.ndarray]:
    """Log-likelihoods, up to scale, of candidates under models of some users, float64 ``[candidates]`` by model."""
    rows, theirs = dense_rows(candidates), dense_rows(users)
    fits = {
        "EASE": _ease_fit(rows, theirs),
        "kernel": _kernel_fit(rows, theirs),
        "Gaussian": _gaussian_fit(rows, theirs),
    }
    if candidates.timestamps is not None and users.timestamps is not None:
        fits["transitions"] = _transition_fit(candidates, users)
    return fits


def _scores(candidates: Interactions, target: Interactions, known: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    scores = _nearest(dense_rows(candidates), dense_rows(target))
    for name, fit in user_fits(candidates, target).items():
        scores[f"{name} likelihood"] = fit
        if name in known:
            scores[f"{name} ratio"] = fit - known[name]
    return scores


def span_score(mean: np.ndarray, basis: np.ndarray) -> Released:
    """A score from a released subspace: how little of a candidate's unit row, less the mean, lies outside of it.

    A subspace with as many dimensions as the generator had users contains each of them.

    Args:
      mean: float ``[items]``.
      basis: float ``[dimensions, items]``, orthonormal rows.
    """

    def score(rows: np.ndarray) -> np.ndarray:
        centred = _unit(rows) - mean[None, :]
        return -np.linalg.norm(centred - (centred @ basis.T) @ basis, axis=1)

    return score


def _row(name: str, scores: np.ndarray, control: np.ndarray | None, truth: np.ndarray) -> AttackRow:
    curve = roc([scores], [truth])
    control_auc, corrected, error = None, curve.auc, curve.auc_error
    if control is not None:
        mine, theirs = placements(scores, truth), placements(control, truth)
        control_auc = float(theirs[0].mean())
        corrected = float(np.clip(0.5 + curve.auc - control_auc, 0, 1))
        # Both areas are of the same candidates, so the variance is that of the difference of their placements.
        variances = [(one - other).var(ddof=1) / len(one) for one, other in zip(mine, theirs, strict=True)]
        error = float(np.sqrt(sum(variances)))
    return AttackRow(
        name=name,
        weak=name.startswith(WEAK),
        auc=curve.auc,
        auc_error=curve.auc_error,
        control_auc=control_auc,
        corrected_auc=corrected,
        corrected_error=error,
        tpr={fpr: curve.tpr_at(fpr) for fpr in RATES},
    )


def _passes(row: AttackRow, ceiling: Ceiling) -> bool:
    """Above by two standard errors: corrected, or as it is, which errs less, if corrected it is above at all."""
    above, corrected = row.auc - ceiling.auc, row.corrected_auc - ceiling.auc
    return corrected > STANDARD_ERRORS * row.corrected_error or (
        corrected > 0 and above > STANDARD_ERRORS * row.auc_error
    )


def _verdict(rows: tuple[AttackRow, ...], broken: list[AttackRow], ceiling: Ceiling | None) -> str:
    best = max(rows, key=lambda row: row.corrected_auc)
    reached = f"{best.name} reaches AUC {best.corrected_auc:.3f} (standard error {best.corrected_error:.3f})"
    if ceiling is None:
        return f"No guarantee to compare with: the strongest attack, {reached}."
    if broken:
        phrases = (f"{row.name} {row.auc:.3f}, corrected {row.corrected_auc:.3f}" for row in broken)
        return (
            f"BUG: above the ceiling {ceiling.auc:.3f} of {ceiling.label} by more than two standard errors: "
            f"{'; '.join(phrases)}. The generator is less private than it says."
        )
    return (
        f"The strongest attack, {reached}; {ceiling.label} leaves {ceiling.auc:.3f} to any attack, and none is above."
    )


def _nearest(rows: np.ndarray, drawn: np.ndarray) -> dict[str, np.ndarray]:
    common = rows @ drawn.T
    own, their = rows.sum(1)[:, None], drawn.sum(1)[None, :]
    return {
        f"{WEAK}cosine": (common / np.sqrt(np.maximum(own * their, 1))).max(1),
        f"{WEAK}Jaccard": (common / np.maximum(own + their - common, 1)).max(1),
        f"{WEAK}Hamming": -(own + their - 2 * common).min(1),
    }


def _ease_fit(rows: np.ndarray, users: np.ndarray) -> np.ndarray:
    """-|x - xB|^2 / |x| of EASE on some users; its diagonal is zero, so each item is predicted from the others."""
    weights = weights_from_gram((users.T @ users).astype(np.float64), l2=_EASE_L2)
    return -np.square(rows - rows @ weights).sum(1) / np.maximum(rows.sum(1), 1)


def _kernel_fit(rows: np.ndarray, users: np.ndarray) -> np.ndarray:
    """log mean_v prod_{i in x} p(i | v): one multinomial kernel a user, half its items and half popularity."""
    background = (users.sum(0) + 1) / (users.sum() + users.shape[1])
    kernels = _OWN_WEIGHT * users / np.maximum(users.sum(1), 1)[:, None] + (1 - _OWN_WEIGHT) * background[None, :]
    return logsumexp(rows @ np.log(kernels).astype(np.float32).T, axis=1) - np.log(len(users))


def _gaussian_fit(rows: np.ndarray, users: np.ndarray) -> np.ndarray:
    """Log-density of unit rows under probabilistic principal components of users' unit rows: Tipping and Bishop (1999),
    "Probabilistic Principal Component Analysis"."""
    rows, users = _unit(rows), _unit(users)
    mean = users.mean(0)
    rows, users = rows - mean[None, :], users - mean[None, :]
    dimensions = max(min(_DIMENSIONS, len(users) // 2, rows.shape[1] - 1), 1)
    basis = np.random.default_rng(0).standard_normal((rows.shape[1], dimensions))
    for _ in range(_POWER_STEPS):
        basis = np.linalg.qr(users.T @ (users @ basis))[0]
    inside, points = users @ basis, rows @ basis
    variances = np.maximum(np.square(inside).mean(0), 1e-9)
    left = max(float(np.square(users).sum() - np.square(inside).sum()) / len(users), 1e-9)
    rest = left / max(rows.shape[1] - dimensions, 1)
    outside = np.square(rows).sum(1) - np.square(points).sum(1)
    size = np.log(variances).sum() + (rows.shape[1] - dimensions) * np.log(rest)
    return -0.5 * ((np.square(points) / variances[None, :]).sum(1) + outside / rest + size)


def _transition_fit(candidates: Interactions, users: Interactions) -> np.ndarray:
    """Mean log-probability of a candidate's transitions under those of some users, half of it popularity."""
    num_items = users.num_items
    popular = (users.item_counts + 1.0) / (users.num_interactions + num_items)
    pairs, _ = _transitions(users)
    counted, counts = np.unique(pairs, return_counts=True)
    leaving = np.bincount(pairs // num_items, minlength=num_items)
    asked, owner = _transitions(candidates)
    places = np.searchsorted(counted, asked).clip(max=max(len(counted) - 1, 0))
    found = np.where(counted[places] == asked, counts[places], 0) if len(counted) else np.zeros(len(asked))
    seen = found / np.maximum(leaving[asked // num_items], 1)
    logs = np.log(_OWN_WEIGHT * seen + (1 - _OWN_WEIGHT) * popular[asked % num_items])
    lengths = np.bincount(owner, minlength=candidates.num_users)
    return np.bincount(owner, logs, minlength=candidates.num_users) / np.maximum(lengths, 1)


def _transitions(users: Interactions) -> tuple[np.ndarray, np.ndarray]:
    """``item * items + next item`` of consecutive rows, and their users."""
    same = users.user_ids[:-1] == users.user_ids[1:]
    pairs = users.item_ids[:-1].astype(np.int64) * users.num_items + users.item_ids[1:]
    return pairs[same], users.user_ids[:-1][same]


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
