"""Local differential privacy: each client adds noise to its own update before it sends it, and trusts nobody.

`local_gaussian` and `local_laplace` are links of the update chain that run on the client, after a clip. The noise goes
on every entry of every table: on the rows that a client touched alone it would show which ones they are. A chain may
also add noise on the server; each of the two noises is accounted alone, for another trust model, in another ledger.
"""

import math
from collections.abc import Callable

import dp_accounting
import jax
from dp_accounting.dp_event import DpEvent

from fedjax_rec.federated.round import Rounds
from fedjax_rec.federated.rows import Rows, is_rows, whole_size, whole_tables
from fedjax_rec.federated.transforms import UpdateTransform, Wire
from fedjax_rec.privacy.accounting import PrivacySpent
from fedjax_rec.privacy.events import describe
from fedjax_rec.privacy.formulas import shuffled_epsilon
from fedjax_rec.privacy.ledger import Ledger
from fedjax_rec.privacy.noise import standard_laplace, standard_normal

MAX_UPDATE_BYTES = 1 << 26
"""Largest noised update of one client, in bytes: the clients of a chunk hold one each, side by side."""


def local_gaussian(stddev: float, *, max_update_bytes: int = MAX_UPDATE_BYTES) -> UpdateTransform:
    """Every client adds N(0, ``stddev``^2) to each number of its update: all rows of every table, every dense leaf.

    The server sums n updates, so the sum carries noise of standard deviation ``sqrt(n) * stddev``.

    Guarantee: user-level; replacing one client's whole data (a report is always sent, so there is no adding or
    removing); what is released is that client's report of one round, to anybody, the server included. After a clip at
    C it is a Gaussian mechanism of noise multiplier ``stddev / C``, whose sensitivity the accountant doubles. Nothing
    amplifies it: neither sampling, as a server sees who reports, nor the sum, as it sees each report. The link claims
    nothing about the sum: a server's noise after it is accounted by itself, and never borrows this one.

    Args:
      stddev: in units of the update, positive.
      max_update_bytes: refuse whole updates above that; see ``MAX_UPDATE_BYTES``.

    Raises:
      ValueError: if ``stddev`` is not positive and finite; from `chain`, if no earlier link bounds the L2 norm; when a
        round is made, if the tables are too large.
    """
    _check_scale("standard deviation", stddev)

    def dp_event(bound, round_index):
        del round_index
        if bound.l2 == math.inf:
            raise ValueError("local_gaussian needs an earlier link that bounds the L2 norm: put a clip before it.")
        return dp_accounting.GaussianDpEvent(stddev / bound.l2)

    return _noise_of_clients(lambda key, shape: stddev * standard_normal(key, shape), dp_event, max_update_bytes)


def local_laplace(scale: float, *, max_update_bytes: int = MAX_UPDATE_BYTES) -> UpdateTransform:
    """Every client adds Laplace(0, ``scale``) noise to each number of its update, as `local_gaussian` does.

    Guarantee: as there, with the Laplace mechanism of an update whose L1 norm is at most C1: pure, and by itself
    ``2 C1 / scale`` under replacing one client's data. A bound on the L2 norm alone gives none.

    Args:
      scale: mean absolute noise in units of the update, positive; its standard deviation is ``sqrt(2) * scale``.
      max_update_bytes: as in `local_gaussian`.

    Raises:
      ValueError: as `local_gaussian`, for the L1 norm.
    """
    _check_scale("scale", scale)

    def dp_event(bound, round_index):
        del round_index
        if bound.l1 == math.inf:
            raise ValueError(
                "local_laplace needs an earlier link that bounds the L1 norm: put clip_by_l1_norm before it."
            )
        return dp_accounting.LaplaceDpEvent(scale / bound.l1)

    return _noise_of_clients(lambda key, shape: scale * standard_laplace(key, shape), dp_event, max_update_bytes)


def _check_scale(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(
            f"The {name} of a client's noise must be positive and finite; got {value}. Without noise, leave it out."
        )


def _noise_of_clients(draw: Callable, dp_event: Callable, max_update_bytes: int) -> UpdateTransform:
    def client(update, state, key):
        del state
        leaves, structure = jax.tree.flatten(whole_tables(update), is_leaf=is_rows)
        keys = jax.random.split(key, len(leaves))
        return jax.tree.unflatten(structure, [add(leaf, k) for leaf, k in zip(leaves, keys, strict=True)]), {}

    def add(leaf, key):
        if not is_rows(leaf):
            return leaf + draw(key, leaf.shape)
        return Rows(leaf.ids, leaf.values + draw(key, leaf.values.shape), leaf.num_rows, whole=True)

    return UpdateTransform(
        client=client,
        sensitivity=lambda bound: bound._replace(noised=True, integers=False),
        local_dp_event=dp_event,
        upload=lambda wire, update: whole_wire(update, max_bytes=max_update_bytes),
    )


def whole_wire(update, *, max_bytes: int = MAX_UPDATE_BYTES) -> Wire:
    """An update with whole tables, 32 bits a number.

    Raises:
      ValueError: with both numbers, if it is larger than ``max_bytes``.
    """
    num_bytes = 4 * whole_size(update)
    if num_bytes > max_bytes:
        raise ValueError(
            f"Noise on every entry makes a client's update {num_bytes:,} bytes, above the limit of {max_bytes:,}, and "
            "a chunk holds one for each of its clients. Train fewer items or a smaller dim, use k_randomized_response, "
            "which sends one row, or raise max_update_bytes and lower chunk_size."
        )
    return Wire(num_bytes / 4)


def charge_local(
    ledger: Ledger, rounds: Rounds, *, first_round: int, num_rounds: int, phase: str = "training"
) -> Ledger:
    """A ledger of trust model "local" with what one client sends in those rounds; ``rounds.charge`` fills the central.

    Keep both where a chain adds both noises: they answer different questions about the same run, and do not add up.

        local = Ledger(relation="replace_one", trust_model="local")
        local = charge_local(local, rounds, first_round=0, num_rounds=10)

    Guarantee: of the ledger's unit, for a client that takes part in all of those rounds, and so for whoever takes part
    in fewer; replace-one; released are all of its reports, to anybody.

    Args:
      ledger: of trust model "local" and relation "replace_one".
      rounds: whose clients add noise; a user's event also bounds what one of its interactions costs.
      first_round: counts from 0, as ``state.round`` does.
      num_rounds: how many.
      phase: as in the ledger's entries.

    Raises:
      ValueError: for another kind of ledger, clients without noise, or one interaction's event in a ledger of users.
    """
    if (ledger.trust_model, ledger.relation) != ("local", "replace_one"):
        raise ValueError(
            f"Clients' own noise needs a ledger of trust model 'local' and relation 'replace_one'; got "
            f"{ledger.trust_model!r} and {ledger.relation!r}. Keep a second ledger and report both."
        )
    if rounds.local_unit == "example" and ledger.unit == "user":
        raise ValueError(
            "These reports are accounted for one interaction, which says nothing of a user's whole history; use a "
            "ledger with unit='example', or make the link with unit='user'."
        )
    events = rounds.local_releases(first_round, num_rounds)
    if not events:
        raise ValueError("No client adds noise in these rounds, so its report has no epsilon; put a local link in.")
    for event, count in events:
        ledger = ledger.record(event, phase=phase, released="one client's own report", sampler="all", count=count)
    return ledger


def local_epsilon(event: DpEvent) -> float:
    """The pure epsilon (delta 0) of ONE client's report: the largest log ratio of any report's probability.

    Guarantee: replace-one; of the unit that the event is about. ``2 / noise_multiplier`` for Laplace noise,
    ``log(1 + k (1 - p) / p)`` for randomised response over k buckets, sums of them for compositions.

    Raises:
      ValueError: for events without one, such as Gaussian noise.
    """
    match event:
        case dp_accounting.NoOpDpEvent():
            return 0.0
        case dp_accounting.LaplaceDpEvent() if event.noise_multiplier > 0:
            return 2 / event.noise_multiplier
        case dp_accounting.dp_event.RandomizedResponseDpEvent() if event.noise_parameter > 0:
            return math.log1p(event.num_buckets * (1 - event.noise_parameter) / event.noise_parameter)
        case dp_accounting.SelfComposedDpEvent():
            return event.count * local_epsilon(event.event)
        case dp_accounting.ComposedDpEvent():
            return sum(local_epsilon(part) for part in event.events)
    raise ValueError(
        f"{describe(event)} has no pure epsilon: at delta 0 it protects nothing. Use Laplace noise, randomised "
        "response or PrivUnit on the client."
    )


def shuffled_spent(
    rounds: Rounds, *, num_reports: int, delta: float, first_round: int, num_rounds: int
) -> PrivacySpent:
    """What the reports of some rounds show to somebody who gets each round's reports in random order.

    Each round is bounded by `shuffled_epsilon` at ``delta / num_rounds``; the rounds are then summed, epsilons and
    deltas (basic composition).

    Guarantee: user-level; replace-one; released are the shuffled reports of all rounds. Assumed are a trusted shuffler,
    that every client of a cohort reports in one message, and that the cohort has at least ``num_reports`` clients,
    publicly: all clients or a fixed number of them.

    Args:
      rounds: whose clients send reports with a pure epsilon.
      num_reports: reports shuffled together in each round, at least.
      delta: of all the rounds together.
      first_round: counts from 0.
      num_rounds: how many.

    Raises:
      ValueError: where the theorem does not hold: Gaussian reports, none at all, too large a local epsilon, cohorts of
        random size, or an epsilon of one interaction, as a theorem about clones needs that of all of a user's data.
    """
    if rounds.sampler not in ("all", "fixed_size"):
        raise ValueError(
            f"Shuffling hides a report among a known number of others; a cohort drawn as {rounds.sampler!r} has a "
            "random one. Use full_participation(n, relation='replace_one') or fixed_size."
        )
    if rounds.local_unit != "user":
        raise ValueError(
            "Amplification by shuffling needs the local epsilon of a whole report, and this one is of one interaction; "
            "make the link with unit='user'."
        )
    events = rounds.local_releases(first_round, num_rounds)
    if not events:
        raise ValueError("No client adds noise in these rounds, and a shuffle alone protects nothing.")
    epsilon = 0.0
    for event, count in events:
        each = shuffled_epsilon(local_epsilon(event), num_reports=num_reports, delta=delta / num_rounds)
        epsilon += count * each
    return PrivacySpent(epsilon, delta, "shuffling theorem", "user", "replace_one")
