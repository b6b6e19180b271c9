"""What a click network is: pure functions from the vectors of one example's fields to the log-odds of a click."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

from fedjax_rec.models.nnx import pure_module


class ClickNetwork(NamedTuple):
    """A network over the vectors of fields, one example at a time.

    Attributes:
      init: ``key -> {name: float32 array}``, its dense parameters.
      logit: ``(dense, embedded float32 [num_fields, columns]) -> float32 scalar``, the log-odds of a click. A missing
        field is a zero row.
      num_fields: fields that it reads.
      columns: length of a field's vector; what the columns mean is the network's own affair.
    """

    init: Callable[[jax.Array], dict[str, jax.Array]]
    logit: Callable[[Any, jax.Array], jax.Array]
    num_fields: int
    columns: int


def network_of(build: Callable[[nnx.Rngs], nnx.Module], *, num_fields: int, columns: int) -> ClickNetwork:
    """A network from a module whose call takes ``[num_fields, columns]`` to a scalar.

    Raises:
      ValueError: for a number of fields or columns below 1.
    """
    if num_fields < 1 or columns < 1:
        raise ValueError(f"A click network needs fields and columns; got {num_fields} fields of {columns} columns.")
    module = pure_module(build)
    return ClickNetwork(module.init, module.apply, num_fields, columns)


class Mlp(nnx.Module):
    """ReLU layers: ``[inputs] -> [widths[-1]]``."""

    def __init__(self, inputs: int, widths: Sequence[int], rngs: nnx.Rngs):
        self.layers = nnx.List(
            nnx.Linear(wide, narrow, kernel_init=nnx.initializers.he_normal(), rngs=rngs)
            for wide, narrow in itertools.pairwise((inputs, *widths))
        )

    def __call__(self, x):
        """The last layer's output."""
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return x
