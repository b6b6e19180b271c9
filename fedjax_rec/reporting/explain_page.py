"""Explanations of one user's recommendations as one HTML file that needs no network and no script."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from fedjax_rec.interpretation.explain import METHODS, Explanation
from fedjax_rec.interpretation.sentences import Naming, reasons, sentences, signed
from fedjax_rec.reporting.explain_plots import attribution_bars
from fedjax_rec.reporting.figures import Panel, inline_svg
from fedjax_rec.reporting.html import TEMPLATES, flatten, panel_view, table_view
from fedjax_rec.reporting.style import to_svg
from fedjax_rec.reporting.tables import Table

PRIVATE = (
    "This page shows what one user did. A client computes it from its own history, which never leaves it; the "
    "simulation does so in its place. No epsilon covers the page: it is for that user alone, and not for handing out "
    "with the report."
)
NUM_REASONS = 5


def write_explanation_page(
    path: Path,
    explanations: Sequence[Explanation],
    name: Naming,
    *,
    title: str,
    subtitle: str,
    notes: Sequence[str] = (),
    settings: Mapping[str, Any],
) -> Path:
    """Writes the page; whole, or not at all.

    Args:
      path: of the page.
      explanations: one for each recommended item, in order.
      name: the title of an item, by id.
      title: of the page.
      subtitle: which run, which user.
      notes: what a reader should know beside that the page is private.
      settings: what made it, with the stamp.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("explanation.html.j2").render(
        title=title,
        subtitle=subtitle,
        notices=[PRIVATE, *notes],
        items=[_item(explanation, name) for explanation in explanations],
        how=how_to_read(explanations[0]),
        settings=flatten(settings),
    )
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        unfinished.write_text(page, encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def how_to_read(explanation: Explanation) -> str:
    """What the numbers of a page are."""
    meaning = {
        "integrated_gradients": "They sum to the whole difference that the history makes to an item, up to the error "
        "of the integral that stands below it.",
        "shapley": "They are averages over sampled orders in which the history could have grown, and sum to the whole "
        "difference that it makes to an item.",
        "removal": "Each is the loss by removing that one item, so effects that items have together are counted in "
        "none or in several, and the sum may be far from the whole difference.",
    }
    return (
        f"Numbers are {METHODS[explanation.method]} of the score over its mean in the catalogue. "
        f"{meaning[explanation.method]} A place without an item is where the recommendation would stand if the user "
        "had never met that item: the list is made anew, and items of the history stay out of it."
    )


def reason_table(explanation: Explanation, name: Naming, *, num_reasons: int = NUM_REASONS) -> Table:
    """The strongest reasons, and where the item would be without each."""
    rows = [
        (
            name(int(explanation.history[place])),
            signed(explanation.values[place]),
            f"{explanation.places_without[place]:,}",
        )
        for place in reasons(explanation)[:num_reasons]
    ]
    return Table(("because of", "adds", "place without it"), rows)


def _item(explanation: Explanation, name: Naming) -> dict[str, Any]:
    title = name(explanation.item)
    svg = inline_svg(to_svg(attribution_bars(explanation, name)), name=f"item{explanation.item}", title=title)
    checks = f"The history makes a difference of {signed(explanation.total)}; {_remainder(explanation)}."
    table = reason_table(explanation, name)
    return {
        "heading": f"{explanation.place:,}. {title}",
        "sentences": sentences(explanation, name),
        "panels": [panel_view(Panel("What each item adds", svg, checks))],
        "table": table_view(table) if table.rows else None,
    }


def _remainder(explanation: Explanation) -> str:
    if explanation.method == "shapley":
        return f"the largest standard error of a bar is {explanation.error:.2g}"
    return f"the bars leave {signed(explanation.remainder)} of it unexplained"
