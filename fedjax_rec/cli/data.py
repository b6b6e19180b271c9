"""`fedjax-rec data NAME`: what is in a data set, and how activity and popularity are spread."""

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
    """

    name: Annotated[str, tyro.conf.Positional] = "synthetic"
    """Data set or file, as for train --dataset."""
    data_dir: Path | None = None
    """Folder of the unpacked data set or its zip."""
    plot: Path | None = None
    """Where to write the plot (.svg or .png); data-NAME.svg here by default."""
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
