from __future__ import annotations

import math

import pytest
import torch

from fedlight.core.bank import UpdateBank
from fedlight.core.codec import Codec, TrainCodec
from fedlight.core.layout import Layout


@pytest.fixture(scope="session")
def layout() -> Layout:
    """A small network's: two matrices, a convolution, two vectors and a scalar; 133 weights."""
    return Layout(("fc.w", "fc.b", "conv.w", "conv.b", "t", "out.w"), ((8, 6), (8,), (4, 1, 3, 3), (4,), (), (9, 4)))


@pytest.fixture(scope="session")
def banks(layout: Layout) -> tuple[UpdateBank, UpdateBank]:
    """Two banks (to fit to, held out) of one source: a few common directions per tensor, plus a client's own and noise."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    rounds, clients, rank = 40, 5, 4
    updates = []
    for shape in layout.shapes:
        size = math.prod(shape)
        rows = shape[0] if len(shape) > 1 else 1
        directions = draw(rank, size // rows) / rank**0.5
        common = draw(rounds, 1, rows, rank) @ directions
        own = 0.5 * draw(rounds, clients, rows, rank) @ directions
        noise = 0.2 * draw(rounds, clients, rows, size // rows)
        updates.append((common + own + noise).flatten(2) * (0.01 * (1 + size / 50)))
    both = torch.cat(updates, dim=-1)
    return UpdateBank(both[::2].contiguous(), layout), UpdateBank(both[1::2].contiguous(), layout)


@pytest.fixture(scope="session")
def adam() -> TrainCodec:
    """Full-batch Adam on the recorded cohorts, a few steps: enough to be better than nothing."""

    def train(codec: Codec, bank: UpdateBank) -> dict[str, float]:
        parameters = [*codec.encoder.parameters(), *codec.decoder.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=1e-2)
        target = bank.updates.mean(1)
        for _ in range(60):
            optimizer.zero_grad()
            loss = (codec.reconstruct(bank.updates) - target).square().sum() / target.square().sum()
            loss.backward()
            optimizer.step()
        return {"loss": float(loss.detach())}

    return train
