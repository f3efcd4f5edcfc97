"""Matched filtering of all bands for detection, block by block."""

import numpy as np
from rocket_fft import c2r, r2c

from kermes.kernels.convolution import multiply_conjugate_into
from kermes.kernels.decorator import kernel


@kernel
def fill_block(weight, weighted, image, variance, valid, top, left, height, width, unit):
    """Cut a block of unit / variance, and of that times image / sqrt(unit), out of a band.

    The block (height, width) begins at pixel (top, left), which may lie outside the image; both planes are zero there,
    in pixels that are not valid and in the padding.
    """
    h, w = image.shape
    weight[:] = 0.0
    weighted[:] = 0.0
    scale = np.float32(1.0 / np.sqrt(unit))
    for y in range(max(top, 0), min(top + height, h)):
        for x in range(max(left, 0), min(left + width, w)):
            if valid[y, x]:
                value = np.float32(unit) / variance[y, x]
                weight[y - top, x - left] = value
                weighted[y - top, x - left] = value * (image[y, x] * scale)


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
def filter_bands(images, variance, valid, filters, units, side, min_coverage):
    """Correlate every band with its filters, weighted by the inverse variance, and add up the bands.

    images, variance, valid (B, H, W); filters (B, K, P, Q), odd sides, K = 1 or 2; units (B,) a typical variance, 0
    for a band that is left out. With w the inverse variance, zero where a pixel is not valid, and f a filter, the
    signal-to-noise is sum(w f I) / sqrt(sum(w f^2)); from that of a second filter, which sums to zero, what it sees of
    the local mean sum(w f_1 I) / sum(w f_1) is taken out. A pixel counts where sum(w f^2) is above `min_coverage` of
    what it is with all pixels valid. `side` is that of the transforms, at least max(P, Q).

    Returns the sums of the squares of the positive signal-to-noise (H, W) for either filter, the second zero when
    there is none, and the number of bands in the first. Float32: errors are 1e-7 of the largest signal-to-noise in a
    block. Cost O(K B H W log side).
    """
    b_total, h, w = images.shape
    n_filters, p, q = filters.shape[1], filters.shape[2], filters.shape[3]
    n = side - max(p, q) + 1
    chi2 = np.zeros((h, w))
    contrast = np.zeros((h, w))
    n_bands = np.zeros((h, w), dtype=np.uint8)
    weight = np.empty((side, side), dtype=np.float32)
    weighted = np.empty((side, side), dtype=np.float32)
    kernel_fft = np.empty((2 * n_filters, side, side // 2 + 1), dtype=np.complex64)
    transformed = np.empty((2, side, side // 2 + 1), dtype=np.complex64)
    product = np.empty((side, side // 2 + 1), dtype=np.complex64)
    planes = np.empty((6 if n_filters == 2 else 2, side, side), dtype=np.float32)
    least = np.empty(n_filters, dtype=np.float32)
    axes = np.arange(2)
    scale = 1.0 / (side * side)
    for b in range(b_total):
        if not units[b] > 0:
            continue
        for k in range(n_filters):
            weight[:] = 0.0
            for part in range(2):  # the filter, and its square
                power = 0.0
                for y in range(p):
                    for x in range(q):
                        value = np.float32(filters[b, k, y, x])
                        weight[y, x] = value if part == 0 else value * value
                        power += weight[y, x]
                r2c(weight, kernel_fft[2 * k + part], axes, True, scale, 1)
            least[k] = min_coverage * power
        for y0 in range(0, h, n):
            for x0 in range(0, w, n):
                top, left = y0 - p // 2, x0 - q // 2
                fill_block(
                    weight, weighted, images[b], variance[b], valid[b], top, left, n + p - 1, n + q - 1, units[b]
                )
                for part in range(2):
                    r2c(weighted if part == 0 else weight, transformed[part], axes, True, 1.0, 1)
                for k in range(n_filters):
                    # The signal, its information, and the sum of the filter over the weights.
                    for part in range(n_filters + 1):
                        of_kernel = kernel_fft[2 * k + 1] if part == 1 else kernel_fft[2 * k]
                        multiply_conjugate_into(product, transformed[min(part, 1)], of_kernel)
                        c2r(product, planes[4 + k if part == 2 else 2 * k + part], axes, False, 1.0, 1)
                rows, columns = slice(y0, min(y0 + n, h)), slice(x0, min(x0 + n, w))
                add_significance(chi2[rows, columns], n_bands[rows, columns], planes[0], planes[1], least[0])
                if n_filters == 2:
                    add_contrast(contrast[rows, columns], planes, least)
    return chi2, contrast, n_bands
