"""Low-rank adapters on a frozen network: all that clients train, encode and send (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedlight.core.checkpoint import read_checkpoint
from fedlight.core.errors import ConfigurationError, require


class LoRA(nn.Module):
    """A frozen network with a trained low-rank term beside each of its linear layers: ``W x + (alpha / rank) B A x``, ``B`` zero at first.

    Clients are taken to hold the network; checkpoints hold the adapters alone. Adapters are float32 whatever the network's float type.

    Args:
        network: the network to adapt, which is frozen.
        base: file with its weights: a checkpoint of a federated or a Lightning run, or what ``torch.save`` wrote of its ``state_dict``;
            its own weights if not given.
        rank: rank of the terms.
        alpha: their scale, divided by ``rank``.
        layers: ends of the names of the layers to adapt, such as ``query`` and ``value``; every ``nn.Linear`` if not given.
        trained: ends of the names of parameters that are trained as they are, such as ``classifier.bias``; none if not given.

    Raises:
        ConfigurationError: if ``rank`` or ``alpha`` is out of range, no layer has such a name, or ``base`` does not fit the network.
    """

    def __init__(
        self,
        network: nn.Module,
        base: str | None = None,
        rank: int = 4,
        alpha: float = 8.0,
        layers: Sequence[str] | None = None,
        trained: Sequence[str] = (),
    ) -> None:
        super().__init__()
        require(rank >= 1, f"Expected `rank` >= 1 but got {rank}")
        require(alpha > 0, f"Expected `alpha` > 0 but got {alpha}")
        if base is not None:
            load_base(network, base)
        self.network = network.requires_grad_(False)
        chosen = [name for name, part in network.named_modules() if type(part) is nn.Linear and _ends(name, layers)]
        if not chosen:
            raise ConfigurationError(f"Expected `layers` to end the name of a linear layer of {type(network).__name__} but got {layers}")
        for name in chosen:
            parent, _, own = name.rpartition(".")
            setattr(network.get_submodule(parent), own, LoRALinear(network.get_submodule(name), rank, alpha))  # type: ignore[arg-type]
        for name, parameter in network.named_parameters():
            if trained and _ends(name, trained):
                parameter.requires_grad_(True)
        self._register_state_dict_hook(_leave_out_frozen)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_miss_frozen)  # type: ignore[no-untyped-call]

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return the adapted network's output."""
        return self.network(*inputs, **named)


class LoRALinear(nn.Module):
    """A frozen linear layer with a trained term of low rank."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = alpha / rank
        self.a = nn.Parameter(torch.empty(rank, base.in_features, device=base.weight.device))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))
        nn.init.kaiming_uniform_(self.a, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[..., out]`` of ``x`` ``[..., in]``, in the layer's float type."""
        out: Tensor = self.base(x)
        low = nn.functional.linear(nn.functional.linear(x.to(self.a.dtype), self.a), self.b)
        return out + (self.scale * low).to(out.dtype)


def load_base(network: nn.Module, path: str) -> None:
    """Load a network's weights, by name or after ``network.``; raises ``ConfigurationError`` for another network's or no such file."""
    try:
        held = read_checkpoint(Path(path).expanduser())
    except Exception as error:  # whatever a file that is none raises
        raise ConfigurationError(f"Expected `base` to be a checkpoint with weights but {path} cannot be read: {error}") from error
    weights = held.get("state_dict", held)
    within = {name.removeprefix("network."): value for name, value in weights.items() if name.startswith("network.")}
    try:
        network.load_state_dict(within or weights)
    except RuntimeError as error:
        raise ConfigurationError(f"Expected `base` to hold the weights of a {type(network).__name__} but {path}: {error}") from error


def _ends(name: str, ends: Sequence[str] | None) -> bool:
    return ends is None or any(name == end or name.endswith(f".{end}") for end in ends)


def _frozen(module: nn.Module, prefix: str) -> set[str]:
    return {prefix + name for name, parameter in module.named_parameters() if not parameter.requires_grad}


def _leave_out_frozen(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in _frozen(module, prefix):
        state.pop(name, None)


def _miss_frozen(module: nn.Module, keys: Any) -> None:
    """Do not miss what a checkpoint leaves out: the names that end with those of frozen parameters."""
    frozen = tuple(_frozen(module, ""))
    keys.missing_keys[:] = [name for name in keys.missing_keys if not name.endswith(frozen)]
