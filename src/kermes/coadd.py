"""What comes in: images of one field in several bands, with their noise, PSF, masks and sky position."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from astropy import units
from numpy.typing import ArrayLike, NDArray

from kermes.errors import DataWarning, InputError, ShapeError
from kermes.geometry import Box

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
    "SENSOR_EDGE",
    "UNMASKEDNAN",
)
"""Mask planes whose pixels are not used unless the caller chooses others (old and new LSST names)."""


def odd_sided(psf: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pad a PSF stamp (..., P, Q) with zeros to odd sides around the pixel that holds its centre.

    The centre of an even side n is taken at n // 2, as in FFT order.
    """
    pad = [(0, 0)] * (psf.ndim - 2) + [(0, 1 - n % 2) for n in psf.shape[-2:]]
    return np.pad(psf, pad)


def normalized_psf(psf: ArrayLike, band: str) -> NDArray[np.float64]:
    """Check one PSF stamp (P, Q); return it with odd sides and a sum of one.

    Non-finite pixels count as zero. Raises InputError when nothing positive is left.
    """
    stamp = np.asarray(psf, dtype=np.float64)
    if stamp.ndim != 2:
        raise ShapeError(f"psfs must be one stamp (height, width) per band; band {band!r} has shape {stamp.shape}")
    stamp = odd_sided(np.where(np.isfinite(stamp), stamp, 0.0))
    total = stamp.sum()
    if not total > 0:
        raise InputError(f"psfs must have a positive sum; band {band!r} sums to {total:g}")
    return stamp / total


def _native(array: ArrayLike, name: str) -> NDArray[Any]:
    """Strip units and mask, bring to the machine's byte order."""
    array = np.ma.getdata(getattr(array, "value", array))
    array = np.asarray(array)
    if array.dtype.kind not in "biuf":
        raise InputError(f"{name} must be numbers, got dtype {array.dtype}")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Coadd:
    """Images of one field in several bands on one pixel grid.

    Arrays are converted once, when it is made, and are read-only by agreement afterwards. Pixels that are not
    finite, have no positive finite variance or lie in a bad mask plane are not valid; they are never an error.

    Raises
    ------
    ShapeError
        If the arrays do not fit together or with `bands`.
    InputError
        If a PSF has no positive sum, a band is named twice, or a unit does not fit.
    """

    images: FloatArray
    """Background-subtracted flux per pixel [unit], shape (B, H, W); (H, W) is taken as one band."""

    variance: FloatArray
    """Variance of `images` [unit^2], shape (B, H, W) or what broadcasts to it: (B,), (H, W), a number."""

    psfs: NDArray[np.float64] | Sequence[NDArray[np.float64]] | PsfField
    """PSF stamps (B, P, Q), made odd-sided with a sum of one, or a field psf(y, x, band) -> (P, Q)."""

    bands: tuple[str, ...]
    """Names along the first axis, in the order of the arrays."""

    mask: NDArray[np.int64] | None = None
    """Bits of `mask_planes`, shape (B, H, W) or (H, W); of booleans: True is a pixel not to use."""

    mask_planes: Mapping[str, int] | None = None
    """Number of the bit of each named plane of `mask`."""

    wcs: Any = None
    """astropy WCS of pixel index (x, y), counted from 0 at the first pixel of the arrays; None: no sky."""

    origin: tuple[int, int] = (0, 0)
    """Coordinates (y, x) of the first pixel; peaks and results are given in these coordinates."""

    unit: units.UnitBase | None = None
    """Unit of `images`; None: not known."""

    zero_point: float | None = None
    """AB magnitude of a flux of 1 `unit`; None: not known."""

    bad_planes: tuple[str, ...] = BAD_PLANES
    """Planes whose pixels are not used."""

    peaks: NDArray[np.int64] | None = None
    """Peaks (N, 2) that came with the data, (y, x) in the coadd's coordinates; None: none came."""

    footprints: NDArray[np.int64] | None = None
    """Footprint labels (H, W) that came with the data, 0 where no pixel may be used; None: none came."""

    name: str = "coadd"
    """What messages call it; readers set it to the file's name."""

    valid: NDArray[np.bool_] = field(init=False)
    """True where the pixel may be used, shape (B, H, W)."""

    def __post_init__(self) -> None:
        bands = (self.bands,) if isinstance(self.bands, str) else tuple(str(band) for band in self.bands)
        if len(set(bands)) != len(bands) or not bands:
            raise InputError(f"bands must be different names, at least one, got {bands}")

        unit = units.Unit(self.unit) if self.unit is not None else getattr(self.images, "unit", None)
        images = self._convert("images", unit)
        variance = self._convert("variance", None if unit is None else unit**2)
        if images.ndim == 2 and len(bands) == 1:
            images = images[None]
        if images.ndim != 3 or len(images) != len(bands) or 0 in images.shape:
            raise ShapeError(
                f"images must have shape (bands, height, width) with {len(bands)} for bands {bands}, "
                f"got {images.shape}"
            )
        if variance.ndim == 1 and len(variance) == len(bands):
            variance = variance[:, None, None]
        try:
            variance = np.broadcast_to(variance, images.shape)
        except ValueError:
            raise ShapeError(
                f"variance must have the shape of images {images.shape}, got {variance.shape}"
            ) from None

        # Judged before the conversion to float32, which can overflow to infinity or underflow to zero.
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            images = np.ascontiguousarray(images, dtype=np.float32)
            variance = np.ascontiguousarray(variance, dtype=np.float32)
        valid = np.isfinite(images) & np.isfinite(variance) & (variance > 0)
        mask, planes = self._mask(images.shape, valid)
        if not valid.any():
            warnings.warn(f"{self.name}: no pixel of any band is valid", DataWarning, stacklevel=3)

        for name, value in {
            "bands": bands,
            "unit": unit,
            "images": images,
            "variance": variance,
            "valid": valid,
            "mask": mask,
            "mask_planes": planes,
            "psfs": self._psfs(bands),
            "origin": (int(self.origin[0]), int(self.origin[1])),
            "zero_point": None if self.zero_point is None else float(self.zero_point),
        }.items():
            object.__setattr__(self, name, value)

        if self.footprints is not None:
            object.__setattr__(self, "footprints", label_image(self.footprints, self.shape))
        if self.peaks is not None:
            peaks = np.asarray(self.peaks)
            object.__setattr__(self, "peaks", peaks.astype(np.int64).reshape(-1, 2))

    def _convert(self, name: str, unit: units.UnitBase | None) -> NDArray[Any]:
        array = getattr(self, name)
        if unit is not None and isinstance(array, units.Quantity):
            try:
                array = array.to(unit)
            except units.UnitConversionError:
                raise InputError(f"{name} must be in {unit}, got {array.unit}") from None
        masked = np.ma.getmaskarray(array) if isinstance(array, np.ma.MaskedArray) else None
        values = _native(array, name)
        if masked is not None and masked.any():
            values = np.where(masked, np.nan, values)
        return values

    def _mask(
        self, shape: tuple[int, ...], valid: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64] | None, Mapping[str, int] | None]:
        """Check the mask and take its bad planes out of `valid`."""
        if self.mask is None:
            return None, self.mask_planes
        given = _native(self.mask, "mask")
        try:
            mask = np.broadcast_to(given, shape)
        except ValueError:
            raise ShapeError(
                f"mask must have shape {shape} or {shape[1:]} as the images, got {given.shape}"
            ) from None
        if mask.dtype == bool:
            valid &= ~mask
            return mask.astype(np.int64), {"BAD": 0}
        if mask.dtype.kind == "f":
            raise InputError(f"mask must be integers or booleans, got dtype {mask.dtype}")
        if self.mask_planes is None:
            warnings.warn(
                f"{self.name}: mask is not used, because mask_planes does not name its bits",
                DataWarning,
                stacklevel=4,
            )
            return mask.astype(np.int64), None
        bits = 0
        for plane in self.bad_planes:
            if plane in self.mask_planes:
                bits |= 1 << int(self.mask_planes[plane])
        valid &= (mask.astype(np.int64) & bits) == 0
        return mask.astype(np.int64), dict(self.mask_planes)

    def _psfs(self, bands: tuple[str, ...]) -> Any:
        psfs = self.psfs
        if psfs is None:
            raise InputError("psfs must be given: one stamp per band, or a callable psf(y, x, band); got None")
        if callable(psfs):
            return psfs
        if isinstance(psfs, np.ndarray) and psfs.ndim == 2 and len(bands) == 1:
            psfs = psfs[None]
        if len(psfs) != len(bands):
            raise ShapeError(f"psfs must hold one stamp per band: {len(bands)} for bands {bands}, got {len(psfs)}")
        return stack_psfs([normalized_psf(_native(psf, "psfs"), band) for psf, band in zip(psfs, bands, strict=True)])

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
            Odd sides, each band sums to one.
        """
        if not callable(self.psfs):
            return np.asarray(self.psfs)
        return stack_psfs([normalized_psf(self.psfs(y, x, band), band) for band in self.bands])

    def sky(self, *, y: ArrayLike, x: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Right ascension and declination [deg] of positions in the coadd's coordinates; NaN without a WCS."""
        y = np.atleast_1d(np.asarray(y, dtype=float))
        x = np.atleast_1d(np.asarray(x, dtype=float))
        if self.wcs is None:
            return np.full(y.shape, np.nan), np.full(y.shape, np.nan)
        sky = self.wcs.pixel_to_world(x - self.origin[1], y - self.origin[0]).icrs
        return np.asarray(sky.ra.deg), np.asarray(sky.dec.deg)


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
    """Check footprint labels (H, W): non-negative integers, 0 where no pixel may be used."""
    labels = _native(footprints, "footprints")
    if labels.shape != shape:
        raise ShapeError(f"footprints must have the shape of the image {shape}, got {labels.shape}")
    if labels.dtype.kind == "f" or (labels.dtype.kind == "i" and labels.min(initial=0) < 0):
        raise InputError("footprints must be labels: integers >= 0, 0 where no pixel may be used")
    return np.ascontiguousarray(labels, dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Blend:
    """The pixels needed to fit the sources of one parent together."""

    images: FloatArray
    """Flux per pixel [unit], shape (B, H, W); zero where the weight is zero."""

    weights: FloatArray
    """Inverse variance [1 / unit^2], shape (B, H, W); zero where the pixel is not used."""

    noise_rms: FloatArray
    """Root mean square of the noise of each band [unit], shape (B,); NaN for a band without a valid pixel."""

    psfs: NDArray[np.float64]
    """PSF of each band, shape (B, P, Q), odd sides, each sums to one."""

    box: Box
    """Where the pixels lie, as array index of the coadd (its origin not added)."""

    peaks: NDArray[np.int64]
    """Peaks (K, 2) of the sources, array index (y, x) of the cut-out."""


def cut_blend(
    coadd: Coadd, box: Box, peaks: NDArray[np.int64], usable: NDArray[np.bool_] | None = None
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

    Returns
    -------
    blend : Blend
        The PSF is that at the centre of the box.
    """
    box = box & Box.of_shape(coadd.shape)
    window = (slice(None), box.y, box.x)
    valid = coadd.valid[window]
    noise = np.full(coadd.n_bands, np.nan, dtype=np.float32)
    for b, (band_valid, variance) in enumerate(zip(valid, coadd.variance[window], strict=True)):
        if band_valid.any():
            noise[b] = np.mean(np.sqrt(variance[band_valid]), dtype=np.float64)
    if usable is not None:
        valid = valid & usable
    weights = np.zeros(valid.shape, dtype=np.float32)
    np.divide(1.0, coadd.variance[window], out=weights, where=valid)
    return Blend(
        images=np.where(valid, coadd.images[window], np.float32(0)),
        weights=weights,
        noise_rms=noise,
        psfs=coadd.psf_at(
            y=box.y0 + 0.5 * (box.height - 1) + coadd.origin[0],
            x=box.x0 + 0.5 * (box.width - 1) + coadd.origin[1],
        ),
        box=box,
        peaks=np.asarray(peaks, dtype=np.int64).reshape(-1, 2) - np.array(box.origin),
    )
