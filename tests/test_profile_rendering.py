"""Profiles as observed are what integrals say, however they are mixed, cut and grouped."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import ndtr

from blends import KERNELS, PSFS, gaussian, source
from kermes.errors import InputError
from kermes.geometry import Box
from kermes.kernels.profile_rendering import add_stamp, clear_rounding, fold_modes
from kermes.profiles import intensity
from kermes.psf import difference_kernels, model_psf
from kermes.rendering import KernelSet, convolve, frame_models, outer_box, render_scene, render_source
from kermes.scene import PointComponent, ProfileComponent, Scene, Source, frame_modes, stamp_modes

OPTICS = KernelSet(KERNELS, PSFS)
IMAGE = Box(0, 0, 70, 80)
OF_PEAK = 2e-6
"""Rounding of transforms in single precision, relative to the peak."""


def profile(center=(31.3, 36.8), radius=2.0, shear=(0.3, -0.2), index=1.5, side=40, spectrum=(40, 50, 60)):
    y, x = (int(np.floor(value + 0.5)) for value in center)
    return ProfileComponent(
        spectrum=np.array(spectrum, dtype=np.float32),
        center=np.array(center, dtype=float),
        radius=radius,
        shear=np.array(shear, dtype=float),
        index=index,
        sigma=0.8,
        box=Box(y - side // 2, x - side // 2, side, side),
    )


def of(*components):
    y, x = np.floor(components[0].center + 0.5).astype(int).tolist()
    return Source(peak=(y, x), components=components)


def rendered(*components, optics=OPTICS, within=IMAGE):
    return render_source(of(*components), optics, within)


def pixels_of(models, s):
    """Model of one source of several, and its box."""
    box = Box(*models.boxes[s].tolist())
    return models.pixels[:, models.offsets[s] : models.offsets[s + 1]].reshape(len(models.pixels), *box.shape), box


def gaussian_pixels(center, first, side, sigma):
    """A Gaussian of area one, integrated over pixels."""
    return np.diff(ndtr((np.arange(side + 1) + first - 0.5 - center) / sigma))


def a_mixture():
    """A scene of points, profiles, two in one, a free form on top, some beyond the edge, on stamps of two sides."""
    disc, bulge = profile(), profile(radius=0.9, index=3.0, spectrum=(9, 20, 30))
    free = gaussian(34, 40, 1.5, [8, 6, 4], IMAGE.shape)
    return Scene(
        sources=(
            of(disc, bulge),
            of(profile(center=(40.1, 30.2), radius=0, side=32)),
            of(profile(center=(36.4, 41.7), side=32), free),
            of(profile(center=(2.2, 77.9), radius=3.0)),
            Source(peak=(5, 5), components=()),
            source(gaussian(60, 20, 2.0, [5, 6, 7], IMAGE.shape)),
        ),
        box=IMAGE,
    )


def test_models_are_replaced_as_if_all_were_drawn_anew():
    before = a_mixture()
    sources = list(before.sources)
    sources[0] = replace(sources[0], components=sources[0].components[:1])
    sources[4] = replace(sources[4], components=(gaussian(8, 9, 1.5, [8, 6, 4], IMAGE.shape),))
    after = replace(before, sources=tuple(sources))
    changed = [0, 4]
    those = render_scene(replace(after, sources=tuple(after.sources[s] for s in changed)), OPTICS)
    got, expected = render_scene(before, OPTICS).replaced(changed, those), render_scene(after, OPTICS)
    for name in ("boxes", "offsets", "pixels"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))


# ---------------------------------------------------------------- against integrals


@pytest.mark.parametrize("center", [(30, 30), (30.5, 30.25), (29.7, 30.9)])
def test_a_gaussian_profile_is_seen_as_a_wider_gaussian(center):
    # A Sersic profile of index 0.5 holds half its light inside sqrt(2 ln 2) sigma, and variances add up.
    optics = KernelSet(KERNELS[:1], model_psf(1.8, 41)[None])
    one = profile(center=center, radius=2.0, shear=(0.4, 0), index=0.5, spectrum=(1,), side=48)
    pixels, box = rendered(one, optics=optics)
    variance = 2.0**2 / (2 * np.log(2))
    along_y = gaussian_pixels(center[0], box.y0, 48, np.sqrt(1.8**2 + variance * np.exp(-0.4)))
    along_x = gaussian_pixels(center[1], box.x0, 48, np.sqrt(1.8**2 + variance * np.exp(0.4)))
    expected = np.outer(along_y, along_x)
    # The table is within 2e-5 of the transforms.
    np.testing.assert_allclose(pixels[0], expected, rtol=0, atol=3e-5 * expected.max())


@pytest.mark.parametrize("index", [1.0, 2.0])
def test_a_profile_in_the_model_frame_is_its_integral(index):
    side, fine, center = 64, 15, np.array([0.2, -0.3])
    one = replace(profile(radius=2.5, index=index, side=side), center=center, box=Box(-32, -32, side, side))
    (e1, e2), e = one.shear, np.hypot(*one.shear)
    y, x = ((np.indices((side * fine, side * fine)) + 0.5) / fine - 0.5 - side // 2) - center[:, None, None]
    # The inverse of the form that multiplies the wave vector, of determinant one.
    square = (x**2 + y**2) * np.cosh(e) - (e1 * (x**2 - y**2) + 2 * e2 * x * y) * np.sinh(e) / e
    light = intensity(np.sqrt(square) / 2.5, index) / (2.5 * fine) ** 2
    k = 2 * np.pi * np.fft.fftfreq(side * fine, 1 / fine)
    window = np.exp(-0.5 * (0.8 * k) ** 2)
    blurred = np.fft.ifft2(np.fft.fft2(light) * np.outer(window, window)).real
    expected = blurred.reshape(side, fine, side, fine).sum(axis=(1, 3))
    # Modes that are left out, 1e-4, and light that comes back on the other side, 2e-4 for the larger index.
    np.testing.assert_allclose(one.evaluate()[0] / 40, expected, rtol=0, atol=4e-4 * expected.max())


def test_a_point_is_seen_as_the_psf():
    pixels, box = rendered(profile(center=(30, 30), radius=0, side=40, spectrum=(1, 1, 1)))
    expected = np.zeros_like(pixels)
    expected[(slice(None), *Box(20, 20, 21, 21).within(box))] = PSFS
    np.testing.assert_allclose(pixels, expected, rtol=0, atol=OF_PEAK * PSFS.max())


def test_what_is_seen_is_the_model_frame_after_the_difference_kernel():
    psfs = np.stack([model_psf(1.8, 41), model_psf(1.5, 41), model_psf(2.1, 41)])
    kernels = difference_kernels(psfs, model_psf(0.8))
    one = profile()
    pixels, box = rendered(one, optics=KernelSet(kernels, psfs))
    frame = np.zeros((3, *IMAGE.shape))
    frame[(slice(None), *one.box.within(IMAGE))] = one.evaluate()
    expected = convolve(frame, kernels)[(slice(None), *box.within(IMAGE))]
    # Light that leaves the stamp, and aliases of the model frame, which the kernel takes for light that is sampled.
    np.testing.assert_allclose(pixels, expected, rtol=0, atol=2e-3 * expected.max())


# ---------------------------------------------------------------- what must hold


@pytest.mark.parametrize("radius", [0, 1.0, 30.0])
def test_all_flux_of_a_profile_is_on_its_stamp(radius):
    one = profile(radius=radius, index=4.0)
    total = rendered(one)[0].sum(axis=(1, 2), dtype=float)
    # The table is within 2e-5 of the transforms, and what may be rounding is cleared.
    np.testing.assert_allclose(total, one.spectrum * PSFS.sum(axis=(1, 2)), rtol=3e-5)


def test_light_that_leaves_the_stamp_comes_back_on_the_other_side():
    one = profile(radius=0, spectrum=(1, 1, 1))
    moved = replace(one, box=one.box.shift(15, -13))
    expected = np.roll(rendered(one)[0], (-15, 13), axis=(1, 2))
    np.testing.assert_allclose(rendered(moved)[0], expected, rtol=0, atol=OF_PEAK * expected.max())


def test_a_psf_wider_than_the_stamp_wraps_around():
    one = profile(radius=0, center=(30, 30), side=12, spectrum=(1, 1, 1))
    expected = np.zeros((3, 12, 12))
    for y, x in np.ndindex(21, 21):
        expected[:, (y - 10 + 6) % 12, (x - 10 + 6) % 12] += PSFS[:, y, x]
    np.testing.assert_allclose(rendered(one)[0], expected, rtol=0, atol=OF_PEAK * expected.max())


@pytest.mark.parametrize("axis", [1, 2], ids=["y", "x"])
def test_mirroring_commutes_with_rendering(axis):
    # About a pixel of a stamp of even side: its first row has no counterpart.
    sign = np.where(np.arange(1, 3) == axis, -1, 1)
    one = profile(center=(30, 30))
    here = replace(one, center=one.center + [0.3, 0.2])
    there = replace(one, center=one.center + sign * [0.3, 0.2], shear=one.shear * [1, -1])
    a, b = (np.delete(rendered(each)[0], 0, axis=axis) for each in (here, there))
    np.testing.assert_allclose(np.flip(a, axis), b, rtol=0, atol=OF_PEAK * a.max())


def test_shifting_by_whole_pixels_shifts_the_pixels():
    one = profile()
    moved = replace(one, center=one.center + [3, -5], box=one.box.shift(3, -5))
    (here, box), (there, other) = rendered(one), rendered(moved)
    assert other == box.shift(3, -5)
    np.testing.assert_array_equal(here, there)


def test_negative_flux_is_drawn_as_it_is():
    positive, _ = rendered(profile(spectrum=(1, 2, 3)))
    negative, _ = rendered(profile(spectrum=(1, -2, 3)))
    np.testing.assert_array_equal(negative[1], -positive[1])


def test_nothing_is_drawn_outside_of_the_image():
    one = profile(center=(3.2, 77.9))
    pixels, box = rendered(one)
    whole, around = rendered(one, within=Box(-50, -50, 200, 200))
    assert (box, around) == (one.box & IMAGE, one.box)
    np.testing.assert_array_equal(pixels, whole[(slice(None), *box.within(around))])


def test_a_profile_out_of_sight_has_no_pixels():
    pixels, box = rendered(profile(), within=Box(0, 0, 5, 5))
    assert pixels.shape == (3, 0, 0)
    assert box.is_empty


# ---------------------------------------------------------------- mixtures


def test_a_source_has_the_same_bits_alone_and_with_its_blend():
    scene = a_mixture()
    together = render_scene(scene, OPTICS)
    for s, one in enumerate(scene.sources):
        pixels, box = render_source(one, OPTICS, scene.box)
        expected, where = pixels_of(together, s)
        assert box.area == where.area
        np.testing.assert_array_equal(pixels, expected)


@given(st.permutations(range(6)))
def test_the_order_of_the_sources_does_not_matter(order):
    scene = a_mixture()
    expected = render_scene(scene, OPTICS)
    permuted = render_scene(replace(scene, sources=tuple(scene.sources[s] for s in order)), OPTICS)
    for place, s in enumerate(order):
        np.testing.assert_array_equal(pixels_of(permuted, place)[0], pixels_of(expected, s)[0])


def test_components_of_all_kinds_add_up():
    one, two = profile(), profile(radius=0.9, index=3.0, spectrum=(9, 20, 30))
    other_stamp = replace(two, box=Box(18, 20, 32, 32))
    free = gaussian(34, 40, 1.5, [8, 6, 4], IMAGE.shape)
    pixels, box = rendered(one, two, other_stamp, free)
    expected = np.zeros_like(pixels)
    for part in (of(one), of(two), of(other_stamp), source(free)):
        image, where = render_source(part, OPTICS, IMAGE)
        assert where & box == where
        expected[(slice(None), *where.within(box))] += image
    np.testing.assert_allclose(pixels, expected, rtol=0, atol=OF_PEAK * expected.max())


def test_the_model_frame_is_what_the_components_evaluate_to():
    scene = a_mixture()
    models = frame_models(scene, 3)
    for s, one in enumerate(scene.sources):
        pixels, box = pixels_of(models, s)
        if not one.components:
            assert pixels.size == 0
            continue
        assert box == one.box & IMAGE
        expected = one.model(3)[(slice(None), *box.within(one.box))]
        np.testing.assert_allclose(pixels, expected, rtol=0, atol=OF_PEAK * expected.max())


def test_the_model_frame_may_differ_between_components():
    one = replace(profile(), sigma=0.6)
    models = frame_models(Scene(sources=(of(one), of(profile())), box=IMAGE), 3)
    for s, each in enumerate((one, profile())):
        expected = each.evaluate()
        np.testing.assert_allclose(pixels_of(models, s)[0], expected, rtol=0, atol=OF_PEAK * expected.max())


def test_profiles_need_the_observed_psfs():
    with pytest.raises(InputError, match="kernels must hold the observed PSFs to render profiles, got none"):
        rendered(profile(), optics=KernelSet(KERNELS))


def test_other_kinds_are_refused():
    point = PointComponent(spectrum=np.ones(3, np.float32), center=np.array([30.0, 30.0]), sigma=0.8)
    with pytest.raises(
        InputError, match="components must be factorized, cubes, profiles or templates here, got a PointComponent"
    ):
        rendered(point)


def test_the_reach_of_a_blend_is_half_a_psf_inside_the_image():
    assert outer_box(Box(5, 30, 20, 20), PSFS, IMAGE) == Box.from_bounds(0, 35, 20, 60)


# ---------------------------------------------------------------- slow twins


@pytest.mark.nojit
@pytest.mark.parametrize("modes", [stamp_modes(6), frame_modes(6, 0.8)], ids=["observed", "model frame"])
def test_modes_are_put_where_they_belong(modes):
    rng = np.random.default_rng(1)
    column = rng.normal(size=(2, modes.lengths.sum())).astype(np.float32)
    plane = rng.normal(size=2 * 6 * 4).astype(np.float32)
    expected = np.zeros((2, 6 * 4))
    for part in range(2):
        np.add.at(expected[part], modes.places, modes.weights[part] * column[part, modes.numbers])
    fold_modes(column, modes.numbers, modes.places, modes.weights, plane)
    np.testing.assert_allclose(plane.reshape(-1, 2).T, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", [2, 6, 32])
def test_every_mode_of_a_stamp_counts_once(side):
    modes = stamp_modes(side)
    for weights in modes.weights:
        np.testing.assert_array_equal(np.bincount(modes.places, weights=weights), 1)
    assert modes.lengths.sum() == len(modes.numbers)


@pytest.mark.nojit
@given(st.integers(-6, 9), st.integers(-6, 9), st.integers(0, 5), st.integers(0, 5))
def test_a_stamp_is_added_to_the_pixels_that_it_shares(y0, x0, height, width):
    stamp, joined = Box(y0, x0, 4, 4), Box(1, 2, height, width)
    plane = np.arange(1, 17, dtype=np.float32).reshape(4, 4)
    out = np.ones(joined.area, dtype=np.float32)
    expected = np.ones(joined.shape, dtype=np.float32)
    expected[stamp.within(joined)] += np.float32(3.0) * plane[joined.within(stamp)]
    add_stamp(out, plane, np.float32(3.0), np.array([y0, x0, 4, 4]), np.array([1, 2, height, width]))
    np.testing.assert_array_equal(out, expected.ravel())


@pytest.mark.nojit
def test_only_what_is_rounding_is_cleared():
    plane = np.array([[-1.0, 2e-6, 9e-7], [0.5, -9e-7, -2e-6]], dtype=np.float32)
    clear_rounding(plane, np.full(3, 9.0, dtype=np.float32))
    np.testing.assert_array_equal(plane, np.float32([[-1.0, 2e-6, 0], [0.5, 0, -2e-6]]))
