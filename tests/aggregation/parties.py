"""A cohort that is driven stage by stage, so that a test can change what passes between the parties."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np

from fedlight.aggregation.secure import Identities, SecureClient, SecureServer, Session, SumFormat
from fedlight.aggregation.secure.messages import SERVER, Keys, Stage, read_records, write_records


def counting(seed: int = 0) -> Callable[[int], bytes]:
    """Return a source of bytes that gives the same ones every time: for recorded transcripts and fixed examples alone."""
    drawn = 0

    def draw(length: int) -> bytes:
        nonlocal drawn
        drawn += 1
        return hashlib.shake_256(f"{seed} {drawn}".encode()).digest(length)

    return draw


def session_of(clients: int, threshold: int, limits=((7, 5),), max_weight: int = 1, number: int = 0, **changes) -> Session:
    held = dict.fromkeys(("encoder", "model", "broadcast", "training"), bytes(32))
    settings = {"round": 3, "codec": 77} | held | changes
    return Session(number.to_bytes(16, "big"), format=SumFormat(limits, clients, max_weight), threshold=threshold, **settings)


def random_codes(session: Session, seed: int = 0) -> np.ndarray:
    """Return codes ``[clients, code_length]`` that reach the ends of their ranges."""
    rng = np.random.default_rng(seed)
    limits = np.repeat([limit for limit, _ in session.format.limits], [count for _, count in session.format.limits])
    codes = rng.integers(-limits, limits + 1, (session.clients, session.format.code_length))
    extreme = rng.random(codes.shape) < 0.3
    return np.where(extreme, np.sign(codes) * limits, codes).astype(np.int32)


def read_keys(session: Session, message: bytes, client: int) -> Keys:
    return Keys(*read_records(session, message, Stage.ADVERTISE_KEYS, client)[0])


def write_keys(session: Session, client: int, keys: Keys) -> bytes:
    return write_records(session, Stage.ADVERTISE_KEYS, client, [keys])


def read_roster(session: Session, message: bytes) -> dict[int, Keys]:
    return {client: Keys(*keys) for client, *keys in read_records(session, message, Stage.ROSTER, SERVER)}


def write_roster(session: Session, roster: dict[int, Keys]) -> bytes:
    return write_records(session, Stage.ROSTER, SERVER, [(client, *keys) for client, keys in sorted(roster.items())])


def write_survivors(session: Session, survivors: tuple[int, ...]) -> bytes:
    return write_records(session, Stage.SURVIVORS, SERVER, [(client,) for client in survivors])


class Play:
    """One session; every method runs the stages before it and returns what the server or the clients said."""

    def __init__(self, clients: int = 4, threshold: int = 3, seed: int = 0, **changes) -> None:
        self.session = session_of(clients, threshold, number=seed, **changes)
        self.entropy = counting(seed)
        self.identities = Identities(counting(-1))
        self.directory = {i: self.identities[i] for i in range(clients)}
        self.clients = {i: self.client(i) for i in range(clients)}
        self.server = SecureServer(self.session, range(clients), self.directory)
        self.codes = random_codes(self.session, seed)

    def client(self, number: int, session: Session | None = None) -> SecureClient:
        return SecureClient(session or self.session, number, self.identities.of(number), self.directory, self.entropy)

    def keys(self) -> dict[int, bytes]:
        return {i: client.advertise() for i, client in self.clients.items()}

    def roster(self) -> bytes:
        for i, message in self.keys().items():
            self.server.collect_keys(i, message)
        return self.server.roster()

    def shares(self) -> dict[int, bytes]:
        roster = self.roster()
        return {i: client.share(roster) for i, client in self.clients.items()}

    def inboxes(self) -> dict[int, bytes]:
        for i, message in self.shares().items():
            self.server.collect_shares(i, message)
        return {i: self.server.inbox(i) for i in self.server.sharers()}

    def survivors(self, silent: tuple[int, ...] = ()) -> bytes:
        for i, inbox in self.inboxes().items():
            if i not in silent:
                self.server.collect_masked(i, self.clients[i].masked_code(inbox, self.codes[i]))
        return self.server.survivor_list()

    def request(self, silent: tuple[int, ...] = ()) -> bytes:
        survivors = self.survivors(silent)
        for i in sorted(self.server.survivors):
            self.server.collect_signature(i, self.clients[i].consistency(survivors))
        return self.server.request()

    def revealed(self, silent: tuple[int, ...] = ()) -> dict[int, bytes]:
        request = self.request(silent)
        return {i: self.clients[i].unmask(request) for i in sorted(self.server.survivors)}

    def total(self, silent: tuple[int, ...] = ()) -> np.ndarray:
        for i, message in self.revealed(silent).items():
            self.server.collect_unmasking(i, message)
        return self.server.total()[0]
