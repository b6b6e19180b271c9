"""A configuration survives its file, names what differs, and refuses what could only fail later."""

import dataclasses
import json
from pathlib import Path

import pytest

from fedjax_rec.runs.config import (
    ClientConfig,
    DataConfig,
    ModelConfig,
    PrivacyConfig,
    ServerConfig,
    TrainConfig,
    UploadConfig,
    differences,
    from_dict,
    load,
    to_dict,
)
from fedjax_rec.runs.config_checks import check

CHANGED = TrainConfig(
    dataset="ratings.csv",
    data_dir=Path("somewhere"),
    epsilon=4.0,
    cohort_size=50,
    sampler="fixed_size",
    data=DataConfig(split="ratio", min_rating=4.0),
    model=ModelConfig(dim=8, loss="bpr"),
    client=ClientConfig(batch_size=16),
    server=ServerConfig(optimizer="momentum"),
    privacy=PrivacyConfig(noise_multiplier=1.5),
    upload=UploadConfig(sum="simulated", bits=18, compression="rand_k"),
)


SASREC = TrainConfig(epsilon=8.0, model=ModelConfig(kind="sasrec", max_length=7))


@pytest.mark.parametrize("config", [TrainConfig(), CHANGED], ids=["defaults", "changed"])
def test_a_configuration_survives_its_file(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)), encoding="utf-8")
    assert load(tmp_path) == config
    assert load(tmp_path / "config.json") == config


def test_whole_numbers_are_read_as_fractions_where_those_are_meant():
    assert from_dict({"epsilon": 8}) == TrainConfig(epsilon=8.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epsilonn": 3}, "Unknown fields in the configuration: epsilonn"),
        ({"model": {"dims": 3}}, "Unknown fields in the configuration: dims"),
        ({"rounds": "20"}, "rounds in the configuration must be int; got '20'"),
        ({"rounds": 2.5}, r"rounds in the configuration must be int; got 2\.5"),
        (
            {"sampler": "poison"},
            "sampler in the configuration must be 'poisson', 'fixed_size', 'in_turn'; got 'poison'",
        ),
        ({"resume": "yes"}, "resume in the configuration must be bool; got 'yes'"),
        ({"model": 3}, "model in the configuration must be ModelConfig; got 3"),
    ],
)
def test_a_field_that_is_wrong_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        from_dict(values)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null"])
def test_a_file_that_is_no_configuration_is_a_sentence(text, tmp_path):
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="is not a configuration that a run saved"):
        load(tmp_path)


def test_a_missing_file_is_a_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no configuration at"):
        load(tmp_path / "nothing.json")


def test_differences_name_the_fields_and_both_values():
    other = dataclasses.replace(CHANGED, rounds=7, model=ModelConfig(dim=9, loss="bpr"))
    assert differences(other, CHANGED) == ["rounds: 7, not 200", "model.dim: 9, not 8"]


def test_where_a_run_lies_makes_no_difference():
    moved = dataclasses.replace(CHANGED, out=Path("elsewhere"), data_dir=Path("there"), resume=True)
    assert differences(moved, CHANGED) == []


@pytest.mark.parametrize("config", [TrainConfig(), CHANGED, TrainConfig(epsilon=1.0), SASREC])
def test_what_can_run_is_not_refused(config):
    check(config)


PRIVATE = TrainConfig(epsilon=8.0)
SIMULATED = UploadConfig(sum="simulated")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TrainConfig(epsilon=-1.0), r"--epsilon must be a positive number; got -1\.0"),
        (TrainConfig(epsilon=float("nan")), "--epsilon must be a positive number; got nan"),
        (TrainConfig(epsilon=float("inf")), "--epsilon must be a positive number; got inf"),
        (TrainConfig(model=ModelConfig(kind="sasrec", l2=0.1)), "--model.l2 does nothing for --model.kind sasrec"),
        (TrainConfig(model=ModelConfig(max_length=9)), "--model.max-length does nothing for --model.kind mf"),
        (TrainConfig(model=ModelConfig(kind="sasrec", dropout=1.0)), r"--model.dropout must be .* below 1; got 1\.0"),
        (TrainConfig(rounds=0), "--rounds must be a positive number; got 0"),
        (TrainConfig(cohort_size=0), "--cohort-size must be a positive number; got 0"),
        (TrainConfig(eval_every=0), "--eval-every must be a positive number"),
        (TrainConfig(devices=0), "--devices must be a positive number"),
        (dataclasses.replace(PRIVATE, delta=1.0), r"--delta must be below 1; got 1\.0"),
        (dataclasses.replace(PRIVATE, delta=0.0), r"--delta must be a positive number; got 0\.0"),
        (TrainConfig(client=ClientConfig(lr=-1.0)), r"--client\.lr must be a number that is not negative; got -1\.0"),
        (TrainConfig(client=ClientConfig(num_negatives=-1)), r"--client\.num-negatives must be a number"),
        (TrainConfig(delta=1e-5), "do nothing without a budget; add --epsilon"),
        (TrainConfig(privacy=PrivacyConfig(l2_clip_norm=0.5)), "do nothing without a budget; add --epsilon"),
        (TrainConfig(data=DataConfig(use_ratings=True)), r"add --model\.loss squared"),
        (
            TrainConfig(model=ModelConfig(loss="bpr"), client=ClientConfig(num_negatives=0)),
            r"set --client\.num-negatives to 1 or more",
        ),
        (
            dataclasses.replace(PRIVATE, client=ClientConfig(weigh_by_examples=True)),
            r"set --client\.max-examples, or leave it",
        ),
        (
            dataclasses.replace(PRIVATE, privacy=PrivacyConfig(mechanism="skellam_shares")),
            r"add --upload\.sum simulated, crypto or encrypted",
        ),
        (
            dataclasses.replace(
                PRIVATE, privacy=PrivacyConfig(mechanism="skellam_shares"), cohort_size=5, upload=SIMULATED
            ),
            "no bound that gains from sampling",
        ),
        (
            dataclasses.replace(PRIVATE, privacy=PrivacyConfig(mechanism="skellam"), upload=SIMULATED),
            "skellam_shares, where clients add it",
        ),
        (TrainConfig(upload=UploadConfig(sum="encrypted", compression="top_k")), r"Use rand_k, count_sketch"),
        (TrainConfig(upload=UploadConfig(dropout_prob=0.1)), r"add --upload\.sum simulated"),
        (TrainConfig(upload=UploadConfig(share=0.0)), r"--upload\.share is out of range; got 0\.0"),
        (TrainConfig(upload=UploadConfig(sum="crypto"), devices=2), "adds up on the host"),
        (dataclasses.replace(PRIVATE, data=DataConfig(k_core=5)), r"--data\.k-core .* which no epsilon covers"),
    ],
)
def test_what_cannot_run_is_a_sentence_with_its_flag(config, message):
    with pytest.raises(ValueError, match=message):
        check(config)
