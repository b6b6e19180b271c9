"""Is an explanation right? Remove items in the order that it gives, and see how fast the recommendation falls.

The deletion curve of an order is F after removing its first 0, 1, ..., n items (true deletion: the history closes up).
A small area under it means that the order finds the items that carry the recommendation. Petsiuk, Das and Saenko, 2018,
"RISE: Randomized Input Sampling for Explanation of Black-box Models", for pixels. A random order is what an explanation
must beat; orders by recency or by popularity need no look at the model at all.
"""

import jax
import jax.numpy as jnp

from fedjax_rec.interpretation.value import Value


def deletion_curve(value: Value, real: jax.Array, attributions: jax.Array) -> jax.Array:
    """F after removing the first k places, by decreasing attribution, for k = 0 .. L; float32 ``[L + 1]``.

    Args:
      value: F: from `by_deletion`.
      real: bool ``[L]``; padding goes last and changes nothing, so the curve is flat past the number of real places.
      attributions: ``[L]``; of equal ones the earlier place goes first.
    """
    order = jnp.argsort(jnp.where(real, -attributions, jnp.inf), stable=True)
    rank = jnp.argsort(order)
    kept = real[None, :] & (rank[None, :] >= jnp.arange(len(real) + 1)[:, None])
    return jax.vmap(value)(kept.astype(jnp.float32))


def deletion_area(value: Value, real: jax.Array, attributions: jax.Array) -> jax.Array:
    """Mean height of the deletion curve over the share of items removed, in units of F: smaller is better.

    Trapezoids, so the curve's ends, which every order shares, count half. nan for an empty history.
    """
    curve, n = deletion_curve(value, real, attributions), real.sum()
    between = jnp.arange(len(real)) < n
    return jnp.sum(jnp.where(between, (curve[1:] + curve[:-1]) / 2, 0.0)) / n


def random_area(value: Value, real: jax.Array, key: jax.Array, *, num_orders: int = 16) -> jax.Array:
    """Mean `deletion_area` over random orders.

    Args:
      value: F.
      real: bool ``[L]``.
      key: of the orders.
      num_orders: how many.
    """
    lots = jax.random.uniform(key, (num_orders, len(real)))
    return jax.lax.map(lambda lot: deletion_area(value, real, lot), lots).mean()
