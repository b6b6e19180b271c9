"""One cell of the matrix of attacks and defences: a population with fake users in it, trained and measured."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_rec.algorithms.fedavg import fedavg
from fedjax_rec.attacks.fake_users import fake_profiles, with_fake_users
from fedjax_rec.attacks.poisoned_uploads import (
    a_hum,
    adaptive,
    align_to_popular,
    explicit_boosting,
    fedrecattack,
    public_interactions,
)
from fedjax_rec.attacks.poisoning import Attack, poisoned
from fedjax_rec.attacks.poisoning_targets import choose_targets, exposure, target_cases
from fedjax_rec.data import Interactions, Split
from fedjax_rec.data.clients import ClientData, client_data
from fedjax_rec.data.negatives import Negatives
from fedjax_rec.evaluation import cases, client_scorer, evaluate
from fedjax_rec.federated.algorithm import Algorithm
from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.transforms import UpdateTransform, chain, scale
from fedjax_rec.models.matrix_factorization import matrix_factorization
from fedjax_rec.privacy.mechanisms import clip_by_global_norm
from fedjax_rec.security.fltrust import fltrust
from fedjax_rec.security.robust import clip_by_row_norm, krum, median, trimmed_mean

NO_ATTACK, NO_DEFENCE = "none", "none"
ROW_CLIPS = {  # the clip in units of the update, and what the server multiplies the sum by
    "row clip .001": (1e-3, 1.0),
    "row clip .0005": (5e-4, 1.0),
    "row clip .0003": (3e-4, 1.0),
    "row clip .0003, doubled": (3e-4, 2.0),
}


@dataclass(frozen=True)
class World:
    """What all cells of one data set share.

    Attributes:
      malicious_share: of all clients, fake ones included.
      num_fillers: items in a fake profile beside the targets.
      public_share: of the interactions that FedRecAttack and the adaptive attack see.
      l2_row_norm: of the attacker's rows where he need not fear a clip, in units of the update.
      boost: of the attacks with a loss that saturates.
      num_rows: of an upload of FedRecAttack and the adaptive attack.
      norm_clip: of a whole update, in units of the update.
      num_root: honest users whose data FLTrust's server has as well.
    """

    malicious_share: float = 0.05
    num_fillers: int = 40
    num_targets: int = 1
    public_share: float = 0.05
    l2_row_norm: float = 0.01
    boost: float = 1e9
    num_rows: int = 60
    num_popular: int = 10
    dim: int = 16
    num_rounds: int = 100
    client_lr: float = 0.1
    private_lr: float = 5.0
    norm_clip: float = 0.02
    num_root: int = 50
    num_buckets: int = 3
    chunk_size: int = 8

    def num_fake(self, num_honest: int) -> int:
        """Fake users that make up that share of all."""
        return max(1, round(num_honest * self.malicious_share / (1 - self.malicious_share)))


@dataclass(frozen=True, eq=False)
class Setting:
    """What an attack or a defence may be built from."""

    world: World
    split: Split
    target_ids: np.ndarray
    algorithm: Algorithm
    num_clients: int
    num_fake: int
    l2_row_norm: float  # what the attacker allows himself against this defence
    num_rows: int

    @property
    def public(self) -> np.ndarray:
        """What FedRecAttack sees of the honest users."""
        return public_interactions(self.split.train, share=self.world.public_share, seed=0)

    @property
    def popular_ids(self) -> np.ndarray:
        """The most popular items, which is public."""
        return np.argsort(-self.split.train.item_counts, kind="stable")[: self.world.num_popular]


ATTACKS: dict[str, Callable[[Setting], Attack]] = {
    NO_ATTACK: lambda s: Attack(NO_ATTACK),
    "random": lambda s: Attack("random"),
    "bandwagon": lambda s: Attack("bandwagon"),
    "popular": lambda s: align_to_popular(s.target_ids, popular_ids=s.popular_ids, l2_row_norm=s.l2_row_norm),
    "explicit boosting": lambda s: explicit_boosting(s.target_ids, l2_row_norm=s.l2_row_norm, boost=s.world.boost),
    "FedRecAttack": lambda s: fedrecattack(
        s.target_ids, public=s.public, l2_row_norm=s.l2_row_norm, num_rows=s.world.num_rows, boost=s.world.boost
    ),
    "A-hum": lambda s: a_hum(s.target_ids, l2_row_norm=s.l2_row_norm, boost=s.world.boost),
    "adaptive": lambda s: adaptive(
        s.target_ids, public=s.public, l2_row_norm=s.l2_row_norm, num_rows=s.num_rows
    ),
}  # fmt: skip

DEFENCES: dict[str, Callable[[Setting], UpdateTransform]] = {
    NO_DEFENCE: lambda s: chain(),
    "norm clip": lambda s: clip_by_global_norm(s.world.norm_clip),
    **{name: lambda s, clip=clip: row_clip(*clip) for name, clip in ROW_CLIPS.items()},
    "FLTrust": lambda s: fltrust(s.algorithm, root_clients(s.split, s.world.num_root)),
    "trimmed mean, each row": lambda s: trimmed_mean(0.1, min_support=1, max_clients=s.num_clients),
    "median, each row": lambda s: median(min_support=1, max_clients=s.num_clients),
    "median, min. support": lambda s: median(min_support=2 * s.num_fake + 1, max_clients=s.num_clients),
    "median, dense": lambda s: median(min_support=1, max_clients=s.num_clients, dense=True),
    "Krum": lambda s: krum(s.num_fake, max_clients=s.num_clients),
}


def row_clip(l2_row_norm: float, factor: float) -> UpdateTransform:
    """The clip, and a larger step with what it leaves: a clip slows honest clients down as well."""
    clip = clip_by_row_norm(l2_row_norm)
    return clip if factor == 1 else chain(clip, scale(factor))


def known_to_the_adaptive(world: World, defence: str) -> tuple[float, int]:
    """Row norm and number of rows of the attacker who knows which defence there is, and its clip."""
    if defence == "norm clip":  # few rows of two tables that together just pass
        return world.norm_clip / math.sqrt(2 * 5), 5
    return ROW_CLIPS.get(defence, (world.l2_row_norm,))[0], world.num_rows


def method(world: World, num_items: int, num_clients: int):
    """Matrix factorisation with BPR: one full-batch step a client, and the server adds the updates up."""
    model = matrix_factorization(num_items, dim=world.dim, loss="bpr")
    optimizer = optax.partition(
        {"shared": optax.sgd(world.client_lr), "private": optax.sgd(world.private_lr)},
        {"rows": "shared", "dense": "shared", "private": "private"},
    )
    server = optax.sgd(float(num_clients))
    return fedavg(model, client_optimizer=optimizer, server_optimizer=server, negatives=Negatives(1)), model


def run_cell(split: Split, attack: str, defence: str, world: World, *, seed: int) -> dict[str, float]:
    """Trains one population and measures honest users.

    Without an attack the fake users are in the population and never in a cohort, so that it is the same population.

    Args:
      split: of the honest users.
      attack: of `ATTACKS`.
      defence: of `DEFENCES`.
      world: settings.
      seed: of targets, fake profiles and training.
    """
    counts = split.train.item_counts
    target_ids = choose_targets(counts, num_targets=world.num_targets, seed=seed)
    num_fake = world.num_fake(split.num_users)
    profiles = fake_profiles(
        "random" if attack == "random" else "bandwagon",
        target_ids=target_ids,
        item_counts=counts,
        num_fake=num_fake,
        num_fillers=world.num_fillers,
        seed=seed,
    )
    population, malicious = with_fake_users(split, profiles)
    clients = client_data(population, num_buckets=world.num_buckets)
    algorithm, model = method(world, split.num_items, clients.num_clients)
    l2_row_norm, num_rows = world.l2_row_norm, world.num_rows
    if attack == "adaptive":
        l2_row_norm, num_rows = known_to_the_adaptive(world, defence)
    setting = Setting(
        world,
        split,
        target_ids,
        algorithm,
        clients.num_clients,
        num_fake,
        l2_row_norm,
        min(num_rows, split.num_items - 1),
    )
    transforms = DEFENCES[defence](setting)
    everyone = full_participation(clients.num_clients)
    if attack == NO_ATTACK:
        everyone = everyone._replace(draw=lambda key, round_index: jnp.asarray(~malicious))
    else:
        algorithm = poisoned(algorithm, ATTACKS[attack](setting), malicious)
    rounds = make_rounds(
        algorithm, transforms, everyone, clients, span_size=world.num_rounds, chunk_size=world.chunk_size
    )
    init_key, *keys = jax.random.split(jax.random.key(seed), 4)
    state, private = rounds.init(init_key)
    state, private, _ = rounds.run(state, private, RoundKeys(*keys), world.num_rounds)
    honest = jax.tree.map(lambda x: x[: split.num_users], private)
    scorer = client_scorer(model.score, shared=state.shared, private=honest)
    found = evaluate(scorer, cases(split), ks=(10,)).values
    return {name: found[name] for name in ("hit@10", "ndcg@10")} | exposure(scorer, target_cases(split, target_ids))


def root_clients(split: Split, num: int) -> ClientData:
    """The first users with training rows, as clients of the server's own."""
    users = np.flatnonzero(split.train.counts_per_user)[:num]
    rows = [_only(part, users) for part in (split.train, split.validation, split.test, split.history)]
    return client_data(Split(*rows, rule=split.rule), num_buckets=1)


def _only(part: Interactions, users: np.ndarray) -> Interactions:
    kept = part.take(np.isin(part.user_ids, users))
    offsets = np.concatenate([[0], np.cumsum(kept.counts_per_user[users])]).astype(np.int64)
    return dataclasses.replace(kept, offsets=offsets, user_labels=part.user_labels[users], user_attributes={})
