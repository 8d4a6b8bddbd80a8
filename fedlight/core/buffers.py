"""What a model holds beside its trained weights, each part by what becomes of it in federated training.

- Running means and variances of torch's normalisation layers in training mode: sent with every update, averaged (``statistics``).
- Other persistent buffers, and parameters that are not trained: sent, under their name and in their own type, only from clients whose
  training changed them (``extras``). So constants cost nothing. Floats are averaged over those clients; what has no mean (integers,
  flags, vectors of length 1 such as those of spectral normalisation or of a queue) is taken from one of them, drawn each round.
- Buffers that are not persistent stay with the client, as do counters of normalisation layers whose momentum is fixed: nothing reads
  these, and the server counts the steps itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from fedlight.core.errors import ConfigurationError
from fedlight.core.random import numpy_generator

Spec = tuple[tuple[int, ...], str]
"""Shape and type of an extra."""


class Place(NamedTuple):
    """Where a module holds a tensor: in ``table`` (its buffers or its parameters) under ``key``; ``name`` is that of the state dict."""

    name: str
    table: dict[str, Any]
    key: str

    def get(self) -> Tensor | None:
        """Return the tensor that is there now."""
        return self.table.get(self.key)


def statistics(module: nn.Module) -> list[Place]:
    """Return the running means and variances that training is expected to change, all of one type, in the order of ``modules()``."""
    found = [place for layer, place in _buffers(module) if _is_statistic(layer, place)]
    first = next((place.table[place.key].dtype for place in found), None)
    return [place for place in found if place.table[place.key].dtype == first]


def counters(module: nn.Module, counting: bool = False) -> list[Place]:
    """Return the batch counters that nothing reads, of normalisation layers with a fixed momentum; ``counting``: those that count."""
    return [
        place
        for layer, place in _buffers(module)
        if _is_idle_counter(layer, place) and (not counting or (layer.training and isinstance(layer, _BatchNorm)))
    ]


def extras(module: nn.Module) -> dict[str, Place]:
    """Return, by name, what else of the state dict training may change: other persistent buffers, and parameters that are not trained."""
    apart = {place.name for place in (*statistics(module), *counters(module))}
    found = {p.name: p for layer, p in _buffers(module) if p.key not in layer._non_persistent_buffers_set and p.name not in apart}
    for path, layer in module.named_modules():
        for key, parameter in layer._parameters.items():
            if parameter is not None and not parameter.requires_grad and parameter.numel():
                place = Place(f"{path}.{key}" if path else key, layer._parameters, key)
                found[place.name] = place
    return found


def specs(module: nn.Module) -> dict[str, Spec | None]:
    """Return shape and type of every extra; None for a buffer that holds nothing yet."""
    found = {name: place.get() for name, place in extras(module).items()}
    return {name: None if tensor is None else (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in found.items()}


def constants(module: nn.Module, but: Collection[str] = ()) -> dict[str, str]:
    """Return a digest of every extra by name, ``but`` for these: two copies of a network that share them need not be sent them."""
    held = {name: place.get() for name, place in extras(module).items() if name not in but}
    return {name: _digest(tensor) for name, tensor in held.items() if tensor is not None}


def _digest(tensor: Tensor) -> str:
    flat = _dense(tensor.detach()).cpu().contiguous().view(-1)
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return hashlib.blake2b(f"{tensor.dtype} {list(tensor.shape)} ".encode() + data, digest_size=8).hexdigest()


def kept_apart(module: nn.Module) -> list[Place]:
    """Return what stays with the client: buffers that are not persistent, and idle counters."""
    return [p for layer, p in _buffers(module) if p.key in layer._non_persistent_buffers_set] + counters(module)


def _buffers(module: nn.Module) -> Iterator[tuple[nn.Module, Place]]:
    for path, layer in module.named_modules():
        for key in layer._buffers:
            yield layer, Place(f"{path}.{key}" if path else key, cast("dict[str, Any]", layer._buffers), key)


def _is_statistic(layer: nn.Module, place: Place) -> bool:
    known = isinstance(layer, _NormBase) and place.key in ("running_mean", "running_var")
    return known and layer.training and place.get() is not None and place.key not in layer._non_persistent_buffers_set


def _is_idle_counter(layer: nn.Module, place: Place) -> bool:
    known = isinstance(layer, _NormBase) and place.key == "num_batches_tracked" and layer.momentum is not None
    return known and place.get() is not None


@dataclass
class _Loaded:
    """An extra of a client's model: the value to put back, the one that the client started from, and the tensor that held it.

    ``clean`` says that training is known to have left it alone. Values tell, not versions: what is done to ``parameter.data`` counts none.
    """

    place: Place
    first: Tensor | None
    start: Tensor | None
    held: Tensor | None
    clean: bool = False

    def put(self, value: Tensor | None) -> None:
        """Start from a value, which is written into its place unless it is there already."""
        if not self.clean or value is not self.start:
            self.write(value)
        self.start, self.clean = value, False

    def write(self, value: Tensor | None) -> None:
        """Write a value into its place."""
        tensor = self.held
        if value is None:
            tensor = None
        elif tensor is not None and tensor.shape == value.shape and tensor.dtype == value.dtype and tensor.layout == torch.strided:
            tensor.detach().copy_(value)
        elif isinstance(tensor, nn.Parameter):
            tensor.data = value.clone()
        else:
            tensor = value.clone() if tensor is None else value.to(tensor.device, copy=True)
        self.place.table[self.place.key] = self.held = tensor

    def changed(self) -> Tensor | None:
        """Return what is in its place, or None if that is what the client started from."""
        now = self.place.get()
        self.clean = now is self.held and (now is None or same_bits(now, self.start))
        return None if self.clean or now is None or same_bits(now, self.start) else now.detach().clone()


class ClientExtras:
    """The extras of a client's model: put back before a client trains, compared when it has.

    Args:
        module: the client's model.
        network: the model that it is a copy of, whose tensors are the values to put back: they are read, not copied.

    Attributes:
        any_sent: whether there is anything that a client might have to send.
    """

    def __init__(self, module: nn.Module, network: nn.Module) -> None:
        first = extras(network) | {place.name: place for place in kept_apart(network)}
        self._sent = {name: _loaded(place, first[name]) for name, place in extras(module).items()}
        self.any_sent = bool(self._sent)
        self._kept = [_loaded(place, first[place.name]) for place in kept_apart(module)]
        self._layers = [(layer, set(layer._buffers), set(layer._non_persistent_buffers_set)) for layer in module.modules()]
        self._within = [(layer, dict(layer._modules)) for layer in module.modules()]
        found = [(layer, key, p) for layer in module.modules() for key, p in layer._parameters.items()]
        self._parameters = [(layer, key, p, p.requires_grad) for layer, key, p in found if p is not None]

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Put everything back, to the server's ``values`` where there are any."""
        for layer, keys, loose in self._layers:
            if len(layer._buffers) != len(keys):
                for key in [key for key in layer._buffers if key not in keys]:
                    del layer._buffers[key]
                layer._non_persistent_buffers_set &= loose
        for layer, key, parameter, trained in self._parameters:
            layer._parameters[key] = parameter
            parameter.requires_grad = trained
        for one in self._kept:
            one.put(one.first)
        for name, one in self._sent.items():
            one.put(values.get(name, one.first))

    def rewind(self, changed: Mapping[str, Tensor]) -> None:
        """Write back what ``changed`` returned earlier in the same training."""
        for name, one in self._sent.items():
            one.write(changed.get(name, one.start))

    def changed(self) -> dict[str, Tensor]:
        """Return copies of the extras that training changed, by name.

        Raises:
            ConfigurationError: if training replaced a parameter or a layer that has some, began to train one, or added a buffer, which no
                message could carry.
        """
        for layer, parts in self._within:
            for key, part in layer._modules.items() if layer._modules != parts else ():
                if part is not parts.get(key) and part is not None and any(True for _ in part.parameters()):
                    raise ConfigurationError(
                        f"Expected the same layers from the start but training replaced `{key}` of {type(layer).__name__} by another "
                        f"{type(part).__name__}: load other weights into the old one"
                    )
        for layer, key, parameter, trained in self._parameters:
            if parameter.requires_grad and not trained:
                raise ConfigurationError(
                    f"Expected the same parameters to be trained from the start but `{key}` of {type(layer).__name__} began to require a "
                    "gradient: let it require one from the start, in a group of the optimizer whose learning rate is 0 until then"
                )
            if layer._parameters.get(key) is not parameter:
                raise ConfigurationError(
                    f"Expected parameters that are changed in place but training replaced `{key}` of {type(layer).__name__}: write into "
                    "it, such as by `copy_`"
                )
        for layer, keys, _ in self._layers:
            for key in layer._buffers if len(layer._buffers) != len(keys) else ():
                if key not in keys and key not in layer._non_persistent_buffers_set:
                    raise ConfigurationError(
                        f"Expected every buffer from the start but training added `{key}` to {type(layer).__name__}: register it in "
                        "`__init__` (as None, if its shape is not known there), or with persistent=False"
                    )
        found = {}
        for name, one in self._sent.items():
            if (value := one.changed()) is None:
                continue
            if value.layout != torch.strided:
                raise ConfigurationError(
                    f"Expected training to leave {name} as it is, or dense, because it is {value.layout} and sent where it changes: "
                    "register it with persistent=False, or make it dense"
                )
            found[name] = value
        return found

    def diverged(self, changed: Mapping[str, Tensor]) -> str | None:
        """Return why changed extras must not enter a mean, or None: a number is not finite that was, or is not a number."""
        for name, now in changed.items():
            start = self._sent[name].start
            now = _wide(now)
            odd = ~torch.isfinite(now)
            if start is not None and start.shape == now.shape:
                odd &= torch.isfinite(_wide(start).to(now.device)) | (now != now)
            if bool(odd.any()):
                return f"its {name} is not finite"
        return None


def _loaded(place: Place, origin: Place) -> _Loaded:
    first, held = origin.get(), place.get()
    first = None if first is None else first.detach()
    return _Loaded(place, first, first, held)


def same_bits(one: Tensor, other: Tensor | None) -> bool:
    """Whether two tensors have the same type, shape and numbers; NaN equals NaN."""
    if other is None or one.shape != other.shape or one.dtype != other.dtype:
        return False
    one, other = _dense(one), _dense(other.to(one.device))
    return torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def _wide(tensor: Tensor) -> Tensor:
    """Return a float of one byte as one that torch can test."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def combine(parts: Sequence[tuple[int, int, Mapping[str, Tensor]]], seed: int, round: int) -> dict[str, Tensor]:
    """Return the new value of every extra that clients changed, from (client, weight, values by name): see the top of this file."""
    ordered = sorted(parts, key=lambda part: part[0])
    order = numpy_generator(seed, "extras", round).permutation(len(ordered))
    return {name: _combined(name, ordered, order.tolist()) for name in sorted({name for _, _, values in parts for name in values})}


def _combined(name: str, parts: Sequence[tuple[int, int, Mapping[str, Tensor]]], order: Sequence[int]) -> Tensor:
    chosen = next(parts[at][2][name] for at in order if name in parts[at][2])
    mine = [(weight, values[name]) for _, weight, values in parts if name in values]
    alike = all(value.shape == chosen.shape and value.dtype == chosen.dtype for _, value in mine)
    if not alike or not (chosen.is_floating_point() or chosen.is_complex()) or all(_of_length_one(value) for _, value in mine):
        return chosen
    wide = torch.complex128 if chosen.is_complex() else torch.float64
    total = torch.stack([value.to(wide) * weight for weight, value in mine]).sum(0)
    return (total / sum(weight for weight, _ in mine)).to(chosen.dtype)


def _of_length_one(value: Tensor) -> bool:
    """Whether along one of its axes all vectors of a tensor have length 1."""
    axes = [axis for axis, size in enumerate(value.shape) if size > 1]
    return any(bool(((_wide(value.detach()).abs().float().norm(dim=axis) - 1).abs() < 1e-3).all()) for axis in axes)
