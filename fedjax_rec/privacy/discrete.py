"""Integer mechanisms as links of the chain: updates rounded to a grid, discrete Gaussian or Skellam noise."""

import dataclasses
import math
from collections.abc import Callable

import dp_accounting
import jax
import jax.numpy as jnp

from fedjax_rec.federated.rows import is_rows
from fedjax_rec.federated.transforms import UNBOUNDED, Bound, UpdateTransform, chain
from fedjax_rec.privacy.mechanisms import add_noise, check_noise_multiplier, clip_by_global_norm
from fedjax_rec.privacy.noise import check_integer_stddev, discrete_gaussian, skellam
from fedjax_rec.privacy.skellam import SkellamDpEvent

LARGEST_SUM = 2**24
"""Up to here float32 holds every integer, so that sums are exact in any order."""

# For what float32 adds to the norms of the clip and of the integers; so the bound after rounding has no exceptions.
_LEEWAY = 1 + 1e-5
_BETA = math.exp(-0.5)


def rounded_norm_bound(l2_norm, num_numbers: int, *, beta: float = _BETA):
    """The L2 norm that a rounded vector is redrawn for, in steps of the grid.

    ``min(c + sqrt(d), sqrt(c^2 + d / 4 + sqrt(2 log(1 / beta)) (c + sqrt(d) / 2)))``: the first always holds, the
    second with a probability of at least ``1 - beta`` (Kairouz, Liu, Steinke, 2021, "The Distributed Discrete Gaussian
    Mechanism for Federated Learning with Secure Aggregation", Section 4.1, with their beta of exp(-1/2)).

    Args:
      l2_norm: c, the norm before rounding in steps of the grid; a number or a float32 scalar.
      num_numbers: d, how many numbers are rounded.
      beta: in (0, 1].
    """
    root, minimum, sqrt = math.sqrt(num_numbers), jnp.minimum, jnp.sqrt
    if isinstance(l2_norm, float | int):
        minimum, sqrt = min, math.sqrt
    squared = l2_norm**2 + num_numbers / 4 + math.sqrt(2 * math.log(1 / beta)) * (l2_norm + root / 2)
    return minimum(l2_norm + root, sqrt(squared))


def round_to_grid(granularity: float, *, num_numbers: int, max_clients: int, num_tries: int = 16) -> UpdateTransform:
    """Rounds each client's update to whole multiples of ``granularity``, at random and without changing its mean.

    Between this link and the server's side of it, updates and their sum are integers, in steps of the grid; the server
    multiplies them back. Each number goes up or down with the probability that keeps its mean. Rounding lengthens an
    update, so it is redrawn until its norm is at most `rounded_norm_bound` of its own length, which a draw misses with
    a probability below 0.61. After ``num_tries`` misses it is rounded towards zero, which lengthens nothing. Redrawing
    moves the mean a little, as it does in the paper. Zeros stay zeros, and so does padding.

    Guarantee: whatever the draws, a client whose update has an L2 norm of at most C before the link adds integers of
    L2 norm at most ``R = rounded_norm_bound(C / granularity)``, plus 2e-5 of it for float32, and of L1 norm at most
    ``min(sqrt(num_numbers) R, R^2)``, as integers have. The sums of up to ``max_clients`` clients are exact, because
    they stay below 2^24, up to which float32 holds every integer. The metric ``truncated`` is the share of the cohort
    that was rounded towards zero.

    Args:
      granularity: step of the grid, in units of the update; a few hundredths of the clip norm are common.
      num_numbers: most numbers in one client's update, padding counted; public. More are refused.
      max_clients: most clients in one round's sum: the population, or the largest of groups that take turns.
      num_tries: draws before it is rounded towards zero.

    Raises:
      ValueError: for numbers out of range; from `chain`, if no earlier link bounds the L2 norm, clients have added
        noise of their own, or sums could pass 2^24; and, when its shape is known, for an update with more numbers.
    """
    if not 0 < granularity < math.inf or num_numbers < 1 or max_clients < 1 or num_tries < 1:
        raise ValueError(
            "round_to_grid needs a positive granularity and at least one number, client and try; got "
            f"granularity={granularity}, num_numbers={num_numbers}, max_clients={max_clients}, num_tries={num_tries}."
        )

    def client(update, state, key):
        del state
        leaves, structure = jax.tree.flatten(update, is_leaf=is_rows)
        values = [(leaf.values if is_rows(leaf) else leaf) / granularity for leaf in leaves]
        size = sum(x.size for x in values)
        if size > num_numbers:
            raise ValueError(f"A client's update has {size} numbers, more than num_numbers={num_numbers}; raise it.")
        limit = jnp.square(rounded_norm_bound(jnp.sqrt(_squared_norm(values)), num_numbers))

        def too_long(carry):
            tries, rounded = carry
            return (_squared_norm(rounded) > limit) & (tries < num_tries)

        def redraw(carry):
            tries, _ = carry
            keys = jax.random.split(jax.random.fold_in(key, tries), len(values))
            return tries + 1, [_round_at_random(x, k) for x, k in zip(values, keys, strict=True)]

        _, rounded = jax.lax.while_loop(too_long, redraw, redraw((0, values)))
        truncated = _squared_norm(rounded) > limit
        rounded = [jnp.where(truncated, jnp.trunc(x), r) for x, r in zip(values, rounded, strict=True)]
        leaves = [_with_values(leaf, r) for leaf, r in zip(leaves, rounded, strict=True)]
        return jax.tree.unflatten(structure, leaves), {"truncated": truncated.astype(jnp.float32)}

    def server(total, state, key):
        del key
        return jax.tree.map(lambda x: x * granularity, total), state

    def sensitivity(bound):
        if bound.noised or bound.l2 == math.inf:
            raise ValueError("round_to_grid needs an earlier link that bounds the update: put a clip just before it.")
        l2 = rounded_norm_bound(_LEEWAY * bound.l2 / granularity, num_numbers) * _LEEWAY
        largest = max_clients * l2
        if largest > LARGEST_SUM:
            raise ValueError(
                f"A sum of {max_clients} clients can reach {largest:.3g} steps of the grid, and float32 holds integers "
                f"exactly up to {LARGEST_SUM}. Use a granularity above {granularity:g}, or fewer clients a round."
            )
        return Bound(min(math.sqrt(num_numbers) * l2, l2**2), l2, integers=True)

    return UpdateTransform(client=client, server=server, sensitivity=sensitivity)


def _round_at_random(values: jax.Array, key: jax.Array) -> jax.Array:
    below = jnp.floor(values)
    return below + (jax.random.uniform(key, values.shape) < values - below)


def _squared_norm(leaves: list[jax.Array]) -> jax.Array:
    return sum(jnp.sum(jnp.square(x)) for x in leaves)


def _with_values(leaf, values):
    return dataclasses.replace(leaf, values=values) if is_rows(leaf) else values


def _integer_noise(name: str, stddev: float, draw: Callable, event: Callable[[Bound], dp_accounting.DpEvent]):
    """A link that adds ``draw(key, shape, stddev)`` to every entry of the sum, in steps of the grid."""
    if stddev != 0:
        check_integer_stddev(stddev)

    def server(total, state, key):
        return (add_noise(total, key, lambda k, shape: draw(k, shape, stddev)) if stddev else total), state

    def dp_event(bound, round_index):
        del round_index
        if stddev == 0:
            return dp_accounting.NonPrivateDpEvent()
        if bound.l2 == math.inf or not bound.integers or bound.noised:
            raise ValueError(f"{name} needs integers of bounded norm: put a clip and round_to_grid before it.")
        return event(bound)

    return UpdateTransform(server=server, dp_event=dp_event)


def discrete_gaussian_noise(stddev: float) -> UpdateTransform:
    """Adds discrete Gaussian noise, integers with ``P(k) ~ exp(-k^2 / (2 stddev^2))``, to every entry of the sum.

    Guarantee: where the sum is of integers and one client's have L2 norm at most R, each round is
    ``R^2 / (2 stddev^2)``-zCDP for adding or removing one client (Canonne, Kamath, Steinke, 2020, "The Discrete
    Gaussian for Differential Privacy", Theorem 14), like the Gaussian, and without its last bits: the released numbers
    are all on the grid. `noise.discrete_gaussian` says how exactly it is drawn. No theorem amplifies it by sampling, so
    `make_rounds` refuses it with cohorts drawn by chance: use ``full_participation`` or ``in_turn``.

    Args:
      stddev: of the noise, in steps of the grid, at most ``noise.MOST_INTEGER_STDDEV``. Zero adds and claims nothing.

    Raises:
      ValueError: if ``stddev`` is out of range, or (from `chain`) if no earlier link bounds the sensitivity.
    """

    def event(bound):
        return dp_accounting.ZCDpEvent(rho=bound.l2**2 / (2 * stddev**2))

    return _integer_noise("discrete_gaussian_noise", stddev, discrete_gaussian, event)


def skellam_noise(stddev: float) -> UpdateTransform:
    """Adds Skellam noise, differences of two Poisson numbers, to every entry of the sum.

    Sums of Skellam numbers are Skellam numbers, so clients could add shares of it under secure aggregation; here the
    server adds it whole.

    Guarantee: where the sum is of integers with bounded L1 and L2 norms a client, each round is a
    `SkellamDpEvent` for adding or removing one client, whose Renyi divergence is that of Agarwal, Kairouz, Liu (2021,
    "The Skellam Mechanism for Differentially Private Federated Learning"). With a standard deviation of some tens of
    steps it costs hardly more than a Gaussian. Cohorts drawn by chance are refused, as for the discrete Gaussian.

    Args:
      stddev: of the noise, in steps of the grid, at most ``noise.MOST_INTEGER_STDDEV``. Zero adds and claims nothing.

    Raises:
      ValueError: if ``stddev`` is out of range, or (from `chain`) if no earlier link bounds the sensitivity.
    """

    def event(bound):
        return SkellamDpEvent(stddev, l1_sensitivity=bound.l1, l2_sensitivity=bound.l2)

    return _integer_noise("skellam_noise", stddev, skellam, event)


def _user_level(noise, l2_clip_norm, noise_multiplier, granularity, num_numbers, max_clients):
    check_noise_multiplier(noise_multiplier)
    rounded = chain(
        clip_by_global_norm(l2_clip_norm),
        round_to_grid(granularity, num_numbers=num_numbers, max_clients=max_clients),
    )
    return chain(rounded, noise(noise_multiplier * rounded.sensitivity(UNBOUNDED).l2))


def user_level_discrete_gaussian(
    *, l2_clip_norm: float, noise_multiplier: float, granularity: float, num_numbers: int, max_clients: int
) -> UpdateTransform:
    """Clip, round to the grid, then discrete Gaussian noise of ``noise_multiplier`` times the largest rounded norm.

    Guarantee: user-level; add-or-remove-one, or replace-one where the sampler says so; no sampling; the released
    sequence is the server's states; each round is ``1 / (2 noise_multiplier^2)``-zCDP. The noise in units of the update
    has standard deviation ``noise_multiplier * granularity * rounded_norm_bound(l2_clip_norm / granularity, ...)``.
    """
    return _user_level(discrete_gaussian_noise, l2_clip_norm, noise_multiplier, granularity, num_numbers, max_clients)


def user_level_skellam(
    *, l2_clip_norm: float, noise_multiplier: float, granularity: float, num_numbers: int, max_clients: int
) -> UpdateTransform:
    """As `user_level_discrete_gaussian`, with Skellam noise, accounted by its own Renyi curve."""
    return _user_level(skellam_noise, l2_clip_norm, noise_multiplier, granularity, num_numbers, max_clients)
