"""DpEvents of dp_accounting: checked, reduced to a normal form, written as a sentence, and stored as JSON.

One meaning everywhere in this package: a noise multiplier is the noise's standard deviation (Laplace: its scale) over
the largest norm that ONE unit's contribution may have, whatever the neighbouring relation is. The accountants double
the sensitivity themselves where the relation replaces a unit (see ``accounting``).
"""

import math
import numbers
from typing import Any

import attr
from dp_accounting import dp_event
from dp_accounting.dp_event import DpEvent

from fedjax_rec.privacy.skellam import SkellamDpEvent

EVENT_TYPES: dict[str, type[DpEvent]] = {
    event_type.__name__: event_type
    for event_type in (
        dp_event.NoOpDpEvent,
        dp_event.NonPrivateDpEvent,
        dp_event.GaussianDpEvent,
        dp_event.LaplaceDpEvent,
        dp_event.DiscreteLaplaceDpEvent,
        dp_event.RandomizedResponseDpEvent,
        dp_event.ZCDpEvent,
        SkellamDpEvent,
        dp_event.PoissonSampledDpEvent,
        dp_event.SampledWithoutReplacementDpEvent,
        dp_event.TruncatedSubsampledGaussianDpEvent,
        dp_event.RepeatAndSelectDpEvent,
        dp_event.SelfComposedDpEvent,
        dp_event.ComposedDpEvent,
    )
}
"""The events that a ledger can hold, by their class names: dp_accounting's, and one of ours."""

Terms = tuple[tuple[DpEvent, int], ...]
"""A composition in normal form: distinct releases, each with how often it is applied."""

# field name -> (least value, greatest value, must be an integer, what it is)
_RANGES = {
    "noise_multiplier": (0, math.inf, False, "noise multiplier"),
    "sampling_probability": (0, 1, False, "sampling probability"),
    "rho": (0, math.inf, False, "zCDP rho"),
    "xi": (0, math.inf, False, "zCDP xi"),
    "stddev": (0, math.inf, False, "standard deviation"),
    "l1_sensitivity": (0, math.inf, False, "L1 sensitivity"),
    "l2_sensitivity": (0, math.inf, False, "L2 sensitivity"),
    "mean": (1, math.inf, False, "mean number of repetitions"),
    "shape": (0, math.inf, False, "shape of the number of repetitions"),
    "count": (1, math.inf, True, "count"),
    "num_buckets": (1, math.inf, True, "number of buckets"),
    "source_dataset_size": (1, math.inf, True, "population size"),
    "dataset_size": (1, math.inf, True, "population size"),
    "sample_size": (0, math.inf, True, "sample size"),
    "truncated_batch_size": (0, math.inf, True, "capacity"),
    "sensitivity": (0, math.inf, True, "sensitivity"),
}


def check_event(event: DpEvent) -> DpEvent:
    """Returns ``event`` unchanged if it and everything inside it is well formed.

    Raises:
      TypeError: if it is no ``DpEvent``, or not one of ``EVENT_TYPES``.
      ValueError: if a number inside it is NaN or out of its range; the sentence names it.
    """
    if not isinstance(event, DpEvent):
        raise TypeError(f"A DpEvent of dp_accounting is needed; got {type(event).__name__}: {event!r}.")
    name = type(event).__name__
    if name not in EVENT_TYPES:
        raise TypeError(f"{name} has no accounting here; the events that have are {', '.join(EVENT_TYPES)}.")
    for field in attr.fields(type(event)):
        _check_value(name, field.name, getattr(event, field.name))
    parts = event.events if name == "ComposedDpEvent" else [getattr(event, "event", event)]
    if not all(isinstance(part, DpEvent) for part in parts):
        raise TypeError(f"{name} must hold DpEvents; got {parts!r}.")
    if name == "SampledWithoutReplacementDpEvent" and event.sample_size > event.source_dataset_size:
        raise ValueError(
            f"A sample of {event.sample_size} cannot be drawn without replacement from {event.source_dataset_size}; "
            "use a smaller sample, or full participation."
        )
    return event


def _check_value(event_name: str, field_name: str, value: Any) -> None:
    if isinstance(value, DpEvent):
        check_event(value)
        return
    if isinstance(value, list | tuple):
        for element in value:
            _check_value(event_name, field_name, element)
        return
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise ValueError(f"{field_name} of {event_name} must be a number; got {value!r}.")
    if field_name == "noise_parameter":  # a probability in one event, a rate in the other
        upper = 1 if event_name == "RandomizedResponseDpEvent" else math.inf
        least, greatest, whole, meaning = 0, upper, False, "noise parameter"
    else:
        least, greatest, whole, meaning = _RANGES.get(field_name, (-math.inf, math.inf, False, field_name))
    if whole and not isinstance(value, numbers.Integral):
        raise ValueError(f"The {meaning} of {event_name} must be an integer; got {value!r}.")
    if not least <= value <= greatest:  # NaN fails both comparisons
        bounds = f"at least {least}" if greatest == math.inf else f"between {least} and {greatest}"
        raise ValueError(f"The {meaning} of {event_name} must be {bounds}; got {value!r}.")


def flatten(event: DpEvent) -> Terms:
    """The normal form of a composition; its privacy loss is that of ``event``, exactly.

    Compositions are unrolled and equal releases merged; several Gaussians on the same data, or on the same sample,
    become one whose inverse variance is the sum of theirs (also when they are adaptive); sampling with probability
    one disappears; a release without noise becomes ``NonPrivateDpEvent`` and one without signal nothing.

    Args:
      event: any event that ``check_event`` accepts.

    Returns:
      ``((event, count), ...)``, in order of first appearance, with at most one unsampled ``GaussianDpEvent``.
    """
    return _merge(_unroll(check_event(event), 1))


def _unroll(event: DpEvent, count: int) -> list[tuple[DpEvent, int]]:
    match event:
        case dp_event.NoOpDpEvent():
            return []
        case dp_event.SelfComposedDpEvent():
            return _unroll(event.event, count * int(event.count))
        case dp_event.ComposedDpEvent():
            return [term for part in event.events for term in _unroll(part, count)]
        case dp_event.PoissonSampledDpEvent() | dp_event.SampledWithoutReplacementDpEvent():
            return _unroll_sampled(event, count)
        case dp_event.RepeatAndSelectDpEvent():
            inner = flatten(event.event)
            return [(dp_event.NonPrivateDpEvent() if _is_non_private(inner) else event, count)]
    if _has_no_signal(event):
        return []
    return [(dp_event.NonPrivateDpEvent() if _has_no_noise(event) else event, count)]


def _unroll_sampled(event: DpEvent, count: int) -> list[tuple[DpEvent, int]]:
    if isinstance(event, dp_event.PoissonSampledDpEvent):
        share = event.sampling_probability
    else:
        share = event.sample_size / event.source_dataset_size
    inner = flatten(event.event)
    if share == 0 or not inner:
        return []
    if share == 1:
        return [(part, inner_count * count) for part, inner_count in inner]
    if _is_non_private(inner):
        return [(dp_event.NonPrivateDpEvent(), count)]
    if len(inner) == 1 and inner[0][1] == 1:
        return [(attr.evolve(event, event=inner[0][0]), count)]
    return [(event, count)]


def _has_no_signal(event: DpEvent) -> bool:
    match event:
        case dp_event.GaussianDpEvent() | dp_event.LaplaceDpEvent():
            return event.noise_multiplier == math.inf
        case SkellamDpEvent():
            return event.stddev == math.inf or event.l1_sensitivity == 0
        case dp_event.RandomizedResponseDpEvent():
            return event.num_buckets == 1 or event.noise_parameter == 1
        case dp_event.TruncatedSubsampledGaussianDpEvent():
            return event.sampling_probability == 0 or event.truncated_batch_size == 0
    return False


def _has_no_noise(event: DpEvent) -> bool:
    match event:
        case dp_event.RandomizedResponseDpEvent() | dp_event.DiscreteLaplaceDpEvent():
            return event.noise_parameter == 0
        case dp_event.ZCDpEvent():
            return math.inf in (event.rho, event.xi)
        case SkellamDpEvent():
            return event.stddev == 0 or math.inf in (event.l1_sensitivity, event.l2_sensitivity)
    return getattr(event, "noise_multiplier", 1.0) == 0


def _is_non_private(terms: Terms) -> bool:
    return any(isinstance(event, dp_event.NonPrivateDpEvent) for event, _ in terms)


def _merge(terms: list[tuple[DpEvent, int]]) -> Terms:
    merged: list[tuple[DpEvent, int]] = []
    gaussians, gaussian_place = [], 0
    for event, count in terms:
        if isinstance(event, dp_event.GaussianDpEvent):
            gaussian_place = gaussian_place if gaussians else len(merged)
            gaussians.append((event, count))
            continue
        places = [i for i, (other, _) in enumerate(merged) if other == event]
        if places:
            merged[places[0]] = (event, merged[places[0]][1] + count)
        else:
            merged.append((event, count))
    if gaussians:
        merged.insert(gaussian_place, (_one_gaussian(gaussians), 1))
    return tuple(merged)


def _one_gaussian(gaussians: list[tuple[DpEvent, int]]) -> DpEvent:
    first, count = gaussians[0]
    if len(gaussians) == 1 and count == 1:
        return first  # not rounded
    return dp_event.GaussianDpEvent(sum(n / event.noise_multiplier**2 for event, n in gaussians) ** -0.5)


def describe(event: DpEvent) -> str:
    """The event in words, such as ``500 x Poisson(0.0424, Gaussian(1))``; for tables and messages."""
    match event:
        case dp_event.NoOpDpEvent():
            return "nothing"
        case dp_event.NonPrivateDpEvent():
            return "release without noise"
        case dp_event.SelfComposedDpEvent():
            return f"{event.count} x {describe(event.event)}"
        case dp_event.ComposedDpEvent():
            return " + ".join(describe(part) for part in event.events) or "nothing"
        case dp_event.ZCDpEvent():
            return f"zCDP(rho {event.rho:.4g}, xi {event.xi:.4g})"
        case SkellamDpEvent():
            return f"Skellam({event.stddev:.4g}, L1 {event.l1_sensitivity:.4g}, L2 {event.l2_sensitivity:.4g})"
        case dp_event.PoissonSampledDpEvent():
            return f"Poisson({event.sampling_probability:.4g}, {describe(event.event)})"
        case dp_event.SampledWithoutReplacementDpEvent():
            return f"{event.sample_size} of {event.source_dataset_size} without replacement({describe(event.event)})"
    name = type(event).__name__.removesuffix("DpEvent").removesuffix("Event")
    values = [getattr(event, field.name) for field in attr.fields(type(event))]
    return f"{name}({', '.join(describe(v) if isinstance(v, DpEvent) else _show(v) for v in values)})"


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def to_dict(event: DpEvent) -> dict[str, Any]:
    """The event as JSON values, losslessly: ``{"type": class name, field: value, ...}``, infinity as ``"inf"``.

    Raises:
      TypeError, ValueError: if ``check_event`` refuses it.
    """
    return _encode(check_event(event))


def _encode(value: Any) -> Any:
    if isinstance(value, DpEvent):
        fields = {field.name: _encode(getattr(value, field.name)) for field in attr.fields(type(value))}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, list | tuple):
        return [_encode(element) for element in value]
    if isinstance(value, numbers.Integral):
        return int(value)
    return "inf" if value == math.inf else float(value)


def from_dict(data: Any) -> DpEvent:
    """The inverse of ``to_dict``.

    Raises:
      ValueError: a sentence, if ``data`` names no known event, lacks or adds a field, or holds a number out of range.
    """
    if not isinstance(data, dict) or "type" not in data:
        raise ValueError(f'An event must be an object with a "type", such as "GaussianDpEvent"; got {data!r}.')
    name = data["type"]
    if not isinstance(name, str) or name not in EVENT_TYPES:
        raise ValueError(f"{name!r} is no known event; the known ones are {', '.join(EVENT_TYPES)}.")
    expected = {field.name for field in attr.fields(EVENT_TYPES[name])}
    given = set(data) - {"type"}
    if expected != given:
        raise ValueError(f"{name} needs exactly the fields {sorted(expected)}; got {sorted(given)}.")
    for field in attr.fields(EVENT_TYPES[name]):
        if (field.type is DpEvent) != isinstance(data[field.name], dict):
            raise ValueError(f"{field.name} of {name} does not fit; got {data[field.name]!r}.")
    try:
        return check_event(EVENT_TYPES[name](**{key: _decode(data[key]) for key in expected}))
    except TypeError as error:
        raise ValueError(str(error)) from error


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return from_dict(value)
    if isinstance(value, list):
        return [_decode(element) for element in value]
    return math.inf if value == "inf" else value
