"""What the negatives of a protocol give away: a scorer that learns nothing and only remembers what it was shown.

In round t every client u draws m negatives for each of its training positives, uniformly from the items that the
exclusion rule leaves to it. The scorer ranks items by

    s_u(i) = - (how often u has drawn i in rounds 1 .. t).

Where negatives avoid all that the user ever touched, held-out items too ("paper"), the held-out item is the one item
that is neither a positive nor ever a negative. The others are drawn sooner or later, and it comes out on top. Where
negatives avoid training items only ("strict", as in He et al., 2017, "Neural Collaborative Filtering"), it is drawn
like any other and the scorer stays at chance. So the metrics of this scorer are what a protocol pays for memory alone.

Differs from published training loops: they draw m distinct negatives for a positive, anew for each positive; here all
draws of a round are independent, so that two of the m are equal for about m (m - 1) / (2 * items) of the positives.
With ``replacement=False`` all draws of a client's round are distinct, as this package trains by default: that shows a
client more items in each round, and gives more away.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from fedjax_rec.data.clients import Client, client_data
from fedjax_rec.data.negatives import Negatives, independent_negatives, uniform_negatives
from fedjax_rec.data.split import Split
from fedjax_rec.evaluation.exact import evaluate
from fedjax_rec.evaluation.heldout import cases
from fedjax_rec.evaluation.sampled import expect_sampled
from fedjax_rec.evaluation.scorers import Scorer

ROUNDS = (1, 2, 5, 10, 20, 50, 100)
AS_PUBLISHED = Negatives(4, replacement=True)
MAX_BYTES = 4 * 2**30


def audit_protocol(
    split: Split,
    *,
    exclusion: str,
    rounds: Sequence[int] = ROUNDS,
    num_negatives: int = 99,
    k: int = 10,
    negatives: Negatives = AS_PUBLISHED,
    seed: int = 0,
    max_bytes: int = MAX_BYTES,
) -> dict[int, dict[str, float]]:
    """Metrics of the counting scorer on the test items after some rounds, and before the first, which is chance.

    Equal scores are ranked in expectation: a method that breaks ties at random gets the same on average.

    Args:
      split: leave-one-out, one test item a user.
      exclusion: what training negatives avoid, "paper", "strict" or "candidates" (see `client_data`).
      rounds: after which to evaluate.
      num_negatives: of the sampled metrics, in closed form.
      k: cut-off.
      negatives: how many for each positive, m, and whether distinct within a client's round; uniform.
      seed: of the draws.
      max_bytes: most memory for the counts, ``4 * clients * items`` bytes.

    Returns:
      For 0 and every round, mean over users of the metrics of `evaluate` that need no list ("hit@10", "ndcg@10",
      "auc", ...) and of `expect_sampled` ("hit@10/99neg", ...).

    Raises:
      ValueError: for rounds below 1, counts above ``max_bytes``, and what `client_data`, `evaluate` and
        `expect_sampled` refuse.
    """
    rounds = sorted(set(rounds))
    if not rounds or rounds[0] < 1:
        raise ValueError(f"Rounds to evaluate after must be 1 or more; got {rounds}.")
    if negatives.num_per_positive < 1 or negatives.distribution != "uniform":
        raise ValueError(f"The audit draws at least one uniform negative for each positive; got {negatives}.")
    needed = 4 * split.num_users * split.num_items
    if needed > max_bytes:
        raise ValueError(
            f"Counts of {split.num_users:,} clients x {split.num_items:,} items take {needed / 2**30:.3g} GiB, over "
            f"the limit of {max_bytes / 2**30:.3g} GiB. Raise it, or audit a sample of the users: clients are "
            "independent, so a few thousand give the same figures."
        )
    buckets = jax.device_put(client_data(split, exclusion=exclusion).buckets)
    asked = cases(split)
    counts = jnp.zeros((split.num_users, split.num_items), jnp.int32)
    found, done = {}, 0
    for reached in (0, *rounds):
        counts = _draw_rounds(counts, buckets, jax.random.key(seed), done, reached, negatives=negatives)
        full = evaluate(Scorer(_fewest_first, counts), asked, ks=(k,))
        sampled = expect_sampled(full, num_negatives=num_negatives, ks=(k,))
        found[reached] = {name: full.values[name] for name in full.per_user} | sampled.values
        done = reached
    return found


@partial(jax.jit, static_argnames="negatives", donate_argnums=0)
def _draw_rounds(counts, buckets: tuple[Client, ...], key, first, last, *, negatives: Negatives):
    """Adds the draws of rounds ``first .. last - 1`` to the counts, int32 ``[clients, items]``."""

    def one_round(index, counts):
        round_key = jax.random.fold_in(key, index)
        for bucket in buckets:
            drawn = jax.vmap(partial(_draw, round_key, negatives))(bucket)
            counts = counts.at[bucket.client_id[:, None], drawn].add(1, mode="drop")
        return counts

    return jax.lax.fori_loop(first, last, one_round, counts)


def _draw(key: jax.Array, negatives: Negatives, client: Client) -> jax.Array:
    """One client's negatives of a round: int32 ``[L * m]``, padded with ``num_items``."""
    draw = independent_negatives if negatives.replacement else uniform_negatives
    ids, _ = draw(
        jax.random.fold_in(key, client.client_id),
        num=client.item_ids.shape[0] * negatives.num_per_positive,
        wanted=client.length * negatives.num_per_positive,
        excluded=client.excluded,
        num_excluded=client.num_excluded,
        num_items=client.num_items,
    )
    return ids


def _fewest_first(counts: jax.Array, user_ids: jax.Array) -> jax.Array:
    return -counts[user_ids].astype(jnp.float32)
