"""Which of the rows that a client trained were its own items, and which were drawn as negatives?

Yuan et al. (2023), "Interaction-level Membership Inference Attack Against Federated Recommender
Systems", WWW. The server knows the parameters it sent, the method, and the share of positives among a client's rows
(the ratio of negatives is public). It trains shadow clients of its own on those rows under guessed labels, and keeps
the labels whose shadow rows are nearest to the rows uploaded, again and again.

Differs from the paper: labels are not fixed once they fit but drawn from odds that each iteration sharpens; a shadow's
user vector starts from the one that fitted best so far and not anew; biases are compared too where they are sent; and
rows are compared at the best scale, which a clip hides.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_rec.attacks.uploads import COMPILE_FAST, Uploads
from fedjax_rec.data.clients import Client
from fedjax_rec.federated.algorithm import Algorithm
from fedjax_rec.models.base import Shared

FIRST_SPREAD = 0.3
"""Share of noise in the user vectors of the shadows after the first iteration; it halves with each."""


def infer_interactions(
    algorithm: Algorithm,
    shared: Shared,
    uploads: Uploads,
    *,
    rows: np.ndarray,
    num_positives: np.ndarray,
    key: jax.Array,
    num_shadows: int = 32,
    num_iterations: int = 6,
    tables: tuple[str, ...] | None = None,
) -> np.ndarray:
    """How likely each row is a positive, by what shadow clients would have uploaded.

    The attacker is the server. It never sees the client's user vector; each shadow has its own, and trains it as a
    client does. It sees which rows were trained: those sent, or, to be on the safe side of noised and summed uploads,
    the true ones.

    Args:
      algorithm: the method, which trains on full batches (what an order of batches hides is not attacked).
      shared: what the clients received.
      uploads: of single clients, at whatever scale.
      rows: bool ``[uploads, items]``, the rows that each client trained.
      num_positives: int ``[uploads]``, how many of them are its own, from the public ratio.
      key: of guesses.
      num_shadows: guesses side by side.
      num_iterations: of them.
      tables: which tables to compare; all by default. Without "bias" the sign of a row's change says nothing.

    Returns:
      float32 ``[uploads, items]``, log odds up to a constant; minus infinity outside ``rows``.
    """
    capacity = int(rows.sum(1).max())
    num_items = rows.shape[1]
    order = np.argsort(~rows, axis=1, kind="stable")[:, :capacity]
    ids = np.where(np.take_along_axis(rows, order, 1), order, num_items).astype(np.int32)
    names = tuple(uploads.tables) if tables is None else tables
    parts = [np.take_along_axis(uploads.tables[name], order[:, :, None], 1) for name in names]
    parts = [np.where((ids < num_items)[:, :, None], part, 0.0) for part in parts]
    sizes = [np.sqrt(np.square(part).sum((1, 2), keepdims=True)) for part in parts]
    weights = np.stack([1 / np.maximum(size[:, 0, 0], 1e-30) for size in sizes], axis=1)  # tables count alike
    seen = np.concatenate([part / np.maximum(size, 1e-30) for part, size in zip(parts, sizes, strict=True)], axis=2)
    attack = partial(_one_upload, algorithm, names, num_shadows, num_iterations, num_items)

    @partial(jax.jit, compiler_options=COMPILE_FAST)
    def everyone(shared, *args):
        return jax.lax.map(lambda one: attack(shared, *one), args)

    wanted, keys = jnp.asarray(num_positives, jnp.int32), jax.random.split(key, len(ids))
    odds = np.asarray(everyone(shared, seen, weights.astype(np.float32), jnp.asarray(ids), wanted, keys))
    scores = np.full((len(ids), num_items + 1), -np.inf, np.float32)
    np.put_along_axis(scores, ids, odds, axis=1)
    return scores[:, :num_items]


def _one_upload(algorithm, names, num_shadows, num_iterations, num_items, shared, seen, weights, ids, wanted, key):
    """Log odds ``[capacity]`` of one client's rows."""
    real = ids < num_items
    length = real.sum().astype(jnp.int32)

    def shadow(private, labels, key):
        """Rows that a client with these labels and this user vector would send."""
        client = _client(ids, labels, length, num_items)
        tables = algorithm.client_update(shared, private, client, jnp.int32(1), key).update.tables
        rows = [weight * tables[name].values[: len(ids)] for name, weight in zip(names, weights, strict=True)]
        rows = jnp.where(real[:, None], jnp.concatenate(rows, 1), 0.0)
        # A clip or padding rescales what is sent: each shadow is compared at the scale that fits it best.
        return rows * jnp.maximum(jnp.vdot(rows, seen), 0.0) / jnp.maximum(jnp.vdot(rows, rows), 1e-30)

    def draw_labels(odds, key):
        """Exactly the known number of positives, likelier ones first: top of odds plus Gumbel noise."""
        noisy = jnp.where(real, odds + jax.random.gumbel(key, odds.shape), -jnp.inf)
        place = jnp.zeros(len(ids), jnp.int32).at[jnp.argsort(-noisy)].set(jnp.arange(len(ids)))
        return (place < wanted).astype(jnp.float32)

    def iterate(index, carry):
        odds, best_private, best_fit, key = carry
        key, init_key, label_key, train_key = jax.random.split(key, 4)
        fresh = jax.vmap(algorithm.init_private)(jax.random.split(init_key, num_shadows))
        spread = jnp.where(index == 0, 1.0, FIRST_SPREAD * 0.5**index)
        private = jax.tree.map(lambda new, old: spread * new + (index > 0) * old[None], fresh, best_private)
        labels = jax.vmap(draw_labels, (None, 0))(odds, jax.random.split(label_key, num_shadows))
        guesses = jax.vmap(shadow)(private, labels, jax.random.split(train_key, num_shadows))
        gaps = jnp.square(guesses - seen[None]).sum(2) * length  # [shadows, capacity], the rows' mean square is 1
        fit = gaps.sum(1)
        best = jnp.argmin(fit)
        better = fit[best] < best_fit
        best_private = jax.tree.map(lambda new, old: jnp.where(better, new[best], old), private, best_private)
        odds = odds + _evidence(gaps, labels)
        return odds, best_private, jnp.minimum(fit[best], best_fit), key

    shapes = jax.eval_shape(algorithm.init_private, key)
    private = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    start = jnp.zeros(len(ids)), private, jnp.full((), jnp.inf), key
    odds, *_ = jax.lax.fori_loop(0, num_iterations, iterate, start)
    return jnp.where(real, odds, -jnp.inf)


def _client(ids: jax.Array, labels: jax.Array, length: jax.Array, num_items: int) -> Client:
    """A client whose examples are these, in this order: nothing is drawn."""
    places = jnp.where(ids < num_items, jnp.arange(len(ids), dtype=jnp.int32), len(ids))
    nothing = jnp.full(1, num_items, jnp.int32)
    zero = jnp.zeros((), jnp.int32)
    return Client(zero, length, ids, labels, nothing, zero, ids, places, num_items)


def _evidence(gaps: jax.Array, labels: jax.Array) -> jax.Array:
    """By how much a row fits better under label 1 than under 0, mean over shadows, ``[n]``; 0 if one was not tried."""
    ones, zeros = labels, 1.0 - labels
    near_one = (gaps * ones).sum(0) / jnp.maximum(ones.sum(0), 1.0)
    near_zero = (gaps * zeros).sum(0) / jnp.maximum(zeros.sum(0), 1.0)
    return jnp.where((ones.sum(0) > 0) & (zeros.sum(0) > 0), near_zero - near_one, 0.0)
