"""Every key of a configuration as tables, made from signatures and docstrings.

    python docs/scripts/configuration.py        # writes docs/reference/configuration.md

A test compares the page with what this makes.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch
from docstring_parser import parse

import fedlight
from fedlight.aggregation import Aggregator
from fedlight.audit.attacks import Attack
from fedlight.audit.plan import Audit, Canaries, Membership
from fedlight.audit.priors import Prior
from fedlight.audit.views import Observation
from fedlight.callbacks import CodecPretraining, CodecRefresh, FederatedCallback, RoundCheckpoint
from fedlight.compare.plan import Comparison
from fedlight.console.help import in_words
from fedlight.console.options import TRAINER, Option, own_options
from fedlight.core.pretraining import CodecTraining, ProxyFederation
from fedlight.data.federated import FederatedData
from fedlight.deploy import NodeConfig, OwnData
from fedlight.flower.clients import FlowerClients
from fedlight.flower.worker import Link
from fedlight.modules import FederatedModule

PAGE = Path(__file__).parents[1] / "reference" / "configuration.md"

FAMILIES = {
    "data.source": ("Data sources", "DataSource", "`data.source`, `data.proxy_source`"),
    "data.partitioner": ("Partitioners", "Partitioner", "`data.partitioner`"),
    "data.sampler": ("Samplers", "ClientSampler", "`data.sampler`: which clients are invited to a round"),
    "data.augmentation": ("Augmentations", "Augmentation", "`data.augmentation`, `data.proxy_augmentation`"),
    "model.codec": ("Codecs", "Codec", "`model.codec`"),
    "model.algorithm": ("Algorithms", "Algorithm", "`model.algorithm`: local training"),
    "schedule": ("Schedules", "Schedule", "`schedule` of an algorithm: a factor on its learning rate"),
    "model.engine": ("Engines", "Engine", "`model.engine`: how a process trains its clients"),
    "model.server_optimizer": ("Server optimizers", "torch.optim.Optimizer", "`model.server_optimizer`: these, or any of torch's"),
    "model.privacy": ("Differential privacy", "PrivacyMechanism", "`model.privacy`"),
    "model.aggregator": ("Aggregators", "Aggregator", "`model.aggregator`: how codes are summed"),
    "model.downlink": ("Downlinks", "Downlink", "`model.downlink`: what clients download"),
    "model.availability": ("Availability", "Availability", "`model.availability`: which invited clients of a simulation answer"),
    "model.clients": ("Clients", "Clients", "`model.clients`: what carries requests and replies"),
    "model.network": ("Networks", "torch.nn.Module", "`model.network`: these, any `torch.nn.Module`, or a LightningModule of yours"),
}
"""Parts with a choice of classes: title, base class, and the key."""

INTRODUCTION = """\
# Configuration

<!-- Made by docs/scripts/configuration.py from signatures and docstrings. Edit those. -->

Every key of `fedlight fit`, and of `compare`, `audit` and `node`. A key is a path in YAML and, behind two dashes, an option of the command
line:

```yaml
model:
  codec:
    class_path: TransformCodec
    init_args:
      ratio: 128
```

```bash
fedlight fit --config digits --model.codec.init_args.ratio 70
```

A class is named by its short name (`TransformCodec`) or its class path (`fedlight.TransformCodec`, `mine.MyCodec`). An argument without
a default must be given. `fedlight fit --config digits --print_config` prints a whole configuration, defaults included.
"""


def cell(text: str) -> str:
    """Return text for a cell of a table."""
    return re.sub(r"\s+", " ", text.replace("``", "`")).replace("|", "\\|").strip()


def table(rows: list[tuple[str, str, str, str]]) -> str:
    """Return a table of keys."""
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| `{key}` | {kind} | {default} | {meaning} |" for key, kind, default, meaning in rows)])


def listed(options: dict[str, Option], prefix: str = "") -> list[tuple[str, str, str, str]]:
    """Return options that are no arguments of a class of ours."""
    plain = [(name, one) for name, one in options.items() if one.meaning and one.default]
    return [(prefix + name, in_words(one.annotation), one.default.removeprefix("default: "), one.meaning) for name, one in plain]


def kind(cls: type, annotation: Any) -> str:
    """Return a type in YAML's words."""
    text = "" if annotation is inspect.Parameter.empty else str(annotation)
    alias = getattr(sys.modules[cls.__module__], text, None)
    if get_origin(alias) is Literal:
        text = f"Literal{list(get_args(alias))}"
    if found := re.fullmatch(r"Literal\[(.*?)\](.*)", text):
        text = re.sub(r"[\"']", "", found[1]).replace(", ", " or ") + found[2]
    words = {"OptimizerCallable": "optimizer", "LRSchedulerCallable": "schedule", "Any": ""}
    text = words.get(text.removesuffix(" | None"), text.removesuffix(" | None")) + (" or null" if text.endswith(" | None") else "")
    return cell(re.sub(r"\bnn\.", "", text).replace(" | ", " or "))


def default(cls: type, name: str, value: Any) -> str:
    """Return a default in YAML's words."""
    made = next((item for item in dataclasses.fields(cls) if item.name == name), None) if dataclasses.is_dataclass(cls) else None
    if made is not None and made.default_factory is not dataclasses.MISSING:
        value = made.default_factory()
        return cell(f"`{value}`") if isinstance(value, (list, dict)) else "its defaults"
    if value is inspect.Parameter.empty or callable(value):
        return ""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return cell(f"`{list(value)}`" if isinstance(value, tuple) else f"{value}")


def meanings(cls: type) -> dict[str, str]:
    """Return what a class says of its arguments, or else one of its base classes."""
    documented = [parse(inspect.getdoc(item) or "").params for item in reversed(cls.__mro__)]
    return {item.arg_name.lstrip("*"): cell(item.description or "") for params in documented for item in params}


def rows(cls: type, prefix: str = "") -> list[tuple[str, str, str, str]]:
    """Return the arguments of a class: key, type, default and meaning."""
    if cls.__init__ in (object.__init__, torch.nn.Module.__init__):
        return []
    known, found = meanings(cls), []
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        if name == "self" or parameter.kind is parameter.VAR_POSITIONAL:
            continue
        meaning = known.get(name, "")
        meaning = meaning[:1].upper() + meaning[1:]
        if parameter.kind is parameter.VAR_KEYWORD:
            found.append((f"{prefix}...", "", "", meaning))
        else:
            found.append((prefix + name, kind(cls, parameter.annotation), default(cls, name, parameter.default), meaning))
    return found


def sentence(cls: type) -> str:
    """Return the first sentence of a class's docstring, joined to one line."""
    return cell((inspect.getdoc(cls) or "").partition("\n\n")[0])


def choices(base: type) -> list[type]:
    """Return the public classes of a family, in alphabetical order."""
    public = [getattr(fedlight, name) for name in fedlight.__all__]
    found = {item for item in public if inspect.isclass(item) and issubclass(item, base) and not inspect.isabstract(item)}
    own = {item for item in found if item is not base and item.__module__.startswith("fedlight.")}
    return sorted(own | ({base} & found if base is Aggregator else set()), key=lambda cls: cls.__name__)


def family(title: str, base: str, key: str) -> Iterator[str]:
    """Yield the section of a family: its classes with their arguments."""
    yield f"## {title}\n\n{key}."
    package, _, name = base.rpartition(".")
    root = getattr(fedlight, name) if not package else getattr(importlib.import_module(package), name)
    for cls in choices(root):
        if (base == "torch.nn.Module" and not cls.__module__.startswith("fedlight.modules.")) or issubclass(cls, LIGHTNING):
            continue
        yield f"### {cls.__name__}\n\n{sentence(cls)}"
        if listed := rows(cls):
            yield table(listed)


LIGHTNING = (FederatedModule, fedlight.CodecPretrainingModule, fedlight.FederatedDataModule)


def page() -> str:
    """Return the page."""
    parts = [
        INTRODUCTION,
        "## A run",
        table(listed(own_options("fit"))),
        "## trainer",
        "Lightning's flags; those that a federated run uses most:",
        table(listed(TRAINER, "trainer.")),
    ]
    parts += ["## data", sentence(FederatedData), table(rows(FederatedData, "data."))]
    parts += ["## model", sentence(FederatedModule), table(rows(FederatedModule, "model."))]
    parts += ["## pretraining", sentence(CodecPretraining)]
    parts += [table(rows(ProxyFederation, "pretraining.proxy.")), table(rows(CodecTraining, "pretraining.training."))]
    parts += ["## checkpoint", sentence(RoundCheckpoint), table(rows(RoundCheckpoint, "checkpoint."))]
    for names in FAMILIES.values():
        parts += family(*names)
    parts += ["## Callbacks", f"### CodecRefresh\n\n{sentence(CodecRefresh)}", table(rows(CodecRefresh))]
    parts += [f"### FederatedCallback\n\n{sentence(FederatedCallback)} The base of callbacks of your own."]
    parts += [f"## FlowerClients\n\n`model.clients` of a deployment. {sentence(FlowerClients)}", table(rows(FlowerClients))]
    parts += ["## node.yaml", "A client of a deployment: `fedlight node node.yaml`."]
    parts += [table(rows(NodeConfig, "node.")), table(rows(Link, "flower."))]
    parts += [f"### OwnData\n\nFor `node.data`. {sentence(OwnData)}", table(rows(OwnData))]
    parts += ["## compare", sentence(Comparison), table(rows(Comparison))]
    parts += ["## audit", sentence(Audit), table(rows(Audit)), table(rows(Membership, "membership.")), table(rows(Canaries, "canaries."))]
    parts += ["### Observation", sentence(Observation), table(rows(Observation))]
    for title, base, module in (("Attacks", Attack, "fedlight.audit.attacks"), ("Priors", Prior, "fedlight.audit.priors")):
        home = importlib.import_module(module)
        found = {item for item in vars(home).values() if inspect.isclass(item) and issubclass(item, base) and not inspect.isabstract(item)}
        parts.append(f"### {title}\n\nClass paths in `{module}`.")
        for cls in sorted(found - {base}, key=lambda cls: cls.__name__):
            parts += [f"**{cls.__name__}**: {sentence(cls)}", *([table(rows(cls))] if rows(cls) else [])]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
