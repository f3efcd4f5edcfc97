"""A tile full of poison: nothing fails, every peak has its row, and what lies far from the poison does not change."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

import kermes
from kermes.catalog import Flag
from kermes.config import Config, DetectionConfig
from kermes.detection import footprints_of_peaks
from kermes.psf import CellPsf
from kermes.simulation import VaryingPsf, simulate_patch
from tiles import MODELS, configuration, for_scene_models, values

SHAPE = (200, 420)
BANDS = ("g", "r", "i", "z")
CELL = (70, 70)

POISONED = 200
"""All poison has x below this."""

FAR = 40
"""Objects are far from the poison if their blend begins this much further right: wider than a PSF stamp, which is how
far the models of a blend reach beyond its box. No blend between is bright, so that none hands the change on."""

EDGE = ((0, 0), (0, 419), (199, 419), (199, 0), (199, 150), (90, 419), (0, 300))
"""Peaks on the outermost pixels, of nothing, some far from the poison."""


@cache
def tile():
    """Simulate the tile before it is poisoned: its arrays, its peaks, and the field of its PSF."""
    patch = simulate_patch(
        shape=SHAPE, bands=BANDS, seed=5, density_arcmin2=60, n_bright_stars=0, large_galaxy=False,
        masked_strip=False, psf_variation=0.03, magnitudes=(19.0, 27.0),
    )  # fmt: skip
    assert isinstance(patch.coadd.psfs, VaryingPsf)
    psf = CellPsf.sample(patch.coadd.psfs, box=patch.coadd.box, cell_shape=CELL, bands=BANDS, max_distance=0.0)
    return patch.coadd, np.concatenate([patch.peaks, EDGE]), psf


@cache
def footprints():
    """Find the footprints of the peaks on the tile before it is poisoned."""
    coadd, peaks, _ = tile()
    return footprints_of_peaks(coadd, peaks, DetectionConfig())


def arrays():
    """Copy what is to be poisoned, in double precision, and a mask without a bit."""
    coadd, _, psf = tile()
    return {
        "images": coadd.images.astype(float),
        "variance": coadd.variance.astype(float),
        "mask": np.zeros(coadd.images.shape, dtype=np.int32),
        "present": psf.present.copy(),
    }


def put_nan_blocks(data):
    data["images"][:, 20:55, 15:45] = np.nan
    data["images"][1, 120:150, 20:60] = np.inf


def put_zero_variance(data):
    data["variance"][:, 60:90, 60:100] = 0.0


def put_negative_variance(data):
    data["variance"][:2, 100:130, 90:130] = -1.0


def lose_psf(data):
    data["present"][1, 1] = False
    data["present"][2, 0, 2] = False


def mask_pixels(data):
    masked = np.random.default_rng(1).random((*data["mask"].shape[:2], POISONED)) < 0.05
    data["mask"][..., :POISONED][masked] |= 1
    data["images"][..., :POISONED][masked] = 1e4  # nothing that is masked may be looked at


def brightest_left():
    """Row and column of the brightest pixel that lies well inside the poisoned part."""
    part = tile()[0].images[2, :, : POISONED - 30]
    return np.unravel_index(part.argmax(), part.shape)


def saturate(data):
    y, x = brightest_left()
    rows, columns = np.indices(SHAPE)
    full = np.hypot(rows - y, columns - x) < 5
    data["images"][:, full] = data["images"][:, y, x][:, None]
    data["mask"][:, full] |= 2


def lose_band(data):
    data["images"][3] = np.nan


POISONS = {
    "NaN blocks": put_nan_blocks,
    "zero variance": put_zero_variance,
    "negative variance": put_negative_variance,
    "PSF missing in one cell": lose_psf,
    "five per cent of the pixels masked": mask_pixels,
    "a saturated star": saturate,
    "one band all NaN": lose_band,
}


def deblend(poisons, config: Config, bands=BANDS):
    """Deblend the tile after some poison, in some bands."""
    coadd, peaks, psf = tile()
    data = arrays()
    for poison in poisons:
        poison(data)
    kept = [BANDS.index(band) for band in bands]
    poisoned = kermes.Coadd(
        images=data["images"][kept],
        variance=data["variance"][kept],
        psfs=CellPsf(stamps=psf.stamps, bands=BANDS, cell_shape=CELL, present=data["present"], max_distance=0.0),
        bands=bands,
        mask=data["mask"][kept],
        mask_planes={"BAD": 0, "SAT": 1},
        unit=coadd.unit,
    )
    return kermes.deblend(poisoned, peaks, footprints(), config)


@pytest.fixture(scope="module", params=MODELS)
def config(request):
    """Settings of each model in turn."""
    return configuration(request.param)


@pytest.fixture(scope="module")
def clean(config):
    """Deblend the tile without poison."""
    return deblend([], config)


@pytest.fixture(scope="module")
def poisoned(config):
    """Deblend the tile with all poison at once."""
    return deblend(POISONS.values(), config)


def far_from_poison(result):
    """Whether the blend of each object lies far from the poison, shape (N,)."""
    start = np.asarray(result.blends["x0"])[np.asarray(result.objects["blend_id"]) - 1]
    return start >= POISONED + FAR


def assert_accounted(result):
    """Check that every peak has its row, and every flux that is missing its flag."""
    n_peaks = len(tile()[1])
    ledger = result.ledger()
    assert ledger["peaks"] == ledger["rows"] == len(result) == n_peaks
    assert sum(ledger["outcomes"].values()) == sum(ledger["reasons"].values()) == n_peaks
    assert "none" not in ledger["outcomes"]
    np.testing.assert_array_equal(result.objects["peak_index"], np.arange(n_peaks))
    unknown = np.isnan(values(result))
    np.testing.assert_array_equal(result.objects[Flag.NO_DATA], unknown.all(axis=1))
    np.testing.assert_array_equal(result.objects[Flag.MISSING_BAND], unknown.any(axis=1))
    for name in ("flux_err", "redistributed_flux", "redistributed_flux_err"):
        np.testing.assert_array_equal(np.isnan(values(result, name)), unknown, err_msg=name)
    assert np.isfinite(result.model_image()).all()


@pytest.mark.parametrize("poison", POISONS.values(), ids=POISONS)
def test_every_poison_alone_leaves_every_peak_its_row(poison, config):
    assert_accounted(deblend([poison], config))


def test_all_poison_together_leaves_every_peak_its_row(poisoned):
    assert_accounted(poisoned)


def test_poison_changes_nothing_far_from_it(config, poisoned):
    # The band that is NaN everywhere touches all objects: the tile to compare with has lost it too.
    before = deblend([lose_band], config)
    # How large the noise is, is found in the whole image, of which half is gone; it is found nearly the same.
    assert (np.abs(poisoned.noise_factors - before.noise_factors)[:3] < 0.1).all()
    config = replace(config, correlated_noise=False)
    before, poisoned = deblend([lose_band], config), deblend(POISONS.values(), config)
    far = far_from_poison(before)
    np.testing.assert_array_equal(far, far_from_poison(poisoned))
    # The right third of the tile, and not only the peaks of nothing.
    assert far.mean() > 1 / 3
    assert (values(before)[far, 2] > 20 * values(before, "flux_err")[far, 2]).sum() > 2
    for name in ("flux", "flux_err", "redistributed_flux"):
        old, new = values(before, name)[far], values(poisoned, name)[far]
        # Of the flux; of what is fainter than its error, of the error.
        scale = np.maximum(np.abs(old), values(before, "flux_err")[far])
        assert np.isfinite(old[:, :3]).all()
        assert (np.abs(new - old) <= 1e-4 * scale)[:, :3].all(), name


def test_poison_changes_what_it_lies_on(clean, poisoned):
    # Else the test before would show nothing.
    old, new = values(clean), values(poisoned)
    near = np.asarray(clean.objects["x"]) < POISONED
    changed = ~(np.abs(new - old) <= 1e-4 * np.abs(old))[:, :3].all(axis=1)
    assert changed[near].mean() > 0.8


def test_band_that_is_nan_everywhere_is_as_if_it_were_not_there():
    config = configuration("kermes")
    config = replace(config, profiles=replace(config.profiles, tolerance=1e-3))
    with_nan, without = deblend([lose_band], config), deblend([], config, bands=BANDS[:3])
    assert np.isnan(values(with_nan)[:, 3]).all()
    assert with_nan.objects[Flag.MISSING_BAND].all()
    # Fits stop where the next step is a small part of the error, 4 % at most here, where a galaxy has structure.
    difference = np.abs(values(with_nan)[:, :3] - values(without))
    assert (difference < 0.06 * values(without, "flux_err")).all()


@for_scene_models
def test_saturated_star_keeps_a_flux_from_its_wings(clean, config):
    result = deblend([saturate], config)
    y, x = brightest_left()
    star = np.argmin(np.hypot(clean.objects["y"] - y, clean.objects["x"] - x))
    assert result.objects[Flag.MASKED_PEAK][star]
    flux, expected = values(result)[star], values(clean)[star]
    # No better than that: what is left is beyond 5 pixels, some 5 % of the light.
    assert (np.abs(flux - expected) < 0.5 * expected).all()
