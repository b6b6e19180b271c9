"""What is done to data before it is handed out, as a TOML file that people can read, discuss and publish.

Each section is a step and a section that is not there is a step that is not taken. Steps run in the order of `Policy`,
whatever the order of the file. A policy is public and fixed before the data is looked at: choices that were made to
suit the data tell something of it.
"""

import dataclasses
import difflib
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedjax_rec.anonymization.hierarchies import Hierarchy, bands, groups, movielens_hierarchies, prefixes, suppression

EXAMPLE = """\
# What is done to a data set before it is handed out: `fedjax-rec anonymize --policy FILE`.
# Leave a section out to leave its step out. Attributes of users that no section names are not released.

[attributes]                       # k-anonymity of the table of users; users it cannot hide are left out
k = 5                              # each combination of values belongs to at least 5 users
max_suppressed_share = 0.05        # at most so many users are left out before values are made coarser
sensitive = "occupation"           # a column that is released as it is, and that must not be told by the others
l = 2                              # so each combination has at least 2 different occupations,
t = 0.6                            # spread as in the whole table, up to this distance

[attributes.hierarchies]           # how each column may be made coarser, from exact to "*"
age = { bands = [5, 10, 20], unknown = 0 }
zip_code = { prefixes = [4, 3, 2, 1] }
gender = "suppression"             # as it is or "*"; "movielens" takes the built-in one of that name

[times]
to = "month"                       # hour, day, week, month, quarter, year, or none

[ratings]
to = "liked"                       # whole, liked, or none
liked_from = 4.0

# One of the next three changes who has which items.
[replacement]                      # a share of each user's items is exchanged for those of a virtual user
share = 0.2
virtual = "popularity"             # or a file that `load` reads

# [microaggregation]               # groups of at least k similar users, who all get the group's items
# k = 5
# times = "drop"                   # or "group": means over the members
# min_members = 2                  # what fewer members had is not released

# [randomized_response]            # every item of the catalogue by a biased coin: epsilon for each item
# epsilon_per_item = 6.0
# expected_items = 100             # a public number: records of that length keep it, on average

[items]                            # any m items of a user are also had by k - 1 others, or rows are left out
k = 5
m = 2

[pseudonyms]                       # user labels become keyed pseudonyms, under a fresh key that is kept apart
"""

VIRTUAL = "popularity"
SPANS = ("hour", "day", "week", "month", "quarter", "year", "none")
RATINGS = ("whole", "liked", "none")


@dataclass(frozen=True)
class Attributes:
    """k-anonymity, l-diversity and t-closeness of the users' attributes; see `tables.anonymize_table`.

    Attributes:
      hierarchies: how each quasi-identifier may be made coarser, by column.
      k, l, t: what the released table must hold.
      sensitive: a column that is released as it is; l and t are about it.
      max_suppressed_share: share of the users that may be left out.
    """

    hierarchies: Mapping[str, Hierarchy]
    k: int
    l: int | None = None  # noqa: E741 - the letter of l-diversity
    t: float | None = None
    sensitive: str | None = None
    max_suppressed_share: float = 0.05


@dataclass(frozen=True)
class Times:
    """Coarser times; see `hierarchies.coarsen_times`."""

    to: str


@dataclass(frozen=True)
class Ratings:
    """Coarser ratings; see `hierarchies.coarsen_ratings`."""

    to: str
    liked_from: float = 4.0


@dataclass(frozen=True)
class Replacement:
    """A share of each user's items exchanged for a virtual user's: "popularity", or the path of a data set."""

    share: float
    virtual: str = VIRTUAL


@dataclass(frozen=True)
class Microaggregation:
    """Groups of at least k similar users who share one history, without times ("drop") or with mean ones ("group").

    Items that fewer than `min_members` of a group had are not released.
    """

    k: int
    times: str = "drop"
    min_members: int = 2


@dataclass(frozen=True)
class RandomizedResponse:
    """Each item of the catalogue present or absent by a biased coin; records of `expected_items` keep their length."""

    epsilon_per_item: float
    expected_items: float | None = None


@dataclass(frozen=True)
class Items:
    """k^m-anonymity of item sets."""

    k: int
    m: int = 2


@dataclass(frozen=True)
class Pseudonyms:
    """Keyed pseudonyms instead of user labels."""


@dataclass(frozen=True)
class Policy:
    """The steps in the order in which they run; None = not taken.

    Raises:
      ValueError: for two steps that change who has which items, as what either promises would not hold of both; and
        for attributes beside a step that must drop them.
    """

    attributes: Attributes | None = None
    times: Times | None = None
    ratings: Ratings | None = None
    microaggregation: Microaggregation | None = None
    replacement: Replacement | None = None
    randomized_response: RandomizedResponse | None = None
    items: Items | None = None
    pseudonyms: Pseudonyms | None = None

    def __post_init__(self) -> None:
        names = ("microaggregation", "replacement", "randomized_response")
        taken = [name for name in names if getattr(self, name) is not None]
        if len(taken) > 1:
            raise ValueError(
                f"[{taken[0]}] and [{taken[1]}] both change who has which items, and what each promises would not "
                "hold of the other's result; keep one."
            )
        if self.attributes is not None and taken in (["microaggregation"], ["randomized_response"]):
            raise ValueError(
                f"[{taken[0]}] drops the users' attributes, which would undo it; leave [attributes] out of the policy."
            )


_SECTIONS = {
    "attributes": Attributes,
    "times": Times,
    "ratings": Ratings,
    "microaggregation": Microaggregation,
    "replacement": Replacement,
    "randomized_response": RandomizedResponse,
    "items": Items,
    "pseudonyms": Pseudonyms,
}


def read_policy(path: str | os.PathLike) -> Policy:
    """Reads a policy file.

    Raises:
      ValueError: a sentence with the file, the section and the key that is wrong, and the nearest right one.
      OSError: if the file cannot be read.
    """
    path = Path(path)
    try:
        return parse_policy(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error


def parse_policy(text: str) -> Policy:
    """The policy in the text of a TOML file; errors as of `read_policy`."""
    try:
        sections = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"this is no TOML: {error}.") from error
    made = {}
    for name, values in sections.items():
        _check_known(name, _SECTIONS, "the policy has no section", "sections")
        if not isinstance(values, dict):
            raise ValueError(f"{name} must be a section; write [{name}] and its keys below it.")
        made[name] = _section(name, values)
    if not made:
        raise ValueError("the policy has no section, so nothing would be done; see --print-policy for an example.")
    return Policy(**made)


def describe(policy: Policy) -> dict[str, Any]:
    """The policy as JSON values, with the levels of each hierarchy by name."""
    described = {}
    for name in _SECTIONS:
        section = getattr(policy, name)
        if section is None:
            continue
        described[name] = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
        if name == "attributes":
            hierarchies = section.hierarchies
            levels = {column: [level.name for level in made.levels] for column, made in hierarchies.items()}
            described[name]["hierarchies"] = levels
    return described


def _section(name: str, values: dict[str, Any]) -> Any:
    fields = {field.name: field for field in dataclasses.fields(_SECTIONS[name])}
    for key in values:
        _check_known(key, fields, f"[{name}] has no key", "keys")
    for key, field in fields.items():
        if field.default is dataclasses.MISSING and key not in values:
            raise ValueError(f"[{name}] needs the key {key!r}; see --print-policy for an example.")
    for key, value in values.items():
        _check_value(name, key, value)
    if name == "microaggregation" and values["k"] < values.get("min_members", 2):
        raise ValueError(
            f"[microaggregation] k = {values['k']} members are fewer than min_members = {values['min_members']}; lower "
            "the latter."
        )
    if name == "attributes":
        made = {column: _hierarchy(column, value) for column, value in values["hierarchies"].items()}
        if values.get("sensitive") in made:
            raise ValueError(
                f"[attributes] has {values['sensitive']!r} as sensitive and as quasi-identifier; drop its hierarchy, "
                "or name another sensitive column."
            )
        if "sensitive" not in values and {"l", "t"} & {*values}:
            raise ValueError("[attributes] l and t are about a sensitive column; name it with the key 'sensitive'.")
        values = values | {"hierarchies": made}
    return _SECTIONS[name](**values)


def _whole(low: int):
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= low


def _number(low: float, high: float = float("inf"), *, above: bool = False):
    def fits(value: Any) -> bool:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and (low < value if above else low <= value) and value <= high and value != float("inf")

    return fits


_VALUES = {
    ("attributes", "hierarchies"): (lambda v: isinstance(v, dict) and bool(v), "a table with a hierarchy a column"),
    ("attributes", "k"): (_whole(2), "a whole number from 2 on"),
    ("attributes", "l"): (_whole(1), "a whole number from 1 on"),
    ("attributes", "t"): (_number(0, 1), "a number from 0 to 1"),
    ("attributes", "sensitive"): (lambda v: isinstance(v, str), "the name of a column"),
    ("attributes", "max_suppressed_share"): (lambda v: _number(0, 1)(v) and v < 1, "a number from 0 to below 1"),
    ("times", "to"): (lambda v: v in SPANS, f"one of {', '.join(SPANS)}"),
    ("ratings", "to"): (lambda v: v in RATINGS, f"one of {', '.join(RATINGS)}"),
    ("ratings", "liked_from"): (_number(float("-inf")), "a number"),
    ("microaggregation", "k"): (_whole(2), "a whole number from 2 on"),
    ("microaggregation", "times"): (lambda v: v in ("drop", "group"), '"drop" or "group"'),
    ("microaggregation", "min_members"): (_whole(1), "a whole number from 1 on"),
    ("replacement", "share"): (_number(0, 1, above=True), "a number above 0, up to 1"),
    ("replacement", "virtual"): (lambda v: isinstance(v, str) and bool(v), f"{VIRTUAL!r} or the path of a data set"),
    ("randomized_response", "epsilon_per_item"): (_number(0, above=True), "a number above 0"),
    ("randomized_response", "expected_items"): (_number(0, above=True), "a number above 0"),
    ("items", "k"): (_whole(2), "a whole number from 2 on"),
    ("items", "m"): (_whole(1), "a whole number from 1 on"),
}


def _check_value(section: str, key: str, value: Any) -> None:
    fits, wanted = _VALUES[section, key]
    if not fits(value):
        raise ValueError(f"[{section}] {key} must be {wanted}, and is {value!r}.")


def _hierarchy(column: str, value: Any) -> Hierarchy:
    built_in = movielens_hierarchies()
    if value == "suppression":
        return suppression(column)
    if value == "movielens":
        _check_known(column, built_in, "there is no built-in hierarchy for the column", "columns with one")
        return built_in[column]
    makers = {"bands": {"unknown"}, "prefixes": set(), "groups": {"otherwise"}}
    kinds = [kind for kind in makers if isinstance(value, dict) and kind in value]
    unfit = ValueError(
        f'[attributes.hierarchies] {column} must be "suppression", "movielens", {{ bands = [5, 10] }} (perhaps with '
        f"unknown = 0), {{ prefixes = [3, 2] }} or {{ groups = {{ value = 'group' }} }} (perhaps with otherwise = "
        f"'other'), and is {value!r}."
    )
    if len(kinds) != 1 or set(value) - makers[kinds[0]] - {kinds[0]}:
        raise unfit
    options = {key: option for key, option in value.items() if key != kinds[0]}
    try:
        return {"bands": bands, "prefixes": prefixes, "groups": groups}[kinds[0]](column, value[kinds[0]], **options)
    except TypeError:
        raise unfit from None
    except ValueError as error:
        raise ValueError(f"[attributes.hierarchies] {column}: {error}") from error


def _check_known(key: str, known: Mapping[str, Any], complaint: str, what: str) -> None:
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        hint = f", did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"{complaint} {key!r}{hint} The {what} are {', '.join(known)}.")
