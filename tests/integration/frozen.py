"""Small runs of every kind, whose final weights and bytes are recorded in ``frozen.json``.

``python -m tests.integration.frozen`` records them anew: only where a change of numbers is meant, and said in the CHANGELOG.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from fedlight.aggregation import Median, SecureAggregator
from fedlight.callbacks import CodecRefresh
from fedlight.clients import Ditto, FedAvg, FedDyn, QFedAvg, Scaffold, Threaded
from fedlight.codecs import ChainCodec, CountSketchCodec, LinearCodec, PowerSGDCodec, QSGDCodec, QuantizeCodec, TopKCodec, TransformCodec
from fedlight.core.pretraining import ProxyFederation
from fedlight.data import Digits, Dirichlet, FederatedDataModule, Poisson, Torchvision, Uniform
from fedlight.modules import MLP, FederatedModule, LeNet5
from fedlight.privacy import AdaptiveClipping, CentralDP, DistributedDP
from fedlight.rounds import CatchUp, DropOut, FirstToAnswer, Several, StageDropOut
from tests.federation import federated, federated_data, learned, mlp, pretraining, trainer, weights_of

FILE = Path(__file__).with_name("frozen.json")

Run = Callable[[], FederatedModule]


def fit(module: FederatedModule, rounds: int = 4, data: Any = None, **changes: Any) -> FederatedModule:
    callbacks = [*changes.pop("callbacks", []), pretraining()]
    trainer(rounds, callbacks=callbacks, **changes).fit(module, datamodule=data or federated_data())
    return module


def digits(**changes: Any) -> FederatedDataModule:
    return FederatedDataModule(**{"source": Digits(), "num_clients": 20, "sampler": Uniform(8), "proxy_samples": 200, "seed": 3} | changes)


def on_digits() -> FederatedModule:
    torch.manual_seed(0)
    algorithm = FedAvg(lr=0.2, steps=5, batch_size=16)
    module = federated(MLP(64, [16], 10), codec=TransformCodec(16, encoder_share=1.0), algorithm=algorithm, downlink=CatchUp())
    return fit(module, 6, digits(partitioner=Dirichlet(0.5)), callbacks=[CodecRefresh(3, ProxyFederation(rounds=8, clients=4))])


def on_mnist() -> FederatedModule:
    torch.manual_seed(0)
    root = os.environ.get("FEDLIGHT_DATA") or Path(__file__).parents[3] / "shared" / "data"
    data = FederatedDataModule(
        source=Torchvision("MNIST"),
        root=str(root),
        num_clients=20,
        sampler=Uniform(4),
        proxy_samples=400,
        partitioner=Dirichlet(0.5),
        seed=1,
    )
    module = federated(LeNet5(), codec=TransformCodec(64), algorithm=FedAvg(lr=0.05, steps=4, batch_size=32), downlink=CatchUp())
    return fit(module, 4, data)


def resumed() -> FederatedModule:
    """Three rounds, and three more from a checkpoint in another Trainer."""

    def module() -> FederatedModule:
        return federated(codec=TopKCodec(ratio=4), algorithm=Scaffold(lr=0.1, steps=3, batch_size=8))

    with TemporaryDirectory() as folder:
        path = Path(folder) / "half.ckpt"
        first = trainer(3, callbacks=[pretraining()])
        first.fit(module(), datamodule=federated_data())
        first.save_checkpoint(path)
        second = module()
        trainer(6, callbacks=[pretraining()]).fit(second, datamodule=federated_data(), ckpt_path=path, weights_only=True)
    return second


def norm(batch_norm: str) -> FederatedModule:
    return fit(federated(mlp(norm=True), codec=learned(), batch_norm=batch_norm))


RUNS: dict[str, Run] = {
    "digits, transform, refresh, catch-up": on_digits,
    "MNIST, transform, catch-up": on_mnist,
    "no codec, samples": lambda: fit(federated(weighting="samples")),
    "drop-outs": lambda: fit(federated(codec=learned(), availability=Several([DropOut(0.2), FirstToAnswer(4)]))),
    "secure, drop-outs": lambda: fit(
        federated(
            codec=learned(), aggregator=SecureAggregator(8, threshold=5), availability=StageDropOut(clients=2, seed=0), max_attempts=10
        )
    ),
    "DistributedDP": lambda: fit(
        federated(
            codec=LinearCodec(2, "random", block_size=16),
            privacy=DistributedDP(1.0, 3, noise_multiplier=1.0, delta=1e-2, simulation_seed=0),
        ),
        data=federated_data(normalize=False),
    ),
    "adaptive clipping": lambda: fit(
        federated(privacy=CentralDP(0.5, 1.0, delta=1e-2, simulation_seed=0, adaptive=AdaptiveClipping(bit_noise=2.0))),
        data=federated_data(normalize=False, sampler=Poisson(0.7)),
    ),
    "PowerSGD": lambda: fit(federated(codec=PowerSGDCodec(1), availability=DropOut(0.2))),
    "SCAFFOLD": lambda: fit(federated(codec=QSGDCodec(8), algorithm=Scaffold(lr=0.1, steps=3, batch_size=8))),
    "FedDyn": lambda: fit(federated(codec=learned(), algorithm=FedDyn(lr=0.1, steps=3, batch_size=8), availability=DropOut(0.3))),
    "q-FedAvg": lambda: fit(federated(algorithm=QFedAvg(lr=0.1, steps=3, batch_size=8))),
    "Ditto": lambda: fit(federated(codec=learned(), algorithm=Ditto(lr=0.1, steps=3, batch_size=8))),
    "BatchNorm mean": lambda: norm("mean"),
    "BatchNorm local": lambda: norm("local"),
    "median": lambda: fit(federated(codec=ChainCodec([LinearCodec(2, "random", block_size=16), QuantizeCodec(5)]), aggregator=Median())),
    "count sketch": lambda: fit(federated(codec=CountSketchCodec(ratio=2))),
    "threads": lambda: fit(federated(mlp(dropout=0.3), codec=learned(), engine=Threaded(2))),
    "resumed": resumed,
}


def machine() -> str:
    """Return what the last bits of a product depend on."""
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("model\t", "model name", "cpu family"))][
        :3
    ]
    return f"{platform.machine()} {torch.__version__} {torch.backends.cpu.get_cpu_capability()} {' '.join(' '.join(model).split())}"


def sha256(weights: Tensor) -> str:
    return hashlib.sha256(weights.detach().cpu().numpy().tobytes()).hexdigest()


def observe(module: FederatedModule) -> dict[str, Any]:
    """Return what is recorded of a finished run."""
    weights, traffic = weights_of(module).detach(), module.server_state.traffic
    return {
        "sha256": sha256(weights),
        "norm": float(weights.double().norm()),
        "uplink": traffic.uplink,
        "downlink": traffic.downlink,
        "encoders": traffic.codec,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    record = {"machine": machine(), "runs": {name: observe(make()) for name, make in RUNS.items()}}
    FILE.write_text(json.dumps(record, indent=2) + "\n")
