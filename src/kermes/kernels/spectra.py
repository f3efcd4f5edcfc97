"""The linear problem of the fluxes: normal equations of overlapping components, and their solution.

The symmetric matrix A of a band is stored by rows: the partners of component i are columns[starts[i]:starts[i + 1]],
itself first, and mirror[e] is the place of the transposed entry.
"""

import numpy as np

from kermes.kernels.decorator import allocating_kernel, fast_kernel, inlined_kernel


@inlined_kernel
def overlapping_pairs(boxes):
    """List the components whose boxes overlap. Returns starts (K + 1,), columns and mirror.

    boxes (K, 4). Cost O(K^2) comparisons of integers.
    """
    n = len(boxes)
    starts = np.empty(n + 1, dtype=np.int64)
    starts[0] = 0
    columns = np.empty(0, dtype=np.int64)
    for known in range(2):  # first how many there are, then which
        last = 0
        for i in range(n):
            if known:
                columns[last] = i
            last += 1
            for j in range(n):
                if (
                    j != i
                    and max(boxes[i, 0], boxes[j, 0]) < min(boxes[i, 0] + boxes[i, 2], boxes[j, 0] + boxes[j, 2])
                    and max(boxes[i, 1], boxes[j, 1]) < min(boxes[i, 1] + boxes[i, 3], boxes[j, 1] + boxes[j, 3])
                ):
                    if known:
                        columns[last] = j
                    last += 1
            starts[i + 1] = last
        if not known:
            columns = np.empty(last, dtype=np.int64)
    mirror = np.empty(last, dtype=np.int64)
    # Rows are sorted but for their first entry, so the transposed entries come up in order.
    cursor = np.empty(n, dtype=np.int64)
    for i in range(n):
        mirror[starts[i]] = starts[i]
        cursor[i] = starts[i] + 1
    for i in range(n):
        for entry in range(starts[i] + 1, starts[i + 1]):
            j = columns[entry]
            mirror[entry] = cursor[j]
            cursor[j] += 1
    return starts, columns, mirror


@fast_kernel
def weighted_product(a, b, weights):
    """Sum of a * b * weights over one row, in float32."""
    total = np.float32(0.0)
    for x in range(len(a)):
        total += a[x] * b[x] * weights[x]
    return total


@inlined_kernel
def normal_equations(rendered, boxes, offsets, starts, columns, mirror, image, weights):
    """Set up sum(W C_i C_j) and sum(W C_i I) of one band from the pixels that components share.

    rendered (n,) packed components C_k of this band; image, weights (H, W). Returns the matrix aligned with
    `columns` and the right side (K,), both float64. Cost O(shared pixels).
    """
    n = len(boxes)
    values = np.empty(len(columns))
    right = np.empty(n)
    for i in range(n):
        y0, x0, height, width = boxes[i, 0], boxes[i, 1], boxes[i, 2], boxes[i, 3]
        total = 0.0
        for y in range(height):
            row = rendered[offsets[i] + y * width : offsets[i] + (y + 1) * width]
            total += weighted_product(row, image[y0 + y, x0 : x0 + width], weights[y0 + y, x0 : x0 + width])
        right[i] = total
        for entry in range(starts[i], starts[i + 1]):
            j = columns[entry]
            if j < i:
                continue
            left, end = max(x0, boxes[j, 1]), min(x0 + width, boxes[j, 1] + boxes[j, 3])
            total = 0.0
            for y in range(max(y0, boxes[j, 0]), min(y0 + height, boxes[j, 0] + boxes[j, 2])):
                of_i = offsets[i] + (y - y0) * width - x0
                of_j = offsets[j] + (y - boxes[j, 0]) * boxes[j, 3] - boxes[j, 1]
                total += weighted_product(
                    rendered[of_i + left : of_i + end], rendered[of_j + left : of_j + end], weights[y, left:end]
                )
            values[entry] = total
            values[mirror[entry]] = total
    return values, right


@inlined_kernel
def solve_non_negative(starts, columns, values, right, solution, max_sweeps, tolerance):
    """Minimise x A x / 2 - b x for x >= 0 by coordinate descent, in place from `solution`.

    Stops when no coordinate moved by more than `tolerance` of its error 1 / sqrt(A_ii), or after `max_sweeps`. A
    component without pixels (A_ii = 0) gets zero. Singular systems, such as two equal components, are
    harmless. Returns the number of sweeps.
    """
    n = len(right)
    gradient = np.empty(n)  # b - A x, kept up to date
    for i in range(n):
        gradient[i] = right[i]
    for i in range(n):
        if values[starts[i]] <= 0:
            solution[i] = 0.0
        for entry in range(starts[i], starts[i + 1]):
            gradient[columns[entry]] -= values[entry] * solution[i]
    for sweep in range(max_sweeps):
        largest = 0.0
        for i in range(n):
            diagonal = values[starts[i]]
            if diagonal <= 0:
                continue
            new = max(solution[i] + gradient[i] / diagonal, 0.0)
            change = new - solution[i]
            if change == 0.0:
                continue
            solution[i] = new
            largest = max(largest, abs(change) * np.sqrt(diagonal))
            for entry in range(starts[i], starts[i + 1]):
                gradient[columns[entry]] -= values[entry] * change
        if largest < tolerance:
            return sweep + 1
    return max_sweeps


@allocating_kernel
def solve_spectra(rendered, boxes, offsets, images, weights, spectra, max_sweeps, tolerance):
    """Find the non-negative fluxes of all components, band by band, from where `spectra` (K, B) stands, in place.

    rendered (B, n) packed components for a spectrum of one. Returns the matrix: starts, columns, and the values of
    each band.
    """
    starts, columns, mirror = overlapping_pairs(boxes)
    n_bands = len(images)
    n = len(boxes)
    equations = np.empty((n_bands, len(columns)))
    solution = np.empty(n)
    for b in range(n_bands):
        values, right = normal_equations(rendered[b], boxes, offsets, starts, columns, mirror, images[b], weights[b])
        for k in range(n):
            solution[k] = spectra[k, b]
        solve_non_negative(starts, columns, values, right, solution, max_sweeps, tolerance)
        for k in range(n):
            spectra[k, b] = solution[k]
        for e in range(len(columns)):
            equations[b, e] = values[e]
    return starts, columns, equations


@inlined_kernel
def inverse_column(block, size, column):
    """First column of the inverse of the positive definite block[:size, :size], which is overwritten.

    Cholesky factorisation with the order reversed, block = U U^T with U upper triangular, so that the corner is the
    last pivot and the column follows from it downwards. Returns whether the block is positive definite.
    """
    for j in range(size - 1, -1, -1):
        for k in range(j + 1, size):
            block[j, j] -= block[j, k] * block[j, k]
        if not block[j, j] > 0:
            return False
        block[j, j] = np.sqrt(block[j, j])
        for i in range(j):
            for k in range(j + 1, size):
                block[i, j] -= block[i, k] * block[j, k]
            block[i, j] /= block[j, j]
    column[0] = 1.0 / (block[0, 0] * block[0, 0])
    for j in range(1, size):
        total = 0.0
        for i in range(j):
            total += block[i, j] * column[i]
        column[j] = -total / block[j, j]
    return True


@inlined_kernel
def strongest_partners(starts, columns, values, i, members):
    """Write the components most degenerate with i, A_ij^2 / (A_ii A_jj), into members[1:], the strongest first.

    Returns how many members there are with i itself, members[0]; at most len(members).
    """
    coupling = np.empty(len(members))
    members[0] = i
    count = 1
    for entry in range(starts[i] + 1, starts[i + 1]):
        diagonal = values[starts[columns[entry]]]
        if not diagonal > 0:
            continue
        strength = values[entry] * values[entry] / diagonal
        if count == len(members) and (count == 1 or strength <= coupling[count - 1]):
            continue
        place = count if count < len(members) else count - 1
        while place > 1 and coupling[place - 1] < strength:
            coupling[place] = coupling[place - 1]
            members[place] = members[place - 1]
            place -= 1
        coupling[place] = strength
        members[place] = columns[entry]
        count = min(count + 1, len(members))
    return count


@inlined_kernel
def marginal_variance(starts, columns, values, max_neighbours, strongest, neighbor):
    """Variance of every flux with those of its neighbours free: the diagonal of the inverse of A.

    For component i, from the inverse of the block of i and the `max_neighbours` components that are most
    degenerate with it; exact when all are among them. Infinite for a component without pixels. A prior of 1e-6 of
    the diagonal keeps equal components solvable. strongest, neighbor (K,) take the correlation with the component with
    which it is largest, and which one that is, 0 and -1 if there is none. Cost O(K max_neighbours^3).
    """
    n = len(starts) - 1
    out = np.empty(n)
    partners = np.empty((n, max_neighbours + 1), dtype=np.int64)
    covariances = np.empty((n, max_neighbours + 1))
    sizes = np.empty(n, dtype=np.int64)
    place = np.empty(n, dtype=np.int64)  # position in the block plus one; 0: not in it
    for i in range(n):
        place[i] = 0
    block = np.empty((max_neighbours + 1, max_neighbours + 1))
    for i in range(n):
        sizes[i] = 1
        if values[starts[i]] <= 0:
            out[i] = np.inf
            continue
        members = partners[i]
        size = strongest_partners(starts, columns, values, i, members)
        for m in range(size):
            place[members[m]] = m + 1
        for m in range(size):
            j = members[m]
            for c in range(size):
                block[m, c] = 0.0
            for entry in range(starts[j], starts[j + 1]):
                if place[columns[entry]] > 0:
                    block[m, place[columns[entry]] - 1] = values[entry]
            block[m, m] *= 1.0 + 1e-6
        for m in range(size):
            place[members[m]] = 0
        if inverse_column(block, size, covariances[i]):
            out[i], sizes[i] = covariances[i, 0], size
        else:
            out[i] = np.inf
    for i in range(n):
        strongest[i], neighbor[i] = 0.0, -1
        for m in range(1, sizes[i]):
            # Each variance is that of a block of its own.
            correlation = covariances[i, m] / np.sqrt(out[i] * out[partners[i, m]])
            if abs(correlation) > abs(strongest[i]):
                strongest[i], neighbor[i] = min(max(correlation, -1.0), 1.0), partners[i, m]
    return out


@inlined_kernel
def source_matrix(starts, columns, values, sources, n_sources, weights):
    """Matrix of whole sources from that of their components: A' = T^T A T with T the weight of each component.

    sources (K,) and weights (K,) of the components. Returns starts, columns and values as above, for n_sources.
    """
    n = len(sources)
    first = np.empty(n_sources + 1, dtype=np.int64)
    seen = np.empty(n_sources, dtype=np.int64)
    first[0] = 0
    for s in range(n_sources):
        first[s + 1], seen[s] = 0, -1
    for k in range(n):
        first[sources[k] + 1] += 1
    for s in range(n_sources):
        first[s + 1] += first[s]
    sums = np.empty(n_sources)
    partners = np.empty(n_sources, dtype=np.int64)
    new_starts = np.empty(n_sources + 1, dtype=np.int64)
    new_starts[0] = 0
    new_columns = np.empty(len(columns) + n_sources, dtype=np.int64)
    new_values = np.empty(len(columns) + n_sources)
    last = 0
    for s in range(n_sources):
        partners[0] = s
        seen[s] = s
        sums[s] = 0.0
        count = 1
        for k in range(first[s], first[s + 1]):
            for entry in range(starts[k], starts[k + 1]):
                j = columns[entry]
                t = sources[j]
                if seen[t] != s:
                    seen[t] = s
                    sums[t] = 0.0
                    partners[count] = t
                    count += 1
                sums[t] += weights[k] * weights[j] * values[entry]
        for m in range(count):
            new_columns[last] = partners[m]
            new_values[last] = sums[partners[m]]
            last += 1
        new_starts[s + 1] = last
    return new_starts, new_columns[:last], new_values[:last]


@allocating_kernel
def flux_variance(starts, columns, equations, sources, n_sources, spectra, sums, max_neighbours):
    """Variance of the total flux of each source in each band (S, B), and its strongest correlation.

    Shapes and colours of its components are held, its neighbours free. starts, columns and equations from
    `solve_spectra`, which left `spectra` (K, B). Returns also the correlation with the source with which it is largest,
    and which one that is, (S, B); 0 and -1 if there is none.
    """
    n, n_bands = spectra.shape
    variance = np.empty((n_sources, n_bands))
    correlation, neighbor = np.empty((n_bands, n_sources)), np.empty((n_bands, n_sources), dtype=np.int64)
    mixture = np.empty(n)
    flux = np.empty(n_sources)
    for b in range(n_bands):
        for s in range(n_sources):
            flux[s] = 0.0
        for k in range(n):
            # A component without flux in this band still has a shape: a trace of it keeps the matrix regular.
            top = np.float32(1e-4)
            for c in range(n_bands):
                top = max(top, np.float32(1e-3) * spectra[k, c])
            mixture[k] = max(spectra[k, b], top)
            flux[sources[k]] += mixture[k] * sums[k]
        s_starts, s_columns, s_values = source_matrix(starts, columns, equations[b], sources, n_sources, mixture)
        marginal = marginal_variance(s_starts, s_columns, s_values, max_neighbours, correlation[b], neighbor[b])
        for s in range(n_sources):
            variance[s, b] = marginal[s] * flux[s] * flux[s]
    return variance, correlation.T, neighbor.T
