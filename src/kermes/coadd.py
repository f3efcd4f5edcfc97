"""What comes in: images of one field in several bands, with their noise, PSF, masks and sky position."""

from __future__ import annotations

import hashlib
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from statistics import median
from typing import Any

import numpy as np
from astropy import units
from astropy.coordinates import SkyCoord
from astropy.utils.masked import Masked
from numpy.typing import ArrayLike, NDArray

from kermes.errors import DataWarning, InputError, ShapeError
from kermes.geometry import Box
from kermes.kernels import blends as kernels
from kermes.psf import CellPsf

logger = logging.getLogger(__name__)

FloatArray = NDArray[np.float32]
PsfField = Callable[[float, float, str], ArrayLike]
"""PSF at a position: psf(y, x, band) -> (P, Q), y and x in the coadd's coordinates."""

BAD_PLANES = (
    "BAD",
    "NO_DATA",
    "SAT",
    "SATURATED",
    "SUSPECT",
    "EDGE",
    "DETECTION_EDGE",
    "UNMASKEDNAN",
)
"""Mask planes whose pixels are not used unless the caller chooses others (old and new LSST names): their value is not
the light of the sky. Not among them are those whose value is an estimate of it, from fewer exposures or from the pixels
around; see `PLANE_MEANINGS`."""

PLANE_MEANINGS: Mapping[str, tuple[str, ...]] = {
    "saturated": ("SAT", "SATURATED"),
    "suspect": ("SUSPECT",),
    "edge": ("EDGE", "DETECTION_EDGE"),
    "interpolated": ("INTRP", "INTERPOLATED"),
    "cosmic_ray": ("CR", "COSMIC_RAY"),
    "streak": ("STREAK",),
    "clipped": ("CLIPPED", "REJECTED"),
    "inexact_psf": ("INEXACT_PSF", "SENSOR_EDGE"),
}
"""What is worth knowing of an object's centre, and the mask planes that say it, under any of their names."""

SMALLEST_VARIANCE = float(np.finfo(np.float32).tiny)
LARGEST_VARIANCE = 1 / SMALLEST_VARIANCE
"""Between the two, a variance and its inverse both keep full precision in float32."""

LARGEST_SIGNAL = 1e8
"""A pixel farther from zero than this many sigma is no measurement but stands for nothing, such as a value of 1e30."""

_WAVELENGTH_NM = {
    "fuv": 153, "nuv": 227, "u": 365, "b": 440, "g": 475, "v": 550, "r": 622, "vis": 715, "i": 763, "z": 905,
    "y": 1000, "j": 1250, "h": 1650, "k": 2150, "ks": 2160, "w1": 3400, "w2": 4600,
}  # fmt: skip

_UNIT_SPELLINGS = {
    "nanomaggies": "nanomaggy",
    "maggies": "maggy",
    "njy": "nJy",
    "ujy": "uJy",
    "mujy": "uJy",
    "microjy": "uJy",
    "jy": "Jy",
    "janskys": "Jy",
    "counts": "ct",
    "adus": "adu",
    "adu": "adu",
    "electrons": "electron",
}


def wavelength_order(bands: Sequence[str]) -> NDArray[np.intp]:
    """Sort bands from blue to red.

    Parameters
    ----------
    bands : sequence of str
        Names such as "g", "G", "HSC-G", "VIS", "Ks"; what follows the last separator counts.

    Returns
    -------
    order : ndarray, shape (B,)
        Positions from blue to red. The order given if a name is not known.
    """
    names = [re.split(r"[-_. ]", str(band))[-1].lower() for band in bands]
    if not set(names) <= set(_WAVELENGTH_NM):
        return np.arange(len(names))
    return np.argsort([_WAVELENGTH_NM[name] for name in names], kind="stable")


def parse_unit(unit: Any) -> units.UnitBase:
    """Make an astropy unit, also from spellings that files use and astropy does not know (nanomaggies, ADU, counts).

    Raises
    ------
    InputError
        If it is not a unit.
    """
    if isinstance(unit, str):
        unit = re.sub("[A-Za-z]+", lambda word: _UNIT_SPELLINGS.get(word[0].lower(), word[0]), unit)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", units.UnitsWarning)  # style of the spelling, not its meaning
            return units.Unit(unit)
    except (ValueError, TypeError):
        raise InputError(f"unit must be a unit known to astropy, got {unit!r}") from None


def zero_point_of(unit: units.UnitBase) -> float | None:
    """AB magnitude of a flux of 1 `unit`: 31.4 for nJy, 22.5 for nanomaggies; None for counts and the like."""
    if unit.is_equivalent(units.mgy):
        return -2.5 * math.log10(unit.to(units.mgy))
    if unit.is_equivalent(units.Jy):
        return float((1 * unit).to_value(units.ABmag))
    return None


def odd_sided(psf: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pad a PSF stamp (..., P, Q) with zeros to odd sides around the pixel that holds its centre.

    The centre of an even side n is taken at n // 2, as in FFT order.
    """
    pad = [(0, 0)] * (psf.ndim - 2) + [(0, 1 - n % 2) for n in psf.shape[-2:]]
    return np.pad(psf, pad)


def normalized_psf(psf: ArrayLike, band: str) -> NDArray[np.float64]:
    """Check one PSF stamp (P, Q); return it with odd sides and a sum of one.

    Non-finite pixels count as zero. A stamp whose sum is one to rounding is returned with the same bits.

    Raises
    ------
    ShapeError
        If the stamp is not two-dimensional.
    InputError
        If it is not made of numbers, or nothing positive is left.
    """
    stamp = _native(psf, f"psfs of band {band!r}").astype(np.float64)
    if stamp.ndim != 2:
        raise ShapeError(f"psfs must be one stamp (height, width) per band; band {band!r} has shape {stamp.shape}")
    stamp = odd_sided(np.where(np.isfinite(stamp), stamp, 0.0))
    total = stamp.sum()
    if not 0 < total < np.inf:
        raise InputError(f"psfs must have a positive sum; band {band!r} sums to {total:g}")
    return stamp if abs(total - 1.0) < 1e-12 else stamp / total


def stack_psfs(stamps: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Stack odd-sided stamps of any size into (B, P, Q), centres on one pixel, zero outside."""
    height = max(stamp.shape[0] for stamp in stamps)
    width = max(stamp.shape[1] for stamp in stamps)
    stack = np.zeros((len(stamps), height, width))
    for out, stamp in zip(stack, stamps, strict=True):
        y0, x0 = (height - stamp.shape[0]) // 2, (width - stamp.shape[1]) // 2
        out[y0 : y0 + stamp.shape[0], x0 : x0 + stamp.shape[1]] = stamp
    return stack


def label_image(footprints: ArrayLike, shape: tuple[int, int]) -> NDArray[np.int64]:
    """Check footprint labels (H, W): non-negative integers, 0 where no pixel may be used; True counts as 1."""
    labels = _native(footprints, "footprints")
    if labels.shape != shape:
        raise ShapeError(f"footprints must have the shape of the image {shape}, got {labels.shape}")
    if labels.dtype.kind == "f" or (labels.dtype.kind == "i" and labels.min(initial=0) < 0):
        raise InputError("footprints must be labels: integers >= 0, 0 where no pixel may be used")
    return np.ascontiguousarray(labels, dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Coadd:
    """Images of one field in several bands on one pixel grid.

    Arrays of any number type, byte order, unit or mask are copied once, when it is made, and are read-only by
    agreement afterwards. Pixels that are not finite or 1e8 sigma from zero, have no positive finite variance, are
    hidden by a masked array or lie in a bad mask plane are not valid; they are never an error. The arrays of `images`,
    `variance`, `psfs` and `mask` may also be lists, one item per band.

    Raises
    ------
    ShapeError
        If the arrays do not fit together or with `bands`.
    InputError
        If variance or PSF are missing, a PSF has no positive sum, a band is named twice, a unit does not fit,
        peaks lie outside the image, or float32 cannot hold the variance of most pixels of a band.

    Examples
    --------
    >>> import numpy as np
    >>> coadd = Coadd(images=np.ones((2, 5, 6)), variance=[0.1, 0.2], psfs=np.ones((2, 3, 3)), bands=["g", "r"])
    >>> coadd
    Coadd('coadd', bands=('g', 'r'), height=5, width=6)
    """

    images: FloatArray
    """Background-subtracted flux per pixel [unit], shape (B, H, W); (H, W) is taken as one band."""

    variance: FloatArray = None  # type: ignore[assignment]
    """Variance of `images` [unit^2], shape (B, H, W) or what broadcasts to it: (B,), (H, W), a number. Required."""

    psfs: NDArray[np.float64] | Sequence[NDArray[np.float64]] | PsfField = None  # type: ignore[assignment]
    """PSF stamps (B, P, Q), made odd-sided with a sum of one, or a field psf(y, x, band) -> (P, Q), such as a
    `CellPsf`, which must know all bands. Required."""

    bands: tuple[str, ...]
    """Names along the first axis, in the order of the arrays."""

    mask: NDArray[np.integer[Any]] | None = None
    """Bits of `mask_planes`, shape (B, H, W) or (H, W); of booleans: True is a pixel not to use. Kept in the smallest
    integers that hold the bits that have a name."""

    mask_planes: Mapping[str, int] | None = None
    """Number of the bit of each named plane of `mask`. Empty: no plane has a name, and the mask is not used."""

    wcs: Any = None
    """astropy WCS of pixel index (x, y), counted from 0 at the first pixel of the arrays; None: no sky."""

    origin: tuple[int, int] = (0, 0)
    """Coordinates (y, x) of the first pixel; peaks and results are given in these coordinates."""

    unit: units.UnitBase | None = None
    """Unit of `images`, which are converted to it where they carry another; None: theirs, or not known."""

    zero_point: float | None = None
    """AB magnitude of a flux of 1 `unit`; None: as `unit` says (31.4 for nJy), or not known."""

    bad_planes: tuple[str, ...] = BAD_PLANES
    """Planes whose pixels are not used."""

    noise_factors: NDArray[np.float64] | None = None
    """How much more noise a sum over the PSF has than if pixels were independent, as those of resampled images are not:
    shape (B,), or one number. None: not known, and measured when the image is deblended, unless footprints
    are given."""

    peaks: NDArray[np.int64] | None = None
    """Peaks (N, 2) that came with the data, (y, x) in the coadd's coordinates; None: none came."""

    footprints: NDArray[np.int64] | None = None
    """Footprint labels (H, W) that came with the data, 0 where no pixel may be used; None: none came."""

    name: str = "coadd"
    """What messages call it; readers set it to the file's name."""

    valid: NDArray[np.bool_] = field(init=False)
    """True where the pixel may be used, shape (B, H, W)."""

    def __post_init__(self) -> None:
        bands = _band_names(self.bands)
        unit = _unit_of(self.unit, self.images, self.variance)
        images, variance, valid = _pixels(self.images, self.variance, bands, unit, self.name)
        bad_planes = (self.bad_planes,) if isinstance(self.bad_planes, str) else tuple(self.bad_planes)
        planes = _checked_planes(self.mask_planes)
        mask = None
        if self.mask is not None:
            mask = _mask_bits(self.mask, bands, images.shape)
            if mask.dtype == bool:
                valid &= ~mask
                mask, planes, bad_planes = mask.astype(np.int32), {"BAD": 0}, (*bad_planes, "BAD")
            elif planes is None:
                _warn(f"{self.name}: mask is not used, because mask_planes does not name its bits")
            else:
                # Cast, because the highest bit of the mask is its sign, and numpy would refuse the positive number.
                bad = np.array(_bad_bits(planes, bad_planes, self.name)).astype(mask.dtype)
                valid &= (mask & bad) == 0
                mask = _smallest(mask, planes)
        if not valid.any():
            _warn(f"{self.name}: no pixel of any band is valid")

        for name, value in {
            "bands": bands,
            "unit": unit,
            "zero_point": _checked_zero_point(self.zero_point, unit),
            "images": images,
            "variance": variance,
            "valid": valid,
            "mask": mask,
            "mask_planes": planes,
            "bad_planes": tuple(dict.fromkeys(bad_planes)),
            "psfs": _checked_psfs(self.psfs, bands, self.name),
            "noise_factors": _checked_factors(self.noise_factors, bands),
            "origin": _checked_origin(self.origin),
            "wcs": _checked_wcs(self.wcs),
        }.items():
            object.__setattr__(self, name, value)
        if self.footprints is not None:
            object.__setattr__(self, "footprints", label_image(self.footprints, self.shape))
        if self.peaks is not None:
            object.__setattr__(self, "peaks", normalize_peaks(self.peaks, self) + np.array(self.origin))

    def __repr__(self) -> str:
        return f"Coadd({self.name!r}, bands={self.bands}, height={self.shape[0]}, width={self.shape[1]})"

    def _repr_html_(self) -> str:
        """Show it in a notebook, with a small picture."""
        from kermes.plots import coadd_html

        return coadd_html(self)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of every band."""
        return self.images.shape[1], self.images.shape[2]

    @property
    def box(self) -> Box:
        """All pixels, in the coadd's coordinates."""
        return Box(*self.origin, *self.shape)

    @property
    def n_bands(self) -> int:
        """Number of bands."""
        return len(self.bands)

    def psf_at(self, *, y: float, x: float) -> NDArray[np.float64]:
        """Evaluate the PSF of every band at a position.

        Parameters
        ----------
        y, x : float
            Position in the coadd's coordinates. Ignored when the PSF does not vary.

        Returns
        -------
        psfs : ndarray, shape (B, P, Q)
            Odd sides, each band sums to one. Zero in a band in which a PSF field has no stamp there: it raises an
            ArithmeticError, LookupError or ValueError, or returns nothing that is positive.
        """
        if not callable(self.psfs):
            return np.asarray(self.psfs)
        if isinstance(self.psfs, CellPsf):
            return self.psfs.at(y=y, x=x, bands=self.bands)
        return stack_psfs([self._field_stamp(y, x, band) for band in self.bands])

    def _field_stamp(self, y: float, x: float, band: str) -> NDArray[np.float64]:
        assert callable(self.psfs)
        try:
            return normalized_psf(self.psfs(y, x, band), band)
        except (ArithmeticError, LookupError, ValueError) as error:
            logger.info("%s: no PSF in band %s at y = %.1f, x = %.1f: %s", self.name, band, y, x, error)
            return np.zeros((1, 1))

    def sky(self, *, y: ArrayLike, x: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Right ascension and declination [deg] of positions in the coadd's coordinates; NaN without a WCS."""
        y = np.atleast_1d(np.asarray(y, dtype=float))
        x = np.atleast_1d(np.asarray(x, dtype=float))
        if self.wcs is None:
            return np.full(y.shape, np.nan), np.full(y.shape, np.nan)
        sky = self.wcs.pixel_to_world(x - self.origin[1], y - self.origin[0]).icrs
        return np.asarray(sky.ra.deg), np.asarray(sky.dec.deg)

    def checksums(self) -> dict[str, str]:
        """Describe the pixels of `images`, `variance` and `valid` by a checksum each, SHA-256."""
        planes = {"images": self.images, "variance": self.variance, "valid": self.valid}
        return {name: hashlib.sha256(np.ascontiguousarray(plane).data).hexdigest() for name, plane in planes.items()}

    def cutout(self, box: Box) -> Coadd:
        """Cut a smaller coadd out, in the same coordinates.

        Parameters
        ----------
        box : Box
            Pixels to cut, in the coadd's coordinates; clipped to the image.

        Returns
        -------
        coadd : Coadd
            Views of the same pixels; its origin is the first pixel cut. Peaks outside the box are left out.

        Raises
        ------
        InputError
            If the box has no pixel of the image.
        """
        kept = box & self.box
        if kept.is_empty:
            raise InputError(f"box must share pixels with the image {self.box}, got {box}")
        rows, columns = kept.within(self.box)
        changes: dict[str, Any] = {
            name: getattr(self, name)[:, rows, columns] for name in ("images", "variance", "valid")
        }
        changes["origin"] = kept.origin
        if self.mask is not None:
            changes["mask"] = self.mask[:, rows, columns]
        if self.footprints is not None:
            changes["footprints"] = self.footprints[rows, columns]
        if self.peaks is not None:
            changes["peaks"] = self.peaks[[tuple(peak) in kept for peak in self.peaks.tolist()]]
        if self.wcs is not None:
            changes["wcs"] = self.wcs[rows, columns]
        # Everything was checked when self was made, so the checks of __post_init__ are not repeated.
        coadd = object.__new__(Coadd)
        for item in fields(self):
            object.__setattr__(coadd, item.name, changes.get(item.name, getattr(self, item.name)))
        return coadd


def planes_at(coadd: Coadd, y: ArrayLike, x: ArrayLike) -> dict[str, NDArray[np.bool_]]:
    """Say which mask planes are set near positions.

    Parameters
    ----------
    coadd : Coadd
        Without a mask, or without names of its planes, nothing is set.
    y, x : array_like, shape (N,)
        Positions as array index, rounded to the nearest pixel.

    Returns
    -------
    planes : dict of str to ndarray of bool, shape (N,)
        For each name in `PLANE_MEANINGS`: whether one of its planes is set, in any band, in the 3 x 3 pixels around the
        position. Pixels outside the image have no plane set, and a position that is not finite has none near.

    Examples
    --------
    >>> import numpy as np
    >>> mask = np.zeros((5, 6), dtype=int)
    >>> mask[1, 1] = 1 << 3
    >>> coadd = Coadd(images=np.ones((5, 6)), variance=1.0, psfs=np.ones((3, 3)), bands="g", mask=mask,
    ...               mask_planes={"CR": 3})
    >>> planes_at(coadd, y=[2, 4], x=[2, 1])["cosmic_ray"]
    array([ True, False])
    """
    rows, columns = np.broadcast_arrays(np.asarray(y, dtype=float), np.asarray(x, dtype=float))
    height, width = coadd.shape
    near = (rows > -1.5) & (rows < height + 0.5) & (columns > -1.5) & (columns < width + 0.5)
    found = np.zeros(rows.shape, dtype=np.int64)
    if coadd.mask is not None and coadd.mask_planes:
        row, column = (np.floor(place[near] + 0.5).astype(np.int64) for place in (rows, columns))
        bits = np.zeros(row.shape, dtype=np.int64)
        for i, j in np.ndindex(3, 3):
            r, c = row + i - 1, column + j - 1
            inside = (r >= 0) & (r < height) & (c >= 0) & (c < width)
            bits[inside] |= np.bitwise_or.reduce(coadd.mask[:, r[inside], c[inside]], axis=0)
        found[near] = bits
    planes = coadd.mask_planes or {}
    return {
        meaning: (found & sum({1 << planes[name] for name in names if name in planes})) != 0
        for meaning, names in PLANE_MEANINGS.items()
    }


def normalize_peaks(peaks: Any, coadd: Coadd) -> NDArray[np.int64]:
    """Turn peaks in any accepted form into array indices of a coadd.

    Parameters
    ----------
    peaks : array_like, shape (N, 2); Table, structured array or mapping; or SkyCoord
        Positions (y, x) in the coadd's coordinates; a table has the columns y and x, or ra and dec [deg unless they
        have a unit]. Positions between pixels go to the nearest one, halves up. May be empty.
    coadd : Coadd
        Its origin is taken off; its WCS turns sky positions into pixels.

    Returns
    -------
    peaks : ndarray, shape (N, 2)
        Array index (y, x), in the order given; duplicates are kept.

    Raises
    ------
    ShapeError
        If an array does not have shape (N, 2).
    InputError
        Naming the first peak that is not finite or lies outside the image; if a table has none of the columns; if
        sky positions come without a WCS.
    """
    positions = _peak_positions(peaks, coadd)
    box = coadd.box
    finite = np.isfinite(positions).all(axis=1)
    if not finite.all():
        worst = int(np.flatnonzero(~finite)[0])
        raise InputError(f"peaks must be finite; peak {worst} is at {_named(positions[worst])}")
    index: NDArray[np.float64] = np.floor(positions - np.array(box.origin) + 0.5)
    inside = ((index >= 0) & (index < box.shape)).all(axis=1)
    if not inside.all():
        worst = int(np.flatnonzero(~inside)[0])
        raise InputError(
            f"peaks must lie inside the image, {box.y0} <= y < {box.y1} and {box.x0} <= x < {box.x1}; "
            f"peak {worst} is at {_named(positions[worst])}"
        )
    return index.astype(np.int64)


def _named(position: NDArray[np.float64]) -> str:
    return f"y = {position[0]:.12g}, x = {position[1]:.12g}"


def _peak_positions(peaks: Any, coadd: Coadd) -> NDArray[np.float64]:
    """Positions (N, 2) in the coadd's coordinates; masked entries are NaN."""
    if isinstance(peaks, SkyCoord):
        return _sky_positions(peaks, coadd)
    names = getattr(getattr(peaks, "dtype", None), "names", None)
    if names is None and hasattr(peaks, "keys"):
        names = tuple(peaks.keys())
    if names is not None:
        if {"y", "x"} <= set(names):
            y, x = (np.atleast_1d(_native(peaks[name], f"peaks column {name}")) for name in "yx")
            return np.stack([y, x], axis=-1).astype(np.float64)
        if {"ra", "dec"} <= set(names):
            ra, dec = (units.Quantity(np.atleast_1d(peaks[name]), "deg", subok=False) for name in ("ra", "dec"))
            return _sky_positions(SkyCoord(ra=ra, dec=dec), coadd)
        raise InputError(f"peaks must have columns y and x, or ra and dec; got {', '.join(map(str, names))}")
    positions = _native(peaks, "peaks").astype(np.float64)
    if positions.size == 0:
        return np.zeros((0, 2))
    if positions.ndim != 2 or positions.shape[1] != 2:
        raise ShapeError(f"peaks must have shape (N, 2), one (y, x) per row; got {positions.shape}")
    return positions


def _sky_positions(sky: SkyCoord, coadd: Coadd) -> NDArray[np.float64]:
    if coadd.wcs is None:
        raise InputError(f"peaks must be pixels (y, x), because {coadd.name} has no WCS; got sky coordinates")
    x, y = coadd.wcs.world_to_pixel(sky)
    positions: NDArray[np.float64] = np.stack([np.atleast_1d(y), np.atleast_1d(x)], axis=-1) + coadd.origin
    return positions


# ---------------------------------------------------------------- checks at the door


def _warn(message: str) -> None:
    """Warn at the line that makes the Coadd: _warn, __post_init__ and the generated __init__ are skipped."""
    warnings.warn(message, DataWarning, stacklevel=4)


def _band_names(bands: Any) -> tuple[str, ...]:
    if isinstance(bands, str):
        bands = (bands,)
    names = tuple(str(band) for band in bands) if isinstance(bands, Iterable) else ()
    if not names or len(set(names)) != len(names) or not all(names):
        raise InputError(f"bands must be different names, at least one, got {names or bands!r}")
    return names


def _unit_of(unit: Any, images: Any, variance: Any) -> units.UnitBase | None:
    """Find the unit of the images: the one asked for, or the one they carry."""
    if unit is not None:
        return parse_unit(unit)
    carried = _carried_unit(images)
    if carried is None and _carried_unit(variance) is not None:
        raise InputError(f"unit must be given: variance is in {_carried_unit(variance)}, but images have no unit")
    return carried


def _carried_unit(given: Any) -> units.UnitBase | None:
    items = given if isinstance(given, list | tuple) else [given]
    return next((item.unit for item in items if isinstance(item, units.Quantity)), None)


def _native(array: Any, name: str) -> NDArray[Any]:
    """Strip the unit, bring to the machine's byte order; what a masked array hides becomes NaN."""
    if isinstance(array, units.Quantity):
        array = array.value
    hidden = None
    if isinstance(array, Masked | np.ma.MaskedArray):
        hidden = np.asarray(array.mask)
        array = array.unmasked if isinstance(array, Masked) else array.data
    try:
        array = np.asarray(array)
    except ValueError:
        raise ShapeError(f"{name} must have rows of one length") from None
    if array.dtype.kind not in "biuf":
        raise InputError(f"{name} must be numbers, got dtype {array.dtype}")
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    return np.where(hidden, np.nan, array) if hidden is not None and hidden.any() else array


def _per_band(given: Any, bands: tuple[str, ...], name: str) -> list[Any]:
    """Take an argument apart into one item per band; one without an axis of bands is the same in all of them."""
    if given is None:
        raise InputError(f"{name} must be given for bands {bands}, got None")
    if isinstance(given, list | tuple) and len(given) == len(bands):
        return list(given)
    try:
        array = given if hasattr(given, "ndim") else np.asarray(given)
    except ValueError:
        raise ShapeError(
            f"{name} must hold one item per band, {len(bands)} for bands {bands}, got {len(given)}"
        ) from None
    if array.ndim in (0, 2):
        return [array] * len(bands)
    if array.ndim > 3 or len(array) != len(bands):
        raise ShapeError(
            f"{name} must have shape (bands, height, width) with {len(bands)} for bands {bands}, got {array.shape}"
        )
    return list(array)


def _pixels(
    images: Any, variance: Any, bands: tuple[str, ...], unit: units.UnitBase | None, name: str
) -> tuple[FloatArray, FloatArray, NDArray[np.bool_]]:
    """Convert images and variance to float32, band by band, and find the valid pixels."""
    given = _per_band(images, bands, "images")
    if len(bands) > 1 and getattr(images, "ndim", 3) == 2:
        raise ShapeError(
            f"images must have shape (bands, height, width) with {len(bands)} for bands {bands}, got {images.shape}"
        )
    planes = [_in_unit(item, f"images of band {band!r}", unit) for item, band in zip(given, bands, strict=True)]
    for plane, band in zip(planes, bands, strict=True):
        if plane.ndim != 2 or 0 in plane.shape:
            raise ShapeError(f"images must have shape (height, width) in each band, got {plane.shape} in band {band!r}")
        if plane.shape != planes[0].shape:
            raise ShapeError(
                f"images must have one shape in all bands; band {band!r} has {plane.shape}, "
                f"band {bands[0]!r} has {planes[0].shape}"
            )
    shape = (len(bands), *planes[0].shape)
    values, noise, valid = np.empty(shape, np.float32), np.empty(shape, np.float32), np.empty(shape, bool)
    given = _per_band(variance, bands, "variance")
    variance_unit = None if unit is None else unit**2
    for b, (band, plane) in enumerate(zip(bands, planes, strict=True)):
        band_variance = _in_unit(given[b], f"variance of band {band!r}", variance_unit)
        try:
            band_variance = np.broadcast_to(band_variance, plane.shape)
        except ValueError:
            raise ShapeError(
                f"variance must have the shape of the image {plane.shape}, got {band_variance.shape} in band {band!r}"
            ) from None
        # Judged in the precision given: float32 can turn a variance into zero or infinity.
        usable = np.isfinite(plane) & np.isfinite(band_variance) & (band_variance > 0)
        usable &= np.abs(plane) <= LARGEST_SIGNAL * np.sqrt(np.where(usable, band_variance, 0))
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            values[b], noise[b] = plane, band_variance
        held = np.isfinite(values[b]) & (noise[b] >= SMALLEST_VARIANCE) & (noise[b] <= LARGEST_VARIANCE)
        lost = usable & ~held
        if 2 * np.count_nonzero(lost) > np.count_nonzero(usable):
            raise InputError(
                f"variance must lie between {SMALLEST_VARIANCE:.2g} and {LARGEST_VARIANCE:.2g}, which is what single "
                f"precision holds, got {np.median(band_variance[usable]):.2g} in band {band!r}: "
                "rescale images and variance, for example to nJy"
            )
        if lost.any():
            logger.info("%s: %d pixels of band %s not used, single precision cannot hold them", name, lost.sum(), band)
            noise[b][lost] = np.nan
        valid[b] = usable & held
    return values, noise, valid


def _in_unit(item: Any, name: str, unit: units.UnitBase | None) -> NDArray[Any]:
    if unit is not None and isinstance(item, units.Quantity):
        try:
            item = item.to(unit)
        except units.UnitConversionError:
            raise InputError(f"{name} must be in {unit}, got {item.unit}") from None
    return _native(item, name)


def _mask_bits(given: Any, bands: tuple[str, ...], shape: tuple[int, ...]) -> NDArray[Any]:
    """Check the mask: booleans, or integers of 32 or 64 bits, shape (B, H, W); a shared one is kept once."""
    items = [_native(item, "mask") for item in _per_band(given, bands, "mask")]
    for item, band in zip(items, bands, strict=True):
        if item.shape != shape[1:]:
            raise ShapeError(
                f"mask must have shape {shape} or {shape[1:]} as the images, got {item.shape} in band {band!r}"
            )
        if item.dtype.kind == "f":
            raise InputError(f"mask must be integers or booleans, got dtype {item.dtype}")
    mask = items[0] if getattr(given, "ndim", 3) == 2 else np.stack(items)
    if mask.dtype != bool:
        mask = mask.astype(np.int32 if np.can_cast(mask.dtype, np.int32) else np.int64, copy=items[0] is mask)
    return np.broadcast_to(mask, shape)


def _smallest(mask: NDArray[np.integer[Any]], planes: Mapping[str, int]) -> NDArray[np.integer[Any]]:
    """Keep the bits that have a name in the smallest integers that hold them: a mask is as large as the images."""
    smallest = np.min_scalar_type(2 ** (max(planes.values(), default=0) + 1) - 1)
    return mask.astype(smallest) if smallest.itemsize < mask.dtype.itemsize else mask


def _checked_planes(planes: Any) -> Mapping[str, int] | None:
    if planes is None:
        return None
    if not isinstance(planes, Mapping):
        raise InputError(f"mask_planes must map names to bit numbers, got {type(planes).__name__}")
    for name, bit in planes.items():
        if not isinstance(bit, int | np.integer) or not 0 <= bit <= 62:
            raise InputError(f"mask_planes must map names to bit numbers from 0 to 62, got {bit!r} for {name!r}")
    return {str(name): int(bit) for name, bit in planes.items()}


def _bad_bits(planes: Mapping[str, int], bad_planes: tuple[str, ...], name: str) -> int:
    unknown = [plane for plane in bad_planes if plane not in planes and plane not in BAD_PLANES]
    if unknown and planes:
        logger.info("%s: no mask plane is called %s; there are %s", name, ", ".join(unknown), ", ".join(planes))
    bits = 0
    for plane in bad_planes:
        if plane in planes:
            bits |= 1 << planes[plane]
    return bits


def _checked_psfs(psfs: Any, bands: tuple[str, ...], name: str) -> Any:
    if psfs is None:
        raise InputError("psfs must be given: one stamp per band, or a callable psf(y, x, band); got None")
    if isinstance(psfs, CellPsf) and not set(bands) <= set(psfs.bands):
        raise InputError(f"psfs must have the bands {bands}, got cells of bands {psfs.bands}")
    if callable(psfs):
        return psfs
    if not hasattr(psfs, "__len__") or isinstance(psfs, str | Mapping):
        raise InputError(f"psfs must be one stamp per band, or a callable psf(y, x, band); got {type(psfs).__name__}")
    if getattr(psfs, "ndim", None) == 2 and len(bands) == 1:
        psfs = psfs[None]
    if len(psfs) != len(bands):
        raise ShapeError(f"psfs must hold one stamp per band: {len(bands)} for bands {bands}, got {len(psfs)}")
    stamps = []
    for psf, band in zip(psfs, bands, strict=True):
        stamps.append(normalized_psf(psf, band))
        total = np.nansum(_native(psf, "psfs"), dtype=np.float64)
        if abs(total - 1) > 0.05:
            logger.info("%s: the PSF of band %s sums to %.4g; it is made to sum to 1", name, band, total)
    return stack_psfs(stamps)


def _checked_origin(origin: Any) -> tuple[int, int]:
    try:
        y, x = (float(value) for value in origin)
    except (TypeError, ValueError):
        raise InputError(f"origin must be two whole numbers (y, x), got {origin!r}") from None
    if not (y.is_integer() and x.is_integer()):
        raise InputError(f"origin must be two whole numbers (y, x), got {origin!r}")
    return int(y), int(x)


def _checked_wcs(wcs: Any) -> Any:
    if wcs is None:
        return None
    if getattr(wcs, "pixel_n_dim", None) != 2 or not getattr(wcs, "has_celestial", True):
        raise InputError(
            f"wcs must be an astropy WCS of two pixel axes on the sky, got {' '.join(repr(wcs).split()):.80}"
        )
    return wcs


def _checked_factors(factors: Any, bands: tuple[str, ...]) -> NDArray[np.float64] | None:
    """Check `noise_factors`, one positive number per band."""
    if factors is None:
        return None
    values = _native(factors, "noise_factors").astype(np.float64)
    if values.shape not in ((), (len(bands),)):
        raise ShapeError(
            f"noise_factors must be one number, or one for each of the {len(bands)} bands, got {values.shape}"
        )
    if not ((values > 0) & (values < np.inf)).all():
        raise InputError(f"noise_factors must be positive and finite, got {values.tolist()}")
    return np.array(np.broadcast_to(values, len(bands)))


def _checked_zero_point(zero_point: Any, unit: units.UnitBase | None) -> float | None:
    """Zero point as given, or as the unit says; the two must agree to 0.01 mag."""
    expected = None if unit is None else zero_point_of(unit)
    if zero_point is None:
        return expected
    try:
        value = float(zero_point.value if isinstance(zero_point, units.Quantity) else zero_point)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"zero_point must be an AB magnitude, got {zero_point!r}")
    if expected is not None and abs(value - expected) > 0.01:
        raise InputError(f"zero_point must be {expected:.4g} for images in {unit}, got {value:.6g}")
    return value


# ---------------------------------------------------------------- cut-outs for the fit


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Blend:
    """The pixels needed to fit the sources of one parent together."""

    images: FloatArray
    """Flux per pixel [unit], shape (B, H, W); zero where the weight is zero."""

    weights: FloatArray
    """Inverse variance [1 / unit^2], shape (B, H, W); zero where the pixel is not used."""

    noise_rms: FloatArray
    """Noise of each band, mean over the valid pixels [unit], shape (B,); NaN for a band without weight."""

    psfs: NDArray[np.float64]
    """PSF of each band, shape (B, P, Q), odd sides, each sums to one; zero in a band that cannot be used."""

    box: Box
    """Where the pixels lie, as array index of the coadd (its origin not added)."""

    peaks: NDArray[np.int64]
    """Peaks (K, 2) of the sources, array index (y, x) of the cut-out."""

    @property
    def typical_noise(self) -> float:
        """Median of the noise of the bands that have weight [unit]; NaN if none has."""
        known = [rms for rms in self.noise_rms.tolist() if not math.isnan(rms)]
        return float(np.float32(median(known))) if known else np.nan


def psf_of_box(coadd: Coadd, box: Box) -> NDArray[np.float64]:
    """Evaluate the PSF (B, P, Q) at the centre of a box, given as array index of the coadd."""
    return coadd.psf_at(
        y=box.y0 + 0.5 * (box.height - 1) + coadd.origin[0], x=box.x0 + 0.5 * (box.width - 1) + coadd.origin[1]
    )


def contiguous(planes: Sequence[NDArray[Any]], box: Box) -> tuple[list[NDArray[Any]], tuple[int, int]]:
    """Give kernels planes (B, H, W) that hold a box, and where it begins in them.

    The same planes, without a copy, unless one of them is not contiguous, as those of a cutout: then the box alone.
    """
    if all(plane.flags.c_contiguous for plane in planes):
        return list(planes), box.origin
    return [np.ascontiguousarray(plane[:, box.y, box.x]) for plane in planes], (0, 0)


def cut_blend(
    coadd: Coadd,
    box: Box,
    peaks: NDArray[np.int64],
    usable: NDArray[np.bool_] | None = None,
    psfs: NDArray[np.float64] | None = None,
) -> Blend:
    """Cut the pixels of one blend out of a coadd.

    Parameters
    ----------
    coadd : Coadd
    box : Box
        Array index of the pixels to cut; clipped to the image.
    peaks : ndarray, shape (K, 2)
        Peaks as array index of the coadd.
    usable : ndarray, shape (h, w), optional
        Pixels of `box` that may be used; the others get no weight. None: all.
    psfs : ndarray, shape (B, P, Q), optional
        PSF of each band, zero in one that gets no weight. None: that at the centre of the box.

    Returns
    -------
    blend : Blend
    """
    box = box & Box.of_shape(coadd.shape)
    if psfs is None:
        psfs = psf_of_box(coadd, box)
    shape = (coadd.n_bands, *box.shape)
    planes, corner = contiguous((coadd.images, coadd.variance, coadd.valid), box)
    images, weights = np.empty(shape, dtype=np.float32), np.empty(shape, dtype=np.float32)
    noise = np.empty(coadd.n_bands, dtype=np.float32)
    kernels.cut_pixels(
        *planes,
        *corner,
        np.ones(box.shape, dtype=bool) if usable is None else usable,
        psfs.any(axis=(1, 2)),
        images,
        weights,
        noise,
    )
    return Blend(
        images=images,
        weights=weights,
        noise_rms=noise,
        psfs=psfs,
        box=box,
        peaks=np.asarray(peaks, dtype=np.int64).reshape(-1, 2) - np.array(box.origin),
    )
