"""Noise recipes with a fault, as links of the chain, samplers and round code; each claims what its users believe."""

import math

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
from dp_accounting.pld import privacy_loss_distribution
from scipy.stats import binom

from fedjax_rec.federated.cohort import Sampler, poisson
from fedjax_rec.federated.round import make_rounds
from fedjax_rec.federated.rows import is_rows
from fedjax_rec.federated.transforms import Bound, UpdateTransform, scale_update, select_update
from fedjax_rec.privacy.mechanisms import gaussian_noise, global_norm, merge_rows
from fedjax_rec.privacy.noise import standard_normal

_LEAST_MASS = 1e-30  # of a number of draws that is still counted


def only_finite() -> UpdateTransform:
    """An update with a number that is not finite becomes a zero update; nothing else is bounded, or claimed."""

    def client(update, state, key):
        del state, key
        update = merge_rows(update)
        return select_update(jnp.isfinite(global_norm(update)), update), {}

    return UpdateTransform(client=client)


def weighted_by_examples(mean_examples: float) -> UpdateTransform:
    """Weighs a client by its number of examples over the mean one, after the clip; a row of an update is an example.

    Guarantee: none. It declares the bound that it was given, which is the fault: nothing bounds the weight.

    Args:
      mean_examples: of a client of the population.
    """

    def client(update, state, key):
        del state, key
        rows = [leaf for leaf in jax.tree.leaves(update, is_leaf=is_rows) if is_rows(leaf)]
        examples = sum(jnp.sum(leaf.ids < leaf.num_rows) for leaf in rows)
        return scale_update(update, examples.astype(jnp.float32) / mean_examples), {}

    return UpdateTransform(client=client)


def clip_by_norm_of_order(clip_norm: float) -> UpdateTransform:
    """``u * min(1, C / norm_p(u))`` with p = C: the bound is passed where the norm's order belongs.

    Guarantee: it declares an L2 bound of C. That is true for C <= 2, as no norm of such an order is below the L2 norm,
    and false above: d numbers of one size have an L2 norm of up to ``C d^(1/2 - 1/C)`` then (`order_factor`).

    Args:
      clip_norm: C, in units of the update.
    """

    def client(update, state, key):
        del state, key
        update = merge_rows(update)
        leaves = [leaf.values if is_rows(leaf) else leaf for leaf in jax.tree.leaves(update, is_leaf=is_rows)]
        largest = jnp.max(jnp.stack([jnp.max(jnp.abs(x)) for x in leaves]))
        size = jnp.where(largest > 0, largest, 1.0)
        norm = size * sum(jnp.sum(jnp.abs(x / size) ** clip_norm) for x in leaves) ** (1 / clip_norm)
        clipped = scale_update(update, jnp.minimum(1.0, clip_norm / (norm + 1e-6)))
        return select_update(jnp.isfinite(global_norm(update)), clipped), {}

    return UpdateTransform(client=client, sensitivity=lambda bound: Bound(l2=clip_norm))


def order_factor(clip_norm: float, num_numbers: int) -> float:
    """How far above C the L2 norm of `clip_by_norm_of_order`'s result can be, for updates of so many numbers."""
    return max(1.0, num_numbers ** (0.5 - 1 / clip_norm))


def gaussian_noise_divided_again(stddev: float, *, divisor: float, first_call: int = 0) -> UpdateTransform:
    """Gaussian noise whose standard deviation is divided by ``divisor`` at every call but the first.

    The code means to divide noise for a sum once, to make it noise for a mean, and stores the quotient where the scale
    was. Each leaf of each round is a call, and all are counted in the link's state.

    Guarantee: none beyond the first leaf of the first round, whose event it declares for all.

    Args:
      stddev: of the first call, in units of the sum.
      divisor: of the mean.
      first_call: how many calls were made before the first round.
    """

    def server(total, calls, key):
        leaves, structure = jax.tree.flatten(total)
        keys = jax.random.split(key, len(leaves))
        scales = stddev * divisor ** -(calls + jnp.arange(len(leaves)))
        noised = [x + scales[i] * standard_normal(keys[i], x.shape) for i, x in enumerate(leaves)]
        return jax.tree.unflatten(structure, noised), calls + len(leaves)

    right = gaussian_noise(stddev)
    return UpdateTransform(init=lambda params: jnp.float32(first_call), server=server, dp_event=right.dp_event)


def divided_again_multiplier(noise_multiplier: float, *, divisor: float, num_calls: int) -> float:
    """The noise multiplier of the one Gaussian that those calls together are, where each round is one call.

    Args:
      noise_multiplier: of the first call.
      divisor: as in `gaussian_noise_divided_again`.
      num_calls: rounds.
    """
    return noise_multiplier * float(np.sum(float(divisor) ** (2.0 * np.arange(num_calls)))) ** -0.5


def _chances(cohort_size: int, num_clients: int) -> np.ndarray:
    """Probabilities of being drawn 0, 1, 2, ... times in ``cohort_size`` draws with replacement."""
    most = int(binom.isf(_LEAST_MASS, cohort_size, 1 / num_clients)) + 1
    return binom.pmf(np.arange(most + 1), cohort_size, 1 / num_clients)


def with_replacement(num_clients: int, *, cohort_size: int) -> Sampler:
    """``cohort_size`` draws with replacement, and the event of Poisson cohorts; a cohort is who was drawn at all.

    How often it was drawn is up to `as_often_as_drawn`.
    """
    claimed = poisson(num_clients, cohort_size=cohort_size)

    def draw(key, round_index):
        ids = jax.random.randint(jax.random.fold_in(key, round_index), (cohort_size,), 0, num_clients)
        return jnp.zeros(num_clients, bool).at[ids].set(True)

    return claimed._replace(name="with replacement", draw=draw)


def as_often_as_drawn(num_clients: int, *, cohort_size: int) -> UpdateTransform:
    """Counts a client of the cohort 1, 2, ... times, with the chances that `with_replacement` gives it.

    One client's number of draws is distributed as it should be; that of several together is not quite, as their sum is
    not fixed. It declares the bound that it was given, which is the fault.
    """
    chances = _chances(cohort_size, num_clients)[1:]
    cumulative = jnp.asarray(np.cumsum(chances / chances.sum()), jnp.float32)

    def client(update, state, key):
        del state
        times = 1 + jnp.sum(jax.random.uniform(key) >= cumulative)
        return scale_update(update, times.astype(jnp.float32)), {}

    return UpdateTransform(client=client)


def with_replacement_epsilon(
    noise_multiplier: float,
    *,
    num_clients: int,
    cohort_size: int,
    num_rounds: int,
    delta: float,
    interval: float = 2e-3,
) -> float:
    """Epsilon of Gaussian noise on cohorts drawn with replacement, if a client that is removed sends zeros instead.

    An upper bound, on a grid of losses of spacing ``interval``.

    The pair that dominates is N(0, z^2) against the mixture of N(k, z^2) over the number of draws k
    (Choquette-Choo et al., 2023, "Privacy Amplification for Matrix Mechanisms", bound such mixtures).
    """
    chances = _chances(cohort_size, num_clients)
    curve = privacy_loss_distribution.from_mixture_gaussian_mechanism(
        noise_multiplier,
        np.arange(len(chances)),
        chances / chances.sum(),
        value_discretization_interval=interval,
    )
    return float(curve.self_compose(num_rounds).get_epsilon_for_delta(delta))


def cut_poisson(num_clients: int, *, cohort_size: float, capacity: int) -> Sampler:
    """Poisson cohorts of at most ``capacity`` clients, a random subset of those drawn; the event of uncut ones."""
    claimed = poisson(num_clients, cohort_size=cohort_size)

    def draw(key, round_index):
        drawn = claimed.draw(key, round_index)
        order = jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, round_index), 1), (num_clients,))
        order = jnp.where(drawn, order, 2.0)
        return drawn & (order <= jnp.sort(order)[capacity - 1])

    return claimed._replace(name="cut Poisson", draw=draw)


class _Realised:
    """Stands where the expected cohort size should: what is divided by it is divided by who came."""

    size = math.nan

    def __rtruediv__(self, total):
        return total / jnp.maximum(self.size, 1)


def divided_by_the_realised_cohort(algorithm, transforms, sampler, clients, **settings):
    """The round's own code, which divides by what the sampler calls the expected size: here, by the size that came."""
    realised = _Realised()

    def draw(key, round_index):
        drawn = sampler.draw(key, round_index)
        realised.size = drawn.sum()
        return drawn

    return make_rounds(algorithm, transforms, sampler._replace(draw=draw, expected_size=realised), clients, **settings)


def sampled_gaussian(sampling_prob: float, noise_multiplier: float, num_rounds: int) -> dp_accounting.DpEvent:
    """So many rounds of a Gaussian mechanism on Poisson cohorts; everyone for probability 1."""
    event = dp_accounting.GaussianDpEvent(noise_multiplier)
    return dp_accounting.SelfComposedDpEvent(
        dp_accounting.PoissonSampledDpEvent(sampling_prob, event) if sampling_prob < 1 else event, num_rounds
    )
