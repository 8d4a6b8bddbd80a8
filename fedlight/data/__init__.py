"""Data sets, partitions into clients, cohorts, and the datamodule that puts them together.

What needs Lightning is imported when it is asked for: a server that draws cohorts needs none.
"""

from typing import TYPE_CHECKING

from fedlight.core.lazy import import_on_demand
from fedlight.data.arrays import Arrays, build_arrays, standardize
from fedlight.data.augment import Affine, Augmentation, CropFlip
from fedlight.data.federated import FederatedData
from fedlight.data.images import RandomFields, Resized
from fedlight.data.natural import Explicit, Natural
from fedlight.data.partition import IID, Dirichlet, Partitioner, QuantitySkew, Shards
from fedlight.data.sampling import ClientSampler, Everyone, Poisson, Uniform
from fedlight.data.sources import ArrayFile, DataSource, Digits, Torchvision, WithClients
from fedlight.data.splits import Partition, check_partition
from fedlight.data.text import SpeakerText

if TYPE_CHECKING:
    from fedlight.data.datamodule import FederatedDataModule, LightningData

__all__ = [
    "IID",
    "Affine",
    "ArrayFile",
    "Arrays",
    "Augmentation",
    "ClientSampler",
    "CropFlip",
    "DataSource",
    "Digits",
    "Dirichlet",
    "Everyone",
    "Explicit",
    "FederatedData",
    "FederatedDataModule",
    "LightningData",
    "Natural",
    "Partition",
    "Partitioner",
    "Poisson",
    "QuantitySkew",
    "RandomFields",
    "Resized",
    "Shards",
    "SpeakerText",
    "Torchvision",
    "Uniform",
    "WithClients",
    "build_arrays",
    "check_partition",
    "standardize",
]

__getattr__, __dir__ = import_on_demand(__name__, dict.fromkeys(("FederatedDataModule", "LightningData"), "fedlight.data.datamodule"))
