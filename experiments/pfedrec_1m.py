"""PFedRec's main table on MovieLens 1M: the rows of `pfedrec`, where the paper's values were seen in others' tables.

PFedRec took seven minutes for a seed, both protocols, on one of two CPU cores with work on the other too; FedNCF and
the centralised NCF take several times as long. GPU times were not measured. Published values are of Zhang et al.
(2023), "Dual Personalization on Federated Recommendation".
"""

from collections.abc import Sequence
from functools import partial

from experiments import pfedrec as table
from experiments._centralised import build_mf, build_mlp
from experiments.harness import Row, Study
from experiments.harness import main as run_study
from experiments.pfedrec import build_fedmf, build_fedncf, build_fedrecon, build_pfedrec
from experiments.ranked import ml_1m
from fedjax_rec.models.ease import ease_scorer
from fedjax_rec.models.popularity import popularity_scorer

trained, together, once = (
    partial(run, dataset=ml_1m) for run in (table.trained, table.trained_together, table.trained_once)
)
published = partial(table.published, source="digest")
averaged = partial(published, column="paper, server")

STUDY = Study(
    name="pfedrec_1m",
    title="PFedRec's table on MovieLens 1M",
    about=table.ABOUT,
    rows=(
        Row("popularity", partial(once, popularity_scorer)),
        Row("EASE, centralised", partial(once, partial(ease_scorer, l2=1000.0))),
        Row("MF, centralised", partial(together, build_mf, 50), published(68.45, 41.37)),
        Row("NCF, centralised", partial(together, build_mlp, 50), published(64.17, 37.85)),
        Row("FedMF", partial(trained, build_fedmf, 100), averaged(67.72, 40.90)),
        Row("FedNCF", partial(trained, build_fedncf, 60), averaged(60.54, 34.17)),
        Row("FedRecon", partial(trained, build_fedrecon, 60), averaged(63.28, 36.59)),
        Row("PFedRec", partial(trained, build_pfedrec, 100), published(73.26, 44.36, (1.5, 1.2))),
    ),
    metrics=table.METRICS,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the table."""
    return run_study(STUDY, argv)
