"""The command line: `fedlight fit|validate|test|predict|pretrain|compare|audit`."""

from __future__ import annotations

import json
import logging
import signal
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console

from fedlight.audit.command import audit, audit_parser
from fedlight.audit.plan import Parts
from fedlight.callbacks import CodecPretraining, RoundCheckpoint, RoundProgressBar, RunSummary
from fedlight.clients import FedSGD
from fedlight.codecs import StackedCodec
from fedlight.compare import compare, compare_parser
from fedlight.compare.plan import merge, read_base, without_codec_callbacks
from fedlight.core.errors import CodecMismatchError, ConfigurationError, DataError, RoundFailedError
from fedlight.data import FederatedDataModule, LightningData
from fedlight.modules import FederatedModule
from fedlight.modules.pretraining import fit_codec
from fedlight.modules.report import show_runs
from fedlight.modules.trainer import FederatedTrainer

DESCRIPTION = (
    "Federated learning with learned codes: clients send short codes of their updates, the server decodes only their sum. "
    "Start with `fedlight fit --config configs/digits.yaml`; the number of rounds is --trainer.max_steps."
)

_TYPICAL_WARNINGS = (
    ".*does not have many workers.*",
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*The dirpath has changed from.*",  # a resumed run has a folder of its own
    ".*Experiment logs directory .* exists and is not empty.*",  # config.yaml lies there already
)


def _is_news(record: logging.LogRecord) -> bool:
    """Leave out what Lightning says on every run and nobody can act on."""
    text = record.getMessage()
    return not any(part in text for part in ("litlogger", "`weights_only` was not set", "TPU available"))


class RunConfig(SaveConfigCallback):
    """Writes config.yaml to the run's folder; a run without a logger has no folder, and writes none."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the configuration once, never over another run's."""
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


class FederatedCLI(LightningCLI):
    """LightningCLI with the parts of a federated run as groups of options, and a summary at the end of `fit`."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the subcommands with the parameters that are not options."""
        return {**LightningCLI.subcommands(), "pretrain": {"model", "datamodule"}}

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """Name `compare` and `audit` in the help as well: they are no methods of a Trainer and have parsers of their own (see `main`)."""
        super()._add_subcommands(parser, **kwargs)
        assert parser._subcommands_action is not None
        for name, own in (("compare", compare_parser()), ("audit", audit_parser())):
            parser._subcommands_action.add_subcommand(name, own, help=own.description)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run's own options."""
        parser.add_argument("--experiment", type=str, default="federated", help="Name of the folder under logs/ that the run is kept in.")
        parser.add_argument(
            "--baseline", type=bool, default=False, help="Whether `fit` also trains the same run without a codec, to compare with."
        )
        parser.add_argument(
            "--threads",
            type=int | None,
            default=None,
            help="CPU threads of each process (torch's own choice if not given); small models are fastest with 1.",
        )
        parser.add_lightning_class_args(CodecPretraining, "pretraining")
        parser.add_lightning_class_args(RoundCheckpoint, "checkpoint")
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Refuse a checkpoint that is missing or cut short before anything is loaded."""
        super().parse_arguments(parser, args)
        given = self.config[self.config.subcommand].get("ckpt_path")
        if not given or given in ("best", "last", "hpc", "registry") or ":" in str(given):  # Lightning's own words, URLs
            return
        if not Path(given).is_file():
            raise ConfigurationError(f"Expected `ckpt_path` to be a checkpoint but there is no file {given}: correct the path")
        if not zipfile.is_zipfile(given):
            raise ConfigurationError(
                f"Expected `ckpt_path` to be a checkpoint but {given} is damaged or none: choose another from the run's checkpoints/"
            )

    def before_instantiate_classes(self) -> None:
        """Set the number of threads."""
        threads = self._get(self.config, "threads")
        if threads is not None and threads < 1:
            raise ConfigurationError(f"Expected `threads` >= 1 but got {threads}: leave it out for torch's own choice")
        if threads is not None:
            torch.set_num_threads(threads)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the usual callbacks and loggers to what the configuration lists."""
        config = self._get(self.config_init, "trainer")
        given = list(config.callbacks or [])
        wanted = [RunSummary(), LearningRateMonitor("step")] if config.logger is not False else []
        if config.enable_progress_bar is not False:
            wanted.append(RoundProgressBar())
        classifies = not isinstance(self._get(self.config_init, "model").network, LightningModule)
        if (
            config.enable_checkpointing is not False
            and classifies
            and not isinstance(self._get(self.config_init, "data").source, LightningData)
        ):
            best = ModelCheckpoint(monitor="val/accuracy", mode="max", filename="best", auto_insert_metric_name=False)
            wanted.append(best)
        own_kinds = {type(callback) for callback in given}
        if config.logger in (None, True):
            kwargs["logger"] = run_loggers(self._get(self.config_init, "experiment"), config.default_root_dir)
        kwargs["callbacks"] = [*given, *(callback for callback in wanted if type(callback) not in own_kinds)]
        return super().instantiate_trainer(**kwargs)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Leave the checkpoint out where checkpoints are switched off."""
        if config.get("enable_checkpointing") is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, RoundCheckpoint)]
        return super()._instantiate_trainer(config, callbacks)

    def after_predict(self) -> None:
        """Write the predicted labels of the test set, in its order."""
        batches = self.trainer.predict_loop.predictions if self.trainer.is_global_zero else []
        if batches:
            folder = Path(self.trainer.log_dir or ".")
            folder.mkdir(parents=True, exist_ok=True)
            labels = [str(label) for batch in batches for label in batch.tolist()]
            (folder / "predictions.csv").write_text("label\n" + "\n".join(labels) + "\n")
            print(f"{len(labels)} predictions: {folder / 'predictions.csv'}")

    def after_fit(self) -> None:
        """Test the final model, run the baseline if asked for, and say where everything is."""
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
        return (summaries[0] if summaries else {}), self.trainer.log_dir

    def _become_baseline(self) -> None:
        """Make model, data and Trainer anew from the same configuration without the codec."""
        assert self.subcommand is not None
        config = self.config.clone()
        config[self.subcommand].model.codec = None
        config[self.subcommand].model.codec_path = None
        config[self.subcommand].model.aggregator = None  # it sums integer codes
        config[self.subcommand].ckpt_path = None
        config[self.subcommand].baseline = False
        config[self.subcommand].trainer.callbacks = without_codec_callbacks(config[self.subcommand].trainer.callbacks)
        self.config = config  # it is what the baseline's folder says of it
        seed_everything(int(config[self.subcommand].seed_everything), workers=True, verbose=False)
        self.config_init = self.parser.instantiate_classes(config)
        self.model = self._get(self.config_init, "model")
        self.datamodule = self._get(self.config_init, "data")
        self.trainer = self.instantiate_trainer()


def run_loggers(experiment: str, root: str | None) -> list[Any]:
    """Return a TensorBoard logger under logs/<experiment>, and metrics.csv in the same folder."""
    board = TensorBoardLogger(root or "logs", name=experiment, default_hp_metric=False)
    return [board, CSVLogger(root or "logs", name=experiment, version=board.version)]


def _told(error: BaseException | None) -> BaseException | None:
    """Return the error of our own that lies behind one, or None: jsonargparse raises others in place of those of nested classes."""
    while error is not None:
        if isinstance(error, (ConfigurationError, DataError, CodecMismatchError, RoundFailedError)):
            return error
        error = error.__cause__ or error.__context__
    return None


class Rehearsal(FederatedCLI):
    """Parses the configuration and builds everything in it, and runs nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def open_cli(kind: type[FederatedCLI], args: list[str] | None, exit_on_error: bool = True) -> FederatedCLI:
    """Run the command line in ``args`` (the process's own if not given) and return what it made."""
    for message in _TYPICAL_WARNINGS:
        warnings.filterwarnings("ignore", message)
    for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"lightning.pytorch.{name}").addFilter(_is_news)
    return kind(
        FederatedModule,
        FederatedDataModule,
        trainer_class=FederatedTrainer,
        trainer_defaults={
            "log_every_n_steps": 1,
            "check_val_every_n_epoch": None,
            "val_check_interval": 10,
            "max_epochs": -1,
            "enable_model_summary": False,
        },
        seed_everything_default=0,
        auto_configure_optimizers=False,
        save_config_callback=RunConfig,
        parser_kwargs={"description": DESCRIPTION, **({} if exit_on_error else {"exit_on_error": False, "fit": {"exit_on_error": False}})},
        args=args,
    )


def fit(args: list[str]) -> str | None:
    """Do one run of `fedlight fit` and return its folder, for callers that do several."""
    try:
        return open_cli(FederatedCLI, args, exit_on_error=False).trainer.log_dir
    except Exception as error:
        raise _told(error) or error from error


def rehearse(args: list[str]) -> dict[str, Any]:
    """Parse the arguments of `fedlight fit`, build what they name, and return the whole configuration."""
    cli = _rehearsed(args)
    cli._dump_config()
    return cli.config_dump  # type: ignore[no-any-return]


def audit_parts(base: str, beside: Path | None, overrides: dict[str, Any], lr: float | None = None) -> Parts:
    """Return model, data and codec of a configuration of `fedlight fit`, looked for beside a folder, to audit at rate ``lr``."""
    cli = _rehearsed(["fit", "--config", json.dumps(merge(read_base(base, beside), overrides))])
    module, data = cli.model, cli.datamodule
    training = cli._get(cli.config_init, "pretraining").training
    rate = audited_lr(module, lr)
    codec = module.codec.codec if isinstance(module.codec, StackedCodec) else module.codec  # updates are attacked, not what goes with them
    data.prepare_data()
    data.setup()

    def fit(codec: Any, bank: Any) -> object:
        with warnings.catch_warnings():
            for message in _TYPICAL_WARNINGS:
                warnings.filterwarnings("ignore", message)
            return fit_codec(codec, bank, training, torch.device("cpu"), None, False, module.seed)

    return Parts(module.network, module.loss, codec, rate, data, module.seed, fit)


def audited_lr(module: FederatedModule, given: float | None) -> float:
    """Return the clients' learning rate, `given` or their algorithm's own; FedSGD's update is the gradient, at rate 1.

    Raises:
        ConfigurationError: if there is none, or the network is a LightningModule, whose own steps attacks cannot take.
    """
    if isinstance(module.network, LightningModule):
        raise ConfigurationError(
            f"Expected a `network` of logits to audit but got the LightningModule {type(module.network).__name__}: name the network inside "
            "it and a `loss`"
        )
    own = 1.0 if isinstance(module.algorithm, FedSGD) else getattr(module.algorithm, "lr", None)
    rate = own if given is None else given
    if rate is None:
        raise ConfigurationError(
            f"Expected `lr` to audit updates of {type(module.algorithm).__name__}, which has none, but got None: set it"
        )
    return float(rate)


def _rehearsed(args: list[str]) -> FederatedCLI:
    loggers = [logging.getLogger(name) for name in ("lightning.fabric", "lightning.pytorch")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return open_cli(Rehearsal, args, exit_on_error=False)
    except Exception as error:
        raise _told(error) or error from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def main(args: list[str] | None = None) -> None:
    """Run the command line; mistakes in the configuration end with one sentence and exit status 2, SIGTERM with 143."""
    given = sys.argv[1:] if args is None else args
    try:
        if given[:1] == ["compare"]:
            if status := compare(given[1:], rehearse, fit):
                raise SystemExit(status)
            return
        if given[:1] == ["audit"]:
            audit(given[1:], audit_parts)
            return
        open_cli(FederatedCLI, args)
    except Exception as error:
        told = _told(error)
        if told is None:
            raise
        logging.getLogger(__name__).debug("details", exc_info=True)
        print(f"fedlight: error: {told}", file=sys.stderr)
        raise SystemExit(2) from error
    except SIGTERMException as stopped:  # Lightning's own ends with status 0, as if the run were done
        print("fedlight: stopped by SIGTERM: go on with --ckpt_path and this run's checkpoints/last.ckpt", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM) from stopped


if __name__ == "__main__":
    from fedlight.cli import main as imported  # worker processes name functions by module: not by `__main__`

    imported()
