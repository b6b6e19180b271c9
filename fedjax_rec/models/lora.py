"""LoRA: fine-tuning by low-rank adapters, so that what a client trains, sends and is noised for is small.

    W' = W + A B,    A [in, rank] = normal(alpha / rank / sqrt(in)),    B [rank, out] = 0

with W frozen. Hu et al., 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; their constant alpha / rank stands
in A's first values here. The mean over clients of A_u B_u is not the product of the means; with A frozen too it is,
exactly, the update has half the size, and noise on B is not multiplied by noise on A: Sun et al., 2024, "Improving LoRA
in Privacy-preserving Federated Learning" (FFA-LoRA), the choice under differential privacy.

Frozen parameters are public: a client receives them once, no update holds them, and whatever they were trained on must
itself be public or paid for. `with_lora` closes over them; an encoder's are handed over as arguments (`text.encoder`).
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_rec.models.base import Shared
from fedjax_rec.models.sequence import SequenceModel

Adapters = dict[str, dict[str, jax.Array]]
"""``{name of the kernel: {"a": [..., in, rank], "b": [..., rank, out]}}``, leading axes as the kernel's."""


def init_lora(params: Any, names: Sequence[str], *, rank: int, key: jax.Array, alpha: float | None = None) -> Adapters:
    """Adapters that change nothing yet, for all kernels whose name contains one of some names.

    Args:
      params: nested dicts of arrays. A kernel is a leaf ``[..., in, out]`` whose name ends in "kernel"; its name is
        its path joined by dots, such as "body.blocks.0.query.kernel".
      names: parts of names, such as ("query", "value").
      rank: of each adapter.
      key: draws A.
      alpha: scale of A times the rank; the rank itself by default, so that A B x is about B's size.

    Raises:
      ValueError: for a name that is in no kernel's, or a rank below 1 or above a kernel's smaller side.
    """
    kernels = {name: leaf for name, leaf in _leaves(params).items() if _is_kernel(name, leaf)}
    for part in names:
        if not any(part in name for name in kernels):
            raise ValueError(f"No kernel has {part!r} in its name; there are {', '.join(kernels) or 'none'}.")
    chosen = {name: leaf.shape for name, leaf in kernels.items() if any(part in name for part in names)}
    for name, shape in chosen.items():
        if not 1 <= rank <= min(shape[-2:]):
            raise ValueError(f"rank must lie in 1..{min(shape[-2:])} for {name} {list(shape)}; got {rank}.")
    adapters = {}
    for name_key, (name, (*lead, inputs, outputs)) in zip(
        jax.random.split(key, len(chosen)), chosen.items(), strict=True
    ):
        scale = (rank if alpha is None else alpha) / rank / math.sqrt(inputs)
        adapters[name] = {
            "a": scale * jax.random.normal(name_key, (*lead, inputs, rank)),
            "b": jnp.zeros((*lead, rank, outputs)),
        }
    return adapters


def trained_part(adapters: Adapters, *, freeze_a: bool) -> Adapters:
    """What clients train: A and B, or B alone."""
    return {name: {"b": pair["b"]} if freeze_a else pair for name, pair in adapters.items()}


def whole_adapters(frozen: Adapters, trained: Adapters) -> Adapters:
    """Adapters of which the trained part is given, and the rest as it was drawn."""
    return {name: frozen[name] | part for name, part in trained.items()}


def add_lora(params: Any, adapters: Adapters) -> Any:
    """The parameters with W + A B for each adapted kernel, written out: for kernels that a client can hold."""

    def add(path, leaf):
        pair = adapters.get(_name(path))
        return leaf if pair is None else leaf + pair["a"] @ pair["b"]

    return jax.tree_util.tree_map_with_path(add, params)


def with_lora(
    model: SequenceModel,
    params: Shared,
    *,
    rank: int,
    names: Sequence[str],
    key: jax.Array,
    freeze_a: bool = False,
    alpha: float | None = None,
) -> SequenceModel:
    """The same recommender with only adapters to train, for `fedsequence` on clients.

    Shared: no tables; dense, `Adapters` of kernels in ``params.dense``. Before training it scores as ``params`` do.

    Args:
      model: of the next item.
      params: its parameters, public and frozen: item tables too.
      rank: of each adapter.
      names: which kernels, see `init_lora`.
      key: draws the A that is frozen with ``freeze_a``; everybody must know it. Else each ``init`` draws its own.
      freeze_a: FFA-LoRA: train B alone.
      alpha: see `init_lora`.

    Raises:
      ValueError: as `init_lora`.
    """
    frozen = init_lora(params.dense, names, rank=rank, key=key, alpha=alpha)

    def init(init_key):
        fresh = init_lora(params.dense, names, rank=rank, key=init_key, alpha=alpha)
        return Shared({}, trained_part(frozen if freeze_a else fresh, freeze_a=freeze_a))

    def adapted(function):
        def call(adapters, *rest):
            dense = add_lora(params.dense, whole_adapters(frozen, adapters.dense))
            return function(Shared(params.tables, dense), *rest)

        return None if function is None else call

    return model._replace(
        init=init,
        loss=adapted(model.loss),
        query=adapted(model.query),
        catalogue=adapted(model.catalogue),
        places=adapted(model.places),
    )


def _leaves(params: Any) -> dict[str, jax.Array]:
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}


def _name(path) -> str:
    return ".".join(str(part.key) for part in path)


def _is_kernel(name: str, leaf: jax.Array) -> bool:
    return name.endswith("kernel") and leaf.ndim >= 2
