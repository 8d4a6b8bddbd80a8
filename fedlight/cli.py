"""The command line: `fedlight fit|validate|test|predict|pretrain|compare|audit`."""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import SIGTERMException

from fedlight.clients import FedSGD
from fedlight.codecs import StackedCodec
from fedlight.compare.plan import read_base
from fedlight.console.arguments import merge
from fedlight.console.errors import one_sentence
from fedlight.console.options import TRAINER_DEFAULTS
from fedlight.console.values import prepare
from fedlight.core.errors import ConfigurationError, own_error
from fedlight.core.process import quiet
from fedlight.data import FederatedDataModule
from fedlight.federated_cli import DryRun, FederatedCLI, RunConfig
from fedlight.modules import FederatedModule
from fedlight.modules.pretraining import fit_codec
from fedlight.modules.stopping import stop_now
from fedlight.modules.trainer import FederatedTrainer

if TYPE_CHECKING:
    from fedlight.audit.plan import Parts

_TYPICAL_WARNINGS = (
    ".*does not have many workers.*",
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*The dirpath has changed from.*",  # a resumed run has its own folder
    ".*Experiment logs directory .* exists and is not empty.*",  # config.yaml is there already
)

_NO_NEWS = (
    "litlogger",
    "`weights_only` was not set",
    "TPU available",
    "GPU available: False",
    "Seed set to",
    "`max_steps=",
    "ModelSummary",
    "Detected KeyboardInterrupt",
)


def _is_news(record: logging.LogRecord) -> bool:
    """Drop messages that Lightning prints on every run and that nobody can act on."""
    text = record.getMessage()
    return not any(part in text for part in _NO_NEWS)


def open_cli(kind: type[FederatedCLI], args: list[str] | None) -> FederatedCLI:
    """Run the command line in ``args`` (the process's own if not given) and return it; the parser's errors are raised."""
    for message in _TYPICAL_WARNINGS:
        warnings.filterwarnings("ignore", message)
    for name in ("pytorch.utilities.rank_zero", "pytorch.trainer.connectors.checkpoint_connector", "fabric.utilities.seed"):
        logging.getLogger(f"lightning.{name}").addFilter(_is_news)
    raises: dict[str, Any] = {"exit_on_error": False}
    return kind(
        FederatedModule,
        FederatedDataModule,
        trainer_class=FederatedTrainer,
        trainer_defaults=TRAINER_DEFAULTS,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        save_config_callback=RunConfig,
        parser_kwargs={**raises, **dict.fromkeys(kind.subcommands(), raises)},
        args=args,
    )


def fit(args: list[str]) -> str | None:
    """Run `fedlight fit` once and return its folder, for callers with several runs."""
    try:
        return open_cli(FederatedCLI, args).trainer.log_dir
    except Exception as error:
        raise own_error(error) or error from error


def dry_run(args: list[str]) -> dict[str, Any]:
    """Parse the arguments of `fedlight fit`, build everything they name, run nothing, and return the whole configuration."""
    cli = _built(args)
    cli._dump_config()
    return cli.config_dump  # type: ignore[no-any-return]


def audit_parts(base: str, folder: Path | None, overrides: dict[str, Any], lr: float | None = None) -> Parts:
    """Return model, data and codec of a `fedlight fit` configuration (in ``folder`` or the current one), to audit at rate ``lr``."""
    from fedlight.audit.plan import Parts

    cli = _built(["fit", "--config", json.dumps(merge(read_base(base, folder), overrides))])
    module, data = cli.model, cli.datamodule
    training = cli._get(cli.config_init, "pretraining").training
    rate = audited_lr(module, lr)
    codec = module.codec.codec if isinstance(module.codec, StackedCodec) else module.codec  # attacks are on the updates alone
    data.prepare_data()
    data.setup()

    def fit(codec: Any, bank: Any) -> object:
        with warnings.catch_warnings():
            for message in _TYPICAL_WARNINGS:
                warnings.filterwarnings("ignore", message)
            return fit_codec(codec, bank, training, torch.device("cpu"), None, False, module.seed)

    return Parts(module.network, module.loss, codec, rate, data, module.seed, fit)


def audited_lr(module: FederatedModule, given: float | None) -> float:
    """Return the clients' learning rate, ``given`` or else their algorithm's; raises ``ConfigurationError`` where there is none."""
    if isinstance(module.network, LightningModule):
        raise ConfigurationError(
            f"Expected a `network` of logits to audit but got the LightningModule {type(module.network).__name__}: name the network inside "
            "it and a `loss`"
        )
    own = 1.0 if isinstance(module.algorithm, FedSGD) else getattr(module.algorithm, "lr", None)  # FedSGD's update is the gradient
    rate = own if given is None else given
    if rate is None:
        raise ConfigurationError(
            f"Expected `lr` to audit updates of {type(module.algorithm).__name__}, which has none, but got None: set it"
        )
    return float(rate)


def _built(args: list[str]) -> FederatedCLI:
    with quiet("lightning.fabric", "lightning.pytorch"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return open_cli(DryRun, args)
        except Exception as error:
            raise own_error(error) or error from error


def main(args: list[str] | None = None) -> None:
    """Run the command line; mistakes in the configuration end with one sentence and exit status 2, SIGTERM with 143, Ctrl-C with 130."""
    first = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop_now) if first else None
    try:
        with one_sentence():
            _run(None if args is None else prepare(args))
    except (SIGTERMException, KeyboardInterrupt) as stopped:  # before there was a run: what stops one says how to go on
        number = signal.SIGTERM if isinstance(stopped, SIGTERMException) else signal.SIGINT
        print(f"fedlight: stopped by {number.name}", file=sys.stderr)
        raise SystemExit(128 + number) from stopped
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _run(args: list[str] | None) -> None:
    given = sys.argv[1:] if args is None else args
    # Each subcommand imports what only it needs.
    if given[:1] == ["compare"]:
        from fedlight.compare.command import compare

        if status := compare(given[1:], dry_run, fit):
            raise SystemExit(status)
    elif given[:1] == ["audit"]:
        from fedlight.audit.command import audit

        audit(given[1:], audit_parts)
    else:
        open_cli(FederatedCLI, args)


if __name__ == "__main__":
    from fedlight.cli import main as imported  # worker processes find functions by module, which must not be `__main__`

    imported()
