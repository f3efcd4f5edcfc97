"""Which peaks are modelled together: those of one footprint, or of several that come close."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from kermes.errors import ShapeError
from kermes.geometry import Box

LabelArray = NDArray[np.int64]


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
    grown = ndimage.distance_transform_edt(~covered) <= 0.5 * distance
    joined = ndimage.label(grown, structure=np.ones((3, 3), dtype=bool))[0]
    return np.where(covered, joined, 0).astype(np.int64)


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
