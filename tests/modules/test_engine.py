"""Engines in a run: the same rounds by either, refusals before anything is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from fedlight.clients import FedAvg, Scaffold, Sequential, Vectorized
from fedlight.core.errors import ConfigurationError
from fedlight.data import Dirichlet
from tests.federation import FEATURES, federated, federated_data, learned, mlp, run, trainer, weights_of


@pytest.mark.parametrize("weighting", ["equal", "samples"])
def test_rounds_are_the_same_by_either_engine(weighting: str) -> None:
    ends, orders, losses = [], [], []
    for engine in (Sequential(), Vectorized(clients=3)):
        module = federated(engine=engine, weighting=weighting, algorithm=FedAvg(lr=0.1, batch_size=8, epochs=1, momentum=0.5))
        data = federated_data(partitioner=Dirichlet(0.5))
        data.setup()
        assert len({data.client_size(client) for client in range(8)}) > 1
        spy = run(module, data=data)
        ends.append(weights_of(module))
        orders.append(spy.clients)
        losses.append([upload.loss for upload in spy.uploads.values()])
    way = float((ends[0] - weights_of(mlp())).norm())
    assert float((ends[0] - ends[1]).norm()) <= 1e-5 * way
    assert orders[0] == orders[1] and all(order == sorted(order) for order in orders[1].values())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_client_that_is_not_finite_is_dropped_alone(caplog: pytest.LogCaptureFixture) -> None:
    data = federated_data()
    data.setup()
    data.x[data.client_indices(3)[0]] = float("nan")
    module = federated(engine=Vectorized(clients=8))
    spy = run(module, rounds=1, data=data)
    assert spy.clients[0] == [0, 1, 2, 4, 5, 6, 7]
    assert "client 3 was dropped" in caplog.text and torch.isfinite(weights_of(module)).all()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"network": mlp(dropout=0.5)}, "`network`"),
        ({"network": mlp(norm=True)}, "`network`"),
        ({"network": mlp(norm=True), "batch_norm": "local"}, "`batch_norm`"),
        ({"algorithm": Scaffold(steps=2)}, "`algorithm`"),
    ],
    ids=["dropout", "batch norm", "local batch norm", "scaffold"],
)
def test_what_cannot_be_vectorised_is_refused_before_the_codec_is_trained(changes: dict[str, Any], named: str) -> None:
    module = federated(engine=Vectorized(), codec=learned(), **changes)
    with pytest.raises(ConfigurationError, match=f"{named}.*`engine` Vectorized.*engine Sequential"):
        run(module, rounds=1)
    assert not module.codec.fitted


def test_a_lightning_module_is_refused() -> None:
    class Own(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(FEATURES, 3)

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            return nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    for algorithm, named in ((FedAvg(steps=1), "`loss`"), (None, "`algorithm`")):
        module = federated(Own(), engine=Vectorized(), algorithm=algorithm)
        with pytest.raises(ConfigurationError, match=f"{named}.*engine Sequential"):
            trainer(1).fit(module, datamodule=federated_data())


def test_a_run_goes_on_with_the_other_engine(tmp_path: Any) -> None:
    def fit(engine: Any, rounds: int, **resume: Any) -> tuple[Any, Any]:
        module = federated(engine=engine)
        used = trainer(rounds)
        used.fit(module, datamodule=federated_data(), **resume)
        return used, module

    _, whole = fit(Sequential(), 2)
    half, _ = fit(Sequential(), 1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = fit(Vectorized(3), 2, ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    assert float((weights_of(resumed) - weights_of(whole)).norm()) <= 1e-5 * float((weights_of(whole) - weights_of(mlp())).norm())
