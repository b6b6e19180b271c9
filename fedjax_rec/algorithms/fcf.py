"""FCF: collaborative filtering of implicit feedback, where clients solve for their vectors and the server moves items.

With preference p_ui = 1 for what client u touched and 0 for the rest of the catalogue, and confidence
c_ui = 1 + alpha r_ui (r_ui a count or rating, 1 by default, 0 for what it did not touch),

    J = sum_u sum_i c_ui (p_ui - x_u . y_i)^2 + lambda (sum_u |x_u|^2 + sum_i |y_i|^2).

Each client solves for its x_u exactly, given all item vectors Y, [items, dim],

    x_u = (Y^T Y + sum_{i in u} alpha r_ui y_i y_i^T + lambda I)^-1  sum_{i in u} c_ui y_i,

and sends f(u, i) = c_ui (p_ui - x_u . y_i) x_u for every item; the server steps along
dJ/dy_i = -2 sum_u f(u, i) + 2 lambda y_i with Adam.

Ammad-ud-din et al., 2019, "Federated Collaborative Filtering for Privacy-Preserving Personalized Recommendation
System"; J is of Hu, Koren and Volinsky, 2008, "Collaborative Filtering for Implicit Feedback Datasets".

Differs from the paper: same gradient, sent in two parts. For an item that u did not touch f(u, i) is -x_u (x_u . y_i),
so a client sends x_u x_u^T, [dim, dim], and for its own items what f(u, i) has beyond that, (c_ui - alpha r_ui
x_u . y_i) x_u. The server takes sum_u f(u, .) = rows - Y sum_u x_u x_u^T: exact, and nobody sends the catalogue. It
broadcasts Y^T Y, so that a client needs that and its own rows; a client that fetches these alone shows which they are,
one that fetches Y does not. The gradient is divided by the cohort size, which Adam hardly notices.

Privacy. One client's x_u x_u^T shows x_u up to its sign, as two rows of the paper's upload do: sum them securely, or
clip and add noise. The clip is on the joint norm of both parts, where the rows, sqrt(n) (1 + alpha) |x_u|, outweigh
|x_u|^2. Noise can make a sum of x_u x_u^T indefinite, and the server would then run away from Y = 0 in some direction
for ever, so it takes the nearest positive semidefinite matrix: post-processing, and no change without noise.
"""

import jax
import jax.numpy as jnp
import optax

from fedjax_rec.data.clients import Client
from fedjax_rec.federated.algorithm import Algorithm, ClientOutput, ServerState
from fedjax_rec.federated.rows import Rows, take_rows
from fedjax_rec.models.base import Shared


def fcf(
    num_items: int,
    *,
    cohort_size: float,
    dim: int = 25,
    alpha: float = 4.0,
    l2: float = 1.0,
    server_optimizer: optax.GradientTransformation | None = None,
    init_stddev: float = 0.1,
) -> Algorithm:
    """Federated collaborative filtering.

    Shared: table "item" ``[num_items, dim]``; dense "gram" ``[dim, dim]``, Y^T Y of that table. In an update the same
    two hold a client's rows and its x_u x_u^T, so this is not trained minus received: rank with `fcf_score` on the
    server's table. Private: "user" ``[dim]``, which the next round solves for anew and training never reads.

    Args:
      num_items: catalogue size.
      cohort_size: expected clients a round; weighs lambda against their sum.
      dim: length of user and item vectors.
      alpha: confidence in a touched item beyond that in an untouched one.
      l2: lambda, positive: it makes a user's equations solvable.
      server_optimizer: ``optax.adam(0.1, b2=0.99)`` by default.
      init_stddev: standard deviation of the initial item vectors.

    Raises:
      ValueError: for alpha or lambda out of range, or clients with repeated items.
    """
    if not alpha >= 0 or not l2 > 0 or not cohort_size > 0:
        raise ValueError(
            "FCF needs alpha >= 0, l2 > 0 and cohort_size > 0, and got "
            f"alpha={alpha}, l2={l2}, cohort_size={cohort_size}."
        )
    server_optimizer = optax.adam(0.1, b2=0.99) if server_optimizer is None else server_optimizer

    def init(key):
        shared = with_gram(init_stddev * jax.random.normal(key, (num_items, dim)))
        return ServerState(jnp.zeros((), jnp.int32), shared, server_optimizer.init(shared.tables["item"]))

    def client_update(shared, private, client, num_steps, key):
        del private, num_steps, key
        user = user_vector(shared, client, alpha=alpha, l2=l2)
        items, extra = own_items(shared, client, alpha)
        scores = items @ user
        real = (jnp.arange(len(extra)) < client.length).astype(jnp.float32)
        beyond = (1.0 + extra - extra * scores) * real
        rows = Rows(client.item_ids, beyond[:, None] * user[None, :], num_items)
        untouched = user @ shared.dense["gram"] @ user
        loss = untouched + jnp.sum(real * ((1.0 + extra) * jnp.square(1.0 - scores) - jnp.square(scores)))
        return ClientOutput(Shared({"item": rows}, {"gram": jnp.outer(user, user)}), {"user": user}, {"loss": loss})

    def server_update(state, aggregate):
        items = state.shared.tables["item"]
        gram = nearest_positive(aggregate.dense["gram"])
        uploads = aggregate.tables["item"] - jnp.matmul(items, gram, precision="highest")
        gradient = -2.0 * uploads + 2.0 * l2 / cohort_size * items
        change, opt_state = server_optimizer.update(gradient, state.opt_state, items)
        return state._replace(shared=with_gram(optax.apply_updates(items, change)), opt_state=opt_state)

    return Algorithm(
        init=init,
        init_private=lambda key: {"user": jnp.zeros(dim)},
        client_update=client_update,
        num_steps=lambda client: jnp.int32(1),
        server_update=server_update,
    )


def fcf_score(shared: Shared, private) -> jax.Array:
    """x_u . y_i for every item, float32 ``[num_items]``."""
    return shared.tables["item"] @ private["user"]


def user_vector(shared: Shared, client: Client, *, alpha: float, l2: float) -> jax.Array:
    """x_u, float32 ``[dim]``: the exact minimum of J for one client, in training or never seen before; zero if empty.

    Args:
      shared: of `fcf`.
      client: its touched items and their r_ui.
      alpha, l2: as in training.
    """
    items, extra = own_items(shared, client, alpha)
    real = jnp.arange(len(extra)) < client.length
    left = shared.dense["gram"] + jnp.matmul((items * extra[:, None]).T, items, precision="highest")
    left += l2 * jnp.eye(len(left))
    right = jnp.where(real, 1.0 + extra, 0.0) @ items
    cholesky = jax.lax.linalg.cholesky(left, symmetrize_input=False)
    return jax.scipy.linalg.cho_solve((cholesky, True), right)


def own_items(shared: Shared, client: Client, alpha: float) -> tuple[jax.Array, jax.Array]:
    """Vectors ``[L, dim]`` of a client's items and alpha r_ui ``[L]``, both zero on padding.

    Raises:
      ValueError: for clients laid out with repeated items.
    """
    if client.slots is not None:
        raise ValueError("FCF wants each item of a client once: lay the clients out with client_data(...).")
    real = jnp.arange(len(client.item_ids)) < client.length
    items = jnp.where(real[:, None], take_rows(shared.tables["item"], client.item_ids), 0.0)
    return items, jnp.where(real, alpha * client.labels, 0.0)


def with_gram(items: jax.Array) -> Shared:
    """What the server holds for item vectors ``[num_items, dim]``: them and their Gram matrix ``[dim, dim]``."""
    return Shared({"item": items}, {"gram": jnp.matmul(items.T, items, precision="highest")})


def nearest_positive(matrix: jax.Array) -> jax.Array:
    """The positive semidefinite matrix nearest to ``[dim, dim]`` in Frobenius norm: no eigenvalue below zero."""
    values, vectors = jnp.linalg.eigh((matrix + matrix.T) / 2)
    return jnp.matmul(vectors * jnp.maximum(values, 0.0)[None, :], vectors.T, precision="highest")
