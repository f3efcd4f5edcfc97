"""What is measured on each kind of stamp, against the truth, for pairs 0.5 to 4 widths of the PSF apart.

Pairs of stars and galaxies as `simulate_scene` draws them, moved to a given separation, are deblended and measured on
every kind of stamp. The truth is measured in the same way on the noiseless image of each source alone. Each pair has
its own shapes, directions, sub-pixel positions and noise. Both peaks are given. Prints, for each separation, the median
and the scatter of the relative error of the aperture flux and of the size, of the error of the colour, and of the
error of the flux in units of the error that is claimed; draws them; then the cost per object on a field.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from cases import check, simulated_case
from machine import parser, print_header, print_verdict, write
from numpy.typing import NDArray

import kermes
from kermes.kernels import photometry as kernels
from kermes.photometry import measure
from kermes.result import StampKind
from kermes.simulation import SimulatedScene, render_truth, simulate_scene

SEPARATIONS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
"""Distance of the two sources [widths of the PSF]."""

APERTURE = 6.0
"""Radius of the aperture that is scored [pixels], one and a half widths of the PSF."""

BANDS = ("g", "r", "i")
MAGNITUDES = (21.0, 25.0)
MAX_MS = 1.0
QUANTITIES = {"flux": "flux / truth - 1", "size": "size / truth - 1", "colour": "g - i, less truth [mag]"}

FloatArray = NDArray[np.float64]


def simulate_pair(separation: float, seed: int) -> tuple[SimulatedScene, kermes.Coadd, NDArray[np.int64]]:
    """Draw a pair, move the second source, and add noise. Returns the scene, its coadd and the peaks."""
    scene = simulate_scene(kind="pair", bands=BANDS, magnitudes=MAGNITUDES, seed=seed, shape=(96, 96))
    truth = scene.truth.copy()
    first, second = np.array([truth["y"], truth["x"]]).T
    distance = separation * float(np.mean([psf.fwhm_pix for psf in scene.psfs]))
    truth["y"][1], truth["x"][1] = first + distance * (second - first) / np.hypot(*(second - first))
    scene = dataclasses.replace(scene, truth=truth)
    variance = scene.coadd.variance
    images = np.random.default_rng(seed).standard_normal(variance.shape) * np.sqrt(variance)
    for k in range(2):
        light, box = render_truth(scene, k)
        images[(slice(None), *box.within(scene.coadd.box))] += light[(slice(None), *scene.coadd.box.within(box))]
    coadd = kermes.Coadd(
        images=images, variance=variance, psfs=scene.coadd.psfs, bands=BANDS, unit=scene.coadd.unit, name=f"pair {seed}"
    )
    return scene, coadd, np.rint(np.array([truth["y"], truth["x"]]).T).astype(np.int64)


def true_values(scene: SimulatedScene, k: int) -> tuple[FloatArray, FloatArray]:
    """Aperture flux and second moments (yy + xx) of the noiseless image of one source, each (B,)."""
    light, box = render_truth(scene, k)
    y, x = float(scene.truth["y"][k]) - box.y0, float(scene.truth["x"][k]) - box.x0
    valid, ones = np.ones(light.shape, dtype=bool), np.ones_like(light)
    flux = kernels.aperture_sums(light, ones, light, valid, y, x, np.array([APERTURE]))[0, :, 0]
    states, sums = np.empty((len(BANDS), 5)), np.empty((len(BANDS), kernels.N_SUMS))
    kernels.adaptive_moments(light, ones, valid, y, x, np.full(len(BANDS), 1.8), states, sums)
    return flux, states[:, 2] + states[:, 3]


def errors_of_pair(separation: float, seed: int) -> Iterator[dict[str, Any]]:
    """Errors of everything that is measured on one pair, a row for each source, band and kind of stamp."""
    scene, coadd, peaks = simulate_pair(separation, seed)
    if (peaks[0] == peaks[1]).all():
        return
    result = kermes.deblend(coadd, peaks=peaks, workers=1)
    row_of = np.argsort(np.asarray(result.objects["peak_index"]))
    truth = [true_values(scene, k) for k in range(2)]
    for kind in StampKind:
        table = measure(result, kind, apertures=(APERTURE,))[row_of]
        for k, (flux, size) in enumerate(truth):
            row = table[k]
            measured = np.array([row[f"{band}_aperture_{APERTURE:g}_flux"] for band in BANDS])
            error = np.array([row[f"{band}_aperture_{APERTURE:g}_flux_err"] for band in BANDS])
            moments = np.array([row[f"{band}_moment_yy"] + row[f"{band}_moment_xx"] for band in BANDS])
            colour = -2.5 * np.log10(measured[0] / measured[-1]) if min(measured[0], measured[-1]) > 0 else np.nan
            for b in range(len(BANDS)):
                yield {
                    "separation": separation,
                    "kind": str(kind),
                    "flux": measured[b] / flux[b] - 1,
                    "pull": (measured[b] - flux[b]) / error[b],
                    "size": moments[b] / size[b] - 1,
                    "colour": colour + 2.5 * np.log10(flux[0] / flux[-1]) if b == 0 else np.nan,
                }


def median_and_scatter(values: FloatArray) -> tuple[float, float]:
    """Median, and the standard deviation of a Gaussian with the same median absolute deviation; NaN left out."""
    known = values[np.isfinite(values)]
    if not len(known):
        return np.nan, np.nan
    middle = float(np.median(known))
    return middle, float(1.4826 * np.median(np.abs(known - middle)))


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median and scatter of every quantity for each separation and kind."""
    figures = []
    for separation in SEPARATIONS:
        for kind in StampKind:
            mine = [row for row in rows if row["separation"] == separation and row["kind"] == kind]
            figure: dict[str, Any] = {"separation": separation, "kind": str(kind), "n": len(mine)}
            for name in (*QUANTITIES, "pull"):
                figure[name] = median_and_scatter(np.array([row[name] for row in mine], dtype=float))
            figures.append(figure)
    return figures


def draw(figures: list[dict[str, Any]], path: Path) -> None:
    """Draw the bias, with the scatter as bars, and below it the pulls."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained", sharex=True)
    for axis, (name, label) in zip(axes.flat, {**QUANTITIES, "pull": "(flux - truth) / error"}.items(), strict=True):
        for k, kind in enumerate(StampKind):
            mine = [item for item in figures if item["kind"] == kind]
            middle, scatter = np.array([item[name] for item in mine]).T
            place = np.array([item["separation"] for item in mine]) + 0.03 * (k - 1.5)
            axis.errorbar(place, middle, scatter, fmt="o-", ms=3, lw=1, capsize=2, label=str(kind))
        axis.axhline(0, color="0.6", lw=0.8, zorder=0)
        axis.set_ylabel(label)
    for axis in axes[1]:
        axis.set_xlabel("separation [PSF widths]")
    axes[0, 0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def cost(quick: bool) -> dict[str, float]:
    """Milliseconds of processor time per object and six bands: to cut stamps and PSF, and to do that and measure."""
    case = simulated_case(40 if quick else 300, seed=1)
    result = case.deblend(workers=1)
    check(case, result)
    result.model_image()

    def cut(kind: StampKind) -> None:
        for handle in result.by_blend():
            handle.cube(kind, margin=6)
            handle.psf_cube(margin=6)

    figures = {}
    for kind in StampKind:
        for name, work in (("stamps", cut), ("measure", lambda kind: measure(result, kind))):
            work(kind)
            seconds = []
            for _ in range(5):
                start = time.process_time()
                work(kind)
                seconds.append(time.process_time() - start)
            figures[f"{name} {kind}"] = 1e3 * min(seconds) / len(result)
    return figures


def main() -> None:
    """Measure, print and draw."""
    options = parser(__doc__)
    options.add_argument("--output", type=Path, default=Path(), help="directory of the picture")
    options.add_argument("--pairs", type=int, default=400, help="pairs for each separation")
    args = options.parse_args()
    mpl.use("Agg")
    print_header("kinds of stamps")
    n_pairs = 10 if args.quick else args.pairs
    rows = [
        row
        for s, separation in enumerate(SEPARATIONS)
        for seed in range(n_pairs)
        for row in errors_of_pair(separation, 10_000 * s + seed)
    ]
    figures = summarize(rows)
    print("   median, scatter         " + "".join(f"{name:>18s}" for name in (*QUANTITIES, "pull")))
    for item in figures:
        values = "".join(f"{item[name][0]:+10.3f} {item[name][1]:7.3f}" for name in (*QUANTITIES, "pull"))
        print(f"   {item['separation']:4.2f} {item['kind']:20s}{values}")
    draw(figures, args.output / "stamps.png")
    costs = cost(args.quick)
    for kind in StampKind:
        stamps, whole = costs[f"stamps {kind}"], costs[f"measure {kind}"]
        print(f"   {kind:20s} {whole:.2f} ms per object, of which {stamps:.2f} to draw and cut the stamps")
        print_verdict("   all measurements", whole, MAX_MS, unit=" ms")
    write(args.json, {"figures": figures, "cost_ms": costs})


if __name__ == "__main__":
    main()
