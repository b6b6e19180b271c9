"""Exact ranks by counting, on device, for one chunk of users.

A positive's place is decided by two counts over all candidates: `better`, those with a larger score, and `tied`, the
others with the same score. No list is sorted, so every cut-off comes from the same two integers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_rec.evaluation.scorers import Scorer


class Chunk(NamedTuple):
    """Cases of a fixed number of users, as they go to the device."""

    user_ids: jax.Array  # int32 [B]; a padded row repeats a real user
    real: jax.Array  # bool [B], False = padding
    positives: jax.Array  # int32 [B, P], padded with num_items
    seen_rows: jax.Array  # int32 [S], row of each masked item, padded with B
    seen_item_ids: jax.Array  # int32 [S]
    num_seen: jax.Array  # int32 [B]


class Ranks(NamedTuple):
    """What every rank metric is computed from.

    Positives of one user with equal scores have equal `better`, and only they do.
    """

    better: jax.Array  # int32 [B, P], candidates (other positives included) with a larger score
    tied: jax.Array  # int32 [B, P], other candidates with the same score
    real: jax.Array  # bool [B, P], False = padding
    num_candidates: jax.Array  # int32 [B], catalogue less masked items


class Counted(NamedTuple):
    """Ranks and lists of one chunk."""

    ranks: Ranks
    top_item_ids: jax.Array  # int32 [B, K], best first; num_items where a list is shorter
    has_nan: jax.Array  # bool [B]


class _Found(NamedTuple):
    """What a first look at every score gathers."""

    positive_scores: jax.Array  # float32 [B, P]
    top_scores: jax.Array  # float32 [B, K]
    top_item_ids: jax.Array  # int32 [B, K]
    has_nan: jax.Array  # bool [B]


class _Block(NamedTuple):
    """Scores of the items `start .. start + size - 1`; those before `fresh` were in the block before."""

    scores: jax.Array  # float32 [B, size], -inf for masked items and those before `fresh`
    start: jax.Array | int
    fresh: jax.Array | int
    has_nan: jax.Array  # bool [B]


def count_ranks(scorer: Scorer, chunk: Chunk, *, num_items: int, list_size: int, block_size: int) -> Counted:
    """Ranks of every positive of a chunk, and everybody's top list.

    Equal scores stand in a top list by ascending item id; ranks keep ties apart as counts. A candidate scored -inf is
    ranked behind all others but is in no list.

    Args:
      scorer: the model.
      chunk: who is asked.
      num_items: size of the catalogue.
      list_size: length K of the top lists.
      block_size: items scored at a time; `num_items` for all. Less needs `scorer.take_items`. Scores are then computed
        twice, and no array is larger than `[B, block_size]`.
    """
    num_blocks = -(-num_items // block_size)
    rows, num_positives = chunk.positives.shape
    real = chunk.positives < num_items
    found = _Found(
        jnp.full((rows, num_positives), -jnp.inf),
        jnp.full((rows, list_size), -jnp.inf),
        jnp.full((rows, list_size), num_items, jnp.int32),
        jnp.zeros(rows, bool),
    )
    zeros = jnp.zeros((rows, num_positives), jnp.int32)
    if num_blocks == 1:
        block = _score_block(scorer, chunk, start=0, fresh=0)
        found = _look(found, block, chunk)
        better, tied = _count((zeros, zeros), block, chunk, found.positive_scores, real)
    else:

        def block_at(index):
            fresh = index * block_size
            start = jnp.minimum(fresh, num_items - block_size)  # the last block overlaps the one before
            params = scorer.take_items(scorer.params, start, block_size)
            return _score_block(scorer._replace(params=params), chunk, start=start, fresh=fresh)

        def count_at(index, counts):
            return _count(counts, block_at(index), chunk, found.positive_scores, real)

        found = jax.lax.fori_loop(0, num_blocks, lambda index, found: _look(found, block_at(index), chunk), found)
        better, tied = jax.lax.fori_loop(0, num_blocks, count_at, (zeros, zeros))
    # Masked items and the overlap of blocks are at -inf, so they tie with a positive that is scored -inf itself.
    num_masked = chunk.num_seen + (num_blocks * block_size - num_items)
    tied = tied - jnp.where(found.positive_scores == -jnp.inf, num_masked[:, None], 0)
    better, tied = jnp.where(real, better, 0), jnp.where(real, tied, 0)
    lists = jnp.where(found.top_scores > -jnp.inf, found.top_item_ids, num_items)
    return Counted(Ranks(better, tied, real, num_items - chunk.num_seen), lists, found.has_nan & chunk.real)


def _score_block(scorer: Scorer, chunk: Chunk, *, start: jax.Array | int, fresh: jax.Array | int) -> _Block:
    scores = scorer.fn(scorer.params, chunk.user_ids).astype(jnp.float32)
    size = scores.shape[1]
    columns = chunk.seen_item_ids - start
    columns = jnp.where(columns < 0, size, columns)  # a negative index would wrap
    # Scattering a few hundred ids a user costs less than reading a [B, items] mask.
    masked = scores.at[chunk.seen_rows, columns].set(-jnp.inf, mode="drop")
    if not isinstance(start, int):
        masked = jnp.where((start + jnp.arange(size) >= fresh)[None, :], masked, -jnp.inf)
    return _Block(masked, start, fresh, jnp.isnan(scores).any(axis=1))


def _own_scores(block: _Block, chunk: Chunk) -> tuple[jax.Array, jax.Array]:
    """Scores of the positives that are met for the first time in this block, and which those are; both [B, P]."""
    size = block.scores.shape[1]
    columns = chunk.positives - block.start
    inside = (chunk.positives >= block.fresh) & (columns < size)
    return jnp.take_along_axis(block.scores, jnp.clip(columns, 0, size - 1), axis=1), inside


def _look(found: _Found, block: _Block, chunk: Chunk) -> _Found:
    own, inside = _own_scores(block, chunk)
    list_size = found.top_scores.shape[1]
    top, places = jax.lax.top_k(block.scores, min(list_size, block.scores.shape[1]))
    # Earlier blocks come first, so that equal scores stay in the order of item ids.
    scores = jnp.concatenate([found.top_scores, top], axis=1)
    item_ids = jnp.concatenate([found.top_item_ids, (block.start + places).astype(jnp.int32)], axis=1)
    top, places = jax.lax.top_k(scores, list_size)
    return _Found(
        jnp.where(inside, own, found.positive_scores),
        top,
        jnp.take_along_axis(item_ids, places, axis=1),
        found.has_nan | block.has_nan,
    )


def _count(counts, block, chunk, positive_scores, real):
    """Adds a block to `better` and `tied` [B, P]; the loop ends at the largest number of positives in the chunk."""

    def one(place, counts):
        better, tied = counts
        against = jax.lax.dynamic_slice_in_dim(positive_scores, place, 1, axis=1)
        larger = (block.scores > against).sum(axis=1, dtype=jnp.int32)
        equal = (block.scores == against).sum(axis=1, dtype=jnp.int32)
        return better.at[:, place].add(larger), tied.at[:, place].add(equal)

    better, tied = jax.lax.fori_loop(0, real.sum(axis=1).max(), one, counts)
    # The positive itself leaves by its index: comparing it with its own score, computed twice, might fail by rounding.
    own, inside = _own_scores(block, chunk)
    itself = inside & real
    return better - (itself & (own > positive_scores)), tied - (itself & (own == positive_scores))
