"""Codecs: what clients encode with and the server decodes the sum with."""

from fedlight.codecs.autoencoder import AutoencoderCodec
from fedlight.codecs.chain import ChainCodec
from fedlight.codecs.identity import IdentityCodec
from fedlight.codecs.linear import LinearCodec
from fedlight.codecs.quantize import QuantizeCodec
from fedlight.codecs.transform import TransformCodec
from fedlight.codecs.two_sided import TwoSidedCodec

__all__ = ["AutoencoderCodec", "ChainCodec", "IdentityCodec", "LinearCodec", "QuantizeCodec", "TransformCodec", "TwoSidedCodec"]
