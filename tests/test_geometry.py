"""Boxes behave like sets of pixels."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kermes.geometry import Box, Footprint, Footprints

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


masks = arrays(bool, st.tuples(st.integers(0, 6), st.integers(0, 7)))


@given(masks, coordinates, coordinates)
def test_a_footprint_holds_the_pixels_of_its_mask(mask, y0, x0):
    footprint = Footprint.of_mask(mask, y0, x0)
    expected = np.argwhere(mask) + [y0, x0]
    np.testing.assert_array_equal(footprint.pixels(), expected)
    assert footprint.area == mask.sum()
    assert footprint.box == (Box.around(expected) if mask.any() else Box(0, 0, 0, 0))
    np.testing.assert_array_equal(footprint.mask(Box.of_shape(mask.shape, y0, x0)), mask)


@given(masks, boxes)
def test_a_footprint_is_cut_by_a_box(mask, box):
    expected = np.zeros(box.shape, dtype=bool)
    for y, x in np.argwhere(mask):
        if (y, x) in box:
            expected[y - box.y0, x - box.x0] = True
    np.testing.assert_array_equal(Footprint.of_mask(mask).mask(box), expected)


@given(masks)
def test_runs_are_as_long_as_they_can_be(mask):
    spans = Footprint.of_mask(mask).spans
    assert (spans[:, 2] > spans[:, 1]).all()
    same_row = spans[1:, 0] == spans[:-1, 0]
    assert (spans[1:, 1] > spans[:-1, 2])[same_row].all()


@given(arrays(np.int64, (5, 6), elements=st.integers(0, 3)))
def test_footprints_of_labels_are_those_of_each_label(labels):
    footprints = Footprints.of_labels(labels, {1: 11, 3: 33, 7: 77})
    assert list(footprints) == [11, 33, 77]
    for label, number in ((1, 11), (3, 33), (7, 77)):
        np.testing.assert_array_equal(footprints[number].pixels(), np.argwhere(labels == label))
    np.testing.assert_array_equal(footprints.shifted(2, -3)[11].spans, footprints[11].shift(2, -3).spans)


def test_footprints_are_a_mapping():
    footprints = Footprints.of(
        {4: Footprint.of_mask(np.eye(3, dtype=bool)), 2: Footprint.of_mask(np.zeros((2, 2), bool))}
    )
    assert (len(footprints), list(footprints), 2 in footprints, 3 in footprints) == (2, [4, 2], True, False)
    assert [footprints[number].area for number in footprints] == [3, 0]
