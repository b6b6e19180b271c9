"""Does one bit a number cost anything under user-level privacy? DRIVE and four bits on MovieLens 100K.

    python -m experiments one_bit --data-dir ~/data/ml-100k

About five minutes of one CPU core. Each run is kept as a line of results/one_bit.jsonl, and a second call runs only
what is missing; results/one_bit.md is made of the lines.

Matrix factorisation with the settings of `fedjax-rec train --epsilon 8`, all clients in every round, for fewer rounds.
The chain is clip, compress, clip, noise: the noise is on the sum of decoded updates, so a decoded update is what must
be bounded, and a compressor that lengthens updates has them clipped a second time. DRIVE lengthens them by a quarter,
so that clip leaves 0.8 of what was sent against the same noise; four bits lengthen them by some two percent. Without
privacy nothing is clipped. Runs of one seed share starting point, negatives and noise; differences are paired by seed.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import jax
import numpy as np

from experiments.harness import RESULTS, keep_line, read_lines
from fedjax_rec.algorithms.fedavg import fedsgd
from fedjax_rec.compression.drive import drive
from fedjax_rec.compression.quantize import quantize
from fedjax_rec.data.negatives import Negatives
from fedjax_rec.evaluation import cases, client_scorer, evaluate
from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.round import RoundKeys, largest_update, make_rounds
from fedjax_rec.federated.transforms import UpdateTransform, chain
from fedjax_rec.models.matrix_factorization import matrix_factorization
from fedjax_rec.privacy.mechanisms import clip_by_global_norm, gaussian_noise
from fedjax_rec.reporting import Table, to_markdown
from fedjax_rec.reporting.formatting import MISSING
from fedjax_rec.runs.config import TrainConfig
from fedjax_rec.runs.experiment import make_server_optimizer, prepare_data
from fedjax_rec.runs.privacy_plan import plan_privacy
from fedjax_rec.runs.stamp import stamp

NAME = "one_bit"
EPSILON, NUM_ROUNDS, NUM_SEEDS = 8.0, 40, 5
METRICS = ("ndcg@10", "hit@10")
COMPRESSORS = {"32 bits": None, "4 bits": quantize(4), "1 bit": drive()}
ROWS = [(epsilon, name) for epsilon in (EPSILON, None) for name in COMPRESSORS]
SMOKE_ROWS = [(EPSILON, "32 bits"), (EPSILON, "1 bit")]


def settings(data_dir: Path | None, smoke: bool) -> TrainConfig:
    """The defaults of the command line, and fewer rounds."""
    dataset, rounds = ("synthetic", 3) if smoke else ("movielens/100k", NUM_ROUNDS)
    return TrainConfig(dataset=dataset, data_dir=data_dir, rounds=rounds, eval_every=rounds, epsilon=EPSILON)


@cache
def world(data_dir: Path | None, smoke: bool):
    """Data, questions, model, algorithm and privacy plan, the same for all rows."""
    config = settings(data_dir, smoke)
    data = prepare_data(config)
    model = matrix_factorization(data.split.num_items, dim=config.model.dim, l2=config.model.l2)
    algorithm = fedsgd(model, server_optimizer=make_server_optimizer(config), negatives=Negatives(4))
    sampler, size = full_participation(data.clients.num_clients), largest_update(algorithm, data.clients)
    plan = plan_privacy(config, sampler, num_clients=data.clients.num_clients, update_size=size)
    return config, data, model, algorithm, sampler, plan, cases(data.split, "test")


def links(compressor: UpdateTransform | None, plan) -> UpdateTransform:
    """Clip, compress, clip the decoded update, noise; only the compressor where there is no plan."""
    middle = () if compressor is None else (compressor,)
    if plan is None:
        return chain(*middle)
    clip = clip_by_global_norm(plan.l2_clip_norm)
    return chain(clip, *middle, clip, gaussian_noise(plan.noise_multiplier * plan.l2_clip_norm))


@cache
def compiled(epsilon: float | None, name: str, data_dir: Path | None, smoke: bool):
    """Rounds of one row, shared by its seeds."""
    config, data, _, algorithm, sampler, plan, _ = world(data_dir, smoke)
    transforms = links(COMPRESSORS[name], plan if epsilon else None)
    return make_rounds(algorithm, transforms, sampler, data.clients, span_size=config.rounds)


def run(epsilon: float | None, name: str, seed: int, *, data_dir: Path | None, smoke: bool) -> dict:
    """One run: the metrics of its last round, and what a client sends in each."""
    config, data, model, _, _, plan, asked = world(data_dir, smoke)
    rounds = compiled(epsilon, name, data_dir, smoke)
    init_key, *keys = jax.random.split(jax.random.key(seed), 4)
    state, private = rounds.init(init_key)
    state, private, metrics = rounds.run(state, private, RoundKeys(*keys), config.rounds)
    found = evaluate(client_scorer(model.score, shared=state.shared, private=private), asked, ks=(10,)).values
    return {
        **{metric: found[metric] for metric in METRICS},
        "upload_bytes": rounds.upload_bits / 8,
        "last update norm": float(metrics["update_norm"][config.rounds - 1]) if "update_norm" in metrics else None,
        "last clipped": float(metrics["clipped"][config.rounds - 1]) if "clipped" in metrics else None,
        "noise_multiplier": plan.noise_multiplier if epsilon else None,
        "delta": plan.delta if epsilon else None,
        "split": data.split.fingerprint,
    }


def paired(lines: Sequence[dict], epsilon: float | None, name: str, metric: str) -> tuple[float, float, int]:
    """Mean difference from 32 bits with the same seed, its standard error, and how many seeds."""
    by_seed = {name: {}, "32 bits": {}}
    for line in lines:
        key = line["key"]
        if key["epsilon"] == epsilon and key["row"] in by_seed:
            by_seed[key["row"]][key["seed"]] = line["values"][metric]
    seeds = sorted(set(by_seed[name]) & set(by_seed["32 bits"]))
    difference = np.array([by_seed[name][seed] - by_seed["32 bits"][seed] for seed in seeds])
    error = float(np.std(difference, ddof=1) / np.sqrt(len(seeds))) if len(seeds) > 1 else float("nan")
    return float(difference.mean()) if seeds else float("nan"), error, len(seeds)


def make_table(lines: Sequence[dict]) -> Table:
    """Quality and bytes of each row, differences paired with the uncompressed one of the same epsilon."""
    rows = []
    for epsilon, name in ROWS:
        mine = [x["values"] for x in lines if x["key"]["epsilon"] == epsilon and x["key"]["row"] == name]
        if not mine:
            continue
        cells = []
        for metric in METRICS:
            difference, error, _ = paired(lines, epsilon, name, metric)
            cells.append(f"{np.mean([values[metric] for values in mine]):.4f}")
            cells.append(MISSING if name == "32 bits" else f"{difference:+.4f} ± {error:.4f}")
        who = "none" if epsilon is None else f"user-level, {epsilon:g}"
        clipped = MISSING if epsilon is None else f"{100 * np.mean([values['last clipped'] for values in mine]):.0f} %"
        rows.append((who, name, *cells, clipped, f"{mine[0]['upload_bytes'] / 1e3:.1f}", len(mine)))
    heads = [text for metric in METRICS for text in (metric, f"{metric}, less 32 bits")]
    return Table(("epsilon", "update", *heads, "clipped last", "kB up a round", "seeds"), rows)


def verdict(lines: Sequence[dict]) -> str:
    """What the paired differences of the private rows say, in words."""
    said = []
    for name in ("1 bit", "4 bits"):
        difference, error, seeds = paired(lines, EPSILON, name, METRICS[0])
        if seeds < 2:
            continue
        within = "within" if abs(difference) <= 2 * error else "outside"
        said.append(f"{name}: {difference:+.4f} ± {error:.4f} {METRICS[0]}, {within} two standard errors of nothing")
    return f"At epsilon {EPSILON:g}, {'; '.join(said)}." if said else "Not enough seeds."


def write_page(lines: Sequence[dict], num_rounds: int) -> str:
    """The page."""
    private = next((line["values"] for line in lines if line["key"]["epsilon"]), None)
    stamps = [line["stamp"] for line in lines]
    guarantee = ""
    if private:
        guarantee = (
            f"User-level epsilon {EPSILON:g} at delta {private['delta']:g}, add or remove one user, all clients in "
            f"each of {num_rounds} rounds, noise multiplier {private['noise_multiplier']:.3g} on the sum of decoded, "
            "clipped updates; settings were chosen on this data set before, which epsilon does not cover. "
        )
    return (
        "# One bit a number\n\n"
        f"Status: study, no paper to reproduce. {verdict(lines)}\n\n"
        f"{to_markdown(make_table(lines))}\n\n"
        f"{guarantee}Ranked among all items not in training, test items of leave-one-out; means over seeds, and mean "
        'differences from 32 bits of the same seed with their standard errors. "Clipped last" is the share of clients '
        "whose decoded update the last clip shortened in the last round. Bytes count padding, scales and row ids.\n\n"
        f"Written by `python -m experiments {NAME}`; commits "
        f"{', '.join(sorted({(s['commit'] or 'none')[:12] for s in stamps}))}, device "
        f"{', '.join(sorted({str(s['device_kind']) for s in stamps}))}.\n"
    )


def main(argv: list[str] | None = None) -> int:
    """Measures what is missing, and writes the page."""
    parser = argparse.ArgumentParser(prog=f"python -m experiments {NAME}", description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="folder with ml-100k/ (default: FEDJAX_REC_DATA)")
    parser.add_argument("--seeds", type=int, default=NUM_SEEDS, help="seeds of each row")
    parser.add_argument("--smoke", action="store_true", help="seconds, on made-up data; writes nothing")
    parser.add_argument("--only-page", action="store_true", help="run nothing, write the page from the kept lines")
    args = parser.parse_args(argv)
    num_rounds = settings(args.data_dir, args.smoke).rounds
    lines = [] if args.smoke else [line for line in read_lines(NAME) if line["key"]["rounds"] == num_rounds]
    done = [line["key"] for line in lines]
    for seed in range(1 if args.smoke else args.seeds):
        for epsilon, name in SMOKE_ROWS if args.smoke else ROWS:
            key = {"epsilon": epsilon, "row": name, "seed": seed, "rounds": num_rounds}
            if key in done or args.only_page:
                continue
            start = time.perf_counter()
            values = run(epsilon, name, seed, data_dir=args.data_dir, smoke=args.smoke)
            line = {"key": key, "values": values, "seconds": round(time.perf_counter() - start, 1)}
            lines.append(line | {"stamp": stamp(seed=seed, data_fingerprint=None)})
            print(json.dumps(line), flush=True)
            if not args.smoke:
                keep_line(NAME, lines[-1])
    page = write_page(lines, num_rounds)
    print(page)
    if not args.smoke:
        (RESULTS / f"{NAME}.md").write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
