"""Click prediction by clients: what is known of an item is public, what a user says of itself stays with it.

An example of client u is an item i and whether it was clicked. Its fields are

    the item's id               a row of the shared table "item"
    the client's own vector     private and trained: the user's id as a field
    public fields of the item   such as genres and year, looked up in a public table
    fields of the user          such as an age group, private and never trained

and any `ClickNetwork` gives log-odds, trained by the binary cross-entropy. The small tables of item and user fields are
dense parameters, since every client moves most of their rows; so is the network. This is an ordinary `Model`: FedAvg
and its relatives train it with user-level DP, `silo_dpsgd` with example-level DP, `centralised` without.

Users' fields lie in the private state, where `with_user_values` puts them; the loss has no gradient in them. A method
that moves private leaves without a gradient must leave "user" alone: in `silo_dpsgd`, whose noise is added to private
leaves too, give it ``optax.set_to_zero()``.

Examples need not be items at all: with ``item_ids=False`` an "item" is any numbered example, such as a line of a log,
and its fields are its holder's. They are then no more public than the holder's examples.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_rec.models.base import Examples, Model, Shared, View
from fedjax_rec.models.click_network import ClickNetwork
from fedjax_rec.models.fields import FieldBatch, Fields, embed, embed_dense, take_examples


class ClientClicks(NamedTuple):
    """Click prediction as the round sees it, and predictions for pairs.

    Attributes:
      model: for any algorithm; its private state of a client is ``{"own": [columns], "user": [user rows]}``, each if
        it is asked for. ``score`` gives the log-odds of all items.
      logits: ``(shared, private, user_ids int32 [n], item_ids int32 [n]) -> float32 [n]``, log-odds of a click, with
        private leaves ``[users, ...]``; item ids index the item fields. Compiled, in blocks of bounded memory.
    """

    model: Model
    logits: Callable[[Shared, Any, jax.Array, jax.Array], jax.Array]


def client_clicks(
    make_network: Callable[[int], ClickNetwork],
    *,
    num_items: int,
    item_fields: tuple[Fields, FieldBatch] | None = None,
    user_fields: Fields | None = None,
    item_ids: bool = True,
    own_vector: bool = True,
    init_stddev: float = 0.01,
) -> ClientClicks:
    """Builds the model.

    Args:
      make_network: from a number of fields, such as `dcn_v2`.
      num_items: catalogue size.
      item_fields: layout, and every item's fields, leaves ``[num_items, slots]``; None for none.
      user_fields: layout of what clients know of their users; None for none.
      item_ids: whether an item has a trained row of its own.
      own_vector: whether a client has a trained private vector of its own.
      init_stddev: standard deviation of the rows of all fields at the start.

    Raises:
      ValueError: without any field, or for fields of another number of items.
    """
    if item_fields is not None and len(item_fields[1].ids) != num_items:
        raise ValueError(f"item_fields must describe each of the {num_items} items; got {len(item_fields[1].ids)}.")
    layout, facts = item_fields if item_fields is not None else (None, None)
    facts = jax.tree.map(jnp.asarray, facts)
    num_fields = item_ids + own_vector + sum(part.num_fields for part in (layout, user_fields) if part is not None)
    network = make_network(num_fields)
    if network.num_fields != num_fields:
        raise ValueError(f"The network reads {network.num_fields} fields, and examples have {num_fields}.")

    def rows(key, num):
        return init_stddev * jax.random.normal(key, (num, network.columns))

    def init_shared(key):
        network_key, item_key, facts_key, user_key = jax.random.split(key, 4)
        dense = {"network": network.init(network_key)}
        if layout is not None:
            dense["item_fields"] = rows(facts_key, layout.num_rows)
        if user_fields is not None:
            dense["user_fields"] = rows(user_key, user_fields.num_rows)
        return Shared({"item": rows(item_key, num_items)} if item_ids else {}, dense)

    def init_private(key):
        own = {"own": rows(key, 1)[0]} if own_vector else {}
        return own | ({} if user_fields is None else {"user": jnp.zeros(user_fields.num_rows)})

    def of_user(dense, private):
        """Vectors of the fields that all examples of a client share, ``[fields, columns]``."""
        parts = [private["own"][None, :]] if own_vector else []
        if user_fields is not None:
            said = jax.lax.stop_gradient(private["user"])
            parts.append(embed_dense(user_fields, dense["user_fields"], said))
        return parts

    def logit(dense, user_parts, item_row, item_id):
        parts = [item_row[None, :]] if item_ids else []
        if layout is not None:
            parts.append(embed(layout, dense["item_fields"], take_examples(facts, item_id)))
        return network.logit(dense["network"], jnp.concatenate([*parts, *user_parts]))

    def many(dense, private, item_rows, ids):
        user_parts = of_user(dense, private)
        return jax.vmap(lambda row, i: logit(dense, user_parts, row, i))(item_rows, ids)

    def batch_loss(view: View, private, examples: Examples, key):
        del key
        item_rows = view.rows["item"].reshape(-1, network.columns) if item_ids else None
        logits = many(view.dense, private, item_rows, examples.ids.reshape(-1)).reshape(examples.ids.shape)
        losses = jnp.logaddexp(0.0, logits) - examples.labels * logits
        losses = jnp.where(examples.weights > 0, examples.weights * losses, 0.0)
        return losses.sum() / jnp.maximum(examples.weights.sum(), 1.0)

    def score(shared: Shared, private):
        return many(shared.dense, private, shared.tables.get("item"), jnp.arange(num_items))

    @jax.jit
    def logits(shared: Shared, private, user_ids, item_ids_):
        def one(pair):
            user, item = pair
            own = jax.tree.map(lambda x: x[user], private)
            row = shared.tables["item"][item] if item_ids else None
            return logit(shared.dense, of_user(shared.dense, own), row, item)

        return jax.lax.map(one, (user_ids, item_ids_), batch_size=min(4096, len(user_ids)))

    return ClientClicks(Model(init_shared, init_private, batch_loss, score), logits)


def with_user_values(private: dict[str, jax.Array], values: np.ndarray) -> dict[str, jax.Array]:
    """Private state in which every client knows its user's fields.

    Args:
      private: leaves ``[users, ...]``, or ``[silos, users, ...]``.
      values: float32 like ``private["user"]``, from `dense_values`.

    Raises:
      ValueError: for values of another shape.
    """
    if values.shape != private["user"].shape:
        raise ValueError(f"values must have the shape {private['user'].shape} of the state; got {values.shape}.")
    return private | {"user": jnp.asarray(values, jnp.float32)}
