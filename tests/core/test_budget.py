from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fedlight.core.budget import Budget
from fedlight.core.errors import CodecMismatchError


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(3, 4),
        lambda: torch.zeros((3, 4)),
        lambda: torch.ones(size=(3, 4), dtype=torch.float64),
        lambda: torch.full((3,), 1, dtype=torch.int8),
        lambda: torch.randn(5, 2, generator=torch.Generator()),
        lambda: torch.rand([5]),
        lambda: torch.ones(()),
        lambda: torch.randint(2, (6,)),
        lambda: torch.randint(0, 2, (6,)),
        lambda: torch.randint(0, 2, size=(6,)),
        lambda: torch.randperm(7),
        lambda: torch.eye(3),
        lambda: torch.eye(3, 5),
        lambda: torch.arange(7),
        lambda: torch.arange(1, 7),
        lambda: torch.arange(1, 8, 3),
        lambda: torch.linspace(0, 1, 9),
        lambda: torch.linspace(0, 1, steps=9),
        lambda: torch.tensor(1, dtype=torch.int16).new_zeros(4, 2),
        lambda: torch.tensor(1, dtype=torch.int16).new_full((4,), 2),
        lambda: torch.tensor(1, dtype=torch.int16).new_ones((4,), dtype=torch.float64),
        lambda: nn.Linear(6, 4, bias=False).weight,
    ],
)
def test_a_budget_counts_what_a_tensor_takes(make: Callable[[], Tensor]) -> None:
    with Budget(10_000) as budget:
        made = make()
    assert budget.memory == made.numel() * made.element_size()


def test_a_tensor_beyond_the_limit_is_refused_and_not_made() -> None:
    with Budget(1000), pytest.raises(CodecMismatchError, match="at most 1,000 bytes in all but one of 4,000,000,000,000 bytes"):
        torch.zeros(10**12)


@pytest.mark.parametrize("sizes", [(10**20,), (2**40, 2**40)])
def test_more_bytes_than_can_be_counted_are_refused(sizes: tuple[int, ...]) -> None:
    with Budget(1000), pytest.raises(CodecMismatchError, match="at most 1,000 bytes in all but one cannot be made"):
        torch.zeros(sizes)


def test_counting_draws_nothing() -> None:
    drawn, before = torch.Generator().manual_seed(0), torch.get_rng_state()
    with Budget(1000):
        made = torch.randn(5, generator=drawn)
    assert torch.equal(made, torch.randn(5, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(before, torch.get_rng_state())


def test_tensors_count_together() -> None:
    with Budget(1000):
        torch.zeros(200)
        with pytest.raises(CodecMismatchError, match="one of 204 bytes"):
            torch.zeros(51)


def test_long_decompositions_are_refused() -> None:
    matrix = torch.ones(400, 400)
    with Budget(1 << 18), pytest.raises(CodecMismatchError, match="multiplications in all but they take 64,000,000"):
        torch.linalg.qr(matrix)


def test_nothing_is_counted_outside() -> None:
    with Budget(10):
        pass
    assert torch.zeros(1000).sum() == 0
