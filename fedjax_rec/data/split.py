"""Train, validation and test rows, with everything that decides them written down.

Each rule here is a pure function of the data and its named arguments: no file order (unless a tie rule asks for it),
no generator state, no platform.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from fedjax_rec.data.align import align
from fedjax_rec.data.interactions import Interactions
from fedjax_rec.data.ties import label_hash, mix64, pair_hash, rank_from_latest, seed_salt, tie_key


@dataclass(frozen=True, eq=False)
class Split:
    """Rows to train on, to select with, and to report on; all parts share user and item id spaces.

    Attributes:
      train: rows that clients train on; users may have zero rows.
      validation: held-out rows for choosing among rounds and settings.
      test: held-out rows for the result.
      history: rows that a held-out client shows at test time (strong generalisation); else empty.
      rule: name of the function that made it, e.g. "leave_one_out".
      tie_rule: what orders rows with equal timestamps ("hash", "file_first", "file_last", "item_smallest",
        "item_largest"), or None where no tie can matter.
      seed: of the hash.
      candidates: int32 `[num_users, C]`, published negatives for each user's test item, padded with `num_items`.
      repairs: counted oddities of the split, e.g. {"users with fewer than 3 interactions kept in train": 2}.

    Raises:
      ValueError: if the parts do not share their id spaces, or `candidates` has another shape or dtype.
    """

    train: Interactions
    validation: Interactions
    test: Interactions
    history: Interactions
    rule: str
    tie_rule: str | None = None
    seed: int = 0
    candidates: np.ndarray | None = None
    repairs: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        users, items = self.train.num_users, self.train.num_items
        for key in ("validation", "test", "history"):
            part = getattr(self, key)
            if (part.num_users, part.num_items) != (users, items):
                raise ValueError(
                    f"Split.{key} has {part.num_users} users and {part.num_items} items, and train has {users} and "
                    f"{items}; they must share id spaces: cut them with Interactions.take or predefined_split."
                )
        if self.candidates is not None and (
            self.candidates.dtype != np.int32 or self.candidates.ndim != 2 or len(self.candidates) != users
        ):
            raise ValueError(
                f"Split.candidates must be int32 [{users}, C], and is {self.candidates.dtype} "
                f"{list(self.candidates.shape)}; use with_candidates."
            )

    @property
    def num_users(self) -> int:
        """Size of the user id space."""
        return self.train.num_users

    @property
    def num_items(self) -> int:
        """Size of the catalogue."""
        return self.train.num_items

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 (hex) over the rows of every part and the candidates: equal exactly when results are comparable."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation, self.test, self.history):
            digest.update(part.fingerprint.encode())
        if self.candidates is not None:
            digest.update(str(self.candidates.shape).encode() + self.candidates.astype("<i4").tobytes())
        return digest.hexdigest()


def leave_one_out(interactions: Interactions, *, tie_rule: str = "hash", seed: int = 0) -> Split:
    """Each user's latest row to test, the second latest to validation, the rest to train.

    Both places are decided by one total order: timestamp, then `tie_rule` (see `ties.tie_key`). Users with fewer than
    3 rows keep all of them in train and are counted in `repairs`. Without timestamps every row is tied.

    Raises:
      ValueError: for an unknown tie rule.
    """
    rank = rank_from_latest(interactions, tie_key(interactions, tie_rule=tie_rule, seed=seed))
    counts = interactions.counts_per_user
    long_enough = (counts >= 3)[interactions.user_ids]
    part = np.where(long_enough & (rank == 0), 2, np.where(long_enough & (rank == 1), 1, 0))
    repairs = {"users with fewer than 3 interactions kept in train": int(np.count_nonzero((counts > 0) & (counts < 3)))}
    return _cut(interactions, part, rule="leave_one_out", tie_rule=tie_rule, seed=seed, repairs=repairs)


def leave_given_out(
    interactions: Interactions, test_items: np.ndarray, *, tie_rule: str = "hash", seed: int = 0
) -> Split:
    """Test items named by a published file; the latest of each user's other rows to validation, the rest to train.

    Args:
      interactions: the rows.
      test_items: int `[num_users]`, an item id of each user's own rows, or `num_items` = no test item for this user.
      tie_rule: orders rows with equal timestamps for the choice of the validation row, see `ties.tie_key`.
      seed: of the hash.

    Raises:
      ValueError: if a test item is none of its user's items.
    """
    if test_items.shape != (interactions.num_users,):
        raise ValueError(f"test_items must have shape [{interactions.num_users}], and has {list(test_items.shape)}.")
    is_test = interactions.item_ids == test_items[interactions.user_ids]
    found = np.bincount(interactions.user_ids[is_test], minlength=interactions.num_users)
    missing = np.flatnonzero((test_items < interactions.num_items) & (found == 0))
    if len(missing):
        user = missing[0]
        raise ValueError(
            f"Test item id {test_items[user]} of user {interactions.user_labels[user]} is none of that user's "
            f"{interactions.counts_per_user[user]} items ({len(missing)} users in all); the file belongs to other data."
        )
    others = interactions.take(~is_test)
    rank = rank_from_latest(others, tie_key(others, tie_rule=tie_rule, seed=seed))
    part = np.zeros(interactions.num_interactions, np.int8)
    part[is_test] = 2
    long_enough = (interactions.counts_per_user >= 3)[others.user_ids] & (found > 0)[others.user_ids]
    part[np.flatnonzero(~is_test)[long_enough & (rank == 0)]] = 1
    return _cut(interactions, part, rule="leave_given_out", tie_rule=tie_rule, seed=seed, repairs={})


def ratio_split(
    interactions: Interactions,
    *,
    test_ratio: float = 0.2,
    validation_ratio: float = 0.1,
    by: str = "time",
    tie_rule: str = "hash",
    seed: int = 0,
) -> Split:
    """A share of each user's rows to test and validation: the latest ones, or random ones.

    A user with `n` rows gives `floor(n * test_ratio)` to test and `floor(n * validation_ratio)` to validation.

    Args:
      interactions: the rows.
      test_ratio: share of each user's rows in test.
      validation_ratio: share in validation; the two must leave something to train.
      by: "time" = the latest rows are test, those before them validation; "random" = a seeded hash of (user, item).
      tie_rule: orders rows with equal timestamps when `by` is "time".
      seed: of the hash.

    Raises:
      ValueError: for ratios outside [0, 1), a sum of 1 or more, or an unknown order or tie rule.
    """
    _check_ratio("test_ratio", test_ratio)
    _check_ratio("validation_ratio", validation_ratio)
    if test_ratio + validation_ratio >= 1:
        raise ValueError(
            f"test_ratio {test_ratio:g} + validation_ratio {validation_ratio:g} leave nothing to train; "
            "choose ratios with a sum below 1."
        )
    rank, used_tie_rule = _rank_by(interactions, by=by, tie_rule=tie_rule, seed=seed)
    counts = interactions.counts_per_user
    num_test = _share(counts, test_ratio)[interactions.user_ids]
    num_validation = _share(counts, validation_ratio)[interactions.user_ids]
    part = np.where(rank < num_test, 2, np.where(rank < num_test + num_validation, 1, 0))
    without = int(np.count_nonzero((counts > 0) & (_share(counts, test_ratio) == 0))) if test_ratio else 0
    repairs = {"users too short for a test row": without}
    return _cut(interactions, part, rule=f"ratio_split by {by}", tie_rule=used_tie_rule, seed=seed, repairs=repairs)


def global_temporal(interactions: Interactions, *, validation_from: int, test_from: int) -> Split:
    """One calendar for all users: rows before `validation_from` train, those from `test_from` on test.

    No tie can matter. Rows with an unknown timestamp train. Users and items that only occur after the cut stay in, and
    are counted in `repairs`: what a model does with them is part of the question this split asks.

    Args:
      interactions: the rows, with timestamps.
      validation_from: first second of validation, e.g. `int(np.quantile(interactions.timestamps, 0.8))`.
      test_from: first second of test.

    Raises:
      ValueError: without timestamps, or when the cuts are not in order.
    """
    times = interactions.timestamps
    if times is None:
        raise ValueError(f"{interactions.name} has no timestamps; global_temporal needs them, ratio_split does not.")
    if validation_from > test_from:
        raise ValueError(f"validation_from {validation_from} is after test_from {test_from}; swap them.")
    part = np.where(times >= test_from, 2, np.where(times >= validation_from, 1, 0))
    if not np.any(part == 0) or not np.any(part == 2):
        raise ValueError(
            f"The cuts {validation_from} and {test_from} leave train or test empty; timestamps of {interactions.name} "
            f"span {times.min()}..{times.max()}."
        )
    seen_users = np.zeros(interactions.num_users, bool)
    seen_items = np.zeros(interactions.num_items, bool)
    seen_users[interactions.user_ids[part == 0]] = True
    seen_items[interactions.item_ids[part == 0]] = True
    repairs = {
        "users unseen in train": int(np.count_nonzero(~seen_users & (interactions.counts_per_user > 0))),
        "items unseen in train": int(np.count_nonzero(~seen_items & (interactions.item_counts > 0))),
    }
    return _cut(interactions, part, rule="global_temporal", tie_rule=None, seed=0, repairs=repairs)


def strong_generalization(
    interactions: Interactions,
    *,
    num_validation_users: int,
    num_test_users: int,
    fold_in_ratio: float = 0.8,
    by: str = "random",
    tie_rule: str = "hash",
    seed: int = 0,
) -> Split:
    """Whole clients held out: train has no row of them; at test time they show part of their rows.

    The protocol of Liang, Krishnan, Hoffman, Jebara (2018), "Variational Autoencoders for Collaborative Filtering".
    Held-out clients are those with the smallest seeded hash of their label. Each shows `floor(n * fold_in_ratio)` of
    its rows (at least one) in `history` and is asked for the rest, in `validation` or `test`.

    Args:
      interactions: the rows.
      num_validation_users: clients held out for validation.
      num_test_users: clients held out for test.
      fold_in_ratio: share of a held-out client's rows that is shown.
      by: "random" = shown rows are chosen by a seeded hash; "time" = the latest rows are asked for.
      tie_rule: orders rows with equal timestamps when `by` is "time".
      seed: of the hashes.

    Raises:
      ValueError: when no client is left to train, or for a fold-in ratio outside (0, 1).
    """
    counts = interactions.counts_per_user
    usable = np.flatnonzero(counts >= 2)
    held_out = num_validation_users + num_test_users
    if num_validation_users < 0 or num_test_users < 1 or held_out >= len(usable):
        raise ValueError(
            f"Cannot hold out {num_validation_users} + {num_test_users} clients of the {len(usable)} with two or more "
            f"rows in {interactions.name}; hold out at least one for test, and leave at least one to train."
        )
    if not 0 < fold_in_ratio < 1:
        raise ValueError(f"fold_in_ratio must lie between 0 and 1, and is {fold_in_ratio:g}.")
    shuffled = usable[np.argsort(mix64(label_hash(interactions.user_labels[usable]) ^ seed_salt(seed)))]
    role = np.zeros(interactions.num_users, np.int8)
    role[shuffled[:num_test_users]] = 2
    role[shuffled[num_test_users:held_out]] = 1
    rank, used_tie_rule = _rank_by(interactions, by=by, tie_rule=tie_rule, seed=seed)
    num_asked = counts - np.clip(_share(counts, fold_in_ratio), 1, np.maximum(counts - 1, 1))
    part = role[interactions.user_ids]
    shown = (part > 0) & (rank >= num_asked[interactions.user_ids])
    part[shown] = 3
    repairs = {"users with fewer than 2 interactions never held out": int(np.count_nonzero(counts == 1))}
    rule = f"strong_generalization by {by}"
    return _cut(interactions, part, rule=rule, tie_rule=used_tie_rule, seed=seed, repairs=repairs)


def shown_at_test(split: Split) -> Interactions:
    """What each user has done before the test row: train, history and validation, in this order.

    A recommender of the next item reads it at test time, as papers on sequences do: the row before the test row is the
    best hint at it, and no parameter is fitted to it.
    """
    parts = [split.train, split.history, split.validation]
    users = np.concatenate([part.user_ids for part in parts])
    order = np.argsort(users, kind="stable")

    def joined(key):
        values = [getattr(part, key) for part in parts]
        return None if values[0] is None else np.concatenate(values)[order]

    counts = sum(part.counts_per_user for part in parts)
    columns = {key: joined(key) for key in ("item_ids", "file_rows", "timestamps", "ratings")}
    return dataclasses.replace(split.train, offsets=np.concatenate([[0], np.cumsum(counts)]), **columns)


def with_candidates(split: Split, candidates: np.ndarray) -> Split:
    """The same split with published negatives for each user's test item.

    A user's own test items among its negatives are dropped and counted: the widely used MovieLens 1M file lists the
    positive among its own negatives for 156 users.

    Args:
      split: the split.
      candidates: int `[num_users, C]`, item ids, padded with `num_items`.

    Raises:
      ValueError: for another shape, or ids outside `0..num_items`.
    """
    candidates = np.asarray(candidates)
    users, items = split.num_users, split.num_items
    if candidates.ndim != 2 or len(candidates) != users or candidates.dtype.kind not in "iu":
        raise ValueError(
            f"candidates must be integers [{users}, C], and are {candidates.dtype} {list(candidates.shape)}."
        )
    if candidates.size and (candidates.min() < 0 or candidates.max() > items):
        raise ValueError(
            f"candidates must lie in 0..{items} ({items} = padding), and span {candidates.min()}..{candidates.max()}."
        )
    stride = np.int64(items + 1)
    positives = split.test.user_ids * stride + split.test.item_ids
    own = np.isin(np.arange(users)[:, None] * stride + candidates, positives)
    padded = np.where(own, items, candidates).astype(np.int32)
    padded = np.take_along_axis(padded, np.argsort(padded == items, axis=1, kind="stable"), axis=1)
    repairs = {
        **split.repairs,
        "users with their positive among their candidates, dropped there": int(own.any(axis=1).sum()),
    }
    return dataclasses.replace(split, candidates=padded, repairs=_counted(repairs))


def predefined_split(train: Interactions, test: Interactions, *, validation: Interactions | None = None) -> Split:
    """A split that somebody else made, e.g. `u1.base` and `u1.test`, brought onto one id space.

    Titles, genres and user attributes stay only where every part has them. Pairs of test (or validation) that also
    occur in train are dropped there and counted.

    Args:
      train: rows to train on, with their own ids.
      test: rows to test on, with their own ids.
      validation: rows to select with; None = empty.
    """
    train, test, validation = align([train, test, _none_of(train) if validation is None else validation])
    stride = np.int64(max(train.num_items, 1))
    in_train = train.user_ids * stride + train.item_ids
    repairs = {}
    kept = {}
    for key, part in (("validation", validation), ("test", test)):
        again = np.isin(part.user_ids * stride + part.item_ids, in_train)
        repairs[f"{key} rows that also occur in train, dropped"] = int(again.sum())
        kept[key] = part.take(~again)
    return Split(train=train, **kept, history=_none_of(train), rule="predefined_split", repairs=_counted(repairs))


def _cut(interactions: Interactions, part: np.ndarray, *, rule: str, tie_rule: str | None, seed: int, repairs) -> Split:
    """Rows by `part` `[num_interactions]`: 0 train, 1 validation, 2 test, 3 history."""
    train, validation, test, history = (interactions.take(part == code) for code in range(4))
    return Split(train, validation, test, history, rule=rule, tie_rule=tie_rule, seed=seed, repairs=_counted(repairs))


def _rank_by(interactions: Interactions, *, by: str, tie_rule: str, seed: int) -> tuple[np.ndarray, str | None]:
    """Place from the end of each row in its user's order, and the tie rule that was used."""
    if by == "time":
        return rank_from_latest(interactions, tie_key(interactions, tie_rule=tie_rule, seed=seed)), tie_rule
    if by == "random":
        return rank_from_latest(interactions, pair_hash(interactions, seed=seed), within_time=False), None
    raise ValueError(f'Unknown order by={by!r}; choose "time" or "random".')


def _share(counts: np.ndarray, ratio: float) -> np.ndarray:
    # 0.29 * 100 is 28.999999999999996 in floating point, and the reader means 29.
    return np.floor(counts * ratio + 1e-9).astype(np.int64)


def _none_of(interactions: Interactions) -> Interactions:
    return interactions.take(np.zeros(interactions.num_interactions, bool))


def _counted(repairs: Mapping[str, int]) -> dict[str, int]:
    return {what: count for what, count in repairs.items() if count}


def _check_ratio(key: str, ratio: float) -> None:
    if not 0 <= ratio < 1:
        raise ValueError(f"{key} must lie in [0, 1), and is {ratio:g}.")
