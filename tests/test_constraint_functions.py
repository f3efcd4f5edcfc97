"""The constraints that users call agree with their slow twins, leave their input alone, and are projections."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kermes import constraints
from kermes.errors import InputError, ShapeError

pytestmark = pytest.mark.nojit

ROUNDING = 9 * 4 * 6e-8
"""One of float32 for each weight and sum in nine rings, of pixels of up to one."""

WEIGHTINGS = ("angle", "flat", "nearest")


@st.composite
def morphologies(draw, elements=st.floats(-1, 1, width=32)):  # noqa: B008, a strategy is immutable
    """Draw pixels of a small array, and a centre inside."""
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9))
    morphology = draw(hnp.arrays(np.float32, shape, elements=elements))
    return morphology, (draw(st.integers(0, shape[0] - 1)), draw(st.integers(0, shape[1] - 1)))


# ---------------------------------------------------------------- slow twins


def slow_monotonic(morphology, center, weighting, min_gradient):
    """Weighted monotonicity, pixel by pixel in order of radius."""
    h, w = morphology.shape
    out = np.array(morphology, dtype=float)

    def radius2(pixel):
        return (pixel[0] - center[0]) ** 2 + (pixel[1] - center[1]) ** 2

    def angle(pixel):
        return 0.0 if radius2(pixel) == 0 else np.arctan2(pixel[0] - center[0], pixel[1] - center[1])

    for pixel in sorted(np.ndindex(h, w), key=radius2)[1:]:
        around = [(pixel[0] + dy, pixel[1] + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        inner = [near for near in around if radius2(near) < radius2(pixel)]
        weights = {near: abs(np.cos(angle(pixel) - angle(near))) for near in inner}
        if weighting == "flat":
            weights = dict.fromkeys(inner, 1.0)
        elif weighting == "nearest":
            # The centre is the nearest one wherever it is a neighbour; its own angle says nothing.
            best = min(inner, key=lambda near: (radius2(near) > 0, -round(weights[near], 9)))
            weights = {near: float(near == best) for near in inner}
        values = [out[near] if 0 <= near[0] < h and 0 <= near[1] < w else 0.0 for near in inner]
        cap = (1 - min_gradient) * np.average(values, weights=[weights[near] for near in inner])
        out[pixel] = min(out[pixel], cap)
    return out


def slow_soft_symmetric(morphology, center, strength):
    h, w = morphology.shape
    out = np.zeros((h, w))
    for y, x in np.ndindex(h, w):
        my, mx = 2 * center[0] - y, 2 * center[1] - x
        mirror = float(morphology[my, mx]) if 0 <= my < h and 0 <= mx < w else 0.0
        out[y, x] = 0.5 * strength * (morphology[y, x] + mirror) + (1 - strength) * morphology[y, x]
    return out


def slow_connected(morphology, centers):
    """Spread from the centres until nothing changes."""
    reached = np.zeros(morphology.shape, dtype=bool)
    for center in centers:
        reached[center] = morphology[center] > 0
    while True:
        before = reached.sum()
        for y, x in np.ndindex(*morphology.shape):
            if morphology[y, x] > 0:
                near = reached[max(y - 1, 0) : y + 2, x].any() or reached[y, max(x - 1, 0) : x + 2].any()
                reached[y, x] = near
        if reached.sum() == before:
            return np.where(reached, morphology, 0)


# ---------------------------------------------------------------- monotonic


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@given(morphologies(), st.sampled_from([0.0, 0.1, 0.5]))
def test_monotonicity_agrees_with_its_slow_twin(weighting, drawn, min_gradient):
    got = constraints.monotonic(*drawn, weighting=weighting, min_gradient=min_gradient)
    np.testing.assert_allclose(got, slow_monotonic(*drawn, weighting, min_gradient), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@given(drawn=morphologies())
def test_making_monotonic_twice_is_making_monotonic_once(weighting, drawn):
    once = constraints.monotonic(*drawn, weighting=weighting)
    np.testing.assert_array_equal(constraints.monotonic(once, drawn[1], weighting=weighting), once)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_sum_to_one_less_the_least_gradient(weighting):
    a, b = np.tril_indices(13)
    total = constraints.monotonic_weights(12, weighting, 0.25)[a, b].sum(axis=1)
    np.testing.assert_allclose(total[1:], 0.75, rtol=0, atol=2e-7)  # rounding of float32


def test_nearest_compares_with_one_neighbour_only():
    weights = constraints.monotonic_weights(12, "nearest")
    a, b = np.tril_indices(13)
    assert (np.count_nonzero(weights[a, b], axis=1)[1:] == 1).all()


def test_least_gradient_lowers_a_plateau_geometrically():
    got = constraints.monotonic(np.ones((1, 4)), (0, 0), min_gradient=0.5, weighting="nearest")
    np.testing.assert_array_equal(got, [[1, 0.5, 0.25, 0.125]])


@given(morphologies())
def test_the_brightest_pixel_near_a_centre_is_near_and_brightest(drawn):
    morphology, (cy, cx) = drawn
    near = morphology[max(cy - 1, 0) : cy + 2, max(cx - 1, 0) : cx + 2]
    y, x = constraints.brightest_near(morphology, (cy, cx))
    assert max(abs(y - cy), abs(x - cx)) <= 1
    assert morphology[y, x] == near.max() or (near == near.max()).sum() > 1


def test_repair_of_an_orphan_continues_the_slope():
    repaired, reached = constraints.monotone_mask([[9, 7, 5, 6, 1]], (0, 0))
    np.testing.assert_array_equal(repaired, [[9, 7, 5, 3, 1]])
    assert reached.all()


def test_mask_without_repair_leaves_out_what_rises():
    repaired, reached = constraints.monotone_mask([[9, 7, 5, 6, 1]], (0, 0), n_repairs=0)
    np.testing.assert_array_equal(repaired, [[9, 7, 5, 6, 1]])
    np.testing.assert_array_equal(reached, [[True, True, True, False, False]])


# ---------------------------------------------------------------- symmetric


@given(morphologies(), st.floats(0, 1))
def test_soft_symmetry_agrees_with_its_slow_twin(drawn, strength):
    got = constraints.soft_symmetric(*drawn, strength)
    np.testing.assert_allclose(got, slow_soft_symmetric(*drawn, strength), rtol=0, atol=4 * 6e-8)  # four roundings


@given(morphologies())
def test_soft_symmetry_of_no_strength_changes_nothing(drawn):
    np.testing.assert_array_equal(constraints.soft_symmetric(*drawn, 0), drawn[0])


@given(morphologies())
def test_symmetric_pixels_equal_their_mirror_images(drawn):
    morphology, (cy, cx) = drawn
    h, w = morphology.shape
    padded = np.zeros((2 * h + 1, 2 * w + 1))
    padded[h - cy : 2 * h - cy, w - cx : 2 * w - cx] = constraints.symmetric(morphology, (cy, cx))
    np.testing.assert_array_equal(padded, padded[::-1, ::-1])


# ---------------------------------------------------------------- compact


@given(morphologies(), st.floats(0, 3))
def test_no_pixel_below_the_background_in_all_bands_is_left(drawn, threshold):
    spectrum, noise = np.array([2.0, 1.0, 0.0]), np.array([1.0, 1.0, 1.0])
    got = constraints.above_background(drawn[0], spectrum, noise, threshold)
    brightest = np.max(spectrum[:, None, None] * drawn[0] / noise[:, None, None], axis=0)
    # Where rounding of float32 decides, either is right.
    sure = np.abs(brightest - threshold) > 1e-6
    expected = np.where((brightest >= threshold) & (drawn[0] > 0), drawn[0], 0)
    np.testing.assert_array_equal(got[sure], expected[sure])


def test_without_positive_flux_nothing_is_above_the_background():
    assert not constraints.above_background(np.ones((2, 2)), [0.0, -1.0], [1.0, 1.0], 0.0).any()


@given(morphologies(), st.data())
def test_connected_agrees_with_its_slow_twin(drawn, data):
    morphology, center = drawn
    other = tuple(data.draw(st.integers(0, side - 1)) for side in morphology.shape)
    got = constraints.connected(morphology, [center, other])
    np.testing.assert_array_equal(got, slow_connected(morphology, [center, other]))


def test_connected_to_nothing_is_nothing():
    assert not constraints.connected(np.ones((2, 3)), []).any()


def test_a_dark_or_broken_centre_becomes_positive():
    for value in (0.0, -1.0, np.nan):
        got = constraints.centered([[1.0, value]], (0, 1))
        np.testing.assert_array_equal(got, np.array([[1.0, 1e-20]], dtype=np.float32))


@given(morphologies(st.floats(0.25, 1, width=32)))
def test_a_bright_centre_stays(drawn):
    np.testing.assert_array_equal(constraints.centered(*drawn), drawn[0])


# ---------------------------------------------------------------- values


def test_positive_replaces_what_is_negative_or_not_finite():
    got = constraints.positive([-1.0, 0.5, np.nan, np.inf], floor=0.25)
    np.testing.assert_array_equal(got, [0.25, 0.5, 0.25, 0.25])


@given(morphologies(st.floats(0.125, 1, width=32)))
def test_the_largest_normalised_value_is_one(drawn):
    assert constraints.normalised(drawn[0]).max() == 1


@given(morphologies(st.floats(0.125, 1, width=32)))
def test_the_sum_of_normalised_values_is_one(drawn):
    # One rounding of float32 for each of the pixels.
    assert abs(constraints.normalised(drawn[0], to="sum").sum(dtype=float) - 1) < 1e-7 * drawn[0].size


@pytest.mark.parametrize("to", ["max", "sum"])
def test_what_has_no_light_is_not_normalised(to):
    dark = np.array([[0.0, -1.0]], dtype=np.float32)
    np.testing.assert_array_equal(constraints.normalised(dark, to=to), dark)


# ---------------------------------------------------------------- all of them


CALLS = {
    "positive": lambda m: constraints.positive(m),
    "monotonic": lambda m: constraints.monotonic(m, (1, 2)),
    "monotone_mask": lambda m: constraints.monotone_mask(m, (1, 2))[0],
    "symmetric": lambda m: constraints.symmetric(m, (1, 2)),
    "soft_symmetric": lambda m: constraints.soft_symmetric(m, (1, 2), 0.5),
    "above_background": lambda m: constraints.above_background(m, [1.0], [1.0], 0.5),
    "centered": lambda m: constraints.centered(m, (1, 2), floor=2.0),
    "connected": lambda m: constraints.connected(m, [(1, 2)]),
    "normalised": lambda m: constraints.normalised(m),
}


@pytest.mark.parametrize("name", CALLS)
def test_input_is_not_changed(name):
    morphology = np.random.default_rng(3).uniform(-1, 1, (5, 4)).astype(np.float32)
    before = morphology.copy()
    assert not np.array_equal(CALLS[name](morphology), before)
    np.testing.assert_array_equal(morphology, before)


@pytest.mark.parametrize("name", [name for name in CALLS if name not in ("monotone_mask", "soft_symmetric")])
def test_projecting_twice_is_projecting_once(name):
    morphology = np.random.default_rng(3).uniform(0, 1, (5, 4)).astype(np.float32)
    once = CALLS[name](morphology)
    np.testing.assert_array_equal(CALLS[name](once), once)


@pytest.mark.parametrize("name", [name for name in CALLS if name not in ("positive", "above_background", "normalised")])
def test_a_centre_outside_is_refused(name):
    with pytest.raises(InputError, match=r"center must be a pixel \(y, x\) of the morphology of shape \(1, 3\)"):
        CALLS[name](np.ones((1, 3)))


def test_a_morphology_that_is_no_image_is_refused():
    with pytest.raises(ShapeError, match=r"morphology must have shape \(height, width\).*got \(3,\)"):
        constraints.normalised(np.ones(3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: constraints.monotonic([[1]], (0, 0), weighting="cosine"), "weighting must be .*got 'cosine'"),
        (lambda: constraints.monotonic([[1]], (0, 0), min_gradient=1), "min_gradient must be .*got 1"),
        (lambda: constraints.monotone_mask([[1]], (0, 0), n_repairs=-1), "n_repairs must be >= 0, got -1"),
        (lambda: constraints.soft_symmetric([[1]], (0, 0), 2), "strength must lie between 0 and 1, got 2"),
        (lambda: constraints.normalised([[1]], to="mean"), "to must be 'max' or 'sum', got 'mean'"),
        (lambda: constraints.above_background([[1]], [1], [1, 1], 1), r"shape \(bands,\), got \(1,\) and \(2,\)"),
    ],
    ids=["weighting", "min_gradient", "n_repairs", "strength", "to", "bands"],
)
def test_a_setting_out_of_range_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
