"""Projections of one morphology: positive, monotonic, symmetric, compact, connected, normalised.

Each takes a morphology (h, w), centres as array index (y, x) inside it, and returns a new one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from kermes.config import Weighting
from kermes.errors import InputError, ShapeError
from kermes.kernels import constraints as kernels

FloatArray = NDArray[np.float32]

FLOOR = 1e-20
"""Smallest flux of a component and smallest value of the central pixel of its morphology, so that it can come back."""


def _morphology(morphology: ArrayLike) -> FloatArray:
    """Copy a morphology into pixels of its own."""
    own = np.array(morphology, dtype=np.float32, order="C")
    if own.ndim != 2 or own.size == 0:
        raise ShapeError(f"morphology must have shape (height, width) with at least one pixel, got {own.shape}")
    return own


def _inside(center: tuple[int, int], shape: tuple[int, ...]) -> tuple[int, int]:
    y, x = int(center[0]), int(center[1])
    if not (0 <= y < shape[0] and 0 <= x < shape[1]):
        raise InputError(f"center must be a pixel (y, x) of the morphology of shape {shape}, got {tuple(center)}")
    return y, x


def positive(values: ArrayLike, floor: float = 0.0) -> FloatArray:
    """Raise what is below a floor to it.

    Parameters
    ----------
    values : array_like
        Any shape.
    floor : float, optional
        Smallest value [that of `values`].

    Returns
    -------
    raised : ndarray
        What is not finite becomes `floor`, too.
    """
    own = np.asarray(values, dtype=np.float32)
    return np.where((own >= floor) & np.isfinite(own), own, np.float32(floor))


@lru_cache(maxsize=16)
def monotonic_weights(radius: int, weighting: Weighting = "angle", min_gradient: float = 0.0) -> FloatArray:
    """Make the table of weights by which a pixel is compared with its neighbours closer to the centre.

    Parameters
    ----------
    radius : int
        Largest offset along either axis [pixels].
    weighting : {"angle", "flat", "nearest"}, optional
        As in `monotonic`.
    min_gradient : float, optional
        As in `monotonic`.

    Returns
    -------
    weights : ndarray, shape (radius + 1, radius + 1, 4)
        For the offsets a >= b >= 0 along the two axes, weights of the neighbours (a-1, b-1), (a-1, b), (a-1, b+1) and
        (a, b-1), which sum to 1 - `min_gradient`; made once, read-only.
    """
    weights = kernels.monotonic_weights(radius)
    if weighting == "flat":
        closer = weights > 0
        weights = np.divide(closer, closer.sum(axis=2, keepdims=True), out=weights, where=closer)
    elif weighting == "nearest":
        nearest = weights.argmax(axis=2)[:, :, None] == np.arange(4)
        if radius > 0:
            nearest[1, 1] = [True, False, False, False]  # all three are equal there, up to rounding
        weights = np.where(nearest & (weights > 0), np.float32(1), np.float32(0))
    weights *= np.float32(1 - min_gradient)
    weights.flags.writeable = False
    return np.asarray(weights)


def table_radius(shape: tuple[int, ...]) -> int:
    """Size of the table for morphologies of a shape: a power of two, so that few tables serve all of them."""
    return int(1 << max(max(shape) - 1, 31).bit_length())


def brightest_near(morphology: ArrayLike, center: tuple[int, int]) -> tuple[int, int]:
    """Find the brightest of the 3 x 3 pixels around a centre.

    Parameters
    ----------
    morphology : array_like, shape (h, w)
    center : tuple of int
        Pixel (y, x) inside; the answer when several are equally bright.

    Returns
    -------
    brightest : tuple of int
        Pixel (y, x). A NaN wins at the centre, and nowhere else.
    """
    own = _morphology(morphology)
    y, x = kernels.brightest_near(own, *_inside(center, own.shape), False)
    return int(y), int(x)


def monotonic(
    morphology: ArrayLike, center: tuple[int, int], *, weighting: Weighting = "angle", min_gradient: float = 0.0
) -> FloatArray:
    """Make a morphology fall monotonically from its centre, by lowering pixels.

    In order of distance from the centre, every pixel is capped at a mean of those of its eight neighbours that lie
    closer to the centre, as they are by then.

    Parameters
    ----------
    morphology : array_like, shape (h, w)
    center : tuple of int
        Pixel (y, x) inside.
    weighting : {"angle", "flat", "nearest"}, optional
        Weights of the mean: by the cosine of the angle between pixel and neighbour as seen from the centre; all the
        same; or only the neighbour of the largest such cosine.
    min_gradient : float, optional
        Pixels are capped at 1 - `min_gradient` times that mean, 0 <= `min_gradient` < 1.

    Returns
    -------
    lowered : ndarray, shape (h, w)
        A neighbour outside the array counts as zero.

    Raises
    ------
    InputError
        If the centre lies outside, or a setting is out of range.

    Notes
    -----
    Weighted monotonicity of Melchior et al. (2018), section 2.3; O(h w). A NaN can reach the pixels outwards of it.

    Examples
    --------
    >>> from kermes.constraints import monotonic
    >>> print(monotonic([[5, 1, 4, 2]], (0, 0), weighting="nearest"))
    [[5. 1. 1. 1.]]
    """
    own = _morphology(morphology)
    y, x = _inside(center, own.shape)
    if weighting not in get_args(Weighting):
        raise InputError(f"weighting must be 'angle', 'flat' or 'nearest', got {weighting!r}")
    if not 0 <= min_gradient < 1:
        raise InputError(f"min_gradient must be >= 0 and below 1, got {min_gradient}")
    kernels.make_monotonic(own, y, x, monotonic_weights(table_radius(own.shape), weighting, float(min_gradient)))
    return own


def monotone_mask(
    image: ArrayLike, center: tuple[int, int], *, n_repairs: int = 3
) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Find the pixels that a path of falling values joins to a centre, and repair pixels that only just fail.

    A step leads to one of four neighbours whose value is positive and not higher. A pixel next to an accepted one that
    is never accepted itself is an orphan. Where slopes towards an orphan, continued by one pixel, predict light, it
    takes the mean of the predictions and is accepted; where they do not, it becomes zero.

    Parameters
    ----------
    image : array_like, shape (h, w)
        May have noise.
    center : tuple of int
        Pixel (y, x) inside.
    n_repairs : int, optional
        Passes over the orphans; 0: the image stays as it is.

    Returns
    -------
    repaired : ndarray, shape (h, w)
        The image with its orphans replaced; pixels out of reach are left as they are.
    reached : ndarray of bool, shape (h, w)
        True for the accepted pixels; the centre always is.

    Raises
    ------
    InputError
        If the centre lies outside, or `n_repairs` is negative.

    Notes
    -----
    NaN is never accepted. O(h w) for each pass.

    Examples
    --------
    >>> from kermes.constraints import monotone_mask
    >>> repaired, reached = monotone_mask([[9, 7, 5, 6, 1]], (0, 0))
    >>> print(repaired)
    [[9. 7. 5. 3. 1.]]
    """
    own = _morphology(image)
    y, x = _inside(center, own.shape)
    if n_repairs < 0:
        raise InputError(f"n_repairs must be >= 0, got {n_repairs}")
    reached = np.empty(own.shape, dtype=np.uint8)
    kernels.monotone_mask(own, y, x, int(n_repairs), reached)
    return own, reached.astype(bool)


def symmetric(morphology: ArrayLike, center: tuple[int, int]) -> FloatArray:
    """Replace each pixel by the smaller of itself and its mirror image about a centre.

    Parameters
    ----------
    morphology : array_like, shape (h, w)
    center : tuple of int
        Pixel (y, x) inside.

    Returns
    -------
    lowered : ndarray, shape (h, w)
        Zero where the mirror image lies outside. Of a NaN and its mirror image both stay as they are.

    Raises
    ------
    InputError
        If the centre lies outside.
    """
    own = _morphology(morphology)
    kernels.make_symmetric(own, *_inside(center, own.shape))
    return own


def soft_symmetric(morphology: ArrayLike, center: tuple[int, int], strength: float) -> FloatArray:
    """Pull a morphology x towards the mean of itself and its mirror image x': strength (x + x') / 2 + (1 - strength) x.

    Parameters
    ----------
    morphology : array_like, shape (h, w)
    center : tuple of int
        Pixel (y, x) inside.
    strength : float
        From 0, unchanged, to 1, symmetric where there is a mirror image.

    Returns
    -------
    pulled : ndarray, shape (h, w)
        A mirror image outside counts as zero; a NaN spreads to its mirror image.

    Raises
    ------
    InputError
        If the centre lies outside, or `strength` is not between 0 and 1.
    """
    own = _morphology(morphology)
    y, x = _inside(center, own.shape)
    if not 0 <= strength <= 1:
        raise InputError(f"strength must lie between 0 and 1, got {strength}")
    mirror = np.zeros_like(own)
    reach_y, reach_x = min(y, own.shape[0] - 1 - y), min(x, own.shape[1] - 1 - x)
    window = (slice(y - reach_y, y + reach_y + 1), slice(x - reach_x, x + reach_x + 1))
    mirror[window] = own[window][::-1, ::-1]
    return np.float32(0.5 * strength) * (own + mirror) + np.float32(1 - strength) * own


def above_background(morphology: ArrayLike, spectrum: ArrayLike, noise: ArrayLike, threshold: float) -> FloatArray:
    """Set to zero the pixels that are fainter than the background noise in every band, and those that are not positive.

    Parameters
    ----------
    morphology : array_like, shape (h, w)
    spectrum : array_like, shape (B,)
        Flux per pixel of morphology one [unit]. A band without positive flux shows nothing.
    noise : array_like, shape (B,)
        Noise of a pixel [unit].
    threshold : float
        A pixel stays when it is at least this many times as bright as the noise in some band.

    Returns
    -------
    kept : ndarray, shape (h, w)
        NaN becomes zero.

    Raises
    ------
    ShapeError
        If `spectrum` and `noise` differ in shape.
    """
    own = _morphology(morphology)
    fluxes, sigmas = np.asarray(spectrum, dtype=np.float64), np.asarray(noise, dtype=np.float64)
    if fluxes.shape != sigmas.shape or fluxes.ndim != 1:
        raise ShapeError(f"spectrum and noise must have shape (bands,), got {fluxes.shape} and {sigmas.shape}")
    limits = np.divide(threshold * sigmas, fluxes, out=np.full(fluxes.shape, np.inf), where=fluxes > 0)
    limit = np.float32(min(limits.min(initial=np.inf), np.finfo(np.float32).max))
    own[~((own >= limit) & (own > 0))] = 0
    return own


def centered(morphology: ArrayLike, center: tuple[int, int], floor: float = FLOOR) -> FloatArray:
    """Keep the central pixel positive.

    Parameters
    ----------
    morphology : array_like, shape (h, w)
    center : tuple of int
        Pixel (y, x) inside.
    floor : float, optional
        Smallest value of that pixel.

    Returns
    -------
    raised : ndarray, shape (h, w)
        The same but for that pixel; a NaN there becomes `floor`.

    Raises
    ------
    InputError
        If the centre lies outside.
    """
    own = _morphology(morphology)
    pixel = _inside(center, own.shape)
    if not own[pixel] >= floor:
        own[pixel] = floor
    return own


def connected(morphology: ArrayLike, centers: Sequence[tuple[int, int]]) -> FloatArray:
    """Set to zero what no path of positive pixels joins to one of the centres.

    Parameters
    ----------
    morphology : array_like, shape (h, w)
    centers : sequence of tuple of int
        Pixels (y, x) inside. One that is not positive keeps nothing.

    Returns
    -------
    kept : ndarray, shape (h, w)
        Steps lead to one of four neighbours. What is not positive becomes zero, NaN included.

    Raises
    ------
    InputError
        If a centre lies outside.

    Examples
    --------
    >>> from kermes.constraints import connected
    >>> print(connected([[3, 1, 0, 2]], [(0, 0)]))
    [[3. 1. 0. 0.]]
    """
    own = _morphology(morphology)
    labels, _ = ndimage.label(own > 0)
    kept = {int(labels[_inside(center, own.shape)]) for center in centers} - {0}
    own[~np.isin(labels, list(kept))] = 0
    return own


def normalised(morphology: ArrayLike, to: Literal["max", "sum"] = "max") -> FloatArray:
    """Divide a morphology by its largest value, or by its sum.

    Parameters
    ----------
    morphology : array_like, shape (h, w)
    to : {"max", "sum"}, optional
        What becomes one.

    Returns
    -------
    scaled : ndarray, shape (h, w)
        Unchanged when that is not positive; a NaN makes it so.

    Raises
    ------
    InputError
        If `to` is unknown.
    """
    own = _morphology(morphology)
    if to not in ("max", "sum"):
        raise InputError(f"to must be 'max' or 'sum', got {to!r}")
    total = own.max() if to == "max" else np.float32(own.sum(dtype=np.float64))
    return own / total if total > 0 else own
