"""Risk: a user moves more of a GAN than its clipped critic gradient, or the generator sees more than the noised sum."""

import dataclasses
from functools import cache

import contract
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_contract
from contract import NUM_ITEMS, Entry, ragged

from fedjax_rec.algorithms.fedgan import fedgan
from fedjax_rec.federated.round import make_rounds
from fedjax_rec.federated.rows import to_dense
from fedjax_rec.federated.transforms import UpdateTransform, chain
from fedjax_rec.models import gan_rows

SIZES = gan_rows.GanSizes(latent_dim=3, hidden_size=5, rank=2, critic_rank=4, critic_hidden_size=3)
OPTIONS = {"sizes": SIZES, "generator_batch_size": 4, "row_lengths": (2, 6), "penalty_weight": 10.0}
GAN = fedgan(NUM_ITEMS, critic_optimizer=optax.sgd(0.1), generator_optimizer=optax.sgd(0.1), **OPTIONS)


@cache
def world():
    return ragged()


@pytest.fixture(autouse=True)
def in_contract(monkeypatch):
    """As one of the contract's methods: what makes no sense here is only that it should find a withheld item."""
    entry = Entry(GAN, lambda shared, private: shared.tables["generator"][:, -1], finds=False)
    monkeypatch.setitem(contract.METHODS, "fedgan", lambda w: entry)


@pytest.mark.parametrize(
    "keeps",
    [
        test_contract.test_an_update_has_the_servers_structure,
        test_contract.test_the_servers_state_has_no_client_axis,
        test_contract.test_clients_outside_the_cohort_have_no_influence_and_stay_as_they_are,
        test_contract.test_chunks_and_buckets_change_nothing,
        test_contract.test_one_user_moves_the_sum_by_no_more_than_the_clip_norm_or_dp_is_refused,
    ],
    ids=lambda keeps: keeps.__name__[5:30],
)
def test_the_contract(keeps):
    keeps("fedgan")


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    """The generator's random numbers too: their key is in the server's state."""
    test_contract.test_a_stopped_run_goes_on_as_if_it_had_not_stopped("fedgan", tmp_path)


CLIENT_UPDATE = jax.jit(GAN.client_update)


def one_client(user, state):
    client = jax.tree.map(lambda x: x[user], world().clients.buckets[0])
    return CLIENT_UPDATE(state.shared, (), client, jnp.int32(1), jax.random.key(5)), client


def test_an_update_is_the_gradient_with_the_penalty_inside():
    """Against a row-by-row computation with the client's own fake row, differentiated by finite differences."""
    state = GAN.init(jax.random.key(0))
    output, client = one_client(9, state)
    items = client.item_ids[client.item_ids < NUM_ITEMS]
    row = jnp.zeros(NUM_ITEMS).at[items].set(1 / jnp.sqrt(len(items)))
    row_key, mix_key = jax.random.split(jax.random.split(jax.random.key(5), 1)[0])
    generator = state.shared.tables["generator"], state.shared.dense["generator"]
    fake = jax.jit(gan_rows.virtual_row)(*generator, len(items), row_key)
    assert np.count_nonzero(fake) == len(items)  # as long as its own
    mix = jax.random.uniform(mix_key)

    value = jax.jit(gan_rows.critic_loss)

    def loss(table):
        return float(value(table, state.shared.dense["critic"], row, fake, mix, 10.0))

    table = state.shared.tables["critic"]
    assert output.metrics["loss"] == pytest.approx(loss(table), rel=1e-5)
    direction = jax.random.normal(jax.random.key(3), table.shape)
    numeric = (loss(table + 1e-3 * direction) - loss(table - 1e-3 * direction)) / 2e-3
    assert float(jnp.sum(output.update.tables["critic"] * direction)) == pytest.approx(numeric, rel=0.02)


def test_clients_send_nothing_for_the_generator_and_empty_ones_nothing_at_all():
    state = GAN.init(jax.random.key(0))
    update = one_client(9, state)[0].update
    assert update.tables["generator"].ids.size == 0
    assert not np.any(jax.flatten_util.ravel_pytree(update.dense["generator"])[0])
    client = jax.tree.map(lambda x: x[0], world().clients.buckets[0])
    empty = jax.tree.map(lambda x: jnp.full_like(x, NUM_ITEMS) if x.dtype == jnp.int32 else x, client)
    update = CLIENT_UPDATE(state.shared, (), empty, jnp.int32(1), jax.random.key(1)).update
    assert not np.any(jax.flatten_util.ravel_pytree(to_dense(update))[0])


def test_the_generator_is_a_function_of_the_sums_alone():
    """If the sums say nothing, other users lead to the same critic and generator, bit for bit."""

    def silence(total, state, key):
        return jax.tree.map(jnp.zeros_like, total), state

    w = world()
    rounds = make_rounds(GAN, chain(UpdateTransform(server=silence)), w.sampler, w.clients, span_size=2)
    buckets = jax.device_put(w.clients.buckets)
    others = tuple(
        dataclasses.replace(b, item_ids=jnp.where(b.item_ids < NUM_ITEMS, (b.item_ids + 3) % NUM_ITEMS, NUM_ITEMS))
        for b in buckets
    )
    start = jax.device_get(rounds.init(jax.random.key(0))[0])
    one, other = (
        jax.device_get(rounds.run(*rounds.init(jax.random.key(0)), test_contract.keys(), 2, population=users))
        for users in (buckets, others)
    )
    assert test_contract.equal(one[0], other[0])
    assert not test_contract.equal(one[2]["loss"], other[2]["loss"])  # they were other users
    assert not np.array_equal(one[0].shared.tables["generator"], start.shared.tables["generator"])  # and it did train
    np.testing.assert_array_equal(one[0].shared.tables["critic"], start.shared.tables["critic"])


def test_steps_of_the_generator_raise_the_critics_value_of_its_rows():
    """With a critic that likes one item alone, which pays from the start."""
    state = GAN.init(jax.random.key(0))
    table = jnp.zeros((NUM_ITEMS, 4)).at[3].set(1.0)
    dense = state.shared.dense["critic"] | {"hidden": jnp.ones((4, 3)), "out": jnp.ones(3)}
    state = state._replace(
        shared=state.shared._replace(
            tables=state.shared.tables | {"critic": table}, dense=state.shared.dense | {"critic": dense}
        )
    )
    nothing = jax.tree.map(jnp.zeros_like, state.shared)
    step = jax.jit(GAN.server_update)
    before = state.shared.tables["generator"]
    for index in range(20):
        state = step(state._replace(round=jnp.int32(index)), nothing)
    moved = np.asarray(state.shared.tables["generator"] - before)[:, -1]
    assert np.argmax(moved) == 3
    assert moved[3] > 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_fakes": 0}, "num_fakes must be at least 1"),
        ({"sizes": SIZES._replace(rank=0)}, "rank must be at least 1"),
        ({"temperature": 0.0}, "temperature > 0"),
        ({"row_lengths": (5, 4)}, "row_lengths must be shortest and longest"),
        ({"log_popularity": np.zeros(3)}, "log_popularity must be"),
        ({"item_weights": np.full(NUM_ITEMS, 2.0)}, r"numbers in \[0, 1\]"),
    ],
)
def test_refusals(options, words):
    with pytest.raises(ValueError, match=words):
        fedgan(NUM_ITEMS, **options)
