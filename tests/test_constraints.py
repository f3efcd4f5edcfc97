"""Constraints are projections, prefer no direction, and agree with their slow twins."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import reference
from kermes.constraints import monotonic_weights
from kermes.geometry import Box
from kermes.kernels.constraints import (
    brightest_near,
    make_monotonic,
    make_symmetric,
    monotone_mask,
)

pytestmark = pytest.mark.nojit

WEIGHTS = monotonic_weights(12)
ROUNDING = 9 * 4 * 6e-8
"""One of float32 for each weight and sum in nine rings, of pixels of up to one."""


@st.composite
def morphologies(draw, elements=st.floats(-1, 1, width=32)):  # noqa: B008, a strategy is immutable
    """Draw pixels of a small array, and a centre inside."""
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9))
    morphology = draw(hnp.arrays(np.float32, shape, elements=elements))
    return morphology, draw(st.integers(0, shape[0] - 1)), draw(st.integers(0, shape[1] - 1))


# Few different values, so that many pixels are equal.
steps = morphologies(st.sampled_from([np.float32(value) for value in (-1, 0, 1, 2, 3)]))


def monotonic(morphology, cy, cx):
    out = np.ascontiguousarray(morphology).copy()
    make_monotonic(out, cy, cx, WEIGHTS)
    return out


def symmetric(morphology, cy, cx):
    out = np.ascontiguousarray(morphology).copy()
    make_symmetric(out, cy, cx)
    return out


def masked(image, cy, cx, n_passes):
    """Image after repair, accepted pixels, and their bounds as a box."""
    image = np.ascontiguousarray(image).copy()
    reached = np.full(image.shape, 7, dtype=np.uint8)
    bounds = monotone_mask(image, cy, cx, n_passes, reached)
    assert reached.max() <= 1
    return image, reached.astype(bool), Box.from_bounds(*bounds)


# ---------------------------------------------------------------- weighted monotonicity


def test_weights_of_the_inner_neighbours_sum_to_one():
    a, b = np.tril_indices(13)
    total = WEIGHTS[a, b].sum(axis=1)
    np.testing.assert_allclose(total[1:], 1, rtol=0, atol=2e-7)  # rounding of float32
    assert total[0] == 0  # the centre has none


@given(morphologies())
def test_monotonicity_agrees_with_the_slow_twin(drawn):
    np.testing.assert_allclose(monotonic(*drawn), reference.make_monotonic(*drawn), rtol=0, atol=ROUNDING)


@given(morphologies())
def test_making_monotonic_twice_is_making_monotonic_once(drawn):
    morphology, cy, cx = drawn
    once = monotonic(morphology, cy, cx)
    np.testing.assert_array_equal(monotonic(once, cy, cx), once)


@given(morphologies())
def test_making_monotonic_never_brightens_a_pixel(drawn):
    assert (monotonic(*drawn) <= drawn[0]).all()


@given(morphologies(st.floats(0, 1, width=32)))
def test_nothing_monotonic_is_brighter_than_its_centre(drawn):
    morphology, cy, cx = drawn
    assert monotonic(morphology, cy, cx).max() <= morphology[cy, cx] + ROUNDING


@given(morphologies())
def test_flipping_and_transposing_commute_with_making_monotonic(drawn):
    morphology, cy, cx = drawn
    h, w = morphology.shape
    expected = monotonic(morphology, cy, cx)
    # The order of the sums differs.
    np.testing.assert_allclose(monotonic(morphology[::-1], h - 1 - cy, cx), expected[::-1], rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(monotonic(morphology[:, ::-1], cy, w - 1 - cx), expected[:, ::-1], rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(monotonic(morphology.T, cx, cy), expected.T, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("sigma", [0.7, 1.0, 2.0, 4.0])
def test_a_gaussian_is_monotonic_already(sigma):
    y, x = np.mgrid[:13, :13] - 6
    morphology = np.exp(-0.5 * (y**2 + x**2) / sigma**2).astype(np.float32)
    np.testing.assert_array_equal(monotonic(morphology, 6, 6), morphology)


def test_a_neighbour_is_cut_off():
    morphology = np.zeros((7, 13), dtype=np.float32)
    morphology[3, 3] = morphology[3, 9] = 1
    expected = np.zeros_like(morphology)
    expected[3, 3] = 1
    np.testing.assert_array_equal(monotonic(morphology, 3, 3), expected)


# ---------------------------------------------------------------- the brightest pixel


@given(morphologies())
def test_no_pixel_next_to_the_centre_is_brighter_than_the_brightest(drawn):
    morphology, cy, cx = drawn
    y, x = brightest_near(morphology, cy, cx, True)
    assert max(abs(y - cy), abs(x - cx)) <= 1
    assert morphology[y, x] == morphology[max(cy - 1, 0) : cy + 2, max(cx - 1, 0) : cx + 2].max()


@given(morphologies())
def test_the_brightest_is_the_centre_unless_one_pixel_is_brighter_than_all_others(drawn):
    morphology, cy, cx = drawn
    near = morphology[max(cy - 1, 0) : cy + 2, max(cx - 1, 0) : cx + 2]
    y, x = brightest_near(morphology, cy, cx, False)
    if (near == near.max()).sum() == 1:
        assert morphology[y, x] == near.max()
    else:
        assert (y, x) == (cy, cx)


@given(steps)
def test_the_centre_wins_among_equals(drawn):
    morphology, cy, cx = drawn
    y, x = brightest_near(morphology, cy, cx, False)
    assert (y, x) == (cy, cx) or morphology[y, x] > morphology[cy, cx]


@given(steps)
def test_the_first_in_row_order_wins_among_equals_if_wanted(drawn):
    morphology, cy, cx = drawn
    top, left = max(cy - 1, 0), max(cx - 1, 0)
    near = morphology[top : cy + 2, left : cx + 2]
    y, x = np.unravel_index(near.argmax(), near.shape)
    assert brightest_near(morphology, cy, cx, True) == (y + top, x + left)


# ---------------------------------------------------------------- symmetry


@given(morphologies())
def test_symmetry_agrees_with_the_slow_twin(drawn):
    np.testing.assert_array_equal(symmetric(*drawn), reference.make_symmetric(*drawn))


@given(morphologies(st.floats(0, 1, width=32)))
def test_making_symmetric_twice_is_making_symmetric_once(drawn):
    morphology, cy, cx = drawn
    once = symmetric(morphology, cy, cx)
    np.testing.assert_array_equal(symmetric(once, cy, cx), once)


# ---------------------------------------------------------------- monotone mask


@given(steps)
def test_mask_without_repair_agrees_with_the_slow_twin(drawn):
    _, reached, _ = masked(*drawn, 0)
    np.testing.assert_array_equal(reached, reference.falling_pixels(*drawn))


@given(steps)
def test_mask_without_repair_leaves_the_image_alone(drawn):
    np.testing.assert_array_equal(masked(*drawn, 0)[0], drawn[0])


@given(steps, st.integers(0, 3))
def test_bounds_of_the_mask_are_tight(drawn, n_passes):
    _, reached, box = masked(*drawn, n_passes)
    assert box == Box.where(reached)


@given(morphologies(), st.integers(0, 3))
def test_more_passes_accept_no_fewer_pixels(drawn, n_passes):
    fewer, more = masked(*drawn, n_passes)[1], masked(*drawn, n_passes + 1)[1]
    assert (more | ~fewer).all()


@given(morphologies(), st.integers(0, 3))
def test_accepted_pixels_but_the_centre_are_positive(drawn, n_passes):
    morphology, cy, cx = drawn
    image, reached, _ = masked(morphology, cy, cx, n_passes)
    reached[cy, cx] = False
    assert (image[reached] > 0).all()


def test_an_orphan_on_a_falling_slope_is_repaired_by_continuing_it():
    image = np.array([[9, 7, 5, 6, 1]], dtype=np.float32)
    repaired, reached, _ = masked(image, 0, 0, 1)
    np.testing.assert_array_equal(repaired, [[9, 7, 5, 3, 1]])
    assert reached.all()


def test_an_orphan_that_no_slope_leads_to_is_removed():
    image = np.array([[5, 1, 4, 2]], dtype=np.float32)
    repaired, reached, _ = masked(image, 0, 0, 1)
    np.testing.assert_array_equal(repaired, [[5, 1, 0, 2]])
    np.testing.assert_array_equal(reached, [[True, True, False, False]])
