"""GPFedRec: a graph of users, made from their item tables, tells each client which table to stay close to.

Client u scores item i with f_u(p_u, q_i): a private vector p_u beside the item's, through a private tower f_u. It
starts from the server's item table Q and minimises, with BCE the mean over a batch and MSE the mean over all entries,

    L_u(p_u, f_u, Q_u) = BCE_u(f_u(p_u, Q_u)) + lambda * MSE(Q_u, R_u),

and uploads Q_u whole. The server links u and v if s(Q_u, Q_v) > gamma * mean(s), a user without a link to itself, and
sends back the mean table of u's neighbours, R_u <- mean_{v in N(u)} Q_v (`num_layers` times), and Q <- mean_u R_u. A
client is scored with p_u, f_u and the Q_u that it has just trained.

Zhang et al., 2024, "GPFedRec: Graph-Guided Personalization for Federated Recommendation" (KDD).

The paper's s is the cosine, ``similarity="cosine"``. The authors' code fills s with the cosine distance 1 - cos, so
that users are linked to those least like them, and not to themselves: ``similarity="distance"``.

The regulariser acts on the whole table in every step and is not small: with the learning rate of the item table,
eta * |Q| * c, a step pulls every entry towards R_u by 2 * lambda * eta * c / dim, one half of the way at the authors'
values. So rows without examples move too, a client holds all rows, and a step costs as much as the table is large.

The server needs every upload by itself (``individual=True``): a secure sum would hide what the graph is made of, and
central DP covers only a noised sum. Its state holds the tables R_u, which come from uploads and tell it nothing new.

Memory: two item tables for each client, ``2 * num_clients * num_items * dim * 4`` bytes: its upload in the sum, and
R_u. Of the table that it trained, a client keeps the scores. The server multiplies ``[clients, clients]`` with
``[clients, num_items * dim]`` twice in a round, which is most of the round's time.

Differs from the paper: the server knows by a 1 beside each upload who took part; clients that did not are no one's
neighbours and keep their R_u. By default negatives of a round are distinct and a batch holds positives with their own
(see `pfedrec`). A client's traffic is counted as one table each way; it downloads two, Q and R_u.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from fedjax_rec.data.negatives import Negatives
from fedjax_rec.federated import local
from fedjax_rec.federated.algorithm import Algorithm, ClientOutput, ServerState
from fedjax_rec.federated.grouping import neighbour_weights
from fedjax_rec.federated.private_tables import MAX_PRIVATE_BYTES, check_private_bytes
from fedjax_rec.federated.uploads import item_table, on_whole_table, received_uploads, upload, with_uploads
from fedjax_rec.models.base import Model, Shared, View
from fedjax_rec.models.neural_cf import mlp

SIMILARITIES = ("cosine", "distance")


def private_tower(
    num_items: int,
    *,
    dim: int = 32,
    hidden: Sequence[int] = (32, 16, 8),
    init_stddev: float = 1.0,
    private_seed: int = 0,
) -> Model:
    """`models.neural_cf.mlp` whose tower is private too; shared is the item table alone. Logistic loss.

    Args:
      num_items: catalogue size.
      dim: length of user and item vectors.
      hidden: width of each ReLU layer after the 2 * dim inputs.
      init_stddev: standard deviation of the initial vectors.
      private_seed: all clients start from one user vector and one tower (uniform in +-1/sqrt(inputs), as in PyTorch).
    """
    base = mlp(num_items, dim=dim, hidden=hidden)

    def init_shared(key):
        return Shared({"item": init_stddev * jax.random.normal(key, (num_items, dim))}, {})

    def init_private(key):
        del key
        user_key, *keys = jax.random.split(jax.random.key(private_seed), 2 * len(hidden) + 3)
        tower = jax.eval_shape(base.init_shared, jax.random.key(0)).dense
        bounds = {name.rpartition(".")[0]: x.shape[0] ** -0.5 for name, x in tower.items() if len(x.shape) == 2}
        for (name, x), key in zip(sorted(tower.items()), keys, strict=True):
            bound = bounds[name.rpartition(".")[0]]
            tower[name] = jax.random.uniform(key, x.shape, minval=-bound, maxval=bound)
        return {"user": init_stddev * jax.random.normal(user_key, (dim,)), "tower": tower}

    def loss(view: View, private, examples, key):
        return base.loss(View({"mlp": view.rows["item"]}, private["tower"]), {"mlp": private["user"]}, examples, key)

    def score(shared: Shared, private):
        return base.score(Shared({"mlp": shared.tables["item"]}, private["tower"]), {"mlp": private["user"]})

    return Model(init_shared, init_private, loss, score)


def gpfedrec(
    model: Model,
    *,
    num_clients: int,
    num_items: int,
    similarity: str = "cosine",
    threshold: float = 1.0,
    num_layers: int = 1,
    regularization: float = 1.0,
    lr: float = 0.1,
    item_lr_factor: float = 80.0,
    batch_size: int = 51,
    local_epochs: int = 1,
    negatives: Negatives | None = None,
    max_private_bytes: int = MAX_PRIVATE_BYTES,
) -> Algorithm:
    """GPFedRec, with the hyper-parameters of the authors' code as defaults. Score with `uploads.own_score`.

    Args:
      model: `private_tower`, or another that shares one table "item" and nothing else, such as `personal_scorer`.
      num_clients: clients in the population.
      num_items: catalogue size |Q|.
      similarity: s, "cosine" (the paper) or "distance" (the code).
      threshold: gamma.
      num_layers: how often tables are averaged over neighbours.
      regularization: lambda.
      lr: eta, of private parameters; "user", the private vector, has ``lr * (item_lr_factor - 1)``.
      item_lr_factor: c; the item table has ``lr * (num_items * item_lr_factor - 1)``. Both as in the authors' code.
      batch_size: interactions a step; with four negatives each, 51 make the usual 256 examples.
      local_epochs: passes over the client's examples of a round.
      negatives: four, uniform, by default.
      max_private_bytes: most bytes for the item tables of all clients together.

    Raises:
      ValueError: for an unknown similarity, a model that shares more than an item table, or too large tables.
    """
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity must be one of {', '.join(SIMILARITIES)}; got {similarity!r}.")
    table = item_table(model)
    check_private_bytes(num_clients, dict.fromkeys(("uploaded", "neighbours'"), table), max_private_bytes)
    negatives = Negatives(4) if negatives is None else negatives
    own = jax.eval_shape(model.init_private, jax.random.key(0))
    rates = {"table": lr * (num_items * item_lr_factor - 1), "user": lr * (item_lr_factor - 1), "rest": lr}
    labels = {name: "user" if name == "user" else "rest" for name in own}
    optimizer = optax.partition(
        {name: optax.sgd(rate) for name, rate in rates.items()}, {"rows": "table", "dense": "table", "private": labels}
    )

    def init(key):
        shared = model.init_shared(key)
        tables = with_uploads(shared.tables["item"], num_clients)
        return ServerState(jnp.zeros((), jnp.int32), Shared(tables, {}), ())

    def client_update(shared, private, client, num_steps, key):
        draw_key, train_key = jax.random.split(key)
        received = shared.tables["item"]
        neighbours = shared.tables["personal"].at[client.client_id].get(mode="clip").reshape(received.shape)

        def regularizer(change: Shared) -> Shared:
            current = received + change.tables["item"]
            return Shared({"item": 2 * regularization / current.size * (current - neighbours)}, {})

        epoch = local.draw_epoch(client, negatives, batch_size, draw_key)
        trained = local.train(
            model,
            optimizer,
            Shared({"item": received}, {}),
            private["own"],
            on_whole_table(epoch, num_items),
            num_steps=num_steps,
            num_epochs=local_epochs,
            key=train_key,
            extra_gradient=regularizer,
        )
        after = received + trained.rows["item"].values
        scores = model.score(Shared({"item": after}, {}), trained.private)
        update = Shared(upload(after, client.client_id, num_clients), {})
        return ClientOutput(update, {"own": trained.private, "scores": scores}, {"loss": trained.loss})

    def server_update(state, aggregate):
        before = state.shared.tables
        uploads, present = received_uploads(aggregate.tables)
        weights = neighbour_weights(uploads, present, similarity=similarity, threshold=threshold)
        for _ in range(num_layers):
            uploads = jnp.matmul(weights, uploads, precision=jax.lax.Precision.HIGHEST)
        mean = (present / jnp.maximum(present.sum(), 1)) @ uploads
        item = jnp.where(present.any(), mean.reshape(before["item"].shape), before["item"])
        personal = jnp.where(present[:, None], uploads, before["personal"])
        return state._replace(shared=Shared(before | {"item": item, "personal": personal}, {}))

    return Algorithm(
        init=init,
        init_private=lambda key: {"own": model.init_private(key), "scores": jnp.zeros(num_items)},
        client_update=client_update,
        num_steps=lambda client: local.num_batches(client, batch_size),
        server_update=server_update,
        individual=True,
    )
