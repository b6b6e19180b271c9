"""From a flax NNX module to pure functions over a plain pytree: the only door through which NNX comes in.

A module is built and split once, into a graph definition (static) and the names of its parameters. From then on its
parameters are a flat dict of arrays, ``{"hidden.0.kernel": ...}``, like any others here.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx


class PureModule(NamedTuple):
    """A module as functions; both work under jit, vmap and grad.

    Attributes:
      init: ``key -> {name: float32 array}``; names are attribute paths joined by dots.
      apply: ``(params, *inputs) -> output``, the module's ``__call__``. Nothing that the call sets on the module lasts.
    """

    init: Callable[[jax.Array], dict[str, jax.Array]]
    apply: Callable[..., Any]


def pure_module(build: Callable[[nnx.Rngs], nnx.Module]) -> PureModule:
    """Splits a module into pure functions.

    Args:
      build: makes the module; it must make the same structure every time, such as
        ``lambda rngs: nnx.Linear(3, 1, rngs=rngs)``.

    Raises:
      ValueError: if the module keeps anything but float32 parameters, such as batch statistics or dropout keys: clients
        could neither average nor clip it.
    """
    module = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    graph, state, rest = nnx.split(module, nnx.Param, ...)
    if jax.tree.leaves(rest):
        kept = ", ".join(_named(rest))
        raise ValueError(f"The module keeps {kept} beside its parameters; use layers without such state.")
    shapes, structure = jax.tree.flatten(state)
    names = list(_named(state))
    for name, shape in zip(names, shapes, strict=True):
        if shape.dtype != jnp.float32:
            raise ValueError(f"Parameter {name} is {shape.dtype}; build the module with param_dtype=jnp.float32.")

    def init(key):
        params = _named(nnx.state(build(nnx.Rngs(key)), nnx.Param))
        # A weakly typed leaf would come back strong from the first round, and compile the second one anew.
        return {name: jnp.asarray(params[name], jnp.float32) for name in names}

    def apply(params, *inputs):
        state = jax.tree.unflatten(structure, [params[name] for name in names])
        return nnx.merge(graph, state)(*inputs)

    return PureModule(init, apply)


def _named(state: nnx.State) -> dict[str, Any]:
    """The values of a state by dotted name, in the order of its leaves."""
    return {".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(state)}
