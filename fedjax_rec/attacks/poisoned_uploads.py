"""Model poisoning of matrix factorisation: what the attacker's clients upload to get target items recommended.

Each attack is for `models.matrix_factorization`, with item vectors q_i in the table "item", biases b_i in "bias" and
user vectors p_u that never leave their clients. Uploads are in units of the update, what the server adds to its tables
(times its learning rate). Whatever an attack wants, `within` keeps each uploaded row to the norm that it states.
"""

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_rec.attacks.poisoning import Attack, Upload
from fedjax_rec.data.interactions import Interactions
from fedjax_rec.models.base import Shared

FOLD_IN_L2, FOLD_IN_UNOBSERVED = 1.0, 0.1


def within(values: jax.Array, l2_row_norm: float) -> jax.Array:
    """Rows ``[n, dim]`` scaled down to an L2 norm of at most ``l2_row_norm`` each."""
    norms = jnp.sqrt(jnp.sum(jnp.square(values), -1, keepdims=True))
    return values * jnp.minimum(1.0, l2_row_norm / jnp.maximum(norms, 1e-30))


def _attack(name, target_ids, num_rows, l2_row_norm, upload) -> Attack:
    if len(target_ids) < 1 or num_rows < len(target_ids):
        raise ValueError(f"{name} needs a target, and a row for each: {len(target_ids)} targets in {num_rows} rows.")
    if not l2_row_norm > 0:
        raise ValueError(f"l2_row_norm must be positive; got {l2_row_norm}.")

    def bounded(shared, private, key):
        wanted = upload(shared, private, key)
        values = {table: within(rows, l2_row_norm) for table, rows in wanted.values.items()}
        return Upload(wanted.ids[:num_rows], {table: rows[:num_rows] for table, rows in values.items()})

    return Attack(name, bounded, num_rows, l2_row_norm)


def align_to_popular(
    target_ids: np.ndarray, *, popular_ids: np.ndarray, l2_row_norm: float, step: float = 1.0
) -> Attack:
    """Moves targets to where popular items are: ``step * (mean of their rows - the target's row)``, bias included.

    The alignment with popular items of Zhang et al., 2022, "PipAttack: Poisoning Federated Recommender Systems for
    Manipulating Item Promotion". Differs from the paper: popular items are given instead of being recognised by a
    classifier trained on popularity labels, and there is no term that hides the upload.

    Args:
      target_ids: int ``[T]``.
      popular_ids: int ``[P]``; the attacker knows which items are popular, and the shared parameters.
      l2_row_norm: of each uploaded row.
      step: share of the way in one upload.
    """
    targets, popular = jnp.asarray(target_ids, jnp.int32), jnp.asarray(popular_ids, jnp.int32)

    def upload(shared, private, key):
        del private, key
        tables = shared.tables.items()
        return Upload(targets, {name: step * (t[popular].mean(0, keepdims=True) - t[targets]) for name, t in tables})

    return _attack("popular", target_ids, len(target_ids), l2_row_norm, upload)


def _promotion(shared: Shared, targets: jax.Array, users: jax.Array, step: float) -> Upload:
    """A step down the mean over users of ``-log sigmoid(p . q_t + b_t)``, for each target t."""
    scores = users @ shared.tables["item"][targets].T + shared.tables["bias"][targets].T
    pull = jax.nn.sigmoid(-scores) / len(users)  # [users, T]
    return Upload(targets, {"item": step * pull.T @ users, "bias": step * pull.sum(0)[:, None]})


def explicit_boosting(target_ids: np.ndarray, *, l2_row_norm: float, boost: float = 100.0) -> Attack:
    """Raises the targets' scores for the attacker's own users: gradient of ``-log sigmoid`` of them, boosted.

    The explicit part of Zhang et al., 2022, "PipAttack: Poisoning Federated Recommender Systems for Manipulating Item
    Promotion", known as EB in later work. Differs from the paper: a fixed boost and a bound for each row.

    The attacker knows the shared parameters and the user vectors that his clients trained on their fake data.

    Args:
      target_ids: int ``[T]``.
      l2_row_norm: of each uploaded row.
      boost: learning rate of the attacker, in units of the update.
    """
    targets = jnp.asarray(target_ids, jnp.int32)

    def upload(shared, private, key):
        del key
        return _promotion(shared, targets, private["user"][None, :], boost)

    return _attack("explicit boosting", target_ids, len(target_ids), l2_row_norm, upload)


def a_hum(
    target_ids: np.ndarray,
    *,
    l2_row_norm: float,
    boost: float = 100.0,
    num_users: int = 32,
    num_mining_steps: int = 10,
    mining_rate: float = 1.0,
    name: str = "A-hum",
) -> Attack:
    """Invents users, mines them to be hard, and raises the targets' scores for them.

    Vectors p ~ N(0, s^2 I) take ``num_mining_steps`` steps down ``-log(1 - sigmoid(p . q_t + b_t))``, until the target
    scores low for them, and then serve as in `explicit_boosting`; without such steps it is the authors' A-ra. Rong, He
    and Chen, 2022, "Poisoning Deep Learning Based Recommender Model in Federated Learning Scenarios". Differs from the
    paper: the model is matrix factorisation with biases and not neural collaborative filtering; s is the root mean
    square of the received item vectors' entries; a fixed boost and a bound for each row.

    The attacker knows the shared parameters and nothing else.

    Args:
      target_ids: int ``[T]``.
      l2_row_norm: of each uploaded row.
      boost: learning rate of the attacker, in units of the update.
      num_users: invented by each malicious client in each round.
      num_mining_steps, mining_rate: of the mining.
      name: of the attack.
    """
    targets = jnp.asarray(target_ids, jnp.int32)

    def upload(shared, private, key):
        del private
        items, biases = shared.tables["item"], shared.tables["bias"][:, 0]
        spread = jnp.sqrt(jnp.mean(jnp.square(items)))
        users = spread * jax.random.normal(key, (num_users, items.shape[1]))

        def mine(_, users):
            scores = users @ items[targets].T + biases[targets][None, :]
            return users - mining_rate * jax.nn.sigmoid(scores) @ items[targets] / len(targets)

        users = jax.lax.fori_loop(0, num_mining_steps, mine, users)
        return _promotion(shared, targets, users, boost)

    return _attack(name, target_ids, len(target_ids), l2_row_norm, upload)


def public_interactions(train: Interactions, *, share: float, seed: int) -> np.ndarray:
    """What a few users let everybody see: a random share of all interactions, by user.

    Args:
      train: of the honest users.
      share: of the interactions that is public.
      seed: of the draw.

    Returns:
      int32 ``[users with some, most of one]``, padded with ``num_items``.
    """
    shown = train.take(np.random.default_rng(seed).random(train.num_interactions) < share)
    counts = shown.counts_per_user[shown.counts_per_user > 0]
    if not len(counts):
        raise ValueError(
            f"A share of {share} of {train.num_interactions} interactions leaves nothing public; raise it."
        )
    table = np.full((len(counts), counts.max()), train.num_items, np.int32)
    table[np.arange(counts.max()) < counts[:, None]] = shown.item_ids
    return table


def folded_in_users(shared: Shared, public: jax.Array) -> jax.Array:
    """User vectors ``[U, dim]`` that explain public interactions ``[U, P]``: weighted ridge regression (iALS).

    They are shorter than those of users who train with BPR, so that lists follow biases more than they should. Longer
    ones were tried (public items 10 above the average item): the attack then chases the few users who are furthest from
    a target, and reaches fewer.
    """
    items = shared.tables["item"]
    real = public < len(items)
    own = jnp.where(real[..., None], items[jnp.minimum(public, len(items) - 1)], 0.0)
    left = (
        jnp.einsum("upd,upe->ude", own, own)
        + (FOLD_IN_UNOBSERVED * items.T @ items + FOLD_IN_L2 * jnp.eye(items.shape[1]))[None]
    )
    return jnp.linalg.solve(left, own.sum(1)[..., None])[..., 0]


def exposure_gradient(
    shared: Shared, users: jax.Array, public: jax.Array, targets: jax.Array, *, list_size: int
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Minus the gradient of FedRecAttack's loss in both tables, ``[items, dim]`` and ``[items, 1]``; and the loss.

    With j the last item of user u's list of ``list_size`` best items that are neither public nor targets,

        L = mean over u and t of g(s_uj - s_ut),    g(x) = x for x >= 0, exp(x) - 1 below.
    """
    items, biases = shared.tables["item"], shared.tables["bias"][:, 0]
    num_users, num_targets = len(users), len(targets)
    scores = users @ items.T + biases[None, :]
    wanted = scores[:, targets]
    others = scores.at[jnp.arange(num_users)[:, None], public].set(-jnp.inf, mode="drop")
    # The barrier keeps XLA from turning a list of which only the end is read into a sort, 40 times slower on a CPU.
    lists = jax.lax.optimization_barrier(jax.lax.top_k(others.at[:, targets].set(-jnp.inf), list_size))
    last_scores, last = (x[:, -1] for x in lists)
    gap = last_scores[:, None] - wanted
    below = jnp.exp(jnp.minimum(gap, 0.0))
    loss = jnp.mean(jnp.where(gap >= 0, gap, below - 1))
    pull = below / (num_users * num_targets)  # g', [users, T]
    ids = jnp.concatenate([targets, last])

    def table(up, down):
        return jnp.zeros((len(items), up.shape[1])).at[ids].add(jnp.concatenate([up, -down]))

    weight = pull.sum(1, keepdims=True)
    return {"item": table(pull.T @ users, weight * users), "bias": table(pull.sum(0)[:, None], weight)}, loss


def _strongest_rows(gradient: dict[str, jax.Array], targets: jax.Array, num_rows: int) -> jax.Array:
    """The targets, then the rows where the gradient is largest."""
    size = jnp.sum(jnp.square(gradient["item"]), -1).at[targets].set(-1.0)
    return jnp.concatenate([targets, jax.lax.top_k(size, num_rows - len(targets))[1].astype(jnp.int32)])


def fedrecattack(
    target_ids: np.ndarray,
    *,
    public: np.ndarray,
    l2_row_norm: float,
    num_rows: int = 60,
    boost: float = 10.0,
    list_size: int = 10,
) -> Attack:
    """Guesses users' vectors from public interactions, and pushes targets into their lists.

    Rong et al., 2022, "FedRecAttack: Model Poisoning Attack to Federated Recommendation": `exposure_gradient` at the
    guessed vectors, at most kappa = ``num_rows`` rows of it, each of norm at most C = ``l2_row_norm``. Differs from the
    paper: vectors are guessed by ridge regression in each round instead of by BPR over rounds (`folded_in_users`); rows
    beside the targets are those with the largest gradient and not drawn in proportion to it; all malicious clients send
    the same.

    The attacker knows the shared parameters and the public interactions.

    Args:
      target_ids: int ``[T]``.
      public: of `public_interactions`.
      l2_row_norm: C, in units of the update.
      num_rows: kappa.
      boost: learning rate of the attacker, in units of the update.
      list_size: of the lists that the targets are to enter.
    """
    targets, public = jnp.asarray(target_ids, jnp.int32), jnp.asarray(public)

    def upload(shared, private, key):
        del private, key
        users = folded_in_users(shared, public)
        gradient, _ = exposure_gradient(shared, users, public, targets, list_size=list_size)
        ids = _strongest_rows(gradient, targets, num_rows)
        return Upload(ids, {name: boost * table[ids] for name, table in gradient.items()})

    return _attack("FedRecAttack", target_ids, num_rows, l2_row_norm, upload)


def adaptive(
    target_ids: np.ndarray, *, public: np.ndarray, l2_row_norm: float, num_rows: int = 60, list_size: int = 10
) -> Attack:
    """Knows the server's clip of rows, and makes each row that it sends exactly as long as the clip allows.

    As `fedrecattack`, but after a clip only directions count: targets' rows and biases go up, and those of the
    ``num_rows - T`` items that stand most often last in the lists of the guessed users go down, each at full length, by
    every malicious client alike. So the targets' rivals fall while the targets rise. Against a clip of the whole
    update, pass ``l2_row_norm`` = clip / sqrt(2 num_rows) and few rows.

    The attacker knows the shared parameters, public interactions and the clip.

    Args:
      target_ids: int ``[T]``.
      public: of `public_interactions`.
      l2_row_norm: the server's clip for a row, in units of the update.
      num_rows: rows that an upload changes.
      list_size: rivals are the last items of lists of this size.
    """
    targets, public = jnp.asarray(target_ids, jnp.int32), jnp.asarray(public)

    def full_length(rows):
        norms = jnp.sqrt(jnp.sum(jnp.square(rows), -1, keepdims=True))
        return jnp.where(norms > 0, rows * (l2_row_norm / jnp.maximum(norms, 1e-30)), 0.0)

    def upload(shared, private, key):
        del private, key
        users = folded_in_users(shared, public)
        gradient, _ = exposure_gradient(shared, users, public, targets, list_size=list_size)
        ids = _strongest_rows(gradient, targets, num_rows)
        return Upload(ids, {name: full_length(table[ids]) for name, table in gradient.items()})

    return _attack("adaptive", target_ids, num_rows, l2_row_norm, upload)
