"""The bytes: a documented layout, a recorded transcript, and damage of every kind."""

from __future__ import annotations

import contextlib
import hashlib
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlight.aggregation.secure import Session
from fedlight.aggregation.secure import messages as wire
from fedlight.aggregation.secure.messages import HEADER, SERVER, Stage
from fedlight.core.digits import digit_group
from fedlight.core.errors import MessageError, ProtocolError
from tests.aggregation.parties import Play

Reader = Callable[[bytes], object]


def recorded(play: Play) -> list[bytes]:
    """Return one message of every stage of a whole session in which client 3 sends no code, in the order they were sent."""
    server, clients = play.server, play.clients
    keys = play.keys()
    for i, message in keys.items():
        server.collect_keys(i, message)
    roster = server.roster()
    shares = {i: client.share(roster) for i, client in clients.items()}
    for i, message in shares.items():
        server.collect_shares(i, message)
    inboxes = {i: server.inbox(i) for i in server.sharers()}
    codes = {i: clients[i].masked_code(inbox, play.codes[i]) for i, inbox in inboxes.items() if i != 3}
    for i, message in codes.items():
        server.collect_masked(i, message)
    survivors = server.survivor_list()
    signatures = {i: clients[i].consistency(survivors) for i in codes}
    for i, message in signatures.items():
        server.collect_signature(i, message)
    request = server.request()
    revealed = {i: clients[i].unmask(request) for i in codes}
    return [keys[1], roster, shares[1], inboxes[1], codes[1], survivors, signatures[1], request, revealed[1]]


def readers(session: Session) -> list[Reader]:
    """Return what reads each of them."""
    return [
        lambda m: wire.read_records(session, m, Stage.ADVERTISE_KEYS, 1),
        lambda m: wire.read_records(session, m, Stage.ROSTER, SERVER),
        lambda m: dict(wire.read_records(session, m, Stage.SHARE_KEYS, 1)),
        lambda m: dict(wire.read_records(session, m, Stage.INBOX, SERVER)),
        lambda m: session.format.unpack(wire.read_masked(session, m, 1)),
        lambda m: wire.read_records(session, m, Stage.SURVIVORS, SERVER),
        lambda m: wire.read_records(session, m, Stage.CONSISTENCY_CHECK, 1),
        lambda m: wire.read_request(session, m),
        lambda m: dict(wire.read_records(session, m, Stage.UNMASKING, 1)),
    ]


PLAY = Play(limits=((7, 40), (3, 7)))
TRANSCRIPT = list(zip(recorded(PLAY), readers(PLAY.session), strict=True))


def stage_id(stage: int) -> str:
    return Stage(stage).name.lower()


every_stage = pytest.mark.parametrize("stage", range(len(Stage)), ids=stage_id)


@every_stage
def test_a_whole_message_is_read(stage):
    message, read = TRANSCRIPT[stage]
    read(message)
    assert message[3] == stage


@every_stage
def test_a_truncated_message_is_refused(stage):
    message, read = TRANSCRIPT[stage]
    for length in [*range(HEADER.size + 3), *range(HEADER.size + 3, len(message), 7), len(message) - 1]:
        with pytest.raises(MessageError):
            read(message[:length])


@every_stage
def test_an_oversize_message_is_refused(stage):
    message, read = TRANSCRIPT[stage]
    for more in (b"\0", message, bytes(10**6)):
        with pytest.raises(MessageError):
            read(message + more)


@every_stage
def test_every_flipped_bit_is_seen(stage):
    message, read = TRANSCRIPT[stage]
    for place in range(8 * len(message)):
        damaged = bytearray(message)
        damaged[place // 8] ^= 1 << place % 8
        with pytest.raises(MessageError):
            read(bytes(damaged))


@every_stage
@pytest.mark.parametrize("changes", [{"codec": 78}, {"round": 4}, {"id": b"\1" * 16}], ids=["codec", "round", "session"])
def test_another_session_does_not_read_it(stage, changes):
    others = readers(replace(PLAY.session, **changes))
    with pytest.raises(MessageError, match=r"Expected (codec fingerprint|round|session)"):
        others[stage](TRANSCRIPT[stage][0])


def forged(message: bytes, entries: int, body: bytes) -> bytes:
    """A message with a header of the right session, another number of entries and another body, and a checksum that fits."""
    fields = list(HEADER.unpack_from(message))[:-1]
    fields[7] = entries
    fixed = struct.pack("<2sBBBIIII16s", *fields)
    return fixed + zlib.crc32(fixed + body).to_bytes(4, "little") + body


@every_stage
def test_a_number_of_entries_that_does_not_fit_is_refused_before_anything_is_made_of_it(stage):
    message, read = TRANSCRIPT[stage]
    right, body = HEADER.unpack_from(message)[7], message[HEADER.size :]
    read(forged(message, right, body))
    for entries in {0, 2, 4, 5, 2**31, 2**32 - 1} - {right}:
        with pytest.raises(MessageError):
            read(forged(message, entries, body))


@given(st.integers(0, len(Stage) - 1), st.integers(0, 5), st.integers(0, 600), st.randoms(use_true_random=False))
def test_whatever_a_body_holds_there_is_a_typed_error_or_a_result(stage, entries, length, chance):
    message, read = TRANSCRIPT[stage]
    body = chance.randbytes(length)
    with contextlib.suppress(MessageError):
        read(forged(message, entries, body))


@given(st.integers(0, len(Stage) - 1), st.binary(max_size=200))
def test_junk_is_refused(stage, junk):
    with pytest.raises(MessageError):
        TRANSCRIPT[stage][1](junk)


def test_fields_are_named_in_the_error():
    message, read = TRANSCRIPT[Stage.MASKED_INPUT]
    fields = {0: "magic", 2: "version", 3: "stage", 4: "kind", 5: "round", 9: "sender", 13: "codec fingerprint", 21: "session"}
    for at, name in fields.items():
        damaged = bytearray(message)
        damaged[at] ^= 1
        with pytest.raises(MessageError, match=f"Expected {name} .* in the header of a masked_input message"):
            read(bytes(damaged))
    damaged = bytearray(message)
    damaged[-1] ^= 1
    with pytest.raises(MessageError, match="checksum does not fit"):
        read(bytes(damaged))


def test_a_recorded_masked_code_opens_with_struct_alone():
    """As the documentation of ``messages.py`` says; and nothing but masked words is in it."""
    modulus = 2 * Play().session.clients * 7 + 1
    k, b = digit_group(modulus)
    play = Play(limits=((7, 4 * k),))
    message = play.clients[1].masked_code(play.inboxes()[1], play.codes[1])
    magic, version, stage, kind, round, sender, codec, entries, session, checksum = struct.unpack_from("<2sBBBIIII16sI", message)
    assert (magic, version, stage, round, sender, codec, entries) == (b"SA", 2, 4, 3, 1, 77, 4 * k)
    assert session == play.session.id and checksum == zlib.crc32(message[:37] + message[41:])
    number = int.from_bytes(message[41:], "little")
    assert kind == (modulus - 1).bit_length()
    words = [(number >> (b * (j // k))) % 2**b // modulus ** (j % k) % modulus for j in range(entries)]
    assert words == play.session.format.unpack(message[41:]).tolist()
    assert number >> (b * entries // k) == 0 and len(message) == 41 + -(-b * entries // k // 8)
    assert (play.session.format.integers(np.array(words, np.uint64)) == play.codes[1]).mean() < 0.3


def test_the_request_is_checked_for_lists_that_overlap():
    play = Play(5, 3)
    request = wire.read_request(play.session, play.request(silent=(4,)))
    for survivors, dropped in (((0, 1, 2, 3), (3, 4)), ((0, 1, 1, 3), (4,))):
        with pytest.raises(ProtocolError, match="listed twice"):
            wire.read_request(play.session, wire.write_request(play.session, replace(request, survivors=survivors, dropped=dropped)))


def test_golden_transcript(monkeypatch):
    """With the entropy of ``parties.counting`` every byte of a session is what it was when this was written: a change of the protocol
    has to change its version."""
    chance = random.Random(0)
    monkeypatch.setattr("Crypto.Protocol.SecretSharing.rng", chance.randbytes)
    digest = hashlib.sha256(b"".join(recorded(Play(limits=((7, 40), (3, 7))))))
    assert digest.hexdigest() == "2d2d2156a605d09c802ff9890d9fe2ee153baf18740617e6638214bc448601de"
