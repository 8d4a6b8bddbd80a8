"""A stack of codecs is its codec, once a vector, and numbers that are summed exactly."""

from __future__ import annotations

import pytest
import torch

from fedlight.codecs import ChainCodec, IdentityCodec, LinearCodec, PowerSGDCodec, QuantizeCodec, StackedCodec, TopKCodec, TransformCodec
from fedlight.core.bank import UpdateBank
from fedlight.core.codec import Context, Private
from fedlight.core.export import load_codec, save_codec
from fedlight.core.layout import Layout
from fedlight.core.simulate import simulate_round
from fedlight.modules.pretraining import reconstruction_error

INNER = {
    "identity": IdentityCodec,
    "linear": lambda: LinearCodec(4, block_size=16),
    "quantized": lambda: ChainCodec([LinearCodec(4, block_size=16), QuantizeCodec(6)]),
    "transform": lambda: TransformCodec(4, cohort=5),
    "top-k": lambda: TopKCodec(4),
    "power sgd": lambda: PowerSGDCodec(1),
}


@pytest.fixture(params=INNER)
def make(request):
    return INNER[request.param]


def stacked(make, banks, vectors=2, scalars=1):
    """A fitted codec and its inner one fitted alone to the same updates."""
    layout = banks[0].layout.stacked(vectors, scalars)
    numbers = torch.full((banks[0].rounds, banks[0].clients, scalars), 7.0)
    bank = UpdateBank(torch.cat([banks[0].updates] * vectors + [numbers], -1), layout)
    codec, alone = StackedCodec(make(), vectors, scalars), make()
    codec.fit(bank, lambda *_: {})
    alone.fit(banks[0], lambda *_: {})
    return codec, alone


def test_the_layout_comes_back(banks):
    layout = banks[0].layout
    for vectors, scalars in ((1, 0), (2, 0), (1, 2), (3, 1)):
        whole = layout.stacked(vectors, scalars)
        assert whole.dim == vectors * layout.dim + scalars and whole.unstacked(vectors, scalars) == layout
        assert Layout.from_json(whole.to_json()) == whole
    assert layout.stacked(1) == layout


def test_its_error_is_that_of_the_update_whatever_the_numbers_beside_it(banks):
    codec, alone = stacked(INNER["linear"], banks, vectors=1)
    numbers = torch.full((banks[1].rounds, banks[1].clients, 1), 1000.0)
    beside = UpdateBank(torch.cat([banks[1].updates, numbers], -1), codec.layout)
    assert reconstruction_error(codec, beside) == pytest.approx(reconstruction_error(alone, banks[1]), rel=1e-4)


def test_each_vector_is_decoded_as_its_codec_alone_would(make, banks):
    codec, alone = stacked(make, banks)
    updates, numbers = banks[1].updates[0], torch.arange(5.0)[:, None] - 1.5
    second = 0.5 * updates.flip(0)
    decoded = simulate_round(codec, torch.cat([updates, second, numbers], 1))
    dim = banks[0].layout.dim
    single = simulate_round(alone, updates)
    if alone.integer:  # the second vector's draws follow the first's, which are the same
        torch.testing.assert_close(decoded[:dim], single)
    else:
        torch.testing.assert_close(decoded[: 2 * dim], torch.cat([single, simulate_round(alone, second)]), rtol=1e-4, atol=1e-6)
    assert float(decoded[-1]) == 0.5


def test_what_is_seen_of_a_vector_is_what_its_codec_alone_would_see(banks):
    codec, alone = stacked(lambda: TransformCodec(4, cohort=5, encoder_share=4.0, probes=1), banks)
    code, generator = alone.decoder.sum_length(), torch.Generator().manual_seed(0)
    means, dim = torch.randn(2 * code + 1, generator=generator), banks[0].layout.dim
    context = Context(broadcast=codec.decoder.broadcast({}))
    aggregate = codec.decoder.decode(means, context, {})
    seen = codec.decoder.observe(means, context, aggregate)
    for i in range(2):
        own = Context(broadcast=alone.decoder.broadcast({}))
        part, piece = means[i * code : (i + 1) * code], aggregate[i * dim : (i + 1) * dim]
        expected = alone.decoder.observe(part, own, piece)
        torch.testing.assert_close(seen[i * dim : (i + 1) * dim], expected)
        assert not torch.equal(expected, piece)
    assert torch.equal(seen[2 * dim :], aggregate[2 * dim :])


def test_numbers_are_summed_with_their_weights(make, banks):
    codec, _ = stacked(make, banks, 1, 2)
    numbers = torch.tensor([[1.0, -2.0], [300.25, 0.125]])
    decoded = simulate_round(codec, torch.cat([banks[1].updates[0, :2], numbers], 1), weights=[1, 3])
    torch.testing.assert_close(decoded[-2:], (numbers[0] + 3 * numbers[1]) / 4)


def test_a_message_is_one_header_and_every_part(make, banks):
    codec, alone = stacked(make, banks)
    for step in range(codec.passes):
        numbers = 4 if step == codec.passes - 1 else 0
        assert codec.encoder.format_at(step).payload_bytes == 2 * alone.encoder.format_at(step).payload_bytes + numbers
        assert bool(codec.encoder.format_at(step).bits) == bool(alone.encoder.format_at(step).bits)


def test_vectors_keep_states_of_their_own(banks):
    codec, _ = stacked(INNER["top-k"], banks)
    private = Private(torch.Generator(), {})
    update = torch.cat([banks[1].updates[0, 0], 0 * banks[1].updates[0, 0], torch.ones(1)])
    codec.encoder.encode(update, Context(), private)
    rest = [next(iter(state.values())) for state in private.state.values()]
    assert len(rest) == 2 and rest[0].any() and not rest[1].any()


def test_a_number_out_of_range_is_held_at_its_end(banks):
    codec, _ = stacked(IdentityCodec, banks, 1, 1)
    update = torch.cat([banks[1].updates[0, 0], torch.tensor([1e9])])
    assert float(simulate_round(codec, update[None])[-1]) == pytest.approx(32768, abs=0.01)


def test_it_comes_back_from_its_files(make, banks, tmp_path):
    codec, _ = stacked(make, banks)
    save_codec(codec, tmp_path)
    again = load_codec(tmp_path)
    updates = torch.cat([banks[1].updates[0]] * 2 + [torch.ones(5, 1)], 1)
    assert torch.equal(simulate_round(again, updates), simulate_round(codec, updates))
    assert again.encoder.fingerprint == codec.encoder.fingerprint


def test_a_codec_that_was_fitted_before_keeps_its_tensors(make, banks):
    alone = make()
    alone.fit(banks[0], lambda *_: {})
    before = {name: value.clone() for name, value in alone.encoder.state_dict().items()}
    codec = StackedCodec(alone, 2, 0).bind(banks[0].layout.stacked(2))
    after = codec.codec.encoder.state_dict()
    assert codec.fitted and all(torch.equal(after[name], before[name]) for name in before)
