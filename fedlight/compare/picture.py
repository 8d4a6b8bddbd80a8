"""Accuracy against bytes, a point a codec. Needs matplotlib, the `plot` extra."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from fedlight.compare.results import Row
from fedlight.core.errors import ConfigurationError
from fedlight.metrics import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C6D00")  # Okabe and Ito; their yellow darkened to be read
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")
DPI = 100
SIZE = (10.0, 6.0)  # inches: 1000 x 600 pixels
ASIDE = 10 / 930  # of the axis: points at the same bytes are set that far apart
PICTURES = {"compare.png": ("total_bytes", "sent both ways in the whole run"), "compare_uplink.png": ("uplink_bytes", "sent by clients")}


def draw_pictures(rows: Sequence[Row], folder: Path, reference: str, title: str) -> list[Path]:
    """Write the pictures to ``folder``, log them to TensorBoard there, and return their paths."""
    figures = {name: draw(rows, key, f"{text} (bytes, log scale)", reference, title) for name, (key, text) in PICTURES.items()}
    from torch.utils.tensorboard import SummaryWriter

    board = SummaryWriter(str(folder))
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=DPI)
        board.add_figure(f"compare/{PICTURES[name][0]}", figure)
    board.close()
    return [folder / name for name in figures]


def draw(rows: Sequence[Row], key: str, label: str, reference: str, title: str) -> Figure:
    """Return a figure of test accuracy, mean and standard deviation over seeds, against the bytes that ``key`` names.

    It raises ``ConfigurationError`` if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigurationError("Expected matplotlib to draw the picture but it is not installed: pip install 'fedlight[plot]'") from error
    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xscale("log")
    _show_bytes(axes, [row[key] for row in rows])
    axes.margins(y=0.15)
    places = _places(rows, key, *axes.get_xlim())
    axes.set_axisbelow(True)
    axes.grid(which="major", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    for i, row in enumerate(rows):
        mean, spread = _percent(row)
        plain = row["codec"] == reference
        look: dict[str, Any] = {"marker": MARKERS[i % len(MARKERS)], "markersize": 8, "color": COLOURS[i % len(COLOURS)]}
        if plain:
            look = {"marker": "*", "markersize": 13, "color": "black"}
        name = row["codec"] if plain else f"{row['codec']} ({row['uplink_ratio']:.0f}x)"
        axes.errorbar(places[i], mean, spread or None, label=name, linestyle="none", capsize=3, elinewidth=1.2, **look)
        if plain:
            axes.axhline(mean, color="black", linewidth=0.8, linestyle=(0, (4, 4)), zorder=0.5)
    moved = any(place != row[key] for place, row in zip(places, rows, strict=True))
    axes.set_xlabel(f"{label}, points at the same bytes side by side" if moved else label)
    axes.set_ylabel("test accuracy (%)")
    axes.set_title(f"{title}\nafter the last round, mean ± standard deviation over seeds", fontsize=11, linespacing=1.4)
    figure.legend(loc="outside right center", frameon=False)
    return figure


def _places(rows: Sequence[Row], key: str, left: float, right: float) -> list[float]:
    """Return where on the axis from ``left`` to ``right`` each row is drawn: at its bytes, or just next to them."""
    bars = []
    for row in rows:
        mean, spread = _percent(row)
        bars.append((log(row[key]), mean - max(spread, 0.05), mean + max(spread, 0.05)))
    moved = side_by_side(bars, ASIDE * log(right / left))
    return [row[key] if place == bar[0] else exp(place) for row, place, bar in zip(rows, moved, bars, strict=True)]


def side_by_side(bars: Sequence[tuple[float, float, float]], gap: float) -> list[float]:
    """Return the x of vertical bars (x, low, high), those that would cover each other set ``gap`` apart about their common middle.

    >>> side_by_side([(5.0, 0, 2), (5.0, 1, 3), (9.0, 0, 3), (5.0, 7, 8)], gap=1.0)
    [4.5, 5.5, 9.0, 5.0]
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(bars)), key=lambda i: bars[i][0]):
        x, low, high = bars[i]
        near = (g for g in groups if x - bars[g[-1]][0] < gap and any(low <= bars[j][2] and bars[j][1] <= high for j in g))
        group = next(near, None)
        if group is None:
            groups.append([i])
        else:
            group.append(i)
    places = [x for x, _, _ in bars]
    for group in groups:
        middle = fmean(bars[i][0] for i in group)
        for k, i in enumerate(group):
            places[i] = middle + gap * (k - (len(group) - 1) / 2)
    return places


def _percent(row: Row) -> tuple[float, float]:
    return 100 * row["accuracy_mean"], 100 * (row["accuracy_std"] or 0.0)


def _show_bytes(axes: Axes, values: Sequence[float]) -> None:
    """Leave room at the sides, and put bytes with their unit on round numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    room = max((max(values) / min(values)) ** 0.05, 1.15)
    low, high = min(values) / room, max(values) * room
    axes.set_xlim(low, high)
    steps = (1, 2, 3, 4, 5, 6, 7, 8) if high / low < 8 else (1, 2, 5) if high / low < 300 else (1,)
    axes.xaxis.set_major_locator(LogLocator(10, steps, numticks=100))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _round_bytes(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _round_bytes(value: float) -> str:
    """Return a tick's bytes without digits that say nothing.

    >>> _round_bytes(1e6), _round_bytes(5e7)
    ('1 MB', '50 MB')
    """
    number, unit = format_bytes(value).split()
    return f"{float(number):g} {unit}"
