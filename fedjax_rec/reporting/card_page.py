"""The data card as a page: one HTML file that needs no network and no script."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from fedjax_rec.data.interactions import Interactions
from fedjax_rec.reporting.figures import Panel, inline_svg
from fedjax_rec.reporting.formatting import format_epsilon
from fedjax_rec.reporting.html import TEMPLATES, flatten, panel_view, table_view
from fedjax_rec.reporting.statements import epsilon_label, statement_parts
from fedjax_rec.reporting.style import to_svg
from fedjax_rec.reporting.tables import Table
from fedjax_rec.reporting.virtual_plots import co_occurrence_against, lengths_against, popularity_against

OWNERS_ONLY = (
    "Pictures and numbers under “Real against virtual”, “Utility” and “Risk” are computed on real users without noise: "
    "epsilon does not cover them. Keep this page; hand out the data with its public card."
)
REHEARSAL = "The noise came from a seed: whoever guesses it can subtract the noise. A rehearsal, not for handing out."
WITHOUT = "Fitted without differential privacy: not for handing out."


class Section(NamedTuple):
    """A part of the page: a heading, sentences, and tables."""

    title: str
    sentences: Sequence[str]
    tables: Sequence[Table]


def comparison_panels(real: Interactions, virtual: Interactions) -> list[Panel]:
    """The three pictures of real against virtual users, on one catalogue."""
    drawn = (
        ("Popularity", popularity_against, "Each item's share of users. Noise lifts the tail, low rank lowers it."),
        ("History lengths", lengths_against, "The virtual ones are drawn from a released histogram."),
        ("Co-occurrence", co_occurrence_against, "What a recommender learns from: which items go together."),
    )
    return [
        Panel(title, inline_svg(to_svg(draw(real, virtual)), name=title.lower().replace(" ", "-"), title=title), text)
        for title, draw, text in drawn
    ]


def write_card_page(
    path: Path, card: Mapping[str, Any], *, panels: Sequence[Panel] = (), sections: Sequence[Section] = ()
) -> Path:
    """Writes the page; whole, or not at all.

    Args:
      path: of the page.
      card: from `synthesis.card.data_card`.
      panels: from `comparison_panels`.
      sections: utility and risk.
    """
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        unfinished.write_text(render(card, panels=panels, sections=sections), encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def render(card: Mapping[str, Any], *, panels: Sequence[Panel] = (), sections: Sequence[Section] = ()) -> str:
    """The page as one HTML document."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    what, privacy = card["what"], card["privacy"]
    stamp = {key: what[key] for key in ("file", "sha256")} | (card["stamp"] or {})
    page = {
        "title": f"{what['num_users']:,} virtual users of {what['source']}",
        "subtitle": f"generator {what['generator']} · {what['num_items_in_catalogue']:,} items in the catalogue · "
        f"{what['num_interactions']:,} interactions · {'in time order' if what['time_order'] else 'no time order'}",
        "notices": _notices(card, compared=bool(panels or sections)),
        "cards": _cards(card),
        "label": None if privacy is None else epsilon_label(privacy),
        "privacy": privacy,
        "ledger": None if privacy is None else table_view(ledger_table(privacy["releases"])),
        "panels": [panel_view(panel) for panel in panels],
        "sections": [
            {"title": s.title, "sentences": s.sentences, "tables": [table_view(t) for t in s.tables]} for s in sections
        ],
        "intended": card["intended_uses"],
        "unsafe": card["unsafe_uses"],
        "choices": flatten(card["choices"]),
        "stamp": flatten(stamp),
    }
    return environment.get_template("card.html.j2").render(page)


def ledger_table(releases: Sequence[Mapping[str, Any]]) -> Table:
    """What was released, one line each."""
    columns = ("phase", "what became visible", "mechanism", "releases", "who takes part")
    return Table(columns, [(r["phase"], r["released"], r["mechanism"], r["count"], r["sampler"]) for r in releases])


def _notices(card: Mapping[str, Any], *, compared: bool) -> list[str]:
    privacy = card["privacy"]
    found = [OWNERS_ONLY] if compared else []
    if privacy is None:
        return [*found, WITHOUT]
    return [*found, REHEARSAL] if privacy["noise_from"].startswith("seed") else found


def _cards(card: Mapping[str, Any]) -> list[dict[str, str]]:
    what, privacy = card["what"], card["privacy"]
    first = {"name": "privacy", "value": "none", "detail": "no differential privacy"}
    if privacy is not None:
        first = {
            "name": "ε",
            "value": format_epsilon(float(privacy["epsilon"])),
            "detail": ", ".join(statement_parts(privacy)),
        }
    per_user = what["num_interactions"] / max(what["num_users"], 1)
    return [
        first,
        {"name": "virtual users", "value": f"{what['num_users']:,}", "detail": "fixed in advance"},
        {"name": "interactions", "value": f"{what['num_interactions']:,}", "detail": f"{per_user:.0f} a user"},
        *((card.get("evaluation") or {}).get("highlights") or ()),
    ]
