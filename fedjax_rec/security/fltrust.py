"""FLTrust: the server believes an upload as far as it points where the server's own root clients point.

Cao et al., 2021, "FLTrust: Byzantine-robust Federated Learning via Trust Bootstrapping". With the root update g_0 and
uploads g_i,

    trust_i = max(0, cos(g_i, g_0)),   g = sum_i trust_i (|g_0| / |g_i|) g_i / sum_i trust_i
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_rec.data.clients import ClientData
from fedjax_rec.federated.algorithm import Algorithm, all_private, client_key
from fedjax_rec.federated.rows import add_to_total, is_rows, take_rows, zero_total
from fedjax_rec.federated.transforms import RoundContext, Summation, UpdateTransform, scale_update, select_update
from fedjax_rec.privacy.mechanisms import global_norm, merge_rows
from fedjax_rec.security.stacked_uploads import finite_only


class Root(NamedTuple):
    """What the server's own clients say in a round.

    Attributes:
      update: the mean of their updates, whole tables in the place of `Rows`.
      length: the mean of their updates' norms, float32 scalar.
      private: their private parameters after the round.
    """

    update: Any
    length: jax.Array
    private: Any


class _Sums(NamedTuple):
    total: Any
    trust: jax.Array
    num_present: jax.Array
    num_trusted: jax.Array
    num_nonfinite: jax.Array


def fltrust(algorithm: Algorithm, root_clients: ClientData, *, seed: int = 0) -> UpdateTransform:
    """The trust-weighted mean of uploads that are all made equally long, times the number of uploads.

    Each round the server runs the method's own ``client_update`` on clients that it holds: users whose data is public,
    or made up. An upload that points the other way counts for nothing, and a long one for no more than a short one. The
    number of uploads n stands before the mean, so that dividing by the expected cohort size gives a plain average's
    size.

    Differs from the paper: the root update is the mean over several root clients, whose norm shrinks as they differ; so
    uploads are made as long as the root clients' updates are on average, as if each were a user. Root clients keep
    their private parameters from round to round. Uploads are compared as they are after the chain's earlier links, and
    root updates as the method gives them: clips and noise may come before, links that change an update's structure not.

    Sees: single uploads, so that secure sums are refused. It refuses central DP as well: trust is divided by the sum of
    all trust, so each client moves what the others count for. Breaks down: at no number of malicious clients, as long
    as the root clients are honest and alike to real ones; but an upload that agrees with the root elsewhere may still
    push one row. Memory: the root update and one sum; uploads are not kept. Time: a round of the root clients.

    Args:
      algorithm: the one that the rounds run.
      root_clients: the server's own, with the catalogue of the real ones, laid out for one device.
      seed: of the root clients' first private parameters.

    Raises:
      ValueError: if there are no root clients, or they are laid out for several devices.
    """
    if root_clients.num_clients < 1 or root_clients.num_shards != 1:
        raise ValueError(
            "FLTrust needs at least one root client, laid out for one device; got "
            f"{root_clients.num_clients} for {root_clients.num_shards}."
        )

    def init(params):
        del params
        return all_private(algorithm, jax.random.key(seed), root_clients.clients_per_shard)

    def prepare(private, context: RoundContext, key):
        return _root(algorithm, root_clients, context.shared, private, key)

    def zero(update):
        return _Sums(zero_total(update), *(jnp.zeros(()) for _ in range(4)))

    def add(sums, updates, client_ids, active, root):
        del client_ids
        updates, present, norm = finite_only(updates, active)
        root_norm = global_norm(root.update)
        measured = present & (norm > 0) & (root_norm > 0)
        scale = jnp.where(measured, norm, 1.0)
        directions = jax.vmap(scale_update)(updates, 1.0 / scale)
        cosine = jax.vmap(lambda u: _dot(u, root.update))(directions) / jnp.where(root_norm > 0, root_norm, 1.0)
        trust = jnp.where(measured, jnp.maximum(cosine, 0.0), 0.0)
        return _Sums(
            add_to_total(sums.total, jax.vmap(scale_update)(directions, trust * root.length)),
            sums.trust + trust.sum(),
            sums.num_present + present.sum(),
            sums.num_trusted + (trust > 0).sum(),
            sums.num_nonfinite + (active & ~present).sum(),
        )

    def end(sums, root):
        del root
        factor = jnp.where(sums.trust > 0, sums.num_present / jnp.where(sums.trust > 0, sums.trust, 1.0), 0.0)
        num = jnp.maximum(sums.num_present, 1.0)
        metrics = {"trust": sums.trust / num, "trusted": sums.num_trusted / num}
        return scale_update(sums.total, factor), metrics | {"nonfinite_uploads": sums.num_nonfinite}

    return UpdateTransform(
        init=init,
        prepare=prepare,
        summation=Summation(zero, add, end, individual=True),
        server=lambda total, root, key: (total, root.private),
    )


def _root(algorithm, clients: ClientData, shared, private, key) -> Root:
    """A round of the root clients, all at once."""
    total, length = None, jnp.zeros(())
    for bucket in clients.buckets:
        num_steps = jnp.max(jax.vmap(algorithm.num_steps)(bucket))
        own = jax.tree.map(lambda x, ids=bucket.client_id: x.at[ids].get(mode="clip"), private)

        def one(own, client, num_steps=num_steps):
            output = algorithm.client_update(shared, own, client, num_steps, client_key(key, client.client_id))
            update = merge_rows(output.update)
            norm = global_norm(update)
            use = (client.client_id < clients.num_clients) & jnp.isfinite(norm)
            return select_update(use, update), output.private, jnp.where(use, norm, 0.0)

        updates, own, norms = jax.vmap(one)(own, bucket)
        private = jax.tree.map(lambda x, new, ids=bucket.client_id: x.at[ids].set(new, mode="drop"), private, own)
        if total is None:
            total = zero_total(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), updates))
        total, length = add_to_total(total, updates), length + norms.sum()
    return Root(scale_update(total, 1 / clients.num_clients), length / clients.num_clients, private)


def _dot(update, tables) -> jax.Array:
    """The inner product of one client's update and an update written out as tables."""

    def one(leaf, table):
        if is_rows(leaf):  # values are zero on padding
            return jnp.sum(leaf.values * take_rows(table, leaf.ids))
        return jnp.sum(leaf * table)

    return sum(jax.tree.leaves(jax.tree.map(one, update, tables, is_leaf=is_rows)))
