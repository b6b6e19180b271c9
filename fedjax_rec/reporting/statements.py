"""Privacy statements in words: what must stand beside every epsilon."""

import math
from collections.abc import Mapping
from typing import Any

from fedjax_rec.reporting.formatting import format_delta, format_epsilon, format_number, is_number

STATEMENT = ("epsilon", "delta", "unit", "relation", "sampler")

# What must stand beside an epsilon, and how to recognise it in a caption or a note.
STATEMENT_PARTS = {
    "unit": r"\b\w+-level\b",
    "delta": r"(δ|\bdelta)\s*=\s*\S",
    "relation": r"\b(add/remove|replace|neighbou?rs)\b",
    "sampler": r"(\bPoisson\b|\bwithout replacement\b|\ball clients\b|\bsampling\b|\bin turn\b)",
}

UNITS = {"user": "user-level", "example": "example-level"}
RELATIONS = {
    "add_remove": "add/remove one",
    "add_remove_one": "add/remove one",
    "add_or_remove_one": "add/remove one",
    "replace": "replace one",
    "replace_one": "replace one",
    "replace_special": "replace special",
}
SAMPLERS = {
    "poisson": "Poisson",
    "fixed_size": "fixed-size without replacement",
    "without_replacement": "without replacement",
    "all": "all clients",
    "all_clients": "all clients",
    "full": "all clients",
    "full_participation": "all clients",
    "in_turn": "groups in turn",
    "poisson_in_turn": "Poisson within groups in turn",
}


def epsilon_label(privacy: Mapping[str, Any] | None) -> str:
    """A whole privacy statement in one line: `ε = 7.98 (user-level, add/remove one, Poisson, δ = 1e-5)`.

    Args:
      privacy: a mapping with `epsilon`, `delta`, `unit`, `relation` and `sampler`, or None for a run without
        differential privacy.

    Returns:
      The label; `no DP` for None. Epsilon and delta are rounded up.

    Raises:
      ValueError: if one of the five is missing.
    """
    if privacy is None:
        return "no DP"
    return f"ε = {format_epsilon(privacy.get('epsilon'))} ({', '.join(statement_parts(privacy))})"


def audit_line(
    privacy: Mapping[str, Any] | None, *, audit: Mapping[str, Any], membership: Mapping[str, Any], run: str = "RUN"
) -> str:
    """What a run claims, what an audit found at least, and what an attack reached, in one line.

    Args:
      privacy: the run's statement, as for `epsilon_label`.
      audit: the content of audit.json, or {}: `lower_bound_fdp` or `lower_bound` ("inf" for infinity), `passed`,
        `claimed_epsilon`, which is that of the audited rounds alone, `num_rounds`, `run_rounds`, `num_canaries`,
        `confidence`.
      membership: the content of membership.json: `auc`, `auc_error`, `attack`, `auc_ceiling`, `bug`; or {}.
      run: the run directory, for the command that makes up for what is missing.
    """
    # The first, and not the larger: the better of two bounds no longer holds at the confidence of each.
    found = [math.inf if audit.get(name) == "inf" else audit.get(name) for name in ("lower_bound_fdp", "lower_bound")]
    bound = next((value for value in found if is_number(value)), None)
    auc = membership.get("auc")
    if bound is None and not is_number(auc):
        return f"not audited: run fedjax-rec audit privacy {run}"
    parts = ["no ε claimed" if privacy is None else f"claimed ε = {format_epsilon(privacy['epsilon'])}"]
    if bound is not None:
        how, claimed = [], audit.get("claimed_epsilon")
        if is_number(audit.get("num_rounds")) and is_number(audit.get("run_rounds")):
            how.append(f"{audit['num_rounds']:,} of {audit['run_rounds']:,} rounds")
        how += [f"for which {format_epsilon(claimed)} is claimed"] if is_number(claimed) else []
        how += [f"{audit['num_canaries']:,} canaries"] if is_number(audit.get("num_canaries")) else []
        how += [f"confidence {audit['confidence']:.0%}"] if is_number(audit.get("confidence")) else []
        shown = "∞" if math.isinf(bound) else f"{bound:.3g}"
        parts.append(f"audited ε ≥ {shown}" + (f" ({', '.join(how)})" if how else ""))
        if not audit.get("passed", not is_number(claimed) or bound <= claimed):
            parts[-1] += ", ABOVE the claim: the run is less private than it says"
    else:
        parts.append(f"no audited bound: run fedjax-rec audit privacy {run}")
    if is_number(auc):
        ceiling = membership.get("auc_ceiling")
        left = f", ceiling {format_number(ceiling)}" if is_number(ceiling) else ""
        parts.append(f"membership AUC {format_number(auc)} ({membership.get('attack', 'strongest attack')}{left})")
        if membership.get("bug"):
            parts[-1] += ", ABOVE what the claim leaves to an attack: the run is less private than it says"
    else:
        parts.append(f"membership not attacked: run fedjax-rec audit privacy {run} --membership")
    return "; ".join(parts)


def statement_parts(privacy: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """What belongs beside an epsilon, in words: unit, relation, sampler, `δ = ...`.

    Raises:
      ValueError: if one of these, or the epsilon itself, is missing.
    """
    missing = [name for name in STATEMENT if privacy.get(name) is None]
    if missing:
        raise ValueError(
            f"The privacy statement {dict(privacy)} lacks {', '.join(missing)}: an epsilon is only reported with unit, "
            "neighbouring relation, sampler and delta."
        )
    unit = in_words(privacy["unit"], UNITS, otherwise="{}-level")
    relation = in_words(privacy["relation"], RELATIONS, otherwise="{} neighbours")
    sampler = in_words(privacy["sampler"], SAMPLERS, otherwise="{} sampling")
    return unit, relation, sampler, f"δ = {format_delta(privacy['delta'])}"


def complete_statement(privacy: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The statement with its epsilon as a float ("inf" is how JSON files spell infinity), or None if a part is missing.

    Args:
      privacy: as for `epsilon_label`; more fields are kept.
    """
    if not privacy or any(privacy.get(name) is None for name in STATEMENT):
        return None
    epsilon = math.inf if privacy["epsilon"] == "inf" else privacy["epsilon"]
    return {**privacy, "epsilon": float(epsilon)} if is_number(epsilon) else None


def in_words(name: object, words: Mapping[str, str], *, otherwise: str = "{}") -> str:
    """The words for a config value; unknown values are kept, in readable form."""
    text = str(name).strip()
    known = words.get(text.lower().replace("-", "_").replace(" ", "_").replace("/", "_"))
    if known or text in words.values():
        return known or text
    return otherwise.format(text.replace("_", " "))
