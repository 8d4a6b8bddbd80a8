"""What an adversary observes of a cohort's updates, and how it computes the same from a guess."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedlight.codecs.chain import ChainEncoder
from fedlight.codecs.quantize import QuantizeEncoder
from fedlight.core.codec import Codec, Context, Encoder, Private
from fedlight.core.errors import ConfigurationError, require_least
from fedlight.core.layout import Layout
from fedlight.core.random import torch_generator
from fedlight.privacy.clipping import clip_norm
from fedlight.privacy.noise import SeededNoise


@dataclass(frozen=True)
class Observation:
    """What the adversary sees.

    Args:
        codec: name of an entry of `codecs`; the plain update if not given.
        clients: number of clients whose codes are in the sum.
        batch_size: number of images of each client.
        local_steps: number of local steps of each client, each on all its images; with 1 it sends a single gradient.
        noise: noise multiplier z: each code is clipped, and the sum gets Gaussian noise of z times the clip norm.
        clip: clip norm of a code (the median code length of public images if not given).
    """

    codec: str | None = None
    clients: int = 1
    batch_size: int = 1
    local_steps: int = 1
    noise: float = 0.0
    clip: float | None = None

    def __post_init__(self) -> None:
        require_least(self, clients=1, batch_size=1, local_steps=1)
        if self.noise < 0 or (self.clip is not None and self.clip <= 0):
            raise ConfigurationError(f"Expected `noise` >= 0 and `clip` > 0 but got {self.noise} and {self.clip}")

    @property
    def words(self) -> str:
        """The observation in words, for a table."""
        what = "update" if self.codec is None else "code"
        text = f"{what} of one client" if self.clients == 1 else f"sum of {self.clients} {what}s"
        return f"{text} + noise z={self.noise:g}" if self.noise else text

    @property
    def control(self) -> Observation:
        """The plain update of the same clients, images and steps."""
        return Observation(None, self.clients, self.batch_size, self.local_steps)


class View:
    """The mean of plain updates ``[dim]``, and the interface: what arrives, and the attacker's differentiable prediction of it.

    ``linear`` says that the view of a mean is the mean of views: one pass over all images is enough.
    """

    linear = True

    def observe(self, updates: Tensor, generator: torch.Generator) -> Tensor:
        """Return what the adversary sees of updates ``[clients, dim]``, scaled back to floats: ``[length]``, float64."""
        return updates.mean(0)

    def predict(self, updates: Tensor) -> Tensor:
        """Return its prediction for guessed updates ``[clients, dim]``, differentiable and without rounding: ``[length]``."""
        return updates.mean(0)

    def decoded(self, seen: Tensor) -> Tensor:
        """Return the update ``[dim]`` that the decoder makes of the observation."""
        return seen


class CodeView(View):
    """The mean code of a cohort. Integer codes are scaled back with the public step and gain; the prediction leaves rounding out.

    Args:
        codec: a fitted one-pass codec whose codes are summed.

    Raises:
        ConfigurationError: if its codes cannot be summed, take several passes or have no gradients.
    """

    def __init__(self, codec: Codec) -> None:
        if not codec.additive or codec.passes > 1:
            raise ConfigurationError(
                f"Expected a codec whose codes are summed in one pass but got {type(codec).__name__}: the audit cannot read its messages"
            )
        self.codec = codec
        self.context = Context(broadcast=codec.decoder.broadcast({}))
        self.smooth, scale = without_rounding(codec.encoder, self.context.broadcast)
        self.scale = None if scale is None else scale.double()
        self.linear = self._probe()

    def _probe(self) -> bool:
        """Refuse a code that does not change with the update; return whether the code of a mean is the mean of codes."""
        device = next(iter(self.codec.encoder.state_dict().values()), torch.zeros(0)).device
        drawn = torch.randn(2, self.codec.encoder.dim, generator=torch_generator("audit", "probe"), dtype=torch.float64).to(device)
        probe = drawn.requires_grad_()
        code = self.predict(probe)
        gradient = torch.autograd.grad(code.square().sum(), probe)[0] if code.requires_grad else torch.zeros(1)
        if not bool(gradient.any()):
            raise ConfigurationError(
                f"Expected a codec with gradients but {type(self.codec).__name__}'s code does not change smoothly with the update: "
                "attacks that match codes cannot be run on it"
            )
        joint = self.predict(drawn.detach().mean(0, keepdim=True))
        return bool((joint - code.detach()).norm() <= 1e-4 * code.detach().norm())

    def _private(self) -> Private:
        return Private(torch_generator("audit", "unused"))

    def observe(self, updates: Tensor, generator: torch.Generator) -> Tensor:
        """Return the mean of the codes that clients send."""
        with torch.no_grad():
            codes = [self.codec.encoder.encode(update.float(), self.context, Private(generator)) for update in updates]
        mean = torch.stack(codes).double().mean(0)
        return mean if self.scale is None else mean * self.scale

    def predict(self, updates: Tensor) -> Tensor:
        """Return the mean of the codes without rounding."""
        flat = updates.float()
        code = flat if self.smooth is None else self.smooth.encode(flat, self.context, self._private())
        return code.double().mean(0)

    def decoded(self, seen: Tensor) -> Tensor:
        """Return the decoded mean code."""
        code = seen if self.scale is None else seen / self.scale
        with torch.no_grad():
            return self.codec.decoder.decode(code.float(), self.context, {}).double()


class NoisyView(View):
    """Another view under the Gaussian mechanism: each client's message is clipped to ``clip``, and the sum gets noise.

    Args:
        view: the view of one client's message.
        clip: the clip norm C.
        noise: the noise multiplier z; the noise in the sum has standard deviation z C.
    """

    linear = False

    def __init__(self, view: View, clip: float, noise: float) -> None:
        self.view = view
        self.clip = clip
        self.noise = noise

    def observe(self, updates: Tensor, generator: torch.Generator) -> Tensor:
        """Return the noisy mean of clipped messages."""
        clipped = torch.stack([clip_norm(self.view.observe(update[None], generator), self.clip) for update in updates])
        source = SeededNoise("audit", int(torch.randint(1 << 62, (1,), generator=generator)))
        noise = torch.from_numpy(source.gaussian(clipped.shape[1], self.noise * self.clip)).to(clipped.device)
        return (clipped.sum(0) + noise) / len(updates)

    def predict(self, updates: Tensor) -> Tensor:
        """Return the mean of clipped predictions, without noise."""
        messages = [self.view.predict(update[None]) for update in updates]  # scaled as `clip_norm` does, but with gradients
        return torch.stack([message * (self.clip / message.norm().clamp(min=1e-30)).clamp(max=1.0) for message in messages]).mean(0)

    def decoded(self, seen: Tensor) -> Tensor:
        """Return the decoded noisy mean."""
        return self.view.decoded(seen)


def without_rounding(encoder: Encoder, broadcast: Mapping[str, Any]) -> tuple[Encoder | None, Tensor | None]:
    """Return an encoder's float part (None if it only rounds), and step times gain of its last, integer stage if it has one."""
    encoder = copy.deepcopy(encoder).requires_grad_(False)
    if isinstance(encoder, QuantizeEncoder):
        return None, encoder.step * float(broadcast.get("gain", 1.0))
    if not isinstance(encoder, ChainEncoder):
        return encoder, None
    stages = [encoder.stage(i) for i in range(len(encoder.stages))]
    last, scale = without_rounding(stages[-1], broadcast.get(str(len(stages) - 1), {}))
    kept = stages[:-1] if last is None else [*stages[:-1], last]
    return (ChainEncoder(Layout.from_json(encoder.layout.to_json()), kept) if kept else None), scale
