"""FedGAN: a Wasserstein GAN of users' rows whose critic is trained by the clients, and whose generator by the server.

With the nets of `models.gan_rows`, a round is

    client u    g_u = grad_c  1/m sum_j [ D_c(x~_j) - D_c(x_u) + w (|grad D_c(x^_j)| - 1)^2 ]
    server      c <- optimizer step with (1/n) sum_{u in cohort} g_u,   n = the expected cohort
                then some steps of  theta <- theta + lr grad_theta mean_b D_c(x~_b)

where x_u is u's own row of norm 1 and x~_j are m fake rows as long as it, which u draws from the generator that it
received, x^_j between the two. Gulrajani, Ahmed, Arjovsky, Dumoulin, Courville (2017), "Improved Training of
Wasserstein GANs", with one user as one example. That only the critic meets data, so that only its gradients need a clip
and noise, is Xie, Lin, Wang, Wang, Zhou (2018), "Differentially Private Generative Adversarial Network".

The generator never sees a row. Its steps read the critic and random numbers that the server's state gives, so a run's
generators are functions of the noised sums.

Guarantee: with `user_level_dp` or another clip and noise in the chain, user-level under the sampler's relation. What is
released is the server's states: critic, generator and optimizers. The penalty is inside g_u, so the chain's clip bounds
all of what a user moves, and the events of the chain are all that is to be charged: no step of the generator adds to
them, however many there are. ``log_popularity`` must be public or charged as a release of its own, and `row_lengths`,
sizes and rates must be fixed without the data.

Differs from the papers: gradients of the critic come from a cohort, one row each; a generator step follows each critic
step rather than every fifth; rows are discrete, with a straight-through gradient.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_rec.federated.algorithm import Algorithm, ClientOutput, ServerState
from fedjax_rec.federated.rows import Rows
from fedjax_rec.federated.transforms import select_update
from fedjax_rec.models import gan_rows
from fedjax_rec.models.base import Shared


class GanServer(NamedTuple):
    """What the server keeps beside the shared parameters: two optimizers' states, and uint32 data of a public key."""

    critic: Any
    generator: Any
    key_data: jax.Array


def fedgan(
    num_items: int,
    *,
    log_popularity: jax.Array | None = None,
    item_weights: jax.Array | None = None,
    sizes: gan_rows.GanSizes = gan_rows.SMALL,
    critic_optimizer: optax.GradientTransformation | None = None,
    generator_optimizer: optax.GradientTransformation | None = None,
    penalty_weight: float = 1.0,
    num_fakes: int = 1,
    generator_steps: int = 1,
    generator_batch_size: int = 64,
    row_lengths: tuple[int, int] = (20, 200),
    temperature: float = 0.5,
) -> Algorithm:
    """Clients send critic gradients; the server trains critic and generator. Nobody keeps anything.

    Shared: tables "critic" ``[num_items, critic_rank]`` and "generator" ``[num_items, rank + 1]``, and the rest of both
    under the same names. Clients send nothing for the generator: no rows, and zeros for its few dense numbers.

    Args:
      num_items: catalogue size.
      log_popularity: float32 ``[num_items]``, where the generator starts; None = all items alike.
      item_weights: float32 ``[num_items]`` in [0, 1], how strongly the critic sees each item; None = 1. Like
        ``log_popularity`` public or released. With noise in the critic, small weights for rare items keep out noise
        that no signal goes with.
      sizes: of the nets.
      critic_optimizer: takes the mean gradient; Adam(0.005, 0.5, 0.9) by default.
      generator_optimizer: Adam(0.0005, 0.5, 0.9) by default.
      penalty_weight: w, of the gradient penalty.
      num_fakes: m, fake rows that a client draws.
      generator_steps: of the server after each critic step; they cost no privacy.
      generator_batch_size: fake rows in each of them.
      row_lengths: shortest and longest fake row in a generator step, public; drawn evenly in their logarithm.
      temperature: of the straight-through gradient.

    Raises:
      ValueError: for a size below 1, a ``log_popularity`` of another length, or row lengths out of order.
    """
    counts = {"num_items": num_items, "num_fakes": num_fakes, "generator_batch_size": generator_batch_size}
    for name, value in (counts | sizes._asdict()).items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}.")
    if generator_steps < 0 or not penalty_weight >= 0 or not temperature > 0:
        raise ValueError(
            "fedgan needs generator_steps >= 0, penalty_weight >= 0 and temperature > 0; got "
            f"{generator_steps}, {penalty_weight} and {temperature}."
        )
    shortest, longest = row_lengths
    if not 1 <= shortest <= longest:
        raise ValueError(f"row_lengths must be shortest and longest, 1 or more; got {row_lengths}.")
    log_popularity = jnp.zeros(num_items) if log_popularity is None else jnp.asarray(log_popularity, jnp.float32)
    if log_popularity.shape != (num_items,):
        raise ValueError(f"log_popularity must be [{num_items}], one an item; got {list(log_popularity.shape)}.")
    weights = jnp.ones(num_items) if item_weights is None else jnp.asarray(item_weights, jnp.float32)
    if weights.shape != (num_items,) or not bool(jnp.all((weights >= 0) & (weights <= 1)) & jnp.any(weights > 0)):
        raise ValueError(f"item_weights must be [{num_items}] numbers in [0, 1], not all 0; got {list(weights.shape)}.")
    critic_optimizer = critic_optimizer or optax.adam(5e-3, b1=0.5, b2=0.9)
    generator_optimizer = generator_optimizer or optax.adam(5e-4, b1=0.5, b2=0.9)

    def init(key):
        critic_key, generator_key, draw_key = jax.random.split(key, 3)
        critic = gan_rows.init_critic(critic_key, sizes, weights)
        generator = gan_rows.init_generator(generator_key, sizes, log_popularity)
        server = GanServer(
            critic_optimizer.init(critic), generator_optimizer.init(generator), jax.random.key_data(draw_key)
        )
        return ServerState(jnp.zeros((), jnp.int32), _shared(critic, generator), server)

    def client_update(shared, private, client, num_steps, key):
        del num_steps
        critic, generator = _part(shared, "critic"), _part(shared, "generator")
        ids = client.item_ids if client.row_ids is None else client.row_ids
        n = jnp.sum(ids < num_items)
        row = jnp.zeros(num_items).at[ids].set(1.0, mode="drop") / jnp.sqrt(jnp.maximum(n, 1))

        def mean_loss(critic):
            critic = seeing(critic)

            def one(key):
                row_key, mix_key = jax.random.split(key)
                fake = gan_rows.virtual_row(*generator, jnp.maximum(n, 1), row_key, temperature=temperature)
                mix = jax.random.uniform(mix_key)
                gap = gan_rows.critic_value(*critic, row) - gan_rows.critic_value(*critic, fake)
                return gan_rows.critic_loss(*critic, row, fake, mix, penalty_weight), gap

            losses, gaps = jax.vmap(one)(jax.random.split(key, num_fakes))
            return jnp.mean(losses), jnp.mean(gaps)

        (loss, gap), gradient = jax.value_and_grad(mean_loss, has_aux=True)(critic)
        gradient = select_update(n > 0, gradient)  # a client without items has no row
        table, dense = generator
        nothing = Rows(jnp.zeros(0, jnp.int32), jnp.zeros((0, table.shape[1])), num_items)
        update = _shared(gradient, (nothing, jax.tree.map(jnp.zeros_like, dense)))
        return ClientOutput(update, private, {"loss": loss, "gap": gap})

    def server_update(state, aggregate):
        critic, server = _part(state.shared, "critic"), state.opt_state
        steps, critic_state = critic_optimizer.update(_part(aggregate, "critic"), server.critic, critic)
        critic = optax.apply_updates(critic, steps)
        # From here on post-processing: the noised sum is used up, and what is drawn is drawn from a public key.
        key = jax.random.fold_in(jax.random.wrap_key_data(server.key_data), state.round)

        def generator_step(carry, key):
            generator, generator_state = carry
            gradient = jax.grad(generator_loss)(generator, critic, key)
            steps, generator_state = generator_optimizer.update(gradient, generator_state, generator)
            return (optax.apply_updates(generator, steps), generator_state), None

        start = (_part(state.shared, "generator"), server.generator)
        (generator, generator_state), _ = jax.lax.scan(generator_step, start, jax.random.split(key, generator_steps))
        server = GanServer(critic_state, generator_state, server.key_data)
        return state._replace(shared=_shared(critic, generator), opt_state=server)

    def seeing(critic):
        """The critic with each item weighed, as if the row were."""
        table, dense = critic
        return table * weights[:, None], dense

    def generator_loss(generator, critic, key):
        critic = seeing(critic)

        def one(key):
            length_key, row_key = jax.random.split(key)
            n = log_uniform_length(length_key, shortest, min(longest, num_items))
            row = gan_rows.virtual_row(*generator, n, row_key, temperature=temperature)
            return -gan_rows.critic_value(*critic, row)

        return jnp.mean(jax.vmap(one)(jax.random.split(key, generator_batch_size)))

    return Algorithm(
        init=init,
        init_private=lambda key: (),
        client_update=client_update,
        num_steps=lambda client: jnp.int32(1),
        server_update=server_update,
    )


def log_uniform_length(key: jax.Array, shortest: int, longest: int) -> jax.Array:
    """A length in ``shortest .. longest``, int32, even in its logarithm."""
    low, high = math.log(min(shortest, longest)), math.log(longest + 1)
    drawn = jnp.floor(jnp.exp(jax.random.uniform(key, minval=low, maxval=high)))
    return jnp.clip(drawn, min(shortest, longest), longest).astype(jnp.int32)


def _part(shared: Shared, name: str) -> tuple[jax.Array, Any]:
    """(table, dense) of the critic or the generator."""
    return shared.tables[name], shared.dense[name]


def _shared(critic, generator) -> Shared:
    tables, dense = ({"critic": c, "generator": g} for c, g in zip(critic, generator, strict=True))
    return Shared(tables, dense)
