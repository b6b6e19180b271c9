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

import jax
import jax.numpy as jnp

from fedjax_rec.data.clients import Client
from fedjax_rec.data.negatives import permute, uniform_negatives
from fedjax_rec.federated.algorithm import Algorithm, ClientOutput, ServerState
from fedjax_rec.federated.rows import Rows, take_rows
from fedjax_rec.models.base import Shared
from fedjax_rec.models.svdpp import Ratings, batch_step, stochastic_steps

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
            user, gradients, loss = batch_step(*arguments)
        else:
            user, gradients, changes, loss = stochastic_steps(*arguments, feedback_weight, num_steps, rho)
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


def _in_some_order(shared, client, key) -> Ratings:
    position = jnp.arange(len(client.item_ids), dtype=jnp.int32)
    real = position < client.length
    place = jnp.where(real, permute(key, position, client.length), len(position))
    ids = client.item_ids.at[place].get(mode="fill", fill_value=client.num_items)
    return _rows_of(shared, ids, client.labels.at[place].get(mode="fill", fill_value=0), real)


def _sample(shared, client, rho, key) -> Ratings:
    """``rho`` unrated items for each rated one, or all that are left; their ratings are the client's mean."""
    num = rho * len(client.item_ids)
    wanted = rho * client.length
    excluded = {"excluded": client.excluded, "num_excluded": client.num_excluded}
    ids, weights = uniform_negatives(key, num=num, wanted=wanted, num_items=client.num_items, **excluded)
    mean = client.labels.sum() / jnp.maximum(client.length, 1)
    return _rows_of(shared, ids, jnp.full(num, mean), weights > 0)


def _rows_of(shared, ids, ratings, real) -> Ratings:
    tables = shared.tables
    items = jnp.where(real[:, None], take_rows(tables["item"], ids), 0.0)
    feedback = jnp.zeros_like(items)
    if "feedback" in tables:
        feedback = jnp.where(real[:, None], take_rows(tables["feedback"], ids), 0.0)
    return Ratings(ids, ratings, real, items, feedback)
