"""Identity keys of clients in files, in OpenSSH's form."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat


def make_identity(path: Path) -> None:
    """Write a new Ed25519 key to ``path`` (for its owner alone) and its public half to ``path.pub``; never over an old one.

    The same as ``ssh-keygen -t ed25519 -N "" -f PATH``.
    """
    key = Ed25519PrivateKey.generate()
    write_private(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    path.with_name(f"{path.name}.pub").write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n")


def write_private(path: Path, content: bytes) -> None:
    """Write a new file that its owner alone can read; raises ``FileExistsError`` if it is there."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
