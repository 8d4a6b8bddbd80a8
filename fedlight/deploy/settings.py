"""The settings that a client gets from the server: what it trains, and how. No weights, no data, no code."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import Any, Literal, TypeVar

from jsonargparse import ArgumentParser
from torch import nn

from fedlight.aggregation import Aggregator, PlainAggregator
from fedlight.clients import Algorithm
from fedlight.clients.local_model import LocalModel
from fedlight.clients.own_optimizer import default_algorithm
from fedlight.core.buffers import constants
from fedlight.core.codec import Codec
from fedlight.core.errors import ConfigurationError
from fedlight.core.export import codec_from_config
from fedlight.core.kinds import derives_from
from fedlight.core.layout import Layout
from fedlight.data.augment import Augmentation
from fedlight.privacy import AccountingSetting, PrivacyMechanism

T = TypeVar("T")

PARTS = ("network", "algorithm", "loss", "privacy", "aggregator", "weighting", "batch_norm")
"""What of a run's `model` clients have to know beside the codec."""

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


class NotAllowedError(ConfigurationError):
    """The settings name a class that the client does not allow."""


@dataclass(frozen=True)
class Terms:
    """What a run fixes beyond its YAML."""

    codec: Mapping[str, Any]  # that updates are encoded with, as ``Codec.config`` tells it
    nodes: tuple[str, ...]  # the names of all clients; a client's number is its place
    reproducible: bool = False  # whether batches and rounding are drawn from the public seed
    accounting: AccountingSetting | None = None  # what the noise of privacy is calibrated to
    population: int = 0
    constants: Mapping[str, str] = field(default_factory=dict)  # digests of what is frozen by name: all have it, nobody is sent it
    rounds: int = -1  # how many there will be, which schedules of a LightningModule may ask for; -1 if that is not set


def write_settings(model: Mapping[str, Any], augmentation: Any, terms: Terms) -> str:
    """Return the settings as text, of a run's configured ``model`` and ``data.augmentation`` and of what the run fixes beyond."""
    told = {"model": {name: model[name] for name in PARTS if model.get(name) is not None}, "augmentation": augmentation}
    return json.dumps({**told, "terms": asdict(terms)}, sort_keys=True)


class Parts:
    """What a client makes of the settings.

    Args:
        network: The model: maps inputs to logits, or to what ``loss`` takes; or a LightningModule, whose `training_step` is run.
        algorithm: Local training.
        loss: Loss of outputs and targets (cross entropy if not given).
        privacy: Differential privacy.
        aggregator: How codes are summed.
        weighting: Whether clients count equally, or by their number of samples.
        batch_norm: Whether BatchNorm layers are averaged, or stay with each client.
        augmentation: Random change of training images.
    """

    codec: Codec
    terms: Terms
    local_model: Callable[[Augmentation | None], LocalModel] | None = None
    """Makes what the client trains, where that is not ``network`` and ``loss``."""

    def __init__(
        self,
        network: nn.Module,
        algorithm: Algorithm | None = None,
        loss: nn.Module | None = None,
        privacy: PrivacyMechanism | None = None,
        aggregator: Aggregator | None = None,
        weighting: Literal["equal", "samples"] = "equal",
        batch_norm: Literal["mean", "local"] = "mean",
        augmentation: Augmentation | None = None,
    ) -> None:
        self.network = network
        self.algorithm = algorithm or default_algorithm(derives_from(network, "lightning"))
        self.loss = loss or nn.CrossEntropyLoss()
        self.privacy = privacy
        self.aggregator = aggregator or PlainAggregator()
        self.weighting = weighting
        self.batch_norm = batch_norm
        self.augmentation = augmentation

    @property
    def layout(self) -> Layout:
        """The layout of what a client uploads."""
        return Layout.of(self.network).stacked(self.algorithm.vectors, self.algorithm.scalars)


def read_settings(text: str, allowed: Collection[str] = (), set_up: Callable[[Parts], None] | None = None) -> Parts:
    """Return what ``write_settings`` described; ``set_up`` lets a network make its layers, before its parameters are looked at.

    Nothing is imported before every dotted name in the text is of fedlight, a layer or a loss of torch, or begins with one of ``allowed``,
    and nothing is built before the same is true of all that short names stand for. What a module of these merely imports is not of it.

    Raises:
        NotAllowedError: if it names anything else.
        ConfigurationError: if it cannot be built here, or is no such text.
    """
    model, terms = _read(text)
    prefixes = ("fedlight", "torch.nn", "torch.optim", *allowed)
    _refuse_others(model, prefixes)
    try:
        parts = build(Parts, model, "model", lambda parsed: _refuse_others([*_class_paths(parsed)], prefixes))
    except NotAllowedError:
        raise
    except Exception as error:  # whatever the classes raise
        raise ConfigurationError(f"Expected settings that can be built here but: {error}") from error
    parts.terms = terms
    if set_up is not None:
        set_up(parts)
    _check_constants(parts.network, parts.terms.constants)
    parts.codec = codec_from_config(dict(terms.codec))
    if not parts.codec.needs_fit:
        parts.codec.bind(parts.layout)
    if parts.privacy is not None:
        if parts.privacy.simulation_seed is not None:
            raise ConfigurationError("Expected no `simulation_seed`: whoever knows it can take the noise off. Leave it out")
        if terms.accounting is None:
            raise ConfigurationError("Expected settings that say what the noise of `privacy` is calibrated to but they do not")
        parts.privacy.calibrate(terms.accounting, terms.population)
    return parts


def _read(text: str) -> tuple[dict[str, Any], Terms]:
    """Return the description of the parts, and the terms."""
    try:
        given = json.loads(text)
        model, terms = dict(given["model"]), given["terms"]
        if given["augmentation"] is not None:
            model["augmentation"] = given["augmentation"]
        accounting = None if terms["accounting"] is None else AccountingSetting(**terms["accounting"])
        return model, Terms(**{**terms, "nodes": tuple(terms["nodes"]), "accounting": accounting})
    except (LookupError, TypeError, ValueError, RecursionError) as error:  # another text, or one nested too deep
        raise ConfigurationError(f"Expected the settings of a run but could not read them: {type(error).__name__}: {error}") from error


def _check_constants(network: nn.Module, expected: Mapping[str, str]) -> None:
    """Refuse a network whose frozen parts are not the server's: they never travel."""
    own = constants(network)
    for name, digest in expected.items():
        if own.get(name) != digest:
            raise ConfigurationError(
                f"Expected {name} of {type(network).__name__} to hold the same numbers at the server and here, as nobody is sent what is "
                "not trained, but they differ: load it from the same file on both sides, such as by `base` of LoRA, or draw it from a seed"
            )


def build(cls: type[T], arguments: Mapping[str, Any], name: str, check: Callable[[Mapping[str, Any]], None] | None = None) -> T:
    """Return an object of a class with these arguments, parts in it by `class_path` and `init_args`; errors call it ``name``.

    ``check`` is given the arguments with every class by its whole name, before anything is made.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, name)
    parsed = parser.parse_object({name: dict(arguments)})
    if check is not None:
        check(parsed[name].as_dict())
    made: T = parser.instantiate(parsed)[name]
    return made


def _refuse_others(values: Any, prefixes: Collection[str]) -> None:
    """Refuse names that begin with no prefix, before anything is imported, and then what a module only imports."""
    names = set(_dotted(values))
    for name in sorted(name for name in names if not _below(name, prefixes)) or sorted(
        name for name in names if not _at_home(name, prefixes)
    ):
        raise NotAllowedError(f"Expected a class of fedlight or one that node.yaml allows but the server names {name}: add it to `allow`")


def _below(name: str, prefixes: Collection[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def _at_home(name: str, prefixes: Collection[str]) -> bool:
    """Whether what a name stands for was made in a module below a prefix: `fedlight.core.files.os.system` was not."""
    if name in prefixes:
        return True
    module, _, last = name.rpartition(".")
    try:
        home = getattr(import_module(module), last).__module__
    except (ImportError, AttributeError):
        return False
    return _below(home, (*prefixes, "torch._C._nn"))  # where torch has the functions of torch.nn.functional that are in C++


def _class_paths(values: Any) -> Iterator[str]:
    """Yield the classes of all parts; other texts among the arguments may be a class's own defaults."""
    if isinstance(values, Mapping):
        if isinstance(path := values.get("class_path"), str):
            yield path
        values = list(values.values())
    for value in values if isinstance(values, (list, tuple)) else ():
        yield from _class_paths(value)


def _dotted(values: Any) -> Iterator[str]:
    """Yield every text that looks like the import path of something."""
    if isinstance(values, Mapping):
        values = [*values.keys(), *values.values()]
    if isinstance(values, str):
        if _DOTTED.fullmatch(values):
            yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _dotted(value)
