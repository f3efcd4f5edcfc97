"""What is written is what is read, whole or not at all."""

import json
import os
import shutil
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import fsspec
import hypothesis.extra.numpy
import numpy as np
import pyarrow.parquet as pq
import pytest
from astropy import units
from astropy.table import Column, Table
from hypothesis import given
from hypothesis import strategies as st

import kermes
from kermes import component_rows, storage, store
from kermes.geometry import Box, Footprint, Footprints
from kermes.io import tables
from kermes.scene import CubeComponent, FactorizedComponent, PointComponent, ProfileComponent, Source
from results import ORIGIN, SHAPE, fitted_result, make_coadd, make_result

FILES = {
    "metadata.json",
    "objects.parquet",
    "parents.parquet",
    "blends.parquet",
    "candidates.parquet",
    "models.parquet",
    "index.parquet",
    "psfs.parquet",
    "footprints.parquet",
    "checksums.json",
    "timings.json",
}
PARQUET = sorted(file for file in FILES if file.endswith(".parquet"))
DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def result():
    return make_result()


@pytest.fixture
def written(result, tmp_path):
    """The result on disk, nothing of it rounded."""
    result.write(tmp_path / "out", tolerance=None)
    return tmp_path / "out"


def assert_same_table(got, expected):
    assert got.colnames == expected.colnames
    for name in expected.colnames:
        assert got[name].dtype == expected[name].dtype, name
        assert got[name].unit == expected[name].unit, name
        assert got[name].description == expected[name].description, name
        np.testing.assert_array_equal(np.asarray(got[name]), np.asarray(expected[name]), err_msg=name)


@pytest.mark.parametrize("name", ["objects", "parents", "blends", "candidates"])
def test_tables_come_back_exactly(result, written, name):
    assert_same_table(getattr(kermes.open(written), name), getattr(result, name))


def test_a_table_of_every_type_comes_back_exactly():
    table = Table(
        {
            "double": Column([0.1, np.nan], unit="deg", description="a double"),
            "single": Column(np.float32([1e-30, -np.inf]), unit=units.nJy**2),
            "integer": np.int32([1, -2]),
            "flag": [True, False],
            "text": np.array(["", "µ"], dtype="U8"),
        }
    )
    assert_same_table(tables.from_arrow(tables.to_arrow(table)), table)


def test_a_table_without_rows_comes_back_exactly():
    table = Table({"text": np.zeros(0, dtype="U3"), "flag": np.zeros(0, dtype=bool)})
    assert_same_table(tables.from_arrow(tables.to_arrow(table)), table)


def test_big_endian_columns_are_written_as_they_are_meant():
    table = Table({"flux": np.array([1.5, 2.5], dtype=">f4")})
    np.testing.assert_array_equal(tables.from_arrow(tables.to_arrow(table))["flux"], [1.5, 2.5])


def test_an_unknown_unit_keeps_its_name(tmp_path):
    unit = units.def_unit("adu_of_that_day")
    make_result(unit=unit).write(tmp_path / "out")
    assert kermes.open(tmp_path / "out").unit.to_string() == "adu_of_that_day"


def test_models_come_back_exactly(result, written):
    opened = kermes.open(written)
    assert list(opened.models) == list(result.models)
    for object_id, source in result.models.items():
        got = opened.models[object_id]
        assert got.peak == source.peak
        assert [component.box for component in got.components] == [component.box for component in source.components]
        for component, expected in zip(got.components, source.components, strict=True):
            np.testing.assert_array_equal(component.spectrum, expected.spectrum, strict=True)
            np.testing.assert_array_equal(component.morphology, expected.morphology, strict=True)


def test_profiles_come_back_exactly(tmp_path):
    result = fitted_result()
    result.write(tmp_path / "out")
    opened = kermes.open(tmp_path / "out")
    for object_id, source in result.models.items():
        got = opened.models[object_id]
        assert [type(component) for component in got.components] == [type(each) for each in source.components]
        for component, expected in zip(got.components, source.components, strict=True):
            if not isinstance(expected, ProfileComponent):
                continue
            for name in ("box", "radius", "index", "sigma"):
                assert getattr(component, name) == getattr(expected, name), name
            for name in ("spectrum", "center", "shear"):
                np.testing.assert_array_equal(getattr(component, name), getattr(expected, name), strict=True)


def test_stamps_of_profiles_are_the_same_after_opening(tmp_path):
    result = fitted_result()
    result.write(tmp_path / "out", tolerance=None)
    opened = kermes.open(tmp_path / "out", coadd=make_coadd())
    for handle in result:
        for what in ("model", "redistributed", "neighbor_subtracted"):
            got, expected = (getattr(each[handle.object_id], what)("r") for each in (opened, result))
            assert got.box == expected.box
            np.testing.assert_array_equal(got.array, expected.array)


def test_candidates_come_back_exactly(tmp_path):
    result = fitted_result()
    result.write(tmp_path / "out")
    assert len(result.candidates) == 2
    assert_same_table(kermes.open(tmp_path / "out").candidates, result.candidates)


def test_a_profile_takes_little_room(tmp_path):
    one, n = fitted_result(), 2000
    ids = np.arange(n)
    rng = np.random.default_rng(1)
    models = {}
    for object_id in ids.tolist():
        spectrum = rng.normal(size=2).astype(np.float32)
        models[object_id] = Source(
            peak=(31, 36), components=(replace(one.models[8].components[0], center=rng.uniform(30, 40, 2)),)
        )
        models[object_id] = replace(
            models[object_id], components=(replace(models[object_id].components[0], spectrum=spectrum),)
        )
    objects = one.objects[np.zeros(n, dtype=int)]
    objects["object_id"] = ids
    make_result(objects=objects, models=models).write(tmp_path / "out")
    # Two fluxes and a position are 24 bytes of noise; everything else is the same for all, and row groups are small.
    assert (tmp_path / "out" / "models.parquet").stat().st_size < 200 * n


def test_cubes_and_templates_come_back_exactly(tmp_path):
    rng = np.random.default_rng(3)
    cubes = {
        object_id: CubeComponent(
            cube=rng.normal(size=(2, 4, 5)).astype(np.float32), box=kermes.Box(30, 30, 4, 5), observed=object_id == 7
        )
        for object_id in (4, 7)
    }
    models = make_result().models | {
        object_id: Source(peak=(31, 31), components=(cube,)) for object_id, cube in cubes.items()
    }
    make_result(models=models).write(tmp_path / "out", tolerance=None)
    opened = kermes.open(tmp_path / "out")
    for object_id, cube in cubes.items():
        (got,) = opened.models[object_id].components
        assert (got.box, got.observed) == (cube.box, cube.observed)
        np.testing.assert_array_equal(got.cube, cube.cube, strict=True)


def test_components_of_other_kinds_are_not_written(tmp_path):
    point = PointComponent(spectrum=np.ones(2, dtype=np.float32), center=np.array([30.0, 30.0]), sigma=0.8)
    models = make_result().models | {7: Source(peak=(31, 31), components=(point,))}
    with pytest.raises(kermes.InputError, match="components must be factorized, cubes, profiles or templates"):
        make_result(models=models).write(tmp_path / "out")


def test_psfs_come_back_exactly_or_to_22_bits(tmp_path):
    result = fitted_result()
    psf = next(iter(result.psfs))
    result.write(tmp_path / "exact", tolerance=None)
    np.testing.assert_array_equal(kermes.open(tmp_path / "exact").psfs[psf], result.psfs[psf], strict=True)
    result.write(tmp_path / "rounded")
    again = kermes.open(tmp_path / "rounded", coadd=result.coadd)
    for one, other in zip(again.psfs[psf], result.psfs[psf], strict=True):
        assert 0 < np.abs(one - other).max() <= 2.0**-22 * other.max()
        assert abs(one.sum() - other.sum()) < 1e-5
    again.write(tmp_path / "again")
    np.testing.assert_array_equal(kermes.open(tmp_path / "again").psfs[psf], again.psfs[psf])


def test_a_shared_psf_is_stored_once(result, written):
    assert pq.read_metadata(written / "psfs.parquet").num_rows == len(result.bands)


def test_different_psfs_are_kept_apart(result, tmp_path):
    psfs = {1: result.psfs[1], 2: result.psfs[1][:, 2:-2, 2:-2]}
    make_result(psfs=psfs).write(tmp_path / "out")
    opened = kermes.open(tmp_path / "out")
    assert [opened.psfs[blend_id].shape for blend_id in (1, 2)] == [(2, 21, 21), (2, 17, 17)]


def test_stamps_are_the_same_after_opening_with_the_coadd(result, written):
    opened = kermes.open(written, coadd=make_coadd())
    for handle in result:
        for what in ("model", "redistributed", "neighbor_subtracted"):
            got, expected = (getattr(each[handle.object_id], what)("g") for each in (opened, result))
            assert got.box == expected.box
            np.testing.assert_array_equal(got.array, expected.array)


def test_everything_else_comes_back(result, written):
    opened = kermes.open(written)
    for name in ("bands", "config", "shape", "origin", "unit", "zero_point", "timings"):
        assert getattr(opened, name) == getattr(result, name), name
    assert opened.noise_factors.tolist() == result.noise_factors.tolist()


def test_the_sky_comes_back(result, written):
    # The header keeps 12 digits of degrees.
    got, expected = (wcs.pixel_to_world(3, 50) for wcs in (kermes.open(written).wcs, result.wcs))
    assert got.separation(expected).arcsec < 1e-6


def test_an_empty_result_comes_back(tmp_path):
    full = make_result()
    empty = make_result(objects=full.objects[:0], blends=full.blends[:0], parents=full.parents[:0], models={}, psfs={})
    empty.write(tmp_path / "out")
    opened = kermes.open(tmp_path / "out")
    assert len(opened) == 0
    assert not opened.model_image().any()


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    """A result of 3000 objects in 3000 blends on a grid, each with a morphology of its own."""
    one, n = make_result(), 3000
    ids = np.arange(1, n + 1)
    rng = np.random.default_rng(4)
    y, x = 40 * (ids // 60), 40 * (ids % 60)
    rng.shuffle(ids)
    objects, blends = (table[np.zeros(n, dtype=int)] for table in (one.objects, one.blends))
    objects["object_id"] = objects["blend_id"] = blends["blend_id"] = ids
    blends["y0"], blends["x0"] = y + ORIGIN[0], x + ORIGIN[1]
    blends["height"] = blends["width"] = 20
    models = {}
    for object_id, y0, x0 in zip(ids.tolist(), y.tolist(), x.tolist(), strict=True):
        component = FactorizedComponent(
            spectrum=rng.uniform(1, 9, 2).astype(np.float32),
            morphology=rng.uniform(0, 1, (9, 9)).astype(np.float32),
            box=kermes.Box(y0 + 5, x0 + 5, 9, 9),
        )
        models[object_id] = Source(peak=(y0 + 9, x0 + 9), components=(component,))
    result = make_result(
        with_coadd=False,
        objects=objects,
        blends=blends,
        models=models,
        psfs=dict.fromkeys(ids.tolist(), one.psfs[1]),
        shape=(2050, 2400),
        wcs=None,
    )
    path = tmp_path_factory.mktemp("crowd") / "out"
    result.write(path)
    return result, path


def test_one_object_costs_a_small_part_of_the_file(crowd):
    result, path = crowd
    size = (path / "models.parquet").stat().st_size
    opened = kermes.open(path)
    before = opened.models.bytes_read
    opened.models[333]
    # Of a dozen row groups one is read, and the index and the footer of the file.
    assert opened.models.bytes_read - before < size / 4
    np.testing.assert_array_equal(
        opened.models[333].components[0].morphology, result.models[333].components[0].morphology
    )


def test_every_object_is_found_by_its_number(crowd):
    result, path = crowd
    opened = kermes.open(path)
    assert list(opened.models) == list(result.objects["object_id"])
    for object_id in (1, 1500, 3000):
        assert opened[object_id].peak == result[object_id].peak
        assert opened[object_id].blend_id == object_id
    for missing in (0, 3001, -1, 2**40, "7", None):
        with pytest.raises(kermes.InputError, match="object_id must be one of the 3000"):
            opened[missing]


def test_objects_near_a_position_are_found_without_the_tables(crowd):
    result, path = crowd
    opened = kermes.open(path)
    # The eight around the nearest lie 40 pixels from it along the axes, 57 along the diagonals.
    y, x = 40 * 20 + 9 + ORIGIN[0], 40 * 30 + 9 + ORIGIN[1]
    before = opened.models.bytes_read
    found = opened.near(y=y + 3, x=x, radius=50)
    assert opened.models.bytes_read - before < (path / "models.parquet").stat().st_size / 2
    assert len(found) == 5
    assert found[0].peak == (y, x)
    assert [each.object_id for each in found] == [each.object_id for each in result.near(y=y + 3, x=x, radius=50)]


def test_blends_that_are_near_each_other_lie_in_one_row_group(crowd):
    file = pq.ParquetFile(crowd[1] / "models.parquet")
    assert file.num_row_groups > 5
    for number in range(file.num_row_groups - 1):
        rows = file.read_row_group(number, columns=["peak_y", "peak_x"])
        area = np.prod([np.ptp(rows[name].to_numpy()) + 40 for name in ("peak_y", "peak_x")])
        assert area < 6 * 40**2 * rows.num_rows  # strips of one row of blends would be as wide as the image


def test_the_same_result_gives_the_same_bytes(result, tmp_path):
    for name in ("a", "b"):
        result.write(tmp_path / name)
    for file in FILES:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_what_was_opened_is_written_as_it_was(written, tmp_path):
    kermes.open(written).write(tmp_path / "again")
    for file in FILES:
        assert (written / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_what_was_rounded_is_written_as_it_was(tmp_path):
    fitted_result().write(tmp_path / "out")
    kermes.open(tmp_path / "out").write(tmp_path / "again")
    kermes.open(tmp_path / "out", coadd=make_coadd()).write(tmp_path / "with_coadd")
    for file in FILES:
        content = (tmp_path / "out" / file).read_bytes()
        assert content == (tmp_path / "again" / file).read_bytes(), file
        assert content == (tmp_path / "with_coadd" / file).read_bytes(), file


def test_timings_are_in_their_own_file_alone(result, written, tmp_path):
    make_result(timings={"fit": 99.0}).write(tmp_path / "slow", tolerance=None)
    differ = {file for file in FILES if (written / file).read_bytes() != (tmp_path / "slow" / file).read_bytes()}
    assert differ == {"timings.json"}


def test_every_parquet_file_says_what_it_belongs_to(written):
    expected = json.loads((written / "metadata.json").read_text())
    for file in written.glob("*.parquet"):
        assert json.loads(pq.read_schema(file).metadata[b"kermes"]) == expected


def test_units_can_be_read_without_kermes(written):
    field = pq.read_schema(written / "objects.parquet").field("g_flux")
    assert field.metadata[b"unit"] == b"nJy"


def test_a_written_result_can_be_read_by_others(written):
    mask = os.umask(0)
    os.umask(mask)
    assert written.stat().st_mode & 0o777 == 0o777 & ~mask


def test_extra_files_lie_beside_the_tables(result, tmp_path):
    store.write_result(result, tmp_path / "out", extras={"picture.png": b"pixels"})
    assert (tmp_path / "out" / "picture.png").read_bytes() == b"pixels"


# ---------------------------------------------------------------- whole or not at all


def test_an_existing_result_is_kept(result, written):
    before = (written / "metadata.json").stat().st_ino
    with pytest.raises(kermes.FileError, match=r"output must be new, got .*out, which exists"):
        result.write(written)
    assert (written / "metadata.json").stat().st_ino == before


def test_an_existing_result_is_replaced_on_request(written):
    make_result(timings={"fit": 7.0}).write(written, overwrite=True)
    assert kermes.open(written).timings == {"fit": 7.0}
    assert os.listdir(written.parent) == ["out"]


def test_an_empty_directory_may_be_filled(result, tmp_path):
    (tmp_path / "out").mkdir()
    result.write(tmp_path / "out")
    assert set(os.listdir(tmp_path / "out")) == FILES


def test_a_directory_of_something_else_is_never_replaced(result, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(kermes.FileError, match="output must be new, or a result of kermes"):
        result.write(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_a_file_is_never_replaced(result, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(kermes.FileError, match="output must be a directory, got the file"):
        result.write(tmp_path / "out", overwrite=True)


def test_a_missing_parent_directory_is_an_error(result, tmp_path):
    with pytest.raises(kermes.FileError, match="output must lie in a directory that exists"):
        result.write(tmp_path / "missing" / "out")


@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_nothing_behind(result, tmp_path, monkeypatch, exception):
    def fail(*args):
        raise exception

    monkeypatch.setattr(store, "write_models", fail)
    with pytest.raises(exception):
        result.write(tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_failure_keeps_what_was_there(result, written, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write_models", fail)
    with pytest.raises(kermes.FileError, match=r"output .* cannot be written: No space left on device"):
        result.write(written, overwrite=True)
    assert os.listdir(written.parent) == ["out"]
    assert len(kermes.open(written)) == len(result)


# ---------------------------------------------------------------- what cannot be opened


def test_a_missing_result_is_an_error(tmp_path):
    with pytest.raises(kermes.FileError, match=r"must be the directory of a kermes result, got .* does not exist"):
        kermes.open(tmp_path / "nowhere")


def test_a_directory_of_something_else_is_an_error(tmp_path):
    (tmp_path / "metadata.json").write_text("[1]")
    with pytest.raises(kermes.FileError, match=r"must be the directory of a kermes result, got .* is not one"):
        kermes.open(tmp_path)


def test_a_file_is_not_a_result(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(kermes.FileError, match="is not one"):
        kermes.open(tmp_path / "out")


@pytest.mark.parametrize("schema", [1, 2])
def test_results_of_earlier_schemas_open(schema):
    expected = {1: make_result, 2: fitted_result}[schema]()
    opened = kermes.open(DATA / f"result_schema_{schema}", coadd=make_coadd())
    for got, wanted in ((opened.objects, expected.objects), (opened.blends, expected.blends)):
        assert len(got.colnames) > 10
        for name in set(got.colnames) & set(wanted.colnames):  # later versions may have others
            np.testing.assert_array_equal(np.asarray(got[name]), np.asarray(wanted[name]), err_msg=name)
    assert len(opened.candidates) == {1: 0, 2: 2}[schema]
    assert list(opened.models) == list(expected.models)
    for handle in expected:
        for what in ("model", "redistributed"):
            got, wanted = (getattr(each[handle.object_id], what)("g") for each in (opened, expected))
            np.testing.assert_allclose(got.array, wanted.array, rtol=0, atol=1e-4)  # of fluxes of hundreds


@pytest.mark.parametrize("schema", [1, 2])
def test_results_of_earlier_schemas_can_be_written_anew(schema, tmp_path):
    old = kermes.open(DATA / f"result_schema_{schema}")
    old.write(tmp_path / "new")
    new = kermes.open(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "metadata.json").read_text())["schema"] == store.SCHEMA
    for handle in old:
        np.testing.assert_array_equal(new[handle.object_id].model("r").array, handle.model("r").array)


def test_a_newer_schema_is_refused(written):
    metadata = json.loads((written / "metadata.json").read_text())
    (written / "metadata.json").write_text(json.dumps(metadata | {"schema": store.SCHEMA + 1}))
    with pytest.raises(kermes.FileError, match=r"newer kermes.*upgrade"):
        kermes.open(written)


@pytest.mark.parametrize("file", PARQUET)
def test_a_truncated_file_is_named(written, file):
    content = (written / file).read_bytes()
    (written / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(kermes.FileError, match=f"{file} must be a file of a kermes result, but is damaged"):
        kermes.open(written)


@pytest.mark.parametrize("file", PARQUET)
def test_a_missing_file_is_named(written, file):
    (written / file).unlink()
    with pytest.raises(kermes.FileError, match=f"must be a complete kermes result, but {file} is missing"):
        kermes.open(written)


def test_a_flipped_bit_in_a_model_is_an_error(written):
    file = written / "models.parquet"
    column = pq.read_metadata(file).row_group(0).column(13)
    content = bytearray(file.read_bytes())
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(kermes.FileError, match=r"models\.parquet must be a file of a kermes result, but is damaged"):
        kermes.open(written)[7].model("g")


def test_altered_metadata_are_an_error(written):
    text = (written / "metadata.json").read_text()
    (written / "metadata.json").write_text(text.replace('"nJy"', '"mJy"'))
    with pytest.raises(kermes.FileError, match=r"metadata\.json must be .* damaged: its checksum is wrong"):
        kermes.open(written)


def test_missing_metadata_are_an_error(written):
    shutil.rmtree(written)
    shutil.copytree(DATA / "result_schema_2", written)
    metadata = json.loads((written / "metadata.json").read_text())
    del metadata["origin"]
    (written / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(kermes.FileError, match="metadata are damaged: 'origin'"):
        kermes.open(written)


@pytest.mark.parametrize("file", ["models.parquet", "objects.parquet", "metadata.json", "checksums.json"])
def test_a_file_of_another_result_is_refused(written, tmp_path, file):
    fitted_result().write(tmp_path / "other")
    shutil.copy(tmp_path / "other" / file, written / file)
    with pytest.raises(kermes.FileError, match="is damaged"):
        read_everything(kermes.open(written))


def read_everything(result):
    """Use all that a result holds; returns numbers that depend on all of it."""
    for table in (result.objects, result.parents, result.blends, result.candidates):
        assert len(table.colnames) > 3
    fluxes = [result.models[number].flux(len(result.bands)).tolist() for number in result.models]
    psfs = [float(result.psfs[number].sum()) for number in result.psfs]
    areas = [footprint.area for footprint in result.footprints.values()]
    return fluxes, psfs, areas, result.timings, result.model_image().tobytes()


def test_whatever_is_altered_is_refused_and_never_taken_for_data(tmp_path):
    # The pages of Parquet files are a small part of the files of a small result; most of it are footers.
    fitted_result(with_coadd=False).write(tmp_path / "out")
    files = {file.name: file.read_bytes() for file in sorted((tmp_path / "out").iterdir())}
    rng = np.random.default_rng(5)
    for trial in range(60):
        name = [*files][trial % len(files)]
        content = bytearray(files[name])
        place = int(rng.integers(len(content)))
        if trial % 3 == 0:
            content = content[:place]
        else:
            content[place] ^= int(rng.integers(1, 256))
        (tmp_path / "out" / name).write_bytes(bytes(content))
        with pytest.raises(kermes.FileError):
            read_everything(kermes.open(tmp_path / "out"))
        (tmp_path / "out" / name).write_bytes(files[name])
    read_everything(kermes.open(tmp_path / "out"))


def test_another_program_s_tables_are_refused(written):
    pq.write_table(pq.read_table(written / "objects.parquet"), written / "objects.parquet")
    with pytest.raises(kermes.FileError, match=r"objects\.parquet must be a file of a kermes result, but is damaged"):
        kermes.open(written)


# ---------------------------------------------------------------- rounding


def rendered_difference(result, path):
    """Largest difference of stored models as observed, in sigma of the pixel."""
    opened, coadd, largest = kermes.open(path), result.coadd, 0.0
    for handle in result:
        for b, band in enumerate(result.bands):
            got, expected = opened[handle.object_id].model(band), handle.model(band)
            window = (b, *expected.box.within(coadd.box))
            noise = np.sqrt(np.where(coadd.valid[window], coadd.variance[window], np.inf))
            largest = max(largest, (np.abs(got.array - expected.array) / noise).max(initial=0.0))
    return largest


@pytest.mark.parametrize("tolerance", [0.01, 0.05, 1.0])
def test_stored_models_stay_within_the_tolerance(tmp_path, tolerance):
    result = make_result()
    result.write(tmp_path / "out", tolerance=tolerance)
    difference = rendered_difference(result, tmp_path / "out")
    assert difference <= tolerance
    assert difference > 0  # else nothing would be saved
    assert kermes.open(tmp_path / "out").tolerance == tolerance


def test_fluxes_in_the_tables_are_never_rounded(result, tmp_path):
    result.write(tmp_path / "out", tolerance=5.0)
    assert_same_table(kermes.open(tmp_path / "out").objects, result.objects)


def test_a_coarser_tolerance_takes_less_room(tmp_path):
    rng = np.random.default_rng(6)
    wide = FactorizedComponent(
        spectrum=np.float32([40, 50]), morphology=rng.uniform(0, 1, (40, 40)).astype(np.float32), box=Box(5, 5, 40, 40)
    )
    sizes = []
    for tolerance in (None, 0.01, 0.05, 0.5):
        models = make_result().models | {7: Source(peak=(25, 25), components=(wide,))}
        make_result(models=models).write(tmp_path / "out", overwrite=True, tolerance=tolerance)
        sizes.append((tmp_path / "out" / "models.parquet").stat().st_size)
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("tolerance", [0, -1.0, np.nan, np.inf])
def test_a_tolerance_must_be_positive(result, tmp_path, tolerance):
    with pytest.raises(kermes.InputError, match="tolerance must be positive, or None"):
        result.write(tmp_path / "out", tolerance=tolerance)


pixels = hypothesis.extra.numpy.arrays(
    np.float32, (2, 3, 4), elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
)


@given(pixels, st.floats(1e-6, 1e6))
def test_rounding_keeps_its_promise_and_needs_few_bits(planes, error):
    rounded = component_rows.rounded(planes, np.array([error, error]))
    # Half a unit of the last bit of a float32 comes from the multiplication with the step.
    assert (np.abs(rounded - planes) <= error + 1e-7 * np.abs(planes)).all()


@given(pixels)
def test_whole_numbers_are_exact_where_they_are_used(planes):
    whole = component_rows.levels_of(planes)
    if whole is not None:
        levels, steps = whole
        np.testing.assert_array_equal((levels * steps[:, None, None]).astype(np.float32), planes)


def test_rounded_pixels_are_written_as_whole_numbers():
    planes = np.random.default_rng(1).uniform(0, 1, (1, 9, 9)).astype(np.float32)
    levels, steps = component_rows.levels_of(component_rows.rounded(planes, np.array([0.003])))
    assert steps == [2.0**-8]  # the largest power of two that is not above twice the error
    assert levels.max() <= 256


# ---------------------------------------------------------------- footprints, near, inputs


def test_footprints_come_back(tmp_path):
    mask = np.random.default_rng(2).uniform(size=SHAPE) > 0.5
    footprints = {3: Footprint.of_mask(mask, 0, 0), 8: Footprint.of_mask(mask[:5, :7], 50, 60)}
    make_result(footprints=Footprints.of(footprints)).write(tmp_path / "out")
    opened = kermes.open(tmp_path / "out")
    assert list(opened.footprints) == [3, 8]
    for number, footprint in footprints.items():
        np.testing.assert_array_equal(opened.footprints[number].spans, footprint.spans)


def test_another_coadd_is_warned_of(written):
    other = replace(make_coadd(), images=make_coadd().images + 1)
    with pytest.warns(kermes.errors.DataWarning, match="coadd must be the one that .* was made from"):
        kermes.open(written, coadd=other)


def test_positions_must_be_whole(result):
    for words in ({"y": 1.0}, {"ra": 1.0, "dec": 2.0, "y": 3.0, "x": 4.0}, {}):
        with pytest.raises(kermes.InputError, match="position must be y and x or ra and dec"):
            result.near(**words, radius=1.0)
    with pytest.raises(kermes.InputError, match="radius must be >= 0"):
        result.near(y=1.0, x=1.0, radius=-1.0)
    with pytest.raises(kermes.InputError, match="ra and dec need a WCS"):
        make_result(wcs=None).near(ra=1.0, dec=2.0, radius=1.0)


def test_a_position_on_the_sky_is_that_of_its_pixel(result, written):
    (y, x) = result[7].peak
    sky = result.wcs.pixel_to_world(x - ORIGIN[1], y - ORIGIN[0])
    for each in (result, kermes.open(written)):
        assert [handle.object_id for handle in each.near(ra=sky.ra.deg, dec=sky.dec.deg, radius=0.5)] == [7]
        # 0.2 arcsec per pixel: the pair is 6.1 pixels apart.
        assert [handle.object_id for handle in each.near(ra=sky.ra.deg, dec=sky.dec.deg, radius=1.3)] == [7, 4]


# ---------------------------------------------------------------- one file


def test_a_result_may_be_one_file(result, written, tmp_path):
    path = tmp_path / "out.kermes"
    for options in ({}, {"overwrite": True}):
        result.write(path, tolerance=None, **options)
    assert path.is_file()
    assert read_everything(kermes.open(path)) == read_everything(kermes.open(written))
    opened = kermes.open(path, coadd=make_coadd())
    np.testing.assert_array_equal(opened[7].redistributed("g").array, result[7].redistributed("g").array)
    with pytest.raises(kermes.FileError, match="which exists; overwrite replaces it"):
        result.write(path)
    # It is an archive of the directory that it stands for.
    with zipfile.ZipFile(path) as archive:
        assert set(archive.namelist()) == FILES
        archive.extractall(tmp_path / "unpacked")
    assert read_everything(kermes.open(tmp_path / "unpacked")) == read_everything(kermes.open(path))


def test_one_object_of_one_file_costs_a_small_part_of_it(crowd, tmp_path):
    path = tmp_path / "out.kermes"
    kermes.open(crowd[1]).write(path)
    opened = kermes.open(path)
    assert opened[333].peak == crowd[0][333].peak
    assert opened.models.bytes_read < path.stat().st_size / 4


def test_one_file_that_is_damaged_is_refused(result, tmp_path):
    path = tmp_path / "out.kermes"
    result.write(path)
    content = path.read_bytes()
    rng = np.random.default_rng(7)
    harmless = 0
    for _ in range(40):
        damaged = bytearray(content)
        damaged[rng.integers(len(content))] ^= int(rng.integers(1, 256))
        path.write_bytes(bytes(damaged[: rng.integers(len(content))] if rng.uniform() < 0.3 else damaged))
        try:
            found = read_everything(kermes.open(path))
        except kermes.FileError:
            continue
        harmless += 1  # dates and permissions of an archive say nothing
        path.write_bytes(content)
        assert found == read_everything(kermes.open(path))
    assert harmless < 8


def test_what_has_the_name_of_one_file_and_is_none(result, tmp_path):
    (tmp_path / "a.kermes").mkdir()
    with pytest.raises(kermes.FileError, match=r"output must be a file, as its name ends in \.kermes"):
        result.write(tmp_path / "a.kermes", overwrite=True)
    (tmp_path / "b.kermes").write_text("mine")
    with pytest.raises(kermes.FileError, match="output must be new, or a result of kermes to replace"):
        result.write(tmp_path / "b.kermes", overwrite=True)
    assert (tmp_path / "b.kermes").read_text() == "mine"
    with pytest.raises(kermes.FileError, match="does not exist"):
        kermes.open(tmp_path / "c.kermes")
    with zipfile.ZipFile(tmp_path / "d.kermes", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("metadata.json", "{}" * 100)
    with pytest.raises(kermes.FileError, match="is compressed"):
        kermes.open(tmp_path / "d.kermes")


# ---------------------------------------------------------------- other file systems


def test_a_result_lives_on_any_file_system(tmp_path):
    path = f"memory://{tmp_path.name}/out"
    result = fitted_result()
    result.write(path, tolerance=None)
    for _ in range(2):
        opened = kermes.open(path)
        assert read_everything(opened) == read_everything(kermes.open(path))
        with pytest.raises(kermes.FileError, match="which exists; overwrite replaces it"):
            result.write(path)
        result.write(path, overwrite=True, tolerance=None)
    filesystem = fsspec.filesystem("memory")
    # One directory and the file that names it; the earlier one is gone.
    assert len(filesystem.ls(f"/{tmp_path.name}/out")) == 2


def test_one_file_lives_on_any_file_system(tmp_path):
    path = f"memory://{tmp_path.name}/out.kermes"
    make_result().write(path)
    make_result().write(path, overwrite=True)
    assert len(kermes.open(path)) == 4


def test_a_failed_upload_keeps_what_was_there(tmp_path, monkeypatch):
    path = f"memory://{tmp_path.name}/out"
    make_result().write(path, tolerance=None)
    filesystem = fsspec.filesystem("memory")
    original, calls = filesystem.pipe_file, []

    def fail(name, content, **options):
        calls.append(name)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        return original(name, content, **options)

    monkeypatch.setattr(type(filesystem), "pipe_file", staticmethod(fail))
    with pytest.raises(kermes.FileError, match="No space left on device"):
        fitted_result().write(path, overwrite=True)
    monkeypatch.undo()
    np.testing.assert_array_equal(kermes.open(path)[7].model("g").array, make_result()[7].model("g").array)
    assert len(filesystem.ls(f"/{tmp_path.name}/out")) == 2


def test_what_fsspec_cannot_read_is_an_error():
    with pytest.raises(kermes.FileError, match="path must be one that fsspec can read"):
        kermes.open("nosuchprotocol://out")


# ---------------------------------------------------------------- writers at odds


@pytest.mark.parametrize("swaps", [True, False])
def test_two_writers_leave_one_whole_result(tmp_path, monkeypatch, swaps):
    if not swaps:
        monkeypatch.setattr(storage, "_swap", lambda one, other: False)
    results = [make_result(), fitted_result()]
    expected = [result[7].model("g").array.sum() for result in results]
    results[0].write(tmp_path / "out", tolerance=None)
    seen, failures = set(), []

    def write(result):
        for _ in range(10):
            try:
                result.write(tmp_path / "out", overwrite=True, tolerance=None)
            except kermes.FileError as error:
                failures.append(error)

    with ThreadPoolExecutor(2) as pool:
        writers = [pool.submit(write, result) for result in results]
        while not all(writer.done() for writer in writers):
            try:
                seen.add(float(kermes.open(tmp_path / "out")[7].model("g").array.sum()))
            except kermes.FileError:  # it was replaced while it was read: never a mixture
                continue
    for writer in writers:
        writer.result()
    seen.add(float(kermes.open(tmp_path / "out")[7].model("g").array.sum()))
    assert seen <= set(map(float, expected))
    if swaps and sys.platform in ("linux", "darwin"):
        assert not failures
    assert os.listdir(tmp_path) == ["out"]


def test_a_disk_that_fills_up_keeps_what_was_there(written):
    resource = pytest.importorskip("resource")
    before = read_everything(kermes.open(written))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # smaller than most of the files
    try:
        with pytest.raises(kermes.FileError, match="cannot be written"):
            fitted_result().write(written, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_everything(kermes.open(written)) == before
    assert os.listdir(written.parent) == ["out"]


def test_a_result_without_timings_opens(written):
    (written / "timings.json").unlink()
    assert kermes.open(written).timings == {}


def test_a_moved_result_opens(written, tmp_path):
    shutil.move(written, tmp_path / "elsewhere")
    assert kermes.open(tmp_path / "elsewhere")[7].model("g").array.any()
