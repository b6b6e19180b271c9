"""Sums that are taken on the host, by objects that hold real keys, while the round goes on in its jitted program.

A chunk's words leave the program by a callback, are masked or encrypted client by client, and are added up as they
come; the sum comes back at the end of the round. What they add is what `ring_sum` adds, so training is the same, bit
for bit.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from fedjax_rec.federated.rows import to_dense, zero_total
from fedjax_rec.federated.transforms import Summation, UpdateTransform
from fedjax_rec.security.masks import survivors_of
from fedjax_rec.security.ring import to_words, words_server
from fedjax_rec.security.simulated import check_dropout, sum_metrics


class NoSum(Exception):
    """The round gives no sum: too few clients are left, or a party refused."""


class SumSession(Protocol):
    """Takes one round's sum at a time."""

    def begin(self, client_ids: Sequence[int], dropped: Sequence[int], round_index: int, num_words: int) -> None:
        """A round of these clients begins, of whom some will not send."""

    def upload(self, client_id: int, words: np.ndarray) -> None:
        """One client sends its words, uint32 ``[num_words]``."""

    def finish(self) -> np.ndarray:
        """The sum of all words sent, modulo 2^32, uint32 ``[num_words]``; or it raises `NoSum`."""


class _Prepared(NamedTuple):
    in_cohort: jax.Array
    survives: jax.Array
    round_index: jax.Array


def host_sum(session: SumSession, *, min_clients: int, dropout_prob: float = 0.0) -> UpdateTransform:
    """The last link of a chain: the integers of an earlier `fixed_point` are summed by ``session``.

    A round without a sum gives zeros, and the metric ``secure_sum_refused`` is 1.

    Args:
      session: who sums.
      min_clients: fewer survivors get no sum.
      dropout_prob: chance of each client to drop out before it sends; who does is the same as in
        `simulated_secure_sum` with the same keys.
    """
    check_dropout(min_clients, dropout_prob)
    host = _Host(session)

    def prepare(state, context, key):
        drop_key, _ = jax.random.split(key)
        survives = survivors_of(context.in_cohort, drop_key, dropout_prob)
        return _Prepared(context.in_cohort, survives, context.round_index)

    def zero(update):
        return _HostTotal(zero_total(update), jnp.uint32(0))

    def add(total, updates, client_ids, active, prepared):
        sends = active & prepared.survives.at[client_ids].get(mode="fill", fill_value=False)
        words = jax.vmap(_one_vector)(updates)
        chunks = io_callback(host.add, _WORD, total.chunks, words, client_ids, sends, prepared)
        return total._replace(chunks=chunks)

    def end(total, prepared):
        leaves, structure = jax.tree.flatten(total.empty)
        sizes = [x.size for x in leaves]
        shapes = (jax.ShapeDtypeStruct((sum(sizes),), jnp.uint32), jax.ShapeDtypeStruct((), jnp.bool))
        words, enough = io_callback(partial(host.finish, sum(sizes)), shapes, total.chunks)
        parts = jnp.split(words, np.cumsum(sizes)[:-1].tolist())
        parts = [part.reshape(x.shape) for part, x in zip(parts, leaves, strict=True)]
        return jax.tree.unflatten(structure, parts), sum_metrics(prepared.survives.sum(), enough)

    return UpdateTransform(
        prepare=prepare,
        client=lambda update, prepared, key: (to_words(update), {}),
        summation=Summation(zero, add, end, host=True, min_clients=min_clients, dropout_prob=dropout_prob),
        server=words_server,
    )


class _HostTotal(NamedTuple):
    """The sum is with the host: here are its shape, and how many chunks it was given, which keeps calls in order."""

    empty: Any
    chunks: jax.Array


_WORD = jax.ShapeDtypeStruct((), jnp.uint32)


def _one_vector(update):
    leaves = jax.tree.leaves(to_dense(update))
    return jnp.concatenate([x.reshape(-1) for x in leaves])


class _Host:
    """Hands chunks to a session, and remembers a refusal until the round's end asks for the sum."""

    def __init__(self, session: SumSession):
        self._session, self._refused = session, False

    def add(self, chunks, words, client_ids, sends, prepared):
        words, client_ids, sends = (np.asarray(x) for x in (words, client_ids, sends))
        try:
            if chunks == 0:
                self._refused = False
                in_cohort, survives = np.asarray(prepared.in_cohort), np.asarray(prepared.survives)
                dropped = np.flatnonzero(in_cohort & ~survives).tolist()
                cohort = np.flatnonzero(in_cohort).tolist()
                self._session.begin(cohort, dropped, int(prepared.round_index), words.shape[1])
            for vector, client, sent in zip(words, client_ids, sends, strict=True):
                if sent and not self._refused:
                    self._session.upload(int(client), vector)
        except NoSum:
            self._refused = True
        return np.uint32(chunks + 1)

    def finish(self, num_words, chunks):
        nothing = np.zeros(num_words, np.uint32), np.bool_(False)
        if chunks == 0 or self._refused:
            return nothing
        try:
            return self._session.finish(), np.bool_(True)
        except NoSum:
            return nothing
