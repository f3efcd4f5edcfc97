"""Point-spread functions: the model frame's, what leads from it to the observed ones, and fields of cells."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.fft
from numpy.typing import ArrayLike, NDArray
from scipy.special import erf

from kermes.errors import InputError, ShapeError
from kermes.geometry import Box

DoubleArray = NDArray[np.float64]


def model_psf(sigma: float, side: int = 15) -> DoubleArray:
    """Make the PSF of the model frame: a circular Gaussian, integrated over pixels.

    Narrow, so that models are sharp; wide enough (0.7 pixels or more) to be sampled.

    Parameters
    ----------
    sigma : float
        Width of the Gaussian [pixels].
    side : int, optional
        Odd side of the stamp [pixels].

    Returns
    -------
    psf : ndarray, shape (side, side)
        Sums to one.
    """
    edges = np.arange(side + 1) - side / 2
    cumulative = erf(edges / (np.sqrt(2.0) * sigma))
    profile = np.diff(cumulative)
    profile /= profile.sum()
    return np.outer(profile, profile)


def _quadrants(side: int, length: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where the two halves of an odd side lie, and where they go when the middle goes to the first of `length`."""
    half = side // 2
    return (slice(half, side), slice(0, side - half)), (slice(0, half), slice(length - half, length))


def _transform(stamps: DoubleArray, shape: tuple[int, int]) -> NDArray[np.complex128]:
    """Transform stamps (..., P, Q) with their centre pixel at the origin."""
    p, q = stamps.shape[-2:]
    centred = np.zeros((*stamps.shape[:-2], *shape))
    for (y, to_y), (x, to_x) in itertools.product(_quadrants(p, shape[0]), _quadrants(q, shape[1])):
        centred[..., to_y, to_x] = stamps[..., y, x]
    return np.asarray(scipy.fft.rfft2(centred))


def difference_kernels(psfs: DoubleArray, target: DoubleArray, regularization: float = 0.0) -> DoubleArray:
    """Find the kernels that turn the model PSF into the observed ones.

    Parameters
    ----------
    psfs : ndarray, shape (B, P, Q)
        Observed PSFs, odd sides. A NaN makes the kernel of its band NaN.
    target : ndarray, shape (p, q)
        PSF of the model frame, odd sides, narrower than every band of `psfs`; see `amplify`.
    regularization : float, optional
        Floor on the power of `target` at a frequency, relative to its largest; 0: none. At no frequency are errors of
        the observed PSFs amplified by more than ``regularization ** -0.5``: 100 for 1e-4, where a model PSF of 0.8
        pixels would amplify them up to 340 times. In return, the fine structure that `target` shows with a power x
        below the floor is rendered at ``x / floor`` of its strength.

    Returns
    -------
    kernels : ndarray, shape (B, P, Q)
        Sum to one up to what lies outside the stamp.

    Notes
    -----
    The ratio of the transforms, in double precision (Moolekamp and Melchior 2018, section 3.3; padding as in scarlet
    lite), zero where the transform of `target` vanishes. With the regularisation, ``P conj(T) / max(|T|^2, floor)`` for
    the transforms P of the observed PSF and T of `target`.
    """
    _, p, q = psfs.shape
    shape = (
        scipy.fft.next_fast_len(p + target.shape[0] + 3, real=True),
        scipy.fft.next_fast_len(q + target.shape[1] + 3, real=True),
    )
    denominator = _transform(target, shape)
    numerator = _transform(psfs, shape)
    ratio = np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator != 0)
    if regularization > 0:
        power = np.abs(denominator) ** 2
        ratio *= power / np.maximum(power, regularization * power.max())
    centred = np.asarray(scipy.fft.irfft2(ratio, s=shape))
    kernels = np.empty(psfs.shape)
    for (y, from_y), (x, from_x) in itertools.product(_quadrants(p, shape[0]), _quadrants(q, shape[1])):
        kernels[:, y, x] = centred[:, from_y, from_x]
    return kernels


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KernelDiagnostics:
    """How well-behaved the difference kernel of each band is; arrays have the shape (B,)."""

    noise_gain: DoubleArray
    """Noise of a convolved image, for white noise of one: the root of the sum of squares. Below 1 the kernel blurs, as
    it must; 1: it does nothing; above 1 it sharpens, because the PSF is narrower than that of the model frame. Usual
    are 0.1 to 0.3; towards 1 the model PSF is nearly as wide as the observed one."""

    largest_gain: DoubleArray
    """Largest factor at any frequency. 1 is usual, at the largest scale. More means that the PSF is narrower than that
    of the model frame in one direction only, or that its stamp holds noise, which the division amplified."""

    negative_fraction: DoubleArray
    """Share of the negative pixels in the sum of sizes. 0 for smooth, wide PSFs; up to 0.2 is usual for measured ones,
    whose sampling the kernel must follow with rings; towards 0.5 the kernel is all rings."""

    edge: DoubleArray
    """Largest size of a pixel at the rim of the stamp, in units of the largest of all. Above about 0.01 rings or wings
    are cut off."""

    flux_lost: DoubleArray
    """One less the sum: flux that models lose in the convolution. Negative where they gain it."""


def kernel_diagnostics(kernels: DoubleArray) -> KernelDiagnostics:
    """Measure whether difference kernels can be trusted.

    Parameters
    ----------
    kernels : ndarray, shape (B, P, Q)
        Difference kernels, from `difference_kernels`; a band without a PSF is all zero.

    Returns
    -------
    diagnostics : KernelDiagnostics
        NaN for shares of a kernel that is all zero.

    Examples
    --------
    A PSF with a width of 1.5 pixels is fine with the usual model PSF of 0.8 pixels, one of 0.7 is not:

    >>> import numpy as np
    >>> psfs = np.stack([model_psf(1.5, 31), model_psf(0.7, 31)])
    >>> diagnostics = kernel_diagnostics(difference_kernels(psfs, model_psf(0.8)))
    >>> diagnostics.noise_gain.round(1)
    array([0.2, 1.9])
    >>> diagnostics.largest_gain.round(1)
    array([1. , 4.4])
    """
    sizes = np.abs(kernels)
    _, height, width = kernels.shape
    # Twice the stamp, so that the largest gain is not missed between two frequencies.
    transforms = scipy.fft.rfft2(kernels, s=(2 * height, 2 * width))
    rim = sizes.copy()
    rim[:, 1:-1, 1:-1] = 0
    total, top = sizes.sum(axis=(1, 2)), sizes.max(axis=(1, 2))
    total, top = np.where(total > 0, total, np.nan), np.where(top > 0, top, np.nan)
    return KernelDiagnostics(
        noise_gain=_noise_gain(kernels),
        largest_gain=np.asarray(np.abs(transforms).max(axis=(1, 2))),
        negative_fraction=np.maximum(-kernels, 0).sum(axis=(1, 2)) / total,
        edge=rim.max(axis=(1, 2)) / top,
        flux_lost=1.0 - kernels.sum(axis=(1, 2)),
    )


def _noise_gain(kernels: DoubleArray) -> DoubleArray:
    return np.asarray(np.sqrt((kernels**2).sum(axis=(1, 2))))


def amplify(kernels: DoubleArray) -> NDArray[np.bool_]:
    """Find the bands whose PSF is narrower than that of the model frame.

    Parameters
    ----------
    kernels : ndarray, shape (B, P, Q)
        Difference kernels.

    Returns
    -------
    amplify : ndarray, shape (B,)
        True where the noise gain is above one: its square is the mean over all frequencies of the power of the observed
        PSF, in units of that of the model PSF (Parseval), so that the kernel would sharpen instead of blurring. One per
        cent of the square is left for stamps that cut a PSF short.
    """
    return _noise_gain(kernels) > 1.005


MODEL_PSF_SIGMAS = (0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
"""Widths of model PSFs to choose from [pixels]: wider ones lose resolution, narrower ones are not sampled."""


def widest_sigma(psfs: DoubleArray) -> float:
    """Choose the width of the model PSF that observed PSFs permit.

    Parameters
    ----------
    psfs : ndarray, shape (B, P, Q)
        Observed PSFs, odd sides; a band without a PSF is all zero.

    Returns
    -------
    sigma : float
        The largest of `MODEL_PSF_SIGMAS` at which no kernel amplifies; the smallest if there is none [pixels].
    """
    permitted = (s for s in MODEL_PSF_SIGMAS if not amplify(difference_kernels(psfs, model_psf(s))).any())
    return next(permitted, MODEL_PSF_SIGMAS[-1])


def gaussian_fwhm(psf: ArrayLike) -> float:
    """Full width at half maximum of the Gaussian that has as many pixels of effective area as a PSF [pixels].

    The effective area is 1 / sum(psf^2), of a PSF (P, Q) that sums to one; 0 for a PSF of zeros.
    """
    power = float(np.square(np.asarray(psf, dtype=np.float64)).sum())
    return float(np.sqrt(2.0 * np.log(2.0) / (np.pi * power))) if power > 0 else 0.0


@lru_cache(maxsize=16)
def _rings(height: int, width: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pixels of a stamp by their distance from the centre, the larger of |dy| and |dx|, and where each starts."""
    y, x = np.indices((height, width))
    distance = np.maximum(np.abs(y - height // 2), np.abs(x - width // 2)).ravel()
    order = np.argsort(distance, kind="stable")
    return order, np.searchsorted(distance[order], np.arange(max(height, width) // 2 + 1))


def sums_beyond(stamps: DoubleArray) -> DoubleArray:
    """Sum what lies at the distances 0 to R or beyond, R half the longer side: shape (B, R + 1) of stamps (B, P, Q).

    The distance is the larger of those along y and x, from the middle of the odd sides.
    """
    order, starts = _rings(stamps.shape[1], stamps.shape[2])
    sums = np.add.reduceat(stamps.reshape(len(stamps), -1)[:, order], starts, axis=1)
    return np.asarray(np.cumsum(sums[:, ::-1], axis=1)[:, ::-1])


def cut_error(kernels: DoubleArray, psfs: DoubleArray) -> DoubleArray:
    """Find how large the error of a pixel can be when kernels are cut at each distance.

    Parameters
    ----------
    kernels : ndarray, shape (B, P, Q)
        Difference kernels, odd sides.
    psfs : ndarray, shape (B, P, Q)
        Observed PSFs.

    Returns
    -------
    error : ndarray, shape (B, R + 1)
        What lies at the distances 0 to R [pixels] or beyond, for an observed peak of one: of a point source, the
        largest value there times its flux; of a surface of that brightness, the sum; whichever is more.

    Notes
    -----
    Where sources overlap their errors add. O(B P Q).
    """
    order, starts = _rings(kernels.shape[1], kernels.shape[2])
    magnitude = np.abs(kernels)
    largest = np.maximum.reduceat(magnitude.reshape(len(kernels), -1)[:, order], starts, axis=1)
    largest = np.maximum.accumulate(largest[:, ::-1], axis=1)[:, ::-1]
    share = psfs.max(axis=(1, 2), initial=0.0)  # of the flux of a point source, in its brightest pixel
    point = np.divide(largest, share[:, None], out=np.zeros_like(largest), where=share[:, None] > 0)
    return np.asarray(np.maximum(point, sums_beyond(magnitude)))


def sufficient_reach(error: DoubleArray, peak_snr: ArrayLike, fraction: float = 0.1) -> NDArray[np.int64]:
    """Find how far kernels must reach so that cutting them is not seen in the noise.

    Parameters
    ----------
    error : ndarray, shape (B, R + 1)
        From `cut_error`.
    peak_snr : array_like, shape (K, B)
        Observed brightness of the brightest pixel of each source, in units of the noise of a pixel; NaN does not count,
        infinity asks for the full kernel.
    fraction : float, optional
        Largest error of a pixel that is allowed, in units of its noise.

    Returns
    -------
    reach : ndarray, shape (K,)
        Smallest half side r [pixels] of a kernel whose outside is negligible in every band.
    """
    snr = np.fmin(np.fmax(np.abs(np.asarray(peak_snr, dtype=np.float64)), 0.0), 1e30)
    largest = (snr[:, :, None] * error).max(axis=1, initial=0.0)
    return np.asarray(((largest >= fraction).sum(axis=1) - 1).clip(0), dtype=np.int64)


def truncated(kernels: DoubleArray, radius: int) -> DoubleArray:
    """Cut kernels (B, P, Q) to the central square of 2 `radius` + 1 pixels; smaller sides stay as they are."""
    half_height, half_width = kernels.shape[1] // 2, kernels.shape[2] // 2
    rows, columns = max(half_height - radius, 0), max(half_width - radius, 0)
    return np.ascontiguousarray(kernels[:, rows : kernels.shape[1] - rows, columns : kernels.shape[2] - columns])


def continued(psfs: NDArray[np.float64], factor: int = 3) -> NDArray[np.float64]:
    """Continue the wings of PSFs beyond their stamps by a power law.

    Parameters
    ----------
    psfs : ndarray, shape (B, P, Q)
        Odd sides.
    factor : int
        How many times wider than the longer side the result is.

    Returns
    -------
    continued : ndarray, shape (B, side, side)
        Each sums to one. The power law is that of the mean intensity in six rings of the outer 40 % of the stamp; a
        PSF that is not positive there, or falls slower than r^-2.2 or faster than r^-7, is only padded.
    """
    n_bands, height, width = psfs.shape
    reach = factor * (max(height, width) // 2)
    rings = _outer_rings(height, width, reach)
    flat = psfs.reshape(n_bands, -1)
    means = np.array([np.bincount(rings.ring, weights=psf, minlength=7)[1:] for psf in flat]) / rings.n_pixels
    # Without a logarithm the slope is zero, which is too flat.
    ln_means = np.log(means, out=np.zeros_like(means), where=(means > 0).all(axis=1, keepdims=True))
    spread = rings.ln_radius - rings.ln_radius.mean()
    slopes = ln_means @ spread / max(spread @ spread, 1e-30)
    wings, total = np.zeros((n_bands, len(rings.ln_distance))), np.ones(n_bands)
    for b in np.flatnonzero((slopes > -7) & (slopes < -2.2)).tolist():
        wings[b] = np.exp(ln_means[b].mean() + slopes[b] * (rings.ln_distance - rings.ln_radius.mean()))
        total[b] = flat[b].sum() + wings[b] @ rings.n_outside
    out = np.take(wings / total[:, None], rings.number, axis=1, mode="clip")
    rows, columns = (slice(reach - side // 2, reach + side // 2 + 1) for side in (height, width))
    out[:, rows, columns] = psfs / total[:, None, None]
    return out


class _OuterRings(NamedTuple):
    """Pixels of a stamp and of what it is continued to."""

    ring: NDArray[np.int64]
    """Which of the rings 1 to 6 of the outer part of the stamp each of its pixels is in, 0: none."""

    n_pixels: NDArray[np.int64]
    """Number of pixels of each ring, at least 1."""

    ln_radius: DoubleArray
    """Mean ln radius of each ring."""

    ln_distance: DoubleArray
    """ln of all distances from the middle of the continued stamp, once each; that of the middle is of half a pixel."""

    number: NDArray[np.int64]
    """Which of them each pixel of the continued stamp has."""

    n_outside: NDArray[np.int64]
    """Number of pixels outside of the stamp at each."""


@lru_cache(maxsize=8)
def _outer_rings(height: int, width: int, reach: int) -> _OuterRings:
    half = min(height, width) // 2
    y, x = np.arange(height) - height // 2, np.arange(width) - width // 2
    radius = np.hypot(y[:, None], x)
    edges = np.linspace(0.6 * half, half, 7)
    ring = np.searchsorted(edges, radius.ravel(), side="right") % 7
    own = [radius.ravel()[ring == k] for k in range(1, 7)]
    offset = np.arange(-reach, reach + 1)
    squares, number = np.unique(offset[:, None] ** 2 + offset**2, return_inverse=True)
    number = number.reshape(len(offset), -1)
    outside = (np.abs(offset)[:, None] > height // 2) | (np.abs(offset) > width // 2)
    return _OuterRings(
        ring=ring,
        n_pixels=np.array([max(len(inside), 1) for inside in own]),
        ln_radius=np.array([np.log(inside).mean() if len(inside) else 0.0 for inside in own]),
        ln_distance=0.5 * np.log(np.maximum(squares, 0.25)),
        number=number,
        n_outside=np.bincount(number[outside], minlength=len(squares)),
    )


# ---------------------------------------------------------------- PSFs that vary over the sky


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CellPsf:
    """PSFs of a grid of cells, some of which may be missing: what a coadd of cells has, a field for `Coadd.psfs`.

    Raises
    ------
    ShapeError
        If the stamps do not have the shape (n_y, n_x, B, P, Q) with the number of `bands`, or `present` does not fit.
    InputError
        If no cell has a PSF, or a number lies outside its range.

    Examples
    --------
    >>> import numpy as np
    >>> stamps = np.tile(model_psf(1.5), (2, 3, 1, 1, 1))
    >>> stamps[0, 0] = np.nan
    >>> psf = CellPsf(stamps=stamps, bands=["r"], cell_shape=(150, 150))
    >>> psf
    CellPsf(cells=(2, 3), bands=('r',), cell_shape=(150, 150), origin=(0, 0), missing=1)
    >>> psf(75.0, 75.0, "r").shape  # from the nearest cell that has one
    (15, 15)
    """

    stamps: DoubleArray
    """PSF of each cell and band, shape (n_y, n_x, B, P, Q); made odd-sided, each with a sum of one. Missing where no
    pixel is finite or the sum is not positive, and zero then; other pixels that are not finite count as zero."""

    bands: tuple[str, ...]
    """Names along the third axis."""

    cell_shape: tuple[int, int]
    """Height and width of a cell [pixels]."""

    origin: tuple[int, int] = (0, 0)
    """First pixel (y, x) of the first cell, in the coadd's coordinates; need not lie inside the coadd."""

    present: NDArray[np.bool_] | None = None
    """Which cells have a PSF, per band, shape (n_y, n_x, B) or (n_y, n_x); None: those whose stamp is not missing."""

    max_distance: float = 1.5
    """How far the centre of a cell that lends its PSF may lie from the centre of the cell that misses it, in cells.
    1.5: the eight neighbours; 0: none lends. Outside the grid, how far from the centre of the nearest cell the position
    may lie in y and in x, half a cell not counted."""

    interpolation: Literal["nearest", "bilinear"] = "nearest"
    """"nearest": the PSF of the cell. "bilinear": the stamps of the four cells whose centres surround the position,
    weighted by how near they are; it follows a smooth PSF, but is no true PSF where exposures end at cells."""

    lender: NDArray[np.int64] = field(init=False)
    """Number n_x * row + column of the cell whose PSF serves each cell and band, shape (n_y, n_x, B); -1: none."""

    def __post_init__(self) -> None:
        bands = (self.bands,) if isinstance(self.bands, str) else tuple(str(band) for band in self.bands)
        given = np.asarray(self.stamps, dtype=np.float64)
        if given.ndim != 5 or given.shape[2] != len(bands) or 0 in given.shape:
            raise ShapeError(
                f"stamps must have shape (n_y, n_x, bands, height, width) with {len(bands)} for bands {bands}, "
                f"got {given.shape}"
            )
        cell_shape, origin = _two_whole(self.cell_shape, "cell_shape"), _two_whole(self.origin, "origin")
        if min(cell_shape) < 1:
            raise InputError(f"cell_shape must have sides >= 1, got {cell_shape}")
        if not self.max_distance >= 0:
            raise InputError(f"max_distance must be >= 0, got {self.max_distance}")
        if self.interpolation not in ("nearest", "bilinear"):
            raise InputError(f"interpolation must be nearest or bilinear, got {self.interpolation!r}")
        # The centre of an even side n is at n // 2, so that one row or column of zeros at the end makes it odd.
        odd = [(0, 0)] * 3 + [(0, 1 - n % 2) for n in given.shape[-2:]]
        stamps = np.pad(np.where(np.isfinite(given), given, 0.0), odd)
        total = stamps.sum(axis=(-2, -1))
        present = (total > 0) & np.isfinite(total)
        if self.present is not None:
            chosen = np.asarray(self.present, dtype=bool)
            if chosen.shape not in (present.shape, present.shape[:2]):
                raise ShapeError(f"present must have shape {present.shape} or {present.shape[:2]}, got {chosen.shape}")
            present &= chosen.reshape(*chosen.shape[:2], -1)
        if not present.any():
            raise InputError("stamps must hold a PSF in some cell, got none that is finite and positive")
        stamps /= np.where(present, total, 1.0)[..., None, None]
        stamps[~present] = 0.0
        for name, value in {
            "stamps": stamps,
            "bands": bands,
            "cell_shape": cell_shape,
            "origin": origin,
            "present": present,
            "lender": np.stack([_lenders(plane, self.max_distance) for plane in np.moveaxis(present, 2, 0)], axis=2),
        }.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        missing = int((self.lender != np.arange(self.lender[..., 0].size).reshape(*self.lender.shape[:2], 1)).sum())
        return (
            f"CellPsf(cells={self.stamps.shape[:2]}, bands={self.bands}, cell_shape={self.cell_shape}, "
            f"origin={self.origin}, missing={missing})"
        )

    @classmethod
    def sample(
        cls,
        psf: Callable[[float, float, str], ArrayLike],
        *,
        box: Box,
        cell_shape: tuple[int, int],
        bands: Sequence[str],
        max_distance: float = 1.5,
        interpolation: Literal["nearest", "bilinear"] = "nearest",
    ) -> CellPsf:
        """Evaluate any PSF field once at the centre of each cell of a grid, so that it is cheap afterwards.

        Parameters
        ----------
        psf : callable
            psf(y, x, band) -> (P, Q); the stamps of all cells and bands must have one shape. A cell is missing where
            it raises an ArithmeticError, LookupError or ValueError.
        box : Box
            Pixels to cover; the first cell begins at its first pixel, the last may reach beyond it.
        cell_shape : tuple of int
            Height and width of a cell [pixels].
        bands : sequence of str
            Names of the bands.
        max_distance, interpolation : optional
            As for the class.

        Returns
        -------
        cells : CellPsf

        Raises
        ------
        ShapeError
            If the stamps differ in shape.
        InputError
            If no cell has a PSF, or an argument lies outside its range.
        """
        height, width = _two_whole(cell_shape, "cell_shape")
        if min(height, width) < 1 or box.is_empty:
            raise InputError(f"cell_shape and box must have sides >= 1, got {cell_shape} and {box}")
        n_y, n_x = -(-box.height // height), -(-box.width // width)
        found: dict[tuple[int, int, int], DoubleArray] = {}
        for row, column, b in np.ndindex(n_y, n_x, len(bands)):
            y, x = box.y0 + (row + 0.5) * height - 0.5, box.x0 + (column + 0.5) * width - 0.5
            try:
                found[row, column, b] = np.asarray(psf(y, x, bands[b]), dtype=np.float64)
            except (ArithmeticError, LookupError, ValueError):
                continue
        shapes = {stamp.shape for stamp in found.values()}
        if len(shapes) > 1:
            raise ShapeError(f"psf must give stamps of one shape, got {', '.join(map(str, sorted(shapes)))}")
        stamps = np.zeros((n_y, n_x, len(bands), *(shapes.pop() if shapes else (1, 1))))
        for place, stamp in found.items():
            stamps[place] = stamp
        return cls(
            stamps=stamps,
            bands=tuple(bands),
            cell_shape=(height, width),
            origin=box.origin,
            max_distance=max_distance,
            interpolation=interpolation,
        )

    def at(self, *, y: float, x: float, bands: Sequence[str] | None = None) -> DoubleArray:
        """Evaluate the PSF of several bands at a position.

        Parameters
        ----------
        y, x : float
            Position in the coadd's coordinates.
        bands : sequence of str, optional
            Names of bands, in any order; None: all. One that there is not has no PSF.

        Returns
        -------
        psfs : ndarray, shape (B, P, Q)
            Each band sums to one; zero in one that has no PSF near enough.
        """
        wanted = self.bands if bands is None else bands
        out = np.zeros((len(wanted), *self.stamps.shape[-2:]))
        corners = self._corners(y, x)
        flat = self.stamps.reshape(-1, *self.stamps.shape[2:])
        for plane, band in zip(out, wanted, strict=True):
            if band not in self.bands:
                continue
            b = self.bands.index(band)
            lenders = [(int(self.lender[row, column, b]), weight) for row, column, weight in corners]
            total = sum(weight for cell, weight in lenders if cell >= 0)
            for cell, weight in lenders:
                if cell >= 0:
                    plane += flat[cell, b] * (weight / total)
        return out

    def __call__(self, y: float, x: float, band: str) -> DoubleArray:
        """PSF stamp (P, Q) of a band at a position in the coadd's coordinates.

        Raises
        ------
        LookupError
            If there is no such band, or no cell near enough has a PSF in it.
        """
        if band not in self.bands:
            raise LookupError(f"there is no band {band!r}; bands are {', '.join(self.bands)}")
        (stamp,) = self.at(y=y, x=x, bands=(band,))
        if not stamp.any():
            raise LookupError(f"no cell within {self.max_distance:g} cells has a PSF")
        return np.asarray(stamp)

    def _corners(self, y: float, x: float) -> list[tuple[int, int, float]]:
        """Cells (row, column, weight) that say what the PSF at a position is; the weights are positive."""
        along = []
        for value, first, side, n in zip((y, x), self.origin, self.cell_shape, self.stamps.shape[:2], strict=True):
            # In cells, 0 at the centre of the first; pixel k reaches from k - 0.5 to k + 0.5.
            place = (value - first + 0.5) / side - 0.5
            if not -0.5 - self.max_distance <= place <= n - 0.5 + self.max_distance:
                return []
            place = min(max(place, 0.0), n - 1.0)
            if self.interpolation == "nearest":
                along.append([(int(min(np.floor(place + 0.5), n - 1)), 1.0)])
            else:
                low = min(int(place), n - 1)
                share = place - low
                along.append([(low, 1.0 - share)] + ([(low + 1, share)] if share > 0 else []))
        return [(row, column, wy * wx) for row, wy in along[0] for column, wx in along[1]]


def _two_whole(given: Any, name: str) -> tuple[int, int]:
    try:
        first, second = (float(value) for value in given)
    except (TypeError, ValueError):
        raise InputError(f"{name} must be two whole numbers (y, x), got {given!r}") from None
    if not (first.is_integer() and second.is_integer()):
        raise InputError(f"{name} must be two whole numbers (y, x), got {given!r}")
    return int(first), int(second)


def _lenders(present: NDArray[np.bool_], max_distance: float) -> NDArray[np.int64]:
    """Number of the nearest present cell of each cell of a (n_y, n_x) grid, itself if present; -1: none near enough.

    Of cells at the same distance the one with the smallest number.
    """
    out = np.full(present.shape, -1, dtype=np.int64)
    cells = np.argwhere(present)
    for place in np.ndindex(*present.shape):
        if len(cells):
            distance = np.hypot(*(cells - place).T)
            nearest = int(np.argmin(distance))
            if distance[nearest] <= max_distance:
                out[place] = cells[nearest] @ (present.shape[1], 1)
    return out
