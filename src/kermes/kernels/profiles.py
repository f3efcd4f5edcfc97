"""Sersic profiles at the Fourier modes of a stamp, with derivatives by position, size, shape and index."""

from typing import NamedTuple

import numpy as np

from kermes.kernels.decorator import allocating_kernel, kernel

N_COLUMNS = 7
"""Amplitude, then derivatives by y, x, ln r, e1, e2 and ln n."""

CELL_BITS = 20
"""Bits of the mantissa of a float32 below those that number the 8 cells of an octave."""


FIRST_CELL = (127 - 34) << 3
"""Bits above those of the float32 at which the first cell of the table starts: 2^-34."""

AS_POINT, AS_EXPONENTIAL, AS_TABLE = 0, 1, 2
"""How a profile is evaluated: not at all, in closed form, from the cells of `interpolate_index`."""

SQUARE_OF_EXPONENTIAL = 1.6783469900166605**-2
"""Squared scale length of an exponential profile of half-light radius one."""


class Table(NamedTuple):
    """Transforms of circular profiles, see `kermes.profiles.ProfileTable`."""

    values: np.ndarray
    slopes: np.ndarray
    """Shape (indices, cells + 1)."""

    ln_index: np.ndarray
    """First ln n, and the step from row to row."""


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


@kernel
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


@kernel
def look_up_exponential(squares, values, by_radius):
    """Evaluate an exponential profile, (1 + h^2 k^2)^(-3/2) with its scale length h, and the derivative by ln r."""
    scale = np.float32(SQUARE_OF_EXPONENTIAL)
    for m in range(len(squares)):
        inverse = np.float32(1.0) / (np.float32(1.0) + scale * squares[m])
        values[m] = inverse * np.sqrt(inverse)
        # h^2 k^2 over one more than that is one less the inverse, which no radius makes overflow.
        by_radius[m] = np.float32(3.0) * (inverse - np.float32(1.0)) * values[m]


@kernel
def multiply(a, b, out):
    """Products of the elements."""
    for m in range(len(out)):
        out[m] = a[m] * b[m]


@kernel
def turn_modes(factors, re, im, out_re, out_im):
    """Multiply modes with real factors and with -i."""
    for m in range(len(factors)):
        out_re[m] = factors[m] * im[m]
        out_im[m] = -(factors[m] * re[m])


@kernel
def bend_modes(by_radius, squares, fy, fx, yy, yx, xx, out):
    """Derivative of a profile by what changes q^2 by yy fy^2 + yx fy fx + xx fx^2."""
    for m in range(len(out)):
        change = yy * fy[m] * fy[m] + (yx * fy[m] + xx * fx[m]) * fx[m]
        out[m] = np.float32(0.5) * by_radius[m] / squares[m] * change


@kernel
def fill_frequencies(lengths, out):
    """Frequencies along y and x [radians per pixel] of the first modes of each row of a half plane, out (2, >= M).

    lengths (side,): number of modes of each row, zero frequency first; rows from the middle on have negative ones.
    """
    side, n = len(lengths), 0
    unit = 2 * np.pi / side
    for i in range(side):
        for j in range(lengths[i]):
            out[0, n], out[1, n] = unit * (i if 2 * i < side else i - side), unit * j
            n += 1


@kernel
def fill_phases(angle, out):
    """Real and imaginary parts (2, N) of exp(-i j angle), each from the one before, in double precision."""
    re, im = 1.0, 0.0
    cosine, sine = np.cos(angle), -np.sin(angle)
    for j in range(out.shape[1]):
        out[0, j], out[1, j] = re, im
        re, im = re * cosine - im * sine, re * sine + im * cosine


@kernel
def turn_row(re, im, by_re, by_im, out_re, out_im):
    """Product of complex numbers with one."""
    for j in range(len(re)):
        out_re[j] = by_re * re[j] - by_im * im[j]
        out_im[j] = by_re * im[j] + by_im * re[j]


@kernel
def fill_squares(fy, fx, yy, yx, xx, out):
    """The quadratic form q^2, never quite zero."""
    for m in range(len(out)):
        out[m] = yy * fy[m] * fy[m] + (yx * fy[m] + xx * fx[m]) * fx[m] + np.float32(1e-30)


@kernel
def turn_rows(lengths, rows, columns, wave):
    """Multiply the phases (2, side // 2 + 1) of the rows of a half plane with those of its columns, where modes are."""
    side = len(lengths)
    last = 0
    for i in range(side):
        first, last = last, last + lengths[i]
        if first < last:
            # Rows from the middle on have negative frequencies.
            k, sign = (i, np.float32(1.0)) if 2 * i < side else (side - i, np.float32(-1.0))
            re, im = columns[0, : lengths[i]], columns[1, : lengths[i]]
            turn_row(re, im, rows[0, k], sign * rows[1, k], wave[0, first:last], wave[1, first:last])


@allocating_kernel
def fill_wave(lengths, y, x, wave):
    """Real and imaginary parts (2, M) of exp(-i f . x) at the modes of a stamp; y, x [pixels from the corner]."""
    side = len(lengths)
    unit = 2 * np.pi / side
    rows, columns = np.empty((2, side // 2 + 1), np.float32), np.empty((2, side // 2 + 1), np.float32)
    fill_phases(unit * y, rows)
    fill_phases(unit * x, columns)
    turn_rows(lengths, rows, columns, wave)


@allocating_kernel
def evaluate_factors(form, cells, lengths, frequencies, shape, wave, factors):
    """Evaluate one component of flux one at the modes of a stamp, as real factors of one wave.

    Parameters
    ----------
    form : int
        `AS_POINT`, which has no last four derivatives: they are left alone; `AS_EXPONENTIAL`, which has no last one; or
        `AS_TABLE`.
    cells : (C, 6) float32
        From `interpolate_index`, for `AS_TABLE`.
    lengths : (side,) int
        Row i of the half plane has the modes 0 .. lengths[i] - 1.
    frequencies : (2, M) float32
        Of the modes, along y and x [radians per pixel].
    shape : (5,)
        y, x [pixels from the corner], ln r, e1, e2.
    wave : (2, M) float32
        Takes real and imaginary parts of exp(-i f . x), which a shift to the centre x does.
    factors : (N, M) float32
        Takes the first N of N_COLUMNS: 1, 3, 6 or all. Times the wave they are the transform and its derivatives; those
        by y and x also times -i.
    """
    n_columns, n_modes = factors.shape
    fill_wave(lengths, shape[0], shape[1], wave)
    values, fy, fx = factors[0], frequencies[0], frequencies[1]
    if form == AS_POINT:
        for m in range(n_modes):
            values[m] = 1.0
    else:
        ln_r, e1, e2 = shape[2], shape[3], shape[4]
        ellipticity = np.sqrt(e1 * e1 + e2 * e2)
        if ellipticity > 1e-4:
            cosh, ratio = np.cosh(ellipticity), np.sinh(ellipticity) / ellipticity
            bend = (cosh - ratio) / (ellipticity * ellipticity)
        else:
            cosh, ratio, bend = 1.0, 1.0, 1.0 / 3.0
        # q^2, and r^2 times its derivatives by e1 and e2, are quadratic forms yy fy^2 + yx fy fx + xx fx^2.
        square = np.exp(2 * ln_r)
        work = np.empty((3, n_modes), np.float32)
        squares, by_radius, by_index = work[0], work[1], work[2]
        yy, yx = np.float32(square * (cosh - ratio * e1)), np.float32(square * 2 * ratio * e2)
        fill_squares(fy, fx, yy, yx, np.float32(square * (cosh + ratio * e1)), squares)
        if form == AS_EXPONENTIAL:
            look_up_exponential(squares, values, by_radius)
        else:
            look_up(cells, squares, squares.view(np.int32), values, by_radius, by_index)
        if n_columns > 3:
            for m in range(n_modes):
                factors[3, m] = by_radius[m]
            yy = np.float32(square * (ratio * e1 - bend * e1 * e1 - ratio))
            yx = np.float32(square * 2 * bend * e1 * e2)
            xx = np.float32(square * (ratio * e1 + bend * e1 * e1 + ratio))
            bend_modes(by_radius, squares, fy, fx, yy, yx, xx, factors[4])
            yy = np.float32(square * (ratio * e2 - bend * e1 * e2))
            yx = np.float32(square * 2 * (bend * e2 * e2 + ratio))
            xx = np.float32(square * (ratio * e2 + bend * e1 * e2))
            bend_modes(by_radius, squares, fy, fx, yy, yx, xx, factors[5])
        if n_columns > 6 and form == AS_TABLE:
            for m in range(n_modes):
                factors[6, m] = by_index[m]
    if n_columns > 1:
        multiply(fy, values, factors[1])
        multiply(fx, values, factors[2])


@kernel
def fill_column(factors, wave, j, out):
    """Real and imaginary parts (2, M) of column j of a component, from its factors (M,) and wave (2, M)."""
    if j == 1 or j == 2:
        turn_modes(factors, wave[0], wave[1], out[0], out[1])
    else:
        multiply(factors, wave[0], out[0])
        multiply(factors, wave[1], out[1])


@allocating_kernel
def evaluate_profile(form, cells, lengths, frequencies, shape, columns):
    """Evaluate one component of flux one at the modes of a stamp.

    Arguments as in `evaluate_factors`; columns (N, 2, M) float32 takes real and imaginary parts of the transform and
    its derivatives, the first N of N_COLUMNS.
    """
    n_columns = len(columns)
    wave = np.empty(columns.shape[1:], np.float32)
    factors = np.empty((n_columns, columns.shape[2]), np.float32)
    evaluate_factors(form, cells, lengths, frequencies, shape, wave, factors)
    for j in range(min(n_columns, 3 if form == AS_POINT else 6 if form == AS_EXPONENTIAL else N_COLUMNS)):
        fill_column(factors[j], wave, j, columns[j])
