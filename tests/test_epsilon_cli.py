"""Risk: a calculator that answers another question than the one asked, or answers without saying what it means."""

import json

import pytest
import tyro

from fedjax_rec.cli.epsilon import EpsilonConfig, run

POISSON = {"sampling_prob": 0.0424, "rounds": 500}


def ask(capsys, **options):
    code = run(EpsilonConfig(json=True, **options))
    return code, json.loads(capsys.readouterr().out)


def test_json_is_one_object_with_the_whole_claim(capsys):
    code, answer = ask(capsys, noise_multiplier=1.0, **POISSON)
    assert code == 0
    assert answer.pop("epsilon") == pytest.approx(6.268, rel=1e-3)
    assert answer == {
        "delta": 1e-5,
        "accountant": "PLD",
        "unit": "user",
        "relation": "add_or_remove_one",
        "noise_multiplier": 1.0,
        "sampling_prob": 0.0424,
        "sampler": "poisson",
        "rounds": 500,
        "warning": None,
    }


def test_a_target_is_solved_for_its_noise(capsys):
    _, solved = ask(capsys, target_epsilon=2.0, **POISSON)
    assert 1.99 <= solved["epsilon"] <= 2.0
    _, checked = ask(capsys, noise_multiplier=solved["noise_multiplier"], **POISSON)
    assert checked["epsilon"] == solved["epsilon"]


def test_the_cohort_size_gives_the_sampling_probability(capsys):
    _, by_size = ask(capsys, noise_multiplier=1.0, cohort_size=256, num_users=6040, rounds=500)
    assert by_size["sampling_prob"] == 256 / 6040
    assert by_size["epsilon"] == pytest.approx(6.2654, rel=1e-3)


def test_each_sampler_has_its_own_relation_and_accountant(capsys):
    _, fixed = ask(
        capsys, sampler="fixed_size", cohort_size=256, num_users=6040, noise_multiplier=4.0, rounds=500, delta=1e-5
    )
    assert (fixed["relation"], fixed["accountant"]) == ("replace_one", "RDP")
    assert fixed["epsilon"] == pytest.approx(4.952, rel=1e-3)
    _, everyone = ask(capsys, sampler="all", noise_multiplier=20**0.5, rounds=20, unit="example")
    assert (everyone["accountant"], everyone["unit"]) == ("analytic Gaussian", "example")
    assert everyone["epsilon"] == pytest.approx(4.37718, rel=1e-4)


def test_no_noise_is_infinite_in_json_and_in_words(capsys):
    _, answer = ask(capsys, noise_multiplier=0.0, **POISSON)
    assert answer["epsilon"] == "inf"
    assert run(EpsilonConfig(noise_multiplier=0.0, **POISSON)) == 0
    assert "No user-level differential privacy" in capsys.readouterr().out


def test_people_read_what_the_number_means_and_assumes(capsys):
    assert run(EpsilonConfig(noise_multiplier=1.0, **POISSON)) == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in ("epsilon", "1e-05", "user", "add_or_remove_one", "poisson", "User-level", "Assumes that", "clipped"):
        assert words in text


def test_a_delta_too_large_for_the_population_is_warned_about_beside_the_answer(capsys):
    code = run(EpsilonConfig(noise_multiplier=1.0, delta=1e-2, num_users=943, json=True, **POISSON))
    printed = capsys.readouterr()
    assert code == 0
    assert "1 / 943 users" in json.loads(printed.out)["warning"]
    assert "1 / 943 users" in printed.err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"noise_multiplier": -1.0}, "noise multiplier"),
        ({"noise_multiplier": float("nan")}, "noise multiplier"),
        ({"noise_multiplier": None, "target_epsilon": -2.0}, "target epsilon must be positive"),
        ({"target_epsilon": 2.0}, "either --noise-multiplier"),
        ({"noise_multiplier": None}, "either --noise-multiplier"),
        ({"delta": -1e-5}, "delta"),
        ({"delta": 1.0}, "delta"),
        ({"rounds": 0}, "--rounds"),
        ({"sampling_prob": 1.5}, "--sampling-prob"),
        ({"sampling_prob": 0.0}, "--sampling-prob"),
        ({"sampling_prob": None}, "needs --sampling-prob"),
        ({"sampling_prob": None, "cohort_size": 10, "num_users": 5}, "--cohort-size"),
        ({"cohort_size": 10, "num_users": 50}, "not both"),
        ({"num_users": 0}, "--num-users"),
        ({"sampler": "all"}, "--sampler all"),
        ({"sampler": "fixed_size"}, "no --sampling-prob"),
        ({"sampler": "fixed_size", "sampling_prob": None, "cohort_size": 10}, "needs --cohort-size and --num-users"),
    ],
)
def test_a_bad_question_is_a_sentence_and_exit_code_2(capsys, changes, words):
    config = EpsilonConfig(**{"noise_multiplier": 1.0} | POISSON | changes)
    assert run(config) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert words in printed.err
    assert printed.err.count("\n") == 1


def test_the_command_line_has_the_documented_flags_and_help_teaches(capsys):
    line = "--sampling-prob 0.0424 --noise-multiplier 1.0 --rounds 500 --delta 1e-5 --json"
    config = tyro.cli(EpsilonConfig, args=line.split())
    assert config == EpsilonConfig(noise_multiplier=1.0, delta=1e-5, json=True, **POISSON)
    with pytest.raises(SystemExit):
        tyro.cli(EpsilonConfig, args=["--help"])
    assert "fedjax-rec epsilon --sampling-prob 0.0424 --target-epsilon 2" in capsys.readouterr().out
