"""Risk: a few malicious clients move what everybody receives, through a rule that is said to stop them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from test_sensitivity import (
    NUM_CLIENTS,
    NUM_ITEMS,
    PROBE,
    SAMPLER,
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

from fedjax_rec.data.clients import client_data_from_examples
from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.rows import Rows
from fedjax_rec.federated.transforms import UNBOUNDED, chain
from fedjax_rec.privacy.mechanisms import clip_by_global_norm, gaussian_noise
from fedjax_rec.security import robust_rules
from fedjax_rec.security.fltrust import fltrust
from fedjax_rec.security.robust import clip_by_row_norm, krum, median, multi_krum, trimmed_mean
from fedjax_rec.security.simulated import simulated_secure_sum

KEYS = RoundKeys(*(jax.random.key(i) for i in range(3)))
EVERYONE = full_participation(NUM_CLIENTS)
NAN_CLIENT = 4


# The rules, on arrays.


@pytest.mark.parametrize(
    ("rule", "oracle"),
    [
        (robust_rules.median_rule, lambda x: np.median(x, axis=0)),
        (robust_rules.trimmed_mean_rule(0.0), lambda x: np.mean(x, axis=0)),
        (robust_rules.trimmed_mean_rule(0.2), lambda x: stats.trim_mean(x, 0.2, axis=0)),
        (robust_rules.trimmed_mean_rule(0.49), lambda x: stats.trim_mean(x, 0.49, axis=0)),
    ],
    ids=["median", "mean", "trimmed", "most trimmed"],
)
def test_each_row_over_its_senders(rule, oracle):
    """40 rows of 0 to 30 senders with ties, both signs of zero and huge numbers, in blocks that do not divide them."""
    rng = np.random.default_rng(0)
    values = rng.choice([-2.5, -1.0, -0.0, 0.0, 1.0, 3.0, 1e18], (30, 40, 2)).astype(np.float32)
    values[:, 20:] = rng.normal(size=(30, 20, 2))
    sent = rng.random((30, 40)) < np.linspace(0, 1, 40)
    sent[:, 0] = False
    values[~sent] = 0
    total = jax.jit(lambda v, s: robust_rules.robust_sum(rule, v, s, 3, block_numbers=30 * 2 * 7))
    got = total(values, sent)
    wanted = np.zeros((40, 2))
    for row in range(40):
        x = values[sent[:, row], row].astype(np.float64)
        wanted[row] = len(x) * oracle(x) if len(x) >= 3 else 0.0
    assert 0 < np.sum(~wanted.any(1)) < 20
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=1e-5)
    again = rng.permutation(30)
    np.testing.assert_allclose(total(values[again], sent[again]), got, rtol=2e-5, atol=1e-5)


def test_krum_by_hand():
    """On a line: 0, 1, 2, 10, absent, 11. With f = 1, n = 5, each score sums the 2 smallest squared distances."""
    points = np.array([0.0, 1.0, 2.0, 10.0, 1.0, 11.0], np.float32)[:, None]
    present = np.array([True, True, True, True, False, True])

    @jax.jit
    def scores(points):
        return robust_rules.krum_scores(robust_rules.squared_distances([points]), present, 1)

    np.testing.assert_allclose(scores(points), [1 + 4, 1 + 1, 1 + 4, 1 + 64, np.inf, 1 + 81])
    points[[3, 5]] = 1.8e19  # sums of two such squares overflow: infinitely far, and not NaN, which is in no order
    np.testing.assert_array_equal(np.isfinite(scores(points)), [True, True, True, False, False, False])
    assert np.argmin(scores(points)) == 1


# The links, through the round.


def send(link, sent, *, sampler=EVERYONE, chunk_size=2):
    """The real round over clients that send what they are told; returns a function of it to (sums, metrics)."""
    rounds = make_rounds(
        adversaries(), chain(PROBE, link), sampler, nothing_but_clients(), span_size=1, chunk_size=chunk_size
    )
    first, _ = rounds.init(jax.random.key(0))

    def of(sent, root=None):
        state = first if root is None else first._replace(transforms=(first.transforms[0], root))
        state, _, metrics = rounds.run(*jax.tree.map(jnp.array, (state, sent)), KEYS)
        return jax.device_get(state.transforms[0]), {name: float(value[0]) for name, value in metrics.items()}

    return of if sent is None else of(sent)


def some_uploads(seed=0):
    """Random rows, repeats and padding among them; client 4 sends a NaN."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, NUM_ITEMS + 1, (NUM_CLIENTS, 5)).astype(np.int32)
    values = rng.normal(size=(NUM_CLIENTS, 5, 2)).astype(np.float32)
    values[ids == NUM_ITEMS] = 0
    dense = rng.normal(size=(NUM_CLIENTS, 3)).astype(np.float32)
    dense[NAN_CLIENT, 1] = np.nan
    return {"ids": ids, "values": values, "dense": dense}


def tables_of(sent, clients):
    """Each client's upload written out, NaN where a row was not sent, beside its dense leaf."""
    tables = np.full((len(clients), NUM_ITEMS + 1, 2), np.nan)
    for table, client in zip(tables, clients, strict=True):
        table[sent["ids"][client]] = 0
        np.add.at(table, sent["ids"][client], sent["values"][client])
    return tables[:, :NUM_ITEMS], sent["dense"][clients]


@pytest.fixture(scope="module")
def median_round():
    return send(median(min_support=2, max_clients=NUM_CLIENTS), None)


def test_median_of_a_round(median_round):
    sent = some_uploads()
    total, metrics = median_round(sent)
    tables, dense = tables_of(sent, [c for c in range(NUM_CLIENTS) if c != NAN_CLIENT])
    support = np.sum(~np.isnan(tables[..., 0]), 0)
    assert set(support) >= {1, 2, 3}
    tables[:, support == 0] = 0
    wanted = np.where(support[:, None] >= 2, support[:, None] * np.nanmedian(tables, axis=0), 0)
    np.testing.assert_allclose(total.tables["item"], wanted, rtol=1e-5)
    np.testing.assert_allclose(total.dense["out"], 5 * np.median(dense, axis=0), rtol=1e-5)
    assert metrics["nonfinite_uploads"] == 1
    assert metrics["uploads_left_out"] == 0
    assert metrics["unsupported_rows"] == np.sum(support == 1)


def test_neither_chunks_nor_the_order_of_clients_matter(median_round):
    sent = some_uploads(1)
    total, _ = median_round(sent)
    jax.tree.map(
        np.testing.assert_array_equal, total, send(median(min_support=2, max_clients=6), sent, chunk_size=1)[0]
    )
    order = np.random.default_rng(2).permutation(NUM_CLIENTS)
    shuffled, _ = median_round({name: value[order] for name, value in sent.items()})
    jax.tree.map(np.testing.assert_array_equal, total, shuffled)


@pytest.mark.parametrize("huge", [1e3, -1e18, np.inf])
def test_a_huge_upload_stays_within_what_the_others_sent(median_round, huge):
    """All send the same five rows; one of six sends anything at all."""
    sent = some_uploads(3)
    sent["ids"][:] = np.arange(5)
    sent["dense"] = np.random.default_rng(4).normal(size=(NUM_CLIENTS, 3)).astype(np.float32)
    sent["values"][2], sent["dense"][2] = huge, huge
    total, metrics = median_round(sent)
    num = NUM_CLIENTS - metrics["nonfinite_uploads"]
    assert num == (5 if np.isinf(huge) else 6)
    honest = np.delete(sent["values"], 2, 0)
    mean = total.tables["item"][:5] / num
    assert np.all((honest.min(0) <= mean) & (mean <= honest.max(0)))
    assert np.all(np.abs(total.dense["out"]) / num <= np.abs(sent["dense"][[0, 1, 3, 4, 5]]).max(0))


def test_trimming_nothing_is_the_plain_sum_of_those_that_there_is_memory_for():
    sent = some_uploads(5)
    sent["dense"][NAN_CLIENT] = 1.0
    total, metrics = send(trimmed_mean(0.0, min_support=1, max_clients=5), sent)
    tables, dense = tables_of(sent, range(5))
    np.testing.assert_allclose(total.tables["item"], np.nansum(tables, axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(total.dense["out"], dense.sum(0), rtol=1e-5, atol=1e-6)
    assert (metrics["nonfinite_uploads"], metrics["unsupported_rows"], metrics["uploads_left_out"]) == (0, 0, 1)


def test_a_dense_median_learns_nothing_of_rows_that_few_send():
    """Why rows are taken over their senders: two of six sent each row, and the median of two and four zeros is zero."""
    sent = some_uploads(6)
    sent["ids"] = np.array([[i % 3 * 2, i % 3 * 2 + 1, 7, 7, 7] for i in range(NUM_CLIENTS)], np.int32)
    sent["values"] = np.ones((NUM_CLIENTS, 5, 2), np.float32)
    sent["dense"][:] = 1.0
    total, _ = send(median(min_support=1, max_clients=NUM_CLIENTS, dense=True), sent)
    assert not np.any(total.tables["item"])
    np.testing.assert_allclose(total.dense["out"], 6.0)


def test_krum_takes_whole_uploads():
    """Four clients about one point, one that sends NaN, one far off: n = 5, f = 1."""
    link = multi_krum(1, 2, max_clients=NUM_CLIENTS)
    sent = some_uploads(7)
    sent["ids"][:] = np.arange(5)
    sent["values"] = 1 + 0.1 * sent["values"]
    sent["dense"] = np.where(np.isnan(sent["dense"]), np.nan, 1.0).astype(np.float32)
    sent["values"][0] = -1e15
    of = send(link, None)
    total, metrics = of(sent)
    flat = sent["values"].reshape(NUM_CLIENTS, -1).astype(np.float64)
    near = np.sort(np.square(flat[[1, 2, 3, 5], None] - flat[None, [1, 2, 3, 5]]).sum(-1), axis=1)[:, 1:3].sum(1)
    best = np.array([1, 2, 3, 5])[np.argsort(near)[:2]]
    np.testing.assert_allclose(total.tables["item"][:5], 5 * sent["values"][best].mean(0), rtol=1e-4)
    np.testing.assert_allclose(total.dense["out"], 5.0, rtol=1e-6)
    assert (metrics["nonfinite_uploads"], metrics["rounds_skipped"]) == (1, 0)
    sent["dense"][1] = np.nan  # n = 4 = 2 f + 2: nothing can be promised, so nothing is done
    total, metrics = of(sent)
    assert joint_norm(total) == 0
    assert (metrics["nonfinite_uploads"], metrics["rounds_skipped"]) == (2, 1)


def test_fltrust_ignores_opposite_uploads():
    one = (np.zeros(1, np.int64), np.ones(1))
    roots = client_data_from_examples([one] * 2, num_items=NUM_ITEMS)
    of = send(fltrust(adversaries(), roots), None)
    ids = np.tile(np.arange(5, dtype=np.int32), (NUM_CLIENTS, 1))
    values, dense = np.zeros((NUM_CLIENTS, 5, 2), np.float32), np.zeros((NUM_CLIENTS, 3), np.float32)
    values[0, 0, 0] = 7.0  # along the root
    values[1, 0] = [0.3, 0.3]  # at 45 degrees
    values[2, 0, 0] = -1e6  # opposite
    dense[3, 0] = 1e6  # at right angles
    dense[4, 0] = np.nan
    root = {"ids": ids[:2], "values": np.zeros((2, 5, 2), np.float32), "dense": np.zeros((2, 3), np.float32)}
    root["values"][:, 0, 0] = [2.0, 4.0]
    total, metrics = of({"ids": ids, "values": values, "dense": dense}, root)
    half = np.sqrt(0.5)
    wanted = 5 * 3.0 * (np.array([1.0, 0.0]) + half * np.array([half, half])) / (1 + half)
    np.testing.assert_allclose(total.tables["item"][0], wanted, rtol=1e-5)
    assert not np.any(total.tables["item"][1:])
    assert not np.any(total.dense["out"])
    assert (metrics["nonfinite_uploads"], metrics["trusted"]) == (1, pytest.approx(2 / 5))
    assert metrics["trust"] == pytest.approx((1 + half) / 5)
    root["values"][:] = 0  # a root that says nothing trusts nobody
    assert joint_norm(of({"ids": ids, "values": values, "dense": dense}, root)[0]) == 0


# A norm for each row.

ROW_NORM, MAX_ROWS = 0.5, 3


@pytest.fixture(scope="module")
def clipped_rounds():
    transforms = chain(clip_by_row_norm(ROW_NORM, MAX_ROWS), gaussian_noise(1.0), PROBE)
    return make_rounds(adversaries(), transforms, SAMPLER, nothing_but_clients(), span_size=1)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(uploads=uploads, cohort=cohorts, user=users)
def test_row_norms_bound_whatever_a_client_sends(clipped_rounds, uploads, cohort, user):
    state, _ = clipped_rounds.init(jax.random.key(0))
    sums = [pre_noise_sum(clipped_rounds, state, uploads, mask) for mask in with_and_without(cohort, user)]
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(sums))
    assert moved(*sums) <= ROW_NORM * np.sqrt(MAX_ROWS) * (1 + 1e-5)
    change = sums[0].tables["item"].astype(np.float64) - sums[1].tables["item"]
    assert np.all(np.linalg.norm(change, axis=1) <= ROW_NORM * (1 + 1e-5))
    assert np.sum(change.any(1)) <= MAX_ROWS - 1  # the dense leaves count as one


CLIP_ROWS = jax.jit(lambda update: clip_by_row_norm(ROW_NORM).client(update, (), jax.random.key(0)))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(values=hnp.arrays(np.float32, (4, 2), elements=st.floats(-2, 2, width=32), fill=st.nothing()))
def test_rows_are_clipped_one_by_one(values):
    rows = Rows(jnp.array([0, 3, 3, 5]), jnp.asarray(values), 5, unique=False)
    merged = np.zeros((5, 2))
    np.add.at(merged, [0, 3, 3], values[:3].astype(np.float64))
    norm = np.linalg.norm(merged, axis=1, keepdims=True)
    wanted = merged * np.minimum(1, ROW_NORM / np.maximum(norm, 1e-30))
    clipped, metrics = CLIP_ROWS({"rows": rows})
    got = np.zeros((6, 2))
    np.add.at(got, np.asarray(clipped["rows"].ids), np.asarray(clipped["rows"].values))
    np.testing.assert_allclose(got[:5], wanted, rtol=1e-4, atol=1e-6)
    assert metrics["row_nonfinite"] == 0


def test_which_rows_are_sent_is_drawn():
    rows = Rows(jnp.arange(20), jnp.ones((20, 1)), 20, whole=True)
    link = jax.jit(jax.vmap(lambda key: clip_by_row_norm(9.0, 5).client({"a": rows, "b": rows}, (), key)[0]))
    sent = link(jax.random.split(jax.random.key(0), 200))
    counts = np.sum([np.asarray(sent[name].values)[..., 0] > 0 for name in "ab"], axis=1)
    assert counts.sum() == 200 * 5
    assert stats.chisquare(counts.reshape(-1)).pvalue > 1e-3


def test_the_bound_that_the_noise_is_told():
    assert clip_by_row_norm(0.5, 16).sensitivity(UNBOUNDED).l2 == 2.0
    assert clip_by_row_norm(0.5, 16).sensitivity(clip_by_global_norm(1.0).sensitivity(UNBOUNDED)).l2 == 1.0
    with pytest.raises(ValueError, match="put a clip before it"):
        chain(clip_by_row_norm(0.5), gaussian_noise(1.0))


# What is refused.

ONE = client_data_from_examples([(np.zeros(1, np.int64), np.ones(1))], num_items=NUM_ITEMS)
RULES = {
    "median": median(min_support=2, max_clients=NUM_CLIENTS),
    "trimmed mean": trimmed_mean(0.1, min_support=2, max_clients=NUM_CLIENTS),
    "krum": krum(1, max_clients=NUM_CLIENTS),
    "fltrust": fltrust(adversaries(), ONE),
}


@pytest.mark.parametrize("rule", RULES)
def test_central_dp_is_refused(rule):
    transforms = chain(clip_by_global_norm(1.0), gaussian_noise(1.0), RULES[rule])
    with pytest.raises(ValueError, match="single uploads"):
        make_rounds(adversaries(), transforms, EVERYONE, nothing_but_clients())


@pytest.mark.parametrize("rule", RULES)
def test_secure_sums_are_refused(rule):
    for links in (
        (RULES[rule], simulated_secure_sum(num_clients=NUM_CLIENTS)),
        (simulated_secure_sum(num_clients=NUM_CLIENTS), RULES[rule]),
    ):
        with pytest.raises(ValueError, match="shows the server none of them"):
            chain(*links)


def test_two_ways_to_sum_are_refused():
    with pytest.raises(ValueError, match="last one of the chain"):
        chain(RULES["median"], RULES["krum"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: median(min_support=0, max_clients=3), "min_support"),
        (lambda: median(min_support=1, max_clients=0), "max_clients"),
        (lambda: trimmed_mean(0.5, min_support=1, max_clients=3), "share"),
        (lambda: krum(2, max_clients=6), "at least 7"),
        (lambda: multi_krum(0, 0, max_clients=6), "num_chosen"),
        (lambda: clip_by_row_norm(0.0), "l2_row_norm"),
        (lambda: clip_by_row_norm(1.0, 0), "max_rows"),
        (lambda: fltrust(adversaries(), dataclasses.replace(ONE, num_shards=2)), "one device"),
    ],
)
def test_numbers_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
