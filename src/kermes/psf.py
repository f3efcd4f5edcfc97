"""Point-spread functions: the model frame's, and what leads from it to the observed ones."""

from __future__ import annotations

import numpy as np
import scipy.fft
from numpy.typing import NDArray
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
