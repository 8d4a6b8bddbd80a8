from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlight.core.bank import UpdateBank
from fedlight.core.errors import ConfigurationError
from fedlight.core.layout import Layout

LAYOUT = Layout(("w", "b"), ((2, 3), (2,)))


def bank_of(rounds: int, clients: int = 3) -> UpdateBank:
    return UpdateBank(torch.arange(float(rounds * clients * 8)).reshape(rounds, clients, 8), LAYOUT)


@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 7), (0, 3, 8), (2, 0, 8)])
def test_a_bank_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigurationError, match=r"`updates` of shape .*, 8\] but got"):
        UpdateBank(torch.zeros(shape), LAYOUT)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bank_that_is_not_finite_is_refused(bad: float) -> None:
    updates = torch.zeros(2, 3, 8)
    updates[1, 2, 3] = bad
    with pytest.raises(ConfigurationError, match="finite"):
        UpdateBank(updates, LAYOUT)


def test_rows_are_all_clients_of_all_rounds() -> None:
    bank = bank_of(4)
    assert (bank.rounds, bank.clients) == (4, 3)
    assert torch.equal(bank.flat()[5], bank.updates[1, 2]) and bank.flat().shape == (12, 8)


@given(st.integers(2, 40), st.floats(0.05, 0.9))
def test_split_keeps_every_round_once_in_order(rounds: int, holdout: float) -> None:
    bank = bank_of(rounds)
    train, held = bank.split(holdout)
    assert train.rounds + held.rounds == rounds
    both = torch.cat([train.updates, held.updates])
    assert torch.equal(both[both[:, 0, 0].argsort()], bank.updates)


def test_split_holds_out_the_asked_share_from_all_over_the_trajectory() -> None:
    _, held = bank_of(20).split(0.2)
    assert held.updates[:, 0, 0].div(24).tolist() == [4, 9, 14, 19]


def test_one_round_cannot_be_split() -> None:
    with pytest.raises(ConfigurationError, match="at least 2 rounds .* got 1"):
        bank_of(1).split(0.2)


def test_map_keeps_rounds_and_clients() -> None:
    bank = bank_of(4)
    codes = bank.map(bank.flat()[:, :5], Layout.vector(5))
    assert codes.updates.shape == (4, 3, 5) and torch.equal(codes.updates, bank.updates[..., :5])


def test_a_saved_bank_comes_back(tmp_path: Path) -> None:
    bank = bank_of(4)
    bank.save(tmp_path / "bank.safetensors")
    again = UpdateBank.load(tmp_path / "bank.safetensors")
    assert again.layout == bank.layout and torch.equal(again.updates, bank.updates)
