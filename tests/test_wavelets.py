"""A starlet transform loses nothing, prefers no place and no direction, and knows noise from structure."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import erfc

from blends import KERNELS, TARGET, observe, three_sources
from kermes.config import Config, InitializationConfig
from kermes.errors import ConfigError, InputError, ShapeError
from kermes.initialization import initialize, wavelet_images
from kermes.rendering import Convolution, KernelSet
from kermes.wavelets import (
    denoise,
    inverse_starlet_transform,
    multiresolution_support,
    noise_of_planes,
    starlet_transform,
)

both_generations = pytest.mark.parametrize("generation", [1, 2])


@st.composite
def transforms(draw):
    """Draw an image, a number of scales and a generation."""
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=3, max_side=12))
    image = draw(hnp.arrays(float, shape, elements=st.floats(-1e3, 1e3, width=32)))
    return image, draw(st.integers(1, 4)), draw(st.sampled_from([1, 2]))


def slow_transform(image, scales, generation):
    """Pad with the mirror image, then add up the 5 x 5 taps one by one."""
    h, w = image.shape
    taps = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256

    def smooth(image, step):
        padded = np.pad(image, 2 * step, mode="symmetric")
        out = np.zeros(image.shape)
        for i, j in np.ndindex(5, 5):
            out += taps[i, j] * padded[i * step : i * step + h, j * step : j * step + w]
        return out

    planes = []
    for j in range(scales):
        smoother = smooth(image, 2**j)
        planes.append(image - (smoother if generation == 1 else smooth(smoother, 2**j)))
        image = smoother
    return np.array([*planes, image])


def blob(sigma, side=65):
    """Round Gaussian in the middle of an image, peak one."""
    y, x = np.mgrid[:side, :side] - side // 2
    return np.exp(-0.5 * (y**2 + x**2) / sigma**2)


# ---------------------------------------------------------------- transform


@given(transforms())
def test_transform_and_inverse_give_the_image(drawn):
    image, scales, generation = drawn
    planes = starlet_transform(image, scales, generation)
    assert planes.shape == (scales + 1, *image.shape)
    restored = inverse_starlet_transform(planes, generation)
    np.testing.assert_allclose(restored, image, rtol=0, atol=1e-14 * max(np.abs(image).max(), 1))  # rounding


@both_generations
def test_single_precision_stays_single_and_is_restored(generation):
    image = np.random.default_rng(1).normal(size=(40, 50)).astype(np.float32)
    planes = starlet_transform(image, 5, generation)
    restored = inverse_starlet_transform(planes, generation)
    assert planes.dtype == restored.dtype == np.float32
    np.testing.assert_allclose(restored, image, rtol=0, atol=1e-5)


@both_generations
@pytest.mark.parametrize("shape", [(16, 16), (23, 31)])
def test_transform_agrees_with_the_slow_twin(shape, generation):
    image = np.random.default_rng(2).normal(size=shape)
    expected = slow_transform(image, 3, generation)
    np.testing.assert_allclose(starlet_transform(image, 3, generation), expected, rtol=0, atol=1e-14)  # rounding


@given(transforms())
def test_flipping_commutes_to_the_last_bit(drawn):
    image, scales, generation = drawn
    planes = starlet_transform(image, scales, generation)
    for axis in (-2, -1):
        flipped = starlet_transform(np.flip(image, axis), scales, generation)
        np.testing.assert_array_equal(flipped, np.flip(planes, axis))


@given(transforms())
def test_transposing_commutes(drawn):
    image, scales, generation = drawn
    got = starlet_transform(np.swapaxes(image, -2, -1), scales, generation)
    expected = np.swapaxes(starlet_transform(image, scales, generation), -2, -1)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-14 * max(np.abs(image).max(), 1))  # rounding


@both_generations
def test_shifting_commutes_away_from_the_edges(generation):
    image = np.random.default_rng(3).normal(size=(70, 80))
    # Three scales of the second generation reach 2 (1 + 2 + 4) + 8 pixels.
    reach, dy, dx = 22, 3, 5
    planes = starlet_transform(image, 3, generation)
    shifted = starlet_transform(image[dy:, dx:], 3, generation)
    inner = (slice(None), slice(reach, -reach), slice(reach, -reach))
    np.testing.assert_array_equal(shifted[inner], planes[:, dy:, dx:][inner])


@given(transforms())
def test_every_band_of_an_image_is_on_its_own(drawn):
    image, scales, generation = drawn
    bands = image.reshape(-1, *image.shape[-2:])
    together = starlet_transform(bands, scales, generation)
    for b, band in enumerate(bands):
        np.testing.assert_array_equal(together[:, b], starlet_transform(band, scales, generation))


@given(transforms())
def test_the_smooth_rest_has_the_flux_of_the_image(drawn):
    image, scales, generation = drawn
    rest = starlet_transform(image, scales, generation)[-1]
    assert rest.sum() == pytest.approx(image.sum(), rel=0, abs=1e-13 * max(np.abs(image).sum(), 1))  # rounding


@both_generations
def test_a_constant_image_has_no_detail(generation):
    planes = starlet_transform(np.full((20, 30), 7.0), 4, generation)
    np.testing.assert_allclose(planes[:-1], 0, rtol=0, atol=1e-14)  # rounding


@both_generations
def test_a_slope_has_no_detail_away_from_the_edges(generation):
    y, x = np.mgrid[:70, :70]
    planes = starlet_transform(2.0 * y - 3.0 * x, 3, generation)
    np.testing.assert_allclose(planes[:-1, 22:-22, 22:-22], 0, rtol=0, atol=1e-11)  # rounding of values of 200


def test_energy_of_a_point_lies_in_the_fine_planes():
    point = np.zeros((65, 65))
    point[32, 32] = 1
    energy = (starlet_transform(point, 4)[:-1] ** 2).sum(axis=(1, 2))
    assert (np.diff(energy) < 0).all()
    assert energy[0] > 0.9 * energy.sum()


def test_the_wider_a_source_the_coarser_the_plane_it_is_brightest_in():
    brightest = [np.argmax((starlet_transform(blob(sigma), 5)[:-1] ** 2).sum(axis=(1, 2))) for sigma in (0.5, 2, 4, 8)]
    assert (np.diff(brightest) > 0).all()


def test_positive_planes_of_the_second_generation_give_a_positive_image():
    planes = np.maximum(starlet_transform(np.random.default_rng(4).normal(size=(40, 40)), 4), 0)
    assert inverse_starlet_transform(planes).min() >= 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: starlet_transform(np.ones(5), 2), ShapeError, r"image must have shape .* got \(5,\)"),
        (lambda: starlet_transform(np.ones((0, 5)), 2), ShapeError, r"image must have shape .* got \(0, 5\)"),
        (lambda: starlet_transform(np.ones((5, 5)), 0), InputError, "scales must be at least 1, got 0"),
        (lambda: starlet_transform(np.ones((5, 5)), 2, 3), InputError, "generation must be 1 or 2, got 3"),
        (lambda: inverse_starlet_transform(np.ones((5, 5))), ShapeError, r"planes must have shape .* got \(5, 5\)"),
        (lambda: inverse_starlet_transform(np.ones((2, 5, 5)), 0), InputError, "generation must be 1 or 2, got 0"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ---------------------------------------------------------------- noise


@both_generations
def test_noise_of_the_planes_is_that_of_white_noise(generation):
    image = np.random.default_rng(5).normal(size=(400, 400))
    measured = starlet_transform(image, 4, generation)[:-1, 60:-60, 60:-60].std(axis=(1, 2))
    # In plane j about 280^2 / (4 2^j)^2 coefficients are independent, 76 in the last: 8 per cent, and less before.
    n_independent = (280 / (4 * 2.0 ** np.arange(4))) ** 2
    error = np.abs(measured / noise_of_planes(4, generation) - 1)
    assert (error < 3 / np.sqrt(2 * n_independent)).all()


@both_generations
@pytest.mark.parametrize("known", [True, False])
def test_three_sigma_are_passed_as_often_as_theory_says(generation, known):
    planes = starlet_transform(np.random.default_rng(6).normal(size=(700, 700)), 2, generation)
    support = multiresolution_support(planes, noise_of_planes(2, generation) if known else None)
    rate = support.significant[:-1].mean(axis=(1, 2))
    # 1323 of 490,000 are expected. Neighbours are correlated: in plane j about (3 2^j)^2 of them pass together.
    scatter = np.sqrt(1323 * np.array([9, 36])) / 490_000
    assert (np.abs(rate - erfc(3 / np.sqrt(2))) < 3 * scatter).all()


def test_measured_noise_is_that_around_a_bright_source():
    rng = np.random.default_rng(7)
    image = 2.0 * rng.normal(size=(257, 257)) + 500 * blob(2.0, 257)
    support = multiresolution_support(starlet_transform(image, 3))
    assert support.converged
    # Faint wings below three sigma make it somewhat larger.
    np.testing.assert_allclose(support.noise_rms, 2.0 * noise_of_planes(3), rtol=0.1)


def test_measured_noise_scales_with_the_image():
    planes = starlet_transform(np.random.default_rng(8).normal(size=(2, 50, 50)), 3)
    once, scaled = multiresolution_support(planes), multiresolution_support(8 * planes)
    np.testing.assert_array_equal(scaled.noise_rms, 8 * once.noise_rms)
    np.testing.assert_array_equal(scaled.significant, once.significant)


def test_noise_that_does_not_settle_is_said():
    planes = starlet_transform(np.random.default_rng(9).normal(size=(50, 50)) + 100 * blob(4.0, 50), 3)
    assert not multiresolution_support(planes, tolerance=0.0, max_iterations=1).converged


def test_a_plane_without_structure_has_no_noise_and_nothing_significant():
    support = multiresolution_support(starlet_transform(np.zeros((20, 20)), 2))
    assert support.converged
    assert not support.noise_rms.any()
    assert not support.significant[:-1].any()


def test_a_pixel_that_is_not_a_number_leaves_nothing_significant():
    image = np.zeros((20, 20))
    image[3, 3] = np.nan
    support = multiresolution_support(starlet_transform(image, 2))
    assert np.isnan(support.noise_rms).all()
    assert not support.significant[:-1].any()


def test_denoising_comes_closer_to_the_truth():
    truth = 50 * blob(3.0)
    noisy = truth + np.random.default_rng(10).normal(size=truth.shape)
    cleaned = denoise(noisy, 4)
    assert cleaned.min() >= 0
    assert np.square(cleaned - truth).mean() < 0.1 * np.square(noisy - truth).mean()


# ---------------------------------------------------------------- first models


WAVELET = InitializationConfig(detection_image="wavelet")


@pytest.fixture(scope="module")
def blend():
    return observe(three_sources(), seed=11)[1]


def first_model(blend, config):
    return initialize(blend, KernelSet(KERNELS), Convolution.of(KERNELS, blend.box.shape), TARGET, config)


def shape_of(packed, k):
    """Whole morphology of one component in pixels of the blend."""
    y0, x0, height, width = packed.boxes[k]
    image = np.zeros((32, 27))
    pixels = packed.morphologies[packed.offsets[k] : packed.offsets[k + 1]]
    image[y0 : y0 + height, x0 : x0 + width] = pixels.reshape(height, width)
    return image


def test_the_coarse_and_the_fine_part_are_the_whole(blend):
    whole, coarse, fine = wavelet_images(blend)
    np.testing.assert_array_equal(whole, coarse + fine)
    assert min(coarse.min(), fine.min()) >= 0


def test_wavelet_shapes_are_brightest_at_their_peaks(blend):
    packed = first_model(blend, WAVELET)
    for k, source in enumerate(packed.sources):
        image = shape_of(packed, k)
        assert image[tuple(blend.peaks[source])] == image.max() == 1


def test_two_wavelet_components_are_a_narrow_and_a_wide_one(blend):
    packed = first_model(blend, WAVELET)
    first = np.flatnonzero(packed.sources == 0)
    assert len(first) == 2
    coarse, fine = (shape_of(packed, k).sum() for k in first)
    assert fine < coarse


def test_wavelet_shapes_explain_most_of_the_blend(blend):
    packed = first_model(blend, WAVELET)
    model = np.zeros(blend.images.shape)
    for k in range(len(packed)):
        model += packed.spectra[k][:, None, None] * shape_of(packed, k)
    residual = blend.images - Convolution.of(KERNELS, blend.box.shape).forward(model)
    # The shapes are wider than the truth, since they are cut from the image as observed.
    assert np.square(residual).sum() < 0.05 * np.square(blend.images).sum()


def test_a_source_without_a_wavelet_coefficient_is_a_point_source(blend):
    # No star is at the corner: three sigma are passed there in none of the planes with this noise.
    packed = first_model(replace(blend, peaks=np.array([[2, 24]])), WAVELET)
    assert len(packed) == 1
    np.testing.assert_allclose(
        packed.morphologies.reshape(packed.boxes[0, 2:]), (TARGET / TARGET.max())[5:, :10], rtol=1e-6
    )


@pytest.mark.parametrize("max_components", [0, 1])
def test_wavelets_keep_to_the_number_of_components(blend, max_components):
    packed = first_model(blend, replace(WAVELET, max_components=max_components))
    np.testing.assert_array_equal(packed.sources, [0, 1, 2])


def test_wavelets_are_not_the_default():
    assert Config().initialization.detection_image == "deconvolved"


def test_an_unknown_detection_image_is_refused():
    with pytest.raises(ConfigError, match=r"detection_image must be 'deconvolved', 'chi2' or 'wavelet', got 'best'"):
        InitializationConfig(detection_image="best")
