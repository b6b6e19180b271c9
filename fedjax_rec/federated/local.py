"""Local training of one client on the rows of the shared tables that it touches.

Two layouts. If a client's items are distinct within the epoch, each example carries its own copy of its row and no
scatter is needed. If items repeat, the client trains a compact table of its distinct rows (or of all rows, if it may
draw as many as there are), gathered and scattered a batch at a time.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_rec.data.clients import Client, ClientData
from fedjax_rec.data.negatives import (
    Negatives,
    independent_negatives,
    permute,
    popularity_negatives,
    uniform_negatives,
)
from fedjax_rec.federated.rows import Rows, add_rows, distinct_rows, take_rows
from fedjax_rec.models.base import Examples, Model, Shared, View

GROUPS = ("rows", "dense", "private")
ONE_PHASE = (GROUPS,)


class Epoch(NamedTuple):
    """One client's examples of a round, cut into batches.

    Attributes:
      examples: `Examples` with leaves ``[steps, batch, 1 + negatives]``.
      slots: int32, same shape, places in ``row_ids``; None if ids are distinct.
      row_ids: int32 ``[S]`` or None.
      whole: True if ``row_ids`` is the whole catalogue in order.
    """

    examples: Examples
    slots: jax.Array | None
    row_ids: jax.Array | None
    whole: bool = False


class Trained(NamedTuple):
    """The result of local training.

    Attributes:
      rows: ``{table: Rows}``, trained minus received.
      dense: trained minus received.
      private: trained.
      loss: mean batch loss before each step, first epoch.
    """

    rows: dict[str, Rows]
    dense: Any
    private: Any
    loss: jax.Array


def batch_rows(client: Client, batch_size: int | None) -> int:
    """Interactions in a batch: ``batch_size``, or all that the bucket holds."""
    capacity = client.item_ids.shape[-1]
    return capacity if batch_size is None else min(batch_size, capacity)


def num_batches(client: Client, batch_size: int | None) -> jax.Array:
    """Batches in this client's epoch, int32 scalar."""
    return -(-client.length // batch_rows(client, batch_size))


def mean_steps(clients: ClientData, *, batch_size: int | None = None, local_epochs: int = 1) -> float:
    """Mean local steps K of a client; computed from data, so not for DP unless all have one batch."""
    batches = [num_batches(bucket, batch_size) for bucket in clients.buckets]
    return local_epochs * float(sum(x.sum() for x in batches)) / clients.num_clients


def draw_epoch(client: Client, negatives: Negatives | None, batch_size: int | None, key: jax.Array) -> Epoch:
    """A client's examples of this round: shuffled, each with its negatives, cut into batches.

    Ready-made examples (with ``slots``) keep their order, and nothing is drawn.
    """
    rows = batch_rows(client, batch_size)
    steps = -(-client.item_ids.shape[0] // rows)
    slots, row_ids, whole = None, client.row_ids, False
    order_key, negative_key = jax.random.split(key)
    if client.slots is not None:
        examples, slots = _given(client, steps * rows)
    elif negatives is None or not negatives.num_per_positive:
        examples = _own(client, steps * rows, order_key)
    elif negatives.replacement and negatives.mixed:
        examples = _own_among_negatives(client, negatives, steps * rows, order_key, negative_key)
    else:
        own = _own(client, steps * rows, order_key)
        drawn = _draw_negatives(client, negatives, steps * rows, negative_key)
        examples = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), own, drawn)
        if negatives.mixed:
            examples = _mixed(examples, client, jax.random.fold_in(key, 2))
    examples = jax.tree.map(lambda x: x.reshape(steps, rows, *x.shape[1:]), examples)
    if slots is not None:
        slots = slots.reshape(steps, rows, 1)
    elif negatives is not None and negatives.num_per_positive and negatives.replacement:
        if examples.ids.size < client.num_items:
            row_ids, slots = distinct_rows(examples.ids.reshape(-1), client.num_items)
            slots = slots.reshape(examples.ids.shape)
        else:
            slots, row_ids, whole = examples.ids, jnp.arange(client.num_items, dtype=jnp.int32), True
    return Epoch(examples, slots, row_ids, whole)


def _given(client: Client, num: int) -> tuple[Examples, jax.Array]:
    """The client's examples in their order, ``[num, 1]``, and their places in ``row_ids``, ``[num]``."""

    def padded(values, fill):
        return jnp.pad(values, (0, num - len(values)), constant_values=fill)

    real = (jnp.arange(num) < client.length).astype(jnp.float32)
    examples = Examples(padded(client.item_ids, client.num_items), padded(client.labels, 0), real)
    return jax.tree.map(lambda x: x[:, None], examples), padded(client.slots, client.row_ids.shape[0])


def _own(client: Client, num: int, key: jax.Array) -> Examples:
    """The client's own examples in some order, ``[num, 1]``."""
    capacity = client.item_ids.shape[0]
    position = jnp.arange(num, dtype=jnp.int32)
    real = position < client.length
    place = jnp.where(real, permute(key, position, client.length), capacity)
    ids = client.item_ids.at[place].get(mode="fill", fill_value=client.num_items)
    labels = client.labels.at[place].get(mode="fill", fill_value=0)
    return Examples(ids[:, None], labels[:, None], real.astype(jnp.float32)[:, None])


def _own_among_negatives(
    client: Client, negatives: Negatives, num: int, order_key: jax.Array, negative_key: jax.Array
) -> Examples:
    """Independent negatives, ``[num, 1 + negatives]``, with the client's own examples put in at places by chance.

    The order of independent draws says nothing, so only the places of the client's own need a permutation.
    """
    _check_uniform(negatives)
    columns = 1 + negatives.num_per_positive
    num_real = client.length * columns
    ids, weights = _draw(independent_negatives, client, num * columns, num_real, negative_key)
    position = jnp.arange(client.item_ids.shape[0], dtype=jnp.int32)
    place = jnp.where(position < client.length, permute(order_key, position, num_real), num * columns)
    ids = ids.at[place].set(client.item_ids, mode="drop")
    labels = jnp.zeros_like(weights).at[place].set(client.labels, mode="drop")
    weights = weights.at[place].set(1.0, mode="drop")
    return jax.tree.map(lambda x: x.reshape(num, columns), Examples(ids, labels, weights))


def _mixed(examples: Examples, client: Client, key: jax.Array) -> Examples:
    """The same examples in one chance order over all columns, padding still last."""
    shape = examples.ids.shape
    position = jnp.arange(examples.ids.size, dtype=jnp.int32)
    num_real = client.length * shape[1]
    source = jnp.where(position < num_real, permute(key, position, num_real), position)
    return jax.tree.map(lambda x: x.reshape(-1)[source].reshape(shape), examples)


def _check_uniform(negatives: Negatives) -> None:
    if negatives.distribution != "uniform":
        raise ValueError("Negatives with replacement are uniform; popularity sampling has none.")


def _draw(draw: Callable, client: Client, num: int, wanted: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    excluded = {"excluded": client.excluded, "num_excluded": client.num_excluded}
    return draw(key, num=num, wanted=wanted, num_items=client.num_items, **excluded)


def _draw_negatives(client: Client, negatives: Negatives, num_positives: int, key: jax.Array) -> Examples:
    """Negatives of each positive, ``[num_positives, negatives]``."""
    per_positive = negatives.num_per_positive
    position = jnp.arange(num_positives, dtype=jnp.int32)
    num = num_positives * per_positive
    wanted = client.length * per_positive
    if negatives.replacement:
        _check_uniform(negatives)
    if negatives.distribution == "uniform":
        draw = independent_negatives if negatives.replacement else uniform_negatives
        ids, weights = _draw(draw, client, num, wanted, key)
    else:
        ids, weights = popularity_negatives(
            key, num=num, wanted=wanted, excluded=client.excluded, item_cdf=negatives.item_cdf
        )
    # The j-th negative of the k-th positive is draw j * length + k: where the catalogue runs out, every positive
    # keeps its first negatives instead of the last positives having none.
    draw = jnp.arange(per_positive, dtype=jnp.int32)[None, :] * client.length + position[:, None]
    draw = jnp.where((position < client.length)[:, None], draw, num)
    ids = ids.at[draw].get(mode="fill", fill_value=client.num_items)
    weights = weights.at[draw].get(mode="fill", fill_value=0)
    return Examples(ids, jnp.zeros_like(weights), weights)


def row_ids(epoch: Epoch) -> jax.Array:
    """The item ids that `train` holds rows of, int32 ``[S]`` or ``[steps, batch, 1 + negatives]``, padded."""
    return epoch.row_ids if epoch.slots is not None else epoch.examples.ids


def train(
    model: Model,
    optimizer: optax.GradientTransformation,
    shared: Shared,
    private: Any,
    epoch: Epoch,
    *,
    num_steps: jax.Array,
    num_epochs: int,
    key: jax.Array,
    phases: Sequence[Sequence[str]] = ONE_PHASE,
    extra_gradient: Callable[[Shared], Shared] | None = None,
) -> Trained:
    """Runs ``num_epochs`` passes of ``num_steps`` batches; batches without examples change nothing.

    Args:
      model: gives the loss of a batch.
      optimizer: sees ``{"rows", "dense", "private"}``; it may keep state for dense and private leaves, not for rows
        (see `check_client_optimizer`).
      shared: what the server sent.
      private: the client's own.
      epoch: from `draw_epoch`.
      num_steps: int32 scalar; the same for all clients of a vmapped chunk, so that the loop needs no masking.
      num_epochs: passes over the same examples.
      key: for stochastic losses.
      phases: which of "rows", "dense" and "private" each step of a batch moves, one step a phase; a later phase sees
        what an earlier one did. By default one step moves all.
      extra_gradient: added to the gradient of shared parameters in every step that has examples. Takes current minus
        received and gives a `Shared` like it: tables ``[..., dim]`` laid out as `row_ids`, dense leaves as they are.
        It acts on every row the client holds and not only on the batch's, so a step costs as much as the client has
        rows; with one batch an epoch that is no more than without.

    Raises:
      ValueError: for several phases together with an extra gradient.
    """
    if extra_gradient is not None and len(phases) > 1:
        raise ValueError("extra_gradient needs one phase: it is the gradient of a term on rows and dense leaves both.")
    compact = epoch.slots is not None
    ids = row_ids(epoch)
    received = shared.tables if epoch.whole else {name: take_rows(t, ids) for name, t in shared.tables.items()}
    first = {name: table[0] if not compact else take_rows(table, epoch.slots[0]) for name, table in received.items()}
    has_examples = jnp.any(epoch.examples.weights > 0, axis=(1, 2))
    opt_state = optimizer.init({"rows": first, "dense": shared.dense, "private": private})

    def step(epoch_index, index, carry):
        tables, dense, private, opt_state, loss_sum = carry
        batch, slots = jax.tree.map(lambda x: x[index], (epoch.examples, epoch.slots))
        rows = {name: take_rows(t, slots) if compact else t[index] for name, t in tables.items()}
        params = {"rows": rows, "dense": dense, "private": private}
        real = has_examples[index]
        step_key = jax.random.fold_in(jax.random.fold_in(key, epoch_index), index)

        def loss(moved, params):
            params = params | moved
            return model.loss(View(params["rows"], params["dense"]), params["private"], batch, step_key)

        first_loss = None
        for phase in phases:
            value, gradient = jax.value_and_grad(loss)({name: params[name] for name in phase}, params)
            first_loss = value if first_loss is None else first_loss
            still = {name: jax.tree.map(jnp.zeros_like, params[name]) for name in GROUPS if name not in phase}
            updates, new_state = optimizer.update(gradient | still, opt_state, params)
            # Rows need no select: without examples, every slot is padding.
            updates |= jax.tree.map(lambda x: jnp.where(real, x, 0), {k: updates[k] for k in ("dense", "private")})
            opt_state = jax.tree.map(lambda new, old: jnp.where(real, new, old), new_state, opt_state)
            for name, change in updates["rows"].items() if "rows" in phase else ():
                table = tables[name]
                tables = tables | {name: add_rows(table, slots, change) if compact else table.at[index].add(change)}
            params = params | optax.apply_updates(
                {name: params[name] for name in phase}, {name: updates[name] for name in phase}
            )
        loss_sum += jnp.where(real & (epoch_index == 0), first_loss, 0.0)
        return tables, params["dense"], params["private"], opt_state, loss_sum

    def step_on_all_rows(epoch_index, index, carry):
        tables, dense, private, opt_state, loss_sum = carry
        batch, slots = jax.tree.map(lambda x: x[index], (epoch.examples, epoch.slots))
        rows = {name: take_rows(t, slots) if compact else t[index] for name, t in tables.items()}
        real = has_examples[index]
        step_key = jax.random.fold_in(jax.random.fold_in(key, epoch_index), index)

        def loss(params):
            return model.loss(View(params["rows"], params["dense"]), params["private"], batch, step_key)

        value, gradient = jax.value_and_grad(loss)({"rows": rows, "dense": dense, "private": private})
        extra = extra_gradient(jax.tree.map(jnp.subtract, Shared(tables, dense), Shared(received, shared.dense)))
        for name, table in extra.tables.items():
            of_batch = gradient["rows"][name]
            whole = add_rows(table, slots, of_batch) if compact else table.at[index].add(of_batch)
            gradient["rows"] = gradient["rows"] | {name: whole}
        gradient["dense"] = jax.tree.map(jnp.add, gradient["dense"], extra.dense)
        params = {"rows": tables, "dense": dense, "private": private}
        updates, new_state = optimizer.update(gradient, opt_state, params)
        updates = jax.tree.map(lambda x: jnp.where(real, x, 0), updates)
        opt_state = jax.tree.map(lambda new, old: jnp.where(real, new, old), new_state, opt_state)
        params = optax.apply_updates(params, updates)
        loss_sum += jnp.where(real & (epoch_index == 0), value, 0.0)
        return params["rows"], params["dense"], params["private"], opt_state, loss_sum

    one_step = step if extra_gradient is None else step_on_all_rows

    def one_epoch(epoch_index, carry):
        return jax.lax.fori_loop(0, num_steps, partial(one_step, epoch_index), carry)

    carry = (received, shared.dense, private, opt_state, jnp.zeros(()))
    carry = one_epoch(0, carry) if num_epochs == 1 else jax.lax.fori_loop(0, num_epochs, one_epoch, carry)
    tables, dense, private, _, loss_sum = carry
    ids = ids.reshape(-1)
    rows = {}
    for name, table in tables.items():
        change = (table - received[name]).reshape(-1, table.shape[-1])
        num_rows = shared.tables[name].shape[0]
        # No slot leads to a compact table's padding, but a copy that rides along or an extra gradient may move it.
        if not compact or (extra_gradient is not None and not epoch.whole):
            change = jnp.where((ids < num_rows)[:, None], change, 0.0)
        rows[name] = Rows(ids, change, num_rows, whole=epoch.whole)
    own_steps = jnp.maximum(has_examples.sum(), 1)
    return Trained(rows, jax.tree.map(jnp.subtract, dense, shared.dense), private, loss_sum / own_steps)


def check_client_optimizer(
    optimizer: optax.GradientTransformation, model: Model, phases: Sequence[Sequence[str]] = ONE_PHASE
) -> None:
    """Refuses a client optimizer that keeps state for every item row, and phases that do not fit.

    Rows live for one batch on the client, so momentum on them would be momentum of other items.

    Raises:
      ValueError: if the optimizer's state for the row parameters is not empty, if phases do not name each of "rows",
        "dense" and "private" once, or if there are several and the optimizer keeps any state.
    """
    if sorted(name for phase in phases for name in phase) != sorted(GROUPS):
        raise ValueError(f"phases must name each of {', '.join(GROUPS)} once, in one phase or more; got {phases}.")
    shared = jax.eval_shape(model.init_shared, jax.random.key(0))
    rows = {name: jax.ShapeDtypeStruct((3, 5, table.shape[1]), table.dtype) for name, table in shared.tables.items()}
    private = jax.eval_shape(model.init_private, jax.random.key(0))
    state = jax.eval_shape(optimizer.init, {"rows": rows, "dense": shared.dense, "private": private})
    if any(leaf.shape[:2] == (3, 5) for leaf in jax.tree.leaves(state)):
        raise ValueError(
            "The client optimizer keeps state for item rows (momentum, Adam). Use a stateless one for them, as in "
            "optax.partition({'rows': optax.sgd(0.1), ...}, ...), and put momentum into the server optimizer."
        )
    if len(phases) > 1 and jax.tree.leaves(state):
        raise ValueError(
            "With several phases a batch would step the client optimizer's state several times; use one without state, "
            "such as optax.sgd."
        )
