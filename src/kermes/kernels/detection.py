"""Matched filtering of all bands for detection, block by block."""

import numpy as np
from rocket_fft import c2r, r2c

from kermes.kernels.convolution import multiply_conjugate_into
from kermes.kernels.decorator import allocating_kernel, fast_kernel, inlined_kernel, kernel


@inlined_kernel
def quiet_variance(value, variance, unit):
    """Variance without the photon noise of a bright pixel, as far as `unit` is that of the sky.

    A filter that is weighted by the inverse of the photon noise all but leaves the core of a bright star out, and sees
    a ring. A pixel noisier than `unit` that is five sigma bright is drawn towards `unit`, and the more the brighter.
    """
    result = variance
    if variance > unit and value > 0:
        excess = value / np.sqrt(variance) - np.float32(5.0)
        if excess > 0:
            share = excess * excess / (excess * excess + np.float32(25.0))
            result = variance - share * (variance - unit)
    return result


@kernel
def fill_block(weight, noise, weighted, image, variance, valid, top, left, height, width, unit):
    """Cut weights unit / variance, their noise, and weights times image / sqrt(unit) out of a band.

    The variance of the weights is without photon noise; `noise` is weight^2 variance / unit, which is the weight but
    for bright pixels. The block (height, width) begins at pixel (top, left), which may lie outside the image; all
    planes are zero there, in pixels that are not valid and in the padding. Returns whether noise and weight differ, and
    whether all pixels of the image in the block have the weight one.
    """
    h, w = image.shape
    weight[:] = 0.0
    noise[:] = 0.0
    weighted[:] = 0.0
    differ, even = False, True
    unit = np.float32(unit)
    scale = np.float32(1.0 / np.sqrt(np.float64(unit)))
    for y in range(max(top, 0), min(top + height, h)):
        for x in range(max(left, 0), min(left + width, w)):
            if valid[y, x]:
                quiet = quiet_variance(image[y, x], variance[y, x], unit)
                value = unit / quiet
                even = even and value == 1
                weight[y - top, x - left] = value
                noise[y - top, x - left] = value
                weighted[y - top, x - left] = value * (image[y, x] * scale)
                if quiet != variance[y, x]:
                    noise[y - top, x - left] = value * (variance[y, x] / quiet)
                    differ = True
            else:
                even = False
    return differ, even


@kernel
def fill_even(plane, cumulative, image_shape, y0, x0, height, width):
    """Correlate an image in which all pixels are one with a filter, of which `cumulative` (P + 1, Q + 1) has the sums.

    plane (H, W) takes the block of (height, width) that begins at pixel (y0, x0): the sum of what lies in the image.
    """
    p, q = cumulative.shape[0] - 1, cumulative.shape[1] - 1
    for y in range(height):
        above = max(0, p // 2 - y0 - y)
        below = max(above, min(p, image_shape[0] + p // 2 - y0 - y))
        for x in range(width):
            left = max(0, q // 2 - x0 - x)
            right = max(left, min(q, image_shape[1] + q // 2 - x0 - x))
            plane[y, x] = (
                cumulative[below, right] - cumulative[above, right] - cumulative[below, left] + cumulative[above, left]
            )


@kernel
def add_significance(chi2, n_bands, signal, information, least):
    """Add the squares of signal / sqrt(information) where positive, and count the bands with more than `least`."""
    for y in range(chi2.shape[0]):
        for x in range(chi2.shape[1]):
            if information[y, x] > least:
                n_bands[y, x] += 1
                value = max(signal[y, x], np.float32(0.0))
                chi2[y, x] += value * value / information[y, x]


@kernel
def add_contrast(contrast, planes, least):
    """Add the squares of the signal-to-noise of the second filter, its response to the local mean taken out.

    planes: signal, information, response, its information, and the sums of both filters over the weights.
    """
    for y in range(contrast.shape[0]):
        for x in range(contrast.shape[1]):
            if planes[1, y, x] > least[0] and planes[3, y, x] > least[1]:
                local = planes[5, y, x] * planes[0, y, x] / planes[4, y, x]
                value = max(planes[2, y, x] - local, np.float32(0.0))
                contrast[y, x] += value * value / planes[3, y, x]


@kernel
def as_sigma(out, chi2, n_bands, root_step, tables):
    """Turn sums over bands into the number of sigma of a single Gaussian; zero where no band is in the sum.

    tables (B + 1, N): that number for sqrt(chi2) at multiples of `root_step`, by the number of bands in the sum.
    """
    last = tables.shape[1] - 1
    end = last * root_step
    for y in range(out.shape[0]):
        for x in range(out.shape[1]):
            n = n_bands[y, x]
            if n == 0:
                out[y, x] = 0.0
                continue
            root = np.sqrt(chi2[y, x])
            if root > end:
                # Beyond the table the difference between the two falls as 1 / sqrt(chi2).
                out[y, x] = root - (end - tables[n, last]) * end / root
            else:
                place = min(root / root_step, last + 1 - 1.001)
                index = int(place)
                low = tables[n, index]
                out[y, x] = low + (place - index) * (tables[n, index + 1] - low)


@allocating_kernel
def transform_filters(filters, side):
    """Transform filters (B, K, P, Q) and their squares to squares of `side`, for filter_block.

    Returns (B, 2 K, side, side // 2 + 1) complex64, each filter followed by its square, and in the same order the sums
    over the first rows and columns of each (B, 2 K, P + 1, Q + 1).
    """
    b_total, n_filters, p, q = filters.shape
    cumulative = np.zeros((b_total, 2 * n_filters, p + 1, q + 1))
    out = np.empty((b_total, 2 * n_filters, side, side // 2 + 1), dtype=np.complex64)
    plane = np.empty((side, side), dtype=np.float32)
    axes = np.arange(2)
    scale = 1.0 / (side * side)
    for b in range(b_total):
        for k in range(n_filters):
            plane[:] = 0.0
            for part in range(2):
                sums = cumulative[b, 2 * k + part]
                for y in range(p):
                    for x in range(q):
                        value = np.float32(filters[b, k, y, x])
                        plane[y, x] = value if part == 0 else value * value
                        sums[y + 1, x + 1] = plane[y, x] + sums[y, x + 1] + sums[y + 1, x] - sums[y, x]
                r2c(plane, out[b, 2 * k + part], axes, True, scale, 1)
    return out, cumulative


@allocating_kernel
def filter_block(
    images, variance, valid, filters_fft, cumulative, units, min_coverage, corner, shape, root_step, tables
):
    """Correlate a block of every band with its filters, weighted by the inverse variance, and add up the bands.

    images, variance, valid (B, H, W); filters_fft, cumulative from transform_filters, of filters (P, Q) with odd
    sides; units (B,) a typical variance, 0 for a band that is left out; corner, shape: the block, which lies in the
    image and is at most side + 1 - max(P, Q) wide. With w the inverse variance without photon noise (fill_block), zero
    where a pixel is not valid, and f a filter, the signal-to-noise is sum(w f I) / sqrt(sum(w^2 f^2 variance)); from
    that of a second filter, which sums to zero, what it sees of the local mean sum(w f_1 I) / sum(w f_1) is taken
    out. A pixel counts where the sum under the root is above `min_coverage` (K,) of what it is with all pixels valid.

    Returns the significance (K, *shape) [sigma] for each filter: the sum over the bands of the squares of the positive
    signal-to-noise, put through the `tables` of as_sigma. Transforms are in float32: errors are 1e-7 of the largest
    signal-to-noise in a block. Cost O(K B side^2 log side).
    """
    p, q = cumulative.shape[2] - 1, cumulative.shape[3] - 1
    y0, x0 = corner
    h, w = shape
    n_filters, side = cumulative.shape[1] // 2, filters_fft.shape[2]
    chi2 = np.zeros((h, w))
    contrast = np.zeros((h, w))
    n_bands = np.zeros((h, w), dtype=np.uint8)
    weight = np.empty((side, side), dtype=np.float32)
    noise = np.empty((side, side), dtype=np.float32)
    weighted = np.empty((side, side), dtype=np.float32)
    transformed = np.empty((3, side, side // 2 + 1), dtype=np.complex64)
    product = np.empty((side, side // 2 + 1), dtype=np.complex64)
    planes = np.empty((6 if n_filters == 2 else 2, side, side), dtype=np.float32)
    least = np.empty(n_filters, dtype=np.float32)
    out = np.empty((n_filters, h, w), dtype=np.float32)
    axes = np.arange(2)
    for b in range(len(units)):
        if not units[b] > 0:
            continue
        for k in range(n_filters):
            least[k] = min_coverage[k] * cumulative[b, 2 * k + 1, p, q]
        differ, even = fill_block(
            weight,
            noise,
            weighted,
            images[b],
            variance[b],
            valid[b],
            y0 - p // 2,
            x0 - q // 2,
            h + p - 1,
            w + q - 1,
            units[b],
        )
        r2c(weighted, transformed[0], axes, True, 1.0, 1)
        if not even:
            r2c(noise, transformed[1], axes, True, 1.0, 1)
        if differ and n_filters == 2:
            r2c(weight, transformed[2], axes, True, 1.0, 1)
        for k in range(n_filters):
            # The signal, its information, and the sum of the filter over the weights.
            for part in range(n_filters + 1):
                which = 2 * k + 1 if part == 1 else 2 * k
                out_of = planes[4 + k if part == 2 else 2 * k + part]
                if even and part > 0:
                    fill_even(out_of, cumulative[b, which], images.shape[1:], y0, x0, h, w)
                    continue
                plane = part if part < 2 or differ else 1
                multiply_conjugate_into(product, transformed[plane], filters_fft[b, which])
                c2r(product, out_of, axes, False, 1.0, 1)
        add_significance(chi2, n_bands, planes[0], planes[1], least[0])
        if n_filters == 2:
            add_contrast(contrast, planes, least)
    as_sigma(out[0], chi2, n_bands, root_step, tables)
    if n_filters == 2:
        as_sigma(out[1], contrast, n_bands, root_step, tables)
    return out


@allocating_kernel
def signal_to_noise(images, variance, valid, filters, units, peaks, min_coverage):
    """Signal-to-noise of a filter per band at each peak, as in filter_block, pixel by pixel.

    images, variance, valid (B, H, W); filters (B, P, Q), odd sides; units (B,) a typical variance, 0 for a band that is
    left out; peaks (N, 2), (y, x) in the image. Returns (N, B), NaN in a band that does not count there.
    Cost O(N B P Q).
    """
    b_total, h, w = images.shape
    p, q = filters.shape[1], filters.shape[2]
    out = np.full((len(peaks), b_total), np.nan)
    for k in range(len(peaks)):
        top, left = peaks[k, 0] - p // 2, peaks[k, 1] - q // 2
        for b in range(b_total):
            if not units[b] > 0:
                continue
            signal, noise, power = 0.0, 0.0, 0.0
            unit = np.float32(units[b])
            for i in range(p):
                for j in range(q):
                    y, x, f = top + i, left + j, filters[b, i, j]
                    power += f * f
                    if 0 <= y < h and 0 <= x < w and valid[b, y, x]:
                        weight = units[b] / quiet_variance(images[b, y, x], variance[b, y, x], unit)
                        signal += weight * f * images[b, y, x]
                        noise += (weight * f) ** 2 * variance[b, y, x]
            if noise > min_coverage * power * units[b]:
                out[k, b] = signal / np.sqrt(noise)
    return out


@allocating_kernel
def grow(region, half_widths):
    """Add to a region (H, W) all pixels within a disc, whose rows reach half_widths (2 R + 1,) to either side."""
    h, w = region.shape
    radius = len(half_widths) // 2
    out = region.copy()
    for y in range(h):
        for x in range(w):
            if not region[y, x]:
                continue
            inside = 0 < y < h - 1 and 0 < x < w - 1
            if inside and region[y - 1, x] and region[y + 1, x] and region[y, x - 1] and region[y, x + 1]:
                continue  # what it reaches, its neighbours reach too
            for i in range(max(y - radius, 0), min(y + radius + 1, h)):
                reach = half_widths[i - y + radius]
                for j in range(max(x - reach, 0), min(x + reach + 1, w)):
                    out[i, j] = True
    return out


@kernel
def weigh_row(image, variance, valid, weight, weighted):
    """Fill a row of inverse variances and of images times these, zero where a pixel is not valid."""
    for x in range(len(image)):
        w = np.float32(1.0) / variance[x] if valid[x] else np.float32(0.0)
        weight[x] = w
        weighted[x] = w * image[x] if valid[x] else np.float32(0.0)


@fast_kernel
def sum_under(weight, weighted, core):
    """Sums over a row of w p I and w p^2."""
    signal, information = np.float32(0.0), np.float32(0.0)
    for x in range(len(core)):
        signal += core[x] * weighted[x]
        information += core[x] * core[x] * weight[x]
    return signal, information


@kernel
def fill_points(images, variance, valid, labels, cores, step, n_y, n_x, weight, weighted, out):
    """Fill what `points_in_noise` returns at n_y by n_x places in the middle; weight, weighted (p, W): room."""
    _, height, width = images.shape
    first_y, first_x = (height - 1 - (n_y - 1) * step) // 2, (width - 1 - (n_x - 1) * step) // 2
    side = cores.shape[1]
    half = side // 2
    for b in range(len(images)):
        whole = 0.0
        for i in range(side):
            for j in range(side):
                whole += cores[b, i, j] * cores[b, i, j]
        k = 0
        for y in range(first_y, first_y + n_y * step, step):
            for i in range(side):
                row = y - half + i
                weigh_row(images[b, row], variance[b, row], valid[b, row], weight[i], weighted[i])
            for x in range(first_x, first_x + n_x * step, step):
                out[b, k] = np.nan
                if labels[y, x] == 0 and valid[b, y, x]:
                    left, right = x - half, x - half + side
                    signal, information = 0.0, 0.0
                    for i in range(side):
                        part, part2 = sum_under(weight[i, left:right], weighted[i, left:right], cores[b, i])
                        signal += part
                        information += part2
                    if information > 0.5 * whole * weight[half, x]:
                        out[b, k] = signal / np.sqrt(information)
                k += 1


@allocating_kernel
def points_in_noise(images, variance, valid, labels, cores, step):
    """Signal-to-noise of points at places without a source, by the variance of the pixels, shape (B, n).

    images, variance, valid (B, H, W); labels (H, W), zero without a source; cores (B, p, p), the middle of the PSFs, of
    odd side. The places are `step` pixels apart; NaN where there is a source, and where there is less than half of the
    information that a point would have if all pixels were like that at its centre. O(B H W p^2 / step^2).
    """
    _, height, width = images.shape
    half = cores.shape[1] // 2
    n_y, n_x = max(0, 1 + (height - 2 * half - 1) // step), max(0, 1 + (width - 2 * half - 1) // step)
    out = np.empty((len(images), n_y * n_x))
    room = np.empty((2, cores.shape[1], width), dtype=np.float32)
    fill_points(images, variance, valid, labels, cores, step, n_y, n_x, room[0], room[1], out)
    return out
