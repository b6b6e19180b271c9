"""Noise that changes over the rounds: schedules, the link that adds them, and their calibration to one epsilon.

Late noise is never trained away, early noise partly is. So, at the same epsilon, less noise at the end and more at the
start leaves less of it in an optimiser that contracts, how much less depends on the accountant. Training a recommender
may show nothing of that: `experiments/schedules.py` has both, and on MovieLens 100K no gain beyond the spread of seeds.
A schedule is fixed before the run and looks at no data. One that reacts to what was released needs
`renyi_filter.RenyiFilter`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
from dp_accounting.dp_event import ComposedDpEvent, DpEvent, GaussianDpEvent, SelfComposedDpEvent

from fedjax_rec.federated.cohort import Sampler
from fedjax_rec.federated.releases import releases
from fedjax_rec.federated.transforms import UpdateTransform
from fedjax_rec.privacy.calibration import Calibration, calibrate_noise_multiplier
from fedjax_rec.privacy.noise import standard_normal

NUM_LEVELS = 20
"""Most different noises in a schedule: each costs the accountant a privacy loss distribution of its own."""
RATIOS = (1.0, 1.5, 2.0, 3.0)
"""First noise over last noise, to choose from."""


def geometric(num_rounds: int, ratio: float, *, num_levels: int = NUM_LEVELS, num_groups: int = 1) -> np.ndarray:
    """Noise of each round over that of the last one, falling by a constant factor from level to level.

        m_t = ratio^((L - j) / L),   j = ceil(L t / T),   t = 1 .. T

    T rounds in L levels of nearly equal length; where L = T this is ratio^((T - t) / T), a new noise every round.

    Args:
      num_rounds: T.
      ratio: positive; above 1 the noise falls, 1 is constant noise.
      num_levels: most levels; L is this or, if smaller, the number of turns.
      num_groups: of the sampler: where groups take turns the noise changes between turns only.

    Returns:
      float64 ``[num_rounds]``; the last is 1.

    Raises:
      ValueError: for numbers out of range.
    """
    for name, value in {"num_rounds": num_rounds, "num_levels": num_levels, "num_groups": num_groups}.items():
        if value != int(value) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}.")
    if not 0 < ratio < math.inf:
        raise ValueError(f"The ratio of the first noise to the last must be positive and finite; got {ratio!r}.")
    num_turns = -(-num_rounds // num_groups)
    levels = min(num_levels, num_turns)
    level = -(-levels * np.arange(1, num_turns + 1) // num_turns)
    return np.repeat(float(ratio) ** ((levels - level) / levels), num_groups)[:num_rounds]


def textbook_ratio(contraction: float, num_rounds: int) -> float:
    """The ratio that is best for a contracting optimiser if each round costs what its noise^-2 says.

    An optimiser that contracts, w_t = rho w_(t-1) + noise_t, damps the noise of round t by rho^(T - t), so the last
    parameters carry noise of variance sum_t sigma_t^2 rho^(2 (T - t)). With every client in every round epsilon is a
    function of sum_t sigma_t^-2 alone. Least variance at a fixed sum: with s_t = sigma_t^2 and a multiplier, the
    derivative rho^(2 (T - t)) - lambda / s_t^2 vanishes, so s_t ~ rho^-(T - t) and

        sigma_t ~ rho^(-(T - t) / 2),   ratio = rho^(-T / 2).

    Args:
      contraction: rho in (0, 1]; 1 keeps all noise, and the noise should then be constant.
      num_rounds: T.

    Raises:
      ValueError: for a contraction outside (0, 1].
    """
    if not 0 < contraction <= 1:
        raise ValueError(f"The contraction of one round must be above 0 and at most 1; got {contraction!r}.")
    return contraction ** (-num_rounds / 2)


def half_exponent_ratio(contraction: float, num_rounds: int) -> float:
    """Half the textbook's exponent: sigma_t ~ rho^(-(T - t) / 4), ratio = rho^(-T / 4).

    The textbook's sum of sigma^-2 is not what a sampled round costs. With secret Poisson cohorts a round with little
    noise costs far more than its sigma^-2: the Renyi divergence of order 2 is log(1 + q^2 (exp(1 / sigma^2) - 1)), so
    the textbook overspends on its last, quietest rounds. Half the exponent is safer: in `experiments/schedules.py` it
    leaves less noise than a constant schedule in every setting, while the textbook leaves more where cohorts are a
    hundredth of the users. With every client in every round half the exponent gives some of the gain away.
    """
    return math.sqrt(textbook_ratio(contraction, num_rounds))


def noise_energy(stddevs: Sequence[float], contraction: float) -> float:
    """Variance of the noise that the last parameters carry: ``sum_t stddevs_t^2 contraction^(2 (T - t))``.

    Args:
      stddevs: ``[num_rounds]``, of the noise that each round adds to a parameter.
      contraction: as in `textbook_ratio`.
    """
    variances = np.square(np.asarray(stddevs, np.float64))
    return float(np.sum(variances * contraction ** (2.0 * np.arange(len(variances))[::-1])))


def scheduled_gaussian(stddevs: Sequence[float]) -> UpdateTransform:
    """Adds Gaussian noise to the sum over clients, once per round, of the standard deviation of that round.

    The link counts rounds in its own state, an int32 scalar that is checkpointed with the server's, so a resumed run
    goes on with the noise that it would have had. Past the last round the device holds the last value, and `dp_event`
    refuses, so that no such round can be charged.

    Guarantee: together with an earlier clip at C, round t's sum is a Gaussian mechanism with noise multiplier
    ``stddevs[t] / C`` for adding or removing one client, whoever took part. The schedule must not depend on the data.

    Args:
      stddevs: float ``[num_rounds]``, positive and finite, in units of the update: the clip norm times the noise
        multipliers of `calibrate_schedule`, for one.

    Raises:
      ValueError: for an empty schedule or such a number, and (from `chain`) if no earlier link bounds the update.
    """
    stddevs = np.asarray(stddevs, np.float64)
    if stddevs.ndim != 1 or not len(stddevs) or not np.all((stddevs > 0) & np.isfinite(stddevs)):
        raise ValueError(
            f"A noise schedule is a positive, finite standard deviation for each round; got {stddevs!r}. To train "
            "without noise, leave the link out."
        )

    def init(params):
        del params
        return jnp.zeros((), jnp.int32)

    def server(total, round_index, key):
        # The noise of this round: once for the whole sum, its key folded with the round's number by the caller.
        stddev = jnp.asarray(stddevs, jnp.float32)[jnp.minimum(round_index, len(stddevs) - 1)]
        leaves, structure = jax.tree.flatten(total)
        keys = jax.random.split(key, len(leaves))
        noised = [leaf + stddev * standard_normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)]
        return jax.tree.unflatten(structure, noised), round_index + 1

    def dp_event(bound, round_index):
        if round_index >= len(stddevs):
            raise ValueError(
                f"The noise schedule is for {len(stddevs)} rounds, and round {round_index} (counted from 0) is past "
                "its end. Plan the schedule for all rounds that will run."
            )
        if bound.l2 == math.inf:
            raise ValueError("scheduled_gaussian needs an earlier link that bounds the update: put a clip before it.")
        return dp_accounting.GaussianDpEvent(float(stddevs[round_index]) / bound.l2)

    return UpdateTransform(init=init, server=server, dp_event=dp_event)


def schedule_event(noise_multipliers: Sequence[float], sampler: Sampler) -> DpEvent:
    """What all rounds of a schedule release together, on the sampler's cohorts.

    Args:
      noise_multipliers: ``[num_rounds]``.
      sampler: of the cohorts; where groups take turns, one round of each turn is charged.

    Raises:
      ValueError: if the noise changes within a turn.
    """
    noise = [float(z) for z in noise_multipliers]
    link = UpdateTransform(dp_event=lambda bound, round_index: GaussianDpEvent(noise[round_index]))
    return ComposedDpEvent([SelfComposedDpEvent(e, count) for e, count in releases(link, sampler, 0, len(noise))])


@dataclass(frozen=True, eq=False)
class CalibratedSchedule:
    """A schedule that meets a target.

    Attributes:
      noise_multipliers: float64 ``[num_rounds]``, standard deviation over the clip norm.
      calibration: the search for its scale; its ``noise_multiplier`` is that of the last round.
    """

    noise_multipliers: np.ndarray
    calibration: Calibration


def calibrate_schedule(
    multipliers: Sequence[float],
    *,
    sampler: Sampler,
    target_epsilon: float,
    delta: float,
    prior: DpEvent | None = None,
) -> CalibratedSchedule:
    """Scales a whole schedule to the least noise whose epsilon does not exceed the target.

    Args:
      multipliers: ``[num_rounds]`` relative to the last one, as of `geometric`.
      sampler: of the cohorts; its relation is that of the guarantee.
      target_epsilon: positive.
      delta: in (0, 1).
      prior: everything else that is released, or None.

    Raises:
      ValueError: a sentence, as `calibrate_noise_multiplier`.
    """
    multipliers = np.asarray(multipliers, np.float64)
    before = [prior] if prior is not None else []
    found = calibrate_noise_multiplier(
        lambda scale: ComposedDpEvent([*before, schedule_event(scale * multipliers, sampler)]),
        target_epsilon=target_epsilon,
        delta=delta,
        relation=sampler.relation,
    )
    return CalibratedSchedule(found.noise_multiplier * multipliers, found)
