"""A server and nodes that answer letters in this process, each with a disk of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedlight import privacy
from fedlight.clients.local_model import LocalModel
from fedlight.clients.personal import PersonalNorm
from fedlight.codecs import IdentityCodec
from fedlight.core.codec import Codec
from fedlight.deploy import ClientData, InProcess, Node, NodeConfig
from fedlight.deploy.protocol import Letter
from fedlight.deploy.settings import Parts, Terms, read_settings, write_settings
from fedlight.privacy import PrivacyMechanism
from fedlight.rounds import Call, ClientHost, Clients, Connection, Downlink, FullModel, ReplyFormat, Server, Simulated, run_round
from fedlight.rounds.held import HeldModels
from tests.rounds.federation import CLASSES, CLIENTS, FEATURES, PlainModel, blobs, calibrate, codec_of_uploads

NODES = [f"node-{n}" for n in range(CLIENTS)]


class Small(nn.Module):
    """The network of `tests.rounds.federation`, by a class path; weights drawn from a seed of its own."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            middle = [nn.BatchNorm1d(8)] if norm else []
            self.layers = nn.Sequential(nn.Linear(FEATURES, 8), *middle, nn.Tanh(), nn.Linear(8, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Counting(Small):
    """Holds what training changes beside the weights: a running level, and a counter that is no float."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("level", torch.zeros(FEATURES, dtype=torch.float64))
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
            self.level.mul_(0.9).add_(0.1 * x.double().mean(0))
        return super().forward(x - self.level.float())


class Blobs(ClientData):
    def __init__(self, client: int) -> None:
        self.client = client

    def load(self) -> tuple[Tensor, Tensor]:
        return blobs(self.client)


def class_path(name: str, **arguments: Any) -> dict[str, Any]:
    """Return what a YAML says of a class."""
    return {"class_path": name, "init_args": arguments}


LOCAL = {"lr": 0.1, "steps": 3, "batch_size": 8}
FED_AVG = class_path("fedlight.clients.FedAvg", **LOCAL)


@dataclass
class Deployment:
    """A server and its clients, simulated or as nodes."""

    server: Server
    clients: Clients
    calls: list[Call] = field(default_factory=list)

    def run(self, rounds: int = 3) -> Deployment:
        for _ in range(rounds):
            call = run_round(self.server, self.clients, self.server.state.rounds)
            assert call is not None
            self.calls.append(call)
        return self

    @property
    def weights(self) -> Tensor:
        return self.server.model.read().weights


def node(client: int, root: Path, keys: Path | None = None, **settings: Any) -> Node:
    """Return one node."""
    name = NODES[client]
    own = {} if keys is None else {"identity": str(keys / name), "directory": str(keys)}
    return Node(NodeConfig(name, Blobs(client), str(root / name), allow=["tests.deploy"], **own, **settings))


def answers(root: Path, keys: Path | None = None, **settings: Any) -> Callable[[int, Letter], bytes]:
    """Return nodes that keep nothing of an attempt in memory; each is made when it is first asked."""
    made: dict[int, Node] = {}

    def answer(client: int, letter: Letter) -> bytes:
        if client not in made:
            made[client] = node(client, root, keys, **settings)
        return made[client].answer(letter)

    return answer


def deployment(
    codec: Codec | None = None,
    model: Mapping[str, Any] | None = None,
    norm: bool = False,
    downlink: Downlink | None = None,
    nodes: InProcess | None = None,
    cohort: Callable[[int, int], Any] = lambda number, attempt: [c for c in range(CLIENTS) if (c + number) % 4],
    **settings: Any,
) -> Deployment:
    """Return a server with ``nodes``, or with the same clients simulated; three of four take part in a round."""
    told = {"network": class_path("tests.deploy.deployment.Small", norm=norm), "algorithm": FED_AVG, **(model or {})}
    parts = _parts(told)
    algorithm, aggregator, protection = parts.algorithm, parts.aggregator, parts.privacy
    codec = codec_of_uploads(codec, algorithm, parts.layout)
    calibrate(protection, codec, CLIENTS)
    personal, by_samples = parts.batch_norm == "local", parts.weighting == "samples"
    global_model = PlainModel(parts.network)
    host = ClientHost(
        LocalModel(parts.network, lambda net, x, y: nn.functional.cross_entropy(net(x), y)),
        algorithm,
        blobs,
        HeldModels(codec, global_model.read()),
        sealer=aggregator.sealer(),
        hides_messages=aggregator.hides_messages,
        by_samples=by_samples,
        personal=PersonalNorm(parts.network) if personal else None,
        privacy=protection,
    )
    clients: Clients = Simulated(host, stages=aggregator.stages)
    downlink = downlink or FullModel()
    if nodes is not None:
        nodes.configure(told, None)
        format = ReplyFormat.of(parts.network, not personal, by_samples, aggregator, protection)
        clients = nodes.attach(Connection(format, lambda: clients, codec, aggregator, protection, CLIENTS))
        downlink.reset(drawn=False)
    server = Server(global_model, codec, algorithm, aggregator, downlink, cohort, CLIENTS, protection, seed=3, **settings)
    return Deployment(server, clients)


def _parts(model: Mapping[str, Any]) -> Parts:
    terms = Terms(IdentityCodec().config(), tuple(NODES))
    told = {name: value for name, value in model.items() if name != "privacy"}
    parts = read_settings(write_settings(told, None, terms), ["tests.deploy"])
    if "privacy" in model:
        parts.privacy = mechanism(model["privacy"])
    return parts


def mechanism(given: Mapping[str, Any]) -> PrivacyMechanism:
    """Return the privacy mechanism that a YAML names."""
    return getattr(privacy, given["class_path"].rsplit(".", 1)[1])(**given["init_args"])
