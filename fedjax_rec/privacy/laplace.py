"""The Laplace mechanism as links of the chain: updates bounded in L1 norm, Laplace noise on their sum."""

import math

import dp_accounting
import jax
import jax.numpy as jnp

from fedjax_rec.federated.rows import is_rows
from fedjax_rec.federated.transforms import Bound, UpdateTransform, chain
from fedjax_rec.privacy.mechanisms import (
    add_noise,
    check_clip_norm,
    check_noise_multiplier,
    check_stddev,
    merge_rows,
    scale_down,
)
from fedjax_rec.privacy.noise import standard_laplace


def l1_norm(update) -> jax.Array:
    """The joint L1 norm of one client's update over row values and dense leaves; each row must be there once."""
    leaves = [leaf.values if is_rows(leaf) else leaf for leaf in jax.tree.leaves(update, is_leaf=is_rows)]
    return sum(jnp.sum(jnp.abs(leaf.astype(jnp.float32))) for leaf in leaves)


def clip_by_l1_norm(l1_clip_norm: float) -> UpdateTransform:
    """Scales each client's update down to a joint L1 norm of at most ``l1_clip_norm``.

    Guarantee: whatever a client computes (duplicate rows, zeros, infinities, NaN), what it adds to the sum has L1
    norm at most ``l1_clip_norm``, up to float32 rounding, and so has its L2 norm, which is never larger. A non-finite
    update becomes a zero update. The metrics are those of `clip_by_global_norm`.

    Args:
      l1_clip_norm: bound in units of the update, in [1e-12, 1e12].

    Raises:
      ValueError: if the bound is not such a number.
    """
    check_clip_norm("l1_clip_norm", l1_clip_norm)

    def client(update, state, key):
        del state, key
        update = merge_rows(update)
        return scale_down(update, l1_norm(update), l1_clip_norm)

    def sensitivity(bound):
        within = Bound() if bound.noised else bound
        return Bound(min(within.l1, l1_clip_norm), min(within.l2, l1_clip_norm))

    return UpdateTransform(client=client, sensitivity=sensitivity)


def laplace_noise(scale: float) -> UpdateTransform:
    """Adds Laplace noise to the sum over clients, once per round, on every entry of every table and dense leaf.

    Guarantee: together with an earlier L1 clip at C, each round's sum is (C / scale, 0)-differentially private for
    adding or removing one client (Dwork, McSherry, Nissim, Smith, 2006, "Calibrating Noise to Sensitivity in Private
    Data Analysis"). It is accounted as one Laplace number moved by C, which dominates a move spread over several. An
    empty cohort is noised like any other. The noise is drawn in float32, so its tail ends at 22.9 scales, and the last
    bits of a sum are not covered (Mironov, 2012, "On Significance of the Least Significant Bits For Differential
    Privacy"); `discrete_gaussian_noise` has no such bits.

    Args:
      scale: of the Laplace distribution, in units of the update, >= 0; its standard deviation is sqrt(2) times that.
        Zero adds nothing and claims nothing.

    Raises:
      ValueError: if ``scale`` is negative or infinite, or (from `chain`) if no earlier link bounds the L1 norm.
    """
    check_stddev(scale)

    def server(total, state, key):
        return add_noise(total, key, lambda k, shape: scale * standard_laplace(k, shape)), state

    def dp_event(bound, round_index):
        del round_index
        if scale == 0:
            return dp_accounting.NonPrivateDpEvent()
        if bound.l1 == math.inf:
            raise ValueError(
                "laplace_noise needs an earlier link that bounds the L1 norm: put clip_by_l1_norm before it."
            )
        return dp_accounting.LaplaceDpEvent(scale / bound.l1)

    return UpdateTransform(server=server, dp_event=dp_event)


def user_level_laplace(*, l1_clip_norm: float, noise_multiplier: float) -> UpdateTransform:
    """Clip to an L1 norm of ``l1_clip_norm``, then Laplace noise of scale ``noise_multiplier * l1_clip_norm``.

    Guarantee: user-level; add-or-remove-one; the released sequence is the server's states; each round of full
    participation costs ``1 / noise_multiplier`` of pure epsilon, and the sampler's event says what Poisson sampling
    makes of it.
    """
    check_noise_multiplier(noise_multiplier)
    return chain(clip_by_l1_norm(l1_clip_norm), laplace_noise(noise_multiplier * l1_clip_norm))
