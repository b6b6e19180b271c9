"""A policy applied: the steps in order, counted, and the map from users to records kept apart from the release."""

import dataclasses
import difflib
import secrets
from typing import Any, NamedTuple

import numpy as np

from fedjax_rec.anonymization.hierarchies import coarsen_ratings, coarsen_times
from fedjax_rec.anonymization.item_sets import enforce_km
from fedjax_rec.anonymization.microaggregation import microaggregate
from fedjax_rec.anonymization.policy import VIRTUAL, Policy
from fedjax_rec.anonymization.pseudonyms import new_key, pseudonymize, pseudonyms
from fedjax_rec.anonymization.randomized_sets import randomize_sets
from fedjax_rec.anonymization.released import released
from fedjax_rec.anonymization.replacement import replace_items
from fedjax_rec.anonymization.tables import anonymize_users
from fedjax_rec.data.interactions import Interactions
from fedjax_rec.models.popularity import draw_by_popularity
from fedjax_rec.synthesis.populations import on_catalogue


class Anonymized(NamedTuple):
    """A release, and what must not leave the house with it.

    Attributes:
      interactions: the release.
      steps: what was done, one dict of JSON values a step.
      truth: int64 ``[users of the source]``, the record of each user, -1 = left out. A secret.
    """

    interactions: Interactions
    steps: tuple[dict[str, Any], ...]
    truth: np.ndarray


def anonymize(
    interactions: Interactions,
    policy: Policy,
    *,
    key: bytes | None = None,
    virtual: Interactions | None = None,
    seed: int | None,
) -> Anonymized:
    """Takes the steps of a policy.

    Args:
      interactions: the source.
      policy: what to do.
      key: of the pseudonyms; None takes a fresh one and forgets it.
      virtual: users whose items replace real ones, if the policy names a file; items are matched by label, and all of
        them must be in the catalogue.
      seed: of everything random but the key; None = the operating system, as it must be for a release: whoever knows
        the seed can tell which items are real.

    Raises:
      ValueError: for a column that is not there, a k above the number of users, missing virtual users, or when nobody
        is left.
    """
    data, steps = interactions, []
    truth = np.arange(data.num_users)
    check_policy(interactions, policy)
    if policy.attributes is None:
        data = _without_attributes(data)
    else:
        made = anonymize_users(
            data,
            hierarchies=policy.attributes.hierarchies,
            k=policy.attributes.k,
            l=policy.attributes.l,
            t=policy.attributes.t,
            sensitive=policy.attributes.sensitive,
            max_suppressed_share=policy.attributes.max_suppressed_share,
        )
        left = ~made.table.suppressed
        data, truth = made.interactions, np.where(left, np.cumsum(left) - 1, -1)
        levels = {name: hierarchy.levels for name, hierarchy in policy.attributes.hierarchies.items()}
        steps.append(
            {
                "step": "attributes",
                "levels": {name: levels[name][level].name for name, level in made.table.levels.items()},
                "users_left_out": int(np.count_nonzero(~left)),
                "k": made.table.k,
                "l": made.table.l,
                "t": made.table.t,
                "information_loss": made.table.information_loss,
            }
        )
    data = coarsened(data, policy)
    steps += [{"step": "times", "to": policy.times.to}] if policy.times else []
    steps += [{"step": "ratings", "to": policy.ratings.to}] if policy.ratings else []
    data, step = _change_items(data, policy, virtual, seed)
    steps += [] if step is None else [step]
    if policy.items is not None:
        found = enforce_km(data, policy.items.k, policy.items.m)
        data = found.interactions
        steps.append(
            {
                "step": "items",
                "k": policy.items.k,
                "m": policy.items.m,
                "rows_left_out": found.suppression.removed_rows,
                "items_left_out": found.suppression.removed_items,
                "users_emptied": found.suppression.emptied_users,
                "information_loss": found.suppression.information_loss,
            }
        )
    if policy.pseudonyms is not None:
        key = new_key() if key is None else key
        names = pseudonyms(data.user_labels, key)
        data = pseudonymize(data, key)
        truth = np.where(truth >= 0, np.searchsorted(data.user_labels, names)[truth], -1)
        steps.append({"step": "pseudonyms", "users": data.num_users})
    return Anonymized(data, tuple(steps), truth)


def coarsened(interactions: Interactions, policy: Policy) -> Interactions:
    """Times and ratings as coarse as the policy releases them, by rules that everybody can follow."""
    if policy.times is not None:
        interactions = coarsen_times(interactions, to=policy.times.to)
    if policy.ratings is not None:
        interactions = coarsen_ratings(interactions, to=policy.ratings.to, liked_from=policy.ratings.liked_from)
    return interactions


def check_policy(interactions: Interactions, policy: Policy) -> None:
    """Refuses, before any work, what this data set cannot meet.

    Raises:
      ValueError: for a column that the users do not have, or a k above their number.
    """
    if policy.attributes is not None:
        wanted = [*policy.attributes.hierarchies, *filter(None, [policy.attributes.sensitive])]
        for name in wanted:
            _check_column(interactions, name)
    for section in ("attributes", "microaggregation", "items"):
        k = getattr(getattr(policy, section), "k", 0)
        if k > interactions.num_users:
            raise ValueError(
                f"[{section}] k = {k} is more than the {interactions.num_users} users of {interactions.name}; nobody "
                "can hide among so many. Lower k."
            )


def popularity_users(interactions: Interactions, *, seed: int) -> Interactions:
    """As many virtual users as there are users, of the same lengths, with different items drawn by popularity.

    As `draw_by_popularity` draws them. Counts and lengths are those of the data: this is a mask for a release, and no
    private one.
    """
    drawn = draw_by_popularity(
        interactions.item_counts, interactions.counts_per_user, rng=np.random.default_rng([seed, 7])
    )
    return released(
        _without_attributes(interactions),
        interactions.user_ids,
        drawn[drawn < interactions.num_items],
        ratings=None,
        timestamps=None,
        suffix="popularity users",
    )


def _change_items(
    data: Interactions, policy: Policy, virtual: Interactions | None, seed: int | None
) -> tuple[Interactions, dict[str, Any] | None]:
    """The one step that changes who has which items."""
    if policy.microaggregation is not None:
        asked = policy.microaggregation
        options = {"times": asked.times, "min_members": asked.min_members}
        found = microaggregate(data, asked.k, seed=_number(seed), **options)
        step = {"step": "microaggregation", "k": asked.k, **options, "groups": found.num_groups}
        step |= {"users_emptied": found.num_emptied, "information_loss": found.information_loss}
        return found.interactions, step
    if policy.replacement is not None:
        share, source = policy.replacement.share, policy.replacement.virtual
        if source == VIRTUAL:
            virtual = popularity_users(data, seed=_number(seed))
        elif virtual is None:
            raise ValueError(
                f"[replacement] takes the virtual users of {source}; load them and pass them as `virtual`."
            )
        found = replace_items(data, on_catalogue(virtual, data), share=share, seed=_number(seed))
        step = {"step": "replacement", "share": share, "virtual": source, "rows": int(found.num_replaced.sum())}
        return found.interactions, step | {"information_loss": found.information_loss}
    if policy.randomized_response is not None:
        asked = policy.randomized_response
        found = randomize_sets(
            data, epsilon_per_item=asked.epsilon_per_item, seed=seed, expected_items=asked.expected_items
        )
        return found.interactions, {"step": "randomized_response", **found.statement}
    return data, None


def _number(seed: int | None) -> int:
    return secrets.randbits(62) if seed is None else seed


def _without_attributes(interactions: Interactions) -> Interactions:
    return dataclasses.replace(interactions, user_attributes={})


def _check_column(interactions: Interactions, name: str) -> None:
    known = interactions.user_attributes
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f", did you mean {near[0]!r}?" if near else "."
        there = f"They have {', '.join(known)}." if known else "They have none at all."
        raise ValueError(
            f"[attributes] names {name!r}, which the users of {interactions.name} do not have{hint} {there}"
        )
