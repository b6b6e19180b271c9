"""Click prediction with fields: DCN-V2 and DeepFM in one place, by clients and in silos. MovieLens 100K as clicks.

    python -m experiments clicks --data-dir ~/data/ml-100k --seeds 3
    python -m experiments clicks --criteo train.txt --max-rows 100000

The first makes results/clicks.md; the second trains on a file in Criteo's format, prints, and writes nothing.
"""

import dataclasses
import math
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import harness
from experiments._click_rates import item_sums, lifts, own_rates
from experiments._criteo import criteo_main
from experiments.harness import Options, Row, Study
from fedjax_rec.algorithms.fedavg import fedavg
from fedjax_rec.algorithms.silo_dpsgd import ExampleLevelDp, record_rounds, silo_dpsgd
from fedjax_rec.data import Split, load, ratio_split
from fedjax_rec.data.clients import client_data
from fedjax_rec.data.interactions import Interactions
from fedjax_rec.data.negatives import Negatives
from fedjax_rec.data.silos import private_of_users, silo_data
from fedjax_rec.data.synthetic import synthetic
from fedjax_rec.evaluation.clicks import auc, logloss, user_auc
from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.transforms import chain
from fedjax_rec.models.centralised import centralised
from fedjax_rec.models.click_network import ClickNetwork
from fedjax_rec.models.clicks import client_clicks, with_user_values
from fedjax_rec.models.cross_network import dcn_v2
from fedjax_rec.models.deep_fm import deep_fm, factorization_machine, logistic_regression
from fedjax_rec.models.fields import FieldBatch, Fields, dense_values, enumerated, join, many_valued
from fedjax_rec.privacy import Ledger, calibrate_noise_multiplier
from fedjax_rec.privacy.mechanisms import user_level_dp

METRICS = ("auc", "user auc", "logloss")
CLICK = 4.0  # a rating from here on is a click
USER_DELTA, EXAMPLE_DELTA = 1e-4, 1e-6  # about a tenth of 1 / users, and of 1 / examples


class World(NamedTuple):
    """Data and what is public about it."""

    split: Split
    item_fields: tuple[Fields, FieldBatch]
    user_fields: Fields
    user_values: np.ndarray


def small_dcn(num_fields: int) -> ClickNetwork:
    """DCN-V2 that a phone trains and noise leaves something of."""
    return dcn_v2(num_fields, dim=4, num_cross=2, hidden=(16,))


class Recipe(NamedTuple):
    """A network and the steps that suit it, chosen on validation examples of seed 0.

    Attributes:
      network: from a number of fields.
      central_lr: of Adam in one place.
      init_stddev: of the rows of all fields.
      rounds, server_lr: by clients without privacy; the server takes Adam.
      private_rounds, private_server_lr, clip_norm: by clients with user-level privacy.
      silo_lr: of Adam in silos; users' own vectors take a fifth of it, as they have few examples each.
    """

    network: Callable[[int], ClickNetwork]
    central_lr: float
    init_stddev: float = 0.01
    rounds: int = 60
    server_lr: float = 0.03
    private_rounds: int = 15
    private_server_lr: float = 0.05
    clip_norm: float = 0.02
    silo_lr: float = 0.05


RECIPES = {
    "LR": Recipe(logistic_regression, 1e-2),
    "FM": Recipe(factorization_machine, 2e-3),
    "DeepFM": Recipe(deep_fm, 1e-3),
    "DCN-V2": Recipe(dcn_v2, 1e-3),
    "small DCN-V2": Recipe(
        small_dcn, 2e-3, init_stddev=0.05, rounds=20, private_rounds=30, private_server_lr=0.02, silo_lr=0.01
    ),
}
CLIENT_LR, BATCH_SIZE = 0.1, 32
SILO, SILO_ROUNDS = ExampleLevelDp(0.25, 1.0, 0.0, num_local_steps=20), 5


def fields_of(data: Interactions) -> tuple[tuple[Fields, FieldBatch], Fields, np.ndarray]:
    """Genres and half decade of every item; gender, age group and occupation of every user, where there are any."""
    years = [int(found[1]) if (found := re.search(r"\((\d{4})\)", title)) else 0 for title in data.item_titles]
    item = [
        many_valued("genres", data.item_genres),
        enumerated("half decade", np.array(years) // 5, vocabulary=range(1920 // 5, 2005 // 5)),
    ]
    user = []
    for name, values in sorted(data.user_attributes.items()):
        if name == "age":
            user.append(enumerated("age group", np.minimum(values // 10, 6), vocabulary=range(7)))
        elif name != "zip_code":
            user.append(enumerated(name, values, vocabulary=np.unique(values)))
    layout, batch = join(user)
    return join(item), layout, dense_values(layout, batch)


@cache
def world(data_dir: Path | None, smoke: bool) -> World:
    """Ratings as clicks, each user's latest tenth for test and the tenth before it for validation."""
    data = synthetic(num_users=60, num_items=60, ratings=True) if smoke else load("movielens/100k", data_dir=data_dir)
    data = dataclasses.replace(data, ratings=(data.ratings >= CLICK).astype(np.float32))
    return World(ratio_split(data, test_ratio=0.1, validation_ratio=0.1), *fields_of(data))


@cache
def built(name: str, data_dir: Path | None, smoke: bool):
    """The model of a recipe; one for all seeds, so that they share a compilation."""
    at, recipe = world(data_dir, smoke), RECIPES[name]
    return client_clicks(
        recipe.network,
        num_items=at.split.num_items,
        item_fields=at.item_fields,
        user_fields=at.user_fields,
        init_stddev=recipe.init_stddev,
    )


def judged(part: Interactions, logits: np.ndarray) -> dict[str, float]:
    """The metrics of held-out examples."""
    within = user_auc(part.ratings, logits, part.user_ids)
    return dict(zip(METRICS, (auc(part.ratings, logits), within.value, logloss(part.ratings, logits)), strict=True))


def scored(at: World, model, shared, private) -> dict[str, dict[str, float]]:
    """The metrics of a model's log-odds, by part."""
    found = {}
    for name in ("validation", "test"):
        part = getattr(at.split, name)
        logits = model.logits(shared, private, jnp.asarray(part.user_ids), jnp.asarray(part.item_ids))
        found[name] = judged(part, np.asarray(logits))
    return found


# In one place.


@cache
def central_training(name: str, options: Options):
    """Compiled epochs."""
    at, model = world(options.data_dir, options.smoke), built(name, options.data_dir, options.smoke)
    clients = client_data(at.split, use_ratings=True, num_buckets=1 if options.smoke else 5)
    optimizer = optax.adam(RECIPES[name].central_lr)
    return centralised(model.model, clients, optimizer=optimizer, negatives=Negatives(0))


def central(name: str, seed: int, options: Options) -> dict:
    """Epochs of Adam until two in a row have not lowered validation logloss; the best is kept."""
    at, model = world(options.data_dir, options.smoke), built(name, options.data_dir, options.smoke)
    training = central_training(name, options)
    init_key, run_key = jax.random.split(jax.random.key(seed))
    state = training.init(init_key)
    state = state._replace(private=with_user_values(state.private, at.user_values))
    best, since, epoch = None, 0, 0
    while since < 2 and epoch < (1 if options.smoke else 15):
        state, _ = training.run_epoch(state, run_key)
        epoch += 1
        found = scored(at, model, state.shared, state.private) | {"epochs": epoch}
        since += 1
        if best is None or found["validation"]["logloss"] < best["validation"]["logloss"]:
            best, since = found, 0
    return best


# By clients, all of them in every round.


@cache
def noise_for(epsilon: float, num_rounds: int) -> float:
    """The noise multiplier of full-participation rounds at a target epsilon, user-level."""

    def run_event(noise_multiplier):
        return dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(noise_multiplier), num_rounds)

    return calibrate_noise_multiplier(run_event, target_epsilon=epsilon, delta=USER_DELTA).noise_multiplier


@cache
def federated_rounds(name: str, epsilon: float, options: Options):
    """Compiled rounds, and how many."""
    at, recipe = world(options.data_dir, options.smoke), RECIPES[name]
    model = built(name, options.data_dir, options.smoke)
    private = math.isfinite(epsilon)
    num_rounds = 2 if options.smoke else recipe.private_rounds if private else recipe.rounds
    algorithm = fedavg(
        model.model,
        client_optimizer=optax.sgd(CLIENT_LR),
        server_optimizer=optax.adam(recipe.private_server_lr if private else recipe.server_lr),
        batch_size=BATCH_SIZE,
    )
    links = chain()
    if private:
        links = user_level_dp(l2_clip_norm=recipe.clip_norm, noise_multiplier=noise_for(epsilon, num_rounds))
    clients = client_data(at.split, use_ratings=True, num_buckets=1 if options.smoke else 5)
    sampler = full_participation(at.split.num_users)
    return make_rounds(algorithm, links, sampler, clients, span_size=num_rounds), num_rounds


def federated(name: str, epsilon: float, seed: int, options: Options) -> dict:
    """FedAvg over clients; at a finite epsilon with a clip and noise on each round's sum."""
    at, model = world(options.data_dir, options.smoke), built(name, options.data_dir, options.smoke)
    rounds, num_rounds = federated_rounds(name, epsilon, options)
    init_key, *keys = jax.random.split(jax.random.key(seed), 4)
    state, private = rounds.init(init_key)
    state, private, metrics = rounds.run(state, with_user_values(private, at.user_values), RoundKeys(*keys), num_rounds)
    found = scored(at, model, state.shared, private) | {"loss": np.asarray(metrics["loss"])[:num_rounds:10].tolist()}
    if rounds.private:
        ledger = rounds.charge(Ledger(), first_round=0, num_rounds=num_rounds)
        found["epsilon spent"] = ledger.spent(USER_DELTA).epsilon
        found["clipped"] = float(np.asarray(metrics["clipped"])[:num_rounds].mean())
    return found


# In silos, one for each occupation.


@cache
def silo_noise(epsilon: float, num_rounds: int) -> ExampleLevelDp:
    """The settings of a silo at a target epsilon, example-level."""
    if math.isinf(epsilon):
        return SILO

    def run_event(noise_multiplier):
        event = dataclasses.replace(SILO, noise_multiplier=noise_multiplier).round_event
        return dp_accounting.SelfComposedDpEvent(event, num_rounds)

    found = calibrate_noise_multiplier(run_event, target_epsilon=epsilon, delta=EXAMPLE_DELTA, unit="example")
    return dataclasses.replace(SILO, noise_multiplier=found.noise_multiplier)


@cache
def silo_rounds(name: str, epsilon: float, options: Options):
    """Compiled rounds, the silos, their privacy, and how many rounds."""
    at, model = world(options.data_dir, options.smoke), built(name, options.data_dir, options.smoke)
    groups = at.split.train.user_attributes["favourite_genre" if options.smoke else "occupation"]
    silos = silo_data(at.split, groups, use_ratings=True)
    num_rounds = 1 if options.smoke else SILO_ROUNDS
    privacy = silo_noise(epsilon, num_rounds)
    lr = RECIPES[name].silo_lr
    algorithm = silo_dpsgd(
        model.model,
        privacy=privacy,
        users_per_silo=silos.users_per_silo,
        # Noise falls on private leaves too: what users say of themselves is no parameter and stays as it is.
        client_optimizer=optax.partition(
            {"shared": optax.adam(lr), "own": optax.adam(0.2 * lr), "keep": optax.set_to_zero()},
            ("shared", {"own": "own", "user": "keep"}),
        ),
        num_negatives=0,
        example_chunk_size=256,
    )
    sampler = full_participation(silos.clients.num_clients)
    rounds = make_rounds(algorithm, chain(), sampler, silos.clients, span_size=num_rounds)
    return rounds, silos, privacy, num_rounds


def in_silos(name: str, epsilon: float, seed: int, options: Options) -> dict:
    """DP-SGD on examples in every silo, and FedAvg over silos."""
    at, model = world(options.data_dir, options.smoke), built(name, options.data_dir, options.smoke)
    rounds, silos, privacy, num_rounds = silo_rounds(name, epsilon, options)
    init_key, *keys = jax.random.split(jax.random.key(seed), 4)
    state, private = rounds.init(init_key)
    values = np.zeros(private["user"].shape, np.float32)
    values[silos.silo_ids, silos.user_slots] = at.user_values
    state, private, _ = rounds.run(state, with_user_values(private, values), RoundKeys(*keys), num_rounds)
    found = scored(at, model, state.shared, private_of_users(private, silos))
    if privacy.noise_multiplier:
        ledger = record_rounds(Ledger(unit="example", trust_model="silo"), privacy, num_rounds=num_rounds)
        found["epsilon spent"] = ledger.spent(EXAMPLE_DELTA).epsilon
    return found


# Floors without training.


def rates(epsilon: float, seed: int, options: Options, *, items: bool = True) -> dict:
    """A user's own click rate, and by how much each item is clicked more than its users click, released once."""
    at = world(options.data_dir, options.smoke)
    train, own = at.split.train, own_rates(at.split.train)
    log_odds = np.log(own) - np.log1p(-own)
    lift, found = np.zeros(train.num_items), {}
    if items:
        sums, noise = item_sums(train, own), 0.0
        if math.isfinite(epsilon):
            noise = found["noise"] = noise_for(epsilon, 1)
            sums = sums + noise * np.random.default_rng([seed, 7]).normal(size=sums.shape)
            ledger = Ledger().record(dp_accounting.GaussianDpEvent(noise), phase="rates", released="noised item rates")
            found["epsilon spent"] = ledger.spent(USER_DELTA).epsilon
        lift = lifts(sums, noise)
    for name in ("validation", "test"):
        part = getattr(at.split, name)
        found[name] = judged(part, log_odds[part.user_ids] + 4.0 * lift[part.item_ids])
    return found


def row(name: str, run: Callable, *, note: str = "") -> Row:
    """A line of the table: test metrics as values, the rest of what a run found beside them."""

    def measured(seed: int, options: Options) -> dict:
        found = run(seed, options)
        at = world(options.data_dir, options.smoke)
        return {"values": found.pop("test"), "protocols": dict.fromkeys(METRICS, at.split.fingerprint), "found": found}

    return Row(name, measured, note=note)


ROWS = [
    row("a user's own click rate, nothing shared", lambda s, o: rates(math.inf, s, o, items=False)),
    row("own rate and item rates", lambda s, o: rates(math.inf, s, o)),
    *(row(f"{name}, one place", lambda s, o, name=name: central(name, s, o)) for name in RECIPES),
    *(
        row(f"{name}, by clients", lambda s, o, name=name: federated(name, math.inf, s, o))
        for name in ("LR", "small DCN-V2")
    ),
    *(
        row(f"own rate and noised item rates, user-level ε {e}", lambda s, o, e=e: rates(float(e), s, o))
        for e in (8, 2)
    ),
    *(
        row(f"{name}, by clients, user-level ε {e}", lambda s, o, name=name, e=e: federated(name, float(e), s, o))
        for name in ("LR", "small DCN-V2")
        for e in (8, 2)
    ),
    *(
        row(
            f"{name}, in 21 silos, {'no noise' if math.isinf(e) else f'example-level ε {e:g}'}",
            lambda s, o, name=name, e=e: in_silos(name, e, s, o),
        )
        for name in ("LR", "small DCN-V2")
        for e in (math.inf, 8.0, 2.0)
    ),
]
ABOUT = (
    "MovieLens 100K as clicks: a rating of 4 or more is a click, any other rating is none. Each user's latest "
    "tenth is the test (ties by seeded hash), the tenth before it validation. Fields: the item's id, genres "
    "and half decade, which are public; the user's gender, age group and occupation, and a vector of the "
    "user's own, which stay with its client, or its silo. AUC over all held-out examples, AUC within users "
    "(weighted by examples, users of one kind left out), and logloss in nats, all times 100. DCN-V2 is three "
    "cross layers beside 500-500-500, DeepFM has 400-400-400, vectors of 10; the small DCN-V2 has two cross "
    "layers beside 16, vectors of 4, for clients, silos and one place alike. In one place the epoch with the "
    "least validation logloss counts; elsewhere the number of rounds is fixed. Steps, clip norms and rounds "
    "were chosen on validation examples of seed 0, by few trials, which no epsilon covers. User-level: add or "
    f"remove one client, all in every round, delta {USER_DELTA:g}. Example-level: add or remove one example, "
    f"delta {EXAMPLE_DELTA:g}, DP-SGD in 21 silos, one an occupation, each trusted by its users; the two kinds "
    "of epsilon do not compare. A user's own click rate costs no privacy and is the floor of every row; noised "
    "item rates are one user-level release on top of it, and what trained models have to beat. Published "
    "figures on Criteo are of other data and stand in no column."
)
STUDY = Study("clicks", "Clicks from fields", ABOUT, ROWS, METRICS)
SMOKE = (
    "own rate and noised item rates, user-level ε 8",
    "LR, by clients, user-level ε 8",
    "LR, in 21 silos, example-level ε 8",
)


def main(argv: list[str] | None = None) -> int:
    """The table, or one run on a file in Criteo's format."""
    argv = sys.argv[1:] if argv is None else argv
    if any(word.split("=")[0] == "--criteo" for word in argv):
        return criteo_main(argv)
    rows = [row for row in ROWS if row.name in SMOKE] if "--smoke" in argv else ROWS
    return harness.main(dataclasses.replace(STUDY, rows=rows), argv)


if __name__ == "__main__":
    sys.exit(main())
