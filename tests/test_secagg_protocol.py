"""Risk: a secure sum that is not the sum, masks that do not hide, or a message that is read as it was not written."""

import dataclasses
import sys

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from secagg_world import ANSWERS, CONFIG, KINDS, World, plain_sum, vectors

from fedjax_rec.security.graph import neighbors, public_permutation
from fedjax_rec.security.secagg import messages, primitives
from fedjax_rec.security.secagg.client import Client, pair_seed
from fedjax_rec.security.secagg.config import SecAggConfig
from fedjax_rec.security.secagg.messages import SERVER, decode, encode
from fedjax_rec.security.secagg.session import HostSum, secure_sum
from fedjax_rec.security.secagg.stages import STAGES, ProtocolError

# ---- The sum is the sum.


@pytest.mark.parametrize("stage", ["keys", "upload", "unmask"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 1.0])  # 1.0: as many as the threshold leaves, n - t
@pytest.mark.parametrize("num_clients", [2, 3, 10])
def test_bit_exact(num_clients, share, stage):
    table, config = vectors(num_clients, 1), dataclasses.replace(CONFIG, num_words=1)
    most = num_clients - config.for_cohort(num_clients, round_index=0).threshold
    silent = range(min(round(share * num_clients), most))
    result = secure_sum(table, config=config, dropped=dict.fromkeys(silent, stage))
    assert result.survivors == tuple(c for c in range(num_clients) if stage == "unmask" or c not in silent)
    assert result.total.dtype == np.uint32
    np.testing.assert_array_equal(result.total, plain_sum(table, result.survivors))


def test_bit_exact_at_size():
    """100 clients on a sparse graph, 59,296 words, 30 % silent after they shared their keys."""
    table = vectors(100, 59_296)
    config = SecAggConfig(num_words=59_296, session="size", degree=14, threshold=4)
    silent = np.random.default_rng(0).permutation(100)[:30].tolist()
    result = secure_sum(table, config=config, dropped=dict.fromkeys(silent, "upload"))
    assert set(result.survivors) == set(range(100)) - set(silent)
    np.testing.assert_array_equal(result.total, plain_sum(table, result.survivors))
    view = result.transcript.server_view
    assert (view.num_self_seeds, view.num_mask_keys) == (70, 30)
    assert sum(view.masked_counts) == 70 * 59_296
    assert view.uniform_p_value > 1e-6
    assert result.transcript.expansion < 1.02


@pytest.mark.parametrize(("share", "graph"), [(0.0, {"degree": 14, "threshold": 4}), (0.1, {})])
def test_bit_exact_with_a_hundred_clients(share, graph):
    table = vectors(100, 1)
    silent = range(int(100 * share))
    config = dataclasses.replace(CONFIG, num_words=1, **graph)
    result = secure_sum(table, config=config, dropped=dict.fromkeys(silent, "upload"))
    assert len(result.survivors) == 100 - len(silent)
    np.testing.assert_array_equal(result.total, plain_sum(table, result.survivors))


def test_a_sparse_neighbourhood_may_lose_all_but_t_holders_and_not_one_more():
    config = SecAggConfig(num_words=2, session="sparse", degree=4, threshold=3)
    table, graph = vectors(12, 2), graph_of(config, range(12))
    first, second, third, _ = sorted(graph[5])
    silent = {first: "upload", second: "upload"}
    result = secure_sum(table, config=config, dropped=silent)
    np.testing.assert_array_equal(result.total, plain_sum(table, result.survivors))
    with pytest.raises(ProtocolError, match="threshold is 3: no sum"):
        secure_sum(table, config=config, dropped=silent | {third: "upload"})


def graph_of(config, roster, round_index=0, num_clients=None):
    """client -> its neighbours, as everybody can compute."""
    roster = sorted(roster)
    terms = config.for_cohort(num_clients or len(roster), round_index=round_index)
    order = public_permutation(len(roster), terms.context(b"graph"))
    found = neighbors(len(roster), degree=min(terms.degree, len(roster) - 1), permutation=order)
    return {client: {roster[place] for place in row} for client, row in zip(roster, found, strict=True)}


@settings(max_examples=350, deadline=None, derandomize=True)
@given(data=st.data(), n=st.sampled_from([6, 5, 4, 3, 2]))
def test_either_the_exact_sum_or_none(data, n):
    """Any cohort, any dropouts, dense and sparse: the outcome is the one that counting holders predicts."""
    silent = data.draw(st.lists(st.sampled_from((None,) * 9 + STAGES), min_size=n, max_size=n))
    degree, threshold = data.draw(st.sampled_from([(None, None), (4, None), (2, 2), (2, 3), (4, 2), (4, 3)]))
    words, round_index = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([0, 7, 2**32 - 1]))
    ids = data.draw(st.lists(st.integers(0, 2**32 - 2), min_size=n, max_size=n, unique=True))
    table = {client: row for client, row in zip(ids, vectors(n, words, round_index % 5), strict=True)}
    since = {client: stage for client, stage in zip(ids, silent, strict=True) if stage is not None}
    config = SecAggConfig(num_words=words, session="any", degree=degree, threshold=threshold)

    def run():
        return secure_sum(
            table, config=config, round_index=round_index, dropped=since, entropy=np.random.default_rng(n).bytes
        )

    try:
        terms = config.for_cohort(n, round_index=round_index)
    except (ValueError, ProtocolError):
        with pytest.raises((ValueError, ProtocolError)):
            run()
        return
    present = {s: {c for c in ids if c not in since or STAGES.index(since[c]) > i} for i, s in enumerate(STAGES)}
    enough = len(present["keys"]) >= terms.threshold
    if enough:
        graph = graph_of(config, present["keys"], round_index, n)
        enough = all(
            len((graph[client] | {client}) & present[stage]) >= terms.threshold
            for stage in STAGES[1:]
            for client in present["shares"]
        )
    if not enough or len(present["unmask"]) < 2:
        with pytest.raises(ProtocolError):
            run()
        return
    result = run()
    assert result.survivors == tuple(sorted(present["upload"]))
    expected = np.sum([table[client] for client in present["upload"]], axis=0, dtype=np.uint32)
    np.testing.assert_array_equal(result.total, expected)


def test_training_sums_chunk_by_chunk_round_after_round():
    run, table = HostSum(CONFIG), vectors(6, 3)
    with pytest.raises(ValueError, match="before a round is finished"):
        _ = run.transcript
    for round_index, order in enumerate([[3, 1, 0, 5], [5, 4, 3, 2, 1], [0, 1, 2]]):
        run.begin(reversed(order), round_index)
        late = order[-1]  # shares its keys and never uploads
        for client in order[:-1]:
            run.upload(client, table[client])
        total, survivors = run.finish()
        assert survivors == tuple(sorted(order[:-1]))
        assert run.transcript.dropped == {late: "upload"}
        np.testing.assert_array_equal(total, plain_sum(table, survivors))


def test_an_incremental_sum_refuses_what_does_not_fit():
    run, words = HostSum(CONFIG), np.zeros(3, np.uint32)
    for step in (lambda: run.upload(0, words), run.finish):
        with pytest.raises(ValueError, match="call begin first"):
            step()
    with pytest.raises(ValueError, match="names every client once"):
        run.begin([1, 1], 0)
    with pytest.raises(ValueError, match="dropped must give clients of the cohort"):
        run.begin([1, 2], 0, dropped={3: "keys"})
    with pytest.raises(ProtocolError, match="A cohort of 1 gets no secure sum"):
        run.begin([1], 0)
    run.begin([1, 2, 3], 0, dropped={3: "upload"})
    for client in (3, 4):
        with pytest.raises(ValueError, match="not in this round, or has dropped out"):
            run.upload(client, words)
    for wrong in (words.astype(np.int32), words[:2]):
        with pytest.raises(ValueError, match=r"the round has uint32 \[3\]"):
            run.upload(1, wrong)
    run.upload(1, words)
    with pytest.raises(ProtocolError, match="at stage"):
        run.upload(1, words)
    run.upload(2, words)
    with pytest.raises(ProtocolError, match="has refused this round"):
        run.finish()
    with pytest.raises(ValueError, match="call begin first"):
        run.finish()


def test_a_round_by_hand_gives_the_sum():
    world = World().play("total")
    assert world.survivors == (0, 1, 2)
    np.testing.assert_array_equal(world.total, plain_sum(world.table, (0, 1, 2)))
    assert world.server.stage == "done"


# ---- The masks mask.


def test_a_mask_is_the_keystream_of_the_whole_seed():
    seed = bytes(range(32))
    words = np.zeros(6, np.uint32)
    primitives.add_mask(words, seed, sign=1, scratch=primitives.mask_scratch(6))
    blocks = bytes(16) + bytes(15) + b"\x01"
    expected = Cipher(algorithms.AES(seed), modes.ECB()).encryptor().update(blocks)[:24]
    assert words.astype("<u4").tobytes() == expected
    for place in range(32):  # every byte of the seed counts
        other = np.zeros(6, np.uint32)
        changed = seed[:place] + bytes([seed[place] ^ 1]) + seed[place + 1 :]
        primitives.add_mask(other, changed, sign=1, scratch=primitives.mask_scratch(6))
        assert (other != words).all()
    primitives.add_mask(words, seed, sign=-1, scratch=primitives.mask_scratch(6))
    assert not words.any()


def test_a_pair_agrees_on_one_seed_of_one_round_and_session():
    keys = [primitives.new_private_key(np.random.default_rng(i).bytes) for i in range(3)]
    public = [primitives.public_bytes(key) for key in keys]
    terms = CONFIG.for_cohort(3, round_index=0)
    seed = pair_seed(terms, keys[0], public[1], 0, 1)
    assert seed == pair_seed(terms, keys[1], public[0], 1, 0)
    others = [
        pair_seed(terms, keys[0], public[2], 0, 1),
        pair_seed(terms, keys[0], public[1], 0, 2),
        pair_seed(CONFIG.for_cohort(3, round_index=1), keys[0], public[1], 0, 1),
        pair_seed(dataclasses.replace(CONFIG, session="else").for_cohort(3, round_index=0), keys[0], public[1], 0, 1),
    ]
    assert len({seed, *others}) == 5


def test_uploads_of_the_same_vector_look_alike_in_nothing():
    run = HostSum(dataclasses.replace(CONFIG, num_words=4096))
    for round_index in range(2):
        run.begin(range(3), round_index)
        for client in range(3):
            run.upload(client, np.zeros(4096, np.uint32))
        total, _ = run.finish()
        assert not total.any()
        assert run.transcript.server_view.uniform_p_value > 1e-6
        assert any(run.transcript.server_view.masked)


def test_the_server_holds_no_secret_before_the_last_stage():
    world = World()
    world.play("confirmations")
    reachable = set(_bytes_in(vars(world.server)))
    for client in world.clients.values():
        secrets = [client._seed, client._mask_key.private_bytes_raw(), client._channel_key.private_bytes_raw()]
        secrets += [share for pair in client._shares.values() for share in pair]
        assert not any(secret in held for secret in secrets for held in reachable)
    world.play("total")
    secrets = [client._mask_key.private_bytes_raw() for client in world.clients.values()]
    assert not any(secret in held for secret in secrets for held in _bytes_in(vars(world.server)))


def _bytes_in(value):
    if isinstance(value, bytes):
        yield value
    elif isinstance(value, np.ndarray):
        yield value.tobytes()
    elif isinstance(value, dict):
        for item in value.values():
            yield from _bytes_in(item)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _bytes_in(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _bytes_in(getattr(value, field.name))


# ---- Messages, configuration, transcript.


def test_messages_are_read_as_they_were_written_or_not_at_all():
    world = World().play("total")
    letters = [(getattr(messages, KINDS[stage]), world.up[stage][0]) for stage in STAGES]
    names = ("Roster", "Inbox", "Survivors", "Confirmed")
    letters += [(getattr(messages, name), world.down[answer][0]) for name, answer in zip(names, ANSWERS, strict=True)]
    for kind, data in letters:
        assert encode(decode(data, kind)) == data
        for short in (data[:cut] for cut in range(len(data))):
            with pytest.raises(ProtocolError, match=r"too short|cannot be read"):
                decode(short, kind)
        with pytest.raises(ProtocolError, match="1 bytes follow its end"):
            decode(data + b"\0", kind)
    roster = bytearray(world.down["rosters"][0])
    at = 29 + 4 + 4  # header, length, count
    roster[at + 4 : at + 8] = roster[at : at + 4]
    with pytest.raises(ProtocolError, match="named twice"):
        decode(bytes(roster), messages.Roster)


def test_the_transcript_counts_the_bytes_that_were_sent():
    result = secure_sum(vectors(5, 3), config=CONFIG, dropped={0: "keys", 2: "unmask"})
    assert result.survivors == (1, 2, 3, 4)
    transcript = result.transcript
    stages = transcript.stages
    assert [stages[stage].messages_up for stage in STAGES] == [4, 4, 4, 4, 3]
    assert [stages[stage].messages_down for stage in STAGES] == [4, 4, 4, 4, 0]
    assert stages["upload"].bytes_up == 4 * (29 + 4 + 4 * 3)
    assert stages["keys"].bytes_up == 4 * (29 + 2 * (4 + 32))
    assert transcript.total_bytes == sum(t.bytes_up + t.bytes_down for t in stages.values())
    assert 0 not in transcript.bytes_up
    assert dict(transcript.dropped) == {0: "keys", 2: "unmask"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_words": 0}, "num_words must be at least 1"),
        ({"session": ""}, "session must name this run"),
        ({"min_clients": 1}, "a sum of one vector is the vector"),
        ({"degree": 0}, "degree must be at least 1"),
        ({"threshold": 3}, "give both or neither"),
        ({"degree": 4, "threshold": 1}, "a single holder has the secret"),
        ({"degree": 4, "threshold": 6}, "from 2 .* to 5"),
        ({"degree": 5, "threshold": 3, "majority": True}, "more than half of the 6 holders .* at least 4"),
    ],
)
def test_a_config_checks_itself(change, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(CONFIG, **change)


def test_a_config_knows_which_graphs_there_are():
    assert dataclasses.replace(CONFIG, degree=6).for_cohort(100, round_index=0).threshold == 4  # a majority of 7
    terms = dataclasses.replace(CONFIG, majority=True).for_cohort(100, round_index=0)
    assert 2 * terms.threshold > terms.degree + 1
    with pytest.raises(ValueError, match="degree must be even for 100 clients"):
        dataclasses.replace(CONFIG, degree=5).for_cohort(100, round_index=0)
    with pytest.raises(ValueError, match="round_index must be from 0"):
        CONFIG.for_cohort(4, round_index=-1)
    with pytest.raises(ValueError, match="A client's number must be"):
        Client(SERVER, CONFIG.for_cohort(4, round_index=0), entropy=bytes)


def test_without_the_package_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    monkeypatch.delitem(sys.modules, "fedjax_rec.security.secagg.primitives")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fedjax-rec\[crypto\]'"):
        import fedjax_rec.security.secagg.primitives  # noqa: F401
