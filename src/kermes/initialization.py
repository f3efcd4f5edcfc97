"""First model of every source of a blend."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kermes.coadd import Blend
from kermes.config import InitializationConfig
from kermes.kernels import initialization as kernels
from kermes.kernels import spectra as kernels_spectra
from kermes.rendering import Convolution, Packed, render_packed

PAD = 4
"""Pixels that a first box holds beyond the first morphology [pixels]."""


def chi2_image(blend: Blend) -> tuple[NDArray[np.float64], float]:
    """Add up the bands with inverse-variance weights.

    Returns
    -------
    image : ndarray, shape (H, W)
        Sum of image / noise^2 over the bands that have noise.
    noise : float
        Its noise.
    """
    inverse = np.nan_to_num(1.0 / np.asarray(blend.noise_rms, dtype=np.float64) ** 2)
    return np.einsum("bhw,b->hw", blend.images, inverse), float(np.sqrt(inverse.sum()))


def deconvolved_image(
    blend: Blend, convolution: Convolution, strength: float = 0.1
) -> tuple[NDArray[np.float64], float]:
    """Estimate the sum of all sources in the model frame, sharp enough to cut shapes from.

    The regularised least-squares image that, convolved with the kernel of each band, comes closest to all bands, for
    sources of equal flux in all of them: a Wiener filter, linear, without iterations.

    Parameters
    ----------
    blend : Blend
    convolution : Convolution
        From the model frame to the pixels of the blend.
    strength : float, optional
        Weight of the regularisation, relative to the information at the largest scale. Smaller is sharper
        and noisier.

    Returns
    -------
    image : ndarray, shape (H, W)
        Mean flux per pixel of the model frame over the bands [unit of the blend].
    noise : float
        Its noise [same].
    """
    inverse = np.nan_to_num(1.0 / np.asarray(blend.noise_rms, dtype=np.float64) ** 2)
    if not inverse.any():
        return np.zeros(convolution.shape), 0.0
    image, gain = kernels.deconvolve(
        blend.images, inverse / inverse.sum(), convolution.transforms, convolution.width, strength
    )
    return image.astype(np.float64), float(np.sqrt(gain / inverse.sum()))


def initialize(
    blend: Blend,
    difference: NDArray[np.float64],
    convolution: Convolution,
    target: NDArray[np.float64],
    config: InitializationConfig,
) -> Packed:
    """Make a first model of every source: shapes from a detection image, fluxes solved jointly.

    A shape is the part of the detection image around the peak that is symmetric and falls monotonically, above
    the threshold. A source bright enough gets two components, the shape below and above a percentage of its peak; one
    whose peak is below the threshold gets the PSF of the model frame. Follows scarlet lite (chi2 initialization), with
    thresholds in units of the noise of the detection image, fluxes weighted by the variance and non-negative.

    Parameters
    ----------
    blend : Blend
    difference : ndarray, shape (B, P, Q)
        Difference kernels.
    convolution : Convolution
        The same, for the pixels of the blend.
    target : ndarray, shape (p, p)
        PSF of the model frame, odd side.
    config : InitializationConfig

    Returns
    -------
    packed : Packed
        At least one component per source. Spectra are zero in bands without valid pixels.
    """
    if config.detection_image == "chi2":
        image, noise = chi2_image(blend)
    else:
        image, noise = deconvolved_image(blend, convolution)
    peaks = np.ascontiguousarray(blend.peaks)
    bright = np.zeros(len(peaks), dtype=np.bool_)
    limit = np.inf if config.max_components == 0 else config.threshold * noise
    if config.max_components > 1:
        snr = kernels.signal_to_noise(blend.images, blend.weights, np.ascontiguousarray(blend.psfs), peaks)
        bright = snr >= 2 * config.min_snr
    first = kernels.first_morphologies(image, peaks, limit, PAD)
    boxes, offsets, morphologies, sources = kernels.first_components(
        *first, peaks, target, config.disk_percentile / 100, bright, convolution.shape
    )
    packed = Packed(
        boxes=boxes,
        offsets=offsets,
        morphologies=morphologies,
        spectra=np.zeros((len(boxes), len(blend.images)), dtype=np.float32),
        sources=sources,
    )
    return with_solved_spectra(packed, blend, difference)


def with_solved_spectra(packed: Packed, blend: Blend, difference: NDArray[np.float64]) -> Packed:
    """Solve all fluxes jointly, weighted and non-negative, with the morphologies as they are."""
    rendered = render_packed(packed, difference, (blend.images.shape[1], blend.images.shape[2]))
    spectra = packed.spectra.copy()
    kernels_spectra.solve_spectra(
        rendered.pixels, rendered.boxes, rendered.offsets, blend.images, blend.weights, spectra, 100, 1e-3
    )
    return Packed(
        boxes=packed.boxes,
        offsets=packed.offsets,
        morphologies=packed.morphologies,
        spectra=spectra,
        sources=packed.sources,
    )
