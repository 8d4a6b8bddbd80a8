"""LightningCLI for a federated run: its groups of options, its callbacks and loggers, and its actions after `fit`.

Not in `cli.py`, which also runs as a script: its classes would then have two names, one in `__main__` and one in `fedlight.cli`.
"""

from __future__ import annotations

import shutil
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console

from fedlight.callbacks import CodecPretraining, RoundCheckpoint, RoundProgressBar, RunBoard, RunSummary
from fedlight.callbacks.summary import METRICS_FILE, SUMMARY_FILE, run_label, summarize
from fedlight.clients.auto import Auto, engine_name
from fedlight.compare.plan import drop_codec
from fedlight.console.values import check_ckpt_path, check_threads
from fedlight.core.errors import ConfigurationError, own_error
from fedlight.data import LightningData
from fedlight.modules.engines import Threads
from fedlight.modules.stopping import signals_of
from fedlight.modules.trainer import show_runs
from fedlight.privacy.ledger import JOURNAL
from fedlight.rounds.reduce import lost_process
from fedlight.subcommands import SUBCOMMANDS


class RunConfig(SaveConfigCallback):
    """Writes config.yaml to the run's folder; a run without a logger has no folder and writes none."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the configuration once, and never overwrite another run's."""
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


class FederatedCLI(LightningCLI):
    """LightningCLI with groups of options for the parts of a federated run, and a summary at the end of `fit`."""

    def __init__(self, model: Any, data: Any, args: list[str] | None = None, **settings: Any) -> None:
        first = (sys.argv[1:] if args is None else args)[:1]
        # None if options come first: a file among them may have a section for every subcommand.
        self._subcommand_given = first[0] if first and first[0] in SUBCOMMANDS else None
        self._folder: Path | None = None  # of the run, where the loggers are ours
        self._numbered = False  # whether they are
        self._label = ""  # which of two runs this is
        before = torch.get_num_threads()
        try:
            super().__init__(model, data, args=args, **settings)
        finally:
            torch.set_num_threads(before)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the subcommands, each with the parameters that are not options."""
        return {**LightningCLI.subcommands(), "pretrain": {"model", "datamodule"}}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Build only the options of the subcommand to run: those of all five take four times as long."""
        if self._subcommand_given in (None, subcommand):
            return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        self._subcommand_method_arguments[subcommand] = []
        return self.init_parser(**kwargs)

    def _run_subcommand(self, subcommand: str) -> None:
        """Run it; end with the status of the signal that stopped it, or with a sentence if another process was lost."""
        try:
            self._run_or_clear(subcommand)
        except SystemExit as ended:
            number = self._stopped_by(ended)
            if number is None:
                raise
            self._end_workers(60)
            if self.trainer.is_global_zero:
                print(f"fedlight: stopped by {number.name}", file=sys.stderr)
            raise SystemExit(128 + number) from ended
        except RuntimeError as error:
            lost = lost_process(error)
            if lost is None:
                raise
            self._end_workers(0)  # whoever stands still would stay
            if number := self._signal():  # the others were quicker to end than this process
                raise SystemExit(128 + number) from error
            raise lost from error

    def _run_or_clear(self, subcommand: str) -> None:
        """Run it; a run that fails before its first round leaves no empty folder behind."""
        self._claim_folder()
        try:
            super()._run_subcommand(subcommand)
        except BaseException:
            trainer = getattr(self, "trainer", None)
            if trainer is not None and trainer.is_global_zero and not trainer.global_step:
                forget_empty(self._folder)
            raise

    def _claim_folder(self) -> None:
        """Make the run's folder, which is then nobody else's, and put the curves there that a resumed run goes on with."""
        loggers: list[Any] = [logger for logger in self.trainer.loggers if isinstance(logger, (RunBoard, CSVLogger))]
        if not (self._numbered and loggers) or getattr(rank_zero_only, "rank", None):  # the Trainer knows its rank later
            return
        self._folder = claim_folder(loggers)
        if (resumed := self._get(self.config, "ckpt_path")) and self.subcommand == "fit":
            go_on_from(Path(resumed).absolute().parents[1], self._folder, loggers[0])

    def _stopped_by(self, ended: SystemExit) -> signal.Signals | None:
        """Return the signal that an exit is due to: Lightning exits with 0 after SIGTERM, and with 1 after Ctrl-C."""
        if isinstance(ended, SIGTERMException):
            return self._signal() or signal.SIGTERM
        return signal.SIGINT if isinstance(ended.__context__, KeyboardInterrupt) else None

    def _signal(self) -> signal.Signals | None:
        """Return the signal that all processes know of, or else the one that this process got, if any."""
        signals = signals_of(self.trainer)
        return (signals.stop.agreed or signals.stop.asked) if signals else None

    def _end_workers(self, patience: float) -> None:
        if signals := signals_of(self.trainer):
            signals.release_workers()
            signals.end_workers(patience)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of a run."""
        parser.add_argument("--experiment", type=str, default="federated")
        parser.add_argument("--baseline", type=bool, default=False)
        parser.add_argument("--threads", type=int | None, default=None)
        parser.add_lightning_class_args(CodecPretraining, "pretraining")
        parser.add_lightning_class_args(RoundCheckpoint, "checkpoint")
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Refuse a missing or truncated checkpoint before loading anything."""
        super().parse_arguments(parser, args)
        config = self.config[self.config.subcommand]
        if "weights_only" in config and config.weights_only is None:
            config.weights_only = True  # whatever Lightning takes for granted: a checkpoint can run no code
        check_ckpt_path(config.get("ckpt_path"))

    def _parse_ckpt_path(self) -> None:
        """Take no options from a checkpoint: what hyperparameters it holds are those of the user's own module."""

    def before_instantiate_classes(self) -> None:
        """Set the number of threads."""
        threads = self._get(self.config, "threads")
        check_threads(threads)
        if threads is not None:
            torch.set_num_threads(threads)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the usual callbacks and loggers to those in the configuration."""
        config, model, data = (self._get(self.config_init, part) for part in ("trainer", "model", "data"))
        if self._get(self.config, "baseline"):
            self._label = "this run"
        given = list(config.callbacks or [])
        wanted: list[Callback] = [RunSummary(), LearningRateMonitor("step")] if config.logger is not False else []
        if self._get(self.config, "threads") is None:
            wanted.append(Threads())
        if config.enable_progress_bar is not False:
            wanted.append(RoundProgressBar(label=self._label))
        classifies = not isinstance(model.network, LightningModule) and not isinstance(data.source, LightningData)
        if config.enable_checkpointing is not False and classifies:
            wanted.append(ModelCheckpoint(monitor="val/accuracy", mode="max", filename="best", auto_insert_metric_name=False))
        own_kinds = {type(callback) for callback in given}
        self._numbered = config.logger in (None, True)
        if self._numbered:
            kwargs["logger"] = run_loggers(self._get(self.config_init, "experiment"), config.default_root_dir, run_label(model))
        kwargs["callbacks"] = [*given, *(callback for callback in wanted if type(callback) not in own_kinds)]
        return super().instantiate_trainer(**kwargs)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Leave the checkpoint callback out if checkpoints are off."""
        if config.get("enable_checkpointing") is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, RoundCheckpoint)]
        try:
            return super()._instantiate_trainer(config, callbacks)
        except (ValueError, MisconfigurationException, ModuleNotFoundError) as error:  # Lightning's words for options of its Trainer
            raise own_error(error) or ConfigurationError(f"trainer: {' '.join(str(error).split())}") from error

    def after_predict(self) -> None:
        """Write the predicted labels of the test set, in order."""
        batches = self.trainer.predict_loop.predictions if self.trainer.is_global_zero else []
        if batches:
            folder = Path(self.trainer.log_dir or ".")
            folder.mkdir(parents=True, exist_ok=True)
            labels = [str(label) for batch in batches for label in batch.tolist()]
            (folder / "predictions.csv").write_text("label\n" + "\n".join(labels) + "\n")
            print(f"{len(labels)} predictions: {folder / 'predictions.csv'}")

    def after_fit(self) -> None:
        """Test the final model, run the baseline if it is set, and print where everything is."""
        if self.trainer.interrupted or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        runs = [("this run", self._finish())]
        if self._get(self.config, "baseline"):
            self._become_baseline()
            self.trainer.fit(self.model, datamodule=self.datamodule)
            runs.append(("without a codec", self._finish()))
        if self.trainer.is_global_zero:
            show_runs(runs, Console())

    def _finish(self) -> tuple[dict[str, Any], str | None]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*recommended to use.*devices=1.*")
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        summaries = [callback.summary for callback in callbacks if isinstance(callback, RunSummary)]
        writes = summaries or self.trainer.checkpoint_callbacks
        return (summaries[0] if summaries else summarize(self.trainer, self.model)), self.trainer.log_dir if writes else None

    def _become_baseline(self) -> None:
        """Rebuild model, data and Trainer from the same configuration without the codec."""
        assert self.subcommand is not None
        self._label = "without a codec"
        config = self.config.clone()
        drop_codec(config[self.subcommand])
        config[self.subcommand].ckpt_path = None
        config[self.subcommand].baseline = False
        config[self.subcommand].threads = torch.get_num_threads()
        if isinstance(self.model.engine, Auto):  # both runs by the same
            named = f"fedlight.{engine_name(self.model.engine)}"
            config[self.subcommand].model.engine = Namespace(class_path=named, init_args=Namespace())  # type: ignore[no-untyped-call]
        self.config = config  # written to the baseline's folder
        seed_everything(int(config[self.subcommand].seed_everything), workers=True, verbose=False)
        self.config_init = self.parser.instantiate_classes(config)
        self.model = self._get(self.config_init, "model")
        self.datamodule = self._get(self.config_init, "data")
        self.trainer = self.instantiate_trainer()
        self._claim_folder()


class DryRun(FederatedCLI):
    """Parses the configuration, builds everything in it, and runs nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def run_loggers(experiment: str, root: str | None, label: str) -> list[Any]:
    """Return a TensorBoard logger and a CSV logger (metrics.csv) of a new folder: logs/<experiment>/<label>/<number>."""
    name = f"{experiment}/{label}" if experiment else ""
    version = next_number(Path(root or "logs", name))
    return [RunBoard(root or "logs", name=name, version=version), CSVLogger(root or "logs", name=name, version=version)]


def next_number(place: Path) -> str:
    """Return the number after the largest that names a folder in ``place``."""
    taken = [int(path.name) for path in place.glob("*") if path.name.isdigit()] if place.is_dir() else []
    return str(max(taken, default=-1) + 1)


def claim_folder(loggers: Sequence[Any]) -> Path:
    """Make the folder of these loggers and return it; if another run was quicker, they get the next number."""
    while True:
        folder = Path(loggers[0].log_dir)
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir()
            return folder
        except FileNotFoundError:  # another run failed and has just removed the empty folder of its kind
            continue
        except FileExistsError:
            number = next_number(folder.parent)
            for logger in loggers:
                logger._version = number


def go_on_from(earlier: Path, folder: Path, board: RunBoard) -> None:
    """Give a resumed run the curves of the run that it goes on from, and its rows of metrics as `earlier_<n>.csv`."""
    board.resume(earlier)
    rows = [*sorted(earlier.glob("earlier_*.csv")), earlier / METRICS_FILE]
    for number, path in enumerate(path for path in rows if path.is_file()):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / f"earlier_{number}.csv")


def forget_empty(folder: Path | None) -> None:
    """Remove a run's folder that holds nothing to go on with, and the folder of its kind if that leaves it empty."""
    if (
        folder is None
        or not folder.is_dir()
        or any((folder / name).exists() for name in ("checkpoints", "encoder.safetensors", SUMMARY_FILE))
        or ((folder / JOURNAL).is_file() and (folder / JOURNAL).stat().st_size)
    ):
        return
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # it holds other runs
        folder.parent.rmdir()
