"""Trains a model in one place and reports it as `ranked.train_and_rank` reports a federated one."""

from collections.abc import Callable, Sequence

import jax

from experiments.ranked import ask, common_split, measure, select
from fedjax_rec.data import Interactions
from fedjax_rec.data.clients import ClientData, client_data
from fedjax_rec.data.negatives import Negatives
from fedjax_rec.evaluation.protocol import Protocol
from fedjax_rec.models.centralised import Centralised, centralised
from fedjax_rec.models.matrix_factorization import matrix_factorization
from fedjax_rec.models.neural_cf import mlp, neumf

# Each positive draws on its own, as in published code; all examples of all users are shuffled together anyway.
NEGATIVES = Negatives(4, replacement=True)
INIT_STDDEV = 0.01  # of the vectors of neural models, as He et al. have it: Adam needs no wider start


def build_mf(clients: ClientData) -> Centralised:
    """The matrix factorisation of the FedMF row, with Adam."""
    return centralised(matrix_factorization(clients.num_items, dim=32, l2=1e-6), clients, negatives=NEGATIVES)


def build_mlp(clients: ClientData) -> Centralised:
    """The tower of the FedNCF row, with Adam."""
    return centralised(mlp(clients.num_items, init_stddev=INIT_STDDEV), clients, negatives=NEGATIVES)


def build_neumf(clients: ClientData) -> Centralised:
    """The tower and generalised matrix factorisation joined, with Adam."""
    return centralised(neumf(clients.num_items, init_stddev=INIT_STDDEV), clients, negatives=NEGATIVES)


def train_and_rank_centralised(
    build: Callable[[ClientData], Centralised],
    interactions: Interactions,
    protocols: Sequence[Protocol],
    *,
    seed: int,
    num_epochs: int,
    num_buckets: int = 5,
) -> dict[str, dict[str, float]]:
    """One training run, evaluated after every epoch; an epoch takes the place of a round.

    Args:
      build: makes the training procedure for a population.
      interactions: the data set.
      protocols: equal but for `num_negatives`, `ks`, `ties`, `selection` and `scored`: with all parameters in one
        place, there is one set of them to score.
      seed: of initial parameters, negatives and order; the split has its own.
      num_epochs: epochs to run.
      num_buckets: see `client_data`; never changes a result.

    Returns:
      By protocol name: hit@10 and so on of the test items at the selected epoch, that epoch as "round", and the mean
      loss there as "loss".

    Raises:
      ValueError: if the protocols differ in what training sees.
    """
    split = common_split(protocols, interactions)
    asked = ask(split, protocols, seed=seed)
    training = build(client_data(split, exclusion=protocols[0].exclusion, num_buckets=num_buckets))
    init_key, train_key = jax.random.split(jax.random.key(seed))
    state = training.init(init_key)
    history = {protocol.name: [] for protocol in protocols}
    for epoch in range(1, num_epochs + 1):
        state, loss = training.run_epoch(state, train_key)
        scorer = training.scorer(state)
        for protocol in protocols:
            values = measure(protocol, asked, scorer=scorer)
            history[protocol.name].append({"round": epoch, "loss": float(loss), **values})
    return {protocol.name: select(history[protocol.name], protocol) for protocol in protocols}
