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
    """Pixels as stored, shape (H, W)."""

    header: fits.Header
    """Header of the HDU."""

    primary: fits.Header
    """Header of the first HDU of the file."""

    wcs: WCS | None
    """Celestial WCS, of pixel index (x, y) from 0; None: the header has none."""

    def card(self, name: str) -> Any:
        """Value of a card of the HDU, or else of the first HDU; None where it is missing."""
        return self.header.get(name, self.primary.get(name))


def read_fits(
    images: Files,
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
) -> Coadd:
    """Read a coadd from FITS files, one image per band and plane, or one exposure per band.

    An exposure is a file whose HDUs are named (EXTNAME or EXTTYPE) IMAGE, MASK and VARIANCE or INVVAR, as pipelines of
    LSST and HSC write it. Given without brackets as the image, it brings what is not given otherwise. Its PSF must be
    given beside it.

    A file is written ``file.fits[HDU]``: the number of the HDU, counted from 0, or its EXTNAME, or EXTNAME,EXTVER;
    without brackets, the first HDU with an image. ``file.fits[HDU][plane]`` picks one image of a cube, counted from
    0. Compressed files (.fz, .gz) are read like any other.

    Parameters
    ----------
    images : mapping of band to file
        Background-subtracted flux per pixel. Bands keep this order.
    variance, invvar : mapping of band to file, optional
        Variance of `images`, or its inverse (zero where a pixel is not to be used); each band in one of the two. Left
        out for a band: that of the exposure.
    mask : mapping of band to file, optional
        Left out: those of the exposures, if all bands have one.
        Bits named by the cards ``MP_<name>`` (bit number), or ``MSKNnnnn`` (name) and ``MSKMnnnn`` (mask value). The
        bits may differ from band to band. A mask whose bits have no name is not used.
    psf : mapping of band to file, array (B, P, Q), or callable ``psf(y, x, band)``
        PSF at the pixels of the image.
    bands : sequence of str, optional
        Bands to read, in this order; None: those of `images`.
    mask_planes : mapping of name to bit number, optional
        Names of the bits of `mask`; None: as the headers say.
    bad_planes : sequence of str, optional
        Planes whose pixels are not used.
    origin : (int, int), optional
        Coordinates (y, x) of the first pixel; None: from ``CRVAL2A``, ``CRVAL1A`` or ``LTV2``, ``LTV1``, or (0, 0).
    unit : str or unit, optional
        Unit of the images, whatever the headers say; None: ``BUNIT``.
    zero_point : float, optional
        AB magnitude of a flux of 1 `unit`; None: from MAGZERO, MAGZPT, MAGZP, PHOTZP, ZPT, ZEROPNT or FLUXMAG0.
    name : str, optional
        What messages call the coadd; None: the file of the first band.

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
        If a plane lies on another pixel grid, naming band and offset; if bands differ in unit or zero point; if a
        plane of a band is missing.
    """
    names = _chosen_bands(images, bands)
    variance, invvar = variance or {}, invvar or {}
    if psf is None:
        raise InputError(f"psf must be given for bands {names}, got None")
    _check_bands("variance", variance, images)
    _check_bands("invvar", invvar, images)
    exposures = {band: _exposure(images[band]) for band in names}
    own = [band for band in names if band not in variance and band not in invvar]
    variance = {**variance, **{band: exposures[band]["VARIANCE"] for band in own if "VARIANCE" in exposures[band]}}
    without = [band for band in own if band not in variance]
    invvar = {**invvar, **{band: exposures[band]["INVVAR"] for band in without if "INVVAR" in exposures[band]}}
    _check_noise(variance, invvar, names)
    if mask is None and all("MASK" in exposure for exposure in exposures.values()):
        mask = {band: exposure["MASK"] for band, exposure in exposures.items()}
    if mask is not None:
        _check_bands("mask", mask, images)
        _check_complete("mask", mask, names)
    if isinstance(psf, Mapping):
        _check_bands("psf", psf, images)
        _check_complete("psf", psf, names)

    flux = [_read_plane(images[band], "image", band) for band in names]
    reference = _check_grid(flux, names)
    noise = []
    for band in names:
        table, files = ("invvar", invvar) if band in invvar else ("variance", variance)
        plane = _read_plane(files[band], table, band)
        _check_on_grid(plane, flux[0], reference)
        noise.append(_inverted(plane.data) if band in invvar else plane.data)
    bits, planes = None, mask_planes
    if mask is not None:
        masks = [_read_plane(mask[band], "mask", band) for band in names]
        for plane in masks:
            _check_on_grid(plane, flux[0], reference)
        bits, planes = _masks(masks, mask_planes)
    if isinstance(psf, Mapping):
        psf = [_read_plane(psf[band], "psf", band).data for band in names]
    return Coadd(
        images=[plane.data for plane in flux],  # type: ignore[arg-type]
        variance=noise,  # type: ignore[arg-type]
        psfs=psf,
        bands=names,
        mask=bits,  # type: ignore[arg-type]
        mask_planes=planes,
        bad_planes=tuple(bad_planes),
        wcs=reference,
        origin=_common_origin(flux) if origin is None else origin,
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


def _exposure(reference: Path | str) -> dict[str, str]:
    """Say where the planes of an exposure are, by name; empty for a file that is none, or an HDU of it."""
    path, key, _ = _split_reference(reference)
    if key is not None:
        return {}
    found: dict[str, str] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with fits.open(path, memmap=False) as file:
                for number, hdu in enumerate(file):
                    name = str(hdu.header.get("EXTNAME") or hdu.header.get("EXTTYPE") or "").strip().upper()
                    # What other files call a mask may have more axes than an image.
                    if name in ("IMAGE", "MASK", "VARIANCE", "INVVAR") and _holds_image(hdu) and len(hdu.shape) == 2:
                        found.setdefault(name, f"{path}[{number}]")
                first = next((number for number, hdu in enumerate(file) if _holds_image(hdu)), None)
    except Exception:  # what is wrong with it is said when the image is read
        return {}
    return found if found.get("IMAGE") == f"{path}[{first}]" else {}


def _read_plane(reference: Path | str, table: str, band: str) -> _Plane:
    """Read one image, whatever its compression, scaling and byte order."""
    label = f"{table} of band {band!r}"
    path, key, index = _split_reference(reference)
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        try:
            with fits.open(path, memmap=False) as file:
                hdu = _find_hdu(file, key, label, str(reference))
                data, header, primary = hdu.data, hdu.header, file[0].header
                wcs = _celestial_wcs(header, file, label, str(reference))
        except InputError:
            _refuse_damage(remarks, label, path)
            raise
        except OSError as error:
            raise FileError(f"{label} must be a readable FITS file, got {path}: {_one_line(error)}") from None
        except Exception as error:  # what decompression raises on damage has no public name
            raise FileError(f"{label} must be an undamaged FITS file, got {path}: {_one_line(error)}") from None
    _refuse_damage(remarks, label, path)

    if index is not None:
        if data.ndim < 3 or index >= data.shape[-3]:
            raise InputError(f"{label} must name a plane of a cube, got {reference} with shape {data.shape}")
        data = data[..., index, :, :]
    while data.ndim > 2 and len(data) == 1:
        data = data[0]
    if data.ndim != 2:
        raise ShapeError(
            f"{label} must be a two-dimensional image, got {reference} with shape {data.shape}; "
            "one image of a cube is picked by file.fits[HDU][plane]"
        )
    return _Plane(label=label, data=data, header=header, primary=primary, wcs=wcs)


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
    if plane.data.shape != first.data.shape:
        where = ""
        if both:
            y, x = _pixels_on(wcs, plane.wcs, np.zeros((1, 2)))[0]
            where = f"; its first pixel lies at (y, x) = ({y:.3f}, {x:.3f}) there"
        raise ShapeError(
            f"images must lie on one pixel grid: {plane.label} has shape {plane.data.shape}, "
            f"{first.label} has {first.data.shape}{where}"
        )
    if not both:
        return
    last = np.array(plane.data.shape) - 1.0
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


def _masks(
    masks: Sequence[_Plane], mask_planes: Mapping[str, int] | None
) -> tuple[list[NDArray[Any]], Mapping[str, int]]:
    """Bring the masks of all bands to the same bits."""
    bits = [plane.data for plane in masks]
    if mask_planes is not None:
        return bits, mask_planes
    named = [_named_bits(plane.header) for plane in masks]
    for plane, names in zip(masks, named, strict=True):
        if plane.data.dtype.kind not in "iu":
            raise InputError(f"{plane.label} must hold integers, got dtype {plane.data.dtype}")
        if not names:
            logger.info("%s is not used, because no card MP_* or MSKN* names its planes", plane.label)
    if all(planes == named[0] for planes in named):
        return bits, named[0]
    common = {name: bit for bit, name in enumerate(dict.fromkeys(name for planes in named for name in planes))}
    moved = []
    for data, planes in zip(bits, named, strict=True):
        out = np.zeros(data.shape, dtype=np.int64)
        for name, bit in planes.items():
            out |= ((data.astype(np.int64) >> bit) & 1) << common[name]
        moved.append(out)
    return moved, common
