"""The single-band deblender: the test for point sources, symmetric templates, and stray flux."""

from typing import NamedTuple

import numpy as np

from kermes.kernels.decorator import allocating_kernel, inlined_kernel, kernel

POINT = 1
OUT_OF_BOUNDS = 2
TINY_FOOTPRINT = 4
NO_VALID_PIXELS = 8
BAD_DOF = 16
BIG_DECENTER = 32
DECENTERED = 64
FAILED_SYMMETRIC = 128
RAMPED = 256
PATCHED = 512
DEGENERATE = 1024
NO_LIGHT = 2048

CLIP, RAMP, PATCH = 0, 1, 2
TRIM, TO_PEAK, TO_FOOTPRINT, NEAREST = 0, 1, 2, 3
NEVER, NECESSARY, ALWAYS = 0, 1, 2

RINGS = 5
"""Rings that cast their shadows together, and how far a shadow reaches [pixels]."""

HALF_ANGLE = 0.3
"""Half the width of a shadow for each pixel of its length."""

RAMP_SIGMA = 3.0
"""A template that is brighter than this at the edge of its footprint is continued [sigma]."""

SMALLEST_MOVE = 0.05
"""A point source that has to be moved by less is where it is [pixels]."""

FIRST_RADIUS = 12
"""Templates are first made on so many pixels to each side; the box grows until they end in it."""

N_FIT = 12
"""Numbers that the test for point sources leaves: flux, offset in y and in x, number of neighbours, R0, R1, and chi2
with degrees of freedom of the fits with a fixed centre, with derivatives, and with the centre moved."""


class Settings(NamedTuple):
    """What `build_templates` is told."""

    find_points: bool
    chi2_fixed: float
    chi2_derivatives: float
    chi2_moved: float
    moves: int
    tiny: int
    unbiased: bool
    least: float
    edges: int
    median_half: int
    monotonic: bool


# ---------------------------------------------------------------- test for point sources


@allocating_kernel
def shift_stamp(psf, dy, dx):
    """Shift a stamp by less than a pixel: Lanczos interpolation of order 5, weights that sum to one. O(P Q)."""
    taps = np.empty((2, 11))
    for axis in range(2):
        shift = dy if axis == 0 else dx
        total = 0.0
        for i in range(11):
            # Pixel n takes what was in pixel n + i - 5.
            distance = np.pi * (i - 5 + shift)
            value = 1.0
            if abs(distance) > 1e-12:
                value = 5.0 * np.sin(distance) * np.sin(distance / 5.0) / (distance * distance)
            if abs(i - 5 + shift) >= 5.0:
                value = 0.0
            taps[axis, i] = value
            total += value
        for i in range(11):
            taps[axis, i] /= total
    height, width = psf.shape
    along_x = np.empty((height, width))
    for y in range(height):
        for x in range(width):
            value = 0.0
            for i in range(11):
                if 0 <= x + i - 5 < width:
                    value += taps[1, i] * psf[y, x + i - 5]
            along_x[y, x] = value
    shifted = np.empty((height, width))
    for y in range(height):
        for x in range(width):
            value = 0.0
            for i in range(11):
                if 0 <= y + i - 5 < height:
                    value += taps[0, i] * along_x[y + i - 5, x]
            shifted[y, x] = value
    return shifted


@inlined_kernel
def at(stamp, y, x):
    """Value of a stamp, zero outside."""
    value = 0.0
    if 0 <= y < stamp.shape[0] and 0 <= x < stamp.shape[1]:
        value = stamp[y, x]
    return value


@kernel
def factorize(matrix):
    """Cholesky factor of a normal matrix in its lower triangle, in place.

    A column that adds nothing to those before it (1e-10 of its square is left) gets a zero, and takes no part.
    """
    for i in range(len(matrix)):
        own = matrix[i, i]
        left = own
        for j in range(i):
            value = matrix[i, j]
            for k in range(j):
                value -= matrix[i, k] * matrix[j, k]
            matrix[i, j] = value / matrix[j, j] if matrix[j, j] > 0 else 0.0
            left -= matrix[i, j] * matrix[i, j]
        matrix[i, i] = np.sqrt(left) if left > 1e-10 * own else 0.0


@kernel
def project(factor, right):
    """Solve factor z = right in place: the sum of the squares of the first n is what the first n columns explain."""
    for i in range(len(right)):
        value = right[i]
        for k in range(i):
            value -= factor[i, k] * right[k]
        right[i] = value / factor[i, i] if factor[i, i] > 0 else 0.0


@allocating_kernel
def coefficients(factor, projected, n):
    """Solve factor^T x = projected for the first n columns; returns (n,)."""
    x = np.zeros(n)
    for i in range(n - 1, -1, -1):
        value = projected[i]
        for k in range(i + 1, n):
            value -= factor[k, i] * x[k]
        x[i] = value / factor[i, i] if factor[i, i] > 0 else 0.0
    return x


@allocating_kernel
def normal_equations(columns, data):
    """Normal matrix (its lower triangle) and right side of weighted columns (n, m) and data (m,)."""
    n, m = columns.shape
    matrix, right = np.zeros((n, n)), np.zeros(n)
    for i in range(n):
        for j in range(i + 1):
            value = 0.0
            for p in range(m):
                value += columns[i, p] * columns[j, p]
            matrix[i, j] = value
        value = 0.0
        for p in range(m):
            value += columns[i, p] * data[p]
        right[i] = value
    return matrix, right


@allocating_kernel
def test_point(image, variance, usable, bounds, peaks, k, psf, fwhm, settings, fit):
    """Test whether peak k is a point source, and write what was found into `fit` (N_FIT,).

    A linear fit in a circle of R1 = 1.5 FWHM with weights ramp / variance, the ramp falling from 1 at R0 = FWHM to 0:
    the PSF, a constant, a slope along x and along y, the PSF at all neighbours that reach into the circle, and the
    derivatives of the PSF along y and x, once without them and once with. If these make it a point the PSF is moved to
    where they say and fitted again, and the better one counts; with more than one move also if they do not, as the
    derivatives of a bright star do not reach far, until it is one or the moves become small.

    image, variance, usable (h, w); usable: in the footprint with a positive variance; bounds (4,): y0, y1, x0, x1 of
    the footprint. Returns flags.
    O(columns^2 FWHM^2).
    """
    y, x = peaks[k, 0], peaks[k, 1]
    height, width = psf.shape
    inner, outer = np.ceil(fwhm), np.ceil(1.5 * fwhm)
    reach = outer + min(height, width) / 2.0
    fit[:] = np.nan
    fit[4], fit[5] = inner, outer
    if not (bounds[0] <= y < bounds[1] and bounds[2] <= x < bounds[3]):
        return OUT_OF_BOUNDS
    radius = int(outer)
    top, bottom = max(y - radius, bounds[0]), min(y + radius + 1, bounds[1])
    left, right = max(x - radius, bounds[2]), min(x + radius + 1, bounds[3])
    if min(bottom - top, right - left) <= max(settings.tiny, 2):
        return TINY_FOOTPRINT
    places = np.empty(((bottom - top) * (right - left), 2), dtype=np.int64)
    roots = np.empty(len(places))
    m, weight = 0, 0.0
    for v in range(top, bottom):
        for u in range(left, right):
            distance = np.sqrt(float((v - y) ** 2 + (u - x) ** 2))
            if not usable[v, u] or distance > outer:
                continue
            ramp = 1.0 if distance <= inner else (outer - distance) / (outer - inner)
            places[m, 0], places[m, 1] = v, u
            roots[m] = np.sqrt(ramp / variance[v, u])
            weight += ramp
            m += 1
    if m == 0:
        return NO_VALID_PIXELS

    near = np.empty(len(peaks), dtype=np.int64)
    n_near = 0
    half_y, half_x = height // 2, width // 2
    for j in range(len(peaks)):
        dy, dx = peaks[j, 0], peaks[j, 1]
        if j == k or (dy - y) ** 2 + (dx - x) ** 2 > reach * reach:
            continue
        if dy - half_y < bottom and dy + half_y >= top and dx - half_x < right and dx + half_x >= left:
            near[n_near] = j
            n_near += 1
    fit[3] = n_near

    columns = np.empty((4 + n_near + 2, m))
    data = np.empty(m)
    square = 0.0
    for p in range(m):
        v, u, root = places[p, 0], places[p, 1], roots[p]
        row, column = v - y + half_y, u - x + half_x
        columns[0, p] = at(psf, row, column) * root
        columns[1, p] = root
        columns[2, p] = (u - x) * root
        columns[3, p] = (v - y) * root
        for j in range(n_near):
            other = peaks[near[j]]
            columns[4 + j, p] = at(psf, v - other[0] + half_y, u - other[1] + half_x) * root
        columns[4 + n_near, p] = 0.5 * (at(psf, row - 1, column) - at(psf, row + 1, column)) * root
        columns[5 + n_near, p] = 0.5 * (at(psf, row, column - 1) - at(psf, row, column + 1)) * root
        data[p] = image[v, u] * root
        square += data[p] * data[p]

    n_fixed = 4 + n_near
    matrix, projected = normal_equations(columns, data)
    factorize(matrix)
    project(matrix, projected)
    chi2 = square
    for i in range(n_fixed):
        chi2 -= projected[i] * projected[i]
    fit[6], fit[7] = chi2, weight - n_fixed
    fit[8], fit[9] = chi2 - projected[n_fixed] ** 2 - projected[n_fixed + 1] ** 2, weight - n_fixed - 2
    if fit[7] <= 0 or fit[9] <= 0:
        return BAD_DOF

    fixed = coefficients(matrix, projected, n_fixed)
    is_fixed = fixed[0] > 0 and fit[6] / fit[7] < settings.chi2_fixed
    is_moved, flags = False, 0
    with_derivatives, flux, dy, dx = fit[8], 0.0, 0.0, 0.0
    for move in range(settings.moves):
        free = coefficients(matrix, projected, n_fixed + 2)
        explained = with_derivatives / fit[9] < settings.chi2_derivatives
        if not free[0] > 0 or (not explained and move == settings.moves - 1):
            break
        step_y, step_x = free[n_fixed] / free[0], free[n_fixed + 1] / free[0]
        if move > 0 and max(abs(step_y), abs(step_x)) < SMALLEST_MOVE:
            break
        dy, dx = dy + step_y, dx + step_x
        if max(abs(dy), abs(dx)) >= 1:
            flags = BIG_DECENTER if explained else 0
            break
        moved = shift_stamp(psf, dy, dx)
        for p in range(m):
            row, column = places[p, 0] - y + half_y, places[p, 1] - x + half_x
            columns[0, p] = at(moved, row, column) * roots[p]
            columns[n_fixed, p] = 0.5 * (at(moved, row - 1, column) - at(moved, row + 1, column)) * roots[p]
            columns[n_fixed + 1, p] = 0.5 * (at(moved, row, column - 1) - at(moved, row, column + 1)) * roots[p]
        matrix, projected = normal_equations(columns, data)
        factorize(matrix)
        project(matrix, projected)
        chi2 = square
        for i in range(n_fixed):
            chi2 -= projected[i] * projected[i]
        with_derivatives = chi2 - projected[n_fixed] ** 2 - projected[n_fixed + 1] ** 2
        flux = coefficients(matrix, projected, n_fixed)[0]
        fit[10], fit[11] = chi2, fit[7]
        is_moved = flux > 0 and fit[10] / fit[11] < settings.chi2_moved
        if is_moved:
            break
    if is_moved and not (is_fixed and fit[6] / fit[7] <= fit[10] / fit[11]):
        fit[0], fit[1], fit[2] = flux, dy, dx
        return POINT | DECENTERED
    if is_fixed:
        fit[0], fit[1], fit[2] = fixed[0], 0.0, 0.0
        flags |= POINT
    return flags


# ---------------------------------------------------------------- symmetric templates


@kernel
def symmetric_values(image, variance, valid, inside, bounds, y, x, unbiased, patched, out):
    """Fill `out` (2 a + 1, 2 b + 1) with the smaller one of each pixel and its mirror about (y, x).

    Zero where one of the two is outside the footprint, and never negative; where only one is valid that one counts.
    The minimum of two values with noise is low by sqrt((V1 + V2) / (2 pi)), 0.56 sigma, if both see the same light, and
    not if they do not. `unbiased` adds sqrt(2) exp(-d^2 / 2) times that, d their difference over its error, which is
    right on average for equal light and nothing where it differs; negative values are then left for what smooths.
    patched: pixels whose mirror is outside the bounds count by themselves.
    """
    half_y, half_x = out.shape[0] // 2, out.shape[1] // 2
    for dy in range(-half_y, half_y + 1):
        for dx in range(-half_x, half_x + 1):
            out[dy + half_y, dx + half_x] = 0.0
            v, u, mirror_v, mirror_u = y + dy, x + dx, y - dy, x - dx
            if not (bounds[0] <= v < bounds[1] and bounds[2] <= u < bounds[3]) or not inside[v, u]:
                continue
            value = np.float32(0.0)
            if bounds[0] <= mirror_v < bounds[1] and bounds[2] <= mirror_u < bounds[3]:
                if not inside[mirror_v, mirror_u]:
                    continue
                if valid[v, u] and valid[mirror_v, mirror_u]:
                    one, other = image[v, u], image[mirror_v, mirror_u]
                    value = min(one, other)
                    both = variance[v, u] + variance[mirror_v, mirror_u]
                    if unbiased and both > 0 and (dy != 0 or dx != 0):
                        difference2 = (one - other) * (one - other) / both
                        value += np.sqrt(both * np.float32(1.0 / np.pi)) * np.exp(np.float32(-0.5) * difference2)
                elif valid[v, u]:
                    value = image[v, u]
                elif valid[mirror_v, mirror_u]:
                    value = image[mirror_v, mirror_u]
            elif patched and valid[v, u]:
                value = image[v, u]
            out[dy + half_y, dx + half_x] = value if unbiased else max(value, np.float32(0.0))


@allocating_kernel
def median_filter(values, half, limit_y, limit_x, least, out):
    """Median of (2 half + 1)^2 pixels of `values` in the smaller array `out` of the same centre; zero up to `least`.

    Pixels within `half` of the edge of the largest box, limit_y and limit_x to each side, are copied, and all if it is
    smaller than the filter. O(pixels half^2 log half).
    """
    cut_y, cut_x = values.shape[0] // 2, values.shape[1] // 2
    half_y, half_x = out.shape[0] // 2, out.shape[1] // 2
    side = 2 * half + 1
    window = np.empty(side * side, dtype=np.float32)
    whole = 2 * limit_y + 1 >= side and 2 * limit_x + 1 >= side
    for dy in range(-half_y, half_y + 1):
        for dx in range(-half_x, half_x + 1):
            value = values[dy + cut_y, dx + cut_x]
            if half > 0 and whole and abs(dy) <= limit_y - half and abs(dx) <= limit_x - half:
                # Only positive ones are sorted: most pixels around a source do not have enough of them.
                n = 0
                for v in range(dy + cut_y - half, dy + cut_y + half + 1):
                    for u in range(dx + cut_x - half, dx + cut_x + half + 1):
                        if values[v, u] > 0:
                            place = n
                            while place > 0 and window[place - 1] < values[v, u]:
                                window[place] = window[place - 1]
                                place -= 1
                            window[place] = values[v, u]
                            n += 1
                middle = side * side // 2
                value = window[middle] if n > middle else np.float32(0.0)
            out[dy + half_y, dx + half_x] = value if value > least else np.float32(0.0)


@inlined_kernel
def rounded(value):
    """Nearest integer, halves away from zero, so that what is flipped stays so."""
    return int(np.floor(value + 0.5)) if value >= 0 else -int(np.floor(0.5 - value))


@inlined_kernel
def cast(template, v, u, value):
    """Cap one pixel, if there is one."""
    if 0 <= v < template.shape[0] and 0 <= u < template.shape[1] and template[v, u] > value:
        template[v, u] = value


@allocating_kernel
def cast_shadows(template):
    """Make a template (2 a + 1, 2 b + 1) fall from its centre outwards, in place.

    Each pixel of the square ring L caps those in a wedge behind it, for `RINGS` pixels: at distance s, those from
    round(s (t - A)) to round(s (t + A)) along the side, t its slope seen from the centre and A `HALF_ANGLE`. Rings cast
    the values they had before the `RINGS` rings that they belong to began to, so that shadows do not fan out.
    """
    height, width = template.shape
    half_y, half_x = height // 2, width // 2
    last = max(half_y, half_x)
    frozen = np.empty((height, width), dtype=np.float32)
    for first in range(0, last, RINGS):
        reach = min(first + RINGS - 1, last)
        for v in range(max(half_y - reach, 0), min(half_y + reach + 1, height)):
            for u in range(max(half_x - reach, 0), min(half_x + reach + 1, width)):
                frozen[v, u] = template[v, u]
        for ring in range(first, reach + 1):
            if ring == 0:
                value = frozen[half_y, half_x]
                for v in range(max(half_y - RINGS, 0), min(half_y + RINGS + 1, height)):
                    for u in range(max(half_x - RINGS, 0), min(half_x + RINGS + 1, width)):
                        template[v, u] = min(template[v, u], value)
                continue
            for side in range(-ring, ring + 1):
                slope = side / ring
                for sign in (-1, 1):
                    v, u = half_y + side, half_x + sign * ring
                    if 0 <= v < height and 0 <= u < width:
                        value = frozen[v, u]
                        for step in range(1, RINGS + 1):
                            begin = rounded(step * (slope - HALF_ANGLE))
                            end = rounded(step * (slope + HALF_ANGLE))
                            for aside in range(begin, end + 1):
                                cast(template, v + aside, u + sign * step, value)
                    v, u = half_y + sign * ring, half_x + side
                    if 0 <= v < height and 0 <= u < width:
                        value = frozen[v, u]
                        for step in range(1, RINGS + 1):
                            begin = rounded(step * (slope - HALF_ANGLE))
                            end = rounded(step * (slope + HALF_ANGLE))
                            for aside in range(begin, end + 1):
                                cast(template, v + sign * step, u + aside, value)


@allocating_kernel
def first_empty_ring(template):
    """Number of the first square ring about the centre without light; -1 if there is none."""
    height, width = template.shape
    half_y, half_x = height // 2, width // 2
    brightest = np.zeros(max(half_y, half_x) + 1, dtype=np.float32)
    for v in range(height):
        for u in range(width):
            ring = max(abs(v - half_y), abs(u - half_x))
            brightest[ring] = max(brightest[ring], template[v, u])
    for ring in range(len(brightest)):
        if brightest[ring] <= 0:
            return ring
    return -1


@allocating_kernel
def make_template(image, variance, valid, inside, bounds, y, x, limit_y, limit_x, settings, patched):
    """Make the template about (y, x): symmetric, smooth, monotonic, as set; an array (2 a + 1, 2 b + 1) about it.

    limit_y, limit_x: farthest that it may reach. What is monotonic ends at the first ring without light, so that a
    template costs what its own area does and not that of the footprint.
    """
    farthest = max(limit_y, limit_x)
    radius = FIRST_RADIUS if settings.monotonic else farthest
    half = settings.median_half
    while True:
        half_y, half_x = min(radius, limit_y), min(radius, limit_x)
        more_y, more_x = min(radius + half, limit_y), min(radius + half, limit_x)
        values = np.empty((2 * more_y + 1, 2 * more_x + 1), dtype=np.float32)
        symmetric_values(image, variance, valid, inside, bounds, y, x, settings.unbiased, patched, values)
        template = np.empty((2 * half_y + 1, 2 * half_x + 1), dtype=np.float32)
        median_filter(values, half, limit_y, limit_x, settings.least, template)
        if not settings.monotonic:
            return template
        cast_shadows(template)
        end = first_empty_ring(template)
        if end >= 0:
            half_y, half_x = min(max(end - 1, 0), half_y), min(max(end - 1, 0), half_x)
            top, left = template.shape[0] // 2 - half_y, template.shape[1] // 2 - half_x
            return template[top : top + 2 * half_y + 1, left : left + 2 * half_x + 1].copy()
        if radius >= farthest:
            return template
        radius *= 2


@inlined_kernel
def in_both(inside, bounds, y, x, dy, dx):
    """Whether a pixel and its mirror about (y, x) are in the footprint."""
    v, u, mirror_v, mirror_u = y + dy, x + dx, y - dy, x - dx
    result = False
    if bounds[0] <= min(v, mirror_v) and max(v, mirror_v) < bounds[1]:
        if bounds[2] <= min(u, mirror_u) and max(u, mirror_u) < bounds[3]:
            result = inside[v, u] and inside[mirror_v, mirror_u]
    return result


@allocating_kernel
def bright_edge(image, valid, inside, bounds, y, x, half_y, half_x, threshold):
    """Pixels at the edge of the symmetric footprint with a symmetric value of at least `threshold`.

    Those up to half_y, half_x from the centre. Returns offsets (n, 2) from the centre and values (n,).
    """
    offsets = np.empty(((2 * half_y + 1) * (2 * half_x + 1), 2), dtype=np.int64)
    values = np.empty(len(offsets), dtype=np.float32)
    n = 0
    for dy in range(-half_y, half_y + 1):
        for dx in range(-half_x, half_x + 1):
            if not in_both(inside, bounds, y, x, dy, dx):
                continue
            if (
                in_both(inside, bounds, y, x, dy - 1, dx)
                and in_both(inside, bounds, y, x, dy + 1, dx)
                and in_both(inside, bounds, y, x, dy, dx - 1)
                and in_both(inside, bounds, y, x, dy, dx + 1)
            ):
                continue
            if valid[y + dy, x + dx] and valid[y - dy, x - dx]:
                value = min(image[y + dy, x + dx], image[y - dy, x - dx])
                if value >= threshold:
                    offsets[n, 0], offsets[n, 1], values[n] = dy, dx, value
                    n += 1
    return offsets[:n], values[:n]


@allocating_kernel
def ramped_template(image, variance, valid, inside, bounds, y, x, limit_y, limit_x, edge, values, psf, grow, settings):
    """Make the template about (y, x) once more, beyond the footprint: on the image where there is one, else on ramps.

    The footprint is grown by `grow` pixels; where that leaves the image, each pixel of the bright edge (n, 2) and
    values (n,) continues as the PSF with its peak there, the brightest counts.
    """
    half_y, half_x = limit_y + grow, limit_x + grow
    height, width = 2 * half_y + 1, 2 * half_x + 1
    light = np.zeros((height, width), dtype=np.float32)
    noise = np.zeros((height, width), dtype=np.float32)
    used = np.zeros((height, width), dtype=np.bool_)
    whole = np.ones((height, width), dtype=np.bool_)
    for v in range(height):
        for u in range(width):
            row, column = y + v - half_y, x + u - half_x
            if bounds[0] <= row < bounds[1] and bounds[2] <= column < bounds[3] and inside[row, column]:
                for other_v in range(max(v - grow, 0), min(v + grow + 1, height)):
                    for other_u in range(max(u - grow, 0), min(u + grow + 1, width)):
                        used[other_v, other_u] = True
    for v in range(height):
        for u in range(width):
            row, column = y + v - half_y, x + u - half_x
            if used[v, u] and 0 <= row < image.shape[0] and 0 <= column < image.shape[1] and valid[row, column]:
                light[v, u], noise[v, u] = image[row, column], variance[row, column]
    ramp = np.zeros((height, width), dtype=np.float32)
    middle_y, middle_x = psf.shape[0] // 2, psf.shape[1] // 2
    peak = psf[middle_y, middle_x]
    for n in range(len(edge)):
        for dy in range(-min(grow, middle_y), min(grow, middle_y) + 1):
            for dx in range(-min(grow, middle_x), min(grow, middle_x) + 1):
                v, u = edge[n, 0] + half_y + dy, edge[n, 1] + half_x + dx
                if 0 <= v < height and 0 <= u < width:
                    ramp[v, u] = max(ramp[v, u], values[n] * psf[middle_y + dy, middle_x + dx] / peak)
    for v in range(height):
        for u in range(width):
            if light[v, u] == 0:
                light[v, u] = ramp[v, u]
    everywhere = np.array([0, height, 0, width])
    return make_template(light, noise, whole, used, everywhere, half_y, half_x, half_y, half_x, settings, False)


@allocating_kernel
def point_template(psf, flux, dy, dx, inside, bounds, y, x):
    """Light of a point source inside the footprint, an array about (y, x) of the shape of the PSF."""
    stamp = shift_stamp(psf, dy, dx) if dy != 0 or dx != 0 else psf
    height, width = psf.shape
    template = np.zeros((height, width), dtype=np.float32)
    for v in range(height):
        for u in range(width):
            row, column = y + v - height // 2, x + u - width // 2
            if bounds[0] <= row < bounds[1] and bounds[2] <= column < bounds[3] and inside[row, column]:
                template[v, u] = max(flux * stamp[v, u], 0.0)
    return template


@kernel
def touches(edge, inside, bounds, y, x, half_y, half_x):
    """Whether a pixel of the symmetric footprint is one of the `edge` (h, w)."""
    for dy in range(-half_y, half_y + 1):
        for dx in range(-half_x, half_x + 1):
            if in_both(inside, bounds, y, x, dy, dx) and edge[y + dy, x + dx]:
                return True
    return False


@kernel
def extended_template(image, variance, valid, inside, edge, bounds, y, x, psf, fwhm, sigma, settings):
    """Template of a peak that is no point, an array about (y, x), and its flags."""
    near_y, near_x = min(y - bounds[0], bounds[1] - 1 - y), min(x - bounds[2], bounds[3] - 1 - x)
    flags = 0
    if settings.edges == PATCH and touches(edge, inside, bounds, y, x, near_y, near_x):
        far_y, far_x = max(y - bounds[0], bounds[1] - 1 - y), max(x - bounds[2], bounds[3] - 1 - x)
        template = make_template(image, variance, valid, inside, bounds, y, x, far_y, far_x, settings, True)
        return template, PATCHED
    template = make_template(image, variance, valid, inside, bounds, y, x, near_y, near_x, settings, False)
    if settings.edges == RAMP:
        half_y, half_x = min(template.shape[0] // 2 + 1, near_y), min(template.shape[1] // 2 + 1, near_x)
        offsets, values = bright_edge(image, valid, inside, bounds, y, x, half_y, half_x, RAMP_SIGMA * sigma)
        if len(offsets):
            grow = int((1.5 * fwhm + 0.5) / 2) * 2 + 1
            limit_y, limit_x = min(near_y, 2 * half_y), min(near_x, 2 * half_x)
            template = ramped_template(
                image, variance, valid, inside, bounds, y, x, limit_y, limit_x, offsets, values, psf, grow, settings
            )
            flags = RAMPED
    return template, flags


@allocating_kernel
def append(pixels, start, template, y, x, shape, box):
    """Append the part of a template about (y, x) that has light and lies in the image; writes its box (4,).

    Returns the pixels, with more room where there was too little.
    """
    half_y, half_x = template.shape[0] // 2, template.shape[1] // 2
    top, bottom, left, right = shape[0], 0, shape[1], 0
    for v in range(max(half_y - y, 0), min(template.shape[0], shape[0] - y + half_y)):
        for u in range(max(half_x - x, 0), min(template.shape[1], shape[1] - x + half_x)):
            if template[v, u] > 0:
                row, column = v + y - half_y, u + x - half_x
                top, bottom = min(top, row), max(bottom, row + 1)
                left, right = min(left, column), max(right, column + 1)
    height, width = max(bottom - top, 0), max(right - left, 0)
    if height == 0:
        top, left = y, x
    box[0], box[1], box[2], box[3] = top, left, height, width
    n = height * width
    if start + n > len(pixels):
        larger = np.empty(2 * (start + n), dtype=np.float32)
        for i in range(start):
            larger[i] = pixels[i]
        pixels = larger
    for v in range(height):
        for u in range(width):
            pixels[start + v * width + u] = template[v + top - y + half_y, u + left - x + half_x]
    return pixels


@allocating_kernel
def build_templates(image, variance, valid, inside, edge, bounds, peaks, psf, fwhm, sigma, settings, fits):
    """Make the template of every peak (K, 2) of a footprint.

    image, variance, valid, inside, edge (h, w); `bounds` (4,): y0, y1, x0, x1 of what is inside; sigma: noise of a
    pixel; fits (K, N_FIT) is written. Returns boxes (K, 4), offsets (K + 1,), pixels (offsets[-1],) and flags (K,).
    O(sum of the areas of the templates).
    """
    n = len(peaks)
    boxes = np.zeros((n, 4), dtype=np.int64)
    offsets = np.zeros(n + 1, dtype=np.int64)
    flags = np.zeros(n, dtype=np.int64)
    pixels = np.empty(n * 512, dtype=np.float32)
    usable = np.empty(image.shape, dtype=np.bool_)
    for v in range(image.shape[0]):
        for u in range(image.shape[1]):
            usable[v, u] = inside[v, u] and valid[v, u]
    for k in range(n):
        y, x = peaks[k, 0], peaks[k, 1]
        state = 0
        if settings.find_points:
            state = test_point(image, variance, usable, bounds, peaks, k, psf, fwhm, settings, fits[k])
        template = np.zeros((1, 1), dtype=np.float32)
        if state & POINT:
            template = point_template(psf, fits[k, 0], fits[k, 1], fits[k, 2], inside, bounds, y, x)
        elif not state & (OUT_OF_BOUNDS | TINY_FOOTPRINT | NO_VALID_PIXELS):
            at_home = bounds[0] <= y < bounds[1] and bounds[2] <= x < bounds[3] and inside[y, x]
            if at_home:
                template, more = extended_template(
                    image, variance, valid, inside, edge, bounds, y, x, psf, fwhm, sigma, settings
                )
                state |= more
            else:
                state |= FAILED_SYMMETRIC
        pixels = append(pixels, offsets[k], template, y, x, image.shape, boxes[k])
        offsets[k + 1] = offsets[k] + boxes[k, 2] * boxes[k, 3]
        if boxes[k, 2] == 0:
            state |= NO_LIGHT
        flags[k] = state
    return boxes, offsets, pixels[: offsets[n]].copy(), flags


# ---------------------------------------------------------------- templates that are alike


@allocating_kernel
def similar_pairs(boxes, offsets, pixels, least):
    """Pairs j < i of templates with sum(t_i t_j) / sqrt(sum(t_i^2) sum(t_j^2)) above `least`.

    The sums are over the pixels that both have. Returns (n, 2) of i and j, ascending, and the ratios (n,). O(K^2 +
    pixels that overlap).
    """
    pairs = np.empty((16, 2), dtype=np.int64)
    ratios = np.empty(16)
    n = 0
    for i in range(len(boxes)):
        for j in range(i):
            top, left = max(boxes[i, 0], boxes[j, 0]), max(boxes[i, 1], boxes[j, 1])
            bottom = min(boxes[i, 0] + boxes[i, 2], boxes[j, 0] + boxes[j, 2])
            right = min(boxes[i, 1] + boxes[i, 3], boxes[j, 1] + boxes[j, 3])
            if top >= bottom or left >= right:
                continue
            product, one2, other2 = 0.0, 0.0, 0.0
            for v in range(top, bottom):
                own = offsets[i] + (v - boxes[i, 0]) * boxes[i, 3] - boxes[i, 1]
                its = offsets[j] + (v - boxes[j, 0]) * boxes[j, 3] - boxes[j, 1]
                for u in range(left, right):
                    one, other = float(pixels[own + u]), float(pixels[its + u])
                    if one != 0 and other != 0:
                        product += one * other
                        one2 += one * one
                        other2 += other * other
            if one2 > 0 and other2 > 0 and product > least * np.sqrt(one2 * other2):
                if n == len(ratios):
                    more_pairs, more_ratios = np.empty((2 * n, 2), dtype=np.int64), np.empty(2 * n)
                    for m in range(n):
                        more_pairs[m, 0], more_pairs[m, 1], more_ratios[m] = pairs[m, 0], pairs[m, 1], ratios[m]
                    pairs, ratios = more_pairs, more_ratios
                pairs[n, 0], pairs[n, 1], ratios[n] = i, j, product / np.sqrt(one2 * other2)
                n += 1
    return pairs[:n], ratios[:n]


# ---------------------------------------------------------------- stray flux


@inlined_kernel
def box_distance2(box, y, x):
    """Square of the distance of a pixel from a box."""
    dy = max(box[0] - y, y - (box[0] + box[2] - 1), 0)
    dx = max(box[1] - x, x - (box[1] + box[3] - 1), 0)
    return dy * dy + dx * dx


@allocating_kernel
def lit_rows(boxes, offsets, pixels):
    """First and last lit column of each row of each template, and where the rows of each begin.

    What lies between belongs to its footprint. Returns columns (R, 2), the first larger than the last in an empty row,
    and starts (K + 1,).
    """
    n = len(boxes)
    starts = np.zeros(n + 1, dtype=np.int64)
    for k in range(n):
        starts[k + 1] = starts[k] + boxes[k, 2]
    columns = np.empty((starts[n], 2), dtype=np.int64)
    for k in range(n):
        for v in range(boxes[k, 2]):
            first, last = 1, 0
            for u in range(boxes[k, 3]):
                if pixels[offsets[k] + v * boxes[k, 3] + u] > 0:
                    column = boxes[k, 1] + u
                    first, last = (column, column) if last < first else (first, column)
            columns[starts[k] + v, 0], columns[starts[k] + v, 1] = first, last
    return columns, starts


@kernel
def footprint_distance2(top, columns, y, x, best):
    """Square of the distance of a pixel from the nearest one of a footprint, if less than `best`.

    columns (h, 2): first and last column of the rows from `top` on.
    """
    for v in range(len(columns)):
        first, last = columns[v, 0], columns[v, 1]
        dy = top + v - y
        if last < first or dy * dy >= best:
            continue
        dx = max(first - x, x - last, 0)
        best = min(best, dy * dy + dx * dx)
    return best


@allocating_kernel
def nearest_footprint(boxes, columns, starts, takes, shape):
    """Which footprint is nearest to each pixel, by |dy| + |dx|; of equal ones the first. -1: there is none.

    Two passes over the image, forth and back. columns, starts: from `lit_rows`; takes (K,): which ones count.
    """
    height, width = shape
    distance = np.empty((height, width), dtype=np.int64)
    owner = np.empty((height, width), dtype=np.int64)
    for v in range(height):
        for u in range(width):
            distance[v, u], owner[v, u] = height + width, -1
    for k in range(len(boxes)):
        if takes[k]:
            for v in range(boxes[k, 2]):
                row = boxes[k, 0] + v
                for u in range(columns[starts[k] + v, 0], columns[starts[k] + v, 1] + 1):
                    if distance[row, u] > 0:
                        distance[row, u], owner[row, u] = 0, k
    for turn in range(2):
        step = 1 - 2 * turn
        for i in range(height):
            for j in range(width):
                v, u = (i, j) if turn == 0 else (height - 1 - i, width - 1 - j)
                for other_v, other_u in ((v - step, u), (v, u - step)):
                    if not (0 <= other_v < height and 0 <= other_u < width) or owner[other_v, other_u] < 0:
                        continue
                    far, whose = distance[other_v, other_u] + 1, owner[other_v, other_u]
                    if far < distance[v, u] or (far == distance[v, u] and whose < owner[v, u]):
                        distance[v, u], owner[v, u] = far, whose
    return owner


@allocating_kernel
def share_stray(image, places, peaks, boxes, offsets, pixels, takes, rule, clip):
    """Share stray pixels (M, 2) among the templates that take some, (K,).

    By 1 / (1 + d^2), d the distance to the peak or to the nearest pixel of the footprint, or all to the nearest one.
    Shares below `clip` of the sum are left out, and the rest stretched to one; footprints too far for a hundredth of
    such a share are not looked at. Returns starts (M + 1,), and for each share its template and its flux. O(M K).
    """
    n_peaks = len(peaks)
    starts = np.zeros(len(places) + 1, dtype=np.int64)
    owners, fluxes = np.empty(16, dtype=np.int64), np.empty(16, dtype=np.float32)
    columns, rows = lit_rows(boxes, offsets, pixels)
    owner = np.empty((0, 0), dtype=np.int64)
    if rule == NEAREST:
        owner = nearest_footprint(boxes, columns, rows, takes, image.shape)
    shares = np.zeros(n_peaks)
    n = 0
    for m in range(len(places)):
        y, x = places[m, 0], places[m, 1]
        total = 0.0
        if rule == NEAREST:
            for k in range(n_peaks):
                shares[k] = 0.0
            if owner[y, x] >= 0:
                shares[owner[y, x]] = total = 1.0
        else:
            nearest = 1 << 60
            for k in range(n_peaks):
                if takes[k]:
                    if rule == TO_PEAK:
                        nearest = min(nearest, (peaks[k, 0] - y) ** 2 + (peaks[k, 1] - x) ** 2)
                    elif box_distance2(boxes[k], y, x) < nearest:
                        nearest = footprint_distance2(boxes[k, 0], columns[rows[k] : rows[k + 1]], y, x, nearest)
            for k in range(n_peaks):
                shares[k] = 0.0
                if not takes[k]:
                    continue
                if rule == TO_PEAK:
                    far = (peaks[k, 0] - y) ** 2 + (peaks[k, 1] - x) ** 2
                elif 0.01 * clip * (1.0 + box_distance2(boxes[k], y, x)) <= 1.0 + nearest:
                    far = footprint_distance2(boxes[k, 0], columns[rows[k] : rows[k + 1]], y, x, 1 << 60)
                else:
                    continue
                shares[k] = 1.0 / (1.0 + far)
                total += shares[k]
        kept = 0.0
        for k in range(n_peaks):
            if shares[k] < clip * total:
                shares[k] = 0.0
            kept += shares[k]
        for k in range(n_peaks):
            if shares[k] > 0:
                if n == len(owners):
                    more_owners, more_fluxes = np.empty(2 * n, dtype=np.int64), np.empty(2 * n, dtype=np.float32)
                    for i in range(n):
                        more_owners[i], more_fluxes[i] = owners[i], fluxes[i]
                    owners, fluxes = more_owners, more_fluxes
                owners[n], fluxes[n] = k, image[y, x] * (shares[k] / kept)
                n += 1
        starts[m + 1] = n
    return starts, owners[:n], fluxes[:n]
