"""The command line does what it says, and ends with one clear line when it cannot."""

import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from astropy.io import fits
from astropy.table import Table
from matplotlib.image import imread

import kermes
from kermes import cli, io, photometry
from kermes.config import Config, config_from_dict, load_config
from kermes.io.tables import from_arrow
from kermes.metrics import FRACTIONS, overlap_fractions
from kermes.simulation import simulate_patch, simulate_scene

ONE_PASS = ["--set", "fit.max_iterations=2"]


@pytest.fixture(scope="module")
def scene():
    return simulate_scene(n_sources=4, shape=(48, 52), bands=("g", "r"), magnitudes=(19.5, 22.0), seed=3)


@pytest.fixture(scope="module")
def archive(scene, tmp_path_factory):
    path = tmp_path_factory.mktemp("input") / "scene.npz"
    io.write_npz(path, scene.coadd, peaks=scene.peaks)
    return path


@pytest.fixture(scope="module")
def output(archive, tmp_path_factory):
    """A result of the archive, with its picture."""
    path = tmp_path_factory.mktemp("output") / "out"
    assert cli.run(["deblend", str(archive), "-o", str(path), *ONE_PASS]) == 0
    return path


def fits_options(scene, folder):
    """Options of a scene written as one FITS file per band and plane."""
    words = []
    for b, band in enumerate(scene.coadd.bands):
        planes = {
            "image": scene.coadd.images[b],
            "variance": scene.coadd.variance[b],
            "psf": scene.coadd.psfs[b],
        }
        for plane, pixels in planes.items():
            fits.writeto(folder / f"{plane}-{band}.fits", np.asarray(pixels))
            words += [f"--{plane}", f"{band}={folder / plane}-{band}.fits[0]"]
    return words


def message_of(capsys):
    """The one line on stderr, without the name of the program."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("kermes: ")
    return lines[0].removeprefix("kermes: ")


# ---------------------------------------------------------------- deblend


def test_every_peak_of_the_input_gets_a_row(output, scene):
    assert len(kermes.open(output)) == len(scene.peaks)


def test_the_picture_lies_beside_the_tables(output):
    assert (output / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_no_picture_is_drawn_when_none_is_wanted(archive, tmp_path):
    assert cli.run(["deblend", str(archive), "-o", str(tmp_path / "out"), "--no-picture", *ONE_PASS]) == 0
    assert not (tmp_path / "out" / "picture.png").exists()


def test_the_summary_says_what_came_out(archive, tmp_path, capsys):
    cli.run(["deblend", str(archive), "-o", str(tmp_path / "out"), "--no-picture", *ONE_PASS])
    message = message_of(capsys)
    assert message.startswith("4 objects in ")
    assert "chi2" in message
    assert message.endswith(f"written to {tmp_path / 'out'}")


def test_settings_are_taken_from_file_and_options(archive, tmp_path):
    (tmp_path / "my.toml").write_text("fit.max_iterations = 3\nfit.patience = 1\n")
    options = ["--config", str(tmp_path / "my.toml"), "--set", "fit.max_iterations=2", "--model", "scarlet-lite"]
    assert cli.run(["deblend", str(archive), "-o", str(tmp_path / "out"), "--no-picture", *options]) == 0
    config = kermes.open(tmp_path / "out").config
    assert (config.fit.max_iterations, config.fit.patience) == (2, 1)


def test_the_number_of_workers_does_not_change_the_files(archive, output, tmp_path):
    assert cli.run(["deblend", str(archive), "-o", str(tmp_path / "out"), "--workers", "2", *ONE_PASS]) == 0
    for file in output.iterdir():
        if file.name != "timings.json":
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


def test_one_option_per_plane_does_the_same_as_an_archive(scene, output, tmp_path):
    Table(scene.peaks, names=["y", "x"]).write(tmp_path / "peaks.csv")
    options = [*fits_options(scene, tmp_path), "--peaks", str(tmp_path / "peaks.csv"), *ONE_PASS]
    assert cli.run(["deblend", "-o", str(tmp_path / "out"), *options]) == 0
    got, expected = (np.asarray(kermes.open(path).objects["r_flux"]) for path in (tmp_path / "out", output))
    np.testing.assert_array_equal(got, expected)


def test_bands_keep_the_order_of_the_options(scene, tmp_path):
    words = fits_options(scene, tmp_path)
    reverse = [
        word
        for band in "rg"
        for pair in zip(words[::2], words[1::2], strict=True)
        for word in pair
        if pair[1].startswith(f"{band}=")
    ]
    assert cli.run(["deblend", "-o", str(tmp_path / "out"), "--no-picture", *reverse, *ONE_PASS]) == 0
    assert kermes.open(tmp_path / "out").bands == ("r", "g")


@pytest.mark.parametrize("suffix", ["csv", "ecsv", "fits", "parquet"])
def test_peaks_are_read_from_a_table(archive, tmp_path, suffix):
    path = tmp_path / f"peaks.{suffix}"
    table = Table({"y": [20.0, 30.0], "x": [21.0, 31.0]})
    table.write(path)
    options = ["--peaks", str(path), "--no-picture", *ONE_PASS]
    assert cli.run(["deblend", str(archive), "-o", str(tmp_path / "out"), *options]) == 0
    assert [handle.peak for handle in kermes.open(tmp_path / "out")] == [(20, 21), (30, 31)]


def test_peaks_are_read_as_sky_positions(scene, archive, tmp_path):
    ra, dec = scene.coadd.sky(y=[20.0], x=[21.0])
    Table({"ra": ra, "dec": dec}).write(tmp_path / "peaks.csv")
    options = ["--peaks", str(tmp_path / "peaks.csv"), "--no-picture", *ONE_PASS]
    assert cli.run(["deblend", str(archive), "-o", str(tmp_path / "out"), *options]) == 0
    assert [handle.peak for handle in kermes.open(tmp_path / "out")] == [(20, 21)]


@pytest.mark.parametrize("name", ["labels.npy", "labels.fits"])
def test_footprints_are_read_from_an_image(archive, tmp_path, name):
    labels = np.zeros((48, 52), dtype=np.int32)
    labels[10:40, 10:40] = 1
    np.save(tmp_path / "labels.npy", labels)
    fits.writeto(tmp_path / "labels.fits", labels)
    options = ["--footprints", str(tmp_path / name), "--no-picture", *ONE_PASS]
    assert cli.run(["deblend", str(archive), "-o", str(tmp_path / "out"), *options]) == 0
    assert int(kermes.open(tmp_path / "out").parents["area"].sum()) == 900


def test_detect_ignores_the_peaks_of_the_input(scene, tmp_path):
    wrong = tmp_path / "wrong.npz"
    io.write_npz(wrong, scene.coadd, peaks=[[0, 0]])
    assert cli.run(["deblend", str(wrong), "-o", str(tmp_path / "out"), "--detect", "--no-picture", *ONE_PASS]) == 0
    assert (0, 0) not in [handle.peak for handle in kermes.open(tmp_path / "out")]


def test_an_earlier_result_is_replaced_on_request(archive, output, tmp_path):
    out = tmp_path / "out"
    kermes.open(output).write(out)
    assert cli.run(["deblend", str(archive), "-o", str(out), "--overwrite", "--no-picture", *ONE_PASS]) == 0
    assert os.listdir(tmp_path) == ["out"]


# ---------------------------------------------------------------- what cannot be done


def test_an_existing_result_is_refused_before_anything_is_read(output, capsys):
    assert cli.run(["deblend", "missing.npz", "-o", str(output)]) == 1
    assert message_of(capsys).startswith("output must be new")


def test_a_missing_file_is_one_line_and_leaves_nothing(tmp_path, capsys):
    assert cli.run(["deblend", str(tmp_path / "missing.npz"), "-o", str(tmp_path / "out")]) == 1
    assert "missing.npz: No such file or directory" in message_of(capsys)
    assert os.listdir(tmp_path) == []


def test_an_unknown_setting_is_named(archive, tmp_path, capsys):
    assert cli.run(["deblend", str(archive), "-o", str(tmp_path / "out"), "--set", "fit.tolerence=1"]) == 1
    assert "fit.tolerence" in message_of(capsys)


def test_peaks_outside_the_image_are_refused(archive, tmp_path, capsys):
    Table({"y": [20, 500], "x": [20, 20]}).write(tmp_path / "peaks.csv")
    options = ["-o", str(tmp_path / "out"), "--peaks", str(tmp_path / "peaks.csv")]
    assert cli.run(["deblend", str(archive), *options]) == 1
    assert "peaks must lie inside the image" in message_of(capsys)
    assert os.listdir(tmp_path) == ["peaks.csv"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("missing.csv", None, "peaks must be a readable table"),
        ("peaks.xyz", "1 2", "peaks must be a table"),
        ("peaks.fits", "not FITS", "peaks must be"),
        ("peaks.parquet", "not Parquet", "peaks must be"),
        ("peaks.csv", "a,b\n1,2\n", "peaks must have columns y and x, or ra and dec"),
    ],
)
def test_a_table_that_is_none_is_one_line(archive, tmp_path, capsys, name, content, expected):
    if content is not None:
        (tmp_path / name).write_text(content)
    assert cli.run(["deblend", str(archive), "-o", str(tmp_path / "out"), "--peaks", str(tmp_path / name)]) == 1
    assert expected in message_of(capsys)


@pytest.mark.parametrize("name", ["missing.npy", "missing.fits", "labels.npy", "labels.fits", "labels.fits[SEG]"])
def test_footprints_that_are_none_are_one_line(archive, tmp_path, capsys, name):
    for file in ("labels.npy", "labels.fits"):
        (tmp_path / file).write_text("no image")
    assert cli.run(["deblend", str(archive), "-o", str(tmp_path / "out"), "--footprints", str(tmp_path / name)]) == 1
    assert "footprints must be" in message_of(capsys)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["bogus"], "bogus"),
        (["deblend", "scene.npz"], "--output"),
        (["deblend", "scene.npz", "-o", "out", "--bogus"], "--bogus"),
        (["deblend", "scene.npz", "-o", "out", "--workers", "many"], "many"),
        (["deblend", "-o", "out"], "give INPUTS (.npz, .toml or coadds of lsst.images), or --image"),
        (["deblend", "scene.npz", "-o", "out", "--image", "g=g.fits"], "INPUTS and --image exclude each other"),
        (["deblend", "-o", "out", "--image", "g.fits"], "--image must have the form band=file.fits[HDU], got g.fits"),
        (["deblend", "-o", "out", "--image", "g=a.fits", "--image", "g=b.fits"], "got g twice"),
        (["deblend", "scene.npz", "-o", "out", "--detect", "--peaks", "p.csv"], "exclude each other"),
    ],
)
def test_wrong_usage_ends_with_two(arguments, expected, capsys):
    assert cli.run(arguments) == 2
    message = message_of(capsys)
    assert expected in message
    assert message.endswith("see kermes --help")


def test_an_interrupted_run_leaves_nothing(archive, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("kermes.store.write_models", interrupt)
    assert cli.run(["deblend", str(archive), "-o", str(tmp_path / "out"), "--no-picture", *ONE_PASS]) == 130
    assert message_of(capsys) == "interrupted"
    assert os.listdir(tmp_path) == []


def test_a_bug_is_not_hidden(archive, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr("kermes.io.read", fail)
    with pytest.raises(ZeroDivisionError):
        cli.run(["deblend", str(archive), "-o", str(tmp_path / "out")])


def test_a_warning_is_one_line(scene, tmp_path, capsys):
    arrays = {"images": scene.coadd.images, "psfs": scene.coadd.psfs, "peaks": scene.peaks}
    np.savez(tmp_path / "blind.npz", **arrays, variance=np.zeros((2, 48, 52)))
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        words = ["deblend", str(tmp_path / "blind.npz"), "-o", str(tmp_path / "out"), "--no-picture", *ONE_PASS]
        assert cli.run(words) == 0
    lines = capsys.readouterr().err.splitlines()
    assert ["no pixel of any band is valid" in line for line in lines if line.startswith("kermes: warning: ")] == [True]


# ---------------------------------------------------------------- the other commands


def test_show_finds_the_input_again(output, tmp_path):
    assert cli.run(["show", str(output), "-o", str(tmp_path / "again.png")]) == 0
    again, before = (imread(path) for path in (tmp_path / "again.png", output / "picture.png"))
    # What is stored is within a twentieth of the noise of what was fitted, which the eye does not see.
    assert np.abs(again - before).mean() < 1e-3


def test_show_takes_the_coadd_that_is_named(archive, output, tmp_path):
    options = ["-o", str(tmp_path / "again.png"), "--coadd", str(archive)]
    assert cli.run(["show", str(output), *options]) == 0
    assert (tmp_path / "again.png").exists()


def test_show_refuses_another_coadd(output, tmp_path, capsys):
    other = simulate_scene(n_sources=1, shape=(48, 48), bands=("g", "r"))
    io.write_npz(tmp_path / "other.npz", other.coadd)
    options = ["-o", str(tmp_path / "again.png"), "--coadd", str(tmp_path / "other.npz")]
    assert cli.run(["show", str(output), *options]) == 1
    assert "coadd must be the one of the result" in message_of(capsys)


def test_show_asks_for_the_coadd_when_it_is_gone(output, tmp_path, capsys):
    out = tmp_path / "out"
    kermes.open(output).write(out)
    (out / "input.json").write_text(json.dumps({"source": str(tmp_path / "gone.npz")}))
    assert cli.run(["show", str(out)]) == 1
    assert "gone.npz, of which" in message_of(capsys)


def test_show_asks_for_the_coadd_of_a_result_of_the_library(output, tmp_path, capsys):
    kermes.open(output).write(tmp_path / "out")
    assert cli.run(["show", str(tmp_path / "out")]) == 1
    assert "does not say what it was made from" in message_of(capsys)


@pytest.mark.parametrize("words", [["--object", "1", "--object", "2"], ["--blend", "1"], ["--y", "24", "--x", "24"]])
def test_show_draws_some_objects_and_says_what_is_known(output, tmp_path, capsys, words):
    picture = tmp_path / "some.png"
    assert cli.run(["show", str(output), *words, "--radius", "60", "-o", str(picture)]) == 0
    assert imread(picture).shape[1] > 1000
    said = capsys.readouterr().out
    assert said.startswith("object ")
    assert "  flux: g " in said


def test_show_draws_an_object_without_the_images(output, tmp_path, capsys):
    kermes.open(output).write(tmp_path / "out")
    assert cli.run(["show", str(tmp_path / "out"), "--object", "1"]) == 0
    assert "without the images" in capsys.readouterr().err
    assert (tmp_path / "out" / "object_1.png").exists()


def test_show_refuses_what_is_not_there(output, capsys):
    assert cli.run(["show", str(output), "--object", "999"]) == 1
    assert "object_id must be one of" in message_of(capsys)
    assert cli.run(["show", str(output), "--blend", "999"]) == 1
    assert "blend must be one of the result" in message_of(capsys)
    assert cli.run(["show", str(output), "--y", "-500", "--x", "-500"]) == 1
    assert "must have an object within 10 pixels" in message_of(capsys)
    assert cli.run(["show", str(output), "--blend", "1", "--object", "1"]) == 2


def test_convert_goes_to_scarlet_files_and_back(output, tmp_path, capsys):
    path, back = tmp_path / "a.scarlet", tmp_path / "back"
    assert cli.run(["convert", str(output), str(path)]) == 0
    assert "with profiles drawn on pixels: as observed they differ by up to" in capsys.readouterr().err
    assert cli.run(["convert", str(path), str(back)]) == 0
    expected, got = kermes.open(output), kermes.open(back)
    assert got.objects["object_id"].tolist() == expected.objects["object_id"].tolist()
    # Fluxes of the file are those of the stored models, rounded; those of the table are not.
    np.testing.assert_allclose(
        got.objects["r_flux"], expected.objects["r_flux"], rtol=0, atol=0.5 * expected.objects["r_flux_err"].max()
    )
    capsys.readouterr()
    assert cli.run(["convert", str(path), str(back)]) == 1
    assert "overwrite replaces it" in message_of(capsys)


def test_convert_writes_results_of_any_version_anew(output, archive, tmp_path):
    old = Path(__file__).parent / "data" / "result_schema_2"
    assert cli.run(["convert", str(old), str(tmp_path / "new")]) == 0
    assert len(kermes.open(tmp_path / "new")) == 4
    words = ["--coadd", str(archive), "--tolerance", "0.5"]
    assert cli.run(["convert", str(output), str(tmp_path / "coarse"), *words]) == 0
    assert kermes.open(tmp_path / "coarse").tolerance == 0.5


def test_a_result_as_one_file_does_what_a_directory_does(output, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.run(["convert", str(output), "one.kermes"]) == 0
    # It remembers its input, and pictures go beside it.
    assert cli.run(["show", "one.kermes"]) == 0
    assert cli.run(["show", "one.kermes", "--object", "2"]) == 0
    assert cli.run(["catalog", "one.kermes", "-o", "objects.fits"]) == 0
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == ["objects.fits", "one.kermes", "one_object_2.png", "one_picture.png"]


def test_refit_corrects_one_blend(output, tmp_path, capsys):
    path = tmp_path / "corrected"
    before = kermes.open(output)
    y, x = before[1].peak
    words = ["--blend", str(before[1].blend_id), "--add", str(y + 6), str(x - 6)]
    assert cli.run(["refit", str(output), "-o", str(path), *words]) == 0
    assert "chi2" in capsys.readouterr().err
    after = kermes.open(path)
    assert len(after) == len(before) + 1
    # The new result says what it was made from, like the old one.
    assert cli.run(["show", str(path), "--object", "1", "-o", str(tmp_path / "one.png")]) == 0
    words = ["--blend", str(before[1].blend_id), "--model", "scarlet-lite"]
    assert cli.run(["refit", str(output), "-o", str(tmp_path / "other"), *words]) == 0
    assert kermes.open(tmp_path / "other")[1].row["model"] == "free-form"


def test_footprints_are_written_as_a_table(output, tmp_path):
    path = tmp_path / "footprints.fits"
    assert cli.run(["footprints", str(output), "-o", str(path), "--bands", "r"]) == 0
    result = kermes.open(output, coadd=io.read(**json.loads((output / "input.json").read_text())))
    with fits.open(path) as hdus:
        table = hdus["FOOTPRINTS"].data
        assert table["object_id"].tolist() == result.objects["object_id"].tolist()
        heavy = result[int(table["object_id"][0])].footprint("redistributed", ["r"])
        np.testing.assert_array_equal(table["r_redistributed"][0], heavy.values[0])
        spans = np.stack([table[name][0] for name in ("y", "x0", "x1")], axis=1)
        np.testing.assert_array_equal(spans, heavy.footprint.spans)


def test_forced_measures_one_image_or_several(archive, output, tmp_path, capsys):
    path = tmp_path / "forced.fits"
    assert cli.run(["forced", str(output), str(archive), "-o", str(path)]) == 0
    table, objects = Table.read(path), kermes.open(output).objects
    assert len(table) == len(objects)
    np.testing.assert_allclose(table["r_flux"], objects["r_flux"], atol=0.1 * objects["r_flux_err"].max())
    path = tmp_path / "curves.ecsv"
    assert cli.run(["forced", str(output), str(archive), str(archive), "-o", str(path)]) == 0
    table = Table.read(path)
    assert len(table) == 2 * 2 * len(objects)
    assert set(table["visit"]) == {"scene"}
    assert set(table["band"]) == {"g", "r"}
    capsys.readouterr()
    assert cli.run(["forced", str(output), str(archive), "-o", str(path)]) == 1
    assert "--overwrite replaces it" in message_of(capsys)


def test_metrics_prints_the_fractions_of_every_band(output, capsys):
    assert cli.run(["metrics", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["g", "r"]
    assert [line.split("  ")[0] for line in lines[2:]] == [name.replace("_", " ") for name in FRACTIONS]


def test_metrics_as_json_are_those_of_the_library(output, capsys):
    assert cli.run(["metrics", str(output), "--band", "r", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    objects = kermes.open(output).objects
    assert printed["objects"] == len(objects)
    assert list(printed["bands"]) == ["r"]
    assert {name: tuple(pair) for name, pair in printed["bands"]["r"].items()} == overlap_fractions(objects, "r")


def test_metrics_of_an_unknown_band_are_refused(output, capsys):
    assert cli.run(["metrics", str(output), "--band", "q"]) == 1
    assert "band must be one of g, r, got 'q'" in message_of(capsys)


@pytest.mark.parametrize("suffix", [".parquet", ".fits", ".ecsv", ".csv", ".vot"])
def test_catalog_is_written_in_every_format(output, tmp_path, suffix):
    path = tmp_path / f"cat{suffix}"
    assert cli.run(["catalog", str(output), "-o", str(path), "--magnitudes", "--nanojansky"]) == 0
    if suffix == ".parquet":
        table = from_arrow(pq.read_table(path))
    else:
        table = Table.read(path, format="votable" if suffix == ".vot" else None)
    expected = kermes.open(output).catalog(magnitudes=True, nanojansky=True)
    assert table.colnames == expected.colnames
    assert len(table) == len(expected)
    for name in ("g_flux", "r_mag", "object_id", "center_y", "flag_edge"):
        found = np.ma.asarray(table[name])
        found = found.filled(np.nan) if found.dtype.kind == "f" else found.filled()
        if suffix == ".csv" and found.dtype.kind == "U":
            found = found == "True"
        np.testing.assert_allclose(
            np.asarray(found, dtype=float), np.asarray(expected[name], dtype=float), err_msg=name
        )
    if suffix != ".csv":
        assert table["g_flux"].unit == expected["g_flux"].unit
        assert table["r_mag"].unit == "mag"


def test_catalog_of_some_columns_holds_those(output, tmp_path):
    path = tmp_path / "cat.ecsv"
    assert cli.run(["catalog", str(output), "-o", str(path), "--column", "object_id", "--column", "g_flux"]) == 0
    table = Table.read(path)
    assert table.colnames == ["object_id", "g_flux"]
    assert table["g_flux"].description == kermes.open(output).objects["g_flux"].description


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "cat.txt"], "output must end in .parquet, .fits, .ecsv, .csv, .vot"),
        (["-o", "here.csv"], "--overwrite replaces it"),
        (["-o", "new.csv", "--column", "z_flux"], "column must be one of the table of objects, got z_flux"),
    ],
)
def test_catalog_refuses_what_it_cannot_write(output, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.csv").write_text("mine")
    assert cli.run(["catalog", str(output), *options]) == 1
    assert message in message_of(capsys)
    assert (tmp_path / "here.csv").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here.csv"]


def test_show_refuses_what_is_no_result(tmp_path, capsys):
    assert cli.run(["show", str(tmp_path)]) == 1
    assert "must be the directory of a kermes result" in message_of(capsys)


def test_a_simulated_scene_can_be_read(tmp_path):
    path = tmp_path / "scene.npz"
    words = ["--kind", "pair", "--n-sources", "4", "--shape", "50", "60", "--bands", "g", "--bands", "i", "--seed", "2"]
    assert cli.run(["simulate", "-o", str(path), *words]) == 0
    coadd = kermes.read(path)
    assert (coadd.shape, coadd.bands) == ((50, 60), ("g", "i"))
    with np.load(path) as content:
        assert len(content["truth_g_flux"]) == 4


def test_the_knots_of_a_simulated_scene_lie_beside_its_truth(tmp_path):
    path = tmp_path / "scene.npz"
    words = ["--kind", "knots", "--n-sources", "4", "--shape", "50", "60", "--bands", "g", "--seed", "2"]
    assert cli.run(["simulate", "-o", str(path), *words]) == 0
    expected = simulate_scene(kind="knots", n_sources=4, shape=(50, 60), bands=("g",), seed=2).knots
    with np.load(path) as content:
        for name in expected.colnames:
            np.testing.assert_array_equal(content[f"knots_{name}"], np.asarray(expected[name]))


def test_a_simulated_patch_can_be_read(tmp_path):
    path = tmp_path / "patch.npz"
    words = ["--kind", "patch", "--shape", "90", "80", "--bands", "g", "--bands", "i", "--seed", "2"]
    assert cli.run(["simulate", "-o", str(path), *words]) == 0
    coadd, expected = kermes.read(path), simulate_patch(shape=(90, 80), bands=("g", "i"), seed=2)
    assert coadd.images.tobytes() == expected.coadd.images.tobytes()
    np.testing.assert_array_equal(coadd.valid, expected.coadd.valid)
    np.testing.assert_array_equal(coadd.peaks, expected.peaks)
    with np.load(path) as content:
        np.testing.assert_array_equal(content["truth_i_flux"], np.asarray(expected.truth["i_flux"]))


def test_a_patch_takes_no_number_of_sources(tmp_path, capsys):
    words = ["--kind", "stars", "--n-sources", "4"]
    assert cli.run(["simulate", "-o", str(tmp_path / "patch.npz"), *words]) == 2
    assert "--n-sources does not go with --kind stars" in message_of(capsys)


def test_an_unknown_kind_of_scene_is_refused(tmp_path, capsys):
    assert cli.run(["simulate", "-o", str(tmp_path / "scene.npz"), "--kind", "void"]) == 1
    assert "kind must be one of" in message_of(capsys)


def test_the_demo_compares_and_draws(tmp_path, capsys):
    assert cli.run(["demo", "-o", str(tmp_path / "demo.png"), "--n-sources", "3"]) == 0
    said = capsys.readouterr()
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "compiling, first run only ..." in said.err
    assert "scatter / stated error" in said.out


def test_the_demo_refuses_what_is_no_picture_before_it_begins(capsys):
    assert cli.run(["demo", "-o", "demo.docx"]) == 1
    assert message_of(capsys) == "output must end in .png, got demo.docx"


def test_printed_settings_are_the_defaults(capsys):
    assert cli.run(["config"]) == 0
    assert config_from_dict(tomllib.loads(capsys.readouterr().out)) == Config()


def test_printed_settings_can_be_loaded_and_changed(tmp_path, capsys):
    cli.run(["config", "--set", "fit.symmetric=true"])
    (tmp_path / "my.toml").write_text(capsys.readouterr().out)
    assert load_config(tmp_path / "my.toml").fit.symmetric


def test_every_printed_setting_is_explained(capsys):
    cli.run(["config"])
    lines = capsys.readouterr().out.splitlines()
    assert [line for before, line in pairwise(lines) if line[:1].isalpha() and not before.startswith("# ")] == []


def test_version_is_that_of_the_package(capsys):
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == importlib.metadata.version("kermes")


def test_help_needs_neither_numpy_nor_numba():
    code = "import sys; from kermes.cli import run; run(['--help']); sys.exit(len({'numpy', 'numba'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize("suffix", [".parquet", ".fits", ".ecsv"])
def test_measurements_are_those_of_the_library(output, archive, tmp_path, suffix):
    path = tmp_path / f"table{suffix}"
    options = ["--kind", "redistributed", "--bands", "r", "--apertures", "4", "--apertures", "7.5"]
    assert cli.run(["measure", str(output), str(archive), "-o", str(path), *options]) == 0
    result = kermes.open(output, coadd=io.read(archive))
    expected = photometry.measure(result, "redistributed", bands=["r"], apertures=(4, 7.5))
    table = from_arrow(pq.read_table(path)) if suffix == ".parquet" else Table.read(path)
    assert table.colnames == expected.colnames
    for name in expected.colnames:
        np.testing.assert_array_equal(np.asarray(table[name]), np.asarray(expected[name]))
    assert table["r_psf_flux"].unit == expected["r_psf_flux"].unit


def test_measuring_remembers_the_input(output, tmp_path):
    assert cli.run(["measure", str(output), "-o", str(tmp_path / "table.parquet")]) == 0


def test_an_unknown_kind_and_an_unknown_format_are_one_line_each(output, tmp_path, capsys):
    assert cli.run(["measure", str(output), "-o", str(tmp_path / "table.ecsv"), "--kind", "heavy"]) == 1
    assert message_of(capsys).startswith("kind must be one of model")
    assert cli.run(["measure", str(output), "-o", str(tmp_path / "table.txt")]) == 1
    assert message_of(capsys).startswith("output must end in .parquet, .fits, .ecsv, .csv, .vot, got")
