"""Which peaks are modelled together.

Peaks of one footprint, or of several that come close, have one parent. A parent that is small is one blend. A large one
is divided where its sources are coupled least: the coupling of two sources is by how many of its standard deviations
the flux of one is wrong if the other is not there. Neighbours across a cut that are coupled to a source of a blend are
fitted along with it, and reported by the blend they belong to.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import scipy.fft
from numpy.typing import NDArray
from scipy import ndimage

from kermes.coadd import Coadd
from kermes.config import PartitionConfig
from kermes.errors import ShapeError
from kermes.geometry import Box

DoubleArray = NDArray[np.float64]
LabelArray = NDArray[np.int64]

FARTHEST = 512
"""Length of the table of `psf_correlation` [pixels]."""

WING_SLOPE = -4.0
"""Power law by which the correlation of PSFs goes on beyond their stamps: wings that fall as the 4th power of the
radius correlate with the core like themselves."""

WIDEST = 8.0
"""Most times that a source is taken to be wider than a point."""

_PEAKS_AT_ONCE = 4096

BRIGHT = 300.0
"""Signal-to-noise above which it is measured how far the light of a source reaches."""

HOSTED = 0.3
"""A source that owes more than this share of its signal-to-noise to a brighter one lies on that."""

_RING_FACTOR = 1.12
RADII = _RING_FACTOR ** (2.0 * np.arange(5, 25))
"""Radii of the rings in which that is done, each from 1.12 times less to 1.12 times more [pixels]."""

_LEAST_MEDIAN = 0.1  # sigma per pixel, where a profile ends
_FLAT = 0.9  # or where it falls by less than this from one ring to the next,
_RISE = 1.25  # or where it rises by this above what it was nearer to the peak
_CROWD = 1.3  # times the light where it no longer falls, which varies from ring to ring
_CORE_ENDS = 0.3  # once it has fallen to less than this

CORE = 4
"""Half the side of the square around a peak from which its signal-to-noise is measured [pixels]; of peaks on masked
pixels, all of the PSF is used."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Parent:
    """A footprint and the peaks in it."""

    parent_id: int
    """Position in `Partition.parents`, counted from 0."""

    label: int
    """Value of its pixels in `Partition.labels`; 0 for a peak outside every footprint."""

    box: Box
    """Smallest box around its pixels, as array index; of one peak outside every footprint: that pixel."""

    peaks: NDArray[np.int64]
    """Rows of the peaks in it, shape (K,), ascending, at least one."""

    @property
    def is_outside(self) -> bool:
        """Whether it is a peak where no pixel may be used."""
        return self.label == 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Partition:
    """Every peak in exactly one parent."""

    parents: tuple[Parent, ...]
    """In the order of their first peaks."""

    labels: LabelArray
    """Footprint of each pixel, shape (H, W), 0 outside."""


def join_close(labels: LabelArray, distance: float) -> LabelArray:
    """Give footprints one label that come closer to each other than a distance [pixels], directly or by way of others.

    Parameters
    ----------
    labels : ndarray, shape (H, W)
        Footprint of each pixel, 0 outside.
    distance : float

    Returns
    -------
    joined : ndarray, shape (H, W)
        Zero where `labels` is; counted from 1 in raster order of the grown footprints.
    """
    covered = labels > 0
    if not covered.any():
        return labels
    grown = _grown(covered, 0.5 * distance)
    joined = ndimage.label(grown, structure=np.ones((3, 3), dtype=bool))[0]
    return np.where(covered, joined, 0).astype(np.int64)


def _grown(covered: NDArray[np.bool_], radius: float) -> NDArray[np.bool_]:
    """Pixels that are not farther than a radius [pixels] from one that is covered, shape (H, W)."""
    height, width = covered.shape
    reach = int(radius)
    # How many covered pixels there are to the left of each, as if the rows went on without any on both sides.
    before = np.zeros((height, width + 1 + 2 * reach), dtype=np.int32)
    np.cumsum(covered, axis=1, out=before[:, reach + 1 : reach + 1 + width])
    before[:, reach + 1 + width :] = before[:, reach + width, None]
    grown = np.zeros(covered.shape, dtype=bool)
    for dy in range(min(reach, height - 1) + 1):
        dx = int(np.sqrt(radius**2 - dy**2))
        near = before[:, reach + dx + 1 : reach + dx + 1 + width] > before[:, reach - dx : reach - dx + width]
        grown[dy:] |= near[: height - dy]
        grown[: height - dy] |= near[dy:]
    return grown


def partition(labels: LabelArray, peaks: LabelArray, shape: tuple[int, int]) -> Partition:
    """Put the peaks of each footprint together.

    Parameters
    ----------
    labels : ndarray, shape (H, W)
        Footprint of each pixel, integers >= 0; 0 where no pixel may be used. Pixels of one label belong together even
        where they do not touch.
    peaks : ndarray, shape (N, 2)
        Array index (y, x), inside the image. Two may be equal.
    shape : tuple of int
        Height and width of the image.

    Returns
    -------
    partition : Partition
        Each peak on label 0 is a parent of its own. Footprints without a peak are nobody's.

    Raises
    ------
    ShapeError
        If the labels do not have the shape of the image.
    """
    if labels.shape != shape:
        raise ShapeError(f"labels must have the shape of the image {shape}, got {labels.shape}")
    peaks = np.asarray(peaks, dtype=np.int64).reshape(-1, 2)
    of_peak = labels[peaks[:, 0], peaks[:, 1]]
    # Labels can be any integers: number those that hold peaks, so that boxes are found in one pass.
    held = np.unique(of_peak[of_peak > 0])
    largest = int(labels.max(initial=0))
    if largest < labels.size:
        # A table is faster than a search.
        number = np.zeros(largest + 1, dtype=np.int64)
        number[held] = np.arange(1, len(held) + 1)
        compact = number[labels]
    else:
        position = np.minimum(np.searchsorted(held, labels), max(len(held) - 1, 0))
        compact = np.where(held[position] == labels, position + 1, 0) if len(held) else np.zeros_like(labels)
    windows = ndimage.find_objects(compact, max_label=len(held))

    # A peak outside stands for itself; the others go by label.
    group = np.where(of_peak > 0, of_peak, -1 - np.arange(len(peaks)))
    _, first, inverse = np.unique(group, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))[inverse]
    order = np.argsort(rank, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(rank[order])) + 1) if len(peaks) else []

    parents = []
    for parent_id, rows in enumerate(members):
        label = int(of_peak[rows[0]])
        if label:
            y, x = windows[int(np.searchsorted(held, label))]
            box = Box.from_bounds(y.start, y.stop, x.start, x.stop)
        else:
            box = Box.around(peaks[rows])
        parents.append(Parent(parent_id=parent_id, label=label, box=box, peaks=rows))
    return Partition(parents=tuple(parents), labels=labels)


# ---------------------------------------------------------------- couplings


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Couplings:
    """Pairs of sources whose light overlaps."""

    pairs: LabelArray
    """Rows of the two, the smaller first, shape (E, 2)."""

    strength: DoubleArray
    """By how many of its standard deviations the flux of the fainter one is wrong if the brighter one is not
    modelled, shape (E,)."""


def psf_correlation(psfs: DoubleArray) -> DoubleArray:
    """Measure how the light of two points overlaps, by their distance.

    Parameters
    ----------
    psfs : ndarray, shape (B, P, Q)
        Odd sides; bands that are zero do not count.

    Returns
    -------
    correlation : ndarray, shape (FARTHEST,)
        Autocorrelation of the PSF at whole distances [pixels], mean over directions and bands, 1 at zero, never rising;
        beyond the stamps a power law.
    """
    return _psf_correlation(psfs.tobytes(), psfs.shape)


@lru_cache(maxsize=8)
def _psf_correlation(content: bytes, shape: tuple[int, int, int]) -> DoubleArray:
    psfs = np.frombuffer(content).reshape(shape)
    sides = [2 * n - 1 for n in shape[1:]]
    power = np.abs(scipy.fft.rfft2(psfs, sides)) ** 2
    image = scipy.fft.fftshift(scipy.fft.irfft2(power, sides), axes=(1, 2))
    norm = image[:, shape[1] - 1, shape[2] - 1]
    used = norm > 0
    mean = (image[used] / norm[used, None, None]).mean(axis=0) if used.any() else np.ones(sides)
    y, x = (np.arange(n) - n // 2 for n in mean.shape)
    radius = np.hypot(y[:, None], x).ravel()
    ring = np.floor(radius + 0.5).astype(np.int64)
    n_pixels = np.bincount(ring)
    profile = np.bincount(ring, weights=mean.ravel()) / n_pixels
    middle = np.bincount(ring, weights=radius) / n_pixels
    last = max(min(shape[1:]) // 2, 1)
    table = np.empty(FARTHEST)
    inner = np.interp(np.arange(last + 1), middle, profile)
    table[: last + 1] = np.minimum.accumulate(np.maximum(inner, 1e-12))
    table[0] = 1.0
    table[last:] = table[last] * (np.arange(last, FARTHEST) / last) ** WING_SLOPE
    return table


def _reach(correlation: DoubleArray, value: DoubleArray) -> DoubleArray:
    """Distance at which the correlation has fallen to a value [pixels]."""
    return np.asarray(np.interp(-value, -correlation, np.arange(len(correlation), dtype=np.float64)))


def _response(correlation: DoubleArray, distance: DoubleArray) -> DoubleArray:
    """Correlation at any distance [pixels]."""
    return np.asarray(np.interp(distance, np.arange(len(correlation), dtype=np.float64), correlation))


def peak_snr(coadd: Coadd, peaks: LabelArray, psfs: DoubleArray) -> DoubleArray:
    """Estimate the signal-to-noise of every peak as if it were a point, alone, all bands together.

    Parameters
    ----------
    coadd : Coadd
    peaks : ndarray, shape (N, 2)
        Array index (y, x).
    psfs : ndarray, shape (B, P, Q)

    Returns
    -------
    snr : ndarray, shape (N,)
        Square root of the sum over the bands of the squares of what is positive; 0 where no pixel is valid. From the
        pixels around the peak; where these tell little, as on saturated cores, from all that the PSF reaches.
    """
    half = max(psfs.shape[1:]) // 2
    snr, known = _matched(coadd, peaks, psfs, min(CORE, half))
    dark = np.flatnonzero(known < 0.25)
    if len(dark) and half > CORE:
        snr[dark], _ = _matched(coadd, peaks[dark], psfs, half)
    return snr


def _matched(coadd: Coadd, peaks: LabelArray, psfs: DoubleArray, half: int) -> tuple[DoubleArray, DoubleArray]:
    """Signal-to-noise of each peak by a matched filter on a square, and how much of its power lies on valid pixels.

    The second is the share in the best band; both (N,).
    """
    height, width = coadd.shape
    halves = [min(half, n // 2) for n in psfs.shape[1:]]
    dy, dx = (offset.ravel() for offset in np.mgrid[-halves[0] : halves[0] + 1, -halves[1] : halves[1] + 1])
    stamps = psfs[:, dy + psfs.shape[1] // 2, dx + psfs.shape[2] // 2]
    power = np.square(stamps).sum(axis=1)
    snr2, share = np.zeros(len(peaks)), np.zeros(len(peaks))
    for start in range(0, len(peaks), _PEAKS_AT_ONCE):
        rows = slice(start, start + _PEAKS_AT_ONCE)
        y, x = peaks[rows, :1] + dy, peaks[rows, 1:] + dx
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        pixel = np.where(inside, y * width + x, 0)
        for b, stamp in enumerate(stamps):
            if power[b] == 0:
                continue
            valid = coadd.valid[b].reshape(-1)[pixel] & inside
            weight = np.divide(stamp, coadd.variance[b].reshape(-1)[pixel], out=np.zeros(valid.shape), where=valid)
            signal = (np.where(valid, coadd.images[b].reshape(-1)[pixel], 0.0) * weight).sum(axis=1)
            norm = weight @ stamp
            snr2[rows] += np.divide(np.maximum(signal, 0.0) ** 2, norm, out=np.zeros_like(norm), where=norm > 0)
            np.maximum(share[rows], valid @ np.square(stamp) / power[b], out=share[rows])
    return np.sqrt(snr2), share


def nearest_peaks(peaks: LabelArray, box: Box) -> LabelArray:
    """Find the peak that is nearest to each pixel of a box.

    Parameters
    ----------
    peaks : ndarray, shape (N, 2)
        At least one.
    box : Box

    Returns
    -------
    nearest : ndarray, shape (h, w)
        Row of the peak; of those on one pixel the first.
    """
    window = box | Box.around(peaks)
    row = np.full(window.shape, -1, dtype=np.int32)
    place = peaks - np.array(window.origin)
    # Backwards, so that of equal peaks the first stays.
    row[place[::-1, 0], place[::-1, 1]] = np.arange(len(peaks) - 1, -1, -1)
    y, x = ndimage.distance_transform_edt(row < 0, return_distances=False, return_indices=True)
    own = box.within(window)
    return np.asarray(row[y[own], x[own]], dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Lights:
    """How strong the light of each source is at a distance, in standard deviations of the flux of a point there."""

    snr: DoubleArray
    """Signal-to-noise, without the light of what a source lies on, shape (N,)."""

    stretch: DoubleArray
    """How many times wider than a point it looks, shape (N,); 1 for bright sources."""

    correlation: DoubleArray
    """See `psf_correlation`."""

    bright: LabelArray
    """Rows of sources bright enough to see how far their light reaches, shape (M,), ascending."""

    profiles: DoubleArray
    """Their light in rings with the radii `RADII`, shape (M, len(RADII)), 0 from where it ends."""

    @property
    def reach(self) -> DoubleArray:
        """Distance at which the light of each source has fallen to one standard deviation [pixels]."""
        reach = self.stretch * _reach(self.correlation, np.minimum(1 / np.maximum(self.snr, 1.0), 1.0))
        above = self.profiles > 1
        last = np.where(above.any(axis=1), len(RADII) - 1 - np.argmax(above[:, ::-1], axis=1), 0)
        reach[self.bright] = np.maximum(reach[self.bright], RADII[last])
        return reach

    def at(self, sources: LabelArray, distance: DoubleArray) -> DoubleArray:
        """Light of some sources, each at a distance [pixels]."""
        light = self.snr[sources] * _response(self.correlation, distance / self.stretch[sources])
        measured = np.flatnonzero(np.isin(sources, self.bright))
        profiles = self.profiles[np.searchsorted(self.bright, sources[measured])]
        # Linear between rings, and constant inside the first and outside the last one.
        ring = np.clip(np.searchsorted(RADII, distance[measured]) - 1, 0, len(RADII) - 2)
        share = np.clip((distance[measured] - RADII[ring]) / np.diff(RADII)[ring], 0.0, 1.0)
        each = np.arange(len(measured))
        seen = (1 - share) * profiles[each, ring] + share * profiles[each, ring + 1]
        light[measured] = np.maximum(light[measured], seen)
        return np.asarray(light)


def measure_lights(
    coadd: Coadd,
    labels: LabelArray,
    parent: Parent,
    peaks: LabelArray,
    snr: DoubleArray,
    psfs: DoubleArray,
    level: float,
) -> Lights:
    """Estimate how far the light of the sources of a parent reaches.

    Parameters
    ----------
    coadd : Coadd
    labels : ndarray, shape (H, W)
        Footprint of each pixel.
    parent : Parent
    peaks : ndarray, shape (N, 2)
        Peaks of the parent, array index.
    snr : ndarray, shape (N,)
        See `peak_snr`.
    psfs : ndarray, shape (B, P, Q)
    level : float
        Significance at which the footprints end.

    Returns
    -------
    lights : Lights
        In the order of `peaks`. Pixels that are not valid do not count; a peak without any has no light.

    Notes
    -----
    Faint sources are points, stretched so that they end where the part of the footprint around them does. Of bright
    ones the medians in rings are measured, which neighbours hardly change, until they vanish or no longer fall.
    """
    correlation = psf_correlation(psfs)
    power = np.square(psfs).sum(axis=(1, 2))
    effective_area = float(np.median(1 / power[power > 0])) if (power > 0).any() else 1.0
    snr = snr.copy()
    hosts, profiles = [], []
    for s in np.argsort(-snr, kind="stable").tolist():
        if snr[s] <= BRIGHT:
            break
        medians = np.sqrt(effective_area) * _ring_medians(coadd, peaks[s])
        hosts.append(s)
        profiles.append(medians)
        # What lies on it is less bright than it looks, and how far that reaches cannot be seen.
        light = np.interp(np.hypot(*(peaks - peaks[s]).T), RADII, medians)
        inside = (light > HOSTED * snr) & (snr <= snr[s])
        inside[s] = False
        snr[inside] = np.maximum(np.minimum(snr[inside] - light[inside], BRIGHT), level)
    bright = np.sort(np.array(hosts, dtype=np.int64))
    own = labels[parent.box.y, parent.box.x] == parent.label
    area = np.bincount(nearest_peaks(peaks, parent.box)[own], minlength=len(peaks))
    point = _reach(correlation, np.minimum(level / np.maximum(snr, level), 1.0))
    stretch = np.clip(np.sqrt(area / np.pi) / np.maximum(point, 2.0), 1.0, WIDEST)
    stretch[bright] = 1.0
    return Lights(
        snr=snr,
        stretch=stretch,
        correlation=correlation,
        bright=bright,
        profiles=np.array(profiles).reshape(-1, len(RADII))[np.argsort(hosts, kind="stable")],
    )


def _ring_medians(coadd: Coadd, peak: LabelArray) -> DoubleArray:
    """Medians of the signal-to-noise per pixel, all bands together, in rings around a peak; 0 from where they end."""
    medians = np.zeros(len(RADII))
    image, square = np.zeros((0, 0)), np.zeros((0, 0))
    half = 0
    for k, radius in enumerate(RADII):
        if radius * _RING_FACTOR > half:
            half = 2 * int(np.ceil(radius * _RING_FACTOR))
            box = Box(int(peak[0]), int(peak[1]), 1, 1).grow(half) & Box.of_shape(coadd.shape)
            window = (slice(None), box.y, box.x)
            weights = np.divide(
                1.0, coadd.variance[window], out=np.zeros((coadd.n_bands, *box.shape)), where=coadd.valid[window]
            )
            total = weights.sum(axis=0)
            signal = np.where(weights > 0, coadd.images[window], 0.0) * weights
            image = np.divide(signal.sum(axis=0), np.sqrt(total), out=np.full(box.shape, np.nan), where=total > 0)
            y, x = np.ogrid[box.y0 : box.y1, box.x0 : box.x1]
            square = np.square(y - peak[0]) + np.square(x - peak[1])
        ring = image[(square >= (radius / _RING_FACTOR) ** 2) & (square < (radius * _RING_FACTOR) ** 2)]
        ring = ring[np.isfinite(ring)]
        if len(ring) == 0:
            # A saturated core: go on outside.
            medians[k] = np.inf if k == 0 else medians[k - 1]
            continue
        medians[k] = np.median(ring)
        ended = medians[k] < _LEAST_MEDIAN
        seen = medians[:k][np.isfinite(medians[:k])]
        # The core of a large galaxy is flat, too, but hardly rises.
        flat = len(seen) > 0 and (
            _FLAT * seen[-1] < medians[k] < _CORE_ENDS * seen.max() or medians[k] > _RISE * seen.min()
        )
        if ended or flat:
            # Where it no longer falls it is the light of a crowd, here and farther in.
            plateau = _CROWD * max(medians[k], seen[-1]) if flat else 0.0
            medians[:k] = np.maximum(medians[:k] - plateau, 0.0)
            medians[k:] = 0.0
            break
    return np.where(np.isfinite(medians), medians, medians[np.isfinite(medians)].max(initial=0.0))


def couple(peaks: LabelArray, lights: Lights, config: PartitionConfig) -> Couplings:
    """Find the pairs of sources whose light overlaps by more than is allowed to be left out.

    Parameters
    ----------
    peaks : ndarray, shape (N, 2)
    lights : Lights
    config : PartitionConfig

    Returns
    -------
    couplings : Couplings
        No pair twice, in the order of their rows.

    Notes
    -----
    Without the other source, the estimate ``sum(w m I) / sum(w m^2)`` of a flux is wrong by f' sum(w m m') / sum(w
    m^2), which is S/N' times the correlation of the two models in units of its error: the off-diagonal of the normal
    matrix of the fit. The models are those that are observed: what noise hides, no deconvolution brings back. The
    correlation of sources wider than a point is that of points at a distance that is smaller by as much.
    """
    from scipy.spatial import cKDTree

    if len(peaks) < 2:
        return Couplings(pairs=np.zeros((0, 2), dtype=np.int64), strength=np.zeros(0))
    tree = cKDTree(peaks)
    found = [tree.query_pairs(config.farthest, output_type="ndarray").astype(np.int64)]
    reach = lights.reach
    for s in lights.bright[reach[lights.bright] > config.farthest]:
        others = np.array(tree.query_ball_point(peaks[s], reach[s]), dtype=np.int64)
        others = others[others != s]
        found.append(np.stack([np.full(len(others), s), others], axis=1))
    pairs = np.unique(np.sort(np.concatenate(found), axis=1), axis=0)
    distance = np.hypot(*(peaks[pairs[:, 0]] - peaks[pairs[:, 1]]).T)
    strength = np.maximum(lights.at(pairs[:, 0], distance), lights.at(pairs[:, 1], distance))
    coupled = strength >= config.coupling
    return Couplings(pairs=pairs[coupled], strength=strength[coupled])


# ---------------------------------------------------------------- division into blends


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """Sources of a parent that are fitted together."""

    members: LabelArray
    """Rows of the sources that belong to it, shape (S,), at least one, in the order of their positions."""

    neighbors: LabelArray
    """Rows of sources of other parts that are fitted along, shape (T,), in the order of their positions."""

    reach: float
    """How far the light of its members stands out of the noise [pixels]; 0 if the parent is one part."""

    @classmethod
    def whole(cls, rows: LabelArray) -> Part:
        """Make the only part of a parent."""
        return cls(members=rows, neighbors=rows[:0], reach=0.0)


def in_order(rows: LabelArray, peaks: LabelArray) -> LabelArray:
    """Put rows of the list of peaks into the order of y, then x, then their own."""
    return rows[np.lexsort((rows, peaks[rows, 1], peaks[rows, 0]))]


def divide(rows: LabelArray, peaks: LabelArray, lights: Lights, config: PartitionConfig) -> tuple[Part, ...]:
    """Divide the sources of a parent that is too large, where they are coupled least.

    Parameters
    ----------
    rows : ndarray, shape (S,)
        Rows of the sources in the list of peaks, see `in_order`.
    peaks : ndarray, shape (N, 2)
        All peaks, array index.
    lights : Lights
        Of the sources, in the order of `rows`.
    config : PartitionConfig

    Returns
    -------
    parts : tuple of Part
        Each source is a member of exactly one, in the order of their first members.

    Notes
    -----
    Each cut is straight, across the longer side, leaves at least a quarter of the sources on both sides, and is where
    the couplings that it cuts have the smallest sum. O(N log N).
    """
    own = peaks[rows]
    couplings = couple(own, lights, config)
    part_of = np.zeros(len(rows), dtype=np.int64)
    n_parts, waiting = 1, [np.arange(len(rows))]
    while waiting:
        members = waiting.pop()
        if len(members) < 2 or not is_large(own[members], config):
            continue
        for piece in _cut(members, own, couplings, part_of):
            part_of[piece] = n_parts
            n_parts += 1
            waiting.append(piece)
    ends = part_of[couplings.pairs]
    crossing = ends[:, 0] != ends[:, 1]
    # Of each pair that was cut, either end is a neighbour of the part of the other.
    part = np.concatenate([ends[crossing, 0], ends[crossing, 1]])
    outside = np.concatenate([couplings.pairs[crossing, 1], couplings.pairs[crossing, 0]])
    reach = lights.reach
    parts = []
    for number in np.unique(part_of):
        members = np.flatnonzero(part_of == number)
        neighbors = np.unique(outside[part == number])
        parts.append(Part(members=rows[members], neighbors=rows[neighbors], reach=float(reach[members].max())))
    parts.sort(key=lambda part: tuple(peaks[part.members[0]].tolist()))
    return tuple(parts)


def is_large(peaks: LabelArray, config: PartitionConfig) -> bool:
    """Whether sources are too many, or spread too far, for one blend."""
    if config.largest_side == 0:
        return False
    return len(peaks) > config.most_sources or max(Box.around(peaks).shape) > config.largest_side


def _cut(
    members: LabelArray, peaks: LabelArray, couplings: Couplings, part_of: LabelArray
) -> tuple[LabelArray, LabelArray]:
    """Cut a part in two."""
    n = len(members)
    positions = peaks[members]
    extent = np.ptp(positions, axis=0)
    along = int(extent[1] > extent[0])
    order = np.lexsort((members, positions[:, 1 - along], positions[:, along]))
    rank = np.empty(len(part_of), dtype=np.int64)
    rank[members[order]] = np.arange(n)
    number = part_of[members[0]]
    ends = part_of[couplings.pairs]
    inside = (ends[:, 0] == number) & (ends[:, 1] == number)
    ranks = np.sort(rank[couplings.pairs[inside]], axis=1)
    # A cut after place k goes through all pairs with first <= k < last.
    change = np.zeros(n + 1)
    np.add.at(change, ranks[:, 0], couplings.strength[inside])
    np.add.at(change, ranks[:, 1], -couplings.strength[inside])
    cost = np.cumsum(change)[: n - 1]
    fewest = max(n // 4, 1)
    places = np.arange(fewest - 1, n - fewest)
    best = places[np.lexsort((places, np.abs(2 * (places + 1) - n), np.round(cost[places], 6)))[0]]
    return members[order[: best + 1]], members[order[best + 1 :]]
