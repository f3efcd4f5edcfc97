"""Crowded point sources: the truth comes back, with honest errors, whatever their order and place."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.fft

from kermes.errors import ConfigError, InputError, ShapeError
from kermes.kernels.groups import join_pairs
from kermes.kernels.points import (
    add_points,
    autocorrelations,
    companion_significance,
    marginal_covariances,
    multiply_normal,
    own_blocks,
    pair_tables,
    point_sums,
    solve_normal,
)
from kermes.point_fitting import PointSettings, _prepare_psf, fit_points
from kermes.simulation import MoffatPsf, simulate_scene

PSFS = np.stack(
    [MoffatPsf(fwhm_pix=w, beta=b, axis_ratio=0.95, angle=0.4).stamp() for w, b in ((4.2, 3.2), (3.6, 4.2))]
)
SHAPE = (60, 64)
LISTED_ONLY = PointSettings(rounds=0)
NO_PRIOR = PointSettings(rounds=0, center_prior=0.0, max_iterations=40, tolerance=1e-4, reach_noise=1e-3)


def shifted(stamp, shape, center):
    """Draw a stamp at a sub-pixel center by a Fourier shift: the slow twin of the spline."""
    side = 128
    plane = np.zeros((side, side))
    p, q = stamp.shape
    plane[:p, :q] = stamp
    k_y, k_x = 2 * np.pi * scipy.fft.fftfreq(side)[:, None], 2 * np.pi * scipy.fft.fftfreq(side)
    phase = np.exp(-1j * (k_y * (center[0] - p // 2) + k_x * (center[1] - q // 2)))
    return np.fft.ifft2(np.fft.fft2(plane) * phase).real[: shape[0], : shape[1]]


def draw(centers, flux, shape=SHAPE, psfs=PSFS):
    """Images (B, H, W) of point sources without noise."""
    return np.stack(
        [sum(f[b] * shifted(psf, shape, c) for c, f in zip(centers, flux, strict=True)) for b, psf in enumerate(psfs)]
    )


def cluster(seed=0, n=8, brightest=2000.0, apart=3.0):
    """Draw centers (n, 2), at least `apart` pixels from each other, and fluxes (n, 2)."""
    rng = np.random.default_rng(seed)
    centers = np.empty((0, 2))
    while len(centers) < n:
        new = rng.uniform(18, 42, 2)
        if len(centers) == 0 or np.hypot(*(centers - new).T).min() > apart:
            centers = np.vstack([centers, new])
    return centers, rng.uniform(0.2, 1.0, (n, 2)) * brightest


def noisy(images, seed):
    return images + np.random.default_rng(seed).normal(size=images.shape)


def ones():
    return np.ones((2, *SHAPE), np.float32)


# ---------------------------------------------------------------- kernels


@pytest.mark.parametrize("fwhm_pix", [3.5, 4.5])
def test_a_shifted_psf_is_that_of_the_fourier_series(fwhm_pix):
    stamp = MoffatPsf(fwhm_pix=fwhm_pix, beta=4.0).stamp()[None]
    psf = _prepare_psf(stamp, PointSettings())
    center = np.array([[30.5, 31.27]])
    plane = np.zeros((1, *SHAPE), np.float32)
    add_points(plane, psf.splines, np.array([[30, 31]]), np.full((1, 1), 22), center, np.ones((1, 1)), np.arange(1))
    assert abs(plane[0] - shifted(stamp[0], SHAPE, center[0])).max() < 1e-4 * stamp.max()


def problem(seed=3, n=5):
    """Make what the kernels take: PSF, pixels, reach, centers, fluxes."""
    psf = _prepare_psf(PSFS, PointSettings(pair_cut=1e-4))
    centers, flux = cluster(seed, n)
    base = np.rint(centers).astype(np.int64)
    return psf, base, np.full((n, 2), 23), centers, flux


def rendered(psf, base, reach, centers, flux):
    planes = np.zeros((2, *SHAPE), np.float32)
    add_points(planes, psf.splines, base, reach, centers, flux, np.arange(len(base)))
    return planes


@pytest.mark.nojit
def test_sums_are_the_adjoint_of_the_rendering():
    psf, base, reach, centers, flux = problem()
    planes = rendered(psf, base, reach, centers, flux)
    residual = np.random.default_rng(1).normal(size=planes.shape).astype(np.float32)
    sums = np.zeros((*flux.shape, 3))
    point_sums(residual, psf.splines, base, reach, centers, np.arange(len(base)), True, sums)
    # Rows are summed in float32.
    size = np.linalg.norm(planes) * np.linalg.norm(residual)
    assert abs((sums[:, :, 0] * flux).sum() - np.vdot(planes, residual)) < 1e-6 * size


@pytest.mark.nojit
def test_value_sums_are_the_same_without_derivatives():
    psf, base, reach, centers, flux = problem()
    residual = np.random.default_rng(1).normal(size=(2, *SHAPE)).astype(np.float32)
    with_derivatives, without = np.zeros((*flux.shape, 3)), np.zeros((*flux.shape, 3))
    everything = np.arange(len(base))
    point_sums(residual, psf.splines, base, reach, centers, everything, True, with_derivatives)
    point_sums(residual, psf.splines, base, reach, centers, everything, False, without)
    np.testing.assert_allclose(without[:, :, 0], with_derivatives[:, :, 0], rtol=1e-5, atol=1e-6)


def derivatives(psf, base, reach, centers, flux, h=0.01):
    """Derivatives (S, B + 2, pixels) of the rendering by finite differences; fluxes in `flux` are linear."""
    n, n_bands = flux.shape
    rows = []
    for s in range(n):
        for b in range(n_bands):
            unit = np.zeros_like(flux)
            unit[s, b] = 1.0
            rows.append(rendered(psf, base, reach, centers, unit).astype(float).ravel())
        for axis in range(2):
            step = np.zeros_like(centers)
            step[s, axis] = h
            ahead = rendered(psf, base, reach, centers + step, flux).astype(float)
            behind = rendered(psf, base, reach, centers - step, flux).astype(float)
            rows.append((ahead - behind).ravel() / (2 * h))
    return np.array(rows).reshape(n, n_bands + 2, -1)


def test_sums_are_the_derivatives_of_the_loss():
    psf, base, reach, centers, flux = problem()
    jacobian = derivatives(psf, base, reach, centers, flux)
    residual = np.random.default_rng(1).normal(size=(2, *SHAPE)).astype(np.float32)
    sums = np.zeros((*flux.shape, 3))
    point_sums(residual, psf.splines, base, reach, centers, np.arange(len(base)), True, sums)
    gradient = np.concatenate([sums[:, :, 0], -np.einsum("sb,sbi->si", flux, sums[:, :, 1:])], axis=1)
    expected = jacobian @ residual.ravel().astype(float)
    # In units of the noise of each; float32 pixels differ by 1e-7 / 0.01, and h^2 / 6 of the third derivative is left.
    assert (abs(gradient - expected) < 3e-4 * np.sqrt((jacobian**2).sum(axis=2))).all()


def normal_matrix(psf, centers, flux):
    """Multiply the columns of the unit matrix; returns it with the pieces it is made of."""
    n, n_bands = flux.shape
    pairs = np.array([(s, t) for s in range(n) for t in range(s + 1, n)])
    amplitude = np.ones_like(flux)
    tables = pair_tables(psf.tables, centers, pairs, amplitude)
    blocks = own_blocks(psf.own, amplitude, flux, np.zeros((n, 2)))
    size = n * (n_bands + 2)
    matrix = np.empty((size, size))
    for i in range(size):
        x, y = np.zeros((n, n_bands + 2)), np.zeros((n, n_bands + 2))
        x.ravel()[i] = 1.0
        multiply_normal(x, y, pairs, tables, flux, *blocks)
        matrix[:, i] = y.ravel()
    return matrix, pairs, tables, blocks


def test_the_normal_matrix_is_that_of_the_pixels():
    psf, base, reach, centers, flux = problem()
    jacobian = derivatives(psf, base, reach, centers, flux).reshape(len(base) * 4, -1)
    expected = jacobian @ jacobian.T
    matrix = normal_matrix(psf, centers, flux)[0]
    scale = np.sqrt(np.diag(expected))
    # Pixels sample the product of two PSFs, which is finer than either; finite differences add 1e-4.
    assert (abs(matrix - expected) < 5e-4 * np.outer(scale, scale)).all()


@pytest.mark.parametrize("most", [1, 3, 10])
def test_conjugate_gradients_agree_with_a_dense_solution(most):
    psf, _, _, centers, flux = problem()
    matrix, pairs, tables, blocks = normal_matrix(psf, centers, flux)
    gradient = np.random.default_rng(2).normal(size=(len(centers), 4)) * np.sqrt(np.diag(matrix)).reshape(-1, 4)
    members, starts = join_pairs(pairs, np.arange(len(pairs)), len(centers), most)
    step, _ = solve_normal(gradient, pairs, tables, flux, *blocks, members, starts, 1e-10, 500)
    expected = np.linalg.solve(matrix, gradient.ravel()).reshape(-1, 4)
    np.testing.assert_allclose(step, expected, rtol=0, atol=1e-6 * abs(expected).max())


def neighbour_lists(pairs, n):
    first, second = pairs.T.ravel(), pairs[:, ::-1].T.ravel()
    order = np.argsort(first, kind="stable")
    return np.searchsorted(first[order], np.arange(n + 1)), second[order], np.tile(np.arange(len(pairs)), 2)[order]


@pytest.mark.nojit
def test_marginal_covariances_are_blocks_of_the_inverse():
    psf, _, _, centers, flux = problem()
    matrix, pairs, tables, blocks = normal_matrix(psf, centers, flux)
    n = len(centers)
    starts, neighbours, rows = neighbour_lists(pairs, n)
    covariances, cross = marginal_covariances(
        np.arange(n), starts, neighbours, rows, pairs, tables, flux, *blocks, n - 1
    )
    inverse = np.linalg.inv(matrix)
    for s in range(n):
        expected = inverse[4 * s : 4 * s + 4, 4 * s : 4 * s + 4]
        np.testing.assert_allclose(covariances[s], expected, rtol=0, atol=1e-8 * abs(expected).max())
        for k, other in enumerate(neighbours[starts[s] : starts[s + 1]]):
            expected = [inverse[4 * s + b, 4 * other + b] for b in range(2)]
            np.testing.assert_allclose(cross[s, k], expected, rtol=0, atol=1e-8 * abs(inverse).max())


@pytest.mark.nojit
def test_the_significance_of_a_companion_is_what_chi2_falls_by():
    psf, _, _, _, _ = problem()
    centers, flux = np.array([[30.2, 31.1], [32.0, 33.0]]), np.array([[500.0, 800.0], [0.0, 0.0]])
    matrix, _, _, blocks = normal_matrix(psf, centers, flux)
    matched = np.zeros((2, *SHAPE), dtype=np.float32)
    matched[:, 32, 33] = 7.0, 5.0
    gradient = np.zeros(8)
    gradient[4:6] = matched[:, 32, 33]
    free = [0, 1, 2, 3, 4, 5]  # the host, and the fluxes of the companion
    expected = gradient[free] @ np.linalg.solve(matrix[np.ix_(free, free)], gradient[free])
    value = companion_significance(
        np.array([[32, 33]]),
        np.array([0]),
        matched,
        psf.tables,
        psf.own,
        centers,
        flux,
        np.ones((2, 2)),
        blocks[1],
    )
    assert value[0] == pytest.approx(expected, rel=1e-8)


@pytest.mark.nojit
def test_the_autocorrelation_at_zero_is_the_power_of_the_psf():
    psf = _prepare_psf(PSFS, PointSettings())
    out = np.zeros((2, 6))
    autocorrelations(psf.tables, 0.0, 0.0, np.empty((3, 6)), np.empty((3, 6)), out)
    np.testing.assert_allclose(out[:, 0], (PSFS**2).sum(axis=(1, 2)), rtol=1e-10)


# ---------------------------------------------------------------- recovery


def test_sources_without_noise_are_recovered():
    centers, flux = cluster()
    fit = fit_points(draw(centers, flux), ones(), PSFS, np.rint(centers), NO_PRIOR)
    # The rest is the interpolation of the PSF, 1e-4 of the peak, blended.
    np.testing.assert_allclose(fit.flux, flux, rtol=0, atol=1e-3 * flux.max())
    np.testing.assert_allclose(fit.centers, centers, rtol=0, atol=2e-3)


def test_fluxes_at_given_centers_are_those_of_a_dense_linear_fit():
    centers, flux = cluster(1)
    images = noisy(draw(centers, flux), 1)
    settings = replace(NO_PRIOR, center_prior=1e-5)
    fit = fit_points(images, ones(), PSFS, centers, settings)
    for b in range(2):
        design = np.stack([shifted(PSFS[b], SHAPE, c).ravel() for c in centers], axis=1)
        expected = np.linalg.lstsq(design, images[b].ravel(), rcond=None)[0]
        assert (abs(fit.flux[:, b] - expected) < 0.05 * fit.flux_err[:, b]).all()


def test_the_fit_is_a_minimum():
    centers, flux = cluster(2)
    images = noisy(draw(centers, flux), 2)
    fit = fit_points(images, ones(), PSFS, np.rint(centers), NO_PRIOR)
    psf = _prepare_psf(PSFS, PointSettings())
    base = np.rint(centers).astype(np.int64)
    residual = (images - rendered(psf, base, np.full((8, 2), 23), fit.centers, fit.flux)).astype(np.float32)
    sums = np.zeros((8, 2, 3))
    point_sums(residual, psf.splines, base, np.full((8, 2), 23), fit.centers, np.arange(8), True, sums)
    # In units of the error of the sums; chi2 may still fall by 1e-4 per source.
    assert fit.converged
    assert (abs(sums[:, :, 0]) < 0.05 * np.sqrt(psf.own[:, 0])).all()
    assert (abs((fit.flux[:, :, None] * sums[:, :, 1:]).sum(axis=1)) < 0.05 / fit.center_err).all()


@pytest.fixture(scope="module")
def repeats():
    """Fit one cluster 150 times with other noise; returns pulls of fluxes (150, 8, 2) and centers (150, 8, 2)."""
    centers, flux = cluster(4)
    images = draw(centers, flux)
    of_flux, of_center = [], []
    for i in range(150):
        fit = fit_points(noisy(images, i), ones(), PSFS, np.rint(centers), replace(LISTED_ONLY, center_prior=0.0))
        of_flux.append((fit.flux - flux) / fit.flux_err)
        of_center.append((fit.centers - centers) / fit.center_err)
    return np.array(of_flux), np.array(of_center)


def test_flux_errors_are_as_large_as_the_scatter(repeats):
    # The scatter of 2400 pulls is known to 1 / sqrt(4800) = 0.015; chi2 above one makes errors a little larger.
    assert repeats[0].std() == pytest.approx(0.97, abs=0.06)


def test_fluxes_are_unbiased(repeats):
    assert abs(repeats[0].mean()) < 5 / np.sqrt(repeats[0].size)


def test_center_errors_are_as_large_as_the_scatter(repeats):
    assert repeats[1].std() == pytest.approx(0.97, abs=0.06)


def test_faint_fluxes_may_be_negative():
    fit = fit_points(noisy(np.zeros((2, *SHAPE)), 5), ones(), PSFS, cluster(5, n=12)[0], LISTED_ONLY)
    assert (fit.flux < 0).any()


def test_a_crowded_scene_comes_back():
    scene = simulate_scene(kind="crowded", seed=5, n_sources=60, shape=(100, 100), bands=("g", "r", "i"))
    weights = 1.0 / np.broadcast_to(scene.coadd.variance, scene.coadd.images.shape)
    fit = fit_points(scene.coadd.images, weights, np.array([psf.stamp() for psf in scene.psfs]), scene.peaks)
    listed = scene.truth[scene.truth["peak_index"] >= 0]
    truth = np.stack([listed[f"{band}_flux"] for band in "gri"], axis=1)
    pulls = (fit.flux - truth) / fit.flux_err
    # 1 but for pairs within a pixel, which a prior on centers can bias.
    assert 1.4826 * np.median(abs(pulls)) < 1.3


# ---------------------------------------------------------------- invariance


@pytest.fixture(scope="module")
def crowd():
    """Make images of a cluster with noise and one source that is not listed, and its fit."""
    centers, flux = cluster(6, n=9)
    images = noisy(draw(centers, flux), 6)
    peaks = np.rint(centers[:-1])
    return images, peaks, fit_points(images, ones(), PSFS, peaks)


def test_the_order_of_the_peaks_does_not_matter(crowd):
    images, peaks, fit = crowd
    order = np.random.default_rng(0).permutation(len(peaks))
    permuted = fit_points(images, ones(), PSFS, peaks[order])
    np.testing.assert_array_equal(permuted.flux, fit.flux[order])


def test_shifting_the_image_by_pixels_shifts_the_sources(crowd):
    images, peaks, fit = crowd
    moved = np.zeros((2, SHAPE[0] + 7, SHAPE[1] + 4), np.float32)
    weights = np.zeros_like(moved)
    moved[:, 7:, 4:], weights[:, 7:, 4:] = images, 1.0
    shifted_fit = fit_points(moved, weights, PSFS, peaks + (7, 4))
    # Steps end within a tenth of an error.
    assert (abs(shifted_fit.flux - fit.flux) < 0.1 * fit.flux_err).all()
    assert (abs(shifted_fit.centers - (7, 4) - fit.centers) < 0.1 * fit.center_err).all()


def test_flipping_the_image_flips_the_sources(crowd):
    images, peaks, fit = crowd
    flipped = fit_points(images[:, ::-1], ones(), PSFS[:, ::-1], (SHAPE[0] - 1, 0) + peaks * (-1, 1))
    assert (abs(flipped.flux - fit.flux) < 0.1 * fit.flux_err).all()


def test_scaling_image_and_noise_scales_fluxes(crowd):
    images, peaks, fit = crowd
    scaled = fit_points(8 * images, ones() / 64, PSFS, peaks)
    # A power of two, so that nothing is rounded differently but the error of a center without light.
    np.testing.assert_allclose(scaled.flux, 8 * fit.flux, rtol=1e-4)


def test_masked_pixels_do_not_matter(crowd):
    images, peaks, _ = crowd
    weights = ones()
    weights[:, 20:24, 30:33] = 0
    spoilt = images.copy()
    spoilt[:, 20:24, 30:33] = np.nan
    filled = images.copy()
    filled[:, 20:24, 30:33] = 1e6
    one, other = (fit_points(i, weights, PSFS, peaks) for i in (spoilt, filled))
    np.testing.assert_array_equal(one.flux, other.flux)


def test_a_masked_core_makes_an_error_larger():
    image = draw([(30.0, 30.0)], np.array([[500.0, 500.0]]))
    weights = ones()
    weights[:, 28:33, 28:33] = 0
    masked = fit_points(image, weights, PSFS, [(30, 30)], LISTED_ONLY)
    assert (masked.flux_err > 1.5 * fit_points(image, ones(), PSFS, [(30, 30)], LISTED_ONLY).flux_err).all()


def test_a_masked_core_does_not_bias_the_flux():
    image = draw([(30.3, 29.8)], np.array([[500.0, 500.0]]))
    weights = ones()
    weights[:, 28:33, 28:33] = 0
    masked = fit_points(image, weights, PSFS, [(30, 30)], NO_PRIOR)
    assert (abs(masked.flux - 500.0) < 0.1 * masked.flux_err).all()


@pytest.mark.parametrize("missing", ["psf", "weights"])
def test_an_unusable_band_leaves_the_others_alone(crowd, missing):
    images, peaks, _ = crowd
    psfs, weights = PSFS.copy(), ones()
    if missing == "psf":
        psfs[1] = 0
    else:
        weights[1] = 0
    fit = fit_points(images, weights, psfs, peaks)
    alone = fit_points(images[:1], ones()[:1], PSFS[:1], peaks)
    assert np.isnan(fit.flux_err[:, 1]).all()
    assert (fit.flux[:, 1] == 0).all()
    assert (abs(fit.flux[:, 0] - alone.flux[:, 0]) < 0.1 * alone.flux_err[:, 0]).all()


def test_far_neighbours_do_not_change_a_flux():
    psf_radius = 21
    centers, flux = np.array([[20.2, 12.3], [30.0, 12.3 + 2 * psf_radius + 5]]), np.array([[300.0, 300], [200, 200]])
    images = noisy(draw(centers, flux), 7)
    both = fit_points(images, ones(), PSFS, np.rint(centers), LISTED_ONLY)
    alone = fit_points(images, ones(), PSFS, np.rint(centers[:1]), LISTED_ONLY)
    assert (abs(both.flux[0] - alone.flux[0]) < 0.02 * alone.flux_err[0]).all()


# ---------------------------------------------------------------- sources that nobody listed


def test_a_source_that_is_not_listed_is_added(crowd):
    _, _, fit = crowd
    centers, flux = cluster(6, n=9)
    assert len(fit.added_centers) == 1
    assert np.hypot(*(fit.added_centers[0] - centers[-1])) < 0.3
    np.testing.assert_allclose(fit.added_flux[0], flux[-1], rtol=0.1)


def test_a_source_that_is_not_listed_does_not_spoil_its_neighbour():
    centers, flux = np.array([[30.1, 30.3], [30.4, 32.4]]), np.array([[3000.0, 2000.0], [1500.0, 2500.0]])
    fit = fit_points(noisy(draw(centers, flux), 8), ones(), PSFS, [(30, 30)])
    assert len(fit.added_centers) == 1
    assert (abs(fit.flux[0] - flux[0]) < 4 * fit.flux_err[0]).all()


def test_a_lone_star_is_not_torn_apart():
    for flux in (100.0, 1e3, 1e4, 1e5):
        fit = fit_points(noisy(draw([(30.3, 30.4)], [[flux, flux]]), 9), ones(), PSFS, [(30, 30)])
        assert len(fit.added_centers) == 0


def test_a_star_with_another_psf_is_not_torn_apart():
    wider = np.stack([MoffatPsf(fwhm_pix=w * 1.01, beta=b, axis_ratio=0.95, angle=0.4).stamp() for w, b in
                      ((4.2, 3.2), (3.6, 4.2))])  # fmt: skip
    images = noisy(draw([(30.3, 30.4)], [[2e4, 2e4]], psfs=wider), 10)
    assert len(fit_points(images, ones(), PSFS, [(30, 30)]).added_centers) == 0


def test_noise_alone_adds_no_source():
    # Six sigma in 20 images of 3840 pixels: 1e-3 are expected.
    added = 0
    for seed in range(20):
        fit = fit_points(noisy(np.zeros((2, *SHAPE)), 100 + seed), ones(), PSFS, [(30, 30), (10, 12)])
        added += len(fit.added_centers)
    assert added == 0


# ---------------------------------------------------------------- evidence, errors of the model, edges


def test_a_point_is_as_wide_as_the_psf():
    pulls = []
    for seed in range(40):
        fit = fit_points(noisy(draw([(30.3, 30.4)], [[500.0, 500.0]]), seed), ones(), PSFS, [(30, 30)], LISTED_ONLY)
        pulls.append(fit.broadening[0] / fit.broadening_err[0])
    # The mean of 40 pulls is known to 0.16, their scatter to 0.11.
    assert abs(np.mean(pulls)) < 0.6
    assert np.std(pulls) == pytest.approx(1.0, abs=0.4)


def test_an_extended_source_shows_its_variance():
    sigma = 0.5
    side = 41
    k = 2 * np.pi * np.fft.fftfreq(side)
    blur = np.exp(-0.5 * sigma**2 * (k[:, None] ** 2 + k**2))
    wide = np.fft.ifft2(np.fft.fft2(PSFS) * blur).real
    fit = fit_points(draw([(30.3, 30.4)], [[2e3, 2e3]], psfs=wide), ones(), PSFS, [(30, 30)], LISTED_ONLY)
    # To first order in the variance over that of the PSF, here a tenth.
    assert fit.broadening[0] == pytest.approx(sigma**2, rel=0.25)
    assert fit.broadening[0] > 5 * fit.broadening_err[0]


def test_misfit_makes_errors_larger():
    image = noisy(draw([(30.3, 30.4)], [[2e4, 2e4]]), 11)
    image[:, 28, 33] += 200.0
    fit = fit_points(image, ones(), PSFS, [(30, 30)], LISTED_ONLY)
    assert fit.chi2[0] > 5
    formal = 1 / np.sqrt((PSFS**2).sum(axis=(1, 2)))
    assert (fit.flux_err[0] > 2 * formal).all()


def test_an_error_of_the_psf_makes_errors_of_bright_stars_larger():
    image = noisy(draw([(30.3, 30.4), (33.0, 36.0)], [[1e5, 1e5], [300.0, 300.0]]), 12)
    exact = fit_points(image, ones(), PSFS, [(30, 30), (33, 36)], LISTED_ONLY)
    loose = fit_points(image, ones(), PSFS, [(30, 30), (33, 36)], replace(LISTED_ONLY, psf_error=0.02))
    assert (loose.flux_err[0] > 5 * exact.flux_err[0]).all()
    assert (abs(loose.flux - exact.flux) < 4 * loose.flux_err).all()


def test_wings_beyond_the_stamp_count_as_flux():
    side = 101
    offsets = np.arange(side) - side // 2
    wide = (1 + (offsets[:, None] ** 2 + offsets**2) / 9.0) ** -2.0
    wide /= wide.sum()
    stamp = wide[30:-30, 30:-30][None]
    image = 1e5 * wide[None]
    fit = fit_points(image, np.ones((1, side, side)), stamp / stamp.sum(), [(50, 50)],
                     replace(LISTED_ONLY, wing_radius=50))  # fmt: skip
    assert fit.flux[0, 0] == pytest.approx(1e5, rel=0.01)


def test_sources_at_the_edge_are_fitted():
    centers, flux = np.array([[1.3, 30.2], [58.6, 62.7]]), np.array([[500.0, 700.0], [400.0, 600.0]])
    fit = fit_points(noisy(draw(centers, flux), 13), ones(), PSFS, np.rint(centers), LISTED_ONLY)
    assert (abs(fit.flux - flux) < 4 * fit.flux_err).all()


def test_centers_stay_in_their_box():
    centers, flux = cluster(14)
    fit = fit_points(draw(centers, flux), ones(), PSFS, np.rint(centers) + 3, replace(LISTED_ONLY, center_prior=0.0))
    assert (abs(fit.centers - np.rint(centers) - 3) <= 1.0).all()


def test_two_peaks_in_one_place_share_the_flux():
    fit = fit_points(draw([(30.0, 30.0)], [[500.0, 500.0]]), ones(), PSFS, [(30, 30), (30, 30)], LISTED_ONLY)
    np.testing.assert_allclose(fit.flux.sum(axis=0), 500.0, rtol=0.01)
    assert np.isfinite(fit.flux_err).all()


def test_no_peaks_give_an_empty_fit():
    fit = fit_points(np.zeros((2, *SHAPE)), ones(), PSFS, np.empty((0, 2)), LISTED_ONLY)
    assert fit.flux.shape == (0, 2)


# ---------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": np.zeros(SHAPE)}, ShapeError, "images must have shape"),
        ({"weights": np.ones((1, *SHAPE))}, ShapeError, "weights must have the shape"),
        ({"psfs": PSFS[:, :-1]}, ShapeError, "odd P and Q"),
        ({"peaks": [1, 2]}, ShapeError, "peaks must have shape"),
        ({"peaks": [(70, 2)]}, InputError, "peaks must lie in the image"),
        ({"weights": -np.ones((2, *SHAPE))}, InputError, "weights must be finite and >= 0"),
        ({"images": np.full((2, *SHAPE), np.nan)}, InputError, "images must be finite"),
        ({"psfs": np.full_like(PSFS, np.nan)}, InputError, "psfs must be finite"),
    ],
)
def test_bad_input_is_named(change, error, message):
    given = {"images": np.zeros((2, *SHAPE)), "weights": ones(), "psfs": PSFS, "peaks": [(30, 30)]}
    with pytest.raises(error, match=message):
        fit_points(**(given | change))


def test_bad_settings_are_named():
    with pytest.raises(ConfigError, match="rounds must be >= 0, got -1"):
        PointSettings(rounds=-1)
    with pytest.raises(ConfigError, match="center_box must be > 0, got 0"):
        PointSettings(center_box=0)
