"""Losses of the next item: what a sequence model's queries are asked for.

A query q_t has a target item i_t among V; the score of item j is s_tj = <q_t, v_j>. Means are over the real targets of
one history. How much of the catalogue a loss looks at explains more than the model behind the queries does: Klenitskiy
and Vasilev, 2023, "Turning Dross Into Gold Loss: is BERT4Rec really better than SASRec?".

A loss is a value ``(items, params, targets, key) -> float32 scalar`` and fits every model here. Those that draw
negatives take only the vectors of the items that occur; the full one takes the whole catalogue.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_rec.models.base import Shared
from fedjax_rec.models.items import ItemTower


class Targets(NamedTuple):
    """What one history asks for.

    Attributes:
      queries: float32 ``[n, dim]``.
      ids: int32 ``[n]``, the items that came.
      real: bool ``[n]``; False is padding.
      history: int32 ``[L]``, all items of the history, which are no negatives of `binary_cross_entropy`.
    """

    queries: jax.Array
    ids: jax.Array
    real: jax.Array
    history: jax.Array


SequenceLoss = Callable[[ItemTower, Shared, Targets, jax.Array], jax.Array]
"""``(items, params, targets, key) -> float32 scalar``, 0 where no target is real."""


def full_cross_entropy(*, places: int | None = None) -> SequenceLoss:
    """-mean_t log softmax_j(s_tj)[i_t] over the whole catalogue.

    Args:
      places: of a history whose scores are held at once; they are made again for the gradient. This bounds memory by
        ``places x items`` for a third more work. None: all at once, ``L x items``.

    Raises:
      ValueError: for places below 1.
    """
    if places is not None and places < 1:
        raise ValueError(f"places must be at least 1 or None; got {places}.")
    return _FullCrossEntropy(places)


class _FullCrossEntropy(NamedTuple):
    """A value, so that equal settings are equal."""

    places: int | None

    def __call__(self, items: ItemTower, params: Shared, targets: Targets, key: jax.Array) -> jax.Array:
        del key
        catalogue = items.all(params)
        num = len(targets.ids)
        if self.places is None or self.places >= num:
            return mean_over(_surprise(catalogue, targets.queries, targets.ids), targets.real)
        steps = -(-num // self.places)

        def stacked(x):
            padded = jnp.pad(x, [(0, steps * self.places - num)] + [(0, 0)] * (x.ndim - 1))
            return padded.reshape(steps, self.places, *x.shape[1:])

        @jax.checkpoint
        def one(queries, ids):
            return _surprise(catalogue, queries, ids)

        losses = jax.lax.map(lambda xs: one(*xs), (stacked(targets.queries), stacked(targets.ids)))
        return mean_over(losses.reshape(-1)[:num], targets.real)


def _surprise(catalogue: jax.Array, queries: jax.Array, ids: jax.Array) -> jax.Array:
    """-log softmax at the target, ``[n]``; anything where the target is padding."""
    scores = queries @ catalogue.T
    target = jnp.take_along_axis(scores, ids[:, None], axis=1, mode="clip")[:, 0]
    return jax.nn.logsumexp(scores, axis=1) - target


def sampled_softmax(*, num_negatives: int = 128, per_target: bool = False) -> SequenceLoss:
    """-mean_t log e^{s_t i_t} / (e^{s_t i_t} + (V - 1) / k sum_{j in N} e^{s_tj}), N of k uniform draws.

    The weight (V - 1) / k makes the sum in the denominator that of `full_cross_entropy` in expectation. Draws that hit
    the target do not count.

    Args:
      num_negatives: k.
      per_target: draw negatives for each target, not once for the history: k times the memory of queries.

    Raises:
      ValueError: for fewer than one negative.
    """
    _check_negatives(num_negatives)
    return _SampledSoftmax(num_negatives, per_target)


class _SampledSoftmax(NamedTuple):
    num_negatives: int
    per_target: bool

    def __call__(self, items: ItemTower, params: Shared, targets: Targets, key: jax.Array) -> jax.Array:
        drawn = _draw(items.num_items, len(targets.ids), self.num_negatives, self.per_target, key)
        target, others = _scores(items, params, targets, drawn)
        others = jnp.where(drawn == targets.ids[:, None], -jnp.inf, others)
        # At least a target's own score is finite, so that no gradient divides by zero.
        others = others + math.log(max(items.num_items - 1, 1) / self.num_negatives)
        return mean_over(jax.nn.logsumexp(jnp.concatenate([target[:, None], others], 1), axis=1) - target, targets.real)


def gbce(*, num_negatives: int = 256, t: float = 0.75, per_target: bool = False) -> SequenceLoss:
    """gSASRec's generalised binary cross-entropy, which takes back the overconfidence that few negatives bring.

        -mean_t [beta log sigmoid(s_t i_t) + sum_{j in N} log(1 - sigmoid(s_tj))] / (k + 1)
        beta = a (t (1 - 1 / a) + 1 / a),    a = k / (V - 1)

    with N of k uniform draws: beta = 1 at t = 0 is plain binary cross-entropy, and at t = 1 the scores estimate
    probabilities as they are. Petrov and Macdonald, 2023, "gSASRec: Reducing Overconfidence in Sequential
    Recommendation Trained with Negative Sampling".

    Differs from the paper: a history draws its negatives once and not for each target, which takes k times less memory;
    ``per_target=True`` is the paper's.

    Args:
      num_negatives: k; above V - 1 it counts as that for beta.
      t: calibration, in [0, 1].
      per_target: see above.

    Raises:
      ValueError: for fewer than one negative, or t out of range.
    """
    _check_negatives(num_negatives)
    if not 0 <= t <= 1:
        raise ValueError(f"t must lie in [0, 1]; got {t}.")
    return _Gbce(num_negatives, t, per_target, outside=False)


def binary_cross_entropy() -> SequenceLoss:
    """-mean_t [log sigmoid(s_t i_t) + log(1 - sigmoid(s_tj))] / 2, j one uniform draw outside the history.

    Of Kang and McAuley, 2018, "Self-Attentive Sequential Recommendation". A draw that hits the history three times
    running is left out.
    """
    return _Gbce(1, 0.0, True, outside=True)


class _Gbce(NamedTuple):
    num_negatives: int
    t: float
    per_target: bool
    outside: bool

    def __call__(self, items: ItemTower, params: Shared, targets: Targets, key: jax.Array) -> jax.Array:
        k = self.num_negatives
        if self.outside:
            drawn, counts = _draw_outside(items.num_items, targets, key)
        else:
            drawn = _draw(items.num_items, len(targets.ids), k, self.per_target, key)
            counts = jnp.ones((1, 1), bool)
        target, others = _scores(items, params, targets, drawn)
        share = min(k / max(items.num_items - 1, 1), 1.0)
        beta = share * (self.t * (1 - 1 / share) + 1 / share)
        negative = jnp.where(counts, jax.nn.softplus(others), 0.0).sum(1)
        return mean_over((beta * jax.nn.softplus(-target) + negative) / (k + 1), targets.real)


def mean_over(losses: jax.Array, real: jax.Array) -> jax.Array:
    """The mean of ``losses [n]`` where ``real [n]``, 0 if nowhere."""
    return jnp.where(real, losses, 0.0).sum() / jnp.maximum(real.sum(), 1)


def _draw(num_items: int, num_targets: int, num_negatives: int, per_target: bool, key: jax.Array) -> jax.Array:
    """Uniform items, int32 ``[1 or targets, negatives]``."""
    return jax.random.randint(key, (num_targets if per_target else 1, num_negatives), 0, num_items)


def _draw_outside(num_items: int, targets: Targets, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One uniform item outside the history for each target, int32 ``[n, 1]``, and whether three tries found it."""
    tries = jax.random.randint(key, (len(targets.ids), 3), 0, num_items)
    taken = jnp.zeros(num_items, bool).at[targets.history].set(True, mode="drop")
    free = ~taken[tries]
    first = jnp.argmax(free, axis=1, keepdims=True)
    return jnp.take_along_axis(tries, first, axis=1), free.any(axis=1, keepdims=True)


def _scores(items: ItemTower, params: Shared, targets: Targets, drawn: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scores of each target ``[n]`` and of negatives ``[n, negatives]``, drawn for each target or once for all."""
    target = jnp.sum(targets.queries * items.take(params, targets.ids), axis=1)
    if len(drawn) == 1 and len(targets.ids) != 1:
        return target, targets.queries @ items.take(params, drawn[0]).T
    return target, jnp.einsum("nd,nkd->nk", targets.queries, items.take(params, drawn))


def _check_negatives(num_negatives: int) -> None:
    if num_negatives < 1:
        raise ValueError(f"num_negatives must be at least 1; got {num_negatives}.")
