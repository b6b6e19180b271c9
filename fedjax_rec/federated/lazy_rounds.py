"""Rounds of plain averaging whose table noise is drawn when a row is read: see `fedjax_rec.privacy.lazy_noise`.

The engine is that of `make_rounds`: the same cohorts, clients, chunks and sums. Only the server's side differs: no
pass over a table happens in a round, and one at the end of a call.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_rec.data.clients import ClientData
from fedjax_rec.federated import round as engine
from fedjax_rec.federated.algorithm import Algorithm, all_private, client_key
from fedjax_rec.federated.cohort import Sampler
from fedjax_rec.federated.releases import check_pair, local_releases, releases
from fedjax_rec.federated.round import Rounds
from fedjax_rec.models.base import Shared
from fedjax_rec.privacy.lazy_noise import apply, catch_up, flush, lazy_table
from fedjax_rec.privacy.mechanisms import clip_by_global_norm, user_level_dp
from fedjax_rec.privacy.noise import standard_normal

# Folded into the noise key: numbers that no round has.
_ROWS_NOISE, _DENSE_NOISE = 2**32 - 3, 2**32 - 4


class _Keys(NamedTuple):
    cohort: jax.Array
    client: jax.Array
    dense: jax.Array
    rows: dict[str, jax.Array]


def lazy_rounds(
    algorithm: Algorithm,
    sampler: Sampler,
    clients: ClientData,
    *,
    l2_clip_norm: float,
    noise_multiplier: float,
    learning_rate: float = 1.0,
    span_size: int = 100,
    chunk_size: int | None = None,
) -> Rounds:
    """`make_rounds` with ``user_level_dp(...)`` and a plain server step, equal in distribution, for one device.

    The server steps ``w <- w + learning_rate * (sum + noise) / expected cohort``. Tables owe noise within a call of
    ``run``, and are flushed at its end, so whatever leaves it is up to date. Noise is a function of the keys and of
    the rounds at which calls begin and end: resume at the end of a call, and the next call is the same bit for bit.

    Guarantee: user-level; the sampler's relation and sampling; one Gaussian mechanism of ``noise_multiplier`` a round.
    Released are the states that ``run`` returns, and what each cohort's clients receive: the joint distribution of
    those is that of dense noise, whose every state may be released.

    Args:
      algorithm: its update has the structure of the shared parameters; its server step is replaced. The ids of its
        updates' `Rows` must be all the rows that a client reads, and must come from its data and key alone, not from
        the tables; so it is for `fedavg` and `fedsgd` with uniform or popularity negatives, or none.
      sampler: who takes part.
      clients: the population, laid out for one device.
      l2_clip_norm: bound on one client's update.
      noise_multiplier: of a round's sum.
      learning_rate: of the server.
      span_size: most rounds of a call.
      chunk_size: clients that run side by side; by default chosen for the backend.
    """
    clip = clip_by_global_norm(l2_clip_norm)
    dense = user_level_dp(l2_clip_norm=l2_clip_norm, noise_multiplier=noise_multiplier)
    check_pair(dense, sampler)
    engine._check(algorithm, dense, sampler, clients, None)
    chunk_size = chunk_size or engine.default_chunk_size()
    buckets = jax.device_put(clients.buckets)
    rate = learning_rate / sampler.expected_size
    stddev = rate * noise_multiplier * l2_clip_norm

    def init(key):
        server_key, private_key = jax.random.split(key)
        state = algorithm.init(server_key)
        state = state._replace(transforms=clip.init(state.shared))
        private = all_private(algorithm, private_key, clients.num_clients)
        return jax.tree.map(lambda x: jnp.asarray(x, x.dtype), (state, private))

    def each_chunk(function, carry, shared, private, buckets, in_cohort, key):
        """``carry = function(carry, {table: ids})`` for the rows that each chunk of the cohort reads."""
        # Ids that depended on a table would depend on nothing here, not even on rows that owe noise.
        shared = jax.tree.map(jnp.zeros_like, shared)

        def ids_of(client, active):
            own = jax.tree.map(lambda x: x.at[client.client_id].get(mode="clip"), private)
            train_key, _ = jax.random.split(client_key(key, client.client_id))
            # The training that these ids come with is used by nobody, so the compiler leaves it out.
            update = algorithm.client_update(shared, own, client, jnp.int32(1), train_key).update
            return {name: jnp.where(active, rows.ids, rows.num_rows) for name, rows in update.tables.items()}

        for bucket in buckets:
            size = bucket.client_id.shape[0]
            member = in_cohort.at[bucket.client_id].get(mode="fill", fill_value=False)
            chosen = jnp.flatnonzero(member, size=-(-size // chunk_size) * chunk_size, fill_value=size)

            def chunk(i, carry, bucket=bucket, size=size, chosen=chosen):
                index = jax.lax.dynamic_slice(chosen, (i * chunk_size,), (chunk_size,))
                client = jax.tree.map(lambda x: x.at[index].get(mode="clip"), bucket)
                return function(carry, jax.vmap(ids_of)(client, index < size))

            carry = jax.lax.fori_loop(0, (member.sum() + chunk_size - 1) // chunk_size, chunk, carry)
        return carry

    def one_round(state, lazy, totals, private, buckets, keys):
        """``state`` without its tables, which are in ``lazy``; ``totals`` are zero tables, and are so again after."""
        key = jax.random.fold_in(keys.client, state.round)
        in_cohort = sampler.draw(keys.cohort, state.round)

        def bring_up_to_date(lazy, ids):
            return {k: catch_up(lazy[k], ids[k], state.round, keys.rows[k], stddev) for k in lazy}

        def step(carry, ids):
            return {k: apply(table, total, ids[k], rate) for k, (table, total) in carry.items()}

        shared = state.shared._replace(tables={k: table.values for k, table in lazy.items()})
        lazy = each_chunk(bring_up_to_date, lazy, shared, private, buckets, in_cohort, key)
        state = state._replace(shared=shared._replace(tables={k: table.values for k, table in lazy.items()}))
        (total, metrics) = engine._zero_sums(algorithm, clip, state, private, buckets[0], key)
        sums = (total._replace(tables=totals), metrics)
        for bucket in buckets:
            sums, private = engine._bucket_sum(
                algorithm, clip, state, bucket, in_cohort, key, chunk_size, 0, sums, private
            )
        total, metrics = sums
        carry = {k: (lazy[k], total.tables[k]) for k in lazy}
        carry = each_chunk(step, carry, shared, private, buckets, in_cohort, key)
        lazy, totals = {k: x[0] for k, x in carry.items()}, {k: x[1] for k, x in carry.items()}
        leaves, structure = jax.tree.flatten(total.dense)
        noise_keys = jax.random.split(jax.random.fold_in(keys.dense, state.round), len(leaves) + 1)
        noise = [stddev * standard_normal(k, x.shape) for k, x in zip(noise_keys[:-1], leaves, strict=True)]
        steps = jax.tree.unflatten(structure, [rate * x + n for x, n in zip(leaves, noise, strict=True)])
        state = state._replace(
            round=state.round + 1, shared=Shared({}, jax.tree.map(jnp.add, state.shared.dense, steps))
        )
        cohort_size = in_cohort.sum().astype(jnp.float32)
        metrics = {name: value / jnp.maximum(cohort_size, 1.0) for name, value in metrics.items()}
        return state, lazy, totals, private, metrics | {"cohort_size": cohort_size}

    def span(state, private, buckets, keys, num_rounds):
        rows_key, dense_key = (jax.random.fold_in(keys.noise, use) for use in (_ROWS_NOISE, _DENSE_NOISE))
        tables = state.shared.tables
        row_keys = {name: jax.random.fold_in(rows_key, index) for index, name in enumerate(sorted(tables))}
        keys = _Keys(keys.cohort, keys.client, dense_key, row_keys)
        lazy = {name: lazy_table(table, state.round) for name, table in tables.items()}
        totals = jax.tree.map(jnp.zeros_like, tables)
        state = state._replace(shared=state.shared._replace(tables={}))
        shapes = jax.eval_shape(one_round, state, lazy, totals, private, buckets, keys)[-1]
        history = {name: jnp.full(span_size, jnp.nan) for name in shapes}

        def body(i, carry):
            *carry, history = carry
            *carry, metrics = one_round(*carry, buckets, keys)
            return *carry, {name: values.at[i].set(metrics[name]) for name, values in history.items()}

        carry = (state, lazy, totals, private, history)
        state, lazy, _, private, history = jax.lax.fori_loop(0, num_rounds, body, carry)
        # The noise of a call is all in: nothing that leaves it owes any.
        tables = {name: flush(table, state.round, row_keys[name], stddev) for name, table in lazy.items()}
        return state._replace(shared=state.shared._replace(tables=tables)), private, history

    compiled = jax.jit(span, donate_argnums=(0, 1), compiler_options=engine._compiler_options())

    def run(state, private, keys, num_rounds=1):
        if not 1 <= num_rounds <= span_size:
            raise ValueError(f"num_rounds must be between 1 and span_size={span_size}; got {num_rounds}.")
        return compiled(state, private, buckets, keys, jnp.asarray(num_rounds, jnp.int32))

    return Rounds(
        init,
        run,
        partial(releases, dense, sampler),
        partial(local_releases, dense),
        sampler.relation,
        sampler.name,
        *engine._traffic(algorithm, clip, clients)[:2],
    )
