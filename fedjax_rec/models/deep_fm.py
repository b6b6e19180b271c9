"""DeepFM and what it is made of: logistic regression and the factorisation machine.

With w_f and v_f the weight and the vector of field f in an example, the log-odds of a click are

    LR        b + sum_f w_f
    FM        LR + sum_{f < g} v_f . v_g  =  LR + (|sum_f v_f|^2 - sum_f |v_f|^2) / 2
    DeepFM    FM + a ReLU tower on all v_f

Rendle, 2010, "Factorization Machines" (ICDM); Guo et al., 2017, "DeepFM: A Factorization-Machine based Neural Network
for CTR Prediction" (IJCAI).

The first column of a field's row is its weight, the others are its vector. Differs from the papers: the values of a
many-valued field are averaged to one vector first, so they do not cross one another; no dropout.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from fedjax_rec.models.click_network import ClickNetwork, Mlp, network_of


def logistic_regression(num_fields: int) -> ClickNetwork:
    """A weight for each row, and a bias.

    Args:
      num_fields: fields that it reads.
    """
    return network_of(lambda rngs: _DeepFm(0, (), rngs), num_fields=num_fields, columns=1)


def factorization_machine(num_fields: int, *, dim: int = 10) -> ClickNetwork:
    """Weights and the products of all pairs of fields.

    Args:
      num_fields: fields that it reads.
      dim: length of a field's vector.
    """
    return network_of(lambda rngs: _DeepFm(0, (), rngs), num_fields=num_fields, columns=1 + dim)


def deep_fm(num_fields: int, *, dim: int = 10, hidden: Sequence[int] = (400, 400, 400)) -> ClickNetwork:
    """A factorisation machine and a tower on the same vectors; the default tower is the paper's on Criteo.

    Args:
      num_fields: fields that it reads.
      dim: length of a field's vector.
      hidden: width of each ReLU layer, one or more.

    Raises:
      ValueError: without hidden layers.
    """
    if not hidden:
        raise ValueError("The tower needs one hidden layer or more; for none, use factorization_machine.")
    widths = tuple(hidden)
    return network_of(lambda rngs: _DeepFm(num_fields * dim, widths, rngs), num_fields=num_fields, columns=1 + dim)


def pairs(vectors: jax.Array) -> jax.Array:
    """sum_{f < g} v_f . v_g of ``[num_fields, dim]``, in time linear in the fields."""
    return 0.5 * (jnp.sum(jnp.square(vectors.sum(0))) - jnp.sum(jnp.square(vectors)))


class _DeepFm(nnx.Module):
    """``[num_fields, 1 + dim] -> scalar``; without widths no tower, and without further columns no pairs."""

    def __init__(self, size: int, widths: tuple[int, ...], rngs: nnx.Rngs):
        self.bias = nnx.Param(jnp.zeros(()))
        self.deep = Mlp(size, widths, rngs) if widths else None
        self.out = nnx.Linear(widths[-1], 1, use_bias=False, rngs=rngs) if widths else None

    def __call__(self, embedded):
        vectors = embedded[:, 1:]
        logit = self.bias[...] + embedded[:, 0].sum() + pairs(vectors)
        if self.deep is not None:
            logit += self.out(self.deep(vectors.reshape(-1)))[0]
        return logit
