"""Risk: training under a secure or encrypted sum is other training, or goes on where it must be refused."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_sensitivity import adversaries, nothing_but_clients

from fedjax_rec import security
from fedjax_rec.algorithms.fedavg import fedsgd
from fedjax_rec.algorithms.gpfedrec import gpfedrec
from fedjax_rec.algorithms.pfedrec import personal_scorer
from fedjax_rec.compression.top_k import top_k
from fedjax_rec.data.clients import client_data, client_data_from_examples
from fedjax_rec.data.negatives import Negatives
from fedjax_rec.data.sources import load
from fedjax_rec.data.split import leave_one_out
from fedjax_rec.federated.cohort import full_participation, poisson
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.transforms import chain, scale
from fedjax_rec.models.matrix_factorization import matrix_factorization
from fedjax_rec.privacy.mechanisms import clip_by_global_norm, gaussian_noise
from fedjax_rec.security.crypto_sum import crypto_secure_sum
from fedjax_rec.security.encrypted import EncryptedSumServer, EncryptingClient, KeyHolder, encrypted_sum
from fedjax_rec.security.host_sum import NoSum
from fedjax_rec.security.ring import fixed_point, ring_sum
from fedjax_rec.security.robust import median
from fedjax_rec.security.simulated import simulated_secure_sum

NUM_CLIENTS, NUM_ITEMS, ROUNDS = 8, 15, 6
pytest.importorskip("cryptography")
SEAL = pytest.importorskip("tenseal")


def population():
    """Clients of none to three items, with ratings: nothing is drawn, which takes long to compile."""
    items = [np.array([(3 * user + i) % NUM_ITEMS for i in range(user % 4)], np.int64) for user in range(NUM_CLIENTS)]
    return client_data_from_examples([(i, np.cos(i)) for i in items], num_items=NUM_ITEMS, num_buckets=1)


def keys(cohort=1, client=2):
    return RoundKeys(*(jax.random.key(seed) for seed in (cohort, client, 3)))


# A cohort of no more than nine takes the complete graph, so all refuse sums of fewer than four.
GRAPH = {"degree": 8, "threshold": 4}
SAMPLER = poisson(NUM_CLIENTS, cohort_size=5)
LEAST = {"min_clients": 4, "dropout_prob": 0.2}
SUMS = {
    "simulated": lambda: simulated_secure_sum(**GRAPH, **LEAST),
    "crypto": lambda: crypto_secure_sum(session="test", **GRAPH, **LEAST),
    "encrypted": lambda: encrypted_sum(bits=16, max_clients=NUM_CLIENTS, **LEAST),
}
ALGORITHM = fedsgd(matrix_factorization(NUM_ITEMS, dim=3, loss="squared"), server_optimizer=optax.sgd(0.5))


@pytest.fixture(scope="module")
def trainings():
    """Compiled once for all tests: dropouts and refusals come with the keys."""
    before = fixed_point(largest=1.0, max_clients=NUM_CLIENTS)
    links = {"ring": ring_sum()} | {name: make() for name, make in SUMS.items()}
    return {
        name: make_rounds(ALGORITHM, chain(before, link), SAMPLER, population(), span_size=ROUNDS)
        for name, link in links.items()
    }


def train(rounds, run_keys, num_rounds=ROUNDS, start=None):
    state, private = rounds.init(jax.random.key(0)) if start is None else jax.tree.map(jnp.asarray, start)
    state, private, metrics = rounds.run(state, private, run_keys, num_rounds)
    by_round = {name: np.asarray(value)[:num_rounds] for name, value in metrics.items()}
    return jax.device_get((state.shared, state.opt_state, private)), by_round, jax.device_get((state, private))


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def first_key(trainings, wanted, num_rounds=ROUNDS):
    """The first client key with which the simulated run's metrics are as wanted."""
    for seed in range(300):
        run_keys = keys(cohort=seed, client=1000 + seed)
        _, metrics, _ = train(trainings["simulated"], run_keys, num_rounds)
        if wanted(metrics):
            return run_keys
    raise AssertionError("No key in 300 does it.")


@pytest.mark.parametrize("name", ["crypto", "encrypted"])
def test_real_and_simulated_sums_train_the_same_model(trainings, name):
    """Six rounds with dropouts, some refused: every bit of server and private state, and every metric."""
    run_keys = first_key(trainings, lambda m: 1 < m["secure_sum_refused"].sum() < 4 and len(set(m["survivors"])) > 3)
    ours, metrics, _ = train(trainings["simulated"], run_keys)
    assert np.all((metrics["survivors"] < 4) == metrics["secure_sum_refused"])
    assert np.any(metrics["survivors"] < metrics["cohort_size"])
    theirs, other, _ = train(trainings[name], run_keys)
    same((ours, metrics), (theirs, other))


def test_without_dropouts_all_of_them_are_the_plain_sum(trainings):
    def nobody_is_missing(metrics):
        return np.array_equal(metrics["survivors"], metrics["cohort_size"]) and not metrics["secure_sum_refused"].any()

    run_keys = first_key(trainings, nobody_is_missing, 3)
    plain, metrics, _ = train(trainings["ring"], run_keys, 3)
    assert metrics["cohort_size"].min() >= 4
    for name in SUMS:
        other, found, _ = train(trainings[name], run_keys, 3)
        same(plain, other)
        np.testing.assert_array_equal(found["survivors"], metrics["cohort_size"])
        same(metrics, {key: found[key] for key in metrics})


@pytest.mark.parametrize("name", SUMS)
def test_a_refused_round_changes_nothing(trainings, name):
    run_keys = first_key(trainings, lambda m: m["secure_sum_refused"].all() and m["survivors"][0] > 1, 1)
    rounds = trainings[name]
    before = jax.device_get(rounds.init(jax.random.key(0))[0].shared)
    (after, *_), metrics, _ = train(rounds, run_keys, 1)
    assert metrics["secure_sum_refused"] == 1
    same(before, after)


def test_an_empty_cohort_gives_no_sum(trainings):
    cohorts = jax.jit(jax.vmap(lambda seed: SAMPLER.draw(jax.random.key(seed), 0)))(jnp.arange(20_000))
    cohort = int(np.argmin(cohorts.any(1)))
    for name in SUMS:
        _, metrics, _ = train(trainings[name], keys(cohort), 1)
        assert (metrics["cohort_size"], metrics["survivors"], metrics["secure_sum_refused"]) == (0, 0, 1)


@pytest.mark.parametrize("name", ["simulated", "crypto"])
def test_a_resumed_run_is_the_unbroken_one(trainings, name):
    whole, metrics, _ = train(trainings[name], keys())
    _, first, state = train(trainings[name], keys(), 3)
    parts, second, _ = train(trainings[name], keys(), 3, start=state)
    same(whole, parts)
    same(metrics, {key: np.concatenate([first[key], second[key]]) for key in metrics})
    assert len(np.unique(metrics["survivors"])) > 1  # who drops out is drawn anew in each round


# On real data.


@pytest.mark.slow
def test_movielens(data_dir):
    """ML-100K, five rounds of cohorts of about twenty, 15,138 words: the same model, bit for bit."""
    clients = client_data(leave_one_out(load("movielens/100k", data_dir=data_dir / "ml-100k")), num_buckets=1)
    model = matrix_factorization(clients.num_items, dim=8)
    algorithm = fedsgd(model, server_optimizer=optax.sgd(0.5), negatives=Negatives(1))
    sampler = poisson(clients.num_clients, cohort_size=20)
    graph = {"degree": 40, "threshold": 8, "min_clients": 8}
    links = {
        "plain": ring_sum(),
        "simulated": simulated_secure_sum(**graph),
        "crypto": crypto_secure_sum(session="test", **graph),
        "encrypted": encrypted_sum(bits=16, max_clients=100, min_clients=8),
    }
    found = {}
    for name, link in links.items():
        transforms = chain(fixed_point(largest=1.0, max_clients=100), link)
        rounds = make_rounds(algorithm, transforms, sampler, clients, span_size=5)
        found[name], metrics, _ = train(rounds, keys(), 5)
        same(found[name], found["plain"])
        if name != "plain":
            np.testing.assert_array_equal(metrics["survivors"], metrics["cohort_size"])
            assert not metrics["secure_sum_refused"].any()
            assert np.all(np.isfinite(metrics["loss"]))


# Who can read what.


def test_the_server_of_an_encrypted_sum_cannot_decrypt():
    holder = KeyHolder(min_clients=3)
    public = holder.public_context()
    assert not SEAL.context_from(public).is_private()
    client, server = EncryptingClient(public), EncryptedSumServer(public)
    words = np.array([5, 2**32 - 7, 0], np.uint32)
    sent = client.encrypt(words)
    assert all(isinstance(c, bytes) for c in sent)
    for _ in range(2):
        server.add(sent, 3)
    with pytest.raises(ValueError, match="An upload has 2 words, and the sum so far 3"):
        server.add(client.encrypt(words[:2]), 2)
    with pytest.raises(ValueError, match="secret"):  # TenSEAL's own refusal
        SEAL.bfv_vector_from(server._context, sent[0]).decrypt()
    total = server.take()
    assert total.num_clients == 2
    with pytest.raises(NoSum, match="A sum of 2 uploads is not opened; at least 3 are"):
        holder.decrypt(total)
    for _ in range(3):
        server.add(sent, 3)
    np.testing.assert_array_equal(holder.decrypt(server.take()), 3 * words)
    with pytest.raises(NoSum, match="Nobody has sent"):
        server.take()
    with pytest.raises(ValueError, match="a sum of one upload is that upload"):
        KeyHolder(min_clients=1)
    with pytest.raises(ValueError, match="given the secret key"):
        EncryptedSumServer(holder._context.serialize(save_secret_key=True))
    assert client.encrypt(words) != sent  # the same words never look the same twice


@pytest.mark.parametrize(
    ("module", "make", "message"),
    [
        ("tenseal", lambda: encrypted_sum(bits=16, max_clients=2), r"pip install 'fedjax-rec\[he\]'"),
        ("cryptography", lambda: crypto_secure_sum(session="test"), r"pip install 'fedjax-rec\[\w+\]'"),
    ],
)
def test_a_package_that_is_missing_is_named(module, make, message, monkeypatch):
    monkeypatch.setattr(security, "secagg", security.secagg)  # put back, with the modules
    for name in list(sys.modules):
        if name.startswith((f"{module}.", "fedjax_rec.security.secagg")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=message):
        make()


# What is refused.

POINT = fixed_point(largest=1.0, max_clients=6)
SECURE = simulated_secure_sum(num_clients=6)


def test_chains_that_cannot_be_summed():
    with pytest.raises(ValueError, match="adds up what clients send before anything is decoded"):
        chain(top_k(0.5), POINT, SECURE)
    for links in ((POINT, SECURE, scale(0.5)), (POINT, SECURE, SECURE), (POINT, ring_sum(), SECURE)):
        with pytest.raises(ValueError, match="must be the last one of the chain, and the only one"):
            chain(*links)
    with pytest.raises(ValueError, match=r"33,553,408, and .* up to 33,542,144. Use at most 15 bits"):
        encrypted_sum(bits=16, max_clients=1024)


def test_a_sum_needs_its_threshold():
    """However few are asked for: what depends on who is there may rely on that number."""
    options = {"min_clients": 2, "degree": 8, "threshold": 5}
    for link in (simulated_secure_sum(**options), crypto_secure_sum(session="test", **options)):
        assert link.summation.min_clients == 5


def test_parts_that_do_not_fit_a_secure_sum():
    clients, everyone = nothing_but_clients(), full_participation(6)
    individual = gpfedrec(personal_scorer(7, dim=2), num_clients=6, num_items=7, negatives=Negatives(1))
    with pytest.raises(ValueError, match="looks at single uploads, and a secure sum shows the server none"):
        make_rounds(individual, chain(POINT, SECURE), everyone, clients)
    noised_median = chain(clip_by_global_norm(1.0), gaussian_noise(1.0), median(min_support=2, max_clients=6))
    with pytest.raises(ValueError, match="robust rule looks at single uploads"):
        make_rounds(adversaries(), noised_median, everyone, clients)
    mesh = jax.make_mesh((1,), ("clients",))
    for make in (SUMS["crypto"], SUMS["encrypted"]):
        with pytest.raises(ValueError, match="taken on the host, which one device can call; leave out the mesh"):
            make_rounds(adversaries(), chain(POINT, make()), everyone, clients, mesh=mesh)
