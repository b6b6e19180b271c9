"""Membership inference on trained recommenders, with and without DP, below the ceiling that DP puts on it.

    python -m experiments membership --data-dir ~/data/ml-100k

Minutes on two CPU cores. Writes experiments/results/membership.md, .jsonl and .svg.

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
from fedjax_rec.reporting.style import BLUE, GREEN, MUTED, PINK, STYLE, VERMILION, name_axes, new_figure, to_svg
from fedjax_rec.runs.stamp import stamp

RESULTS = Path(__file__).parent / "results"
DELTA, EPSILONS = 5e-4, (8.0, 2.0)
DIM, SERVER_LR, PRIVATE_LR = 16, 0.05, 10.0
CLIP_NORM = 0.02
EARLY, LATE, PRIVATE_ROUNDS = 10, 100, 20
EASE_L2 = 300.0

Curves = dict[str, dict[str, Roc]]


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
    parser.add_argument("--smoke", action="store_true", help="seconds, on made-up data; writes nothing")
    args = parser.parse_args(argv)
    if args.smoke:
        train, num_models, rounds = load("synthetic", num_users=60, num_items=60, min_per_user=10), 4, (1, 2, 1)
    else:
        train, num_models = load("movielens/100k", data_dir=args.data_dir), args.models
        rounds = (EARLY, LATE, PRIVATE_ROUNDS)
    setting = Setting(train, toss_coins(train, num_models=num_models, seed=args.seed), rounds, args.seed)
    lines, shown = [], {}
    for run in (ease_rows, gram_rows, factor_rows):
        start = time.perf_counter()
        for name, privacy, signals in run(setting):
            curves = attack_levels(signals, setting.design, train)
            shown[name] = curves, privacy
            lines.append({"row": name, **summary(curves, privacy), "seconds": time.perf_counter() - start})
            print(
                f"{name}, {lines[-1]['seconds']:.0f} s: AUC {lines[-1]['auc']:.3f} by {lines[-1]['attack']}", flush=True
            )
            start = time.perf_counter()
    made = stamp(seed=args.seed, data_fingerprint=train.fingerprint)
    page, picture = write_page(lines, setting, made), to_svg(draw(shown))
    if not args.smoke:
        RESULTS.mkdir(exist_ok=True)
        text = "".join(json.dumps(line | {"stamp": made}) + "\n" for line in lines)
        (RESULTS / "membership.jsonl").write_text(text, encoding="utf-8")
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
    early, late, private_rounds = setting.rounds
    without = train_factors(setting, chain(), (early, late), key=jax.random.key(setting.seed))
    yield f"MF, {early} rounds", None, without[early]
    yield f"MF, {late} rounds", None, without[late]
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
        negatives=Negatives(4),
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


def _best(line: dict, level: str) -> float:
    return max(found["auc"] for found in line["levels"][level]["attacks"].values())


def draw(shown: dict[str, tuple[Curves, dict | None]]) -> Figure:
    """Curves of the strongest attacks at both levels, on logarithmic axes, with the ceilings of the private rows."""
    looks = dict(zip(shown, [(MUTED, "-"), (GREEN, "-"), (GREEN, "--"), (GREEN, ":"), (PINK, "-"), (BLUE, "-"),
                             (BLUE, "--"), (BLUE, ":")], strict=True))  # fmt: skip
    grid = np.geomspace(1e-3, 1, 200)
    with matplotlib.rc_context(STYLE):
        figure, panels = new_figure(num_panels=2, label_share=0.14)
        for axes, level in zip(panels, LEVELS, strict=True):
            for name, (curves, _) in shown.items():
                best = max(curves[level].values(), key=lambda curve: curve.auc)
                colour, dashes = looks[name]
                axes.plot(grid, np.interp(grid, best.fpr, best.tpr), color=colour, linestyle=dashes, label=name)
            for epsilon, dashes in zip(EPSILONS, ("--", ":"), strict=True):
                ceiling = ceiling_for(guarantee(epsilon), level)
                name = f"ceiling, ε = {epsilon:g}"
                axes.plot(grid, ceiling.tpr(grid), color=VERMILION, linestyle=dashes, linewidth=1.2, label=name)
            axes.plot(grid, grid, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)))
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_ylim(1e-3, 1.1)
            name_axes(axes, x="false positive rate", y=f"true positive rate, {level}-level")
        panels[-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    return figure


def write_page(lines: list[dict], setting: Setting, made: dict) -> str:
    """The page: status, what was done, tables, figure, and what made it."""
    tables = "\n".join(to_markdown(make_table(lines, level)) for level in LEVELS)
    return (
        f"# Membership inference\n\nStatus: {status(lines)}\n\n{ABOUT}\n\n{tables}\n"
        "![ROC curves and ceilings](membership.svg)\n\n"
        f"Written by `python -m experiments membership`; {setting.train.name}, data sha256 "
        f"{made['data_fingerprint'][:16]}, {len(setting.design.users)} models a row, seed {setting.seed}, "
        f"commit {(made['commit'] or 'none')[:12]}, {made['device_kind']}.\n"
    )


ABOUT = f"""An attacker holds a candidate's record and what the server releases, and asks whether the record was in
training. Every model is trained on its own coins: a user is in with probability 1/2, and each of a fifth of the
interactions of a user who is in with probability 1/2; a tenth of the interactions and 15 % of the users are in no
training. Each model is the target once, with all others as its shadows (loss attack, LiRA, RMIA).

The non-private rows show that the attacks have power: a private row alone would only say that its attack is weak.
Ceilings are those of Gaussian differential privacy for everyone in every round (Dong, Roth and Su, 2022), for a user
who is in or out. An interaction is in or out while its user is in: the record is replaced by another one, which is two
such steps, so its ceiling is that of twice the mu.

EASE has l2 = {EASE_L2:g}. MF: dim {DIM}, FedSGD with Adam at {SERVER_LR:g}, no regularisation; under DP with clip norm
{CLIP_NORM:g} and {PRIVATE_ROUNDS} rounds. Gram matrix: sum over users of x xᵀ/|x|², one release."""


if __name__ == "__main__":
    sys.exit(main())
