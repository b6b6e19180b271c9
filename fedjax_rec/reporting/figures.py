"""The figures of a run's report: which of them its files allow, each as SVG ready to stand inside an HTML page."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import escape
from matplotlib.figure import Figure

from fedjax_rec.reporting import plots, style
from fedjax_rec.reporting.formatting import format_number, is_number
from fedjax_rec.reporting.run_files import RunFiles, find, mapping, series
from fedjax_rec.reporting.run_tables import primary_metric

# Colours become CSS variables, so that a page can lighten them in the dark.
CSS_COLOURS = {
    style.INK: "ink",
    style.MUTED: "muted",
    style.GRID: "grid",
    style.BLUE: "blue",
    style.VERMILION: "vermilion",
    style.GREEN: "green",
    style.PINK: "pink",
}
REFERENCES = {"non_private": "non-private", "popularity": "popularity", "dp_popularity": "DP popularity"}


@dataclass(frozen=True)
class Panel:
    """A titled figure of the report, or the sentence that says why there is none.

    Attributes:
      title: the heading.
      svg: inline SVG, or None.
      text: the caption, or what is missing.
    """

    title: str
    svg: str | None
    text: str


def training_panels(run: RunFiles, *, statement: str | None) -> list[Panel]:
    """Quality, epsilon and loss over rounds.

    Args:
      run: its files.
      statement: what belongs beside its epsilon (unit, relation, sampler, delta). Without one, logged epsilons are not
        drawn, and a sentence says so.
    """
    metric = validation_metric(run)
    rounds, values = series(run.metrics, "validation", metric)
    references, where = _references(run.result, metric)
    best_round = run.result.get("best_round")
    panels = [_missing("Quality", "The run has not been validated yet.")]
    if rounds:
        best = f" The dot marks round {best_round}, the best one." if best_round in rounds else ""
        caption = f"{metric} of the validation items, every user's full ranking.{best}{where}"
        figure = plots.quality_curve(rounds, values, metric=metric, references=references, best_round=best_round)
        panels = [_panel("Quality", figure, caption)]

    epsilon_rounds, epsilons = series(run.metrics, "epsilon")
    if epsilons and statement is None:
        panels.append(_missing("Privacy spent", "Not drawn: unit, relation, sampler or δ of its ε is not recorded."))
    elif epsilons:
        budget = budget_of(run)
        said = f"Everything released up to each round, composed jointly: {statement}."
        said += " The dashed line is the budget." if budget is not None else ""
        panels.append(_panel("Privacy spent", plots.epsilon_curve(epsilon_rounds, epsilons, budget=budget), said))
        spent = dict(zip(epsilon_rounds, epsilons, strict=True))
        pairs = [(spent[number], value) for number, value in zip(rounds, values, strict=True) if number in spent]
        if pairs:
            figure = plots.quality_against_epsilon(*zip(*pairs, strict=True), metric=metric, references=references)
            panels.append(_panel("Quality for privacy", figure, f"The same {metric} against the ε spent to reach it."))

    loss_rounds, losses = series(run.metrics, "loss")
    if losses:
        panels.append(_panel("Loss", plots.loss_curve(loss_rounds, losses), "Training loss as the clients report it."))
    return panels


def user_panel(result: Mapping[str, Any]) -> Panel:
    """How the primary metric is spread over users."""
    metric = primary_metric(result)
    spread = mapping(mapping(result.get("per_user")).get(metric))
    histogram = mapping(spread.get("histogram"))
    edges, counts = histogram.get("edges"), histogram.get("counts")
    if not (_numbers(edges) and _numbers(counts) and len(edges) == len(counts) + 1):
        return _missing("Users", "The run has no per-user metrics.")
    marks = {name: spread[name] for name in ("p10", "p50", "p90", "mean") if is_number(spread.get(name))}
    worst = spread.get("worst_decile_mean")
    said = f"{metric} of each of {int(sum(counts)):,} test users."
    said += f" The worst-served tenth of them has a mean of {format_number(worst)}." if is_number(worst) else ""
    return _panel("Users", plots.user_histogram(edges, counts, metric=metric, percentiles=marks), said)


def item_panel(result: Mapping[str, Any]) -> Panel:
    """Who is recommended: exposure over items, from the most popular to the long tail."""
    exposure = mapping(result.get("exposure"))
    shares = exposure.get("cumulative_share")
    if not _numbers(shares) or len(shares) < 2:
        return _missing("Items", "The run has no record of which items it recommends.")
    observed = exposure.get("interactions_cumulative_share")
    coverage = exposure.get("coverage@10", mapping(result.get("test")).get("coverage@10"))
    said = "Share of all top-10 slots that the most popular items take; the dotted diagonal is equal exposure."
    said += f" coverage@10, the share of items in anybody's top 10: {format_number(coverage)}." if coverage else ""
    figure = plots.exposure_curve(shares, interactions_share=observed if _numbers(observed) else None)
    return _panel("Items", figure, said)


def validation_metric(run: RunFiles) -> str:
    """The metric of the quality curve: the primary one if it was validated, else the first that was."""
    logged = next((mapping(row["validation"]) for row in run.metrics if row.get("validation")), {})
    primary = primary_metric(run.result)
    return primary if primary in logged or not logged else next(iter(logged))


def budget_of(run: RunFiles) -> float | None:
    """The epsilon that the run may not exceed, from its ledger or its configuration."""
    budget = run.ledger.get("budget")
    epsilon = mapping(budget).get("epsilon") if isinstance(budget, Mapping) else budget
    if epsilon is None:
        epsilon = find(run.config, "epsilon", "target_epsilon", "epsilon_budget")
    return float(epsilon) if is_number(epsilon) else None


def inline_svg(svg: str, *, name: str, title: str) -> str:
    """A standalone SVG made fit for an HTML page: its own ids, the page's font and colours, the width of its place.

    Args:
      svg: as `style.to_svg` writes it.
      name: a prefix for its ids, different for each figure of a page.
      title: what it shows, for readers who do not see it.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", svg, count=1, flags=re.DOTALL)
    used = set(re.findall(r"#([\w.-]+)(?=[\")])", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'xlink:href="#', f'href="#{name}-', svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    for colour, variable in CSS_COLOURS.items():
        svg = svg.replace(colour, f"var(--{variable})")
    view_box = re.search(r'viewBox="([^"]*)"', svg)[1]
    opening = f'<svg viewBox="{view_box}" role="img" aria-label="{escape(title)}">'
    return re.sub(r"<svg[^>]*>", lambda _: opening, svg, count=1)


def _panel(title: str, figure: Figure, text: str) -> Panel:
    """A figure with its heading and caption."""
    name = re.sub(r"\W+", "-", title.lower())
    return Panel(title=title, svg=inline_svg(style.to_svg(figure), name=name, title=title), text=text)


def _missing(title: str, text: str) -> Panel:
    """A heading with the sentence that stands in place of a figure."""
    return Panel(title=title, svg=None, text=text)


def _references(result: Mapping[str, Any], metric: str) -> tuple[dict[str, float], str]:
    """Baselines to draw beside a validation curve, and the sentence that says where they were measured."""
    for key, where in (("validation_baselines", ""), ("baselines", " The lines are baselines on the test items.")):
        baselines = mapping(result.get(key))
        values = {label: mapping(baselines.get(name)).get(metric) for name, label in REFERENCES.items()}
        values = {label: float(value) for label, value in values.items() if is_number(value)}
        if values:
            return values, where
    return {}, ""


def _numbers(values: object) -> bool:
    """True for a list of numbers that is not empty."""
    return isinstance(values, Sequence) and len(values) > 0 and all(is_number(value) for value in values)
