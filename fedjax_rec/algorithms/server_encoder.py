"""A large item encoder that stays on the server: clients see item vectors, and send gradients of these.

    v_i = f(theta, content of i)  for i in a public slate
    g_u = d loss_u(v, w) / d (v, w)                                        one client, clipped jointly
    theta <- step(theta, sum_i (d f_i / d theta)^T G_i),   w <- step(w, G_w),   G = (noised) mean of g_u

The server sends the vectors v of the slate and a small user tower w; a client answers with the gradient of its loss in
both. The chain clips them together and adds noise to their sum, and the server propagates that one noised sum backward
through the encoder. Whatever happens behind the sum is post-processing: a text encoder of any size costs what its
vectors cost, and epsilon is the same whether the encoder is trained or not.

Yi, Wu, Wu, Liu, Sun, Xie, 2021, "Efficient-FedRec: Efficient Federated Learning Framework for Privacy-Preserving News
Recommendation". Differs from the paper: the slate is fixed and public, so nothing is revealed by which vectors a client
asks for, where the paper sends the union of a cohort's news; a client weighs 1, and not as many as its examples, so
that one user has one bound; both steps are of any optax optimizer.

What a client reveals is its part of the sum: gradients for the whole slate, most rows of them zero for a loss that
reads few items. The zeros show what it read to whoever sees a single upload, so pair this with a secure sum, or trust
the server with uploads. Items of its history outside the slate are left out of its loss.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_rec.algorithms.fedsequence import query_size
from fedjax_rec.federated.algorithm import Algorithm, ClientOutput, ServerState
from fedjax_rec.federated.rows import Rows, find_rows
from fedjax_rec.models.base import Shared
from fedjax_rec.models.sequence import SequenceModel

Encode = Callable[[Any, Any], jax.Array]
"""``(theta, content of n items) -> float32 [n, dim]``, each row of its own content alone."""

ClientLoss = Callable[[Shared, jax.Array, jax.Array, jax.Array], jax.Array]
"""``(params, item_ids int32 [L], labels float32 [L], key) -> float32 scalar`` for one client."""


class EncoderState(NamedTuple):
    """The server's own: a function of the sums that it received, so epsilon covers it.

    Attributes:
      theta: parameters of the encoder.
      encoder: state of its optimizer.
      tower: state of the user tower's optimizer.
    """

    theta: Any
    encoder: Any
    tower: Any


def server_encoder(
    model: SequenceModel,
    encode: Encode,
    content: Any,
    init_theta: Callable[[jax.Array], Any],
    *,
    slate: np.ndarray | None = None,
    backward: bool = True,
    loss: ClientLoss | None = None,
    encoder_optimizer: optax.GradientTransformation | None = None,
    tower_optimizer: optax.GradientTransformation | None = None,
    batch_size: int = 64,
) -> Algorithm:
    """Federated training of a user tower, and of an item encoder behind the sum.

    Shared: table "item" ``[slate, dim]``, the current vectors, and the tower in ``dense``; `EncoderState` is the
    ``opt_state``. Private: "query", what the client's history asks for under the vectors that it received
    last, which training never reads; `fedsequence_score` ranks the slate with it.

    Guarantee: that of the chain and the sampler it runs with, such as user-level, add-or-remove-one, Poisson sampling,
    under `user_level_dp`. Released are the server's states, ``theta`` included: all of them are functions of the noised
    sums, of public content and of the key of the first parameters, and of nothing else.

    With ``backward=False`` clients send the tower's gradient alone, which then has the whole clip norm; the release and
    its event are the same.

    Args:
      model: whose only table is "item" ``[slate, dim]``, such as ``nrms(id_table(len(slate), dim=...))``. What it draws
        for that table is not used.
      encode: the encoder. Frozen weights are none of ``theta``; close over them, or put them into a pytree of its own.
      content: public pytree of arrays ``[num_items, ...]``: token ids, masks, fixed features.
      init_theta: ``key -> theta``.
      slate: int ``[S]``, public item ids, rising; None = the catalogue.
      backward: whether the encoder is trained.
      loss: of one client on items of the slate, with the labels of its data; by default the model's, of the history.
      encoder_optimizer: of theta; ``optax.adam(1e-3)`` by default.
      tower_optimizer: of the user tower; ``optax.adam(1e-3)`` by default.
      batch_size: items that the encoder works on at a time, which sets the server's memory and never a result.

    Raises:
      ValueError: if model, slate, content and encoder do not fit each other.
    """
    num_items = len(jax.tree.leaves(content)[0])
    slate = np.arange(num_items, dtype=np.int32) if slate is None else np.asarray(slate, np.int32)
    _check(model, slate, num_items, batch_size)
    _check_encoder(model, encode, content, init_theta)
    whole = len(slate) == num_items
    content = jax.tree.map(lambda x: jnp.asarray(x) if whole else jnp.asarray(x)[slate], content)
    encoder_optimizer = optax.adam(1e-3) if encoder_optimizer is None else encoder_optimizer
    tower_optimizer = optax.adam(1e-3) if tower_optimizer is None else tower_optimizer
    client_loss = (lambda params, ids, labels, key: model.loss(params, ids, key)) if loss is None else loss

    def init(key):
        tower_key, theta_key = jax.random.split(key)
        theta, tower = init_theta(theta_key), model.init(tower_key).dense
        vectors = encode_items(encode, theta, content, batch_size=batch_size)
        opt_state = EncoderState(theta, encoder_optimizer.init(theta), tower_optimizer.init(tower))
        return ServerState(jnp.zeros((), jnp.int32), Shared({"item": vectors}, tower), opt_state)

    def client_update(shared, private, client, num_steps, key):
        del private, num_steps
        if client.num_items != num_items:
            raise ValueError(f"Clients have items of {client.num_items} and the content is of {num_items}.")
        ids, labels = (client.item_ids, client.labels) if whole else on_slate(client, slate)
        if backward:
            value, gradient = jax.value_and_grad(client_loss)(shared, ids, labels, key)
            every = jnp.arange(len(slate), dtype=jnp.int32)
            rows = Rows(every, gradient.tables["item"], len(slate), whole=True)
            tower = gradient.dense
        else:
            value, tower = jax.value_and_grad(lambda w: client_loss(shared._replace(dense=w), ids, labels, key))(
                shared.dense
            )
            rows = Rows(jnp.zeros(0, jnp.int32), jnp.zeros((0, shared.tables["item"].shape[1])), len(slate))
        own = {"query": model.query(shared, ids, None)}
        return ClientOutput(Shared({"item": rows}, tower), own, {"loss": value})

    def server_update(state, aggregate):
        theta, encoder, tower = state.opt_state
        shared = state.shared
        change, tower = tower_optimizer.update(aggregate.dense, tower, shared.dense)
        shared = shared._replace(dense=optax.apply_updates(shared.dense, change))
        if backward:
            gradient = pull_back(encode, theta, content, aggregate.tables["item"], batch_size=batch_size)
            change, encoder = encoder_optimizer.update(gradient, encoder, theta)
            theta = optax.apply_updates(theta, change)
            shared = shared._replace(tables={"item": encode_items(encode, theta, content, batch_size=batch_size)})
        return state._replace(shared=shared, opt_state=EncoderState(theta, encoder, tower))

    return Algorithm(
        init=init,
        init_private=lambda key: {"query": jnp.zeros(query_size(model))},
        client_update=client_update,
        num_steps=lambda client: jnp.int32(1),
        server_update=server_update,
    )


def encode_items(encode: Encode, theta: Any, content: Any, *, batch_size: int = 64) -> jax.Array:
    """Vectors of all items of some content, float32 ``[items, dim]``, a batch at a time.

    Args:
      encode: the encoder.
      theta: its parameters.
      content: pytree of arrays ``[items, ...]``.
      batch_size: items at a time.
    """
    num_items = len(jax.tree.leaves(content)[0])
    vectors = jax.lax.map(lambda batch: encode(theta, batch), _batches(content, batch_size))
    return vectors.reshape(-1, vectors.shape[-1])[:num_items]


def pull_back(encode: Encode, theta: Any, content: Any, cotangents: jax.Array, *, batch_size: int = 64) -> Any:
    """Gradient in theta of ``sum_i <cotangent_i, f(theta, content_i)>``, with the memory of one batch.

    Args:
      encode: the encoder.
      theta: its parameters.
      content: pytree of arrays ``[items, ...]``.
      cotangents: float32 ``[items, dim]``, gradients of the item vectors.
      batch_size: items at a time; each batch is encoded anew.
    """
    num_items, dim = cotangents.shape
    padded = jnp.pad(cotangents, ((0, -num_items % batch_size), (0, 0)))  # padding has no part in the sum

    def add(total, batch):
        batch_content, cotangent = batch
        (gradient,) = jax.vjp(lambda theta: encode(theta, batch_content), theta)[1](cotangent)
        return jax.tree.map(jnp.add, total, gradient), None

    batches = (_batches(content, batch_size), padded.reshape(-1, batch_size, dim))
    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, theta), batches)[0]


def on_slate(client, slate: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """A client's items as places in a slate, and their labels, in their order; others are moved behind as padding."""
    place, found = find_rows(jnp.asarray(slate), client.item_ids)
    order = jnp.argsort(~found, stable=True)
    return jnp.where(found, place, len(slate))[order].astype(jnp.int32), jnp.where(found, client.labels, 0.0)[order]


def _batches(content: Any, batch_size: int) -> Any:
    """Arrays ``[items, ...]`` as ``[batches, batch_size, ...]``; the last item fills the last batch."""

    def split(x):
        missing = -len(x) % batch_size
        filled = jnp.concatenate([x, jnp.broadcast_to(x[-1:], (missing, *x.shape[1:]))])
        return filled.reshape(-1, batch_size, *x.shape[1:])

    return jax.tree.map(split, content)


def _dim(model: SequenceModel) -> int:
    return jax.eval_shape(model.init, jax.random.key(0)).tables["item"].shape[1]


def _check(model, slate, num_items, batch_size) -> None:
    tables = jax.eval_shape(model.init, jax.random.key(0)).tables
    if list(tables) != ["item"]:
        raise ValueError(
            f"The encoder takes the place of the one table 'item', and the model has tables {sorted(tables)}; build it "
            "on id_table."
        )
    if len(slate) == 0 or np.any(np.diff(slate) <= 0) or slate[0] < 0 or slate[-1] >= num_items:
        raise ValueError(f"A slate holds rising item ids in 0..{num_items - 1}; sort it, and drop repeats and others.")
    if model.num_items != len(slate) or len(tables["item"].shape) != 2 or tables["item"].shape[0] != len(slate):
        raise ValueError(f"The model has {model.num_items} items and the slate {len(slate)}; they must be the same.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}.")


def _check_encoder(model, encode, content, init_theta) -> None:
    lengths = {len(leaf) for leaf in jax.tree.leaves(content)}
    if len(lengths) > 1:
        raise ValueError(f"Content arrays must all have one row an item; they have {sorted(lengths)} rows.")
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), content)
    shape = jax.eval_shape(lambda key, one: encode(init_theta(key), one), jax.random.key(0), one).shape
    if shape != (1, _dim(model)):
        raise ValueError(f"The encoder gives {shape} for one item, and the model takes {(1, _dim(model))}.")
