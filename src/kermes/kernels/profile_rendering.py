"""Profile sources as pixels: from the Fourier modes of their stamps to images, with any PSF."""

import numpy as np
from rocket_fft import c2r

from kermes.kernels.convolution import multiply_into
from kermes.kernels.decorator import allocating_kernel, inlined_kernel, kernel
from kermes.kernels.flux import add_scaled
from kermes.kernels.profiles import (
    AS_EXPONENTIAL,
    AS_POINT,
    AS_TABLE,
    N_COLUMNS,
    evaluate_profile,
    interpolate_index,
)


@allocating_kernel
def evaluate_component(table, modes, shape, cells, columns):
    """Evaluate one component of flux one at the modes of pixels of half the side, which reach twice as far.

    shape (6,) is y, x, ln r, e1, e2, ln n in whole pixels, and ln r is -inf for a point source; cells is work space.
    Otherwise as evaluate_profile, with derivatives in half pixels.
    """
    finer = np.empty(5)
    finer[0], finer[1], finer[2] = 2 * shape[0], 2 * shape[1], shape[2] + np.log(2.0)
    finer[3], finer[4] = shape[3], shape[4]
    form = AS_EXPONENTIAL if shape[2] > -np.inf else AS_POINT
    if form == AS_EXPONENTIAL and (shape[5] != 0.0 or len(columns) == N_COLUMNS):
        form = AS_TABLE
        interpolate_index(table.values, table.slopes, table.ln_index, shape[5], cells)
    evaluate_profile(form, cells, modes.lengths, modes.frequencies, finer, columns)


@kernel
def fold_modes(column, numbers, places, weights, plane):
    """Add up modes (2, M) in a flat half plane (2 n,) of alternating real and imaginary parts.

    Mode numbers[i] (E,), its two parts times weights (2, E), is added at places[i] (E,).
    """
    for i in range(len(plane)):
        plane[i] = np.float32(0.0)
    for i in range(len(places)):
        plane[2 * places[i]] += weights[0, i] * column[0, numbers[i]]
        plane[2 * places[i] + 1] += weights[1, i] * column[1, numbers[i]]


@kernel
def make_complex(plane, out):
    """Turn a flat half plane of alternating real and imaginary parts into a complex one."""
    height, width = out.shape
    for y in range(height):
        for x in range(width):
            place = 2 * (y * width + x)
            out[y, x] = complex(plane[place], plane[place + 1])


@kernel
def raise_to(top, row):
    """Raise each pixel of a row to the absolute value of another row."""
    for x in range(len(top)):
        top[x] = max(top[x], abs(row[x]))


@kernel
def clear_below(row, limit):
    """Set to zero what is below a limit."""
    for x in range(len(row)):
        row[x] = row[x] if abs(row[x]) >= limit else np.float32(0.0)


@kernel
def clear_rounding(plane, top):
    """Set to zero what is below a millionth of the largest pixel: rounding of the transforms; top is work space."""
    # One maximum for all pixels would keep the loop from being vectorised.
    for x in range(plane.shape[1]):
        top[x] = 0.0
    for y in range(plane.shape[0]):
        raise_to(top, plane[y])
    largest = np.float32(0.0)
    for x in range(len(top)):
        largest = max(largest, top[x])
    for y in range(plane.shape[0]):
        clear_below(plane[y], np.float32(1e-6) * largest)


@inlined_kernel
def add_stamp(out, plane, factor, box, joined):
    """Add what a stamp, times a factor, and the box `joined` share to the pixels of `joined`, row by row."""
    y0, x0, width = joined[0], joined[1], joined[3]
    left, right = max(box[1], x0), min(box[1] + box[3], x0 + width)
    for y in range(max(box[0], y0), min(box[0] + box[2], y0 + joined[2])):
        if left < right:
            start = (y - y0) * width - x0
            add_scaled(out[start + left : start + right], plane[y - box[0], left - box[1] : right - box[1]], factor)


@inlined_kernel
def share_stamp(boxes, sources, k, other):
    """Whether two components belong to one source and are drawn on the same pixels."""
    return sources[k] == sources[other] and boxes[k, 0] == boxes[other, 0] and boxes[k, 1] == boxes[other, 1]


@allocating_kernel
def add_profiles(table, modes, psf_fft, boxes, shapes, spectra, sources, members, joined, joined_offsets, out):
    """Draw profile components and add them to the models of their sources.

    modes of a stamp as in `kermes.scene.Modes`. psf_fft (B, side, side // 2 + 1) from transform_kernels; without bands
    the PSF must be in the weights of the modes. boxes (K, 4), shapes (K, 6) with positions from the first pixel of the
    box, spectra (K, B), sources (K,); members (n,): the components to draw, all on stamps of that side, in the order of
    their sources. What leaves a stamp comes back on the other side. out (B, joined_offsets[-1]) takes the models on the
    boxes joined (S, 4). Components of a source that follow each other on the same pixels cost one inverse transform per
    band together, and one each without PSFs: O(n M + n B side^2 log side).
    """
    n_bands = spectra.shape[1]
    side = boxes[members[0], 2]
    half = side // 2 + 1
    axes = np.arange(2)
    cells = np.empty((table.values.shape[1] - 1, 6), dtype=np.float32)
    columns = np.empty((1, 2, modes.frequencies.shape[1]), dtype=np.float32)
    profile = np.empty(2 * side * half, dtype=np.float32)
    model = np.empty((n_bands, 2 * side * half), dtype=np.float32)
    transformed = np.empty((side, half), dtype=np.complex64)
    plane = np.empty((side, side), dtype=np.float32)
    top = np.empty(side, dtype=np.float32)
    for i in range(len(members)):
        k = members[i]
        s = sources[k]
        evaluate_component(table, modes, shapes[k], cells, columns)
        fold_modes(columns[0], modes.numbers, modes.places, modes.weights, profile)
        if len(psf_fft) == 0:
            make_complex(profile, transformed)
            c2r(transformed, plane, axes, False, 1.0, 1)
            clear_rounding(plane, top)
            for b in range(n_bands):
                add_stamp(out[b, joined_offsets[s] : joined_offsets[s + 1]], plane, spectra[k, b], boxes[k], joined[s])
            continue
        if i == 0 or not share_stamp(boxes, sources, k, members[i - 1]):
            for b in range(n_bands):
                for j in range(2 * side * half):
                    model[b, j] = 0.0
        for b in range(n_bands):
            add_scaled(model[b], profile, spectra[k, b])
        if i + 1 < len(members) and share_stamp(boxes, sources, k, members[i + 1]):
            continue
        for b in range(n_bands):
            make_complex(model[b], transformed)
            multiply_into(transformed, transformed, psf_fft[b])
            c2r(transformed, plane, axes, False, 1.0, 1)
            clear_rounding(plane, top)
            add_stamp(out[b, joined_offsets[s] : joined_offsets[s + 1]], plane, np.float32(1.0), boxes[k], joined[s])


@allocating_kernel
def profile_images(table, modes, shape, side, n_columns):
    """Draw a component of flux one and, for n_columns = N_COLUMNS, its derivatives by y, x, ln r, e1, e2 and ln n.

    Arguments as in add_profiles, the PSF in the weights. Returns (n_columns, side, side) float32.
    """
    half = side // 2 + 1
    cells = np.empty((table.values.shape[1] - 1, 6), dtype=np.float32)
    columns = np.zeros((n_columns, 2, modes.frequencies.shape[1]), dtype=np.float32)
    transformed = np.empty((side, half), dtype=np.complex64)
    profile = np.empty(2 * side * half, dtype=np.float32)
    out = np.empty((n_columns, side, side), dtype=np.float32)
    axes = np.arange(2)
    evaluate_component(table, modes, shape, cells, columns)
    for j in range(n_columns):
        fold_modes(columns[j], modes.numbers, modes.places, modes.weights, profile)
        make_complex(profile, transformed)
        # From half pixels to pixels.
        c2r(transformed, out[j], axes, False, 2.0 if j == 1 or j == 2 else 1.0, 1)
    return out
