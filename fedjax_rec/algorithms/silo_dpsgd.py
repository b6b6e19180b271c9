"""Example-level DP-SGD inside the jitted local steps of silos.

A client of the round is a silo that holds many users' interactions; the unit of privacy is one example x = one
interaction, with the negatives drawn for it. Silo k starts from the server's shared parameters and its own table of
user vectors, together w, and takes ``num_local_steps`` steps

    B  ~  each x of silo k independently with probability q
    g  =  (1 / (q N_k)) (sum_{x in B} clip_C(grad l(x; w)) + z C xi),   xi ~ N(0, I)
    w <-  optimizer(w, g)

and sends its shared part minus what it received. q, C, z and the declared size N_k are public numbers. The server
averages, weighted by N_k, and steps as in FedAvg.

Abadi et al., 2016, "Deep Learning with Differential Privacy"; across silos, Lowy and Razaviyayn, 2023, "Private
Federated Learning Without a Trusted Server: Optimal Algorithms for Convex Losses".

Guarantee: example-level; adding or removing one interaction; Poisson sampling of examples. Released is every noised
gradient sum, and with it all that is computed from them: the updates, the server's states, and the silo's user vectors
too. Why each part is as it is:

- The mechanism is the user-level chain (clip, noise) with an example in the place of a client, and the event is the
  chain's own.
- User vectors feed every later gradient of their user's other examples, so they are trained by the same clipped and
  noised sums, in one joint norm with item rows and dense leaves. Trained without noise they would carry one example
  into later steps, and composing the steps would not bound the loss.
- Negatives come from the whole catalogue and know only their own example: to exclude the user's other items would let
  one example change another's gradient.
- q does not depend on the silo's true size, and sums are divided by q N_k with the declared one: under adding or
  removing one interaction both stay as they are.
- Silos hold disjoint examples, so the event of one silo holds for all (parallel composition). Which silos take part
  in a round claims no amplification: the event is charged for every round.
- The client key draws both the batches and the noise. For a release, `RoundKeys.client` must be secret.

The server only post-processes, so the round's chain stays empty, ``chain()``. A clip-and-noise chain on top would
protect whole silos: another unit, for another ledger. ``record_rounds`` charges example-level ledgers and no other.

Differs from the papers: any optax optimizer; several local steps between rounds; user vectors stay in the silo.
"""

from dataclasses import dataclass
from typing import Any

import dp_accounting
import jax
import jax.numpy as jnp
import optax
from jax.custom_batching import custom_vmap

from fedjax_rec.data.clients import Examples
from fedjax_rec.data.silos import Silo, draw_batch, draw_examples
from fedjax_rec.federated.algorithm import Algorithm, ClientOutput, ServerState
from fedjax_rec.federated.rows import Rows, add_to_total, take_rows, zero_total
from fedjax_rec.federated.transforms import UNBOUNDED, UpdateTransform, chain, scale_update, select_update
from fedjax_rec.models.base import Model, Shared, View
from fedjax_rec.privacy.ledger import Ledger
from fedjax_rec.privacy.mechanisms import clip_by_global_norm, gaussian_noise

_METRICS = ("loss", "clipped", "nonfinite", "gradient_norm", "num_examples")


@dataclass(frozen=True)
class ExampleLevelDp:
    """The public numbers of DP-SGD in a silo; the one value that both trains and accounts.

    Attributes:
      sampling_prob: q, the probability that an example takes part in a step, in (0, 1].
      l2_clip_norm: C, bound on the gradient of one example.
      noise_multiplier: z, standard deviation of a step's noise over C; 0 claims nothing.
      num_local_steps: steps of every silo in every round.

    Raises:
      ValueError: naming the number that is out of range.
    """

    sampling_prob: float
    l2_clip_norm: float
    noise_multiplier: float
    num_local_steps: int = 1

    def __post_init__(self):
        if not 0 < self.sampling_prob <= 1:
            raise ValueError(f"sampling_prob must be in (0, 1]; got {self.sampling_prob}.")
        if self.num_local_steps < 1:
            raise ValueError(f"num_local_steps must be at least 1; got {self.num_local_steps}.")
        _ = self.mechanism  # checks the clip norm and the noise

    @property
    def mechanism(self) -> UpdateTransform:
        """Clip for one example, noise for a step's sum."""
        return chain(clip_by_global_norm(self.l2_clip_norm), gaussian_noise(self.noise_multiplier * self.l2_clip_norm))

    @property
    def round_event(self) -> dp_accounting.DpEvent:
        """What one round releases about one example, add-or-remove-one: its silo's noised steps."""
        step = dp_accounting.PoissonSampledDpEvent(self.sampling_prob, self.mechanism.dp_event(UNBOUNDED, 0))
        return dp_accounting.SelfComposedDpEvent(step, self.num_local_steps)


def record_rounds(ledger: Ledger, privacy: ExampleLevelDp, *, num_rounds: int) -> Ledger:
    """Charges rounds of `silo_dpsgd` to an example-level, add-or-remove-one ledger.

    Raises:
      ValueError: if the ledger is of another unit or relation.
    """
    return ledger.record(
        privacy.round_event,
        phase="training",
        released="noised sums of clipped example gradients, every local step of every silo",
        sampler="poisson",
        count=num_rounds,
        unit="example",
        relation="add_or_remove_one",
    )


def silo_dpsgd(
    model: Model,
    *,
    privacy: ExampleLevelDp,
    users_per_silo: int,
    client_optimizer: optax.GradientTransformation,
    server_optimizer: optax.GradientTransformation | None = None,
    num_negatives: int = 4,
    example_chunk_size: int = 64,
) -> Algorithm:
    """DP-SGD in every silo, FedAvg over silos; for `Silos.clients`, full participation and an empty chain.

    Args:
      model: a recommender; its private parameters belong to a user, and a silo stacks ``[users_per_silo, ...]``.
      privacy: sampling, clip, noise and local steps.
      users_per_silo: `Silos.users_per_silo`.
      client_optimizer: for the silo's dense parameters; its state starts anew each round.
      server_optimizer: applied to minus the mean update; ``optax.sgd(1.0)``, plain averaging, by default.
      num_negatives: items drawn for each example, distinct, from the whole catalogue.
      example_chunk_size: examples differentiated side by side; bounds memory, never changes a result.
    """
    server_optimizer = optax.sgd(1.0) if server_optimizer is None else server_optimizer
    mechanism = privacy.mechanism

    def init(key):
        shared = model.init_shared(key)
        return ServerState(jnp.zeros((), jnp.int32), shared, server_optimizer.init(shared))

    def client_update(shared, private, silo, num_steps, key):
        del num_steps  # every silo takes the public number of steps, however few examples it has
        expected_batch_size = privacy.sampling_prob * silo.public_size

        def step(i, carry):
            params, opt_state, sums = carry
            batch_key, example_key, noise_key = jax.random.split(jax.random.fold_in(key, i), 3)
            in_batch = draw_batch(silo, privacy.sampling_prob, batch_key)
            total, new = clipped_sum(
                model,
                mechanism,
                params,
                silo,
                in_batch,
                num_negatives=num_negatives,
                chunk_size=example_chunk_size,
                key=example_key,
            )
            total, _ = mechanism.server(total, mechanism.init(params), noise_key)
            gradient = jax.tree.map(lambda t, p: t.reshape(p.shape) / expected_batch_size, total, params)
            updates, opt_state = client_optimizer.update(gradient, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, jax.tree.map(jnp.add, sums, new)

        start = (shared, private)
        carry = (start, client_optimizer.init(start), dict.fromkeys(_METRICS, jnp.zeros(())))
        (trained, private), _, sums = jax.lax.fori_loop(0, privacy.num_local_steps, step, carry)
        update = scale_update(jax.tree.map(jnp.subtract, trained, shared), silo.weight)
        num_examples = jnp.maximum(sums.pop("num_examples"), 1.0)
        return ClientOutput(update, private, {name: value / num_examples for name, value in sums.items()})

    def server_update(state, aggregate):
        pseudo_gradient = jax.tree.map(jnp.negative, aggregate)
        updates, opt_state = server_optimizer.update(pseudo_gradient, state.opt_state, state.shared)
        return state._replace(shared=optax.apply_updates(state.shared, updates), opt_state=opt_state)

    return Algorithm(
        init=init,
        init_private=lambda key: jax.vmap(model.init_private)(jax.random.split(key, users_per_silo)),
        client_update=client_update,
        num_steps=lambda silo: jnp.asarray(privacy.num_local_steps, jnp.int32),
        server_update=server_update,
    )


def clipped_sum(
    model: Model,
    mechanism: UpdateTransform,
    params: tuple[Shared, Any],
    silo: Silo,
    in_batch: jax.Array,
    *,
    num_negatives: int,
    chunk_size: int,
    key: jax.Array,
) -> tuple[Any, dict[str, jax.Array]]:
    """The sum of clipped example gradients of one step, before the noise.

    Guarantee: adding or removing one example of the batch moves it by at most the clip norm, all leaves together.

    Args:
      model: gives the loss of one example.
      mechanism: clips one example's gradient; a non-finite one becomes zero.
      params: shared parameters, and the silo's private ones ``[users, ...]``.
      silo: its data.
      in_batch: bool ``[L]``, of any number of examples: chunks go on until all are in.
      num_negatives: see `draw_examples`.
      chunk_size: examples side by side.
      key: of the step's examples.

    Returns:
      The sum, with the structure of ``params`` and private leaves flattened to ``[users, -1]``; and metrics summed over
      the batch.
    """
    capacity = silo.item_ids.shape[0]
    num_before = jnp.cumsum(in_batch)
    keys = tuple(jax.random.split(key))  # for negatives, and for losses that draw

    def gradients_at(place):
        return _clipped_gradients(model, mechanism, params, silo, place, num_negatives=num_negatives, keys=keys)

    def chunk(i, carry):
        total, sums = carry
        # The places of the next members in order, and L past the last one.
        wanted = i * chunk_size + 1 + jnp.arange(chunk_size, dtype=jnp.int32)
        place = jnp.searchsorted(num_before, wanted).astype(jnp.int32)
        gradients, metrics = gradients_at(place)
        gradients = jax.vmap(select_update)(place < capacity, gradients)
        sums = {name: sums[name] + jnp.sum(jnp.where(place < capacity, metrics[name], 0.0)) for name in sums}
        return add_to_total(total, gradients), sums

    chunk_shape, _ = jax.eval_shape(gradients_at, jax.ShapeDtypeStruct((1,), jnp.int32))
    one_shape = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), chunk_shape)
    trips = _most_in_chunk(-(-in_batch.sum(dtype=jnp.int32) // chunk_size))
    return jax.lax.fori_loop(0, trips, chunk, (zero_total(one_shape), dict.fromkeys(_METRICS, jnp.zeros(()))))


def _clipped_gradients(model, mechanism, params, silo, place, *, num_negatives, keys):
    """Clipped gradients of the examples at ``place``, leaves ``[B, ...]`` with `Rows` for tables and users; metrics."""
    shared, private = params
    negative_key, example_key = keys
    examples = draw_examples(silo, place, num_negatives=num_negatives, key=negative_key)
    users = silo.user_slots.at[place].get(mode="fill", fill_value=0)

    def one(rows, own, user, example, key):
        loss_key, clip_key = jax.random.split(key)

        def loss(rows, dense, own):
            rows, batch = jax.tree.map(lambda x: x[None], (rows, example))
            return model.loss(View(rows, dense), own, batch, loss_key)

        value, (by_row, dense, by_user) = jax.value_and_grad(loss, argnums=(0, 1, 2))(rows, shared.dense, own)
        tables = {name: _real_rows(g, example, shared.tables[name].shape[0]) for name, g in by_row.items()}
        by_user = jax.tree.map(lambda g, x: Rows(user[None], g.reshape(1, -1), x.shape[0]), by_user, private)
        gradient, clip = mechanism.client((Shared(tables, dense), by_user), mechanism.init(params), clip_key)
        metrics = {"loss": jnp.where(jnp.isfinite(value), value, 0.0), "num_examples": jnp.ones(())}
        metrics |= {name: clip[name] for name in ("clipped", "nonfinite")} | {"gradient_norm": clip["update_norm"]}
        return gradient, metrics

    rows = {name: take_rows(table, examples.ids) for name, table in shared.tables.items()}
    own = jax.tree.map(lambda x: take_rows(_flat(x), users).reshape(-1, *x.shape[1:]), private)
    own_keys = jax.vmap(lambda p: jax.random.fold_in(example_key, p))(place)
    return jax.vmap(one)(rows, own, users, examples, own_keys)


def _flat(table: jax.Array) -> jax.Array:
    return table.reshape(table.shape[0], -1)


def _real_rows(gradient: jax.Array, example: Examples, num_rows: int) -> Rows:
    """Gradient rows of one example without its padding, whatever the model made of it."""
    real = example.weights > 0
    return Rows(jnp.where(real, example.ids, num_rows), jnp.where(real[:, None], gradient, 0.0), num_rows)


@custom_vmap
def _most_in_chunk(num_trips: jax.Array) -> jax.Array:
    """A trip count that silos side by side have in common, the largest of theirs.

    Further trips find no example and change nothing; with a count of its own for each silo, the loop would copy every
    silo's tables in every trip to keep those that are done.
    """
    return num_trips


@_most_in_chunk.def_vmap
def _largest(axis_size, in_batched, num_trips):
    del axis_size, in_batched
    return _most_in_chunk(jnp.max(num_trips)), False
