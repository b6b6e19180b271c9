"""FedRecon: clients keep nothing; each round they reconstruct their private parameters and then train the shared ones.

Client i of the cohort receives the shared parameters g, and splits its data in a support half D_s and a query half D_q.
Its private parameters l start anew and take k_r steps on the support half, g standing still,

    R:  l <- l - eta_r  grad_l f_i(g || l; batch of D_s),

then the shared ones take k_u steps on the query half, l standing still,

    U:  g_i <- g_i - eta_u  grad_g f_i(g_i || l; batch of D_q),

and it sends Delta_i = g_i - g. The server takes g <- g + eta_s sum_i n_i Delta_i / sum_i n_i, n_i the query examples.
Since nothing persists, a client that was never in training gets its l by the same R: see `reconstruct`.

Singhal et al., 2021, "Federated Reconstruction: Partially Local Federated Learning" (NeurIPS). With
``phases=PERSONAL_FIRST`` from `algorithms.pfedrec`, U moves l too, before g, in each batch: the dual personalisation of
Zhang et al., 2023, "Dual Personalization on Federated Recommendation" (IJCAI), plugged in.

Differs from the paper: sums are divided by the expected cohort size, and every client weighs the same unless told
otherwise, as DP needs. Halves are cut by examples, not by batches, and drawn anew each round; ready-made examples
(`client_data_from_examples`) keep their order, and so their halves, as in the authors' code. The authors' squared error
is twice that of ``matrix_factorization(loss="squared")``, so their rates are half of those to use here.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_rec.algorithms.fedavg import NO_PUBLIC_WEIGHTS, fedavg
from fedjax_rec.data.clients import Client
from fedjax_rec.data.negatives import Negatives
from fedjax_rec.federated import local
from fedjax_rec.federated.algorithm import Algorithm, ClientOutput
from fedjax_rec.federated.rows import take_rows
from fedjax_rec.federated.transforms import scale_update
from fedjax_rec.models.base import Examples, Model, Shared, View

SHARED_ONLY = (("rows", "dense"),)


def fedrecon(
    model: Model,
    *,
    reconstruction_optimizer: optax.GradientTransformation,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation | None = None,
    reconstruction_epochs: int = 5,
    reconstruction_steps: int = 50,
    update_epochs: int = 1,
    update_steps: int = 50,
    batch_size: int = 5,
    support_share: float = 0.5,
    negatives: Negatives | None = None,
    phases: Sequence[Sequence[str]] = SHARED_ONLY,
    max_examples: int | None = None,
    mean_examples: float | None = None,
) -> Algorithm:
    """FedRecon, with the numbers of steps of the authors' MovieLens run as defaults.

    A client's private state is what it had after its last round, for scoring; the next round does not read it.

    Args:
      model: its private part is what is reconstructed, from ``model.init_private``.
      reconstruction_optimizer: of R; it may keep state, which starts anew each round.
      client_optimizer: of U, on ``{"rows", "dense", "private"}``; stateless on item rows.
      server_optimizer: applied to minus the mean update; ``optax.sgd(1.0)`` by default.
      reconstruction_epochs, reconstruction_steps: passes over the support half, and most steps over all passes.
      update_epochs, update_steps: passes over the query half, and most steps of a pass.
      batch_size: interactions a step (negatives come on top).
      support_share: share of a client's interactions in its support half, rounded up; in (0, 1).
      negatives: for implicit feedback; each stays with its positive.
      phases: what U moves, see `local.train`; the shared parameters alone by default.
      max_examples: public bound b on n_i; a client then weighs min(n_i, b) / b instead of 1, which DP allows.
      mean_examples: a client weighs n_i / mean_examples, the paper's weights, which DP refuses.

    Raises:
      ValueError: for numbers out of range, both kinds of weights, or a client optimizer that keeps state for rows.
    """
    numbers = (reconstruction_epochs, reconstruction_steps, update_epochs, update_steps, batch_size)
    if min(numbers) < 1:
        raise ValueError(f"Epochs and steps of both parts, and batch_size, must be at least 1; got {numbers}.")
    if not 0 < support_share < 1:
        raise ValueError(f"support_share must lie between 0 and 1, or a half is empty; got {support_share}.")
    if max_examples is not None and mean_examples is not None:
        raise ValueError("max_examples and mean_examples are two ways to weigh clients; pass one of them.")
    recon_limits = (reconstruction_epochs, reconstruction_steps)
    all_phases = (*phases, ("private",)) if phases == SHARED_ONLY else phases
    server = fedavg(model, client_optimizer=client_optimizer, server_optimizer=server_optimizer, phases=all_phases)

    def client_update(shared, private, client, num_steps, key):
        del private
        draw_key, init_key, recon_key, train_key = jax.random.split(key, 4)
        epoch = local.draw_epoch(client, negatives, batch_size, draw_key)
        num_support, num_query = _halves(client.length, support_share)
        most_support, most_query = _halves(num_steps, support_share)
        room_support, room_query = (int(n) for n in _halves(client.item_ids.shape[0], support_share, np))
        num_query = jnp.minimum(num_query, update_steps * batch_size)
        support = _part(epoch, client, 0, num_support, room_support)
        query = _part(epoch, client, num_support, num_query, min(room_query, update_steps * batch_size))
        batches = [-(-n // batch_size) for n in (num_support, most_support, most_query)]
        own = model.init_private(init_key)
        own = _reconstructed(
            model, reconstruction_optimizer, shared, own, support.examples, batches[:2], recon_limits, recon_key
        )
        num_updates = {"num_steps": jnp.minimum(batches[2], update_steps), "num_epochs": update_epochs}
        trained = local.train(model, client_optimizer, shared, own, query, **num_updates, key=train_key, phases=phases)
        update, num = Shared(trained.rows, trained.dense), num_query.astype(jnp.float32)
        if mean_examples is not None:
            update = scale_update(update, num / mean_examples)
        if max_examples is not None:
            update = scale_update(update, jnp.minimum(num, max_examples) / max_examples)
        return ClientOutput(update, trained.private, {"loss": trained.loss})

    return server._replace(
        client_update=client_update,
        # The longest client of a chunk says how many steps R and U need at most, so its length is what each gives.
        num_steps=lambda client: client.length,
        no_dp="" if mean_examples is None else NO_PUBLIC_WEIGHTS,
    )


def reconstruct(
    model: Model,
    shared: Shared,
    client: Client,
    key: jax.Array,
    *,
    optimizer: optax.GradientTransformation,
    epochs: int = 5,
    steps: int = 50,
    batch_size: int = 5,
    negatives: Negatives | None = None,
) -> Any:
    """One client's private parameters from all of its data, whether training ever saw it or not; nothing is sent.

    Args:
      model: as in training.
      shared: the server's.
      client: what the client knows of itself; all of it is support.
      key: of initial private parameters, order and negatives.
      optimizer, epochs, steps, batch_size, negatives: as those of reconstruction in `fedrecon`.

    Returns:
      The model's private pytree; as initialised for a client without data.
    """
    draw_key, init_key, recon_key = jax.random.split(key, 3)
    examples = local.draw_epoch(client, negatives, batch_size, draw_key).examples
    num_batches = local.num_batches(client, batch_size)
    start = model.init_private(init_key)
    return _reconstructed(
        model, optimizer, shared, start, examples, (num_batches, num_batches), (epochs, steps), recon_key
    )


def _reconstructed(model, optimizer, shared, private, examples, num_batches, limits, key) -> Any:
    """Private parameters after R on a client's batches; ``num_batches`` is its own and the most of its chunk."""
    rows = {name: take_rows(table, examples.ids) for name, table in shared.tables.items()}
    epochs, steps = limits
    own_batches, most_batches = num_batches
    own_steps, most_steps = (jnp.minimum(epochs * n, steps) for n in (own_batches, most_batches))

    def step(index, carry):
        private, opt_state = carry
        at = index % jnp.maximum(own_batches, 1)
        batch, batch_rows = jax.tree.map(lambda x: x[at], (examples, rows))
        step_key = jax.random.fold_in(key, index)
        view = View(batch_rows, shared.dense)
        gradient = jax.grad(lambda private: model.loss(view, private, batch, step_key))(private)
        updates, new_state = optimizer.update(gradient, opt_state, private)
        new = optax.apply_updates(private, updates), new_state
        return jax.tree.map(lambda x, old: jnp.where(index < own_steps, x, old), new, carry)

    return jax.lax.fori_loop(0, most_steps, step, (private, optimizer.init(private)))[0]


def _halves(length, support_share: float, library=jnp):
    """How many of a client's interactions are support and query; the same in NumPy for what must be static."""
    num_support = library.ceil(np.float32(support_share) * length).astype(np.int32)
    return num_support, length - num_support


def _part(epoch: local.Epoch, client: Client, first, num, room: int) -> local.Epoch:
    """The examples ``first .. first + num - 1`` of an epoch, at most ``room``, cut into batches anew."""
    _, rows, columns = epoch.examples.ids.shape
    steps = max(-(-room // rows), 1)
    position = jnp.arange(steps * rows)
    place = jnp.where(position < num, first + position, len(client.item_ids) * rows)

    def cut(x, fill):
        return x.reshape(-1, columns).at[place].get(mode="fill", fill_value=fill).reshape(steps, rows, columns)

    examples = jax.tree.map(cut, epoch.examples, Examples(client.num_items, 0.0, 0.0))
    slots = None if epoch.slots is None else cut(epoch.slots, len(epoch.row_ids))
    return local.Epoch(examples, slots, epoch.row_ids)
