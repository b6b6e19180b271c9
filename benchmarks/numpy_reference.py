"""One round of the benchmark's work in plain NumPy, float64: the answer that a fast program must give to be compared.

It is written for reading and not for speed, and shares no code with the library. The gradients are by hand: for a batch
of n examples with logits z = items[x] @ out + bias and residual r = (sigmoid(z) - y) / n of the mean cross-entropy,

    d/d items[i] = sum of r over the examples of item i, times out      d/d out = r @ items[x]      d/d bias = sum of r
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from benchmarks.workload import BATCH_SIZE, LEARNING_RATE

Params = Mapping[str, np.ndarray]


class Update(NamedTuple):
    """What one client sends, trained minus received, float64; items that it never saw have no row.

    Attributes:
      ids: int64 `[rows]`, distinct item ids.
      rows: `[rows, dim]`.
      out: `[dim]`.
      bias: `[]`.
    """

    ids: np.ndarray
    rows: np.ndarray
    out: np.ndarray
    bias: np.ndarray


def client_update(params: Params, item_ids: np.ndarray, labels: np.ndarray) -> Update:
    """One local epoch of SGD in batches of 256, in the given order.

    Args:
      params: items `[num_items, dim]`, out `[dim]` and bias `[]`.
      item_ids: whole numbers `[n]`; an item that comes up twice in a batch gets both gradients.
      labels: 0 or 1, `[n]`.

    Returns:
      The `Update`.
    """
    ids, places = np.unique(item_ids, return_inverse=True)
    received = np.float64(params["items"][ids]), np.float64(params["out"]), np.float64(params["bias"])
    rows, out, bias = received
    for start in range(0, len(places), BATCH_SIZE):
        x, y = places[start : start + BATCH_SIZE], labels[start : start + BATCH_SIZE]
        residual = (_sigmoid(rows[x] @ out + bias) - y) / len(y)
        row_gradient = np.outer(np.bincount(x, weights=residual, minlength=len(ids)), out)
        out_gradient = residual @ rows[x]
        rows = rows - LEARNING_RATE * row_gradient
        out = out - LEARNING_RATE * out_gradient
        bias = bias - LEARNING_RATE * residual.sum()
    return Update(ids, rows - received[0], out - received[1], bias - received[2])


def clip(update: Update, l2_clip_norm: float) -> Update:
    """Scales the whole update so that its joint l2 norm, over rows and dense leaves, is at most `l2_clip_norm`."""
    norm = np.sqrt((update.rows**2).sum() + (update.out**2).sum() + update.bias**2)
    scale = l2_clip_norm / max(norm, l2_clip_norm)
    return Update(update.ids, update.rows * scale, update.out * scale, update.bias * scale)


def fedavg_round(
    params: Params,
    clients: Iterable[tuple[np.ndarray, np.ndarray]],
    *,
    weights: np.ndarray | None = None,
    l2_clip_norm: float | None = None,
) -> dict[str, np.ndarray]:
    """One round in which every client takes part, without noise.

    Args:
      params: items `[num_items, dim]`, out `[dim]` and bias `[]`, of any float type.
      clients: each client's `(item_ids [n], labels [n])`, such as a `Workload`.
      weights: `[num_clients]`, the share of each client in the mean in any unit; None = uniform.
      l2_clip_norm: clips every client's update to this joint norm; None = no clipping.

    Returns:
      The parameters after the round, float64.

    Raises:
      ValueError: there is no client, there are not as many weights as clients, or the clip norm is not above zero.
    """
    clients = list(clients)
    weights = np.ones(len(clients)) if weights is None else np.asarray(weights, np.float64)
    if not clients or len(weights) != len(clients):
        raise ValueError(f"A round needs clients and one weight for each, not {len(clients)} and {len(weights)}.")
    if l2_clip_norm is not None and not l2_clip_norm > 0:
        raise ValueError(f"l2_clip_norm={l2_clip_norm} must be above zero; pass None for no clipping.")
    new = {name: np.array(value, np.float64) for name, value in params.items()}
    for (item_ids, labels), weight in zip(clients, weights / weights.sum(), strict=True):
        update = client_update(params, item_ids, labels)
        if l2_clip_norm is not None:
            update = clip(update, l2_clip_norm)
        new["items"][update.ids] += weight * update.rows
        new["out"] += weight * update.out
        new["bias"] += weight * update.bias
    return new


def max_abs_difference(params: Params, expected: Params) -> float:
    """The largest absolute difference of any parameter; NaN anywhere gives NaN."""
    # np.max, because Python's max forgets a NaN that is not the first.
    return float(np.max([np.max(np.abs(np.asarray(params[name]) - value)) for name, value in expected.items()]))


def _sigmoid(z: np.ndarray) -> np.ndarray:
    """The logistic function by tanh, which neither over- nor underflows."""
    return 0.5 * (1.0 + np.tanh(0.5 * z))
