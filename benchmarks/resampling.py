"""How sure a row of a table is: intervals from resampling the sources, and what they say about a reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

DoubleArray = NDArray[np.float64]

FEWEST = 50
"""A row with fewer measurements decides nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure of a row, smaller is better; `low` and `high` bound its size with 95 % confidence."""

    value: float
    low: float
    high: float

    def against(self, reference: float) -> str:
        """Say whether this is better or worse than a reference, or equal within the noise."""
        size = abs(reference)
        if size > self.high:
            return "better"
        return "worse" if size < self.low else "equal"


def scatter(values: DoubleArray) -> float:
    """Robust standard deviation; NaN without values."""
    return float(1.4826 * np.median(np.abs(values - np.median(values)))) if len(values) else float("nan")


def _figures(error: DoubleArray, scaled: DoubleArray) -> tuple[float, float, float]:
    good = np.isfinite(error)
    bias = float(np.median(error[good])) if good.any() else float("nan")
    return scatter(scaled[good]), bias, float(np.mean(~(np.abs(error) <= 0.5)))


def figures_of_row(
    error: DoubleArray, scaled: DoubleArray, source: NDArray[Any], n_resamples: int
) -> tuple[Figure, Figure, Figure]:
    """Work out scatter, bias and share of the wrong, each with its interval.

    Parameters
    ----------
    error : ndarray, shape (N,)
        Errors, whose median is the bias; wrong is what is beyond 0.5 or not finite.
    scaled : ndarray, shape (N,)
        Errors in the unit that the scatter is given in.
    source : ndarray, shape (N,)
        Which source was measured; all measurements of a source are resampled together.
    n_resamples : int
    """
    rng = np.random.default_rng(1)
    values = _figures(error, scaled)
    names, index = np.unique(source, return_inverse=True)
    drawn = np.empty((n_resamples, 3))
    for n in range(n_resamples):
        counts = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))
        rows = np.repeat(np.arange(len(error)), counts[index])
        drawn[n] = _figures(error[rows], scaled[rows])
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    # The size of a bias whose sign is not certain may be zero.
    bias = (0.0 if low[1] <= 0 <= high[1] else min(abs(low[1]), abs(high[1])), max(abs(low[1]), abs(high[1])))
    # None wrong among n sources: fewer than 3 / n are, with 95 % confidence.
    wrong = max(high[2], 3.0 / len(names)) if values[2] == 0 else high[2]
    return (
        Figure(value=values[0], low=float(low[0]), high=float(high[0])),
        Figure(value=values[1], low=float(bias[0]), high=float(bias[1])),
        Figure(value=values[2], low=float(low[2]), high=float(wrong)),
    )


def heading(names: tuple[str, ...]) -> str:
    """Head the columns of `describe`."""
    return "".join(f" | {name:>8s} {'peer':>8s} {'95 %':>15s} {'':6s}" for name in names)


def describe(figure: Figure, reference: float) -> str:
    """Give a figure, the reference, the interval and the verdict."""
    return (
        f" | {figure.value:+8.3f} {reference:+8.3f} {figure.low:7.3f} {figure.high:7.3f} {figure.against(reference):6s}"
    )
