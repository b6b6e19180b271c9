"""PFedRec: a private scoring function and a shared item table, tuned one after the other on each client.

Each client k minimises the binary cross-entropy of its own interactions,

    L_k(theta_k, V) = - sum_{(i, y) in D_k} y log p_ki + (1 - y) log(1 - p_ki),   p_ki = sigmoid(theta_k(v_i)),

over its score function theta_k (one linear layer, private and persistent) and its copy of the item table V (received
anew each round). A batch takes two steps: theta_k with learning rate eta, then, the loss computed again, V with
learning rate eta * |V| * c. The server takes the plain mean of the clients' tables. A client is scored with its own
theta_k and its own tuned copy of V (see `evaluation.on_client`).

Zhang et al., 2023, "Dual Personalization on Federated Recommendation" (IJCAI).

Differs from the paper: by default negatives of a round are distinct and a batch holds positives with their own;
``Negatives(4, replacement=True, mixed=True)`` draws and shuffles as the authors' code does, but for the rare positive
that gets one item twice. Private parameters of clients outside a cohort stay as they are.
"""

import jax
import jax.numpy as jnp
import optax

from fedjax_rec.algorithms.fedavg import fedavg
from fedjax_rec.data.negatives import Negatives
from fedjax_rec.federated.algorithm import Algorithm
from fedjax_rec.models.base import Examples, Model, Shared, View

# The score function first, then the item table with the loss computed anew: the paper's dual personalisation.
PERSONAL_FIRST = (("private",), ("rows", "dense"))


def personal_scorer(num_items: int, *, dim: int = 32, init_stddev: float = 1.0, head_seed: int = 0) -> Model:
    """Shared item vectors, scored by a linear layer of each client's own; logistic loss.

    Args:
      num_items: catalogue size.
      dim: length of item vectors.
      init_stddev: standard deviation of the initial item vectors.
      head_seed: all clients start from one layer, uniform in +-1/sqrt(dim): only then do their item tables agree on
        what a direction means, and their mean says something.
    """
    bound = dim**-0.5
    weights = jax.random.uniform(jax.random.key(head_seed), (dim + 1,), minval=-bound, maxval=bound)

    def init_shared(key):
        return Shared(tables={"item": init_stddev * jax.random.normal(key, (num_items, dim))}, dense={})

    def init_private(key):
        del key
        return {"weights": weights[:dim], "bias": weights[dim]}

    def batch_loss(view: View, private, examples: Examples, key):
        del key
        scores = view.rows["item"] @ private["weights"] + private["bias"]
        losses = jnp.logaddexp(0.0, scores) - examples.labels * scores
        return jnp.sum(examples.weights * losses) / jnp.maximum(examples.weights.sum(), 1.0)

    def score(shared: Shared, private):
        return shared.tables["item"] @ private["weights"] + private["bias"]

    return Model(init_shared, init_private, batch_loss, score)


def pfedrec(
    model: Model,
    *,
    num_items: int,
    lr: float = 0.1,
    item_lr_factor: float = 80.0,
    batch_size: int = 51,
    local_epochs: int = 1,
    negatives: Negatives | None = None,
) -> Algorithm:
    """PFedRec, with the hyper-parameters of the authors' code as defaults.

    Args:
      model: `personal_scorer`, or another with private parameters: the paper's plug-in for FedMF, FedNCF and FedRecon.
      num_items: catalogue size |V|.
      lr: eta, of the private parameters.
      item_lr_factor: c; the item table's learning rate is ``lr * num_items * c``.
      batch_size: interactions a step; with four negatives each, 51 make the paper's 256 examples.
      local_epochs: passes over the client's examples of a round.
      negatives: four, uniform, by default.
    """
    item_lr = lr * num_items * item_lr_factor
    optimizer = optax.partition(
        {"private": optax.sgd(lr), "shared": optax.sgd(item_lr)},
        {"rows": "shared", "dense": "shared", "private": "private"},
    )
    return fedavg(
        model,
        client_optimizer=optimizer,
        local_epochs=local_epochs,
        batch_size=batch_size,
        negatives=Negatives(4) if negatives is None else negatives,
        phases=PERSONAL_FIRST,
    )
