"""FedRAP: item vectors are a shared table plus a private one, kept apart by a regulariser.

Each client k scores item i with sigmoid(theta_k(c_i + d_ki)): C is the shared item table, D_k its private and
persistent one, theta_k its private linear layer. It minimises

    L_k(theta_k, C, D_k) = BCE_k(theta_k(C + D_k)) - lambda * MSE(D_k, C) + mu * L1(C),

where the second term drives the two tables apart and the third makes the shared one sparse; MSE and L1 are means over
entries. The server takes the plain mean of the clients' C. A client is scored with C plus its own D_k.

Li et al., 2024, "Federated Recommendation with Additive Personalization" (ICLR).

Memory: D takes ``num_clients * num_items * dim * 4`` bytes, in float32; see `federated.private_tables.private_bytes`.

Read results with care. D_k remembers every negative that was ever drawn. Under the protocol of the paper's code
(``exclusion="paper"``) the held-out item is never drawn, and it ranks high for that alone. And the lambda term has no
lower bound: at the paper's lambda = 0.1 and learning rate of the tables, D runs away on MovieLens 100K within ten
rounds (the loss falls far below zero) and the ranking gets worse; with lambda = 0 or 0.01 it does not. One published
version of the authors' code has that term commented out.

Differs from the paper: the regularisers are means over the batch's rows, as in the authors' code, and not over whole
tables; lambda and mu are constant, as in that code, where the paper's curriculum is computed and not used; local epochs
are a fixed number, where the code stops when a client's loss changes by less than 1e-4 of itself; no weight decay (1e-6
in the code); negatives of a round are distinct, drawn anew each round, and the same in its local epochs, and a batch
holds positives with their own negatives; the learning rates fall with the rounds that a client took part in, which are
all rounds in the paper; sums are divided by the expected cohort size.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedjax_rec.data.negatives import Negatives
from fedjax_rec.federated import local
from fedjax_rec.federated.algorithm import Algorithm, ClientOutput, ServerState
from fedjax_rec.federated.private_tables import MAX_PRIVATE_BYTES, add_to_tables, check_private_bytes
from fedjax_rec.models.base import Examples, Model, Shared, View


def additive_scorer(
    num_items: int,
    *,
    dim: int = 32,
    separation: float = 0.1,
    sparsity: float = 1e-3,
    init_stddev: float = 1.0,
    private_seed: int = 0,
) -> Model:
    """A linear layer of each client's own on the sum of a shared and a private item vector; logistic loss.

    The private parameters are ``{"tables": {"personal": [num_items, dim]}, "head": {"weights", "bias"}}``. The loss
    takes the batch's rows of both tables from the view and the head as its private part: rows of D are trained like
    rows of C, without a gradient of the whole table.

    Args:
      num_items: catalogue size.
      dim: length of item vectors.
      separation: lambda, weight of MSE(D, C), which is to be large.
      sparsity: mu, weight of the mean absolute entry of C.
      init_stddev: standard deviation of the initial entries of both tables.
      private_seed: all clients start from one D and one head (uniform in +-1/sqrt(dim)), as in the authors' code: so
        C + D is one table at first, which the mean of the clients' C can correct.
    """
    bound = dim**-0.5

    def init_shared(key):
        return Shared(tables={"common": init_stddev * jax.random.normal(key, (num_items, dim))}, dense={})

    def init_private(key):
        del key
        table_key, head_key = jax.random.split(jax.random.key(private_seed))
        weights = jax.random.uniform(head_key, (dim + 1,), minval=-bound, maxval=bound)
        personal = init_stddev * jax.random.normal(table_key, (num_items, dim))
        return {"tables": {"personal": personal}, "head": {"weights": weights[:dim], "bias": weights[dim]}}

    def batch_loss(view: View, private, examples: Examples, key):
        del key
        common, personal = view.rows["common"], view.rows["personal"]
        scores = (common + personal) @ private["weights"] + private["bias"]
        losses = jnp.logaddexp(0.0, scores) - examples.labels * scores
        losses -= separation * jnp.mean(jnp.square(personal - common), -1)
        losses += sparsity * jnp.mean(jnp.abs(common), -1)
        return jnp.sum(examples.weights * losses) / jnp.maximum(examples.weights.sum(), 1.0)

    def score(shared: Shared, private):
        items = shared.tables["common"] + private["tables"]["personal"]
        return items @ private["head"]["weights"] + private["head"]["bias"]

    return Model(init_shared, init_private, batch_loss, score)


def fedrap(
    model: Model,
    *,
    num_clients: int,
    table_lr: float = 1e3,
    head_lr: float = 1e-4,
    batch_decay: float = 0.95,
    round_decay: float = 0.97,
    local_epochs: int = 10,
    batch_size: int | None = 409,
    negatives: Negatives | None = None,
    max_private_bytes: int = MAX_PRIVATE_BYTES,
) -> Algorithm:
    """FedRAP, with the hyper-parameters of the authors' code (for MovieLens 100K) as defaults.

    Args:
      model: `additive_scorer`, or another whose private parameters are ``{"tables": ..., "head": ...}``.
      num_clients: clients in the population, for the refusal below.
      table_lr: learning rate of C and D on the mean loss of a batch.
      head_lr: learning rate of the head.
      batch_decay: factor on both learning rates after each batch, anew in each round.
      round_decay: factor on both learning rates after each round that the client took part in.
      local_epochs: passes over the client's examples of a round.
      batch_size: interactions a step; with four negatives each, 409 make 2,045 of the paper's 2,048 examples.
      negatives: four, uniform, by default.
      max_private_bytes: most bytes for the private tables of all clients together.

    Raises:
      ValueError: if the private tables would take more than ``max_private_bytes``, or ``local_epochs`` is below 1.
    """
    private_shapes = jax.eval_shape(model.init_private, jax.random.key(0))
    check_private_bytes(num_clients, private_shapes["tables"], max_private_bytes)
    if local_epochs < 1:
        raise ValueError(f"local_epochs must be at least 1; got {local_epochs}.")
    negatives = Negatives(4) if negatives is None else negatives

    def client_optimizer(lr_scale: jax.Array) -> optax.GradientTransformation:
        def decaying(lr):
            return optax.sgd(lambda step: lr * lr_scale * batch_decay**step)

        return optax.partition(
            {"tables": decaying(table_lr), "head": decaying(head_lr)},
            {"rows": "tables", "dense": "tables", "private": "head"},
        )

    def init(key):
        return ServerState(jnp.zeros((), jnp.int32), model.init_shared(key), ())

    def init_private(key):
        return model.init_private(key) | {"lr_scale": jnp.ones(())}

    def client_update(shared, private, client, num_steps, key):
        draw_key, train_key = jax.random.split(key)
        tables: dict[str, Any] = private["tables"]
        trained = local.train(
            model,
            client_optimizer(private["lr_scale"]),
            Shared(shared.tables | tables, shared.dense),
            private["head"],
            local.draw_epoch(client, negatives, batch_size, draw_key),
            num_steps=num_steps,
            num_epochs=local_epochs,
            key=train_key,
        )
        update = Shared({name: trained.rows[name] for name in shared.tables}, trained.dense)
        private = {
            "tables": add_to_tables(tables, trained.rows),
            "head": trained.private,
            "lr_scale": private["lr_scale"] * round_decay,
        }
        return ClientOutput(update, private, {"loss": trained.loss})

    def server_update(state, aggregate):
        return state._replace(shared=optax.apply_updates(state.shared, aggregate))

    return Algorithm(
        init=init,
        init_private=init_private,
        client_update=client_update,
        num_steps=lambda client: local.num_batches(client, batch_size),
        server_update=server_update,
    )
