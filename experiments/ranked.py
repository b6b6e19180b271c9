"""Trains one method once and reports it under several protocols, which may differ in what is ranked and selected."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from fedjax_rec.data import Interactions, Split, draw_candidates, load
from fedjax_rec.data.clients import client_data
from fedjax_rec.data.files import load_file
from fedjax_rec.evaluation import (
    Cases,
    Evaluation,
    cases,
    client_scorer,
    evaluate,
    evaluate_candidates,
    expect_sampled,
)
from fedjax_rec.evaluation.on_client import evaluate_on_clients, question, ranked_on_clients
from fedjax_rec.evaluation.protocol import Protocol
from fedjax_rec.federated.algorithm import Algorithm
from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.transforms import UpdateTransform, chain
from fedjax_rec.models.base import Model

PARTS = ("validation", "test")
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


def ml_1m(data_dir: Path | None, *, smoke: bool) -> Interactions:
    """MovieLens 1M in GroupLens's order, which is also that of published code."""
    return load("synthetic", num_users=40, num_items=400) if smoke else load("movielens/1m", data_dir=data_dir)


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
      protocols: equal in what training sees: `tie_rule`, `split_seed` and `exclusion`.
      seed: of initial parameters, of what clients draw and of candidates drawn once; the split has its own.
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
    split = common_split(protocols, interactions)
    asked = ask(split, protocols, seed=seed)
    clients = client_data(split, exclusion=protocols[0].exclusion, num_buckets=num_buckets)
    algorithm, model = build(interactions)
    on_clients = any(protocol.scored == "client" for protocol in protocols)
    if on_clients:
        questions = {
            f"{part}, {draw}": question(c, num_clients=clients.num_clients, among_candidates=draw == "one draw")
            for (part, draw), c in asked.items()
        }
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
        own = private["own"] if on_clients else private
        scorer = client_scorer(model.score, shared=state.shared, private=own)
        ranks = private["ranks"] if on_clients else None
        loss = float(np.asarray(metrics["loss"])[-1])
        for protocol in protocols:
            values = measure(protocol, asked, scorer=scorer, ranks=ranks)
            history[protocol.name].append({"round": done, "loss": loss, **values})
    return {protocol.name: select(history[protocol.name], protocol) for protocol in protocols}


def common_split(protocols: Sequence[Protocol], interactions: Interactions) -> Split:
    """The split of protocols that one training run can serve.

    Raises:
      ValueError: if they differ in what training sees.
    """
    if len({(p.tie_rule, p.split_seed, p.exclusion) for p in protocols}) > 1:
        raise ValueError("These protocols differ in split or training negatives: train once for each.")
    return protocols[0].split(interactions)


def ask(split: Split, protocols: Sequence[Protocol], *, seed: int) -> dict[tuple[str, str], Cases]:
    """The cases by part ("validation", "test") and draw; drawn candidates of the two parts have no item in common."""
    asked = {(part, "expectation"): cases(split, part) for part in PARTS}
    drawn = {protocol.num_negatives for protocol in protocols if protocol.draw == "one draw"}
    if len(drawn) > 1:
        raise ValueError(f"One draw serves one number of negatives; got {sorted(drawn)}.")
    for num in drawn:
        candidates = draw_candidates(split, num_negatives=len(PARTS) * num, seed=seed).candidates
        for index, part in enumerate(PARTS):
            all_items = asked[part, "expectation"]
            mine = candidates[all_items.user_ids, index * num : (index + 1) * num]
            asked[part, "one draw"] = dataclasses.replace(all_items, candidates=mine)
    return asked


def measure(protocol: Protocol, asked: dict[tuple[str, str], Cases], *, scorer, ranks=None) -> dict[str, dict]:
    """The metrics of each part as a protocol has them, from a scorer or from the ranks that clients found."""
    found = {}
    for part in PARTS:
        c, rules = asked[part, protocol.draw], {"ks": protocol.ks, "ties": protocol.ties}
        drawn = protocol.draw == "one draw"
        if ranks is not None and protocol.scored == "client":
            mine = ranks[f"{part}, {protocol.draw}"]
            evaluation = evaluate_on_clients(mine, c, among_candidates=drawn, **rules)
        else:
            evaluation = (evaluate_candidates if drawn else evaluate)(scorer, c, **rules)
        found[part] = sampled(evaluation, protocol)
    return found


def sampled(evaluation: Evaluation, protocol: Protocol) -> dict[str, float]:
    """The metrics of a protocol, named without their suffix."""
    if protocol.num_negatives is not None and protocol.draw == "expectation":
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


def reference(scorer, split: Split, protocol: Protocol, *, seed: int) -> dict[str, float]:
    """A model that is trained once, such as popularity, under a protocol."""
    return measure(protocol, ask(split, [protocol], seed=seed), scorer=scorer)["test"]
