"""Risk: an attack that does not attack, or exposure counted wrong, makes every defence look good."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from evaluation_worlds import interactions

from experiments import poisoning as study
from fedjax_rec.algorithms.fedavg import fedavg
from fedjax_rec.attacks.fake_users import fake_profiles, with_fake_users
from fedjax_rec.attacks.poisoned_uploads import (
    a_hum,
    adaptive,
    align_to_popular,
    explicit_boosting,
    exposure_gradient,
    fedrecattack,
    folded_in_users,
    public_interactions,
)
from fedjax_rec.attacks.poisoning import Attack, Upload, laid_out, only_where, poisoned, rows_that_fit
from fedjax_rec.attacks.poisoning_targets import choose_targets, damage, exposure, target_cases
from fedjax_rec.data.clients import client_data
from fedjax_rec.data.negatives import Negatives
from fedjax_rec.data.split import Split
from fedjax_rec.evaluation import client_scorer, factor_scorer
from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.rows import Rows
from fedjax_rec.federated.transforms import UpdateTransform
from fedjax_rec.models.base import Shared
from fedjax_rec.models.matrix_factorization import matrix_factorization
from fedjax_rec.security.robust import clip_by_row_norm

NUM_USERS, NUM_FAKE, NUM_ITEMS, LENGTH, DIM = 24, 3, 30, 6, 4
TARGETS = np.array([NUM_ITEMS - 1])
ROW_NORM = 0.5


def split_of(rows) -> Split:
    train = interactions(rows, num_items=NUM_ITEMS)
    nothing = train.take(np.zeros(train.num_interactions, bool))
    return Split(train, nothing, nothing, nothing, rule="everything in train", candidates=None)


@pytest.fixture(scope="module")
def honest() -> Split:
    """Nobody has the target; the first half of the catalogue is popular."""
    rng = np.random.default_rng(0)
    return split_of([rng.choice(15, LENGTH, replace=False).tolist() for _ in range(NUM_USERS)])


@pytest.fixture(scope="module")
def population(honest):
    counts = honest.train.item_counts
    settings = {"target_ids": TARGETS, "item_counts": counts, "num_fake": NUM_FAKE, "num_fillers": LENGTH - 1}
    return with_fake_users(honest, fake_profiles("random", **settings, seed=0))


@pytest.fixture(scope="module")
def algorithm():
    model = matrix_factorization(NUM_ITEMS, dim=DIM, loss="bpr")
    server = optax.sgd(float(NUM_USERS + NUM_FAKE))
    return fedavg(model, client_optimizer=optax.sgd(0.5), server_optimizer=server, negatives=Negatives(1))


@pytest.fixture(scope="module")
def shared():
    keys = jax.random.split(jax.random.key(0))
    tables = {"item": jax.random.normal(keys[0], (NUM_ITEMS, DIM)), "bias": jax.random.normal(keys[1], (NUM_ITEMS, 1))}
    return Shared(tables, {})


# The attacker's clients in the round.


def test_honest_clients_upload_what_they_always_did(population, algorithm, shared):
    split, malicious = population
    (bucket,) = client_data(split, num_buckets=1).buckets
    attack = a_hum(TARGETS, l2_row_norm=ROW_NORM, num_users=3)
    methods = algorithm, poisoned(algorithm, attack, malicious)

    def updates(client):
        key = jax.random.fold_in(jax.random.key(1), client.client_id)
        return [x.client_update(shared, {"user": jnp.ones(DIM)}, client, 1, jax.random.clone(key)) for x in methods]

    before, after = jax.jit(jax.vmap(updates))(bucket)
    bad = np.isin(bucket.client_id, np.flatnonzero(malicious))
    assert bad.sum() == NUM_FAKE
    same = jax.tree.map(lambda a, b: np.array_equal(np.asarray(a)[~bad], np.asarray(b)[~bad]), before, after)
    assert all(jax.tree.leaves(same)), same
    assert np.array_equal(before.private["user"], after.private["user"])
    ids = np.asarray(after.update.tables["item"].ids)[bad]
    assert (ids[:, 0] == TARGETS[0]).all()
    assert (ids[:, 1:] == NUM_ITEMS).all()  # A-hum touches nothing but its target
    assert np.all(np.asarray(after.update.tables["bias"].values)[bad, 0] > 0)


def test_without_malicious_clients_it_is_the_method_itself(algorithm):
    attack = a_hum(TARGETS, l2_row_norm=ROW_NORM)
    assert poisoned(algorithm, attack, np.zeros(5, bool)) is algorithm
    assert poisoned(algorithm, Attack("random"), np.ones(5, bool)) is algorithm  # it only invents data
    with pytest.raises(ValueError, match="must be bool"):
        poisoned(algorithm, attack, np.array([1, 0]))


def test_a_chunk_of_honest_clients_computes_nothing():
    calls = []

    def compute(x):
        jax.debug.callback(calls.append, x.sum())
        return 2.0 * x

    run = jax.jit(jax.vmap(lambda wanted, x: only_where(wanted, compute, x)))
    x = jnp.arange(6.0).reshape(3, 2)
    assert np.array_equal(run(jnp.zeros(3, bool), x), np.zeros((3, 2)))
    jax.effects_barrier()
    assert not calls
    assert np.array_equal(run(jnp.array([False, True, False]), x)[1], 2 * x[1])
    jax.effects_barrier()
    assert calls


def test_uploads_take_the_shape_of_the_method():
    upload = Upload(jnp.array([4, 1, 2]), {"item": jnp.arange(6.0).reshape(3, 2) + 1})

    def like(num, whole=False):
        rows = Rows(jnp.arange(num), jnp.ones((num, 2)), 5, whole=whole)
        return Shared({"item": rows, "bias": Rows(rows.ids, jnp.ones((num, 1)), 5, whole=whole)}, {"out": jnp.ones(3)})

    short, long, whole = (laid_out(upload, like(*size)) for size in ((2,), (4,), (5, True)))
    assert short.tables["item"].ids.tolist() == [4, 1]  # the most important rows stay
    assert long.tables["item"].ids.tolist() == [4, 1, 2, 5]
    assert long.tables["item"].values[3].tolist() == [0, 0]
    assert whole.tables["item"].values[4].tolist() == [1, 2]
    assert whole.tables["item"].values[0].tolist() == [0, 0]
    assert not np.any(long.tables["bias"].values)
    assert not np.any(long.dense["out"])
    assert rows_that_fit(6, 1, 30) == 12
    with pytest.raises(ValueError, match="whose update is a Shared"):
        laid_out(upload, {"item": jnp.ones(3)})


def test_attack_and_clip_through_the_real_round(honest, population, algorithm):
    """Undefended the target reaches everybody; a row clip at an honest row's size keeps it out."""
    split, malicious = population
    clients, asked = client_data(split, num_buckets=1), target_cases(honest, TARGETS)
    attacked = poisoned(algorithm, a_hum(TARGETS, l2_row_norm=ROW_NORM, num_users=3), malicious)
    model = matrix_factorization(NUM_ITEMS, dim=DIM, loss="bpr")
    found = {}

    def come(key):
        """Whether attackers come, a coin of the run: one compiled program with them and without."""
        return jax.random.bernoulli(jax.random.fold_in(key, 0))

    def draw(key, round_index):
        return jnp.asarray(~malicious) | come(key)

    coins = [bool(come(jax.random.key(seed))) for seed in range(20)]
    stay_away, take_part = (jax.random.key(coins.index(face)) for face in (False, True))

    sampler = full_participation(clients.num_clients)._replace(draw=draw)
    rounds = make_rounds(attacked, switched(clip_by_row_norm(0.01)), sampler, clients, span_size=60, chunk_size=9)
    for name, clip, cohort_key in (
        ("clean", False, stay_away),
        ("attacked", False, take_part),
        ("clipped", True, take_part),
    ):
        init_key, client_key, noise_key = jax.random.split(jax.random.key(2), 3)
        state, private = rounds.init(init_key)
        state = state._replace(transforms=jnp.asarray(clip))
        state, private, _ = rounds.run(state, private, RoundKeys(cohort_key, client_key, noise_key), 60)
        own = jax.tree.map(lambda x: x[:NUM_USERS], private)
        found[name] = exposure(client_scorer(model.score, shared=state.shared, private=own), asked, ks=(5,))["er@5"]
    assert found["clean"] == 0.0
    assert found["attacked"] == 1.0
    assert found["clipped"] < 0.1


def switched(link):
    """The link where the server's state says so: one compiled program with the defence and without."""

    def client(update, on, key):
        changed, metrics = link.client(update, (), key)
        return jax.tree.map(lambda new, old: jnp.where(on, new, old), changed, update), metrics

    return UpdateTransform(init=lambda params: jnp.asarray(False), client=client)


# What the attacks upload.


def attacks(public):
    return [
        align_to_popular(TARGETS, popular_ids=np.arange(3), l2_row_norm=ROW_NORM),
        explicit_boosting(TARGETS, l2_row_norm=ROW_NORM),
        a_hum(TARGETS, l2_row_norm=ROW_NORM, num_users=3),
        fedrecattack(TARGETS, public=public, l2_row_norm=ROW_NORM, num_rows=7, list_size=4),
        adaptive(TARGETS, public=public, l2_row_norm=ROW_NORM, num_rows=7, list_size=4),
    ]


def test_uploads_stay_within_what_they_state(honest, shared):
    public = public_interactions(honest.train, share=0.3, seed=0)
    run = jax.jit(lambda shared, user, key: [attack.upload(shared, {"user": user}, key) for attack in attacks(public)])
    for scale in (1.0, 1e3):
        received = jax.tree.map(lambda x, scale=scale: scale * x, shared)
        uploads = run(received, jnp.ones(DIM), jax.random.key(0))
        for attack, upload in zip(attacks(public), uploads, strict=True):
            ids = np.asarray(upload.ids)
            assert ids[0] == TARGETS[0], attack.name
            assert len(ids) == len(set(ids.tolist())) == attack.num_rows
            for values in upload.values.values():
                norms = np.linalg.norm(np.asarray(values), axis=1)
                assert norms.max() <= attack.l2_row_norm * (1 + 1e-6), attack.name
                if attack.name == "adaptive":  # every row it moves is as long as the clip allows
                    assert np.all((norms == 0) | (norms > 0.999 * ROW_NORM))
            if scale == 1.0 and attack.name != "popular":
                assert upload.values["bias"][0, 0] > 0, attack.name
    with pytest.raises(ValueError, match="needs a target"):
        fedrecattack(TARGETS, public=public, l2_row_norm=1.0, num_rows=0)


def test_the_exposure_gradient_is_that_of_its_loss(honest, shared):
    """Against automatic differentiation of the loss as the paper writes it."""
    public = public_interactions(honest.train, share=0.3, seed=0)
    users, targets = folded_in_users(shared, public), np.array([29, 20])

    known = np.array([np.isin(np.arange(NUM_ITEMS), [*row, *targets]) for row in public])

    def loss(tables):
        scores = users @ tables["item"].T + tables["bias"].T
        last = jnp.sort(jnp.where(known, -jnp.inf, scores), axis=1)[:, -3:-2]
        gap = last - scores[:, targets]
        return jnp.mean(jnp.where(gap >= 0, gap, jnp.exp(jnp.minimum(gap, 0.0)) - 1))

    def both(tables):
        found = exposure_gradient(shared._replace(tables=tables), users, public, jnp.asarray(targets), list_size=3)
        return jax.value_and_grad(loss)(tables), found

    (wanted_value, wanted), (gradient, value) = jax.jit(both)(shared.tables)
    assert value == pytest.approx(float(wanted_value), rel=1e-4)
    for name in gradient:
        np.testing.assert_allclose(gradient[name], -wanted[name], rtol=1e-3, atol=1e-5)


# Targets, fake users, metrics.


def test_exposure_by_hand():
    rng = np.random.default_rng(1)
    rows = [rng.choice(NUM_ITEMS, 5, replace=False).tolist() for _ in range(40)]
    split, targets = split_of(rows), np.array([3, 11, 20])
    users, items = rng.normal(size=(40, 3)).astype(np.float32), rng.normal(size=(NUM_ITEMS, 3)).astype(np.float32)
    asked = target_cases(split, targets)
    found = exposure(factor_scorer(jnp.asarray(users), jnp.asarray(items)), asked, ks=(4,))
    ratios, gains = [], []
    for user, row in enumerate(rows):
        unmet = np.setdiff1d(targets, row)
        if not len(unmet):
            continue
        scores = users[user] @ items.T
        scores[row] = -np.inf
        hits = np.isin(np.argsort(-scores)[:4], unmet)
        ratios.append(hits.sum() / len(unmet))
        discounts = 1 / np.log2(np.arange(2, 6))
        gains.append((hits * discounts).sum() / discounts[: len(unmet)].sum())
    assert found["er@4"] == pytest.approx(np.mean(ratios), abs=1e-6)
    assert found["target_ndcg@4"] == pytest.approx(np.mean(gains), abs=1e-6)
    assert 0 < found["er@4"] < 1
    assert damage(0.1, 0.08) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="Every user has met every target"):
        target_cases(split_of([[1, 2], [1, 3]]), np.array([1]))


def test_targets_are_cold():
    counts = np.array([0, 1, 9, 5, 6, 3])
    assert set(choose_targets(counts, num_targets=3, seed=0).tolist()) == {1, 3, 5}
    with pytest.raises(ValueError, match="3 items have 1 to 5 interactions"):
        choose_targets(counts, num_targets=4, seed=0)


def test_fake_users_stand_behind_the_honest_ones(honest, population):
    split, malicious = population
    assert malicious.tolist() == [False] * NUM_USERS + [True] * NUM_FAKE
    num = honest.train.num_interactions
    assert np.array_equal(split.train.item_ids[:num], honest.train.item_ids)
    assert split.test.num_interactions == 0
    for user in range(NUM_USERS, NUM_USERS + NUM_FAKE):
        assert split.train.items_of(user)[0] == TARGETS[0]
        assert len(set(split.train.items_of(user).tolist())) == LENGTH
    counts = np.arange(40)[::-1]
    settings = {"target_ids": np.array([39]), "item_counts": counts, "num_fake": 5, "seed": 0}
    profiles = fake_profiles("bandwagon", **settings, num_fillers=6)
    assert np.all((profiles[:, 1:] < 4).sum(1) >= 3)  # the four most popular ones
    with pytest.raises(ValueError, match="fillers do not fit"):
        fake_profiles("random", **settings, num_fillers=40)


# The page.


def made_up(cell, **values):
    dataset, attack, defence = cell
    line = {"dataset": dataset, "attack": attack, "defence": defence, "seed": 0, "settings": {}, "seconds": 1.0}
    values = {name: 0.1 for name in study.METRICS} | values
    return line | {"num_fake": 2, "values": values, "stamp": {"commit": "c0ffee", "device_kind": "cpu"}}


def test_the_page_judges_each_claim():
    lines = [made_up(cell) for cell in study.cells()]
    for line in lines:
        strong = line["attack"] in study.STRONG and line["defence"] == "none"
        line["values"]["er@10"] = 0.8 if strong or line["dataset"] == study.ML_100K_TENTH else 0.01
        line["values"]["er@20"] = 0.95
    page = study.write_page(study.newest(lines))
    assert "Status: 8 of 9 claims hold." in page
    assert "- does not hold: A dense median learns next to nothing" in page
    lines.append(made_up((study.ML_100K, "A-hum", "row clip .001"), **{"er@10": 0.2}))  # a cell's newest line counts
    page = study.write_page(study.newest(json.loads(json.dumps(lines))))
    assert "Status: 7 of 9" in page
    assert "0.200 by A-hum" in page
    assert "not judged" in study.write_page(study.newest(lines[:1]))
