"""Tables: numbers are formatted honestly, formats lose nothing, and a bare epsilon is refused."""

import csv
import io
import json
import math
import re

import numpy as np
import pytest
from dp_accounting import dp_event
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from fedjax_rec.privacy.ledger import Ledger
from fedjax_rec.reporting import (
    Estimate,
    Table,
    epsilon_label,
    format_delta,
    format_epsilon,
    format_number,
    ledger_table,
    result_table,
    to_csv,
    to_latex,
    to_markdown,
    to_rich,
)
from fedjax_rec.reporting.formatting import MISSING, TIMES, format_bytes, format_column, format_seconds
from fedjax_rec.reporting.run_tables import describe_event
from fedjax_rec.reporting.tables import LATEX, bold_cells, formatted_rows

PRIVACY = {"epsilon": 7.98, "delta": 1e-5, "unit": "user", "relation": "add_remove_one", "sampler": "poisson"}
RESULT = {
    "test": {"ndcg@10": 0.0812, "hit@10": 0.1569, "recall@20": 0.2344, "coverage@10": 0.2117, "mrr@10": 0.0711},
    "interval": {"ndcg@10": [0.0704, 0.0923]},
    "baselines": {
        "popularity": {"ndcg@10": 0.0567, "hit@10": 0.1103, "recall@20": 0.1803, "coverage@10": 0.0541, "mrr@10": 0.05},
        "non_private": {
            "ndcg@10": 0.0914,
            "hit@10": 0.1761,
            "recall@20": 0.267,
            "coverage@10": 0.2913,
            "mrr@10": 0.0786,
        },
        "dp_popularity": {
            "ndcg@10": 0.0561,
            "hit@10": 0.1092,
            "privacy": {**PRIVACY, "epsilon": 0.371, "sampler": "all"},
        },
    },
    "privacy": PRIVACY,
    "dataset": {"name": "movielens/100k", "num_items": 1682},
    "split": {"rule": "leave_one_out", "tie_rule": "hash", "seed": 0, "fingerprint": "3f9c0d" * 10},
}

# Text with everything that some format reads as markup.
HOSTILE = r"a|b & 50% of $x_1$ #{~^} \n *bold* `code` <script>alert(1)</script> [red]x[/red] _em_ ε±"
texts = st.text(alphabet=st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=12)
numbers = st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False), st.integers(-(10**9), 10**9))


def read_markdown(source: str) -> list[list[str]]:
    """The cells of a Markdown table, its escapes undone."""
    lines = [line for line in source.splitlines() if line.startswith("| ")]
    rows = [re.split(r" *(?<!\\)\| *", line.strip())[1:-1] for line in lines]
    return [[unescape_markdown(cell) for cell in row] for row in [rows[0], *rows[2:]]]


def unescape_markdown(cell: str) -> str:
    cell = re.sub(r"^\*\*(.*)\*\*$", r"\1", cell)
    cell = cell.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    return re.sub(r"\\([\\`*|\[\]_])", r"\1", cell)


def read_latex(source: str) -> list[list[str]]:
    """The cells of a LaTeX tabular, its escapes undone."""
    body = re.search(r"\\toprule\n(.*)\\bottomrule", source, flags=re.DOTALL)[1]
    rows = [line.removesuffix(r" \\") for line in body.splitlines() if line.endswith(r" \\")]
    return [[unescape_latex(cell) for cell in row.split(" & ")] for row in rows]


def unescape_latex(cell: str) -> str:
    cell = re.sub(r"^\\textbf\{(.*)\}$", r"\1", cell)
    back = {escaped: plain for plain, escaped in LATEX.items()} | {"-{}": "-"}
    pattern = "|".join(re.escape(escaped) for escaped in sorted(back, key=len, reverse=True))
    return re.sub(pattern, lambda found: back[found[0]], cell)


def printed(table: Table, width: int) -> str:
    """The table as a terminal of this width shows it."""
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(to_rich(table, max_width=width))
    return console.file.getvalue()


def test_numbers_look_the_same_everywhere():
    assert format_column("ndcg@10", [0.04123, None, math.nan, 1.0]) == [".0412", MISSING, MISSING, "1.0000"]
    assert format_column("ndcg@10", [Estimate(0.0412, 0.0381, 0.0443), 0.05]) == [".0412 ± .0031", ".0500"]
    assert format_column("items", [1682, 3706, None]) == ["1,682", "3,706", MISSING]
    assert format_column("vs popularity", [1.4321, None]) == [f"1.43{TIMES}", MISSING]
    assert format_column("loss", [-0.5, 0.25]) == ["-.5000", ".2500"]
    assert format_column("ms", [12.5, 0.5]) == ["12.50", "0.50"]
    assert format_column("x", [np.float32(2.25), np.float64(0.5), True]) == ["2.25", "0.50", "yes"]
    assert format_column("x", [np.int32(3), 4]) == ["3", "4"]
    assert format_column("x", [1e-7, 0.5]) == ["1e-07", "0.5"]
    assert format_column("x", [math.inf, -math.inf]) == ["∞", "-∞"]
    assert format_number(0.0412) == ".0412"


@pytest.mark.parametrize(
    ("epsilon", "text"),
    [
        (7.98, "7.98"),
        (7.9801, "7.99"),
        (8.0, "8.00"),
        (0.371, "0.38"),
        (0.0123, "0.013"),
        (0.0, "0.00"),
        (math.inf, "∞"),
    ],
)
def test_epsilon_is_never_rounded_down(epsilon: float, text: str):
    assert format_epsilon(epsilon) == text


@given(st.floats(1e-6, 1e6))
def test_a_printed_epsilon_is_at_least_the_epsilon(epsilon: float):
    assert float(format_epsilon(epsilon)) >= epsilon


@given(st.floats(1e-12, 1.0))
def test_a_printed_delta_is_at_least_the_delta(delta: float):
    assert float(format_delta(delta)) >= delta


def test_delta_and_sizes():
    assert [format_delta(x) for x in (1e-5, 1e-4, 1.061e-3, 8e-6, 0.25, 0.0)] == [
        "1e-5",
        "1e-4",
        "1.07e-3",
        "8e-6",
        "0.25",
        "0",
    ]
    assert [format_bytes(x) for x in (412, 18_400, 1.2e9, None)] == ["412 B", "18.4 kB", "1.20 GB", MISSING]
    assert [format_seconds(x) for x in (0.0031, 41.24, 725, 10_920)] == ["3.1 ms", "41.2 s", "12 min 5 s", "3 h 2 min"]


def test_epsilon_label_says_the_whole_statement():
    assert epsilon_label(PRIVACY) == "ε = 7.98 (user-level, add/remove one, Poisson, δ = 1e-5)"
    assert epsilon_label(None) == "no DP"


@pytest.mark.parametrize("part", ["epsilon", "delta", "unit", "relation", "sampler"])
def test_epsilon_label_refuses_an_incomplete_statement(part: str):
    with pytest.raises(ValueError, match=f"lacks {part}"):
        epsilon_label({name: value for name, value in PRIVACY.items() if name != part})


@pytest.mark.parametrize("heading", ["epsilon", "ε", "target epsilon", "Epsilon (user-level)"])
def test_a_bare_epsilon_column_is_refused(heading: str):
    with pytest.raises(ValueError, match=r"does not say its .*delta, relation, sampler"):
        Table(columns=("model", heading), rows=[("fedmf", 7.98)])


@pytest.mark.parametrize(
    "caption",
    [
        "ε at δ = 1e-5, add/remove one, Poisson",  # no unit
        "user-level, add/remove one, Poisson",  # no delta
        "user-level, δ = 1e-5, Poisson",  # no relation
        "user-level, δ = 1e-5, add/remove one",  # no sampler
    ],
)
def test_an_incomplete_caption_is_refused(caption: str):
    with pytest.raises(ValueError, match="does not say its"):
        Table(columns=("model", "epsilon"), rows=[("fedmf", 7.98)], caption=caption)


def test_a_stated_epsilon_is_accepted_in_caption_notes_or_columns():
    said = epsilon_label(PRIVACY)
    assert Table(columns=("epsilon",), rows=[(7.98,)], caption=said).caption == said
    assert Table(columns=("epsilon",), rows=[(7.98,)], notes=[said]).notes == (said,)
    columns = ("epsilon", "unit", "delta", "relation", "sampler")
    table = Table(columns=columns, rows=[(7.98, "user", 1e-5, "add/remove one", "poisson")])
    assert formatted_rows(table) == [["7.98", "user", "1e-5", "add/remove one", "poisson"]]
    unknown = epsilon_label({**PRIVACY, "sampler": "balls_in_bins", "relation": "edge"})
    assert Table(columns=("epsilon",), rows=[(1.0,)], caption=unknown).caption == unknown


def test_a_column_of_gaps_needs_no_statement():
    assert to_markdown(Table(columns=("model", "epsilon"), rows=[("popularity", None)])).count(MISSING) == 1


def test_user_level_and_example_level_never_share_a_column():
    columns = ("epsilon", "unit", "delta", "relation", "sampler")
    rows = [(8.0, "user", 1e-5, "add/remove one", "poisson"), (1.0, "example", 1e-5, "add/remove one", "poisson")]
    with pytest.raises(ValueError, match="mixes the units"):
        Table(columns=columns, rows=rows)


def test_shape_errors_are_sentences():
    with pytest.raises(ValueError, match="Row 1 has 1 cells for 2 columns"):
        Table(columns=("a", "b"), rows=[(1, 2), (3,)])
    with pytest.raises(ValueError, match="repeat a name"):
        Table(columns=("a", "a"), rows=[])
    with pytest.raises(ValueError, match=r"Cannot mark the best of \['c'\]"):
        Table(columns=("a", "b"), rows=[], highest=("c",))


def test_the_best_is_bold_and_ties_share_it():
    table = Table(
        columns=("model", "ndcg@10", "seconds"),
        rows=[("a", 0.04121, 3.0), ("b", 0.04119, 1.0), ("c", 0.03, None)],
        highest=("ndcg@10",),
        lowest=("seconds",),
    )
    assert bold_cells(table) == [[False, True, False], [False, True, True], [False, False, False]]
    assert to_markdown(table).count("**.0412**") == 2
    assert to_latex(table).count(r"\textbf{.0412}") == 2
    assert not any(map(any, bold_cells(Table(columns=("x",), rows=[(1.0,)], highest=("x",)))))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(texts, numbers, numbers), max_size=5), texts, texts)
@example([], "--", "---")
def test_markdown_and_latex_keep_every_cell(rows: list, heading: str, caption: str):
    columns = (f"{heading} name", "value a", "value b")
    table = Table(columns=columns, rows=rows, caption=caption, notes=[caption], highest=("value a",))
    expected = [list(columns), *formatted_rows(table)]
    assert read_markdown(to_markdown(table)) == expected
    assert read_latex(to_latex(table)) == expected


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(texts, numbers, numbers), max_size=5))
def test_csv_keeps_full_precision(rows: list):
    source = to_csv(Table(columns=("name", "a", "b"), rows=rows))
    header, *read = list(csv.reader(io.StringIO(source)))
    assert header == ["name", "a", "b"]
    assert [row[0] for row in read] == [row[0] for row in rows]
    assert [[float(cell) if cell else None for cell in row[1:]] for row in read] == [list(row[1:]) for row in rows]


def test_csv_spells_out_intervals_and_the_privacy_statement():
    lines = to_csv(result_table(RESULT)).splitlines()
    assert any(line.startswith("# ") and epsilon_label(PRIVACY) in line for line in lines)
    header, first, *_ = list(csv.reader(line for line in lines if not line.startswith("#")))
    read = dict(zip(header, first, strict=True))
    assert (read["ndcg@10"], read["ndcg@10 low"], read["ndcg@10 high"]) == ("0.0812", "0.0704", "0.0923")
    assert read["epsilon"] == "7.98"


def test_hostile_text_stays_text():
    table = Table(columns=("name", "x"), rows=[(HOSTILE, 1.0)], caption=HOSTILE, notes=[HOSTILE])
    assert "<script" not in to_markdown(table)
    assert read_markdown(to_markdown(table))[1][0] == HOSTILE
    assert read_latex(to_latex(table))[1][0] == HOSTILE
    assert "[red]x[/red]" in printed(table, 300)


def test_result_table_has_the_rows_that_make_a_number_honest():
    table = result_table(RESULT)
    assert table.columns == (
        "model",
        "ndcg@10",
        "hit@10",
        "recall@20",
        "coverage@10",
        "mrr@10",
        "epsilon",
        "vs popularity",
    )
    assert [(row[0], row[-2]) for row in formatted_rows(table)] == [
        ("this run (user-level DP)", "7.98"),
        ("same configuration, non-private", MISSING),
        ("popularity", MISSING),
        ("popularity (user-level DP)", "0.38"),
    ]
    assert [row[-1] for row in formatted_rows(table)] == [
        f"1.43{TIMES}",
        f"1.61{TIMES}",
        f"1.00{TIMES}",
        f"0.99{TIMES}",
    ]
    said = "\n".join(table.notes)
    assert "this run (user-level DP): ε = 7.98 (user-level, add/remove one, Poisson, δ = 1e-5)" in said
    assert "popularity (user-level DP): ε = 0.38 (user-level, add/remove one, all clients, δ = 1e-5)" in said
    assert "ties by hash, seed 0, fingerprint 3f9c0d3f9c0d" in said


def test_result_table_of_a_run_without_privacy():
    result = {**RESULT, "privacy": None, "baselines": {"popularity": RESULT["baselines"]["popularity"]}}
    assert [row[0] for row in result_table(result).rows] == ["this run (no DP)", "popularity"]


def test_result_table_gives_each_unit_its_own_column():
    result = {**RESULT, "privacy": {**PRIVACY, "unit": "example"}}
    table = result_table(result)
    assert table.column("epsilon (example-level)")[0] == 7.98
    assert table.column("epsilon (user-level)")[0] is None
    assert table.column("epsilon (user-level)")[3] == 0.371


def test_result_table_hides_an_epsilon_whose_statement_is_incomplete():
    bare = {"ndcg@10": 0.0561, "epsilon": 1.0}
    table = result_table({**RESULT, "baselines": {**RESULT["baselines"], "dp_popularity": bare}})
    assert table.rows[-1][0] == "popularity (incomplete privacy statement)"
    assert table.column("epsilon")[-1] is None


@pytest.mark.parametrize(
    "result", [{}, {"test": {}}, {"test": {"ndcg@10": math.nan}, "baselines": {"popularity": None}}]
)
def test_result_table_survives_missing_parts(result: dict):
    assert "this run (no DP)" in to_markdown(result_table(result))


@pytest.mark.parametrize("width", [80, 100, 140])
def test_no_number_is_cut_in_the_terminal(width: int):
    shown = printed(result_table(RESULT), width)
    assert max(map(len, shown.splitlines())) <= width
    assert "…" not in shown
    for row in formatted_rows(result_table(RESULT)):
        assert all(text in shown for text in row[1:])


def test_ledger_table_lists_what_was_released():
    training = dp_event.PoissonSampledDpEvent(0.1, dp_event.GaussianDpEvent(1.1))
    ledger = Ledger().record(training, phase="training", released="item table", sampler="poisson", count=300)
    (row,) = formatted_rows(ledger_table(json.loads(ledger.to_json())))
    assert row == [
        "training", "item table", "Poisson(0.1, Gaussian(1.1))", "300", "user-level", "add/remove one", "Poisson",
    ]  # fmt: skip
    assert ledger_table({}).rows == ()
    assert formatted_rows(ledger_table({"entries": [{"phase": "x"}, "noise"]})) == [["x", *6 * [MISSING]]]


def test_unknown_events_are_shown_as_stored():
    assert describe_event({"type": "FutureDpEvent", "z": 1}) == '{"type": "FutureDpEvent", "z": 1}'
    assert describe_event("Gaussian(2)") == "Gaussian(2)"


def test_an_infinite_epsilon_is_no_number_to_hide():
    table = result_table({**RESULT, "privacy": {**PRIVACY, "epsilon": "inf"}})
    assert formatted_rows(table)[0][-2] == "∞"
