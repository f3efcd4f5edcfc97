"""The single-band deblender: time per source and band, and what one footprint full of sources needs.

* Simulated fields of 100 to 1000 sources in six bands, footprints found, one thread: `kermes.deblend` from the coadd to
  the catalog, and of that the work on templates alone.
* One footprint of 1000 x 1000 pixels with 5,000 peaks in one band: time and resident memory.

Times are medians. The bar is 1 ms per source and band for all of it.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import parser, print_header, print_verdict, write
from memory import resident_mb, settle

import kermes
from kermes.config import Config
from kermes.modelling import fit_blend
from kermes.planning import plan_tile
from kermes.simulation import simulate_scene

LIMIT_MS = 1.0
CONFIG = Config(model="templates")


def time_field(n_sources: int, repeat: int) -> dict[str, float]:
    """Deblend a field; milliseconds per source and band."""
    side = int(np.sqrt(n_sources * 600))
    scene = simulate_scene(kind="field", n_sources=n_sources, shape=(side, side), seed=n_sources)
    n_peaks, n_bands = len(scene.peaks), len(scene.coadd.bands)
    whole, alone = [], []
    for _ in range(repeat):
        start = time.perf_counter()
        result = kermes.deblend(scene.coadd, peaks=scene.peaks, config=CONFIG)
        len(result.objects)
        whole.append(time.perf_counter() - start)
        plan = plan_tile(scene.coadd, scene.peaks, config=CONFIG)
        start = time.perf_counter()
        for task in plan.tasks:
            fit_blend(plan, task)
        alone.append(time.perf_counter() - start)
        assert len(result) == n_peaks
        assert result.ledger()["outcomes"].get("full", 0) > 0.9 * n_peaks
    per_unit = 1e3 / (n_peaks * n_bands)
    ms, whole_ms = (float(np.median(times)) * per_unit for times in (alone, whole))
    return {"sources": n_peaks, "whole_ms": whole_ms, "ms": ms}


def one_footprint(n_peaks: int, side: int) -> dict[str, float]:
    """Deblend one footprint full of sources in one band; seconds and megabytes above what was there before."""
    rng = np.random.default_rng(5)
    y, x = np.mgrid[-15:16, -15:16]
    psf = (1 + (y**2 + x**2) / 9.0) ** -3
    peaks = rng.integers(16, side - 16, (n_peaks, 2))
    image = rng.normal(0, 1, (side, side)).astype(np.float32)
    for (row, column), flux in zip(peaks, 20.0 * rng.uniform(0.002, 1, n_peaks) ** -0.7, strict=True):
        image[row - 15 : row + 16, column - 15 : column + 16] += (flux * psf).astype(np.float32)
    coadd = kermes.Coadd(images=image[None], variance=1.0, psfs=psf / psf.sum(), bands="r")
    footprint = np.ones((side, side), dtype=int)
    settle()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_mb("VmRSS")
    start = time.perf_counter()
    result = kermes.deblend(coadd, peaks=peaks, footprints=footprint, config=CONFIG)
    seconds = time.perf_counter() - start
    assert len(result) == n_peaks
    outcomes = result.ledger()["outcomes"]
    return {
        "peaks": n_peaks,
        "seconds": seconds,
        "memory_mb": resident_mb("VmHWM") - before,
        "templates": outcomes.get("full", 0) / n_peaks,
    }


def main() -> None:
    """Measure and print."""
    args = parser(__doc__).parse_args()
    print_header("templates")
    rows: list[dict[str, Any]] = []
    for n_sources in (100, 300) if args.quick else (100, 300, 1000):
        time_field(100, 1)  # compiles
        rows.append(time_field(n_sources, 3 if args.quick else 7))
        print("field of {sources}: {whole_ms:.3f} ms per source and band, templates alone {ms:.3f}".format(**rows[-1]))
    print_verdict("slowest field", max(row["whole_ms"] for row in rows), LIMIT_MS, unit=" ms")
    crowd = one_footprint(*((500, 320) if args.quick else (5000, 1000)))
    print(
        "one footprint, one band, {peaks} peaks: {seconds:.1f} s, {memory_mb:.0f} MB, "
        "{templates:.1%} with a template".format(**crowd)
    )
    write(args.json, {"fields": rows, "crowd": crowd})


if __name__ == "__main__":
    main()
