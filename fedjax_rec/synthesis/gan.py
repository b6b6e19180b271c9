"""Virtual users from a generative adversarial network, and from the same generator without its adversary.

    with      counts, then rounds of `algorithms.fedgan`: clients send gradients of the critic
    without   counts, then one Gram matrix (`models.dp_gram`): the generator is fitted to it by a moment loss,

              min  |E x~ x~^T - C|^2 + |E x~ - c|^2,   C = (1/N) sum_u x_u x_u^T,   c = (1/N) sum_u x_u

for rows x_u of norm 1. The loss is a maximum mean discrepancy with the kernel (x . y)^2 + x . y (Gretton, Borgwardt,
Rasch, Schoelkopf, Smola, 2012, "A Kernel Two-Sample Test"), so its critic is known in closed form and no game is
played: what the game itself adds is the difference of the two. Fitting a generator to noised moments is the way of
Harder, Adamczewski, Park (2021), "DP-MERF: Differentially Private Mean Embeddings with Random Features for Practical
Privacy-Preserving Data Generation".

Both start at the released popularity of items (Gumbel top-n of log counts), and both draw virtual users from
z ~ N(0, I): there is no encoder, and no real user's row has a latent.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg

from fedjax_rec.algorithms.fedgan import fedgan, log_uniform_length
from fedjax_rec.models import gan_rows
from fedjax_rec.models.dp_ease import noise_edge
from fedjax_rec.models.dp_gram import dp_gram
from fedjax_rec.models.popularity import DpPopularity, dp_popularity
from fedjax_rec.privacy.budget import Phase
from fedjax_rec.privacy.ledger import Entry
from fedjax_rec.synthesis.generator import Generator
from fedjax_rec.synthesis.marginals import COUNTS, RELEASED_COUNTS
from fedjax_rec.synthesis.methods import Method
from fedjax_rec.synthesis.populations import with_rows
from fedjax_rec.synthesis.rounds import TRAINING, run_rounds

MOMENTS = "moments"
_SPAN = 50  # rounds, or steps, between two reports


def gan_method(
    *,
    adversarial: bool = True,
    rounds: int = 600,
    sampling_prob: float = 0.1,
    l2_clip_norm: float = 0.3,
    counts_share: float = 0.1,
    train_popularity: bool = False,
    generator_lr: float = 7e-4,
    critic_lr: float = 1e-2,
    generator_steps: int = 1,
    generator_batch_size: int = 64,
    penalty_weight: float = 1.0,
    num_fakes: int = 1,
    row_lengths: tuple[int, int] = (20, 200),
    temperature: float = 0.5,
    num_moments: int = 64,
    moment_steps: int = 600,
    moment_lr: float = 3e-2,
    moment_batch_size: int = 128,
    sizes: gan_rows.GanSizes = gan_rows.SMALL,
) -> Method:
    """A GAN of users' rows, or its ablation.

    Guarantee: user-level, adding or removing one user with all of its rows, a trusted curator. Released are, in phase
    "counts", the sum of rows of norm 1 (`dp_popularity`, sensitivity 1) and, in phase "training", one noised sum of
    critic gradients clipped to ``l2_clip_norm`` a round, on secret Poisson cohorts; without the adversary, in phase
    "moments", the Gram matrix of the same rows (`dp_gram`, sensitivity 1). The generator is post-processing of them.
    The catalogue and the number of users with rows are public. Settings must be chosen without the private data, or the
    choice be charged.

    Args:
      adversarial: False fits the same generator to released moments, without a critic.
      rounds: of critic training.
      sampling_prob: chance of a user to take part in a round; 1 = everybody in every round.
      l2_clip_norm: of a user's critic gradient, in the private case.
      counts_share: about the share of the budget, as 1 / noise^2, that the item counts get; in (0, 1).
      train_popularity: False keeps the released popularity of items as it is, and only tastes are learned.
      generator_lr: of Adam at the start; it falls to zero along a cosine.
      critic_lr: of Adam, on the server.
      generator_steps: after each critic step.
      generator_batch_size: fake rows of a generator step.
      penalty_weight: see `fedgan`.
      num_fakes: see `fedgan`.
      row_lengths: see `fedgan`.
      temperature: see `fedgan`.
      num_moments: eigenvectors of the Gram matrix that the moment loss keeps.
      moment_steps: generator steps on that loss.
      moment_lr: of Adam in them, as ``generator_lr``.
      moment_batch_size: fake rows in each of them.
      sizes: of the nets.

    Raises:
      ValueError: for a share or probability outside its range; and what `fedgan` refuses, when fitting.
    """
    if not 0 < counts_share < 1 or not 0 < sampling_prob <= 1:
        raise ValueError(
            "counts_share must lie between 0 and 1 and sampling_prob above 0 and at most at 1; got "
            f"{counts_share} and {sampling_prob}."
        )
    if min(rounds, moment_steps, num_moments) < 1:
        raise ValueError(
            f"rounds, moment_steps and num_moments must be at least 1; got {rounds}, {moment_steps} and {num_moments}."
        )
    settings = {name: value for name, value in locals().items() if name != "sizes"} | sizes._asdict()

    def phases(num_users, num_items):
        # So many rounds of sampled cohorts cost about what one release of noise z / (q sqrt(T)) costs.
        lasting = math.sqrt(rounds) * sampling_prob if adversarial else 1.0
        counts = Phase(COUNTS, weight=math.sqrt((1 - counts_share) / counts_share) / lasting, num_numbers=num_items)
        if not adversarial:
            pairs = num_items * (num_items + 1) // 2
            return counts, Phase(MOMENTS, weight=1.0, num_numbers=pairs)
        cohort = {} if sampling_prob == 1 else {"sampler": "poisson", "cohort_size": sampling_prob * num_users}
        numbers = num_items * sizes.critic_rank
        return counts, Phase(
            TRAINING, rounds=rounds, weight=1.0, sensitivity=l2_clip_norm, num_numbers=numbers, **cohort
        )

    def fit(train, noise, key, report):
        users = with_rows(train)
        count_key, fit_key = jax.random.split(key)
        counts = dp_popularity(users, noise_multiplier=float(noise[COUNTS][0]), key=count_key)
        charged = (Entry(COUNTS, counts.dp_event, 1, "all", RELEASED_COUNTS),)
        start = {"log_popularity": np.log(likely_counts(counts)), "sizes": sizes}
        fake = {"row_lengths": row_lengths, "temperature": temperature}
        batch = {"generator_batch_size": generator_batch_size}
        adam = partial(optax.adam, b1=0.5, b2=0.9)
        num_steps = rounds * generator_steps if adversarial else moment_steps
        # To zero at the end, or the draw would depend on where in its circles the game was stopped.
        first_lr = generator_lr if adversarial else moment_lr
        optimizer = adam(optax.cosine_decay_schedule(first_lr, max(num_steps, 1)))
        if not train_popularity:
            optimizer = gan_rows.fixed_popularity(optimizer)
        if adversarial:
            game = {"penalty_weight": penalty_weight, "num_fakes": num_fakes, "generator_steps": generator_steps}
            likely = likely_counts(counts)
            game["item_weights"] = np.sqrt(likely / likely.max())
            optimizers = {"critic_optimizer": adam(critic_lr), "generator_optimizer": optimizer}
            algorithm = fedgan(users.num_items, **start, **fake, **batch, **game, **optimizers)
            state, more = run_rounds(
                algorithm,
                users,
                noise[TRAINING],
                l2_clip_norm=l2_clip_norm,
                sampling_prob=sampling_prob,
                key=fit_key,
                report=report,
                said="rounds of critic and generator",
                span_size=_SPAN,
                num_buckets=3,
            )
            table, dense = state.shared.tables["generator"], state.shared.dense["generator"]
        else:
            gram_key, fit_key = jax.random.split(fit_key)
            gram = dp_gram(users, noise_multiplier=float(noise[MOMENTS][0]), key=gram_key)
            more = (Entry(MOMENTS, gram.dp_event, 1, "all", "noised Gram matrix of users' normalised rows"),)
            moments = _moments(gram, counts, num_users=users.num_users, num_moments=num_moments)
            how = MomentFit(optimizer, moment_batch_size, *row_lengths, temperature)
            table, dense = _match(moments, how, start, moment_steps, fit_key, report)
        private = float(noise[COUNTS][0]) > 0
        return Generator(
            name="gan" if adversarial else "gan without adversary",
            num_items=users.num_items,
            params=(table, dense),
            scores=_scores,
            releases=(charged + more) if private else (),
            choices=settings | {"row_lengths": list(row_lengths)},
            private=private,
        )

    return Method("gan" if adversarial else "gan without adversary", phases, fit)


def likely_counts(counts: DpPopularity) -> np.ndarray:
    """Released counts without their noise, as far as that goes: float64 ``[items]``, positive.

    Counts below two standard deviations of their noise all get the mean of such counts, which is nearly free of noise:
    one of them alone would be noise, and its logarithm a popular item or none.
    """
    values = np.asarray(counts.counts, np.float64)
    rare = values < max(2 * counts.noise_stddev, 0.05)
    return np.where(rare, max(values[rare].mean() if rare.any() else 0.0, 0.02), values)


def _scores(params: tuple[jax.Array, gan_rows.Params], key: jax.Array) -> jax.Array:
    return gan_rows.virtual_scores(*params, key)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "vectors", "mean"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Moments:
    """Means over users of rows of norm 1 and of their squares, released.

    Attributes:
      values: float32 ``[k]``, eigenvalues of C.
      vectors: float32 ``[items, k]``, its eigenvectors.
      mean: float32 ``[items]``, c.
    """

    values: jax.Array
    vectors: jax.Array
    mean: jax.Array


@dataclasses.dataclass(frozen=True)
class MomentFit:
    """How the generator is fitted to moments; static."""

    optimizer: optax.GradientTransformation
    batch_size: int
    shortest: int
    longest: int
    temperature: float


def _moments(gram, counts, *, num_users: int, num_moments: int) -> Moments:
    """The strongest directions of the released Gram matrix, each lowered by the edge of the noise's own eigenvalues."""
    size = len(gram.gram)
    first = max(size - num_moments, 0)
    values, vectors = scipy.linalg.eigh(gram.gram, subset_by_index=(first, size - 1), check_finite=False)
    values = np.maximum(values - noise_edge(gram), 0.0) / num_users
    # A count below zero is noise.
    mean = np.maximum(np.asarray(counts.counts), 0.0) / num_users
    return Moments(*(jnp.asarray(x, jnp.float32) for x in (values, vectors, mean)))


def moment_loss(rows: jax.Array, moments: Moments) -> jax.Array:
    """``|E x x^T - C|^2 + |E x - c|^2`` up to constants, unbiased, from independent rows float32 ``[batch, items]``."""
    num = len(rows)
    alike = rows @ rows.T
    others = (jnp.sum(jnp.square(alike) + alike) - jnp.sum(jnp.square(jnp.diag(alike)) + jnp.diag(alike))) / (
        num * (num - 1)
    )
    real = jnp.square(rows @ moments.vectors) @ moments.values + rows @ moments.mean
    return others - 2 * jnp.mean(real)


def _match(moments: Moments, how: MomentFit, start, num_steps: int, key, report) -> Any:
    """(table, dense) of a generator fitted to moments: post-processing."""
    init_key, key = jax.random.split(key)
    generator = gan_rows.init_generator(init_key, start["sizes"], jnp.asarray(start["log_popularity"], jnp.float32))
    carry = generator, how.optimizer.init(generator)
    for done in range(0, num_steps, _SPAN):
        span = min(_SPAN, num_steps - done)
        carry = _match_span(carry, moments, key, done, span, how)
        jax.block_until_ready(carry)
        report(done + span, num_steps, "generator steps on released moments")
    return carry[0]


@partial(jax.jit, static_argnames="how")
def _match_span(carry, moments, key, first, num_steps, how: MomentFit):
    def loss(generator, key):
        def one(key):
            length_key, row_key = jax.random.split(key)
            n = log_uniform_length(length_key, how.shortest, min(how.longest, len(generator[0])))
            return gan_rows.virtual_row(*generator, n, row_key, temperature=how.temperature)

        return moment_loss(jax.vmap(one)(jax.random.split(key, how.batch_size)), moments)

    def step(i, carry):
        generator, state = carry
        gradient = jax.grad(loss)(generator, jax.random.fold_in(key, first + i))
        steps, state = how.optimizer.update(gradient, state, generator)
        return optax.apply_updates(generator, steps), state

    return jax.lax.fori_loop(0, num_steps, step, carry)
