"""How a server that sees single uploads groups clients and items: a graph of neighbours, an elbow, K-means."""

import jax
import jax.numpy as jnp


def neighbour_weights(uploads: jax.Array, present: jax.Array, *, similarity: str, threshold: float) -> jax.Array:
    """The user graph, as weights of a mean over neighbours.

    Args:
      uploads: float32 ``[clients, num_items * dim]``; rows of absent clients are not looked at.
      present: bool ``[clients]``.
      similarity: "cosine" or "distance".
      threshold: gamma; two clients are linked if their s is above gamma times the mean s of all pairs, u with u too.

    Returns:
      float32 ``[clients, clients]``; rows of present clients sum to 1, other rows and columns are zero.
    """
    products = jnp.matmul(uploads, uploads.T, precision=jax.lax.Precision.HIGHEST)
    norms = jnp.sqrt(jnp.maximum(jnp.diagonal(products), jnp.finfo(jnp.float32).tiny))
    itself = jnp.eye(len(uploads), dtype=bool)
    cosine = jnp.where(itself, 1.0, products / (norms[:, None] * norms[None, :]))
    values = cosine if similarity == "cosine" else 1.0 - cosine
    pairs = present[:, None] & present[None, :]
    mean = jnp.sum(jnp.where(pairs, values, 0.0)) / jnp.maximum(pairs.sum(), 1)
    linked = pairs & (values > threshold * mean)
    linked |= pairs & itself & ~linked.any(1)[:, None]
    return linked / jnp.maximum(linked.sum(1), 1)[:, None]


def k_means(rows: jax.Array, num_groups: int, *, num_steps: int, key: jax.Array) -> jax.Array:
    """Lloyd's algorithm from random rows; a group that loses all its rows keeps its centre.

    Args:
      rows: float32 ``[n, dim]``.
      num_groups: K, at most n.
      num_steps: moves of the centres.
      key: of the first centres.

    Returns:
      int32 ``[n]``, groups in ``0 .. K-1``.
    """

    def nearest(centres):
        return jnp.argmin(jnp.sum(jnp.square(centres), -1)[None, :] - 2 * rows @ centres.T, axis=1)

    def move(_, centres):
        member = jax.nn.one_hot(nearest(centres), num_groups)
        counts = member.sum(0)[:, None]
        return jnp.where(counts > 0, member.T @ rows / jnp.maximum(counts, 1), centres)

    first = rows[jax.random.choice(key, len(rows), (num_groups,), replace=False)]
    return nearest(jax.lax.fori_loop(0, num_steps, move, first)).astype(jnp.int32)


def up_to_elbow(similarities: jax.Array, present: jax.Array) -> jax.Array:
    """The clients whose similarity lies before the elbow of the sorted ones, or at it.

    Distances from a line keep their order if an axis is stretched, so the elbow does not hang on units.

    Args:
      similarities: float32 ``[clients]``.
      present: bool ``[clients]``; the others are left out.

    Returns:
      bool ``[clients]``.
    """
    order = jnp.argsort(jnp.where(present, -similarities, jnp.inf))
    ranked = similarities[order]
    rank, last = jnp.arange(len(ranked)), jnp.maximum(present.sum() - 1, 0)
    distance = jnp.abs((ranked - ranked[0]) * last - (ranked[last] - ranked[0]) * rank)
    elbow = jnp.argmax(jnp.where(rank <= last, distance, -1.0))
    return present & jnp.zeros_like(present).at[order].set(rank <= elbow)
