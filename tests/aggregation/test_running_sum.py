from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlight.aggregation import RunningSum
from fedlight.core.running_sum import BLOCK, sum_dtype

codes = st.integers(1, 5).flatmap(
    lambda n: st.lists(
        st.tuples(st.lists(st.integers(-(2**15), 2**15), min_size=n, max_size=n), st.integers(1, 10**6)), min_size=1, max_size=12
    )
)


def running(terms: list[tuple[list[int], int]], dtype: torch.dtype) -> RunningSum:
    total = RunningSum()
    for term, weight in terms:
        total.add(torch.tensor(term, dtype=dtype), weight)
    return total


@given(codes)
def test_integers_are_summed_exactly(terms: list[tuple[list[int], int]]) -> None:
    total = running(terms, torch.int32)
    exact = [sum(weight * term[j] for term, weight in terms) for j in range(len(terms[0][0]))]
    assert total.total.dtype == torch.int64 and total.total.tolist() == exact
    assert total.weight == sum(weight for _, weight in terms) and total.count == len(terms)
    assert total.mean().tolist() == [float(torch.tensor(value / total.weight)) for value in exact]


@given(codes, st.randoms(use_true_random=False))
def test_integer_sums_do_not_depend_on_the_order(terms: list[tuple[list[int], int]], random) -> None:
    shuffled = terms.copy()
    random.shuffle(shuffled)
    assert torch.equal(running(terms, torch.int32).mean(), running(shuffled, torch.int32).mean())


@given(codes)
def test_floats_are_summed_in_float64(terms: list[tuple[list[int], int]]) -> None:
    total = running(terms, torch.float32)
    assert total.total.dtype == torch.float64 and total.mean().dtype == torch.float32
    assert torch.equal(total.mean(), running(terms, torch.int32).mean())  # these are exact in both


def test_small_floats_survive_beside_large_ones() -> None:
    total = RunningSum()
    for value in (1e8, 1.0, -1e8):
        total.add(torch.tensor([value]))
    assert total.total.tolist() == [1.0]


def test_integers_may_exceed_what_a_float_can_count() -> None:
    total = RunningSum()
    for _ in range(3):
        total.add(torch.tensor([2**31 - 1], dtype=torch.int32), 2**28 + 1)
    assert total.total.tolist() == [3 * (2**31 - 1) * (2**28 + 1)]


def test_terms_are_neither_kept_nor_changed() -> None:
    term, total = torch.tensor([1, 2]), RunningSum()
    total.add(term, 3)
    total.add(term)
    assert term.tolist() == [1, 2]
    term.zero_()
    assert total.total.tolist() == [4, 8]


def test_one_tensor_is_held_whatever_the_size_of_the_cohort() -> None:
    total = RunningSum()
    total.add(torch.ones(3))
    held = total.total.data_ptr()
    for _ in range(100):
        total.add(torch.ones(3))
    assert total.total.data_ptr() == held and total.count == 101
    assert not [value for value in vars(total).values() if isinstance(value, (list, dict))]


def test_terms_of_another_length_are_refused() -> None:
    total = RunningSum()
    total.add(torch.ones(3))
    with pytest.raises(RuntimeError):
        total.add(torch.ones(2))


def test_nothing_has_no_mean() -> None:
    with pytest.raises(AssertionError, match="nothing was added"):
        RunningSum().mean()


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.int32, torch.int64), (torch.int8, torch.int64), (torch.float16, torch.float64), (torch.float32, torch.float64)],
)
def test_the_type_of_a_sum(dtype: torch.dtype, expected: torch.dtype) -> None:
    assert sum_dtype(dtype) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("length", [0, 1, BLOCK, 2 * BLOCK + 3])
def test_floats_are_added_up_in_double_precision(length: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    terms = [torch.randn(2 * length, generator=generator).to(dtype)[::2] for _ in range(3)]  # views with gaps
    total, exact = RunningSum(), torch.zeros(length, dtype=torch.float64)
    for weight, term in zip((1, 7, 3), terms, strict=True):
        before = term.clone()
        total.add(term, weight)
        exact = exact + weight * term.double()
        assert torch.equal(term, before)
    assert torch.equal(total.total, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_sum_knows_nothing_of_how_its_terms_were_computed(dtype: torch.dtype) -> None:
    total = RunningSum()
    total.add(2 * torch.ones(3, dtype=dtype, requires_grad=True))
    assert total.total is not None and not total.total.requires_grad


def test_what_is_not_finite_stays_so_without_a_word(recwarn: pytest.WarningsRecorder) -> None:
    total = RunningSum()
    for value, weight in ((math.inf, 1), (-math.inf, 1), (math.nan, 3)):
        total.add(torch.tensor([value, 1.0]), weight)
    assert total.total is not None and math.isnan(total.total[0]) and total.total[1] == 5 and not recwarn.list


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_a_term_that_would_be_stretched_is_refused_and_changes_nothing(dtype: torch.dtype) -> None:
    total = RunningSum()
    total.add(torch.ones(100_000, dtype=dtype))
    for length in (100_001, 99_999, 1):
        with pytest.raises(RuntimeError, match=rf"Expected a term of shape \[100000\], .*got \[{length}\]"):
            total.add(torch.ones(length, dtype=dtype))
    assert total.count == 1 and bool((total.total == 1).all())
