"""What a Coadd accepts, what it makes of it, and what it says to the rest."""

import copy
import dataclasses
import logging
import pickle

import numpy as np
import pytest
from astropy import units
from astropy.coordinates import SkyCoord
from astropy.table import QTable, Table
from astropy.utils.masked import Masked
from astropy.wcs import WCS

from kermes.coadd import Coadd, cut_blend, normalize_peaks, normalized_psf, odd_sided, parse_unit, planes_at, stack_psfs
from kermes.errors import DataWarning, InputError, ShapeError
from kermes.geometry import Box
from kermes.psf import CellPsf, model_psf

BANDS = ("r", "g")
SHAPE = (2, 6, 8)


def tangent_plane(center=(3.0, 4.0)):
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval = [150.0, 2.0]
    wcs.wcs.crpix = [center[1] + 1, center[0] + 1]
    wcs.wcs.cdelt = [-5e-5, 5e-5]
    wcs.wcs.set()
    return wcs


def make(**changes):
    """A valid coadd of two bands, with some arguments changed."""
    images = np.random.default_rng(3).normal(size=SHAPE).astype(np.float32)
    arguments = {"images": images, "variance": np.full(SHAPE, 2.0), "psfs": np.ones((2, 3, 3)), "bands": BANDS}
    return Coadd(**(arguments | changes))


# ---------------------------------------------------------------- pixels


def test_bands_keep_the_order_given():
    assert make().bands == ("r", "g")


@pytest.mark.parametrize("dtype", [">f4", ">f8", "<f8", ">i2", "uint16", "int64", "float16"])
def test_any_type_and_byte_order_of_numbers_gives_the_same_image(dtype):
    images = np.arange(96).reshape(SHAPE)
    coadd = make(images=images.astype(dtype))
    assert coadd.images.dtype == np.dtype("=f4")
    np.testing.assert_array_equal(coadd.images, images)


def test_input_arrays_are_not_modified_and_not_shared():
    images = np.ones(SHAPE, dtype=np.float32)
    coadd = make(images=images)
    images[:] = 7
    assert (coadd.images == 1).all()


def test_one_band_may_come_without_an_axis_of_bands():
    coadd = Coadd(images=np.ones((6, 8)), variance=np.ones((6, 8)), psfs=np.ones((3, 3)), bands="i")
    assert coadd.bands == ("i",)
    assert coadd.images.shape == (1, 6, 8)


@pytest.mark.parametrize(
    "variance",
    [2.0, [2.0, 2.0], np.full(2, 2.0), np.full((6, 8), 2.0), [np.full((6, 8), 2.0), 2.0], np.full((2, 1, 1), 2.0)],
    ids=["number", "list per band", "array per band", "one image", "image and number", "broadcastable"],
)
def test_variance_may_be_anything_that_fills_the_images(variance):
    coadd = make(variance=variance)
    np.testing.assert_array_equal(coadd.variance, np.full(SHAPE, 2.0))


def test_bands_may_come_as_a_list_of_images():
    images = np.random.default_rng(1).normal(size=SHAPE)
    np.testing.assert_array_equal(make(images=list(images)).images, images.astype(np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_pixel_that_is_not_finite_is_not_valid(bad):
    images = np.ones(SHAPE)
    images[0, 2, 3] = bad
    coadd = make(images=images)
    assert not coadd.valid[0, 2, 3]
    assert coadd.valid.sum() == coadd.valid.size - 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0, -1.0])
def test_pixel_without_positive_finite_variance_is_not_valid(bad):
    variance = np.ones(SHAPE)
    variance[1, 0, 0] = bad
    assert np.argwhere(~make(variance=variance).valid).tolist() == [[1, 0, 0]]


def test_pixels_hidden_by_a_masked_array_are_not_valid():
    images = np.ma.masked_array(np.ones(SHAPE, dtype=int), mask=False)
    images[0, 1, 1] = np.ma.masked
    assert np.argwhere(~make(images=images).valid).tolist() == [[0, 1, 1]]


def test_pixels_hidden_by_a_masked_quantity_are_not_valid():
    hidden = np.zeros(SHAPE, dtype=bool)
    hidden[0, 1, 1] = True
    coadd = make(images=Masked(np.ones(SHAPE) * units.nJy, mask=hidden))
    assert np.argwhere(~coadd.valid).tolist() == [[0, 1, 1]]


def test_a_band_without_a_valid_pixel_is_no_error():
    coadd = make(variance=[1.0, np.nan])
    assert coadd.valid[0].all()
    assert not coadd.valid[1].any()


def test_no_valid_pixel_at_all_is_worth_a_warning():
    with pytest.warns(DataWarning, match="no pixel of any band is valid"):
        make(variance=0.0)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_fluxes_that_single_precision_cannot_weigh_are_refused(scale):
    with pytest.raises(InputError, match=r"variance must lie between .* in band 'r'.*rescale"):
        make(images=np.ones(SHAPE) * scale, variance=np.ones(SHAPE) * scale**2)


@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e18])
def test_weights_stay_finite_wherever_a_pixel_is_valid(scale):
    coadd = make(images=np.ones(SHAPE) * scale, variance=np.ones(SHAPE) * scale**2)
    blend = cut_blend(coadd, Box(0, 0, 6, 8), np.array([[2, 2]]))
    assert coadd.valid.all()
    assert np.isfinite(blend.weights).all()
    assert (blend.weights > 0).all()


@pytest.mark.parametrize("odd", [1e-60, 1e60])
def test_a_few_pixels_beyond_single_precision_are_not_valid(odd):
    variance = np.ones(SHAPE)
    variance[0, 0, :2] = odd
    coadd = make(variance=variance)
    assert np.argwhere(~coadd.valid).tolist() == [[0, 0, 0], [0, 0, 1]]


# ---------------------------------------------------------------- masks


def test_only_bad_planes_take_pixels_away():
    mask = np.zeros((6, 8), dtype=">i4")
    mask[0, 0], mask[1, 1] = 1 << 5, 1 << 3
    coadd = make(mask=mask, mask_planes={"SAT": 5, "DETECTED": 3})
    assert np.argwhere(~coadd.valid).tolist() == [[0, 0, 0], [1, 0, 0]]


def test_each_band_may_have_its_own_mask():
    mask = np.zeros(SHAPE, dtype=np.uint8)
    mask[1, 4, 4] = 1
    coadd = make(mask=mask, mask_planes={"NO_DATA": 0})
    assert np.argwhere(~coadd.valid).tolist() == [[1, 4, 4]]


def test_bad_planes_are_the_callers_choice():
    mask = np.ones((6, 8), dtype=int)
    planes = {"SAT": 0, "MINE": 1}
    assert make(mask=mask, mask_planes=planes, bad_planes=("MINE",)).valid.all()


@pytest.mark.parametrize(("highest", "dtype"), [(0, "u1"), (7, "u1"), (8, "u2"), (31, "i4"), (40, "i8")])
def test_a_mask_is_kept_in_the_smallest_integers_that_hold_its_planes(highest, dtype):
    # Of four or eight bytes, as files have them; bits without a name go.
    given = np.zeros((6, 8), dtype=np.int32 if highest < 32 else np.int64)
    given[1, 2] = np.array(1 << highest).astype(given.dtype)
    given[3, 3] = 1 << 5 | 1 << 30
    planes = {"BAD": highest, "DETECTED": 0 if highest else 1}
    coadd = make(mask=given, mask_planes=planes)
    assert coadd.mask.dtype == np.dtype(dtype)
    assert not coadd.valid[:, 1, 2].any()
    assert coadd.valid[:, 3, 3].all()
    for bit in planes.values():
        np.testing.assert_array_equal(coadd.mask[0] >> bit & 1, given >> bit & 1)


def test_high_bits_of_a_mask_are_kept():
    mask = np.zeros((6, 8), dtype=np.int64)
    mask[2, 2] = 1 << 40
    assert not make(mask=mask, mask_planes={"BAD": 40}).valid[:, 2, 2].any()


def test_sign_bit_of_a_mask_is_a_plane_like_others():
    mask = np.zeros((6, 8), dtype=np.int32)
    mask[2, 2] = -(1 << 31)
    coadd = make(mask=mask, mask_planes={"BAD": 31})
    assert np.argwhere(~coadd.valid[0]).tolist() == [[2, 2]]


@pytest.mark.parametrize("plane", ["BAD", "NO_DATA", "SAT", "SATURATED", "SUSPECT", "EDGE", "DETECTION_EDGE"])
@pytest.mark.filterwarnings("ignore:.*no pixel of any band is valid:kermes.errors.DataWarning")
def test_pixels_that_hold_no_light_of_the_sky_are_not_used(plane):
    assert not make(mask=np.ones((6, 8), dtype=int), mask_planes={plane: 0}).valid.any()


@pytest.mark.parametrize("plane", ["INTRP", "INTERPOLATED", "CR", "COSMIC_RAY", "STREAK", "CLIPPED", "REJECTED",
                                   "INEXACT_PSF", "SENSOR_EDGE", "DETECTED", "NOT_DEBLENDED"])  # fmt: skip
def test_pixels_whose_light_is_estimated_are_used(plane):
    assert make(mask=np.ones((6, 8), dtype=int), mask_planes={plane: 0}).valid.all()


def test_planes_near_a_position_are_named_whatever_the_band_and_the_spelling():
    mask = np.zeros(SHAPE, dtype=np.int16)
    mask[0, 0, 0], mask[1, 4, 5] = 1 << 2, 1 << 7 | 1 << 3
    coadd = make(mask=mask, mask_planes={"SATURATED": 2, "INTRP": 7, "REJECTED": 3, "DETECTED": 4})
    found = planes_at(coadd, y=[0, 1.4, 1.6, 5, 3, 2], x=[0, 1, 1, 6, 4, 5])
    assert found["saturated"].tolist() == [True, True, False, False, False, False]
    assert found["interpolated"].tolist() == [False, False, False, True, True, False]
    np.testing.assert_array_equal(found["clipped"], found["interpolated"])
    assert not any(found[name].any() for name in found if name not in ("saturated", "interpolated", "clipped"))


def test_outside_the_image_only_its_edge_is_near():
    coadd = make(mask=np.ones((6, 8), dtype=np.int8), mask_planes={"SAT": 0}, bad_planes=())
    found = planes_at(coadd, y=[-1, -2, 6, 7, np.nan, 1e30], x=[3, 3, 8, 3, 3, 3])
    assert found["saturated"].tolist() == [True, False, True, False, False, False]


@pytest.mark.parametrize(
    "options", [{}, {"mask": np.ones((6, 8), dtype=bool)}, {"mask": np.ones((6, 8), dtype=int), "mask_planes": {}}]
)
@pytest.mark.filterwarnings("ignore:.*no pixel of any band is valid:kermes.errors.DataWarning")
def test_without_named_planes_none_is_set(options):
    found = planes_at(make(**options), y=[2, 3], x=[2, 3])
    assert "saturated" in found
    assert not np.any(list(found.values()))


def test_planes_of_no_position_are_an_empty_array():
    assert planes_at(make(), y=[], x=[])["suspect"].shape == (0,)


def test_true_in_a_boolean_mask_is_a_pixel_not_to_use():
    mask = np.zeros((6, 8), dtype=bool)
    mask[3, 3] = True
    coadd = make(mask=mask)
    assert np.argwhere(~coadd.valid).tolist() == [[0, 3, 3], [1, 3, 3]]
    assert coadd.mask_planes == {"BAD": 0}


def test_mask_without_names_of_planes_warns_and_is_not_used():
    with pytest.warns(DataWarning, match="mask is not used, because mask_planes does not name its bits"):
        coadd = make(mask=np.ones((6, 8), dtype=int))
    assert coadd.valid.all()


def test_empty_mask_planes_say_that_no_name_is_known():
    assert make(mask=np.ones((6, 8), dtype=int), mask_planes={}).valid.all()


def test_a_bad_plane_that_no_mask_has_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="kermes.coadd"):
        make(mask=np.ones((6, 8), dtype=int), mask_planes={"SAT": 0}, bad_planes=("SATRUATED",))
    assert "no mask plane is called SATRUATED; there are SAT" in caplog.text


# ---------------------------------------------------------------- PSF


def test_psf_is_made_to_sum_to_one_with_odd_sides():
    stamp = np.zeros((4, 6))
    stamp[2, 3] = 30.0
    coadd = make(psfs=np.stack([stamp, stamp]))
    assert coadd.psfs.shape == (2, 5, 7)
    assert coadd.psfs[:, 2, 3].tolist() == [1.0, 1.0]


def test_psf_of_sum_one_keeps_its_bits():
    stamp = normalized_psf(np.random.default_rng(2).uniform(size=(21, 21)), "g")
    np.testing.assert_array_equal(normalized_psf(stamp, "g"), stamp)


def test_pixels_of_a_psf_that_are_not_finite_count_as_zero():
    stamp = np.ones((3, 3), dtype=">f4")
    stamp[0, 0] = np.nan
    np.testing.assert_allclose(normalized_psf(stamp, "g")[0], [0, 1 / 8, 1 / 8], rtol=1e-15)


def test_psfs_of_different_sides_share_their_central_pixel():
    stack = stack_psfs([np.pad([[1.0]], 1), np.pad([[1.0]], ((2, 2), (3, 3)))])
    assert stack.shape == (2, 5, 7)
    assert stack[:, 2, 3].tolist() == [1.0, 1.0]


def test_odd_sides_stay_as_they_are():
    stamp = np.random.default_rng(0).uniform(size=(2, 5, 7))
    np.testing.assert_array_equal(odd_sided(stamp), stamp)


def test_a_psf_field_is_asked_in_the_coadds_coordinates():
    asked = []

    def field(y, x, band):
        asked.append((y, x, band))
        return np.full((4, 4), 2.0)

    coadd = make(psfs=field, origin=(100, 200))
    blend = cut_blend(coadd, Box(1, 2, 3, 5), np.array([[2, 3]]))
    assert asked == [(102.0, 204.0, "r"), (102.0, 204.0, "g")]
    np.testing.assert_allclose(blend.psfs.sum(axis=(1, 2)), 1.0, rtol=1e-14)


# ---------------------------------------------------------------- units and sky


def test_images_keep_the_unit_they_carry():
    coadd = make(images=np.ones(SHAPE) * units.uJy, variance=np.ones(SHAPE) * units.nJy**2)
    assert coadd.unit == units.uJy
    np.testing.assert_allclose(coadd.variance, 1e-6, rtol=1e-6)


def test_images_are_converted_to_the_unit_asked_for():
    coadd = make(images=np.ones(SHAPE) * units.uJy, variance=np.ones(SHAPE) * units.uJy**2, unit="nJy")
    np.testing.assert_array_equal(coadd.images, 1000.0)
    np.testing.assert_array_equal(coadd.variance, 1e6)


def test_bands_in_different_units_come_out_in_one():
    coadd = make(images=[np.ones((6, 8)) * units.nJy, np.ones((6, 8)) * units.uJy])
    assert coadd.images[:, 0, 0].tolist() == [1.0, 1000.0]


@pytest.mark.parametrize(("unit", "zero_point"), [("nJy", 31.4), ("Jy", 8.9), ("nanomaggy", 22.5), ("adu", None)])
def test_zero_point_follows_from_the_unit_where_it_can(unit, zero_point):
    coadd = make(unit=unit)
    assert coadd.zero_point == (None if zero_point is None else pytest.approx(zero_point, abs=1e-9))


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("nanomaggies", units.nmgy),
        ("NJY", units.nJy),
        ("microJy", units.uJy),
        ("ADU", units.adu),
        ("counts/s", units.ct / units.s),
        ("1/nanomaggies^2", units.nmgy**-2),
    ],
)
def test_spellings_that_files_use_are_understood(text, unit):
    assert parse_unit(text) == unit


def test_sky_is_that_of_the_wcs_at_the_pixel_without_the_origin():
    coadd = make(wcs=tangent_plane(), origin=(10, 20))
    ra, dec = coadd.sky(y=13.0, x=24.0)
    np.testing.assert_allclose([ra[0], dec[0]], [150.0, 2.0], rtol=1e-12)


def test_sky_without_wcs_is_nan():
    assert np.isnan(make().sky(y=[1, 2], x=[1, 2])).all()


# ---------------------------------------------------------------- peaks


@pytest.mark.parametrize(
    "peaks",
    [
        np.array([[12, 25], [10, 20]]),
        [(12, 25), (10, 20)],
        np.array([[12.4, 24.6], [9.5, 20.49]]),
        Table({"y": [12, 10], "x": [25, 20], "name": ["a", "b"]}),
        {"x": [25, 20], "y": [12, 10]},
        np.array([(25.0, 12.0), (20.0, 10.0)], dtype=[("x", ">f8"), ("y", ">f8")]),
    ],
    ids=["integers", "list", "between pixels", "table", "mapping", "structured"],
)
def test_peaks_of_every_form_become_the_same_array_index(peaks):
    assert normalize_peaks(peaks, make(origin=(10, 20))).tolist() == [[2, 5], [0, 0]]


@pytest.mark.parametrize("form", ["SkyCoord", "Table", "QTable"])
def test_sky_positions_become_the_pixel_they_fall_on(form):
    coadd = make(wcs=tangent_plane(), origin=(10, 20))
    ra, dec = coadd.sky(y=[11, 15], x=[27, 20])
    peaks = {
        "SkyCoord": SkyCoord(ra, dec, unit="deg").galactic,
        "Table": Table({"ra": ra, "dec": dec}),
        "QTable": QTable({"ra": (ra * units.deg).to("rad"), "dec": dec * units.deg}),
    }[form]
    assert normalize_peaks(peaks, coadd).tolist() == [[1, 7], [5, 0]]


@pytest.mark.parametrize("empty", [[], np.zeros((0, 2)), Table({"y": [], "x": []})], ids=["list", "array", "table"])
def test_no_peaks_are_no_rows(empty):
    assert normalize_peaks(empty, make()).shape == (0, 2)


def test_duplicate_peaks_are_kept():
    assert len(normalize_peaks([(1, 1), (1, 1)], make())) == 2


def test_peaks_stored_with_a_coadd_are_in_its_coordinates():
    assert make(origin=(10, 20), peaks=[(12.2, 25.1)]).peaks.tolist() == [[12, 25]]


@pytest.mark.parametrize(
    ("peaks", "error", "message"),
    [
        ([(2, 5), (6, 5)], InputError, r"inside the image, 0 <= y < 6 and 0 <= x < 8; peak 1 is at y = 6, x = 5"),
        ([(-0.6, 5)], InputError, "peak 0 is at y = -0.6, x = 5"),
        ([(2, 5), (np.nan, 5)], InputError, "peaks must be finite; peak 1 is at y = nan, x = 5"),
        (np.ma.masked_array([[1, 2]], mask=[[True, False]]), InputError, "peaks must be finite; peak 0"),
        ([1, 2, 3], ShapeError, r"peaks must have shape \(N, 2\).*got \(3,\)"),
        ([(1, 2), (3,)], ShapeError, "peaks must have rows of one length"),
        ([("a", "b")], InputError, "peaks must be numbers"),
        (Table({"row": [1], "column": [2]}), InputError, "columns y and x, or ra and dec; got row, column"),
        (SkyCoord([150.0], [2.0], unit="deg"), InputError, "has no WCS"),
    ],
)
def test_peaks_that_cannot_be_used_are_refused(peaks, error, message):
    with pytest.raises(error, match=message):
        normalize_peaks(peaks, make())


# ---------------------------------------------------------------- cut-outs


def test_cutout_keeps_pixels_peaks_and_sky_in_place():
    mask = np.zeros((6, 8), dtype=int)
    mask[3, 4] = 1
    coadd = make(
        wcs=tangent_plane(),
        origin=(10, 20),
        mask=mask,
        mask_planes={"SAT": 0},
        peaks=[(11, 21), (13, 24)],
        footprints=np.ones((6, 8), dtype=int),
    )
    part = coadd.cutout(Box(12, 23, 3, 100))
    assert part.box == Box(12, 23, 3, 5)
    np.testing.assert_array_equal(part.images, coadd.images[:, 2:5, 3:8])
    np.testing.assert_array_equal(part.valid, coadd.valid[:, 2:5, 3:8])
    assert part.footprints.shape == part.mask.shape[1:] == part.shape
    assert part.peaks.tolist() == [[13, 24]]
    np.testing.assert_allclose(part.sky(y=13, x=25), coadd.sky(y=13, x=25), rtol=1e-13)


def test_cutout_outside_the_image_is_refused():
    with pytest.raises(InputError, match="box must share pixels with the image"):
        make().cutout(Box(50, 50, 3, 3))


def test_blend_has_no_weight_and_no_flux_where_a_pixel_is_not_used():
    images = np.ones(SHAPE)
    images[0, 1, 1] = np.nan
    usable = np.ones((6, 8), dtype=bool)
    usable[2, 2] = False
    blend = cut_blend(make(images=images), Box(0, 0, 6, 8), np.zeros((0, 2)), usable)
    unused = np.argwhere(blend.weights == 0).tolist()
    assert unused == [[0, 1, 1], [0, 2, 2], [1, 2, 2]]
    assert not blend.images[blend.weights == 0].any()


def test_noise_of_a_band_without_a_valid_pixel_is_nan():
    blend = cut_blend(make(variance=[4.0, np.nan]), Box(0, 0, 6, 8), np.zeros((0, 2)))
    assert blend.noise_rms[0] == 2.0
    assert np.isnan(blend.noise_rms[1])


# ---------------------------------------------------------------- the value type


def test_a_coadd_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().unit = units.nJy


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda coadd: pickle.loads(pickle.dumps(coadd))])
def test_a_copy_has_the_same_pixels(copied):
    coadd = make(mask=np.zeros((6, 8), dtype=bool), wcs=tangent_plane(), peaks=[(1, 1)])
    np.testing.assert_array_equal(copied(coadd).images, coadd.images)


def test_replacing_one_field_keeps_the_others():
    mask = np.zeros((6, 8), dtype=bool)
    mask[0, 0] = True
    coadd = make(mask=mask, bad_planes=("SAT",), unit="nJy", peaks=[(1, 1)], origin=(1, 1))
    again = dataclasses.replace(coadd, name="again")
    np.testing.assert_array_equal(again.valid, coadd.valid)
    np.testing.assert_array_equal(again.psfs, coadd.psfs)
    assert again.peaks.tolist() == coadd.peaks.tolist()


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"bands": ("g", "g")}, InputError, "bands must be different names"),
        ({"bands": ()}, InputError, "bands must be different names, at least one"),
        ({"bands": None}, InputError, "bands must be different names"),
        ({"images": np.ones((3, 6, 8))}, ShapeError, r"images must have shape .* with 2 for .*got \(3, 6, 8\)"),
        ({"images": np.ones((6, 8))}, ShapeError, r"images must have shape .* with 2 for .*got \(6, 8\)"),
        ({"images": np.ones((2, 0, 8))}, ShapeError, "images must have shape"),
        ({"images": [np.ones((6, 8)), np.ones((5, 8))]}, ShapeError, r"one shape in all bands; band 'g' has \(5, 8\)"),
        ({"images": None}, InputError, "images must be given"),
        ({"images": np.full(SHAPE, "a")}, InputError, "images of band 'r' must be numbers"),
        ({"images": np.ones(SHAPE, dtype=complex)}, InputError, "images of band 'r' must be numbers"),
        ({"variance": None}, InputError, "variance must be given for bands"),
        ({"variance": np.ones((2, 6, 7))}, ShapeError, r"variance must have the shape of the image \(6, 8\)"),
        ({"variance": np.ones(3)}, ShapeError, "variance must have shape"),
        ({"psfs": None}, InputError, "psfs must be given: one stamp per band"),
        ({"psfs": np.ones((3, 5, 5))}, ShapeError, "psfs must hold one stamp per band: 2 for .*got 3"),
        ({"psfs": np.ones((2, 5))}, ShapeError, r"psfs must be one stamp .*band 'r' has shape \(5,\)"),
        (
            {"psfs": [np.ones((3, 3)), np.zeros((3, 3))]},
            InputError,
            "psfs must have a positive sum; band 'g' sums to 0",
        ),
        ({"psfs": [np.ones((3, 3)), np.full((3, 3), np.nan)]}, InputError, "positive sum; band 'g'"),
        ({"psfs": 3.0}, InputError, "psfs must be one stamp per band, or a callable .*got float"),
        ({"mask": np.zeros((6, 7), int), "mask_planes": {}}, ShapeError, r"mask must have shape .*got \(6, 7\)"),
        ({"mask": np.zeros((6, 8)), "mask_planes": {}}, InputError, "mask must be integers or booleans, got dtype"),
        ({"mask_planes": {"SAT": 99}}, InputError, "bit numbers from 0 to 62, got 99 for 'SAT'"),
        ({"mask_planes": ["SAT"]}, InputError, "mask_planes must map names to bit numbers, got list"),
        ({"unit": "parsnip"}, InputError, "unit must be a unit known to astropy, got 'parsnip'"),
        (
            {"images": np.ones(SHAPE) * units.nJy, "unit": "adu"},
            InputError,
            "images of band 'r' must be in adu, got nJy",
        ),
        ({"variance": np.ones(SHAPE) * units.nJy**2}, InputError, "unit must be given: variance is in nJy2"),
        ({"unit": "nJy", "zero_point": 27.0}, InputError, "zero_point must be 31.4 for images in nJy, got 27"),
        ({"zero_point": np.nan}, InputError, "zero_point must be an AB magnitude"),
        ({"noise_factors": [1.0] * 3}, ShapeError, r"noise_factors must be one number, or one for each of the 2 bands"),
        ({"noise_factors": [1.0, 0.0]}, InputError, r"noise_factors must be positive and finite, got \[1.0, 0.0\]"),
        ({"origin": (0.5, 0)}, InputError, "origin must be two whole numbers"),
        ({"origin": 3}, InputError, "origin must be two whole numbers"),
        ({"wcs": "TAN"}, InputError, "wcs must be an astropy WCS of two pixel axes on the sky, got 'TAN'"),
        ({"wcs": WCS(naxis=2)}, InputError, "wcs must be an astropy WCS of two pixel axes on the sky"),
        ({"peaks": [(9, 9)]}, InputError, "peaks must lie inside the image"),
        ({"footprints": np.ones((6, 7), int)}, ShapeError, "footprints must have the shape of the image"),
        ({"footprints": np.full((6, 8), -1)}, InputError, "footprints must be labels"),
        ({"footprints": np.ones((6, 8))}, InputError, "footprints must be labels"),
    ],
)
def test_bad_input_gets_one_line_that_names_the_argument(changes, error, message):
    with pytest.raises(error, match=message) as caught:
        make(**changes)
    assert "\n" not in str(caught.value)


def test_missing_psfs_get_our_message():
    with pytest.raises(InputError, match="psfs must be given"):
        Coadd(images=np.ones((6, 8)), variance=1.0, bands="g")


def test_cells_are_evaluated_in_the_order_of_the_bands():
    stamps = np.stack([model_psf(1.0), model_psf(1.4)])[None, None]
    psf = CellPsf(stamps=stamps, bands=("g", "r"), cell_shape=(9, 9))
    coadd = Coadd(images=np.ones((2, 9, 9)), variance=1.0, psfs=psf, bands=("r", "g"))
    np.testing.assert_allclose(coadd.psf_at(y=4, x=4), stamps[0, 0, ::-1], rtol=1e-14)


def test_cells_without_a_band_of_the_coadd_are_refused():
    psf = CellPsf(stamps=model_psf(1.0)[None, None, None], bands=("g",), cell_shape=(9, 9))
    with pytest.raises(InputError, match="psfs must have the bands"):
        Coadd(images=np.ones((1, 9, 9)), variance=1.0, psfs=psf, bands=("r",))
