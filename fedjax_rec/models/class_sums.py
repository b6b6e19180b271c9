"""Class means of clients' vectors, from one user-level private release of class sums, with the class names as a prior.

Everyone knows the names of the classes and a frozen encoder, so everyone has a vector p_c of each name. What tells
classes apart lies mostly in the span of these about their mean, so a vector x is taken as its coordinates there: at
most classes - 1 of them, k, instead of the encoder's hundreds, with less norm to clip and less noise to bear.

A client u with rows (x_j, y_j) sends, for every class c, what its rows have beyond half the name, and their number,

    R_uc = sum_{j: y_j = c} (x_j - a p_c)        n_uc = gamma |{j: y_j = c}|        a = 1/2,

the whole of it scaled to L2 norm 1, so that nobody's bound is left unused. The server has R_c = sum_u R_uc + noise and
n_c likewise (over gamma), both on the scale of a clipped row, kappa = 1 / sqrt(rows of a client (3/4 + gamma^2)).

The mean of a class is then the posterior mean of a Gaussian prior around a p_c,

    m_c = a p_c + R_c / (n_c + w_c)        w_c = (s^2 k / n_c + kappa sigma_w^2) / tau^2,

where s is the noise's standard deviation, tau^2 how far the mean of a class lies from a p_c, squared, and sigma_w^2 the
spread of a class around its mean. Noise makes w large and the names win; data makes n large and the data win.

One assumption fixes a, tau^2, sigma_w^2 and kappa, and no weight is tuned: vectors have norm 1, and two sentences of
one class, or one of them and the name of the class, have cosine 1/2. So the mean has squared norm 1/2; its distance
|mean - a p|^2 = 1/2 - a + a^2 is least at a = 1/2, where it is tau^2 = 1/4; rows lie sigma_w^2 = 1 - 1/2 around their
mean, so |x - p / 2|^2 is 3/4. Everything else in w_c is public or released. Half is a round number, to be
judged by knowledge of the encoder; in CLINC150 through all-MiniLM-L6-v2 a train query and its name have .51.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_rec.federated.algorithm import Algorithm, ClientOutput, ServerState
from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.models.base import Shared
from fedjax_rec.models.labelled_vectors import LabelledVectors, clients_without_items, empty
from fedjax_rec.privacy.ledger import Ledger
from fedjax_rec.privacy.mechanisms import global_norm, user_level_dp

NAME_SHARE = 0.5  # a
MEAN_SPREAD = 0.25  # tau^2
ROW_SPREAD = 0.5  # sigma_w^2
COUNT_WEIGHT = 0.3  # gamma: a count then takes a tenth of a contribution's squared norm, .09 of .84


class NameSpace(NamedTuple):
    """Coordinates in the span of the names' vectors about their mean; public.

    Attributes:
      center: float32 ``[dim]``, the mean of the names.
      basis: float32 ``[k, dim]``, orthonormal rows.
      names: float32 ``[classes, k]``, the names' own coordinates.
    """

    center: np.ndarray
    basis: np.ndarray
    names: np.ndarray

    def coordinates(self, vectors: np.ndarray) -> np.ndarray:
        """Of vectors ``[..., dim]``: float32 ``[..., k]``; never longer than the vector less the centre."""
        return ((vectors - self.center) @ self.basis.T).astype(np.float32)


class DpClassSums(NamedTuple):
    """One release and what it costs.

    Attributes:
      sums: float32 ``[classes, k]``, R_c with its noise.
      counts: float32 ``[classes]``, n_c with its noise; in clipped rows, so their scale is that of the sums.
      noise_stddev: s, of every entry of the sums; that of the counts is s / gamma.
      row_weight: kappa.
      ledger: the given one, and this release.
    """

    sums: np.ndarray
    counts: np.ndarray
    noise_stddev: float
    row_weight: float
    ledger: Ledger


def name_space(names: np.ndarray) -> NameSpace:
    """The coordinates that the classes' names span.

    Args:
      names: float ``[classes, dim]``, unit vectors of the names.
    """
    center = names.mean(0)
    _, spread, basis = np.linalg.svd(names - center, full_matrices=False)
    basis = basis[spread > 1e-4 * spread[0]]
    as32 = (np.asarray(x, np.float32) for x in (center, basis, (names - center) @ basis.T))
    return NameSpace(*as32)


def class_sums(names: np.ndarray, *, num_slots: int, count_weight: float = COUNT_WEIGHT) -> Algorithm:
    """One client's class sums as an update. Shared: dense "sums" ``[classes, k]`` and "counts" ``[classes]``, means
    over clients of what they sent. Private: the client's `LabelledVectors`, which no round changes.

    Args:
      names: float ``[classes, k]``, coordinates of the names.
      num_slots: rows that a client has room for.
      count_weight: gamma, positive.

    Raises:
      ValueError: for a count_weight out of range.
    """
    if not 0 < count_weight < math.inf:
        raise ValueError(f"count_weight must be positive and finite; got {count_weight}.")
    num_classes, dim = names.shape
    centers = jnp.asarray(NAME_SHARE * names, jnp.float32)

    def init(key):
        del key
        dense = {"sums": jnp.zeros((num_classes, dim)), "counts": jnp.zeros(num_classes)}
        return ServerState(jnp.zeros((), jnp.int32), Shared({}, dense), ())

    def client_update(shared, private, client, num_steps, key):
        del shared, client, num_steps, key
        place = jnp.where(private.labels < 0, num_classes, private.labels)
        beyond = private.vectors - centers.at[place].get(mode="fill", fill_value=0)
        sums = jnp.zeros((num_classes, dim)).at[place].add(beyond, mode="drop")
        counts = jnp.zeros(num_classes).at[place].add(count_weight, mode="drop")
        norm = global_norm((sums, counts))
        scale = jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1.0), 0.0)
        update = Shared({}, {"sums": scale * sums, "counts": scale * counts})
        return ClientOutput(update, private, {"rows": jnp.sum(place < num_classes).astype(jnp.float32)})

    return Algorithm(
        init=init,
        init_private=lambda key: empty(num_slots, dim),
        client_update=client_update,
        num_steps=lambda client: jnp.int32(1),
        server_update=lambda state, aggregate: state._replace(shared=aggregate),
    )


def dp_class_sums(
    data: LabelledVectors,
    *,
    names: np.ndarray,
    rows_per_client: float,
    noise_multiplier: float,
    noise_key: jax.Array,
    ledger: Ledger | None = None,
    count_weight: float = COUNT_WEIGHT,
    chunk_size: int | None = None,
) -> DpClassSums:
    """The class sums of all clients, released once: one round of everybody through clip and noise.

    Guarantee: user-level, adding or removing one client with all of its rows, whose number, classes and vectors may be
    anything. Released are ``sums`` and ``counts``, jointly of L2 sensitivity 1 (in units of gamma for the counts), with
    Gaussian noise of standard deviation ``noise_multiplier`` in every entry: one Gaussian mechanism without
    amplification by sampling. Names, the number of clients and ``rows_per_client`` are public. ``noise_key`` must be
    secret and used for nothing else.

    Args:
      data: coordinates in the names' space, float32 ``[clients, slots, k]``, and labels.
      names: float ``[classes, k]``.
      rows_per_client: what is publicly expected of a client; sets kappa, and with it only the prior's weight.
      noise_multiplier: noise standard deviation over sensitivity; 0 releases exact numbers, whose epsilon is infinite.
      noise_key: of the noise.
      ledger: to charge; a new one by default.
      count_weight: gamma.
      chunk_size: clients side by side; never changes a result by more than rounding.

    Raises:
      ValueError: for numbers out of range, or a ledger of another unit or relation; nothing is released then.
    """
    num_clients, num_slots, _ = data.vectors.shape
    rounds = make_rounds(
        class_sums(names, num_slots=num_slots, count_weight=count_weight),
        user_level_dp(l2_clip_norm=1.0, noise_multiplier=noise_multiplier),
        full_participation(num_clients),
        clients_without_items(num_clients),
        span_size=1,
        chunk_size=chunk_size,
    )
    # A ledger that this release does not fit refuses here, before anything is released.
    ledger = rounds.charge(ledger or Ledger(), first_round=0, num_rounds=1, phase="class sums")
    nobody = jax.random.key(0)  # nothing is drawn for clients, and everybody takes part
    state, _ = rounds.init(nobody)
    own = LabelledVectors(*(jnp.array(x) for x in data))  # a copy: rounds take their private state for their own
    state, _, _ = rounds.run(state, own, RoundKeys(nobody, nobody, noise_key))
    total = {name: num_clients * np.asarray(value) for name, value in state.shared.dense.items()}
    return DpClassSums(
        sums=total["sums"],
        counts=total["counts"] / count_weight,
        noise_stddev=noise_multiplier,
        row_weight=1 / math.sqrt(rows_per_client * (ROW_SPREAD + MEAN_SPREAD + count_weight**2)),
        ledger=ledger,
    )


def denoised_counts(released: DpClassSums, *, count_weight: float = COUNT_WEIGHT) -> np.ndarray:
    """Counts pulled to their mean by the share of their variance that is noise: float64 ``[classes]``, >= 0."""
    counts = np.asarray(released.counts, np.float64)
    noise = (released.noise_stddev / count_weight) ** 2
    excess = max(counts.var() - noise, 0.0)
    share = excess / (excess + noise) if noise > 0 else 1.0
    return np.maximum(counts.mean() + share * (counts - counts.mean()), 0.0)


def prior_weight(counts: np.ndarray, *, noise_stddev: float, row_weight: float, dim: int) -> np.ndarray:
    """w_c of the module's head, in clipped rows, float64 ``[classes]``; infinite for a class of which there are none.

    Args:
      counts: n_c, float ``[classes]``.
      noise_stddev: s.
      row_weight: kappa.
      dim: k.
    """
    noise = np.divide(noise_stddev**2 * dim, counts, out=np.full(counts.shape, np.inf), where=counts > 0)
    return (noise + row_weight * ROW_SPREAD) / MEAN_SPREAD


def class_means(
    released: DpClassSums,
    names: np.ndarray,
    *,
    weight: np.ndarray | float | None = None,
    count_weight: float = COUNT_WEIGHT,
) -> np.ndarray:
    """Posterior means m_c of the classes, float64 ``[classes, k]``: post-processing of one release.

    Args:
      released: by `dp_class_sums`, with the same names and gamma.
      names: float ``[classes, k]``.
      weight: w_c instead of `prior_weight`'s; 0 leaves the names out but for the share a that clients subtracted.
      count_weight: gamma.
    """
    counts = denoised_counts(released, count_weight=count_weight)
    if weight is None:
        weight = prior_weight(
            counts, noise_stddev=released.noise_stddev, row_weight=released.row_weight, dim=names.shape[1]
        )
    both = counts + weight
    beyond = np.where(both[:, None] > 0, released.sums / np.where(both > 0, both, 1.0)[:, None], 0.0)
    return NAME_SHARE * np.asarray(names, np.float64) + beyond


def cosine_scores(vectors: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Cosines of rows ``[n, k]`` with class means ``[classes, k]``, float64 ``[n, classes]``; 0 for a zero vector."""
    return unit(vectors) @ unit(means).T


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to norm 1, float64; zero rows stay."""
    vectors = np.asarray(vectors, np.float64)
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1.0)
