"""Virtual users of a low-rank Gaussian, from two released moments of histories.

With r_u = x_u / |x_u|, the 0/1 row of a user's items at length 1, released are, each once and with Gaussian noise,

    m = sum_u r_u                                       all items
    G = sum_u d_u d_u^T    d_u = (r_u - m / N) / |r_u - m / N|    on the head: the items with the largest m.

A virtual user is the top items of

    score = b + V diag(sqrt(c lambda / N)) z + temperature * own,    z ~ N(0, I),

with V, lambda the eigenpairs of G that stand out of its noise, c = E|r - E r|^2 (which m tells), `own` independent
noise of the variance that the low rank leaves to each item, and b such that items come up as often as m says.

Three things make this better than one release of sum_u r_u r_u^T. Its largest eigenvalue is popularity, which m holds
at a fraction of the price; centring leaves all of a user's unit of sensitivity to how users differ. The noise of k
items has eigenvalues up to s sqrt(2 k), so the fewer items, the more directions stand out of it. And an eigenvalue y
that does stand out was moved there from l, y = l + edge^2 / (4 l), which can be undone (Benaych-Georges and Nadakuditi,
2011, "The eigenvalues and eigenvectors of finite, low rank perturbations of large random matrices").
"""

import math
from typing import NamedTuple

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from scipy.special import gamma

from fedjax_rec.data.interactions import Interactions
from fedjax_rec.models.dp_ease import noise_edge
from fedjax_rec.models.dp_gram import DpGram, svec_noise
from fedjax_rec.privacy.budget import Phase
from fedjax_rec.privacy.ledger import Entry
from fedjax_rec.synthesis.generator import Generator
from fedjax_rec.synthesis.marginals import COUNTS, release_counts
from fedjax_rec.synthesis.methods import Method

GRAM = "gram"
RELEASED_GRAM = "sum over users of d d^T, their centred row on the head items at length 1"
_USERS_AT_A_TIME = 4096  # bounds the dense rows that are held at once
_CALIBRATION_USERS, _CALIBRATION_STEPS, _DAMPING = 1024, 6, 0.8


class LatentGaussian(NamedTuple):
    """Parameters of the generator: functions of what was released alone."""

    offset: jax.Array  # float32 [items], b
    loadings: jax.Array  # float32 [items, rank], rows of the tail zero
    spread: jax.Array  # float32 [items], standard deviation of an item's own noise


def gram_method(
    *, rank: int = 50, temperature: float = 0.3, counts_weight: float = 1.5, head: int | None = None
) -> Method:
    """Virtual users of a low-rank Gaussian, from the two releases of the module's equation.

    Guarantee: user-level, adding or removing one user with all of its rows. Two Gaussian mechanisms on all users,
    without amplification by sampling, each of L2 sensitivity 1 (G in the coordinates `dp_gram.svec`), at the noise
    multipliers of the phases "counts" and "gram"; the second uses the first, which composition allows. The catalogue
    and the number of users with rows are public; everything else is post-processing of the two.

    The defaults were found on MovieLens 100K and 1M. That look is not in the epsilon of a release of these two.

    Args:
      rank: the most directions that are kept, whatever stands out of the noise.
      temperature: of the items' own noise. At 1 rows vary as real ones do, and recommenders learn less from them; at 0
        a virtual user is its z, and few rare items ever come up.
      counts_weight: noise of m in units of that of G: 1.5 spends three tenths of the budget.
      head: items of G; None = `head_size`, of the public numbers and the noise.

    Raises:
      ValueError: for numbers out of range.
    """
    if rank < 1 or not 0 <= temperature < math.inf or not counts_weight > 0 or (head is not None and head < 2):
        raise ValueError(
            f"gram_method needs rank >= 1, temperature >= 0, counts_weight > 0 and head >= 2; got {rank}, "
            f"{temperature}, {counts_weight} and {head}."
        )

    def phases(num_users, num_items):
        size = head_size(num_users, num_items, 1.0) if head is None else min(head, num_items)
        return (
            Phase(COUNTS, weight=counts_weight, num_numbers=num_items),
            Phase(GRAM, weight=1.0, num_numbers=size * (size + 1) // 2),
        )

    def fit(train, noise, key, report):
        counts_key, gram_key, calibration_key = jax.random.split(key, 3)
        multipliers = {name: float(noise[name][0]) for name in (COUNTS, GRAM)}
        num_users = max(int(np.count_nonzero(train.counts_per_user)), 1)
        released = release_counts(train, noise_multiplier=multipliers[COUNTS], key=counts_key)
        report(1, 4, "mean row released")
        # No share is smaller than a tenth of a user: an item that nobody took may still be drawn, rarely.
        mean = np.maximum(released.clean, 0.1) / num_users
        size = head_size(num_users, train.num_items, multipliers[GRAM]) if head is None else min(head, train.num_items)
        head_ids = np.sort(np.argsort(-mean, kind="stable")[:size])
        gram = centred_gram(train, mean, head_ids, noise_multiplier=multipliers[GRAM], key=gram_key)
        report(2, 4, f"centred Gram matrix of {size} items released")
        latent = _latent_gaussian(gram, mean, num_users, rank=rank, temperature=temperature)
        report(3, 4, f"{latent.loadings.shape[1]} directions stand out of the noise")
        mean_root_length = max(float(released.noised.sum()) / num_users, 1.0)  # the items of r_u sum to sqrt(n_u)
        latent = match_marginals(latent, mean, mean_root_length, key=calibration_key)
        report(4, 4, "popularity matched")
        private = min(multipliers.values()) > 0
        entries = (
            released.entry,
            Entry(GRAM, gram.dp_event, 1, "all", RELEASED_GRAM),
        )
        choices = {
            "rank": rank,
            "temperature": temperature,
            "counts_weight": counts_weight,
            "noise_multipliers": multipliers,
            "head_items": size,
            "head_chosen_by": "largest entries of the released mean row",
            "directions_kept": int(latent.loadings.shape[1]),
        }
        return Generator(
            name="gram",
            num_items=train.num_items,
            params=latent,
            scores=_scores,
            releases=entries if private else (),
            choices=choices,
            private=private,
        )

    return Method("gram", phases, fit)


def head_size(num_users: int, num_items: int, noise_multiplier: float) -> int:
    """Items of the released Gram matrix, 8 sqrt(N) / noise multiplier, at least 2 and at most all.

    The edge of its noise is then at 4 sqrt(s) N^(1/4), against eigenvalues that grow with N. Found on MovieLens 100K at
    epsilon 2 to 8, where two thirds or one and a half as many move the ratio of utility by at most .03.
    """
    if noise_multiplier == 0:
        return num_items
    return min(max(round(8 * math.sqrt(num_users) / noise_multiplier), 2), num_items)


def centred_gram(
    train: Interactions, mean: np.ndarray, item_ids: np.ndarray, *, noise_multiplier: float, key: jax.Array
) -> DpGram:
    """G of the module's equation on the items ``item_ids``, plus Gaussian noise as `dp_gram` adds it.

    Guarantee: user-level, adding or removing one user with all of its rows, for a ``mean`` and ``item_ids`` that are
    public or were released before and charged. Every user with a row adds d d^T with |d| = 1, so one user moves the
    coordinates svec(G) by 1 in L2 norm; users without rows add nothing. Released is G plus white noise of standard
    deviation ``noise_multiplier`` in those coordinates: one Gaussian mechanism without amplification by sampling, which
    `dp_event` states. ``key`` must be secret and used for nothing else.

    Args:
      train: rows; items unique within a user.
      mean: float ``[items]``, E r.
      item_ids: int ``[m]``, distinct.
      noise_multiplier: noise standard deviation over sensitivity; 0 releases exact numbers.
      key: of the noise.

    Raises:
      ValueError: for a negative noise multiplier.
    """
    if not (noise_multiplier >= 0 and math.isfinite(noise_multiplier)):
        raise ValueError(f"noise_multiplier must be 0 or more, and is {noise_multiplier}.")
    centre = np.asarray(mean, np.float32)[item_ids]
    users = np.flatnonzero(train.counts_per_user)
    gram = np.zeros((len(item_ids), len(item_ids)), np.float64)
    for start in range(0, len(users), _USERS_AT_A_TIME):
        rows = _unit_rows(train, users[start : start + _USERS_AT_A_TIME])[:, item_ids] - centre[None, :]
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        directions = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
        gram += directions.T @ directions
    return DpGram(
        gram=gram + noise_multiplier * svec_noise(key, len(item_ids)),
        item_ids=np.asarray(item_ids, np.int32),
        dp_event=dp_accounting.GaussianDpEvent(noise_multiplier),
        noise_stddev=noise_multiplier,
    )


def _unit_rows(train: Interactions, users: np.ndarray) -> np.ndarray:
    """r_u of some users who have rows, float32 ``[users, items]``."""
    counts = train.counts_per_user[users]
    places = np.repeat(np.arange(len(users)), counts)
    starts = np.repeat(train.offsets[users] - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts)
    dense = np.zeros((len(users), train.num_items), np.float32)
    dense[places, train.item_ids[starts + np.arange(len(places))]] = 1.0
    return dense / np.sqrt(dense.sum(axis=1, keepdims=True))


def _latent_gaussian(
    released: DpGram, mean: np.ndarray, num_users: int, *, rank: int, temperature: float
) -> LatentGaussian:
    """Directions above the noise, and the variance that they leave."""
    size = len(released.gram)
    kept = min(rank, size)
    values, vectors = scipy.linalg.eigh(
        released.gram.astype(np.float32), subset_by_index=(size - kept, size - 1), check_finite=False
    )
    edge = noise_edge(released)
    above = values > edge
    clean = undo_shift(values[above], edge)
    # E r_i^2 is about a share of E r_i: both are sums over users who took i, and all of E r_i^2 is 1.
    second = mean / mean.sum()
    centred = float(np.sum((second - np.square(mean))[released.item_ids]))
    loadings = np.zeros((len(mean), int(above.sum())))
    loadings[released.item_ids] = vectors[:, above] * np.sqrt(max(centred, 0.0) * clean / num_users)[None, :]
    left = np.maximum(second - np.square(mean) - np.square(loadings).sum(axis=1), 0.0)
    return LatentGaussian(
        offset=jnp.asarray(mean, jnp.float32),
        loadings=jnp.asarray(loadings, jnp.float32),
        spread=jnp.asarray(temperature * np.sqrt(left), jnp.float32),
    )


def undo_shift(values: np.ndarray, edge: float) -> np.ndarray:
    """Where eigenvalues, or singular values, y > edge stood before noise moved them: l of y = l + edge^2 / (4 l)."""
    return (values + np.sqrt(np.square(values) - edge**2)) / 2


def match_marginals(
    latent: LatentGaussian, mean: np.ndarray, mean_root_length: float, *, key: jax.Array
) -> LatentGaussian:
    """Moves offsets until E[x / |x|] of virtual users is about ``mean``. Post-processing of releases.

    Each step draws users, and moves each item's offset to where the right share of them (weighted by 1 / |x|) has it in
    their histories. The true lengths belong to another release; here they are exponential with E sqrt(n) as released.

    Args:
      latent: to be calibrated.
      mean: float ``[items]``, the target.
      mean_root_length: E sqrt(n), at least 1.
      key: of the draws.
    """
    num_items = len(mean)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    offset = np.asarray(latent.offset, np.float32)
    loadings, spread = np.asarray(latent.loadings), np.asarray(latent.spread)
    mean_length = (mean_root_length / gamma(1.5)) ** 2  # of an exponential, E sqrt(n) = gamma(1.5) sqrt(E n)
    for _ in range(_CALIBRATION_STEPS):
        lengths = np.clip(rng.exponential(mean_length, _CALIBRATION_USERS), 1, max(num_items // 2, 1)).astype(int)
        z = rng.standard_normal((_CALIBRATION_USERS, loadings.shape[1]), np.float32)
        scores = rng.standard_normal((_CALIBRATION_USERS, num_items), np.float32)
        scores = offset[None, :] + z @ loadings.T + spread[None, :] * scores
        bars = np.take_along_axis(np.sort(scores, axis=1), num_items - lengths[:, None], axis=1)
        over = np.ascontiguousarray((scores - bars).T)  # [items, users]: above 0 = in the history
        order = np.argsort(-over, axis=1)
        weight = np.cumsum((lengths**-0.5)[order], axis=1, dtype=np.float32) / np.float32(_CALIBRATION_USERS)
        place = (weight < mean[:, None]).sum(axis=1).clip(max=_CALIBRATION_USERS - 1)
        last = np.take_along_axis(order, place[:, None], axis=1)
        offset = offset - np.float32(_DAMPING) * np.take_along_axis(over, last, axis=1)[:, 0]
    return latent._replace(offset=jnp.asarray(offset))


def _scores(params: LatentGaussian, key: jax.Array) -> jax.Array:
    z_key, own_key = jax.random.split(key)
    z = jax.random.normal(z_key, params.loadings.shape[1:], jnp.float32)
    own = jax.random.normal(own_key, params.offset.shape, jnp.float32)
    return params.offset + params.loadings @ z + params.spread * own
