"""What is written is what is read, whole or not at all."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from astropy import units
from astropy.table import Column, Table

import kermes
from kermes import store
from kermes.scene import CubeComponent, ProfileComponent, Source
from results import fitted_result, make_coadd, make_result

FILES = {
    "metadata.json",
    "objects.parquet",
    "parents.parquet",
    "blends.parquet",
    "candidates.parquet",
    "models.parquet",
    "psfs.parquet",
    "timings.json",
}


@pytest.fixture(scope="module")
def result():
    return make_result()


@pytest.fixture
def written(result, tmp_path):
    result.write(tmp_path / "out")
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
    assert_same_table(store.from_arrow(store.to_arrow(table)), table)


def test_a_table_without_rows_comes_back_exactly():
    table = Table({"text": np.zeros(0, dtype="U3"), "flag": np.zeros(0, dtype=bool)})
    assert_same_table(store.from_arrow(store.to_arrow(table)), table)


def test_big_endian_columns_are_written_as_they_are_meant():
    table = Table({"flux": np.array([1.5, 2.5], dtype=">f4")})
    np.testing.assert_array_equal(store.from_arrow(store.to_arrow(table))["flux"], [1.5, 2.5])


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
    result.write(tmp_path / "out")
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


def test_components_of_other_kinds_are_not_written(tmp_path):
    cube = CubeComponent(cube=np.ones((2, 3, 3), dtype=np.float32), box=kermes.Box(30, 30, 3, 3))
    models = make_result().models | {7: Source(peak=(31, 31), components=(cube,))}
    with pytest.raises(
        kermes.InputError, match="components must be factorized, profiles or templates to be written, got a Cube"
    ):
        make_result(models=models).write(tmp_path / "out")


def test_psfs_come_back_exactly(result, written):
    np.testing.assert_array_equal(kermes.open(written).psfs[2], result.psfs[2], strict=True)


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


def test_one_object_costs_one_small_read(tmp_path, monkeypatch):
    one = make_result()
    ids = np.arange(400)
    objects = one.objects[np.zeros(400, dtype=int)]
    objects["object_id"] = ids
    make_result(objects=objects, models=dict.fromkeys(ids.tolist(), one.models[7])).write(tmp_path / "out")
    file = pq.ParquetFile(tmp_path / "out" / "models.parquet")
    rows = max(file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups))
    opened = kermes.open(tmp_path / "out")

    read = []
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda *args: read.append(args[1]) or original(*args))
    opened[333].model("g")

    assert rows <= 64
    assert len(read) == 2  # one of the models, one of the PSFs


def test_the_same_result_gives_the_same_bytes(result, tmp_path):
    for name in ("a", "b"):
        result.write(tmp_path / name)
    for file in FILES:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_what_was_opened_is_written_as_it_was(written, tmp_path):
    kermes.open(written).write(tmp_path / "again")
    for file in FILES:
        assert (written / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_timings_are_in_their_own_file_alone(result, written, tmp_path):
    make_result(timings={"fit": 99.0}).write(tmp_path / "slow")
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


def as_first_schema(folder):
    """Turn a written result of factorized components into what the first version wrote."""
    metadata = json.loads((folder / "metadata.json").read_text())
    (folder / "metadata.json").write_text(json.dumps(metadata | {"schema": 1}))
    (folder / "candidates.parquet").unlink()
    models = pq.read_table(folder / "models.parquet")
    groups = pq.read_metadata(folder / "models.parquet").num_rows
    pq.write_table(models.select(models.column_names[:12]), folder / "models.parquet", row_group_size=groups)


def test_a_result_of_the_first_schema_opens(result, written):
    as_first_schema(written)
    opened = kermes.open(written)
    assert len(opened.candidates) == 0
    np.testing.assert_array_equal(opened[4].model("g").array, result[4].model("g").array)


def test_a_newer_schema_is_refused(written):
    metadata = json.loads((written / "metadata.json").read_text())
    (written / "metadata.json").write_text(json.dumps(metadata | {"schema": store.SCHEMA + 1}))
    with pytest.raises(kermes.FileError, match=r"newer kermes.*upgrade"):
        kermes.open(written)


@pytest.mark.parametrize("file", sorted(FILES - {"timings.json", "metadata.json"}))
def test_a_truncated_file_is_named(written, file):
    content = (written / file).read_bytes()
    (written / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(kermes.FileError, match=f"{file} must be a file of a kermes result, but is damaged"):
        kermes.open(written)


@pytest.mark.parametrize("file", sorted(FILES - {"timings.json", "metadata.json"}))
def test_a_missing_file_is_named(written, file):
    (written / file).unlink()
    with pytest.raises(kermes.FileError, match=f"must be a complete kermes result, but {file} is missing"):
        kermes.open(written)


def test_a_flipped_bit_in_a_model_is_an_error(written):
    file = written / "models.parquet"
    column = pq.read_metadata(file).row_group(0).column(11)
    content = bytearray(file.read_bytes())
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(kermes.FileError, match=r"models\.parquet must be a file of a kermes result, but is damaged"):
        kermes.open(written)[7].model("g")


def test_damaged_metadata_are_an_error(written):
    metadata = json.loads((written / "metadata.json").read_text())
    del metadata["origin"]
    (written / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(kermes.FileError, match="metadata are damaged: 'origin'"):
        kermes.open(written)


def test_a_result_without_timings_opens(written):
    (written / "timings.json").unlink()
    assert kermes.open(written).timings == {}


def test_a_moved_result_opens(written, tmp_path):
    shutil.move(written, tmp_path / "elsewhere")
    assert kermes.open(tmp_path / "elsewhere")[7].model("g").array.any()
