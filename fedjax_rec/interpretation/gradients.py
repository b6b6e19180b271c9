"""Integrated gradients along the presence of a history, from nothing present to everything.

    a_i = x_i * integral_0^1 dF/dx_i (t x) dt,    x = 1 at every real place

Sundararajan, Taly and Yan, 2017, "Axiomatic Attribution for Deep Networks". Completeness: sum_i a_i = F(x) - F(0); what
is missing is the error of the integral, and is reported with every result.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_rec.interpretation.value import Value

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(8)


class IntegratedGradients(NamedTuple):
    """What each place adds, and how sure that is.

    Attributes:
      values: float32 ``[L]``, 0 on padding.
      total: F(1) - F(0).
      gap: sum of the values minus the total.
      num_points: gradients taken on the last, finest division of the path.
    """

    values: jax.Array
    total: jax.Array
    gap: jax.Array
    num_points: jax.Array


def integrated_gradients(
    value: Value, real: jax.Array, *, tolerance: float = 0.002, max_panels: int = 128
) -> IntegratedGradients:
    """Gauss-Legendre quadrature with 8 points a panel; panels are doubled until the attributions are complete.

    The path is walked at t = s^3 with panels equal in s: a normalised model changes most where items begin to show.

    Args:
      value: F, with a gradient: from `by_presence`.
      real: bool ``[L]``, the places to explain.
      tolerance: largest gap as a share of the total.
      max_panels: where to stop if the gap does not close; look at it then.
    """
    full = real.astype(jnp.float32)
    gradient = jax.grad(value)
    total = value(full) - value(jnp.zeros_like(full))
    nodes, weights = jnp.asarray((_NODES + 1) / 2, jnp.float32), jnp.asarray(_WEIGHTS / 2, jnp.float32)

    def integrate(panels):
        def add(panel, mean):
            s = (panel + nodes) / panels
            gradients = jax.vmap(lambda t: gradient(t * full))(s**3)
            return mean + jnp.matmul(3 * s**2 * weights, gradients, precision="highest") / panels

        return full * jax.lax.fori_loop(0, panels, add, jnp.zeros_like(full))

    def incomplete(found):
        panels, values = found
        open_still = jnp.abs(values.sum() - total) > tolerance * jnp.abs(total)
        return (panels == 0) | (open_still & (panels < max_panels))

    def finer(found):
        panels = jnp.maximum(2 * found[0], 1)
        return panels, integrate(panels)

    panels, values = jax.lax.while_loop(incomplete, finer, (jnp.int32(0), jnp.zeros_like(full)))
    return IntegratedGradients(values, total, values.sum() - total, len(_NODES) * panels)
