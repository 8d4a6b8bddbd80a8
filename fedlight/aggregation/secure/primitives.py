"""The cryptography: thin wrappers that fix the parameters and turn every refusal into a ``ProtocolError``.

X25519 (RFC 7748), HKDF-SHA256 (RFC 5869), ChaCha20 and ChaCha20-Poly1305 (RFC 8439), Ed25519 (RFC 8032), Shamir's sharing over
GF(2^128). The tests run the RFCs' vectors through these functions.
"""

from __future__ import annotations

from fedlight.core.errors import ConfigurationError, ProtocolError

try:
    from Crypto.Protocol.SecretSharing import Shamir
    from cryptography.exceptions import InvalidSignature, InvalidTag
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
    from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
except ImportError as error:
    raise ConfigurationError(
        f"Expected the packages `cryptography` and `pycryptodome`, which secure aggregation needs, but could not import them ({error}): "
        "install them with pip install 'fedlight[secure]'"
    ) from error

KEY = 32
SECRET = 16
SIGNATURE = 64
TAG = 16

_NO_NONCE = bytes(12)


class KeyPair:
    """An X25519 key pair made of 32 private bytes; ``public`` has 32 bytes."""

    def __init__(self, private: bytes) -> None:
        self._private = X25519PrivateKey.from_private_bytes(private)
        self.public = self._private.public_key().public_bytes_raw()

    @property
    def secret(self) -> bytes:
        """The 32 private bytes that the pair was made of, as X25519 uses them."""
        return self._private.private_bytes_raw()

    def agree(self, public: bytes) -> bytes:
        """Return the secret (32 bytes) shared with the owner of ``public``.

        Raises:
            ProtocolError: if ``public`` is a point of low order, with which everybody shares the same secret.
        """
        try:
            return self._private.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError as error:
            raise ProtocolError("Expected an X25519 key but got a point of low order") from error


class Identity:
    """A client's long-lived Ed25519 key, made of 32 private bytes; ``public`` (32 bytes) is known to everybody beforehand."""

    def __init__(self, private: bytes) -> None:
        self._private = Ed25519PrivateKey.from_private_bytes(private)
        self.public = self._private.public_key().public_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        """Return the signature (64 bytes) of a message."""
        return self._private.sign(message)


def verify(public: bytes, signature: bytes, message: bytes, whose: str) -> None:
    """Raise ``ProtocolError`` naming ``whose`` signature is wrong unless it is the key's own of this message."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError) as error:
        raise ProtocolError(f"Expected a valid signature of {whose} but it does not fit the keys and the session") from error


def derive(secret: bytes, salt: bytes, label: bytes, length: int = KEY) -> bytes:
    """Return ``length`` bytes that only holders of the secret can know: HKDF-SHA256 with ``label`` for the info."""
    return HKDF(SHA256(), length, salt, label).derive(secret)


def keystream(key: bytes, length: int, nonce: bytes = _NO_NONCE, counter: int = 0) -> bytes:
    """Return ``length`` bytes of ChaCha20's stream. Every key here is used for one stream, so the nonce may stay zero."""
    cipher = Cipher(ChaCha20(key, counter.to_bytes(4, "little") + nonce), mode=None)
    return cipher.encryptor().update(bytes(length))


def seal(key: bytes, plain: bytes, bound_to: bytes, nonce: bytes = _NO_NONCE) -> bytes:
    """Return ``plain`` under ChaCha20-Poly1305, 16 bytes longer. Every key here seals one message, so the nonce may stay zero."""
    return ChaCha20Poly1305(key).encrypt(nonce, plain, bound_to)


def unseal(key: bytes, sealed: bytes, bound_to: bytes, whose: str, nonce: bytes = _NO_NONCE) -> bytes:
    """Return what was sealed; raises ``ProtocolError`` if it was changed, or sealed by or for somebody else or for another session."""
    try:
        return ChaCha20Poly1305(key).decrypt(nonce, sealed, bound_to)
    except InvalidTag as error:
        raise ProtocolError(
            f"Expected shares sealed by {whose} for this client and session but they were changed or belong elsewhere"
        ) from error


def split(secret: bytes, threshold: int, shares: int) -> list[bytes]:
    """Return ``shares`` shares of 16 bytes each of a secret of 16 bytes; any ``threshold`` of them tell it, fewer tell nothing."""
    return [share for _, share in Shamir.split(threshold, shares, secret, ssss=False)]


def combine(shares: dict[int, bytes]) -> bytes:
    """Return the secret of exactly ``threshold`` shares by their places (from 0). One that is wrong gives a wrong secret, silently."""
    return Shamir.combine([(place + 1, share) for place, share in shares.items()], ssss=False)
