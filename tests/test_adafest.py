"""Risk: rows chosen by noised counts cost more privacy than is accounted for, or rows leave that were not chosen."""

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from scipy import stats
from test_noise import ones, population
from test_sensitivity import (
    NUM_CLIENTS,
    NUM_ITEMS,
    SAMPLER,
    TOLERANCE,
    adversaries,
    cohorts,
    moved,
    nothing_but_clients,
    pre_noise_sum,
    uploads,
    users,
    with_and_without,
)

from fedjax_rec.federated.cohort import fixed_size, full_participation
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.rows import Rows, to_dense
from fedjax_rec.federated.sparse_server import as_tables
from fedjax_rec.federated.transforms import UNBOUNDED, UpdateTransform, chain
from fedjax_rec.models.base import Shared
from fedjax_rec.privacy.accounting import privacy_spent
from fedjax_rec.privacy.adafest import adafest, choose_rows, indicator
from fedjax_rec.privacy.formulas import combined_noise_multiplier
from fedjax_rec.privacy.mechanisms import clip_by_global_norm, user_level_dp

CLIP, NOISE, SHARE = 0.5, 1.5, 0.2
TOUCHED = CLIP * np.sqrt(SHARE / (1 - SHARE))
STDDEV = NOISE * np.hypot(CLIP, TOUCHED)
OPTIONS = {"l2_clip_norm": CLIP, "selection_share": SHARE}


def sums_probe():
    """Keeps the sum that reaches the server: tables, dense leaves and counts."""

    def init(params):
        rows = Shared(jax.tree.map(jnp.zeros_like, params.tables), {"out": None})
        dense = Shared(dict.fromkeys(params.tables), {"out": jnp.zeros_like(params.dense["out"])})
        size = len(params.tables["item"])
        return {"rows": rows, "dense": dense, "touched": {size: jnp.zeros((size, 1))}}

    return UpdateTransform(init=init, server=lambda total, *_: (total, total))


@pytest.fixture(scope="module")
def adversarial_rounds():
    links = chain(adafest(noise_multiplier=NOISE, max_rows=3, **OPTIONS), chain(), sums_probe())
    return make_rounds(adversaries(), links, SAMPLER, nothing_but_clients(), span_size=1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(uploads=uploads, cohort=cohorts, user=users)
def test_whatever_a_client_sends(adversarial_rounds, uploads, cohort, user):
    """Adding a client moves update and counts together by at most B, the update by C and the counts by t."""
    state, _ = adversarial_rounds.init(jax.random.key(0))
    a, b = (pre_noise_sum(adversarial_rounds, state, uploads, m) for m in with_and_without(cohort, user))
    assert moved(a, b) <= STDDEV / NOISE * (1 + TOLERANCE)
    assert moved((a["rows"], a["dense"]), (b["rows"], b["dense"])) <= CLIP * (1 + TOLERANCE)
    counts = moved(a["touched"], b["touched"])
    assert counts <= TOUCHED * (1 + TOLERANCE)
    real = uploads["ids"][user] < NUM_ITEMS
    values = uploads["values"][user]
    if np.all(values[real] > 0.01) and np.all(np.abs(values) < 3) and np.all(np.abs(uploads["dense"][user]) < 3):
        touched = len(np.unique(uploads["ids"][user][real]))  # duplicates count once, padding not at all
        np.testing.assert_allclose(counts, TOUCHED if touched else 0, rtol=1e-4)
        changed = np.abs(a["touched"][NUM_ITEMS] - b["touched"][NUM_ITEMS]) > 1e-6
        assert changed.sum() == touched


# Through the real round: who is chosen, the noise on the chosen, and nothing on the others.

NUM_ROWS, DIM = 4_000, 16


def keys(noise=3):
    return RoundKeys(*(jax.random.key(seed) for seed in (1, 2, noise)))


@pytest.fixture(scope="module")
def noise_rounds():
    links = chain(adafest(noise_multiplier=NOISE, max_rows=NUM_ROWS, threshold=1.0, **OPTIONS), chain(), sums_probe())
    clients = population(num_items=NUM_ROWS)
    return make_rounds(ones(NUM_ROWS, DIM, 5_000), links, full_participation(6), clients, span_size=3)


def released_noise(rounds, run_keys, num_rounds=1):
    """The noise on table and dense leaf, and the number of rows chosen; the sum of one round is always the same."""
    state, _, _ = rounds.run(*rounds.init(jax.random.key(0)), run_keys, num_rounds)
    table = np.asarray(state.shared.tables["item"]) * 6 - np.asarray(state.transforms[2]["rows"].tables["item"])
    chosen = np.any(np.asarray(state.shared.tables["item"]) != 0, axis=1)
    dense = np.asarray(state.shared.dense["out"]) * 6 - np.asarray(state.transforms[2]["dense"].dense["out"])
    return table, chosen, dense, int(state.transforms[0][1])


def test_noise_is_of_the_stated_scale_and_on_the_chosen_rows_alone(noise_rounds):
    table, chosen, dense, num_chosen = released_noise(noise_rounds, keys())
    assert num_chosen == chosen.sum()
    for noise in (table[chosen].ravel(), dense):
        assert stats.kstest(noise, "norm", args=(0, STDDEV)).pvalue > 1e-3
        for wrong in (2 / 3, 3 / 2):
            assert stats.kstest(noise, "norm", args=(0, wrong * STDDEV)).pvalue < 1e-6
    # Nobody touches these rows: their counts are noise, which would pass with 0.07 or 0.25 at the wrong scales.
    share = chosen[2:].mean()
    assert abs(share - stats.norm.sf(1.0)) < 4 * np.sqrt(0.16 * 0.84 / NUM_ROWS)
    assert abs(np.corrcoef(chosen[2:], np.arange(NUM_ROWS - 2))[0, 1]) < 0.08


def test_rounds_and_keys_have_their_own_noise_and_a_resumed_round_has_the_same(noise_rounds):
    first, second = released_noise(noise_rounds, keys()), released_noise(noise_rounds, keys(), 2)
    assert not np.array_equal(first[1], second[1])
    assert not np.any(first[2] == second[2])
    assert not np.array_equal(first[1], released_noise(noise_rounds, keys(4))[1])
    state, private, _ = noise_rounds.run(*noise_rounds.init(jax.random.key(0)), keys(), 1)
    saved = jax.tree.map(np.asarray, (state, private))
    resumed, _, _ = noise_rounds.run(*jax.tree.map(jnp.asarray, saved), keys(), 1)
    unbroken, _, _ = noise_rounds.run(*noise_rounds.init(jax.random.key(0)), keys(), 2)
    jax.tree.map(np.testing.assert_array_equal, resumed, unbroken)


def test_epsilon_is_that_of_both_releases(noise_rounds):
    apart = combined_noise_multiplier(STDDEV / CLIP, STDDEV / TOUCHED)
    ((event, count),) = noise_rounds.releases(0, 3)
    assert count == 3
    np.testing.assert_allclose(event.noise_multiplier, [NOISE, apart], rtol=1e-9)
    spent = privacy_spent(dp_accounting.SelfComposedDpEvent(event, 3), delta=1e-5, relation="add_or_remove_one")
    closed = dp_accounting.get_epsilon_gaussian(apart / np.sqrt(3), 1e-5)
    np.testing.assert_allclose(spent.epsilon, closed, rtol=1e-3)


# The link by itself.


def run_link(updates, **options):
    """The client, the sum and the server of one round, without noise; and how many rows were chosen."""
    link = adafest(l2_clip_norm=CLIP, noise_multiplier=0.0, threshold=0.0, **options)
    state = link.init(None)
    sent = [link.client(update, state, jax.random.key(0))[0] for update in updates]
    total = jax.tree.map(lambda *x: sum(x), *[to_dense(x) for x in sent])
    total, state = link.server(total, state, jax.random.key(1))
    return as_tables(total), int(state[1]), total


def two_tables(ids, size=4, unique=True):
    ids = jnp.asarray(ids, jnp.int32)
    values = jnp.where((ids < size)[:, None], 0.1, 0.0)
    tables = {"item": Rows(ids, jnp.tile(values, 2), size, unique), "bias": Rows(ids, values, size, unique)}
    return Shared(tables, {"out": jnp.full(2, 0.1)})


def test_without_noise_the_touched_rows_pass_and_tables_share_the_choice():
    updates = [two_tables([2, 4, 4]), two_tables([2, 0, 4])]
    summed, num_chosen, total = run_link(updates, max_rows=4)
    plain = [clip_by_global_norm(CLIP).client(u, (), jax.random.key(0))[0] for u in updates]
    expected = jax.tree.map(lambda a, b: a + b, *[to_dense(x) for x in plain])
    jax.tree.map(np.testing.assert_allclose, summed, expected)
    assert num_chosen == 2
    np.testing.assert_array_equal(total.tables["item"].ids, total.tables["bias"].ids)
    summed, num_chosen, _ = run_link(updates, max_rows=1)  # the row that most touched
    assert num_chosen == 1
    np.testing.assert_array_equal(np.flatnonzero(summed.tables["bias"][:, 0]), [2])
    np.testing.assert_allclose(summed.dense["out"], expected.dense["out"])


def test_tables_of_two_sizes_are_chosen_apart_within_one_norm():
    update = {"a": two_tables([1, 0]).tables["bias"], "b": two_tables([5, 7], size=7).tables["bias"]}
    summed, num_chosen, _ = run_link([update], max_rows=7)
    assert num_chosen == 3
    np.testing.assert_array_equal(np.flatnonzero(summed["b"][:, 0]), [5])
    link = adafest(noise_multiplier=1.0, max_rows=2, **OPTIONS)
    sent, _ = link.client(update, link.init(None), jax.random.key(0))
    touched = to_dense(sent["touched"])
    np.testing.assert_allclose(np.sqrt(sum((x**2).sum() for x in touched.values())), TOUCHED, rtol=1e-6)


def test_an_indicator_has_norm_one_or_nothing():
    whole = Rows(jnp.arange(5), jnp.array([[0.0], [1.0], [0.0], [-2.0], [0.0]]), 5, whole=True)
    np.testing.assert_allclose(to_dense(indicator([whole]))[:, 0], np.array([0, 1, 0, 1, 0]) / np.sqrt(2), rtol=1e-6)
    same = two_tables([2, 4, 1]).tables
    np.testing.assert_allclose(to_dense(indicator(list(same.values())))[:, 0], np.array([0, 1, 1, 0]) / np.sqrt(2))
    other = [same["item"], two_tables([3, 4]).tables["bias"]]
    assert 0.5 < np.linalg.norm(to_dense(indicator(other))) < 1
    assert not to_dense(indicator([two_tables([4, 4]).tables["bias"]])).any()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"selection_share": 0.0}, "selection_share"),
        ({"selection_share": 1.0}, "selection_share"),
        ({"max_rows": 0}, "max_rows >= 1"),
        ({"threshold": -1.0}, "threshold >= 0"),
        ({"noise_multiplier": -1.0}, "noise_multiplier >= 0"),
        ({"l2_clip_norm": 0.0}, "l2_clip_norm"),
    ],
)
def test_numbers_out_of_range_refuse(changes, words):
    with pytest.raises(ValueError, match=words):
        adafest(**{"l2_clip_norm": 1.0, "noise_multiplier": 1.0, "max_rows": 2} | changes)


def test_chains_without_a_meaning_refuse():
    with pytest.raises(ValueError, match="put a clip before it"):
        chain(choose_rows(touched_norm=1.0, stddev=1.0, max_rows=2, threshold=1.0))
    with pytest.raises(ValueError, match="2 links"):
        chain(
            adafest(l2_clip_norm=1.0, noise_multiplier=1.0, max_rows=2),
            user_level_dp(l2_clip_norm=1.0, noise_multiplier=1.0),
        )
    with pytest.raises(ValueError, match="has no table"):
        adafest(l2_clip_norm=1.0, noise_multiplier=1.0, max_rows=2).client(jnp.ones(3), ((), ()), jax.random.key(0))
    silent = adafest(l2_clip_norm=1.0, noise_multiplier=0.0, max_rows=2)
    assert silent.dp_event(UNBOUNDED, 0) == dp_accounting.NonPrivateDpEvent()
    sampler = fixed_size(NUM_CLIENTS, cohort_size=2)
    rounds = make_rounds(
        adversaries(), adafest(noise_multiplier=NOISE, max_rows=3, **OPTIONS), sampler, nothing_but_clients()
    )
    assert rounds.relation == "replace_one"  # whose accountant doubles the sensitivity of update and counts alike
