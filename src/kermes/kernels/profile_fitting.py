"""Levenberg-Marquardt steps of a few neighbouring profile sources, in the Fourier modes of a stamp."""

from typing import NamedTuple

import numpy as np
from rocket_fft import c2r, r2c

from kermes.kernels.decorator import fast_kernel, kernel
from kermes.kernels.profiles import N_COLUMNS, evaluate_profile, interpolate_index

POINT, EXPONENTIAL, SERSIC, DOUBLE = 0, 1, 2, 3
N_KINDS = 4
N_SHAPE = 10
"""y, x, ln r, e1, e2, ln n; ln r, e1, e2 and ln n of the bulge."""

MOST_PIXELS = 40000
"""Products are not formed from the pixels of more than so many stamps together, for the memory it takes."""

RIDGE = 1e-5
"""Keeps the fluxes of coincident sources finite."""


class Modes(NamedTuple):
    """Fourier modes that are fitted, one set for each side of a stamp and each level of brightness."""

    sets: np.ndarray
    """Number of the set for a side and a level, shape (sides, levels); -1: not made yet."""

    offsets: np.ndarray
    """Set k has the modes offsets[k]:offsets[k + 1]."""

    lengths: np.ndarray
    """Row i of the half plane of a set has the modes 0 .. lengths - 1; sets one after the other."""

    starts: np.ndarray
    """Set k has the rows starts[k]:starts[k + 1]."""

    psf: np.ndarray
    """Transforms of the PSFs, (B, 2, modes) of one set after the other, flattened."""


class Sources(NamedTuple):
    """State of all sources of a blend; positions in pixels of the blend."""

    kinds: np.ndarray
    shapes: np.ndarray
    """Shape (S, N_SHAPE)."""

    fluxes: np.ndarray
    """Total flux of both parts in each band, shape (S, 2, B)."""

    mean: np.ndarray
    weight: np.ndarray
    """Prior mean and inverse variance of the shapes."""

    low: np.ndarray
    high: np.ndarray
    """Limits of the shapes."""

    stamps: np.ndarray
    """Side index, y0, x0, level of the stamp that the source is drawn on now, shape (S, 4); side index -1: none."""

    evidence: np.ndarray
    """Fall of the penalised loss from each kind of model to the chosen one, shape (S, N_KINDS); NaN where not tried."""


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
def list_components(members, kinds, owner, part, slots):
    """List the components of a group and the place of each of their derivatives among its free shape parameters.

    owner, part (C,): place of the source in the group, and 0, or 1 for a bulge; slots (C, N_COLUMNS): -1 where a
    parameter is held. Returns the number of components and of parameters,.
    """
    n_components = n_free = 0
    for i in range(len(members)):
        kind = kinds[members[i]]
        for j in range(N_COLUMNS):
            slots[n_components, j] = -1
        owner[n_components], part[n_components] = i, 0
        n_columns = 3 if kind == POINT else 6
        for j in range(1, n_columns):
            slots[n_components, j] = n_free
            n_free += 1
        if kind == SERSIC:
            slots[n_components, 6] = n_free
            n_free += 1
        n_components += 1
        if kind == DOUBLE:
            owner[n_components], part[n_components] = i, 1
            slots[n_components, 0] = -1
            for j in range(1, N_COLUMNS):
                slots[n_components, j] = slots[n_components - 1, j]
            for j in range(3, N_COLUMNS):
                slots[n_components, j] = n_free
                n_free += 1
            n_components += 1
    return n_components, n_free


@kernel
def shape_index(part, j):
    """Which of the N_SHAPE numbers of a source column j of a component is the derivative by."""
    return j + 3 if part == 1 and j >= 3 else j - 1


@kernel
def evaluate_group(table, lengths, side, members, kinds, theta, owner, part, n_components, rows, columns):
    """Evaluate all components of a group with their derivatives; theta (G, N_SHAPE)."""
    shape = np.empty(5)
    for c in range(n_components):
        i = owner[c]
        kind = kinds[members[i]]
        for j in range(5):
            shape[j] = theta[i, j]
        ln_n = 0.0
        if part[c] == 1:
            shape[2], shape[3], shape[4], ln_n = theta[i, 6], theta[i, 7], theta[i, 8], theta[i, 9]
        elif kind == SERSIC:
            ln_n = theta[i, 5]
        cells = table.exponential
        if part[c] == 1 or kind == SERSIC:
            interpolate_index(table.values, table.slopes, table.ln_index, ln_n, rows)
            cells = rows
        evaluate_profile(cells, lengths, side, shape, kind != POINT, columns[c], N_COLUMNS)


@fast_kernel
def weighted_dot(a, b, weights):
    """Sum of products of two images with weights."""
    total = np.float32(0.0)
    for m in range(len(a)):
        total += a[m] * b[m] * weights[m]
    return total


@kernel
def see_columns(columns, slots, n_components, first, last, lengths, psf, side, pixels):
    """Turn columns first to last - 1 of all components, if used, into images; pixels (C, N_COLUMNS, B, side * side)."""
    transformed = np.empty((side, side // 2 + 1), np.complex64)
    axes = np.arange(2)
    for c in range(n_components):
        for q in range(first, last):
            if q > 0 and slots[c, q] < 0:
                continue
            for b in range(psf.shape[0]):
                m = 0
                for i in range(side):
                    for j in range(side // 2 + 1):
                        if j < lengths[i]:
                            re, im = columns[c, q, 0, m], columns[c, q, 1, m]
                            u, v = psf[b, 0, m], psf[b, 1, m]
                            transformed[i, j] = np.complex64(complex(re * u - im * v, re * v + im * u))
                            m += 1
                        else:
                            transformed[i, j] = 0.0
                c2r(transformed, pixels[c, q, b].reshape(side, side), axes, False, 1.0 / (side * side), 1)


@kernel
def solve_fluxes(exact, columns, pixels, data, power, n_components, work, matrix, fluxes, factors):
    """Solve the fluxes of all components jointly in each band; returns the gain in loss.

    data (B, 2, M), power (B, M): see `visit_group`; if `exact`, data[:, 0] and power are instead the images and weights
    of the stamp, (B, side * side). matrix (B, C, C) takes the normal matrices, factors (B, C, C) their Cholesky
    factors, fluxes (C, B) the answer.
    """
    n_bands = len(power)
    vectors = np.empty((n_bands, n_components))
    for c in range(n_components):
        for d in range(c + 1):
            if exact:
                for b in range(n_bands):
                    matrix[b, c, d] = matrix[b, d, c] = weighted_dot(pixels[c, 0, b], pixels[d, 0, b], power[b])
            else:
                products(columns[c, 0], columns[d, 0], work)
                for b in range(n_bands):
                    matrix[b, c, d] = matrix[b, d, c] = dot(work, power[b])
        for b in range(n_bands):
            if exact:
                vectors[b, c] = weighted_dot(pixels[c, 0, b], data[b, 0], power[b])
            else:
                vectors[b, c] = dot(columns[c, 0, 0], data[b, 0]) + dot(columns[c, 0, 1], data[b, 1])
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
def prior_loss(theta, members, kinds, owner, part, slots, n_components, mean, weight):
    """Half the sum of squares of the distances from the prior means, over the free parameters."""
    total = 0.0
    for c in range(n_components):
        i = owner[c]
        for j in range(1, N_COLUMNS):
            if slots[c, j] >= 0 and (part[c] == 0 or j >= 3):
                p = shape_index(part[c], j)
                total += 0.5 * weight[members[i], p] * (theta[i, p] - mean[members[i], p]) ** 2
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
    for c in range(n_components):
        # What is left of the data, summed over the bands as this component sees them.
        for m in range(n_modes):
            residual[0, m] = residual[1, m] = 0.0
        for b in range(n_bands):
            f = np.float32(fluxes[c, b])
            for m in range(n_modes):
                residual[0, m] += f * data[b, 0, m]
                residual[1, m] += f * data[b, 1, m]
        for d in range(n_components):
            for m in range(n_modes):
                weight[m] = 0.0
            for b in range(n_bands):
                f = np.float32(fluxes[c, b] * fluxes[d, b])
                for m in range(n_modes):
                    weight[m] += f * power[b, m]
            for m in range(n_modes):
                residual[0, m] -= weight[m] * columns[d, 0, 0, m]
                residual[1, m] -= weight[m] * columns[d, 0, 1, m]
            for q in range(1, N_COLUMNS):
                if slots[d, q] < 0:
                    continue
                products(columns[c, 0], columns[d, q], work)
                for b in range(n_bands):
                    coupling[b, c, slots[d, q]] += fluxes[d, b] * dot(work, power[b])
                if c > d:
                    continue
                for p in range(1, N_COLUMNS):
                    if slots[c, p] < 0 or (c == d and p > q):
                        continue
                    products(columns[c, p], columns[d, q], work)
                    value = dot(work, weight)
                    hessian[slots[c, p], slots[d, q]] += value
                    if not (c == d and p == q):
                        hessian[slots[d, q], slots[c, p]] += value
        for p in range(1, N_COLUMNS):
            if slots[c, p] >= 0:
                gradient[slots[c, p]] += dot(columns[c, p, 0], residual[0]) + dot(columns[c, p, 1], residual[1])


@kernel
def fill_pixels(pixels, data, power, n_components, slots, fluxes, hessian, gradient, coupling):
    """The same from the pixels of the stamp with a weight each; data[:, 0], power (B, side * side)."""
    n_bands = len(power)
    residual = np.empty(power.shape[1], np.float32)
    for b in range(n_bands):
        for m in range(len(residual)):
            residual[m] = data[b, 0, m]
        for d in range(n_components):
            f = np.float32(fluxes[d, b])
            for m in range(len(residual)):
                residual[m] -= f * pixels[d, 0, b, m]
        for c in range(n_components):
            for d in range(n_components):
                for q in range(1, N_COLUMNS):
                    if slots[d, q] < 0:
                        continue
                    product = weighted_dot(pixels[c, 0, b], pixels[d, q, b], power[b])
                    coupling[b, c, slots[d, q]] += fluxes[d, b] * product
                    if c > d:
                        continue
                    for p in range(1, N_COLUMNS):
                        if slots[c, p] < 0 or (c == d and p > q):
                            continue
                        value = weighted_dot(pixels[c, p, b], pixels[d, q, b], power[b])
                        value *= fluxes[c, b] * fluxes[d, b]
                        hessian[slots[c, p], slots[d, q]] += value
                        if not (c == d and p == q):
                            hessian[slots[d, q], slots[c, p]] += value
            for p in range(1, N_COLUMNS):
                if slots[c, p] >= 0:
                    gradient[slots[c, p]] += fluxes[c, b] * weighted_dot(pixels[c, p, b], residual, power[b])


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
def fit_group(table, lengths, side, exact, psf, data, power, members, sources, largest, n_steps, tolerance):
    """Fit the sources of a group to the data of a stamp.

    data (B, 2, M): conj(P) times the transform of the weighted data; power (B, M): |P|^2 times the weight; or, if
    `exact`, the images (B, 1, side * side) and weights (B, side * side); psf (B, 2, M); largest (N_SHAPE,): longest
    step. Shapes and fluxes of the members are replaced. Returns the loss relative to no model, with that of the priors,
    and the number of steps.
    """
    n_bands, n_modes = len(power), psf.shape[2]
    n = len(members)
    kinds, mean, weight = sources.kinds, sources.mean, sources.weight
    owner, part = np.empty(2 * n, np.int64), np.empty(2 * n, np.int64)
    slots = np.empty((2 * n, N_COLUMNS), np.int64)
    n_components, n_free = list_components(members, kinds, owner, part, slots)
    rows = np.empty(table.exponential.shape, np.float32)
    theta, trial = np.empty((n, N_SHAPE)), np.empty((n, N_SHAPE))
    for i in range(n):
        for p in range(N_SHAPE):
            theta[i, p] = sources.shapes[members[i], p]
    work = np.empty(n_modes, np.float32)
    columns = np.empty((n_components, N_COLUMNS, 2, n_modes), np.float32)
    pixels = np.empty((n_components if exact else 0, N_COLUMNS, n_bands, side * side), np.float32)
    matrix = np.empty((n_bands, n_components, n_components))
    factors = np.empty((n_bands, n_components, n_components))
    fluxes, trial_fluxes = np.empty((n_components, n_bands)), np.empty((n_components, n_bands))
    evaluate_group(table, lengths, side, members, kinds, theta, owner, part, n_components, rows, columns)
    if exact:
        see_columns(columns, slots, n_components, 0, 1, lengths, psf, side, pixels)
    loss = -solve_fluxes(exact, columns, pixels, data, power, n_components, work, matrix, fluxes, factors)
    loss += prior_loss(theta, members, kinds, owner, part, slots, n_components, mean, weight)
    hessian, damped = np.empty((n_free, n_free)), np.empty((n_free, n_free))
    gradient, step = np.empty(n_free), np.empty(n_free)
    coupling = np.empty((n_bands, n_components, n_free))
    damping, done = 1e-3, 0
    for _ in range(n_steps):
        if exact:
            see_columns(columns, slots, n_components, 1, N_COLUMNS, lengths, psf, side, pixels)
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
        accepted = False
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
            evaluate_group(table, lengths, side, members, kinds, trial, owner, part, n_components, rows, columns)
            if exact:
                see_columns(columns, slots, n_components, 0, 1, lengths, psf, side, pixels)
            trial_loss = -solve_fluxes(
                exact, columns, pixels, data, power, n_components, work, matrix, trial_fluxes, factors
            )
            trial_loss += prior_loss(trial, members, kinds, owner, part, slots, n_components, mean, weight)
            if trial_loss <= loss:
                accepted = True
                break
            damping = 10 * damping
        if not accepted:
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
def measure_errors(table, lengths, side, exact, psf, data, power, members, sources, flux_variance, position_variance):
    """Variances of the fluxes and positions of a group with everything else free, from the joint normal matrix.

    flux_variance (S, B) is that of the whole source, position_variance (S, 2); rows of the members are filled, NaN
    where the matrix is singular or a band has no data.
    """
    n_bands, n_modes = len(power), psf.shape[2]
    n = len(members)
    owner, part = np.empty(2 * n, np.int64), np.empty(2 * n, np.int64)
    slots = np.empty((2 * n, N_COLUMNS), np.int64)
    n_components, n_free = list_components(members, sources.kinds, owner, part, slots)
    rows = np.empty(table.exponential.shape, np.float32)
    theta = np.empty((n, N_SHAPE))
    for i in range(n):
        for p in range(N_SHAPE):
            theta[i, p] = sources.shapes[members[i], p]
    work = np.empty(n_modes, np.float32)
    columns = np.empty((n_components, N_COLUMNS, 2, n_modes), np.float32)
    pixels = np.empty((n_components if exact else 0, N_COLUMNS, n_bands, side * side), np.float32)
    matrix = np.empty((n_bands, n_components, n_components))
    factors = np.empty((n_bands, n_components, n_components))
    fluxes = np.empty((n_components, n_bands))
    evaluate_group(table, lengths, side, members, sources.kinds, theta, owner, part, n_components, rows, columns)
    if exact:
        see_columns(columns, slots, n_components, 0, 1, lengths, psf, side, pixels)
    solve_fluxes(exact, columns, pixels, data, power, n_components, work, matrix, fluxes, factors)
    hessian, gradient = np.empty((n_free, n_free)), np.empty(n_free)
    coupling = np.empty((n_bands, n_components, n_free))
    if exact:
        see_columns(columns, slots, n_components, 1, N_COLUMNS, lengths, psf, side, pixels)
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
    add_priors(theta, members, owner, part, slots, n_components, sources.mean, sources.weight, hessian, gradient)
    regular = cholesky(hessian, n_free)
    response, share = np.empty(n_components), np.empty(n_free)
    for i in range(n):
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
def choose_kinds(
    table,
    lengths,
    side,
    exact,
    psf,
    strength,
    data,
    power,
    members,
    sources,
    largest,
    n_steps,
    tolerance,
    loss,
    steps,
    candidates,
    penalties,
):
    """Try other kinds for each source of a group in turn and keep what lowers the penalised loss.

    Returns the loss and the number of steps of the last fit that was kept, `steps` if none was.

    candidates (G, N_KINDS) says which kinds a member may become, penalties (N_KINDS,) what each adds to the loss.
    """
    n, n_bands = len(members), len(power)
    kinds, shapes, fluxes = sources.kinds, sources.shapes, sources.fluxes
    kept_shapes, kept_fluxes = np.empty((n, N_SHAPE)), np.empty((n, 2, n_bands))
    losses = np.empty(N_KINDS)
    for i in range(n):
        s = members[i]
        for kind in range(N_KINDS):
            losses[kind] = np.nan
        losses[kinds[s]] = loss + penalties[kinds[s]]
        # A disc with a bulge is tried before a Sersic profile, and again from there if one of them had negative light.
        negative = False
        for kind in (POINT, EXPONENTIAL, DOUBLE, SERSIC, DOUBLE):
            before = kinds[s]
            if not candidates[i, kind] or kind == before:
                continue
            if kind == DOUBLE and not np.isnan(losses[DOUBLE]) and not (before == SERSIC and negative):
                continue
            for k in range(n):
                for p in range(N_SHAPE):
                    kept_shapes[k, p] = shapes[members[k], p]
                for part in range(2):
                    for b in range(n_bands):
                        kept_fluxes[k, part, b] = fluxes[members[k], part, b]
            kinds[s] = kind
            if kind == DOUBLE:
                # The bulge starts, and is expected, at half the radius of the whole; that of a Sersic profile is most
                # of it, in a larger disc.
                smaller = 0.2 if before == SERSIC else 0.7
                shapes[s, 6] = sources.mean[s, 6] = min(
                    max(shapes[s, 2] - smaller, sources.low[s, 6]), sources.high[s, 6]
                )
                shapes[s, 7], shapes[s, 8] = shapes[s, 3], shapes[s, 4]
                if before == SERSIC:
                    shapes[s, 9] = shapes[s, 5]
                    shapes[s, 2] = min(shapes[s, 2] + 0.3, sources.high[s, 2])
            elif kind == SERSIC:
                shapes[s, 5] = 0.0
            trial, done = fit_group(
                table, lengths, side, exact, psf, data, power, members, sources, largest, n_steps, tolerance
            )
            worse = not trial + penalties[kind] < loss + penalties[before]
            if kind == DOUBLE:
                negative = False
                for part in range(2):
                    total = 0.0
                    for b in range(n_bands):
                        total += fluxes[s, part, b] * strength[b]
                    negative = negative or total < 0.0
                worse = worse or negative
            if np.isnan(losses[kind]) or not worse:
                losses[kind] = trial + penalties[kind]
            if worse:
                kinds[s] = before
                for k in range(n):
                    for p in range(N_SHAPE):
                        shapes[members[k], p] = kept_shapes[k, p]
                    for part in range(2):
                        for b in range(n_bands):
                            fluxes[members[k], part, b] = kept_fluxes[k, part, b]
            else:
                loss, steps = trial, done
                if kind != DOUBLE:
                    for b in range(n_bands):
                        fluxes[s, 1, b] = 0.0
        for kind in range(N_KINDS):
            sources.evidence[s, kind] = losses[kind] - losses[kinds[s]]
    return loss, steps


@kernel
def add_model(table, lengths, side, sources, s, y0, x0, model):
    """Add one source before the PSF at the modes of a stamp with the corner y0, x0; model (B, 2, M)."""
    n_bands, _, n_modes = model.shape
    rows = np.empty(table.exponential.shape, np.float32)
    columns = np.empty((1, 2, n_modes), np.float32)
    shape = np.empty(5)
    kind = sources.kinds[s]
    for part in range(2 if kind == DOUBLE else 1):
        for j in range(5):
            shape[j] = sources.shapes[s, j]
        ln_n = 0.0
        if part == 1:
            shape[2], shape[3] = sources.shapes[s, 6], sources.shapes[s, 7]
            shape[4], ln_n = sources.shapes[s, 8], sources.shapes[s, 9]
        elif kind == SERSIC:
            ln_n = sources.shapes[s, 5]
        shape[0] -= y0
        shape[1] -= x0
        cells = table.exponential
        if part == 1 or kind == SERSIC:
            interpolate_index(table.values, table.slopes, table.ln_index, ln_n, rows)
            cells = rows
        evaluate_profile(cells, lengths, side, shape, kind != POINT, columns, 1)
        for b in range(n_bands):
            f = np.float32(sources.fluxes[s, part, b])
            for m in range(n_modes):
                model[b, 0, m] += f * columns[0, 0, m]
                model[b, 1, m] += f * columns[0, 1, m]


@kernel
def draw(lengths, psf, model, side, y0, x0, factor, image, plane, transformed):
    """Add a model at the modes of a stamp (B, 2, M), times `factor` and seen through the PSF, to an image (B, H, W)."""
    n_bands, height, width = image.shape
    axes = np.arange(2)
    for b in range(n_bands):
        m = 0
        for i in range(side):
            for j in range(side // 2 + 1):
                if j < lengths[i]:
                    re, im = model[b, 0, m], model[b, 1, m]
                    p, q = psf[b, 0, m], psf[b, 1, m]
                    transformed[i, j] = np.complex64(complex(re * p - im * q, re * q + im * p))
                    m += 1
                else:
                    transformed[i, j] = 0.0
        c2r(transformed, plane, axes, False, factor / (side * side), 1)
        for i in range(max(0, -y0), min(side, height - y0)):
            for j in range(max(0, -x0), min(side, width - x0)):
                image[b, y0 + i, x0 + j] += plane[i, j]


@kernel
def set_of_psfs(modes, k):
    """Transforms of the PSFs of one set, shape (B, 2, modes)."""
    first, last = modes.offsets[k], modes.offsets[k + 1]
    n_bands = len(modes.psf) // (2 * modes.offsets[-1])
    return modes.psf[2 * n_bands * first : 2 * n_bands * last].reshape(n_bands, 2, last - first)


@kernel
def draw_source(table, modes, sides, sources, s, factor, image):
    """Add one source, times `factor`, to an image (B, H, W) on the stamp that it has now."""
    stamp = sources.stamps[s]
    if stamp[0] < 0:
        return
    side = sides[stamp[0]]
    k = modes.sets[stamp[0], stamp[3]]
    lengths = modes.lengths[modes.starts[k] : modes.starts[k + 1]]
    model = np.zeros((len(image), 2, modes.offsets[k + 1] - modes.offsets[k]), np.float32)
    add_model(table, lengths, side, sources, s, stamp[1], stamp[2], model)
    plane = np.empty((side, side), np.float32)
    transformed = np.empty((side, side // 2 + 1), np.complex64)
    draw(lengths, set_of_psfs(modes, k), model, side, stamp[1], stamp[2], factor, image, plane, transformed)


@kernel
def shift_group(sources, members, y, x):
    """Count the positions of some sources from another corner."""
    for s in members:
        for array in (sources.shapes, sources.mean, sources.low, sources.high):
            array[s, 0] -= y
            array[s, 1] -= x


@kernel
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
    are formed from the pixels instead. With `errors` nothing is fitted but the variances. Returns the loss, the number
    of steps, and whether one visit suffices.
    """
    n_bands, height, width = residual.shape
    side, y0, x0 = sides[stamp[0]], stamp[1], stamp[2]
    k = modes.sets[stamp[0], stamp[3]]
    n_modes = modes.offsets[k + 1] - modes.offsets[k]
    lengths, psf = modes.lengths[modes.starts[k] : modes.starts[k + 1]], set_of_psfs(modes, k)
    for s in members:
        if (
            sources.stamps[s, 0] != stamp[0]
            or sources.stamps[s, 1] != stamp[1]
            or sources.stamps[s, 2] != stamp[2]
            or sources.stamps[s, 3] != stamp[3]
        ):
            draw_source(table, modes, sides, sources, s, 1.0, residual)
            for j in range(4):
                sources.stamps[s, j] = stamp[j]
            draw_source(table, modes, sides, sources, s, -1.0, residual)
    axes = np.arange(2)
    plane = np.empty((side, side), np.float32)
    transformed = np.empty((side, side // 2 + 1), np.complex64)
    model = np.zeros((n_bands, 2, n_modes), np.float32)
    exact = uneven and len(members) * side * side <= MOST_PIXELS
    data = np.empty((n_bands, 1, side * side) if exact else (n_bands, 2, n_modes), np.float32)
    power = np.empty((n_bands, side * side if exact else n_modes), np.float32)
    strength = np.empty(n_bands)
    shift_group(sources, members, y0, x0)
    for s in members:
        add_model(table, lengths, side, sources, s, 0.0, 0.0, model)
    scale = np.float32(1.0 / (side * side))
    uniform = True
    if exact:
        own = np.zeros((n_bands, side, side), np.float32)
        draw(lengths, psf, model, side, 0, 0, 1.0, own, plane, transformed)
    for b in range(n_bands):
        strength[b] = np.sqrt(mean_weights[b])
        for i in range(side):
            y = y0 + i
            for j in range(side):
                x = x0 + j
                value, weight = np.float32(0.0), np.float32(0.0)
                if 0 <= y < height and 0 <= x < width:
                    value, weight = residual[b, y, x], weights[b, y, x]
                uniform = uniform and abs(weight - mean_weights[b]) <= 0.05 * mean_weights[b]
                if exact:
                    data[b, 0, i * side + j] = value + own[b, i, j]
                    power[b, i * side + j] = weight
                else:
                    plane[i, j] = value * weight
        if exact:
            continue
        r2c(plane, transformed, axes, True, 1.0, 1)
        m = 0
        for i in range(side):
            for j in range(lengths[i]):
                value = transformed[i, j]
                share = scale if j == 0 else 2 * scale
                re, im = psf[b, 0, m], psf[b, 1, m]
                power[b, m] = np.float32(mean_weights[b]) * share * (re * re + im * im)
                data[b, 0, m] = share * (re * value.real + im * value.imag) + power[b, m] * model[b, 0, m]
                data[b, 1, m] = share * (re * value.imag - im * value.real) + power[b, m] * model[b, 1, m]
                m += 1
    loss, steps = 0.0, 0
    if errors:
        measure_errors(
            table, lengths, side, exact, psf, data, power, members, sources, flux_variance, position_variance
        )
        shift_group(sources, members, -y0, -x0)
        return loss, steps, False
    loss, steps = fit_group(
        table, lengths, side, exact, psf, data, power, members, sources, largest, n_steps, tolerance
    )
    if candidates.any():
        loss, steps = choose_kinds(
            table,
            lengths,
            side,
            exact,
            psf,
            strength,
            data,
            power,
            members,
            sources,
            largest,
            n_steps,
            tolerance,
            loss,
            steps,
            candidates,
            penalties,
        )
    for b in range(n_bands):
        for m in range(n_modes):
            model[b, 0, m] = -model[b, 0, m]
            model[b, 1, m] = -model[b, 1, m]
    for s in members:
        add_model(table, lengths, side, sources, s, 0.0, 0.0, model)
    draw(lengths, psf, model, side, y0, x0, -1.0, residual, plane, transformed)
    shift_group(sources, members, -y0, -x0)
    return loss, steps, uniform or exact


@kernel
def signal_to_noise(sources, noise, psf_norm, out):
    """Roughly estimate the signal-to-noise of every source in all bands together; noise, psf_norm (B,)."""
    for s in range(len(out)):
        radius = 0.0 if sources.kinds[s] == POINT else np.exp(sources.shapes[s, 2])
        total = 0.0
        for b in range(len(noise)):
            flux = sources.fluxes[s, 0, b] + sources.fluxes[s, 1, b]
            if flux > 0.0 and noise[b] > 0.0:
                area = 1.0 / (psf_norm[b] * psf_norm[b]) + 6 * np.pi * radius * radius
                total += flux * flux / (noise[b] * noise[b] * area)
        out[s] = np.sqrt(total)


@kernel
def contrast(images, weights, shapes, sigmas, out):
    """Signal-to-noise of a Gaussian like the PSF on a constant background at the centre of each source; out (S,)."""
    n_bands, height, width = images.shape
    for s in range(len(out)):
        y, x = shapes[s, 0], shapes[s, 1]
        total = 0.0
        for b in range(n_bands):
            reach = 3.0 * sigmas[b]
            sum_w, sum_g, sum_gg, sum_d, sum_gd = 0.0, 0.0, 0.0, 0.0, 0.0
            for i in range(max(int(np.ceil(y - reach)), 0), min(int(y + reach) + 1, height)):
                for j in range(max(int(np.ceil(x - reach)), 0), min(int(x + reach) + 1, width)):
                    square = (i - y) * (i - y) + (j - x) * (j - x)
                    w = weights[b, i, j]
                    if w > 0.0 and square <= reach * reach:
                        g = np.exp(-0.5 * square / (sigmas[b] * sigmas[b]))
                        sum_w += w
                        sum_g += w * g
                        sum_gg += w * g * g
                        sum_d += w * images[b, i, j]
                        sum_gd += w * g * images[b, i, j]
            if sum_w > 0.0:
                norm = sum_gg - sum_g * sum_g / sum_w
                signal = sum_gd - sum_g * sum_d / sum_w
                if norm > 1e-6 * sum_gg and signal > 0.0:
                    total += signal * signal / norm
        out[s] = np.sqrt(total)


@kernel
def plan_stamp(sources, members, snr, sides, levels, stamp):
    """Choose side, corner and level of the stamp of a group: it holds the light of each member down to the noise."""
    top, left, bottom, right, brightest = np.inf, np.inf, -np.inf, -np.inf, 0.0
    for s in members:
        reach = 7.0 if snr[s] < 20.0 else 9.0 if snr[s] < 100.0 else 12.0 if snr[s] < 1000.0 else 22.0
        if sources.kinds[s] != POINT:
            shape = sources.shapes[s]
            radius = np.exp(shape[2] + 0.5 * np.hypot(shape[3], shape[4]))
            index = 1.0
            if sources.kinds[s] == SERSIC:
                index = min(max(np.exp(shape[5]), 1.0), 6.0)
            # An exponential profile falls below the noise about here.
            extent = min(max((1.5 + np.log(max(snr[s], 1.0))) / 1.678, 2.0), 8.0)
            reach += 0.8 * extent * radius * np.sqrt(index)
        top, bottom = min(top, sources.shapes[s, 0] - reach), max(bottom, sources.shapes[s, 0] + reach)
        left, right = min(left, sources.shapes[s, 1] - reach), max(right, sources.shapes[s, 1] + reach)
        brightest = max(brightest, snr[s])
    need = max(bottom - top, right - left)
    k = 0
    while k < len(sides) - 1 and sides[k] < need:
        k += 1
    stamp[0] = k
    stamp[1] = int(np.floor(0.5 * (top + bottom - sides[k]) + 0.5))
    stamp[2] = int(np.floor(0.5 * (left + right - sides[k]) + 0.5))
    level = 0
    while level < len(levels) and brightest > levels[level]:
        level += 1
    stamp[3] = level


@kernel
def plan_stamps(sources, groups, offsets, snr, sides, levels, stamps):
    """Plan the stamps (G, 4) of all groups."""
    for g in range(len(offsets) - 1):
        plan_stamp(sources, groups[offsets[g] : offsets[g + 1]], snr, sides, levels, stamps[g])


@kernel
def find_lonely(stamps, sides, out):
    """Which groups have a stamp (G, 4) that touches no other; out (G,)."""
    n = len(stamps)
    for g in range(n):
        out[g] = True
        side, y, x = sides[stamps[g, 0]], stamps[g, 1], stamps[g, 2]
        for h in range(n):
            other = sides[stamps[h, 0]]
            if h != g and -other < stamps[h, 1] - y < side and -other < stamps[h, 2] - x < side:
                out[g] = False
                break


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
        own = np.empty((len(members), N_KINDS), np.bool_)
        for i in range(len(members)):
            for kind in range(N_KINDS):
                own[i, kind] = candidates[members[i], kind]
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
            own,
            penalties,
            flux_variance,
            position_variance,
            errors,
        )
        closed[g] = uniform and n < n_steps[g]
        steps += n * len(members)
    return steps


@kernel
def core_chi2(residual, weights, sources, radii, out):
    """Mean of the squared residuals [sigma] within a radius of each source, all bands together; 1 without pixels."""
    n_bands, height, width = residual.shape
    for s in range(len(out)):
        y, x, reach = sources.shapes[s, 0], sources.shapes[s, 1], radii[s]
        total, n = 0.0, 0
        for i in range(max(int(np.ceil(y - reach)), 0), min(int(y + reach) + 1, height)):
            for j in range(max(int(np.ceil(x - reach)), 0), min(int(x + reach) + 1, width)):
                if (i - y) * (i - y) + (j - x) * (j - x) > reach * reach:
                    continue
                for b in range(n_bands):
                    if weights[b, i, j] > 0.0:
                        total += weights[b, i, j] * residual[b, i, j] * residual[b, i, j]
                        n += 1
        out[s] = total / n if n > 0 else 1.0


@kernel
def draw_sources(residual, table, modes, sides, sources, rows, factor):
    """Add some sources, times `factor`, to the residual, each on its stamp."""
    for s in rows:
        draw_source(table, modes, sides, sources, s, factor, residual)


@kernel
def soften(weights, table, modes, sides, sources, rows, share, image, out):
    """Weights with an error added, a share of the summed model of some sources; image (B, H, W) is work space."""
    n_bands, height, width = weights.shape
    for b in range(n_bands):
        for y in range(height):
            for x in range(width):
                image[b, y, x] = 0.0
    for s in rows:
        draw_source(table, modes, sides, sources, s, share, image)
    for b in range(n_bands):
        for y in range(height):
            for x in range(width):
                out[b, y, x] = weights[b, y, x] / (1.0 + weights[b, y, x] * image[b, y, x] * image[b, y, x])


@kernel
def transform_modes(psfs, side, threshold, lengths, psf):
    """List the modes of a stamp up to the last one in each row where some PSF is stronger than a threshold.

    psfs (B, P, Q), odd sides; lengths (side,) takes the number of modes of each row, psf (B, 2, side * (side // 2 + 1))
    their transforms, from the front. The modes at the Nyquist frequency, whose phase is not defined, are left out.
    Returns the number of modes.
    """
    n_bands, p, q = psfs.shape
    half = side // 2 + 1
    plane = np.empty((side, side), np.float32)
    transformed = np.empty((n_bands, side, half), np.complex64)
    axes = np.arange(2)
    for b in range(n_bands):
        for i in range(side):
            for j in range(side):
                plane[i, j] = 0.0
        for i in range(p):
            for j in range(q):
                # Added, not set: a PSF larger than the stamp wraps onto itself.
                plane[(i - p // 2) % side, (j - q // 2) % side] += psfs[b, i, j]
        r2c(plane, transformed[b], axes, True, 1.0, 1)
    n = 0
    for i in range(side):
        lengths[i] = 0
        if 2 * i == side:
            continue
        for j in range(half - 1):
            for b in range(n_bands):
                value = transformed[b, i, j]
                if value.real * value.real + value.imag * value.imag > threshold * threshold:
                    lengths[i] = j + 1
        for j in range(lengths[i]):
            for b in range(n_bands):
                psf[b, 0, n] = transformed[b, i, j].real
                psf[b, 1, n] = transformed[b, i, j].imag
            n += 1
    return n


@fast_kernel
def add_row(out, row, factor):
    """Add a row, times a factor, to the first pixels of another that is as long or longer."""
    for x in range(len(row)):
        out[x] += factor * row[x]


@kernel
def blur(plane, taps, work, out):
    """Correlate a plane (H, W) with a symmetric separable filter, taps (K,) from the middle outwards; zero outside."""
    height, width = plane.shape
    for y in range(height):
        for x in range(width):
            work[y, x] = out[y, x] = np.float32(0.0)
        add_row(work[y], plane[y], taps[0])
        for k in range(1, min(len(taps), width)):
            add_row(work[y], plane[y, k:], taps[k])
            add_row(work[y, k:], plane[y, : width - k], taps[k])
    for y in range(height):
        add_row(out[y], work[y], taps[0])
        for k in range(1, len(taps)):
            if y >= k:
                add_row(out[y], work[y - k], taps[k])
            if y + k < height:
                add_row(out[y], work[y + k], taps[k])


@kernel
def significance(images, residual, weights, sigmas, left, seen):
    """Signal-to-noise of a point at each pixel, of what is left and of the model, over the bands where it is positive.

    images, residual, weights (B, H, W); sigmas (B,): width of a Gaussian like the PSF, 0 in a band without one. left,
    seen (H, W) take the square root of the sum over the bands of the squares of the positive ones.
    """
    n_bands, height, width = residual.shape
    plane, work = np.empty((height, width), np.float32), np.empty((height, width), np.float32)
    signal, model, norm = np.empty_like(plane), np.empty_like(plane), np.empty_like(plane)
    for y in range(height):
        for x in range(width):
            left[y, x] = seen[y, x] = 0.0
    for b in range(n_bands):
        if not sigmas[b] > 0.0:
            continue
        n = int(np.ceil(2.5 * sigmas[b])) + 1
        taps, squares = np.empty(n, np.float32), np.empty(n, np.float32)
        for k in range(n):
            taps[k] = np.exp(-0.5 * (k / sigmas[b]) ** 2)
            squares[k] = taps[k] * taps[k]
        for y in range(height):
            for x in range(width):
                plane[y, x] = weights[b, y, x] * residual[b, y, x]
        blur(plane, taps, work, signal)
        for y in range(height):
            for x in range(width):
                plane[y, x] = weights[b, y, x] * (images[b, y, x] - residual[b, y, x])
        blur(plane, taps, work, model)
        for y in range(height):
            for x in range(width):
                plane[y, x] = weights[b, y, x]
        blur(plane, squares, work, norm)
        for y in range(height):
            for x in range(width):
                if norm[y, x] > 0.0:
                    if signal[y, x] > 0.0:
                        left[y, x] += signal[y, x] * signal[y, x] / norm[y, x]
                    if model[y, x] > 0.0:
                        seen[y, x] += model[y, x] * model[y, x] / norm[y, x]
    for y in range(height):
        for x in range(width):
            left[y, x] = np.sqrt(left[y, x])
            seen[y, x] = np.sqrt(seen[y, x])


@kernel
def find_maxima(left, seen, weights, threshold, share, positions, distance, found, values):
    """Find local maxima of `left` above threshold + share * seen, farther than a distance from all positions (S, 2).

    A maximum is not exceeded by any of the 24 pixels around it; of equal ones the first in raster order counts. found
    (N, 2), values (N,) are filled from the front, the rest of the maxima is dropped when they are full. Returns their
    number.
    """
    height, width = left.shape
    n = 0
    for y in range(1, height - 1):
        for x in range(1, width - 1):
            value = left[y, x]
            if not value > threshold + share * seen[y, x] or n == len(found):
                continue
            highest, valid = True, False
            for i in range(-2, 3):
                for j in range(-2, 3):
                    if 0 <= y + i < height and 0 <= x + j < width and (i != 0 or j != 0):
                        other = left[y + i, x + j]
                        if other > value or (other == value and (i < 0 or (i == 0 and j < 0))):
                            highest = False
            for b in range(len(weights)):
                valid = valid or weights[b, y, x] > 0.0
            if not highest or not valid:
                continue
            for s in range(len(positions)):
                dy, dx = positions[s, 0] - y, positions[s, 1] - x
                if dy * dy + dx * dx < distance * distance:
                    highest = False
            if highest:
                found[n, 0], found[n, 1], values[n] = y, x, value
                n += 1
    return n
