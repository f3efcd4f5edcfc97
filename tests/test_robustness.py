"""Whatever the data are like, every peak gets its row: with fluxes, or with NaN and a flag that says why."""

import logging
from dataclasses import replace

import numpy as np
import pytest

import kermes
from kermes.catalog import Flag, Outcome
from kermes.coadd import LARGEST_SIGNAL, Coadd
from kermes.config import FitConfig
from kermes.errors import InputError
from kermes.psf import model_psf
from tiles import MODELS, changed, configuration, for_scene_models, group_scene, same_pixels, scene, small_scene, values

NO_PIXEL_WARNING = pytest.mark.filterwarnings("ignore:.*no pixel of any band is valid:kermes.errors.DataWarning")


@pytest.fixture(scope="module", params=MODELS)
def config(request):
    """Settings of each model in turn."""
    return configuration(request.param)


@pytest.fixture(scope="module")
def small(config):
    return kermes.deblend(changed(small_scene().coadd), small_scene().peaks, config=config)


def assert_complete(result, n_peaks):
    """Check that every peak has its row, and every number that is missing a flag."""
    assert len(result) == n_peaks
    rows = result.objects
    np.testing.assert_array_equal(rows["peak_index"], np.arange(n_peaks))
    assert set(rows["outcome"]) <= {outcome.value for outcome in Outcome}
    unknown = np.isnan(values(result))
    excused = rows[Flag.MISSING_BAND] | rows[Flag.NO_DATA]
    assert not (unknown.any(axis=1) & ~excused).any()
    np.testing.assert_array_equal(rows[Flag.NO_DATA], unknown.all(axis=1))
    for name in ("flux", "redistributed_flux", "flux_err", "redistributed_flux_err"):
        np.testing.assert_array_equal(np.isfinite(values(result, name)), ~unknown, err_msg=name)
    assert np.isfinite(result.model_image()).all()
    for handle in result:
        for band in result.bands:
            assert np.isfinite(handle.redistributed(band).array).all()


def assert_fluxes_agree(result, expected, sigma, bands=slice(None)):
    """Check that fluxes lie within so many errors of those of another result."""
    difference = (values(result) - values(expected))[:, bands]
    assert (np.abs(difference) < sigma * values(expected, "flux_err")[:, bands]).all()


# ---------------------------------------------------------------- pixels


def images_with(change):
    """Images of the small scene, changed in place by a function of the images and its peaks."""
    images = small_scene().coadd.images.copy()
    change(images, small_scene().peaks)
    return images


def fill(place, value):
    def change(images, peaks):
        images[place] = value

    return change


def fill_peak(images, peaks):
    images[:, peaks[0, 0], peaks[0, 1]] = np.nan


def enlarge(images, peaks):
    images *= np.logspace(0, 4, images.shape[2], dtype=np.float32)


EVERYWHERE = (slice(None),) * 3
BLOCK = (slice(None), slice(20, 45), slice(20, 45))
IMAGES = {
    "one pixel is NaN": fill((0, 30, 30), np.nan),
    "a peak is NaN": fill_peak,
    "a block is NaN": fill(BLOCK, np.nan),
    "a block of one band is NaN": fill((0, *BLOCK[1:]), np.nan),
    "every second row is NaN": fill((slice(None), slice(None, None, 2)), np.nan),
    "one band is NaN": fill(1, np.nan),
    "all is NaN": fill(EVERYWHERE, np.nan),
    "one pixel is infinite": fill((0, 30, 30), np.inf),
    "one pixel is hot": fill((0, 30, 30), 1e6),
    "one pixel is far too large": fill((0, 30, 30), 1e30),
    "pixels are filled with the largest number": fill((slice(None), 30), 3.4e38),
    "all is negative": lambda images, peaks: np.negative(np.abs(images, out=images), out=images),
    "all is zero": fill(EVERYWHERE, 0),
    "all is constant": fill(EVERYWHERE, 5),
    "the sky is far below zero": lambda images, peaks: np.subtract(images, 100, out=images),
    "noise of very different strength": enlarge,
}


@NO_PIXEL_WARNING
@pytest.mark.parametrize("change", IMAGES.values(), ids=IMAGES)
def test_images_of_every_kind_give_every_peak_its_row(change, config):
    coadd = changed(small_scene().coadd, images=images_with(change))
    assert_complete(kermes.deblend(coadd, small_scene().peaks, config=config), len(small_scene().peaks))


@NO_PIXEL_WARNING
@pytest.mark.parametrize("place", [(0, slice(10, 40)), EVERYWHERE], ids=["some rows of a band", "everywhere"])
@pytest.mark.parametrize("value", [0, -1, np.inf, np.nan, 1e-45])
def test_variance_that_is_none_makes_pixels_invalid(place, value, config):
    variance = small_scene().coadd.variance.astype(float)
    variance[place] = value
    peaks = small_scene().peaks
    result = kermes.deblend(changed(small_scene().coadd, variance=variance), peaks, config=config)
    assert_complete(result, len(peaks))
    assert result.objects[Flag.NO_DATA].all() == (place == EVERYWHERE)


def test_pixels_that_stand_for_nothing_are_not_used(small, config):
    images = small.coadd.images.copy()
    images[:, 30] = np.nan
    filled = np.where(np.isnan(images), -2 * LARGEST_SIGNAL * np.sqrt(small.coadd.variance), images)
    results = [
        kermes.deblend(changed(small.coadd, images=pixels), small_scene().peaks, config=config)
        for pixels in (images, filled)
    ]
    assert same_pixels(*results)


def test_a_missing_pixel_changes_little(small, config):
    result = kermes.deblend(
        changed(small.coadd, images=images_with(IMAGES["one pixel is NaN"])), small_scene().peaks, config=config
    )
    assert_fluxes_agree(result, small, sigma=1)


def test_peak_on_a_masked_pixel_is_flagged_and_has_its_flux(small, config):
    coadd = changed(small.coadd, images=images_with(fill_peak))
    result = kermes.deblend(coadd, small_scene().peaks, config=config)
    np.testing.assert_array_equal(np.flatnonzero(result.objects[Flag.MASKED_PEAK]), [0])
    # Its brightest pixel is gone: a third of the information.
    assert_fluxes_agree(result, small, sigma=4)


@pytest.mark.parametrize("band", [0, 1, 2])
def test_band_that_is_masked_everywhere_is_missing_and_the_others_are_not(band, small, config):
    mask = np.zeros(small.coadd.images.shape, dtype=bool)
    mask[band] = True
    result = kermes.deblend(changed(small.coadd, mask=mask), small_scene().peaks, config=config)
    assert_complete(result, len(small))
    assert np.isnan(values(result)[:, band]).all()
    assert result.objects[Flag.MISSING_BAND].all()
    # The shapes are found without the band: fluxes move by their errors.
    assert_fluxes_agree(result, small, 4, [b for b in range(3) if b != band])


def test_band_that_is_missing_does_not_matter(config):
    coadd, peaks = small_scene().coadd, small_scene().peaks
    bands = [0, 2]
    images = coadd.images.copy()
    images[1] = np.nan
    two = Coadd(images=coadd.images[bands], variance=coadd.variance[bands], psfs=coadd.psfs[bands], bands=["g", "i"])
    three = kermes.deblend(changed(coadd, images=images), peaks, config=config)
    # Steps of free shapes are scaled by the mean over three bands or two; profiles are the same but for rounding; the
    # shares of templates are sums over footprints, of which one ends a pixel farther out.
    sigma = {"kermes": 0.02, "scarlet-lite": 3, "templates": 3}[config.model]
    assert_fluxes_agree(kermes.deblend(two, peaks, config=config), Bands(three, bands), sigma)


class Bands:
    """Some bands of a result."""

    def __init__(self, result, bands):
        self.objects, self.bands = result.objects, [result.bands[b] for b in bands]


@NO_PIXEL_WARNING
def test_image_without_a_valid_pixel_has_rows_that_say_so(tmp_path, config):
    coadd = changed(small_scene().coadd, mask=np.ones((70, 66), dtype=bool))
    result = kermes.deblend(coadd, small_scene().peaks, config=config)
    assert result.objects[Flag.NO_DATA].all()
    assert (result.objects["outcome"] == Outcome.PEAK).all()
    assert (result.objects["reason"] == "no_data").all()
    result.write(tmp_path / "out")
    assert len(kermes.open(tmp_path / "out")) == len(result)


def test_one_band_is_enough(small, config):
    coadd = small.coadd
    one = Coadd(images=coadd.images[2], variance=coadd.variance[2], psfs=coadd.psfs[2], bands=["i"])
    result = kermes.deblend(one, small_scene().peaks, config=config)
    assert_complete(result, len(small))
    assert_fluxes_agree(result, Bands(small, [2]), sigma=4)


def test_byte_order_does_not_matter(small, config):
    coadd = small.coadd
    swapped = changed(
        coadd,
        images=coadd.images.astype(">f4"),
        variance=coadd.variance.astype(">f8"),
        psfs=np.asarray(coadd.psfs).astype(">f8"),
    )
    assert same_pixels(kermes.deblend(swapped, small_scene().peaks.astype(">i4"), config=config), small)


def test_very_bright_star_has_its_flux_and_its_neighbours_their_rows(config):
    faint = scene(n_sources=6, shape=(120, 120), seed=4)
    coadd, psfs = faint.coadd, np.asarray(faint.coadd.psfs)
    flux = 1e5 * np.sqrt(coadd.variance[:, 0, 0] / (psfs**2).sum(axis=(1, 2)))
    images = coadd.images.copy()
    images[:, 40:81, 40:81] += flux[:, None, None] * psfs
    result = kermes.deblend(changed(coadd, images=images), np.concatenate([faint.peaks, [[60, 60]]]), config=config)
    assert_complete(result, len(faint.peaks) + 1)
    if config.model == "kermes":
        assert (np.abs(values(result)[-1] - flux) < 5 * values(result, "flux_err")[-1]).all()
    else:
        # Free-form shapes reach a few per cent of a star a hundred thousand times the noise, not its noise.
        np.testing.assert_allclose(values(result)[-1], flux, rtol=0.03)


@for_scene_models
@pytest.mark.parametrize("side", [3, 5])
def test_star_with_a_masked_core_in_one_band_has_its_flux(side, config):
    psf = model_psf(1.7, 31)
    images = np.random.default_rng(3).normal(size=(2, 80, 80))
    images[:, 25:56, 25:56] += 4000 * psf
    first, last = 40 - side // 2, 41 + side // 2
    images[0, first:last, first:last] = np.nan
    result = kermes.deblend(
        Coadd(images=images, variance=1, psfs=[psf] * 2, bands=["g", "r"]), [[40, 40]], config=config
    )
    # Free-form shapes follow the noise of the wings, a few per cent.
    allowed = np.maximum({"kermes": 0, "scarlet-lite": 80}[config.model], 5 * values(result, "flux_err")[0])
    assert (np.abs(values(result)[0] - 4000) < allowed).all()


# ---------------------------------------------------------------- peaks and footprints


def test_no_peaks_give_empty_tables_that_can_be_written(tmp_path, config):
    result = kermes.deblend(small_scene().coadd, [], config=config)
    assert [len(table) for table in (result.objects, result.parents, result.blends)] == [0, 0, 0]
    assert not result.model_image().any()
    result.write(tmp_path / "out")
    opened = kermes.open(tmp_path / "out", coadd=small_scene().coadd)
    assert len(opened) == 0
    assert opened.objects.colnames == result.objects.colnames


def test_image_of_noise_has_no_peaks(config):
    noise = np.random.default_rng(1).normal(size=(2, 60, 60))
    coadd = Coadd(images=noise, variance=1, psfs=[model_psf(1.6, 21)] * 2, bands=["g", "r"])
    result = kermes.deblend(coadd, config=config)
    assert len(result) == len(result.candidates) == 0


def test_duplicate_peaks_share_their_light_and_are_flagged(small, config):
    peaks = small_scene().peaks
    result = kermes.deblend(small.coadd, np.concatenate([peaks, peaks[:2], peaks[:1]]), config=config)
    assert_complete(result, len(peaks) + 3)
    flagged = np.flatnonzero(result.objects[Flag.DUPLICATE_PEAK])
    np.testing.assert_array_equal(flagged, len(peaks) + np.arange(3))
    together = values(result)[[0, len(peaks), len(peaks) + 2]].sum(axis=0)
    assert (np.abs(together - values(small)[0]) < 3 * values(small, "flux_err")[0]).all()


def test_peaks_in_the_corners_have_their_rows(config):
    coadd = small_scene().coadd
    corners = [[0, 0], [0, 65], [69, 0], [69, 65]]
    result = kermes.deblend(coadd, np.concatenate([small_scene().peaks, corners]), config=config)
    assert_complete(result, len(small_scene().peaks) + 4)
    assert result.objects[Flag.EDGE][-4:].all()


def test_peaks_in_every_pixel_have_their_rows(config):
    coadd = changed(small_scene().coadd)
    y, x = np.mgrid[20:40, 20:40]
    peaks = np.stack([y.ravel(), x.ravel()], axis=1)[:60]
    assert_complete(kermes.deblend(coadd, peaks, config=replace(config, fit=FitConfig(max_iterations=10))), 60)


def test_peaks_outside_of_given_footprints_have_rows_that_say_so(config):
    coadd, peaks = small_scene().coadd, small_scene().peaks
    labels = np.zeros(coadd.shape, dtype=int)
    labels[:, :33] = 1
    result = kermes.deblend(coadd, peaks, footprints=labels, config=config)
    assert_complete(result, len(peaks))
    outside = peaks[:, 1] >= 33
    assert 0 < outside.sum() < len(peaks)
    np.testing.assert_array_equal(result.objects[Flag.OUTSIDE_FOOTPRINT], outside)
    np.testing.assert_array_equal(result.objects[Flag.NO_DATA], outside)
    np.testing.assert_array_equal(result.objects["outcome"] == Outcome.PEAK, outside)


@pytest.mark.parametrize("label", [1, 2**40])
def test_one_footprint_may_be_the_whole_image(label, config):
    coadd, peaks = small_scene().coadd, small_scene().peaks
    result = kermes.deblend(coadd, peaks, footprints=np.full(coadd.shape, label), config=config)
    assert_complete(result, len(peaks))
    assert len(result.blends) == 1


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize("shape", [(20, 20), (1, 66), (66, 1), (1, 1), (2, 3), (7, 40)])
def test_image_smaller_than_the_psf_is_deblended(shape, config):
    coadd = small_scene().coadd
    window = (slice(None), slice(shape[0]), slice(shape[1]))
    cut = changed(coadd, images=coadd.images[window], variance=coadd.variance[window])
    peaks = [[shape[0] // 2, shape[1] // 2], [0, 0], [shape[0] - 1, shape[1] - 1]]
    assert_complete(kermes.deblend(cut, peaks, config=config), 3)


# ---------------------------------------------------------------- PSFs


def test_psf_need_not_sum_to_one(small, config):
    psfs = np.asarray(small.coadd.psfs)
    once, more = (  # a power of two: no bit is lost
        kermes.deblend(changed(small.coadd, psfs=psfs * factor), small_scene().peaks, config=config)
        for factor in (2, 8)
    )
    assert same_pixels(more, once)


def test_psf_stamps_may_have_even_sides_and_differ_in_size(small, config):
    g, r, i = np.asarray(small.coadd.psfs)
    result = kermes.deblend(
        changed(small.coadd, psfs=[g[:-1, :-1], r[8:-8, 8:-8], i[:, 6:-6]]), small_scene().peaks, config=config
    )
    assert_complete(result, len(small))
    # Wings of the PSF that are cut off are a few per cent of the flux.
    assert_fluxes_agree(result, small, sigma=4)


@pytest.mark.parametrize("psf", [model_psf(0.7, 21), np.ones((1, 1)), np.pad([[1.0]], 10)], ids=["0.7", "1x1", "delta"])
def test_psf_narrower_than_that_of_the_model_is_refused(psf):
    coadd = changed(small_scene().coadd, psfs=[np.asarray(small_scene().coadd.psfs)[0], psf, psf])
    with pytest.raises(InputError, match="psfs must be wider .* model_psf_sigma = 0.8 .* band 'r' is narrower"):
        kermes.deblend(coadd, small_scene().peaks, config=configuration("scarlet-lite"))


def test_a_narrower_model_psf_takes_narrower_psfs(small, config):
    psfs = [model_psf(0.7, 21)] * 3
    result = kermes.deblend(
        changed(small.coadd, psfs=psfs), small_scene().peaks, config=replace(config, model_psf_sigma=0.6)
    )
    assert_complete(result, len(small))


def field_without(coadd, band, *, below, answer):
    """PSF field in which one band has another answer above a row of the image."""

    def field(y, x, asked):
        if asked == band and y < below:
            return answer()
        return np.asarray(coadd.psfs)[coadd.bands.index(asked)]

    return field


def no_psf():
    raise LookupError("no PSF here")


ANSWERS = {
    "raises": no_psf,
    "NaN": lambda: np.full((41, 41), np.nan),
    "zero": lambda: np.zeros((5, 5)),
    "None": lambda: None,
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_band_without_a_psf_in_one_place_is_missing_there_alone(answer, caplog, config):
    assert_missing_in_one_place(answer, caplog, config)


def test_band_with_a_psf_narrower_than_that_of_the_model_in_one_place_is_missing_there_alone(caplog):
    assert_missing_in_one_place(lambda: np.pad([[1.0]], 3), caplog, configuration("scarlet-lite"))


def assert_missing_in_one_place(answer, caplog, config):
    """Check a result where the PSF of one band is as `answer` says in a part of the image."""
    coadd, peaks = group_scene().coadd, group_scene().peaks
    field = field_without(coadd, "r", below=45, answer=answer)
    with caplog.at_level(logging.WARNING):
        result = kermes.deblend(changed(coadd, psfs=field), peaks, config=config)
    assert_complete(result, len(peaks))
    missing = np.isnan(values(result))
    assert 0 < missing[:, 1].sum() < len(peaks)
    assert not missing[:, [0, 2]].any()
    assert "band r is not used" in caplog.text

    complete = kermes.deblend(changed(coadd), peaks, config=config)
    elsewhere = ~missing[:, 1]
    np.testing.assert_array_equal(values(result)[elsewhere], values(complete)[elsewhere])


def test_place_without_any_psf_has_rows_that_say_so(config):
    coadd, peaks = group_scene().coadd, group_scene().peaks

    def field(y, x, band):
        return np.asarray(coadd.psfs)[coadd.bands.index(band)] if y > 60 else no_psf()

    result = kermes.deblend(changed(coadd, psfs=field), peaks, config=config)
    assert_complete(result, len(peaks))
    assert 0 < result.objects[Flag.NO_DATA].sum() < len(peaks)


def test_psf_field_may_have_stamps_of_different_sizes(small, config):
    psfs = np.asarray(small.coadd.psfs)

    def field(y, x, band):
        cut = 6 if y < 30 else 0
        return psfs["gri".index(band)][cut : 41 - cut, cut : 41 - cut]

    assert_complete(kermes.deblend(changed(small.coadd, psfs=field), small_scene().peaks, config=config), len(small))


def test_constant_psf_field_is_that_psf(small, config):
    psfs = np.asarray(small.coadd.psfs)
    coadd = changed(small.coadd, psfs=lambda y, x, band: psfs["gri".index(band)])
    assert same_pixels(kermes.deblend(coadd, small_scene().peaks, config=config), small)


def test_bug_in_a_psf_field_stops_the_run(small, config):
    def field(y, x, band):
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        kermes.deblend(changed(small.coadd, psfs=field), small_scene().peaks, config=config)


# ---------------------------------------------------------------- everything at once


def junk(rng):
    """Draw a coadd with all kinds of defects, and peaks anywhere on it."""
    n_bands, (height, width) = int(rng.integers(1, 4)), rng.integers(1, 28, 2)
    images = rng.normal(size=(n_bands, height, width))
    y, x = np.indices((height, width))
    for _ in range(rng.integers(0, 6)):
        strength = 10 ** rng.uniform(0, rng.choice([2, 5, 9])) * rng.choice([1, 1, 1, -1])
        distance = (y - rng.integers(0, height)) ** 2 + (x - rng.integers(0, width)) ** 2
        colour = rng.uniform(0, 1, n_bands)[:, None, None]
        images += strength * colour * np.exp(-0.5 * distance / rng.uniform(1, 6) ** 2)
    variance = np.ones(images.shape) * 10 ** rng.uniform(-3, 3, (n_bands, 1, 1))
    hit = rng.uniform(size=images.shape) < 0.1
    images[hit] = rng.choice([np.nan, np.inf, 1e30, -3e38, 1e7], hit.sum())
    hit = rng.uniform(size=images.shape) < 0.1
    variance[hit] = rng.choice([0, -1, np.inf, np.nan], hit.sum())
    psfs = [model_psf(rng.uniform(0.85, 3), int(2 * rng.integers(3, 15) + 1)) for _ in range(n_bands)]
    coadd = Coadd(images=images, variance=variance, psfs=psfs, bands=["g", "r", "i"][:n_bands])
    n_peaks = int(rng.integers(0, 9))
    peaks = np.stack([rng.integers(0, height, n_peaks), rng.integers(0, width, n_peaks)], axis=1)
    footprints = rng.integers(0, 3, (height, width)) if rng.uniform() < 0.3 else None
    return coadd, peaks, footprints


@NO_PIXEL_WARNING
@pytest.mark.parametrize("seed", range(12))
def test_junk_gives_every_peak_its_row(seed, config):
    coadd, peaks, footprints = junk(np.random.default_rng(seed))
    assert_complete(kermes.deblend(coadd, peaks, footprints=footprints, config=config), len(peaks))
