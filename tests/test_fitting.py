"""The fit takes the steps of its slow twin, keeps what is right already, and has no preferred place or unit."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import reference
from blends import blend_of, convolution_of, gaussian, observe, observed, source, three_sources
from kermes.coadd import Blend
from kermes.config import FitConfig
from kermes.constraints import monotonic_weights
from kermes.fitting import fit_packed
from kermes.geometry import Box
from kermes.kernels.components import add_component, add_gradient, positive_bounds, repack
from kermes.kernels.constraints import brightest_near, make_monotonic
from kermes.rendering import Packed, pack
from kermes.scene import Scene, Source

ALL_STEPS = {"exact_every": 1, "patience": 1000}
"""Compare with the pixels after every step, and never stop early."""


def fit_with(packed: Packed, blend: Blend, **settings):
    """Fit with the kernels of small blends."""
    return fit_packed(packed, blend, convolution_of(blend), FitConfig(**settings))


def shifted(scene: Scene, dy, dx, shape):
    """Move a scene by whole pixels, into an image of another shape."""
    sources = tuple(
        Source(
            peak=(one.peak[0] + dy, one.peak[1] + dx),
            components=tuple(replace(component, box=component.box.shift(dy, dx)) for component in one.components),
        )
        for one in scene.sources
    )
    return Scene(sources=sources, box=Box.of_shape(shape))


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
    np.testing.assert_allclose(
        added, reference.whole(box, flux * direction.reshape(height, width), added.shape), rtol=1e-6
    )

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
    state = np.arange(1, 2 * old_offsets[-1] + 1, dtype=np.float32).reshape(2, -1)
    moved = repack(state, old, old_offsets, new, new_offsets)
    for buffer, k in itertools.product(range(2), range(len(pairs))):
        before = reference.whole(old[k], state[buffer, old_offsets[k] : old_offsets[k + 1]].reshape(old[k, 2:]), (9, 8))
        after = reference.whole(new[k], moved[buffer, new_offsets[k] : new_offsets[k + 1]].reshape(new[k, 2:]), (9, 8))
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
    fit = fit_packed(
        start, blend, convolution_of(blend, kernels), FitConfig(max_iterations=5, resize_every=0, **ALL_STEPS)
    )
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
    # Rounding of float32, as it grows in five steps.
    np.testing.assert_allclose(fit.losses, losses, rtol=1e-4)
    np.testing.assert_allclose(fit.packed.spectra, spectra, rtol=1e-5)
    for mine, expected in zip(parts(fit.packed), morphologies, strict=True):
        np.testing.assert_allclose(mine, expected, rtol=0, atol=1e-5)


def test_gradients_are_carried_on_exactly_where_all_pixels_weigh_the_same():
    scene = shifted(three_sources(), 14, 15, (60, 58))  # far from the edges
    packed, blend = observe(scene, seed=1)
    start = away_from_truth(packed)
    steps = {"max_iterations": 15, "patience": 1000, "resize_every": 0}
    every, third = (fit_with(start, blend, exact_every=n, **steps) for n in (1, 3))
    np.testing.assert_allclose(third.losses, every.losses[::3], rtol=1e-5)


def test_the_last_state_is_compared_with_the_pixels_too(noisy):
    fit = fit_with(*noisy, max_iterations=7, exact_every=3, patience=1000)
    assert fit.iterations == 7
    assert len(fit.losses) == 4  # after 0, 3, 6 and 7 steps


# ---------------------------------------------------------------- where it ends


def test_a_scene_without_noise_is_its_own_fit():
    packed, blend = observe(three_sources())
    fit = fit_with(packed, blend)
    assert fit.converged
    np.testing.assert_array_equal(fit.packed.spectra, packed.spectra)
    np.testing.assert_array_equal(fit.packed.morphologies, packed.morphologies)


def test_a_scene_without_noise_is_found_from_a_start_away_from_it():
    scene = three_sources()
    packed, blend = observe(scene)
    fit = fit_with(away_from_truth(packed), blend, **ALL_STEPS)
    # Residuals of less than a tenth of the noise that the weights stand for.
    assert fit.losses.min() < 0.5 * 0.1**2 * blend.images.size
    # The light of the source that is apart can be nobody else's.
    np.testing.assert_allclose(fluxes(fit.packed)[2], scene.sources[2].flux(3), rtol=0.01)


@pytest.mark.parametrize("where", ["near the truth", "away from the truth"])
def test_the_residuals_of_a_fit_are_noise(where):
    packed, blend = observe(three_sources(), seed=1)
    start = replace(packed, spectra=packed.spectra * 1.1) if where == "near the truth" else away_from_truth(packed)
    reduced_chi2 = 2 * fit_with(start, blend).losses.min() / blend.images.size
    # Its scatter is sqrt(2 / 2592) = 0.03; the free pixels of the shapes take up some noise.
    assert 0.85 < reduced_chi2 < 1.1


def test_the_state_with_the_smallest_loss_is_returned(noisy):
    packed, blend = noisy
    fit = fit_with(packed, blend, max_iterations=20, **ALL_STEPS)
    model = observed(fit.packed, blend.images.shape[1:])
    loss = 0.5 * np.sum(blend.weights * (model.astype(float) - blend.images) ** 2)
    assert loss == pytest.approx(fit.losses.min(), rel=1e-5)


def test_no_iterations_leave_the_start_as_it_is(noisy):
    packed, blend = noisy
    fit = fit_with(packed, blend, max_iterations=0)
    assert (fit.iterations, fit.converged) == (0, False)
    np.testing.assert_array_equal(fit.packed.spectra, packed.spectra)
    np.testing.assert_array_equal(fit.packed.morphologies, packed.morphologies)


def test_the_start_is_not_changed(noisy):
    packed, blend = noisy
    before = packed.spectra.copy(), packed.morphologies.copy()
    fit_with(packed, blend, max_iterations=3)
    np.testing.assert_array_equal(packed.spectra, before[0])
    np.testing.assert_array_equal(packed.morphologies, before[1])


def test_a_fit_that_ran_out_of_iterations_has_not_converged(noisy):
    assert not fit_with(*noisy, max_iterations=4).converged


# ---------------------------------------------------------------- constraints


def test_morphologies_are_positive_monotonic_and_normalised(noisy):
    packed, blend = noisy
    fit = fit_with(packed, blend)
    weights = monotonic_weights(40)
    for k, morphology in enumerate(parts(fit.packed)):
        assert morphology.min() >= 0
        assert morphology.max() == pytest.approx(1, abs=1e-6)
        center = blend.peaks[fit.packed.sources[k]] - fit.packed.boxes[k, :2]
        again = morphology.copy()
        make_monotonic(again, *brightest_near(morphology, *center, False), weights)
        # Pixels were set to zero afterwards, but none that is brighter than the background threshold.
        faint = np.min(FitConfig().background_threshold * blend.noise_rms / fit.packed.spectra[k])
        np.testing.assert_allclose(again, morphology, rtol=0, atol=1.05 * faint)


def test_morphologies_are_symmetric_if_wanted(noisy):
    packed, blend = noisy
    fit = fit_with(packed, blend, symmetric=True, resize_every=0)
    for box, source_index, morphology in zip(fit.packed.boxes, fit.packed.sources, parts(fit.packed), strict=True):
        expected = reference.make_symmetric(morphology, *(blend.peaks[source_index] - box[:2]))
        np.testing.assert_array_equal(morphology, expected)


def test_no_pixel_is_fainter_than_the_background_in_every_band(noisy):
    packed, blend = noisy
    fit = fit_with(packed, blend, background_threshold=2.0)
    for spectrum, morphology in zip(fit.packed.spectra, parts(fit.packed), strict=True):
        faintest = morphology[morphology > 0].min()
        # The spectrum is that before normalisation to the brightest pixel, which moves by a step of 3 per cent.
        assert (spectrum * faintest / blend.noise_rms).max() > 2.0 * 0.95


def test_boxes_follow_the_morphologies(noisy):
    packed, blend = noisy
    fit = fit_with(packed, blend, max_iterations=30, resize_every=1, **ALL_STEPS)
    assert fit.losses.argmin() > 2  # the first step leaves the boxes as they are
    for row, morphology in zip(fit.packed.boxes.tolist(), parts(fit.packed), strict=True):
        box = Box(*row)
        assert box == Box.where(morphology > 0).shift(*box.origin).grow(5) & blend.box


# ---------------------------------------------------------------- what must not matter


def test_masked_pixels_have_no_influence(noisy):
    packed, blend = noisy
    masked = np.random.default_rng(2).uniform(size=blend.images.shape) < 0.2
    weights = np.where(masked, 0, blend.weights).astype(np.float32)
    images = np.where(masked, 1e3, blend.images).astype(np.float32)
    expected = fit_with(packed, replace(blend, weights=weights))
    got = fit_with(packed, replace(blend, weights=weights, images=images))
    np.testing.assert_array_equal(got.packed.spectra, expected.packed.spectra)
    np.testing.assert_array_equal(got.packed.morphologies, expected.packed.morphologies)


def test_the_image_of_a_band_without_weights_has_no_influence(noisy):
    packed, blend = noisy
    weights, images = blend.weights.copy(), blend.images.copy()
    weights[1], images[1] = 0, 7
    expected = fit_with(packed, replace(blend, weights=weights))
    got = fit_with(packed, replace(blend, weights=weights, images=images))
    np.testing.assert_array_equal(got.packed.spectra, expected.packed.spectra)
    np.testing.assert_array_equal(got.packed.morphologies, expected.packed.morphologies)


def same_fluxes(got, expected):
    # Rounding of float32 as it grows in 30 steps: measured 3e-7.
    np.testing.assert_allclose(got, expected, rtol=1e-4)


@pytest.fixture(scope="module")
def thirty_steps(noisy):
    return fluxes(fit_with(*noisy, max_iterations=30, patience=1000).packed)


def test_scaling_image_and_noise_scales_fluxes(noisy, thirty_steps):
    packed, blend = noisy
    scaled = replace(blend, images=3 * blend.images, weights=blend.weights / 9, noise_rms=3 * blend.noise_rms)
    fit = fit_with(replace(packed, spectra=3 * packed.spectra), scaled, max_iterations=30, patience=1000)
    same_fluxes(fluxes(fit.packed), 3 * thirty_steps)


def test_order_of_the_sources_does_not_matter(noisy, thirty_steps):
    _, blend = noisy
    order = [2, 0, 1]
    scene = three_sources()
    permuted = pack(replace(scene, sources=tuple(scene.sources[s] for s in order)), 3)
    fit = fit_with(
        away_from_truth(permuted), replace(blend, peaks=blend.peaks[order]), max_iterations=30, patience=1000
    )
    same_fluxes(fluxes(fit.packed), thirty_steps[order])


def test_flipping_the_image_flips_the_fit(noisy, thirty_steps):
    packed, blend = noisy
    height = blend.box.height
    boxes, peaks = packed.boxes.copy(), blend.peaks.copy()
    boxes[:, 0] = height - boxes[:, 0] - boxes[:, 2]
    peaks[:, 0] = height - 1 - peaks[:, 0]
    flipped = replace(packed, boxes=boxes, morphologies=np.concatenate([m[::-1].ravel() for m in parts(packed)]))
    images = np.ascontiguousarray(blend.images[:, ::-1])
    fit = fit_with(flipped, replace(blend, images=images, peaks=peaks), max_iterations=30, patience=1000)
    same_fluxes(fluxes(fit.packed), thirty_steps)


def test_shifting_by_whole_pixels_shifts_the_fit():
    steps = {"max_iterations": 30, "patience": 1000}
    scenes = [shifted(three_sources(), dy, dx, (64, 60)) for dy, dx in ((14, 15), (18, 13))]
    (packed, blend), (there, _) = (observe(scene, seed=1) for scene in scenes)
    images = np.roll(blend.images, (4, -2), axis=(1, 2))
    here = fit_with(away_from_truth(packed), blend, **steps)
    moved = fit_with(away_from_truth(there), replace(blend, images=images, peaks=blend.peaks + [4, -2]), **steps)
    np.testing.assert_array_equal(moved.packed.boxes, here.packed.boxes + [4, -2, 0, 0])
    same_fluxes(fluxes(moved.packed), fluxes(here.packed))
