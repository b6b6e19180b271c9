"""Distillation to the small: what students of a tenth of the teacher's numbers keep, with and without privacy.

    python -m experiments distilled --data-dir ~/data

Each run is kept as a line of results/distilled.jsonl, and a second call runs only what is missing; results/distilled.md
is made of the lines. `--student "factors, 168"` runs one student.

MovieLens 100K, leave-one-out, full ranking. Candidates for the teacher are EASE (item-to-item weights) of fading
histories, over `L2` and `RECENCY`, and its ensembles with a large "factors" model, over `SCALES`; validation items
choose. Students are sequence models: "factors" (matrix factorisation of fading histories, `history_factors`) of several
dims, and SASRec. A plain student learns what came next; a distilled one listens to the teacher too, at every place of
every history. Both train alike and stop by validation items, which also chose learning rate and fading of "factors"
(plain, 42 dims). The kind of teacher was changed once with test values in sight: plain students had passed EASE alone.

Under privacy, a generator of virtual users is fitted once at epsilon 8 (lengths, popularity and a Gram matrix; one
ledger). The teacher is EASE of virtual users, and students are trained on virtual users alone, plain or distilled: all
of it post-processing of the same releases. Validation items choose the teacher's setting and when students stop, a look
at real users that epsilon does not cover.
"""

import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments._distilled_page import DELTA, DISTILLED, EPSILON, METRIC, PLAIN, TEACHER, write_page
from experiments.harness import add_missing, finish, study_parser
from fedjax_rec.compression.post_training import dequantize, num_bytes, quantize_params
from fedjax_rec.data import Interactions, Split, leave_one_out, load
from fedjax_rec.data.split import shown_at_test
from fedjax_rec.distillation.losses import kl
from fedjax_rec.distillation.student import distilled
from fedjax_rec.distillation.teacher import Teacher, ensemble, linear_teacher, sequence_teacher
from fedjax_rec.evaluation import cases, evaluate
from fedjax_rec.evaluation.scorers import Scorer
from fedjax_rec.models.dp_ease import dp_ease_scorer
from fedjax_rec.models.ease import item_gram, weights_from_gram
from fedjax_rec.models.history_factors import history_factors
from fedjax_rec.models.items import id_table
from fedjax_rec.models.sasrec import sasrec
from fedjax_rec.models.sequence import SequenceModel, padded_histories, sequence_scorer
from fedjax_rec.models.sequence_losses import SequenceLoss
from fedjax_rec.models.sequence_training import train_sequence
from fedjax_rec.privacy.ledger import Ledger
from fedjax_rec.synthesis.gram import gram_method
from fedjax_rec.synthesis.plan import fit_generator
from fedjax_rec.synthesis.virtual import virtual_users

NAME = "distilled"
LENGTH = 50
L2 = (100.0, 300.0, 1000.0, 3000.0)
RECENCY = (4.0, 6.0, 12.0, 25.0, np.inf)
SCALES = (10.0, 20.0)  # of EASE's scores, which are no logits by themselves
WEIGHT = 0.9  # of the teacher beside what came next
FADING = 4.0  # of students, in items; tried for plain ones: 4, 6, 12 and 25
MEMBER = "factors, 168"  # of the ensembles
NUM_VIRTUAL = 1000
NUM_SEEDS = 3


class Student(NamedTuple):
    """How a student is made and trained."""

    make: Callable[[int, SequenceLoss | None], SequenceModel]
    learning_rate: float
    num_epochs: int


def factors(dim: int) -> Student:
    """Matrix factorisation of a fading history."""

    def make(num_items, loss):
        return history_factors(id_table(num_items, dim=dim), max_length=LENGTH, recency=FADING, loss=loss)

    return Student(make, 0.01, 40)


def transformer(dim: int, *, num_blocks: int, dropout: float) -> Student:
    """SASRec."""

    def make(num_items, loss):
        items = id_table(num_items, dim=dim)
        return sasrec(items, max_length=LENGTH, num_blocks=num_blocks, dropout=dropout, loss=loss)

    return Student(make, 0.003, 60)


STUDENTS = {
    "factors, 420": factors(420),
    "factors, 168": factors(168),
    "factors, 42": factors(42),
    "factors, 16": factors(16),
    "sasrec, 64": transformer(64, num_blocks=2, dropout=0.5),
    "sasrec, 16, one block": transformer(16, num_blocks=1, dropout=0.2),
}
QUICK = ("factors, 42", "factors, 168", "factors, 16")  # three seeds; the others take long, and have one
PRIVATE = ("factors, 168", "factors, 42")


class World(NamedTuple):
    """Data as the study sees it."""

    data: Interactions
    split: Split
    shown: Interactions


class Taught(NamedTuple):
    """A teacher, the histories that students learn from, and what was released for both."""

    teacher: Teacher
    scorer_of: Callable[[Interactions], Scorer]
    histories: Interactions
    candidates: dict[str, float]
    ledger: Ledger | None


@cache
def world(data_dir: Path | None, smoke: bool) -> World:
    """MovieLens 100K, or made-up data."""
    data = load("synthetic", num_users=60, num_items=40) if smoke else load("movielens/100k", data_dir=data_dir)
    split = leave_one_out(data)
    return World(data, split, shown_at_test(split))


def best_ease(gram: np.ndarray, there: World) -> tuple[np.ndarray, float, str, float]:
    """Weights of EASE and their fading, by validation items; what it is called and its value there."""
    best = (None, 0.0, "", -1.0)
    for l2, recency in itertools.product(L2, RECENCY):
        weights = weights_from_gram(gram, l2=l2)
        value = on_validation(ease_scorer_of(weights, recency)(there.split.train), there)
        if value > best[3]:
            best = (weights, recency, f"EASE, l2 {l2:g}, fading {recency:g}", value)
    return best


def ease_scorer_of(weights: np.ndarray, recency: float) -> Callable[[Interactions], Scorer]:
    """From what users show to EASE's scores of it."""
    return lambda shown: dp_ease_scorer(weights, np.arange(len(weights)), shown, recency=recency)


def on_validation(scorer: Scorer, there: World) -> float:
    """ndcg@10 of validation items."""
    return evaluate(scorer, cases(there.split, "validation"), ks=(10,)).values[METRIC]


@cache
def taught(there: World, private_seed: int | None) -> Taught:
    """The teacher on real users, or (with a seed of the releases) on virtual ones at epsilon 8."""
    train, num_items = there.split.train, there.data.num_items
    if private_seed is None:
        weights, recency, name, value = best_ease(item_gram(train), there)
        values = {name: value}
        model, params = trained(STUDENTS[MEMBER], None, train, there, seed=1000)  # a seed of its own
        best = None
        for scale in SCALES:
            blend = partial(blended, ease_scorer_of(weights, recency), model, params, scale)
            value = on_validation(blend(train), there)
            if value > max(values.values()):
                best = (scale, blend)
            values[f"{name}, times {scale:g}, with {MEMBER}"] = value
        ease = partial(linear_teacher, weights, num_items=num_items, recency=recency)
        if best is None:
            return Taught(ease(scale=SCALES[0]), ease_scorer_of(weights, recency), train, values, None)
        return Taught(ensemble([ease(scale=best[0]), sequence_teacher(model, params)]), best[1], train, values, None)
    fit_key, draw_key, order_key = jax.random.split(jax.random.key(private_seed), 3)
    fitted = fit_generator(gram_method(), train, epsilon=EPSILON, delta=DELTA, key=fit_key)
    many = NUM_VIRTUAL if there.data.num_users > 500 else there.data.num_users
    virtual = virtual_users(fitted.generator, fitted.lengths, num_users=many, key=draw_key, catalogue=there.data)
    # Penalties mean the same as with real users.
    weights, recency, name, value = best_ease(item_gram(virtual) * (there.data.num_users / many), there)
    scale = SCALES[0]
    teacher = linear_teacher(weights, num_items=num_items, recency=recency, scale=scale, ledger=fitted.ledger)
    scorer_of, histories = ease_scorer_of(weights, recency), shuffled(virtual, order_key)
    return Taught(teacher, scorer_of, histories, {name: value}, fitted.ledger)


def blended(first_of, model: SequenceModel, params: Any, scale: float, shown: Interactions) -> Scorer:
    """The mean of EASE's scores times a scale and a sequence model's."""
    first, second = first_of(shown), sequence_scorer(model, params, shown)

    def scores(params, user_ids):
        return 0.5 * scale * first.fn(params[0], user_ids) + 0.5 * second.fn(params[1], user_ids)

    return Scorer(scores, (first.params, second.params))


def trained(how: Student, loss: SequenceLoss | None, histories: Interactions, there: World, *, seed: int, most=None):
    """A student without its teacher, and its parameters at the epoch that validation items like best."""
    model, served = (how.make(there.data.num_items, x) for x in (loss, None))
    params = train_sequence(
        model,
        histories,
        seed=seed,
        num_epochs=most or min(how.num_epochs, there.data.num_users),
        learning_rate=how.learning_rate,
        validate=lambda params: on_validation(sequence_scorer(served, params, there.split.train), there),
        patience=2,
        num_buckets=1,
    )
    return served, params


def shuffled(users: Interactions, key: jax.Array) -> Interactions:
    """Each user's items in random order: the generator knows none, and draws the surest item first."""
    places = np.asarray(jax.random.uniform(key, (users.num_interactions,)))
    order = np.lexsort((places, users.user_ids))
    return dataclasses.replace(users, item_ids=users.item_ids[order])


def run(student: str, mode: str, private: bool, seed: int, there: World, smoke: bool) -> dict[str, Any]:
    """One model: trained, tested, quantised, timed."""
    lesson = taught(there, seed if private else None)
    test, shown = cases(there.split, "test"), there.shown
    history = padded_histories(shown, np.array([0]), LENGTH)[0]
    ledger = lesson.ledger
    if mode == TEACHER:
        outcome = evaluate(lesson.scorer_of(shown), test, ks=(10,))
        params = lesson.teacher.params
        values = {"candidates": lesson.candidates, "validation": max(lesson.candidates.values())}
        ms = milliseconds(lesson.teacher.scores, params, history)
    else:
        loss = distilled(lesson.teacher, kl(top_k=there.data.num_items), weight=WEIGHT) if mode == DISTILLED else None
        model, params = trained(STUDENTS[student], loss, lesson.histories, there, seed=seed, most=2 if smoke else None)
        outcome = evaluate(sequence_scorer(model, params, shown), test, ks=(10,))
        validation = on_validation(sequence_scorer(model, params, there.split.train), there)
        integers = quantize_params(params)
        quantised = evaluate(sequence_scorer(model, dequantize(integers), shown), test, ks=(10,))
        values = {
            "validation": validation,
            "bytes int8": num_bytes(integers),
            f"{METRIC} int8": quantised.values[METRIC],
            "ms int8": milliseconds(lambda p, h: model.score(dequantize(p), h), integers, history),
        }
        ms = milliseconds(model.score, params, history)
    return values | {
        METRIC: outcome.values[METRIC],
        "numbers": sum(x.size for x in jax.tree.leaves(params) if x.dtype == np.float32),
        "bytes": num_bytes(params),
        "ms": ms,
        "epsilon": None if ledger is None else ledger.spent(DELTA).epsilon,
        "split": there.split.fingerprint,
    }


def milliseconds(score: Callable, params: Any, history: np.ndarray, *, repeats: int = 200) -> float:
    """Median wall time of the ten best items of one user, compiled, on this machine, in milliseconds."""

    @jax.jit
    def ten_best(params, history):
        return jax.lax.top_k(score(params, history), 10)[1]

    ten_best(params, history).block_until_ready()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        ten_best(params, history).block_until_ready()
        times.append(time.perf_counter() - start)
    return 1000 * float(np.median(times))


def wanted(smoke: bool, only: Sequence[str] | None, num_seeds: int) -> list[tuple[str, str, bool, int]]:
    """(student, mode, private, seed) of every run, cheap and telling ones first."""
    if smoke:
        return [
            (TEACHER, TEACHER, False, 0),
            ("factors, 16", PLAIN, False, 0),
            ("factors, 16", DISTILLED, False, 0),
            (TEACHER, TEACHER, True, 0),
            ("factors, 16", DISTILLED, True, 0),
        ]
    parts = (
        (False, QUICK, num_seeds),
        (True, PRIVATE, num_seeds),
        (False, [student for student in STUDENTS if student not in QUICK], min(num_seeds, 1)),
    )
    out = [(TEACHER, TEACHER, False, 0)]
    for private, students, seeds in parts:
        if private:  # the releases are drawn anew with each seed; the teacher on real users is one
            out += [(TEACHER, TEACHER, True, seed) for seed in range(seeds)]
        mine = [student for student in students if not only or student in only]
        out += [(s, m, private, seed) for seed in range(seeds) for s in mine for m in (PLAIN, DISTILLED)]
    return out


def main(argv: list[str] | None = None) -> int:
    """Measures what is missing, and writes the page."""
    parser = study_parser(NAME, __doc__, seeds=NUM_SEEDS)
    parser.add_argument("--data-dir", type=Path, help="folder with ml-100k/ (default: FEDJAX_REC_DATA)")
    parser.add_argument("--student", choices=tuple(STUDENTS), action="append", help="only this one; may be repeated")
    args = parser.parse_args(argv)
    keys = [] if args.only_page else wanted(args.smoke, args.student, args.seeds)
    names = ("student", "mode", "private", "seed")
    lines = add_missing(
        NAME,
        [dict(zip(names, key, strict=True)) for key in keys],
        lambda key: run(**key, there=world(args.data_dir, args.smoke), smoke=args.smoke),
        shown=("validation", METRIC, "numbers", "ms", "epsilon"),
        smoke=args.smoke,
    )
    return finish(NAME, write_page(lines), smoke=args.smoke)


if __name__ == "__main__":
    sys.exit(main())
