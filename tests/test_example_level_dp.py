"""Risk: one interaction moves a silo's noised gradient sums by more than the clip norm, or is accounted as less."""

from dataclasses import replace
from functools import cache

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from evaluation_worlds import make_split
from hypothesis import HealthCheck, given, settings
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

NUM_ITEMS, NUM_USERS, CAPACITY, CLIP = 9, 3, 12, 0.5


def full_model() -> Model:
    """Every kind of leaf: a table, a dense vector, and two private leaves of different rank; squared loss."""

    def init_shared(key):
        keys = jax.random.split(key)
        return Shared({"item": jax.random.normal(keys[0], (NUM_ITEMS, 2))}, {"out": jax.random.normal(keys[1], (2,))})

    def init_private(key):
        return {"user": 0.5 * jax.random.normal(key, (2,)), "offset": jnp.zeros(())}

    def loss(view, private, examples, key):
        del key
        scores = view.rows["item"] @ (private["user"] + view.dense["out"]) + private["offset"]
        return jnp.sum(examples.weights * jnp.square(scores - examples.labels)) / jnp.maximum(
            examples.weights.sum(), 1.0
        )

    return Model(init_shared, init_private, loss, score=None)


def make_silo(item_ids, users, *, length=None, labels=None, public_size=None, capacity=CAPACITY, num_items=NUM_ITEMS):
    """A silo of the given rows, the first ``length`` of them real."""
    length = len(item_ids) if length is None else length
    labels = np.ones(len(item_ids), np.float32) if labels is None else np.asarray(labels, np.float32)

    def padded(values, fill, dtype):
        return np.append(values, np.full(capacity - len(values), fill)).astype(dtype)

    return Silo(
        client_id=np.int32(0),
        length=np.int32(length),
        item_ids=padded(item_ids, num_items, np.int32),
        labels=padded(labels, 0, np.float32),
        user_slots=padded(users, 0, np.int32),
        public_size=np.float32(len(item_ids) if public_size is None else public_size),
        weight=np.float32(1),
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


def norm(tree):
    """The joint L2 norm, in float64."""
    return np.sqrt(sum(np.sum(np.square(np.asarray(leaf, np.float64))) for leaf in jax.tree.leaves(tree)))


PARAMETERS = parameters(full_model())


@cache
def compiled_update(privacy, **options):
    return jax.jit(algorithm(privacy, **options).client_update)


@jax.jit
def sum_of_batch(params, silo, in_batch, seed):
    """The real pre-noise sum; the same seed gives every example the same negatives."""
    mechanism, key = ExampleLevelDp(1.0, CLIP, 0.0).mechanism, jax.random.key(seed)
    return clipped_sum(full_model(), mechanism, params, silo, in_batch, num_negatives=3, chunk_size=5, key=key)[0]


@jax.jit
def change_by_one(params, silo, in_batch, one, seed):
    """By how much the example at place ``one`` moves the sum of a batch."""
    is_one = jnp.arange(CAPACITY) == one
    sums = [sum_of_batch(params, silo, batch, seed) for batch in (in_batch | is_one, in_batch & ~is_one)]
    return jax.tree.map(jnp.subtract, *sums)


MAGNITUDES = st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e4, 1e18, 1e30, np.inf, np.nan])


# A busy machine must not fail the draw of cases, which is what too_slow measures.
@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    num_items=st.integers(1, NUM_ITEMS),
    num_users=st.integers(1, NUM_USERS),
    others=st.integers(0, 2**CAPACITY - 1),
    one=st.integers(0, CAPACITY - 1),
    label=MAGNITUDES,
    scale=MAGNITUDES,
    seed=st.integers(0, 2**31 - 1),
)
def test_one_example_moves_the_sum_by_at_most_the_clip_norm(num_items, num_users, others, one, label, scale, seed):
    rng = np.random.default_rng(seed)
    items, users = rng.integers(0, num_items, CAPACITY), rng.integers(0, num_users, CAPACITY)  # many duplicates
    silo = make_silo(items, users, labels=np.where(np.arange(CAPACITY) == one, label, 1.0))
    in_batch = others >> np.arange(CAPACITY) & 1 == 1
    shared, private = PARAMETERS
    params = jax.tree.map(lambda x: x * np.float32(scale), shared), private
    assert norm(change_by_one(params, silo, in_batch, one, seed)) <= CLIP * (1 + 1e-5)  # false for NaN too


@pytest.mark.parametrize(("label", "expected"), [(1e4, CLIP), (1e18, CLIP), (1e30, 0.0), (np.nan, 0.0), (np.inf, 0.0)])
def test_a_huge_example_counts_with_the_clip_norm_and_a_broken_one_with_nothing(label, expected):
    silo = random_silo(0, labels=[label] + [1.0] * (CAPACITY - 1))
    moved = change_by_one(PARAMETERS, silo, np.ones(CAPACITY, bool), 0, 0)
    assert norm(moved) == pytest.approx(expected, abs=1e-5)
    if expected:  # rows, dense and private leaves share one norm
        assert min(norm(part) for part in (moved[0].tables, moved[0].dense, moved[1])) > 0.01


def test_silos_side_by_side_sum_as_they_do_alone():
    silos = [random_silo(seed) for seed in range(3)]
    batches = np.arange(CAPACITY) < np.array([[0], [3], [CAPACITY]])  # none, one and three chunks of 5
    together = jax.vmap(sum_of_batch, (None, 0, 0, 0))(
        PARAMETERS, jax.tree.map(lambda *x: jnp.stack(x), *silos), batches, np.arange(3)
    )
    for index, silo in enumerate(silos):
        alone = sum_of_batch(PARAMETERS, silo, batches[index], index)
        for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            np.testing.assert_allclose(one, other[index], rtol=1e-5, atol=1e-6)
    assert norm(jax.tree.map(lambda x: x[0], together)) == 0


@pytest.mark.parametrize("label", [1.0, 1e4, np.nan])
def test_one_example_moves_the_real_local_step_by_at_most_the_clip_norm(label):
    update = compiled_update(ExampleLevelDp(0.6, CLIP, 0.0))
    labels = [1.0] * (CAPACITY - 1) + [label]
    moves = []
    for seed in range(20):
        outputs = []
        for length in (CAPACITY, CAPACITY - 1):  # the same key: the same draws for all that both have
            silo = random_silo(seed, labels=labels, length=length, public_size=CAPACITY)
            output = update(*PARAMETERS, silo, 1, jax.random.key(seed))
            outputs.append((output.update, output.private))
        step = norm(jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), *outputs))
        moves.append(0.6 * CAPACITY * step)  # times the expected batch size: the sum itself
    assert max(moves) <= CLIP * (1 + 1e-5)
    joined = np.array(moves) > 1e-4
    assert not joined.any() if np.isnan(label) else 5 < joined.sum() < 19  # it takes part with probability 0.6


@jax.jit
def dense_gradient(params, example, user):
    """The gradient of one example with respect to whole tables."""

    def loss(params):
        shared, private = params
        rows = {name: table.at[example.ids].get(mode="clip") for name, table in shared.tables.items()}
        return full_model().loss(View(rows, shared.dense), jax.tree.map(lambda x: x[user], private), example, None)

    return jax.grad(loss)(params)


def dense_reference(privacy, params, silo, key, optimizer):
    """The algorithm box, one example at a time."""
    draw = jax.jit(lambda place, key: draw_examples(silo, place, num_negatives=3, key=key))
    opt_state = optimizer.init(params)
    for step in range(privacy.num_local_steps):
        batch_key, example_key, noise_key = jax.random.split(jax.random.fold_in(key, step), 3)
        negative_key, _ = jax.random.split(example_key)
        # Noise once a step on the whole sum, from the link whose scale the test of the noise measures.
        total, _ = privacy.mechanism.server(jax.tree.map(jnp.zeros_like, params), ((), ()), noise_key)
        for place in np.flatnonzero(draw_batch(silo, privacy.sampling_prob, batch_key)):
            gradient = dense_gradient(params, draw(np.array([place]), negative_key), silo.user_slots[place])
            factor = min(1.0, privacy.l2_clip_norm / norm(gradient))
            total = jax.tree.map(lambda t, g, factor=factor: t + factor * g, total, gradient)
        mean = jax.tree.map(lambda t: t / (privacy.sampling_prob * silo.public_size), total)
        updates, opt_state = optimizer.update(mean, opt_state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_local_steps_equal_a_loop_over_single_examples_whatever_the_chunk_and_padding():
    privacy, optimizer = ExampleLevelDp(0.7, 2.0, 0.2, num_local_steps=3), optax.sgd(0.3, momentum=0.9)

    def make(capacity):  # 10 examples, 14 declared: sums are divided by 0.7 * 14
        silo = random_silo(4, num=10, labels=np.linspace(-3, 3, 10), public_size=14, capacity=capacity)
        return jax.tree.map(jnp.asarray, replace(silo, weight=2.5))

    trained, private = dense_reference(privacy, PARAMETERS, make(10), jax.random.key(5), optimizer)
    expected = jax.tree.map(lambda new, old: 2.5 * (new - old), trained, PARAMETERS[0]), private
    for chunk_size, capacity in ((1, CAPACITY), (64, 30)):
        update = compiled_update(privacy, optimizer=optimizer, example_chunk_size=chunk_size)
        output = update(*PARAMETERS, make(capacity), 3, jax.random.key(5))
        found = output.update, output.private
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-5, atol=5e-6)
        assert 0.1 < output.metrics["clipped"] < 0.9


def test_every_example_joins_each_step_independently_with_the_given_probability():
    silo, length, draws = random_silo(0, length=10), 10, 20_000
    batches = np.array(jax.vmap(lambda key: draw_batch(silo, 0.3, key))(jax.random.split(jax.random.key(0), draws)))
    assert not batches[:, length:].any()  # padding never joins
    batches = batches[:, :length]
    np.testing.assert_allclose(batches.mean(0), 0.3, atol=4 * np.sqrt(0.21 / draws))
    assert np.abs(np.corrcoef(batches.T) - np.eye(length)).max() < 4.5 / np.sqrt(draws)
    sizes = np.bincount(batches.sum(1), minlength=length + 1)  # no size is cut off, zero included
    expected = draws * stats.binom.pmf(np.arange(length + 1), length, 0.3)
    np.testing.assert_allclose(sizes, expected, atol=4.5 * np.sqrt(expected.max()), rtol=0)
    assert np.array(draw_batch(silo, 1.0, jax.random.key(1))).sum() == length


def test_negatives_know_only_their_own_example():
    place, keys = jnp.arange(CAPACITY), jax.random.split(jax.random.key(0), 300)
    draw = jax.jit(jax.vmap(lambda silo, key: draw_examples(silo, place, num_negatives=4, key=key), (None, 0)))
    own = 3
    one = make_silo([own] * CAPACITY, [0] * CAPACITY)
    other = make_silo([own, *range(NUM_ITEMS)], [1] * (1 + NUM_ITEMS), length=1)
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


def test_noise_has_its_scale_on_every_entry_and_is_fresh_in_each_step():
    noise_multiplier, steps, runs = 2.0, 2, 20_000
    silo = random_silo(1, length=0)  # no example, so no chunk at all: noised like any other
    privacy = ExampleLevelDp(0.5, CLIP, noise_multiplier, num_local_steps=steps)
    update = jax.vmap(algorithm(privacy).client_update, (None, None, None, None, 0))
    output = jax.jit(update)(*PARAMETERS, silo, steps, jax.random.split(jax.random.key(2), runs))
    change = output.update, jax.tree.map(lambda new, old: new - old[None], output.private, PARAMETERS[1])
    # Independent steps add their variances; noise used twice would have a variance of 4 and not of 2.
    unit = np.sqrt(steps) * noise_multiplier * CLIP / (0.5 * CAPACITY)
    noise = np.concatenate([np.asarray(leaf).reshape(runs, -1) for leaf in jax.tree.leaves(change)], axis=1) / unit
    num_entries = sum(leaf.size for leaf in jax.tree.leaves(PARAMETERS))
    assert noise.shape == (runs, num_entries)
    assert noise.std() == pytest.approx(1, rel=0.002)
    np.testing.assert_allclose(noise.std(0), 1, rtol=4.5 / np.sqrt(2 * runs))  # every entry: all rows, all users
    assert stats.kstest(noise.ravel()[:200_000], "norm").pvalue > 1e-3
    assert np.abs(np.corrcoef(noise.T) - np.eye(num_entries)).max() < 4.5 / np.sqrt(runs)


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
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
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
        ({"l2_clip_norm": 0.0}, "l2_clip_norm must be .* got 0.0"),
        ({"noise_multiplier": -1.0}, "not negative; got -"),
        ({"num_local_steps": 0}, "num_local_steps must be at least 1; got 0"),
    ],
)
def test_numbers_out_of_range_are_refused(numbers, sentence):
    with pytest.raises(ValueError, match=sentence):
        ExampleLevelDp(**{"sampling_prob": 0.1, "l2_clip_norm": 1.0, "noise_multiplier": 1.0} | numbers)


def test_private_silos_learn_and_only_shared_parameters_leave_them():
    rng = np.random.default_rng(0)
    liked = [rng.permutation(np.arange(user % 2, 20, 2)).tolist() for user in range(48)]  # even or odd items
    split = make_split([items[1:] for items in liked], [items[:1] for items in liked], num_items=20)
    silos = silo_data(split, equal_groups(48, num_silos=3))
    privacy = ExampleLevelDp(0.5, 0.3, 0.3, num_local_steps=10)
    model = matrix_factorization(20, dim=4)
    method = algorithm(privacy, model=model, optimizer=optax.adam(0.1), num_users=16, example_chunk_size=32)
    rounds = make_rounds(method, chain(), full_participation(3), silos.clients, span_size=8, chunk_size=3)
    state, private = rounds.init(jax.random.key(0))
    keys = RoundKeys(*jax.random.split(jax.random.key(1), 3))
    state, private, metrics = rounds.run(state, private, keys, 8)
    assert not rounds.private  # the chain claims nothing; the silos' steps are charged by record_rounds
    assert {leaf.shape for leaf in jax.tree.leaves(state.shared)} == {(20, 4), (20, 1)}
    assert private["user"].shape == (3, 16, 4)
    assert metrics["loss"][7] < 0.75 * metrics["loss"][0]
    scorer = client_scorer(model.score, shared=state.shared, private=private_of_users(private, silos))
    assert evaluate(scorer, cases(split), ks=(1,)).values["hit@1"] > 0.6  # in random order: 1 in 11
