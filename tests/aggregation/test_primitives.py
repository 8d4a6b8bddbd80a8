from __future__ import annotations

import ast
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

import fedlight.aggregation.secure
from fedlight.aggregation.secure import Identities
from fedlight.aggregation.secure.primitives import (
    Identity,
    KeyPair,
    combine,
    derive,
    keystream,
    seal,
    split,
    unseal,
    verify,
)
from fedlight.core.errors import ProtocolError
from tests.federation import environment

h = bytes.fromhex


def test_x25519_rfc_7748_section_6_1():
    alice = KeyPair(h("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a"))
    bob = KeyPair(h("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb"))
    assert alice.public == h("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
    assert bob.public == h("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f")
    secret = h("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
    assert alice.agree(bob.public) == bob.agree(alice.public) == secret


def test_hkdf_rfc_5869_case_1():
    okm = "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    assert derive(b"\x0b" * 22, h("000102030405060708090a0b0c"), h("f0f1f2f3f4f5f6f7f8f9"), 42) == h(okm)


def test_chacha20_rfc_8439_section_2_3_2():
    stream = (
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4ed2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
    )
    assert keystream(bytes(range(32)), 64, h("000000090000004a00000000"), 1) == h(stream)


def test_chacha20_rfc_8439_appendix_a_1_which_masks_are_drawn_like():
    """Zero nonce, counter from 0: a longer stream begins with the shorter one."""
    first = (
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
    )
    assert keystream(bytes(32), 64) == h(first) == keystream(bytes(32), 1000)[:64]


def test_chacha20_poly1305_rfc_8439_section_2_8_2():
    plain = b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, sunscreen would be it."
    sealed = (
        "d31a8d34648e60db7b86afbc53ef7ec2a4aded51296e08fea9e2b5a736ee62d63dbea45e8ca9671282fafb69da92728b1a71de0a9e060b29"
        "05d6a5b67ecd3b3692ddbd7f2d778b8c9803aee328091b58fab324e4fad675945585808b4831d7bc3ff4def08e4b7a9de576d26586cec64b"
        "61161ae10b594f09e26a7e902ecbd0600691"
    )
    key, bound, nonce = bytes(range(0x80, 0xA0)), h("50515253c0c1c2c3c4c5c6c7"), h("070000004041424344454647")
    assert seal(key, plain, bound, nonce) == h(sealed)
    assert unseal(key, h(sealed), bound, "a client", nonce) == plain


def test_what_was_sealed_opens_for_nobody_else():
    sealed = seal(bytes(32), b"share", b"context 1 2")
    assert unseal(bytes(32), sealed, b"context 1 2", "client 1") == b"share"
    for key, box, bound in (
        (b"\1" + bytes(31), sealed, b"context 1 2"),
        (bytes(32), sealed, b"context 2 1"),
        (bytes(32), sealed[:-1] + bytes([sealed[-1] ^ 1]), b"context 1 2"),
        (bytes(32), sealed[:5], b"context 1 2"),
    ):
        with pytest.raises(ProtocolError, match="sealed by client 1"):
            unseal(key, box, bound, "client 1")


LOW_ORDER = [
    "00" * 32,
    "01" + "00" * 31,
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
]


@pytest.mark.parametrize("point", LOW_ORDER)
def test_points_of_low_order_are_refused(point):
    with pytest.raises(ProtocolError, match="low order"):
        KeyPair(bytes(range(32))).agree(h(point))


def test_signatures_are_of_one_key_and_one_message():
    mine, other = Identity(bytes(32)), Identity(b"\1" * 32)
    signature = mine.sign(b"message")
    verify(mine.public, signature, b"message", "mine")
    for public, signed, message in (
        (other.public, signature, b"message"),
        (mine.public, signature, b"massage"),
        (mine.public, bytes(64), b"message"),
        (b"\xff" * 32, signature, b"message"),
    ):
        with pytest.raises(ProtocolError, match="signature of mine"):
            verify(public, signed, message, "mine")


def test_any_threshold_of_shares_tells_the_secret_and_fewer_tell_another():
    secret = bytes(range(16))
    shares = dict(enumerate(split(secret, 3, 5)))
    for chosen in itertools.combinations(shares, 3):
        assert combine({place: shares[place] for place in chosen}) == secret
    for chosen in itertools.combinations(shares, 2):
        assert combine({place: shares[place] for place in chosen}) != secret


def test_a_corrupt_share_makes_another_secret_without_a_word():
    """Which is why seeds are committed to."""
    shares = dict(enumerate(split(bytes(16), 2, 3)))
    assert combine({0: shares[0], 1: bytes([shares[1][0] ^ 1]) + shares[1][1:]}) != bytes(16)


def names_in(source: str) -> set[str]:
    """Return the dotted names of everything that is imported, and the attributes that are used."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
    return names


def other_generators(names: set[str]) -> set[str]:
    """Return the names that lead to a generator of numpy, torch or the standard library."""
    return {name for name in names for part in name.split(".") if part == "torch" or part.startswith(("rand", "default_rng"))}


@pytest.mark.parametrize(
    "source",
    [
        "import random",
        "import random as chance",
        "from random import getrandbits",
        "import numpy.random",
        "from numpy import random",
        "from numpy.random import Generator",
        "from numpy import random as chance",
        "import numpy as np; np.random.bytes(3)",
        "from torch import randint",
        "import torch",
        "from fedlight.core.random import numpy_generator",
        "from fedlight.core import random",
    ],
)
def test_every_way_to_another_generator_is_seen(source):
    assert other_generators(names_in(source))


def test_secrets_come_from_the_operating_system_alone():
    """No generator of numpy, torch or the standard library is named in the package, and seeds come from `secrets`."""
    files = sorted(Path(fedlight.aggregation.secure.__file__).parent.glob("*.py"))
    names = {file.name: names_in(file.read_text()) for file in files}
    assert len(files) >= 8 and not [name for name in names if other_generators(names[name])]
    assert {name for name in names if "secrets" in names[name]} == {"client.py", "identities.py"}


def test_asking_whether_a_simulated_client_has_a_key_makes_none() -> None:
    identities = Identities()
    assert 3 in identities and not len(identities)
    assert identities[3] == identities.of(3).public and list(identities) == [3]


@pytest.mark.slow
def test_without_the_packages_the_way_out_is_told():
    code = (
        "import sys\n"
        "sys.modules['Crypto'] = None\n"
        "from fedlight.aggregation import SecureAggregator\n"
        "try:\n    SecureAggregator(cohort=10)\n"
        "except ValueError as error:\n    print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ConfigurationError Expected the packages `cryptography` and `pycryptodome`")
    assert "pip install 'fedlight[secure]'" in done.stdout
