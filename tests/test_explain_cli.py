"""Risk: `fedjax-rec explain` explains another user, item or run than asked for, or says nothing when it cannot."""

import dataclasses
import json
import os

import jax
import numpy as np
import pytest
from small_runs import csv_lines, share_compilations, write_csv

from fedjax_rec.cli import explain as cli
from fedjax_rec.cli.evaluate import load_trained
from fedjax_rec.cli.main import main
from fedjax_rec.data.interactions import from_rows
from fedjax_rec.runs import checkpoint, directory
from fedjax_rec.runs.config import ModelConfig, TrainConfig, to_dict
from fedjax_rec.runs.experiment import prepare

HEADER, *ROWS = csv_lines()


@pytest.fixture(scope="module", autouse=True)
def quickly_compiled():
    """Nearly all the time of this file is compilation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, quickly_compiled):
    """The files that a run leaves, with parameters that nobody trained: what is explained is a re-fit to its items."""
    base = tmp_path_factory.mktemp("explained")
    share_compilations(base / "compiled")
    dataset = str(write_csv(base / "small.csv"))
    config = TrainConfig(dataset=dataset, model=ModelConfig(dim=4, init_stddev=0.5), out=base / "run")
    experiment = prepare(config)
    state, private = experiment.rounds.init(jax.random.key(3))
    progress = {"round": 6, "seconds": 1.0, "clients": 60.0, "best_round": 6, "best": 0.1}
    saved = checkpoint.Checkpoint(
        state, private, experiment.keys, None, progress, to_dict(config), experiment.split.fingerprint
    )
    checkpoint.save(base / "run" / directory.BEST, saved)
    directory.write_json(base / "run" / directory.CONFIG, to_dict(config))
    directory.write_json(base / "run" / directory.RESULT, {})
    return base / "run"


@pytest.fixture(autouse=True)
def sentences_not_tracebacks(monkeypatch):
    monkeypatch.delenv("FEDJAX_REC_TRACEBACK", raising=False)


def refusal(capsys, *args: str) -> str:
    assert main(["explain", *args]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fedjax-rec: ")
    assert "Traceback" not in error
    return error


def test_text_page_picture_and_a_link_in_the_report(folder, capsys):
    assert main(["explain", str(folder), "--user", "u7", "--top", "2"]) == 0
    out = capsys.readouterr().out
    history = {row.split(",")[1] for row in ROWS if row.startswith("u7,")}
    assert out.count(" is recommended because of ") == 2
    named = {
        word for word in out.replace(";", " ").replace(",", " ").split() if word.startswith("i") and word[1:].isdigit()
    }
    assert len(named & history) > 1
    page = (folder / "explain_u7.html").read_text(encoding="utf-8")
    for words in (
        "Why user u7 is recommended this",
        "No epsilon covers the page",
        "<svg",
        "commit",
        "place without it",
    ):
        assert words in page
    assert (folder / "explain_u7.svg").read_text(encoding="utf-8").startswith("<?xml")
    assert os.path.getsize(folder / "explain_u7.svg") < 200_000
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert '<a href="explain_u7.html">user u7</a>' in report
    assert not history & set(report.replace("<", " ").split()), "the report would hand out a history"


def test_what_is_printed_as_json_adds_up(folder, capsys):
    assert main(["explain", str(folder), "--user", "u7", "--json", "--top", "1", "--method", "removal"]) == 0
    answer = json.loads(capsys.readouterr().out)
    (found,) = answer["explanations"]
    met = {row.split(",")[1] for row in ROWS if row.startswith("u7,")}
    assert len(found["history"]) == 6  # of eight, two are held out
    assert set(found["history"]) < met
    assert found["place"] == 1
    assert found["item"] not in found["history"]
    assert len(found["values"]) == len(found["places_without"]) == len(found["history"])
    assert found["remainder"] == pytest.approx(found["total"] - sum(found["values"]), abs=1e-5)
    assert "fits its vector anew" in answer["notes"][0]


def test_an_item_that_is_asked_for(folder, capsys):
    assert main(["explain", str(folder), "--user", "u7", "--json", "--top", "3"]) == 0
    third = json.loads(capsys.readouterr().out)["explanations"][2]
    assert main(["explain", str(folder), "--user", "u7", "--json", "--item", third["item"]]) == 0
    (alone,) = json.loads(capsys.readouterr().out)["explanations"]
    assert (alone["place"], alone["sentences"]) == (3, third["sentences"])
    history = third["history"][0]
    assert f"has already met {history}, so it is not recommended" in refusal(
        capsys, str(folder), "--user", "u7", "--item", history
    )


def test_what_is_not_there_gets_the_nearest(folder, capsys):
    assert "There is no user 'u77' among the 60 of " in refusal(capsys, str(folder), "--user", "u77")
    assert "did you mean 'u7'?" in refusal(capsys, str(folder), "--user", "u77")
    assert "did you mean 'i39'?" in refusal(capsys, str(folder), "--user", "u7", "--item", "i399")
    assert "There is no run directory nothing" in refusal(capsys, "nothing", "--user", "u7")
    assert "--top and --list-length are numbers from 1 on" in refusal(capsys, str(folder), "--user", "u7", "--top", "0")


def test_a_user_without_a_history(folder, capsys, monkeypatch):
    experiment, found = load_trained(folder, data_dir=None, checkpoint="auto")
    train = experiment.split.train
    empty = train.take(train.user_ids != 7)
    bare = dataclasses.replace(experiment, split=dataclasses.replace(experiment.split, train=empty))
    monkeypatch.setattr("fedjax_rec.cli.evaluate.load_trained", lambda run, **options: (bare, found))
    label = str(train.user_labels[7])
    said = refusal(capsys, str(folder), "--user", label)
    assert f"User {label} has no interactions in the part of the data that the run trained on" in said
    assert not (folder / f"explain_{label}.html").exists()


def test_items_are_found_by_title_and_named_by_it():
    data = from_rows([1, 1, 2], [10, 20, 30], name="films")
    data = dataclasses.replace(data, item_titles=np.array(["Heat (1995)", "Alien (1979)", ""]))
    assert [cli.find_item(data, text) for text in ("20", "heat (1995)")] == [1, 0]
    with pytest.raises(ValueError, match="did you mean 'Alien \\(1979\\)'"):
        cli.find_item(data, "Aliens")
    assert [cli.named(data, item) for item in range(3)] == ["Heat (1995)", "Alien (1979)", "item 30"]
    with pytest.raises(ValueError, match="no user '3' among the 2 of films, from 1 to 2"):
        cli.find_user(data, "3")


def test_file_names_stay_in_the_folder_and_apart():
    names = {label: cli.file_stem(label) for label in ("u7", "../u7", "a b", "a/b")}
    assert names["u7"] == "explain_u7"
    assert len(set(names.values())) == 4
    assert not any("/" in name or " " in name for name in names.values())
