"""Item counts: popularity as a federated method, on which every noise can be compared in one line.

Each client sends a vector over items, w_ui for the items it touched and 0 for the rest, and the server keeps

    count_i = mean over rounds of (1 / n) sum_{u in cohort} w_ui,       n = the expected cohort,

and recommends the items of largest count to everybody. That is the floor that every recommender must clear, and the
simplest release there is: central noise on the sum, noise on every client, randomised response and shuffling differ
only in the links of the chain:

    make_rounds(item_counts(m), chain(clip_by_global_norm(1.0), gaussian_noise(z)), sampler, clients)
    make_rounds(item_counts(m), chain(clip_by_global_norm(1.0), local_gaussian(s)), sampler, clients)
    make_rounds(item_counts(m, normalize="none"), k_randomized_response(eps, num_items=m, num_reports=n), ...)

``models.popularity.dp_popularity`` is the same in one call, without clients, for Gaussian noise.
"""

import jax
import jax.numpy as jnp

from fedjax_rec.federated.algorithm import Algorithm, ClientOutput, ServerState
from fedjax_rec.federated.rows import Rows
from fedjax_rec.models.base import Shared

NORMALIZE = ("clip", "none", "sample")


def item_counts(num_items: int, *, normalize: str = "clip", max_items_per_client: int = 1) -> Algorithm:
    """Popularity. Shared: table "count" ``[num_items, 1]``, a mean over clients and rounds. Nobody keeps anything.

    Args:
      num_items: catalogue size.
      normalize: how a client with n items weighs them, where k is ``max_items_per_client``. ``"clip"``: each
        ``min(1, sqrt(k / n))``, an L2 norm of at most sqrt(k). ``"sample"``: k of them at random, each 1, an L2 norm of
        at most sqrt(k) and an L1 norm of at most k. ``"none"``: each 1. A guarantee needs a clip in the chain all the
        same; at these norms it changes nothing.
      max_items_per_client: k, at least 1.

    Raises:
      ValueError: for another ``normalize`` or k below 1.
    """
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize must be one of {', '.join(NORMALIZE)}; got {normalize!r}.")
    if max_items_per_client < 1:
        raise ValueError(f"max_items_per_client must be at least 1; got {max_items_per_client}.")

    def init(key):
        del key
        return ServerState(jnp.zeros((), jnp.int32), Shared({"count": jnp.zeros((num_items, 1))}, ()), ())

    def client_update(shared, private, client, num_steps, key):
        del shared, num_steps
        ids = client.item_ids if client.row_ids is None else client.row_ids
        real = ids < num_items
        num_own = real.sum()
        if normalize == "sample":
            # Random numbers with the padding last; the places of the k smallest are a uniform choice.
            draws = jnp.where(real, jax.random.uniform(key, ids.shape), 2.0)
            real &= jnp.argsort(jnp.argsort(draws)) < max_items_per_client
        weight = jnp.float32(1)
        if normalize == "clip":
            weight = jnp.minimum(1.0, jnp.sqrt(max_items_per_client / jnp.maximum(num_own, 1)))
        values = jnp.where(real, weight, 0.0)
        rows = Rows(jnp.where(real, ids, num_items), values[:, None], num_items)
        return ClientOutput(Shared({"count": rows}, ()), private, {"items": num_own.astype(jnp.float32)})

    def server_update(state, aggregate):
        count, done = state.shared.tables["count"], state.round.astype(jnp.float32)
        count += (aggregate.tables["count"] - count) / (done + 1)
        return state._replace(shared=Shared({"count": count}, ()))

    return Algorithm(
        init=init,
        init_private=lambda key: (),
        client_update=client_update,
        num_steps=lambda client: jnp.int32(1),
        server_update=server_update,
    )


def item_counts_score(shared: Shared, private) -> jax.Array:
    """The counts, float32 ``[num_items]``: the same for everybody."""
    del private
    return shared.tables["count"][:, 0]
