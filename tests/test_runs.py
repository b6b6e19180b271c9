"""What a run leaves: the promised files, honest privacy numbers, and the same numbers from the same seed."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_runs import NUM_ITEMS, NUM_USERS, flags, metrics, read, result, share_compilations, write_csv

from fedjax_rec.cli.main import main
from fedjax_rec.privacy.ledger import Ledger
from fedjax_rec.runs import directory
from fedjax_rec.runs.config import load

PRIVATE = ("--epsilon", "8", "--cohort-size", "20")
QUICK = "--no-non-private-row"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    share_compilations(tmp_path_factory.getbasetemp() / "compiled")
    return write_csv(tmp_path_factory.mktemp("data") / "small.csv")


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    """Trains in a fresh directory and returns it."""

    def train(*more: str, data: Path = dataset) -> Path:
        folder = tmp_path_factory.mktemp("runs") / "run"
        assert main(flags(data, folder, *more)) == 0
        return folder

    return train


@pytest.fixture(scope="module")
def private(run) -> Path:
    return run(*PRIVATE)


@pytest.fixture(scope="module")
def plain(run) -> Path:
    return run("--cohort-size", "20")


def test_a_run_directory_holds_what_is_promised(private, plain):
    for folder, private_run in ((private, True), (plain, False)):
        names = {path.name for path in folder.iterdir()}
        expected = {"config.json", "metrics.jsonl", "result.json", "report.html", "checkpoint"}
        assert names == expected | ({"ledger.json"} if private_run else set())
        assert {path.name for path in (folder / "checkpoint").iterdir()} == (
            {"last"} if private_run else {"last", "best"}
        )
        assert load(folder).out == folder
        assert "<html" in (folder / "report.html").read_text(encoding="utf-8")


def test_every_logged_round_is_one_object(private, plain):
    for folder, private_run in ((private, True), (plain, False)):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["round"] for row in rows] == [2, 4, 6]
        for row in rows:
            assert {"round", "seconds", "loss", "rounds_per_s", "epsilon", "validation", "cohort_size"} <= set(row)
            assert (row["epsilon"] is not None) == private_run
            assert 0 <= row["validation"]["ndcg@10"] <= 1
            assert row["loss"] > 0
        seconds = [row["seconds"] for row in rows]
        assert seconds == sorted(seconds)


def test_the_result_has_metrics_baselines_and_a_stamp(private, plain):
    for folder in (private, plain):
        values = read(folder)
        for metric in ("ndcg@10", "hit@10", "recall@20", "auc", "coverage@10"):
            assert 0 <= values["test"][metric] <= 1
            assert 0 <= values["baselines"]["popularity"][metric] <= 1
        assert values["seconds"] >= read_last(folder)["seconds"]
        assert values["stamp"]["seed"] == 0
        assert len(values["stamp"]["data_fingerprint"]) == 64
        assert values["stamp"]["split_fingerprint"] == values["split"]["fingerprint"]
        assert values["dataset"]["num_users"] == NUM_USERS
        assert values["dataset"]["num_items"] == NUM_ITEMS
        assert values["rounds"] == 6
        low, high = values["interval"]["ndcg@10"]
        assert low <= values["test"]["ndcg@10"] <= high
    assert read(plain)["privacy"] is None
    assert set(read(plain)["baselines"]) == {"popularity"}
    assert set(read(private)["baselines"]) == {"popularity", "dp_popularity", "non_private"}


def read_last(folder: Path) -> dict:
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


def test_the_epsilon_is_within_its_budget_and_stands_with_all_that_it_means(private):
    privacy = read(private)["privacy"]
    assert 7.9 < privacy["epsilon"] <= 8
    assert privacy["delta"] < 1 / NUM_USERS
    assert privacy["budget"] == 8
    assert privacy["sampling_prob"] == pytest.approx(20 / NUM_USERS)
    words = {"unit": "user", "relation": "add_or_remove_one", "sampler": "poisson", "trust_model": "central"}
    assert words.items() <= privacy.items()
    assert privacy["accountant"]
    assert privacy["noise_multiplier"] > 0
    assert privacy["l2_clip_norm"] == load(private).privacy.l2_clip_norm
    assert privacy["rounds"] == 6


def test_epsilon_rises_to_what_the_ledger_says_was_spent(private):
    epsilons = [row["epsilon"] for row in metrics(private)]
    assert all(later > earlier for earlier, later in itertools.pairwise(epsilons))
    spent = read(private, directory.LEDGER)["spent"]
    privacy = read(private)["privacy"]
    assert {name: privacy[name] for name in spent} == spent
    assert epsilons[-1] == pytest.approx(privacy["epsilon"], rel=1e-3)
    assert epsilons[-1] <= 8
    ledger = Ledger.load(private / directory.LEDGER)
    assert [(entry.phase, entry.count) for entry in ledger.entries] == [("training", 6)]
    assert ledger.spent(privacy["delta"]).epsilon == privacy["epsilon"]


def test_the_released_popularity_says_what_it_cost(private):
    privacy = read(private)["baselines"]["dp_popularity"]["privacy"]
    assert 7.9 < privacy["epsilon"] <= 8
    assert privacy["delta"] == read(private)["privacy"]["delta"]
    assert (privacy["unit"], privacy["relation"], privacy["sampler"]) == ("user", "add_or_remove_one", "all")


def test_the_row_without_privacy_is_a_run_without_privacy(private, plain):
    """Also a check that the best round, kept in memory there and in a checkpoint here, is the same model."""
    assert read(private)["baselines"]["non_private"] == read(plain)["test"]


def test_the_same_seed_gives_the_same_numbers(private, run):
    again = run(*PRIVATE)
    assert metrics(again) == metrics(private)
    assert result(again) == result(private)
    assert (again / directory.LEDGER).read_text() == (private / directory.LEDGER).read_text()


def test_a_saved_configuration_repeats_its_run(private, tmp_path):
    assert main(["train", "--config", str(private / "config.json"), "--out", str(tmp_path / "a")]) == 0
    assert metrics(tmp_path / "a") == metrics(private)
    assert result(tmp_path / "a") == result(private)


def test_another_seed_gives_other_numbers(private, tmp_path):
    args = ["train", "--config", str(private), "--seed", "1", QUICK, "--out", str(tmp_path / "a")]
    assert main(args) == 0
    assert metrics(tmp_path / "a") != metrics(private)
    assert read(tmp_path / "a")["split"] == read(private)["split"], "the seed of training must not move the split"


@pytest.mark.parametrize("folder", ["private", "plain"])
@pytest.mark.parametrize("part", ["test", "validation"])
def test_evaluating_a_saved_run_gives_the_numbers_of_its_result(request, folder, part, capsys):
    folder = request.getfixturevalue(folder)
    assert main(["evaluate", str(folder), "--part", part, "--ks", "5", "10", "20", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer == read(folder, f"evaluation-{part}.json")
    assert answer["round"] == read(folder)["tested_round"]
    if part == "test":
        assert answer["metrics"] == read(folder)["test"]
    else:
        logged = next(row for row in metrics(folder) if row["round"] == answer["round"])
        assert answer["metrics"] == logged["validation"]


def test_the_best_round_is_the_one_with_the_best_validation(plain):
    logged = {row["round"]: row["validation"]["ndcg@10"] for row in metrics(plain)}
    assert read(plain)["best_round"] == read(plain)["tested_round"] == max(logged, key=logged.get)


def test_under_privacy_the_last_round_is_tested(private):
    assert read(private)["best_round"] is None
    assert read(private)["tested_round"] == 6


# Other kinds of runs


def test_a_fixed_size_cohort_is_accounted_for_replacement(run):
    folder = run("--epsilon", "8", "--cohort-size", "20", "--sampler", "fixed_size", QUICK)
    privacy = read(folder)["privacy"]
    assert (privacy["sampler"], privacy["relation"]) == ("fixed_size", "replace_one")
    assert privacy["epsilon"] <= 8
    assert {row["cohort_size"] for row in metrics(folder)} == {20}
    assert read(folder)["baselines"]["dp_popularity"]["privacy"]["relation"] == "add_or_remove_one"


def test_without_a_cohort_size_everyone_takes_part(run):
    folder = run("--epsilon", "8", QUICK)
    privacy = read(folder)["privacy"]
    assert (privacy["sampler"], privacy["sampling_prob"]) == ("all", 1)
    assert {row["cohort_size"] for row in metrics(folder)} == {NUM_USERS}


def test_cohorts_of_one_client_are_often_empty(run):
    folder = run("--epsilon", "8", "--cohort-size", "1", "--eval-every", "1", QUICK)
    empty = [row for row in metrics(folder) if row["cohort_size"] == 0]
    assert empty, "with six cohorts of one client in expectation, choose a seed where one is empty"
    assert all(row["loss"] is None for row in empty)
    assert read(folder)["privacy"]["epsilon"] <= 8


def test_a_very_small_epsilon_is_all_noise(run):
    privacy = read(run("--epsilon", "0.01", QUICK))["privacy"]
    assert 0.0099 < privacy["epsilon"] <= 0.01
    assert privacy["noise_multiplier"] > 30


def test_given_noise_stops_at_the_budget(run):
    folder = run("--epsilon", "8", "--privacy.noise-multiplier", "1", "--rounds", "40", "--eval-every", "2", QUICK)
    values = read(folder)
    rounds = values["rounds"]
    assert 1 <= rounds < 40
    assert values["privacy"]["epsilon"] <= 8
    assert metrics(folder)[-1]["round"] == rounds
    assert any(f"allows {rounds} of 40 rounds" in warning for warning in values["warnings"])
    ledger = Ledger.load(folder / directory.LEDGER)
    event = ledger.entries[0].event
    more = ledger.record(event, phase="training", released="one more", sampler="all")
    assert more.spent(values["privacy"]["delta"]).epsilon > 8


def test_given_noise_without_a_budget_reports_what_it_costs(run):
    folder = run("--privacy.noise-multiplier", "2", QUICK)
    privacy = read(folder)["privacy"]
    assert privacy["budget"] is None
    assert 0 < privacy["epsilon"] < math.inf
    assert set(read(folder)["baselines"]) == {"popularity"}


def test_popular_negatives_are_charged(run):
    folder = run(*PRIVATE, "--client.negative-distribution", "popularity", QUICK)
    ledger = Ledger.load(folder / directory.LEDGER)
    assert [(entry.phase, entry.count) for entry in ledger.entries] == [("popularity", 1), ("training", 6)]
    assert 7.9 < read(folder)["privacy"]["epsilon"] <= 8
    assert metrics(folder)[-1]["epsilon"] <= 8


def test_a_private_sequence_model_runs_and_is_evaluated_and_explained(dataset, tmp_path, capsys):
    sasrec = ("--model.kind", "sasrec", "--model.num-blocks", "1", "--model.max-length", "5", *PRIVATE, QUICK)
    whole = tmp_path / "whole"
    assert main(flags(dataset, whole, *sasrec)) == 0
    assert "SASRec" in read(whole)["algorithm"]
    capsys.readouterr()
    assert main(["evaluate", str(whole), "--ks", "10", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["metrics"]["ndcg@10"] == pytest.approx(read(whole)["test"]["ndcg@10"], abs=1e-6)
    assert main(["explain", str(whole), "--user", "u1", "--top", "1"]) == 0
    assert "is recommended because of" in capsys.readouterr().out
    assert {"explain_u1.html", "explain_u1.svg"} <= {path.name for path in whole.iterdir()}


def test_ratings_with_the_squared_loss(run, capsys):
    rated = ("--data.use-ratings", "--model.loss", "squared", "--model.label-mean", "3")
    folder = run(*rated, "--rounds", "40", "--eval-every", "20")
    values = read(folder)
    # Ratings are uniform on 1..5: guessing 3 has rmse sqrt(2) and mae 1.2, and nothing can be learned.
    assert 1.2 < values["test"]["rmse"] < 1.8
    assert 0.9 < values["test"]["mae"] < values["test"]["rmse"]
    assert not any("negatives" in warning for warning in values["warnings"])
    capsys.readouterr()
    assert main(["evaluate", str(folder), "--json", "--ks", "5", "10", "20"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == values["test"]


def test_a_row_without_privacy_that_diverges_costs_only_itself(run, capsys):
    folder = run(
        "--epsilon", "8", "--server.optimizer", "sgd", "--server.lr", "1e12", "--privacy.l2-clip-norm", "1e-12"
    )
    values = read(folder)
    assert set(values["baselines"]) == {"popularity", "dp_popularity"}
    assert np.isfinite(list(values["test"].values())).all()
    assert "without privacy diverged" in values["warnings"][-1]
    assert "without privacy diverged" in capsys.readouterr().out


def test_users_with_one_interaction_are_counted_and_trained_on(run, dataset, tmp_path):
    more = write_csv(
        tmp_path / "mixed.csv", [*dataset.read_text().splitlines(), *(f"s{u},i{u},5,1" for u in range(10))]
    )
    values = read(run(data=more))
    assert values["dataset"]["num_users"] == NUM_USERS + 10
    assert any("10 users with fewer than 3 interactions kept in train" in warning for warning in values["warnings"])


def test_a_single_user_can_be_trained_on_even_privately(run, tmp_path):
    alone = write_csv(tmp_path / "alone.csv", ["user,item", *(f"u,i{item}" for item in range(25))])
    privacy = read(run("--epsilon", "8", QUICK, data=alone))["privacy"]
    assert privacy["delta"] == 0.1
    assert privacy["epsilon"] <= 8


def test_more_devices_change_nothing(private, dataset, tmp_path):
    """Another process: the number of devices is fixed when JAX starts. 60 clients on 7 devices leave padding."""
    folder = tmp_path / "run"
    command = [sys.executable, "-c", "from fedjax_rec.cli.main import entry; entry()"]
    environment = {**os.environ, "XLA_FLAGS": ""}
    for args in (
        flags(dataset, folder, *PRIVATE, QUICK, "--devices", "7"),
        ["evaluate", str(folder), "--ks", "5", "10"],
    ):
        done = subprocess.run([*command, *args], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    for one, several in zip(metrics(private), metrics(folder), strict=True):
        assert one["round"] == several["round"]
        assert one["loss"] == pytest.approx(several["loss"], rel=1e-4)
        assert one["epsilon"] == several["epsilon"]
        for name, value in one["validation"].items():
            assert value == pytest.approx(several["validation"][name], abs=1e-4)
    for name, value in read(private)["test"].items():
        assert value == pytest.approx(read(folder)["test"][name], abs=1e-4)
    evaluated = read(folder, "evaluation-test.json")["metrics"]
    assert evaluated.items() <= {**evaluated, **read(folder)["test"]}.items()
