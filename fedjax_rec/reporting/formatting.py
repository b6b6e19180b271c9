"""How a number looks in every table, plot and report: one rule each, none of them flattering."""

import math
import numbers
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from typing import TypeGuard

MISSING = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"
INTERVAL = " ± "


@dataclass(frozen=True)
class Estimate:
    """A number with its interval, e.g. a mean over users with a bootstrap interval.

    Printed as `.0412 ± .0031`, where .0031 is half the width of [low, high].
    """

    value: float
    low: float
    high: float


Cell = str | int | float | Estimate | None


def is_number(value: object) -> TypeGuard[float]:
    """True for a real number that is not NaN (NumPy scalars too); False for booleans, strings and None."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and not math.isnan(value)


def format_column(name: str, cells: Sequence[Cell]) -> list[str]:
    """The cells of one column as text, all with the same number of decimals.

    Epsilon and delta columns are rounded up (`format_epsilon`, `format_delta`), `vs ...` columns are ratios (`1.43×`),
    integers get thousands separators, values within [-1, 1] four decimals and no leading zero (`.0412`), larger
    ones two or fewer. Missing values (None, NaN) are an en dash; strings pass through.

    Args:
      name: the column's heading, which decides the rule.
      cells: its cells.

    Returns:
      One string a cell.
    """
    plain = [cell.value if isinstance(cell, Estimate) else cell for cell in cells]
    write = _number_writer(
        name, [float(x) if not isinstance(x, numbers.Integral) else x for x in plain if is_number(x)]
    )
    return [_write_cell(cell, write) for cell in cells]


def format_number(value: float | None) -> str:
    """One number on its own: `.0412`, `12.35`, `1,682`; an en dash if it is missing."""
    return format_column("", [value])[0]


def format_epsilon(epsilon: float | None) -> str:
    """An epsilon, rounded UP to two decimals (two significant digits below .1), so that no table understates it."""
    if not is_number(epsilon):
        return MISSING
    if math.isinf(epsilon):
        return "∞"
    step = Decimal("0.01") if epsilon >= 0.1 or epsilon <= 0 else _significant_step(epsilon, digits=2)
    return f"{_round_up(epsilon, step):f}"


def format_delta(delta: float | None) -> str:
    """A delta, rounded up to three significant digits: `1e-5`, `1.07e-3`, `0`."""
    if not is_number(delta):
        return MISSING
    if delta <= 0 or math.isinf(delta):
        return f"{delta:g}"
    rounded = _round_up(delta, _significant_step(delta, digits=3))
    mantissa, exponent = f"{rounded:.2e}".split("e")
    return (
        f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
        if rounded < Decimal("0.01")
        else f"{rounded.normalize():f}"
    )


def format_ratio(ratio: float | None) -> str:
    """A ratio: `1.43×`; an en dash if it is missing."""
    return f"{ratio:.2f}{TIMES}" if is_number(ratio) else MISSING


def format_percent(share: float | None) -> str:
    """A share in [0, 1] as a percentage with one decimal: `12.3 %`."""
    return f"{100 * share:.1f} %" if is_number(share) else MISSING


def format_bytes(num_bytes: float | None) -> str:
    """A number of bytes in powers of 1000: `412 B`, `18.4 kB`, `1.20 GB`."""
    return _with_prefix(num_bytes, "B")


def format_seconds(seconds: float | None) -> str:
    """A duration: `3.1 ms`, `41.2 s`, `12 min 5 s`, `3 h 2 min`."""
    if not is_number(seconds) or math.isinf(seconds):
        return MISSING
    if 0 < seconds < 0.1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes = round(seconds) // 60
    return f"{minutes} min {round(seconds) % 60} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _with_prefix(value: float | None, unit: str) -> str:
    """A magnitude with three significant digits and a decimal prefix."""
    if not is_number(value) or math.isinf(value):
        return MISSING
    for prefix in ("", "k", "M", "G", "T"):
        if abs(value) < 999.5 or prefix == "T":
            break
        value = value / 1000
    text = (
        f"{value:.0f}"
        if not prefix or abs(value) >= 99.95
        else f"{value:.1f}"
        if abs(value) >= 9.995
        else f"{value:.2f}"
    )
    return f"{text} {prefix}{unit}"


def _number_writer(name: str, values: Sequence[float]) -> Callable[[float], str]:
    """The function number -> text that suits a column's name and magnitude."""
    if is_epsilon_column(name):
        return format_epsilon
    if re.match(r"(delta|δ)\b", name.strip(), flags=re.IGNORECASE):
        return format_delta
    if name.startswith("vs "):
        return format_ratio
    if all(isinstance(value, numbers.Integral) for value in values):
        return lambda value: f"{value:,}" if isinstance(value, numbers.Integral) else f"{value:,.2f}"
    finite = [abs(value) for value in values if math.isfinite(value)]
    if any(0 < value < 1e-4 for value in finite):
        return lambda value: f"{value:.3g}"
    largest = max(finite, default=0.0)
    if largest <= 1:
        return _without_leading_zero
    decimals = 2 if largest < 100 else 1 if largest < 10_000 else 0
    return lambda value: f"{value:,.{decimals}f}"


def _write_cell(cell: Cell, write: Callable[[float], str]) -> str:
    """One cell as text."""
    if isinstance(cell, Estimate):
        if not is_number(cell.value):
            return MISSING
        half_width = (cell.high - cell.low) / 2
        return f"{write(cell.value)}{INTERVAL}{write(half_width)}" if is_number(half_width) else write(cell.value)
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, str):
        return cell
    if not is_number(cell):
        return MISSING
    return ("-" if cell < 0 else "") + "∞" if math.isinf(cell) else write(cell)


def is_epsilon_column(name: str) -> bool:
    """True if a column of this name holds an epsilon: `epsilon`, `epsilon (user-level)`, `ε`, `target ε`."""
    return re.search(r"(\bepsilons?\b|\beps\b|ε)", name, flags=re.IGNORECASE) is not None


def _without_leading_zero(value: float) -> str:
    """Four decimals, and .0412 rather than 0.0412."""
    return re.sub(r"^(-?)0\.", r"\1.", f"{value:.4f}")


def _significant_step(value: float, *, digits: int) -> Decimal:
    """The place value of the last of `digits` significant digits."""
    return Decimal(10) ** (math.floor(math.log10(value)) - digits + 1)


def _round_up(value: float, step: Decimal) -> Decimal:
    """Round up to a multiple of `step`, reading the float as it prints (7.98 stays 7.98)."""
    return Decimal(repr(float(value))).quantize(step, rounding=ROUND_CEILING)
