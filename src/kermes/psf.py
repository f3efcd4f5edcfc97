"""Point-spread functions: the model frame's, and what leads from it to the observed ones."""

from __future__ import annotations

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


def difference_kernels(psfs: DoubleArray, target: DoubleArray) -> DoubleArray:
    """Find the kernels that turn the model PSF into the observed ones.

    Parameters
    ----------
    psfs : ndarray, shape (B, P, Q)
        Observed PSFs, odd sides.
    target : ndarray, shape (p, q)
        PSF of the model frame, odd sides, narrower than every band of `psfs`.

    Returns
    -------
    kernels : ndarray, shape (B, P, Q)
        Sum to one up to what lies outside the stamp.

    Notes
    -----
    The ratio of the transforms, in double precision, without regularisation (Moolekamp and Melchior 2018,
    section 3.3; padding as in scarlet lite), zero where the transform of `target` vanishes.
    """
    _, p, q = psfs.shape
    shape = (
        scipy.fft.next_fast_len(p + target.shape[0] + 3, real=True),
        scipy.fft.next_fast_len(q + target.shape[1] + 3, real=True),
    )
    denominator = _transform(target, shape)
    numerator = _transform(psfs, shape)
    ratio = np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator != 0)
    kernels = np.asarray(scipy.fft.irfft2(ratio, s=shape))
    return np.roll(kernels, (p // 2, q // 2), axis=(-2, -1))[:, :p, :q].copy()


def amplify(kernels: DoubleArray) -> NDArray[np.bool_]:
    """Find the bands whose PSF is narrower than that of the model frame.

    Parameters
    ----------
    kernels : ndarray, shape (B, P, Q)
        Difference kernels.

    Returns
    -------
    amplify : ndarray, shape (B,)
        True where the squares of the kernel sum to more than one: the mean over all frequencies of the power of the
        observed PSF, in units of that of the model PSF (Parseval), so that the kernel would sharpen instead of
        blurring. One per cent is left for stamps that cut a PSF short.
    """
    return np.asarray((kernels**2).sum(axis=(1, 2)) > 1.01)


def truncated_radius(kernels: ArrayLike, peak_flux: ArrayLike, noise_rms: ArrayLike, fraction: float = 0.1) -> int:
    """Find how far kernels must reach so that cutting them is not seen in the noise.

    Parameters
    ----------
    kernels : array_like, shape (B, P, Q)
        Difference kernels, odd sides.
    peak_flux : array_like, shape (B,) or number
        Total flux of the brightest source [any unit].
    noise_rms : array_like, shape (B,) or number
        Noise of a pixel [same unit].
    fraction : float, optional
        Largest error of a pixel that is allowed, in units of its noise.

    Returns
    -------
    radius : int
        Smallest half side r [pixels] such that, in every band, no pixel of the kernel outside of the central square of
        2 r + 1 pixels, times `peak_flux`, reaches `fraction` of the noise; at most half the longer side of the stamp.

    Notes
    -----
    A bound for a point source, pixel by pixel; an extended source of the same flux spreads the error further out and
    thinner, and where several sources overlap their errors add. Bands whose noise is not finite and positive, or whose
    flux is not a number, do not count. O(B P Q).
    """
    kernels = np.abs(np.asarray(kernels, dtype=np.float64))
    flux, noise = np.broadcast_arrays(np.abs(np.asarray(peak_flux, dtype=np.float64)), noise_rms)
    used = np.isfinite(noise) & (noise > 0) & np.isfinite(flux)
    snr = np.divide(flux, noise, out=np.zeros(flux.shape), where=used)
    error = (kernels * np.broadcast_to(snr, len(kernels))[:, None, None]).max(axis=0, initial=0.0)
    y, x = np.indices(error.shape)
    distance = np.maximum(np.abs(y - error.shape[0] // 2), np.abs(x - error.shape[1] // 2))
    return int(distance[error >= fraction].max(initial=0))


def sufficient_kernels(
    kernels: DoubleArray, psfs: DoubleArray, images: NDArray[np.float32], noise_rms: NDArray[np.float32]
) -> DoubleArray:
    """Cut difference kernels as short as the brightest source of an image allows.

    What is cut off a point source as bright as the brightest pixel of each band stays below a tenth of the noise.

    Parameters
    ----------
    kernels, psfs : ndarray, shape (B, P, Q)
    images : ndarray, shape (B, H, W)
        Flux per pixel [any unit].
    noise_rms : ndarray, shape (B,)
        Noise of a pixel [same unit].
    """
    peak = images.max(axis=(1, 2), initial=0.0)
    share = psfs.max(axis=(1, 2), initial=0.0)  # of its flux, in the brightest pixel of a point source
    flux = np.divide(peak, share, out=np.zeros(len(peak)), where=share > 0)
    return truncated(kernels, max(truncated_radius(kernels, flux, noise_rms), 3))


def truncated(kernels: DoubleArray, radius: int) -> DoubleArray:
    """Cut kernels (B, P, Q) to the central square of 2 `radius` + 1 pixels; smaller sides stay as they are."""
    half_height, half_width = kernels.shape[1] // 2, kernels.shape[2] // 2
    rows, columns = max(half_height - radius, 0), max(half_width - radius, 0)
    return np.ascontiguousarray(kernels[:, rows : kernels.shape[1] - rows, columns : kernels.shape[2] - columns])
