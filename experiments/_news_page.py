"""What the lines of the study of news say: its tables and its page."""

import math
from collections.abc import Sequence

import numpy as np

from fedjax_rec.evaluation.impressions import METRICS
from fedjax_rec.reporting import Table, to_markdown
from fedjax_rec.reporting.formatting import MISSING

ROUNDS, EPSILONS = 20, (math.inf, 8.0)
RANK_METRICS = ("hit@10", "ndcg@10")
ROWS = ("popularity", "id table", "frozen encoder", "trained projection", "projection and LoRA")
PARTS = {"news": ROWS, "films": ROWS[:-1]}  # films through LoRA take minutes of a server's round on a CPU
COLUMNS = {"news": METRICS, "films": tuple(f"{part} {m}" for part in ("validation", "test") for m in RANK_METRICS)}


def make_table(part: str, lines: Sequence[dict]) -> Table:
    """One row a method and epsilon; means and standard deviations over seeds."""
    rows, deltas = [], {line["values"]["delta"] for line in lines}
    for row in PARTS[part]:
        for epsilon in EPSILONS:
            mine = [x["values"] for x in lines if (x["key"]["row"], x["key"]["epsilon"]) == (row, spelt(epsilon))]
            if not mine:
                continue
            cells = []
            for metric in COLUMNS[part]:
                values = [v[metric] for v in mine]
                spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
                cells.append(f"{np.mean(values):.4f}{spread}")
            sent = [f"{mine[0][k] / 1000:,.0f}" if k in mine[0] else MISSING for k in ("down_bytes", "up_bytes")]
            spent = "none" if mine[0]["epsilon spent"] is None else f"{max(v['epsilon spent'] for v in mine):.3f}"
            seconds = f"{np.mean([v['seconds'] for v in mine]):.0f}" if "seconds" in mine[0] else MISSING
            rows.append((row, spent, *cells, *sent, seconds, len(mine)))
    heads = ("items", "ε", *COLUMNS[part], "down, kB", "up, kB", "training, s", "seeds")
    said = f"user-level ε, add/remove one user, all clients in each of {ROUNDS} rounds, δ = {min(deltas):.2g}"
    return Table(heads, rows, caption=said)


def findings(lines: Sequence[dict]) -> str:
    """What the films say about texts against ids, seed by seed."""
    said = []
    for epsilon in EPSILONS:
        found = {}
        for line in lines:
            if line["key"]["part"] == "films" and line["key"]["epsilon"] == spelt(epsilon):
                found.setdefault(line["key"]["row"], {})[line["key"]["seed"]] = line["values"]["test ndcg@10"]
        for row in ("frozen encoder", "trained projection"):
            both = sorted(set(found.get(row, {})) & set(found.get("id table", {})))
            if both:
                gaps = [found[row][seed] - found["id table"][seed] for seed in both]
                spread = f" ± {np.std(gaps, ddof=1):.4f}" if len(gaps) > 1 else ""
                budget = "without noise" if math.isinf(epsilon) else f"at epsilon {epsilon:g}"
                said.append(f"{row} minus id table {budget} {np.mean(gaps):+.4f}{spread}")
    return "; ".join(said) or "films were not run"


def spelt(epsilon: float) -> float | str:
    """As a key of a line."""
    return "inf" if math.isinf(epsilon) else epsilon


def write_page(lines: Sequence[dict]) -> str:
    """The page."""
    by_part = {part: [line for line in lines if line["key"]["part"] == part] for part in PARTS}
    sizes = [v["encoder_bytes"] for v in (line["values"] for line in lines) if "encoder_bytes" in v]
    parts = [
        "# A text encoder that stays on the server",
        f"Status: study, nothing of a paper is claimed. Films, test ndcg@10: {findings(lines)}.",
        "The server encodes items, clients train a user tower of self-attention and send clipped gradients of it and "
        "of the item vectors, and the server carries the noised sum back through the encoder: post-processing, so a "
        "trained encoder costs no more epsilon than a frozen one. Differences are means over seeds ± their standard "
        f"deviation. Sent instead of vectors, the encoder would be {max(sizes, default=0) / 1e6:,.1f} MB a client.",
    ]
    if by_part["news"]:
        made_up = any(line["values"]["data"] == "made up" for line in by_part["news"])
        parts.append("## News")
        parts.append(
            "Made-up news in MIND's format: the figures show that the machinery works, and are not comparable to "
            "published ones. A fifth of the news is new in dev, where ids and popularity know nothing."
            if made_up
            else "MIND as read from the folder given."
        )
        parts.append(
            "Settings are those of the films, not chosen for news: rows without noise take larger steps under a larger "
            "clip norm, so where they are below their private twins, that compares settings and not privacy."
        )
        parts.append(to_markdown(make_table("news", by_part["news"])).rstrip())
    if by_part["films"]:
        splits = {line["values"]["split"][:12] for line in by_part["films"]}
        parts.append("## Films")
        parts.append(
            "MovieLens 100K, the last film of each user out and ranked among all it has not seen; titles and genres as "
            "texts. All models add the logarithm of released counts to their scores, which the same epsilon pays, and "
            "the row of popularity spends all of it on these counts. Settings were chosen on validation items, which "
            f"epsilon does not cover. Split {', '.join(sorted(splits))}."
        )
        parts.append(to_markdown(make_table("films", by_part["films"])).rstrip())
    stamps = [line["stamp"] for line in lines]
    commits = ", ".join(sorted({(s["commit"] or "none")[:12] for s in stamps}))
    devices = ", ".join(sorted({str(s["device_kind"]) for s in stamps}))
    parts.append(f"Written by `python -m experiments news`; commits {commits}, device {devices}.")
    return "\n\n".join(parts) + "\n"
