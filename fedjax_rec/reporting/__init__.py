"""Tables (Markdown, LaTeX, CSV, terminal), figures, and the HTML report of a run.

The names here load no plotting library. Figures are in `reporting.plots` (`style.to_svg`, `style.to_png` write them),
and `reporting.html.write_report(run_dir)` writes the report.
"""

from fedjax_rec.reporting.formatting import Estimate, format_delta, format_epsilon, format_number
from fedjax_rec.reporting.run_tables import ledger_table, result_table
from fedjax_rec.reporting.statements import epsilon_label
from fedjax_rec.reporting.tables import Table, to_csv, to_latex, to_markdown, to_rich

__all__ = [
    "Estimate",
    "Table",
    "epsilon_label",
    "format_delta",
    "format_epsilon",
    "format_number",
    "ledger_table",
    "result_table",
    "to_csv",
    "to_latex",
    "to_markdown",
    "to_rich",
]
