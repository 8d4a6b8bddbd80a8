"""LightningModules: federated rounds and the pretraining of a codec; small networks to start with."""

from fedlight.modules.downlink import CatchUp, Downlink, FullModel
from fedlight.modules.federated import FederatedModule
from fedlight.modules.networks import MLP, BenchmarkCNN, LeNet5, SmallCNN
from fedlight.modules.pretraining import CodecPretrainingModule

__all__ = [
    "MLP",
    "BenchmarkCNN",
    "CatchUp",
    "CodecPretrainingModule",
    "Downlink",
    "FederatedModule",
    "FullModel",
    "LeNet5",
    "SmallCNN",
]
