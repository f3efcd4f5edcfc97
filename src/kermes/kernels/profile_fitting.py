"""Levenberg-Marquardt steps of a few neighbouring profile sources, in the Fourier modes of a stamp."""

import numpy as np
from rocket_fft import r2c

from kermes.kernels.decorator import fast_kernel, inlined_kernel, kernel
from kermes.kernels.profiles import N_COLUMNS, evaluate_profile, interpolate_index
from kermes.kernels.stamps import (
    DOUBLE,
    EXPONENTIAL,
    N_KINDS,
    N_SHAPE,
    POINT,
    SERSIC,
    add_model,
    add_planes,
    draw_source,
    see_modes,
    set_of_psfs,
)

TRIALS = (POINT, EXPONENTIAL, DOUBLE, SERSIC, DOUBLE)
"""Order in which a source is taken for other kinds. A disc with a bulge is tried before a Sersic profile, and again
from there if one of them had negative light."""

HOPELESS = (4.0, 1.0)
"""A simpler, and a more complex kind of a source is given up when the penalised loss with all other shapes held is more
than this above that of the present kind. What a simpler one leaves may be taken up by neighbours yet."""

MOST_PIXELS = 40000
"""Products are not formed from the pixels of more than so many stamps together, for the memory it takes."""

RIDGE = 1e-5
"""Keeps the fluxes of coincident sources finite."""


@fast_kernel
def products(a, b, out):
    """Real part of conj(a) b at every mode; a, b (2, M)."""
    for m in range(len(out)):
        out[m] = a[0, m] * b[0, m] + a[1, m] * b[1, m]


@fast_kernel
def dot(a, b):
    """Sum of products."""
    total = np.float32(0.0)
    for m in range(len(a)):
        total += a[m] * b[m]
    return total


@fast_kernel
def dot_three(a, rows, first):
    """Sums of products of a with three rows from `first` on, the last one again where there are no more.

    Together, because reading costs more than multiplying.
    """
    last = len(rows) - 1
    x, y, z = rows[first], rows[min(first + 1, last)], rows[min(first + 2, last)]
    by_x, by_y, by_z = np.float32(0.0), np.float32(0.0), np.float32(0.0)
    for m in range(len(a)):
        by_x += a[m] * x[m]
        by_y += a[m] * y[m]
        by_z += a[m] * z[m]
    return by_x, by_y, by_z


@kernel
def dot_rows(a, rows, n, out):
    """Sums of products of a with the first n rows."""
    for first in range(0, n, 3):
        by_x, by_y, by_z = dot_three(a, rows, first)
        out[first] = by_x
        if first + 1 < n:
            out[first + 1] = by_y
        if first + 2 < n:
            out[first + 2] = by_z


@fast_kernel
def multiply(a, b, out):
    """Products of the elements."""
    for m in range(len(out)):
        out[m] = a[m] * b[m]


@fast_kernel
def add_products(a, b, factor, out):
    """Add products of the elements, times a factor."""
    for m in range(len(out)):
        out[m] += factor * (a[m] * b[m])


@fast_kernel
def add_to(out, row, factor):
    """Add a row, times a factor."""
    for m in range(len(out)):
        out[m] += factor * row[m]


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


@kernel
def list_components(members, kinds, only, owner, part, slots):
    """List the components of a group and the place of each of their derivatives among its free shape parameters.

    owner, part (C,): place of the source in the group, and 0, or 1 for a bulge; slots (C, N_COLUMNS): -1 where a
    parameter is held. With `only` >= 0 the parameters of all other members are held. Returns the number of components
    and of parameters.
    """
    n_components = n_free = 0
    for i in range(len(members)):
        kind = kinds[members[i]]
        for k in range(2 if kind == DOUBLE else 1):
            owner[n_components], part[n_components] = i, k
            n_columns = 3 if kind == POINT else 7 if kind == SERSIC or k == 1 else 6
            for j in range(N_COLUMNS):
                slots[n_components, j] = -1
                if only >= 0 and i != only:
                    continue
                if k == 1 and 1 <= j < 3:
                    slots[n_components, j] = slots[n_components - 1, j]
                elif 1 <= j < n_columns:
                    slots[n_components, j] = n_free
                    n_free += 1
            n_components += 1
    return n_components, n_free


@kernel
def shape_index(part, j):
    """Which of the N_SHAPE numbers of a source column j of a component is the derivative by."""
    return j + 3 if part == 1 and j >= 3 else j - 1


@kernel
def see_column(column, lengths, psf, side, out):
    """Turn a column (2, M) into images seen through the PSFs (B, 2, M); out (B, side * side)."""
    n_bands, _, n_modes = psf.shape
    model = np.empty((n_bands, 2, n_modes), np.float32)
    for b in range(n_bands):
        for k in range(2):
            for m in range(n_modes):
                model[b, k, m] = column[k, m]
    planes = see_modes(lengths, psf, model, side).reshape(n_bands, side * side)
    for b in range(n_bands):
        for m in range(side * side):
            out[b, m] = planes[b, m]


@kernel
def evaluate_group(
    table,
    lengths,
    side,
    exact,
    psf,
    members,
    kinds,
    theta,
    owner,
    part,
    slots,
    n_components,
    everything,
    rows,
    columns,
    pixels,
):
    """Evaluate the components of a group with their derivatives, and with `exact` the images of those of flux one.

    theta (G, N_SHAPE); columns (C, N_COLUMNS, 2, M), pixels (C, N_COLUMNS, B, side * side). Unless `everything`, what
    has no free parameter is left as it is.
    """
    shape = np.empty(5)
    for c in range(n_components):
        if not everything and slots[c, 1] < 0:
            continue
        i = owner[c]
        kind = kinds[members[i]]
        for j in range(5):
            shape[j] = theta[i, j]
        ln_n = 0.0
        if part[c] == 1:
            shape[2], shape[3], shape[4], ln_n = theta[i, 6], theta[i, 7], theta[i, 8], theta[i, 9]
        elif kind == SERSIC:
            ln_n = theta[i, 5]
        cells, n_columns = table.exponential, N_COLUMNS - 1
        if part[c] == 1 or kind == SERSIC:
            interpolate_index(table.values, table.slopes, table.ln_index, ln_n, rows)
            cells, n_columns = rows, N_COLUMNS
        if slots[c, 1] < 0:
            n_columns = 1
        evaluate_profile(cells, lengths, side, shape, kind != POINT, columns[c, :n_columns])
        if exact:
            see_column(columns[c, 0], lengths, psf, side, pixels[c, 0])


@fast_kernel
def weighted_dot(a, b, weights):
    """Sum of products of two images with weights."""
    total = np.float32(0.0)
    for m in range(len(a)):
        total += a[m] * b[m] * weights[m]
    return total


@kernel
def solve_fluxes(exact, columns, pixels, data, power, n_components, work, matrix, fluxes, factors):
    """Solve the fluxes of all components jointly in each band; returns the gain in loss.

    data (B, 2, M), power (B, M): see `visit_group`; if `exact`, data[:, 0] and power are instead the images and weights
    of the stamp, (B, side * side). matrix (B, C, C) takes the normal matrices, factors (B, C, C) their Cholesky
    factors, fluxes (C, B) the answer.
    """
    n_bands = len(power)
    vectors, by_band = np.empty((n_bands, n_components)), np.empty(n_bands)
    flat = data.reshape(n_bands, data.shape[1] * data.shape[2])
    for c in range(n_components):
        for d in range(c + 1):
            if exact:
                for b in range(n_bands):
                    matrix[b, c, d] = matrix[b, d, c] = weighted_dot(pixels[c, 0, b], pixels[d, 0, b], power[b])
            else:
                products(columns[c, 0], columns[d, 0], work)
                dot_rows(work, power, n_bands, by_band)
                for b in range(n_bands):
                    matrix[b, c, d] = matrix[b, d, c] = by_band[b]
        if exact:
            for b in range(n_bands):
                vectors[b, c] = weighted_dot(pixels[c, 0, b], data[b, 0], power[b])
        else:
            dot_rows(columns[c, 0].reshape(flat.shape[1]), flat, n_bands, by_band)
            for b in range(n_bands):
                vectors[b, c] = by_band[b]
    gain = 0.0
    for b in range(n_bands):
        for c in range(n_components):
            for d in range(n_components):
                factors[b, c, d] = matrix[b, c, d]
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


@kernel
def prior_loss(theta, members, kinds, mean, weight):
    """Half the sum of squares of the distances from the prior means, over the parameters that the kinds have."""
    total = 0.0
    for i in range(len(members)):
        s = members[i]
        kind = kinds[s]
        for p in range(N_SHAPE):
            if p < 2 or (kind != POINT and p < 5) or (kind == SERSIC and p == 5) or (kind == DOUBLE and p > 5):
                total += 0.5 * weight[s, p] * (theta[i, p] - mean[s, p]) ** 2
    return total


@kernel
def add_priors(theta, members, owner, part, slots, n_components, mean, weight, hessian, gradient):
    """Add the priors of the free parameters to the normal equations."""
    for c in range(n_components):
        i = owner[c]
        for j in range(1, N_COLUMNS):
            if slots[c, j] >= 0 and (part[c] == 0 or j >= 3):
                p, s = shape_index(part[c], j), members[i]
                gradient[slots[c, j]] -= weight[s, p] * (theta[i, p] - mean[s, p])
                hessian[slots[c, j], slots[c, j]] += weight[s, p]


@kernel
def fill_modes(columns, data, power, n_components, slots, fluxes, work, hessian, gradient, coupling):
    """Products of the derivatives of a group at the modes of its stamp, see `normal_equations`."""
    n_bands, n_modes = power.shape
    weight = np.empty(n_modes, np.float32)
    residual = np.empty((2, n_modes), np.float32)
    weighted = np.empty((N_COLUMNS - 1, 2, n_modes), np.float32)
    rows = weighted.reshape(N_COLUMNS - 1, 2 * n_modes)
    sums = np.empty(max(n_bands, N_COLUMNS))
    places = np.empty(N_COLUMNS, np.int64)
    for c in range(n_components):
        # What is left of the data, summed over the bands as this component sees them.
        for m in range(n_modes):
            residual[0, m] = residual[1, m] = 0.0
        for b in range(n_bands):
            f = np.float32(fluxes[c, b])
            add_to(residual[0], data[b, 0], f)
            add_to(residual[1], data[b, 1], f)
        for d in range(n_components):
            for m in range(n_modes):
                weight[m] = 0.0
            for b in range(n_bands):
                add_to(weight, power[b], np.float32(fluxes[c, b] * fluxes[d, b]))
            for k in range(2):
                add_products(weight, columns[d, 0, k], np.float32(-1.0), residual[k])
            n = 0
            for q in range(1, N_COLUMNS):
                if slots[d, q] < 0:
                    continue
                products(columns[c, 0], columns[d, q], work)
                dot_rows(work, power, n_bands, sums)
                for b in range(n_bands):
                    coupling[b, c, slots[d, q]] += fluxes[d, b] * sums[b]
                if c <= d:
                    for k in range(2):
                        multiply(columns[d, q, k], weight, weighted[n, k])
                    places[n] = slots[d, q]
                    n += 1
            if n == 0 or c > d:
                continue
            for p in range(1, N_COLUMNS):
                i = slots[c, p]
                if i < 0:
                    continue
                dot_rows(columns[c, p].reshape(2 * n_modes), rows[:n], n, sums)
                for q in range(n):
                    j = places[q]
                    if c != d or j <= i:
                        hessian[i, j] += sums[q]
                        if c != d or i != j:
                            hessian[j, i] += sums[q]
        for p in range(1, N_COLUMNS):
            if slots[c, p] >= 0:
                gradient[slots[c, p]] += dot(columns[c, p, 0], residual[0]) + dot(columns[c, p, 1], residual[1])


@kernel
def fill_pixels(pixels, data, power, n_components, slots, fluxes, hessian, gradient, coupling):
    """The same from the pixels of the stamp with a weight each; data[:, 0], power (B, side * side)."""
    n_bands, n_pixels = power.shape
    residual = np.empty(n_pixels, np.float32)
    weighted = np.empty((N_COLUMNS, n_pixels), np.float32)
    sums, places = np.empty(N_COLUMNS), np.empty(N_COLUMNS, np.int64)
    for b in range(n_bands):
        for m in range(n_pixels):
            residual[m] = data[b, 0, m]
        for d in range(n_components):
            add_to(residual, pixels[d, 0, b], np.float32(-fluxes[d, b]))
        multiply(residual, power[b], residual)
        for d in range(n_components):
            n = 0
            for q in range(1, N_COLUMNS):
                if slots[d, q] >= 0:
                    multiply(pixels[d, q, b], power[b], weighted[n])
                    places[n] = slots[d, q]
                    n += 1
                    gradient[slots[d, q]] += fluxes[d, b] * dot(pixels[d, q, b], residual)
            if n == 0:
                continue
            for c in range(n_components):
                dot_rows(pixels[c, 0, b], weighted[:n], n, sums)
                for q in range(n):
                    coupling[b, c, places[q]] += fluxes[d, b] * sums[q]
                if c > d:
                    continue
                for p in range(1, N_COLUMNS):
                    i = slots[c, p]
                    if i < 0:
                        continue
                    dot_rows(pixels[c, p, b], weighted[:n], n, sums)
                    for q in range(n):
                        j = places[q]
                        if c != d or j <= i:
                            value = sums[q] * fluxes[c, b] * fluxes[d, b]
                            hessian[i, j] += value
                            if c != d or i != j:
                                hessian[j, i] += value


@kernel
def normal_equations(
    exact,
    columns,
    pixels,
    data,
    power,
    n_components,
    n_free,
    slots,
    factors,
    fluxes,
    work,
    hessian,
    gradient,
    coupling,
):
    """Normal matrix (F, F) and gradient (F,) of the free shape parameters with the fluxes eliminated.

    coupling (B, C, F) takes the products of amplitudes and derivatives.
    """
    n_bands = len(power)
    for p in range(n_free):
        gradient[p] = 0.0
        for q in range(n_free):
            hessian[p, q] = 0.0
        for b in range(n_bands):
            for c in range(n_components):
                coupling[b, c, p] = 0.0
    if exact:
        fill_pixels(pixels, data, power, n_components, slots, fluxes, hessian, gradient, coupling)
    else:
        fill_modes(columns, data, power, n_components, slots, fluxes, work, hessian, gradient, coupling)
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


@kernel
def fill_variances(
    members,
    owner,
    part,
    slots,
    n_components,
    n_free,
    matrix,
    factors,
    hessian,
    coupling,
    flux_variance,
    position_variance,
):
    """Variances of the fluxes and positions of a group with everything else free, from the joint normal matrix.

    flux_variance (S, B) is that of the whole source, position_variance (S, 2); rows of the members are filled, NaN
    where the matrix is singular or a band has no data. hessian is replaced by its Cholesky factor.
    """
    n_bands = len(matrix)
    regular = cholesky(hessian, n_free)
    response, share = np.empty(n_components), np.empty(n_free)
    for i in range(len(members)):
        s = members[i]
        for j in range(2):
            position_variance[s, j] = np.nan
        for b in range(n_bands):
            flux_variance[s, b] = np.nan
        if not regular:
            continue
        first = -1
        for c in range(n_components):
            if owner[c] == i and part[c] == 0:
                first = c
        for j in range(2):
            for p in range(n_free):
                share[p] = 0.0
            share[slots[first, 1 + j]] = 1.0
            substitute(hessian, n_free, share, False)
            total = 0.0
            for p in range(n_free):
                total += share[p] * share[p]
            position_variance[s, j] = total
        for b in range(n_bands):
            if not matrix[b, first, first] > 0.0:
                continue
            # The whole flux is e . f; its variance is e A^-1 e + (A^-1 e) C H^-1 C^T (A^-1 e).
            for c in range(n_components):
                response[c] = 1.0 if owner[c] == i else 0.0
            substitute(factors[b], n_components, response, False)
            total = 0.0
            for c in range(n_components):
                total += response[c] * response[c]
            for c in range(n_components - 1, -1, -1):
                value = response[c]
                for d in range(c + 1, n_components):
                    value -= factors[b, d, c] * response[d]
                response[c] = value / factors[b, c, c]
            for p in range(n_free):
                share[p] = 0.0
                for c in range(n_components):
                    share[p] += response[c] * coupling[b, c, p]
            substitute(hessian, n_free, share, False)
            for p in range(n_free):
                total += share[p] * share[p]
            flux_variance[s, b] = total


@kernel
def fit_group(
    table,
    lengths,
    side,
    exact,
    psf,
    data,
    power,
    members,
    sources,
    only,
    largest,
    n_steps,
    tolerance,
    limit,
    errors,
    flux_variance,
    position_variance,
):
    """Fit the sources of a group to the data of a stamp.

    data (B, 2, M): conj(P) times the transform of the weighted data; power (B, M): |P|^2 times the weight; or, if
    `exact`, the images (B, 1, side * side) and weights (B, side * side); psf (B, 2, M); largest (N_SHAPE,): longest
    step. Shapes and fluxes of the members are replaced; with `only` >= 0 the shapes of that member alone. The fit is
    given up when even three times of what a step promises would not bring the loss below a limit; the loss is then what
    that step promises. With `errors` nothing is fitted, and data need not be there: the variances are filled, see
    `fill_variances`. Returns the loss relative to no model, with that of the priors, and the number of steps.
    """
    n_bands, n_modes = len(power), psf.shape[2]
    n = len(members)
    kinds, mean, weight = sources.kinds, sources.mean, sources.weight
    owner, part = np.empty(2 * n, np.int64), np.empty(2 * n, np.int64)
    slots = np.empty((2 * n, N_COLUMNS), np.int64)
    n_components, n_free = list_components(members, kinds, only, owner, part, slots)
    rows = np.empty(table.exponential.shape, np.float32)
    theta, trial = np.empty((n, N_SHAPE)), np.empty((n, N_SHAPE))
    damping, done = 1e-3, -1
    for i in range(n):
        for p in range(N_SHAPE):
            theta[i, p] = sources.shapes[members[i], p]
    work = np.empty(n_modes, np.float32)
    columns = np.empty((n_components, N_COLUMNS, 2, n_modes), np.float32)
    pixels = np.empty((n_components if exact else 0, N_COLUMNS, n_bands, side * side), np.float32)
    matrix = np.empty((n_bands, n_components, n_components))
    factors = np.empty((n_bands, n_components, n_components))
    fluxes, trial_fluxes = np.empty((n_components, n_bands)), np.empty((n_components, n_bands))
    evaluate_group(
        table,
        lengths,
        side,
        exact,
        psf,
        members,
        kinds,
        theta,
        owner,
        part,
        slots,
        n_components,
        done < 0,
        rows,
        columns,
        pixels,
    )
    loss = -solve_fluxes(exact, columns, pixels, data, power, n_components, work, matrix, fluxes, factors)
    loss += prior_loss(theta, members, kinds, mean, weight)
    hessian, damped = np.empty((n_free, n_free)), np.empty((n_free, n_free))
    gradient, step = np.empty(n_free), np.empty(n_free)
    coupling = np.empty((n_bands, n_components, n_free))
    done = 0
    if errors:
        # Of what was fitted already.
        for c in range(n_components):
            for b in range(n_bands):
                fluxes[c, b] = sources.fluxes[members[owner[c]], part[c], b]
    for _ in range(1 if errors else n_steps):
        if exact:
            for c in range(n_components):
                for q in range(1, N_COLUMNS):
                    if slots[c, q] >= 0:
                        see_column(columns[c, q], lengths, psf, side, pixels[c, q])
        normal_equations(
            exact,
            columns,
            pixels,
            data,
            power,
            n_components,
            n_free,
            slots,
            factors,
            fluxes,
            work,
            hessian,
            gradient,
            coupling,
        )
        add_priors(theta, members, owner, part, slots, n_components, mean, weight, hessian, gradient)
        if errors:
            fill_variances(
                members,
                owner,
                part,
                slots,
                n_components,
                n_free,
                matrix,
                factors,
                hessian,
                coupling,
                flux_variance,
                position_variance,
            )
            return loss, done
        accepted, hopeless = False, False
        trial_loss = loss
        for _attempt in range(4):
            for p in range(n_free):
                for q in range(n_free):
                    damped[p, q] = hessian[p, q]
                damped[p, p] += damping * abs(hessian[p, p]) + 1e-6
                step[p] = gradient[p]
            if not cholesky(damped, n_free):
                damping = 10 * damping
                continue
            substitute(damped, n_free, step, True)
            promised = 0.0
            for p in range(n_free):
                promised += 0.5 * step[p] * gradient[p]
            if loss - 3.0 * promised > limit:
                loss -= promised
                hopeless = True
                break
            for i in range(n):
                for p in range(N_SHAPE):
                    trial[i, p] = theta[i, p]
            for c in range(n_components):
                i = owner[c]
                for j in range(1, N_COLUMNS):
                    if slots[c, j] >= 0 and (part[c] == 0 or j >= 3):
                        p, s = shape_index(part[c], j), members[i]
                        move = min(max(step[slots[c, j]], -largest[p]), largest[p])
                        trial[i, p] = min(max(theta[i, p] + move, sources.low[s, p]), sources.high[s, p])
            evaluate_group(
                table,
                lengths,
                side,
                exact,
                psf,
                members,
                kinds,
                trial,
                owner,
                part,
                slots,
                n_components,
                done < 0,
                rows,
                columns,
                pixels,
            )
            trial_loss = -solve_fluxes(
                exact, columns, pixels, data, power, n_components, work, matrix, trial_fluxes, factors
            )
            trial_loss += prior_loss(trial, members, kinds, mean, weight)
            if trial_loss <= loss:
                accepted = True
                break
            damping = 10 * damping
        if hopeless or not accepted:
            break
        done += 1
        fall = loss - trial_loss
        loss = trial_loss
        damping = max(0.1 * damping, 1e-6)
        theta, trial = trial, theta
        fluxes, trial_fluxes = trial_fluxes, fluxes
        if fall < tolerance:
            break
    for c in range(n_components):
        for b in range(n_bands):
            sources.fluxes[members[owner[c]], part[c], b] = fluxes[c, b]
    for i in range(n):
        for p in range(N_SHAPE):
            sources.shapes[members[i], p] = theta[i, p]
    return loss, done


@kernel
def propose_kind(sources, members, i, kind, may, kept_shapes, kept_fluxes):
    """Take member i of a group for another kind, if it may become that.

    may (N_KINDS,): which kinds it may become. kept_shapes (G, N_SHAPE), kept_fluxes
    (G, 2, B) take the state of the members before. Returns whether it is another kind now.
    """
    s = members[i]
    kinds, shapes = sources.kinds, sources.shapes
    before = kinds[s]
    if not may[kind] or kind == before:
        return False
    for k in range(len(members)):
        for p in range(N_SHAPE):
            kept_shapes[k, p] = shapes[members[k], p]
        for part in range(2):
            for b in range(sources.fluxes.shape[2]):
                kept_fluxes[k, part, b] = sources.fluxes[members[k], part, b]
    kinds[s] = kind
    if kind == DOUBLE:
        # The bulge starts, and is expected, at half the radius of the whole; that of a Sersic profile is most
        # of it, in a larger disc.
        smaller = 0.2 if before == SERSIC else 0.7
        shapes[s, 6] = sources.mean[s, 6] = min(max(shapes[s, 2] - smaller, sources.low[s, 6]), sources.high[s, 6])
        shapes[s, 7], shapes[s, 8] = shapes[s, 3], shapes[s, 4]
        if before == SERSIC:
            shapes[s, 9] = shapes[s, 5]
            shapes[s, 2] = min(shapes[s, 2] + 0.3, sources.high[s, 2])
    elif kind == SERSIC:
        shapes[s, 5] = 0.0
    return True


@kernel
def take_back(sources, members, i, kind, kept_shapes, kept_fluxes):
    """Make member i of a group what it was, and all members what `propose_kind` has kept."""
    sources.kinds[members[i]] = kind
    for k in range(len(members)):
        for p in range(N_SHAPE):
            sources.shapes[members[k], p] = kept_shapes[k, p]
        for part in range(2):
            for b in range(sources.fluxes.shape[2]):
                sources.fluxes[members[k], part, b] = kept_fluxes[k, part, b]


@kernel
def has_dark_part(fluxes, strength):
    """Whether one of the two parts of a source, fluxes (2, B), has negative light in all, weighted by strength (B,)."""
    for part in range(2):
        total = 0.0
        for b in range(len(strength)):
            total += fluxes[part, b] * strength[b]
        if total < 0.0:
            return True
    return False


@kernel
def shift_group(sources, members, y, x):
    """Count the positions of some sources from another corner."""
    for s in members:
        for array in (sources.shapes, sources.mean, sources.low, sources.high):
            array[s, 0] -= y
            array[s, 1] -= x


@kernel
def mean_weight(weights, sources, members, out):
    """Mean weight of the valid pixels near the members of a group in each band, out (B,).

    Returns whether the weights there are uneven: some pixels are not valid, or count much more than others.
    """
    n_bands, height, width = weights.shape
    uneven = False
    for b in range(n_bands):
        total, n = 0.0, 0
        for s in members:
            reach = 4
            if sources.kinds[s] != POINT:
                reach += int(min(np.exp(sources.shapes[s, 2]), 8.0))
            y, x = int(np.floor(sources.shapes[s, 0] + 0.5)), int(np.floor(sources.shapes[s, 1] + 0.5))
            least, most, n_bad = np.inf, 0.0, 0
            for i in range(y - reach, y + reach + 1):
                for j in range(x - reach, x + reach + 1):
                    weight = weights[b, i, j] if 0 <= i < height and 0 <= j < width else np.float32(0.0)
                    if weight > 0.0:
                        total += weight
                        n += 1
                        least, most = min(least, weight), max(most, weight)
                    else:
                        n_bad += 1
            everything = n_bad == (2 * reach + 1) ** 2
            if (n_bad > 1 and not everything) or most > 1.3 * least:
                uneven = True
        out[b] = total / max(n, 1)
    return uneven


@fast_kernel
def weigh_row(values, weights, mean, out):
    """Multiply values and weights; returns in how many pixels the weight is not the mean, up to a twentieth."""
    n = 0
    for x in range(len(values)):
        out[x] = values[x] * weights[x]
        n += abs(weights[x] - mean) > np.float32(0.05) * mean
    return n


@fast_kernel
def power_row(psf_re, psf_im, factor, out):
    """Power of a row of modes, times a factor."""
    for j in range(len(out)):
        out[j] = factor * (psf_re[j] * psf_re[j] + psf_im[j] * psf_im[j])


@fast_kernel
def adjoint_row(row, psf_re, psf_im, factor, re, im):
    """Multiply a row of complex modes with the conjugate transform of a PSF, and a factor."""
    for j in range(len(re)):
        re[j] = factor * (psf_re[j] * row[j].real + psf_im[j] * row[j].imag)
        im[j] = factor * (psf_re[j] * row[j].imag - psf_im[j] * row[j].real)


@kernel
def gather_modes(transformed, lengths, psf, scale, mean, data, power):
    """Data and power (2, M), (M,) of one band from the transform (side, side // 2 + 1) of its weighted pixels."""
    start = 0
    for i in range(len(lengths)):
        if lengths[i] == 0:
            continue
        end = start + lengths[i]
        re, im = psf[0, start:end], psf[1, start:end]
        power_row(re, im, mean * scale, power[start:end])
        adjoint_row(transformed[i], re, im, scale, data[0, start:end], data[1, start:end])
        # Modes of the first column stand for themselves, all others for two.
        power[start] *= np.float32(0.5)
        data[0, start] *= np.float32(0.5)
        data[1, start] *= np.float32(0.5)
        start = end


@kernel
def collect_data(residual, weights, mean_weights, lengths, psf, model, side, y0, x0, exact, errors, data, power):
    """Fill data and power of a stamp, see `fit_group`; returns whether its weights are uniform.

    model (B, 2, M) is that of the members, which the residual (B, H, W) lacks. With `errors` data are left alone.
    """
    n_bands, height, width = residual.shape
    planes = np.zeros((n_bands, side, side), np.float32)
    transformed = np.zeros((n_bands, side, side // 2 + 1), np.complex64)
    left, right = max(0, -x0), min(side, width - x0)
    top, bottom = max(0, -y0), min(side, height - y0)
    inside = left <= 0 and top <= 0 and right >= side and bottom >= side
    uniform = True
    if exact:
        own = see_modes(lengths, psf, model, side)
    for b in range(n_bands):
        uniform = uniform and (inside or not mean_weights[b] > 0.0)
        if exact:
            for i in range(side):
                for j in range(side):
                    here = left <= j < right and top <= i < bottom
                    data[b, 0, i * side + j] = own[b, i, j] + (residual[b, y0 + i, x0 + j] if here else 0.0)
                    power[b, i * side + j] = weights[b, y0 + i, x0 + j] if here else 0.0
        elif left < right and not errors:
            for i in range(top, bottom):
                n_off = weigh_row(
                    residual[b, y0 + i, x0 + left : x0 + right],
                    weights[b, y0 + i, x0 + left : x0 + right],
                    np.float32(mean_weights[b]),
                    planes[b, i, left:right],
                )
                uniform = uniform and n_off == 0
    if exact:
        return uniform
    if not errors:
        axes = np.empty(2, np.int64)
        axes[0], axes[1] = 1, 2
        r2c(planes, transformed, axes, True, 1.0, 1)
    scale = np.float32(2.0 / (side * side))
    for b in range(n_bands):
        gather_modes(transformed[b], lengths, psf[b], scale, np.float32(mean_weights[b]), data[b], power[b])
        for k in range(2):
            add_products(power[b], model[b, k], np.float32(1.0), data[b, k])
    return uniform


@inlined_kernel
def visit_group(
    residual,
    weights,
    table,
    modes,
    sides,
    sources,
    members,
    stamp,
    mean_weights,
    uneven,
    largest,
    n_steps,
    tolerance,
    candidates,
    penalties,
    flux_variance,
    position_variance,
    errors,
):
    """Fit one group to what the others leave, and leave its new residual.

    residual, weights (B, H, W). What the data say enters exactly, pixel by pixel, through the transform of the weighted
    residual; the curvature is that of uniform weights, `mean_weights` (B,), so that visits converge on the same answer
    whatever the weights are, in one visit if they are uniform. Where they are `uneven` near the sources all products
    are formed from the pixels instead. Then each member in turn is taken for other kinds, and what lowers the penalised
    loss is kept: candidates (S, N_KINDS) says which kinds a source may become, penalties (N_KINDS,) what each adds to
    the loss. With `errors` nothing is fitted but the variances. Returns the loss, the number of steps, and whether one
    visit suffices.
    """
    n_bands = len(residual)
    side, y0, x0 = sides[stamp[0]], stamp[1], stamp[2]
    k = modes.sets[stamp[0], stamp[3]]
    lengths, psf = modes.lengths[modes.starts[k] : modes.starts[k + 1]], set_of_psfs(modes, k)
    choosing = False
    for s in members:
        moved = False
        for j in range(4):
            moved = moved or sources.stamps[s, j] != stamp[j]
        if moved:
            draw_source(table, modes, sides, sources, s, 1.0, residual)
            for j in range(4):
                sources.stamps[s, j] = stamp[j]
            draw_source(table, modes, sides, sources, s, -1.0, residual)
        for j in range(N_KINDS):
            choosing = choosing or (candidates[s, j] and not errors)
    model = np.zeros(psf.shape, np.float32)
    for s in members:
        add_model(table, lengths, side, sources, s, y0, x0, 1.0, model)
    shift_group(sources, members, y0, x0)
    exact = uneven and len(members) * side * side <= MOST_PIXELS
    n_values = side * side if exact else psf.shape[2]
    data = np.empty((n_bands, 1 if exact else 2, n_values), np.float32)
    power = np.empty((n_bands, n_values), np.float32)
    uniform = collect_data(
        residual, weights, mean_weights, lengths, psf, model, side, y0, x0, exact, errors, data, power
    )
    strength = np.empty(n_bands)
    for b in range(n_bands):
        strength[b] = np.sqrt(mean_weights[b])
    kept_shapes, kept_fluxes = np.empty((len(members), N_SHAPE)), np.empty((len(members), 2, n_bands))
    losses = np.empty(N_KINDS)
    negative = False
    loss, steps = 0.0, 0
    # First all members as they are, then one after the other as something else.
    for turn in range(-1, len(TRIALS) * len(members) if choosing else 0):
        i, kind, before = max(turn, 0) // len(TRIALS), POINT, POINT
        s = members[i]
        if turn >= 0:
            kind, before = TRIALS[turn % len(TRIALS)], sources.kinds[s]
            if turn % len(TRIALS) == 0:
                negative = False
                for j in range(N_KINDS):
                    losses[j] = np.nan
                losses[before] = loss + penalties[before]
            again = kind != DOUBLE or np.isnan(losses[DOUBLE]) or (before == SERSIC and negative)
            if again and propose_kind(sources, members, i, kind, candidates[s], kept_shapes, kept_fluxes):
                pass
            else:
                kind = -1
        # Before all members are fitted with it, a kind has to show with the other shapes held that it may be better.
        n_fits = 0 if kind < 0 else 1 if turn < 0 or len(members) == 1 else 2
        trial, done = 0.0, 0
        for left in range(n_fits, 0, -1):
            limit = np.inf if turn < 0 else loss + penalties[before] - penalties[kind]
            if left == 2:
                limit += HOPELESS[int(kind > before)]
            trial, done = fit_group(
                table,
                lengths,
                side,
                exact,
                psf,
                data,
                power,
                members,
                sources,
                i if left == 2 else -1,
                largest,
                n_steps,
                tolerance,
                limit,
                errors,
                flux_variance,
                position_variance,
            )
            if trial > limit:
                break
        if turn < 0:
            loss, steps = trial, done
        elif n_fits > 0:
            worse = not trial + penalties[kind] < loss + penalties[before]
            if kind == DOUBLE:
                negative = has_dark_part(sources.fluxes[s], strength)
                worse = worse or negative
            if np.isnan(losses[kind]) or not worse:
                losses[kind] = trial + penalties[kind]
            if worse:
                take_back(sources, members, i, before, kept_shapes, kept_fluxes)
            else:
                loss, steps = trial, done
                if kind != DOUBLE:
                    for b in range(n_bands):
                        sources.fluxes[s, 1, b] = 0.0
        if turn % len(TRIALS) == len(TRIALS) - 1 and turn >= 0:
            for j in range(N_KINDS):
                sources.evidence[s, j] = losses[j] - losses[sources.kinds[s]]
    shift_group(sources, members, -y0, -x0)
    if not errors:
        for b in range(n_bands):
            for m in range(psf.shape[2]):
                model[b, 0, m] = -model[b, 0, m]
                model[b, 1, m] = -model[b, 1, m]
        for s in members:
            add_model(table, lengths, side, sources, s, y0, x0, 1.0, model)
        add_planes(residual, see_modes(lengths, psf, model, side), y0, x0, -1.0)
    return loss, steps, (uniform or exact) and not errors


@kernel
def sweep(
    residual,
    weights,
    soft_weights,
    table,
    modes,
    sides,
    sources,
    groups,
    offsets,
    order,
    stamps,
    soft,
    largest,
    n_steps,
    tolerance,
    candidates,
    penalties,
    flux_variance,
    position_variance,
    errors,
    closed,
):
    """Visit groups one after the other, see `visit_group`; returns the number of steps of all sources.

    groups (S,), offsets (G + 1,): members of each group; order: which groups, and when; soft (G,): whether a group
    sees the soft weights; n_steps (G,); candidates (S, N_KINDS). closed (G,) takes whether the fit of a group came to
    its end, and would again as long as nothing else changes.
    """
    mean_weights = np.empty(len(residual))
    steps = 0
    for g in order:
        members = groups[offsets[g] : offsets[g + 1]]
        seen = soft_weights if soft[g] else weights
        uneven = mean_weight(seen, sources, members, mean_weights)
        _, n, uniform = visit_group(
            residual,
            seen,
            table,
            modes,
            sides,
            sources,
            members,
            stamps[g],
            mean_weights,
            uneven,
            largest,
            n_steps[g],
            tolerance,
            candidates,
            penalties,
            flux_variance,
            position_variance,
            errors,
        )
        closed[g] = uniform and n < n_steps[g]
        steps += n * len(members)
    return steps
