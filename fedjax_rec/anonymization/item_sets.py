"""k^m-anonymity of item sets: whoever knows m items of somebody still finds k users, or nobody.

Terrovitis, Mamoulis and Kalnis, 2008, "Privacy-preserving Anonymization of Set-valued Data": every set of at most m
items that occurs in some record occurs in at least k. Items have no hierarchy here, so rows are suppressed instead of
generalised. Pairs are counted exactly, as the product X^T X of the indicators; triples by listing, where that is small.

Heuristic, no guarantee against background knowledge, unlike differential privacy: who knows more than m items, or a
rating or a date, or what somebody has *not* seen, may still single a user out.
"""

from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

from fedjax_rec.anonymization.item_supports import BLOCK_ITEMS, indicators, pair_supports, triple_supports
from fedjax_rec.anonymization.losses import mean_jaccard_distance
from fedjax_rec.anonymization.released import released
from fedjax_rec.data.interactions import Interactions

_MOST_PAIRS = 4e8  # cells of the table of pairs, a byte each
_MOST_CELLS = 4e9  # users times items where items are given back, a byte each


class KmReport(NamedTuple):
    """How k^m-anonymous item sets are.

    Attributes:
      k: asked for.
      m: largest number of items that the attacker knows.
      smallest_support: users with the rarest item set of at most m items that anybody has; 0 if nobody has an item.
      num_violations: item sets that fewer than k users have, but somebody.
      num_itemsets: item sets of at most m items that somebody has.
      violations_by_size: of 1, 2, .. m items.
    """

    k: int
    m: int
    smallest_support: int
    num_violations: int
    num_itemsets: int
    violations_by_size: tuple[int, ...]

    @property
    def holds(self) -> bool:
        """Whether the item sets are k^m-anonymous."""
        return self.num_violations == 0


class KmSuppression(NamedTuple):
    """What `enforce_km` took away.

    Attributes:
      removed_rows: rows suppressed.
      removed_share: of all rows.
      removed_items: items that had a row and have none any more.
      emptied_users: users that had a row and have none any more.
      information_loss: mean Jaccard distance of the users' item sets before and after.
      before: report on the source.
      after: report on the release, measured anew; it holds.
    """

    removed_rows: int
    removed_share: float
    removed_items: int
    emptied_users: int
    information_loss: float
    before: KmReport
    after: KmReport


class KmRelease(NamedTuple):
    """Interactions that are k^m-anonymous, and what that took."""

    interactions: Interactions
    suppression: KmSuppression


def km_anonymity(interactions: Interactions, k: int, m: int = 2) -> KmReport:
    """Counts the item sets of at most m items that somebody, but fewer than k users, have.

    Args:
      interactions: whose item sets; ratings and times are not looked at.
      k: from 1 to the number of users.
      m: 1, 2 or 3; 3 lists triples, and is refused where there are too many.

    Raises:
      ValueError: for k or m out of range, or too many triples.
    """
    _check(interactions, k, m)
    x = indicators(interactions)
    tallies = [_tally(np.bincount(x.indices, minlength=x.shape[1]), k)]
    if m >= 2:
        tallies.append(_total(_tally(np.triu(pairs, start + 1), k) for start, pairs in pair_supports(x)))
    if m >= 3:
        tallies.append(_total(_tally(triples, k) for _, _, triples in triple_supports(x)))
    return KmReport(
        k=k,
        m=m,
        smallest_support=min((smallest for smallest, _, _ in tallies if smallest), default=0),
        num_violations=sum(violations for _, violations, _ in tallies),
        num_itemsets=sum(num for _, _, num in tallies),
        violations_by_size=tuple(violations for _, violations, _ in tallies),
    )


def enforce_km(interactions: Interactions, k: int, m: int = 2, *, suppression: str = "local") -> KmRelease:
    """Suppresses rows until every set of at most m items that occurs has k users.

    Items with fewer than k users go first. Then whole items leave, always the one in most violating pairs for each row
    it costs; that is all of "global" suppression. "local" goes on and gives single records their items back: of the
    users of an item, those are kept among whom every other item that occurs at all does so k times. What stays is as
    anonymous, and there is more of it. Of triples, for m = 3, whole items leave in either way.

    The result is checked with `km_anonymity`. Users and catalogue stay, some users with no rows.

    Args:
      interactions: any.
      k: from 1 to the number of users.
      m: 1, 2 or 3.
      suppression: "local" or "global".

    Raises:
      ValueError: for arguments out of range, or a catalogue too large for a table of pairs or triples.
    """
    if suppression not in ("local", "global"):
        raise ValueError(f'suppression must be "local" or "global"; got {suppression!r}.')
    before = km_anonymity(interactions, k, m)
    keep = interactions.item_counts[interactions.item_ids] >= k
    if m >= 2:
        keep = _without_rare_pairs(interactions, keep, k)
        keep = _given_back(interactions, keep, k) if suppression == "local" else keep
    if m >= 3:
        keep = _without_rare_triples(interactions, keep, k)
    left = interactions.take(keep)
    result = released(
        left,
        left.user_ids,
        left.item_ids,
        ratings=left.ratings,
        timestamps=left.timestamps,
        suffix=f"{k}^{m}-anonymous item sets",
    )
    after = km_anonymity(result, k, m)
    if not after.holds:
        raise AssertionError(f"{after.num_violations} item sets still violate {k}^{m}-anonymity; this is a fault here.")
    removed = interactions.num_interactions - result.num_interactions
    return KmRelease(
        result,
        KmSuppression(
            removed_rows=removed,
            removed_share=removed / max(interactions.num_interactions, 1),
            removed_items=int(np.count_nonzero((interactions.item_counts > 0) & (result.item_counts == 0))),
            emptied_users=int(np.count_nonzero((interactions.counts_per_user > 0) & (result.counts_per_user == 0))),
            information_loss=mean_jaccard_distance(interactions, result),
            before=before,
            after=after,
        ),
    )


def _check(interactions: Interactions, k: int, m: int) -> None:
    if not 1 <= k <= interactions.num_users:
        raise ValueError(f"k must lie between 1 and the {interactions.num_users} users of the data; got {k}.")
    if m not in (1, 2, 3):
        raise ValueError(f"Item sets of m = 1, 2 or 3 items can be counted; got m = {m}.")


def _tally(supports: np.ndarray, k: int) -> tuple[int, int, int]:
    """The smallest support above 0 (or 0), how many lie between 1 and k - 1, and how many are above 0."""
    positive = supports[supports > 0]
    if not len(positive):
        return 0, 0, 0
    return int(positive.min()), int(np.count_nonzero(positive < k)), len(positive)


def _total(tallies) -> tuple[int, int, int]:
    tallies = list(tallies)
    smallest = min((one[0] for one in tallies if one[0]), default=0)
    return smallest, sum(one[1] for one in tallies), sum(one[2] for one in tallies)


def _rare_pairs(x: sp.csr_matrix, k: int) -> np.ndarray:
    """bool ``[items, items]``: pairs that some users have, but fewer than k."""
    num_items = x.shape[1]
    occurs = np.flatnonzero(np.bincount(x.indices, minlength=num_items))
    if len(occurs) ** 2 > _MOST_PAIRS:
        raise ValueError(
            f"{len(occurs)} items are too many for a table of their pairs; first keep the most popular "
            f"{int(_MOST_PAIRS**0.5)}."
        )
    rare = np.zeros((num_items, num_items), bool)
    for start, pairs in pair_supports(x):
        rare[np.ix_(occurs[start : start + BLOCK_ITEMS], occurs)] = (pairs > 0) & (pairs < k)
    np.fill_diagonal(rare, False)
    return rare


def _without_rare_pairs(interactions: Interactions, keep: np.ndarray, k: int) -> np.ndarray:
    """Items leave, the one in most rare pairs per row first, until no rare pair is left."""
    x = indicators(interactions, keep)
    rare = _rare_pairs(x, k)
    supports = np.maximum(np.bincount(x.indices, minlength=x.shape[1]), 1)
    degrees, gone = rare.sum(1), np.zeros(x.shape[1], bool)
    while degrees.any():
        worst = int(np.argmax(degrees / supports))
        degrees -= rare[worst]
        degrees[worst], gone[worst] = 0, True
        rare[worst] = rare[:, worst] = False
    return keep & ~gone[interactions.item_ids]


def _given_back(interactions: Interactions, keep: np.ndarray, k: int) -> np.ndarray:
    """Suppressed items come back in the records of k or more users where they make no rare pair, popular ones first."""
    if interactions.num_users * interactions.num_items > _MOST_CELLS:
        raise ValueError(
            f"{interactions.num_users} users and {interactions.num_items} items are too many to look at one by one; "
            'use suppression="global".'
        )
    x = indicators(interactions, keep).astype(np.uint8).toarray()
    every = sp.csc_matrix(indicators(interactions))
    left = np.bincount(interactions.item_ids[keep], minlength=interactions.num_items)
    for item in np.argsort(-interactions.item_counts, kind="stable"):
        users = every.indices[every.indptr[item] : every.indptr[item + 1]]
        if left[item] or len(users) < k:
            continue
        rows = x[users]
        stays, counts = np.ones(len(users), bool), rows.sum(0)
        while (rare := np.flatnonzero((counts > 0) & (counts < k))).size:
            leave = stays & (rows[:, rare[np.argmin(counts[rare])]] > 0)
            stays &= ~leave
            counts = counts - rows[leave].sum(0)
        if np.count_nonzero(stays) >= k:
            x[users[stays], item] = 1
    return x[interactions.user_ids, interactions.item_ids] > 0


def _without_rare_triples(interactions: Interactions, keep: np.ndarray, k: int) -> np.ndarray:
    """Items leave, those in most rare triples per row first, until no rare triple is left."""
    while True:
        x = indicators(interactions, keep)
        in_rare = np.zeros(x.shape[1])
        for item, others, triples in triple_supports(x):
            rare = (triples > 0) & (triples < k)
            in_rare[item] += np.count_nonzero(rare)
            in_rare[others] += rare.sum(0) + rare.sum(1)
        worth = in_rare / np.maximum(np.bincount(x.indices, minlength=x.shape[1]), 1)
        if not worth.any():
            return keep
        keep = keep & (worth < 0.7 * worth.max())[interactions.item_ids]  # several at a time: each pass lists all
