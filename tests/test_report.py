"""The report of a run: self-contained, safe against hostile names, honest about what is missing."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from fedjax_rec.reporting import plots, style
from fedjax_rec.reporting.html import write_report
from fedjax_rec.reporting.run_files import read_run

PRIVACY = {
    "epsilon": 7.9812,
    "delta": 1e-4,
    "unit": "user",
    "relation": "add_remove_one",
    "sampler": "poisson",
    "accountant": "PLD",
    "trust_model": "central",
    "noise_multiplier": 1.0432,
    "l2_clip_norm": 0.5,
    "sampling_prob": 0.0997,
    "rounds": 300,
}


def made_up_run(*, private: bool = True, name: str = "movielens/100k") -> dict[str, object]:
    """The contents of a run's files, with plausible curves drawn from a formula."""
    rng = np.random.default_rng(0)
    rounds = np.arange(1, 301)
    quality = 0.082 * (1 - np.exp(-rounds / 60)) + rng.normal(0, 0.0006, rounds.size)
    metrics = [
        {
            "round": int(number),
            "seconds": round(0.11 * int(number), 3),
            "loss": float(0.40 + 0.29 * np.exp(-number / 50) + rng.normal(0, 0.004)),
            "rounds_per_s": 9.1,
            "epsilon": float(7.9812 * (0.12 + 0.88 * np.sqrt(number / 300))) if private else None,
            "validation": {"ndcg@10": float(quality[number - 1]), "hit@10": 0.15} if number % 10 == 0 else None,
        }
        for number in rounds
    ]
    per_user = np.where(rng.random(943) < 0.82, 0.0, rng.choice(1 / np.log2(np.arange(2, 12)), 943))
    counts, edges = np.histogram(per_user, bins=20, range=(0, 1))
    tail = np.concatenate([[0.0], np.cumsum(np.arange(1, 101) ** -1.4)])
    data_tail = np.concatenate([[0.0], np.cumsum(np.arange(1, 101) ** -0.9)])
    config = {
        "dataset": name,
        "algorithm": "fedmf",
        "rounds": 300,
        "cohort": {"sampler": "poisson", "size": 94},
        "model": {"dim": 16, "loss": "bpr"},
        "client": {"learning_rate": 0.1, "local_epochs": 1, "batch_size": 64},
        "privacy": {"epsilon": 8.0, "delta": 1e-4, "l2_clip_norm": 0.5} if private else None,
        "seed": 0,
    }
    ledger = {
        "trust_model": "central",
        "delta": 1e-4,
        "unit": "user",
        "relation": "add_remove_one",
        "entries": [
            {
                "phase": "popularity",
                "event": "Gaussian(noise_multiplier 12.0)",
                "count": 1,
                "unit": "user",
                "relation": "add_remove_one",
                "sampler": "all",
                "released": "item counts, clipped per user",
            },
            {
                "phase": "training",
                "event": {
                    "name": "PoissonSampledDpEvent",
                    "sampling_probability": 0.0997,
                    "event": {"name": "GaussianDpEvent", "noise_multiplier": 1.0432},
                },
                "count": 300,
                "unit": "user",
                "relation": "add_remove_one",
                "sampler": "poisson",
                "released": "the shared item table and biases after every round",
            },
        ],
    }
    result = {
        "algorithm": "fedmf",
        "test": {"ndcg@10": 0.0812, "hit@10": 0.1569, "recall@20": 0.2344, "coverage@10": 0.2117, "mrr": 0.0711},
        "interval": {"ndcg@10": [0.0704, 0.0923]},
        "baselines": {
            "popularity": {"ndcg@10": 0.0567, "hit@10": 0.1103, "recall@20": 0.1803, "coverage@10": 0.0541, "mrr": 0.0502},
            "non_private": {"ndcg@10": 0.0914, "hit@10": 0.1761, "recall@20": 0.267, "coverage@10": 0.2913, "mrr": 0.0786},
        },
        "privacy": PRIVACY if private else None,
        "per_user": {
            "ndcg@10": {
                "mean": float(per_user.mean()),
                "p10": float(np.percentile(per_user, 10)),
                "p50": float(np.percentile(per_user, 50)),
                "p90": float(np.percentile(per_user, 90)),
                "worst_decile_mean": 0.0,
                "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
            }
        },
        "exposure": {
            "cumulative_share": (tail / tail[-1]).tolist(),
            "interactions_cumulative_share": (data_tail / data_tail[-1]).tolist(),
            "coverage@10": 0.2117,
        },
        "cost": {
            "uplink_bytes_per_client_round": 12_380.0,
            "downlink_bytes_per_client_round": 12_380.0,
            "uplink_bytes_total": 349_000_000,
            "clients_per_s": 861.4,
            "padding_waste": 0.1834,
            "compile_s": 2.31,
            "rounds_per_s": 9.13,
        },
        "groups": {
            "activity quartile": {"1 (fewest)": 0.0904, "2": 0.0855, "3": 0.0790, "4 (most)": 0.0701},
            "gender": {"F": 0.0768, "M": 0.0830},
        },
        "warnings": [],
        "dataset": {"name": name, "num_users": 943, "num_items": 1682, "num_interactions": 100_000, "fingerprint": "ab" * 32},
        "split": {"rule": "leave_one_out", "tie_rule": "hash", "seed": 0, "fingerprint": "3f9c0d" * 10},
        "best_round": 290,
        "rounds": 300,
        "seconds": 36.2,
        "stamp": {
            "commit": "0123456789abcdef0123456789abcdef01234567",
            "dirty": False,
            "versions": {"python": "3.11.7", "jax": "0.10.2", "numpy": "2.4.6"},
            "device_kind": "cpu",
            "device_count": 1,
            "seed": 0,
            "data_fingerprint": "ab" * 32,
            "utc_time": "2026-01-02T03:04:05+00:00",
        },
    }
    if private:
        result["baselines"]["dp_popularity"] = {
            **{"ndcg@10": 0.0561, "hit@10": 0.1092, "recall@20": 0.1791, "coverage@10": 0.0559, "mrr": 0.0497},
            "privacy": {"epsilon": 0.371, "delta": 1e-4, "unit": "user", "relation": "add_remove_one", "sampler": "all"},
        }
        result["warnings"].append("delta = 1e-4 is larger than 1/(10 users) = 1.06e-4 would allow: choose 1e-5.")
    else:
        ledger["entries"] = []
        del result["baselines"]["non_private"]
    return {"config.json": config, "metrics.jsonl": metrics, "ledger.json": ledger, "result.json": result}


def write_run(folder: Path, files: dict[str, object]) -> Path:
    """Write a run directory."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = "".join(json.dumps(row) + "\n" for row in content) if name.endswith("l") else json.dumps(content)
        (folder / name).write_text(text, encoding="utf-8")
    return folder
