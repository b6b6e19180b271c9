"""Singling out, linking and inferring with virtual users: three harms, each against people the generator never saw.

After Giomi, Boenisch, Wehmeyer and Tasnadi (2023), "A Unified Framework for Quantifying Privacy Risk in Synthetic
Data", with attacks of our own for sets of items. What an attack finds of everybody is knowledge and no leak; what it
finds of the generator's users beyond that of others is. So each success rate stands beside that of a control group, and

    risk = (attack - control) / (1 - control)

is 0 if being in the data changed nothing and 1 if it gave everything away. Beside both stands a baseline: guessing
without looking at which virtual user is which.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import hypergeom, norm

from fedjax_rec.data.interactions import Interactions
from fedjax_rec.models.ease import ease_weights
from fedjax_rec.reporting.formatting import Estimate
from fedjax_rec.synthesis.populations import dense_rows, on_catalogue, take_users

_TOP = 10  # items that the attacker may name for a secret one
_NEIGHBOURS = 5  # virtual users that a linking attacker looks at
_EASE_L2 = 100.0
_Z = float(norm.ppf(0.975))


@dataclass(frozen=True)
class GroupRisk:
    """One attack on the generator's users and on a control group.

    Attributes:
      name: of the attack.
      attack, control, baseline: success rates with 95 % intervals (Wilson).
      risk: (attack - control) / (1 - control) with its interval.
      num_attacks, num_controls: attempts.
      meaning: what a success is, and who the control is.
    """

    name: str
    attack: Estimate
    control: Estimate
    baseline: Estimate
    risk: Estimate
    num_attacks: int
    num_controls: int
    meaning: str


def group_risks(
    members: Interactions, others: Interactions, virtual: Interactions, *, max_users: int = 2000, seed: int = 0
) -> tuple[GroupRisk, ...]:
    """Every attack of this file; of attributes those that real and virtual users both have.

    Args:
      members: users that the generator was fitted on, all rows it saw.
      others: users it never saw, all rows.
      virtual: what was released.
      max_users: of either group, drawn with ``seed``; singling out looks at all.
      seed: of halves, secrets and predicates.

    Raises:
      ValueError: for another catalogue, no virtual users or no others.
    """
    if not others.num_users:
        raise ValueError("A risk needs users that the generator never saw; hold whole users out.")
    virtual, others = on_catalogue(virtual, members), on_catalogue(others, members)
    rng = np.random.default_rng([seed, 7])
    few = [_some(users, max_users, rng) for users in (members, others)]
    found = [
        singling_out(members, others, virtual, seed=seed),
        linkability(*few, virtual, seed=seed),
        secret_item(*few, virtual, seed=seed, model=False),
        secret_item(*few, virtual, seed=seed, model=True),
    ]
    names = sorted(set(members.user_attributes) & set(others.user_attributes) & set(virtual.user_attributes))
    return (*found, *(attribute(*few, virtual, name=name) for name in names))


def singling_out(
    members: Interactions,
    others: Interactions,
    virtual: Interactions,
    *,
    num_predicates: int = 1000,
    num_items: int = 4,
    seed: int = 0,
) -> GroupRisk:
    """Claims "exactly one of the generator's users has all of these items", taken from one virtual user each.

    A predicate is the set of the virtual user's rarest items among virtual users, at most `num_items` of them and as
    few as make it unique there; each predicate is claimed once. Success: exactly one member has them all.

    The control is the exchange of members and others. Of the T real users, members or not, who have the items, the
    number of members would be hypergeometric if membership meant nothing, and the control's rate is the probability
    that it is one. So both groups are equally large, and all users are used.

    Args:
      members, others, virtual: users on one catalogue.
      num_predicates: at most, from as many virtual users.
      num_items: of a predicate, at most.
      seed: of the virtual users and of the baseline's items.
    """
    rng = np.random.default_rng([seed, 8])
    inside, outside, drawn = (dense_rows(users) > 0 for users in (members, others, virtual))
    counts = drawn.sum(0)
    predicates = set()
    for user in rng.permutation(len(drawn))[:num_predicates]:
        items = np.flatnonzero(drawn[user])
        items = items[np.argsort(counts[items], kind="stable")][:num_items]
        for size in range(1, len(items) + 1):
            if drawn[:, items[:size]].all(1).sum() == 1:
                predicates.add(tuple(sorted(int(item) for item in items[:size])))
                break
    popular = counts / max(counts.sum(), 1)
    possible = np.count_nonzero(popular)
    guesses = [rng.choice(len(popular), min(len(p), possible), replace=False, p=popular) for p in predicates]
    hits, expected = _claims(sorted(predicates), inside, outside)
    guessed, _ = _claims(guesses, inside, outside)
    tries = len(hits)
    attack, control = wilson(hits.sum(), tries), float(expected.mean()) if tries else 0.0
    # Given who has the items, the control's rate is known and not estimated.
    fixed = Estimate(control, control, control)
    return GroupRisk(
        name="singling out",
        attack=attack,
        control=fixed,
        baseline=wilson(guessed.sum(), tries),
        risk=risk(attack, fixed),
        num_attacks=tries,
        num_controls=tries,
        meaning=(
            f"Items of one virtual user (at most {num_items}) are those of exactly one real train user; control: the "
            "same if train and held-out users were exchanged at random; baseline: as many random items by popularity."
        ),
    )


def linkability(members: Interactions, others: Interactions, virtual: Interactions, *, seed: int = 0) -> GroupRisk:
    """Two parties hold half of a person's items each, and link them if the halves have a virtual neighbour in common.

    A neighbour is one of the five virtual users of largest cosine. The baseline links halves of different members.

    Args:
      members, others, virtual: users on one catalogue.
      seed: of the halves.
    """
    rng = np.random.default_rng([seed, 9])
    drawn = dense_rows(virtual)
    drawn /= np.maximum(np.linalg.norm(drawn, axis=1, keepdims=True), 1e-12)
    size = min(_NEIGHBOURS, max(len(drawn) // 10, 1))
    rates, trials, baseline = [], [], Estimate(0.0, 0.0, 0.0)
    for users in (members, others):
        rows = dense_rows(users)
        first = rows * (rng.random(rows.shape) < 0.5)
        near = [_nearest(half, drawn, size, rng) for half in (first, rows - first)]
        rates.append(wilson(_share(*near).sum(), len(rows)))
        trials.append(len(rows))
        if users is members:
            baseline = wilson(_share(near[0], np.roll(near[1], 1, axis=0)).sum(), len(rows))
    return GroupRisk(
        "linkability",
        *rates,
        baseline,
        risk(*rates),
        *trials,
        meaning=(
            f"Two random halves of a user's items share one of their {size} nearest virtual users; control: held-out "
            "users; baseline: halves of two different users."
        ),
    )


def secret_item(
    members: Interactions, others: Interactions, virtual: Interactions, *, model: bool, seed: int = 0
) -> GroupRisk:
    """One random item of a person is a secret; the attacker knows the others and may name ten.

    Args:
      members, others, virtual: users on one catalogue; people with one item are left out.
      model: whether the ten come from EASE trained on virtual users, or from the nearest virtual user (the items it
        has, the most popular first, and then popular ones).
      seed: of the secrets.
    """
    rng = np.random.default_rng([seed, 10])
    drawn = dense_rows(virtual)
    popular = drawn.sum(0)
    weights = ease_weights(virtual, l2=_EASE_L2) if model else None
    rates, trials, baseline = [], [], Estimate(0.0, 0.0, 0.0)
    for users in (members, others):
        users = take_users(users, np.flatnonzero(users.counts_per_user >= 2))
        known = dense_rows(users)
        people = np.arange(len(known))
        secret = users.item_ids[users.offsets[:-1] + rng.integers(0, np.maximum(users.counts_per_user, 1))]
        known[people, secret] = 0.0
        if model:
            scores = known @ weights
        else:
            scores = popular / max(popular.max(), 1) + 2 * drawn[_nearest(known, _unit(drawn), 1, rng)[:, 0]]
        rates.append(_named(scores, known, secret))
        trials.append(len(known))
        if users.num_users and not baseline.high:
            baseline = _named(np.broadcast_to(popular, known.shape), known, secret)
    how = "EASE trained on virtual users" if model else "the nearest virtual user"
    return GroupRisk(
        f"secret item from {how}",
        *rates,
        baseline,
        risk(*rates),
        *trials,
        meaning=f"A hidden item is among ten named by {how}; control: held-out users; baseline: ten popular items.",
    )


def attribute(members: Interactions, others: Interactions, virtual: Interactions, *, name: str) -> GroupRisk:
    """Names a person's attribute: that of most of the five nearest virtual users.

    Args:
      members, others, virtual: users that all have the attribute.
      name: of the attribute. The baseline names the commonest value among virtual users.
    """
    drawn = _unit(dense_rows(virtual))
    values, codes = np.unique(virtual.user_attributes[name], return_inverse=True)
    commonest = np.bincount(codes).argmax()
    size = min(_NEIGHBOURS, len(drawn))
    rates, baseline = [], None
    for users in (members, others):
        near = _nearest(dense_rows(users), drawn, size, np.random.default_rng(0))
        votes = np.stack([(codes[near] == code).sum(1) for code in range(len(values))], axis=1)
        truth = users.user_attributes[name]
        rates.append(wilson((values[votes.argmax(1)] == truth).sum(), len(truth)))
        baseline = wilson((values[commonest] == truth).sum(), len(truth)) if baseline is None else baseline
    return GroupRisk(
        f"attribute {name}",
        *rates,
        baseline,
        risk(*rates),
        members.num_users,
        others.num_users,
        meaning=f"{name} of most of {size} nearest virtual users; control: held-out users; baseline: one guess.",
    )


def wilson(successes: float, trials: int) -> Estimate:
    """A rate with its 95 % interval: Wilson (1927), "Probable Inference, the Law of Succession, and Statistical
    Inference". Without trials, 0 with the interval 0 to 1."""
    if not trials:
        return Estimate(0.0, 0.0, 1.0)
    rate, z2 = float(successes) / trials, _Z**2
    middle = (rate + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z / (1 + z2 / trials) * np.sqrt(rate * (1 - rate) / trials + z2 / (4 * trials**2))
    return Estimate(rate, float(max(middle - half, 0.0)), float(min(middle + half, 1.0)))


def risk(attack: Estimate, control: Estimate) -> Estimate:
    """(attack - control) / (1 - control), with the intervals of both carried through (to first order, in squares).

    Cut at -1. Where the control always succeeds nothing is left to give away: 0, and the interval says nothing.
    """
    left = 1 - control.value
    if left <= 0:
        return Estimate(0.0, -1.0, 1.0)
    value = (attack.value - control.value) / left
    slope = (1 - attack.value) / left**2
    down = np.hypot((attack.value - attack.low) / left, slope * (control.high - control.value))
    up = np.hypot((attack.high - attack.value) / left, slope * (control.value - control.low))
    return Estimate(*(float(np.clip(x, -1.0, 1.0)) for x in (value, value - down, value + up)))


def _claims(predicates, inside: np.ndarray, outside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which claims hold of exactly one member, and how likely each would be if groups were exchanged."""
    counts = np.array([[rows[:, list(items)].all(1).sum() for rows in (inside, outside)] for items in predicates])
    counts = counts.reshape(-1, 2)
    everybody = len(inside) + len(outside)
    return counts[:, 0] == 1, hypergeom.pmf(1, everybody, counts.sum(1), len(inside))


def _nearest(rows: np.ndarray, unit: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """The ``size`` rows of ``unit`` with the largest cosine to each row, int ``[rows, size]``; a coin breaks ties."""
    alike = _unit(rows) @ unit.T
    alike += rng.random(alike.shape, np.float32) * 1e-6
    return np.argsort(-alike, axis=1)[:, :size]


def _share(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Whether rows of neighbours have one in common, bool ``[rows]``."""
    return (first[:, :, None] == second[:, None, :]).any((1, 2))


def _named(scores: np.ndarray, known: np.ndarray, secret: np.ndarray) -> Estimate:
    """How often the secret is among the ten best of the items not known; ties count against the attacker."""
    own = scores[np.arange(len(secret)), secret]
    better = ((scores >= own[:, None]) & (known == 0)).sum(1) - 1
    return wilson((better < _TOP).sum(), len(secret))


def _some(users: Interactions, most: int, rng: np.random.Generator) -> Interactions:
    if users.num_users <= most:
        return users
    return take_users(users, np.sort(rng.permutation(users.num_users)[:most]))


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
