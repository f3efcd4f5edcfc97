"""Stored results: size, how long one object takes and what is read for it, the bound on rounding, and damage.

A survey patch is simulated and deblended with each model and written with the default tolerance, exactly, and as a
.scarlet archive. ``--damage N`` alters N copies at random and reads them; ``--kills N`` kills N processes while they
replace a result.
"""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
from machine import parser, print_header, print_verdict, write

import kermes
from kermes import io
from kermes.result import Result
from kermes.simulation import simulate_patch

KB_PER_OBJECT, MILLISECONDS, TOLERANCE = 4.5, 50.0, 0.05


def kb_per_object(path: Path, n: int) -> float:
    """Size of a file or directory over the number of objects [kB]."""
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files) / 1e3 / n


def largest_difference(result: Result, path: Path) -> float:
    """Largest difference of a stored model as observed from the one that was fitted, all objects, in sigma."""
    opened, coadd, largest = kermes.open(path), result.coadd, 0.0
    assert coadd is not None
    for handle in result:
        stamps, stored = handle.stamps("model"), opened[handle.object_id].stamps("model")
        for b, band in enumerate(result.bands):
            box = stamps[band].box
            if box.is_empty:
                continue
            window = (b, *box.within(coadd.box))
            sigma = np.sqrt(np.where(coadd.valid[window], coadd.variance[window], np.inf))
            largest = max(largest, float((np.abs(stamps[band].array - stored[band].array) / sigma).max()))
    return largest


def one_object(path: Path, ids: list[int], by_sky: dict[int, tuple[float, float]]) -> tuple[float, int, float, int]:
    """Median time [ms] and bytes to open a result and draw one object in one band, by number and by position."""
    figures: list[tuple[float, int, float, int]] = []
    for number in ids:
        start = time.perf_counter()
        result = kermes.open(path)
        result[number].model(result.bands[0])
        by_id, read = time.perf_counter() - start, result.models.bytes_read
        start = time.perf_counter()
        result = kermes.open(path)
        ra, dec = by_sky[number]
        result.near(ra=ra, dec=dec, radius=2.0)[0].model(result.bands[0])
        figures.append((1e3 * by_id, read, 1e3 * (time.perf_counter() - start), result.models.bytes_read))
    columns = list(zip(*figures, strict=True))
    return (
        statistics.median(columns[0]),
        int(statistics.median(columns[1])),
        statistics.median(columns[2]),
        int(statistics.median(columns[3])),
    )


def everything(result: Result) -> tuple[object, ...]:
    """Read all of a result; what is returned depends on every number of it."""
    tables = [getattr(result, name) for name in ("objects", "parents", "blends", "candidates")]
    columns = [table[name] for table in tables for name in table.colnames]
    numbers = [float(np.nansum(column)) for column in columns if column.dtype.kind == "f"]
    models = [result.models[number].model(len(result.bands)).tobytes() for number in result.models]
    psfs = [result.psfs[number].tobytes() for number in result.psfs]
    return numbers, models, psfs, [each.area for each in result.footprints.values()], str(result.timings)


def damage(result: Result, n: int) -> None:
    """Alter copies of a result in five ways and read them."""
    rng = np.random.default_rng(1)
    refused = 0
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "whole")
        result.write(whole)
        foreign = b"".join(file.read_bytes()[:3000] for file in whole.iterdir())
        files = {file.name: file.read_bytes() for file in sorted(whole.iterdir())}
        for trial in range(n):
            name = [*files][int(rng.integers(len(files)))]
            content, kind = bytearray(files[name]), trial % 5
            if kind == 0:
                content = content[: int(rng.integers(len(content)))]
            elif kind == 1:
                content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
            elif kind == 2:
                place = rng.integers(0, len(content), 20)
                for each in place.tolist():
                    content[each] ^= int(rng.integers(1, 256))
            elif kind == 3:
                content = bytearray(foreign)
            else:
                content = bytearray(files["objects.parquet" if name != "objects.parquet" else "models.parquet"])
            (whole / name).write_bytes(bytes(content))
            try:
                everything(kermes.open(whole))
            except kermes.FileError:
                refused += 1
            else:
                print(f"  not refused: {name}, kind {kind}")
            (whole / name).write_bytes(files[name])
        everything(kermes.open(whole))
    print_verdict(f"damaged results refused with a FileError, of {n}", refused, n, at_least=True)


_WRITER = """
import sys, kermes
one, two, target = sys.argv[1:]
results = [kermes.open(one), kermes.open(two)]
print("ready", flush=True)
while True:
    for result in results:
        result.write(target, overwrite=True)
"""


def kills(first: Result, second: Result, n: int) -> None:
    """Kill processes that replace a result by another, over and over; what is left must be one of both."""
    rng = np.random.default_rng(2)
    whole = 0
    with tempfile.TemporaryDirectory() as folder:
        one, two, target = (Path(folder, name) for name in ("one", "two", "target"))
        first.write(one)
        second.write(two)
        shutil.copytree(one, target)
        wanted = [everything(kermes.open(path)) for path in (one, two)]
        for _ in range(n):
            command = [sys.executable, "-c", _WRITER, str(one), str(two), str(target)]
            with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
                assert process.stdout is not None
                process.stdout.readline()
                time.sleep(float(rng.uniform(0.0, 0.3)))
                os.kill(process.pid, signal.SIGKILL)
            whole += everything(kermes.open(target)) in wanted
    print_verdict(f"whole results after a kill, of {n}", whole, n, at_least=True)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--side", type=int, default=3400, help="height and width of the patch [pixels]")
    arguments.add_argument("--damage", type=int, default=0, help="number of damaged copies to read")
    arguments.add_argument("--kills", type=int, default=0, help="number of processes to kill while they write")
    options = arguments.parse_args()
    print_header("stored results", workers="2")
    side = 600 if options.quick else options.side
    patch = simulate_patch(seed=5, density_arcmin2=82.0, shape=(side, side))
    figures: dict[str, dict[str, float]] = {}
    small: list[Result] = []
    for model in ("kermes", "scarlet-lite"):
        result = kermes.deblend(patch.coadd, peaks=patch.peaks, config=kermes.Config(model=model), workers=2)
        n, ids = len(result), result.objects["object_id"].tolist()
        print(f"\n{model}: {n} objects, {len(result.bands)} bands")
        with tempfile.TemporaryDirectory() as folder:
            rounded, exact, archive = (Path(folder, name) for name in ("rounded", "exact", "models.scarlet"))
            start = time.perf_counter()
            result.write(rounded)
            print(f"  written in {time.perf_counter() - start:.1f} s")
            result.write(exact, tolerance=None)
            conversion = io.write_scarlet(result, archive)
            size = kb_per_object(rounded, n)
            print_verdict("size", size, KB_PER_OBJECT, unit=" kB per object")
            for name in ("models.parquet", "objects.parquet"):
                print(f"    of which {name}: {kb_per_object(rounded / name, n):.2f}")
            alone = kb_per_object(exact / "models.parquet", n)
            print(f"  exact: {kb_per_object(exact, n):.2f}, models.parquet alone {alone:.2f}")
            with zipfile.ZipFile(archive) as members:
                plain = sum(member.file_size for member in members.infolist()) / 1e3 / n
            print(f"  as a .scarlet archive: {kb_per_object(archive, n):.2f}, {plain:.2f} without compression")
            if conversion.n_profiles:
                print(
                    f"    {conversion.n_profiles} with profiles: up to {conversion.largest_error:.1e} of the brightest "
                    f"pixel, {conversion.largest_flux_error:.1e} of the flux"
                )
            difference = largest_difference(result, rounded)
            print_verdict("largest rounding of a pixel as observed", difference, TOLERANCE, unit=" sigma")
            some = [ids[k] for k in np.linspace(0, n - 1, 21).astype(int).tolist()]
            places = zip(result.objects["ra"].tolist(), result.objects["dec"].tolist(), strict=True)
            sky = dict(zip(ids, places, strict=True))
            one_object(rounded, some[:2], sky)
            by_id, read, by_sky, read_by_sky = one_object(rounded, some, sky)
            print_verdict("one object by number", by_id, MILLISECONDS, unit=" ms")
            print_verdict("one object by position", by_sky, MILLISECONDS, unit=" ms")
            print(f"  bytes read for that: {read} by number, {read_by_sky} by position")
            figures[model] = {
                "objects": n,
                "kb_per_object": size,
                "kb_per_object_exact": kb_per_object(exact, n),
                "kb_per_object_scarlet": kb_per_object(archive, n),
                "largest_difference_sigma": difference,
                "ms_by_number": by_id,
                "ms_by_position": by_sky,
                "bytes_by_number": read,
                "bytes_by_position": read_by_sky,
            }
        cut = patch.coadd.cutout(kermes.Box(0, 0, 300, 300))
        small.append(kermes.deblend(cut, config=kermes.Config(model=model)))
    if options.damage:
        damage(small[1], options.damage)
    if options.kills:
        kills(small[0], small[1], options.kills)
    write(options.json, figures)


if __name__ == "__main__":
    main()
