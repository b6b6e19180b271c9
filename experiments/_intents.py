"""Data and methods of the study of customer intents: who holds what, and how each method turns it into class vectors.

Every method gives a classifier of the same kind, a vector for each intent, and a query gets the intent of the nearest
one by cosine.
"""

import json
import math
import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from dp_accounting import GaussianDpEvent

from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.models.class_sums import (
    NAME_SHARE,
    NameSpace,
    class_means,
    cosine_scores,
    denoised_counts,
    dp_class_sums,
    name_space,
    prior_weight,
    unit,
)
from fedjax_rec.models.labelled_vectors import LabelledVectors, clients_without_items, deal
from fedjax_rec.privacy.calibration import calibrate_noise_multiplier
from fedjax_rec.privacy.ledger import Ledger
from fedjax_rec.privacy.mechanisms import user_level_dp
from fedjax_rec.privacy.pate import charge, confident_gnmax, noise_for, vote_counts
from fedjax_rec.text.encoder import embed_texts, find_encoder, load_encoder
from fedjax_rec.text.head import linear_head
from fedjax_rec.text.random_encoder import random_encoder

# Chosen on the labels of the public queries, which belong to no client, and before the test queries were classified.
HEAD_ROUNDS, HEAD_TEMPERATURE, HEAD_STEP, HEAD_STEPS = 5, 20.0, 0.45, {1.0: 0.2, 2.0: 0.3}
TEACHERS, TEACHER_QUERIES, AGREE, CHECK_SHARE = 600, 1000, 0.6, 0.2
SHARPNESS, PASSES = 20.0, 3  # of the labels that public queries are given


class Queries(NamedTuple):
    """Coordinates float32 ``[n, k]`` and intents int32 ``[n]``."""

    vectors: np.ndarray
    labels: np.ndarray


class World(NamedTuple):
    """What a run needs to know; out-of-scope queries have no intent.

    Attributes:
      intents: names, in order of their number.
      space: coordinates that the names span.
      train: what is dealt to clients.
      public: nobody's, and their intents are read by nothing that is measured.
      test: in scope.
      out_of_scope: float32 ``[n, k]``, of the test.
      num_clients: to deal to.
      per_client: queries of each.
    """

    intents: list[str]
    space: NameSpace
    train: Queries
    public: Queries
    test: Queries
    out_of_scope: np.ndarray
    num_clients: int
    per_client: int

    @property
    def names(self) -> np.ndarray:
        """Coordinates of the intents' names."""
        return self.space.names


class Fitted(NamedTuple):
    """Class vectors ``[classes, k]``, what they cost, and what a method has to say about itself."""

    classes: np.ndarray
    ledger: Ledger
    said: dict


# Worlds.


@cache
def clinc150(data_dir: Path | None, cache_dir: Path | None) -> World:
    """CLINC150 through the encoder that `find_encoder` finds: 600 clients of 10 queries.

    Raises:
      FileNotFoundError: a sentence, if data or encoder are not there.
    """
    parts = read_clinc(data_dir)
    encoder = load_encoder(find_encoder())
    intents = sorted({intent for _, intent in parts["train"]})
    names = embed_texts(encoder, [intent.replace("_", " ") for intent in intents], cache_dir)
    space, number = name_space(names), {intent: i for i, intent in enumerate(intents)}

    def queries(part):
        vectors = space.coordinates(embed_texts(encoder, [text for text, _ in parts[part]], cache_dir))
        return Queries(vectors, np.array([number.get(intent, -1) for _, intent in parts[part]], np.int32))

    return World(
        intents, space, queries("train"), queries("val"), queries("test"), queries("oos_test").vectors, 600, 10
    )


def read_clinc(data_dir: Path | None) -> dict[str, list[list[str]]]:
    """The parts of clinc150/clinc.json, as lists of (query, intent).

    Raises:
      FileNotFoundError: a sentence, if there is no such file.
      ValueError: a sentence, if it is not such a file.
    """
    folder = data_dir or os.environ.get("FEDJAX_REC_DATA")
    file = Path(folder or ".") / "clinc150" / "clinc.json"
    if not file.is_file():
        raise FileNotFoundError(
            f'There is no {file}: put data_full.json of CLINC150 there (Larson et al., 2019, "An Evaluation Dataset '
            'for Intent Classification and Out-of-Scope Prediction"), and name the folder above it by --data-dir or '
            "FEDJAX_REC_DATA."
        )
    parts = json.loads(file.read_text(encoding="utf-8"))
    missing = {"train", "val", "test", "oos_test"} - set(parts)
    if missing:
        raise ValueError(f"{file} has no part {', '.join(sorted(missing))}; is it data_full.json?")
    return parts


@cache
def made_up() -> World:
    """Twelve intents of templated queries through a random encoder, for trying out: its accuracies mean nothing."""
    rng = np.random.default_rng(0)
    verbs, things = ("freeze", "open", "report", "renew"), ("account", "card", "loan")
    intents = [f"{verb} {thing}" for verb in verbs for thing in things]
    around = ("please {}", "i want to {}", "how do i {} now", "can you {} today", "{} for me")

    def texts(each):
        chosen = np.repeat(np.arange(len(intents)), each)
        return [rng.choice(around).format(intents[i].replace(" ", " my ")) for i in chosen], chosen.astype(np.int32)

    drawn = [texts(each) for each in (20, 5, 5)]
    strange = [f"what is the {word} of the day" for word in ("weather", "soup", "song", "joke", "news")]
    encoder = random_encoder([*intents, *strange, *(text for part, _ in drawn for text in part)], seed=0)
    space = name_space(embed_texts(encoder, intents))
    train, public, test = (Queries(space.coordinates(embed_texts(encoder, part)), own) for part, own in drawn)
    return World(intents, space, train, public, test, space.coordinates(embed_texts(encoder, strange)), 24, 10)


# Methods: (world, clients, epsilon, delta, key) -> Fitted.


def noise_multiplier(epsilon: float, delta: float) -> float:
    """Of the one Gaussian that costs (epsilon, delta)."""
    if math.isinf(epsilon):
        return 0.0
    return _calibrated(epsilon, delta)


@cache
def _calibrated(epsilon: float, delta: float) -> float:
    return calibrate_noise_multiplier(GaussianDpEvent, target_epsilon=epsilon, delta=delta).noise_multiplier


def names_alone(world, clients, epsilon, delta, key) -> Fitted:
    """Nobody sends anything."""
    del clients, epsilon, delta, key
    return Fitted(world.names, Ledger(), {})


def sums_and_names(world, clients, epsilon, delta, key, *, factor: float = 1.0) -> Fitted:
    """Class sums with the names as a prior, its weight times a factor."""
    released = _sums(world, clients, world.names, epsilon, delta, key)
    weight = factor * prior_weight(
        denoised_counts(released),
        noise_stddev=released.noise_stddev,
        row_weight=released.row_weight,
        dim=world.names.shape[1],
    )
    means = class_means(released, world.names, weight=weight)
    return Fitted(means, released.ledger, {"counts": float(released.counts.sum())})


def sums_alone(world, clients, epsilon, delta, key) -> Fitted:
    """Class sums as they are: nothing is subtracted, nothing added."""
    nothing = np.zeros_like(world.names)
    released = _sums(world, clients, nothing, epsilon, delta, key)
    return Fitted(released.sums, released.ledger, {})


def _sums(world, clients, names, epsilon, delta, key):
    return dp_class_sums(
        clients,
        names=names,
        rows_per_client=world.per_client,
        noise_multiplier=noise_multiplier(epsilon, delta),
        noise_key=key,
    )


def sums_and_public_queries(world, clients, epsilon, delta, key) -> Fitted:
    """The class means of `sums_and_names`, moved by public queries that they label themselves: post-processing."""
    fitted = sums_and_names(world, clients, epsilon, delta, key)
    own, queries = unit(fitted.classes), unit(world.public.vectors)
    classes = own
    for _ in range(PASSES):
        odds = jax.nn.softmax(SHARPNESS * queries @ classes.T, axis=1)
        odds = np.asarray(odds, np.float64)
        classes = unit(own + odds.T @ queries / odds.sum(0)[:, None])
    return Fitted(classes, fitted.ledger, fitted.said)


def head_from_names(world, clients, epsilon, delta, key) -> Fitted:
    """Softmax regression from the names on, a few rounds of everybody."""
    num_clients, num_slots, _ = clients.vectors.shape
    num_classes = len(world.intents)
    # Times the expected share of a class among a client's rows, so that a step is per row of the class; and a client
    # sends the sum of x (onehot - softmax) over its rows, at most sqrt(2 rows) long and mostly below the clip.
    lr = HEAD_STEPS.get(epsilon, HEAD_STEP) * num_classes / world.per_client
    client_lr = world.per_client / HEAD_TEMPERATURE
    rounds = make_rounds(
        linear_head(
            world.names,
            num_slots=num_slots,
            inverse_temperature=HEAD_TEMPERATURE,
            bias=False,
            client_lr=client_lr,
            server_optimizer=optax.sgd(lr),
        ),
        user_level_dp(l2_clip_norm=1.0, noise_multiplier=noise_multiplier(epsilon, delta) * math.sqrt(HEAD_ROUNDS)),
        full_participation(num_clients),
        clients_without_items(num_clients),
        span_size=HEAD_ROUNDS,
    )
    nobody = jax.random.key(0)
    state, _ = rounds.init(nobody)
    own = LabelledVectors(*(jnp.array(x) for x in clients))
    state, _, metrics = rounds.run(state, own, RoundKeys(nobody, nobody, key), HEAD_ROUNDS)
    ledger = rounds.charge(Ledger(), first_round=0, num_rounds=HEAD_ROUNDS)
    return Fitted(np.asarray(state.shared.dense["weights"]), ledger, {"clipped": float(metrics["clipped"][0])})


def votes_of_teachers(world, clients, epsilon, delta, key) -> Fitted:
    """PATE: groups of clients vote on public queries; a student learns from the names and the answers."""
    num_teachers = min(TEACHERS, world.num_clients)
    num_queries = min(TEACHER_QUERIES, len(world.public.labels))
    queries = world.public.vectors[np.random.default_rng(0).permutation(len(world.public.labels))[:num_queries]]
    votes = teacher_votes(world, clients, queries, num_teachers=num_teachers)
    ledger, noise = Ledger(), (0.0, 0.0)
    if not math.isinf(epsilon):
        multiplier = noise_multiplier(epsilon, delta)
        noise = noise_for(multiplier, num_queries=num_queries, max_answers=num_queries, check_share=CHECK_SHARE)
        ledger = charge(ledger, num_queries=num_queries, sigma_threshold=noise[0], sigma_vote=noise[1])
    answers = confident_gnmax(
        votes, threshold=AGREE * num_teachers, sigma_threshold=noise[0], sigma_vote=noise[1], key=key
    )
    known = answers.answered
    classes = _plain_means(world.names, queries[known], answers.labels[known])
    return Fitted(classes, ledger, {"answered": float(known.mean())})


def teacher_votes(world: World, clients: LabelledVectors, queries: np.ndarray, *, num_teachers: int) -> np.ndarray:
    """Votes int64 ``[queries, classes]`` of teachers; client u is the data of teacher u modulo their number alone."""
    vectors, labels = np.asarray(clients.vectors), np.asarray(clients.labels)
    predictions = []
    for teacher in range(num_teachers):
        own, real = slice(teacher, None, num_teachers), labels[teacher::num_teachers] >= 0
        means = _plain_means(world.names, vectors[own][real], labels[own][real])
        predictions.append(cosine_scores(queries, means).argmax(1))
    return vote_counts(np.stack(predictions), len(world.intents))


def _plain_means(names: np.ndarray, vectors: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Class means with the same prior, without noise."""
    sums, counts = np.zeros(names.shape), np.bincount(labels, minlength=len(names))
    np.add.at(sums, labels, vectors - NAME_SHARE * names[labels])
    weight = prior_weight(counts, noise_stddev=0.0, row_weight=1.0, dim=names.shape[1])
    return NAME_SHARE * names + sums / (counts + weight)[:, None]


METHODS: dict[str, Callable[..., Fitted]] = {
    "class sums and names": sums_and_names,
    "the same and public queries": sums_and_public_queries,
    "linear head from names": head_from_names,
    "teachers' votes": votes_of_teachers,
    "class sums alone": sums_alone,
}
VARIANTS: dict[str, Callable[..., Fitted]] = {
    "the first, a quarter of the weight": partial(sums_and_names, factor=0.25),
    "the first, four times the weight": partial(sums_and_names, factor=4.0),
}


def clients_of(world: World, seed: int) -> LabelledVectors:
    """The simulated clients."""
    return deal(
        world.train.vectors,
        world.train.labels,
        num_clients=world.num_clients,
        per_client=world.per_client,
        seed=seed,
    )
