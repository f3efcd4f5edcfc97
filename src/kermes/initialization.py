"""First model of every source of a blend."""

from __future__ import annotations

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from kermes.coadd import Blend
from kermes.config import InitializationConfig
from kermes.kernels import initialization as kernels
from kermes.kernels import spectra as kernels_spectra
from kermes.rendering import Packed, padded_side, render_packed

FloatArray = NDArray[np.float32]

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
    blend: Blend, difference: NDArray[np.float64], strength: float = 0.1
) -> tuple[NDArray[np.float64], float]:
    """Estimate the sum of all sources in the model frame, sharp enough to cut shapes from.

    The regularised least-squares image that, convolved with the kernel of each band, comes closest to all bands, for
    sources of equal flux in all of them: a Wiener filter, linear, without iterations.

    Parameters
    ----------
    blend : Blend
    difference : ndarray, shape (B, P, Q)
        Difference kernels.
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
    _, height, width = blend.images.shape
    inverse = np.nan_to_num(1.0 / np.asarray(blend.noise_rms, dtype=np.float64) ** 2)
    if not inverse.any():
        return np.zeros((height, width)), 0.0
    _, p, q = difference.shape
    shape = (padded_side(height, p), padded_side(width, q))
    information = np.zeros((shape[0], shape[1] // 2 + 1), dtype=np.float32)
    numerator = np.zeros(information.shape, dtype=np.complex64)
    stamp = np.zeros(shape, dtype=np.float32)
    for image, kernel, weight in zip(blend.images, difference, inverse / inverse.sum(), strict=True):
        if weight == 0:
            continue
        stamp[:] = 0
        rows = (np.arange(p) - p // 2) % shape[0]
        columns = (np.arange(q) - q // 2) % shape[1]
        np.add.at(stamp, (rows[:, None], columns[None, :]), kernel)
        transform = scipy.fft.rfft2(stamp)
        information += np.float32(weight) * np.abs(transform) ** 2
        numerator += np.float32(weight) * np.conj(transform) * scipy.fft.rfft2(image, s=shape)
    filtered = 1.0 / (information + strength * information[0, 0])
    image = scipy.fft.irfft2(numerator * filtered, s=shape)[:height, :width]
    # Each mode of the half plane stands for two, but for its first and, if the width is even, last column.
    modes = np.full(information.shape[1], 2.0)
    modes[0] = 1.0
    if shape[1] % 2 == 0:
        modes[-1] = 1.0
    gain = float(np.sum(information * filtered**2 * modes, dtype=np.float64)) / (shape[0] * shape[1])
    return image.astype(np.float64), float(np.sqrt(gain / inverse.sum()))


def initialize(
    blend: Blend, difference: NDArray[np.float64], target: NDArray[np.float64], config: InitializationConfig
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
    target : ndarray, shape (p, p)
        PSF of the model frame, odd side.
    config : InitializationConfig

    Returns
    -------
    packed : Packed
        At least one component per source. Spectra are zero in bands without valid pixels.
    """
    n_bands, height, width = blend.images.shape
    if config.detection_image == "chi2":
        image, noise = chi2_image(blend)
    else:
        image, noise = deconvolved_image(blend, difference)
    peaks = np.ascontiguousarray(blend.peaks)
    snr = kernels.signal_to_noise(blend.images, blend.weights, np.ascontiguousarray(blend.psfs), peaks)
    limit = config.threshold * noise
    boxes, offsets, pixels = kernels.first_morphologies(image, peaks, limit, PAD)

    parts: list[FloatArray] = []
    part_boxes: list[tuple[int, int, int, int]] = []
    sources: list[int] = []

    def add(source: int, box: tuple[int, int, int, int], morphology: FloatArray) -> None:
        sources.append(source)
        part_boxes.append(box)
        parts.append((morphology / morphology.max()).ravel())

    for k, (y, x) in enumerate(peaks.tolist()):
        if offsets[k + 1] == offsets[k] or config.max_components == 0:
            y0, y1 = max(y - target.shape[0] // 2, 0), min(y + target.shape[0] // 2 + 1, height)
            x0, x1 = max(x - target.shape[1] // 2, 0), min(x + target.shape[1] // 2 + 1, width)
            top, left = y0 - y + target.shape[0] // 2, x0 - x + target.shape[1] // 2
            stamp = target[top : top + y1 - y0, left : left + x1 - x0]
            add(k, (y0, x0, y1 - y0, x1 - x0), stamp.astype(np.float32))
            continue
        box = (int(boxes[k, 0]), int(boxes[k, 1]), int(boxes[k, 2]), int(boxes[k, 3]))
        morphology = pixels[offsets[k] : offsets[k + 1]]
        if snr[k] < 2 * config.min_snr or config.max_components < 2:
            add(k, box, morphology)
        else:
            level = np.float32(config.disk_percentile / 100)
            add(k, box, np.minimum(morphology, level))
            add(k, box, np.maximum(morphology - level, 0))
    packed = Packed(
        boxes=np.array(part_boxes, dtype=np.int64).reshape(-1, 4),
        offsets=np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64),
        morphologies=np.concatenate([np.empty(0, np.float32), *parts]),
        spectra=np.zeros((len(parts), n_bands), dtype=np.float32),
        sources=np.array(sources, dtype=np.int64),
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
