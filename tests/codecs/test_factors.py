from __future__ import annotations

import copy
import pickle
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedlight.codecs.factors import Factors, code_columns, decode_columns, factor_bytes
from fedlight.core.errors import MessageError
from fedlight.core.linalg import orthonormal

CPU = torch.device("cpu")
SHAPES = [(20, 4), (7, 7), (5, 0), (1, 1), (64, 16)]


def drawn(shapes: list[tuple[int, int]] = SHAPES, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [orthonormal(torch.randn(shape, generator=generator)) for shape in shapes]


def written(bases: list[Tensor], bits: int) -> Factors:
    factors = Factors([(len(basis), basis.shape[1]) for basis in bases], bits)
    factors.write(bases)
    return factors


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8, 11, 16])
@given(shapes=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 8)).map(lambda s: (s[0], min(s))), max_size=4))
def test_columns_are_orthonormal_whatever_the_bits(bits: int, shapes: list[tuple[int, int]]) -> None:
    factors = written(drawn(shapes), bits)
    assert [basis.shape for basis in factors.bases(CPU)] == shapes
    for basis in factors.bases(CPU):
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("bits", [6, 8, 10, 12, 14, 16])
def test_columns_are_as_close_to_those_written_as_their_bits_allow(bits: int) -> None:
    """Rounding moves an entry by at most half a step ``max / limit``; orthonormality of the others at most doubles that.

    The bound halves with every bit, to the last of 16: nothing else may limit it.
    """
    limit = 2 ** (bits - 1) - 1
    for basis, read in zip(drawn(), written(drawn(), bits).bases(CPU), strict=True):
        n, r = basis.shape
        if r:
            rounding = 0.5 * basis.abs().max() / limit * n**0.5
            assert (read - basis).norm(dim=0).max() <= 2 * r**0.5 * rounding + 1e-5
            assert ((read * basis).sum(0) > 0.9).all()


def test_unit_vectors_are_exact_and_what_factors_begin_as() -> None:
    fresh = Factors([(6, 3), (4, 4)], 5)
    for basis, shape in zip(fresh.bases(CPU), fresh.shapes, strict=True):
        assert torch.equal(basis, torch.eye(*shape))
    again = Factors([(6, 3), (4, 4)], 5)
    again.load_state_dict(fresh.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.bases(CPU), fresh.bases(CPU), strict=True))


@pytest.mark.parametrize("bits", [2, 5, 8, 16])
def test_they_weigh_what_was_predicted(bits: int, tmp_path: Path) -> None:
    state = written(drawn(), bits).state_dict()
    assert sum(t.numel() * t.element_size() for t in state.values()) == factor_bytes(SHAPES, bits)
    assert factor_bytes(SHAPES, bits) == -(-sum(n * r for n, r in SHAPES) * bits // 8)
    assert factor_bytes([], bits) == 0 and Factors([], bits).packed.numel() == 0


def test_they_survive_a_state_dict_a_file_copies_and_pickles(tmp_path: Path) -> None:
    factors = written(drawn(), 6)
    save_file(factors.state_dict(), tmp_path / "factors.safetensors")
    loaded = Factors(SHAPES, 6)
    loaded.load_state_dict(load_file(tmp_path / "factors.safetensors"))
    for other in (loaded, copy.deepcopy(factors), pickle.loads(pickle.dumps(factors))):
        assert all(torch.equal(a, b) for a, b in zip(factors.bases(CPU), other.bases(CPU), strict=True))
        assert torch.equal(factors.packed, other.packed)


def test_writing_again_replaces() -> None:
    factors = written(drawn(), 8)
    factors.write(drawn(seed=1))
    assert all(torch.equal(a, b) for a, b in zip(factors.bases(CPU), written(drawn(seed=1), 8).bases(CPU), strict=True))


def coded(bases: list[Tensor], worth: list[Tensor], bits: float) -> tuple[bytes, list[Tensor]]:
    """Return entropy-coded factors and what is read of them."""
    packed = code_columns(bases, worth, bits)
    factors = Factors([(len(basis), basis.shape[1]) for basis in bases], bits, len(packed))
    factors.load(packed)
    return packed, factors.bases(CPU)


@given(bits=st.floats(2, 9), seed=st.integers(0, 100), spread=st.floats(0, 20))
def test_coded_columns_are_orthonormal_and_take_about_their_bits(bits: float, seed: int, spread: float) -> None:
    bases = drawn([(100, 30), (60, 60), (40, 0)], seed)
    worth = [2.0 ** (-spread * torch.arange(basis.shape[1]) / 60) for basis in bases]
    packed, read = coded(bases, worth, bits)
    entries = sum(basis.numel() for basis in bases)
    assert len(packed) <= 90 + 8 + entries * (bits + 0.15) / 8
    for basis, own in zip(bases, read, strict=True):
        assert own.shape == basis.shape
        torch.testing.assert_close(own.T @ own, torch.eye(own.shape[1]), atol=1e-5, rtol=0)


def test_columns_that_are_worth_more_are_closer_to_what_was_written() -> None:
    """At equal bytes as with one width, what rounding takes of the columns' energy is less than half."""
    (basis,), worth = drawn([(200, 40)]), 2.0 ** -torch.arange(40).div(3)
    packed, (read,) = coded([basis], [worth], 4)
    lost = 1 - (read * basis).sum(0).square()
    assert lost[:10].mean() < 0.1 * lost[-10:].mean()
    fixed = 1 - (written([basis], 4).bases(CPU)[0] * basis).sum(0).square()
    assert len(packed) <= 1.05 * factor_bytes([(200, 40)], 4) and (worth * lost).sum() < 0.5 * (worth * fixed).sum()


def test_no_column_is_coded_as_zeros() -> None:
    hadamard = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    for _ in range(5):
        hadamard = torch.kron(hadamard, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    packed, (read,) = coded([hadamard / 8], [2.0 ** -torch.arange(64)], 2)
    assert torch.isfinite(read).all() and (decode_columns(packed, [(64, 64)]).reshape(64, 64) != 0).any(0).all()


@given(cut=st.integers(0, 1000), flipped=st.integers(0, 1000))
def test_damaged_columns_are_refused_or_other_columns(cut: int, flipped: int) -> None:
    packed = code_columns(drawn([(30, 8)]), [torch.ones(8)], 4)
    with pytest.raises(MessageError):
        decode_columns(packed[: cut % len(packed)], [(30, 8)])
    changed = bytearray(packed)
    changed[flipped % len(packed)] ^= 0x40
    with suppress(MessageError):
        assert len(decode_columns(bytes(changed), [(30, 8)])) == 240
