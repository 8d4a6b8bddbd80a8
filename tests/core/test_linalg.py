from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedlight.codecs import LinearCodec, TransformCodec, TwoSidedCodec
from fedlight.core.bank import UpdateBank
from fedlight.core.codec import Codec
from fedlight.core.layout import Layout
from fedlight.core.linalg import eigen, orthonormal, qr, svd


@given(n=st.integers(1, 20), seed=st.integers(0, 100))
def test_orthonormal_is_gram_schmidt(n: int, seed: int) -> None:
    """Columns span what the first columns span, and point the way they did."""
    r = max(1, n // 2)
    matrix = torch.randn(n, r, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q = orthonormal(matrix)
    torch.testing.assert_close(q.T @ q, torch.eye(r, dtype=torch.float64))
    upper = q.T @ matrix
    torch.testing.assert_close(upper.tril(-1), torch.zeros(r, r, dtype=torch.float64), atol=1e-9, rtol=0)
    assert (upper.diagonal() >= 0).all()


def low_rank(scale: float) -> Tensor:
    """A Gram matrix of which most rows are zero, as of an embedding whose words were not seen."""
    seen = torch.randn(97, 8, generator=torch.Generator().manual_seed(0)) * (torch.arange(97) % 7 == 0)[:, None]
    return seen @ seen.T * scale


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1.0, 1e8])
def test_they_diagonalise_the_matrix_largest_first(scale: float) -> None:
    matrix = low_rank(scale)
    values, vectors = eigen(matrix)
    vectors = vectors.double()
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(97, dtype=torch.float64), atol=1e-5, rtol=0)
    diagonal = vectors.T @ (matrix.double() / scale) @ vectors
    torch.testing.assert_close(diagonal, torch.diag(diagonal.diagonal()), atol=1e-3, rtol=0)
    assert (values.diff() <= 0).all()
    torch.testing.assert_close(values.double() / scale, diagonal.diagonal(), atol=1e-3, rtol=0)


FAULTS: dict[str, Callable[[Any], Any]] = {"NaN": lambda found: [part * torch.nan for part in found], "an error": lambda _: None}


def fail_in_float32(patch: pytest.MonkeyPatch, fault: str, *names: str) -> None:
    """Have torch's decompositions fail as some builds of LAPACK do: for float32 alone, with NaN or with an error."""

    def failing(whole: Callable[..., Any], matrix: Tensor, **options: Any) -> Any:
        found = whole(matrix, **options)
        if matrix.dtype == torch.float64:
            return found
        if (broken := FAULTS[fault](found)) is None:
            raise torch.linalg.LinAlgError("The algorithm failed to converge")
        return broken

    for name in names:
        patch.setattr(torch.linalg, name, partial(failing, getattr(torch.linalg, name)))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [
        ("eigh", eigen, lambda m: (torch.linalg.eigh(m)[0].flip(0), torch.linalg.eigh(m)[1].flip(1))),
        ("svd", svd, lambda m: torch.linalg.svd(m, full_matrices=False)),
        ("qr", qr, torch.linalg.qr),
    ],
)
def test_what_fails_in_float32_is_found_in_float64(name: str, ours: Any, theirs: Any, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = low_rank(1e-8)
    expected = [part.float() for part in theirs(matrix.double())]
    fail_in_float32(monkeypatch, fault, name)
    assert all(torch.equal(a, b) for a, b in zip(ours(matrix), expected, strict=True))


def test_what_fails_in_float64_too_is_an_error() -> None:
    with pytest.raises(torch.linalg.LinAlgError):
        eigen(torch.full((3, 3), torch.nan, dtype=torch.float64))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    "codec", [TransformCodec(ratio=16), TwoSidedCodec(ratio=16), LinearCodec(ratio=16)], ids=lambda c: type(c).__name__
)
def test_codecs_are_fitted_to_updates_of_dead_inputs_where_float32_fails(codec: Codec, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most columns of a layer never move, as behind dead pixels or for words that no client has."""
    network = torch.nn.Linear(40, 12)
    layout = Layout.of(network)
    drawn = torch.randn(6, 5, 12, 40, generator=torch.Generator().manual_seed(0)) * (torch.arange(40) % 7 == 0)
    updates = torch.cat([drawn.flatten(2), drawn[..., 0]], dim=-1)
    fail_in_float32(monkeypatch, fault, "eigh", "svd", "qr")
    codec.fit(UpdateBank(updates, layout), lambda *_: {})
    mean = updates[0].mean(0)
    assert torch.isfinite(codec.reconstruct(updates[0])).all()
    if not codec.integer:
        assert (codec.reconstruct(updates[0]) - mean).norm() < mean.norm()
