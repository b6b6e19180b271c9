"""How far virtual users are from real ones, beside how far real users are from other real users.

A distance alone says little: two samples of one population differ too. So each stands beside a control, held-out users
against train users in equal numbers, and beside as many virtual users against the same train users. Closeness is no
utility (see `utility`) and no risk (see `attacks.generator_membership`); copies of real users are at distance zero.
"""

from dataclasses import dataclass

import numpy as np
import scipy.stats

from fedjax_rec.data.interactions import Interactions
from fedjax_rec.models.ease import item_gram
from fedjax_rec.synthesis.populations import on_catalogue, take_users, with_rows

_SHRINKAGE = 10.0  # users; pairs of items with fewer say little


@dataclass(frozen=True)
class Distances:
    """Two sets of users compared. Every distance is symmetric, and zero for equal sets.

    With item shares p, q (rows of an item over all rows) and m = (p + q) / 2; with the co-occurrence C = X'X / users.

    Attributes:
      popularity_jensen_shannon: (KL(p | m) + KL(q | m)) / 2 in bits, from 0 to 1.
      popularity_total_variation: sum |p - q| / 2, from 0 to 1.
      popularity_spearman: rank correlation of the two; 1 is equal.
      length_kolmogorov: largest gap between the distribution functions of history lengths.
      length_wasserstein: area between them, in items.
      cooccurrence_frobenius: |C - D| / mean(|C|, |D|) off the diagonal.
      cooccurrence_correlation: of the entries of C and D off the diagonal; 1 is equal.
      cosine_frobenius, cosine_correlation: the same of n_ij / (sqrt(n_i n_j) + 10), with n users of an item or a pair:
        the cosine between items, rare ones shrunk towards 0, which popularity alone does not fill.
      lift_correlation: of log((n_ij + 1) / (n_i n_j / users + 1)), pointwise mutual information shrunk towards 0.
    """

    popularity_jensen_shannon: float
    popularity_total_variation: float
    popularity_spearman: float
    length_kolmogorov: float
    length_wasserstein: float
    cooccurrence_frobenius: float
    cooccurrence_correlation: float
    cosine_frobenius: float
    cosine_correlation: float
    lift_correlation: float


@dataclass(frozen=True)
class Shape:
    """One set of users alone.

    Attributes:
      num_users, num_interactions: with a row.
      mean_length, median_length: items of a user.
      coverage: share of the catalogue that occurs.
      gini: of the items' counts over the catalogue; 0 = all alike.
    """

    num_users: int
    num_interactions: int
    mean_length: float
    median_length: float
    coverage: float
    gini: float


@dataclass(frozen=True)
class Fidelity:
    """Virtual against real users, with the control.

    Attributes:
      distances: all virtual users against all train users.
      distances_same_size: as many of both as there are held-out users (or fewer, see ``control_users``).
      control: held-out users against train users, as many of both.
      control_users: how many that is.
      virtual, real: the sets alone.
    """

    distances: Distances
    distances_same_size: Distances
    control: Distances
    control_users: int
    virtual: Shape
    real: Shape


def fidelity(real: Interactions, virtual: Interactions, *, held_out: Interactions, seed: int = 0) -> Fidelity:
    """Compares virtual with real users, and real users with each other.

    Args:
      real: the train users.
      virtual: virtual users.
      held_out: real users that the generator never saw.
      seed: of the users that are drawn for equal numbers.

    Raises:
      ValueError: for another catalogue, or an empty set.
    """
    virtual, held_out = on_catalogue(virtual, real), on_catalogue(held_out, real)
    rng = np.random.default_rng([seed, 5])
    size = min(with_rows(users).num_users for users in (real, virtual, held_out))

    def some(users: Interactions) -> Interactions:
        users = with_rows(users)
        return take_users(users, np.sort(rng.permutation(users.num_users)[:size]))

    few = some(real)
    return Fidelity(
        distances=distances(real, virtual),
        distances_same_size=distances(few, some(virtual)),
        control=distances(few, some(held_out)),
        control_users=size,
        virtual=shape(virtual),
        real=shape(real),
    )


def distances(first: Interactions, second: Interactions) -> Distances:
    """Every distance between two sets of users of one catalogue; users without rows do not count."""
    first, second = with_rows(first), with_rows(second)
    p, q = (users.item_counts / users.num_interactions for users in (first, second))
    middle = (p + q) / 2
    lengths = first.counts_per_user, second.counts_per_user
    grams = [item_gram(users) for users in (first, second)]
    some = (p + q) > 0  # items that neither has are alike in both, and would only dilute
    grams = [gram[np.ix_(some, some)] for gram in grams]
    upper = np.triu_indices(len(grams[0]), 1)
    sizes = (first.num_users, second.num_users)
    joint = [gram[upper] / size for gram, size in zip(grams, sizes, strict=True)]
    cosine = [_cosine(gram)[upper] for gram in grams]
    lift = [_lift(gram, size)[upper] for gram, size in zip(grams, sizes, strict=True)]
    return Distances(
        popularity_jensen_shannon=float((_bits(p, middle) + _bits(q, middle)) / 2),
        popularity_total_variation=float(np.abs(p - q).sum() / 2),
        popularity_spearman=_spearman(p, q),
        length_kolmogorov=_kolmogorov(*lengths),
        length_wasserstein=float(scipy.stats.wasserstein_distance(*lengths)),
        cooccurrence_frobenius=_relative(*joint),
        cooccurrence_correlation=_correlation(*joint),
        cosine_frobenius=_relative(*cosine),
        cosine_correlation=_correlation(*cosine),
        lift_correlation=_correlation(*lift),
    )


def shape(users: Interactions) -> Shape:
    """What one set of users is like."""
    users = with_rows(users)
    counts = np.sort(users.item_counts).astype(np.float64)
    ranks = np.arange(1, len(counts) + 1)
    gini = float(((2 * ranks - len(counts) - 1) * counts).sum() / (len(counts) * counts.sum()))
    return Shape(
        num_users=users.num_users,
        num_interactions=users.num_interactions,
        mean_length=float(users.counts_per_user.mean()),
        median_length=float(np.median(users.counts_per_user)),
        coverage=float(np.mean(counts > 0)),
        gini=gini,
    )


def _kolmogorov(first: np.ndarray, second: np.ndarray) -> float:
    points = np.union1d(first, second)
    shares = [np.searchsorted(np.sort(sample), points, side="right") / len(sample) for sample in (first, second)]
    return float(np.abs(shares[0] - shares[1]).max())


def _bits(p: np.ndarray, q: np.ndarray) -> float:
    some = p > 0
    return float((p[some] * np.log2(p[some] / q[some])).sum())


def _cosine(gram: np.ndarray) -> np.ndarray:
    root = np.sqrt(np.diag(gram))
    return gram / (np.outer(root, root) + _SHRINKAGE)


def _lift(gram: np.ndarray, num_users: int) -> np.ndarray:
    counts = np.diag(gram)
    return np.log((gram + 1) / (np.outer(counts, counts) / num_users + 1))


def _relative(first: np.ndarray, second: np.ndarray) -> float:
    size = (np.linalg.norm(first) + np.linalg.norm(second)) / 2
    return float(np.linalg.norm(first - second) / size) if size else 0.0


def _spearman(first: np.ndarray, second: np.ndarray) -> float:
    return _correlation(scipy.stats.rankdata(first), scipy.stats.rankdata(second))


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's, and 1 for equal arrays without spread."""
    if np.array_equal(first, second):
        return 1.0
    first, second = first - first.mean(), second - second.mean()
    size = np.linalg.norm(first) * np.linalg.norm(second)
    return float(first @ second / size) if size else 0.0
