"""Adaptive clipping: a clip norm that follows a quantile of the update norms, which the same noise keeps private."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_rec.federated.transforms import Bound, UpdateTransform, chain, scale_update
from fedjax_rec.privacy.formulas import adaptive_clipping_noise_multiplier
from fedjax_rec.privacy.mechanisms import check_clip_norm, gaussian_noise, global_norm, merge_rows, scale_down


class Counted(NamedTuple):
    """What a client sends under adaptive clipping.

    Attributes:
      update: the clipped update, over the clip norm, times the square root of its share.
      within: whether its norm was within the clip norm, 1 or -1, times the square root of its own; float32 scalar.
    """

    update: Any
    within: jax.Array


def adaptive_clip(
    *,
    target_quantile: float,
    cohort_size: float,
    initial_l2_clip_norm: float,
    count_share: float,
    learning_rate: float = 0.2,
) -> UpdateTransform:
    """Clips at a norm C_t that moves towards a quantile of the update norms, in one release with the update.

    A client sends ``a clip(x, C_t) / C_t`` and, as a number more, ``c`` if its norm is at most C_t and ``-c`` if not,
    with ``c^2 = count_share`` and ``a^2 + c^2 = 1``: a joint norm of at most 1. The server takes the noise's sum,
    multiplies the update by ``C_t / a`` and reads the share of clients within the norm, over the expected cohort m:

      ``b = 1/2 + sum(within) / (2 c m)``,  ``C_(t+1) = C_t exp(-learning_rate (b - target_quantile))``.

    This is the geometric update of Andrew, Thakkar, Ramaswamy, McMahan (2021, "Differentially Private Learning with
    Adaptive Clipping"). With noise of multiplier z after it, a count of indicators of -1/2 and 1/2 has noise of
    standard deviation ``sigma_b = z / (2 c)``, and the update noise of multiplier ``z_update = z / a``. So
    ``z_update^-2 = z^-2 (1 - c^2) = z^-2 - (2 sigma_b)^-2``, their Theorem 1: a noise link after this one is accounted
    as z, and pays for both. They take ``sigma_b = m / 20``, which `user_level_adaptive_clip` does.

    Guarantee: whatever a client computes, what it adds to the sum has a joint L2 norm of at most 1, up to float32
    rounding. The link's state is C_t, a function of earlier noised sums. A non-finite update becomes a zero update,
    also in the count, and the metric ``nonfinite`` counts it; ``l2_clip_norm`` is C_t.

    Args:
      target_quantile: of the update norms, in [0, 1].
      cohort_size: expected clients a round, the sampler's ``expected_size``; public.
      initial_l2_clip_norm: C_0, in units of the update, in [1e-12, 1e12]; C_t stays in that range.
      count_share: c^2, the count's share of the budget, in (0, 1).
      learning_rate: how far the logarithm of C_t moves when the share is off by 1.

    Raises:
      ValueError: for numbers out of range.
    """
    check_clip_norm("initial_l2_clip_norm", initial_l2_clip_norm)
    if not 0 <= target_quantile <= 1:
        raise ValueError(f"target_quantile must be between 0 and 1; got {target_quantile}.")
    if not 0 < count_share < 1:
        raise ValueError(f"count_share is of one budget, above 0 and below 1; got {count_share}.")
    if not (0 < learning_rate < math.inf and 0 < cohort_size < math.inf):
        raise ValueError(
            f"learning_rate and cohort_size must be positive and finite; got {learning_rate} and {cohort_size}."
        )
    count_factor, update_factor = math.sqrt(count_share), math.sqrt(1 - count_share)

    def client(update, state, key):
        del key
        update = merge_rows(update)
        update, metrics = scale_down(update, global_norm(update), state)
        within = count_factor * (1 - 2 * metrics["clipped"])
        return Counted(scale_update(update, update_factor / state), within), metrics | {"l2_clip_norm": state}

    def server(total, state, key):
        del key
        share_within = 0.5 + total.within / (2 * count_factor * cohort_size)
        clip_norm = state * jnp.exp(-learning_rate * (share_within - target_quantile))
        update = jax.tree.map(lambda x: x * (state / update_factor), total.update)
        return update, jnp.clip(clip_norm, 1e-12, 1e12)

    return UpdateTransform(
        init=lambda params: jnp.float32(initial_l2_clip_norm),
        client=client,
        server=server,
        sensitivity=lambda bound: Bound(l2=1.0),
        upload=lambda wire, update: wire._replace(numbers=wire.numbers + 1),
    )


def user_level_adaptive_clip(
    *,
    noise_multiplier: float,
    target_quantile: float,
    cohort_size: float,
    initial_l2_clip_norm: float,
    learning_rate: float = 0.2,
    count_noise_std: float | None = None,
) -> UpdateTransform:
    """`adaptive_clip`, then Gaussian noise that is accounted, count included, as ``noise_multiplier``.

    The update's own noise is ``formulas.adaptive_clipping_noise_multiplier(noise_multiplier, quantile_noise_std)``.

    Guarantee: user-level; add-or-remove-one; the released sequence is the server's states, clip norms included; the
    sampler's event says with which cohorts it is amplified.

    Args:
      noise_multiplier: of the joint release, positive.
      target_quantile: as in `adaptive_clip`, and so the next three.
      cohort_size: expected clients a round.
      initial_l2_clip_norm: C_0.
      learning_rate: of the clip norm's logarithm.
      count_noise_std: sigma_b, in clients; by default the cohort over 20, as in the paper.

    Raises:
      ValueError: for numbers out of range, or if the count alone costs more than ``noise_multiplier``.
    """
    count_noise_std = cohort_size / 20 if count_noise_std is None else count_noise_std
    adaptive_clipping_noise_multiplier(noise_multiplier, quantile_noise_std=count_noise_std)  # or it is refused
    clip = adaptive_clip(
        target_quantile=target_quantile,
        cohort_size=cohort_size,
        initial_l2_clip_norm=initial_l2_clip_norm,
        count_share=(noise_multiplier / (2 * count_noise_std)) ** 2,
        learning_rate=learning_rate,
    )
    return chain(clip, gaussian_noise(noise_multiplier))
