"""Trains one method once and reports it under several protocols, which may differ in what is ranked and selected."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from fedjax_rec.data import Interactions, load
from fedjax_rec.data.clients import client_data
from fedjax_rec.data.files import load_file
from fedjax_rec.evaluation import Cases, Evaluation, cases, client_scorer, evaluate, expect_sampled
from fedjax_rec.evaluation.on_client import evaluate_on_clients, question, ranked_on_clients
from fedjax_rec.evaluation.protocol import Protocol
from fedjax_rec.federated.algorithm import Algorithm
from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.transforms import UpdateTransform, chain
from fedjax_rec.models.base import Model

Build = Callable[[Interactions], tuple[Algorithm, Model]]


def ml_100k(data_dir: Path | None, *, smoke: bool) -> Interactions:
    """MovieLens 100K in the order in which the PFedRec code base lists it, where that file is at hand.

    Order decides which of several items of one second is the latest. Without `pfedrec_order.csv` the rows come in
    GroupLens's order, and results are not comparable with the published ones: the protocol's fingerprint differs.
    """
    if smoke:
        return load("synthetic", num_users=40, num_items=400)
    interactions = load("movielens/100k", data_dir=data_dir)
    folders = [Path(folder) for folder in (data_dir, os.environ.get("FEDJAX_REC_DATA")) if folder is not None]
    for file in (path for folder in folders for path in (folder / "ml-100k", folder)):
        if (file / "pfedrec_order.csv").exists():
            return load_file(file / "pfedrec_order.csv", format="triplets", separator=",")
    return interactions


def train_and_rank(
    build: Build,
    interactions: Interactions,
    protocols: Sequence[Protocol],
    *,
    seed: int,
    num_rounds: int,
    eval_every: int = 1,
    num_buckets: int = 5,
    transforms: UpdateTransform | None = None,
) -> dict[str, dict[str, float]]:
    """One training run, every client in every round, reported as each protocol says.

    Args:
      build: makes the method for a data set.
      interactions: the data set.
      protocols: equal but for `num_negatives`, `ks`, `ties` and `selection`.
      seed: of initial parameters and of what clients draw; the split has its own.
      num_rounds: rounds to run.
      eval_every: rounds between evaluations.
      num_buckets: see `client_data`; never changes a result.
      transforms: the update chain; none by default.

    Returns:
      By protocol name: hit@10 and so on of the test items at the selected round, that round as "round", and the
      mean loss there as "loss".

    Raises:
      ValueError: if the protocols differ in what training sees.
    """
    first = protocols[0]
    if len({(p.tie_rule, p.split_seed, p.exclusion, p.scored) for p in protocols}) > 1:
        raise ValueError(
            "These protocols differ in split, training negatives or scored parameters: train once for each."
        )
    split = first.split(interactions)
    asked = {part: cases(split, part) for part in ("validation", "test")}
    clients = client_data(split, exclusion=first.exclusion, num_buckets=num_buckets)
    algorithm, model = build(interactions)
    if first.scored == "client":
        questions = {part: question(c, num_clients=clients.num_clients) for part, c in asked.items()}
        algorithm = ranked_on_clients(algorithm, model.score, questions)
    rounds = make_rounds(
        algorithm,
        chain() if transforms is None else transforms,
        full_participation(clients.num_clients),
        clients,
        span_size=eval_every,
    )
    init_key, *keys = jax.random.split(jax.random.key(seed), 4)
    state, private = rounds.init(init_key)
    history = {protocol.name: [] for protocol in protocols}
    for done in range(eval_every, num_rounds + 1, eval_every):
        state, private, metrics = rounds.run(state, private, RoundKeys(*keys), eval_every)
        for protocol in protocols:
            values = {}
            for part, c in asked.items():
                if protocol.scored == "client":
                    evaluation = evaluate_on_clients(private["ranks"][part], c, ks=protocol.ks, ties=protocol.ties)
                else:
                    scorer = client_scorer(model.score, shared=state.shared, private=private)
                    evaluation = evaluate(scorer, c, ks=protocol.ks, ties=protocol.ties)
                values[part] = sampled(evaluation, protocol)
            history[protocol.name].append({"round": done, "loss": float(np.asarray(metrics["loss"])[-1]), **values})
    return {protocol.name: select(history[protocol.name], protocol) for protocol in protocols}


def sampled(evaluation: Evaluation, protocol: Protocol) -> dict[str, float]:
    """The metrics of a protocol, named without their suffix."""
    if protocol.num_negatives is not None:
        evaluation = expect_sampled(
            evaluation, num_negatives=protocol.num_negatives, ks=protocol.ks, ties=protocol.ties
        )
    cut = len(protocol.suffix)
    return {name[: len(name) - cut]: value for name, value in evaluation.values.items()}


def select(history: list[dict], protocol: Protocol) -> dict[str, float]:
    """The round that a protocol reports, as one flat dictionary."""
    parts = {"best validation round": "validation", "best test round": "test"}
    best = history[-1]
    if protocol.selection in parts:
        best = max(history, key=lambda line: line[parts[protocol.selection]][f"hit@{protocol.ks[0]}"])
    return best["test"] | {"round": best["round"], "loss": best["loss"]}


def reference(scorer, split_cases: Cases, protocol: Protocol) -> dict[str, float]:
    """A model that is trained once, such as popularity, under a protocol."""
    return sampled(evaluate(scorer, split_cases, ks=protocol.ks, ties=protocol.ties), protocol)
