"""DCN-V2 and DeepFM on a file in Criteo's format: in one place, and in silos with example-level DP.

    python -m experiments clicks --criteo train.txt --max-rows 100000

Silos are contiguous blocks of the file's first 80 %; the next 10 % choose the epoch, the last 10 % are the test.
"""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_rec.algorithms.silo_dpsgd import ExampleLevelDp, record_rounds, silo_dpsgd
from fedjax_rec.data.clients import client_data
from fedjax_rec.data.criteo import (
    NUM_CATEGORIES,
    NUM_INTEGERS,
    CriteoRows,
    frequent_categories,
    hash_categories,
    place_categories,
    read_criteo,
)
from fedjax_rec.data.interactions import Interactions
from fedjax_rec.data.negatives import Negatives
from fedjax_rec.data.silos import silo_data
from fedjax_rec.data.split import Split
from fedjax_rec.evaluation.clicks import auc, logloss
from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.transforms import chain
from fedjax_rec.models.centralised import centralised
from fedjax_rec.models.clicks import client_clicks
from fedjax_rec.models.cross_network import dcn_v2
from fedjax_rec.models.deep_fm import deep_fm, logistic_regression
from fedjax_rec.models.fields import FieldBatch, Fields, join, numeric, placed
from fedjax_rec.privacy import Ledger, calibrate_noise_multiplier
from fedjax_rec.reporting import Table, to_markdown

NUM_SILOS = 8
# A network that noise leaves something of; in one place the usual sizes.
PRIVATE = {"DCN-V2": lambda n: dcn_v2(n, dim=4, num_cross=2, hidden=(16,)), "LR": logistic_regression}
OPEN = {"DCN-V2": lambda n: dcn_v2(n), "DeepFM": lambda n: deep_fm(n), "LR": logistic_regression}


def split_of(rows: CriteoRows, num_silos: int) -> Split:
    """Rows as numbered examples: silo k owns the k-th block of the first 80 %, and each example is an "item"."""
    n = len(rows)
    ends = [int(n * share) for share in (0.8, 0.9, 1.0)]
    inside = np.linspace(0, ends[0], num_silos + 1).astype(np.int64)

    def part(name, start, offsets):
        stop = start + int(offsets[-1])
        return Interactions(
            name=name,
            offsets=offsets,
            item_ids=np.arange(start, stop, dtype=np.int32),
            file_rows=np.arange(start, stop),
            num_items=n,
            timestamps=None,
            ratings=rows.labels[start:stop],
            user_labels=np.arange(num_silos),
            item_labels=np.arange(n),
        )

    held_out = [np.array([0] + [stop - start] * num_silos) for start, stop in itertools.pairwise(ends)]
    nobody = np.zeros(num_silos + 1, np.int64)
    return Split(
        part("criteo train", 0, inside),
        part("criteo validation", ends[0], held_out[0]),
        part("criteo test", ends[1], held_out[1]),
        part("criteo history", 0, nobody),
        rule="time: first 80 %, 10 %, 10 %",
    )


def fields_of(rows: CriteoRows, places: np.ndarray, sizes: Sequence[int]) -> tuple[Fields, FieldBatch]:
    """13 numeric and 26 categorical fields, the latter by places int ``[n, 26]``, -1 where missing."""
    columns = [numeric(f"I{i + 1}", rows.integers[:, i]) for i in range(NUM_INTEGERS)]
    columns += [placed(f"C{c + 1}", places[:, c], size=sizes[c]) for c in range(NUM_CATEGORIES)]
    return join(columns)


def judged(model, split: Split, shared, name: str) -> tuple[float, float]:
    """AUC and logloss of the held-out rows."""
    part = getattr(split, name)
    examples = jnp.asarray(part.item_ids)
    logits = np.asarray(model.logits(shared, {}, jnp.zeros_like(examples), examples))
    return auc(part.ratings, logits), logloss(part.ratings, logits)


def model_of(network, split: Split, fields: tuple[Fields, FieldBatch]):
    """A network on the fields of numbered examples, without a table of examples or a vector of silos."""
    return client_clicks(network, num_items=split.num_items, item_fields=fields, item_ids=False, own_vector=False)


def in_one_place(network, split: Split, fields, *, num_epochs: int, seed: int) -> tuple[float, float]:
    """Test AUC and logloss of the epoch with the least validation logloss."""
    model = model_of(network, split, fields)
    clients = client_data(split, use_ratings=True, num_buckets=1)
    training = centralised(model.model, clients, optimizer=optax.adam(1e-3), negatives=Negatives(0))
    init_key, run_key = jax.random.split(jax.random.key(seed))
    state, found = training.init(init_key), []
    for _ in range(num_epochs):
        state, _ = training.run_epoch(state, run_key)
        found.append((judged(model, split, state.shared, "validation")[1], judged(model, split, state.shared, "test")))
    return min(found)[1]


def in_silos(network, split: Split, fields, *, epsilon: float, delta: float, num_rounds: int, seed: int):
    """Test AUC and logloss of DP-SGD in silos, and the example-level epsilon spent."""
    steps = {"sampling_prob": 0.02, "l2_clip_norm": 0.5, "num_local_steps": 20}

    def run_event(noise_multiplier):
        event = ExampleLevelDp(noise_multiplier=noise_multiplier, **steps).round_event
        return dp_accounting.SelfComposedDpEvent(event, num_rounds)

    noise = calibrate_noise_multiplier(run_event, target_epsilon=epsilon, delta=delta, unit="example")
    privacy = ExampleLevelDp(noise_multiplier=noise.noise_multiplier, **steps)
    model, silos = model_of(network, split, fields), silo_data(split, np.arange(split.num_users), use_ratings=True)
    algorithm = silo_dpsgd(
        model.model,
        privacy=privacy,
        users_per_silo=1,
        client_optimizer=optax.adam(0.01),
        num_negatives=0,
    )
    sampler = full_participation(silos.clients.num_clients)
    rounds = make_rounds(algorithm, chain(), sampler, silos.clients, span_size=num_rounds)
    init_key, *keys = jax.random.split(jax.random.key(seed), 4)
    state, private = rounds.init(init_key)
    state, _, _ = rounds.run(state, private, RoundKeys(*keys), num_rounds)
    ledger = record_rounds(Ledger(unit="example", trust_model="silo"), privacy, num_rounds=num_rounds)
    return *judged(model, split, state.shared, "test"), ledger.spent(delta).epsilon


def table_of(rows: CriteoRows, args: argparse.Namespace) -> Table:
    """Trains everything and gives the table."""
    split, lines = split_of(rows, args.silos), []
    words = frequent_categories(rows.part(0, split.train.num_interactions), min_count=args.min_count)
    by_words = fields_of(rows, place_categories(rows.categories, words), [len(w) + 1 for w in words])
    by_hash = fields_of(rows, hash_categories(rows.categories, args.buckets), [args.buckets] * NUM_CATEGORIES)
    for name in args.network or OPEN:
        found = in_one_place(OPEN[name], split, by_words, num_epochs=args.epochs, seed=args.seed)
        lines.append((name, "one place", None, *found))
        print(lines[-1], flush=True)
    delta = 0.1 / split.train.num_interactions
    for name in args.network or PRIVATE:
        for epsilon in args.epsilon or (8.0,):
            budget = {"epsilon": epsilon, "delta": delta, "num_rounds": args.rounds, "seed": args.seed}
            *found, spent = in_silos(PRIVATE[name], split, by_hash, **budget)
            lines.append((f"small {name}" if name != "LR" else name, f"{args.silos} silos", spent, *found))
            print(lines[-1], flush=True)
    return Table(
        ("model", "trained in", "epsilon", "auc", "logloss"),
        lines,
        caption=f"{len(rows)} rows, {split.rule}; example-level (ε, δ = {delta:.2g}), add/remove one row.",
        notes=(
            f"Repairs: {dict(rows.repairs)}. DP-SGD in silos: Poisson sampling of rows, {args.rounds} rounds.",
            f"In one place: categories that occur {args.min_count} times in the training rows, a list that is itself "
            f"read from the data. In silos: categories hashed into {args.buckets} buckets a column, which are public.",
        ),
    )


def criteo_main(argv: Sequence[str]) -> int:
    """Reads the file, trains, prints a table."""
    parser = argparse.ArgumentParser(prog="python -m experiments clicks", description=__doc__.splitlines()[0])
    parser.add_argument("--criteo", type=Path, required=True, metavar="FILE", help="a file in Criteo's format, or .gz")
    parser.add_argument("--max-rows", type=int, default=100_000, help="lines to read")
    parser.add_argument("--network", action="append", choices=PRIVATE, help="only this one; may be repeated")
    parser.add_argument("--epsilon", type=float, action="append", help="example-level; may be repeated (default: 8)")
    parser.add_argument("--silos", type=int, default=NUM_SILOS, help="contiguous blocks of the training rows")
    parser.add_argument("--buckets", type=int, default=200, help="hash buckets of each category column in silos")
    parser.add_argument("--min-count", type=int, default=10, help="rarer categories share a row, in one place")
    parser.add_argument("--epochs", type=int, default=3, help="of training in one place")
    parser.add_argument("--rounds", type=int, default=5, help="of 20 local steps in silos")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    print(to_markdown(table_of(read_criteo(args.criteo, max_rows=args.max_rows), args)))
    return 0
