"""Membership inference on trained recommenders, with and without DP, below the ceiling that DP puts on it.

    python -m experiments membership --data-dir ~/data/ml-100k

Minutes on two CPU cores. Appends to experiments/results/membership.jsonl; makes membership.md and .svg of it.

MovieLens 100K, implicit feedback. Each of several models is trained on random halves of 85 % of the users, and attacked
with the others as its shadows. Released and attacked are: EASE's item-to-item weights; the item table of matrix
factorisation trained by FedSGD, after few rounds and after many; and the normalised item-item Gram matrix, one release.
"""

import argparse
import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from dp_accounting import get_sigma_gaussian
from matplotlib.figure import Figure

from fedjax_rec.algorithms.fedavg import fedsgd
from fedjax_rec.attacks.membership import (
    LEVELS,
    attack_levels,
    ceiling_for,
    measure_factors,
    record_of,
    summary,
)
from fedjax_rec.attacks.roc import Roc
from fedjax_rec.attacks.scores import ATTACKS
from fedjax_rec.attacks.shadow_models import MEMBER_SHARE, Design, only_train, toss_coins, train_models
from fedjax_rec.attacks.signals import Signals, item_to_item_scores, measured
from fedjax_rec.data import Interactions, load
from fedjax_rec.data.clients import client_data
from fedjax_rec.data.negatives import Negatives
from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.round import make_rounds
from fedjax_rec.federated.transforms import chain
from fedjax_rec.models.ease import weights_from_gram
from fedjax_rec.models.matrix_factorization import matrix_factorization
from fedjax_rec.privacy.mechanisms import user_level_dp
from fedjax_rec.reporting import Table, to_markdown
from fedjax_rec.reporting.style import BLUE, GREEN, MUTED, STYLE, VERMILION, name_axes, new_figure, to_svg
from fedjax_rec.runs.stamp import stamp

RESULTS = Path(__file__).parent / "results"
DELTA, EPSILONS = 5e-4, (8.0, 2.0)
DIM, SERVER_LR, PRIVATE_LR, NUM_NEGATIVES = 16, 0.1, 30.0, 1
CLIP_NORM = 0.02
EARLY, LATE, PRIVATE_ROUNDS = 5, 60, 10
EASE_L2 = 300.0

GRID = np.geomspace(1e-3, 1, 61)  # false positive rates of the figure


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all rows share."""

    train: Interactions
    design: Design
    rounds: tuple[int, int, int]  # early, late, private
    seed: int


def main(argv: list[str] | None = None) -> int:
    """Runs the rows, writes the files, prints the page; 1 if an attack passes its ceiling."""
    parser = argparse.ArgumentParser(prog="python -m experiments membership", description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="folder with ml-100k/ (default: FEDJAX_REC_DATA)")
    parser.add_argument("--models", type=int, default=8, help="models a row; each is the target once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", action="append", choices=PARTS, help="run only this one; may be repeated")
    parser.add_argument("--smoke", action="store_true", help="seconds, on made-up data; writes nothing")
    parser.add_argument("--only-page", action="store_true", help="run nothing, write the page from the kept lines")
    args = parser.parse_args(argv)
    if args.smoke:
        train, num_models, rounds = load("synthetic", num_users=60, num_items=60, min_per_user=10), 4, (1, 2, 1)
    else:
        train, num_models = load("movielens/100k", data_dir=args.data_dir), args.models
        rounds = (EARLY, LATE, PRIVATE_ROUNDS)
    setting = Setting(train, toss_coins(train, num_models=num_models, seed=args.seed), rounds, args.seed)
    made = stamp(seed=args.seed, data_fingerprint=train.fingerprint)
    settings = f"{num_models} models, seed {args.seed}, data {train.fingerprint[:16]}"
    file, lines = RESULTS / "membership.jsonl", []
    if file.exists() and not args.smoke:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for part in () if args.only_page else args.part or PARTS:
        start = time.perf_counter()
        for name, privacy, signals in PARTS[part](setting):  # each yields rows as they are done
            curves = attack_levels(signals, setting.design, train)
            line = {"row": name, "settings": settings, **summary(curves, privacy), "curves": figure_curves(curves)}
            line |= {"seconds": time.perf_counter() - start, "stamp": made}
            lines.append(json.loads(json.dumps(line)))  # as it will be read back
            if not args.smoke:
                RESULTS.mkdir(exist_ok=True)
                with open(file, "a", encoding="utf-8") as kept:
                    kept.write(json.dumps(line) + "\n")
            print(f"{name}, {line['seconds']:.0f} s: AUC {line['auc']:.3f} by {line['attack']}", flush=True)
            start = time.perf_counter()
    newest = {line["row"]: line for line in lines if line["settings"] == settings}
    order = [*(name for name in ROWS if name in newest), *(name for name in newest if name not in ROWS)]
    lines = [newest[name] for name in order]
    page, picture = write_page(lines, setting), to_svg(draw(lines))
    if not args.smoke:
        (RESULTS / "membership.md").write_text(page, encoding="utf-8")
        (RESULTS / "membership.svg").write_text(picture, encoding="utf-8")
    print(page)
    return int(any(line["bug"] for line in lines))


def guarantee(epsilon: float) -> dict[str, Any]:
    """The statement of a row whose noise is calibrated to epsilon: Gaussian releases, everyone in each."""
    return {
        "epsilon": epsilon,
        "delta": DELTA,
        "unit": "user",
        "relation": "add_or_remove_one",
        "sampler": "all",
        "gaussian": True,
    }


def member_tables(setting: Setting):
    """float32 ``[users, items]`` of 0 and 1 for each model: what it was trained on."""
    train = setting.train
    for keep in setting.design.rows:
        table = np.zeros((train.num_users, train.num_items), np.float32)
        table[train.user_ids[keep], train.item_ids[keep]] = 1.0
        yield table


def ease_rows(setting: Setting):
    """EASE, a closed form."""
    measure = jax.jit(_measure_item_to_item)
    record = record_of(setting.train, setting.design)
    found = [measure(weights_from_gram(x.T @ x, l2=EASE_L2), record) for x in member_tables(setting)]
    yield "EASE", None, stacked(found)


def _measure_item_to_item(weights, record) -> Signals:
    core, user_ids, item_ids = record
    return measured(item_to_item_scores(weights, core), core, user_ids, item_ids)


def gram_rows(setting: Setting):
    """The sum over users of x x^T / |x|^2, upper triangle: adding a user moves it by 1 at most, in L2 norm."""
    measure, record = jax.jit(_measure_gram), record_of(setting.train, setting.design)
    grams = []
    for x in member_tables(setting):
        x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1.0)
        grams.append(x.T @ x)
    for epsilon in (None, *EPSILONS):
        rng = np.random.default_rng([setting.seed, 1 if epsilon is None else round(1000 * epsilon)])
        stddev = 0.0 if epsilon is None else get_sigma_gaussian(epsilon, DELTA)
        found = []
        for gram in grams:
            noise = np.triu(rng.normal(size=gram.shape))
            released = gram + stddev * (noise + np.triu(noise, 1).T)
            found.append(measure(released.astype(np.float32), record))
        yield row_name("Gram matrix", epsilon), None if epsilon is None else guarantee(epsilon), stacked(found)


def _measure_gram(gram, record) -> Signals:
    """How much of a record's own x x^T / |x|^2 is in the matrix, and the share of one item in that."""
    core, user_ids, item_ids = record
    x = core.astype(jnp.float32)
    size = jnp.maximum(x.sum(1), 1.0)
    scores = jnp.matmul(x, gram, precision="highest") / size[:, None]
    return Signals(jnp.sum(scores * x, 1), scores[user_ids, item_ids])


def factor_rows(setting: Setting):
    """Matrix factorisation by FedSGD: user vectors stay private, the item table is released."""
    early, late, _ = setting.rounds
    without = train_factors(setting, chain(), (early, late), key=jax.random.key(setting.seed))
    yield f"MF, {early} rounds", None, without[early]
    yield f"MF, {late} rounds", None, without[late]


def private_factor_rows(setting: Setting):
    """The same with clipped updates and noise."""
    private_rounds = setting.rounds[2]
    for epsilon in EPSILONS:
        noise = get_sigma_gaussian(epsilon, DELTA) * math.sqrt(private_rounds)
        transforms = user_level_dp(l2_clip_norm=CLIP_NORM, noise_multiplier=noise)
        key = jax.random.key(round(1000 * epsilon) + setting.seed)
        found = train_factors(setting, transforms, (private_rounds,), key=key)
        yield row_name(f"MF, {private_rounds} rounds", epsilon), guarantee(epsilon), found[private_rounds]


def train_factors(setting: Setting, transforms, num_rounds: tuple[int, ...], *, key) -> dict[int, Signals]:
    """All models of the design through the real round."""
    train = setting.train
    clients = client_data(only_train(train), num_buckets=2 if train.num_users < 100 else 5)
    algorithm = fedsgd(
        matrix_factorization(train.num_items, dim=DIM),
        server_optimizer=optax.adam(SERVER_LR),
        negatives=Negatives(NUM_NEGATIVES),
        private_optimizer=optax.sgd(PRIVATE_LR),
    )
    everyone = full_participation(train.num_users)
    sampler = everyone._replace(expected_size=everyone.expected_size * MEMBER_SHARE)
    rounds = make_rounds(algorithm, transforms, sampler, clients, span_size=50)
    return train_models(
        rounds,
        clients,
        train,
        setting.design,
        measure=measure_factors,
        record=record_of(train, setting.design),
        num_rounds=num_rounds,
        span_size=50,
        key=key,
    )


def stacked(found: list[Signals]) -> Signals:
    """Signals of all models, with a leading axis."""
    return jax.tree.map(lambda *parts: np.stack([np.asarray(part) for part in parts]), *found)


def row_name(what: str, epsilon: float | None) -> str:
    """A row's name says its epsilon; the table says the rest."""
    return what if epsilon is None else f"{what}, ε = {epsilon:g}"


def make_table(lines: list[dict], level: str) -> Table:
    """Areas of every attack, low false positive rates of the strongest, and what the guarantee leaves."""
    rows = []
    for line in lines:
        found = line["levels"][level]
        best, ceiling = found["attacks"][found["strongest"]], found["ceiling"] or {}
        rows.append(
            (
                line["row"].split(", ε")[0],
                line["privacy"]["epsilon"] if line["privacy"] else None,
                *(found["attacks"][name]["auc"] for name in ATTACKS),
                best["auc_error"],
                ceiling.get("auc"),
                best["tpr@0.001"],
                best["tpr@0.01"],
                ceiling.get("tpr@0.01"),
            )
        )
    counts = lines[0]["levels"][level]
    return Table(
        columns=(
            "released", "epsilon", *(f"AUC {name}" for name in ATTACKS), "standard error", "ceiling of AUC",
            "TPR at 0.1 % FPR", "TPR at 1 % FPR", "ceiling at 1 %",
        ),
        rows=rows,
        caption=f"{level}-level membership: {counts['num_members']:,} members and {counts['num_others']:,} others.",
        notes=(
            f"Epsilon: user-level, add/remove one, all clients in every round, δ = {DELTA:g}. A gap: no privacy and no "
            "ceiling.",
            "Standard error and TPR are those of the attack with the largest AUC of the row.",
        ),
    )  # fmt: skip


def status(lines: list[dict]) -> str:
    """Whether the attacks have power, and whether any passes its ceiling."""
    bugs = [line["row"] for line in lines if line["bug"]]
    best = {level: max(_best(line, level) for line in lines if not line["privacy"]) for level in LEVELS}
    private = {level: max(_best(line, level) for line in lines if line["privacy"]) for level in LEVELS}
    power = ", ".join(f"{best[level]:.3f} {level}-level" for level in LEVELS)
    left = ", ".join(f"{private[level]:.3f} {level}-level" for level in LEVELS)
    if bugs:
        return f"BUG: an attack passes its ceiling on {'; '.join(bugs)}."
    return (
        f"as it should be. Without privacy attacks reach AUC {power}; under DP at most {left}, and no attack on a "
        "private row passes its ceiling by more than two standard errors."
    )


def early_stopping(lines: list[dict]) -> str:
    """What stopping after a few rounds leaves of the attack, in a sentence."""
    found = {line["row"]: line for line in lines}
    early, late = (found.get(f"MF, {rounds} rounds") for rounds in (EARLY, LATE))
    if not (early and late):
        return ""
    figures = [f"{level}-level {_best(late, level):.3f} becomes {_best(early, level):.3f}" for level in LEVELS]
    return (
        f"Stopping MF after {EARLY} rounds instead of {LATE} weakens the attack ({', '.join(figures)}) and is no "
        "guarantee: a loss threshold alone would have made it look like one "
        f"({early['levels']['user']['attacks']['loss']['auc']:.3f}).\n\n"
    )


def _best(line: dict, level: str) -> float:
    return max(found["auc"] for found in line["levels"][level]["attacks"].values())


def figure_curves(curves: dict[str, dict[str, Roc]]) -> dict[str, list[float]]:
    """True positive rates of the strongest attack of each level, at `GRID`."""
    best = {level: max(found.values(), key=lambda curve: curve.auc) for level, found in curves.items()}
    return {level: np.interp(GRID, curve.fpr, curve.tpr).round(5).tolist() for level, curve in best.items()}


def draw(lines: list[dict]) -> Figure:
    """Curves of the strongest attacks at both levels, on logarithmic axes, with the ceilings of the private rows."""
    ticks = [1e-3, 1e-2, 1e-1, 1]
    with matplotlib.rc_context(STYLE):
        figure, panels = new_figure(num_panels=2, label_share=0.16)
        for axes, level in zip(panels, LEVELS, strict=True):
            for line in lines:
                colour = next(look for name, look in COLOURS.items() if line["row"].startswith(name))
                dashes = DASHES[line["privacy"]["epsilon"] if line["privacy"] else None]
                faint = {"alpha": 0.45} if line["row"].endswith(f" {EARLY} rounds") else {}
                axes.plot(GRID, line["curves"][level], color=colour, linestyle=dashes, label=line["row"], **faint)
            for epsilon in EPSILONS:
                ceiling, name = ceiling_for(guarantee(epsilon), level), f"ceiling, ε = {epsilon:g}"
                look = {"color": VERMILION, "linestyle": DASHES[epsilon], "linewidth": 1.2}
                axes.plot(GRID, ceiling.tpr(GRID), label=name, **look)
            axes.plot(GRID, GRID, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)))
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_ylim(1e-3, 1.1)
            axes.set_xticks(ticks, ["0.1 %", "1 %", "10 %", "100 %"])
            axes.set_yticks(ticks, ["0.1 %", "1 %", "10 %", "100 %"])
            name_axes(axes, x="false positive rate", y=f"true positive rate, {level}-level")
        panels[-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    return figure


def write_page(lines: list[dict], setting: Setting) -> str:
    """The page: status, what was done, tables, figure, and what made it."""
    made = lines[-1]["stamp"]
    commits = sorted({(line["stamp"]["commit"] or "none")[:12] for line in lines})
    tables = "\n".join(to_markdown(make_table(lines, level)) for level in LEVELS)
    return (
        f"# Membership inference\n\nStatus: {status(lines)}\n\n{early_stopping(lines)}{ABOUT}\n\n{tables}\n"
        "![ROC curves and ceilings](membership.svg)\n\n"
        f"Written by `python -m experiments membership`; {setting.train.name}, data sha256 "
        f"{made['data_fingerprint'][:16]}, {len(setting.design.users)} models a row, seed {setting.seed}, "
        f"commits {', '.join(commits)}, {made['device_kind']}.\n"
    )


ABOUT = f"""An attacker holds a candidate's record and what the server releases, and asks whether the record was in
training. Every model is trained on its own coins: a user is in with probability 1/2, and each of a fifth of the
interactions of a user who is in with probability 1/2; a tenth of the interactions and 15 % of the users are in no
training. Each model is the target once, with all others as its shadows (loss attack, LiRA, RMIA).

The non-private rows show that the attacks have power: a private row alone would only say that its attack is weak.
Ceilings are those of Gaussian differential privacy for everyone in every round (Dong, Roth and Su, 2022), for a user
who is in or out. An interaction is in or out while its user is in: the record is replaced by another one, which is two
such steps, so its ceiling is that of twice the mu.

EASE has l2 = {EASE_L2:g}. MF: dim {DIM}, FedSGD with Adam at {SERVER_LR:g}, {NUM_NEGATIVES} negative for each positive,
no regularisation; under DP with clip norm {CLIP_NORM:g} and {PRIVATE_ROUNDS} rounds. Gram matrix: the sum over users of
x xᵀ/|x|², one release."""

PARTS = {"ease": ease_rows, "gram": gram_rows, "mf": factor_rows, "private-mf": private_factor_rows}
ROWS = (
    "EASE",
    "Gram matrix",
    *(row_name("Gram matrix", epsilon) for epsilon in EPSILONS),
    f"MF, {EARLY} rounds",
    f"MF, {LATE} rounds",
    *(row_name(f"MF, {PRIVATE_ROUNDS} rounds", epsilon) for epsilon in EPSILONS),
)
COLOURS = {"EASE": MUTED, "Gram": GREEN, "MF": BLUE}
DASHES = {None: "-", 8.0: "--", 2.0: ":"}

if __name__ == "__main__":
    sys.exit(main())
