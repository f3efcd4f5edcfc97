"""Pictures look as they did when somebody looked at them last: tests/pictures holds what was seen.

After a change that is meant, ``pytest tests/test_pictures.py --new-pictures`` draws them anew; look at each of them.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread, imsave
from matplotlib.testing.compare import compare_images

from kermes import plots
from kermes.geometry import Box, Footprints
from results import ORIGIN, SHAPE, make_coadd, make_result

STORED = Path(__file__).parent / "pictures"
BANDS = ("u", "g", "r", "i", "z", "y")


def stars(order=None):
    """Stars that are seen in one band each, brighter to the right, with pixels missing in some bands and in all."""
    y, x = np.mgrid[:90, :150]
    images = np.random.default_rng(3).normal(size=(6, 90, 150)).astype(np.float32)
    for b in range(6):
        for k, flux in enumerate((5, 30, 200, 1000)):
            spread = np.exp(-0.5 * ((y - 10 - 14 * b) ** 2 + (x - 20 - 35 * k) ** 2) / 2.5**2)
            images[b] += flux * spread
    images[:, 30:60, 100:110] = np.nan
    images[3:, 60:80, 30:45] = np.nan
    order = range(6) if order is None else order
    return images[list(order)], [BANDS[b] for b in order]


def result_of_hand(with_coadd=True):
    """A result of known models, with noise and missing pixels in its image, two footprints and timings."""
    coadd = make_coadd()
    models = make_result().model_image()
    images = coadd.images + models
    images[:, 5:12, 20:60] = np.nan
    labels = np.zeros(SHAPE, dtype=np.int64)
    labels[22:42, 20:48] = 1
    labels[45:55, 3:18] = 2
    made = make_result(
        coadd=replace(coadd, images=images) if with_coadd else None,
        footprints=Footprints.of_labels(labels, {1: 3, 2: 7}),
        timings={"blends": [0.02, 0.3]},
    )
    for name, values in (("chi2", [0.9, 1.2, 3.0, np.nan]), ("g_flux_err", [20.0, 30.0, 10.0, np.nan])):
        made.objects[name] = values
    for name, values in (
        ("n_sources", [2, 5]),
        ("iterations", [5, 40]),
        ("chi2", [1.02, 3.5]),
        ("converged", [True, False]),
    ):
        made.blends[name] = values
    return made


def drawn(name):
    """Draw one of the pictures."""
    if name in ("colours", "colours_reversed", "one_band"):
        images, bands = stars(range(5, -1, -1) if name == "colours_reversed" else [2] if name == "one_band" else None)
        return plots.lupton_rgb(images, bands)[::-1]
    if name in ("scene", "scene_of_four"):
        result = result_of_hand()
        coadd = result.coadd
        peaks = [[30 + ORIGIN[0], 30 + ORIGIN[1]], [31 + ORIGIN[0], 36 + ORIGIN[1]]]
        return plots.show_scene(
            coadd.images,
            result.model_image(),
            variance=coadd.variance,
            bands=coadd.bands,
            peaks=peaks,
            origin=coadd.origin,
            frame=result.model_image(convolved=False) if name == "scene_of_four" else None,
        )
    result = result_of_hand(with_coadd=name != "objects_without_images")
    return {
        "result": lambda: plots.show_result(result, n=2),
        "region": lambda: plots.show_region(result, Box(115, -5, 40, 45)),
        "objects": lambda: plots.show_objects(result, [4, 7]),
        "objects_without_images": lambda: plots.show_objects(result, [4, 8]),
        "object": lambda: plots.show_object(result[4]),
        "parts": lambda: plots.show_parts(result, [4]),
        "tile_of_outcomes": lambda: plots.show_tile(result, size=40),
        "tile_of_numbers": lambda: plots.show_tile(result, "chi2", size=40),
        "timing": lambda: plots.show_timing(result),
        "convergence": lambda: plots.show_convergence(result),
    }[name]()


NAMES = (
    *(
        "colours",
        "colours_reversed",
        "one_band",
        "scene",
        "scene_of_four",
        "result",
        "region",
        "objects",
        "objects_without_images",
    ),
    *("object", "parts", "tile_of_outcomes", "tile_of_numbers", "timing", "convergence"),
)


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_as_they_were(name, tmp_path, request):
    picture = drawn(name)
    new = request.config.getoption("--new-pictures")
    path = (STORED if new else tmp_path) / f"{name}.png"
    if isinstance(picture, np.ndarray):
        imsave(path, picture)
    else:
        path.write_bytes(plots.png_bytes(picture, 45))
    # Letters differ by a few pixels between versions of the libraries that draw them; a colour that changes, or a panel
    # that is missing, differs by 10 and more.
    tolerance = 1 if isinstance(picture, np.ndarray) else 6
    assert compare_images(str(STORED / f"{name}.png"), str(path), tolerance) is None


def test_order_of_bands_does_not_matter():
    np.testing.assert_allclose(imread(STORED / "colours.png"), imread(STORED / "colours_reversed.png"), atol=2 / 255)


def test_missing_pixels_are_seen_as_such():
    picture = np.rint(255 * imread(STORED / "colours.png"))[::-1, :, :3]
    assert (picture[30:60, 100:110] == plots.UNKNOWN_GREY).all()
    # What some bands have is drawn from those: not grey.
    assert not (picture[60:80, 30:45] == plots.UNKNOWN_GREY).all(axis=2).any()


def test_a_picture_of_something_else_is_not_the_same(tmp_path):
    images, bands = stars()
    imsave(tmp_path / "other.png", plots.lupton_rgb(images[::-1], bands)[::-1])
    assert compare_images(str(STORED / "colours.png"), str(tmp_path / "other.png"), 1) is not None
    (tmp_path / "tile.png").write_bytes(plots.png_bytes(plots.show_tile(result_of_hand(), "object_id", size=40), 45))
    assert compare_images(str(STORED / "tile_of_numbers.png"), str(tmp_path / "tile.png"), 6) is not None
