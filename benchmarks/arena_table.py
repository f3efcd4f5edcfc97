"""Accuracy and speed on the scenes of the arena, beside lsst.scarlet.lite.

Runs the scorer shared/arena/arena.py as it is: one worker, total flux of every peak and band against the truth. For
every kind of scene: speed-up over the stored reference, both in units of one transform timed in the same run, by the
clock as the scorer has it and in processor time, on which other programs weigh less; and excess, bias and the share of
fluxes wrong by more than half, for model and re-distributed fluxes, in every cut.

The reference is stored as one figure per row, so that sources cannot be compared pair by pair. Instead the sources of
each row are resampled, and our figure gets a 95 % interval; a reference above it counts as better (all figures are
better when smaller), below it as worse, inside it as equal within the noise. Rows with fewer than 50 measurements are
marked with * and decide nothing.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import scipy.fft
from cases import config_of, load_scorer
from machine import add_model, parser, print_header, write
from numpy.typing import NDArray
from resampling import FEWEST, describe, figures_of_row, heading

LEAST_SPEED_UP = 10.0
STATISTICS = ("excess", "bias", "out50")
DoubleArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One kind of scene, scored."""

    summary: dict[str, Any]
    """What the scorer returns."""

    scenes: list[dict[str, Any]]
    columns: list[dict[str, DoubleArray]]
    """Fluxes (N, B) of each scene, by what they are."""

    units: float
    """Processor time of all scenes, in transforms."""


def unit_processor_time() -> float:
    """Seconds of processor time of one forward and inverse transform of 6 x 128 x 128 float32 (median)."""
    cube = np.random.default_rng(0).normal(size=(6, 128, 128)).astype(np.float32)
    times = []
    for _ in range(25):
        start = time.process_time()
        scipy.fft.irfft2(scipy.fft.rfft2(cube), s=(128, 128))
        times.append(time.process_time() - start)
    return float(np.median(times))


def run_kind(arena: ModuleType, kind: str, model: str | None) -> Run:
    """Score one kind of scene with the scorer."""
    seen: list[tuple[dict[str, Any], dict[str, DoubleArray], float]] = []

    def flux_of_scene(scene: dict[str, Any]) -> tuple[dict[str, DoubleArray], float]:
        start = time.process_time()
        columns, seconds = arena.kermes_flux(scene, model)
        seen.append((scene, columns, (time.process_time() - start) / unit_processor_time()))
        return columns, seconds

    summary: dict[str, Any] = arena.run(flux_of_scene, kinds=[kind])[kind]
    del seen[0]  # the first scene is deblended once more, to warm up
    return Run(
        summary=summary,
        scenes=[scene for scene, _, _ in seen],
        columns=[columns for _, columns, _ in seen],
        units=sum(units for _, _, units in seen),
    )


def cuts_of(snr: DoubleArray, blendedness: DoubleArray) -> dict[str, NDArray[np.bool_]]:
    """Cuts of the scorer, under its names."""
    return {
        "all": snr > 5,
        "isolated": (snr > 5) & (blendedness < 0.02),
        "blended": (snr > 5) & (blendedness >= 0.02) & (blendedness < 0.2),
        "heavy": (snr > 5) & (blendedness >= 0.2),
        "snr 5-20": (snr > 5) & (snr <= 20),
        "snr 20-100": (snr > 20) & (snr <= 100),
        "snr >100": snr > 100,
    }


def measurements(run: Run, what: str) -> dict[str, NDArray[Any]]:
    """Line up all scored (source, band) pairs of a kind."""
    parts: dict[str, list[NDArray[Any]]] = {name: [] for name in ("error", "scaled", "snr", "blendedness", "source")}
    n_before = 0
    for scene, columns in zip(run.scenes, run.columns, strict=True):
        flux, truth, sigma = columns[what], scene["flux"], scene["oracle_sigma"]
        scored = np.isfinite(truth)
        parts["error"].append((flux / truth - 1)[scored])
        parts["scaled"].append(((flux - truth) / sigma)[scored])
        parts["snr"].append((truth / sigma)[scored])
        parts["blendedness"].append(np.broadcast_to(scene["blendedness"][:, None], truth.shape)[scored])
        rows = np.arange(n_before, n_before + len(truth))
        parts["source"].append(np.broadcast_to(rows[:, None], truth.shape)[scored])
        n_before += len(truth)
    return {name: np.concatenate(values) for name, values in parts.items()}


def print_rows(run: Run, reference: dict[str, Any], n_resamples: int) -> list[dict[str, Any]]:
    """Print the rows of one kind, and return them."""
    rows = []
    for what in ("model", "redist"):
        data = measurements(run, what)
        cuts = cuts_of(data["snr"], data["blendedness"])
        for cut, theirs in reference[what].items():
            chosen = cuts[cut]
            mine = figures_of_row(data["error"][chosen], data["scaled"][chosen], data["source"][chosen], n_resamples)
            scored = run.summary[what][cut]
            expected = np.array([scored[name] for name in STATISTICS])
            if not np.allclose([figure.value for figure in mine], expected, atol=0.006, rtol=0):
                sys.exit(f"{what}, {cut}: this table and the scorer disagree: {mine}, {expected}")
            few = scored["n"] < FEWEST
            print(
                f"   {what:6s} {cut:10s} {scored['n']:5d}{'*' if few else ' '}"
                + "".join(describe(figure, theirs[name]) for name, figure in zip(STATISTICS, mine, strict=True))
            )
            verdicts = {name: figure.against(theirs[name]) for name, figure in zip(STATISTICS, mine, strict=True)}
            rows.append({"what": what, "cut": cut, "few": few, "ours": scored, "peer": theirs, "verdicts": verdicts})
    return rows


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    add_model(options)
    options.add_argument("--kinds", help="some of the kinds, with commas between")
    args = options.parse_args()
    arena = load_scorer(args.shared, "arena")
    reference = json.loads((args.shared / "arena" / "reference.json").read_text())
    kinds = args.kinds.split(",") if args.kinds else (["pair"] if args.quick else list(arena.KINDS))

    print_header(f"arena, model {config_of(args.model).model}")
    figures: dict[str, Any] = {}
    for kind in kinds:
        run = run_kind(arena, kind, args.model)
        ours, peer = run.summary, reference[kind]
        units = run.units / ours["sources"]
        speed_up = peer["units_per_source"] / ours["units_per_source"]
        print(
            f"{kind}: {ours['sources']} sources, {ours['missing']} without flux; {ours['ms_per_source']} ms, "
            f"{ours['units_per_source']} units per source, {speed_up:.1f}x the reference; in processor time "
            f"{units:.1f} units, {peer['units_per_source'] / units:.1f}x; g-i nmad {ours['colour_gi_nmad']}, "
            f"reference {peer['colour_gi_nmad']}"
        )
        if speed_up < LEAST_SPEED_UP:
            print(f"   NO: at least {LEAST_SPEED_UP:g}x is wanted")
        if ours["missing"]:
            print(f"   NO: {ours['missing']} sources have no flux in some band")
        print(f"   {'flux':6s} {'cut':10s} {'n':>5s} " + heading(STATISTICS))
        rows = print_rows(run, peer, 200 if args.quick else 1000)
        figures[kind] = {"speed_up": speed_up, "processor_units": units, "summary": ours, "rows": rows}

    everything = [row for entry in figures.values() for row in entry["rows"]]
    deciding = [row for row in everything if not row["few"]]
    print(f"{len(everything)} rows, {len(everything) - len(deciding)} of them with fewer than {FEWEST} measurements")
    for name in STATISTICS:
        for label, rows in (("all rows", everything), ("rows that decide", deciding)):
            count = Counter(row["verdicts"][name] for row in rows)
            print(f"   {name}, {label}: {count['better']} better, {count['equal']} equal, {count['worse']} worse")
    for kind, entry in figures.items():
        for row in entry["rows"]:
            worse = [name for name in STATISTICS if row["verdicts"][name] == "worse"]
            if worse and not row["few"]:
                print(f"   worse: {kind}, {row['what']}, {row['cut']}: {', '.join(worse)}")
    print(f"smallest speed-up: {min(entry['speed_up'] for entry in figures.values()):.1f}x")
    write(args.json, figures)


if __name__ == "__main__":
    main()
