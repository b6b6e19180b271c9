"""DCN-V2: explicit crosses of fields beside a tower.

With x_0 the vectors of all fields in one row, d numbers, each cross layer multiplies by x_0 once more,

    x_{l+1} = x_0 * (W_l x_l + b_l) + x_l

so that after L layers x_L holds crosses of up to L + 1 fields. The log-odds of a click are linear in x_L and in the
last layer of a ReLU tower on x_0.

Wang et al., 2021, "DCN V2: Improved Deep & Cross Network and Practical Lessons for Web-scale Learning to Rank Systems"
(WWW): the parallel structure, full-rank W_l.

Differs from the paper: a numeric field has a vector, its row times its factor, like every other; the paper
appends the number itself. No mixture of low-rank experts.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx

from fedjax_rec.models.click_network import ClickNetwork, Mlp, network_of


def dcn_v2(
    num_fields: int, *, dim: int = 10, num_cross: int = 3, hidden: Sequence[int] = (500, 500, 500)
) -> ClickNetwork:
    """DCN-V2. The defaults are a usual setting on Criteo.

    Args:
      num_fields: fields that it reads.
      dim: length of a field's vector.
      num_cross: cross layers.
      hidden: width of each ReLU layer; none leaves the crosses alone.

    Raises:
      ValueError: without fields, columns or cross layers.
    """
    if num_cross < 1:
        raise ValueError(f"num_cross must be at least 1; got {num_cross}. Without crosses, use a tower alone.")
    widths = tuple(hidden)
    return network_of(
        lambda rngs: _DcnV2(num_fields * dim, num_cross, widths, rngs), num_fields=num_fields, columns=dim
    )


class _DcnV2(nnx.Module):
    """``[num_fields, dim] -> scalar``."""

    def __init__(self, size: int, num_cross: int, widths: tuple[int, ...], rngs: nnx.Rngs):
        self.cross = nnx.List(nnx.Linear(size, size, rngs=rngs) for _ in range(num_cross))
        self.deep = Mlp(size, widths, rngs) if widths else None
        self.out = nnx.Linear(size + sum(widths[-1:]), 1, rngs=rngs)

    def __call__(self, embedded):
        first = x = embedded.reshape(-1)
        for layer in self.cross:
            x = first * layer(x) + x
        if self.deep is not None:
            x = jnp.concatenate([x, self.deep(first)])
        return self.out(x)[0]
