"""Writes the generated parts of the README: `python tests/tools_readme.py`. The tests check that they are current."""

import ast
import contextlib
import io
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def marked(text: str, marker: str) -> str:
    """What stands between ``<!-- marker -->`` and the next comment."""
    return re.search(rf"<!-- {marker} -->\n(.*?)<!-- ", text, re.DOTALL).group(1)


def readme_output(text: str) -> str:
    """What the README's example prints."""
    code = marked(text, "example").split("```python\n")[1].split("```")[0]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    return printed.getvalue()


def code_map(root: Path) -> str:
    """One line a file: its path and the first sentence of its docstring."""
    lines = ["```text"]
    for folder in sorted({path.parent for path in (root / "fedjax_rec").rglob("*.py")}):
        lines.append(f"{folder.relative_to(root)}/")
        for path in sorted(folder.glob("*.py")):
            summary = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()[0]
            lines.append(f"  {path.name:24} {summary}")
    return "\n".join([*lines, "```"]) + "\n"


def peers_table(root: Path) -> str:
    """The table of the benchmark against peers, and the line that says where and when it was measured."""
    lines = (root / "benchmarks" / "results" / "peers.md").read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if line.startswith("|")]
    where = next(line for line in lines if line.startswith("Programs took turns"))
    return "\n".join([*table, "", where]) + "\n"


def main() -> None:
    """Replaces the map, the example's output and the table of peers."""
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    output = f"```text\n{readme_output(text)}```\n"
    for marker, content in (("map", code_map(ROOT)), ("output", output), ("peers", peers_table(ROOT))):
        old = marked(text, marker)
        text = text.replace(f"<!-- {marker} -->\n{old}", f"<!-- {marker} -->\n{content}")
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
