"""What is wrong with one patch is said, and does no harm to the others."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from lsst.daf.butler import Butler

from cell_coadds import without
from kermes.lsst import PIPELINE, coadd_of_images, make_repository
from kermes.lsst.images import box_of, cell_coadd


def place(patch, band=None):
    return {"skymap": "kermes_sim", "tract": 0, "patch": patch} | ({} if band is None else {"band": band})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Patches: whole, without one band, damaged, without data, with a cell without data; and the run over them."""
    root = tmp_path_factory.mktemp("bad") / "repo"
    options = {"patches": (1, 5), "bands": ("g", "r"), "patch_size": 90, "cell": 30, "visits": False, "seed": 5}
    make_repository(root, **options).close()
    with Butler.from_config(str(root), writeable=True, run="kermes/inputs") as butler:
        tract = box_of(butler.get("deep_coadd.bbox", place(0, "g")))

        def replace(patch, band, empty):
            """Put a coadd in the place of another, without data in a part of it."""
            image = butler.get("deep_coadd", place(patch, band))
            coadd = coadd_of_images([image])
            if empty == "all":
                empty = coadd.box
            made = cell_coadd(
                without(coadd, empty),
                band,
                cell=30,
                skymap="kermes_sim",
                tract=0,
                tract_box=tract,
                patch=patch,
                patch_place=(0, patch),
                inner=box_of(image.patch.inner_bbox),
            )
            remove(patch, band)
            butler.put(made, "deep_coadd", place(patch, band))

        def remove(patch, band):
            ref = butler.find_dataset("deep_coadd", place(patch, band))
            butler.pruneDatasets([ref], disassociate=True, unstore=True, purge=True)

        remove(1, "r")
        damaged = butler.getURI("deep_coadd", place(2, "g")).ospath
        replace(3, "g", "all")
        replace(3, "r", "all")
        corner = box_of(butler.get("deep_coadd.bbox", place(4, "r")))
        replace(4, "r", type(corner)(corner.y0, corner.x0, 30, 30))
    with open(damaged, "r+b") as file:
        file.truncate(os.path.getsize(damaged) // 2)
    command = [Path(sys.executable).with_name("pipetask"), "run", "-b", root, "-i", "kermes/inputs", "-o", "u/bad"]
    command += ["-p", PIPELINE, "--register-dataset-types", "-c", "deblendPatch:bands=['g', 'r']"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    with Butler.from_config(str(root), collections="u/bad") as butler:
        yield done, butler


def patches_with(butler, name):
    return sorted({ref.dataId["patch"] for ref in butler.query_datasets(name, explain=False)})


def test_other_patches_are_done(run):
    done, butler = run
    assert patches_with(butler, "object_kermes") == [0, 1, 4]
    assert patches_with(butler, "object_kermes_forced") == [0, 1, 4]
    assert done.returncode != 0  # because of the damaged file


def test_damaged_file_is_named(run):
    done, _ = run
    assert "FileError: the image of tract 0, patch 2, band g cannot be read: " in done.stderr


def test_patch_without_data_is_no_failure(run):
    done, _ = run
    assert "no pixel of the patch has data" in done.stderr
    failures = [line for line in done.stderr.splitlines() if "ERROR: " in line and "patch: " in line]
    assert failures
    assert [line for line in failures if "patch: 2" not in line] == []


def test_band_that_is_missing_has_no_values(run):
    done, butler = run
    objects = butler.get("object_kermes", place(1))
    assert np.isnan(objects["r_flux"]).all()
    assert np.isfinite(objects["g_flux"]).all()
    assert objects.colnames == butler.get("object_kermes", place(0)).colnames
    assert "tract 0, patch 1 has no coadd in the bands r" in done.stderr
    assert [ref.dataId["band"] for ref in butler.query_datasets("object_kermes_forced", data_id=place(1))] == ["g"]


def test_cell_without_data_is_no_failure(run):
    _, butler = run
    objects = butler.get("object_kermes", place(4))
    box = box_of(butler.get("deep_coadd.bbox", place(4, "r"), collections="kermes/inputs"))
    inside = (objects["y"] < box.y0 + 29) & (objects["x"] < box.x0 + 29)
    assert np.isfinite(objects["r_flux"][~inside]).all()
    assert np.isnan(objects["r_flux"][(objects["y"] < box.y0 + 10) & (objects["x"] < box.x0 + 10)]).all()
