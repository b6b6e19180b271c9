"""Tables as values, written as Markdown, LaTeX, CSV or for the terminal; a bare epsilon is refused."""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from fedjax_rec.reporting.formatting import (
    INTERVAL,
    MISSING,
    TIMES,
    Cell,
    Estimate,
    format_column,
    is_epsilon_column,
    is_number,
)
from fedjax_rec.reporting.statements import STATEMENT_PARTS, UNITS, in_words

LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "ε": r"$\varepsilon$",
    "δ": r"$\delta$",
    "±": r"$\pm$",
    TIMES: r"$\times$",
    "∞": r"$\infty$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "·": r"$\cdot$",
    MISSING: "--",
}


@dataclass(frozen=True)
class Table:
    """Rows of cells under named columns, with a caption and notes.

    Attributes:
      columns: the headings, all different.
      rows: one tuple of cells a row, as long as `columns`. A cell is a string, a number, an `Estimate` or None.
      caption: one line above the table.
      notes: lines below the table.
      highest: the columns whose highest value is set in bold.
      lowest: the columns whose lowest value is set in bold.

    Raises:
      ValueError: if a row has the wrong length, a name repeats or is unknown, or a column of epsilons lacks its unit,
        delta, neighbouring relation or sampler (as columns of those names, or in caption and notes), or mixes units.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    notes: Sequence[str] = ()
    highest: Sequence[str] = ()
    lowest: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Freeze the sequences into tuples and check them."""
        object.__setattr__(self, "rows", tuple(tuple(row) for row in self.rows))
        for name in ("columns", "notes", "highest", "lowest"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(set(self.columns)) != len(self.columns):
            raise ValueError(f"The columns {list(self.columns)} repeat a name: give each one its own.")
        unknown = sorted({*self.highest, *self.lowest} - set(self.columns))
        if unknown:
            raise ValueError(f"Cannot mark the best of {unknown}: the columns are {list(self.columns)}.")
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"Row {number} has {len(row)} cells for {len(self.columns)} columns: {list(row)}.")
        check_epsilon_statement(self)

    def column(self, name: str) -> tuple[Cell, ...]:
        """The cells under one heading."""
        place = self.columns.index(name)
        return tuple(row[place] for row in self.rows)


def check_epsilon_statement(table: Table) -> None:
    """Refuse epsilons that stand alone: without unit, delta, relation and sampler an epsilon means nothing.

    Raises:
      ValueError: naming the parts that are missing, or the units that share a column.
    """
    for name in table.columns:
        if not is_epsilon_column(name) or not any(is_number(cell) for cell in table.column(name)):
            continue
        said = "\n".join((name, table.caption, *table.notes))
        missing = [
            part
            for part, pattern in STATEMENT_PARTS.items()
            if part not in table.columns and not re.search(pattern, said, flags=re.IGNORECASE)
        ]
        if missing:
            raise ValueError(
                f"The table has a column '{name}' but does not say its {', '.join(missing)}: add the columns, or put "
                "epsilon_label(privacy) in the caption or a note."
            )
        units = _units_beside(table, name)
        if len(units) > 1:
            raise ValueError(
                f"The column '{name}' mixes the units {sorted(units)}: user-level and example-level epsilons are not "
                "comparable, so give each its own column."
            )


def to_markdown(table: Table) -> str:
    """The table as GitHub-flavoured Markdown: caption, aligned table with the best in bold, notes as a list."""
    grid = [[_escape_markdown(text) for text in row] for row in formatted_rows(table)]
    for row, marks in zip(grid, bold_cells(table), strict=True):
        row[:] = [f"**{text}**" if bold else text for text, bold in zip(row, marks, strict=True)]
    head = [_escape_markdown(name) for name in table.columns]
    widths = [max(3, *(len(row[place]) for row in [head, *grid])) for place in range(len(head))]
    right = [is_numeric_column(table, name) for name in table.columns]
    rule = ["-" * (width - 1) + ":" if side else "-" * width for width, side in zip(widths, right, strict=True)]
    lines = [_markdown_row(row, widths, right) for row in [head, rule, *grid]]
    caption = [_escape_markdown(table.caption), ""] if table.caption else []
    notes = ["", *(f"- {_escape_markdown(note)}" for note in table.notes)] if table.notes else []
    return "\n".join([*caption, *lines, *notes]) + "\n"


def to_latex(table: Table, *, label: str | None = None) -> str:
    r"""The table as a LaTeX `table` environment with booktabs rules (needs `\usepackage{booktabs}`).

    Args:
      table: the table.
      label: the name for `\ref`, if any.

    Returns:
      LaTeX source; the notes follow the tabular in small print.
    """
    align = "".join("r" if is_numeric_column(table, name) else "l" for name in table.columns)
    lines = [r"\begin{table}", r"\centering"]
    lines += [rf"\caption{{{_escape_latex(table.caption)}}}"] if table.caption else []
    lines += [rf"\label{{{label}}}"] if label else []
    lines += [rf"\begin{{tabular}}{{{align}}}", r"\toprule", _latex_row(map(_escape_latex, table.columns)), r"\midrule"]
    for row, marks in zip(formatted_rows(table), bold_cells(table), strict=True):
        cells = [_escape_latex(text) for text in row]
        lines.append(
            _latex_row(rf"\textbf{{{text}}}" if bold else text for text, bold in zip(cells, marks, strict=True))
        )
    lines += [r"\bottomrule", r"\end{tabular}"]
    lines += [rf"\par\smallskip{{\footnotesize {_escape_latex(note)}}}" for note in table.notes]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def to_csv(table: Table) -> str:
    """The table as CSV for programs: full precision, empty cells where a value is missing.

    A column of estimates becomes three: `name`, `name low`, `name high`. Caption and notes, with the privacy
    statement, are leading lines that start with `#` (`pandas.read_csv(..., comment="#")`).
    """
    out = io.StringIO()
    for line in (table.caption, *table.notes):
        if line:
            out.write(f"# {_one_line(line)}\n")
    columns = [_csv_columns(name, table.column(name)) for name in table.columns]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([head for heads, _ in columns for head in heads])
    for number in range(len(table.rows)):
        writer.writerow([value for _, values in columns for value in values[number]])
    return out.getvalue()


def to_rich(table: Table, *, max_width: int | None = None) -> RichTable:
    """The table for the terminal; text is shown as it is, never read as rich markup.

    Args:
      table: the table.
      max_width: the characters a line has, e.g. `console.width`. A table that needs more is turned on its side, the
        rows becoming columns, rather than cut.
    """
    headings, numeric = list(table.columns), [is_numeric_column(table, name) for name in table.columns]
    rows, marks = formatted_rows(table), bold_cells(table)
    if max_width is not None and _natural_width(headings, rows, numeric) > max_width:
        headings, rows = _turned([headings, *rows])
        marks = _turned([[False] * len(table.columns), *marks])[1]
        numeric = [False] + [True] * len(table.rows)
    rich = RichTable(
        title=Text(table.caption, style="bold") if table.caption else None,
        caption=Text("\n".join(table.notes)) if table.notes else None,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    columns = []
    for place, name in enumerate(headings):
        texts = [row[place] for row in rows]
        side = "right" if numeric[place] else "left"
        rich.add_column(Text(name, justify=side), min_width=_narrowest(name, texts) if numeric[place] else None)
        columns.append(_line_up(texts) if numeric[place] else [Text(text) for text in texts])
    for number, bold in enumerate(marks):
        cells = [texts[number] for texts in columns]
        for cell, is_best in zip(cells, bold, strict=True):
            cell.style = "bold" if is_best else "dim" if cell.plain.strip() == MISSING else ""
        rich.add_row(*cells)
    return rich


def formatted_rows(table: Table) -> list[list[str]]:
    """Every cell as plain text, formatted column by column (`formatting.format_column`)."""
    texts = [format_column(name, table.column(name)) for name in table.columns]
    return [[column[number] for column in texts] for number in range(len(table.rows))]


def bold_cells(table: Table) -> list[list[bool]]:
    """Which cells are the best of their column; cells that print the same are equally good."""
    texts = formatted_rows(table)
    marks = [[False] * len(table.columns) for _ in table.rows]
    for names, best in ((table.highest, max), (table.lowest, min)):
        for place in (table.columns.index(name) for name in names):
            values = {number: _value(row[place]) for number, row in enumerate(table.rows)}
            values = {number: value for number, value in values.items() if is_number(value)}
            if len(values) < 2:
                continue  # one value alone beats nobody
            winner = best(values, key=values.__getitem__)
            for number, row in enumerate(texts):
                marks[number][place] = number in values and _point(row[place]) == _point(texts[winner][place])
    return marks


def is_numeric_column(table: Table, name: str) -> bool:
    """True if the column holds numbers and gaps only, so that it is set flush right."""
    return all(
        cell is None or isinstance(cell, Estimate) or not isinstance(cell, str | bool) for cell in table.column(name)
    )


def _value(cell: Cell) -> Cell:
    """The number itself, without its interval."""
    return cell.value if isinstance(cell, Estimate) else cell


def _narrowest(heading: str, texts: Sequence[str]) -> int:
    """The width below which a column would break a number or a word of its heading."""
    return max((len(word) for word in [*heading.split(), *texts]), default=1)


def _natural_width(headings: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[bool]) -> int:
    """Characters that a terminal table takes when no cell is wrapped, only headings above numbers."""
    columns = [[row[place] for row in rows] for place in range(len(headings))]
    widths = [
        _narrowest(name, texts) if is_number_column else max(len(text) for text in [name, *texts])
        for name, texts, is_number_column in zip(headings, columns, numeric, strict=True)
    ]
    return sum(width + 2 for width in widths)


def _turned(grid: Sequence[Sequence[Any]]) -> tuple[list[Any], list[list[Any]]]:
    """A grid with rows for columns: its new first row, and the others."""
    first, *others = (list(column) for column in zip(*grid, strict=True))
    return first, others


def _line_up(texts: Sequence[str]) -> list[Text]:
    """The numbers of a column flush right; where some have intervals, flush right on the numbers before them."""
    parts = [text.partition(INTERVAL) for text in texts]
    tail = max((len(sign + half) for _, sign, half in parts), default=0)
    if not tail:
        return [Text(text, justify="right") for text in texts]
    head = max(len(point) for point, _, _ in parts)
    return [Text(point.rjust(head) + sign + half, justify="left") for point, sign, half in parts]


def _point(text: str) -> str:
    """A formatted number without its interval."""
    return text.partition(INTERVAL)[0]


def _units_beside(table: Table, epsilon_column: str) -> set[str]:
    """The units of the rows that have an epsilon in this column, if the table has a column of units."""
    if "unit" not in table.columns:
        return set()
    pairs = zip(table.column("unit"), table.column(epsilon_column), strict=True)
    return {in_words(unit, UNITS) for unit, epsilon in pairs if is_number(epsilon) and unit is not None}


def _one_line(text: str) -> str:
    """The text with every run of white space made one space."""
    return " ".join(text.split())


def _escape_markdown(text: str) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, no cell separators."""
    text = re.sub(r"([\\`*|\[\]])", r"\\\1", _one_line(text))
    text = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)  # an underscore within a word is harmless and common
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _markdown_row(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    """One line of a Markdown table, padded so that its source reads well."""
    padded = [
        text.rjust(width) if side else text.ljust(width) for text, width, side in zip(cells, widths, right, strict=True)
    ]
    return f"| {' | '.join(padded)} |"


def _escape_latex(text: str) -> str:
    """Text that LaTeX shows as it is; hyphens in a row are kept apart, or they would become a dash."""
    text = _one_line(text)
    pairs = zip(text, [*text[1:], ""], strict=False)  # an empty text has none
    return "".join("-{}" if pair == ("-", "-") else LATEX.get(pair[0], pair[0]) for pair in pairs)


def _latex_row(cells: Iterable[str]) -> str:
    """One row of a tabular."""
    return " & ".join(cells) + r" \\"


def _csv_columns(name: str, cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Headings and values that one column becomes in CSV: three if it holds estimates, else one."""
    if not any(isinstance(cell, Estimate) for cell in cells):
        return [name], [[_csv_cell(cell)] for cell in cells]
    bounds = [(cell.value, cell.low, cell.high) if isinstance(cell, Estimate) else (cell, None, None) for cell in cells]
    return [name, f"{name} low", f"{name} high"], [[_csv_cell(value) for value in row] for row in bounds]


def _csv_cell(cell: Cell) -> str:
    """One value for CSV: the shortest text that reads back as the same number."""
    if cell is None or isinstance(cell, str):
        return _one_line(cell or "")
    return repr(cell.item() if hasattr(cell, "item") else cell) if is_number(cell) or isinstance(cell, bool) else ""
