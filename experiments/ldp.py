"""PFedRec's table of "local differential privacy", and beside it the same model with an epsilon that holds.

The published rows add Laplace noise of scale b to the item table that each client uploads. Nothing bounds what a client
uploads, so no epsilon exists at any b. The noise also vanishes: the server takes the mean of n uploads, whose noise has
standard deviation b sqrt(2 / n), and each client is scored with its own copy, which was never noised. That metrics stay
put as b grows therefore shows nothing about privacy. The page's second table gives that standard deviation, for the
published data set's n and for ours.

The rows with an epsilon clip each client's whole update and add Gaussian noise to the sum, once a round (DP-FedAvg,
McMahan et al., 2018, "Learning Differentially Private Recurrent Language Models"). The clip norm was chosen by the
validation items, at epsilon 8 under strict negatives, and is the same in all of these rows (`--tune` repeats it); no
epsilon covers that choice, nor that of the reported round.

Published values are of Zhang et al. (2023), "Dual Personalization on Federated Recommendation", as others quote them,
on MovieLens 1M; these runs are on MovieLens 100K, so the two stand side by side for orientation. The authors' release
has no noise in it; that it goes to the whole uploaded table, and to no scored one, is how code derived from theirs has
it.

One to four minutes a row and seed on two CPU cores that other work shared. Times on a GPU were not measured.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from functools import cache, partial

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness
from experiments.harness import Options, Published, Row, Study
from experiments.pfedrec import SMOKE_ROUNDS, build_pfedrec, measured, trained_once
from experiments.ranked import ml_100k, sampled, train_and_rank
from fedjax_rec.data import Interactions
from fedjax_rec.data.clients import client_data
from fedjax_rec.evaluation import cases, constant_scorer
from fedjax_rec.evaluation.on_client import evaluate_on_clients, question, ranked_on_clients
from fedjax_rec.evaluation.protocol import PFEDREC_PAPER, STRICT_99
from fedjax_rec.federated.cohort import Sampler, full_participation
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.rows import is_rows
from fedjax_rec.federated.transforms import UNBOUNDED, UpdateTransform, chain
from fedjax_rec.models.popularity import dp_popularity, popularity_scorer
from fedjax_rec.privacy import Ledger, calibrate_noise_multiplier
from fedjax_rec.privacy.mechanisms import user_level_dp
from fedjax_rec.reporting import Table, to_markdown
from fedjax_rec.reporting.formatting import MISSING
from fedjax_rec.reporting.statements import epsilon_label

COLUMNS = {"paper": PFEDREC_PAPER, "strict": STRICT_99}
METRICS = tuple(f"{metric} {column}" for column in COLUMNS for metric in ("HR@10", "NDCG@10"))
NUM_ROUNDS = 100
NUM_CLIENTS_ML_1M = 6040
# HR@10 and NDCG@10 by the scale of the noise.
PUBLISHED = {
    0.0: (73.26, 44.36),
    0.1: (73.13, 44.16),
    0.2: (73.05, 44.25),
    0.3: (73.18, 44.23),
    0.4: (73.08, 44.18),
    0.5: (73.08, 44.18),
}
EPSILONS = (8.0, 4.0, 1.0)
DELTA = 1e-4
TUNED_AT = 8.0
CLIP_NORMS = (3.0, 10.0, 30.0, 100.0)  # what `--tune` compares
L2_CLIP_NORM = 30.0


def laplace_on_uploads(scale: float, num_clients: int) -> UpdateTransform:
    """The published "LDP": every client adds Laplace(0, scale) to each entry of each item table that it uploads.

    Guarantee: none. No link bounds an update, so this one declares no event, and none of its outputs has an epsilon.

    Noise on rows that a client did not touch would make its update a whole table, though only the sum of the noise is
    ever seen: clients are scored with their clean copies. So the sum is drawn at once. A Laplace number is the
    difference of two exponential ones, hence a sum of n is scale * (G - H) with G and H from Gamma(n, 1), exactly.

    Args:
      scale: of one client's noise; its standard deviation is sqrt(2) times that.
      num_clients: uploads in a round, n; all clients must take part.
    """

    def server(total, state, key):
        def noised(index, table):
            plus, minus = (jax.random.fold_in(jax.random.fold_in(key, index), sign) for sign in (0, 1))
            draws = (jax.random.gamma(k, float(num_clients), table.shape) for k in (plus, minus))
            return table + scale * jnp.subtract(*draws)

        tables = {name: noised(index, total.tables[name]) for index, name in enumerate(sorted(total.tables))}
        return total._replace(tables=tables), state

    def upload(wire, update):
        """A noised table has no untouched rows: all of it is sent, and no ids."""
        rows = [leaf for leaf in jax.tree.leaves(update, is_leaf=is_rows) if is_rows(leaf)]
        more = sum((leaf.num_rows - leaf.ids.size) * leaf.values.shape[-1] for leaf in rows)
        return wire._replace(numbers=wire.numbers + more, side_bits=0.0)

    return UpdateTransform(server=server, upload=upload)


@cache
def noise_for(epsilon: float, num_rounds: int) -> float:
    """The noise multiplier of a Gaussian mechanism that is released ``num_rounds`` times; user-level, `DELTA`."""

    def run_event(noise_multiplier):
        return dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(noise_multiplier), num_rounds)

    return calibrate_noise_multiplier(run_event, target_epsilon=epsilon, delta=DELTA).noise_multiplier


def spent(transforms: UpdateTransform, sampler: Sampler, num_rounds: int) -> dict | None:
    """The whole privacy statement of a training run, or None if its chain claims nothing."""
    event = transforms.dp_event(UNBOUNDED, 0)
    if event is None:
        return None
    ledger = Ledger(relation=sampler.relation).record(
        sampler.dp_event(event), phase="training", released="server states", sampler=sampler.name, count=num_rounds
    )
    found = ledger.spent(DELTA)
    return {
        "epsilon": found.epsilon if math.isfinite(found.epsilon) else "inf",
        "delta": found.delta,
        "unit": found.unit,
        "relation": found.relation,
        "sampler": sampler.name,
    }


def laplace(scale: float, num_clients: int, num_rounds: int) -> UpdateTransform:
    """The chain of a published row; without noise it is empty."""
    del num_rounds
    return laplace_on_uploads(scale, num_clients) if scale else chain()


def private(epsilon: float | None, num_clients: int, num_rounds: int) -> UpdateTransform:
    """The chain of a row with an epsilon; None clips and adds nothing."""
    del num_clients
    noise_multiplier = 0.0 if epsilon is None else noise_for(epsilon, num_rounds)
    return user_level_dp(l2_clip_norm=L2_CLIP_NORM, noise_multiplier=noise_multiplier)


def trained(make_chain, seed: int, options: Options) -> dict:
    """PFedRec under a chain, once with the paper's negatives and once with strict ones: two runs, two releases."""
    interactions = ml_100k(options.data_dir, smoke=options.smoke)
    num_rounds, num_buckets = (SMOKE_ROUNDS, 1) if options.smoke else (NUM_ROUNDS, 5)
    transforms = make_chain(interactions.num_users, num_rounds)
    found = {}
    for exclusion in ("paper", "strict"):
        protocols = [protocol for protocol in COLUMNS.values() if protocol.exclusion == exclusion]
        found |= train_and_rank(
            build_pfedrec,
            interactions,
            protocols,
            seed=seed,
            num_rounds=num_rounds,
            num_buckets=num_buckets,
            transforms=transforms,
        )
    statement = spent(transforms, full_participation(interactions.num_users), num_rounds)
    return measured(found, interactions, COLUMNS) | {
        "settings": f"{num_rounds} rounds, clip norm {L2_CLIP_NORM:g}" if statement else f"{num_rounds} rounds",
        "privacy": statement,
    }


def popularity_released_once(epsilon: float, seed: int, options: Options) -> dict:
    """The floor with an epsilon: item counts, clipped to norm 1 a user and noised once."""
    noise_multiplier = noise_for(epsilon, 1)

    def scorer(train: Interactions):
        # One release: every column ranks by it, and all have the same training rows.
        key = jax.random.fold_in(jax.random.key(seed), 3)
        return constant_scorer(dp_popularity(train, noise_multiplier=noise_multiplier, key=key).counts)

    return trained_once(scorer, seed, options, columns=COLUMNS)


def statement_of(epsilon: float) -> str:
    """What stands in a row's name: the target, which the accounted epsilon does not exceed."""
    return epsilon_label(
        {"epsilon": epsilon, "delta": DELTA, "unit": "user", "relation": "add_or_remove_one", "sampler": "all"}
    )


def laplace_row(scale: float) -> Row:
    """One published row."""
    name = f"Laplace noise {scale:g} on uploads" if scale else "no noise"
    values = zip(("HR@10 paper", "NDCG@10 paper"), PUBLISHED[scale], strict=True)
    published = {metric: Published(value, None, "digest") for metric, value in values}
    return Row(name, partial(trained, partial(laplace, scale)), published)


STUDY = Study(
    name="ldp",
    title='PFedRec with "local differential privacy", and with an epsilon',
    about=(
        "HR@10 and NDCG@10 in percent against 99 negatives, MovieLens 100K, 100 rounds, all clients in each; columns "
        '"paper" never draw held-out items as training negatives, columns "strict" do. Published values are of '
        "MovieLens 1M and stand here for orientation, without a tolerance. The rows with Laplace noise protect "
        "nothing: what a client uploads is not bounded, so no ε exists for them, and the mean over clients takes the "
        "noise away. "
        f"The rows with an ε clip each client's update to an L2 norm of {L2_CLIP_NORM:g}, chosen by validation, add "
        "Gaussian noise to the sum, and state what the sequence of the server's states reveals; ε covers neither the "
        "choice of the clip norm, nor that of the reported round, nor the metrics shown. The two columns are two "
        "trainings, and rows are alternatives: their ε do not add up to anything that was released together. "
        "A client is scored with its own score function and the item table that it has just trained on its own data, "
        "without noise: that never leaves the client, so the ε of the server's states holds, but what is scored is not "
        "a server's state. Trust model: central."
    ),
    rows=(
        Row("popularity", partial(trained_once, popularity_scorer, columns=COLUMNS)),
        *(
            Row(f"popularity released once, {statement_of(epsilon)}", partial(popularity_released_once, epsilon))
            for epsilon in EPSILONS
        ),
        *(laplace_row(scale) for scale in PUBLISHED),
        Row("clipped, no noise", partial(trained, partial(private, None))),
        *(
            Row(f"clipped, Gaussian noise, {statement_of(epsilon)}", partial(trained, partial(private, epsilon)))
            for epsilon in EPSILONS
        ),
    ),
    metrics=METRICS,
)


SMOKE_ROWS = tuple(STUDY.rows[place].name for place in (1, 5, -1))


def noise_stddev(scale: float, num_clients: int, num_rounds: int = 1) -> float:
    """Standard deviation of the noise in an entry of the server's table, had training not answered to it."""
    return scale * math.sqrt(2 * num_rounds / num_clients)


def trend(lines: Sequence[dict], num_clients: int) -> Table:
    """How metrics move from no noise to each strength, published and measured, beside the noise that is left.

    Args:
      lines: kept runs.
      num_clients: of the measured data set.
    """
    values = {}
    for scale in PUBLISHED:
        runs = harness.newest(lines, laplace_row(scale).name)
        for metric in METRICS:
            values[scale, metric] = 100 * np.mean([run["values"][metric] for run in runs]) if runs else math.nan
    rows = []
    for scale, (hit, ndcg) in PUBLISHED.items():
        cells = [f"{noise_stddev(scale, n, t):.4f}" for n in (NUM_CLIENTS_ML_1M, num_clients) for t in (1, NUM_ROUNDS)]
        moved = [hit - PUBLISHED[0.0][0], ndcg - PUBLISHED[0.0][1]]
        moved += [values[scale, metric] - values[0.0, metric] for metric in METRICS]
        rows.append((f"{scale:g}", *cells, *(MISSING if math.isnan(x) else f"{x:+.2f}" for x in moved)))
    heads = [f"noise left, n = {n}, {t}" for n in (NUM_CLIENTS_ML_1M, num_clients) for t in ("1 round", "all rounds")]
    changes = ["HR@10, published (n = 6040)", "NDCG@10, published (n = 6040)", *METRICS]
    return Table(
        ("scale", *heads, *(f"change of {name}" for name in changes)),
        rows,
        notes=(
            "Noise left: standard deviation b sqrt(2 T / n) of the noise in one entry of the server's table after T "
            "rounds, computed; entries start with standard deviation 1. Rounds add up, as the next round starts from "
            "the noised table; training may undo some of it.",
            "Change: from the row without noise, in points; the published spread over seeds is 0.20 and 0.16.",
        ),
    )


def tune(seed: int, options: Options) -> None:
    """Prints validation HR@10 against 99 negatives for each clip norm, at one epsilon, strict negatives."""
    interactions = ml_100k(options.data_dir, smoke=options.smoke)
    num_rounds, every = (SMOKE_ROUNDS, 1) if options.smoke else (NUM_ROUNDS, 10)
    split = STRICT_99.split(interactions)
    asked = cases(split, "validation")
    clients = client_data(split, exclusion=STRICT_99.exclusion, num_buckets=1 if options.smoke else 5)
    for l2_clip_norm in CLIP_NORMS:
        algorithm, model = build_pfedrec(interactions)
        ranked = ranked_on_clients(algorithm, model.score, {"v": question(asked, num_clients=clients.num_clients)})
        transforms = user_level_dp(l2_clip_norm=l2_clip_norm, noise_multiplier=noise_for(TUNED_AT, num_rounds))
        rounds = make_rounds(ranked, transforms, full_participation(clients.num_clients), clients, span_size=every)
        init_key, *keys = jax.random.split(jax.random.key(seed), 4)
        state, own = rounds.init(init_key)
        hits = []
        for _ in range(0, num_rounds, every):
            state, own, metrics = rounds.run(state, own, RoundKeys(*keys), every)
            found = evaluate_on_clients(own["ranks"]["v"], asked, ks=STRICT_99.ks, ties=STRICT_99.ties)
            hits.append(sampled(found, STRICT_99)["hit@10"])
        clipped, norm = (float(np.asarray(metrics[name])[-1]) for name in ("clipped", "update_norm"))
        print(
            f"clip norm {l2_clip_norm:g}: validation HR@10 {max(hits):.4f} at best, {hits[-1]:.4f} last; "
            f"{clipped:.0%} of updates clipped, mean norm {norm:.3g}",
            flush=True,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the table, and adds the trend to its page; ``--tune`` compares clip norms instead."""
    argv = list(sys.argv[1:] if argv is None else argv)
    smoke = "--smoke" in argv
    if "--tune" in argv:
        tune(0, Options(None, smoke))
        return 0
    # Each kind of row once: in a smoke run all time goes into compiling.
    kinds = dataclasses.replace(STUDY, rows=[row for row in STUDY.rows if row.name in SMOKE_ROWS])
    code = harness.main(kinds if smoke else STUDY, argv)
    if not smoke:
        table = trend(harness.read_lines(STUDY.name), ml_100k(None, smoke=False).num_users)
        section = f"\n## The trend\n\n{to_markdown(table)}"
        print(section)
        with open(harness.RESULTS / f"{STUDY.name}.md", "a", encoding="utf-8") as file:
            file.write(section)
    return code
