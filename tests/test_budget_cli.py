"""Risk: the budget command shows another plan than the one in the file, or a traceback for a typing error."""

import json

import pytest

from fedjax_rec.cli.budget import BudgetConfig, run
from fedjax_rec.cli.main import main
from fedjax_rec.privacy.budget import solve
from fedjax_rec.privacy.plan_files import EXAMPLE, from_toml

SMALL = """\
epsilon = 3.0
delta = 1e-5
num_users = 1000

[[phase]]
name = "popularity"
weight = 4.0
num_numbers = 100

[[phase]]
name = "training"
rounds = 30
ratio = 2.0
sensitivity = 0.5
num_numbers = 400

[[phase]]
name = "evaluation"
rounds = 3
noise_multiplier = 20.0
"""


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(SMALL, encoding="utf-8")
    return path


def test_json_is_the_solved_plan(capsys, plan):
    assert main(["budget", str(plan), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    solved = solve(from_toml(plan))
    assert answer["epsilon"] == solved.spent.epsilon <= answer["target_epsilon"] == 3.0
    assert (answer["delta"], answer["unit"], answer["relation"]) == (1e-5, "user", "add_or_remove_one")
    training = answer["phases"][1]
    assert training["last_noise_multiplier"] == solved.scale == answer["scale"]
    assert training["first_noise_multiplier"] == pytest.approx(2 ** (19 / 20) * solved.scale)
    assert training["last_stddev"] == pytest.approx(0.5 * solved.scale)
    assert training["last_snr"] == pytest.approx(1000 / (solved.scale * 20))
    assert training["epsilon_alone"] < training["epsilon_after"] < answer["epsilon"]


def test_people_read_each_phase_and_what_the_number_assumes(capsys, plan, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    figure = tmp_path / "plan.svg"
    assert main(["budget", str(plan), "--plot", str(figure)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in ("popularity", "30 x gaussian", "(given)", "epsilon alone", "of 3 at delta 1e-05", "User-level"):
        assert words in text
    for words in ("Assumes that", "add up to", f"Wrote {figure}"):
        assert words in text
    svg = figure.read_text(encoding="utf-8")
    for words in ("noise multiplier", "ε spent, jointly", "popularity", "training", "evaluation", "budget 3.00"):
        assert words in svg


def test_the_example_is_printed_and_nothing_else(capsys):
    assert main(["budget", "--example"]) == 0
    assert capsys.readouterr().out == EXAMPLE


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("rounds = 30", "rounds = -1", "line 12: rounds of phase 'training'"),
        ("noise_multiplier = 20.0", "noise_multiplier = 0.3", "No noise reaches epsilon 3"),
        ("epsilon = 3.0", "epsilon = 'x'", "line 1: epsilon of the plan"),
    ],
)
def test_a_bad_plan_is_a_sentence_and_exit_code_2(capsys, plan, old, new, words):
    plan.write_text(SMALL.replace(old, new), encoding="utf-8")
    assert main(["budget", str(plan)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert words in printed.err
    assert printed.err.count("\n") == 1


def test_no_plan_and_no_file_say_where_to_get_one(capsys, tmp_path):
    assert run(BudgetConfig()) == 2
    assert run(BudgetConfig(plan=tmp_path / "none.toml")) == 2
    assert capsys.readouterr().err.count("budget --example > plan.toml") == 2


def test_a_delta_too_large_for_the_population_is_warned_about(capsys, plan):
    plan.write_text(SMALL.replace("delta = 1e-5", "delta = 1e-2"), encoding="utf-8")
    assert main(["budget", str(plan), "--json"]) == 0
    assert "1 / 1000 users" in capsys.readouterr().err
