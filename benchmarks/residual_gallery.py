"""Pictures of the residuals of real blends: the largest ones, and those with the worst chi2, by both models.

Deblends the HSC blends, chooses the ten with the most pixels and the ten whose chi2 inside the footprint is highest
with the model "kermes", and draws of each the image, and what the model "kermes" and scarlet lite leave of it: in
sigma, all bands together, from -5 (blue) to 5 (red), with the chi2 of each. Two pictures: residuals_largest.png and
residuals_worst.png.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from cases import Case, config_of, hsc_cases, load_scorer, reduced_chi2, used_pixels
from machine import parser, print_header, write

import kermes
from kermes.plots import lupton_rgb

N_SHOWN = 10
MODELS = ("kermes", "scarlet-lite")


def mean_residual(case: Case, result: kermes.Result) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Sum of the residuals of all bands in sigma over the root of their number (H, W); NaN outside the footprint."""
    used = used_pixels(case)
    sigma = np.where(used, np.sqrt(np.where(used, case.coadd.variance, 1)), np.inf)
    scaled = np.where(used, result.residual(), 0) / sigma
    n_bands = used.sum(axis=0)
    return np.where(n_bands > 0, scaled.sum(axis=0) / np.sqrt(np.maximum(n_bands, 1)), np.nan)


def draw(cases: list[Case], path: Path) -> None:
    """Draw some blends, one a column."""
    figure, axes = plt.subplots(3, len(cases), figsize=(1.5 * len(cases), 5.0), layout="constrained")
    for column, case in zip(axes.T, cases, strict=True):
        used = used_pixels(case)
        column[0].imshow(lupton_rgb(case.coadd.images, case.coadd.bands, valid=used), origin="lower")
        column[0].plot(case.peaks[:, 1], case.peaks[:, 0], "w+", ms=3, mew=0.5)
        column[0].set_title(case.name.removesuffix(".npz")[-8:], fontsize=7)
        for panel, model in zip(column[1:], MODELS, strict=True):
            result = case.deblend(config=config_of(model))
            panel.imshow(mean_residual(case, result), origin="lower", cmap="RdBu_r", vmin=-5, vmax=5)
            panel.set_title(f"{reduced_chi2(case, result):.3f}", fontsize=7)
    for panel in axes.flat:
        panel.set_xticks([])
        panel.set_yticks([])
    for panel, name in zip(axes[:, 0], ("image", *MODELS), strict=True):
        panel.set_ylabel(name, fontsize=8)
    figure.savefig(path, dpi=76)
    plt.close(figure)


def main() -> None:
    """Choose, draw and print."""
    options = parser(__doc__)
    options.add_argument("--output", type=Path, default=Path(), help="directory of the pictures")
    args = options.parse_args()
    mpl.use("Agg")
    print_header("residuals of real blends")
    cases = list(hsc_cases(load_scorer(args.shared, "hsc_fakes")))[: 15 if args.quick else None]
    rows = []
    for case in cases:
        chi2 = reduced_chi2(case, case.deblend(config=config_of(MODELS[0])))
        rows.append({"name": case.name, "chi2": chi2, "pixels": int(used_pixels(case).any(axis=0).sum())})
    for name, key in (("largest", "pixels"), ("worst", "chi2")):
        order = sorted(range(len(cases)), key=lambda k: (-rows[k][key], rows[k]["name"]))[:N_SHOWN]
        draw([cases[k] for k in order], args.output / f"residuals_{name}.png")
        print(f"{name}: " + ", ".join(f"{rows[k]['name']} {rows[k]['chi2']:.3f}" for k in order))
    write(args.json, {"rows": rows})


if __name__ == "__main__":
    main()
