from __future__ import annotations

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fedlight.modules.exchange import narrowest

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
