"""Times the benchmark's round in fedjax (Ro et al. 2021, "FedJAX"), without privacy, which fedjax does not have.

    python -m venv .venv && .venv/bin/pip install fedjax==0.0.17
    .venv/bin/python -m benchmarks.peer_programs.fedjax_round U_DATA --items 1682 --rounds 6  # from the repository root

It runs fedjax's jit backend: its pmap backend fails on current JAX. Two things differ from the workload, and the check
allows for them: the last batch of a client is filled up to 256 with the client's first examples (a fixed shape, so
nothing is compiled again), and clients are weighted by their number of examples. The fixed order saves fedjax its
shuffling.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import numpy_reference, workload
from benchmarks.peer_programs.common import Report, arguments

jax.tree_map = jax.tree.map  # fedjax 0.0.17 looks it up when imported; JAX 0.6 removed it
import fedjax  # noqa: E402


def loss(params, batch):
    """Mean binary cross-entropy of a batch `{"x": [n], "y": [n]}`."""
    logits = params["items"][batch["x"]] @ params["out"] + params["bias"]
    return jnp.mean(jnp.maximum(logits, 0) - logits * batch["y"] + jnp.log1p(jnp.exp(-jnp.abs(logits))))


def filled(work: workload.Workload) -> list[tuple[np.ndarray, np.ndarray]]:
    """The clients as fedjax batches them: each one repeated up to a whole number of batches."""
    lengths = -(-work.sizes // workload.BATCH_SIZE) * workload.BATCH_SIZE
    return [(np.resize(ids, n), np.resize(labels, n)) for (ids, labels), n in zip(work, lengths, strict=True)]


def main() -> None:
    """Prints one JSON line a round."""
    options = arguments(__doc__)
    work = workload.clients(options.u_data, num_items=options.items)
    packages = ("fedjax", "jax", "numpy")
    report = Report("fedjax", options, device=jax.devices()[0].device_kind, packages=packages)

    fedjax.set_for_each_client_backend("jit")
    data = fedjax.InMemoryFederatedData({b"%06d" % c: {"x": ids, "y": y} for c, (ids, y) in enumerate(work)})
    sampler = fedjax.client_samplers.UniformGetClientSampler(data, num_clients=work.num_clients, seed=0)
    algorithm = fedjax.algorithms.fed_avg.federated_averaging(
        lambda params, batch, rng: jax.grad(loss)(params, batch),
        fedjax.optimizers.sgd(workload.LEARNING_RATE),
        fedjax.optimizers.sgd(1.0),
        fedjax.ShuffleRepeatBatchHParams(batch_size=workload.BATCH_SIZE, num_epochs=1, skip_shuffle=True),
    )
    params = workload.initial_params(work.num_items)
    state = algorithm.init(jax.tree.map(jnp.asarray, params))
    for number in range(options.rounds):
        start = time.perf_counter()
        state, _ = algorithm.apply(state, sampler.sample())
        jax.block_until_ready(state.params)
        seconds = time.perf_counter() - start
        report.round(number=number, seconds=seconds, clients=work.num_clients, items=work.num_items)
        if number == 0 and options.check:
            report.check(state.params, numpy_reference.fedavg_round(params, filled(work), weights=work.sizes))


if __name__ == "__main__":
    main()
