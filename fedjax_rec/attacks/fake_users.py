"""Fake users: profiles that an attacker invents, and a population with them in it.

Random and average profiles are as old as the field (Lam and Riedl, 2004, "Shilling Recommender Systems for Fun and
Profit"); bandwagon profiles are from Mobasher et al., 2007, "Toward Trustworthy Recommender Systems: An Analysis of
Attack Models and Algorithm Robustness".
"""

import dataclasses
import math

import numpy as np

from fedjax_rec.data.interactions import Interactions
from fedjax_rec.data.split import Split

FILLERS = ("random", "bandwagon")
POPULAR_SHARE = 0.1  # of the catalogue counts as popular for bandwagon profiles


def fake_profiles(
    fillers: str,
    *,
    target_ids: np.ndarray,
    item_counts: np.ndarray,
    num_fake: int,
    num_fillers: int,
    seed: int,
) -> np.ndarray:
    """What fake users pretend to like: the targets, and fillers that make them look like people.

    Args:
      fillers: "random" (uniform over the catalogue; the attacker knows the catalogue and nothing else) or "bandwagon"
        (half of them from the tenth of the catalogue that is most popular, so that the targets stand beside what many
        like; the attacker knows which items are popular).
      target_ids: int ``[T]``.
      item_counts: int ``[items]``, public popularity; its length is the size of the catalogue.
      num_fake: profiles.
      num_fillers: in each profile.
      seed: of the draws.

    Returns:
      int32 ``[num_fake, T + num_fillers]``, distinct within a profile, targets first.

    Raises:
      ValueError: for unknown fillers, or more of them than the catalogue has.
    """
    if fillers not in FILLERS:
        raise ValueError(f"fillers must be one of {', '.join(FILLERS)}; got {fillers!r}.")
    others = np.setdiff1d(np.arange(len(item_counts)), target_ids)
    by_popularity = others[np.argsort(-item_counts[others], kind="stable")]
    popular = by_popularity[: math.ceil(POPULAR_SHARE * len(by_popularity))]
    num_popular = num_fillers // 2 if fillers == "bandwagon" else 0
    if num_fillers > len(others) or num_popular > len(popular):
        raise ValueError(f"{num_fillers} fillers do not fit a catalogue of {len(item_counts)} items; take fewer.")
    rng = np.random.default_rng(seed)
    profiles = []
    for _ in range(num_fake):
        liked = rng.choice(popular, num_popular, replace=False)
        rest = rng.choice(np.setdiff1d(others, liked), num_fillers - num_popular, replace=False)
        profiles.append(np.concatenate([target_ids, liked, rest]))
    return np.asarray(profiles, np.int32).reshape(num_fake, -1)


def with_fake_users(split: Split, profiles: np.ndarray) -> tuple[Split, np.ndarray]:
    """A population with fake users behind the honest ones, who keep their ids and data.

    Args:
      split: of the honest users.
      profiles: int32 ``[num_fake, n]``, the training rows of the fake ones; they have no validation or test rows.

    Returns:
      The split, for `client_data` and nothing else, and bool ``[num_clients]``: who is fake.
    """
    num_fake = len(profiles)

    def longer(part: Interactions, rows: np.ndarray) -> Interactions:
        added = rows.size
        offsets = part.offsets[-1] + rows.shape[1] * np.arange(1, num_fake + 1, dtype=np.int64)
        ints = part.user_labels.dtype.kind == "i"
        first = int(part.user_labels.max(initial=0)) + 1 if ints else 0
        names = np.arange(first, first + num_fake) if ints else np.array([f"~fake {i}" for i in range(num_fake)])
        file_rows = part.file_rows.max(initial=-1) + 1 + np.arange(added)
        return dataclasses.replace(
            part,
            offsets=np.concatenate([part.offsets, offsets]),
            item_ids=np.concatenate([part.item_ids, rows.reshape(-1).astype(np.int32)]),
            file_rows=np.concatenate([part.file_rows, file_rows]),
            timestamps=None if part.timestamps is None else np.append(part.timestamps, np.zeros(added, np.int64)),
            ratings=None if part.ratings is None else np.append(part.ratings, np.full(added, _best(part), np.float32)),
            user_labels=np.concatenate([part.user_labels, names]),
            user_attributes={},
        )

    none = profiles[:, :0]
    parts = {name: longer(getattr(split, name), none) for name in ("validation", "test", "history")}
    poisoned = dataclasses.replace(split, train=longer(split.train, profiles), candidates=None, **parts)
    return poisoned, np.arange(poisoned.num_users) >= split.num_users


def _best(part: Interactions) -> float:
    """The highest rating there is: fake users love everything they name."""
    return float(np.nanmax(part.ratings)) if len(part.ratings) else 0.0
