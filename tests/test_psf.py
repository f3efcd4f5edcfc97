"""The model PSF is a Gaussian seen by pixels, and the difference kernels lead from it to the observed PSFs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

import reference
from kermes.errors import InputError, ShapeError
from kermes.geometry import Box
from kermes.psf import CellPsf, difference_kernels, model_psf

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


# ---------------------------------------------------------------- cells


def cell_stamps(n_y=3, n_x=4, bands=2, side=9):
    """A different Gaussian in each cell and band."""
    return np.array([[[model_psf(1.0 + 0.1 * i + 0.03 * j + 0.2 * b, side) for b in range(bands)]
                      for j in range(n_x)] for i in range(n_y)])  # fmt: skip


def cells(**changes):
    """A grid of 3 x 4 cells of 10 x 20 pixels that begins at (100, -40)."""
    options = {"stamps": cell_stamps(), "bands": ("g", "r"), "cell_shape": (10, 20), "origin": (100, -40)}
    return CellPsf(**(options | changes))


@pytest.mark.parametrize(("y", "x", "cell"), [(100, -40, (0, 0)), (109.4, -20.6, (0, 0)), (109.6, -20.4, (1, 1)),
                                              (129.4, 39.4, (2, 3)), (114.5, 0.0, (1, 2))])  # fmt: skip
def test_position_gets_the_psf_of_its_cell(y, x, cell):
    for b, band in enumerate(("g", "r")):
        np.testing.assert_allclose(cells()(y, x, band), cell_stamps()[cell][b], rtol=1e-14)


@pytest.mark.parametrize("nothing", [np.nan, 0.0])
def test_missing_cell_takes_the_psf_of_the_nearest_one_in_that_band_only(nothing):
    stamps = cell_stamps()
    stamps[1, 1, 0] = nothing
    stamps[0, 1, 0] = nothing
    psf = cells(stamps=stamps)
    # Cell (1, 0) is as near as (1, 2) and (2, 1), and comes first.
    np.testing.assert_allclose(psf(115, -10, "g"), cell_stamps()[1, 0, 0], rtol=1e-14)
    np.testing.assert_allclose(psf(115, -10, "r"), cell_stamps()[1, 1, 1], rtol=1e-14)


def test_mask_of_cells_is_kept():
    present = np.ones((3, 4), dtype=bool)
    present[0, 0] = False
    np.testing.assert_allclose(cells(present=present)(100, -40, "g"), cell_stamps()[0, 1, 0], rtol=1e-14)


def test_nothing_is_lent_farther_than_allowed():
    stamps = cell_stamps()
    stamps[:, :3] = np.nan
    psf = cells(stamps=stamps, max_distance=1.0)
    assert psf(100, 10, "g").sum() == pytest.approx(1.0)
    with pytest.raises(LookupError, match="within 1 cells"):
        psf(100, -40, "g")
    with pytest.raises(LookupError):
        cells(stamps=stamps, max_distance=0.0)(100, 10, "g")
    with pytest.raises(LookupError, match="no band 'i'"):
        psf(100, 30, "i")


def test_outside_the_grid_the_edge_serves_as_far_as_allowed():
    psf = cells(max_distance=0.5)
    np.testing.assert_allclose(psf(94.6, -49, "g"), cell_stamps()[0, 0, 0], rtol=1e-14)
    with pytest.raises(LookupError):
        psf(94.4, -40, "g")


def test_interpolation_gives_the_cells_at_their_centres_and_the_mean_between():
    psf = cells(interpolation="bilinear")
    np.testing.assert_allclose(psf(114.5, -10.5, "r"), cell_stamps()[1, 1, 1], rtol=1e-12)
    expected = cell_stamps()[1:3, 1:3, 1].mean(axis=(0, 1))
    np.testing.assert_allclose(psf(119.5, -0.5, "r"), expected, rtol=1e-12)
    np.testing.assert_allclose(psf(101.0, -39.0, "r"), cell_stamps()[0, 0, 1], rtol=1e-12)  # no cell beyond


@given(st.floats(85, 145), st.floats(-70, 70), st.sampled_from(["nearest", "bilinear"]), st.integers(0, 2**12 - 1))
def test_psf_of_a_band_is_normalised_or_zero_wherever_cells_are_missing(y, x, interpolation, missing):
    present = (missing >> np.arange(12)) & 1 == 0
    if present.any():
        psfs = cells(present=present.reshape(3, 4), interpolation=interpolation).at(y=y, x=x)
        for total in psfs.sum(axis=(1, 2)):
            assert total == 0 or total == pytest.approx(1.0, abs=1e-12)


def test_interpolated_psf_has_no_step_where_cells_are_missing():
    stamps = cell_stamps()
    stamps[1, 1] = stamps[0, 3] = np.nan
    psf = cells(stamps=stamps, interpolation="bilinear")
    along = np.array([psf(104.5 + 0.1 * k, -30.0 + 0.3 * k, "g") for k in range(200)])
    # Neighbouring cells differ by 1e-2, over 10 and 20 pixels; steps here are of 0.3 pixels.
    assert np.abs(np.diff(along, axis=0)).max() < 1e-3


def test_stamps_are_normalised_padded_and_rid_of_single_nans():
    stamps = 3.0 * np.pad(cell_stamps(), [(0, 0)] * 3 + [(1, 0), (0, 0)])  # 10 x 9 pixels, the centre at 5
    stamps[0, 0, 0, 0, 0] = np.nan
    psf = cells(stamps=stamps)(100, -40, "g")
    assert psf.shape == (11, 9)
    assert psf.sum() == pytest.approx(1.0)
    assert np.unravel_index(psf.argmax(), psf.shape) == (5, 4)


def test_sampling_a_field_gives_what_it_is_at_the_centres_of_the_cells():
    def field(y, x, band):
        if y > 30:
            raise LookupError
        return model_psf(1.0 + 0.01 * y + 0.002 * x)

    psf = CellPsf.sample(field, box=Box(0, 100, 50, 35), cell_shape=(10, 20), bands=("g",))
    assert psf.stamps.shape[:3] == (5, 2, 1)
    np.testing.assert_allclose(psf(3, 101, "g"), field(4.5, 109.5, "g"), rtol=1e-12)
    np.testing.assert_allclose(psf(3, 134, "g"), field(4.5, 129.5, "g"), rtol=1e-12)
    np.testing.assert_allclose(psf(38, 101, "g"), field(24.5, 109.5, "g"), rtol=1e-12)
    with pytest.raises(LookupError):
        psf(48, 101, "g")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"stamps": np.ones((3, 4, 9, 9))}, ShapeError, "stamps must have shape"),
        ({"bands": ("g",)}, ShapeError, "stamps must have shape"),
        ({"stamps": np.full((1, 1, 2, 3, 3), np.nan)}, InputError, "stamps must hold a PSF"),
        ({"present": np.ones((2, 2))}, ShapeError, "present must have shape"),
        ({"cell_shape": (0, 5)}, InputError, "cell_shape must have sides"),
        ({"cell_shape": 5}, InputError, "cell_shape must be two whole"),
        ({"origin": (0.5, 0)}, InputError, "origin must be two whole"),
        ({"max_distance": -1.0}, InputError, "max_distance must be"),
        ({"interpolation": "cubic"}, InputError, "interpolation must be"),
    ],
)
def test_bad_cells_are_refused_by_name(changes, error, message):
    with pytest.raises(error, match=message):
        cells(**changes)
