"""Matrix factorisation whose user vectors never leave their clients.

Score of item i for user u: ``p_u . q_i + b_i``. Item vectors and biases are shared tables, ``p_u`` is private
(Koren, Bell and Volinsky, 2009, "Matrix Factorization Techniques for Recommender Systems").
"""

import jax
import jax.numpy as jnp

from fedjax_rec.models.base import Examples, Model, Shared, View

LOSSES = ("logistic", "bpr", "squared")


def matrix_factorization(
    num_items: int,
    *,
    dim: int = 32,
    loss: str = "logistic",
    l2: float = 0.0,
    init_stddev: float = 0.1,
    label_mean: float = 0.0,
) -> Model:
    """Builds the model.

    Args:
      num_items: catalogue size.
      dim: length of user and item vectors.
      loss: ``"logistic"`` (binary cross-entropy on positives and negatives), ``"bpr"`` (each positive against its
        negatives; Rendle et al., 2009, "BPR: Bayesian Personalized Ranking from Implicit Feedback") or ``"squared"``.
      l2: weight of half the squared norms of the user vector and of the item rows in the batch, a mean over examples.
      init_stddev: standard deviation of the initial vectors.
      label_mean: a public constant added to every score, for ratings with the squared loss.

    Raises:
      ValueError: for an unknown loss.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}; got {loss!r}.")

    def init_shared(key):
        table = init_stddev * jax.random.normal(key, (num_items, dim))
        return Shared(tables={"item": table, "bias": jnp.zeros((num_items, 1))}, dense={})

    def init_private(key):
        return {"user": init_stddev * jax.random.normal(key, (dim,))}

    def batch_loss(view: View, private, examples: Examples, key):
        del key
        user, rows = private["user"], view.rows["item"]
        scores = rows @ user + view.rows["bias"][..., 0] + label_mean
        weights = examples.weights
        if loss == "logistic":
            losses = jnp.logaddexp(0.0, scores) - examples.labels * scores
        elif loss == "squared":
            losses = 0.5 * jnp.square(scores - examples.labels)
        elif examples.ids.shape[-1] < 2:
            raise ValueError("BPR compares each positive with its negatives; draw some: negatives=Negatives(...).")
        else:
            losses = jnp.logaddexp(0.0, scores[..., 1:] - scores[..., :1])
            weights = weights[..., 1:] * (weights[..., :1] > 0)
        total = jnp.maximum(weights.sum(), 1.0)
        value = jnp.sum(weights * losses) / total
        if l2:
            norms = jnp.sum(jnp.square(rows), -1) + jnp.sum(jnp.square(user))
            real = examples.weights
            value += 0.5 * l2 * jnp.sum(real * norms) / jnp.maximum(real.sum(), 1.0)
        return value

    def score(shared: Shared, private):
        return shared.tables["item"] @ private["user"] + shared.tables["bias"][:, 0] + label_mean

    return Model(init_shared, init_private, batch_loss, score)


def linear_scorer(num_items: int, *, dim: int = 32, init_stddev: float = 1.0) -> Model:
    """Scores ``q_i . w + b`` with a shared output vector and no private parameters, logistic loss.

    The smallest model with both a table and dense leaves; the speed benchmark's workload.

    Args:
      num_items: catalogue size.
      dim: length of item vectors.
      init_stddev: standard deviation of the initial table.
    """

    def init_shared(key):
        table = init_stddev * jax.random.normal(key, (num_items, dim))
        return Shared(tables={"item": table}, dense={"out": jnp.full(dim, 0.1, jnp.float32), "bias": jnp.zeros(())})

    def batch_loss(view: View, private, examples: Examples, key):
        del private, key
        scores = view.rows["item"] @ view.dense["out"] + view.dense["bias"]
        losses = jnp.logaddexp(0.0, scores) - examples.labels * scores
        return jnp.sum(examples.weights * losses) / jnp.maximum(examples.weights.sum(), 1.0)

    def score(shared: Shared, private):
        del private
        return shared.tables["item"] @ shared.dense["out"] + shared.dense["bias"]

    return Model(init_shared, lambda key: (), batch_loss, score)
