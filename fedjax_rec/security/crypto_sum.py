"""The secure sum with real keys as a link of the update chain."""

import os
from collections.abc import Callable, Sequence

import numpy as np

from fedjax_rec.federated.transforms import UpdateTransform
from fedjax_rec.security.graph import graph_parameters
from fedjax_rec.security.host_sum import NoSum, host_sum
from fedjax_rec.security.simulated import protocol_traffic, resolve_graph


def crypto_secure_sum(
    *,
    session: str,
    min_clients: int = 2,
    degree: int | None = None,
    threshold: int | None = None,
    dropout_prob: float = 0.0,
    num_clients: int | None = None,
    entropy: Callable[[int], bytes] = os.urandom,
) -> UpdateTransform:
    """Sums the integers of an earlier `fixed_point` by the protocol of `fedjax_rec.security.secagg`, round by round.

    Every client's key agreement, shares and masks are computed for real, by one process that plays all parties: some
    milliseconds a client and round. `simulated_secure_sum` gives the same sums at the speed of a simulation.

    Args:
      session: name of the run; messages of other sessions are refused.
      min_clients: fewer survivors get no sum.
      degree: neighbours per client; None follows the cohort's size.
      threshold: holders of shares who can rebuild a secret.
      dropout_prob: chance of each client to drop out after keys are shared and before it sends.
      num_clients: clients in a cohort, for counting bytes.
      entropy: gives so many unpredictable bytes.

    Raises:
      ModuleNotFoundError: without the package ``cryptography``; the message names the extra that brings it.
      ValueError: for numbers out of range.
    """
    from fedjax_rec.security.secagg.config import SecAggConfig
    from fedjax_rec.security.secagg.session import HostSum
    from fedjax_rec.security.secagg.stages import ProtocolError

    def make(num_words):
        config = SecAggConfig(
            num_words=num_words, session=session, degree=degree, threshold=threshold, min_clients=min_clients
        )
        return HostSum(config, entropy=entropy)

    make(1)  # what cannot work is refused before training
    if degree is not None:
        resolve_graph(degree, threshold, num_clients)

    class Session:
        """A `SumSession`."""

        def begin(self, client_ids: Sequence[int], dropped: Sequence[int], round_index: int, num_words: int) -> None:
            try:
                self.run = make(num_words)
                self.run.begin(client_ids, round_index, dropped=dict.fromkeys(dropped, "upload"))
            except ProtocolError as error:
                raise NoSum from error

        def upload(self, client_id: int, words: np.ndarray) -> None:
            self.run.upload(client_id, words)

        def finish(self) -> np.ndarray:
            try:
                return self.run.finish()[0]
            except ProtocolError as error:
                raise NoSum from error

    counted = graph_parameters(num_clients).degree if degree is None and num_clients is not None else degree
    traffic = {} if counted is None else protocol_traffic(counted, num_clients or counted + 1)
    least = max(min_clients, threshold or 0)
    return host_sum(Session(), min_clients=least, dropout_prob=dropout_prob)._replace(**traffic)
