"""Federated learning with learned codes, on PyTorch Lightning.

Everything that a run is made of is here by name: `fedlight.federate`, `fedlight.TransformCodec`, `fedlight.Dirichlet`. A name is imported
on first use, so that `import fedlight` takes no time and a client that only encodes never loads Lightning.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what is offered here, and what else the subpackages offer
    from fedlight import audit as audit
    from fedlight import compare as compare
    from fedlight import core as core
    from fedlight.core.codec import Codec as Codec
    from fedlight.core.codec import Context as Context
    from fedlight.core.codec import Decoder as Decoder
    from fedlight.core.codec import Encoder as Encoder
    from fedlight.core.codec import Private as Private
    from fedlight.core.errors import CodecMismatchError as CodecMismatchError
    from fedlight.core.errors import ConfigurationError as ConfigurationError
    from fedlight.core.errors import DataError as DataError
    from fedlight.core.errors import MessageError as MessageError
    from fedlight.core.errors import RoundFailedError as RoundFailedError
    from fedlight.core.export import load_codec as load_codec
    from fedlight.core.export import load_decoder as load_decoder
    from fedlight.core.export import load_encoder as load_encoder
    from fedlight.core.export import save_codec as save_codec
    from fedlight.core.pretraining import CodecTraining as CodecTraining
    from fedlight.core.pretraining import ProxyFederation as ProxyFederation
    from fedlight.modules.federate import federate as federate
    from fedlight.modules.trainer import FederatedTrainer as FederatedTrainer

    from .aggregation import *
    from .callbacks import *
    from .clients import *
    from .codecs import *
    from .data import *
    from .metrics import *
    from .modules import *
    from .privacy import *
    from .rounds import *
    from .servers import *

_NAMES = {
    "aggregation": "Aggregator Median NormBound PlainAggregator SecureAggregator TrimmedMean",
    "callbacks": "CodecPretraining CodecRefresh FederatedCallback GradientCodes GradientDecoder GradientEncoder RoundCheckpoint "
    "RoundProgressBar RunBoard RunSummary UpdateRecorder codec_callbacks",
    "clients": "Algorithm Auto ClientOptimizer Constant Cosine Ditto Engine Exponential FedAvg FedDyn FedNova FedProx FedSGD QFedAvg "
    "Scaffold Schedule Sequential Threaded Vectorized",
    "codecs": "AutoencoderCodec ChainCodec CountSketchCodec EntropyCodec GridCodec HalfCodec IdentityCodec LinearCodec PowerSGDCodec "
    "QSGDCodec QuantizeCodec StackedCodec TopKCodec TransformCodec TwoSidedCodec WindowCodec",
    "core.codec": "Codec Context Decoder Encoder Private",
    "core.errors": "CodecMismatchError ConfigurationError DataError MessageError RoundFailedError",
    "core.export": "load_codec load_decoder load_encoder save_codec",
    "core.pretraining": "CodecTraining ProxyFederation",
    "data": "IID Affine ArrayFile Augmentation ClientSampler CropFlip DataSource Digits Dirichlet Everyone Explicit FederatedDataModule "
    "LightningData Natural Partitioner Poisson QuantitySkew RandomFields Resized Shards SpeakerText Torchvision Uniform "
    "WithClients",
    "metrics": "ClientSpread ReconstructionError TrafficCounter",
    "modules": "MLP BenchmarkCNN CharLSTM CharTransformer CodecPretrainingModule FederatedModule LeNet5 LoRA ResNet18 SmallCNN",
    "modules.federate": "federate",
    "modules.trainer": "FederatedTrainer",
    "privacy": "AdaptiveClipping CentralDP DistributedDP LocalDP PrivacyMechanism",
    "rounds": "Availability CatchUp Clients CodedModel Deadline Downlink DropOut FirstToAnswer Full FullModel Several StageDropOut "
    "ThroughBytes Times",
    "servers": "FedAdagrad FedAdam FedYogi",
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}
_SUBPACKAGES = ("audit", "compare", "core", *(home for home in _NAMES if "." not in home))

__all__ = sorted(_HOMES)
__version__ = version("fedlight")


def __getattr__(name: str) -> Any:
    """Import a public name, or a subpackage, on first use."""
    if name in _SUBPACKAGES:
        return import_module(f"fedlight.{name}")
    if name not in _HOMES:
        from fedlight.console.names import did_you_mean

        near = "" if name.startswith("__") else did_you_mean(name, (*__all__, *_SUBPACKAGES))
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{near}")
    globals()[name] = value = getattr(import_module(f"fedlight.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    """Return the public names, those that are not imported yet included."""
    return sorted({*globals(), *__all__, *_SUBPACKAGES})
