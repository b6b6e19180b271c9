"""Full-ranking evaluation: every candidate of the catalogue against every held-out positive."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_rec.evaluation.heldout import Cases
from fedjax_rec.evaluation.lists import exposure_counts, list_metrics
from fedjax_rec.evaluation.metrics import (
    TIES,
    MetricState,
    empty_state,
    finalize,
    metric_names,
    metric_state,
    user_metrics,
)
from fedjax_rec.evaluation.ranks import Chunk, Ranks, count_ranks
from fedjax_rec.evaluation.scorers import Scorer

# Catalogues up to this size are scored at once, larger ones in blocks where the scorer can.
_LARGEST_WHOLE_CATALOGUE = 200_000
# Scores held at a time: on a CPU they should stay in the cache, a GPU or TPU wants large matrix products.
_CPU_SCORES, _ACCELERATOR_SCORES = 1 << 20, 1 << 26


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Metrics of one model on one set of cases.

    Attributes:
      values: mean over users by name, e.g. {"ndcg@10": ..., "auc": ..., "coverage@10": ...}.
      per_user: float32 `[cases]` by name, for the metrics that are means over users.
      user_ids: int32 `[cases]`.
      ranks: `better`, `tied` `[cases, P]`, `real`, `num_candidates`, as NumPy arrays; sampled metrics read them.
      exposure: float32 `[items]` by cut-off, how many top-k lists show each item; empty where no list was formed.
      num_users_without_positives: users that are in no mean.
      ties: "expected", "pessimistic" or "optimistic".
      fingerprint: of the split.
    """

    values: dict[str, float]
    per_user: dict[str, np.ndarray]
    user_ids: np.ndarray
    ranks: Ranks
    exposure: dict[int, np.ndarray]
    num_users_without_positives: int
    ties: str
    fingerprint: str

    @property
    def num_users(self) -> int:
        """Users that the means are over."""
        return len(self.user_ids)


def evaluate(
    scorer: Scorer,
    cases: Cases,
    *,
    ks: Sequence[int] = (5, 10, 20, 50),
    ties: str = "expected",
    batch_size: int | None = None,
    block_size: int | None = None,
) -> Evaluation:
    """Exact metrics over the full catalogue, at every cut-off, on device and chunked over users.

    hit, recall, recall_capped, precision, ndcg, mrr, map at each k, and auc (see `metrics.user_metrics`); coverage,
    gini, entropy, novelty at each k (see `lists.list_metrics`). A second call with the same `scorer.fn` and shapes
    compiles nothing.

    Args:
      scorer: the model.
      cases: who is asked for what.
      ks: cut-offs.
      ties: what equal scores mean for a positive: "expected", "pessimistic" or "optimistic".
      batch_size: users scored at a time; None chooses by catalogue and device. Never changes a result.
      block_size: items scored at a time; None takes all up to 200,000 items, and blocks beyond where
        `scorer.take_items` allows it. Never changes a rank, up to rounding of scores.

    Raises:
      ValueError: for a NaN score (naming the user), cut-offs that do not fit the catalogue, or unknown `ties`.
    """
    ks = check_cut_offs(ks, cases.num_items, ties=ties)
    batch_size, block_size = _sizes(scorer, cases, max(ks), batch_size, block_size)
    names = metric_names(ks)
    state = empty_state(ks=ks, num_items=cases.num_items)
    rows, outputs = [], []
    for places, chunk in chunks(cases, batch_size):
        output, state = _evaluate_chunk(
            scorer.params,
            chunk,
            state,
            fn=scorer.fn,
            take_items=scorer.take_items,
            ks=ks,
            ties=ties,
            num_items=cases.num_items,
            block_size=block_size,
        )
        rows.append(places)
        outputs.append(output)
    user_values, ranks, has_nan = gather_chunks(rows, outputs, num_cases=cases.num_cases)
    check_no_nan(has_nan, cases)
    exposure = np.asarray(state.exposure)
    values = finalize(state, ks=ks) | list_metrics(
        exposure, ks=ks, item_counts=cases.item_counts, num_train_users=cases.num_train_users
    )
    return Evaluation(
        values=values,
        per_user={name: user_values[:, column] for column, name in enumerate(names)},
        user_ids=cases.user_ids,
        ranks=ranks,
        exposure=dict(zip(ks, exposure, strict=True)),
        num_users_without_positives=cases.num_users_without_positives,
        ties=ties,
        fingerprint=cases.fingerprint,
    )


@partial(jax.jit, static_argnames=("fn", "take_items", "ks", "ties", "num_items", "block_size"))
def _evaluate_chunk(
    params, chunk: Chunk, state: MetricState, *, fn, take_items, ks, ties, num_items: int, block_size: int
):
    scorer = Scorer(fn, params, take_items)
    counted = count_ranks(scorer, chunk, num_items=num_items, list_size=max(ks), block_size=block_size)
    user_values = user_metrics(counted.ranks, ks=ks, ties=ties)
    exposure = exposure_counts(counted.top_item_ids, chunk.real, ks=ks, num_items=num_items)
    added = metric_state(user_values, real=chunk.real, exposure=exposure)
    return (user_values, counted.ranks, counted.has_nan), jax.tree.map(jnp.add, state, added)


def chunks(cases: Cases, batch_size: int) -> Iterator[tuple[np.ndarray, Chunk]]:
    """Cuts cases into chunks of one shape; yields the places of the real rows in `cases`, and the chunk.

    Users with several positives are ordered by their number, so that the counting loop of a chunk is never much longer
    than its users need.
    """
    counts = (cases.positives < cases.num_items).sum(axis=1)
    order = np.argsort(counts, kind="stable") if cases.positives.shape[1] > 1 else np.arange(cases.num_cases)
    num_seen = np.diff(cases.seen_offsets)
    batches = np.split(order, range(batch_size, cases.num_cases, batch_size))
    longest = _rounded_up(max(int(num_seen[rows].sum()) for rows in batches))
    for rows in batches:
        padded = np.concatenate([rows, np.repeat(rows[:1], batch_size - len(rows))])
        seen = num_seen[rows]
        within = np.arange(seen.sum()) - np.repeat(np.cumsum(seen) - seen, seen)
        seen_item_ids = np.full(longest, cases.num_items, np.int32)
        seen_item_ids[: len(within)] = cases.seen_item_ids[np.repeat(cases.seen_offsets[rows], seen) + within]
        seen_rows = np.full(longest, batch_size, np.int32)
        seen_rows[: len(within)] = np.repeat(np.arange(len(rows), dtype=np.int32), seen)
        yield (
            rows,
            Chunk(
                user_ids=cases.user_ids[padded],
                real=np.arange(batch_size) < len(rows),
                positives=cases.positives[padded],
                seen_rows=seen_rows,
                seen_item_ids=seen_item_ids,
                num_seen=num_seen[padded].astype(np.int32),
            ),
        )


def _rounded_up(size: int) -> int:
    """At most 1/4 larger, on a coarse grid: validation and test of one split then share a compilation."""
    step = max(1 << max(size.bit_length() - 3, 0), 256)
    return -(-size // step) * step


def gather_chunks(rows: list[np.ndarray], outputs: list, *, num_cases: int) -> Any:
    """Device outputs of all chunks, `[B, ...]` each, as NumPy arrays `[cases, ...]` in the order of the cases."""

    def gather(*parts):
        gathered = np.empty((num_cases, *parts[0].shape[1:]), parts[0].dtype)
        for places, part in zip(rows, parts, strict=True):
            gathered[places] = np.asarray(part)[: len(places)]
        return gathered

    return jax.tree.map(gather, *outputs)


def check_cut_offs(ks: Sequence[int], num_items: int, *, ties: str) -> tuple[int, ...]:
    """Cut-offs ascending and distinct, as static values.

    Raises:
      ValueError: for a cut-off below 1 or above the number of items, or for unknown `ties`.
    """
    if ties not in TIES:
        raise ValueError(f"Unknown ties {ties!r}; choose one of {', '.join(TIES)}.")
    ks = tuple(sorted({int(k) for k in ks}))
    if not ks or ks[0] < 1 or ks[-1] > num_items:
        raise ValueError(
            f"Cut-offs must lie between 1 and the {num_items} items to rank, and are {list(ks)}; choose smaller ks."
        )
    return ks


def check_no_nan(has_nan: np.ndarray, cases: Cases) -> None:
    """Raises a ValueError that names a user with a NaN score."""
    if has_nan.any():
        raise ValueError(
            f"The model gives NaN scores to {has_nan.sum()} of {cases.num_cases} users, first to user id "
            f"{cases.user_ids[has_nan][0]}; training has diverged (lower the learning rate) or scores divide by zero."
        )


def _sizes(
    scorer: Scorer, cases: Cases, list_size: int, batch_size: int | None, block_size: int | None
) -> tuple[int, int]:
    budget = _CPU_SCORES if jax.default_backend() == "cpu" else _ACCELERATOR_SCORES
    if block_size is None:
        in_blocks = cases.num_items > _LARGEST_WHOLE_CATALOGUE and scorer.take_items is not None
        block_size = max(math.isqrt(budget) * 16, 1) if in_blocks else cases.num_items
    if block_size < cases.num_items and scorer.take_items is None:
        raise ValueError(
            f"Scoring {block_size} of {cases.num_items} items at a time needs a scorer with take_items; use "
            "factor_scorer, or leave block_size out."
        )
    block_size = min(block_size, cases.num_items)
    if batch_size is None:
        per_user = max(block_size, cases.positives.shape[1] * list_size)  # scores, and ranks of every positive
        batches = -(-cases.num_cases // max(budget // per_user, 8))
        batch_size = -(-cases.num_cases // batches)  # equal shares: little padding in the last one
    return min(max(batch_size, 1), cases.num_cases), block_size
