"""What a server and a client in another process say to each other: a request in an envelope, and an answer that quotes nothing."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from enum import IntEnum
from importlib.metadata import version
from typing import NamedTuple

from fedlight.core.errors import MessageError
from fedlight.core.packing import pack, unpack
from fedlight.rounds.messages import Request

FORMAT = 1
"""Version of the envelope."""


class Letter(NamedTuple):
    """One message to a client, in two parts: what the server asks, and the download, which is the same for many clients."""

    question: bytes
    download: bytes


class Status(IntEnum):
    """How a client's answer begins; every status but the first two is a reason without details."""

    ANSWER = 0
    LACKS_SETTINGS = 1
    OTHER_VERSION = 2
    OTHER_NAME = 3
    NOT_ALLOWED = 4
    BAD_SETTINGS = 5
    NO_KEYS = 6
    NO_ROOM = 7
    FAILED = 8


REASONS = {
    Status.LACKS_SETTINGS: "it lacks the settings of the run, after they were sent",
    Status.OTHER_VERSION: "its fedlight has another version",
    Status.OTHER_NAME: "its node.yaml has another name than the server's list of nodes",
    Status.NOT_ALLOWED: "the run names a class that its node.yaml does not allow",
    Status.BAD_SETTINGS: "it cannot build what the run names",
    Status.NO_KEYS: "its identity key, or its directory of public keys, is missing or does not fit the list of nodes",
    Status.NO_ROOM: "it cannot write to its state folder",
    Status.FAILED: "it failed, for a reason that only its own log tells",
}
"""What the server says of a client that sends no answer: the client's own words could hold data."""


@dataclass(frozen=True)
class Envelope:
    """A request, and what a client has to know before it reads it."""

    run: str  # names the run; what clients keep of different runs is kept apart
    client: int  # its number in the run
    name: str  # its name in the server's list of nodes
    digest: bytes  # 32 bytes, of the settings of the run
    settings: str  # the settings themselves (`deploy.settings`), for a client that lacks them; else empty
    request: bytes  # without its download

    def to_bytes(self) -> bytes:
        """Return the envelope as bytes."""
        return pack([FORMAT, version("fedlight"), self.run, self.client, self.name, self.digest, self.settings, self.request])

    @classmethod
    def parse(cls, data: bytes) -> Envelope:
        """Return what ``to_bytes`` wrote; raises ``OtherVersionError`` if another fedlight wrote it, ``MessageError`` if it is damaged."""
        values = unpack(data)
        if not isinstance(values, list) or len(values) < 2:
            raise MessageError("Expected an envelope but got something else")
        if values[:2] != [FORMAT, version("fedlight")]:
            raise OtherVersionError(f"Expected a message of fedlight {version('fedlight')} but got one of {values[1]!r:.40}")
        kinds = (str, int, str, bytes, str, bytes)
        if len(values) != 8 or not all(isinstance(value, kind) for value, kind in zip(values[2:], kinds, strict=True)):
            raise MessageError("Expected an envelope but its parts are of other kinds")
        if not values[2].isalnum():
            raise MessageError(f"Expected letters and digits to name a run but got {values[2]!r:.40}")
        return cls(*values[2:])


class OtherVersionError(MessageError):
    """A message of another version of fedlight."""


def settings_digest(settings: str) -> bytes:
    """Return the digest (32 bytes) of settings."""
    return hashlib.sha256(settings.encode()).digest()


def split(request: Request) -> tuple[bytes, bytes]:
    """Return a request without its download, and the download (empty if there is none)."""
    return replace(request, download=None).to_bytes(), b"" if request.download is None else request.download.to_bytes()


def answer(status: Status, reply: bytes = b"") -> bytes:
    """Return the bytes of an answer."""
    return bytes([status]) + reply


def read_answer(data: bytes) -> tuple[Status, bytes]:
    """Return status and reply of an answer; raises ``MessageError`` if it is none."""
    if not data or data[0] not in set(Status):
        raise MessageError("Expected an answer but its first byte is no status")
    return Status(data[0]), data[1:]
