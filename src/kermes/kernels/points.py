"""Many point sources solved jointly: their light, its derivatives, and the normal equations between them.

A PSF is a quintic spline (Unser 1999) with two knots per pixel: coefficients (B, n, 2, m), of which [:, i, l, k]
belongs to knot (i, 2 k + l), centred on (n // 2, m) and zero around the rim. One set of six weights per axis serves all
pixels of a source, as they share its fraction of a knot; derivatives are those of the spline, so that gradients belong
to the model to rounding.

A source s has B fluxes and one center. It reaches `reach[s, b]` pixels to each side of its pixel `base[s]`; -1: it is
not seen in the band. Tables hold for each pair and band the autocorrelation of the PSF at their separation, times the
weight: value, d/dy, d/dx, d2/dy2, d2/dydx, d2/dx2. Unknowns are arrays (S, B + 2): fluxes, then y and x of the center.
"""

import numpy as np

from kermes.kernels.decorator import allocating_kernel, fast_kernel, kernel


@kernel
def spline_taps(fraction, density, taps):
    """Fill taps (3, 6) with the quintic B-spline and its first two derivatives at fraction + 2, ..., fraction - 3.

    Derivatives are per pixel, with `density` knots per pixel.
    """
    for j in range(6):
        t = fraction + 2.0 - j
        sign = -1.0 if t < 0.0 else 1.0
        a = abs(t)
        if a < 1.0:
            taps[0, j] = 0.55 - a * a * (0.5 - a * a * (0.25 - a / 12.0))
            taps[1, j] = -sign * a * (1.0 - a * a * (1.0 - 5.0 * a / 12.0))
            taps[2, j] = -1.0 + a * a * (3.0 - 5.0 * a / 3.0)
        elif a < 2.0:
            taps[0, j] = 0.425 + a * (0.625 - a * (1.75 - a * (1.25 - a * (0.375 - a / 24.0))))
            taps[1, j] = sign * (0.625 - a * (3.5 - a * (3.75 - a * (1.5 - 5.0 * a / 24.0))))
            taps[2, j] = -3.5 + a * (7.5 - a * (4.5 - 5.0 * a / 6.0))
        else:
            c = max(3.0 - a, 0.0)
            taps[0, j] = c * c * c * c * c / 120.0
            taps[1, j] = -sign * c * c * c * c / 24.0
            taps[2, j] = c * c * c / 6.0
        taps[1, j] *= density
        taps[2, j] *= density * density


@kernel
def interpolate_rows(rows, coefficients, top, left, n_rows, n_columns, taps):
    """Interpolate along x: rows[i, x] = sum_j taps[j] c[top + i, left + 2 x + j], with c[:, 2 k + l] in [:, l, k]."""
    t0, t1, t2 = np.float32(taps[0]), np.float32(taps[1]), np.float32(taps[2])
    t3, t4, t5 = np.float32(taps[3]), np.float32(taps[4]), np.float32(taps[5])
    half, parity = left // 2, left % 2
    for i in range(n_rows):
        # Slices, whose indices start at zero, let the loop vectorise.
        c, d = coefficients[top + i, parity, half:], coefficients[top + i, 1 - parity, half + parity :]
        c0, c2, c4 = c[:n_columns], c[1 : 1 + n_columns], c[2 : 2 + n_columns]
        c1, c3, c5 = d[:n_columns], d[1 : 1 + n_columns], d[2 : 2 + n_columns]
        row = rows[i, :n_columns]
        for x in range(n_columns):
            row[x] = t0 * c0[x] + t1 * c1[x] + t2 * c2[x] + t3 * c3[x] + t4 * c4[x] + t5 * c5[x]


@kernel
def window(bounds, center, base, reach, n_knots, n_pixels):
    """Find the pixels first <= p < last of a source along one axis, and how they lie on the knots of the spline.

    Fills bounds (3,): first pixel, last pixel, and the knot under the first of the six taps of the first pixel. Returns
    the fraction of a knot.
    """
    offset = n_knots // 2 - 2.0 * center
    whole = int(np.floor(offset))
    bounds[0] = max(base - reach, 0, (3 - whole) // 2)
    bounds[1] = min(base + reach + 1, n_pixels, (n_knots - 4 - whole) // 2 + 1)
    bounds[2] = 2 * bounds[0] + whole - 2
    return offset - whole


@kernel
def add_point_rows(plane, rows, taps, flux, y0, y1, x0, n_columns):
    """Interpolate along y and add: plane[y, x] += flux sum_j taps[j] rows[2 (y - y0) + j, x - x0]."""
    t0, t1, t2 = np.float32(flux * taps[0]), np.float32(flux * taps[1]), np.float32(flux * taps[2])
    t3, t4, t5 = np.float32(flux * taps[3]), np.float32(flux * taps[4]), np.float32(flux * taps[5])
    for y in range(y0, y1):
        i = 2 * (y - y0)
        line = plane[y, x0 : x0 + n_columns]
        r0, r1, r2, r3, r4, r5 = rows[i], rows[i + 1], rows[i + 2], rows[i + 3], rows[i + 4], rows[i + 5]
        for x in range(n_columns):
            line[x] += t0 * r0[x] + t1 * r1[x] + t2 * r2[x] + t3 * r3[x] + t4 * r4[x] + t5 * r5[x]


@allocating_kernel
def add_points(planes, coefficients, base, reach, centers, flux, chosen):
    """Add the light of the sources `chosen` (indices) to planes (B, H, W) float32, in place, one after the other."""
    n_bands, n, _, m = coefficients.shape
    rows = np.empty((n, m), dtype=np.float32)
    taps_y, taps_x = np.empty((3, 6)), np.empty((3, 6))
    in_y, in_x = np.zeros(3, dtype=np.int64), np.zeros(3, dtype=np.int64)
    for s in chosen:
        for b in range(n_bands):
            if reach[s, b] < 0 or flux[s, b] == 0.0:
                continue
            fraction_y = window(in_y, centers[s, 0], base[s, 0], reach[s, b], n, planes.shape[1])
            fraction_x = window(in_x, centers[s, 1], base[s, 1], reach[s, b], 2 * m, planes.shape[2])
            spline_taps(fraction_y, 2.0, taps_y)
            spline_taps(fraction_x, 2.0, taps_x)
            height, width = in_y[1] - in_y[0], in_x[1] - in_x[0]
            if height <= 0 or width <= 0:
                continue
            top, left = in_y[2], in_x[2]
            interpolate_rows(rows, coefficients[b], top, left, 2 * height + 4, width, taps_x[0])
            add_point_rows(planes[b], rows, taps_y[0], flux[s, b], in_y[0], in_y[1], in_x[0], width)


@kernel
def subtract_from(planes, images, weights):
    """Turn models (B, H, W) into weights * (images - model), in place. Returns 0.5 sum(weights (images - model)^2)."""
    loss = 0.0
    for b in range(planes.shape[0]):
        for y in range(planes.shape[1]):
            part = np.float32(0.0)
            for x in range(planes.shape[2]):
                difference = images[b, y, x] - planes[b, y, x]
                weighted = weights[b, y, x] * difference
                part += weighted * difference
                planes[b, y, x] = weighted
            loss += part
    return 0.5 * loss


@fast_kernel
def sum_first(plane, rows, rows_x, taps, y0, y1, x0, n_columns, sums):
    """Sum plane times the PSF, its d/dy and its d/dx into sums (3,)."""
    a0, a1, a2 = np.float32(taps[0, 0]), np.float32(taps[0, 1]), np.float32(taps[0, 2])
    a3, a4, a5 = np.float32(taps[0, 3]), np.float32(taps[0, 4]), np.float32(taps[0, 5])
    d0, d1, d2 = np.float32(taps[1, 0]), np.float32(taps[1, 1]), np.float32(taps[1, 2])
    d3, d4, d5 = np.float32(taps[1, 3]), np.float32(taps[1, 4]), np.float32(taps[1, 5])
    total, total_y, total_x = 0.0, 0.0, 0.0
    for y in range(y0, y1):
        i = 2 * (y - y0)
        line = plane[y, x0 : x0 + n_columns]
        r0, r1, r2, r3, r4, r5 = rows[i], rows[i + 1], rows[i + 2], rows[i + 3], rows[i + 4], rows[i + 5]
        q0, q1, q2 = rows_x[i], rows_x[i + 1], rows_x[i + 2]
        q3, q4, q5 = rows_x[i + 3], rows_x[i + 4], rows_x[i + 5]
        part, part_y, part_x = np.float32(0.0), np.float32(0.0), np.float32(0.0)
        for x in range(n_columns):
            value = line[x]
            part += value * (a0 * r0[x] + a1 * r1[x] + a2 * r2[x] + a3 * r3[x] + a4 * r4[x] + a5 * r5[x])
            part_y += value * (d0 * r0[x] + d1 * r1[x] + d2 * r2[x] + d3 * r3[x] + d4 * r4[x] + d5 * r5[x])
            part_x += value * (a0 * q0[x] + a1 * q1[x] + a2 * q2[x] + a3 * q3[x] + a4 * q4[x] + a5 * q5[x])
        total += part
        total_y += part_y
        total_x += part_x
    sums[0] = total
    sums[1] = total_y
    sums[2] = total_x


@fast_kernel
def sum_value(plane, rows, taps, y0, y1, x0, n_columns):
    """Sum plane times the PSF."""
    a0, a1, a2 = np.float32(taps[0, 0]), np.float32(taps[0, 1]), np.float32(taps[0, 2])
    a3, a4, a5 = np.float32(taps[0, 3]), np.float32(taps[0, 4]), np.float32(taps[0, 5])
    total = 0.0
    for y in range(y0, y1):
        i = 2 * (y - y0)
        line = plane[y, x0 : x0 + n_columns]
        r0, r1, r2, r3, r4, r5 = rows[i], rows[i + 1], rows[i + 2], rows[i + 3], rows[i + 4], rows[i + 5]
        part = np.float32(0.0)
        for x in range(n_columns):
            part += line[x] * (a0 * r0[x] + a1 * r1[x] + a2 * r2[x] + a3 * r3[x] + a4 * r4[x] + a5 * r5[x])
        total += part
    return total


@allocating_kernel
def point_sums(planes, coefficients, base, reach, centers, chosen, derivatives, sums):
    """Sum planes (B, H, W) times the PSF of each chosen source and its derivatives along y and x, into sums (S, B, 3).

    Without `derivatives` only the first of the three is filled.

    With planes = weights * (image - model) these are the derivatives of -chi2 / 2 with respect to the flux and, times
    minus the flux, to the center: the adjoint of `add_points`.
    """
    n_bands, n, _, m = coefficients.shape
    rows, rows_x = np.empty((n, m), dtype=np.float32), np.empty((n, m), dtype=np.float32)
    taps_y, taps_x = np.empty((3, 6)), np.empty((3, 6))
    in_y, in_x = np.zeros(3, dtype=np.int64), np.zeros(3, dtype=np.int64)
    for s in chosen:
        for b in range(n_bands):
            if reach[s, b] < 0:
                continue
            fraction_y = window(in_y, centers[s, 0], base[s, 0], reach[s, b], n, planes.shape[1])
            fraction_x = window(in_x, centers[s, 1], base[s, 1], reach[s, b], 2 * m, planes.shape[2])
            spline_taps(fraction_y, 2.0, taps_y)
            spline_taps(fraction_x, 2.0, taps_x)
            height, width = in_y[1] - in_y[0], in_x[1] - in_x[0]
            if height <= 0 or width <= 0:
                continue
            top, left = in_y[2], in_x[2]
            interpolate_rows(rows, coefficients[b], top, left, 2 * height + 4, width, taps_x[0])
            if not derivatives:
                sums[s, b, 0] = sum_value(planes[b], rows, taps_y, in_y[0], in_y[1], in_x[0], width)
                continue
            interpolate_rows(rows_x, coefficients[b], top, left, 2 * height + 4, width, taps_x[1])
            sum_first(planes[b], rows, rows_x, taps_y, in_y[0], in_y[1], in_x[0], width, sums[s, b])


@fast_kernel
def sum_core(residual, weights, rows, rows_xx, taps, y0, y1, x0, n_columns, sums):
    """Sum over one stamp into sums (5,): see `core_sums`."""
    for y in range(y0, y1):
        i = 2 * (y - y0)
        for x in range(n_columns):
            psf, laplacian = 0.0, 0.0
            for j in range(6):
                psf += taps[0, j] * rows[i + j, x]
                laplacian += taps[2, j] * rows[i + j, x] + taps[0, j] * rows_xx[i + j, x]
            weighted, weight = residual[y, x0 + x], weights[y, x0 + x]
            square = psf * psf
            sums[1] += square
            if weight > 0.0:
                sums[0] += weight * square
                sums[2] += square
                sums[3] += square * weighted * weighted / weight
                sums[4] += weighted * laplacian


@allocating_kernel
def core_sums(residuals, weights, coefficients, base, reach, centers):
    """Sum what the cores of sources show, (S, B, 5), with P the PSF, r the residual and w the weight of a pixel.

    Sums of w P^2, of P^2 over all and over used pixels, of P^2 w r^2, and of w r (P_yy + P_xx). `residuals` are w r.
    """
    n_bands, n, _, m = coefficients.shape
    sums = np.zeros((len(base), n_bands, 5))
    rows, rows_xx = np.empty((n, m), dtype=np.float32), np.empty((n, m), dtype=np.float32)
    taps_y, taps_x = np.empty((3, 6)), np.empty((3, 6))
    in_y, in_x = np.zeros(3, dtype=np.int64), np.zeros(3, dtype=np.int64)
    for s in range(len(base)):
        for b in range(n_bands):
            if reach[s, b] < 0:
                continue
            fraction_y = window(in_y, centers[s, 0], base[s, 0], reach[s, b], n, weights.shape[1])
            fraction_x = window(in_x, centers[s, 1], base[s, 1], reach[s, b], 2 * m, weights.shape[2])
            spline_taps(fraction_y, 2.0, taps_y)
            spline_taps(fraction_x, 2.0, taps_x)
            height, width = in_y[1] - in_y[0], in_x[1] - in_x[0]
            if height <= 0 or width <= 0:
                continue
            top, left = in_y[2], in_x[2]
            interpolate_rows(rows, coefficients[b], top, left, 2 * height + 4, width, taps_x[0])
            interpolate_rows(rows_xx, coefficients[b], top, left, 2 * height + 4, width, taps_x[2])
            sum_core(residuals[b], weights[b], rows, rows_xx, taps_y, in_y[0], in_y[1], in_x[0], width, sums[s, b])
    return sums


@fast_kernel
def autocorrelation(table, taps_y, taps_x, top, left, out):
    """Evaluate a spline (n, m) under taps from [top, left]: value and derivatives, as in tables, into out (6,)."""
    for k in range(6):
        out[k] = 0.0
    for i in range(6):
        v, v_x, v_xx = 0.0, 0.0, 0.0
        for j in range(6):
            c = table[top + i, left + j]
            v += taps_x[0, j] * c
            v_x += taps_x[1, j] * c
            v_xx += taps_x[2, j] * c
        out[0] += taps_y[0, i] * v
        out[1] += taps_y[1, i] * v
        out[2] += taps_y[0, i] * v_x
        out[3] += taps_y[2, i] * v
        out[4] += taps_y[1, i] * v_x
        out[5] += taps_y[0, i] * v_xx


@kernel
def autocorrelations(tables, dy, dx, taps_y, taps_x, out):
    """Evaluate the autocorrelation of all bands at one separation into out (B, 6); 0 beyond the tables.

    tables (B, n, m): splines with two knots per pixel, centred on [n // 2, m // 2].
    """
    n, m = tables.shape[1:]
    ty, tx = n // 2 + 2.0 * dy, m // 2 + 2.0 * dx
    ky, kx = int(np.floor(ty)), int(np.floor(tx))
    if ky < 2 or kx < 2 or ky + 3 >= n or kx + 3 >= m:
        for b in range(len(tables)):
            for k in range(6):
                out[b, k] = 0.0
        return
    spline_taps(ty - ky, 2.0, taps_y)
    spline_taps(tx - kx, 2.0, taps_x)
    for b in range(len(tables)):
        autocorrelation(tables[b], taps_y, taps_x, ky - 2, kx - 2, out[b])


@allocating_kernel
def pair_tables(tables, centers, pairs, amplitude):
    """Tables (n, B, 6) of the pairs (n, 2): autocorrelation at center[t] - center[s] times amplitude[s] amplitude[t].

    amplitude (S, B) is the root of the weight that a source sees.
    """
    n_bands = len(tables)
    out = np.empty((len(pairs), n_bands, 6))
    taps_y, taps_x = np.empty((3, 6)), np.empty((3, 6))
    for p in range(len(pairs)):
        s, t = pairs[p]
        autocorrelations(tables, centers[t, 0] - centers[s, 0], centers[t, 1] - centers[s, 1], taps_y, taps_x, out[p])
        for b in range(n_bands):
            scale = amplitude[s, b] * amplitude[t, b]
            for k in range(6):
                out[p, b, k] *= scale
    return out


@allocating_kernel
def own_blocks(own, amplitude, flux, ridge):
    """Blocks of the sources themselves: fluxes (S, B) and centers (S, 3): yy, yx, xx.

    own (B, 6) is the autocorrelation at zero, ridge (S, 2) is added to the centers. Fluxes without data get 1.
    """
    n_sources, n_bands = flux.shape
    of_flux, of_center = np.empty((n_sources, n_bands)), np.empty((n_sources, 3))
    for s in range(n_sources):
        yy, yx, xx = ridge[s, 0], 0.0, ridge[s, 1]
        for b in range(n_bands):
            weight = amplitude[s, b] * amplitude[s, b]
            of_flux[s, b] = weight * own[b, 0] if weight > 0.0 else 1.0
            weight *= flux[s, b] * flux[s, b]
            yy -= weight * own[b, 3]
            yx -= weight * own[b, 4]
            xx -= weight * own[b, 5]
        of_center[s, 0] = yy
        of_center[s, 1] = yx
        of_center[s, 2] = xx
    return of_flux, of_center


@fast_kernel
def multiply_normal(x, y, pairs, tables, flux, of_flux, of_center):
    """Multiply by the normal matrix: y = H x, arrays (S, B + 2)."""
    n_sources, n_bands = flux.shape
    for s in range(n_sources):
        for b in range(n_bands):
            y[s, b] = of_flux[s, b] * x[s, b]
        y[s, n_bands] = of_center[s, 0] * x[s, n_bands] + of_center[s, 1] * x[s, n_bands + 1]
        y[s, n_bands + 1] = of_center[s, 1] * x[s, n_bands] + of_center[s, 2] * x[s, n_bands + 1]
    for p in range(len(pairs)):
        s, t = pairs[p, 0], pairs[p, 1]
        sy, sx, ty, tx = x[s, n_bands], x[s, n_bands + 1], x[t, n_bands], x[t, n_bands + 1]
        add_sy, add_sx, add_ty, add_tx = 0.0, 0.0, 0.0, 0.0
        for b in range(n_bands):
            a, a_y, a_x = tables[p, b, 0], tables[p, b, 1], tables[p, b, 2]
            a_yy, a_yx, a_xx = tables[p, b, 3], tables[p, b, 4], tables[p, b, 5]
            f_s, f_t = flux[s, b], flux[t, b]
            x_s, x_t = x[s, b], x[t, b]
            y[s, b] += a * x_t + f_t * (a_y * ty + a_x * tx)
            y[t, b] += a * x_s - f_s * (a_y * sy + a_x * sx)
            add_sy -= f_s * (a_y * x_t + f_t * (a_yy * ty + a_yx * tx))
            add_sx -= f_s * (a_x * x_t + f_t * (a_yx * ty + a_xx * tx))
            add_ty += f_t * (a_y * x_s - f_s * (a_yy * sy + a_yx * sx))
            add_tx += f_t * (a_x * x_s - f_s * (a_yx * sy + a_xx * sx))
        y[s, n_bands] += add_sy
        y[s, n_bands + 1] += add_sx
        y[t, n_bands] += add_ty
        y[t, n_bands + 1] += add_tx


@fast_kernel
def cholesky(matrix, n, floor):
    """Replace the lower triangle of the first (n, n) by its Cholesky factor.

    An unknown that the others determine, up to a share `floor` of its diagonal, is kept fixed: two sources in one place
    would have no errors.
    """
    for i in range(n):
        for j in range(i + 1):
            total = matrix[i, j]
            for k in range(j):
                total -= matrix[i, k] * matrix[j, k]
            if i == j:
                diagonal = matrix[i, i]
                matrix[i, i] = np.sqrt(total if total > floor * diagonal else 1e6 * diagonal)
            else:
                matrix[i, j] = total / matrix[j, j]


@kernel
def fill_own(matrix, start, s, of_flux, of_center):
    """Write the block of source s itself into the lower triangle of matrix from row `start`."""
    n_bands = of_flux.shape[1]
    n = start + n_bands
    for b in range(n_bands):
        matrix[start + b, start + b] = of_flux[s, b]
    matrix[n, n] = of_center[s, 0]
    matrix[n + 1, n] = of_center[s, 1]
    matrix[n + 1, n + 1] = of_center[s, 2]


@kernel
def fill_pair(matrix, start_s, start_t, s, t, table, flux):
    """Write the block between sources s and t, whose table (B, 6) is at center[t] - center[s], below the diagonal."""
    n_bands = flux.shape[1]
    lower = start_s > start_t
    for b in range(n_bands):
        f_s, f_t = flux[s, b], flux[t, b]
        for i in range(3):
            for j in range(3):
                # Row i of source s (flux, y, x) against column j of source t.
                if i == 0 and j == 0:
                    value = table[b, 0]
                elif i == 0:
                    value = f_t * table[b, j]
                elif j == 0:
                    value = -f_s * table[b, i]
                else:
                    value = -f_s * f_t * table[b, 1 + i + j]
                row = start_s + (b if i == 0 else n_bands + i - 1)
                column = start_t + (b if j == 0 else n_bands + j - 1)
                if lower:
                    matrix[row, column] += value
                else:
                    matrix[column, row] += value


@allocating_kernel
def factorize_groups(members, starts, pairs, tables, flux, of_flux, of_center):
    """Cholesky factors of the blocks of groups, packed in one buffer, and where each begins."""
    n_sources, n_bands = flux.shape
    size = n_bands + 2
    group, place = np.empty(n_sources, dtype=np.int64), np.empty(n_sources, dtype=np.int64)
    offsets = np.zeros(len(starts), dtype=np.int64)
    for g in range(len(starts) - 1):
        n = (starts[g + 1] - starts[g]) * size
        offsets[g + 1] = offsets[g] + n * n
        for k in range(starts[g], starts[g + 1]):
            group[members[k]] = g
            place[members[k]] = (k - starts[g]) * size
    factors = np.zeros(offsets[-1])
    for g in range(len(starts) - 1):
        n = (starts[g + 1] - starts[g]) * size
        matrix = factors[offsets[g] : offsets[g + 1]].reshape((n, n))
        for k in range(starts[g], starts[g + 1]):
            fill_own(matrix, place[members[k]], members[k], of_flux, of_center)
    for p in range(len(pairs)):
        s, t = pairs[p, 0], pairs[p, 1]
        g = group[s]
        if group[t] == g:
            n = (starts[g + 1] - starts[g]) * size
            matrix = factors[offsets[g] : offsets[g + 1]].reshape((n, n))
            fill_pair(matrix, place[s], place[t], s, t, tables[p], flux)
    for g in range(len(starts) - 1):
        n = (starts[g + 1] - starts[g]) * size
        cholesky(factors[offsets[g] : offsets[g + 1]].reshape((n, n)), n, 1e-6)
    return factors, offsets


@fast_kernel
def solve_factor(matrix, v, n):
    """Solve L L^T x = v in place, with L the lower triangle of matrix."""
    for i in range(n):
        total = v[i]
        for k in range(i):
            total -= matrix[i, k] * v[k]
        v[i] = total / matrix[i, i]
    for i in range(n - 1, -1, -1):
        value = v[i] / matrix[i, i]
        v[i] = value
        for k in range(i):
            v[k] -= matrix[i, k] * value


@kernel
def precondition(x, y, members, starts, factors, offsets, v):
    """Solve for each group by itself: y = M^-1 x; v is a buffer for the unknowns of one group."""
    size = x.shape[1]
    for g in range(len(starts) - 1):
        n_members = starts[g + 1] - starts[g]
        n = n_members * size
        for k in range(n_members):
            for i in range(size):
                v[k * size + i] = x[members[starts[g] + k], i]
        solve_factor(factors[offsets[g] : offsets[g + 1]].reshape((n, n)), v, n)
        for k in range(n_members):
            for i in range(size):
                y[members[starts[g] + k], i] = v[k * size + i]


@fast_kernel
def inner(x, y):
    """Sum of x * y, arrays (S, n)."""
    total = 0.0
    for s in range(x.shape[0]):
        for i in range(x.shape[1]):
            total += x[s, i] * y[s, i]
    return total


@allocating_kernel
def solve_normal(gradient, pairs, tables, flux, of_flux, of_center, members, starts, tolerance, max_iterations):
    """Solve H step = gradient by conjugate gradients, preconditioned with the exact solution of each group.

    Stops when the residual, measured with the preconditioner, has fallen by `tolerance`, or where H has no curvature
    left. Returns (step, iterations). O(iterations pairs B).
    """
    factors, offsets = factorize_groups(members, starts, pairs, tables, flux, of_flux, of_center)
    step = np.zeros_like(gradient)
    residual = gradient.copy()
    z, product = np.empty_like(gradient), np.empty_like(gradient)
    v = np.empty(gradient.size)
    precondition(residual, z, members, starts, factors, offsets, v)
    direction = z.copy()
    n_sources, n = gradient.shape
    rho = inner(residual, z)
    enough = tolerance * tolerance * rho
    iterations = 0
    while iterations < max_iterations and rho > enough and rho > 0.0:
        multiply_normal(direction, product, pairs, tables, flux, of_flux, of_center)
        curvature = inner(direction, product)
        if not curvature > 0.0:
            break
        alpha = rho / curvature
        for s in range(n_sources):
            for i in range(n):
                step[s, i] += alpha * direction[s, i]
                residual[s, i] -= alpha * product[s, i]
        precondition(residual, z, members, starts, factors, offsets, v)
        last = rho
        rho = inner(residual, z)
        beta = rho / last
        for s in range(n_sources):
            for i in range(n):
                direction[s, i] = z[s, i] + beta * direction[s, i]
        iterations += 1
    return step, iterations


@allocating_kernel
def marginal_covariances(chosen, starts, neighbours, pair_of, pairs, tables, flux, of_flux, of_center, most):
    """Covariances (N, B + 2, B + 2) of N chosen sources, with their nearest `most` neighbours free and the rest fixed.

    And those of their fluxes with the fluxes of these neighbours, (N, most, B).

    starts (S + 1,), neighbours, pair_of: the neighbours of each source, nearest first, and the rows of `pairs` that
    join them. The source comes last in a dense Cholesky factor, whose last block then is that of its marginal
    covariance. O(len(chosen) (most (B + 2))^3).
    """
    n_sources, n_bands = flux.shape
    size = n_bands + 2
    matrix = np.empty(((most + 1) * size, (most + 1) * size))
    place = np.full(n_sources, -1, dtype=np.int64)
    members = np.empty(most + 1, dtype=np.int64)
    inverse = np.empty((size, size))
    out = np.zeros((len(chosen), size, size))
    cross = np.zeros((len(chosen), most, n_bands))
    column = np.empty((most + 1) * size)
    for c in range(len(chosen)):
        s = chosen[c]
        n_members = min(starts[s + 1] - starts[s], most)
        for k in range(n_members):
            members[k] = neighbours[starts[s] + k]
        members[n_members] = s
        n_members += 1
        n = n_members * size
        for i in range(n):
            for j in range(i + 1):
                matrix[i, j] = 0.0
        for k in range(n_members):
            place[members[k]] = k
        for k in range(n_members):
            member = members[k]
            fill_own(matrix, k * size, member, of_flux, of_center)
            for i in range(starts[member], starts[member + 1]):
                other = place[neighbours[i]]
                if other > k:
                    p = pair_of[i]
                    first, second = pairs[p, 0], pairs[p, 1]
                    fill_pair(matrix, place[first] * size, place[second] * size, first, second, tables[p], flux)
        for k in range(n_members):
            place[members[k]] = -1
        cholesky(matrix, n, 1e-5)
        # Invert the last block L of the factor; the covariance is L^-T L^-1.
        start = n - size
        for j in range(size):
            for i in range(size):
                total = 1.0 if i == j else 0.0
                for k in range(i):
                    total -= matrix[start + i, start + k] * inverse[k, j]
                inverse[i, j] = total / matrix[start + i, start + i]
        for i in range(size):
            for j in range(size):
                for k in range(size):
                    out[c, i, j] += inverse[k, i] * inverse[k, j]
        for b in range(n_bands):
            # One column of the inverse of the whole matrix, from the last row upwards.
            for i in range(n - 1, -1, -1):
                total = inverse[i - start, b] if i >= start else 0.0
                for k in range(i + 1, n):
                    total -= matrix[k, i] * column[k]
                column[i] = total / matrix[i, i]
            for k in range(n_members - 1):
                cross[c, k, b] = column[k * size + b]
    return out, cross


@allocating_kernel
def companion_significance(pixels, hosts, matched, tables, own, centers, flux, amplitude, of_center):
    """Significance squared (n,) of a second source in each of pixels (n, 2), with source hosts (n,) free beside it.

    What chi2 falls by, to second order, when a source with free fluxes is put there, and flux and center of the host
    follow: D^T N^-1 D, with D the matched filter of the residuals, `matched` (B, H, W), and N the normal matrix of the
    new fluxes less what the host can take (its Schur complement). 0 where the new fluxes are negative as a
    whole, or the host is nearer than 0.7 pixels. O(n B).
    """
    n_bands = len(tables)
    out = np.zeros(len(pixels))
    taps_y, taps_x = np.empty((3, 6)), np.empty((3, 6))
    table = np.empty((n_bands, 6))
    for i in range(len(pixels)):
        y, x, host = pixels[i, 0], pixels[i, 1], hosts[i]
        dy, dx = centers[host, 0] - y, centers[host, 1] - x
        if dy * dy + dx * dx < 0.49:
            continue
        autocorrelations(tables, dy, dx, taps_y, taps_x, table)
        # N = diag(d) - V C^-1 V^T; by Woodbury D^T N^-1 D = sum D^2 / d + u^T (C - V^T V / d)^-1 u, u = V^T D / d.
        c_yy, c_yx, c_xx = of_center[host, 0], of_center[host, 1], of_center[host, 2]
        u_y, u_x, total, sign = 0.0, 0.0, 0.0, 0.0
        for b in range(n_bands):
            weight = amplitude[host, b] * amplitude[host, b]
            if not weight > 0.0:
                continue
            d = weight * (own[b, 0] - table[b, 0] * table[b, 0] / own[b, 0])
            v_y, v_x = weight * flux[host, b] * table[b, 1], weight * flux[host, b] * table[b, 2]
            c_yy -= v_y * v_y / d
            c_yx -= v_y * v_x / d
            c_xx -= v_x * v_x / d
            u_y += v_y * matched[b, y, x] / d
            u_x += v_x * matched[b, y, x] / d
            total += matched[b, y, x] * matched[b, y, x] / d
            sign += matched[b, y, x] / np.sqrt(d)
        determinant = c_yy * c_xx - c_yx * c_yx
        if sign > 0.0 and determinant > 0.0 and c_yy > 0.0:
            out[i] = total + (c_xx * u_y * u_y - 2.0 * c_yx * u_y * u_x + c_yy * u_x * u_x) / determinant
    return out
