"""What an attack is after, and how far it got: target items, their exposure to honest users, and the damage done."""

from collections.abc import Sequence

import numpy as np

from fedjax_rec.data.split import Split
from fedjax_rec.evaluation.exact import evaluate
from fedjax_rec.evaluation.heldout import Cases
from fedjax_rec.evaluation.scorers import Scorer


def choose_targets(
    item_counts: np.ndarray, *, num_targets: int, seed: int, most: int = 5, fewest: int = 1
) -> np.ndarray:
    """Cold items, int32 ``[num_targets]``: drawn from those that ``fewest`` to ``most`` users have in train.

    Args:
      item_counts: int ``[items]``, users of each item in train.
      num_targets: how many.
      seed: of the draw.
      most, fewest: what counts as cold.

    Raises:
      ValueError: if there are not as many such items.
    """
    cold = np.flatnonzero((item_counts >= fewest) & (item_counts <= most))
    if len(cold) < num_targets:
        raise ValueError(
            f"{len(cold)} items have {fewest} to {most} interactions, and {num_targets} targets are wanted; raise most."
        )
    return np.random.default_rng(seed).choice(cold, num_targets, replace=False).astype(np.int32)


def target_cases(split: Split, target_ids: np.ndarray) -> Cases:
    """Every honest user who has not met every target, asked for those that it has not met.

    Masked are a user's items in train, validation and history, as for its own test item.

    Args:
      split: of the honest users only.
      target_ids: int ``[T]``, distinct.

    Raises:
      ValueError: if every user has met every target.
    """
    stride = np.int64(split.num_items)
    masked = (split.train, split.validation, split.history)
    seen = np.unique(np.concatenate([part.user_ids * stride + part.item_ids for part in masked]))
    users = np.flatnonzero(split.train.counts_per_user + split.history.counts_per_user)
    targets = np.sort(np.asarray(target_ids, np.int64))
    unmet = ~np.isin(users[:, None] * stride + targets, seen)
    users, unmet = users[unmet.any(1)], unmet[unmet.any(1)]
    if not len(users):
        raise ValueError(f"Every user has met every target ({targets.tolist()}); choose colder ones.")
    positives = np.sort(np.where(unmet, targets, split.num_items), axis=1)
    seen = seen[np.isin(seen // stride, users)]
    num_seen = np.bincount(seen // stride, minlength=split.num_users)[users]
    return Cases(
        user_ids=users.astype(np.int32),
        positives=positives.astype(np.int32),
        seen_offsets=np.concatenate([[0], np.cumsum(num_seen)]).astype(np.int64),
        seen_item_ids=(seen % stride).astype(np.int32),
        candidates=None,
        item_counts=split.train.item_counts,
        num_train_users=int(np.count_nonzero(split.train.counts_per_user)),
        num_items=split.num_items,
        num_users_without_positives=split.num_users - len(users),
        part="test",
        fingerprint=split.fingerprint,
    )


def exposure(scorer: Scorer, asked: Cases, *, ks: Sequence[int] = (10, 20)) -> dict[str, float]:
    """How often targets are recommended to users who have not met them.

    With T_u the targets that user u has not met, and L_u(k) the k best items that it has not met,

        er@k = mean over u of |T_u and L_u(k)| / |T_u|,    target_ndcg@k = mean over u of ndcg@k of T_u in L_u.

    er is the exposure ratio of Zhang et al., 2022, "PipAttack: Poisoning Federated Recommender Systems for Manipulating
    Item Promotion". Equal scores count in expectation, so a model that scores all items alike exposes k/items.

    Args:
      scorer: for honest users' ids.
      asked: of `target_cases`.
      ks: cut-offs.

    Returns:
      "er@k" and "target_ndcg@k" for each k, in [0, 1].
    """
    values = evaluate(scorer, asked, ks=ks).values
    return {
        name: values[source]
        for k in ks
        for name, source in ((f"er@{k}", f"recall@{k}"), (f"target_ndcg@{k}", f"ndcg@{k}"))
    }


def damage(clean: float, attacked: float) -> float:
    """The share of a metric that is lost against the run without attack or defence; negative if it rose."""
    return 1.0 - attacked / clean
