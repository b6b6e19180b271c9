"""A text encoder that stays on the server: news that nobody has clicked yet, and films, with user-level privacy.

    python -m experiments news --data-dir ~/data                   # made-up news in MIND's format, and MovieLens 100K
    python -m experiments news --part news --mind ~/MINDsmall      # a real folder, with train/ and dev/ in it
    python -m experiments news --smoke                             # seconds; random text encoder, keeps nothing

Each run is kept as a line of results/news.jsonl, a second call runs what is missing, and results/news.md is made of the
lines. Texts go through the encoder that FEDJAX_REC_TEXT_ENCODER names. Everything is trained by `server_encoder`, each
round with all clients: the id table is its encoder that looks a row up, so all rows send the same and cost the same.
"""

import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments._news_page import COLUMNS, EPSILONS, PARTS, RANK_METRICS, ROUNDS, ROWS, spelt, write_page
from experiments._news_world import generate_mind
from experiments.harness import finish, keep_line, read_lines, study_parser
from fedjax_rec.algorithms.server_encoder import server_encoder
from fedjax_rec.data import leave_one_out, load
from fedjax_rec.data.cache import default_cache_dir
from fedjax_rec.data.clients import ClientData, client_data
from fedjax_rec.data.interactions import Interactions
from fedjax_rec.data.mind import Mind, mind_clients, read_mind
from fedjax_rec.evaluation import cases, constant_scorer, evaluate
from fedjax_rec.evaluation.impressions import impression_metrics
from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.transforms import chain
from fedjax_rec.models.base import Shared
from fedjax_rec.models.items import id_table
from fedjax_rec.models.lora import init_lora
from fedjax_rec.models.news import impression_loss, nrms
from fedjax_rec.models.popularity import dp_popularity
from fedjax_rec.models.sequence import padded_histories, sequence_scorer
from fedjax_rec.privacy import Ledger
from fedjax_rec.privacy.budget import Phase, Plan, solve
from fedjax_rec.privacy.mechanisms import clip_by_global_norm, gaussian_noise
from fedjax_rec.runs.stamp import stamp
from fedjax_rec.synthesis.plan import usual_delta
from fedjax_rec.text.encoder import TextEncoder, embed, embed_texts, find_encoder, load_encoder
from fedjax_rec.text.random_encoder import random_encoder

NAME, DIM = "news", 32
MOST_FEATURES, MOST_TOKENS = 128, 24


@dataclass(frozen=True)
class Setting:
    """Of one row: bound of one client's update, and Adam's learning rates for the encoder and the user tower."""

    clip: float
    encoder_lr: float
    tower_lr: float


class Items(NamedTuple):
    """An item side: what `server_encoder` takes."""

    encode: Callable
    content: Any
    init: Callable
    backward: bool = True


# Row -> setting at epsilon infinity and at 8. Those of films were read off validation items over a handful of values;
# epsilon does not cover that choice. Those of news are the same.
SETTINGS = {
    "id table": (Setting(1.0, 0.03, 0.01), Setting(0.1, 0.03, 0.01)),
    "frozen encoder": (Setting(1.0, 0.0, 0.03), Setting(0.2, 0.0, 0.03)),
    "trained projection": (Setting(1.0, 0.01, 0.01), Setting(0.3, 0.003, 0.003)),
    "projection and LoRA": (Setting(1.0, 0.01, 0.01), Setting(0.3, 0.003, 0.003)),
}


def text_encoder(texts: Sequence[str], smoke: bool) -> TextEncoder:
    """The real encoder where there is one; a smoke takes a random one that knows the words."""
    return random_encoder(texts, seed=0) if smoke else load_encoder(find_encoder())


def items_of(row: str, texts: Sequence[str], encoder: TextEncoder, smoke: bool) -> Items:
    """The item side of a row. Vectors of texts are centred and whitened, which public texts alone decide."""
    num_items = len(texts)
    if row == "id table":
        content = np.arange(num_items)
        return Items(
            lambda table, ids: table[ids], content, lambda key: 0.02 * jax.random.normal(key, (num_items, DIM))
        )
    vectors = embed_texts(encoder, texts, None if smoke else default_cache_dir() / "text")
    mean = vectors.mean(0)
    _, lengths, axes = np.linalg.svd(vectors - mean, full_matrices=False)
    kept = min(MOST_FEATURES, int(np.sum(lengths > 1e-4 * lengths[0])))
    whiten = (axes[:kept] / lengths[:kept, None]).T * math.sqrt(num_items)

    def project(key):  # the first vectors are the texts' main axes at their own lengths
        del key
        return jnp.eye(kept, DIM) * (0.3 * jnp.asarray(np.resize(lengths[:kept] / lengths[0], DIM)))[None, :]

    if row != "projection and LoRA":
        content = ((vectors - mean) @ whiten).astype(np.float32)
        return Items(lambda theta, x: x @ theta, content, project, row == "trained projection")
    ids, mask = encoder.tokenizer.encode(texts, min(MOST_TOKENS, encoder.config.max_tokens))

    def init(key):
        lora = init_lora(encoder.params["layers"], ("query", "value"), rank=4, key=key)
        return {"project": project(key), "lora": lora}

    def encode(theta, tokens):
        found = embed(encoder.params, encoder.config, *tokens, theta["lora"])
        return (found - mean[None, :]) @ whiten.astype(np.float32) @ theta["project"]

    return Items(encode, (ids, mask), init)


class Noise(NamedTuple):
    """Noise multipliers of both phases (0 = none)."""

    popularity: float
    training: float


@cache
def noise_of(epsilon: float, num_users: int, names: tuple[str, ...]) -> Noise:
    """For the releases of these names, which together meet epsilon.

    Counts have a ninth of what training has of the sum of 1 / z^2, which is what Gaussians compose by.
    """
    if math.isinf(epsilon):
        return Noise(0.0, 0.0)
    phases = {
        "popularity": Phase("popularity", weight=3.0),
        "training": Phase("training", rounds=ROUNDS, weight=math.sqrt(ROUNDS)),
    }
    chosen = tuple(phases[name] for name in names)
    solved = solve(Plan(phases=chosen, epsilon=epsilon, delta=usual_delta(num_users), num_users=num_users))
    found = {name: phase.last_noise_multiplier for name, phase in solved.phases.items()}
    return Noise(found.get("popularity", 0.0), found.get("training", 0.0))


def keys_of(seed: int) -> jax.Array:
    """Two keys, of the counts' noise and of training."""
    return jax.random.split(jax.random.key(seed))


def released_counts(clicks: Interactions, z: float, seed: int) -> tuple[np.ndarray, Ledger]:
    """Counts of the items by users, row-normalised, with what they cost."""
    counts = dp_popularity(clicks, noise_multiplier=z, key=keys_of(seed)[0])
    ledger = Ledger().record(counts.dp_event, phase="popularity", released="noised item counts") if z else Ledger()
    return np.asarray(counts.counts), ledger


def trainer(model, loss, items: Items, clients: ClientData, setting: Setting, z: float, ledger: Ledger):
    """``key -> (shared parameters, seconds)`` after all rounds, compiled once for all seeds, and the ledger."""
    algorithm = server_encoder(
        model,
        items.encode,
        items.content,
        items.init,
        backward=items.backward,
        loss=loss,
        encoder_optimizer=optax.adam(setting.encoder_lr),
        tower_optimizer=optax.adam(setting.tower_lr),
    )
    clip = clip_by_global_norm(setting.clip)
    links = chain(clip, gaussian_noise(z * setting.clip)) if z else chain(clip)
    rounds = make_rounds(algorithm, links, full_participation(clients.num_clients), clients, span_size=ROUNDS)

    def train(key) -> tuple[Shared, float]:
        start, (init_key, *keys) = time.perf_counter(), jax.random.split(key, 4)
        state, _, _ = rounds.run(*rounds.init(init_key), RoundKeys(*keys), ROUNDS)
        return jax.block_until_ready(state.shared), time.perf_counter() - start

    return train, rounds.charge(ledger, first_round=0, num_rounds=ROUNDS) if z else ledger


@cache
def news_world(folder: Path | None, smoke: bool) -> tuple[Mind, Mind, str]:
    """Train and dev over one catalogue, and what they are."""
    if folder is not None:
        parts = [read_mind(folder / p, news_of=[folder / q]) for p, q in (("train", "dev"), ("dev", "train"))]
        return *parts, "MIND"
    with tempfile.TemporaryDirectory() as made:
        generate_mind(Path(made), seed=0, **({"num_users": 30, "num_news": 60} if smoke else {"num_users": 400}))
        return *news_world.__wrapped__(Path(made), smoke)[:2], "made up"


def news_runs(row: str, epsilon: float, folder: Path | None, smoke: bool) -> Callable[[int], dict[str, Any]]:
    """``seed -> values``: trains on impressions of train, and ranks those of dev."""
    train_part, dev, data = news_world(folder, smoke)
    num_users, texts = train_part.num_users, train_part.titles.tolist()

    def judged(scores, ledger) -> dict[str, Any]:
        found = impression_metrics(scores, dev.clicked, dev.shown_offsets)
        return found.values | guarantee(ledger, num_users) | {"data": data, "left_out": found.num_left_out}

    if row == "popularity":
        z = noise_of(epsilon, num_users, ("popularity",)).popularity

        def count(seed: int):
            counts, ledger = released_counts(train_part.clicks, z, seed)
            return judged(counts[dev.shown_news], ledger)

        return count

    encoder = text_encoder(texts, smoke)
    items, clients = items_of(row, texts, encoder, smoke), mind_clients(train_part, num_buckets=2)
    model = nrms(id_table(train_part.num_news, dim=DIM), max_length=30, num_heads=2)
    z, setting = noise_of(epsilon, num_users, ("training",)).training, SETTINGS[row][epsilon < math.inf]
    train, ledger = trainer(model, impression_loss(model), items, clients, setting, z, Ledger())
    histories = padded_histories(dev.histories, np.arange(dev.num_users), model.max_length)
    ask = jax.jit(jax.vmap(lambda shared, history: model.query(shared, history, None), in_axes=(None, 0)))
    users = np.repeat(dev.impression_users, np.diff(dev.shown_offsets))

    def run(seed: int):
        shared, seconds = train(keys_of(seed)[1])
        asked, vectors = np.asarray(ask(shared, histories)), np.asarray(shared.tables["item"])
        scores = np.sum(asked[users] * vectors[dev.shown_news], axis=1)
        return judged(scores, ledger) | {"seconds": round(seconds, 1)} | traffic(shared, items, encoder)

    return run


@cache
def films_world(data_dir: Path | None, smoke: bool):
    """A split of films by leave-one-out, and their texts: title and genres."""
    data = load("synthetic", num_users=60, num_items=50) if smoke else load("movielens/100k", data_dir=data_dir)
    titles = [f"item {i}" for i in range(data.num_items)] if data.item_titles is None else data.item_titles
    genres = np.zeros((data.num_items, 0), bool) if data.item_genres is None else data.item_genres
    names = np.array(data.genre_names, dtype=str)
    return leave_one_out(data), [
        ". ".join([str(title), *([", ".join(names[has])] if has.any() else [])])
        for title, has in zip(titles, genres, strict=True)
    ]


def films_runs(row: str, epsilon: float, data_dir: Path | None, smoke: bool) -> Callable[[int], dict[str, Any]]:
    """``seed -> values``: trains on next films, and ranks the last one of each user among all.

    Counts are released once for all seeds of a model; seeds are of what is trained on top.
    """
    split, texts = films_world(data_dir, smoke)
    num_users = split.train.num_users

    def judged(scorer, ledger) -> dict[str, Any]:
        found = guarantee(ledger, num_users) | {"split": split.fingerprint}
        for part in ("validation", "test"):
            values = evaluate(scorer, cases(split, part), ks=(10,)).values
            found |= {f"{part} {name}": values[name] for name in RANK_METRICS}
        return found

    if row == "popularity":
        z = noise_of(epsilon, num_users, ("popularity",)).popularity

        def count(seed: int):
            counts, ledger = released_counts(split.train, z, seed)
            return judged(constant_scorer(jnp.asarray(counts)), ledger)

        return count

    noise = noise_of(epsilon, num_users, ("popularity", "training"))
    counts, ledger = released_counts(split.train, noise.popularity, 0)
    # Below about the noise's standard deviation, counts say nothing.
    bias = np.log(np.maximum(counts, max(0.5, noise.popularity)))
    encoder = text_encoder(texts, smoke)
    items, clients = items_of(row, texts, encoder, smoke), client_data(split, num_buckets=3)
    table = id_table(len(texts), dim=DIM)
    model = nrms(table, max_length=30, num_heads=2, num_negatives=None, num_targets=5, item_bias=bias)
    setting = SETTINGS[row][epsilon < math.inf]
    train, ledger = trainer(model, None, items, clients, setting, noise.training, ledger)

    def run(seed: int):
        shared, seconds = train(keys_of(seed)[1])
        scorer = sequence_scorer(model, shared, split.train)
        return judged(scorer, ledger) | {"seconds": round(seconds, 1)} | traffic(shared, items, encoder)

    return run


def traffic(shared: Shared, items: Items, encoder: TextEncoder) -> dict[str, int]:
    """Bytes of one client in one round, ids of rows aside, and of the encoder that it is not sent."""
    vectors, tower, whole = (4 * sum(x.size for x in jax.tree.leaves(t)) for t in (*shared, encoder.params))
    return {"down_bytes": vectors + tower, "up_bytes": tower + items.backward * vectors, "encoder_bytes": whole}


def guarantee(ledger: Ledger, num_users: int) -> dict[str, float | None]:
    """What was spent, at the usual delta."""
    spent = ledger.spent(usual_delta(num_users)) if ledger.entries else None
    return {"epsilon spent": spent.epsilon if spent else None, "delta": usual_delta(num_users), "users": num_users}


RUNS = {"news": news_runs, "films": films_runs}


def main(argv: list[str] | None = None) -> int:
    """Measures what is missing, and writes the page."""
    parser = study_parser(NAME, __doc__, seeds=3)
    parser.add_argument("--data-dir", type=Path, help="folder with ml-100k/ (default: FEDJAX_REC_DATA)")
    parser.add_argument("--mind", type=Path, help="folder with train/ and dev/ of MIND; made-up news without it")
    parser.add_argument("--part", choices=tuple(PARTS), action="append", help="only this; may be repeated")
    parser.add_argument("--row", choices=ROWS, action="append", help="only this one; may be repeated")
    args = parser.parse_args(argv)
    wanted = [(part, row, e) for part in args.part or PARTS for row in args.row or PARTS[part] for e in EPSILONS]
    wanted = [w for w in wanted if w[1] in PARTS[w[0]]]
    if args.smoke:
        wanted = [("news", "projection and LoRA", 8.0), ("films", "popularity", 8.0)]
    lines = [] if args.smoke else read_lines(NAME)
    done = [line["key"] for line in lines]
    folders = {"news": args.mind, "films": args.data_dir}
    for part, row, epsilon in wanted:
        key = {"part": part, "row": row, "epsilon": spelt(epsilon)}
        key |= {"mind": True} if part == "news" and args.mind else {}
        missing = [seed for seed in range(1 if args.smoke else args.seeds) if key | {"seed": seed} not in done]
        if not missing or args.only_page:
            continue
        run = RUNS[part](row, epsilon, folders[part], args.smoke)
        for seed in missing:
            values, key["seed"] = run(seed), seed
            lines.append({"key": dict(key), "values": values, "stamp": stamp(seed=seed, data_fingerprint=None)})
            print(json.dumps({**key, **{name: round(values[name], 4) for name in COLUMNS[part]}}), flush=True)
            if not args.smoke:
                keep_line(NAME, lines[-1])
    shown = [
        line for line in lines if line["key"].get("mind", False) == bool(args.mind) or line["key"]["part"] != "news"
    ]
    return finish(NAME, write_page(shown), smoke=args.smoke)


if __name__ == "__main__":
    sys.exit(main())
