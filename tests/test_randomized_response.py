"""Risk: a randomised answer is truer than its epsilon says, its estimate biased, or its rounds are counted as one."""

import dataclasses
import math

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_worlds import make_split
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from test_noise import PROBE, keys

from fedjax_rec.algorithms.fedavg import fedsgd
from fedjax_rec.algorithms.item_counts import item_counts
from fedjax_rec.data.clients import client_data
from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.round import make_rounds
from fedjax_rec.federated.rows import Rows, to_dense
from fedjax_rec.federated.transforms import UNBOUNDED, Bound, chain
from fedjax_rec.models.matrix_factorization import linear_scorer
from fedjax_rec.privacy.ledger import Ledger
from fedjax_rec.privacy.local_noise import charge_local, local_epsilon
from fedjax_rec.privacy.mechanisms import gaussian_noise
from fedjax_rec.privacy.randomized_response import k_randomized_response, randomized_response

EPSILON, NUM_ITEMS = 1.0, 6
HISTORIES = [[0], [0, 1], [0, 1, 2], [0, 3], []]  # the last client has nothing
NUM_CLIENTS = len(HISTORIES)
RR = randomized_response(EPSILON, num_items=NUM_ITEMS, num_reports=NUM_CLIENTS)
K_RR = k_randomized_response(EPSILON, num_items=NUM_ITEMS, num_reports=NUM_CLIENTS)


def counting(links, histories=HISTORIES, *, num_items=NUM_ITEMS, span_size=1, **options):
    """Rounds of plain item counts over these histories, everybody in each."""
    clients = client_data(make_split(histories, [[] for _ in histories], num_items=num_items), num_buckets=1)
    sampler = full_participation(len(histories), relation="replace_one")
    method = item_counts(num_items, normalize="none")
    return make_rounds(method, links, sampler, clients, span_size=span_size, **options)


def run(rounds, num_rounds=1, seed=2):
    """The state after some rounds, on the host."""
    return jax.device_get(rounds.run(*rounds.init(jax.random.key(0)), keys(client=seed), num_rounds)[0])


def indicator(items, length=4):
    ids = np.full(length, NUM_ITEMS, np.int32)
    ids[: len(items)] = items
    return {"count": Rows(jnp.asarray(ids), jnp.asarray((ids < NUM_ITEMS)[:, None], jnp.float32), NUM_ITEMS)}


def many_reports(link, histories, num=50_000):
    """Reports of a client under many keys, ``[num, NUM_ITEMS]``, for each history that it may have."""
    one = jax.jit(jax.vmap(lambda update, key: to_dense(link.client(update, (), key)[0])["count"][:, 0], (None, 0)))
    return [np.asarray(one(indicator(h), jax.random.split(jax.random.key(i), num))) for i, h in enumerate(histories)]


# Every bit of the catalogue.


def test_bits_flip_with_the_accounted_chance():
    """Through the real round; two thirds and three halves of that chance are refuted."""
    num_items, has = 30_000, np.arange(0, 30_000, 3)
    links = chain(randomized_response(EPSILON, num_items=num_items, num_reports=1), PROBE)
    rounds = counting(links, [has], num_items=num_items)
    report = run(rounds).transforms[-1].tables["count"][:, 0]
    assert set(np.unique(report)) == {0.0, 1.0}
    flip = 1 / (1 + math.exp(EPSILON))
    truth = np.isin(np.arange(num_items), has)
    for which in (truth, ~truth):
        flipped = int(np.sum(report[which] != truth[which]))
        assert stats.binomtest(flipped, which.sum(), flip).pvalue > 1e-3
        for wrong in (2 / 3 * flip, 3 / 2 * flip):
            assert stats.binomtest(flipped, which.sum(), wrong).pvalue < 1e-6
    ((event, _),) = rounds.local_releases(0, 1)
    assert event.event.noise_parameter == pytest.approx(2 * flip, rel=1e-8)
    assert local_epsilon(event.event) <= EPSILON  # rounded to the private side
    assert rounds.upload_bits == num_items


@pytest.fixture(scope="module", params=["bits", "answers"])
def many_rounds(request):
    """Rounds of the real method, which averages them; the truth; the variance of one round's sum."""
    if request.param == "bits":
        truth = np.array([4, 2, 1, 1, 0, 0])
        flip = 1 / (1 + math.e)
        return (
            counting(RR, span_size=400),
            truth,
            np.full(NUM_ITEMS, NUM_CLIENTS * flip * (1 - flip) / (1 - 2 * flip) ** 2),
        )
    truth = np.array([1 + 1 / 2 + 1 / 3 + 1 / 2, 1 / 2 + 1 / 3, 1 / 3, 1 / 2, 0, 0])
    lie = 7 / (math.e + 6)
    says = np.array([[(1 - lie) * (i in h) / max(len(h), 1) + lie / 7 for i in range(NUM_ITEMS)] for h in HISTORIES])
    return counting(K_RR, span_size=400), truth, np.sum(says * (1 - says), 0) / (1 - lie) ** 2


def test_the_servers_estimate_is_unbiased(many_rounds):
    rounds, truth, variance = many_rounds
    estimate = NUM_CLIENTS * run(rounds, 400).shared.tables["count"][:, 0]
    assert np.all(np.abs(estimate - truth) < 4 * np.sqrt(variance / 400))
    # and it has the variance that is stated: the rounds one by one
    state, private = rounds.init(jax.random.key(0))
    estimates = []
    for _ in range(200):
        before = np.asarray(state.shared.tables["count"])[:, 0] * int(state.round)
        state, private, _ = rounds.run(state, private, keys())
        estimates.append(NUM_CLIENTS * (np.asarray(state.shared.tables["count"])[:, 0] * int(state.round) - before))
    np.testing.assert_allclose(np.var(estimates, 0).mean(), variance.mean(), rtol=0.15)


def test_a_resumed_round_has_the_same_answers_and_no_other_round_has(many_rounds):
    rounds, _, _ = many_rounds
    state, private, _ = rounds.run(*rounds.init(jax.random.key(0)), keys(), 20)
    first = np.asarray(state.shared.tables["count"])
    again = jax.device_get(rounds.run(state, private, keys(), 20)[0].shared.tables["count"])
    np.testing.assert_array_equal(again, run(rounds, 40).shared.tables["count"])
    assert not np.array_equal(again, first)  # 40 equal rounds would have the mean of 20


def test_the_ratio_of_answers_is_the_epsilon():
    """Two clients with other items: no answer's frequency differs by more than e^eps, and one does by just that."""
    counts = []
    for reports in many_reports(K_RR, ([1], [4], [])):
        assert np.all(reports.sum(1) <= 1)
        counts.append(np.append(reports.sum(0), len(reports) - reports.sum()))
    for one, other in ((0, 1), (0, 2)):
        assert np.abs(np.log(counts[one] / counts[other])).max() == pytest.approx(EPSILON, abs=0.08)
    reports = many_reports(RR, ([1, 2], [1, 4]))
    assert set(np.unique(reports)) == {0.0, 1.0}  # and so its norms are bounded, whatever came in
    reports = [r.mean(0) for r in reports]
    np.testing.assert_allclose(np.log(reports[0] / reports[1]), [0, 0, EPSILON, 0, -EPSILON, 0], atol=0.05)


def test_each_of_its_items_is_picked_alike():
    (reports,) = many_reports(k_randomized_response(20.0, num_items=NUM_ITEMS, num_reports=1), ([0, 2, 5],))
    assert stats.chisquare(reports.sum(0)[[0, 2, 5]]).pvalue > 1e-3
    assert not reports[:, [1, 3, 4]].any()


# Neighbouring data, through the real round.

history = st.lists(st.integers(0, NUM_ITEMS - 1), max_size=4, unique=True)


@pytest.fixture(scope="module")
def probed():
    """Real rounds whose population is an argument, so that neighbours need no new compilation."""
    return [counting(chain(link, gaussian_noise(1.0), PROBE), [[0, 1, 2, 3]] * 3) for link in (RR, K_RR)]


def population(lists):
    """The bucket of three clients with these histories, in the shapes that the rounds were made for."""
    (bucket,) = client_data(make_split([[0, 1, 2, 3]] * 3, [[]] * 3, num_items=NUM_ITEMS), num_buckets=1).buckets
    ids, lengths = np.full((3, 4), NUM_ITEMS, np.int32), np.array([len(items) for items in lists], np.int32)
    for row, user in enumerate(np.asarray(bucket.client_id)):
        ids[row, : lengths[user]] = lists[user]
    lengths = lengths[np.asarray(bucket.client_id)]
    return (dataclasses.replace(bucket, item_ids=jnp.asarray(ids), length=jnp.asarray(lengths)),)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(histories=st.tuples(history, history, history), other=history, user=st.integers(0, 2))
def test_one_client_moves_the_sum_by_its_bound(probed, histories, other, user):
    """Coins depend on no data: a bit of the sum changes for each item that is in one history only, and one answer."""
    neighbour = [other if u == user else items for u, items in enumerate(histories)]

    def moved(rounds):
        sums = []
        for lists in (histories, neighbour):
            state, _, _ = rounds.run(*rounds.init(jax.random.key(0)), keys(), population=population(lists))
            sums.append(np.asarray(state.transforms[-1].tables["count"]))
        return np.abs(sums[0] - sums[1]).sum()

    bits, answers = probed
    assert moved(bits) == len(set(histories[user]) ^ set(other))
    assert moved(answers) <= 2


def test_a_report_has_a_bounded_norm_with_its_noise():
    """So the server's noise on top may be accounted with clients that come and go."""
    assert RR.sensitivity(UNBOUNDED) == Bound(l1=6.0, l2=math.sqrt(6), integers=True)
    assert K_RR.sensitivity(UNBOUNDED) == Bound(l1=1.0, l2=1.0, integers=True)
    assert chain(RR, gaussian_noise(6.0)).dp_event(UNBOUNDED, 0).noise_multiplier == pytest.approx(math.sqrt(6))
    assert chain(RR).dp_event(UNBOUNDED, 0) is None


# What is claimed.


def test_twenty_rounds_cost_twenty_times():
    """dp_accounting's own PLD ignores the count of this event."""
    ledger = Ledger(relation="replace_one", trust_model="local")
    rounds = counting(K_RR)
    one = charge_local(ledger, rounds, first_round=0, num_rounds=1).spent(1e-12).epsilon
    twenty = charge_local(ledger, rounds, first_round=0, num_rounds=20).spent(1e-12).epsilon
    assert (one, twenty) == (pytest.approx(1, rel=1e-3), pytest.approx(20, rel=1e-3))


def test_bits_are_charged_by_unit():
    """A user may change every bit, an interaction that is swapped two; the closed form is the sum of pure epsilons."""
    by_example = counting(randomized_response(EPSILON, num_items=NUM_ITEMS, num_reports=5, unit="example"))
    examples = Ledger(unit="example", relation="replace_one", trust_model="local")
    users = Ledger(unit="user", relation="replace_one", trust_model="local")
    spent = charge_local(examples, by_example, first_round=0, num_rounds=10).spent(1e-12)
    assert (spent.unit, spent.epsilon) == ("example", pytest.approx(20, rel=2e-3))
    spent = charge_local(users, counting(RR), first_round=0, num_rounds=1).spent(1e-12)
    assert (spent.unit, spent.epsilon) == ("user", pytest.approx(NUM_ITEMS, rel=2e-3))
    with pytest.raises(ValueError, match="nothing of a user's whole history"):
        charge_local(users, by_example, first_round=0, num_rounds=1)
    assert by_example.local_unit == chain(chain(RR)._replace(local_unit="example")).local_unit == "example"
    with pytest.raises(ValueError, match="A report is always sent"):  # and not by adding or removing one
        Ledger().record(K_RR.local_dp_event(UNBOUNDED, 0), phase="x", released="y").spent(1e-6)


def test_the_events_epsilon_is_the_links():
    for epsilon in (0.1, 1.0, 5.0, 15.0):
        for num_items in (1, 5, 3706):
            bits = randomized_response(epsilon, num_items=num_items, num_reports=1, unit="example")
            answer = k_randomized_response(epsilon, num_items=num_items, num_reports=1).local_dp_event(UNBOUNDED, 0)
            for event in (bits.local_dp_event(UNBOUNDED, 0).event, answer):
                assert isinstance(event, dp_accounting.dp_event.RandomizedResponseDpEvent)
                assert epsilon * (1 - 1e-3) < local_epsilon(event) <= epsilon * (1 + 1e-12)


def test_numbers_out_of_range_refuse():
    for make in (randomized_response, k_randomized_response):
        for bad in (0.0, -1.0, math.inf, math.nan):
            with pytest.raises(ValueError, match="positive and finite; got"):
                make(bad, num_items=5, num_reports=3)
        with pytest.raises(ValueError, match="num_items and num_reports must be positive"):
            make(1.0, num_items=5, num_reports=0)
        with pytest.raises(ValueError, match="coins of 32 bits"):
            make(1e-11, num_items=5, num_reports=3)
    with pytest.raises(ValueError, match='"user" or "example"'):
        randomized_response(1.0, num_items=5, num_reports=3, unit="item")


def test_updates_that_are_no_item_sets_refuse():
    clients = client_data(make_split([[0], [1]], [[], []], num_items=NUM_ITEMS), num_buckets=1)
    sampler = full_participation(2, relation="replace_one")
    vectors = fedsgd(linear_scorer(NUM_ITEMS, dim=2), server_optimizer=None)
    for link in (RR, K_RR):
        with pytest.raises(ValueError, match="rows of one table"):
            make_rounds(vectors, link, sampler, clients)
        with pytest.raises(ValueError, match="rows of one table"):
            make_rounds(item_counts(NUM_ITEMS + 1), link, sampler, clients)


def test_a_sum_that_lost_rows_is_not_debiased():
    for link in (RR, K_RR):
        with pytest.raises(ValueError, match="drops rows of the sum"):
            link.server({"count": Rows(jnp.arange(2), jnp.ones((2, 1)), NUM_ITEMS)}, (), jax.random.key(0))
