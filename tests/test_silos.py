"""Risk: an interaction that lands in two silos or in none, or a user whose vector another user trains."""

import jax
import numpy as np
import pytest
from evaluation_worlds import make_split

from fedjax_rec.data.silos import equal_groups, private_of_users, silo_data


def uneven_split(num_users=48, num_items=20):
    """User u has 2 to 10 train items, and every eighth user has none."""
    rng = np.random.default_rng(0)
    items = [rng.permutation(num_items)[: user % 8 and user % 8 + 3].tolist() for user in range(num_users)]
    return make_split(items, [[] for _ in items], num_items=num_items)


def test_silos_hold_every_interaction_once():
    split = uneven_split()
    silos = silo_data(split, np.arange(48) % 5 % 3, num_buckets=2)
    rows = []
    for bucket in silos.clients.buckets:
        for index in range(len(bucket.client_id)):
            silo = jax.tree.map(lambda x, i=index: x[i], bucket)
            users = np.flatnonzero(silos.silo_ids == silo.client_id)
            by_slot = dict(zip(silos.user_slots[users], users, strict=True))
            assert len(by_slot) == len(users) <= silos.users_per_silo
            assert silo.public_size == silo.length == (silo.item_ids < 20).sum() == silo.labels.sum()
            assert silos.public_sizes[silo.client_id] == silo.length
            n = silo.length
            rows += [(by_slot[s], item) for s, item in zip(silo.user_slots[:n], silo.item_ids[:n], strict=True)]
    assert sorted(rows) == sorted(zip(split.train.user_ids, split.train.item_ids, strict=True))
    assert np.concatenate([bucket.weight for bucket in silos.clients.buckets]).mean() == pytest.approx(1)
    assert silos.clients.num_interactions == split.train.num_interactions
    assert set(np.bincount(equal_groups(48, num_silos=5, seed=1))) == {9, 10}


def test_groups_that_do_not_fit_are_refused():
    split = uneven_split()
    with pytest.raises(ValueError, match="one label for each of the 48 users"):
        silo_data(split, np.zeros(3))
    with pytest.raises(ValueError, match="2 positive numbers"):
        silo_data(split, np.arange(48) % 2, public_sizes=np.array([5, 0]))
    with pytest.raises(ValueError, match="between 1 and the 48 users; got 49"):
        equal_groups(48, num_silos=49)
    with pytest.raises(ValueError, match="nothing to train on"):
        silo_data(make_split([[], []], [[0], [1]], num_items=4), np.zeros(2))


def test_every_user_finds_its_own_row_of_the_private_tables():
    silos = silo_data(uneven_split(), np.array(["b", "a", "c"])[np.arange(48) % 3])
    assert silos.labels.tolist() == ["a", "b", "c"]
    marks = np.zeros((3, silos.users_per_silo))
    marks[silos.silo_ids, silos.user_slots] = np.arange(48)
    np.testing.assert_array_equal(private_of_users({"user": marks}, silos)["user"], np.arange(48))
