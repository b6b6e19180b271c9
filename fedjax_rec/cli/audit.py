"""`fedjax-rec audit protocol`: how good a method looks under a protocol without learning anything."""

import dataclasses
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from fedjax_rec.evaluation.protocol import Protocol

# Under chance a user's auc is about uniform on [0, 1], with variance 1/12; so many standard errors above are a leak.
STANDARD_ERRORS = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """Audit an evaluation protocol: the metrics that it gives to a method that learns nothing.

    Federated recommenders train on negatives, drawn anew each round. Much published code draws them from the items
    that a user never touched, in train or test ("paper"). The held-out item is then the one unseen item that is never
    a negative, and a client that only counts its negatives finds it. This audit runs that counter: no model, no
    training, just the draws. What it reaches is what the protocol gives away; round 0 is chance.

        fedjax-rec audit protocol --dataset movielens/100k --data-dir ~/data/ml-100k

    The same with negatives that avoid training items only; it stays at chance:

        fedjax-rec audit protocol --dataset movielens/100k --data-dir ~/data/ml-100k --exclusion strict

    A paper's protocol by its name (pfedrec_paper, fedrap_paper, ncf, strict_99, strict_full, paper_full):

        fedjax-rec audit protocol --protocol fedrap_paper --rounds 20

    The other audit looks for bugs in a run's differential privacy; `fedjax-rec audit privacy --help` explains it:

        fedjax-rec audit privacy runs/mine
    """

    what: Annotated[Literal["protocol"], tyro.conf.Positional] = "protocol"
    """What to audit: protocol; privacy has options of its own."""
    dataset: str = "synthetic"
    """Data set or file, as for train --dataset."""
    data_dir: Path | None = None
    """Folder of the unpacked data set or its zip."""
    protocol: str | None = None
    """Take tie rule, split seed, exclusion, number of negatives and cut-off from this published protocol."""
    exclusion: Literal["paper", "strict"] | None = None
    """What training negatives avoid: all that the user ever touched, held-out items too (paper, the default), or its
    training items only (strict)."""
    rounds: int = 100
    """Last round; the table shows rounds 1, 2, 5, 10, 20, 50, 100 up to it."""
    num_negatives: int | None = None
    """Negatives ranked beside each held-out item, in expectation; 99, or as the protocol says."""
    num_per_positive: int = 4
    """Negatives that a client draws for each of its training items in a round."""
    distinct: bool = False
    """Negatives of a client's round are all distinct, as train draws them, instead of anew for each positive."""
    seed: int = 0
    """Of the draws."""
    max_gib: float = 4.0
    """Most memory for the counts, 4 bytes for each client and item."""
    json: bool = False
    """Print one JSON object and nothing else."""


def run(config: AuditConfig) -> int:
    """Prints what the protocol gives away, by round."""
    from rich.console import Console

    from fedjax_rec.data import load
    from fedjax_rec.data.negatives import Negatives
    from fedjax_rec.evaluation.leak import ROUNDS, audit_protocol
    from fedjax_rec.reporting import Table, to_rich

    _check(config)
    protocol = _protocol(config)
    num_negatives = config.num_negatives or protocol.num_negatives or 99
    k = max(protocol.ks)
    split = protocol.split(load(config.dataset, data_dir=config.data_dir))
    found = audit_protocol(
        split,
        exclusion=protocol.exclusion,
        rounds=[*(shown for shown in ROUNDS if shown < config.rounds), config.rounds],
        num_negatives=num_negatives,
        k=k,
        negatives=Negatives(config.num_per_positive, replacement=not config.distinct),
        seed=config.seed,
        max_bytes=int(config.max_gib * 2**30),
    )
    names = tuple(f"{name}@{k}{suffix}" for suffix in (f"/{num_negatives}neg", "") for name in ("hit", "ndcg"))
    num_users = split.test.num_interactions
    sentence = verdict(found, names=names, num_users=num_users)
    if config.json:
        answer = {
            "dataset": split.train.name,
            "users": num_users,
            "items": split.num_items,
            "exclusion": protocol.exclusion,
            "tie_rule": protocol.tie_rule,
            "split": split.fingerprint,
            "num_per_positive": config.num_per_positive,
            "distinct": config.distinct,
            "seed": config.seed,
            "chance": {name: found[0][name] for name in names},
            "rounds": [{"round": t} | {name: found[t][name] for name in names} for t in found if t],
            "leaks": leaks(found, num_users=num_users),
            "verdict": sentence,
        }
        print(json.dumps(answer, allow_nan=False))
        return 0
    anew = f"{config.num_per_positive}{' distinct' if config.distinct else ''} negatives a positive and round"
    avoided = "training items only" if protocol.exclusion == "strict" else "training and held-out items"
    table = Table(
        columns=("round", *names),
        rows=[(str(t) if t else "chance", *(found[t][name] for name in names)) for t in found],
        caption=f"{split.train.name}, {num_users:,} users, {split.num_items:,} items: negatives avoid {avoided}",
        notes=(
            f"Leave-one-out, {protocol.tie_rule} ties in time, split {split.fingerprint[:12]}; "
            f"{anew}; /{num_negatives}neg = against {num_negatives} sampled negatives, else the full ranking; equal "
            "scores and samples in expectation.",
        ),
    )
    console = Console(highlight=False, markup=False)
    console.print(to_rich(table, max_width=console.width))
    console.print(sentence)
    return 0


def leaks(found: Mapping[int, Mapping[str, float]], *, num_users: int) -> bool:
    """Whether the counting scorer ends above chance by more than an accident.

    Args:
      found: of `audit_protocol`.
      num_users: users in the means.
    """
    return found[max(found)]["auc"] - found[0]["auc"] > STANDARD_ERRORS * (12 * num_users) ** -0.5


def verdict(found: Mapping[int, Mapping[str, float]], *, names: tuple[str, ...], num_users: int) -> str:
    """What the table means, in a sentence or two.

    Args:
      found: of `audit_protocol`.
      names: hit and ndcg sampled, hit and ndcg of the full ranking.
      num_users: users in the means.
    """
    last = max(found)

    def figures(at: int, some: tuple[str, ...]) -> str:
        return " and ".join(f"{name} {found[at][name]:.3f}" for name in some)

    rounds = "1 round" if last == 1 else f"{last} rounds"
    chance = f"chance is {figures(0, names[:2])}"
    if not leaks(found, num_users=num_users):
        return (
            "Nothing leaks: a method under this protocol that only remembers its negatives is at chance after "
            f"{rounds} ({figures(last, names[:2])}; {chance}), so what exceeds chance was learned."
        )
    forgetful = "" if last == 1 else " One that forgets them between rounds can reach what round 1 shows."
    return (
        f"A method under this protocol can reach {figures(last, names[:2])}, and {figures(last, names[2:])} in the "
        f"full ranking, without learning anything: all it needs is to remember its negatives for {rounds} ({chance})."
        f"{forgetful} Report results with --exclusion strict beside it."
    )


def _check(config: AuditConfig) -> None:
    for flag in ("rounds", "num_per_positive", "num_negatives", "max_gib"):
        value = getattr(config, flag)
        if value is not None and not value > 0:
            raise ValueError(f"--{flag.replace('_', '-')} must be a positive number; got {value:g}.")


def _protocol(config: AuditConfig) -> "Protocol":
    """The preset, or a split with hashed ties; `--exclusion` overrides what the preset says."""
    from fedjax_rec.evaluation.protocol import PRESETS, Protocol

    if config.protocol is None:
        return Protocol("as asked", exclusion=config.exclusion or "paper")
    if config.protocol not in PRESETS:
        near = difflib.get_close_matches(config.protocol, PRESETS, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"Unknown --protocol {config.protocol!r}{hint}; there is {', '.join(PRESETS)}.")
    preset = PRESETS[config.protocol]
    return dataclasses.replace(preset, exclusion=config.exclusion or preset.exclusion)
