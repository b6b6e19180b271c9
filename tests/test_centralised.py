"""Risk: the centralised reference trains on other examples, or by another loss, than the clients it stands beside."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from evaluation_worlds import make_cases, make_split
from test_known_worlds import NUM_ITEMS, NUM_USERS, checkerboard

from fedjax_rec.data.clients import client_data, client_data_from_examples
from fedjax_rec.data.negatives import Negatives
from fedjax_rec.evaluation import evaluate
from fedjax_rec.models.base import Model, Shared
from fedjax_rec.models.centralised import centralised
from fedjax_rec.models.matrix_factorization import matrix_factorization


def test_a_full_batch_is_one_step_of_gradient_descent_by_hand():
    """Each user has as many items as are left, so one negative each takes them all and nothing hangs on chance."""
    lists, num_items, lr = [[0, 1, 2], [1, 3, 5], [5, 4, 0]], 6, 0.7
    model = matrix_factorization(num_items, dim=2, l2=0.1, init_stddev=0.5)
    clients = client_data(make_split(lists, [[] for _ in lists], num_items=num_items), num_buckets=1)
    training = centralised(model, clients, optimizer=optax.sgd(lr), batch_size=9, negatives=Negatives(1))
    state = training.init(jax.random.key(0))
    items, biases, users = (
        np.float64(x) for x in (state.shared.tables["item"], state.shared.tables["bias"][:, 0], state.private["user"])
    )
    state, loss = training.run_epoch(state, jax.random.key(1))

    grads, value = [np.zeros_like(x) for x in (items, biases, users)], 0.0
    for user, liked in enumerate(lists):
        for item in range(num_items):
            score, label = items[item] @ users[user] + biases[item], float(item in liked)
            norms = items[item] @ items[item] + users[user] @ users[user]
            value += (np.log1p(np.exp(score)) - label * score + 0.05 * norms) / 18
            error = (1 / (1 + np.exp(-score)) - label) / 18
            grads[0][item] += error * users[user] + 0.1 * items[item] / 18
            grads[1][item] += error
            grads[2][user] += error * items[item] + 0.1 * users[user] / 18
    np.testing.assert_allclose(loss, value, rtol=1e-5)
    after = (state.shared.tables["item"], state.shared.tables["bias"][:, 0], state.private["user"])
    for new, old, grad in zip(after, (items, biases, users), grads, strict=True):
        np.testing.assert_allclose(new, old - lr * grad, rtol=1e-5, atol=1e-6)


def counting_model(num_items):
    """Its gradient counts: each step of size one adds the share of a batch that names an item or a user."""

    def batch_loss(view, private, examples, key):
        del key
        return -(examples.weights * (view.rows["seen"][..., 0] + private["seen"])).sum()

    return Model(
        lambda key: Shared({"seen": jnp.zeros((num_items, 1))}, {}),
        lambda key: {"seen": jnp.zeros(())},
        batch_loss,
        lambda shared, private: shared.tables["seen"][:, 0] + private["seen"],
    )


@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_epoch_sees_every_interaction_once_with_its_negatives(batch_size):
    """Users of 0 to 5 items in several buckets; 15 interactions do not fill the last batch of 4."""
    lists = [[(3 * user + i) % 11 for i in range(user)] for user in range(6)]
    clients = client_data(make_split(lists, [[] for _ in lists], num_items=11), num_buckets=3)
    training = centralised(
        counting_model(11), clients, optimizer=optax.sgd(1.0), batch_size=batch_size, negatives=Negatives(1)
    )
    state, _ = training.run_epoch(training.init(jax.random.key(0)), jax.random.key(1))
    per_user, per_item = np.asarray(state.private["seen"]), np.asarray(state.shared.tables["seen"])[:, 0]
    if batch_size == 1:
        np.testing.assert_array_equal(per_user, 2 * np.arange(6))  # a positive and a negative, for each item it has
        own = np.bincount(np.concatenate(lists).astype(int), minlength=11)
        assert np.all(per_item >= own)
        assert per_item.sum() == 2 * 15
    else:
        np.testing.assert_allclose(per_user.sum(), 2 * 4, rtol=1e-6)  # four batches, each a mean of two a row
        np.testing.assert_allclose(per_item.sum(), 2 * 4, rtol=1e-6)


@pytest.mark.parametrize(("exclusion", "drawn"), [("strict", True), ("paper", False)])
def test_the_exclusion_rule_says_whether_held_out_items_are_negatives(exclusion, drawn):
    split = make_split([[0, 1, 2]], [[3]], validation=[[4]], num_items=7)
    clients = client_data(split, exclusion=exclusion)
    training = centralised(counting_model(7), clients, optimizer=optax.sgd(1.0), negatives=Negatives(1))
    state = training.init(jax.random.key(0))
    for _ in range(8):
        state, _ = training.run_epoch(state, jax.random.key(1))
    seen = np.asarray(state.shared.tables["seen"])[:, 0]
    assert (seen[[0, 1, 2, 5, 6]] > 0).all()
    assert (seen[[3, 4]] > 0).tolist() == [drawn, drawn]


def test_a_seed_is_a_result_and_the_next_epoch_is_another_draw():
    split, _ = checkerboard()
    model = matrix_factorization(NUM_ITEMS, dim=2)
    training = centralised(model, client_data(split, num_buckets=1), batch_size=16)

    def losses(seed):
        state, out = training.init(jax.random.key(0)), []
        for _ in range(2):
            state, loss = training.run_epoch(state, jax.random.key(seed))
            out.append(float(loss))
        return out

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)


def test_the_checkerboard_is_solved_and_ranked():
    """The withheld item is of its user's colour, as the evaluation of the scorer says too."""
    split, withheld = checkerboard()
    model = matrix_factorization(NUM_ITEMS, dim=4)
    training = centralised(model, client_data(split), optimizer=optax.adam(0.05), batch_size=32, negatives=Negatives(1))
    state = training.init(jax.random.key(0))
    for _ in range(25):
        state, _ = training.run_epoch(state, jax.random.key(1))
    train = [split.train.item_ids[a:b].tolist() for a, b in itertools.pairwise(split.train.offsets)]
    asked = make_cases(train, [[item] for item in withheld], num_items=NUM_ITEMS)
    evaluation = evaluate(training.scorer(state), asked, ks=(1,))
    assert evaluation.values["hit@1"] == 1.0
    assert evaluation.num_users == NUM_USERS


def test_ratings_are_trained_as_given():
    """Ready-made examples draw no negatives; two users who rate the opposite are told apart."""
    truth = np.array([[5.0, 1.0, 5.0], [1.0, 5.0, 1.0]])
    clients = client_data_from_examples([(np.arange(3), row) for row in truth], num_items=3, num_buckets=1)
    model = matrix_factorization(3, dim=2, loss="squared", label_mean=3.0, init_stddev=0.5)
    training = centralised(model, clients, optimizer=optax.adam(0.1), batch_size=2)
    state = training.init(jax.random.key(0))
    for _ in range(100):
        state, _ = training.run_epoch(state, jax.random.key(1))
    scores = jax.vmap(model.score, in_axes=(None, 0))(state.shared, state.private)
    np.testing.assert_allclose(scores, truth, atol=0.2)


def test_an_empty_batch_is_refused():
    clients = client_data(make_split([[0]], [[]], num_items=3))
    with pytest.raises(ValueError, match="at least 1; got 0"):
        centralised(matrix_factorization(3), clients, batch_size=0)
