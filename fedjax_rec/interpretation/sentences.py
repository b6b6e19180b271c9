"""An explanation in words."""

from collections.abc import Callable

import numpy as np

from fedjax_rec.interpretation.explain import Explanation

Naming = Callable[[int], str]


def sentences(explanation: Explanation, name: Naming, *, num_reasons: int = 3) -> list[str]:
    """What speaks for an item, what against it, and what would change its place.

    Args:
      explanation: of one item.
      name: the title of an item, by id.
      num_reasons: most items named in a sentence.
    """
    found = [_because(explanation, name, num_reasons)]
    against = [place for place in np.argsort(explanation.values, kind="stable") if _counts(explanation, -1)[place]]
    if against:
        found.append(f"Against it: {_listed(_signed(explanation, against[:num_reasons], name))}.")
    if explanation.out is not None and len(explanation.out.history_places) > 1:
        gone = _listed([name(int(explanation.history[place])) for place in explanation.out.history_places])
        found.append(
            f"Without {gone} together it would leave the top {explanation.k} and be at place {explanation.out.place}."
        )
    return found


def reasons(explanation: Explanation) -> np.ndarray:
    """Places of the history that speak for the item, the strongest first."""
    order = np.argsort(-explanation.values, kind="stable")
    return order[_counts(explanation, +1)[order]]


def _because(explanation: Explanation, name: Naming, num_reasons: int) -> str:
    strongest = reasons(explanation)
    title = name(explanation.item)
    if not len(strongest):
        return f"{title} is at place {explanation.place}, and nothing in the history speaks for it."
    said = f"{title} is recommended because of {_listed(_signed(explanation, strongest[:num_reasons], name))}"
    return (
        f"{said}; without {name(int(explanation.history[strongest[0]]))} it would {_moved(explanation, strongest[0])}."
    )


def _moved(explanation: Explanation, place: int) -> str:
    now, then = explanation.place, int(explanation.places_without[place])
    if now == then:
        return f"stay at place {now}"
    return f"{'fall' if then > now else 'rise'} from place {now} to {then}"


def _counts(explanation: Explanation, sign: int) -> np.ndarray:
    """Which values have this sign, rounding and sampling aside; bool ``[n]``."""
    scale = np.abs(explanation.values).max(initial=0.0)
    return sign * explanation.values > max(2 * explanation.error, 1e-3 * scale)


def _signed(explanation: Explanation, places: np.ndarray, name: Naming) -> list[str]:
    return [f"{name(int(explanation.history[place]))} ({signed(explanation.values[place])})" for place in places]


def signed(value: float) -> str:
    """A number with its sign and two significant digits: ``+0.83``, ``-0.012``, ``+12``."""
    text = f"{value:+.2g}" if abs(value) < 10 else f"{value:+.0f}"
    return f"{value:+.1e}" if "e" in text else text


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
