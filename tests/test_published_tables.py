"""Risk: a table compares what was measured by different rules, claims what it did not reach, or loses a run."""

import dataclasses
import json

import pytest
from evaluation_worlds import make_split

from experiments import __main__ as command
from experiments import harness
from experiments.harness import Published, Row, Study, check_comparable, make_table, newest
from fedjax_rec.data import leave_one_out, load
from fedjax_rec.evaluation.protocol import PFEDREC_PAPER, PRESETS, STRICT_99, Protocol


def runs(*values, protocol="p", commit="c"):
    def run(seed, options):
        del options
        return {"values": {"hit": values[seed % len(values)]}, "protocols": {"hit": protocol}}

    return run


def study(*rows):
    return Study("demo", "Demo", "About.", rows, ("hit",))


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    return tmp_path


def test_runs_are_kept_and_the_page_is_made_of_them(results, capsys):
    demo = study(
        Row("ours", runs(0.70, 0.72), {"hit": Published(70.5, 1.0)}),
        Row("other", runs(0.5), {"hit": Published(50.0, None, "unverified")}),
    )
    assert harness.main(demo, ["--seeds", "2", "--row", "ours"]) == 0
    assert harness.main(demo, ["--row", "other"]) == 0
    lines = [json.loads(line) for line in (results / "demo.jsonl").read_text().splitlines()]
    assert [(line["row"], line["seed"]) for line in lines] == [("ours", 0), ("ours", 1), ("other", 0)]
    assert all(line["stamp"]["versions"]["jax"] for line in lines)
    page = (results / "demo.md").read_text()
    assert "71.00 ± 1.41" in page
    assert "50.00 (unverified)" in page
    assert "Status: 1 of 1 rows with a tolerance are reproduced." in page
    assert r"\begin" in (results / "demo.tex").read_text()
    capsys.readouterr()
    assert harness.main(demo, ["--only-page"]) == 0
    assert page.split("Written")[0] in capsys.readouterr().out


def test_a_row_that_leaves_its_tolerance_fails_unless_it_is_explained(results, capsys):
    row = Row("ours", runs(0.60), {"hit": Published(70.0, 2.0)})
    assert harness.main(study(row), []) == 1
    assert "not reproduced: hit is -10.00" in capsys.readouterr().out
    assert harness.main(study(dataclasses.replace(row, note="Another split.")), ["--only-page"]) == 0
    assert "ours: Another split." in capsys.readouterr().out


def test_a_row_that_was_not_run_is_no_row_and_nan_reproduces_nothing():
    demo = study(Row("ours", runs(0.7), {"hit": Published(70.0, 1.0)}), Row("absent", runs(0.1)))
    line = {"row": "ours", "seed": 0, "values": {"hit": float("nan")}, "protocols": {"hit": "p"}, "seconds": 1.0}
    table, statuses = make_table(demo, [line])
    assert list(statuses) == ["ours"]
    assert statuses["ours"].startswith("not reproduced")
    assert len(table.rows) == 1


def test_only_equal_protocols_share_a_column():
    demo = study(Row("a", runs(0.7)), Row("b", runs(0.7)))
    lines = [
        {"row": row, "seed": 0, "values": {"hit": 0.7}, "protocols": {"hit": protocol}, "seconds": 1.0}
        for row, protocol in (("a", "strict"), ("b", "paper"))
    ]
    with pytest.raises(ValueError, match="hit of 'a' and of 'b' were measured by different protocols"):
        check_comparable(demo, lines)
    check_comparable(demo, lines[:1])


def test_the_newest_protocol_and_the_last_run_of_a_seed_count():
    lines = [
        {"row": "a", "seed": seed, "protocols": {"hit": protocol}, "values": {"hit": value}}
        for seed, protocol, value in [(0, "old", 0.1), (0, "new", 0.2), (1, "new", 0.3), (0, "new", 0.4)]
    ]
    assert sorted(line["values"]["hit"] for line in newest(lines, "a")) == [0.3, 0.4]


def test_a_wrong_name_is_a_sentence(capsys):
    assert command.main(["--list"]) == 0
    names = capsys.readouterr().out.split()
    assert {"pfedrec", "tie_rules"} <= set(names)
    assert "harness" not in names
    assert command.main(["pfedrek"]) == 2
    assert "Did you mean pfedrec?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["pfedrec", "--row", "PFedRek"])
    assert "there is no row 'PFedRek'; the rows are popularity" in capsys.readouterr().err
    assert command.main(["pfedrec", "--data-dir", "nowhere", "--row", "popularity"]) == 2
    assert "data_dir nowhere does not exist" in capsys.readouterr().err


def test_every_rule_of_a_protocol_is_in_its_fingerprint():
    split = leave_one_out(load("synthetic", num_users=20, num_items=60))
    changes = {
        "tie_rule": "hash",
        "split_seed": 1,
        "exclusion": "strict",
        "num_negatives": None,
        "draw": "one draw",
        "ks": (5,),
        "ties": "expected",
        "selection": "last round",
        "scored": "server",
    }
    assert {*changes, "name"} == {field.name for field in dataclasses.fields(Protocol)}
    others = [dataclasses.replace(PFEDREC_PAPER, **{key: value}).fingerprint(split) for key, value in changes.items()]
    assert len({PFEDREC_PAPER.fingerprint(split), *others}) == len(changes) + 1
    assert dataclasses.replace(PFEDREC_PAPER, name="x").fingerprint(split) == PFEDREC_PAPER.fingerprint(split)
    other_split = make_split([[0], [1]], [[1], [0]], num_items=2)
    assert PFEDREC_PAPER.fingerprint(other_split) != PFEDREC_PAPER.fingerprint(split)


def test_presets_say_what_they_are():
    assert STRICT_99.exclusion == "strict"
    assert {name: preset.name for name, preset in PRESETS.items()} == {name: name for name in PRESETS}
    assert "held-out items too, 99 negatives in expectation" in PFEDREC_PAPER.describe()
    for field, value in {"tie_rule": "oldest", "exclusion": "all", "ties": "lucky", "selection": "any"}.items():
        with pytest.raises(ValueError, match=f"{field} must be one of"):
            Protocol("x", **{field: value})
