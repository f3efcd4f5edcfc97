"""Rectangles of integer pixels."""

from __future__ import annotations

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
        return Box.from_bounds(
            max(self.y0, other.y0), min(self.y1, other.y1), max(self.x0, other.x0), min(self.x1, other.x1)
        )

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
