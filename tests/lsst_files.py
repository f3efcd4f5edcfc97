"""Files as the package lsst.images writes them, made without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS

CELL = 20


def tract_wcs() -> WCS:
    """Sky of a small tract, pixel (0, 0) its first one."""
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval = [150.0, 2.2]
    wcs.wcs.crpix = [301.0, 301.0]
    wcs.wcs.cdelt = [-0.2 / 3600, 0.2 / 3600]
    wcs.wcs.radesys = "ICRS"
    return wcs


def write_cell_coadd(
    path: Path,
    *,
    band: str = "r",
    images: Any = None,
    origin: tuple[int, int] = (200, 100),
    n_cells: tuple[int, int] = (2, 3),
    psf_shape: tuple[int, int] = (11, 11),
    grid_first: tuple[int, int] | None = None,
    missing: tuple[tuple[int, int], ...] = (),
    masks: tuple[dict[str, int], ...] = ({"NO_DATA": 0, "SATURATED": 1},),
    bits: dict[str, tuple[int, int]] | None = None,
    version: int = 1,
    model: str = "cell_coadd",
) -> Path:
    """Write a coadd of cells; the PSF of cell (i, j) of the grid is wider the larger i + j is."""
    shape = n_cells[0] * CELL, n_cells[1] * CELL
    rng = np.random.default_rng(sum(band.encode()))
    images = rng.normal(0, 1, shape).astype(np.float32) if images is None else np.asarray(images, dtype=np.float32)
    header = fits.Header()
    wcs = tract_wcs()
    wcs.wcs.crpix = [301.0 - origin[1], 301.0 - origin[0]]
    header.update(wcs.to_header())
    for axis, first in ((1, origin[1]), (2, origin[0])):
        header[f"CTYPE{axis}A"], header[f"CRPIX{axis}A"], header[f"CRVAL{axis}A"] = "LINEAR", 1.0, float(first)
    primary = fits.PrimaryHDU()
    primary.header["DATAMODL"] = f"schemas/{model}-1.0.0"
    hdus: list[Any] = [primary]
    image_header = header.copy()
    image_header["BUNIT"] = "nJy"
    hdus.append(fits.CompImageHDU(images, image_header, name="IMAGE", compression_type="GZIP_2", quantize_level=0.0))
    for number, planes in enumerate(masks):
        mask = np.zeros(shape, dtype=np.int32)
        for name, (y, x) in (bits or {}).items():
            if name in planes:
                mask[y, x] |= np.int32(1 << planes[name])
        mask_header = header.copy()
        for n, (name, bit) in enumerate(planes.items()):
            mask_header[f"MSKN{n:04}"], mask_header[f"MSKM{n:04}"] = name, 1 << bit
        mask_header["EXTVER"] = number + 1
        hdus.append(fits.CompImageHDU(mask, mask_header, name="MASK", compression_type="GZIP_2", quantize_level=0.0))
    variance_header = header.copy()
    variance_header["BUNIT"] = "nJy2"
    hdus.append(
        fits.CompImageHDU(
            np.ones_like(images), variance_header, name="VARIANCE", compression_type="GZIP_2", quantize_level=0.0
        )
    )
    first = origin if grid_first is None else grid_first
    i0, j0 = (origin[0] - first[0]) // CELL, (origin[1] - first[1]) // CELL
    y, x = (np.arange(side) - side // 2 for side in psf_shape)
    stamps = np.empty((*n_cells, *psf_shape))
    for i, j in np.ndindex(*n_cells):
        stamp = np.exp(-0.5 * (y[:, None] ** 2 + x**2) / (1.5 + 0.1 * (i + i0 + j + j0)) ** 2)
        stamps[i, j] = np.nan if (i + i0, j + j0) in missing else stamp / stamp.sum()
    hdus.append(fits.ImageHDU(stamps, name="PSF"))

    def interval(start: int, length: int) -> dict[str, int]:
        return {"start": start, "stop": start + length}

    tree = {
        "schema_version": "1.0.0",
        "min_read_version": version,
        "band": band,
        "psf": {
            "array": {"source": "fits:PSF", "shape": list(stamps.shape)},
            "bounds": {
                "grid": {
                    "bbox": {
                        "y": interval(first[0], origin[0] - first[0] + shape[0]),
                        "x": interval(first[1], origin[1] - first[1] + shape[1]),
                    },
                    "cell_shape": {"y": CELL, "x": CELL},
                },
                "bbox": {"y": interval(origin[0], shape[0]), "x": interval(origin[1], shape[1])},
                "missing": [{"i": i, "j": j} for i, j in missing],
            },
        },
    }
    if model != "cell_coadd":
        del tree["psf"], tree["band"]
    text = np.frombuffer(json.dumps(tree).encode(), dtype=np.uint8)
    column = np.empty(1, dtype=object)
    column[0] = text
    hdus.append(fits.BinTableHDU.from_columns([fits.Column("JSON", f"PB({text.size})", array=column)], name="JSON"))
    fits.HDUList(hdus).writeto(path)
    return path
