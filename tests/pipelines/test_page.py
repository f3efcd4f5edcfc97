"""The page on the LSST pipelines is run as it is written, from an empty folder to one blend read through a Butler."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from lsst.daf.butler import Butler

import kermes
from kermes import store
from kermes.lsst import read_scarlet_dataset
from kermes.lsst.tasks import NUMBERS, first_number

PAGE = Path(__file__).parents[2] / "docs" / "lsst.rst"
PATCHES = range(4)
_BLOCK = re.compile(r"^\.\. code-block:: (sh|python)\n\n((?:    .*\n|\n)+)", flags=re.MULTILINE)


def blocks():
    """Blocks of the page that are to be run, in their order; those of Python that follow each other are one program."""
    found = []
    for language, code in _BLOCK.findall(PAGE.read_text()):
        code = textwrap.dedent(code)
        if found and language == "python" == found[-1][0]:
            found[-1] = (language, found[-1][1] + code)
        else:
            found.append((language, code))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which the whole page was run."""
    folder = tmp_path_factory.mktemp("page")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for language, code in blocks():
        command = ["bash", "-euo", "pipefail", "-c", code] if language == "sh" else [sys.executable, "-c", code]
        done = subprocess.run(
            command,
            cwd=folder,
            env=os.environ | {"PATH": path, "MPLBACKEND": "agg"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{code}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return folder


def data_id(patch):
    return {"skymap": "kermes_sim", "tract": 0, "patch": patch}


@pytest.fixture(scope="module")
def butler(folder):
    with Butler.from_config(str(folder / "repo"), collections="u/me/deblend") as butler:
        yield butler


def test_page_runs_everything_that_it_shows(folder):
    languages = [language for language, _ in blocks()]
    assert languages.count("sh") == 7
    assert languages.count("python") == 1
    assert (folder / "blend.png").stat().st_size > 10_000


def test_every_patch_has_its_products(butler):
    for name, per_patch in (("object_kermes", 1), ("object_kermes_models", 1), ("object_kermes_forced", 3)):
        refs = butler.query_datasets(name)
        assert sorted(ref.dataId["patch"] for ref in refs) == sorted([*PATCHES] * per_patch)


def test_task_is_the_library_to_the_bit(butler, folder, tmp_path):
    for patch in (0, 3):
        task = butler.get("object_kermes_models", data_id(patch))
        files = [butler.getURI("deep_coadd", data_id(patch), band=band).ospath for band in "gri"]
        library = kermes.deblend(kermes.read(files)).renumbered(first_number(0, patch, 4))
        expected = kermes.open(store.result_bytes(library))
        for name in ("objects", "parents", "blends", "candidates"):
            one, other = getattr(task, name), getattr(expected, name)
            assert one.colnames == other.colnames
            for column in one.colnames:
                np.testing.assert_array_equal(np.asarray(one[column]), np.asarray(other[column]), err_msg=column)
        assert task.inputs == expected.inputs
        np.testing.assert_array_equal(task.model_image(), expected.model_image())
        catalog = butler.get("object_kermes", data_id(patch))
        for column in library.objects.colnames:
            np.testing.assert_array_equal(np.asarray(catalog[column]), np.asarray(library.objects[column]))
            assert catalog[column].unit == library.objects[column].unit
            assert catalog[column].description == library.objects[column].description


def test_forced_fluxes_are_those_of_the_library(butler):
    models = butler.get("object_kermes_models", data_id(2))
    file = butler.getURI("deep_coadd", data_id(2), band="r").ospath
    expected = kermes.forced_photometry(models, kermes.read([file]))
    forced = butler.get("object_kermes_forced", data_id(2), band="r")
    for column in expected.colnames:
        np.testing.assert_array_equal(np.asarray(forced[column]), np.asarray(expected[column]))


def test_numbers_are_unique_and_one_patch_has_each_object_inside(butler, folder):
    tables = [butler.get("object_kermes", data_id(patch)) for patch in PATCHES]
    ids = np.concatenate([table["object_id"] for table in tables])
    assert len(np.unique(ids)) == len(ids)
    for patch, table in zip(PATCHES, tables, strict=True):
        assert set(table["object_id"] // NUMBERS) == {patch}
        assert set(table["patch"]) == {patch}
    inner = np.concatenate([np.asarray(table["is_patch_inner"]) for table in tables])
    y, x = (np.concatenate([np.asarray(table[name]) for table in tables])[inner] for name in "yx")
    # What several patches see is inside of one of them: no two of what remains are the same object.
    distance = np.hypot(y[:, None] - y, x[:, None] - x) + np.eye(len(y)) * 1e9
    assert distance.min() > 1.5
    truth = butler.get("deep_coadd_truth", skymap="kermes_sim", tract=0)
    bright = truth[(truth["peak_index"] >= 0) & (truth["snr"] > 30)]
    area = (bright["y"] > 60) & (bright["y"] < 640) & (bright["x"] > 60) & (bright["x"] < 640)
    found = np.hypot(np.asarray(bright["y"][area])[:, None] - y, np.asarray(bright["x"][area])[:, None] - x).min(axis=1)
    # A few of the bright ones are hidden by a brighter neighbour.
    assert np.mean(found < 2) > 0.9


def test_task_says_what_it_did(butler):
    metadata = butler.get("deblendPatch_metadata", data_id(1))["deblendPatch"]
    objects = butler.get("object_kermes", data_id(1))
    assert metadata["n_peaks"] == metadata["n_objects"] == len(objects)
    assert sum(metadata["outcomes"].to_dict().values()) == len(objects)
    assert metadata["seconds"] > 0


def test_submitted_run_has_the_same_results(butler):
    for patch in PATCHES:
        runs = ("u/me/deblend", "u/me/bps")
        tables = [butler.get("object_kermes", data_id(patch), collections=run) for run in runs]
        for column in tables[0].colnames:
            np.testing.assert_array_equal(np.asarray(tables[0][column]), np.asarray(tables[1][column]))
    assert len(butler.query_datasets("object_kermes_forced", collections="u/me/bps")) == 12


def test_settings_reach_the_model_and_scarlet_files_are_written(butler):
    run = "u/me/lite"
    result = butler.get("object_kermes_models", data_id(0), collections=run)
    assert (result.config.model, result.config.fit.max_iterations) == ("scarlet-lite", 30)
    models = butler.get("object_kermes_scarlet_models", data_id(0), collections=run)
    assert list(models.metadata["bands"]) == ["g", "r", "i"]
    # Read by the file, as Rubin's own are.
    ref = butler.find_dataset("object_kermes_scarlet_models", data_id(0), collections=run)
    whole = read_scarlet_dataset(butler, ref)
    assert set(whole.objects["object_id"]) == set(result.objects["object_id"])
    parent_id = int(result.parents["parent_id"][np.argmax(result.parents["n_peaks"])])
    part = read_scarlet_dataset(butler, ref, [parent_id])
    members = result.objects["object_id"][result.objects["parent_id"] == parent_id]
    assert part.objects["object_id"].tolist() == members.tolist()
    number = int(members[0])
    np.testing.assert_allclose(
        part[number].model("r").array.max(), result[number].model("r").array.max(), rtol=2e-2, atol=0
    )


def test_single_visit_is_deblended_with_templates(butler):
    visit = {"instrument": "KermesCam", "visit": 1, "detector": 0}
    names = ("source_kermes", "source_kermes_models")
    sources, models = (butler.get(name, visit, collections="u/me/visits") for name in names)
    assert len(sources) == len(models) > 50
    assert models.config.model == "templates"
    assert set(sources["visit"]) == {1}


def test_repositories_know_the_storage_classes(folder):
    assert "KermesResult" in (folder / "other" / "butler.yaml").read_text()
    assert "KermesResult" not in (folder / "plain" / "butler.yaml").read_text()
