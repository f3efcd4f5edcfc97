"""The Sersic family in Fourier space: one table of transforms for every index, radius and shape.

A profile of half-light radius r and log-shear (e1, e2) has at the wave vector (ky, kx) the transform F(q; n) with

    q^2 = r^2 [k^2 cosh(e) + (e1 (kx^2 - ky^2) + 2 e2 kx ky) sinh(e) / e],   e^2 = e1^2 + e2^2,

where F is that of the circular profile of half-light radius and flux one. Its axis ratio is exp(-e), its radius the
geometric mean of the half-axes of the ellipse that holds half the light.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import scipy.fft
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline
from scipy.special import gamma, gammaincinv

from kermes.kernels import profiles as kernels

DoubleArray = NDArray[np.float64]

LEAST_INDEX, LARGEST_INDEX = 0.5, 6.5
"""Range of the Sersic indices of the table."""

N_INDICES = 48
"""Rows of the table, equally spaced in ln n."""

LEAST_EXPONENT, LARGEST_EXPONENT = -34, 22
"""Range of the table in q^2, as powers of two."""

CELLS = 8
"""Cells of the table between one power of two and the next, equally wide in q^2: their number and the place inside can
be read off the bits of q^2 as a float, without a logarithm."""


@dataclass(frozen=True, slots=True, eq=False)
class ProfileTable:
    """Transforms of circular Sersic profiles of half-light radius and flux one, at the edges of the cells.

    Interpolated by cubics in q^2 and ln n they are within 3e-6 of the transform.
    """

    values: DoubleArray
    """Transforms, shape (N_INDICES, edges)."""

    slopes: DoubleArray
    """Derivatives by ln q^2, shape (N_INDICES, edges)."""

    ln_index: DoubleArray
    """ln n of the rows."""


def frequencies_of(lengths: NDArray[np.int64]) -> NDArray[np.float32]:
    """Frequencies along y and x [radians per pixel] of the first modes of each row of a half plane.

    Parameters
    ----------
    lengths : ndarray, shape (side,)
        Number of modes of each row, zero frequency first, as numpy.fft orders them.

    Returns
    -------
    frequencies : ndarray, shape (2, M)
    """
    frequencies = np.empty((2, lengths.sum()), dtype=np.float32)
    kernels.fill_frequencies(lengths, frequencies)
    return frequencies


def intensity(radius: DoubleArray, index: float) -> DoubleArray:
    """Evaluate the circular Sersic profile of half-light radius one and flux one (Graham & Driver 2005, eq. 1-4)."""
    b = gammaincinv(2 * index, 0.5)
    central = b ** (2 * index) / (2 * np.pi * index * gamma(2 * index))
    return np.asarray(central * np.exp(-b * radius ** (1 / index)))


def _transform(index: float) -> CubicSpline:
    """Transform one profile by a logarithmic Hankel transform (Hamilton 2000, appendix B), as function of ln q^2."""
    # Wide enough that no end of the range, where the transform rings, comes near what is used.
    radius = np.logspace(-12, 9, 4608)
    step = float(np.log(radius[1] / radius[0]))
    offset = scipy.fft.fhtoffset(step, mu=0)
    q = np.exp(offset) / radius[::-1]
    values = 2 * np.pi * scipy.fft.fht(radius * intensity(radius, index), step, mu=0, offset=offset) / q
    used = (q > 1e-6) & (q < 1e4)
    return CubicSpline(2 * np.log(q[used]), values[used])


@lru_cache(maxsize=1)
def profile_table() -> ProfileTable:
    """Make the table; it is kept for the life of the process."""
    ln_index = np.linspace(np.log(LEAST_INDEX), np.log(LARGEST_INDEX), N_INDICES)
    exponents = np.arange(LEAST_EXPONENT, LARGEST_EXPONENT)
    edges = np.outer(2.0**exponents, 1 + np.arange(CELLS) / CELLS).ravel()
    ln_square = np.log(np.append(edges, 2.0**LARGEST_EXPONENT))
    transforms = [_transform(float(np.exp(ln_n))) for ln_n in ln_index]
    values = np.array([transform(ln_square) for transform in transforms])
    slopes = np.array([transform(ln_square, 1) for transform in transforms])
    return ProfileTable(values=values, slopes=slopes, ln_index=ln_index)
