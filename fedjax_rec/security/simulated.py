"""A secure sum inside the jitted round: its masks, its dropouts and its arithmetic, and none of its secrecy.

Client i sends ``y_i = q_i + m(b_i) + sum_j (+-) m(k_ij)`` modulo 2^32, j over its neighbours on a random circulant
graph; the server adds up what survivors sent and takes out their self masks and the masks of edges of which one end
dropped out (Bonawitz et al., 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning"; Bell et al.,
2020, "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead"). All seeds come from one key that the program
holds, and masks from a mixing function, so this hides nothing from anybody: it is for studying sums, dropouts and
costs at the speed of a simulation. `crypto_secure_sum` runs the protocol with real keys and gives the same bits.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_rec.federated.rows import zero_total
from fedjax_rec.federated.transforms import Summation, UpdateTransform
from fedjax_rec.security.graph import graph_parameters, protocol_bytes
from fedjax_rec.security.masks import add_masked, plan_masks, remove_masks, survivors_of
from fedjax_rec.security.ring import to_words, words_server


def simulated_sum(
    vectors: jax.Array,
    survives: jax.Array,
    *,
    key: jax.Array,
    degree: int,
    threshold: int,
    min_clients: int = 2,
    in_cohort: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One secure sum by itself, outside a round, in one compiled program for each shape and degree. Not secret.

    Args:
      vectors: uint32 ``[clients, words]``.
      survives: bool ``[clients]``, who sends.
      key: of the graph and of the masks.
      degree: neighbours per client; a cohort that is no larger takes its complete graph.
      threshold: holders of shares, a client and its neighbours, who can rebuild a secret.
      min_clients: fewer survivors get no sum; at least 2.
      in_cohort: bool ``[clients]``, who agrees on masks; None for all.

    Returns:
      uint32 ``[words]``, the sum of the survivors' vectors modulo 2^32, and True; or zeros, and False, if too few of
      them are left.

    Raises:
      ValueError: for numbers out of range.
    """
    check_dropout(min_clients, 0.0)
    resolve_graph(degree, threshold, None)
    in_cohort = jnp.ones(len(vectors), bool) if in_cohort is None else in_cohort
    return _simulated_sum(vectors, in_cohort & survives, in_cohort, key, threshold, min_clients, degree)


@partial(jax.jit, static_argnums=6)
def _simulated_sum(vectors, survives, in_cohort, key, threshold, min_clients, degree):
    plan = plan_masks(in_cohort, survives, key)

    def upload(client, total):
        return add_masked(total, vectors[client][None], client[None], jnp.ones(1, bool), plan, degree)

    total = jax.lax.fori_loop(0, len(vectors), upload, jnp.zeros(vectors.shape[1:], jnp.uint32))
    return remove_masks(total, plan, degree, threshold, min_clients)


def simulated_secure_sum(
    *,
    min_clients: int = 2,
    degree: int | None = None,
    threshold: int | None = None,
    dropout_prob: float = 0.0,
    num_clients: int | None = None,
) -> UpdateTransform:
    """Sums the integers of an earlier `fixed_point` as a secure sum would, in the jitted round. Not secret.

    A round of which too few clients are left gives no sum: the server then gets zeros, and the metric
    ``secure_sum_refused`` is 1. The metric ``survivors`` counts the clients in the sum.

    Args:
      min_clients: fewer survivors get no sum; at least 2.
      degree: neighbours per client; by default as `graph_parameters` has it for ``num_clients``.
      threshold: holders of shares, a client and its neighbours, who can rebuild a secret.
      dropout_prob: chance of each client to drop out after the masks are agreed on and before it sends.
      num_clients: clients in a cohort, for the defaults of degree and threshold, and for counting bytes.

    Raises:
      ValueError: for numbers out of range.
    """
    check_dropout(min_clients, dropout_prob)
    degree, threshold = resolve_graph(degree, threshold, num_clients)

    def prepare(state, context, key):
        drop_key, mask_key = jax.random.split(key)
        return plan_masks(context.in_cohort, survivors_of(context.in_cohort, drop_key, dropout_prob), mask_key)

    def add(total, updates, client_ids, active, plan):
        return add_masked(total, updates, client_ids, active, plan, degree)

    def end(total, plan):
        total, enough = remove_masks(total, plan, degree, threshold, min_clients)
        return total, sum_metrics(plan.survives.sum(), enough)

    return UpdateTransform(
        prepare=prepare,
        client=lambda update, plan, key: (to_words(update), {}),
        summation=Summation(zero_total, add, end, min_clients=max(min_clients, threshold), dropout_prob=dropout_prob),
        server=words_server,
        **protocol_traffic(degree, num_clients or degree + 1),
    )


def protocol_traffic(degree: int, num_clients: int) -> dict[str, Any]:
    """``upload`` and ``download`` of a link that sums securely: the words, and what the protocol takes beside them."""
    sent, received = protocol_bytes(degree, num_clients)
    return {
        "upload": lambda wire, update: wire._replace(side_bits=wire.side_bits + 8 * sent),
        "download": lambda wire, update: wire._replace(side_bits=wire.side_bits + 8 * received),
    }


def sum_metrics(num_survivors: jax.Array, enough: jax.Array) -> dict[str, jax.Array]:
    """The metrics of a round's secure sum."""
    return {"survivors": num_survivors.astype(jnp.float32), "secure_sum_refused": 1.0 - enough.astype(jnp.float32)}


def check_dropout(min_clients: int, dropout_prob: float) -> None:
    """Raises a ValueError for numbers that no secure sum has."""
    if min_clients < 2:
        raise ValueError(f"min_clients must be at least 2: a sum of one upload is that upload; got {min_clients}.")
    if not 0 <= dropout_prob < 1:
        raise ValueError(f"dropout_prob must be at least 0 and below 1; got {dropout_prob}.")


def resolve_graph(degree: int | None, threshold: int | None, num_clients: int | None) -> tuple[int, int]:
    """Degree and threshold as given, or as `graph_parameters` has them for a cohort of ``num_clients``."""
    if degree is None:
        if threshold is not None or num_clients is None:
            raise ValueError("Give degree and threshold, or num_clients, from which both follow.")
        return tuple(graph_parameters(num_clients))
    if degree % 2 and num_clients is not None and num_clients > degree + 1:
        raise ValueError(
            f"degree must be even for {num_clients} clients, half on either side of the circle; got {degree}."
        )
    threshold = (degree + 1) // 2 + 1 if threshold is None else threshold
    if not 2 <= threshold <= degree + 1:
        raise ValueError(f"threshold must be from 2 to {degree + 1}, the holders of a secret; got {threshold}.")
    return degree, threshold
