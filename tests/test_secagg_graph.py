"""Risk: two clients disagree whether they are neighbours, or a graph is too sparse for what it promises."""

import numpy as np
import pytest

from fedjax_rec.security.graph import (
    COMPLETE_UP_TO,
    _log2_disconnected,
    graph_parameters,
    neighbor_offsets,
    neighbors,
    public_permutation,
)


@pytest.mark.parametrize(("num_clients", "degree"), [(2, 1), (3, 2), (4, 2), (4, 3), (9, 4), (10, 9), (50, 14)])
def test_the_relation_is_symmetric_and_regular(num_clients, degree):
    order = public_permutation(num_clients, b"seed")
    found = neighbors(num_clients, degree=degree, permutation=order)
    assert found.shape == (num_clients, degree)
    assert found.dtype == np.int32
    adjacent = np.zeros((num_clients, num_clients), bool)
    adjacent[np.arange(num_clients)[:, None], found] = True
    assert (adjacent == adjacent.T).all()
    assert not adjacent.diagonal().any()
    assert (adjacent.sum(axis=1) == degree).all()  # so no neighbour is named twice
    # The same from offsets, as a program that is traced computes it.
    place = np.argsort(order)
    assert (order[(place[:, None] + neighbor_offsets(num_clients, degree)) % num_clients] == found).all()


def test_the_order_is_a_public_function_of_the_seed():
    assert public_permutation(8, b"a").tolist() == [6, 4, 1, 7, 0, 2, 3, 5]  # the same on every machine, for ever
    orders = {tuple(public_permutation(20, bytes([seed])).tolist()) for seed in range(50)}
    assert len(orders) == 50
    assert all(sorted(order) == list(range(20)) for order in orders)


def test_small_cohorts_take_the_complete_graph_and_a_majority():
    for num_clients in range(2, COMPLETE_UP_TO + 1):
        degree, threshold = graph_parameters(num_clients)
        assert degree == num_clients - 1
        assert num_clients < 2 * threshold <= num_clients + 2
        assert num_clients - int(0.3 * num_clients) >= threshold  # 30 % may drop out


def test_the_degree_grows_with_the_logarithm():
    degrees = {n: graph_parameters(n).degree for n in (100, 1000, 10_000)}
    assert degrees == {100: 34, 1000: 88, 10_000: 108}
    assert graph_parameters(1000, majority=True).degree > degrees[1000]
    degree, threshold = graph_parameters(1000, majority=True)
    assert 2 * threshold > degree + 1
    assert graph_parameters(1000, corrupt_fraction=0.01, dropout_fraction=0.05).degree < 40


def test_each_bad_event_is_as_rare_as_the_bound_says():
    """Draws who colludes and who drops; at three bits the bad events are frequent enough to be counted."""
    rng, n, corrupt, dropped, draws = np.random.default_rng(0), 60, 12, 12, 4000
    degree, threshold = graph_parameters(
        n, corrupt_fraction=corrupt / n, dropout_fraction=dropped / n, security_bits=3, correctness_bits=3
    )
    assert degree < 20
    graph = neighbors(n, degree=degree, permutation=np.arange(n))
    roles = rng.permuted(
        np.repeat([[0, 1, 2]], draws, axis=0).repeat([corrupt, dropped, n - corrupt - dropped], 1), axis=1
    )
    colluding, silent = (roles == 0)[:, graph].sum(-1), (roles == 1)[:, graph].sum(-1)
    exposed = (colluding >= threshold).any(axis=1).mean()
    stuck = ((degree - silent < threshold) & (roles != 1)).any(axis=1).mean()
    error = 4 * np.sqrt(2**-3 / draws)
    assert exposed <= 2**-4 + error
    assert stuck <= 2**-3 + error

    bound = 2 ** _log2_disconnected(n, corrupt + dropped, 8)
    apart = np.mean([_falls_apart(honest, 8) for honest in roles == 2])
    assert 0.2 * bound < apart <= bound  # the union bound holds, and is not far off
    assert 2 ** _log2_disconnected(n, corrupt + dropped, degree) <= 2**-4


def _falls_apart(stay: np.ndarray, degree: int) -> bool:
    """Whether the graph of those who stay has more than one part, found by walking it."""
    graph = neighbors(stay.size, degree=degree, permutation=np.arange(stay.size))
    reached = np.zeros(stay.size, bool)
    reached[np.flatnonzero(stay)[0]] = True
    while True:
        wider = reached | (stay & reached[graph].any(axis=1))
        if (wider == reached).all():
            return bool((stay & ~reached).any())
        reached = wider


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda: graph_parameters(1), "at least 2 clients; got 1"),
        (lambda: graph_parameters(10, corrupt_fraction=-0.1), "must not be negative"),
        (lambda: graph_parameters(10, corrupt_fraction=0.6, dropout_fraction=0.5), "below 1 together"),
        (lambda: graph_parameters(10, corrupt_fraction=0.6, dropout_fraction=0.3), "Allow fewer of either"),
        (lambda: graph_parameters(10, corrupt_fraction=0.0, dropout_fraction=0.6, majority=True), "No threshold"),
        (lambda: neighbor_offsets(10, 3), "even number below 10"),
        (lambda: neighbor_offsets(10, 10), "even number below 10"),
        (lambda: neighbors(4, degree=2, permutation=np.array([0, 1, 1, 3])), "each of 0 ... 3 once"),
    ],
)
def test_refusals(ask, says):
    with pytest.raises(ValueError, match=says):
        ask()
