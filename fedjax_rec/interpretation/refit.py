"""History models of recommenders in which the history enters by training: the user's vector is fitted anew.

A factor model with private user vectors does not read a history when it scores; it read it when the user's vector was
trained. What an item of the history does is then what it does to that vector, with item vectors as they are:

    F(w) = <q_item, x(w)> + b_item,    x(w) = argmin_x  loss of the history in which item i counts w_i

A client finds x(w) by itself, from its own history and item vectors that it holds anyway; nothing is sent.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_rec.interpretation.value import HistoryModel
from fedjax_rec.models.matrix_factorization import LOSSES
from fedjax_rec.models.user_solve import UserSolve

_MOST_STEPS, _TOLERANCE = 30, 1e-6


class Refit(NamedTuple):
    """What `matrix_factorization` minimises on a client, with the mean over drawn negatives in place of a draw.

    Attributes:
      loss: "logistic", "bpr" or "squared".
      l2: weight of |x|^2 / 2, positive: without it there may be no minimum.
      num_negatives: for each item of the history, drawn evenly from what is not in it.
      label_mean: added to every score.
    """

    loss: str
    l2: float
    num_negatives: int = 4
    label_mean: float = 0.0


class _Factors(NamedTuple):
    items: jax.Array  # [num_items, dim]
    bias: jax.Array  # [num_items]
    labels: jax.Array  # [num_items], of this user


def refitted_history_model(
    items: jax.Array, bias: jax.Array, refit: Refit, *, labels: jax.Array | None = None
) -> HistoryModel:
    """Matrix factorisation whose user vector is fitted to the history by Newton's method.

    The loss is a mean over the examples of the history that it is given, as in training. So a deleted item leaves the
    others to count for more, while an item that is present to 0 leaves its share empty; `by_deletion` and `by_presence`
    differ by that.

    Args:
      items: float32 ``[num_items, dim]``, trained.
      bias: float32 ``[num_items]``.
      refit: the client's loss.
      labels: float32 ``[num_items]``, this user's ratings at the items of its history; None = ones.

    Raises:
      ValueError: for an unknown loss, no l2, or BPR without negatives.
    """
    if refit.loss not in LOSSES or not refit.l2 > 0 or refit.num_negatives < (refit.loss == "bpr"):
        raise ValueError(
            f"A re-fit needs a loss among {', '.join(LOSSES)}, a positive l2, and negatives for bpr; got {refit}."
        )
    labels = jnp.ones(len(items)) if labels is None else labels
    return HistoryModel(_RefittedScores(refit), _Factors(items, bias, labels), len(items))


class _RefittedScores(NamedTuple):
    refit: Refit

    def __call__(self, factors: _Factors, history: jax.Array, presence: jax.Array) -> jax.Array:
        fixed = self.refit, factors, history, jax.lax.stop_gradient(presence)
        dim = factors.items.shape[1]
        found = _minimum(partial(expected_loss, *fixed), partial(_derivatives, *fixed), dim)
        found = jax.lax.stop_gradient(found)
        # The minimum does not depend on how it was found: its derivative is that of one Newton step from it.
        slope, hessian = _derivatives(self.refit, factors, history, presence, found)
        user = found - _solve(jax.lax.stop_gradient(hessian), slope)
        return _scores(self.refit, factors, user)


def _scores(refit, factors, user):
    return factors.items @ user + factors.bias + refit.label_mean


def expected_loss(
    refit: Refit, factors: _Factors, history: jax.Array, presence: jax.Array, user: jax.Array
) -> jax.Array:
    """The client's loss, float32: a mean over the examples of the whole history, of which some count less."""
    scores, counts = _scores(refit, factors, user), _weigh(refit, history, presence, len(factors.items))
    if refit.loss == "bpr":
        own = scores.at[history].get(mode="fill", fill_value=0.0)
        value = jnp.sum(_pairs(counts, presence) * jnp.logaddexp(0.0, scores[None, :] - own[:, None]))
    elif refit.loss == "logistic":
        value = jnp.sum((counts.own + counts.drawn) * jnp.logaddexp(0.0, scores) - counts.own * factors.labels * scores)
    else:
        value = 0.5 * jnp.sum(counts.own * jnp.square(scores - factors.labels) + counts.drawn * jnp.square(scores))
    return value + 0.5 * refit.l2 * jnp.sum(jnp.square(user))


class _Weights(NamedTuple):
    own: jax.Array  # [num_items], of an item as one of the history
    drawn: jax.Array  # [num_items], as a negative
    negative: jax.Array  # [num_items], chance of a draw
    num: jax.Array  # items of the history


def _weigh(refit, history, presence, num_items) -> _Weights:
    weights = jnp.zeros(num_items).at[history].add(presence, mode="drop")
    negative = (1.0 - weights) / jnp.maximum(jnp.sum(1.0 - weights), 1.0)
    num = jnp.maximum(jnp.sum(history < num_items), 1)
    examples = num * (1 + refit.num_negatives)
    return _Weights(weights / examples, refit.num_negatives * weights.sum() * negative / examples, negative, num)


def _pairs(counts, presence):
    """Weight of each item of the history against each of the catalogue, ``[L, num_items]``."""
    return presence[:, None] * counts.negative[None, :] / counts.num


def _derivatives(refit, factors, history, presence, user):
    """Gradient ``[dim]`` and Hessian ``[dim, dim]`` of `expected_loss` in the user's vector."""
    items, scores = factors.items, _scores(refit, factors, user)
    counts = _weigh(refit, history, presence, len(items))
    ridge = refit.l2 * jnp.eye(len(user))
    if refit.loss == "bpr":
        own = items.at[history].get(mode="fill", fill_value=0.0)
        chance = jax.nn.sigmoid(scores[None, :] - scores.at[history].get(mode="fill", fill_value=0.0)[:, None])
        pull = _pairs(counts, presence) * chance
        bend = pull * (1.0 - chance)
        across = own.T @ bend @ items
        hessian = _weighted_gram(items, bend.sum(axis=0)) + _weighted_gram(own, bend.sum(axis=1)) - across - across.T
        return items.T @ pull.sum(axis=0) - own.T @ pull.sum(axis=1) + refit.l2 * user, hessian + ridge
    both = counts.own + counts.drawn
    chance = jax.nn.sigmoid(scores) if refit.loss == "logistic" else scores
    bend = both * chance * (1.0 - chance) if refit.loss == "logistic" else both
    return items.T @ (both * chance - counts.own * factors.labels) + refit.l2 * user, _weighted_gram(
        items, bend
    ) + ridge


def _weighted_gram(vectors, weights):
    """sum_i w_i v_i v_i^T, ``[dim, dim]``."""
    return (vectors * weights[:, None]).T @ vectors


def _minimum(loss, derivatives, dim):
    """Of a strongly convex loss: Newton's method from zero, each step cut to the best of some lengths."""
    lengths = 0.5 ** jnp.arange(6.0)

    def step(state):
        user, _, steps = state
        slope, hessian = derivatives(user)
        direction = _solve(hessian, slope)
        tries = user[None, :] - lengths[:, None] * direction[None, :]
        user = tries[jnp.argmin(jax.vmap(loss)(tries))]
        return user, jnp.linalg.norm(direction), steps + 1

    def moving(state):
        user, moved, steps = state
        return (moved > _TOLERANCE * (1.0 + jnp.linalg.norm(user))) & (steps < _MOST_STEPS)

    return jax.lax.while_loop(moving, step, (jnp.zeros(dim), jnp.float32(jnp.inf), 0))[0]


def _solve(left, right):
    cholesky = jax.lax.linalg.cholesky(left, symmetrize_input=False)
    return jax.scipy.linalg.cho_solve((cholesky, True), right)


class _Solved(NamedTuple):
    items: jax.Array
    gram: jax.Array


def solved_history_model(items: jax.Array, solve: UserSolve, *, gram: jax.Array | None = None) -> HistoryModel:
    """Weighted ridge regression on item vectors, as alternating methods (FCF, DPALS) fit their users.

    Args:
      items: float32 ``[num_items, dim]``, trained.
      solve: how a client finds its vector; implicit feedback only.
      gram: ``items.T @ items``, or what a private method released in its place.

    Raises:
      ValueError: for explicit ratings, whose targets a history does not carry.
    """
    if solve.ratings is not None:
        raise ValueError("solved_history_model explains implicit feedback; drop `ratings` from the UserSolve.")
    gram = jnp.matmul(items.T, items, precision="highest") if gram is None else gram
    return HistoryModel(_SolvedScores(solve), _Solved(items, gram), len(items))


class _SolvedScores(NamedTuple):
    solve: UserSolve

    def __call__(self, params: _Solved, history: jax.Array, presence: jax.Array) -> jax.Array:
        solve, dim = self.solve, params.items.shape[1]
        own = params.items.at[history].get(mode="fill", fill_value=0.0)
        age = jnp.sum(history < len(params.items)) - 1 - jnp.arange(len(history))
        weights = presence * jnp.where(age >= 0, jnp.exp(-age / solve.recency), 0.0)
        left = solve.observed_weight * (own * weights[:, None]).T @ own
        left += solve.unobserved_weight * params.gram + solve.l2 * jnp.eye(dim)
        return params.items @ _solve(left, weights @ own)
