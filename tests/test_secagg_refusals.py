"""Risk: a party answers what it must refuse, or a sum comes out after a refusal."""

import dataclasses

import numpy as np
import pytest
from secagg_world import ANSWERS, CONFIG, KINDS, World, changed, flipped, plain_sum, sealed_for, vectors

from fedjax_rec.security.secagg import messages
from fedjax_rec.security.secagg.messages import decode, encode
from fedjax_rec.security.secagg.session import secure_sum
from fedjax_rec.security.secagg.stages import STAGES, ProtocolError


def client_refuses(client, step, says):
    """The step is refused, and so is everything after it."""
    with pytest.raises(ProtocolError, match=says):
        step()
    for later in (
        client.advertise,
        lambda: client.mask(np.zeros(3, np.uint32)),
        lambda: client.confirm(b""),
        lambda: client.reveal(b""),
    ):
        with pytest.raises(ProtocolError, match="has refused this round"):
            later()


def server_refuses(server, step, says):
    """The step is refused, and no sum comes out any more."""
    with pytest.raises(ProtocolError, match=says):
        step()
    assert server.stage == "refused"
    for later in (server.send_survivors, server.send_confirmations, server.finish, lambda: server.receive(b"")):
        with pytest.raises(ProtocolError, match="has refused this round"):
            later()


@pytest.mark.parametrize("until", ["keys", "shares", "inboxes", "upload", "consistency", "unmask"])
def test_a_client_takes_each_step_once_and_in_order(until):
    world = World().play(until)
    client, words = world.clients[0], np.zeros(3, np.uint32)
    steps = {
        "keys": client.advertise,
        "shares": lambda: client.share(world.down["rosters"][0]),
        "inboxes": lambda: client.open_inbox(world.down["inboxes"][0]),
        "upload": lambda: client.mask(words),
        "consistency": lambda: client.confirm(world.down["survivors"][0]),
        "unmask": lambda: client.reveal(world.down["confirmations"][0]),
    }
    client_refuses(client, steps[until], "asked for a step of stage")  # the same step again


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("other", [{"round_index": 1}, {"session": "other"}])
def test_a_client_refuses_messages_of_another_round_or_session(answer, other):
    old, world = World().play("confirmations"), World(**other)
    step, method = {
        "rosters": ("keys", "share"),
        "inboxes": ("shares", "open_inbox"),
        "survivors": ("upload", "confirm"),
        "confirmations": ("consistency", "reveal"),
    }[answer]
    if answer == "inboxes":  # stop before the true inbox is opened
        world.play("shares")
    else:
        world.play(step)
    client = world.clients[0]
    client_refuses(client, lambda: getattr(client, method)(old.down[answer][0]), "a replay")


def test_a_client_refuses_messages_to_others_and_of_another_kind():
    world = World().play("rosters")
    client_refuses(world.clients[0], lambda: world.clients[0].share(world.down["rosters"][1]), "a replay")
    client_refuses(world.clients[1], lambda: world.clients[1].share(world.up["keys"][0]), "Expected a message Roster")


@pytest.mark.parametrize("twice", ["two neighbours", "my own", "both halves", "me", "short", "few", "many"])
def test_a_client_refuses_a_roster_with_duplicate_keys_or_wrong_members(twice):
    world = World().play("rosters")
    keys = dict(decode(world.down["rosters"][0], messages.Roster).keys)
    mine = decode(world.up["keys"][0], messages.Keys)
    if twice == "two neighbours":
        keys[2] = keys[2][:32] + keys[1][32:]
    elif twice == "my own":
        keys[2] = mine.mask_key + keys[2][32:]
    elif twice == "both halves":
        keys[2] = keys[2][:32] * 2
    elif twice == "me":
        keys[0] = keys.pop(2)
    elif twice == "short":
        keys = {other: both[:40] for other, both in keys.items()}
    elif twice == "few":
        keys = {1: keys[1]}
    else:
        keys[4] = bytes(range(64))
    says = "same public key twice" if twice in ("two neighbours", "my own", "both halves") else "roster"
    forged = world.forge(messages.Roster, 0, keys=keys)
    client_refuses(world.clients[0], lambda: world.clients[0].share(forged), says)


def test_a_client_refuses_a_public_key_that_agrees_on_nothing():
    world = World().play("rosters")
    keys = dict(decode(world.down["rosters"][0], messages.Roster).keys)
    keys[1] = keys[1][:32] + bytes(32)  # a point of low order: the agreed secret would be zero
    forged = world.forge(messages.Roster, 0, keys=keys)
    client_refuses(world.clients[0], lambda: world.clients[0].share(forged), "keys can be agreed with")


@pytest.mark.parametrize("tamper", ["flip", "swap", "redirect", "reflect", "stranger", "few"])
def test_a_client_refuses_an_inbox_that_was_tampered_with(tamper):
    world = World().play("shares")
    inboxes = world.server.send_inboxes()
    sealed = dict(decode(inboxes[0], messages.Inbox).sealed)
    says = "changed on its way"
    if tamper == "flip":
        sealed[1] = flipped(sealed[1])
    elif tamper == "swap":
        sealed[1], sealed[2] = sealed[2], sealed[1]
    elif tamper == "redirect":
        sealed[1] = decode(inboxes[2], messages.Inbox).sealed[1]
    elif tamper == "reflect":
        sealed[1] = sealed_for(world, 0, 1)  # what client 0 itself sealed for client 1
    elif tamper == "stranger":
        sealed[9], says = sealed.pop(1), "shares of client 9, no neighbour"
    else:
        sealed, says = {1: sealed[1]}, "2 shared their keys; the threshold is 3"
    forged = world.forge(messages.Inbox, 0, sealed=sealed)
    client_refuses(world.clients[0], lambda: world.clients[0].open_inbox(forged), says)


@pytest.mark.parametrize(
    ("survivors", "dropped", "says"),
    [
        ((0, 1, 2, 3), (3,), r"both shares of one client.*\[3\]"),
        ((0, 1, 2), (2, 3), r"both shares of one client.*\[2\]"),
        ((0, 1, 2, 2), (3,), "twice"),
        ((0, 1), (2, 3), "2 survived; the threshold is 3"),
        ((1, 2, 3), (0,), "not on the survivor list"),
        ((0, 1, 2), (), r"omits \[3\]"),
        ((0,), (1, 2, 3), "A sum of 1 clients is refused"),
    ],
)
def test_a_client_refuses_survivor_lists_that_would_unmask_somebody(survivors, dropped, says):
    world = World().play("upload")
    forged = world.forge(messages.Survivors, 0, survivors=survivors, dropped=dropped)
    client_refuses(world.clients[0], lambda: world.clients[0].confirm(forged), says)


def test_a_client_refuses_a_survivor_who_never_shared_keys_with_it():
    world = World(silent=()).play("shares")
    inbox = world.forge(messages.Inbox, 0, sealed={c: sealed_for(world, c, 0) for c in (1, 2)})  # none of client 3
    client = world.clients[0]
    client.open_inbox(inbox)
    client.mask(world.table[0])
    forged = world.forge(messages.Survivors, 0, survivors=(0, 1, 2, 3), dropped=())
    client_refuses(client, lambda: client.confirm(forged), r"names \[3\]")


def test_a_second_survivor_list_gets_no_answer():
    """The known attack on clients who answer twice: one share of each kind."""
    world = World().play("consistency")
    forged = world.forge(messages.Survivors, 0, survivors=(0, 1, 3), dropped=(2,))
    client_refuses(world.clients[0], lambda: world.clients[0].confirm(forged), "asked for a step of stage")


def test_clients_who_were_told_different_lists_reveal_nothing():
    world = World(silent=()).play("upload")
    lists = {c: world.forge(messages.Survivors, c, survivors=(0, 1, 2, 3), dropped=()) for c in range(4)}
    lists[0] = world.forge(messages.Survivors, 0, survivors=(0, 1, 2), dropped=(3,))
    tags = {c: decode(world.clients[c].confirm(lists[c]), messages.Confirmation).tags for c in range(4)}
    for client, others in ((0, (1, 2)), (1, (0, 2, 3))):
        confirmed = world.forge(messages.Confirmed, client, tags={o: tags[o][client] for o in others})
        client_refuses(world.clients[client], lambda c=client, m=confirmed: world.clients[c].reveal(m), "another one")
    few = world.forge(messages.Confirmed, 2, tags={3: tags[3][2]})
    client_refuses(world.clients[2], lambda: world.clients[2].reveal(few), "2 confirmed the survivor list")


def test_a_client_refuses_a_tag_of_a_stranger():
    world = World().play("confirmations")
    tags = dict(decode(world.down["confirmations"][0], messages.Confirmed).tags) | {9: bytes(16)}
    forged = world.forge(messages.Confirmed, 0, tags=tags)
    client_refuses(world.clients[0], lambda: world.clients[0].reveal(forged), "Client 9 did not confirm")


@pytest.mark.parametrize("stage", STAGES)
def test_the_server_refuses_repeated_foreign_and_replayed_messages(stage):
    kind = getattr(messages, KINDS[stage])
    for change, says in (
        (None, "a second message"),
        ({"sender": 9}, "not in this round"),
        ({"round_index": 1}, "another session or round"),
        ({"session": bytes(16)}, "another session or round"),
        ({"receiver": 0}, "another session or round"),
    ):
        world = World().play(stage)
        again = world.up[stage][0]
        data = again if change is None else changed(again, kind, **change)
        server_refuses(world.server, lambda s=world.server, d=data: s.receive(d), says)


@pytest.mark.parametrize("stage", STAGES[:-1])
def test_the_server_refuses_late_messages(stage):
    world = World(silent=())
    world.play(dict(zip(STAGES, ("rosters", "inboxes", "survivors", "confirmations"), strict=False))[stage])
    server_refuses(world.server, lambda: world.server.receive(world.up[stage][0]), "Expected a message")


def test_the_server_refuses_late_uploads_of_a_client_that_it_called_dropped():
    """It then has the client's mask key and its masked vector; the self seed, which nobody reveals, still hides it."""
    world = World().play("survivors")
    upload = world.clients[3].mask(world.table[3])
    server_refuses(
        world.server,
        lambda: world.server.receive(upload),
        "Expected a message Confirmation",
    )


def test_the_server_gives_no_sum_early_or_twice():
    world = World().play("confirmations")
    server_refuses(world.server, world.server.finish, "0 clients sent their shares")
    world = World().play("total")
    server_refuses(world.server, world.server.finish, 'at stage "done"')
    world = World().play("upload")
    server_refuses(world.server, world.server.finish, 'at stage "upload"')


@pytest.mark.parametrize("copy", ["mask", "channel", "own"])
def test_the_server_refuses_duplicate_public_keys(copy):
    world = World()
    first, second = (decode(world.clients[c].advertise(), messages.Keys) for c in (0, 1))
    world.server.receive(encode(first))
    stolen = {
        "mask": {"mask_key": first.mask_key},
        "channel": {"channel_key": first.mask_key},
        "own": {"channel_key": second.mask_key},
    }[copy]
    forged = encode(dataclasses.replace(second, **stolen))
    server_refuses(world.server, lambda: world.server.receive(forged), "there already")


@pytest.mark.parametrize("field", ["seed_shares", "key_shares"])
@pytest.mark.parametrize(("holder", "place"), [(0, 0), (1, 0), (2, 0), (0, 16), (2, 31)])
def test_a_tampered_share_gives_no_sum(field, holder, place):
    """Whoever's share it is, of a survivor or of the dropped client: what was committed does not fit."""
    world = World().play("consistency")
    world.play("confirmations")
    for client in world.speakers("unmask"):
        reveal = world.speak("unmask", client)
        if client == holder:
            shares = dict(getattr(decode(reveal, messages.Reveal), field))
            owner = min(shares)
            reveal = changed(reveal, messages.Reveal, **{field: shares | {owner: flipped(shares[owner], place)}})
        world.server.receive(reveal)
    server_refuses(world.server, world.server.finish, "did not commit to|do not fit together|no such key")


def test_a_wrong_share_among_more_than_t_gives_no_sum_either():
    world = World(silent=(), degree=3, threshold=2).play("confirmations")
    for client in range(4):
        reveal = world.speak("unmask", client)
        if client == 3:
            shares = dict(decode(reveal, messages.Reveal).seed_shares)
            reveal = changed(reveal, messages.Reveal, seed_shares=shares | {0: flipped(shares[0])})
        world.server.receive(reveal)
    server_refuses(world.server, world.server.finish, "did not commit to|do not fit together|no such key")


@pytest.mark.parametrize("drop", ["seed_shares", "key_shares"])
def test_the_server_refuses_missing_and_unasked_shares(drop):
    world = World().play("confirmations")
    reveal = world.speak("unmask", 0)
    forged = changed(reveal, messages.Reveal, **{drop: {}})
    server_refuses(world.server, lambda: world.server.receive(forged), "other shares than the survivor list asks for")
    world = World().play("confirmations")
    reveal = world.speak("unmask", 0)
    both = dict(decode(reveal, messages.Reveal).seed_shares) | {3: bytes(33)}  # a seed share of the dropped client
    server_refuses(
        world.server, lambda: world.server.receive(changed(reveal, messages.Reveal, seed_shares=both)), "other shares"
    )


@pytest.mark.parametrize(
    ("stage", "field", "value", "says"),
    [
        ("upload", "words", np.zeros(2, np.uint32), "uploaded 2 words"),
        ("keys", "mask_key", bytes(31), "another length"),
        ("shares", "sealed", {1: bytes(82)}, "for others than its neighbours"),
    ],
)
def test_the_server_refuses_messages_that_do_not_fit_the_round(stage, field, value, says):
    world = World(silent=())
    before = {"keys": None, "shares": "rosters", "upload": "inboxes"}[stage]
    if before:
        world.play(before)
    data = changed(world.speak(stage, 0), getattr(messages, KINDS[stage]), **{field: value})
    server_refuses(world.server, lambda: world.server.receive(data), says)


def test_a_tampered_upload_is_not_detected():
    """Not promised, and said so: the sum moves by exactly what was added to the masked vector."""
    world = World().play("inboxes")
    for client in (0, 1, 2):
        upload = world.speak("upload", client)
        if client == 1:
            upload = changed(
                upload, messages.MaskedInput, words=decode(upload, messages.MaskedInput).words + np.uint32(5)
            )
        world.server.receive(upload)
    world.done.append("upload")
    world.play("total")
    np.testing.assert_array_equal(world.total, plain_sum(world.table, (0, 1, 2)) + np.uint32(5))


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        ("keys", "1 clients sent keys|2 clients sent keys"),
        ("shares", "2 shared their keys; the threshold is 3"),
        ("upload", "2 uploaded; the threshold is 3"),
        ("consistency", "2 confirmed the survivors; the threshold is 3"),
        ("unmask", "2 sent their shares; the threshold is 3"),
    ],
)
def test_below_the_threshold_there_is_no_sum(stage, says):
    with pytest.raises(ProtocolError, match=says):
        secure_sum(vectors(4, 3), config=CONFIG, dropped={1: stage, 2: stage})


def test_below_min_clients_there_is_no_sum():
    config = dataclasses.replace(CONFIG, degree=3, threshold=2, min_clients=4)
    np.testing.assert_array_equal(secure_sum(vectors(4, 3), config=config).total, plain_sum(vectors(4, 3), range(4)))
    for stage in STAGES:
        with pytest.raises(ProtocolError, match=r"it takes 4|min_clients is 4"):
            secure_sum(vectors(4, 3), config=config, dropped={0: stage})
    with pytest.raises(ProtocolError, match="A cohort of 3 gets no secure sum"):
        secure_sum(vectors(3, 3), config=config)
