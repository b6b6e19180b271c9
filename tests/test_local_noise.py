"""Risk: a client's own noise leaves its items visible, is not the noise that is accounted, or is claimed twice."""

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, LaplaceDpEvent, get_epsilon_gaussian
from evaluation_worlds import make_split
from hypothesis import given, settings
from scipy import stats
from test_noise import keys, ones, population
from test_sensitivity import (
    CLIP,
    COHORTS,
    NUM_CLIENTS,
    NUM_ITEMS,
    PROBE,
    SAMPLER,
    TOLERANCE,
    adversaries,
    cohorts,
    moved,
    nothing_but_clients,
    uploads,
    users,
    with_and_without,
)

from fedjax_rec.algorithms.item_counts import item_counts
from fedjax_rec.data.clients import client_data
from fedjax_rec.federated.cohort import fixed_size, full_participation, poisson
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.rows import Rows, is_rows, to_dense
from fedjax_rec.federated.transforms import UNBOUNDED, Bound, chain
from fedjax_rec.privacy.formulas import shuffled_epsilon
from fedjax_rec.privacy.laplace import clip_by_l1_norm
from fedjax_rec.privacy.ledger import Ledger
from fedjax_rec.privacy.local_noise import charge_local, local_epsilon, local_gaussian, local_laplace, shuffled_spent
from fedjax_rec.privacy.mechanisms import clip_by_global_norm, gaussian_noise
from fedjax_rec.privacy.randomized_response import k_randomized_response, randomized_response

STDDEV = 0.75
EVERYONE = full_participation(NUM_CLIENTS, relation="replace_one")
IN_L1 = clip_by_l1_norm(2.0)


def adversarial(*links, sampler=EVERYONE):
    return make_rounds(adversaries(), chain(*links, PROBE), sampler, nothing_but_clients(), span_size=1)


def pre_noise_sum(rounds, private, cohort_seed=0):
    """Runs the real round and returns what the server's noise would be added to."""
    state, _ = rounds.init(jax.random.key(0))
    run_keys = RoundKeys(jax.random.key(cohort_seed), jax.random.key(5), jax.random.key(6))
    state, _, _ = rounds.run(state, jax.tree.map(jnp.array, private), run_keys)
    return jax.device_get(state.transforms[-1])


# Neighbouring data through the real round.


@pytest.fixture(scope="module")
def both_noises():
    return adversarial(clip_by_global_norm(CLIP), local_gaussian(STDDEV), gaussian_noise(1.0))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(one=uploads, other=uploads, user=users)
def test_replacing_a_client_moves_the_sum_by_twice_the_clip_at_most(both_noises, one, other, user):
    """The client's noise is the same for any data, so it cancels: the bound that the server's noise relies on."""
    row = np.arange(NUM_CLIENTS) == user
    other = {k: np.where(row.reshape(-1, *[1] * (v.ndim - 1)), v, one[k]) for k, v in other.items()}
    sums = [pre_noise_sum(both_noises, private) for private in (one, other)]
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(sums))
    assert moved(*sums) <= 2 * CLIP * (1 + TOLERANCE)


def test_twice_the_clip_is_reached(both_noises):
    one = {"ids": np.full((NUM_CLIENTS, 5), 1, np.int32), "values": np.ones((NUM_CLIENTS, 5, 2), np.float32)}
    one["dense"] = np.ones((NUM_CLIENTS, 3), np.float32)
    other = one | {k: np.concatenate([-one[k][:1], one[k][1:]]) for k in ("values", "dense")}
    assert moved(*(pre_noise_sum(both_noises, p) for p in (one, other))) > 2 * CLIP * (1 - TOLERANCE)


@pytest.fixture(scope="module")
def clipped_again():
    return adversarial(
        clip_by_global_norm(CLIP),
        local_gaussian(STDDEV),
        clip_by_global_norm(2 * CLIP),
        gaussian_noise(1.0),
        sampler=SAMPLER,
    )


@settings(max_examples=30, deadline=None, derandomize=True)
@given(private=uploads, cohort=cohorts, user=users)
def test_after_a_second_clip_a_client_may_be_removed(clipped_again, private, cohort, user):
    """Noise and all, what it adds is within the second clip: add-or-remove, with Poisson cohorts."""
    seeds = [COHORTS[tuple(mask)] for mask in with_and_without(cohort, user)]
    sums = [pre_noise_sum(clipped_again, private, seed) for seed in seeds]
    assert moved(*sums) <= 2 * CLIP * (1 + TOLERANCE)
    assert moved(*sums) > 2 * CLIP * 0.99  # the noise is long, so the clip is reached


def test_without_one_it_takes_its_noise_along_and_the_pair_is_refused():
    links = (clip_by_global_norm(CLIP), local_gaussian(STDDEV))
    rounds = adversarial(*links, sampler=SAMPLER)
    _, private = rounds.init(jax.random.key(0))
    seeds = [COHORTS[tuple(mask)] for mask in with_and_without(np.ones(NUM_CLIENTS, bool), 2)]
    assert moved(*(pre_noise_sum(rounds, private, seed) for seed in seeds)) > 2 * CLIP
    for sampler in (SAMPLER, full_participation(NUM_CLIENTS)):
        with pytest.raises(ValueError, match="clip the noised update again"):
            adversarial(*links, gaussian_noise(1.0), sampler=sampler)


# What the noise is.


def noised_sum(link, sampler_size=3):
    """Noise of three clients together, over the tables and the dense leaf, and the rounds."""
    links = chain(IN_L1, link)
    sampler = full_participation(sampler_size, relation="replace_one")
    rounds = make_rounds(ones(1500, 4, 2000), links, sampler, population(sampler_size, 1500), span_size=2)
    state, _, _ = rounds.run(*rounds.init(jax.random.key(0)), keys())
    total = jax.tree.map(lambda x: sampler_size * np.asarray(x, np.float64), state.shared)
    sent = sampler_size * 2 / (4 + 1 + 2000)
    for table in total.tables.values():
        table[1] -= sent
    return [*total.tables.values(), total.dense["out"] - sent], rounds


@pytest.fixture(scope="module", params=["gaussian", "laplace"])
def noised(request):
    link = local_gaussian(STDDEV) if request.param == "gaussian" else local_laplace(STDDEV)
    return request.param, *noised_sum(link)


def test_the_noise_is_the_accounted_one_and_everywhere(noised):
    """Three clients' own noises on every number, by KS; at 2/3 and 3/2 of the scale it is another one."""
    name, leaves, rounds = noised
    numbers = np.concatenate([x.ravel() for x in leaves])
    assert np.all(numbers != 0)
    rng = np.random.default_rng(0)

    def pvalue(scale):
        if name == "gaussian":
            return stats.kstest(numbers, "norm", args=(0, np.sqrt(3) * scale)).pvalue
        return stats.ks_2samp(numbers, rng.laplace(0, scale, (3, 200_000)).sum(0)).pvalue

    assert pvalue(STDDEV) > 1e-3
    assert pvalue(STDDEV * 2 / 3) < 1e-6
    assert pvalue(STDDEV * 3 / 2) < 1e-6
    for leaf in leaves:
        spread = np.sqrt(3) * STDDEV * (1 if name == "gaussian" else np.sqrt(2))
        assert abs(leaf.std() / spread - 1) < 0.1
    event = GaussianDpEvent(STDDEV / 2) if name == "gaussian" else LaplaceDpEvent(STDDEV / 2)
    assert rounds.local_releases(0, 2) == ((event, 2),)
    assert rounds.releases(0, 2) == ()
    assert rounds.upload_bits == 32 * (1500 * 4 + 1500 + 2000)


def test_a_resumed_round_has_the_same_noise_and_no_other_round_has(noised):
    _, _, rounds = noised
    whole, _, _ = rounds.run(*rounds.init(jax.random.key(0)), keys(), 2)
    first = rounds.run(*rounds.init(jax.random.key(0)), keys(), 1)
    one = jax.device_get(first[0].shared)
    again, _, _ = rounds.run(first[0], first[1], keys(), 1)
    for a, b, c in zip(*map(jax.tree.leaves, (whole.shared, again.shared, one)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.any(np.asarray(a) == c)
    other, _, _ = rounds.run(*rounds.init(jax.random.key(0)), keys(client=9), 1)
    assert not np.any(np.asarray(other.shared.dense["out"]) == one.dense["out"])


# The attack that noise on every entry is there for.


def on_touched_rows(update, stddev):
    """The mistake: noise on the rows that a client sends anyway."""

    def noise(leaf):
        values = leaf.values + stddev * jax.random.normal(jax.random.key(0), leaf.values.shape)
        return Rows(leaf.ids, jnp.where((leaf.ids < leaf.num_rows)[:, None], values, 0), leaf.num_rows)

    return jax.tree.map(noise, update, is_leaf=is_rows)


def test_noise_on_touched_rows_shows_the_items_and_on_all_rows_it_does_not():
    """What the server gets from one client of eight, through the real round."""
    rng, num_items, sampler = np.random.default_rng(3), 400, fixed_size(8, cohort_size=1)
    histories = [np.sort(rng.choice(num_items, 60 - u, replace=False)) for u in range(8)]
    clients = client_data(make_split(histories, [[] for _ in histories], num_items=num_items), num_buckets=1)
    links = chain(clip_by_global_norm(1.0), local_gaussian(1.0))
    rounds = make_rounds(item_counts(num_items), links, sampler, clients)
    state, _, _ = rounds.run(*rounds.init(jax.random.key(0)), keys())
    report = np.asarray(state.shared.tables["count"])[:, 0]
    (who,) = np.flatnonzero(sampler.draw(keys().cohort, 0))
    has = np.isin(np.arange(num_items), histories[who])

    ids = np.full(64, num_items)
    ids[: has.sum()] = histories[who]
    sent = on_touched_rows({"t": Rows(jnp.asarray(ids), jnp.zeros((64, 1)), num_items)}, 1.0)
    np.testing.assert_array_equal(np.asarray(to_dense(sent)["t"])[:, 0] != 0, has)  # the items, exactly
    assert np.all(report != 0)
    areas = [stats.mannwhitneyu(guess[has], guess[~has]).statistic for guess in (report, np.abs(report))]
    assert all(abs(area / (has.sum() * (~has).sum()) - 0.5) < 0.12 for area in areas)


# What is claimed.


def small(*links, sampler=EVERYONE):
    return make_rounds(adversaries(), chain(*links), sampler, nothing_but_clients())


def test_each_noise_has_its_own_ledger_and_does_not_borrow_the_others():
    rounds = small(clip_by_global_norm(CLIP), local_gaussian(4 * CLIP), gaussian_noise(6 * CLIP))
    assert rounds.releases(0, 10) == ((GaussianDpEvent(6.0), 10),)
    assert rounds.local_releases(0, 10) == ((GaussianDpEvent(4.0), 10),)
    local = charge_local(
        Ledger(relation="replace_one", trust_model="local"), rounds, first_round=0, num_rounds=10, phase="counts"
    )
    central = rounds.charge(Ledger(relation="replace_one"), first_round=0, num_rounds=10)
    for ledger, multiplier in ((local, 4.0), (central, 6.0)):
        expected = get_epsilon_gaussian(multiplier / 2 / np.sqrt(10), 1e-5)
        assert ledger.spent(1e-5).epsilon == pytest.approx(expected, rel=1e-3)
    assert local.phase("counts") == local
    examples = Ledger(unit="example", relation="replace_one", trust_model="local")
    assert charge_local(examples, rounds, first_round=0, num_rounds=1).spent(1e-5).unit == "example"


def test_a_noised_update_is_within_its_norms_and_no_integer():
    whole_numbers = Bound(1.0, 2.0, integers=True)
    for link in (local_gaussian(1.0), local_laplace(1.0)):
        assert link.sensitivity(whole_numbers) == Bound(1.0, 2.0, noised=True)


def test_local_noise_is_not_amplified_by_a_rare_cohort():
    rounds = small(clip_by_global_norm(1.0), local_gaussian(2.0), sampler=poisson(NUM_CLIENTS, cohort_size=0.01))
    assert rounds.local_releases(0, 5) == ((GaussianDpEvent(2.0), 5),)


def test_laplace_reports_are_pure():
    rounds = small(IN_L1, local_laplace(8.0))
    ((event, _),) = rounds.local_releases(0, 1)
    assert local_epsilon(event) == pytest.approx(2 * 2.0 / 8.0)
    ledger = charge_local(Ledger(relation="replace_one", trust_model="local"), rounds, first_round=0, num_rounds=4)
    assert ledger.spent(1e-9).epsilon == pytest.approx(4 * 0.5, rel=1e-3)


def test_charges_that_mean_nothing_refuse():
    rounds = small(clip_by_global_norm(1.0), local_gaussian(2.0))
    for wrong in (Ledger(), Ledger(relation="replace_one"), Ledger(trust_model="local")):
        with pytest.raises(ValueError, match="trust model 'local' and relation 'replace_one'"):
            charge_local(wrong, rounds, first_round=0, num_rounds=1)
    local = Ledger(relation="replace_one", trust_model="local")
    with pytest.raises(ValueError, match="No client adds noise"):
        charge_local(local, small(clip_by_global_norm(1.0)), first_round=0, num_rounds=1)
    with pytest.raises(ValueError, match="nothing of a user's whole history"):
        charge_local(local, rounds._replace(local_unit="example"), first_round=0, num_rounds=1)


@pytest.mark.parametrize(
    ("links", "words"),
    [
        ([local_gaussian(1.0)], "bounds the L2 norm"),
        ([local_gaussian(1.0), clip_by_global_norm(1.0)], "bounds the L2 norm"),
        ([clip_by_global_norm(1.0), local_laplace(1.0)], "bounds the L1 norm"),
        ([clip_by_global_norm(1.0), local_gaussian(1.0), local_gaussian(1.0)], "2 links"),
        ([clip_by_global_norm(1.0), local_gaussian(1.0), gaussian_noise(1.0), gaussian_noise(1.0)], "2 links"),
    ],
)
def test_chains_without_a_meaning_refuse(links, words):
    with pytest.raises(ValueError, match=words):
        chain(*links)


@pytest.mark.parametrize("bad", [0.0, -1.0, np.inf, np.nan])
def test_noise_out_of_range_refuses(bad):
    for link in (local_gaussian, local_laplace):
        with pytest.raises(ValueError, match="positive and finite; got"):
            link(bad)


def test_tables_too_large_for_a_chunk_refuse_with_their_bytes():
    size = 4 * (NUM_ITEMS * 2 + 3)
    with pytest.raises(ValueError, match=f"{size} bytes, above the limit of {size - 1}.*raise max_update_bytes"):
        small(clip_by_global_norm(1.0), local_gaussian(1.0, max_update_bytes=size - 1))
    small(clip_by_global_norm(1.0), local_gaussian(1.0, max_update_bytes=size))


def test_repeated_rows_padding_and_whole_tables_keep_their_sum():
    """The noise goes on top of the update itself: two noised forms of one update differ by nothing."""
    rows = Rows(jnp.array([2, 2, 4, 0]), jnp.array([[1.0], [2.0], [0.0], [5.0]]), 4, unique=False)
    table = Rows(jnp.arange(4), jnp.array([[5.0], [0.0], [3.0], [0.0]]), 4, whole=True)
    link = local_gaussian(1.0)
    noised = [to_dense(link.client({"t": leaf}, (), jax.random.key(0))[0])["t"] for leaf in (rows, table)]
    np.testing.assert_allclose(*noised, atol=1e-6)


# Shuffled reports.


def test_shuffled_rounds_are_composed():
    rounds = small(IN_L1, local_laplace(8.0))
    one = shuffled_spent(rounds, num_reports=50_000, delta=1e-6, first_round=0, num_rounds=1)
    assert one.epsilon == shuffled_epsilon(0.5, num_reports=50_000, delta=1e-6) < 0.1
    four = shuffled_spent(rounds, num_reports=50_000, delta=1e-6, first_round=0, num_rounds=4)
    assert four.epsilon == pytest.approx(4 * shuffled_epsilon(0.5, num_reports=50_000, delta=2.5e-7))
    assert (four.relation, four.unit, four.delta) == ("replace_one", "user", 1e-6)
    published = k_randomized_response(1.0, num_items=99, num_reports=NUM_CLIENTS)
    rounds = rounds._replace(local_releases=lambda *_: ((published.local_dp_event(UNBOUNDED, 0), 1),))
    spent = shuffled_spent(rounds, num_reports=6040, delta=1e-6, first_round=0, num_rounds=1)
    assert spent.epsilon == pytest.approx(0.268, abs=1e-3)


def test_shuffling_is_refused_where_the_theorem_does_not_hold():
    how = {"num_reports": 50_000, "delta": 1e-6, "first_round": 0, "num_rounds": 1}
    gaussian = small(clip_by_global_norm(1.0), local_gaussian(20.0))
    with pytest.raises(ValueError, match="no pure epsilon"):
        shuffled_spent(gaussian, **how)
    with pytest.raises(ValueError, match="protects nothing"):
        shuffled_spent(small(clip_by_global_norm(1.0)), **how)
    with pytest.raises(ValueError, match="needs a local epsilon between"):
        shuffled_spent(small(IN_L1, local_laplace(0.1)), **how)
    laplace = small(IN_L1, local_laplace(8.0))
    with pytest.raises(ValueError, match="Use more reports"):
        shuffled_spent(laplace, **how | {"num_reports": 100})
    with pytest.raises(ValueError, match="random one"):
        shuffled_spent(small(IN_L1, local_laplace(8.0), sampler=poisson(NUM_CLIENTS, cohort_size=3)), **how)
    with pytest.raises(ValueError, match="one interaction"):
        shuffled_spent(laplace._replace(local_unit="example"), **how)
    bits = randomized_response(1.0, num_items=99, num_reports=6, unit="user").local_dp_event(UNBOUNDED, 0)
    assert local_epsilon(bits) == pytest.approx(99, rel=1e-6)
    with pytest.raises(ValueError, match="needs a local epsilon between"):
        shuffled_spent(laplace._replace(local_releases=lambda *_: ((bits, 1),)), **how)
    for event in (GaussianDpEvent(1.0), LaplaceDpEvent(0.0), dp_accounting.NonPrivateDpEvent()):
        with pytest.raises(ValueError, match="no pure epsilon"):
            local_epsilon(event)
    assert local_epsilon(dp_accounting.ComposedDpEvent([LaplaceDpEvent(1.0), LaplaceDpEvent(2.0)])) == 3.0
