"""Reports and files for other viewers say what the result says, and need nothing else."""

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO

import matplotlib.image
import numpy as np
import pytest
from astropy.io import fits
from matplotlib.figure import Figure

import kermes
from kermes import cli, io, plots
from kermes.errors import InputError
from kermes.geometry import Box, Footprint
from kermes.io.overlays import ds9_regions, firefly_footprints, outlines, residual_fits
from kermes.report import area_of, html_report, worst_objects
from kermes.simulation import simulate_scene


@pytest.fixture(scope="module")
def result():
    scene = simulate_scene(n_sources=25, shape=(130, 150), bands=("g", "r", "i"), seed=6)
    coadd = kermes.Coadd(
        images=scene.coadd.images,
        variance=scene.coadd.variance,
        psfs=scene.coadd.psfs,
        bands=scene.coadd.bands,
        wcs=scene.coadd.wcs,
        origin=(1000, 2000),
        unit="nJy",
    )
    return kermes.deblend(coadd, config=kermes.Config(model_psf_sigma=0.7))


class _Page(HTMLParser):
    """Checks that elements are closed in order, and collects what a page refers to."""

    def __init__(self):
        super().__init__()
        self.open, self.references, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.references += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parsed(html):
    page = _Page()
    page.feed(html)
    assert page.open == []
    return page


# ---------------------------------------------------------------- the page


def test_page_needs_no_other_file_and_no_network(result):
    ids = [int(number) for number in result.objects["object_id"][:3]]
    html = html_report(result, ids, title="<three> & more")
    page = parsed(html)
    assert page.references
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    assert len(page.references) == 1 + len(ids)
    for reference in page.references:
        picture = matplotlib.image.imread(BytesIO(base64.b64decode(reference.partition(",")[2])), format="png")
        assert picture.std() > 0.02
    assert "<script" not in html
    assert not re.search(r"https?:|url\(|@import", html)
    assert "&lt;three&gt; &amp; more" in html


def test_page_says_what_the_tables_say(result):
    number = int(result.objects["object_id"][2])
    text = "".join(parsed(html_report(result, [number])).text)
    row = result[number].row
    assert f"Object {number}" in text
    assert f"y = {row['y']:.2f}, x = {row['x']:.2f}" in text
    for band in result.bands:
        assert f"{row[f'{band}_flux']:.6g}" in text
        assert f"{row[f'{band}_redistributed_flux_err']:.6g}" in text
    assert "model_psf_sigma = 0.7" in text
    assert f"{len(result)} rows out" in text


def test_flags_and_lesser_outcomes_are_seen(result):
    number = int(result.objects["object_id"][0])
    objects = result.objects.copy()
    objects["outcome"][0] = "point"
    objects["reason"][0] = "budget"
    objects["flag_edge"][0] = True
    html = html_report(replace(result, objects=objects), [number])
    assert '<span class="lesser">point (budget)</span>' in html
    assert re.search('<span class="flag" title="[^"]+">edge</span>', html)


def test_worst_are_those_with_the_largest_chi2(result):
    chi2 = dict(zip(result.objects["object_id"].tolist(), result.objects["chi2"].tolist(), strict=True))
    worst = worst_objects(result, 4)
    assert [chi2[number] for number in worst] == sorted(chi2.values(), reverse=True)[:4]
    with pytest.raises(InputError, match="worst must be a number of objects, at least 1, got 0"):
        worst_objects(result, 0)


def test_a_report_of_nothing_or_of_too_much_is_refused(result):
    with pytest.raises(InputError, match="a report must have 1 to 50 objects, got 0"):
        html_report(result, [])
    with pytest.raises(InputError, match="object_id must be one of"):
        html_report(result, [12345])


def test_result_without_images_has_models_only(result, tmp_path):
    result.write(tmp_path / "out")
    number = int(result.objects["object_id"][0])
    page = parsed(html_report(kermes.open(tmp_path / "out"), [number]))
    assert len(page.references) == 1


# ---------------------------------------------------------------- other viewers


def test_fits_is_image_model_and_residual_in_the_coordinates_of_the_coadd(result, tmp_path):
    box = area_of(result, [int(result.objects["object_id"][1])])
    (tmp_path / "r.fits").write_bytes(residual_fits(result, box))
    with fits.open(tmp_path / "r.fits") as file:
        for b, band in enumerate(result.bands):
            image, model, residual = (file[f"{name}_{band}"].data for name in ("IMAGE", "MODEL", "RESIDUAL"))
            cut = (b, *box.within(result.coadd.box))
            np.testing.assert_array_equal(image, result.coadd.images[cut])
            np.testing.assert_array_equal(model, result.model_image()[cut])
            expected = (image - model) / np.sqrt(result.coadd.variance[cut])
            np.testing.assert_allclose(residual, expected, rtol=1e-6)
            assert file[f"IMAGE_{band}"].header["BUNIT"] == "nJy"
    again = io.read(
        {"r": f"{tmp_path}/r.fits[IMAGE_R]"}, variance={"r": f"{tmp_path}/r.fits[IMAGE_R]"}, psf=np.ones((3, 3))
    )
    assert again.origin == box.origin
    assert again.sky(y=box.y0, x=box.x0) == result.coadd.sky(y=box.y0, x=box.x0)


def test_fits_says_where_models_are_lesser(result, tmp_path):
    objects = result.objects.copy()
    objects["outcome"][0] = "point"
    changed = replace(result, objects=objects)
    (tmp_path / "r.fits").write_bytes(residual_fits(changed))
    with fits.open(tmp_path / "r.fits") as file:
        header, mask = file["OUTCOME"].header, file["OUTCOME"].data
    planes = {header[f"MSKN{bit:04}"]: header[f"MSKM{bit:04}"] for bit in range(4)}
    assert planes == {"SINGLE": 1, "POINT": 2, "TEMPLATE": 4, "PEAK": 8}
    footprint = changed[int(objects["object_id"][0])].footprint("model").footprint
    expected = footprint.mask(result.coadd.box)
    np.testing.assert_array_equal((mask & planes["POINT"]) != 0, expected)


def test_regions_lie_where_the_objects_are(result):
    number = int(result.objects["object_id"][3])
    text = ds9_regions(result, [number])
    lines = text.splitlines()
    assert lines[0].startswith("# Region file format: DS9")
    assert lines[2] == "physical"
    y, x = result[number].center
    assert f"point({x + 1:.3f},{y + 1:.3f}) # point=cross color=green text={{{number}}}" in lines
    (outline,) = [line for line in lines if line.startswith("polygon")][:1]
    corners = np.array(re.findall(r"[\d.]+", outline.partition(")")[0]), dtype=float).reshape(-1, 2)
    footprint = result.footprints[int(result[number].row["parent_id"])].shift(*result.origin)
    box = footprint.box
    assert corners.min(axis=0) == pytest.approx([box.x0 + 0.5, box.y0 + 0.5])
    assert corners.max(axis=0) == pytest.approx([box.x1 + 0.5, box.y1 + 0.5])
    assert ds9_regions(result).count("point(") == len(result)


def test_outline_goes_around_all_pixels_and_holes():
    mask = np.zeros((7, 9), dtype=bool)
    mask[1:6, 1:8] = True
    mask[3, 4] = False
    lines = outlines(Footprint.of_mask(mask, 10, 20))
    assert len(lines) == 2
    outer = max(lines, key=lambda line: np.ptp(line[:, 0]))
    assert (outer.min(axis=0).tolist(), outer.max(axis=0).tolist()) == ([10.5, 20.5], [15.5, 27.5])
    assert len(outer) == 8  # the corners of a rectangle, each cut
    assert outlines(Footprint.of_mask(np.zeros((3, 3), dtype=bool))) == []


def test_firefly_gets_the_pixels_and_peaks_of_footprints(result):
    content = json.loads(firefly_footprints(result))
    assert set(content["footprints"]) == {str(number) for number in result.footprints}
    for number, footprint in content["footprints"].items():
        spans = np.array(footprint["spans"])
        assert (spans[:, 2] - spans[:, 1] + 1).sum() == result.footprints[int(number)].area
    n_peaks = sum(len(footprint["peaks"]) for footprint in content["footprints"].values())
    inside = np.isin(result.objects["parent_id"], [*result.footprints])
    assert n_peaks == inside.sum()


# ---------------------------------------------------------------- pictures of a whole result


def test_tile_is_drawn_with_any_column(result):
    figure = plots.show_tile(result)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == [f"full: {len(result)}"]
    numbers = plots.show_tile(result, "i_flux")
    assert numbers.axes[1].get_ylabel() == "i_flux [nJy]"
    assert figure.axes[0].get_xlim() == (1999.5, 2149.5)
    flags = plots.show_tile(result, "flag_edge")
    assert {text.get_text().partition(":")[0] for text in flags.axes[0].get_legend().get_texts()} <= {"True", "False"}
    with pytest.raises(InputError, match="color must be a column of the table of objects, got 'nonsense'"):
        plots.show_tile(result, "nonsense")


def test_tile_draws_the_edges_of_footprints(result):
    (edges,) = plots.show_tile(result).axes[0].collections[:1]
    segments = np.array(edges.get_segments())
    assert set(np.abs(np.diff(segments, axis=1)).reshape(-1, 2).sum(axis=1)) == {1.0}
    for footprint in result.footprints.values():
        box = footprint.shift(*result.origin).box
        assert segments[..., 0].min() <= box.x0 - 0.5
        assert segments[..., 1].max() >= box.y1 - 0.5


def test_pictures_go_into_the_axes_that_are_given(result):
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert plots.show_tile(result, ax=left) is figure
    assert plots.show_timing(result, ax=right) is figure
    assert right.get_title().startswith(f"{len(result)} objects")
    with pytest.raises(InputError, match="result must have the timings of its blends"):
        plots.show_timing(result.select(object_ids=1))


def test_region_is_drawn_alone(result):
    figure = plots.show_region(result, Box(1010, 2010, 60, 70))
    assert [axes.get_title() for axes in figure.axes][:4] == [
        "image (g r i)",
        "model",
        "model as observed",
        "residual",
    ]
    assert figure.axes[0].images[0].get_extent() == pytest.approx((2009.5, 2079.5, 1009.5, 1069.5))


# ---------------------------------------------------------------- notebooks and command line


def test_notebooks_show_a_picture_and_numbers(result, tmp_path):
    for html in (result.coadd._repr_html_(), result._repr_html_(), result[1]._repr_html_()):
        page = parsed(html)
        assert len(page.references) == 1
        assert page.references[0].startswith("data:image/png;base64,")
    assert f"{len(result)} objects" in result._repr_html_()
    result.write(tmp_path / "out")
    assert "not at hand" in kermes.open(tmp_path / "out")._repr_html_()


def test_command_writes_the_page_and_its_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scene = simulate_scene(n_sources=8, shape=(90, 90), bands=("g", "r"), seed=2)
    io.write_npz("scene.npz", scene.coadd)
    assert cli.run("deblend scene.npz -o out --no-picture".split()) == 0
    assert cli.run("report out --worst 2".split()) == 0
    names = {path.name for path in tmp_path.iterdir() if path.name.startswith("out_")}
    assert names == {"out_report.html", "out_report.fits", "out_report.reg", "out_report_footprints.json"}
    parsed((tmp_path / "out_report.html").read_text())
    assert cli.run("report out --worst 2".split()) == 1
    assert "--overwrite replaces it" in capsys.readouterr().err
    assert cli.run("report out --blend 1 -o page.html --overwrite".split()) == 0
    assert cli.run("report out".split()) == 2
    assert cli.run("report out --object 1 --worst 2".split()) == 2
    for arguments, name in (
        ("--tile outcome", "tile_outcome.png"),
        ("--timing", "timing.png"),
        ("--convergence", "convergence.png"),
    ):
        assert cli.run(["show", "out", *arguments.split()]) == 0
        assert (tmp_path / "out" / name).stat().st_size > 5000
    assert cli.run("show out --tile nonsense".split()) == 1
    assert cli.run("show out --tile outcome --object 1".split()) == 2
    assert "exclude each other" in capsys.readouterr().err
    assert cli.run("report out --object 1 --worst 2".split()) == 2
    assert "give one of --object, --blend and --worst" in capsys.readouterr().err


def test_firefly_footprints_of_a_cut_fit_the_cut(result):
    number = int(result.objects["object_id"][3])
    box = area_of(result, [number])
    (whole,) = json.loads(firefly_footprints(result, [number]))["footprints"].values()
    (part,) = json.loads(firefly_footprints(result, [number], box))["footprints"].values()
    dy, dx = box.y0 - result.origin[0], box.x0 - result.origin[1]
    assert (np.array(whole["spans"]) - [dy, dx, dx]).tolist() == part["spans"]
    assert (np.array(whole["corners"]) - [dx, dy]).tolist() == part["corners"]
    np.testing.assert_allclose(np.array(whole["peaks"]) - [dx, dy], part["peaks"])
