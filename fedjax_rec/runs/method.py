"""The recommender of a run: its federated method, and how what it trained is asked for scores."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from fedjax_rec.algorithms.fedavg import fedavg, mean_interactions
from fedjax_rec.algorithms.fedsequence import fedsequence, fedsequence_score
from fedjax_rec.data.clients import ClientData
from fedjax_rec.data.negatives import Negatives
from fedjax_rec.data.split import Split, shown_at_test
from fedjax_rec.evaluation.scorers import Scorer, client_scorer
from fedjax_rec.federated.algorithm import Algorithm
from fedjax_rec.models.base import Shared
from fedjax_rec.models.items import id_table
from fedjax_rec.models.matrix_factorization import matrix_factorization
from fedjax_rec.models.sasrec import sasrec
from fedjax_rec.models.sequence import SequenceModel, sequence_scorer
from fedjax_rec.runs.config import TrainConfig


class Method(NamedTuple):
    """A recommender and its training.

    Attributes:
      title: in words, for reports.
      algorithm: what clients and the server do.
      score: ``(shared, private) -> float32 [num_items]``, what one client computes from what it holds.
      scorer: ``(shared, private, part) -> Scorer`` of all clients for "validation" or "test".
      sequence_model: of the next item, or None where the history is in private parameters.
    """

    title: str
    algorithm: Algorithm
    score: Callable[[Shared, Any], jax.Array]
    scorer: Callable[[Shared, Any, str], Scorer]
    sequence_model: SequenceModel | None = None


def make_method(
    config: TrainConfig,
    *,
    split: Split,
    clients: ClientData,
    negatives: Negatives,
    server_optimizer: optax.GradientTransformation,
) -> Method:
    """The method that the configuration names."""
    if config.model.kind == "sasrec":
        return _sequence(config, split, server_optimizer)
    return _factors(config, clients, negatives, server_optimizer)


def _factors(config, clients, negatives, server_optimizer) -> Method:
    settings, client = config.model, config.client
    model = matrix_factorization(
        clients.num_items,
        dim=settings.dim,
        loss=settings.loss,
        l2=settings.l2,
        init_stddev=settings.init_stddev,
        label_mean=settings.label_mean,
    )
    optimizer = optax.partition(
        {"shared": optax.sgd(client.lr), "private": optax.sgd(client.private_lr)},
        {"rows": "shared", "dense": "shared", "private": "private"},
    )
    algorithm = fedavg(
        model,
        client_optimizer=optimizer,
        server_optimizer=server_optimizer,
        local_epochs=client.local_epochs,
        batch_size=client.batch_size,
        negatives=negatives,
        weigh_by_examples=client.weigh_by_examples,
        max_examples=client.max_examples,
        mean_examples=mean_interactions(clients),
    )

    def scorer(shared, private, part):
        del part
        return client_scorer(model.score, shared=shared, private=private)

    return Method("FedAvg, matrix factorisation", algorithm, model.score, scorer)


def _sequence(config, split, server_optimizer) -> Method:
    settings, client = config.model, config.client
    items = id_table(split.num_items, dim=settings.dim, init_stddev=settings.init_stddev)
    model = sasrec(items, max_length=settings.max_length, num_blocks=settings.num_blocks, dropout=settings.dropout)
    algorithm = fedsequence(
        model, local_steps=client.local_epochs, client_lr=client.lr, server_optimizer=server_optimizer
    )

    def scorer(shared, private, part):
        del private
        return sequence_scorer(model, shared, split.train if part == "validation" else shown_at_test(split))

    return Method("FedAvg, SASRec with full cross-entropy", algorithm, fedsequence_score(model), scorer, model)
