"""The server of secure aggregation: collects a stage, answers it, and ends with the sum; bytes in, bytes out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence

import numpy as np

from fedlight.aggregation.secure import messages
from fedlight.aggregation.secure.messages import SERVER, Keys, Request, Stage
from fedlight.aggregation.secure.primitives import KEY, KeyPair, combine, verify
from fedlight.aggregation.secure.session import Session, require_enough, require_known
from fedlight.aggregation.secure.sums import MaskedSum, add_mask
from fedlight.core.errors import ProtocolError

TRIES = 1_000
"""Choices of shares to try for one secret: all of 7 of 10; more would let a client that dealt wrong ones hold up the server for long."""


def _choices(tellers: list[int], threshold: int) -> Iterator[list[int]]:
    """Yield every choice of ``threshold`` of the tellers once: the first ones, then those among one teller more, two more, ..."""
    for last in range(threshold, len(tellers) + 1):
        for left_out in itertools.combinations(tellers[: last - 1], last - threshold):
            yield [who for who in tellers[:last] if who not in left_out]


class SecureServer:
    """The server's side of one session; it holds one sum of masked words and the shares, never a code.

    A stage is collected message by message and closed by the method that answers it: ``collect_keys`` / ``roster``, ``collect_shares`` /
    ``inbox``, ``collect_masked`` / ``survivor_list``, ``collect_signature`` / ``request``, ``collect_unmasking`` / ``total``. A message
    that raises is as good as not sent, and the session goes on without it; closing a stage raises if fewer than the threshold are left.

    Args:
        session: the attempt's public parameters.
        cohort: the clients that were asked to take part.
        directory: the public identity keys of every client.

    Attributes:
        keys: what clients advertised, by client.
        survivors: the clients whose codes are in the sum.
        signatures: those of the survivors that signed, by client.
        liars: clients that revealed a wrong share, or had been dealt one, once there is a sum.

    Raises:
        ProtocolError: if the cohort is larger than declared: before anything is sent.
    """

    def __init__(self, session: Session, cohort: Sequence[int], directory: Mapping[int, bytes]) -> None:
        if len(cohort) > session.clients:
            raise ProtocolError(
                f"Expected at most the declared cohort of {session.clients} clients but got {len(cohort)}, whose sum might overflow: "
                "declare a larger `cohort`"
            )
        self.session = session
        self.cohort = frozenset(cohort)
        self.directory = directory
        self._collecting: Stage | None = Stage.ADVERTISE_KEYS
        self.keys: dict[int, Keys] = {}
        self._sealed: dict[int, dict[int, bytes]] = {}
        self._words = np.zeros(session.format.length, np.uint64)
        self.survivors: set[int] = set()
        self._roster = b""
        self.signatures: dict[int, bytes] = {}
        self._unmasking: dict[int, dict[int, bytes]] = {}
        self.liars: set[int] = set()

    def collect_keys(self, sender: int, message: bytes) -> None:
        """Take one client's keys."""
        self._expect(Stage.ADVERTISE_KEYS, sender, self.cohort, self.keys)
        keys = Keys(*messages.read_records(self.session, message, Stage.ADVERTISE_KEYS, sender)[0])
        require_known(self.directory, sender)
        verify(self.directory[sender], keys.signature, keys.signed(self.session, sender), f"client {sender}")
        known = {key for other in self.keys.values() for key in (other.channel, other.mask)}
        if keys.channel == keys.mask or not known.isdisjoint((keys.channel, keys.mask)):
            raise ProtocolError(f"Expected keys of client {sender}'s own but one is in use already")
        for key in (keys.channel, keys.mask):  # every other client would refuse the roster, and nobody's round would take place
            KeyPair(bytes(KEY)).agree(key)  # whatever the private key: a point of low order is found out
        self.keys[sender] = keys

    def roster(self) -> bytes:
        """Return everybody's keys, for everybody."""
        self._close(Stage.ADVERTISE_KEYS, Stage.SHARE_KEYS, len(self.keys), "advertised keys")
        roster = [(client, *keys) for client, keys in sorted(self.keys.items())]
        message = messages.write_records(self.session, Stage.ROSTER, SERVER, roster)
        self._roster = messages.digest(message)
        return message

    def collect_shares(self, sender: int, message: bytes) -> None:
        """Take one client's sealed shares."""
        self._expect(Stage.SHARE_KEYS, sender, self.keys, self._sealed)
        sealed = dict(messages.read_records(self.session, message, Stage.SHARE_KEYS, sender))
        if sealed.keys() != self.keys.keys() - {sender}:
            raise ProtocolError(f"Expected client {sender}'s shares for each of the others but got them for another list")
        self._sealed[sender] = sealed

    def sharers(self) -> tuple[int, ...]:
        """Close the stage of shares and return the clients that go on."""
        self._close(Stage.SHARE_KEYS, Stage.MASKED_INPUT, len(self._sealed), "shared their seeds")
        return tuple(sorted(self._sealed))

    def inbox(self, client: int) -> bytes:
        """Return the shares that the others sealed for a client."""
        boxes = [(sender, sealed[client]) for sender, sealed in sorted(self._sealed.items()) if sender != client]
        return messages.write_records(self.session, Stage.INBOX, SERVER, boxes)

    def collect_masked(self, sender: int, message: bytes) -> None:
        """Add one client's masked code to the sum."""
        self._expect(Stage.MASKED_INPUT, sender, self._sealed, self.survivors)
        self._words += self.session.format.unpack(messages.read_masked(self.session, message, sender))
        self._words %= self.session.format.modulus
        self.survivors.add(sender)

    def survivor_list(self) -> bytes:
        """Return who is in the sum, for each of them to sign."""
        self._close(Stage.MASKED_INPUT, Stage.CONSISTENCY_CHECK, len(self.survivors), "sent a masked code")
        return messages.write_records(self.session, Stage.SURVIVORS, SERVER, [(client,) for client in sorted(self.survivors)])

    def collect_signature(self, sender: int, message: bytes) -> None:
        """Take one survivor's signature."""
        self._expect(Stage.CONSISTENCY_CHECK, sender, self.survivors, self.signatures)
        ((signature,),) = messages.read_records(self.session, message, Stage.CONSISTENCY_CHECK, sender)
        signed = messages.signed_survivors(self.session, self._roster, sorted(self._sealed), sorted(self.survivors))
        verify(self.directory[sender], signature, signed, f"client {sender}")
        self.signatures[sender] = signature

    def request(self) -> bytes:
        """Return what is asked of those who signed: shares that take off the masks of the living and of the dropped."""
        self._close(Stage.CONSISTENCY_CHECK, Stage.UNMASKING, len(self.signatures), "signed the survivors")
        dropped = tuple(sorted(self._sealed.keys() - self.survivors))
        return messages.write_request(self.session, Request(tuple(sorted(self.survivors)), dropped, self.signatures))

    def collect_unmasking(self, sender: int, message: bytes) -> None:
        """Take the shares that one client reveals."""
        self._expect(Stage.UNMASKING, sender, self.signatures, self._unmasking)
        revealed = dict(messages.read_records(self.session, message, Stage.UNMASKING, sender))
        if revealed.keys() != self._sealed.keys():
            raise ProtocolError(f"Expected client {sender}'s shares of everybody who shared but got them of another list")
        self._unmasking[sender] = revealed

    def total(self) -> MaskedSum:
        """Return the survivors' sum.

        Others take the place of a wrong share, whose sender ``liars`` then names, as long as there are enough.

        Raises:
            ProtocolError: if too few revealed their shares, or no choice of them makes a seed that its owner committed to.
        """
        self._close(Stage.UNMASKING, None, len(self._unmasking), "revealed their shares")
        session = self.session
        words = self._words.copy()
        for client in sorted(self.survivors):
            commitment = self.keys[client].commitment
            what = f"the seed that client {client} committed to"
            seed = self._secret(client, what, lambda s: session.commitment(s, client) == commitment)  # noqa: B023
            add_mask(words, session.self_mask(seed, client), session.format.modulus, negative=True)
        for client in sorted(self._sealed.keys() - self.survivors):
            public = self.keys[client].mask
            pair = session.mask_pair(
                self._secret(client, f"the mask key of client {client}", lambda s: session.mask_pair(s).public == public)  # noqa: B023
            )
            for other in sorted(self.survivors):
                # What the survivor added for the dropped client (as the lower number) is taken away, and the other way round.
                key = session.pair_mask(pair.agree(self.keys[other].mask), client, other)
                add_mask(words, key, session.format.modulus, negative=other < client)
        return session.format.read_sum(words, len(self.survivors))

    def _secret(self, client: int, what: str, fits: Callable[[bytes], bool]) -> bytes:
        """Return what a client shared, of the first choice of shares that makes it; whoever's share does not go with them is a liar."""
        places = {who: place for place, who in enumerate(sorted(self.keys))}

        def made_by(chosen: Iterable[int]) -> bytes:
            return combine({places[who]: self._unmasking[who][client] for who in chosen})

        threshold, tellers = self.session.threshold, sorted(self._unmasking, key=lambda who: (who in self.liars, who))
        for chosen in itertools.islice(_choices(tellers, threshold), TRIES):
            if not fits(secret := made_by(chosen)):
                continue
            if chosen != tellers[:threshold]:
                others = [who for who in tellers if who not in chosen]
                self.liars |= {who for who in others if not fits(made_by((*chosen[1:], who)))}
            return secret
        raise ProtocolError(f"Expected shares of {what} but they make another, whichever are taken: too many are corrupt")

    def _expect(self, stage: Stage, sender: int, members: Container[int], have: Container[int]) -> None:
        """Raise unless the stage is open, the sender takes part in it, and has not answered yet."""
        if self._collecting is not stage:
            raise ProtocolError(f"Expected no {stage.name.lower()} message now but client {sender} sent one: the stage is not open")
        if sender not in members:
            raise ProtocolError(f"Expected {stage.name.lower()} messages of those who take part but client {sender} sent one")
        if sender in have:
            raise ProtocolError(f"Expected one {stage.name.lower()} message of client {sender} but got another")

    def _close(self, stage: Stage, following: Stage | None, count: int, what: str) -> None:
        """Close a stage, once; with fewer clients than the threshold the session ends."""
        if self._collecting is not stage:
            raise ProtocolError(f"Expected the {stage.name.lower()} stage to be open but it is not")
        self._collecting = None
        require_enough(self.session, count, what)
        self._collecting = following
