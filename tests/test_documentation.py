"""What the documents say is what the code does: blocks run, tables are the generated ones, the map is complete."""

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tools_readme import code_map, marked, readme_output

import fedjax_rec

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_readme_example_runs_and_prints_what_the_readme_shows():
    assert readme_output(README) == marked(README, "output").split("```text\n")[1].split("```")[0]


def test_contributing_blocks_run_in_order():
    scope = {}
    for block in re.findall(r"```python\n(.*?)```", CONTRIBUTING, re.DOTALL):
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(block, "CONTRIBUTING.md", "exec"), scope)
    assert "table" in scope


def test_readme_map_names_every_file_of_the_library():
    assert marked(README, "map").strip() == code_map(ROOT).strip()


@pytest.mark.parametrize(
    ("marker", "source"),
    [("epsilon-sweep", "experiments/results/epsilon_sweep.md"), ("peers", "benchmarks/results/peers.md")],
)
def test_readme_tables_are_the_generated_ones(marker, source):
    table = [line for line in marked(README, marker).splitlines() if line.startswith("|")]
    assert len(table) > 5
    generated = (ROOT / source).read_text(encoding="utf-8").splitlines()
    assert [line for line in generated if line.startswith("|")] == table


def test_main_command_is_a_command_of_this_program():
    command = marked(README, "main-command").split("```bash\n")[1].split("```")[0]
    verb = command.split("&&")[1].split()
    assert verb[:2] == ["fedjax-rec", "train"]
    found = subprocess.run(
        [sys.executable, "-c", "from fedjax_rec.cli.main import entry; entry()", "train", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    for flag in (word for word in verb if word.startswith("--")):
        assert flag in found.stdout


def test_every_public_name_is_documented():
    for name in fedjax_rec.__all__:
        assert (getattr(fedjax_rec, name).__doc__ or "").strip(), f"{name} has no docstring"


def test_the_library_imports_neither_experiments_nor_benchmarks():
    for path in (ROOT / "fedjax_rec").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) (experiments|benchmarks)", path.read_text(), re.MULTILINE), path
