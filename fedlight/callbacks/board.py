"""TensorBoard as a person reads it: tags with descriptions, a layout, curves over kilobytes, a card in words, and pictures."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from fedlight.core.layout import Layout
from fedlight.core.metric_names import RESULTS, own_validation, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
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


BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"
_BINS = 41
_LAYERS = 24  # at most, the largest ones


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def energy_kept(layout: Layout, decoded: Tensor, true: Tensor) -> dict[str, float]:
    """Return, by parameter, the share of the true mean update's energy that the decoded one keeps: 1 - |error|^2 / |true|^2, at least 0.

    ``decoded`` and ``true`` are ``[dim]``; parameters whose true update is zero are left out.
    """
    kept = {}
    for name, start, size in zip(layout.names, layout.offsets, layout.sizes, strict=True):
        place = slice(start, start + size)
        energy = float(true[place].square().sum())
        if energy > 0:
            kept[name] = max(0.0, 1 - float((decoded[place] - true[place]).square().sum()) / energy)
    return kept


def draw_clients(accuracies: Sequence[float]) -> Figure:
    """Return a picture of clients' accuracies (fractions), sorted, with their mean and the worst tenth."""
    figure, axes = _figure()
    values = np.sort(np.asarray(accuracies)) * 100
    worst = max(1, len(values) // 10)
    axes.bar(
        range(len(values)), values, width=1.0, color=[ORANGE] * worst + [BLUE] * (len(values) - worst), edgecolor="white", linewidth=0.3
    )
    axes.axhline(values.mean(), color="black", linewidth=1, linestyle="--")
    axes.annotate(f"mean {values.mean():.1f} %", (0, values.mean()), xytext=(2, 3), textcoords="offset points", fontsize=9)
    axes.set_ylim(0, 112)
    axes.set_xticks([])
    axes.set_xlabel(f"{len(values)} clients; worst tenth (mean {values[:worst].mean():.1f} %) in orange")
    axes.set_ylabel("accuracy on own samples (%)")
    return figure


def draw_codes(codes: Sequence[tuple[int, np.ndarray[Any, Any]]]) -> Figure:
    """Return a picture of how the numbers of the mean code are spread, a column for each (round, code)."""
    figure, axes = _figure()
    bound = max(float(np.quantile(np.abs(code), 0.99)) for _, code in codes) or 1.0
    edges = np.linspace(-bound, bound, _BINS + 1)
    counts = np.stack([np.histogram(np.clip(code, -bound, bound), edges)[0] / max(len(code), 1) for _, code in codes], axis=1)
    shown = axes.imshow(
        np.log10(counts + 1e-4), origin="lower", aspect="auto", cmap="viridis", extent=(-0.5, len(codes) - 0.5, -bound, bound)
    )
    axes.set_xticks(range(len(codes)), [str(number) for number, _ in codes])
    axes.set_xlabel("round")
    axes.set_ylabel("number in the mean code")
    bar = figure.colorbar(shown, ax=axes, ticks=[-4, -3, -2, -1, 0])
    bar.ax.set_yticklabels(["none", "0.1 %", "1 %", "10 %", "all"])
    bar.set_label("share of the code's numbers")
    return figure


def draw_layers(kept: dict[str, float], sizes: dict[str, int]) -> Figure:
    """Return a picture of the energy kept (fractions) by parameter; of many parameters the largest."""
    names = sorted(kept, key=lambda name: -sizes[name])[:_LAYERS]
    names = [name for name in kept if name in names]
    figure, axes = _figure(max(2.4, 0.9 + 0.26 * len(names)))
    values = [100 * kept[name] for name in names]
    axes.barh(range(len(names)), values, color=BLUE)
    axes.set_yticks(range(len(names)), [f"{name}  ({sizes[name]:,})" for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 112)
    for place, value in enumerate(values):
        axes.text(value + 1, place, f"{value:.0f}", va="center", fontsize=8)
    axes.set_xlabel("energy of the true mean update kept (%)")
    return figure


def _figure(height: float = 2.7) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, height), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
