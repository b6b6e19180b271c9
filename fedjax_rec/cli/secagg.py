"""`fedjax-rec secagg demo`: one secure sum, stage by stage, for a reader who wants to see what the server sees."""

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import tyro
from rich.console import Console

if TYPE_CHECKING:  # needs the package cryptography, and the help of other verbs does without
    from fedjax_rec.security.secagg.session import SumResult

_SHOWN = 8

_STAGES = """\
keys         Every client makes two fresh X25519 key pairs and sends the public halves; it gets its neighbours' ones.
shares       It draws a self seed, cuts the seed and its mask key into Shamir shares, and sends each neighbour one of
             each, sealed so that only that neighbour can read them.
upload       It sends its vector + a mask from its self seed + a mask for each neighbour with a higher number - one for
             each neighbour with a lower number. A pair of neighbours derives the same mask from its keys.
consistency  It gets the list of who uploaded and who did not, and neighbours confirm to each other that theirs is the
             same.
unmask       For each neighbour it gives one share: of the self seed if the neighbour uploaded, else of the mask key.
             Masks of pairs who both uploaded cancel; the server removes the others, and the sum is left."""

_NOT_PROMISED = """\
- Anything against a server that deviates: it hands out the public keys, and could hand out its own.
- Anything against {threshold} or more of the {holders} holders of a client's secrets who pool their shares.
- That a vector makes sense: a client can upload any numbers, and wrong masks give a wrong sum.
- Differential privacy: the sum itself is exact, and says what a sum says about each vector in it.
- Which rows of a table a client sends, unless all clients send the same rows: masks hide values, not places."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SecAggDemoConfig:
    """A secure sum with real cryptography, step by step; all parties run in this process.

    Needs no data: vectors are small random integers.

        fedjax-rec secagg demo --clients 10 --dropouts 0.2
    """

    what: Annotated[Literal["demo"], tyro.conf.Positional] = "demo"
    """What to do: `demo` is all there is."""
    clients: int = 10
    """Number of clients."""
    words: int = 16
    """Length of each client's vector."""
    dropouts: float = 0.2
    """Share of the clients who fall silent."""
    stage: Literal["mixed", "keys", "shares", "upload", "consistency", "unmask"] = "mixed"
    """The first stage at which they are silent; `mixed` takes upload, unmask, shares, keys and consistency in turn."""
    degree: int | None = None
    """Neighbours of a client, even. Default: enough for 30 % dropouts and 10 % colluding clients."""
    threshold: int | None = None
    """How many holders of a secret rebuild it; goes with --degree."""
    seed: int = 0
    """Of the vectors and of who falls silent. Keys are fresh from the operating system in every run."""
    json: bool = False
    """Print one JSON object and nothing else."""


def run(config: SecAggDemoConfig) -> int:
    """Prints the round to standard output, or a sentence to standard error.

    Returns:
      The exit code: 0, or 2 if no sum comes out.
    """
    try:
        from fedjax_rec.security.secagg.config import SecAggConfig
        from fedjax_rec.security.secagg.session import secure_sum

        if config.clients < 1 or not 0 <= config.dropouts <= 1:
            raise ValueError(
                f"Give at least one client, and dropouts from 0 to 1; got {config.clients} and {config.dropouts}."
            )
        rng = np.random.default_rng(config.seed)
        vectors = rng.integers(-9, 10, (config.clients, config.words), dtype=np.int32)
        silent = rng.permutation(config.clients)[: round(config.dropouts * config.clients)].tolist()
        order = ("upload", "unmask", "shares", "keys", "consistency") if config.stage == "mixed" else (config.stage,)
        result = secure_sum(
            vectors.view(np.uint32),
            dropped={client: order[place % len(order)] for place, client in enumerate(silent)},
            config=SecAggConfig(
                num_words=config.words,
                session=f"demo {config.seed}",
                degree=config.degree,
                threshold=config.threshold,
            ),
        )
    except (ValueError, RuntimeError, ModuleNotFoundError) as error:
        print(f"fedjax-rec secagg: {error}", file=sys.stderr)
        return 2
    plain = vectors[list(result.survivors)].sum(axis=0, dtype=np.int32)
    if config.json:
        print(json.dumps(to_dict(result, plain)))
    else:
        _print_round(result, vectors, plain)
    return 0


def to_dict(result: "SumResult", plain: np.ndarray) -> dict:
    """The sum and what it took as JSON values; numbers of the ring as signed integers."""
    transcript = result.transcript
    return {
        "sum": result.total.view(np.int32).tolist(),
        "equals_plain_sum": bool(np.array_equal(result.total.view(np.int32), plain)),
        "survivors": list(result.survivors),
        "dropped": {str(client): stage for client, stage in transcript.dropped.items()},
        "degree": transcript.terms.degree,
        "threshold": transcript.terms.threshold,
        "stages": {stage: dataclasses.asdict(traffic) for stage, traffic in transcript.stages.items()},
        "bytes_up": {str(client): size for client, size in transcript.bytes_up.items()},
        "bytes_down": {str(client): size for client, size in transcript.bytes_down.items()},
        "server_view": dataclasses.asdict(transcript.server_view),
    }


def _print_round(result: "SumResult", vectors: np.ndarray, plain: np.ndarray) -> None:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    transcript = result.transcript
    view, terms = transcript.server_view, transcript.terms
    more = " ..." if terms.num_words > _SHOWN else ""

    def row(numbers) -> str:
        return " ".join(f"{number:>10}" for number in list(numbers)[:_SHOWN]) + more

    same = np.array_equal(result.total.view(np.int32), plain)
    console.print(
        f"{len(transcript.clients)} clients hold a vector each. A server is to learn the sum of those who stay, and "
        "nothing more of any one vector.\nNumbers count modulo 2^32. The cryptography is real; all parties run in "
        f"this process.\n\n{_STAGES}\n"
    )
    console.print(transcript)
    for name, numbers in {
        f"Client {view.client} has": vectors[view.client],
        "the server sees": view.masked,
        "secure sum": result.total.view(np.int32),
        "plain sum": plain,
    }.items():
        console.print(f"{name:18}{row(numbers)}")
    console.print("They are the same, bit for bit." if same else "THEY DIFFER: this is a bug, please report it.")
    console.print("\nNot promised:")
    console.print(_NOT_PROMISED.format(threshold=terms.threshold, holders=terms.degree + 1))
