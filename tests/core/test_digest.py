"""Digests: equal for what is equal, different for everything else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedlight.codecs import ChainCodec, LinearCodec, QuantizeCodec
from fedlight.core.codec import Codec, Context
from fedlight.core.digest import digest_context, encoder_digest
from fedlight.core.errors import ConfigurationError
from fedlight.core.layout import Layout

PUBLIC = Context(1, 2, 3, 0, broadcast={"0": {"gain": 1.0}, "clip": 0.5})


def test_what_everybody_was_told_has_one_digest_in_any_order():
    assert digest_context(PUBLIC) == digest_context(replace(PUBLIC, broadcast={"clip": 0.5, "0": {"gain": 1.0}}))
    assert len(digest_context(PUBLIC)) == 32


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 2},
        {"round": 3},
        {"attempt": 4},
        {"step": 1},
        {"broadcast": {}},
        {"broadcast": {"0": {"gain": 1e30}, "clip": 0.5}},
        {"broadcast": {"0": {"gain": 1.0, "clip": 0.5}}},
        {"broadcast": {"0": {"gain": 1.0}, "clip": 0.5000000000000001}},
        {"broadcast": {"0": {"gain": 1.0}, "clip": "0.5"}},
        {"broadcast": {"0": {"gain": 1.0}, "clip": [0.5]}},
        {"broadcast": {"0": {"gain": 1.0}, "clip": torch.tensor(0.5)}},
        {"broadcast": {"0": {"gain": 1.0}, "clip": torch.tensor(-0.5)}},
        {"broadcast": {"0": {"gain": 1.0}, "clip": None}},
    ],
)
def test_any_difference_in_what_clients_are_told_shows(changes):
    assert digest_context(replace(PUBLIC, **changes)) != digest_context(PUBLIC)


def test_neighbours_are_told_apart():
    """Entries that look alike once they are put one behind the other."""
    broadcast = [{"a": 12, "b": 3}, {"a": 1, "b": 23}, {"ab": "c"}, {"a": "bc"}, {"a": [1, [2]]}, {"a": [[1], 2]}, {"a": [1, 2]}]
    assert len({digest_context(Context(broadcast=told)) for told in broadcast}) == len(broadcast)


def test_what_has_no_bytes_of_its_own_is_refused():
    with pytest.raises(ConfigurationError, match="but got object: broadcast those"):
        digest_context(Context(broadcast={"gain": object()}))


def fresh(seed: int) -> LinearCodec:
    return LinearCodec(2, "random", blocks="flat", block_size=0, seed=seed, fresh=True)


def test_encoders_that_differ_in_no_tensor_have_digests_of_their_own():
    """Bases that are drawn anew from a seed, and the kinds of the codecs within a chain, are in no state."""

    class Other(LinearCodec):
        pass

    def chain(first: Codec) -> Codec:
        return ChainCodec([first, QuantizeCodec(4)])

    codecs = [fresh(0), fresh(1), chain(fresh(0)), chain(fresh(1)), chain(Other(2, "random", blocks="flat", block_size=0, fresh=True))]
    digests = [encoder_digest(codec.bind(Layout.vector(12)).encoder) for codec in codecs]
    assert len(set(digests)) == len(codecs) and set(map(len, digests)) == {32}
    assert encoder_digest(fresh(0).bind(Layout.vector(12)).encoder) == digests[0]


def test_an_encoder_whose_tensors_were_changed_has_another_digest():
    encoder = QuantizeCodec(4).bind(Layout.vector(5)).encoder
    before = encoder_digest(encoder)
    encoder.step.mul_(2)
    assert encoder_digest(encoder) != before


def test_messages_carry_the_beginning_of_the_digest():
    codec = fresh(0).bind(Layout.vector(12))
    assert codec.encoder.digest == codec.decoder.digest and len(codec.encoder.digest) == 32
    assert codec.encoder.fingerprint.to_bytes(4, "little") == codec.encoder.digest[:4]
