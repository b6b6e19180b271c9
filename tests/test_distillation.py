"""Risk: a student learns from another teacher than is said, or a release by distillation is not charged."""

import math

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from evaluation_worlds import interactions, make_split
from scipy import stats

from fedjax_rec.algorithms.fedkd import fedkd, fedkd_score
from fedjax_rec.data.clients import client_data
from fedjax_rec.distillation import private
from fedjax_rec.distillation.fusion import fuse
from fedjax_rec.distillation.losses import NEVER, divergence, kl
from fedjax_rec.distillation.private import PHASE, NoisyRounds, distill_private
from fedjax_rec.distillation.student import distilled
from fedjax_rec.distillation.teacher import ensemble, linear_teacher, sequence_teacher, vae_teacher
from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.transforms import chain
from fedjax_rec.models.bert4rec import bert4rec
from fedjax_rec.models.history_factors import history_factors
from fedjax_rec.models.items import id_table
from fedjax_rec.models.mult_vae import mult_vae, mult_vae_scorer
from fedjax_rec.privacy.ledger import Budget, BudgetExceeded, Ledger
from fedjax_rec.synthesis.rounds import run_rounds

NUM_ITEMS, DIM, LENGTH = 9, 4, 5
HISTORY = np.array([3, 1, 7, NUM_ITEMS, NUM_ITEMS], np.int32)
RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(NUM_ITEMS, NUM_ITEMS)).astype(np.float32)
WEIGHTS += WEIGHTS.T  # which a student of one item table can learn
DP_LEDGER = Ledger().record(dp_accounting.GaussianDpEvent(2.0), phase="training", released="noised Gram matrix")
LINEAR = linear_teacher(WEIGHTS, num_items=NUM_ITEMS, recency=2.0, scale=3.0, ledger=DP_LEDGER)
HISTORIES = interactions([RNG.permutation(NUM_ITEMS)[: 3 + u % 4].tolist() for u in range(12)], num_items=NUM_ITEMS)
AFTER, AFTER_EACH = jax.jit(LINEAR.after), jax.jit(LINEAR.after_each)
FACTORS = history_factors(id_table(NUM_ITEMS, dim=DIM, init_stddev=0.5), max_length=LENGTH, recency=3.0)
SCORE = jax.jit(FACTORS.score)


def make_student(loss):
    return history_factors(
        id_table(NUM_ITEMS, dim=NUM_ITEMS, init_stddev=0.1), max_length=LENGTH, recency=2.0, loss=loss
    )


FULL = kl(top_k=NUM_ITEMS)


# Teachers.


def test_linear_teacher_by_its_definition():
    logits = np.asarray(AFTER_EACH(HISTORY))
    for t in range(3):
        expected = sum(3.0 * np.exp(-(t - s) / 2.0) * WEIGHTS[HISTORY[s]] for s in range(t + 1))
        np.testing.assert_allclose(logits[t], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(AFTER(HISTORY), logits[2], rtol=1e-4, atol=1e-5)


def test_linear_teacher_of_a_head_never_names_other_items():
    head = np.array([1, 3, 8])
    teacher = linear_teacher(WEIGHTS[np.ix_(head, head)], num_items=NUM_ITEMS, item_ids=head)
    expected = np.full(NUM_ITEMS, NEVER)
    expected[head] = WEIGHTS[3, head] + WEIGHTS[1, head]  # 7 is not of the head
    np.testing.assert_allclose(teacher.after(HISTORY), expected, rtol=1e-4)
    with pytest.raises(ValueError, match="weights of 9 items"):
        linear_teacher(WEIGHTS[:3, :3], num_items=NUM_ITEMS)


def test_teachers_say_what_their_models_score():
    params = FACTORS.init(jax.random.key(1))
    teacher = sequence_teacher(FACTORS, params)
    logits = jax.jit(teacher.after_each)(HISTORY)
    np.testing.assert_allclose(logits[2], SCORE(params, HISTORY), rtol=1e-5, atol=1e-6)
    slow = teacher._replace(places=None)  # one prefix at a time
    np.testing.assert_allclose(jax.jit(slow.after_each)(HISTORY)[:3], logits[:3], rtol=1e-4, atol=1e-6)

    vae = mult_vae(NUM_ITEMS, width=DIM, latent=DIM, tied=True, linear=True, init_stddev=0.5)
    params = vae.init(jax.random.key(2))
    scorer = mult_vae_scorer(params, interactions([HISTORY[:3]], num_items=NUM_ITEMS))
    expected = jax.jit(scorer.fn)(scorer.params, jnp.zeros(1, jnp.int32))[0]
    np.testing.assert_allclose(jax.jit(vae_teacher(params).after)(HISTORY), expected, rtol=1e-4, atol=1e-6)


def test_an_ensemble_averages_logits():
    params = FACTORS.init(jax.random.key(1))
    other = sequence_teacher(FACTORS, params)
    both = ensemble([LINEAR, other], weights=[3.0, 1.0])
    expected = 0.75 * AFTER(HISTORY) + 0.25 * SCORE(params, HISTORY)
    np.testing.assert_allclose(jax.jit(both.after)(HISTORY), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(jax.jit(both.after_each)(HISTORY)[2], expected, rtol=1e-4, atol=1e-5)
    assert both.ledger is None
    assert both.max_length == LENGTH
    with pytest.raises(ValueError, match="as many positive weights"):
        ensemble([LINEAR, other], weights=[1.0])
    with pytest.raises(ValueError, match="one catalogue"):
        ensemble([LINEAR, linear_teacher(np.zeros((3, 3)), num_items=3)])


# Students.


def test_the_loss_is_the_mean_over_places_of_unseen_items():
    """Against a loop over places; a third of it is what came next."""
    student, plain = make_student(distilled(LINEAR, FULL, weight=2 / 3)), make_student(None)
    params, score = student.init(jax.random.key(3)), jax.jit(student.score)
    each = []
    for t in range(2):  # what comes after places 0 and 1
        unseen = np.setdiff1d(np.arange(NUM_ITEMS), HISTORY[: t + 1])
        prefix = np.where(np.arange(LENGTH) <= t, HISTORY, NUM_ITEMS)
        told, own = AFTER(prefix)[unseen], score(params, prefix)[unseen]
        each.append(divergence(told, own, jnp.zeros(len(unseen)), temperature=1.0))
    expected = 2 / 3 * np.mean(each) + 1 / 3 * jax.jit(plain.loss)(params, HISTORY, jax.random.key(0))
    loss = jax.jit(student.loss)
    np.testing.assert_allclose(loss(params, HISTORY, jax.random.key(0)), expected, rtol=1e-4)
    assert loss(params, np.full(LENGTH, NUM_ITEMS, np.int32), jax.random.key(0)) == 0


def test_relations_reach_the_item_vectors():
    teacher = sequence_teacher(FACTORS, FACTORS.init(jax.random.key(1)))
    settings = {"weight": 0.0, "relation_weight": 1.0, "num_relations": NUM_ITEMS}
    student = history_factors(id_table(NUM_ITEMS, dim=2), max_length=LENGTH, loss=distilled(teacher, FULL, **settings))
    without = history_factors(id_table(NUM_ITEMS, dim=2), max_length=LENGTH)
    params = student.init(jax.random.key(2))
    added = jax.jit(lambda p, *keys: student.loss(p, HISTORY, keys[0]) - without.loss(p, HISTORY, keys[1]))(
        params, jax.random.key(0), jax.random.key(1)
    )

    def cosines(vectors):
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return unit @ unit.T

    expected = np.mean(np.square(cosines(teacher.vectors) - cosines(np.asarray(params.tables["item"]))))
    np.testing.assert_allclose(added, expected, rtol=1e-3)
    with pytest.raises(ValueError, match="no item vectors"):
        distilled(LINEAR, FULL, relation_weight=1.0)


def traced(model, history):
    jax.eval_shape(lambda h, key: model.loss(model.init(key), h, jax.random.key(1)), history, jax.random.key(0))


def test_pairs_that_do_not_fit_are_refused():
    short = sequence_teacher(FACTORS, FACTORS.init(jax.random.key(1)))
    longer = history_factors(id_table(NUM_ITEMS, dim=2), max_length=7, loss=distilled(short, FULL))
    wide = np.full(8, NUM_ITEMS, np.int32)
    with pytest.raises(ValueError, match="looks at 5 items at most and the student trains on 7"):
        traced(longer, wide)
    other = history_factors(id_table(4, dim=2), max_length=LENGTH, loss=distilled(LINEAR, FULL))
    with pytest.raises(ValueError, match="knows 9 items and the student 4"):
        traced(other, HISTORY)
    both_ways = bert4rec(id_table(NUM_ITEMS, dim=2), max_length=LENGTH, num_blocks=1, loss=distilled(LINEAR, FULL))
    with pytest.raises(ValueError, match="asks for the next item at every place"):
        traced(both_ways, HISTORY)
    with pytest.raises(ValueError, match="weight must lie"):
        distilled(LINEAR, FULL, weight=1.5)


# With a ledger.


@pytest.fixture(scope="module")
def student_of_public_histories():
    settings = {"num_epochs": 300, "learning_rate": 0.05, "weight": 1.0}
    return distill_private(
        LINEAR, make_student, HISTORIES, FULL, private_histories=False, key=jax.random.key(4), **settings
    )


def test_public_histories_leave_the_ledger_as_it_was(student_of_public_histories):
    assert student_of_public_histories.ledger == DP_LEDGER
    assert student_of_public_histories.ledger.spent(1e-5) == DP_LEDGER.spent(1e-5)


def test_the_student_has_learned_what_its_teacher_says(student_of_public_histories):
    model, params, _ = student_of_public_histories
    untrained, score = model.init(jax.random.key(5)), jax.jit(model.score)
    agreement = []
    for chosen in (untrained, params):
        each = []
        for user in range(12):
            history = np.append(HISTORIES.items_of(user)[:3], [NUM_ITEMS] * 2).astype(np.int32)
            unseen = np.setdiff1d(np.arange(NUM_ITEMS), history)
            each.append(stats.spearmanr(AFTER(history)[unseen], score(chosen, history)[unseen]).statistic)
        agreement.append(np.mean(each))
    assert agreement[0] < 0.4
    assert agreement[1] > 0.7


NOISY = NoisyRounds(num_rounds=3, sampling_prob=0.5, l2_clip_norm=0.1, noise_multiplier=1.5)


def on_private_histories(rounds=NOISY, seed=6, **settings):
    key = jax.random.key(seed)
    return distill_private(
        LINEAR, make_student, HISTORIES, FULL, private_histories=True, key=key, rounds=rounds, **settings
    )


def test_private_histories_are_charged(monkeypatch):
    ran = {}

    def watched(algorithm, users, noise, **settings):
        ran.update(settings, noise=noise.tolist(), num_users=users.num_users)
        return run_rounds(algorithm, users, noise, **settings)

    monkeypatch.setattr(private, "run_rounds", watched)
    student = on_private_histories()
    assert ran["noise"] == [1.5] * 3
    assert (ran["l2_clip_norm"], ran["sampling_prob"], ran["num_users"]) == (0.1, 0.5, 12)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(student.params))
    assert student.ledger.entries[:1] == DP_LEDGER.entries
    (entry,) = student.ledger.entries[1:]
    assert (entry.phase, entry.count, entry.sampler) == (PHASE, 3, "poisson")
    joint = dp_accounting.ComposedDpEvent(
        [
            dp_accounting.GaussianDpEvent(2.0),
            dp_accounting.SelfComposedDpEvent(
                dp_accounting.PoissonSampledDpEvent(0.5, dp_accounting.GaussianDpEvent(1.5)), 3
            ),
        ]
    )
    expected = dp_accounting.pld.PLDAccountant().compose(joint).get_epsilon(1e-5)
    np.testing.assert_allclose(student.ledger.spent(1e-5).epsilon, expected, rtol=1e-3)
    assert DP_LEDGER.spent(1e-5).epsilon < expected
    composed = dp_accounting.ComposedDpEvent([DP_LEDGER.event, NOISY.event(12)])  # what the budget is asked about
    assert math.isclose(dp_accounting.pld.PLDAccountant().compose(composed).get_epsilon(1e-5), expected, rel_tol=1e-6)


def test_releases_without_a_charge_are_refused():
    with pytest.raises(ValueError, match="new release about their users: give noise and clip"):
        on_private_histories(rounds=None)
    settings = {"private_histories": False, "key": jax.random.key(0)}
    with pytest.raises(ValueError, match="is for private histories"):
        distill_private(LINEAR, make_student, HISTORIES, FULL, rounds=NOISY, **settings)
    with pytest.raises(ValueError, match="has no ledger"):
        distill_private(LINEAR._replace(ledger=None), make_student, HISTORIES, FULL, **settings)
    with pytest.raises(BudgetExceeded, match="nothing released"):
        on_private_histories(budget=Budget(DP_LEDGER.spent(1e-5).epsilon, 1e-5))
    with pytest.raises(ValueError, match="noise_multiplier must be positive"):
        NoisyRounds(num_rounds=3, sampling_prob=0.5, l2_clip_norm=0.1, noise_multiplier=0.0)


# FedDF.


def test_fusion_says_what_the_models_say_together():
    """Two models whose vectors are mirrored: their mean knows nothing, and their logits agree."""
    first = FACTORS.init(jax.random.key(1))
    mirror = first._replace(tables={"item": -first.tables["item"]})

    def make(loss):
        return history_factors(id_table(NUM_ITEMS, dim=DIM), max_length=LENGTH, recency=3.0, loss=loss)

    noise = first._replace(tables={"item": 0.3 * jax.random.normal(jax.random.key(2), (NUM_ITEMS, DIM))})
    fused = fuse(make, [first, mirror, noise], HISTORIES, FULL, seed=0, num_epochs=300, learning_rate=0.05)
    together = np.mean([SCORE(params, HISTORY) for params in (first, mirror, noise)], axis=0)
    unseen = np.setdiff1d(np.arange(NUM_ITEMS), HISTORY)
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 3, first, mirror, noise)
    assert stats.spearmanr(SCORE(fused, HISTORY)[unseen], together[unseen]).statistic > 0.9
    assert stats.spearmanr(SCORE(mean, HISTORY)[unseen], together[unseen]).statistic < 0.9
    with pytest.raises(ValueError, match="as many positive weights"):
        fuse(make, [first, mirror], HISTORIES, FULL, seed=0, num_epochs=1, weights=[1.0])


# FedKD.

MENTOR = history_factors(id_table(NUM_ITEMS, dim=6, init_stddev=0.3), max_length=LENGTH)
MENTEE = history_factors(id_table(NUM_ITEMS, dim=2, init_stddev=0.3), max_length=LENGTH)


def test_fedkd_takes_the_papers_step():
    """Mentor and mentee of one client after one step, against gradients of the two objectives taken apart."""
    split = make_split([HISTORY[:3].tolist()], [[]], num_items=NUM_ITEMS)
    clients = client_data(split)
    algorithm = fedkd(MENTOR, MENTEE, num_clients=1, mentor_lr=0.5, mentee_lr=0.3, server_optimizer=optax.sgd(1.0))
    rounds = make_rounds(algorithm, chain(), full_participation(1), clients, span_size=1)
    state, private = rounds.init(jax.random.key(0))
    before, kept = jax.device_get((state.shared, jax.tree.map(lambda x: x[0], private["mentor"])))
    state, private, metrics = rounds.run(state, private, RoundKeys(*(jax.random.key(i) for i in (1, 2, 3))))
    history = HISTORY[:3]

    def objective(model, params, other, other_params):
        own = model.loss(params, history, jax.random.key(0))
        others = other.loss(other_params, history, jax.random.key(0))
        prefixes = np.where(np.arange(3)[None] <= np.arange(3)[:, None], history, NUM_ITEMS)
        p = jax.nn.softmax(jax.vmap(lambda h: other.score(other_params, h))(prefixes))
        q = jax.nn.softmax(jax.vmap(lambda h: model.score(params, h))(prefixes))
        return own + jnp.sum(p * jnp.log(p / q)) / 3 / jax.lax.stop_gradient(own + others)

    small, large = jax.jit(
        lambda before, kept: (
            jax.grad(lambda params: objective(MENTEE, params, MENTOR, kept))(before),
            jax.grad(lambda params: objective(MENTOR, params, MENTEE, before))(kept),
        )
    )(before, kept)
    for after, start, gradient, rate in (
        (state.shared, before, small, 0.3),
        (jax.tree.map(lambda x: x[0], private["mentor"]), kept, large, 0.5),
    ):
        expected = jax.tree.map(lambda w, g, rate=rate: w - rate * g, start, gradient)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), after, expected)
    np.testing.assert_allclose(metrics["loss"][0], jax.jit(MENTEE.loss)(before, history, jax.random.key(0)), rtol=1e-5)
    one = jax.tree.map(lambda x: x[0], private)
    expected = jax.jit(MENTOR.score)(one["mentor"], history)
    np.testing.assert_allclose(fedkd_score(MENTOR)(state.shared, one), expected, rtol=1e-4, atol=1e-5)


def test_fedkd_refuses_models_that_do_not_fit():
    with pytest.raises(ValueError, match="models that have `places`"):
        fedkd(bert4rec(id_table(NUM_ITEMS, dim=2), num_blocks=1), MENTEE, num_clients=2)
    with pytest.raises(ValueError, match="knows 9 items and the mentee 3"):
        fedkd(MENTOR, history_factors(id_table(3, dim=2)), num_clients=2)
    with pytest.raises(ValueError, match="bytes"):
        fedkd(MENTOR, MENTEE, num_clients=10**6, max_private_bytes=1000)
