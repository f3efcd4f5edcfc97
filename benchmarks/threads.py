"""Two threads against one, on a tile's worth of blends, and the same bits from both.

A simulated field of six bands, sparse enough to fall into many blends. Runs with one and with two workers take turns;
the speed-up is the ratio of the medians, and of the shortest times, on which other programs weigh least. Given for
the whole deblend, and for the fits of the blends alone.
"""

from __future__ import annotations

import time

import numpy as np
from cases import Case, check, simulated_case
from machine import parser, print_header, print_verdict, write

import kermes
from kermes.tile import fit_blends, plan_tile

LEAST_SPEED_UP = 1.8
PIXELS_PER_SOURCE = 2450
"""A field of 700 x 700 pixels with 200 sources."""


def differing_columns(one: kermes.Result, other: kermes.Result) -> list[str]:
    """Name everything that is not the same to the last bit."""
    pairs = [("models", one.model_image(), other.model_image())]
    for table in ("objects", "parents", "blends"):
        columns = getattr(one, table).colnames
        pairs += [(f"{table}.{c}", np.asarray(getattr(one, table)[c]), np.asarray(getattr(other, table)[c])) for c in columns]
    return [name for name, a, b in pairs if a.tobytes() != b.tobytes()]


def time_fits(case: Case, workers: int) -> float:
    """Seconds that the fits of all blends take, without planning and collecting."""
    plan = plan_tile(case.coadd, case.peaks)
    start = time.perf_counter()
    for _ in fit_blends(plan, workers):
        pass
    return time.perf_counter() - start


def time_deblend(case: Case, workers: int) -> float:
    """Seconds that everything takes."""
    start = time.perf_counter()
    case.deblend(workers=workers)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--workers", type=int, default=2, help="the larger number of workers")
    options.add_argument("--repeat", type=int, help="runs of each; default 7, --quick 3")
    args = options.parse_args()
    repeat = args.repeat or (3 if args.quick else 7)
    case = simulated_case(60 if args.quick else 200, 5, pixels_per_source=PIXELS_PER_SOURCE)
    print_header("threads", workers=f"1 and {args.workers}")
    alone, together = case.deblend(workers=1), case.deblend(workers=args.workers)
    chi2 = check(case, alone)
    sizes = np.asarray(alone.blends["n_sources"])
    print(f"{case.coadd.images.shape}, {len(case.peaks)} peaks in {len(sizes)} blends, largest {sizes.max()}; reduced chi2 {chi2:.3f}")
    differing = differing_columns(alone, together)
    print("same bits: " + ("ok" if not differing else "NO: " + ", ".join(differing)))

    figures: dict[str, object] = {"peaks": len(case.peaks), "blends": len(sizes), "differing": differing, "chi2": chi2}
    for label, measure in (("fits", time_fits), ("deblend", time_deblend)):
        seconds = np.array([[measure(case, workers) for workers in (1, args.workers)] for _ in range(repeat)])
        medians, shortest = np.median(seconds, axis=0), seconds.min(axis=0)
        print(
            f"{label}: 1 worker {medians[0] * 1e3:.0f} ms ({seconds[:, 0].min() * 1e3:.0f}-{seconds[:, 0].max() * 1e3:.0f}), "
            f"{args.workers} workers {medians[1] * 1e3:.0f} ms ({seconds[:, 1].min() * 1e3:.0f}-{seconds[:, 1].max() * 1e3:.0f})"
        )
        print_verdict(f"   {label}, speed-up of the medians", float(medians[0] / medians[1]), LEAST_SPEED_UP, at_least=True)
        print_verdict(f"   {label}, speed-up of the shortest", float(shortest[0] / shortest[1]), LEAST_SPEED_UP, at_least=True)
        figures[label] = seconds.tolist()
    write(args.json, figures)


if __name__ == "__main__":
    main()
