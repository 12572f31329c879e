"""Labels in a picture: none over another, over a mark or over a line, while there is room."""

from hypothesis import given
from hypothesis import strategies as st

from dtbert.profiling.labels import Box, Dot, place_labels

FRAME = Box(0, 0, 600, 400)
LINE = [Box(x, 300, x + 4, 304) for x in range(0, 600, 4)]


@given(
    places=st.lists(st.tuples(st.floats(200, 400), st.floats(100, 250)), min_size=1, max_size=7),
    radius=st.floats(2, 8),
    widths=st.lists(st.floats(10, 60), min_size=7, max_size=7),
)
def test_labels_cover_nothing(places: list[tuple[float, float]], radius: float, widths: list[float]) -> None:
    dots = [Dot(x, y, radius) for x, y in places]
    marks = [Box(x - radius, y - radius, x + radius, y + radius) for x, y, _ in dots]
    sizes = [(width, 8.0) for width in widths[: len(dots)]]
    boxes = place_labels(dots, sizes, marks, LINE, FRAME)
    for number, (box, (width, height)) in enumerate(zip(boxes, sizes, strict=True)):
        assert abs(box.right - box.left - width) < 1e-9
        assert abs(box.top - box.bottom - height) < 1e-9
        assert box.outside(FRAME) < 1e-6
        assert not any(box.overlap(other) for other in [*marks, *LINE, *boxes[:number]])


def test_lonely_label_stands_right_beside_its_dot() -> None:
    (box,) = place_labels([Dot(100, 100, 5)], [(40, 10)], [Box(95, 95, 105, 105)], [], FRAME)
    assert box == Box(107, 95, 147, 105)


def test_without_room_the_least_is_covered() -> None:
    frame = Box(0, 0, 30, 30)
    mark = Box(5, 5, 25, 25)
    (box,) = place_labels([Dot(15, 15, 10)], [(20, 12)], [mark], [], frame)
    assert 0 < box.outside(frame) + box.overlap(mark) < 20 * 12
