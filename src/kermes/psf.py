"""Point-spread functions: the model frame's, and what leads from it to the observed ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import scipy.fft
from numpy.typing import ArrayLike, NDArray
from scipy.special import erf

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


def _transform(stamps: DoubleArray, shape: tuple[int, int]) -> NDArray[np.complex128]:
    """Transform stamps (..., P, Q) with their centre pixel at the origin."""
    p, q = stamps.shape[-2:]
    padded = np.zeros((*stamps.shape[:-2], *shape))
    padded[..., :p, :q] = stamps
    centred = np.roll(padded, (-(p // 2), -(q // 2)), axis=(-2, -1))
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
    kernels = np.asarray(scipy.fft.irfft2(ratio, s=shape))
    return np.roll(kernels, (p // 2, q // 2), axis=(-2, -1))[:, :p, :q].copy()


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


@lru_cache(maxsize=16)
def _rings(height: int, width: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pixels of a stamp by their distance from the centre, the larger of |dy| and |dx|, and where each starts."""
    y, x = np.indices((height, width))
    distance = np.maximum(np.abs(y - height // 2), np.abs(x - width // 2)).ravel()
    order = np.argsort(distance, kind="stable")
    return order, np.searchsorted(distance[order], np.arange(max(height, width) // 2 + 1))


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
    magnitude = np.abs(kernels).reshape(len(kernels), -1)[:, order]
    largest = np.maximum.reduceat(magnitude, starts, axis=1)
    sums = np.add.reduceat(magnitude, starts, axis=1)
    largest = np.maximum.accumulate(largest[:, ::-1], axis=1)[:, ::-1]
    sums = np.cumsum(sums[:, ::-1], axis=1)[:, ::-1]
    share = psfs.max(axis=(1, 2), initial=0.0)  # of the flux of a point source, in its brightest pixel
    point = np.divide(largest, share[:, None], out=np.zeros_like(largest), where=share[:, None] > 0)
    return np.asarray(np.maximum(point, sums))


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
    snr = np.nan_to_num(np.abs(np.asarray(peak_snr, dtype=np.float64)), posinf=1e30)
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
    ring, ln_radius, outside, ln_outside = _outer_rings(height, width, reach)
    rows, columns = (slice(reach - side // 2, reach + side // 2 + 1) for side in (height, width))
    out = np.zeros((n_bands, 2 * reach + 1, 2 * reach + 1))
    out[:, rows, columns] = psfs
    n_pixels = np.bincount(ring, minlength=7)[1:]
    for plane, psf in zip(out, psfs, strict=True):
        means = np.bincount(ring, weights=psf.ravel(), minlength=7)[1:] / np.maximum(n_pixels, 1)
        if (means <= 0).any():
            continue
        ln_means = np.log(means)
        spread = ln_radius - ln_radius.mean()
        slope = float(spread @ ln_means / (spread @ spread))
        if -7 < slope < -2.2:
            plane[outside] = np.exp(ln_means.mean() + slope * (ln_outside - ln_radius.mean()))
            plane /= plane.sum()
    return out


@lru_cache(maxsize=8)
def _outer_rings(height: int, width: int, reach: int) -> tuple[NDArray[Any], ...]:
    """Rings 1 to 6 of the outer part of a stamp (0: the rest), their ln radius; pixels beyond it, and theirs."""
    half = min(height, width) // 2
    y, x = np.arange(height) - height // 2, np.arange(width) - width // 2
    radius = np.hypot(y[:, None], x)
    edges = np.linspace(0.6 * half, half, 7)
    ring = np.searchsorted(edges, radius.ravel(), side="right") % 7
    own = [radius.ravel()[ring == k] for k in range(1, 7)]
    ln_radius = np.array([np.log(inside).mean() if len(inside) else 0.0 for inside in own])
    offset = np.arange(-reach, reach + 1)
    outside = (np.abs(offset)[:, None] > height // 2) | (np.abs(offset) > width // 2)
    return ring, ln_radius, outside, np.log(np.hypot(offset[:, None], offset)[outside])
