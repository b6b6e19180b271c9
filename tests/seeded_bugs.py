"""Links, samplers and round code that each look right, claim the right epsilon, and have one bug."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_rec.federated.cohort import Sampler, fixed_size, full_participation, in_turn, poisson
from fedjax_rec.federated.round import make_rounds
from fedjax_rec.federated.rows import is_rows, merge_duplicates
from fedjax_rec.federated.transforms import Bound, UpdateTransform, chain, scale_update, select_update
from fedjax_rec.privacy.mechanisms import clip_by_global_norm, gaussian_noise, global_norm, user_level_dp

CLIP, NOISE, ROUNDS = 0.5, 3.0, 2  # epsilon 1.87 at delta 1e-5, everyone in every round
RIGHT = user_level_dp(l2_clip_norm=CLIP, noise_multiplier=NOISE)
NOISED = gaussian_noise(NOISE * CLIP)
CLIPPED = clip_by_global_norm(CLIP)


class Audited(NamedTuple):
    """What an audit is asked about; by default everything is right.

    Attributes:
      transforms: the chain.
      sampler: ``num_clients -> Sampler``.
      num_rounds: of each run.
      num_canaries: enough to see the bug.
      make: the round code.
      crowd: whether the bug shows in a crowd only.
    """

    transforms: UpdateTransform = RIGHT
    sampler: Callable[[int], Sampler] = full_participation
    num_rounds: int = ROUNDS
    num_canaries: int = 1000
    make: Callable = make_rounds
    crowd: bool = False


def _noise(server) -> UpdateTransform:
    return chain(CLIPPED, NOISED._replace(server=server))


def _clip(client) -> UpdateTransform:
    return chain(UpdateTransform(client=client, sensitivity=lambda bound: Bound(l2=CLIP)), NOISED)


def no_noise(total, state, key):
    del key
    return total, state


def a_third_of_the_noise(total, state, key):
    return gaussian_noise(NOISE * CLIP / 3).server(total, state, key)


def noise_split_over_chunks(total, state, key):
    """Each of 16 chunks gets a 16th of the standard deviation; variances add, so the sum has a quarter."""
    piece = gaussian_noise(NOISE * CLIP / 16).server

    def add(chunk, total):
        return piece(total, (), jax.random.fold_in(key, chunk))[0]

    return jax.lax.fori_loop(0, 16, add, total), state


def the_same_noise_every_round(total, state, key):
    del key
    return NOISED.server(total, state, jax.random.key(0))


def no_noise_on_dense_leaves(total, state, key):
    noised, state = NOISED.server(total, state, key)
    return noised._replace(dense=total.dense), state


def no_clip(update, state, key):
    del state, key
    update = jax.tree.map(lambda x: merge_duplicates(x) if is_rows(x) else x, update, is_leaf=is_rows)
    return select_update(jnp.isfinite(global_norm(update)), update), {}


def each_row_clipped_alone(update, state, key):
    def clip(leaf):
        values = leaf.values if is_rows(leaf) else leaf[:, None]
        norms = jnp.linalg.norm(values, axis=-1, keepdims=True)
        values = values * jnp.minimum(1.0, CLIP / jnp.maximum(norms, 1e-30))
        return type(leaf)(leaf.ids, values, leaf.num_rows) if is_rows(leaf) else values[:, 0]

    update, metrics = no_clip(update, state, key)
    return jax.tree.map(clip, update, is_leaf=is_rows), metrics


def duplicates_not_merged(update, state, key):
    del state, key
    norm = global_norm(update)
    update = scale_update(update, jnp.minimum(1.0, CLIP / jnp.maximum(norm, 1e-30)))
    return select_update(jnp.isfinite(norm), update), {}


def weighed_after_the_clip(update, state, key):
    """Weight = the client's number of rows, which nothing bounds."""
    update, metrics = CLIPPED.client(update, state, key)
    rows = update.tables["item"]
    return scale_update(update, jnp.sum(rows.ids < rows.num_rows).astype(jnp.float32)), metrics


def nan_passes(update, state, key):
    del state, key
    update = jax.tree.map(lambda x: merge_duplicates(x) if is_rows(x) else x, update, is_leaf=is_rows)
    return scale_update(update, CLIP / jnp.maximum(global_norm(update), CLIP)), {}


def sampling_not_done(num_clients: int) -> Sampler:
    """A tenth of the clients is claimed, and all of them take part."""
    return _tenth(num_clients)._replace(draw=lambda key, round_index: jnp.ones(num_clients, bool))


class _Realised:
    """Stands where the expected size should: what is divided by it is divided by who came."""

    size = math.nan

    def __rtruediv__(self, total):
        return total / jnp.maximum(self.size, 1)


def divided_by_the_realised_cohort(algorithm, transforms, sampler, clients, **settings):
    """The round's code, with ``total / in_cohort.sum()`` in place of ``total / sampler.expected_size``."""
    realised = _Realised()

    def draw(key, round_index):
        drawn = sampler.draw(key, round_index)
        realised.size = drawn.sum()
        return drawn

    return make_rounds(algorithm, transforms, sampler._replace(draw=draw, expected_size=realised), clients, **settings)


def _tenth(num_clients: int) -> Sampler:
    return poisson(num_clients, cohort_size=num_clients / 10)


def _half(num_clients: int) -> Sampler:
    return fixed_size(num_clients, cohort_size=num_clients // 2)


def _turns(num_clients: int) -> Sampler:
    return in_turn(num_clients, num_groups=2)


LITTLE = user_level_dp(l2_clip_norm=CLIP, noise_multiplier=1.2)
MUCH = user_level_dp(l2_clip_norm=CLIP, noise_multiplier=8.0)

BUGS = {
    "no noise": Audited(_noise(no_noise)),
    "a third of the noise": Audited(_noise(a_third_of_the_noise), num_canaries=5000),
    "noise split over chunks": Audited(_noise(noise_split_over_chunks), num_canaries=2000),
    "the same noise every round": Audited(_noise(the_same_noise_every_round)),
    "no noise on dense leaves": Audited(_noise(no_noise_on_dense_leaves)),
    "no clip": Audited(_clip(no_clip)),
    "each row clipped alone": Audited(_clip(each_row_clipped_alone), num_canaries=2000),
    "duplicates not merged": Audited(_clip(duplicates_not_merged), num_canaries=2000),
    "weighed after the clip": Audited(_clip(weighed_after_the_clip)),
    "NaN passes": Audited(_clip(nan_passes)),
    "sampling not done": Audited(LITTLE, sampling_not_done, num_rounds=8),
    "divided by the realised cohort": Audited(make=divided_by_the_realised_cohort, crowd=True),
    "no noise, fixed cohorts": Audited(chain(CLIPPED, gaussian_noise(8 * CLIP)._replace(server=no_noise)), _half),
    "no noise, in turn": Audited(_noise(no_noise), _turns, num_rounds=4),
}
RIGHTS = {
    "all": Audited(),
    "poisson": Audited(LITTLE, _tenth, num_rounds=8),
    "fixed_size": Audited(MUCH, _half),
    "in_turn": Audited(RIGHT, _turns, num_rounds=4),
}
