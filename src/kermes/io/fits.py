"""FITS, one file or HDU per band and plane: image, variance or inverse variance, mask, PSF."""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from astropy import units
from astropy.io import fits
from astropy.utils.exceptions import AstropyUserWarning
from astropy.wcs import WCS, NoConvergence, WcsError
from numpy.typing import NDArray

from kermes.coadd import BAD_PLANES, Coadd, parse_unit
from kermes.errors import DataWarning, FileError, InputError, ShapeError
from kermes.geometry import Box
from kermes.io.lsst_images import Cells, cells_of, psf_of_cells, tree_of

logger = logging.getLogger(__name__)

Files = Mapping[str, Path | str]
"""One ``file.fits[HDU]`` for each band."""

GRID_TOLERANCE_PIX = 0.01
"""Bands whose WCS differ by less than this everywhere lie on one pixel grid."""

ZERO_POINT_CARDS = ("MAGZERO", "MAGZPT", "MAGZP", "PHOTZP", "ZPT", "ZEROPNT")
"""Cards that hold the magnitude of a flux of one; FLUXMAG0, the flux of magnitude zero, is known as well."""

_REFERENCE = re.compile(r"(?P<path>.+?)(?:\[(?P<hdu>[^\[\]]+)\](?:\[(?P<plane>\d+)\])?)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plane:
    """One two-dimensional image of a file, with its header."""

    label: str
    """What messages call it."""

    data: NDArray[Any]
    """Pixels as stored, of the part that is read."""

    shape: tuple[int, ...]
    """Shape (H, W) of the whole image."""

    header: fits.Header
    """Header of the HDU."""

    primary: fits.Header
    """Header of the first HDU of the file."""

    wcs: WCS | None
    """Celestial WCS, of pixel index (x, y) from 0; None: the header has none."""

    def card(self, name: str) -> Any:
        """Value of a card of the HDU, or else of the first HDU; None where it is missing."""
        return self.header.get(name, self.primary.get(name))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Exposure:
    """What a file holds that has all planes of a band."""

    planes: Mapping[str, str]
    """``file.fits[HDU]`` of IMAGE, VARIANCE and INVVAR, as far as it has them; empty: it is no exposure."""

    masks: tuple[str, ...] = ()
    """Its masks; more than one if it has more planes than fit into the bits of one."""

    band: str | None = None
    """Name of the band, if the file says it."""

    cells: Cells | None = None
    """Its PSFs, if it is a coadd of cells."""


_Window = tuple[slice, slice]


def read_fits(
    images: Files | Sequence[Path | str],
    *,
    variance: Files | None = None,
    invvar: Files | None = None,
    mask: Files | None = None,
    psf: Any = None,
    bands: Sequence[str] | None = None,
    mask_planes: Mapping[str, int] | None = None,
    bad_planes: Sequence[str] = BAD_PLANES,
    origin: tuple[int, int] | None = None,
    unit: Any = None,
    zero_point: float | None = None,
    name: str | None = None,
    box: Box | tuple[int, int, int, int] | None = None,
) -> Coadd:
    """Read a coadd from FITS files, one image per band and plane, or one exposure per band.

    An exposure is a file whose HDUs are named (EXTNAME or EXTTYPE) IMAGE, MASK and VARIANCE or INVVAR, as pipelines of
    LSST and HSC write it. Given without brackets as the image, it brings what is not given otherwise. A coadd of cells
    of lsst.images, as in Rubin's data releases, brings its PSFs and the name of its band as well; the PSF of any other
    exposure must be given beside it.

    A file is written ``file.fits[HDU]``: the number of the HDU, counted from 0, or its EXTNAME, or EXTNAME,EXTVER;
    without brackets, the first HDU with an image. ``file.fits[HDU][plane]`` picks one image of a cube, counted from
    0. Compressed files (.fz, .gz) are read like any other.

    Parameters
    ----------
    images : mapping of band to file, or sequence of files that name their bands
        Background-subtracted flux per pixel. Bands keep this order.
    variance, invvar : mapping of band to file, optional
        Variance of `images`, or its inverse (zero where a pixel is not to be used); each band in one of the two. Left
        out for a band: that of the exposure.
    mask : mapping of band to file, optional
        Left out: those of the exposures, if all bands have one.
        Bits named by the cards ``MP_<name>`` (bit number), or ``MSKNnnnn`` (name) and ``MSKMnnnn`` (mask value). The
        bits may differ from band to band. A mask whose bits have no name is not used.
    psf : mapping of band to file, array (B, P, Q), or callable ``psf(y, x, band)``, optional
        PSF at the pixels of the image. Left out: those of the exposures, a `CellPsf`, if all bands have them; a cell
        without data takes that of a neighbour.
    bands : sequence of str, optional
        Bands to read, in this order; None: those of `images`.
    mask_planes : mapping of name to bit number, optional
        Names of the bits of `mask`; None: as the headers say.
    bad_planes : sequence of str, optional
        Planes whose pixels are not used.
    origin : (int, int), optional
        Coordinates (y, x) of the first pixel of the files; None: from ``CRVAL2A``, ``CRVAL1A`` or ``LTV2``, ``LTV1``,
        or (0, 0).
    unit : str or unit, optional
        Unit of the images, whatever the headers say; None: ``BUNIT``.
    zero_point : float, optional
        AB magnitude of a flux of 1 `unit`; None: from MAGZERO, MAGZPT, MAGZP, PHOTZP, ZPT, ZEROPNT or FLUXMAG0.
    name : str, optional
        What messages call the coadd; None: the file of the first band.
    box : Box, or (y0, x0, height, width), optional
        Pixels to read, in the coadd's coordinates, cut at the edge of the image; None: all. Of compressed files only
        the tiles in question are read.

    Returns
    -------
    coadd : Coadd
        With the WCS of the first band that has one.

    Raises
    ------
    FileError
        If a file is missing or damaged.
    ShapeError
        If a plane has another shape than the image of the first band.
    InputError
        If a plane lies on another pixel grid, naming band and offset; if bands differ in unit, zero point or cells; if
        a plane of a band is missing; if `box` has no pixel of the image.
    """
    variance, invvar = variance or {}, invvar or {}
    if not isinstance(images, Mapping):
        images, exposures = _named_exposures(images)
        names = _chosen_bands(images, bands)
    else:
        names = _chosen_bands(images, bands)
        exposures = {band: _exposure(images[band]) for band in names}
    _check_bands("variance", variance, images)
    _check_bands("invvar", invvar, images)
    own = [band for band in names if band not in variance and band not in invvar]
    variance = {**variance, **_planes_of(exposures, own, "VARIANCE")}
    invvar = {**invvar, **_planes_of(exposures, [band for band in own if band not in variance], "INVVAR")}
    _check_noise(variance, invvar, names)
    mask_files: dict[str, tuple[Path | str, ...]] = {}
    if mask is not None:
        _check_bands("mask", mask, images)
        _check_complete("mask", mask, names)
        mask_files = {band: (mask[band],) for band in names}
    elif all(exposures[band].masks for band in names):
        mask_files = {band: exposures[band].masks for band in names}
    if isinstance(psf, Mapping):
        _check_bands("psf", psf, images)
        _check_complete("psf", psf, names)
    elif psf is None:
        psf = _psf_of_exposures(exposures, names)

    window = None if box is None else _window(images[names[0]], names[0], box, origin)
    flux = [_read_plane(images[band], "image", band, window) for band in names]
    reference = _check_grid(flux, names)
    noise = []
    for band in names:
        table, files = ("invvar", invvar) if band in invvar else ("variance", variance)
        read = _read_plane(files[band], table, band, window)
        _check_on_grid(read, flux[0], reference)
        noise.append(_inverted(read.data) if band in invvar else read.data)
    bits, planes = None, mask_planes
    if mask_files:
        masks = [[_read_plane(file, "mask", band, window) for file in mask_files[band]] for band in names]
        for read in (each for of_band in masks for each in of_band):
            _check_on_grid(read, flux[0], reference)
        bits, planes = _masks(masks, mask_planes)
    if isinstance(psf, Mapping):
        psf = [_read_plane(psf[band], "psf", band).data for band in names]
    first = _common_origin(flux) if origin is None else origin
    if window is not None:
        first = (first[0] + window[0].start, first[1] + window[1].start)
        reference = None if reference is None else reference[window]
    return Coadd(
        images=[plane.data for plane in flux],  # type: ignore[arg-type]
        variance=noise,  # type: ignore[arg-type]
        psfs=psf,
        bands=names,
        mask=bits,  # type: ignore[arg-type]
        mask_planes=planes,
        bad_planes=tuple(bad_planes),
        wcs=reference,
        origin=first,
        unit=_common_unit(flux, names) if unit is None else unit,
        zero_point=_common_zero_point(flux, names) if zero_point is None else zero_point,
        name=Path(_split_reference(images[names[0]])[0]).name if name is None else name,
    )


# ---------------------------------------------------------------- which bands


def _chosen_bands(images: Any, bands: Sequence[str] | None) -> tuple[str, ...]:
    if not isinstance(images, Mapping) or not images:
        raise InputError(f"images must map the name of each band to a file, got {images!r}")
    names = tuple(images) if bands is None else (bands,) if isinstance(bands, str) else tuple(bands)
    unknown = [band for band in names if band not in images]
    if unknown:
        raise InputError(f"bands must be bands of image, {', '.join(images)}; got {unknown[0]!r}")
    return names


def _named_exposures(files: Any) -> tuple[dict[str, Path | str], dict[str, _Exposure]]:
    """Find the bands of files that name them."""
    images: dict[str, Path | str] = {}
    exposures: dict[str, _Exposure] = {}
    files = [files] if isinstance(files, str | Path) else list(files)
    if not files:
        raise InputError("images must be at least one file, got none")
    for file in files:
        exposure = _exposure(file)
        if exposure.band is None:
            _read_plane(file, "image")  # a file that cannot be read is what is to be said first
            raise InputError(
                f"images must map the name of each band to a file, because {file} does not name its band; only "
                "coadds of lsst.images do"
            )
        if exposure.band in images:
            raise InputError(
                f"images must be of different bands; {images[exposure.band]} and {file} are both of {exposure.band!r}"
            )
        images[exposure.band], exposures[exposure.band] = file, exposure
    return images, exposures


def _planes_of(exposures: Mapping[str, _Exposure], bands: Sequence[str], plane: str) -> dict[str, str]:
    """Say where a plane of some bands is, for those whose exposure has it."""
    return {band: exposures[band].planes[plane] for band in bands if plane in exposures[band].planes}


def _psf_of_exposures(exposures: Mapping[str, _Exposure], names: tuple[str, ...]) -> Any:
    cells = {band: exposures[band].cells for band in names}
    without = [band for band, own in cells.items() if own is None]
    if without:
        raise InputError(
            f"psf must be given for bands {tuple(without)}, because their files hold none that can be read"
        )
    return psf_of_cells({band: own for band, own in cells.items() if own is not None})


def _check_bands(plane: str, files: Any, images: Files) -> None:
    if not isinstance(files, Mapping):
        raise InputError(f"{plane} must map the name of each band to a file, got {files!r}")
    unknown = [band for band in files if band not in images]
    if unknown:
        raise InputError(f"{plane} must be given for bands of image, {', '.join(images)}; got {unknown[0]!r}")


def _check_complete(plane: str, files: Files, names: tuple[str, ...]) -> None:
    missing = [band for band in names if band not in files]
    if missing:
        raise InputError(f"{plane} must be given for every band of image; band {missing[0]!r} has none")


def _check_noise(variance: Files, invvar: Files, names: tuple[str, ...]) -> None:
    for band in names:
        if band not in variance and band not in invvar:
            raise InputError(f"variance or invvar must be given for every band of image; band {band!r} has neither")
        if band in variance and band in invvar:
            raise InputError(f"variance and invvar must not be given for the same band; band {band!r} has both")


# ---------------------------------------------------------------- one plane


def _split_reference(reference: Path | str) -> tuple[str, str | None, int | None]:
    """Take ``file[HDU][plane]`` apart; a file whose own name has brackets comes first."""
    text = str(reference)
    match = _REFERENCE.fullmatch(text)
    if match is None or Path(text).is_file():
        return text, None, None
    return match["path"], match["hdu"], None if match["plane"] is None else int(match["plane"])


def _exposure(reference: Path | str) -> _Exposure:
    """Say what an exposure holds; nothing for a file that is none, or an HDU of it."""
    path, key, _ = _split_reference(reference)
    nothing = _Exposure(planes={})
    if key is not None:
        return nothing
    found: dict[str, str] = {}
    masks: list[str] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with fits.open(path, memmap=False) as file:
                first = next((number for number, hdu in enumerate(file) if _holds_image(hdu)), None)
                for number, hdu in enumerate(file):
                    name = str(hdu.header.get("EXTNAME") or hdu.header.get("EXTTYPE") or "").strip().upper()
                    # What other files call a mask may have more axes than an image.
                    if not _holds_image(hdu) or len(hdu.shape) != 2:
                        continue
                    if name == "MASK":
                        masks.append(f"{path}[{number}]")
                    elif name in ("IMAGE", "VARIANCE", "INVVAR"):
                        found.setdefault(name, f"{path}[{number}]")
                if found.get("IMAGE") != f"{path}[{first}]":
                    return nothing
                tree = tree_of(file, path)
                if tree is None:
                    return _Exposure(planes=found, masks=tuple(masks[:1]))
                band = tree.get("band")
                return _Exposure(
                    planes=found,
                    masks=tuple(masks),
                    band=None if band is None else str(band),
                    cells=cells_of(file, tree, path),
                )
    except FileError:
        raise
    except Exception:  # what is wrong with it is said when the image is read
        return nothing


def as_box(box: Box | Sequence[int]) -> Box:
    """Make a box of what says one: itself, or (y0, x0, height, width)."""
    try:
        return box if isinstance(box, Box) else Box(*(int(value) for value in box))
    except (TypeError, ValueError):
        raise InputError(f"box must be a Box or (y0, x0, height, width), got {box!r}") from None


def _window(reference: Path | str, band: str, box: Any, origin: tuple[int, int] | None) -> _Window:
    """Rows and columns of the files that a box in the coordinates of the coadd takes."""
    wanted = as_box(box)
    plane = _read_plane(reference, "image", band, (slice(0, 0), slice(0, 0)))
    whole = Box(*((_origin(plane) or (0, 0)) if origin is None else origin), *plane.shape)
    kept = wanted & whole
    if kept.is_empty:
        raise InputError(f"box must share pixels with the image {whole}, got {wanted}")
    return kept.within(whole)


def _read_plane(reference: Path | str, table: str, band: str | None = None, window: _Window | None = None) -> _Plane:
    """Read one image or a part of it, whatever its compression, scaling and byte order."""
    label = table if band is None else f"{table} of band {band!r}"
    path, key, index = _split_reference(reference)
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        try:
            with fits.open(path, memmap=False) as file:
                hdu = _find_hdu(file, key, label, str(reference))
                header, primary, full = hdu.header, file[0].header, tuple(hdu.shape)
                place = _place_in_cube(full, index, label, str(reference))
                if window is None:
                    data = hdu.data[place]
                elif window[0].start == window[0].stop:  # only the header is wanted
                    data = np.zeros((0, 0))
                else:
                    data = hdu.section[(*place, *window)]
                wcs = _celestial_wcs(header, file, label, str(reference))
        except InputError:
            _refuse_damage(remarks, label, path)
            raise
        except OSError as error:
            raise FileError(f"{label} must be a readable FITS file, got {path}: {_one_line(error)}") from None
        except Exception as error:  # what decompression raises on damage has no public name
            raise FileError(f"{label} must be an undamaged FITS file, got {path}: {_one_line(error)}") from None
    _refuse_damage(remarks, label, path)
    return _Plane(label=label, data=data, shape=full[-2:], header=header, primary=primary, wcs=wcs)


def _place_in_cube(shape: tuple[int, ...], index: int | None, label: str, reference: str) -> tuple[int, ...]:
    """Index of an image among those that an HDU of a shape holds."""
    if index is not None and (len(shape) < 3 or index >= shape[-3]):
        raise InputError(f"{label} must name a plane of a cube, got {reference} with shape {shape}")
    # Other axes must have a length of one.
    others = shape[:-2] if index is None else shape[:-3]
    if any(length != 1 for length in others):
        raise ShapeError(
            f"{label} must be a two-dimensional image, got {reference} with shape {shape}; "
            "one image of a cube is picked by file.fits[HDU][plane]"
        )
    return (*(0 for _ in others), *(() if index is None else (index,)))


def _refuse_damage(remarks: Sequence[warnings.WarningMessage], label: str, path: str) -> None:
    """Astropy only warns of a file that is cut short, and then finds fewer HDUs or pixels."""
    for remark in remarks:
        text = _one_line(remark.message)
        if issubclass(remark.category, AstropyUserWarning) and re.search("truncated|Error validating header", text):
            raise FileError(f"{label} must be an undamaged FITS file, got {path}: {text}")
        logger.debug("%s: %s", path, text)


def _one_line(error: Any) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())


def _find_hdu(file: fits.HDUList, key: str | None, label: str, reference: str) -> Any:
    if key is None:
        for hdu in file:
            if _holds_image(hdu):
                return hdu
        raise InputError(f"{label} must be an image, got {reference}, which holds none")
    name, _, version = key.partition(",")
    try:
        if key.isdecimal():
            hdu = file[int(key)]
        else:
            hdu = file[name.strip(), int(version)] if version.strip().isdecimal() else file[key]
    except (IndexError, KeyError):
        hdu = None
    if hdu is None or not _holds_image(hdu):
        found = [f"{i} ({hdu.name})" if hdu.name else f"{i}" for i, hdu in enumerate(file) if _holds_image(hdu)]
        raise InputError(
            f"{label} must name an HDU with an image, got {reference}; images are in HDU {', '.join(found) or 'none'}"
        )
    return hdu


def _holds_image(hdu: Any) -> bool:
    return (
        isinstance(hdu, fits.PrimaryHDU | fits.ImageHDU | fits.CompImageHDU)
        and len(hdu.shape) >= 2
        and 0 not in hdu.shape
    )


def _celestial_wcs(header: fits.Header, file: fits.HDUList, label: str, reference: str) -> WCS | None:
    try:
        wcs = WCS(header, fobj=file)
        if not wcs.has_celestial:
            return None
        return wcs if wcs.naxis == 2 else wcs.celestial
    except (WcsError, ValueError, TypeError, KeyError, fits.VerifyError) as error:
        raise InputError(f"{label} must have a WCS that can be read, got {reference}: {_one_line(error)}") from None


def _inverted(invvar: NDArray[Any]) -> NDArray[np.float64]:
    """Variance from inverse variance; NaN, so not used, where that is not positive."""
    weight = np.asarray(invvar, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.where(weight > 0, 1 / weight, np.nan)


# ---------------------------------------------------------------- one pixel grid


def _check_grid(flux: Sequence[_Plane], names: tuple[str, ...]) -> WCS | None:
    """Refuse bands on another grid than the first; return the WCS of all."""
    reference = next((plane for plane in flux if plane.wcs is not None), flux[0])
    for plane in flux:
        _check_on_grid(plane, flux[0], reference.wcs)
        if plane.wcs is None and reference.wcs is not None:
            logger.info("%s has no WCS; that of %s is used", plane.label, reference.label)
    origins = [_origin(plane) for plane in flux]
    for band, origin in zip(names, origins, strict=True):
        if None not in (origin, origins[0]) and origin != origins[0]:
            (y, x), (y0, x0) = origin, origins[0]  # type: ignore[misc]
            raise InputError(
                f"images must lie on one pixel grid: band {band!r} is offset from band {names[0]!r} by "
                f"(y, x) = ({y - y0:+d}, {x - x0:+d}) pixels"
            )
    return reference.wcs


def _check_on_grid(plane: _Plane, first: _Plane, wcs: WCS | None) -> None:
    """Refuse a plane of another shape or WCS."""
    both = plane.wcs is not None and wcs is not None
    if plane.shape != first.shape:
        where = ""
        if both:
            y, x = _pixels_on(wcs, plane.wcs, np.zeros((1, 2)))[0]
            where = f"; its first pixel lies at (y, x) = ({y:.3f}, {x:.3f}) there"
        raise ShapeError(
            f"images must lie on one pixel grid: {plane.label} has shape {plane.shape}, "
            f"{first.label} has {first.shape}{where}"
        )
    if not both:
        return
    last = np.array(plane.shape) - 1.0
    points = np.array([[0, 0], [0, 1], [1, 0], [1, 1], [0.5, 0.5]]) * last
    offset = _pixels_on(wcs, plane.wcs, points) - points
    largest = np.hypot(*offset.T).max()
    if not largest <= GRID_TOLERANCE_PIX:  # also when it is NaN: out of sight of each other
        dy, dx = offset[-1]
        raise InputError(
            f"images must lie on one pixel grid: {plane.label} is offset from {first.label} by (y, x) = "
            f"({dy:+.3f}, {dx:+.3f}) pixels at the centre, up to {largest:.3f} at the corners"
        )


def _pixels_on(target: Any, wcs: Any, points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where pixels (N, 2) of one grid lie on another; NaN where they cannot be seen from there."""
    try:
        x, y = target.world_to_pixel(wcs.pixel_to_world(points[:, 1], points[:, 0]))
    except (NoConvergence, WcsError, ValueError):
        return np.full(points.shape, np.nan)
    return np.stack([y, x], axis=-1)


def _origin(plane: _Plane) -> tuple[int, int] | None:
    """Coordinates (y, x) of the first pixel, from the linear WCS A or from LTV; None: the header has neither."""
    header = plane.header
    found = []
    for axis in (2, 1):
        if str(header.get(f"CTYPE{axis}A", "")).strip().upper() == "LINEAR":
            value = _number(header, f"CRVAL{axis}A") + 1 - _number(header, f"CRPIX{axis}A")
        else:
            value = -_number(header, f"LTV{axis}")
        if not value.is_integer():
            return None
        found.append(int(value))
    return found[0], found[1]


def _number(header: fits.Header, card: str) -> float:
    """Value of a card; NaN where it is missing or no number."""
    value = header.get(card)
    return float(value) if isinstance(value, int | float) else math.nan


def _common_origin(flux: Sequence[_Plane]) -> tuple[int, int]:
    """Origin of the first band that has one; that the others agree was checked with the grid."""
    return next((origin for plane in flux if (origin := _origin(plane)) is not None), (0, 0))


# ---------------------------------------------------------------- unit and zero point


def _common_unit(flux: Sequence[_Plane], names: tuple[str, ...]) -> units.UnitBase | None:
    found: list[units.UnitBase | None] = []
    for plane in flux:
        text = str(plane.header.get("BUNIT", "")).strip()
        try:
            found.append(parse_unit(text) if text else None)
        except InputError:
            found.append(None)
            warnings.warn(
                f"{plane.label}: BUNIT = {text!r} is no unit known to astropy; the unit counts as not known",
                DataWarning,
                stacklevel=4,
            )
    for band, unit in zip(names, found, strict=True):
        if unit != found[0]:
            raise InputError(
                f"unit must be the same in all bands; band {band!r} has {unit}, band {names[0]!r} has {found[0]} "
                "(BUNIT); convert the images, or give unit"
            )
    return found[0]


def _zero_point(plane: _Plane) -> float | None:
    for card in (*ZERO_POINT_CARDS, "FLUXMAG0"):
        value = plane.card(card)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or (card == "FLUXMAG0" and value <= 0):
            raise InputError(f"zero_point must be given: {plane.label} has {card} = {value!r}")
        return 2.5 * math.log10(value) if card == "FLUXMAG0" else float(value)
    return None


def _common_zero_point(flux: Sequence[_Plane], names: tuple[str, ...]) -> float | None:
    found = [_zero_point(plane) for plane in flux]
    for band, value in zip(names, found, strict=True):
        if value != found[0] and (value is None or found[0] is None or abs(value - found[0]) > 1e-4):
            raise InputError(
                f"zero_point must be the same in all bands; band {band!r} has {value}, band {names[0]!r} has "
                f"{found[0]} (header); rescale the images, or give zero_point"
            )
    return found[0]


# ---------------------------------------------------------------- masks


def _named_bits(header: fits.Header) -> dict[str, int]:
    """Names and bit numbers of the planes of a mask."""
    planes: dict[str, int] = {}
    for card, value in header.items():
        if card.startswith("MP_") and isinstance(value, int):
            planes[card.removeprefix("MP_")] = value
        elif match := re.fullmatch(r"MSKN(\d+)", card):
            mask = header.get(f"MSKM{match[1]}")
            if isinstance(mask, int) and mask > 0 and mask & (mask - 1) == 0:
                planes[str(value)] = mask.bit_length() - 1
    return planes


def mask_type(n_planes: int) -> np.dtype[Any]:
    """Choose the smaller type of integers that has a bit for each plane, and one for the sign."""
    return np.dtype(np.int32 if n_planes < 32 else np.int64)


def _masks(
    masks: Sequence[Sequence[_Plane]], mask_planes: Mapping[str, int] | None
) -> tuple[list[NDArray[Any]], Mapping[str, int]]:
    """Bring the masks of all bands, one or more of each, to the same bits."""
    if mask_planes is not None:
        return [of_band[0].data for of_band in masks], mask_planes
    named = [[_named_bits(plane.header) for plane in of_band] for of_band in masks]
    for plane, names in (
        (each, bits) for pair in zip(masks, named, strict=True) for each, bits in zip(*pair, strict=True)
    ):
        if plane.data.dtype.kind not in "iu":
            raise InputError(f"{plane.label} must hold integers, got dtype {plane.data.dtype}")
        if not names:
            logger.info("%s is not used, because no card MP_* or MSKN* names its planes", plane.label)
    if all(len(planes) == 1 and planes == named[0] for planes in named):
        return [of_band[0].data for of_band in masks], named[0][0]
    every = (name for of_band in named for planes in of_band for name in planes)
    common = {name: bit for bit, name in enumerate(dict.fromkeys(every))}
    moved = []
    for of_band, planes_of_band in zip(masks, named, strict=True):
        dtype = mask_type(len(common))
        out = np.zeros(of_band[0].data.shape, dtype=dtype)
        for plane, planes in zip(of_band, planes_of_band, strict=True):
            for name, bit in planes.items():
                out |= ((plane.data >> bit) & 1).astype(dtype) << common[name]
        moved.append(out)
    return moved, common
