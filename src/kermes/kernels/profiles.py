"""Sersic profiles at the Fourier modes of a stamp, with derivatives by position, size, shape and index."""

from typing import NamedTuple

import numpy as np

from kermes.kernels.decorator import fast_kernel, kernel

N_COLUMNS = 7
"""Amplitude, then derivatives by y, x, ln r, e1, e2 and ln n."""

CELL_BITS = 20
"""Bits of the mantissa of a float32 below those that number the 8 cells of an octave."""


FIRST_CELL = (127 - 34) << 3
"""Bits above those of the float32 at which the first cell of the table starts: 2^-34."""


class Table(NamedTuple):
    """Transforms of circular profiles, see `kermes.profiles.ProfileTable`."""

    values: np.ndarray
    slopes: np.ndarray
    """Shape (indices, cells + 1)."""

    ln_index: np.ndarray
    """First ln n, and the step from row to row."""

    exponential: np.ndarray
    """`interpolate_index` for n = 1, shape (cells, 6)."""


@kernel
def interpolate_index(values, slopes, ln_index, ln_n, cells):
    """Interpolate the table in ln n, cubic through the four nearest rows (Lagrange).

    cells (C, 6) float32 takes for each cell the four coefficients of a cubic in the place 0 <= t < 1 inside (Hermite),
    and the derivative by ln n at t = 0 with its change to t = 1.
    """
    n_rows, n_edges = values.shape
    step = ln_index[1]
    place = (ln_n - ln_index[0]) / step
    first = min(max(int(place) - 1, 0), n_rows - 4)
    t = place - first
    w0, w1 = -(t - 1) * (t - 2) * (t - 3) / 6, t * (t - 2) * (t - 3) / 2
    w2, w3 = -t * (t - 1) * (t - 3) / 2, t * (t - 1) * (t - 2) / 6
    d0 = -((t - 2) * (t - 3) + (t - 1) * (t - 3) + (t - 1) * (t - 2)) / (6 * step)
    d1 = ((t - 2) * (t - 3) + t * (t - 3) + t * (t - 2)) / (2 * step)
    d2 = -((t - 1) * (t - 3) + t * (t - 3) + t * (t - 1)) / (2 * step)
    d3 = ((t - 1) * (t - 2) + t * (t - 2) + t * (t - 1)) / (6 * step)
    v0, s0, n0 = 0.0, 0.0, 0.0
    for k in range(n_edges):
        a, b, c, d = values[first, k], values[first + 1, k], values[first + 2, k], values[first + 3, k]
        v1, n1 = w0 * a + w1 * b + w2 * c + w3 * d, d0 * a + d1 * b + d2 * c + d3 * d
        s1 = w0 * slopes[first, k] + w1 * slopes[first + 1, k] + w2 * slopes[first + 2, k] + w3 * slopes[first + 3, k]
        if k > 0:
            # The width of a cell relative to q^2 at its left edge is 1 / (8 + number in the octave).
            number = (k - 1) % 8
            left, right = s0 / (8 + number), s1 / (9 + number)
            cells[k - 1, 0] = v0
            cells[k - 1, 1] = left
            cells[k - 1, 2] = 3 * (v1 - v0) - 2 * left - right
            cells[k - 1, 3] = 2 * (v0 - v1) + left + right
            cells[k - 1, 4] = n0
            cells[k - 1, 5] = n1 - n0
        v0, s0, n0 = v1, s1, n1


# Loops over all modes are kernels of their own: as such their arrays are known to start at zero, and few enough to be
# told apart, without which they would not vectorise.


@fast_kernel
def look_up(cells, squares, bits, values, by_radius, by_index):
    """Interpolate a profile and its derivatives by ln r and by ln n at q^2; bits are those of the squares."""
    last = len(cells) - 1
    for m in range(len(squares)):
        cell = min(max((bits[m] >> CELL_BITS) - FIRST_CELL, 0), last)
        t = np.float32(bits[m] & ((1 << CELL_BITS) - 1)) * np.float32(1.0 / (1 << CELL_BITS))
        values[m] = cells[cell, 0] + t * (cells[cell, 1] + t * (cells[cell, 2] + t * cells[cell, 3]))
        slope = cells[cell, 1] + t * (2 * cells[cell, 2] + 3 * t * cells[cell, 3])
        by_radius[m] = 2 * slope * (np.float32(8 + (cell & 7)) + t)
        by_index[m] = cells[cell, 4] + t * cells[cell, 5]


@fast_kernel
def scale_modes(factors, re, im, sign, out_re, out_im):
    """Multiply modes with real factors; the second part with a sign too."""
    for m in range(len(factors)):
        out_re[m] = factors[m] * re[m]
        out_im[m] = sign * factors[m] * im[m]


@fast_kernel
def bend_modes(by_radius, squares, fy, fx, yy, yx, xx, out):
    """Derivative of a profile by what changes q^2 by yy fy^2 + yx fy fx + xx fx^2."""
    for m in range(len(out)):
        change = yy * fy[m] * fy[m] + (yx * fy[m] + xx * fx[m]) * fx[m]
        out[m] = np.float32(0.5) * by_radius[m] / squares[m] * change


@kernel
def evaluate_profile(cells, lengths, side, shape, extended, columns):
    """Evaluate one component of flux one at the modes of a stamp.

    Parameters
    ----------
    cells : (C, 6) float32
        From `interpolate_index`.
    lengths : (side,) int
        Row i of the half plane has the modes 0 .. lengths[i] - 1.
    shape : (5,)
        y, x [pixels from the corner], ln r, e1, e2.
    extended : bool
        False: a point source, of which the last four derivatives are left alone.
    columns : (N, 2, M) float32
        Takes real and imaginary parts of the transform and its derivatives, the first N of N_COLUMNS: 1, 3, 6 or all.
    """
    n_columns = len(columns)
    y, x, ln_r, e1, e2 = shape[0], shape[1], shape[2], shape[3], shape[4]
    half = side // 2 + 1
    unit = 2 * np.pi / side
    ellipticity = np.sqrt(e1 * e1 + e2 * e2)
    if ellipticity > 1e-4:
        cosh, ratio = np.cosh(ellipticity), np.sinh(ellipticity) / ellipticity
        bend = (cosh - ratio) / (ellipticity * ellipticity)
    else:
        cosh, ratio, bend = 1.0, 1.0, 1.0 / 3.0
    # q^2, and r^2 times its derivatives by e1 and e2, are quadratic forms yy fy^2 + yx fy fx + xx fx^2.
    square = np.exp(2 * ln_r)
    q_yy, q_yx, q_xx = square * (cosh - ratio * e1), square * 2 * ratio * e2, square * (cosh + ratio * e1)
    a_yy = square * (ratio * e1 - bend * e1 * e1 - ratio)
    a_yx, a_xx = square * 2 * bend * e1 * e2, square * (ratio * e1 + bend * e1 * e1 + ratio)
    b_yy, b_xx = square * (ratio * e2 - bend * e1 * e2), square * (ratio * e2 + bend * e1 * e2)
    b_yx = square * 2 * (bend * e2 * e2 + ratio)
    phase = np.empty((2, half), np.float32)
    wave = np.empty(half, np.float32)
    for j in range(half):
        wave[j] = unit * j
        phase[0, j], phase[1, j] = np.cos(unit * j * x), -np.sin(unit * j * x)
    work = np.empty((9, columns.shape[2]), np.float32)
    re, im, fy, fx, squares = work[0], work[1], work[2], work[3], work[4]
    m = 0
    for i in range(side):
        frequency = unit * (i if 2 * i < side else i - side)
        re_y, im_y = np.float32(np.cos(frequency * y)), np.float32(-np.sin(frequency * y))
        c0, c1 = np.float32(q_yy * frequency * frequency), np.float32(q_yx * frequency)
        c2 = np.float32(q_xx)
        for j in range(lengths[i]):
            re[m] = re_y * phase[0, j] - im_y * phase[1, j]
            im[m] = re_y * phase[1, j] + im_y * phase[0, j]
            fy[m] = frequency
            fx[m] = wave[j]
            squares[m] = c0 + wave[j] * (c1 + wave[j] * c2) + np.float32(1e-30)
            m += 1
    values, by_radius, by_index, factors = work[5], work[6], work[7], work[8]
    plus, minus = np.float32(1.0), np.float32(-1.0)
    if extended:
        look_up(cells, squares, squares.view(np.int32), values, by_radius, by_index)
    else:
        for k in range(len(values)):
            values[k] = plus
    scale_modes(values, re, im, plus, columns[0, 0], columns[0, 1])
    if n_columns > 1:
        scale_modes(fy, columns[0, 1], columns[0, 0], minus, columns[1, 0], columns[1, 1])
        scale_modes(fx, columns[0, 1], columns[0, 0], minus, columns[2, 0], columns[2, 1])
    if n_columns > 3 and extended:
        scale_modes(by_radius, re, im, plus, columns[3, 0], columns[3, 1])
        yy, yx, xx = np.float32(a_yy), np.float32(a_yx), np.float32(a_xx)
        bend_modes(by_radius, squares, fy, fx, yy, yx, xx, factors)
        scale_modes(factors, re, im, plus, columns[4, 0], columns[4, 1])
        yy, yx, xx = np.float32(b_yy), np.float32(b_yx), np.float32(b_xx)
        bend_modes(by_radius, squares, fy, fx, yy, yx, xx, factors)
        scale_modes(factors, re, im, plus, columns[5, 0], columns[5, 1])
        if n_columns > 6:
            scale_modes(by_index, re, im, plus, columns[6, 0], columns[6, 1])
