"""The learned codec: encoding layers in every client, one set of decoding layers at the server.

Follows the system described by Li & Han 2019 (arXiv 1908.08340): the codes of a cohort are combined and one decoder maps
the combination to the mean update; encoder and decoder are trained jointly. Block structure and scaling are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from fedlight.codecs.blocks import Blocks, plan_blocks, principal_bases
from fedlight.codecs.linear import LinearCodec
from fedlight.core.bank import UpdateBank
from fedlight.core.codec import Codec, CodecPart, Context, Decoder, Encoder, Plan, Private, State, TrainCodec
from fedlight.core.errors import ConfigurationError, require, require_choice, require_least
from fedlight.core.layout import Layout
from fedlight.core.random import torch_generator
from fedlight.core.wire import CodeFormat

Activation = Literal["tanh", "relu", "gelu", "linear"]
_ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU}


class BlockNetwork(nn.Module):
    """Maps blocks ``[..., inputs]`` to ``[..., outputs]``: a linear map plus hidden layers.

    With ``skip`` the hidden layers start at zero and learn what the linear map misses; without ``skip`` there is no linear map.
    """

    def __init__(self, inputs: int, outputs: int, hidden: list[int], activation: Activation, skip: bool, bias: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False) if skip or not hidden else None
        self.layers = nn.Sequential()
        if hidden:
            widths = [inputs, *hidden]
            for a, b in pairwise(widths):
                self.layers.extend([nn.Linear(a, b, bias=bias), _ACTIVATIONS[activation]()])
            self.layers.append(nn.Linear(hidden[-1], outputs, bias=bias))

    def forward(self, blocks: Tensor) -> Tensor:
        """Return the mapped blocks ``[..., outputs]``."""
        if self.linear is None:
            return self.layers(blocks)  # type: ignore[no-any-return]
        straight: Tensor = self.linear(blocks)
        return straight + self.layers(blocks) if len(self.layers) else straight

    def start(self, generator: torch.Generator, basis: Tensor | None) -> None:
        """Draw the weights (LeCun scale); set the linear map to ``basis`` ``[outputs, inputs]`` and the last layer to zero if given."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if basis is not None and self.linear is not None:
            with torch.no_grad():
                self.linear.weight.copy_(basis)
            if len(self.layers):
                last = self.layers[-1]
                assert isinstance(last, nn.Linear)
                nn.init.zeros_(last.weight)


class AutoencoderHalf(CodecPart):
    """What both halves share: blocks, and a network and a scale for each group of them."""

    def __init__(self, blocks: Blocks, networks: list[BlockNetwork]) -> None:
        super().__init__(blocks.layout, CodeFormat(blocks.code_dim))
        self.blocks = blocks
        self.networks = nn.ModuleList(networks)
        self.scale = nn.Buffer(torch.ones(len(blocks.groups)))


class AutoencoderEncoder(AutoencoderHalf, Encoder):
    """The encoding layers."""

    def encode(self, update: Tensor, context: Context, private: Private) -> Tensor:
        """Return the code ``[..., code_dim]`` of updates ``[..., dim]``."""
        cut = self.blocks.cut(update)
        return torch.cat([net(b / s).flatten(-2) for net, b, s in zip(self.networks, cut, self.scale, strict=True)], dim=-1)


TRUST = 10.0
"""Longest decoded aggregate, as a multiple of the largest ratio of length to code length in the bank."""


class AutoencoderDecoder(AutoencoderHalf, Decoder):
    """The decoding layers, which see only the mean code."""

    def __init__(self, blocks: Blocks, networks: list[BlockNetwork]) -> None:
        super().__init__(blocks, networks)
        self.stretch = nn.Buffer(torch.tensor(torch.inf))
        self.rest = nn.Buffer(torch.zeros(()))

    def decode(self, mean_code: Tensor, context: Context, state: State) -> Tensor:
        """Return the aggregated update ``[..., dim]`` of a mean code ``[..., code_dim]``."""
        codes = self.blocks.split_code(mean_code)
        return self.blocks.join([net(c) * s for net, c, s in zip(self.networks, codes, self.scale, strict=True)])

    def norm_bound(self, mean_code: Tensor, context: Context) -> float:
        """Return ten times the largest length in the bank for codes of this length, plus the length of a decoded zero code.

        Layers with biases decode a zero code to something, which stays while updates shrink during training.
        """
        return TRUST * float(self.stretch * mean_code.norm() + self.rest)


MOST_LAYERS = 100
"""Hidden layers that a codec can have: far more than have ever helped, and few enough to make at a file's word."""


@dataclass(eq=False)
class AutoencoderCodec(Codec):
    """A block autoencoder, trained on recorded updates so that the decoded mean code is the mean update.

    Args:
        ratio: length of the update divided by the length of the code.
        blocks: `rows` cuts along the rows of weight matrices, with one small network per tensor; `flat` cuts the flat update into equal
            blocks, with one network for all.
        block_size: largest number of weights in a block.
        depth: number of hidden layers in the encoder and in the decoder, at most 100; 0 makes both linear.
        width: units in each hidden layer.
        activation: `tanh`, `relu`, `gelu`, or `linear` (no hidden layers, whatever `depth` says).
        skip: adds a linear map in parallel to the hidden layers, in the encoder and in the decoder.
        bias: whether the hidden layers have biases; without them and with tanh, a zero update has a zero code.
        start: `pca` starts the linear map at the principal directions of the bank; `random` starts everything at random.
        cohort: cohort size for the code lengths and the `pca` start; 0 takes the recorded cohorts.
        seed: seed of the initial weights.

    Raises:
        ConfigurationError: if a number is out of range, or `start="pca"` has no linear map to start.
    """

    needs_fit = True
    trained = True

    ratio: float = 8.0
    blocks: Literal["rows", "flat"] = "rows"
    block_size: int = 512
    depth: int = 1
    width: int = 64
    activation: Activation = "tanh"
    skip: bool = True
    bias: bool = False
    start: Literal["pca", "random"] = "pca"
    cohort: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        require_least(self, ratio=1, block_size=1, depth=0, width=1, cohort=0)
        require(self.depth <= MOST_LAYERS, f"Expected `depth` <= {MOST_LAYERS} but got {self.depth}")
        require_choice("activation", self.activation, (*_ACTIVATIONS, "linear"))
        require_choice("blocks", self.blocks, ("rows", "flat"))
        require_choice("start", self.start, ("pca", "random"))
        self.linear = not self._hidden
        if self.start == "pca" and not (self.skip or self.linear):
            raise ConfigurationError("Expected `skip=true` with `start='pca'`: it starts the linear map, which `skip=false` leaves out")

    @property
    def _hidden(self) -> list[int]:
        return [] if self.activation == "linear" else [self.width] * self.depth

    def make_plan(self, layout: Layout, bank: UpdateBank | None) -> Plan:
        """Return the blocks with their code lengths: by energy in the bank, or evenly without one."""
        return plan_blocks(layout, bank, self.ratio, self.blocks, self.block_size, self.cohort)

    def make_encoder(self, layout: Layout, plan: Plan) -> Encoder:
        """Return the encoder."""
        blocks = Blocks.from_plan(layout, plan)
        return AutoencoderEncoder(blocks, [self._network(g.length, g.code) for g in blocks.groups])

    def make_decoder(self, layout: Layout, plan: Plan) -> Decoder:
        """Return the decoder."""
        blocks = Blocks.from_plan(layout, plan)
        return AutoencoderDecoder(blocks, [self._network(g.code, g.length) for g in blocks.groups])

    def references(self) -> dict[str, Codec]:
        """Return PCA and a random projection of the same blocks and code lengths."""
        bases: tuple[Literal["pca", "random"], ...] = ("pca", "random")
        return {basis: LinearCodec(self.ratio, basis, self.blocks, self.block_size, self.cohort, self.seed) for basis in bases}

    def _network(self, inputs: int, outputs: int) -> BlockNetwork:
        with torch.random.fork_rng(devices=[]):  # torch draws from the global generator here; ``start`` draws our weights
            torch.manual_seed(0)
            return BlockNetwork(inputs, outputs, self._hidden, self.activation, self.skip, self.bias)

    def fit_halves(self, bank: UpdateBank, train: TrainCodec) -> dict[str, float]:
        """Set the scales, initialize the weights, and train encoder and decoder jointly."""
        blocks = Blocks.from_plan(bank.layout, self.plan)
        assert isinstance(self.encoder, AutoencoderEncoder)
        assert isinstance(self.decoder, AutoencoderDecoder)
        scale = torch.stack([cut.square().mean().sqrt() for cut in blocks.cut(bank.updates)]).clamp(min=1e-12)
        bases = principal_bases(bank, blocks, self.cohort) if self.start == "pca" else [None] * len(blocks.groups)
        for half, transpose in ((self.encoder, True), (self.decoder, False)):
            half.scale.copy_(scale)
            for i, (network, basis) in enumerate(zip(half.networks, bases, strict=True)):
                assert isinstance(network, BlockNetwork)
                generator = torch_generator(self.seed, "autoencoder", "encoder" if transpose else "decoder", i)
                network.start(generator, None if basis is None else basis.T if transpose else basis)
        metrics = train(self, bank)
        self.decoder.stretch.fill_(max(map(self._stretch, bank.updates)))
        with torch.no_grad():
            self.decoder.rest.copy_(self.decoder.decode(torch.zeros(blocks.code_dim), Context(), {}).norm())
        return metrics

    def _stretch(self, updates: Tensor) -> float:
        """Return the length of a cohort's decoded aggregate divided by that of its mean code; ``[clients, dim]``."""
        with torch.no_grad():
            mean_code = self.encoder.encode(updates, Context(), Private(torch_generator("stretch"))).mean(0)
            return float(self.decoder.decode(mean_code, Context(), {}).norm() / mean_code.norm().clamp(min=1e-30))
