"""A Lightning Trainer that can also run the pretraining phase alone, and the tables that end runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from rich.console import Console
from rich.table import Table

from fedlight.callbacks.codec import CodecPretraining
from fedlight.core.errors import ConfigurationError
from fedlight.core.export import save_codec
from fedlight.core.figures import rows
from fedlight.core.pretraining import ProxyFederation
from fedlight.modules.federated import FederatedModule
from fedlight.modules.pretraining import errors_by_cohort, record_for


class FederatedTrainer(Trainer):
    """Lightning's Trainer, with `pretrain` beside `fit`, `validate`, `test` and `predict`."""

    def pretrain(
        self, model: LightningModule, datamodule: LightningDataModule, output: str | None = None, cohort_rounds: int = 10
    ) -> dict[str, Any]:
        """Train the codec on proxy data, report its error on held-out updates, and write encoder and decoder.

        Args:
            model: The FederatedModule whose codec is trained.
            datamodule: The data; its proxy data is used.
            output: Folder for `encoder.safetensors` and `decoder.safetensors`; the run's folder if not given.
            cohort_rounds: Newly recorded rounds of 100 clients for the table of errors by cohort size; 0 leaves it out.

        Raises:
            ConfigurationError: if the codec needs no training.
        """
        assert isinstance(model, FederatedModule)
        if not model.codec.needs_fit or model.codec_path:
            raise ConfigurationError(
                f"Expected a codec that has to be trained but got {type(model.codec).__name__}"
                + (" with `model.codec_path`" if model.codec_path else "")
                + ": set `model.codec`, for example to fedlight.codecs.AutoencoderCodec"
            )
        with self._no_round():
            self.fit(model, datamodule=datamodule)
        folder = Path(output or self.log_dir or self.default_root_dir)
        report: dict[str, Any] = dict(model.pretrain_metrics)
        if self.is_global_zero:
            save_codec(model.codec.to("cpu"), folder)
            if cohort_rounds:
                callbacks: list[Any] = self.callbacks  # type: ignore[attr-defined]
                proxy = next(callback.proxy for callback in callbacks if isinstance(callback, CodecPretraining))
                many = ProxyFederation(max(cohort_rounds, 6), 100, proxy.samples, proxy.alpha, proxy.server_lr, proxy.in_memory_mb)
                model.to("cpu")
                bank = record_for(model, many, self.progress_bar_callback is not None, seed=model.seed + 1)
                report["error_by_cohort"] = errors_by_cohort(model.codec, bank)
            show_report(report, folder)
        return report

    @contextmanager
    def _no_round(self) -> Iterator[None]:
        """Let `fit` set up and pretrain but run no round; what it finds configured stays, such as the rounds to calibrate noise for."""
        loop, batches = self.fit_loop.epoch_loop, self.limit_train_batches
        steps = loop.max_steps
        self.limit_train_batches = 0
        loop.max_steps = max(steps, 0)  # nobody need say how many rounds there will be
        try:
            yield
        finally:
            self.limit_train_batches, loop.max_steps = batches, steps


def show_report(report: dict[str, Any], folder: Path) -> None:
    """Print the errors of a fitted codec on updates that it has not seen."""
    table = Table("codec", "relative error of the decoded mean, held-out rounds", title="Pretraining")
    names = {"held_out_error": "this codec", "held_out_error_pca": "PCA of the same blocks", "held_out_error_random": "random projection"}
    for key, name in names.items():
        if key in report:
            table.add_row(name, f"{report[key]:.3f}")
    for size, error in report.get("error_by_cohort", {}).items():
        table.add_row(f"this codec, cohort of {size}", f"{error:.3f}")
    console = Console()
    console.print(table)
    console.print(f"Written to {folder}: use it with [bold]--model.codec_path {folder}[/bold]")


def show_runs(runs: list[tuple[str, tuple[dict[str, Any], str | None]]], console: Console) -> None:
    """Print accuracies, bytes and seconds of (name, (summary, folder)) runs side by side, and where to look next."""
    table = Table("", *(name for name, _ in runs), title="Federated run")
    summaries = [summary for _, (summary, _) in runs]
    for title, key, show in rows(summaries):
        table.add_row(title, *(show(summary[key]) if key in summary else "" for summary in summaries))
    console.print(table)
    for name, (_, folder) in runs:
        if folder:
            console.print(f"{name}: {folder}", soft_wrap=True)
    folders = [Path(folder) for _, (_, folder) in runs if folder]
    roots = {str(folder.parents[1]) for folder in folders if any(folder.glob("events.out.tfevents*"))}  # of TensorBoard's logger
    for root in sorted(roots):
        console.print(f"Curves: [bold]tensorboard --logdir {root}[/bold]", soft_wrap=True)
