"""Strategies: how the noise of one round is correlated with that of the rounds before it.

A strategy is a lower-triangular matrix C. Round t releases its sum plus row t of ``C^-1 Z``, with Z independent from
round to round. What a server step accumulates are prefix sums, and their noise, ``A C^-1 Z`` with A the matrix of
ones on and below its diagonal, can be far smaller than that of independent noise at the same epsilon: later rounds
take back what earlier ones added. `fedjax_rec.privacy.correlated` says what that costs in privacy.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax_privacy.matrix_factorization import streaming_matrix, toeplitz
from jax_privacy.matrix_factorization.streaming_matrix import StreamingMatrix
from scipy.optimize import minimize
from scipy.signal import lfilter


class Strategy(NamedTuple):
    """A lower-triangular matrix C, by what is needed of it; for any number of rounds.

    Attributes:
      name: for people, such as ``"banded_toeplitz(500, 8)"``.
      min_separation: rounds that a column of C reaches over. Columns at least so far apart share no row.
      column_norm: largest L2 norm of a column of C.
      noising: C^-1, one row a round, on pytrees of float32 arrays. Its state holds numbers of past noise.
      prefix_variances: ``num_rounds -> float64 [num_rounds]``, variances of the noise in the sums of rounds 0..t, where
        Z has variance 1: squared norms of the rows of A C^-1.
    """

    name: str
    min_separation: int
    column_norm: float
    noising: StreamingMatrix
    prefix_variances: Callable[[int], np.ndarray]


def expected_prefix_error(strategy: Strategy, num_rounds: int) -> float:
    """RMS over the prefixes of a run of the noise in a prefix sum, in units of the standard deviation of Z.

    At equal event and equal clip norm, the noise of two strategies compares as this times their ``column_norm``.
    """
    return float(np.sqrt(np.mean(strategy.prefix_variances(num_rounds))))


def identity() -> Strategy:
    """Independent noise: C is the identity; the same mechanism as `gaussian_noise`."""
    return Strategy("identity()", 1, 1.0, streaming_matrix.identity(), lambda n: np.arange(1.0, n + 1))


def banded_toeplitz(num_rounds: int, bands: int) -> Strategy:
    """``C[t, s] = c[t - s]`` for ``0 <= t - s < bands``, with the c of least mean squared error on prefix sums.

    The state is ``bands - 1`` copies of the parameters. More rounds than ``num_rounds`` are as private, and only less
    well chosen for.

    McKenna, 2024, "Scaling up the Banded Matrix Factorization Mechanism for Differentially Private ML"; the matrices
    are those of Choquette-Choo et al., 2023, "(Amplified) Banded Matrix Factorization: A unified approach to private
    training".

    Args:
      num_rounds: rounds of the run, for which c is chosen.
      bands: from 1, which is `identity`, to ``num_rounds``.

    Raises:
      ValueError: for bands out of that range.
    """
    if not 1 <= bands <= num_rounds:
        raise ValueError(f"bands must be between 1 and the number of rounds, {num_rounds}; got {bands}.")
    if bands == 1:
        return identity()
    coefficients = jnp.asarray(_best_coefficients(num_rounds, bands), jnp.float32)
    exact = np.asarray(coefficients, np.float64)  # what runs, to the last bit

    def prefix_variances(num_rounds):
        return np.cumsum(lfilter([1.0], exact, np.ones(num_rounds)) ** 2)

    noising = toeplitz.inverse_as_streaming_matrix(coefficients)
    name = f"banded_toeplitz({num_rounds}, {bands})"
    return Strategy(name, bands, float(np.linalg.norm(exact)), noising, prefix_variances)


@functools.lru_cache
def _best_coefficients(num_rounds: int, bands: int) -> tuple[float, ...]:
    """Minimises mean prefix variance times squared column norm, by its exact gradient: milliseconds, no compilation.

    With ``w = C^-1 1`` the prefix variances are the cumulative sums of ``w^2``, so round s counts once for each prefix
    that holds it; the gradient solves with the transpose of C, which is the same filter run backwards.
    """
    share = np.arange(num_rounds, 0, -1) / num_rounds

    def loss(tail):  # of c = (1, tail): a factor on c changes nothing
        c = np.append(1.0, tail)
        w = lfilter([1.0], c, np.ones(num_rounds))
        if not np.abs(w).max() < 1e100:  # past the rim of stable filters
            return 1e3, np.zeros(bands - 1)
        error = share @ w**2
        back = lfilter([1.0], c, (share * w)[::-1])[::-1]
        slope = np.array([-back[lag:] @ w[: num_rounds - lag] for lag in range(1, bands)])
        return np.log(error * (c @ c)), 2 * slope / error + 2 * tail / (c @ c)

    # Its square is the matrix of ones: the best C of this form where every round may reach over all others
    # (Fichtenberger et al., 2023, "Constant Matters: Fine-grained Error Bound on Differentially Private Continual
    # Observation").
    root = np.cumprod([(2 * k - 1) / (2 * k) for k in range(1, bands)])
    tail = minimize(loss, root, jac=True, method="L-BFGS-B", bounds=[(0, 1)] * (bands - 1)).x
    # Rounded, at no cost in error, so that a run resumed on another machine goes on with the same C.
    return (1.0, *np.round(tail, 4).tolist())


def tree(num_groups: int) -> Strategy:
    """The binary tree over the rounds of a turn, begun anew with each turn of ``num_groups`` rounds.

    Every node of the tree is noised once, and a prefix sum takes the nodes that tile it: one for each one-bit of its
    length. So round t adds the noise of the node that ends with it, and takes back that of the nodes below it. A round
    lies in at most one of these nodes a level. The state is one copy of the parameters a level. A power of two leaves
    the noise of a single node at the end of a turn.

    Kairouz et al., 2021, "Practical and Private (Deep) Learning without Sampling or Shuffling", here without the
    averaging over a node and its children (Honaker, 2015): it would need the noise of every node, not of these alone.

    Args:
      num_groups: rounds of a turn, which is how many groups of clients there must be, or more.

    Raises:
      ValueError: if that is not positive.
    """
    if num_groups < 1:
        raise ValueError(f"A turn needs at least one round; got {num_groups}.")
    levels = num_groups.bit_length()

    def init(like):
        return jnp.zeros((), jnp.int32), jnp.zeros((levels, *like.shape), jnp.float32)

    def next_noise(node, state):
        position, nodes = state
        # The trailing ones of the rounds before: nodes of these levels, side by side, are what the new node covers,
        # with this round. Each was set in this turn.
        level = jax.lax.population_count(position & ~(position + 1))
        covered = jnp.tensordot((jnp.arange(levels) < level).astype(jnp.float32), nodes, axes=1)
        return node - covered, ((position + 1) % num_groups, nodes.at[level].set(node))

    def prefix_variances(num_rounds):
        turns, rest = np.divmod(np.arange(1, num_rounds + 1), num_groups)
        return (turns * num_groups.bit_count() + np.bitwise_count(rest)).astype(np.float64)

    noising = StreamingMatrix.from_array_implementation(init, next_noise)
    return Strategy(f"tree({num_groups})", num_groups, float(np.sqrt(levels)), noising, prefix_variances)
