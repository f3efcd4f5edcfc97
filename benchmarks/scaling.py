"""Cost against size: time per source for 3 to 1000 sources at a fixed density.

Square fields of six bands with the same number of pixels per source, once as one connected blend (all pixels in one
footprint) and once as detected. Fields of few sources are repeated with other seeds until they hold enough sources;
the time per source is that of all fields of a size together: of the whole deblend, and of the fits of the blends
alone, without planning, detection and tables, which have a price per coadd. Time per source and iteration is that of
the fits. One worker, processor time.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

import numpy as np
from cases import PIXELS_PER_SOURCE, check, config_of, simulated_case
from machine import add_model, parser, print_header, print_verdict, write

import kermes
from kermes.planning import plan_tile
from kermes.tile import collect, fit_blends

SIZES = (3, 10, 30, 100, 300, 1000)
QUICK_SIZES = (3, 10, 30, 100)
N_SOURCES = 120
LARGEST_RATIO = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Figures of all fields of one size."""

    n_sources: int
    n_fields: int
    n_peaks: int
    ms_per_source: float
    fits_ms_per_source: float
    iterations: float
    """Mean number of iterations of a blend, weighted by its sources."""

    ms_per_source_iteration: float
    chi2: float
    converged: float


def measure(n_sources: int, one_blend: bool, total: int, config: kermes.Config) -> Row:
    """Time all fields of one size, after a first one that is not counted."""
    fields = [simulated_case(n_sources, seed, one_blend=one_blend) for seed in range(max(1, round(total / n_sources)))]
    if n_sources < 100:
        fields[0].deblend(config=config)
    seconds, fits, chi2, iterations, converged, n_peaks = 0.0, 0.0, [], [], [], 0
    for case in fields:
        start = time.process_time()
        plan = plan_tile(case.coadd, case.peaks, case.footprints, config)
        planned = time.process_time()
        outcomes = list(fit_blends(plan))
        fitted = time.process_time()
        result = collect(plan, outcomes)
        seconds += time.process_time() - start
        fits += fitted - planned
        chi2.append(check(case, result))
        iterations.extend(result.objects["iterations"])
        converged.extend(result.objects["converged"])
        n_peaks += len(case.peaks)
    mean_iterations = float(np.mean(iterations))
    return Row(
        n_sources=n_sources,
        n_fields=len(fields),
        n_peaks=n_peaks,
        ms_per_source=1e3 * seconds / n_peaks,
        fits_ms_per_source=1e3 * fits / n_peaks,
        iterations=mean_iterations,
        ms_per_source_iteration=1e3 * fits / n_peaks / max(mean_iterations, 1.0),
        chi2=float(np.mean(chi2)),
        converged=float(np.mean(converged)),
    )


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    add_model(options)
    args = options.parse_args()
    config = config_of(args.model)
    sizes = QUICK_SIZES if args.quick else SIZES
    total = 60 if args.quick else N_SOURCES
    print_header(f"scaling, model {config.model}: six bands, {PIXELS_PER_SOURCE} pixels per source")
    simulated_case(3, 0).deblend(config=config)
    figures = {}
    for label, one_blend in (("one connected blend", True), ("as detected", False)):
        print(label)
        print("   sources fields  ms/source  of fits  iterations  ms/source/iteration  converged   chi2")
        rows = []
        for n_sources in sizes:
            row = measure(n_sources, one_blend, total, config)
            rows.append(row)
            print(
                f"   {row.n_sources:7d} {row.n_fields:6d} {row.ms_per_source:10.2f} "
                f"{row.fits_ms_per_source:8.2f} {row.iterations:11.1f} "
                f"{row.ms_per_source_iteration:20.4f} {row.converged:10.2f} {row.chi2:6.3f}"
            )
        for what in ("ms_per_source", "fits_ms_per_source", "ms_per_source_iteration"):
            values = [getattr(row, what) for row in rows]
            print_verdict(f"{label}, largest over smallest {what}", max(values) / min(values), LARGEST_RATIO)
        figures[label] = [asdict(row) for row in rows]
    write(args.json, figures)


if __name__ == "__main__":
    main()
