from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from fedlight.codecs import IdentityCodec
from fedlight.core.codec import Context
from fedlight.core.layout import Layout
from fedlight.core.rounds import Round
from fedlight.core.running_sum import RunningSum
from fedlight.modules import exchange
from fedlight.modules.exchange import merge, narrowest

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


@pytest.mark.parametrize(("short", "lengths"), [(3, [13]), (2, [10, 3])])
def test_a_float_sum_is_the_same_with_the_counts_or_on_its_own(monkeypatch: pytest.MonkeyPatch, short: int, lengths: list[int]) -> None:
    """As if another process held the same: everything is doubled, in one message or in two."""
    sent: list[int] = []

    def doubled(tensor: Tensor) -> Tensor:
        sent.append(len(tensor))
        return tensor * 2

    monkeypatch.setattr(exchange, "several_processes", lambda: True)
    monkeypatch.setattr(exchange, "reduce_sum", doubled)
    monkeypatch.setattr(exchange, "SHORT", short)
    round = Round(Context(), np.array([4, 5]), np.array([4]))
    round.codes = RunningSum()
    round.codes.add(torch.tensor([0.5, 1.0, -2.0]), 3)
    round.loss, round.trained, round.uplink = 1.25, 1, 7
    merge(round, IdentityCodec().bind(Layout.vector(3)), torch.device("cpu"), dropped=1)
    assert sent == lengths
    assert round.codes.total is not None and round.codes.total.tolist() == [3.0, 6.0, -12.0] and round.codes.total.dtype == torch.float64
    assert (round.codes.weight, round.codes.count, round.codes.squares) == (6, 2, 18)
    assert (round.loss, round.trained, round.uplink, round.dropped_count) == (2.5, 2, 14, 2)
