"""The configuration of a training run: frozen, printed at the start, saved with the run, and enough to repeat it."""

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How interactions become clients."""

    split: Literal["leave_one_out", "ratio"] = "leave_one_out"
    """Hold out each user's latest item, or the latest tenth of each user's rows (and as much for validation)."""
    tie_rule: Literal["hash", "file_last", "file_first", "item_largest", "item_smallest"] = "hash"
    """What breaks equal timestamps; it alone can move a table twofold."""
    split_seed: int = 0
    """Seed of the tie rule and of random splits."""
    min_rating: float | None = None
    """Keep only ratings of at least this (implicit feedback from explicit ratings)."""
    k_core: int | None = None
    """Keep users and items with at least this many interactions; looks at everyone's data, so it is not private."""
    use_ratings: bool = False
    """Train on ratings (with --model.loss squared) instead of on what was touched."""
    exclusion: Literal["strict", "paper", "candidates"] = "strict"
    """What drawn negatives avoid: train items; also held-out items, as much published code does; or candidates."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Matrix factorisation with private user vectors, or a Transformer that reads the user's history."""

    kind: Literal["mf", "sasrec"] = "mf"
    """mf: matrix factorisation, user vectors never leave their clients. sasrec: what comes next after a history, all
    parameters shared, softmax over the catalogue; start from --server.lr 0.005 --rounds 300."""
    dim: int = 32
    """Length of user and item vectors."""
    max_length: int = 50
    """Last items of a history that sasrec reads."""
    num_blocks: int = 2
    """Blocks of sasrec."""
    dropout: float = 0.2
    """Of sasrec, in training."""
    loss: Literal["logistic", "bpr", "squared"] = "logistic"
    """Loss of a batch."""
    l2: float = 0.01
    """Weight of the squared norms of user vector and item rows."""
    init_stddev: float = 0.1
    """Standard deviation of initial vectors."""
    label_mean: float = 0.0
    """Public constant added to every score, for ratings."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClientConfig:
    """What a client does in a round. The defaults are FedSGD: one full-batch step."""

    lr: float = 1.0
    """Learning rate of shared parameters on the client."""
    private_lr: float = 1.0
    """Learning rate of the private user vector."""
    local_epochs: int = 1
    """Passes over the client's data in a round."""
    batch_size: int | None = None
    """Interactions a step; None takes all of them in one step."""
    num_negatives: int = 4
    """Items drawn for each interaction."""
    negative_distribution: Literal["uniform", "popularity"] = "uniform"
    """How they are drawn. Popularity is released with noise, and charged, when there is a budget."""
    weigh_by_examples: bool = False
    """Weight clients by their interactions (FedAvg); with privacy only with --client.max-examples."""
    max_examples: int | None = None
    """Public bound on that weight."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """What the server does with the mean update."""

    optimizer: Literal["adam", "yogi", "momentum", "sgd"] = "adam"
    """FedAdam, FedYogi, FedAvgM or plain averaging."""
    lr: float = 0.02
    """Server learning rate."""
    momentum: float = 0.9
    """For optimizer momentum."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivacyConfig:
    """User-level differential privacy; in force with --epsilon or --privacy.noise-multiplier."""

    mechanism: Literal[
        "gaussian",
        "laplace",
        "discrete_gaussian",
        "skellam",
        "banded",
        "tree",
        "skellam_shares",
        "discrete_gaussian_shares",
    ] = "gaussian"
    """Noise on each round's sum. banded and tree correlate it over rounds (DP-FTRL) and need --sampler in_turn;
    discrete_gaussian and skellam round updates to integers and have no bound on sampled cohorts. With _shares, clients
    add the noise, so that a server behind --upload.sum simulated, crypto or encrypted only sees a noised sum."""
    clip: Literal["joint", "per_table", "adaptive"] = "joint"
    """Bound an update as a whole, each table by itself, or as a whole at a norm that follows a quantile of the update
    norms, which is released and charged with the update."""
    l2_clip_norm: float = 0.02
    """Bound on the L2 norm of one client's update (mechanism laplace: L1 norm; clip adaptive: where it starts)."""
    target_quantile: float = 0.5
    """Share of clients that clip adaptive leaves unclipped."""
    schedule_ratio: float = 1.0
    """Noise of the first round over that of the last, falling in steps between; for mechanism gaussian."""
    noise_multiplier: float | None = None
    """Noise standard deviation over the clip norm; None solves for it from --epsilon and the number of rounds."""
    popularity_noise_multiplier: float = 20.0
    """Noise of the popularity histogram, if negatives are drawn by popularity."""
    colluding_share: float = 0.1
    """Share of clients that may tell the server their noise, for the second epsilon of a mechanism with _shares."""

    @property
    def in_shares(self) -> bool:
        """Whether clients add the noise."""
        return self.mechanism.endswith("_shares")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UploadConfig:
    """What clients send, and who sees it."""

    sum: Literal["float", "ring", "simulated", "crypto", "encrypted"] = "float"
    """How uploads are added: as they are; as integers modulo 2^32; the same in a simulated secure sum (fast, not
    secret), by secure aggregation with real keys (extra [crypto]), or under homomorphic encryption (extra [he]). All
    but float train the same model, bit for bit."""
    bits: int | None = None
    """Bits of one client's number in the sum, 12 to 22; 16 by default, 18 with noise in shares."""
    largest: float | None = None
    """Largest magnitude of a number, larger ones are cut; the clip norm by default, and 1 without privacy."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """Rounding to those bits; nearest is biased."""
    rotation: bool = False
    """Turn updates by a random Hadamard rotation first, so that few bits describe them well."""
    min_clients: int | None = None
    """Fewer survivors than these get no sum; by default half the cohort (less of a small one that coins decide), or
    all but --upload.planned-dropout of it with noise in shares."""
    dropout_prob: float = 0.0
    """Chance of each client to drop out of a secure sum before it sends."""
    planned_dropout: float = 0.1
    """Share of the cohort that may drop out before noise in shares is too little, and the round gives nothing."""
    degree: int | None = None
    """Neighbours that a client of a secure sum shares masks with; by default as the cohort's size needs."""
    compression: Literal["none", "quantize", "drive", "top_k", "rand_k", "count_sketch", "low_rank", "item_subset"] = (
        "none"
    )
    """What makes uploads smaller. rand_k, count_sketch, low_rank and item_subset also go with a secure sum."""
    quantize_bits: int = 4
    """Bits of a number, for compression quantize."""
    share: float = 0.1
    """Share that is sent of the numbers (top_k), the rows (rand_k, item_subset) or as buckets (count_sketch)."""
    rank: int = 4
    """Rank of item updates, for compression low_rank."""
    download: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of what clients receive."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a federated recommender, with user-level differential privacy if --epsilon is given.

    On generated data, with a privacy budget of 8:

        fedjax-rec train --epsilon 8

    On MovieLens, without privacy:

        fedjax-rec train --dataset movielens/100k --data-dir ~/data/ml-100k

    On your own file, with a user and an item column (and rating and timestamp, if there are any):

        fedjax-rec train --dataset ratings.csv --epsilon 4 --cohort-size 500 --rounds 300 --out runs/mine

    Continue a run that was stopped, or repeat one with changes:

        fedjax-rec train --resume --out runs/mine

        fedjax-rec train --config runs/mine/config.json --seed 1
    """

    dataset: str = "synthetic"
    """synthetic, movielens/100k, 1m, 20m, 25m, latest-small, 1m/ncf, gowalla, or a CSV, TSV, .inter file."""
    data_dir: Path | None = None
    """Folder of the unpacked data set or its zip."""
    rounds: int = 200
    """Rounds of training."""
    seed: int = 0
    """Seed of everything random. Same seed, same numbers."""
    out: Path | None = None
    """Run directory; a new one under runs/ by default."""
    epsilon: float | None = None
    """Privacy budget (user-level, add or remove one user). None trains without privacy."""
    delta: float | None = None
    """Probability that the bound may fail; 1 / users^1.1 by default."""
    cohort_size: int | None = None
    """Clients per round in expectation; everyone by default."""
    sampler: Literal["poisson", "fixed_size", "in_turn"] = "poisson"
    """How a cohort is drawn. fixed_size is accounted under the replace-one relation; in_turn lets fixed groups of
    clients take turns, thinned by coins to --cohort-size."""
    num_groups: int | None = None
    """Groups that take turns, for sampler in_turn; noise of mechanism banded reaches over so many rounds."""
    eval_every: int = 10
    """Rounds between validations, checkpoints and log lines."""
    select: Literal["auto", "best", "last"] = "auto"
    """Which round is tested. Choosing by validation looks at private data, so auto takes the last under privacy."""
    resume: bool = False
    """Continue the run in --out; the result is the one an uninterrupted run would have had."""
    secret_noise: bool = False
    """Draw cohort and noise keys from the operating system instead of the seed, for models that will be released."""
    non_private_row: bool = True
    """Also train without privacy, to show what privacy costs."""
    devices: int = 1
    """Devices to spread the clients over (on CPU: threads that act as devices)."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    client: ClientConfig = ClientConfig()
    server: ServerConfig = ServerConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    upload: UploadConfig = UploadConfig()

    @property
    def private(self) -> bool:
        """Whether the run clips and adds noise."""
        return self.epsilon is not None or self.privacy.noise_multiplier is not None


# What may differ between a run and its continuation.
FREE_FIELDS = ("out", "resume", "data_dir")


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def from_dict(values: dict[str, Any], kind: type = TrainConfig) -> Any:
    """The inverse of `to_dict`.

    Raises:
      ValueError: for a field that this version does not know.
    """
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"Unknown fields in the configuration: {', '.join(unknown)}. It may be of another version.")
    return kind(**{name: _read(name, value, hints[name]) for name, value in values.items()})


def _read(name: str, value: Any, hint: Any) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_dict(value, hint)
    options = typing.get_args(hint) or (hint,)
    if Path in options and isinstance(value, str):
        return Path(value)
    if float in options and type(value) is int:
        return float(value)
    if value not in options and not (value is None and types.NoneType in options) and type(value) not in options:
        words = ", ".join(repr(option) if isinstance(option, str) else option.__name__ for option in options)
        raise ValueError(f"{name} in the configuration must be {words}; got {value!r}.")
    return value


def load(path: str | Path) -> TrainConfig:
    """Reads a saved config.json.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it is not a configuration.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"There is no configuration at {path}.")
    try:
        return from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a configuration that a run saved: {error}.") from error


def differences(first: TrainConfig, second: TrainConfig) -> list[str]:
    """Fields that differ and matter, as ``"name: this, not that"``."""

    def flat(values, prefix=""):
        for name, value in values.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{name}.")
            elif prefix + name not in FREE_FIELDS:
                yield prefix + name, value

    old = dict(flat(to_dict(second)))
    return [f"{name}: {value}, not {old.get(name)}" for name, value in flat(to_dict(first)) if old.get(name) != value]
