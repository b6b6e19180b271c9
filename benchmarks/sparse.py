"""What noise costs at a million items if it goes to few rows: the server's step, the whole round, and what is learned.

    python -m benchmarks.sparse            # some 15 minutes; writes benchmarks/results/sparse.{jsonl,md}
    python -m benchmarks.sparse --part step
    python -m benchmarks.sparse --smoke    # a tiny catalogue; keeps nothing

Dense Gaussian noise on every row, against `select_rows` (rows chosen once, by a noised popularity), `adafest` (rows
chosen in every round) and noise when a row is read (`lazy_rounds`), all calibrated to one epsilon. Timed runs take
turns within one process, so that other work on the machine slows all of them alike: read the ratios, not the seconds.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedjax_rec as fr
from benchmarks.methods import population
from fedjax_rec.federated.algorithm import Algorithm
from fedjax_rec.federated.lazy_rounds import lazy_rounds
from fedjax_rec.federated.round import Rounds, _compiler_options
from fedjax_rec.federated.rows import Rows, add_to_total, zero_total
from fedjax_rec.federated.sparse_server import as_tables, divide, sparse_sgd
from fedjax_rec.privacy.adafest import adafest
from fedjax_rec.privacy.lazy_noise import apply, catch_up, flush, lazy_table
from fedjax_rec.privacy.select_rows import head_items, select_rows
from fedjax_rec.reporting import Table, to_markdown
from fedjax_rec.runs.stamp import stamp

RESULTS = Path(__file__).parent / "results"
PARTS = ("step", "round", "utility")
EPSILON, DELTA, ROUNDS, SAMPLING_PROB = 4.0, 1e-4, 30, 0.25  # the run that all noise is calibrated for
HEAD_NOISE = 5.0  # noise multiplier of the popularity that chooses rows
L2_CLIP_NORM, LEARNING_RATE, PRIVATE_LR = 0.05, 100.0, 5.0
SELECTION_SHARE = 0.2


class Plan(NamedTuple):
    """Noise multipliers of one round that lead to the same epsilon."""

    dense: float
    selected: float  # less is left of the budget after the rows are chosen


def make_plan() -> Plan:
    """Calibrates training alone, and training after the choice of rows."""

    def noise(*prior):
        def event(z):
            one = dp_accounting.PoissonSampledDpEvent(SAMPLING_PROB, dp_accounting.GaussianDpEvent(z))
            return dp_accounting.ComposedDpEvent([*prior, dp_accounting.SelfComposedDpEvent(one, ROUNDS)])

        return fr.calibrate_noise_multiplier(event, target_epsilon=EPSILON, delta=DELTA).noise_multiplier

    return Plan(noise(), noise(dp_accounting.GaussianDpEvent(HEAD_NOISE)))


def chains(plan: Plan, num_items: int, row_ids: np.ndarray, *, threshold: float) -> dict[str, fr.UpdateTransform]:
    """The chain of each mechanism; as many rows in every round as are chosen once."""
    private = {"l2_clip_norm": L2_CLIP_NORM}
    sparse = {"max_rows": len(row_ids), "selection_share": SELECTION_SHARE, "threshold": threshold}
    return {
        "dense": fr.user_level_dp(noise_multiplier=plan.dense, **private),
        "select_rows": fr.chain(
            select_rows(row_ids, num_rows=num_items), fr.user_level_dp(noise_multiplier=plan.selected, **private)
        ),
        "adafest": adafest(noise_multiplier=plan.dense, **sparse, **private),
    }


def spent(name: str, transforms: fr.UpdateTransform) -> float:
    """The epsilon of the planned run, from the chain that runs."""
    ledger = fr.Ledger()
    if name == "select_rows":
        ledger = ledger.record(dp_accounting.GaussianDpEvent(HEAD_NOISE), phase="selection", released="rows")
    event = dp_accounting.PoissonSampledDpEvent(SAMPLING_PROB, transforms.dp_event(fr.UNBOUNDED, 0))
    return ledger.record(event, phase="training", released="sums", count=ROUNDS).spent(DELTA).epsilon


def algorithm_of(num_items: int, dim: int, **options: Any) -> Algorithm:
    """FedSGD of matrix factorisation with the sparse server step."""
    model = fr.matrix_factorization(num_items, dim=dim)
    method = fr.fedsgd(
        model, server_optimizer=optax.sgd(LEARNING_RATE), private_optimizer=optax.sgd(PRIVATE_LR), **options
    )
    return sparse_sgd(method, learning_rate=LEARNING_RATE)


def server_steps(plan: Plan, args: argparse.Namespace) -> list[dict]:
    """Times ``transforms.server``, the division and the server's step on the sum of one cohort, and lazy noise."""
    rng = np.random.default_rng(0)
    row_ids = rng.choice(args.items, args.chosen, replace=False)
    touched = rng.zipf(1.2, (args.cohort_size, args.rows_per_user)) * 7919 % args.items
    ids = jnp.asarray(touched, jnp.int32)
    method = algorithm_of(args.items, args.dim)

    def rows(i, dim):
        return Rows(i, jnp.full((args.rows_per_user, dim), 1e-3), args.items, unique=False)

    def update(i):
        return fr.Shared({"item": rows(i, args.dim), "bias": rows(i, 1)}, {})

    def contestant(transforms):
        state = method.init(jax.random.key(0))
        state = state._replace(transforms=transforms.init(state.shared))

        def client(i):
            return transforms.client(update(i), state.transforms, jax.random.key(0))[0]

        updates = jax.jit(jax.vmap(client))(ids)
        total = add_to_total(zero_total(jax.eval_shape(client, ids[0])), updates)

        def step(carry, key):
            state, total = carry
            summed, link_state = transforms.server(total, state.transforms, key)
            aggregate = divide(summed if method.takes_rows else as_tables(summed), args.cohort_size)
            state = method.server_update(state, aggregate)
            return state._replace(transforms=link_state, round=state.round + 1), total

        return step, (state, total)

    stddev = LEARNING_RATE / args.cohort_size * plan.dense * L2_CLIP_NORM

    def lazy(function):
        tables = method.init(jax.random.key(0)).shared.tables
        tables = {k: (lazy_table(x, 0), jnp.zeros_like(x)) for k, x in tables.items()}
        return function, (jnp.int32(1), tables)

    def lazy_step(carry, key):
        index, tables = carry

        def one(table, total):
            table = catch_up(table, ids, index, key, stddev)
            return apply(table, total.at[ids.reshape(-1)].add(1e-3), ids, LEARNING_RATE / args.cohort_size)

        return index + 1, {k: one(*pair) for k, pair in tables.items()}

    def lazy_flush(carry, key):
        index, tables = carry
        flushed = {k: (lazy_table(flush(t, index, key, stddev), index), s) for k, (t, s) in tables.items()}
        return index + 1, flushed

    transforms = chains(plan, args.items, row_ids, threshold=args.threshold)
    runs = {name: contestant(links) for name, links in transforms.items()}
    runs |= {"lazy": lazy(lazy_step), "lazy, flush of all rows": lazy(lazy_flush)}
    timed = {}
    for name, (step, carry) in runs.items():
        timed[name] = _repeated(jax.jit(step, donate_argnums=0, compiler_options=_compiler_options()), carry)
    seconds = take_turns(timed, args.repeats)
    transforms["lazy"] = transforms["lazy, flush of all rows"] = transforms["dense"]
    shape = {"distinct_rows": len(np.unique(touched))}
    return [_line("step", name, s, seconds["dense"], args, transforms[name]) | shape for name, s in seconds.items()]


def _repeated(compiled: Callable, carry: Any) -> Callable[[int], None]:
    holder = [jax.block_until_ready(jax.tree.map(jnp.array, carry))]

    def run(index: int) -> None:
        holder[0] = jax.block_until_ready(compiled(holder[0], jax.random.key(index)))

    return run


def take_turns(runs: dict[str, Callable[[int], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run, one after the other ``repeats`` times, after one turn to compile."""
    seconds = {name: [] for name in runs}
    for index in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run(index)
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def whole_rounds(plan: Plan, args: argparse.Namespace) -> list[dict]:
    """Times rounds of `make_rounds` and `lazy_rounds`, clients, sums and cleared tables included."""
    clients = population(num_users=4 * args.cohort_size, num_items=args.items, rows_per_user=args.rows_per_user)
    sampler = fr.poisson(clients.num_clients, cohort_size=args.cohort_size)
    method = algorithm_of(args.items, args.dim)
    row_ids = np.random.default_rng(0).choice(args.items, args.chosen, replace=False)
    transforms = chains(plan, args.items, row_ids, threshold=args.threshold)
    made = {
        name: fr.make_rounds(method, links, sampler, clients, span_size=args.span) for name, links in transforms.items()
    }
    made["lazy"] = lazy_rounds(
        method,
        sampler,
        clients,
        l2_clip_norm=L2_CLIP_NORM,
        noise_multiplier=plan.dense,
        learning_rate=LEARNING_RATE,
        span_size=args.span,
    )
    transforms["lazy"] = transforms["dense"]
    seconds = take_turns({name: _calls(rounds, args.span) for name, rounds in made.items()}, args.round_repeats)
    seconds = {name: [s / args.span for s in values] for name, values in seconds.items()}
    return [_line("round", name, s, seconds["dense"], args, transforms[name]) for name, s in seconds.items()]


def _calls(rounds: Rounds, span: int) -> Callable[[int], None]:
    holder = [rounds.init(jax.random.key(0))]
    keys = fr.RoundKeys(*jax.random.split(jax.random.key(1), 3))

    def run(index: int) -> None:
        del index  # the state's round goes on
        holder[0] = jax.block_until_ready(rounds.run(*holder[0], keys, span))[:2]

    return run


def utility(plan: Plan, args: argparse.Namespace) -> Iterator[dict]:
    """ndcg@10 on the test items of a synthetic world, each mechanism with the same seeds, steps and epsilon."""
    users, items, rounds, chosen = (60, 80, 2, 20) if args.smoke else (1000, 1000, ROUNDS, 400)
    data = fr.load("synthetic", num_users=users, num_items=items, num_interactions=30 * users, min_per_user=10)
    split = fr.leave_one_out(data)
    clients = fr.client_data(split, num_buckets=2)
    model = fr.matrix_factorization(items, dim=8)
    method = algorithm_of(items, 8, negatives=fr.Negatives(4))
    test = fr.cases(split, "test")
    heads = [
        head_items(split.train, num_rows=chosen, noise_multiplier=HEAD_NOISE, key=jax.random.key(1000 + seed)).row_ids
        for seed in range(args.seeds)
    ]
    sampler = fr.poisson(users, cohort_size=SAMPLING_PROB * users)
    values = {}
    for name in chains(plan, items, heads[0], threshold=1.0):
        made, values[name] = None, []
        for seed in range(args.seeds):
            links = chains(plan, items, heads[seed], threshold=1.0)[name]
            if made is None or name == "select_rows":  # the rows of this seed are in the program
                made = fr.make_rounds(method, links, sampler, clients, span_size=rounds)
            keys = fr.RoundKeys(*jax.random.split(jax.random.key(100 + seed), 3))
            state, private = made.init(jax.random.key(seed))
            state, private, _ = made.run(state, private, keys, rounds)
            scorer = fr.client_scorer(model.score, shared=state.shared, private=private)
            values[name].append(fr.evaluate(scorer, test, ks=(10,)).values["ndcg@10"])
            print(name, seed, values[name][-1], file=sys.stderr, flush=True)
        difference = np.subtract(values[name], values["dense"])
        yield (
            _common("utility", name, args, links)
            | {"users": users, "items": items, "rounds": rounds, "chosen": chosen, "seeds": args.seeds}
            | {"ndcg": values[name], "mean": float(np.mean(values[name])), "standard_error": _error(values[name])}
            | {"difference": float(difference.mean()), "difference_error": _error(difference)}
        )


def _error(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def _common(part: str, name: str, args: argparse.Namespace, transforms: fr.UpdateTransform) -> dict:
    kept = {k: v for k, v in stamp(seed=0, data_fingerprint=None).items() if k in ("commit", "dirty", "versions")}
    return {
        "benchmark": "sparse",
        "part": part,
        "mechanism": name,
        "epsilon": spent(name, transforms),
        "delta": DELTA,
        **kept,
        "device": str(jax.devices()[0].device_kind),
        "load": os.getloadavg()[0],
        "utc_time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _line(part, name, seconds, dense, args, transforms) -> dict:
    """One mechanism's times; ``speedup`` is the median of dense over it, turn by turn."""
    q1, median, q3 = np.percentile(seconds, [25, 50, 75])
    setting = ("items", "dim", "chosen", "cohort_size", "rows_per_user", "threshold")
    return (
        _common(part, name, args, transforms)
        | {k: getattr(args, k) for k in setting}
        | {"span": args.span if part == "round" else 1, "repeats": len(seconds)}
        | {"median_s": float(median), "q1_s": float(q1), "q3_s": float(q3)}
        | {"speedup": float(np.median(np.divide(dense, seconds)))}
    )


def keep(line: dict) -> None:
    """Appends a line at once: a run that is stopped keeps what it has measured."""
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / "sparse.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def page(lines: Sequence[dict]) -> str:
    """The last run of each part as a table."""
    text = ["# Noise on few rows", "Written by `python -m benchmarks.sparse`; do not edit."]
    columns = ("mechanism", "seconds", "quartiles", "dense over it")
    for part, title in (("step", "The server's step"), ("round", "The whole round")):
        rows = [line for line in lines if line["part"] == part]
        if not rows:
            continue
        one = rows[0]
        cells = [
            (
                r["mechanism"],
                f"{r['median_s']:.3g}",
                f"{r['q1_s']:.3g} to {r['q3_s']:.3g}",
                f"{r['speedup']:.1f}",
            )
            for r in rows
        ]
        said = (
            f"{one['items']:,} items of dim {one['dim']} and their biases; a cohort of {one['cohort_size']} clients "
            f"with {one['rows_per_user']} rows each; {one['chosen']:,} rows chosen once, or at most that many a round "
            f"above {one['threshold']:g} standard deviations. Medians of {one['repeats']} turns"
        )
        said += f", each a call of {one['span']} rounds; lazy noise is flushed once a call." if part == "round" else "."
        text += [f"## {title}", said, to_markdown(Table(columns, cells)).rstrip()]
    rows = [line for line in lines if line["part"] == "utility"]
    if rows:
        one = rows[0]
        cells = [
            (
                r["mechanism"],
                f"{r['mean']:.4f} ± {r['standard_error']:.4f}",
                f"{r['difference']:+.4f} ± {r['difference_error']:.4f}",
            )
            for r in rows
        ]
        said = (
            f"Synthetic world of {one['users']:,} users and {one['items']:,} items, fedsgd of matrix factorisation, "
            f"{one['rounds']} rounds, {one['seeds']} seeds, {one['chosen']} rows; mean and standard error over seeds "
            "of ndcg@10 on the test item among all items, and of its difference to dense with the same seed. Lazy "
            "noise has the distribution of dense noise."
        )
        columns = ("mechanism", "ndcg@10", "less dense")
        text += ["## What is learned", said, to_markdown(Table(columns, cells)).rstrip()]
    epsilons = [line["epsilon"] for line in lines]
    commits = sorted({(line["commit"] or "none")[:12] for line in lines})
    loads = [line["load"] for line in lines]
    text.append(
        f"Every mechanism is calibrated for {ROUNDS} rounds of Poisson cohorts with probability {SAMPLING_PROB:g}: "
        f"user-level epsilon {min(epsilons):.3f} to {max(epsilons):.3f} at delta {DELTA:g}, add-or-remove-one, the "
        f"choice of rows included. Device {', '.join(sorted({line['device'] for line in lines}))}, load averages "
        f"{min(loads):.1f} to {max(loads):.1f} on {os.cpu_count()} cores: above that, other work made times longer. "
        f"Commits {', '.join(commits)}. No GPU was measured."
    )
    return "\n\n".join(text) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measures the parts that the flags name; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse", description=__doc__.splitlines()[0])
    parser.add_argument("--part", action="append", choices=PARTS, help="only this one; may be repeated")
    parser.add_argument("--items", type=int, default=1_000_000, help="catalogue size")
    parser.add_argument("--dim", type=int, default=64, help="length of item vectors")
    parser.add_argument("--chosen", type=int, default=16_384, help="rows chosen once, and most rows a round")
    parser.add_argument("--threshold", type=float, default=3.0, help="adafest's, in standard deviations of a count")
    parser.add_argument("--cohort-size", type=int, default=128, help="clients a round")
    parser.add_argument("--rows-per-user", type=int, default=64, help="items of each client")
    parser.add_argument("--repeats", type=int, default=7, help="timed server steps")
    parser.add_argument("--round-repeats", type=int, default=2, help="timed calls of whole rounds")
    parser.add_argument("--span", type=int, default=20, help="rounds in a call")
    parser.add_argument("--seeds", type=int, default=5, help="of the utility part")
    parser.add_argument("--smoke", action="store_true", help="a tiny catalogue; keeps nothing")
    args = parser.parse_args(argv)
    if args.smoke:
        args.items, args.dim, args.chosen, args.cohort_size, args.rows_per_user = 300, 4, 40, 8, 6
        args.repeats, args.round_repeats, args.span, args.seeds = 2, 1, 2, 2
    measures = {"step": server_steps, "round": whole_rounds, "utility": utility}
    plan, lines = make_plan(), []
    for part in args.part or PARTS:
        for line in measures[part](plan, args):
            lines.append(line)
            print(json.dumps(line), file=sys.stderr, flush=True)
            if not args.smoke:
                keep(line)
    if not args.smoke:
        kept = [json.loads(line) for line in (RESULTS / "sparse.jsonl").read_text("utf-8").splitlines()]
        lines = list({(line["part"], line["mechanism"]): line for line in kept}.values())
        (RESULTS / "sparse.md").write_text(page(lines), encoding="utf-8")
    print(page(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
