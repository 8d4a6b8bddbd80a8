"""The options of the subcommands, with what they say of themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedlight.console import catalogue
from fedlight.console.catalogue import Arguments


@dataclass(frozen=True)
class Option:
    """An option that no class of fedlight's has for an argument."""

    annotation: str  # its type; `@Name` for a group with the arguments of that class
    meaning: str = ""  # a sentence for the help; "" for none there
    default: str = ""  # what the help says of it; "" for nothing


_THREADS = "CPU threads of each process (if not given, `fit` takes 1, or as many as there are cores where clients gain a fifth)."

RUN = {
    "config": Option("", "Name that `fedlight configs` lists, or a YAML file. Of several the later one wins."),
    "experiment": Option("str", "Name of the run's folder under `logs/`.", "default: federated"),
    "seed_everything": Option("int", "Seed of weights, splits, cohorts, batches and rounding.", "default: 0"),
    "baseline": Option("bool", "Whether `fit` also trains the same run without a codec, for comparison.", "default: false"),
    "threads": Option("int | None", _THREADS, "default: null"),
    "model": Option("@FederatedModule"),
    "data": Option("@FederatedDataModule", "A data set split over clients, in memory"),
    "pretraining": Option("@CodecPretraining"),
    "checkpoint": Option("@RoundCheckpoint"),
    "trainer": Option("@Trainer", "Lightning's Trainer; a round is one of its steps."),
    "optimizer": Option(""),
    "lr_scheduler": Option(""),
}
"""Options that every subcommand with a run has."""

_CHECKPOINT = Option("str | None", "Checkpoint to go on from (`fit`), or to evaluate (`validate`, `test`, `predict`).", "default: null")
_EVALUATION = {
    "ckpt_path": _CHECKPOINT,
    "weights_only": Option(""),
    "verbose": Option("bool", "Whether to print the metrics.", "default: true"),
}
_MORE = {
    "fit": {"ckpt_path": _CHECKPOINT, "weights_only": Option("")},
    "validate": _EVALUATION,
    "test": _EVALUATION,
    "predict": {"ckpt_path": _CHECKPOINT, "weights_only": Option(""), "return_predictions": Option("")},
    "pretrain": {
        "output": Option("", "Folder for `encoder.safetensors` and `decoder.safetensors`; the run's folder if not given.", "default: null"),
        "cohort_rounds": Option("int", "New rounds of 100 clients for the table of errors by cohort size; 0 for none.", "default: 10"),
    },
}
RUNS = tuple(_MORE)
"""The subcommands that have the options of a run."""

SETTINGS = {"compare": "Comparison", "audit": "Audit"}
"""The other subcommands with a file of settings, each with the class that has them."""

LIGHTNINGS = {"callbacks": "Callback", "logger": "Logger"}
"""Arguments of the Trainer that name classes of Lightning's, and the base of fedlight's own."""

TRAINER = {
    "max_steps": Option("int", "Number of rounds.", "default: -1"),
    "val_check_interval": Option("int", "Rounds between validations.", "default: 10"),
    "accelerator": Option("str", "`cpu` or `gpu`.", "default: auto"),
    "devices": Option("int", "Processes that share the cohort; with `trainer.strategy: ddp` they add up codes.", "default: auto"),
    "callbacks": Option("list", "`CodecRefresh`, or any of Lightning's, such as `EarlyStopping` on `val/accuracy`.", "default: null"),
    "logger": Option("bool or a logger", "TensorBoard and `metrics.csv`; `false` for neither.", "default: true"),
    "profiler": Option("str", "`simple` lists how long each step of a round takes.", "default: null"),
}
"""Arguments of the Trainer, as a federated run means them."""

TRAINER_DEFAULTS: dict[str, Any] = {
    "log_every_n_steps": 1,
    "check_val_every_n_epoch": None,
    "val_check_interval": 10,
    "max_epochs": -1,
    "enable_model_summary": False,
}
"""Where a federated run differs from Lightning."""


def own_options(subcommand: str) -> dict[str, Option]:
    """Return the options that a subcommand with a run has beside the arguments of classes."""
    return {**RUN, **_MORE[subcommand]}


def options(subcommand: str) -> Arguments | None:
    """Return the options of a subcommand with their annotations; `@Name` is a group with the arguments of that class."""
    if subcommand in SETTINGS:
        return {"config": "", **(catalogue.arguments(SETTINGS[subcommand]) or {})}
    return {name: one.annotation for name, one in own_options(subcommand).items()} if subcommand in _MORE else None


def group(annotation: str) -> Arguments | None:
    """Return the options of a group, or None if they are not known."""
    if annotation == "@Trainer":
        return catalogue.trainer().own
    return catalogue.arguments(annotation[1:])


def annotation_of(subcommand: str, part: str) -> str | None:
    """Return the annotation of an option such as `model.codec`, or None if there is none of that name."""
    scope = options(subcommand)
    annotation = ""
    for name in part.split("."):
        if scope is None or name not in scope:
            return None
        annotation = scope[name]
        scope = group(annotation) if annotation.startswith("@") else None
    return annotation


def all_options(subcommand: str) -> list[str]:
    """Return the dotted names of a subcommand's options, one level of groups included."""
    names = []
    for name, annotation in (options(subcommand) or {}).items():
        names.append(name)
        if annotation.startswith("@"):
            names += [f"{name}.{one}" for one in group(annotation) or {}]
    return names
