"""Risk: the study of "LDP" draws another noise than clients would, gives it an epsilon, or states a wrong one."""

import math
from functools import partial

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from experiments import harness, ldp
from experiments.harness import Options
from experiments.ldp import COLUMNS
from experiments.pfedrec import build_pfedrec
from fedjax_rec.data import load
from fedjax_rec.data.clients import client_data
from fedjax_rec.evaluation.protocol import STRICT_99
from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.transforms import UNBOUNDED, chain
from fedjax_rec.models.base import Shared
from fedjax_rec.privacy import privacy_spent

NUM_USERS, NUM_ITEMS, SCALE = 9, 60, 0.3
LAPLACE_NAMES = [ldp.laplace_row(scale).name for scale in ldp.PUBLISHED]


@pytest.fixture(scope="module")
def world():
    interactions = load("synthetic", num_users=NUM_USERS, num_items=NUM_ITEMS, min_per_user=5)
    return interactions, client_data(STRICT_99.split(interactions), num_buckets=1)


def drawn(num_clients, seed, shape=(300, 32)):
    """The noise on a sum of two tables, flat."""
    total = Shared({"a": jnp.zeros(shape), "b": jnp.zeros(shape)}, {"bias": jnp.ones(3)})
    noised, _ = ldp.laplace_on_uploads(SCALE, num_clients).server(total, (), jax.random.key(seed))
    np.testing.assert_array_equal(noised.dense["bias"], 1)  # only tables are noised
    return {name: np.asarray(table).ravel() for name, table in noised.tables.items()}


@pytest.mark.parametrize("num_clients", [1, 2, 9, 943])
def test_one_draw_is_distributed_as_the_sum_over_clients(num_clients):
    rng = np.random.default_rng(num_clients)
    by_client = sum(rng.laplace(0, SCALE, 20_000) for _ in range(num_clients))
    at_once = drawn(num_clients, seed=1)
    for noise in at_once.values():
        assert stats.ks_2samp(noise, by_client).pvalue > 1e-3
        assert noise.std() == pytest.approx(SCALE * math.sqrt(2 * num_clients), rel=0.05)
    if num_clients == 1:
        assert stats.kstest(at_once["a"], "laplace", args=(0, SCALE)).pvalue > 1e-3
    if num_clients < 9:  # a Gaussian of the same variance is told apart
        gauss = rng.normal(0, SCALE * math.sqrt(2 * num_clients), 200_000)
        assert stats.ks_2samp(at_once["a"], gauss).pvalue < 1e-3
    assert abs(np.corrcoef(at_once["a"], at_once["b"])[0, 1]) < 0.05
    assert not np.any(np.isin(at_once["a"][:1000], drawn(num_clients, seed=2)["a"][:1000]))


def test_the_round_noises_every_row_and_no_client_sees_it_before_the_next(world):
    interactions, clients = world
    algorithm, _ = build_pfedrec(interactions)
    sampler, keys = full_participation(NUM_USERS), RoundKeys(*(jax.random.key(seed) for seed in (1, 2, 3)))
    runs = []
    for transforms in (ldp.laplace(0.0, NUM_USERS, 1), ldp.laplace(SCALE, NUM_USERS, 1)):
        rounds = make_rounds(algorithm, transforms, sampler, clients, span_size=1)
        assert not rounds.private
        state, private, _ = rounds.run(*rounds.init(jax.random.key(0)), keys, 1)
        runs.append((np.asarray(state.shared.tables["item"]), jax.device_get(private), rounds.upload_bits))
    noise = (runs[1][0] - runs[0][0]).ravel()
    assert np.all(noise != 0)
    # The table's own size limits how well a difference of tables keeps small noise: compare by moments and KS.
    expected = ldp.noise_stddev(SCALE, NUM_USERS)
    assert noise.std() == pytest.approx(expected, rel=0.1)
    rng = np.random.default_rng(0)
    mean_of_clients = rng.laplace(0, SCALE, (NUM_USERS, 20_000)).mean(0)
    assert stats.ks_2samp(noise, mean_of_clients).pvalue > 1e-3
    for one, other in zip(jax.tree.leaves(runs[0][1]), jax.tree.leaves(runs[1][1]), strict=True):
        np.testing.assert_array_equal(one, other)
    assert runs[1][2] == 32 * NUM_ITEMS * 32  # a noised table is sent whole


def test_laplace_rows_have_no_event_and_no_epsilon(monkeypatch, capsys, tmp_path):
    """Through the study itself, with training replaced by what it would return."""
    chains = []

    def no_training(build, interactions, protocols, *, transforms, **options):
        chains.append(transforms)
        return {p.name: {"hit@10": 0.5, "ndcg@10": 0.25, "round": 1, "loss": 0.0} for p in protocols}

    monkeypatch.setattr(ldp, "train_and_rank", no_training)
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    rows = [row for row in ldp.STUDY.rows if row.name in LAPLACE_NAMES]
    assert len(rows) == len(ldp.PUBLISHED)
    for row in rows:
        measured = row.run(0, Options(None, smoke=True))
        assert measured["privacy"] is None
        assert len(measured["values"]) == 2 * len(COLUMNS)
    assert all(transforms.dp_event(UNBOUNDED, 0) is None for transforms in chains)
    assert len(chains) == 2 * len(rows)
    ldp.main(["--smoke"])
    shown = [line for line in capsys.readouterr().out.splitlines() if any(name in line for name in LAPLACE_NAMES)]
    assert len(shown) == 2  # the one Laplace row of a smoke run: its progress, and its line of the table
    assert not any(word in line for line in shown for word in ("ε", "epsilon"))
    assert not list(tmp_path.iterdir())
    trend = ldp.trend([{"row": n, "seed": 0, "values": dict.fromkeys(ldp.METRICS, 0.5)} for n in LAPLACE_NAMES], 943)
    assert [row[1] for row in trend.rows[1:]] == ["0.0018", "0.0036", "0.0055", "0.0073", "0.0091"]
    assert not any("ε" in str(cell) or "epsilon" in str(cell) for row in (trend.columns, *trend.rows) for cell in row)


@pytest.mark.parametrize("epsilon", [8.0, 1.0])
def test_the_stated_epsilon_is_that_of_the_real_rounds(world, epsilon):
    interactions, clients = world
    sampler = full_participation(NUM_USERS)
    transforms = ldp.private(epsilon, NUM_USERS, ldp.NUM_ROUNDS)
    rounds = make_rounds(build_pfedrec(interactions)[0], transforms, sampler, clients)
    run = dp_accounting.SelfComposedDpEvent(*rounds.releases(0, ldp.NUM_ROUNDS)[0])
    accounted = privacy_spent(run, delta=ldp.DELTA, relation=rounds.relation, unit="user")
    stated = ldp.spent(transforms, sampler, ldp.NUM_ROUNDS)
    assert stated == {
        "epsilon": accounted.epsilon,
        "delta": ldp.DELTA,
        "unit": "user",
        "relation": rounds.relation,
        "sampler": "all",
    }
    assert 0.99 * epsilon < stated["epsilon"] <= epsilon
    # A hundred Gaussians are one with a tenth of the noise multiplier (Balle and Wang, 2018).
    one = dp_accounting.GaussianDpEvent(rounds.releases(0, 1)[0][0].noise_multiplier / math.sqrt(ldp.NUM_ROUNDS))
    assert privacy_spent(one, delta=ldp.DELTA).epsilon == pytest.approx(stated["epsilon"], rel=2e-3)
    chains = {row.name: row.run.args[0] for row in ldp.STUDY.rows if isinstance(row.run.args[0], partial)}
    (name,) = (n for n, c in chains.items() if (c.func, c.args) == (ldp.private, (epsilon,)))
    assert name.endswith(f"ε = {epsilon:.2f} (user-level, add/remove one, all clients, δ = 1e-4)")


def test_clipping_alone_is_infinitely_far_from_private():
    transforms = ldp.private(None, NUM_USERS, 100)
    assert ldp.spent(transforms, full_participation(NUM_USERS), 100)["epsilon"] == "inf"
    assert ldp.spent(chain(), full_participation(NUM_USERS), 100) is None
