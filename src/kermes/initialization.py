"""First model of every source of a blend."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kermes.coadd import Blend
from kermes.config import InitializationConfig
from kermes.kernels import initialization as kernels
from kermes.kernels import spectra as kernels_spectra
from kermes.psf import sufficient_reach, truncated
from kermes.rendering import Convolution, KernelSet, Packed, render_packed
from kermes.wavelets import multiresolution_support, noise_of_planes, starlet_transform

MIN_REACH = 3
"""Half the side of the smallest kernel [pixels]."""

PAD = 4
"""Pixels that a first box holds beyond the first morphology [pixels]."""

N_PLANES = 5
"""Planes of detail of the wavelet initialization; the first two make the bulge."""


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


def wavelet_images(blend: Blend) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Find what stands out of the noise at scales up to 16 pixels: all of it, its coarse and its fine part.

    Returns
    -------
    whole, coarse, fine : ndarray, shape (H, W)
        Sums of the positive starlet coefficients of the chi2 image above 3 sigma of their plane: all planes of detail,
        those from 4 pixels, and those below.
    """
    image, noise = chi2_image(blend)
    planes = starlet_transform(image, N_PLANES)
    support = multiresolution_support(planes, noise * noise_of_planes(N_PLANES))
    details = np.where(support.significant, np.maximum(planes, 0), 0)[:-1]
    coarse, fine = details[2:].sum(axis=0), details[:2].sum(axis=0)
    return coarse + fine, coarse, fine


def _wavelet_shapes(
    blend: Blend, peaks: NDArray[np.int64], bright: NDArray[np.bool_], limit: float
) -> tuple[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]], NDArray[np.int64]]:
    """First morphologies cut from wavelet images, coarse and fine ones for bright sources, and whose they are."""
    whole, coarse, fine = (kernels.first_morphologies(image, peaks, limit, PAD) for image in wavelet_images(blend))
    owners, boxes, parts = [], [], []
    for k in range(len(peaks)):
        filled = [layer for layer in (coarse, fine) if bright[k] and layer[1][k + 1] > layer[1][k]]
        for own_boxes, offsets, morphologies in filled or [whole]:
            owners.append(k)
            boxes.append(own_boxes[k])
            parts.append(morphologies[offsets[k] : offsets[k + 1]])
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
    morphologies = np.concatenate([np.empty(0, np.float32), *parts])
    return (np.array(boxes, dtype=np.int64).reshape(-1, 4), offsets, morphologies), np.array(owners, dtype=np.int64)


def initialize(
    blend: Blend,
    difference: KernelSet,
    convolution: Convolution,
    target: NDArray[np.float64],
    config: InitializationConfig,
) -> Packed:
    """Make a first model of every source: shapes from a detection image, fluxes solved jointly.

    A shape is the part of the detection image around the peak that is symmetric and falls monotonically, above
    the threshold. A source bright enough gets two components, the shape below and above a percentage of its peak; one
    whose peak is below the threshold gets the PSF of the model frame. Follows scarlet lite (chi2 initialization), with
    thresholds in units of the noise of the detection image, fluxes weighted by the variance and non-negative.

    With detection_image = "wavelet" it follows the wavelet initialization of the first scarlet lite instead: shapes are
    cut from `wavelet_images`, the two components of a bright source from the coarse and the fine one (only one where
    the other has nothing at the peak), and a source whose peak does not stand out in any plane is a point source.

    Parameters
    ----------
    blend : Blend
    difference : KernelSet
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
    peaks = np.ascontiguousarray(blend.peaks)
    bright = np.zeros(len(peaks), dtype=np.bool_)
    if config.max_components > 1:
        snr = kernels.signal_to_noise(blend.images, blend.weights, np.ascontiguousarray(blend.psfs), peaks)
        bright = snr >= 2 * config.min_snr
    if config.detection_image == "wavelet":
        shapes, owners = _wavelet_shapes(blend, peaks, bright, np.inf if config.max_components == 0 else 0.0)
        bright = np.zeros(len(owners), dtype=np.bool_)
    else:
        image, noise = chi2_image(blend) if config.detection_image == "chi2" else deconvolved_image(blend, convolution)
        limit = np.inf if config.max_components == 0 else config.threshold * noise
        shapes, owners = kernels.first_morphologies(image, peaks, limit, PAD), np.arange(len(peaks))
    boxes, offsets, morphologies, sources = kernels.first_components(
        *shapes, peaks[owners], target, config.disk_percentile / 100, bright, convolution.shape
    )
    packed = Packed(
        boxes=boxes,
        offsets=offsets,
        morphologies=morphologies,
        spectra=np.zeros((len(boxes), len(blend.images)), dtype=np.float32),
        sources=owners[sources],
    )
    return with_solved_spectra(packed, blend, difference)


def reach_of_components(packed: Packed, blend: Blend, kernels: KernelSet) -> NDArray[np.int64]:
    """Choose how far from its box each component is rendered, so that what is left out is lost in the noise."""
    y, x = blend.peaks[:, 0], blend.peaks[:, 1]
    snr = np.where(blend.weights.any(axis=(1, 2)), blend.images[:, y, x].T / blend.noise_rms, np.nan)
    # A masked core says nothing: it may be a saturated star's. A band without any weight does not matter.
    masked = (blend.weights[:, y, x] == 0).T & blend.weights.any(axis=(1, 2))
    snr[masked] = np.inf
    return np.maximum(sufficient_reach(kernels.cut_error(blend.psfs), snr), MIN_REACH)[packed.sources]


def fit_kernels(blend: Blend, kernels: KernelSet) -> NDArray[np.float64]:
    """Cut difference kernels as short as the brightest pixel of a blend allows."""
    snr = blend.images.max(axis=(1, 2), initial=0.0) / blend.noise_rms
    reach = int(sufficient_reach(kernels.cut_error(blend.psfs), snr[None])[0])
    return truncated(kernels.stamps, max(reach, MIN_REACH))


def with_solved_spectra(packed: Packed, blend: Blend, kernels: KernelSet) -> Packed:
    """Solve all fluxes jointly, weighted and non-negative, with the morphologies as they are."""
    reach = reach_of_components(packed, blend, kernels)
    rendered = render_packed(packed, kernels, (blend.images.shape[1], blend.images.shape[2]), reach)
    spectra = packed.spectra.copy()
    kernels_spectra.solve_spectra(
        rendered.pixels, rendered.boxes, rendered.offsets, blend.images, blend.weights, spectra, 40, 1e-2
    )
    return Packed(
        boxes=packed.boxes,
        offsets=packed.offsets,
        morphologies=packed.morphologies,
        spectra=spectra,
        sources=packed.sources,
    )
