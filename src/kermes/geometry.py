"""Rectangles of integer pixels, and sets of pixels as runs of rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, slots=True)
class Box:
    """Half-open rectangle of integer pixels: y0 <= y < y0 + height, x0 <= x < x0 + width.

    A box with a side of zero is empty; sides are never negative.
    """

    y0: int
    """First row."""

    x0: int
    """First column."""

    height: int
    """Number of rows."""

    width: int
    """Number of columns."""

    def __post_init__(self) -> None:
        if self.height < 0 or self.width < 0:
            raise ValueError(f"a box must have sides >= 0, got height {self.height}, width {self.width}")

    @classmethod
    def from_bounds(cls, y0: int, y1: int, x0: int, x1: int) -> Box:
        """Make the box y0 <= y < y1, x0 <= x < x1; empty when a bound is crossed."""
        return cls(int(y0), int(x0), max(0, int(y1) - int(y0)), max(0, int(x1) - int(x0)))

    @classmethod
    def of_shape(cls, shape: tuple[int, ...], y0: int = 0, x0: int = 0) -> Box:
        """Make the box of an array: its last two axes, first pixel at (y0, x0)."""
        return cls(int(y0), int(x0), int(shape[-2]), int(shape[-1]))

    @classmethod
    def around(cls, points: ArrayLike) -> Box:
        """Make the smallest box that holds all pixels of `points`, shape (N, 2); empty for N = 0."""
        points = np.asarray(points, dtype=np.int64).reshape(-1, 2)
        if not len(points):
            return cls(0, 0, 0, 0)
        (y0, x0), (y1, x1) = points.min(axis=0), points.max(axis=0)
        return cls.from_bounds(y0, y1 + 1, x0, x1 + 1)

    @classmethod
    def where(cls, condition: NDArray[np.bool_]) -> Box:
        """Make the smallest box that holds every True pixel of a (H, W) array."""
        rows, columns = np.flatnonzero(condition.any(axis=1)), np.flatnonzero(condition.any(axis=0))
        if not len(rows):
            return cls(0, 0, 0, 0)
        return cls.from_bounds(rows[0], rows[-1] + 1, columns[0], columns[-1] + 1)

    @property
    def y1(self) -> int:
        """Row after the last one."""
        return self.y0 + self.height

    @property
    def x1(self) -> int:
        """Column after the last one."""
        return self.x0 + self.width

    @property
    def y(self) -> slice:
        """Rows as a slice of an array whose first pixel is (0, 0)."""
        return slice(self.y0, self.y1)

    @property
    def x(self) -> slice:
        """Columns as a slice of an array whose first pixel is (0, 0)."""
        return slice(self.x0, self.x1)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width

    @property
    def origin(self) -> tuple[int, int]:
        """First pixel (y0, x0)."""
        return self.y0, self.x0

    @property
    def area(self) -> int:
        """Number of pixels."""
        return self.height * self.width

    @property
    def is_empty(self) -> bool:
        """Whether it holds no pixel."""
        return self.area == 0

    def __contains__(self, point: tuple[float, float]) -> bool:
        y, x = point
        return self.y0 <= y < self.y1 and self.x0 <= x < self.x1

    def __and__(self, other: Box) -> Box:
        """Pixels in both; empty when the two are apart."""
        y0, x0 = max(self.y0, other.y0), max(self.x0, other.x0)
        y1, x1 = min(self.y0 + self.height, other.y0 + other.height), min(self.x0 + self.width, other.x0 + other.width)
        return Box(y0, x0, max(y1 - y0, 0), max(x1 - x0, 0))

    def __or__(self, other: Box) -> Box:
        """Smallest box around both; an empty box adds nothing."""
        if self.is_empty or other.is_empty:
            return other if self.is_empty else self
        return Box.from_bounds(
            min(self.y0, other.y0), max(self.y1, other.y1), min(self.x0, other.x0), max(self.x1, other.x1)
        )

    def grow(self, n_pixels: int) -> Box:
        """Add `n_pixels` on every side; negative shrinks, down to empty."""
        return Box.from_bounds(self.y0 - n_pixels, self.y1 + n_pixels, self.x0 - n_pixels, self.x1 + n_pixels)

    def shift(self, dy: int, dx: int) -> Box:
        """Move by whole pixels."""
        return Box(self.y0 + int(dy), self.x0 + int(dx), self.height, self.width)

    def within(self, outer: Box) -> tuple[slice, slice]:
        """Slices that cut the pixels shared with `outer` out of an array that covers `outer`."""
        common = self & outer
        return (
            slice(common.y0 - outer.y0, common.y1 - outer.y0),
            slice(common.x0 - outer.x0, common.x1 - outer.x0),
        )


def box_table(boxes: Iterable[Box], origin: tuple[int, int] = (0, 0)) -> NDArray[np.int64]:
    """List boxes as kernels take them: y0, x0, height and width of each, counted from `origin`, shape (K, 4)."""
    table = np.array([(box.y0, box.x0, box.height, box.width) for box in boxes], dtype=np.int64).reshape(-1, 4)
    table[:, :2] -= origin
    return table


@dataclass(frozen=True, slots=True, eq=False)
class Footprint:
    """A set of pixels: runs of pixels in rows."""

    spans: NDArray[np.int64]
    """Row, first column and the column after the last one of each run, shape (N, 3), in the order of pixels."""

    @classmethod
    def of_mask(cls, mask: NDArray[np.bool_], y0: int = 0, x0: int = 0) -> Footprint:
        """Make the footprint of the True pixels of a (h, w) array whose first pixel is (y0, x0)."""
        rows, columns, ends = _runs(np.asarray(mask, dtype=bool))
        return cls(np.stack([rows + y0, columns + x0, ends + x0], axis=1))

    @property
    def box(self) -> Box:
        """Smallest box around it."""
        if not len(self.spans):
            return Box(0, 0, 0, 0)
        rows, columns, ends = self.spans.T
        return Box.from_bounds(rows[0], rows[-1] + 1, columns.min(), ends.max())

    @property
    def area(self) -> int:
        """Number of pixels."""
        return int((self.spans[:, 2] - self.spans[:, 1]).sum())

    def pixels(self) -> NDArray[np.int64]:
        """List its pixels (y, x), row by row, shape (area, 2)."""
        rows, columns, ends = self.spans.T
        lengths = ends - columns
        firsts = np.cumsum(lengths) - lengths
        x = np.arange(lengths.sum()) + np.repeat(columns - firsts, lengths)
        return np.stack([np.repeat(rows, lengths), x], axis=1)

    def mask(self, box: Box) -> NDArray[np.bool_]:
        """Say which pixels of a box it holds, shape of the box."""
        mask = np.zeros(box.shape, dtype=bool)
        y, x = self.pixels().T
        inside = (y >= box.y0) & (y < box.y1) & (x >= box.x0) & (x < box.x1)
        mask[y[inside] - box.y0, x[inside] - box.x0] = True
        return mask

    def shift(self, dy: int, dx: int) -> Footprint:
        """Move by whole pixels."""
        return Footprint(self.spans + np.array([dy, dx, dx]))


def _runs(labels: NDArray[np.bool_] | NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
    """Rows, first columns and ends of all runs of equal values that are not 0 in a (h, w) array."""
    if labels.size == 0:
        return (np.zeros(0, dtype=np.int64),) * 3
    starts = np.ones(labels.shape, dtype=bool)
    np.not_equal(labels[:, 1:], labels[:, :-1], out=starts[:, 1:])
    first = np.flatnonzero(starts)
    end = np.append(first[1:], labels.size)
    lit = labels.ravel()[first] != 0
    rows, columns = np.divmod(first[lit], labels.shape[1])
    return rows, columns, columns + end[lit] - first[lit]


class Footprints(Mapping[int, Footprint]):
    """Footprints by number, in flat arrays."""

    def __init__(self, numbers: NDArray[np.int64], offsets: NDArray[np.int64], spans: NDArray[np.int64]) -> None:
        self.numbers = numbers
        """Number of each footprint, shape (K,)."""
        self.offsets = offsets
        """Footprint k has the runs offsets[k]:offsets[k + 1], shape (K + 1,)."""
        self.spans = spans
        """Runs of all footprints, shape (N, 3)."""
        self._places = {number: place for place, number in enumerate(numbers.tolist())}

    @classmethod
    def of(cls, footprints: Mapping[int, Footprint] | Iterable[tuple[int, Footprint]]) -> Footprints:
        """Put footprints together."""
        pairs = dict(footprints)
        spans = [footprint.spans for footprint in pairs.values()]
        offsets = np.cumsum([0, *(len(each) for each in spans)]).astype(np.int64)
        joined = np.concatenate([np.zeros((0, 3), dtype=np.int64), *spans])
        return cls(np.array([*pairs], dtype=np.int64), offsets, joined)

    @classmethod
    def of_labels(cls, labels: NDArray[np.int64], numbers: Mapping[int, int]) -> Footprints:
        """Make the footprints of an image of labels (H, W).

        Parameters
        ----------
        labels : ndarray
            Footprint of each pixel, 0 outside.
        numbers : mapping of int to int
            Number of each label that is wanted.
        """
        rows, columns, ends = _runs(labels)
        owner = labels[rows, columns]
        order = np.argsort(owner, kind="stable")
        spans, owner = np.stack([rows, columns, ends], axis=1)[order], owner[order]
        wanted = np.array([*numbers], dtype=np.int64)
        first, last = np.searchsorted(owner, wanted), np.searchsorted(owner, wanted, side="right")
        pieces = [spans[a:b] for a, b in zip(first.tolist(), last.tolist(), strict=True)]
        return cls.of(zip(numbers.values(), map(Footprint, pieces), strict=True))

    def shifted(self, dy: int, dx: int) -> Footprints:
        """Move all of them by whole pixels."""
        return Footprints(self.numbers, self.offsets, self.spans + np.array([dy, dx, dx]))

    def __getitem__(self, number: int) -> Footprint:
        place = self._places[number]
        return Footprint(self.spans[self.offsets[place] : self.offsets[place + 1]])

    def __iter__(self) -> Iterator[int]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
