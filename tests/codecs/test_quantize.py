from __future__ import annotations

import math

import pytest
import torch

from fedlight.codecs.quantize import QuantizeDecoder, QuantizeEncoder, integer_format
from fedlight.core.codec import Context, Private, ServerContext
from fedlight.core.layout import Layout
from fedlight.core.wire import CodeFormat, JointFormat

RUNS = [(4, 2), (3, 1), (2, 3)]


def test_runs_of_several_widths_make_a_format_of_parts():
    assert integer_format([(4, 6)]) == CodeFormat(6, 4)
    assert integer_format(RUNS) == JointFormat((CodeFormat(2, 4), CodeFormat(1, 3), CodeFormat(3, 2)))


@pytest.mark.parametrize("one_step", [True, False])
def test_every_part_ends_where_its_own_bits_do(one_step):
    encoder = QuantizeEncoder(Layout.vector(6), RUNS, one_step)
    assert encoder.step.shape == ((1,) if one_step else (6,))
    for sign in (1, -1):
        code = encoder.encode(torch.full((6,), sign * 1e6), Context(), Private(torch.Generator()))
        assert code.tolist() == [sign * 7, sign * 7, sign * 3, sign, sign, sign] and code.dtype == torch.int32
        assert torch.equal(encoder.format.unpack(encoder.format.pack(code)), code)


def test_one_step_and_the_gain_scale_all_coefficients():
    encoder = QuantizeEncoder(Layout.vector(4), [(8, 4)], one_step=True)
    decoder = QuantizeDecoder(Layout.vector(4), [(8, 4)], smoothing=1.0, one_step=True)
    encoder.step.fill_(0.5)
    decoder.step.fill_(0.5)
    context = Context(broadcast={"gain": 2.0})
    update = torch.tensor([3.0, -5.0, 0.0, 17.0])  # whole steps of 0.5 * 2
    code = encoder.encode(update, context, Private(torch.Generator().manual_seed(0)))
    assert code.tolist() == update.tolist() and torch.equal(decoder.decode(code.float(), context, {}), update)


def decoder_of(scales: list[float], clients: int = 8, smoothing: float = 0.0, dim: int = 400) -> tuple[QuantizeDecoder, torch.Tensor]:
    """A decoder whose gain was fitted to rounds of these scales, and their codes ``[rounds, clients, dim]``: half common, half own."""
    generator = torch.Generator().manual_seed(0)
    common, own = torch.randn(len(scales), 1, dim, generator=generator), torch.randn(len(scales), clients, dim, generator=generator)
    codes = 8 * (common + own) * torch.tensor(scales)[:, None, None]
    decoder = QuantizeDecoder(Layout.vector(dim), [(8, dim)], smoothing, one_step=True)
    means = codes.mean(1, keepdim=True)
    decoder.fit_gain(means.square().mean((1, 2)), (codes - means).square().mean((1, 2)), clients)
    return decoder, codes


def test_the_first_rounds_gain_is_the_first_recorded_rounds_size():
    """Relative to the bank's clients, whose mean square is that of gain 1."""
    scales = [2.0, 1.0, 0.5]
    decoder, codes = decoder_of(scales)
    size = codes.square().mean((1, 2))
    expected = math.sqrt(float(size[0] / size.mean()))
    assert decoder.broadcast({})["gain"] == pytest.approx(expected, rel=0.02)
    assert decoder.broadcast({"gain": 7.0}) == {"gain": 7.0}


@pytest.mark.parametrize("scale", [2.0, 1.0, 0.5, 0.1])
@pytest.mark.parametrize("cohort", [2, 8, 32])
def test_the_gain_is_predicted_from_the_mean_whatever_the_cohort(scale, cohort):
    decoder, codes = decoder_of([2.0, 1.0, 0.5, 0.25])
    gain_of_one = codes.square().mean().sqrt()
    generator = torch.Generator().manual_seed(1)
    updates = 8 * scale * (torch.randn(1, 400, generator=generator) + torch.randn(cohort, 400, generator=generator))
    state: dict[str, float] = {}
    decoder.decode(updates.mean(0), ServerContext(clients=cohort, broadcast={"gain": 1.0}), state)
    assert state["gain"] == pytest.approx(float(updates.square().mean().sqrt() / gain_of_one), rel=0.25)


def test_smoothing_keeps_part_of_the_old_gain():
    gains = {}
    for smoothing in (0.0, 0.5, 1.0):
        decoder, codes = decoder_of([2.0, 1.0, 0.5], smoothing=smoothing)
        state: dict[str, float] = {}
        decoder.decode(0.01 * codes[0].mean(0), ServerContext(clients=8, broadcast={"gain": 3.0}), state)
        gains[smoothing] = state.get("gain", 3.0)
    assert gains[1.0] == 3.0 and gains[0.5] == pytest.approx(math.sqrt(gains[0.0] * 3.0)) and gains[0.0] < gains[0.5]


def test_a_round_of_nothing_keeps_the_gain_and_looking_does_not_move_it():
    decoder, codes = decoder_of([2.0, 1.0])
    state: dict[str, float] = {}
    assert not decoder.decode(torch.zeros(400), ServerContext(clients=8, broadcast={"gain": 3.0}), state).any()
    decoder.decode(codes[0].mean(0), ServerContext(clients=0, broadcast={"gain": 3.0}), state)
    assert state == {}


def test_a_bank_of_equal_rounds_predicts_the_same_gain_from_any_mean():
    decoder, _ = decoder_of([1.0])
    assert float(decoder.line[0]) == 0
    state: dict[str, float] = {}
    for scale in (0.1, 10.0):
        decoder.decode(scale * torch.ones(400), ServerContext(clients=8, broadcast={"gain": 1.0}), state)
        assert state["gain"] == pytest.approx(1.0)
