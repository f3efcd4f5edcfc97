"""Images of the package lsst.images as coadds, and coadds as such images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from astropy import units
from astropy.wcs import WCS
from lsst.images import YX, Image, Mask, MaskedImage, MaskPlane, MaskSchema, SkyProjection, TractFrame
from lsst.images import Box as LsstBox
from lsst.images.cells import (
    CellCoadd,
    CellGrid,
    CellGridBounds,
    CellIJ,
    CellPointSpreadFunction,
    PatchDefinition,
)
from numpy.typing import NDArray

from kermes.coadd import BAD_PLANES, Coadd, PsfField, wavelength_order
from kermes.errors import InputError, ShapeError
from kermes.geometry import Box
from kermes.io.fits import mask_type
from kermes.io.lsst_images import Cells, cells_from_grid, psf_of_cells
from kermes.psf import CellPsf

PSF_CELL = 128
"""Side [pixels] of the cells in whose centres a PSF that varies smoothly is drawn, once for all sources in it."""


# ---------------------------------------------------------------- in


def coadd_of_images(
    images: Mapping[str, MaskedImage] | Iterable[MaskedImage],
    *,
    bands: Sequence[str] | None = None,
    psfs: Any = None,
    bad_planes: Iterable[str] = BAD_PLANES,
    name: str = "coadd",
) -> Coadd:
    """Make a coadd of images of lsst.images, one per band.

    Parameters
    ----------
    images : mapping of band to MaskedImage, or iterable of images that know their bands
        Such as `CellCoadd` or `VisitImage`.
    bands : sequence of str, optional
        Bands of the coadd, in this order; one without an image has no valid pixel. None: those of the images, in their
        order.
    psfs : optional
        As in `Coadd`; None: those of the images. The PSFs of cells become a `CellPsf`, in which a cell without data
        takes that of a neighbour; any other is drawn at the centres of cells of `PSF_CELL` pixels.
    bad_planes : iterable of str, optional
        Mask planes whose pixels are not used.
    name : str, optional
        What messages call it.

    Returns
    -------
    coadd : Coadd
        In the coordinates of the images, which are those of the tract. Sky positions are those of the projection as a
        FITS WCS, as files hold it; that of a single visit is an approximation.

    Raises
    ------
    InputError
        If there is no image, one has no variance, unit or PSF, bands have no name, or two have the same.
    ShapeError
        If the bands do not have the same pixels.
    """
    by_band = _by_band(images)
    first_band, first = next(iter(by_band.items()))
    for band, image in by_band.items():
        if image.bbox != first.bbox:
            raise ShapeError(
                f"images must lie on one pixel grid: band {band!r} has {box_of(image.bbox)}, "
                f"band {first_band!r} has {box_of(first.bbox)}"
            )
    wanted = tuple(by_band) if bands is None else tuple(bands)
    unit = first.unit
    scales = {band: _scale(image, band, unit) for band, image in by_band.items()}
    masks, planes = _masks({band: image.mask for band, image in by_band.items()})
    nothing = np.full(first.image.array.shape, np.nan, dtype=np.float32)
    no_bits = np.zeros(nothing.shape, dtype=mask_type(len(planes)))
    flux = {band: _scaled(image.image.array, scales[band]) for band, image in by_band.items()}
    noise = {band: _scaled(image.variance.array, scales[band] ** 2) for band, image in by_band.items()}
    return Coadd(
        images=[flux.get(band, nothing) for band in wanted],  # type: ignore[arg-type]
        variance=[noise.get(band, nothing) for band in wanted],  # type: ignore[arg-type]
        psfs=_psfs(by_band, wanted) if psfs is None else psfs,
        bands=wanted,
        mask=[masks.get(band, no_bits) for band in wanted],  # type: ignore[arg-type]
        mask_planes=planes,
        bad_planes=tuple(bad_planes),
        wcs=_wcs(first),
        origin=(first.bbox.y.start, first.bbox.x.start),
        unit=unit,
        name=name,
    )


def in_order(bands: Iterable[str]) -> list[str]:
    """Sort bands from blue to red, or by name if one is not known."""
    names = sorted(bands)
    return [names[place] for place in wavelength_order(names)]


def box_of(box: Any) -> Box:
    """Box of a box of lsst.images."""
    return Box.from_bounds(box.y.start, box.y.stop, box.x.start, box.x.stop)


def lsst_box(box: Box) -> Any:
    """Box of lsst.images of a box."""
    return LsstBox.from_shape(box.shape, start=box.origin)


def _by_band(images: Any) -> dict[str, Any]:
    if isinstance(images, Mapping):
        found = dict(images)
    else:
        found = {}
        for image in images:
            band = getattr(image, "band", None)
            if band is None:
                raise InputError(
                    f"images must map the name of each band to an image, because a {type(image).__name__} does not "
                    "name its band"
                )
            if band in found:
                raise InputError(f"images must be of different bands; two are of {band!r}")
            found[band] = image
    if not found:
        raise InputError("images must be at least one, got none")
    return found


def _scale(image: Any, band: str, unit: Any) -> float:
    """Factor that brings an image to the unit of the first band."""
    if image.unit == unit:
        return 1.0
    try:
        return float(image.unit.to(unit))
    except (units.UnitConversionError, AttributeError):
        raise InputError(f"unit must be the same in all bands; band {band!r} has {image.unit}, not {unit}") from None


def _scaled(pixels: NDArray[Any], scale: float) -> NDArray[Any]:
    return pixels if scale == 1.0 else pixels * np.asarray(scale, dtype=pixels.dtype)


def _masks(masks: Mapping[str, Mask]) -> tuple[dict[str, NDArray[Any]], dict[str, int]]:
    """Bits of all bands under one numbering, as of the planes of the first and then those of the others."""
    names = dict.fromkeys(name for mask in masks.values() for plane in mask.schema if plane for name in (plane.name,))
    planes = {name: number for number, name in enumerate(names)}
    bits = {}
    dtype = mask_type(len(planes))
    for band, mask in masks.items():
        out = np.zeros(mask.array.shape[:2], dtype=dtype)
        for plane in mask.schema:
            if plane is not None:
                bit = mask.schema.bit(plane.name)
                out |= ((mask.array[..., bit.index] & bit.mask) != 0).astype(dtype) << planes[plane.name]
        bits[band] = out
    return bits, planes


def _wcs(image: Any) -> WCS | None:
    """WCS as a file would hold it, so that an image from a file and the same from memory have the same positions."""
    wcs = image.fits_wcs
    return None if wcs is None else WCS(wcs.to_header(relax=True))


def has_data(image: Any) -> bool:
    """Whether an image has a pixel with a value, and a PSF somewhere."""
    if isinstance(image.psf, CellPointSpreadFunction) and not _cells(image.psf).present.any():
        return False
    variance = image.variance.array
    return bool((np.isfinite(image.image.array) & (variance > 0) & np.isfinite(variance)).any())


def _psfs(images: Mapping[str, Any], bands: tuple[str, ...]) -> CellPsf:
    psfs = {}
    for band, image in images.items():
        psfs[band] = getattr(image, "psf", None)
        if psfs[band] is None:
            raise InputError(f"psfs must be given, because the {type(image).__name__} of band {band!r} has none")
    if all(isinstance(psf, CellPointSpreadFunction) for psf in psfs.values()):
        cells = {band: _cells(psf) for band, psf in psfs.items()}
        some = next(iter(cells.values()))
        empty = replace(some, present=np.zeros_like(some.present))
        return psf_of_cells({band: cells.get(band, empty) for band in bands})
    box = box_of(next(iter(images.values())).bbox)
    return CellPsf.sample(_kernel_field(psfs), box=box, cell_shape=(PSF_CELL, PSF_CELL), bands=bands)


def _cells(psf: CellPointSpreadFunction) -> Cells:
    grid, box = psf.bounds.grid, psf.bounds.bbox
    side_y, side_x = grid.cell_shape.y, grid.cell_shape.x
    i0, j0 = (box.y.start - grid.bbox.y.start) // side_y, (box.x.start - grid.bbox.x.start) // side_x
    n_y, n_x = -(-box.shape[0] // side_y), -(-box.shape[1] // side_x)
    missing = [(cell.i, cell.j) for cell in psf.bounds.missing]
    kernel = psf.kernel_bbox
    stamps = np.full((n_y, n_x, kernel.shape[0], kernel.shape[1]), np.nan)
    for i, j in np.ndindex(n_y, n_x):
        if (i + i0, j + j0) not in missing:
            stamps[i, j] = psf[CellIJ(i=i + i0, j=j + j0)].array
    return cells_from_grid(
        stamps,
        origin=(box.y.start, box.x.start),
        first=(grid.bbox.y.start, grid.bbox.x.start),
        cell_shape=(side_y, side_x),
        missing=missing,
    )


def _kernel_field(psfs: Mapping[str, Any]) -> PsfField:
    """Say the PSF at a pixel; it counts as missing where lsst.images has none."""

    def kernel(y: float, x: float, band: str) -> NDArray[np.float64]:
        # A band without an image is a KeyError, a place without a PSF a BoundsError, which is a ValueError.
        return np.asarray(psfs[band].compute_kernel_image(x=x, y=y).array, dtype=np.float64)

    return kernel


# ---------------------------------------------------------------- out


def cell_coadd(
    coadd: Coadd,
    band: str,
    *,
    cell: int,
    skymap: str,
    tract: int,
    tract_box: Box,
    patch: int,
    patch_place: tuple[int, int],
    inner: Box,
) -> CellCoadd:
    """Make a coadd of cells of one band of a coadd.

    Parameters
    ----------
    coadd : Coadd
        With a unit and a WCS; its PSF is evaluated at the centre of each cell, and cells without a valid pixel are
        missing.
    band : str
        Band to take.
    cell : int
        Side of a cell [pixels]; must divide the sides of the coadd.
    skymap, tract, tract_box
        Name, number and pixels of the tract.
    patch, patch_place, inner
        Number of the patch, its row and column in the tract, and the pixels that no other patch has.

    Returns
    -------
    image : CellCoadd
    """
    b = coadd.bands.index(band)
    box = lsst_box(coadd.box)
    frame = TractFrame(skymap=skymap, tract=tract, bbox=lsst_box(tract_box))
    sky = sky_of(coadd, frame, tract_box)
    image = Image(np.asarray(coadd.images[b]), bbox=box, unit=coadd.unit, sky_projection=sky)
    variance = Image(np.asarray(coadd.variance[b]), bbox=box, unit=coadd.unit**2)  # type: ignore[operator]
    grid = CellGrid(bbox=box, cell_shape=YX(y=cell, x=cell))
    n_y, n_x = coadd.shape[0] // cell, coadd.shape[1] // cell
    filled = coadd.valid[b].reshape(n_y, cell, n_x, cell).any(axis=(1, 3))
    stamps: NDArray[np.float64] | None = None
    for i, j in np.argwhere(filled).tolist():
        y, x = coadd.origin[0] + (i + 0.5) * cell - 0.5, coadd.origin[1] + (j + 0.5) * cell - 0.5
        stamp = coadd.psf_at(y=y, x=x)[b]
        if stamps is None:
            stamps = np.full((n_y, n_x, *stamp.shape), np.nan)
        stamps[i, j] = stamp
    if stamps is None:
        stamps = np.full((n_y, n_x, 3, 3), np.nan)
    missing = frozenset(CellIJ(i=i, j=j) for i, j in np.argwhere(~filled).tolist())
    return CellCoadd(
        image,
        mask=lsst_mask(coadd, b),
        variance=variance,
        band=band,
        psf=CellPointSpreadFunction(stamps, CellGridBounds(grid=grid, bbox=box, missing=missing)),
        patch=PatchDefinition(
            id=patch, index=YX(y=patch_place[0], x=patch_place[1]), inner_bbox=lsst_box(inner), cells=grid
        ),
    )


def sky_of(coadd: Coadd, frame: Any, pixels: Box) -> Any:
    """Projection of a coadd with a WCS onto the sky; its pixels are those of the coadd's coordinates."""
    return SkyProjection.from_fits_wcs(
        coadd.wcs, frame, pixel_bounds=lsst_box(pixels), x0=coadd.origin[1], y0=coadd.origin[0]
    )


def lsst_mask(coadd: Coadd, b: int) -> Mask:
    """Make the mask of one band, by its index, with the planes that the coadd names."""
    planes = coadd.mask_planes or {}
    mask = Mask(
        0, schema=MaskSchema([MaskPlane(name, f"{name} of a coadd") for name in planes]), bbox=lsst_box(coadd.box)
    )
    for name, bit in planes.items():
        assert coadd.mask is not None
        mask.set(name, ((coadd.mask[b] >> bit) & 1).astype(bool))
    return mask
