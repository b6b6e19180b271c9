"""Risk: a sequence model sees what it has to predict, depends on padding, or does not learn what comes next."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_worlds import interactions

from fedjax_rec.models.base import Shared
from fedjax_rec.models.bert4rec import bert4rec
from fedjax_rec.models.hstu import hstu
from fedjax_rec.models.items import ItemTower, id_table
from fedjax_rec.models.sasrec import sasrec
from fedjax_rec.models.sequence import sequence_scorer
from fedjax_rec.models.sequence_training import sequence_training, train_sequence

NUM_ITEMS, DIM, LENGTH = 8, 8, 6
TABLE = id_table(NUM_ITEMS, dim=DIM, init_stddev=0.3)
SMALL = {"max_length": LENGTH, "num_blocks": 1, "num_heads": 2, "dropout": 0.0}


def features() -> ItemTower:
    """Items known by fixed features alone; what is trained is a matrix, and there is no table."""
    fixed = jax.random.normal(jax.random.key(5), (NUM_ITEMS, DIM))

    def every(params):
        return fixed @ params.dense["matrix"]

    return ItemTower(
        init=lambda key: Shared({}, {"matrix": 0.3 * jax.random.normal(key, (DIM, DIM))}),
        take=lambda params, ids: jnp.take(every(params), ids, axis=0, mode="clip"),
        all=every,
        num_items=NUM_ITEMS,
        dim=DIM,
    )


def states(items, params, targets, key):
    """In the place of a loss: what it would have been asked."""
    del items, params, key
    return targets


MODELS = {
    "sasrec": sasrec(TABLE, **SMALL),
    "bert4rec": bert4rec(TABLE, last_prob=0.5, **SMALL),
    "hstu, features": hstu(features(), **SMALL, temperature=0.2),
}
PROBES = {
    "sasrec": sasrec(TABLE, loss=states, **SMALL),
    "bert4rec": bert4rec(TABLE, loss=states, last_prob=0.0, mask_prob=0.4, **SMALL),
    "hstu": hstu(TABLE, loss=states, **SMALL),
}
ASK = {name: jax.jit(model.loss) for name, model in PROBES.items()}
QUERY = {name: jax.jit(model.query) for name, model in PROBES.items()}
PARAMS = {name: jax.jit(model.init)(jax.random.key(1)) for name, model in PROBES.items()}


def padded(history, width):
    return jnp.asarray([*history, *[NUM_ITEMS] * (width - len(history))], jnp.int32)


# A world in which each item has one that follows.

CYCLES = [[(start + 3 * step) % NUM_ITEMS for step in range(length)] for start in range(NUM_ITEMS) for length in (5, 6)]
COPIES = 12  # few long epochs, since each call of one is checked for keys used twice
HISTORIES = interactions([*CYCLES * COPIES, [2], []], num_items=NUM_ITEMS)
TRAINING = {"batch_size": 12, "learning_rate": 0.02}


@pytest.mark.parametrize("name", MODELS)
def test_the_item_that_follows_is_found(name):
    model = MODELS[name]
    num_buckets = 2 if name == "sasrec" else 1
    params = train_sequence(model, HISTORIES, seed=0, num_epochs=6, num_buckets=num_buckets, **TRAINING)
    scores = scored(sequence_scorer(model, params, HISTORIES))
    found = np.argmax(scores[: len(CYCLES)], axis=1)
    assert found.tolist() == [(cycle[-1] + 3) % NUM_ITEMS for cycle in CYCLES]
    assert np.all(np.isfinite(scores))  # of those with one item or none too


def scored(scorer):
    return np.asarray(jax.jit(lambda p, u: scorer.fn(p, u))(scorer.params, jnp.arange(HISTORIES.num_users)))


@pytest.mark.parametrize("name", ["sasrec", "hstu"])
def test_a_later_item_changes_no_earlier_query(name):
    history = [1, 4, 2, 6, 0, 3]
    before = ASK[name](PARAMS[name], padded(history, 8), jax.random.key(0))
    for place in range(1, len(history)):
        changed = [*history[:place], 7, *history[place + 1 :]]
        after = ASK[name](PARAMS[name], padded(changed, 8), jax.random.key(0))
        np.testing.assert_array_equal(after.queries[:place], before.queries[:place])
        assert before.ids[place - 1] == history[place]  # the query before a place is what is asked for it
        if place < len(history) - 1:  # the last item is only ever a target
            assert np.all(np.any(np.asarray(after.queries != before.queries)[place : len(history) - 1], axis=1))


def test_a_masked_item_is_not_seen_and_all_others_are():
    history = [1, 4, 2, 6, 0, 3]
    for seed in range(4):
        asked = ASK["bert4rec"](PARAMS["bert4rec"], padded(history, 8), jax.random.key(seed))
        masked = np.asarray(asked.ids)[np.asarray(asked.real)]
        assert 1 <= len(masked) < len(history)
        for place, item in enumerate(history):
            changed = [*history[:place], 7, *history[place + 1 :]]
            after = ASK["bert4rec"](PARAMS["bert4rec"], padded(changed, 8), jax.random.key(seed))
            real = np.asarray(asked.real)
            same = np.array_equal(after.queries[real], asked.queries[real])
            assert same == (item in masked)


@pytest.mark.parametrize("name", PROBES)
def test_the_width_of_padding_changes_nothing(name):
    for history in ([3], [1, 4, 2], [1, 4, 2, 6]):  # narrower than what counts, and wider
        query = QUERY[name](PARAMS[name], padded(history, 11), None)
        np.testing.assert_allclose(QUERY[name](PARAMS[name], padded(history, 4), None), query, rtol=1e-5, atol=1e-6)
        assert np.any(np.abs(query - QUERY[name](PARAMS[name], padded([*history[:-1], 0], 11), None)) > 1e-4)


@pytest.mark.parametrize("name", PROBES)
def test_only_the_last_items_count_and_presence_takes_an_item_away(name):
    counted = LENGTH - 1 if name == "bert4rec" else LENGTH
    history = [5, 1, 4, 2, 6, 0, 3, 7]
    ask = QUERY[name]
    query = ask(PARAMS[name], padded(history, 11), None)
    other = [0, 0, *history[-counted:]]
    np.testing.assert_allclose(ask(PARAMS[name], padded(other, 11), None), query, rtol=1e-5, atol=1e-6)
    ones = jnp.ones(11)
    np.testing.assert_allclose(ask(PARAMS[name], padded(history, 11), ones), query, rtol=1e-5, atol=1e-6)
    gone = ones.at[6].set(0.0)
    without = ask(PARAMS[name], padded(history, 11), gone)
    assert np.any(np.abs(without - query) > 1e-4)
    unlike = padded([*history[:6], 5, *history[7:]], 11)
    np.testing.assert_array_equal(ask(PARAMS[name], unlike, gone), without)  # what is not present has no influence


def test_training_goes_on_as_if_it_had_not_stopped():
    training = sequence_training(MODELS["sasrec"], HISTORIES, num_buckets=2, **TRAINING)
    key = jax.random.key(3)
    state, first = training.run_epoch(training.init(jax.random.key(0)), key)
    kept = jax.device_get(state)
    state, second = training.run_epoch(state, key)
    again, loss = training.run_epoch(jax.device_put(kept), key)
    assert loss == second
    assert loss != first
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(again), strict=True))


def test_the_best_parameters_on_validation_are_returned_and_training_stops():
    values, seen = iter([0.1, 0.3, 0.2, 0.25, 0.9]), []

    def validate(params):
        seen.append(jax.device_get(params))
        return next(values)

    looks = {"validate": validate, "validate_every": 1, "patience": 2, "num_buckets": 2}
    best = train_sequence(MODELS["sasrec"], HISTORIES, seed=0, num_epochs=5, **looks, **TRAINING)
    assert len(seen) == 4
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(best), jax.tree.leaves(seen[1]), strict=True))


def test_refusals_name_the_value():
    with pytest.raises(ValueError, match=r"dropout.*1\.0"):
        sasrec(TABLE, dropout=1.0)
    with pytest.raises(ValueError, match=r"num_heads must divide.*3 and 8"):
        sasrec(TABLE, num_heads=3)
    with pytest.raises(ValueError, match="mask_prob"):
        bert4rec(TABLE, mask_prob=0.0)
    with pytest.raises(ValueError, match="temperature"):
        hstu(TABLE, temperature=0.0)
    with pytest.raises(ValueError, match="no user with two items"):
        sequence_training(MODELS["sasrec"], interactions([[1], []], num_items=NUM_ITEMS))
