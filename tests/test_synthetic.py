"""The default world is fast, learnable, long-tailed and the same every time."""

import time

import numpy as np
import pytest

from fedjax_rec.data import Split, leave_one_out, statistics, synthetic


def ndcg_at_10(scores: np.ndarray, split: Split) -> float:
    """Full ranking, train and validation masked, ties in expectation; an oracle of its own."""
    users, items = split.test.user_ids, split.test.item_ids
    for part in (split.train, split.validation):
        scores[part.user_ids, part.item_ids] = -np.inf
    positive = scores[users, items][:, None]
    better = np.sum(scores[users] > positive, axis=1)
    tied = np.sum(scores[users] == positive, axis=1)
    discount = np.append(0, np.cumsum(1 / np.log2(np.arange(2, 12))))
    return float(np.mean((discount[np.minimum(better + tied, 10)] - discount[np.minimum(better, 10)]) / tied))


def popularity_and_ease(split: Split) -> tuple[float, float]:
    touched = np.zeros((split.num_users, split.num_items), np.float32)
    touched[split.train.user_ids, split.train.item_ids] = 1
    popularity = np.tile(touched.sum(axis=0), (split.num_users, 1))
    # Steck (2019), "Embarrassingly Shallow Autoencoders for Sparse Data", lambda 300
    inverse = np.linalg.inv(touched.T @ touched + 300 * np.eye(split.num_items, dtype=np.float32))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0)
    return ndcg_at_10(popularity, split), ndcg_at_10(touched @ weights, split)


@pytest.mark.parametrize("seed", [0, 1])
def test_taste_can_be_learnt_beyond_popularity_but_not_trivially(seed):
    popularity, ease = popularity_and_ease(leave_one_out(synthetic(seed=seed)))
    assert 1.5 < ease / popularity < 2.5
    assert 0.03 < popularity < 0.08


def test_the_default_world_has_the_shape_of_movielens_100k_in_a_second():
    start = time.process_time()  # of this process alone, so that a busy machine does not decide
    data = synthetic()
    seconds = time.process_time() - start
    facts = statistics(data)
    assert seconds < 1
    assert (facts.num_users, facts.num_items) == (943, 1682)
    assert facts.num_interactions == pytest.approx(100_000, rel=0.01)
    assert data.counts_per_user.min() >= 20
    assert facts.activity_p50 == pytest.approx(65, abs=10)
    assert 0.5 < facts.popularity_gini < 0.75
    assert facts.tied_latest_users > 20
    assert np.all(np.diff(data.timestamps)[np.diff(data.user_ids) == 0] >= 0)


def test_every_item_of_a_user_is_there_once():
    for data in (synthetic(), synthetic(num_users=40, num_items=50, min_per_user=25, num_interactions=1000)):
        pairs = data.user_ids * np.int64(data.num_items) + data.item_ids
        assert len(np.unique(pairs)) == data.num_interactions


def test_the_seed_decides_everything():
    same, again, other = synthetic(seed=3), synthetic(seed=3), synthetic(seed=4)
    assert same.fingerprint == again.fingerprint
    assert same.item_genres.tolist() == again.item_genres.tolist()
    assert same.fingerprint != other.fingerprint


def test_what_is_popular_drifts():
    data = synthetic()
    early, late = np.quantile(data.timestamps, [0.25, 0.75])
    counts = [
        np.bincount(data.item_ids[chosen], minlength=data.num_items).astype(float)
        for chosen in (data.timestamps < early, data.timestamps > late)
    ]
    rng = np.random.default_rng(0)
    halves = rng.random(data.num_interactions) < 0.5
    random = [
        np.bincount(data.item_ids[chosen], minlength=data.num_items).astype(float) for chosen in (halves, ~halves)
    ]
    assert np.corrcoef(counts)[0, 1] < 0.9 < np.corrcoef(random)[0, 1]


def test_ratings_are_stars_that_follow_taste():
    data = synthetic(ratings=True)
    assert set(np.unique(data.ratings)) == {1, 2, 3, 4, 5}
    favourite = data.item_genres[data.item_ids, data.user_attributes["favourite_genre"][data.user_ids]]
    assert data.ratings[favourite].mean() > data.ratings[~favourite].mean() + 0.2
    assert synthetic().ratings is None


@pytest.mark.parametrize("num_items", [2, 3, 10, 500])
def test_small_worlds_work(num_items):
    data = synthetic(num_users=5, num_items=num_items, min_per_user=1)
    assert (data.num_users, data.num_items) == (5, num_items)
    assert data.counts_per_user.max() <= num_items // 2


def test_users_beyond_one_block_go_on_where_the_first_ended():
    data = synthetic(num_users=100_003, num_items=200, min_per_user=1, num_interactions=200_000)
    assert data.num_users == 100_003
    assert data.counts_per_user.min() >= 1
    assert data.num_interactions == pytest.approx(200_000, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_items": 30}, "20 rows a user do not fit between min_per_user=20 and half of num_items=30"),
        ({"num_interactions": 100}, "do not fit between min_per_user=20"),
        ({"num_users": 0}, "needs a user, two items and a row a user"),
    ],
)
def test_sizes_that_do_not_fit_say_which_to_change(arguments, message):
    with pytest.raises(ValueError, match=message):
        synthetic(**arguments)
