"""Matrix decompositions that work where LAPACK fails in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def eigen(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Return (eigenvalues ``[n]``, eigenvectors ``[n, n]``, one per column) of a symmetric matrix ``[n, n]``, largest eigenvalue first."""
    values, vectors = decompose(torch.linalg.eigh, symmetric)
    return values.flip(0), vectors.flip(1)


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin singular value decomposition (``[m, k]``, ``[k]``, ``[k, n]``) of a matrix ``[m, n]``, ``k = min(m, n)``."""
    left, values, right = decompose(lambda whole: torch.linalg.svd(whole, full_matrices=False), matrix)
    return left, values, right


def qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return (orthonormal columns ``[..., m, k]``, upper triangle ``[..., k, n]``) of a matrix ``[..., m, n]``, ``k = min(m, n)``."""
    q, r = decompose(torch.linalg.qr, matrix)
    return q, r


def orthonormal(matrix: Tensor) -> Tensor:
    """Return the matrix ``[n, r]`` with columns orthonormalized in order, each as close to its direction as possible."""
    q, r = qr(matrix)
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0).to(q)
    fixed: Tensor = q * signs
    return fixed


def decompose(method: Callable[[Tensor], Sequence[Tensor]], matrix: Tensor) -> list[Tensor]:
    """Return the decomposition ``method`` of a matrix, in its own precision, or in float64 if that fails.

    In float32 some builds of LAPACK return NaN, and others raise an error, for small matrices of low rank or with rows of zeros.

    Raises:
        torch.linalg.LinAlgError: if float64 fails as well.
    """
    try:
        found = list(method(matrix))
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if matrix.dtype == torch.float64:
            raise
        found = []
    if found and all(bool(torch.isfinite(part).all()) for part in found):
        return found
    return [part.to(matrix.dtype) for part in method(matrix.double())]
