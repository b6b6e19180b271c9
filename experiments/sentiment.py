"""Sentiment of short messages: a linear head on a frozen encoder, trained by the users who wrote them.

    export FEDJAX_REC_TEXT_ENCODER=~/all-MiniLM-L6-v2
    python -m experiments sentiment                          # generated messages
    python -m experiments sentiment --file ~/training.1600000.processed.noemoticon.csv

About two minutes of one CPU core on generated messages. Each run is kept as a line of results/sentiment.jsonl;
results/sentiment.md is made of the lines. Users are clients, and a fifth of them is held out whole for the test. Rounds
are DP-FedAvg on everybody: one step on all messages of a user, clipped to norm 1, the mean noised. With --file, the
users with most messages are taken, which is a look at the data that epsilon does not cover.
"""

import itertools
import math
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from dp_accounting import GaussianDpEvent

from experiments.harness import add_missing, finish, study_parser
from fedjax_rec.data.cache import default_cache_dir
from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.models.labelled_vectors import LabelledVectors, clients_without_items, group_rows
from fedjax_rec.privacy.calibration import calibrate_noise_multiplier
from fedjax_rec.privacy.ledger import Ledger
from fedjax_rec.privacy.mechanisms import user_level_dp
from fedjax_rec.reporting import Table, to_markdown
from fedjax_rec.synthesis.plan import usual_delta
from fedjax_rec.text.encoder import embed_texts, find_encoder, load_encoder
from fedjax_rec.text.head import head_scores, linear_head
from fedjax_rec.text.random_encoder import random_encoder
from fedjax_rec.text.sentiment140 import Messages, of_users, read_sentiment140

NAME, NUM_SEEDS = "sentiment", 3
EPSILONS = (0.1, 0.3, 1.0, 4.0, math.inf)
NUM_ROUNDS, LR, TEMPERATURE, SLOTS = 20, 0.3, 10.0, 20  # steps chosen on generated messages, so that none overshoots
GENERATED = "generated"


def generated_messages(*, num_users: int, per_user: int, seed: int) -> Messages:
    """Templated messages by users with styles of their own: openings, endings, and how often they say "not bad"."""
    rng = np.random.default_rng(seed)
    good = ("love", "enjoyed", "am happy with", "adore", "am grateful for")
    bad = ("hate", "regret", "am fed up with", "dislike", "am disappointed by")
    things = ("this phone", "the new show", "my bus ride", "that song", "the coffee here", "my exam", "the game")
    openings, endings = ("", "omg ", "well, ", "today: ", "hmm "), ("", "!!!", " lol", " again", " :)", "...")
    texts, labels, users = [], [], []
    for user in range(num_users):
        opening, ending = rng.choice(openings), rng.choice(endings)
        mood, ironic = rng.beta(2, 2), rng.beta(1, 4)
        for _ in range(per_user):
            positive = rng.random() < mood
            thing = rng.choice(things)
            if rng.random() < ironic:  # the words say the opposite of what is meant
                text = f"i really can not say that i {rng.choice(bad if positive else good)} {thing}"
            else:
                text = f"i {rng.choice(good if positive else bad)} {thing}"
            texts.append(f"{opening}{text}{ending}")
            labels.append(int(positive))
            users.append(user)
    names = [f"user {user}" for user in range(num_users)]
    return Messages(texts, np.array(labels, np.int32), np.array(users, np.int32), names, 0, 0)


@cache
def world(file: Path | None, smoke: bool) -> tuple[LabelledVectors, np.ndarray, np.ndarray]:
    """Clients; vectors and labels of test users' messages."""
    if file is None:
        messages = generated_messages(num_users=40 if smoke else 750, per_user=10, seed=0)
    else:
        messages = read_sentiment140(file)
        busiest = np.argsort(-np.bincount(messages.user_ids), kind="stable")[:3000]
        messages = of_users(messages, np.random.default_rng(0).permutation(busiest))
    encoder = random_encoder(messages.texts, seed=0) if smoke else load_encoder(find_encoder())
    vectors = embed_texts(encoder, messages.texts, None if smoke else default_cache_dir() / "text")
    is_test = messages.user_ids >= len(messages.user_names) * 4 // 5
    train = ~is_test
    clients = group_rows(vectors[train], messages.labels[train], messages.user_ids[train], slots=SLOTS)
    return clients, vectors[is_test], messages.labels[is_test]


def measure(file: Path | None, epsilon: float, seed: int, smoke: bool) -> dict:
    """Trains a head with an epsilon and says how often it is right about users it never met."""
    clients, vectors, labels = world(file, smoke)
    num_clients, num_slots, dim = clients.vectors.shape
    delta, rounds_of = usual_delta(num_clients), 2 if smoke else NUM_ROUNDS
    noise = 0.0
    if not math.isinf(epsilon):
        one = calibrate_noise_multiplier(GaussianDpEvent, target_epsilon=epsilon, delta=delta)
        noise = one.noise_multiplier * math.sqrt(rounds_of)
    rounds = make_rounds(
        linear_head(
            np.zeros((2, dim)),
            num_slots=num_slots,
            inverse_temperature=TEMPERATURE,
            bias=False,
            server_optimizer=optax.sgd(LR),
        ),
        user_level_dp(l2_clip_norm=1.0, noise_multiplier=noise),
        full_participation(num_clients),
        clients_without_items(num_clients),
        span_size=rounds_of,
    )
    start, client, secret = jax.random.split(jax.random.key(seed), 3)
    state, _ = rounds.init(start)
    own = LabelledVectors(*(jnp.array(x) for x in clients))
    state, _, metrics = rounds.run(state, own, RoundKeys(client, client, secret), rounds_of)
    ledger = rounds.charge(Ledger(), first_round=0, num_rounds=rounds_of)
    found = np.asarray(head_scores(state.shared, jnp.asarray(vectors))).argmax(1)
    return {
        "accuracy": float((found == labels).mean()),
        "majority": float(max(labels.mean(), 1 - labels.mean())),
        "epsilon": None if math.isinf(epsilon) else ledger.spent(delta).epsilon,
        "delta": delta,
        "clipped": float(metrics["clipped"][0]),
        "num_clients": num_clients,
        "num_test": len(labels),
    }


def write_page(lines: Sequence[dict]) -> str:
    """The page: one row a data set and epsilon; means over seeds."""
    rows, datasets = [], list(dict.fromkeys(line["key"]["data"] for line in lines))
    for data, epsilon in itertools.product(datasets, EPSILONS):
        key = {"data": data, "epsilon": "inf" if math.isinf(epsilon) else epsilon}
        if mine := [line["values"] for line in lines if key.items() <= line["key"].items()]:
            accuracy = [100 * one["accuracy"] for one in mine]
            spread = f" ± {np.std(accuracy, ddof=1):.1f}" if len(mine) > 1 else ""
            spelt, first = "none" if math.isinf(epsilon) else f"{epsilon:g}", mine[0]
            people = f"{first['num_clients']:,}", f"{first['delta']:.1g}", f"{100 * first['majority']:.1f}"
            rows.append((data, spelt, people[1], people[0], f"{np.mean(accuracy):.1f}{spread}", people[2], len(mine)))
    heads = ("messages", "epsilon", "delta", "clients", "accuracy, %", "most common sentiment, %", "seeds")
    only = (
        "All figures are of generated messages: they show that the method runs and what noise does to it, and "
        "nothing about real text. Steps were chosen on them. A fifth of them, on average, says the opposite of "
        "its words, and a linear head hears the words."
        if datasets == [GENERATED]
        else ""
    )
    stamps = [line["stamp"] for line in lines]
    return (
        "# Sentiment: a linear head trained by users\n\n"
        f"Status: study, nothing is claimed. {only}\n\n"
        f"{to_markdown(Table(heads, rows, caption='user-level ε, add/remove one user, everybody in each round'))}\n\n"
        f"A frozen encoder, {NUM_ROUNDS} rounds of DP-FedAvg on a linear head, users of the test held out whole; a "
        f"client keeps {SLOTS} messages at most; ± is the standard deviation over noise.\n\n"
        f"Written by `python -m experiments {NAME}`; commits "
        f"{', '.join(sorted({(s['commit'] or 'none')[:12] for s in stamps}))}, device "
        f"{', '.join(sorted({str(s['device_kind']) for s in stamps}))}.\n"
    )


def main(argv: list[str] | None = None) -> int:
    """Measures what is missing, and writes the page."""
    parser = study_parser(NAME, __doc__, seeds=NUM_SEEDS)
    parser.add_argument("--file", type=Path, help="CSV of Sentiment140 (default: generated messages)")
    args = parser.parse_args(argv)
    data = GENERATED if args.file is None else args.file.name
    keys = [
        {"data": data, "epsilon": "inf" if math.isinf(epsilon) else epsilon, "seed": seed}
        for seed, epsilon in itertools.product(
            range(1 if args.smoke else args.seeds), (4.0,) if args.smoke else EPSILONS
        )
        if not (math.isinf(epsilon) and seed)  # nothing is drawn without noise
    ]
    lines = add_missing(
        NAME,
        [] if args.only_page else keys,
        lambda key: measure(args.file, float(key["epsilon"]), key["seed"], args.smoke),
        shown=("accuracy", "clipped"),
        smoke=args.smoke,
    )
    return finish(NAME, write_page(lines), smoke=args.smoke)


if __name__ == "__main__":
    sys.exit(main())
