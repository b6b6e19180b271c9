"""Every mechanism of the update chain, calibrated to one epsilon for one run: what `privacy_cost` measures.

The run: matrix factorisation, 1,000 clients with 64 items each and four negatives for each, 40 rounds of 100 expected
clients.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from dp_accounting.dp_event import (
    ComposedDpEvent,
    DpEvent,
    GaussianDpEvent,
    LaplaceDpEvent,
    RandomizedResponseDpEvent,
    SelfComposedDpEvent,
    ZCDpEvent,
)

from fedjax_rec.federated.cohort import Sampler, in_turn, poisson
from fedjax_rec.federated.releases import local_releases, releases
from fedjax_rec.federated.transforms import UNBOUNDED, UpdateTransform, chain
from fedjax_rec.privacy.accounting import privacy_spent
from fedjax_rec.privacy.adafest import adafest
from fedjax_rec.privacy.adaptive_clip import user_level_adaptive_clip
from fedjax_rec.privacy.calibration import calibrate_noise_multiplier
from fedjax_rec.privacy.correlated import user_level_correlated
from fedjax_rec.privacy.discrete import round_to_grid, user_level_discrete_gaussian, user_level_skellam
from fedjax_rec.privacy.group_clip import clip_by_group_norm
from fedjax_rec.privacy.laplace import clip_by_l1_norm, user_level_laplace
from fedjax_rec.privacy.local_noise import local_gaussian, local_laplace
from fedjax_rec.privacy.mechanisms import clip_by_global_norm, gaussian_noise, user_level_dp
from fedjax_rec.privacy.privunit import privunit
from fedjax_rec.privacy.schedule import geometric, scheduled_gaussian
from fedjax_rec.privacy.select_rows import select_rows
from fedjax_rec.privacy.skellam import SkellamDpEvent
from fedjax_rec.privacy.strategies import banded_toeplitz, tree

EPSILON, DELTA, ROUNDS = 4.0, 1e-5, 40  # the run that all noise is calibrated for
CLIENTS, ROWS_PER_USER, NEGATIVES, COHORT = 1000, 64, 4, 100
CLIP, L1_CLIP, GROUPS = 0.05, 1.0, 8
SHARE_OF_ROWS = 0.05  # chosen once, or at most in a round
HEAD_NOISE = 5.0  # noise multiplier of the popularity that chooses rows once
DIM = 32
ROUNDED = {  # of the integer mechanisms: most numbers that a client sends, and most clients in a sum
    "granularity": CLIP / 100,
    "num_numbers": ROWS_PER_USER * (1 + NEGATIVES) * (DIM + 1),
    "max_clients": COHORT,
}
SCHEDULE = geometric(ROUNDS, 2.0)

ANY = poisson(CLIENTS, cohort_size=COHORT)
TURNS = in_turn(CLIENTS, num_groups=CLIENTS // COHORT)  # integer noise has no amplification
BANDS = in_turn(CLIENTS, num_groups=GROUPS, sampling_prob=COHORT * GROUPS / CLIENTS)


class World(NamedTuple):
    """What a chain is built for: the catalogue's size and the length of item vectors."""

    items: int
    dim: int

    @property
    def rows(self) -> int:
        """Rows that sparse mechanisms let through."""
        return max(int(SHARE_OF_ROWS * self.items), 1)


class Mechanism(NamedTuple):
    """One line of the table.

    Attributes:
      links: ``(world, noise) -> UpdateTransform``.
      event: ``(noise, round_index) -> DpEvent`` of one round, None without privacy; more noise costs less.
      sampler: of the cohorts, also for the rounds without links beside it.
      selection: noise multiplier of a choice of rows that is paid for as well, 0 for none.
      local: clients add the noise, and epsilon is of one client's own reports.
    """

    links: Callable[[World, float], UpdateTransform]
    event: Callable[[float, int], DpEvent] | None = None
    sampler: Sampler = ANY
    selection: float = 0.0
    local: bool = False

    @property
    def relation(self) -> str:
        """The neighbouring relation of its epsilon."""
        return "replace_one" if self.local else self.sampler.relation


def _gaussian(noise, _):
    return GaussianDpEvent(noise)


def _scheduled(noise, round_index):
    return GaussianDpEvent(noise * float(SCHEDULE[round_index]))


def _laplace(noise, _):
    return LaplaceDpEvent(noise)


def _discrete(noise, _):
    return ZCDpEvent(rho=0.5 / noise**2)


def _skellam(noise, _):
    bound = chain(clip_by_global_norm(CLIP), round_to_grid(**ROUNDED)).sensitivity(UNBOUNDED)
    return SkellamDpEvent(noise * bound.l2, l1_sensitivity=bound.l1, l2_sensitivity=bound.l2)


def _report(noise, _):
    return RandomizedResponseDpEvent(2 / (1 + math.exp(1 / noise)), 2)  # PrivUnit of epsilon 1 / noise


def _clipped(link: UpdateTransform) -> UpdateTransform:
    return chain(clip_by_global_norm(CLIP), link)


def _correlated(strategy) -> Mechanism:
    return Mechanism(
        lambda w, z: user_level_correlated(l2_clip_norm=CLIP, noise_multiplier=z, strategy=strategy), _gaussian, BANDS
    )


def _selected(world: World, noise: float) -> UpdateTransform:
    row_ids = np.random.default_rng(0).choice(world.items, world.rows, replace=False)
    return chain(select_rows(row_ids, num_rows=world.items), user_level_dp(l2_clip_norm=CLIP, noise_multiplier=noise))


MECHANISMS: dict[str, Mechanism] = {
    "none": Mechanism(lambda w, z: chain()),
    "clip only": Mechanism(lambda w, z: clip_by_global_norm(CLIP)),
    "Gaussian": Mechanism(lambda w, z: user_level_dp(l2_clip_norm=CLIP, noise_multiplier=z), _gaussian),
    "scheduled Gaussian": Mechanism(lambda w, z: _clipped(scheduled_gaussian(z * CLIP * SCHEDULE)), _scheduled),
    "adaptive clip": Mechanism(
        lambda w, z: user_level_adaptive_clip(
            noise_multiplier=z, target_quantile=0.5, cohort_size=COHORT, initial_l2_clip_norm=CLIP
        ),
        _gaussian,
    ),
    "per-group clip": Mechanism(
        lambda w, z: chain(clip_by_group_norm({"item": CLIP, "bias": CLIP}), gaussian_noise(z)), _gaussian
    ),
    "Laplace": Mechanism(lambda w, z: user_level_laplace(l1_clip_norm=L1_CLIP, noise_multiplier=z), _laplace),
    "discrete Gaussian": Mechanism(
        lambda w, z: user_level_discrete_gaussian(l2_clip_norm=CLIP, noise_multiplier=z, **ROUNDED), _discrete, TURNS
    ),
    "Skellam": Mechanism(
        lambda w, z: user_level_skellam(l2_clip_norm=CLIP, noise_multiplier=z, **ROUNDED), _skellam, TURNS
    ),
    "8 bands": _correlated(banded_toeplitz(ROUNDS, GROUPS)),
    "tree over 8 rounds": _correlated(tree(GROUPS)),
    "select_rows": Mechanism(_selected, _gaussian, selection=HEAD_NOISE),
    "AdaFEST": Mechanism(lambda w, z: adafest(l2_clip_norm=CLIP, noise_multiplier=z, max_rows=w.rows), _gaussian),
    "local Gaussian": Mechanism(lambda w, z: _clipped(local_gaussian(z * CLIP)), _gaussian, local=True),
    "local Laplace": Mechanism(
        lambda w, z: chain(clip_by_l1_norm(L1_CLIP), local_laplace(z * L1_CLIP)), _laplace, local=True
    ),
    "PrivUnit": Mechanism(
        lambda w, z: _clipped(privunit(1 / z, l2_norm=CLIP, num_numbers=w.items * (w.dim + 1))), _report, local=True
    ),
}


def _composed(events, selection: float) -> DpEvent:
    chosen = [GaussianDpEvent(selection)] if selection else []
    return ComposedDpEvent([*chosen, *(SelfComposedDpEvent(event, count) for event, count in events)])


@functools.lru_cache
def _calibrated(event, sampler: Sampler, selection: float, local: bool, relation: str) -> float:
    def run(noise: float) -> DpEvent:
        if local:
            return _composed([(event(noise, 0), ROUNDS)], selection)
        link = UpdateTransform(dp_event=lambda bound, round_index: event(noise, round_index))
        return _composed(releases(link, sampler, 0, ROUNDS), selection)

    found = calibrate_noise_multiplier(run, target_epsilon=EPSILON, delta=DELTA, relation=relation)
    return found.noise_multiplier


def noise_of(mechanism: Mechanism) -> float:
    """The noise at which the run meets `EPSILON`; 0 where there is none."""
    if mechanism.event is None:
        return 0.0
    return _calibrated(mechanism.event, mechanism.sampler, mechanism.selection, mechanism.local, mechanism.relation)


def spent(mechanism: Mechanism, links: UpdateTransform) -> float | None:
    """The epsilon of the run, from the chain that ran and not from what it was calibrated by; None without privacy."""
    local = mechanism.local
    events = local_releases(links, 0, ROUNDS) if local else releases(links, mechanism.sampler, 0, ROUNDS)
    if not events:
        return None
    event = _composed(events, mechanism.selection)
    return privacy_spent(event, delta=DELTA, relation=mechanism.relation).epsilon
