"""GPFedRec, FedRAP and CoFedRec on MovieLens 100K: clients that keep, or are sent, item tables of their own.

    python -m experiments gpfedrec --data-dir ~/data/ml-100k

On two CPU cores with much other work on them, GPFedRec took 19 minutes a row, CoFedRec 7 and FedRAP 2 to 4; all rows
took 50 minutes. GPU times were not measured.
"""

from collections.abc import Sequence
from functools import partial

from experiments.harness import Options, Published, Row, Study
from experiments.harness import main as run_study
from experiments.ranked import Build, ml_100k, train_and_rank
from fedjax_rec.algorithms.cofedrec import cofedrec
from fedjax_rec.algorithms.fedrap import additive_scorer, fedrap
from fedjax_rec.algorithms.gpfedrec import gpfedrec, private_tower
from fedjax_rec.algorithms.pfedrec import personal_scorer
from fedjax_rec.data import Interactions
from fedjax_rec.data.negatives import Negatives
from fedjax_rec.evaluation.protocol import FEDRAP_PAPER, PFEDREC_PAPER, STRICT_99
from fedjax_rec.federated.uploads import own_score

COLUMNS = {"paper": PFEDREC_PAPER, "strict": STRICT_99, "paper, test-selected": FEDRAP_PAPER}
METRICS = tuple(f"{metric} {column}" for column in COLUMNS for metric in ("HR@10", "NDCG@10"))
NAMES = {"HR@10": "hit@10", "NDCG@10": "ndcg@10"}
SMOKE_ROUNDS = 2
# Published code draws negatives for each positive anew, and shuffles both together.
NEGATIVES = Negatives(4, replacement=True, mixed=True)


def build_gpfedrec(interactions: Interactions, *, similarity: str):
    """GPFedRec with its authors' settings."""
    model = private_tower(interactions.num_items)
    algorithm = gpfedrec(
        model,
        num_clients=interactions.num_users,
        num_items=interactions.num_items,
        similarity=similarity,
        negatives=NEGATIVES,
    )
    return algorithm, model._replace(score=own_score)


def build_cofedrec(interactions: Interactions):
    """CoFedRec with the settings for this data set; 128 items in a client's contrast, for the sake of time."""
    model = personal_scorer(interactions.num_items)
    algorithm = cofedrec(
        model,
        num_clients=interactions.num_users,
        num_items=interactions.num_items,
        num_contrasted=128,
        negatives=NEGATIVES,
    )
    return algorithm, model._replace(score=own_score)


def build_fedrap(interactions: Interactions, *, separation: float):
    """FedRAP with its authors' settings; `separation` is lambda."""
    model = additive_scorer(interactions.num_items, separation=separation)
    return fedrap(model, num_clients=interactions.num_users), model


def trained(build: Build, num_rounds: int, seed: int, options: Options) -> dict:
    """One run under the paper's negatives, reported by both rules of choosing a round, and one under strict ones."""
    interactions = ml_100k(options.data_dir, smoke=options.smoke)
    num_rounds, num_buckets = (SMOKE_ROUNDS, 1) if options.smoke else (num_rounds, 5)
    found = {}
    for exclusion in ("paper", "strict"):
        protocols = [protocol for protocol in COLUMNS.values() if protocol.exclusion == exclusion]
        found |= train_and_rank(
            build, interactions, protocols, seed=seed, num_rounds=num_rounds, num_buckets=num_buckets
        )
    fingerprints = {column: p.fingerprint(p.split(interactions)) for column, p in COLUMNS.items()}
    return {
        "values": {
            f"{metric} {column}": found[p.name][name] for column, p in COLUMNS.items() for metric, name in NAMES.items()
        },
        "protocols": {f"{metric} {column}": fingerprints[column] for column in COLUMNS for metric in NAMES},
        "rounds": {column: found[p.name]["round"] for column, p in COLUMNS.items()},
        "settings": f"{num_rounds} rounds",
    }


def published(column: str, hit: float, ndcg: float, *, tolerance: float | None, source: str):
    """A cell pair of one column."""
    return {
        f"HR@10 {column}": Published(hit, tolerance, source),
        f"NDCG@10 {column}": Published(ndcg, tolerance, source),
    }


GPFEDREC = published("paper", 72.85, 43.77, tolerance=None, source="unverified")
FEDRAP = published("paper, test-selected", 98.94, 89.23, tolerance=1.5, source="primary")

STUDY = Study(
    name="gpfedrec",
    title="GPFedRec, FedRAP and CoFedRec on MovieLens 100K",
    about=(
        'HR@10 and NDCG@10 in percent against 99 negatives in expectation. In columns "paper" held-out items are never '
        'training negatives, so training is told what the answer is not; in columns "strict" negatives avoid training '
        "items only, and nothing else changes. Both report the best validation round; "
        '"paper, test-selected" is the run of "paper" at its best test round, which is how FedRAP\'s authors report. '
        "Equal scores count against the held-out item; each client is scored with what it has just trained. GPFedRec "
        "as written links users by the cosine of their tables, as coded by the cosine distance. GPFedRec and FedRAP "
        "without its lambda term ran 60 rounds, CoFedRec 40 and FedRAP with that term 20; the authors of GPFedRec and "
        "CoFedRec ran 100."
    ),
    rows=(
        Row(
            "GPFedRec as written",
            partial(trained, partial(build_gpfedrec, similarity="cosine"), 60),
            GPFEDREC,
            "under paper the last round is the best, so more rounds may still raise it. A user is its own neighbour "
            "here, so the table that it is pulled to carries its own negatives from round to round, and the leak with "
            "them; as coded a user is its own neighbour only if it has no other. That may be why as written is the "
            "better one under paper and the worse one under strict; it was not tested.",
        ),
        Row(
            "GPFedRec as coded",
            partial(trained, partial(build_gpfedrec, similarity="distance"), 60),
            GPFEDREC,
            "under paper the last round is the best, so more rounds may still raise it.",
        ),
        Row(
            "FedRAP, lambda 0.1",
            partial(trained, partial(build_fedrap, separation=0.1), 20),
            FEDRAP,
            "the term has no lower bound: the two tables of a client run away from each other, and the ranking gets "
            "worse after a few rounds (the best is in the results file), so 20 rounds say all. With one local epoch in "
            "place of ten it lasts longer, see the study leak. One published version of the authors' code has the "
            "term commented out, and the HR@10 of their log agrees with lambda 0.",
        ),
        Row(
            "FedRAP, lambda 0",
            partial(trained, partial(build_fedrap, separation=0.0), 60),
            FEDRAP,
            "HR@10 agrees with the authors' log; NDCG@10 lies above it. How many rounds the log had is not known, and "
            "here the last is the best. Under strict little of it is left: a private table remembers what was never "
            "drawn as a negative.",
        ),
        Row(
            "CoFedRec",
            partial(trained, build_cofedrec, 40),
            note=(
                "no published value for this data set was at hand. Under strict the last round is the best. The "
                "contrast is over 128 items a client and round, where the authors' is over all."
            ),
        ),
    ),
    metrics=METRICS,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the table."""
    return run_study(STUDY, argv)
