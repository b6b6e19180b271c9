"""CoFedRec: in each round, the clients that agree on one group of items share a table; the others keep their own.

Client u scores item i with a private linear layer theta_u on its own item table V_u, and minimises

    L_u(theta_u, V_u) = BCE_u(theta_u(V_u)) + lambda * L_sup(V_u),

    L_sup = -(tau / tau_0) mean_i mean_{z in Z(i)} log [exp(v_i . v_z / tau) / sum_{a != i} exp(v_i . v_a / tau)],

with rows v of length one and Z(i) the other items of i's group: a supervised contrast that draws items of one group
together. It uploads V_u whole. The server

 1. groups the items by K-means on the mean table, and tells all clients the groups,
 2. picks a client c and a group at random; s_u is the sum of cos(V_c,i, V_u,i) over the items i of that group,
 3. sorts s and cuts at the elbow, the point farthest from the line between the first and the last,
 4. sends the clients up to the elbow the mean of their tables; each of the others goes on with its own.

A client is scored with theta_u and the V_u that it has just trained.

He, Liu, Keung and He, 2024, "Co-clustering for Federated Recommender System" (WWW). Sources: its abstract, another's
notes on its equations, steps and settings, and another's changed copy of its code; the paper itself was not at hand.

The server needs every upload by itself (``individual=True``): it compares clients with one another, so neither a secure
sum nor central DP applies. Memory: see `algorithms.gpfedrec`.

Differs from the paper: tau / tau_0, the mean over items and rows of length one are the code's (the notes have a sum
over raw rows, and the logarithm outside of the mean over Z); one step moves theta_u and V_u together, as in that code,
where the paper's backbone moves them in turn; the contrast is over ``num_contrasted`` items, drawn anew for each client
and round, and over the whole catalogue only if that is None; K-means starts from random items, with a fixed number of
steps, and the group of step 2 is one that has items; clients outside a cohort are in no group and keep their tables.
"""

import jax
import jax.numpy as jnp
import optax

from fedjax_rec.data.negatives import Negatives
from fedjax_rec.federated import local
from fedjax_rec.federated.algorithm import Algorithm, ClientOutput, ServerState
from fedjax_rec.federated.grouping import k_means, up_to_elbow
from fedjax_rec.federated.private_tables import MAX_PRIVATE_BYTES, check_private_bytes
from fedjax_rec.federated.rows import Rows
from fedjax_rec.federated.uploads import item_table, on_whole_table, received_uploads, upload, with_uploads
from fedjax_rec.models.base import Model, Shared

LENGTH_FLOOR = 1e-12  # on squared lengths: a zero row has no direction, and would have no gradient


def contrast(items: jax.Array, groups: jax.Array, *, temperature: float, base_temperature: float) -> jax.Array:
    """L_sup; an item alone in its group adds nothing.

    Args:
      items: float32 ``[n, dim]``.
      groups: ``[n]``, equal for items of one group.
      temperature: tau.
      base_temperature: tau_0.

    Returns:
      float32 scalar.
    """
    lengths = jnp.sqrt(jnp.sum(jnp.square(items), -1, keepdims=True) + LENGTH_FLOOR)
    unit = items / lengths
    logits = unit @ unit.T / temperature
    others = ~jnp.eye(len(items), dtype=bool)
    log_sums = jax.nn.logsumexp(jnp.where(others, logits, -jnp.inf), axis=1, keepdims=True)
    same = others & (groups[:, None] == groups[None, :])
    means = jnp.sum(jnp.where(same, logits - log_sums, 0.0), 1) / jnp.maximum(same.sum(1), 1)
    return -temperature / base_temperature * means.mean()


def cofedrec(
    model: Model,
    *,
    num_clients: int,
    num_items: int,
    num_groups: int = 30,
    contrast_weight: float = 0.005,
    temperature: float = 0.1,
    base_temperature: float = 0.5,
    num_contrasted: int | None = 256,
    num_k_means_steps: int = 20,
    lr: float = 0.05,
    item_lr_factor: float = 80.0,
    batch_size: int = 51,
    local_epochs: int = 2,
    negatives: Negatives | None = None,
    server_seed: int = 0,
    max_private_bytes: int = MAX_PRIVATE_BYTES,
) -> Algorithm:
    """CoFedRec, with the settings for MovieLens 100K as defaults. Score with `uploads.own_score`.

    Args:
      model: `personal_scorer`, or another that shares one table "item" and nothing else.
      num_clients: clients in the population.
      num_items: catalogue size.
      num_groups: K, groups of items.
      contrast_weight: lambda.
      temperature: tau.
      base_temperature: tau_0.
      num_contrasted: items in a client's contrast; None for all, whose square each step then costs.
      num_k_means_steps: moves of the centres of K-means.
      lr: of the private parameters.
      item_lr_factor: the item table's learning rate is ``lr * (num_items * item_lr_factor - 1)``, as in the code.
      batch_size: interactions a step; with four negatives each, 51 make the usual 256 examples.
      local_epochs: passes over the client's examples of a round.
      negatives: four, uniform, by default.
      server_seed: of what the server picks; folded with the round.
      max_private_bytes: most bytes for the item tables of all clients together.

    Raises:
      ValueError: for more groups than items, a model that shares more than an item table, or too large tables.
    """
    if not 1 <= num_groups <= num_items:
        raise ValueError(f"num_groups must be between 1 and num_items={num_items}; got {num_groups}.")
    table = item_table(model)
    check_private_bytes(num_clients, dict.fromkeys(("uploaded", "next"), table), max_private_bytes)
    negatives = Negatives(4) if negatives is None else negatives
    num_contrasted = num_items if num_contrasted is None else min(num_contrasted, num_items)
    item_lr = lr * (num_items * item_lr_factor - 1)
    optimizer = optax.partition(
        {"own": optax.sgd(lr), "table": optax.sgd(item_lr)}, {"rows": "table", "dense": "table", "private": "own"}
    )

    def init(key):
        tables = with_uploads(model.init_shared(key).tables["item"], num_clients)
        # Every item is a group at first, so there is nothing to draw together before the server has seen a table.
        tables["group"] = jnp.arange(num_items, dtype=jnp.float32)[:, None]
        return ServerState(jnp.zeros((), jnp.int32), Shared(tables, {}), ())

    def client_update(shared, private, client, num_steps, key):
        draw_key, train_key, contrast_key = jax.random.split(key, 3)
        received = shared.tables["personal"].at[client.client_id].get(mode="clip").reshape(table.shape)
        chosen = jax.random.choice(contrast_key, num_items, (num_contrasted,), replace=False)

        def of_contrast(change: Shared) -> Shared:
            groups, rows = shared.tables["group"][chosen, 0], (received + change.tables["item"])[chosen]
            taus = {"temperature": temperature, "base_temperature": base_temperature}
            gradient = contrast_weight * jax.grad(contrast)(rows, groups, **taus)
            return Shared({"item": jnp.zeros_like(received).at[chosen].set(gradient)}, {})

        trained = local.train(
            model,
            optimizer,
            Shared({"item": received}, {}),
            private["own"],
            on_whole_table(local.draw_epoch(client, negatives, batch_size, draw_key), num_items),
            num_steps=num_steps,
            num_epochs=local_epochs,
            key=train_key,
            extra_gradient=of_contrast,
        )
        after = received + trained.rows["item"].values
        scores = model.score(Shared({"item": after}, {}), trained.private)
        update = upload(after, client.client_id, num_clients)
        update["group"] = Rows(jnp.zeros(0, jnp.int32), jnp.zeros((0, 1)), num_items)
        return ClientOutput(Shared(update, {}), {"own": trained.private, "scores": scores}, {"loss": trained.loss})

    def server_update(state, aggregate):
        before = state.shared.tables
        uploads, present = received_uploads(aggregate.tables)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(server_seed), state.round), 3)
        mean = ((present / jnp.maximum(present.sum(), 1)) @ uploads).reshape(table.shape)
        groups = k_means(mean, num_groups, num_steps=num_k_means_steps, key=keys[0])
        sizes = jnp.zeros(num_groups).at[groups].add(1.0)
        group = jax.random.categorical(keys[1], jnp.where(sizes > 0, 0.0, -jnp.inf))
        core = jax.random.categorical(keys[2], jnp.where(present, 0.0, -jnp.inf))
        rows = uploads.reshape(num_clients, *table.shape)
        products = jnp.einsum("ctd,td->ct", rows, rows[core])
        lengths = jnp.sqrt(jnp.sum(jnp.square(rows), -1) + LENGTH_FLOOR)
        cosines = products / (lengths * lengths[core][None, :])
        similar = up_to_elbow(jnp.sum(jnp.where((groups == group)[None, :], cosines, 0.0), 1), present)
        shared_table = (similar / jnp.maximum(similar.sum(), 1)) @ uploads
        personal = jnp.where(similar[:, None], shared_table[None, :], uploads)
        tables = {
            "item": mean,
            "personal": jnp.where(present[:, None], personal, before["personal"]),
            "present": aggregate.tables["present"],
            "group": groups[:, None].astype(jnp.float32),
        }
        tables = {name: jnp.where(present.any(), new, before[name]) for name, new in tables.items()}
        return state._replace(shared=Shared(tables, {}))

    return Algorithm(
        init=init,
        init_private=lambda key: {"own": model.init_private(key), "scores": jnp.zeros(num_items)},
        client_update=client_update,
        num_steps=lambda client: local.num_batches(client, batch_size),
        server_update=server_update,
        individual=True,
    )
