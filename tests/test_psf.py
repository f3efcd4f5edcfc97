"""The model PSF is a Gaussian seen by pixels, and the difference kernels lead from it to the observed PSFs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

import reference
from kermes.psf import difference_kernels, model_psf

sigmas = st.floats(0.5, 3.0)
odd_sides = st.integers(2, 12).map(lambda half: 2 * half + 1)


def elliptical(sigma_y, sigma_x, tilt, side=43):
    """A tilted Gaussian that sums to one."""
    y, x = np.mgrid[:side, :side] - side // 2
    psf = np.exp(-0.5 * ((y / sigma_y) ** 2 + (x / sigma_x) ** 2) + tilt * x * y)
    return psf / psf.sum()


# Two bands of different shape, both wider than the model PSF in every direction.
PSFS = np.stack([elliptical(2.0, 1.7, 0.05), elliptical(1.6, 2.4, -0.03)])
TARGET = model_psf(0.8)
ROUNDING = 1e-13
"""Double precision over the smallest mode of the model PSF, 4e-3."""


@given(sigmas, odd_sides)
def test_model_psf_sums_to_one(sigma, side):
    assert model_psf(sigma, side).sum() == pytest.approx(1, abs=1e-14)  # rounding


@given(sigmas, odd_sides)
def test_model_psf_looks_the_same_from_all_sides(sigma, side):
    psf = model_psf(sigma, side)
    for other in (psf[::-1], psf[:, ::-1], psf.T):
        np.testing.assert_allclose(other, psf, rtol=0, atol=1e-15)  # rounding


@given(sigmas, odd_sides)
def test_model_psf_is_brightest_at_its_centre(sigma, side):
    psf = model_psf(sigma, side)
    assert np.unravel_index(psf.argmax(), psf.shape) == (side // 2, side // 2)


def test_model_psf_is_the_light_that_falls_on_each_pixel():
    sigma = 0.8

    def light(offset):
        density = quad(lambda x: np.exp(-0.5 * (x / sigma) ** 2), offset - 0.5, offset + 0.5)[0]
        return density / (sigma * np.sqrt(2 * np.pi))

    # The stamp reaches nine sigma, so that nothing is lost outside.
    expected = light(1) * light(2)
    assert model_psf(sigma, 15)[7 + 1, 7 - 2] == pytest.approx(expected, rel=1e-10)


def test_kernel_convolved_with_the_model_psf_is_the_observed_psf():
    kernels = difference_kernels(PSFS, TARGET)
    convolved = reference.convolve(kernels, np.stack([TARGET, TARGET]))
    # Near the rim the kernel lacks what lies outside its stamp.
    inner = (slice(None), slice(7, -7), slice(7, -7))
    np.testing.assert_allclose(convolved[inner], PSFS[inner], rtol=0, atol=ROUNDING)


def test_kernel_of_the_model_psf_itself_is_a_single_pixel():
    kernel = difference_kernels(TARGET[None], TARGET)[0]
    expected = np.zeros_like(TARGET)
    expected[7, 7] = 1
    np.testing.assert_allclose(kernel, expected, rtol=0, atol=ROUNDING)


def test_kernels_keep_the_flux():
    # But for what lies outside the stamp, about 1e-11.
    np.testing.assert_allclose(difference_kernels(PSFS, TARGET).sum(axis=(1, 2)), 1, rtol=0, atol=1e-10)


@pytest.mark.parametrize("axis", [1, 2])
def test_kernel_of_a_flipped_psf_is_flipped(axis):
    flipped = difference_kernels(np.flip(PSFS, axis), TARGET)
    np.testing.assert_allclose(flipped, np.flip(difference_kernels(PSFS, TARGET), axis), rtol=0, atol=ROUNDING)


def test_kernels_of_stamps_that_are_not_square_have_their_shape():
    cut = PSFS[:, 4:-4]
    kernels = difference_kernels(cut, TARGET)
    assert kernels.shape == cut.shape
    # What is cut off the PSFs is below 1e-15 of their peak.
    np.testing.assert_allclose(kernels, difference_kernels(PSFS, TARGET)[:, 4:-4], rtol=0, atol=ROUNDING)
