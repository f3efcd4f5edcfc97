"""FITS files of the package lsst.images, in which Rubin's data releases come: what is in them beside the pixels.

Image, mask and variance are plain image HDUs with a WCS, names of mask planes and the coordinates of the first pixel,
as `kermes.io.fits` reads them. What else a file holds is described by a tree, one JSON text in the HDU "JSON", which
refers to other HDUs by name. Read here are the band, and the PSFs of a coadd of cells.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from astropy.io import fits
from numpy.typing import NDArray

from kermes.errors import FileError, InputError
from kermes.psf import CellPsf

_MODEL_CARD = "DATAMODL"
_TREE_HDU = "JSON"
_NEWEST = 1  # version of the tree and of its parts, up to which they are understood


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cells:
    """PSFs of one band on a grid of cells."""

    stamps: NDArray[np.float64]
    """PSF of each cell, shape (n_y, n_x, P, Q)."""

    present: NDArray[np.bool_]
    """False for cells without data, shape (n_y, n_x)."""

    cell_shape: tuple[int, int]
    """Height and width of a cell [pixels]."""

    origin: tuple[int, int]
    """First pixel (y, x) of the first cell, in the coordinates of the tract."""


def tree_of(file: fits.HDUList, path: str) -> Mapping[str, Any] | None:
    """Read the tree of a file of lsst.images; None for any other FITS file.

    Raises
    ------
    FileError
        If it is damaged, or of a newer form than is known.
    """
    if _MODEL_CARD not in file[0].header or _TREE_HDU not in file:
        return None
    try:
        tree: dict[str, Any] = json.loads(bytes(file[_TREE_HDU].data[0][0]))
        least = int(tree["min_read_version"])
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise FileError(f"{path} must be a file of lsst.images, but its tree is damaged: {error}") from None
    if least > _NEWEST:
        raise FileError(f"{path} is of a newer form of lsst.images ({least}) than this kermes knows; upgrade kermes")
    return tree


def cells_of(file: fits.HDUList, tree: Mapping[str, Any], path: str) -> Cells | None:
    """Read the PSFs of a coadd of cells; None where the file has no PSFs of that kind.

    Raises
    ------
    FileError
        If what the tree says of them does not fit together.
    """
    psf = tree.get("psf")
    if not isinstance(psf, Mapping) or "grid" not in (psf.get("bounds") or {}):
        return None
    try:
        name, _, version = str(psf["array"]["source"]).removeprefix("fits:").partition(",")
        stamps = np.asarray(file[name, int(version or 1)].data, dtype=np.float64)
        grid, box = psf["bounds"]["grid"], psf["bounds"]["bbox"]
        return cells_from_grid(
            stamps,
            origin=(int(box["y"]["start"]), int(box["x"]["start"])),
            first=(int(grid["bbox"]["y"]["start"]), int(grid["bbox"]["x"]["start"])),
            cell_shape=(int(grid["cell_shape"]["y"]), int(grid["cell_shape"]["x"])),
            missing=[(int(cell["i"]), int(cell["j"])) for cell in psf["bounds"]["missing"]],
        )
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise FileError(f"{path} must be a coadd of cells, but its PSFs are damaged: {error!r}") from None


def cells_from_grid(
    stamps: NDArray[np.float64],
    *,
    origin: tuple[int, int],
    first: tuple[int, int],
    cell_shape: tuple[int, int],
    missing: Sequence[tuple[int, int]],
) -> Cells:
    """Put cells together; the stamps may be those of a part of the grid, which begins at the pixel `first`."""
    (i0, rest_y), (j0, rest_x) = (divmod(origin[axis] - first[axis], cell_shape[axis]) for axis in (0, 1))
    if stamps.ndim != 4 or rest_y or rest_x:
        raise ValueError(f"stamps of shape {stamps.shape} from {origin} are no part of a grid from {first}")
    n_y, n_x = stamps.shape[0], stamps.shape[1]
    present = np.ones((n_y, n_x), dtype=bool)
    for i, j in missing:
        if 0 <= i - i0 < n_y and 0 <= j - j0 < n_x:
            present[i - i0, j - j0] = False
    return Cells(stamps=stamps, present=present, cell_shape=cell_shape, origin=origin)


def psf_of_cells(cells: Mapping[str, Cells]) -> CellPsf:
    """Put the cells of all bands together.

    Raises
    ------
    InputError
        If the bands do not have the same cells, or no cell of any band has a PSF.
    """
    bands = list(cells)
    first = cells[bands[0]]
    for band, own in cells.items():
        for name in ("cell_shape", "origin"):
            if getattr(own, name) != getattr(first, name) or own.stamps.shape[:2] != first.stamps.shape[:2]:
                raise InputError(
                    f"images must have the same cells: band {band!r} has {own.stamps.shape[:2]} of {own.cell_shape} "
                    f"pixels from {own.origin}, band {bands[0]!r} has {first.stamps.shape[:2]} of {first.cell_shape} "
                    f"from {first.origin}"
                )
    # Stamps of different sizes are brought to the largest one, centres on one pixel; that of an even side n is n // 2.
    height = max(own.stamps.shape[2] for own in cells.values()) // 2 * 2 + 1
    width = max(own.stamps.shape[3] for own in cells.values()) // 2 * 2 + 1
    stamps = np.zeros((*first.stamps.shape[:2], len(bands), height, width))
    present = np.zeros(stamps.shape[:3], dtype=bool)
    for b, own in enumerate(cells.values()):
        y0, x0 = height // 2 - own.stamps.shape[2] // 2, width // 2 - own.stamps.shape[3] // 2
        stamps[:, :, b, y0 : y0 + own.stamps.shape[2], x0 : x0 + own.stamps.shape[3]] = own.stamps
        present[:, :, b] = own.present
    return CellPsf(stamps=stamps, bands=tuple(bands), cell_shape=first.cell_shape, origin=first.origin, present=present)
