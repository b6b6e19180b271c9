"""Risk: one interaction moves a silo's noised gradient sums by more than the clip norm, or is accounted as less."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from evaluation_worlds import make_split
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedjax_rec.algorithms.silo_dpsgd import ExampleLevelDp, clipped_sum, record_rounds, silo_dpsgd
from fedjax_rec.data.silos import Silo, draw_batch, draw_examples, equal_groups, private_of_users, silo_data
from fedjax_rec.evaluation import cases, client_scorer, evaluate
from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.transforms import chain
from fedjax_rec.models.base import Model, Shared, View
from fedjax_rec.models.matrix_factorization import matrix_factorization
from fedjax_rec.privacy.accounting import privacy_spent
from fedjax_rec.privacy.ledger import Ledger
from fedjax_rec.privacy.mechanisms import global_norm

NUM_ITEMS, NUM_USERS, DIM, CAPACITY = 9, 3, 2, 12
CLIP = 0.5


def full_model(num_items=NUM_ITEMS, dim=DIM) -> Model:
    """Every kind of leaf: two tables, a dense pytree, and two private leaves of different rank; squared loss."""

    def init_shared(key):
        keys = jax.random.split(key, 3)
        tables = {"item": jax.random.normal(keys[0], (num_items, dim)), "bias": jnp.zeros((num_items, 1))}
        return Shared(tables, {"out": jax.random.normal(keys[1], (dim,)), "mean": jnp.zeros(())})

    def init_private(key):
        return {"user": 0.5 * jax.random.normal(key, (dim,)), "offset": jnp.zeros(())}

    def loss(view, private, examples, key):
        del key
        scores = view.rows["item"] @ (private["user"] + view.dense["out"]) + view.rows["bias"][..., 0]
        errors = scores + private["offset"] + view.dense["mean"] - examples.labels
        return jnp.sum(examples.weights * jnp.square(errors)) / jnp.maximum(examples.weights.sum(), 1.0)

    def score(shared, private):
        return shared.tables["item"] @ (private["user"] + shared.dense["out"]) + shared.tables["bias"][:, 0]

    return Model(init_shared, init_private, loss, score)


def make_silo(item_ids, users, *, length=None, labels=None, public_size=None, capacity=CAPACITY, num_items=NUM_ITEMS):
    """A silo of the given rows, the first ``length`` of them real."""
    length = len(item_ids) if length is None else length
    labels = np.ones(len(item_ids), np.float32) if labels is None else np.asarray(labels, np.float32)

    def padded(values, fill, dtype):
        return jnp.full(capacity, fill, dtype).at[: len(values)].set(jnp.asarray(values, dtype))

    return Silo(
        client_id=jnp.int32(0),
        length=jnp.int32(length),
        item_ids=padded(item_ids, num_items, jnp.int32),
        labels=padded(labels, 0, jnp.float32),
        user_slots=padded(users, 0, jnp.int32),
        public_size=jnp.float32(len(item_ids) if public_size is None else public_size),
        weight=jnp.float32(1),
        num_items=num_items,
    )


def random_silo(seed, *, num=CAPACITY, **fields):
    rng = np.random.default_rng(seed)
    return make_silo(rng.integers(0, NUM_ITEMS, num), rng.integers(0, NUM_USERS, num), **fields)


def parameters(model, seed=0, num_users=NUM_USERS):
    shared_key, private_key = jax.random.split(jax.random.key(seed))
    return model.init_shared(shared_key), jax.vmap(model.init_private)(jax.random.split(private_key, num_users))


def algorithm(privacy, *, model=None, optimizer=None, num_users=NUM_USERS, **options):
    return silo_dpsgd(
        full_model() if model is None else model,
        privacy=privacy,
        users_per_silo=num_users,
        client_optimizer=optax.sgd(1.0) if optimizer is None else optimizer,
        **{"num_negatives": 3, "example_chunk_size": 5} | options,
    )


def tree_distance(a, b):
    return float(global_norm(jax.tree.map(jnp.subtract, a, b)))


@partial(jax.jit, static_argnames="chunk_size")
def sum_of_batch(params, silo, in_batch, seed, chunk_size=5):
    """The real pre-noise sum; the same seed gives every example the same negatives."""
    mechanism, key = ExampleLevelDp(1.0, CLIP, 0.0).mechanism, jax.random.key(seed)
    return clipped_sum(
        full_model(), mechanism, params, silo, in_batch, num_negatives=3, chunk_size=chunk_size, key=key
    )[0]


MAGNITUDES = st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e4, 1e18, 1e30, np.inf, np.nan])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    items=st.lists(st.integers(0, NUM_ITEMS - 1), min_size=CAPACITY, max_size=CAPACITY),
    users=st.lists(st.integers(0, NUM_USERS - 1), min_size=CAPACITY, max_size=CAPACITY),
    in_batch=st.lists(st.booleans(), min_size=CAPACITY, max_size=CAPACITY),
    one=st.integers(0, CAPACITY - 1),
    label=MAGNITUDES,
    scale=MAGNITUDES,
    seed=st.integers(0, 2**31 - 1),
)
def test_one_example_moves_the_sum_by_at_most_the_clip_norm(items, users, in_batch, one, label, scale, seed):
    shared, private = parameters(full_model(), seed % 5)
    params = jax.tree.map(lambda x: x * scale, shared), private
    silo = make_silo(items, users, labels=np.where(np.arange(CAPACITY) == one, label, 1.0))
    with_one = np.array(in_batch) | (np.arange(CAPACITY) == one)
    without = with_one & (np.arange(CAPACITY) != one)
    moved = tree_distance(sum_of_batch(params, silo, with_one, seed), sum_of_batch(params, silo, without, seed))
    assert moved <= CLIP * (1 + 1e-5)  # false for NaN too


@pytest.mark.parametrize(("label", "expected"), [(1e4, CLIP), (1e18, CLIP), (np.nan, 0.0), (np.inf, 0.0)])
def test_a_huge_example_counts_with_the_clip_norm_and_a_broken_one_with_nothing(label, expected):
    params, silo = parameters(full_model()), random_silo(0, labels=[label] + [1.0] * (CAPACITY - 1))
    everyone = np.ones(CAPACITY, bool)
    whole, rest = (sum_of_batch(params, silo, batch, 0) for batch in (everyone, np.arange(CAPACITY) > 0))
    moved = tree_distance(whole, rest)
    assert moved == pytest.approx(expected, abs=1e-5)
    if expected:  # rows, dense and private leaves share one norm
        change = jax.tree.map(jnp.subtract, whole, rest)
        parts = [float(global_norm(part)) for part in (change[0].tables, change[0].dense, change[1])]
        assert min(parts) > 0.01
        assert np.linalg.norm(parts) == pytest.approx(CLIP, rel=1e-4)


@pytest.mark.parametrize("label", [1.0, 1e4, 1e30, np.nan])
@pytest.mark.parametrize("seed", range(3))
def test_one_example_moves_the_real_local_step_by_at_most_the_clip_norm(label, seed):
    privacy = ExampleLevelDp(0.6, CLIP, 0.0)
    update = jax.jit(algorithm(privacy).client_update)
    shared, private = parameters(full_model(), seed)
    labels = [1.0] * (CAPACITY - 1) + [label]
    moves = []
    for step_seed in range(8):
        outputs = []
        for length in (CAPACITY, CAPACITY - 1):  # the same key: the same draws for all that both have
            silo = random_silo(seed, labels=labels, length=length, public_size=CAPACITY)
            output = update(shared, private, silo, 1, jax.random.key(step_seed))
            outputs.append((output.update, output.private))
        moves.append(0.6 * CAPACITY * tree_distance(*outputs))  # times the expected batch: the sum itself
    assert max(moves) <= CLIP * (1 + 1e-4)  # the parameters' own rounding comes on top
    if np.isfinite(label):  # 8 draws at 0.6 take the last example in (fails once in 1500 seeds; these are fixed)
        assert max(moves) > 0.01
    else:
        assert max(moves) < 1e-4


def dense_reference(model, privacy, shared, private, silo, key, optimizer, num_negatives):
    """The algorithm box, one example at a time, with gradients of whole tables."""
    params = (shared, private)
    opt_state = optimizer.init(params)
    for step in range(privacy.num_local_steps):
        batch_key, example_key, _ = jax.random.split(jax.random.fold_in(key, step), 3)
        total = jax.tree.map(np.zeros_like, params)
        negative_key, _ = jax.random.split(example_key)
        for place in np.flatnonzero(draw_batch(silo, privacy.sampling_prob, batch_key)):
            example = draw_examples(silo, jnp.array([place]), num_negatives=num_negatives, key=negative_key)
            ids, user = np.array(example.ids), silo.user_slots[place]

            def loss(params, ids=ids, user=user, example=example):
                rows = {name: table.at[ids].get(mode="clip") for name, table in params[0].tables.items()}
                own = jax.tree.map(lambda x: x[user], params[1])
                return model.loss(View(rows, params[0].dense), own, example, None)

            gradient = jax.grad(loss)(params)
            norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(gradient)))
            factor = min(1.0, privacy.l2_clip_norm / norm)
            total = jax.tree.map(lambda t, g, factor=factor: t + factor * g, total, gradient)
        mean = jax.tree.map(lambda t: t / (privacy.sampling_prob * float(silo.public_size)), total)
        updates, opt_state = optimizer.update(mean, opt_state, params)
        params = optax.apply_updates(params, updates)
    return jax.tree.map(jnp.subtract, params[0], shared), params[1]


@pytest.mark.parametrize("optimizer", [optax.sgd(0.3, momentum=0.9), optax.adam(0.05)], ids=["momentum", "adam"])
def test_local_steps_equal_a_loop_over_single_examples(optimizer):
    model, privacy = full_model(), ExampleLevelDp(0.7, CLIP, 0.0, num_local_steps=3)
    shared, private = parameters(model)
    silo, key = random_silo(4, num=10, labels=np.linspace(-3, 3, 10), public_size=14), jax.random.key(5)
    output = jax.jit(algorithm(privacy, optimizer=optimizer).client_update)(shared, private, silo, 3, key)
    again = jax.random.clone(key)
    expected = dense_reference(model, privacy, shared, private, silo, again, optimizer, num_negatives=3)
    for found, wanted in zip(jax.tree.leaves((output.update, output.private)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-6)
    assert 0 < output.metrics["clipped"] < 1


@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_chunks_and_padding_change_nothing(chunk_size):
    privacy = ExampleLevelDp(0.7, CLIP, 1.0, num_local_steps=2)
    shared, private = parameters(full_model())
    results = []
    for size, capacity in ((5, CAPACITY), (chunk_size, 30)):
        silo = random_silo(2, capacity=capacity)
        update = jax.jit(algorithm(privacy, example_chunk_size=size).client_update)
        output = update(shared, private, silo, 2, jax.random.key(3))
        results.append((output.update, output.private))
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_every_example_joins_each_step_independently_with_the_given_probability():
    silo = random_silo(0, length=CAPACITY - 2)
    draws = 20_000
    batches = np.array(jax.vmap(lambda key: draw_batch(silo, 0.3, key))(jax.random.split(jax.random.key(0), draws)))
    assert not batches[:, CAPACITY - 2 :].any()  # padding never joins
    batches = batches[:, : CAPACITY - 2]
    np.testing.assert_allclose(batches.mean(0), 0.3, atol=4 * np.sqrt(0.21 / draws))
    correlation = np.corrcoef(batches.T) - np.eye(CAPACITY - 2)
    assert np.abs(correlation).max() < 4.5 / np.sqrt(draws)
    observed = np.bincount(batches.sum(1), minlength=CAPACITY - 1)  # no size is cut off, zero included
    expected = draws * stats.binom.pmf(np.arange(CAPACITY - 1), CAPACITY - 2, 0.3)
    common = expected > 5
    assert (
        stats.chisquare(observed[common], expected[common] * observed[common].sum() / expected[common].sum())[1] > 1e-3
    )
    assert np.array(draw_batch(silo, 1.0, jax.random.key(1))).sum() == CAPACITY - 2


def test_negatives_know_only_their_own_example():
    place, keys = jnp.arange(CAPACITY), jax.random.split(jax.random.key(0), 300)
    draw = jax.jit(jax.vmap(lambda silo, key: draw_examples(silo, place, num_negatives=4, key=key), (None, 0)))
    own = 3
    one = make_silo([own] * CAPACITY, [0] * CAPACITY)
    other = make_silo([own, *range(CAPACITY - 1)][:CAPACITY], [1] * CAPACITY, num_items=NUM_ITEMS, length=1)
    examples = draw(one, keys)
    for found, wanted in zip(jax.tree.leaves(draw(other, keys)), jax.tree.leaves(examples), strict=True):
        np.testing.assert_array_equal(found[:, 0], wanted[:, 0])  # the silo's other rows, and their number, differ
    ids, weights = np.array(examples.ids).reshape(-1, 5), np.array(examples.weights).reshape(-1, 5)
    assert (ids[:, 0] == own).all()
    assert (weights[:, 0] == 1).all()
    assert ((ids[:, 1:] == NUM_ITEMS) == (weights[:, 1:] == 0)).all()  # its own item is masked where it was drawn
    assert all(len(set(real)) == len(real) for real in (row[row < NUM_ITEMS] for row in ids))
    assert (ids[:, 1:] != own).all()
    # 4 of 9 items: each of the others in 4/9 of the examples, trained on elsewhere in the silo or not.
    share = np.bincount(ids[:, 1:].ravel(), minlength=NUM_ITEMS)[:NUM_ITEMS] / len(ids)
    np.testing.assert_allclose(np.delete(share, own), 4 / 9, atol=0.04)


def test_more_negatives_than_items_are_refused():
    with pytest.raises(ValueError, match="between 0 and the 9 items; got 10"):
        draw_examples(random_silo(0), jnp.arange(2), num_negatives=10, key=jax.random.key(0))


def test_noise_has_its_scale_on_every_entry_once_per_step():
    model = full_model(num_items=300, dim=16)
    num_users, noise_multiplier, steps, expected_batch = 200, 2.0, 3, 0.5 * CAPACITY
    shared, private = parameters(model, num_users=num_users)

    def noise(step_count):
        """What noise alone does to each leaf in 60 runs, in units of one step's standard deviation."""
        runs = []
        for z in (noise_multiplier, 0.0):
            privacy = ExampleLevelDp(0.5, CLIP, z, num_local_steps=step_count)
            update = algorithm(privacy, model=model, num_users=num_users).client_update
            silo = random_silo(1, length=0, num_items=300)  # no example at all: noised like any other

            def run(key, update=update, silo=silo):
                output = update(shared, private, silo, step_count, key)
                return output.update, output.private

            runs.append(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(2), 60)))
        return jax.tree.map(lambda a, b: (a - b) * expected_batch / (noise_multiplier * CLIP), *runs)

    for change in jax.tree.leaves(noise(steps)):
        values = np.asarray(change)
        spread = 4 / np.sqrt(2 * values.size)
        assert np.std(values) / np.sqrt(steps) == pytest.approx(1, rel=max(0.01, spread))
        assert abs(values.mean()) < 5 * np.sqrt(steps / values.size)
        assert (values.std(0) > 0.5).all()  # every row, also those that no example touched
    large = np.asarray(noise(1)[0].tables["item"]).ravel()
    assert large.size > 250_000
    assert np.std(large) == pytest.approx(1, rel=0.01)
    assert stats.kstest(large, "norm").pvalue > 1e-3


def test_noise_is_fresh_in_every_silo_step_and_round():
    """The round folds its number and the silo's id into the key: other key, other noise; other step, other noise."""
    shared, private = parameters(full_model())

    def noise(steps, *folds):
        key = jax.random.key(0)
        for fold in folds:
            key = jax.random.fold_in(key, fold)
        update = algorithm(ExampleLevelDp(0.5, CLIP, 1.0, num_local_steps=steps)).client_update
        return update(shared, private, random_silo(1, length=0), steps, key).update.tables["item"]

    first = noise(1, 0, 0)
    others = [noise(1, 0, 1), noise(1, 1, 0), noise(2, 0, 0) - first]
    np.testing.assert_array_equal(noise(1, 0, 0), first)
    assert all(np.abs(a - b).min() > 1e-6 for a, b in pairwise([first, *others, first]))


def test_the_sum_is_divided_by_the_declared_and_not_the_realised_size():
    shared, private = parameters(full_model())
    update = jax.jit(algorithm(ExampleLevelDp(0.5, CLIP, 1.0)).client_update)
    outputs = {
        (length, size): update(shared, private, random_silo(1, length=length, public_size=size), 1, jax.random.key(0))
        for length, size in ((CAPACITY, 12), (CAPACITY, 24), (0, 12), (0, 24))
    }
    for length in (CAPACITY, 0):
        half, whole = outputs[length, 24].update, outputs[length, 12].update
        for a, b in zip(jax.tree.leaves(half), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(2 * a, b, rtol=1e-4, atol=1e-6)


def test_no_array_grows_with_examples_times_items():
    num_items, capacity, chunk = 5000, 64, 16
    model = matrix_factorization(num_items, dim=2)
    shared, private = parameters(model)
    silo = make_silo(np.arange(capacity), np.zeros(capacity, int), capacity=capacity, num_items=num_items)
    update = algorithm(ExampleLevelDp(0.5, CLIP, 1.0), model=model, example_chunk_size=chunk).client_update
    jaxpr = jax.make_jaxpr(update)(shared, private, silo, 1, jax.random.key(0))

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (variable.aval.size for variable in equation.outvars)
            for inner in jax.core.jaxprs_in_params(equation.params):
                yield from sizes(inner)

    found = list(sizes(jaxpr.jaxpr))
    assert len(found) > 100
    assert max(found) <= 2 * num_items


def test_epsilon_is_that_of_all_steps_together():
    # q = 256/60000, z = 1.1, 14,062 steps: 2.3817 by PLD, a published setting of DP-SGD, as 79 rounds of 178 steps.
    privacy = ExampleLevelDp(256 / 60_000, 1.0, 1.1, num_local_steps=178)
    ledger = record_rounds(Ledger(unit="example"), privacy, num_rounds=40)
    ledger = record_rounds(ledger, privacy, num_rounds=39)
    flat = SelfComposedDpEvent(PoissonSampledDpEvent(256 / 60_000, GaussianDpEvent(1.1)), 79 * 178)
    spent = ledger.spent(1e-5)
    assert spent == privacy_spent(flat, delta=1e-5, unit="example")
    assert spent.epsilon == pytest.approx(2.3817, rel=1e-3)
    assert (spent.unit, spent.relation) == ("example", "add_or_remove_one")
    # The noise that trains is the noise that is charged, whatever the clip norm.
    assert replace(privacy, l2_clip_norm=0.25).round_event == privacy.round_event
    whole = record_rounds(Ledger(unit="example"), ExampleLevelDp(1.0, 3.0, 2.0), num_rounds=4)
    assert whole.spent(1e-5).epsilon == pytest.approx(
        privacy_spent(GaussianDpEvent(1.0), delta=1e-5, unit="example").epsilon, rel=1e-3
    )
    silent = record_rounds(Ledger(unit="example"), ExampleLevelDp(0.5, 1.0, 0.0), num_rounds=1)
    assert silent.spent(1e-5).epsilon == np.inf


@pytest.mark.parametrize("ledger", [Ledger(unit="user"), Ledger(unit="example", relation="replace_one")])
def test_other_ledgers_refuse_the_rounds(ledger):
    with pytest.raises(ValueError, match="cannot be added to it"):
        record_rounds(ledger, ExampleLevelDp(0.1, 1.0, 1.0), num_rounds=1)


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ({"sampling_prob": 0.0}, "sampling_prob must be in"),
        ({"sampling_prob": 1.5}, "got 1.5"),
        ({"l2_clip_norm": 0.0}, "must be a positive finite number"),
        ({"noise_multiplier": -1.0}, "not negative; got -"),
        ({"num_local_steps": 0}, "num_local_steps must be at least 1; got 0"),
    ],
)
def test_numbers_out_of_range_are_refused(numbers, sentence):
    with pytest.raises(ValueError, match=sentence):
        ExampleLevelDp(**{"sampling_prob": 0.1, "l2_clip_norm": 1.0, "noise_multiplier": 1.0} | numbers)


def cliques(num_users=48, num_items=20):
    """Users like the even or the odd items; the held-out one is of their kind and popular with nobody else."""
    rng = np.random.default_rng(0)
    liked = [rng.permutation(np.arange(user % 2, num_items, 2)).tolist() for user in range(num_users)]
    return make_split([items[1:] for items in liked], [items[:1] for items in liked], num_items=num_items)


def test_silos_hold_every_interaction_once():
    split = cliques()
    silos = silo_data(split, np.arange(48) % 5 % 3, num_buckets=2)
    rows = []
    for bucket in silos.clients.buckets:
        for index in range(len(bucket.client_id)):
            silo = jax.tree.map(lambda x, i=index: x[i], bucket)
            users = np.flatnonzero(silos.silo_ids == silo.client_id)
            by_slot = dict(zip(silos.user_slots[users], users, strict=True))
            assert len(by_slot) == len(users) <= silos.users_per_silo
            assert silo.public_size == silo.length == (silo.item_ids < 20).sum() == silo.labels.sum()
            assert silos.public_sizes[silo.client_id] == silo.length
            n = silo.length
            rows += [(by_slot[s], item) for s, item in zip(silo.user_slots[:n], silo.item_ids[:n], strict=True)]
    assert sorted(rows) == sorted(zip(split.train.user_ids, split.train.item_ids, strict=True))
    weights = np.concatenate([bucket.weight for bucket in silos.clients.buckets])
    assert weights.mean() == pytest.approx(1)
    assert silos.clients.num_interactions == split.train.num_interactions
    assert set(np.bincount(equal_groups(48, num_silos=5, seed=1))) == {9, 10}


def test_groups_that_do_not_fit_are_refused():
    split = cliques()
    with pytest.raises(ValueError, match="one label for each of the 48 users"):
        silo_data(split, np.zeros(3))
    with pytest.raises(ValueError, match="2 positive numbers"):
        silo_data(split, np.arange(48) % 2, public_sizes=np.array([5, 0]))
    with pytest.raises(ValueError, match="between 1 and the 48 users; got 49"):
        equal_groups(48, num_silos=49)
    with pytest.raises(ValueError, match="nothing to train on"):
        silo_data(make_split([[], []], [[0], [1]], num_items=4), np.zeros(2))


def test_private_silos_learn_and_only_shared_parameters_leave_them():
    split = cliques()
    silos = silo_data(split, equal_groups(48, num_silos=3))
    privacy = ExampleLevelDp(0.5, 0.3, 0.3, num_local_steps=10)
    model = matrix_factorization(20, dim=4)
    method = algorithm(
        privacy, model=model, optimizer=optax.adam(0.1), num_users=silos.users_per_silo, example_chunk_size=32
    )
    results = []
    for chunk_size in (1, 3):  # silos side by side share their trip counts, and nothing else
        rounds = make_rounds(method, chain(), full_participation(3), silos.clients, span_size=8, chunk_size=chunk_size)
        state, private = rounds.init(jax.random.key(0))
        keys = RoundKeys(*jax.random.split(jax.random.key(1), 3))
        results.append(rounds.run(state, private, keys, 8))
    (state, private, metrics), (other, _, _) = results
    np.testing.assert_allclose(state.shared.tables["item"], other.shared.tables["item"], rtol=1e-3, atol=1e-4)
    assert rounds.dp_event is None  # the chain claims nothing; the silos' steps are charged by record_rounds
    assert {leaf.shape for leaf in jax.tree.leaves(state.shared)} == {(20, 4), (20, 1)}
    assert private["user"].shape == (3, 16, 4)
    assert metrics["loss"][7] < 0.75 * metrics["loss"][0]
    scorer = client_scorer(model.score, shared=state.shared, private=private_of_users(private, silos))
    assert evaluate(scorer, cases(split), ks=(1,)).values["hit@1"] > 0.6  # popularity: at most 1 in 11
