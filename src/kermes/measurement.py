"""Fluxes and errors of the sources of one blend."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

from kermes.coadd import Blend, Coadd, contiguous, psf_of_box
from kermes.geometry import Box
from kermes.initialization import reach_of_components
from kermes.kernels import detection as kernels_detection
from kermes.kernels import residuals as kernels_residuals
from kermes.kernels import spectra as kernels_spectra
from kermes.rendering import KernelSet, Packed, SourceModels, render_packed

DoubleArray = NDArray[np.float64]
FloatArray = NDArray[np.float32]

MAX_NEIGHBOURS = 40
"""Neighbours of a source that stay free when the error of its flux is worked out; the most degenerate ones."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fluxes:
    """Total fluxes of the sources of one blend."""

    packed: Packed
    """Components with their final spectra."""

    flux: DoubleArray
    """Total flux of each source in each band [unit], shape (S, B)."""

    flux_err: DoubleArray
    """Its standard deviation with the neighbours free [unit], shape (S, B); NaN without valid pixels."""

    correlation: DoubleArray
    """Correlation of the flux with that of the source with which it is largest, (S, B); 0: alone, NaN: unknown."""

    neighbor: NDArray[np.int64]
    """Number of that source, shape (S, B); -1: none."""


def measure_fluxes(packed: Packed, n_sources: int, blend: Blend, kernels: KernelSet) -> Fluxes:
    """Solve the fluxes of all components jointly and work out the errors of those of whole sources.

    Shapes are held; fluxes are weighted by the variance, masked pixels left out, and non-negative. The error of a
    source is that of a linear fit of its model together with those of its neighbours: the diagonal of the inverse
    of the normal matrix of the band, restricted to the source and its `MAX_NEIGHBOURS` most degenerate neighbours. The
    correlation with one of these comes from the same inverse.

    Parameters
    ----------
    packed : Packed
        Components inside the blend.
    n_sources : int
        Number of sources, with or without components.
    blend : Blend
    kernels : KernelSet
        Difference kernels.

    Returns
    -------
    fluxes : Fluxes
    """
    reach = reach_of_components(packed, blend, kernels)
    rendered = render_packed(packed, kernels, (blend.images.shape[1], blend.images.shape[2]), reach)
    sums = np.zeros(len(packed))
    filled = np.diff(packed.offsets) > 0
    if filled.any():
        sums[filled] = np.add.reduceat(packed.morphologies.astype(np.float64), packed.offsets[:-1][filled])
    spectra = packed.spectra.copy()
    # Two calls: one kernel of both would be compiled once more as a whole.
    normal = kernels_spectra.solve_spectra(
        rendered.pixels, rendered.boxes, rendered.offsets, blend.images, blend.weights, spectra, 100, 1e-2
    )
    variance, correlation, neighbor = kernels_spectra.flux_variance(
        *normal, packed.sources, n_sources, spectra, sums, MAX_NEIGHBOURS
    )
    variance[~np.isfinite(variance)] = np.nan
    flux = np.zeros((n_sources, len(blend.images)))
    np.add.at(flux, packed.sources, spectra * sums[:, None])
    return Fluxes(
        packed=Packed(
            boxes=packed.boxes,
            offsets=packed.offsets,
            morphologies=packed.morphologies,
            spectra=spectra,
            sources=packed.sources,
        ),
        flux=flux,
        flux_err=np.sqrt(variance),
        correlation=np.where(np.isnan(variance), np.nan, correlation),
        neighbor=neighbor,
    )


def point_fluxes(
    image: FloatArray, weights: FloatArray, psf: DoubleArray, peaks: NDArray[np.int64]
) -> tuple[DoubleArray, DoubleArray]:
    """Measure points at peaks in one band, each as if it were alone.

    Parameters
    ----------
    image : ndarray, shape (H, W)
        Flux per pixel [unit]; finite.
    weights : ndarray, shape (H, W)
        Inverse variance [1 / unit^2]; zero where a pixel is not used.
    psf : ndarray, shape (P, Q)
        Odd sides.
    peaks : ndarray, shape (S, 2)
        Array index (y, x); may lie outside.

    Returns
    -------
    flux, flux_err : ndarray, shape (S,)
        sum(w psf I) / sum(w psf^2) and its error [unit]; NaN without a valid pixel under the PSF.
    """
    flux, flux_err = np.full((2, len(peaks)), np.nan)
    frame, stamp = Box.of_shape(image.shape), Box.of_shape(psf.shape)
    for k, (y, x) in enumerate(peaks.tolist()):
        own = stamp.shift(y - stamp.height // 2, x - stamp.width // 2)
        window, part = own.within(frame), psf[frame.within(own)]
        weighted = weights[window] * part
        norm = float((weighted * part).sum())
        if norm > 0:
            flux[k], flux_err[k] = float((weighted * image[window]).sum()) / norm, norm**-0.5
    return flux, flux_err


def misfit_factors(
    residual: FloatArray, weights: FloatArray, models: SourceModels, centers: DoubleArray, sigmas: DoubleArray
) -> DoubleArray:
    """Find how much larger the variances of fluxes are because models do not hold all that galaxies are made of.

    Galaxies have arms and knots, and no PSF is known exactly. What a model does not hold is noise to its own flux and
    to those of its neighbours, with a standard deviation of eta times the model. Residuals tell how large eta is for
    each source: of a smooth galaxy it is zero, however bright that is.

    Parameters
    ----------
    residual : ndarray, shape (B, H, W)
        What all models together leave.
    weights : ndarray, shape (B, H, W)
        Inverse variance; zero where a pixel is not used.
    models : SourceModels
        Models m as observed, in pixels of the residual.
    centers : ndarray, shape (S, 2)
        Centres of the sources, in the same pixels.
    sigmas : ndarray, shape (B,)
        Width of the Gaussian with the effective area of the PSF, 4 pi sigma^2 = 1 / sum(P^2) [pixels]; 0 without one.

    Returns
    -------
    factors : ndarray, shape (S, B)
        At least 1; exactly 1 where no residual is larger than noise makes it.

    Notes
    -----
    Structure is seen through the PSF, so that it is alike within blocks of about its width. With a = sum(w r m) and
    q = sum(w m^2) over the pixels of a block, a^2 has the mean q from noise alone, and q + c eta^2 q^2 with structure:
    c is the mean of the autocorrelation of a Gaussian PSF over all pairs of the pixels of a block. So
    eta^2 = sum(a^2 - q) / (c sum(q^2)) over the blocks of all bands, where that is positive. Pixels then have the
    standard deviation e, the largest eta m of all sources: where these overlap all see the same residuals. That changes
    the variance of a flux by the factor 1 + sum(w (m e)^2) / sum(m^2) A_P A / (A_P + A), with the areas of the PSF and
    of m e, the latter (sum(m e))^2 / sum((m e)^2); of Gaussians this is exact. Cost O(B n) of the pixels of all models.
    """
    known = [sigma for sigma in sigmas.tolist() if sigma > 0]
    if not known:
        return np.ones((len(models.boxes), len(residual)))
    middle = np.floor(centers + 0.5).astype(np.int64)
    factors: DoubleArray = kernels_residuals.misfit_factors(
        residual, weights, models.pixels, models.boxes, models.offsets, middle, sigmas, median(known)
    )
    return factors


LARGEST_FACTOR = 5.0
"""Where noise seems to be more than this or less than its inverse, the pixels hold something else."""

LARGEST_OFFSET = 3.0
"""The same where the median is farther from zero than this [sigma of a point source]."""

WHITE = 0.1
"""Noise whose factor is no farther from 1 than this is nearly white."""

MOST_PLACES = 10_000
"""So many places at most tell of the noise of a band: it is then known to one per cent."""

FEW_PLACES = 100.0
"""So many places weigh as much as the expectation that noise is independent from pixel to pixel."""

ALIKE_PLACES = 200.0
"""So many places of one band weigh as much as what all bands together say."""


def noise_factors(coadd: Coadd, footprints: NDArray[np.int64], psfs: DoubleArray | None = None) -> DoubleArray:
    """Measure how much larger the errors of fluxes are than the variance of the pixels says.

    Coadds are resampled, so that the noise of neighbouring pixels is correlated; light of sources too faint to be found
    adds to it. Sums over a PSF then have more noise than independent pixels would give them, or their variance is not
    what it says.

    Parameters
    ----------
    coadd : Coadd
    footprints : ndarray, shape (H, W)
        Zero in pixels without a source.
    psfs : ndarray, shape (B, P, Q), optional
        PSF of each band, zero in a band without one. None: those in the middle of the image.

    Returns
    -------
    factors : ndarray, shape (B,)
        1 for white noise of the variance that the coadd has, and where nothing is known.

    Notes
    -----
    Half the distance between the 16th and the 84th percentile of the signal-to-noise of point sources,
    sum(w P I) / sqrt(sum(w P^2)) over the pixels within two sigma of the PSF along each axis, at some `MOST_PLACES`
    places at most, outside of all footprints and at least one width of the PSF apart, without those that are far above.
    A band does not count in which this is not between `LARGEST_FACTOR` and its inverse, or the median farther from zero
    than `LARGEST_OFFSET`. Where there are few places bands are taken to be alike, and noise to be white: with n
    places of a band, N in all bands, and squared widths s_b^2 with the mean s^2 over all places,
    factor^2 = (n s_b^2 + `ALIKE_PLACES` t) / (n + `ALIKE_PLACES`) and t = (N s^2 + `FEW_PLACES`) / (N + `FEW_PLACES`).
    """
    psfs = psf_of_box(coadd, Box.of_shape(coadd.shape)) if psfs is None else psfs
    power = np.square(psfs).sum(axis=(1, 2))
    if not power.any():
        return np.ones(coadd.n_bands)
    sigma = median((4 * np.pi * total) ** -0.5 for total in power.tolist() if total > 0)
    y, x = psfs.shape[1] // 2, psfs.shape[2] // 2
    half = min(max(2, round(2 * sigma)), y, x)
    cores = psfs[:, y - half : y + half + 1, x - half : x + half + 1].astype(np.float32)
    height, width = coadd.shape
    step = max(2, round(2.355 * sigma), math.ceil(math.sqrt(height * width / MOST_PLACES)))
    planes, _ = contiguous((coadd.images, coadd.variance, coadd.valid), Box.of_shape(coadd.shape))
    found = kernels_detection.points_in_noise(*planes, np.ascontiguousarray(footprints, dtype=np.int64), cores, step)
    if found.shape[1] == 0:
        return np.ones(coadd.n_bands)
    found.sort(axis=1)  # NaN last
    n_places = np.count_nonzero(np.isfinite(found), axis=1)
    low, middle = _quantiles(found, n_places, (0.1587, 0.5))
    # What is far above is a source outside of the footprints.
    with np.errstate(invalid="ignore"):
        n_places = np.count_nonzero(found < (middle + 4 * (middle - low))[:, None], axis=1)
    low, high = _quantiles(found, n_places, (0.1587, 0.8413))
    spread = 0.5 * (high - low)
    plausible = (spread > 1 / LARGEST_FACTOR) & (spread < LARGEST_FACTOR) & (np.abs(middle) < LARGEST_OFFSET)
    n_places[~plausible] = 0
    if not n_places.any():
        return np.ones(coadd.n_bands)
    square = np.where(n_places > 0, np.square(spread), 0.0)
    total = n_places.sum()
    together = ((n_places * square).sum() + FEW_PLACES) / (total + FEW_PLACES)
    return np.asarray(np.sqrt((n_places * square + ALIKE_PLACES * together) / (n_places + ALIKE_PLACES)))


def heeded_factors(factors: DoubleArray) -> DoubleArray:
    """Give what fits heed of factors of the noise: 1 up to `WHITE` from 1, all from twice that on, between them linear.

    What is measured differs a little from one part of an image to another. Of noise that is nearly white fits are to be
    the same, whatever part of the image they are made from.

    Parameters
    ----------
    factors : ndarray, shape (B,)
        See `noise_factors`.

    Returns
    -------
    heeded : ndarray, shape (B,)
    """
    excess = np.asarray(factors) - 1.0
    return np.asarray(1.0 + np.sign(excess) * np.clip(2 * (np.abs(excess) - WHITE), 0.0, np.abs(excess)))


def _quantiles(ascending: DoubleArray, n: NDArray[np.int64], shares: tuple[float, ...]) -> DoubleArray:
    """Quantiles (K, B) of the first n (B,) of ascending values (B, N), between the two nearest; of none any number."""
    last = np.maximum(n - 1, 0)
    place = np.multiply.outer(shares, last)
    below = place.astype(np.int64)
    rows = np.arange(len(ascending))
    first, second = ascending[rows, below], ascending[rows, np.minimum(below + 1, last)]
    return np.asarray(first + (place - below) * (second - first))
