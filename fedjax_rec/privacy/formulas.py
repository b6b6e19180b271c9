"""Closed forms of privacy accounting: splits of a Gaussian, amplification by shuffling, and what an attacker can reach.

Each is a few lines of a paper; ``accounting`` does the numbers that have no closed form.
"""

import math

from dp_accounting import get_epsilon_gaussian, get_sigma_gaussian
from scipy.stats import norm


def combined_noise_multiplier(*noise_multipliers: float) -> float:
    """The one Gaussian that costs as much as several on the same data or the same sample.

    ``z = (sum z_i^-2)^(-1/2)``: full participation over many rounds, or the two noises of DP-AdaFEST (Ghazi et al.,
    2023, "Sparsity-Preserving Differentially Private Training of Large Embedding Models"), selection and gradient.

    Raises:
      ValueError: if none is given or one is not positive.
    """
    if not noise_multipliers or not all(z > 0 for z in noise_multipliers):
        raise ValueError(f"Positive noise multipliers are needed; got {noise_multipliers}.")
    return sum(z**-2 for z in noise_multipliers) ** -0.5


def adaptive_clipping_noise_multiplier(noise_multiplier: float, *, quantile_noise_std: float) -> float:
    """The update's noise multiplier when the clip norm is adapted by a noisy count, at the same total cost.

    Each client also sends an indicator of -1/2 or 1/2, whose sum is released with standard deviation
    ``quantile_noise_std``: ``z_update = (z^-2 - (2 sigma_b)^-2)^(-1/2)`` (Andrew et al., 2021, "Differentially Private
    Learning with Adaptive Clipping", Theorem 1).

    Args:
      noise_multiplier: what both releases together are accounted as.
      quantile_noise_std: standard deviation sigma_b, in clients; the paper takes the cohort size over 20.

    Raises:
      ValueError: if the count alone already costs more than ``noise_multiplier`` allows.
    """
    if not 0 < noise_multiplier < 2 * quantile_noise_std:
        raise ValueError(
            f"A count with noise {quantile_noise_std:g} costs as much as a noise multiplier of "
            f"{2 * quantile_noise_std:g}, which does not fit into {noise_multiplier:g}; raise the count's noise."
        )
    return (noise_multiplier**-2 - (2 * quantile_noise_std) ** -2) ** -0.5


def full_participation_epsilon(noise_multiplier: float, *, rounds: int, delta: float) -> float:
    """Epsilon when every client takes part in every one of ``rounds`` Gaussian releases; exact, no amplification.

    Also the valid bound for shuffled batches, with ``rounds`` epochs: each client is in one batch of each epoch.
    Accounting shuffled batches as Poisson samples instead claims far too little.
    """
    return get_epsilon_gaussian(noise_multiplier / math.sqrt(rounds), delta)


def shuffled_epsilon(local_epsilon: float, *, num_reports: int, delta: float) -> float:
    """Central epsilon of ``num_reports`` locally private reports, shuffled (one per user; replace-one).

    Feldman, McMillan, Talwar (2021), "Hiding Among the Clones: A Simple and Nearly Optimal Analysis of Privacy
    Amplification by Shuffling", Theorem 3.1.

    Args:
      local_epsilon: epsilon of each report by itself, delta 0.
      num_reports: reports shuffled together.
      delta: of the central guarantee.

    Returns:
      The bound, or ``local_epsilon`` if that is less.

    Raises:
      ValueError: if ``local_epsilon`` is above the largest for which the theorem holds.
    """
    largest = math.log(num_reports / (16 * math.log(2 / delta)))
    if not 0 < local_epsilon <= largest:
        raise ValueError(
            f"The bound for {num_reports} shuffled reports at delta {delta:g} needs a local epsilon between 0 and "
            f"{max(largest, 0):.3g}; got {local_epsilon:g}. Use more reports, or count the local epsilon itself."
        )
    boost = math.exp(local_epsilon)
    spread = 8 * math.sqrt(boost * math.log(4 / delta) / num_reports) + 8 * boost / num_reports
    return min(local_epsilon, math.log1p((boost - 1) / (boost + 1) * spread))


def membership_auc_ceiling(epsilon: float, *, delta: float) -> float:
    """The largest AUC of any membership attack on a Gaussian mechanism that just satisfies (epsilon, delta).

    ``Phi(mu / sqrt 2)`` with the mu of Gaussian differential privacy (Dong, Roth, Su, 2022, "Gaussian Differential
    Privacy"), whose test between two unit Gaussians at distance mu has this area under its curve.
    """
    return float(norm.cdf(1 / get_sigma_gaussian(epsilon, delta) / math.sqrt(2)))
