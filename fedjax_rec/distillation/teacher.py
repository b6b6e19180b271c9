"""What a teacher is: scores of all items after a history, from any recommender, and what it cost to make."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_rec.distillation.losses import NEVER
from fedjax_rec.models.base import Shared
from fedjax_rec.models.mult_vae import decode, encode
from fedjax_rec.models.sequence import SequenceModel
from fedjax_rec.privacy.ledger import Ledger


class Teacher(NamedTuple):
    """A trained recommender as a student sees it.

    Attributes:
      scores: ``(params, history int32 [L]) -> float32 [num_items]``, logits of what comes after a history that is in
        time order and padded behind with ``num_items``. `NEVER` is for items that it does not know.
      params: its parameters, a pytree.
      num_items: catalogue size.
      places: ``(params, history int32 [L]) -> float32 [L, num_items]``, logits after each place, where that takes less
        than L times one history; row t must not depend on items behind place t. None = one history at a time.
      max_length: longest history that ``places`` can take; None for any.
      vectors: float32 ``[num_items, dim]``, for `losses.relations`, if it has some.
      ledger: of a private teacher, everything that was released to make it; None for one that is not private.
    """

    scores: Callable[[Any, jax.Array], jax.Array]
    params: Any
    num_items: int
    places: Callable[[Any, jax.Array], jax.Array] | None = None
    max_length: int | None = None
    vectors: jax.Array | None = None
    ledger: Ledger | None = None

    def after(self, history: jax.Array) -> jax.Array:
        """Logits after a history int32 ``[L]``, float32 ``[num_items]``."""
        return self.scores(self.params, history)

    def after_each(self, history: jax.Array) -> jax.Array:
        """Logits after each place of a history int32 ``[L]``, float32 ``[L, num_items]``; padding gives any row."""
        if self.places is not None:
            return self.places(self.params, history)
        places = jnp.arange(len(history))
        return jax.vmap(lambda t: self.after(jnp.where(places <= t, history, self.num_items)))(places)


def sequence_teacher(model: SequenceModel, params: Shared, *, ledger: Ledger | None = None) -> Teacher:
    """A model of the next item.

    Args:
      model: SASRec, HSTU or another; those that give queries of all places in one pass teach fastest.
      params: trained.
      ledger: of a private one.
    """
    queries = model.places

    def places(params, history):
        return jnp.matmul(queries(params, history), model.catalogue(params).T, precision="highest")

    return Teacher(
        scores=model.score,
        params=params,
        num_items=model.num_items,
        places=None if queries is None else places,
        max_length=None if queries is None else model.max_length,
        vectors=model.catalogue(params),
        ledger=ledger,
    )


def linear_teacher(
    weights: np.ndarray,
    *,
    num_items: int,
    item_ids: np.ndarray | None = None,
    recency: float = np.inf,
    scale: float = 1.0,
    ledger: Ledger | None = None,
) -> Teacher:
    """Item-to-item weights, such as EASE's: logits after places 1 .. t are scale sum_s exp(-(t - s) / recency) B[i_s].

    Args:
      weights: B, float32 ``[m, m]``.
      num_items: catalogue size.
      item_ids: int ``[m]``, the items behind rows and columns; None = all. The others are never recommended.
      recency: in items; infinite = all items of a history alike.
      scale: what makes logits of scores, which is one over the temperature of the teacher alone.
      ledger: of a private one.

    Raises:
      ValueError: for weights of another size than the items, or a recency or scale that is not positive.
    """
    item_ids = np.arange(num_items) if item_ids is None else np.asarray(item_ids)
    if weights.shape != (len(item_ids), len(item_ids)):
        raise ValueError(f"weights of {len(item_ids)} items must be [m, m] for them; got {weights.shape}.")
    if not recency > 0 or not scale > 0:
        raise ValueError(f"recency and scale must be positive; got {recency} and {scale}.")
    column_of = np.full(num_items + 1, len(item_ids), np.int32)
    column_of[item_ids] = np.arange(len(item_ids), dtype=np.int32)
    decay = float(np.exp(-1.0 / recency))
    params = {"weights": jnp.asarray(scale * weights, jnp.float32), "column_of": jnp.asarray(column_of)}

    def rows(params, history):
        return params["weights"].at[params["column_of"][history]].get(mode="fill", fill_value=0.0)

    def known(params, scores):
        columns = params["column_of"][:-1]
        return jnp.take(scores, columns, axis=-1, mode="fill", fill_value=NEVER)

    def places(params, history):
        def step(total, row):
            total = decay * total + row
            return total, total

        totals = jax.lax.scan(step, jnp.zeros(len(params["weights"])), rows(params, history))[1]
        return known(params, totals)

    def scores(params, history):
        age = jnp.sum(history < num_items) - 1 - jnp.arange(len(history))
        fresh = jnp.where(age >= 0, decay ** jnp.maximum(age, 0), 0.0)
        return known(params, jnp.matmul(fresh, rows(params, history), precision="highest"))

    return Teacher(scores, params, num_items, places, ledger=ledger)


def vae_teacher(params: Shared, *, ledger: Ledger | None = None) -> Teacher:
    """A `mult_vae`; its logits are f(mu(x))."""
    num_items = len(params.tables["item"])

    def scores(params, history):
        row = jnp.zeros(num_items).at[history].set(1.0, mode="drop")
        return decode(params, encode(params, row).mean)

    return Teacher(scores, params, num_items, ledger=ledger)


def ensemble(teachers: Sequence[Teacher], *, weights: Sequence[float] | None = None) -> Teacher:
    """Teachers whose logits are averaged, as Lin, Kong, Stich and Jaggi, 2020, "Ensemble Distillation for Robust Model
    Fusion in Federated Learning", do with clients' models.

    Nothing is said about the privacy of several teachers together: an ensemble has no ledger; compose theirs yourself.

    Args:
      teachers: at least one, of one catalogue.
      weights: of each, such as the numbers of their users; None = all alike.

    Raises:
      ValueError: for no teachers, different catalogues, or weights that are not positive or as many.
    """
    weights = np.ones(len(teachers)) if weights is None else np.asarray(weights, np.float64)
    sizes = {teacher.num_items for teacher in teachers}
    if len(sizes) != 1:
        raise ValueError(f"An ensemble takes teachers of one catalogue; got sizes {sorted(sizes)}.")
    if weights.shape != (len(teachers),) or not np.all(weights > 0):
        raise ValueError(f"An ensemble of {len(teachers)} teachers needs as many positive weights; got {weights}.")
    shares = [float(weight) for weight in weights / weights.sum()]
    lengths = [teacher.max_length for teacher in teachers if teacher.max_length is not None]

    def mean(scores):
        return sum(share * score for share, score in zip(shares, scores, strict=True))

    return Teacher(
        scores=lambda params, history: mean(t.scores(p, history) for t, p in zip(teachers, params, strict=True)),
        params=tuple(teacher.params for teacher in teachers),
        num_items=sizes.pop(),
        places=lambda params, history: mean(
            t._replace(params=p).after_each(history) for t, p in zip(teachers, params, strict=True)
        ),
        max_length=min(lengths, default=None),
    )
