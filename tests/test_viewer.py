"""What the page of a result is answered: tiles, rows, colours, objects and refits."""

import io
import json
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from astropy import units
from astropy.table import Table
from PIL import Image
from starlette.testclient import TestClient

import kermes
from kermes.errors import FileError, InputError
from kermes.geometry import Box
from kermes.kernels import pictures as kernels
from kermes.plots import lupton_rgb
from kermes.simulation import simulate_scene
from kermes.viewer import View, serve
from kermes.viewer.paging import Pages
from kermes.viewer.pictures import FINEST, TILE, Layer, Look, Outlines, Pictures
from kermes.viewer.selection import as_json, colouring, matching, ordered
from kermes.viewer.server import make_app

SHAPE = (530, 700)  # more than one tile, and no multiple of anything
ORIGIN = (100, -40)


@pytest.fixture(scope="module")
def result():
    scene = simulate_scene(n_sources=60, shape=SHAPE, bands=("g", "r", "i"), seed=2)
    images = scene.coadd.images.copy()
    images[0, 400:450, 300:360] = np.nan  # one band
    images[:, 200:230, 100:180] = np.nan  # all
    coadd = kermes.Coadd(
        images=images,
        variance=scene.coadd.variance,
        psfs=scene.coadd.psfs,
        bands=scene.coadd.bands,
        wcs=scene.coadd.wcs,
        origin=ORIGIN,
        unit="nJy",
    )
    return kermes.deblend(coadd, peaks=scene.peaks + np.array(ORIGIN))


@pytest.fixture(scope="module")
def pictures(result):
    found = Pictures(result)
    found.draw_missing(threading.Event())
    return found


@pytest.fixture(scope="module")
def client(result):
    with TestClient(make_app(View(result, "a tile")), base_url="http://localhost") as client:
        yield client


def pixels(content):
    image = Image.open(io.BytesIO(content))
    return np.asarray(image.convert("RGBA") if image.mode == "P" else image)


def whole(pictures, layer, level, look=None):
    """All tiles of a level, put together."""
    factor = 2 ** (pictures.deepest - level)
    height, width = (-(-side // factor) for side in SHAPE)
    out = np.zeros((height, width, 3), dtype=np.uint8)
    for row in range(-(-height // TILE)):
        for column in range(-(-width // TILE)):
            tile = pixels(pictures.tile(layer, level, column, row, look))
            y, x = row * TILE, column * TILE
            assert tile.shape[:2] == (min(TILE, height - y), min(TILE, width - x))
            out[y : y + TILE, x : x + TILE] = tile
    return out


# ---------------------------------------------------------------- pictures


def test_tiles_together_are_the_picture(result, pictures):
    coadd = result.coadd
    expected = lupton_rgb(coadd.images, coadd.bands, scale=pictures.scale, valid=coadd.valid)[::-1]
    found = whole(pictures, Layer.IMAGE, pictures.deepest)
    # Two ways to the same float32 may round to neighbouring bytes.
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert (found[SHAPE[0] - 230 : SHAPE[0] - 200, 100:180] == 128).all()


def test_tiles_of_models_are_the_models(result, pictures):
    expected = lupton_rgb(result.model_image(), result.bands, scale=pictures.scale)[::-1]
    found = whole(pictures, Layer.MODEL, pictures.deepest)
    # What is kept is the residual, to 0.04 per cent; a brightness of 255 steps does not show that.
    assert np.abs(found.astype(int) - expected).max() <= 2


def test_tiles_of_residuals_are_what_is_left(result, pictures):
    coadd = result.coadd
    sigma = np.where(coadd.valid, result.residual() / np.sqrt(coadd.variance), np.nan)
    planes = pictures._planes(Layer.RESIDUAL, Box.of_shape(SHAPE), 1)[:, ::-1]
    np.testing.assert_array_equal(np.isnan(planes), np.isnan(sigma))
    np.testing.assert_allclose(planes, sigma, rtol=1e-3, atol=1e-3)


def reference_planes(pictures, layer, factor):
    """Means of squares of the picture, written out."""
    result, noise = pictures.result, pictures.scale.noise
    coadd = result.coadd
    known = np.ones_like(coadd.valid) if layer is Layer.MODEL else coadd.valid
    plane = {
        Layer.IMAGE: coadd.images / noise[:, None, None],
        Layer.MODEL: result.model_image() / noise[:, None, None],
        Layer.RESIDUAL: result.residual() / np.sqrt(coadd.variance),
    }[layer][:, ::-1]
    known = known[:, ::-1]
    height, width = (-(-side // factor) for side in SHAPE)
    out = np.full((len(noise), height, width), np.nan)
    for b in range(len(noise)):
        for y in range(height):
            for x in range(width):
                square = (b, slice(y * factor, (y + 1) * factor), slice(x * factor, (x + 1) * factor))
                values = plane[square][known[square]]
                if len(values):
                    out[b, y, x] = values.sum() / (np.sqrt(len(values)) if layer is Layer.RESIDUAL else len(values))
    return out


@pytest.mark.parametrize("layer", Layer)
@pytest.mark.parametrize("factor", [2, 4])
def test_pixels_from_afar_are_those_of_squares(pictures, layer, factor):
    planes = pictures._planes(layer, Box.of_shape(SHAPE), factor)
    expected = reference_planes(pictures, layer, factor)
    np.testing.assert_array_equal(np.isnan(planes), np.isnan(expected))
    np.testing.assert_allclose(planes, expected, rtol=2e-3, atol=2e-3)


def test_noise_keeps_its_width_in_the_residual(pictures):
    for level in range(pictures.deepest - 4, pictures.deepest + 1):
        box, factor = pictures._area(level, 0, 0)
        planes = pictures._tile_planes(Layer.RESIDUAL, box, factor)
        assert 0.85 < np.nanstd(planes) < 1.15, factor


def test_one_band_is_grey(pictures):
    tile = pixels(pictures.tile(Layer.IMAGE, pictures.deepest, 0, 0, Look(band="r")))
    assert (tile[..., 0] == tile[..., 1]).all()
    assert (tile[..., 1] == tile[..., 2]).all()
    assert tile.std() > 5


def test_brightness_makes_faint_things_brighter(pictures):
    means = [
        pixels(pictures.tile(Layer.IMAGE, pictures.deepest, 0, 0, Look(brightness=step))).mean() for step in (-2, 0, 2)
    ]
    assert means == sorted(means)
    assert means[2] > 1.3 * means[0]


@pytest.mark.parametrize("place", [(-1, 0, 0), (11, 0, 0), (10, 2, 0), (10, 0, 2), (10, -1, 0)])
def test_tiles_outside_are_refused(pictures, place):
    assert pictures.deepest == 10
    with pytest.raises(InputError, match="a tile must lie in the picture"):
        pictures.tile(Layer.IMAGE, *place)


def test_bands_and_layers_that_are_not_there_are_refused(result, pictures):
    with pytest.raises(InputError, match="band must be one of g, r, i, got 'y'"):
        pictures.tile(Layer.IMAGE, 10, 0, 0, Look(band="y"))
    with pytest.raises(InputError, match="layer must be one of model, got image"):
        Pictures(replace(result, coadd=None)).tile(Layer.IMAGE, 10, 0, 0)


def test_models_are_drawn_where_somebody_looks_first(result):
    fresh = Pictures(result)
    assert fresh.drawn == 0
    assert not fresh.is_final(Layer.MODEL, fresh.deepest, 1, 0)
    one = fresh.tile(Layer.MODEL, fresh.deepest, 1, 0)
    assert fresh.drawn == 0.25
    assert fresh.is_final(Layer.MODEL, fresh.deepest, 1, 0)
    assert not fresh.is_final(Layer.MODEL, 0, 0, 0)
    fresh.draw_missing(threading.Event())
    assert fresh.drawn == 1
    assert fresh.tile(Layer.MODEL, fresh.deepest, 1, 0) == one


def test_drawing_stops_when_told(result):
    fresh, stop = Pictures(result), threading.Event()
    stop.set()
    fresh.draw_missing(stop)
    assert fresh.drawn == 0


def test_without_images_models_have_sensible_colours(result):
    bare = Pictures(replace(result, coadd=None))
    bare.draw_missing(threading.Event())
    assert bare.layers == (Layer.MODEL,)
    # The noise is told from the errors of the fluxes, to which extended objects and neighbours add.
    np.testing.assert_allclose(bare.scale.noise, np.sqrt(np.nanmedian(result.coadd.variance, axis=(1, 2))), rtol=0.6)
    found = whole(bare, Layer.MODEL, bare.deepest)
    assert found.max() > 200
    assert np.median(found) < 60


def test_a_result_without_objects_is_shown(result):
    nothing = kermes.deblend(result.coadd, peaks=np.zeros((0, 2), dtype=int))
    for each in (nothing, replace(nothing, coadd=None)):
        with TestClient(make_app(View(each)), base_url="http://localhost") as client:
            assert client.get("/api/result").json()["n_objects"] == 0
            assert client.get("/api/positions").content == b""
            for column in ("outcome", "i_flux", "flag_edge"):
                assert client.get("/api/marks", params={"color": column}).content == b""
                assert client.get("/api/legend", params={"color": column}).status_code == 200
            assert client.get("/api/rows").json() == {"total": 0, "rows": []}
            layer = "model" if each.coadd is None else "residual"
            assert client.get(f"/tiles/{layer}/10/0_0").status_code == 200
            assert client.get("/tiles/footprints/10/0_0").status_code == 200


def test_a_change_is_shown_and_nothing_else(result):
    fresh = Pictures(result)
    fresh.draw_missing(threading.Event())
    before = whole(fresh, Layer.MODEL, fresh.deepest)
    handle = result[5]
    other = kermes.refit(result, handle.blend_id, remove=[5]) if len(members(result, 5)) > 1 else result
    y, x = handle.peak[0] - ORIGIN[0], handle.peak[1] - ORIGIN[1]
    fresh.change(other, Box(y, x, 1, 1).grow(60))
    after = whole(fresh, Layer.MODEL, fresh.deepest)
    expected = lupton_rgb(other.model_image(), other.bands, scale=fresh.scale)[::-1]
    assert np.abs(after.astype(int) - expected).max() <= 2
    assert fresh.drawn == 1
    assert other is result or (after != before).any()


def members(result, number):
    objects = result.objects
    return objects["object_id"][objects["blend_id"] == result[number].blend_id].tolist()


def test_models_wait_while_tiles_are_asked_for(result):
    fresh = Pictures(result)
    before = time.monotonic()
    fresh.tile(Layer.IMAGE, fresh.deepest, 0, 0)
    fresh.draw_missing(threading.Event())
    assert fresh.drawn == 1
    # They begin a quarter of a second after the question; what they take themselves comes on top.
    assert time.monotonic() - before > 0.25


def test_outlines_are_the_edges_of_footprints(result):
    outlines = Outlines(result)
    assert outlines.deepest == 13
    numbers = result.footprints.numbers
    colours = np.stack([np.arange(len(numbers)) + 1, np.zeros_like(numbers), np.zeros_like(numbers)], axis=1)
    level = outlines.deepest - 3  # pixels of the image
    found = np.zeros((*SHAPE, 4), dtype=np.uint8)
    for row in range(2):
        for column in range(2):
            tile = pixels(outlines.tile(level, column, row, colours.astype(np.uint8)))
            found[row * TILE :, column * TILE :][: tile.shape[0], : tile.shape[1]] = tile
    labels = np.zeros(SHAPE, dtype=int)
    for k, number in enumerate(numbers.tolist()):
        labels[result.footprints[number].mask(Box.of_shape(SHAPE))] = k + 1
    padded = np.pad(labels, 1)
    neighbours = [np.roll(padded, shift, axis)[1:-1, 1:-1] for axis in (0, 1) for shift in (-1, 1)]
    edge = (labels > 0) & np.any([each != labels for each in neighbours], axis=0)
    np.testing.assert_array_equal(found[::-1, :, 3] > 0, edge)
    np.testing.assert_array_equal(found[::-1, :, 0][edge], labels[edge])


def test_residual_tile_is_the_colour_map_of_all_bands():
    rng = np.random.default_rng(5)
    planes = rng.normal(scale=4, size=(3, 20, 30)).astype(np.float32)
    planes[0, :5], planes[:, 7, 9] = np.nan, np.nan
    known = np.isfinite(planes)
    n = known.sum(axis=0)
    total = np.where(known, planes, 0).sum(axis=0) / np.sqrt(np.maximum(n, 1))
    colours = rng.integers(0, 256, (256, 3)).astype(np.uint8)
    place = 255 * (total / 5 + 1) / 2
    expected = colours[np.clip(np.rint(place), 0, 255).astype(int)]
    expected[n == 0] = 99
    found = np.empty_like(expected)
    kernels.paint_residual(planes, 5.0, colours, np.uint8(99), found)
    # Next to the middle between two colours, rounding may take either.
    clear = np.abs(place % 1 - 0.5) > 1e-3
    np.testing.assert_array_equal(found[clear], expected[clear])


def test_outlines_are_thin_when_one_looks_closely(result):
    outlines = Outlines(result)
    place = result.footprints[int(result.footprints.numbers[0])].pixels()[0]
    row, column = (SHAPE[0] - 1 - place[0]) * FINEST // TILE, place[1] * FINEST // TILE
    colours = np.full((len(result.footprints), 3), 200, dtype=np.uint8)
    fine = pixels(outlines.tile(outlines.deepest, column, row, colours))
    coarse = pixels(outlines.tile(outlines.deepest - 3, 0, 0, colours))
    assert 0 < (fine[..., 3] > 0).mean() < 0.1
    assert (coarse[..., 3] > 0).mean() > 0
    with pytest.raises(InputError, match="a tile must lie in the picture"):
        outlines.tile(outlines.deepest + 1, 0, 0, colours)
    with pytest.raises(InputError, match="at most 255 different ones, got 256"):
        outlines.tile(outlines.deepest, column, row, np.arange(768).reshape(256, 3).astype(np.uint8))


def test_pages_hold_the_same_pixels(result):
    pages = Pages(result.coadd, large=1)
    assert pages.coadd is not result.coadd
    pages.release()
    for name in ("images", "variance", "valid"):
        np.testing.assert_array_equal(getattr(pages.coadd, name), getattr(result.coadd, name))
    assert Pages(result.coadd).coadd is result.coadd
    # Kernels are compiled once for arrays in memory and in a file.
    assert pages.coadd.images.flags.writeable
    assert pages.coadd.checksums() == result.coadd.checksums()


def test_a_full_disk_is_named(result, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kermes.viewer.paging.mmap.mmap", full)
    with pytest.raises(FileError, match="images cannot be put into a file in .*: No space left on device"):
        Pages(result.coadd, large=1)


def test_kernel_of_planes_reads_no_invalid_pixel():
    image = np.full((1, 2, 2), np.nan, dtype=np.float32)
    out = np.empty((1, 1, 1), dtype=np.float32)
    decoded = np.zeros(4, dtype=np.float32)
    valid, left = np.zeros((1, 2, 2), dtype=bool), np.zeros((1, 2, 2), dtype=np.uint16)
    noise, corner = np.ones(1, dtype=np.float32), np.array([0, 0])
    for layer, expected in ((kernels.IMAGE, np.nan), (kernels.MODEL, 0.0), (kernels.RESIDUAL, np.nan)):
        kernels.bin_planes(layer, image, image, valid, left, decoded, noise, corner, 2, out)
        np.testing.assert_array_equal(out[0, 0, 0], expected)


# ---------------------------------------------------------------- rows and colours


@pytest.fixture
def table():
    return Table(
        {
            "object_id": [1, 2, 3, 4],
            "chi2": [1.0, np.nan, 3.0, 2.0],
            "outcome": ["full", "point", "full", "peak"],
            "flag_edge": [True, False, False, True],
        }
    )


@pytest.mark.parametrize(
    ("column", "condition", "rows"),
    [
        ("chi2", "> 1", [3, 4]),
        ("chi2", ">=1", [1, 3, 4]),
        ("chi2", "< 2", [1]),
        ("chi2", "<= 2", [1, 4]),
        ("chi2", "1.5 .. 3", [3, 4]),
        ("chi2", "2", [4]),
        ("chi2", "nan", [2]),
        ("chi2", "> 2.5, nan", [2, 3]),
        ("chi2", " ", [1, 2, 3, 4]),
        ("object_id", "!= 2", [1, 3, 4]),
        ("object_id", "1, 4", [1, 4]),
        ("outcome", "P", [2, 4]),
        ("outcome", "= p", []),
        ("outcome", "!= full", [2, 4]),
        ("outcome", "full, peak", [1, 3, 4]),
        ("flag_edge", "yes", [1, 4]),
        ("flag_edge", "No", [2, 3]),
        ("flag_edge", "!= yes", [2, 3]),
    ],
)
def test_conditions(table, column, condition, rows):
    assert table["object_id"][matching(table, {column: condition})].tolist() == rows


def test_all_conditions_must_hold(table):
    assert matching(table, {"chi2": "> 0", "flag_edge": "yes"}).tolist() == [True, False, False, True]
    assert matching(table, {}).all()


@pytest.mark.parametrize(
    ("column", "condition", "message"),
    [
        ("chi2", "> x", "filter of chi2 must be like > 3"),
        ("chi2", "> 1 .. 2", "filter of chi2 must be like > 3"),
        ("chi2", "!= nan", "filter of chi2 must be like > 3"),
        ("flag_edge", "maybe", "filter of flag_edge must be yes or no, got 'maybe'"),
        ("outcome", "> full", "filter of outcome must be a word"),
        ("colour", "1", "filter must be a column of the table of objects, got 'colour'"),
    ],
)
def test_conditions_that_cannot_be_read(table, column, condition, message):
    with pytest.raises(InputError, match=message):
        matching(table, {column: condition})


def test_rows_are_sorted_with_missing_values_last(table):
    rows = np.arange(4)
    assert ordered(table, rows, "chi2").tolist() == [0, 3, 2, 1]
    assert ordered(table, rows, "chi2", descending=True).tolist() == [2, 3, 0, 1]
    assert ordered(table, rows, "outcome").tolist() == [0, 2, 3, 1]
    assert ordered(table, rows, "flag_edge", descending=True).tolist() == [0, 3, 1, 2]
    assert ordered(table, rows, None).tolist() == [0, 1, 2, 3]
    assert ordered(table, rows[2:], "chi2").tolist() == [3, 2]


def test_rows_as_json(table):
    rows = as_json(table, np.array([1, 0]), ["object_id", "chi2", "outcome", "flag_edge"])
    assert json.loads(json.dumps(rows)) == [
        {"object_id": 2, "chi2": None, "outcome": "point", "flag_edge": False},
        {"object_id": 1, "chi2": 1.0, "outcome": "full", "flag_edge": True},
    ]


def test_colours_of_numbers_follow_their_order(result):
    found = colouring(result, "i_flux")
    flux = np.asarray(result.objects["i_flux"])
    brightness = found.objects.astype(float).sum(axis=1)  # viridis becomes brighter
    order = np.argsort(flux)
    assert (np.diff(brightness[order]) >= -6).all()
    assert found.legend["title"] == "i_flux [nJy]"
    # Fluxes span more than a factor of 50, or have negative ones among the lowest.
    assert found.legend["log"] == (found.legend["low"] > 0)
    # A footprint has the colour of the brightest object in it.
    parents = np.asarray(result.objects["parent_id"])
    for k, number in enumerate(result.footprints.numbers.tolist()):
        inside = np.flatnonzero(parents == number)
        np.testing.assert_array_equal(found.footprints[k], found.objects[inside[np.argmax(flux[inside])]])


def test_colours_of_words_and_flags(result):
    outcome = colouring(result, "outcome").legend["entries"]
    assert [entry["label"] for entry in outcome] == ["full"]
    assert outcome[0]["count"] == len(result)
    models = colouring(result, "model")
    assert [entry["label"] for entry in models.legend["entries"]] == [
        name for name in ("point", "exponential", "sersic", "double") if name in set(result.objects["model"])
    ]
    edge = colouring(result, "flag_edge")
    red = (edge.objects == (255, 0, 0)).all(axis=1)
    np.testing.assert_array_equal(red, result.objects["flag_edge"])


def test_objects_without_a_value_are_grey(result):
    objects = result.objects.copy()
    objects["i_flux"][0] = np.nan
    found = colouring(replace(result, objects=objects), "i_flux")
    assert found.objects[0].tolist() == [128, 128, 128]
    objects["i_flux"] = np.nan * units.nJy
    assert (colouring(replace(result, objects=objects), "i_flux").objects == 128).all()


# ---------------------------------------------------------------- answers


def test_the_page_and_all_it_needs_come_from_here(client):
    page = client.get("/")
    assert page.status_code == 200
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for name in ("viewer.js", "viewer.css", "vendor/openseadragon.min.js", "vendor/tabulator.min.js"):
        assert f"static/{name}" in page.text
        assert client.get(f"/static/{name}").status_code == 200
    assert client.get("/static/vendor/tabulator_simple.min.css").status_code == 200
    assert client.get("/static/../server.py").status_code == 404


def test_the_description(client, result):
    about = client.get("/api/result").json()
    assert (about["width"], about["height"], about["n_objects"]) == (SHAPE[1], SHAPE[0], len(result))
    assert about["name"] == "a tile"
    assert not about["can_edit"]
    kinds = {column["name"]: column["kind"] for column in about["columns"]}
    assert [kinds[name] for name in ("object_id", "chi2", "outcome", "flag_edge")] == [
        "whole",
        "number",
        "word",
        "flag",
    ]


def test_positions_and_marks(client, result):
    n = len(result)
    content = client.get("/api/positions").content
    ids, places = np.frombuffer(content[: 8 * n], "<f8"), np.frombuffer(content[8 * n :], "<f4").reshape(2, n)
    np.testing.assert_array_equal(ids, result.objects["object_id"])
    # The middle of the last row of the image is half a pixel below the upper edge of the picture.
    np.testing.assert_allclose(places[0], result.objects["x"] - ORIGIN[1] + 0.5, atol=1e-3)
    np.testing.assert_allclose(places[1], SHAPE[0] - 0.5 - (result.objects["y"] - ORIGIN[0]), atol=1e-3)
    marks = client.get("/api/marks", params={"color": "model", "filter": '{"model": "= point"}'}).content
    marks = np.frombuffer(marks, np.uint8).reshape(n, 4)
    np.testing.assert_array_equal(marks[:, 3] == 255, result.objects["model"] == "point")
    np.testing.assert_array_equal(marks[:, :3], colouring(result, "model").objects)


def test_numbers_of_the_pipelines_are_kept(result):
    first = (20_000 * 100 + 99) * 2**24
    with TestClient(make_app(View(result.renumbered(first))), base_url="http://localhost") as client:
        content = client.get("/api/positions").content
        ids = np.frombuffer(content[: 8 * len(result)], "<f8").astype(np.int64)
        np.testing.assert_array_equal(ids, np.asarray(result.objects["object_id"]) + first)
        assert client.get(f"/api/objects/{first + 3}").json()["object_id"] == first + 3


def test_rows(client, result):
    query = {"columns": "object_id,chi2", "sort": "chi2", "descending": "true", "first": 5, "n": 3}
    answer = client.get("/api/rows", params=query).json()
    assert answer["total"] == len(result)
    best = np.sort(np.asarray(result.objects["chi2"]))[::-1][5:8]
    np.testing.assert_allclose([row["chi2"] for row in answer["rows"]], best, rtol=1e-6)
    few = client.get("/api/rows", params={"filter": '{"object_id": "<= 4"}'}).json()
    assert [row["object_id"] for row in few["rows"]] == [1, 2, 3, 4]


def test_an_object(client, result):
    answer = client.get("/api/objects/3").json()
    assert answer["members"] == members(result, 3)
    assert "Object 3" in answer["html"]
    picture = client.get("/api/objects/3/picture")
    assert picture.headers["content-type"] == "image/png"
    assert pixels(picture.content).shape[0] > 500


@pytest.mark.parametrize(
    ("text", "expected"),
    [("3", None), ("y=120 x=-7.5", (120, -7.5)), ("x=1, y=2", (2, 1))],
)
def test_places_are_found(client, result, text, expected):
    found = client.get("/api/find", params={"text": text}).json()
    row = result[3].row
    y, x = (row["y"], row["x"]) if expected is None else expected
    assert (found["y"], found["x"]) == (pytest.approx(y), pytest.approx(x))


def test_places_on_the_sky_are_found_and_told(client, result):
    row = result[3].row
    found = client.get("/api/find", params={"text": f"{row['ra']} {row['dec']}"}).json()
    assert (found["y"], found["x"]) == (pytest.approx(row["y"], abs=1e-3), pytest.approx(row["x"], abs=1e-3))
    told = client.get("/api/place", params={"y": row["y"], "x": row["x"]}).json()
    assert (told["ra"], told["dec"]) == (pytest.approx(row["ra"]), pytest.approx(row["dec"]))
    pixel = round(row["y"]) - ORIGIN[0], round(row["x"]) - ORIGIN[1]
    assert told["values"]["r"] == pytest.approx(result.coadd.images[(1, *pixel)], rel=1e-3)
    # A masked pixel has no value, and outside there is none.
    assert client.get("/api/place", params={"y": 210 + ORIGIN[0], "x": 120 + ORIGIN[1]}).json()["values"]["r"] is None
    assert "values" not in client.get("/api/place", params={"y": -1000, "x": 0}).json()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/api/find?text=nowhere", "a place must be the number of an object, ra and dec, or like y=120 x=340"),
        ("/api/find?text=99999", "object_id must be one of"),
        ("/api/find?text=330 -2", "a place must be"),
        ("/api/objects/99999", "object_id must be one of"),
        ("/api/rows?columns=nothing", "columns must be a column"),
        ("/api/rows?sort=nothing", "sort must be a column"),
        ("/api/rows?first=x", "first must be a whole number, got 'x'"),
        ("/api/rows?filter=x", "filter must be an object of conditions by column, as JSON"),
        ("/api/marks?color=nothing", "color must be a column"),
        ("/api/place?y=1", "x must be a number, got None"),
        ("/tiles/image/10/7_7", "a tile must lie in the picture"),
        ("/tiles/depth/10/0_0", "layer must be one of image, model, residual, got 'depth'"),
        ("/tiles/image/10/0_0?brightness=x", "brightness must be a number, got 'x'"),
        ("/tiles/footprints/99/0_0", "a tile must lie in the picture"),
    ],
)
def test_wrong_questions_are_answered_with_why(client, path, message):
    answer = client.get(path)
    assert answer.status_code == 400
    assert message in answer.json()["error"]


def test_other_names_of_the_host_are_refused(client):
    assert client.get("/api/state", headers={"host": "elsewhere"}).status_code == 400


def test_a_read_only_view_cannot_be_changed(client):
    run = client.get("/api/result").json()["run"]
    for name in ("refit", "undo", "write"):
        assert client.post(f"/api/{name}", json={}, headers={"x-kermes": run}).status_code == 403


def test_edits(result, tmp_path):
    path = tmp_path / "out_edits.json"
    with TestClient(make_app(View(result, edits=path)), base_url="http://localhost") as client:
        own = {"x-kermes": client.get("/api/result").json()["run"]}
        y, x = result[3].peak
        edit = {"blend_id": result[3].blend_id, "add": [[y + 6, x + 6]]}
        # Not from the page of somebody else.
        assert client.post("/api/refit", json=edit).status_code == 403
        assert not path.exists()
        answer = client.post("/api/refit", json=edit, headers=own).json()
        assert (answer["version"], answer["n_objects"]) == (1, len(result) + 1)
        assert len(answer["new"]) == 1
        assert len(answer["after"]["rows"]) >= len(answer["before"]["rows"])
        assert json.loads(path.read_text())["edits"] == [edit]
        assert client.get(f"/api/objects/{answer['new'][0]}").status_code == 200
        wrong = client.post("/api/refit", json={"blend_id": 10**6}, headers=own)
        assert (wrong.status_code, wrong.json()["error"][:8]) == (400, "blend_id")
        assert client.post("/api/refit", content=b"{", headers=own).status_code == 400
        written = client.post("/api/write", json={}, headers=own).json()["path"]
        assert written == str(tmp_path / "out_edited.kermes")
        assert len(kermes.open(written)) == len(result) + 1
        # Who opens the file again sees the same.
        assert len(View(result, edits=path).result) == len(result) + 1
        assert client.post("/api/undo", json={}, headers=own).json()["n_objects"] == len(result)
        assert client.post("/api/undo", json={}, headers=own).status_code == 400
        assert json.loads(path.read_text())["edits"] == []


def test_edits_need_images(result, tmp_path):
    with pytest.raises(InputError, match="editing needs the images"):
        View(replace(result, coadd=None), edits=tmp_path / "edits.json")


def test_a_port_that_is_taken_is_named(result):
    import socket

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(FileError, match=f"port must be free on 127.0.0.1, got {port}"):
            serve(View(result), port=port, browser=False)
