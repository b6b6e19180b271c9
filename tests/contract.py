"""The methods that the contract runs on, one line each, and the worlds that they run in.

`test_contract.py` holds what every method must keep: it finds the known answer, clients outside a cohort have no
influence, private parameters stay private, chunks, buckets and devices change nothing, a stopped run goes on as if it
had not stopped, and one user moves the sum by no more than the clip norm.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from evaluation_worlds import make_split

import fedjax_rec as fr
from fedjax_rec.data.clients import ClientData, client_data
from fedjax_rec.federated.algorithm import Algorithm
from fedjax_rec.federated.cohort import Sampler, full_participation, poisson
from fedjax_rec.models.history_factors import history_factors
from fedjax_rec.models.items import id_table

NUM_ITEMS, DIM = 17, 5


class World(NamedTuple):
    """A population with a known answer.

    Attributes:
      clients: what each client touched, for methods that draw negatives.
      rated: the same clients with ratings of 5 and 1.
      sampler: who takes part.
      withheld: int ``[clients]``, an item of each client's taste that it does not have; None where there is no answer.
    """

    clients: ClientData
    rated: ClientData
    sampler: Sampler
    withheld: np.ndarray | None

    @property
    def num_clients(self) -> int:
        return self.clients.num_clients

    @property
    def sizes(self) -> dict[str, int]:
        """The arguments of a method with a table for each client."""
        return {"num_clients": self.num_clients, "num_items": NUM_ITEMS}

    @property
    def public(self) -> dict[str, float]:
        """The public constants that SCAFFOLD wants."""
        return {"sampling_prob": self.sampler.sampling_prob, "num_control_rows": NUM_ITEMS, "mean_local_steps": 2.0}


class Entry(NamedTuple):
    """A method in a world.

    Attributes:
      algorithm: under test.
      score: ``(shared, private) -> [num_items]``.
      rated: True if it trains on ratings.
      num_rounds: within which it finds the answer.
      finds: False for a method that cannot find it, because nothing is shared; None for one of the next item, which
        the order of this world does not tell.
      everyone: True if all clients must take part in each round.
    """

    algorithm: Algorithm
    score: Callable[[Any, Any], jax.Array]
    rated: bool = False
    num_rounds: int = 150
    finds: bool | None = True
    everyone: bool = False


MF = fr.matrix_factorization(NUM_ITEMS, dim=DIM)
GMF = fr.gmf(NUM_ITEMS, dim=DIM)
HEAD = fr.personal_scorer(NUM_ITEMS, dim=DIM, init_stddev=0.3)
SUM = fr.additive_scorer(NUM_ITEMS, dim=DIM, separation=0.0, init_stddev=0.3)
VAE = fr.mult_vae(NUM_ITEMS, width=DIM, latent=DIM, tied=True, linear=True, dropout=0.0, init_stddev=0.3)
MENTOR = history_factors(id_table(NUM_ITEMS, dim=DIM, init_stddev=0.3), max_length=9)
WORDS = np.eye(NUM_ITEMS, dtype=np.float32)
MENTEE = history_factors(id_table(NUM_ITEMS, dim=3, init_stddev=0.3), max_length=9)
DRAW = {"negatives": fr.Negatives(1), "batch_size": 4}
STEADY = {"table_lr": 1.0, "head_lr": 0.5, "batch_decay": 1.0, "round_decay": 1.0, "local_epochs": 2}
PERSONAL = {"lr": 0.5, "item_lr": 0.5, "local_epochs": 2}
EXCHANGE = {"lr": 0.5, "item_lr": 1.0, "server_optimizer": optax.adam(0.05), "server_steps": 5}
SGD = optax.sgd(0.5)

# A new method joins by one line here.
METHODS: dict[str, Callable[[World], Entry]] = {
    "fedavg": lambda w: Entry(fr.fedavg(MF, client_optimizer=SGD, local_epochs=2, **DRAW), MF.score),
    "fedsgd": lambda w: Entry(fr.fedsgd(MF, server_optimizer=optax.sgd(8.0), negatives=fr.Negatives(1)), MF.score),
    "fedprox": lambda w: Entry(fr.fedprox(MF, mu=0.1, client_optimizer=SGD, local_epochs=2, **DRAW), MF.score),
    "scaffold": lambda w: Entry(fr.scaffold(MF, lr=0.5, **DRAW, **w.public), lambda s, p: MF.score(s, p.model)),
    "fednova": lambda w: Entry(fr.fednova(MF, lr=0.5, effective_steps=3.0, **DRAW), MF.score),
    "fedncf": lambda w: Entry(fr.fedncf(GMF, num_items=NUM_ITEMS, lr=1.0, **DRAW), GMF.score, num_rounds=40),
    "pfedrec": lambda w: Entry(fr.pfedrec(HEAD, num_items=NUM_ITEMS, item_lr_factor=1.0, **DRAW), HEAD.score),
    "fedrap": lambda w: Entry(fr.fedrap(SUM, num_clients=w.num_clients, **STEADY, **DRAW), SUM.score, num_rounds=60),
    "local_only": lambda w: Entry(
        fr.local_only(HEAD, **w.sizes, item_lr_factor=1.0, **DRAW),
        fr.local_score(HEAD),
        finds=False,
    ),
    "fedvae": lambda w: Entry(fr.fedvae(VAE, beta=0.1, server_optimizer=optax.adam(0.05)), fr.fedvae_score),
    "fedsequence": lambda w: Entry(
        fr.fedsequence(MENTOR, server_optimizer=optax.adam(0.05)), fr.fedsequence_score(MENTOR), num_rounds=30
    ),
    "fedrec": lambda w: Entry(
        fr.fedrec(NUM_ITEMS, dim=DIM, lr=0.1, lr_decay=1.0, rho=1, average_visits=20),
        lambda s, p: s.tables["item"] @ p["user"],
        rated=True,
    ),
    "fcf": lambda w: Entry(fr.fcf(NUM_ITEMS, cohort_size=w.sampler.expected_size, dim=DIM), fr.fcf_score),
    "dpals": lambda w: Entry(
        fr.dpals(
            NUM_ITEMS, cohort_size=w.sampler.expected_size, dim=DIM, l2=0.1, max_items_per_user=2, max_user_norm=0.1
        ),
        fr.dpals_score,
    ),
    "fedrecon": lambda w: Entry(
        fr.fedrecon(HEAD, reconstruction_optimizer=SGD, client_optimizer=optax.sgd(2.0), **DRAW), HEAD.score
    ),
    "fedmf": lambda w: Entry(fr.fedmf(MF, lr=0.5, item_lr=4.0, **DRAW), MF.score),
    "fedmf, visits": lambda w: Entry(
        fr.fedmf(MF, aggregation="visits", cohort_size=w.sampler.expected_size, lr=0.5, item_lr=1.0, **DRAW), MF.score
    ),
    "gpfedrec": lambda w: Entry(fr.gpfedrec(HEAD, **w.sizes, item_lr_factor=1.0, **DRAW), fr.own_score),
    "cofedrec": lambda w: Entry(
        fr.cofedrec(HEAD, **w.sizes, num_groups=2, lr=0.1, item_lr_factor=1.0, **DRAW), fr.own_score
    ),
    "prediction_exchange": lambda w: Entry(
        fr.prediction_exchange(MF, **w.sizes, slate_size=9, server_dim=2, **EXCHANGE, **DRAW), fr.local_score(MF)
    ),
    "ditto": lambda w: Entry(fr.ditto(MF, num_clients=w.num_clients, pull=0.5, **PERSONAL, **DRAW), fr.ditto_score(MF)),
    "apfl": lambda w: Entry(
        fr.apfl(MF, num_clients=w.num_clients, alpha=0.25, alpha_lr=0.01, **PERSONAL, **DRAW),
        fr.apfl_score(MF),
        num_rounds=100,
    ),
    "fedkd": lambda w: Entry(
        fr.fedkd(MENTOR, MENTEE, num_clients=w.num_clients, mentor_lr=0.1, server_optimizer=optax.adam(0.05)),
        fr.fedkd_score(MENTOR),
        finds=None,
    ),
    "server_encoder": lambda w: Entry(
        fr.server_encoder(
            MENTOR,
            lambda theta, words: words @ theta,
            WORDS,
            lambda key: 0.3 * jax.random.normal(key, (NUM_ITEMS, DIM)),
            encoder_optimizer=optax.adam(0.05),
            tower_optimizer=optax.adam(0.05),
        ),
        fr.fedsequence_score(MENTOR),
        num_rounds=30,  # later it knows every history by heart, in its order
    ),
}


def checkerboard(num_users: int = 16) -> World:
    """Even users like even items and odd users odd ones; each lacks one item of its colour, which is the answer."""
    users, items = np.arange(num_users), np.arange(NUM_ITEMS)
    withheld = users % 2 + 2 * (users // 2 % (NUM_ITEMS // 2))
    liked = (users[:, None] + items) % 2 == 0
    has = items != withheld[:, None]
    return _world(liked & has, has, np.where(liked, 5.0, 1.0), 0.75 * num_users, withheld)


def ragged(num_clients: int = 13, *, num_buckets: int = 1, num_shards: int = 1) -> World:
    """Clients of different lengths; every axis has a length of its own, by which it can be told."""
    users, items = np.arange(num_clients)[:, None], np.arange(NUM_ITEMS)
    has = (items - 3 * users) % NUM_ITEMS <= users % 7
    ratings = np.broadcast_to(1.0 + items % 5, has.shape)
    return _world(has, has, ratings, 5, None, num_buckets=num_buckets, num_shards=num_shards)


def _world(touched, rated, ratings, cohort_size, withheld, **layout) -> World:
    sampler = poisson(len(touched), cohort_size=cohort_size)
    implicit = make_split([np.flatnonzero(row) for row in touched], [[] for _ in touched], num_items=NUM_ITEMS)
    explicit = make_split([np.flatnonzero(row) for row in rated], [[] for _ in rated], num_items=NUM_ITEMS)
    train = dataclasses.replace(explicit.train, ratings=ratings[rated].astype(np.float32))
    explicit = dataclasses.replace(explicit, train=train)
    layout = {"num_buckets": 1} | layout
    return World(client_data(implicit, **layout), client_data(explicit, use_ratings=True, **layout), sampler, withheld)


def population(entry: Entry, world: World) -> tuple[ClientData, Sampler]:
    """The data and the sampler that a method trains with."""
    sampler = full_participation(world.num_clients) if entry.everyone else world.sampler
    return (world.rated if entry.rated else world.clients), sampler
