"""Risk: `fedjax-rec audit privacy` audits something other than what the run did, or passes a run that leaks."""

import dataclasses
import json

import pytest
from small_runs import read, write_csv

from fedjax_rec.cli import audit_privacy
from fedjax_rec.cli.main import main
from fedjax_rec.privacy.ledger import Ledger
from fedjax_rec.privacy.mechanisms import gaussian_noise
from fedjax_rec.runs import privacy_plan
from fedjax_rec.runs.config import ModelConfig, PrivacyConfig, TrainConfig, to_dict
from fedjax_rec.runs.experiment import prepare

QUICK = ("--num-canaries", "240", "--num-rounds", "2")


@pytest.fixture(autouse=True)
def quickly_compiled(monkeypatch):
    monkeypatch.setattr("fedjax_rec.federated.round._compiler_options", lambda: {"xla_backend_optimization_level": 0})
    monkeypatch.setattr("fedjax_rec.privacy.audit.NUM_CROWD_RUNS", 0)
    monkeypatch.delenv("FEDJAX_REC_TRACEBACK", raising=False)


@pytest.fixture
def config(tmp_path):
    return TrainConfig(
        dataset=str(write_csv(tmp_path / "small.csv")),
        rounds=6,
        privacy=PrivacyConfig(noise_multiplier=3.0),
        model=ModelConfig(dim=4),
        delta=1e-4,
    )


@pytest.fixture
def folder(tmp_path, config):
    """The files that a finished run leaves, of the kind that an audit reads."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.json").write_text(json.dumps(to_dict(config)), encoding="utf-8")
    experiment = prepare(config)
    experiment.rounds.charge(Ledger(relation="add_or_remove_one"), first_round=0, num_rounds=6).save(
        out / "ledger.json"
    )
    return out


def test_a_right_run_passes_and_the_verdict_is_kept(folder, capsys):
    assert main(["audit", "privacy", str(folder), *QUICK]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "2 of 6 rounds, user-level, add/remove one, all clients, δ = 1e-5" in out
    for words in ("huge norm", "not a number", "claimed", "No bug seen: 240 canary clients in 2 rounds"):
        assert words in out
    kept = read(folder, "audit.json")
    assert kept["passed"] is True
    assert kept["claimed_epsilon"] == pytest.approx(1.8664, rel=1e-3)  # two Gaussians of 3, at delta 1e-5
    assert 0 <= kept["lower_bound"] <= kept["claimed_epsilon"]
    assert {"lower_bound_fdp", "num_canaries", "confidence", "delta", "sampler", "relation", "unit"} <= set(kept)


def test_a_run_whose_noise_is_missing_fails(folder, capsys, monkeypatch):
    def without(stddev):
        return gaussian_noise(stddev)._replace(server=lambda total, state, key: (total, state))

    monkeypatch.setattr(privacy_plan, "gaussian_noise", without)
    assert main(["audit", "privacy", str(folder), *QUICK, "--seeds", "2", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["passed"] is False
    assert answer["sentence"].startswith("A bug: ")
    assert len(answer["audits"]) == 2
    assert answer["confidence"] == pytest.approx(0.95)
    assert read(folder, "audit.json") == answer


def test_a_ledger_of_other_rounds_is_a_bug(folder, config, capsys):
    other = dataclasses.replace(config, privacy=PrivacyConfig(noise_multiplier=4.0))
    (folder / "config.json").write_text(json.dumps(to_dict(other)), encoding="utf-8")
    assert main(["audit", "privacy", str(folder), *QUICK]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "charges rounds of Gaussian(3)" in out
    assert "makes rounds of Gaussian(4)" in out


@pytest.mark.parametrize(
    "settings",
    [
        {"privacy": PrivacyConfig(noise_multiplier=3.0, mechanism="skellam", clip="per_table")},
        {"privacy": PrivacyConfig(noise_multiplier=3.0, mechanism="banded"), "sampler": "in_turn", "num_groups": 2},
    ],
    ids=["skellam, per table", "banded, in turn"],
)
def test_a_configuration_before_its_run(tmp_path, config, capsys, settings):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_dict(dataclasses.replace(config, **settings))), encoding="utf-8")
    assert main(["audit", "privacy", str(path), "--num-canaries", "240", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["passed"] is True
    assert answer["claimed_epsilon"] <= audit_privacy.VISIBLE_EPSILON  # as many rounds as canaries can see
    assert not (tmp_path / "audit.json").exists()


def test_what_cannot_be_audited_is_one_sentence(tmp_path, config, folder, capsys):
    def refusal(*args):
        assert main(["audit", "privacy", *args]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "There is no run and no configuration at" in refusal(str(tmp_path / "none"))
    assert "--num-canaries must be a positive number; got 0" in refusal(str(folder), "--num-canaries", "0")
    assert "at least 100 canaries" in refusal(str(folder), "--num-canaries", "5")
    (folder / "ledger.json").unlink()
    assert "has no ledger.json" in refusal(str(folder))
    public = dataclasses.replace(config, privacy=PrivacyConfig(), delta=None)
    (folder / "config.json").write_text(json.dumps(to_dict(public)), encoding="utf-8")
    assert "trains without privacy, so it claims nothing" in refusal(str(folder))


def test_help_shows_a_command_to_copy(capsys):
    for args in (["audit", "privacy", "--help"], ["audit", "--help"]):
        with pytest.raises(SystemExit) as stopped:
            main(args)
        assert stopped.value.code == 0
        assert "fedjax-rec audit privacy runs/mine" in " ".join(capsys.readouterr().out.split())
