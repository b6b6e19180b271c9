"""Virtual users from a variational autoencoder: z from the prior, through the decoder, to a history.

    z ~ prior,    scores = f(z) / temperature + gumbel_scale * Gumbel noise,    history = the top n items.

Without privacy the autoencoder is trained in one place (`vae_training`); with it, in rounds of `fedvae` on secret
Poisson cohorts, each user's update clipped and the sum noised. Item biases start at released popularity, so that the
training has only to find how users differ.

What is kept is the decoder and the prior. Encoders and what they say of real users are dropped when fitting ends: from
a `Generator` there is no way to a posterior, and z comes from N(0, I), or from a mixture that was itself released.
Drawing z from the posteriors of real users would make virtual users look better, and it copies users.

Without Gumbel noise a linear decoder makes scores Gaussian, of rank ``latent``: the history is then a function of z,
which keeps co-occurrence sharper than independent draws from the softmax do.

Liang, Krishnan, Hoffman, Jebara, 2018, "Variational Autoencoders for Collaborative Filtering"; Shenbin, Alekseev,
Tutubalina, Malykh, Nikolenko, 2020, "RecVAE: A New Variational Autoencoder for Top-N Recommendations with Implicit
Feedback".
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_rec.algorithms.fedvae import fedvae, vae_params
from fedjax_rec.data.interactions import Interactions
from fedjax_rec.models.base import Shared
from fedjax_rec.models.mult_vae import Vae, decode, mult_vae
from fedjax_rec.models.rec_vae import rec_vae
from fedjax_rec.models.vae_training import train_vae
from fedjax_rec.privacy.budget import Phase
from fedjax_rec.privacy.ledger import Entry
from fedjax_rec.synthesis.generator import Generator
from fedjax_rec.synthesis.latent_prior import (
    MIXTURE,
    LatentMixture,
    dp_mixture,
    draw_mixture,
    mixture_phase,
    standard_mixture,
)
from fedjax_rec.synthesis.marginals import COUNTS, log_shares, release_counts
from fedjax_rec.synthesis.methods import Method
from fedjax_rec.synthesis.populations import with_rows
from fedjax_rec.synthesis.rounds import TRAINING, run_rounds, training_sampler

VARIANTS, PRIORS = ("mult", "rec"), ("normal", "mixture")
_SPAN = 10


class PrivateTraining(NamedTuple):
    """How the rounds run when there is noise; fixed in advance, whatever the data.

    Attributes:
      latent: length of z. Noise is proportional to sqrt(items x latent).
      rounds: of training.
      sampling_prob: of a user in a round.
      l2_clip_norm: of a user's update, in units of the loss's gradient.
      server_lr: least learning rate of the server, on the mean of clipped updates over the clip norm. Steps are plain
        gradient descent: signal adds up over rounds, noise only as its square root; Adam would go by the noise.
      noise_level: standard deviation of the noise that all rounds together may leave in a table's entry, where more
        users allow a larger learning rate than the least.
      counts_share: share of the budget for the popularity that biases start from.
      beta: weight of the divergence.
      init_stddev: of the item table's first entries.
    """

    latent: int = 16
    rounds: int = 100
    sampling_prob: float = 0.25
    l2_clip_norm: float = 1.0
    server_lr: float = 1.0
    noise_level: float = 0.1
    counts_share: float = 0.3
    beta: float = 0.05
    init_stddev: float = 0.1


class VaeGenerator(NamedTuple):
    """All that a fitted generator knows.

    Attributes:
      decoder: tables "out" ``[items, width]`` and "bias" ``[items, 1]``, dense "decoder".
      prior: of z.
    """

    decoder: Shared
    prior: LatentMixture


def vae_method(
    *,
    variant: str = "mult",
    tied: bool = True,
    latent: int = 32,
    num_epochs: int = 100,
    beta: float = 1.0,
    dropout: float = 0.0,
    learning_rate: float = 0.01,
    prior: str = "normal",
    num_components: int = 8,
    mixture_share: float = 0.1,
    temperature: float = 1.0,
    gumbel_scale: float = 0.0,
    private: PrivateTraining | None = None,
) -> Method:
    """Histories from a Mult-VAE or a RecVAE.

    Guarantee: user-level, adding or removing one user with all of its rows. Released are, at the noise multipliers that
    the phases are given: "counts", one sum over all users of L2 sensitivity 1; "training", one noised sum of updates
    clipped to ``private.l2_clip_norm`` a round, over a secret Poisson cohort; and with ``prior="mixture"`` "mixture",
    noised statistics of clipped contributions (`latent_prior`). All else is post-processing.

    Args:
      variant: "mult" or "rec".
      tied: whether encoder and decoder share one item table.
      latent: length of z without privacy; see ``private`` for with.
      num_epochs: without privacy.
      beta: weight of the divergence, after annealing; 1 is the bound, so that z ~ N(0, I) is what decoders expect.
      dropout: chance that the encoder misses an item in training.
      learning_rate: of Adam, without privacy.
      prior: "normal", or "mixture": Gaussians fitted to where the encoder puts users, in noised steps.
      num_components: of the mixture.
      mixture_share: of the budget, for the mixture.
      temperature: divides the decoder's scores; only matters beside Gumbel noise.
      gumbel_scale: 1 draws items as the softmax says; 0 takes the highest scores.
      private: the rounds; None = the defaults.

    Raises:
      ValueError: for another variant or prior, or numbers out of range.
    """
    private = PrivateTraining() if private is None else private
    for name, value, known in (("variant", variant, VARIANTS), ("prior", prior, PRIORS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}.")
    if not temperature > 0 or not gumbel_scale >= 0:
        raise ValueError(f"temperature must be positive and gumbel_scale 0 or more; got {temperature}, {gumbel_scale}.")
    if not 0 < private.sampling_prob <= 1 or private.rounds < 1 or not 0 < private.counts_share < 1:
        raise ValueError(
            "Private training needs sampling_prob in (0, 1], rounds >= 1 and counts_share in (0, 1); got "
            f"{private.sampling_prob}, {private.rounds} and {private.counts_share}."
        )
    if num_components < 1 or not 0 < mixture_share < 1:
        raise ValueError(f"A mixture needs components and a share in (0, 1); got {num_components}, {mixture_share}.")
    choices = {name: value for name, value in locals().items() if name not in ("private", "name", "value", "known")}

    def phases(num_users, num_items):
        # T rounds at sampling probability q cost about what one release of noise z / (q sqrt(T)) costs.
        lasting = private.sampling_prob * math.sqrt(private.rounds)
        relative = math.sqrt((1 - private.counts_share) / private.counts_share)
        counts = Phase(COUNTS, weight=relative / lasting, num_numbers=num_items)
        training = Phase(
            TRAINING,
            rounds=private.rounds,
            sampler="poisson",
            cohort_size=private.sampling_prob * num_users,
            weight=1.0,
            sensitivity=private.l2_clip_norm,
            num_numbers=num_items * (private.latent * (1 if tied else 2) + 1),
        )
        if prior == "normal":
            return counts, training
        weight = math.sqrt((1 - mixture_share) / mixture_share) / lasting
        return counts, training, mixture_phase(private.latent, num_components, weight=weight)

    def fit(train, noise, key, report):
        users = with_rows(train)
        is_private = float(noise[COUNTS][0]) > 0
        count_key, train_key, prior_key = jax.random.split(key, 3)
        counts = release_counts(users, noise_multiplier=float(noise[COUNTS][0]), key=count_key)
        charged, shares = [counts.entry], log_shares(counts.clean)
        size = private.latent if is_private else latent
        stddev = private.init_stddev if is_private else None
        vae = _starting_at(_vae(variant, users.num_items, size, tied, dropout, stddev), shares)
        if is_private:
            params, entries = _rounds(vae, users, noise[TRAINING], private, train_key, report)
            charged += entries
        else:
            settings = {"num_epochs": num_epochs, "beta": beta, "learning_rate": learning_rate}
            params = train_vae(vae, users, key=train_key, report=report, **settings)
        mixture = standard_mixture(size)
        if prior == "mixture":
            mixture, entry = dp_mixture(
                lambda rows: vae.encode(params, rows),
                users,
                latent=size,
                num_components=num_components,
                noise_multipliers=noise[MIXTURE],
                key=prior_key,
            )
            charged.append(entry)
        return Generator(
            name="vae" if variant == "mult" else "recvae",
            num_items=users.num_items,
            params=VaeGenerator(decoder_of(params), mixture),
            scores=_Scores(temperature, gumbel_scale),
            releases=tuple(charged) if is_private else (),
            choices=choices | {"latent": size} | (dict(private._asdict()) if is_private else {}),
            private=is_private,
        )

    return Method("vae" if variant == "mult" else "recvae", phases, fit)


def decoder_of(params: Shared) -> Shared:
    """What `decode` reads of an autoencoder's parameters, and nothing that its encoder has for itself."""
    table = params.tables["out" if "out" in params.tables else "item"]
    return Shared({"out": table, "bias": params.tables["bias"]}, {"decoder": params.dense["decoder"]})


class _Scores(NamedTuple):
    """A value, so that equal settings share a compilation."""

    temperature: float
    gumbel_scale: float

    def __call__(self, params: VaeGenerator, key: jax.Array) -> jax.Array:
        latent_key, item_key = jax.random.split(key)
        scores = decode(params.decoder, draw_mixture(params.prior, latent_key)) / self.temperature
        if self.gumbel_scale == 0:
            return scores
        return scores + self.gumbel_scale * jax.random.gumbel(item_key, scores.shape)


def _vae(variant: str, num_items: int, latent: int, tied: bool, dropout: float, stddev: float | None) -> Vae:
    sizes = {"width": latent, "latent": latent, "tied": tied, "dropout": dropout, "init_stddev": stddev}
    return mult_vae(num_items, linear=True, **sizes) if variant == "mult" else rec_vae(num_items, **sizes)


def _starting_at(vae: Vae, log_popularity: np.ndarray) -> Vae:
    """The same autoencoder with first biases of released popularity."""
    bias = jnp.asarray(log_popularity - log_popularity.mean(), jnp.float32)[:, None]

    def init(key):
        params = vae.init(key)
        return params._replace(tables=params.tables | {"bias": bias})

    return vae._replace(init=init)


def _rounds(
    vae: Vae, users: Interactions, noise: np.ndarray, how: PrivateTraining, key: jax.Array, report: Any
) -> tuple[Shared, list[Entry]]:
    """Parameters after all rounds, and what the rounds released."""
    # What a learning rate of 1 adds up to in a table's entry; a function of the noise and the cohort, not of the data.
    cohort_size = training_sampler(users.num_users, how.sampling_prob).expected_size
    level = float(np.sqrt(np.sum(np.square(noise)))) / cohort_size
    optimizer = optax.sgd(max(how.server_lr, how.noise_level / level) / how.l2_clip_norm)
    state, entries = run_rounds(
        fedvae(vae, beta=how.beta, server_optimizer=optimizer),
        users,
        noise,
        l2_clip_norm=how.l2_clip_norm,
        sampling_prob=how.sampling_prob,
        key=key,
        report=report,
        said="rounds of training",
        span_size=_SPAN,
        num_buckets=1,
    )
    return vae_params(state.shared), list(entries)
