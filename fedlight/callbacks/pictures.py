"""Pictures of a run for TensorBoard: clients' accuracies, the mean code over rounds, energy kept per layer. They need matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from fedlight.core.layout import Layout

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
