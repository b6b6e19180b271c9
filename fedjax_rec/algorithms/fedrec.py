"""FedRec: rating prediction where a round does not show which items a client rated.

Each client u minimises, over the items I_u that it rated and a sample I'_u of rho |I_u| that it did not,

    sum_{i in I_u} e(r_ui) + sum_{i in I'_u} e(r'_ui),   e(r) = (r - U_u . V_i)^2 / 2 + lambda / 2 (|U_u|^2 + |V_i|^2).

The virtual rating r'_ui is the client's mean rating (user averaging) or, later on, the prediction of a copy of U_u that
took some more steps on I_u alone (hybrid filling). U_u is private. The server sees gradients of V_i for i in I_u and
I'_u alike and takes V_i <- V_i - gamma * (their mean over the clients that sent item i). SVD++ puts
U_u + sum_{j in I_u, j != i} O_j / sqrt(|I_u minus i|) in the place of U_u, with a second item table O.

Lin, Liang, Pan and Ming, 2020, "FedRec: Federated Recommendation with Explicit Feedback"; Mnih and Salakhutdinov, 2007,
"Probabilistic Matrix Factorization"; Koren, 2008, "Factorization Meets the Neighborhood".

Differs from the paper: its clients write O on the server, here they upload its change. In stochastic style the server
takes a cohort's mean, which is the paper's sum for a cohort of one, and clients visit ratings in an order drawn anew.
Rates of user vectors and the start of hybrid filling follow a client's own count of rounds. Sampling is no guarantee:
rated items are sent in every round and sampled ones now and then, which a server that compares rounds can tell apart.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_rec.data.clients import Client
from fedjax_rec.data.negatives import permute, uniform_negatives
from fedjax_rec.federated.algorithm import Algorithm, ClientOutput, ServerState
from fedjax_rec.federated.rows import Rows, take_rows
from fedjax_rec.models.base import Shared

STYLES = ("batch", "stochastic")
TINY = 1e-12
# (rand - 0.5) * 0.01 in the authors' code
INIT_WIDTH = 0.005


def fedrec(
    num_items: int,
    *,
    style: str = "batch",
    dim: int = 20,
    lr: float = 0.8,
    lr_decay: float = 0.9,
    l2: float = 0.001,
    rho: int = 0,
    average_visits: int | None = None,
    predict_steps: int = 10,
    implicit: bool = False,
    rounds_per_iteration: int = 1,
    min_share: float = 0.0,
) -> Algorithm:
    """Federated PMF or SVD++ with the authors' hyper-parameters for batch style as defaults.

    Shared tables: "item" (V) and, for SVD++, "feedback" (O), ``[num_items, dim]``; "count" ``[num_items, 1]``, the
    share of the last cohort that sent each item. Private: "user" ``[dim]`` and "visits", rounds the client was in.

    Args:
      num_items: catalogue size.
      style: "batch" takes one step on all of a client's ratings; "stochastic" one on each (the authors: lr 0.01).
      dim: length of user and item vectors.
      lr: gamma, of the first iteration. In batch style 0.8 is too long a step for ratings up to 5, and works because
        it decays; without decay take 0.1.
      lr_decay: gamma's factor each iteration; for the user vector each visit.
      l2: lambda.
      rho: unrated items a client adds for each rated one; 0 adds none, and the server sees what was rated.
      average_visits: virtual ratings are the client's mean in its first visits, as many as said here, and predictions
        after; None is user averaging throughout.
      predict_steps: passes over its own ratings that the copy of the user vector takes to predict.
      implicit: SVD++ instead of PMF; stochastic style only.
      rounds_per_iteration: 1 if all clients are in each round; ``num_clients / cohort_size`` else.
      min_share: smallest share of the cohort to divide an item's sum by, in [0, 1]. With noise choose about the
        standard deviation of a mean count, or items that nobody sent step by noise over noise.

    Raises:
      ValueError: for an unknown style, a negative rho, SVD++ in batch style, or clients with repeated items.
    """
    if style not in STYLES:
        raise ValueError(f"style must be one of {', '.join(STYLES)}; got {style!r}.")
    if rho < 0 or rho != int(rho):
        raise ValueError(f"rho must be 0, 1, 2, ...; got {rho}.")
    if implicit and style == "batch":
        raise ValueError("SVD++ is there in stochastic style only; pass style='stochastic', lr=0.01.")
    feedback_weight = 1.0 if implicit else 0.0

    def uniform(key, shape):
        return jax.random.uniform(key, shape, minval=-INIT_WIDTH, maxval=INIT_WIDTH)

    def init(key):
        item_key, feedback_key = jax.random.split(key)
        tables = {"item": uniform(item_key, (num_items, dim)), "count": jnp.zeros((num_items, 1))}
        if implicit:
            tables["feedback"] = uniform(feedback_key, (num_items, dim))
        return ServerState(jnp.zeros((), jnp.int32), Shared(tables, {}), ())

    def init_private(key):
        return {"user": uniform(key, (dim,)), "visits": jnp.zeros(())}

    def client_update(shared, private, client, num_steps, key):
        if client.slots is not None:
            raise ValueError(
                "FedRec wants one rating an item from a client: lay it out with client_data(use_ratings=True)."
            )
        order_key, sample_key = jax.random.split(key)
        rated = _in_some_order(shared, client, order_key)
        sampled = _sample(shared, client, rho, sample_key)
        rate = lr * lr_decay ** private["visits"]
        predict = None if average_visits is None or not rho else private["visits"] >= average_visits
        arguments = (private["user"], rated, sampled, rate, l2, predict, predict_steps)
        if style == "batch":
            user, gradients, loss = _batch(*arguments)
        else:
            user, gradients, changes, loss = _stochastic(*arguments, feedback_weight, num_steps, rho)
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), rated, sampled)
        values = {"item": gradients, "count": jnp.ones((len(both.ids), 1))}
        if implicit:
            values["feedback"] = changes
        rows = {k: Rows(both.ids, jnp.where(both.real[:, None], v, 0.0), num_items) for k, v in values.items()}
        return ClientOutput(Shared(rows, {}), {"user": user, "visits": private["visits"] + 1}, {"loss": loss})

    def server_update(state, aggregate):
        # Sum and count are over the same expected cohort size, which cancels.
        share = jnp.maximum(aggregate.tables["count"], max(min_share, TINY))
        iteration = (state.round // rounds_per_iteration).astype(jnp.float32)
        old = state.shared.tables
        tables = {"item": old["item"] - lr * lr_decay**iteration * aggregate.tables["item"] / share}
        if implicit:
            tables["feedback"] = old["feedback"] + aggregate.tables["feedback"] / share
        return state._replace(shared=Shared(tables | {"count": aggregate.tables["count"]}, {}))

    steps = {"batch": lambda client: jnp.int32(1), "stochastic": lambda client: client.length}
    return Algorithm(init, init_private, client_update, steps[style], server_update)


def client_vector(shared: Shared, private, client: Client) -> jax.Array:
    """What a client multiplies item vectors with to predict ratings: ``U_u``, plus its feedback in SVD++; ``[dim]``."""
    if "feedback" not in shared.tables:
        return private["user"]
    real = (jnp.arange(len(client.item_ids)) < client.length)[:, None]
    total = jnp.where(real, take_rows(shared.tables["feedback"], client.item_ids), 0.0).sum(0)
    return private["user"] + total / jnp.sqrt(jnp.maximum(client.length, 1))


class _Ratings(NamedTuple):
    """Ratings of one client: ids ``[n]``, ratings ``[n]``, real bool ``[n]``, items and feedback ``[n, dim]``."""

    ids: jax.Array
    ratings: jax.Array
    real: jax.Array
    items: jax.Array
    feedback: jax.Array


def _in_some_order(shared, client, key) -> _Ratings:
    position = jnp.arange(len(client.item_ids), dtype=jnp.int32)
    real = position < client.length
    place = jnp.where(real, permute(key, position, client.length), len(position))
    ids = client.item_ids.at[place].get(mode="fill", fill_value=client.num_items)
    return _rows_of(shared, ids, client.labels.at[place].get(mode="fill", fill_value=0), real)


def _sample(shared, client, rho, key) -> _Ratings:
    """``rho`` unrated items for each rated one, or all that are left; their ratings are the client's mean."""
    num = rho * len(client.item_ids)
    wanted = rho * client.length
    excluded = {"excluded": client.excluded, "num_excluded": client.num_excluded}
    ids, weights = uniform_negatives(key, num=num, wanted=wanted, num_items=client.num_items, **excluded)
    mean = client.labels.sum() / jnp.maximum(client.length, 1)
    return _rows_of(shared, ids, jnp.full(num, mean), weights > 0)


def _rows_of(shared, ids, ratings, real) -> _Ratings:
    tables = shared.tables
    items = jnp.where(real[:, None], take_rows(tables["item"], ids), 0.0)
    feedback = jnp.zeros_like(items)
    if "feedback" in tables:
        feedback = jnp.where(real[:, None], take_rows(tables["feedback"], ids), 0.0)
    return _Ratings(ids, ratings, real, items, feedback)


def _batch(user, rated, sampled, rate, l2, predict, predict_steps):
    """One step on everything: the new user vector, gradients ``[rated + sampled, dim]``, and the loss before it."""

    def step(user, data):
        errors = jnp.where(data.real, data.ratings - data.items @ user, 0.0)
        num = jnp.maximum(data.real.sum(), 1)
        return user + rate * (errors @ data.items / num - l2 * user), errors

    if predict is not None:
        ahead = jax.lax.fori_loop(0, predict_steps, lambda _, user: step(user, rated)[0], user)
        virtual = jnp.where(predict, sampled.items @ ahead, sampled.ratings)
        sampled = sampled._replace(ratings=virtual)
    data = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), rated, sampled)
    moved, errors = step(user, data)
    own = errors[: len(rated.ids)]
    loss = 0.5 * jnp.square(own).sum() / jnp.maximum(rated.real.sum(), 1)
    gradients = l2 * data.items - errors[:, None] * user[None, :]
    return jnp.where(data.real.any(), moved, user), gradients, loss


class _Local(NamedTuple):
    """A client between two ratings. Its feedback rows are ``scale * base + shift``: a step moves all by one map.

    Attributes:
      user: ``[dim]``.
      total: ``[dim]``, sum of its feedback rows.
      scale: scalar.
      shift: ``[dim]``.
    """

    user: jax.Array
    total: jax.Array
    scale: jax.Array
    shift: jax.Array


def _visit(local, item, rating, row, others, rate, l2, weight):
    """One rating, predicted without the item's own feedback row: what moved, the item's gradient, the error."""
    near = local.total - row
    root = jnp.sqrt(jnp.maximum(others, 1.0))
    vector = local.user + weight * near / root
    error = rating - item @ vector
    push = jnp.where(others > 0, rate * weight * error / root, 0.0) * item
    shrink = jnp.where(others > 0, 1 - rate * l2, 1.0)
    user = local.user + rate * (error * item - l2 * local.user)
    total = shrink * near + others * push + row
    moved = _Local(user, total, shrink * local.scale, shrink * local.shift + push)
    return moved, l2 * item - error * vector, error


def _stochastic(user, rated, sampled, rate, l2, predict, predict_steps, weight, num_steps, rho):
    """One step on each rating, then on each sampled item: user vector, gradients, feedback changes, loss."""
    num = rated.real.sum().astype(jnp.float32)

    def select(real, new, old):
        return jax.tree.map(lambda a, b: jnp.where(real, a, b), new, old)

    def own(k, carry):
        local, bases, gradients, loss = carry
        row = local.scale * bases[k] + local.shift
        visited = _visit(local, rated.items[k], rated.ratings[k], row, num - 1, rate, l2, weight)
        moved, gradient, error = select(rated.real[k], visited, (local, jnp.zeros_like(user), 0.0))
        # This row was left out of the step: another base keeps its value.
        base = select(rated.real[k], (row - moved.shift) / moved.scale, bases[k])
        return moved, bases.at[k].set(base), gradients.at[k].set(gradient), loss + 0.5 * error**2

    local = _Local(user, rated.feedback.sum(0), jnp.ones(()), jnp.zeros_like(user))
    start = (local, rated.feedback, jnp.zeros_like(rated.items), jnp.zeros(()))
    local, bases, own_gradients, loss = jax.lax.fori_loop(0, num_steps, own, start)

    def ahead(k, local):  # here every row takes part in every step, the item's own too
        place = k % jnp.maximum(num_steps, 1)
        row = local.scale * bases[place] + local.shift
        moved, *_ = _visit(local, rated.items[place], rated.ratings[place], row, num - 1, rate, l2, weight)
        change = moved.scale * bases[place] + moved.shift - row
        return select(rated.real[place], moved._replace(total=moved.total + change), local)

    if predict is not None:
        copy = jax.lax.fori_loop(0, predict_steps * num_steps, ahead, local)
        vector = copy.user + weight * copy.total / jnp.sqrt(jnp.maximum(num, 1.0))
        sampled = sampled._replace(ratings=jnp.where(predict, sampled.items @ vector, sampled.ratings))

    def other(k, carry):
        local, gradients, changes = carry
        none = jnp.zeros_like(user)
        visited = _visit(local, sampled.items[k], sampled.ratings[k], none, num, rate, l2, weight)
        moved, gradient, _ = select(sampled.real[k], visited, (local, none, 0.0))
        # One step of the map that moves the client's own rows, taken by the sampled item's row.
        ratio = moved.scale / local.scale
        change = (ratio - 1) * sampled.feedback[k] + moved.shift - ratio * local.shift
        return moved, gradients.at[k].set(gradient), changes.at[k].set(change)

    gradients = changes = jnp.zeros_like(sampled.items)
    if rho:
        local, gradients, changes = jax.lax.fori_loop(0, rho * num_steps, other, (local, gradients, changes))
    own_changes = local.scale * bases + local.shift[None, :] - rated.feedback
    gradients, changes = jnp.concatenate([own_gradients, gradients]), jnp.concatenate([own_changes, changes])
    return local.user, gradients, changes, loss / jnp.maximum(num, 1.0)
