"""How many users have each pair, and each triple, of items: exact counts, in blocks."""

from collections.abc import Iterator

import numpy as np
import scipy.sparse as sp

from fedjax_rec.data.interactions import Interactions

BLOCK_ITEMS = 2048
_MOST_CELLS = 1e8  # of indicators held densely, four bytes each
_MOST_TRIPLES = 1e12  # multiplications


def indicators(interactions: Interactions, keep: np.ndarray | None = None) -> sp.csr_matrix:
    """float32 ``[users, items]`` of the rows kept; exact in sums up to 16 million users."""
    rows = interactions if keep is None else interactions.take(keep)
    shape = (interactions.num_users, interactions.num_items)
    return sp.csr_matrix((np.ones(rows.num_interactions, np.float32), rows.item_ids, rows.offsets), shape)


def pair_supports(x: sp.csr_matrix) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks of X^T X over the items that occur: the first item's place, and float32 ``[block, items that occur]``."""
    x = x[:, np.flatnonzero(np.bincount(x.indices, minlength=x.shape[1]))]
    dense = x.shape[0] * x.shape[1] <= _MOST_CELLS
    rows = x.toarray() if dense else x
    for start in range(0, x.shape[1], BLOCK_ITEMS):
        block = rows[:, start : start + BLOCK_ITEMS].T @ rows
        yield start, block if dense else block.toarray()


def triple_supports(x: sp.csr_matrix) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For each item, the items it shares users with that come later, and the supports of its triples with two of them.

    Items come in the order of their support, so that popular ones have few later ones. Supports are float32
    ``[later, later]``, zero but above the diagonal.
    """
    counts = np.bincount(x.indices, minlength=x.shape[1])
    order = np.argsort(counts, kind="stable")[np.count_nonzero(counts == 0) :]
    rows = sp.csr_matrix(x[:, order])
    columns = sp.csc_matrix(rows)
    records = [rows[columns.indices[columns.indptr[i] : columns.indptr[i + 1]]] for i in range(len(order))]
    later = [np.unique(record.indices[record.indices > i]) for i, record in enumerate(records)]
    work = sum(record.shape[0] * float(len(others)) ** 2 for record, others in zip(records, later, strict=True))
    if work > _MOST_TRIPLES:
        raise ValueError(
            f"Listing the triples of {len(order)} items takes {work:.1g} multiplications, more than "
            f"{_MOST_TRIPLES:.1g}; take m = 2, or keep only popular items."
        )
    for item, (record, others) in enumerate(zip(records, later, strict=True)):
        dense = record[:, others].toarray()
        yield int(order[item]), order[others], np.triu(dense.T @ dense, 1)
