"""Risk: FedProx, SCAFFOLD or FedNova runs and converges, but is FedAvg, or corrects towards the wrong point."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from evaluation_worlds import make_split
from reference_round import one_by_one
from test_sensitivity import CHAIN, CLIP, SAMPLER, moved, pre_noise_sum, with_and_without

from fedjax_rec.algorithms.fedavg import fedavg
from fedjax_rec.algorithms.fednova import fednova
from fedjax_rec.algorithms.fedprox import fedprox
from fedjax_rec.algorithms.scaffold import control_rows, private_bytes, scaffold
from fedjax_rec.data.clients import client_data, client_data_from_examples
from fedjax_rec.data.negatives import Negatives
from fedjax_rec.federated.cohort import full_participation, poisson
from fedjax_rec.federated.local import draw_epoch, mean_steps
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.transforms import chain
from fedjax_rec.models.base import Model, Shared
from fedjax_rec.models.matrix_factorization import matrix_factorization
from fedjax_rec.privacy.mechanisms import user_level_dp

NAMES = ("fedprox", "scaffold", "fednova")
LR, MU = 0.5, 0.7


def keys():
    return RoundKeys(*(jax.random.key(seed) for seed in (1, 2, 3)))


def make(name, model, clients, *, lr=LR, mu=MU, sampling_prob=1.0, effective_steps=None, **training):
    """One of the three, on this population."""
    if name == "fedavg":
        return fedavg(model, client_optimizer=optax.sgd(lr), **training)
    if name == "fedprox":
        return fedprox(model, mu=mu, client_optimizer=optax.sgd(lr), **training)
    if name == "fednova":
        return fednova(model, lr=lr, effective_steps=effective_steps, **training)
    batch_size = training.get("batch_size")
    return scaffold(
        model,
        lr=lr,
        num_control_rows=control_rows(clients, batch_size=batch_size, negatives=training.get("negatives")),
        mean_local_steps=mean_steps(clients, batch_size=batch_size, local_epochs=training.get("local_epochs", 1)),
        sampling_prob=sampling_prob,
        **training,
    )


def leaves_close(actual, expected, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


# Worlds with a known answer.


def one_number_an_item():
    """Scores item i by a shared number b_i, squared loss: a client's objective is a parabola."""

    def loss(view, private, examples, key):
        errors = examples.weights * jnp.square(view.rows["bias"][..., 0] - examples.labels)
        return 0.5 * errors.sum() / jnp.maximum(examples.weights.sum(), 1.0)

    def init_shared(key):
        return Shared({"bias": jnp.full((2, 1), 0.7)}, {})

    return Model(init_shared, lambda key: (), loss, lambda shared, private: shared.tables["bias"][:, 0])


def where_it_stops(name, examples, num_rounds, **training):
    clients = client_data_from_examples([(np.array(i), np.array(r)) for i, r in examples], num_items=2, num_buckets=1)
    algorithm = make(name, one_number_an_item(), clients, **training)
    rounds = make_rounds(algorithm, chain(), full_participation(len(examples)), clients, span_size=num_rounds)
    state, _, _ = rounds.run(*rounds.init(jax.random.key(0)), keys(), num_rounds)
    return float(state.shared.tables["bias"][0, 0])


@pytest.mark.parametrize(("name", "answer"), [("fedavg", 0.5), ("fedprox", 2 / 7), ("scaffold", 0.2)])
def test_clients_of_different_curvature(name, answer):
    """F_1 = b^2 / 2 and F_2 = (b - 1)^2 / 8, forty local steps: the sum has its minimum at 1/5.

    FedAvg stops at the mean of the two minima, SCAFFOLD at the minimum of the sum, and FedProx with mu = 1 where the
    pulls a_k / (a_k + mu) (e_k - b) of the two exact local solutions are even: 0.2 / 0.7.
    """
    examples = [([0, 0, 0, 0], [0.0, 0.0, 0.0, 0.0]), ([0, 1, 1, 1], [1.0, 0.0, 0.0, 0.0])]
    stop = where_it_stops(name, examples, 100, lr=0.4 if name == "scaffold" else 0.8, mu=1.0, local_epochs=40)
    assert abs(stop - answer) < 1e-3


@pytest.mark.parametrize(("name", "at_least", "at_most"), [("fedavg", 0.88, 1.0), ("fednova", 0.49, 0.5)])
def test_clients_of_different_length(name, at_least, at_most):
    """One client wants 0 in one step, one wants 1 in eight: the mean is 1/2, and FedAvg stops near 8/9."""
    examples = [([0], [0.0]), ([0] * 8, [1.0] * 8)]
    stop = where_it_stops(name, examples, 300, lr=0.01, batch_size=1)
    assert at_least < stop < at_most


# The engine against a loop in NumPy on whole tables.

LENGTHS = (5, 0, 1, 9, 3, 7, 2)
COHORTS = poisson(len(LENGTHS), cohort_size=4)
TRAINING = {"batch_size": 3, "local_epochs": 2}


def tiny_model():
    """Score q_i . p_u + s with a dense s, squared loss."""
    base = matrix_factorization(11, dim=3, loss="squared", init_stddev=0.5)

    def loss(view, private, examples, key):
        scores = view.rows["item"] @ private["user"] + view.dense["offset"]
        losses = 0.5 * examples.weights * jnp.square(scores - examples.labels)
        return losses.sum() / jnp.maximum(examples.weights.sum(), 1.0)

    def init_shared(key):
        return Shared({"item": base.init_shared(key).tables["item"]}, {"offset": jnp.float32(0.3)})

    return Model(init_shared, base.init_private, loss, base.score)


def drawn(num_buckets=1):
    rng = np.random.default_rng(0)
    train = [rng.permutation(11)[:n].tolist() for n in LENGTHS]
    return client_data(make_split(train, [[] for _ in train], num_items=11), num_buckets=num_buckets)


def given(num_buckets=1):
    rng = np.random.default_rng(1)
    examples = [(rng.integers(0, 11, n), rng.random(n).astype(np.float32)) for n in LENGTHS]
    return client_data_from_examples(examples, num_items=11, num_buckets=num_buckets)


LAYOUTS = {"drawn": (drawn, Negatives(2)), "given": (given, None)}


@cache
def drawn_examples(layout):
    """Of each of three rounds, the (client id, length, examples in batches) of the cohort."""
    data, negatives = LAYOUTS[layout]
    population = one_by_one(data())
    draw = jax.jit(lambda client, key: draw_epoch(client, negatives, 3, key).examples)
    rounds = []
    for index in range(3):
        clients_key = jax.random.fold_in(keys().client, index)
        cohort = np.flatnonzero(COHORTS.draw(keys().cohort, index))
        train_keys = [jax.random.split(jax.random.fold_in(clients_key, who))[0] for who in cohort]
        examples = [draw(population[w], jax.random.split(k)[0]) for w, k in zip(cohort, train_keys, strict=True)]
        rounds.append([(w, LENGTHS[w], jax.device_get(x)) for w, x in zip(cohort, examples, strict=True)])
    return rounds


def local_sgd(table, offset, user, batches, extra):
    """Plain SGD on 1/2 mean (q . p + s - y)^2; ``extra(table, offset)`` is added to the shared gradients."""
    for ids, labels, weights in batches:
        rows = table[np.minimum(ids, len(table) - 1)]
        errors = weights / max(weights.sum(), 1.0) * (rows @ user + offset - labels)
        gradient = np.zeros((len(table) + 1, 3))
        np.add.at(gradient, ids, errors[..., None] * user)
        by_table, by_offset = extra(table, offset)
        by_user = (errors[..., None] * rows).sum((0, 1))
        table = table - LR * (gradient[:-1] + by_table)
        offset, user = offset - LR * (errors.sum() + by_offset), user - LR * by_user
    return table, offset, user


def numpy_rounds(name, layout, users, table, offset):
    """The papers' pseudo-code: returns (table, offset, users, c, c_i), whole tables throughout."""
    num, users = len(LENGTHS), users.copy()
    c, c_s, c_i, c_i_s = np.zeros_like(table), 0.0, np.zeros((num, *table.shape)), np.zeros(num)
    mean_k = np.mean([2 * -(-n // 3) for n in LENGTHS])
    for cohort in drawn_examples(layout):
        moves, weights, steps, control = [], [], [], []
        for who, length, examples in cohort:
            k = -(-length // 3)
            batches = [tuple(x[i] for x in examples) for i in range(k)] * 2
            extra = {
                "fedprox": lambda q, s, q_t, s_t, i: (MU * (q - q_t), MU * (s - s_t)),
                "scaffold": lambda q, s, q_t, s_t, i, c=c, c_s=c_s: (c - c_i[i], c_s - c_i_s[i]),
            }.get(name, lambda q, s, q_t, s_t, i: (0.0, 0.0))
            extra = partial(extra, q_t=table, s_t=offset, i=who)
            q, s, users[who] = local_sgd(table, offset, users[who], batches, extra)
            tau, data_weight = 2 * k, min(length, 4) / 4
            if name == "fednova":
                moves.append((data_weight * (q - table) / max(tau, 1), data_weight * (s - offset) / max(tau, 1)))
                weights.append(data_weight)
                steps.append(data_weight * tau)
            elif name == "scaffold" and tau:
                new, new_s = c_i[who] - c + (table - q) / (tau * LR), c_i_s[who] - c_s + (offset - s) / (tau * LR)
                # The engine moves everything by the drift that clients have in common, at its public mean.
                moves.append((q - table + tau * LR * c, s - offset + tau * LR * c_s))
                control.append((new - c_i[who], new_s - c_i_s[who]))
                c_i[who], c_i_s[who] = new, new_s
            else:
                moves.append((q - table, s - offset))
        by_table, by_offset = (sum(x) / COHORTS.expected_size for x in zip(*moves, strict=True))
        scale = sum(steps) / sum(weights) if name == "fednova" else 1.0
        table, offset = table + scale * by_table, offset + scale * by_offset
        if name == "scaffold":
            table, offset = table - mean_k * LR * c, offset - mean_k * LR * c_s
            c, c_s = (old + sum(x) / num for old, x in zip((c, c_s), zip(*control, strict=True), strict=True))
    return table, offset, users, (c, c_s), (c_i, c_i_s)


@cache
def trained(name, layout, chunk_size=3, num_buckets=1):
    """(state, private) at the start and after three rounds; every program is compiled once for all tests."""
    data, negatives = LAYOUTS[layout]
    clients = data(num_buckets)
    training = TRAINING | {"negatives": negatives, "sampling_prob": COHORTS.sampling_prob}
    training |= {"max_examples": 4} if name == "fednova" else {}
    algorithm = make(name, tiny_model(), clients, **training)
    rounds = make_rounds(algorithm, chain(), COHORTS, clients, span_size=3, chunk_size=chunk_size)
    start = rounds.init(jax.random.key(0))
    return jax.device_get(start), jax.device_get(rounds.run(*start, keys(), 3)[:2])


def whole(ids, rows):
    table = np.zeros((12, rows.shape[-1]))
    np.add.at(table, ids, rows)
    return table[:-1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_three_rounds_are_the_papers_loop_in_numpy(name, layout):
    (state, private), after = trained(name, layout)
    own = private.model if name == "scaffold" else private
    start = own["user"], state.shared.tables["item"], state.shared.dense["offset"]
    table, offset, users, control, controls = numpy_rounds(name, layout, *start)
    state, private = after
    leaves_close((state.shared.tables["item"], state.shared.dense["offset"]), (table, offset))
    own = private.model if name == "scaffold" else private
    leaves_close(own["user"], users)
    plain, *_ = numpy_rounds("fedavg", layout, *start)
    assert np.abs(table - plain).max() > 1e-3  # or the comparison says nothing about the method
    if name == "scaffold":
        leaves_close((state.shared.control.tables["item"], state.shared.control.dense["offset"]), control)
        tables = [whole(i, r) for i, r in zip(np.asarray(private.ids), np.asarray(private.rows["item"]), strict=True)]
        leaves_close((np.stack(tables), private.dense["offset"]), controls)


@pytest.mark.parametrize("name", NAMES)
def test_chunks_and_buckets_change_nothing(name):
    results = []
    for chunk_size, num_buckets in ((1, 2 if name == "scaffold" else 1), (3, 1)):
        _, (state, private) = trained(name, "given", chunk_size, num_buckets)
        if name == "scaffold":
            own, rows = private.model, jax.vmap(lambda i, r: jnp.zeros((11, 3)).at[i].add(r, mode="drop"))
            private = own, rows(private.ids, private.rows["item"]), private.dense
        results.append((state, private))
    leaves_close(*results)


# What the three are when they have nothing to do.


def test_without_their_terms_they_are_fedavg():
    """FedProx with mu = 0 bit for bit; FedNova where clients take as many steps, an empty client among them."""
    results = []
    for name in ("fedavg", "fedprox", "fednova"):
        algorithm = make(name, tiny_model(), given(), mu=0.0, effective_steps=3.0, local_epochs=3)
        rounds = make_rounds(algorithm, chain(), COHORTS, given(), span_size=2, chunk_size=4)
        results.append(jax.device_get(rounds.run(*rounds.init(jax.random.key(0)), keys(), 2)[:2]))
    averaged, proximal, normalized = results
    jax.tree.map(np.testing.assert_array_equal, proximal, averaged)
    leaves_close(normalized, averaged)


# Privacy.


def test_the_mean_of_what_clients_keep_is_all_that_the_server_knows_of_it():
    """c = mean of c_i over all clients, whoever took part; the c_i themselves are nowhere on the server."""
    _, (state, private) = trained("scaffold", "drawn")
    kept = [whole(i, r) for i, r in zip(private.ids, private.rows["item"], strict=True)]
    leaves_close(state.shared.control.tables["item"], np.mean(kept, 0))
    leaves_close(state.shared.control.dense["offset"], private.dense["offset"].mean())
    assert not any(len(LENGTHS) in leaf.shape for leaf in jax.tree.leaves(state))
    secrets = np.concatenate(
        [np.ravel(x) for x in (private.rows["item"], private.dense["offset"], private.model["user"])]
    )
    public = np.concatenate([np.ravel(x) for x in jax.tree.leaves(state)])
    assert np.count_nonzero(secrets) > 100
    assert not np.any(np.isin(public[public != 0], secrets))


@pytest.mark.parametrize("name", NAMES)
def test_with_and_without_one_user(name):
    """The pre-noise sum, both parts of SCAFFOLD's together, moves by at most the clip norm, and reaches it."""
    rng = np.random.default_rng(1)
    examples = [(rng.permutation(7)[:n], rng.normal(size=n)) for n in (3, 0, 6, 1, 4, 5)]
    clients = client_data_from_examples(examples, num_items=7, num_buckets=1)
    model = matrix_factorization(7, dim=2, init_stddev=1.0, loss="squared")
    public = {"sampling_prob": SAMPLER.sampling_prob, "effective_steps": 2.0}
    rounds = make_rounds(make(name, model, clients, **public, **TRAINING), CHAIN, SAMPLER, clients, span_size=1)
    state, private = rounds.init(jax.random.key(0))
    for _ in range(3):  # until control variates are there
        state, private, _ = rounds.run(state, private, keys())
    state = state._replace(round=jnp.zeros((), jnp.int32))
    distances = np.zeros((6, 2))
    for user, index in np.ndindex(6, 2):
        masks = with_and_without(rng.random(6) < 0.5, user)
        distances[user, index] = moved(*(pre_noise_sum(rounds, state, private, mask) for mask in masks))
    assert 0.99 * CLIP < distances.max() <= CLIP * (1 + 1e-5)
    assert np.all(distances[1] == 0)  # without data
    assert rounds.private


def test_refusals():
    clients, model = drawn(), tiny_model()
    links = user_level_dp(l2_clip_norm=1.0, noise_multiplier=1.0)
    with pytest.raises(ValueError, match=r"number of local steps has no public bound.*Set effective_steps"):
        make_rounds(make("fednova", model, clients), links, COHORTS, clients)
    make_rounds(make("fednova", model, clients, effective_steps=2.0), links, COHORTS, clients)
    with pytest.raises(ValueError, match="mu must be"):
        make("fedprox", model, clients, mu=-0.1)
    with pytest.raises(ValueError, match="effective_steps must be positive"):
        make("fednova", model, clients, effective_steps=0.0)
    with pytest.raises(ValueError, match=r"must be positive; got .*sampling_prob=0\.0"):
        make("scaffold", model, clients, sampling_prob=0.0)
    algorithm = scaffold(model, lr=0.1, num_control_rows=3, mean_local_steps=1.0, sampling_prob=1.0)
    with pytest.raises(ValueError, match="touches up to 9 rows and keeps 3"):
        make_rounds(algorithm, chain(), COHORTS, clients)


def test_the_memory_of_control_variates_is_what_it_says():
    clients, model = drawn(), tiny_model()
    num_rows = control_rows(clients, negatives=Negatives(2))
    assert num_rows == 11  # 9 items and 18 negatives, but there are no more than 11 items
    assert control_rows(clients) == 9
    _, (_, private) = trained("scaffold", "drawn")
    kept = sum(x.nbytes for x in jax.tree.leaves((private.ids, private.rows, private.dense)))
    assert kept == len(LENGTHS) * private_bytes(model, num_rows)
    assert mean_steps(clients, batch_size=3, local_epochs=2) == np.mean([2 * -(-n // 3) for n in LENGTHS])
