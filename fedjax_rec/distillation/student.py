"""A student: any causal model of the next item whose loss listens to a teacher.

    loss = (1 - w) cross-entropy of what came next  +  w mean_t loss(teacher_t, student_t)  +  v relations

over the places t of a history, with the scores of all items after each. As it is one of the losses of
`models.sequence_losses`, a student is trained, on one machine or by clients, like any other sequence model:

    student = sasrec(id_table(num_items, dim=8), loss=distilled(teacher, kl(top_k=num_items)))
    params = train_sequence(student, histories, seed=0, num_epochs=100)
"""

import jax
import jax.numpy as jnp

from fedjax_rec.distillation.losses import NEVER, ScoreLoss, relations
from fedjax_rec.distillation.teacher import Teacher
from fedjax_rec.models.base import Shared
from fedjax_rec.models.items import ItemTower
from fedjax_rec.models.sequence_losses import SequenceLoss, Targets, full_cross_entropy, mean_over


def distilled(
    teacher: Teacher,
    loss: ScoreLoss,
    *,
    weight: float = 0.9,
    hard: SequenceLoss | None = None,
    unseen_only: bool = True,
    relation_weight: float = 0.0,
    num_relations: int = 64,
) -> SequenceLoss:
    """What a causal model (`sasrec`, `hstu`, `history_factors`) is blamed for by its histories and by a teacher.

    Args:
      teacher: of the same catalogue.
      loss: of scores, from `losses`.
      weight: w in [0, 1] of the teacher; 1 does without what came next, which virtual histories may not know.
      hard: loss of what came next; None = `full_cross_entropy()`.
      unseen_only: leave out items that the history has by then, in the teacher's scores and in the student's: they
        would not be recommended, and the student need not spend numbers on their order.
      relation_weight: v of `losses.relations`, between the vectors of drawn items.
      num_relations: items drawn for each history.

    Raises:
      ValueError: for weights out of range, or relations to a teacher without item vectors.
    """
    if not 0 <= weight <= 1 or not relation_weight >= 0 or num_relations < 2:
        raise ValueError(
            f"weight must lie in [0, 1], relation_weight must not be negative, num_relations at least 2; got {weight}, "
            f"{relation_weight} and {num_relations}."
        )
    if relation_weight and teacher.vectors is None:
        raise ValueError("This teacher has no item vectors to compare: use relation_weight=0, or give it `vectors`.")
    hard = full_cross_entropy() if hard is None else hard

    def total(items: ItemTower, params: Shared, targets: Targets, key: jax.Array) -> jax.Array:
        history = targets.history[:-1]
        _check_fits(teacher, items, targets, history)
        hard_key, loss_key, relation_key = jax.random.split(key, 3)
        terms = []
        if weight < 1:
            terms.append((1 - weight) * hard(items, params, targets, hard_key))
        catalogue = items.all(params)
        if weight > 0:
            told, own = teacher.after_each(history), targets.queries @ catalogue.T
            if unseen_only:
                seen = _seen(history, items.num_items)
                told, own = jnp.where(seen, NEVER, told), jnp.where(seen, NEVER, own)
            each = jax.vmap(loss)(told, own, jax.random.split(loss_key, len(history)))
            terms.append(weight * mean_over(each, targets.real))
        if relation_weight > 0:
            drawn = jax.random.choice(relation_key, items.num_items, (num_relations,), replace=False)
            terms.append(relation_weight * relations(teacher.vectors[drawn], catalogue[drawn]))
        return sum(terms)

    return total


def _check_fits(teacher: Teacher, items: ItemTower, targets: Targets, history: jax.Array) -> None:
    if teacher.num_items != items.num_items:
        raise ValueError(f"The teacher knows {teacher.num_items} items and the student {items.num_items}.")
    if len(targets.ids) != len(history):
        raise ValueError(
            "A teacher can be heard by a model that asks for the next item at every place (sasrec, hstu, "
            "history_factors); this one asks for other items."
        )
    if teacher.max_length is not None and teacher.max_length < len(history):
        raise ValueError(
            f"The teacher looks at {teacher.max_length} items at most and the student trains on {len(history)}; give "
            "the student a max_length no longer than the teacher's."
        )


def _seen(history: jax.Array, num_items: int) -> jax.Array:
    """bool ``[L, num_items]``, True for items at the place or before it."""
    first = jnp.full(num_items, len(history), jnp.int32)
    first = first.at[history].min(jnp.arange(len(history), dtype=jnp.int32), mode="drop")
    return first[None, :] <= jnp.arange(len(history), dtype=jnp.int32)[:, None]
