from __future__ import annotations

import pytest
import torch

from fedlight.codecs.factors import eigenvectors


def low_rank(scale: float) -> torch.Tensor:
    """A Gram matrix of which most rows are zero, as of an embedding whose words were not seen."""
    seen = torch.randn(97, 8, generator=torch.Generator().manual_seed(0)) * (torch.arange(97) % 7 == 0)[:, None]
    return seen @ seen.T * scale


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1.0, 1e8])
def test_they_diagonalise_the_matrix_largest_first(scale: float) -> None:
    matrix = low_rank(scale)
    vectors = eigenvectors(matrix).double()
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(97, dtype=torch.float64), atol=1e-5, rtol=0)
    diagonal = vectors.T @ (matrix.double() / scale) @ vectors
    torch.testing.assert_close(diagonal, torch.diag(diagonal.diagonal()), atol=1e-3, rtol=0)
    assert (diagonal.diagonal().diff() < 1e-4).all()


def test_what_fails_in_float32_is_found_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """As some builds of LAPACK do: NaN for float32 alone."""
    whole = torch.linalg.eigh

    def failing(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = whole(matrix)
        return found if matrix.dtype == torch.float64 else type(found)((found[0], found[1] * torch.nan))

    matrix = low_rank(1e-8)
    expected = whole(matrix.double()).eigenvectors.flip(1).float()
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    assert torch.equal(eigenvectors(matrix), expected)
