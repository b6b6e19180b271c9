"""Risk: settings that `train` accepts together and that break, or do nothing, once the round is compiled."""

import jax
import numpy as np
import pytest
from small_runs import write_csv

from fedjax_rec.runs.config import ModelConfig, PrivacyConfig, TrainConfig, UploadConfig
from fedjax_rec.runs.config_checks import check
from fedjax_rec.runs.experiment import prepare
from fedjax_rec.runs.training import train


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("data") / "small.csv")


@pytest.mark.parametrize(
    ("epsilon", "privacy", "upload"),
    [
        (8.0, {"clip": "adaptive"}, {"sum": "simulated", "degree": 4, "rotation": True}),
        (8.0, {"clip": "adaptive"}, {"compression": "rand_k", "share": 0.5, "sum": "simulated", "degree": 4}),
        (8.0, {"clip": "per_table"}, {"compression": "drive", "download": "bfloat16"}),
        (8.0, {}, {"compression": "count_sketch", "share": 0.3, "sum": "ring"}),
        (8.0, {}, {"compression": "low_rank", "rank": 2, "sum": "crypto", "rotation": True}),
        (None, {}, {"compression": "item_subset", "share": 0.5, "sum": "encrypted", "dropout_prob": 0.1}),
        (8.0, {"clip": "adaptive", "mechanism": "skellam"}, {"share": 0.5}),
        (None, {}, {"compression": "top_k"}),
    ],
    ids=["rotated", "rand_k", "drive", "count_sketch", "low_rank", "item_subset", "skellam", "top_k"],
)
def test_settings_that_are_accepted_train(dataset, epsilon, privacy, upload):
    config = TrainConfig(
        dataset=str(dataset),
        rounds=2,
        eval_every=2,
        epsilon=epsilon,
        model=ModelConfig(dim=4),
        privacy=PrivacyConfig(**privacy),
        upload=UploadConfig(**upload),
    )
    check(config)
    experiment = prepare(config)
    start = jax.device_get(experiment.rounds.init(jax.random.key(0))[0].shared.tables["item"])
    outcome = train(experiment, folder=None)
    table = np.asarray(outcome.state.shared.tables["item"])
    assert np.isfinite(table).all()
    assert np.mean(table != start) > 0.2
    assert experiment.rounds.upload_bits != experiment.rounds.plain_bits
