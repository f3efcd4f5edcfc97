"""Boxes behave like sets of pixels."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kermes.geometry import Box

coordinates = st.integers(-8, 8)
sides = st.integers(0, 6)
boxes = st.builds(Box, coordinates, coordinates, sides, sides)


def pixels(box: Box) -> set[tuple[int, int]]:
    return {(y, x) for y in range(box.y0, box.y1) for x in range(box.x0, box.x1)}


@given(boxes, boxes)
def test_intersection_holds_the_pixels_of_both(a, b):
    assert pixels(a & b) == pixels(a) & pixels(b)


@given(boxes, boxes)
def test_union_is_the_smallest_box_around_both(a, b):
    points = sorted(pixels(a) | pixels(b))
    assert pixels(a | b) == pixels(Box.around(points))


@given(boxes)
def test_area_counts_pixels(box):
    assert box.area == len(pixels(box))
    assert box.is_empty == (box.area == 0)


@given(boxes, st.tuples(coordinates, coordinates))
def test_a_point_is_inside_when_its_pixel_is(box, point):
    assert (point in box) == (point in pixels(box))


@given(boxes, st.integers(-4, 4))
def test_growing_adds_a_rim_and_shrinking_takes_one_off(box, n_pixels):
    grown = box.grow(n_pixels)
    assert grown.height == max(0, box.height + 2 * n_pixels)
    assert grown.width == max(0, box.width + 2 * n_pixels)


@given(boxes, coordinates, coordinates)
def test_shifting_moves_every_pixel(box, dy, dx):
    assert pixels(box.shift(dy, dx)) == {(y + dy, x + dx) for y, x in pixels(box)}


@given(boxes, boxes)
def test_within_cuts_the_shared_pixels_out_of_an_array(inner, outer):
    rows, columns = np.mgrid[outer.y, outer.x] if not outer.is_empty else np.zeros((2, *outer.shape), int)
    rows = rows.reshape(outer.shape)[inner.within(outer)]
    columns = columns.reshape(outer.shape)[inner.within(outer)]
    assert set(zip(rows.ravel().tolist(), columns.ravel().tolist(), strict=True)) == pixels(inner & outer)


@given(st.lists(st.tuples(coordinates, coordinates), max_size=5))
def test_box_around_points_touches_the_outermost(points):
    box = Box.around(points)
    assert all(point in box for point in points)
    if points:
        assert box.origin == (min(y for y, _ in points), min(x for _, x in points))
    else:
        assert box.is_empty


def test_box_where_a_condition_holds_is_tight():
    condition = np.zeros((7, 9), dtype=bool)
    condition[2, 3] = condition[5, 4] = True
    assert Box.where(condition) == Box(2, 3, 4, 2)
    assert Box.where(np.zeros((3, 3), dtype=bool)).is_empty


def test_box_of_an_array_has_its_last_two_axes():
    assert Box.of_shape((6, 10, 20), 3, 4) == Box(3, 4, 10, 20)


def test_crossed_bounds_make_an_empty_box():
    assert Box.from_bounds(5, 3, 0, 4).is_empty


def test_negative_sides_are_refused():
    with pytest.raises(ValueError, match="sides >= 0, got height -1"):
        Box(0, 0, -1, 2)
