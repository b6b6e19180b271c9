"""Tokens a second through the text encoder; memory, speed and payload of clients who fine-tune it by LoRA.

    python -m benchmarks.text            # minutes on a CPU; appends to benchmarks/results/text.{jsonl,md}
    python -m benchmarks.text --smoke    # seconds, a tiny encoder; keeps nothing

Weights are random in the shape of MiniLM (6 layers of 384, 12 heads, 1,536 within), since speed does not ask what they
say. A client has 20 texts of 32 tokens and takes the gradient of adapters of rank 8 on queries and values; frozen
weights are shared by all clients of a chunk. Memory is what the compiler reports, its slope between chunks of 2 and 4
clients. Multiplications and additions are counted of kernels only, for the arithmetic rate.
"""

import argparse
import json
import sys
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_rec.models.lora import init_lora, trained_part, whole_adapters
from fedjax_rec.reporting import Table, to_markdown
from fedjax_rec.reporting.formatting import MISSING
from fedjax_rec.runs.stamp import stamp
from fedjax_rec.text.encoder import EncoderConfig, embed
from fedjax_rec.text.random_encoder import random_params

RESULTS = Path(__file__).parent / "results"
ADAPTED = ("query", "value")


class Shape(NamedTuple):
    """An encoder's size, and a client's."""

    num_layers: int = 6
    hidden_size: int = 384
    num_heads: int = 12
    intermediate_size: int = 1536
    vocabulary_size: int = 30522
    rank: int = 8
    num_texts: int = 20
    num_tokens: int = 32

    @property
    def kernel_size(self) -> int:
        """Numbers in all kernels."""
        return self.num_layers * self.hidden_size * (4 * self.hidden_size + 2 * self.intermediate_size)


TINY = Shape(2, 16, 2, 32, 50, 2, 3, 8)


def make(shape: Shape, key: jax.Array) -> dict[str, Any]:
    """Frozen parameters and adapters."""
    params_key, lora_key = jax.random.split(key)
    sizes = {
        name: getattr(shape, name) for name in ("vocabulary_size", "hidden_size", "num_layers", "intermediate_size")
    }
    params = random_params(params_key, max_tokens=512, **sizes)
    return {"params": params, "lora": init_lora(params["layers"], ADAPTED, rank=shape.rank, key=lora_key)}


def gradients(shape: Shape, *, freeze_a: bool):
    """``(params, lora, ids [clients, texts, tokens]) -> `` each client's gradient of what it trains."""
    config = EncoderConfig(shape.num_heads)

    def of_one(params, lora, ids):
        def loss(trained):
            vectors = embed(params, config, ids, jnp.ones(ids.shape, bool), whole_adapters(lora, trained))
            return jnp.mean((vectors - vectors[::-1]) ** 2)

        return jax.grad(loss)(trained_part(lora, freeze_a=freeze_a))

    return jax.jit(jax.vmap(of_one, in_axes=(None, None, 0)))


def client_memory(shape: Shape, *, freeze_a: bool = False) -> int:
    """Bytes that one more client of a chunk takes, by the compiler's report; nothing is computed."""
    made = jax.eval_shape(partial(make, shape), jax.random.key(0))

    def memory(num_clients):
        ids = jax.ShapeDtypeStruct((num_clients, shape.num_texts, shape.num_tokens), jnp.int32)
        report = (
            gradients(shape, freeze_a=freeze_a).lower(made["params"], made["lora"], ids).compile().memory_analysis()
        )
        return report.temp_size_in_bytes + report.output_size_in_bytes + report.argument_size_in_bytes

    return (memory(4) - memory(2)) // 2


def payload(shape: Shape, *, freeze_a: bool) -> int:
    """Numbers in a client's update."""
    made = jax.eval_shape(partial(make, shape), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(trained_part(made["lora"], freeze_a=freeze_a)))


def seconds(function, *args, repeats: int) -> float:
    """The fastest of some calls after the first."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - start)
    return min(times)


def embedding(shape: Shape, num_texts: int, repeats: int) -> dict[str, Any]:
    """One line of forward passes over a batch of texts."""
    config, made = EncoderConfig(shape.num_heads), make(shape, jax.random.key(0))
    ids = jax.random.randint(jax.random.key(1), (num_texts, shape.num_tokens), 0, shape.vocabulary_size)
    run = jax.jit(lambda params, ids: embed(params, config, ids, jnp.ones(ids.shape, bool)))
    taken = seconds(run, made["params"], ids, repeats=repeats)
    tokens = num_texts * shape.num_tokens
    done = {"tokens_per_s": tokens / taken, "gflop_per_s": 2e-9 * shape.kernel_size * tokens / taken}
    return {"part": f"embedding, {num_texts} texts a batch", **done}


def fine_tuning(shape: Shape, num_clients: int, repeats: int, *, freeze_a: bool) -> dict[str, Any]:
    """One line of clients' gradients."""
    made = make(shape, jax.random.key(0))
    size = (num_clients, shape.num_texts, shape.num_tokens)
    ids = jax.random.randint(jax.random.key(1), size, 0, shape.vocabulary_size)
    taken = seconds(gradients(shape, freeze_a=freeze_a), made["params"], made["lora"], ids, repeats=repeats)
    numbers = payload(shape, freeze_a=freeze_a)
    return {
        "part": f"{'FFA-LoRA' if freeze_a else 'LoRA'}, rank {shape.rank}, {num_clients} clients a chunk",
        "clients_per_s": num_clients / taken,
        "tokens_per_s": ids.size / taken,
        # Forward, forward again for the gradient, and back through the frozen kernels to the activations.
        "gflop_per_s": 6e-9 * shape.kernel_size * ids.size / taken,
        "mib_per_client": client_memory(shape, freeze_a=freeze_a) / 2**20,
        "payload_numbers": numbers,
        "payload_kib": 4 * numbers / 1024,
    }


def make_page(lines: list[dict[str, Any]]) -> str:
    """The last line of each part on each kind of device."""
    columns = ("tokens_per_s", "gflop_per_s", "clients_per_s", "mib_per_client", "payload_numbers", "payload_kib")
    last = {(line["part"], line["stamp"]["device_kind"]): line for line in lines}
    rows = [(part, kind, *(_shown(line.get(name)) for name in columns)) for (part, kind), line in last.items()]
    heads = ("part", "device", "tokens/s", "GFLOP/s", "clients/s", "MiB a client", "payload, numbers", "payload, KiB")
    about = "\n".join(__doc__.strip().splitlines()[5:])
    table = to_markdown(Table(heads, rows))
    return f"# The text encoder\n\n{about}\n\n{table}\n\nWritten by `python -m benchmarks.text`.\n"


def _shown(value: float | None) -> str:
    return MISSING if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main(argv: list[str] | None = None) -> int:
    """Measures every part, prints a line each and keeps it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=64, help="of a batch that is embedded")
    parser.add_argument("--clients", type=int, default=4, help="of a chunk")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="a tiny encoder, keeps nothing")
    args = parser.parse_args(argv)
    shape = TINY if args.smoke else Shape()
    lines = []
    for measure in (
        partial(embedding, shape, args.texts, args.repeats),
        partial(fine_tuning, shape, args.clients, args.repeats, freeze_a=False),
        partial(fine_tuning, shape, args.clients, args.repeats, freeze_a=True),
    ):
        line = {"benchmark": "text", **measure(), "time": datetime.now(UTC).isoformat(timespec="seconds")}
        lines.append(line | {"shape": shape._asdict(), "stamp": stamp(seed=0, data_fingerprint=None)})
        print(
            ", ".join(
                f"{name} {_shown(v) if isinstance(v, float | int) else v}" for name, v in list(line.items())[1:-1]
            )
        )
    file = RESULTS / "text.jsonl"
    if not args.smoke:
        RESULTS.mkdir(exist_ok=True)
        with open(file, "a", encoding="utf-8") as kept:
            kept.writelines(json.dumps(line) + "\n" for line in lines)
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        (RESULTS / "text.md").write_text(make_page(lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
