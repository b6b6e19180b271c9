"""What a private run will release: the chain that its settings ask for, with the noise that meets its budget."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import dp_accounting
from dp_accounting.dp_event import DpEvent

from fedjax_rec.federated.cohort import Sampler
from fedjax_rec.federated.releases import check_pair, releases
from fedjax_rec.federated.transforms import UNBOUNDED, UpdateTransform, chain
from fedjax_rec.privacy import accounting
from fedjax_rec.privacy.adaptive_clip import adaptive_clip
from fedjax_rec.privacy.calibration import calibrate_noise_multiplier
from fedjax_rec.privacy.correlated import correlated_noise
from fedjax_rec.privacy.discrete import LARGEST_SUM, discrete_gaussian_noise, round_to_grid, skellam_noise
from fedjax_rec.privacy.group_clip import clip_by_group_norm
from fedjax_rec.privacy.laplace import clip_by_l1_norm, laplace_noise
from fedjax_rec.privacy.ledger import Budget, Ledger, affordable_rounds
from fedjax_rec.privacy.mechanisms import clip_by_global_norm, gaussian_noise
from fedjax_rec.privacy.noise import MOST_INTEGER_STDDEV
from fedjax_rec.privacy.schedule import geometric, scheduled_gaussian
from fedjax_rec.privacy.strategies import banded_toeplitz, tree
from fedjax_rec.runs.config import PrivacyConfig, TrainConfig
from fedjax_rec.runs.uploads import compression, in_fixed_point, least_clients, way_to_sum
from fedjax_rec.security.distributed import discrete_gaussian_shares, skellam_shares, without_colluders

# Steps of the grid up to the clip norm, for each square root of the numbers in an update: with ten of them, rounding
# raises the sensitivity by an eighth of a percent.
_STEPS_PER_ROOT, _LEAST_STEPS_PER_ROOT = 10.0, 2.0
# The paper's noise in the count of clipped clients is a twentieth of the cohort; in a small one it would cost most of
# the budget, and gets this much of it at most.
_MOST_COUNT_SHARE = 0.1


@dataclasses.dataclass(frozen=True, eq=False)
class PrivacyPlan:
    """What will be released, under which noise, and how much of it the budget allows.

    Attributes:
      transforms: the chain of every round.
      noise_multiplier: of the noise in a round's sum (of the last round, where a schedule changes it).
      l2_clip_norm: bound on one client's update, in the norm that the mechanism clips.
      delta: of the guarantee.
      budget: epsilon and delta, or None if only the noise was given.
      ledger: what is charged before the first round.
      num_rounds: rounds that the budget allows, at most those asked for.
    """

    transforms: UpdateTransform
    noise_multiplier: float
    l2_clip_norm: float
    delta: float
    budget: Budget | None
    ledger: Ledger
    num_rounds: int


def default_delta(num_users: int) -> float:
    """1 / users^1.1, to two digits, at most 0.1: below one in the population, as a delta must be to mean anything."""
    return min(float(f"{num_users**-1.1:.1e}"), 0.1)


def private_chain(
    config: TrainConfig, noise_multiplier: float, *, sampler: Sampler, update_size: int, num_items: int = 0
):
    """The chain that ``config`` asks for, but for its sum: a clip, what makes uploads smaller, and the noise.

    The noise is ``noise_multiplier`` times the bound of what it is added to.

    Args:
      config: of the run.
      noise_multiplier: standard deviation (Laplace: scale) over the bound; of the last round of a schedule.
      sampler: of the cohorts.
      update_size: numbers in the largest client's update, as it is sent.
      num_items: catalogue size, for compression that depends on it.

    Returns:
      `UpdateTransform`.
    """
    # Compression first: some of it lengthens an update, and the clip has to bound what is summed.
    smaller = compression(config.upload, num_items=num_items)
    clip = chain(smaller, _clip(config.privacy, noise_multiplier, sampler))
    if config.upload.sum != "float":
        shares = noise_multiplier if config.privacy.in_shares else 0.0
        norm = clip.sensitivity(UNBOUNDED).l2
        clip = chain(clip, in_fixed_point(config, sampler, num_numbers=update_size, l2_norm=norm, shares_noise=shares))
    bound = clip.sensitivity(UNBOUNDED)
    stddev = noise_multiplier * bound.l2
    match config.privacy.mechanism:
        case "skellam_shares":
            return chain(clip, skellam_shares(stddev, min_clients=least_clients(config, sampler)))
        case "discrete_gaussian_shares":
            least = least_clients(config, sampler)
            return chain(clip, discrete_gaussian_shares(stddev, min_clients=least, num_numbers=update_size))
        case "gaussian" if config.privacy.schedule_ratio != 1.0:
            multipliers = geometric(config.rounds, config.privacy.schedule_ratio, num_groups=sampler.num_groups)
            return chain(clip, scheduled_gaussian(stddev * multipliers))
        case "gaussian":
            return chain(clip, gaussian_noise(stddev))
        case "laplace":
            return chain(clip, laplace_noise(noise_multiplier * bound.l1))
        case "discrete_gaussian" | "skellam" as name:
            noise = discrete_gaussian_noise if name == "discrete_gaussian" else skellam_noise
            grid = _grid(bound.l2, noise_multiplier, sampler, update_size)
            return chain(clip, grid, noise(noise_multiplier * grid.sensitivity(bound).l2))
        case "banded":
            strategy = banded_toeplitz(config.rounds, sampler.num_groups)
        case "tree":
            strategy = tree(sampler.num_groups)
    return chain(clip, correlated_noise(stddev * strategy.column_norm, strategy))


def _grid(l2_norm: float, noise_multiplier: float, sampler: Sampler, update_size: int) -> UpdateTransform:
    """As fine a grid as hardly raises the sensitivity, and as coarse as the sum and its noise need."""
    max_clients, root = math.ceil(sampler.expected_size), math.sqrt(update_size)
    most_by_sum, most_by_noise = 0.9 * LARGEST_SUM / max_clients, 0.95 * MOST_INTEGER_STDDEV / noise_multiplier
    steps = min(_STEPS_PER_ROOT * root, most_by_sum - root, most_by_noise - root)
    if steps < _LEAST_STEPS_PER_ROOT * root:
        raise ValueError(
            f"Integer sums of {max_clients} clients with {update_size} numbers each, and noise of multiplier "
            f"{noise_multiplier:g}, do not fit into what can be drawn and added exactly. Use --privacy.mechanism "
            "gaussian, smaller cohorts, or a smaller --model.dim."
        )
    return round_to_grid(l2_norm / steps, num_numbers=update_size, max_clients=max_clients)


def _most_noise(config: TrainConfig, update_size: int, sampler: Sampler) -> float:
    """The largest noise multiplier that a search for it may ask for."""
    if config.privacy.in_shares:  # by then, rounding makes nearly all of the bound
        return 0.5 * MOST_INTEGER_STDDEV * math.sqrt(least_clients(config, sampler) / update_size)
    if config.privacy.mechanism not in ("discrete_gaussian", "skellam"):
        return math.inf
    return 0.94 * MOST_INTEGER_STDDEV / ((_LEAST_STEPS_PER_ROOT + 1) * math.sqrt(update_size))


def _clip(settings: PrivacyConfig, noise_multiplier: float, sampler: Sampler) -> UpdateTransform:
    norm = settings.l2_clip_norm
    if settings.mechanism == "laplace":
        return clip_by_l1_norm(norm)
    match settings.clip:
        case "adaptive":
            return adaptive_clip(
                target_quantile=settings.target_quantile,
                cohort_size=sampler.expected_size,
                initial_l2_clip_norm=norm,
                count_share=min((10 * noise_multiplier / sampler.expected_size) ** 2, _MOST_COUNT_SHARE),
            )
        case "per_table":
            return clip_by_group_norm({"item": norm, "bias": norm})
    return clip_by_global_norm(norm)


def plan_privacy(
    config: TrainConfig, sampler: Sampler, *, num_clients: int, update_size: int, num_items: int = 0
) -> PrivacyPlan:
    """Solves for the noise that meets the budget, or counts the rounds that given noise affords.

    Args:
      config: private.
      sampler: of the cohorts.
      num_clients: clients in the population.
      update_size: numbers in the largest client's update, as it is sent.
      num_items: catalogue size.

    Raises:
      ValueError: if the mechanism and the sampler have no bound together, or no noise meets the budget.
      BudgetExceeded: if the budget does not afford one round of the given noise.
    """
    settings = config.privacy
    delta = default_delta(num_clients) if config.delta is None else config.delta
    trust_model = "secure_sum" if settings.in_shares else "central"
    ledger = Ledger(unit="user", relation=sampler.relation, trust_model=trust_model)
    if config.client.negative_distribution == "popularity":
        ledger = ledger.record(
            dp_accounting.GaussianDpEvent(settings.popularity_noise_multiplier),
            phase="popularity",
            released="noised item counts, for drawing negatives",
        )
    budget = None if config.epsilon is None else Budget(config.epsilon, delta)
    make_chain = partial(private_chain, config, sampler=sampler, update_size=update_size, num_items=num_items)
    most_noise = _most_noise(config, update_size, sampler)
    check_pair(chain(make_chain(min(1.0, most_noise)), way_to_sum(config, sampler)), sampler)
    noise, num_rounds = settings.noise_multiplier, config.rounds
    if noise is None:
        noise = calibrate_noise_multiplier(
            lambda z: run_event(ledger, make_chain(min(z, most_noise)), sampler, config.rounds),
            target_epsilon=config.epsilon,
            delta=delta,
            relation=sampler.relation,
        ).noise_multiplier
    elif budget is not None:
        num_rounds = _affordable(ledger, make_chain(noise), sampler, budget, limit=config.rounds)
    transforms = chain(make_chain(noise), way_to_sum(config, sampler))
    return PrivacyPlan(transforms, noise, settings.l2_clip_norm, delta, budget, ledger, num_rounds)


def run_event(ledger: Ledger, transforms: UpdateTransform, sampler: Sampler, num_rounds: int) -> DpEvent:
    """Everything that a run releases: what the ledger holds already, and its rounds."""
    rounds = [dp_accounting.SelfComposedDpEvent(e, count) for e, count in releases(transforms, sampler, 0, num_rounds)]
    return dp_accounting.ComposedDpEvent([ledger.event, *rounds])


def _affordable(ledger: Ledger, transforms: UpdateTransform, sampler: Sampler, budget: Budget, *, limit: int) -> int:
    """The most rounds from the first on that the budget allows; at least one, or `BudgetExceeded`."""
    run = releases(transforms, sampler, 0, limit)
    if len(run) == 1 and run[0][1] == limit:
        num_rounds = affordable_rounds(ledger, run[0][0], budget, limit=limit)
    else:
        num_rounds = _largest(lambda n: _fits(run_event(ledger, transforms, sampler, n), ledger, budget), limit)
    if num_rounds == 0:
        budget.require(ledger, run[0][0])
    return num_rounds


def _fits(event: DpEvent, ledger: Ledger, budget: Budget) -> bool:
    spent = accounting.privacy_spent(event, delta=budget.delta, relation=ledger.relation, unit=ledger.unit)
    return spent.epsilon <= budget.epsilon


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number of rounds in [0, limit] that fits, where more rounds never cost less."""
    low, high = 0, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def with_colluders(config: TrainConfig, plan: PrivacyPlan, sampler: Sampler) -> tuple[int, float]:
    """For noise in shares: how many clients may collude, and the run's epsilon for whoever knows their shares."""
    least = least_clients(config, sampler)
    colluding = math.floor(config.privacy.colluding_share * least)
    event = without_colluders(plan.transforms.dp_event(UNBOUNDED, 0), colluding=colluding, min_clients=least)
    composed = dp_accounting.ComposedDpEvent(
        [plan.ledger.event, dp_accounting.SelfComposedDpEvent(event, plan.num_rounds)]
    )
    spent = accounting.privacy_spent(composed, delta=plan.delta, relation=plan.ledger.relation, unit=plan.ledger.unit)
    return colluding, spent.epsilon
