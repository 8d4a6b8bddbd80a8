"""Clients in other processes give the run of a simulation, bit for bit, though nothing of them stays in memory between two letters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlight.codecs import IdentityCodec, LinearCodec, PowerSGDCodec, QSGDCodec, TopKCodec, TransformCodec
from fedlight.core.codec import Codec
from fedlight.core.errors import RoundFailedError
from fedlight.deploy import InProcess
from fedlight.deploy.protocol import Letter
from fedlight.modules.checks import private_codec
from fedlight.rounds import CatchUp, Downlink, FullModel
from tests.deploy.deployment import LOCAL, NODES, Deployment, answers, class_path, deployment, mechanism
from tests.rounds.test_through_bytes import integers


def same(tmp_path: Path, codec: Callable[[], Codec] = IdentityCodec, rounds: int = 4, keys: Path | None = None, **way: Any) -> Deployment:
    """Run both ways and compare weights, sums and who counted."""
    downlink: Callable[[], Downlink] = way.pop("downlink", FullModel)
    plain = deployment(codec(), downlink=downlink(), **way).run(rounds)
    nodes = InProcess(answers(tmp_path, keys), NODES, keys=None if keys is None else str(keys), reproducible=True)
    carried = deployment(codec(), downlink=downlink(), nodes=nodes, **way).run(rounds)
    for one, other in zip(plain.calls, carried.calls, strict=True):
        assert not other.dropped, other.dropped
        assert one.counted == other.counted and one.context.key == other.context.key
        assert one.codes.total is not None and other.codes.total is not None and torch.equal(one.codes.total, other.codes.total)
    assert torch.equal(plain.weights, carried.weights)
    assert torch.equal(plain.server.model.read().buffers, carried.server.model.read().buffers)
    assert plain.server.state.extras == carried.server.state.extras
    for name, tensor in plain.server.model.extras(plain.server.state.extras).items():
        assert torch.equal(tensor, carried.server.model.extras([name])[name])
    return carried


CODECS: dict[str, Callable[[], Codec]] = {
    "identity": IdentityCodec,
    "random projection": integers,
    "transform": lambda: TransformCodec(3, encoder_share=2.0),
    "top-k": lambda: TopKCodec(2),
    "QSGD": lambda: QSGDCodec(4),
    "two passes": lambda: PowerSGDCodec(2),
}


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_every_kind_of_codec(tmp_path: Path, codec: Callable[[], Codec]) -> None:
    same(tmp_path, codec)


ALGORITHMS = ("FedSGD", "FedProx", "FedNova", "QFedAvg", "FedDyn", "Ditto", "Scaffold")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm(tmp_path: Path, name: str) -> None:
    settings = {"FedSGD": {}, "FedProx": {"mu": 0.1, **LOCAL}}.get(name, LOCAL)
    same(tmp_path, rounds=6, model={"algorithm": class_path(f"fedlight.clients.{name}", **settings), "weighting": "samples"})


@pytest.mark.parametrize("batch_norm", ["mean", "local"])
def test_batch_norm(tmp_path: Path, batch_norm: str) -> None:
    same(tmp_path, integers, norm=True, model={"batch_norm": batch_norm})


WAYS: dict[str, tuple[Callable[[], Codec], Callable[[], Downlink]]] = {
    "the whole model": (IdentityCodec, FullModel),
    "catching up": (IdentityCodec, CatchUp),
    "two passes": (CODECS["two passes"], FullModel),
}


@pytest.mark.parametrize(("codec", "downlink"), WAYS.values(), ids=WAYS)
def test_what_else_training_changes(tmp_path: Path, codec: Callable[[], Codec], downlink: Callable[[], Downlink]) -> None:
    """It is downloaded, sent, and kept between the two passes, like weights."""
    model = {"network": class_path("tests.deploy.deployment.Counting")}
    run = same(tmp_path, codec, rounds=6, downlink=downlink, model=model, takes_extras=True)
    found = run.server.model.extras(["level", "seen"])
    assert int(found["seen"]) == 6 * LOCAL["steps"] and float(found["level"].abs().min()) > 0


@pytest.mark.parametrize("codec", [IdentityCodec, CODECS["transform"]], ids=["identity", "transform"])
def test_catching_up(tmp_path: Path, codec: Callable[[], Codec]) -> None:
    same(tmp_path, codec, rounds=7, downlink=CatchUp)


SECURE = class_path("fedlight.aggregation.SecureAggregator", cohort=8, threshold=5)


def test_secure_aggregation(tmp_path: Path, keys: Path) -> None:
    same(tmp_path, integers, keys=keys, model={"aggregator": SECURE})


def test_secure_aggregation_with_weights(tmp_path: Path, keys: Path) -> None:
    aggregator = class_path("fedlight.aggregation.SecureAggregator", cohort=8, threshold=5, max_weight=40)
    same(tmp_path, integers, keys=keys, model={"aggregator": aggregator, "weighting": "samples"})


def test_nothing_private_is_the_same_twice_by_default(tmp_path: Path) -> None:
    one, other = (deployment(QSGDCodec(4), nodes=InProcess(answers(tmp_path / str(n)), NODES)).run(2) for n in range(2))
    assert not torch.equal(one.weights, other.weights)


PRIVACY = {"clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-2}


@pytest.mark.parametrize(("name", "arguments"), [("CentralDP", {}), ("LocalDP", {}), ("DistributedDP", {"threshold": 3})])
def test_privacy(tmp_path: Path, name: str, arguments: dict[str, Any]) -> None:
    given = class_path(f"fedlight.privacy.{name}", **PRIVACY, **arguments)
    codec = private_codec(LinearCodec(2, "random", block_size=16), mechanism(given))
    run = deployment(codec, {"privacy": given}, nodes=InProcess(answers(tmp_path), NODES)).run(2)
    assert torch.isfinite(run.weights).all() and not any(call.dropped for call in run.calls)


def test_noise_that_a_seed_tells_is_refused(tmp_path: Path) -> None:
    given = class_path("fedlight.privacy.LocalDP", simulation_seed=0, **PRIVACY)
    codec = LinearCodec(2, "random", block_size=16)
    with pytest.raises(RoundFailedError, match="it cannot build what the run names"):
        deployment(codec, {"privacy": given}, nodes=InProcess(answers(tmp_path), NODES)).run(1)


def test_logs_and_errors_call_a_node_by_its_own_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also where a reason names another one by number, as secure aggregation does."""

    def garbage(client: int, letter: Letter) -> bytes:
        return b"\xff" if client == 2 else honest(client, letter)

    honest = answers(tmp_path)
    deployment(nodes=InProcess(garbage, NODES)).run(1)
    assert f"{NODES[2]} was dropped" in caplog.text and "client 2" not in caplog.text
    with pytest.raises(RoundFailedError, match=f"{NODES[1]}: Expected an answer"):
        deployment(nodes=InProcess(lambda *_: b"\xff", NODES)).run(1)
    sentence = InProcess(garbage, NODES).named("the seed that client 1 committed to, and client 99's shares")
    assert sentence == f"the seed that {NODES[1]} committed to, and client 99's shares"
