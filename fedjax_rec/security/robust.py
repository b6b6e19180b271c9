"""Robust aggregation: sums of a round's uploads that a few malicious clients cannot move at will.

Each rule is the last link of the update chain and takes the place of the plain sum. All but `clip_by_row_norm` look at
single uploads. So they are refused together with two things: a secure sum, which exists to hide single uploads; and
central DP, because one client decides here which of the *others'* numbers count (whose upload is the median, who is
Krum's choice), so the result is not Lipschitz in one client's upload and noise for a sum's sensitivity covers nothing.

Dividing a rule's result by the expected cohort size m, as the round does, gives ``(s / m) * rule`` for a row that s
clients sent: of the size of the plain average ``(1 / m) * sum``, with the mean over the senders made robust.

A link before the rule should bound what a client sends, or at least what one row holds. An upload whose L2 norm is not
finite (a NaN, an infinity, or beyond 1.8e19) is left out and counted in the metric ``nonfinite_uploads``.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from fedjax_rec.federated.rows import Rows, is_rows
from fedjax_rec.federated.transforms import Bound, UpdateTransform, scale_update, select_update
from fedjax_rec.privacy.mechanisms import check_clip_norm, global_norm, merge_rows, shrink_factor
from fedjax_rec.security.robust_rules import (
    Rule,
    krum_scores,
    median_rule,
    robust_sum,
    squared_distances,
    trimmed_mean_rule,
)
from fedjax_rec.security.stacked_uploads import at_least, of_stacked_uploads


def clip_by_row_norm(l2_row_norm: float, max_rows: int | None = None) -> UpdateTransform:
    """Scales each row of an upload down to an L2 norm of at most ``l2_row_norm``.

    An attacker that promotes an item puts all that a norm of the whole update allows into the item's one row; honest
    clients spread theirs over hundreds. This bound takes that away. Each row of each `Rows` is clipped by itself: in k
    tables of the same items, an item moves by at most ``sqrt(k)`` times the norm. All dense leaves together are clipped
    as if they were one more row.

    Sees: nothing, so it goes with secure sums and with central DP. But who enforces it? A client clips itself, and a
    malicious one does not. In this simulation it runs on every client's upload, malicious or not, which stands for a
    server that sees single uploads and clips them itself. Under a secure sum nobody does, unless clients prove in zero
    knowledge that their numbers are in range; without such proofs this bounds honest clients only. Breaks down: never
    at once; f malicious clients move a row by at most f times the norm. Memory: none.

    Guarantee: with ``max_rows``, what a client adds to the sum has an L2 norm of at most ``l2_row_norm *
    sqrt(max_rows)``, up to float32 rounding, whatever it computes; without, the number of rows has no bound and neither
    has the norm. An upload with a row whose norm is not finite becomes a zero upload, and the metric
    ``row_nonfinite`` counts it; ``row_clipped`` is the share of a client's rows that were scaled down.

    Args:
      l2_row_norm: bound, in units of the update, in [1e-12, 1e12].
      max_rows: most rows of one upload over all its tables, the dense leaves counting as one. Of more, the client sends
        some drawn at random.

    Raises:
      ValueError: for numbers out of range.
    """
    check_clip_norm("l2_row_norm", l2_row_norm)
    if max_rows is not None:
        at_least("max_rows", max_rows, 1)

    def client(update, prepared, key):
        del prepared
        leaves, structure = jax.tree.flatten(merge_rows(update), is_leaf=is_rows)
        tables, dense = [x for x in leaves if is_rows(x)], [x for x in leaves if not is_rows(x)]
        if max_rows is not None:
            tables = _some_rows(tables, max_rows - bool(dense), key)
        norms = [jnp.sqrt(jnp.sum(jnp.square(x.values), axis=1)) for x in tables]
        dense_norm = global_norm(dense) if dense else jnp.zeros(())
        tables = iter(_scaled_rows(x, shrink_factor(norm, l2_row_norm)) for x, norm in zip(tables, norms, strict=True))
        dense = iter(scale_update(dense, shrink_factor(dense_norm, l2_row_norm)))
        update = jax.tree.unflatten(structure, [next(tables if is_rows(x) else dense) for x in leaves])
        norms = jnp.concatenate([*norms, dense_norm[None]])
        finite = jnp.all(jnp.isfinite(norms))
        share = jnp.sum(norms > l2_row_norm) / jnp.maximum(jnp.sum(norms > 0), 1)
        metrics = {"row_clipped": jnp.where(finite, share, 0.0), "row_nonfinite": (~finite).astype(jnp.float32)}
        return select_update(finite, update), metrics

    def sensitivity(bound):
        l2 = math.inf if max_rows is None else l2_row_norm * math.sqrt(max_rows)
        # What a client sent with noise of its own is clipped like any update, and its bound is of the data only.
        return Bound(l2=l2) if bound.noised else Bound(bound.l1, min(bound.l2, l2))

    return UpdateTransform(client=client, sensitivity=sensitivity)


def median(*, min_support: int, max_clients: int, dense: bool = False) -> UpdateTransform:
    """The coordinate-wise median over the clients that sent a row, times how many did.

    Of an even number of senders, the mean of the middle two. Yin et al., 2018, "Byzantine-Robust Distributed Learning:
    Towards Optimal Statistical Rates".

    Differs from the paper: uploads of a recommender are sparse, so each row has its own senders. That is also its weak
    spot: on an item that few know, a few attackers are the majority. ``min_support`` is the remedy, and the only one.
    Clients that drew an item as a negative are senders of its row too; where they are the majority, the median pushes
    the item down whatever those who like it say.

    Sees: single uploads. Breaks down: on a row of which half the senders are malicious. With at most f malicious
    clients in a cohort, ``min_support >= 2 f + 1`` rules that out, and rows of fewer senders learn nothing. A
    sender more also makes s larger by one. Memory: ``max_clients`` copies of the whole tables, in float32.

    Args:
      min_support: fewest senders of a row that changes in a round, at least 1; it stays as it is below that. The metric
        ``unsupported_rows`` counts rows that somebody sent and too few did.
      max_clients: most clients of a cohort, for which there is memory: of more, those with the largest ids are left
        out, and counted in the metric ``uploads_left_out``. The population's size is always enough.
      dense: take a row that a client did not send as zeros that it did. Every client is then a sender of every row; as
        most of them send few rows, the median of almost every row is zero and nothing is learnt. There to show that.

    Raises:
      ValueError: for numbers out of range.
    """
    return _coordinate_wise(median_rule, min_support, max_clients, dense)


def trimmed_mean(share: float, *, min_support: int, max_clients: int, dense: bool = False) -> UpdateTransform:
    """The coordinate-wise trimmed mean over the clients that sent a row, times how many did.

    Of s senders, the ``floor(share * s)`` smallest and as many largest numbers are left out of each coordinate. Yin et
    al., 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates".

    Differs from the paper: each row has its own senders, as in `median`.

    Sees: single uploads. Breaks down: on a row with more than ``floor(share * s)`` malicious senders. With at most f of
    them in a cohort, ``min_support >= f / share`` rules that out. Memory: as `median`.

    Args:
      share: trimmed from each end, in [0, 0.5). Zero is the plain mean.
      min_support: as in `median`.
      max_clients: as in `median`.
      dense: as in `median`.

    Raises:
      ValueError: for numbers out of range.
    """
    if not 0 <= share < 0.5:
        raise ValueError(f"The share trimmed from each end must be in [0, 0.5); got {share}. The limit is the median.")
    return _coordinate_wise(trimmed_mean_rule(share), min_support, max_clients, dense)


def krum(num_malicious: int, *, max_clients: int) -> UpdateTransform:
    """The one upload that lies closest to its neighbours, times the number of uploads.

    The score of an upload is the sum of its squared distances to the ``n - f - 2`` others that are closest to it; the
    lowest wins. Blanchard et al., 2017, "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent".

    It was made for uploads that estimate the same vector. Those of users with few items in common are orthogonal, so
    that ``|a - b|^2 = |a|^2 + |b|^2`` and Krum takes about the *shortest* upload, of a client that knows few items or
    of an attacker that makes itself small, and multiplies it by n. See first whether it learns anything at all.

    Sees: single uploads. Breaks down: when ``n <= 2 f + 2`` uploads are there; such a round changes nothing, and is
    counted in the metric ``rounds_skipped``. Memory: ``max_clients`` copies of the whole tables in float32, and
    ``max_clients^2`` distances.

    Args:
      num_malicious: f, most malicious clients of a cohort, at least 0.
      max_clients: as in `median`.

    Raises:
      ValueError: for numbers out of range.
    """
    return multi_krum(num_malicious, 1, max_clients=max_clients)


def multi_krum(num_malicious: int, num_chosen: int, *, max_clients: int) -> UpdateTransform:
    """The mean of the ``num_chosen`` uploads with the lowest scores of `krum`, times the number of uploads.

    Between Krum (1) and the plain mean (all). Blanchard et al., 2017, section 4. Sees, breaks down, memory: as `krum`.

    Args:
      num_malicious: f, most malicious clients of a cohort, at least 0.
      num_chosen: uploads to average, at least 1. With ``n - f`` or fewer, colluding attackers may still be among them;
        they are then close to honest ones.
      max_clients: as in `median`.

    Raises:
      ValueError: for numbers out of range.
    """
    at_least("num_malicious", num_malicious, 0)
    at_least("num_chosen", num_chosen, 1)
    if max_clients <= 2 * num_malicious + 2:
        raise ValueError(
            f"Krum with {num_malicious} malicious clients needs cohorts of at least {2 * num_malicious + 3}; "
            f"max_clients is {max_clients}."
        )

    def end(uploads):
        present = uploads.present > 0
        scores = krum_scores(squared_distances(jax.tree.leaves(uploads.values)), present, num_malicious)
        rank = jnp.zeros(max_clients, jnp.int32).at[jnp.argsort(scores)].set(jnp.arange(max_clients, dtype=jnp.int32))
        num, enough = present.sum(), present.sum() > 2 * num_malicious + 2
        chosen = present & (rank < num_chosen) & enough
        weights = jnp.where(chosen, num / jnp.minimum(num_chosen, jnp.maximum(num, 1)), 0.0)
        total = jax.tree.map(lambda x: jnp.tensordot(weights, x, axes=1, precision="highest"), uploads.values)
        return total, {"rounds_skipped": (~enough).astype(jnp.float32)}

    return of_stacked_uploads(end, max_clients)


def _coordinate_wise(rule: Rule, min_support: int, max_clients: int, dense: bool) -> UpdateTransform:
    at_least("min_support", min_support, 1)

    def end(uploads):
        present, unsupported = uploads.present > 0, []

        def one(values, sent):
            if dense or sent.ndim == 1:  # a dense leaf is rows of one number each, and all clients send them all
                values = values if sent.ndim == 2 else values.reshape(max_clients, -1, 1)
                return robust_sum(rule, values, jnp.broadcast_to(present[:, None], values.shape[:2]), min_support)
            support = sent.sum(0, dtype=jnp.int32)
            unsupported.append(jnp.sum((support > 0) & (support < min_support)))
            return robust_sum(rule, values, sent > 0, min_support)

        def shaped(values, sent):
            return one(values, sent).reshape(values.shape[1:])

        total = jax.tree.map(shaped, uploads.values, uploads.sent)
        return total, {"unsupported_rows": jnp.float32(sum(unsupported))}

    return of_stacked_uploads(end, max_clients)


def _scaled_rows(rows: Rows, factor: jax.Array) -> Rows:
    return dataclasses.replace(rows, values=rows.values * factor[:, None])


def _some_rows(tables: list[Rows], num: int, key: jax.Array) -> list[Rows]:
    """At most ``num`` real rows over all tables, drawn uniformly if there are more."""
    if sum(x.ids.size for x in tables) <= num:
        return tables
    real = jnp.concatenate([x.ids < x.num_rows for x in tables])
    order = jnp.argsort(jnp.where(real, jax.random.uniform(key, real.shape), 2.0))
    keep = real & (jnp.zeros(real.shape, jnp.int32).at[order].set(jnp.arange(real.size, dtype=jnp.int32)) < num)
    ends = [sum(x.ids.size for x in tables[: i + 1]) for i in range(len(tables))]
    return [
        Rows(jnp.where(kept, x.ids, x.num_rows), jnp.where(kept[:, None], x.values, 0), x.num_rows)
        for x, kept in zip(tables, jnp.split(keep, ends[:-1]), strict=True)
    ]
