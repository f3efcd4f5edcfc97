"""Reading files of the package lsst.images, as Rubin's data releases have them, without that package."""

import numpy as np
import pytest

from kermes import cli, io
from kermes.errors import FileError, InputError
from kermes.geometry import Box
from kermes.psf import CellPsf
from lsst_files import CELL, tract_wcs, write_cell_coadd


def test_coadds_of_cells_bring_everything(tmp_path):
    files = [write_cell_coadd(tmp_path / f"{band}.fits", band=band, bits={"SATURATED": (3, 4)}) for band in "ri"]
    coadd = io.read(files)
    assert coadd.bands == ("r", "i")
    assert coadd.origin == (200, 100)
    assert str(coadd.unit) == "nJy"
    assert coadd.zero_point == pytest.approx(31.4)
    assert not coadd.valid[:, 3, 4].any()
    assert coadd.valid.sum() == coadd.valid.size - 2
    assert isinstance(coadd.psfs, CellPsf)
    assert (coadd.psfs.origin, coadd.psfs.cell_shape) == ((200, 100), (CELL, CELL))
    ra, dec = coadd.sky(y=[203.0], x=[104.0])
    expected = tract_wcs().pixel_to_world(104.0, 203.0)
    # The header holds 15 digits, of which the position in the tract takes three.
    np.testing.assert_allclose([ra[0], dec[0]], [expected.ra.deg, expected.dec.deg], rtol=1e-12)


def test_a_mapping_names_the_bands_and_the_file_is_not_asked(tmp_path):
    path = write_cell_coadd(tmp_path / "r.fits", band="r")
    coadd = io.read({"HSC-R": path})
    assert coadd.bands == ("HSC-R",)
    assert coadd.psf_at(y=205, x=105).shape == (1, 11, 11)


def test_each_cell_has_its_psf_and_one_without_data_a_neighbours(tmp_path):
    coadd = io.read([write_cell_coadd(tmp_path / "r.fits", missing=((0, 2),))])
    widths = [1 / np.square(coadd.psf_at(y=205, x=105 + CELL * j)).sum() for j in range(3)]
    below = 1 / np.square(coadd.psf_at(y=205 + CELL, x=105 + CELL * 2)).sum()
    assert widths[0] < widths[1] < below
    # The nearest two cells are as far away as each other, and the first of them lends.
    assert widths[2] == widths[1]


def test_a_cut_of_the_grid_keeps_its_cells_and_those_that_miss(tmp_path):
    whole = io.read([write_cell_coadd(tmp_path / "a.fits", n_cells=(3, 4), missing=((1, 3),))])
    part = io.read(
        [
            write_cell_coadd(
                tmp_path / "b.fits",
                n_cells=(2, 2),
                origin=(200 + CELL, 100 + 2 * CELL),
                grid_first=(200, 100),
                missing=((1, 3),),
            )
        ]
    )
    assert part.psfs.present[..., 0].tolist() == [[True, False], [True, True]]
    for y, x in ((225.0, 145.0), (250.0, 175.0)):
        np.testing.assert_array_equal(part.psf_at(y=y, x=x), whole.psf_at(y=y, x=x))


def test_stamps_of_different_sizes_share_their_centre(tmp_path):
    files = [
        write_cell_coadd(tmp_path / "r.fits", band="r", psf_shape=(9, 11)),
        write_cell_coadd(tmp_path / "i.fits", band="i", psf_shape=(13, 7)),
    ]
    psf = io.read(files).psf_at(y=205, x=105)
    assert psf.shape == (2, 13, 11)
    assert [np.unravel_index(stamp.argmax(), stamp.shape) for stamp in psf] == [(6, 5), (6, 5)]


def test_box_is_the_cut_of_the_whole(tmp_path):
    files = [write_cell_coadd(tmp_path / f"{band}.fits", band=band) for band in "ri"]
    whole = io.read(files)
    for box in (Box(210, 105, 12, 30), (210, 105, 12, 30), (230, 150, 1000, 1000)):
        part = io.read(files, box=box)
        expected = whole.cutout(box if isinstance(box, Box) else Box(*box))
        assert (part.origin, part.shape) == (expected.origin, expected.shape)
        for name in ("images", "variance", "valid", "mask"):
            np.testing.assert_array_equal(getattr(part, name), getattr(expected, name))
        np.testing.assert_array_equal(part.psf_at(y=215, x=110), expected.psf_at(y=215, x=110))
        assert part.sky(y=212, x=108) == expected.sky(y=212, x=108)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((0, 0, 10, 10), r"box must share pixels with the image Box\(y0=200, x0=100, height=40, width=60\), got Box"),
        ((0, 0), "box must be a Box or .y0, x0, height, width., got .0, 0."),
        ((0, 0, -1, 5), "box must be a Box or .y0, x0, height, width."),
    ],
)
def test_box_that_is_none_is_refused(tmp_path, box, message):
    path = write_cell_coadd(tmp_path / "r.fits")
    with pytest.raises(InputError, match=message):
        io.read([path], box=box)


def test_mask_of_more_planes_than_an_integer_has_bits(tmp_path):
    many = {f"PLANE{n}": n for n in range(31)}
    rest = {"NO_DATA": 0, "SAT": 1}
    where = {"PLANE30": (1, 1), "SAT": (2, 2)}
    path = write_cell_coadd(tmp_path / "r.fits", masks=(many, rest), bits=where)
    coadd = io.read([path])
    assert set(coadd.mask_planes) == {*many, *rest}
    assert np.argwhere(~coadd.valid[0]).tolist() == [[2, 2]]
    assert np.argwhere((coadd.mask[0] >> coadd.mask_planes["PLANE30"]) & 1).tolist() == [[1, 1]]


def test_file_without_a_psf_says_so(tmp_path):
    path = write_cell_coadd(tmp_path / "r.fits", model="masked_image")
    with pytest.raises(InputError, match=r"psf must be given for bands \('r',\), because their files hold none"):
        io.read({"r": path})
    assert io.read({"r": path}, psf=np.ones((3, 3))).shape == (40, 60)
    with pytest.raises(InputError, match="images must map the name of each band to a file, because .*r.fits does not"):
        io.read([path])


def test_bands_twice_or_on_other_cells_are_refused(tmp_path):
    path = write_cell_coadd(tmp_path / "r.fits")
    with pytest.raises(InputError, match="images must be of different bands; .* are both of 'r'"):
        io.read([path, path])
    with pytest.raises(InputError, match="images must be at least one file"):
        io.read([])
    shifted = write_cell_coadd(tmp_path / "i.fits", band="i", n_cells=(2, 2))
    with pytest.raises(InputError, match=r"images must have the same cells: band 'i' has \(2, 2\) of \(20, 20\)"):
        io.read([path, shifted])


def test_newer_form_and_damage_are_named(tmp_path):
    with pytest.raises(FileError, match=r"new.fits is of a newer form of lsst.images \(2\)"):
        io.read([write_cell_coadd(tmp_path / "new.fits", version=2)])
    path = write_cell_coadd(tmp_path / "cut.fits")
    path.write_bytes(path.read_bytes().replace(b'"cell_shape"', b'"cell_chape"'))
    with pytest.raises(FileError, match="cut.fits must be a coadd of cells, but its PSFs are damaged"):
        io.read([path])


def test_manifest_needs_no_psf_of_such_files(tmp_path):
    write_cell_coadd(tmp_path / "r.fits")
    (tmp_path / "m.toml").write_text('[image]\nr = "r.fits"\n')
    coadd = io.read(tmp_path / "m.toml", box=(210, 110, 5, 6))
    assert (coadd.origin, coadd.shape) == ((210, 110), (5, 6))


def test_command_line_takes_the_files_and_a_box(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    y, x = np.arange(40)[:, None] - 20, np.arange(60) - 30
    image = 500 * np.exp(-0.5 * (y**2 + x**2) / 2.0**2)
    for band in "ri":
        noise = np.random.default_rng(sum(band.encode())).normal(0, 1, image.shape)
        write_cell_coadd(tmp_path / f"{band}.fits", band=band, images=image + noise)
    assert cli.run("deblend r.fits i.fits -o out --box 205 110 30 40 --no-picture".split()) == 0
    assert cli.run("show out -o out.png".split()) == 0
    result = io.read([tmp_path / "r.fits", tmp_path / "i.fits"], box=(205, 110, 30, 40))
    from kermes import open as open_result

    opened = open_result("out", coadd=result)
    assert len(opened) == 1
    assert abs(opened.objects["y"][0] - 220) < 0.5
    assert abs(opened.objects["x"][0] - 130) < 0.5
