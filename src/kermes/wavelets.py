"""Starlets: an image as a sum of planes, each with the structure of one scale."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kermes.errors import InputError, ShapeError

FloatArray = NDArray[np.floating[Any]]
Generation = Literal[1, 2]


def _shifted(image: FloatArray, shift: int, axis: int) -> FloatArray:
    """Shift along an axis; what comes in from outside is the mirror image."""
    n = image.shape[axis]
    place = (np.arange(n) + shift) % (2 * n)
    shifted: FloatArray = np.take(image, np.minimum(place, 2 * n - 1 - place), axis=axis)
    return shifted


def _smooth(image: FloatArray, step: int) -> FloatArray:
    """Convolve with the B3 spline (1, 4, 6, 4, 1) / 16 along both axes, its taps `step` pixels apart."""
    for axis in (-2, -1):
        # In pairs, so that a flipped image gives the flipped answer to the last bit.
        near = _shifted(image, -step, axis) + _shifted(image, step, axis)
        far = _shifted(image, -2 * step, axis) + _shifted(image, 2 * step, axis)
        image = 0.375 * image + 0.25 * near + 0.0625 * far
    return image


def _check_generation(generation: int) -> None:
    if generation not in (1, 2):
        raise InputError(f"generation must be 1 or 2, got {generation}")


def starlet_transform(image: ArrayLike, scales: int, generation: Generation = 2) -> FloatArray:
    """Split an image into planes of detail, from fine to coarse, and a smooth rest.

    Plane j holds structure about 2^j pixels wide. `inverse_starlet_transform` puts the planes together again.

    Parameters
    ----------
    image : array_like, shape (..., H, W)
        Any unit. A NaN spreads to its surroundings, in every plane.
    scales : int
        Number of planes of detail.
    generation : {1, 2}, optional
        1: the planes add up to the image. 2: putting them together only smooths and adds, so that positive planes
        give a positive image.

    Returns
    -------
    planes : ndarray, shape (scales + 1, ..., H, W)
        Unit of the image, float32 if the image is and float64 if not. The last plane is the smooth rest.

    Raises
    ------
    ShapeError
        If the image has fewer than two axes or no pixels.
    InputError
        If `scales` or `generation` is not one of those above.

    Notes
    -----
    Starck, Murtagh and Bertero (2011): c_0 is the image and c_(j+1) = h_j c_j, where h_j is the separable B3 spline
    with taps 2^j pixels apart. First generation: w_j = c_j - c_(j+1). Second: w_j = c_j - h_j c_(j+1).

    Outside, the image is continued by its mirror image, edge pixels twice (d c b a | a b c d). Other than zeros this
    makes no edge where a source is cut or the background is not zero, and other than a mirror on the pixel centres it
    keeps the flux: the smooth rest has the sum of the image. Any image size goes with any number of scales; planes
    much coarser than the image hold nothing. O(scales H W).
    """
    pixels = np.asarray(image)
    if pixels.ndim < 2 or pixels.size == 0:
        raise ShapeError(f"image must have shape (..., height, width) and pixels, got {pixels.shape}")
    if scales < 1:
        raise InputError(f"scales must be at least 1, got {scales}")
    _check_generation(generation)
    smooth = pixels.astype(np.result_type(pixels, np.float32))
    planes = np.empty((scales + 1, *smooth.shape), dtype=smooth.dtype)
    for j in range(scales):
        smoother = _smooth(smooth, 2**j)
        planes[j] = smooth - (smoother if generation == 1 else _smooth(smoother, 2**j))
        smooth = smoother
    planes[-1] = smooth
    return planes


def inverse_starlet_transform(planes: ArrayLike, generation: Generation = 2) -> FloatArray:
    """Put the planes of a starlet transform together.

    Parameters
    ----------
    planes : array_like, shape (scales + 1, ..., H, W)
        From `starlet_transform` of the same generation.
    generation : {1, 2}, optional
        That of the transform.

    Returns
    -------
    image : ndarray, shape (..., H, W)
        The image, to rounding.

    Raises
    ------
    ShapeError
        If there are fewer than three axes or no pixels.
    InputError
        If `generation` is neither 1 nor 2.
    """
    planes = np.asarray(planes)
    if planes.ndim < 3 or planes.size == 0:
        raise ShapeError(f"planes must have shape (scales + 1, ..., height, width) and pixels, got {planes.shape}")
    _check_generation(generation)
    image: FloatArray = planes[-1].astype(np.result_type(planes, np.float32))
    for j in reversed(range(len(planes) - 1)):
        image = (image if generation == 1 else _smooth(image, 2**j)) + planes[j]
    return image


@lru_cache(maxsize=32)
def _noise_of_planes(scales: int, generation: Generation) -> NDArray[np.float64]:
    reach = 3 * 2**scales
    point = np.zeros((2 * reach + 1, 2 * reach + 1))
    point[reach, reach] = 1.0
    power = np.sum(starlet_transform(point, scales, generation)[:-1] ** 2, axis=(1, 2), dtype=np.float64)
    noise: NDArray[np.float64] = np.sqrt(power)
    noise.setflags(write=False)
    return noise


def noise_of_planes(scales: int, generation: Generation = 2) -> NDArray[np.float64]:
    """Noise of each plane of detail, for white noise of one in the image.

    Parameters
    ----------
    scales : int
        Number of planes of detail.
    generation : {1, 2}, optional
        That of the transform.

    Returns
    -------
    noise : ndarray, shape (scales,)
        Standard deviation, away from the edges by the reach of the plane; read-only.
    """
    return _noise_of_planes(scales, generation)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Support:
    """Which coefficients of a starlet transform stand out of the noise."""

    significant: NDArray[np.bool_]
    """True where they do, the shape of the planes; True everywhere in the smooth rest."""

    noise_rms: NDArray[np.float64]
    """Noise of each plane of detail [unit of the planes], shape (scales, ...)."""

    converged: bool
    """Whether the measured noise has settled; True for a noise that was given."""


def multiresolution_support(
    planes: ArrayLike,
    noise_rms: ArrayLike | None = None,
    *,
    threshold: float = 3.0,
    tolerance: float = 0.01,
    max_iterations: int = 20,
) -> Support:
    """Find the coefficients that stand out of the noise, and measure the noise if it is not known.

    Parameters
    ----------
    planes : array_like, shape (scales + 1, ..., H, W)
        From `starlet_transform`.
    noise_rms : array_like, shape (scales, ...), optional
        Noise of each plane of detail [unit of the planes], such as the noise of the image times `noise_of_planes`.
        None: measured, which also holds where the noise of neighbouring pixels is correlated; but in a plane in which
        most coefficients belong to sources, as the coarse planes of a blend, it comes out too large.
    threshold : float, optional
        A coefficient is significant above this many sigma of its plane, of either sign.
    tolerance : float, optional
        The measured noise has settled when no plane changes it by more than this fraction.
    max_iterations : int, optional
        Give up after this many measurements.

    Returns
    -------
    support : Support
        In a plane with a coefficient that is not a number, the measured noise is NaN and nothing is significant.

    Notes
    -----
    The measurement (Starck and Murtagh 1998, where the tolerance is 0.1) starts at 1.48 times the median size of the
    coefficients; then those above the threshold are left out, and the rest is measured, until it settles. What the
    threshold cuts off a Gaussian is made up for, so that white noise gets its true noise, and erfc(threshold / sqrt(2))
    of its pixels are significant: 0.27 per cent at 3.
    """
    details = np.asarray(planes)[:-1]
    if noise_rms is None:
        sigma, converged = _measured_noise(details, threshold, tolerance, max_iterations)
    else:
        sigma, converged = np.broadcast_to(noise_rms, details.shape[:-2]).astype(np.float64), True
    significant = np.ones(np.shape(planes), dtype=bool)
    significant[:-1] = np.abs(details) > threshold * sigma[..., None, None]
    return Support(significant=significant, noise_rms=sigma, converged=converged)


def _measured_noise(
    details: FloatArray, threshold: float, tolerance: float, max_iterations: int
) -> tuple[NDArray[np.float64], bool]:
    """Noise of each plane without what is above the threshold, and whether it has settled."""
    inside = math.erf(threshold / math.sqrt(2.0))
    kept = 1.0 - math.sqrt(2.0 / math.pi) * threshold * math.exp(-0.5 * threshold**2) / inside
    sizes = np.abs(details).astype(np.float64)
    sigma = 1.4826 * np.median(sizes, axis=(-2, -1))
    for _ in range(max_iterations):
        faint = ~(sizes > threshold * sigma[..., None, None])
        power = np.sum(sizes**2, axis=(-2, -1), where=faint) / np.maximum(faint.sum(axis=(-2, -1)), 1)
        before, sigma = sigma, np.sqrt(power / kept)
        if (np.abs(sigma - before) <= tolerance * before)[~np.isnan(sigma)].all():
            return sigma, True
    return sigma, False


def denoise(
    image: ArrayLike, scales: int, noise_rms: ArrayLike | None = None, *, threshold: float = 3.0, iterations: int = 20
) -> FloatArray:
    """Find the positive image that has the significant starlet coefficients of another one, and little else.

    For looking and for starting values, not for measuring: faint light is lost.

    Parameters
    ----------
    image : array_like, shape (..., H, W)
        Any unit, finite.
    scales : int
        Number of planes of detail.
    noise_rms : array_like, shape (scales, ...), optional
        Noise of each plane of detail, as for `multiresolution_support`; None: measured.
    threshold : float, optional
        Coefficients above this many sigma are kept.
    iterations : int, optional
        Number of corrections; more come closer to the significant coefficients.

    Returns
    -------
    denoised : ndarray, shape (..., H, W)
        Not negative; unit of the image.

    Notes
    -----
    Starting from nothing, x <- max(0, x + R[M (w(image) - w(x))]): w is the transform of the second generation, R its
    inverse and M the multi-resolution support (Starck, Murtagh and Bertero 2011).
    """
    wanted = starlet_transform(image, scales)
    significant = multiresolution_support(wanted, noise_rms, threshold=threshold).significant
    result = np.zeros(wanted.shape[1:], dtype=wanted.dtype)
    for _ in range(iterations):
        missing = np.where(significant, wanted - starlet_transform(result, scales), 0)
        result = np.maximum(result + inverse_starlet_transform(missing), 0)
    return result
