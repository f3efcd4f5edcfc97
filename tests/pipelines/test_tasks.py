"""Tasks give what the library gives, and bad data give a clear answer."""

import numpy as np
import pytest
from astropy.table import Table
from lsst.pex.config import FieldValidationError
from lsst.pipe.base import NoWorkFound

import kermes
from cell_coadds import cell_coadds, simulated_sky, without
from kermes.config import Config, field_docstrings
from kermes.errors import InputError
from kermes.geometry import Box
from kermes.lsst import DeblendPatchTask, DeblendVisitTask, ForcedPatchTask, coadd_of_images
from kermes.lsst.config import ConfigFields, config_of_fields
from kermes.lsst.repository import visit_image
from kermes.lsst.tasks import NUMBERS, DeblendPatchConfig, first_number


@pytest.fixture(scope="module")
def sky():
    return simulated_sky()


@pytest.fixture(scope="module")
def images(sky):
    return cell_coadds(sky)


def patch_task(**settings):
    config = DeblendPatchConfig()
    config.update(**settings)
    config.validate()
    return DeblendPatchTask(config=config)


def assert_same_tables(one, other, names=None):
    for column in names or other.colnames:
        np.testing.assert_array_equal(np.asarray(one[column]), np.asarray(other[column]), err_msg=column)


# ---------------------------------------------------------------- settings


def test_settings_are_those_of_kermes():
    fields = ConfigFields()
    assert config_of_fields(fields) == Config()
    fields.profiles.residual_rounds, fields.model, fields.model_psf_sigma = 0, "scarlet-lite", 0.7
    config = config_of_fields(fields)
    assert (config.profiles.residual_rounds, config.model, config.model_psf_sigma) == (0, "scarlet-lite", 0.7)
    meanings = field_docstrings(Config())
    assert fields._fields["add_sources"].doc == meanings["add_sources"]
    assert fields.fit._fields["tolerance"].doc == meanings["fit.tolerance"]


def test_values_out_of_range_are_named_before_anything_runs():
    config = DeblendPatchConfig()
    config.kermes.detection.threshold = -1.0
    with pytest.raises(FieldValidationError, match="detection.threshold must be positive, got -1.0"):
        config.validate()
    with pytest.raises(FieldValidationError):
        config.kermes.model = "magic"


# ---------------------------------------------------------------- patches


@pytest.mark.parametrize("n_cores", [1, 2])
def test_patch_is_the_library_with_other_numbers(images, n_cores):
    task = patch_task()
    outputs = task.run(images, tract=3, patch=5, patches_per_tract=9, n_cores=n_cores)
    library = kermes.deblend(coadd_of_images(images)).renumbered((3 * 9 + 5) * NUMBERS)
    assert_same_tables(outputs.models.objects, library.objects)
    assert_same_tables(outputs.objects, library.objects)
    assert_same_tables(outputs.parents, library.parents)
    assert set(outputs.objects["tract"]) == {3}
    assert set(outputs.objects["patch"]) == {5}
    assert task.metadata["n_objects"] == len(library)
    assert task.metadata["missing_bands"] == ""


def test_band_that_is_missing_has_columns_without_values(images):
    task = patch_task(bands=["r", "z", "g"])
    outputs = task.run({band: images[band] for band in "rg"}, missing_bands=["z"])
    objects = outputs.objects
    assert outputs.models.bands == ("r", "z", "g")
    assert np.isnan(objects["z_flux"]).all()
    assert np.isfinite(objects["r_flux"]).all()
    assert task.metadata["missing_bands"] == "z"
    # What is measured in the others is not touched by it.
    two = patch_task(bands=["r", "g"]).run({band: images[band] for band in "rg"}).objects
    np.testing.assert_allclose(objects["r_flux"], two["r_flux"], rtol=1e-5)


def test_cells_without_data_do_not_stop_a_patch(sky):
    outputs = patch_task().run(cell_coadds(sky, empty=Box(30, 30, 30, 60)))
    objects = outputs.objects
    inside = (objects["y"] >= 30) & (objects["y"] < 60) & (objects["x"] >= 30) & (objects["x"] < 90)
    assert not inside.any()
    assert len(objects) > 3
    one_band = cell_coadds(without(sky, Box(30, 30, 30, 60), "g"))
    objects = patch_task().run(one_band).objects
    assert np.isfinite(objects["r_flux"]).all()


def test_no_data_is_no_work(sky):
    nothing = cell_coadds(sky, empty=sky.box)
    with pytest.raises(NoWorkFound, match="no pixel of the patch has data"):
        patch_task().run(nothing)
    with pytest.raises(NoWorkFound, match="no pixel of the patch has data in this band"):
        ForcedPatchTask(config=ForcedPatchTask.ConfigClass()).run(nothing["g"], None)


def test_nothing_detected_is_no_work(images):
    config = DeblendPatchConfig()
    config.kermes.detection.threshold = config.kermes.detection.peak_threshold = 1e6
    with pytest.raises(NoWorkFound, match="nothing is detected in the patch"):
        DeblendPatchTask(config=config).run(images)


def test_peaks_of_a_catalog_are_deblended(images):
    peaks = Table({"y": [40, 80, 100], "x": [40, 90, 50]})
    outputs = patch_task(use_detections=True).run(images, detections=peaks)
    assert outputs.objects["peak_index"].tolist() == [0, 1, 2]


def test_inner_part_is_said(sky):
    objects = patch_task().run(cell_coadds(sky, inner=Box(30, 30, 60, 90))).objects
    y, x = np.asarray(objects["y"]), np.asarray(objects["x"])
    inside = (y > 29.5) & (y < 89.5) & (x > 29.5) & (x < 119.5)
    assert 0 < inside.sum() < len(inside)
    np.testing.assert_array_equal(objects["is_patch_inner"], inside)


def test_numbers_of_patches_do_not_meet():
    assert first_number(0, 0, 4) == 0
    firsts = [first_number(tract, patch, 9) for tract in range(3) for patch in range(9)]
    assert np.diff(firsts).tolist() == [NUMBERS] * 26
    # The largest sky map of Rubin, with 10 x 10 patches in each of 20,000 tracts, is far from where floats end.
    assert first_number(20_000, 99, 100) + NUMBERS < 2**53
    with pytest.raises(InputError, match="patch must be one of the 9 of tract 1, got 9"):
        first_number(1, 9, 9)


def test_scarlet_models_are_written_on_request(images):
    assert not hasattr(patch_task().run(images), "scarlet_models")
    outputs = patch_task(write_scarlet=True).run(images)
    assert list(outputs.scarlet_models.metadata["bands"]) == ["g", "r", "i"]


# ---------------------------------------------------------------- one band, and visits


def test_forced_fluxes_are_those_of_the_library(images):
    models = patch_task().run(images).models
    task = ForcedPatchTask(config=ForcedPatchTask.ConfigClass())
    forced = task.run(images["i"], models).forced
    assert_same_tables(forced, kermes.forced_photometry(models, coadd_of_images([images["i"]])))
    assert forced["object_id"].tolist() == models.objects["object_id"].tolist()


def test_visit_is_deblended_by_templates(sky):
    image = visit_image(sky, "r", instrument="Cam", visit=7, physical_filter="Cam-r")
    outputs = DeblendVisitTask(config=DeblendVisitTask.ConfigClass()).run(image, visit=7, detector=2)
    library = kermes.deblend(coadd_of_images([image]), config=Config(model="templates")).renumbered(2 * NUMBERS)
    assert_same_tables(outputs.sources, library.objects)
    assert set(outputs.sources["detector"]) == {2}
