"""Each client ranks its own held-out items, in the round, with the parameters that it has just trained.

Personalised methods are scored with what a client holds after its local steps and before the server averages: its own
copy of the shared parameters and its private ones. That copy lives only inside the round, so ranking happens there.
Two integers a question stay with the client; they never reach the server.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_rec.evaluation.exact import Evaluation, check_cut_offs
from fedjax_rec.evaluation.heldout import Cases
from fedjax_rec.evaluation.metrics import metric_names, user_metrics
from fedjax_rec.evaluation.ranks import Ranks
from fedjax_rec.federated.algorithm import Algorithm
from fedjax_rec.federated.rows import add_update, is_rows
from fedjax_rec.models.base import Shared

_user_metrics = jax.jit(user_metrics, static_argnames=("ks", "ties"))


class Question(NamedTuple):
    """One held-out item a client, ranked among the catalogue less what is masked.

    Attributes:
      positive: int32 ``[clients]``, ``num_items`` for a client that is not asked.
      masked: int32 ``[clients, M]``, items that are no candidates, padded with ``num_items``.
      candidates: int32 ``[clients, C]``, the only rivals there are, padded with ``num_items``; None for all others.
    """

    positive: jax.Array
    masked: jax.Array
    candidates: jax.Array | None = None


def question(cases: Cases, *, num_clients: int, among_candidates: bool = False) -> Question:
    """The cases of a split as arrays by client id.

    Args:
      cases: one part of a split.
      num_clients: clients in the population.
      among_candidates: rank against ``cases.candidates`` alone.

    Raises:
      ValueError: if a user has several held-out items, or there are no candidates.
    """
    if among_candidates and cases.candidates is None:
        raise ValueError("These cases have no candidates; attach some to the split with with_candidates.")
    if cases.positives.shape[1] != 1:
        raise ValueError("Clients rank one held-out item each; use a leave-one-out split.")
    positive = np.full(num_clients, cases.num_items, np.int32)
    positive[cases.user_ids] = cases.positives[:, 0]
    counts = np.diff(cases.seen_offsets)
    masked = np.full((num_clients, max(int(counts.max(initial=0)), 1)), cases.num_items, np.int32)
    rows = np.repeat(cases.user_ids, counts)
    columns = np.arange(len(cases.seen_item_ids)) - np.repeat(cases.seen_offsets[:-1], counts)
    masked[rows, columns] = cases.seen_item_ids
    candidates = None
    if among_candidates:
        candidates = np.full((num_clients, cases.candidates.shape[1]), cases.num_items, np.int32)
        candidates[cases.user_ids] = cases.candidates
        candidates = jnp.asarray(candidates)
    return Question(jnp.asarray(positive), jnp.asarray(masked), candidates)


def local_parameters(shared: Shared, update: Any) -> Shared:
    """What a client holds after training: the received parameters plus its update, tables written out whole."""
    return jax.tree.map(lambda change, received: add_update(received, change), update, shared, is_leaf=is_rows)


def ranked_on_clients(
    algorithm: Algorithm, score: Callable[[Shared, Any], jax.Array], questions: Mapping[str, Question]
) -> Algorithm:
    """The same algorithm, whose clients also answer questions after their local steps.

    Training is not touched. The private state becomes ``{"own": ..., "ranks": {name: int32 [2]}}``: how many candidates
    a client ranked before its held-out item, and how many equal to it, in the last round that it took part in; -1
    before that.

    Args:
      algorithm: its update must be trained minus received parameters, unweighted.
      score: of the model, ``(Shared, private) -> [items]``.
      questions: by name, from `question`.
    """

    def init_private(key):
        return {"own": algorithm.init_private(key), "ranks": {name: jnp.full(2, -1, jnp.int32) for name in questions}}

    def client_update(shared, private, client, num_steps, key):
        output = algorithm.client_update(shared, private["own"], client, num_steps, key)
        scores = score(local_parameters(shared, output.update), output.private)
        ranks = {name: _answer(scores, ask, client.client_id) for name, ask in questions.items()}
        return output._replace(private={"own": output.private, "ranks": ranks})

    return algorithm._replace(init_private=init_private, client_update=client_update)


def _answer(scores: jax.Array, ask: Question, client_id: jax.Array) -> jax.Array:
    positive = ask.positive.at[client_id].get(mode="fill", fill_value=len(scores))
    masked = ask.masked.at[client_id].get(mode="fill", fill_value=len(scores))
    against = scores.at[positive].get(mode="clip")
    listed = masked
    if ask.candidates is not None:
        listed = jnp.append(ask.candidates.at[client_id].get(mode="fill", fill_value=len(scores)), positive)
    others = scores.at[listed].get(mode="clip")

    def count(holds):
        of_listed = ((listed < len(scores)) & holds(others)).sum()
        # Of all less of the masked: a gather of the few, where a mask over the catalogue would be a scatter.
        return of_listed if ask.candidates is not None else holds(scores).sum() - of_listed

    better, equal, nans = (count(holds) for holds in (lambda x: x > against, lambda x: x == against, jnp.isnan))
    return jnp.where(nans > 0, -2, jnp.stack([better, equal - 1])).astype(jnp.int32)


def evaluate_on_clients(
    ranks: jax.Array,
    cases: Cases,
    *,
    ks: tuple[int, ...] = (10,),
    ties: str = "expected",
    among_candidates: bool = False,
) -> Evaluation:
    """Metrics from the ranks that clients found themselves.

    Args:
      ranks: int32 ``[clients, 2]``, one entry of ``private["ranks"]``.
      cases: that the question was made of.
      ks: cut-offs.
      ties: as in `evaluate`.
      among_candidates: as for `question`; metrics are then named "hit@10/99neg" and so on.

    Returns:
      An `Evaluation` without lists; `expect_sampled` takes it like any other that ranked the catalogue.

    Raises:
      ValueError: if a client has not taken part yet, or its scores are NaN.
    """
    ks = check_cut_offs(ks, cases.num_items, ties=ties)
    own = np.asarray(ranks)[cases.user_ids]
    for code, what in ((-1, "has not taken part in a round yet; run rounds first"), (-2, "scores an item as NaN")):
        bad = np.flatnonzero(own[:, 0] == code)
        if len(bad):
            raise ValueError(f"User id {cases.user_ids[bad[0]]} {what} ({len(bad)} such users).")
    num_candidates, suffix = cases.num_items - np.diff(cases.seen_offsets), ""
    if among_candidates:
        num_candidates = 1 + (cases.candidates < cases.num_items).sum(axis=1)
        suffix = f"/{cases.candidates.shape[1]}neg"
    counted = Ranks(
        better=own[:, :1],
        tied=own[:, 1:],
        real=np.ones((cases.num_cases, 1), bool),
        num_candidates=num_candidates.astype(np.int32),
    )
    values = np.asarray(_user_metrics(counted, ks=ks, ties=ties))
    per_user = {name + suffix: values[:, column] for column, name in enumerate(metric_names(ks))}
    return Evaluation(
        values={name: float(column.mean(dtype=np.float64)) for name, column in per_user.items()},
        per_user=per_user,
        user_ids=cases.user_ids,
        ranks=counted,
        exposure={},
        num_users_without_positives=cases.num_users_without_positives,
        ties=ties,
        fingerprint=cases.fingerprint,
    )
