"""`fedjax-rec explain RUN --user U`: why a user is recommended what a saved run recommends."""

import dataclasses
import difflib
import json
import re
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro

if TYPE_CHECKING:
    from fedjax_rec.data.interactions import Interactions
    from fedjax_rec.interpretation.explain import Explanation
    from fedjax_rec.interpretation.value import HistoryModel
    from fedjax_rec.runs.checkpoint import Checkpoint
    from fedjax_rec.runs.experiment import Experiment

LEAST_L2 = 1e-3  # a re-fit without any might have no minimum
NUM_PAIRS = {True: 16, False: 4}  # of Shapley's orders; a re-fitted vector takes far longer than a forward pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExplainConfig:
    """Explain the recommendations of one user of a run: which items of the history they rest on, and what would be
    recommended without these.

    fedjax-rec explain runs/mine --user 42

    fedjax-rec explain runs/mine --user 42 --item "Toy Story (1995)" --method shapley

    Prints the reasons, and writes explain_USER.html with pictures and explain_USER.svg into the run directory. What it
    reads and writes is private: it stands for what a client computes for its own user, and no epsilon covers it.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory."""
    user: str
    """The user, as the data set names it."""
    item: str | None = None
    """Explain this item alone, by its id in the data set or its title; the top of the list by default."""
    method: Literal["integrated_gradients", "shapley", "removal"] = "integrated_gradients"
    """How effects are shared out among the items of the history."""
    top: int = 5
    """Recommended items to explain."""
    list_length: int = 10
    """Length of the list that an item could be pushed out of."""
    seed: int = 0
    """Of the orders that Shapley values are sampled from."""
    checkpoint: Literal["auto", "best", "last"] = "auto"
    """Which checkpoint; auto is the one the run itself tested."""
    data_dir: Path | None = None
    """Folder of the data set, if it has moved since the run."""
    json: bool = False
    """Print one JSON object and nothing else."""


class Explained(NamedTuple):
    """What is explained: the recommender as a function of the history, the user's history, and what to know of both."""

    model: "HistoryModel"
    history: np.ndarray
    notes: tuple[str, ...]


def run(config: ExplainConfig) -> int:
    """Explains, prints, and writes the page and its picture into the run directory.

    Returns:
      0. Errors are raised as sentences, for `main` to print.
    """
    import jax
    from rich.console import Console

    from fedjax_rec.cli.evaluate import load_trained
    from fedjax_rec.interpretation.explain import explain, recommend
    from fedjax_rec.interpretation.sentences import sentences
    from fedjax_rec.reporting.html import write_report
    from fedjax_rec.runs import directory

    if config.top < 1 or config.list_length < 1:
        raise ValueError(f"--top and --list-length are numbers from 1 on; got {config.top} and {config.list_length}.")
    experiment, found = load_trained(config.run, data_dir=config.data_dir, checkpoint=config.checkpoint)
    train = experiment.split.train
    user = find_user(train, config.user)
    explained = history_model(experiment, found, user)
    wanted = None if config.item is None else find_item(train, config.item)
    if not len(explained.history):
        raise ValueError(
            f"User {config.user} has no interactions in the part of the data that the run trained on, so there is "
            "nothing to explain a recommendation with; it gets what everybody without a history gets."
        )
    if wanted is not None and wanted in explained.history:
        raise ValueError(
            f"User {config.user} has already met {named(train, wanted)}, so it is not recommended; leave --item out to "
            "see what is."
        )
    items = recommend(explained.model, explained.history, top=config.top) if wanted is None else [wanted]
    made = [
        explain(
            explained.model,
            explained.history,
            int(item),
            method=config.method,
            k=config.list_length,
            key=jax.random.fold_in(jax.random.key(config.seed), int(item)),
            num_pairs=NUM_PAIRS[experiment.method.sequence_model is not None],
        )
        for item in items
    ]
    paths = _write(config, experiment, found, explained, made)
    if (config.run / directory.RESULT).is_file():
        write_report(config.run)
    if config.json:
        print(json.dumps(as_json(config, train, explained, made), allow_nan=False))
        return 0
    console = Console(highlight=False, soft_wrap=True, markup=False)
    for explanation in made:
        first, *rest = sentences(explanation, lambda item: named(train, item))
        console.print(f"{explanation.place:>4}. {first}")
        for sentence in rest:
            console.print(f"      {sentence}")
    for note in explained.notes:
        console.print(f"note  {note}")
    for what, path in paths.items():
        console.print(f"{what:8}{path}")
    return 0


def history_model(experiment: "Experiment", found: "Checkpoint", user: int) -> Explained:
    """The trained recommender of a run as a function of one user's history."""
    import jax.numpy as jnp

    from fedjax_rec.data.split import shown_at_test
    from fedjax_rec.interpretation.explain import recommend
    from fedjax_rec.interpretation.refit import Refit, refitted_history_model
    from fedjax_rec.interpretation.value import sequence_history_model

    shared, saved = found.state.shared, experiment.config
    if experiment.method.sequence_model is not None:
        rows = shown_at_test(experiment.split)
        return Explained(sequence_history_model(experiment.method.sequence_model, shared), rows.items_of(user), ())
    train = experiment.split.train
    history, labels = train.items_of(user), None
    if saved.data.use_ratings:
        rows = slice(train.offsets[user], train.offsets[user + 1])
        history, rated = history[~np.isnan(train.ratings[rows])], train.ratings[rows][~np.isnan(train.ratings[rows])]
        labels = jnp.ones(train.num_items).at[history].set(rated)
    refit = Refit(
        saved.model.loss,
        max(saved.model.l2, LEAST_L2),
        0 if saved.data.use_ratings else saved.client.num_negatives,
        saved.model.label_mean,
    )
    model = refitted_history_model(shared.tables["item"], shared.tables["bias"][:, 0], refit, labels=labels)
    notes = ()
    if len(history):
        ours = recommend(model, history, top=10)
        scores = experiment.method.score(shared, {"user": found.private["user"][user]})
        trained = np.argsort(-np.asarray(scores.at[history].set(-jnp.inf)), kind="stable")[: len(ours)]
        notes = (
            "The run keeps a vector for each user, which training fitted to the history. To see what an item of the "
            "history does, the client fits its vector anew with and without it, to the item vectors of the run; the "
            f"list is that of the vector so fitted. {len(np.intersect1d(ours, trained))} of its first {len(ours)} are "
            "also among the first by the vector that training left.",
        )
    return Explained(model, history, notes)


def find_user(data: "Interactions", label: str) -> int:
    """The id of a user by its label.

    Raises:
      ValueError: if there is none, with the nearest.
    """
    labels = data.user_labels.astype(str)
    found = np.flatnonzero(labels == label)
    if not len(found):
        near = difflib.get_close_matches(label, labels.tolist(), n=1, cutoff=0.0)
        raise ValueError(
            f"There is no user {label!r} among the {len(labels):,} of {data.name}, from {labels[0]} to {labels[-1]}; "
            f"did you mean {near[0]!r}?"
        )
    return int(found[0])


def find_item(data: "Interactions", text: str) -> int:
    """The id of an item by its label, or by its title in any case.

    Raises:
      ValueError: if there is none, with the nearest.
    """
    labels = data.item_labels.astype(str).tolist()
    if text in labels:
        return labels.index(text)
    titles = [] if data.item_titles is None else [str(title).casefold() for title in data.item_titles]
    if text.casefold() in titles:
        return titles.index(text.casefold())
    (near,) = difflib.get_close_matches(text.casefold(), titles or labels, n=1, cutoff=0.0)
    near = str(data.item_titles[titles.index(near)]) if titles else near
    raise ValueError(f"There is no item {text!r} in the catalogue of {data.name}; did you mean {near!r}?")


def named(data: "Interactions", item: int) -> str:
    """The title of an item, or its label."""
    if data.item_titles is not None and str(data.item_titles[item]):
        return str(data.item_titles[item])
    label = str(data.item_labels[item])
    return f"item {label}" if label.isdecimal() else label


def file_stem(label: str) -> str:
    """What the files of a user are called: the label, and a checksum where it has letters that a path should not."""
    plain = re.sub(r"[^\w.-]", "-", label, flags=re.ASCII)
    return f"explain_{plain}" if plain == label else f"explain_{plain}-{zlib.crc32(label.encode()):08x}"


def as_json(
    config: ExplainConfig, data: "Interactions", explained: Explained, made: list["Explanation"]
) -> dict[str, Any]:
    """All explanations as JSON values."""
    from fedjax_rec.interpretation.sentences import sentences

    def one(explanation):
        out = explanation.out
        return {
            "item": str(data.item_labels[explanation.item]),
            "name": named(data, explanation.item),
            "place": explanation.place,
            "sentences": sentences(explanation, lambda item: named(data, item)),
            "history": [str(data.item_labels[item]) for item in explanation.history],
            "values": [float(value) for value in explanation.values],
            "places_without": [int(place) for place in explanation.places_without],
            "pushed_out_by": None if out is None else [int(place) for place in out.history_places],
            "total": explanation.total,
            "remainder": explanation.remainder,
            "seconds": round(explanation.seconds, 3),
        }

    return {
        "user": config.user,
        "method": config.method,
        "notes": list(explained.notes),
        "explanations": [one(explanation) for explanation in made],
    }


def _write(
    config: ExplainConfig,
    experiment: "Experiment",
    found: "Checkpoint",
    explained: Explained,
    made: list["Explanation"],
) -> dict[str, Path]:
    """The page, and the picture of the first explanation by itself."""
    from fedjax_rec.interpretation.explain import METHODS
    from fedjax_rec.reporting.explain_page import write_explanation_page
    from fedjax_rec.reporting.explain_plots import attribution_bars
    from fedjax_rec.reporting.style import to_svg
    from fedjax_rec.runs.stamp import stamp

    train = experiment.split.train
    stem = config.run / file_stem(config.user)
    page, picture = stem.with_name(stem.name + ".html"), stem.with_name(stem.name + ".svg")
    settings = {
        "run": str(config.run),
        "round": found.progress["round"],
        "user": config.user,
        "items in the history": len(explained.history),
        "method": METHODS[config.method],
        "seconds": round(sum(explanation.seconds for explanation in made), 1),
        "stamp": stamp(
            seed=config.seed,
            data_fingerprint=experiment.interactions.fingerprint,
            split_fingerprint=experiment.split.fingerprint,
        ),
    }

    def name(item):
        return named(train, item)

    picture.write_text(to_svg(attribution_bars(made[0], name)), encoding="utf-8")
    write_explanation_page(
        page,
        made,
        name,
        title=f"Why user {config.user} is recommended this",
        subtitle=f"{train.name} · {experiment.method.title} · {len(explained.history):,} items in the history",
        notes=explained.notes,
        settings=settings,
    )
    return {"page": page, "picture": picture}
