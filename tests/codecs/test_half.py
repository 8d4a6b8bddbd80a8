from __future__ import annotations

import pytest
import torch

from fedlight.codecs import HalfCodec
from fedlight.core.layout import Layout
from fedlight.core.simulate import simulate_round
from fedlight.core.wire import HEADER


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-5, 1e-7, 1e4])
def test_the_error_is_what_the_docstring_says(scale: float) -> None:
    update = (torch.rand(1, 5000, generator=torch.Generator().manual_seed(0)) * 2 - 1) * scale
    error = (simulate_round(HalfCodec().bind(Layout.vector(5000)), update) - update[0]).abs()
    assert (error <= (update[0].abs() * 2**-11).clamp(min=3e-8)).all()


def test_entries_beyond_the_range_are_clamped() -> None:
    update = torch.tensor([[1e5, -1e30, 65504.0, 1.0]])
    assert simulate_round(HalfCodec().bind(Layout.vector(4)), update).tolist() == [65504.0, -65504.0, 65504.0, 1.0]


def test_a_message_is_two_bytes_an_entry() -> None:
    sizes: list[int] = []
    simulate_round(HalfCodec().bind(Layout.vector(7)), torch.ones(1, 7), on_message=lambda step, client, m: sizes.append(len(m)))
    assert sizes == [HEADER.size + 14]
