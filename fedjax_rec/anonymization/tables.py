# ruff: noqa: E741  (l is what the papers call it)
"""Tables generalised and suppressed until they reach k-anonymity, l-diversity and t-closeness.

Full-domain generalisation with suppression (Sweeney, 2002, "Achieving k-Anonymity Privacy Protection Using
Generalization and Suppression"); the degrees and their papers are in `degrees`. Heuristic, no guarantee against
background knowledge or a second release, unlike differential privacy.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fedjax_rec.anonymization.degrees import (
    Table,
    class_ids,
    codes,
    distances,
    diversities,
    histograms,
    joined,
    k_anonymity,
    l_diversity,
    t_closeness,
)
from fedjax_rec.anonymization.hierarchies import ANY, Hierarchy
from fedjax_rec.anonymization.losses import generalisation_loss
from fedjax_rec.anonymization.released import keep_users
from fedjax_rec.data.interactions import Interactions

_MOST_NODES = 20_000


@dataclass(frozen=True, eq=False)
class AnonymizedTable:
    """A generalised table; rows marked ``suppressed`` are no part of it and must not be handed out.

    Attributes:
      columns: by name ``[rows]``, rows as in the source; suppressed ones hold "*" in generalised and sensitive columns.
      levels: of each quasi-identifier, 0 = exact.
      suppressed: bool ``[rows]``.
      k: of the rows that are left.
      l: of these, None without a sensitive column.
      t: likewise.
      information_loss: mean over rows and quasi-identifiers of the normalised certainty penalty, 1 if suppressed.
    """

    columns: dict[str, np.ndarray]
    levels: dict[str, int]
    suppressed: np.ndarray
    k: int
    l: float | None
    t: float | None
    information_loss: float


def anonymize_table(
    table: Table,
    *,
    hierarchies: Mapping[str, Hierarchy],
    k: int,
    l: float | None = None,
    t: float | None = None,
    sensitive: str | None = None,
    kind: str = "distinct",
    ordered: bool = False,
    max_suppressed_share: float = 0.05,
) -> AnonymizedTable:
    """Generalises whole columns as little as reaches k, l and t, and suppresses the few rows that still stand out.

    Every column is lifted to one level of its hierarchy. A choice of levels will do if its classes that miss k, l or t
    are at most ``max_suppressed_share`` of the rows. Levels are searched from the bottom; what lies above a choice that
    will do is left out, and among these minimal ones the one of least information loss is taken. t is measured against
    the rows that are left, so classes go until all of them hold.

    Heuristic, no guarantee against background knowledge, unlike differential privacy; the levels depend on the data.

    Args:
      table: columns by name, each ``[rows]``; those without a hierarchy are copied, and may identify.
      hierarchies: of every quasi-identifier.
      k: smallest class.
      l: smallest diversity of the sensitive column, or None.
      t: largest distance, or None.
      sensitive: the sensitive column; needed for l and t, and reported on if given.
      kind: of `l_diversity`.
      ordered: of `t_closeness`.
      max_suppressed_share: of the rows, between 0 and 1.

    Raises:
      ValueError: as `class_ids`; for k larger than the table, l larger than the number of sensitive values, numbers
        out of range, or when no choice of levels will do.
    """
    names = tuple(hierarchies)
    class_ids(table, names)  # refuses bad columns before anything is generalised
    num_rows = len(table[names[0]])
    values = _checked(table, names, num_rows, k, l, t, sensitive, kind, max_suppressed_share)
    general = {name: [level.apply(np.asarray(table[name])) for level in hierarchies[name].levels] for name in names}
    coded = {name: [codes({name: column}, name) for column in general[name]] for name in names}
    losses = {name: [generalisation_loss(coded[name][0], code) for code in coded[name]] for name in names}

    found: list[tuple[float, tuple[int, ...], np.ndarray]] = []
    for node in _lattice([len(general[name]) for name in names]):
        if any(all(low <= high for low, high in zip(other, node, strict=True)) for _, other, _ in found):
            continue
        classes = joined([coded[name][level] for name, level in zip(names, node, strict=True)])
        left = _rows_left(classes, values, k, l, t, kind, ordered)
        if left.any() and np.count_nonzero(~left) <= max_suppressed_share * num_rows:
            lost = np.mean([losses[name][level] for name, level in zip(names, node, strict=True)], axis=0)
            found.append((float(np.where(left, lost, 1.0).mean()), node, left))
    if not found:
        raise ValueError(
            f"No generalisation reaches k={k}, l={l}, t={t} with at most {max_suppressed_share:.0%} of "
            f"{num_rows} rows suppressed; ask for less, or allow more suppression."
        )
    loss, node, left = min(found, key=lambda one: one[:2])
    columns = {name: np.asarray(values).copy() for name, values in table.items()}
    for name, level in zip(names, node, strict=True):
        columns[name] = np.where(left, general[name][level], ANY)
    if sensitive is not None and not left.all():
        columns[sensitive] = np.where(left, columns[sensitive].astype(str), ANY)
    rest = {name: column[left] for name, column in columns.items()} | (
        {} if sensitive is None else {sensitive: np.asarray(table[sensitive])[left]}
    )
    return AnonymizedTable(
        columns=columns,
        levels=dict(zip(names, node, strict=True)),
        suppressed=~left,
        k=k_anonymity(rest, names),
        l=None if sensitive is None else l_diversity(rest, names, sensitive, kind),
        t=None if sensitive is None else t_closeness(rest, names, sensitive, ordered),
        information_loss=loss,
    )


class UserRelease(NamedTuple):
    """Interactions whose user attributes are anonymous, and how they became so.

    Attributes:
      interactions: without suppressed users; only attributes with a hierarchy, and the sensitive one, are left.
      table: of all users of the source.
    """

    interactions: Interactions
    table: AnonymizedTable


def anonymize_users(
    interactions: Interactions,
    *,
    hierarchies: Mapping[str, Hierarchy],
    k: int,
    sensitive: str | None = None,
    **options,
) -> UserRelease:
    """`anonymize_table` on the user attributes; suppressed users leave with all their rows.

    This protects from those who know attributes. Items, times and ratings of a user are quasi-identifiers as well, and
    stay as they are: see `item_sets` and `microaggregation`.

    Args:
      interactions: with user attributes.
      hierarchies: of the attributes that stay; attributes without one are dropped.
      k: smallest class.
      sensitive: as in `anonymize_table`.
      **options: other arguments of `anonymize_table`.

    Raises:
      ValueError: as `anonymize_table`.
    """
    wanted = [*hierarchies] + ([] if sensitive is None else [sensitive])
    attributes = {name: interactions.user_attributes[name] for name in wanted if name in interactions.user_attributes}
    table = anonymize_table(attributes, hierarchies=hierarchies, k=k, sensitive=sensitive, **options)
    # Suppressed users leave, so the sensitive values of the others can stay as they are, without a "*" among them.
    exact = {} if sensitive is None else {sensitive: attributes[sensitive]}
    general = dataclasses.replace(interactions, user_attributes=table.columns | exact)
    return UserRelease(keep_users(general, ~table.suppressed, suffix=f"{k}-anonymous attributes"), table)


def _checked(table, names, num_rows, k, l, t, sensitive, kind, share) -> np.ndarray | None:
    """The codes of the sensitive column, or None; refuses what cannot be reached."""
    if not 1 <= k <= num_rows:
        raise ValueError(f"k must lie between 1 and the {num_rows} rows of the table; got {k}.")
    if not 0 <= share < 1:
        raise ValueError(f"max_suppressed_share must be at least 0 and below 1; got {share}.")
    if sensitive is None:
        if l is not None or t is not None:
            raise ValueError("l and t are about a sensitive column; name it, or leave them out.")
        return None
    if sensitive in names:
        raise ValueError(f"Column {sensitive!r} cannot be sensitive and a quasi-identifier; drop its hierarchy.")
    if kind not in ("distinct", "entropy"):
        raise ValueError(f'kind must be "distinct" or "entropy"; got {kind!r}.')
    values = codes(table, sensitive)
    distinct = int(values.max()) + 1
    if len(values) != num_rows:
        raise ValueError(f"Column {sensitive!r} has {len(values)} rows and the others {num_rows}.")
    if l is not None and not 1 <= l <= distinct:
        raise ValueError(f"l must lie between 1 and the {distinct} values of {sensitive!r}; got {l}.")
    if t is not None and not 0 <= t <= 1:
        raise ValueError(f"t must lie between 0 and 1; got {t}.")
    return values


def _lattice(depths: Sequence[int]) -> list[tuple[int, ...]]:
    """All choices of levels, the lower before the higher."""
    if math.prod(depths) > _MOST_NODES:
        raise ValueError(
            f"Hierarchies of {list(depths)} levels make {math.prod(depths)} choices, more than {_MOST_NODES}; "
            "use fewer columns or levels."
        )
    return sorted(itertools.product(*map(range, depths)), key=lambda node: (sum(node), node))


def _rows_left(classes, values, k, l, t, kind, ordered) -> np.ndarray:
    """bool ``[rows]``: rows of classes that hold k, l and t among the rows left."""
    good = np.bincount(classes) >= k
    if values is not None and (l is not None or t is not None):
        counts = histograms(classes, values)
        if l is not None:
            good &= diversities(counts, kind) >= l - 1e-9
        while t is not None and good.any():
            present = counts[good].any(0)  # what is suppressed altogether is no value of the release
            close = distances((counts * good[:, None])[:, present], ordered) <= t + 1e-9
            if np.array_equal(good & close, good):
                break
            good &= close
    return good[classes]
