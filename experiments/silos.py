"""What example-level privacy costs when silos train: one silo and 21, at epsilon 8, 4, 2 and 1, beside their floors.

    python -m experiments.silos --data-dir ~/data/ml-100k

Under ten minutes on two busy CPU cores. Writes experiments/results/silos.md.

MovieLens 100K, latest item out (ties by seeded hash), full ranking. The users are in one silo, or in one silo for each
occupation. Each silo runs DP-SGD on its own interactions; the unit of privacy is one interaction, so these epsilons
stand in no table with user-level ones. Steps, clip norm and learning rate are the same for every epsilon and were
chosen by looking at validation data, which the epsilons do not cover.
"""

import argparse
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import dp_accounting
import jax
import numpy as np
import optax

from fedjax_rec.algorithms.silo_dpsgd import ExampleLevelDp, record_rounds, silo_dpsgd
from fedjax_rec.data import Split, leave_one_out, load
from fedjax_rec.data.silos import Silos, equal_groups, private_of_users, silo_data
from fedjax_rec.evaluation import cases, client_scorer, constant_scorer, evaluate
from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.transforms import chain
from fedjax_rec.models.matrix_factorization import matrix_factorization
from fedjax_rec.models.popularity import popularity_scorer
from fedjax_rec.privacy import Ledger, calibrate_noise_multiplier
from fedjax_rec.reporting import Table, to_markdown
from fedjax_rec.runs.stamp import stamp

METRICS = ("ndcg@10", "hit@10")
EPSILONS = (8.0, 4.0, 2.0, 1.0)
DELTA = 1e-6  # a tenth of 1 / interactions
DIM, LEARNING_RATE = 8, 0.03
PRIVATE, PRIVATE_ROUNDS = ExampleLevelDp(0.25, 0.2, 0.0, num_local_steps=20), 5
# Without privacy small batches and many steps are better; so high a clip norm is never reached.
OPEN, OPEN_ROUNDS = ExampleLevelDp(0.05, 1e3, 0.0, num_local_steps=50), 20
RESULT = Path(__file__).parent / "results" / "silos.md"


def main(argv: list[str] | None = None) -> int:
    """Runs the study and writes its table."""
    parser = argparse.ArgumentParser(prog="python -m experiments.silos", description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="folder with ml-100k/ (default: FEDJAX_REC_DATA)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds per row")
    parser.add_argument("--smoke", action="store_true", help="a few steps on synthetic data; writes nothing")
    args = parser.parse_args(argv)
    if args.smoke:
        interactions = load("synthetic", num_users=60, num_items=80)
        attribute, epsilons, seeds, rounds = "favourite_genre", EPSILONS[:1], range(1), (1, 1)
    else:
        interactions = load("movielens/100k", data_dir=args.data_dir)
        attribute, epsilons, seeds, rounds = "occupation", EPSILONS, range(args.seeds), (PRIVATE_ROUNDS, OPEN_ROUNDS)
    split = leave_one_out(interactions)
    one = silo_data(split, equal_groups(split.num_users, num_silos=1))
    many = silo_data(split, interactions.user_attributes[attribute])
    rows = [("popularity", None, None, [evaluate(popularity_scorer(split.train), cases(split), ks=(10,)).values])]
    groupings = (many,) if args.smoke else (one, many)
    rows += [popularity_row(split, silos, epsilon, seeds) for silos in groupings for epsilon in epsilons]
    for silos in groupings:
        rows.append(trained_row("no privacy", split, silos, OPEN, rounds[1], seeds))
        rows.append(trained_row("DP-SGD without its noise", split, silos, PRIVATE, rounds[0], seeds))
        for epsilon in epsilons:
            privacy = replace(PRIVATE, noise_multiplier=noise_for(epsilon, rounds[0]))
            rows.append(trained_row("DP-SGD", split, silos, privacy, rounds[0], seeds))
            print(rows[-1][:3], [round(values["ndcg@10"], 4) for values in rows[-1][3]], flush=True)
    table = make_table(rows, split, num_seeds=len(seeds))
    page = write_page(table, split)
    print(page)
    if not args.smoke:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(page, encoding="utf-8")
    return 0


@cache
def noise_for(epsilon: float, num_rounds: int) -> float:
    """The noise multiplier of the private training at a target epsilon."""

    def run_event(noise_multiplier):
        event = replace(PRIVATE, noise_multiplier=noise_multiplier).round_event
        return dp_accounting.SelfComposedDpEvent(event, num_rounds)

    return calibrate_noise_multiplier(run_event, target_epsilon=epsilon, delta=DELTA, unit="example").noise_multiplier


def popularity_row(split: Split, silos: Silos, epsilon: float, seeds):
    """Item counts, each silo noising its own once: an interaction adds 1 to one count of one silo."""
    noise = calibrate_noise_multiplier(
        dp_accounting.GaussianDpEvent, target_epsilon=epsilon, delta=DELTA, unit="example"
    )
    num_silos, values = silos.clients.num_clients, []
    for seed in seeds:
        draws = np.random.default_rng([seed, num_silos]).normal(size=(num_silos, split.num_items))
        counts = split.train.item_counts + noise.noise_multiplier * draws.sum(0)
        values.append(evaluate(constant_scorer(counts.astype(np.float32)), cases(split), ks=(10,)).values)
    return "popularity, noised in each silo", num_silos, noise.epsilon, values


def trained_row(label: str, split: Split, silos: Silos, privacy: ExampleLevelDp, num_rounds: int, seeds):
    """Matrix factorisation trained in silos, over seeds of training on one split; one compilation for all of them."""
    model, num_silos = matrix_factorization(split.num_items, dim=DIM), silos.clients.num_clients
    algorithm = silo_dpsgd(
        model,
        privacy=privacy,
        users_per_silo=silos.users_per_silo,
        client_optimizer=optax.adam(LEARNING_RATE),
    )
    rounds = make_rounds(algorithm, chain(), full_participation(num_silos), silos.clients, span_size=num_rounds)
    values = []
    for seed in seeds:
        init_key, *keys = jax.random.split(jax.random.key(seed), 4)
        state, private = rounds.init(init_key)
        state, private, _ = rounds.run(state, private, RoundKeys(*keys), num_rounds)
        scorer = client_scorer(model.score, shared=state.shared, private=private_of_users(private, silos))
        values.append(evaluate(scorer, cases(split), ks=(10,)).values)
    if not privacy.noise_multiplier:
        return label, num_silos, None, values
    ledger = record_rounds(Ledger(unit="example", trust_model="silo"), privacy, num_rounds=num_rounds)
    return label, num_silos, ledger.spent(DELTA).epsilon, values


def make_table(rows, split: Split, *, num_seeds: int) -> Table:
    """Means over seeds, with the standard deviation where there is one."""
    floor = rows[0][3][0]["ndcg@10"]
    lines = []
    for label, num_silos, epsilon, values in rows:
        means = [float(np.mean([v[m] for v in values])) for m in METRICS]
        spread = float(np.std([v["ndcg@10"] for v in values], ddof=1)) if len(values) > 1 else None
        lines.append((label, num_silos, epsilon, *means, spread, means[0] / floor))
    return Table(
        columns=("model", "silos", "epsilon", *METRICS, "sd of ndcg@10", "vs popularity"),
        rows=lines,
        caption=(
            f"{split.train.name}: example-level (ε, δ = {DELTA:g}), add/remove one interaction, full ranking, "
            f"{split.rule}, {split.tie_rule} ties, split {split.fingerprint[:12]}."
        ),
        notes=(
            f"DP-SGD: Poisson sampling of interactions with probability {PRIVATE.sampling_prob:g}, {PRIVATE_ROUNDS} "
            f"rounds of {PRIVATE.num_local_steps} steps in every silo, clip norm {PRIVATE.l2_clip_norm:g}; item and "
            f"user vectors of length {DIM}, both noised. Popularity: every interaction, once.",
            f"No privacy: {OPEN_ROUNDS} rounds of {OPEN.num_local_steps} steps with probability "
            f"{OPEN.sampling_prob:g}, not clipped.",
            f"Seeds 0 to {num_seeds - 1} of training on one split; sd is over them. Rows with an ε are alternatives.",
            "Trust model: a user trusts its own silo, and nobody else. Not covered by ε: the hyper-parameters, chosen "
            "on validation data, the declared sizes of the silos, and the metrics shown.",
        ),
        highest=METRICS,
    )


def write_page(table: Table, split: Split) -> str:
    """The page: status, what was found, table, and what made it."""
    made = stamp(seed=0, data_fingerprint=None, split_fingerprint=split.fingerprint)
    return (
        "# What example-level privacy costs in silos\n\n"
        f"Status: study, no paper to reproduce.\n\n{findings(table)}\n\n{to_markdown(table)}\n"
        f"Written by `python -m experiments.silos`; split sha256 {split.fingerprint[:16]}, "
        f"commit {(made['commit'] or 'none')[:12]}, jax {made['versions']['jax']}, {made['device_kind']}.\n"
    )


def findings(table: Table) -> str:
    """One sentence a grouping: where private training has the higher mean ndcg@10 than counts of the same epsilon."""
    sentences = []
    for num_silos in dict.fromkeys(row[1] for row in table.rows if row[1]):
        released, trained = (
            [row for row in table.rows if row[:2] == (label, num_silos)]
            for label in ("popularity, noised in each silo", "DP-SGD")
        )
        better = [f"{t[2]:.3g}" for r, t in zip(released, trained, strict=True) if t[3] > r[3]]
        where = f"at epsilon {' and '.join(better)} only" if better else "at no epsilon of the table"
        where = "at every epsilon of the table" if len(better) == len(trained) else where
        silos = "one silo" if num_silos == 1 else f"{num_silos} silos"
        sentences.append(f"With {silos}, DP-SGD ranks better than noised counts of the same epsilon {where}.")
    return " ".join(sentences)


if __name__ == "__main__":
    sys.exit(main())
