"""Files in, coadds out; scenes of ours there and back."""

import logging
from pathlib import Path

import numpy as np
import pytest
from astropy import units
from astropy.io import fits
from astropy.wcs import WCS

from kermes import io
from kermes.coadd import Coadd
from kermes.errors import DataWarning, FileError, InputError, KermesError, ShapeError

HEIGHT, WIDTH = 24, 30


def header(**cards):
    """Header of an image on a tangent plane, with further cards."""
    made = fits.Header()
    made["CTYPE1"], made["CTYPE2"] = "RA---TAN", "DEC--TAN"
    made["CRVAL1"], made["CRVAL2"] = 150.0, 2.0
    made["CRPIX1"], made["CRPIX2"] = 10.0, 12.0
    made["CD1_1"], made["CD2_2"] = -5e-5, 5e-5
    for card, value in cards.items():
        made[card if len(card) <= 8 else f"HIERARCH {card}"] = value
    return made


def pixels(seed=0, dtype=">f4"):
    return np.random.default_rng(seed).normal(size=(HEIGHT, WIDTH)).astype(dtype)


def write(path, *planes, names=None):
    """Write planes (data, header) as extensions after an empty primary HDU."""
    hdus = [
        fits.ImageHDU(data, head, name=name)
        for (data, head), name in zip(planes, names or [None] * len(planes), strict=True)
    ]
    fits.HDUList([fits.PrimaryHDU(), *hdus]).writeto(path)
    return str(path)


@pytest.fixture
def field(tmp_path):
    """Files of two bands, as arguments of read_fits."""
    psf = write(tmp_path / "psf.fits", (np.ones((5, 5)), None), (np.ones((7, 7)), None))
    files = {"images": {}, "variance": {}, "psf": {"r": f"{psf}[2]", "g": psf}}
    for seed, band in enumerate("rg"):
        path = write(
            tmp_path / f"{band}.fits",
            (pixels(seed), header()),
            (np.full((HEIGHT, WIDTH), 4.0), header()),
            names=["SCI", "VAR"],
        )
        files["images"][band] = f"{path}[SCI]"
        files["variance"][band] = f"{path}[2]"
    return files


def image(tmp_path, data=None, **cards):
    """File of one image with these cards."""
    path = tmp_path / f"one{len(list(tmp_path.iterdir()))}.fits"
    return write(path, (pixels() if data is None else data, header(**cards)))


def one_band(file, field, **options):
    """Read one file as the image of band r."""
    arguments = {"variance": {"r": field["variance"]["r"]}, "psf": {"r": field["psf"]["r"]}, **options}
    return io.read_fits({"r": file}, **arguments)


# ---------------------------------------------------------------- archives


def test_hsc_archive_brings_its_bands_and_peaks(shared):
    coadd = io.read(shared / "data/hsc_cosmos/hsc_cosmos_35.npz")
    assert coadd.bands == tuple("grizy")
    assert coadd.images.shape == (5, 58, 48)
    assert len(coadd.peaks) == 7
    assert coadd.valid.all()
    with np.load(shared / "data/hsc_cosmos/hsc_cosmos_35.npz") as archive:
        np.testing.assert_array_equal(coadd.peaks, np.stack([archive["catalog"]["y"], archive["catalog"]["x"]], axis=1))


def test_footprint_of_the_hsc_fakes_is_true_outside(shared, caplog):
    path = min((shared / "data/hsc_fakes/set1").glob("*.npz"))
    with caplog.at_level(logging.INFO, logger="kermes.io"):
        coadd = io.read(path)
    with np.load(path) as archive:
        np.testing.assert_array_equal(coadd.footprints, ~archive["footprint"])
        np.testing.assert_array_equal(coadd.peaks, archive["centers"])
    assert coadd.footprints[tuple(coadd.peaks.T)].all()
    assert coadd.bands == ("b0", "b1", "b2", "b3", "b4")
    assert "no names of bands; they are called b0" in caplog.text
    assert "mask is not used" in caplog.text


def test_bands_given_name_the_bands_of_a_file_without_names(shared):
    path = min((shared / "data/hsc_fakes/set1").glob("*.npz"))
    assert io.read(path, bands=["g", "r", "i", "z", "y"]).bands == tuple("grizy")


def test_arena_scene_brings_its_peaks(shared):
    coadd = io.read(shared / "arena/scenes/pair_0000.npz")
    assert coadd.bands == tuple("ugrizy")
    assert len(coadd.peaks) > 1


def scene(**changes):
    rng = np.random.default_rng(5)
    images = rng.normal(size=(2, HEIGHT, WIDTH))
    images[0, 0, 0] = np.nan
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.int64)
    mask[3, 3] = 1 << 40
    wcs = WCS(header())
    wcs.wcs.crval = [150.0 + 1 / 3, 2 / 7]
    arguments = {
        "images": images,
        "variance": rng.uniform(1, 2, size=images.shape),
        "psfs": rng.uniform(size=(2, 7, 7)),
        "bands": ("r", "g"),
        "mask": mask,
        "mask_planes": {"MINE": 40, "SAT": 2},
        "bad_planes": ("MINE",),
        "wcs": wcs,
        "origin": (1000, -7),
        "unit": "nJy",
        "peaks": [(1003, -2), (1010, 5)],
        "footprints": np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH),
    }
    return Coadd(**(arguments | changes))


def test_a_scene_comes_back_as_it_was_written(tmp_path):
    coadd = scene()
    io.write_npz(tmp_path / "scene.npz", coadd, flux=np.ones((2, 2)))
    again = io.read(tmp_path / "scene.npz")
    for name in ("images", "variance", "valid", "psfs", "mask", "peaks", "footprints"):
        np.testing.assert_array_equal(getattr(again, name), getattr(coadd, name), err_msg=name)
    for name in ("bands", "mask_planes", "bad_planes", "origin", "unit", "zero_point"):
        assert getattr(again, name) == getattr(coadd, name)
    np.testing.assert_array_equal(again.wcs.wcs.crval, coadd.wcs.wcs.crval)
    assert again.sky(y=1003, x=2) == coadd.sky(y=1003, x=2)


def test_a_scene_without_extras_comes_back_as_it_was_written(tmp_path):
    coadd = Coadd(images=np.ones((1, 5, 5)), variance=1.0, psfs=np.ones((1, 3, 3)), bands=["i"])
    io.write_npz(tmp_path / "scene.npz", coadd)
    again = io.read(tmp_path / "scene.npz")
    assert again.mask is again.wcs is again.unit is again.zero_point is again.peaks is again.footprints is None


def test_truth_is_stored_beside_the_scene(tmp_path):
    io.write_npz(tmp_path / "scene.npz", scene(), peaks=[(1001, -7)], flux=[[1.0, 2.0]])
    with np.load(tmp_path / "scene.npz") as archive:
        assert archive["flux"].tolist() == [[1.0, 2.0]]
        assert archive["peaks"].tolist() == [[1001, -7]]


def test_writing_twice_gives_the_same_bytes(tmp_path):
    for name in ("a.npz", "b.npz"):
        io.write_npz(tmp_path / name, scene())
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "scene.npz"
    path.write_bytes(b"old")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(FileError, match=r"path must be a file that can be written, got .*No space left"):
        io.write_npz(path, scene())
    assert [p.name for p in tmp_path.iterdir()] == ["scene.npz"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("name", "changes", "truth", "message"),
    [
        ("scene.fits", {}, {}, "path must end in .npz"),
        ("scene.npz", {"psfs": lambda y, x, band: np.ones((3, 3))}, {}, "coadd must have PSF stamps"),
        ("scene.npz", {}, {"images": 1}, "truth must not use the names .* got images"),
        ("scene.npz", {}, {"kind": [None]}, "truth must be plain arrays, got dtype object for kind"),
        ("no/scene.npz", {}, {}, "path must be a file that can be written"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, name, changes, truth, message):
    with pytest.raises(KermesError, match=message):
        io.write_npz(tmp_path / name, scene(**changes), **truth)
    assert not list(tmp_path.iterdir())


def test_options_win_over_the_archive(tmp_path):
    io.write_npz(tmp_path / "scene.npz", scene(peaks=None))
    coadd = io.read(tmp_path / "scene.npz", bands=["i", "z"], origin=(0, 0), unit="adu", zero_point=27)
    assert (coadd.bands, coadd.origin, coadd.unit, coadd.zero_point) == (("i", "z"), (0, 0), units.adu, 27.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"psfs": None}, "source must hold images, variance and psfs; psfs missing"),
        ({"images": np.ones((3, 9, 9))}, "images must have shape"),
        ({"peaks": [[99, 99]]}, "peaks must lie inside the image"),
        ({"mask": np.zeros((9, 9), int), "mask_planes": "SAT"}, "mask_planes must be a JSON object"),
        ({"wcs": "no header"}, "wcs must be an astropy WCS of two pixel axes on the sky"),
        ({"footprint": np.ones((9, 9), int)}, "footprint must be boolean, True outside the parent"),
    ],
)
def test_unusable_archive_gets_one_line_with_its_name(tmp_path, changes, message):
    path = tmp_path / "bad.npz"
    arrays = {
        "images": np.ones((2, 9, 9)),
        "variance": np.ones((2, 9, 9)),
        "psfs": np.ones((2, 3, 3)),
        "bands": ["g", "r"],
    }
    np.savez(path, **{key: value for key, value in (arrays | changes).items() if value is not None})
    with pytest.raises(InputError, match=message) as caught:
        io.read(path)
    assert "bad.npz" in str(caught.value)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- FITS


def test_bands_keep_the_order_given_in_fits(field):
    reverse = {band: field["images"][band] for band in reversed(field["images"])}
    first, second = io.read_fits(**field), io.read_fits(**{**field, "images": reverse})
    assert (first.bands, second.bands) == (("r", "g"), ("g", "r"))
    np.testing.assert_array_equal(first.images, second.images[::-1])
    np.testing.assert_array_equal(first.psfs, second.psfs[::-1])


def test_bands_option_chooses_and_orders(field):
    assert io.read_fits(**field, bands=["g"]).bands == ("g",)
    assert io.read_fits(**field, bands=["g", "r"]).bands == ("g", "r")


def test_pixels_are_those_of_the_file(field):
    coadd = io.read_fits(**field)
    np.testing.assert_array_equal(coadd.images, [pixels(0), pixels(1)])
    assert (coadd.variance == 4).all()


def test_psf_stamps_of_different_sides_are_padded(field):
    coadd = io.read_fits(**field)
    assert coadd.psfs.shape == (2, 7, 7)
    np.testing.assert_allclose(coadd.psfs[:, 3, 3], [1 / 49, 1 / 25], rtol=1e-14)


def test_decals_cutout_reads_with_inverse_variance_and_psfs(shared):
    folder = shared / "data/decals"
    image, psf = folder / "cutout_59.1067_-30.4848.fits", folder / "copsf_59.1067_-30.4848.fits"
    coadd = io.read(
        {"g": f"{image}[1]", "r": f"{image}[3]", "z": f"{image}[5]"},
        invvar={"g": f"{image}[2]", "r": f"{image}[4]", "z": f"{image}[6]"},
        psf={"g": f"{psf}[0]", "r": f"{psf}[1]", "z": f"{psf}[2]"},
    )
    assert coadd.images.shape == (3, 256, 256)
    assert coadd.psfs.shape == (3, 63, 63)
    # The noise seen in the sky is that of the inverse variance: 0.93 to 0.97 of it by the data's own README.
    scaled = coadd.images / np.sqrt(coadd.variance)
    widths = 1.4826 * np.median(np.abs(scaled - np.median(scaled, axis=(1, 2), keepdims=True)), axis=(1, 2))
    np.testing.assert_allclose(widths, [0.97, 0.97, 0.93], atol=0.05)
    ra, dec = coadd.sky(y=127.5, x=127.5)
    np.testing.assert_allclose([ra[0], dec[0]], [59.1067, -30.4848], atol=1e-4)


@pytest.mark.parametrize("reference", ["{}", "{}[0]", "{}[1]", "{}[0][0]"], ids=["bare", "no image", "number", "plane"])
def test_compressed_image_is_found_where_it_is(tmp_path, field, reference):
    path = tmp_path / "image.fits.fz"
    data = np.round(pixels() * 1000).astype(np.int32)
    fits.HDUList([fits.PrimaryHDU(), fits.CompImageHDU(data, header())]).writeto(path)
    if "[0]" in reference:
        with pytest.raises(InputError, match=r"image of band 'r' must name an HDU with an image.* in HDU 1"):
            one_band(reference.format(path), field)
    else:
        np.testing.assert_array_equal(one_band(reference.format(path), field).images[0], data)


@pytest.mark.parametrize("dtype", [">f8", ">f4", ">i2", ">i4", "u2", "u1"])
def test_every_pixel_type_of_fits_is_read(tmp_path, field, dtype):
    data = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(dtype)
    coadd = one_band(image(tmp_path, data), field)
    assert coadd.images.dtype.isnative
    np.testing.assert_array_equal(coadd.images[0], data)


def test_scaled_integers_are_read_as_the_numbers_they_stand_for(tmp_path, field):
    hdu = fits.ImageHDU(pixels(dtype="f4"), header())
    hdu.scale("int16", bzero=1.0, bscale=0.001)
    fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(tmp_path / "scaled.fits")
    coadd = one_band(str(tmp_path / "scaled.fits"), field)
    np.testing.assert_allclose(coadd.images[0], pixels(), atol=0.0005 + 1e-6)  # half a step


def test_plane_of_a_cube_is_picked_by_a_second_index(tmp_path, field):
    cube = np.random.default_rng(4).normal(size=(3, HEIGHT, WIDTH))
    fits.PrimaryHDU(cube).writeto(tmp_path / "cube.fits")
    coadd = one_band(f"{tmp_path}/cube.fits[0][2]", field)
    np.testing.assert_array_equal(coadd.images[0], cube[2].astype(np.float32))


def test_cube_without_an_index_says_how_to_pick(tmp_path, field):
    fits.PrimaryHDU(np.ones((3, HEIGHT, WIDTH))).writeto(tmp_path / "cube.fits")
    with pytest.raises(ShapeError, match=r"one image of a cube is picked by file.fits\[HDU\]\[plane\]"):
        one_band(f"{tmp_path}/cube.fits", field)


def test_extension_version_may_follow_the_name(tmp_path, field):
    first, second = (fits.ImageHDU(pixels(seed), header(), name="SCI", ver=seed) for seed in (1, 2))
    fits.HDUList([fits.PrimaryHDU(), first, second]).writeto(tmp_path / "two.fits")
    np.testing.assert_array_equal(one_band(f"{tmp_path}/two.fits[SCI,2]", field).images[0], pixels(2))


def test_file_whose_name_has_brackets_is_read(tmp_path, field):
    path = write(tmp_path / "g[1]", (pixels(), header()))
    np.testing.assert_array_equal(one_band(path, field).images[0], pixels())


def exposure(tmp_path, band, key="EXTNAME", noise="VARIANCE", **cards):
    """File with image, mask and noise of one band, as pipelines write it."""
    rng = np.random.default_rng(len(band))
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.int32)
    mask[2, 3] = 1 << 4
    planes = {"IMAGE": pixels(), "MASK": mask, noise: rng.uniform(1, 2, (HEIGHT, WIDTH)).astype(np.float32)}
    hdus = [fits.PrimaryHDU()]
    for name, data in planes.items():
        hdu = fits.ImageHDU(data, header(**{key: name, **cards}))
        if name == "MASK":
            hdu.header["MP_SAT"] = 4
        hdus.append(hdu)
    path = tmp_path / f"exposure-{band}.fits"
    fits.HDUList(hdus).writeto(path)
    return path, planes


@pytest.mark.parametrize("key", ["EXTNAME", "EXTTYPE"])
def test_an_exposure_brings_its_planes(tmp_path, field, key):
    files = {band: exposure(tmp_path, band, key)[0] for band in "gr"}
    coadd = io.read_fits(files, psf=dict.fromkeys("gr", field["psf"]["r"]))
    for b, band in enumerate("gr"):
        with fits.open(files[band]) as hdus:
            np.testing.assert_array_equal(coadd.images[b], hdus[1].data)
            np.testing.assert_array_equal(coadd.variance[b], hdus[3].data)
    assert coadd.mask_planes == {"SAT": 4}
    assert coadd.mask[0, 2, 3] == 16


def test_an_exposure_may_have_the_inverse_variance(tmp_path, field):
    path, planes = exposure(tmp_path, "r", noise="INVVAR")
    coadd = io.read_fits({"r": path}, psf={"r": field["psf"]["r"]})
    np.testing.assert_allclose(coadd.variance[0], 1 / planes["INVVAR"], rtol=1e-6)


def test_what_is_given_wins_over_the_exposure(tmp_path, field):
    path, _ = exposure(tmp_path, "r")
    coadd = one_band(path, field)
    np.testing.assert_array_equal(coadd.variance, one_band(image(tmp_path), field).variance)


def test_an_hdu_of_an_exposure_is_an_image_alone(tmp_path, field):
    path, _ = exposure(tmp_path, "r")
    with pytest.raises(InputError, match="variance or invvar must be given for every band"):
        io.read_fits({"r": f"{path}[1]"}, psf={"r": field["psf"]["r"]})
    damaged = tmp_path / "damaged.fits"
    damaged.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(KermesError):
        io.read_fits({"r": damaged}, psf={"r": field["psf"]["r"]})


def test_zero_or_missing_inverse_variance_is_not_valid(tmp_path, field):
    invvar = np.full((HEIGHT, WIDTH), 0.25)
    invvar[0, :3] = 0, np.nan, -1
    coadd = one_band(field["images"]["r"], field, variance=None, invvar={"r": image(tmp_path, invvar)})
    assert np.argwhere(~coadd.valid[0]).tolist() == [[0, 0], [0, 1], [0, 2]]
    assert (coadd.variance[coadd.valid] == 4).all()


def test_some_bands_may_have_variance_and_others_its_inverse(tmp_path, field):
    variance = {"r": field["variance"]["r"]}
    invvar = {"g": image(tmp_path, np.full((HEIGHT, WIDTH), 0.5))}
    coadd = io.read_fits(**{**field, "variance": variance}, invvar=invvar)
    assert coadd.variance[:, 0, 0].tolist() == [4.0, 2.0]


def test_psf_may_be_a_field(field):
    coadd = io.read_fits(**{**field, "psf": lambda y, x, band: np.ones((3, 3))})
    assert callable(coadd.psfs)


# ---------------------------------------------------------------- headers


@pytest.mark.parametrize(
    ("text", "unit", "zero_point"),
    [
        ("nanomaggy", units.nmgy, 22.5),
        ("nanomaggies", units.nmgy, 22.5),
        ("nJy", units.nJy, 31.4),
        ("ADU", units.adu, None),
    ],
)
def test_unit_comes_from_bunit(tmp_path, field, text, unit, zero_point):
    coadd = one_band(image(tmp_path, BUNIT=text), field)
    assert coadd.unit == unit
    assert coadd.zero_point == (None if zero_point is None else pytest.approx(zero_point, abs=1e-9))


def test_bunit_that_is_no_unit_is_worth_a_warning(tmp_path, field):
    with pytest.warns(DataWarning, match="image of band 'r': BUNIT = 'parsnips' is no unit"):
        assert one_band(image(tmp_path, BUNIT="parsnips"), field).unit is None


@pytest.mark.parametrize("card", ["MAGZERO", "MAGZPT", "MAGZP", "PHOTZP", "ZPT", "ZEROPNT"])
def test_zero_point_comes_from_the_header(tmp_path, field, card):
    assert one_band(image(tmp_path, **{card: 27.0}), field).zero_point == 27.0


def test_flux_of_magnitude_zero_gives_the_zero_point(tmp_path, field):
    # 63095734448.0194 is the card of the HSC pipeline, for a zero point of 27
    coadd = one_band(image(tmp_path, FLUXMAG0=63095734448.0194), field)
    assert coadd.zero_point == pytest.approx(27.0, abs=1e-9)


def test_zero_point_may_stand_in_the_primary_header(tmp_path, field):
    primary = fits.PrimaryHDU(header=fits.Header({"MAGZERO": 30.0}))
    fits.HDUList([primary, fits.ImageHDU(pixels(), header())]).writeto(tmp_path / "des.fits")
    assert one_band(f"{tmp_path}/des.fits", field).zero_point == 30.0


def test_options_win_over_the_header(tmp_path, field):
    coadd = one_band(image(tmp_path, BUNIT="nJy", LTV1=-5, LTV2=-6), field, unit="adu", zero_point=27, origin=(1, 2))
    assert (coadd.unit, coadd.zero_point, coadd.origin) == (units.adu, 27.0, (1, 2))


@pytest.mark.parametrize(
    "cards",
    [
        {"LTV1": -200.0, "LTV2": -100.0},
        {"CTYPE1A": "LINEAR", "CTYPE2A": "LINEAR", "CRPIX1A": 1.0, "CRPIX2A": 1.0, "CRVAL1A": 200.0, "CRVAL2A": 100.0},
    ],
    ids=["LTV", "WCS A"],
)
def test_origin_comes_from_the_header(tmp_path, field, cards):
    coadd = one_band(image(tmp_path, **cards), field)
    assert coadd.origin == (100, 200)
    ra, dec = coadd.sky(y=111, x=209)  # CRPIX - 1, and the origin
    np.testing.assert_allclose([ra[0], dec[0]], [150.0, 2.0], rtol=1e-12)


def test_header_without_origin_starts_at_zero(field):
    assert io.read_fits(**field).origin == (0, 0)


# ---------------------------------------------------------------- masks


def masked(tmp_path, field, masks):
    files = {band: image(tmp_path, data, **cards) for band, (data, cards) in zip("rg", masks, strict=True)}
    return io.read_fits(**field, mask=files)


def bits(*numbers):
    """Mask whose pixel (0, i) has the i-th of these bits."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.int32)
    for i, number in enumerate(numbers):
        mask[0, i] = 1 << number
    return mask


@pytest.mark.parametrize(
    "cards",
    [
        {"MP_SAT": 3, "MP_DETECTED": 5},
        {"MSKN0000": "SAT", "MSKM0000": 8, "MSKD0000": "text", "MSKN0001": "DETECTED", "MSKM0001": 32},
    ],
    ids=["MP", "MSKN"],
)
def test_planes_of_a_mask_are_known_by_name(tmp_path, field, cards):
    coadd = masked(tmp_path, field, [(bits(3, 5), cards)] * 2)
    assert coadd.mask_planes == {"SAT": 3, "DETECTED": 5}
    assert np.argwhere(~coadd.valid).tolist() == [[0, 0, 0], [1, 0, 0]]


def test_bits_may_differ_between_bands(tmp_path, field):
    coadd = masked(
        tmp_path,
        field,
        [(bits(3, 5), {"MP_SAT": 3, "MP_DETECTED": 5}), (bits(5, 3), {"MP_SAT": 5, "MP_BRIGHT_OBJECT": 3})],
    )
    assert np.argwhere(~coadd.valid).tolist() == [[0, 0, 0], [1, 0, 0]]
    seen = {name: np.argwhere(coadd.mask & (1 << bit)).tolist() for name, bit in coadd.mask_planes.items()}
    assert seen == {"SAT": [[0, 0, 0], [1, 0, 0]], "DETECTED": [[0, 0, 1]], "BRIGHT_OBJECT": [[1, 0, 1]]}


def test_mask_without_names_is_not_used(tmp_path, field, caplog):
    with caplog.at_level(logging.INFO, logger="kermes.io"):
        coadd = masked(tmp_path, field, [(bits(3), {})] * 2)
    assert coadd.valid.all()
    assert "mask of band 'r' is not used, because no card MP_* or MSKN* names its planes" in caplog.text


def test_names_of_planes_may_be_given(tmp_path, field):
    files = {band: image(tmp_path, bits(1, 10)) for band in "rg"}
    coadd = io.read_fits(**field, mask=files, mask_planes={"BRIGHT": 1}, bad_planes=["BRIGHT"])
    assert np.argwhere(~coadd.valid).tolist() == [[0, 0, 0], [1, 0, 0]]


# ---------------------------------------------------------------- one pixel grid


def two_bands(tmp_path, field, first, second, data=None):
    files = {"r": image(tmp_path, **first), "g": image(tmp_path, data, **second)}
    return io.read_fits(**{**field, "images": files})


def test_bands_on_the_same_grid_may_write_it_differently(tmp_path, field):
    shift = 50.0  # same projection, other reference pixel: differs by the curvature of the sky only
    crval2 = 2.0 + shift * 5e-5
    coadd = two_bands(tmp_path, field, {}, {"CRVAL2": crval2, "CRPIX2": 12.0 + shift})
    assert coadd.n_bands == 2


def test_bands_with_another_wcs_are_refused_with_their_offset(tmp_path, field):
    with pytest.raises(
        InputError, match=r"image of band 'g' is offset from image of band 'r' by \(y, x\) = \(-0.000, -2.500\)"
    ):
        two_bands(tmp_path, field, {}, {"CRPIX1": 12.5})


def test_bands_with_another_pixel_scale_are_refused(tmp_path, field):
    with pytest.raises(InputError, match="one pixel grid: image of band 'g' is offset"):
        two_bands(tmp_path, field, {}, {"CD1_1": -5.1e-5})


def test_bands_on_other_sides_of_the_sky_are_refused(tmp_path, field):
    with pytest.raises(InputError, match="one pixel grid: image of band 'g'"):
        two_bands(tmp_path, field, {}, {"CRVAL1": 330.0, "CRVAL2": -2.0})


def test_bands_of_another_shape_are_refused_with_their_offset(tmp_path, field):
    message = (
        r"image of band 'g' has shape \(24, 28\), image of band 'r' has \(24, 30\); .*\(y, x\) = \(-?0.000, 2.000\)"
    )
    with pytest.raises(ShapeError, match=message):
        two_bands(tmp_path, field, {}, {"CRPIX1": 8.0}, data=pixels()[:, :-2])


def test_bands_with_another_origin_are_refused_with_their_offset(tmp_path, field):
    with pytest.raises(InputError, match=r"band 'g' is offset from band 'r' by \(y, x\) = \(\+0, -3\) pixels"):
        two_bands(tmp_path, field, {"LTV1": -5, "LTV2": -5}, {"LTV1": -2, "LTV2": -5})


def test_a_band_without_wcs_takes_that_of_the_others(tmp_path, field):
    plain = tmp_path / "plain.fits"
    fits.PrimaryHDU(pixels()).writeto(plain)
    coadd = io.read_fits(**{**field, "images": {"r": plain, "g": field["images"]["g"]}})
    assert np.isfinite(coadd.sky(y=0, x=0)).all()


def test_variance_on_another_grid_is_refused(tmp_path, field):
    variance = {"r": image(tmp_path, np.ones((HEIGHT, WIDTH)), CRPIX1=11.0), "g": field["variance"]["g"]}
    with pytest.raises(InputError, match="variance of band 'r' is offset from image of band 'r'"):
        io.read_fits(**{**field, "variance": variance})


@pytest.mark.parametrize(
    ("cards", "message"),
    [
        ({"BUNIT": "uJy"}, r"unit must be the same in all bands; band 'g' has uJy, band 'r' has nJy \(BUNIT\)"),
        ({}, "unit must be the same in all bands; band 'g' has None"),
        ({"BUNIT": "nJy", "MAGZERO": 27.0}, "zero_point must be the same in all bands; band 'g' has 27.0"),
    ],
)
def test_bands_that_disagree_on_the_scale_are_refused(tmp_path, field, cards, message):
    with pytest.raises(InputError, match=message):
        two_bands(tmp_path, field, {"BUNIT": "nJy"}, cards)


# ---------------------------------------------------------------- manifest


MANIFEST = """
bands = ["g", "r"]
unit = "adu"
zero_point = 27
[image]
r = "r.fits[SCI]"
g = "g.fits[1]"
[variance]
r = "r.fits[VAR]"
g = "g.fits[2]"
[psf]
r = "psf.fits[2]"
g = "psf.fits"
"""


def test_manifest_reads_what_the_function_reads(tmp_path, field):
    (tmp_path / "field.toml").write_text(MANIFEST)
    coadd = io.read(tmp_path / "field.toml")
    expected = io.read_fits(**field, bands=["g", "r"])
    assert (coadd.bands, coadd.unit, coadd.zero_point) == (("g", "r"), units.adu, 27.0)
    np.testing.assert_array_equal(coadd.images, expected.images)
    np.testing.assert_array_equal(coadd.psfs, expected.psfs)


def test_manifest_without_bands_keeps_the_order_of_its_images(tmp_path, field):
    (tmp_path / "field.toml").write_text(MANIFEST.replace('bands = ["g", "r"]', ""))
    assert io.read(tmp_path / "field.toml").bands == ("r", "g")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("unit =", "units =", "units: "),
        ("[variance]", "[variances]", "variances: "),
        ('"adu"', "3", "unit: "),
        ('r = "psf.fits[2]"', "r = 2", "psf.r: "),
        ('r = "psf.fits[2]"', "", "psf must be given for every band of image; band 'r' has none"),
        ('["g", "r"]', '["g", "i"]', "bands must be bands of image, r, g; got 'i'"),
        ("[psf]", "[psf", "source must be a TOML manifest"),
        ('"g.fits[1]"', '"h.fits[1]"', "image of band 'g' must be a readable FITS file, got .*h.fits: No such file"),
    ],
)
def test_bad_manifest_gets_one_line_that_names_the_key(tmp_path, field, old, new, message):
    (tmp_path / "field.toml").write_text(MANIFEST.replace(old, new))
    with pytest.raises(KermesError, match=message) as caught:
        io.read(tmp_path / "field.toml")
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- bad files


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("missing.npz", FileError, "source must be a readable .npz file, got missing.npz: No such file"),
        ("missing.toml", FileError, "source must be a readable manifest, got missing.toml: No such file"),
        ("missing.dat", FileError, "source must be a readable .npz or .toml file, got missing.dat: No such file"),
        ("g.fits[1]", FileError, "image must be a readable FITS file, got g.fits: No such file"),
        (__file__, InputError, "source must be an .npz archive, a .toml manifest, or a mapping .* got .*test_io.py"),
        (3, InputError, "source must be a path, or a mapping of band to file; got int"),
        ({}, InputError, "images must map the name of each band to a file"),
    ],
)
def test_source_of_no_known_form_is_refused(source, error, message):
    with pytest.raises(error, match=message):
        io.read(source)


def test_unknown_option_is_refused():
    with pytest.raises(InputError, match=r"options must be those of an .npz archive: bands, .* got 'psf'"):
        io.read("scene.npz", psf=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"psf": None}, "psf must be given for bands"),
        ({"psf": {"r": "psf.fits"}}, "psf must be given for every band of image; band 'g' has none"),
        ({"psf": {"i": "psf.fits"}}, "psf must be given for bands of image, r, g; got 'i'"),
        ({"variance": None}, "variance or invvar must be given for every band of image; band 'r' has neither"),
        ({"invvar": {"g": "x.fits"}}, "variance and invvar must not be given for the same band; band 'g' has both"),
        ({"mask": {"g": "x.fits"}}, "mask must be given for every band of image; band 'r' has none"),
        ({"mask": "x.fits"}, "mask must map the name of each band to a file, got 'x.fits'"),
        ({"bands": ["i"]}, "bands must be bands of image, r, g; got 'i'"),
    ],
)
def test_planes_that_do_not_go_with_the_bands_are_refused(field, changes, message):
    with pytest.raises(InputError, match=message):
        io.read_fits(**(field | changes))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("{}[7]", r"must name an HDU with an image, got .*\[7\]; images are in HDU 1 \(SCI\), 2 \(VAR\)"),
        ("{}[IVAR]", r"must name an HDU with an image, got .*\[IVAR\]; images are in HDU 1 \(SCI\), 2 \(VAR\)"),
        ("{}[1][0]", "must name a plane of a cube"),
        ("{}.gone", "must be a readable FITS file, got .*gone: No such file or directory"),
    ],
)
def test_image_that_is_not_there_is_named(tmp_path, field, reference, message):
    with pytest.raises(KermesError, match="image of band 'r' " + message):
        one_band(reference.format(tmp_path / "r.fits"), field)


def test_table_is_no_psf(tmp_path, field):
    table = fits.BinTableHDU.from_columns([fits.Column("PSF_MASK", "E", array=[1.0])])
    fits.HDUList([fits.PrimaryHDU(), table]).writeto(tmp_path / "r.psf")
    with pytest.raises(InputError, match=r"psf of band 'r' must be an image, got .*r.psf, which holds none"):
        one_band(field["images"]["r"], field, psf={"r": tmp_path / "r.psf"})


def damaged(path: Path, fraction: float) -> None:
    """Cut a file short."""
    content = path.read_bytes()
    path.write_bytes(content[: int(fraction * len(content))])


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.8])
def test_fits_file_cut_short_is_refused(tmp_path, field, fraction):
    path = tmp_path / "cut.fits"
    fits.HDUList([fits.PrimaryHDU(), fits.CompImageHDU(pixels(), header())]).writeto(path)
    damaged(path, fraction)
    with pytest.raises(FileError, match=r"image of band 'r' must be .* FITS file, got .*cut.fits") as caught:
        one_band(f"{path}[1]", field)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.99])
def test_archive_cut_short_is_refused(tmp_path, fraction):
    path = tmp_path / "cut.npz"
    io.write_npz(path, scene())
    damaged(path, fraction)
    with pytest.raises(FileError, match=r"source must be an undamaged .npz archive of plain arrays, got .*cut.npz"):
        io.read(path)


def test_archive_of_python_objects_is_refused(tmp_path):
    np.savez(tmp_path / "objects.npz", images=np.array([{}], dtype=object))
    with pytest.raises(FileError, match=r"source must be an undamaged .npz archive of plain arrays"):
        io.read(tmp_path / "objects.npz")


def test_text_is_no_fits_file(tmp_path, field):
    (tmp_path / "text.fits").write_text("not FITS")
    with pytest.raises(FileError, match=r"image of band 'r' must be a readable FITS file, got .*text.fits"):
        one_band(tmp_path / "text.fits", field)
