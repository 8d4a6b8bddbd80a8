"""What clients hold between rounds."""

from __future__ import annotations

import torch

from fedlight.codecs import LinearCodec
from fedlight.core.export import encoder_file
from fedlight.core.layout import Layout
from fedlight.core.model import Model
from fedlight.rounds.held import HeldModels, beyond_encoder
from fedlight.rounds.messages import Download
from tests.rounds.federation import fitted, network

LAYOUT = Layout.of(network())


def downloaded(device: str) -> HeldModels:
    codec = fitted(LinearCodec(2, block_size=16), LAYOUT)
    held = HeldModels(LinearCodec(2, block_size=16).bind(LAYOUT))
    held.to(torch.device(device))
    encoders, decoders = ((1, encoder_file(codec)),), ((1, beyond_encoder(codec)),)
    model = Model(torch.zeros(LAYOUT.dim), torch.zeros(2))
    started, encoder = held.take(4, Download(1, model=model, encoders=encoders, decoders=decoders, version=1, keep=True))
    assert {started.weights.device.type, started.buffers.device.type} == {device}
    assert {tensor.device.type for tensor in encoder.state_dict().values()} == {device}
    return held


def test_what_is_downloaded_lies_where_clients_train() -> None:
    held = downloaded("meta")  # the only other device that every machine has
    assert {tensor.device.type for tensor in held._decoders[1].state_dict().values()} == {"meta"}


def test_so_does_what_a_checkpoint_restores_and_what_is_moved_later() -> None:
    state = downloaded("cpu").state_dict()
    before, after = HeldModels(LinearCodec(2, block_size=16).bind(LAYOUT)), HeldModels(LinearCodec(2, block_size=16).bind(LAYOUT))
    before.to(torch.device("meta"))
    before.load_state_dict(state)
    after.load_state_dict(state)
    after.to(torch.device("meta"))
    for held in (before, after):
        assert {tensor.device.type for tensor in held.encoder(1).state_dict().values()} == {"meta"}
