"""Fluxes and errors of the sources of one blend."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kermes.coadd import Blend, Coadd, psf_of_box
from kermes.geometry import Box
from kermes.initialization import reach_of_components
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
    residual: FloatArray, weights: FloatArray, models: SourceModels, centers: DoubleArray, areas: DoubleArray
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
    areas : ndarray, shape (B,)
        Effective area 1 / sum(P^2) of the PSF [pixels]; 0 without one.

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
    known = areas[areas > 0]
    width = float(np.sqrt(np.median(known) / (4 * np.pi))) if len(known) else 0.0
    if width == 0.0:
        return np.ones((len(models.boxes), len(residual)))
    middle = np.floor(centers + 0.5).astype(np.int64)
    factors: DoubleArray = kernels_residuals.misfit_factors(
        residual, weights, models.pixels, models.boxes, models.offsets, middle, areas, width
    )
    return factors


LEAST_EMPTY = 1000
"""Fewest pixels without a source from which the noise is measured."""


def noise_factors(coadd: Coadd, footprints: NDArray[np.int64]) -> DoubleArray:
    """Measure how much larger the errors of fluxes are than the variance of the pixels says.

    Coadds are resampled, so that the noise of neighbouring pixels is correlated: sums over a PSF have more noise than
    independent pixels would give them, or their variance is not what it says. All errors of kermes are those of
    independent pixels; multiply them by this.

    Parameters
    ----------
    coadd : Coadd
    footprints : ndarray, shape (H, W)
        Zero in pixels without a source.

    Returns
    -------
    factors : ndarray, shape (B,)
        Robust width, from the 16th to the 50th percentile, of the signal-to-noise of point sources,
        sum(w psf I) / sqrt(sum(w psf^2)), at the valid pixels outside of all footprints: 1 for white noise of the
        variance that the coadd has. NaN in a band with fewer than `LEAST_EMPTY` such pixels.

    Notes
    -----
    The lower half alone, as faint sources that were not detected are in the upper one. With the PSF at the middle of
    the image. O(H W log HW) per band.
    """
    from scipy.signal import oaconvolve

    factors = np.full(coadd.n_bands, np.nan)
    psfs = psf_of_box(coadd, Box.of_shape(coadd.shape))
    for b, psf in enumerate(psfs):
        valid = coadd.valid[b]
        empty = valid & (footprints == 0)
        if empty.sum() < LEAST_EMPTY or not psf.any():
            continue
        weights = np.divide(1.0, coadd.variance[b], out=np.zeros(coadd.shape), where=valid)
        mirrored = psf[::-1, ::-1]
        signal = oaconvolve(weights * np.where(valid, coadd.images[b], 0), mirrored, mode="same")
        information = oaconvolve(weights, mirrored**2, mode="same")
        known = empty & (information > 0.5 * np.median(information[empty]))
        low, middle = np.percentile(signal[known] / np.sqrt(information[known]), [15.87, 50])
        factors[b] = middle - low
    return factors
