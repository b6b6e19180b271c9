"""Local steps of PMF and SVD++ on one client's ratings and on virtual ratings of items it did not rate.

Mnih and Salakhutdinov, 2007, "Probabilistic Matrix Factorization"; Koren, 2008, "Factorization Meets the Neighborhood";
virtual ratings as in Lin et al., 2020, "FedRec: Federated Recommendation with Explicit Feedback" (`algorithms.fedrec`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Ratings(NamedTuple):
    """Ratings of one client: ids ``[n]``, ratings ``[n]``, real bool ``[n]``, items and feedback ``[n, dim]``."""

    ids: jax.Array
    ratings: jax.Array
    real: jax.Array
    items: jax.Array
    feedback: jax.Array


def batch_step(user, rated, sampled, rate, l2, predict, predict_steps):
    """One step on everything: the new user vector, gradients ``[rated + sampled, dim]``, and the loss before it."""

    def step(user, data):
        errors = jnp.where(data.real, data.ratings - data.items @ user, 0.0)
        num = jnp.maximum(data.real.sum(), 1)
        return user + rate * (errors @ data.items / num - l2 * user), errors

    if predict is not None:
        ahead = jax.lax.fori_loop(0, predict_steps, lambda _, user: step(user, rated)[0], user)
        virtual = jnp.where(predict, sampled.items @ ahead, sampled.ratings)
        sampled = sampled._replace(ratings=virtual)
    data = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), rated, sampled)
    moved, errors = step(user, data)
    own = errors[: len(rated.ids)]
    loss = 0.5 * jnp.square(own).sum() / jnp.maximum(rated.real.sum(), 1)
    gradients = l2 * data.items - errors[:, None] * user[None, :]
    return jnp.where(data.real.any(), moved, user), gradients, loss


class _Local(NamedTuple):
    """A client between two ratings. Its feedback rows are ``scale * base + shift``: a step moves all by one map.

    Attributes:
      user: ``[dim]``.
      total: ``[dim]``, sum of its feedback rows.
      scale: scalar.
      shift: ``[dim]``.
    """

    user: jax.Array
    total: jax.Array
    scale: jax.Array
    shift: jax.Array


def _visit(local, item, rating, row, others, rate, l2, weight):
    """One rating, predicted without the item's own feedback row: what moved, the item's gradient, the error."""
    near = local.total - row
    root = jnp.sqrt(jnp.maximum(others, 1.0))
    vector = local.user + weight * near / root
    error = rating - item @ vector
    push = jnp.where(others > 0, rate * weight * error / root, 0.0) * item
    shrink = jnp.where(others > 0, 1 - rate * l2, 1.0)
    user = local.user + rate * (error * item - l2 * local.user)
    total = shrink * near + others * push + row
    moved = _Local(user, total, shrink * local.scale, shrink * local.shift + push)
    return moved, l2 * item - error * vector, error


def stochastic_steps(user, rated, sampled, rate, l2, predict, predict_steps, weight, num_steps, rho):
    """One step on each rating, then on each sampled item: user vector, gradients, feedback changes, loss."""
    num = rated.real.sum().astype(jnp.float32)

    def select(real, new, old):
        return jax.tree.map(lambda a, b: jnp.where(real, a, b), new, old)

    def own(k, carry):
        local, bases, gradients, loss = carry
        row = local.scale * bases[k] + local.shift
        visited = _visit(local, rated.items[k], rated.ratings[k], row, num - 1, rate, l2, weight)
        moved, gradient, error = select(rated.real[k], visited, (local, jnp.zeros_like(user), 0.0))
        # This row was left out of the step: another base keeps its value.
        base = select(rated.real[k], (row - moved.shift) / moved.scale, bases[k])
        return moved, bases.at[k].set(base), gradients.at[k].set(gradient), loss + 0.5 * error**2

    local = _Local(user, rated.feedback.sum(0), jnp.ones(()), jnp.zeros_like(user))
    start = (local, rated.feedback, jnp.zeros_like(rated.items), jnp.zeros(()))
    local, bases, own_gradients, loss = jax.lax.fori_loop(0, num_steps, own, start)

    def ahead(k, local):  # here every row takes part in every step, the item's own too
        place = k % jnp.maximum(num_steps, 1)
        row = local.scale * bases[place] + local.shift
        moved, *_ = _visit(local, rated.items[place], rated.ratings[place], row, num - 1, rate, l2, weight)
        change = moved.scale * bases[place] + moved.shift - row
        return select(rated.real[place], moved._replace(total=moved.total + change), local)

    if predict is not None:
        copy = jax.lax.fori_loop(0, predict_steps * num_steps, ahead, local)
        vector = copy.user + weight * copy.total / jnp.sqrt(jnp.maximum(num, 1.0))
        sampled = sampled._replace(ratings=jnp.where(predict, sampled.items @ vector, sampled.ratings))

    def other(k, carry):
        local, gradients, changes = carry
        none = jnp.zeros_like(user)
        visited = _visit(local, sampled.items[k], sampled.ratings[k], none, num, rate, l2, weight)
        moved, gradient, _ = select(sampled.real[k], visited, (local, none, 0.0))
        # One step of the map that moves the client's own rows, taken by the sampled item's row.
        ratio = moved.scale / local.scale
        change = (ratio - 1) * sampled.feedback[k] + moved.shift - ratio * local.shift
        return moved, gradients.at[k].set(gradient), changes.at[k].set(change)

    gradients = changes = jnp.zeros_like(sampled.items)
    if rho:
        local, gradients, changes = jax.lax.fori_loop(0, rho * num_steps, other, (local, gradients, changes))
    own_changes = local.scale * bases + local.shift[None, :] - rated.feedback
    gradients, changes = jnp.concatenate([own_gradients, gradients]), jnp.concatenate([own_changes, changes])
    return local.user, gradients, changes, loss / jnp.maximum(num, 1.0)
