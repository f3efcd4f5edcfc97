"""Measurements recover what was put in, agree with photutils and with slow twins, and say where they cannot."""

from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import pytest
from astropy import units
from hypothesis import given, settings
from hypothesis import strategies as st
from photutils.aperture import CircularAperture, aperture_photometry

import kermes
import reference
from kermes.catalog import measurement_columns
from kermes.kernels import photometry as kernels
from kermes.photometry import APERTURES, KRON_FACTOR, _errors_of_moments, measure
from kermes.scene import Source
from kermes.simulation import render_truth, simulate_scene
from results import BANDS, ORIGIN, fitted_result, make_result, profile, psfs

SHAPE = (41, 47)


def gaussian(y, x, yy, xx, xy, flux, shape=SHAPE):
    """An elliptical Gaussian, evaluated at the centres of pixels, and its covariance matrix."""
    covariance = np.array([[yy, xy], [xy, xx]])
    offsets = np.stack(np.mgrid[: shape[0], : shape[1]], axis=-1) - [y, x]
    square = np.einsum("...i,ij,...j->...", offsets, np.linalg.inv(covariance), offsets)
    return flux * np.exp(-0.5 * square) / (2 * np.pi * np.sqrt(np.linalg.det(covariance)))


def planes(image, n_bands=1):
    """An image as float32 planes (B, h, w), with a variance of one and all pixels valid."""
    image = np.repeat(np.asarray(image, dtype=np.float32)[None], n_bands, axis=0)
    return image, np.ones_like(image), np.ones(image.shape, dtype=bool)


# ---------------------------------------------------------------- kernels


@given(st.floats(-6, 6), st.floats(-6, 6), st.floats(0.05, 7))
def test_overlap_of_a_pixel_and_a_circle_is_that_of_an_integral(y, x, radius):
    # The trapezoidal rule over 2000 strips misses the corners of a strip: their width squared, and square roots.
    assert kernels.pixel_overlap(y, x, radius) == pytest.approx(reference.pixel_overlap(y, x, radius), abs=1e-4)


@given(st.floats(10, 30), st.floats(10, 30), st.floats(0.1, 9))
def test_overlaps_add_up_to_the_circle(y, x, radius):
    images, variance, valid = planes(np.ones(SHAPE))
    sums = kernels.aperture_sums(images, variance, images, valid, y, x, np.array([radius]))[0, 0]
    np.testing.assert_allclose(sums[[0, 2]], np.pi * radius**2, rtol=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.floats(-2, 42), st.floats(-2, 48), st.integers(0, 1000))
def test_apertures_agree_with_photutils(y, x, seed):
    rng = np.random.default_rng(seed)
    images, _, valid = planes(rng.normal(size=SHAPE))
    variance = rng.uniform(0.5, 2, images.shape).astype(np.float32)
    valid[:] = rng.uniform(size=valid.shape) > 0.1
    radii = np.array([0.7, 3.0, 8.2])
    sums = kernels.aperture_sums(images, variance, images, valid, y, x, radii)
    apertures = [CircularAperture((x, y), radius) for radius in radii]
    table = aperture_photometry(images[0], apertures, error=np.sqrt(variance[0]), mask=~valid[0])
    for k, flux in enumerate(sums[:, 0, 0]):
        # Photutils gives NaN where the aperture misses the image.
        expected = np.nan_to_num(float(table[f"aperture_sum_{k}"][0]))
        assert flux == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.nojit
def test_apertures_agree_with_the_slow_twin():
    rng = np.random.default_rng(1)
    images, variance, valid = planes(rng.normal(size=(9, 11)), n_bands=2)
    variance *= 2
    valid[0, 4, 4] = False
    radii = np.array([1.3, 4.0])
    arguments = images, variance, images[::-1].copy(), valid, 4.2, 5.9, radii
    np.testing.assert_allclose(kernels.aperture_sums(*arguments), reference.aperture_sums(*arguments), atol=1e-3)


@pytest.mark.nojit
def test_gaussian_sums_agree_with_the_slow_twin():
    rng = np.random.default_rng(2)
    images, variance, valid = planes(rng.normal(size=(17, 19)))
    valid[0, 8, 8] = False
    state, sums = np.array([8.3, 9.1, 2.0, 3.0, -0.7]), np.empty(kernels.N_SUMS)
    kernels.gaussian_sums(images[0], variance[0], valid[0], state, True, sums)
    # From pixel to pixel the weight gathers a rounding each.
    np.testing.assert_allclose(
        sums, reference.gaussian_sums(images[0], variance[0], valid[0], state), rtol=1e-10, atol=1e-10
    )


@pytest.mark.nojit
def test_residual_sums_agree_with_the_slow_twin():
    rng = np.random.default_rng(3)
    residual, model = rng.normal(size=(2, 2, 12, 13)).astype(np.float32)
    variance, valid = rng.uniform(0.5, 2, residual.shape).astype(np.float32), rng.uniform(size=residual.shape) > 0.1
    arguments = residual, variance, valid, model, 3.3, 5.6, np.array([[2.0, 5.0], [1.5, 4.5]])
    np.testing.assert_allclose(kernels.residual_sums(*arguments), reference.residual_sums(*arguments), rtol=1e-6)


@pytest.mark.nojit
def test_plain_sums_agree_with_numpy():
    rng = np.random.default_rng(4)
    images, psf, model = rng.normal(size=(3, 2, 8, 9)).astype(np.float32)
    noise2, variance = rng.uniform(0.5, 2, (2, *images.shape)).astype(np.float32)
    valid = rng.uniform(size=images.shape) > 0.2
    part = np.where(valid, 1.0, 0.0)
    weight = part * psf / variance
    expected = [(weight * plane).sum(axis=(1, 2)) for plane in (images, weight * noise2, psf, model)]
    got = kernels.psf_sums(images, noise2, model, valid, psf, variance)
    np.testing.assert_allclose(got.T, expected, rtol=1e-5, atol=1e-6)
    cut = (slice(None), slice(2, 7), slice(1, 9))
    expected = [(part * plane)[cut].sum(axis=(1, 2)) for plane in (images, variance, 1, model)]
    got = kernels.box_sums(images, variance, model, valid, 2, 7, 1, 9)
    np.testing.assert_allclose(got.T, expected, rtol=1e-5, atol=1e-6)
    expected = [plane.sum(axis=(1, 2)) for plane in (model, model**2, images * model, part * model**2 / variance)]
    np.testing.assert_allclose(kernels.model_sums(model, images, variance, valid).T, expected, rtol=1e-5, atol=1e-5)

    depth = np.array([1 / v[ok].mean() for v, ok in zip(variance, valid, strict=True)])[:, None, None]
    mean, used = np.empty((8, 9), np.float32), np.empty((8, 9), bool)
    kernels.mean_of_bands(images, variance, valid, mean, used)
    np.testing.assert_array_equal(used, valid.any(axis=0))
    total = (depth * part).sum(axis=0)
    np.testing.assert_allclose(mean[used], (depth * part * images).sum(axis=0)[used] / total[used], rtol=1e-5)
    radius = np.hypot(np.arange(8)[:, None] - 3.1, np.arange(9) - 4.2)
    inside = used & (radius < 3.5)
    got = kernels.radial_sums(mean, used, 3.1, 4.2, 3.5)
    np.testing.assert_allclose(got, [mean[inside].sum(), (radius * mean)[inside].sum()], rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.floats(18, 22), st.floats(20, 26), st.floats(1.5, 9), st.floats(0.4, 1), st.floats(0, np.pi))
def test_moments_of_a_gaussian_are_its_own(y, x, major, ratio, angle):
    along, across = major, max(major * ratio, 1.5)
    c, s = np.cos(angle), np.sin(angle)
    true = along * s * s + across * c * c, along * c * c + across * s * s, (along - across) * s * c
    images, variance, valid = planes(gaussian(y, x, *true, flux=1000.0))
    states, sums = np.empty((1, 5)), np.empty((1, kernels.N_SUMS))
    assert kernels.adaptive_moments(images, variance, valid, 20.0, 23.0, np.array([1.7]), states, sums)[0]
    # Converged to 1e-4 of the size; the sum over pixels of a Gaussian this wide is its integral.
    np.testing.assert_allclose(states[0, :2], [y, x], atol=1e-3)
    np.testing.assert_allclose(states[0, 2:], true, atol=1e-3 * major)


def test_errors_of_moments_are_as_large_as_their_scatter():
    true, center, n = (6.0, 9.0, 2.0), (20.2, 23.4), 600
    image, variance, valid = planes(gaussian(*center, *true, flux=1000.0))
    variance[:, :, 25:] = 4  # deeper on one side
    noise = np.random.default_rng(3).normal(size=(n, *image.shape)) * np.sqrt(variance)
    states, sums = np.empty((n, 1, 5)), np.empty((n, 1, kernels.N_SUMS))
    for k in range(n):
        images = (image + noise[k]).astype(np.float32)
        assert kernels.adaptive_moments(images, variance, valid, *center, np.array([2.5]), states[k], sums[k])[0]
    errors = _errors_of_moments(SimpleNamespace(moments=states, under_moments=sums, psf_trace=1.0), False)
    trace = states[..., 2] + states[..., 3]
    found = dict(zip(("centroid_y", "centroid_x", "moment_yy", "moment_xx", "moment_xy"), states.T, strict=True))
    found["size_ratio"] = trace.T
    for name, values in found.items():
        # The scatter of n numbers is known to 1 / sqrt(2 n) = 3 %; at this signal-to-noise of 60 errors are linear.
        expected = np.median(errors[f"{name}_err"])
        assert values.std() == pytest.approx(expected, rel=0.12), name


def test_moments_of_noise_and_of_nothing_do_not_converge():
    for image in (np.zeros(SHAPE), -gaussian(20, 20, 4, 4, 0, 100.0)):
        images, variance, valid = planes(image)
        states, sums = np.empty((1, 5)), np.empty((1, kernels.N_SUMS))
        assert not kernels.adaptive_moments(images, variance, valid, 20.0, 23.0, np.array([1.7]), states, sums)[0]


# ---------------------------------------------------------------- the table


@pytest.fixture(scope="module")
def table():
    return measure(fitted_result())


FLUXES = {"g": 2000.0, "r": 1000.0}


@lru_cache
def true_star():
    """A star of known fluxes, its true model as the result, and what it looks like without noise."""
    models = {4: Source(peak=(30, 30), components=(profile(30.2, 29.7, list(FLUXES.values())),))}
    result = make_result(models=models, objects=make_result().objects[:1])
    result.objects["center_y"], result.objects["center_x"] = 30.2 + ORIGIN[0], 29.7 + ORIGIN[1]
    return result, result.model_image()


def star_result(seed=1, variance=1.0, images=None):
    """The same star in its own noise; its images may be given."""
    result, light = true_star()
    if images is None:
        images = light + np.random.default_rng(seed).normal(size=light.shape) * np.sqrt(variance)
    coadd = kermes.Coadd(images=images, variance=variance, psfs=psfs(), bands=BANDS, origin=ORIGIN, unit=units.nJy)
    return replace(result, coadd=coadd, objects=result.objects.copy())


def test_every_object_has_a_row_and_every_column_its_unit(table):
    assert list(table["object_id"]) == [4, 7, 8, 9]
    assert table.colnames == [item.name for item in measurement_columns(BANDS, APERTURES)]
    assert table["g_psf_flux"].unit == units.nJy
    assert table.meta == {"kind": "neighbor_subtracted"}


@pytest.mark.parametrize("kind", ["redistributed", "neighbor_subtracted", "noise_replaced"])
def test_fluxes_of_a_star_are_right_within_their_errors(kind):
    n, names = 60, ["psf", "aperture_6"]
    pulls = []
    for seed in range(n):
        row = measure(star_result(seed, variance=2.0), kind, apertures=(6,))[0]
        # A Gaussian of 1.8 or 1.6 pixels, beside that the pixel, has 0.997 of its light within 6 pixels.
        within = {"psf": 1.0, "aperture_6": 0.997}
        pulls.append(
            [
                (row[f"{band}_{name}_flux"] - within[name] * flux) / row[f"{band}_{name}_flux_err"]
                for band, flux in FLUXES.items()
                for name in names
            ]
        )
    # Mean and scatter of 60 numbers, four of their standard deviations.
    assert np.abs(np.mean(pulls, axis=0)).max() < 4 / np.sqrt(n)
    assert np.std(pulls, axis=0) == pytest.approx(np.ones(4), abs=4 / np.sqrt(2 * n))


def test_a_star_has_the_size_of_the_psf_and_lies_where_it_lies():
    row = measure(star_result(variance=1e-4))[0]
    for band in BANDS:
        # Sampled PSFs at two sub-pixel places, and next to no noise.
        assert row[f"{band}_size_ratio"] == pytest.approx(1, abs=2e-3)
        assert row[f"{band}_centroid_y"] == pytest.approx(30.2 + ORIGIN[0], abs=2e-3)
        assert row[f"{band}_centroid_x"] == pytest.approx(29.7 + ORIGIN[1], abs=2e-3)


def test_the_kron_radius_of_a_star_is_that_of_a_gaussian():
    row = measure(star_result(variance=1e-4))[0]
    # The first radial moment of a Gaussian is sqrt(pi / 2) sigma; the PSFs are 1.8 and 1.6 pixels before the pixel.
    low, high = (KRON_FACTOR * np.sqrt(np.pi / 2 * (sigma**2 + 1 / 12)) for sigma in (1.6, 1.8))
    assert low < row["kron_radius"] < high
    assert not row["flag_kron"]
    for band, sigma in (("g", 1.8), ("r", 1.6)):
        inside = 1 - np.exp(-0.5 * row["kron_radius"] ** 2 / (sigma**2 + 1 / 12))
        assert row[f"{band}_kron_flux"] == pytest.approx(inside * FLUXES[band], rel=2e-3)


def test_chi2_of_noise_is_one_for_each_degree_of_freedom():
    rows = [measure(star_result(seed))[0] for seed in range(40)]
    for name in ("1fwhm", "3fwhm"):
        chi2, dof = (np.array([row[f"r_{what}_{name}"] for row in rows]) for what in ("chi2", "dof"))
        # The true model was not fitted: chi2 has all pixels as degrees of freedom, the table takes parameters off.
        n_pixels = np.round(dof + (1 + 2 / 2) * (0.9 if name == "1fwhm" else 1.0))
        assert (chi2 * dof).sum() / n_pixels.sum() == pytest.approx(1, abs=4 * np.sqrt(2 / n_pixels.sum()) + 0.01)
        assert dof.mean() < n_pixels.mean()


def test_light_beside_the_model_is_asymmetric():
    result = star_result()
    images = result.coadd.images.copy()
    images[:, 32, 33] += 30
    beside, alone = measure(star_result(images=images))[0], measure(result)[0]
    assert alone["r_asymmetry"] == pytest.approx(1, abs=0.3)
    assert beside["r_asymmetry"] > alone["r_asymmetry"] + 0.5


def test_what_is_missing_is_left_out_and_flagged():
    result = star_result()
    images = result.coadd.images.copy()
    images[0, 25:29, 30] = np.nan
    images[1] = np.nan
    row = measure(star_result(images=images))[0]
    assert row["g_flag_incomplete"]
    assert 0.9 < row["g_coverage"] < 1
    assert np.isfinite(row["g_aperture_6_flux"])
    assert row["r_flag_no_data"]
    assert all(
        np.isnan(row[name]) for name in row.colnames if name.startswith("r_") and name.endswith(("flux", "_err"))
    )


@pytest.mark.parametrize("stamp", [np.zeros((1, 1)), np.ones((1, 1)), np.ones((3, 3)) / 9], ids=["none", "1", "3"])
def test_a_psf_may_be_tiny_or_missing(stamp):
    result = replace(star_result(), psfs={1: np.stack([stamp, stamp]), 2: psfs()})
    row = measure(result, apertures=())[0]
    assert row["g_flag_no_data"] == (not stamp.any())
    assert np.isnan(row["g_psf_flux"]) == (not stamp.any())
    assert np.isfinite(row["g_total_flux"])


def test_an_object_at_the_edge_says_so(table):
    row = table[2]
    assert 0 < row["g_edge_fraction"] < 1
    assert row["g_coverage"] == pytest.approx(1 - row["g_edge_fraction"])
    assert row["g_flag_incomplete"]


def test_an_object_without_light_is_measured_where_its_peak_is(table):
    row = table[3]
    assert np.isfinite(row["g_aperture_3_flux"])
    assert np.isnan(row["g_total_flux"])


def test_models_have_the_errors_of_the_fit():
    result = star_result()
    result.objects["g_flux_err"] = 7.0
    row = measure(result, "model", apertures=(20,))[0]
    assert row["g_aperture_20_flux_err"] == pytest.approx(7, rel=1e-3)
    assert np.isnan(row["g_snr"])


def test_the_error_of_a_source_alone_is_that_of_the_pixels_and_of_a_blend_larger():
    result = fitted_result()
    result.objects["g_flux_err"] = 50.0
    row = measure(result, apertures=(3.0,))
    pixels = np.sqrt(np.pi * 3**2)  # less: pixels on the rim count with the square of their area
    assert row["g_aperture_3_flux_err"][1] > 2 * pixels
    star = star_result()
    star.objects["g_flux_err"] = 50.0
    assert measure(star, apertures=(3.0,))["g_aperture_3_flux_err"][0] < pixels


def test_measuring_changes_neither_images_nor_answers():
    result = fitted_result()
    before = result.coadd.images.copy()
    first = measure(result, "noise_replaced")
    second = measure(result, "noise_replaced", bands=["r", "g"])
    np.testing.assert_array_equal(result.coadd.images, before)
    for name in ("g_psf_flux", "r_aperture_6_flux", "r_moment_xx"):
        np.testing.assert_array_equal(first[name], second[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "heavy"}, "kind must be one of model, redistributed, .*got 'heavy'"),
        ({"bands": ["z"]}, "band must be one of g, r, got 'z'"),
        ({"bands": []}, "bands must be some of g, r, got none"),
        ({"apertures": (3, -1)}, r"apertures must be different radii > 0 in pixels, got \(3.0, -1.0\)"),
        ({"apertures": (3, 3.0)}, "apertures must be different radii"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, message):
    with pytest.raises(kermes.InputError, match=message):
        measure(fitted_result(), **options)


def test_no_objects_make_a_table_without_rows():
    table = measure(make_result(models={}, objects=make_result().objects[:0]))
    assert (len(table), table.colnames) == (0, [item.name for item in measurement_columns(BANDS, APERTURES)])


def test_measuring_needs_the_coadd():
    with pytest.raises(kermes.InputError, match="measure needs the images"):
        measure(fitted_result(with_coadd=False), "model")


# ---------------------------------------------------------------- pairs of known truth


def pulls_of_pairs(n_pairs, radius=6.0):
    """(aperture flux - truth) / error of both sources of pairs 0.7 to 3 widths of the PSF apart, by kind of stamp."""
    pulls = {"redistributed": [], "neighbor_subtracted": []}
    for seed in range(n_pairs):
        scene = simulate_scene(kind="pair", bands=("r",), magnitudes=(21, 25), seed=seed)
        result = kermes.deblend(scene.coadd, peaks=scene.peaks, workers=1)
        peak_index = list(result.objects["peak_index"])
        for kind, of_kind in pulls.items():
            table = measure(result, kind, apertures=(radius,))
            for k in np.flatnonzero(scene.truth["peak_index"] >= 0):
                light, box = render_truth(scene, k)
                center = scene.truth["y"][k] - box.y0, scene.truth["x"][k] - box.x0
                valid = np.ones(light.shape, dtype=bool)
                truth = kernels.aperture_sums(light, light, light, valid, *center, np.array([radius]))[0, 0, 0]
                row = table[peak_index.index(scene.truth["peak_index"][k])]
                of_kind.append((row["r_aperture_6_flux"] - truth) / row["r_aperture_6_flux_err"])
    return pulls


def check_pulls(pulls, n_errors):
    """Median within 0.1, robust width 0.9 to 1.15; both give or take some standard errors."""
    for kind, of_kind in pulls.items():
        middle = np.median(of_kind)
        width = 1.4826 * np.median(np.abs(of_kind - middle))
        error = 1.2 / np.sqrt(len(of_kind))  # of a median, and of a median absolute deviation
        print(f"{kind}: median {middle:.3f}, width {width:.3f}, +- {error:.3f}")
        assert abs(middle) < 0.1 + n_errors * error
        assert 0.9 - n_errors * error < width < 1.15 + n_errors * error


def test_aperture_fluxes_of_pairs_have_honest_errors():
    check_pulls(pulls_of_pairs(40), n_errors=3)


@pytest.mark.science
def test_aperture_fluxes_of_many_pairs_have_honest_errors():
    check_pulls(pulls_of_pairs(600), n_errors=0)
