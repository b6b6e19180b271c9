"""Times the benchmark's round as most people would first write it in JAX: a Python loop over clients, without privacy.

    python -m benchmarks.peer_programs.naive_jax_round U_DATA --items 1682 --rounds 6  # from the repository root

A client's update is one jitted function over its padded batches, compiled once for each number of batches, and every
update is a whole item table.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import numpy_reference, workload
from benchmarks.peer_programs.common import Report, arguments


def loss(params, batch):
    """Mean binary cross-entropy over the real examples of a padded batch."""
    logits = params["items"][batch["x"]] @ params["out"] + params["bias"]
    losses = optax.sigmoid_binary_cross_entropy(logits, batch["y"])
    return jnp.sum(losses * batch["mask"]) / jnp.sum(batch["mask"])


@jax.jit
def client_update(params, batches):
    """Trained minus received parameters of one client; `batches` holds arrays `[num_batches, BATCH_SIZE]`."""

    def step(local, batch):
        gradient = jax.grad(loss)(local, batch)
        return jax.tree.map(lambda p, g: p - workload.LEARNING_RATE * g, local, gradient), None

    trained, _ = jax.lax.scan(step, params, batches)
    return jax.tree.map(jnp.subtract, trained, params)


@jax.jit
def add(total, update):
    """The sum of two pytrees."""
    return jax.tree.map(jnp.add, total, update)


def fedavg_round(params, clients):
    """The parameters after one round over all clients."""
    total = jax.tree.map(jnp.zeros_like, params)
    for batches in clients:
        total = add(total, client_update(params, batches))
    return jax.tree.map(lambda p, t: p + t / len(clients), params, total)


def padded(item_ids: np.ndarray, labels: np.ndarray) -> dict[str, jax.Array]:
    """One client's examples as `[num_batches, BATCH_SIZE]` arrays on the device, with mask True = real."""
    num_batches = -(-len(item_ids) // workload.BATCH_SIZE)
    room = num_batches * workload.BATCH_SIZE - len(item_ids)
    columns = {"x": item_ids, "y": labels, "mask": np.ones(len(item_ids), bool)}
    return {k: jnp.asarray(np.pad(v, (0, room)).reshape(num_batches, -1)) for k, v in columns.items()}


def main() -> None:
    """Prints one JSON line a round."""
    options = arguments(__doc__)
    work = workload.clients(options.u_data, num_items=options.items)
    packages = ("jax", "jaxlib", "numpy")
    report = Report("naive", options, device=jax.devices()[0].device_kind, packages=packages)

    clients = [padded(ids, labels) for ids, labels in work]
    start_params = workload.initial_params(work.num_items)
    params = jax.tree.map(jnp.asarray, start_params)
    for number in range(options.rounds):
        start = time.perf_counter()
        params = jax.block_until_ready(fedavg_round(params, clients))
        seconds = time.perf_counter() - start
        report.round(number=number, seconds=seconds, clients=work.num_clients, items=work.num_items)
        if number == 0 and options.check:
            report.check(params, numpy_reference.fedavg_round(start_params, work))


if __name__ == "__main__":
    main()
