"""Where to put the labels of points in a picture so that none covers another, a point or a line."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_ANGLES = 24
_STEP = 8.0
_RINGS = 20


class Box(NamedTuple):
    """A rectangle, in points of 1/72 inch."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: "Box") -> float:
        """The area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return width * height if width > 0 and height > 0 else 0.0

    def outside(self, frame: "Box") -> float:
        """The area that lies outside of a frame."""
        return (self.right - self.left) * (self.top - self.bottom) - self.overlap(frame)

    def distance(self, x: float, y: float) -> float:
        """From a place to the nearest edge."""
        return math.hypot(max(self.left - x, x - self.right, 0.0), max(self.bottom - y, y - self.top, 0.0))


class Dot(NamedTuple):
    """A point to be labelled: its place and the radius of its mark."""

    x: float
    y: float
    radius: float


def place_labels(
    dots: Sequence[Dot], sizes: Sequence[tuple[float, float]], marks: Sequence[Box], lines: Sequence[Box], frame: Box
) -> list[Box]:
    """A box for the label of each dot: the nearest one that covers nothing, or else the one that covers the least.

    Args:
        dots: the points, in the order in which they may choose.
        sizes: width and height of each label.
        marks: what neither a label nor the way back from it to its dot may cross; the dots' own marks too.
        lines: what labels may not cover.
        frame: where labels must lie.
    """
    solid, boxes = list(marks), []
    for dot, size in zip(dots, sizes, strict=True):
        best, least = Box(0, 0, 0, 0), math.inf
        for box in _candidates(dot, size):
            covered = box.outside(frame) + sum(box.overlap(other) for other in [*solid, *lines])
            if covered < least and not (covered == 0 and _way_crosses(dot, box, solid)):
                best, least = box, covered
            if least == 0:
                break
        boxes.append(best)
        solid.append(best)
    return boxes


def _candidates(dot: Dot, size: tuple[float, float]) -> Iterator[Box]:
    """Boxes around a dot, the near ones first."""
    width, height = size
    for ring in range(_RINGS):
        distance = dot.radius + 2 + ring * _STEP
        for index in range(_ANGLES):
            angle = 2 * math.pi * index / _ANGLES
            # The label's nearest edge, not its middle, keeps the distance.
            x = dot.x + math.cos(angle) * (distance + width / 2)
            y = dot.y + math.sin(angle) * (distance + height / 2)
            yield Box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def _way_crosses(dot: Dot, box: Box, solid: Sequence[Box]) -> bool:
    """Whether something stands between a dot's mark and the middle of its label."""
    x, y = (box.left + box.right) / 2, (box.bottom + box.top) / 2
    length = math.hypot(x - dot.x, y - dot.y)
    # A mark's own square reaches no further than this from its middle.
    for distance in range(math.ceil(1.5 * dot.radius), int(length), 2):
        part = distance / length
        here = dot.x + part * (x - dot.x), dot.y + part * (y - dot.y)
        if any(other.distance(*here) == 0 for other in solid):
            return True
    return False
