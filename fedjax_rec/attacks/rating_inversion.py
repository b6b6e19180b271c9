"""One round of plain matrix factorisation gives a client's ratings away: the rows it sends are one vector, scaled.

A client with ratings r_i of n items that takes one full-batch step on the squared loss moves

    q_i by  -(e_i u + l2 q_i) / n    and    b_i by  -e_i / n,    e_i = u . q_i + b_i + mean - r_i.

With the penalty's share added back, the block of its rows [bias | item] is the rank-one matrix (r - s) (1, u)^T / n. A
singular value decomposition splits it; the server knows q, b and n, so u follows from the ratio of the columns, then
the scores s, and then every rating. Where a clip has scaled the upload, or where no bias is sent, one scale stays
unknown: the attacker takes the one that puts all ratings nearest to the lattice of legal ones. (Where the received
biases are zero and 2 mean is a whole number, mirrored ratings are on the lattice too, and may be taken instead.)
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_rec.attacks.uploads import COMPILE_FAST, Uploads, leading_direction
from fedjax_rec.models.base import Shared

STARS = (1.0, 2.0, 3.0, 4.0, 5.0)
CLIP_SCALES = tuple(np.geomspace(1.0, 1e4, 1001))
"""Factors by which a clip may have shrunk an upload: steps of 0.9 % move a rating by 0.04 stars at most."""
USER_NORMS = np.geomspace(1e-3, 1e2, 1251)
"""Norms that a user vector may have, where no bias gives it."""


class Inversion(NamedTuple):
    """What came back.

    Attributes:
      ratings: float32 ``[uploads, items]``, legal ratings; NaN where no row was looked at.
      users: float32 ``[uploads, dim]``, the clients' private user vectors.
      misfit: float32 ``[uploads]``, root mean square distance to the lattice, in stars; near 0 if the attack succeeded.
    """

    ratings: np.ndarray
    users: np.ndarray
    misfit: np.ndarray


def invert_ratings(
    uploads: Uploads,
    shared: Shared,
    *,
    lengths: np.ndarray,
    rows: np.ndarray | None = None,
    l2: float = 0.0,
    label_mean: float = 0.0,
    lattice: Sequence[float] = STARS,
    scales: Sequence[float] = (1.0,),
) -> Inversion:
    """Recovers ratings and user vectors from single uploads of `fedsgd` with the squared loss.

    The attacker is the server: it knows the shared parameters it sent, the model's constants, and how many examples
    the mean in the loss was over, which are the rows of a plain upload.

    Args:
      uploads: tables "item" and, unless the model sends none, "bias".
      shared: what the clients received.
      lengths: int ``[uploads]``, n of each.
      rows: bool ``[uploads, items]``, rows to read; those that were sent by default.
      l2: the model's.
      label_mean: the model's.
      lattice: legal ratings, ascending.
      scales: factors by which uploads may have been shrunk: 1 alone for plain ones, `CLIP_SCALES` after a clip.

    Raises:
      ValueError: for a penalty together with unknown scales but without biases, which leaves two unknowns.
    """
    has_bias = "bias" in uploads.tables
    if l2 and len(scales) > 1 and not has_bias:
        raise ValueError("With l2 and an unknown scale, the attack needs the biases; send them or give the scale.")
    bias = uploads.tables["bias"][:, :, 0] if has_bias else np.zeros(uploads.sent.shape, np.float32)
    rows = uploads.sent if rows is None else rows
    one = partial(
        _invert,
        items=jnp.asarray(shared.tables["item"]),
        biases=jnp.asarray(shared.tables["bias"][:, 0]),
        has_bias=has_bias,
        l2=l2,
        label_mean=label_mean,
        lattice=jnp.asarray(lattice, jnp.float32),
        scales=jnp.asarray(scales, jnp.float32),
    )
    found = jax.jit(partial(jax.lax.map, lambda args: one(*args)), compiler_options=COMPILE_FAST)(
        (uploads.tables["item"], bias, rows, jnp.asarray(lengths, jnp.float32))
    )
    return Inversion(*jax.device_get(found))


def _invert(moved, bias, rows, length, *, items, biases, has_bias, l2, label_mean, lattice, scales):
    """One upload: item rows ``[items, dim]``, biases ``[items]``, rows to read bool ``[items]``, examples."""
    read = rows[:, None]
    moved, bias, length = jnp.where(read, moved, 0.0), jnp.where(rows, bias, 0.0), jnp.maximum(length, 1.0)
    if l2 and len(scales) > 1:
        # moved = bias u - c (l2 / n) q: what is orthogonal to the biases over the rows is the penalty, shrunk by c.
        known = jnp.where(read, items, 0.0)
        across, left = _without(known, bias), _without(moved, bias)
        shrunk = -jnp.vdot(across, left) / jnp.maximum(jnp.vdot(across, across), 1e-30) * length / l2
        scales = 1.0 / jnp.clip(shrunk, 1e-6, 1.0)[None]
        moved = moved + jnp.where(read, items, 0.0) * (l2 / length) / scales[0]
    elif l2:
        moved = moved + jnp.where(read, items, 0.0) * (l2 / length)
    block = jnp.concatenate([bias[:, None], moved], 1) if has_bias else moved
    along, vector = leading_direction(block)
    # Ratings of candidate k are residual_share_k (r - s) + user_share_k (v . q) + b + mean.
    if has_bias:
        head = jnp.maximum(vector[0], 1e-12)
        along, vector = along * head, vector[1:] / head
        user_shares, residual_shares = jnp.ones_like(scales), scales
    else:  # any multiple of u fits the rows, with residuals divided by it
        user_shares = jnp.asarray(np.concatenate([USER_NORMS, -USER_NORMS]), jnp.float32)
        residual_shares = scales[0] / user_shares
    scores = jnp.matmul(items, vector, precision="highest")

    def ratings_at(user_share, residual_share):
        return residual_share * (along * length) + user_share * scores + biases + label_mean

    def misfit(shares):
        ratings = ratings_at(*shares)
        return jnp.sum(jnp.where(rows, jnp.square(ratings - _nearest(ratings, lattice)), 0.0))

    misfits = jax.lax.map(misfit, (user_shares, residual_shares), batch_size=16)
    best = jnp.argmin(jnp.where(jnp.isnan(misfits), jnp.inf, misfits))
    ratings = _nearest(ratings_at(user_shares[best], residual_shares[best]), lattice)
    typical = jnp.sqrt(misfits[best] / jnp.maximum(rows.sum(), 1))
    return jnp.where(rows, ratings, jnp.nan), user_shares[best] * vector, typical


def _without(table, vector):
    """Columns of ``table`` without their part along ``vector``."""
    share = jnp.matmul(vector, table, precision="highest") / jnp.maximum(jnp.vdot(vector, vector), 1e-30)
    return table - vector[:, None] * share[None, :]


def _nearest(values, lattice):
    """The nearest legal rating, elementwise; sums of steps, which is faster than a search."""
    middle, gaps = (lattice[1:] + lattice[:-1]) / 2, lattice[1:] - lattice[:-1]
    return sum((gaps[k] * (values > middle[k]) for k in range(len(lattice) - 1)), start=lattice[0])


def share_right(ratings: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Share of each client's ratings that came back right, mean over clients and standard error.

    Args:
      ratings: float ``[clients, items]``, guesses; NaN is wrong.
      truth: float ``[clients, items]``, NaN where the client rated nothing.
    """
    rated = ~np.isnan(truth)
    right = ((ratings == truth) & rated).sum(1) / np.maximum(rated.sum(1), 1)
    return float(right.mean()), float(right.std(ddof=1)) / len(right) ** 0.5
