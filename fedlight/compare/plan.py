"""The plan of a comparison: settings, grid of runs, and the configuration of each run."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from statistics import fmean
from typing import Any

from fedlight.console.arguments import Tree, merge, read_yaml
from fedlight.console.configs import find
from fedlight.core.errors import ConfigurationError, require


@dataclass(frozen=True)
class Comparison:
    """Codecs, seeds and server learning rates to compare on one configuration of `fedlight fit`.

    Args:
        base: Configuration of `fedlight fit` that every run starts from, in this file's folder or else in the current folder,
            or the name of a shipped one.
        codecs: Changes to it for each codec, by name: any part of a `fit` configuration, or null for no codec.
        reference: Name of the one uncompressed entry of `codecs`, the reference of all gaps.
        seeds: Seeds of the results; a seed fixes initial weights, partition, cohorts and batches for every codec.
        server_lrs: Learning rates of the server's SGD to choose from, the same for every codec and for the reference; factors on the
            `lr` of a server optimizer that an entry names itself (adaptive ones need a very different rate).
        tune_seeds: Seeds whose validation accuracy chooses the rate of each codec (the first of `seeds` if not given).
        overrides: Changes to the `fit` configuration of every run.
        output: Folder for runs and results (`logs/compare/` and this file's name if not given).
        jobs: Number of parallel worker processes, with one CPU thread each.
        target: Validation accuracy in 0..1; adds columns with the bytes and rounds to reach it.

    Raises:
        ConfigurationError: if an argument is empty, out of range or contradicts another.
    """

    base: str
    codecs: dict[str, dict[str, Any] | None]
    reference: str = "none"
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    server_lrs: list[float] = field(default_factory=lambda: [1.0])
    tune_seeds: list[int] | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    output: str | None = None
    jobs: int = 1
    target: float | None = None

    def __post_init__(self) -> None:
        for name in ("seeds", "server_lrs", "tune_seeds"):
            values = getattr(self, name)
            if values is not None and (not values or len(set(values)) < len(values)):
                raise ConfigurationError(f"Expected `{name}` to be a list of one or more different numbers but got {values}")
            require(name == "server_lrs" or min(values or [0]) >= 0, f"Expected `{name}` >= 0 but got {values}")
        require(min(self.server_lrs) > 0, f"Expected `server_lrs` > 0 but got {self.server_lrs}")
        require(self.jobs >= 1, f"Expected `jobs` >= 1 but got {self.jobs}")
        if self.target is not None and not 0 < self.target <= 1:
            raise ConfigurationError(f"Expected `target` to be an accuracy in 0..1 but got {self.target}: 95 % is 0.95")
        for name in self.codecs:
            if name in ("", ".", "..") or "\\" in name or PurePath(name).name != name:
                raise ConfigurationError(f"Expected names in `codecs` that work as folder names but got {name!r}: leave slashes out")
        plain = [name for name, changes in self.codecs.items() if changes is None]
        require(len(plain) < 2, f"Expected one uncompressed (null) entry in `codecs` but got {', '.join(plain)}: keep one")
        if self.reference not in self.codecs:
            raise ConfigurationError(
                f"Expected `reference` to be one of {', '.join(self.codecs) or 'the codecs'} but got {self.reference!r}: "
                f"add `{self.reference}: null` to `codecs`, or name another"
            )

    @property
    def tuning_seeds(self) -> list[int]:
        """Seeds for every trial of a rate."""
        return self.tune_seeds or self.seeds[:1]


@dataclass(frozen=True, order=True)
class Run:
    """One run of `fit`: codec, seed, and server learning rate."""

    codec: str
    seed: int
    lr: float

    def __str__(self) -> str:
        return f"{self.codec}, seed {self.seed}, rate {self.lr:g}"

    def folder(self, output: Path) -> Path:
        """Return the run's own folder."""
        return output / "runs" / self.codec / f"seed_{self.seed}_lr_{self.lr}"


def first_runs(comparison: Comparison, codec: str) -> list[Run]:
    """Return the runs that choose a codec's rate; all its runs if there is only one rate."""
    if len(comparison.server_lrs) == 1:
        return [Run(codec, seed, comparison.server_lrs[0]) for seed in comparison.seeds]
    return [Run(codec, seed, lr) for lr in comparison.server_lrs for seed in comparison.tuning_seeds]


def further_runs(comparison: Comparison, codec: str, lr: float) -> list[Run]:
    """Return the remaining runs of a codec at its chosen rate."""
    done = set(first_runs(comparison, codec))
    return [run for run in (Run(codec, seed, lr) for seed in comparison.seeds) if run not in done]


def number_of_runs(comparison: Comparison) -> int:
    """Return the number of runs in a comparison, which does not depend on the chosen rates."""
    lr = comparison.server_lrs[0]
    return sum(len(first_runs(comparison, codec)) + len(further_runs(comparison, codec, lr)) for codec in comparison.codecs)


def choose_rate(accuracies: Mapping[float, Sequence[float]], seeds: int) -> float | None:
    """Return the rate with the best mean validation accuracy, the first of equals; None if no rate has a value for all ``seeds``.

    >>> choose_rate({1.0: [0.9, 0.9], 1.5: [0.8, 1.0], 2.0: [1.0]}, seeds=2)
    1.0
    """
    complete = {lr: fmean(values) for lr, values in accuracies.items() if len(values) == seeds}
    return max(complete, key=lambda lr: complete[lr]) if complete else None


def effective(base: Tree, overrides: Tree, changes: Tree | None, run: Run, folder: Path) -> Tree:
    """Return the whole configuration of a run in ``folder``, on one device and in one process.

    (Lightning starts more processes by repeating the command line, which would repeat the whole comparison.)
    """
    config: Tree = copy.deepcopy(merge(merge(base, overrides), changes or {}))
    if changes is None or not (config["model"].get("codec") or config["model"].get("codec_path")):
        drop_codec(config)
    optimizer = config["model"].get("server_optimizer") or "torch.optim.SGD"
    if isinstance(optimizer, str):
        optimizer = {"class_path": optimizer}
    rate = merge(optimizer, {"init_args": {"lr": run.lr * own_rate(changes or {})}})
    rate["init_args"].pop("params", None)  # the parser adds it to a class path in text
    trainer = {"default_root_dir": str(folder), "logger": True, "enable_progress_bar": False}
    trainer |= {"devices": 1, "num_nodes": 1, "strategy": "auto"}
    fixed = {"seed_everything": run.seed, "threads": 1, "experiment": "", "baseline": False, "ckpt_path": None}
    # The same bits in every run of a codec, on any machine: the workers have the cores already.
    config["model"] = {**config["model"], "server_optimizer": rate, "engine": config["model"].get("engine") or "Sequential"}
    return merge(config, {**fixed, "trainer": trainer})  # type: ignore[no-any-return]


def own_rate(changes: Tree) -> float:
    """Return the server learning rate in an entry, 1 if it has none.

    >>> own_rate({"model": {"server_optimizer": {"class_path": "FedAdam", "init_args": {"lr": 0.01}}}}), own_rate({"model": {}})
    (0.01, 1.0)
    """
    optimizer = (changes.get("model") or {}).get("server_optimizer")
    arguments = optimizer.get("init_args") if isinstance(optimizer, Mapping) else None
    return float((arguments or {}).get("lr", 1.0))


def drop_codec(config: Any) -> None:
    """Remove the codec, and everything that needs one, from a configuration (mappings or namespaces), in place."""
    for name in ("codec", "codec_path", "aggregator"):  # the aggregators sum integer codes
        config["model"][name] = None
    if callbacks := (config.get("trainer") or {}).get("callbacks"):
        listed = callbacks if isinstance(callbacks, list) else [callbacks]
        config["trainer"]["callbacks"] = [one for one in listed if not str(one["class_path"]).endswith("CodecRefresh")] or None


def digest(parsed: Tree, run: Run) -> str:
    """Return a digest of the ``parsed`` configuration of the codec's runs and of the run's seed and rate.

    It does not depend on the run's folder.
    """
    trainer = {key: value for key, value in parsed["trainer"].items() if key != "default_root_dir"}
    text = json.dumps([{**parsed, "trainer": trainer}, run.seed, run.lr], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def read_base(base: str, folder: Path | None) -> Tree:
    """Return the settings in the YAML file ``base``, found in ``folder``, or else in the current one or by name.

    Raises:
        ConfigurationError: if the file does not exist or holds no mapping.
    """
    near = None if folder is None else folder / Path(base).expanduser()
    return read_yaml(near if near is not None and near.is_file() else find(base, "base"))
