"""Risk: virtual users are handed out with a card that says too much, or something else than what was done."""

import json

import numpy as np
import pytest

from fedjax_rec.cli.main import main
from fedjax_rec.data import load, write_interactions


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    data = load("synthetic", num_users=80, num_items=60)
    return write_interactions(tmp_path_factory.mktemp("real") / "people.csv", data)


def _run(*args):
    return main(["synthesize", *map(str, args)])


def test_virtual_users_are_written_with_a_card_and_read_like_any_data(real, tmp_path, capsys):
    out = tmp_path / "made" / "virtual.parquet"
    assert (
        _run("--dataset", real, "--generator", "popularity", "--users", 30, "--out", out, "--downstream", "ease") == 0
    )
    said = capsys.readouterr().out
    assert "release  lengths" in said
    virtual = load(out, cache=False)
    assert virtual.num_users == 30
    known = load(real, cache=False)
    assert set(virtual.item_labels) <= set(known.item_labels)

    card = json.loads((out.parent / "virtual.card.json").read_text())
    assert card["privacy"]["epsilon"] <= 8
    assert {"unit", "relation", "delta", "sampler", "trust_model", "releases"} <= set(card["privacy"])
    assert card["privacy"]["releases"][0]["phase"] == "lengths"
    assert card["evaluation"]["num_virtual_users"] == 30
    ledger = json.loads((out.parent / "virtual.ledger.json").read_text())
    assert ledger["spent"]["epsilon"] == pytest.approx(card["privacy"]["epsilon"])

    public = json.loads((out.parent / "virtual.public-card.json").read_text())
    assert "evaluation" not in public
    text = json.dumps(public)
    assert known.fingerprint not in text  # it would confirm a guess of the real data
    assert known.fingerprint in json.dumps(card)
    page = (out.parent / "virtual.card.html").read_text()
    for words in ("What was released", "Utility and risk", "Co-occurrence", "Unsafe", "Keep this page"):
        assert words in page
    assert page.count("<svg") == 3


def test_noise_is_fresh_unless_a_seed_makes_it_a_rehearsal(real, tmp_path, capsys):
    options = ("--dataset", real, "--generator", "popularity", "--no-evaluate")
    for name, seed in (("a", 0), ("b", 0), ("c", None), ("d", None)):
        more = () if seed is None else ("--seed", seed)
        assert _run(*options, "--out", tmp_path / f"{name}.csv", *more) == 0
    a, b, c, d = (load(tmp_path / f"{name}.csv", cache=False).fingerprint for name in "abcd")
    assert a == b
    assert len({a, c, d}) == 3
    assert "a rehearsal, not for handing out" in capsys.readouterr().out
    page = (tmp_path / "a.card.html").read_text()
    assert "whoever guesses it can subtract the noise" in page
    assert "--no-evaluate" in page
    assert "whoever guesses it" not in (tmp_path / "c.card.html").read_text()


def test_without_privacy_it_says_so(real, tmp_path):
    options = ("--generator", "popularity", "--epsilon", "inf", "--no-evaluate")
    assert _run("--dataset", real, *options, "--out", tmp_path / "open.csv") == 0
    card = json.loads((tmp_path / "open.public-card.json").read_text())
    assert card["privacy"] is None
    assert any("nothing bounds" in use for use in card["unsafe_uses"])
    assert not (tmp_path / "open.ledger.json").exists()


def test_earlier_releases_count_until_nothing_is_left(real, tmp_path, capsys):
    options = ("--dataset", real, "--generator", "popularity", "--no-evaluate", "--delta", 1e-3)
    assert _run(*options, "--epsilon", 2, "--out", tmp_path / "one.csv") == 0
    ledger = ("--ledger", tmp_path / "one.ledger.json")
    assert _run(*options, "--epsilon", 4, "--out", tmp_path / "two.csv", *ledger) == 0
    both = json.loads((tmp_path / "two.ledger.json").read_text())
    assert len(both["entries"]) == 4
    assert both["spent"]["epsilon"] <= 4
    capsys.readouterr()
    ledger = ("--ledger", tmp_path / "two.ledger.json")
    assert _run(*options, "--epsilon", 2, "--out", tmp_path / "three.csv", *ledger) == 2
    assert "nothing released" in capsys.readouterr().err
    assert not list(tmp_path.glob("three*"))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--out", "x.txt"), "must end in .parquet or .csv"),
        (("--epsilon", "-1"), "--epsilon must be positive"),
        (("--users", "0"), "--users must be at least 1"),
        (("--downstream", "eas"), "ease, mf"),
        (("--downstream", "markov"), "have none; leave it out"),
        (("--dataset", "movielens/100"), "did you mean"),
        (("--ledger", "nowhere.json"), "nowhere.json"),
        (("--epsilon", "inf", "--ledger", "x.json"), "--ledger needs a finite"),
    ],
)
def test_what_cannot_be_done_is_a_sentence_and_leaves_no_file(real, tmp_path, monkeypatch, capsys, args, words):
    monkeypatch.chdir(tmp_path)
    given = {"--dataset": str(real), "--generator": "popularity"} | dict(zip(args[::2], args[1::2], strict=True))
    assert _run(*(part for pair in given.items() for part in pair)) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") <= 4
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_there_are_not_replaced_unasked(real, tmp_path, capsys):
    out = tmp_path / "virtual.csv"
    out.write_text("precious")
    options = ("--dataset", real, "--generator", "popularity", "--no-evaluate", "--out", out)
    assert _run(*options) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert out.read_text() == "precious"
    assert _run(*options, "--overwrite") == 0
    assert load(out, cache=False).num_users == np.unique(load(real, cache=False).user_ids).size


def test_too_few_users_to_hold_out(tmp_path, capsys):
    data = load("synthetic", num_users=20, num_items=60)
    path = write_interactions(tmp_path / "few.csv", data)
    assert _run("--dataset", path, "--generator", "popularity", "--out", tmp_path / "v.csv") == 2
    assert "add --no-evaluate" in capsys.readouterr().err
