"""What the documents say is what the code does: blocks run, tables are the generated ones, the map is complete."""

import contextlib
import inspect
import io
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import contract
import pytest
import test_contract
from tools_readme import code_map, marked, readme_output

import fedjax_rec

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_readme_example_runs_and_prints_what_the_readme_shows():
    assert readme_output(README) == marked(README, "output").split("```text\n")[1].split("```")[0]


def test_contributing_blocks_run_in_order():
    assert "table" in contributing_names()


@cache
def contributing_names():
    """What the blocks of CONTRIBUTING.md define."""
    scope = {}
    for block in re.findall(r"```python\n(.*?)```", CONTRIBUTING, re.DOTALL):
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(block, "CONTRIBUTING.md", "exec"), scope)
    return scope


def test_the_method_of_contributing_keeps_the_contract(monkeypatch, tmp_path):
    """The new file, the line of the public list and the line of the contract, as written there."""
    monkeypatch.setattr(fedjax_rec, "fedalt", contributing_names()["fedalt"], raising=False)
    (line,) = re.findall(r"```py\n(.*?)```", CONTRIBUTING, re.DOTALL)
    assert line.count("\n") == 1
    monkeypatch.setitem(contract.METHODS, "fedalt", eval(f"{{{line.strip()}}}", vars(contract))["fedalt"])
    test_contract.test_the_withheld_item_is_found("fedalt")
    test_contract.test_an_update_has_the_servers_structure("fedalt")
    test_contract.test_private_values_do_not_appear_on_the_server("fedalt")
    test_contract.test_clients_outside_the_cohort_have_no_influence_and_stay_as_they_are("fedalt")
    test_contract.test_one_user_moves_the_sum_by_no_more_than_the_clip_norm_or_dp_is_refused("fedalt")


def test_every_method_is_public_and_in_the_contract():
    """One file, one line in the public list, one line in the contract."""
    files = {path.stem for path in (ROOT / "fedjax_rec" / "algorithms").glob("*.py")} - {"__init__"}
    public = {value.__module__.rsplit(".", 1)[1] for value in vars(fedjax_rec).values() if is_method(value)}
    # Silos draw for their people (test_example_level_dp.py); counts learn nothing about anybody (test_item_counts.py);
    # a GAN recommends nothing to anybody (test_fedgan.py runs the contract on it).
    elsewhere = {"silo_dpsgd", "item_counts", "fedgan"}
    assert files == public
    files -= elsewhere
    names = Path(contract.__file__).read_text(encoding="utf-8")
    for name in files:
        assert re.search(rf"\bfr\.{name}\(", names), f"{name} is not in tests/contract.py"


def is_method(value) -> bool:
    return inspect.isfunction(value) and value.__module__.startswith("fedjax_rec.algorithms.")


def test_readme_map_names_every_file_of_the_library():
    assert marked(README, "map").strip() == code_map(ROOT).strip()


@pytest.mark.parametrize(
    ("marker", "source"),
    [("frontier", "experiments/results/frontier.md"), ("peers", "benchmarks/results/peers.md")],
)
def test_readme_tables_are_the_generated_ones(marker, source):
    table = [line for line in marked(README, marker).splitlines() if line.startswith("|")]
    assert len(table) > 5
    assert "\n".join(table) in (ROOT / source).read_text(encoding="utf-8")


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
    public = {name: value for name, value in vars(fedjax_rec).items() if not name.startswith("_")}
    public = {name: value for name, value in public.items() if not inspect.ismodule(value)}
    assert len(public) > 50
    for name in public:
        assert (getattr(fedjax_rec, name).__doc__ or "").strip(), f"{name} has no docstring"


def test_the_library_imports_neither_experiments_nor_benchmarks():
    for path in (ROOT / "fedjax_rec").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) (experiments|benchmarks)", path.read_text(), re.MULTILINE), path
