"""Whose record is this? Narayanan and Shmatikov (2008), "Robust De-anonymization of Large Sparse Datasets".

The attacker knows a few items of a person, perhaps about when and how she rated them, and partly wrongly. Each record
v of the release gets the paper's score (its "Scoreboard-RH"), over the known items i that v has:

    score(v) = sum_i w_i (exp(-|rating_i - rating_vi| / 1.5) + exp(-|date_i - date_vi| / 30 days)),

w_i = 1 / log(support of i among the records), so that rare items count more. The best record is the guess. It is called
a match only if it stands out: (best - second) / standard deviation of all scores >= 1.5.

Not in the paper: a long record has much of anything and so a high score. Divided by a power of the record's length the
score finds more; with 1/2 it is a cosine up to what all records share. Who measures risk should try both.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fedjax_rec.attacks.uniqueness import check_truth, draw_rows, draw_targets, item_places, mean_and_error
from fedjax_rec.data.interactions import Interactions

RATING_SCALE, DAY_SCALE, ECCENTRICITY = 1.5, 30.0, 1.5  # of the paper's section on the Netflix data
KNOWN = ("items", "ratings", "dates")
_DAY = 86_400
_ENTRIES_AT_A_TIME = 1 << 22
_TIE = 1e-9  # of the best score: what summing in another order can change


class Knowledge(NamedTuple):
    """What the attacker knows of each target, m items a target.

    Attributes:
      item_ids: int64 ``[targets, m]`` in the release's catalogue, -1 = not in it.
      ratings: float64 ``[targets, m]``, NaN = unknown; or None.
      days: float64 ``[targets, m]``, NaN = unknown; or None.
    """

    item_ids: np.ndarray
    ratings: np.ndarray | None
    days: np.ndarray | None


@dataclass(frozen=True)
class Reidentification:
    """How often the attack names the right record; standard errors are over targets.

    Attributes:
      top1: share of targets whose record has the best score; equal scores share in expectation, and so do the persons
        that one record stands for.
      top1_error: its standard error.
      matched: share of targets with a record that stands out.
      matched_error: its standard error.
      precision: share of these matches that are right; NaN if there is none.
      precision_error: its standard error.
      entropy: bits that the attacker is short of a name, mean over targets, under the paper's p(v) ~ exp(score / std).
      entropy_error: its standard error.
      num_targets: users attacked.
      num_records: records of the release that have an item.
    """

    top1: float
    top1_error: float
    matched: float
    matched_error: float
    precision: float
    precision_error: float
    entropy: float
    entropy_error: float
    num_targets: int
    num_records: int


def reidentify(
    original: Interactions,
    released: Interactions,
    truth: np.ndarray | None = None,
    *,
    num_known: int = 8,
    known: Sequence[str] = KNOWN,
    wrong_share: float = 0.0,
    rating_error: float = 0.0,
    date_error_days: float = 0.0,
    num_targets: int | None = 500,
    eccentricity: float = ECCENTRICITY,
    length_power: float = 0.0,
    view: Callable[[Interactions], Interactions] | None = None,
    seed: int = 0,
) -> Reidentification:
    """Attacks random users with random items of theirs.

    Ratings and dates help only where the release has them; a release without both is attacked as bare item sets, where
    each known item that a record has counts w_i.

    Args:
      original: the truth, which the attacker knows a little of.
      released: the records it searches; items are matched by their labels.
      truth: int ``[users]``, the record of each original user, -1 = none; None = the same number. Several users may
        share a record. Only for counting hits.
      num_known: items known of each target; targets have at least so many.
      known: "items", and "ratings" or "dates" or both.
      wrong_share: share of the known items that are wrong: others, drawn by popularity, that the target never touched.
      rating_error: known ratings are off by so much, up or down.
      date_error_days: known dates are off by so many days, before or after.
      num_targets: random users to attack; None = all.
      eccentricity: what "stands out" means.
      length_power: scores are divided by the record's length to this power; 0 is the paper's score.
      view: makes the attacker's knowledge, with its errors, as coarse as the release is: it knows how the release was
        made. Changes times and ratings only; None compares as they are.
      seed: of targets and knowledge.

    Raises:
      ValueError: for settings outside their range, or when nobody has so many items.
    """
    unknown = sorted({*known} - {*KNOWN})
    if unknown or "items" not in known:
        raise ValueError(f'known is "items", and "ratings" or "dates" or both; got {tuple(known)}.')
    if num_known < 1 or not 0 <= wrong_share <= 1 or min(rating_error, date_error_days) < 0:
        raise ValueError(
            f"The attack needs num_known from 1 on, wrong_share from 0 to 1 and errors from 0 on; got {num_known}, "
            f"{wrong_share:g}, {rating_error:g} and {date_error_days:g}."
        )
    truth, rng = check_truth(original, released, truth), np.random.default_rng(seed)
    source = _with_errors(original, rating_error, date_error_days, np.random.default_rng([seed, 1]))
    source = source if view is None else view(source)
    targets = draw_targets(source, num_known, num_targets, rng)
    if not len(targets):
        raise ValueError(f"No user of {original.name} has {num_known} items; ask for fewer with num_known.")
    rows = draw_rows(source, targets, num_known, rng)
    items = _with_wrong_items(original, targets, source.item_ids[rows], wrong_share, rng)
    ratings = rating_column(source) if "ratings" in known else None
    days = day_column(source) if "dates" in known else None
    knowledge = Knowledge(
        item_places(original, released)[items],
        None if ratings is None else ratings[rows],
        None if days is None else days[rows],
    )
    persons = np.maximum(np.bincount(truth[truth >= 0], minlength=released.num_users), 1)
    records = np.flatnonzero(released.counts_per_user)  # an empty record is not in the file
    largest = max(released.num_users, num_known * int(released.item_counts.max(initial=1)))
    lengths = np.maximum(released.counts_per_user, 1)[None, :] ** length_power
    step, judged = max(1, _ENTRIES_AT_A_TIME // largest), []
    for start in range(0, len(targets), step):
        some = slice(start, start + step)
        part = Knowledge(*(None if values is None else values[some] for values in knowledge))
        judged.append(_judge(record_scores(part, released) / lengths, records, truth[targets[some]], persons))
    hit, margin, entropy = (np.concatenate(parts) for parts in zip(*judged, strict=True))
    stands_out = margin >= eccentricity
    return Reidentification(
        *mean_and_error(hit),
        *mean_and_error(stands_out),
        *mean_and_error(hit[stands_out]),
        *mean_and_error(entropy),
        num_targets=len(targets),
        num_records=len(records),
    )


def record_scores(knowledge: Knowledge, released: Interactions) -> np.ndarray:
    """The score of every record for every target, float64 ``[targets, records]``.

    A known item that a record has with an unknown rating or date adds nothing for it. Weights read the support of at
    least 2, as 1 / log(1) has no value.
    """
    num_targets, m = knowledge.item_ids.shape
    order = np.argsort(released.item_ids, kind="stable")  # rows by item
    support = released.item_counts
    starts = np.cumsum(support) - support
    real = knowledge.item_ids.ravel() >= 0
    asked = knowledge.item_ids.ravel()[real]
    lengths = support[asked]
    pair = np.repeat(np.arange(len(asked)), lengths)  # every row of every known item
    place = np.arange(len(pair)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    rows = order[starts[asked][pair] + place]
    likeness, compared = np.zeros(len(pair)), 0
    for ours, theirs, scale in (
        (knowledge.ratings, rating_column(released), RATING_SCALE),
        (knowledge.days, day_column(released), DAY_SCALE),
    ):
        if ours is not None and theirs is not None:
            gap = np.abs(ours.ravel()[real][pair] - theirs[rows])
            likeness += np.where(np.isnan(gap), 0.0, np.exp(-gap / scale))
            compared += 1
    if not compared:
        likeness[:] = 1.0
    weights = (1 / np.log(np.maximum(support, 2)))[asked][pair]
    target = np.repeat(np.arange(num_targets), m)[real][pair]
    cells = target * np.int64(released.num_users) + released.user_ids[rows]
    scores = np.bincount(cells, weights * likeness, minlength=num_targets * released.num_users)
    return scores.reshape(num_targets, released.num_users)


def rating_column(interactions: Interactions) -> np.ndarray | None:
    """Ratings in float64, or None if there is none."""
    ratings = interactions.ratings
    return None if ratings is None or np.isnan(ratings).all() else ratings.astype(np.float64)


def day_column(interactions: Interactions) -> np.ndarray | None:
    """Dates in days, NaN = unknown, or None if there is none."""
    times = interactions.timestamps
    return None if times is None or not times.any() else np.where(times == 0, np.nan, times / _DAY)


def _judge(
    scores: np.ndarray, records: np.ndarray, mine: np.ndarray, persons: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each target: its expected share of the first place, by how much the first stands out, and entropy in bits."""
    column = np.full(scores.shape[1] + 1, -1)
    column[records] = np.arange(len(records))
    scores, place = scores[:, records], column[mine]  # a target without a record reads the last column, -1
    best = scores.max(axis=1)
    first = scores >= (best * (1 - _TIE))[:, None]
    rows = np.arange(len(scores))
    hit = np.where(place >= 0, first[rows, np.maximum(place, 0)] / first.sum(axis=1) / persons[np.maximum(mine, 0)], 0)
    std = scores.std(axis=1)
    flat = std <= _TIE * np.maximum(best, _TIE)
    second = np.partition(scores, -2, axis=1)[:, -2] if len(records) > 1 else np.zeros(len(scores))
    safe = np.where(flat, 1.0, std)
    margin = np.where(flat, 0.0, (best - second) / safe)
    odds = np.where(flat[:, None], 1.0, np.exp((scores - best[:, None]) / safe[:, None]))
    odds /= odds.sum(axis=1, keepdims=True)
    entropy = -np.sum(odds * np.log2(np.maximum(odds, 1e-300)), axis=1)
    return hit, margin, entropy


def _with_wrong_items(
    original: Interactions, targets: np.ndarray, items: np.ndarray, wrong_share: float, rng: np.random.Generator
) -> np.ndarray:
    """The known items with the first so many replaced; they are in random order already."""
    num_wrong, items = round(wrong_share * items.shape[1]), items.copy()
    for row, user in enumerate(targets if num_wrong else ()):
        odds = original.item_counts.astype(np.float64)
        odds[original.items_of(user)] = 0
        if np.count_nonzero(odds) < num_wrong:
            raise ValueError(
                f"User {original.user_labels[user]} touched all but {np.count_nonzero(odds)} items, so there are no "
                f"{num_wrong} others to be wrong about; lower wrong_share."
            )
        items[row, :num_wrong] = rng.choice(len(odds), num_wrong, replace=False, p=odds / odds.sum())
    return items


def _with_errors(original: Interactions, rating: float, days: float, rng: np.random.Generator) -> Interactions:
    """Every rating and every date off by so much, up or down; ratings turn where they would leave the range."""
    ratings, times = original.ratings, original.timestamps
    if ratings is not None and rating and not np.isnan(ratings).all():
        signs = rng.choice((-1.0, 1.0), len(ratings))
        moved = ratings + signs * rating
        outside = (moved < np.nanmin(ratings)) | (moved > np.nanmax(ratings))
        ratings = (ratings + np.where(outside, -signs, signs) * rating).astype(np.float32)
    if times is not None and days:
        moved = times + rng.choice((-1, 1), len(times)) * round(days * _DAY)
        times = np.where(times == 0, 0, np.maximum(moved, 1))
    return dataclasses.replace(original, ratings=ratings, timestamps=times)
