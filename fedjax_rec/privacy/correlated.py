"""Correlated noise (DP-FTRL): rounds that take back noise of earlier rounds, for clients that take turns.

The link of the chain that adds it, the choice of its strategy for a budget, and what may be published beside it.
"""

import math
from typing import NamedTuple

import dp_accounting
import jax
from dp_accounting.dp_event import DpEvent

from fedjax_rec.federated.algorithm import ServerState
from fedjax_rec.federated.cohort import Sampler, in_turn
from fedjax_rec.federated.transforms import UpdateTransform, chain
from fedjax_rec.privacy.calibration import calibrate_noise_multiplier
from fedjax_rec.privacy.mechanisms import clip_by_global_norm
from fedjax_rec.privacy.noise import standard_normal
from fedjax_rec.privacy.strategies import Strategy, banded_toeplitz, expected_prefix_error


def correlated_noise(stddev: float, strategy: Strategy) -> UpdateTransform:
    """Adds row t of ``C^-1 Z`` to the sum of round t, where every Z_t is Gaussian and independent of the others.

    Guarantee: together with an earlier clip at K, user-level, for adding or removing one client that takes part at
    most once in any ``strategy.min_separation`` rounds in a row: all sums released are a composition of one Gaussian
    mechanism of noise multiplier ``stddev / (K * strategy.column_norm)`` for each time that it takes part. The sampler
    `in_turn` draws such cohorts, and charges that once a turn. Why: multiplying by C, which is invertible and public,
    turns what is released into ``C G + Z``, G being the sums, so both say the same. A client that takes part in round s
    moves C G by its update times column s of C: by a norm of at most ``K * column_norm``, in rows s to ``s +
    min_separation - 1``, where no other round of that client reaches. Given all that was released before round s, these
    rows are one Gaussian mechanism, its rows released one by one; what others send in them may depend on the earlier of
    these rows, as the inputs of a Gaussian mechanism may (Denisov et al., 2022, "Improved Differential Privacy for SGD
    via Optimal Private Linear Operators on Adaptive Streams"). Where a coin of its own decides whether the client takes
    part in round s, it decides for all of these rows, so they are that mechanism on a Poisson sample of the client's
    fixed group (Choquette-Choo et al., 2023, "(Amplified) Banded Matrix Factorization: A unified approach to private
    training").

    The state of this link is noise of past rounds, from which earlier sums could be read off exactly. It belongs to
    whoever adds the noise, as the noise key does, and is no part of what is released: publish `published` states. It
    is in ``ServerState.transforms``, and so in checkpoints, which hold the key too.

    Args:
      stddev: standard deviation of Z, in units of the update, >= 0. Zero adds nothing and claims nothing.
      strategy: C; see `fedjax_rec.privacy.strategies`.

    Raises:
      ValueError: if ``stddev`` is negative or infinite; from `chain`, if no earlier link bounds the update; from a
        round, if the sums are not shaped like the shared parameters.
    """
    if not 0 <= stddev < math.inf:
        raise ValueError(f"The noise's standard deviation must be finite and not negative; got {stddev}.")

    def server(total, state, key):
        _check_shapes(total, state, strategy)
        leaves, structure = jax.tree.flatten(total)
        keys = jax.random.split(key, len(leaves))
        fresh = [stddev * standard_normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)]
        # Accelerators round the factors of a product to fewer bits unless told not to: then this is not C's inverse.
        with jax.default_matmul_precision("float32"):
            noise, state = strategy.noising.multiply_next(jax.tree.unflatten(structure, fresh), state)
        return jax.tree.map(lambda leaf, n: leaf + n, total, noise), state

    def dp_event(bound, round_index):
        del round_index
        if stddev == 0:
            return dp_accounting.NonPrivateDpEvent()
        if bound.l2 == math.inf:
            raise ValueError("correlated_noise needs an earlier link that bounds the update: put a clip before it.")
        return dp_accounting.GaussianDpEvent(stddev / (bound.l2 * strategy.column_norm))

    return UpdateTransform(
        init=strategy.noising.init_multiply,
        server=server,
        dp_event=dp_event,
        min_separation=strategy.min_separation,
    )


def _check_shapes(total, state, strategy: Strategy) -> None:
    def shapes(tree):
        return jax.tree.map(lambda leaf: leaf.shape, tree)

    needed, kept = shapes(jax.eval_shape(strategy.noising.init_multiply, total)), shapes(state)
    if needed != kept:
        raise ValueError(
            f"{strategy.name} keeps past noise for sums shaped like the shared parameters, as {kept}, and this "
            f"algorithm's clients send others, which need {needed}. Use gaussian_noise, which keeps nothing."
        )


def user_level_correlated(*, l2_clip_norm: float, noise_multiplier: float, strategy: Strategy) -> UpdateTransform:
    """Clip to ``l2_clip_norm``, then `correlated_noise` with the noise multiplier of the event as given.

    Guarantee: user-level; add-or-remove-one; for samplers with as many groups in turn as ``strategy.min_separation``;
    the released sequence is the `published` server states. Each turn costs one Gaussian of ``noise_multiplier``,
    amplified where the sampler draws from the group.

    Args:
      l2_clip_norm: as in `clip_by_global_norm`.
      noise_multiplier: that of a turn; Z has standard deviation ``noise_multiplier * l2_clip_norm * column_norm``.
      strategy: as in `correlated_noise`.
    """
    if noise_multiplier < 0:
        raise ValueError(f"noise_multiplier must not be negative; got {noise_multiplier}.")
    stddev = noise_multiplier * l2_clip_norm * strategy.column_norm
    return chain(clip_by_global_norm(l2_clip_norm), correlated_noise(stddev, strategy))


def published(state: ServerState) -> ServerState:
    """What of a server state may be published: all but the state of the transforms, which may hold noise to come off.

    The round, the shared parameters and the optimizer's state are computed from noised sums alone.
    """
    return state._replace(transforms=())


def run_event(noise_multiplier: float, sampler: Sampler, num_rounds: int) -> DpEvent:
    """The event of a run from round 0: one release for each turn that it enters, on cohorts that the sampler draws.

    With `calibrate_noise_multiplier`, the noise multiplier for a budget:
    ``calibrate_noise_multiplier(lambda z: run_event(z, sampler, 500), target_epsilon=8, delta=1e-5)``.
    """
    turns = -(-num_rounds // sampler.num_groups)
    return dp_accounting.SelfComposedDpEvent(sampler.dp_event(dp_accounting.GaussianDpEvent(noise_multiplier)), turns)


class BandChoice(NamedTuple):
    """What a number of bands comes to, for one population, cohort, length and budget.

    Attributes:
      bands: 1 is independent noise on Poisson cohorts of the whole population.
      sampling_prob: of a client of the round's group, for `in_turn` with ``num_groups=bands``.
      noise_multiplier: that meets the budget, for `user_level_correlated`.
      prefix_error: RMS over prefixes of the noise in an entry of a prefix sum, in units of the clip norm.
    """

    bands: int
    sampling_prob: float
    noise_multiplier: float
    prefix_error: float


def best_bands(
    *,
    num_clients: int,
    cohort_size: float,
    num_rounds: int,
    epsilon: float,
    delta: float,
    candidates: tuple[int, ...] | None = None,
) -> tuple[BandChoice, ...]:
    """Numbers of bands of `banded_toeplitz` at equal expected cohort and equal epsilon, least noise first.

    More bands take back more noise, and leave fewer clients that a round may draw from, so less amplification. A single
    round is noisier for it, several times: what gains is a server step that adds rounds up, such as SGD, and not one
    that divides by the size of a single round. Each candidate is calibrated, which takes about a second.

    Args:
      num_clients: in the population.
      cohort_size: expected clients a round.
      num_rounds: of the run.
      epsilon: of the run, user-level, add-or-remove-one.
      delta: in (0, 1).
      candidates: numbers of bands; by default the powers of two that leave groups no smaller than the cohort, and the
        largest such number, where nearly whole groups take part.

    Raises:
      ValueError: if a group would be smaller than the cohort.
    """
    most = min(int(num_clients // cohort_size), num_rounds)
    if candidates is None:
        candidates = tuple(sorted({*(2**i for i in range(most.bit_length())), most}))
    if not all(1 <= bands <= most for bands in candidates):
        raise ValueError(
            f"A cohort of {cohort_size} from {num_clients} clients, over {num_rounds} rounds, leaves between 1 and "
            f"{most} bands; got {candidates}."
        )

    def choice(bands):
        prob = min(cohort_size * bands / num_clients, 1.0)
        sampler = in_turn(num_clients, num_groups=bands, sampling_prob=prob)
        noise = calibrate_noise_multiplier(
            lambda z: run_event(z, sampler, num_rounds), target_epsilon=epsilon, delta=delta, relation=sampler.relation
        ).noise_multiplier
        strategy = banded_toeplitz(num_rounds, bands)
        error = noise * strategy.column_norm * expected_prefix_error(strategy, num_rounds)
        return BandChoice(bands, prob, noise, error)

    return tuple(sorted(map(choice, candidates), key=lambda choice: choice.prefix_error))
