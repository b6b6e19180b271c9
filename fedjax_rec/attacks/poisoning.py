"""Poisoning: a share of the clients belongs to an attacker, who uploads what he likes.

The attacker runs inside the method's own round, in `Algorithm.client_update` of his clients and nowhere else. He sees
what any client sees: the shared parameters that each round sends, and his own clients' data, private parameters and
randomness. What an attack knows beyond that (public interactions, popularity, the server's clip) is an argument of the
function that builds it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap

from fedjax_rec.federated.algorithm import Algorithm
from fedjax_rec.federated.rows import Rows, add_rows, is_rows
from fedjax_rec.models.base import Shared

ATTACK_FOLD = 0x0A77AC


class Upload(NamedTuple):
    """What one of the attacker's clients wants to add to the item tables.

    Attributes:
      ids: int32 ``[n]``, distinct rows, the most important ones first; padding is the number of items.
      values: float32 ``[n, dim]`` by table name; tables without an entry, and dense leaves, get zeros.
    """

    ids: jax.Array
    values: dict[str, jax.Array]


class Attack(NamedTuple):
    """What the attacker's clients do.

    Attributes:
      name: for tables and figures.
      upload: ``(shared, private, key) -> Upload`` for one of his clients; ``private`` is what the method's own training
        on the client's (fake) data made of its private parameters in this round. None: he invents data and lets his
        clients train on it as anybody does.
      num_rows: rows that one upload changes at most, in each table; None where ``upload`` is.
      l2_row_norm: L2 norm that no row of any table of an upload exceeds, in units of the update.
    """

    name: str
    upload: Callable[[Shared, Any, jax.Array], Upload] | None = None
    num_rows: int | None = None
    l2_row_norm: float = float("inf")


def poisoned(algorithm: Algorithm, attack: Attack, malicious: np.ndarray) -> Algorithm:
    """The same method, with some of its clients in the attacker's hands.

    A malicious client trains like the others, since the attacker may want its private parameters, and then uploads
    rows of the attacker's choice in the place of what it learnt. The shape of an upload is the method's: the list of
    rows of a client is as long as its bucket allows, so of a longer list only the first rows are sent. Give fake users
    enough data (`with_fake_users`) where an attack needs many rows; `rows_that_fit` says how many go.

    Args:
      algorithm: whose updates are a `Shared` with `Rows` for tables, such as `fedavg`.
      attack: of all malicious clients, who know of each other.
      malicious: bool ``[num_clients]``; if False everywhere, every number is that of ``algorithm``.

    Raises:
      ValueError: if ``malicious`` is not a list of booleans.
    """
    malicious = np.asarray(malicious)
    if malicious.dtype != bool or malicious.ndim != 1:
        raise ValueError(f"malicious must be bool [num_clients]; got {malicious.dtype} {list(malicious.shape)}.")
    if attack.upload is None or not malicious.any():
        return algorithm
    is_malicious = jnp.asarray(malicious)

    def client_update(shared, private, client, num_steps, key):
        attack_key = jax.random.fold_in(key, ATTACK_FOLD)
        output = algorithm.client_update(shared, private, client, num_steps, key)
        wanted = is_malicious.at[client.client_id].get(mode="fill", fill_value=False)

        def make(shared, private, update, key):
            return laid_out(attack.upload(shared, private, key), update)

        theirs = only_where(wanted, make, shared, output.private, output.update, attack_key)
        update = jax.tree.map(lambda own, bad: jnp.where(wanted, bad, own), output.update, theirs)
        return output._replace(update=update)

    return algorithm._replace(client_update=client_update)


def only_where(wanted: jax.Array, compute: Callable[..., Any], *args: Any) -> Any:
    """``compute(*args)`` where ``wanted``, else zeros; a vmapped chunk in which nobody wants it computes nothing.

    A select would make every honest client pay for the attacker's optimisation.
    """

    def zeros_like(shapes):
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def run_if(wanted, function, args):
        shapes = jax.eval_shape(function, *args)
        return jax.lax.cond(wanted, lambda: function(*args), lambda: zeros_like(shapes))

    @custom_vmap
    def run(wanted, *args):
        return run_if(wanted, compute, args)

    @run.def_vmap
    def _run_batched(axis_size, in_batched, wanted, *args):
        axes = jax.tree.map(lambda batched: 0 if batched else None, tuple(in_batched[1:]))
        found = run_if(jnp.any(wanted), jax.vmap(compute, in_axes=axes, axis_size=axis_size), args)
        return found, jax.tree.map(lambda _: True, found)

    return run(wanted, *args)


def laid_out(upload: Upload, update: Shared) -> Shared:
    """An upload in the shapes of an honest client's update: rows past its length are cut off, dense leaves are zero."""

    def rows_of(name, like: Rows) -> Rows:
        values = upload.values.get(name)
        ids = upload.ids.astype(like.ids.dtype)
        if values is None:
            ids, values = jnp.full_like(ids, like.num_rows), jnp.zeros((len(ids), like.values.shape[1]))
        values = jnp.where((ids < like.num_rows)[:, None], values, 0.0).astype(like.values.dtype)
        if like.whole:
            return dataclasses.replace(like, values=add_rows(jnp.zeros_like(like.values), ids, values))
        num = len(like.ids)
        pad = max(num - len(ids), 0)
        ids = jnp.pad(ids[:num], (0, pad), constant_values=like.num_rows)
        return dataclasses.replace(like, ids=ids, values=jnp.pad(values[:num], ((0, pad), (0, 0))))

    if not isinstance(update, Shared) or not all(map(is_rows, update.tables.values())):
        raise ValueError("Poisoning needs a method whose update is a Shared with Rows for its tables, such as fedavg.")
    tables = {name: rows_of(name, like) for name, like in update.tables.items()}
    return Shared(tables, jax.tree.map(jnp.zeros_like, update.dense))


def rows_that_fit(num_interactions: int, num_negatives: int, num_items: int) -> int:
    """Rows in the upload of a client with so many interactions, each trained with so many negatives."""
    return min(num_interactions * (1 + num_negatives), num_items)
