"""Where to put points and their labels so that none covers another: numbers and rectangles, no drawing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, hypot, pi, sin
from statistics import fmean

DIRECTIONS, RINGS = 16, 9
GAP = 11.0  # between a point and the nearest edge of its label, on the first ring
STEP = 11.0  # from ring to ring


@dataclass(frozen=True)
class Box:
    """A rectangle, in pixels."""

    x: float
    y: float
    width: float
    height: float

    def overlap(self, other: Box) -> float:
        """Return the area that both cover."""
        width = min(self.x + self.width, other.x + other.width) - max(self.x, other.x)
        height = min(self.y + self.height, other.y + other.height) - max(self.y, other.y)
        return max(width, 0.0) * max(height, 0.0)

    def nearest(self, x: float, y: float) -> tuple[float, float]:
        """Return the place in the rectangle that is nearest to a point."""
        return min(max(x, self.x), self.x + self.width), min(max(y, self.y), self.y + self.height)

    @property
    def area(self) -> float:
        """Width times height."""
        return self.width * self.height


def side_by_side(bars: Sequence[tuple[float, float, float]], gap: float) -> list[float]:
    """Return the x of vertical bars (x, low, high), those that would cover each other set ``gap`` apart about their common middle.

    >>> side_by_side([(5.0, 0, 2), (5.0, 1, 3), (9.0, 0, 3), (5.0, 7, 8)], gap=1.0)
    [4.5, 5.5, 9.0, 5.0]
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(bars)), key=lambda i: bars[i][0]):
        x, low, high = bars[i]
        for group in groups:
            if x - bars[group[-1]][0] < gap and any(low <= bars[j][2] and bars[j][1] <= high for j in group):
                group.append(i)
                break
        else:
            groups.append([i])
    moved: dict[int, float] = {}
    for group in groups:
        middle = fmean(bars[i][0] for i in group)
        moved |= {i: middle + gap * (k - (len(group) - 1) / 2) if len(group) > 1 else bars[i][0] for k, i in enumerate(group)}
    return [moved[i] for i in range(len(bars))]


def place_labels(
    points: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], frame: Box, taken: Sequence[Box] = ()
) -> list[Box]:
    """Return a rectangle of the given size for every point's label, near it, inside ``frame`` and free of all else if there is room.

    Greedy: the most crowded points choose first, each the candidate with the least overlap, of those the nearest. ``taken`` are
    rectangles that should stay free, such as markers and error bars.
    """
    crowd = [sum(1 / (1 + hypot(x - a, y - b)) for a, b in points) for x, y in points]
    boxes: dict[int, Box] = {}
    for i in sorted(range(len(points)), key=lambda i: -crowd[i]):
        others = [*taken, *boxes.values()]
        candidates = _candidates(points[i], sizes[i])
        boxes[i] = min(candidates, key=lambda found: _cost(found, others, frame))[1]
    return [boxes[i] for i in range(len(points))]


def _candidates(point: tuple[float, float], size: tuple[float, float]) -> list[tuple[float, Box]]:
    """Return (distance, rectangle) around a point: to the right first, then round it, then farther away."""
    (x, y), (width, height) = point, size
    found = []
    for ring in range(RINGS):
        reach = GAP + STEP * ring
        for turn in range(DIRECTIONS):
            angle = 2 * pi * turn / DIRECTIONS
            # the label's centre moves on an ellipse about the point, so that its edge keeps the distance on every side
            middle_x = x + cos(angle) * (reach + width / 2)
            middle_y = y + sin(angle) * (reach + height / 2)
            found.append((float(ring), Box(middle_x - width / 2, middle_y - height / 2, width, height)))
    return found


def _cost(found: tuple[float, Box], others: Sequence[Box], frame: Box) -> tuple[float, float]:
    distance, box = found
    outside = box.area - box.overlap(frame)
    covered = sum(box.overlap(other) for other in others) + 3 * outside
    return round(covered), distance  # whole pixels: rounding errors must not outweigh the distance
