"""Two threads against one, on a tile's worth of blends, and the same bits from both.

A simulated field of six bands, sparse enough to fall into many blends. Runs with one and with several workers take
turns. Beside each turn a compiled loop without memory or locks is run once after itself and in as many threads at the
same time: what it gains is what the machine had to give at that moment. Turns in which it gained less than 95 % of
the number of workers were disturbed by other programs; the speed-up is the ratio of the medians of the others, given
for the fits of the blends alone, for the whole deblend of a coadd with footprints, and of one without, where they are
detected first. Processor time with several workers over that with one tells what is lost to shared caches and locks;
it suffers less from other programs.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from cases import Case, check, config_of, simulated_case
from machine import add_model, parser, print_header, print_verdict, write
from numba import njit

import kermes
from kermes.planning import plan_tile
from kermes.tile import fit_blends

LEAST_SPEED_UP = 1.8
PIXELS_PER_SOURCE = 2450
"""A field of 700 x 700 pixels with 200 sources."""


@njit(nogil=True)
def spin(n):  # type: ignore[no-untyped-def]
    """Keep a core busy."""
    total = 0.0
    for i in range(n):
        total += np.sin(total + i)
    return total


def gain_of_machine(workers: int) -> float:
    """How much faster independent loops run in threads now, compared with one after the other."""
    jobs = [6_000_000] * workers
    start = time.perf_counter()
    for n in jobs:
        spin(n)
    alone = time.perf_counter() - start
    with ThreadPoolExecutor(workers) as pool:
        start = time.perf_counter()
        list(pool.map(spin, jobs))
        return alone / (time.perf_counter() - start)


def differing_columns(one: kermes.Result, other: kermes.Result) -> list[str]:
    """Name everything that is not the same to the last bit."""
    pairs = [("models", one.model_image(), other.model_image())]
    for table in ("objects", "parents", "blends", "candidates"):
        columns = getattr(one, table).colnames
        pairs += [
            (f"{table}.{c}", np.asarray(getattr(one, table)[c]), np.asarray(getattr(other, table)[c])) for c in columns
        ]
    return [name for name, a, b in pairs if a.tobytes() != b.tobytes()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """What something took, by the clock and of the processor."""

    clock: float
    processor: float


def time_fits(case: Case, workers: int, config: kermes.Config) -> Seconds:
    """Fit all blends, without planning and collecting."""
    plan = plan_tile(case.coadd, case.peaks, case.footprints, config)
    clock, processor = time.perf_counter(), time.process_time()
    for _ in fit_blends(plan, workers):
        pass
    return Seconds(clock=time.perf_counter() - clock, processor=time.process_time() - processor)


def time_deblend(case: Case, workers: int, config: kermes.Config) -> Seconds:
    """Do everything."""
    clock, processor = time.perf_counter(), time.process_time()
    case.deblend(workers=workers, config=config)
    return Seconds(clock=time.perf_counter() - clock, processor=time.process_time() - processor)


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    add_model(options)
    options.add_argument("--workers", type=int, default=2, help="the larger number of workers")
    options.add_argument("--repeat", type=int, help="turns; default 15, --quick 4")
    args = options.parse_args()
    config = config_of(args.model)
    repeat = args.repeat or (4 if args.quick else 15)
    case = simulated_case(60 if args.quick else 200, 5, pixels_per_source=PIXELS_PER_SOURCE)
    print_header(f"threads, model {config.model}", workers=f"1 and {args.workers}")
    alone, together = (case.deblend(workers=workers, config=config) for workers in (1, args.workers))
    chi2 = check(case, alone)
    sizes = np.asarray(alone.blends["n_sources"])
    print(
        f"{case.coadd.images.shape}, {len(case.peaks)} peaks in {len(sizes)} blends, largest {sizes.max()}; "
        f"reduced chi2 {chi2:.3f}"
    )
    differing = differing_columns(alone, together)
    print("same bits: " + ("ok" if not differing else "NO: " + ", ".join(differing)))

    figures: dict[str, object] = {"peaks": len(case.peaks), "blends": len(sizes), "differing": differing, "chi2": chi2}
    spin(10)
    with_footprints = replace(case, footprints=plan_tile(case.coadd, case.peaks, config=config).labels)
    for label, measure, of in (
        ("fits", time_fits, with_footprints),
        ("deblend, footprints given", time_deblend, with_footprints),
        ("deblend, footprints detected", time_deblend, case),
    ):
        turns = []
        for _ in range(repeat):
            before = gain_of_machine(args.workers)
            one, several = (measure(of, workers, config) for workers in (1, args.workers))
            gain = min(before, gain_of_machine(args.workers))
            turns.append((gain, one.clock, several.clock, several.processor / one.processor))
        figures[label] = turns
        quiet = np.array([turn for turn in turns if turn[0] >= 0.95 * args.workers])
        best = max(turns)
        print(f"{label}: {len(quiet)} of {len(turns)} turns undisturbed")
        print(
            f"   least disturbed: 1 worker {best[1] * 1e3:.0f} ms, {args.workers} workers {best[2] * 1e3:.0f} ms, "
            f"{best[1] / best[2]:.2f}x where the loop gained {best[0]:.2f}x; "
            f"processor time {np.median([turn[3] for turn in turns]):.2f}x with {args.workers} workers"
        )
        if len(quiet):
            _, clock_one, clock_several, _ = np.median(quiet, axis=0)
            speed_up = float(clock_one / clock_several)
            print_verdict(f"   {label}, speed-up", speed_up, LEAST_SPEED_UP * args.workers / 2, at_least=True)
    write(args.json, figures)


if __name__ == "__main__":
    main()
