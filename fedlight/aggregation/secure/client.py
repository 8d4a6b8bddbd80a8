"""A client of secure aggregation: one method a stage, bytes in, bytes out; no transport."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from fedlight.aggregation.secure import messages
from fedlight.aggregation.secure.messages import SERVER, Keys, Stage
from fedlight.aggregation.secure.primitives import KEY, SECRET, Identity, KeyPair, seal, split, unseal, verify
from fedlight.aggregation.secure.session import Session, require_enough, require_known
from fedlight.aggregation.secure.sums import add_mask
from fedlight.core.errors import ProtocolError
from fedlight.core.packing import pack, unpack


class SecureClient:
    """One client in one session; for the next round or attempt there is a new one, with new keys.

    The stages in order: ``advertise``, ``share``, ``masked_code``, ``consistency``, ``unmask``. Each is answered once. Whatever is wrong
    with what the server sent raises, and ends the session for this client: its secrets are forgotten (no longer referred to, which is not
    wiped from memory) and it answers nothing more.

    Args:
        session: what the client itself knows of the attempt: its own copies of model and encoder are in it as digests.
        client: the client's number.
        identity: the client's long-lived key.
        directory: the public identity keys (32 bytes) of every client, known beforehand and not from this server.
        entropy: source of keys and seeds (the operating system's; tests give another). Coefficients of Shamir's polynomials come from
            `pycryptodome`, which draws them from the operating system's whatever is given here.

    Raises (every stage):
        MessageError: if a message is malformed or belongs to another session, round, codec or stage.
        ProtocolError: if it is well-formed and must not be answered.
    """

    def __init__(
        self,
        session: Session,
        client: int,
        identity: Identity,
        directory: Mapping[int, bytes],
        entropy: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        self.session = session
        self.client = client
        self.identity = identity
        self.directory = directory
        self.entropy = entropy
        self._next: Stage | None = Stage.ADVERTISE_KEYS
        self._channel: KeyPair | None = None
        self._mask: KeyPair | None = None
        self._seeds: tuple[bytes, bytes] = (b"", b"")
        self._keys: Keys
        self._roster: dict[int, Keys] = {}
        self._seen = b""
        self._channels: dict[int, bytes] = {}
        self._pair_masks: dict[int, bytes] = {}
        self._shares: dict[int, tuple[bytes, bytes]] = {}
        self._sharers: tuple[int, ...] = ()
        self._survivors: tuple[int, ...] = ()

    @contextmanager
    def _stage(self, stage: Stage, following: Stage | None) -> Iterator[None]:
        """Answer a stage in its turn, once; whatever goes wrong ends the session."""
        expected, self._next = self._next, None
        try:
            if expected is not stage:
                raise ProtocolError(
                    f"Expected {'nothing more in this session' if expected is None else f'the {expected.name.lower()} stage'} "
                    f"but was asked for {stage.name.lower()}: every stage is answered once, in order"
                )
            yield
        except BaseException:
            self._forget()
            raise
        self._next = following
        if following is None:
            self._forget()

    def _forget_keys(self) -> None:
        """Let go of them: Python cannot wipe them from memory."""
        self._channel = self._mask = None
        self._seeds, self._channels, self._pair_masks = (b"", b""), {}, {}

    def _forget(self) -> None:
        self._forget_keys()
        self._shares = {}

    def suspend(self) -> bytes:
        """Return everything that the next stage needs, secrets included, and forget it here: nothing once the session is over.

        Whoever keeps it must delete it before it is resumed: a copy that is resumed twice would answer a stage twice.
        """
        if self._next is None:
            return b""
        pairs = [None if pair is None else pair.secret for pair in (self._channel, self._mask)]
        tables = [list(table.items()) for table in (self._roster, self._channels, self._pair_masks, self._shares)]
        following, self._next = self._next, None
        state = [int(following), self.session.id, *pairs, self._seeds, self._keys, self._seen, *tables, self._sharers, self._survivors]
        self._forget()
        return pack(state)

    def resume(self, state: bytes) -> None:
        """Take over what ``suspend`` returned, in a client of the same session."""
        following, _, channel, mask, seeds, keys, self._seen, roster, channels, pair_masks, shares, sharers, survivors = unpack(state)
        self._next = Stage(following)
        self._channel, self._mask = (None if secret is None else KeyPair(secret) for secret in (channel, mask))
        self._seeds, self._keys = (seeds[0], seeds[1]), Keys(*keys)
        self._roster = {client: Keys(*own) for client, own in roster}
        self._channels, self._pair_masks = dict(channels), dict(pair_masks)
        self._shares = {client: (share[0], share[1]) for client, share in shares}
        self._sharers, self._survivors = tuple(sharers), tuple(survivors)

    def advertise(self) -> bytes:
        """Return two fresh public keys and a commitment to the own mask's seed, signed."""
        with self._stage(Stage.ADVERTISE_KEYS, Stage.SHARE_KEYS):
            session, client = self.session, self.client
            channel = self._channel = KeyPair(self.entropy(KEY))
            own, pair = self._seeds = (self.entropy(SECRET), self.entropy(SECRET))
            mask = self._mask = session.mask_pair(pair)
            unsigned = Keys(channel.public, mask.public, session.commitment(own, client), b"")
            self._keys = unsigned._replace(signature=self.identity.sign(unsigned.signed(session, client)))
            return messages.write_records(session, Stage.ADVERTISE_KEYS, client, [self._keys])

    def share(self, roster: bytes) -> bytes:
        """Check everybody's keys, and return shares of both seeds sealed for each of the others."""
        with self._stage(Stage.SHARE_KEYS, Stage.MASKED_INPUT):
            session, client, channel, mask = self.session, self.client, self._channel, self._mask
            assert channel is not None, "made in the stage before"
            assert mask is not None, "made in the stage before"
            self._roster = {who: Keys(*keys) for who, *keys in messages.read_records(session, roster, Stage.ROSTER, SERVER)}
            self._check_roster()
            self._seen = messages.digest(roster)
            others = [other for other in sorted(self._roster) if other != client]
            for other in others:
                keys = self._roster[other]
                self._channels[other] = channel.agree(keys.channel)
                self._pair_masks[other] = session.pair_mask(mask.agree(keys.mask), client, other)
            own, pair = (split(seed, session.threshold, len(self._roster)) for seed in self._seeds)
            shares = dict(zip(sorted(self._roster), zip(own, pair, strict=True), strict=True))
            self._shares = {client: shares[client]}
            sealed = [
                (other, seal(session.channel(self._channels[other], client, other), b"".join(shares[other]), session.bound(client, other)))
                for other in others
            ]
            return messages.write_records(session, Stage.SHARE_KEYS, client, sealed)

    def _check_roster(self) -> None:
        """Raise unless the roster is large enough, all keys differ, each is signed by its owner, and the own ones are unchanged."""
        session, roster = self.session, self._roster
        require_enough(session, len(roster), "advertised keys")
        if roster.get(self.client) != self._keys:
            raise ProtocolError("Expected the own keys in the roster, as they were sent, but they are missing or changed")
        if len({key for keys in roster.values() for key in (keys.channel, keys.mask)}) != 2 * len(roster):
            raise ProtocolError("Expected distinct keys but two in the roster are the same")
        for client, keys in roster.items():
            require_known(self.directory, client)
            verify(self.directory[client], keys.signature, keys.signed(session, client), f"client {client}")

    def masked_code(self, inbox: bytes, code: np.ndarray, weight: int = 1) -> bytes:
        """Open the others' shares, and return the code (signed integers ``[code_length]``) under all masks.

        The masks are those of the clients whose shares arrived: theirs are what the server may need.
        """
        with self._stage(Stage.MASKED_INPUT, Stage.CONSISTENCY_CHECK):
            session, client = self.session, self.client
            words = session.format.words(code, weight)
            sealed = dict(messages.read_records(session, inbox, Stage.INBOX, SERVER))
            if not sealed.keys() <= self._channels.keys():
                raise ProtocolError("Expected shares from clients of the roster alone but got others'")
            require_enough(session, len(sealed) + 1, "shared their seeds")
            for other, box in sealed.items():
                key = session.channel(self._channels[other], other, client)
                plain = unseal(key, box, session.bound(other, client), f"client {other}")
                self._shares[other] = (plain[:SECRET], plain[SECRET:])
            self._sharers = tuple(sorted(self._shares))
            add_mask(words, session.self_mask(self._seeds[0], client), session.format.modulus)
            for other in sealed:
                add_mask(words, self._pair_masks[other], session.format.modulus, negative=other < client)
            self._forget_keys()
            return messages.write(session, Stage.MASKED_INPUT, client, session.format.length, session.format.pack(words))

    def consistency(self, survivors: bytes) -> bytes:
        """Return a signature of who survived; no other list is signed in this session."""
        with self._stage(Stage.CONSISTENCY_CHECK, Stage.UNMASKING):
            self._survivors = tuple(sorted(who for (who,) in messages.read_records(self.session, survivors, Stage.SURVIVORS, SERVER)))
            require_enough(self.session, len(self._survivors), "sent a masked code")
            if self.client not in self._survivors or not set(self._survivors) <= set(self._sharers):
                raise ProtocolError("Expected survivors among those who shared seeds, this client with them, but got another list")
            return messages.write_records(self.session, Stage.CONSISTENCY_CHECK, self.client, [(self.identity.sign(self._signed()),)])

    def _signed(self) -> bytes:
        return messages.signed_survivors(self.session, self._seen, self._sharers, self._survivors)

    def unmask(self, request: bytes) -> bytes:
        """Return shares of survivors' own seeds and of dropped clients' mask keys.

        Refused unless the survivors are those that were signed for, the dropped the others who shared, and the threshold signed the same.
        """
        with self._stage(Stage.UNMASKING, None):
            session = self.session
            asked = messages.read_request(session, request)
            require_enough(session, len(asked.survivors), "are said to be survivors")
            if set(asked.survivors) & set(asked.dropped) or set(asked.survivors) | set(asked.dropped) != set(self._sharers):
                raise ProtocolError("Expected everybody who shared seeds to be asked for as survivors or as dropped, and nobody as both")
            if tuple(sorted(asked.survivors)) != self._survivors:
                raise ProtocolError("Expected the survivors that were signed for to be those that are asked for as survivors")
            require_enough(session, len(asked.signatures), "signed the survivors")
            signed = self._signed()
            for client, signature in asked.signatures.items():
                if client not in self._survivors:
                    raise ProtocolError(f"Expected signatures of survivors alone but got one of client {client}")
                verify(self.directory[client], signature, signed, f"client {client}")
            revealed = {client: self._shares[client][0] for client in asked.survivors}
            revealed |= {client: self._shares[client][1] for client in asked.dropped}
            return messages.write_records(session, Stage.UNMASKING, self.client, sorted(revealed.items()))


def session_of(state: bytes) -> bytes:
    """Return the id of the session that a suspended client takes part in."""
    id: bytes = unpack(state)[1]
    return id
