"""FedNCF: neural collaborative filtering whose user vectors stay on the clients.

Client u scores item i as y_ui = sigmoid(f(p_u, q_i | theta)), and minimises the binary cross-entropy of its own items
against drawn negatives,

    L_u(p_u, Q, theta) = - sum_{(i, y) in D_u} y log y_ui + (1 - y) log(1 - y_ui)

It keeps p_u, and sends how its copies of the item table Q and of the network theta have changed. The server aggregates
the two by different rules: the network by the mean over clients, the rows of Q by a sum, up to a factor.

Perifanis and Efraimidis, 2022, "Federated Neural Collaborative Filtering" (Knowledge-Based Systems). With
``phases=PERSONAL_FIRST`` from `algorithms.pfedrec` it is the FedNCF with dual personalisation of Zhang et al., 2023,
"Dual Personalization on Federated Recommendation" (IJCAI).

Differs from the paper: clients take plain gradient steps, with learning rates found by trial on MovieLens 100K (an
optimizer's moments of item rows would have to stay with each client). A row of Q is moved by the few clients that touch
it and would stand still under a mean over all of them, so the server steps Q by ``num_items * item_lr_factor`` times
the mean: linear in the updates, where a mean over the touching clients would need their counts. Such a factor in the
clients' learning rate, as in PFedRec, diverged with two local epochs: clients then meet their own large steps.
Negatives of a round are distinct; a batch holds positives with their own negatives.
"""

from collections.abc import Sequence

import optax

from fedjax_rec.algorithms.fedavg import fedavg
from fedjax_rec.data.negatives import Negatives
from fedjax_rec.federated import local
from fedjax_rec.federated.algorithm import Algorithm
from fedjax_rec.models.base import Model, Shared


def fedncf(
    model: Model,
    *,
    num_items: int,
    lr: float = 5.0,
    tower_lr: float = 0.3,
    item_lr_factor: float = 0.2,
    batch_size: int = 51,
    local_epochs: int = 2,
    negatives: Negatives | None = None,
    phases: Sequence[Sequence[str]] = local.ONE_PHASE,
) -> Algorithm:
    """FedNCF.

    Args:
      model: `mlp`, `gmf` or `neumf` of `models.neural_cf`, or another with user vectors as private parameters.
      num_items: catalogue size.
      lr: of the user vectors and of the item rows on the client. With 10 one of two seeds diverged on MovieLens 100K.
      tower_lr: of the dense parameters on the client.
      item_lr_factor: the server's step on item tables is ``num_items * item_lr_factor`` times the mean update; on dense
        parameters it is 1. Not much larger: with 0.8 and a ``tower_lr`` of 1, GMF and NeuMF diverged.
      batch_size: interactions a step; with four negatives each, 51 make the usual 256 examples.
      local_epochs: passes over the client's examples of a round.
      negatives: four, uniform, by default.
      phases: what moves in which step of a batch; by default everything in one.
    """
    client_optimizer = optax.partition(
        {"vectors": optax.sgd(lr), "tower": optax.sgd(tower_lr)},
        {"rows": "vectors", "private": "vectors", "dense": "tower"},
    )
    server_optimizer = optax.partition(
        {"tables": optax.sgd(num_items * item_lr_factor), "tower": optax.sgd(1.0)}, Shared("tables", "tower")
    )
    return fedavg(
        model,
        client_optimizer=client_optimizer,
        server_optimizer=server_optimizer,
        local_epochs=local_epochs,
        batch_size=batch_size,
        negatives=Negatives(4) if negatives is None else negatives,
        phases=phases,
    )
