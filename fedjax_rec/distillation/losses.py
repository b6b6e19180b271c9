"""What a student is blamed for, given its own and its teacher's scores of all items after one history.

Items that must not count, such as those of the history, are given `NEVER` in both scores: their share is zero in both.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

NEVER = -1e30  # a score whose share is zero; finite, for infinity minus infinity is NaN

ScoreLoss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""``(teacher float32 [items], student float32 [items], key) -> float32 scalar``; no gradient in the teacher."""


class Candidates(NamedTuple):
    """The items that a loss looks at.

    Attributes:
      item_ids: int32 ``[K + S]``: the teacher's top K, then S drawn ones.
      log_weights: float32 ``[K + S]``: how many items each stands for, as a logarithm; `NEVER` for none.
    """

    item_ids: jax.Array
    log_weights: jax.Array


def candidates(teacher: jax.Array, *, top_k: int, num_sampled: int, key: jax.Array) -> Candidates:
    """The teacher's top K, and draws that stand for all the rest.

    Each of S items is drawn uniformly from the whole catalogue of n and stands for n / S items, or for none if it is
    one of the top K. So for any f, ``sum_c weight_c f(c)`` has the expectation ``sum_i f(i)`` over all items.

    Args:
      teacher: float32 ``[items]``.
      top_k: K, at least 1; more than there are items is all of them.
      num_sampled: S; 0 leaves the rest out.
      key: of the draws.
    """
    num_items = teacher.shape[0]
    if top_k >= num_items:  # no need to sort
        return Candidates(jnp.arange(num_items, dtype=jnp.int32), jnp.zeros(num_items))
    top = jax.lax.top_k(teacher, top_k)[1].astype(jnp.int32)
    if num_sampled == 0:
        return Candidates(top, jnp.zeros(len(top)))
    drawn = jax.random.randint(key, (num_sampled,), 0, num_items, jnp.int32)
    in_top = jnp.zeros(num_items, bool).at[top].set(True)
    weights = jnp.where(in_top[drawn], NEVER, jnp.log(num_items / num_sampled))
    return Candidates(jnp.concatenate([top, drawn]), jnp.concatenate([jnp.zeros(len(top)), weights]))


def divergence(teacher: jax.Array, student: jax.Array, log_weights: jax.Array, *, temperature: float) -> jax.Array:
    """T^2 KL(p || q) for p = softmax(teacher / T + log w) and q = softmax(student / T + log w), over some candidates.

    With the weights of `candidates` these are the shares that the items have among all, up to the noise of the draws;
    with all items and log weights of 0 it is the plain divergence.

    Args:
      teacher: float32 ``[candidates]``.
      student: float32 ``[candidates]``.
      log_weights: float32 ``[candidates]``.
      temperature: T > 0. The factor T^2 keeps gradients of about one size (Hinton, Vinyals, Dean, 2015, "Distilling the
        Knowledge in a Neural Network").
    """
    log_p = jax.nn.log_softmax(jnp.maximum(teacher / temperature, NEVER) + log_weights)
    log_q = jax.nn.log_softmax(jnp.maximum(student / temperature, NEVER) + log_weights)
    return temperature**2 * jnp.sum(jnp.where(jnp.exp(log_p) > 0, jnp.exp(log_p) * (log_p - log_q), 0.0))


def kl(*, temperature: float = 1.0, top_k: int = 100, num_sampled: int = 0) -> ScoreLoss:
    """`divergence` on the teacher's top K and a sampled rest.

    Args:
      temperature: T.
      top_k: K; the size of the catalogue or more gives the divergence over all items, exactly.
      num_sampled: draws for the rest. Without any, the student learns the teacher's order of its top K and nothing
        about what else it should leave alone.

    Raises:
      ValueError: for numbers out of range.
    """
    _check(temperature=temperature, top_k=top_k)
    if num_sampled < 0:
        raise ValueError(f"num_sampled must be 0 or more; got {num_sampled}.")

    def loss(teacher, student, key):
        teacher = jax.lax.stop_gradient(teacher)
        ids, log_weights = candidates(teacher, top_k=top_k, num_sampled=num_sampled, key=key)
        return divergence(teacher[ids], student[ids], log_weights, temperature=temperature)

    return loss


def ranking(*, top_k: int = 10, num_sampled: int = 100, sharpness: float = 10.0, mu: float = 0.1) -> ScoreLoss:
    """Ranking distillation: the teacher's top K are positives, weighed by place and by how far the student is off.

        - sum_{r=1..K} a_r b_r log sigmoid(s_r)    a_r = exp(-r / lambda) / sum_k exp(-k / lambda)
        b_r = tanh(max(mu (rank of item r - r), 0))

    for the student's score s_r of the teacher's item of place r. The student's rank of it is estimated as items times
    the share of drawn items that the student puts above it. Tang and Wang, 2018, "Ranking Distillation: Learning
    Compact Ranking Models With High Performance for Recommender System". Scores are logits of a pointwise loss: it
    pulls up alone, and goes with another loss that pushes down.

    Args:
      top_k: K.
      num_sampled: items drawn to estimate ranks.
      sharpness: lambda > 0, in places.
      mu: of the discrepancy, > 0.

    Raises:
      ValueError: for numbers out of range.
    """
    _check(top_k=top_k, num_sampled=num_sampled, sharpness=sharpness, mu=mu)

    def loss(teacher, student, key):
        num_items = teacher.shape[0]
        top = jax.lax.top_k(teacher, min(top_k, num_items))[1]
        places = jnp.arange(1, len(top) + 1)
        drawn = jax.random.randint(key, (num_sampled,), 0, num_items)
        above = jnp.mean(student[drawn][None, :] > student[top][:, None], axis=1)
        rank = jnp.floor(num_items * above) + 1
        weights = jax.nn.softmax(-places / sharpness) * jnp.tanh(jnp.maximum(mu * (rank - places), 0.0))
        weights = jnp.where(teacher[top] > NEVER, jax.lax.stop_gradient(weights), 0.0)
        return -jnp.sum(weights * jax.nn.log_sigmoid(student[top]))

    return loss


def relaxed_ranking(*, top_k: int = 20, num_sampled: int = 100) -> ScoreLoss:
    """The chance of the teacher's order, where only the order of the top K is asked for, and that the rest comes after.

        - (1 / K) sum_{k=1..K} log ( exp(s_k) / (sum_{i=k..K} exp(s_i) + sum_{j drawn from the rest} exp(s_j)) )

    Kang, Hwang, Kweon and Yu, 2020, "DE-RRD: A Knowledge Distillation Framework for Recommender System" (there without
    the factor 1 / K, with the top K drawn from a longer list).

    Args:
      top_k: K.
      num_sampled: items of the rest.

    Raises:
      ValueError: for numbers out of range.
    """
    _check(top_k=top_k, num_sampled=num_sampled)

    def loss(teacher, student, key):
        num_items = teacher.shape[0]
        top = jax.lax.top_k(teacher, min(top_k, num_items))[1]
        drawn = jax.random.randint(key, (num_sampled,), 0, num_items)
        in_top = jnp.zeros(num_items, bool).at[top].set(True)
        rest = jax.nn.logsumexp(jnp.where(in_top[drawn], NEVER, student[drawn]))
        after = jax.lax.cumlogsumexp(student[top], reverse=True)
        terms = jnp.where(teacher[top] > NEVER, student[top] - jnp.logaddexp(after, rest), 0.0)
        return -jnp.mean(terms)

    return loss


def relations(teacher_vectors: jax.Array, student_vectors: jax.Array) -> jax.Array:
    """How differently two models see which items are alike: the mean squared difference of all pairwise cosines.

    Vectors may be of different lengths, and rotated or scaled in any way. Kang, Hwang, Kweon and Yu, 2021, "Topology
    Distillation for Recommender System", distil such relations of all items of a batch.

    Args:
      teacher_vectors: float32 ``[n, teacher's dim]``, of some items.
      student_vectors: float32 ``[n, student's dim]``, of the same items.
    """

    def cosines(vectors):
        squares = jnp.sum(jnp.square(vectors), axis=1, keepdims=True)
        unit = vectors * jax.lax.rsqrt(jnp.where(squares > 0, squares, 1.0))  # a zero vector is like none
        return jnp.matmul(unit, unit.T, precision="highest")

    return jnp.mean(jnp.square(jax.lax.stop_gradient(cosines(teacher_vectors)) - cosines(student_vectors)))


def _check(**numbers: float) -> None:
    for name, value in numbers.items():
        if not value > 0:
            raise ValueError(f"{name} of a distillation loss must be positive; got {value}.")
