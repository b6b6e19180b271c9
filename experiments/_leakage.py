"""The rows of the leakage study: what the server sees under each protection, and what attacks make of it."""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from dp_accounting import get_sigma_gaussian

from fedjax_rec.algorithms.fedavg import fedavg, fedsgd
from fedjax_rec.attacks.attributes import Inferred, binary_attributes, infer_attributes, item_features, upload_features
from fedjax_rec.attacks.interactions import infer_interactions
from fedjax_rec.attacks.item_sets import (
    evidence,
    f1_scores,
    fit_scorer,
    item_scores,
    named_items,
    popularity_prior,
    top_items,
)
from fedjax_rec.attacks.rating_inversion import CLIP_SCALES, invert_ratings, share_right
from fedjax_rec.attacks.shadow_models import only_train
from fedjax_rec.attacks.uploads import Uploads, observed_uploads, secure_sums
from fedjax_rec.data.clients import client_data
from fedjax_rec.data.interactions import Interactions
from fedjax_rec.data.negatives import Negatives
from fedjax_rec.federated.algorithm import Algorithm
from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.transforms import UNBOUNDED, UpdateTransform, chain
from fedjax_rec.models.matrix_factorization import matrix_factorization
from fedjax_rec.privacy.accounting import privacy_spent
from fedjax_rec.privacy.local_noise import local_gaussian
from fedjax_rec.privacy.mechanisms import clip_by_global_norm
from fedjax_rec.security.padding import pad_rows

DIM, L2, MEAN_RATING = 16, 0.02, 3.5
NUM_NEGATIVES, LOCAL_EPOCHS = 4, 3
DELTA, CLIP_NORM, NUM_FAKE = 5e-4, 0.05, 100
COHORTS, MOST_POSITIVES = 150, 100


class Workload(NamedTuple):
    """A method after some plain rounds; its next round's uploads are attacked."""

    algorithm: Algorithm
    clients: Any
    state: Any
    private: Any
    key: jax.Array

    def uploads(self, transforms: UpdateTransform, client_ids=None) -> Uploads:
        """What the server sees of each client under a chain."""
        state = self.state._replace(transforms=transforms.init(self.state.shared))
        return observed_uploads(self.algorithm, transforms, self.clients, state, self.private, self.key, client_ids)


def workload(algorithm, clients, *, num_rounds: int, seed: int) -> Workload:
    """Plain rounds with everybody."""
    rounds = make_rounds(algorithm, chain(), full_participation(clients.num_clients), clients, span_size=num_rounds)
    init_key, *keys = jax.random.split(jax.random.key(seed), 4)
    keys = RoundKeys(*keys)
    state, private = jax.jit(rounds.init)(init_key)
    state, private, _ = rounds.run(state, private, keys, num_rounds)
    return Workload(algorithm, clients, state, private, jax.random.fold_in(keys.client, state.round))


@dataclasses.dataclass(frozen=True, eq=False)
class World:
    """The data, both workloads, and whom the attacker knows.

    Attributes:
      train: all interactions, with ratings.
      truth: bool ``[users, items]``; stars: float32, ratings, NaN elsewhere; counts: int ``[users]``.
      known: int ids of a random half, whose items the attacker knows; targets: of the others.
      few: int ids of targets with few enough items for shadow clients.
      ratings: FedSGD on ratings; implicit: FedAvg with negatives.
    """

    train: Interactions
    truth: np.ndarray
    stars: np.ndarray
    counts: np.ndarray
    known: np.ndarray
    targets: np.ndarray
    few: np.ndarray
    ratings: Workload
    implicit: Workload
    seed: int


def make_world(train: Interactions, *, num_rounds: int, num_few: int, seed: int) -> World:
    """Both workloads, trained for a few rounds: the model is neither untrained nor done."""
    truth, stars = np.zeros((train.num_users, train.num_items), bool), None
    truth[train.user_ids, train.item_ids] = True
    stars = np.full(truth.shape, np.nan, np.float32)
    stars[train.user_ids, train.item_ids] = train.ratings
    order = np.random.default_rng(seed).permutation(train.num_users)
    known, targets = np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])
    few = targets[truth[targets].sum(1) <= MOST_POSITIVES][:num_few]
    model = matrix_factorization(train.num_items, dim=DIM, loss="squared", l2=L2, label_mean=MEAN_RATING)
    rated = fedsgd(model, server_optimizer=optax.adam(0.02), private_optimizer=optax.sgd(1.0))
    ranked = fedavg(
        matrix_factorization(train.num_items, dim=DIM),
        client_optimizer=optax.partition(
            {"shared": optax.sgd(5.0), "private": optax.sgd(20.0)},
            {"rows": "shared", "dense": "shared", "private": "private"},
        ),
        server_optimizer=optax.sgd(10.0),
        local_epochs=LOCAL_EPOCHS,
        negatives=Negatives(NUM_NEGATIVES),
    )
    split = only_train(train)
    with_stars = client_data(split, use_ratings=True, num_buckets=1)
    return World(
        train,
        truth,
        stars,
        truth.sum(1),
        known,
        targets,
        few,
        workload(rated, with_stars, num_rounds=num_rounds, seed=seed),
        workload(ranked, client_data(split, num_buckets=1), num_rounds=num_rounds, seed=seed + 1),
        seed,
    )


class Protection(NamedTuple):
    """What stands between a client and the server."""

    name: str
    links: tuple[UpdateTransform, ...] = ()
    members: int = 1  # of a sum
    clipped: bool = False
    whole: bool = False  # every row is sent

    @property
    def epsilon(self) -> float | None:
        """Of one client's report in one round: user-level, replace-one, at `DELTA`, computed from the chain."""
        event = chain(*self.links).local_dp_event(UNBOUNDED, 0)
        if event is None:
            return None
        return privacy_spent(event, delta=DELTA, relation="replace_one", unit="user").epsilon


def protections(world: World) -> tuple[Protection, ...]:
    """The rows of the study, without epsilon in their names."""
    secret, clip = jax.random.key(world.seed + 1000), clip_by_global_norm(CLIP_NORM)
    popularity = world.truth[world.known].sum(0) + 0.5

    def noise(epsilon):
        # Replacing a client's data moves its clipped update by up to twice the norm.
        return local_gaussian(2 * CLIP_NORM * get_sigma_gaussian(epsilon, DELTA))

    return (
        Protection("plain"),
        Protection("clip", (clip,), clipped=True),
        Protection(f"{NUM_FAKE} uniform fakes", (pad_rows(NUM_FAKE, key=secret),)),
        Protection(f"{NUM_FAKE} popular fakes", (pad_rows(NUM_FAKE, key=secret, weights=popularity),)),
        *(Protection("local noise", (clip, noise(epsilon)), clipped=True, whole=True) for epsilon in (1000, 8, 1)),
        *(Protection(f"sum of {members}", members=members) for members in (2, 5, 10, 50)),
    )


def measure(world: World, protection: Protection, plain: tuple[Uploads, Uploads]) -> dict[str, Any]:
    """All attacks on one protection, as JSON values.

    Args:
      world: of the study.
      protection: a row.
      plain: uploads of everybody without any protection, on ratings and on implicit feedback.
    """
    links, single = chain(*protection.links), protection.members == 1
    rated = plain[0] if not protection.links else world.ratings.uploads(links)
    prior = popularity_prior(world.truth[world.known])
    rng = np.random.default_rng([world.seed, protection.members])
    line = items_alone(world, rated, prior) if single else items_in_sums(world, rated, prior, protection.members, rng)
    line |= ratings(world, rated, protection, rng) | interactions(world, protection, plain[1], prior, rng)
    return line | attributes(world, rated, protection.members, rng)


def cohorts(members: np.ndarray, size: int, rng: np.random.Generator, *, first: np.ndarray | None = None) -> np.ndarray:
    """Cohorts of distinct clients, int ``[cohorts, size]``; the attack's target stands first."""
    first = rng.choice(members, COHORTS) if first is None else first
    others = np.stack([rng.choice(np.setdiff1d(members, who), size - 1, replace=False) for who in first])
    return np.concatenate([first[:, None], others], axis=1)


def items_alone(world: World, uploads: Uploads, prior: np.ndarray) -> dict[str, Any]:
    """Item sets from single uploads, by whichever attack does better on the clients that the attacker knows."""
    truth, counts, popular = world.truth, world.counts, np.broadcast_to(prior, world.truth.shape)
    seen = evidence(uploads, prior)
    scores = item_scores(fit_scorer(seen[world.known], truth[world.known]), seen)
    attacks = {"row ids": named_items(uploads), "learned": top_items(scores, counts)}
    best = max(attacks, key=lambda name: f1_scores(attacks[name][world.known], truth[world.known]).mean)
    found = f1_scores(attacks[best][world.targets], truth[world.targets])
    guess = f1_scores(top_items(popular, counts)[world.targets], truth[world.targets])
    return {"items": found.mean, "items_error": found.error, "items_attack": best, "items_popular": guess.mean}


def items_in_sums(world: World, uploads: Uploads, prior: np.ndarray, size: int, rng) -> dict[str, Any]:
    """One member's items from a cohort's sum, beside the same for another member and for a sum without the target.

    The attacker learns from sums of clients it knows what the rows of a member look like, and is told how many items
    the target has. The guess it must not beat is its own for another member of the same cohort, whose number of items
    it is told instead.
    """
    groups = [cohorts(who, size, rng) for who in (world.known, world.targets)]
    target, other = groups[1][:, 0], groups[1][:, 1]

    def scores(first):
        sums = [evidence(secure_sums(uploads, group[:, first:]), prior) for group in groups]
        return item_scores(fit_scorer(sums[0], world.truth[groups[0][:, 0]]), sums[1])

    def found(scores, who):
        return f1_scores(top_items(scores, world.counts[who]), world.truth[who])

    with_target, without = scores(0), found(scores(1), target)
    own, others = found(with_target, target), found(with_target, other)
    popular = found(np.broadcast_to(prior, with_target.shape), target)
    gap = own.f1 - others.f1
    return {
        "items": own.mean,
        "items_error": own.error,
        "items_attack": "learned",
        "items_popular": popular.mean,
        "items_other": others.mean,
        "items_gap": float(gap.mean()),
        "items_gap_error": float(gap.std(ddof=1) / len(gap) ** 0.5),
        "items_without": without.mean,
    }


def ratings(world: World, uploads: Uploads, protection: Protection, rng) -> dict[str, Any]:
    """Ratings of items that the attacker is told, and the item's mean rating as a guess."""
    who = world.targets
    if protection.members > 1:
        group = cohorts(world.targets, protection.members, rng)
        who, seen = group[:, 0], secure_sums(uploads, group)
    else:
        seen = uploads.take(who)
    found = invert_ratings(
        seen,
        world.ratings.state.shared,
        lengths=world.counts[who],
        rows=world.truth[who],
        l2=L2,
        label_mean=MEAN_RATING,
        scales=CLIP_SCALES if protection.clipped else (1.0,),
    )
    right, error = share_right(found.ratings, world.stars[who])
    known = world.stars[world.known]
    rated = ~np.isnan(known)
    means = (np.nansum(known, 0) + 5 * MEAN_RATING) / (rated.sum(0) + 5)
    guess, _ = share_right(np.broadcast_to(np.rint(means), world.stars[who].shape), world.stars[who])
    return {"ratings": right, "ratings_error": error, "ratings_guess": guess}


def interactions(world: World, protection: Protection, plain: Uploads, prior: np.ndarray, rng) -> dict[str, Any]:
    """Which rows of a client were its own, by shadow clients; noise and sums: the attacker is told the rows."""
    who, counts = world.few, world.counts[world.few]
    if protection.members > 1:
        everybody = np.arange(world.train.num_users)
        seen = secure_sums(plain, cohorts(everybody, protection.members, rng, first=who))
    else:
        seen = world.implicit.uploads(chain(*protection.links), who) if protection.links else plain.take(who)
    told = protection.whole or protection.members > 1
    rows = named_items(plain.take(who) if told else seen)
    key = jax.random.key(world.seed + 2000)
    odds = infer_interactions(
        world.implicit.algorithm, world.implicit.state.shared, seen, rows=rows, num_positives=counts, key=key
    )
    found = f1_scores(top_items(odds, counts), world.truth[who])
    popular = f1_scores(top_items(np.where(rows, prior, -np.inf), counts), world.truth[who])
    guess = float((counts / rows.sum(1)).mean())
    return {
        "interactions": found.mean,
        "interactions_error": found.error,
        "interactions_guess": guess,
        "interactions_popular": popular.mean,
    }


def attributes(world: World, uploads: Uploads, members: int, rng) -> dict[str, Any]:
    """Gender and age from uploads; in sums, each member has its cohort's features, and cohorts share a fold."""
    labels = binary_attributes(world.train)
    groups = np.arange(world.train.num_users)
    if members > 1:
        order = rng.permutation(groups)[: len(groups) // members * members]
        cohort = order.reshape(-1, members)
        features = np.repeat(upload_features(secure_sums(uploads, cohort)), members, axis=0)
        groups, labels = np.repeat(np.arange(len(cohort)), members), {name: x[order] for name, x in labels.items()}
    else:
        features = upload_features(uploads)
    return flat(infer_attributes(features, labels, seed=world.seed, groups=groups)) if labels else {}


def flat(found: dict[str, Inferred]) -> dict[str, Any]:
    """Inferred attributes as JSON values."""
    line = {}
    for name, result in found.items():
        line |= {
            f"{name}": result.curve.auc,
            f"{name}_error": result.curve.auc_error,
            f"{name}_accuracy": result.accuracy,
            f"{name}_majority": result.majority,
            f"{name}_control": result.control.auc,
        }
    return line


def released(world: World, num_items: int) -> dict[str, dict[str, Any]]:
    """Attributes from a few known items of each client: alone, with the first table, with the trained one."""
    rng = np.random.default_rng([world.seed, num_items])
    luck = np.where(world.truth, rng.random(world.truth.shape), -np.inf)
    some = top_items(luck, np.minimum(world.counts, num_items))
    first = jax.device_get(world.ratings.algorithm.init(jax.random.key(world.seed + 3000)).shared.tables["item"])
    trained = jax.device_get(world.ratings.state.shared.tables["item"])
    labels, groups = binary_attributes(world.train), np.arange(world.train.num_users)
    if not labels:
        return {}
    return {
        name: flat(infer_attributes(features, labels, seed=world.seed, groups=groups))
        for name, features in (
            ("items alone", item_features(some)),
            ("table before training", item_features(some, first)),
            ("released table", item_features(some, trained)),
        )
    }
