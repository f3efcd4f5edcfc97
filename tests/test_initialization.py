"""First models: shapes are symmetric and fall, limits are in units of the true noise, every source gets one."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import reference
from blends import KERNELS, PSFS, TARGET, blend_of, convolution_of, gaussian, observe, source, three_sources
from kermes.config import InitializationConfig
from kermes.geometry import Box
from kermes.initialization import chi2_image, deconvolved_image, initialize
from kermes.kernels.initialization import first_morphologies, signal_to_noise
from kermes.rendering import KernelSet, Packed
from kermes.scene import Scene

DETECTION_IMAGES = {"deconvolved": lambda blend: deconvolved_image(blend, convolution_of(blend)), "chi2": chi2_image}


@st.composite
def detection_images(draw):
    """Draw an image of a few different values and a few peaks in it."""
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9))
    image = draw(hnp.arrays(float, shape, elements=st.integers(-1, 6)))
    pixels = st.tuples(st.integers(0, shape[0] - 1), st.integers(0, shape[1] - 1))
    return image, np.array(draw(st.lists(pixels, min_size=1, max_size=3)), dtype=np.int64)


def shapes_of(image, peaks, limit=1.5, pad=0):
    """Box and morphology of each peak; None without one."""
    boxes, offsets, packed = first_morphologies(np.ascontiguousarray(image), np.ascontiguousarray(peaks), limit, pad)
    boxes = [Box(*box) for box in boxes.tolist()]
    return [
        (box, packed[start:end].reshape(box.shape)) if end > start else None
        for box, start, end in zip(boxes, offsets[:-1], offsets[1:], strict=True)
    ]


def component(packed: Packed, k):
    """Box and morphology of one packed component."""
    box = Box(*packed.boxes[k].tolist())
    return box, packed.morphologies[packed.offsets[k] : packed.offsets[k + 1]].reshape(box.shape)


# ---------------------------------------------------------------- shapes


@pytest.mark.nojit
@given(detection_images())
def test_shapes_agree_with_the_slow_twin(drawn):
    image, peaks = drawn
    for peak, shape in zip(peaks, shapes_of(image, peaks), strict=True):
        expected = reference.first_morphology(image, *peak, 1.5)
        if expected is None:
            assert shape is None
        else:
            box, morphology = shape
            assert box == Box.where(expected > 0)
            np.testing.assert_allclose(morphology, expected[box.y, box.x], rtol=1e-7)  # rounding of float32


@pytest.mark.nojit
@given(detection_images())
def test_flipping_and_transposing_commute_with_cutting_shapes(drawn):
    image, peaks = drawn
    last_y, last_x = np.array(image.shape) - 1
    expected = shapes_of(image, peaks)
    turns = [
        (lambda a: a[::-1], np.stack([last_y - peaks[:, 0], peaks[:, 1]], axis=1)),
        (lambda a: a[:, ::-1], np.stack([peaks[:, 0], last_x - peaks[:, 1]], axis=1)),
        (lambda a: a.T, peaks[:, ::-1]),
    ]
    for turn, turned_peaks in turns:
        for shape, turned in zip(expected, shapes_of(turn(image), turned_peaks), strict=True):
            assert (shape is None) == (turned is None)
            if shape is not None:
                np.testing.assert_array_equal(turned[1], turn(shape[1]))


@pytest.mark.nojit
@given(detection_images(), st.integers(0, 4))
def test_padding_grows_the_box_inside_the_image(drawn, pad):
    image, peaks = drawn
    for tight, padded in zip(shapes_of(image, peaks), shapes_of(image, peaks, pad=pad), strict=True):
        assert (tight is None) == (padded is None)
        if tight is not None:
            assert padded[0] == tight[0].grow(pad) & Box.of_shape(image.shape)
            np.testing.assert_array_equal(padded[1][tight[0].within(padded[0])], tight[1])
            assert padded[1].sum() == tight[1].sum()


# ---------------------------------------------------------------- signal-to-noise


@pytest.mark.nojit
@pytest.mark.parametrize("peak", [(8, 7), (0, 0), (15, 3)], ids=["inside", "corner", "edge"])
def test_signal_to_noise_agrees_with_the_slow_twin(peak):
    rng = np.random.default_rng(1)
    images = rng.normal(size=(2, 16, 14)).astype(np.float32)
    weights = (rng.uniform(0.5, 2, size=images.shape) * (rng.uniform(size=images.shape) > 0.2)).astype(np.float32)
    psfs = rng.uniform(size=(2, 7, 5))
    psfs /= psfs.sum(axis=(1, 2), keepdims=True)
    got = signal_to_noise(images, weights, psfs, np.array([peak]))
    assert got[0] == pytest.approx(reference.signal_to_noise(images, weights, psfs, *peak), rel=1e-10)


@pytest.mark.nojit
def test_signal_to_noise_without_a_usable_pixel_is_zero():
    images = np.ones((2, 9, 9), dtype=np.float32)
    assert signal_to_noise(images, np.zeros_like(images), PSFS[:2], np.array([[4, 4]])) == [0]


def test_signal_to_noise_of_a_star_is_its_flux_over_the_error_of_its_flux():
    flux = np.array([300.0, 300.0, 300.0])
    images = np.zeros((3, 41, 41))
    images[:, 10:31, 10:31] = flux[:, None, None] * PSFS
    blend = blend_of(images, [(20, 20)], sigma=2.0)
    information = np.sum(PSFS**2) / 2.0**2
    got = signal_to_noise(blend.images, blend.weights, blend.psfs, blend.peaks)
    assert got[0] == pytest.approx(300 * np.sqrt(information), rel=1e-6)


# ---------------------------------------------------------------- detection images


@pytest.mark.parametrize("kind", DETECTION_IMAGES)
def test_noise_of_the_detection_image_is_what_it_claims(kind):
    sigma = np.array([1.0, 3.0, 0.5])
    images = np.random.default_rng(2).normal(size=(3, 300, 300)) * sigma[:, None, None]
    image, noise = DETECTION_IMAGES[kind](blend_of(images, [(0, 0)], sigma))
    # Away from the edges, outside which there is no noise. The kernels correlate about 5 x 5 pixels, so that 3000
    # are independent: a scatter of 1.3 per cent, of which four are allowed.
    inner = image[20:-20, 20:-20]
    assert inner.std() == pytest.approx(noise, rel=0.05)


@pytest.mark.parametrize("kind", DETECTION_IMAGES)
def test_star_without_noise_is_brightest_at_its_pixel(kind):
    images = np.zeros((3, 40, 45))
    images[:, 5:26, 8:29] = PSFS
    image, _ = DETECTION_IMAGES[kind](blend_of(images, [(15, 18)]))
    assert np.unravel_index(image.argmax(), image.shape) == (15, 18)


def test_deconvolution_makes_a_star_narrower_than_any_band_shows_it():
    images = np.zeros((3, 40, 45))
    images[:, 5:26, 8:29] = PSFS
    blend = blend_of(images, [(15, 18)])
    image, _ = deconvolved_image(blend, convolution_of(blend))
    assert image[15, 18] / image.sum() > PSFS.max()


def test_deconvolution_keeps_the_flux_but_for_its_regularisation():
    images = np.zeros((3, 61, 61))
    images[:, 20:41, 20:41] = 11 * PSFS
    blend = blend_of(images, [(30, 30)])
    image, _ = deconvolved_image(blend, convolution_of(blend), strength=0.1)
    # At the largest scale, where all kernels are one, the filter is 1 / (1 + strength).
    assert image.sum() == pytest.approx(11 / 1.1, rel=1e-2)


@pytest.mark.parametrize("kind", DETECTION_IMAGES)
def test_a_band_without_noise_estimate_adds_nothing(kind):
    _, blend = observe(three_sources(), seed=3)
    images, noise = blend.images.copy(), blend.noise_rms.copy()
    images[1], noise[1] = 0, np.nan
    image, sigma = DETECTION_IMAGES[kind](replace(blend, images=images, noise_rms=noise))
    keep = [0, 2]
    fewer = replace(blend, images=blend.images[keep], noise_rms=blend.noise_rms[keep])
    if kind == "chi2":
        expected, expected_sigma = chi2_image(fewer)
    else:
        expected, expected_sigma = deconvolved_image(fewer, convolution_of(fewer, KERNELS[keep]))
    np.testing.assert_allclose(image, expected, rtol=0, atol=1e-6 * expected.max())
    assert sigma == pytest.approx(expected_sigma, rel=1e-6)


@pytest.mark.parametrize("kind", DETECTION_IMAGES)
def test_no_band_at_all_gives_an_empty_image(kind):
    image, noise = DETECTION_IMAGES[kind](blend_of(np.zeros((3, 20, 20)), [(9, 9)], sigma=np.nan))
    assert not image.any()
    assert noise == 0


# ---------------------------------------------------------------- first models


@pytest.fixture(scope="module")
def blend():
    return observe(three_sources(), seed=4)[1]


def first_model(blend, **settings):
    return initialize(blend, KernelSet(KERNELS), convolution_of(blend), TARGET, InitializationConfig(**settings))


@pytest.mark.parametrize("kind", DETECTION_IMAGES)
def test_every_source_gets_a_component_inside_the_blend(blend, kind):
    packed = first_model(blend, detection_image=kind)
    assert set(packed.sources) == {0, 1, 2}
    for k in range(len(packed)):
        box, morphology = component(packed, k)
        assert box & blend.box == box
        assert morphology.min() >= 0
        assert morphology.max() == 1


def test_a_bright_source_is_split_at_a_percentage_of_its_peak(blend):
    _, whole = component(first_model(blend, max_components=1), 0)
    packed = first_model(blend, disk_percentile=30)
    (_, disk), (_, bulge) = component(packed, 0), component(packed, 1)
    np.testing.assert_allclose(0.3 * disk + 0.7 * bulge, whole, rtol=0, atol=1e-6)
    assert (disk[bulge > 0] == 1).all()


def test_the_number_of_components_follows_the_signal_to_noise(blend):
    snr = signal_to_noise(blend.images, blend.weights, blend.psfs, blend.peaks)
    between = float(np.sort(snr)[1:].mean()) / 2
    packed = first_model(blend, min_snr=between)
    np.testing.assert_array_equal(np.bincount(packed.sources), np.where(snr >= 2 * between, 2, 1))


@pytest.mark.parametrize("settings", [{"max_components": 0}, {"threshold": 1e6}], ids=["wanted", "too faint"])
def test_a_point_source_has_the_shape_of_the_model_psf(blend, settings):
    packed = first_model(blend, **settings)
    assert len(packed) == 3
    box, morphology = component(packed, 0)
    y, x = blend.peaks[0]
    expected = Box(y - 7, x - 7, 15, 15)
    assert box == expected & blend.box
    np.testing.assert_allclose(morphology, (TARGET / TARGET.max())[box.within(expected)], rtol=1e-6)


def test_stars_without_noise_get_their_fluxes():
    shape = (40, 50)
    peaks, fluxes = [(12, 12), (14, 20), (30, 45)], np.array([[900, 700, 500], [300, 600, 900], [800, 800, 800]])
    point = gaussian(0, 0, 1, [1, 1, 1], (1, 1))
    stars = [
        source(
            replace(
                point,
                spectrum=(flux * TARGET.max()).astype(np.float32),
                morphology=(TARGET / TARGET.max()).astype(np.float32)[:, : shape[1] - x + 7],
                box=Box(y - 7, x - 7, 15, 15) & Box.of_shape(shape),
            )
        )
        for (y, x), flux in zip(peaks, fluxes, strict=True)
    ]
    packed, blend = observe(Scene(sources=tuple(stars), box=Box.of_shape(shape)))
    got = first_model(blend, max_components=0)
    # Solved to a thousandth of their errors, which are about 6.
    np.testing.assert_allclose(got.spectra, packed.spectra, rtol=0, atol=0.01)


def test_a_band_without_weights_gets_no_flux(blend):
    weights = blend.weights.copy()
    weights[1] = 0
    packed = first_model(replace(blend, weights=weights))
    assert (packed.spectra[:, 1] == 0).all()
    assert (packed.spectra[:, 0] > 0).any()


def test_a_blend_without_peaks_has_no_components(blend):
    packed = first_model(replace(blend, peaks=np.empty((0, 2), dtype=np.int64)))
    assert len(packed) == 0
    assert packed.spectra.shape == (0, 3)
