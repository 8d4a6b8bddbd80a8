"""Closed-form attacks: the bias trick, labels from the last layer, and an imprint layer of a malicious server.

- Bias trick: Phong et al. 2018 (IEEE TIFS 13(5)), section III; with ``y = W x + b`` the gradients obey ``dW_i = db_i x``.
- iDLG: Zhao et al. 2020 (arXiv 2001.02610), section 3.1; batches after Yin et al. 2021 (arXiv 2104.07586).
- Robbing the Fed: Fowl et al. 2022 (arXiv 2110.13057), section 4.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedlight.audit.attacks.base import Attack, Auxiliary, Case, Guess
from fedlight.audit.victim import Victim
from fedlight.core.errors import ConfigurationError, require, require_positive
from fedlight.core.random import torch_generator


def piece(case: Case, name: str) -> Tensor:
    """Return the decoded update of the parameter ``name``, in its shape."""
    layout = case.victim.layout
    return layout.split(case.view.decoded(case.seen))[layout.names.index(name)]


def spread_out(candidates: Tensor, count: int) -> Tensor:
    """Return ``count`` of the candidates ``[n, d]`` that differ most: the one with most contrast, then always the farthest."""
    chosen = [int(candidates.var(dim=1).argmax())]
    distance = torch.full((len(candidates),), torch.inf, dtype=candidates.dtype, device=candidates.device)
    while len(chosen) < count:
        distance = torch.minimum(distance, (candidates - candidates[chosen[-1]]).norm(dim=1))
        chosen.append(int(distance.argmax()))
    return candidates[chosen]


class BiasTrick(Attack):
    """Reads the input from the first linear layer, exactly: for one image every row of dW is the image times the entry of db.

    With several images, a row that only one of them activates holds that image; the attack takes rows whose ratio is a possible
    image, the most different ones first. It decodes codes first.
    """

    needs_gradients = False

    @staticmethod
    def layer(victim: Victim) -> str:
        """Return the name of the first layer; raises ``ConfigurationError`` if it is not linear with a bias."""
        for name, module in victim.network.named_modules():
            if next(module.parameters(recurse=False), None) is not None:
                if isinstance(module, nn.Linear) and {f"{name}.weight", f"{name}.bias"} <= set(victim.layout.names):
                    return str(name)
                break
        raise ConfigurationError("the network has no linear first layer with a bias, which the bias trick reads the input from")

    def check(self, case: Case) -> None:
        """Refuse a network without a linear first layer with a bias."""
        self.layer(case.victim)

    def run(self, case: Case, generator: torch.Generator) -> Guess:
        """Return the images."""
        name = self.layer(case.victim)
        weight, bias = piece(case, f"{name}.weight"), piece(case, f"{name}.bias")
        shape = case.context.images.shape[1:]
        used = bias.abs() > 1e-6 * bias.abs().max()
        if case.count == 1 or not bool(used.any()):
            used = bias.abs() == bias.abs().max()
        inputs = weight[used] / torch.where(bias[used] == 0, torch.ones_like(bias[used]), bias[used])[:, None]
        images = case.victim.pixels.images(inputs.view(len(inputs), *shape)).flatten(1)
        outside = (images - images.clamp(0, 1)).square().mean(1)
        possible = outside <= max(1e-6, float(outside.min()))
        return Guess(spread_out(images[possible], case.count).view(case.count, *shape))


class LastLayerLabels(Attack):
    """Counts labels from the last layer's gradient, predicted probability minus truth: iDLG, and its extension to batches.

    The bias gives them exactly (without a bias, the row sums of the weights do, for one image only); public images give the mean
    probabilities. The attack decodes codes first, and recovers no pixels.
    """

    name = "iDLG labels"
    needs_gradients = False

    @staticmethod
    def layer(victim: Victim) -> str:
        """Return the name of the last layer; raises ``ConfigurationError`` if it is not linear."""
        own = [(n, m) for n, m in victim.network.named_modules() if next(m.parameters(recurse=False), None) is not None]
        if not own or not isinstance(own[-1][1], nn.Linear) or f"{own[-1][0]}.weight" not in victim.layout.names:
            raise ConfigurationError("the network has no linear last layer, which labels are read from")
        return str(own[-1][0])

    def check(self, case: Case) -> None:
        """Refuse a network without a linear last layer, and several images if that has no bias."""
        if f"{self.layer(case.victim)}.bias" not in case.victim.layout.names and case.count > 1:
            raise ConfigurationError("the network's last layer has no bias, without which the attack reads labels for one image only")

    def run(self, case: Case, generator: torch.Generator) -> Guess:
        """Return the labels ``[n]``: one by one the class that explains most of the remaining gradient."""
        name = self.layer(case.victim)
        if f"{name}.bias" not in case.victim.layout.names:
            return Guess(labels=piece(case, f"{name}.weight").sum(1).argmin()[None])
        gradient = piece(case, f"{name}.bias") / (case.victim.lr * case.victim.steps)
        with torch.no_grad():
            inputs = case.victim.pixels.inputs(case.context.images[:512].double())
            expected = functional_call(case.victim.network, case.victim.weights, (inputs,)).softmax(1).mean(0)
        left = case.count * (expected - gradient)
        labels = []
        for _ in range(case.count):
            labels.append(left.argmax())
            left[labels[-1]] -= 1
        return Guess(labels=torch.stack(labels))


class Imprinted(nn.Module):
    """A network after a layer that sorts images into bins by brightness and passes them on nearly unchanged.

    ``thresholds`` ``[bins]``, ascending, are the mean inputs above which a unit is active; ``strength`` is the size of what it adds.
    """

    direction: Tensor

    def __init__(self, network: nn.Module, thresholds: Tensor, features: int, strength: float) -> None:
        super().__init__()
        self.imprint = nn.Linear(features, len(thresholds)).to(thresholds)
        with torch.no_grad():
            self.imprint.weight.fill_(1 / features)
            self.imprint.bias.copy_(-thresholds)
        direction = torch.randn(features, generator=torch_generator("imprint"), dtype=torch.float64)
        self.register_buffer("direction", (strength * direction / len(thresholds)).to(thresholds))
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Return the network's logits ``[n, classes]``."""
        active: Tensor = self.imprint(x.flatten(1)).relu()
        logits: Tensor = self.network(x + (active.sum(1, keepdim=True) * self.direction).view_as(x))
        return logits


class RobbingTheFed(Attack):
    """A malicious server adds a layer before the model; neighboring rows of its gradient differ by the images of one brightness.

    An image that is alone in its bin is recovered exactly: the difference of two rows divided by the difference of their biases.

    Args:
        bins: units of the layer, thresholds at quantiles of the brightness of public images.
        strength: size of what the layer adds to the model's input.
    """

    name = "Robbing the Fed (malicious server)"
    needs_gradients = False

    def __init__(self, bins: int = 64, strength: float = 1e-2) -> None:
        require(bins >= 2, f"Expected `bins` >= 2 but got {bins}")
        require_positive(strength=strength)
        self.bins = bins
        self.strength = strength

    def tamper(self, victim: Victim, context: Auxiliary) -> nn.Module:
        """Return the model with the layer in front."""
        brightness = victim.pixels.inputs(context.images.double()).flatten(1).mean(1)
        # The lowest threshold lies below every image, so that the darkest images have a bin too.
        levels = torch.linspace(0, 1, self.bins + 1, dtype=torch.float64, device=brightness.device)[:-1]
        thresholds = torch.quantile(brightness, levels)
        thresholds[0] -= brightness.std() + 1
        return Imprinted(copy.deepcopy(victim.network), thresholds, context.images[0].numel(), self.strength)

    def run(self, case: Case, generator: torch.Generator) -> Guess:
        """Return the contents of the fullest bins, and the public mean image for images that are in no bin."""
        weight, bias = piece(case, "imprint.weight"), piece(case, "imprint.bias")
        weight = torch.cat([weight[:-1] - weight[1:], weight[-1:]])
        bias = torch.cat([bias[:-1] - bias[1:], bias[-1:]])
        order = bias.abs().argsort(descending=True)[: case.count]
        order = order[bias[order].abs() > 1e-6 * bias.abs().max()]
        shape = case.context.images.shape[1:]
        images = case.victim.pixels.images((weight[order] / bias[order, None]).view(len(order), *shape))
        rest = case.context.images.double().mean(0).expand(case.count - len(order), *shape)
        return Guess(torch.cat([images, rest]))
