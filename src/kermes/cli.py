"""The command line: each command parses, calls the library, and reports."""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import os
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

from cyclopts import App, CycloptsError, Parameter

import kermes
from kermes.errors import FileError, InputError, KermesError
from kermes.storage import write_file

if TYPE_CHECKING:
    from astropy.table import Table
    from numpy.typing import NDArray

    from kermes.modelling import BlendOutcome
    from kermes.planning import TilePlan
    from kermes.result import Result
    from kermes.simulation import SimulatedPatch, SimulatedScene

app = App(
    name="kermes", help="Share the light of crowded sky among its stars and galaxies.", version=kermes.__version__
)

Words = Annotated[tuple[str, ...], Parameter(negative=(), show_default=False)]
Switch = Annotated[bool, Parameter(negative=(), show_default=False)]
Settings = Annotated[tuple[str, ...], Parameter(name="--set", negative=(), show_default=False)]
Output = Annotated[Path, Parameter(alias="-o")]

_INPUT_FILE = "input.json"
_PICTURE_FILE = "picture.png"
_TABLE_SUFFIXES = (".parquet", ".fits", ".ecsv", ".csv", ".vot")
_SLOW = 2.0  # seconds, from which a blend is worth a word


class _UsageError(Exception):
    """The options contradict each other; the program ends as for an unknown option."""


# ---------------------------------------------------------------- commands


@app.command
def deblend(
    inputs: Annotated[tuple[Path, ...], Parameter(negative=(), show_default=False)] = (),
    /,
    *,
    output: Output,
    image: Words = (),
    variance: Words = (),
    invvar: Words = (),
    mask: Words = (),
    psf: Words = (),
    box: tuple[int, int, int, int] | None = None,
    peaks: Path | None = None,
    footprints: str | None = None,
    detect: Switch = False,
    config: Path | None = None,
    setting: Settings = (),
    model: str | None = None,
    workers: int | None = None,
    picture: bool = True,
    overwrite: Switch = False,
    verbose: Annotated[bool, Parameter(alias="-v", negative=(), show_default=False)] = False,
) -> None:
    """Deblend one coadd and write tables, models and a picture.

    Parameters
    ----------
    inputs
        Coadd: an .npz archive, a .toml manifest, or coadds of lsst.images, one FITS file per band. Left out: one
        --image per band.
    output
        Directory to make, or one file (.kermes). While the work goes on, finished blends are kept in the directory of
        this name with .checkpoint; after Ctrl-C or a crash the same command goes on from there.
    image
        Image of one band, band=file.fits[HDU]; once per band, in the order wanted.
    variance
        Variance of one band, band=file.fits[HDU].
    invvar
        Inverse variance of one band, instead of its variance.
    mask
        Mask of one band.
    psf
        PSF of one band.
    box
        First row, first column, height and width of the pixels to read, in the coordinates of the coadd.
    peaks
        Table of peaks (csv, ecsv, fits, parquet) with columns y and x, or ra and dec.
    footprints
        Image of footprint labels, file.npy or file.fits[HDU].
    detect
        Detect the peaks, even if the input brings its own.
    config
        TOML file of settings; see kermes config.
    setting
        Change one setting, for example --set profiles.residual_rounds=0; may be repeated.
    model
        kermes (points and galaxy profiles, the default), scarlet-lite (free shapes) or templates (the single-band
        deblender); short for --set model=...
    workers
        Number of blends fitted at the same time; does not change the answer.
    picture
        Draw a picture of the result into the output directory.
    overwrite
        Replace an earlier result of the same name.
    verbose
        Say more of what is done.
    """
    if detect and peaks is not None:
        raise _UsageError("--detect and --peaks exclude each other")
    start = time.perf_counter()
    _set_verbosity(verbose)
    planes = {"image": image, "variance": variance, "invvar": invvar, "mask": mask, "psf": psf}
    source = _input_arguments(inputs, planes) | ({} if box is None else {"box": list(box)})

    from kermes import io, store
    from kermes.config import load_config

    store.check_output(output, overwrite)
    settings = load_config(config, [*setting, *([] if model is None else [f"model={model}"])])
    checkpoint = output.with_name(f"{output.name}.checkpoint")
    if checkpoint.exists():
        _say(f"going on with the blends in {checkpoint}")
    result = kermes.deblend(
        io.read(**source),
        peaks="detect" if detect else None if peaks is None else _read_table(peaks),
        footprints=None if footprints is None else _read_labels(footprints),
        config=settings,
        workers=workers,
        checkpoint=checkpoint,
        watch=_watch,
    )
    extras = _input_extras(source)
    if picture:
        extras[_PICTURE_FILE] = _picture(result)
    store.write_result(result, output, overwrite=overwrite, extras=extras)
    if not result.is_complete:
        n_missing = result.ledger()["reasons"]["interrupted"]
        _say(f"{n_missing} of {_count(len(result), 'object')} are not done: the same command goes on from {checkpoint}")
    _say(f"{_summary(result)}, {time.perf_counter() - start:.1f} s; written to {output}")
    if not result.is_complete:
        raise KeyboardInterrupt


@app.command
def demo(
    *,
    output: Output = Path("kermes_demo.png"),
    n_sources: int = 40,
    seed: int = 1,
    workers: int | None = None,
    view: Switch = False,
) -> None:
    """Simulate a field in six bands, deblend it, and compare with the truth.

    Parameters
    ----------
    output
        Picture to write.
    n_sources
        Number of stars and galaxies.
    seed
        The same seed gives the same sky.
    workers
        Number of blends fitted at the same time; does not change the answer.
    view
        Then open a page in the browser with the result, as kermes view does.
    """
    _check_file_output(output, ".png")
    if view:
        from kermes.viewer import View, serve  # packages that are missing are missed before the work
    with _step(f"simulating {n_sources} stars and galaxies in six bands"):
        from kermes.simulation import simulate_scene

        scene = simulate_scene(n_sources=n_sources, seed=seed)
    with _step("compiling, first run only"):
        kermes.deblend(simulate_scene(n_sources=2, shape=(48, 48)).coadd, peaks=[[24, 24], [24, 30]], workers=1)
    start = time.perf_counter()
    with _step(f"deblending {len(scene.peaks)} peaks"):
        result = kermes.deblend(scene.coadd, peaks=scene.peaks, workers=workers)
    seconds = time.perf_counter() - start
    with _step(f"drawing {output}"):
        write_file(output, _picture(result))
    for line in _comparison(result, scene):
        print(line)
    _say(f"{_summary(result)}, {1e3 * seconds / max(len(result), 1):.0f} ms per object; picture: {output}")
    if view:
        serve(View(result, "kermes demo"), ready=_say_where)


@app.command
def show(
    result: Path,
    /,
    *,
    object_id: Annotated[tuple[int, ...], Parameter(name="--object", negative=(), show_default=False)] = (),
    blend_id: Annotated[int | None, Parameter(name="--blend")] = None,
    ra: float | None = None,
    dec: float | None = None,
    y: float | None = None,
    x: float | None = None,
    radius: float | None = None,
    tile: str | None = None,
    timing: Switch = False,
    convergence: Switch = False,
    output: Annotated[Path | None, Parameter(alias="-o")] = None,
    coadd: Path | None = None,
) -> None:
    """Draw a result, or some of its objects, and say what is known of them.

    Without --object, --blend, a position, --tile, --timing or --convergence: image, model, residual, and the largest
    objects of all.

    Parameters
    ----------
    result
        Directory that kermes deblend wrote.
    object_id
        Object to draw; may be repeated.
    blend_id
        Blend of which all objects are drawn.
    ra
        Right ascension of a position [deg]; with --dec, the objects near it are drawn.
    dec
        Declination of that position [deg].
    y
        Row of a position in the coordinates of the coadd; with --x, likewise.
    x
        Column of that position.
    radius
        How far from the position: with --ra in arcsec, with --y in pixels. Left out: 2 arcsec, 10 pixels.
    tile
        Draw footprints and peaks of all objects, coloured by this column, such as outcome, a flag, or any number.
    timing
        Draw how long each blend took.
    convergence
        Draw how many iterations each blend took, and how well its models then fit.
    output
        Picture to write; left out: picture.png in that directory, or one named after what is drawn.
    coadd
        Coadd it was made from; left out: the files that kermes deblend read. Objects are drawn without it if need be.
    """
    from kermes import io

    opened = kermes.open(result)  # What is no result gets its own message, before anything is looked for.
    wanted = _wanted(opened, object_id, blend_id, {"ra": ra, "dec": dec, "y": y, "x": x}, radius)
    if sum((wanted is not None, tile is not None, timing, convergence)) > 1:
        raise _UsageError("--tile, --timing, --convergence and a choice of objects exclude each other")
    if tile is not None or timing or convergence:
        name = f"tile_{tile}" if tile is not None else "timing" if timing else "convergence"
        output = _beside(result, f"{name}.png") if output is None else output
        _check_file_output(output, ".png")
        from kermes import plots

        if tile is not None:
            figure = plots.show_tile(opened, tile)
        else:
            figure = plots.show_timing(opened) if timing else plots.show_convergence(opened)
        write_file(output, plots.png_bytes(figure))
        _say(f"picture: {output}")
        return
    if output is None:
        output = _beside(result, _PICTURE_FILE if wanted is None else f"object_{wanted[0]}.png")
    _check_file_output(output, ".png")
    try:
        source = _remembered_input(result) if coadd is None else {"source": str(coadd)}
    except (InputError, FileError) as error:
        if wanted is None:
            raise
        _say(f"without the images: {error}")
    else:
        opened = kermes.open(result, coadd=io.read(**source))
    if wanted is not None:
        for number in wanted:
            print(_description(opened, number))
    write_file(output, _picture(opened, wanted))
    _say(f"picture: {output}")


@app.command
def report(
    result: Path,
    /,
    *,
    object_id: Annotated[tuple[int, ...], Parameter(name="--object", negative=(), show_default=False)] = (),
    blend_id: Annotated[int | None, Parameter(name="--blend")] = None,
    worst: int | None = None,
    output: Annotated[Path | None, Parameter(alias="-o")] = None,
    coadd: Path | None = None,
    overwrite: Switch = False,
) -> None:
    """Write an HTML page about some objects, and files of them for other viewers.

    Beside the page, which needs no other file and no network, there are a FITS file of image, model and residual around
    the objects (.fits), a region file of ds9 (.reg) and footprints for Firefly (_footprints.json).

    Parameters
    ----------
    result
        Directory that kermes deblend wrote.
    object_id
        Object to report on; may be repeated.
    blend_id
        Blend of which all objects are reported on.
    worst
        Number of objects to report on, those with the largest chi2.
    output
        Page to write, .html; left out: beside the result, under its name with _report.html.
    coadd
        Coadd it was made from; left out: the files that kermes deblend read.
    overwrite
        Replace earlier files of the same names.
    """
    from kermes import io
    from kermes.io.overlays import ds9_regions, firefly_footprints, residual_fits
    from kermes.report import MOST_OBJECTS, area_of, html_report, worst_objects

    if sum((bool(object_id), blend_id is not None, worst is not None)) != 1:
        raise _UsageError("give one of --object, --blend and --worst")
    opened = kermes.open(result)
    output = result.with_name(f"{result.stem}_report.html") if output is None else output
    files = [output, *(output.with_name(output.stem + end) for end in (".fits", ".reg", "_footprints.json"))]
    for file in files:
        _check_file_output(file, file.suffix if file != output else ".html", overwrite=overwrite)
    wanted = worst_objects(opened, worst) if worst is not None else _wanted(opened, object_id, blend_id, {}, None)
    if not wanted:
        raise InputError("worst must find an object with a chi2, and the result has none")
    if len(wanted) > MOST_OBJECTS:
        _say(f"warning: the first {MOST_OBJECTS} of {len(wanted)} objects are reported on")
        wanted = wanted[:MOST_OBJECTS]
    source = _remembered_input(result) if coadd is None else {"source": str(coadd)}
    opened = kermes.open(result, coadd=io.read(**source))
    area = area_of(opened, wanted)
    contents = (
        html_report(opened, wanted, title=f"{result.name}: {_count(len(wanted), 'object')}").encode(),
        residual_fits(opened, area),
        ds9_regions(opened, wanted).encode(),
        firefly_footprints(opened, wanted, area).encode(),
    )
    for file, content in zip(files, contents, strict=True):
        write_file(file, content)
    _say(f"{_count(len(wanted), 'object')}; written to {', '.join(map(str, files))}")


@app.command
def view(
    result: Path,
    coadd: Path | None = None,
    /,
    *,
    edit: Switch = False,
    host: str = "127.0.0.1",
    port: int | None = None,
    browser: bool = True,
) -> None:
    """Open a page in the browser with the picture of a result to pan and zoom, its table, and each object in detail.

    The address of the page holds what is shown: who opens it, while this runs, sees the same. Ctrl-C ends it.

    Parameters
    ----------
    result
        Directory that kermes deblend wrote.
    coadd
        Coadd it was made from; left out: the files that kermes deblend read. Without it, only the models are shown.
    edit
        Allow to fit blends anew, with peaks added, removed or moved or with other settings. The result stays as it is:
        edits go to a file beside it, from which they are taken up again the next time.
    host
        Address to listen on; the default is reached from this machine only. There is no password.
    port
        Port to listen on; left out: 8642, or the next that is free.
    browser
        Open the page in a browser.
    """
    from kermes import io, viewer

    opened, extras = kermes.open(result), None
    try:
        source = _remembered_input(result) if coadd is None else {"source": str(coadd)}
    except (InputError, FileError) as error:
        _say(f"without the images: {error}")
    else:
        extras = _input_extras(source)
        with _step("reading the images"):
            opened = kermes.open(result, coadd=io.read(**source))
    place = result.resolve()
    edits = place.with_name(f"{place.stem}_edits.json") if edit else None
    shown = viewer.View(opened, place.name, edits=edits, extras=extras)
    del opened  # with its images, which the view keeps in its own way
    if shown.edits:
        _say(f"{_count(len(shown.edits), 'edit')} taken up from {edits}")
    viewer.serve(shown, host=host, port=port, browser=browser, ready=_say_where)


@app.command
def convert(
    source: Path,
    output: Path,
    /,
    *,
    coadd: Path | None = None,
    tolerance: float = 0.05,
    exact: Switch = False,
    overwrite: Switch = False,
) -> None:
    """Turn models into another format: results of kermes, and files of the LSST pipelines.

    Parameters
    ----------
    source
        A result that kermes wrote, of any version, a .scarlet archive, or models of pipelines v29 (.json).
    output
        What to write: a .scarlet archive, a result as one file (.kermes), or else the directory of a result.
    coadd
        Coadd that a result was made from; its noise is what --tolerance refers to.
    tolerance
        How far a stored model as observed may be from that of the source [sigma]; needs --coadd, else nothing is
        rounded.
    exact
        Round nothing.
    overwrite
        Replace what has the name of the output.
    """
    from kermes import io, store

    to_scarlet = output.suffix.lower() == ".scarlet"
    if to_scarlet:
        _check_file_output(output, ".scarlet", overwrite=overwrite)
    else:
        store.check_output(output, overwrite)
    images = None if coadd is None else io.read(coadd)
    if source.suffix.lower() in (".scarlet", ".json") and not source.is_dir():
        models = io.read_scarlet(source)
        models = models if images is None else dataclasses.replace(models, coadd=images)
    else:
        models = kermes.open(source, coadd=images)
    if to_scarlet:
        conversion = io.write_scarlet(models, output, overwrite=overwrite)
        if conversion.n_profiles:
            _say(
                f"{_count(conversion.n_profiles, 'object')} with profiles drawn on pixels: as observed they differ by "
                f"up to {conversion.largest_error:.1e} of their brightest pixel, {conversion.largest_flux_error:.1e} "
                "of their flux"
            )
        if len(models.candidates):
            _say(f"{_count(len(models.candidates), 'candidate')} left out, for which .scarlet files have no place")
    else:
        try:
            extras = {_INPUT_FILE: _input_file(source)}
        except OSError:
            extras = {}
        store.write_result(models, output, overwrite=overwrite, tolerance=None if exact else tolerance, extras=extras)
    _say(f"{_count(len(models), 'object')} in {_count(len(models.blends), 'blend')}; written to {output}")


@app.command
def refit(
    result: Path,
    coadd: Path | None = None,
    /,
    *,
    blend_id: Annotated[int | None, Parameter(name="--blend")] = None,
    output: Output,
    add: Annotated[tuple[tuple[float, float], ...], Parameter(negative=(), show_default=False)] = (),
    remove: Annotated[tuple[int, ...], Parameter(negative=(), show_default=False)] = (),
    setting: Settings = (),
    model: str | None = None,
    edits: Path | None = None,
    overwrite: Switch = False,
) -> None:
    """Fit one blend of a result anew, with peaks added or removed or with other settings; all else stays.

    With --edits, everything that was done in kermes view --edit is done to the result.

    Parameters
    ----------
    result
        Directory that kermes deblend wrote.
    coadd
        Coadd it was made from; left out: the files that kermes deblend read.
    blend_id
        Blend to fit anew.
    output
        Directory of the new result.
    add
        Row and column of a peak to add, in the coordinates of the coadd; may be repeated.
    remove
        Object to take out; may be repeated.
    setting
        Change one setting of this fit, for example --set profiles.residual_rounds=0; may be repeated.
    model
        kermes or scarlet-lite; short for --set model=...
    edits
        File of edits that kermes view wrote, instead of a blend and what to do to it.
    overwrite
        Replace an earlier result of the same name.
    """
    from kermes import io, store
    from kermes.edits import Edit, apply_edits, read_edits

    changes = [*setting, *([] if model is None else [f"model={model}"])]
    if (blend_id is None) == (edits is None) or (edits is not None and (add or remove or changes)):
        raise _UsageError("kermes refit needs --blend and what to do to it, or --edits alone")
    store.check_output(output, overwrite)
    kermes.open(result)
    source = _remembered_input(result) if coadd is None else {"source": str(coadd)}
    opened = kermes.open(result, coadd=io.read(**source))
    if edits is None:
        assert blend_id is not None
        wanted = [Edit(blend_id=blend_id, add=add, remove=remove, settings=tuple(changes))]
    else:
        wanted = read_edits(edits, opened)
    again = apply_edits(opened, wanted)
    store.write_result(again, output, overwrite=overwrite, extras=_input_extras(source))
    if blend_id is None:
        done = _count(len(wanted), "edit")
    else:
        before, after = (_blend_chi2(each, blend_id) for each in (opened, again))
        done = f"blend {blend_id}: chi2 {before:.3f} before, {after:.3f} now"
    _say(f"{done}; {_summary(again)}; written to {output}")


@app.command
def footprints(
    result: Path,
    coadd: Path | None = None,
    /,
    *,
    output: Output,
    kind: str = "redistributed",
    bands: Words = (),
    overwrite: Switch = False,
) -> None:
    """Write the pixels of every object as a FITS table, with their values.

    Parameters
    ----------
    result
        Directory that kermes deblend wrote.
    coadd
        Coadd it was made from; left out: the files that kermes deblend read.
    output
        Table to write, .fits: a row per object with the runs of its pixels and, per band, their values.
    kind
        What the values are: model, redistributed, neighbor_subtracted or noise_replaced.
    bands
        Bands to write; may be repeated. Left out: all.
    overwrite
        Replace an earlier file of the same name.
    """
    from kermes import io
    from kermes.io.tables import footprint_bytes

    _check_file_output(output, ".fits", overwrite=overwrite)
    kermes.open(result)
    source = _remembered_input(result) if coadd is None else {"source": str(coadd)}
    opened = kermes.open(result, coadd=io.read(**source))
    write_file(output, footprint_bytes(opened, kind, bands or None))
    _say(f"{_count(len(opened), 'object')}; written to {output}")


@app.command
def catalog(
    result: Path,
    /,
    *,
    output: Output,
    magnitudes: Switch = False,
    nanojansky: Switch = False,
    column: Words = (),
    overwrite: Switch = False,
) -> None:
    """Write the table of objects of a result to one file.

    Parameters
    ----------
    result
        Directory that kermes deblend wrote.
    output
        Table to write: .parquet, .fits, .ecsv, .csv or .vot (VOTable). Units and descriptions are kept but in csv.
    magnitudes
        Add AB magnitudes, errors, and upper limits of what is too faint for one.
    nanojansky
        Give all fluxes in nanojansky.
    column
        Column to write; may be repeated. Left out: all.
    overwrite
        Replace an earlier file of the same name.
    """
    from kermes.io.tables import table_bytes

    _check_file_output(output, *_TABLE_SUFFIXES, overwrite=overwrite)
    table = kermes.open(result).catalog(magnitudes=magnitudes, nanojansky=nanojansky)
    unknown = [name for name in column if name not in table.colnames]
    if unknown:
        raise InputError(f"column must be one of the table of objects, got {', '.join(unknown)}")
    table = table[list(column)] if column else table
    write_file(output, table_bytes(table, output.suffix.lower()))
    _say(f"{_count(len(table), 'object')}, {_count(len(table.colnames), 'column')}; written to {output}")


@app.command
def forced(
    result: Path,
    images: Annotated[tuple[Path, ...], Parameter(negative=())],
    /,
    *,
    output: Output,
    overwrite: Switch = False,
) -> None:
    """Measure the objects of a result in other images: other bands, another epoch, another PSF.

    Positions and shapes are held, and the fluxes of all objects are fitted together. Images on other pixels need a WCS,
    and so do those that the result was made from.

    Parameters
    ----------
    result
        Directory that kermes deblend wrote.
    images
        Images to measure in: .npz archives or .toml manifests. Of one, the table has a row per object; of several, a
        row per image, band and object, with the name of the file as visit.
    output
        Table to write: .parquet, .fits, .ecsv, .csv or .vot (VOTable).
    overwrite
        Replace an earlier file of the same name.
    """
    from kermes import io
    from kermes.forced import forced_photometry, light_curves
    from kermes.io.tables import table_bytes

    if not images:
        raise _UsageError("name at least one image to measure in")
    _check_file_output(output, *_TABLE_SUFFIXES, overwrite=overwrite)
    opened = kermes.open(result)
    if len(images) == 1:
        table = forced_photometry(opened, io.read(images[0]))
    else:
        table = light_curves(opened, ((path.stem, io.read(path)) for path in images))
    write_file(output, table_bytes(table, output.suffix.lower()))
    _say(f"{_count(len(table), 'row')}, {_count(len(table.colnames), 'column')}; written to {output}")


@app.command
def measure(
    result: Path,
    coadd: Path | None = None,
    /,
    *,
    output: Output,
    kind: str = "neighbor_subtracted",
    bands: Words = (),
    apertures: Annotated[tuple[float, ...], Parameter(negative=(), show_default=False)] = (),
    overwrite: Switch = False,
) -> None:
    """Measure fluxes and shapes of every object on its stamps, and write a table.

    Parameters
    ----------
    result
        Directory that kermes deblend wrote.
    coadd
        Coadd it was made from; left out: the files that kermes deblend read.
    output
        Table to write: .parquet, .fits, .ecsv, .csv or .vot (VOTable).
    kind
        What is measured on: neighbor_subtracted, redistributed, noise_replaced or model.
    bands
        Names of bands; left out: all of them.
    apertures
        Radii of circular apertures [pixels], may be repeated; left out: 3, 6 and 9.
    overwrite
        Replace an earlier file of the same name.
    """
    _check_file_output(output, *_TABLE_SUFFIXES, overwrite=overwrite)
    kermes.open(result)  # What is no result gets its own message, before anything is looked for.
    source = _remembered_input(result) if coadd is None else {"source": str(coadd)}

    from kermes import io
    from kermes.io.tables import table_bytes
    from kermes.photometry import APERTURES
    from kermes.photometry import measure as measure_result

    opened = kermes.open(result, coadd=io.read(**source))
    table = measure_result(opened, kind, bands or None, apertures or APERTURES)
    write_file(output, table_bytes(table, output.suffix.lower()))
    _say(f"{_count(len(table), 'object')} measured on {kind}; written to {output}")


@app.command
def metrics(
    result: Path,
    /,
    *,
    band: Words = (),
    json_output: Annotated[bool, Parameter(name="--json", negative=(), show_default=False)] = False,
) -> None:
    """Print how much the objects of a result overlap, band by band.

    Which fraction of them has a pixel with more light of neighbours than noise; at least 5 % as much light of
    neighbours as of its own; a blendedness above 0.05; any of these. The last three are given twice: in the model
    frame, where the PSF is narrow, and as observed.

    Parameters
    ----------
    result
        Directory that kermes deblend wrote.
    band
        Band to print; may be repeated. Left out: all.
    json_output
        Print JSON instead of a table.
    """
    from kermes.metrics import FRACTIONS, overlap_fractions

    opened = kermes.open(result)
    fractions = {name: overlap_fractions(opened.objects, name) for name in band or opened.bands}
    if json_output:
        print(json.dumps({"objects": len(opened), "bands": fractions}, indent=1))
        return
    print(f"{_count(len(opened), 'object')}; percentages in the model frame / as observed")
    print(f"{'':28s}" + "".join(f"{name:>14s}" for name in fractions))
    for row in FRACTIONS:
        pairs = (
            f"{100 * frame:.1f} / {100 * observed:.1f}" for frame, observed in (f[row] for f in fractions.values())
        )
        print(f"{row.replace('_', ' '):28s}" + "".join(f"{pair:>14s}" for pair in pairs))


@app.command
def simulate(
    *,
    output: Output,
    kind: str = "field",
    n_sources: int | None = None,
    shape: tuple[int, int] | None = None,
    bands: Words = (),
    seed: int = 0,
) -> None:
    """Simulate a scene of stars and galaxies, or a patch of a survey, and write it with its truth.

    Parameters
    ----------
    output
        Archive (.npz) to write; kermes deblend reads it. The truth is in its arrays truth_..., one row per source, that
        of the knots of irregular galaxies in knots_...
    kind
        field: spread evenly; knots: irregular galaxies, a third of their light in knots; pair: two by two; crowded: a
        star cluster; bright: one source outshines the rest; patch: 3400 x 3400 pixels of a survey, 70 sources per
        square arcminute, with saturated stars, a large galaxy and a strip without data; stars: 20,000 stars on 1000 x
        1000 pixels. A patch takes a minute, 2.5 GB of memory and a file of 350 MB.
    n_sources
        Number of sources; left out: what suits the kind. Of patch and stars, the shape says how many there are.
    shape
        Height and width [pixels]; left out: what suits the kind.
    bands
        Names of the bands, of u, g, r, i, z, y; left out: all of them.
    seed
        The same seed gives the same scene.
    """
    from kermes import io
    from kermes.simulation import PATCH_KINDS, simulate_patch, simulate_scene

    _check_file_output(output, ".npz")
    options: dict[str, Any] = {"kind": kind, "shape": shape, "seed": seed, **({"bands": bands} if bands else {})}
    scene: SimulatedScene | SimulatedPatch
    if kind in PATCH_KINDS:
        if n_sources is not None:
            raise _UsageError(f"--n-sources does not go with --kind {kind}; give --shape")
        scene = simulate_patch(**options)
    else:
        scene = simulate_scene(n_sources=n_sources, **options)
    truth = {f"truth_{name}": scene.truth[name] for name in scene.truth.colnames}
    knots = {f"knots_{name}": scene.knots[name] for name in scene.knots.colnames}
    io.write_npz(output, scene.coadd, peaks=scene.peaks, **truth, **knots)
    _say(f"{len(scene.truth)} sources, {len(scene.peaks)} peaks; written to {output}")


@app.command
def config(
    *,
    config: Path | None = None,
    setting: Settings = (),
) -> None:
    """Print all settings as TOML, each with what it means.

    Parameters
    ----------
    config
        TOML file of settings that differ from the defaults.
    setting
        Change one setting, for example --set profiles.residual_rounds=0; may be repeated.
    """
    from kermes.config import load_config

    print(_commented_toml(load_config(config, setting)), end="")


# ---------------------------------------------------------------- the pipelines of LSST

lsst = App(name="lsst", help="Work with a Butler and the pipelines of LSST; see the page on them in the documentation.")
app.command(lsst)


@lsst.command(name="make-repo")
def make_repo(
    repository: Path,
    /,
    *,
    patches: tuple[int, int] = (2, 2),
    bands: Annotated[tuple[str, ...], Parameter(negative=(), consume_multiple=True)] = ("g", "r", "i"),
    patch_size: int = 300,
    cell: int = 50,
    visits: bool = True,
    seed: int = 1,
) -> None:
    """Simulate a small tract and make a Butler repository with its coadds, to try the pipelines.

    Parameters
    ----------
    repository
        Directory to make. The coadds are in its collection kermes/inputs, with the sky map kermes_sim.
    patches
        Number of rows and columns of patches.
    bands
        Names of the bands, of u, g, r, i, z, y.
    patch_size
        Side of a patch [pixels], without the cell by which coadds reach further on each side.
    cell
        Side of a cell [pixels].
    visits
        Add the image of a single visit.
    seed
        The same seed gives the same sky.
    """
    from kermes.lsst import make_repository

    start = time.perf_counter()
    make_repository(
        repository, patches=patches, bands=bands, patch_size=patch_size, cell=cell, visits=visits, seed=seed
    ).close()
    n = patches[0] * patches[1]
    _say(
        f"{n} patch{'' if n == 1 else 'es'} in {_count(len(bands), 'band')}, "
        f"{time.perf_counter() - start:.0f} s; written to {repository}"
    )


@lsst.command(name="path")
def lsst_path(name: Literal["pipeline", "visits", "bps", "seed"] = "pipeline", /) -> None:
    """Print where a file is that programs of the pipelines are given.

    Parameters
    ----------
    name
        pipeline: what deblends patches and measures them, for pipetask -p; visits: what deblends single visits;
        bps: a submission to the cores of this machine, for bps submit; seed: the configuration of a new repository,
        for butler create --seed-config.
    """
    from kermes.lsst import paths

    files = {
        "pipeline": paths.PIPELINE,
        "visits": paths.VISIT_PIPELINE,
        "bps": paths.BPS_CONFIG,
        "seed": paths.SEED_CONFIG,
    }
    print(files[name])


@lsst.command(name="config")
def lsst_config() -> None:
    """Print what to set in the shell so that a repository made without kermes can hold its results.

    The same goes for whoever reads them. A repository that was made with the configuration that kermes lsst path seed
    names, and one of kermes lsst make-repo, needs nothing.
    """
    from kermes.lsst.paths import CONFIG_DIR

    others = "${DAF_BUTLER_CONFIG_PATH:+:$DAF_BUTLER_CONFIG_PATH}"
    print(f"export DAF_BUTLER_CONFIG_PATH={shlex.quote(str(CONFIG_DIR))}{others}")


# ---------------------------------------------------------------- input


def _input_arguments(inputs: Sequence[Path], planes: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Arguments of `io.read`, with absolute paths, so that they can be stored beside the result."""
    given = [f"--{plane}" for plane, words in planes.items() if words]
    if inputs:
        if given:
            raise _UsageError(f"INPUTS and {given[0]} exclude each other")
        files = [os.path.abspath(path) for path in inputs]
        return {"source": files[0] if len(files) == 1 else files}
    if not planes["image"]:
        raise _UsageError("give INPUTS (.npz, .toml or coadds of lsst.images), or --image band=file.fits[HDU] per band")
    by_band = {plane: _files_by_band(plane, words) for plane, words in planes.items() if words}
    return {"source": by_band.pop("image"), **by_band}


def _files_by_band(plane: str, words: Sequence[str]) -> dict[str, str]:
    files: dict[str, str] = {}
    for word in words:
        band, equals, file = word.partition("=")
        if not (band and equals and file):
            raise _UsageError(f"--{plane} must have the form band=file.fits[HDU], got {word}")
        if band in files:
            raise _UsageError(f"--{plane} must name each band once, got {band} twice")
        files[band] = os.path.abspath(file)
    return files


def _input_file(result: Path) -> bytes:
    from kermes.storage import Folder, current

    return current(Folder.of(result)).read(_INPUT_FILE)


def _input_extras(source: Mapping[str, Any]) -> dict[str, bytes]:
    """Make the file of a result that says what it was made from."""
    return {_INPUT_FILE: json.dumps(source, indent=1).encode() + b"\n"}


def _beside(result: Path, name: str) -> Path:
    """Where a picture goes that has no name: into the directory of the result, or beside its one file."""
    return result / name if result.is_dir() else result.with_name(f"{result.stem}_{name}")


def _remembered_input(result: Path) -> dict[str, Any]:
    try:
        source: dict[str, Any] = json.loads(_input_file(result))
    except (OSError, json.JSONDecodeError):
        raise InputError(f"coadd must be given, because {result} does not say what it was made from") from None
    files = [source["source"]] if isinstance(source["source"], str) else source["source"]
    for file in [] if isinstance(files, dict) else files:
        if not Path(file).exists():
            raise FileError(f"coadd must be given, because {file}, of which {result} was made, is gone")
    return source


def _read_table(path: Path) -> Table:
    import pyarrow.parquet as pq
    from astropy.io.registry import IORegistryError
    from astropy.table import Table

    from kermes.io.tables import from_arrow

    try:
        return from_arrow(pq.read_table(path)) if path.suffix == ".parquet" else Table.read(path)
    except (IORegistryError, ValueError, TypeError, KeyError, IndexError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"peaks must be a table (csv, ecsv, fits, parquet), got {path}: {reason}") from None
    except OSError as error:
        raise FileError(f"peaks must be a readable table, got {path}: {error.strerror or error}") from None


def _read_labels(reference: str) -> NDArray[Any]:
    import numpy as np
    from astropy.io import fits

    path, _, hdu = reference.partition("[")
    try:
        if path.endswith(".npy"):
            return np.asarray(np.load(path, allow_pickle=False))
        key = hdu.removesuffix("]")
        return np.asarray(fits.getdata(path, *([int(key) if key.isdigit() else key] if key else [])))
    except OSError as error:
        raise FileError(f"footprints must be a readable image, got {reference}: {error.strerror or error}") from None
    except (ValueError, KeyError, IndexError) as error:
        raise InputError(
            f"footprints must be file.npy or file.fits[HDU], got {reference}: {_one_line(error)}"
        ) from None


# ---------------------------------------------------------------- work


def _watch(plan: TilePlan, outcomes: Iterator[BlendOutcome]) -> Iterator[BlendOutcome]:
    """Show how far the work is on a terminal, and end early, with what is finished, when the user presses Ctrl-C."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("objects, {task.fields[rate]:.0f} per second,"),
        TimeRemainingColumn(),
        TextColumn("left{task.fields[slow]}"),
    )
    start = time.perf_counter()
    with (
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
        _stop_on_interrupt() as stopped,
    ):
        bar = progress.add_task(f"{_count(plan.n_blends, 'blend')}", total=plan.n_peaks, rate=0.0, slow="")
        for outcome in outcomes:
            yield outcome
            n_sources = len(outcome.task.members)
            progress.update(bar, advance=n_sources)
            rate = progress.tasks[0].completed / (time.perf_counter() - start)
            progress.update(bar, rate=rate)
            if outcome.seconds > _SLOW:
                model = outcome.columns["outcome"]
                progress.update(bar, slow=f"; a {model!s} blend of {n_sources} took {outcome.seconds:.0f} s")
            if stopped():
                return


@contextmanager
def _stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Note the first Ctrl-C instead of stopping at once; the second one stops."""
    pressed = False

    def note(*_: object) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _say("stopping when the blends in work are finished; Ctrl-C again stops at once")

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _wanted(
    result: Result,
    object_ids: Sequence[int],
    blend_id: int | None,
    position: Mapping[str, float | None],
    radius: float | None,
) -> list[int] | None:
    """Numbers of the objects that are asked for; None: all of the result."""
    given = {name: value for name, value in position.items() if value is not None}
    if sum((bool(object_ids), blend_id is not None, bool(given))) > 1:
        raise _UsageError("--object, --blend and a position exclude each other")
    if object_ids:
        return [result[number].object_id for number in object_ids]
    if blend_id is not None:
        found = result.objects["object_id"][result.objects["blend_id"] == blend_id].tolist()
        if not found:
            raise InputError(f"blend must be one of the result with objects, got {blend_id}")
        return [int(number) for number in found]
    if not given:
        return None
    reach = radius if radius is not None else 2.0 if "ra" in given else 10.0
    near = [handle.object_id for handle in result.near(**given, radius=reach)]
    if not near:
        unit = "arcsec" if "ra" in given else "pixels"
        raise InputError(f"position must have an object within {reach:g} {unit}, got {given}")
    return near


def _description(result: Result, object_id: int) -> str:
    """Say in a few lines what is known of an object."""
    row = result[object_id].row
    flags = [name.removeprefix("flag_") for name in result.objects.colnames if name.startswith("flag_") and row[name]]
    unit = "" if result.unit is None else f" {result.unit}"
    fluxes = [f"{band} {row[f'{band}_flux']:.5g} +- {row[f'{band}_flux_err']:.2g}" for band in result.bands]
    lines = [
        f"object {object_id}, blend {row['blend_id']}, at y = {row['y']:.2f}, x = {row['x']:.2f}"
        + (f", ra = {row['ra']:.6f}, dec = {row['dec']:.6f}" if row["ra"] == row["ra"] else ""),
        f"  {row['model'] or 'no model'}, {row['outcome']}"
        + (f" ({row['reason']})" if row["reason"] else "")
        + f", chi2 {row['chi2']:.2f}"
        + (f"; {', '.join(flags)}" if flags else ""),
        f"  flux: {', '.join(fluxes)}{unit}",
    ]
    return "\n".join(lines)


def _picture(result: Result, object_ids: Sequence[int] | None = None) -> bytes:
    from kermes import plots

    return plots.png_bytes(plots.show_result(result) if object_ids is None else plots.show_objects(result, object_ids))


def _check_file_output(path: Path, *suffixes: str, overwrite: bool = True) -> None:
    """Refuse a file that cannot be written, or that is there and must not be replaced, before the work begins."""
    if path.suffix.lower() not in suffixes:
        raise InputError(f"output must end in {', '.join(suffixes)}, got {path}")
    if not path.absolute().parent.is_dir():
        raise FileError(f"output must lie in a directory that exists, got {path}")
    if path.exists() and not overwrite:
        raise FileError(f"output must be new, got {path}, which exists; --overwrite replaces it")


# ---------------------------------------------------------------- reports


def _blend_chi2(result: Result, blend_id: int) -> float:
    return float(result.blends["chi2"][result.blends["blend_id"] == blend_id][0])


def _summary(result: Result) -> str:
    import numpy as np

    outcomes = ", ".join(f"{count} {name}" for name, count in result.ledger()["outcomes"].items())
    weights, chi2 = (np.asarray(result.blends[name], dtype=float) for name in ("n_pixels", "chi2"))
    used = (weights > 0) & np.isfinite(chi2)
    quality = f", chi2 {np.average(chi2[used], weights=weights[used]):.3f}" if used.any() else ""
    return (
        f"{_count(len(result), 'object')} in {_count(len(result.blends), 'blend')}"
        + (f" ({outcomes})" if outcomes else "")
        + quality
    )


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _comparison(result: Result, scene: SimulatedScene) -> Iterator[str]:
    """Lines that say how well each flux agrees with the truth."""
    import numpy as np

    truth = scene.truth[np.asarray(scene.truth["peak_index"]) >= 0]
    truth = truth[np.argsort(-np.asarray(truth["snr"]), kind="stable")]
    objects = result.objects[np.argsort(np.asarray(result.objects["peak_index"]))][np.asarray(truth["peak_index"])]

    def per_band(table: Table, name: str) -> NDArray[Any]:
        return np.array([np.asarray(table[f"{band}_{name}"], dtype=float) for band in result.bands]).T

    true_flux, error = per_band(truth, "flux"), per_band(objects, "flux_err")
    difference = per_band(objects, "flux") - true_flux
    shared = per_band(objects, "redistributed_flux") - true_flux
    bright = true_flux > 20 * error

    def row(head: str, values: Sequence[str]) -> str:
        return f"{head:38}" + "".join(f"{value:>8}" for value in values)

    def statistic(name: str, form: str, of: Callable[[NDArray[Any]], float], values: NDArray[Any]) -> str:
        chosen = [values[bright[:, b], b] for b in range(len(result.bands))]
        return row(name, [format(of(some), form) if len(some) else "-" for some in chosen])

    yield "measured flux / true flux - 1, in percent, where the true flux is above 5 sigma"
    yield row(f"{'object':>6}  {'kind':10}{'signal/noise':>10}{'blended':>8}", result.bands)
    for k, source in enumerate(truth):
        head = f"{objects['object_id'][k]:>6}  {'star' if source['is_star'] else 'galaxy':10}"
        head += f"{source['snr']:>12.0f}{max(source['blendedness'], 0):>8.2f}"
        seen = true_flux[k] > 5 * error[k]
        percent = 100 * np.divide(difference[k], true_flux[k], out=np.zeros_like(error[k]), where=seen)
        yield row(head, [f"{value:+.1f}" if shown else "-" for value, shown in zip(percent, seen, strict=True)])
    yield ""
    yield row("all objects above 20 sigma", result.bands)
    yield statistic("number", "d", len, difference)
    yield statistic("median of the difference [%]", "+.1f", np.median, 100 * difference / true_flux)
    yield statistic("its scatter [%]", ".1f", _scatter, 100 * difference / true_flux)
    yield statistic("its scatter / stated error", ".1f", _scatter, difference / error)
    yield statistic("scatter of the shared-out flux [%]", ".1f", _scatter, 100 * shared / true_flux)


def _scatter(values: NDArray[Any]) -> float:
    """Standard deviation of a Gaussian with the same median absolute deviation."""
    import numpy as np

    return float(1.4826 * np.median(np.abs(values - np.median(values))))


def _commented_toml(settings: Any) -> str:
    """Settings as TOML; the docstring of each field stands above it."""
    from kermes.config import field_docstrings, to_toml

    meanings = field_docstrings(settings)
    lines, section = [], ""
    for line in to_toml(settings).splitlines():
        if line.startswith("["):
            section = line.strip("[]") + "."
            lines += [f"# {text}" for text in meanings[line.strip("[]")].splitlines()]
        elif "=" in line:
            key = section + line.partition("=")[0].strip()
            if lines and not lines[-1].startswith("["):
                lines.append("")
            lines += [f"# {text}" for text in meanings[key].splitlines()]
        lines.append(line)
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- talking


def _say_where(address: str) -> None:
    _say(f"the result is shown at {address} (Ctrl-C ends it)")


def _say(text: str) -> None:
    print(f"kermes: {text}", file=sys.stderr, flush=True)


@contextmanager
def _step(text: str) -> Iterator[None]:
    """Say what is done, and then how long it took."""
    print(f"kermes: {text} ...", end="", file=sys.stderr, flush=True)
    start = time.perf_counter()
    try:
        yield
    except BaseException:
        print(file=sys.stderr)
        raise
    print(f" {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)


def _one_line(error: object) -> str:
    return " ".join(str(error).split())


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    _say(f"warning: {_one_line(message)}")


def _set_verbosity(verbose: bool) -> None:
    logging.basicConfig(format="%(name)s: %(message)s")
    logging.getLogger("kermes").setLevel(logging.INFO if verbose else logging.WARNING)


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code: 0, 1 for an expected error, 2 for wrong usage, 130 for Ctrl-C.

    A bug raises what it raises.
    """
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            command, bound, _ = app.parse_args(list(arguments), exit_on_error=False, print_error=False)
            command(*bound.args, **bound.kwargs)
        except (CycloptsError, _UsageError) as error:
            _say(f"{_one_line(error).rstrip('.')}; see kermes --help")
            return 2
        except KermesError as error:
            _say(_one_line(error))
            return 1
        except KeyboardInterrupt:
            _say("interrupted")
            return 130
    return 0


def main() -> None:
    """Run the program."""
    # Imports and pictures make many objects and hardly any garbage: looking for it often takes a sixth of a short run.
    gc.set_threshold(20_000)
    sys.exit(run(sys.argv[1:]))
