"""What the round needs of a federated method: what a client does, and what the server does."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax

from fedjax_rec.data.clients import Client
from fedjax_rec.models.base import Shared


class ServerState(NamedTuple):
    """All that the server ever sees. (epsilon, delta) is a statement about the sequence of these.

    The noise that `correlated_noise` keeps in ``transforms`` for later rounds is no part of that sequence: it is a
    secret of whoever adds it, like the noise key.

    Attributes:
      round: int32 scalar, rounds done.
      shared: the shared parameters.
      opt_state: the server optimizer's.
      transforms: the update chain's.
    """

    round: jax.Array
    shared: Shared
    opt_state: Any
    transforms: Any = ()


class ClientOutput(NamedTuple):
    """What one client's round gives.

    Attributes:
      update: goes through the chain and into the sum; trained minus received for FedAvg.
      private: the client's private parameters after the round; they stay with it.
      metrics: float32 scalars, averaged over the cohort for the person who runs the simulation.
    """

    update: Any
    private: Any
    metrics: dict[str, jax.Array]


class Algorithm(NamedTuple):
    """A federated method.

    Attributes:
      init: ``key -> (ServerState, private of one client)`` is split in two: this one gives the ServerState.
      init_private: ``key -> pytree``, one client's private parameters.
      client_update: ``(shared, private, client, num_steps, key) -> ClientOutput`` for one client. ``num_steps`` is an
        int32 scalar that all clients of a chunk have in common, at least `num_steps` of each: steps past a client's
        own data change nothing.
      num_steps: ``client -> int32 scalar``, the local steps that this client needs.
      server_update: ``(ServerState, aggregate) -> ServerState``; the aggregate is the transformed sum over the
        expected cohort size.
      individual: True if the server needs single uploads; then neither a secure sum nor central DP applies.
      no_dp: a sentence that says why DP is refused and what to change, or nothing.
      takes_rows: whether the aggregate of a table may be a `Rows`, zero elsewhere; else it is written out as the table.
    """

    init: Callable[[jax.Array], ServerState]
    init_private: Callable[[jax.Array], Any]
    client_update: Callable[[Shared, Any, Client, jax.Array, jax.Array], ClientOutput]
    num_steps: Callable[[Client], jax.Array]
    server_update: Callable[[ServerState, Any], ServerState]
    individual: bool = False
    no_dp: str = ""
    takes_rows: bool = False


def client_key(key: jax.Array, client_id: jax.Array) -> jax.Array:
    """The key of one client, whatever cohort, chunk or device it lands in."""
    return jax.random.fold_in(key, client_id)


def all_private(algorithm: Algorithm, key: jax.Array, num_clients: int) -> Any:
    """Initial private parameters of every client: leaves with a leading ``[num_clients]`` axis."""
    keys = jax.vmap(partial(client_key, key))(jax.numpy.arange(num_clients))
    return jax.vmap(algorithm.init_private)(keys)
