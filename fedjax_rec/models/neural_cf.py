"""Neural collaborative filtering with user vectors that never leave their clients: GMF, MLP and NeuMF.

With user vectors p, item vectors q and a dense tower, the score (log-odds) of item i for user u is

    GMF     h . (p_u * q_i) + b                             a weighted elementwise product
    MLP     h . a_L(W_L ... a_1(W_1 [p_u, q_i] + b_1)) + b  a ReLU tower on both vectors
    NeuMF   h . [p_u * q_i, a_L(... [p'_u, q'_i])] + b      both, with vectors of their own

trained by the binary cross-entropy of a user's items against drawn negatives. Item vectors are shared tables, the tower
is shared and dense, the user's vectors are private.

He et al., 2017, "Neural Collaborative Filtering" (WWW).

Differs from the paper: NeuMF starts from random parameters (the paper's pre-training from GMF and MLP is left out);
initial vectors are wider, because clients take plain gradient steps where the paper has Adam.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from fedjax_rec.models.base import Examples, Model, Shared, View
from fedjax_rec.models.nnx import pure_module


def gmf(num_items: int, *, dim: int = 32, init_stddev: float = 0.1) -> Model:
    """Generalised matrix factorisation.

    Args:
      num_items: catalogue size.
      dim: length of user and item vectors.
      init_stddev: standard deviation of the initial vectors.
    """
    return _neural_cf(num_items, {"gmf": dim}, (), init_stddev)


def mlp(num_items: int, *, dim: int = 32, hidden: Sequence[int] = (32, 16, 8), init_stddev: float = 0.1) -> Model:
    """A tower on the user's and the item's vector; by default the usual 64, 32, 16, 8, the first being both vectors.

    Args:
      num_items: catalogue size.
      dim: length of user and item vectors.
      hidden: width of each ReLU layer after the 2 * dim inputs; one or more.
      init_stddev: standard deviation of the initial vectors.

    Raises:
      ValueError: without hidden layers.
    """
    return _neural_cf(num_items, {"mlp": dim}, tuple(hidden), init_stddev)


def neumf(
    num_items: int,
    *,
    gmf_dim: int = 8,
    mlp_dim: int = 32,
    hidden: Sequence[int] = (32, 16, 8),
    init_stddev: float = 0.1,
) -> Model:
    """GMF and MLP side by side, joined in the last layer; each has its own user and item vectors.

    Args:
      num_items: catalogue size.
      gmf_dim: length of the vectors that are multiplied.
      mlp_dim: length of the vectors that the tower reads.
      hidden: width of each ReLU layer after the 2 * mlp_dim inputs; one or more.
      init_stddev: standard deviation of the initial vectors.

    Raises:
      ValueError: without hidden layers.
    """
    return _neural_cf(num_items, {"gmf": gmf_dim, "mlp": mlp_dim}, tuple(hidden), init_stddev)


class _Tower(nnx.Module):
    """Scores of n items for one user: vectors ``{part: [dim]}`` and ``{part: [n, dim]}`` to ``[n]``."""

    def __init__(self, dims: dict[str, int], hidden: tuple[int, ...], rngs: nnx.Rngs):
        widths = (2 * dims["mlp"], *hidden) if "mlp" in dims else ()
        self.hidden = nnx.List(
            nnx.Linear(wide, narrow, kernel_init=nnx.initializers.he_normal(), rngs=rngs)
            for wide, narrow in itertools.pairwise(widths)
        )
        self.out = nnx.Linear(dims.get("gmf", 0) + sum(widths[-1:]), 1, rngs=rngs)

    def __call__(self, user, items):
        parts = []
        if "gmf" in user:
            parts.append(user["gmf"][None, :] * items["gmf"])
        if "mlp" in user:
            first, *rest = self.hidden
            # W_1 [p, q] by halves: the user's is the same for all items, so it is computed once.
            kernel, dim = first.kernel[...], len(user["mlp"])
            x = items["mlp"] @ kernel[dim:] + (user["mlp"] @ kernel[:dim] + first.bias[...])[None, :]
            for layer in rest:
                x = layer(nnx.relu(x))
            parts.append(nnx.relu(x))
        return self.out(jnp.concatenate(parts, axis=-1))[:, 0]


def _neural_cf(num_items: int, dims: dict[str, int], hidden: tuple[int, ...], init_stddev: float) -> Model:
    if "mlp" in dims and not hidden:
        raise ValueError("The tower needs one hidden layer or more; for none, use gmf or matrix_factorization.")
    tower = pure_module(lambda rngs: _Tower(dims, hidden, rngs))

    def vectors(key, *shape):
        keys = dict(zip(dims, jax.random.split(key, len(dims)), strict=True))
        return {part: init_stddev * jax.random.normal(keys[part], (*shape, dim)) for part, dim in dims.items()}

    def init_shared(key):
        table_key, tower_key = jax.random.split(key)
        return Shared(tables=vectors(table_key, num_items), dense=tower.init(tower_key))

    def batch_loss(view: View, private, examples: Examples, key):
        del key
        rows = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), view.rows)
        scores = tower.apply(view.dense, private, rows).reshape(examples.ids.shape)
        losses = jnp.logaddexp(0.0, scores) - examples.labels * scores
        return jnp.sum(examples.weights * losses) / jnp.maximum(examples.weights.sum(), 1.0)

    def score(shared: Shared, private):
        return tower.apply(shared.dense, private, shared.tables)

    return Model(init_shared, vectors, batch_loss, score)
