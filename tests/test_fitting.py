"""The fit takes the steps of its slow twin, keeps what is right already, and has no preferred place or unit."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import reference
from blends import KERNELS, blend_of, gaussian, observe, observed, source, three_sources
from kermes.config import FitConfig
from kermes.fitting import fit_packed
from kermes.geometry import Box
from kermes.kernels.components import add_component, add_gradient, positive_bounds, repack
from kermes.rendering import Packed, pack
from kermes.scene import Scene

ALL_STEPS = {"exact_every": 1, "patience": 1000}
"""Compare with the pixels after every step, and never stop early."""


def parts(packed: Packed):
    """Morphologies of all components."""
    return [
        packed.morphologies[start:end].reshape(box[2:])
        for box, start, end in zip(packed.boxes, packed.offsets[:-1], packed.offsets[1:], strict=True)
    ]


def fluxes(packed: Packed, n_sources=3):
    """Total flux of each source in each band."""
    total = np.zeros((n_sources, packed.spectra.shape[1]))
    np.add.at(total, packed.sources, packed.spectra * np.array([[m.sum(dtype=float)] for m in parts(packed)]))
    return total


def away_from_truth(packed: Packed):
    """Start with other colours, and flatter shapes of the same support."""
    spectra = packed.spectra * np.array([1.3, 0.8, 1.1], dtype=np.float32)
    return replace(packed, spectra=spectra, morphologies=packed.morphologies ** np.float32(0.8))


@pytest.fixture(scope="module")
def noisy():
    """Where to start, and a blend with noise."""
    packed, blend = observe(three_sources(), seed=1)
    return away_from_truth(packed), blend


# ---------------------------------------------------------------- components in flat buffers


@st.composite
def boxed(draw, shape=(9, 8)):
    """Draw a box inside an image of some shape."""
    height, width = draw(st.integers(1, shape[0])), draw(st.integers(1, shape[1]))
    return draw(st.integers(0, shape[0] - height)), draw(st.integers(0, shape[1] - width)), height, width


@pytest.mark.nojit
@given(boxed(), st.integers(0, 99))
def test_gradient_of_a_component_is_the_adjoint_of_adding_it(box, seed):
    rng = np.random.default_rng(seed)
    y0, x0, height, width = box
    plane = rng.normal(size=(9, 8)).astype(np.float32)
    morphology, direction = rng.normal(size=(2, height * width)).astype(np.float32)
    flux = np.float32(rng.normal())

    added = np.zeros_like(plane)
    add_component(added, *box, direction, flux)
    np.testing.assert_allclose(added, reference.whole(box, flux * direction.reshape(height, width), added.shape), rtol=1e-6)

    gradient = np.zeros_like(morphology)
    for_flux = add_gradient(plane, *box, morphology, flux, gradient)
    # Sums of up to 72 products of single precision.
    tolerance = 72 * 6e-8 * np.linalg.norm(plane) * np.linalg.norm(direction)
    assert abs(np.vdot(added, plane) - np.vdot(direction, gradient)) <= tolerance * abs(flux)
    part = plane[y0 : y0 + height, x0 : x0 + width].astype(float)
    assert abs(for_flux - np.vdot(part, morphology)) <= 72 * 6e-8 * np.linalg.norm(plane) * np.linalg.norm(morphology)


@pytest.mark.nojit
@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.integers(-2, 1)))
def test_bounds_of_the_positive_pixels_are_tight(morphology):
    bounds = positive_bounds(morphology.ravel(), *morphology.shape)
    assert Box.from_bounds(*bounds) == Box.where(morphology > 0)


@pytest.mark.nojit
@given(st.lists(st.tuples(boxed(), boxed()), min_size=1, max_size=3))
def test_pixels_that_move_to_another_box_stay_where_they_are(pairs):
    old, new = (np.array([pair[side] for pair in pairs], dtype=np.int64) for side in (0, 1))
    old_offsets, new_offsets = (np.concatenate([[0], np.cumsum(b[:, 2] * b[:, 3])]) for b in (old, new))
    values = np.arange(1, old_offsets[-1] + 1, dtype=np.float32)
    moved = repack(values, old, old_offsets, new, new_offsets)
    for k in range(len(pairs)):
        before = reference.whole(old[k], values[old_offsets[k] : old_offsets[k + 1]].reshape(old[k, 2:]), (9, 8))
        after = reference.whole(new[k], moved[new_offsets[k] : new_offsets[k + 1]].reshape(new[k, 2:]), (9, 8))
        inside = reference.whole(new[k], 1, (9, 8))
        np.testing.assert_array_equal(after, before * inside)


# ---------------------------------------------------------------- steps


@pytest.fixture(scope="module")
def tiny():
    """A blend of two bands and two sources, one of two components, with kernels without any symmetry."""
    shape = (13, 12)
    rng = np.random.default_rng(1)
    kernels = rng.uniform(0, 1, size=(2, 7, 7)) * np.exp(-0.1 * np.sum(np.mgrid[-3:4, -3:4] ** 2, axis=0))
    kernels /= kernels.sum(axis=(1, 2), keepdims=True)
    scene = Scene(
        sources=(
            source(gaussian(5, 4, 1.8, [30, 40], shape, reach=4), gaussian(5, 4, 0.8, [50, 30], shape, reach=2)),
            source(gaussian(7, 8, 1.2, [60, 20], shape, reach=4)),
        ),
        box=Box.of_shape(shape),
    )
    packed = pack(scene, 2)
    noise = np.array([0.5, 0.7])
    images = observed(packed, shape, kernels) + rng.normal(size=(2, *shape)) * noise[:, None, None]
    blend = blend_of(images, [s.peak for s in scene.sources], noise, psfs=kernels)
    weights = blend.weights * rng.uniform(0.5, 1.5, size=images.shape).astype(np.float32)
    weights[0, 2:4, 3:6] = 0
    start = replace(packed, spectra=packed.spectra * np.array([1.2, 0.9], dtype=np.float32))
    return start, replace(blend, weights=weights), kernels


def test_the_fit_takes_the_steps_of_its_slow_twin(tiny):
    start, blend, kernels = tiny
    fit = fit_packed(start, blend, kernels, FitConfig(max_iterations=5, resize_every=0, **ALL_STEPS))
    losses, morphologies, spectra = reference.fit(
        blend.images.astype(float),
        blend.weights.astype(float),
        kernels,
        blend.noise_rms.astype(float),
        start.boxes,
        blend.peaks[start.sources],
        parts(start),
        start.spectra,
        n_iterations=5,
        background_threshold=FitConfig().background_threshold,
    )
    np.testing.assert_allclose(fit.losses, losses, rtol=1e-4)
    np.testing.assert_allclose(fit.packed.spectra, spectra, rtol=1e-4)
    for mine, expected in zip(parts(fit.packed), morphologies, strict=True):
        np.testing.assert_allclose(mine, expected, rtol=0, atol=1e-4)
