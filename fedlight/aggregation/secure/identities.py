"""Identity keys: of simulated clients in memory; in a deployment each lies with its client, and the public ones are known beforehand."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from fedlight.aggregation.secure.primitives import KEY, Identity
from fedlight.core.errors import ConfigurationError

K = TypeVar("K", Ed25519PublicKey, Ed25519PrivateKey)


class Identities(Mapping[int, bytes]):
    """Simulated clients' long-lived keys, made when first needed and kept in memory: a directory of public keys (32 bytes) by client."""

    def __init__(self, entropy: Callable[[int], bytes] = secrets.token_bytes) -> None:
        self._entropy = entropy
        self._keys: dict[int, Identity] = {}

    def of(self, client: int) -> Identity:
        """Return a client's key."""
        if client not in self._keys:
            self._keys[client] = Identity(self._entropy(KEY))
        return self._keys[client]

    def __getitem__(self, client: int) -> bytes:
        return self.of(client).public

    def __contains__(self, client: object) -> bool:
        return isinstance(client, int)  # every client has one; asking makes none

    def __iter__(self) -> Iterator[int]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class Directory(Mapping[int, bytes]):
    """Public identity keys (32 bytes) by client, read from a folder of ``NAME.pub`` files, and this client's own key if it has one.

    Keys are Ed25519 in OpenSSH's form: ``ssh-keygen -t ed25519 -N "" -f NAME`` makes a pair.

    Args:
        folder: the folder of public keys, which came to this machine on a way that the server has no hand in.
        names: the names of all clients; a client's number is its place.
        own: the file of this client's private key; None at the server.

    Raises:
        ConfigurationError: if a key is missing or of another kind, or two clients have the same.
    """

    def __init__(self, folder: Path, names: Sequence[str], own: Path | None = None) -> None:
        keys = (_load(folder / f"{name}.pub", load_ssh_public_key, Ed25519PublicKey) for name in names)  # type: ignore[type-abstract]
        self._keys = {client: key.public_bytes_raw() for client, key in enumerate(keys)}
        if len(set(self._keys.values())) < len(self._keys):
            raise ConfigurationError(f"Expected a key of its own for each client but two files in {folder} hold the same: replace one")
        read = partial(load_ssh_private_key, password=None)
        key = None if own is None else _load(own, read, Ed25519PrivateKey)  # type: ignore[type-abstract]
        self._own = None if key is None else Identity(key.private_bytes_raw())
        if self._own is not None and self._own.public not in self._keys.values():
            raise ConfigurationError(f"Expected the public key of {own} in {folder} but it is not there: copy {own}.pub to the directory")

    def of(self, client: int) -> Identity:
        """Return this client's own key; no other is here."""
        if self._own is None or self._own.public != self._keys.get(client):
            raise ConfigurationError(f"Expected the identity key of client {client} but the one here is of another")
        return self._own

    def __getitem__(self, client: int) -> bytes:
        return self._keys[client]

    def __iter__(self) -> Iterator[int]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _load(path: Path, load: Callable[[bytes], object], kind: type[K]) -> K:
    try:
        key = load(path.read_bytes())
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigurationError(f"Expected a key in OpenSSH's form, without a passphrase, in {path} but: {error}") from error
    if not isinstance(key, kind):
        raise ConfigurationError(f'Expected an Ed25519 key in {path} but got another kind: make one with ssh-keygen -t ed25519 -N ""')
    return key
