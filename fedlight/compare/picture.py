"""Accuracy against bytes, a point a codec. Needs matplotlib, the `plot` extra."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, hypot, log
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlight.compare.labels import Box, place_labels, side_by_side
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
LEADER = 14.0  # pixels from a point beyond which a line leads to its label
PICTURES = {"compare.png": ("total_bytes", "sent both ways in the whole run"), "compare_uplink.png": ("uplink_bytes", "sent by clients")}


def draw_pictures(rows: Sequence[Row], folder: Path, reference: str, title: str) -> list[Path]:
    """Write the pictures to ``folder``, log them to TensorBoard there, and return their paths.

    Raises:
        ConfigurationError: if matplotlib is not installed.
    """
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

    Raises:
        ConfigurationError: if matplotlib is not installed.
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
        marker, size = ("*", 13) if plain else (MARKERS[i % len(MARKERS)], 8)
        axes.errorbar(places[i], mean, spread or None, color=_colour(i, plain), marker=marker, markersize=size, capsize=3, elinewidth=1.2)
        if plain:
            axes.axhline(mean, color="black", linewidth=0.8, linestyle=(0, (4, 4)), zorder=0.5)
    moved = any(place != row[key] for place, row in zip(places, rows, strict=True))
    axes.set_xlabel(f"{label}, points at the same bytes side by side" if moved else label)
    axes.set_ylabel("test accuracy (%)")
    axes.set_title(f"{title}\nafter the last round, mean ± standard deviation over seeds", fontsize=11, linespacing=1.4)
    _label_points(figure, axes, rows, places, reference)
    return figure


def _places(rows: Sequence[Row], key: str, left: float, right: float) -> list[float]:
    """Return where on the axis from ``left`` to ``right`` each row is drawn: at its bytes, or just next to them."""
    bars = []
    for row in rows:
        mean, spread = _percent(row)
        bars.append((log(row[key]), mean - max(spread, 0.05), mean + max(spread, 0.05)))
    moved = side_by_side(bars, ASIDE * log(right / left))
    return [row[key] if place == bar[0] else exp(place) for row, place, bar in zip(rows, moved, bars, strict=True)]


def _percent(row: Row) -> tuple[float, float]:
    return 100 * row["accuracy_mean"], 100 * (row["accuracy_std"] or 0.0)


def _colour(number: int, plain: bool) -> str:
    return "black" if plain else COLOURS[number % len(COLOURS)]


def _show_bytes(axes: Axes, values: Sequence[float]) -> None:
    """Leave room for labels, and put bytes with their unit on round numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    room = max((max(values) / min(values)) ** 0.12, 1.15)
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


def _label_points(figure: Figure, axes: Axes, rows: Sequence[Row], places: Sequence[float], reference: str) -> None:
    """Write every codec's name and ratio next to its point, or farther away with a thin line to it if there is no room."""
    from matplotlib.colors import to_rgb
    from matplotlib.patheffects import withStroke

    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # labels are placed for these axes: they must not move any more
    renderer: Any = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    to_pixels, to_data = axes.transData, axes.transData.inverted()
    points, taken = [], []
    for row, place in zip(rows, places, strict=True):
        mean, spread = _percent(row)
        x, y = (float(value) for value in to_pixels.transform((place, mean)))
        _, low = to_pixels.transform((place, mean - spread))
        _, high = to_pixels.transform((place, mean + spread))
        points.append((x, y))
        taken += [Box(x - 7, y - 7, 14, 14), Box(x - 4, float(low) - 2, 8, float(high - low) + 4)]
    texts = []
    for i, row in enumerate(rows):
        plain = row["codec"] == reference
        name = row["codec"] if plain else f"{row['codec']} ({row['uplink_ratio']:.0f}x)"
        dark = [0.75 * part for part in to_rgb(_colour(i, plain))]  # letters are thinner than markers
        text = axes.text(0, 0, name, fontsize=10, color=dark, transform=None, va="bottom", ha="left")
        text.set_path_effects([withStroke(linewidth=3, foreground="white")])
        texts.append(text)
    sizes = [(box.width, box.height) for box in (text.get_window_extent(renderer) for text in texts)]
    frame = axes.get_window_extent(renderer)
    boxes = place_labels(points, sizes, Box(frame.x0, frame.y0, frame.width, frame.height), taken)
    for text, box, (x, y) in zip(texts, boxes, points, strict=True):
        text.set_transform(axes.transData)
        text.set_position(tuple(to_data.transform((box.x, box.y))))
        near = box.nearest(x, y)
        if hypot(near[0] - x, near[1] - y) > LEADER:
            ends = zip(to_data.transform((x, y)), to_data.transform(near), strict=True)
            axes.plot(*ends, color=text.get_color(), linewidth=0.8, alpha=0.6, zorder=1, scalex=False, scaley=False)
