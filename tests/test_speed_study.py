"""Risk: the loop that the round is timed against does other work: other negatives, fewer clients, many compilations."""

import jax
import jax.numpy as jnp
import pytest

from experiments import speed
from experiments.pfedrec import build_pfedrec
from fedjax_rec.data import load
from fedjax_rec.data.clients import client_data
from fedjax_rec.evaluation.protocol import STRICT_99
from fedjax_rec.federated.cohort import full_participation
from fedjax_rec.federated.round import RoundKeys, make_rounds
from fedjax_rec.federated.transforms import chain

NUM_USERS = 10


@pytest.fixture(scope="module", params=[build_pfedrec, speed.build_fedrap], ids=["pfedrec", "fedrap"])
def both(request):
    """Rounds and loop over clients of two bucket shapes, keys, and a fresh start of each."""
    interactions = load("synthetic", num_users=NUM_USERS, num_items=60, min_per_user=5)
    clients = client_data(STRICT_99.split(interactions), num_buckets=2)
    assert len(clients.buckets) == 2
    algorithm, _ = request.param(interactions)
    rounds = make_rounds(algorithm, chain(), full_participation(NUM_USERS), clients, span_size=1)
    loop, step = speed.client_loop(algorithm, clients)
    return rounds, loop, step, RoundKeys(*(jax.random.key(seed) for seed in (1, 2, 3)))


def test_two_rounds_of_the_loop_are_two_rounds_of_the_engine(both):
    rounds, loop, step, keys = both
    assert speed.prove_equal(rounds, loop, NUM_USERS, keys) <= 1e-5
    assert speed.prove_equal(rounds, loop, NUM_USERS, keys, restart=True) <= 1e-5
    assert step._cache_size() == 2  # one program a bucket shape, however many clients and rounds


def test_other_work_is_refused(both):
    rounds, loop, _, keys = both

    def other_negatives(state, private, keys):
        return loop(state, private, keys._replace(client=jax.random.key(9)))

    def one_client_forgets(state, private, keys):
        kept = jax.tree.map(jnp.copy, private[3])
        state, private = loop(state, private, keys)
        private[3] = kept
        return state, private

    for wrong in (other_negatives, one_client_forgets):
        for restart in (False, True):
            with pytest.raises(RuntimeError, match="not equal work"):
                speed.prove_equal(rounds, wrong, NUM_USERS, keys, restart=restart)


def test_a_difference_is_not_averaged_away_and_nan_is_no_agreement(both):
    rounds, *_ = both
    state, private = rounds.init(jax.random.key(0))
    own = speed.one_by_one(private, NUM_USERS)
    assert speed.largest_difference(state, private, state, own) == 0
    own[7] = jax.tree.map(lambda x: x + 0.5, own[7])
    assert speed.largest_difference(state, private, state, own) > 0.1
    own[7] = jax.tree.map(lambda x: x * jnp.nan, own[7])
    assert speed.largest_difference(state, private, state, own) == float("inf")


def test_the_page_shows_the_newest_line_of_a_row_and_what_was_published():
    machine = {"commit": "c" * 40, "device_kind": "cpu", "platform": "Linux", "cpu_count": 2}
    line = {
        "row": "PFedRec, ML-1M",
        "round_s": 2.0,
        "loop_s": 9.0,
        "clients_per_s": 3020.0,
        "peak_memory_bytes": 2**30,
        "max_difference": 3e-7,
        "load": 1.0,
        "repeats": 5,
        "threads": "1",
        "stamp": machine,
    }
    page = speed.write_page([line | {"round_s": 99.0}, line])
    (row,) = (text for text in page.splitlines() if text.startswith("| PFedRec, ML-1M"))
    assert [cell.strip() for cell in row.split("|")[2:8]] == ["2", "3,020", "1.00", "9", "4.5x", "3e-07"]
    assert "151 s" in row
    assert "cccccccccccc" in page
