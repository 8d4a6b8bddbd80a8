"""LightningModules: federated rounds and the pretraining of a codec; small networks to start with.

What needs Lightning is imported when it is asked for: a client that trains one of the networks needs none.
"""

from typing import TYPE_CHECKING

from fedlight.core.lazy import import_on_demand
from fedlight.modules.characters import CharLSTM, CharTransformer
from fedlight.modules.lora import LoRA
from fedlight.modules.networks import MLP, BenchmarkCNN, LeNet5, ResNet18, SmallCNN

if TYPE_CHECKING:
    from fedlight.modules.federated import FederatedModule
    from fedlight.modules.pretraining import CodecPretrainingModule

__all__ = [
    "MLP",
    "BenchmarkCNN",
    "CharLSTM",
    "CharTransformer",
    "CodecPretrainingModule",
    "FederatedModule",
    "LeNet5",
    "LoRA",
    "ResNet18",
    "SmallCNN",
]

__getattr__, __dir__ = import_on_demand(
    __name__,
    {
        "CodecPretrainingModule": "fedlight.modules.pretraining",
        "FederatedModule": "fedlight.modules.federated",
    },
)
