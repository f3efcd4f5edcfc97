"""Forced photometry: fluxes in other images are true, errors and correlations are those of many realisations."""

from dataclasses import replace

import numpy as np
import pytest
from astropy import units
from astropy.wcs import WCS

import kermes
from kermes.catalog import forced_columns
from kermes.config import ProfileConfig
from kermes.errors import InputError
from kermes.forced import joint_fluxes
from kermes.rendering import SourceModels
from kermes.scene import ProfileComponent, Source
from kermes.simulation import simulate_scene

SHAPE = (61, 64)
STAR, GALAXY = np.array([30.3, 26.6]), np.array([31.2, 31.8])
FLUX = {"star": 3000.0, "galaxy": 5000.0}
GALAXY_SHAPE = np.array([[6.0, 1.5], [1.5, 3.0]])  # covariance along x and y [pixels^2]


def make_wcs(center, scale=1.0, turn=0.0, shape=SHAPE):
    """Tangential projection: `center` of the sky on the middle of the image, moved, larger pixels, turned [deg]."""
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval = [150.0, 2.0]
    wcs.wcs.crpix = [center[1] + 1, center[0] + 1]
    angle, size = np.radians(turn), scale * 0.2 / 3600
    wcs.wcs.cd = size * np.array([[-np.cos(angle), np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return wcs


def gaussian(shape, center, covariance):
    """Gaussian of flux one; covariance along x and y."""
    y, x = np.indices(shape)
    offset = np.stack([x - center[1], y - center[0]], axis=-1)
    square = np.einsum("...i,ij,...j", offset, np.linalg.inv(covariance), offset)
    return np.exp(-0.5 * square) / (2 * np.pi * np.sqrt(np.linalg.det(covariance)))


REFERENCE_WCS = make_wcs((30, 31))


def visit(flux, psf_sigma, noise, rng, wcs=None, shape=SHAPE, bands=("r",)):
    """Image of the star and the galaxy with a PSF, on the pixels of a WCS; fluxes in any order."""
    scale, jacobian, places = 1.0, np.eye(2), [STAR, GALAXY]
    if wcs is not None:

        def there(points):
            x, y = wcs.world_to_pixel(REFERENCE_WCS.pixel_to_world(points[:, 1], points[:, 0]))
            return np.stack([y, x], axis=1)

        places = there(np.array([STAR, GALAXY]))
        step = there(np.array([(30, 30), (30, 31), (31, 30)], dtype=float))
        jacobian = np.stack([(step[1] - step[0])[::-1], (step[2] - step[0])[::-1]], axis=1)
        scale = np.sqrt(abs(np.linalg.det(jacobian)))
    blur = psf_sigma**2 * np.eye(2)
    light = flux["star"] * gaussian(shape, places[0], blur)
    light += flux["galaxy"] * gaussian(shape, places[1], jacobian @ GALAXY_SHAPE @ jacobian.T + blur)
    assert scale > 0
    images = light + rng.normal(0, noise, (len(bands), *shape))
    return kermes.Coadd(
        images=images,
        variance=noise**2,
        psfs=[gaussian((31, 31), (15, 15), blur)] * len(bands),
        bands=bands,
        wcs=REFERENCE_WCS if wcs is None else wcs,
        unit="nJy",
    )


def true_models(n_bands):
    """The star and the galaxy, a Gaussian, as profiles."""
    values, vectors = np.linalg.eigh(GALAXY_SHAPE)
    angle = np.arctan2(vectors[1, 1], vectors[0, 1])
    length = 0.5 * np.log(values[1] / values[0])
    shapes = (
        (STAR, 0.0, np.zeros(2), 1.0),
        # Half of the light of a Gaussian is within 1.1774 sigma.
        (GALAXY, 1.177410 * values.prod() ** 0.25, length * np.array([np.cos(2 * angle), np.sin(2 * angle)]), 0.5),
    )
    sources = {}
    for number, (flux, (center, radius, shear, index)) in enumerate(zip(FLUX.values(), shapes, strict=True), start=1):
        y, x = (round(value) for value in center)
        component = ProfileComponent(
            spectrum=np.full(n_bands, flux, dtype=np.float32),
            center=center,
            radius=radius,
            shear=shear,
            index=index,
            sigma=0.8,
            box=kermes.Box(y - 24, x - 24, 48, 48),
        )
        sources[number] = Source(peak=(y, x), components=(component,))
    return sources


@pytest.fixture(scope="module")
def deep():
    """A result that has the true models."""
    coadd = visit(FLUX, 1.7, 1.0, np.random.default_rng(0), bands=("r", "i"))
    result = kermes.deblend(coadd, np.rint([STAR, GALAXY]).astype(int))
    np.testing.assert_allclose(result.objects["r_flux"], [3000, 5000], rtol=0.03)
    assert not len(result.candidates)
    return replace(result, models=true_models(2), total=None)


def robust(values):
    """Median and width."""
    middle = np.median(values)
    return middle, 1.4826 * np.median(np.abs(values - middle))


def test_fluxes_in_the_same_images_are_those_of_the_fit():
    scene = simulate_scene(n_sources=30, seed=3)
    # The mean over kinds is not the flux of the one whose shape is held.
    config = kermes.Config(profiles=ProfileConfig(average_kinds=False))
    result = kermes.deblend(scene.coadd, peaks=scene.peaks, config=config)
    table = kermes.forced_photometry(result, scene.coadd)
    assert table.colnames == [column.name for column in forced_columns(scene.coadd.bands)]
    np.testing.assert_array_equal(table["object_id"], result.objects["object_id"])
    for band in scene.coadd.bands:
        # The fit of the fluxes ended a hundredth of an error from where it would have gone.
        difference = np.abs(table[f"{band}_flux"] - result.objects[f"{band}_flux"])
        assert (difference < 0.02 * result.objects[f"{band}_flux_err"]).all()
        # Shapes are held: the errors of the fit, which are free to move, are larger.
        assert (table[f"{band}_flux_err"] < 1.01 * result.objects[f"{band}_flux_err"]).all()
    assert table["g_flux"].unit == scene.coadd.unit


VISITS = {
    "same pixels": None,
    "turned, moved and larger pixels": make_wcs((33.3, 28.8), scale=1.25, turn=25.0),
    "mirrored, smaller pixels": make_wcs((40.4, 40.1), scale=-0.8, turn=80.0),
}


@pytest.mark.parametrize("wcs", VISITS.values(), ids=VISITS)
def test_light_curves_are_recovered_within_their_errors(deep, wcs):
    rng = np.random.default_rng(5)
    assert 0.2 < deep.objects["r_observed_blendedness"][0] < 0.4
    true = 3000 * (1 + 0.3 * np.sin(np.arange(80)))
    shape = SHAPE if wcs is None else (75, 78)
    table = kermes.light_curves(
        deep,
        (
            (n, visit({**FLUX, "star": flux}, rng.uniform(1.6, 2.3), 8.0, rng, wcs, shape))
            for n, flux in enumerate(true)
        ),
    )
    star, galaxy = (table[table["object_id"] == number] for number in (1, 2))
    assert list(star["visit"]) == list(range(80))
    assert set(table["band"]) == {"r"}
    for rows, flux in ((star, true), (galaxy, 5000.0)):
        # 80 draws: a median is known to 0.14 and a width to 0.09, of which three times are allowed.
        middle, width = robust((rows["flux"] - flux) / rows["flux_err"])
        assert abs(middle) < 0.45
        assert 0.73 < width < 1.3
    # What the star does is not seen in the galaxy, but for what the covariance says.
    expected = np.median(star["correlation"])
    got = np.corrcoef((star["flux"] - true) / star["flux_err"], (galaxy["flux"] - 5000) / galaxy["flux_err"])[0, 1]
    assert abs(np.corrcoef(true, galaxy["flux"])[0, 1]) < 0.35
    assert got == pytest.approx(expected, abs=0.3)
    assert (star["neighbor_id"] == 2).all()


def test_errors_and_correlation_are_those_of_500_realisations(deep):
    rng = np.random.default_rng(9)
    clean = visit(FLUX, 2.2, 1e-6, rng)
    tables = []
    for _ in range(500):
        images = clean.images + rng.normal(0, 10.0, clean.images.shape)
        tables.append(kermes.forced_photometry(deep, replace(clean, images=images, variance=100.0)))
    flux = np.array([table["r_flux"] for table in tables])
    np.testing.assert_allclose(flux.std(axis=0), tables[0]["r_flux_err"], rtol=0.12)  # four times 1 / sqrt(1000)
    assert np.corrcoef(flux.T)[0, 1] == pytest.approx(tables[0]["r_correlation"][0], abs=0.1)
    assert abs(tables[0]["r_correlation"][0]) > 0.2


def test_a_vanished_source_has_no_flux_and_a_negative_one_a_negative_flux(deep):
    rng = np.random.default_rng(2)
    for flux in (0.0, -500.0):
        row = kermes.forced_photometry(deep, visit({**FLUX, "star": flux}, 2.0, 5.0, rng))[0]
        assert abs(row["r_flux"] - flux) < 5 * row["r_flux_err"]


def test_joint_fluxes_agree_with_dense_least_squares():
    rng = np.random.default_rng(3)
    shape, n = (20, 24), 6
    boxes = np.array([[rng.integers(10), rng.integers(14), 10, 10] for _ in range(n)])
    pixels = rng.uniform(0, 1, (1, 100 * n)).astype(np.float32)
    whole = np.zeros((n, *shape))
    for k, (y, x, _, _) in enumerate(boxes):
        whole[k, y : y + 10, x : x + 10] = pixels[0, 100 * k : 100 * k + 100].reshape(10, 10)
    image = rng.normal(size=shape).astype(np.float32)
    weights = np.where(rng.uniform(size=shape) < 0.1, 0, rng.uniform(0.5, 2, shape)).astype(np.float32)
    found = joint_fluxes(image, weights, SourceModels(boxes=boxes, offsets=np.arange(n + 1) * 100, pixels=pixels))
    matrix = np.einsum("ihw,jhw,hw->ij", whole, whole, weights)
    inverse = np.linalg.inv(matrix)
    expected = inverse @ np.einsum("ihw,hw,hw->i", whole, image, weights)
    errors = np.sqrt(np.diag(inverse))
    np.testing.assert_allclose(found.flux, expected, atol=1e-4 * errors.max())
    np.testing.assert_allclose(found.flux_err, errors, rtol=1e-4)
    correlation = inverse / np.outer(errors, errors) - np.eye(n)
    # Only those whose pixels overlap are neighbours.
    correlation[matrix == 0] = 0
    worst = np.abs(correlation).argmax(axis=1)
    np.testing.assert_array_equal(found.neighbor, worst)
    np.testing.assert_allclose(found.correlation, correlation[np.arange(n), worst], atol=1e-4)


def test_equal_models_share_their_flux():
    pixels = np.tile(np.ones(9, dtype=np.float32), 2)[None]
    models = SourceModels(boxes=np.array([[1, 1, 3, 3]] * 2), offsets=np.array([0, 9, 18]), pixels=pixels)
    found = joint_fluxes(np.full((5, 5), 2, np.float32), np.ones((5, 5), np.float32), models)
    np.testing.assert_allclose(found.flux, 1.0, rtol=1e-4)
    assert (found.flux_err > 100 / 3).all()


def test_what_is_outside_or_masked_is_said_to_be(deep):
    away = visit(FLUX, 1.8, 5.0, np.random.default_rng(0), make_wcs((300, 300)))
    table = kermes.forced_photometry(deep, away)
    assert table["flag_outside"].all()
    assert np.isnan(table["r_flux"]).all()
    assert (table["r_coverage"] == 0).all()
    here = visit(FLUX, 1.8, 5.0, np.random.default_rng(0))
    images = here.images.copy()
    images[:, :, :26] = np.nan
    row = kermes.forced_photometry(deep, replace(here, images=images))[0]
    assert 0.3 < row["r_coverage"] < 0.9
    assert abs(row["r_flux"] - 3000) < 5 * row["r_flux_err"]


@pytest.mark.parametrize("shape", [SHAPE, (50, 40)])
def test_images_of_the_other_side_of_the_sky_hold_nothing(deep, shape):
    wcs = make_wcs((30, 31))
    wcs.wcs.crval = [330.0, -2.0]
    away = replace(visit(FLUX, 1.8, 5.0, np.random.default_rng(0), shape=shape), wcs=wcs)
    table = kermes.forced_photometry(deep, away)
    assert table["flag_outside"].all()
    assert np.isnan(table["r_flux"]).all()
    assert np.isnan(table["y"]).all()


def test_a_much_wider_psf_loses_no_light(deep):
    row = kermes.forced_photometry(deep, visit(FLUX, 3.2, 0.01, np.random.default_rng(0), shape=SHAPE))
    # A PSF twice as wide as that of the result, cut at 4.7 sigma.
    np.testing.assert_allclose(row["r_flux"], [3000, 5000], rtol=1e-3)


def test_a_band_that_the_result_does_not_have_uses_the_mean_shape(deep):
    other = visit(FLUX, 1.8, 5.0, np.random.default_rng(0), bands=("y",))
    table = kermes.forced_photometry(deep, other)
    assert np.abs((table["y_flux"] - [3000, 5000]) / table["y_flux_err"]).max() < 4


def test_other_pixels_need_a_wcs(deep):
    other = replace(visit(FLUX, 1.8, 5.0, np.random.default_rng(0), shape=(40, 40)), wcs=None)
    with pytest.raises(InputError, match="coadd must have the pixels of the result"):
        kermes.forced_photometry(deep, other)


def test_no_visit_is_no_light_curve(deep):
    with pytest.raises(InputError, match="visits must hold at least one image"):
        kermes.light_curves(deep, [])


@pytest.mark.parametrize("model", ["scarlet-lite", "templates"])
def test_results_of_every_model_are_measured(model):
    scene = simulate_scene(n_sources=8, seed=1, bands=("g", "r"), shape=(80, 80))
    result = kermes.deblend(scene.coadd, scene.peaks, config=kermes.Config(model=model))
    table = kermes.forced_photometry(result, scene.coadd)
    assert np.isfinite(table["r_flux"]).all()
    bright = np.asarray(result.objects["r_flux"] > 30 * result.objects["r_flux_err"])
    assert bright.any()
    # Points, where there are only templates, miss what is extended.
    rtol = {"scarlet-lite": 0.02, "templates": 0.6}[model]
    np.testing.assert_allclose(table["r_flux"][bright], result.objects["r_flux"][bright], rtol=rtol)


def test_a_psf_field_gives_each_place_its_own():
    scene = simulate_scene(n_sources=12, seed=2, bands=("r",), shape=(120, 120))
    result = kermes.deblend(scene.coadd, scene.peaks)
    psf = np.asarray(scene.coadd.psfs)[0]
    field = replace(scene.coadd, psfs=lambda y, x, band: psf)
    one, other = (kermes.forced_photometry(result, coadd) for coadd in (scene.coadd, field))
    np.testing.assert_allclose(other["r_flux"], one["r_flux"], rtol=1e-5)
    assert other["r_flux"].unit == units.Unit(scene.coadd.unit)
