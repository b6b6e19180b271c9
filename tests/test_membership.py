"""Risk: an attack without power is taken for privacy, or one that passes the ceiling goes unnoticed."""

import json
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from evaluation_worlds import interactions
from scipy.stats import norm
from small_runs import write_csv
from test_report import made_up_run, plain, report_of

from fedjax_rec.algorithms.fedavg import fedsgd
from fedjax_rec.attacks.membership import (
    attack,
    attack_run,
    ceiling_for,
    summary,
    verdict,
)
from fedjax_rec.attacks.roc import (
    epsilon_delta_ceiling,
    excess,
    gaussian_ceiling,
    gaussian_dp_ceiling,
    gaussian_dp_mu,
    guarantee_ceiling,
    roc,
)
from fedjax_rec.attacks.scores import ATTACKS, Evidence
from fedjax_rec.attacks.shadow_models import keep_rows, only_train, toss_coins, train_models
from fedjax_rec.attacks.signals import factor_scores, measured
from fedjax_rec.data.clients import client_data
from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.round import make_rounds
from fedjax_rec.federated.transforms import chain
from fedjax_rec.models.base import Shared
from fedjax_rec.models.matrix_factorization import matrix_factorization
from fedjax_rec.privacy.formulas import membership_auc_ceiling
from fedjax_rec.reporting.statements import audit_line
from fedjax_rec.runs.config import PrivacyConfig, TrainConfig, to_dict

PRIVACY = {"epsilon": 2.0, "delta": 1e-4, "relation": "add_or_remove_one", "gaussian": True}


def world(signal, *, num_models=24, num_candidates=400, seed=0) -> Evidence:
    """Evidence of fair coins; ``signal(members, rng, difficulty)`` says what is measured."""
    rng = np.random.default_rng(seed)
    members = rng.random((num_models, num_candidates)) < 0.5
    difficulty = rng.normal(0, 3, num_candidates)[None, :]
    signals = signal(members, rng, difficulty)
    population = signal(np.zeros((num_models, 200), bool), rng, difficulty[:, :200])
    return Evidence(signals, members, np.ones_like(members), population, np.ones_like(population, bool))


def gaussian_world(mu, **size):
    """A Gaussian mechanism: membership moves the signal by mu standard deviations, and candidates differ by more."""
    return world(lambda members, rng, difficulty: difficulty + members + rng.normal(0, 1 / mu, members.shape), **size)


# Worlds with a known answer.


def test_a_memorising_model_gives_everything_away():
    curves = attack(world(lambda members, rng, _: members * 10.0 - 5 + rng.normal(0, 0.1, members.shape)))
    assert all(curve.auc > 0.98 for curve in curves.values()), {name: curve.auc for name, curve in curves.items()}
    assert curves["LiRA online"].tpr_at(0.001) > 0.98


def test_a_constant_model_gives_nothing_away():
    curves = attack(world(lambda members, rng, _: np.zeros(members.shape)))
    assert {name: curve.auc for name, curve in curves.items()} == dict.fromkeys(ATTACKS, 0.5)


def test_noise_gives_nothing_away():
    """What shadows know of a candidate must not tell the target's coin: it would, were the coins balanced."""
    for seed in range(3):
        curves = attack(world(lambda members, rng, d: d + rng.normal(size=members.shape), num_models=8, seed=seed))
        for name, curve in curves.items():
            assert abs(curve.auc - 0.5) < 4 * curve.auc_error, (name, curve.auc)


@pytest.mark.parametrize("mu", [0.5, 1.5])
def test_the_likelihood_ratio_reaches_the_ceiling_and_does_not_pass_it(mu):
    curves = attack(gaussian_world(mu, num_models=100))
    ceiling = gaussian_ceiling(mu)
    for name in ("LiRA online", "LiRA offline"):  # short of it by what the fits do not know
        assert ceiling.auc - 0.02 < curves[name].auc < ceiling.auc + 2 * curves[name].auc_error
        assert 0.75 * ceiling.tpr(0.01) < curves[name].tpr_at(0.01) < 1.1 * ceiling.tpr(0.01)
    assert curves["loss"].auc < ceiling.auc - 0.05  # without shadows, candidates' own differences hide it
    assert not any(excess(curve, ceiling) for curve in curves.values())
    claimed = {**PRIVACY, "epsilon": 2.0}
    strong = {"user": attack(gaussian_world(gaussian_dp_mu(2.0, delta=1e-4), num_models=40))}
    assert verdict(strong, claimed).startswith("Every attack stays below")


def test_a_run_with_half_its_noise_is_reported():
    mu = gaussian_dp_mu(2.0, delta=1e-4)
    curves = {"user": attack(gaussian_world(2 * mu, num_models=16))}
    sentence = verdict(curves, PRIVACY)
    assert sentence.startswith("BUG: an attack passes the ceiling")
    assert "LiRA online: AUC" in sentence
    assert summary({**curves, "interaction": curves["user"]}, PRIVACY)["bug"]
    assert verdict(curves, None).startswith("No guarantee")


# Curves and ceilings.


def test_areas_and_their_errors():
    rng = np.random.default_rng(0)
    scores, members = rng.integers(0, 6, 60).astype(float), rng.random(60) < 0.5
    inside, outside = scores[members][:, None], scores[~members][None, :]
    curve = roc([scores], [members])
    assert curve.auc == pytest.approx(np.mean((inside > outside) + 0.5 * (inside == outside)))
    assert np.trapezoid(curve.tpr, curve.fpr) == pytest.approx(curve.auc)
    draws = []
    for _ in range(400):
        members = rng.random(300) < 0.5
        draws.append(roc([rng.normal(size=300) + members], [members]))
    assert np.std([c.auc for c in draws]) == pytest.approx(np.mean([c.auc_error for c in draws]), rel=0.15)
    assert np.mean([c.auc for c in draws]) == pytest.approx(norm.cdf(1 / math.sqrt(2)), abs=0.005)
    with pytest.raises(ValueError, match="NaN"):
        roc([np.full(4, np.nan)], [np.array([True, True, False, False])])


def test_ceilings():
    assert gaussian_ceiling(gaussian_dp_mu(2.0, delta=5e-4)).auc == pytest.approx(0.677, abs=1e-3)
    assert gaussian_ceiling(gaussian_dp_mu(8.0, delta=1e-4)).auc == pytest.approx(0.904, abs=1e-3)
    grid = np.linspace(0, 1, 20_001)
    for epsilon in (0.5, 2.0, 8.0):
        mu = gaussian_dp_mu(epsilon, delta=1e-4)
        exact = gaussian_ceiling(mu)
        assert exact.auc == pytest.approx(membership_auc_ceiling(epsilon, delta=1e-4))
        assert np.trapezoid(gaussian_dp_ceiling(grid, mu), grid) == pytest.approx(exact.auc, abs=1e-4)
        # What (epsilon, delta) alone leaves is more, everywhere.
        assert np.all(epsilon_delta_ceiling(grid, epsilon, delta=1e-4) >= gaussian_dp_ceiling(grid, mu) - 1e-9)
        assert guarantee_ceiling(epsilon, delta=1e-4).auc > exact.auc


def test_an_interaction_is_two_steps_under_add_or_remove():
    user, pair = (ceiling_for(PRIVACY, level) for level in ("user", "interaction"))
    mu = gaussian_dp_mu(2.0, delta=1e-4)
    assert user.auc == pytest.approx(norm.cdf(mu / math.sqrt(2)))
    assert pair.auc == pytest.approx(norm.cdf(2 * mu / math.sqrt(2)))
    assert ceiling_for({**PRIVACY, "relation": "replace_one"}, "interaction").auc == pytest.approx(user.auc)
    assert ceiling_for({**PRIVACY, "gaussian": False}, "user").auc == guarantee_ceiling(2.0, delta=1e-4).auc


# Shadow models.

NUM_USERS, NUM_ITEMS = 24, 12


@pytest.fixture(scope="module")
def train():
    rng = np.random.default_rng(3)
    return interactions([rng.permutation(NUM_ITEMS)[:6].tolist() for _ in range(NUM_USERS)], num_items=NUM_ITEMS)


def test_coins(train):
    design = toss_coins(train, num_models=200, seed=0)
    present = design.users[:, train.user_ids]
    assert not design.users[:, design.reserved_users].any()
    assert not design.rows[:, design.reserved].any()
    assert np.array_equal(design.rows[:, design.core], present[:, design.core])
    assert np.mean(design.users[:, ~design.reserved_users]) == pytest.approx(0.5, abs=0.03)
    where = present & design.tossed & ~design.reserved_users[train.user_ids]
    assert np.mean(design.rows[where]) == pytest.approx(0.5, abs=0.03)
    with pytest.raises(ValueError, match="at least 4 models"):
        toss_coins(train, num_models=3, seed=0)


def test_left_out_rows_leave_nothing_behind(train):
    rng = np.random.default_rng(0)
    keep = rng.random(train.num_interactions) < 0.6
    keep[train.user_ids == 5] = False
    clients = client_data(only_train(train), num_buckets=1)
    shortened = jax.jit(partial(keep_rows, offsets=train.offsets))(clients.buckets, jnp.asarray(keep))
    for bucket in jax.device_get(shortened):
        for row, user in enumerate(np.asarray(bucket.client_id)):
            wanted = train.item_ids[keep & (train.user_ids == user)]
            num = int(bucket.length[row])
            assert num == bucket.num_excluded[row] == len(wanted)
            assert np.array_equal(bucket.item_ids[row, :num], wanted)
            assert np.array_equal(bucket.excluded[row, :num], np.sort(wanted))
            rest = (bucket.item_ids[row, num:], bucket.excluded[row, num:])
            assert all(np.all(part == NUM_ITEMS) for part in rest)
            assert not bucket.labels[row, num:].any()


@pytest.fixture(scope="module")
def trained(train):
    """Four models of one round, one after another and two at a time; nobody is in the last."""
    clients = client_data(only_train(train), num_buckets=1)
    model = matrix_factorization(NUM_ITEMS, dim=2)
    algorithm = fedsgd(model, server_optimizer=optax.sgd(1.0))
    rounds = make_rounds(algorithm, chain(), full_participation(NUM_USERS), clients, span_size=1, chunk_size=8)
    design = toss_coins(train, num_models=4, seed=1)
    design.rows[3] = False

    def run(**more):
        return train_models(
            rounds,
            clients,
            train,
            design,
            measure=lambda shared, start: shared.tables["item"] - start,
            record=jnp.zeros(()),
            num_rounds=(1, 3),
            span_size=1,
            key=jax.random.key(0),
            **more,
        )

    return rounds, run(at_once=1), run(at_once=2)


def test_models_train_alike_alone_and_side_by_side(trained):
    _, alone, together = trained
    assert set(alone) == {1, 3}
    for reached in alone:
        np.testing.assert_allclose(alone[reached], together[reached], atol=1e-6)
    assert np.abs(alone[1][0] - alone[1][1]).max() > 0.01  # each on its own coins and keys


def test_who_is_out_adds_nothing(trained):
    _, alone, _ = trained
    assert np.array_equal(alone[1][3], alone[3][3])  # nobody in: the table stays where it was
    assert np.abs(alone[1][0] - alone[3][0]).max() > 1e-4


# Signals.


def test_a_score_without_the_item_is_that_of_a_fit_without_it():
    rng = np.random.default_rng(0)
    items = jnp.asarray(rng.normal(size=(40, 3)), jnp.float32)
    record = np.arange(40) < 12
    fit = jax.jit(lambda items, record, num_negatives: factor_scores(
        Shared({"item": items, "bias": jnp.zeros((len(items), 1))}, {}), record, l2=1.0, num_negatives=num_negatives
    ))  # fmt: skip

    def own_score(item, scores, others):
        """The score of the vector that gave items outside the record their scores."""
        return float(items[item] @ np.linalg.lstsq(np.asarray(items)[others], scores[others], rcond=None)[0])

    with_all = np.asarray(fit(items, record[None], 4.0))[0]
    for item in range(4):
        moved = np.roll(np.arange(40), -item)[1:]  # without the item, which is then nowhere
        rest = np.asarray(fit(items[moved], record[None, moved], 4.0 * 12 / 11))[0]
        scores = np.zeros(40)
        scores[moved] = rest
        exact = own_score(item, scores, np.arange(12, 40))
        plain = own_score(item, with_all, np.arange(12, 40))
        assert abs(with_all[item] - exact) < 0.25 * abs(plain - exact)


def test_the_signal_is_a_logit():
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5)), jnp.float32)
    core = jnp.asarray([[True, True, False, False, False]])
    found = measured(scores, core, jnp.zeros(5, int), jnp.arange(5))
    odds = np.exp(np.asarray(scores[0], np.float64))
    outside = odds[2:].sum()
    rest = np.where(np.arange(5) < 2, outside, outside - odds)
    np.testing.assert_allclose(found.rows, np.log(odds / rest), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.users, np.log(odds / rest)[:2].mean(), rtol=1e-4)


# The attack on a run, and what its report says.


def test_a_run_is_attacked_and_its_report_says_so(tmp_path):
    dataset = write_csv(tmp_path / "small.csv")
    config = TrainConfig(
        dataset=str(dataset), rounds=2, eval_every=2, epsilon=2.0, delta=1e-3, privacy=PrivacyConfig(l2_clip_norm=0.1)
    )
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    found = attack_run(tmp_path, num_shadows=3)
    assert found == json.loads((tmp_path / "membership.json").read_text())
    assert found["num_models"] == 4
    assert found["rounds"] == 2
    assert found["privacy"]["gaussian"]
    assert found["privacy"]["epsilon"] == pytest.approx(2.0, rel=0.01)
    assert found["auc_ceiling"] == pytest.approx(membership_auc_ceiling(2.0, delta=1e-3), abs=2e-3)
    assert not found["bug"]
    assert set(found["levels"]) == {"user", "interaction"}


def test_every_private_report_says_whether_it_was_audited(tmp_path):
    files = made_up_run()
    assert f"not audited: run fedjax-rec audit privacy {tmp_path}" in plain(report_of(tmp_path, files))
    files["audit.json"] = {"lower_bound": 1.25, "num_canaries": 1000, "confidence": 0.95}
    files["membership.json"] = {"auc": 0.6, "attack": "LiRA online", "auc_ceiling": 0.9, "bug": False}
    words = plain(report_of(tmp_path, files))
    assert "audited ε ≥ 1.25 (1,000 canaries, confidence 95%); membership AUC .6000 (LiRA online" in words
    assert "not audited" not in plain(report_of(tmp_path / "open", made_up_run(private=False)))


def test_the_line_of_a_report():
    statement = {"epsilon": 2.0, "delta": 1e-4, "unit": "user", "relation": "add_or_remove_one", "sampler": "all"}
    audit = {"claimed_epsilon": 1.5, "lower_bound": 1.2, "lower_bound_fdp": 0.9, "passed": True, "num_rounds": 64}
    audit |= {"run_rounds": 200, "num_canaries": 5000, "confidence": 0.95}
    attacked = {"auc": 0.53, "attack": "LiRA online", "auc_ceiling": 0.658, "bug": False}
    assert audit_line(statement, audit={}, membership={}) == "not audited: run fedjax-rec audit privacy RUN"
    line = audit_line(statement, audit=audit, membership=attacked)
    assert line.startswith("claimed ε = 2")
    assert "audited ε ≥ 0.9 (64 of 200 rounds, for which 1.50 is claimed, 5,000 canaries, confidence 95%)" in line
    assert "membership AUC .5300 (LiRA online, ceiling .6580)" in line
    assert "\n" not in line
    assert "ABOVE" not in line
    failed = audit_line(statement, audit={**audit, "passed": False, "lower_bound_fdp": "inf"}, membership={})
    assert "audited ε ≥ ∞" in failed
    assert "ABOVE the claim" in failed
    assert "ABOVE the claim" in audit_line(statement, audit={"claimed_epsilon": 1.5, "lower_bound": 1.6}, membership={})
    assert "ABOVE what the claim" in audit_line(statement, audit={}, membership={**attacked, "bug": True})
