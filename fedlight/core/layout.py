"""Flat parameters: the order of a model's named tensors in one vector of length ``dim``, and gradients as pieces of such a vector.

A gradient may be missing (the loss does not reach the parameter, or it has ceased to be trained), sparse (an embedding with
``sparse=True``), complex, or of any float type. Optimizers leave a parameter without a gradient alone: no decay, no momentum.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, zip_longest

import torch
from torch import Tensor, nn

from fedlight.core.buffers import statistics
from fedlight.core.errors import CodecMismatchError


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the tensors in a flat vector, in order."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...] = field(init=False, repr=False)
    offsets: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        sizes = tuple(math.prod(shape) for shape in self.shapes)
        object.__setattr__(self, "sizes", sizes)
        object.__setattr__(self, "offsets", tuple(accumulate(sizes, initial=0))[:-1])

    @classmethod
    def of(cls, model: nn.Module) -> Layout:
        """Return the layout of a model's trainable parameters, in the order of ``named_parameters``; a complex number is two numbers."""
        named = [(name, tuple(as_real(p).shape)) for name, p in named_trainable(model)]
        return cls(tuple(name for name, _ in named), tuple(shape for _, shape in named))

    @classmethod
    def vector(cls, dim: int, name: str = "code") -> Layout:
        """Return the layout of one unstructured vector ``[dim]``, the input of the next codec in a chain."""
        return cls((name,), ((dim,),))

    def stacked(self, vectors: int, scalars: int = 0) -> Layout:
        """Return the layout of several such vectors, concatenated, and numbers after them."""
        names = self.names + tuple(f"{i}/{name}" for i in range(1, vectors) for name in self.names)
        return Layout(names + ("scalars",) * bool(scalars), self.shapes * vectors + ((scalars,),) * bool(scalars))

    def unstacked(self, vectors: int, scalars: int = 0) -> Layout:
        """Return the layout before ``stacked``."""
        count = (len(self.names) - bool(scalars)) // vectors
        return Layout(self.names[:count], self.shapes[:count])

    @property
    def dim(self) -> int:
        """Length of the flat vector."""
        return sum(self.sizes)

    @property
    def fingerprint(self) -> str:
        """Digest of names and shapes: equal exactly if two vectors have the same meaning."""
        return hashlib.blake2b(self.to_json().encode(), digest_size=8).hexdigest()

    def split(self, flat: Tensor) -> list[Tensor]:
        """View ``flat`` ``[..., dim]`` as the list of tensors ``[..., *shape]``."""
        lead = flat.shape[:-1]
        parts = torch.split(flat, list(self.sizes), dim=-1)
        return [part.reshape((*lead, *shape)) for part, shape in zip(parts, self.shapes, strict=True)]

    def to_json(self) -> str:
        """Return the layout as a JSON text."""
        return json.dumps([[name, list(shape)] for name, shape in zip(self.names, self.shapes, strict=True)])

    @classmethod
    def from_json(cls, text: str) -> Layout:
        """Return the layout that ``to_json`` wrote; raises ``CodecMismatchError`` if the text is something else."""
        try:
            items = [(name, tuple(shape)) for name, shape in json.loads(text)]
        except (TypeError, ValueError, RecursionError) as error:
            raise CodecMismatchError(f"Expected a layout, pairs of a name and a shape as JSON, but got {text[:80]!r}: {error}") from error
        for name, shape in items:
            if not isinstance(name, str) or not all(type(size) is int and size >= 0 for size in shape):
                raise CodecMismatchError(f"Expected a layout of names and shapes but it holds {(name, shape)!r:.80}")
        return cls(tuple(name for name, _ in items), tuple(shape for _, shape in items))

    def require_same(self, other: Layout, what: str) -> None:
        """Raise ``CodecMismatchError`` naming the first difference unless ``other`` equals this layout."""
        if self == other:
            return
        if self.dim != other.dim:
            detail = f"Expected a model of dimension {self.dim:,} but got {other.dim:,}"
        else:
            none = ("nothing more", ())
            pairs = zip_longest(zip(self.names, self.shapes, strict=True), zip(other.names, other.shapes, strict=True), fillvalue=none)
            mine, theirs = next((a, b) for a, b in pairs if a != b)
            detail = f"Expected parameter {mine[0]} {list(mine[1])} but got {theirs[0]} {list(theirs[1])}"
        raise CodecMismatchError(f"{what} was made for another model. {detail}. Use that network, or run `fedlight pretrain` for this one.")


def named_trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return a model's trainable parameters that hold any numbers, by name, in the layout's order."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad and p.numel()]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return these parameters alone."""
    return [parameter for _, parameter in named_trainable(model)]


def as_real(tensor: Tensor) -> Tensor:
    """View complex numbers ``[...]`` as pairs of real ones ``[..., 2]``; return any other tensor as it is."""
    return torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor


def as_is(piece: Tensor, like: Tensor) -> Tensor:
    """Return a piece of a flat vector in the type and shape of the parameter that it belongs to."""
    if like.is_complex():
        return torch.view_as_complex(piece.to(like.real.dtype).contiguous())
    return piece.to(like)


def flatten(tensors: Iterable[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """Return a new vector ``[dim]`` with the concatenated entries of the tensors; a complex number is two entries."""
    parts = [as_real(tensor.detach()).reshape(-1) for tensor in tensors]
    flat = torch.cat(parts) if parts else torch.empty(0)
    return flat if dtype is None else flat.to(dtype)


class FlatModel:
    """A model whose trainable parameters, and running statistics, are views of two flat vectors.

    Writing to ``weights`` ``[dim]`` or ``buffers`` ``[buffer_dim]`` changes the model in place. It takes over the
    module: move it to its device before, and do not call ``.to`` on it afterwards, which would break the views.

    Raises:
        CodecMismatchError: if trainable parameters have several float types.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.layout = Layout.of(module)
        named = named_trainable(module)
        types = {as_real(p).dtype: name for name, p in reversed(named)}
        types = dict(sorted(types.items(), key=lambda found: str(found[0])))
        if len(types) > 1:
            found = ", ".join(f"{name} of {dtype}" for dtype, name in types.items())
            raise CodecMismatchError(
                f"Expected trainable parameters of one dtype but got {found}: convert the network, such as by `.float()`, or freeze "
                "the parameters of one type by `requires_grad_(False)`"
            )
        self.parameters: list[Tensor] = [p for _, p in named]
        self.weights = flatten(self.parameters)
        self._views = [
            torch.view_as_complex(view) if parameter.is_complex() else view
            for parameter, view in zip(self.parameters, self.layout.split(self.weights), strict=True)
        ]
        self.attach()
        places = statistics(module)
        self._buffers = flatten(place.table[place.key] for place in places).to(self.weights.device)
        sizes = [place.table[place.key].numel() for place in places]
        views = zip(places, torch.split(self._buffers, sizes) if places else (), strict=True)
        # `data`, or autograd would take a change of one layer's statistics for one of every layer's.
        self._statistics = [(place, view.view(place.table[place.key].shape).data) for place, view in views]
        for place, view in self._statistics:
            place.table[place.key] = view

    def attach(self) -> None:
        """Make every parameter a view of ``weights``, whatever it is now."""
        for parameter, view in zip(self.parameters, self._views, strict=True):
            parameter.data = view

    def take_over(self) -> None:
        """Write into ``weights`` what was put in a parameter's place, as by ``parameter.data = values``.

        Raises:
            CodecMismatchError: if it has another shape or type.
        """
        for name, parameter, view in zip(self.layout.names, self.parameters, self._views, strict=True):
            if parameter.dtype == view.dtype and parameter.is_set_to(view):
                continue
            if parameter.shape != view.shape or parameter.dtype != view.dtype:
                raise CodecMismatchError(
                    f"Expected {name} to stay {view.dtype} {list(view.shape)} in training but it became {parameter.dtype} "
                    f"{list(parameter.shape)}: convert the network before, or change a copy of it"
                )
            view.copy_(parameter.data)
            parameter.data = view

    @property
    def buffers(self) -> Tensor:
        """Running statistics ``[buffer_dim]``, in the order of ``float_buffers``."""
        for place, view in self._statistics:
            now = place.get()
            if now is not view:  # training put another tensor in its place
                view.copy_(torch.zeros_like(view) if now is None else now)
                place.table[place.key] = view
        return self._buffers


def float_buffers(module: nn.Module) -> list[Tensor]:
    """Return the model's running statistics (those of normalisation layers) in the order of ``FlatModel.buffers``."""
    return [place.table[place.key] for place in statistics(module)]


def derivatives(loss: Tensor, seed: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the loss's gradient for each parameter as autograd makes it, None where the loss does not depend on it.

    They lie in the parameters' ``grad`` as well, as ``loss.backward()`` leaves them: hooks of parameters and checkpoints within the network
    do what they do there. ``seed`` (0-d, one) is the loss's derivative by itself.
    """
    for parameter in parameters:
        parameter.grad = None
    if any(parameter.requires_grad for parameter in parameters):
        # The checks of `backward` in Python would take a sixth of a small model's step.
        engine = torch.autograd.Variable._execution_engine
        engine.run_backward((loss,), (seed,), False, False, (), allow_unreachable=True, accumulate_grad=True)
    return [parameter.grad for parameter in parameters]


def piece(gradient: Tensor) -> Tensor:
    """Return a gradient as a dense tensor of real numbers (a complex one as pairs ``[..., 2]``)."""
    return as_real(gradient.to_dense() if gradient.layout != torch.strided else gradient)


def flat_gradient(gradients: Sequence[Tensor]) -> Tensor:
    """Return gradients of any kind as one new vector ``[dim]``."""
    return torch.cat([piece(gradient).reshape(-1) for gradient in gradients]) if gradients else torch.empty(0)


def absent(layout: Layout, reached: Sequence[bool]) -> list[slice]:
    """Return the parts of a flat vector that belong to parameters without a gradient."""
    if all(reached):
        return []
    spans = zip(layout.offsets, layout.sizes, reached, strict=True)
    return [slice(offset, offset + size) for offset, size, there in spans if not there]


def put_piece(parameter: Tensor, mean: Tensor) -> None:
    """Make a flat piece the gradient of a parameter that has one: in its memory, or in its place if it is sparse."""
    held = parameter.grad
    assert held is not None
    made = as_is(mean.view(as_real(parameter).shape), parameter)
    if held.layout == torch.strided:
        held.copy_(made)
    else:  # rows of zeros stay out, which some optimizers leave alone
        parameter.grad = made.to_sparse(1)
