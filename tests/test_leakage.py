"""Risk: an upload tells the server more than a page says, or an attack without power is taken for protection."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_rec.federated.round
from fedjax_rec.algorithms.fedavg import fedavg, fedsgd
from fedjax_rec.attacks.interactions import infer_interactions
from fedjax_rec.attacks.item_sets import (
    evidence,
    f1_scores,
    fit_scorer,
    item_scores,
    named_items,
    popularity_prior,
    positive_items,
    top_items,
)
from fedjax_rec.attacks.rating_inversion import CLIP_SCALES, invert_ratings, share_right
from fedjax_rec.attacks.shadow_models import only_train
from fedjax_rec.attacks.uploads import COMPILE_FAST, Uploads, joined_rows, observed_uploads, secure_sums
from fedjax_rec.data import load
from fedjax_rec.data.clients import client_data
from fedjax_rec.data.negatives import Negatives
from fedjax_rec.federated.algorithm import all_private
from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.rows import Rows
from fedjax_rec.federated.transforms import UNBOUNDED, Summation, UpdateTransform, chain, plain_wire
from fedjax_rec.models.base import Shared
from fedjax_rec.models.matrix_factorization import matrix_factorization
from fedjax_rec.privacy.local_noise import local_gaussian
from fedjax_rec.privacy.mechanisms import clip_by_global_norm, gaussian_noise
from fedjax_rec.security.padding import pad_rows

TRAIN = load("synthetic", num_users=48, num_items=60, min_per_user=8, ratings=True)
TRUTH = np.zeros((TRAIN.num_users, TRAIN.num_items), bool)
TRUTH[TRAIN.user_ids, TRAIN.item_ids] = True
STARS = np.full(TRUTH.shape, np.nan, np.float32)
STARS[TRAIN.user_ids, TRAIN.item_ids] = TRAIN.ratings
COUNTS = TRUTH.sum(1)
L2, MEAN, DIM, CLIP, NUM_FAKE = 0.05, 3.4, 4, 0.02, 5
KEY, PLAIN = jax.random.key(7), chain()
SHARES = pytest.approx((1.0, 0.0))


def rated():
    model = matrix_factorization(TRAIN.num_items, dim=DIM, loss="squared", l2=L2, label_mean=MEAN, init_stddev=0.5)
    algorithm = fedsgd(model, server_optimizer=optax.sgd(1.0))
    clients = client_data(only_train(TRAIN), use_ratings=True, num_buckets=1)
    return algorithm, clients


def start(algorithm):
    server_key, private_key = jax.random.split(jax.random.key(0))
    return jax.jit(lambda: (algorithm.init(server_key), all_private(algorithm, private_key, TRAIN.num_users)))()


@pytest.fixture(scope="module")
def explicit():
    """The method, its state, and uploads as `uploads(transforms)`."""
    algorithm, clients = rated()
    state, private = start(algorithm)

    def uploads(transforms, *, key=KEY, client_ids=None):
        ready = state._replace(transforms=transforms.init(state.shared))
        return observed_uploads(algorithm, transforms, clients, ready, private, key, client_ids)

    return state.shared, private, uploads, uploads(PLAIN)


def test_uploads_are_those_of_the_round(explicit, monkeypatch):
    """Their mean is the step that the server takes, clip included."""
    monkeypatch.setattr(fedjax_rec.federated.round, "_compiler_options", lambda: COMPILE_FAST)
    algorithm, clients = rated()
    clipped = chain(clip_by_global_norm(CLIP))
    rounds = make_rounds(algorithm, clipped, full_participation(TRAIN.num_users), clients, span_size=1)
    state, private = jax.jit(rounds.init)(jax.random.key(0))
    before, keys = jax.device_get(state.shared.tables), RoundKeys(*jax.random.split(jax.random.key(1), 3))
    seen = explicit[2](clipped, key=jax.random.fold_in(keys.client, 0))
    state, _, _ = rounds.run(state, private, keys)
    for name, table in jax.device_get(state.shared.tables).items():
        np.testing.assert_allclose(table - before[name], seen.tables[name].mean(0), atol=1e-6)
    norms = np.sqrt(np.square(joined_rows(seen)).sum((1, 2)))
    assert norms == pytest.approx(CLIP, rel=1e-4)  # every client of this world is clipped


def test_uploads_come_in_the_order_asked_for(explicit):
    some = np.arange(TRAIN.num_users)[::-1]
    seen = explicit[2](PLAIN, client_ids=some)
    np.testing.assert_array_equal(seen.tables["item"], explicit[3].tables["item"][some])


def test_a_secure_sum_shows_no_single_upload(explicit):
    hidden = UpdateTransform(summation=Summation(zero=lambda update: update, add=lambda total, *_: total))
    with pytest.raises(ValueError, match="secure sum"):
        explicit[2](chain(hidden))


def test_plain_uploads_give_items_and_ratings_away(explicit):
    shared, private, _, plain = explicit
    assert f1_scores(named_items(plain), TRUTH).mean == 1.0
    found = invert_ratings(plain, shared, lengths=COUNTS, l2=L2, label_mean=MEAN)
    np.testing.assert_array_equal(found.ratings, STARS)
    np.testing.assert_allclose(found.users, private["user"], atol=1e-3)
    assert found.misfit.max() < 1e-2


def test_a_clip_hides_one_scale_and_no_rating(explicit):
    shared, _, _, plain = explicit
    shrunk = Uploads({name: table / 300 for name, table in plain.tables.items()}, plain.sent)
    settings = {"lengths": COUNTS, "label_mean": MEAN, "scales": CLIP_SCALES}
    found = invert_ratings(shrunk, shared, l2=L2, **settings)
    assert share_right(found.ratings, STARS) == SHARES
    penalty = np.where(plain.sent[:, :, None], np.asarray(shared.tables["item"]), 0) * (L2 / COUNTS)[:, None, None]
    no_penalty = Uploads(
        {"bias": plain.tables["bias"] / 300, "item": (plain.tables["item"] + penalty) / 300}, plain.sent
    )
    assert share_right(invert_ratings(no_penalty, shared, **settings).ratings, STARS)[0] > 0.99


def test_without_biases_the_lattice_of_ratings_gives_the_scale(explicit):
    shared, private, _, plain = explicit
    vectors = Uploads({"item": plain.tables["item"]}, plain.sent)
    found = invert_ratings(vectors, shared, lengths=COUNTS, l2=L2, label_mean=MEAN)
    assert share_right(found.ratings, STARS)[0] > 0.95
    gap = np.linalg.norm(found.users - private["user"], axis=1) / np.linalg.norm(private["user"], axis=1)
    assert np.median(gap) < 0.02
    with pytest.raises(ValueError, match="needs the biases"):
        invert_ratings(vectors, shared, lengths=COUNTS, l2=L2, scales=CLIP_SCALES)


def test_padding_hides_which_rows_are_real_and_nothing_else(explicit):
    shared, _, uploads, plain = explicit
    padding = chain(pad_rows(NUM_FAKE, key=jax.random.key(3)))
    padded, again = uploads(padding), uploads(padding, key=jax.random.key(8))
    assert (padded.sent.sum(1) == COUNTS + NUM_FAKE).all()
    expected = 2 * COUNTS / (2 * COUNTS + NUM_FAKE)
    np.testing.assert_allclose(f1_scores(named_items(padded), TRUTH).f1, expected)
    np.testing.assert_array_equal(padded.sent, again.sent)  # or two rounds' intersection would drop the fakes
    rows = joined_rows(padded)
    np.testing.assert_array_equal(rows[TRUTH], joined_rows(plain)[TRUTH])
    for client in range(5):
        own, fakes = rows[client][TRUTH[client]], rows[client][padded.sent[client] & ~TRUTH[client]]
        assert all(np.any(np.all(np.abs(own) == np.abs(fake), axis=1)) for fake in fakes)
    signs = np.sign(rows[padded.sent & ~TRUTH][:, 0] * joined_rows(again)[padded.sent & ~TRUTH][:, 0])
    assert abs(signs.mean()) < 4 / len(signs) ** 0.5
    found = invert_ratings(padded, shared, lengths=COUNTS, rows=TRUTH, l2=L2, label_mean=MEAN)
    assert share_right(found.ratings, STARS) == SHARES


def test_padding_claims_no_bound_and_counts_its_bytes():
    link = pad_rows(NUM_FAKE, key=jax.random.key(3), weights=jnp.ones(TRAIN.num_items))
    with pytest.raises(ValueError, match="clip"):
        chain(clip_by_global_norm(1.0), link, gaussian_noise(1.0))
    assert chain(link, clip_by_global_norm(1.0)).sensitivity(UNBOUNDED).l2 == 1.0
    update = Shared({"item": Rows(jnp.array([2, 60]), jnp.array([[1.0, 2.0], [0.0, 0.0]]), 60)}, {})
    padded, _ = jax.jit(link.client)(update, (), jax.random.key(0))
    assert link.upload(plain_wire(update), update) == plain_wire(padded)
    real = np.asarray(padded.tables["item"].ids)
    assert len(set(real[real < 60])) == 1 + NUM_FAKE
    with pytest.raises(ValueError, match="num_fake"):
        pad_rows(0, key=jax.random.key(3))


def test_local_noise_leaves_the_guess_by_popularity(explicit):
    """At epsilon 1 or so; with little noise the same attack finds nearly all."""
    _, _, uploads, plain = explicit
    known = np.arange(TRAIN.num_users) % 2 == 0
    prior = popularity_prior(TRUTH[known])
    guess = f1_scores(top_items(np.tile(prior, (TRAIN.num_users, 1)), COUNTS)[~known], TRUTH[~known])
    noised = uploads(chain(clip_by_global_norm(CLIP), local_gaussian(8 * CLIP)))
    assert noised.sent.all()
    rng = np.random.default_rng(0)
    little = {name: table + rng.normal(0, 1e-4, table.shape) for name, table in plain.tables.items()}
    for seen, lowest, highest in (
        (noised, 0, guess.mean + 2 * guess.error),
        (Uploads(little, noised.sent), 0.97, 1),
    ):
        seen = evidence(seen, prior)
        scores = item_scores(fit_scorer(seen[known], TRUTH[known]), seen[~known])
        assert lowest <= f1_scores(top_items(scores, COUNTS[~known]), TRUTH[~known]).mean <= highest


def test_a_sum_tells_no_more_of_one_member_than_of_another(explicit):
    plain = explicit[3]
    rng = np.random.default_rng(0)
    known, targets = np.arange(24), np.arange(24, 48)
    cohorts = [np.stack([rng.permutation(group)[:10] for _ in range(60)]) for group in (known, targets)]
    prior = popularity_prior(TRUTH[known])
    sums = [secure_sums(plain, cohort) for cohort in cohorts]
    np.testing.assert_allclose(sums[0].tables["item"][3], plain.tables["item"][cohorts[0][3]].sum(0), rtol=1e-6)
    np.testing.assert_array_equal(sums[0].sent, TRUTH[cohorts[0]].any(1))
    seen = [evidence(part, prior) for part in sums]
    scores = item_scores(fit_scorer(seen[0], TRUTH[cohorts[0][:, 0]]), seen[1])
    of_target, of_other = (
        f1_scores(top_items(scores, COUNTS[who]), TRUTH[who]) for who in (cohorts[1][:, 0], cohorts[1][:, 1])
    )
    assert of_target.mean <= of_other.mean + 2 * (of_target.f1 - of_other.f1).std() / 60**0.5
    assert of_target.mean < 0.8


@pytest.fixture(scope="module")
def implicit():
    model = matrix_factorization(TRAIN.num_items, dim=DIM, init_stddev=0.5)
    algorithm = fedavg(model, client_optimizer=optax.sgd(1.0), local_epochs=3, negatives=Negatives(2))
    clients = client_data(only_train(TRAIN), num_buckets=1)
    state, private = start(algorithm)
    few = np.argsort(COUNTS, kind="stable")[:6]
    return algorithm, state.shared, few, observed_uploads(algorithm, PLAIN, clients, state, private, KEY, few)


def test_signs_tell_positives_from_negatives(implicit):
    _, _, few, plain = implicit
    assert f1_scores(positive_items(plain), TRUTH[few]).mean == 1.0
    assert f1_scores(named_items(plain), TRUTH[few]).mean < 0.6


def test_shadow_clients_tell_positives_from_negatives(implicit):
    """Without biases, whose signs would do, and well above guessing at the known ratio, which is a third."""
    algorithm, shared, few, plain = implicit
    odds = infer_interactions(
        algorithm, shared, plain, rows=plain.sent, num_positives=COUNTS[few], key=jax.random.key(2), tables=("item",)
    )
    assert np.isneginf(odds[~plain.sent]).all()
    found = f1_scores(top_items(odds, COUNTS[few]), TRUTH[few])
    assert found.mean > 0.8
