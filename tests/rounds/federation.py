"""Both sides of a round without Lightning: a small network, Gaussian blobs, a server with plain SGD."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedlight.aggregation import Aggregator, PlainAggregator
from fedlight.clients import Algorithm, FedAvg
from fedlight.clients.local_model import LocalModel
from fedlight.clients.personal import PersonalNorm
from fedlight.clients.store import ClientStore
from fedlight.codecs import IdentityCodec, StackedCodec
from fedlight.core.bank import UpdateBank
from fedlight.core.codec import Codec
from fedlight.core.layout import Layout, flatten, float_buffers
from fedlight.core.model import Model
from fedlight.privacy import AccountingSetting, PrivacyMechanism
from fedlight.rounds import (
    Availability,
    Call,
    ClientHost,
    Clients,
    Downlink,
    Full,
    FullModel,
    ReplyFormat,
    Server,
    Simulated,
    ThroughBytes,
    run_round,
)
from fedlight.rounds.held import HeldModels

FEATURES, CLASSES, CLIENTS = 6, 3, 8


def network(norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(8)] if norm else []
    return nn.Sequential(nn.Linear(FEATURES, 8), *middle, nn.Tanh(), nn.Linear(8, CLASSES))


def blobs(client: int) -> tuple[Tensor, Tensor]:
    """Return a client's samples; clients have different numbers of them."""
    rng = np.random.default_rng(client)
    y = rng.integers(CLASSES, size=20 + client)
    x = rng.normal(size=(len(y), FEATURES)) + 2 * np.eye(CLASSES, FEATURES)[y]
    return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y)


class PlainModel:
    """A global model with an optimizer of its own."""

    device = torch.device("cpu")

    def __init__(self, network: nn.Module, lr: float = 1.0) -> None:
        self.network = network
        self.parameters = list(network.parameters())
        self.optimizer = torch.optim.SGD(self.parameters, lr)

    def read(self) -> Model:
        return Model(flatten(self.parameters), flatten(float_buffers(self.network)))

    def extras(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self.network.state_dict()[name].clone() for name in names}

    def step(self, update: Tensor, buffers: Tensor | None, extras: Mapping[str, Tensor] | None = None) -> float:
        for parameter, piece in zip(self.parameters, Layout.of(self.network).split(update), strict=True):
            parameter.grad = piece
        self.optimizer.step()
        if buffers is not None:
            own = float_buffers(self.network)
            for buffer, part in zip(own, torch.split(buffers, [b.numel() for b in own]), strict=True):
                buffer.copy_(part.view(buffer.shape))
        for name, value in (extras or {}).items():
            self.network._buffers[name] = value
        return float(self.optimizer.param_groups[0]["lr"])

    def write(self, weights: Tensor) -> None:
        with torch.no_grad():
            for parameter, piece in zip(self.parameters, Layout.of(self.network).split(weights), strict=True):
                parameter.copy_(piece)


def fitted(codec: Codec, layout: Layout) -> Codec:
    """Return the codec, ready to be used: fitted to made-up updates of a few directions if it has to be."""
    if not codec.needs_fit:
        return codec.bind(layout)
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(6, layout.dim, generator=generator)
    codec.fit(UpdateBank(0.1 * torch.randn(8, 4, 6, generator=generator) @ directions, layout), lambda *_: {})
    return codec


def codec_of_uploads(codec: Codec | None, algorithm: Algorithm, layout: Layout) -> Codec:
    """Return the codec, ready to be used, of all that clients of an algorithm upload."""
    codec = codec or IdentityCodec()
    if algorithm.vectors > 1 or algorithm.scalars:
        codec = StackedCodec(codec, algorithm.vectors, algorithm.scalars)
    return fitted(codec, layout)


def calibrate(privacy: PrivacyMechanism | None, codec: Codec, population: int) -> None:
    """Begin a mechanism, if there is one, for six rounds of three quarters of the clients."""
    if privacy is not None:
        length, bits = codec.decoder.sum_length(), codec.encoder.format.bits
        privacy.calibrate(AccountingSetting(0.75, 6, None, length, codec.integer, bits), population)


@dataclass
class Federation:
    """A server, its clients, and what passed between them."""

    server: Server
    clients: Clients
    host: ClientHost
    calls: list[Call] = field(default_factory=list)

    def run(self, rounds: int = 3) -> Federation:
        """Run so many more rounds."""
        for _ in range(rounds):
            call = run_round(self.server, self.clients, self.server.state.rounds)
            assert call is not None
            self.calls.append(call)
        return self

    @property
    def weights(self) -> Tensor:
        """The global model's weights ``[dim]``."""
        return self.server.model.read().weights

    @property
    def buffers(self) -> Tensor:
        """The global model's buffers."""
        return self.server.model.read().buffers


def federation(
    codec: Codec | None = None,
    algorithm: Algorithm | None = None,
    aggregator: Aggregator | None = None,
    downlink: Downlink | None = None,
    privacy: PrivacyMechanism | None = None,
    availability: Availability | None = None,
    by_samples: bool = False,
    norm: bool = False,
    personal: bool = False,
    through_bytes: bool = False,
    wrap: Callable[[Clients], Clients] = lambda clients: clients,
    cohort: Callable[[int, int], Any] = lambda number, attempt: [c for c in range(CLIENTS) if (c + number) % 4],
    **settings: Any,
) -> Federation:
    """Return both sides of a federated run of ``CLIENTS`` clients; three of four take part in a round."""
    module, algorithm, aggregator = network(norm), algorithm or FedAvg(lr=0.1, steps=3, batch_size=8), aggregator or PlainAggregator()
    codec = codec_of_uploads(codec, algorithm, Layout.of(module).stacked(algorithm.vectors, algorithm.scalars))
    calibrate(privacy, codec, population=1000)
    local = LocalModel(module, lambda net, x, y: nn.functional.cross_entropy(net(x), y))
    model = PlainModel(module)
    compares = lambda number: aggregator.sim_logs and not through_bytes  # noqa: E731
    host = ClientHost(
        local,
        algorithm,
        blobs,
        HeldModels(codec, model.read()),
        sealer=aggregator.sealer(),
        hides_messages=aggregator.hides_messages,
        store=ClientStore(),
        by_samples=by_samples,
        personal=PersonalNorm(module) if personal else None,
        privacy=privacy,
        compares=compares,
    )
    clients: Clients = wrap(Simulated(host, availability or Full(), lambda client: 1, aggregator.stages))
    if through_bytes:
        clients = ThroughBytes(clients, ReplyFormat.of(module, not personal, by_samples, aggregator, privacy))
    server = Server(
        model, codec, algorithm, aggregator, downlink or FullModel(), cohort, CLIENTS, privacy, compares=compares, seed=3, **settings
    )
    return Federation(server, clients, host)
