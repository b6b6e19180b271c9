"""Degrees of anonymity of a table: k, l and t.

Rows that agree on the quasi-identifiers, the columns an attacker may know from elsewhere, form a class.

- k-anonymity: no class is smaller than k (Sweeney, 2002, "k-Anonymity: A Model for Protecting Privacy").
- l-diversity: no class has fewer than l values of a sensitive column, distinct or as exp of the entropy
  (Machanavajjhala, Kifer, Gehrke and Venkitasubramaniam, 2007, "l-Diversity: Privacy Beyond k-Anonymity").
- t-closeness: the distribution of the sensitive column in no class is farther than t from that in the table, in earth
  mover's distance (Li, Li and Venkatasubramanian, 2007, "t-Closeness: Privacy Beyond k-Anonymity and l-Diversity").

All three are heuristics about one table, with no guarantee against background knowledge or a second release, unlike
differential privacy: a column taken for harmless, or a neighbour who knows the others of a class, undoes them.
"""

from collections.abc import Mapping, Sequence

import numpy as np

Table = Mapping[str, np.ndarray]


def class_ids(table: Table, quasi_identifiers: Sequence[str]) -> np.ndarray:
    """The class of each row, int64 ``[rows]`` from 0: equal where all quasi-identifiers are.

    Raises:
      ValueError: for an unknown column, columns of different lengths, NaN, or an empty table.
    """
    if not quasi_identifiers:
        raise ValueError(f"Name at least one quasi-identifier; the table has {', '.join(table)}.")
    return joined([codes(table, name) for name in quasi_identifiers])


def k_anonymity(table: Table, quasi_identifiers: Sequence[str]) -> int:
    """The size of the smallest class; 1 = somebody is unique. Heuristic, no guarantee against background knowledge.

    Args:
      table: columns by name, each ``[rows]``.
      quasi_identifiers: names of the columns that an attacker may know.

    Raises:
      ValueError: as `class_ids`.
    """
    return int(np.bincount(class_ids(table, quasi_identifiers)).min())


def l_diversity(table: Table, quasi_identifiers: Sequence[str], sensitive: str, kind: str = "distinct") -> float:
    """The least number of sensitive values in a class: distinct ones, or exp of the entropy in nats. A heuristic.

    Args:
      table: columns by name, each ``[rows]``.
      quasi_identifiers: names of the columns that an attacker may know.
      sensitive: the column that is nobody's business.
      kind: "distinct" or "entropy", which is never larger.

    Raises:
      ValueError: as `class_ids`, or for another kind.
    """
    classes = class_ids(table, quasi_identifiers)
    return float(diversities(histograms(classes, codes(table, sensitive)), kind).min())


def t_closeness(table: Table, quasi_identifiers: Sequence[str], sensitive: str, ordered: bool = False) -> float:
    """The largest earth mover's distance of a class's sensitive values from the table's, between 0 and 1. A heuristic.

    With p of the class and q of the table over m values: ``sum |p - q| / 2`` if all values are equally far apart, and
    ``sum_i |sum_{j<=i} (p_j - q_j)| / (m - 1)`` if they are ordered.

    Args:
      table: columns by name, each ``[rows]``.
      quasi_identifiers: names of the columns that an attacker may know.
      sensitive: the column that is nobody's business.
      ordered: whether its values, sorted, are steps of equal size.

    Raises:
      ValueError: as `class_ids`.
    """
    classes = class_ids(table, quasi_identifiers)
    return float(distances(histograms(classes, codes(table, sensitive)), ordered).max())


def codes(table: Table, name: str) -> np.ndarray:
    """Whole numbers from 0 in place of a column's values, in their order."""
    if name not in table:
        raise ValueError(f"The table has no column {name!r}; it has {', '.join(map(repr, table))}.")
    column = np.asarray(table[name])
    if column.ndim != 1 or not len(column):
        raise ValueError(f"Column {name!r} must be [rows] with at least one row, and is {list(column.shape)}.")
    if column.dtype.kind == "f" and np.isnan(column).any():
        raise ValueError(f"Column {name!r} holds NaN, which equals nothing; write unknown values as a value.")
    return np.unique(column.astype(str) if column.dtype.kind == "O" else column, return_inverse=True)[1]


def joined(codes: Sequence[np.ndarray]) -> np.ndarray:
    """One code for each combination that occurs, int64 ``[rows]`` from 0."""
    if len({len(code) for code in codes}) > 1:
        raise ValueError(f"The columns have {[len(code) for code in codes]} rows; a table needs as many in each.")
    joined = codes[0]
    for code in codes[1:]:
        joined = np.unique(joined * (code.max() + 1) + code, return_inverse=True)[1]
    return joined


def histograms(classes: np.ndarray, values: np.ndarray) -> np.ndarray:
    """float64 ``[classes, values]``: rows of each class with each sensitive value."""
    if len(classes) != len(values):
        raise ValueError(f"The sensitive column has {len(values)} rows and the others {len(classes)}.")
    num_values = int(values.max()) + 1
    cells = np.bincount(classes * num_values + values, minlength=(int(classes.max()) + 1) * num_values)
    return cells.reshape(-1, num_values).astype(float)


def diversities(counts: np.ndarray, kind: str) -> np.ndarray:
    """Of each class, float64 ``[classes]``, from histograms ``[classes, values]``."""
    if kind == "distinct":
        return np.count_nonzero(counts, axis=1).astype(float)
    if kind != "entropy":
        raise ValueError(f'kind must be "distinct" or "entropy"; got {kind!r}.')
    shares = counts / counts.sum(1, keepdims=True)
    return np.exp(-np.sum(shares * np.log(np.where(counts > 0, shares, 1.0)), axis=1))


def distances(counts: np.ndarray, ordered: bool) -> np.ndarray:
    """Earth mover's distance of each class from all of them; 0 for empty classes."""
    sizes = counts.sum(1, keepdims=True)
    gap = np.where(sizes > 0, counts / np.maximum(sizes, 1) - counts.sum(0) / counts.sum(), 0.0)
    if ordered:
        return np.abs(np.cumsum(gap, axis=1)).sum(1) / max(counts.shape[1] - 1, 1)
    return np.abs(gap).sum(1) / 2
