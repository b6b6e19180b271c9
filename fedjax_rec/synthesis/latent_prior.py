"""A prior of z: N(0, I), or a mixture of Gaussians fitted with privacy to where an encoder puts users.

A user of posterior N(mu, diag sigma^2) contributes to the component c nearest to mu

    s = [1, mu / sqrt(k), (mu^2 + sigma^2) / sqrt(k)],   scaled down to |s| <= sqrt(3),

so that its count, mean and second moments of the posterior, summed over users and noised, give weight, mean and
variance of each component. A step assigns users to the components of the step before (Lloyd's algorithm with released
sums); the first components are public random points.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np

from fedjax_rec.data.interactions import Interactions
from fedjax_rec.models.mult_vae import Posterior
from fedjax_rec.models.user_rows import dense_rows, user_rows
from fedjax_rec.privacy.budget import Phase
from fedjax_rec.privacy.ledger import Entry

MIXTURE = "mixture"
NUM_STEPS = 5
SENSITIVITY = math.sqrt(3.0)
_USERS_AT_A_TIME = 256
_SMALLEST_VARIANCE = 0.01


class LatentMixture(NamedTuple):
    """Diagonal Gaussians, float32: ``weights [c]`` with sum 1, ``means [c, latent]``, ``stddevs [c, latent]``."""

    weights: jax.Array
    means: jax.Array
    stddevs: jax.Array


def standard_mixture(latent: int) -> LatentMixture:
    """N(0, I) as a mixture of one."""
    return LatentMixture(jnp.ones(1), jnp.zeros((1, latent)), jnp.ones((1, latent)))


def draw_mixture(mixture: LatentMixture, key: jax.Array) -> jax.Array:
    """One z, float32 ``[latent]``."""
    component_key, noise_key = jax.random.split(key)
    component = jax.random.categorical(component_key, jnp.log(mixture.weights))
    noise = jax.random.normal(noise_key, mixture.means.shape[1:])
    return mixture.means[component] + mixture.stddevs[component] * noise


def mixture_phase(latent: int, num_components: int, *, weight: float) -> Phase:
    """The releases of `dp_mixture`; ``weight`` is what one release of them all would have."""
    return Phase(
        MIXTURE,
        rounds=NUM_STEPS,
        weight=weight * math.sqrt(NUM_STEPS),
        sensitivity=SENSITIVITY,
        num_numbers=num_components * (2 * latent + 1),
    )


def contribution(posterior: Posterior, component: jax.Array, num_components: int) -> jax.Array:
    """What one user adds, float32 ``[components, 1 + 2 latent]``, of norm at most sqrt(3); zero if not finite."""
    mean, variance = posterior.mean, jnp.exp(posterior.log_variance)
    scale = 1.0 / math.sqrt(len(mean))
    own = jnp.concatenate([jnp.ones(1), mean * scale, (jnp.square(mean) + variance) * scale])
    norm = jnp.sqrt(jnp.square(own).sum())
    own = jnp.where(jnp.isfinite(norm), own * jnp.minimum(1.0, SENSITIVITY / norm), 0.0)
    return jnp.where(jnp.arange(num_components)[:, None] == component, own[None, :], 0.0)


def dp_mixture(
    encode: Callable[[jax.Array], Posterior],
    train: Interactions,
    *,
    latent: int,
    num_components: int,
    noise_multipliers: np.ndarray,
    key: jax.Array,
) -> tuple[LatentMixture, Entry]:
    """Fits the mixture, one noised sum over all users a step.

    Guarantee: user-level, adding or removing one user with all of its rows. Each step releases a sum of contributions
    of L2 norm at most sqrt(3) plus Gaussian noise of ``noise_multiplier * sqrt(3)``: a Gaussian mechanism without
    amplification by sampling. The encoder must be a release itself. ``key`` must be secret and used for nothing else.

    Args:
      encode: ``rows [..., items] -> Posterior``.
      train: rows of all users; users without any add nothing.
      latent: k.
      num_components: of the mixture.
      noise_multipliers: float ``[steps]``, all equal; zeros fit without privacy.
      key: of the first components and of the noise.

    Raises:
      ValueError: for noise that changes between steps: one entry charges them all.
    """
    noise = np.asarray(noise_multipliers, np.float64)
    if np.any(noise != noise[0]):
        raise ValueError(f"The noise multipliers of the mixture must be equal; got {noise.tolist()}.")
    users = np.flatnonzero(train.counts_per_user).astype(np.int32)
    rows = user_rows(train)
    batches = [users[i : i + _USERS_AT_A_TIME] for i in range(0, len(users), _USERS_AT_A_TIME)]
    encoded = [jax.device_get(encode(dense_rows(rows, jnp.asarray(b), train.num_items))) for b in batches]
    posteriors = Posterior(*(jnp.concatenate(leaves) for leaves in zip(*encoded, strict=True)))
    start_key, noise_key = jax.random.split(key)
    spread = 0.5 if num_components > 1 else 0.0
    means = spread * jax.random.normal(start_key, (num_components, latent))
    mixture = LatentMixture(jnp.full(num_components, 1.0 / num_components), means, jnp.ones_like(means))
    for step, multiplier in enumerate(noise):
        step_key, stddev = jax.random.fold_in(noise_key, step), SENSITIVITY * float(multiplier)
        sums = noised_sum(mixture.means, posteriors, stddev, step_key, num_components=num_components)
        mixture = mixture_of(sums, stddev)
    released = "noised counts, means and second moments of users' encodings"
    event = dp_accounting.GaussianDpEvent(float(noise[0]))
    return mixture, Entry(MIXTURE, event, len(noise), "all", released)


@partial(jax.jit, static_argnames="num_components")
def noised_sum(
    means: jax.Array, posteriors: Posterior, stddev: jax.Array, key: jax.Array, *, num_components: int
) -> jax.Array:
    """What a step releases, float32 ``[components, 1 + 2 latent]``: users' contributions, summed and noised."""

    def one(mean, log_variance):
        nearest = jnp.argmin(jnp.square(mean[None, :] - means).sum(-1))
        return contribution(Posterior(mean, log_variance), nearest, num_components)

    total = jax.vmap(one)(*posteriors).sum(0)
    return total + stddev * jax.random.normal(key, total.shape)  # the noise


def mixture_of(released: jax.Array, stddev: float) -> LatentMixture:
    """The mixture that released sums stand for: post-processing."""
    latent = (released.shape[1] - 1) // 2
    # Counts that are all noise are not to be divided by.
    counts = jnp.maximum(released[:, :1], max(2.0 * stddev, 1.0))
    means, squares = jnp.split(released[:, 1:] * math.sqrt(latent) / counts, 2, axis=1)
    variances = jnp.maximum(squares - jnp.square(means), _SMALLEST_VARIANCE)
    return LatentMixture(counts[:, 0] / counts.sum(), means, jnp.sqrt(variances))
