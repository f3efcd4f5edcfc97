"""Corrections of free shape: light of a few spectra seen through the PSFs, the adjoint, and conjugate gradients."""

import numpy as np
from rocket_fft import c2r, r2c

from kermes.kernels.convolution import copy_plane, multiply_conjugate_into, multiply_into, pad_plane
from kermes.kernels.decorator import allocating_kernel, fast_kernel, kernel
from kermes.kernels.flux import add_scaled


@fast_kernel
def inner_product(one, other):
    """Sum of products of two flat arrays; squares of bright pixels are too large for a float32."""
    total = 0.0
    for i in range(len(one)):
        total += np.float64(one[i]) * np.float64(other[i])
    return total


@kernel
def lit_box(image, floor):
    """Box (y0, x0, height, width) of the pixels of an image that are above a floor; all zero if none is."""
    height, width = image.shape
    top, bottom, left, right = height, 0, width, 0
    for y in range(height):
        first = 0
        while first < width and not image[y, first] > floor:
            first += 1
        if first == width:
            continue
        last = width
        while not image[y, last - 1] > floor:
            last -= 1
        top, bottom = min(top, y), y + 1
        left, right = min(left, first), max(right, last)
    if bottom == 0:
        return 0, 0, 0, 0
    return top, left, bottom - top, right - left


@allocating_kernel
def observe(light, spectra, psf_fft, out):
    """Images (B, h, w) of light (K, h, w) with the spectra (K, B), seen through the PSFs; what lies outside is zero.

    psf_fft (B, side, side // 2 + 1) from transform_kernels, on a side that holds what is followed of the PSFs beyond
    the images. One transform for each k and each band.
    """
    n_bands, side, half = psf_fft.shape
    plane = np.empty((side, side), dtype=np.float32)
    transformed = np.empty((len(light), side, half), dtype=np.complex64)
    seen = np.empty((side, half), dtype=np.complex64)
    axes = np.arange(2)
    for k in range(len(light)):
        pad_plane(plane, light[k])
        r2c(plane, transformed[k], axes, True, 1.0, 1)
    for b in range(n_bands):
        seen[:] = 0.0
        for k in range(len(light)):
            if spectra[k, b] != 0.0:
                add_scaled(seen.reshape(-1), transformed[k].reshape(-1), spectra[k, b])
        multiply_into(seen, seen, psf_fft[b])
        c2r(seen, plane, axes, False, 1.0, 1)
        copy_plane(out[b], plane)


@allocating_kernel
def gather(images, spectra, psf_fft, out):
    """The adjoint of observe: images (B, h, w) correlated with the PSFs and summed with the spectra, (K, h, w)."""
    n_bands, side, half = psf_fft.shape
    plane = np.empty((side, side), dtype=np.float32)
    transformed = np.empty((side, half), dtype=np.complex64)
    total = np.empty((len(out), side, half), dtype=np.complex64)
    axes = np.arange(2)
    total[:] = 0.0
    for b in range(n_bands):
        pad_plane(plane, images[b])
        r2c(plane, transformed, axes, True, 1.0, 1)
        multiply_conjugate_into(transformed, transformed, psf_fft[b])
        for k in range(len(out)):
            if spectra[k, b] != 0.0:
                add_scaled(total[k].reshape(-1), transformed.reshape(-1), spectra[k, b])
    for k in range(len(out)):
        c2r(total[k], plane, axes, False, 1.0, 1)
        copy_plane(out[k], plane)


@kernel
def weigh_pixels(envelope, gradient, information, diagonal):
    """Turn derivatives by the light of pixels, and what is known of it, into those of the field; all flat."""
    for i in range(len(envelope)):
        gradient[i] *= envelope[i]
        information[i] = max(information[i], np.float32(0.0))
        diagonal[i] = np.float32(1.0) + envelope[i] * envelope[i] * information[i]


@fast_kernel
def total_gain(gradient, diagonal):
    """Sums of g g / d and of 1 - 1 / d; squares of bright pixels are too large for a float32."""
    gain, freedom = 0.0, 0.0
    for i in range(len(gradient)):
        gain += np.float64(gradient[i]) * np.float64(gradient[i] / diagonal[i])
        freedom += np.float64(np.float32(1.0) - np.float32(1.0) / diagonal[i])
    return gain, freedom


@allocating_kernel
def expect_gain(residual, weights, envelopes, spectra, squares, psf_fft, gradient, information, diagonal):
    """What would be gained if all pixels of some fields were independent, and what noise alone would gain.

    residual, weights (B, h, w); envelopes (K, h, w) and spectra (K, B) of the light that the fields change; squares
    (B,): sum of the squares of each PSF. gradient, information, diagonal (K, h, w) take the derivatives by the fields;
    what is known of the light of a pixel, all others known: the weights seen through the squared PSF, as if that were
    as wide as the PSF; and one plus what is known of the field there.
    """
    n_bands = len(residual)
    weighted, of_weights = np.empty(residual.shape, np.float32), np.empty(spectra.shape, np.float32)
    for b in range(n_bands):
        for y in range(residual.shape[1]):
            for x in range(residual.shape[2]):
                weighted[b, y, x] = weights[b, y, x] * residual[b, y, x]
        for k in range(len(spectra)):
            of_weights[k, b] = spectra[k, b] * spectra[k, b] * squares[b]
    gather(weighted, spectra, psf_fft, gradient)
    gather(weights, of_weights, psf_fft, information)
    flat_gradient, flat_diagonal = gradient.reshape(-1), diagonal.reshape(-1)
    weigh_pixels(envelopes.reshape(-1), flat_gradient, information.reshape(-1), flat_diagonal)
    return total_gain(flat_gradient, flat_diagonal)


@allocating_kernel
def make_filters(spectra, mean_weights, psf_fft):
    """What seeing light with weights that are the same in all pixels of a band, and gathering it, does to transforms.

    Returns (K, K, side, side // 2 + 1) float32: from the light of one spectrum to that of another, with what the
    inverse transform is to be divided by.
    """
    n_bands, side, half = psf_fft.shape
    n = len(spectra)
    filters = np.empty((n, n, side, half), dtype=np.float32)
    filters[:] = 0.0
    for k in range(n):
        for j in range(k + 1):
            for b in range(n_bands):
                factor = np.float32(mean_weights[b] * spectra[k, b] * spectra[j, b] * side * side)
                if factor == 0.0:
                    continue
                for y in range(side):
                    for x in range(half):
                        value = psf_fft[b, y, x]
                        filters[k, j, y, x] += factor * (value.real * value.real + value.imag * value.imag)
            if j < k:
                copy_plane(filters[j, k], filters[k, j])
    return filters


@allocating_kernel
def apply_filters(light, spectra, filters, transformed, out):
    """Filter light (K, h, w) of spectra (K, B); transformed (K, side, side // 2 + 1) is work space, out (K, h, w)."""
    n, side, half = transformed.shape
    plane = np.empty((side, side), dtype=np.float32)
    total = np.empty((side, half), dtype=np.complex64)
    axes = np.arange(2)
    for k in range(n):
        pad_plane(plane, light[k])
        r2c(plane, transformed[k], axes, True, 1.0, 1)
    for k in range(n):
        total[:] = 0.0
        for j in range(n):
            shared = False
            for b in range(spectra.shape[1]):
                shared = shared or spectra[k, b] * spectra[j, b] != 0.0
            if shared:
                for y in range(side):
                    for x in range(half):
                        total[y, x] += filters[k, j, y, x] * transformed[j, y, x]
        c2r(total, plane, axes, False, 1.0, 1)
        copy_plane(out[k], plane)


@allocating_kernel
def descend(
    envelopes,
    seen_envelopes,
    lowest,
    spectra,
    weights,
    mean_weights,
    psf_fft,
    diagonal,
    enough,
    n_turns,
    n_rounds,
    n_steps,
    fields,
    residual,
    gradient,
):
    """Lower chi2 plus the sum of squares of the fields until not more than is enough is promised, in place.

    Envelopes, fields, gradient (K, h, w): the light of spectrum k (K, B) is the product of the first two; residual,
    weights (B, h, w). Fields stay above `lowest` (K, h, w); the diagonal (K, h, w) preconditions. Each of at most
    n_turns turns takes steps of conjugate gradients as if the weights of a band were all alike, mean_weights (B,), and
    the envelopes seen_envelopes (K, h, w), which costs two transforms for each spectrum: n_steps at most, and a quarter
    of that up to n_rounds times with those pixels held that would fall too low. It goes as far along their sum as is
    best with the weights as they are. Where they are alike one turn is the solution.
    """
    n = fields.size
    light, curved = np.empty(fields.shape, dtype=np.float32), np.empty(fields.shape, dtype=np.float32)
    observed = np.empty(residual.shape, dtype=np.float32)
    envelope, free, weight = envelopes.reshape(-1), diagonal.reshape(-1), weights.reshape(-1)
    bent = seen_envelopes.reshape(-1)
    field, lit, seen, curve = fields.reshape(-1), light.reshape(-1), observed.reshape(-1), curved.reshape(-1)
    left, slope, low = residual.reshape(-1), gradient.reshape(-1), lowest.reshape(-1)
    change, rest, scale = np.empty(n, dtype=np.float32), np.empty(n, dtype=np.float32), np.empty(n, dtype=np.float32)
    step, direction = np.empty(n, dtype=np.float32), np.empty(n, dtype=np.float32)
    transformed = np.empty((len(spectra), psf_fft.shape[1], psf_fft.shape[2]), dtype=np.complex64)
    filters = make_filters(spectra, mean_weights, psf_fft)
    for _turn in range(n_turns):
        for i in range(n):
            change[i], rest[i] = 0.0, slope[i]
            # An infinite diagonal holds a pixel.
            scale[i] = np.inf if field[i] <= low[i] and slope[i] <= 0.0 else free[i]
        n_held = 0
        for round_ in range(1 + n_rounds):
            for i in range(n):
                step[i] = rest[i] / scale[i]
                direction[i] = step[i]
            gain = inner_product(rest, step)
            if round_ == 0 and not gain > enough:
                return
            for _ in range(n_steps if round_ == 0 else n_steps // 4):
                if not gain > enough:
                    break
                for i in range(n):
                    lit[i] = bent[i] * direction[i]
                apply_filters(light, spectra, filters, transformed, curved)
                for i in range(n):
                    curve[i] = direction[i] + bent[i] * curve[i]
                length = np.float32(gain / inner_product(direction, curve))
                for i in range(n):
                    change[i] += length * direction[i]
                    rest[i] -= length * curve[i]
                    step[i] = rest[i] / scale[i]
                before = gain
                gain = inner_product(rest, step)
                ratio = np.float32(gain / before)
                for i in range(n):
                    direction[i] = step[i] + ratio * direction[i]
            n_low = 0
            for i in range(n):
                if field[i] + change[i] < low[i]:
                    change[i] = low[i] - field[i]
                    scale[i] = np.inf
                    n_low += 1
            n_held += n_low
            if n_low == 0 or round_ == n_rounds:
                break
            for i in range(n):
                lit[i] = bent[i] * change[i]
            apply_filters(light, spectra, filters, transformed, curved)
            for i in range(n):
                rest[i] = slope[i] - change[i] - bent[i] * curve[i]
        for i in range(n):
            lit[i] = envelope[i] * change[i]
        observe(light, spectra, psf_fft, observed)
        promised, curvature = inner_product(slope, change), inner_product(change, change)
        for i in range(len(seen)):
            curvature += np.float64(weight[i]) * seen[i] * seen[i]
        length = np.float32(promised / curvature)
        if n_held > 0:
            length = min(length, np.float32(1.0))
        for i in range(n):
            field[i] = max(field[i] + length * change[i], low[i])
        for i in range(len(left)):
            left[i] -= length * seen[i]
            seen[i] = weight[i] * left[i]
        gather(observed, spectra, psf_fft, curved)
        for i in range(n):
            slope[i] = envelope[i] * curve[i] - field[i]
