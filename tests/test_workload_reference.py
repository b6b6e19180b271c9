"""Risk: speed is compared on work that is not the same, or against a reference round that is wrong."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import numpy_reference, workload
from benchmarks.numpy_reference import client_update, clip, fedavg_round, max_abs_difference

# Users and items with gaps in their ids, out of order, as in a real u.data file: user, item, rating, time.
TINY = """\
7\t50\t5\t881250949
2\t10\t3\t881250950
7\t10\t1\t881250951
2\t99\t4\t881250940
4\t30\t2\t881250952
2\t50\t4\t881250953
7\t99\t5\t881250954
"""


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "u.data"
    path.write_text(TINY)
    return path


def slow_clients(text, num_items, seed):
    """The examples of every client by plain Python lists, client by client in the order of their ids."""
    pairs = [tuple(int(word) for word in line.split()[:2]) for line in text.splitlines()]
    names = sorted({item for _, item in pairs})
    num_items = num_items or len(names)
    rng = np.random.default_rng(seed)
    examples = []
    for client in sorted({user for user, _ in pairs}):
        liked = [names.index(item) for user, item in pairs if user == client]
        rows = [(item, 1.0) for item in liked] + [(i, 0.0) for i in rng.integers(0, num_items, 4 * len(liked)).tolist()]
        examples.append([rows[place] for place in rng.permutation(len(rows))])
    return examples, num_items


@pytest.mark.parametrize(("num_items", "seed"), [(None, 0), (4, 3), (1000, 0), (100_000, 1)])
def test_clients_are_those_of_a_slow_definition(tiny, num_items, seed):
    examples, catalogue = slow_clients(TINY, num_items, seed)
    digest = hashlib.sha256(str(catalogue).encode())
    digest.update(np.array([0, *np.cumsum([len(rows) for rows in examples])], np.int64).tobytes())
    digest.update(np.array([item for rows in examples for item, _ in rows], np.int32).tobytes())
    digest.update(np.array([label for rows in examples for _, label in rows], np.float32).tobytes())
    work = workload.clients(tiny, num_items=num_items, seed=seed)
    assert work.fingerprint == digest.hexdigest()
    assert work.num_clients == 3
    assert work.num_examples == 35
    np.testing.assert_array_equal(work.sizes, [15, 5, 15])


def test_iteration_gives_each_client_its_own_examples(tiny):
    work = workload.clients(tiny)
    assert [(len(ids), int(labels.sum())) for ids, labels in work] == [(15, 3), (5, 1), (15, 3)]
    np.testing.assert_array_equal(np.concatenate([ids for ids, _ in work]), work.item_ids)


def test_fingerprint_sees_every_part(tiny):
    same = workload.clients(tiny, num_items=50)
    others = [workload.clients(tiny, num_items=51), workload.clients(tiny, num_items=50, seed=1)]
    assert same.fingerprint == workload.clients(tiny, num_items=50).fingerprint
    assert len({same.fingerprint, *(other.fingerprint for other in others)}) == 3


def test_a_made_up_file_reads_back_as_the_made_up_clients(tmp_path):
    workload.write_u_data(tmp_path / "u.data", num_clients=30, num_items=200, seed=5)
    read = workload.clients(tmp_path / "u.data", num_items=200, seed=5)
    assert read.fingerprint == workload.synthetic_clients(num_clients=30, num_items=200, seed=5).fingerprint


def test_made_up_clients_have_the_shape_of_movielens_100k():
    work = workload.synthetic_clients()
    positives = work.sizes // 5
    assert (work.num_clients, work.num_items) == (943, 1682)
    assert positives.min() == 20
    assert 300 < positives.max() <= 737
    assert 55 < np.median(positives) < 75
    assert 80_000 < positives.sum() < 120_000
    for ids, labels in list(work)[:50]:
        liked = ids[labels == 1]
        assert len(np.unique(liked)) == len(liked) == len(ids) // 5
    assert work.item_ids.max() < 1682


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda path: workload.clients(path, num_items=3), "num_items=3 is smaller than the 4 items"),
        (lambda path: workload.synthetic_clients(num_clients=0), "not 0 and 1682"),
        (lambda path: workload.synthetic_clients(num_items=39), "not 943 and 39"),
        (lambda path: fedavg_round(workload.initial_params(4), []), "not 0 and 0"),
        (lambda path: fedavg_round(workload.initial_params(4), workload.clients(path), weights=[1.0]), "not 3 and 1"),
        (lambda path: fedavg_round(workload.initial_params(4), workload.clients(path), l2_clip_norm=0.0), "above zero"),
    ],
)
def test_bad_values_are_named(tiny, call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(tiny)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ml-100k\.zip"):
        workload.clients(tmp_path / "u.data")
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        workload.find_u_data(tmp_path)
    (tmp_path / "u.data").write_text("1\t2\nuser\titem\n")
    with pytest.raises(ValueError, match=r"not a u\.data file"):
        workload.clients(tmp_path / "u.data")


def test_u_data_is_found_in_the_folder_or_in_ml_100k(tmp_path, tiny):
    assert workload.find_u_data(tmp_path) == tiny
    (tmp_path / "above" / "ml-100k").mkdir(parents=True)
    tiny.rename(tmp_path / "above" / "ml-100k" / "u.data")
    assert workload.find_u_data(tmp_path / "above") == tmp_path / "above" / "ml-100k" / "u.data"


def autodiff_update(params, item_ids, labels):
    """A client by `jax.grad` on whole item tables, batch by batch: the reference's gradients, derived again."""

    def loss(local, x, y):
        logits = local["items"][x] @ local["out"] + local["bias"]
        return -jnp.mean(y * jax.nn.log_sigmoid(logits) + (1 - y) * jax.nn.log_sigmoid(-logits))

    local = params
    for start in range(0, len(item_ids), 256):
        gradient = jax.grad(loss)(local, item_ids[start : start + 256], labels[start : start + 256])
        local = jax.tree.map(lambda p, g: p - 0.1 * g, local, gradient)
    return jax.tree.map(lambda new, old: np.asarray(new - old), local, params)


def one_client(num_examples, num_items, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, num_items, num_examples), rng.integers(0, 2, num_examples).astype(np.float32)


def dense(update, num_items):
    items = np.zeros((num_items, workload.DIM))
    items[update.ids] = update.rows
    return {"items": items, "out": update.out, "bias": update.bias}


@pytest.mark.parametrize("num_examples", [1, 256, 300, 512])  # one batch, two, and a last one that is shorter
def test_client_update_is_that_of_autodiff(num_examples):
    params = workload.initial_params(37)  # far fewer items than examples: duplicates in every batch
    item_ids, labels = one_client(num_examples, 37, seed=num_examples)
    expected = autodiff_update(jax.tree.map(jnp.asarray, params), item_ids, labels)
    update = client_update(params, item_ids, labels)
    assert np.abs(expected["items"]).max() > 1e-4
    assert max_abs_difference(dense(update, 37), expected) < 1e-6


def test_round_is_the_weighted_mean_of_the_clients_updates():
    params = workload.initial_params(50)
    clients = [one_client(n, 50, seed=n) for n in (40, 300, 7)]
    updates = [dense(client_update(params, *client), 50) for client in clients]
    for weights in ([1.0, 1.0, 1.0], [40.0, 300.0, 7.0]):
        shares = np.array(weights) / np.sum(weights)
        expected = {
            name: value + sum(share * update[name] for share, update in zip(shares, updates, strict=True))
            for name, value in params.items()
        }
        assert max_abs_difference(fedavg_round(params, clients, weights=weights), expected) < 1e-12
    assert max_abs_difference(fedavg_round(params, clients), fedavg_round(params, clients, weights=[2, 2, 2])) == 0


def test_a_round_leaves_the_given_parameters_alone():
    params = workload.initial_params(50)
    fedavg_round(params, [one_client(300, 50, seed=0)])
    assert max_abs_difference(params, workload.initial_params(50)) == 0


def joint_norm(params, before):
    return np.sqrt(sum(np.sum((params[name] - before[name]) ** 2) for name in before))


def test_clipping_bounds_one_clients_joint_norm_and_keeps_its_direction():
    params = workload.initial_params(50)
    client = one_client(300, 50, seed=0)
    update = client_update(params, *client)
    free = joint_norm(fedavg_round(params, [client]), params)
    clipped = fedavg_round(params, [client], l2_clip_norm=free / 3)
    assert joint_norm(clipped, params) == pytest.approx(free / 3, rel=1e-9)
    np.testing.assert_allclose(clip(update, free / 3).rows, update.rows / 3, rtol=1e-9)
    loose = fedavg_round(params, [client], l2_clip_norm=free * 1.001)
    assert max_abs_difference(loose, fedavg_round(params, [client])) == 0


def test_clipping_a_zero_update_gives_zero():
    nothing = numpy_reference.Update(np.array([3]), np.zeros((1, 4)), np.zeros(4), np.float64(0))
    assert not np.any(np.concatenate([np.ravel(leaf) for leaf in clip(nothing, 1.0)[1:]]))


def test_difference_is_the_largest_of_all_leaves_and_shows_nan():
    params = workload.initial_params(5)
    assert max_abs_difference(params | {"bias": params["bias"] - 0.5}, params) == 0.5
    assert np.isnan(max_abs_difference(params | {"out": params["out"] * np.nan}, params))


def test_movielens_100k_is_the_workload_that_peers_were_timed_on(data_dir):
    work = workload.clients(workload.find_u_data(data_dir), num_items=1682)
    assert (work.num_clients, work.num_examples) == (943, 500_000)
    assert np.ceil(work.sizes / workload.BATCH_SIZE).sum() == sum(-(-len(ids) // 256) for ids, _ in work)
    params = workload.initial_params(1682)
    after = fedavg_round(params, work, l2_clip_norm=0.01)
    assert 0 < joint_norm(after, params) <= 0.01  # a mean of updates of norm 0.01 or less
