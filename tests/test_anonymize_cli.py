"""Risk: a release is half-written, lies over another, or has its key beside it; a bad request ends in a traceback."""

import dataclasses
import json
import stat

import numpy as np
import pytest
import tyro

from fedjax_rec.anonymization.policy import EXAMPLE, parse_policy
from fedjax_rec.anonymization.pseudonyms import load_key, pseudonyms
from fedjax_rec.cli import anonymize as cli
from fedjax_rec.cli.anonymize import AnonymizeConfig, beside, run
from fedjax_rec.cli.main import main
from fedjax_rec.data import load, synthetic, write_interactions

POLICY = """\
[times]
to = "month"
[microaggregation]
k = 4
[pseudonyms]
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A small data set as a file with attributes."""
    data = synthetic(num_users=120, num_items=60, num_interactions=2400, min_per_user=12, ratings=True, seed=2)
    age = np.random.default_rng(0).integers(18, 70, 120)
    path = tmp_path_factory.mktemp("data") / "small.parquet"
    return str(write_interactions(path, dataclasses.replace(data, user_attributes={"age": age})))


@pytest.fixture
def settings(tmp_path, dataset):
    policy = tmp_path / "policy.toml"
    policy.write_text(POLICY, encoding="utf-8")
    (tmp_path / "keys").mkdir()
    return {"policy": policy, "dataset": dataset, "out": tmp_path / "release", "targets": 60, "downstream": False}


def test_the_release_is_read_back_and_the_key_links_it(tmp_path, settings, capsys):
    key_file = tmp_path / "keys" / "release.key"
    settings |= {"downstream": True, "known": 6}
    assert run(AnonymizeConfig(**settings, key_file=key_file)) == 0
    said = capsys.readouterr().out
    assert "unique by 12 items" in said
    assert str(key_file) in said
    files = sorted(path.name for path in settings["out"].iterdir())
    assert files == ["interactions.parquet", "risk.html", "risk.json"]
    original, released = load(settings["dataset"]), load(settings["out"] / "interactions.parquet")
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    linked = pseudonyms(original.user_labels, load_key(key_file))
    assert set(released.user_labels) == set(linked)
    report = json.loads((settings["out"] / "risk.json").read_text())
    assert report["steps"][-1] == {"step": "pseudonyms", "users": 120}
    assert report["report"]["after"]["reidentification"]["items, ratings, dates"]["top1"] <= 0.25 + 0.1
    assert report["report"]["downstream"]["ratio"] > 0
    assert report["seeded"] is False
    page = (settings["out"] / "risk.html").read_text()
    assert page.count("<svg") == 2
    assert "Keep the page; hand out the data" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    secret = load_key(key_file).hex()
    assert all(secret not in path.read_bytes().decode("latin-1") for path in settings["out"].iterdir())


def test_csv_without_measures(tmp_path, settings, capsys):
    policy = tmp_path / "plain.toml"
    policy.write_text("[times]\nto = 'day'\n", encoding="utf-8")
    out = tmp_path / "new" / "release.csv"
    settings |= {"policy": policy, "out": out, "evaluate": False}
    assert run(AnonymizeConfig(**settings)) == 0
    assert "own labels" in capsys.readouterr().out  # nobody may think that these were pseudonyms
    assert sorted(path.name for path in out.parent.iterdir()) == ["release.csv", "release.risk.json"]
    released = load(out)
    assert np.all(released.timestamps % 86_400 == 0)
    assert released.num_users == 120


def test_print_policy(capsys):
    assert run(AnonymizeConfig(print_policy=True)) == 0
    printed = capsys.readouterr().out
    assert printed == EXAMPLE
    assert parse_policy(printed).items.k == 5


def test_flags():
    parsed = tyro.cli(AnonymizeConfig, args=["--policy", "p.toml", "--out", "x.csv", "--no-evaluate", "--seed", "3"])
    assert (str(parsed.policy), str(parsed.out), parsed.evaluate, parsed.seed) == ("p.toml", "x.csv", False, 3)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"policy": None}, ValueError, "--policy is needed; --print-policy"),
        ({"out": None}, ValueError, "--out is needed"),
        ({"policy": "missing.toml"}, OSError, "missing.toml"),
        ({"text": "[items]\nkk = 3"}, ValueError, "policy.toml: .* did you mean 'k'"),
        ({"text": "[items]\nk = 500"}, ValueError, "500 is more than the 120 users"),
        (
            {"text": "[attributes]\nk = 2\n[attributes.hierarchies]\nages = 'suppression'"},
            ValueError,
            "names 'ages', which .* did you mean 'age'",
        ),
        ({"out": "release.txt"}, ValueError, r"must end in \.parquet or \.csv"),
        ({"targets": 0}, ValueError, "--targets and --known"),
        ({"key_file": "release/key"}, ValueError, "beside the release"),
        ({"key_file": "release/deeper/key"}, ValueError, "beside the release"),
        ({"key_file": "key", "out": "release.csv"}, ValueError, "beside the release"),
        ({"key_file": "nowhere/key"}, FileNotFoundError, "no folder"),
        ({"key_file": "keys/old.key"}, FileExistsError, "key of another release"),
        ({"key_file": "keys/new.key", "text": "[times]\nto = 'none'"}, ValueError, r"no section \[pseudonyms\]"),
        ({"known": 100}, ValueError, "has 100 items; ask for fewer"),
    ],
)
def test_requests_that_cannot_be_met_leave_nothing(tmp_path, settings, monkeypatch, change, error, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "keys" / "old.key").write_text("old", encoding="utf-8")
    if "text" in change:
        settings["policy"].write_text(change["text"], encoding="utf-8")
    changed = {key: value for key, value in change.items() if key != "text"}
    paths = {key: tmp_path / value for key, value in changed.items() if isinstance(value, str)}
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(error, match=sentence):
        run(AnonymizeConfig(**(settings | changed | paths)))
    assert sorted(path for path in tmp_path.rglob("*")) == before
    assert (tmp_path / "keys" / "old.key").read_text() == "old"


def test_the_command_ends_with_a_sentence_and_code_2(settings, capsys):
    flags = ["--policy", str(settings["policy"]), "--dataset", settings["dataset"], "--out", str(settings["out"])]
    assert main(["anonymize", *flags, "--no-evaluate", "--seed", "1"]) == 0
    assert json.loads((settings["out"] / "risk.json").read_text())["seeded"] is True
    assert "A rehearsal, not for handing out" in capsys.readouterr().out
    assert main(["anonymize", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fedjax-rec: ")
    assert error.count("\n") == 1
    assert "not an empty folder; choose another --out" in error


@pytest.mark.parametrize("name", ["interactions.parquet", "risk.json", "other"])
def test_what_is_there_is_not_written_over(settings, name):
    settings["out"].mkdir()
    (settings["out"] / name).write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError, match="choose another --out"):
        run(AnonymizeConfig(**settings))
    assert [(path.name, path.read_text()) for path in settings["out"].iterdir()] == [(name, "mine")]


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_failure_at_any_move_leaves_nothing(tmp_path, settings, monkeypatch, step):
    """The disk is full, or the user interrupts, while the files are put in their places."""
    key_file, moves, move = tmp_path / "keys" / "key", [], cli.os.replace

    def failing(source, target):
        if ".unfinished" in str(source) and str(target) in {str(path) for path in beside(settings["out"]).values()}:
            moves.append(target)
            if len(moves) > step:
                raise KeyboardInterrupt
        move(source, target)

    monkeypatch.setattr(cli.os, "replace", failing)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(KeyboardInterrupt):
        run(AnonymizeConfig(**settings, key_file=key_file))
    assert len(moves) == step + 1
    assert sorted(tmp_path.rglob("*")) == before
