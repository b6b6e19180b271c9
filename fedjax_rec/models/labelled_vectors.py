"""Clients that hold labelled vectors: sentences through a frozen encoder, and the class of each.

Vectors and labels are private state of the round: they stay with their client, and one compiled program serves every
population of the same shape.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_rec.data.clients import ClientData, client_data_from_examples


class LabelledVectors(NamedTuple):
    """What clients hold, or with no client axis what one holds.

    Attributes:
      vectors: float32 ``[clients, slots, dim]``.
      labels: int32 ``[clients, slots]``; a label of -1 is an empty slot.
    """

    vectors: jax.Array
    labels: jax.Array


def deal(vectors: np.ndarray, labels: np.ndarray, *, num_clients: int, per_client: int, seed: int) -> LabelledVectors:
    """Simulated clients: the rows in an order shuffled by the seed, the first ``per_client`` to the first, and so on.

    Args:
      vectors: float ``[rows, dim]``.
      labels: int ``[rows]``.
      num_clients: clients to make.
      per_client: rows of each.
      seed: of the shuffle; rows that are left over belong to nobody.

    Raises:
      ValueError: if there are fewer rows than asked for.
    """
    wanted = num_clients * per_client
    if wanted > len(labels):
        raise ValueError(f"{num_clients} clients of {per_client} rows take {wanted}, and there are {len(labels)}.")
    rows = np.random.default_rng(seed).permutation(len(labels))[:wanted].reshape(num_clients, per_client)
    return LabelledVectors(jnp.asarray(vectors[rows], jnp.float32), jnp.asarray(labels[rows], jnp.int32))


def group_rows(vectors: np.ndarray, labels: np.ndarray, owners: np.ndarray, *, slots: int) -> LabelledVectors:
    """The rows of each owner as one client, at most ``slots`` of them, the first in the given order.

    Args:
      vectors: float ``[rows, dim]``.
      labels: int ``[rows]``.
      owners: int ``[rows]`` in 0 .. clients - 1.
      slots: rows that a client keeps; empty slots are labelled -1.
    """
    order = np.argsort(owners, kind="stable")
    counts = np.bincount(owners)
    place = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    kept, place = order[place < slots], place[place < slots]
    out = np.zeros((len(counts), slots, vectors.shape[1]), np.float32)
    own = np.full((len(counts), slots), -1, np.int32)
    out[owners[kept], place], own[owners[kept], place] = vectors[kept], labels[kept]
    return LabelledVectors(jnp.asarray(out), jnp.asarray(own))


def clients_without_items(num_clients: int) -> ClientData:
    """A population whose data is all in its private state."""
    return client_data_from_examples([(np.zeros(1, np.int64), np.ones(1))] * num_clients, num_items=1)


def empty(num_slots: int, dim: int) -> LabelledVectors:
    """One client with nothing, as an algorithm's ``init_private`` gives it."""
    return LabelledVectors(jnp.zeros((num_slots, dim)), jnp.full(num_slots, -1, jnp.int32))
