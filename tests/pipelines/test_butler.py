"""Results in a Butler: whole, in part, by component, and in repositories that were not made for them."""

import os
import subprocess
import sys

import numpy as np
import pytest
from lsst.daf.butler import Butler, Config, DatasetRef, DatasetType, FileDataset
from lsst.images import Box as LsstBox
from lsst.pipe.base import InMemoryDatasetHandle

import kermes
from cell_coadds import cell_coadds, simulated_sky
from kermes import io
from kermes.errors import FileError, InputError
from kermes.geometry import Box
from kermes.io.scarlet_results import scarlet_of_result
from kermes.lsst import CONFIG_DIR, SEED_CONFIG, coadd_of_images, make_repository, read_coadd, read_scarlet_dataset
from kermes.lsst.butler import ScarletFormatter

PATCH = {"skymap": "kermes_sim", "tract": 0, "patch": 0}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A repository with one patch."""
    folder = tmp_path_factory.mktemp("butler") / "repo"
    options = {"patches": (1, 1), "bands": ("r", "g"), "patch_size": 120, "cell": 30, "visits": False, "seed": 3}
    make_repository(folder, **options).close()
    return folder


@pytest.fixture(scope="module")
def result(root):
    with Butler.from_config(str(root), collections="kermes/inputs") as butler:
        return kermes.deblend(read_coadd(butler, **PATCH))


@pytest.fixture(scope="module")
def butler(root, result):
    """The repository with a result in it."""
    with Butler.from_config(str(root), writeable=True, run="results") as butler:
        dimensions = ("skymap", "tract", "patch")
        for name, storage_class in (("models", "KermesResult"), ("scarlet", "KermesScarletModels")):
            dataset_type = DatasetType(name, dimensions, storage_class, universe=butler.dimensions)
            butler.registry.registerDatasetType(dataset_type)
        butler.put(result, "models", **PATCH)
        butler.put(scarlet_of_result(result).models, "scarlet", **PATCH)
    with Butler.from_config(str(root), collections=["results", "kermes/inputs"]) as butler:
        yield butler


def assert_same_tables(one, other):
    assert one.colnames == other.colnames
    for column in one.colnames:
        np.testing.assert_array_equal(np.asarray(one[column]), np.asarray(other[column]))
        assert one[column].unit == other[column].unit


def test_result_comes_back(butler, result):
    again = butler.get("models", PATCH)
    assert_same_tables(again.objects, result.objects)
    # Within the tolerance with which it is stored, in units of the noise.
    noise = np.sqrt(result.coadd.variance.min())
    assert np.abs(again.model_image() - result.model_image()).max() < 0.3 * noise
    with_images = again.with_coadd(read_coadd(butler, **PATCH))
    number = int(result.objects["object_id"][0])
    one, other = with_images[number].redistributed("g"), result[number].redistributed("g")
    np.testing.assert_allclose(one.array, other.array, atol=0.3 * noise)


def test_one_object_or_blend_is_read_alone(butler, result):
    blend_id = int(result.blends["blend_id"][np.argmax(result.blends["n_sources"])])
    members = result.objects["object_id"][result.objects["blend_id"] == blend_id].tolist()
    assert len(members) > 1
    for parameters in ({"blend_id": blend_id}, {"blend_id": [blend_id]}, {"object_id": np.array(members)}):
        part = butler.get("models", PATCH, parameters=parameters)
        assert part.objects["object_id"].tolist() == members
    one = butler.get("models", PATCH, parameters={"object_id": members[1]})
    assert one.objects["object_id"].tolist() == [members[1]]
    with pytest.raises(Exception, match="blend_ids must be those of the result, got 12345"):
        butler.get("models", PATCH, parameters={"blend_id": 12345})


def test_components_are_read_alone(butler, result):
    for name in ("objects", "parents", "blends", "candidates"):
        assert_same_tables(butler.get(f"models.{name}", PATCH), getattr(result, name))
    metadata = butler.get("models.metadata", PATCH)
    assert metadata["ledger"]["rows"] == len(result)
    assert metadata["bands"] == ["g", "r"]
    assert list(butler.get("scarlet.metadata", PATCH)["bands"]) == ["g", "r"]


def test_scarlet_models_come_back_in_part_and_whole(butler, result):
    models = butler.get("scarlet", PATCH)
    assert set(models.blends) == set(result.parents["parent_id"].tolist())
    number = next(iter(models.blends))
    assert list(butler.get("scarlet", PATCH, parameters={"blend_id": number}).blends) == [number]
    ref = butler.find_dataset("scarlet", PATCH)
    assert len(read_scarlet_dataset(butler, ref)) == len(result)
    with pytest.raises(InputError, match="numbers must be those of blends in the file, got 999"):
        read_scarlet_dataset(butler, ref, [999])


def test_models_of_rubin_are_read_by_the_file(root, shared):
    # As in a repository of Rubin: the storage class is known, but its type belongs to packages that are not here.
    path = shared / "data" / "lsst_models" / "upstream_1.0.1.scarlet"
    with Butler.from_config(str(root), writeable=True, run="rubin") as butler:
        dimensions = ("skymap", "tract", "patch")
        dataset_type = DatasetType(
            "object_scarlet_models", dimensions, "LsstScarletModelData", universe=butler.dimensions
        )
        butler.registry.registerDatasetType(dataset_type)
        ref = DatasetRef(dataset_type, butler.registry.expandDataId(PATCH), run="rubin")
        butler.ingest(FileDataset(str(path), [ref], formatter=ScarletFormatter), transfer="copy")
        found = butler.find_dataset("object_scarlet_models", PATCH)
        with pytest.raises(ImportError):
            butler.get(found)
        result = read_scarlet_dataset(butler, found)
        expected = io.read_scarlet(path)
        assert_same_tables(result.objects, expected.objects)
        np.testing.assert_array_equal(result.model_image(), expected.model_image())
        number = int(expected.parents["parent_id"][0])
        part = read_scarlet_dataset(butler, found, [number])
        assert set(part.objects["parent_id"]) == {number}


def test_in_memory_datasets_know_parameters_and_components(result, butler):
    handle = InMemoryDatasetHandle(result, storageClass="KermesResult")
    assert len(handle.get(parameters={"object_id": 2})) == 1
    assert_same_tables(handle.get(component="parents"), result.parents)
    models = butler.get("scarlet", PATCH)
    handle = InMemoryDatasetHandle(models, storageClass="KermesScarletModels")
    number = next(iter(models.blends))
    assert list(handle.get(parameters={"blend_id": number}).blends) == [number]
    assert list(handle.get(component="metadata")["bands"]) == ["g", "r"]


def test_coadd_is_read_in_part_and_by_band(butler):
    whole = read_coadd(butler, **PATCH)
    assert whole.bands == ("g", "r")
    assert read_coadd(butler, bands=["r"], **PATCH).bands == ("r",)
    part = read_coadd(butler, box=Box(40, 50, 60, 70), **PATCH)
    expected = whole.cutout(Box(40, 50, 60, 70))
    assert part.origin == expected.origin
    np.testing.assert_array_equal(part.images, expected.images)


def test_what_is_not_there_is_named(butler):
    with pytest.raises(FileError, match="deep_coadd is not in the repository for tract 0, patch 0; there are none"):
        read_coadd(butler, collections="results", **PATCH)
    with pytest.raises(FileError, match="band 'z' of deep_coadd is not in the repository .* there are g, r"):
        read_coadd(butler, bands=["g", "z"], **PATCH)
    with pytest.raises(FileError, match="the image of .*band g cannot be read"):
        read_coadd(butler, bands=["g"], box=Box(5000, 5000, 3, 3), **PATCH)


def test_unreadable_file_is_named(tmp_path):
    options = {"patches": (1, 1), "bands": ("r",), "patch_size": 60, "cell": 30, "visits": False}
    with make_repository(tmp_path / "repo", **options) as butler:
        path = butler.getURI("deep_coadd", PATCH, band="r").ospath
        with open(path, "r+b") as file:
            file.truncate(os.path.getsize(path) // 2)
        with pytest.raises(FileError, match="the image of tract 0, patch 0, band r cannot be read: "):
            read_coadd(butler, **PATCH)


def test_repository_without_the_storage_classes_needs_the_environment(tmp_path):
    Butler.makeRepo(str(tmp_path / "plain"))
    code = (
        "import sys, kermes; from kermes.simulation import simulate_scene; "
        "from lsst.daf.butler import Butler, DatasetType; "
        "b = Butler.from_config(sys.argv[1], writeable=True, run='r'); "
        "b.registry.registerDatasetType(DatasetType('m', (), 'KermesResult', universe=b.dimensions)); "
        "b.put(kermes.deblend(simulate_scene(n_sources=2, shape=(48, 48)).coadd, peaks=[[24, 24]]), 'm'); "
        "print(type(b.get('m')).__name__, b.getURI('m').getExtension())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "DAF_BUTLER_CONFIG_PATH"}
    command = [sys.executable, "-c", code, str(tmp_path / "plain")]
    without = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert without.returncode != 0
    assert "KermesResult" in without.stderr
    environment["DAF_BUTLER_CONFIG_PATH"] = str(CONFIG_DIR)
    with_path = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert with_path.stdout.split() == ["Result", ".kermes"]


def test_seed_is_what_the_folder_says():
    seed = Config(str(SEED_CONFIG))
    assert seed["storageClasses"] == Config(str(CONFIG_DIR / "storageClasses.yaml"))["storageClasses"]
    assert seed["datastore"] == Config(str(CONFIG_DIR / "datastores" / "fileDatastore.yaml"))["datastore"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patches": (0, 2)}, "patches must be >= 1"),
        ({"patch_size": 70, "cell": 30}, "patch_size a multiple of cell"),
        ({"bands": ()}, "bands must be different names"),
        ({"bands": ("r", "r")}, "bands must be different names"),
        ({"bands": ("x",)}, "bands must be"),
    ],
)
def test_repository_that_cannot_be_made_is_refused(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        make_repository(tmp_path / "repo", **options)
    assert not (tmp_path / "repo").exists()


def test_repository_is_not_made_over_another(tmp_path):
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "file").write_text("")
    with pytest.raises(FileError, match="repository must be a new directory"):
        make_repository(tmp_path / "repo")


def test_same_seed_is_the_same_sky(tmp_path):
    options = {"patches": (1, 1), "bands": ("r",), "patch_size": 60, "cell": 30, "visits": False}
    images = []
    for name in "ab":
        with make_repository(tmp_path / name, **options) as butler:
            images.append(butler.get("deep_coadd", PATCH, band="r"))
    np.testing.assert_array_equal(images[0].image.array, images[1].image.array)
    assert images[0].bbox == LsstBox.from_shape((120, 120))
    assert images[0].patch.inner_bbox == LsstBox.from_shape((60, 60), start=(30, 30))


def test_cells_of_the_sky_are_those_of_the_repository():
    sky = simulated_sky()
    coadd = coadd_of_images(cell_coadds(sky))
    np.testing.assert_array_equal(coadd.images, sky.images)
