"""Difference kernels amplify errors as far as stated, show what is wrong with them, and narrow PSFs are refused."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.fft
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import reference
from kermes import Coadd, Config, ConfigError, InputError, deblend
from kermes.planning import plan_tile
from kermes.psf import (
    amplify,
    cut_error,
    difference_kernels,
    kernel_diagnostics,
    model_psf,
    sufficient_reach,
    truncated,
    widest_sigma,
)

TARGET = model_psf(0.8)
WIDE = np.stack([model_psf(1.8, 31), model_psf(1.5, 31)])


def elongated(sigma_y, sigma_x, side=43):
    """Gaussian along the axes, sampled at pixel centres."""
    y, x = np.mgrid[:side, :side] - side // 2
    psf = np.exp(-0.5 * ((y / sigma_y) ** 2 + (x / sigma_x) ** 2))
    return psf / psf.sum()


def noisy(psfs, level, seed=1):
    """PSFs with white noise, relative to their peak."""
    return psfs + level * psfs.max() * np.random.default_rng(seed).normal(size=psfs.shape)


# ---------------------------------------------------------------- regularisation


def test_without_regularization_the_kernel_is_the_plain_ratio():
    psfs = noisy(WIDE, 1e-3)
    # The same grid as in the function: the first fast length from 31 + 15 + 3 pixels.
    shape = (50, 50)

    def transform(stamp):
        padded = np.zeros((*stamp.shape[:-2], *shape))
        padded[..., : stamp.shape[-2], : stamp.shape[-1]] = stamp
        return scipy.fft.fft2(np.roll(padded, (-(stamp.shape[-2] // 2), -(stamp.shape[-1] // 2)), axis=(-2, -1)))

    ratio = scipy.fft.ifft2(transform(psfs) / transform(TARGET)).real
    expected = np.roll(ratio, (15, 15), axis=(1, 2))[:, :31, :31]
    np.testing.assert_allclose(difference_kernels(psfs, TARGET), expected, rtol=0, atol=1e-12)  # rounding


def test_kernels_are_those_that_scarlet_lite_prints(shared):
    with np.load(shared / "data" / "hsc_cosmos" / "hsc_cosmos_35.npz", allow_pickle=True) as data:
        psfs = data["psfs"].astype(float)
    with np.load(shared / "data" / "conformance" / "convolution.npz") as data:
        expected = data["difference_kernel"]
    psfs /= psfs.sum(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(difference_kernels(psfs, TARGET), expected, rtol=0, atol=1e-12)  # rounding


@given(
    hnp.arrays(float, (1, 11, 11), elements=st.floats(-1, 1, width=32)),
    st.sampled_from([1e-4, 1e-3, 1e-2]),
)
def test_errors_of_a_psf_are_not_amplified_more_than_stated(error, regularization):
    # The kernel is linear in the PSF: this is what the error adds to it.
    added = difference_kernels(error, TARGET, regularization)
    assert np.linalg.norm(added) <= 1.000001 * regularization**-0.5 * np.linalg.norm(error)


def test_without_regularization_they_are_amplified_more():
    y, x = np.mgrid[:21, :21]
    checkerboard = (-1.0) ** (y + x)[None]
    plain, tamed = (np.linalg.norm(difference_kernels(checkerboard, TARGET, r)) for r in (0.0, 1e-4))
    assert plain > 200 * np.linalg.norm(checkerboard)
    assert tamed < 100 * np.linalg.norm(checkerboard)


@pytest.mark.parametrize("regularization", [1e-4, 1e-3])
def test_regularization_takes_the_noise_of_a_psf_out_of_its_kernel(regularization):
    truth = difference_kernels(WIDE, TARGET)
    plain, tamed = (difference_kernels(noisy(WIDE, 1e-3), TARGET, r) - truth for r in (0.0, regularization))
    assert (np.linalg.norm(tamed, axis=(1, 2)) < 0.6 * np.linalg.norm(plain, axis=(1, 2))).all()


def test_a_regularized_kernel_still_leads_to_the_observed_psf():
    kernels = difference_kernels(WIDE, TARGET, 1e-4)
    convolved = reference.convolve(kernels, np.stack([TARGET, TARGET]))
    inner = (slice(None), slice(7, -7), slice(7, -7))
    # At frequencies below the floor, seven per cent of all, a PSF of 1.5 pixels has next to no power.
    np.testing.assert_allclose(convolved[inner], WIDE[inner], rtol=0, atol=1e-4 * WIDE.max())


def test_regularization_keeps_the_flux():
    kernels = difference_kernels(WIDE, TARGET, 1e-3)
    np.testing.assert_allclose(kernels.sum(axis=(1, 2)), 1, rtol=0, atol=1e-6)  # but for what lies outside the stamp


# ---------------------------------------------------------------- diagnostics


def test_diagnostics_are_what_they_say():
    kernel = np.zeros((1, 5, 7))
    kernel[0, 2, 3], kernel[0, 2, 2], kernel[0, 4, 0] = 0.8, -0.15, 0.05
    found = kernel_diagnostics(kernel)
    assert found.noise_gain[0] == pytest.approx(np.sqrt(0.8**2 + 0.15**2 + 0.05**2))
    assert found.negative_fraction[0] == pytest.approx(0.15)
    assert found.edge[0] == pytest.approx(0.05 / 0.8)
    assert found.flux_lost[0] == pytest.approx(0.3)
    # Of the wave that turns the sign of odd columns and of every second row; two per cent lie between frequencies.
    assert found.largest_gain[0] == pytest.approx(0.8 + 0.15 + 0.05, rel=0.02)


def test_a_psf_narrow_in_one_direction_shows_in_the_largest_gain_alone():
    found = kernel_diagnostics(difference_kernels(elongated(0.7, 2.0)[None], TARGET))
    assert found.noise_gain[0] < 1
    assert found.largest_gain[0] > 3


def test_noise_of_a_psf_shows_as_rings():
    clean, rings = (kernel_diagnostics(difference_kernels(psfs, TARGET)) for psfs in (WIDE, noisy(WIDE, 1e-3)))
    assert (rings.negative_fraction > 0.2).all()
    assert (rings.edge > 0.01).all()
    assert (clean.negative_fraction < 0.01).all()
    assert (clean.edge < 1e-3).all()


def test_a_stamp_that_cuts_the_psf_shows_at_its_edge():
    found = kernel_diagnostics(difference_kernels(WIDE[:, 12:-12, 12:-12], TARGET))
    assert (found.edge > 0.1).all()
    assert (np.abs(found.flux_lost) > 0.01).all()


def test_a_band_without_a_psf_has_no_shares():
    found = kernel_diagnostics(np.zeros((1, 5, 5)))
    assert found.noise_gain[0] == found.largest_gain[0] == 0
    assert np.isnan([found.negative_fraction[0], found.edge[0]]).all()


def test_kernels_of_measured_psfs_are_in_the_usual_range(shared):
    with np.load(shared / "data" / "hsc_cosmos" / "hsc_cosmos_35.npz", allow_pickle=True) as data:
        psfs = data["psfs"].astype(float)
    found = kernel_diagnostics(difference_kernels(psfs / psfs.sum(axis=(1, 2), keepdims=True), TARGET))
    assert (found.noise_gain < 0.3).all()
    assert (found.largest_gain < 1.01).all()
    assert (found.negative_fraction < 0.2).all()
    assert (found.edge < 0.01).all()
    assert (np.abs(found.flux_lost) < 1e-3).all()


# ---------------------------------------------------------------- narrow PSFs


@pytest.mark.parametrize(("sigma", "narrow"), [(0.6, True), (0.79, True), (0.8, False), (0.82, False), (3.0, False)])
def test_a_psf_narrower_than_the_model_psf_is_noticed(sigma, narrow):
    psfs = np.stack([WIDE[0], model_psf(sigma, 31)])
    np.testing.assert_array_equal(amplify(difference_kernels(psfs, TARGET)), [False, narrow])


@pytest.mark.parametrize(("sigma", "expected"), [(2.0, 0.8), (0.8, 0.8), (0.72, 0.7), (0.52, 0.5), (0.3, 0.5)])
def test_the_widest_model_psf_that_fits_is_chosen(sigma, expected):
    assert widest_sigma(np.stack([WIDE[0], model_psf(sigma, 31), np.zeros((31, 31))])) == expected


def coadd_of(sigma, flux=500.0):
    """One star in two bands, the second with a PSF of this width."""
    psfs = np.stack([WIDE[0], model_psf(sigma, 31)])
    images = np.random.default_rng(3).normal(size=(2, 41, 41))
    images[:, 5:36, 5:36] += flux * psfs
    return Coadd(images=images, variance=np.ones_like(images), psfs=psfs, bands=["g", "r"], peaks=[(20, 20)])


def test_a_narrow_psf_is_refused_with_its_band_and_the_remedy():
    message = r"model_psf_sigma = 0.8 pixels; that of band 'r' is narrower: choose a smaller model_psf_sigma"
    with pytest.raises(InputError, match=message):
        plan_tile(coadd_of(0.62), config=Config(model="scarlet-lite"))


def test_model_psf_sigma_of_zero_chooses_one_that_fits():
    plan = plan_tile(coadd_of(0.62), config=Config(model_psf_sigma=0))
    assert plan.config.model_psf_sigma == 0.6
    assert not amplify(plan.tasks[0].kernels.stamps).any()


def test_model_psf_sigma_of_zero_is_the_usual_one_for_wide_psfs():
    assert plan_tile(coadd_of(1.5), config=Config(model_psf_sigma=0)).config == Config()


def test_a_psf_narrower_than_any_model_psf_is_refused():
    with pytest.raises(InputError, match="model_psf_sigma = 0.5 pixels; that of band 'r' is narrower"):
        plan_tile(coadd_of(0.3), config=Config(model="scarlet-lite", model_psf_sigma=0))


def test_a_star_with_a_narrow_psf_gets_its_flux_and_the_result_knows_the_width():
    result = deblend(coadd_of(0.62), config=Config(model_psf_sigma=0))
    assert result.config.model_psf_sigma == 0.6
    for band in ("g", "r"):
        flux, error = result.objects[f"{band}_flux"][0], result.objects[f"{band}_flux_err"][0]
        assert abs(flux - 500) < 4 * error


def test_the_fit_uses_regularized_kernels_and_so_does_the_result():
    config = Config(kernel_regularization=1e-2)
    coadd = coadd_of(1.5)
    expected = difference_kernels(np.asarray(coadd.psfs), TARGET, 1e-2)
    np.testing.assert_array_equal(plan_tile(coadd, config=config).tasks[0].kernels.stamps, expected)
    np.testing.assert_array_equal(deblend(coadd, config=config).kernels(np.asarray(coadd.psfs)).stamps, expected)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("model_psf_sigma", 0.3, "model_psf_sigma must be 0 or lie between 0.5 and 10 pixels, got 0.3"),
        ("kernel_regularization", -1e-4, "kernel_regularization must be >= 0 and below 1, got -0.0001"),
        ("kernel_regularization", 1.0, "kernel_regularization must be >= 0 and below 1, got 1.0"),
    ],
)
def test_settings_out_of_range_are_refused(setting, value, message):
    with pytest.raises(ConfigError, match=message):
        replace(Config(), **{setting: value})


# ---------------------------------------------------------------- cutting


@st.composite
def kernels_and_sources(draw):
    """Draw kernels with wings, PSFs and the brightness of a few sources."""
    shape = (draw(st.integers(1, 3)), *(2 * draw(st.integers(0, 4)) + 1 for _ in range(2)))
    kernels = draw(hnp.arrays(float, shape, elements=st.floats(-1, 1, width=16)))
    psfs = draw(hnp.arrays(float, shape, elements=st.floats(0, 1, width=16)))
    snr = draw(hnp.arrays(float, (draw(st.integers(0, 3)), shape[0]), elements=st.floats(0, 100, width=16)))
    return kernels, psfs, snr


def slow_reach(kernels, psfs, snr):
    """Smallest square of a kernel outside of which a point source and a surface are not seen in the noise."""
    _, p, q = kernels.shape
    for reach in range(max(p, q)):
        seen = False
        for kernel, psf, bright in zip(kernels, psfs, snr, strict=True):
            outside = np.abs(kernel)
            outside[max(p // 2 - reach, 0) : p // 2 + reach + 1, max(q // 2 - reach, 0) : q // 2 + reach + 1] = 0
            point = outside.max() / psf.max() if psf.max() > 0 else 0
            seen |= bright * max(point, outside.sum()) >= 0.1
        if not seen:
            return reach
    raise AssertionError


@given(kernels_and_sources())
def test_sufficient_reach_agrees_with_the_slow_twin(drawn):
    kernels, psfs, snr = drawn
    expected = [slow_reach(kernels, psfs, bright) for bright in snr]
    np.testing.assert_array_equal(sufficient_reach(cut_error(kernels, psfs), snr), expected)


def test_cutting_to_the_sufficient_reach_is_not_seen():
    kernels = difference_kernels(WIDE, TARGET)
    snr = np.array([[200.0, 100.0]])
    (reach,) = sufficient_reach(cut_error(kernels, WIDE), snr)
    cut = truncated(kernels, reach)
    assert cut.shape[1] < 31
    flux = snr[0] / WIDE.max(axis=(1, 2))
    star = np.zeros((2, 61, 61))
    star[:, 30 - 7 : 30 + 8, 30 - 7 : 30 + 8] = flux[:, None, None] * TARGET
    assert np.abs(reference.convolve(star, kernels) - reference.convolve(star, cut)).max() < 0.1
