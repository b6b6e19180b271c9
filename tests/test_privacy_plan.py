"""Risk: a run clips, adds noise or charges otherwise than its settings say, or forgets half of it when it is killed."""

import dataclasses
import itertools
import math

import dp_accounting
import jax
import numpy as np
import pytest
from small_runs import share_compilations, write_csv

from fedjax_rec.federated.cohort import full_participation, in_turn, poisson
from fedjax_rec.federated.releases import releases
from fedjax_rec.federated.transforms import UNBOUNDED
from fedjax_rec.privacy import privacy_spent
from fedjax_rec.privacy.ledger import BudgetExceeded
from fedjax_rec.runs import directory
from fedjax_rec.runs.config import ModelConfig, PrivacyConfig, TrainConfig, UploadConfig
from fedjax_rec.runs.config_checks import check
from fedjax_rec.runs.experiment import prepare
from fedjax_rec.runs.privacy_plan import plan_privacy, private_chain, run_event, with_colluders
from fedjax_rec.runs.training import train

NUM_CLIENTS, SIZE, ROUNDS = 400, 2_000, 40
EVERYONE = full_participation(NUM_CLIENTS)
TURNS = in_turn(NUM_CLIENTS, num_groups=4)


def config(**privacy) -> TrainConfig:
    return TrainConfig(rounds=ROUNDS, epsilon=4.0, delta=1e-4, privacy=PrivacyConfig(**privacy))


def plan(settings: TrainConfig, sampler=EVERYONE):
    return plan_privacy(settings, sampler, num_clients=NUM_CLIENTS, update_size=SIZE)


@pytest.mark.parametrize(
    ("settings", "sampler"),
    [
        ({}, EVERYONE),
        ({}, poisson(NUM_CLIENTS, cohort_size=50)),
        ({"mechanism": "laplace"}, EVERYONE),
        ({"mechanism": "discrete_gaussian"}, EVERYONE),
        ({"mechanism": "skellam"}, EVERYONE),
        ({"mechanism": "banded"}, TURNS),
        ({"mechanism": "tree"}, in_turn(NUM_CLIENTS, num_groups=4, sampling_prob=0.5)),
        ({"clip": "adaptive"}, EVERYONE),
        ({"clip": "per_table"}, EVERYONE),
        ({"schedule_ratio": 2.0}, poisson(NUM_CLIENTS, cohort_size=50)),
    ],
    ids=lambda value: value.name if hasattr(value, "name") else str(value),
)
def test_the_noise_spends_the_budget_and_no_more(settings, sampler):
    """The event of the chain that the run is given, accounted again from nothing, meets the target from below."""
    made = plan(config(**settings), sampler)
    spent = privacy_spent(
        run_event(made.ledger, made.transforms, sampler, ROUNDS), delta=1e-4, relation=sampler.relation
    )
    assert 0.98 * 4 < spent.epsilon <= 4
    assert made.num_rounds == ROUNDS


@pytest.mark.parametrize(
    ("privacy", "upload"),
    [
        ({}, {"sum": "ring"}),
        ({}, {"sum": "simulated", "rotation": True}),
        ({"clip": "adaptive"}, {"sum": "simulated"}),
        ({"mechanism": "skellam_shares"}, {"sum": "simulated"}),
        ({"mechanism": "discrete_gaussian_shares"}, {"sum": "simulated", "bits": 14}),
        ({}, {"compression": "drive"}),
        ({}, {"compression": "rand_k", "sum": "simulated"}),
        ({}, {"compression": "count_sketch"}),
        ({"clip": "adaptive"}, {"compression": "drive"}),
        ({"clip": "per_table"}, {"compression": "low_rank", "sum": "simulated"}),
    ],
    ids=str,
)
def test_the_noise_is_on_what_clients_send(privacy, upload):
    """Whatever is sent and however it is added up, noise and budget are those of the largest upload there can be."""
    settings = dataclasses.replace(config(**privacy), upload=UploadConfig(**upload))
    sampler = full_participation(NUM_CLIENTS, relation="replace_one") if settings.privacy.in_shares else EVERYONE
    made = plan_privacy(settings, sampler, num_clients=NUM_CLIENTS, update_size=SIZE, num_items=50)
    event = run_event(made.ledger, made.transforms, sampler, ROUNDS)
    spent = privacy_spent(event, delta=1e-4, relation=sampler.relation)
    assert 0.98 * 4 < spent.epsilon <= 4
    assert made.ledger.trust_model == ("secure_sum" if settings.privacy.in_shares else "central")
    if settings.privacy.in_shares:
        colluding, more = with_colluders(settings, made, sampler)
        assert (colluding, more > 1.02 * spent.epsilon) == (36, True)


def event_of(settings, noise=2.0, sampler=EVERYONE, round_index=0):
    chain = private_chain(config(**settings), noise, sampler=sampler, update_size=SIZE)
    return chain.dp_event(UNBOUNDED, round_index)


def test_the_noise_multiplier_is_over_the_bound_of_every_clip():
    for clip in ("joint", "per_table", "adaptive"):
        assert event_of({"clip": clip}).noise_multiplier == pytest.approx(2.0)
    assert event_of({"mechanism": "laplace"}) == dp_accounting.LaplaceDpEvent(2.0)
    assert event_of({"mechanism": "discrete_gaussian"}).rho == pytest.approx(1 / 8)
    for mechanism in ("banded", "tree"):
        assert event_of({"mechanism": mechanism}, sampler=TURNS).noise_multiplier == pytest.approx(2.0)


def test_a_schedule_starts_above_and_ends_at_the_noise_multiplier():
    events = [event_of({"schedule_ratio": 3.0}, round_index=t).noise_multiplier for t in range(ROUNDS)]
    assert events[-1] == pytest.approx(2.0)
    assert 5.0 < events[0] <= 6.0
    assert all(a >= b for a, b in itertools.pairwise(events))


def test_given_noise_stops_where_the_budget_ends_also_where_rounds_differ():
    for settings in ({}, {"schedule_ratio": 2.0}):
        made = plan(config(noise_multiplier=2.5, **settings))
        within, beyond = (
            privacy_spent(run_event(made.ledger, made.transforms, EVERYONE, n), delta=1e-4).epsilon
            for n in (made.num_rounds, made.num_rounds + 1)
        )
        assert 0 < made.num_rounds < ROUNDS
        assert within <= 4.0 < beyond
    with pytest.raises(BudgetExceeded, match="nothing released"):
        plan(config(noise_multiplier=0.1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"privacy": {"mechanism": "banded"}}, "--sampler in_turn"),
        ({"privacy": {"mechanism": "skellam"}, "cohort_size": 10}, "leave out --cohort-size"),
        ({"privacy": {"mechanism": "laplace", "schedule_ratio": 2.0}}, "--privacy.schedule-ratio"),
        ({"privacy": {"mechanism": "laplace", "clip": "adaptive"}}, "L1 norms"),
        ({"privacy": {"clip": "adaptive", "target_quantile": 1.5}}, "target-quantile"),
        ({"sampler": "in_turn"}, "--num-groups go together"),
        ({"num_groups": 3}, "--num-groups go together"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_together_say_so(changes, words):
    settings = changes.pop("privacy", {})
    with pytest.raises(ValueError, match=words):
        check(dataclasses.replace(config(**settings), **changes))


def test_pairs_without_a_bound_are_refused_before_anything_is_solved_for():
    with pytest.raises(ValueError, match="Sampling has a bound around one Gaussian"):
        plan(config(mechanism="skellam"), poisson(NUM_CLIENTS, cohort_size=50))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    share_compilations(tmp_path_factory.getbasetemp() / "compiled")
    return write_csv(tmp_path_factory.mktemp("data") / "small.csv")


@pytest.mark.parametrize(
    "settings",
    [
        {"privacy": PrivacyConfig(clip="adaptive")},
        {"privacy": PrivacyConfig(schedule_ratio=3.0)},
        {"privacy": PrivacyConfig(mechanism="banded"), "sampler": "in_turn", "num_groups": 2},
        {
            "privacy": PrivacyConfig(mechanism="skellam_shares"),
            "upload": UploadConfig(sum="simulated", dropout_prob=0.02, planned_dropout=0.3),
        },
    ],
    ids=["adaptive clip", "schedule", "banded", "noise in shares"],
)
def test_a_killed_run_goes_on_with_its_clip_norm_its_schedule_and_its_past_noise(dataset, settings, tmp_path):
    """Stopped after the second of three spans and prepared anew: states and ledger are those of the whole run."""
    small = TrainConfig(dataset=str(dataset), rounds=6, eval_every=2, epsilon=8.0, model=ModelConfig(dim=4), **settings)
    whole = train(prepare(small), folder=tmp_path / "whole")

    class Killed(BaseException):
        pass

    def kill(record):
        if record["round"] == 4:
            raise Killed

    with pytest.raises(Killed):
        train(prepare(small), folder=tmp_path / "killed", report=kill)
    resumed = train(prepare(small), folder=tmp_path / "killed")
    for a, b in zip(jax.tree.leaves(whole.state), jax.tree.leaves(resumed.state), strict=True):
        np.testing.assert_array_equal(a, b)
    assert resumed.ledger == whole.ledger
    assert (tmp_path / "whole" / directory.LEDGER).read_text() == (tmp_path / "killed" / directory.LEDGER).read_text()


def test_a_turn_is_charged_once():
    made = plan(config(mechanism="tree"), TURNS)
    charged = releases(made.transforms, TURNS, 0, ROUNDS)
    assert sum(count for _, count in charged) == ROUNDS / 4
    assert charged[0][0].noise_multiplier == pytest.approx(made.noise_multiplier)
    assert math.isfinite(made.noise_multiplier)
