"""A whole tile from images to a catalog: time, memory, rows, and the answer against the truth.

A simulated patch of a survey, or a dense field of stars, is deblended end to end in this process after a small one that
is not counted. Printed are wall time, processor time, the peak of resident memory above what was there before (the
images and the simulated truth), time per object by stage, the ledger, completeness and purity, and how good the fluxes
are, by magnitude. ``--same`` and ``--overlap`` are questions of their own, asked afterwards on the same patch. Linux
only, for the memory.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from machine import parser, print_header, print_verdict, write
from memory import resident_mb, settle
from numpy.typing import NDArray
from scipy.spatial import cKDTree

import kermes
from kermes.config import Config
from kermes.detection import detect
from kermes.geometry import Box
from kermes.simulation import PATCH_KINDS, SimulatedPatch, simulate_patch

REACH = 3.0
"""Farthest a row may lie from the source that it answers [pixels]."""

DETECTED = 5.0
"""Signal-to-noise of all bands together from which on a source counts."""

MAGNITUDES = (0.0, 18.0, 20.0, 22.0, 23.0, 24.0, 25.0, 26.0, 27.0, 40.0)
"""Edges of the bins in i, or in the last band if there is no i."""

MARGIN = 60
"""How far inside both cut-outs an object must lie to be compared [pixels]."""

MEMORY_MB, MS_PER_OBJECT, BELOW_POINT, CHANGED = 2000.0, 4.0, 0.01, 0.01


def pair_up(
    positions: NDArray[np.float64], others: NDArray[np.float64], reach: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pair rows of two lists of positions (N, 2) and (M, 2), the nearest first, each row once."""
    first, second, distance = [], [], []
    if len(positions) and len(others):
        neighbours: Any = cKDTree(others).query_ball_point(positions, reach)
        for k, near in enumerate(neighbours):
            for j in near:
                first.append(k)
                second.append(j)
                distance.append(float(np.hypot(*(positions[k] - others[j]))))
    one, two = np.zeros(len(positions), dtype=bool), np.zeros(len(others), dtype=bool)
    pairs = []
    for i in np.argsort(distance, kind="stable").tolist():
        k, j = first[i], second[i]
        if not (one[k] or two[j]):
            one[k] = two[j] = True
            pairs.append((k, j))
    table = np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def column(table: Any, name: str) -> NDArray[np.float64]:
    """Make plain numbers of a column."""
    return np.asarray(table[name], dtype=float)


def places(table: Any) -> NDArray[np.float64]:
    """Positions (N, 2) of the rows of a table."""
    return np.stack([column(table, "y"), column(table, "x")], axis=1)


def snr_of(result: kermes.Result) -> NDArray[np.float64]:
    """Signal-to-noise (N,) of the rows, all bands together; bands without a flux do not count."""
    square = [
        (column(result.objects, f"{b}_flux") / column(result.objects, f"{b}_flux_err")) ** 2 for b in result.bands
    ]
    return np.asarray(np.sqrt(np.nansum(square, axis=0)))


def magnitude(flux: NDArray[np.float64], patch: SimulatedPatch) -> NDArray[np.float64]:
    """AB magnitude of fluxes; 39 where the flux is not positive."""
    zero_point = patch.coadd.zero_point
    assert zero_point is not None
    return np.asarray(np.where(flux > 0, zero_point - 2.5 * np.log10(np.maximum(flux, 1e-12)), 39.0)).clip(max=39.0)


def spread(values: NDArray[np.float64]) -> float:
    """1.48 times the median distance from the median; the standard deviation of a Gaussian. NaN of nothing."""
    return float(1.4826 * np.median(np.abs(values - np.median(values)))) if len(values) else np.nan


def by_magnitude(patch: SimulatedPatch, result: kermes.Result, given: bool) -> list[dict[str, Any]]:
    """Compare with the truth: one dictionary per bin of magnitude."""
    band = "i" if "i" in result.bands else result.bands[-1]
    truth = patch.truth[np.asarray(patch.truth["peak_index"]) >= 0]
    if given:
        sources = np.arange(len(truth))
        rows = np.asarray(truth["peak_index"])
    else:
        sources, rows = pair_up(places(truth), places(result.objects), REACH)
    true, flux = column(truth, f"{band}_flux"), column(result.objects, f"{band}_flux")
    error = column(result.objects, f"{band}_flux_err")
    found, real = np.zeros(len(truth), dtype=bool), np.zeros(len(result), dtype=bool)
    found[sources], real[rows] = True, True
    bin_of_truth = np.digitize(magnitude(true, patch), MAGNITUDES)
    bin_of_row = np.digitize(magnitude(np.nan_to_num(flux), patch), MAGNITUDES)
    out = []
    for k in range(1, len(MAGNITUDES)):
        here = bin_of_truth[sources] == k
        f, t, e = flux[rows[here]], true[sources[here]], error[rows[here]]
        known = np.isfinite(f)
        relative, pull = (f / t - 1)[known], ((f - t) / e)[known]
        members, claims = bin_of_truth == k, bin_of_row == k
        out.append(
            {
                "magnitudes": MAGNITUDES[k - 1 : k + 1],
                "band": band,
                "sources": int(members.sum()),
                "complete": float(found[members].mean()) if members.any() else np.nan,
                "rows": int(claims.sum()),
                "pure": float(real[claims].mean()) if claims.any() else np.nan,
                "bias": float(np.median(relative)) if len(relative) else np.nan,
                "nmad": spread(relative),
                "mean_pull": float(np.median(pull)) if len(pull) else np.nan,
                "pull": spread(pull),
                # Without a flux is wrong, too.
                "half_wrong": float(1 - (np.abs(relative) <= 0.5).sum() / here.sum()) if here.any() else np.nan,
            }
        )
    return out


def print_bins(bins: list[dict[str, Any]], given: bool) -> None:
    """Print the comparison with the truth."""
    how = "peaks given" if given else f"pairs within {REACH:g} pixels"
    print(f"against the truth, band {bins[0]['band']}; {how}")
    print("   magnitude  sources complete   rows   pure     bias   nmad  pull: median, width  half wrong")
    for row in bins:
        if row["sources"] or row["rows"]:
            low, high = row["magnitudes"]
            print(
                f"   {low:4.0f} - {high:2.0f} {row['sources']:8d} {row['complete']:8.3f} {row['rows']:6d} "
                f"{row['pure']:6.3f} {row['bias']:8.4f} {row['nmad']:6.3f} {row['mean_pull']:12.2f} "
                f"{row['pull']:7.2f} {row['half_wrong']:11.3f}"
            )


def measure(patch: SimulatedPatch, peaks: Any, workers: int, config: Config) -> tuple[kermes.Result, dict[str, Any]]:
    """Deblend once; time, memory and rows."""
    settle()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_mb("VmRSS")
    if resident_mb("VmHWM") > before + 1:
        sys.exit("this system does not reset the high-water mark of memory")
    wall, core = time.perf_counter(), time.process_time()
    result = kermes.deblend(patch.coadd, peaks, config=config, workers=workers)
    wall, core = time.perf_counter() - wall, time.process_time() - core
    peak = resident_mb("VmHWM") - before
    detection = 0.0
    if isinstance(peaks, str):
        start = time.process_time()
        detect(patch.coadd, config.detection)
        detection = time.process_time() - start
    n = max(len(result), 1)
    stages: Mapping[str, Any] = result.timings
    ledger = result.ledger()
    snr, outcome = snr_of(result), np.asarray(result.objects["outcome"], dtype=str)
    above = snr > DETECTED
    low = ~np.isin(outcome, ["full", "single", "point"]) & above
    if not ledger["peaks"] == ledger["rows"] == sum(ledger["outcomes"].values()) or "none" in ledger["outcomes"]:
        sys.exit(f"peaks without a row: {ledger}")
    return result, {
        "objects": len(result),
        "blends": len(result.blends),
        "parents": len(result.parents),
        "wall_s": wall,
        "core_s": core,
        "peak_mb": peak,
        "input_mb": (patch.coadd.images.nbytes + patch.coadd.variance.nbytes + patch.coadd.valid.nbytes) / 1e6,
        "ms_per_object": {
            "plan": 1e3 * stages["plan"] / n,
            "blends": 1e3 * float(np.nansum(stages["blends"])) / n,
            "collect": 1e3 * stages["collect"] / n,
            "core, without detection": 1e3 * (core - detection) / n,
        },
        "slowest_blend_s": float(np.nanmax(stages["blends"])) if len(result.blends) else 0.0,
        "median_chi2": float(np.nanmedian(column(result.blends, "chi2"))) if len(result.blends) else np.nan,
        "ledger": ledger,
        "below_point": float(low.sum() / max(above.sum(), 1)),
    }


def print_measured(figures: dict[str, Any]) -> None:
    """Print time, memory and rows."""
    print(
        "{objects} objects in {blends} blends of {parents} parents; wall {wall_s:.1f} s, core {core_s:.1f} s, "
        "slowest blend {slowest_blend_s:.2f} s, median chi2 {median_chi2:.3f}".format(**figures)
    )
    print(
        "ms per object, stages by the clock: "
        + ", ".join(f"{name} {value:.2f}" for name, value in figures["ms_per_object"].items())
    )
    print(f"ledger: {figures['ledger']}")
    print_verdict(
        f"peak memory above the input ({figures['input_mb']:.0f} MB)", figures["peak_mb"], MEMORY_MB, unit=" MB"
    )
    print_verdict(
        "core time per object without detection",
        figures["ms_per_object"]["core, without detection"],
        MS_PER_OBJECT,
        unit=" ms",
    )
    print_verdict(f"rows above S/N {DETECTED:g} below the rung point", figures["below_point"], BELOW_POINT)


def files_of(folder: Path) -> dict[str, bytes]:
    """Contents of all files below a folder but for the timings."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "timings.json"
    }


def measure_same(patch: SimulatedPatch, peaks: Any, config: Config) -> dict[str, Any]:
    """Write the results of 1 worker, of 2, and of a run that was stopped half-way; compare all bytes."""
    out: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def half(plan: Any, outcomes: Any) -> Any:
            return islice(outcomes, plan.n_blends // 2)

        kermes.deblend(patch.coadd, peaks, config=config, workers=1).write(folder / "reference")
        reference = files_of(folder / "reference")
        for label in ("2 workers", "stopped and resumed"):
            if label == "2 workers":
                result = kermes.deblend(patch.coadd, peaks, config=config, workers=2)
            else:
                kept = folder / "checkpoint"
                part = kermes.deblend(patch.coadd, peaks, config=config, workers=2, checkpoint=kept, watch=half)
                if part.is_complete or len(part) != len(result):
                    sys.exit("a run that was stopped half-way must have all rows and say that it is not complete")
                result = kermes.deblend(patch.coadd, peaks, config=config, workers=2, checkpoint=kept)
            result.write(folder / label)
            files = files_of(folder / label)
            differ = [
                name for name in sorted(reference.keys() | files.keys()) if reference.get(name) != files.get(name)
            ]
            out[label] = {"files": len(reference), "bytes": sum(map(len, reference.values())), "differ": differ}
            print(
                f"{label} against 1 worker: {len(reference)} files, {out[label]['bytes'] / 1e6:.1f} MB, "
                f"{'identical' if not differ else 'DIFFERENT: ' + ', '.join(differ)}"
            )
    return out


def measure_overlap(patch: SimulatedPatch, given: bool, workers: int, config: Config) -> dict[str, Any]:
    """Deblend two cut-outs that overlap; compare the fluxes of the objects well inside both."""
    height, width = patch.coadd.shape
    side = width // 2 + max(width // 10, 2 * MARGIN)
    if side >= width:
        sys.exit(f"the patch must be wider than {4 * MARGIN} pixels for two cut-outs that overlap")
    left, right = Box(0, 0, height, side), Box(0, width - side, height, side)
    shared = left & right
    tables = []
    for box in (left, right):
        peaks: Any = "detect"
        if given:
            peaks = patch.peaks[(patch.peaks[:, 1] >= box.x0) & (patch.peaks[:, 1] < box.x1)]
        objects = kermes.deblend(patch.coadd.cutout(box), peaks, config=config, workers=workers).objects
        y, x = column(objects, "y"), column(objects, "x")
        inside = (x >= shared.x0 + MARGIN) & (x < shared.x1 - MARGIN) & (y >= MARGIN) & (y < height - MARGIN)
        tables.append(objects[inside])
    one, two = pair_up(places(tables[0]), places(tables[1]), 1.0)
    n_rows = max(map(len, tables))
    if not len(one):
        sys.exit("no object lies well inside both cut-outs: the patch is too small")
    bands = patch.coadd.bands
    flux, other = (
        np.array([column(table[rows], f"{band}_flux") for band in bands])
        for table, rows in zip(tables, (one, two), strict=True)
    )
    error = np.array([column(tables[0][one], f"{band}_flux_err") for band in bands])
    counts = np.isfinite(flux) & np.isfinite(other) & (np.abs(flux) > DETECTED * error)
    change = np.abs(other - flux)
    agree = float((change[counts] <= CHANGED * np.abs(flux[counts])).mean())
    sigmas = (change / error)[np.isfinite(change)]
    quantiles = {f"{q:g}": float(np.quantile(sigmas, q)) for q in (0.5, 0.9, 0.99, 1.0)}
    print(
        f"two cut-outs: {len(one)} of {n_rows} objects at least {MARGIN} pixels inside both are in both; of "
        f"{counts.sum()} fluxes above S/N {DETECTED:g}, {agree:.4f} agree to {CHANGED:.0%}"
    )
    print("   difference in errors, quantiles: " + ", ".join(f"{q}: {value:.3g}" for q, value in quantiles.items()))
    return {
        "objects": n_rows,
        "in_both": len(one),
        "fluxes": int(counts.sum()),
        "agree": agree,
        "difference_sigma": quantiles,
    }


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument(
        "--kind", choices=PATCH_KINDS, default="patch", help="a survey patch, or a dense field of stars"
    )
    options.add_argument("--shape", type=int, nargs=2, metavar=("H", "W"), help="pixels; that of the kind if left out")
    options.add_argument("--seed", type=int, default=0, help="of the simulation")
    options.add_argument("--workers", type=int, default=1, help="blends in work at the same time")
    options.add_argument("--given", action="store_true", help="give the true peaks instead of detecting them")
    options.add_argument("--same", action="store_true", help="compare files of 1 and 2 workers, and of a resumed run")
    options.add_argument("--overlap", action="store_true", help="compare fluxes of two cut-outs that overlap")
    args: argparse.Namespace = options.parse_args()
    config = Config()
    shape = tuple(args.shape) if args.shape else ((600, 600) if args.quick and args.kind == "patch" else None)
    if shape is None and args.quick:
        shape = (300, 300)
    print_header(f"whole tile, {args.kind}, seed {args.seed}, model {config.model}", workers=str(args.workers))
    start = time.perf_counter()
    patch = simulate_patch(kind=args.kind, shape=shape, seed=args.seed)
    peaks: Any = patch.peaks if args.given else "detect"
    print(
        f"simulated {patch.coadd.shape} pixels, {patch.coadd.n_bands} bands, {len(patch.peaks)} sources "
        f"in {time.perf_counter() - start:.0f} s; peaks {'given' if args.given else 'detected'}"
    )
    small = simulate_patch(kind=args.kind, shape=(150, 150), seed=args.seed + 1)
    kermes.deblend(small.coadd, small.peaks if args.given else "detect", config=config, workers=args.workers)
    result, figures = measure(patch, peaks, args.workers, config)
    print_measured(figures)
    figures["truth"] = by_magnitude(patch, result, args.given)
    print_bins(figures["truth"], args.given)
    del result
    if args.same:
        figures["same"] = measure_same(patch, peaks, config)
    if args.overlap:
        figures["overlap"] = measure_overlap(patch, args.given, args.workers, config)
    write(args.json, {"kind": args.kind, "shape": patch.coadd.shape, "seed": args.seed, **figures})


if __name__ == "__main__":
    main()
