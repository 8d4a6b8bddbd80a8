"""What an adversary observes of a cohort's updates, and how it computes the same from a guess."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedlight.codecs.chain import ChainEncoder
from fedlight.codecs.quantize import QuantizeEncoder
from fedlight.core.codec import Codec, Context, Encoder, Private
from fedlight.core.errors import ConfigurationError, require, require_least, require_positive
from fedlight.core.layout import Layout
from fedlight.core.random import torch_generator
from fedlight.privacy.clipping import clip_norm
from fedlight.privacy.noise import SeededNoise

EXACT = 1e-3
"""Deviation that an attack allows numbers that arrive exactly, relative to their root mean square: smaller ones only slow the search."""


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
        known: number of clients in the sum whose messages the adversary knows, because they collude with it.
        rounds: number of rounds in which the adversary sees the same clients with the same images, at successive global models.
    """

    codec: str | None = None
    clients: int = 1
    batch_size: int = 1
    local_steps: int = 1
    noise: float = 0.0
    clip: float | None = None
    known: int = 0
    rounds: int = 1

    def __post_init__(self) -> None:
        require_least(self, clients=1, batch_size=1, local_steps=1, known=0, rounds=1, noise=0)
        require_positive(clip=self.clip)
        require(
            self.known < self.clients, f"Expected `known` to be less than `clients` but got {self.known} of {self.clients}: nothing is left"
        )

    @property
    def words(self) -> str:
        """The observation in words, for a table."""
        what = "update" if self.codec is None else "code"
        text = f"{what} of one client" if self.clients == 1 else f"sum of {self.clients} {what}s"
        text += f", {self.known} known" if self.known else ""
        text += f" + noise z={self.noise:g}" if self.noise else ""
        return f"{text}, {self.rounds} rounds" if self.rounds > 1 else text

    @property
    def control(self) -> Observation:
        """The plain update of the same clients, images and steps."""
        return replace(self, codec=None, noise=0.0, clip=None)


class View:
    """The mean of plain updates ``[dim]``, and the interface: what arrives, and the attacker's differentiable prediction of it.

    Law: what arrives is the prediction plus an error of mean 0 and of standard deviation ``deviation``, independent in each entry.
    ``linear`` says that the view of a mean is the mean of views: one pass over all images is enough.
    """

    linear = True

    def send(self, update: Tensor, generator: torch.Generator) -> Tensor:
        """Return the message of one client with the update ``[dim]``, scaled back to floats: ``[length]``, float64."""
        return update

    def sum_noise(self, length: int, generator: torch.Generator) -> Tensor:
        """Return the noise ``[length]`` that is added to the sum of messages."""
        return torch.zeros(length, dtype=torch.float64)

    def observe(self, updates: Tensor, generator: torch.Generator, known: int = 0) -> Tensor:
        """Return what the adversary sees of updates ``[clients, dim]``: the mean message ``[length]``, float64.

        The messages of the first ``known`` clients, which it has, are subtracted: the mean is of the others.
        """
        messages = torch.stack([self.send(update, generator) for update in updates])
        total = messages.sum(0) + self.sum_noise(messages.shape[1], generator).to(messages.device)
        return (total - messages[:known].sum(0)) / (len(messages) - known)

    def predict(self, updates: Tensor) -> Tensor:
        """Return the expectation of what arrives for guessed updates ``[clients, dim]``, differentiably: ``[length]``."""
        return updates.mean(0)

    def deviation(self, seen: Tensor, clients: int) -> Tensor:
        """Return the standard deviation ``[length]`` of the mean message ``seen`` around its expectation: public knowledge."""
        return (EXACT * seen.square().mean().sqrt()).clamp(min=1e-30).expand_as(seen)

    def decoded(self, seen: Tensor) -> Tensor:
        """Return the update ``[dim]`` that the decoder makes of the observation."""
        return seen


class CodeView(View):
    """The mean code of a cohort. Integer codes are scaled back with the public step and gain.

    The prediction leaves rounding out, whose deviation is known, and ends, as integers do, at the largest and smallest integer. Raises
    ``ConfigurationError`` if the fitted codec's codes cannot be summed, take several passes or have no gradients.
    """

    def __init__(self, codec: Codec) -> None:
        if not codec.additive or codec.passes > 1:
            raise ConfigurationError(
                f"Expected a codec whose codes are summed in one pass but got {type(codec).__name__}: the audit cannot read its messages"
            )
        self.codec = codec
        self.context = Context(broadcast=codec.decoder.broadcast({}))
        self.smooth, self.grid = without_rounding(codec.encoder, self.context.broadcast)
        self.linear = self._probe() and self.grid is None

    def _probe(self) -> bool:
        """Refuse a code that does not change with the update; return whether the code of a mean is the mean of codes."""
        device = next(iter(self.codec.encoder.state_dict().values()), torch.zeros(0)).device
        drawn = torch.randn(2, self.codec.encoder.dim, generator=torch_generator("audit", "probe"), dtype=torch.float64).to(device)
        probe = drawn.requires_grad_()
        code = self._smooth_codes(probe).mean(0)
        gradient = torch.autograd.grad(code.square().sum(), probe)[0] if code.requires_grad else torch.zeros(1)
        if not bool(gradient.any()):
            raise ConfigurationError(
                f"Expected a codec with gradients but {type(self.codec).__name__}'s code does not change smoothly with the update: "
                "attacks that match codes cannot be run on it"
            )
        joint = self._smooth_codes(drawn.detach().mean(0, keepdim=True))[0]
        return bool((joint - code.detach()).norm() <= 1e-4 * code.detach().norm())

    def _smooth_codes(self, updates: Tensor) -> Tensor:
        flat = updates.float()
        if self.smooth is not None:
            flat = self.smooth.encode(flat, self.context, Private(torch_generator("audit", "unused")))
        return flat.double()

    def send(self, update: Tensor, generator: torch.Generator) -> Tensor:
        """Return the code that a client sends."""
        with torch.no_grad():
            code = self.codec.encoder.encode(update.float(), self.context, Private(generator)).double()
        return code if self.grid is None else code * self.grid.scale

    def predict(self, updates: Tensor) -> Tensor:
        """Return the mean of the codes without rounding, each within the range of the integers."""
        codes = self._smooth_codes(updates)
        if self.grid is not None:
            codes = codes.clamp(-self.grid.limit, self.grid.limit)
        return codes.mean(0)

    def deviation(self, seen: Tensor, clients: int) -> Tensor:
        """Return that of rounding, averaged over where a number lies between two integers; small if nothing is rounded."""
        return super().deviation(seen, clients) if self.grid is None else (self.grid.deviation / clients**0.5).expand_as(seen)

    def decoded(self, seen: Tensor) -> Tensor:
        """Return the decoded mean code."""
        code = seen if self.grid is None else seen / self.grid.scale
        with torch.no_grad():
            return self.codec.decoder.decode(code.float(), self.context, {}).double()


class NoisyView(View):
    """A view of one client's message under the Gaussian mechanism: clipped to ``clip``, and noise of ``noise * clip`` in the sum."""

    linear = False

    def __init__(self, view: View, clip: float, noise: float) -> None:
        self.view = view
        self.clip = clip
        self.noise = noise

    def send(self, update: Tensor, generator: torch.Generator) -> Tensor:
        """Return the clipped message."""
        return clip_norm(self.view.send(update, generator), self.clip)

    def sum_noise(self, length: int, generator: torch.Generator) -> Tensor:
        """Return Gaussian noise."""
        source = SeededNoise("audit", int(torch.randint(1 << 62, (1,), generator=generator)))
        return torch.from_numpy(source.gaussian(length, self.noise * self.clip))

    def predict(self, updates: Tensor) -> Tensor:
        """Return the mean of clipped predictions, without noise."""
        messages = [self.view.predict(update[None]) for update in updates]  # scaled as `clip_norm` does, but with gradients
        return torch.stack([message * (self.clip / message.norm().clamp(min=1e-30)).clamp(max=1.0) for message in messages]).mean(0)

    def deviation(self, seen: Tensor, clients: int) -> Tensor:
        """Return that of the noise, and of the message itself, which clipping does not increase."""
        return torch.hypot(self.view.deviation(seen, clients), torch.full_like(seen, self.noise * self.clip / clients))

    def decoded(self, seen: Tensor) -> Tensor:
        """Return the decoded noisy mean."""
        return self.view.decoded(seen)


class RoundsView(View):
    """A view in several rounds: updates ``[clients, rounds * dim]`` and observations ``[rounds * length]`` lie one behind the other."""

    def __init__(self, view: View, rounds: int) -> None:
        self.view = view
        self.rounds = rounds
        self.linear = view.linear

    def send(self, update: Tensor, generator: torch.Generator) -> Tensor:
        """Return a client's messages."""
        return torch.cat([self.view.send(part, generator) for part in update.chunk(self.rounds)])

    def sum_noise(self, length: int, generator: torch.Generator) -> Tensor:
        """Return every round's own noise."""
        return torch.cat([self.view.sum_noise(length // self.rounds, generator) for _ in range(self.rounds)])

    def predict(self, updates: Tensor) -> Tensor:
        """Return every round's prediction."""
        return torch.cat([self.view.predict(part) for part in updates.chunk(self.rounds, dim=1)])

    def deviation(self, seen: Tensor, clients: int) -> Tensor:
        """Return every round's deviation."""
        return torch.cat([self.view.deviation(part, clients) for part in seen.chunk(self.rounds)])

    def decoded(self, seen: Tensor) -> Tensor:
        """Return what the decoder makes of the first round."""
        return self.view.decoded(seen.chunk(self.rounds)[0])


@dataclass(frozen=True)
class Grid:
    """The public grid of integer codes, in a code's own units, with an entry a coefficient or one for all."""

    scale: Tensor  # size of a step
    limit: Tensor  # largest value
    deviation: Tensor  # of rounding one number


def without_rounding(encoder: Encoder, broadcast: Mapping[str, Any]) -> tuple[Encoder | None, Grid | None]:
    """Return an encoder's float part (None if it only rounds), and the grid of its last stage if its codes are integers."""
    encoder = copy.deepcopy(encoder).requires_grad_(False)
    if isinstance(encoder, QuantizeEncoder):
        scale = encoder.step.double() * float(broadcast.get("gain", 1.0))
        return None, Grid(scale, scale * encoder.limit.double(), scale * encoder.rounding**0.5)
    if not isinstance(encoder, ChainEncoder):
        return encoder, None
    stages = [encoder.stage(i) for i in range(len(encoder.stages))]
    last, grid = without_rounding(stages[-1], broadcast.get(str(len(stages) - 1), {}))
    kept = stages[:-1] if last is None else [*stages[:-1], last]
    return (ChainEncoder(Layout.from_json(encoder.layout.to_json()), kept) if kept else None), grid
