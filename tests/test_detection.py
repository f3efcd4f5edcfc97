"""Detection: five sigma means five sigma, sources are found where they are, no position or direction is preferred."""

import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial import cKDTree
from scipy.stats import norm

from kermes.coadd import Coadd
from kermes.config import DetectionConfig
from kermes.detection import (
    _equivalent_sigma,
    _maxima,
    _separate,
    _sigma_tables,
    detect,
    detection_images,
    false_peak_density,
    footprints_of_peaks,
    measure_band_snr,
    subtract_background,
    wavelet_images,
)
from kermes.errors import ConfigError, DataWarning, InputError
from kermes.geometry import Box
from kermes.kernels import detection as kernels
from kermes.simulation import MoffatPsf, simulate_scene

PSF = MoffatPsf(fwhm_pix=4.0, beta=3.5).stamp()[8:-8, 8:-8]
CONFIG = DetectionConfig()


@pytest.fixture(params=["psf", "wavelet"])
def config(request):
    """Settings of each method in turn."""
    return DetectionConfig(method=request.param)


def coadd_of(images, variance=1.0, psf=PSF, **more) -> Coadd:
    """Make a coadd of images (B, H, W) with one PSF for all bands."""
    images = np.asarray(images, dtype=float)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # about an image without a valid pixel
        return Coadd(
            images=images,
            variance=np.broadcast_to(variance, images.shape),
            psfs=[psf] * len(images),
            bands=[f"band{b}" for b in range(len(images))],
            **more,
        )


def stars(shape, positions, snr, n_bands=2, seed=0):
    """Images (B, H, W) of unit noise with a star of a signal-to-noise in each band at each whole position."""
    images = np.random.default_rng(seed).normal(size=(n_bands, *shape))
    half = len(PSF) // 2
    padded = np.pad(images, ((0, 0), (half, half), (half, half)))
    for (y, x), strength in zip(positions, np.broadcast_to(snr, len(positions)), strict=True):
        padded[:, y : y + len(PSF), x : x + len(PSF)] += strength * PSF / np.sqrt((PSF**2).sum())
    return padded[:, half:-half, half:-half]


@pytest.mark.parametrize("n_bands", [1, 2, 6])
def test_sigma_means_the_false_alarm_rate_of_a_gaussian(n_bands):
    noise = np.random.default_rng(1).normal(size=(n_bands, 600, 600))
    significance, contrast = detection_images(coadd_of(noise))
    for sigma in (1.0, 2.0, 3.0):
        rate = norm.sf(sigma)
        # Pixels within a PSF share their noise: about 20 000 independent ones. Four times their scatter.
        tolerance = 4 * np.sqrt(rate / 20_000)
        assert (significance > sigma).mean() == pytest.approx(rate, abs=tolerance)
        assert (contrast > sigma).mean() == pytest.approx(rate, abs=tolerance)


@given(n_bands=st.integers(1, 12))
def test_sigma_rises_with_the_signal(n_bands):
    root, sigma = _equivalent_sigma(n_bands)
    assert (np.diff(sigma) > 0).all()
    assert (sigma <= root + 1e-12).all()


def filtered(arrays, filters, units, side, min_coverage=(1e-3, 1e-3)):
    """Significance (K, H, W) from filter_block, as much in a block as goes."""
    b_total, height, width = arrays[0].shape
    transforms, cumulative = kernels.transform_filters(filters, side)
    block = side + 1 - max(filters.shape[2:])
    out = np.full((filters.shape[1], height, width), np.nan, dtype=np.float32)
    root, _ = _equivalent_sigma(1)
    more = units, np.array(min_coverage)
    for y in range(0, height, block):
        for x in range(0, width, block):
            shape = min(block, height - y), min(block, width - x)
            values = kernels.filter_block(
                *arrays, transforms, cumulative, *more, (y, x), shape, root[1], _sigma_tables(b_total)
            )
            out[:, y : y + shape[0], x : x + shape[1]] = values
    return out


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("side", [9, 12, 64], ids=["many blocks", "some blocks", "one block"])
def test_filters_are_sums_over_the_pixels_around(side, even):
    rng = np.random.default_rng(4)
    units = np.array([1.0, 0.7])
    images, variance = rng.normal(size=(2, 13, 17)), rng.uniform(0.5, 2, size=(2, 13, 17))
    valid, filters = rng.uniform(size=images.shape) > 0.2, rng.uniform(0, 1, size=(2, 2, 5, 7))
    filters[:, 1] -= filters[:, 1].mean(axis=(1, 2), keepdims=True)
    if even:
        # Every pixel as noisy as the others: what depends on weights alone follows without a transform.
        variance, valid = np.broadcast_to(units[:, None, None], images.shape), np.ones_like(valid)
    weight = np.where(valid, 1 / variance, 0)
    chi2, contrast, n_bands = np.zeros((3, 13, 17))
    for b in range(2):

        def around(plane, kernel):
            return ndimage.correlate(plane, kernel, mode="constant")

        first, second = filters[b]
        signal, information = around(weight[b] * images[b], first), around(weight[b], first**2)
        local = around(weight[b], second) * signal / around(weight[b], first)
        response = around(weight[b] * images[b], second) - local
        n_bands += information > 0
        chi2 += np.maximum(signal, 0) ** 2 / information
        contrast += np.maximum(response, 0) ** 2 / around(weight[b], second**2)
    arrays = images.astype(np.float32), variance.astype(np.float32), valid
    got = filtered(arrays, filters, units, side)
    for plane, total in zip(got, (chi2, contrast), strict=True):
        # Straight lines between the entries of the table, 0.01 apart, and transforms in float32.
        expected = np.choose(n_bands.astype(int), [np.interp(np.sqrt(total), *_equivalent_sigma(n)) for n in (1, 1, 2)])
        np.testing.assert_allclose(plane, np.where(n_bands > 0, expected, 0), rtol=1e-4, atol=3e-4)


def test_significance_of_a_bright_star_in_one_band_is_its_signal_to_noise():
    significance, _ = detection_images(coadd_of(stars((60, 60), [(30, 30)], 1e4, n_bands=1)))
    assert significance[30, 30] == pytest.approx(1e4, abs=5)  # the noise of the measurement is 1


def test_star_is_found_at_its_pixel(config):
    positions = [(20, 15), (40, 45), (12, 50)]
    detection = detect(coadd_of(stars((60, 60), positions, [30, 20, 10])), config)
    np.testing.assert_array_equal(detection.peaks, positions)


def test_star_in_a_single_band_is_found(config):
    images = np.random.default_rng(2).normal(size=(6, 60, 60))
    images[3] = stars((60, 60), [(30, 30)], 15.0, n_bands=1)[0]
    assert [tuple(peak) for peak in detect(coadd_of(images), config).peaks] == [(30, 30)]


def test_noise_alone_holds_nothing(config):
    detection = detect(coadd_of(np.random.default_rng(3).normal(size=(6, 200, 200))), config)
    assert len(detection.peaks) == 0
    assert not detection.footprints.any()


def test_noise_on_a_wide_bright_halo_is_hardly_ever_a_peak(config):
    y, x = np.indices((150, 150)) - 75
    halo = 30 * np.exp(-np.hypot(y, x) / 15)  # 5000 pixels of it above the threshold
    n_peaks = [
        len(detect(coadd_of(halo + np.random.default_rng(seed).normal(size=(3, 150, 150))), config).peaks)
        for seed in range(5)
    ]
    assert min(n_peaks) >= 1
    assert np.mean(n_peaks) <= 3


def test_wide_smooth_source_is_a_peak(config):
    y, x = np.indices((150, 150)) - 75
    image = 1.0 * np.exp(-0.5 * (y**2 + x**2) / 15**2) + np.random.default_rng(1).normal(size=(3, 150, 150))
    peaks = detect(coadd_of(image), config).peaks
    assert len(peaks) == 1
    assert np.hypot(*(peaks[0] - 75)) < 15


def test_two_stars_one_and_a_half_psf_widths_apart_are_two_peaks():
    peaks = detect(coadd_of(stars((60, 60), [(30, 27), (30, 33)], 100.0)), CONFIG).peaks
    assert sorted(map(tuple, peaks)) == [(30, 27), (30, 33)]


def test_clear_sources_of_a_field_are_found_and_nearly_nothing_else(config):
    found, clear, wrong, n_peaks = 0, 0, 0, 0
    for seed in range(5):
        scene = simulate_scene(seed=seed)
        peaks = detect(scene.coadd, config).peaks
        distance, _ = cKDTree(np.stack([scene.truth["y"], scene.truth["x"]], axis=1)).query(peaks)
        wrong, n_peaks = wrong + (distance > 2.5).sum(), n_peaks + len(peaks)
        rows = scene.truth[(scene.truth["snr"] > 10) & (scene.truth["blendedness"] < 0.2)]
        distance, _ = cKDTree(peaks).query(np.stack([rows["y"], rows["x"]], axis=1))
        found, clear = found + (distance < 2.5).sum(), clear + len(rows)
    assert found > 0.97 * clear
    assert wrong < 0.02 * n_peaks


def test_peaks_lie_in_footprints_and_every_footprint_has_one(config):
    detection = detect(simulate_scene(kind="crowded", seed=1, shape=(200, 200)).coadd, config)
    at_peaks = detection.footprints[tuple(detection.peaks.T)]
    assert set(at_peaks) == set(range(1, detection.footprints.max() + 1))


def test_peaks_are_ordered_by_significance_and_apart():
    coadd = simulate_scene(seed=1).coadd
    peaks = detect(coadd, CONFIG).peaks
    assert (np.diff(detection_images(coadd)[0][tuple(peaks.T)]) <= 0).all()
    assert len(cKDTree(peaks).query_pairs(CONFIG.min_separation * (1 - 1e-9))) == 0


def test_shifting_the_image_shifts_the_answer(config):
    content = simulate_scene(seed=2, bands=("g", "r", "i"), shape=(120, 100)).coadd
    frames = np.full((2, 3, 160, 150), np.nan)
    frames[0, :, 10:130, 10:110] = content.images
    frames[1, :, 33:153, 21:121] = content.images
    variance = np.nanmean(content.variance, axis=(1, 2))[:, None, None]
    here, there = (detect(coadd_of(frame, variance), config) for frame in frames)
    assert len(here.peaks) > 5
    np.testing.assert_array_equal(there.peaks, here.peaks + np.array([23, 11]))
    np.testing.assert_array_equal(there.footprints[23:, 11:], here.footprints[:-23, :-11])


@pytest.mark.parametrize("axis", [1, 2])
def test_flipping_the_image_flips_the_answer(axis, config):
    coadd = simulate_scene(seed=2, bands=("g", "r")).coadd
    psf = np.asarray(coadd.psfs)[0]
    flipped = coadd_of(np.flip(coadd.images, axis), np.flip(coadd.variance, axis), np.flip(psf, axis - 1))
    here, there = detect(coadd_of(coadd.images, coadd.variance, psf), config), detect(flipped, config)
    expected = here.peaks.copy()
    expected[:, axis - 1] = coadd.shape[axis - 1] - 1 - expected[:, axis - 1]
    np.testing.assert_array_equal(there.peaks, expected)
    np.testing.assert_array_equal(there.footprints > 0, np.flip(here.footprints, axis - 1) > 0)


def test_unit_of_a_band_does_not_matter(config):
    images = stars((80, 80), [(20, 20), (50, 60)], 15.0, n_bands=3)
    factor = np.array([1e-8, 1.0, 1e6])[:, None, None]
    plain, scaled = detect(coadd_of(images), config), detect(coadd_of(images * factor, factor**2), config)
    np.testing.assert_array_equal(scaled.peaks, plain.peaks)
    np.testing.assert_array_equal(scaled.footprints, plain.footprints)


def test_band_without_a_valid_pixel_does_not_matter(config):
    images = stars((80, 80), [(20, 20), (50, 60)], 12.0, n_bands=3)
    masked = np.concatenate([images, np.full((1, 80, 80), np.nan)])
    np.testing.assert_array_equal(detect(coadd_of(masked), config).peaks, detect(coadd_of(images), config).peaks)


def test_values_of_invalid_pixels_do_not_matter():
    images = stars((80, 80), [(20, 20), (50, 60)], 12.0)
    mask = np.zeros((80, 80), dtype=bool)
    mask[30:40, :] = mask[:, 35] = True
    junk = np.where(mask, 1e6, images)
    blank, full = (detection_images(coadd_of(image, mask=mask)) for image in (images, junk))
    np.testing.assert_array_equal(full, blank)


def test_star_with_a_masked_core_is_one_peak_there(config):
    images = stars((80, 80), [(40, 40)], 300.0)
    images[:, 39:42, 39:42] = np.nan
    peaks = detect(coadd_of(images), config).peaks
    assert len(peaks) == 1
    assert np.hypot(*(peaks[0] - 40)) < 2


def test_nothing_is_found_where_no_pixel_is_valid():
    images = stars((80, 80), [(40, 40)], 300.0)
    images[:, 10:70, 10:70] = np.nan
    significance, contrast = detection_images(coadd_of(images))
    assert not significance[25:55, 25:55].any()
    assert not contrast[25:55, 25:55].any()


def test_coadd_without_a_valid_pixel_holds_nothing(config):
    detection = detect(coadd_of(np.full((2, 30, 40), np.nan)), config)
    assert detection.peaks.shape == (0, 2)
    assert detection.footprints.shape == (30, 40)
    assert not detection.footprints.any()


@pytest.mark.parametrize("shape", [(1, 1), (3, 70), (9, 9)])
def test_image_smaller_than_the_psf_is_searched(shape, config):
    images = np.zeros((2, *shape))
    images[:, shape[0] // 2, shape[1] // 2] = 1e3
    detection = detect(coadd_of(images), replace(config, min_area=1))
    assert detection.footprints.shape == shape


def test_image_of_many_blocks_is_one_image():
    positions = [(y, x) for y in range(30, 700, 43) for x in range(30, 400, 41)]
    peaks = detect(coadd_of(stars((720, 420), positions, 40.0)), CONFIG).peaks
    assert sorted(map(tuple, peaks)) == positions


def test_psf_of_one_pixel_finds_single_pixels():
    images = np.zeros((1, 30, 30))
    images[0, 10, 20] = 8.0
    config = DetectionConfig(min_area=1)
    assert [tuple(peak) for peak in detect(coadd_of(images, psf=np.ones((1, 1))), config).peaks] == [(10, 20)]


def test_footprints_grow_by_the_given_distance():
    coadd = coadd_of(stars((60, 60), [(30, 30)], 50.0))
    plain = detect(coadd, DetectionConfig(grow=0)).footprints > 0
    grown = detect(coadd, DetectionConfig(grow=5)).footprints > 0
    distance, _ = cKDTree(np.argwhere(plain)).query(np.argwhere(np.ones((60, 60))))
    np.testing.assert_array_equal(grown, distance.reshape(60, 60) <= 5)


def test_footprints_that_touch_after_growing_are_one():
    coadd = coadd_of(stars((60, 80), [(30, 30), (30, 50)], 30.0))
    assert detect(coadd, DetectionConfig(grow=0)).footprints.max() == 2
    assert detect(coadd, DetectionConfig(grow=8)).footprints.max() == 1


def test_small_footprints_are_dropped():
    coadd = coadd_of(stars((60, 60), [(30, 30)], 6.0, n_bands=1, seed=5))
    assert len(detect(coadd, DetectionConfig(min_area=1)).peaks) == 1
    assert len(detect(coadd, DetectionConfig(min_area=100)).peaks) == 0


def test_origin_does_not_matter(config):
    images = stars((60, 60), [(20, 30)], 20.0)
    np.testing.assert_array_equal(detect(coadd_of(images, origin=(1000, -5)), config).peaks, [(20, 30)])


def test_of_a_plateau_its_middle_counts():
    image = np.zeros((12, 12))
    image[3:6, 4:9] = 7.0
    np.testing.assert_array_equal(_maxima(image, image > 1), [(4, 6)])


def test_of_two_peaks_too_close_the_first_is_kept():
    peaks = np.array([(10, 10), (10, 13), (10, 16), (10, 20)])
    np.testing.assert_array_equal(_separate(peaks, 4.0), [(10, 10), (10, 16), (10, 20)])


def test_every_given_peak_has_a_footprint_and_every_footprint_a_peak():
    coadd = simulate_scene(seed=1).coadd
    peaks = np.random.default_rng(0).integers(0, 160, (20, 2))
    labels = footprints_of_peaks(coadd, peaks, CONFIG)
    assert set(labels[tuple(peaks.T)]) == set(range(1, labels.max() + 1))


def test_footprints_of_the_peaks_that_were_found_are_those_that_were_found():
    coadd = simulate_scene(seed=1).coadd
    detection = detect(coadd, CONFIG)
    np.testing.assert_array_equal(footprints_of_peaks(coadd, detection.peaks, CONFIG), detection.footprints)


def test_peak_on_empty_sky_has_a_square_footprint_cut_at_the_edge():
    labels = footprints_of_peaks(coadd_of(np.zeros((1, 40, 40))), np.array([(2, 20)]), CONFIG)
    height, width = Box.where(labels > 0).shape
    assert width == 2 * (height - 3) + 1
    assert 12 <= width <= 16  # three PSF widths of 4 pixels, and what the wings add to the effective width
    assert labels.sum() == height * width


def test_peak_on_empty_sky_close_to_a_footprint_joins_it():
    coadd = coadd_of(stars((60, 60), [(30, 30)], 30.0))
    labels = footprints_of_peaks(coadd, np.array([(30, 30), (30, 44), (10, 10)]), CONFIG)
    assert labels[30, 30] == labels[30, 44]
    assert labels[10, 10] not in (0, labels[30, 30])


def test_band_without_a_psf_does_not_matter():
    images = stars((80, 80), [(20, 20), (50, 60)], 12.0, n_bands=3)

    def field(y, x, band):
        return PSF if band != "band1" else np.zeros((3, 3))

    two = coadd_of(images[[0, 2]])
    three = Coadd(images=images, variance=1.0, psfs=field, bands=["band0", "band1", "band2"])
    np.testing.assert_array_equal(detect(three, CONFIG).peaks, detect(two, CONFIG).peaks)


def test_a_psf_that_is_missing_in_the_middle_is_taken_from_elsewhere():
    images = stars((80, 80), [(20, 20), (50, 60)], 12.0)

    def field(y, x, band):
        if 30 < y < 50 and 30 < x < 50:
            raise LookupError("no PSF here")
        return PSF

    coadd = Coadd(images=images, variance=1.0, psfs=field, bands=["band0", "band1"])
    np.testing.assert_array_equal(detect(coadd, CONFIG).peaks, detect(coadd_of(images), CONFIG).peaks)


def varying_psf(y, x, band):
    """A PSF that gets wider to the right: 3 to 5 pixels over 600."""
    return MoffatPsf(fwhm_pix=3.0 + 2.0 * np.clip(x, 0, 600) / 600, beta=3.5).stamp()[8:-8, 8:-8]


def field_coadd(shape=(300, 600), origin=(0, 0), psfs=varying_psf, seed=0):
    images = stars(shape, [(y, x) for y in range(40, 280, 60) for x in range(40, 580, 60)], 12.0, seed=seed)
    return Coadd(images=images, variance=1.0, psfs=psfs, bands=["band0", "band1"], origin=origin)


@pytest.mark.parametrize("psfs", [np.stack([PSF, PSF]), varying_psf], ids=["one PSF", "field of PSFs"])
def test_number_of_threads_does_not_matter(psfs):
    coadd = field_coadd(psfs=psfs)
    one, two = detect(coadd, CONFIG), detect(coadd, CONFIG, workers=2)
    for name in ("peaks", "footprints", "band_snr", "alone"):
        np.testing.assert_array_equal(getattr(two, name), getattr(one, name))
    given = [footprints_of_peaks(coadd, one.peaks, CONFIG, workers=workers) for workers in (1, 2)]
    np.testing.assert_array_equal(*given)


def test_each_cell_is_filtered_with_its_own_psf():
    coadd = field_coadd()
    significance, _ = detection_images(coadd)
    # Cells end at 256, 512 and 600; the middle of the image part of the second is at x = 383.5.
    alone = coadd_of(coadd.images, psf=varying_psf(0, 383.5, "band0"))
    expected, _ = detection_images(alone)
    inside = np.s_[:256, 256:512]
    # Transforms in float32, of blocks that are cut differently.
    np.testing.assert_allclose(significance[inside], expected[inside], rtol=1e-4, atol=1e-3)
    assert not np.allclose(significance[:256, 512:], expected[:256, 512:], rtol=1e-2, atol=1e-2)


def test_cells_are_fixed_to_the_coordinates():
    whole = field_coadd(origin=(100, 1000))
    box = Box(100 + 12, 1000 + 24, 256, 512)  # whole cells: they begin at 112 - 112 % 256 and 1024
    part = whole.cutout(Box(100, 1000 + 24, 300, 512))
    here, there = (detection_images(coadd)[0] for coadd in (whole, part))
    rows, columns = np.s_[: box.height], np.s_[24 + 30 : 24 + 512 - 30]
    np.testing.assert_allclose(there[rows, 30 : 512 - 30], here[rows, columns], rtol=1e-4, atol=1e-3)


def test_band_without_a_psf_in_a_cell_is_left_out_there():
    def field(y, x, band):
        if band == "band1" and x < 256:
            raise LookupError("no PSF here")
        return PSF

    coadd = field_coadd(psfs=field)
    significance, _ = detection_images(coadd)
    one, _ = detection_images(coadd_of(coadd.images[:1]))
    both, _ = detection_images(coadd_of(coadd.images))
    np.testing.assert_allclose(significance[:, :256], one[:, :256], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(significance[:, 256:], both[:, 256:], rtol=1e-4, atol=1e-3)
    detection = detect(coadd, CONFIG)
    left = detection.peaks[:, 1] < 256
    assert np.isnan(detection.band_snr[left, 1]).all()
    assert not detection.alone[left, 1].any()
    assert np.isfinite(detection.band_snr[~left]).all()


def test_psf_field_that_is_constant_gives_what_the_constant_does():
    coadd, constant = field_coadd(psfs=lambda y, x, band: PSF), field_coadd(psfs=np.stack([PSF, PSF]))
    here, there = detect(coadd, CONFIG), detect(constant, CONFIG)
    np.testing.assert_array_equal(here.peaks, there.peaks)
    np.testing.assert_array_equal(here.footprints, there.footprints)
    np.testing.assert_allclose(here.band_snr, there.band_snr, rtol=1e-12)


def test_signal_to_noise_per_band_is_that_of_a_fit_of_the_psf():
    rng = np.random.default_rng(6)
    images, variance = rng.normal(size=(2, 50, 60)) + 3, rng.uniform(0.5, 2, size=(2, 50, 60))
    images[1, 20:24, 30:33] = np.nan
    peaks = np.array([(22, 31), (0, 59), (40, 10)])
    coadd = coadd_of(images, variance)
    half = len(PSF) // 2
    for (y, x), row in zip(peaks, measure_band_snr(coadd, peaks), strict=True):
        model = np.zeros((50 + 2 * half, 60 + 2 * half))
        model[y : y + len(PSF), x : x + len(PSF)] = PSF
        weight = np.where(coadd.valid, 1 / coadd.variance, 0.0) * model[half:-half, half:-half]
        flux = np.nansum(weight * coadd.images, axis=(1, 2))
        expected = flux / np.sqrt((weight * model[half:-half, half:-half]).sum(axis=(1, 2)))
        # The faint wings of the PSF, a millionth of its power, are cut off; a constant sky under them counts.
        np.testing.assert_allclose(row, expected, rtol=0.1)


def test_source_of_six_sigma_in_one_band_of_six_is_found_and_the_band_named():
    rng = np.random.default_rng(8)
    found, n = 0, 25
    for _ in range(n):
        images = rng.normal(size=(6, 60, 60))
        noise = measure_band_snr(coadd_of(images), np.array([(30, 30)]))[0, 3]
        half = len(PSF) // 2
        images[3, 30 - half : 31 + half, 30 - half : 31 + half] += (6.0 - noise) * PSF / np.sqrt((PSF**2).sum())
        # Six sigma measured, by construction. One pixel is enough: this near to the threshold others are below it.
        detection = detect(coadd_of(images), DetectionConfig(min_area=1))
        near = np.hypot(*(detection.peaks - 30).T) < 3
        found += near.any()
        assert not near.any() or list(np.flatnonzero(detection.alone[near][0])) == [3]
    assert found == n


def bright_object(seed, profile, gain, shape=(240, 240), full=np.inf):
    """A bright object in the middle with its photon noise, and 12 stars of about 30 sigma around; pixels that are too
    bright are masked, each band for itself."""
    rng = np.random.default_rng(seed)
    y, x = np.indices(shape) - 120
    angle, distance = rng.uniform(0, 2 * np.pi, 12), np.linspace(45, 110, 12)
    positions = np.stack([120 + distance * np.sin(angle), 120 + distance * np.cos(angle)], axis=1)
    sky = stars(shape, np.round(positions).astype(int), 30.0, n_bands=3, seed=seed)
    images, variance = [], []
    for band in sky:
        light = profile(np.hypot(y, x))
        photons = 1.0 + light / gain
        images.append(light + band * np.sqrt(photons))  # the stars are stronger on the light, to be seen there
        variance.append(photons)
    images = np.array(images)
    return coadd_of(images, np.array(variance), mask=images > full), np.round(positions)


def moffat(flux):
    return lambda r: flux * 1.8 / (np.pi * 16) * (1 + (r / 4) ** 2) ** -2.8


@pytest.mark.parametrize("flux", [1e4, 1e5, 1e6])
def test_bright_star_with_its_photon_noise_is_one_peak(flux):
    coadd, positions = bright_object(1, moffat(flux), gain=5.0)
    peaks = detect(coadd, CONFIG).peaks
    assert sum(np.hypot(*(peaks - 120).T) < 25) == 1
    assert len(peaks) == 1 + len(positions)


@pytest.mark.parametrize("flux", [3e6, 1e8])
def test_saturated_star_is_one_peak_in_the_middle_of_its_core(flux):
    n_false = 0
    for seed in range(4):
        coadd, positions = bright_object(seed, moffat(flux), gain=5.0, full=3000.0)
        assert 3 <= np.sqrt((~coadd.valid[0]).sum() / np.pi) <= 30
        detection = detect(coadd, CONFIG)
        distance, _ = cKDTree(np.concatenate([positions, [(120, 120)]])).query(detection.peaks)
        n_false += (distance > 2).sum()
        assert tuple(detection.peaks[0]) == (120, 120)
        assert cKDTree(detection.peaks).query(positions)[0].max() < 2
        labels = footprints_of_peaks(coadd, detection.peaks, CONFIG)
        np.testing.assert_array_equal(labels, detection.footprints)
    # Without a word on cores and photon noise, there are seven to fourteen on the rim of each.
    assert n_false <= 2


def test_hole_in_the_sky_is_no_star():
    images = stars((120, 120), [(20, 20)], 30.0)
    images[:, 50:70, 50:80] = np.nan
    images[0, :, 100:108] = np.nan
    np.testing.assert_array_equal(detect(coadd_of(images), CONFIG).peaks, [(20, 20)])


def test_strip_across_a_galaxy_hides_no_star():
    y, x = np.indices((150, 150)) - 75
    image = 40 * np.exp(-np.hypot(y, x) / 12) + stars((150, 150), [(75, 100)], 40.0, n_bands=3)
    image[:, :, 85:92] = np.nan  # off the middle, so that light falls through it from one side to the other
    peaks = detect(coadd_of(image), CONFIG).peaks
    for known in [(75, 75), (75, 100)]:
        assert np.hypot(*(peaks - known).T).min() < 3
    assert not ((peaks[:, 1] >= 85) & (peaks[:, 1] < 92)).any()
    assert len(peaks) <= 4


def test_large_bright_galaxy_is_one_peak_and_few_more():
    def galaxy(r):
        return 2e4 * np.exp(-7.67 * ((r / 25 + 1e-3) ** 0.25))

    n_false = []
    for seed in range(4):
        coadd, positions = bright_object(seed, galaxy, gain=5.0)
        peaks = detect(coadd, CONFIG).peaks
        assert np.hypot(*(peaks - 120).T).min() < 2
        distance, _ = cKDTree(np.concatenate([positions, [(120, 120)]])).query(peaks)
        wrong = peaks[distance > 2]
        n_false.append(len(wrong))
        # Where the light is well above the threshold, nothing; where it fades, noise lifts islands above it.
        assert (detection_images(coadd)[0][tuple(wrong.T)] > 2 * CONFIG.peak_threshold).sum() <= 1
        assert (cKDTree(peaks).query(positions)[0] < 2).sum() >= 11
    assert np.mean(n_false) <= 15  # on 50 000 pixels of light


@pytest.mark.parametrize("masked", [False, True], ids=["all valid", "with masks"])
@pytest.mark.parametrize(
    ("n_bands", "sigma", "side"), [(1, 3.0, 1400), (1, 3.5, 1400), (1, 4.0, 3000), (6, 3.0, 1400), (6, 3.5, 1400)]
)
def test_noise_makes_as_many_peaks_as_theory_says(n_bands, sigma, side, masked):
    rng = np.random.default_rng(10 * n_bands + masked)
    images = rng.normal(size=(n_bands, side, side)).astype(np.float32)
    if masked:
        images[rng.uniform(size=images.shape) < 0.02] = np.nan
        images[:, 200:240] = np.nan
        images[0, :, 700:720] = np.nan
    coadd = coadd_of(images)
    config = DetectionConfig(threshold=sigma, peak_threshold=sigma, min_area=1, min_separation=0.0, grow=0)
    n_peaks = len(detect(coadd, config).peaks)
    expected = false_peak_density([PSF] * n_bands, sigma) * coadd.valid.any(axis=0).sum()
    assert expected > 60
    # Four times the Poisson noise, and a tenth for what theory leaves out: peaks are not all islands, islands may have
    # two.
    assert abs(n_peaks - expected) < 4 * np.sqrt(expected) + 0.1 * expected


@pytest.mark.parametrize(("n_bands", "sigma"), [(1, 3.5), (1, 4.0), (6, 4.0)])
def test_noise_makes_at_most_as_many_wavelet_peaks_as_theory_says(n_bands, sigma):
    images = np.random.default_rng(n_bands).normal(size=(n_bands, 1000, 1000)).astype(np.float32)
    config = DetectionConfig(
        method="wavelet", threshold=sigma, peak_threshold=sigma, min_area=1, min_separation=0.0, grow=0
    )
    n_peaks = len(detect(coadd_of(images), config).peaks)
    expected = false_peak_density([PSF] * n_bands, sigma, "wavelet") * 1e6
    assert expected > 30
    # A third of the peaks of a plane are near one of a finer plane.
    assert 0.6 * expected - 4 * np.sqrt(expected) < n_peaks < 1.1 * expected + 4 * np.sqrt(expected)


def test_wavelets_tell_a_pair_apart_and_a_narrow_source_on_a_wide_one():
    config = DetectionConfig(method="wavelet")
    peaks = detect(coadd_of(stars((60, 60), [(30, 26), (30, 34)], 100.0)), config).peaks
    assert sorted(map(tuple, peaks)) == [(30, 26), (30, 34)]
    y, x = np.indices((120, 120)) - 60
    images = stars((120, 120), [(60, 75)], 40.0) + 5 * np.exp(-0.5 * (y**2 + x**2) / 12**2)
    peaks = detect(coadd_of(images), config).peaks
    assert (60, 75) in map(tuple, peaks)
    assert np.hypot(*(peaks - [60, 60]).T).min() < 6


def test_values_of_invalid_pixels_do_not_matter_to_wavelets():
    images = stars((80, 80), [(20, 20), (50, 60)], 12.0)
    mask = np.zeros((80, 80), dtype=bool)
    mask[30:40, :] = mask[:, 35] = True
    junk = np.where(mask, 1e6, images)
    blank, full = (wavelet_images(coadd_of(image, mask=mask)) for image in (images, junk))
    np.testing.assert_array_equal(full, blank)


def test_a_bright_source_in_one_plane_is_as_bright_as_it_is():
    # Beyond the table of significances, which ends at 30 sigma.
    planes = wavelet_images(coadd_of(stars((60, 60), [(30, 30)], 1e4, n_bands=1)))
    assert planes.max() > 1000
    assert np.argwhere(planes[0] == planes[0].max()).tolist() == [[30, 30]]


def test_method_must_be_known():
    with pytest.raises(ConfigError, match="detection.method must be 'psf' or 'wavelet', got 'sharp'"):
        DetectionConfig(method="sharp")


def test_density_of_false_peaks_of_one_band_is_that_of_a_gaussian_field():
    width = 3.0  # wide, so that little lies between pixels
    r = np.arange(-20, 21)
    psf = np.exp(-0.5 * (r[:, None] ** 2 + r**2) / width**2)
    slope = 0.5 / width**2  # of the field along an axis: the PSF with itself is a Gaussian wider by sqrt(2)
    expected = slope * 4.0 * np.exp(-8.0) / (2 * np.pi) ** 1.5
    assert false_peak_density([psf], 4.0) == pytest.approx(expected, rel=0.1)


def test_workers_must_be_positive():
    with pytest.raises(InputError, match="workers must be at least 1, got 0"):
        detect(field_coadd(), CONFIG, workers=0)


# ---------------------------------------------------------------- background


def with_sky(scene, level):
    """Add a sky that rises across the image, in units of the noise of a pixel, to every band."""
    coadd = scene.coadd
    slope = np.linspace(0.5, 1.5, coadd.shape[1], dtype=np.float32)
    return replace(coadd, images=coadd.images + level * np.sqrt(coadd.variance) * slope)


def test_a_sky_is_taken_off():
    scene = simulate_scene(n_sources=12, shape=(200, 200), bands=("g", "r"), seed=3)
    raised = with_sky(scene, 2.0)
    cleaned = subtract_background(raised, 32)
    difference = (cleaned.images - scene.coadd.images) / np.sqrt(scene.coadd.variance)
    # A mesh of 32 pixels has a median that is known to 1.25 / 32 = 0.04 sigma, and some light of faint sources.
    assert np.median(np.abs(difference)) < 0.1
    assert np.median(raised.images - scene.coadd.images) > 0


def test_peaks_on_a_sky_are_those_without_it():
    scene = simulate_scene(n_sources=12, shape=(200, 200), bands=("g", "r"), seed=3, magnitudes=(19, 24))
    raised = with_sky(scene, 2.0)
    plain, config = DetectionConfig(), DetectionConfig(background=32)
    expected = detect(scene.coadd, plain).peaks
    assert len(detect(raised, plain).peaks) != len(expected)
    found = detect(raised, config).peaks
    distance = np.hypot(*(found[:, None] - expected).transpose(2, 0, 1))
    assert len(found) == len(expected)
    assert (distance.min(axis=1) <= 1).all()


def test_a_band_without_pixels_has_no_background():
    scene = simulate_scene(n_sources=4, shape=(80, 80), bands=("g", "r"), seed=3)
    images = scene.coadd.images.copy()
    images[1] = np.nan
    dark = replace(scene.coadd, images=images)
    assert np.isnan(subtract_background(dark, 16).images[1]).all()


def test_without_photutils_the_message_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "photutils.background", None)
    scene = simulate_scene(n_sources=1, shape=(40, 40), bands=("g",), seed=3)
    with pytest.raises(InputError, match=r"pip install 'kermes\[photometry\]'"):
        detect(scene.coadd, DetectionConfig(background=16))


@pytest.mark.parametrize("mesh", [0, -3, 7, 32.5, "wide"])
def test_a_mesh_that_is_none_is_refused(mesh):
    scene = simulate_scene(n_sources=1, shape=(40, 40), bands=("g",), seed=3)
    with pytest.raises(InputError, match="mesh must be a whole number of pixels, at least 8, got"):
        subtract_background(scene.coadd, mesh)
