"""How long accounting takes: calibration, single epsilons, curves over rounds.

    python -m benchmarks.accounting            a table
    python -m benchmarks.accounting --json     JSON lines only
    python -m benchmarks.accounting --smoke    two rows, no plain calibration

The plain calibration is dp_accounting's own ``calibrate_dp_mechanism`` with its PLD accountant at the default grid of
1e-4, searching noise multipliers between a third and three times the answer, to four digits: a generous bracket.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version

import dp_accounting
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from rich.console import Console
from rich.table import Column, Table

from fedjax_rec.privacy.accounting import privacy_spent
from fedjax_rec.privacy.calibration import calibrate_noise_multiplier, max_rounds
from fedjax_rec.privacy.curve import epsilon_curve

# Population, expected cohort, rounds, delta.
DATA_SETS = {
    "ML-100K": (943, 94, 200, 1e-4),
    "ML-1M": (6040, 256, 500, 1e-5),
    "ML-10M": (69878, 1024, 500, 1e-5),
    "ML-20M": (116677, 2048, 500, 8e-6),
}
TARGETS = (1.0, 5.0, 10.0, 20.0)


def poisson_run(prob: float, noise_multiplier: float, rounds: int) -> dp_accounting.DpEvent:
    """The event of ``rounds`` noised sums over Poisson cohorts."""
    return SelfComposedDpEvent(PoissonSampledDpEvent(prob, GaussianDpEvent(noise_multiplier)), rounds)


def timed(work: Callable[[], object], repeats: int) -> tuple[float, object]:
    """Median wall seconds of ``work`` over ``repeats`` calls, and what the last one returned."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


def plain_calibration(name: str, target: float, answer: float) -> float:
    """The noise multiplier by dp_accounting alone; ``answer`` only centres the bracket."""
    population, cohort, rounds, delta = DATA_SETS[name]
    return dp_accounting.calibrate_dp_mechanism(
        PLDAccountant,
        lambda z: poisson_run(cohort / population, z, rounds),
        target,
        delta,
        dp_accounting.ExplicitBracketInterval(answer / 3, answer * 3),
        tol=1e-4,
    )


def calibration_rows(names: list[str], targets: tuple[float, ...], repeats: int, plain: str) -> Iterator[dict]:
    """One row a data set and target: our search, and for ``plain`` "one" or "all" targets dp_accounting's."""
    for name in names:
        population, cohort, rounds, delta = DATA_SETS[name]
        for target in targets:

            def search(prob=cohort / population, rounds=rounds, delta=delta, target=target):
                return calibrate_noise_multiplier(
                    lambda z: poisson_run(prob, z, rounds), target_epsilon=target, delta=delta
                )

            seconds, found = timed(search, repeats)
            row = {
                "case": f"calibrate {name} to epsilon {target:g}",
                "median_s": seconds,
                "noise_multiplier": found.noise_multiplier,
                "epsilon": found.epsilon,
            }
            if plain == "all" or (plain == "one" and target == 5.0):
                row["plain_s"], row["plain_noise_multiplier"] = timed(
                    lambda name=name, target=target, found=found: plain_calibration(
                        name, target, found.noise_multiplier
                    ),
                    1,
                )
            yield row


def epsilon_rows(repeats: int) -> Iterator[dict]:
    """One run's epsilon at two fixed grids and at the chosen one; a curve of 50 points; the rounds of a budget."""
    run = poisson_run(256 / 6040, 1.1278, 500)
    for interval in (1e-3, 1e-4):
        seconds, epsilon = timed(
            lambda interval=interval: (
                PLDAccountant(value_discretization_interval=interval).compose(run).get_epsilon(1e-5)
            ),
            repeats,
        )
        yield {"case": f"epsilon ML-1M, PLDAccountant at {interval:g}", "median_s": seconds, "epsilon": epsilon}
    seconds, spent = timed(lambda: privacy_spent(run, delta=1e-5), repeats)
    yield {"case": "epsilon ML-1M, privacy_spent", "median_s": seconds, "epsilon": spent.epsilon}
    seconds, curve = timed(lambda: epsilon_curve(run.event, range(10, 501, 10), delta=1e-5), repeats)
    yield {"case": "epsilon_curve ML-1M, 50 points", "median_s": seconds, "epsilon": float(curve[-1])}
    seconds, rounds = timed(lambda: max_rounds(run.event, target_epsilon=5.0, delta=1e-5), repeats)
    yield {"case": "max_rounds ML-1M at epsilon 5", "median_s": seconds, "rounds": rounds}


def stamp() -> dict:
    """What the numbers depend on besides the code."""
    return {
        "benchmark": "accounting",
        "cpu_count": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "dp_accounting": version("dp-accounting"),
        "scipy": version("scipy"),
    }


def show(rows: list[dict]) -> None:
    """Prints the rows as a table."""
    table = Table(Column("case", no_wrap=True), "median s", "plain s", "noise", "plain noise", "epsilon", "rounds")
    for row in rows:
        cells = [row.get(key) for key in ("plain_s", "noise_multiplier", "plain_noise_multiplier", "epsilon", "rounds")]
        table.add_row(row["case"], f"{row['median_s']:.3f}", *("" if cell is None else f"{cell:.6g}" for cell in cells))
    Console(width=120).print(table)


def main() -> None:
    """Runs the benchmark as its command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON lines and nothing else")
    parser.add_argument("--smoke", action="store_true", help="a small subset, once each")
    parser.add_argument("--repeats", type=int, default=3, help="calls per case; the median is reported")
    parser.add_argument(
        "--plain", choices=("none", "one", "all"), default="one", help="dp_accounting's calibration: epsilon 5, or all"
    )
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1; got {args.repeats}.")
    repeats = 1 if args.smoke else args.repeats
    names, targets = (["ML-100K"], (5.0, 20.0)) if args.smoke else (list(DATA_SETS), TARGETS)
    rows = list(calibration_rows(names, targets, repeats, "none" if args.smoke else args.plain))
    rows += epsilon_rows(repeats)
    if not args.json:
        show(rows)
        return
    for row in rows:
        print(json.dumps(stamp() | {"repeats": repeats} | row))


if __name__ == "__main__":
    main()
