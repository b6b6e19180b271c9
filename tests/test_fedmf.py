"""Risk: rows divided by the wrong count of clients, or by one that noise has brought to zero."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from evaluation_worlds import make_split
from reference_round import one_by_one

from fedjax_rec.algorithms.fedavg import fedavg
from fedjax_rec.algorithms.fedmf import fedmf, touched_rows
from fedjax_rec.algorithms.pfedrec import PERSONAL_FIRST
from fedjax_rec.data.clients import client_data, client_data_from_examples
from fedjax_rec.data.negatives import Negatives
from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.local import draw_epoch, row_ids
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.rows import to_dense
from fedjax_rec.federated.transforms import chain
from fedjax_rec.models.base import Shared
from fedjax_rec.models.matrix_factorization import matrix_factorization
from fedjax_rec.models.neural_cf import gmf
from fedjax_rec.privacy.mechanisms import clip_by_global_norm

NUM_CLIENTS, NUM_ITEMS = 7, 23
KEYS = RoundKeys(*(jax.random.key(seed) for seed in (1, 2, 3)))
MF = matrix_factorization(NUM_ITEMS, dim=3, l2=0.01)
DRAWS = {"distinct": Negatives(2), "independent": Negatives(2, replacement=True, mixed=True)}
RATES = {"lr": 0.5, "item_lr": 2.0, "batch_size": 2}


def population():
    """Clients with 0 to 4 items, so that some rows have no visitor and some have several."""
    lists = [[(3 * user + i) % NUM_ITEMS for i in range(user % 5)] for user in range(NUM_CLIENTS)]
    return client_data(make_split(lists, [[] for _ in lists], num_items=NUM_ITEMS), num_buckets=1)


def one_round(algorithm, links=(), **settings):
    sampler = full_participation(NUM_CLIENTS)
    rounds = make_rounds(algorithm, chain(*links), sampler, population(), span_size=1, **settings)
    before = jax.jit(rounds.init)(jax.random.key(0))
    copy = jax.device_get(before)
    return copy, jax.device_get(rounds.run(*before, KEYS))


@cache
def clients_alone(draws):
    """Each client's update as FedAvg would send it, written out whole, and the set of items that its examples name."""
    negatives, alone = DRAWS[draws], []
    algorithm = fedmf(MF, negatives=negatives, phases=PERSONAL_FIRST, **RATES)
    rounds = make_rounds(algorithm, chain(), full_participation(NUM_CLIENTS), population())
    state, private = rounds.init(jax.random.key(0))
    update_of = jax.jit(algorithm.client_update)
    draw = jax.jit(lambda client, key: draw_epoch(client, negatives, 2, key).examples)
    for client_id, client in enumerate(one_by_one(population())):
        key = jax.random.fold_in(jax.random.fold_in(KEYS.client, 0), client_id)
        train_key, _ = jax.random.split(key)
        own = jax.tree.map(lambda x, i=client_id: x[i], private)
        output = update_of(state.shared, own, client, algorithm.num_steps(client), jax.random.clone(train_key))
        draw_key, _ = jax.random.split(train_key)
        examples = draw(client, draw_key)
        touched = set(np.asarray(examples.ids)[np.asarray(examples.weights) > 0])
        alone.append((jax.device_get(to_dense(output.update)), touched))
    return alone


@pytest.mark.parametrize("draws", DRAWS)
@pytest.mark.parametrize("clip", [np.inf, 0.5])
def test_a_row_is_divided_by_the_clients_that_touched_it(draws, clip):
    """A loop over clients, clipped or not: the ratio of sums is a mean weighted by the clients' clip factors."""
    sums = {name: np.zeros((NUM_ITEMS, dim)) for name, dim in (("item", 3), ("bias", 1))}
    visits, factors = np.zeros(NUM_ITEMS), []
    for update, items in clients_alone(draws):
        squares = sum(np.square(table).sum() for table in update.tables.values()) + 0.25**2 * len(items)
        factors.append(min(1.0, clip / max(np.sqrt(squares), 1e-9)))
        for name, table in update.tables.items():
            sums[name] += factors[-1] * table
        visits[list(items)] += factors[-1]
    assert visits.min() == 0
    assert visits.max() > 1
    assert (min(factors) < 1) == (clip < np.inf)

    algorithm = fedmf(
        MF,
        aggregation="visits",
        cohort_size=NUM_CLIENTS,
        negatives=DRAWS[draws],
        phases=PERSONAL_FIRST,
        visit_weight=0.25,
        min_visits=1e-6,
        **RATES,
    )
    links = (clip_by_global_norm(clip),) if clip < np.inf else ()
    (before, _), (after, *_) = one_round(algorithm, links)
    np.testing.assert_allclose(after.shared.tables["visits"][:, 0], visits, rtol=1e-5, atol=1e-5)
    for name, total in sums.items():
        expected = before.shared.tables[name] + total / np.maximum(visits, 1e-6)[:, None]
        np.testing.assert_allclose(after.shared.tables[name], expected, rtol=1e-5, atol=1e-5)


def test_the_visit_weight_cancels_without_a_clip():
    settings = {"aggregation": "visits", "cohort_size": NUM_CLIENTS, "negatives": Negatives(2)} | RATES
    ends = [one_round(fedmf(MF, visit_weight=weight, **settings))[1][0].shared for weight in (1.0, 0.01)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *ends)


def test_a_noisy_count_near_zero_does_not_blow_up_a_row():
    """Counts of -0.2, 0, 0.1 and 5 clients under min_visits=2: the first three are divided by 2."""
    model = matrix_factorization(4, dim=1)
    algorithm = fedmf(model, aggregation="visits", cohort_size=10.0, min_visits=2.0)
    state = algorithm.init(jax.random.key(0))
    counts = np.array([[-0.2], [0.0], [0.1], [5.0]], np.float32)
    sums = np.array([[1.0], [2.0], [3.0], [4.0]], np.float32)
    aggregate = {"item": sums / 10, "bias": -sums / 10, "visits": counts / 10}
    after = algorithm.server_update(state, Shared(jax.tree.map(jnp.asarray, aggregate), {})).shared.tables
    change = sums / np.array([[2.0], [2.0], [2.0], [5.0]])
    np.testing.assert_allclose(after["item"] - state.shared.tables["item"], change, rtol=1e-5)
    np.testing.assert_allclose(after["bias"], -change, rtol=1e-5)
    np.testing.assert_allclose(after["visits"], counts, rtol=1e-5)


def test_the_mean_is_fedavg_and_dense_parameters_are_averaged_by_both_rules():
    model = gmf(NUM_ITEMS, dim=3)
    settings = {"negatives": Negatives(2), "phases": PERSONAL_FIRST} | RATES
    _, (by_mean, *_) = one_round(fedmf(model, **settings))
    _, (by_visits, *_) = one_round(fedmf(model, aggregation="visits", cohort_size=NUM_CLIENTS, **settings))
    optimizer = optax.partition(
        {"own": optax.sgd(0.5), "shared": optax.sgd(2.0)}, {"rows": "shared", "dense": "shared", "private": "own"}
    )
    plain = fedavg(model, client_optimizer=optimizer, batch_size=2, negatives=Negatives(2), phases=PERSONAL_FIRST)
    _, (expected, *_) = one_round(plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), by_mean.shared, expected.shared)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), by_visits.shared.dense, expected.shared.dense
    )
    assert not np.allclose(by_visits.shared.tables["gmf"], expected.shared.tables["gmf"], atol=1e-4)


def test_given_examples_touch_what_they_name():
    """Ready-made examples with repeats: items 4 and 1, the rest of the slots is padding."""
    clients = client_data_from_examples(
        [(np.array([4, 1, 4]), np.ones(3)), (np.array([2, 0, 3, 5, 6]), np.ones(5))], num_items=NUM_ITEMS, num_buckets=1
    )
    epoch = draw_epoch(one_by_one(clients)[0], None, 2, jax.random.key(0))
    ids, touched = np.asarray(row_ids(epoch)), np.asarray(touched_rows(epoch))
    assert set(ids[touched > 0]) == {1, 4}
    assert touched.sum() == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"aggregation": "median"}, "mean, visits; got 'median'"),
        ({"aggregation": "visits"}, "needs cohort_size"),
        ({"aggregation": "visits", "cohort_size": 5, "min_visits": 0.0}, "must be positive; got 1.0 and 0.0"),
        ({"local_epochs": 0}, "at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        fedmf(MF, **settings)
