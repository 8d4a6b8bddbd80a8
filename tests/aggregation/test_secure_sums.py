from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlight.aggregation.secure import SumFormat
from fedlight.codecs.allocation import masked_cost
from fedlight.core.errors import ConfigurationError, MessageError, ProtocolError
from fedlight.core.wire import CodeFormat, JointFormat

parts = st.lists(st.tuples(st.integers(2, 8), st.integers(1, 9)), min_size=1, max_size=4)


@given(st.integers(2, 16), st.integers(3, 1000), st.integers(1, 20))
def test_the_modulus_is_the_smallest_that_cannot_overflow(bits, clients, weight):
    most = clients * weight * (2 ** (bits - 1) - 1)
    (modulus, _), *_ = SumFormat.of(CodeFormat(4, bits), clients, weight).widths
    assert modulus == math.ceil(math.log2(2 * most + 1))
    assert 2**modulus >= 2 * most + 1 > 2 ** (modulus - 1)


@given(st.integers(2, 8), st.integers(3, 200), st.integers(1, 20))
def test_it_is_what_codecs_budget_for(bits, clients, weight):
    assert SumFormat.of(CodeFormat(1, bits), clients, weight).widths[0][0] == masked_cost(clients * weight)(bits)


def test_codes_of_four_bits_from_ten_clients_take_eight():
    format = SumFormat.of(CodeFormat(1000, 4), 10)
    assert format.widths == ((8, 1000),) and format.payload_bytes == 1000 and format.kind == 8


@given(parts, st.integers(3, 40), st.integers(1, 6))
def test_sums_at_the_ends_of_the_range_are_exact(parts, clients, weight):
    """The whole cohort at one end with the largest weight: the widest sum there is."""
    format = SumFormat.of(JointFormat(tuple(CodeFormat(count, bits) for bits, count in parts)), clients, weight)
    limit = np.repeat([(1 << (bits - 1)) - 1 for bits, _ in parts], [count for _, count in parts])
    for sign in (-1, 1):
        words = np.zeros(format.length, np.uint32)
        for _ in range(clients):
            words += format.words((sign * limit).astype(np.int32), weight)
        total, weights = format.read_sum(words, clients)
        assert (total == sign * clients * weight * limit).all() and weights == clients * weight


@given(parts, st.integers(3, 40), st.integers(1, 6), st.integers(0, 10**6))
def test_packing_keeps_the_low_bits_and_takes_no_more(parts, clients, weight, seed):
    format = SumFormat.of(JointFormat(tuple(CodeFormat(count, bits) for bits, count in parts)), clients, weight)
    words = np.random.default_rng(seed).integers(0, 2**32, format.length, dtype=np.uint32)
    packed = format.pack(words)
    assert len(packed) == format.payload_bytes == sum(-(-bits * count // 8) for bits, count in format.widths)
    low = np.concatenate([np.full(count, 2**bits - 1, np.uint32) for bits, count in format.widths])
    assert (format.unpack(packed) == (words & low)).all()
    for wrong in (packed[:-1], packed + b"\0"):
        with pytest.raises(MessageError, match="payload"):
            format.unpack(wrong)


def test_the_weight_is_one_more_coordinate_where_weights_differ():
    assert SumFormat(((7, 5),), 10).length == 5
    format = SumFormat(((7, 5),), 10, 60)
    assert format.length == 6 and format.widths[-1] == ((600).bit_length(), 1)
    words = sum((format.words(np.full(5, -7, np.int32), weight) for weight in (60, 1, 33)), np.zeros(6, np.uint32))
    total, weight = format.read_sum(words, 3)
    assert total.tolist() == [-7 * 94] * 5 and weight == 94


@pytest.mark.parametrize(
    ("weight", "words", "fits"),
    [
        (1, [21, -21, 0], True),
        (1, [22, 0, 0], False),
        (1, [0, -22, 0], False),
        (1, [0, 0, 10], False),
        (5, [7 * 15, -7 * 15, 3 * 15, 15], True),
        (5, [7 * 3, 0, 0, 3], True),
        (5, [7 * 3 + 1, 0, 0, 3], False),
        (5, [0, 0, 3 * 3 + 1, 3], False),
        (5, [0, 0, 0, 2], False),
        (5, [0, 0, 0, 16], False),
        (5, [0, 0, 0, 0], False),
    ],
)
def test_a_sum_that_honest_clients_cannot_make_is_refused(weight, words, fits):
    """Of three clients of ten: one that masks something else than it declared spoils the sum, and mostly shows."""
    format, unmasked = SumFormat(((7, 2), (3, 1)), 10, weight), np.array(words, np.int64).astype(np.uint32)
    if fits:
        assert format.read_sum(unmasked, 3)[0].tolist() == words[:3]
        return
    with pytest.raises(ProtocolError, match="3 clients within the declared limits can make"):
        format.read_sum(unmasked, 3)


@pytest.mark.parametrize(
    ("code", "weight", "said"),
    [
        ([8, 0, 0], 1, r"within \+-7 but the one at coordinate 0 is larger$"),
        ([0, 0, -4], 1, r"within \+-3 but the one at coordinate 2 is larger$"),
        ([0, 0], 1, "3 signed integers"),
        ([0.0, 0.0, 0.0], 1, "3 signed integers but got float64"),
        ([0, 0, 0], 6, r"weight in 1..5"),
        ([0, 0, 0], 0, r"weight in 1..5"),
    ],
)
def test_what_was_not_declared_is_refused(code, weight, said):
    with pytest.raises(ProtocolError, match=said):
        SumFormat(((7, 2), (3, 1)), 10, 5).words(np.array(code), weight)


def test_the_smallest_int_is_no_way_round_the_limit():
    """Its absolute value does not exist in its own type."""
    with pytest.raises(ProtocolError, match="within"):
        SumFormat(((7, 1),), 10).words(np.array([-(2**63)]), 1)


@pytest.mark.parametrize(("format", "said"), [(CodeFormat(3), "QuantizeCodec"), (JointFormat((CodeFormat(3), CodeFormat(3, 4))), "Quant")])
def test_floats_are_refused(format, said):
    with pytest.raises(ConfigurationError, match=said):
        SumFormat.of(format, 10)


def test_sums_of_more_than_32_bits_are_refused():
    assert SumFormat.of(CodeFormat(3, 16), 2**15).widths[0][0] <= 32
    with pytest.raises(ConfigurationError, match="at most 32 bits"):
        SumFormat.of(CodeFormat(3, 16), 2**16, 2)


@pytest.mark.parametrize("changes", [{"limits": ()}, {"limits": ((0, 3),)}, {"clients": 0}, {"max_weight": 0}])
def test_nothing_to_sum_is_refused(changes):
    with pytest.raises(ConfigurationError, match="at least one coordinate"):
        SumFormat(**{"limits": ((7, 3),), "clients": 10} | changes)
