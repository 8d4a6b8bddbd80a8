"""Image grids: true images, control, and the attack's result for every observation, with PSNRs. Needs matplotlib, the `plot` extra."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from fedlight.core.errors import ConfigurationError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELL = 0.92  # inches
MARGIN = 3.1  # inches for the words next to a row
DPI = 100


@dataclass(frozen=True)
class Strip:
    """A row of a grid: words, images ``[n, c, h, w]`` in 0..1, and the PSNR of each (none for the true images)."""

    words: str
    images: Tensor
    psnr: list[float] | None = None


def draw(strips: list[Strip], title: str) -> Figure:
    """Return a figure with one row per strip; raises ``ConfigurationError`` if matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigurationError("Expected matplotlib to draw the images but it is not installed: pip install 'fedlight[plot]'") from error
    columns = max(len(strip.images) for strip in strips)
    width, height = MARGIN + columns * CELL, 0.5 + len(strips) * (CELL + 0.22)
    figure = Figure(figsize=(width, height), dpi=DPI)
    FigureCanvasAgg(figure)
    figure.text(0.1 / width, 1 - 0.27 / height, title, fontsize=11, fontweight="bold")
    for line, strip in enumerate(strips):
        bottom = height - 0.45 - (line + 1) * (CELL + 0.22) + 0.22
        figure.text(0.1 / width, (bottom + CELL / 2) / height, strip.words, fontsize=8.5, va="center", linespacing=1.3)
        for column, image in enumerate(strip.images):
            place = ((MARGIN + column * CELL) / width, bottom / height, 0.94 * CELL / width, 0.94 * CELL / height)
            axes = figure.add_axes(place)
            axes.set_axis_off()
            pixels = image.float().clamp(0, 1).cpu().permute(1, 2, 0).numpy()
            axes.imshow(pixels[..., 0] if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            if strip.psnr is not None:
                middle = (MARGIN + (column + 0.47) * CELL) / width
                figure.text(middle, (bottom - 0.15) / height, f"{strip.psnr[column]:.1f} dB", fontsize=7.5, ha="center")
    return figure


def write_pictures(figures: Mapping[str, Figure], folder: Path, text: str) -> list[Path]:
    """Write the figures as PNG, log them and a text to TensorBoard in ``folder``, and return the paths of the PNG files."""
    from torch.utils.tensorboard import SummaryWriter

    board = SummaryWriter(str(folder))
    board.add_text("audit/reading", text)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=DPI)
        board.add_figure(f"audit/{name}", figure)
    board.close()
    return [folder / f"{name}.png" for name in figures]
