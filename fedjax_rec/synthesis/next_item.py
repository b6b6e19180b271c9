"""Virtual users with time order: a walk over items along transitions that were released.

With users' items in time order, restricted to the head (the items with the largest released counts), released are

    m = sum_u x_u / |x_u|                                                       all items
    T = sum_u C_u / |C_u|_F    C_u[i, j] = decay^(g - 1), j comes g <= reach places after i,

once each, with Gaussian noise. With shares p of m, what T holds beyond chance, D = T - |T|_1 p p^T, keeps the
singular values that stand out of the noise. A virtual user draws its next item among those it does not have yet by

    weight_j = p_j e^(g_j) max(1 + sum_a recency^a L[i_a, j] / sum_a recency^a, floor)
    L[i, j] = D_ij / (|T|_1 p_i p_j),

i_0, i_1, ... its last items, newest first, and takes the largest. The Gumbel numbers g are drawn once for a user and
not for each step: they are its taste. Were L zero, this would be draws without repeats in proportion to p.
"""

import math
from typing import NamedTuple

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
import scipy.sparse.linalg

from fedjax_rec.data.interactions import Interactions
from fedjax_rec.models.dp_gram import columns_by_user
from fedjax_rec.privacy.budget import Phase
from fedjax_rec.privacy.ledger import Entry
from fedjax_rec.synthesis.generator import Generator
from fedjax_rec.synthesis.gram import head_size, undo_shift
from fedjax_rec.synthesis.marginals import COUNTS, log_shares, release_counts
from fedjax_rec.synthesis.methods import Method

TRANSITIONS = "transitions"
RELEASED_TRANSITIONS = "sum over users of their transitions between head items at Frobenius norm 1"


class DpTransitions(NamedTuple):
    """Released transitions and what their release costs."""

    matrix: np.ndarray  # float64 [m, m], row = the earlier item, noised
    item_ids: np.ndarray  # int32 [m], the catalogue's items behind rows and columns
    dp_event: dp_accounting.DpEvent  # for the ledger
    noise_stddev: float  # of the noise in each entry


class Walk(NamedTuple):
    """Parameters of the generator: functions of what was released alone."""

    log_share: jax.Array  # float32 [items], of popularity
    earlier: jax.Array  # float32 [items, rank], what an item that was taken adds to the state
    later: jax.Array  # float32 [items, rank], L = earlier @ later.T
    recency: jax.Array  # float32 scalar
    floor: jax.Array  # float32 scalar


def next_item_method(
    *,
    rank: int = 32,
    reach: int = 10,
    decay: float = 0.9,
    recency: float = 0.9,
    floor: float = 0.1,
    counts_weight: float = 2.0,
    head: int | None = None,
) -> Method:
    """Virtual users with time order, from the two releases of the module's equation.

    Guarantee: user-level, adding or removing one user with all of its rows. Two Gaussian mechanisms on all users,
    without amplification by sampling, each of L2 sensitivity 1, at the noise multipliers of the phases "counts" and
    "transitions"; the second uses the first, which composition allows. The catalogue and the number of users with rows
    are public; everything else is post-processing of the two. The order of a user's rows is as protected as the rows
    are.

    The defaults were found on MovieLens 100K. That look is not in the epsilon of a release of it.

    Args:
      rank: the most directions that are kept, whatever stands out of the noise.
      reach: places, >= 1: how far apart two items of a user may be and still count as a transition. Sessions have no
        strict order, and more pairs make a smoother matrix.
      decay: of a pair's weight for each place more, in (0, 1].
      recency: weight of the last but one item of a virtual user in units of its last, in [0, 1).
      floor: of what the last items can take from the chance of another, > 0.
      counts_weight: noise of m in units of that of T.
      head: items of T; None = `gram.head_size`.

    Raises:
      ValueError: for numbers out of range.
    """
    if rank < 1 or reach < 1 or not 0 < decay <= 1 or not 0 <= recency < 1 or not floor > 0 or not counts_weight > 0:
        raise ValueError(
            f"next_item_method needs rank >= 1, reach >= 1, decay in (0, 1], recency in [0, 1), floor > 0 and "
            f"counts_weight > 0; got {rank}, {reach}, {decay}, {recency}, {floor} and {counts_weight}."
        )
    if head is not None and head < 2:
        raise ValueError(f"head must be at least 2 items, and is {head}.")

    def phases(num_users, num_items):
        size = head_size(num_users, num_items, 1.0) if head is None else min(head, num_items)
        return (
            Phase(COUNTS, weight=counts_weight, num_numbers=num_items),
            Phase(TRANSITIONS, weight=1.0, num_numbers=size * size),
        )

    def fit(train, noise, key, report):
        counts_key, transitions_key = jax.random.split(key)
        multipliers = {name: float(noise[name][0]) for name in (COUNTS, TRANSITIONS)}
        num_users = max(int(np.count_nonzero(train.counts_per_user)), 1)
        released = release_counts(train, noise_multiplier=multipliers[COUNTS], key=counts_key)
        report(1, 3, "item counts released")
        rule = head_size(num_users, train.num_items, multipliers[TRANSITIONS])
        size = rule if head is None else min(head, train.num_items)
        head_ids = np.sort(np.argsort(-released.clean, kind="stable")[:size])
        transitions = dp_transitions(
            train, head_ids, reach=reach, decay=decay, noise_multiplier=multipliers[TRANSITIONS], key=transitions_key
        )
        report(2, 3, f"transitions between {size} items released")
        log_share = log_shares(released.clean)
        earlier, later = _lift(transitions, np.exp(np.float64(log_share)), rank=rank)
        report(3, 3, f"{earlier.shape[1]} directions stand out of the noise")
        private = min(multipliers.values()) > 0
        entries = (
            released.entry,
            Entry(TRANSITIONS, transitions.dp_event, 1, "all", RELEASED_TRANSITIONS),
        )
        choices = {
            "rank": rank,
            "reach": reach,
            "decay": decay,
            "recency": recency,
            "floor": floor,
            "counts_weight": counts_weight,
            "noise_multipliers": multipliers,
            "head_items": size,
            "head_chosen_by": "largest entries of the released counts",
            "directions_kept": int(earlier.shape[1]),
        }
        return Generator(
            name="next-item",
            num_items=train.num_items,
            params=Walk(jnp.asarray(log_share), earlier, later, jnp.float32(recency), jnp.float32(floor)),
            sequence=_walk,
            releases=entries if private else (),
            choices=choices,
            private=private,
        )

    return Method("next-item", phases, fit)


def dp_transitions(
    train: Interactions, item_ids: np.ndarray, *, reach: int, decay: float, noise_multiplier: float, key: jax.Array
) -> DpTransitions:
    """T of the module's equation on the items ``item_ids``, plus Gaussian noise.

    A user's other items are dropped before its places are counted.

    Guarantee: user-level, adding or removing one user with all of its rows, for ``item_ids`` that are public or were
    released before and charged. Every user adds a matrix of Frobenius norm 1, or nothing if it has fewer than two of
    the items. Released is the sum plus independent noise of standard deviation ``noise_multiplier`` in each of its m^2
    entries: one Gaussian mechanism of L2 sensitivity 1 without amplification by sampling, which `dp_event` states.
    ``key`` must be secret and used for nothing else.

    Args:
      train: rows of each user in time order; repeated user-item pairs count once, where they come first.
      item_ids: int ``[m]``, distinct.
      reach: places, >= 1.
      decay: in (0, 1].
      noise_multiplier: noise standard deviation over sensitivity; 0 releases exact numbers.
      key: of the noise.

    Raises:
      ValueError: for a negative noise multiplier.
    """
    if not (noise_multiplier >= 0 and math.isfinite(noise_multiplier)):
        raise ValueError(f"noise_multiplier must be 0 or more, and is {noise_multiplier}.")
    columns, offsets = columns_by_user(train, item_ids)
    size = len(item_ids)
    counts = np.diff(offsets)
    user_ids = np.repeat(np.arange(len(counts)), counts)
    # A user's items are distinct, so no two of its pairs share an entry: n - g entries are decay^(g - 1).
    squared = sum(np.maximum(counts - gap, 0) * decay ** (2 * (gap - 1)) for gap in range(1, reach + 1))
    scale = 1.0 / np.sqrt(np.maximum(squared, 1.0))
    total = scipy.sparse.csr_matrix((size, size))
    for gap in range(1, min(reach, int(counts.max(initial=1))) + 1):
        together = user_ids[gap:] == user_ids[:-gap]
        values = scale[user_ids[gap:][together]] * decay ** (gap - 1)
        pairs = columns[:-gap][together], columns[gap:][together]
        total = total + scipy.sparse.csr_matrix((values, pairs), shape=(size, size))
    noise = np.asarray(jax.random.normal(key, (size, size), jnp.float32), np.float64)
    return DpTransitions(
        matrix=total.toarray() + noise_multiplier * noise,
        item_ids=np.asarray(item_ids, np.int32),
        dp_event=dp_accounting.GaussianDpEvent(noise_multiplier),
        noise_stddev=noise_multiplier,
    )


def _lift(released: DpTransitions, shares: np.ndarray, *, rank: int) -> tuple[jax.Array, jax.Array]:
    """Factors of L, float32 ``[items, rank]`` each: what stands out of the noise. Post-processing."""
    ids, size = released.item_ids, len(released.item_ids)
    own = shares[ids] / shares[ids].sum()
    total = max(float(released.matrix.sum()), 1.0)
    beyond = released.matrix - total * np.outer(own, own)
    left, values, right = _largest(beyond, min(rank, size))
    edge = 2 * released.noise_stddev * math.sqrt(size)  # the largest singular value, about, of the noise by itself
    above = values > edge
    root = np.sqrt(undo_shift(values[above], edge) / total)
    earlier, later = np.zeros((2, len(shares), int(above.sum())), np.float32)
    earlier[ids] = left[:, above] * root[None, :] / own[:, None]
    later[ids] = right[:, above] * root[None, :] / own[:, None]
    return jnp.asarray(earlier), jnp.asarray(later)


def _largest(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Left vectors, values and right vectors ``[m, rank]`` of the largest singular values."""
    if rank > len(matrix) // 4:
        left, values, right = np.linalg.svd(matrix)
    else:
        left, values, right = scipy.sparse.linalg.svds(matrix, rank, v0=np.ones(len(matrix)))
    order = np.argsort(-values)[:rank]
    return left[:, order], values[order], right[order].T


def _walk(params: Walk, length: jax.Array, key: jax.Array, max_length: int) -> jax.Array:
    num_items, rank = params.earlier.shape
    taste = jax.random.gumbel(key, (num_items,), jnp.float32)
    weights = jnp.exp(params.log_share + taste - jnp.max(params.log_share + taste))
    items = jnp.full(max_length, num_items, jnp.int32)

    def more(carry):
        return carry[0] < length

    def step(carry):
        place, items, weights, state, total = carry
        chances = weights * jnp.maximum(1.0 + params.later @ (state / jnp.maximum(total, 1.0)), params.floor)
        item = jnp.argmax(chances).astype(jnp.int32)
        items = items.at[place].set(item)
        weights = weights.at[item].set(-1.0)  # taken: below all others, also where those have underflowed to 0
        state = params.recency * state + params.earlier[item]
        return place + 1, items, weights, state, params.recency * total + 1.0

    start = (jnp.int32(0), items, weights, jnp.zeros(rank, jnp.float32), jnp.float32(0.0))
    return jax.lax.while_loop(more, step, start)[1]
