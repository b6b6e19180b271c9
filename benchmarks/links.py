"""What each link of the chain adds to a round of federated matrix factorisation, in time and in bytes.

    python -m benchmarks.links --data-dir ~/data/ml-100k     # appends to benchmarks/results/links.{jsonl,md}
    python -m benchmarks.links --link "drive" --data-dir ~/data/ml-100k
    python -m benchmarks.links --smoke                        # seconds, a made-up population; keeps nothing

All 943 clients of MovieLens 100K in every round, four negatives an interaction, dim 32, one full-batch step a client:
the cheapest local training there is, so that a link's share is the largest it can be. Runs take turns within one
process, each turn one call of some rounds, on one thread; what counts are seconds of the processor, which other work on
the machine changes little. A ratio is the median, over turns, of the link's time over that of no link in the same turn.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import jax
import optax

import fedjax_rec as fr
from fedjax_rec.compression.drive import drive
from fedjax_rec.compression.half import half_precision_download, half_precision_upload
from fedjax_rec.compression.item_subset import item_subset
from fedjax_rec.compression.low_rank import low_rank
from fedjax_rec.compression.quantize import quantize
from fedjax_rec.compression.rand_k import rand_k
from fedjax_rec.compression.sketch import count_sketch
from fedjax_rec.compression.top_k import top_k
from fedjax_rec.federated.round import largest_update
from fedjax_rec.reporting import Table, to_markdown
from fedjax_rec.runs.stamp import stamp

RESULTS = Path(__file__).parent / "results"
NONE = "no link"
L2_CLIP_NORM = 0.02
NUM_CLIENTS = 943


def integers(**settings) -> fr.UpdateTransform:
    """Fixed-point numbers with room for all clients."""
    return fr.fixed_point(largest=1.0, max_clients=NUM_CLIENTS, **({"count_clipped": False} | settings))


def secure_sum(**settings) -> fr.UpdateTransform:
    """The simulated secure sum of everybody; by default with the neighbours that so many clients need."""
    return fr.simulated_secure_sum(num_clients=NUM_CLIENTS, **settings)


# Name, and what makes the links from the numbers in the largest client's update.
ROWS: tuple[tuple[str, Callable[[int], fr.UpdateTransform]], ...] = (
    (NONE, lambda size: fr.chain()),
    ("clip", lambda size: fr.clip_by_global_norm(L2_CLIP_NORM)),
    ("clip, gaussian noise", lambda size: fr.user_level_dp(l2_clip_norm=L2_CLIP_NORM, noise_multiplier=1.0)),
    ("drive, 1 bit", lambda size: drive()),
    ("4 bits, rotated", lambda size: quantize(4)),
    ("4 bits", lambda size: quantize(4, rotation=False)),
    ("8 bits, nearest", lambda size: quantize(8, rounding="nearest", rotation=False)),
    ("top 10 % of numbers", lambda size: top_k(0.1)),
    ("top 10 % of rows", lambda size: top_k(0.1, rows=True)),
    ("rand-k, 10 % of rows", lambda size: rand_k(0.1)),
    ("count sketch, 48 rows", lambda size: count_sketch(48)),
    ("low rank, 2", lambda size: low_rank(2)),
    ("low rank, 2, all rows", lambda size: low_rank(2, all_rows=True)),
    ("item subset, 10 %, both ways", lambda size: item_subset(0.1, receive=True)),
    ("bfloat16 up", lambda size: half_precision_upload()),
    ("bfloat16 down", lambda size: half_precision_download()),
    ("16-bit integers, summed in the open", lambda size: fr.chain(integers(), fr.ring_sum())),
    ("the same, and what was clipped counted", lambda size: fr.chain(integers(count_clipped=True), fr.ring_sum())),
    ("16-bit integers, nearest", lambda size: fr.chain(integers(rounding="nearest"), fr.ring_sum())),
    ("16-bit integers, rotated", lambda size: fr.chain(integers(rotation=True), fr.ring_sum())),
    ("simulated secure sum, 14 neighbours", lambda size: fr.chain(integers(), secure_sum(degree=14))),
    ("simulated secure sum, 88 neighbours", lambda size: fr.chain(integers(), secure_sum())),
)
SMOKE_LINKS = ("drive, 1 bit", "top 10 % of rows", "count sketch, 48 rows", "simulated secure sum, 14 neighbours")


def make_population(data_dir: Path | None, smoke: bool, num_steps: int) -> tuple[fr.Algorithm, fr.ClientData]:
    """Federated matrix factorisation on MovieLens 100K, or a tiny world; ``num_steps`` full-batch steps a client."""
    data = fr.load("synthetic", num_users=40, num_items=60) if smoke else fr.load("movielens/100k", data_dir=data_dir)
    split = fr.leave_one_out(data)
    model = fr.matrix_factorization(split.num_items, dim=4 if smoke else 32)
    algorithm = fr.fedavg(
        model,
        client_optimizer=optax.sgd(1.0),
        server_optimizer=optax.adam(0.02),
        local_epochs=num_steps,
        negatives=fr.Negatives(4),
    )
    return algorithm, fr.client_data(split)


def measure(
    names: Sequence[str], *, data_dir: Path | None, smoke: bool, turns: int, span: int, num_steps: int = 1
) -> list[dict]:
    """A line for each named row of `ROWS`; times are processor seconds of one round."""
    algorithm, clients = make_population(data_dir, smoke, num_steps)
    size = largest_update(algorithm, clients)
    sampler = fr.full_participation(clients.num_clients)
    keys = fr.RoundKeys(*jax.random.split(jax.random.key(1), 3))
    rounds, carried, seconds = {}, {}, {}
    for name, make_links in ROWS:
        if name in names:
            rounds[name] = fr.make_rounds(algorithm, make_links(size), sampler, clients, span_size=span)
            carried[name], seconds[name] = rounds[name].init(jax.random.key(0)), []
    for turn in range(turns + 1):  # the first compiles
        for name, made in rounds.items():
            start = time.process_time()
            carried[name] = jax.block_until_ready(made.run(*carried[name], keys, span))[:2]
            if turn:
                seconds[name].append((time.process_time() - start) / span)
    kept = {k: v for k, v in stamp(seed=0, data_fingerprint=None).items() if k in ("commit", "dirty", "versions")}
    return [
        {
            "benchmark": "links",
            "link": name,
            "median_s": statistics.median(mine),
            "ratio": statistics.median(a / b for a, b in zip(mine, seconds[NONE], strict=True)),
            "upload_bytes": rounds[name].upload_bits / 8,
            "download_bytes": rounds[name].download_bits / 8,
            "num_clients": clients.num_clients,
            "num_steps": num_steps,
            "turns": turns,
            "span": span,
            **kept,
            "device": str(jax.devices()[0].device_kind),
            "load": os.getloadavg()[0],
            "utc_time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        for name, mine in seconds.items()
    ]


def page(lines: Sequence[dict]) -> str:
    """The last line of each link and number of steps, as a table."""
    by_steps = {}
    for line in lines:
        by_steps.setdefault(line["num_steps"], {})[line["link"]] = line
    first, *others = sorted(by_steps)
    newest, plain = by_steps[first], by_steps[first][NONE]
    order = [name for name, _ in ROWS if name in newest]

    def with_more_work(name):
        found = [by_steps[steps].get(name) for steps in others]
        return tuple("" if line is None else f"{100 * (line['ratio'] - 1):+.0f} %" for line in found)

    rows = [
        (
            name,
            f"{1e3 * newest[name]['median_s']:.1f}",
            f"{100 * (newest[name]['ratio'] - 1):+.0f} %",
            *with_more_work(name),
            f"{newest[name]['upload_bytes'] / 1e3:.1f}",
            f"{plain['upload_bytes'] / newest[name]['upload_bytes']:.1f}",
            f"{newest[name]['download_bytes'] / 1e3:.1f}",
        )
        for name in order
    ]
    columns = (
        "link",
        "ms a round",
        "adds",
        *(f"adds to {n} steps" for n in others),
        "kB up",
        "times smaller",
        "kB down",
    )
    loads = [newest[name]["load"] for name in order]
    return (
        "# What links add to a round\n\n"
        f"Federated matrix factorisation, {plain['num_clients']} clients in every round, four negatives an "
        f"interaction, dim 32; {first} full-batch step a client unless said. Bytes are of a client and round, padding "
        "included.\n\n"
        f"{to_markdown(Table(columns, rows))}\n\n"
        f"Written by `python -m benchmarks.links`; processor time, medians of {plain['turns']} turns of "
        f"{plain['span']} rounds. Device "
        f"{plain['device']}, load averages {min(loads):.1f} to {max(loads):.1f} on {os.cpu_count()} cores: above that, "
        "they share it with other work.\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measures the links that the flags name, beside none; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.links", description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="folder with ml-100k/ (default: FEDJAX_REC_DATA)")
    parser.add_argument(
        "--link", action="append", choices=[name for name, _ in ROWS], help="only this; may be repeated"
    )
    parser.add_argument("--turns", type=int, default=7, help="timed turns of each link")
    parser.add_argument("--span", type=int, default=3, help="rounds in a turn")
    parser.add_argument(
        "--steps", type=int, default=1, help="full-batch steps of a client: how much local work there is"
    )
    parser.add_argument("--smoke", action="store_true", help="a tiny population; keeps nothing")
    args = parser.parse_args(argv)
    os.environ.setdefault("NPROC", "1")  # read when JAX first looks for devices
    if args.smoke:
        args.turns, args.span = 2, 2
    default = SMOKE_LINKS if args.smoke else [name for name, _ in ROWS]
    names = {NONE, *(args.link or default)}
    lines = measure(
        names, data_dir=args.data_dir, smoke=args.smoke, turns=args.turns, span=args.span, num_steps=args.steps
    )
    if not args.smoke:
        RESULTS.mkdir(exist_ok=True)
        with open(RESULTS / "links.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        lines = [json.loads(line) for line in (RESULTS / "links.jsonl").read_text("utf-8").splitlines()]
        (RESULTS / "links.md").write_text(page(lines), encoding="utf-8")
    print(page(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
