from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlight.core.errors import ConfigurationError
from fedlight.metrics import cosine, explained, relative_error, spread

counts = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=40)


@pytest.fixture
def updates() -> torch.Tensor:
    return torch.randn(5, 33, generator=torch.Generator().manual_seed(0))


def test_relative_error_is_zero_one_and_two_for_the_update_nothing_and_its_opposite(updates: torch.Tensor) -> None:
    torch.testing.assert_close(relative_error(updates, updates), torch.zeros(5))
    torch.testing.assert_close(relative_error(torch.zeros_like(updates), updates), torch.ones(5))
    torch.testing.assert_close(relative_error(-updates, updates), torch.full((5,), 2.0))


def test_relative_error_of_zero_updates() -> None:
    zero, one = torch.zeros(3), torch.ones(3)
    assert relative_error(zero, zero) == 0
    assert relative_error(one, zero) == math.inf


def test_relative_error_keeps_nan_visible() -> None:
    assert relative_error(torch.tensor([math.nan, 0.0]), torch.ones(2)).isnan()
    assert relative_error(torch.tensor([math.nan, 0.0]), torch.zeros(2)).isnan()


def test_cosine_ignores_scale_even_where_squares_underflow(updates: torch.Tensor) -> None:
    torch.testing.assert_close(cosine(3 * updates, updates), torch.ones(5))
    torch.testing.assert_close(cosine(-1e-18 * updates, 1e12 * updates), -torch.ones(5))
    assert cosine(torch.zeros(3), torch.ones(3)) == 0


def test_explained_is_the_squared_cosine_of_a_projection(updates: torch.Tensor) -> None:
    basis = torch.linalg.qr(torch.randn(33, 8, generator=torch.Generator().manual_seed(1))).Q
    projected = updates @ basis @ basis.T
    torch.testing.assert_close(explained(projected, updates), cosine(projected, updates) ** 2)


@pytest.mark.parametrize("metric", [relative_error, cosine, explained])
def test_shapes_that_would_broadcast_are_refused(metric) -> None:
    with pytest.raises(ConfigurationError, match=r"\[1, 3\] and \[2, 3\]"):
        metric(torch.zeros(1, 3), torch.zeros(2, 3))


@pytest.mark.parametrize("metric", [relative_error, cosine, explained])
def test_half_precision_is_measured_in_single(metric) -> None:
    update = torch.full((100_000,), 1.0, dtype=torch.float16)
    assert metric(update, update).dtype == torch.float32
    assert metric(update, update).isfinite()


def test_spread_by_hand() -> None:
    found = spread(torch.tensor([1, 2, 3, 0]), torch.tensor([4, 4, 4, 0]), worst=0.1)
    assert found["mean"] == pytest.approx(0.5)
    assert found["std"] == pytest.approx(math.sqrt(2 / 3) / 4)
    assert found["worst"] == pytest.approx(0.25)


@pytest.mark.parametrize(("clients", "tail"), [(1, 1), (9, 1), (10, 1), (11, 2), (70, 7), (100, 10)])
def test_worst_is_the_mean_of_the_least_accurate_tenth_rounded_up(clients: int, tail: int) -> None:
    correct = torch.arange(clients)[torch.randperm(clients, generator=torch.Generator().manual_seed(2))]
    found = spread(correct, torch.full((clients,), 1000))
    assert found["worst"] == pytest.approx((tail - 1) / 2 / 1000)


@given(counts)
def test_spread_of_any_counts(pairs: list[tuple[int, int]]) -> None:
    total = torch.tensor([max(pair) for pair in pairs])
    correct = torch.tensor([min(pair) for pair in pairs])
    found = spread(correct, total)
    if total.sum() == 0:
        assert all(value.isnan() for value in found.values())
        return
    assert 0 <= found["worst"] <= found["mean"] + 1e-6 <= 1 + 2e-6
    assert 0 <= found["std"] <= 0.5 + 1e-6
    again = spread(torch.cat([correct, torch.tensor([0])]), torch.cat([total, torch.tensor([0])]))
    assert again == found


def test_spread_refuses_what_it_cannot_mean() -> None:
    with pytest.raises(ConfigurationError, match="worst"):
        spread(torch.ones(2), torch.ones(2), worst=0.0)
    with pytest.raises(ConfigurationError, match="one shape"):
        spread(torch.ones(2), torch.ones(3))
