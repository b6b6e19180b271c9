"""What every peer program shares: its arguments and the JSON lines it prints. NumPy is all that it needs."""

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path

from benchmarks import numpy_reference


def arguments(description: str) -> argparse.Namespace:
    """The command line of a peer program: `u_data`, `items`, `rounds`, `warmup`, `check`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("u_data", type=Path, help="a GroupLens u.data file")
    parser.add_argument("--items", type=int, default=None, help="rows of the item table (default: as in the file)")
    parser.add_argument("--rounds", type=int, default=6, help="rounds to time, warm-up included")
    parser.add_argument("--warmup", type=int, default=1, help="first rounds that are marked as warm-up")
    parser.add_argument("--check", action="store_true", help="first compare a round without noise to NumPy")
    return parser.parse_args()


class Report:
    """Prints one JSON line for every round and one for the check, all with the program's name, device and versions."""

    def __init__(self, peer: str, options: argparse.Namespace, *, device: str, packages: tuple[str, ...]):
        self.options = options
        self.stamp = {
            "peer": peer,
            "device": device,
            "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in packages},
        }

    def round(self, *, number: int, seconds: float, clients: int, items: int) -> None:
        """Prints the time of round `number` in seconds."""
        timing = {"round": number, "warmup": number < self.options.warmup, "seconds": seconds}
        print(json.dumps(self.stamp | {"items": items, "clients": clients} | timing), flush=True)

    def check(self, params: numpy_reference.Params, expected: numpy_reference.Params) -> None:
        """Prints the largest difference of the parameters after one round without noise from the NumPy reference's."""
        difference = numpy_reference.max_abs_difference(params, expected)
        items = len(expected["items"])
        print(json.dumps(self.stamp | {"items": items, "max_abs_difference": difference}), flush=True)
