"""Codecs: clients encode their updates, and the server decodes the sum of the codes."""

from fedlight.codecs.autoencoder import AutoencoderCodec
from fedlight.codecs.chain import ChainCodec
from fedlight.codecs.count_sketch import CountSketchCodec
from fedlight.codecs.entropy import EntropyCodec
from fedlight.codecs.grid import GridCodec
from fedlight.codecs.half import HalfCodec
from fedlight.codecs.identity import IdentityCodec
from fedlight.codecs.linear import LinearCodec
from fedlight.codecs.power_sgd import PowerSGDCodec
from fedlight.codecs.qsgd import QSGDCodec
from fedlight.codecs.quantize import QuantizeCodec
from fedlight.codecs.stacked import StackedCodec
from fedlight.codecs.top_k import TopKCodec
from fedlight.codecs.transform import TransformCodec
from fedlight.codecs.two_sided import TwoSidedCodec
from fedlight.codecs.window import WindowCodec

__all__ = [
    "AutoencoderCodec",
    "ChainCodec",
    "CountSketchCodec",
    "EntropyCodec",
    "GridCodec",
    "HalfCodec",
    "IdentityCodec",
    "LinearCodec",
    "PowerSGDCodec",
    "QSGDCodec",
    "QuantizeCodec",
    "StackedCodec",
    "TopKCodec",
    "TransformCodec",
    "TwoSidedCodec",
    "WindowCodec",
]
