"""A user's vector as the exact answer to weighted ridge regression on item vectors: what alternating methods solve.

    x_u = (sum_{i in S_u} f_ui h_i h_i^T + a H^T H + l2 I)^-1 sum_{i in S_u} f_ui y_ui h_i

with targets y_ui and weights f_ui. A client does this by itself, in training and long after, whether training saw it or
not: it needs the item vectors, H^T H and its own rows, and sends nothing.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_rec.data.clients import Client, ClientData
from fedjax_rec.federated.rows import take_rows
from fedjax_rec.models.base import Shared


class RatingScale(NamedTuple):
    """Explicit ratings: a rating r counts as the target clip(r, low, high) - mean, so |target| has a public bound.

    The mean is public or released; a mean of the data at hand is a release like any other.
    """

    low: float
    high: float
    mean: float

    @property
    def bound(self) -> float:
        """Y, the largest absolute target."""
        return max(self.high - self.mean, self.mean - self.low)


class UserSolve(NamedTuple):
    """How a client finds its vector; nothing of it is sent, so it needs no budget and may be changed after training.

    Attributes:
      l2: weight of |x_u|^2, positive.
      unobserved_weight: a.
      observed_weight: of a client's own items in its equations' left side; 1, or 0 to match ``Shares(gram=0)``.
      recency: the item that a client met j items before its last one weighs exp(-j / recency); infinite = all the same.
      ratings: for explicit feedback.
    """

    l2: float
    unobserved_weight: float
    observed_weight: float = 1.0
    recency: float = math.inf
    ratings: RatingScale | None = None


def user_vector(shared: Shared, client: Client, solve: UserSolve) -> jax.Array:
    """x_u, float32 ``[dim]``: the exact minimum for one client, in training or never seen before; zero if empty."""
    items, targets, real = own_items(shared, client, solve)
    age = client.length - 1 - jnp.arange(len(targets))
    fresh = jnp.where(real, jnp.exp(-age / solve.recency), 0.0)
    left = solve.observed_weight * jnp.matmul((items * fresh[:, None]).T, items, precision="highest")
    left += solve.l2 * jnp.eye(items.shape[1])
    if solve.unobserved_weight:
        left += solve.unobserved_weight * shared.dense["gram"]
    cholesky = jax.lax.linalg.cholesky(left, symmetrize_input=False)
    return jax.scipy.linalg.cho_solve((cholesky, True), (fresh * targets) @ items)


def user_vectors(shared: Shared, clients: ClientData, solve: UserSolve) -> jax.Array:
    """The vectors of all clients from the item vectors that were released last, ``[num_clients, dim]``: what training
    leaves in the private state is one sweep older. Zero for clients without data."""
    vectors = jnp.zeros((clients.num_clients, shared.tables["item"].shape[1]))
    for bucket in clients.buckets:
        found = _all_vectors(shared, jax.tree.map(jnp.asarray, bucket), solve=solve)
        vectors = vectors.at[bucket.client_id].set(found, mode="drop")
    return vectors


def targets_of(client: Client, ratings: RatingScale | None) -> jax.Array:
    """y ``[L]``: ones, or clipped and centred ratings; whatever on padding."""
    if ratings is None:
        return jnp.ones(len(client.item_ids))
    return jnp.clip(client.labels, ratings.low, ratings.high) - ratings.mean


def own_items(shared, client, solve):
    """Vectors ``[L, dim]`` and targets ``[L]`` of a client's items, zero on padding; which are real."""
    if client.slots is not None:
        raise ValueError("DPALS wants each item of a client once: lay the clients out with client_data(...).")
    real = jnp.arange(len(client.item_ids)) < client.length
    items = jnp.where(real[:, None], take_rows(shared.tables["item"], client.item_ids), 0.0)
    targets = targets_of(client, solve.ratings)
    return items, jnp.where(real, targets, 0.0), real


@partial(jax.jit, static_argnames="solve")
def _all_vectors(shared, bucket, *, solve):
    return jax.vmap(lambda client: user_vector(shared, client, solve))(bucket)
