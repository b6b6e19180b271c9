"""From a configuration to what a run needs: data, clients, algorithm, privacy plan and compiled rounds."""

import dataclasses
import os
from functools import partial

import jax
import numpy as np
import optax

from fedjax_rec.data.clients import ClientData, client_data
from fedjax_rec.data.filters import binarize, k_core
from fedjax_rec.data.interactions import Interactions
from fedjax_rec.data.negatives import Negatives, popularity_cdf
from fedjax_rec.data.sources import DATASETS, SPLITS, load, load_split
from fedjax_rec.data.split import Split, leave_one_out, ratio_split
from fedjax_rec.federated.cohort import Sampler, fixed_size, full_participation, in_turn, poisson
from fedjax_rec.federated.round import RoundKeys, Rounds, largest_update, make_rounds
from fedjax_rec.federated.transforms import chain
from fedjax_rec.models.popularity import DpPopularity, dp_popularity
from fedjax_rec.privacy.accounting import delta_warning
from fedjax_rec.runs.config import TrainConfig
from fedjax_rec.runs.method import Method, make_method
from fedjax_rec.runs.privacy_plan import PrivacyPlan, plan_privacy, with_colluders
from fedjax_rec.runs.uploads import compression, in_fixed_point, way_to_sum

KS = (5, 10, 20)
METRIC = "ndcg@10"
# Noise outside the rounds: numbers that no round has, folded into the noise key.
POPULARITY_NOISE, BASELINE_NOISE = 2**32 - 1, 2**32 - 2


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
    """A configuration made concrete.

    Attributes:
      config: as given.
      interactions: the data set, filtered.
      split: train, validation, test.
      clients: the population.
      method: what is trained, and how it is asked for scores.
      rounds: compiled training.
      sampler: cohorts.
      keys: the run's randomness.
      privacy: the plan, or None.
      num_rounds: rounds to run.
      warnings: sentences to print and to keep in the report.
    """

    config: TrainConfig
    interactions: Interactions
    split: Split
    clients: ClientData
    method: Method
    rounds: Rounds
    sampler: Sampler
    keys: RoundKeys
    privacy: PrivacyPlan | None
    num_rounds: int
    warnings: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """A data set ready for training, with sentences about what was done to it."""

    interactions: Interactions
    split: Split
    clients: ClientData
    notes: tuple[str, ...]


def prepare_data(config: TrainConfig) -> Data:
    """Loads, filters and splits the data set, and lays out its clients."""
    if config.dataset in SPLITS and config.dataset not in DATASETS:
        return _published(config)
    options = {"seed": config.data.split_seed} if config.dataset == "synthetic" else {}
    interactions = load(config.dataset, data_dir=config.data_dir, **options)
    notes = [f"Loading {interactions.name}: {count} {what}." for what, count in interactions.repairs.items() if count]
    if config.data.min_rating is not None:
        interactions, note = binarize(interactions, config.data.min_rating)
        notes.append(str(note))
    if config.data.k_core:
        interactions, note = k_core(interactions, config.data.k_core)
        notes.append(str(note))
    return _laid_out(config, interactions, make_split(interactions, config), notes)


def _published(config: TrainConfig) -> Data:
    """A data set that comes with its split."""
    data = config.data
    if data.split != "leave_one_out" or data.min_rating is not None or data.k_core:
        raise ValueError(f"{config.dataset} comes with its own split; leave out --data.split, min-rating and k-core.")
    split = load_split(config.dataset, data_dir=config.data_dir, tie_rule=data.tie_rule, seed=data.split_seed)
    return _laid_out(config, split.train, split, [])


def _laid_out(config: TrainConfig, interactions: Interactions, split: Split, notes: list[str]) -> Data:
    """The clients of a split, and what is worth knowing about them."""
    notes += [f"Splitting: {count} {what}." for what, count in split.repairs.items() if count]
    _check_evaluable(split)
    clients = client_data(
        split,
        exclusion=config.data.exclusion,
        use_ratings=config.data.use_ratings,
        num_shards=config.devices,
    )
    counts = split.train.counts_per_user
    drawn = config.model.kind == "mf" and not config.data.use_ratings
    per_positive = config.client.num_negatives if drawn else 0
    short = int(np.sum(counts * per_positive > split.num_items - counts))
    if per_positive and short:
        notes.append(
            f"{short} of {len(counts)} clients want more negatives ({per_positive} an interaction) than the catalogue "
            f"of {split.num_items} items has left; they take all of it, with a weight that makes up for it."
        )
    return Data(interactions, split, clients, tuple(notes))


def _check_evaluable(split: Split) -> None:
    """Refuses before training what evaluation would refuse after it."""
    if split.num_items < max(KS):
        raise ValueError(
            f"{split.train.name} has {split.num_items} items, and the metrics need at least the largest cut-off, "
            f"{max(KS)}: a list of {max(KS)} would hold everything. Use a larger catalogue."
        )
    for part, rows in {"validation": split.validation, "test": split.test}.items():
        if not rows.num_interactions:
            raise ValueError(
                f"No user of {split.train.name} has enough interactions to hold one out for {part} ({split.rule}): "
                "leave_one_out needs users with 3, ratio with 10, and a published split may have no such part. Use "
                "another data set or --data.split."
            )


def make_split(interactions: Interactions, config: TrainConfig) -> Split:
    """Splits as the configuration says."""
    data = config.data
    if data.split == "leave_one_out":
        return leave_one_out(interactions, tie_rule=data.tie_rule, seed=data.split_seed)
    return ratio_split(interactions, test_ratio=0.1, validation_ratio=0.1, tie_rule=data.tie_rule, seed=data.split_seed)


def make_sampler(config: TrainConfig, num_clients: int) -> Sampler:
    """The sampler of the configuration.

    Raises:
      ValueError: if the cohort is larger than the population.
    """
    if config.cohort_size is not None and config.cohort_size > num_clients:
        raise ValueError(
            f"--cohort-size {config.cohort_size} is more than the population of {num_clients} clients; "
            "choose a smaller one, or leave it out to take everyone."
        )
    if config.sampler == "in_turn":
        return _groups_in_turn(config, num_clients)
    if config.cohort_size is None or (config.cohort_size == num_clients and config.sampler == "poisson"):
        replaced = config.privacy.in_shares or (config.private and config.upload.dropout_prob > 0)
        relation = "replace_one" if replaced else "add_or_remove_one"
        return full_participation(num_clients, relation=relation)
    make = poisson if config.sampler == "poisson" else fixed_size
    return make(num_clients, cohort_size=config.cohort_size)


def _groups_in_turn(config: TrainConfig, num_clients: int) -> Sampler:
    """Groups in turn, thinned by coins to the cohort size that was asked for."""
    group_size = num_clients / config.num_groups
    if config.cohort_size is not None and config.cohort_size > group_size:
        raise ValueError(
            f"--cohort-size {config.cohort_size} is more than a group of {num_clients} clients in --num-groups "
            f"{config.num_groups} groups, {group_size:.0f}; ask for fewer groups or a smaller cohort."
        )
    prob = 1.0 if config.cohort_size is None else config.cohort_size / group_size
    return in_turn(num_clients, num_groups=config.num_groups, sampling_prob=prob)


def make_keys(config: TrainConfig) -> RoundKeys:
    """The run's keys: from the seed, or, for a release, cohort and noise from the operating system's entropy."""
    keys = RoundKeys(*jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 1), 3))
    if not config.secret_noise:
        return keys

    def secret():
        words = np.frombuffer(os.urandom(8), np.uint32)
        return jax.random.wrap_key_data(jax.numpy.asarray(words), impl="threefry2x32")

    client = secret() if config.privacy.in_shares else keys.client  # clients draw their shares of the noise from it
    return RoundKeys(cohort=secret(), client=client, noise=secret())


def make_server_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """The server's optimizer, under optax's own names."""
    lr = config.server.lr
    makers = {
        "adam": partial(optax.adam, lr),
        "yogi": partial(optax.yogi, lr),
        "momentum": partial(optax.sgd, lr, momentum=config.server.momentum),
        "sgd": partial(optax.sgd, lr),
    }
    return makers[config.server.optimizer]()


def prepare(config: TrainConfig, *, data: Data | None = None, keys: RoundKeys | None = None) -> Experiment:
    """Everything that a run needs; compiles nothing yet.

    Args:
      config: checked by `config_checks.check`.
      data: from `prepare_data`, to share between runs.
      keys: of the run to continue, from `training.saved_keys`; needed where they are secret.
    """
    data = prepare_data(config) if data is None else data
    keys = make_keys(config) if keys is None else keys
    train, num_clients = data.split.train, data.clients.num_clients
    sampler = make_sampler(config, num_clients)
    popularity = released_popularity(config, train, noise_key=keys.noise)
    client = config.client
    negatives = Negatives(
        client.num_negatives if not config.data.use_ratings else 0,
        client.negative_distribution,
        None if popularity is None else popularity_cdf(popularity),
    )
    method = make_method(
        config,
        split=data.split,
        clients=data.clients,
        negatives=negatives,
        server_optimizer=make_server_optimizer(config),
    )
    algorithm = method.algorithm
    plan, warnings = None, list(data.notes)
    smaller = compression(config.upload, num_items=train.num_items)
    if config.private:
        size = largest_update(algorithm, data.clients, smaller, whole=config.upload.rotation)
        size += config.privacy.clip == "adaptive"  # which sends whether it clipped beside the update
        plan = plan_privacy(config, sampler, num_clients=num_clients, update_size=size, num_items=train.num_items)
        transforms = plan.transforms
        warnings += plan_warnings(config, plan, sampler, num_clients)
    else:
        transforms = chain(smaller, in_fixed_point(config, sampler, num_numbers=None), way_to_sum(config, sampler))
    if config.upload.sum == "simulated":
        warnings.append(
            "The secure sum is simulated: masks, dropouts and refusals are computed, and nothing is hidden, since one "
            "program holds every key. What is said of privacy is of the protocol that it stands for."
        )
    mesh = None
    if config.devices > 1:
        mesh = jax.make_mesh((config.devices,), ("clients",))
    rounds = make_rounds(algorithm, transforms, sampler, data.clients, span_size=config.eval_every, mesh=mesh)
    return Experiment(
        config=config,
        interactions=data.interactions,
        split=data.split,
        clients=data.clients,
        method=method,
        rounds=rounds,
        sampler=sampler,
        keys=keys,
        privacy=plan,
        num_rounds=config.rounds if plan is None else plan.num_rounds,
        warnings=tuple(warnings),
    )


def plan_warnings(config: TrainConfig, plan: PrivacyPlan, sampler: Sampler, num_clients: int) -> list[str]:
    """What the user should know about a plan before it runs."""
    warning = delta_warning(plan.delta, num_clients)
    warnings = [warning] if warning else []
    if plan.num_rounds < config.rounds:
        warnings.append(
            f"The budget epsilon = {config.epsilon:g} allows {plan.num_rounds} of {config.rounds} rounds at noise "
            f"multiplier {plan.noise_multiplier:g}; the run stops there."
        )
    if config.privacy.in_shares:
        colluding, epsilon = with_colluders(config, plan, sampler)
        warnings.append(
            f"If {colluding} clients tell the server their shares of the noise, the honest ones' noise gives everybody "
            f"else user-level epsilon {epsilon:.3g} (delta {plan.delta:g}, {sampler.relation.replace('_', ' ')}, "
            f"{sampler.name} clients take part)."
        )
    return warnings


def released_popularity(config: TrainConfig, train: Interactions, *, noise_key: jax.Array) -> jax.Array | None:
    """Item counts for drawing negatives: exact without privacy, else one noised release that the ledger holds."""
    if config.client.negative_distribution != "popularity":
        return None
    if not config.private:
        return jax.numpy.asarray(train.item_counts, jax.numpy.float32)
    key = jax.random.fold_in(noise_key, POPULARITY_NOISE)
    released: DpPopularity = dp_popularity(train, noise_multiplier=config.privacy.popularity_noise_multiplier, key=key)
    return released.counts
