"""Federated learning with learned codes, on PyTorch Lightning.

Everything that a run is made of is here by name: `fedlight.federate`, `fedlight.TransformCodec`, `fedlight.Dirichlet`. A name is imported
on first use, so that `import fedlight` takes no time and a client that only encodes never loads Lightning.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlight import aggregation as aggregation
    from fedlight import audit as audit
    from fedlight import callbacks as callbacks
    from fedlight import clients as clients
    from fedlight import codecs as codecs
    from fedlight import compare as compare
    from fedlight import core as core
    from fedlight import data as data
    from fedlight import metrics as metrics
    from fedlight import modules as modules
    from fedlight import privacy as privacy
    from fedlight import rounds as rounds
    from fedlight import servers as servers
    from fedlight.aggregation import Aggregator, Median, NormBound, PlainAggregator, SecureAggregator, TrimmedMean
    from fedlight.callbacks import (
        CodecPretraining,
        CodecRefresh,
        FederatedCallback,
        GradientCodes,
        GradientDecoder,
        GradientEncoder,
        RoundCheckpoint,
        RoundProgressBar,
        RunBoard,
        RunSummary,
        UpdateRecorder,
        codec_callbacks,
    )
    from fedlight.clients import (
        Algorithm,
        Auto,
        ClientOptimizer,
        Constant,
        Cosine,
        Ditto,
        Engine,
        Exponential,
        FedAvg,
        FedDyn,
        FedNova,
        FedProx,
        FedSGD,
        QFedAvg,
        Scaffold,
        Schedule,
        Sequential,
        Threaded,
        Vectorized,
    )
    from fedlight.codecs import (
        AutoencoderCodec,
        ChainCodec,
        CountSketchCodec,
        EntropyCodec,
        GridCodec,
        HalfCodec,
        IdentityCodec,
        LinearCodec,
        PowerSGDCodec,
        QSGDCodec,
        QuantizeCodec,
        StackedCodec,
        TopKCodec,
        TransformCodec,
        TwoSidedCodec,
        WindowCodec,
    )
    from fedlight.core.codec import Codec, Context, Decoder, Encoder, Private
    from fedlight.core.errors import CodecMismatchError, ConfigurationError, DataError, MessageError, RoundFailedError
    from fedlight.core.export import load_codec, load_decoder, load_encoder, save_codec
    from fedlight.core.pretraining import CodecTraining, ProxyFederation
    from fedlight.data import (
        IID,
        Affine,
        ArrayFile,
        Augmentation,
        ClientSampler,
        CropFlip,
        DataSource,
        Digits,
        Dirichlet,
        Everyone,
        Explicit,
        FederatedDataModule,
        LightningData,
        Natural,
        Partitioner,
        Poisson,
        QuantitySkew,
        RandomFields,
        Resized,
        Shards,
        SpeakerText,
        Torchvision,
        Uniform,
        WithClients,
    )
    from fedlight.metrics import ClientSpread, ReconstructionError, TrafficCounter
    from fedlight.modules import (
        MLP,
        BenchmarkCNN,
        CharLSTM,
        CharTransformer,
        CodecPretrainingModule,
        FederatedModule,
        LeNet5,
        LoRA,
        ResNet18,
        SmallCNN,
    )
    from fedlight.modules.federate import federate
    from fedlight.modules.trainer import FederatedTrainer
    from fedlight.privacy import AdaptiveClipping, CentralDP, DistributedDP, LocalDP, PrivacyMechanism
    from fedlight.rounds import (
        Availability,
        CatchUp,
        Clients,
        CodedModel,
        Deadline,
        Downlink,
        DropOut,
        FirstToAnswer,
        Full,
        FullModel,
        Several,
        StageDropOut,
        ThroughBytes,
        Times,
    )
    from fedlight.servers import FedAdagrad, FedAdam, FedYogi

__all__ = [
    "IID",
    "MLP",
    "AdaptiveClipping",
    "Affine",
    "Aggregator",
    "Algorithm",
    "ArrayFile",
    "Augmentation",
    "Auto",
    "AutoencoderCodec",
    "Availability",
    "BenchmarkCNN",
    "CatchUp",
    "CentralDP",
    "ChainCodec",
    "CharLSTM",
    "CharTransformer",
    "ClientOptimizer",
    "ClientSampler",
    "ClientSpread",
    "Clients",
    "Codec",
    "CodecMismatchError",
    "CodecPretraining",
    "CodecPretrainingModule",
    "CodecRefresh",
    "CodecTraining",
    "CodedModel",
    "ConfigurationError",
    "Constant",
    "Context",
    "Cosine",
    "CountSketchCodec",
    "CropFlip",
    "DataError",
    "DataSource",
    "Deadline",
    "Decoder",
    "Digits",
    "Dirichlet",
    "DistributedDP",
    "Ditto",
    "Downlink",
    "DropOut",
    "Encoder",
    "Engine",
    "EntropyCodec",
    "Everyone",
    "Explicit",
    "Exponential",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedDyn",
    "FedNova",
    "FedProx",
    "FedSGD",
    "FedYogi",
    "FederatedCallback",
    "FederatedDataModule",
    "FederatedModule",
    "FederatedTrainer",
    "FirstToAnswer",
    "Full",
    "FullModel",
    "GradientCodes",
    "GradientDecoder",
    "GradientEncoder",
    "GridCodec",
    "HalfCodec",
    "IdentityCodec",
    "LeNet5",
    "LightningData",
    "LinearCodec",
    "LoRA",
    "LocalDP",
    "Median",
    "MessageError",
    "Natural",
    "NormBound",
    "Partitioner",
    "PlainAggregator",
    "Poisson",
    "PowerSGDCodec",
    "PrivacyMechanism",
    "Private",
    "ProxyFederation",
    "QFedAvg",
    "QSGDCodec",
    "QuantitySkew",
    "QuantizeCodec",
    "RandomFields",
    "ReconstructionError",
    "ResNet18",
    "Resized",
    "RoundCheckpoint",
    "RoundFailedError",
    "RoundProgressBar",
    "RunBoard",
    "RunSummary",
    "Scaffold",
    "Schedule",
    "SecureAggregator",
    "Sequential",
    "Several",
    "Shards",
    "SmallCNN",
    "SpeakerText",
    "StackedCodec",
    "StageDropOut",
    "Threaded",
    "ThroughBytes",
    "Times",
    "TopKCodec",
    "Torchvision",
    "TrafficCounter",
    "TransformCodec",
    "TrimmedMean",
    "TwoSidedCodec",
    "Uniform",
    "UpdateRecorder",
    "Vectorized",
    "WindowCodec",
    "WithClients",
    "codec_callbacks",
    "federate",
    "load_codec",
    "load_decoder",
    "load_encoder",
    "save_codec",
]

__version__ = version("fedlight")

# A name comes from one of `_MODULES`, or from the first of these that exports it; those that need no Lightning come first.
_PACKAGES = ("codecs", "clients", "servers", "privacy", "aggregation", "metrics", "rounds", "data", "callbacks", "modules")
_SUBPACKAGES = (*_PACKAGES, "audit", "compare", "core")
_MODULES = {
    **dict.fromkeys(("Codec", "Context", "Decoder", "Encoder", "Private"), "core.codec"),
    **dict.fromkeys(("CodecMismatchError", "ConfigurationError", "DataError", "MessageError", "RoundFailedError"), "core.errors"),
    **dict.fromkeys(("load_codec", "load_decoder", "load_encoder", "save_codec"), "core.export"),
    **dict.fromkeys(("CodecTraining", "ProxyFederation"), "core.pretraining"),
    "FederatedTrainer": "modules.trainer",
    "federate": "modules.federate",
}


def __getattr__(name: str) -> Any:
    """Import a public name, or a subpackage, on first use."""
    if name in _SUBPACKAGES:
        return import_module(f"fedlight.{name}")
    if name not in __all__:
        from fedlight.console.names import did_you_mean

        near = "" if name.startswith("__") else did_you_mean(name, (*__all__, *_SUBPACKAGES))
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{near}")
    if name in _MODULES:
        home = import_module(f"fedlight.{_MODULES[name]}")
    else:
        home = next(package for package in (import_module(f"fedlight.{part}") for part in _PACKAGES) if name in package.__all__)
    globals()[name] = value = getattr(home, name)
    return value


def __dir__() -> list[str]:
    """Return the public names, those that are not imported yet included."""
    return sorted({*globals(), *__all__, *_SUBPACKAGES})
