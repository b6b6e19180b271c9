"""Risk: rows that were not chosen leave the client or move the server, or their choice is not accounted for."""

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from evaluation_worlds import interactions
from hypothesis import given, settings
from scipy import stats
from test_noise import ones, population
from test_sensitivity import (
    CLIP,
    DIM,
    NUM_ITEMS,
    SAMPLER,
    TOLERANCE,
    adversaries,
    cohorts,
    joint_norm,
    moved,
    nothing_but_clients,
    pre_noise_sum,
    uploads,
    users,
    with_and_without,
)

from fedjax_rec.algorithms.fedavg import fedsgd
from fedjax_rec.data.clients import client_data_from_examples
from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.rows import Rows, to_dense
from fedjax_rec.federated.sparse_server import as_tables, sparse_sgd
from fedjax_rec.federated.transforms import UNBOUNDED, Bound, UpdateTransform, chain
from fedjax_rec.models.base import Shared
from fedjax_rec.models.matrix_factorization import linear_scorer
from fedjax_rec.privacy.adafest import adafest
from fedjax_rec.privacy.ledger import Ledger
from fedjax_rec.privacy.mechanisms import user_level_dp
from fedjax_rec.privacy.select_rows import head_items, select_rows

CHOSEN = [5, 1, 2]
SMALL = UpdateTransform(
    init=lambda params: Shared({"item": jnp.zeros((3, DIM))}, {"out": jnp.zeros(3)}),
    server=lambda total, *_: (total, total),
)


@pytest.fixture(scope="module")
def adversarial_rounds():
    noise = user_level_dp(l2_clip_norm=CLIP, noise_multiplier=1.0)
    links = chain(select_rows(CHOSEN, num_rows=NUM_ITEMS), noise, SMALL)
    return make_rounds(adversaries(), links, SAMPLER, nothing_but_clients(), span_size=1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(uploads=uploads, cohort=cohorts, user=users)
def test_whatever_a_client_sends(adversarial_rounds, uploads, cohort, user):
    """The sum that is noised has the chosen rows only, and a client moves it by what the clip leaves of those."""
    state, _ = adversarial_rounds.init(jax.random.key(0))
    a, b = (pre_noise_sum(adversarial_rounds, state, uploads, mask) for mask in with_and_without(cohort, user))
    assert moved(a, b) <= CLIP * (1 + TOLERANCE)
    ids, values, dense = (uploads[k][user] for k in ("ids", "values", "dense"))
    if np.all(np.abs(values) <= 3) and np.all(np.abs(dense) <= 3):
        table = np.zeros((NUM_ITEMS + 1, DIM))
        np.add.at(table, ids, values.astype(np.float64))
        norm = joint_norm((table[sorted(CHOSEN)], dense))
        np.testing.assert_allclose(moved(a, b), min(norm, CLIP), rtol=1e-4, atol=1e-5)
        factor = min(1, CLIP / max(norm, 1e-30))
        difference = a.tables["item"].astype(np.float64) - b.tables["item"]
        np.testing.assert_allclose(difference, factor * table[sorted(CHOSEN)], atol=1e-5)


NUM_ROWS, NOISE, NORM = 3_000, 1.5, 0.5
KEYS = RoundKeys(*(jax.random.key(seed) for seed in (1, 2, 3)))


@pytest.fixture(scope="module")
def noise_rounds():
    """Clients touch row 1 and a dense leaf; rows 1000 to 2999 are chosen, so the sum is noise."""
    links = chain(
        select_rows(np.arange(1000, NUM_ROWS), num_rows=NUM_ROWS),
        user_level_dp(l2_clip_norm=NORM, noise_multiplier=NOISE),
    )
    clients = population(num_items=NUM_ROWS)
    return make_rounds(ones(NUM_ROWS, 32, 1), links, full_participation(6), clients, span_size=3)


def tables_after(rounds, num_rounds, start=None):
    state, private, _ = rounds.run(*(start or rounds.init(jax.random.key(0))), KEYS, num_rounds)
    return jax.device_get((state, private))


def test_noise_is_of_the_stated_scale_and_on_the_chosen_rows_alone(noise_rounds):
    (state, _) = tables_after(noise_rounds, 1)
    for table in state.shared.tables.values():
        noise = table[1000:].astype(np.float64).ravel() * 6
        assert not table[:1000].any()
        assert stats.kstest(noise, "norm", args=(0, NOISE * NORM)).pvalue > 1e-3
        for wrong in (2 / 3, 3 / 2):
            assert stats.kstest(noise, "norm", args=(0, wrong * NOISE * NORM)).pvalue < 1e-6
    assert noise_rounds.releases(0, 2) == ((dp_accounting.GaussianDpEvent(NOISE), 2),)


def test_a_resumed_round_is_the_same_and_rounds_differ(noise_rounds):
    first, second = tables_after(noise_rounds, 1), tables_after(noise_rounds, 2)
    assert not np.array_equal(first[0].shared.tables["item"], second[0].shared.tables["item"])
    resumed = tables_after(noise_rounds, 1, start=jax.tree.map(jnp.asarray, first))
    jax.tree.map(np.testing.assert_array_equal, resumed, second)


# The server's step on rows.


def test_a_step_on_rows_is_the_step_on_the_table():
    """The sparse step and optax's, and rows that were not chosen bit for bit as they were."""
    transforms = chain(select_rows([0, 3], num_rows=7), user_level_dp(l2_clip_norm=0.5, noise_multiplier=1.0))
    examples = [(np.array([0, 3, 4, 4]), np.ones(4)), (np.array([6, 3]), np.zeros(2))]
    clients = client_data_from_examples(examples, num_items=7, num_buckets=1)
    method = fedsgd(linear_scorer(7, dim=2), server_optimizer=optax.sgd(0.3))
    after = []
    for algorithm in (method, sparse_sgd(method, learning_rate=0.3)):
        rounds = make_rounds(algorithm, transforms, full_participation(2), clients, span_size=2)
        before = np.asarray(rounds.init(jax.random.key(0))[0].shared.tables["item"])
        after.append(tables_after(rounds, 2)[0].shared)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *after)
    still = np.all(after[1].tables["item"] == before, axis=1)
    assert np.flatnonzero(~still).tolist() == [0, 3]


# The link by itself.


def update_of(*, whole=False, size=5):
    ids = np.arange(size) if whole else np.array([4, 0, size, 2])
    values = np.where((ids < size)[:, None], 1.0 + ids[:, None], 0.0).astype(np.float32)
    rows = Rows(jnp.asarray(ids, jnp.int32), jnp.asarray(values), size, whole=whole)
    return {"rows": rows, "other": Rows(jnp.array([7]), jnp.ones((1, 2)), 8), "dense": jnp.ones(3)}


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("chosen", [[0, 3, 4, 1], [0, 1, 2, 3, 4], [2]])
def test_chosen_rows_come_back_where_they_were_and_the_rest_is_gone(whole, chosen):
    update, link = update_of(whole=whole), select_rows(chosen, num_rows=5)
    sent, _ = link.client(update, (), jax.random.key(0))
    assert sent["rows"].num_rows == len(chosen)
    assert sent["rows"].whole == whole
    assert not sent["rows"].values[sent["rows"].ids == len(chosen)].any()  # or the clip would count what is dropped
    total, _ = link.server(to_dense(sent), (), jax.random.key(1))
    back, expected = as_tables(total), to_dense(update)
    keep = np.isin(np.arange(5), chosen)[:, None]
    np.testing.assert_array_equal(back["rows"], np.where(keep, expected["rows"], 0))
    np.testing.assert_array_equal(back["other"], expected["other"])
    np.testing.assert_array_equal(back["dense"], expected["dense"])


def test_rows_that_a_later_link_lets_through_are_put_back_too():
    links = chain(
        select_rows([4, 1, 2], num_rows=5), adafest(l2_clip_norm=100.0, noise_multiplier=0.0, max_rows=2, threshold=0.0)
    )
    update = {"rows": update_of()["rows"]}
    sent, _ = links.client(update, links.init(None), jax.random.key(0))
    total, _ = links.server(to_dense(sent), links.init(None), jax.random.key(1))
    np.testing.assert_allclose(as_tables(total)["rows"][:, 0], [0, 0, 3, 0, 5], rtol=1e-6)


def test_the_bound_is_untouched():
    assert select_rows([0], num_rows=5).sensitivity(Bound(2.0, 1.0)) == Bound(2.0, 1.0)
    assert select_rows([0], num_rows=5).dp_event(UNBOUNDED, 0) is None


@pytest.mark.parametrize("row_ids", [[], [-1, 2], [5], [1, 1]])
def test_ids_that_are_no_choice_refuse(row_ids):
    with pytest.raises(ValueError, match="distinct rows of 0 to 4"):
        select_rows(row_ids, num_rows=5)


def test_tables_that_are_not_there_or_look_alike_refuse():
    with pytest.raises(ValueError, match="num_rows=6"):
        select_rows([0], num_rows=6).client(update_of(), (), jax.random.key(0))
    for other in (Rows(jnp.array([1]), jnp.ones((1, 2)), 2), jnp.ones((2, 3))):
        with pytest.raises(ValueError, match="Choose one row more or less"):
            select_rows([0, 1], num_rows=5).client(update_of() | {"dense": other}, (), jax.random.key(0))


# The choice.

TRAIN = interactions([[0, 1, 2, 3], [1], [1, 3], [3, 1]], num_items=6)


def test_the_head_is_the_most_popular():
    """Row-normalised: item 1 has 1/2 + 1 + 2/sqrt 2, item 3 1/2 + 2/sqrt 2."""
    exact = head_items(TRAIN, num_rows=2, noise_multiplier=0.0, key=jax.random.key(0))
    np.testing.assert_array_equal(exact.row_ids, [1, 3])
    assert not np.isfinite(exact.charge(Ledger()).spent(1e-5).epsilon)
    chosen = {
        tuple(head_items(TRAIN, num_rows=2, noise_multiplier=5.0, key=jax.random.key(s)).row_ids) for s in range(20)
    }
    assert len(chosen) > 5  # noise chooses
    with pytest.raises(ValueError, match="between 1 and the 6 items"):
        head_items(TRAIN, num_rows=7, noise_multiplier=1.0, key=jax.random.key(0))


def test_the_choice_is_charged_with_training():
    head = head_items(TRAIN, num_rows=2, noise_multiplier=3.0, key=jax.random.key(0))
    ledger = head.charge(Ledger())
    assert [entry.phase for entry in ledger.entries] == ["selection"]
    ledger = ledger.record(dp_accounting.GaussianDpEvent(2.0), phase="training", released="sums", count=4)
    joint = (3.0**-2 + 4 * 2.0**-2) ** -0.5
    np.testing.assert_allclose(ledger.spent(1e-5).epsilon, dp_accounting.get_epsilon_gaussian(joint, 1e-5), rtol=1e-3)
