"""Magnitudes of fakes in real HSC blends, beside lsst.scarlet.lite.

Runs the scorer shared/arena/hsc_fakes.py as it is, on blends of the real sky into which stars and galaxies of
known magnitude were injected. Robust scatter, bias and the share beyond half a magnitude, for model and re-distributed
fluxes, next to the stored table of the reference. Our figures have 95 % intervals from resampling the fakes: a
reference above counts as better, below as worse, inside as equal within the noise. Times are of the processor.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from typing import Any

import numpy as np
from cases import check, config_of, hsc_case, load_scorer
from machine import add_model, parser, print_header, write
from numpy.typing import NDArray
from resampling import FEWEST, describe, figures_of_row, heading

DoubleArray = NDArray[np.float64]

REFERENCE: dict[str, dict[str, tuple[float, float, float]]] = {
    "all": {"model": (0.072, 0.086, 0.002), "redistributed": (0.029, 0.080, 0.011)},
    "stars": {"model": (-0.030, 0.013, 0.0), "redistributed": (-0.025, 0.043, 0.0)},
    "galaxies": {"model": (0.075, 0.083, 0.002), "redistributed": (0.032, 0.078, 0.012)},
    "close (<10 px)": {"model": (0.098, 0.110, 0.014), "redistributed": (0.057, 0.111, 0.028)},
    "faint (>24)": {"model": (0.082, 0.099, 0.006), "redistributed": (0.017, 0.127, 0.031)},
}
"""Bias [mag], scatter [mag] and share beyond 0.5 mag of lsst.scarlet.lite."""

N_REFERENCE = 444
STATISTICS = ("nmad", "bias", "beyond")


def cuts_of(rows: DoubleArray) -> dict[str, NDArray[np.bool_]]:
    """Cuts of the stored table; rows are (delta mag, mag, is star, distance, band)."""
    star = rows[:, 2] > 0
    return {
        "all": np.ones(len(rows), dtype=bool),
        "stars": star,
        "galaxies": ~star,
        "close (<10 px)": rows[:, 3] < 10,
        "faint (>24)": rows[:, 1] >= 24,
    }


def fakes_of(rows: DoubleArray) -> NDArray[np.int64]:
    """Number the fakes: the bands of one follow each other, in order."""
    starts = np.ones(len(rows), dtype=bool)
    starts[1:] = (np.diff(rows[:, 4]) <= 0) | (np.diff(rows[:, 3]) != 0)
    return np.cumsum(starts)


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    add_model(options)
    args = options.parse_args()
    config = config_of(args.model)
    scorer = load_scorer(args.shared, "hsc_fakes")
    limit = 15 if args.quick else None
    fluxes: dict[str, list[DoubleArray]] = {"model": [], "redistributed": []}
    seconds, chi2, n_rows = 0.0, [], 0
    for k, path in enumerate(scorer.paths()[:limit]):
        case = hsc_case(scorer, path)
        if k == 0:
            case.deblend(config=config)
        start = time.process_time()
        result = case.deblend(config=config, workers=1)
        seconds += time.process_time() - start
        chi2.append(check(case, result))
        table = result.objects[np.argsort(result.objects["peak_index"])]
        n_rows += len(table)
        for what, suffix in (("model", "flux"), ("redistributed", "redistributed_flux")):
            fluxes[what].append(np.array([np.asarray(table[f"{b}_{suffix}"], dtype=float) for b in result.bands]).T)

    print_header(f"HSC blends with fakes, model {config.model}")
    print(
        f"{len(chi2)} blends, {n_rows} peaks, {1e3 * seconds / n_rows:.2f} ms per peak, "
        f"reduced chi2 median {np.median(chi2):.3f}"
    )
    figures: dict[str, Any] = {"ms_per_peak": 1e3 * seconds / n_rows}
    counts: Counter[str] = Counter()
    for what, answers in fluxes.items():
        queue = iter(answers)
        rows, n_peaks, n_bad = scorer.score(lambda _blend, queue=queue: next(queue), limit=limit)
        print(f"{what}: {n_peaks} peaks, {n_bad} without an answer, {len(rows)} measurements (reference {N_REFERENCE})")
        if n_bad:
            sys.exit("every peak must have an answer")
        print(f"   {'cut':15s} {'n':>4s} " + heading(STATISTICS))
        fakes = fakes_of(rows)
        for cut, chosen in cuts_of(rows).items():
            if not chosen.any():
                continue
            delta = rows[chosen, 0]
            mine = figures_of_row(delta, delta, fakes[chosen], 200 if args.quick else 2000)
            bias, spread, beyond = REFERENCE[cut][what]
            peer = (spread, bias, beyond)
            few = len(delta) < FEWEST
            print(
                f"   {cut:15s} {len(delta):4d}{'*' if few else ' '}"
                + "".join(describe(figure, theirs) for figure, theirs in zip(mine, peer, strict=True))
            )
            verdicts = [figure.against(theirs) for figure, theirs in zip(mine, peer, strict=True)]
            if not few:
                counts.update(f"{name}: {verdict}" for name, verdict in zip(STATISTICS, verdicts, strict=True))
            figures[f"{what}, {cut}"] = {
                "n": len(delta),
                "ours": [figure.value for figure in mine],
                "peer": peer,
                "verdicts": verdicts,
            }
    print(f"rows that decide (* has fewer than {FEWEST} measurements):")
    for name in STATISTICS:
        print(f"   {name}: " + ", ".join(f"{counts[f'{name}: {v}']} {v}" for v in ("better", "equal", "worse")))
    write(args.json, figures)


if __name__ == "__main__":
    main()
