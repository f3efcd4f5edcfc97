"""Pictures show what they should: colours, missing pixels, peaks, one strip per object."""

import io
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
from astropy import units
from astropy.table import Table

import kermes
from kermes import plots
from kermes.coadd import Coadd, wavelength_order
from kermes.errors import InputError, ShapeError
from kermes.geometry import Box
from kermes.plots import (
    colour_scale,
    lupton_rgb,
    show_objects,
    show_parts,
    show_result,
    show_scene,
)
from kermes.simulation import render_truth, simulate_scene


@dataclass
class FakeObject:
    """One object of a fake result: its model is the truth."""

    result: "FakeResult"
    index: int

    @property
    def object_id(self):
        return int(self.row["object_id"])

    @property
    def row(self):
        return self.result.objects[self.index]

    def _stamp(self, images):
        box = self.result.boxes[self.index]
        image_box = Box(*self.result.origin, *self.result.shape)
        return SimpleNamespace(array=images[box.within(image_box)], box=box)

    def model(self, band):
        return self.stamps("model")[band]

    def stamps(self, kind):
        if kind != "model":
            stamps = map(self._stamp, self.result.coadd.images)
        else:
            box = self.result.boxes[self.index]
            stamps = [SimpleNamespace(array=plane, box=box) for plane in self.result.models[self.index]]
        return dict(zip(self.result.bands, stamps, strict=True))

    def neighbor_subtracted(self, band):
        return self.stamps("neighbor_subtracted")[band]


class FakeResult:
    """What plots read of a result, with the truth of a simulated scene as model."""

    is_part = False

    def __init__(self, scene, coadd):
        self.bands, self.coadd = scene.coadd.bands, coadd
        self.shape, self.origin = scene.coadd.shape, (0, 0) if coadd is None else coadd.origin
        image_box = Box.of_shape(self.shape)
        self.models, self.boxes = [], []
        self.total = np.zeros((len(self.bands), *self.shape), dtype=np.float32)
        for k in np.flatnonzero(scene.truth["peak_index"] >= 0):
            model, box = render_truth(scene, k)
            self.models.append(model[(slice(None), *image_box.within(box))])
            self.boxes.append((box & image_box).shift(*self.origin))
            self.total[(slice(None), *box.within(image_box))] += self.models[-1]
        n = len(self.models)
        self.objects = Table({"object_id": np.arange(n) + 10, "peak_index": np.arange(n)})
        self.objects["y"], self.objects["x"] = (scene.peaks + self.origin).T
        self.objects["outcome"] = (["full", "point"] * n)[:n]
        for band in self.bands:
            self.objects[f"{band}_flux"] = scene.truth[f"{band}_flux"][scene.truth["peak_index"] >= 0]
            self.objects[f"{band}_flux_err"] = np.full(n, 10.0) * units.nJy

    def model_image(self, convolved=True):
        return self.total

    def __getitem__(self, object_id):
        return FakeObject(self, int(np.flatnonzero(self.objects["object_id"] == object_id)[0]))


@pytest.fixture(scope="module")
def scene():
    return simulate_scene(n_sources=8, shape=(70, 60), bands=("g", "r", "i"), magnitudes=(20.0, 24.0), seed=4)


@pytest.fixture(scope="module")
def result(scene):
    return FakeResult(scene, scene.coadd)


def png(figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=40)
    return file.getvalue()


def one_source(fluxes):
    """Images (B, 21, 21) of one source with a flux per band, in units of the noise, which is 1."""
    y, x = np.indices((21, 21)) - 10
    return np.asarray(fluxes, dtype=float)[:, None, None] * np.exp(-0.5 * (y**2 + x**2) / 4.0)


@pytest.mark.parametrize(
    ("bands", "order"),
    [
        ("ugrizy", [0, 1, 2, 3, 4, 5]),
        ("yzirgu", [5, 4, 3, 2, 1, 0]),
        (["Y", "VIS", "H", "J"], [1, 0, 3, 2]),
        (["HSC-I", "HSC-G", "HSC-R"], [1, 2, 0]),
        (["blue", "red", "g"], [0, 1, 2]),
    ],
)
def test_bands_are_ordered_by_wavelength_where_it_is_known(bands, order):
    np.testing.assert_array_equal(wavelength_order(bands), order)


def test_colours_follow_the_formula():
    rng = np.random.default_rng(4)
    # From far below the sky to far above white, in all ratios of colours.
    images = rng.normal(size=(3, 40, 50)) * 10 ** rng.uniform(-3, 4, (40, 50))
    scale = plots.ColourScale(noise=np.array([1.0, 2.0, 0.5]), gains=np.array([1.3, 0.9, 0.8]), white=100.0)
    grey = plots.ColourScale(noise=np.ones(1), gains=np.ones(3), white=100.0)
    channels = np.float32(images)[::-1] / scale.noise[::-1, None, None] * scale.gains[:, None, None] + 1
    brightness = np.maximum(channels.mean(axis=0), 3e-6)
    colours = np.maximum(channels * np.arcsinh(brightness / 3) / np.arcsinh(101 / 3) / brightness, 0)
    colours *= 255 / np.maximum(colours.max(axis=0), 1)
    found = lupton_rgb(images, ["g", "r", "i"], scale=scale)
    assert lupton_rgb(np.full((1, 1, 1), 1e30), ["r"], scale=grey).tolist() == [[[255, 255, 255]]]
    # Half a step for the rounding to eight bits, and what 32 bits leave of a sum of channels that cancel.
    assert np.abs(np.moveaxis(found, 2, 0) - colours).max() < 0.51


@pytest.mark.parametrize("n_bands", range(1, 8))
def test_any_number_of_bands_makes_a_picture(n_bands):
    bands = [f"band{b}" for b in range(n_bands)]
    rgb = lupton_rgb(one_source([50.0] * n_bands), bands)
    assert rgb.shape == (21, 21, 3)
    assert rgb.dtype == np.uint8
    assert rgb[10, 10].min() > 100


def test_one_band_is_grey():
    rgb = lupton_rgb(one_source([50.0]), ["r"])
    assert (rgb == rgb[..., :1]).all()


@pytest.mark.parametrize(("bands", "red_band"), [("gri", 2), ("irg", 0), ("gi", 1), ("ugrizy", 5)])
def test_source_brightest_in_the_reddest_band_is_red(bands, red_band):
    fluxes = np.full(len(bands), 10.0)
    fluxes[red_band] = 100.0
    images = one_source(fluxes)
    scale = colour_scale(np.zeros_like(images), bands, noise=np.ones(len(bands)))
    red, green, blue = lupton_rgb(images, bands, scale=scale)[10, 10].astype(int)
    assert red > green >= blue


def test_typical_source_is_white():
    red, green, blue = lupton_rgb(one_source([300.0, 100.0, 200.0]), "gri")[10, 10].astype(int)
    assert max(red, green, blue) - min(red, green, blue) < 10


def test_bright_pixels_keep_their_colour():
    scale = colour_scale(np.zeros((3, 5, 5)), "gri", noise=np.ones(3))
    rgb = lupton_rgb(np.array([1.0, 2.0, 4.0])[:, None, None] * [[[1e2, 1e4, 1e6]]], "gri", scale=scale).astype(float)
    # 8 bits: the ratios of the channels are known to one per cent.
    np.testing.assert_allclose(rgb[0, 1:] / rgb[0, 1:].max(axis=1, keepdims=True), [[1.0, 0.5, 0.25]] * 2, atol=0.01)


def test_unit_of_the_images_does_not_matter(scene):
    plain = lupton_rgb(scene.coadd.images, "gri")
    np.testing.assert_array_equal(lupton_rgb(scene.coadd.images * np.float32(2.0**20), "gri"), plain)


def test_pixels_that_no_band_has_are_mid_grey():
    images = one_source([50.0, 60.0, 70.0])
    images[:, 5, 5] = np.nan
    valid = np.ones((21, 21), dtype=bool)
    valid[7, 7] = False
    rgb = lupton_rgb(images, "gri", valid=valid)
    assert (rgb[[5, 7], [5, 7]] == 128).all()
    assert (rgb == 128).all(axis=2).sum() == 2


def test_pixels_that_one_band_lacks_are_drawn_from_the_others():
    images = one_source([50.0, 50.0, 50.0])
    whole = lupton_rgb(images, "gri", scale=colour_scale(images, "gri", noise=np.ones(3)))
    images[1, 10, 10] = np.nan
    patched = lupton_rgb(images, "gri", scale=colour_scale(images, "gri", noise=np.ones(3)))
    assert np.abs(patched[10, 10].astype(int) - whole[10, 10]).max() <= 2


def test_image_without_a_valid_pixel_is_grey():
    assert (lupton_rgb(np.full((2, 4, 5), np.nan), "gr") == 128).all()


@pytest.mark.parametrize(
    ("images", "more", "message"),
    [
        (np.zeros((2, 5, 5)), {}, "images must have shape"),
        (np.zeros((3, 5, 5)), {"noise": [1.0]}, "noise must have one value per band"),
        (np.zeros((3, 5, 5)), {"valid": np.ones((4, 4))}, "valid must have the shape of images"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(images, more, message):
    with pytest.raises(ShapeError, match=message):
        colour_scale(images, "gri", **more)


def test_residual_of_the_true_model_has_unit_width(scene, result):
    figure = show_scene(scene.coadd.images, result.total, variance=scene.coadd.variance, bands=scene.coadd.bands)
    residual = np.asarray(figure.axes[2].images[0].get_array())
    # 4200 pixels: the width from the median is known to 2 per cent.
    assert np.median(np.abs(residual)) * 1.4826 == pytest.approx(1.0, abs=0.08)


def test_invalid_pixels_of_the_residual_are_left_blank(scene, result):
    valid = np.ones(scene.coadd.shape, dtype=bool)
    valid[3:6, 4] = False
    coadd = scene.coadd
    figure = show_scene(coadd.images, result.total, variance=coadd.variance, bands=coadd.bands, valid=valid)
    np.testing.assert_array_equal(figure.axes[2].images[0].get_array().mask, ~valid)


def test_a_frame_of_another_shape_is_refused(scene, result):
    coadd = scene.coadd
    with pytest.raises(ShapeError, match="frame must have the shape of image"):
        show_scene(coadd.images, result.total, variance=coadd.variance, bands=coadd.bands, frame=np.ones((3, 4, 5)))


def test_peaks_are_marked_in_the_coordinates_of_the_origin(scene, result):
    coadd, origin = scene.coadd, (1000, 500)
    figure = show_scene(
        coadd.images,
        result.total,
        variance=coadd.variance,
        bands=coadd.bands,
        peaks=scene.peaks + origin,
        origin=origin,
    )
    panel = figure.axes[0]
    np.testing.assert_array_equal(panel.collections[0].get_offsets(), (scene.peaks + origin)[:, ::-1])
    assert panel.get_xlim() == (499.5, 559.5)
    assert panel.get_ylim() == (999.5, 1069.5)
    assert [text.get_text() for text in panel.texts] == [str(k) for k in range(len(scene.peaks))]


@pytest.mark.parametrize("name", ["model", "variance"])
def test_scene_of_arrays_that_do_not_fit_is_refused(scene, name):
    arrays = {"model": scene.coadd.images, "variance": scene.coadd.variance, name: np.zeros((3, 5, 5))}
    with pytest.raises(ShapeError, match=f"^{name} must have the shape of image"):
        show_scene(scene.coadd.images, bands=scene.coadd.bands, **arrays)


def test_objects_get_one_strip_each_the_brightest_first(result):
    figure = show_objects(result, n=3)
    labels = [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel().startswith("object")]
    brightness = sum(np.asarray(result.objects[f"{band}_flux"]) for band in result.bands)
    expected = result.objects["object_id"][np.argsort(-brightness)[:3]]
    assert [label.split()[1] for label in labels] == [str(number) for number in expected]


def test_chosen_objects_are_drawn_in_the_order_given(result):
    figure = show_objects(result, ids=[12, 10])
    labels = [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel().startswith("object")]
    assert labels == ["object 12\nfull", "object 10\nfull"]


def test_objects_without_a_coadd_show_model_and_spectrum(scene):
    figure = show_objects(FakeResult(scene, None), n=2)
    assert len(figure.axes) == 4
    assert png(figure)


def test_object_without_light_is_drawn(scene):
    result = FakeResult(scene, scene.coadd)
    peak = scene.peaks[0]
    result.boxes[0], result.models[0] = Box(*peak, 0, 0), np.zeros((3, 0, 0), dtype=np.float32)
    assert png(show_objects(result, ids=[10]))


def test_missing_fluxes_do_not_prevent_the_picture(scene):
    result = FakeResult(scene, scene.coadd)
    result.objects = Table(result.objects, masked=True)
    result.objects["g_flux"].mask[0] = True
    result.objects["r_flux"][1] = np.nan
    result.objects["i_flux_err"][:] = np.nan
    assert png(show_objects(result, ids=[10, 11]))


def test_result_shows_scene_and_strips_and_numbers_all_objects(result):
    figure = show_result(result, n=2)
    scene_part, objects_part = figure.subfigs
    assert len(objects_part.axes) == 2 * 5
    numbers = [text.get_text() for text in scene_part.axes[0].texts]
    assert numbers == [str(number) for number in result.objects["object_id"]]
    assert png(figure)


def test_objects_not_modelled_in_full_are_marked_orange(result):
    texts = show_result(result, n=1).subfigs[0].axes[0].texts
    colours = [text.get_color() for text in texts]
    assert colours == ["white" if outcome == "full" else "orange" for outcome in result.objects["outcome"]]


def test_result_with_masked_pixels_and_an_origin_is_drawn(scene):
    images = scene.coadd.images.copy()
    images[:, 20:24] = np.nan
    images[0, :, 30] = np.nan
    coadd = Coadd(
        images=images, variance=scene.coadd.variance, psfs=scene.coadd.psfs, bands=scene.coadd.bands, origin=(300, -20)
    )
    assert png(show_result(FakeResult(scene, coadd)))


def test_result_without_objects_is_drawn():
    scene = simulate_scene(n_sources=0, shape=(30, 40), bands=("g", "r"))
    assert png(show_result(FakeResult(scene, scene.coadd)))


def test_result_without_its_images_is_refused(scene):
    with pytest.raises(InputError, match="result must have its images"):
        show_result(FakeResult(scene, None))


def test_pictures_drawn_in_threads_are_the_same(result):
    alone = png(show_result(result, n=1))
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda _: png(show_result(result, n=1)), range(2)))
    assert together == [alone, alone]


def test_pictures_leave_pyplot_alone():
    code = (
        "import sys, numpy, kermes.plots as p; i = numpy.ones((1, 9, 9)); p.show_scene(i, i, variance=1.0, bands='r')"
    )
    code += ".savefig(sys.stdout.buffer); sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module")
def deblended():
    """A deblended scene of a few sources."""
    scene = simulate_scene(n_sources=4, shape=(60, 60), seed=1, bands=("g", "r", "i"))
    return kermes.deblend(scene.coadd, peaks=scene.peaks)


def test_parts_are_seven_panels_for_each_object(deblended):
    figure = show_parts(deblended, n=2)
    titles = [axes.get_title() for axes in figure.axes[:7]]
    expected = ["data", "data above noise", "flux below noise", "model", "rendered model", "observation", "residual"]
    assert titles == expected
    assert len(figure.axes) == 14


def test_data_above_noise_and_flux_below_make_up_the_data(deblended):
    data, above, below = (axes.images[0].get_array() for axes in show_parts(deblended, n=1).axes[:3])
    assert ((above == data).all(axis=2) | (below == data).all(axis=2)).all()


def test_the_model_is_sharper_than_the_rendered_model(deblended):
    def width(axes):
        light = axes.images[0].get_array().astype(float).mean(axis=2)
        return np.count_nonzero(light > 0.5 * light.max())

    panels = show_parts(deblended, n=1).axes
    assert width(panels[3]) < width(panels[4])


def test_parts_of_an_object_that_is_not_there_are_refused(deblended):
    with pytest.raises(InputError, match="object_id must be one of"):
        show_parts(deblended, ids=[99])


def test_parts_need_the_images(deblended):
    with pytest.raises(InputError, match="must have its images"):
        show_parts(replace(deblended, coadd=None))


def test_part_of_a_result_shows_no_shared_pixels(scene):
    result = FakeResult(scene, scene.coadd)
    assert [axes.get_title() for axes in show_objects(result, n=1).axes][:4] == [
        "image", "model", "re-distributed", "neighbours subtracted",
    ]  # fmt: skip
    result.is_part = True
    titles = [axes.get_title() for axes in show_objects(result, n=1).axes]
    assert titles == ["image", "model", "neighbours subtracted", "spectrum"]


# ---------------------------------------------------------------- the kernels behind the colours


def reference_rgb(images, bands, scale, valid):
    """Lupton et al. (2004), written out with arrays."""
    weights = plots._channel_weights(bands)
    scaled = np.where(valid, images, 0) / scale.noise[:, None, None]
    covered = np.tensordot(weights, valid.astype(float), axes=1)
    with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of nothing
        channels = np.tensordot(weights, scaled, axes=1) / covered
        channels = np.where(covered > 0, channels, np.nanmean(channels, axis=0))
    unknown = np.isnan(channels).any(axis=0)
    shifted = np.nan_to_num(channels) * scale.gains[:, None, None] + 1.0
    brightness = np.maximum(shifted.mean(axis=0), 1e-6)
    factor = np.arcsinh(brightness / 3.0) / np.arcsinh((scale.white + 1.0) / 3.0) / brightness
    rgb = np.maximum(shifted * factor, 0.0)
    rgb = np.rint(255 * rgb / np.maximum(rgb.max(axis=0), 1.0)).transpose(1, 2, 0)
    rgb[unknown] = 128
    return rgb


@pytest.mark.parametrize("bands", [("g",), ("r", "g"), ("g", "r", "i"), ("y", "u", "g", "z", "r", "i")])
def test_colours_are_those_of_the_formula(bands):
    rng = np.random.default_rng(8)
    images = (rng.normal(size=(len(bands), 40, 50)) * 10.0 ** rng.uniform(-1, 4, (40, 50))).astype(np.float32)
    valid = rng.random(images.shape) > 0.2
    images[~valid] = np.where(rng.random((~valid).sum()) > 0.5, np.nan, 1e9)
    scale = plots.ColourScale(noise=rng.uniform(0.5, 2.0, len(bands)), gains=np.array([0.7, 1.0, 1.6]), white=300.0)
    found = lupton_rgb(images, bands, scale=scale, valid=valid)
    expected = reference_rgb(images, bands, scale, valid & np.isfinite(images))
    # Two ways to the same float32 may round to neighbouring bytes.
    assert np.abs(found.astype(int) - expected).max() <= 1
