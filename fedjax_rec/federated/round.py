"""The round: sample a cohort, let each client train and transform, sum, transform back, step the server.

Clients go through in chunks of fixed size, in a loop whose trip count follows the cohort: a Poisson cohort of any
size runs the same compiled program, and memory is set by the chunk. Several rounds run as one call without a word
from the host.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from dp_accounting import NoOpDpEvent
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fedjax_rec.data.clients import Client, ClientData
from fedjax_rec.federated.algorithm import Algorithm, ServerState, all_private, client_key
from fedjax_rec.federated.cohort import Sampler
from fedjax_rec.federated.releases import Releases, check_pair, local_releases, releases
from fedjax_rec.federated.rows import whole_size
from fedjax_rec.federated.sparse_server import as_tables, divide
from fedjax_rec.federated.transforms import (
    PLAIN_SUM,
    UNBOUNDED,
    RoundContext,
    UpdateTransform,
    plain_wire,
    select_update,
)

# Small chunks stay in the cache of a CPU; accelerators want the opposite. Measured by `python -m benchmarks.round`.
CHUNK_SIZE = {"cpu": 4}
ACCELERATOR_CHUNK_SIZE = 256
_EVERYBODY = 2**32 - 1


def default_chunk_size() -> int:
    """Clients that run side by side on this backend, unless a caller says otherwise."""
    return CHUNK_SIZE.get(jax.default_backend(), ACCELERATOR_CHUNK_SIZE)


def _compiler_options() -> dict[str, Any]:
    """On a CPU, LLVM below its top level.

    There it unrolls the loop over a row's few numbers whole before it looks for vectors, and writes them out one by
    one: rounds at 1,682 items and dim 32 take 1.2 times as long, and compiling takes longer too.
    """
    return {"xla_backend_optimization_level": 2} if jax.default_backend() == "cpu" else {}


class RoundKeys(NamedTuple):
    """The randomness of a run; each round folds in its number.

    Attributes:
      cohort: who takes part. Secret, or there is no amplification by sampling.
      client: what clients draw, folded with the client's id.
      noise: the noise of the mechanism. Secret, and never used for two different cohorts.
    """

    cohort: jax.Array
    client: jax.Array
    noise: jax.Array


class Rounds(NamedTuple):
    """A compiled training procedure.

    Attributes:
      init: ``key -> (ServerState, private)``; private leaves have a leading ``[clients]`` axis.
      run: ``(state, private, keys, num_rounds) -> (state, private, metrics)``. ``state`` and ``private`` are donated.
        ``num_rounds`` is at most ``span_size``; any number of them is one program, compiled once. Metrics are
        float32 ``[span_size]`` each, NaN past ``num_rounds``. ``population=`` takes other clients than those that the
        rounds were made for, as buckets of the same shapes; then one compiled program serves many populations.
      releases: ``releases(first_round, num_rounds) -> ((event, count), ...)``, what those rounds release, sampling
        included, equal rounds in a row counted together; empty if the chain adds no noise.
      local_releases: the same for what one client sends in those rounds, if clients add noise of their own: about that
        client's data alone, under replace-one, and not amplified by anything.
      relation: the neighbouring relation that ``releases`` is for.
      sampler: the name of who drew the cohorts.
      upload_bits: mean bits that a client sends in a round, padding included.
      download_bits: mean bits of the rows and dense leaves that a client receives.
      local_unit: "user" or "example": whose change ``local_releases`` is about.
      plain_bits: mean bits of an update, and of what is received, without any link: 32 a number and an id.
    """

    init: Callable[[jax.Array], tuple[ServerState, Any]]
    run: Callable[..., tuple[ServerState, Any, dict[str, jax.Array]]]
    releases: Callable[[int, int], Releases]
    local_releases: Callable[[int, int], Releases]
    relation: str
    sampler: str
    upload_bits: float
    download_bits: float
    local_unit: str = "user"
    plain_bits: float = 0.0

    @property
    def private(self) -> bool:
        """Whether the chain adds noise to the sum."""
        return bool(self.releases(0, 1))

    def charge(self, ledger: Any, *, first_round: int, num_rounds: int, phase: str = "training") -> Any:
        """A `Ledger` with what those rounds release; ``first_round`` counts from 0, as ``state.round`` does."""
        for event, count in self.releases(first_round, num_rounds):
            if isinstance(event, NoOpDpEvent):  # rounds of a turn that is charged already
                continue
            ledger = ledger.record(
                event,
                phase=phase,
                released="noised sum of clipped client updates",
                sampler=self.sampler,
                count=count,
                unit="user",
                relation=self.relation,
            )
        return ledger


def make_rounds(
    algorithm: Algorithm,
    transforms: UpdateTransform,
    sampler: Sampler,
    clients: ClientData,
    *,
    span_size: int = 100,
    chunk_size: int | None = None,
    mesh: Mesh | None = None,
) -> Rounds:
    """Compiles an algorithm, a chain of update transforms and a sampler into rounds over a population.

    Args:
      algorithm: what clients and the server do.
      transforms: the chain; ``chain()`` for none.
      sampler: who takes part; made for ``clients.num_clients``.
      clients: the population, laid out for as many shards as the mesh has devices.
      span_size: most rounds that one call runs; sets the length of the metrics.
      chunk_size: clients that run side by side; by default chosen for the backend. Never changes a result.
      mesh: devices with one axis ``"clients"``; None for one device.

    Raises:
      ValueError: if the parts do not fit together; the message says which and why.
    """
    check_pair(transforms, sampler)
    _check(algorithm, transforms, sampler, clients, mesh)
    if mesh is not None:
        mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,))  # the compiler places server tables
        replicated, by_client = NamedSharding(mesh, P()), NamedSharding(mesh, P("clients"))
    chunk_size = chunk_size or default_chunk_size()
    buckets = jax.device_put(clients.buckets, None if mesh is None else by_client)
    num_private = clients.num_shards * clients.clients_per_shard

    def init(key):
        server_key, private_key = jax.random.split(key)
        state = algorithm.init(server_key)
        state = state._replace(transforms=transforms.init(state.shared))
        private = all_private(algorithm, private_key, num_private)
        # A weakly typed leaf (a Python number's) comes back strong, and would compile the second round anew.
        state, private = jax.tree.map(lambda x: jnp.asarray(x, x.dtype), (state, private))
        if mesh is not None and not isinstance(private_key, jax.core.Tracer):
            state, private = jax.device_put(state, replicated), jax.device_put(private, by_client)
        return state, private

    def cohort_sum(state, private, buckets, in_cohort, key):
        """The sum of transformed updates over the cohort, new private state, summed client metrics."""
        first_id = 0 if mesh is None else jax.lax.axis_index("clients") * clients.clients_per_shard
        sums = _zero_sums(algorithm, transforms, state, private, buckets[0], key)
        for bucket in buckets:
            sums, private = _bucket_sum(
                algorithm, transforms, state, bucket, in_cohort, key, chunk_size, first_id, sums, private
            )
        return (sums if mesh is None else _sum_over_devices(sums, clients.num_shards)), private

    if mesh is not None:
        state, private = jax.eval_shape(init, jax.random.key(0))
        everyone = jax.ShapeDtypeStruct((clients.num_clients,), bool)
        state = jax.eval_shape(partial(_sent_to_clients, transforms), state, everyone, jax.random.key(0))
        sums = _zero_sums(algorithm, transforms, state, private, clients.buckets[0], jax.random.key(0))
        cohort_sum = jax.shard_map(
            cohort_sum,
            mesh=mesh,
            in_specs=(P(), P("clients"), P("clients"), P(), P()),
            out_specs=(
                jax.tree.map(lambda x: P("clients") if _scatters(x, clients.num_shards) else P(), sums),
                P("clients"),
            ),
            check_vma=False,
        )

    def one_round(state, private, buckets, keys):
        clients_key, noise_key = (jax.random.fold_in(key, state.round) for key in (keys.client, keys.noise))
        in_cohort = sampler.draw(keys.cohort, state.round)
        sent = _sent_to_clients(transforms, state, in_cohort, clients_key)
        (total, metrics), private = cohort_sum(sent, private, buckets, in_cohort, clients_key)
        total, sum_metrics = (transforms.summation or PLAIN_SUM).end(total, sent.transforms)
        total, transform_state = transforms.server(total, sent.transforms, noise_key)
        aggregate = divide(total if algorithm.takes_rows else as_tables(total), sampler.expected_size)
        state = algorithm.server_update(state, aggregate)
        state = state._replace(round=state.round + 1, transforms=transform_state)
        cohort_size = in_cohort.sum().astype(jnp.float32)
        metrics = {name: value / jnp.maximum(cohort_size, 1.0) for name, value in metrics.items()}
        return state, private, metrics | sum_metrics | {"cohort_size": cohort_size}

    def span(state, private, buckets, keys, num_rounds):
        shapes = jax.eval_shape(one_round, state, private, buckets, keys)[2]
        history = {name: jnp.full(span_size, jnp.nan) for name in shapes}

        def body(i, carry):
            state, private, history = carry
            state, private, metrics = one_round(state, private, buckets, keys)
            return state, private, {name: values.at[i].set(metrics[name]) for name, values in history.items()}

        return jax.lax.fori_loop(0, num_rounds, body, (state, private, history))

    # Said, and not left to the compiler: results come back placed as arguments are, so the next call is the same one.
    placed = {} if mesh is None else {"out_shardings": (replicated, by_client, replicated)}
    compiled = jax.jit(span, donate_argnums=(0, 1), compiler_options=_compiler_options(), **placed)

    def run(state, private, keys, num_rounds=1, *, population=None):
        if not 1 <= num_rounds <= span_size:
            raise ValueError(f"num_rounds must be between 1 and span_size={span_size}; got {num_rounds}.")
        data = buckets if population is None else population
        return compiled(state, private, data, keys, jnp.asarray(num_rounds, jnp.int32))

    upload_bits, download_bits, plain_bits = _traffic(algorithm, transforms, clients)
    return Rounds(
        init,
        run,
        partial(releases, transforms, sampler),
        partial(local_releases, transforms),
        sampler.relation,
        sampler.name,
        upload_bits,
        download_bits,
        transforms.local_unit,
        plain_bits,
    )


def _sent_to_clients(transforms, state, in_cohort, key):
    """The server's state as the cohort receives it, with what its links have prepared for the round."""
    context = RoundContext(state.shared, in_cohort, state.round)
    # A number that no client has: the key that all of them share is none of theirs.
    prepared = transforms.prepare(state.transforms, context, jax.random.fold_in(key, _EVERYBODY))
    return state._replace(shared=transforms.broadcast(state.shared, prepared), transforms=prepared)


def _one_client(algorithm, transforms, state, private, client: Client, num_steps, key):
    key = client_key(key, client.client_id)
    train_key, transform_key = jax.random.split(key)
    output = algorithm.client_update(state.shared, private, client, num_steps, train_key)
    update, metrics = transforms.client(output.update, state.transforms, transform_key)
    return update, output.private, output.metrics | metrics


def _bucket_sum(algorithm, transforms, state, bucket, in_cohort, key, chunk_size, first_id, sums, private):
    """Adds one bucket's members of the cohort to the sums, a chunk at a time."""
    summation = transforms.summation or PLAIN_SUM
    size = bucket.client_id.shape[0]
    member = in_cohort.at[bucket.client_id].get(mode="fill", fill_value=False)
    num_chunks = -(-size // chunk_size)
    chosen = jnp.flatnonzero(member, size=num_chunks * chunk_size, fill_value=size)

    def chunk(i, carry):
        (total, metric_sums), private = carry
        index = jax.lax.dynamic_slice(chosen, (i * chunk_size,), (chunk_size,))
        active = index < size
        rows = jax.tree.map(lambda x: x.at[index].get(mode="clip"), bucket)
        own = jnp.where(active, rows.client_id - first_id, jnp.iinfo(jnp.int32).max)
        num_steps = jnp.max(jnp.where(active, jax.vmap(algorithm.num_steps)(rows), 0))

        def one(private, client):
            return _one_client(algorithm, transforms, state, private, client, num_steps, key)

        private_rows = jax.tree.map(lambda x: x.at[own].get(mode="clip"), private)
        update, new_private, metrics = jax.vmap(one)(private_rows, rows)
        update = jax.vmap(select_update)(active, update)
        # The select ties what is written to what was read: without it, a leaf that the client replaces without a look
        # at the old value would be copied whole, for all clients, in every chunk.
        new_private = jax.tree.map(lambda new, old: jax.vmap(jnp.where)(active, new, old), new_private, private_rows)
        private = jax.tree.map(lambda x, new: x.at[own].set(new, mode="drop"), private, new_private)
        metric_sums = {name: s + jnp.sum(jnp.where(active, metrics[name], 0)) for name, s in metric_sums.items()}
        total = summation.add(total, update, rows.client_id, active, state.transforms)
        return (total, metric_sums), private

    trips = (member.sum() + chunk_size - 1) // chunk_size
    return jax.lax.fori_loop(0, trips, chunk, (sums, private))


def _scatters(leaf, num_devices: int) -> bool:
    """Whether a sum is split by rows over the devices, so that each adds noise to and steps its own share of it."""
    return leaf.ndim == 2 and leaf.shape[0] % num_devices == 0


def _sum_over_devices(sums, num_devices: int):
    def reduce(leaf):
        if _scatters(leaf, num_devices):
            return jax.lax.psum_scatter(leaf, "clients", scatter_dimension=0, tiled=True)
        return jax.lax.psum(leaf, "clients")

    return jax.tree.map(reduce, sums)


def _zero_sums(algorithm, transforms, state, private, bucket, key):
    """Empty sums of the transformed update and of the client metrics; reads shapes only."""

    def one(state, private, client, key):
        return _one_client(algorithm, transforms, state, private, client, jnp.int32(1), key)

    private, client = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), (private, bucket))
    update, _, metrics = jax.eval_shape(one, state, private, client, key)
    total = (transforms.summation or PLAIN_SUM).zero(update)
    return total, {name: jnp.zeros(()) for name in metrics}


def _update_shapes(algorithm, clients: ClientData):
    """The shapes of the update of one client of each bucket, with the number of clients in it."""
    key = jax.random.key(0)
    state = jax.eval_shape(algorithm.init, key)
    private = jax.eval_shape(algorithm.init_private, key)
    for bucket in clients.buckets:
        client = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), bucket)
        steps = jax.ShapeDtypeStruct((), jnp.int32)
        output = jax.eval_shape(algorithm.client_update, state.shared, private, client, steps, key)
        yield output.update, bucket.client_id.shape[0]


def largest_update(
    algorithm: Algorithm, clients: ClientData, transforms: UpdateTransform | None = None, *, whole: bool = False
) -> int:
    """Numbers that the client with the most sends, padding included and row ids not: what shapes allow.

    Args:
      algorithm: gives the update.
      clients: the population.
      transforms: links before it is sent.
      whole: count rows with ids as whole tables.
    """

    def numbers(update):
        wire = plain_wire(update) if transforms is None else transforms.upload(plain_wire(update), update)
        return whole_size(update) if whole and wire.side_bits else wire.numbers

    return int(max(numbers(update) for update, _ in _update_shapes(algorithm, clients)))


def _traffic(algorithm, transforms, clients: ClientData) -> tuple[float, float, float]:
    """Mean bits per client, weighted over buckets: uploaded, downloaded, and either of them plain."""
    up = down = plain_bits = total = 0.0
    for update, num in _update_shapes(algorithm, clients):
        plain = plain_wire(update)
        up += num * transforms.upload(plain, update).total
        down += num * transforms.download(plain, update).total
        plain_bits += num * plain.total
        total += num
    return up / total, down / total, plain_bits / total


def _check(algorithm, transforms, sampler, clients, mesh) -> None:
    dp_event, summation = transforms.dp_event(UNBOUNDED, 0), transforms.summation or PLAIN_SUM
    (num_sampled,) = jax.eval_shape(sampler.draw, jax.random.key(0), 0).shape
    if num_sampled != clients.num_clients:
        raise ValueError(f"The sampler draws from {num_sampled} clients and the population has {clients.num_clients}.")
    shards = 1 if mesh is None else mesh.shape["clients"]
    if clients.num_shards != shards:
        raise ValueError(f"The clients are laid out for {clients.num_shards} devices and the mesh has {shards}.")
    if dp_event is not None and algorithm.individual:
        raise ValueError("This algorithm looks at single uploads; central DP covers only their noised sum.")
    if dp_event is not None and summation.individual:
        raise ValueError(
            "This robust rule looks at single uploads, and one of them can move its result by more than the clip norm "
            "(a median, a choice, a trust score has no Lipschitz bound), so noise on the result has no epsilon. Use "
            "clip_by_global_norm or clip_by_row_norm as the defence."
        )
    if algorithm.individual and transforms.summation is not None and not summation.individual:
        raise ValueError("This algorithm looks at single uploads, and a secure sum shows the server none of them.")
    if mesh is not None and summation.host:
        raise ValueError("This sum is taken on the host, which one device can call; leave out the mesh.")
    if dp_event is not None and algorithm.no_dp:
        raise ValueError(f"DP is refused. {algorithm.no_dp}")
