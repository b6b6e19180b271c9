"""PFedRec's main table on MovieLens 1M: the rows of `pfedrec`, where the paper's values were seen in others' tables.

PFedRec took seven minutes for a seed, both protocols, on one of two CPU cores with other work on the other; GPU times
were not measured. Published values are of Zhang et al. (2023), "Dual
Personalization on Federated Recommendation".
"""

from collections.abc import Sequence
from functools import partial

from experiments.harness import Row, Study
from experiments.harness import main as run_study
from experiments.pfedrec import (
    ABOUT,
    METRICS,
    build_fedmf,
    build_fedncf,
    build_pfedrec,
    published,
    trained,
    trained_once,
)
from experiments.ranked import ml_1m
from fedjax_rec.models.ease import ease_scorer
from fedjax_rec.models.popularity import popularity_scorer

here, here_once = partial(trained, dataset=ml_1m), partial(trained_once, dataset=ml_1m)

STUDY = Study(
    name="pfedrec_1m",
    title="PFedRec's table on MovieLens 1M",
    about=ABOUT,
    rows=(
        Row("popularity", partial(here_once, popularity_scorer)),
        Row("EASE, centralised", partial(here_once, partial(ease_scorer, l2=1000.0))),
        Row("FedMF", partial(here, build_fedmf, 100), published(67.72, 40.90, source="digest", column="paper, server")),
        Row(
            "FedNCF", partial(here, build_fedncf, 60), published(60.54, 34.17, source="digest", column="paper, server")
        ),
        Row("PFedRec", partial(here, build_pfedrec, 100), published(73.26, 44.36, (1.5, 1.2), source="digest")),
    ),
    metrics=METRICS,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the table."""
    return run_study(STUDY, argv)
