"""PFedRec's main table on MovieLens 100K, under the paper's protocol and without its leak, 99 negatives and all items.

About ten minutes a seed on two CPU cores for all rows; PFedRec alone one minute a seed.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from functools import partial

import jax.numpy as jnp
import numpy as np
import optax

from experiments.harness import Options, Published, Row, Study
from experiments.harness import main as run_study
from experiments.ranked import Build, ml_100k, reference, train_and_rank
from fedjax_rec.algorithms.fedavg import fedavg
from fedjax_rec.algorithms.pfedrec import PERSONAL_FIRST, pfedrec, personal_scorer
from fedjax_rec.data import Interactions
from fedjax_rec.data.negatives import Negatives
from fedjax_rec.evaluation import cases
from fedjax_rec.evaluation.protocol import PAPER_FULL, PFEDREC_PAPER, STRICT_99, STRICT_FULL, Protocol
from fedjax_rec.models.ease import ease_scorer
from fedjax_rec.models.matrix_factorization import matrix_factorization
from fedjax_rec.models.popularity import popularity_scorer

COLUMNS = {"paper": PFEDREC_PAPER, "strict": STRICT_99, "paper, all items": PAPER_FULL, "strict, all items": STRICT_FULL}
METRICS = tuple(f"{metric} {column}" for column in COLUMNS for metric in ("HR@10", "NDCG@10"))
SMOKE_ROUNDS = 2


def build_pfedrec(interactions: Interactions):
    """PFedRec with the paper's settings."""
    model = personal_scorer(interactions.num_items)
    return pfedrec(model, num_items=interactions.num_items), model


def build_fedmf(interactions: Interactions, *, phases=None):
    """Matrix factorisation with private user vectors; the item table is averaged."""
    num_items = interactions.num_items
    model = matrix_factorization(num_items, dim=32, l2=1e-6)
    if phases is not None:
        return pfedrec(model, num_items=num_items, lr=FEDMF_LR, item_lr_factor=FEDMF_ITEM_FACTOR), model
    optimizer = optax.partition(
        {"private": optax.sgd(FEDMF_LR), "shared": optax.sgd(FEDMF_LR * num_items * FEDMF_ITEM_FACTOR)},
        {"rows": "shared", "dense": "shared", "private": "private"},
    )
    return fedavg(model, client_optimizer=optimizer, batch_size=51, negatives=Negatives(4)), model


def trained(build: Build, num_rounds: int, seed: int, options: Options) -> dict:
    """One run under the paper's negatives and one under strict ones, each ranked twice."""
    interactions = ml_100k(options.data_dir, smoke=options.smoke)
    num_rounds = SMOKE_ROUNDS if options.smoke else num_rounds
    found = {}
    for exclusion in ("paper", "strict"):
        protocols = [protocol for protocol in COLUMNS.values() if protocol.exclusion == exclusion]
        found |= train_and_rank(build, interactions, protocols, seed=seed, num_rounds=num_rounds)
    return line(found, interactions, detail=f"{build} {num_rounds}")


def popular(make_scorer: Callable, seed: int, options: Options) -> dict:
    """A model trained once at one place; negatives in training do not concern it."""
    del seed
    interactions = ml_100k(options.data_dir, smoke=options.smoke)
    found = {}
    for protocol in COLUMNS.values():
        split = protocol.split(interactions)
        found[protocol.name] = reference(make_scorer(split.train), cases(split), protocol)
    return line(found, interactions, detail="reference")
