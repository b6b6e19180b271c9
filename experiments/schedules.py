"""Does noise that falls over the rounds leave a better model at the same epsilon? A quadratic, and MovieLens 100K.

    python -m experiments schedules --data-dir ~/data/ml-100k

About ten minutes on two idle CPU cores. Each result is kept as a line of results/schedules.jsonl, and a second call
runs only what is missing; results/schedules.md is made of the lines.

Schedules are sigma_t = sigma_T r^((T - t) / T) in at most 20 levels, each calibrated to the same user-level epsilon.
Part one needs no data: the variance that the noise leaves in the parameters of an optimiser that contracts by rho a
round, over that of constant noise. Part two trains FedSGD matrix factorisation with FedAdam on MovieLens 100K; its
rounds, clip norm and rates are those of the epsilon sweep, which were chosen on this data set; epsilon does not cover
that.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import jax
import numpy as np
import optax

from experiments.harness import RESULTS, keep_line, read_lines
from fedjax_rec.algorithms.fedavg import fedsgd
from fedjax_rec.data import leave_one_out, load
from fedjax_rec.data.clients import client_data
from fedjax_rec.data.negatives import Negatives
from fedjax_rec.evaluation import cases, client_scorer, evaluate
from fedjax_rec.federated.cohort import Sampler, full_participation, poisson
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.transforms import chain
from fedjax_rec.models.matrix_factorization import matrix_factorization
from fedjax_rec.models.popularity import popularity_scorer
from fedjax_rec.privacy.mechanisms import clip_by_global_norm
from fedjax_rec.privacy.schedule import (
    RATIOS,
    calibrate_schedule,
    geometric,
    half_exponent_ratio,
    noise_energy,
    scheduled_gaussian,
    textbook_ratio,
)
from fedjax_rec.reporting import Table, to_markdown
from fedjax_rec.reporting.formatting import MISSING
from fedjax_rec.runs.stamp import stamp

NAME = "schedules"
CONTRACTIONS = (0.98, 0.99)
# Users, expected cohort, rounds, delta, epsilon.
TOYS = (
    (943, 94, 200, 1e-4, 8.0),
    (6040, 256, 500, 1e-5, 8.0),
    (6040, 256, 500, 1e-5, 20.0),
    (100_000, 1000, 500, 1e-6, 2.0),
)
SMOKE_TOYS = ((100, 100, 20, 1e-3, 8.0),)
EPSILON, DELTA, NUM_ROUNDS, COHORT_SIZE = 8.0, 1e-4, 200, 94
L2_CLIP_NORM, SERVER_LR, DIM, L2 = 0.02, 0.02, 32, 0.01
METRIC = "ndcg@10"


def schedules(contraction: float, num_rounds: int) -> dict[str, float]:
    """Names and ratios that part one compares."""
    chosen = {f"r = {ratio:g}": ratio for ratio in RATIOS}
    chosen["half exponent"] = half_exponent_ratio(contraction, num_rounds)
    return chosen | {"textbook": textbook_ratio(contraction, num_rounds)}


def make_sampler(num_users: int, cohort_size: int) -> Sampler:
    """Poisson cohorts, or everyone where the cohort is all users."""
    if cohort_size == num_users:
        return full_participation(num_users)
    return poisson(num_users, cohort_size=cohort_size)


@cache
def calibrated(num_users: int, cohort_size: int, num_rounds: int, delta: float, epsilon: float, ratio: float):
    """Noise multipliers of a schedule, and the epsilon they were confirmed to have."""
    sampler = make_sampler(num_users, cohort_size)
    found = calibrate_schedule(geometric(num_rounds, ratio), sampler=sampler, target_epsilon=epsilon, delta=delta)
    return found.noise_multipliers, found.calibration.epsilon


def toy_line(toy: tuple, everyone: bool, contraction: float, name: str) -> dict:
    """The noise energy of one schedule over that of constant noise."""
    num_users, cohort_size, num_rounds, delta, epsilon = toy
    setting = (num_users, num_users if everyone else cohort_size, num_rounds, delta, epsilon)
    ratio = schedules(contraction, num_rounds)[name]
    constant, _ = calibrated(*setting, 1.0)
    noise, spent = calibrated(*setting, ratio)
    return {
        "first over last noise": ratio,
        "energy": noise_energy(noise, contraction) / noise_energy(constant, contraction),
        "last noise multiplier": float(noise[-1]),
        "epsilon": float(spent),
    }


def toy_keys(toys) -> Iterator[dict]:
    """What part one has to measure."""
    for toy in toys:
        for everyone in (False, True):
            for contraction in CONTRACTIONS:
                for name in schedules(contraction, toy[2]):
                    yield {"part": "quadratic", "toy": list(toy), "all": everyone, "rho": contraction, "name": name}


def training_keys(num_seeds: int) -> Iterator[dict]:
    """What part two has to measure."""
    for everyone in (False, True):
        for ratio in RATIOS:
            for seed in range(num_seeds):
                yield {"part": "training", "all": everyone, "ratio": ratio, "seed": seed}


@cache
def world(data_dir: Path | None, smoke: bool):
    """Split, clients and questions."""
    data = load("synthetic", num_users=60, num_items=80) if smoke else load("movielens/100k", data_dir=data_dir)
    split = leave_one_out(data)
    return split, client_data(split, exclusion="strict"), {part: cases(split, part) for part in ("validation", "test")}


@cache
def training(everyone: bool, ratio: float, data_dir: Path | None, smoke: bool):
    """Compiled rounds of one schedule, shared by its seeds; the model, and the epsilon that is charged."""
    split, clients, _ = world(data_dir, smoke)
    num_users = clients.num_clients
    num_rounds = 6 if smoke else NUM_ROUNDS
    cohort_size = num_users if everyone else min(COHORT_SIZE, num_users // 2)
    noise, epsilon = calibrated(num_users, cohort_size, num_rounds, DELTA, EPSILON, ratio)
    model = matrix_factorization(split.num_items, dim=DIM, l2=L2)
    algorithm = fedsgd(model, server_optimizer=optax.adam(SERVER_LR), negatives=Negatives(4))
    transforms = chain(clip_by_global_norm(L2_CLIP_NORM), scheduled_gaussian(L2_CLIP_NORM * noise))
    sampler = make_sampler(num_users, cohort_size)
    return make_rounds(algorithm, transforms, sampler, clients, span_size=num_rounds), model, num_rounds, epsilon


def training_line(everyone: bool, ratio: float, seed: int, *, data_dir: Path | None, smoke: bool) -> dict:
    """One run: the metric of the last round, which is the one that is released."""
    split, _, asked = world(data_dir, smoke)
    rounds, model, num_rounds, epsilon = training(everyone, ratio, data_dir, smoke)
    init_key, *keys = jax.random.split(jax.random.key(seed), 4)
    state, private = rounds.init(init_key)
    state, private, _ = rounds.run(state, private, RoundKeys(*keys), num_rounds)
    scorer = client_scorer(model.score, shared=state.shared, private=private)
    found = {f"{METRIC} {part}": evaluate(scorer, asked[part], ks=(10,)).values[METRIC] for part in asked}
    floor = evaluate(popularity_scorer(split.train), asked["test"], ks=(10,)).values[METRIC]
    return found | {"epsilon": float(epsilon), "popularity": floor, "split": split.fingerprint}


def main(argv: list[str] | None = None) -> int:
    """Measures what is missing, and writes the page."""
    parser = argparse.ArgumentParser(prog=f"python -m experiments {NAME}", description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="folder with ml-100k/ (default: FEDJAX_REC_DATA)")
    parser.add_argument("--part", choices=("quadratic", "training", "none"), help="only this part; none: only the page")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each training")
    parser.add_argument("--smoke", action="store_true", help="seconds, on made-up data; writes nothing")
    args = parser.parse_args(argv)
    keys = [*toy_keys(SMOKE_TOYS if args.smoke else TOYS), *training_keys(1 if args.smoke else args.seeds)]
    if args.smoke:
        keys = [key for key in keys if key["all"] and key.get("ratio", 1.0) in (1.0, 3.0)]
    lines = [] if args.smoke else read_lines(NAME)
    done = [line["key"] for line in lines]
    for key in keys:
        if key in done or (args.part and key["part"] != args.part):
            continue
        start = time.perf_counter()
        if key["part"] == "quadratic":
            values = toy_line(tuple(key["toy"]), key["all"], key["rho"], key["name"])
        else:
            options = {"data_dir": args.data_dir, "smoke": args.smoke}
            values = training_line(key["all"], key["ratio"], key["seed"], **options)
        line = {"key": key, "values": values, "seconds": round(time.perf_counter() - start, 1)}
        lines.append(line | {"stamp": stamp(seed=key.get("seed", 0), data_fingerprint=None)})
        print(json.dumps(line), flush=True)
        if not args.smoke:
            keep_line(NAME, lines[-1])
    page = write_page(lines)
    print(page)
    if not args.smoke:
        (RESULTS / f"{NAME}.md").write_text(page, encoding="utf-8")
    return 0


def toy_table(lines: list[dict]) -> Table:
    """Noise energy over that of constant noise: one row a setting, one column a schedule."""
    found = {}
    for line in lines:
        key = line["key"]
        if key["part"] == "quadratic":
            found.setdefault((*key["toy"], key["all"], key["rho"]), {})[key["name"]] = line["values"]["energy"]
    names = list(schedules(0.9, 10))
    rows = []
    for (num_users, cohort, num_rounds, delta, epsilon, everyone, rho), energies in found.items():
        who = "all" if everyone else f"poisson, {cohort / num_users:.3f}"
        cells = [f"{energies[name]:.3f}" if name in energies else MISSING for name in names]
        rows.append((f"T = {num_rounds}, ε = {epsilon:g}, δ = {delta:g}", who, f"{rho:g}", *cells))
    return Table(
        ("rounds and target", "sampler", "contraction", *names),
        rows,
        caption="Noise energy in the last parameters over that of constant noise at the same ε; below 1 is better.",
        notes=(
            "User-level, add/remove one user, PLD accounting (poisson) or the analytic Gaussian (all).",
            "Half exponent: r = rho^(-T/4). Textbook: r = rho^(-T/2), the best for a fixed sum of sigma^-2.",
        ),
    )


def training_table(lines: list[dict]) -> Table:
    """Quality by schedule: means over seeds, paired differences from constant noise."""
    kept = [line for line in lines if line["key"]["part"] == "training"]
    rows = []
    for everyone in (False, True):
        runs = {(k["ratio"], k["seed"]): line["values"] for line in kept if (k := line["key"])["all"] == everyone}
        for ratio in RATIOS:
            seeds = [seed for r, seed in runs if r == ratio and (1.0, seed) in runs]
            if not seeds:
                continue
            mine = [runs[ratio, seed] for seed in seeds]
            test = np.array([values[f"{METRIC} test"] for values in mine])
            change = test - np.array([runs[1.0, seed][f"{METRIC} test"] for seed in seeds])
            spread = float(np.std(test, ddof=1)) if len(seeds) > 1 else None
            paired = f"{change.mean():+.4f}" + (f" ± {np.std(change, ddof=1):.4f}" if len(seeds) > 1 else "")
            validation = float(np.mean([values[f"{METRIC} validation"] for values in mine]))
            epsilon = max(values["epsilon"] for values in mine)
            who = "all" if everyone else "poisson"
            rows.append((who, f"{ratio:g}", epsilon, validation, float(test.mean()), spread, paired, len(seeds)))
    floor = kept[0]["values"]["popularity"] if kept else float("nan")
    columns = ("sampler", "r", "epsilon", "validation", "test", "sd of test", "test, paired with r = 1", "seeds")
    return Table(
        columns,
        rows,
        caption=(
            f"{METRIC} of FedSGD matrix factorisation on MovieLens 100K after {NUM_ROUNDS} rounds, user-level "
            f"(ε, δ = {DELTA:g}), add/remove one user; poisson: {COHORT_SIZE} of 943 expected"
        ),
        notes=(
            f"Exact popularity, no privacy: {floor:.4f}. Leave one out, full ranking, last round, not the best one.",
            "± is the standard deviation of the paired difference over seeds of training. Rows are alternatives. Not "
            "covered by ε: hyper-parameters, and the metrics shown.",
        ),
    )


def findings(lines: list[dict]) -> str:
    """What the quadratic says about the rules, and the training about the best of them, in numbers."""
    sentences = []
    for everyone, who in ((False, "With Poisson cohorts"), (True, "With every client in every round")):
        parts = []
        for name in ("r = 1.5", "half exponent", "textbook"):
            kept = [x for x in lines if x["key"]["part"] == "quadratic" and x["key"]["all"] == everyone]
            energies = [x["values"]["energy"] for x in kept if x["key"]["name"] == name]
            if energies:
                parts.append(f"{name}: {min(energies):.2f} to {max(energies):.2f}")
        if parts:
            sentences.append(f"{who} the noise energy over that of constant noise is, {'; '.join(parts)}.")
    falling = [row for row in training_table(lines).rows if row[1] != "1" and row[-1] > 1]
    clear = [row for row in falling if float(row[-2].split(" ± ")[0]) > float(row[-2].split(" ± ")[1])]
    if falling:
        sentences.append(
            f"On MovieLens 100K {len(clear)} of {len(falling)} falling schedules have a higher test {METRIC} than "
            "constant noise by more than one standard deviation of the paired difference."
        )
    return " ".join(sentences)


def write_page(lines: list[dict]) -> str:
    """The page of the study."""
    made = lines[-1]["stamp"] if lines else stamp(seed=0, data_fingerprint=None)
    tables = "\n\n".join(
        f"## {title}\n\n{to_markdown(table)}"
        for title, table in (("A quadratic", toy_table(lines)), ("MovieLens 100K", training_table(lines)))
        if table.rows
    )
    return (
        "# Noise that falls over the rounds\n\nStatus: study, no paper to reproduce.\n\n"
        f"{findings(lines)}\n\n{tables}\n"
        f"Written by `python -m experiments {NAME}` from results/{NAME}.jsonl; "
        f"commit {(made['commit'] or 'none')[:12]}, jax {made['versions']['jax']}, {made['device_kind']}.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
