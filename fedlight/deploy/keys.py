"""A client's two keys in files, in OpenSSH's form: one for secure aggregation, one by which the network knows the node."""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat, load_ssh_private_key

from fedlight.core.errors import ConfigurationError
from fedlight.core.files import write_private
from fedlight.deploy.files import require_file

_KINDS: dict[str, tuple[type, str, str]] = {
    "node.identity": (Ed25519PrivateKey, "an Ed25519 key", "ed25519"),
    "flower.key": (EllipticCurvePrivateKey, "an EC key", "ecdsa -b 384"),
}
"""What each of the keys of a `node.yaml` that name a private key has to be, and how `ssh-keygen` makes it."""


def make_key(path: Path, key: str = "node.identity") -> None:
    """Write a new key for ``key`` of a `node.yaml` (for its owner alone) and its public half to ``path.pub``; never over an old one.

    The same as ``ssh-keygen -t ed25519 -N "" -f PATH``, or ``ssh-keygen -t ecdsa -b 384 -N "" -f PATH`` for ``flower.key``.
    """
    made = Ed25519PrivateKey.generate() if key == "node.identity" else generate_private_key(SECP384R1())
    write_private(path, made.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    path.with_name(f"{path.name}.pub").write_bytes(made.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n")


def require_key(path: Path, key: str, file: Path) -> None:
    """Raise ``ConfigurationError`` unless the file that a key of a `node.yaml` names holds a private key of the right kind."""
    require_file(path, key, file)
    kind, words, option = _KINDS[key]
    (other,) = _KINDS.keys() - {key}
    content = file.read_bytes()
    try:
        found: object = load_ssh_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        public = content.startswith((b"ssh-", b"ecdsa-"))
        got = "it is a public key, whose private half lies beside it" if public else f"it cannot be read ({error})"
    else:
        if isinstance(found, kind):
            return
        got = f"it is {_KINDS[other][1]}, as {other} has to be" if isinstance(found, _KINDS[other][0]) else "it is of another kind"
    raise ConfigurationError(
        f"Expected {key} in {path} to be a file with {words}, private, in OpenSSH's form and without a passphrase, but of {file} {got}: "
        f'ssh-keygen -t {option} -N "" -f FILE makes one'
    )
