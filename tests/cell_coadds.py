"""Coadds of cells of lsst.images, of a simulated sky; needs the extra "lsst"."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from kermes.coadd import Coadd
from kermes.errors import DataWarning
from kermes.geometry import Box
from kermes.lsst.images import cell_coadd
from kermes.simulation import simulate_patch

CELL = 30


def simulated_sky(**options: Any) -> Coadd:
    """Sky of 120 x 150 pixels in three bands, with a PSF that varies."""
    settings = {"shape": (120, 150), "bands": ("g", "r", "i"), "seed": 2, "large_galaxy": False, "n_bright_stars": 0}
    return simulate_patch(psf_variation=0.05, **(settings | options)).coadd


def without(coadd: Coadd, empty: Box, bands: str | None = None) -> Coadd:
    """The same sky without data in a box, in some bands or all."""
    values = coadd.images.copy()
    for b, band in enumerate(coadd.bands):
        if bands is None or band in bands:
            values[(b, *empty.within(coadd.box))] = np.nan
    names = ("variance", "psfs", "bands", "mask", "mask_planes", "wcs", "origin", "unit")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # nothing may be left, which is what is wanted
        return Coadd(images=values, **{name: getattr(coadd, name) for name in names})


def cell_coadds(
    sky: Coadd, bands: str = "gri", box: Box | None = None, empty: Box | None = None, inner: Box | None = None
) -> dict[str, Any]:
    """Coadds of cells of a sky, by band; the pixels of `empty` have no data."""
    coadd = sky if box is None else sky.cutout(box)
    coadd = coadd if empty is None else without(coadd, empty)
    place = {"skymap": "s", "tract": 3, "tract_box": sky.box, "patch": 1, "patch_place": (0, 1)}
    return {band: cell_coadd(coadd, band, cell=CELL, inner=inner or coadd.box, **place) for band in bands}
