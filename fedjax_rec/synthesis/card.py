"""The data card of virtual users: what they are, what they cost in privacy, how far they carry, what still leaks.

The card has a part that may go with the data, a function of what was released, and a part for the data's owner: how
the virtual users compare with real ones. Those comparisons are made on real users without noise. Epsilon does not
cover them, so `public_card` leaves them out.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedjax_rec.data.interactions import Interactions
from fedjax_rec.privacy.ledger import TRUST_MODELS, spent_to_dict
from fedjax_rec.synthesis.plan import Fitted

SCHEMA = "fedjax_rec.virtual_users/1"
OWNERS = ("evaluation", "stamp", "for_the_owner")

INTENDED = (
    "developing and comparing recommenders before they meet real users, with results checked on real users later",
    "teaching, debugging and load tests, where real histories must not be at hand",
    "a public set to distil a private model on, or to start training from",
)
UNSAFE = (
    "statements about any one person: no virtual user is one",
    "absolute numbers: metrics measured on virtual users are not those of real ones",
    "minorities and rare items: what few users do is what noise hides first, and what low rank leaves out",
    "linking with other data about the same people: epsilon bounds what that adds, it does not forbid it",
)
NO_PRIVACY = (
    "handing out: these virtual users were fitted without noise, and nothing bounds what they tell of a real user"
)


def data_card(
    fitted: Fitted,
    virtual: Interactions,
    *,
    source: str,
    num_users: int,
    noise_from: str,
    file: Path | None = None,
    evaluation: Mapping[str, Any] | None = None,
    stamp: Mapping[str, Any] | None = None,
    for_the_owner: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The card as JSON values.

    Args:
      fitted: what `fit_generator` returned.
      virtual: what was drawn.
      source: name of the data set that the generator was fitted on.
      num_users: N of the guarantee, public.
      noise_from: where the noise came from: "the operating system", or a seed, which makes it a rehearsal.
      file: what was written, for its checksum.
      evaluation: utility and risk, on real users.
      stamp: commit, versions and fingerprints: the owner's, as a fingerprint of real data confirms a guess of it.
      for_the_owner: anything else that was computed on real users.
    """
    generator = fitted.generator
    card = {
        "schema": SCHEMA,
        "what": {
            "name": virtual.name,
            "source": source,
            "generator": generator.name,
            "num_users": virtual.num_users,
            "num_items_in_catalogue": virtual.num_items,
            "num_interactions": virtual.num_interactions,
            "time_order": generator.ordered,
            "file": None if file is None else file.name,
            "sha256": None if file is None else hashlib.sha256(file.read_bytes()).hexdigest(),
        },
        "privacy": _privacy(fitted, noise_from),
        "public_knowledge": {"num_real_users": num_users, "catalogue": f"the list of {virtual.num_items:,} items"},
        "choices": {
            **generator.choices,
            "num_virtual_users": "fixed before fitting",
            "history_lengths": f"released histogram, {len(fitted.lengths.weights)} public bins",
            "ids": "1 .. num_users, fresh: no virtual user stands for a real one",
        },
        "intended_uses": list(INTENDED),
        "unsafe_uses": [*UNSAFE, *(() if generator.private else (NO_PRIVACY,))],
        "evaluation": None if evaluation is None else dict(evaluation),
        "stamp": None if stamp is None else dict(stamp),
        "for_the_owner": None if for_the_owner is None else dict(for_the_owner),
    }
    return json.loads(json.dumps(card, default=float))


def public_card(card: Mapping[str, Any]) -> dict[str, Any]:
    """The part that may go with the data: all but what was computed on real users without noise."""
    return {key: value for key, value in card.items() if key not in OWNERS}


def write_json(path: Path, document: Mapping[str, Any]) -> Path:
    """Writes a card; whole, or not at all."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        text = json.dumps(_finite(document), indent=2, ensure_ascii=False, allow_nan=False)
        unfinished.write_text(text + "\n", encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _finite(value):
    """JSON has no infinity and no NaN: "inf", "-inf" and null."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value


def _privacy(fitted: Fitted, noise_from: str) -> dict[str, Any] | None:
    if fitted.spent is None:
        return None
    samplers = list(dict.fromkeys(entry.sampler for entry in fitted.ledger.entries))
    sampler = next((name for name in samplers if name != "all"), "all")
    return {
        **spent_to_dict(fitted.spent),
        "sampler": sampler,
        "trust_model": fitted.ledger.trust_model,
        "trust": TRUST_MODELS[fitted.ledger.trust_model],
        "sentence": fitted.spent.sentence,
        "noise_from": noise_from,
        "releases": list(fitted.ledger.rows()),
    }
