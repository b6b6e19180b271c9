"""The risk of a release, measured before and after: degrees of anonymity, attacks, and what the protection costs.

Degrees (k, l, t, k^m) are properties of tables and no guarantee; attacks find what they find, and a better attacker
finds more. Only a step with an epsilon promises something of every attacker: see its own words.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fedjax_rec.anonymization.apply import Anonymized, anonymize, coarsened
from fedjax_rec.anonymization.degrees import k_anonymity, l_diversity, t_closeness
from fedjax_rec.anonymization.item_sets import km_anonymity
from fedjax_rec.anonymization.policy import Attributes, Policy
from fedjax_rec.anonymization.utility import L2S, downstream_cost, ease_quality, held_out, training_users
from fedjax_rec.attacks.reidentification import reidentify
from fedjax_rec.attacks.uniqueness import item_places, uniqueness
from fedjax_rec.data.interactions import Interactions

SETTINGS: dict[str, dict[str, Any]] = {
    "items": {"known": ("items",)},
    "items, ratings": {"known": ("items", "ratings")},
    "items, ratings, dates": {"known": ("items", "ratings", "dates")},
    "partly wrong": {
        "known": ("items", "ratings", "dates"),
        "wrong_share": 0.25,
        "rating_error": 1.0,
        "date_error_days": 14.0,
    },
}
"""What the attacker knows. "partly wrong": a quarter of the items are others, every rating is off by one, every date by
two weeks."""

LENGTH_POWERS = (0.0, 0.25, 0.5)
"""Scores that the attacker tries: the published one, and two that do not favour long records. It also tries without
dates, and without ratings: more knowledge must not find fewer, and what is wrong about the right items misleads."""


def risk_report(
    original: Interactions,
    anonymized: Anonymized,
    policy: Policy,
    *,
    known_items: Sequence[int] = (4, 8, 12),
    num_known: int = 8,
    num_targets: int | None = 500,
    l2s: Sequence[float] | None = L2S,
    virtual: Interactions | None = None,
    before: dict[str, Any] | None = None,
    seed: int = 0,
    report: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Everything that is measured about a release, as JSON values.

    The attacker of the re-identification knows the policy, and makes its knowledge as coarse as the release is.

    Args:
      original: the data as it is.
      anonymized: of `anonymize`, by this policy.
      policy: what was done.
      known_items: of `uniqueness`, which attacks all users.
      num_known: items that `reidentify` knows.
      num_targets: of `reidentify`.
      l2s: penalties of EASE for the cost downstream; None leaves it out.
      virtual: as in `anonymize`.
      before: that part of an earlier report on the same data by a policy of the same attributes and items, with the
        same settings; None measures it.
      seed: of targets, knowledge, splits and random steps.
      report: is told what is measured now.

    Returns:
      "before" and "after" with "attributes" (k, l, t; None without such a step), "items" (k^m), "uniqueness" by number
      of known items and "reidentification" by setting: of the attempt that finds most users, with what that "attempt"
      was, and the "published_score"; "information_loss"; "downstream" or None. NaN is None.
    """
    released, truth = anonymized.interactions, anonymized.truth
    sides = {} if before is None else {"before": before}
    for name, data, places, view in (
        ("before", original, None, None),
        ("after", released, truth, lambda knowledge: coarsened(knowledge, policy)),
    ):
        if name in sides:
            continue
        report(f"degrees of anonymity {name}")
        degrees = {"attributes": _attribute_degrees(data, policy.attributes), "items": _km(data, policy)}
        report(f"uniqueness {name}")
        unique = uniqueness(original, known_items=known_items, released=data, truth=places, seed=seed)
        report(f"re-identification {name}")
        attacks: dict[str, dict[str, Any]] = {}
        for setting, options in SETTINGS.items():
            found = [
                reidentify(
                    original,
                    data,
                    places,
                    num_known=num_known,
                    num_targets=num_targets,
                    view=view,
                    seed=seed,
                    **(options | attempt),
                )
                for attempt in _attempts(options)
            ]
            strongest = max(range(len(found)), key=lambda place, found=found: found[place].top1)
            attacks[setting] = dataclasses.asdict(found[strongest]) | {
                "attempt": _attempts(options)[strongest],
                "published_score": dataclasses.asdict(found[0]),
            }
        sides[name] = degrees | {
            "uniqueness": {str(m): value._asdict() for m, value in unique.items()},
            "reidentification": attacks,
        }
    cost = None
    if l2s is not None:
        split = held_out(original, seed=seed)
        train = training_users(split)
        report("EASE on the data as it is")
        as_it_is = ease_quality(train, split, l2s=l2s)
        report("EASE on anonymised data")
        again = anonymize(train, policy, virtual=virtual, seed=seed + 1).interactions
        cost = downstream_cost(ease_quality(again, split, l2s=l2s), as_it_is, seed=seed)
    return without_nan(sides | {"information_loss": information_loss(original, released, truth), "downstream": cost})


def information_loss(original: Interactions, released: Interactions, truth: np.ndarray) -> dict[str, Any]:
    """What of the original is not, or not rightly, in the release.

    Returns:
      "users_left_out", "interactions_lost" (share of true user-item pairs that the user's record has not),
      "interactions_added" (share of the release's pairs that are not true), "jaccard_distance" (mean over users),
      "popularity_distance" (total variation between the items' shares of all interactions), "ratings" and "times"
      (whether the release has some).
    """
    places = item_places(original, released)
    mine = truth[original.user_ids]
    pairs = mine * np.int64(released.num_items) + places[original.item_ids]
    records = np.unique(truth[truth >= 0])
    theirs = released.user_ids * np.int64(released.num_items) + released.item_ids
    kept = np.isin(pairs, theirs) & (mine >= 0) & (places[original.item_ids] >= 0)
    shared = np.bincount(original.user_ids[kept], minlength=original.num_users)
    length = np.where(truth >= 0, released.counts_per_user[np.maximum(truth, 0)], 0)
    either = original.counts_per_user + length - shared
    had = original.counts_per_user > 0
    shares = np.zeros((2, released.num_items + 1))
    np.add.at(shares[0], places, original.item_counts / max(original.num_interactions, 1))  # -1 is the last
    shares[1, :-1] = released.item_counts / max(released.num_interactions, 1)
    return {
        "users_left_out": int(np.count_nonzero(had & (length == 0))),
        "interactions_lost": 1 - int(shared.sum()) / original.num_interactions,
        "interactions_added": 1 - int(shared.sum()) / max(int(length.sum()), 1),
        "jaccard_distance": float(np.mean(1 - shared[had] / either[had])),
        "popularity_distance": float(np.abs(shares[0] - shares[1]).sum() / 2),
        "num_records": len(records),
        "ratings": released.ratings is not None,
        "times": released.timestamps is not None,
    }


def without_nan(values: Any) -> Any:
    """The same tree with None for NaN, which JSON has not."""
    if isinstance(values, dict):
        return {str(key): without_nan(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [without_nan(value) for value in values]
    if isinstance(values, float) and math.isnan(values):
        return None
    return values.item() if isinstance(values, np.generic) else values


def _attempts(options: dict[str, Any]) -> list[dict[str, Any]]:
    """What the attacker tries, the published score first."""
    known = options["known"]
    return [{"length_power": power, "known": known} for power in LENGTH_POWERS] + [
        {"length_power": LENGTH_POWERS[1], "known": known[:num]} for num in range(1, len(known))
    ]


def _attribute_degrees(data: Interactions, attributes: Attributes | None) -> dict[str, Any] | None:
    if attributes is None:
        return None
    table, names = data.user_attributes, list(attributes.hierarchies)
    found: dict[str, Any] = {"quasi_identifiers": names, "k": k_anonymity(table, names)}
    if attributes.sensitive is not None:
        found["sensitive"] = attributes.sensitive
        found["l"] = l_diversity(table, names, attributes.sensitive)
        found["t"] = t_closeness(table, names, attributes.sensitive)
    return found


def _km(data: Interactions, policy: Policy) -> dict[str, Any]:
    """k^m of the policy, or 5^2."""
    k, m = (5, 2) if policy.items is None else (policy.items.k, policy.items.m)
    found = km_anonymity(data, min(k, data.num_users), m)
    return {
        "k": found.k,
        "m": found.m,
        "smallest_support": found.smallest_support,
        "violating_share": found.num_violations / max(found.num_itemsets, 1),
        "holds": found.holds,
    }
