"""One round of a secure sum by hand, message by message, for tests that interfere."""

import dataclasses

import numpy as np

from fedjax_rec.security.secagg import messages
from fedjax_rec.security.secagg.client import Client
from fedjax_rec.security.secagg.config import SecAggConfig
from fedjax_rec.security.secagg.messages import SERVER, Header, decode, encode
from fedjax_rec.security.secagg.server import Server
from fedjax_rec.security.secagg.stages import STAGES

CONFIG = SecAggConfig(num_words=3, session="test")
ANSWERS = ("rosters", "inboxes", "survivors", "confirmations")


def vectors(num_clients, num_words, seed=0):
    return np.random.default_rng(seed).integers(0, 2**32, (num_clients, num_words), dtype=np.uint32)


def plain_sum(table, survivors):
    return table[list(survivors)].sum(axis=0, dtype=np.uint32)


KINDS = dict(zip(STAGES, ("Keys", "Shares", "MaskedInput", "Confirmation", "Reveal"), strict=True))


class World:
    """Four clients on the complete graph, threshold 3; client 3 is silent at upload. Messages are kept by name."""

    def __init__(self, round_index=0, session="test", silent=(3,), **changes):
        config = dataclasses.replace(CONFIG, session=session, **changes)
        self.terms = config.for_cohort(4, round_index=round_index)
        coins = np.random.default_rng([round_index, len(session)]).bytes
        self.clients = {c: Client(c, self.terms, entropy=coins) for c in range(4)}
        self.server = Server(self.terms, range(4), graph_seed=b"public")
        self.table, self.silent = vectors(4, 3), silent
        self.up, self.down = {}, {}
        self.done = []

    def play(self, until):
        """Runs up to and with a step: the name of a stage (clients speak), of an answer, or "total"."""
        for step in (
            "keys",
            "rosters",
            "shares",
            "inboxes",
            "upload",
            "survivors",
            "consistency",
            "confirmations",
            "unmask",
            "total",
        ):
            if step not in self.done:
                self.done.append(step)
                self.take(step)
            if step == until:
                return self
        raise AssertionError(until)

    def take(self, step):
        if step in STAGES:
            self.up[step] = {client: self.speak(step, client) for client in self.speakers(step)}
            for data in self.up[step].values():
                self.server.receive(data)
        elif step == "total":
            self.total, self.survivors = self.server.finish()
        else:
            self.down[step] = getattr(self.server, f"send_{step}")()
            if step == "inboxes":
                for client, inbox in self.down[step].items():
                    self.clients[client].open_inbox(inbox)

    def speakers(self, step):
        late = STAGES.index(step) >= STAGES.index("upload")
        return [c for c in range(4) if not (late and c in self.silent)]

    def speak(self, step, c):
        client = self.clients[c]
        if step == "keys":
            return client.advertise()
        if step == "upload":
            return client.mask(self.table[c])
        ask = {"shares": client.share, "consistency": client.confirm, "unmask": client.reveal}[step]
        return ask(self.down[{"shares": "rosters", "consistency": "survivors", "unmask": "confirmations"}[step]][c])

    def forge(self, kind, to, **fields):
        """A message of the server to a client."""
        return encode(kind(Header(self.terms.session, self.terms.round_index, SERVER, to), **fields))


def changed(data, kind, **fields):
    """The same message with other fields, or with other header fields."""
    message = decode(data, kind)
    heads = {
        name: fields.pop(name) for name in list(fields) if name in ("session", "round_index", "sender", "receiver")
    }
    return encode(dataclasses.replace(message, header=dataclasses.replace(message.header, **heads), **fields))


def flipped(data, place=0):
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def sealed_for(world, owner, holder):
    return decode(world.up["shares"][owner], messages.Shares).sealed[holder]
