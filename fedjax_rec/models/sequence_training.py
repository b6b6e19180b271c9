"""Training of sequence recommenders in one place, on everybody's histories: what federated training is compared with.

    min over params of  mean over users of  loss(params; history of u),

by Adam with beta_2 = .98 on mini-batches of users, as of Kang and McAuley, 2018, "Self-Attentive Sequential
Recommendation". The mean is over users, as in `fedsequence`: a user's own targets are averaged first.

Users are put into buckets by length, so that a short history costs little; a batch is of one bucket, batches come in
random order, and an epoch is one compiled program. Nothing here is private: for privacy, `fedsequence` trains the same
model in rounds.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_rec.data.interactions import Interactions
from fedjax_rec.models.base import Shared
from fedjax_rec.models.sequence import SequenceModel, padded_histories

Report = Callable[[int, int, str], None]
"""``(epoch, num_epochs, text)``: how far training is."""


class SequenceState(NamedTuple):
    """Of a training run; it goes on from here if it is kept.

    Attributes:
      epoch: int32 scalar, epochs done.
      params: the model's.
      opt_state: the optimizer's.
    """

    epoch: jax.Array
    params: Shared
    opt_state: Any


class SequenceTraining(NamedTuple):
    """A compiled training procedure.

    Attributes:
      init: ``key -> SequenceState``.
      run_epoch: ``(state, key) -> (state, loss)``, the mean over the epoch's batches. ``state`` is donated; the epoch's
        number is folded into the key, so one key serves all epochs.
    """

    init: Callable[[jax.Array], SequenceState]
    run_epoch: Callable[[SequenceState, jax.Array], tuple[SequenceState, jax.Array]]


def train_sequence(
    model: SequenceModel,
    histories: Interactions,
    *,
    seed: int,
    num_epochs: int,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    num_buckets: int = 3,
    validate: Callable[[Shared], float] | None = None,
    validate_every: int = 5,
    patience: int = 4,
    report: Report | None = None,
) -> Shared:
    """Trains a recommender of the next item.

    Args:
      model: such as `sasrec`.
      histories: of all users, in time order; only the last ``max_length + 1`` items of each count.
      seed: of the initial parameters, the order of users, dropout, masks and negatives.
      num_epochs: passes over all users, or the most of them if ``validate`` is given.
      batch_size: users a step.
      learning_rate: of Adam.
      num_buckets: lengths that are compiled; more waste less on padding.
      validate: the quality of parameters on held-out data, higher is better; the best are returned.
      validate_every: epochs between two looks.
      patience: looks without a better value after which training stops.
      report: after each epoch.

    Raises:
      ValueError: for settings out of range, or no user with two items.
    """
    training = sequence_training(
        model, histories, batch_size=batch_size, learning_rate=learning_rate, num_buckets=num_buckets
    )
    if num_epochs < 1 or validate_every < 1 or patience < 1:
        raise ValueError(
            "num_epochs, validate_every and patience must be at least 1; got "
            f"{num_epochs}, {validate_every} and {patience}."
        )
    init_key, run_key = jax.random.split(jax.random.key(seed))
    state = training.init(init_key)
    best, best_value, stale = None, -np.inf, 0
    for epoch in range(1, num_epochs + 1):
        state, loss = training.run_epoch(state, run_key)
        said = f"loss {float(loss):.3f}"
        if validate is not None and (epoch % validate_every == 0 or epoch == num_epochs):
            value = float(validate(state.params))
            said += f", validation {value:.4f}"
            if value > best_value:
                # A copy: the next epoch takes the state's buffers over.
                best, best_value, stale = jax.tree.map(jnp.array, state.params), value, 0
            else:
                stale += 1
        if report is not None:
            report(epoch, num_epochs, said)
        if stale >= patience:
            break
    return state.params if best is None else best


def sequence_training(
    model: SequenceModel,
    histories: Interactions,
    *,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    num_buckets: int = 3,
) -> SequenceTraining:
    """Compiles training one epoch at a time; see `train_sequence`.

    Raises:
      ValueError: for settings out of range, or no user with two items.
    """
    if batch_size < 1 or num_buckets < 1 or not learning_rate > 0:
        raise ValueError(
            "batch_size and num_buckets must be at least 1 and learning_rate positive; got "
            f"{batch_size}, {num_buckets} and {learning_rate}."
        )
    counts = histories.counts_per_user
    users = np.flatnonzero(counts >= 2)
    if not len(users):
        raise ValueError(f"{histories.name} has no user with two items; there is no next item to learn.")
    users = users[np.argsort(counts[users], kind="stable")]
    longest = min(int(counts.max()), model.max_length + 1)
    batch_size = min(batch_size, len(users))
    buckets = _buckets(np.minimum(counts[users], longest), batch_size, num_buckets)
    rows = jax.device_put(padded_histories(histories, users, longest))

    def init(key):
        params = jax.jit(model.init)(key)
        return SequenceState(jnp.zeros((), jnp.int32), params, _adam(learning_rate).init(params))

    def run_epoch(state, key):
        return _run_epoch(
            state,
            rows,
            key,
            learning_rate,
            loss=model.loss,
            num_items=model.num_items,
            buckets=buckets,
            batch_size=batch_size,
        )

    return SequenceTraining(init, run_epoch)


class _Bucket(NamedTuple):
    """Users ``first .. last - 1`` of those sorted by length, none longer than ``width``."""

    first: int
    last: int
    width: int


def _buckets(lengths: np.ndarray, batch_size: int, num_buckets: int) -> tuple[_Bucket, ...]:
    """Cuts users, sorted by length, into buckets of whole batches; only the last one may have an incomplete batch."""
    num_batches = -(-len(lengths) // batch_size)
    cuts = np.unique(np.linspace(0, num_batches, num_buckets + 1).round().astype(int)) * batch_size
    cuts[-1] = len(lengths)
    return tuple(_Bucket(int(a), int(b), int(lengths[b - 1])) for a, b in itertools.pairwise(cuts))


def _adam(learning_rate) -> optax.GradientTransformation:
    return optax.adam(learning_rate, b2=0.98)


@partial(jax.jit, static_argnames=("loss", "num_items", "buckets", "batch_size"), donate_argnums=0)
def _run_epoch(state, rows, key, learning_rate, *, loss, num_items, buckets: tuple[_Bucket, ...], batch_size: int):
    optimizer = _adam(learning_rate)
    order_key, batch_key, step_key = jax.random.split(jax.random.fold_in(key, state.epoch), 3)
    orders, kinds = [], []
    for index, bucket in enumerate(buckets):
        own = bucket.first + jax.random.permutation(jax.random.fold_in(order_key, index), bucket.last - bucket.first)
        own = jnp.pad(own, (0, -len(own) % batch_size), constant_values=len(rows)).reshape(-1, batch_size)
        orders.append(own)
        kinds.append(jnp.full(len(own), index, jnp.int32))
    shuffled = jax.random.permutation(batch_key, sum(map(len, orders)))
    orders, kinds = jnp.concatenate(orders)[shuffled], jnp.concatenate(kinds)[shuffled]

    def batch_loss(params, batch, keys, width):
        histories = rows[:, :width].at[batch].get(mode="fill", fill_value=num_items)
        losses = jax.vmap(loss, in_axes=(None, 0, 0))(params, histories, keys)
        return losses.sum() / jnp.maximum((batch < len(rows)).sum(), 1)  # of users that are none, the loss is 0

    branches = [partial(jax.value_and_grad(batch_loss), width=bucket.width) for bucket in buckets]

    def one_step(carry, xs):
        params, opt_state = carry
        batch, kind, step = xs
        keys = jax.random.split(jax.random.fold_in(step_key, step), batch_size)
        value, gradient = jax.lax.switch(kind, [lambda *a, f=f: f(*a) for f in branches], params, batch, keys)
        change, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, change), opt_state), value

    steps = jnp.arange(len(orders))
    (params, opt_state), values = jax.lax.scan(one_step, (state.params, state.opt_state), (orders, kinds, steps))
    return SequenceState(state.epoch + 1, params, opt_state), values.mean()
