"""Profile sources on the stamps that they are fitted on: which stamp, which Fourier modes, and how they are drawn."""

from typing import NamedTuple

import numpy as np
from rocket_fft import c2c, c2r, r2c

from kermes.kernels.convolution import add_wrapped
from kermes.kernels.decorator import allocating_kernel, kernel
from kermes.kernels.profiles import (
    AS_EXPONENTIAL,
    AS_POINT,
    AS_TABLE,
    evaluate_profile,
    fill_frequencies,
    interpolate_index,
)

POINT, EXPONENTIAL, SERSIC, DOUBLE = 0, 1, 2, 3
N_KINDS = 4
LARGE_SIDE = 64
"""Stamps with a larger side than this are transformed band by band."""

N_SHAPE = 10
"""y, x, ln r, e1, e2, ln n; ln r, e1, e2 and ln n of the bulge."""


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

    frequencies: np.ndarray
    """Frequencies along y and x [radians per pixel], (2, modes) of one set after the other, flattened."""

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

    partners: np.ndarray
    """Members of its group when its kind was chosen, shape (S, G); -1: none."""

    doubt: np.ndarray
    """Mean square of what the total flux of each of them would change if it were of another kind, shape (S, G, B)."""

    lean: np.ndarray
    """Mean of that change, if it is a point that might be a galaxy or a galaxy that might be a point, (S, G, B)."""


@kernel
def add_row(out, row, factor):
    """Add a row, times a factor, to the first pixels of another that is as long or longer."""
    for x in range(len(row)):
        out[x] += factor * row[x]


@allocating_kernel
def add_model(table, lengths, frequencies, sources, s, y0, x0, factor, model):
    """Add one source, times `factor`, to a model before the PSF at the modes of a stamp with the corner y0, x0.

    model (B, 2, M).
    """
    n_bands, _, n_modes = model.shape
    cells = np.empty((table.values.shape[1] - 1, 6), np.float32)
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
        form = AS_POINT if kind == POINT else AS_EXPONENTIAL
        if part == 1 or kind == SERSIC:
            form = AS_TABLE
            interpolate_index(table.values, table.slopes, table.ln_index, ln_n, cells)
        evaluate_profile(form, cells, lengths, frequencies, shape, columns)
        for b in range(n_bands):
            f = np.float32(factor * sources.fluxes[s, part, b])
            add_row(model[b, 0], columns[0, 0], f)
            add_row(model[b, 1], columns[0, 1], f)


@kernel
def see_band(re, im, psf_re, psf_im, places, out):
    """Multiply modes (M,) with the transform of a PSF and put them at their places (M,) of a flat half plane."""
    for m in range(len(places)):
        out[places[m]] = complex(re[m] * psf_re[m] - im[m] * psf_im[m], re[m] * psf_im[m] + im[m] * psf_re[m])


@kernel
def bands_together(n_bands, side):
    """How many bands are transformed in one call, which costs as much as the transform of a small stamp.

    One if stamps are large, for the memory it takes.
    """
    return 1 if side > LARGE_SIDE else n_bands


@allocating_kernel
def see_modes(lengths, psf, model, side):
    """Images (B, side, side) of a model at the modes of a stamp, seen through the PSFs, psf (B, 2, M).

    model (B, 2, M), or (1, 2, M) if it is the same in all bands.
    """
    n_bands, _, n_modes = psf.shape
    half = side // 2 + 1
    planes = np.empty((n_bands, side, side), np.float32)
    places = np.empty(n_modes, np.int64)
    longest = m = 0
    for i in range(side):
        longest = max(longest, lengths[i])
        for j in range(lengths[i]):
            places[m] = i * half + j
            m += 1
    together = bands_together(n_bands, side)
    transformed = np.empty((together, side, half), np.complex64)
    flat = transformed.reshape(together, side * half)
    axis = np.empty(1, np.int64)
    for first in range(0, n_bands, together):
        # Columns without modes are zero.
        transformed[:] = 0
        for k in range(together):
            b = first + k
            own = model[min(b, len(model) - 1)]
            see_band(own[0], own[1], psf[b, 0], psf[b, 1], places, flat[k])
        axis[0] = 1
        c2c(transformed[:, :, :longest], transformed[:, :, :longest], axis, False, 1.0, 1)
        axis[0] = 2
        c2r(transformed, planes[first : first + together], axis, False, 1.0 / (side * side), 1)
    return planes


@kernel
def part_inside(shape, y0, x0, side):
    """Which part of a stamp lies in an image, shape (H, W): its first row, end, first column, end."""
    height, width = shape
    top, left = min(max(0, -y0), side), min(max(0, -x0), side)
    return top, max(top, min(side, height - y0)), left, max(left, min(side, width - x0))


@kernel
def add_planes(image, planes, y0, x0, factor):
    """Add the planes (B, side, side) of a stamp, times `factor`, to an image (B, H, W)."""
    top, bottom, left, right = part_inside(image.shape[1:], y0, x0, planes.shape[1])
    for b in range(len(image)):
        for i in range(top, bottom):
            add_row(image[b, y0 + i, x0 + left : x0 + right], planes[b, i, left:right], np.float32(factor))


@allocating_kernel
def set_of_psfs(modes, k):
    """Transforms of the PSFs of one set, shape (B, 2, modes)."""
    first, last = modes.offsets[k], modes.offsets[k + 1]
    n_bands = len(modes.psf) // (2 * modes.offsets[-1])
    return modes.psf[2 * n_bands * first : 2 * n_bands * last].reshape(n_bands, 2, last - first)


@allocating_kernel
def set_of_frequencies(modes, k):
    """Frequencies of the modes of one set, shape (2, modes)."""
    first, last = modes.offsets[k], modes.offsets[k + 1]
    return modes.frequencies[2 * first : 2 * last].reshape(2, last - first)


@kernel
def is_dark(sources, s):
    """Whether a source has no light in any band."""
    for part in range(2):
        for b in range(sources.fluxes.shape[2]):
            if sources.fluxes[s, part, b] != 0.0:
                return False
    return True


@allocating_kernel
def draw_source(table, modes, sides, sources, s, factor, image):
    """Add one source, times `factor`, to an image (B, H, W) on the stamp that it has now."""
    stamp = sources.stamps[s]
    if stamp[0] < 0 or is_dark(sources, s):
        return
    side = sides[stamp[0]]
    k = modes.sets[stamp[0], stamp[3]]
    lengths = modes.lengths[modes.starts[k] : modes.starts[k + 1]]
    psf = set_of_psfs(modes, k)
    model = np.zeros(psf.shape, np.float32)
    add_model(table, lengths, set_of_frequencies(modes, k), sources, s, stamp[1], stamp[2], factor, model)
    add_planes(image, see_modes(lengths, psf, model, side), stamp[1], stamp[2], 1.0)


@kernel
def draw_sources(residual, table, modes, sides, sources, rows, factor):
    """Add some sources, times `factor`, to the residual, each on its stamp."""
    for s in rows:
        draw_source(table, modes, sides, sources, s, factor, residual)


@kernel
def plan_stamp(sources, members, snr, sides, levels, stamp):
    """Choose side, corner and level of the stamp of a group: it holds the light of each member down to the noise.

    The stamp that all members have already is kept if it does, and is not much too large: drawing a source on another
    one costs as much as a visit.
    """
    top, left, bottom, right, brightest = np.inf, np.inf, -np.inf, -np.inf, 0.0
    for s in members:
        reach = 7.0 if snr[s] < 20.0 else 9.0 if snr[s] < 100.0 else 12.0 if snr[s] < 1000.0 else 22.0
        if snr[s] > 1e4:
            # Wings of the PSF: as far as they are continued beyond its stamp.
            reach = 45.0 if snr[s] < 1e5 else 60.0
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
    level = 0
    while level < len(levels) and brightest > levels[level]:
        level += 1
    now = sources.stamps[members[0]]
    keep = k <= now[0] <= k + 1 and now[3] == level
    if keep:
        y, x, side = now[1], now[2], sides[now[0]]
        keep = y <= top and bottom <= y + side and x <= left and right <= x + side
        for s in members:
            for j in range(4):
                keep = keep and sources.stamps[s, j] == now[j]
    if keep:
        for j in range(4):
            stamp[j] = now[j]
        return
    stamp[0] = k
    stamp[1] = int(np.floor(0.5 * (top + bottom - sides[k]) + 0.5))
    stamp[2] = int(np.floor(0.5 * (left + right - sides[k]) + 0.5))
    stamp[3] = level


@kernel
def plan_stamps(sources, groups, offsets, snr, sides, levels, stamps):
    """Plan the stamps (G, 4) of all groups."""
    for g in range(len(offsets) - 1):
        plan_stamp(sources, groups[offsets[g] : offsets[g + 1]], snr, sides, levels, stamps[g])


@kernel
def touch(stamps, sides, g, h):
    """Whether the stamps of two groups have pixels in common."""
    y, x = stamps[h, 1] - stamps[g, 1], stamps[h, 2] - stamps[g, 2]
    side, other = sides[stamps[g, 0]], sides[stamps[h, 0]]
    return -other < y < side and -other < x < side


@kernel
def find_lonely(stamps, sides, out):
    """Which groups have a stamp (G, 4) that touches no other; out (G,)."""
    n = len(stamps)
    for g in range(n):
        out[g] = True
        for h in range(n):
            if h != g and touch(stamps, sides, g, h):
                out[g] = False
                break


@allocating_kernel
def transform_modes(psfs, side, threshold, first, lengths, frequencies, psf):
    """List the modes of a stamp up to the last one in each row where some PSF is stronger than a threshold.

    psfs (B, P, Q), odd sides; lengths (side,) takes the number of modes of each row. Flat arrays take the others, from
    the place on that `first` modes before them fill: frequencies those along y, then along x [radians per pixel], psf
    the real and the imaginary part of the transforms of the first band, of the second and so on. The modes at the
    Nyquist frequency, whose phase is not defined, are left out. Returns the number of modes; nothing but `lengths` is
    filled if the arrays have no room for so many.
    """
    n_bands = len(psfs)
    half = side // 2 + 1
    # Band by band, for the memory that it takes.
    plane = np.empty((side, side), np.float32)
    transformed = np.empty((n_bands, side, half), np.complex64)
    axes = np.empty(2, np.int64)
    axes[0], axes[1] = 0, 1
    for i in range(side):
        lengths[i] = 0
    for b in range(n_bands):
        plane[:] = 0
        add_wrapped(plane, psfs[b])
        r2c(plane, transformed[b], axes, True, 1.0, 1)
        for i in range(side):
            if 2 * i == side:
                continue
            for j in range(lengths[i], half - 1):
                value = transformed[b, i, j]
                if value.real * value.real + value.imag * value.imag > threshold * threshold:
                    lengths[i] = j + 1
    n = np.sum(lengths)
    if 2 * (first + n) > len(frequencies):
        return n
    start = 2 * first * n_bands
    for b in range(n_bands):
        m = start + 2 * n * b
        for i in range(side):
            for j in range(lengths[i]):
                psf[m + j] = transformed[b, i, j].real
                psf[m + n + j] = transformed[b, i, j].imag
            m += lengths[i]
    fill_frequencies(lengths, frequencies[2 * first : 2 * (first + n)].reshape(2, n))
    return n
