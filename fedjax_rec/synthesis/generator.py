"""What a generator of virtual users is: released numbers, and a pure function of one virtual user.

    history of virtual user i = draw(params, length_i, fold_in(key, i))

Everything that a generator knows of real users is in `params`, and that was released. Drawing needs no data, so it
costs no epsilon however often it is done: it is post-processing. There is no way from here to a real user's row, and
none to the posterior of an encoder on it.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_rec.privacy.ledger import Entry

_NARROW = 256  # items


class Generator(NamedTuple):
    """A fitted generator of virtual users. Exactly one of `scores` and `sequence` is given.

    Attributes:
      name: "gram", "vae", "gan", ...
      num_items: size of the public catalogue.
      params: pytree of arrays, all released; nothing in it has a row for each user.
      scores: ``(params, key) -> float32 [num_items]`` of one virtual user, randomness and temperature included: the
        items of its history are the top ones, as many as the history is long.
      sequence: ``(params, length, key, max_length) -> int32 [max_length]``, one virtual user's items in time order, all
        different, padded with ``num_items``; ``length`` is a traced int32 scalar.
      releases: what fitting released, for the ledger; empty where `private` is False.
      choices: settings, and every choice that was made; JSON values, for the data card.
      private: whether `params` are a function of noised releases alone.
    """

    name: str
    num_items: int
    params: Any
    scores: Callable[[Any, jax.Array], jax.Array] | None = None
    sequence: Callable[[Any, jax.Array, jax.Array, int], jax.Array] | None = None
    releases: tuple[Entry, ...] = ()
    choices: Mapping[str, Any] = MappingProxyType({})
    private: bool = False

    @property
    def ordered(self) -> bool:
        """Whether histories come in time order."""
        return self.sequence is not None


def draw_histories(
    generator: Generator, lengths: np.ndarray, *, key: jax.Array, batch_size: int = 256, report: Callable | None = None
) -> np.ndarray:
    """Histories of ``len(lengths)`` virtual users, int32 ``[users, longest]``, padded with ``num_items``.

    Post-processing: no epsilon. Virtual user i is drawn with ``fold_in(key, i)``, so neither the batch size nor the
    number drawn changes what it is.

    Args:
      generator: fitted.
      lengths: int ``[users]``, items of each, at least 1; longer than the catalogue is the catalogue.
      key: of all the draws.
      batch_size: virtual users at a time; bounds memory.
      report: ``(done, total)`` after every batch.

    Raises:
      ValueError: for lengths below 1, or a generator with both or neither of ``scores`` and ``sequence``.
    """
    lengths = np.minimum(np.asarray(lengths), generator.num_items).astype(np.int32)
    if lengths.ndim != 1 or (len(lengths) and lengths.min() < 1):
        raise ValueError(f"lengths must be whole numbers [users] of at least 1; got shape {lengths.shape}.")
    if (generator.scores is None) == (generator.sequence is None):
        raise ValueError(f"The generator {generator.name!r} must have either scores or a sequence.")
    longest = int(lengths.max(initial=1))
    # Compiled for two widths: most histories are short, and finding the top 2,000 takes several times as long as 256.
    widest = min(1 << math.ceil(math.log2(longest)), generator.num_items)
    drawn = np.full((len(lengths), longest), generator.num_items, np.int32)
    order = np.argsort(lengths, kind="stable").astype(np.int32)  # a batch takes as many steps as its longest history
    for start in range(0, len(lengths), batch_size):
        stop = min(start + batch_size, len(lengths))
        places, padded = np.zeros(batch_size, np.int32), np.ones(batch_size, np.int32)
        places[: stop - start] = order[start:stop]
        padded[: stop - start] = lengths[order[start:stop]]
        width = widest if padded.max() > _NARROW else min(_NARROW, widest)
        batch = _draw_batch(generator.params, places, padded, key, generator[:2] + generator[3:5], width)
        drawn[order[start:stop], : min(width, longest)] = np.asarray(batch)[: stop - start, :longest]
        if report is not None:
            report(stop, len(lengths))
    return drawn


@partial(jax.jit, static_argnames=("how", "width"))
def _draw_batch(params, places, lengths, key, how, width: int) -> jax.Array:
    _, num_items, scores, sequence = how

    def one(place, length):
        own = jax.random.fold_in(key, place)
        if sequence is not None:
            return sequence(params, length, own, width)
        return jax.lax.top_k(scores(params, own), width)[1].astype(jnp.int32)

    items = jax.vmap(one)(places, lengths)
    return jnp.where(jnp.arange(width)[None, :] < lengths[:, None], items, num_items)
