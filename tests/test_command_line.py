"""Bad input ends in exit code 2 and one sentence with the way out, before anything is trained or left behind."""

import gzip
import json
import subprocess
import sys

import pytest
from small_runs import csv_lines, flags, share_compilations, write_csv

from fedjax_rec.cli.main import main

HEADER = "user,item,rating,timestamp"


@pytest.fixture(autouse=True)
def here(tmp_path, tmp_path_factory, monkeypatch):
    """An empty working directory: what a refused run leaves would be seen in it."""
    share_compilations(tmp_path_factory.getbasetemp() / "compiled")
    monkeypatch.delenv("FEDJAX_REC_DATA", raising=False)
    monkeypatch.delenv("FEDJAX_REC_TRACEBACK", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def dataset(here):
    return write_csv(here / "small.csv")


def refusal(capsys, *args: str) -> str:
    assert main(args) == 2
    error = capsys.readouterr().err
    assert error.startswith("fedjax-rec: ")
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--epsilon", "-1"), "--epsilon must be a positive number; got -1"),
        (("--rounds", "0"), "--rounds must be a positive number; got 0"),
        (("--delta", "1e-5"), "add --epsilon"),
        (("--cohort-size", "100"), "more than the population of 60 clients; choose a smaller one, or leave it out"),
        (("--cohort-size", "100", "--sampler", "fixed_size"), "more than the population of 60 clients"),
        (("--epsilon", "0.5", "--privacy.noise-multiplier", "0.5"), "nothing released. Add noise, take fewer rounds"),
        (("--data.use-ratings",), "add --model.loss squared"),
        (("--data.split", "ratio"), "ratio with 10"),
    ],
)
def test_a_request_that_cannot_be_met(dataset, here, capsys, more, words):
    assert words in refusal(capsys, *flags(dataset, here / "run", *more))
    assert not (here / "run").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("few.csv", [HEADER, *(f"u{u},i{(u + j) % 8},5,{j}" for u in range(30) for j in range(4))], "has 8 items"),
        ("single.csv", [HEADER, *(f"u{u},i{u % 30},5,1" for u in range(60))], "leave_one_out needs users with 3"),
        ("header.csv", [HEADER], "has a header and no line below it"),
    ],
)
def test_data_that_cannot_be_evaluated(here, capsys, name, content, words):
    assert words in refusal(capsys, *flags(write_csv(here / name, content), here / "run"))
    assert not (here / "run").exists()


def test_too_few_items_name_the_cut_off(here, capsys):
    lines = [HEADER, *(f"u{u},i{(u + j) % 8},5,{j}" for u in range(30) for j in range(4))]
    assert "the largest cut-off, 20" in refusal(capsys, *flags(write_csv(here / "few.csv", lines), here / "run"))


def test_files_that_are_missing_empty_or_cut_off(here, capsys):
    (here / "empty.csv").write_text("")
    whole = gzip.compress("\n".join(csv_lines()).encode())
    (here / "cut.csv.gz").write_bytes(whole[: len(whole) // 2])
    for name, words in (
        ("none.csv", "no file"),
        ("empty.csv", "is empty"),
        ("cut.csv.gz", "truncated or damaged gzip"),
    ):
        assert words in refusal(capsys, *flags(here / name, here / "run"))
        assert not (here / "run").exists()


def test_an_unknown_data_set_suggests_the_nearest_and_leaves_no_folder(here, capsys):
    assert "did you mean 'movielens/100k'" in refusal(capsys, "train", "--dataset", "movielens/100")
    assert list(here.iterdir()) == []


def test_an_unknown_flag_suggests_the_nearest(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--epsilonn", "3"])
    assert stopped.value.code == 2
    assert "--epsilon " in capsys.readouterr().err.replace("--epsilonn", "")


def test_a_run_directory_that_is_not_empty(dataset, here, capsys):
    (here / "run").mkdir()
    (here / "run" / "mine.txt").write_text("keep me")
    assert "is not empty. Choose another --out" in refusal(capsys, *flags(dataset, here / "run"))
    assert [path.name for path in (here / "run").iterdir()] == ["mine.txt"]


def test_no_run_to_resume(here, capsys):
    assert "There is no run to resume" in refusal(capsys, "train", "--resume", "--out", "nothing")
    assert "--resume needs --out" in refusal(capsys, "train", "--resume")
    assert "There is no configuration" in refusal(capsys, "train", "--config", "nothing.json")
    assert "There is no run directory" in refusal(capsys, "evaluate", "nothing")


def test_a_large_delta_is_a_warning_that_says_why(dataset, here, capsys):
    private = ("--epsilon", "8", "--delta", "0.5", "--no-non-private-row")
    assert main(flags(dataset, here / "run", *private)) == 0
    assert "is not below 1 / 60 users" in capsys.readouterr().out


def test_unknown_ratings_and_many_negatives_are_counted(here, capsys):
    lines = list(csv_lines())
    user, item, _, timestamp = lines[5].split(",")
    lines[5] = f"{user},{item},nan,{timestamp}"
    args = flags(write_csv(here / "nan.csv", lines), here / "run", "--client.num-negatives", "100")
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "1 rows with unusable ratings dropped" in out
    assert "60 of 60 clients want more negatives" in out


def test_a_run_that_diverges_keeps_its_checkpoint(dataset, here, capsys):
    error = refusal(capsys, *flags(dataset, here / "run", "--server.lr", "1e38"))
    assert "Training diverged" in error
    assert "Lower --server.lr" in error
    assert list((here / "run" / "checkpoint" / "last").iterdir())


@pytest.mark.parametrize("verb", ["train", "evaluate", "epsilon", "data"])
def test_help_shows_a_command_to_copy(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    assert f"fedjax-rec {verb} " in capsys.readouterr().out


def test_json_is_one_object_and_nothing_else(dataset, capsys):
    assert main(["data", str(dataset), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_users"] == 60
    line = "epsilon --sampling-prob 0.0424 --noise-multiplier 1.0 --rounds 500 --delta 1e-5 --json"
    assert main(line.split()) == 0
    assert {"epsilon", "delta", "accountant", "unit", "relation"} <= set(json.loads(capsys.readouterr().out))


def test_the_console_script_says_one_sentence():
    command = "from fedjax_rec.cli.main import entry; entry()"
    done = subprocess.run(
        [sys.executable, "-c", command, "train", "--epsilon", "-1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
