"""Noise in shares: what integers of so many bits cost in epsilon, with everybody honest and with some who are not.

No training: the same chain that `fedjax-rec train --privacy.mechanism skellam_shares` builds is asked for its event.
"""

import argparse
from collections.abc import Sequence

from dp_accounting import GaussianDpEvent, SelfComposedDpEvent
from dp_accounting.rdp import RdpAccountant

import fedjax_rec as fr
from experiments.harness import RESULTS
from fedjax_rec.reporting.tables import Table, to_markdown

NUM_NUMBERS, NUM_CLIENTS, ROUNDS, DELTA = 65_536, 100, 100, 1e-5
NOISES = (5.0, 10.0)
COLLUDING = 10
BITS = (12, 14, 16, 18)
ORDERS = range(2, 513)
ABOUT = (
    f"One round sums {NUM_CLIENTS} clients' updates of {NUM_NUMBERS:,} numbers, clipped to L2 norm 1, rotated, and "
    "rounded so that four standard deviations of the noise fit into the signed range; "
    f"{ROUNDS} rounds, delta {DELTA:g}, user-level, replace one user, everybody takes part. Beside it the Gaussian of "
    "the same multiplier, added by a trusted server, by Renyi divergences of whole orders, the only ones for which "
    "Skellam noise has a bound."
)


def epsilon(event) -> float:
    """User-level, replace-one, of all rounds, by RDP."""
    composed = SelfComposedDpEvent(event, ROUNDS)
    return fr.privacy_spent(composed, delta=DELTA, relation="replace_one", accountant="RDP").epsilon


def shares_event(mechanism: str, bits: int, noise: float):
    """The event of one round."""
    points = fr.fixed_point(
        largest=4 * noise, max_clients=NUM_CLIENTS, bits=bits, rotation=True, num_numbers=NUM_NUMBERS
    )
    bounded = fr.chain(fr.clip_by_global_norm(1.0), points)
    stddev = (2 ** (bits - 1) - 1) / 4  # noise times the clip norm before rounding, as the Gaussian's, in steps
    if mechanism == "skellam":
        shares = fr.skellam_shares(stddev, min_clients=NUM_CLIENTS)
    else:
        shares = fr.discrete_gaussian_shares(stddev, min_clients=NUM_CLIENTS, num_numbers=NUM_NUMBERS)
    return fr.chain(bounded, shares).dp_event(fr.UNBOUNDED, 0)


def rows(bits: Sequence[int]) -> list[tuple]:
    """Noise multiplier, bits, mechanism, epsilon, that over the Gaussian's, and epsilon with colluding clients."""
    found = []
    for noise in NOISES:
        replaced = GaussianDpEvent(noise / 2)  # replacing a user moves the sum by two clip norms
        gaussian = RdpAccountant(ORDERS).compose(SelfComposedDpEvent(replaced, ROUNDS)).get_epsilon(DELTA)
        for b in bits:
            for mechanism in ("skellam", "discrete Gaussian"):
                event = shares_event(mechanism, b, noise)
                honest = fr.without_colluders(event, colluding=COLLUDING, min_clients=NUM_CLIENTS)
                found.append((noise, b, mechanism, epsilon(event), epsilon(event) / gaussian, epsilon(honest)))
    return found


def main(argv: Sequence[str] | None) -> int:
    """Prints the table, and writes it unless it is a smoke run."""
    parser = argparse.ArgumentParser(prog="python -m experiments shares", description=ABOUT)
    parser.add_argument("--smoke", action="store_true", help="16 bits only; writes nothing")
    args = parser.parse_args(argv)
    shown = [
        (f"{noise:g}", b, mechanism, f"{eps:.2f}", f"{ratio:.3f}", f"{honest:.2f}")
        for noise, b, mechanism, eps, ratio, honest in rows((16,) if args.smoke else BITS)
    ]
    head = (
        "noise multiplier",
        "bits",
        "shares of",
        "user-level epsilon",
        "over the Gaussian's",
        f"epsilon if {COLLUDING} clients collude",
    )
    note = f"User-level, replace one, all clients take part, delta = {DELTA:g}."
    page = f"# Noise in shares, by bits\n\n{ABOUT}\n\n{to_markdown(Table(head, shown, notes=(note,)))}\n"
    page += "\nFewer than 12 bits are refused. Written by `python -m experiments shares`.\n"
    print(page)
    if not args.smoke:
        (RESULTS / "shares.md").write_text(page, encoding="utf-8")
    return 0
