"""Detection image, footprints and peaks, for coadds that come without them."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from threading import Lock

import numpy as np
import scipy.fft
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from scipy.special import comb, gamma, gammaincc, ndtri_exp

from kermes.coadd import Coadd, stack_psfs
from kermes.config import DetectionConfig
from kermes.errors import InputError
from kermes.geometry import Box
from kermes.kernels import detection as kernels
from kermes.psf import gaussian_fwhm, sums_beyond, truncated
from kermes.wavelets import noise_of_planes, starlet_transform

FloatArray = NDArray[np.float64]
LabelArray = NDArray[np.int64]
Plane = NDArray[np.float32]

_EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)
_LARGEST_HOLE = 1_000_000  # pixels of the box around a hole; what is larger is no star
_CELL = 256  # side of the blocks with a PSF each [pixels]
_MIN_CONTRAST_COVERAGE = 0.1  # the same for the contrast, which takes the edges of holes for sources
_MIN_COVERAGE = 1e-3  # of sum(w psf^2) among valid pixels; with less, the core of the PSF lies on none of them
_PLANES = 4  # starlet planes that are searched, each with structure twice as wide as the one before
_WIDE_CONTRAST = 0.8  # of the peak threshold: noise on a bright halo rarely gets there, faint sources do


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Detection:
    """What was found in a coadd."""

    footprints: LabelArray
    """Label of the footprint of each pixel, shape (H, W), counted from 1 in raster order; 0: none."""

    peaks: LabelArray
    """Peaks (N, 2), array index (y, x), the most significant first; each lies in a footprint."""

    band_snr: FloatArray
    """Signal-to-noise of a point source at each peak in each band, shape (N, B); NaN where too few pixels of the PSF
    are valid."""

    alone: NDArray[np.bool_]
    """Whether the band by itself finds the peak: `band_snr` above the threshold for peaks, shape (N, B)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _StarCore:
    """The hole in the middle of a saturated star, array index."""

    pixels: LabelArray
    """Its pixels (M, 2), without long trails."""

    centre: tuple[float, float]
    """Middle of its widest part."""

    radius: float
    """Distance of the centre from the nearest pixel outside [pixels]."""


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
    """Cut PSFs (B, P, Q) to the central square that loses less than a ten-thousandth of the power of any band.

    Signal-to-noise is lower by half of that.
    """
    power = sums_beyond(psfs**2)
    # Cut at a radius, what lies farther out is lost.
    enough = (power[:, 2:] <= 1e-4 * power[:, :1]).all(axis=0)
    return truncated(psfs, 1 + int(enough.argmax())) if enough.any() else psfs


@dataclass(frozen=True, slots=True, eq=False)
class _Filters:
    """Matched filters of all bands, ready for blocks of one size."""

    core: FloatArray
    """PSFs (B, P, Q) without their faint wings."""

    transforms: NDArray[np.complex64]
    """Filters and their squares, shape (B, 2 K, side, side // 2 + 1)."""

    cumulative: FloatArray
    """Sums over the first rows and columns of the same (P, Q), shape (B, 2 K, P + 1, Q + 1)."""

    @property
    def block(self) -> int:
        """The longest side of a block."""
        return int(self.transforms.shape[2] + 2 - max(self.cumulative.shape[2:]))


def _checked_workers(workers: int) -> int:
    if workers < 1:
        raise InputError(f"workers must be at least 1, got {workers}")
    return workers


@lru_cache(maxsize=2)
def _cached_filters(psfs: bytes, shape: tuple[int, ...], with_contrast: bool, longest: int, cell: int) -> _Filters:
    stamps = np.zeros((shape[0], shape[1] + 2, shape[2] + 2))  # a PSF of one pixel has surroundings
    stamps[:, 1:-1, 1:-1] = np.frombuffer(psfs).reshape(shape)
    core = _core(stamps)
    filters = core[:, None]
    if with_contrast:
        margin = [
            (0, 0),
            *(((n - m) // 2, (n - m) // 2) for n, m in zip(stamps.shape[1:], core.shape[1:], strict=True)),
        ]
        filters = np.stack([np.pad(core, margin), [_contrast_kernel(psf) for psf in stamps]], axis=1)
    reach = max(filters.shape[2:]) - 1
    side = cell + reach if cell else min(max(256, 4 * reach), longest + reach)
    transforms, cumulative = kernels.transform_filters(
        np.ascontiguousarray(filters), scipy.fft.next_fast_len(side, real=True)
    )
    return _Filters(core, transforms, cumulative)


def _filters(psfs: FloatArray, with_contrast: bool, longest: int, cell: int = 0) -> _Filters:
    """Make the filters of PSFs (B, P, Q), or remember them: many small coadds have the same.

    Parameters
    ----------
    psfs : ndarray, shape (B, P, Q)
    with_contrast : bool
        Whether the contrast kernel comes after the PSF.
    longest : int
        Longer side of the image [pixels]: blocks need not be larger.
    cell : int, optional
        Side of the blocks; 0: what is fast.
    """
    longest = min(longest, max(256, 4 * (max(psfs.shape[1:]) + 1)))  # more makes no difference
    return _cached_filters(
        np.ascontiguousarray(psfs, dtype=np.float64).tobytes(), psfs.shape, with_contrast, longest, cell
    )


def _units(coadd: Coadd) -> FloatArray:
    """Typical variance (B,) of each band; 0 where no pixel is valid."""
    step = max(1, int(np.sqrt(coadd.shape[0] * coadd.shape[1] / 1e6)))
    units = np.zeros(coadd.n_bands)
    for b in range(coadd.n_bands):
        for every in (step, 1):  # a sample of a large image, all of it if none of those are valid
            variance, valid = coadd.variance[b, ::every, ::every], coadd.valid[b, ::every, ::every]
            values = variance[valid]
            if len(values):
                low, high = values.min(), values.max()
                units[b] = low if low == high else np.median(values)
                break
    return units


def _pieces(coadd: Coadd, block: int) -> list[Box]:
    """Cut the image into blocks, array index.

    Where the PSF varies they are cells of a grid that is fixed to the coadd's coordinates, so that a cutout has the
    same ones; else they start at the first pixel.
    """
    (y0, x0), (height, width) = coadd.origin if callable(coadd.psfs) else (0, 0), coadd.shape
    tops, lefts = range(-(y0 % block), height, block), range(-(x0 % block), width, block)
    whole = Box.of_shape(coadd.shape)
    return [Box(top, left, block, block) & whole for top in tops for left in lefts]


def _psfs_of(coadd: Coadd, piece: Box) -> FloatArray:
    """PSFs (B, P, Q) at the middle of a piece of the image; zero in a band that has none in it.

    A band in which a PSF field has none in the middle has that of another place in the piece.
    """
    found: dict[int, FloatArray] = {}
    for y, x in [(0.5, 0.5), *itertools.product((0.25, 0.5, 0.75, 0.0, 1.0), repeat=2)]:
        psfs = coadd.psf_at(
            y=coadd.origin[0] + piece.y0 + y * (piece.height - 1), x=coadd.origin[1] + piece.x0 + x * (piece.width - 1)
        )
        found = {b: psf for b, psf in enumerate(psfs) if psf.any()} | found
        if len(found) == coadd.n_bands or not callable(coadd.psfs):
            break
    return stack_psfs([found.get(b, np.zeros((1, 1))) for b in range(coadd.n_bands)])


def _filtered(coadd: Coadd, with_contrast: bool, workers: int = 1) -> list[NDArray[np.float32]]:
    """Filter each band with its PSF, and with its contrast kernel, and add up the bands, block by block.

    Returns planes (H, W) of significance [sigma]: of the PSF and, if asked for, of the contrast. Memory is that of
    the planes, and the transforms of a block stay in the cache. Blocks do not depend on each other, so that the
    number of threads changes nothing.
    """
    units = _units(coadd)
    root, _ = _equivalent_sigma(1)
    tables = _sigma_tables(coadd.n_bands)
    arrays = [np.ascontiguousarray(a) for a in (coadd.images, coadd.variance, coadd.valid)]
    planes = [np.zeros(coadd.shape, dtype=np.float32) for _ in range(1 + with_contrast)]
    varies = callable(coadd.psfs)
    lock = Lock()  # a PSF field need not be safe to be called from several threads

    everywhere = None if varies else _filters(np.asarray(coadd.psfs), with_contrast, max(coadd.shape))
    block = _CELL if everywhere is None else everywhere.block

    def run(piece: Box) -> None:
        if everywhere is None:
            with lock:
                psfs = _psfs_of(coadd, piece)
            filters = _filters(psfs, with_contrast, max(coadd.shape), _CELL)
        else:
            filters = everywhere
        here = np.where(filters.cumulative[:, 1, -1, -1] > 0, units, 0.0)
        found = kernels.filter_block(
            *arrays,
            filters.transforms,
            filters.cumulative,
            here,
            np.array([_MIN_COVERAGE, _MIN_CONTRAST_COVERAGE]),
            (piece.y0, piece.x0),
            piece.shape,
            root[1],
            tables,
        )
        for plane, values in zip(planes, found, strict=True):
            plane[piece.y, piece.x] = values

    _for_each(run, _pieces(coadd, block), workers)
    return planes


def _for_each(run: Callable[[Box], None], pieces: list[Box], workers: int) -> None:
    """Run something for each piece, on threads if asked to."""
    if workers == 1 or len(pieces) == 1:
        for piece in pieces:
            run(piece)
        return
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(run, pieces))


def _mean_fwhm(coadd: Coadd) -> float:
    """Mean over the bands of the width of a Gaussian with the effective area of the PSF [pixels]; 0 without a PSF."""
    return _mean_width(_typical_psfs(coadd))


def _mean_width(psfs: FloatArray) -> float:
    """The same of PSFs (B, P, Q)."""
    widths = [gaussian_fwhm(psf) for psf in psfs if psf.any()]
    return sum(widths) / max(len(widths), 1)


def _typical_psfs(coadd: Coadd) -> FloatArray:
    """PSFs (B, P, Q) at the middle of the image, or elsewhere in a band that has none there; zero if none is found."""
    return _psfs_of(coadd, Box.of_shape(coadd.shape))


@lru_cache(maxsize=32)
def _equivalent_sigma(n_bands: int) -> tuple[FloatArray, FloatArray]:
    """Table of sqrt(chi2), and of the number of sigma of a single Gaussian with the same false-alarm rate."""
    root = np.linspace(0.0, 30.0, 3001)
    # Each band is positive half of the time: chi2 has k degrees of freedom with binomial probability.
    alarm = sum(comb(n_bands, k) * gammaincc(0.5 * k, 0.5 * root**2) for k in range(1, n_bands + 1)) / 2.0**n_bands
    return root, -ndtri_exp(np.log(alarm))


@lru_cache(maxsize=32)
def _sigma_tables(n_bands: int) -> FloatArray:
    """Second column of `_equivalent_sigma` for 0, 1, ..., `n_bands` bands, shape (B + 1, N)."""
    return np.stack([np.zeros_like(_equivalent_sigma(1)[1]), *(_equivalent_sigma(n + 1)[1] for n in range(n_bands))])


def detection_images(coadd: Coadd, workers: int = 1) -> tuple[Plane, Plane]:
    """Combine all bands to an image of significance, and to one of contrast against the surroundings.

    Each band is filtered with its own PSF, which gives the signal-to-noise of a point source at each pixel,
    ``sum(w psf I) / sqrt(sum(w psf^2))`` with w the inverse variance, zero where a pixel is not valid. Bright pixels
    are weighted as if they had no photon noise, which the noise of the sum still has: else the cores of bright stars
    would count for nothing, and a star would be a ring. The bands are
    combined to the sum of its square where it is positive, which finds sources of any colour, also those of a single
    band. The result is given as the number of sigma of a Gaussian with the same false-alarm rate, whatever the number
    of bands: 5 means 5 sigma, a chance of 3e-7 per independent pixel.

    The contrast is the same for the PSF minus the PSF blurred by itself, which does not see what is wide and smooth:
    it tells neighbours apart, and the noise on a bright halo from a source.

    Parameters
    ----------
    coadd : Coadd
        Where its PSF varies, each cell of 256 pixels, counted from the origin of its coordinates, has the PSF at the
        middle of what the image holds of it; a band without a PSF in a cell is left out there.
    workers : int, optional
        Number of threads; the answer is the same for any.

    Returns
    -------
    significance, contrast : ndarray, shape (H, W)
        Dimensionless, float32, finite; 0 where no band has valid pixels under the core of the PSF.
    """
    significance, contrast = _filtered(coadd, with_contrast=True, workers=_checked_workers(workers))
    return significance, contrast


def wavelet_images(coadd: Coadd) -> Plane:
    """Combine all bands to images of significance, one for each of four starlet planes.

    Each band is divided by its noise and split into planes of detail (Starck, Murtagh & Bertero 2011); the noise of a
    plane is known (`wavelets.noise_of_planes`). The bands are combined plane by plane as in `detection_images`, and
    5 means 5 sigma here too, of a pixel of one plane.

    Parameters
    ----------
    coadd : Coadd
        Only the width of its PSF matters: the first plane is the one whose structure is about as wide.

    Returns
    -------
    planes : ndarray, shape (4, H, W)
        Dimensionless, float32, finite, from fine to coarse. Pixels that are not valid, and those outside of the image,
        are filled with the mean of those around, weighted with a Gaussian, and fade to 0 where few are near: else the
        noise at an edge would be continued, and count twice.
    """
    first = _first_plane(_mean_fwhm(coadd))
    margin = 2 * (2 ** (first + _PLANES) - 1)  # as far as the planes see
    inside = (slice(margin, margin + coadd.shape[0]), slice(margin, margin + coadd.shape[1]))
    noise = noise_of_planes(first + _PLANES)[first:].astype(np.float32)
    chi2 = np.zeros((_PLANES, *coadd.shape), dtype=np.float32)
    for image, variance, valid in zip(coadd.images, coadd.variance, coadd.valid, strict=True):
        sigma = np.sqrt(variance, where=valid, out=np.ones_like(variance))
        scaled = np.pad(np.divide(image, sigma, where=valid, out=np.zeros_like(image)), margin)
        known = np.pad(valid, margin)
        near, mean = (
            ndimage.gaussian_filter(plane, 2.0**first, mode="constant") for plane in (known.astype(np.float32), scaled)
        )
        np.divide(mean, np.maximum(near, 0.5), out=scaled, where=~known)
        for total, plane, of_noise in zip(
            chi2, starlet_transform(scaled, first + _PLANES)[first:], noise, strict=False
        ):
            total += np.square(np.maximum(plane[inside] / of_noise, 0))
    root = np.sqrt(chi2, out=chi2)
    # Where no band is valid all of them were filled.
    n_bands = coadd.valid.sum(axis=0)
    n_bands[n_bands == 0] = coadd.n_bands
    for n in np.unique(n_bands).tolist():
        table, equivalent = _equivalent_sigma(n)
        here = n_bands == n
        values = root[:, here]
        beyond = np.maximum(values - table[-1], 0)
        root[:, here] = np.maximum(np.interp(values, table, equivalent) + beyond, 0)
    return root


def _first_plane(fwhm_pix: float) -> int:
    """Number of the starlet plane whose structure, 2^j pixels, is about as wide as the PSF's standard deviation."""
    return max(int(np.round(np.log2(max(fwhm_pix, 1.0) / 2.355))), 0)


def _wavelet_peaks(planes: Plane, labels: LabelArray, fwhm_pix: float, config: DetectionConfig) -> LabelArray:
    """Find peaks (N, 2) in the footprints, the most significant first.

    Maxima of a plane above the threshold; of a coarse plane, those as far from all finer ones as its structure is wide.
    """
    from scipy.spatial import cKDTree

    peaks = np.zeros((0, 2), dtype=np.int64)
    first = _first_plane(fwhm_pix)
    for j, plane in enumerate(planes):
        found = _maxima(plane, (labels > 0) & (plane > config.peak_threshold))
        if len(peaks) and len(found):
            distance, _ = cKDTree(peaks).query(found)
            found = found[distance > 2.0 ** (first + j + 1)]
        peaks = np.concatenate([peaks, found])
    y, x = peaks.T
    return _separate(peaks[np.lexsort((x, y, -planes[:, y, x].max(axis=0)))], config.min_separation)


def _plane_kernels(fwhm_pix: float) -> FloatArray:
    """Images (4, n, n) that a single bright pixel leaves in the planes of `wavelet_images`."""
    first = _first_plane(fwhm_pix)
    half = 3 * 2 ** (first + _PLANES)
    point = np.zeros((2 * half + 1, 2 * half + 1))
    point[half, half] = 1.0
    return np.asarray(starlet_transform(point, first + _PLANES)[first:-1])


def false_peak_density(psfs: ArrayLike, threshold: float, method: str = "psf") -> float:
    """Predict how many peaks noise makes per pixel.

    Parameters
    ----------
    psfs : array_like, shape (B, P, Q)
        PSF of each band.
    threshold : float
        Height of the peaks [sigma], both of `DetectionConfig.threshold` and `DetectionConfig.peak_threshold`; meant
        for 3 and more, where peaks are rare. With a `min_area` above 1 there are fewer.
    method : {"psf", "wavelet"}, optional
        That of `DetectionConfig`. With wavelets the sum over all planes, an upper limit: a peak of one plane is often
        one of another.

    Returns
    -------
    density : float
        Peaks of `detection_images`, or of `wavelet_images`, above the threshold per pixel of white Gaussian noise.

    Notes
    -----
    Noise that is filtered with a PSF is a Gaussian random field, and the positive signal-to-noise of B bands squared
    and summed a chi-bar-squared field: of n degrees of freedom with binomial probability. High peaks are as many as
    the Euler characteristic of what is above the threshold x = chi2 per unit area (Adler 1981; Bond and Efstathiou
    1987), which is the sum with the same probabilities (Taylor and Worsley 2013) of that of chi-squared fields
    (Worsley 1994),

    ``lambda / (2 pi) x^(n/2 - 1) exp(-x/2) (x - n + 1) / (2^(n/2 - 1) Gamma(n/2))``,

    with lambda the variance of the slope of a field along one axis, the mean over the bands. For one band it is
    lambda nu exp(-nu^2 / 2) / (2 pi)^(3/2). Peaks fall between pixels, where they are higher than at the pixels:
    averaged over, with the curvature lambda that a high peak has.
    """
    stamps = np.asarray(psfs, dtype=np.float64)
    if method == "wavelet":
        kernels_of_planes = _plane_kernels(_mean_width(stamps))
        return sum(false_peak_density(np.stack([kernel] * len(stamps)), threshold) for kernel in kernels_of_planes)
    stamps = np.pad(stamps, ((0, 0), (1, 1), (1, 1)))
    power = (stamps**2).sum(axis=(1, 2))
    side = 4 * max(stamps.shape[1:])
    k = 2.0 * np.pi * np.fft.fftfreq(side)
    spectrum = np.abs(np.fft.fft2(stamps, (side, side))) ** 2
    square = (k[:, None] ** 2 + k[None, :] ** 2) / 2.0
    slopes = (spectrum * square).sum(axis=(1, 2)) / spectrum.sum(axis=(1, 2))
    slope = float(slopes[power > 0].mean())
    n_bands = int((power > 0).sum())

    offset = (np.arange(8) + 0.5) / 8 - 0.5
    lost = 0.5 * slope * (offset[:, None] ** 2 + offset[None, :] ** 2)
    x = np.interp(threshold, *_equivalent_sigma(n_bands)[::-1]) ** 2 / (1.0 - lost) ** 2
    total = np.zeros_like(x)
    for n in range(1, n_bands + 1):
        density = slope / (2.0 * np.pi) * x ** (0.5 * n - 1) * np.exp(-0.5 * x) * (x - n + 1)
        total += comb(n_bands, n) / 2.0**n_bands * density / (2.0 ** (0.5 * n - 1) * gamma(0.5 * n))
    return float(total.mean())


def _grow(region: NDArray[np.bool_], n_pixels: int) -> NDArray[np.bool_]:
    """Add all pixels within a distance of `n_pixels`."""
    if n_pixels == 0:
        return region
    rows = np.arange(-n_pixels, n_pixels + 1)
    return np.asarray(kernels.grow(region, np.sqrt(n_pixels**2 - rows**2).astype(np.int64)))


def _regions(significance: Plane, config: DetectionConfig) -> LabelArray:
    """Label the connected regions above the threshold, large enough and grown; from 1, in raster order."""
    labels, n_labels = ndimage.label(significance > config.threshold, structure=_EIGHT_NEIGHBOURS)
    area = np.bincount(labels.ravel(), minlength=n_labels + 1)
    kept = area >= config.min_area
    kept[0] = False
    grown, _ = ndimage.label(_grow(kept[labels], config.grow), structure=_EIGHT_NEIGHBOURS)
    return np.asarray(grown, dtype=np.int64)


def _maxima(significance: Plane, allowed: NDArray[np.bool_]) -> LabelArray:
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


def _star_cores(coadd: Coadd, significance: Plane, fwhm_pix: float, config: DetectionConfig) -> list[_StarCore]:
    """Find the holes that are cores of saturated stars.

    A hole is connected, not valid in one band or more, and holds a square of three pixels. Its widest part, a disc, is
    the core of a star when it is surrounded by light that falls outwards on all sides: nine tenths of the valid pixels
    around it, which are half of them or more, are above the threshold for peaks, and above three quarters of those
    twice as far away.
    """
    holes = _holes(coadd)
    if holes is None:
        return []
    inner, _ = ndimage.label(ndimage.binary_erosion(holes, structure=_EIGHT_NEIGHBOURS, border_value=1))
    whole = Box.of_shape(coadd.shape)
    cores = []
    for place in ndimage.find_objects(inner):
        rows, columns = place
        box = Box(rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start).grow(2) & whole
        if box.height * box.width > _LARGEST_HOLE:
            continue
        depth = ndimage.distance_transform_edt(np.pad(holes[box.y, box.x], 1))[1:-1, 1:-1]
        for _ in range(8):  # a trail may join several stars
            radius = float(depth.max())
            if radius < 2:
                break
            y, x = (float(c.mean()) for c in np.nonzero(depth >= radius - 0.5))
            if depth[round(y), round(x)] < radius - 1:  # the middle of two stars is neither
                y, x = (float(c) for c in np.unravel_index(depth.argmax(), depth.shape))
            distance = np.hypot(*(np.indices(depth.shape) - np.array([y, x])[:, None, None]))
            disc = (distance <= 1.5 * radius) & (depth > 0)
            depth[disc] = 0
            centre = (y + box.y0, x + box.x0)
            around = Box(round(centre[0]), round(centre[1]), 1, 1).grow(int(2.5 * radius + 2 * fwhm_pix + 3)) & whole
            distance = np.hypot(
                np.indices(around.shape)[0] + around.y0 - centre[0], np.indices(around.shape)[1] + around.x0 - centre[1]
            )
            usable = ~holes[around.y, around.x]
            ring = (distance > radius + 0.5) & (distance <= radius + 2.5)
            far = (distance > 2 * radius + fwhm_pix) & (distance <= 2 * radius + fwhm_pix + 2) & usable
            near = significance[around.y, around.x][ring & usable]
            if 2 * len(near) < ring.sum() or not far.any():
                continue
            low = np.percentile(near, 10)
            if low > max(config.peak_threshold, np.percentile(significance[around.y, around.x][far], 75)):
                yx = np.argwhere(disc) + np.array([box.y0, box.x0])
                cores.append(_StarCore(pixels=yx, centre=centre, radius=radius))
    return cores


def _holes(coadd: Coadd) -> NDArray[np.bool_] | None:
    """Pixels (H, W) that are not valid in some band which has valid ones; None if there are none."""
    holes = np.zeros(coadd.shape, dtype=bool)
    for valid in coadd.valid:
        if not valid.all() and valid.any():
            holes |= ~valid
    return holes if holes.any() else None


def _fill_star_cores(cores: list[_StarCore], significance: Plane, contrast: Plane | None, fwhm_pix: float) -> None:
    """Make the middle of each core of a saturated star a peak, higher than its rim, and the only one there."""
    whole = Box.of_shape(significance.shape)
    for core in cores:
        reach = 1.5 * core.radius + fwhm_pix
        box = Box(round(core.centre[0]), round(core.centre[1]), 1, 1).grow(int(reach + 1)) & whole
        filled = np.zeros(box.shape, dtype=bool)
        inside = core.pixels - np.array([box.y0, box.x0])
        inside = inside[((inside >= 0) & (inside < box.shape)).all(axis=1)]
        filled[tuple(inside.T)] = True
        rim = ndimage.distance_transform_edt(~filled) <= fwhm_pix
        top = significance[box.y, box.x][rim].max() * np.float32(1.001)
        significance[box.y, box.x][filled] = top
        middle = core.pixels[np.argmin(np.hypot(*(core.pixels - np.array(core.centre)).T))]
        significance[tuple(middle)] = top * np.float32(1.001)
        if contrast is not None:
            contrast[box.y, box.x][rim] = 0.0
            contrast[tuple(middle)] = top


def _pedestal(plane: Plane, peaks: LabelArray, fwhm_pix: float) -> NDArray[np.float32]:
    """Value (N,) of a plane around peaks, not negative.

    Two fifths of a ring, one and a half to two PSF widths away, are below it. A steep smooth profile has some contrast
    everywhere, on which noise makes maxima; a point source has a moat.
    """
    angle = np.arange(16) * (2.0 * np.pi / 16)
    radius = np.where(np.arange(16) % 2, 1.5, 2.0) * max(fwhm_pix, 1.0)
    offsets = np.round(radius * np.array([np.sin(angle), np.cos(angle)])).astype(np.int64)
    y, x = (np.clip(peaks[:, i, None] + offsets[i], 0, plane.shape[i] - 1) for i in (0, 1))
    return np.asarray(np.maximum(np.percentile(plane[y, x], 40, axis=1), 0))


def _find_peaks(
    significance: Plane, contrast: Plane, labels: LabelArray, fwhm_pix: float, config: DetectionConfig
) -> LabelArray:
    """Find peaks (N, 2) in the footprints, the most significant first.

    Three kinds count, all above the threshold in significance: maxima of the contrast above the threshold, which tell
    neighbours apart; maxima of the significance with four fifths of that contrast, a PSF width away from the first
    kind; and the highest pixel of a footprint that has neither, which is faint or wide. Of the contrast, what is
    above the surroundings counts.
    """
    significant = (labels > 0) & (significance > config.peak_threshold)
    sharp = _maxima(contrast, significant & (contrast > config.peak_threshold))
    peaks = sharp[contrast[tuple(sharp.T)] - _pedestal(contrast, sharp, fwhm_pix) > config.peak_threshold]

    others = _maxima(significance, significant)
    near = ndimage.maximum_filter(contrast, size=3, mode="nearest")
    above = near[tuple(others.T)] - _pedestal(contrast, others, fwhm_pix)
    distinct = above > _WIDE_CONTRAST * config.peak_threshold
    if len(sharp) and len(others):
        from scipy.spatial import cKDTree

        distance, _ = cKDTree(sharp).query(others)
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


def subtract_background(coadd: Coadd, mesh: int, config: DetectionConfig | None = None, workers: int = 1) -> Coadd:
    """Take a smooth local background off every band.

    For images whose sky is not zero, or that are full of light too wide to be deblended. It takes the outskirts of
    objects wider than the mesh off, too.

    Parameters
    ----------
    coadd : Coadd
    mesh : int
        Side of the squares in which the background is measured [pixels]; several times wider than objects.
    config : DetectionConfig, optional
        How footprints are found, whose pixels are left out; None: the defaults.
    workers : int, optional
        Number of threads that look for them; the answer is the same for any.

    Returns
    -------
    coadd : Coadd
        The same with other images; a band without a valid pixel is as it was.

    Raises
    ------
    InputError
        If `mesh` is not a whole number of at least 8, or photutils is not installed.

    Notes
    -----
    The median of what lies within three sigma, in each square, made smooth by a median filter of three squares and
    splines: `photutils.background.Background2D`, the method of SExtractor (Bertin & Arnouts 1996). First without
    footprints, then once more without the pixels of those that are found on the difference.
    """
    if not isinstance(mesh, int | np.integer) or mesh < 8:
        raise InputError(f"mesh must be a whole number of pixels, at least 8, got {mesh!r}")
    try:
        from photutils.background import Background2D, MedianBackground
    except ImportError:
        raise InputError(
            "background needs photutils, which is not installed: pip install 'kermes[photometry]'"
        ) from None

    def without(covered: NDArray[np.bool_]) -> Coadd:
        images = coadd.images.copy()
        for plane, valid in zip(images, coadd.valid, strict=True):
            hidden = ~valid | covered
            if hidden.all():
                continue
            background = Background2D(
                np.where(valid, plane, 0.0),
                min(mesh, *coadd.shape),
                mask=hidden,
                bkg_estimator=MedianBackground(),
                exclude_percentile=80.0,
            )
            plane -= background.background.astype(np.float32)
        return replace(coadd, images=images)

    with warnings.catch_warnings():
        # Squares without a pixel are filled from their neighbours; the coadd has said before what is odd about it.
        warnings.simplefilter("ignore")
        first = without(np.zeros(coadd.shape, dtype=bool))
        significance, _ = detection_images(first, workers)
        return without(_regions(significance, config or DetectionConfig()) > 0)


def detect(coadd: Coadd, config: DetectionConfig, workers: int = 1) -> Detection:
    """Find footprints and peaks.

    Parameters
    ----------
    coadd : Coadd
    config : DetectionConfig
    workers : int, optional
        Number of threads; the answer is the same for any.

    Returns
    -------
    detection : Detection
        Every footprint holds at least one peak and every peak lies in a footprint. Nothing where no pixel is valid.

    Notes
    -----
    Shifting the image by whole pixels shifts the answer. Flipping it flips the answer, but for a source that is exactly
    symmetric about a line between two pixels: the first of the two in raster order is its peak.
    """
    if config.background:
        coadd = subtract_background(coadd, config.background, config, workers)
    fwhm_pix = _mean_fwhm(coadd)
    if config.method == "wavelet":
        planes = wavelet_images(coadd)
        significance = planes.max(axis=0)
        cores = _star_cores(coadd, significance, fwhm_pix, config)
        for plane in planes:
            _fill_star_cores(cores, significance, plane, fwhm_pix)
        labels = _regions(significance, config)
        peaks = _wavelet_peaks(planes, labels, fwhm_pix, config)
        del significance, planes
    else:
        significance, contrast = detection_images(coadd, workers)
        cores = _star_cores(coadd, significance, fwhm_pix, config)
        _fill_star_cores(cores, significance, contrast, fwhm_pix)
        labels = _regions(significance, config)
        peaks = _find_peaks(significance, contrast, labels, fwhm_pix, config)
        del significance, contrast
    band_snr = measure_band_snr(coadd, peaks)
    return Detection(
        footprints=_number(labels, peaks), peaks=peaks, band_snr=band_snr, alone=band_snr > config.peak_threshold
    )


def measure_band_snr(coadd: Coadd, peaks: LabelArray) -> FloatArray:
    """Measure the signal-to-noise of a point source at each peak in each band, neighbours included.

    Parameters
    ----------
    coadd : Coadd
        Where its PSF varies, that of the cell of each peak is used, as in `detection_images`.
    peaks : ndarray, shape (N, 2)
        Array index (y, x) of the coadd, inside the image.

    Returns
    -------
    band_snr : ndarray, shape (N, B)
        ``sum(w psf I) / sqrt(sum(w psf^2))`` with w the inverse variance, zero where a pixel is not valid; negative
        where the sum is. NaN in a band with too few valid pixels under the PSF, or without a PSF.
    """
    arrays = [np.ascontiguousarray(a) for a in (coadd.images, coadd.variance, coadd.valid)]
    units = _units(coadd)
    result = np.full((len(peaks), coadd.n_bands), np.nan)
    pieces = _pieces(coadd, _CELL) if callable(coadd.psfs) else [Box.of_shape(coadd.shape)]
    y, x = peaks.T
    for piece in pieces:
        here = np.flatnonzero((y >= piece.y0) & (y < piece.y1) & (x >= piece.x0) & (x < piece.x1))
        if len(here):
            core = _core(_psfs_of(coadd, piece))
            known = np.where(core.any(axis=(1, 2)), units, 0.0)
            result[here] = kernels.signal_to_noise(*arrays, core, known, peaks[here], _MIN_COVERAGE)
    return result


def footprints_of_peaks(coadd: Coadd, peaks: LabelArray, config: DetectionConfig, workers: int = 1) -> LabelArray:
    """Find the footprints of peaks that are given.

    Parameters
    ----------
    coadd : Coadd
    peaks : ndarray, shape (N, 2)
        Array index (y, x) of the coadd, inside the image.
    config : DetectionConfig
    workers : int, optional
        Number of threads; the answer is the same for any.

    Returns
    -------
    footprints : ndarray, shape (H, W)
        Connected regions above the threshold, grown, that hold a peak. A peak outside of them has a square footprint of
        one and a half PSF widths on each side; squares and regions that touch, also at a corner, are one. Labels count
        from 1 in raster order, 0 outside; every peak lies in a footprint and every footprint holds a peak.
    """
    if config.background:
        coadd = subtract_background(coadd, config.background, config, workers)
    workers = _checked_workers(workers)
    if config.method == "wavelet":
        significance = wavelet_images(coadd).max(axis=0)
    else:
        (significance,) = _filtered(coadd, with_contrast=False, workers=workers)
    if not coadd.valid.all():
        fwhm_pix = _mean_fwhm(coadd)
        _fill_star_cores(_star_cores(coadd, significance, fwhm_pix, config), significance, None, fwhm_pix)
    labels = _regions(significance, config)
    lonely = peaks[labels[tuple(peaks.T)] == 0]
    if len(lonely):
        covered = labels > 0
        for y, x in lonely:
            box = Box(int(y), int(x), 1, 1).grow(round(1.5 * _mean_fwhm(coadd))) & Box.of_shape(coadd.shape)
            covered[box.y, box.x] = True
        labels = np.asarray(ndimage.label(covered, structure=_EIGHT_NEIGHBOURS)[0], dtype=np.int64)
    return _number(labels, peaks)
