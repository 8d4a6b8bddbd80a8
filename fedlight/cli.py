"""The command line: `fedlight fit|validate|test|predict|pretrain|compare|audit`."""

from __future__ import annotations

import json
import logging
import signal
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import SIGTERMException

from fedlight.clients import FedSGD
from fedlight.codecs import StackedCodec
from fedlight.compare.plan import merge, read_base
from fedlight.core.errors import ConfigurationError, own_error
from fedlight.core.quiet import quiet
from fedlight.data import FederatedDataModule
from fedlight.federated_cli import FederatedCLI, Rehearsal, RunConfig
from fedlight.modules import FederatedModule
from fedlight.modules.pretraining import fit_codec
from fedlight.modules.trainer import FederatedTrainer
from fedlight.usage import DESCRIPTION

if TYPE_CHECKING:
    from fedlight.audit.plan import Parts

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
        raise own_error(error) or error from error


def rehearse(args: list[str]) -> dict[str, Any]:
    """Parse the arguments of `fedlight fit`, build what they name, and return the whole configuration."""
    cli = _rehearsed(args)
    cli._dump_config()
    return cli.config_dump  # type: ignore[no-any-return]


def audit_parts(base: str, beside: Path | None, overrides: dict[str, Any], lr: float | None = None) -> Parts:
    """Return model, data and codec of a configuration of `fedlight fit`, looked for beside a folder, to audit at rate ``lr``."""
    from fedlight.audit.plan import Parts

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
    with quiet("lightning.fabric", "lightning.pytorch"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return open_cli(Rehearsal, args, exit_on_error=False)
        except Exception as error:
            raise own_error(error) or error from error


def main(args: list[str] | None = None) -> None:
    """Run the command line; mistakes in the configuration end with one sentence and exit status 2, SIGTERM with 143."""
    given = sys.argv[1:] if args is None else args
    try:
        # What only one subcommand needs is imported for it alone.
        if given[:1] == ["compare"]:
            from fedlight.compare.command import compare

            if status := compare(given[1:], rehearse, fit):
                raise SystemExit(status)
            return
        if given[:1] == ["audit"]:
            from fedlight.audit.command import audit

            audit(given[1:], audit_parts)
            return
        open_cli(FederatedCLI, args)
    except Exception as error:
        told = own_error(error)
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
