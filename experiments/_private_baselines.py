"""DP-EASE and DPALS as released at an epsilon, head and all: a scorer and the ledger of what it cost.

    python -m experiments._private_baselines movielens/1m --epsilon 8 --seed 1

prints hit@10 and ndcg@10 of validation and test items, with and without recency, one JSON line a method.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import dp_accounting
import jax
import numpy as np

from experiments._private_settings import DP_EASE, DPALS
from fedjax_rec.algorithms.dpals import Shares, dpals, frequency_weights, head_weights
from fedjax_rec.data import Split, leave_one_out, load
from fedjax_rec.data.clients import client_data
from fedjax_rec.evaluation import Scorer, cases, constant_scorer, evaluate, factor_scorer
from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.models.dp_ease import dp_ease_scorer, dp_ease_weights
from fedjax_rec.models.dp_gram import dp_gram
from fedjax_rec.models.popularity import DpPopularity, dp_popularity
from fedjax_rec.models.user_solve import UserSolve, user_vectors
from fedjax_rec.privacy import Ledger
from fedjax_rec.privacy.mechanisms import user_level_dp


class Released(NamedTuple):
    """A private recommender: scorers by recency, which cost nothing more, and the one ledger behind them."""

    scorers: dict[float, Scorer]
    ledger: Ledger


def released_popularity(split: Split, *, epsilon: float, delta: float, seed: int) -> Released:
    """The floor: counts released once with the whole budget."""
    z = dp_accounting.get_sigma_gaussian(epsilon, delta)
    counts = dp_popularity(split.train, noise_multiplier=z, key=jax.random.fold_in(jax.random.key(seed), 3))
    ledger = Ledger().record(counts.dp_event, phase="popularity", released="noised item counts")
    return Released({math.inf: constant_scorer(counts.counts)}, ledger)


def released_dp_ease(split: Split, setting: dict[str, Any], *, epsilon: float, delta: float, seed: int) -> Released:
    """A head by private popularity, its Gram matrix released once, and EASE on that."""
    head, counts, z, key = _head(split, setting, epsilon, delta, seed)
    gram = dp_gram(split.train, noise_multiplier=z, key=key, item_ids=head, decay=setting["decay"])
    ledger = Ledger().record(counts.dp_event, phase="popularity", released="noised item counts")
    ledger = ledger.record(gram.dp_event, phase="training", released="noised Gram matrix of the head")
    weights = dp_ease_weights(gram, l2=setting["l2"], threshold=setting["threshold"])
    scorers = {r: dp_ease_scorer(weights, head, split.train, recency=r) for r in (math.inf, setting["recency"])}
    return Released(scorers, ledger)


def released_dpals(split: Split, setting: dict[str, Any], *, epsilon: float, delta: float, seed: int) -> Released:
    """A head and weights by private popularity, sweeps by the round, and user vectors by the clients."""
    head, counts, z, key = _head(split, setting, epsilon, delta, seed)
    weights = None
    if setting["frequency_exponent"]:
        least = max(1.0, counts.noise_stddev)
        weights = frequency_weights(counts.counts, exponent=setting["frequency_exponent"], least=least)
    weights = head_weights(head, split.num_items, weights=weights)
    solve = UserSolve(setting["l2"], setting["unobserved_weight"])
    same = ("dim", "l2", "l2_items", "unobserved_weight", "max_user_norm", "max_items_per_user")
    algorithm = dpals(
        split.num_items,
        cohort_size=split.num_users,
        item_weights=weights,
        shares=Shares(*setting["shares"]),
        **{name: setting[name] for name in same},
    )
    num_sweeps, clients = setting["num_sweeps"], client_data(split)
    links = user_level_dp(l2_clip_norm=1.0, noise_multiplier=z * math.sqrt(num_sweeps))
    rounds = make_rounds(algorithm, links, full_participation(split.num_users), clients, span_size=num_sweeps)
    init_key, *keys = jax.random.split(key, 4)
    state, _, _ = rounds.run(*rounds.init(init_key), RoundKeys(*keys), num_sweeps)
    ledger = Ledger().record(counts.dp_event, phase="popularity", released="noised item counts")
    ledger = rounds.charge(ledger, first_round=0, num_rounds=num_sweeps)
    items = state.shared.tables["item"]
    outside = np.where(np.isin(np.arange(split.num_items), head), 0.0, -np.inf).astype(np.float32)
    scorers = {}
    for recency in (math.inf, setting["recency"]):
        vectors = user_vectors(state.shared, clients, solve._replace(recency=recency))
        scorers[recency] = factor_scorer(vectors, items, item_bias=outside)
    return Released(scorers, ledger)


def _head(split, setting, epsilon, delta, seed) -> tuple[np.ndarray, DpPopularity, float, jax.Array]:
    """Head items, the counts behind them, the noise multiplier left for the rest, and a key for the rest."""
    # A little more than exactly enough: what the parts spend together must not pass epsilon by a rounding error.
    z = 0.0 if math.isinf(epsilon) else dp_accounting.get_sigma_gaussian(epsilon, delta) * (1 + 1e-9)
    share = setting["head_share"]
    count_key, key = jax.random.split(jax.random.key(seed))
    counts = dp_popularity(split.train, noise_multiplier=z / math.sqrt(share), key=count_key)
    head = np.sort(np.argsort(-np.asarray(counts.counts), kind="stable")[: setting["num_head"]])
    return head, counts, z / math.sqrt(1 - share), key


def main(argv: list[str] | None = None) -> int:
    """Releases and evaluates once; prints JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=DP_EASE)
    parser.add_argument("--data-dir", type=Path, help="folder with ml-100k/ or ml-1m/ (default: FEDJAX_REC_DATA)")
    parser.add_argument("--epsilon", type=int, action="append", choices=DP_EASE["movielens/1m"])
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--seed", type=int, action="append")
    args = parser.parse_args(argv)
    split = leave_one_out(load(args.data, data_dir=args.data_dir))
    for epsilon in args.epsilon or DP_EASE[args.data]:
        for seed in args.seed or (1,):
            budget = {"epsilon": epsilon, "delta": args.delta, "seed": seed}
            for name, released in {
                "DP popularity": released_popularity(split, **budget),
                "DP-EASE": released_dp_ease(split, DP_EASE[args.data][epsilon], **budget),
                "DPALS": released_dpals(split, DPALS[args.data][epsilon], **budget),
            }.items():
                for recency, scorer in released.scorers.items():
                    line = {"data": args.data, "method": name, "recency": recency, **budget}
                    line["epsilon spent"] = released.ledger.spent(args.delta).epsilon
                    for part in ("validation", "test"):
                        values = evaluate(scorer, cases(split, part), ks=(10,)).values
                        line |= {f"{part} {metric}": round(values[metric], 4) for metric in ("hit@10", "ndcg@10")}
                    print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
