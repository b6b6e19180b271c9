"""Rounds that do not wait: buffered asynchronous updates against old parameters, and cohorts with stragglers.

The server steps when a buffer of K updates is full. Client k of the buffer of step t was called s_k steps ago, so

    w_{t+1} = server(w_t, (1/K) sum_k u_k(w_{t - s_k}) / sqrt(1 + s_k)),

where u_k(w) is what it sends after it received w. Nguyen et al., 2022, "Federated Learning with Buffered Asynchronous
Aggregation" (AISTATS). A round of the simulator is a server step, and its cohort is the buffer.

Differs from the paper: clips and noise are links of the chain, K is the sampler's public expected size, and how late a
client is comes from a table or a key that everybody may know.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_rec.federated.algorithm import Algorithm
from fedjax_rec.federated.cohort import Sampler
from fedjax_rec.federated.transforms import scale_update, select_update
from fedjax_rec.models.base import Shared

# Folded into the cohort key: a number that no round has.
_STRAGGLERS = 2**32 - 6


class Stale(NamedTuple):
    """A model's shared parameters with those of earlier rounds; `Model.score` takes it as it takes a `Shared`.

    Attributes:
      tables: the newest.
      dense: the newest.
      past: `Shared` with leaves ``[S, ...]``: entry j is what the server held j + 1 rounds ago, or at first.
      late: float32 ``[clients]``, rounds that each client is late in the coming round; public. Whole numbers, kept as
        floats like all that links may round on the way to clients.
    """

    tables: dict[str, jax.Array]
    dense: Any
    past: Shared
    late: jax.Array


def with_staleness(
    algorithm: Algorithm, lateness: Callable[[jax.Array], jax.Array], *, max_staleness: int
) -> Algorithm:
    """The same method with clients that train on old parameters.

    The server keeps its last S states, and a client s rounds late trains on the state of s rounds ago (in the first
    rounds, the initial one), and weighs 1/sqrt(1 + s). A client later than S rounds counts in the cohort and sends
    zeros. With nobody late it is the synchronous method, bit for bit.

    Guarantee: that of the chain and the sampler, with the same events as the synchronous run, under two conditions.
    (1) Lateness depends on no data: here it is a function of the round and the client alone, part of the released
    state. (2) Whether a client is in a round's cohort is the sampler's choice and nobody else's. Then the sum of round
    t is a function of states that earlier rounds have released, w_t and up to S before it, and of the data and private
    parameters of clients that the sampler drew for this round afresh; each adds a vector that the chain clips after the
    weight is on it. So given everything released so far, round t is the sampler's event of one Gaussian sum, of the
    same sensitivity whichever states it reads, and the rounds compose adaptively. Keeping old states releases nothing
    new. To run it, the coins of round t are thrown S rounds ahead, and slow clients are called early.

    What does not hold: amplification where a buffer takes whoever arrives first. Membership then follows from speeds
    that may be known, and is no secret coin; and if a client's time depends on its data (a long history trains longer),
    so do membership and lateness, and no event covers it. For such buffers use `arrival_sampler`, which charges every
    client's participations without amplification, with times that depend on public tiers alone.

    Args:
      algorithm: its shared parameters are a `Shared`; `with_tiers` goes inside.
      lateness: ``round -> int32 [clients]``, public: `DeviceTimes.lateness` or `Arrivals.lateness`.
      max_staleness: S; the server keeps S + 1 copies of the parameters.

    Raises:
      ValueError: for a negative S, or an algorithm that sends clients more than a model's parameters.
    """
    if max_staleness < 0 or max_staleness != int(max_staleness):
        raise ValueError(f"max_staleness must be a whole number of rounds, at least 0; got {max_staleness}.")
    if not isinstance(jax.eval_shape(algorithm.init, jax.random.key(0)).shared, Shared):
        raise ValueError("Staleness keeps a model's shared parameters, and this method sends clients other state too.")

    def coming(round_index):
        return lateness(round_index).astype(jnp.float32)

    def init(key):
        state = algorithm.init(key)
        past = jax.tree.map(lambda x: jnp.repeat(x[None], max_staleness, axis=0), state.shared)
        return state._replace(shared=Stale(*state.shared, past, coming(state.round)))

    def client_update(shared, private, client, num_steps, key):
        late = shared.late.at[client.client_id].get(mode="fill", fill_value=0).astype(jnp.int32)
        received = _ago(shared, late, max_staleness)
        output = algorithm.client_update(received, private, client, num_steps, key)
        update = scale_update(output.update, 1 / jnp.sqrt(1.0 + late))
        metrics = output.metrics | {"late": late.astype(jnp.float32)}
        return output._replace(update=select_update(late <= max_staleness, update), metrics=metrics)

    def server_update(state, aggregate):
        stale = state.shared
        newest = Shared(stale.tables, stale.dense)
        new = algorithm.server_update(state._replace(shared=newest), aggregate)
        past = stale.past
        if max_staleness:
            past = jax.tree.map(lambda x, rest: jnp.concatenate([x[None], rest[:-1]]), newest, past)
        return new._replace(shared=Stale(*new.shared, past, coming(state.round + 1)))

    return algorithm._replace(init=init, client_update=client_update, server_update=server_update)


def _ago(shared: Stale, late: jax.Array, max_staleness: int) -> Shared:
    """The parameters of ``late`` rounds ago; the oldest there are for who is later than that."""
    newest = Shared(shared.tables, shared.dense)
    if not max_staleness:
        return newest
    return jax.tree.map(
        lambda now, past: jnp.where(late == 0, now, past.at[late - 1].get(mode="clip")), newest, shared.past
    )


def stragglers(sampler: Sampler, tier_of: np.ndarray, survival: Sequence[float]) -> Sampler:
    """Cohorts of which each client sends only with the chance of its tier: who misses the deadline is not in the sum.

    Guarantee: the sampler's own event and relation. Given who would miss the deadline, which data must not decide, the
    sum over the others is a function of the sampler's cohort with the same sensitivity; no further amplification is
    claimed for it. The divisor ``expected_size`` is the public expected number of those who send.

    Args:
      sampler: whom the server calls.
      tier_of: int ``[clients]``, public.
      survival: for each tier the chance to send in time, in [0, 1], public; `DeviceTimes.survival`. 0 excludes a tier.

    Raises:
      ValueError: for chances out of range, or if nobody ever sends.
    """
    sends = np.asarray(survival, np.float64)[np.asarray(tier_of)]
    if not np.all((sends >= 0) & (sends <= 1)) or not sends.any():
        raise ValueError(f"survival must be chances in [0, 1], not all 0; got {list(survival)}.")
    chances = jnp.asarray(sends, jnp.float32)

    def draw(key, round_index):
        coins = jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, _STRAGGLERS), round_index), sends.shape)
        return sampler.draw(key, round_index) & (coins < chances)

    return sampler._replace(
        draw=draw,
        expected_size=sampler.sampling_prob * float(sends.sum()),
        sampling_prob=sampler.sampling_prob * float(sends.mean()),
    )
