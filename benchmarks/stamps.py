"""Which stamp is best to measure on: shares, neighbours subtracted, or neighbours replaced by noise?

Simulated pairs of galaxies and stars in two bands, 0.7 to 3 FWHM apart, deblended; on each kind of stamp the flux in a
circle, the size (adaptive moments) and the colour are measured and compared with the same measurement on the true image
of the source alone, without noise. Bias (median) and scatter (robust width), of the flux in errors of the pixels too.
Prints a table, draws stamps.png.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from machine import parser, print_header, write

import kermes
from kermes.kernels.photometry import adaptive_moments, aperture_sums
from kermes.photometry import FIRST_SIGMA, LARGEST_MOVE, measure
from kermes.psf import gaussian_fwhm
from kermes.result import StampKind
from kermes.simulation import render_truth, simulate_scene

BANDS = ("g", "r")
RADIUS = 5.0
BINS = (0.5, 1.0, 1.5, 2.0, 3.0)
KINDS = (StampKind.REDISTRIBUTED, StampKind.NEIGHBOR_SUBTRACTED, StampKind.NOISE_REPLACED)


def robust(values: Any) -> tuple[float, float]:
    """Median and robust width."""
    values = np.asarray(values)[np.isfinite(values)]
    middle = float(np.median(values))
    return middle, float(1.4826 * np.median(np.abs(values - middle)))


def true_values(scene: Any, row: int, y: float, x: float) -> tuple[list[float], float]:
    """Flux in the circle in each band, and the size in r, of one source alone."""
    light, box = render_truth(scene, row)
    fluxes, size = [], np.nan
    for b in range(len(BANDS)):
        whole = np.zeros(scene.coadd.shape, dtype=np.float32)
        whole[box.within(scene.coadd.box)] = light[(b, *scene.coadd.box.within(box))]
        valid = np.ones(whole.shape, dtype=bool)
        fluxes.append(float(aperture_sums(whole, whole, valid, y, x, np.array([RADIUS]))[0][0]))
        if BANDS[b] == "r":
            sigma = gaussian_fwhm(np.asarray(scene.coadd.psfs)[b]) / FIRST_SIGMA
            found = adaptive_moments(whole, valid, y, x, sigma, LARGEST_MOVE * sigma)
            size = found[2] + found[3] if found[6] else np.nan
    return fluxes, size


def collect(n_scenes: int) -> dict[StampKind, np.ndarray]:
    """Separation, relative flux error, pull, relative size error and colour error of each source, by kind."""
    rows: dict[StampKind, list[list[float]]] = {kind: [] for kind in KINDS}
    for seed in range(n_scenes):
        scene = simulate_scene(
            kind="pair", n_sources=2, shape=(90, 90), seed=9000 + seed, bands=BANDS, magnitudes=(21.0, 23.5)
        )
        if len(scene.peaks) != 2:
            continue
        fwhm = gaussian_fwhm(np.asarray(scene.coadd.psfs)[1])
        positions = np.array([scene.truth["y"], scene.truth["x"]])[:, :2]
        separation = float(np.hypot(*(positions[:, 0] - positions[:, 1]))) / fwhm
        result = kermes.deblend(scene.coadd, scene.peaks)
        truth = []
        for handle in result:
            row = int(np.flatnonzero(scene.truth["peak_index"] == handle.row["peak_index"])[0])
            truth.append(true_values(scene, row, handle.row["center_y"], handle.row["center_x"]))
        for kind in KINDS:
            table = measure(result, kind, radii=[RADIUS])
            for measured, (fluxes, size) in zip(table, truth, strict=True):
                g, r = (float(measured[f"{band}_aperture_0_flux"]) for band in BANDS)
                found = float(measured["r_moment_yy"] + measured["r_moment_xx"])
                colour = -2.5 * np.log10(g / r * fluxes[1] / fluxes[0]) if g > 0 and r > 0 else np.nan
                error = float(measured["r_aperture_0_flux_err"])
                pull = (r - fluxes[1]) / error if error > 0 else np.nan
                rows[kind].append([separation, r / fluxes[1] - 1, pull, found / size - 1, colour])
    return {kind: np.array(values) for kind, values in rows.items()}


def main() -> None:
    """Measure, print and draw."""
    options = parser(__doc__)
    options.add_argument("--output", type=Path, default=Path(), help="directory of the picture")
    args = options.parse_args()
    mpl.use("Agg")
    print_header("stamps")
    found = collect(60 if args.quick else 1000)
    names = ("flux", "pull", "size", "g - r")
    figure, axes = plt.subplots(2, 4, figsize=(11, 4.6), layout="constrained", sharex=True)
    table = []
    print(f"{'kind':22s}{'FWHM':>9s}{'n':>5s}" + "".join(f"{name + ' bias':>13s}{'scatter':>9s}" for name in names))
    for kind, values in found.items():
        means = []
        for low, high in pairwise(BINS):
            own = values[(values[:, 0] >= low) & (values[:, 0] < high)]
            if len(own) < 5:
                continue
            figures = [robust(own[:, column]) for column in range(1, 5)]
            means.append([0.5 * (low + high), *np.ravel(figures)])
            table.append({"kind": kind.value, "low": low, "high": high, "n": len(own), "figures": figures})
            print(
                f"{kind.value:22s}{f'{low:g}-{high:g}':>9s}{len(own):5d}"
                + "".join(f"{bias:+13.3f}{width:9.3f}" for bias, width in figures)
            )
        lines = np.array(means).T
        for n, name in enumerate(names):
            for row, what in enumerate(("bias", "scatter")):
                axes[row, n].plot(
                    lines[0], lines[1 + 2 * n + row], "o-", ms=3, lw=1, label=kind.value.replace("_", " ")
                )
                axes[row, n].set_title(f"{name}, {what}", fontsize=9)
                axes[row, n].tick_params(labelsize=7)
    for panel in axes[0]:
        panel.axhline(0, color="0.7", lw=0.5, zorder=0)
    for panel in axes[1]:
        panel.set_xlabel("separation [FWHM]", fontsize=8)
        panel.set_ylim(bottom=0)
    axes[0, 0].legend(fontsize=7)
    figure.savefig(args.output / "stamps.png", dpi=80)
    write(args.json, {"rows": table})


if __name__ == "__main__":
    main()
