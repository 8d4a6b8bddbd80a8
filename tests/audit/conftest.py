"""What several tests of attacks look at: the digits, and public ones among them."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from fedlight.audit.attacks import Auxiliary


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor]:
    """Images ``[n, 1, 8, 8]`` in 0..1 and labels ``[n]``."""
    data = load_digits()
    return torch.tensor(data.images / 16).float()[:, None], torch.tensor(data.target)


@pytest.fixture(scope="session")
def context(digits: tuple[Tensor, Tensor]) -> Auxiliary:
    """Three hundred public digits that no victim has."""
    return Auxiliary(digits[0][900:1200], digits[1][900:1200], 10)
