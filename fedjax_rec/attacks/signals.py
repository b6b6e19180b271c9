"""What an attacker measures: how well a released model predicts a candidate's items, each from the candidate's others.

The attacker holds a candidate's record and what the server releases, and never anybody's private parameters. For item i
of a record D the signal is the logit of the model's confidence in i among i and all items outside D,

    x_i = log p / (1 - p) = s_i - log sum_{j not in D} exp(s_j),

with scores s of the record without i. That is the logit-scaled confidence of Carlini et al. (2022), "Membership
Inference Attacks From First Principles", whose distribution over models is nearly Gaussian.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_rec.models.base import Shared

NEWTON_STEPS = 6
USERS_AT_ONCE = 256


class Signals(NamedTuple):
    """What is measured of one model.

    Attributes:
      users: float32 ``[users]``, mean signal of a user's core items; 0 for a user without any.
      rows: float32 ``[rows]``, the signal of each interaction given its user's core, itself left out.
    """

    users: jax.Array
    rows: jax.Array


def measured(scores: jax.Array, core: jax.Array, user_ids: jax.Array, item_ids: jax.Array) -> Signals:
    """Signals from scores.

    Args:
      scores: float32 ``[users, items]``; of a core item, its score when it is left out of the record.
      core: bool ``[users, items]``.
      user_ids, item_ids: int32 ``[rows]``, the interactions to score.
    """
    rest = jax.nn.logsumexp(jnp.where(core, -jnp.inf, scores), axis=1)
    logits = scores - rest[:, None]
    users = jnp.sum(jnp.where(core, logits, 0.0), 1) / jnp.maximum(core.sum(1), 1)
    # An item outside the core is itself in the sum over the rest.
    others = jnp.log(-jnp.expm1(jnp.minimum(logits, -1e-6)))
    logits = jnp.where(core, logits, logits - others)
    return Signals(users, logits[user_ids, item_ids])


def factor_scores(
    shared: Shared, core: jax.Array, *, l2: float = 0.1, num_negatives: float = 4.0, newton_steps: int = NEWTON_STEPS
) -> jax.Array:
    """Scores of a matrix factorisation for records whose user vectors the attacker fits itself.

    For each record D it minimises, by Newton steps,

        sum_{i in D} softplus(-s_i) + w sum_{j not in D} softplus(s_j) + l2 |p|^2 / 2,    s = Q p + b,

    where w counts every item outside D as often as so many negatives for each positive do on average. Scores of items
    in D are those of a fit without the item, to first order, s_i + a_i l'_i / (1 - a_i l''_i) with a_i = q_i H^-1 q_i
    (Rad and Maleki, 2020, "A scalable estimate of the out-of-sample prediction error via approximate leave-one-out
    cross-validation").

    Args:
      shared: tables "item" ``[items, dim]`` and "bias" ``[items, 1]``.
      core: bool ``[users, items]``, the records.
      l2: weight of the user vector's squared norm.
      num_negatives: for each positive.
      newton_steps: from zero.

    Returns:
      float32 ``[users, items]``.
    """
    items, bias = shared.tables["item"], shared.tables["bias"][:, 0]
    num_items, dim = items.shape
    eye = l2 * jnp.eye(dim)
    # Under the vmap of `map`, products with this are matrix products over users; q q^T anew for each user takes ten
    # times as long.
    outer = (items[:, :, None] * items[:, None, :]).reshape(num_items, dim * dim)

    def one(record):
        size = record.sum()
        weights = jnp.where(record, 1.0, num_negatives * size / jnp.maximum(len(record) - size, 1))

        def at(vector):
            scores = items @ vector + bias
            slope = weights * (jax.nn.sigmoid(scores) - record)
            curve = weights * jax.nn.sigmoid(scores) * jax.nn.sigmoid(-scores)
            return scores, slope, curve, (curve @ outer).reshape(dim, dim) + eye

        def step(_, vector):
            _, slope, _, hessian = at(vector)
            change = jax.scipy.linalg.solve(hessian, items.T @ slope + l2 * vector, assume_a="pos")
            # Far from the minimum a full step may overshoot; scores that move by a few units are far enough.
            return vector - change * jnp.minimum(1.0, 4.0 / jnp.maximum(jnp.max(jnp.abs(items @ change)), 1e-6))

        vector = jax.lax.fori_loop(0, newton_steps, step, jnp.zeros(dim))
        scores, slope, curve, hessian = at(vector)
        spread = outer @ jnp.linalg.inv(hessian).reshape(dim * dim)
        left_out = scores + spread * slope / jnp.maximum(1.0 - spread * curve, 1e-2)
        return jnp.where(record, left_out, scores)

    return jax.lax.map(one, core, batch_size=USERS_AT_ONCE)


def item_to_item_scores(weights: jax.Array, core: jax.Array, *, temperature: float = 1.0) -> jax.Array:
    """Scores of a linear item-to-item model such as EASE: with a zero diagonal, no item helps to predict itself.

    Args:
      weights: float32 ``[items, items]``, row i what item i in a record adds; zero diagonal.
      core: bool ``[users, items]``.
      temperature: scores are divided by it.

    Returns:
      float32 ``[users, items]``.
    """
    return jnp.matmul(core.astype(jnp.float32), weights, precision="highest") / temperature
