"""Risk: an algorithm runs, converges, and learns the wrong thing. In these worlds the right answer is known."""

import jax
import numpy as np
import optax
import pytest
from evaluation_worlds import make_split
from scipy import stats

from fedjax_rec.algorithms.fedavg import fedavg, fedsgd
from fedjax_rec.data.clients import client_data, client_data_from_examples
from fedjax_rec.data.negatives import Negatives
from fedjax_rec.federated.cohort import full_participation, poisson
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.transforms import chain
from fedjax_rec.models.matrix_factorization import matrix_factorization

# The two that every loss and server optimizer is tried with; all methods meet the checkerboard in test_contract.py.
ALGORITHMS = {
    "fedavg": lambda model, server_optimizer, negatives: fedavg(
        model,
        client_optimizer=optax.sgd(0.5),
        server_optimizer=server_optimizer,
        negatives=negatives,
        local_epochs=2,
        batch_size=4,
    ),
    "fedsgd": lambda model, server_optimizer, negatives: fedsgd(
        model, server_optimizer=server_optimizer, negatives=negatives
    ),
}
SERVER_OPTIMIZERS = {
    "fedavg": {"sgd": optax.sgd(1.0), "momentum": optax.sgd(0.3, momentum=0.9)},
    "fedsgd": {"sgd": optax.sgd(8.0), "momentum": optax.sgd(1.0, momentum=0.9)},
}
ADAPTIVE = {"adam": optax.adam(0.05, b2=0.99, eps=1e-3), "yogi": optax.yogi(0.05, eps=1e-3)}
# Every algorithm meets every loss and every server optimizer.
CONTRACT = [
    ("fedavg", "logistic", "sgd"),
    ("fedavg", "bpr", "momentum"),
    ("fedavg", "squared", "adam"),
    ("fedavg", "bpr", "yogi"),
    ("fedsgd", "logistic", "adam"),
    ("fedsgd", "bpr", "sgd"),
    ("fedsgd", "squared", "momentum"),
    ("fedsgd", "logistic", "yogi"),
]
NUM_USERS, NUM_ITEMS = 16, 16
# A withheld item is drawn as a negative like any other: long after the colours are learned, it is memorised as one.
NUM_ROUNDS, NUM_ROUNDS_BPR = 150, 250


def trained_scores(algorithm, model, clients, *, sampler=None, num_rounds=NUM_ROUNDS):
    """float ``[clients, items]`` after training, and the loss of the first and the last ten rounds."""
    sampler = poisson(clients.num_clients, cohort_size=0.75 * clients.num_clients) if sampler is None else sampler
    rounds = make_rounds(algorithm, chain(), sampler, clients, span_size=num_rounds, chunk_size=16)
    state, private = rounds.init(jax.random.key(0))
    keys = RoundKeys(*(jax.random.key(seed) for seed in (1, 2, 3)))
    state, private, metrics = rounds.run(state, private, keys, num_rounds)
    loss = np.asarray(metrics["loss"])
    return (
        np.asarray(jax.vmap(model.score, in_axes=(None, 0))(state.shared, private)),
        loss[:10].mean(),
        loss[-10:].mean(),
    )


def checkerboard():
    """Even users touch even items, odd users odd ones; each has one item of its colour left, which is the answer."""
    colours = [list(range(user % 2, NUM_ITEMS, 2)) for user in range(NUM_USERS)]
    withheld = [items.pop(user // 2) for user, items in enumerate(colours)]
    return make_split(colours, [[item] for item in withheld], num_items=NUM_ITEMS), np.array(withheld)


@pytest.mark.parametrize(("name", "loss", "optimizer"), CONTRACT)
def test_checkerboard(name, loss, optimizer):
    """Every withheld item ranks above every item of the other colour."""
    split, withheld = checkerboard()
    model = matrix_factorization(NUM_ITEMS, dim=4, loss=loss)
    server_optimizer = (SERVER_OPTIMIZERS[name] | ADAPTIVE)[optimizer]
    algorithm = ALGORITHMS[name](model, server_optimizer, Negatives(1))
    num_rounds = NUM_ROUNDS_BPR if loss == "bpr" else NUM_ROUNDS
    scores, first, last = trained_scores(algorithm, model, client_data(split, num_buckets=1), num_rounds=num_rounds)
    assert last < 0.8 * first
    users = np.arange(NUM_USERS)
    other_colour = np.where((users[:, None] + np.arange(NUM_ITEMS)) % 2 == 1, scores, -np.inf)
    margin = scores[users, withheld] - other_colour.max(1)
    assert np.all(margin > 0)


def test_the_contract_covers_every_algorithm_loss_and_optimizer():
    for name in ALGORITHMS:
        cases = [case for case in CONTRACT if case[0] == name]
        assert {loss for _, loss, _ in cases} == {"logistic", "bpr", "squared"}
        assert {optimizer for _, _, optimizer in cases} == {"sgd", "momentum", "adam", "yogi"}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_popularity_is_all_there_is(name):
    """Item i is touched by fewer users than item i - 1, and by whom is chance: scores must fall with i."""
    num_users, num_items = 40, 10
    rng = np.random.default_rng(0)
    touched = [rng.permutation(num_users)[: num_users - 4 * item] for item in range(num_items)]
    lists = [[item for item in range(num_items) if user in touched[item]] for user in range(num_users)]
    split = make_split(lists, [[] for _ in lists], num_items=num_items)
    model = matrix_factorization(num_items, dim=1, init_stddev=0.01, l2=0.05)  # too stiff to remember who
    algorithm = ALGORITHMS[name](model, SERVER_OPTIMIZERS[name]["sgd"], Negatives(1))
    sampler = full_participation(num_users)
    scores, *_ = trained_scores(algorithm, model, client_data(split, num_buckets=1), sampler=sampler)
    mean = scores.mean(0)
    assert stats.spearmanr(mean, -np.arange(num_items)).statistic > 0.97
    assert mean[0] - mean[-1] > 1.0


@pytest.mark.parametrize("name", ALGORITHMS)
def test_two_cliques_rate_the_opposite(name):
    """Ratings 5 and 1 by clique, as given examples; the withheld rating of every user is recovered within one star."""
    rng = np.random.default_rng(0)
    truth = np.where((np.arange(NUM_USERS)[:, None] % 2) == (np.arange(NUM_ITEMS) >= 8), 5.0, 1.0)
    withheld = rng.integers(0, NUM_ITEMS, NUM_USERS)
    shown = [rng.permutation(np.delete(np.arange(NUM_ITEMS), item)) for item in withheld]
    examples = [(items, truth[user, items]) for user, items in enumerate(shown)]
    clients = client_data_from_examples(examples, num_items=NUM_ITEMS, num_buckets=1)
    model = matrix_factorization(NUM_ITEMS, dim=4, loss="squared", label_mean=3.0)
    algorithm = ALGORITHMS[name](model, SERVER_OPTIMIZERS[name]["momentum"], None)
    scores, first, last = trained_scores(algorithm, model, clients)
    users = np.arange(NUM_USERS)
    assert last < 0.1 * first
    assert np.all(np.abs(scores[users, withheld] - truth[users, withheld]) < 1.0)
