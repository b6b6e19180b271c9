"""Risk: more than scores of a public slate goes over the wire, or the scores that come back teach nobody anything.

That it finds the known answer, with clients that share nothing else, is in the contract (`test_contract.py`).
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import DIM, DRAW, EXCHANGE, MF, NUM_ITEMS, checkerboard

import fedjax_rec as fr
from fedjax_rec.algorithms.prediction_exchange import ANSWERED, ASKED, prediction_exchange
from fedjax_rec.federated.rows import to_dense
from fedjax_rec.federated.transforms import PLAIN_SUM, UpdateTransform

WORLD = checkerboard()
SLATE = 9
METHOD = prediction_exchange(MF, **WORLD.sizes, slate_size=SLATE, server_dim=2, **EXCHANGE, **DRAW)
STATE = METHOD.init(jax.random.key(0))
CLIENT = jax.tree.map(lambda x: jnp.asarray(x)[3], WORLD.clients.buckets[0])
update_of_one = jax.jit(METHOD.client_update)
server_step = jax.jit(METHOD.server_update)


def slate(kind, round_index):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), kind), round_index)
    return np.asarray(jax.random.permutation(key, NUM_ITEMS)[:SLATE])


def received(round_index, labels):
    tables = STATE.shared.tables | {"scores": jnp.full((WORLD.num_clients, SLATE), labels)}
    return fr.Shared(tables, {"round": jnp.float32(round_index)})


def one_client(round_index, labels):
    private = METHOD.init_private(jax.random.key(1))
    return update_of_one(received(round_index, labels), private, CLIENT, jnp.int32(2), jax.random.key(2))


def test_a_client_sends_its_scores_of_the_public_slate_and_nothing_else():
    output = one_client(5, 0.5)
    scores = jax.nn.sigmoid(MF.score(output.private["shared"], output.private["own"]))
    sent = to_dense(output.update)
    np.testing.assert_allclose(sent.tables["scores"][CLIENT.client_id], scores[slate(ASKED, 5)], rtol=1e-6)
    assert jnp.count_nonzero(sent.tables["scores"]) == SLATE
    assert float(sent.tables["present"].sum()) == 1
    assert sent.dense == {"round": 0}
    assert len(set(slate(ASKED, 5))) == SLATE
    assert sorted(slate(ASKED, 5)) != sorted(slate(ASKED, 6))
    assert sorted(slate(ASKED, 5)) != sorted(slate(ANSWERED, 5))


def test_traffic_does_not_grow_with_the_models():
    """A slate of scores, a 1 and the round's place, and the ids of two rows."""
    for dim in (DIM, 500):
        model = fr.matrix_factorization(NUM_ITEMS, dim=dim)
        method = prediction_exchange(model, **WORLD.sizes, slate_size=SLATE, server_dim=dim, **DRAW)
        rounds = fr.make_rounds(method, fr.chain(), WORLD.sampler, WORLD.clients)
        assert rounds.upload_bits == rounds.download_bits == 32 * (SLATE + 2) + 32 * 2


def test_the_servers_scores_move_a_client_from_the_second_round_on():
    """Up on items that the server scores high, down where it scores low; before it has heard anybody, not at all."""
    scores = {
        (r, labels): np.asarray(MF.score(p["shared"], p["own"]))[slate(ANSWERED, r)]
        for r in (0, 1)
        for labels in (0.0, 1.0)
        for p in (one_client(r, labels).private,)
    }
    np.testing.assert_array_equal(scores[0, 0.0], scores[0, 1.0])
    assert np.all(scores[1, 1.0] > scores[1, 0.0])


def test_the_server_learns_the_scores_it_receives():
    """Two tastes: after some rounds it scores each client's own colour higher, and it moves nobody who sent nothing."""
    num_clients, state = WORLD.num_clients, STATE
    present = np.arange(num_clients) != 5
    for index in range(30):
        liked = (np.arange(num_clients)[:, None] + slate(ASKED, index)) % 2 == 0
        tables = {"scores": np.where(liked, 0.9, 0.1) * present[:, None], "present": present[:, None]}
        tables = {name: jnp.asarray(table / 12.0, jnp.float32) for name, table in tables.items()}  # the cohort's size
        state = server_step(state, fr.Shared(tables, {"round": jnp.zeros(())}))
    answers, items = np.asarray(state.shared.tables["scores"]), slate(ANSWERED, 30)
    liked = (np.arange(num_clients)[:, None] + items) % 2 == 0
    assert answers[present][liked[present]].min() > answers[present][~liked[present]].max()
    before, after = STATE.opt_state[0]["user"], state.opt_state[0]["user"]
    np.testing.assert_array_equal(before[5], after[5])
    assert np.all(np.abs(after - before)[present].max(1) > 0)


def test_the_servers_model_is_not_sent():
    shapes = {x.shape for x in jax.tree.leaves(STATE.shared)}
    assert shapes == {(WORLD.num_clients, SLATE), (WORLD.num_clients, 1), ()}
    assert {x.shape for x in jax.tree.leaves(STATE.opt_state[0])} == {(16, 2), (NUM_ITEMS, 2), (NUM_ITEMS,)}


def test_central_dp_and_secure_sums_are_refused():
    dp = fr.user_level_dp(l2_clip_norm=1.0, noise_multiplier=1.0)
    with pytest.raises(ValueError, match="single uploads"):
        fr.make_rounds(METHOD, dp, WORLD.sampler, WORLD.clients)
    with pytest.raises(ValueError, match="a secure sum shows the server none"):
        fr.make_rounds(METHOD, fr.chain(UpdateTransform(summation=PLAIN_SUM)), WORLD.sampler, WORLD.clients)


def test_clear_errors():
    for size in (0, NUM_ITEMS + 1):
        with pytest.raises(ValueError, match=f"slate_size must be between 1 and num_items=17; got {size}"):
            prediction_exchange(MF, **WORLD.sizes, slate_size=size)
    with pytest.raises(ValueError, match="at least 1; got 1, 0 and 10"):
        prediction_exchange(MF, **WORLD.sizes, slate_size=2, distill_epochs=0)
    with pytest.raises(ValueError, match="max_private_bytes=10"):
        prediction_exchange(MF, **WORLD.sizes, slate_size=2, max_private_bytes=10)
    assert prediction_exchange(MF, **WORLD.sizes, slate_size=NUM_ITEMS, server_optimizer=optax.sgd(1.0)).individual
