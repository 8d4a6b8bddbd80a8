"""What everybody agrees on before an attempt at a round: one session, one set of masks."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from fedlight.aggregation.secure.primitives import KeyPair, derive
from fedlight.aggregation.secure.sums import SumFormat
from fedlight.core.errors import ConfigurationError, ProtocolError

PROTOCOL = 3
LEAST_CLIENTS = 3
SESSION_BYTES = 16


def default_threshold(clients: int) -> int:
    """Return how many clients must answer at every stage if nothing else is said: more than two thirds.

    >>> [default_threshold(n) for n in (3, 10, 20, 100)]
    [3, 7, 14, 67]
    """
    return 2 * clients // 3 + 1


def check_threshold(clients: int, threshold: int) -> None:
    """Raise ``ConfigurationError`` unless a cohort and a threshold can hide a summand.

    With a threshold of half the clients or fewer, a server that tells two halves of the cohort two different stories could have both
    masks of one client taken off.
    """
    if clients < LEAST_CLIENTS:
        raise ConfigurationError(
            f"Expected a cohort of at least {LEAST_CLIENTS} clients but got {clients}: the sum of fewer tells each what the other sent. "
            "Sample more clients"
        )
    if not clients / 2 < threshold <= clients:
        raise ConfigurationError(
            f"Expected a `threshold` of more than half of {clients} clients, and no more than all, but got {threshold}: "
            f"leave it out for {default_threshold(clients)}"
        )


@dataclass(frozen=True)
class Session:
    """The public parameters of one attempt at a round. Every key, signature and sealed share is bound to all of them.

    Each key that both sides derive is used once.

    Args:
        id: 16 random bytes that no other attempt has.
        round: the round.
        format: the sums' format, with the declared cohort.
        threshold: how many clients must answer at every stage.
        codec: the fingerprint that the codec's messages carry.
        encoder: digest (32 bytes) of the encoder that codes are made with.
        model: digest (32 bytes) of the global model that clients start from.
        broadcast: digest (32 bytes) of the pass's context (``core.digest.digest_context``): a gain or a clipping
            norm that differed between clients would let one code outweigh the rest of the sum.
        training: digest (32 bytes) of the settings that the client trains by: a learning rate of nearly 0 for all but one would, too.

    Raises:
        ConfigurationError: if the cohort or the threshold is too small, or an identifier has another length.
    """

    id: bytes
    round: int
    format: SumFormat
    threshold: int
    codec: int
    encoder: bytes
    model: bytes
    broadcast: bytes
    training: bytes

    def __post_init__(self) -> None:
        check_threshold(self.format.clients, self.threshold)
        for name in ("id", "encoder", "model", "broadcast", "training"):
            value, size = getattr(self, name), SESSION_BYTES if name == "id" else 32
            if len(value) != size:
                raise ConfigurationError(f"Expected `{name}` of {size} bytes but got {len(value)}")

    @property
    def clients(self) -> int:
        """The declared cohort."""
        return self.format.clients

    @cached_property
    def config(self) -> bytes:
        """Digest (32 bytes) of protocol version, cohort, threshold, largest weight and every modulus."""
        digest = hashlib.sha256(struct.pack("<IIII", PROTOCOL, self.clients, self.threshold, self.format.max_weight))
        for (modulus, count), (limit, _) in zip(self.format.moduli, (*self.format.limits, (0, 0)), strict=False):
            digest.update(struct.pack("<QII", modulus, count, limit))
        return digest.digest()

    @cached_property
    def context(self) -> bytes:
        """Digest (32 bytes) of session, round, configuration, and of what the client holds and of the context."""
        fixed = struct.pack("<16sII", self.id, self.round & 0xFFFFFFFF, self.codec)
        held = self.encoder + self.model + self.broadcast + self.training
        return hashlib.sha256(b"fedlight secure aggregation" + fixed + self.config + held).digest()

    def mask_pair(self, seed: bytes) -> KeyPair:
        """Return a client's pair of mask keys, made of its seed (16 bytes: X25519 holds out no longer)."""
        return KeyPair(derive(seed, self.context, b"mask key"))

    def self_mask(self, seed: bytes, client: int) -> bytes:
        """Return the key of a client's own mask."""
        return derive(seed, self.context, b"own mask" + struct.pack("<I", client))

    def commitment(self, seed: bytes, client: int) -> bytes:
        """Return what a client says of the seed of its own mask beforehand: it tells nothing, but a wrong seed apart."""
        return derive(seed, self.context, b"commitment" + struct.pack("<I", client))

    def pair_mask(self, secret: bytes, one: int, other: int) -> bytes:
        """Return the key of the mask that two clients share; one adds it, the other takes it away."""
        return derive(secret, self.context, b"pair mask" + struct.pack("<II", min(one, other), max(one, other)))

    def channel(self, secret: bytes, sender: int, receiver: int) -> bytes:
        """Return the key that one client seals its shares for another with."""
        return derive(secret, self.context, b"shares" + struct.pack("<II", sender, receiver))

    def bound(self, sender: int, receiver: int) -> bytes:
        """Return what sealed shares are bound to."""
        return self.context + struct.pack("<II", sender, receiver)


def require_enough(session: Session, count: int, what: str) -> None:
    """Raise ``ProtocolError`` unless the threshold is reached and the declared cohort is not exceeded."""
    if count < session.threshold:
        raise ProtocolError(f"Expected at least {session.threshold} clients that {what} but got {count}: the attempt ends here")
    if count > session.clients:
        raise ProtocolError(f"Expected at most the declared cohort of {session.clients} clients that {what} but got {count}")


def require_known(directory: Mapping[int, bytes], client: int) -> None:
    """Raise ``ProtocolError`` unless the client's identity key is known."""
    if client not in directory:
        raise ProtocolError(f"Expected clients whose identity keys are known but got client {client}")
