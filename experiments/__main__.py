"""Runs a table or study by its name: `python -m experiments NAME`, `python -m experiments --list`."""

import ast
import difflib
import importlib
import sys
from pathlib import Path

import jax

from fedjax_rec.data.cache import default_cache_dir

HELPERS = {"__init__", "__main__", "harness", "ranked"}


def names() -> list[str]:
    """The studies in this folder, in alphabetical order."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return [file.stem for file in files if file.stem not in HELPERS and not file.stem.startswith("_")]


def main(argv: list[str]) -> int:
    """Runs one study with the rest of the arguments, or lists them."""
    if argv == ["--list"]:
        print("\n".join(names()))
        return 0
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__, end="\n\n")
        for name in names():
            first = ast.get_docstring(ast.parse((Path(__file__).parent / f"{name}.py").read_text("utf-8")))
            print(f"  {name:<16} {first.splitlines()[0]}")
        return 0
    if argv[0] not in names():
        near = difflib.get_close_matches(argv[0], names(), n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        print(f"There is no study {argv[0]!r}.{hint} `python -m experiments --list` prints them.", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(f"experiments.{argv[0]}").main(argv[1:])
    except (OSError, ValueError) as error:
        print(f"experiments {argv[0]}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    jax.config.update("jax_compilation_cache_dir", str(default_cache_dir() / "xla"))  # seeds share what is compiled
    sys.exit(main(sys.argv[1:]))
