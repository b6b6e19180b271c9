"""Rounds about a public subset of the items: what clients send, and if wanted receive, is those rows alone."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_rec.compression.tables import (
    Draw,
    check_share,
    check_tables,
    draw_at,
    draw_uniformly,
    num_sent,
    pick,
    put_back,
    resized,
    table_shape,
)
from fedjax_rec.federated.transforms import UpdateTransform, Wire


def item_subset(
    share: float, *, weights: Sequence[float] | None = None, unbiased: bool = True, receive: bool = False
) -> UpdateTransform:
    """Sends the rows of k of n items, drawn in each round by public randomness; rows of other items are dropped.

    The payload optimisation of Khan et al., 2021, "A Payload Optimization Method for Federated Recommender Systems",
    with draws that look at no reward instead of their bandit: alike for all items, or with a probability pi_i of being
    drawn that is proportional to a public weight, as far as no pi_i passes 1 (systematic sampling: Madow, 1949, "On
    the Theory of Systematic Sampling, II"). ``unbiased`` divides what comes of item i by pi_i.

    A client sends a dense ``[k, dim]`` block of each table, with zeros for rows that it has not touched, so its shape
    says nothing about it. Dense leaves are sent whole.

    What is counted: uploads are the block, without ids. Downloads are those of the method unless ``receive`` is True;
    then clients are sent the k rows and find zeros in place of all others, which is what the download counts. With a
    matrix factorisation a zero row trains nothing (its score and its gradient for the user are zero), so clients train
    on the subset alone; a network's input of zeros still trains its layers.

    Privacy: as for `rand_k`; noise must come after this link if it is unbiased. Weights must be public: popularity
    that was counted in the same interactions is not, unless a private release gave it (`dp_popularity`).

    Args:
      share: k / n, in (0, 1]; k is rounded, and at least one.
      weights: float ``[n]``, positive and public; None for equal ones.
      unbiased: whether the server divides by pi_i, or takes the rows as they are.
      receive: whether clients receive the subset alone, too.

    Raises:
      ValueError: for a share or weights out of range, weights of another number than a table has rows, or behind a
        link that sends no whole tables.
    """
    check_share("share", share)
    probs = None if weights is None else inclusion_probs(weights, num_sent(share, len(weights)))

    def prepare(state, context, key):
        del state
        tables = context.shared.tables
        if probs is not None:
            _check_weights(len(probs), tables)
            return dict.fromkeys(tables, draw_systematically(key, probs))
        sizes = sorted({len(table) for table in tables.values()})
        by_size = {n: draw_uniformly(jax.random.fold_in(key, n), n, num_sent(share, n)) for n in sizes}
        return {name: by_size[len(table)] for name, table in tables.items()}

    def broadcast(shared, draws):
        if not receive:
            return shared

        def only_drawn(table, draw):
            return jnp.where((draw.place < len(draw.ids))[:, None], table, 0)

        return shared._replace(tables={name: only_drawn(x, draws[name]) for name, x in shared.tables.items()})

    def client(update, draws, key):
        del key
        check_tables(update, {name: len(draw.place) for name, draw in draws.items()}, "item_subset")
        return update._replace(tables={name: pick(leaf, draws[name]) for name, leaf in update.tables.items()}), {}

    def server(total, draws, key):
        del key

        def rows(x, draw):
            table = put_back(x, draw)
            if not unbiased:
                return table
            return table * (len(table) / len(x)) if probs is None else table / probs[:, None].astype(np.float32)

        return total._replace(tables={name: rows(x, draws[name]) for name, x in total.tables.items()}), ()

    def block(wire: Wire, update) -> Wire:
        shapes = {name: table_shape(leaf) for name, leaf in update.tables.items()}
        return resized(wire, update, {name: num_sent(share, n) * dim for name, (n, dim) in shapes.items()})

    links = {"prepare": prepare, "broadcast": broadcast, "client": client, "server": server, "upload": block}
    links["decodes"] = unbiased
    return UpdateTransform(**links, **({"download": block} if receive else {}))


def inclusion_probs(weights: Sequence[float], k: int) -> np.ndarray:
    """Probabilities of being drawn, float64 ``[n]`` with sum k: proportional to the weights, and 1 where that is more.

    Raises:
      ValueError: unless all weights are positive and finite.
    """
    weights = np.asarray(weights, np.float64)
    if weights.ndim != 1 or not np.all((weights > 0) & (weights < np.inf)):
        raise ValueError("weights must be one positive, finite number for each item; smooth counts, e.g. add 1.")
    probs = np.minimum(1.0, k * weights / weights.sum())
    while True:
        rest = probs < 1
        left = k - np.sum(~rest)
        scaled = np.where(rest, left * weights / max(weights[rest].sum(), np.finfo(float).tiny), 1.0)
        if not np.any(scaled[rest] > 1):
            return scaled
        probs = np.minimum(1.0, scaled)


def draw_systematically(key: jax.Array, probs: np.ndarray) -> Draw:
    """As many entries as the probabilities sum to, each drawn with exactly its own.

    With cumulative sums C_i in a fixed random order and one uniform u, entry i is drawn where floor(C_i + u) steps up.
    The sums are split into whole and fractional parts on the host, so that float32 keeps both.
    """
    order = np.random.default_rng(0).permutation(len(probs))  # neighbours in the order are rarely drawn together
    cumulative = np.cumsum(probs[order])
    k = round(cumulative[-1])
    cumulative[-1] = k
    whole = np.floor(cumulative).astype(np.int32)
    # The largest float32 below 1 stands for fractions that would round up to it.
    fraction = np.minimum((cumulative - whole).astype(np.float32), np.nextafter(np.float32(1), np.float32(0)))
    u = jax.random.uniform(key)
    reached = jnp.asarray(whole) + (jnp.asarray(fraction) + u >= 1)
    before = jnp.concatenate([jnp.zeros(1, reached.dtype), reached[:-1]])
    place = jnp.where(reached > before, before, k).astype(jnp.int32)
    return draw_at(jnp.zeros(len(probs), jnp.int32).at[order].set(place), k)


def _check_weights(num: int, tables) -> None:
    for name, table in tables.items():
        if len(table) != num:
            raise ValueError(
                f"There are {num} weights, and table {name!r} has {len(table)} rows; give one for each row."
            )
