"""Scores of membership attacks on one target model, from the signals of it and its shadows: loss, LiRA and RMIA.

Loss attack: the signal itself, one threshold for all candidates; needs no shadows.

LiRA (Carlini et al., 2022, "Membership Inference Attacks From First Principles"): for each candidate, Gaussians fitted
to its signals on shadows with and without it; online, the log-likelihood ratio

    log N(x; m_in, v_in) - log N(x; m_out, v_out),

and offline, which needs no shadow with the candidate, (x - m_out) / sqrt(v_out): the paper's one-sided test is monotone
in it.

RMIA (Zarifzadeh, Liu and Shokri, 2024, "Low-Cost High-Power Membership Inference Attacks"): the share of population
samples z, which were in no training, that the candidate dominates,

    Pr_z [ (p(x | target) / p(x)) / (p(z | target) / p(z)) >= gamma ],

with p(x) the mean over shadows with and without x; offline, p(x) = ((1 + a) p_out(x) + 1 - a) / 2, a model of how p_in
follows from p_out. Confidences in one item of a catalogue are of the order of 1 / items: a = 1, "no difference", is the
only a for which they are not drowned by 1 - a, and the default here.
"""

from typing import NamedTuple

import numpy as np
from scipy.special import expit

ATTACKS = ("loss", "LiRA offline", "LiRA online", "RMIA offline", "RMIA online")
FEWEST_FOR_OWN_VARIANCE = 32  # shadows on either side; with fewer, candidates share one variance, as in the paper


class Evidence(NamedTuple):
    """Signals of many models about the same candidates.

    Attributes:
      signals: float ``[models, candidates]``.
      members: bool ``[models, candidates]``, in that model's training.
      valid: bool ``[models, candidates]``: an interaction is a candidate only where its user is in.
      population: float ``[models, samples]``, signals of what no model was trained on.
      population_valid: bool ``[models, samples]``, as ``valid``.
    """

    signals: np.ndarray
    members: np.ndarray
    valid: np.ndarray
    population: np.ndarray
    population_valid: np.ndarray


def target_scores(
    evidence: Evidence, target: int, *, gamma: float = 1.0, offline_a: float = 1.0
) -> dict[str, np.ndarray]:
    """Scores of every attack for one target, float64 ``[candidates]``, higher = rather a member.

    Args:
      evidence: of the target and its shadows.
      target: which model is attacked; what the evidence says of its members is not looked at.
      gamma, offline_a: of RMIA.
    """
    shadows = np.arange(len(evidence.signals)) != target
    signals = evidence.signals.astype(np.float64)
    inside = evidence.members[shadows] & evidence.valid[shadows]
    outside = ~evidence.members[shadows] & evidence.valid[shadows]
    x, among = signals[target], signals[shadows]
    fit_in, fit_out = _fit(among, inside), _fit(among, outside)
    # A candidate that no shadow shows from one side gets there from the other, by what is usual for candidates.
    both = (inside.any(0)) & (outside.any(0))
    step = float(np.mean((fit_in.mean - fit_out.mean)[both])) if both.any() else 0.0
    out = np.where(outside.any(0), fit_out.mean, fit_in.mean - step)
    into = np.where(inside.any(0), fit_in.mean, out + step)
    scores = {
        "loss": x,
        "LiRA offline": (x - out) / np.sqrt(fit_out.variance),
        "LiRA online": _log_density(x, into, fit_in.variance) - _log_density(x, out, fit_out.variance),
    }
    confidence, shadow_confidence = expit(x), expit(among)
    p_in, p_out = _mean(shadow_confidence, inside, expit(into)), _mean(shadow_confidence, outside, expit(out))
    z_valid = evidence.population_valid[target]
    z, z_shadows = (
        expit(s[..., z_valid].astype(np.float64)) for s in (evidence.population[target], evidence.population)
    )
    z_shadows, z_known = z_shadows[shadows], evidence.population_valid[shadows][:, z_valid]
    z_out = _mean(z_shadows, z_known, z)
    pairs = {
        "RMIA offline": (_offline(p_out, offline_a), _offline(z_out, offline_a)),
        "RMIA online": ((p_in + p_out) / 2, _offline(z_out, offline_a)),
    }
    for name, (p_x, p_z) in pairs.items():
        ratios = np.sort(z / p_z)
        scores[name] = np.searchsorted(ratios, confidence / p_x / gamma, side="right") / max(len(ratios), 1)
    return scores


class _Fit(NamedTuple):
    mean: np.ndarray
    variance: np.ndarray


def _fit(signals: np.ndarray, some: np.ndarray) -> _Fit:
    """Mean and variance of each candidate over some of the models ``[shadows, candidates]``."""
    counts = some.sum(0)
    mean = _mean(signals, some, np.zeros(signals.shape[1]))
    squares = np.where(some, np.square(signals - mean[None, :]), 0.0).sum(0)
    spare = np.maximum(counts - 1, 0)
    pooled = max(float(squares.sum() / max(spare.sum(), 1)), 1e-12)
    own = squares / np.maximum(spare, 1)
    return _Fit(mean, np.maximum(np.where(counts >= FEWEST_FOR_OWN_VARIANCE, own, pooled), 1e-12))


def _mean(values: np.ndarray, some: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    counts = some.sum(0)
    return np.where(counts > 0, np.where(some, values, 0.0).sum(0) / np.maximum(counts, 1), otherwise)


def _log_density(x, mean, variance):
    return -0.5 * (np.square(x - mean) / variance + np.log(variance))


def _offline(p_out: np.ndarray, a: float) -> np.ndarray:
    return ((1 + a) * p_out + 1 - a) / 2
