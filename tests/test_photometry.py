"""Measurements recover what was put in, agree with photutils and with slow twins, and say where they cannot."""

import numpy as np
import pytest
from astropy import units
from hypothesis import given, settings
from hypothesis import strategies as st
from photutils.aperture import CircularAperture, aperture_photometry

import kermes
import reference
from kermes.catalog import measurement_columns
from kermes.geometry import Box
from kermes.kernels import photometry as kernels
from kermes.photometry import APERTURES, KRON_FACTOR, measure
from kermes.psf import model_psf
from kermes.rendering import render_source
from kermes.scene import Source
from results import BANDS, ORIGIN, fitted_result, make_coadd, make_result, profile, psfs

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
    sums = kernels.aperture_sums(images, variance, valid, y, x, np.array([radius]))[0, 0]
    np.testing.assert_allclose(sums[[0, 2]], np.pi * radius**2, rtol=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.floats(-2, 42), st.floats(-2, 48), st.integers(0, 1000))
def test_apertures_agree_with_photutils(y, x, seed):
    rng = np.random.default_rng(seed)
    images, _, valid = planes(rng.normal(size=SHAPE))
    variance = rng.uniform(0.5, 2, images.shape).astype(np.float32)
    valid[:] = rng.uniform(size=valid.shape) > 0.1
    radii = np.array([0.7, 3.0, 8.2])
    sums = kernels.aperture_sums(images, variance, valid, y, x, radii)
    apertures = [CircularAperture((x, y), radius) for radius in radii]
    table = aperture_photometry(images[0], apertures, error=np.sqrt(variance[0]), mask=~valid[0])
    for k, (flux, _, _) in enumerate(sums[:, 0]):
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
    got = kernels.aperture_sums(images, variance, valid, 4.2, 5.9, radii)
    np.testing.assert_allclose(got, reference.aperture_sums(images, variance, valid, 4.2, 5.9, radii), atol=1e-3)


@pytest.mark.nojit
def test_gaussian_sums_agree_with_the_slow_twin():
    rng = np.random.default_rng(2)
    images, variance, valid = planes(rng.normal(size=(17, 19)))
    valid[0, 8, 8] = False
    state, sums = np.array([8.3, 9.1, 2.0, 3.0, -0.7]), np.empty(7)
    kernels.gaussian_sums(images[0], variance[0], valid[0], state, sums)
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
    images, psf = rng.normal(size=(2, 2, 8, 9)).astype(np.float32)
    noise2, variance = rng.uniform(0.5, 2, (2, *images.shape)).astype(np.float32)
    valid = rng.uniform(size=images.shape) > 0.2
    part = np.where(valid, 1.0, 0.0)
    weight = part * psf / variance.astype(float)
    expected = [[(w * w2).sum() for w, w2 in zip(weight, v, strict=True)] for v in (images, weight * noise2, psf)]
    np.testing.assert_allclose(kernels.psf_sums(images, noise2, variance, valid, psf).T, expected, rtol=1e-5)
    cut = (slice(None), slice(2, 7), slice(1, 9))
    expected = [(part[cut] * plane).sum(axis=(1, 2)) for plane in (images[cut], variance[cut], 1)]
    np.testing.assert_allclose(kernels.box_sums(images, variance, valid, 2, 7, 1, 9).T, expected, rtol=1e-5)

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
    states, sums = np.empty((1, 5)), np.empty((1, 7))
    assert kernels.adaptive_moments(images, variance, valid, 20.0, 23.0, np.array([1.7]), states, sums)[0]
    # Converged to 1e-4 of the size; the sum over pixels of a Gaussian this wide is its integral.
    np.testing.assert_allclose(states[0, :2], [y, x], atol=1e-3)
    np.testing.assert_allclose(states[0, 2:], true, atol=1e-3 * major)


def test_moments_of_noise_and_of_nothing_do_not_converge():
    for image in (np.zeros(SHAPE), -gaussian(20, 20, 4, 4, 0, 100.0)):
        images, variance, valid = planes(image)
        states, sums = np.empty((1, 5)), np.empty((1, 7))
        assert not kernels.adaptive_moments(images, variance, valid, 20.0, 23.0, np.array([1.7]), states, sums)[0]


# ---------------------------------------------------------------- the table


@pytest.fixture(scope="module")
def table():
    return measure(fitted_result())


def star_result(flux=2000.0, seed=1, **coadd):
    """A single star of known flux in noise of one, and its true model as the result."""
    models = {4: Source(peak=(30, 30), components=(profile(30.2, 29.7, [flux, 0.5 * flux]),))}
    result = make_result(models=models, objects=make_result().objects[:1])
    result.objects["y"], result.objects["x"] = 30.2 + ORIGIN[0], 29.7 + ORIGIN[1]
    light, box = render_source(models[4], result._kernels(psfs()), Box.of_shape(result.shape))
    images = np.random.default_rng(seed).normal(size=(2, *result.shape))
    images[:, box.y, box.x] += light
    noisy = kermes.Coadd(images=images, variance=1, psfs=psfs(), bands=BANDS, origin=ORIGIN, **coadd)
    return make_result(models=models, objects=result.objects, coadd=noisy)


def test_every_object_has_a_row_and_every_column_its_unit(table):
    assert list(table["object_id"]) == [4, 7, 8, 9]
    assert table.colnames == [item.name for item in measurement_columns(BANDS, APERTURES)]
    assert table["g_psf_flux"].unit == units.nJy
    assert table.meta == {"kind": "neighbor_subtracted", "apertures": [3.0, 6.0, 9.0]}


@pytest.mark.parametrize("kind", ["redistributed", "neighbor_subtracted", "noise_replaced"])
def test_fluxes_of_a_star_are_right_within_their_errors(kind):
    n, pulls = 60, []
    for seed in range(n):
        row = measure(star_result(seed=seed), kind)[0]
        pulls.append(
            [
                (row[f"{band}_psf_flux"] - flux) / row[f"{band}_psf_flux_err"]
                for band, flux in zip("gr", (2000, 1000), strict=True)
            ]
        )
    # Mean and scatter of 60 numbers, four of their standard deviations.
    assert np.abs(np.mean(pulls, axis=0)).max() < 4 / np.sqrt(n)
    assert np.std(pulls, axis=0) == pytest.approx(np.ones(2), abs=4 / np.sqrt(2 * n))
