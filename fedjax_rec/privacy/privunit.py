"""PrivUnitG: a pure local epsilon for whole vectors, with less error than Laplace noise and no delta.

Bhowmick, Duchi, Freudiger, Kapoor and Rogers, 2018, "Protection Against Reconstruction and Its Applications in Private
Federated Learning" (PrivUnit); Asi, Feldman and Talwar, 2022, "Optimal Algorithms for Mean Estimation under Local
Differential Privacy" (PrivUnitG, the form with Gaussian numbers).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from dp_accounting.dp_event import RandomizedResponseDpEvent
from jax.flatten_util import ravel_pytree
from jax.scipy.special import ndtri
from scipy.optimize import minimize_scalar
from scipy.stats import norm

from fedjax_rec.federated.rows import Rows, is_rows, whole_size, whole_tables
from fedjax_rec.federated.transforms import Bound, UpdateTransform
from fedjax_rec.privacy.local_noise import MAX_UPDATE_BYTES, whole_wire
from fedjax_rec.privacy.noise import standard_normal

_COIN = 2**32
MOST_EPSILON = 30.0
"""Above it, the tail that a report is drawn from is rarer than coins of 32 bits resolve well."""


class PrivUnitParameters(NamedTuple):
    """How a report is drawn, for unit vectors in ``dim`` numbers; see `privunit` for the symbols.

    Attributes:
      epsilon: that the rounded numbers below really have; at most the one asked for.
      threshold: t.
      tail_prob: q, P[N(0, 1) >= t].
      top_prob: p, a multiple of 2^-32.
      scale: m, E[report] = v before the report is divided by it.
      squared_error: E|report - v|^2 = (dim + t m) / m^2 - 1.
    """

    epsilon: float
    threshold: float
    tail_prob: float
    top_prob: float
    scale: float
    squared_error: float


def privunit_parameters(epsilon: float, *, dim: int) -> PrivUnitParameters:
    """The threshold of least squared error at an epsilon, found numerically on the host.

    With ``r = e^epsilon``, epsilon fixes p by ``p / (1 - p) = r q / (1 - q)``, so t is all there is to choose.

    Args:
      epsilon: in (0, ``MOST_EPSILON``].
      dim: length of the unit vectors, at least 2.

    Raises:
      ValueError: if epsilon is out of range.
    """
    if not 0 < epsilon <= MOST_EPSILON:
        raise ValueError(f"The epsilon of PrivUnit must be above 0 and at most {MOST_EPSILON:g}; got {epsilon}.")
    if dim < 2:
        raise ValueError(f"PrivUnit needs unit vectors of at least 2 numbers; got {dim}.")

    def at(threshold):
        tail = norm.sf(threshold)
        odds = math.exp(epsilon) * tail / norm.cdf(threshold)
        top = math.floor(odds / (1 + odds) * _COIN) / _COIN  # rounded down: never less private
        scale = norm.pdf(threshold) * (top / tail - (1 - top) / norm.cdf(threshold))
        error = (dim + threshold * scale) / scale**2 - 1 if scale > 0 else math.inf
        spent = math.log(top / (1 - top) * norm.cdf(threshold) / tail) if scale > 0 else 0.0
        return PrivUnitParameters(spent, threshold, tail, top, scale, error)

    grid = np.linspace(-1.0, math.sqrt(2 * epsilon) + 3.0, 200)
    best = int(np.argmin([at(t).squared_error for t in grid]))
    around = (grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)])
    found = at(float(minimize_scalar(lambda t: at(t).squared_error, bounds=around, method="bounded").x))
    if not found.scale > 0:
        raise ValueError(f"An epsilon of {epsilon} is too small for coins of 32 bits: nothing would be said.")
    return found


def privunit(
    epsilon: float, *, l2_norm: float, num_numbers: int, max_update_bytes: int = MAX_UPDATE_BYTES
) -> UpdateTransform:
    """Every client sends an unbiased random vector of the whole update's shape, pure epsilon-locally private.

    All numbers of the update, tables written out whole, are one vector x with |x| <= C. It becomes the unit vector
    ``v = (x, sqrt(C^2 - |x|^2)) / C`` of d = D + 1 numbers. For a threshold t with ``q = P[N(0, 1) >= t]``, the client
    draws a from N(0, 1) given a >= t with probability p, else from N(0, 1) given a < t, and a standard normal g, and
    sends the first D numbers of

        (C / m) (a v + g - (g . v) v),      m = E[a] = phi(t) (p / q - (1 - p) / (1 - q)).

    Its mean is x, since E[a] = m; its squared error is ``C^2 ((d + t m) / m^2 - 1)``, less what the last number had.

    Guarantee: user-level; replace-one; pure epsilon; released is one client's report of one round, to anybody. Before
    the division by m, y = a v + g - (g . v) v is standard normal, but that the side ``y . v >= t`` has probability p
    instead of q. Its density is the standard normal one times p / q on that side and (1 - p) / (1 - q) on the other,
    whatever v is, so between two clients it differs by at most

        e^epsilon = p (1 - q) / (q (1 - p)),

    and by just that where y is on v's side and not on v''s. A mechanism of pure epsilon is dominated by randomised
    response of two buckets with that epsilon (Kairouz, Oh and Viswanath, 2015, "The Composition Theorem for
    Differential Privacy"), which is the event. All of it holds up to float32 rounding. A vector outside of the ball
    would still be private, but its report biased.

    Args:
      epsilon: of one report, in (0, ``MOST_EPSILON``].
      l2_norm: C, in units of the update; the clip before this link, or more.
      num_numbers: D, of the whole update: table sizes and dense leaves. Public.
      max_update_bytes: as in `local_gaussian`.

    Raises:
      ValueError: for numbers out of range; from `chain`, if no earlier link bounds the L2 norm by ``l2_norm``; when a
        round is made, if the update is too large or has another size than ``num_numbers``.
    """
    if not 0 < l2_norm < math.inf or num_numbers < 1:
        raise ValueError(f"l2_norm and num_numbers must be positive; got {l2_norm} and {num_numbers}.")
    chosen = privunit_parameters(epsilon, dim=num_numbers + 1)
    event = RandomizedResponseDpEvent(2 / (1 + math.exp(chosen.epsilon)), 2)

    def client(update, state, key):
        del state
        leaves, structure = jax.tree.flatten(whole_tables(update), is_leaf=is_rows)
        vector, unravel = ravel_pytree([leaf.values if is_rows(leaf) else leaf for leaf in leaves])
        values = unravel(l2_norm * _report(vector / l2_norm, chosen, key)[:-1])
        leaves = [
            Rows(leaf.ids, value, leaf.num_rows, whole=True) if is_rows(leaf) else value
            for leaf, value in zip(leaves, values, strict=True)
        ]
        return jax.tree.unflatten(structure, leaves), {}

    def sensitivity(bound):
        if bound.noised or not bound.l2 <= l2_norm:
            raise ValueError(
                f"privunit needs an earlier link that bounds the L2 norm by {l2_norm:g}, and got a bound of "
                f"{bound.l2:g}: put clip_by_global_norm({l2_norm:g}) before it."
            )
        # The noise depends on the vector's direction and is unbounded, so nothing is left of the incoming bound.
        return Bound(noised=True)

    def upload(wire, update):
        del wire
        if whole_size(update) != num_numbers:
            raise ValueError(
                f"The whole update has {whole_size(update):,} numbers, and privunit was made for {num_numbers:,}."
            )
        return whole_wire(update, max_bytes=max_update_bytes)

    return UpdateTransform(
        client=client,
        sensitivity=sensitivity,
        local_dp_event=lambda bound, round_index: event,
        upload=upload,
    )


def _report(inside: jax.Array, chosen: PrivUnitParameters, key: jax.Array) -> jax.Array:
    """A report of a vector ``[D]`` in the unit ball, float32 ``[D + 1]``, whose mean is the vector on the sphere."""
    last = jnp.sqrt(jnp.maximum(1.0 - jnp.sum(jnp.square(inside)), 0.0))
    vector = jnp.append(inside, last)
    vector /= jnp.linalg.norm(vector)  # of norm 1 whatever came in: the guarantee does not rest on the clip
    coin_key, along_key, across_key = jax.random.split(key, 3)
    top = jax.random.bits(coin_key, (), jnp.uint32) < jnp.uint32(round(chosen.top_prob * _COIN))
    uniform = 1.0 - jax.random.uniform(along_key)  # in (0, 1]
    # Both from the lower tail, where float32 is finely spaced.
    above = jnp.maximum(-ndtri(chosen.tail_prob * uniform), chosen.threshold)
    below = jnp.minimum(ndtri((1.0 - chosen.tail_prob) * uniform), chosen.threshold)
    along = jnp.where(top, above, below)
    across = standard_normal(across_key, vector.shape)
    return (across + (along - jnp.dot(across, vector, precision="highest")) * vector) / chosen.scale
