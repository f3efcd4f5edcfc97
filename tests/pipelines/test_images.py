"""Images of lsst.images become the coadds that their files become."""

import astropy.units as u
import numpy as np
import pytest
from lsst.images import Box as LsstBox
from lsst.images import Image, Mask, MaskedImage
from lsst.images.serialization import read_archive, write_archive

from cell_coadds import CELL, cell_coadds, simulated_sky
from kermes import io
from kermes.errors import InputError, ShapeError
from kermes.geometry import Box
from kermes.lsst.images import box_of, coadd_of_images, has_data, in_order
from kermes.lsst.repository import visit_image
from kermes.psf import CellPsf


@pytest.fixture(scope="module")
def sky():
    return simulated_sky()


def assert_same(one, other):
    assert (one.bands, one.origin, one.unit, one.zero_point) == (
        other.bands,
        other.origin,
        other.unit,
        other.zero_point,
    )
    for name in ("images", "variance", "valid"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    np.testing.assert_array_equal(one.mask, other.mask)
    np.testing.assert_array_equal(one.psfs.stamps, other.psfs.stamps)
    np.testing.assert_array_equal(one.psfs.lender, other.psfs.lender)
    assert one.psfs.origin == other.psfs.origin
    y, x = np.meshgrid([one.origin[0], one.box.y1], [one.origin[1] + 0.3, one.box.x1])
    np.testing.assert_array_equal(one.sky(y=y.ravel(), x=x.ravel()), other.sky(y=y.ravel(), x=x.ravel()))


@pytest.mark.parametrize("empty", [None, Box(30, 60, 30, 30), Box(0, 0, 65, 150)])
def test_file_and_memory_are_the_same_to_the_bit(sky, tmp_path, empty):
    made = cell_coadds(sky, empty=empty)
    for band, image in made.items():
        write_archive(image, str(tmp_path / f"{band}.fits"))
    files = [tmp_path / f"{band}.fits" for band in made]
    assert_same(coadd_of_images(made.values()), io.read(files))
    # What lsst.images reads back is what was written, and so is a part of it but for the cells around.
    again = {band: read_archive(str(file)) for band, file in zip(made, files, strict=True)}
    assert_same(coadd_of_images(again), io.read(files))
    box = LsstBox.factory[60:115, 61:150]
    part = coadd_of_images([read_archive(str(file), bbox=box) for file in files])
    expected = io.read(files, box=box_of(box))
    np.testing.assert_array_equal(part.images, expected.images)
    np.testing.assert_allclose(part.sky(y=70, x=70), expected.sky(y=70, x=70), rtol=0, atol=1e-12)
    np.testing.assert_array_equal(part.psf_at(y=100, x=100), expected.psf_at(y=100, x=100))


def test_pixels_and_sky_are_those_of_the_sky(sky):
    coadd = coadd_of_images(cell_coadds(sky, box=Box(30, 30, 90, 120)).values(), name="patch")
    cut = sky.cutout(Box(30, 30, 90, 120))
    np.testing.assert_array_equal(coadd.images, cut.images)
    np.testing.assert_array_equal(coadd.valid, cut.valid)
    assert coadd.origin == (30, 30)
    np.testing.assert_allclose(coadd.sky(y=77.0, x=101.5), sky.sky(y=77.0, x=101.5), rtol=0, atol=1e-11)
    middle = coadd.psf_at(y=60 + CELL / 2 - 0.5, x=90 + CELL / 2 - 0.5)
    np.testing.assert_allclose(middle, sky.psf_at(y=60 + CELL / 2 - 0.5, x=90 + CELL / 2 - 0.5), atol=1e-12)


def test_bands_are_chosen_and_one_without_an_image_has_nothing(sky):
    coadd = coadd_of_images(cell_coadds(sky, "ri"), bands=["i", "g", "r"])
    assert coadd.bands == ("i", "g", "r")
    assert not coadd.valid[1].any()
    assert coadd.valid[0].any()
    assert not coadd.psf_at(y=60, x=60)[1].any()
    np.testing.assert_array_equal(coadd.images[2], sky.images[1])


def test_units_are_brought_together(sky):
    made = cell_coadds(sky, "gr")
    image = made["r"]
    micro = MaskedImage(
        Image(image.image.array / 1000, bbox=image.bbox, unit=u.uJy, sky_projection=image.sky_projection),
        mask=image.mask,
        variance=Image(image.variance.array / 1e6, bbox=image.bbox, unit=u.uJy**2),
    )
    stamps = np.ones((2, 3, 3))
    coadd = coadd_of_images({"g": made["g"], "r": micro}, psfs=stamps)
    np.testing.assert_allclose(coadd.images[1], sky.images[1], rtol=1e-6)
    np.testing.assert_allclose(coadd.variance[1], sky.variance[1], rtol=1e-5)
    counts = MaskedImage(
        Image(image.image.array, bbox=image.bbox, unit=u.adu, sky_projection=image.sky_projection),
        mask=image.mask,
        variance=Image(image.variance.array, bbox=image.bbox, unit=u.adu**2),
    )
    with pytest.raises(InputError, match="unit must be the same in all bands; band 'r' has adu, not nJy"):
        coadd_of_images({"g": made["g"], "r": counts}, psfs=stamps)


def test_masks_of_other_planes_get_common_bits(sky):
    made = cell_coadds(sky, "gr")
    image = made["r"]
    from lsst.images import MaskPlane, MaskSchema

    mask = Mask(0, schema=MaskSchema([MaskPlane("SATURATED", ""), None, MaskPlane("NO_DATA", "")]), bbox=image.bbox)
    where = np.zeros(sky.shape, dtype=bool)
    where[5, 6] = True
    mask.set("SATURATED", where)
    other = MaskedImage(image.image, mask=mask, variance=image.variance)
    coadd = coadd_of_images({"g": made["g"], "r": other}, psfs=np.ones((2, 3, 3)))
    assert not coadd.valid[1, 5, 6]
    assert {"SAT", "SATURATED", "NO_DATA"} <= set(coadd.mask_planes)
    assert ((coadd.mask[1] >> coadd.mask_planes["SATURATED"]) & 1).sum() == 1


def test_psf_that_is_not_of_cells_is_drawn_in_cells(sky):
    visit = visit_image(sky, "r", instrument="Cam", visit=7, physical_filter="Cam-r")
    coadd = coadd_of_images([visit])
    assert coadd.bands == ("r",)
    assert isinstance(coadd.psfs, CellPsf)
    expected = visit.psf.compute_kernel_image(x=60, y=60).array
    np.testing.assert_allclose(coadd.psf_at(y=60, x=60)[0], expected / expected.sum(), rtol=1e-12)
    np.testing.assert_allclose(coadd.sky(y=33.0, x=44.0), sky.sky(y=33.0, x=44.0), rtol=0, atol=1e-9)


def test_what_has_no_data_is_known(sky):
    made = cell_coadds(sky, "g")["g"]
    assert has_data(made)
    assert not has_data(cell_coadds(sky, "g", empty=sky.box)["g"])
    nothing = MaskedImage(made.image, mask=made.mask, variance=Image(made.variance.array * np.inf, bbox=made.bbox))
    assert not np.isfinite(nothing.variance.array).any()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (lambda made: [], InputError, "images must be at least one, got none"),
        (lambda made: [made["g"], made["g"]], InputError, "images must be of different bands; two are of 'g'"),
        (
            lambda made: [MaskedImage(made["g"].image, mask=made["g"].mask, variance=made["g"].variance)],
            InputError,
            "images must map the name of each band to an image, because a MaskedImage does not name its band",
        ),
        (
            lambda made: {"g": MaskedImage(made["g"].image, mask=made["g"].mask, variance=made["g"].variance)},
            InputError,
            "psfs must be given, because the MaskedImage of band 'g' has none",
        ),
        (
            lambda made: [made["g"], made["r"][LsstBox.factory[30:90, 30:120]]],
            ShapeError,
            r"images must lie on one pixel grid: band 'r' has Box\(y0=30, x0=30, height=60, width=90\), band 'g' has",
        ),
    ],
)
def test_images_that_do_not_belong_together_are_refused(sky, given, error, message):
    with pytest.raises(error, match=message):
        coadd_of_images(given(cell_coadds(sky, "gr")))


def test_bands_are_sorted_by_wavelength():
    assert in_order(["y", "i", "u", "HSC-R", "g"]) == ["u", "g", "HSC-R", "i", "y"]
    assert in_order(["z", "strange", "g"]) == ["g", "strange", "z"]
