"""Levenberg-Marquardt steps of a few neighbouring profile sources, in the Fourier modes of a stamp."""

import numpy as np
from rocket_fft import c2c, r2c

from kermes.kernels.decorator import allocating_kernel, fast_kernel, inlined_kernel, kernel
from kermes.kernels.groups import sort_by
from kermes.kernels.normal_equations import (
    add_products,
    cholesky,
    clear_equations,
    eliminate_fluxes,
    fill_modes,
    fill_pixels,
    fill_variances,
    solve_fluxes,
    substitute,
)
from kermes.kernels.profiles import (
    AS_EXPONENTIAL,
    AS_POINT,
    AS_TABLE,
    N_COLUMNS,
    evaluate_factors,
    fill_column,
    interpolate_index,
)
from kermes.kernels.residuals import core_chi2, estimate
from kermes.kernels.stamps import (
    DOUBLE,
    EXPONENTIAL,
    N_KINDS,
    N_SHAPE,
    POINT,
    SERSIC,
    add_model,
    add_planes,
    bands_together,
    draw_source,
    find_lonely,
    part_inside,
    plan_stamps,
    see_modes,
    set_of_frequencies,
    set_of_psfs,
    touch,
)

MODES_MISSING, NOTHING_TO_VISIT = -1, -2
"""What a sweep returns that needs modes which are not there, and one that finds all groups settled."""

TRIALS = (POINT, EXPONENTIAL, DOUBLE, SERSIC, DOUBLE)
"""Order in which a source is taken for other kinds. A disc with a bulge is tried before a Sersic profile, and again
from there if one of them had negative light."""

HOPELESS = (4.0, 1.0)
"""A simpler, and a more complex kind of a source is given up when the penalised loss with all other shapes held is more
than this above that of the present kind. What a simpler one leaves may be taken up by neighbours yet."""

SMALL_CHANGE = 1e-4
"""Groups are visited again when the model of one that touches theirs has changed by more than this chi2, a hundredth of
a standard deviation of a flux that is all theirs: in many such steps neighbours that hang together reach their fit."""

MOST_ATTEMPTS = 4
"""A visit is given up when so many fits, each with a larger curvature than the last, have gone too far."""

LEAST_GAIN = (0.1, 0.05)
"""A fit went too far when the loss of the pixels falls by less than this share of what its curvature promised, and
more than this above it."""

EVEN, UNEVEN, BROKEN = 0, 1, 2
"""Weights near the sources of a group are alike; some pixels count much more than others; some are not valid."""

ROUNDS = 4
"""A group with uneven weights is fitted up to so many times in a row."""

MOST_PIXELS = 40000
"""Products are not formed from the pixels of more than so many stamps together, for the time it takes."""


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


@allocating_kernel
def see_column(factors, wave, j, lengths, psf, side, inside, out):
    """Turn column j of a component, factors (M,) of a wave (2, M), into images seen through the PSFs (B, 2, M).

    inside: the part of the stamp that is kept, see `part_inside`; out (B, P) with the P pixels of that part.
    """
    n_bands, _, n_modes = psf.shape
    top, bottom, left, right = inside
    width = right - left
    model = np.empty((1, 2, n_modes), np.float32)
    fill_column(factors, wave, j, model[0])
    together = bands_together(n_bands, side)
    for first in range(0, n_bands, together):
        planes = see_modes(lengths, psf[first : first + together], model, side)
        for k in range(together):
            for i in range(top, bottom):
                row = out[first + k, (i - top) * width : (i - top + 1) * width]
                for m in range(width):
                    row[m] = planes[k, i, left + m]


@allocating_kernel
def evaluate_group(
    table,
    lengths,
    frequencies,
    side,
    inside,
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
    cells,
    waves,
    columns,
    images,
):
    """Evaluate the components of a group with their derivatives, and with `exact` the images of those of flux one.

    theta (G, N_SHAPE); waves (C, 2, M), columns (C, N_COLUMNS, M), images (C, B, P).
    Unless `everything`, what has no free parameter is left as it is.
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
        form, n_columns = AS_POINT if kind == POINT else AS_EXPONENTIAL, N_COLUMNS - 1
        if part[c] == 1 or kind == SERSIC:
            interpolate_index(table.values, table.slopes, table.ln_index, ln_n, cells)
            form, n_columns = AS_TABLE, N_COLUMNS
        if slots[c, 1] < 0:
            n_columns = 1
        evaluate_factors(form, cells, lengths, frequencies, shape, waves[c], columns[c, :n_columns])
        if exact:
            # A loop, so that q is no literal, for which see_column would be compiled once more.
            for q in range(1):
                see_column(columns[c, q], waves[c], q, lengths, psf, side, inside, images[c])


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


@allocating_kernel
def fit_group(
    table,
    lengths,
    frequencies,
    side,
    inside,
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
    variances,
    waves,
    columns,
    images,
    derivatives,
):
    """Fit the sources of a group to the data of a stamp.

    data (B, 2, M): conj(P) times the transform of the weighted data; power (B, M): |P|^2 times the weight; or, if
    `exact`, the pixels (B, 1, P) and their weights (B, P) of the part of the stamp that is inside the image, see
    `part_inside`; psf (B, 2, M); largest (N_SHAPE,): longest step. Shapes and fluxes of the members are replaced; with
    `only` >= 0 the shapes of that member alone. The fit is given up when even three times of what a step promises would
    not bring the loss below a limit; the loss is then what that step promises. With `errors` nothing is fitted, and
    data need not be there: the variances are filled, see `fill_variances`. waves (C, 2, M), columns (C, N_COLUMNS, M)
    and, if `exact`, images (C, B, P) and derivatives (C, N_COLUMNS - 1, K, P) of the K bands that are transformed
    together are room to work in, for at least as many components as there are. Returns the loss relative to no model,
    with that of the priors, and the number of steps.
    """
    n_bands, n = len(power), len(members)
    kinds, mean, weight = sources.kinds, sources.mean, sources.weight
    owner, part = np.empty(2 * n, np.int64), np.empty(2 * n, np.int64)
    slots = np.empty((2 * n, N_COLUMNS), np.int64)
    n_components, n_free = list_components(members, kinds, only, owner, part, slots)
    cells = np.empty((table.values.shape[1] - 1, 6), np.float32)
    theta, trial = np.empty((n, N_SHAPE)), np.empty((n, N_SHAPE))
    damping, done = 1e-3, -1
    for i in range(n):
        for p in range(N_SHAPE):
            theta[i, p] = sources.shapes[members[i], p]
    matrix = np.empty((n_bands, n_components, n_components))
    factors = np.empty((n_bands, n_components, n_components))
    fluxes, trial_fluxes = np.empty((n_components, n_bands)), np.empty((n_components, n_bands))
    evaluate_group(
        table,
        lengths,
        frequencies,
        side,
        inside,
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
        cells,
        waves,
        columns,
        images,
    )
    loss = -solve_fluxes(exact, waves, columns, images, data, power, n_components, owner, matrix, fluxes, factors)
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
        clear_equations(hessian, gradient, coupling)
        if exact:
            together = bands_together(n_bands, side)
            for first in range(0, n_bands, together):
                some = psf[first : first + together]
                for c in range(n_components):
                    for q in range(1, N_COLUMNS):
                        if slots[c, q] >= 0:
                            out = derivatives[c, q - 1]
                            see_column(columns[c, q], waves[c], q, lengths, some, side, inside, out)
                fill_pixels(
                    first, images, derivatives, data, power, n_components, slots, fluxes, hessian, gradient, coupling
                )
        else:
            fill_modes(waves, columns, data, power, n_components, owner, slots, fluxes, hessian, gradient, coupling)
        eliminate_fluxes(factors, coupling, hessian)
        add_priors(theta, members, owner, part, slots, n_components, mean, weight, hessian, gradient)
        if errors:
            fill_variances(
                members,
                owner,
                slots,
                n_components,
                n_free,
                matrix,
                factors,
                hessian,
                coupling,
                variances,
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
                frequencies,
                side,
                inside,
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
                cells,
                waves,
                columns,
                images,
            )
            trial_loss = -solve_fluxes(
                exact, waves, columns, images, data, power, n_components, owner, matrix, trial_fluxes, factors
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
def keep_members(sources, members, kinds, shapes, fluxes):
    """Note what the members of a group are: kinds (G,), shapes (G, N_SHAPE), fluxes (G, 2, B)."""
    for k in range(len(members)):
        s = members[k]
        kinds[k] = sources.kinds[s]
        for p in range(N_SHAPE):
            shapes[k, p] = sources.shapes[s, p]
        for part in range(2):
            for b in range(sources.fluxes.shape[2]):
                fluxes[k, part, b] = sources.fluxes[s, part, b]


@kernel
def take_back(sources, members, kinds, shapes, fluxes):
    """Make the members of a group what `keep_members` has noted."""
    for k in range(len(members)):
        s = members[k]
        sources.kinds[s] = kinds[k]
        for p in range(N_SHAPE):
            sources.shapes[s, p] = shapes[k, p]
        for part in range(2):
            for b in range(sources.fluxes.shape[2]):
                sources.fluxes[s, part, b] = fluxes[k, part, b]


@kernel
def propose_kind(sources, s, kind, may):
    """Take a source for another kind, if it may become that, may (N_KINDS,); returns whether it is another kind now."""
    kinds, shapes = sources.kinds, sources.shapes
    before = kinds[s]
    if not may[kind] or kind == before:
        return False
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
def may_choose(candidates, members):
    """Whether any of some sources may become another kind, candidates (S, N_KINDS)."""
    for s in members:
        for j in range(candidates.shape[1]):
            if candidates[s, j]:
                return True
    return False


@kernel
def note_fluxes(sources, members, out):
    """Total fluxes of some sources, out (G, B). What is no double now may still have the bulge that it had as one."""
    for k in range(len(members)):
        s = members[k]
        for b in range(out.shape[1]):
            bulge = sources.fluxes[s, 1, b] if sources.kinds[s] == DOUBLE else 0.0
            out[k, b] = sources.fluxes[s, 0, b] + bulge


@kernel
def fill_doubt(sources, members, s, losses, chosen, noted):
    """Note what the fluxes of a group would change if member s were of another kind: the square, and the mean.

    losses (N_KINDS,): penalised loss of each kind, NaN where it was not tried; noted (N_KINDS, G, B): the fluxes then.
    A kind is as likely as the exponential of its loss is small (the Laplace approximation, the penalties as priors).
    The mean is over points and exponentials only: bright sources are not at rest yet when richer kinds are compared.
    """
    partners, doubt, lean = sources.partners[s], sources.doubt[s], sources.lean[s]
    for k in range(len(partners)):
        partners[k] = members[k] if k < len(members) else -1
        for b in range(noted.shape[2]):
            doubt[k, b] = lean[k, b] = 0.0
    total = 0.0
    for j in range(len(losses)):
        if not np.isnan(losses[j]):
            total += np.exp(min(losses[chosen] - losses[j], 0.0))
    for j in range(len(losses)):
        if j == chosen or np.isnan(losses[j]):
            continue
        share = np.exp(min(losses[chosen] - losses[j], 0.0)) / total
        for k in range(len(members)):
            for b in range(noted.shape[2]):
                change = noted[j, k, b] - noted[chosen, k, b]
                doubt[k, b] += share * change * change
                if max(j, chosen) <= EXPONENTIAL:
                    lean[k, b] += share * change


@kernel
def total_doubt(sources, doubt, lean):
    """Sum what the choices of all sources leave open of each flux: the square and the mean, doubt and lean (S, B)."""
    n_sources, n_partners, n_bands = sources.doubt.shape
    for s in range(n_sources):
        for b in range(n_bands):
            doubt[s, b] = lean[s, b] = 0.0
    for s in range(n_sources):
        for k in range(n_partners):
            m = sources.partners[s, k]
            if m >= 0:
                for b in range(n_bands):
                    doubt[m, b] += sources.doubt[s, k, b]
                    lean[m, b] += sources.lean[s, k, b]


@allocating_kernel
def admit_misfit(residual, weights, sources, width, floor, variances, doubt, lean):
    """Scale the variances by the chi2 of the core of each source where that is above one, and add the doubt.

    The core reaches two widths of the PSF beyond the half-light radius; floor is the error of centres that more light
    does not lower. doubt, lean (S, B): see `total_doubt`.
    """
    n_sources, n_bands = doubt.shape
    radii, chi2 = np.empty(n_sources), np.empty(n_sources)
    for s in range(n_sources):
        radii[s] = 2 * width
        if sources.kinds[s] != POINT:
            radii[s] += np.exp(sources.shapes[s, 2])
    core_chi2(residual, weights, sources, radii, chi2)
    total_doubt(sources, doubt, lean)
    for s in range(n_sources):
        # What is not a number stays so.
        scale = 1.0 if chi2[s] < 1.0 else chi2[s]
        for b in range(n_bands):
            variances.flux[s, b] = variances.flux[s, b] * scale + doubt[s, b]
        for j in range(variances.shape.shape[1]):
            variances.shape[s, j] = variances.shape[s, j] * scale + (floor * floor if j < 2 else 0.0)


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

    Returns whether the weights there are even, some pixels count much more than others, or some are not valid.
    """
    n_bands, height, width = weights.shape
    evenness = EVEN
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
            if n_bad > 1 and not everything:
                evenness = BROKEN
            elif most > 1.3 * least:
                evenness = max(evenness, UNEVEN)
        out[b] = total / max(n, 1)
    return evenness


@kernel
def weigh_row(values, weights, mean, out):
    """Multiply values and weights; returns in how many pixels the weight is not the mean, up to a twentieth."""
    n = 0
    for x in range(len(values)):
        out[x] = values[x] * weights[x]
        n += abs(weights[x] - mean) > np.float32(0.05) * mean
    return n


@kernel
def power_row(psf_re, psf_im, factor, out):
    """Power of a row of modes, times a factor."""
    for j in range(len(out)):
        out[j] = factor * (psf_re[j] * psf_re[j] + psf_im[j] * psf_im[j])


@kernel
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


@fast_kernel
def seen_power(model, psf):
    """Sum of the squares of modes (2, M) seen through a PSF (2, M)."""
    total = np.float32(0.0)
    for m in range(model.shape[1]):
        total += (model[0, m] * model[0, m] + model[1, m] * model[1, m]) * (
            psf[0, m] * psf[0, m] + psf[1, m] * psf[1, m]
        )
    return total


@kernel
def weigh_plane(residual, weights, mean, y0, x0, out):
    """Weigh what a stamp (side, side) with the corner y0, x0 shares with an image (H, W): see `weigh_row`."""
    top, bottom, left, right = part_inside(residual.shape, y0, x0, len(out))
    n_off = 0
    for i in range(top, bottom):
        y = y0 + i
        n_off += weigh_row(
            residual[y, x0 + left : x0 + right], weights[y, x0 + left : x0 + right], mean, out[i, left:right]
        )
    return n_off


@allocating_kernel
def collect_data(residual, weights, mean_weights, lengths, psf, model, side, y0, x0, exact, errors, data, power):
    """Fill data and power of a stamp, see `fit_group`; returns whether its weights are uniform.

    model (B, 2, M) is that of the members, which the residual (B, H, W) lacks. With `errors` data are left alone.
    """
    n_bands = len(residual)
    top, bottom, left, right = part_inside(residual.shape[1:], y0, x0, side)
    inside = bottom - top == side and right - left == side
    uniform = True
    for b in range(n_bands):
        uniform = uniform and (inside or not mean_weights[b] > 0.0)
    if exact:
        own = see_modes(lengths, psf, model, side)
        for b in range(n_bands):
            m = 0
            for i in range(top, bottom):
                for j in range(left, right):
                    data[b, 0, m] = own[b, i, j] + residual[b, y0 + i, x0 + j]
                    power[b, m] = weights[b, y0 + i, x0 + j]
                    m += 1
        return uniform
    longest = 0
    for i in range(side):
        longest = max(longest, lengths[i])
    axis = np.empty(1, np.int64)
    scale = np.float32(2.0 / (side * side))
    together = bands_together(n_bands, side)
    planes = np.empty((together, side, side), np.float32)
    transformed = np.zeros((together, side, side // 2 + 1), np.complex64)
    for first in range(0, n_bands, together):
        if not errors:
            planes[:] = 0
            for k in range(together):
                b = first + k
                n_off = weigh_plane(residual[b], weights[b], np.float32(mean_weights[b]), y0, x0, planes[k])
                uniform = uniform and n_off == 0
            axis[0] = 2
            r2c(planes, transformed, axis, True, 1.0, 1)
            axis[0] = 1
            # The modes that are fitted alone.
            c2c(transformed[:, :, :longest], transformed[:, :, :longest], axis, True, 1.0, 1)
        for k in range(together):
            b = first + k
            gather_modes(transformed[k], lengths, psf[b], scale, np.float32(mean_weights[b]), data[b], power[b])
            for part in range(2):
                add_products(power[b], model[b, part], np.float32(1.0), data[b, part])
    return uniform


@fast_kernel
def weigh_row_of_change(residual, weights, change):
    """Sums over a row of w r d, w d^2 and d^2 for a residual r, weights w and a change d of the model."""
    slope = bend = square = np.float32(0.0)
    for x in range(len(change)):
        weighted = weights[x] * change[x]
        slope += weighted * residual[x]
        bend += weighted * change[x]
        square += change[x] * change[x]
    return slope, bend, square


@allocating_kernel
def goes_too_far(residual, weights, planes, y0, x0, mean_weights, most):
    """Whether a change of the model, planes (B, side, side), fits the pixels much worse than its surrogate.

    Or raises their loss by more than `most`. The surrogate has `mean_weights` (B,) instead of the weights (B, H, W).
    They become those for which both agree on what this change costs: so the next fit has the curvature along the last
    one (Barzilai and Borwein 1988). After a change that goes too far they only grow.
    """
    n_bands = len(residual)
    top, bottom, left, right = part_inside(residual.shape[1:], y0, x0, planes.shape[1])
    promised = excess = 0.0
    factors = np.ones(n_bands)
    for b in range(n_bands):
        slope = bend = square = 0.0
        for i in range(top, bottom):
            row, first, last = y0 + i, x0 + left, x0 + right
            of_row = weigh_row_of_change(
                residual[b, row, first:last], weights[b, row, first:last], planes[b, i, left:right]
            )
            slope += of_row[0]
            bend += of_row[1]
            square += of_row[2]
        expected = mean_weights[b] * square
        promised += 0.5 * expected - slope
        excess += 0.5 * (bend - expected)
        if expected > 0.0:
            factors[b] = bend / expected
    too_far = excess > (1.0 - LEAST_GAIN[0]) * abs(promised) + LEAST_GAIN[1] or promised + excess > most
    for b in range(n_bands):
        mean_weights[b] *= min(max(factors[b], 1.0 if too_far else 0.25), 4.0)
    return too_far


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
    evenness,
    largest,
    n_steps,
    tolerance,
    candidates,
    penalties,
    variances,
    errors,
):
    """Fit one group to what the others leave, and leave its new residual.

    residual, weights (B, H, W). What the data say enters exactly, pixel by pixel, through the transform of the weighted
    residual; the curvature is that of uniform weights, `mean_weights` (B,), so that visits converge on the same answer
    whatever the weights are, in one visit if they are uniform. If that lets the fit go too far, as it does where most
    of the weight lies away from the sources, it is taken back and begun anew with more curvature. With some pixels that
    are not valid near the sources, and for errors with uneven weights, all products are formed from the pixels instead;
    see EVEN for `evenness`. Then each member in turn is taken for other kinds, and what lowers the penalised loss is
    kept: candidates (S, N_KINDS) says which kinds a source may become, penalties (N_KINDS,) what each adds to the loss.
    With `errors` nothing is fitted but the variances. Returns the loss, the number of steps, whether one visit
    suffices, and the chi2 of the change of the model.
    """
    n_bands = len(residual)
    side, y0, x0 = sides[stamp[0]], stamp[1], stamp[2]
    k = modes.sets[stamp[0], stamp[3]]
    lengths, psf = modes.lengths[modes.starts[k] : modes.starts[k + 1]], set_of_psfs(modes, k)
    frequencies = set_of_frequencies(modes, k)
    choosing = not errors and may_choose(candidates, members)
    for s in members:
        moved = False
        for j in range(4):
            moved = moved or sources.stamps[s, j] != stamp[j]
        if moved:
            draw_source(table, modes, sides, sources, s, 1.0, residual)
            for j in range(4):
                sources.stamps[s, j] = stamp[j]
            draw_source(table, modes, sides, sources, s, -1.0, residual)
    exact = evenness == BROKEN or (evenness == UNEVEN and errors)
    inside = part_inside(residual.shape[1:], y0, x0, side)
    n_pixels = (inside[1] - inside[0]) * (inside[3] - inside[2])
    exact = exact and len(members) * side * side <= MOST_PIXELS
    n_pixels = n_pixels if exact else 0
    n_values = n_pixels if exact else psf.shape[2]
    model = np.empty(psf.shape, np.float32)
    data = np.empty((n_bands, 1 if exact else 2, n_values), np.float32)
    power = np.empty((n_bands, n_values), np.float32)
    strength = np.empty(n_bands)
    # What the members were before this visit, and before the last kind that was tried.
    kinds_before, kept_kinds = np.empty(len(members), np.int64), np.empty(len(members), np.int64)
    shapes_before, kept_shapes = np.empty((len(members), N_SHAPE)), np.empty((len(members), N_SHAPE))
    fluxes_before, kept_fluxes = np.empty((len(members), 2, n_bands)), np.empty((len(members), 2, n_bands))
    keep_members(sources, members, kinds_before, shapes_before, fluxes_before)
    losses, possible, noted = np.empty(N_KINDS), np.empty(N_KINDS), np.empty((N_KINDS, len(members), n_bands))
    # Room for twice as many components as members, of which only what is used takes memory: handed out once, as large
    # arrays come from the system and go back to it each time.
    waves = np.empty((2 * len(members), 2, psf.shape[2]), np.float32)
    columns = np.empty((2 * len(members), N_COLUMNS, psf.shape[2]), np.float32)
    images = np.empty((2 * len(members), n_bands, n_pixels), np.float32)
    derivatives = np.empty((2 * len(members), N_COLUMNS - 1, bands_together(n_bands, side), n_pixels), np.float32)
    loss, change, steps, uniform = 0.0, 0.0, 0, True
    for _ in range(MOST_ATTEMPTS):
        for b in range(n_bands):
            strength[b] = np.sqrt(mean_weights[b])
            for k in range(2):
                for m in range(psf.shape[2]):
                    model[b, k, m] = 0.0
        for s in members:
            add_model(table, lengths, frequencies, sources, s, y0, x0, 1.0, model)
        shift_group(sources, members, y0, x0)
        uniform = collect_data(
            residual, weights, mean_weights, lengths, psf, model, side, y0, x0, exact, errors, data, power
        )
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
                        losses[j] = possible[j] = np.nan
                    losses[before] = possible[before] = loss + penalties[before]
                    note_fluxes(sources, members, noted[before])
                again = kind != DOUBLE or np.isnan(losses[DOUBLE]) or (before == SERSIC and negative)
                keep_members(sources, members, kept_kinds, kept_shapes, kept_fluxes)
                if not again or not propose_kind(sources, s, kind, candidates[s]):
                    kind = -1
            # Before all members are fitted with it, a kind has to show that it may be better with other shapes held.
            n_fits = 0 if kind < 0 else 1 if turn < 0 or len(members) == 1 else 2
            trial, done = 0.0, 0
            for left in range(n_fits, 0, -1):
                limit = np.inf if turn < 0 else loss + penalties[before] - penalties[kind]
                if left == 2:
                    limit += HOPELESS[int(kind > before)]
                trial, done = fit_group(
                    table,
                    lengths,
                    frequencies,
                    side,
                    inside,
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
                    variances,
                    waves,
                    columns,
                    images,
                    derivatives,
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
                    # Negative light is no alternative.
                    possible[kind] = np.nan if kind == DOUBLE and negative else losses[kind]
                    note_fluxes(sources, members, noted[kind])
                if worse:
                    take_back(sources, members, kept_kinds, kept_shapes, kept_fluxes)
                else:
                    loss, steps = trial, done
                    if kind != DOUBLE:
                        for b in range(n_bands):
                            sources.fluxes[s, 1, b] = 0.0
            last = turn % len(TRIALS) == len(TRIALS) - 1 and turn >= 0
            if last and may_choose(candidates, members[i : i + 1]):
                for j in range(N_KINDS):
                    sources.evidence[s, j] = losses[j] - losses[sources.kinds[s]]
                fill_doubt(sources, members, s, possible, sources.kinds[s], noted)
        shift_group(sources, members, -y0, -x0)
        if errors:
            break
        for b in range(n_bands):
            for m in range(psf.shape[2]):
                model[b, 0, m] = -model[b, 0, m]
                model[b, 1, m] = -model[b, 1, m]
        for s in members:
            add_model(table, lengths, frequencies, sources, s, y0, x0, 1.0, model)
        planes = see_modes(lengths, psf, model, side)
        # A kind that the surrogate has chosen is one that the pixels would choose.
        spared, changed = 0.0, False
        for k in range(len(members)):
            spared += penalties[kinds_before[k]] - penalties[sources.kinds[members[k]]]
            changed = changed or kinds_before[k] != sources.kinds[members[k]]
        most = spared if changed else np.inf
        if uniform or exact or not goes_too_far(residual, weights, planes, y0, x0, mean_weights, most):
            change = 0.0
            for b in range(n_bands):
                # Each mode stands for two.
                change += 2.0 * mean_weights[b] / (side * side) * seen_power(model[b], psf[b])
            add_planes(residual, planes, y0, x0, -1.0)
            break
        take_back(sources, members, kinds_before, shapes_before, fluxes_before)
        steps = 0
    return loss, steps, (uniform or exact) and not errors, change


@allocating_kernel
def sweep(
    residual,
    weights,
    soft_weights,
    table,
    modes,
    sides,
    levels,
    sources,
    groups,
    offsets,
    snr,
    bright_snr,
    chosen,
    largest,
    n_steps,
    tolerance,
    candidates,
    penalties,
    variances,
    errors,
    settled,
    lonely,
    stamps,
    wanted,
    updating,
    noise,
    psf_norm,
    small,
    largest_radius,
    above,
):
    """Visit the groups that have a chosen member, the brightest first, see `visit_group`.

    groups (S,), offsets (G + 1,): members of each group; snr, chosen (S,); candidates (S, N_KINDS); `levels`: see
    `plan_stamp`. Groups that are not brighter than `bright_snr` see the soft weights. settled (G,) says which groups
    another visit would leave as they are: the fit has come to its end, and what has changed since around it does not
    matter. They are left out, unless they have kinds to choose from or errors are asked for.

    stamps (G, 4) takes the stamp of each group, lonely (G,) whether it touches no other, wanted (G,) whether it has a
    chosen member. With `updating`, `estimate` comes last, with the arguments after it.

    Returns the number of steps of all sources, or `NOTHING_TO_VISIT`, or, with nothing done yet, `MODES_MISSING` if
    `modes` lacks what the stamp of a wanted group needs.
    """
    n_groups = len(settled)
    plan_stamps(sources, groups, offsets, snr, sides, levels, stamps)
    find_lonely(stamps, sides, lonely)
    faintness, order = np.empty(n_groups), np.empty(n_groups, np.int64)
    n_wanted, idle, missing = 0, True, False
    for g in range(n_groups):
        members = groups[offsets[g] : offsets[g + 1]]
        wanted[g], faintness[g] = False, np.inf
        for s in members:
            wanted[g] = wanted[g] or chosen[s]
            faintness[g] = min(faintness[g], -snr[s])
        if wanted[g]:
            order[n_wanted] = g
            n_wanted += 1
            idle = idle and settled[g] and not errors and not may_choose(candidates, members)
            missing = missing or modes.sets[stamps[g, 0], stamps[g, 3]] < 0
    if idle:
        n_wanted = 0
    elif missing:
        return MODES_MISSING
    sort_by(order[:n_wanted], faintness)
    mean_weights = np.empty(len(residual))
    nothing = np.zeros(candidates.shape, np.bool_)
    steps = 0
    for g in order[:n_wanted]:
        members = groups[offsets[g] : offsets[g + 1]]
        if settled[g] and not errors and not may_choose(candidates, members):
            continue
        most_steps = 2 * n_steps if lonely[g] else n_steps
        seen = weights if -faintness[g] > bright_snr else soft_weights
        evenness = mean_weight(seen, sources, members, mean_weights)
        n, most, suffices, change, last = 0, 0, True, 0.0, 0.0
        large = len(members) * sides[stamps[g, 0]] ** 2 > MOST_PIXELS
        n_rounds = 1 if evenness != UNEVEN or errors else 2 if large else ROUNDS
        to_choose = may_choose(candidates, members)
        for turn in range(n_rounds):
            # Kinds are compared when the fit has come to rest: a wrong one takes up what is left to be done.
            at_rest = turn > 0 and last < max(0.01 * change, SMALL_CHANGE)
            if at_rest and not to_choose:
                break
            choosing = to_choose and (at_rest or turn >= n_rounds - 2)
            to_choose = to_choose and not choosing
            # Between rounds the surrogate changes more than its last steps would.
            most = min(most_steps, 2) if evenness == UNEVEN and not choosing else most_steps
            _, n, suffices, last = visit_group(
                residual,
                seen,
                table,
                modes,
                sides,
                sources,
                members,
                stamps[g],
                mean_weights,
                evenness,
                largest,
                most,
                tolerance,
                candidates if choosing else nothing,
                penalties,
                variances,
                errors,
            )
            steps += n * len(members)
            change += last
        if errors:
            continue
        settled[g] = n < most and (suffices or last < SMALL_CHANGE)
        if change > SMALL_CHANGE:
            for h in range(len(settled)):
                if settled[h] and h != g and touch(stamps, sides, g, h):
                    settled[h] = False
    if updating:
        estimate(sources, noise, psf_norm, small, largest_radius, snr, above)
    return NOTHING_TO_VISIT if idle else steps
