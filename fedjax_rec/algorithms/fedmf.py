"""FedMF: matrix factorisation whose user vectors stay on the clients, and whose item rows are averaged.

With user vectors p_u, private and persistent, and item rows q_i, received anew each round, each client u takes gradient
steps on its own part of

    min_{P, Q}  sum_u L_u(p_u, Q) + l2 (||p_u||^2 + sum_{i in D_u} ||q_i||^2) / 2

and sends how its rows of Q have changed, u_ui. The server has two rules:

    "mean"     q_i <- q_i + (1/m) sum_u u_ui          m clients in the (expected) cohort, whoever touched i
    "visits"   q_i <- q_i + (1/n_i) sum_u u_ui        n_i clients of this cohort that touched i

Chai et al., 2020, "Secure Federated Matrix Factorization" (IEEE Intelligent Systems), whose server adds up gradients of
items; and the baseline of that name in Zhang et al., 2023, "Dual Personalization on Federated Recommendation" (IJCAI),
private user vectors and a plain mean of item tables. ``phases=PERSONAL_FIRST`` from `algorithms.pfedrec` plugs their
dual personalisation in; clients are then scored with their own tuned copy of Q (`evaluation.on_client`).

Counts. For "visits" a client sends one more table, ``visit_weight`` in each row that it touched, positives and drawn
negatives alike; the server holds the count of the last round in ``tables["visits"]`` and broadcasts it with the rest.
Nothing else can be divided by: a server that only sees sums does not know who touched what.

With a clip at C, rows and counts are scaled together by the client's factor f_u = min(1, C / norm_u), so the server's
ratio is the mean of u_ui over the touching clients, weighted by f_u. A client with many rows, or large ones, weighs
less, and no single row of it is bounded by C. The counts take visit_weight * sqrt(rows touched) of the joint norm, and
that much of C. With noise of standard deviation s on the sum, a count is off by s / visit_weight, and dividing is
post-processing: it costs no privacy, but a row whose count the noise has brought near zero would be blown up without
bound. So the divisor is max(n_i, min_visits); set min_visits to a few s / visit_weight, and rare items move less.

Differs from the paper: no homomorphic encryption (Chai et al. encrypt the upload; see the update chain for sums that
the server cannot look into); logistic loss on implicit feedback; a batch's loss is a mean, so learning rates are larger
than in published code. The baseline's settings (learning rate 0.1, l2 1e-6, 300 rounds) leave Q where it was under a
mean over all clients; the settings named below were found by validation on MovieLens 100K.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from fedjax_rec.data.negatives import Negatives
from fedjax_rec.federated import local
from fedjax_rec.federated.algorithm import Algorithm, ClientOutput, ServerState
from fedjax_rec.federated.rows import Rows, add_rows
from fedjax_rec.models.base import Model, Shared

AGGREGATIONS = ("mean", "visits")
VISITS = "visits"


def touched_rows(epoch: local.Epoch) -> jax.Array:
    """float32 ``[n]``: 1 for each entry of ``local.row_ids(epoch)``, flattened, that some example uses, else 0."""
    weights = epoch.examples.weights
    if epoch.slots is None:
        used = weights.reshape(-1)
    else:
        used = add_rows(jnp.zeros((len(epoch.row_ids), 1)), epoch.slots, weights[..., None])[:, 0]
    return (used > 0).astype(jnp.float32)


def fedmf(
    model: Model,
    *,
    aggregation: str = "mean",
    cohort_size: float | None = None,
    lr: float = 1.0,
    item_lr: float = 1000.0,
    local_epochs: int = 1,
    batch_size: int | None = 51,
    negatives: Negatives | None = None,
    phases: Sequence[Sequence[str]] = local.ONE_PHASE,
    visit_weight: float = 1.0,
    min_visits: float = 1.0,
) -> Algorithm:
    """FedMF.

    Args:
      model: `matrix_factorization`, or another with user vectors as private parameters.
      aggregation: "mean" over the expected cohort or "visits", over the clients that touched a row. Dense parameters,
        if the model has any, are averaged over the cohort by both.
      cohort_size: the sampler's ``expected_size``; needed for "visits", whose counts come as a mean over the cohort.
      lr: of private parameters on the client; 10 for "visits".
      item_lr: of item rows and dense parameters on the client. The default is for "mean", where it also makes up for
        the clients that did not touch a row; 100 for "visits".
      local_epochs: passes over the client's examples of a round.
      batch_size: interactions a step; with four negatives each, 51 make the usual 256 examples.
      negatives: four, uniform, by default.
      phases: what moves in which step of a batch; by default everything in one.
      visit_weight: what a client sends for a touched row; the server divides it out again. Small values leave more of
        a clip norm to the rows, and noisier counts.
      min_visits: the least divisor, in clients.

    Raises:
      ValueError: for an unknown aggregation, "visits" without a cohort size, a weight or divisor that is not positive,
        or no epochs.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation must be one of {', '.join(AGGREGATIONS)}; got {aggregation!r}.")
    by_visits = aggregation == "visits"
    if by_visits and not (cohort_size or 0) > 0:
        raise ValueError(f'aggregation="visits" needs cohort_size=sampler.expected_size; got {cohort_size}.')
    if not (visit_weight > 0 and min_visits > 0):
        raise ValueError(f"visit_weight and min_visits must be positive; got {visit_weight} and {min_visits}.")
    if local_epochs < 1:
        raise ValueError(f"local_epochs must be at least 1; got {local_epochs}.")
    negatives = Negatives(4) if negatives is None else negatives
    optimizer = optax.partition(
        {"private": optax.sgd(lr), "shared": optax.sgd(item_lr)},
        {"rows": "shared", "dense": "shared", "private": "private"},
    )
    local.check_client_optimizer(optimizer, model, phases)

    def init(key):
        shared = model.init_shared(key)
        if by_visits:
            num_items = len(next(iter(shared.tables.values())))
            shared = Shared(shared.tables | {VISITS: jnp.zeros((num_items, 1))}, shared.dense)
        return ServerState(jnp.zeros((), jnp.int32), shared, ())

    def client_update(shared, private, client, num_steps, key):
        draw_key, train_key = jax.random.split(key)
        epoch = local.draw_epoch(client, negatives, batch_size, draw_key)
        tables = {name: table for name, table in shared.tables.items() if name != VISITS}
        trained = local.train(
            model,
            optimizer,
            Shared(tables, shared.dense),
            private,
            epoch,
            num_steps=num_steps,
            num_epochs=local_epochs,
            key=train_key,
            phases=phases,
        )
        rows = trained.rows
        if by_visits:
            ids = local.row_ids(epoch).reshape(-1)
            rows = rows | {VISITS: Rows(ids, visit_weight * touched_rows(epoch)[:, None], client.num_items)}
        return ClientOutput(Shared(rows, trained.dense), trained.private, {"loss": trained.loss})

    def server_update(state, aggregate):
        change = aggregate.tables
        if by_visits:
            visits = change[VISITS] * (cohort_size / visit_weight)
            share = cohort_size / jnp.maximum(visits, min_visits)
            change = {name: share * sums for name, sums in change.items() if name != VISITS}
            # The count itself is replaced: it is this round's.
            change |= {VISITS: visits - state.shared.tables[VISITS]}
        return state._replace(shared=optax.apply_updates(state.shared, Shared(change, aggregate.dense)))

    return Algorithm(
        init=init,
        init_private=model.init_private,
        client_update=client_update,
        num_steps=lambda client: local.num_batches(client, batch_size),
        server_update=server_update,
    )
