"""Rendering is a convolution, its adjoint belongs to it, and components survive being packed."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import reference
from blends import KERNELS, PSFS, TARGET, gaussian, source, three_sources
from kermes.errors import ShapeError
from kermes.geometry import Box
from kermes.rendering import (
    Convolution,
    KernelSet,
    Rendered,
    combine_sources,
    convolve,
    pack,
    render_packed,
    render_source,
    unpack,
)
from kermes.scene import FactorizedComponent, Scene, Source

SHAPES = {
    "odd": (1, 31, 31),
    "even": (2, 16, 32),
    "neither square nor even": (3, 20, 33),
    "smaller than the kernel": (2, 5, 8),
}
OF_PEAK = 2e-6
"""Rounding of transforms in single precision, relative to the peak of what is transformed."""


def random_kernels(rng, n_bands, p=13, q=9):
    """Kernels of no symmetry that sum to one, partly negative as difference kernels are."""
    kernels = rng.uniform(-0.2, 1, size=(n_bands, p, q))
    return kernels / kernels.sum(axis=(1, 2), keepdims=True)


# ---------------------------------------------------------------- convolution


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_convolution_agrees_with_the_slow_twin(shape):
    rng = np.random.default_rng(1)
    image, kernels = rng.normal(size=shape), random_kernels(rng, shape[0])
    expected = reference.convolve(image, kernels)
    np.testing.assert_allclose(convolve(image, kernels), expected, rtol=0, atol=OF_PEAK * abs(expected).max())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_adjoint_agrees_with_the_slow_twin(shape):
    rng = np.random.default_rng(2)
    residual, kernels = rng.normal(size=shape), random_kernels(rng, shape[0])
    expected = reference.correlate(residual, kernels)
    adjoint = Convolution.of(kernels, shape[1:]).adjoint(residual)
    np.testing.assert_allclose(adjoint, expected, rtol=0, atol=OF_PEAK * abs(expected).max())


@given(hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40), st.integers(0, 6), st.integers(0, 6))
def test_adjoint_belongs_to_the_convolution(shape, half_height, half_width):
    rng = np.random.default_rng(3)
    kernels = random_kernels(rng, 2, 2 * half_height + 1, 2 * half_width + 1)
    convolution = Convolution.of(kernels, shape)
    model, residual = rng.normal(size=(2, 2, *shape)).astype(np.float32).astype(float)
    forward, adjoint = convolution.forward(model), convolution.adjoint(residual)
    difference = np.vdot(forward, residual) - np.vdot(model, adjoint)
    # Each of the two products has the rounding of float32, 6e-8, times the few stages of a transform.
    assert abs(difference) < 1e-6 * np.linalg.norm(model) * np.linalg.norm(residual) * abs(kernels).sum()


def test_convolution_keeps_the_flux_of_each_band():
    rng = np.random.default_rng(4)
    image = np.zeros((2, 40, 50))
    image[:, 6:-6, 4:-4] = rng.uniform(size=(2, 28, 42))  # half a kernel away from the edge
    flux = convolve(image, random_kernels(rng, 2)).sum(axis=(1, 2), dtype=float)
    np.testing.assert_allclose(flux, image.sum(axis=(1, 2)), rtol=OF_PEAK)


def test_shifting_by_whole_pixels_commutes_with_convolving():
    rng = np.random.default_rng(5)
    kernels = random_kernels(rng, 1)
    here, there = np.zeros((2, 1, 45, 40))
    here[:, 8:20, 6:20] = rng.uniform(size=(12, 14))
    there[:, 15:27, 17:31] = here[:, 8:20, 6:20]
    shifted = np.roll(convolve(here, kernels), (7, 11), axis=(1, 2))
    np.testing.assert_allclose(convolve(there, kernels), shifted, rtol=0, atol=OF_PEAK * shifted.max())


def test_light_that_leaves_the_image_does_not_come_back():
    image = np.zeros((1, 20, 21))
    image[0, 0, 20] = 1
    kernels = np.ones((1, 9, 11))
    expected = np.zeros((20, 21))
    expected[:5, 15:] = 1
    np.testing.assert_allclose(convolve(image, kernels)[0], expected, rtol=0, atol=OF_PEAK)


def test_nan_spreads_over_its_band_only():
    image = np.ones((2, 9, 9))
    image[0, 4, 4] = np.nan
    convolved = convolve(image, np.ones((2, 3, 3)))
    assert np.isnan(convolved[0]).all()
    assert np.isfinite(convolved[1]).all()


@pytest.mark.parametrize("shape", [(3, 3), (2, 4, 3), (2, 3, 4)], ids=["no bands", "even height", "even width"])
def test_kernels_of_another_shape_are_refused(shape):
    with pytest.raises(ShapeError, match=r"kernels must have shape \(bands, height, width\) with odd sides, got \("):
        Convolution.of(np.ones(shape), (10, 10))


def test_an_image_without_bands_is_refused():
    with pytest.raises(ShapeError, match=r"image must have shape \(bands, height, width\), got \(10, 10\)"):
        convolve(np.ones((10, 10)), np.ones((1, 3, 3)))


def test_images_and_kernels_of_different_bands_are_refused():
    with pytest.raises(ShapeError, match=r"images must have shape .* = \(2, 10, 10\), got \(3, 10, 10\)"):
        convolve(np.ones((3, 10, 10)), np.ones((2, 3, 3)))


# ---------------------------------------------------------------- packing


def shifted(component, outer):
    """Move a component from pixels of a box to array index of the coadd."""
    return replace(component, box=component.box.shift(*outer.origin))


@st.composite
def scenes(draw, n_bands=2):
    """A scene of a few sources, some without light, anywhere inside a box that does not start at zero."""
    outer = Box(draw(st.integers(-5, 50)), draw(st.integers(-5, 50)), 12, 9)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    sources = []
    for _ in range(draw(st.integers(0, 4))):
        components = []
        for _ in range(draw(st.integers(0, 2))):
            y, x, reach = rng.integers(12), rng.integers(9), int(rng.integers(1, 5))
            component = gaussian(y, x, rng.uniform(0.5, 3), rng.uniform(0, 9, n_bands), outer.shape, reach)
            components.append(shifted(component, outer))
        peak = (int(rng.integers(12)) + outer.y0, int(rng.integers(9)) + outer.x0)
        sources.append(Source(peak=peak, components=tuple(components)))
    return Scene(sources=tuple(sources), box=outer)


@given(scenes())
def test_a_scene_that_is_packed_and_unpacked_is_the_same(scene):
    peaks = np.array([s.peak for s in scene.sources], dtype=np.int64).reshape(-1, 2) - scene.box.origin
    again = unpack(pack(scene, 2), peaks, scene.box)
    assert again.box == scene.box
    assert [s.peak for s in again.sources] == [s.peak for s in scene.sources]
    assert [len(s.components) for s in again.sources] == [len(s.components) for s in scene.sources]
    for mine, theirs in zip(again.components, scene.components, strict=True):
        assert mine.box == theirs.box
        np.testing.assert_array_equal(mine.spectrum, theirs.spectrum)
        np.testing.assert_array_equal(mine.morphology, theirs.morphology)


@pytest.mark.nojit
@given(scenes())
def test_combined_components_are_the_model_of_their_source(scene):
    packed = pack(scene, 2)
    unconvolved = Rendered(
        boxes=packed.boxes, offsets=packed.offsets, pixels=np.stack([packed.morphologies, packed.morphologies])
    )
    models = combine_sources(packed, unconvolved, len(scene.sources))
    for s, one in enumerate(scene.sources):
        if not one.components:
            assert models.offsets[s] == models.offsets[s + 1]
            continue
        y0, x0, height, width = models.boxes[s].tolist()
        assert Box(y0, x0, height, width).shift(*scene.box.origin) == one.box
        model = models.pixels[:, models.offsets[s] : models.offsets[s + 1]].reshape(2, height, width)
        # Two products and a sum in single precision.
        np.testing.assert_allclose(model, one.model(2), rtol=3e-7)


# ---------------------------------------------------------------- sources as observed

POSITIONS = {"inside": (16, 13), "corner": (0, 0), "edge": (31, 13), "near an edge": (14, 2)}


@pytest.mark.parametrize("position", POSITIONS.values(), ids=POSITIONS)
def test_rendering_one_source_is_convolving_its_whole_model(position):
    image = Box(100, -20, 32, 27)
    component = gaussian(*position, 1.5, [10, 20, 5], image.shape)
    one = source(shifted(component, image))
    pixels, box = render_source(one, KernelSet(KERNELS), image)
    whole = np.zeros((3, *image.shape))
    whole[(slice(None), *one.box.within(image))] = one.model(3)
    expected = reference.convolve(whole, KERNELS)
    assert box == one.box.grow(KERNELS.shape[1] // 2) & image
    window = (slice(None), *box.within(image))
    np.testing.assert_allclose(pixels, expected[window], rtol=0, atol=OF_PEAK * expected.max())
    expected[window] = 0
    assert not expected.any()


def test_a_source_has_the_same_bits_alone_and_with_its_blend():
    scene = three_sources()
    packed = pack(scene, 3)
    together = combine_sources(packed, render_packed(packed, KernelSet(KERNELS), scene.box.shape), 3)
    for s, one in enumerate(scene.sources):
        pixels, _ = render_source(one, KernelSet(KERNELS), scene.box)
        np.testing.assert_array_equal(
            pixels.reshape(3, -1), together.pixels[:, together.offsets[s] : together.offsets[s + 1]]
        )


def test_a_point_source_is_seen_as_the_psf():
    point = FactorizedComponent(
        spectrum=np.ones(3, np.float32), morphology=(TARGET / TARGET.max()).astype(np.float32), box=Box(13, 13, 15, 15)
    )
    pixels, box = render_source(source(point), KernelSet(KERNELS), Box(0, 0, 40, 40))
    assert box == Box(3, 3, 35, 35)
    expected = PSFS / TARGET.max()
    np.testing.assert_allclose(pixels[:, 7:-7, 7:-7], expected, rtol=0, atol=OF_PEAK * expected.max())


def test_what_is_only_rounding_is_zero():
    image = Box(0, 0, 80, 80)
    component = gaussian(40, 40, 0.5, [1, 1, 1], image.shape, reach=30)
    pixels, _ = render_source(source(component), KernelSet(KERNELS), image)
    # Half a kernel is 10 pixels, and at 7 more the Gaussian is 1e-43.
    assert (pixels[:, : 40 - 17] == 0).all()


def test_a_source_without_components_has_no_pixels():
    pixels, box = render_source(Source(peak=(7, 9), components=()), KernelSet(KERNELS), Box(0, 0, 30, 30))
    assert pixels.shape == (3, 0, 0)
    assert box.is_empty
