"""Settings of a run that cannot work, or not together: refused before anything starts."""

import math

from fedjax_rec.runs.config import PrivacyConfig, TrainConfig


def check(config: TrainConfig) -> None:
    """Refuses what could only fail later.

    Raises:
      ValueError: a sentence naming the flag, its value and the way out.
    """
    positive = {
        "--rounds": config.rounds,
        "--eval-every": config.eval_every,
        "--devices": config.devices,
        "--model.dim": config.model.dim,
        "--model.max-length": config.model.max_length,
        "--model.num-blocks": config.model.num_blocks,
        "--client.local-epochs": config.client.local_epochs,
        "--server.lr": config.server.lr,
        "--privacy.l2-clip-norm": config.privacy.l2_clip_norm,
        "--epsilon": config.epsilon,
        "--delta": config.delta,
        "--cohort-size": config.cohort_size,
        "--client.batch-size": config.client.batch_size,
        "--client.max-examples": config.client.max_examples,
        "--privacy.noise-multiplier": config.privacy.noise_multiplier,
        "--privacy.popularity-noise-multiplier": config.privacy.popularity_noise_multiplier,
        "--privacy.schedule-ratio": config.privacy.schedule_ratio,
        "--num-groups": config.num_groups,
    }
    for flag, value in positive.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{flag} must be a positive number; got {value}.")
    not_negative = {
        "--client.lr": config.client.lr,
        "--client.private-lr": config.client.private_lr,
        "--client.num-negatives": config.client.num_negatives,
        "--model.l2": config.model.l2,
        "--model.init-stddev": config.model.init_stddev,
        "--server.momentum": config.server.momentum,
    }
    for flag, value in not_negative.items():
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{flag} must be a number that is not negative; got {value}.")
    if config.delta is not None and config.delta >= 1:
        raise ValueError(f"--delta must be below 1; got {config.delta}.")
    if not config.private and (config.delta is not None or config.privacy != PrivacyConfig()):
        raise ValueError(
            "--delta and --privacy.* do nothing without a budget; add --epsilon (or --privacy.noise-multiplier) to "
            "train with privacy, or leave them out."
        )
    if config.data.use_ratings and config.model.loss != "squared":
        raise ValueError("--data.use-ratings trains on ratings; add --model.loss squared.")
    if config.model.loss == "bpr" and not config.client.num_negatives:
        raise ValueError("--model.loss bpr compares with negatives; set --client.num-negatives to 1 or more.")
    if config.private and config.client.weigh_by_examples and config.client.max_examples is None:
        raise ValueError("Weights by number of examples have no public bound; set --client.max-examples, or leave it.")
    if config.private and config.data.k_core:
        raise ValueError(
            "--data.k-core chooses users and items by looking at everyone's data, which no epsilon covers; "
            "filter beforehand and declare the result public, or leave it out."
        )
    _check_model(config)
    _check_mechanism(config)


def _check_model(config: TrainConfig) -> None:
    model, client, default = config.model, config.client, TrainConfig()
    sequence_flags = {
        "--model.max-length": (model.max_length, default.model.max_length),
        "--model.num-blocks": (model.num_blocks, default.model.num_blocks),
        "--model.dropout": (model.dropout, default.model.dropout),
    }
    factor_flags = {
        "--model.loss": (model.loss, default.model.loss),
        "--model.l2": (model.l2, default.model.l2),
        "--model.label-mean": (model.label_mean, default.model.label_mean),
        "--client.private-lr": (client.private_lr, default.client.private_lr),
        "--client.batch-size": (client.batch_size, default.client.batch_size),
        "--client.num-negatives": (client.num_negatives, default.client.num_negatives),
        "--client.negative-distribution": (client.negative_distribution, default.client.negative_distribution),
        "--client.weigh-by-examples": (client.weigh_by_examples, default.client.weigh_by_examples),
        "--client.max-examples": (client.max_examples, default.client.max_examples),
        "--data.use-ratings": (config.data.use_ratings, default.data.use_ratings),
    }
    for flag, (value, usual) in (factor_flags if model.kind == "sasrec" else sequence_flags).items():
        if value != usual:
            raise ValueError(f"{flag} does nothing for --model.kind {model.kind}; leave it out.")
    if not 0 <= model.dropout < 1:
        raise ValueError(f"--model.dropout must be at least 0 and below 1; got {model.dropout}.")


def _check_mechanism(config: TrainConfig) -> None:
    settings = config.privacy
    if (config.sampler == "in_turn") != (config.num_groups is not None):
        raise ValueError("--sampler in_turn and --num-groups go together: give both, or neither.")
    if not 0 <= settings.target_quantile <= 1:
        raise ValueError(f"--privacy.target-quantile must be between 0 and 1; got {settings.target_quantile}.")
    if settings.mechanism in ("banded", "tree") and config.sampler != "in_turn":
        raise ValueError(
            f"--privacy.mechanism {settings.mechanism} correlates the noise of nearby rounds: private only for "
            "clients that take part in one of them. Add --sampler in_turn --num-groups 8."
        )
    if settings.mechanism in ("discrete_gaussian", "skellam") and config.sampler == "poisson" and config.cohort_size:
        raise ValueError(
            f"--privacy.mechanism {settings.mechanism} has no bound that gains from sampling; leave out --cohort-size, "
            "or use --privacy.mechanism gaussian."
        )
    _check_upload(config)
    if settings.mechanism != "gaussian" and settings.schedule_ratio != 1.0:
        raise ValueError("--privacy.schedule-ratio is for --privacy.mechanism gaussian; leave one of them out.")
    if settings.mechanism == "laplace" and settings.clip != "joint":
        raise ValueError("--privacy.mechanism laplace clips L1 norms, and only jointly; leave out --privacy.clip.")


def _check_upload(config: TrainConfig) -> None:
    upload, mechanism = config.upload, config.privacy.mechanism
    for flag, value, low, high in (
        ("--upload.share", upload.share, 0, 1),
        ("--upload.dropout-prob", upload.dropout_prob, -1, 0.999),
        ("--upload.planned-dropout", upload.planned_dropout, -1, 0.999),
        ("--upload.largest", upload.largest, 0, math.inf),
        ("--privacy.colluding-share", config.privacy.colluding_share, -1, 0.999),
    ):
        if value is not None and not low < value <= high:
            raise ValueError(f"{flag} is out of range; got {value}.")
    secure = ("simulated", "crypto", "encrypted")
    if config.privacy.in_shares and upload.sum not in secure:
        raise ValueError(
            f"--privacy.mechanism {mechanism} has clients add the noise, which is for servers that see a sum only: add "
            "--upload.sum simulated, crypto or encrypted."
        )
    if config.privacy.in_shares and (config.sampler != "poisson" or config.cohort_size):
        raise ValueError(
            f"--privacy.mechanism {mechanism} has no bound that gains from sampling; leave out --sampler and "
            "--cohort-size, so that everyone takes part."
        )
    if upload.sum in secure and upload.compression in ("quantize", "drive", "top_k"):
        raise ValueError(
            f"--upload.compression {upload.compression} is decoded client by client, and --upload.sum {upload.sum} "
            "shows the server no single upload. Use rand_k, count_sketch, low_rank or item_subset."
        )
    if upload.dropout_prob and upload.sum not in secure:
        raise ValueError("--upload.dropout-prob is about secure sums; add --upload.sum simulated, or leave it out.")
    if upload.sum != "float" and mechanism == "laplace":
        raise ValueError("--privacy.mechanism laplace needs an L1 bound, which rounding to --upload.sum's grid loses.")
    if upload.sum != "float" and mechanism in ("skellam", "discrete_gaussian"):
        raise ValueError(
            f"--privacy.mechanism {mechanism} has the server add the noise to a grid of its own; with --upload.sum "
            f"{upload.sum} use gaussian, or {mechanism}_shares, where clients add it."
        )
    if upload.sum in ("crypto", "encrypted") and config.devices > 1:
        raise ValueError(f"--upload.sum {upload.sum} adds up on the host; leave out --devices, or use simulated.")
