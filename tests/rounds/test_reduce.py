"""What processes add up, in which types and how many messages."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from fedlight.core.running_sum import RunningSum
from fedlight.rounds import reduce
from fedlight.rounds.reduce import merge, narrowest

integers = st.one_of(st.integers(-130, 130), st.integers(-(2**31) - 2, 2**31 + 2), st.integers(-(2**40), 2**40))


@given(st.lists(st.lists(integers, min_size=3, max_size=3), min_size=1, max_size=4))
@example([[127, -127, 0], [0, 0, 0]])
@example([[127, -127, 0], [1, 0, 0]])
@example([[2**31 - 1, 0, 0]])
@example([[2**31, 0, 0]])
def test_processes_add_up_in_a_type_that_holds_every_sum(sums: list[list[int]]) -> None:
    totals = [torch.tensor(each) for each in sums]
    wire = narrowest(sum(int(total.abs().max()) for total in totals))
    narrow = torch.zeros(3, dtype=wire)
    for total in totals:
        narrow += total.to(wire)
    assert torch.equal(narrow.long(), torch.stack(totals).sum(0))


def test_four_bit_codes_of_ten_clients_take_a_byte() -> None:
    assert narrowest(10 * 7) is torch.int8
    assert narrowest(128) is torch.int32 and narrowest(2**31) is torch.int64


@pytest.mark.parametrize(("short", "lengths"), [(3, [10]), (2, [7, 3])])
def test_a_float_sum_is_the_same_with_the_counts_or_on_its_own(monkeypatch: pytest.MonkeyPatch, short: int, lengths: list[int]) -> None:
    """As if another process held the same: everything is doubled, in one message or in two."""
    sent: list[int] = []

    def doubled(tensor: Tensor) -> Tensor:
        sent.append(len(tensor))
        return tensor * 2

    monkeypatch.setattr(reduce, "several_processes", lambda: True)
    monkeypatch.setattr(reduce, "reduce_sum", doubled)
    monkeypatch.setattr(reduce, "SHORT", short)
    codes = RunningSum()
    codes.add(torch.tensor([0.5, 1.0, -2.0]), 3)
    assert merge([1.25, 1.0, 7.0], codes, 3, False, torch.device("cpu")) == [2.5, 2.0, 14.0]
    assert sent == lengths
    assert codes.total is not None and codes.total.tolist() == [3.0, 6.0, -12.0] and codes.total.dtype == torch.float64
    assert (codes.weight, codes.count, codes.squares) == (6, 2, 18)


def test_a_sum_of_integers_travels_on_its_own_in_the_narrowest_type_that_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[torch.dtype] = []

    def doubled(tensor: Tensor) -> Tensor:
        sent.append(tensor.dtype)
        return tensor * 2

    monkeypatch.setattr(reduce, "several_processes", lambda: True)
    monkeypatch.setattr(reduce, "reduce_sum", doubled)
    codes = RunningSum()
    codes.add(torch.tensor([60, -3]), 1)
    merge([], codes, 2, True, torch.device("cpu"))
    codes.add(torch.tensor([10, 0]), 1)
    merge([], codes, 2, True, torch.device("cpu"))
    assert sent == [torch.float64, torch.int8, torch.float64, torch.int32], "twice 60 fits a byte, twice 130 does not"
    assert codes.total is not None and codes.total.tolist() == [260, -12] and codes.total.dtype == torch.int64


def test_one_process_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduce, "reduce_sum", lambda tensor: pytest.fail("nobody else to add up with"))
    codes = RunningSum()
    codes.add(torch.tensor([0.5]), 1)
    assert merge([3.0], codes, 1, False, torch.device("cpu")) == [3.0] and codes.count == 1
