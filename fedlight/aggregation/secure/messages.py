"""The bytes of every message: a strict header of 41 bytes, then records of fixed size or packed words. Little-endian throughout.

Header, ``struct`` format ``<2sBBBIIII16sI``:

| field | what it says |
|---|---|
| magic | ``SA`` |
| version | 2 |
| stage | which message this is (``Stage``) |
| kind | of masked codes the bits of the largest number, 255 where they differ; else 0 |
| round | the round |
| sender | the client's number; 0xFFFFFFFF for the server |
| codec | fingerprint of the codec |
| entries | number of records, or of masked coordinates |
| session | 16 bytes that no other attempt at a round has |
| checksum | CRC-32 of the message without this field: it tells damage, not malice |

Records:

| stage | from | each |
|---|---|---|
| 0 keys | client | ``<32s32s32s64s``: channel key, mask key, commitment to the own mask's seed, signature of the three |
| 1 roster | server | ``<I`` client, then its record of stage 0 |
| 2 shares | client | ``<I48s``: receiver, sealed shares (of the own mask's seed, of the mask key's: 16 bytes each) |
| 3 inbox | server | ``<I48s``: sender, sealed shares |
| 4 masked | client | numbers in groups of ``k`` digits to the base of their modulus, ``b`` bits a group (``SumFormat``, ``digit_group``) |
| 5 survivors | server | ``<I``: a client whose masked code is in the sum |
| 6 signature | client | ``<64s``: of roster, senders of shares and survivors |
| 7 request | server | ``<II`` numbers of dropped, signatures; ``<I`` survivors (``entries``); ``<I`` dropped; ``<I64s`` client, signature |
| 8 revealed shares | client | ``<I16s``: whose seed, share of it |

A masked code of one modulus ``M``, whose length is a multiple of ``k``, opened without this library::

    header = struct.Struct("<2sBBBIIII16sI").unpack_from(message)
    number = int.from_bytes(message[41:], "little")
    words = [(number >> (b * (j // k))) % 2**b // M ** (j % k) % M for j in range(header[7])]

Nothing is allocated before the length of a message and the number of its records have been checked against the session.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

from fedlight.aggregation.secure.primitives import KEY, SECRET, SIGNATURE, TAG
from fedlight.aggregation.secure.session import Session
from fedlight.core.errors import MessageError, ProtocolError

MAGIC = b"SA"
VERSION = 2
HEADER = struct.Struct("<2sBBBIIII16sI")
SERVER = 0xFFFFFFFF

_UNSUMMED = struct.Struct("<2sBBBIIII16s")
_CLIENT = struct.Struct("<I")
_COUNTS = struct.Struct("<II")
_SIGNED = struct.Struct(f"<I{SIGNATURE}s")
_SEALED = struct.Struct(f"<I{2 * SECRET + TAG}s")


class Stage(IntEnum):
    """Which message this is, in the order of the protocol."""

    ADVERTISE_KEYS = 0
    ROSTER = 1
    SHARE_KEYS = 2
    INBOX = 3
    MASKED_INPUT = 4
    SURVIVORS = 5
    CONSISTENCY_CHECK = 6
    REQUEST = 7
    UNMASKING = 8


_RECORDS: dict[Stage, tuple[struct.Struct, int, Callable[[int], int]]] = {
    Stage.ADVERTISE_KEYS: (struct.Struct(f"<{KEY}s{KEY}s{KEY}s{SIGNATURE}s"), 1, lambda clients: 1),
    Stage.ROSTER: (struct.Struct(f"<I{KEY}s{KEY}s{KEY}s{SIGNATURE}s"), 1, lambda clients: clients),
    Stage.SHARE_KEYS: (_SEALED, 0, lambda clients: clients - 1),
    Stage.INBOX: (_SEALED, 0, lambda clients: clients - 1),
    Stage.SURVIVORS: (_CLIENT, 0, lambda clients: clients),
    Stage.CONSISTENCY_CHECK: (struct.Struct(f"<{SIGNATURE}s"), 1, lambda clients: 1),
    Stage.UNMASKING: (struct.Struct(f"<I{SECRET}s"), 1, lambda clients: clients),
}
"""The records of a stage, the least number of them, and the largest for the declared cohort; two stages have none."""


class Keys(NamedTuple):
    """What a client advertises: two X25519 keys, a commitment to its own mask's seed, and its signature of them."""

    channel: bytes
    mask: bytes
    commitment: bytes
    signature: bytes

    def signed(self, session: Session, client: int) -> bytes:
        """Return what the signature is of."""
        return b"fedlight keys" + session.context + _CLIENT.pack(client) + self.channel + self.mask + self.commitment


@dataclass(frozen=True)
class Request:
    """What the server asks for at the end: whose own masks (``survivors``) and whose mask keys (``dropped``), and who signed that."""

    survivors: tuple[int, ...]
    dropped: tuple[int, ...]
    signatures: dict[int, bytes]


def signed_survivors(session: Session, roster: bytes, sharers: Sequence[int], survivors: Sequence[int]) -> bytes:
    """Return what clients sign before they tell shares: the keys they saw, whose shares they hold, and who survived."""
    lists = b"".join(_CLIENT.pack(len(clients)) + pack_clients(clients) for clients in (sharers, survivors))
    return b"fedlight survivors" + session.context + roster + lists


def digest(roster: bytes) -> bytes:
    """Return what stands for the roster in what clients sign."""
    return hashlib.sha256(roster).digest()


def pack_clients(clients: Sequence[int]) -> bytes:
    """Return the clients' numbers in ascending order, 4 bytes each."""
    return struct.pack(f"<{len(clients)}I", *sorted(clients))


def write(session: Session, stage: Stage, sender: int, entries: int, body: bytes) -> bytes:
    """Return header and body."""
    kind = session.format.kind if stage is Stage.MASKED_INPUT else 0
    fixed = _UNSUMMED.pack(MAGIC, VERSION, stage, kind, session.round & 0xFFFFFFFF, sender, session.codec, entries, session.id)
    return fixed + zlib.crc32(body, zlib.crc32(fixed)).to_bytes(4, "little") + body


def write_records(session: Session, stage: Stage, sender: int, records: Collection[tuple[Any, ...]]) -> bytes:
    """Return the message of a stage that consists of records, one behind the other."""
    return write(session, stage, sender, len(records), b"".join(_RECORDS[stage][0].pack(*record) for record in records))


def write_request(session: Session, request: Request) -> bytes:
    """Return the message of stage 7."""
    counts = _COUNTS.pack(len(request.dropped), len(request.signatures))
    signatures = b"".join(_SIGNED.pack(*item) for item in sorted(request.signatures.items()))
    body = counts + pack_clients(request.survivors) + pack_clients(request.dropped) + signatures
    return write(session, Stage.REQUEST, SERVER, len(request.survivors), body)


def read(session: Session, message: bytes, stage: Stage, sender: int, most_bytes: int) -> tuple[int, memoryview]:
    """Return (entries, body) of a message after checking its length and every field of its header.

    Raises:
        MessageError: if it is truncated, longer than ``most_bytes`` allow, damaged, or of another session, round, codec, stage or sender.
    """
    if not HEADER.size <= len(message) <= HEADER.size + most_bytes:
        raise MessageError(f"Expected a message of {HEADER.size} to {HEADER.size + most_bytes} bytes but got {len(message)}")
    magic, version, at, kind, round, by, codec, entries, id, checksum = HEADER.unpack_from(message)
    checks = (
        ("magic", MAGIC, magic),
        ("version", VERSION, version),
        ("stage", int(stage), at),
        ("kind", session.format.kind if stage is Stage.MASKED_INPUT else 0, kind),
        ("round", session.round & 0xFFFFFFFF, round),
        ("sender", sender, by),
        ("codec fingerprint", session.codec, codec),
        ("session", session.id.hex(), id.hex()),
    )
    for name, want, got in checks:
        if want != got:
            raise MessageError(f"Expected {name} {want!r} in the header of a {stage.name.lower()} message but got {got!r}")
    view = memoryview(message)
    if zlib.crc32(view[HEADER.size :], zlib.crc32(view[: _UNSUMMED.size])) != checksum:
        raise MessageError(
            f"Expected a {stage.name.lower()} message that is whole but its checksum does not fit: it was damaged on the way"
        )
    return entries, view[HEADER.size :]


def read_records(session: Session, message: bytes, stage: Stage, sender: int) -> list[tuple[Any, ...]]:
    """Return the records of a stage's message. Signatures are not checked here.

    Raises:
        MessageError: if the message is malformed, or has more or fewer records than the stage may.
        ProtocolError: if a client is listed twice.
    """
    record, least, most = _RECORDS[stage][0], _RECORDS[stage][1], _RECORDS[stage][2](session.clients)
    entries, body = read(session, message, stage, sender, most * record.size)
    if not least <= entries <= most or len(body) != entries * record.size:
        raise MessageError(
            f"Expected {least} to {most} records of {record.size} bytes in a {stage.name.lower()} message but got {entries} in {len(body)}"
        )
    return _distinct([*record.iter_unpack(body)])


def read_masked(session: Session, message: bytes, client: int) -> memoryview:
    """Return the packed words of a masked code."""
    entries, body = read(session, message, Stage.MASKED_INPUT, client, session.format.payload_bytes)
    if entries != session.format.length or len(body) != session.format.payload_bytes:
        raise MessageError(
            f"Expected {session.format.length} masked coordinates in {session.format.payload_bytes} bytes but got {entries} in {len(body)}"
        )
    return body


def read_request(session: Session, message: bytes) -> Request:
    """Return what the server asks for.

    Raises:
        MessageError: if the message is malformed.
        ProtocolError: if a client is listed twice, or both as survivors and as dropped.
    """
    most = session.clients
    survivors, body = read(session, message, Stage.REQUEST, SERVER, _COUNTS.size + most * (2 * _CLIENT.size + _SIGNED.size))
    if len(body) < _COUNTS.size:
        raise MessageError(f"Expected a request of at least {_COUNTS.size} bytes but got {len(body)}")
    dropped, signed = _COUNTS.unpack_from(body)
    sizes = [survivors * _CLIENT.size, dropped * _CLIENT.size, signed * _SIGNED.size]
    if max(survivors, dropped, signed) > most or len(body) != _COUNTS.size + sum(sizes):
        raise MessageError(f"Expected lists of at most {most} clients that fill the request but got {survivors}, {dropped} and {signed}")
    end = _COUNTS.size + sizes[0] + sizes[1]
    clients = _distinct([*_CLIENT.iter_unpack(body[_COUNTS.size : end])])
    signatures = dict(_distinct([*_SIGNED.iter_unpack(body[end:])]))
    return Request(tuple(c for (c,) in clients[:survivors]), tuple(c for (c,) in clients[survivors:]), signatures)


def _distinct(records: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    if len({record[0] for record in records}) != len(records):
        raise ProtocolError("Expected every client once but one is listed twice")
    return records
