"""User-level differential privacy: bound what one client can change, then add noise once per round.

`clip_by_global_norm` and `gaussian_noise` are links of the update chain. The clip bounds the sum's L2 sensitivity
under adding or removing one client; the noise is drawn once on the whole sum, whoever took part.
"""

import math
from collections.abc import Callable
from typing import Any

import dp_accounting
import jax
import jax.numpy as jnp

from fedjax_rec.federated.rows import is_rows, merge_duplicates
from fedjax_rec.federated.transforms import Bound, Metrics, UpdateTransform, chain, scale_update, select_update
from fedjax_rec.privacy.noise import standard_normal


def global_norm(update) -> jax.Array:
    """The joint L2 norm of one client's update over row values and dense leaves, as a float32 scalar.

    Rows must be unique (see `merge_duplicates`): the norm of a list with duplicate ids is not that of the update.
    """
    leaves = [leaf.values if is_rows(leaf) else leaf for leaf in jax.tree.leaves(update, is_leaf=is_rows)]
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in leaves))


def merge_rows(update: Any) -> Any:
    """The same update with each row once, as its norms need it."""
    return jax.tree.map(lambda x: merge_duplicates(x) if is_rows(x) else x, update, is_leaf=is_rows)


def shrink_factor(norm: jax.Array, bound: jax.Array | float) -> jax.Array:
    """``min(1, bound / norm)``; 1 at norm 0, and NaN or 0 where the norm is not finite."""
    clipped = norm > bound
    # The select leaves a zero update alone: no division by its norm.
    return jnp.where(clipped, bound / jnp.where(clipped, norm, 1.0), 1.0)


def scale_down(update: Any, norm: jax.Array, bound: jax.Array | float) -> tuple[Any, Metrics]:
    """The update scaled to a norm of at most ``bound``, or a zero update if ``norm`` is not finite; and the metrics.

    One pass decides all: a NaN, an infinity, or an L2 norm beyond 1.8e19 (whose square overflows) is not finite.

    Args:
      update: one client's, with each row once.
      norm: its norm, float32 scalar.
      bound: positive.
    """
    finite, clipped = jnp.isfinite(norm), norm > bound
    update = select_update(finite, scale_update(update, shrink_factor(norm, bound)))
    metrics = {"clipped": (finite & clipped).astype(jnp.float32), "nonfinite": (~finite).astype(jnp.float32)}
    return update, metrics | {"update_norm": jnp.where(finite, norm, 0.0)}


def check_clip_norm(name: str, value: float) -> None:
    """Raises a ValueError unless ``value`` is in [1e-12, 1e12]: float32 holds the squares of such norms."""
    if not 1e-12 <= value <= 1e12:
        raise ValueError(f"{name} must be between 1e-12 and 1e12; got {value}.")


def clip_by_global_norm(l2_clip_norm: float) -> UpdateTransform:
    """Scales each client's update down to a joint L2 norm of at most ``l2_clip_norm``.

    Guarantee: whatever a client computes (duplicate rows, zeros, infinities, NaN), what it adds to the sum has L2
    norm at most ``l2_clip_norm``, up to float32 rounding. A non-finite update becomes a zero update; the metric
    ``nonfinite`` counts them, ``clipped`` is the share of the cohort that was scaled down.

    Args:
      l2_clip_norm: bound in units of the update, in [1e-12, 1e12]: float32 holds the squares of such norms.

    Raises:
      ValueError: if the bound is not such a number.
    """
    check_clip_norm("l2_clip_norm", l2_clip_norm)

    def client(update, state, key):
        del state, key
        update = merge_rows(update)
        return scale_down(update, global_norm(update), l2_clip_norm)

    def sensitivity(bound):
        # What a client sent with noise of its own is clipped like any update, and its bound is of the data only.
        return Bound(l2=l2_clip_norm) if bound.noised else Bound(bound.l1, min(bound.l2, l2_clip_norm))

    return UpdateTransform(client=client, sensitivity=sensitivity)


def add_noise(total: Any, key: jax.Array, draw: Callable[[jax.Array, tuple[int, ...]], jax.Array]) -> Any:
    """The sums plus ``draw(key, shape)``, once for each of their leaves, each with a key of its own."""
    leaves, structure = jax.tree.flatten(total)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(structure, [x + draw(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


def check_stddev(stddev: float) -> None:
    """Raises a ValueError unless noise can have this scale; zero adds nothing."""
    if not 0 <= stddev < math.inf:
        raise ValueError(f"The noise's standard deviation must be finite and not negative; got {stddev}.")


def gaussian_noise(stddev: float) -> UpdateTransform:
    """Adds Gaussian noise to the sum over clients, once per round, on every entry of every table and dense leaf.

    Guarantee: together with an earlier clip at C, each round's sum is a Gaussian mechanism with noise multiplier
    ``stddev / C`` for adding or removing one client; everything computed from it is post-processing. An empty
    cohort is noised like any other.

    Args:
      stddev: standard deviation in units of the update, >= 0. Zero adds nothing and claims nothing.

    Raises:
      ValueError: if ``stddev`` is negative or infinite, or (from `chain`) if no earlier link bounds the sensitivity.
    """
    check_stddev(stddev)

    def server(total, state, key):
        return add_noise(total, key, lambda k, shape: stddev * standard_normal(k, shape)), state

    def dp_event(bound, round_index):
        del round_index
        if stddev == 0:
            return dp_accounting.NonPrivateDpEvent()
        if bound.l2 == math.inf:
            raise ValueError("gaussian_noise needs an earlier link that bounds the update: put a clip before it.")
        return dp_accounting.GaussianDpEvent(stddev / bound.l2)

    return UpdateTransform(server=server, dp_event=dp_event)


def check_noise_multiplier(noise_multiplier: float) -> None:
    """Raises a ValueError for a negative noise multiplier."""
    if noise_multiplier < 0:
        raise ValueError(f"noise_multiplier must not be negative; got {noise_multiplier}.")


def user_level_dp(*, l2_clip_norm: float, noise_multiplier: float) -> UpdateTransform:
    """Clip to ``l2_clip_norm``, then noise of standard deviation ``noise_multiplier * l2_clip_norm`` on the sum.

    DP-FedAvg of McMahan et al., 2018, "Learning Differentially Private Recurrent Language Models".

    Guarantee: user-level; add-or-remove-one; the released sequence is the server's states; the sampler's event says
    with which cohorts it is amplified.
    """
    check_noise_multiplier(noise_multiplier)
    return chain(clip_by_global_norm(l2_clip_norm), gaussian_noise(noise_multiplier * l2_clip_norm))
