from __future__ import annotations

import pytest
import torch

from fedlight.codecs import AutoencoderCodec, ChainCodec, GridCodec, HalfCodec, IdentityCodec, LinearCodec, QuantizeCodec, TransformCodec
from fedlight.codecs.quantize import QuantizeEncoder
from fedlight.core.codec import Context, Private, ServerContext
from fedlight.core.errors import ConfigurationError
from fedlight.core.layout import Layout
from fedlight.core.wire import CodeFormat

LAYOUT = Layout.vector(200)


def private(seed: int) -> Private:
    return Private(torch.Generator().manual_seed(seed))


def test_rounding_is_unbiased_on_one_step_and_stays_in_range():
    codec = GridCodec(0.01, 12).bind(LAYOUT)
    assert codec.encoder.format == CodeFormat(200, 12) and codec.fitted
    update = torch.randn(200, generator=torch.Generator().manual_seed(0))
    codes = torch.stack([codec.encoder.encode(update, Context(), private(seed)) for seed in range(400)])
    assert (codes.float() * 0.01 - update).abs().max() < 0.0101
    assert (codes.float().mean(0) * 0.01 - update).abs().max() < 0.003
    far = codec.encoder.encode(torch.full((200,), 1e9), Context(), private(0))
    assert set(far.tolist()) == {2047}


def test_decoding_multiplies_by_the_step_and_nothing_is_learned_from_sums():
    codec, state = GridCodec(0.5, 8).bind(LAYOUT), {}
    mean = torch.arange(200).float()
    assert torch.equal(codec.decoder.decode(mean, ServerContext(clients=3), state), 0.5 * mean)
    assert codec.decoder.broadcast(state) == {"gain": 1.0}


@pytest.mark.parametrize("arguments", [{"step": 0.0}, {"step": 1.0, "bits": 1}, {"step": 1.0, "bits": 25}], ids=str)
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(ConfigurationError, match=f"^Expected `{[*arguments][-1]}`[^`]*$"):
        GridCodec(**arguments)


@pytest.mark.parametrize(
    ("codec", "unit"),
    [
        (IdentityCodec(), 1.0),
        (HalfCodec(), 1.0),
        (LinearCodec(4, "random", block_size=16), 1.0),
        (AutoencoderCodec(4, block_size=16), 1.0),
        (GridCodec(0.25), 0.25),
        (ChainCodec([LinearCodec(4, "random", block_size=16), GridCodec(0.25)]), 0.25),
        (QuantizeCodec(4), None),
        (ChainCodec([LinearCodec(4, "random", block_size=16), QuantizeCodec(4)]), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_unit_is_what_all_entries_of_a_code_have_in_common(codec, unit):
    codec.bind(LAYOUT)
    assert codec.encoder.common_step(Context(broadcast=codec.decoder.broadcast({}))) == unit


def test_the_unit_of_transform_coding_is_its_step_times_the_gain_of_the_round():
    codec = TransformCodec(4, encoder_share=1.0).bind(Layout.vector(2000))
    quantize = codec.encoder.stage(1)
    assert isinstance(quantize, QuantizeEncoder)
    quantize.step.fill_(0.5)
    assert codec.encoder.common_step(Context(broadcast={"1": {"gain": 3.0}})) == 1.5
