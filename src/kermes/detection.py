"""Detection image, footprints and peaks, for coadds that come without them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import scipy.fft
from numpy.typing import NDArray
from scipy import ndimage
from scipy.special import comb, gammaincc, ndtri_exp

from kermes.coadd import Coadd, stack_psfs
from kermes.config import DetectionConfig
from kermes.geometry import Box
from kermes.kernels import detection as kernels
from kermes.psf import truncated

FloatArray = NDArray[np.float64]
LabelArray = NDArray[np.int64]

_EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)
_MIN_COVERAGE = 1e-3  # of sum(w psf^2) among valid pixels; with less, the core of the PSF lies on none of them
_WIDE_CONTRAST = 2 / 3  # of the peak threshold: noise on a bright halo rarely gets there, faint sources do


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Detection:
    """What was found in a coadd."""

    footprints: LabelArray
    """Label of the footprint of each pixel, shape (H, W), counted from 1 in raster order; 0: none."""

    peaks: LabelArray
    """Peaks (N, 2), array index (y, x), the most significant first; each lies in a footprint."""


def _blurred(image: FloatArray, kernel: FloatArray) -> FloatArray:
    """Convolve with a kernel that is not larger, zero outside, same shape."""
    shape = [n + k - 1 for n, k in zip(image.shape, kernel.shape, strict=True)]
    product = scipy.fft.rfft2(image, shape) * scipy.fft.rfft2(kernel, shape)
    middle = tuple(slice((k - 1) // 2, (k - 1) // 2 + n) for n, k in zip(image.shape, kernel.shape, strict=True))
    return np.asarray(scipy.fft.irfft2(product, shape)[middle])


def _contrast_kernel(psf: FloatArray) -> FloatArray:
    """PSF minus the PSF blurred by itself and by a pixel: sums to zero, so that it does not see what is smooth."""
    pixel = np.outer([0.25, 0.5, 0.25], [0.25, 0.5, 0.25])
    kernel = psf - _blurred(_blurred(psf, psf), pixel)
    return np.asarray(kernel - kernel.mean())


def _core(psfs: FloatArray) -> FloatArray:
    """Cut PSFs (B, P, Q) to the central square that loses less than a millionth of the power of any band."""
    half = max(psfs.shape[1:]) // 2
    power = psfs**2
    total = power.sum(axis=(1, 2))
    for radius in range(1, half):
        core = truncated(power, radius)
        if (core.sum(axis=(1, 2)) >= (1 - 1e-6) * total).all():
            return truncated(psfs, radius)
    return psfs


def _filtered(coadd: Coadd, with_contrast: bool) -> tuple[FloatArray, FloatArray, NDArray[np.uint8]]:
    """Filter each band with its PSF and with its contrast kernel, and add up the bands.

    Returns the sums over the bands of the squared signal-to-noise where it is positive, for the two filters, shape
    (H, W), and the number of bands in the sums: one with too few valid pixels around, or without a PSF, is left out.
    The second is zero without contrast. Works block by block, so that memory does not grow and transforms stay in
    the cache.
    """
    psfs = np.pad(_typical_psfs(coadd), ((0, 0), (1, 1), (1, 1)))  # so that a PSF of one pixel has surroundings
    core = _core(psfs)
    filters = core[:, None]
    if with_contrast:
        margin = [(0, 0), *(((n - m) // 2, (n - m) // 2) for n, m in zip(psfs.shape[1:], core.shape[1:], strict=True))]
        filters = np.stack([np.pad(core, margin), [_contrast_kernel(psf) for psf in psfs]], axis=1)
    units = [
        float(np.median(variance[valid])) if valid.any() and psf.any() else 0.0
        for variance, valid, psf in zip(coadd.variance, coadd.valid, psfs, strict=True)
    ]
    reach = max(filters.shape[2:]) - 1
    side = scipy.fft.next_fast_len(min(max(256, 4 * reach), max(coadd.shape) + reach), real=True)
    chi2, contrast, n_bands = kernels.filter_bands(
        np.ascontiguousarray(coadd.images),
        np.ascontiguousarray(coadd.variance),
        np.ascontiguousarray(coadd.valid),
        np.ascontiguousarray(filters),
        np.array(units),
        side,
        _MIN_COVERAGE,
    )
    return chi2, contrast, n_bands


def _mean_fwhm(coadd: Coadd) -> float:
    """Mean over the bands of the width of a Gaussian with the effective area of the PSF [pixels]; 0 without a PSF."""
    power = (_typical_psfs(coadd) ** 2).sum(axis=(1, 2))
    area = 1.0 / power[power > 0]
    return float(np.sqrt(area * (2.0 * np.log(2.0) / np.pi)).sum()) / max(len(area), 1)


def _typical_psfs(coadd: Coadd) -> FloatArray:
    """PSFs (B, P, Q) at the middle of the image, which detection uses everywhere.

    A band in which a PSF field has none there has that of another place; zero when none is found.
    """
    (y0, x0), (height, width) = coadd.origin, coadd.shape
    places = [(0.5, 0.5), *itertools.product((0.25, 0.5, 0.75, 0.0, 1.0), repeat=2)]
    found: dict[int, FloatArray] = {}
    for y, x in places:
        psfs = coadd.psf_at(y=y0 + y * (height - 1), x=x0 + x * (width - 1))
        found = {b: psf for b, psf in enumerate(psfs) if psf.any()} | found
        if len(found) == coadd.n_bands:
            break
    return stack_psfs([found.get(b, np.zeros((1, 1))) for b in range(coadd.n_bands)])


@lru_cache(maxsize=32)
def _equivalent_sigma(n_bands: int) -> tuple[FloatArray, FloatArray]:
    """Table of sqrt(chi2), and of the number of sigma of a single Gaussian with the same false-alarm rate."""
    root = np.linspace(0.0, 30.0, 3001)
    # Each band is positive half of the time: chi2 has k degrees of freedom with binomial probability.
    alarm = sum(comb(n_bands, k) * gammaincc(0.5 * k, 0.5 * root**2) for k in range(1, n_bands + 1)) / 2.0**n_bands
    return root, -ndtri_exp(np.log(alarm))


def _as_sigma(chi2: FloatArray, n_bands: NDArray[np.uint8]) -> FloatArray:
    """Turn sums over bands into the number of sigma of a single Gaussian; 0 where no band is in the sum."""
    root = np.sqrt(chi2)
    result = np.zeros(chi2.shape)
    for n in np.unique(n_bands[n_bands > 0]):
        known, sigma = _equivalent_sigma(int(n))
        here = root[n_bands == n]
        # Beyond the table the difference between the two falls as 1 / sqrt(chi2).
        far = here - (known[-1] - sigma[-1]) * known[-1] / np.maximum(here, 1.0)
        place = np.minimum(here / known[1], len(known) - 1.001)  # in the table, whose steps are equal
        index = place.astype(np.int64)
        near = sigma[index] + (place - index) * np.diff(sigma)[index]
        result[n_bands == n] = np.where(here > known[-1], far, near)
    return result


def detection_images(coadd: Coadd) -> tuple[FloatArray, FloatArray]:
    """Combine all bands to an image of significance, and to one of contrast against the surroundings.

    Each band is filtered with its own PSF, which gives the signal-to-noise of a point source at each pixel,
    ``sum(w psf I) / sqrt(sum(w psf^2))`` with w the inverse variance, zero where a pixel is not valid. The bands are
    combined to the sum of its square where it is positive, which finds sources of any colour, also those of a single
    band. The result is given as the number of sigma of a Gaussian with the same false-alarm rate, whatever the number
    of bands: 5 means 5 sigma, a chance of 3e-7 per independent pixel.

    The contrast is the same for the PSF minus the PSF blurred by itself, which does not see what is wide and smooth:
    it tells neighbours apart, and the noise on a bright halo from a source.

    Parameters
    ----------
    coadd : Coadd
        Its PSF at the middle of the image is used everywhere; a band without a PSF is left out.

    Returns
    -------
    significance, contrast : ndarray, shape (H, W)
        Dimensionless, finite; 0 where no band has valid pixels under the core of the PSF.
    """
    chi2, contrast, n_bands = _filtered(coadd, with_contrast=True)
    return _as_sigma(chi2, n_bands), _as_sigma(contrast, n_bands)


def _grow(region: NDArray[np.bool_], n_pixels: int) -> NDArray[np.bool_]:
    """Add all pixels within a distance of `n_pixels`."""
    if n_pixels == 0:
        return region
    y, x = np.indices((2 * n_pixels + 1, 2 * n_pixels + 1)) - n_pixels
    return np.asarray(ndimage.binary_dilation(region, structure=y**2 + x**2 <= n_pixels**2))


def _regions(significance: FloatArray, config: DetectionConfig) -> LabelArray:
    """Label the connected regions above the threshold, large enough and grown; from 1, in raster order."""
    labels, n_labels = ndimage.label(significance > config.threshold, structure=_EIGHT_NEIGHBOURS)
    area = np.bincount(labels.ravel(), minlength=n_labels + 1)
    kept = area >= config.min_area
    kept[0] = False
    grown, _ = ndimage.label(_grow(kept[labels], config.grow), structure=_EIGHT_NEIGHBOURS)
    return np.asarray(grown, dtype=np.int64)


def _maxima(significance: FloatArray, allowed: NDArray[np.bool_]) -> LabelArray:
    """Find local maxima (N, 2) among the allowed pixels, highest first.

    A maximum is not lower than its eight neighbours. Of a plateau of equal pixels, the one nearest to its middle
    counts, the first in raster order if several are.
    """
    top = allowed & (significance == ndimage.maximum_filter(significance, size=3, mode="nearest"))
    plateaus, n_plateaus = ndimage.label(top, structure=_EIGHT_NEIGHBOURS)
    y, x = np.nonzero(top)
    plateau = plateaus[y, x] - 1
    size = np.maximum(np.bincount(plateau, minlength=n_plateaus), 1)
    middle_y, middle_x = (np.bincount(plateau, weights=c, minlength=n_plateaus) / size for c in (y, x))
    # Rounded, so that two pixels at the same distance are told apart by their order and not by rounding errors.
    distance = np.round((y - middle_y[plateau]) ** 2 + (x - middle_x[plateau]) ** 2, 6)
    nearest = np.lexsort((x, y, distance, plateau))
    first = nearest[np.flatnonzero(np.diff(plateau[nearest], prepend=-1))]
    y, x = y[first], x[first]
    order = np.lexsort((x, y, -significance[y, x]))
    return np.stack([y[order], x[order]], axis=1).astype(np.int64)


def _separate(peaks: LabelArray, distance: float) -> LabelArray:
    """Drop each peak closer than `distance` to one before it that is kept."""
    if distance == 0 or len(peaks) < 2:
        return peaks
    from scipy.spatial import cKDTree

    pairs = cKDTree(peaks).query_pairs(distance, output_type="ndarray")
    apart = np.hypot(*(peaks[pairs[:, 0]] - peaks[pairs[:, 1]]).T)
    pairs = pairs[apart < distance]
    kept = np.ones(len(peaks), dtype=bool)
    for first, second in pairs[np.argsort(pairs[:, 0], kind="stable")]:
        kept[second] &= not kept[first]
    return peaks[kept]


def _find_peaks(
    significance: FloatArray, contrast: FloatArray, labels: LabelArray, fwhm_pix: float, config: DetectionConfig
) -> LabelArray:
    """Find peaks (N, 2) in the footprints, the most significant first.

    Three kinds count, all above the threshold in significance: maxima of the contrast above the threshold, which tell
    neighbours apart; maxima of the significance with two thirds of that contrast, a PSF width away from the first
    kind; and the highest pixel of a footprint that has neither, which is faint or wide.
    """
    significant = (labels > 0) & (significance > config.peak_threshold)
    peaks = _maxima(contrast, significant & (contrast > config.peak_threshold))

    others = _maxima(significance, significant)
    near = ndimage.maximum_filter(contrast, size=3, mode="nearest")
    distinct = near[tuple(others.T)] > _WIDE_CONTRAST * config.peak_threshold
    if len(peaks) and len(others):
        from scipy.spatial import cKDTree

        distance, _ = cKDTree(peaks).query(others)
        distinct &= distance > fwhm_pix
    peaks = np.concatenate([peaks, others[distinct]])

    empty = others[~np.isin(labels[tuple(others.T)], labels[tuple(peaks.T)])]
    _, highest = np.unique(labels[tuple(empty.T)], return_index=True)
    peaks = np.concatenate([peaks, empty[highest]])
    y, x = peaks.T
    return _separate(peaks[np.lexsort((x, y, -significance[y, x]))], config.min_separation)


def _number(labels: LabelArray, peaks: LabelArray) -> LabelArray:
    """Keep the labels that hold a peak, numbered from 1 in their order."""
    used = np.zeros(labels.max(initial=0) + 1, dtype=bool)
    used[labels[tuple(peaks.T)]] = True
    used[0] = False
    return np.asarray(np.where(used, np.cumsum(used), 0)[labels], dtype=np.int64)


def detect(coadd: Coadd, config: DetectionConfig) -> Detection:
    """Find footprints and peaks.

    Parameters
    ----------
    coadd : Coadd
    config : DetectionConfig

    Returns
    -------
    detection : Detection
        Every footprint holds at least one peak and every peak lies in a footprint. Nothing where no pixel is valid.

    Notes
    -----
    Shifting the image by whole pixels shifts the answer. Flipping it flips the answer, but for a source that is exactly
    symmetric about a line between two pixels: the first of the two in raster order is its peak.
    """
    significance, contrast = detection_images(coadd)
    labels = _regions(significance, config)
    peaks = _find_peaks(significance, contrast, labels, _mean_fwhm(coadd), config)
    return Detection(footprints=_number(labels, peaks), peaks=peaks)


def footprints_of_peaks(coadd: Coadd, peaks: LabelArray, config: DetectionConfig) -> LabelArray:
    """Find the footprints of peaks that are given.

    Parameters
    ----------
    coadd : Coadd
    peaks : ndarray, shape (N, 2)
        Array index (y, x) of the coadd, inside the image.
    config : DetectionConfig

    Returns
    -------
    footprints : ndarray, shape (H, W)
        Connected regions above the threshold, grown, that hold a peak. A peak outside of them has a square footprint of
        one and a half PSF widths on each side; squares and regions that touch, also at a corner, are one. Labels count
        from 1 in raster order, 0 outside; every peak lies in a footprint and every footprint holds a peak.
    """
    chi2, _, n_bands = _filtered(coadd, with_contrast=False)
    significance = _as_sigma(chi2, n_bands)
    labels = _regions(significance, config)
    lonely = peaks[labels[tuple(peaks.T)] == 0]
    if len(lonely):
        covered = labels > 0
        for y, x in lonely:
            box = Box(int(y), int(x), 1, 1).grow(round(1.5 * _mean_fwhm(coadd))) & Box.of_shape(coadd.shape)
            covered[box.y, box.x] = True
        labels = np.asarray(ndimage.label(covered, structure=_EIGHT_NEIGHBOURS)[0], dtype=np.int64)
    return _number(labels, peaks)
