from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlight.aggregation.secure import SumFormat
from fedlight.aggregation.secure.sums import add_mask, draw_mask
from fedlight.codecs.allocation import masked_cost
from fedlight.core.errors import ConfigurationError, MessageError, ProtocolError
from fedlight.core.wire import CodeFormat, JointFormat

parts = st.lists(st.tuples(st.integers(2, 8), st.integers(1, 9)), min_size=1, max_size=4)


@given(st.integers(2, 16), st.integers(3, 1000), st.integers(1, 20))
def test_the_modulus_is_the_smallest_that_cannot_overflow(bits, clients, weight):
    most = clients * weight * (2 ** (bits - 1) - 1)
    (modulus, _), *_ = SumFormat.of(CodeFormat(4, bits), clients, weight).moduli
    assert modulus == 2 * most + 1


@given(st.integers(2, 8), st.integers(3, 200), st.integers(1, 20), st.integers(1, 500))
def test_it_is_what_codecs_budget_for(bits, clients, weight, count):
    """To two bytes a part, for numbers that fill no whole group."""
    format = SumFormat(SumFormat.of(CodeFormat(count, bits), clients).limits, clients * weight)
    budgeted = masked_cost(clients * weight)(bits) * count / 8
    assert budgeted - 8 <= format.payload_bytes <= budgeted + 2.2


def test_two_bits_from_ten_clients_take_four_and_a_half_and_four_take_seven():
    """21 values are worth 4.392 bits, 141 are worth 7.14."""
    format = SumFormat.of(CodeFormat(1000, 2), 10)
    assert format.moduli == ((21, 1000),) and format.payload_bytes == 550 and format.kind == 5
    assert SumFormat.of(CodeFormat(1000, 4), 10).payload_bytes == 894


@given(parts, st.integers(3, 40), st.integers(1, 6))
def test_sums_at_the_ends_of_the_range_are_exact(parts, clients, weight):
    """The whole cohort at one end with the largest weight: the widest sum there is."""
    format = SumFormat.of(JointFormat(tuple(CodeFormat(count, bits) for bits, count in parts)), clients, weight)
    limit = np.repeat([(1 << (bits - 1)) - 1 for bits, _ in parts], [count for _, count in parts])
    for sign in (-1, 1):
        words = np.zeros(format.length, np.uint64)
        for _ in range(clients):
            words += format.words((sign * limit).astype(np.int32), weight)
            words %= format.modulus
        total, weights, *_ = format.read_sum(words, clients)
        assert (total == sign * clients * weight * limit).all() and weights == clients * weight


@given(parts, st.integers(3, 40), st.integers(1, 6), st.integers(0, 10**6))
def test_packing_keeps_every_word_and_takes_little_more_than_they_are_worth(parts, clients, weight, seed):
    format = SumFormat.of(JointFormat(tuple(CodeFormat(count, bits) for bits, count in parts)), clients, weight)
    words = np.random.default_rng(seed).integers(0, 2**63, format.length, dtype=np.uint64) % format.modulus
    packed = format.pack(words)
    assert len(packed) == format.payload_bytes <= sum(count * math.log2(m) / 8 * 1.03 + 2.2 for m, count in format.moduli)
    assert (format.unpack(packed) == words).all()
    for wrong in (packed[:-1], packed + b"\0"):
        with pytest.raises(MessageError, match="payload"):
            format.unpack(wrong)


def test_words_beyond_the_modulus_are_refused():
    format = SumFormat(((1, 10),), 10)
    assert format.payload_bytes == 6
    with pytest.raises(MessageError, match="below 21"):
        format.unpack(bytes([255] * 5 + [15]))


@given(st.lists(st.integers(2, 2**32), min_size=1, max_size=300), st.integers(0, 255))
def test_masks_cancel_and_lie_below_their_modulus(moduli, seed):
    modulus, key = np.array(moduli, np.uint64), bytes([seed]) * 32
    words = modulus - np.uint64(1)
    masked = words.copy()
    add_mask(masked, key, modulus)
    assert (masked < modulus).all() and (draw_mask(key, modulus) < modulus).all()
    add_mask(masked, key, modulus, negative=True)
    assert (masked == words).all()


@pytest.mark.parametrize("modulus", [3, 21, 141, 3 * 2**30, 2**31 + 1, 2**32])
def test_masks_are_uniform(modulus):
    """Also where nearly every second word of the stream has to be drawn again: a fourth of the range has a fourth of the mask."""
    drawn = draw_mask(bytes(32), np.full(400_000, modulus, np.uint64))
    counts = np.bincount((drawn * np.uint64(min(modulus, 8)) // np.uint64(modulus)).astype(int), minlength=min(modulus, 8))
    exact = np.array([np.ceil((i + 1) * modulus / len(counts)) - np.ceil(i * modulus / len(counts)) for i in range(len(counts))]) / modulus
    assert (np.abs(counts / len(drawn) - exact) < 5 * np.sqrt(exact / len(drawn))).all()


def test_the_weight_is_one_more_coordinate_where_weights_differ():
    assert SumFormat(((7, 5),), 10).length == 5
    format = SumFormat(((7, 5),), 10, 60)
    assert format.length == 6 and format.moduli[-1] == (601, 1)
    words = sum(format.words(np.full(5, -7, np.int32), weight) for weight in (60, 1, 33)) % format.modulus
    total, weight, *_ = format.read_sum(words, 3)
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
    format = SumFormat(((7, 2), (3, 1)), 10, weight)
    unmasked = (np.array(words) % format.modulus.astype(np.int64)).astype(np.uint64)
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
    assert SumFormat.of(CodeFormat(3, 16), 2**15).moduli[0][0] < 2**32
    with pytest.raises(ConfigurationError, match="at most 32 bits"):
        SumFormat.of(CodeFormat(3, 16), 2**16, 2)


@pytest.mark.parametrize("changes", [{"limits": ()}, {"limits": ((0, 3),)}, {"clients": 0}, {"max_weight": 0}])
def test_nothing_to_sum_is_refused(changes):
    with pytest.raises(ConfigurationError, match=f"Expected `{next(iter(changes))}`"):
        SumFormat(**{"limits": ((7, 3),), "clients": 10} | changes)
