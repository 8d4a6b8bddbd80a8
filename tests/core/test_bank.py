from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fedlight.core.bank import UpdateBank, write_bank
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


def storage(bank: UpdateBank) -> int:
    return bank.recorded.untyped_storage().data_ptr()


def test_rounds_are_iterated_as_views() -> None:
    bank = bank_of(4)
    rounds = list(bank)
    assert torch.equal(torch.stack(rounds), bank.updates)
    assert {updates.untyped_storage().data_ptr() for updates in rounds} == {storage(bank)}


def test_parts_of_parts_share_the_recorded_updates() -> None:
    bank = bank_of(12)
    train, rest = bank.split(0.4)
    stop, report = rest.split(0.5)
    assert {storage(part) for part in (train, stop, report)} == {storage(bank)}
    assert (train.rounds, stop.rounds, report.rounds) == (6, 3, 3)
    assert torch.equal(report.updates, bank.updates[[3, 7, 11]]) and torch.equal(torch.stack(list(report)), report.updates)
    rounds, clients = torch.tensor([[2], [0]]), torch.tensor([[1, 0], [2, 2]])
    assert torch.equal(report.take(rounds, clients), report.updates[rounds, clients])
    assert torch.equal(bank.take(rounds, clients), bank.updates[rounds, clients])


def test_a_part_can_be_saved(tmp_path: Path) -> None:
    part = bank_of(6).split(0.5)[1]
    part.save(tmp_path / "part.safetensors")
    assert torch.equal(UpdateBank.load(tmp_path / "part.safetensors").updates, part.updates)


def test_a_loaded_bank_stays_in_its_file_aligned_as_in_memory(tmp_path: Path) -> None:
    """What is written into the file afterwards is seen: nothing was copied."""
    bank_of(4).save(tmp_path / "bank.safetensors")
    bank = UpdateBank.load(tmp_path / "bank.safetensors")
    assert bank.recorded.data_ptr() % 64 == 0
    with (tmp_path / "bank.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(struct.pack("<f", 0.5))
    assert bank.recorded[-1, -1, -1] == 0.5


def test_a_bank_can_be_saved_over_the_file_it_is_read_from(tmp_path: Path) -> None:
    path = tmp_path / "bank.safetensors"
    bank_of(4).save(path)
    bank = UpdateBank.load(path)
    bank.split(0.5)[0].save(path)
    assert torch.equal(bank.updates, bank_of(4).updates)
    assert torch.equal(UpdateBank.load(path).updates, bank_of(4).updates[::2])
    assert [file.name for file in tmp_path.iterdir()] == ["bank.safetensors"]


def test_the_file_is_plain_safetensors_both_ways(tmp_path: Path) -> None:
    bank, path = bank_of(4), tmp_path / "bank.safetensors"
    bank.save(path)
    assert torch.equal(load_file(path)["updates"], bank.updates)
    save_file({"updates": bank.updates}, path, {"layout": LAYOUT.to_json()})
    assert torch.equal(UpdateBank.load(path).updates, bank.updates)


@pytest.mark.parametrize("tensors", [{}, {"other": torch.zeros(2, 3, 8)}, {"updates": torch.zeros(2, 3, 8).half()}])
def test_a_file_of_something_else_is_refused(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "file.safetensors", {"layout": LAYOUT.to_json()})
    with pytest.raises(ConfigurationError, match="Expected recorded updates"):
        UpdateBank.load(tmp_path / "file.safetensors")


def test_a_file_without_a_layout_is_refused(tmp_path: Path) -> None:
    save_file({"updates": torch.zeros(2, 3, 8)}, tmp_path / "file.safetensors")
    with pytest.raises(ConfigurationError, match="with their layout"):
        UpdateBank.load(tmp_path / "file.safetensors")


def test_a_file_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    updates = torch.zeros(2, 3, 8)
    updates[1, 0, 7] = math.nan
    save_file({"updates": updates}, tmp_path / "file.safetensors", {"layout": LAYOUT.to_json()})
    with pytest.raises(ConfigurationError, match="finite"):
        UpdateBank.load(tmp_path / "file.safetensors")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="absent"):
        UpdateBank.load(tmp_path / "absent")


@pytest.mark.parametrize("place", [-1, -50, 100])
def test_a_flipped_bit_is_found(place: int, tmp_path: Path) -> None:
    path = tmp_path / "bank.safetensors"
    bank_of(4).save(path)
    whole = bytearray(path.read_bytes())
    whole[place] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ConfigurationError, match=r"bank.safetensors"):
        UpdateBank.load(path)


def test_an_error_while_a_bank_is_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "bank.safetensors"
    bank_of(4).save(path)

    def rounds() -> Iterator[torch.Tensor]:
        yield torch.zeros(3, 8)
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        write_bank(path, LAYOUT, 2, 3, rounds())
    assert torch.equal(UpdateBank.load(path).updates, bank_of(4).updates) and list(tmp_path.iterdir()) == [path]
