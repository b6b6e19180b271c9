"""A next-item chain: what people took after the items that somebody took last.

With c_ij = sum over pairs of rows of one user, j later than i by d <= reach places, of decay^(d - 1),

    P_ij = (c_ij + shrinkage q_j) / (sum_j c_ij + shrinkage)    q = shares of all rows
    score_j(u) = sum over u's items i, newest first, a = 0, 1, ...:  exp(-a / recency) P_ij.

With reach = 1 and a small recency this is the Markov chain over items that is the plain member of the family of
Rendle, Freudenthaler and Schmidt-Thieme (2010), "Factorizing Personalized Markov Chains for Next-Basket
Recommendation". Rows of a session come in no strict order, which is why pairs a few places apart count as well. It is
trained by counting, so it shows at once whether the order of some histories carries anything.
"""

import math

import numpy as np
import scipy.sparse

from fedjax_rec.data.interactions import Interactions
from fedjax_rec.evaluation.scorers import Scorer
from fedjax_rec.models.dp_ease import dp_ease_scorer


def transition_counts(train: Interactions, *, reach: int = 1, decay: float = 1.0) -> scipy.sparse.csr_matrix:
    """c of the module's equation, float64 ``[items, items]``: row = the earlier item."""
    total = scipy.sparse.csr_matrix((train.num_items, train.num_items))
    for gap in range(1, reach + 1):
        together = train.user_ids[gap:] == train.user_ids[:-gap]
        before, after = train.item_ids[:-gap][together], train.item_ids[gap:][together]
        values = np.full(len(before), decay ** (gap - 1))
        total = total + scipy.sparse.csr_matrix((values, (before, after)), shape=total.shape)
    return total


def markov_weights(train: Interactions, *, shrinkage: float = 20.0, reach: int = 3, decay: float = 0.7) -> np.ndarray:
    """Transition probabilities P, float32 ``[items, items]``: row i = what follows item i.

    Args:
      train: rows in time order.
      shrinkage: in rows; how many rows of popularity stand beside those that followed an item, > 0.
      reach: places, >= 1: how much later than i an item may come and still count.
      decay: of a pair's weight for each place more, in (0, 1].

    Raises:
      ValueError: for numbers out of range.
    """
    if not (shrinkage > 0 and math.isfinite(shrinkage)) or reach < 1 or not 0 < decay <= 1:
        raise ValueError(
            f"markov_weights needs shrinkage > 0, reach >= 1 and decay in (0, 1]; got {shrinkage}, {reach}, {decay}."
        )
    counts = transition_counts(train, reach=reach, decay=decay).toarray()
    popularity = train.item_counts / max(train.num_interactions, 1)
    followed = counts.sum(axis=1, keepdims=True)
    return ((counts + shrinkage * popularity[None, :]) / (followed + shrinkage)).astype(np.float32)


def markov_scorer(
    train: Interactions,
    *,
    history: Interactions | None = None,
    shrinkage: float = 20.0,
    reach: int = 3,
    decay: float = 0.7,
    recency: float = 10.0,
) -> Scorer:
    """The chain trained on ``train``, scoring what may follow the newest items that users show in ``history``.

    Args:
      train: rows in time order.
      history: what each user shows, in time order; None = ``train``.
      shrinkage: as in `markov_weights`, and so ``reach`` and ``decay``.
      recency: in items, > 0: the item that a user met a items before its last one weighs exp(-a / recency).
    """
    weights = markov_weights(train, shrinkage=shrinkage, reach=reach, decay=decay)
    shown = train if history is None else history
    return dp_ease_scorer(weights, np.arange(train.num_items), shown, recency=recency)
