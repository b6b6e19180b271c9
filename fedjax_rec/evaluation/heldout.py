"""What is asked of whom: held-out positives of each user, and the items that may not be recommended."""

from dataclasses import dataclass

import numpy as np

from fedjax_rec.data.interactions import Interactions
from fedjax_rec.data.split import Split


@dataclass(frozen=True, eq=False)
class Cases:
    """One case for each user that has a held-out positive.

    Attributes:
      user_ids: int32 `[cases]`, ascending.
      positives: int32 `[cases, P]`, held-out items, padded with `num_items` on the right.
      seen_offsets: int64 `[cases + 1]`, where each case's masked items start in `seen_item_ids`.
      seen_item_ids: int32 `[num_seen]`, items that are never candidates, unique and ascending within a case.
      candidates: int32 `[cases, C]`, published negatives, padded with `num_items`, or None.
      item_counts: int64 `[items]`, users of each item in train: novelty reads it.
      num_train_users: users with a row in train.
      num_items: size of the catalogue.
      num_users_without_positives: users of train, validation, test or history that are in no case.
      part: "test" or "validation".
      fingerprint: of the split.
    """

    user_ids: np.ndarray
    positives: np.ndarray
    seen_offsets: np.ndarray
    seen_item_ids: np.ndarray
    candidates: np.ndarray | None
    item_counts: np.ndarray
    num_train_users: int
    num_items: int
    num_users_without_positives: int
    part: str
    fingerprint: str

    @property
    def num_cases(self) -> int:
        """Users that are evaluated."""
        return len(self.user_ids)


def cases(split: Split, part: str = "test", *, mask_validation: bool = True) -> Cases:
    """The cases of one part of a split.

    Masked are the user's items in train and history, and at test time also those in validation: a candidate is an
    item that could truly be recommended at that moment. Users without positives have no case and are counted.

    Args:
      split: the split.
      part: "test" or "validation".
      mask_validation: at test time, also mask the user's validation items.

    Raises:
      ValueError: for another part; when nobody has a positive; when a positive is also masked, because then no model
        could ever rank it.
    """
    if part not in ("test", "validation"):
        raise ValueError(f'Unknown part {part!r}; choose "test" or "validation".')
    asked = split.test if part == "test" else split.validation
    masked = [split.train, split.history]
    if part == "test" and mask_validation:
        masked.append(split.validation)
    user_ids = np.flatnonzero(asked.counts_per_user).astype(np.int32)
    if not len(user_ids):
        raise ValueError(f"No user has a {part} item in this split ({split.rule}); choose a rule that holds items out.")
    stride = np.int64(split.num_items)
    seen = np.unique(np.concatenate([rows.user_ids * stride + rows.item_ids for rows in masked]))
    positive = asked.user_ids * stride + asked.item_ids
    again = np.isin(positive, seen)
    if again.any():
        user, item = asked.user_ids[again][0], asked.item_ids[again][0]
        raise ValueError(
            f"Item {split.train.item_labels[item]} of user {split.train.user_labels[user]} is a {part} positive and "
            f"also in train, history or validation ({again.sum()} such rows): it is masked and could never be ranked. "
            "Drop repeated user-item rows before splitting."
        )
    seen = seen[np.isin(seen // stride, user_ids)]
    num_seen = np.bincount(seen // stride, minlength=split.num_users)[user_ids]
    known = sum(rows.counts_per_user for rows in (split.train, split.validation, split.test, split.history)) > 0
    return Cases(
        user_ids=user_ids,
        positives=_padded_rows(asked, user_ids),
        seen_offsets=np.concatenate([[0], np.cumsum(num_seen)]).astype(np.int64),
        seen_item_ids=(seen % stride).astype(np.int32),
        candidates=split.candidates[user_ids] if part == "test" and split.candidates is not None else None,
        item_counts=split.train.item_counts,
        num_train_users=int(np.count_nonzero(split.train.counts_per_user)),
        num_items=split.num_items,
        num_users_without_positives=int(np.count_nonzero(known)) - len(user_ids),
        part=part,
        fingerprint=split.fingerprint,
    )


def _padded_rows(interactions: Interactions, user_ids: np.ndarray) -> np.ndarray:
    counts = interactions.counts_per_user[user_ids]
    padded = np.full((len(user_ids), counts.max()), interactions.num_items, np.int32)
    padded[np.arange(counts.max()) < counts[:, None]] = interactions.item_ids  # rows of users without positives: none
    return padded
