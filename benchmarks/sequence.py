"""Sequence models: clients/s of federated rounds, memory of a client, tokens/s of training in one place.

    python -m benchmarks.sequence           # minutes; appends to benchmarks/results/sequence.jsonl, writes sequence.md
    python -m benchmarks.sequence --smoke   # seconds, tiny shapes; keeps nothing

Histories are made up, all of full length, at the shape of MovieLens 1M: 3,707 items, 64 numbers an item, 2 blocks, 200
targets. Memory is what the compiler says that one more client in a chunk takes, its gradient of all tables included. A
round is one gradient step on each client of a chunk, and the mean; an epoch is `sequence_training`'s. The share of peak
is that of matrix products alone, and printed where the peak is known.
"""

import argparse
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_rec.algorithms.fedsequence import fedsequence
from fedjax_rec.data.clients import client_data
from fedjax_rec.data.interactions import Interactions
from fedjax_rec.data.split import Split
from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.transforms import chain
from fedjax_rec.models.bert4rec import bert4rec
from fedjax_rec.models.hstu import hstu
from fedjax_rec.models.items import id_table
from fedjax_rec.models.sasrec import sasrec
from fedjax_rec.models.sequence import SequenceModel
from fedjax_rec.models.sequence_losses import binary_cross_entropy, full_cross_entropy, gbce, sampled_softmax
from fedjax_rec.models.sequence_training import sequence_training
from fedjax_rec.reporting.tables import Table, to_markdown
from fedjax_rec.runs.stamp import stamp

RESULTS = Path(__file__).parent / "results" / "sequence.jsonl"
# Dense float32 matrix products by TF32, in TFLOP/s, of the data sheets.
PEAK = {"NVIDIA H100 80GB HBM3": 494.7, "NVIDIA H200": 494.7, "NVIDIA A100-SXM4-80GB": 156.0}


class Shape(NamedTuple):
    """Of models and of what they are fed."""

    num_items: int = 3707
    dim: int = 64
    num_blocks: int = 2
    max_length: int = 200
    num_users: int = 64
    chunk_size: int = 8


TINY = Shape(num_items=40, dim=8, num_blocks=1, max_length=8, num_users=8, chunk_size=4)
LOSSES = {
    "full cross-entropy": full_cross_entropy(),
    "full cross-entropy, 64 places at a time": full_cross_entropy(places=64),
    "sampled softmax, 256 a history": sampled_softmax(num_negatives=256),
    "gBCE, 256 a history": gbce(),
    "gBCE, 256 a target": gbce(per_target=True),
    "BCE, 1 a target": binary_cross_entropy(),
}
CASES = (
    *((f"SASRec, {name}", sasrec, loss) for name, loss in LOSSES.items()),
    ("BERT4Rec, full cross-entropy", bert4rec, LOSSES["full cross-entropy"]),
    ("HSTU, sampled softmax, 256 a history", hstu, LOSSES["sampled softmax, 256 a history"]),
)


def population(shape: Shape) -> Interactions:
    """Users of full histories, at random."""
    rng = np.random.default_rng(0)
    length = min(shape.max_length + 1, shape.num_items)
    item_ids = np.concatenate([rng.permutation(shape.num_items)[:length] for _ in range(shape.num_users)])
    return Interactions(
        name="made up",
        offsets=np.arange(shape.num_users + 1, dtype=np.int64) * length,
        item_ids=item_ids.astype(np.int32),
        file_rows=np.arange(len(item_ids)),
        num_items=shape.num_items,
        timestamps=None,
        ratings=None,
        user_labels=np.arange(shape.num_users),
        item_labels=np.arange(shape.num_items),
    )


def memory_per_client(model: SequenceModel, shape: Shape) -> float:
    """MiB that one more client in a chunk takes, by the compiler's report: temporaries and gradient."""
    params = jax.eval_shape(model.init, jax.random.key(0))
    gradients = jax.jit(jax.vmap(jax.grad(model.loss), in_axes=(None, 0, 0)))
    sizes = []
    few, many = 2, 6
    for num in (few, many):
        keys = jax.eval_shape(lambda num=num: jax.random.split(jax.random.key(0), num))
        histories = jax.ShapeDtypeStruct((num, shape.max_length + 1), jnp.int32)
        found = gradients.lower(params, histories, keys).compile().memory_analysis()
        sizes.append(found.temp_size_in_bytes + found.output_size_in_bytes)
    return (sizes[1] - sizes[0]) / (many - few) / 2**20


def flops_per_token(name: str, shape: Shape) -> float:
    """Multiplications and additions of matrix products, forwards and backwards, of one target of SASRec."""
    layers = shape.num_blocks * (6 * shape.dim**2 + 2 * shape.max_length * shape.dim)
    scored = shape.num_items if "full" in name else 256 if "256" in name else 1
    return 3 * 2 * (layers + scored * shape.dim)


def measure(name: str, make, loss, shape: Shape) -> dict:
    """One record."""
    items = id_table(shape.num_items, dim=shape.dim)
    model = make(items, max_length=shape.max_length, num_blocks=shape.num_blocks, loss=loss)
    people = population(shape)
    nobody = people.take(np.zeros(people.num_interactions, bool))
    rounds = make_rounds(
        fedsequence(model),
        chain(),
        full_participation(shape.num_users),
        client_data(Split(people, nobody, nobody, nobody, rule="made up"), num_buckets=1),
        span_size=1,
        chunk_size=shape.chunk_size,
    )
    keys = RoundKeys(*(jax.random.key(i) for i in range(3)))
    state, private = rounds.init(jax.random.key(0))
    rates, processor = [], []
    for _ in range(3):  # the first compiles
        start, used = time.perf_counter(), time.process_time()
        state, private, _ = jax.block_until_ready(rounds.run(state, private, keys))
        rates.append(shape.num_users / (time.perf_counter() - start))
        processor.append(time.process_time() - used)
    training = sequence_training(model, people, batch_size=shape.num_users // 2, num_buckets=1)
    state = training.init(jax.random.key(0))
    tokens = []
    for _ in range(3):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(training.run_epoch(state, jax.random.key(1)))
        tokens.append(people.num_interactions / (time.perf_counter() - start))
    peak = PEAK.get(jax.devices()[0].device_kind)
    share = None
    if peak is not None and make is sasrec:
        share = round(max(tokens) * flops_per_token(name, shape) / (peak * 1e12), 4)
    return {
        "benchmark": "sequence",
        "case": name,
        "shape": shape._asdict(),
        "clients_per_s": round(max(rates[1:]), 2),
        "processor_s_per_client": round(min(processor[1:]) / shape.num_users, 5),
        "tokens_per_s": round(max(tokens[1:]), 1),
        "mib_per_client": round(memory_per_client(model, shape), 2),
        "share_of_peak": share,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "stamp": stamp(seed=0, data_fingerprint=None),
    }


def page(records: list[dict]) -> str:
    """The newest record of each case on each device, as markdown."""
    newest = {(row["stamp"]["device_kind"], row["case"]): row for row in records}
    lines = [
        (
            device,
            case,
            f"{row['mib_per_client']:.1f}",
            f"{row['clients_per_s']:.1f}",
            f"{row['tokens_per_s']:.0f}",
            "" if row["share_of_peak"] is None else f"{row['share_of_peak']:.1%}",
        )
        for (device, case), row in newest.items()
    ]
    heads = ("device", "model and loss", "MiB per client", "clients/s, federated", "tokens/s, in one place", "of peak")
    shape = ", ".join(f"{key} {value}" for key, value in records[-1]["shape"].items())
    return (
        f"# Sequence models: speed and memory\n\n{to_markdown(Table(heads, lines, caption=shape))}\n\n"
        "Memory is the compiler's for one more client in a chunk, temporaries and gradient. Seconds are on the wall of "
        "a machine that may have other work. Written by `python -m benchmarks.sequence`.\n"
    )


def main(argv: list[str] | None = None) -> int:
    """Measures every case, prints a line each and keeps it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=[case[0] for case in CASES], help="only this one")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes and one case, keeps nothing")
    args = parser.parse_args(argv)
    wanted = [case for case in CASES if not args.case or case[0] in args.case]
    for name, make, loss in wanted[:1] if args.smoke else wanted:
        row = measure(name, make, loss, TINY if args.smoke else Shape())
        shown = ("clients_per_s", "tokens_per_s", "mib_per_client", "share_of_peak")
        print(name, ", ".join(f"{key} {row[key]}" for key in shown), flush=True)
        if not args.smoke:
            RESULTS.parent.mkdir(exist_ok=True)
            with open(RESULTS, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    if not args.smoke:
        records = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
        RESULTS.with_suffix(".md").write_text(page(records), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
