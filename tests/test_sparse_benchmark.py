"""Risk: the benchmark of sparse noise compares unlike work, or its page says what no line says."""

import argparse
import json

import numpy as np
import pytest

import fedjax_rec as fr
from benchmarks import sparse

PLAN = sparse.Plan(dense=1.5, selected=1.6)
TINY = argparse.Namespace(
    items=60, dim=2, chosen=7, threshold=3.0, cohort_size=3, rows_per_user=4, repeats=2, round_repeats=1, span=2
)


@pytest.fixture(scope="module")
def lines():
    return sparse.server_steps(PLAN, TINY)


def test_each_mechanism_is_timed_in_turn(lines):
    assert [line["mechanism"] for line in lines] == [
        "dense",
        "select_rows",
        "adafest",
        "lazy",
        "lazy, flush of all rows",
    ]
    assert lines[0]["speedup"] == 1
    assert all(line["median_s"] > 0 and line["repeats"] == 2 for line in lines)
    order = []
    sparse.take_turns({name: lambda i, name=name: order.append((i, name)) for name in "ab"}, 2)
    assert order == [(i, name) for i in range(3) for name in "ab"]


def test_the_page_shows_the_last_line_of_each(lines, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sparse, "RESULTS", tmp_path)
    monkeypatch.setattr(sparse, "make_plan", lambda: PLAN)
    monkeypatch.setattr(sparse, "server_steps", lambda plan, args: [lines[0] | {"median_s": 7.5}])
    learned = {"users": 9, "items": 8, "rounds": 1, "chosen": 2, "seeds": 2, "mean": 0.125, "standard_error": 0.01}
    learned |= {"part": "utility", "difference": -0.5, "difference_error": 0.25}
    (tmp_path / "sparse.jsonl").write_text("".join(json.dumps(x) + "\n" for x in (*lines, lines[1] | learned)))
    assert sparse.main(["--part", "step"]) == 0
    page = (tmp_path / "sparse.md").read_text()
    assert page in capsys.readouterr().out
    assert "| 7.5 " in page
    assert "0.1250 ± 0.0100 | -0.5000 ± 0.2500" in page
    assert len((tmp_path / "sparse.jsonl").read_text().splitlines()) == len(lines) + 2
    assert "The whole round" not in page


def test_smoke_keeps_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(sparse, "RESULTS", tmp_path)
    monkeypatch.setattr(sparse, "make_plan", lambda: PLAN)
    monkeypatch.setattr(sparse, "server_steps", lambda plan, args: [])
    monkeypatch.setattr(sparse, "page", lambda lines: "")
    assert sparse.main(["--smoke", "--part", "step"]) == 0
    assert not list(tmp_path.iterdir())


def test_all_are_planned_for_one_epsilon():
    """Of the chains that run, with the noise that the published page was made with."""
    plan = sparse.make_plan()
    assert plan.selected > plan.dense
    for name, links in sparse.chains(plan, 60, np.arange(7), threshold=3.0).items():
        np.testing.assert_allclose(sparse.spent(name, links), sparse.EPSILON, rtol=0.006)
        assert isinstance(links, fr.UpdateTransform)
