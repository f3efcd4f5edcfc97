"""Picture of one real blend, source by source, by the scene model and by the single-band deblender.

Deblends the HSC COSMOS blend in five bands and draws, for each of its sources, the model and its share of the image:
templates.png.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from machine import parser

import kermes
from kermes.plots import colour_scale, lupton_rgb

ROWS = {
    "scene model": ("kermes", "model"),
    "its share of\nthe image": ("kermes", "redistributed"),
    "template": ("templates", "model"),
    "child: its share\nof the image": ("templates", "redistributed"),
}


def on_image(result: kermes.Result, object_id: int, kind: str) -> np.ndarray:
    """Pixels of one object in all bands, on the whole image (B, H, W)."""
    out = np.zeros((len(result.bands), *result.shape), dtype=np.float32)
    for plane, band in zip(out, result.bands, strict=True):
        stamp = getattr(result[object_id], kind)(band)
        plane[stamp.box.y, stamp.box.x] = stamp.array
    return out


def main() -> None:
    """Deblend and draw."""
    options = parser(__doc__)
    options.add_argument("--output", type=Path, default=Path(), help="directory of the picture")
    args = options.parse_args()
    mpl.use("Agg")
    coadd = kermes.read(args.shared / "data" / "hsc_cosmos" / "hsc_cosmos_35.npz")
    results = {model: kermes.deblend(coadd, config=kermes.Config(model=model)) for model in ("kermes", "templates")}
    ids = results["kermes"].objects["object_id"].tolist()
    scale = colour_scale(coadd.images, coadd.bands, valid=coadd.valid)
    mosaic = [["image", *(f"{row}/{n}" for n in ids)] for row in ROWS]
    figure, panels = plt.subplot_mosaic(
        mosaic, figsize=(1.25 * (len(ids) + 3), 5.2), layout="constrained", width_ratios=[3, *[1] * len(ids)]
    )
    panels["image"].imshow(lupton_rgb(coadd.images, coadd.bands, scale=scale), origin="lower")
    for n, (y, x) in enumerate(coadd.peaks):
        panels["image"].annotate(str(ids[n]), (x, y), color="white", fontsize=8, ha="center", va="center")
    for row, (model, kind) in ROWS.items():
        for n in ids:
            panels[f"{row}/{n}"].imshow(
                lupton_rgb(on_image(results[model], n, kind), coadd.bands, scale=scale), origin="lower"
            )
        panels[f"{row}/{ids[0]}"].set_ylabel(row, fontsize=7)
    for n in ids:
        panels[f"{next(iter(ROWS))}/{n}"].set_title(str(n), fontsize=8)
    for panel in panels.values():
        panel.set_xticks([])
        panel.set_yticks([])
    figure.savefig(args.output / "templates.png", dpi=80)


if __name__ == "__main__":
    main()
