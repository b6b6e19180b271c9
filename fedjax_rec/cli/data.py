"""`fedjax-rec data NAME`: what is in a data set, how activity and popularity are spread, and its split as files."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Statistics of a data set, and a plot of activity and popularity.

    fedjax-rec data synthetic

    fedjax-rec data movielens/100k --data-dir ~/data/ml-100k --plot ml-100k.svg

    fedjax-rec data movielens/100k --data-dir ~/data/ml-100k --freeze split-strict
    """

    name: Annotated[str, tyro.conf.Positional] = "synthetic"
    """Data set or file, as for train --dataset."""
    data_dir: Path | None = None
    """Folder of the unpacked data set or its zip."""
    plot: Path | None = None
    """Where to write the plot (.svg or .png); data-NAME.svg here by default."""
    freeze: Path | None = None
    """Write the split of --protocol and its hash into this folder, which must be empty or new; draws no plot."""
    protocol: str = "strict_99"
    """For --freeze: pfedrec_paper, fedrap_paper, ncf, strict_99, strict_full or paper_full. Those that rank a number of
    negatives get a candidate file too."""
    json: bool = False
    """Print one JSON object and draw nothing, unless --plot is given."""


def run(config: DataConfig) -> int:
    """Prints the statistics and writes the plot."""
    from rich.console import Console

    from fedjax_rec.data import load, statistics
    from fedjax_rec.reporting import Table, to_rich
    from fedjax_rec.reporting.plots import activity_popularity
    from fedjax_rec.reporting.style import to_png, to_svg

    if config.plot is not None and config.plot.suffix not in (".svg", ".png"):
        raise ValueError(f"--plot must end in .svg or .png; got {config.plot}.")
    interactions = load(config.name, data_dir=config.data_dir)
    if config.freeze is not None:
        return _freeze(interactions, config)
    found = statistics(interactions)
    if config.json:
        print(json.dumps(dataclasses.asdict(found), default=str))
    else:
        rows = tuple((name.replace("_", " "), value) for name, value in dataclasses.asdict(found).items())
        Console().print(to_rich(Table(columns=("statistic", "value"), rows=rows, caption=interactions.name)))
    path = config.plot
    if path is None and not config.json:
        path = Path(f"data-{interactions.name.replace('/', '-')}.svg")
    if path is not None:
        figure = activity_popularity(interactions.counts_per_user, interactions.item_counts)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            path.write_bytes(to_png(figure))
        else:
            path.write_text(to_svg(figure), encoding="utf-8")
        if not config.json:
            print(f"Plot: {path}")
    return 0


def _freeze(interactions, config: DataConfig) -> int:
    from fedjax_rec.data import draw_candidates, freeze
    from fedjax_rec.evaluation.protocol import PRESETS

    if config.protocol not in PRESETS:
        raise ValueError(f"--protocol must be one of {', '.join(PRESETS)}; got {config.protocol!r}.")
    protocol = PRESETS[config.protocol]
    split = protocol.split(interactions)
    if protocol.num_negatives is not None:
        split = draw_candidates(split, num_negatives=protocol.num_negatives, seed=protocol.split_seed)
    fingerprint = freeze(split, config.freeze)
    counts = ", ".join(f"{getattr(split, part).num_interactions} {part}" for part in ("train", "validation", "test"))
    print(f"{protocol.describe()}\n{interactions.name}: {counts}\nFrozen in {config.freeze}: {fingerprint}")
    return 0
