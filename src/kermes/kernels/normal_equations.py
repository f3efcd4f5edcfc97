"""Normal equations of a few neighbouring profile sources, from the Fourier modes or the pixels of a stamp.

At the modes a component is a wave, which its centre gives, times real factors: its amplitude and its derivatives, those
by the position times -i as well (`profiles.evaluate_factors`). The products of two components then need real factors
and the cosine and sine of the phase between their waves only, and those of one component with itself not even these.
Modes are taken in blocks that stay in the cache together.
"""

from typing import NamedTuple

import numpy as np

from kermes.kernels.decorator import allocating_kernel, fast_kernel, kernel
from kermes.kernels.profiles import N_COLUMNS, multiply

RIDGE = 1e-5
"""Keeps the fluxes of coincident sources finite."""

BLOCK = 1024
"""Modes that are worked on together."""

FIRST_SHAPE = 3
"""First column after the derivatives by the position."""

E1 = 3
"""Place of e1 among the shape parameters of a source; e2 follows."""


class Variances(NamedTuple):
    """What is known of the fluxes and shapes of all sources, neighbours and everything else free; NaN: nothing."""

    flux: np.ndarray
    """Variance of the total flux in each band, shape (S, B)."""

    shape: np.ndarray
    """Variances of y, x, ln r, e1, e2, ln n (of a double's disc), and the covariance of e1 and e2, shape (S, 7)."""

    cross: np.ndarray
    """Covariances of its flux with that of each member of its group, shape (S, G, B); zero where nothing is known."""


# ---------------------------------------------------------------- sums over modes and pixels


@fast_kernel
def dot(a, b):
    """Sum of products."""
    total = np.float32(0.0)
    for m in range(len(a)):
        total += a[m] * b[m]
    return total


@fast_kernel
def weighted_dot(a, b, weights):
    """Sum of products of two images with weights."""
    total = np.float32(0.0)
    for m in range(len(a)):
        total += a[m] * b[m] * weights[m]
    return total


@fast_kernel
def dot_three(a, x, y, z):
    """Sums of products of a with three rows: together, because reading costs more than multiplying."""
    by_x, by_y, by_z = np.float32(0.0), np.float32(0.0), np.float32(0.0)
    for m in range(len(a)):
        by_x += a[m] * x[m]
        by_y += a[m] * y[m]
        by_z += a[m] * z[m]
    return by_x, by_y, by_z


@fast_kernel
def dot_nine(a, b, c, x, y, z):
    """Sums of products of each of three rows with each of three others."""
    ax, ay, az = np.float32(0.0), np.float32(0.0), np.float32(0.0)
    bx, by, bz = np.float32(0.0), np.float32(0.0), np.float32(0.0)
    cx, cy, cz = np.float32(0.0), np.float32(0.0), np.float32(0.0)
    for m in range(len(a)):
        ax += a[m] * x[m]
        ay += a[m] * y[m]
        az += a[m] * z[m]
        bx += b[m] * x[m]
        by += b[m] * y[m]
        bz += b[m] * z[m]
        cx += c[m] * x[m]
        cy += c[m] * y[m]
        cz += c[m] * z[m]
    return ax, ay, az, bx, by, bz, cx, cy, cz


@kernel
def dot_rows(a, rows, n, out):
    """Sums of products of a with the first n rows."""
    for k in range(0, n, 3):
        # The last row again where there are no more.
        x, y, z = rows[k, : len(a)], rows[min(k + 1, n - 1), : len(a)], rows[min(k + 2, n - 1), : len(a)]
        out[k], out[min(k + 1, n - 1)], out[min(k + 2, n - 1)] = dot_three(a, x, y, z)


@kernel
def dot_table(a, first_row, n_rows, first, b, n_others, n, out):
    """Sums of products of n_rows rows of a from first_row on, n columns from first on, each with the first rows of b.

    Of b n_others rows and n columns. out (>= n_rows, >= n_others).
    """
    for i in range(0, n_rows, 3):
        # The last row again where there are no more.
        i_1, i_2 = min(i + 1, n_rows - 1), min(i + 2, n_rows - 1)
        p = a[first_row + i, first : first + n]
        q = a[first_row + i_1, first : first + n]
        r = a[first_row + i_2, first : first + n]
        for j in range(0, n_others, 3):
            j_1, j_2 = min(j + 1, n_others - 1), min(j + 2, n_others - 1)
            px, py, pz, qx, qy, qz, rx, ry, rz = dot_nine(p, q, r, b[j, :n], b[j_1, :n], b[j_2, :n])
            out[i, j], out[i, j_1], out[i, j_2] = px, py, pz
            out[i_1, j], out[i_1, j_1], out[i_1, j_2] = qx, qy, qz
            out[i_2, j], out[i_2, j_1], out[i_2, j_2] = rx, ry, rz


@kernel
def multiply_three(a, b, c, out):
    """Products of the elements; out must be none of them, or the loop would not vectorise."""
    for m in range(len(out)):
        out[m] = a[m] * b[m] * c[m]


@kernel
def add_products(a, b, factor, out):
    """Add products of the elements, times a factor."""
    for m in range(len(out)):
        out[m] += factor * (a[m] * b[m])


@kernel
def add_to(out, row, factor):
    """Add a row, times a factor."""
    for m in range(len(out)):
        out[m] += factor * row[m]


@kernel
def add_three(x, y, z, by_x, by_y, by_z, out):
    """Add three rows, times a factor each."""
    for m in range(len(out)):
        out[m] += by_x * x[m] + by_y * y[m] + by_z * z[m]


@kernel
def products(a_re, a_im, b_re, b_im, out):
    """Real part of conj(a) b."""
    for m in range(len(out)):
        out[m] = a_re[m] * b_re[m] + a_im[m] * b_im[m]


@kernel
def cross_products(a_re, a_im, b_re, b_im, out):
    """Imaginary part of conj(a) b."""
    for m in range(len(out)):
        out[m] = a_re[m] * b_im[m] - a_im[m] * b_re[m]


# ---------------------------------------------------------------- linear algebra


@kernel
def cholesky(a, n):
    """Factorise the leading (n, n) of a symmetric matrix in place (lower triangle); False if it is not positive."""
    for i in range(n):
        for j in range(i + 1):
            total = a[i, j]
            for k in range(j):
                total -= a[i, k] * a[j, k]
            if i == j:
                if not total > 0.0:
                    return False
                a[i, i] = np.sqrt(total)
            else:
                a[i, j] = total / a[j, j]
    return True


@kernel
def substitute(a, n, v, backward):
    """Solve L v = v in place, and then L^T v = v if `backward`."""
    for i in range(n):
        total = v[i]
        for k in range(i):
            total -= a[i, k] * v[k]
        v[i] = total / a[i, i]
    if backward:
        for i in range(n - 1, -1, -1):
            total = v[i]
            for k in range(i + 1, n):
                total -= a[k, i] * v[k]
            v[i] = total / a[i, i]


# ---------------------------------------------------------------- fluxes


@kernel
def collect_block(first, waves, columns, data, power, n_components, owner, amplitudes, work, sums, matrix, vectors):
    """The part of `collect_modes` of a block of modes from `first` on; amplitudes, work and sums: room to work in."""
    n_bands, n_modes = power.shape
    n = min(BLOCK, n_modes - first)
    last = first + n
    for c in range(n_components):
        re, im = amplitudes[c, 0, :n], amplitudes[c, 1, :n]
        multiply(columns[c, 0, first:last], waves[c, 0, first:last], re)
        multiply(columns[c, 0, first:last], waves[c, 1, first:last], im)
        for b in range(n_bands):
            vectors[b, c] += dot(re, data[b, 0, first:last]) + dot(im, data[b, 1, first:last])
        for d in range(c + 1):
            if owner[c] == owner[d]:
                multiply(columns[c, 0, first:last], columns[d, 0, first:last], work[:n])
            else:
                products(re, im, amplitudes[d, 0, :n], amplitudes[d, 1, :n], work[:n])
            for b in range(0, n_bands, 3):
                b_1, b_2 = min(b + 1, n_bands - 1), min(b + 2, n_bands - 1)
                x, y, z = power[b, first:last], power[b_1, first:last], power[b_2, first:last]
                sums[0], sums[1], sums[2] = dot_three(work[:n], x, y, z)
                for k in range(min(3, n_bands - b)):
                    matrix[b + k, c, d] += sums[k]


@allocating_kernel
def collect_modes(waves, columns, data, power, n_components, owner, matrix, vectors):
    """Normal matrices (B, C, C) and right sides (B, C) of the fluxes, from modes; see `solve_fluxes`."""
    n_modes = power.shape[1]
    amplitudes = np.empty((n_components, 2, BLOCK), np.float32)
    work = np.empty(BLOCK, np.float32)
    sums = np.empty(3)
    for first in range(0, n_modes, BLOCK):
        collect_block(first, waves, columns, data, power, n_components, owner, amplitudes, work, sums, matrix, vectors)


@allocating_kernel
def solve_fluxes(exact, waves, columns, images, data, power, n_components, owner, matrix, fluxes, factors):
    """Solve the fluxes of all components jointly in each band; returns the gain in loss.

    waves (C, 2, M) and columns (C, N_COLUMNS, M): see `profiles.evaluate_factors`; owner (C,): components of one source
    have the same wave. data (B, 2, M), power (B, M): see `profile_fitting.fit_group`; if `exact`, data[:, 0] and power
    are instead the pixels of the stamp and their weights, (B, P), and images (C, B, P) the components. matrix (B, C, C)
    takes the normal matrices, factors (B, C, C) their Cholesky factors, fluxes (C, B) the answer.
    """
    n_bands = len(power)
    vectors = np.empty((n_bands, n_components))
    for b in range(n_bands):
        for c in range(n_components):
            vectors[b, c] = 0.0
            for d in range(n_components):
                matrix[b, c, d] = 0.0
    if exact:
        for b in range(n_bands):
            for c in range(n_components):
                vectors[b, c] = weighted_dot(images[c, b], data[b, 0], power[b])
                for d in range(c + 1):
                    matrix[b, c, d] = weighted_dot(images[c, b], images[d, b], power[b])
    else:
        collect_modes(waves, columns, data, power, n_components, owner, matrix, vectors)
    gain = 0.0
    for b in range(n_bands):
        for c in range(n_components):
            for d in range(c + 1):
                matrix[b, d, c] = factors[b, c, d] = factors[b, d, c] = matrix[b, c, d]
        for c in range(n_components):
            factors[b, c, c] += RIDGE * matrix[b, c, c] + 1e-30
            fluxes[c, b] = vectors[b, c]
            if not matrix[b, c, c] > 0.0:
                # Nothing is known of it here.
                vectors[b, c] = fluxes[c, b] = 0.0
                factors[b, c, c] = 1.0
        if not cholesky(factors[b], n_components):
            return -np.inf
        substitute(factors[b], n_components, vectors[b], False)
        for c in range(n_components):
            gain += 0.5 * vectors[b, c] * vectors[b, c]
        for c in range(n_components):
            vectors[b, c] = fluxes[c, b]
        substitute(factors[b], n_components, vectors[b], True)
        for c in range(n_components):
            fluxes[c, b] = vectors[b, c]
    return gain


# ---------------------------------------------------------------- shapes


@kernel
def add_bands(rows, part, first, factors, out):
    """Set out (n,) to the sum over the bands of rows (B K, M), part `part` of K each, times a factor (B,) each."""
    n_bands, last = len(factors), first + len(out)
    step = len(rows) // n_bands
    for m in range(len(out)):
        out[m] = 0.0
    for b in range(0, n_bands, 3):
        b_1, b_2 = min(b + 1, n_bands - 1), min(b + 2, n_bands - 1)
        # No row counts twice.
        by_y = factors[b_1] if b_1 > b else np.float32(0.0)
        by_z = factors[b_2] if b_2 > b_1 else np.float32(0.0)
        x = rows[part + step * b, first:last]
        y = rows[part + step * b_1, first:last]
        z = rows[part + step * b_2, first:last]
        add_three(x, y, z, factors[b], by_y, by_z, out)


@kernel
def fill_pair(
    c, d, aligned, columns, power, weight, cosine, sine, first, ends, slots, fluxes, work, sums, hessian, coupling
):
    """Products of two components and their derivatives at a block of modes from `first` on, weight (n,).

    cosine and sine (n,) are of the phase from the wave of c to that of d; aligned: it is zero. Derivatives by the
    position stand at a right angle to the wave, all others and the amplitude along it.
    """
    n = len(weight)
    last = first + n
    # The amplitude of c with the derivatives of d, and the other way round; derivatives of the shape of c, and by its
    # position, with those of d.
    for turn in range(4):
        one, other = (d, c) if turn == 1 else (c, d)
        across = turn == 3
        if turn < 2:
            left, first_row, n_left, factor = power, 0, len(power), columns[one, 0, first:last]
        else:
            left, first_row, n_left, factor = columns[c], FIRST_SHAPE, ends[c] - FIRST_SHAPE, weight
        if across:
            first_row, n_left = 1, min(ends[c], FIRST_SHAPE) - 1
        start, end = 1, ends[other]
        if aligned and across:
            end = min(end, FIRST_SHAPE)
        elif aligned:
            start = FIRST_SHAPE
        n_right = end - start
        if (turn == 1 and c == d) or n_left <= 0 or n_right <= 0:
            continue
        for q in range(n_right):
            column, of_position = columns[other, start + q, first:last], start + q < FIRST_SHAPE
            if aligned:
                multiply(column, factor, work[q, :n])
            else:
                multiply_three(column, factor, cosine if of_position == across else sine, work[q, :n])
        dot_table(left, first_row, n_left, first, work, n_right, n, sums)
        for q in range(n_right):
            j = slots[other, start + q]
            # From d to c the phase has the other sign.
            minus = (turn == 1 and start + q < FIRST_SHAPE) or (across and start + q >= FIRST_SHAPE)
            for p in range(n_left):
                value = -sums[p, q] if minus else sums[p, q]
                if turn < 2:
                    coupling[p, one, j] += fluxes[other, p] * value
                    continue
                i = slots[c, first_row + p]
                if c != d or j <= i:
                    hessian[i, j] += value
                    if c != d or i != j:
                        hessian[j, i] += value


@kernel
def fill_block(
    first, waves, columns, flat, power, n_components, owner, ends, spectra, slots, fluxes, amplitudes, residuals, work,
    own, both, sums, hessian, gradient, coupling,
):  # fmt: skip
    """The part of `fill_modes` of a block of modes from `first` on.

    flat (2 B, M): the data; ends (C,): number of columns of each component that have a slot, the first among them;
    spectra (C, B); amplitudes to sums: room to work in.
    """
    n_bands, n_modes = power.shape
    n = min(BLOCK, n_modes - first)
    last = first + n
    weight, cosine, sine, along, across = own[0, :n], own[1, :n], own[2, :n], own[3, :n], own[4, :n]
    for c in range(n_components):
        for k in range(2):
            multiply(columns[c, 0, first:last], waves[c, k, first:last], amplitudes[c, k, :n])
            if ends[c] > 1:
                add_bands(flat, k, first, spectra[c], residuals[c, k, :n])
    for c in range(n_components):
        for d in range(c, n_components):
            if ends[c] == 1 and ends[d] == 1:
                continue
            for b in range(n_bands):
                both[b] = spectra[c, b] * spectra[d, b]
            # A loop, so that k is no literal, for which add_bands would be compiled once more.
            for k in range(1):
                add_bands(power, k, first, both, weight)
            aligned = owner[c] == owner[d]
            if not aligned:
                a_re, a_im = waves[c, 0, first:last], waves[c, 1, first:last]
                b_re, b_im = waves[d, 0, first:last], waves[d, 1, first:last]
                products(a_re, a_im, b_re, b_im, cosine)
                cross_products(a_re, a_im, b_re, b_im, sine)
            fill_pair(
                c, d, aligned, columns, power, weight, cosine, sine, first, ends, slots, fluxes, work, sums,
                hessian, coupling,
            )  # fmt: skip
            for k in range(2):
                if ends[c] > 1:
                    add_products(weight, amplitudes[d, k, :n], np.float32(-1.0), residuals[c, k, :n])
                if ends[d] > 1 and c != d:
                    add_products(weight, amplitudes[c, k, :n], np.float32(-1.0), residuals[d, k, :n])
    for c in range(n_components):
        if ends[c] == 1:
            continue
        # The residual as the wave of the component sees it, and turned by -i.
        re, im = waves[c, 0, first:last], waves[c, 1, first:last]
        products(re, im, residuals[c, 0, :n], residuals[c, 1, :n], along)
        cross_products(residuals[c, 0, :n], residuals[c, 1, :n], re, im, across)
        for p in range(1, ends[c]):
            turned = across if p < FIRST_SHAPE else along
            gradient[slots[c, p]] += dot(columns[c, p, first:last], turned)


@allocating_kernel
def fill_modes(waves, columns, data, power, n_components, owner, slots, fluxes, hessian, gradient, coupling):
    """Add the products of the derivatives of a group at the modes of its stamp to cleared equations.

    Normal matrix (F, F) and gradient (F,) of the free shape parameters; coupling (B, C, F): products of amplitudes and
    derivatives. All other arguments as in `solve_fluxes`; slots (C, N_COLUMNS): see `profile_fitting.list_components`.
    """
    n_bands, n_modes = power.shape
    flat = data.reshape(2 * n_bands, n_modes)
    ends = np.empty(n_components, np.int64)
    spectra = np.empty((n_components, n_bands), np.float32)
    for c in range(n_components):
        ends[c] = 1
        while ends[c] < N_COLUMNS and slots[c, ends[c]] >= 0:
            ends[c] += 1
        for b in range(n_bands):
            spectra[c, b] = fluxes[c, b]
    # Of each component its model and what is left of the data, in the sum of the bands as it sees them.
    amplitudes = np.empty((n_components, 2, BLOCK), np.float32)
    residuals = np.empty((n_components, 2, BLOCK), np.float32)
    work, own = np.empty((N_COLUMNS, BLOCK), np.float32), np.empty((5, BLOCK), np.float32)
    both = np.empty(n_bands, np.float32)
    sums = np.empty((max(N_COLUMNS, n_bands), N_COLUMNS))
    for first in range(0, n_modes, BLOCK):
        fill_block(
            first, waves, columns, flat, power, n_components, owner, ends, spectra, slots, fluxes, amplitudes,
            residuals, work, own, both, sums, hessian, gradient, coupling,
        )  # fmt: skip


@allocating_kernel
def fill_pixels(first, images, derivatives, data, power, n_components, slots, fluxes, hessian, gradient, coupling):
    """The same of some bands, from `first` on, from the pixels of the stamp, with a weight each.

    images (C, B, P); derivatives (C, N_COLUMNS - 1, K, P) of these K bands; data[:, 0], power (B, P).
    """
    n_pixels = power.shape[1]
    residual = np.empty(n_pixels, np.float32)
    weighted = np.empty((N_COLUMNS - 1, n_pixels), np.float32)
    sums, places = np.empty(N_COLUMNS), np.empty(N_COLUMNS, np.int64)
    for k in range(derivatives.shape[2]):
        b = first + k
        for m in range(n_pixels):
            residual[m] = data[b, 0, m]
        for d in range(n_components):
            add_to(residual, images[d, b], np.float32(-fluxes[d, b]))
        for d in range(n_components):
            n = 0
            for q in range(1, N_COLUMNS):
                if slots[d, q] >= 0:
                    multiply(derivatives[d, q - 1, k], power[b], weighted[n])
                    places[n] = slots[d, q]
                    gradient[slots[d, q]] += fluxes[d, b] * dot(weighted[n], residual)
                    n += 1
            if n == 0:
                continue
            for c in range(n_components):
                dot_rows(images[c, b], weighted, n, sums)
                for q in range(n):
                    coupling[b, c, places[q]] += fluxes[d, b] * sums[q]
                if c > d:
                    continue
                for p in range(1, N_COLUMNS):
                    i = slots[c, p]
                    if i < 0:
                        continue
                    dot_rows(derivatives[c, p - 1, k], weighted, n, sums)
                    for q in range(n):
                        j = places[q]
                        if c != d or j <= i:
                            value = sums[q] * fluxes[c, b] * fluxes[d, b]
                            hessian[i, j] += value
                            if c != d or i != j:
                                hessian[j, i] += value


@kernel
def clear_equations(hessian, gradient, coupling):
    """Set the equations of no data; see `fill_modes`."""
    hessian[:, :] = 0.0
    gradient[:] = 0.0
    coupling[:, :, :] = 0.0


@allocating_kernel
def eliminate_fluxes(factors, coupling, hessian):
    """Turn the normal matrix of the shapes into that with the fluxes free, from the Cholesky factors of theirs."""
    n_bands, n_components, n_free = coupling.shape
    vectors = np.empty((n_free, n_components))
    for b in range(n_bands):
        for p in range(n_free):
            for c in range(n_components):
                vectors[p, c] = coupling[b, c, p]
            substitute(factors[b], n_components, vectors[p], False)
        for p in range(n_free):
            for q in range(n_free):
                total = 0.0
                for c in range(n_components):
                    total += vectors[p, c] * vectors[q, c]
                hessian[p, q] -= total


@allocating_kernel
def fill_variances(members, owner, slots, n_components, n_free, matrix, factors, hessian, coupling, variances):
    """Variances of a group with everything else free, from the joint normal matrix.

    Rows of the members are filled; see `Variances`. hessian is replaced by its Cholesky factor.
    """
    n, n_bands = len(members), len(matrix)
    regular = cholesky(hessian, n_free)
    axes, places = np.empty((2, n_free)), np.empty(N_COLUMNS - 1, np.int64)
    first = np.zeros(n, np.int64)
    for c in range(n_components - 1, -1, -1):
        first[owner[c]] = c
    for i in range(n):
        s = members[i]
        for j in range(variances.shape.shape[1]):
            variances.shape[s, j] = np.nan
        for b in range(n_bands):
            variances.flux[s, b] = np.nan
            for j in range(variances.cross.shape[1]):
                variances.cross[s, j, b] = 0.0
        for j in range(N_COLUMNS - 1):
            places[j] = slots[first[i], 1 + j]
            if not regular or places[j] < 0:
                continue
            # The derivatives by e1 and e2 are kept for their covariance.
            axis = axes[0] if j == E1 else axes[1]
            for p in range(n_free):
                axis[p] = 0.0
            axis[places[j]] = 1.0
            substitute(hessian, n_free, axis, False)
            total = covariance = 0.0
            for p in range(n_free):
                total += axis[p] * axis[p]
                covariance += axes[0, p] * axis[p]
            variances.shape[s, j] = total
            if j == E1 + 1:
                variances.shape[s, N_COLUMNS - 1] = covariance
    for b in range(n_bands):
        if not regular:
            continue
        # One vector for each flux, whose products are their covariances.
        vectors = np.zeros((n, n_components + n_free))
        for i in range(n):
            s, vector = members[i], vectors[i]
            response, share = vector[:n_components], vector[n_components:]
            if not matrix[b, first[i], first[i]] > 0.0:
                continue
            # The whole flux is e . f; its variance is e A^-1 e + (A^-1 e) C H^-1 C^T (A^-1 e).
            for c in range(n_components):
                response[c] = 1.0 if owner[c] == i else 0.0
            solved = response.copy()
            substitute(factors[b], n_components, solved, True)
            substitute(factors[b], n_components, response, False)
            for p in range(n_free):
                share[p] = 0.0
                for c in range(n_components):
                    share[p] += solved[c] * coupling[b, c, p]
            substitute(hessian, n_free, share, False)
            for j in range(i + 1):
                # Those of members without data are zero.
                total = 0.0
                for k in range(len(vector)):
                    total += vector[k] * vectors[j, k]
                variances.cross[s, j, b] = variances.cross[members[j], i, b] = total
            variances.flux[s, b] = variances.cross[s, i, b]
