"""Who masks with whom in a secure sum: a random circulant graph, and how many neighbours and shares it takes.

Clients stand on a circle in a random, public order, and each is a neighbour of the ``k / 2`` next ones on either side
(Bell, Bonawitz, Gascon, Lepoint and Raykova, 2020, "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead").
A secret of a client has ``k + 1`` holders, its neighbours and itself, and any ``t`` of them can rebuild it.
"""

import functools
import hashlib
import math
from typing import NamedTuple

import numpy as np
from scipy.stats import hypergeom

COMPLETE_UP_TO = 32
"""Cohorts so small take the complete graph: a sparse one saves little and promises less."""


class GraphParameters(NamedTuple):
    """Neighbours per client, and how many of the ``degree + 1`` holders of a secret rebuild it."""

    degree: int
    threshold: int


@functools.lru_cache(maxsize=256)
def graph_parameters(
    num_clients: int,
    *,
    corrupt_fraction: float = 0.1,
    dropout_fraction: float = 0.3,
    security_bits: float = 40,
    correctness_bits: float = 20,
    majority: bool = False,
) -> GraphParameters:
    """The smallest degree, with a threshold for it, at which the three bad events of Bell et al. (2020) are rare.

    With ``c`` colluding and ``d`` dropped clients among n, chosen without knowledge of the graph's random order:

    - Some client has t or more colluding neighbours, who could rebuild its secrets: hypergeometric tail, times n.
    - The graph of the others falls apart, and the server learns the sum of each part. That takes two separate runs of
      ``k / 2`` clients on the circle that all collude or dropped: at most ``n^2 / 2`` pairs of runs, each with
      probability ``prod_{i<k} (c + d - i) / (n - i)``.
    - Some client has fewer than t neighbours left, and there is no sum: hypergeometric tail, times n.

    The first two have probability at most ``2^-security_bits`` together, the third ``2^-correctness_bits``. Up to
    `COMPLETE_UP_TO` clients, or if no sparse graph will do, the graph is complete, t is a majority of the n holders
    (or n - d, if that is less), and only t - 1 or more colluding clients matter.

    Args:
      num_clients: n, at least 2.
      corrupt_fraction: c / n, rounded down: clients who pool what they see with the server.
      dropout_fraction: d / n, rounded down: clients who fall silent in one round.
      security_bits: minus log2 of the chance that a graph is unsafe.
      correctness_bits: minus log2 of the chance that a round gives no sum.
      majority: also ask for ``t > (k + 1) / 2``; see `SecAggConfig`. Takes nearly twice the neighbours.

    Raises:
      ValueError: for numbers out of range, or if not even the complete graph will do.
    """
    if num_clients < 2:
        raise ValueError(f"A secure sum takes at least 2 clients; got {num_clients}.")
    if min(corrupt_fraction, dropout_fraction) < 0 or corrupt_fraction + dropout_fraction >= 1:
        raise ValueError(
            "corrupt_fraction and dropout_fraction must not be negative and stay below 1 together; got "
            f"{corrupt_fraction} and {dropout_fraction}."
        )
    corrupt = math.floor(corrupt_fraction * num_clients + 1e-9)
    dropped = math.floor(dropout_fraction * num_clients + 1e-9)
    if num_clients > COMPLETE_UP_TO:
        for degree in range(2, num_clients - 1, 2):
            if _log2_disconnected(num_clients, corrupt + dropped, degree) > -(security_bits + 1):
                continue
            thresholds = np.arange(2, degree + 1)
            others = num_clients - 1
            exposed = hypergeom.sf(thresholds - 1, others, corrupt, degree)
            stuck = hypergeom.cdf(thresholds - 1, others, others - dropped, degree)
            fits = exposed * num_clients <= 2.0 ** -(security_bits + 1)
            fits &= stuck * num_clients <= 2.0**-correctness_bits
            fits &= (2 * thresholds > degree + 1) | (not majority)
            if fits.any():
                return GraphParameters(degree, int(thresholds[fits][0]))
    threshold = min(num_clients // 2 + 1, num_clients - dropped)
    if threshold <= max(corrupt, 1) or (majority and 2 * threshold <= num_clients):
        raise ValueError(
            f"No threshold suits {num_clients} clients of whom {corrupt} may collude and {dropped} drop out: it would "
            f"be {threshold}. Allow fewer of either."
        )
    return GraphParameters(num_clients - 1, threshold)


def _log2_disconnected(num_clients: int, removed: int, degree: int) -> float:
    """log2 of the union bound on two disjoint runs of degree / 2 removed clients."""
    if degree > removed:
        return -math.inf
    pairs = 2 * math.log2(num_clients) - 1
    return pairs + sum(math.log2((removed - i) / (num_clients - i)) for i in range(degree))


def protocol_bytes(degree: int, num_clients: int) -> tuple[int, int]:
    """Bytes that one client sends and receives in a secure sum beside its vector, when nobody drops out.

    Keys, sealed shares, confirmations and revealed shares, as `fedjax_rec.security.secagg` encodes them: so much for
    the client, so much for each neighbour, and four bytes for each other client in the list of survivors.
    """
    others = max(num_clients - 1 - degree, 0)
    return 326 + 143 * degree, 152 + 178 * degree + 4 * others


def neighbor_offsets(num_clients: int, degree: int) -> np.ndarray:
    """Steps round the circle from a client to its neighbours, int32 ``[degree]``: 1, -1, 2, -2, ...

    Raises:
      ValueError: for a degree that is neither even nor ``num_clients - 1``, or out of range.
    """
    if not 1 <= degree < num_clients or (degree % 2 and degree != num_clients - 1):
        raise ValueError(
            f"The degree must be an even number below {num_clients}, the number of clients, or {num_clients - 1}; "
            f"got {degree}."
        )
    if degree == num_clients - 1:
        return np.arange(1, num_clients, dtype=np.int32)
    steps = np.arange(1, degree // 2 + 1, dtype=np.int32)
    return np.stack([steps, -steps], axis=1).reshape(-1)


def neighbors(num_clients: int, *, degree: int, permutation: np.ndarray) -> np.ndarray:
    """The neighbours of every client, int32 ``[num_clients, degree]``; the relation is symmetric, nobody is their own.

    Args:
      num_clients: n, at least 2.
      degree: neighbours per client; even, or n - 1 for the complete graph.
      permutation: ``[n]``, the client who stands at each place of the circle: public randomness of the round.

    Raises:
      ValueError: for a degree that no such graph has, or something else than a permutation of 0 ... n - 1.
    """
    order = np.asarray(permutation)
    if order.shape != (num_clients,) or not np.array_equal(np.sort(order), np.arange(num_clients)):
        raise ValueError(f"permutation must hold each of 0 ... {num_clients - 1} once; got shape {order.shape}.")
    places = np.arange(num_clients)[:, None] + neighbor_offsets(num_clients, degree)
    found = np.empty((num_clients, degree), np.int32)
    found[order] = order[places % num_clients]
    return found


def public_permutation(num_clients: int, seed: bytes) -> np.ndarray:
    """An order of the clients, int32 ``[num_clients]``, that everybody derives from a public seed.

    Clients are sorted by SHA-256 of the seed and their number, so the order is the same on every machine.
    """
    digests = [hashlib.sha256(seed + client.to_bytes(4, "little")).digest() for client in range(num_clients)]
    return np.array(sorted(range(num_clients), key=digests.__getitem__), np.int32)
