"""TensorBoard as a person reads it: grouped tags with descriptions, a layout, curves over kilobytes, a card in words."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from fedlight.callbacks.pictures import can_draw, draw_clients, draw_codes, draw_layers
from fedlight.core.layout import Layout
from fedlight.core.metric_names import RESULTS, own_validation, shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

BY_KILOBYTES = "by_kilobytes"
"""Subfolder of the companion run, whose step is kilobytes sent both ways instead of rounds."""

_OVER_BYTES = ("val/accuracy", "val/loss", "val/client_accuracy_worst")
_CODE_NUMBERS = 100_000  # of a mean code, at most, in pictures
_COLUMNS = 24  # rounds in a picture of codes, at most, the latest ones
_DROPPED = ("epoch", "step")
_LAYOUT = {
    "Accuracy and bytes": {
        "accuracy": ["Multiline", [r"^accuracy/validation$", r"^clients/accuracy_mean$", r"^clients/accuracy_worst$"]],
        "bytes so far": [
            "Multiline",
            [r"^communication/uplink_total$", r"^communication/downlink_total$", r"^communication/encoders_total$"],
        ],
        "accuracy over kilobytes": ["Multiline", [r"^by_kilobytes/accuracy_validation$"]],
    },
    "Loss and reconstruction": {
        "loss": ["Multiline", [r"^loss/validation$", r"^loss/local_training$"]],
        "decoded aggregate": ["Multiline", [r"^simulation/relative_error$", r"^simulation/cosine$"]],
    },
}


class RunBoard(TensorBoardLogger):
    """Lightning's TensorBoard logger, with metrics under tags that are grouped and described (`fedlight.core.metric_names`).

    A metric that has not changed yet is no curve: it is held back until it does, and then drawn from its first step. What never changes
    is in the run's card, under Text. A companion run in the subfolder `by_kilobytes` draws accuracy over the kilobytes sent both ways.

    Args:
        save_dir: Folder of the experiment's runs.
        name: Folder of this kind of run in it; may have several parts.
        version: Name of the run's own folder in that.
        pictures_every: Least number of rounds between pictures of a kind; 0 draws none. They need matplotlib.
    """

    def __init__(self, save_dir: str, name: str = "", version: str = "0", pictures_every: int = 25) -> None:
        super().__init__(save_dir, name=name, version=version, default_hp_metric=False)
        self.pictures_every = pictures_every if can_draw() else 0
        self.energy_kept: dict[str, float] = {}  # by parameter, in the last round that was compared
        self._drawn: dict[str, int] = {}
        self._codes: list[tuple[int, Any]] = []
        self._first: dict[str, tuple[int, float]] = {}
        self._last: dict[str, tuple[int, float]] = {}
        self._moving: set[str] = set()
        self._kilobytes: SummaryWriter | None = None
        self._laid_out = False
        self._resumes = False

    def resume(self, earlier: Path) -> None:
        """Go on with the curves of the run in the folder ``earlier``: this run's folder gets its events, up to where this run begins."""
        if self._is_elsewhere():
            return
        for events in sorted(earlier.glob("**/events.out.tfevents.*")):
            if events.parent.name in (earlier.name, BY_KILOBYTES):
                # TensorBoard reads files in the order of their names, which begin with the time: a zero comes before this run's own.
                name = events.name.replace("tfevents.", "tfevents.0", 1)
                target = Path(self.log_dir) / events.relative_to(earlier).with_name(name)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(events, target)
                self._resumes = True

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Write metrics that have changed, under their tags."""
        if self._is_elsewhere():
            return
        number = int(step or 0)
        if self._resumes:  # what the earlier run logged after its last checkpoint is done again
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog

            self._resumes = False
            untyped: Any = self.experiment
            untyped._get_file_writer().add_event(Event(session_log=SessionLog(status=SessionLog.START)), number)
        if "bytes/uplink" in metrics and not self._laid_out:
            self._laid_out = True
            self.experiment.add_custom_scalars(_LAYOUT)
        for name, value in metrics.items():
            if name not in _DROPPED:
                self._log(name, number, float(value))
        self._log_by_kilobytes(metrics)

    def _log(self, name: str, step: int, value: float) -> None:
        if name in self._moving or name in RESULTS:
            write(self.experiment, name, value, step)
        elif name not in self._first:
            self._first[name] = (step, value)
        elif value != self._first[name][1]:
            self._moving.add(name)
            for earlier, same in dict([self._first[name], self._last.get(name, self._first[name])]).items():
                write(self.experiment, name, same, earlier)
            write(self.experiment, name, value, step)
        self._last[name] = (step, value)

    def _log_by_kilobytes(self, metrics: Any) -> None:
        """Write accuracies, and a user's own metrics, into the companion run, at the kilobytes sent so far."""
        sent = [self._last[name][1] for name in ("bytes/uplink", "bytes/downlink") if name in self._last]
        named = [name for name in _OVER_BYTES if name in metrics] + own_validation(metrics)
        if not sent or not named:
            return
        if self._kilobytes is None:
            from torch.utils.tensorboard import SummaryWriter

            self._kilobytes = SummaryWriter(str(Path(self.log_dir) / BY_KILOBYTES))
        for name in named:
            tag = f"{BY_KILOBYTES}/{shown(name).tag.replace('/', '_')}"
            write(self._kilobytes, name, float(metrics[name]), round(sum(sent) / 1000), tag, " A step is a kilobyte sent, up or down.")

    def show_codes(self, code: Tensor, step: int) -> None:
        """Draw how the numbers of the mean codes ``[code_dim]`` of the rounds so far are spread."""
        if self.pictures_every:
            self._codes.append((step, code.float().numpy()[:_CODE_NUMBERS]))
            self._draw("codec/mean_code_over_rounds", step, lambda: draw_codes(self._codes[-_COLUMNS:]))

    def show_layers(self, kept: dict[str, float], layout: Layout, step: int) -> None:
        """Draw the energy of the true update that the decoded one keeps, by parameter."""
        if kept:
            self.energy_kept = kept
            sizes = dict(zip(layout.names, layout.sizes, strict=True))
            self._draw("codec/energy_kept_by_layer", step, lambda: draw_layers(kept, sizes))

    def show_clients(self, accuracies: Tensor, step: int) -> None:
        """Draw the clients' accuracies ``[clients]``."""
        self._draw("clients/accuracy_of_each", step, lambda: draw_clients(accuracies.tolist()))

    def _draw(self, tag: str, step: int, draw: Callable[[], Figure]) -> None:
        if self.pictures_every and (tag not in self._drawn or step - self._drawn[tag] >= self.pictures_every):
            self._drawn[tag] = step
            self.experiment.add_figure(tag, draw(), step)

    def steady(self) -> dict[str, float]:
        """Return the metrics that have never changed, by name."""
        return {name: value for name, (_, value) in self._first.items() if name not in self._moving}

    def log_text(self, tag: str, markdown: str) -> None:
        """Show a text under Text."""
        if not self._is_elsewhere():
            self.experiment.add_text(tag, markdown)

    def finalize(self, status: str) -> None:
        """Write what is left."""
        super().finalize(status)
        if self._kilobytes is not None:
            self._kilobytes.flush()

    def _is_elsewhere(self) -> bool:
        return bool(getattr(rank_zero_only, "rank", 0))


def write(writer: SummaryWriter, name: str, value: float, step: int, tag: str | None = None, more: str = "") -> None:
    """Write one number of a metric under its tag (or ``tag``), with its description."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata

    how = shown(name)
    text = f"{how.description}{more}\n\nName in metrics.csv and for callbacks: `{name}`".strip()
    number = Summary.Value(tag=tag or how.tag, simple_value=value, metadata=SummaryMetadata(summary_description=text))
    untyped: Any = writer
    untyped._get_file_writer().add_summary(Summary(value=[number]), step)
