"""Charts as SVG text: lines and bars, drawn with the page's own colours so that they follow its light or dark theme."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 520, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 26, 14, 44


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about ``count`` round numbers from ``low`` to ``high``.

    >>> ticks(0, 103)
    [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]
    """
    span = high - low
    if not span > 0:
        return [low]
    raw = span / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = unit * min((1, 2, 5, 10), key=lambda factor: abs(factor * unit - raw))
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return the numbers 1, 2 and 5 times a power of ten from ``low`` to ``high``; the powers alone if there are many.

    >>> log_ticks(300, 6000)
    [500.0, 1000.0, 2000.0, 5000.0]
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 3 else (1,)
    return [float(value) for power in range(first, last + 1) for factor in factors if low <= (value := factor * 10.0**power) <= high]


def line_chart(
    curves: Sequence[tuple[str, Points]],
    x_label: str,
    y_label: str,
    show_x: Callable[[float], str] = "{:g}".format,
    show_y: Callable[[float], str] = "{:g}".format,
    from_zero: bool = False,
    log_x: bool = False,
) -> str:
    """Return lines through (x, y) points, one colour each by its place in ``curves``; nothing if there are none.

    ``log_x`` puts x, which must be positive, on a logarithmic axis.
    """
    shown = [(place, name, sorted(points)) for place, (name, points) in enumerate(curves) if points]
    if not shown:
        return ""
    xs = [x for _, _, points in shown for x, _ in points]
    ys = [y for _, _, points in shown for _, y in points]
    log_x = log_x and min(xs) > 0 and max(xs) > min(xs)
    left, right = min(0.0, *xs) if min(xs) < 0.2 * max(xs) and not log_x else min(xs), max(xs)
    low, high = (0.0 if from_zero else min(ys)), max(ys)
    pad = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    low, high = (low if from_zero else low - pad), high + pad
    if right <= left:
        right = left + 1.0

    def place_x(x: float) -> float:
        share = math.log(x / left) / math.log(right / left) if log_x else (x - left) / (right - left)
        return _LEFT + share * (WIDTH - _LEFT - _RIGHT)

    def place_y(y: float) -> float:
        return HEIGHT - _BOTTOM - (y - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{y_label} against {x_label}")}">']
    for value in ticks(low, high):
        y = place_y(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(show_y(value))}</text>')
    counted = all(x == int(x) for x in xs)  # between two quarters of the clients there is none
    for value in log_ticks(left, right) if log_x else [one for one in ticks(left, right) if not counted or one == int(one)]:
        parts.append(f'<text x="{place_x(value):.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{escape(show_x(value))}</text>')
    parts.append(_axes(x_label, y_label))
    for place, name, points in shown:
        path = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in points)
        parts.append(f'<polyline class="line c{place % 7}" points="{path}"><title>{escape(name)}</title></polyline>')
        for x, y in points if len(points) <= 60 else [points[-1]]:
            told = escape(f"{name}: {show_y(y)} at {show_x(x)}")
            parts.append(
                f'<circle class="dot c{place % 7}" cx="{place_x(x):.1f}" cy="{place_y(y):.1f}" r="2.6"><title>{told}</title></circle>'
            )
    return "".join(parts) + "</svg>"


def bars(rows: Sequence[tuple[str, Sequence[tuple[str, float]]]], show: Callable[[float], str], run: int | None = None) -> str:
    """Return stacked horizontal bars: a row a name, its parts (what, how much) in colours of their own, or all in that of a ``run``."""
    most = max((sum(value for _, value in parts) for _, parts in rows), default=0.0)
    if not most > 0:
        return ""
    height = 30 * len(rows) + 10
    out = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="bars">']
    for row, (name, parts) in enumerate(rows):
        y, x = 30 * row + 6, 150.0
        total = sum(value for _, value in parts)
        out.append(f'<text x="144" y="{y + 14}" text-anchor="end">{escape(shortened(name, 24))}</text>')
        for place, (what, value) in enumerate(parts):
            wide = value / most * (WIDTH - 150 - 78)
            if wide > 0:
                told = escape(f"{name}, {what}: {show(value)}")
                colour = f"p{place}" if run is None else f"c{run % 7}"
                out.append(f'<rect class="bar {colour}" x="{x:.1f}" y="{y}" width="{wide:.2f}" height="20"><title>{told}</title></rect>')
            x += wide
        out.append(f'<text x="{x + 6:.1f}" y="{y + 14}">{escape(show(total))}</text>')
    return "".join(out) + "</svg>"


def shortened(text: str, length: int) -> str:
    """Return a text of at most ``length`` characters, its middle left out.

    >>> shortened("abcdefghij", 7)
    'abc…hij'
    """
    half = (length - 1) // 2
    return text if len(text) <= length else f"{text[:half]}…{text[-(length - 1 - half) :]}"


def _axes(x_label: str, y_label: str) -> str:
    middle = (HEIGHT - _BOTTOM + _TOP) / 2
    return (
        f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{HEIGHT - _BOTTOM}" y2="{HEIGHT - _BOTTOM}"/>'
        f'<text x="{(WIDTH + _LEFT - _RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle" class="label">{escape(x_label)}</text>'
        f'<text transform="translate(11 {middle}) rotate(-90)" text-anchor="middle" class="label">{escape(y_label)}</text>'
    )
