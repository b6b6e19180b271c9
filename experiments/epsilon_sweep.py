"""What user-level privacy costs: one federated recommender at epsilon 8, 4, 2 and 1, beside its floors and ceilings.

    python -m experiments.epsilon_sweep --data-dir ~/data/ml-100k

About ten minutes on two CPU cores. Writes experiments/results/epsilon_sweep.md.

MovieLens 100K, latest item out (ties by seeded hash), full ranking. The model is the default of `fedjax-rec train`;
the rounds, the clip norm and the learning rates are the same for every epsilon and were chosen by hand on this very
data set, with test values printed beside validation ones: the epsilons do not cover that, and quality may be
flattered. Rows with an epsilon are separate releases: their epsilons are alternatives.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import dp_accounting
import jax
import numpy as np

from fedjax_rec.evaluation import cases, constant_scorer, evaluate
from fedjax_rec.models.ease import ease_scorer
from fedjax_rec.models.popularity import dp_popularity, popularity_scorer
from fedjax_rec.privacy import calibrate_noise_multiplier
from fedjax_rec.reporting import Table, to_markdown
from fedjax_rec.runs.config import TrainConfig
from fedjax_rec.runs.experiment import Data, prepare, prepare_data
from fedjax_rec.runs.stamp import stamp
from fedjax_rec.runs.training import evaluate_part, train

METRICS = ("ndcg@10", "hit@10")
EPSILONS = (8.0, 4.0, 2.0, 1.0)
DELTA = 1e-4
EASE_L2 = 300.0
ROOT = Path(__file__).parent


def main(argv: list[str] | None = None) -> int:
    """Runs the study and writes its table."""
    parser = argparse.ArgumentParser(prog="python -m experiments.epsilon_sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="folder with ml-100k/ (default: FEDJAX_REC_DATA)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds per row")
    parser.add_argument("--smoke", action="store_true", help="a few rounds on synthetic data; writes nothing")
    args = parser.parse_args(argv)
    config = TrainConfig(dataset="movielens/100k", data_dir=args.data_dir, delta=DELTA)
    epsilons, seeds = EPSILONS, range(args.seeds)
    if args.smoke:
        config = TrainConfig(delta=DELTA, rounds=4, eval_every=2)
        epsilons, seeds = EPSILONS[:1], range(1)
    data = prepare_data(config)
    rows = list(reference_rows(data, epsilons, seeds))
    for epsilon in (None, *epsilons):
        rows.append(trained_row(config, data, epsilon, seeds))
        found = ", ".join(f"{values['ndcg@10']:.4f}" for values in rows[-1][2])
        print(f"epsilon {epsilon}: ndcg@10 {found}", flush=True)
    table = make_table(rows, data, num_seeds=len(seeds), rounds=config.rounds)
    text = to_markdown(table)
    print(text)
    if not args.smoke:
        write(text, table, data)
    return 0


def reference_rows(data: Data, epsilons, seeds):
    """Popularity, EASE, and popularity released once at each epsilon."""
    asked, rows = cases(data.split), data.split.train
    yield ("popularity", None, [evaluate(popularity_scorer(rows), asked, ks=(10,)).values])
    yield ("EASE, centralised", None, [evaluate(ease_scorer(rows, l2=EASE_L2), asked, ks=(10,)).values])
    for epsilon in epsilons:
        noise = calibrate_noise_multiplier(dp_accounting.GaussianDpEvent, target_epsilon=epsilon, delta=DELTA)
        values = []
        for seed in seeds:
            key = jax.random.fold_in(jax.random.key(seed), 3)
            counts = dp_popularity(rows, noise_multiplier=noise.noise_multiplier, key=key).counts
            values.append(evaluate(constant_scorer(counts), asked, ks=(10,)).values)
        yield ("popularity, released once", noise.epsilon, values)


def trained_row(config: TrainConfig, data: Data, epsilon: float | None, seeds):
    """The federated model at one epsilon, or without privacy, over seeds of training on one split."""
    values, spent = [], None
    for seed in seeds:
        delta = None if epsilon is None else config.delta
        experiment = prepare(dataclasses.replace(config, epsilon=epsilon, delta=delta, seed=seed), data=data)
        outcome = train(experiment, folder=None)
        values.append(evaluate_part(experiment, outcome.state, outcome.private, "test").values)
        if outcome.ledger is not None:
            spent = outcome.ledger.spent(config.delta).epsilon
    return ("federated matrix factorisation", spent, values)


def make_table(rows, data: Data, *, num_seeds: int, rounds: int) -> Table:
    """Means over seeds, with the standard deviation where there is one."""
    floor = np.mean([values["ndcg@10"] for values in rows[0][2]])
    lines = []
    for label, epsilon, values in rows:
        means = [float(np.mean([v[m] for v in values])) for m in METRICS]
        spread = [float(np.std([v[m] for v in values], ddof=1)) if len(values) > 1 else None for m in METRICS]
        lines.append((label, epsilon, *means, spread[0], means[0] / floor))
    split = data.split
    return Table(
        columns=("model", "epsilon", *METRICS, "sd of ndcg@10", "vs popularity"),
        rows=tuple(lines),
        caption=(
            f"{data.interactions.name}: user-level (ε, δ = {DELTA:g}), add/remove one user, all clients in each of "
            f"{rounds} rounds, full ranking, {split.rule}, {split.tie_rule} ties, split {split.fingerprint[:12]}"
        ),
        notes=(
            f"Means over {num_seeds} seeds of training on one split; sd is over those seeds.",
            "Trust model: central. Not covered by ε: the choice of hyper-parameters, and the metrics shown.",
        ),
        highest=METRICS,
    )


def write(text: str, table: Table, data: Data) -> None:
    """Writes the result file."""
    made = stamp(seed=0, data_fingerprint=data.interactions.fingerprint, split_fingerprint=data.split.fingerprint)
    jax_version, device = made["versions"]["jax"], made["device_kind"]
    foot = (
        f"Written by `python -m experiments.epsilon_sweep`; data sha256 {data.interactions.fingerprint[:16]}, "
        f"commit {(made['commit'] or 'none')[:12]}, jax {jax_version}, {device}."
    )
    head = "# What user-level privacy costs\n\nStatus: study, no paper to reproduce.\n\n"
    path = ROOT / "results" / "epsilon_sweep.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{head}{text}\n\n{foot}\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
