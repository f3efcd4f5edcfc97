"""First shapes of sources: symmetric, monotonic pieces of a detection image."""

import numpy as np
from rocket_fft import c2r, r2c

from kermes.kernels.convolution import copy_plane, pad_plane
from kermes.kernels.decorator import allocating_kernel, kernel


@kernel
def accumulate_band(transformed, kernel_fft, weight, information, numerator):
    """information += weight |K|^2 and numerator += weight conj(K) F, element by element."""
    for y in range(transformed.shape[0]):
        for x in range(transformed.shape[1]):
            value = kernel_fft[y, x]
            information[y, x] += weight * (value.real * value.real + value.imag * value.imag)
            numerator[y, x] += weight * (np.conj(value) * transformed[y, x])


@allocating_kernel
def deconvolve(images, band_weights, kernel_fft, width, strength):
    """Wiener filter of all bands together, for sources of equal flux in all of them.

    images (B, H, W); band_weights (B,) sum to one; kernel_fft (B, h, width // 2 + 1) from transform_kernels. Returns
    the image (H, W) float32 and the sum of its squared response to noise, for noise of variance 1 / band_weights.
    """
    n_bands, h, w = images.shape
    height = kernel_fft.shape[1]
    plane = np.empty((height, width), dtype=np.float32)
    transformed = np.empty((height, width // 2 + 1), dtype=np.complex64)
    numerator = np.empty((height, width // 2 + 1), dtype=np.complex64)
    information = np.empty((height, width // 2 + 1), dtype=np.float32)
    for y in range(height):
        for x in range(width // 2 + 1):
            numerator[y, x] = 0.0
            information[y, x] = 0.0
    axes = np.arange(2)
    size = np.float32(height * width)
    for b in range(n_bands):
        if band_weights[b] > 0:
            pad_plane(plane, images[b])
            r2c(plane, transformed, axes, True, 1.0, 1)
            # The transforms of the kernels are divided by the number of pixels.
            accumulate_band(transformed, kernel_fft[b], np.float32(band_weights[b]), information, numerator)
    floor = np.float32(strength) * information[0, 0] * size * size
    gain = 0.0
    for y in range(height):
        for x in range(width // 2 + 1):
            power = information[y, x] * size * size
            filtered = np.float32(1.0) / (power + floor)
            numerator[y, x] *= filtered
            # A mode of the half plane stands for two, but for its first and, if the width is even, last column.
            once = x == 0 or 2 * x == width
            gain += (1.0 if once else 2.0) * power * filtered * filtered
    c2r(numerator, plane, axes, False, 1.0, 1)
    image = np.empty((h, w), dtype=np.float32)
    copy_plane(image, plane)
    return image, gain / size


@allocating_kernel
def signal_to_noise(images, weights, psfs, centers):
    """Signal-to-noise of a point source at every centre, all bands together.

    images, weights (B, H, W), psfs (B, P, Q), centers (K, 2). The matched filter sum(I P) / sqrt(sum(P^2 V)) over
    the usable pixels of the stamp; zero where none is usable. Cost O(K B P Q).
    """
    n_bands, h, w = images.shape
    p, q = psfs.shape[1:]
    out = np.empty(len(centers))
    for k in range(len(centers)):
        cy, cx = centers[k, 0], centers[k, 1]
        signal, noise2 = 0.0, 0.0
        for b in range(n_bands):
            for y in range(max(cy - p // 2, 0), min(cy + p // 2 + 1, h)):
                for x in range(max(cx - q // 2, 0), min(cx + q // 2 + 1, w)):
                    if weights[b, y, x] > 0:
                        value = psfs[b, y - cy + p // 2, x - cx + q // 2]
                        signal += images[b, y, x] * value
                        noise2 += value * value / weights[b, y, x]
        out[k] = signal / np.sqrt(noise2) if noise2 > 0 else 0.0
    return out


@kernel
def grow_symmetric(image, cy, cx, limit, reached, queue):
    """Find the pixels that a path of falling values joins to (cy, cx), on the symmetrised image.

    The value of a pixel is the smaller of itself and its mirror about the centre (nothing where the mirror lies
    outside); only values above `limit` count. reached (h, w) uint8, zero on entry, is 1 on these pixels
    afterwards; queue, at least as long as the image, holds them. Returns their number; zero when the centre
    itself is not above `limit`.
    """
    h, w = image.shape
    if not image[cy, cx] > limit:
        return 0
    reached[cy, cx] = 1
    queue[0] = cy * w + cx
    first, last = 0, 1
    while first < last:
        y, x = queue[first] // w, queue[first] % w
        first += 1
        value = min(image[y, x], image[2 * cy - y, 2 * cx - x])
        for k in range(4):
            ny = y + (1 if k == 0 else (-1 if k == 1 else 0))
            nx = x + (1 if k == 2 else (-1 if k == 3 else 0))
            my, mx = 2 * cy - ny, 2 * cx - nx
            if ny < 0 or ny >= h or nx < 0 or nx >= w or my < 0 or my >= h or mx < 0 or mx >= w:
                continue
            if reached[ny, nx] == 0:
                candidate = min(image[ny, nx], image[my, mx])
                if limit < candidate <= value:
                    reached[ny, nx] = 1
                    queue[last] = ny * w + nx
                    last += 1
    return last


@allocating_kernel
def first_morphologies(image, centers, limit, pad):
    """Cut a first morphology around every centre out of a detection image.

    image (h, w), centers (K, 2). Monotonic and symmetric (see grow_symmetric), in the smallest box around the
    pixels above `limit`, grown by `pad` inside the image; largest value 1. Returns boxes (K, 4), offsets
    (K + 1,) and the packed morphologies; the box of a centre that is not above `limit` is empty.
    """
    h, w = image.shape
    reached = np.zeros((h, w), dtype=np.uint8)
    queue = np.empty(h * w, dtype=np.int64)
    boxes = np.empty((len(centers), 4), dtype=np.int64)
    offsets = np.empty(len(centers) + 1, dtype=np.int64)
    offsets[0] = 0
    packed = np.zeros(64 * len(centers) + 64, dtype=np.float32)
    for k in range(len(centers)):
        cy, cx = centers[k, 0], centers[k, 1]
        n = grow_symmetric(image, cy, cx, limit, reached, queue)
        offsets[k + 1] = offsets[k]
        if n == 0:
            for side in range(4):
                boxes[k, side] = 0
            continue
        y0, y1, x0, x1 = cy, cy + 1, cx, cx + 1
        for i in range(n):
            y, x = queue[i] // w, queue[i] % w
            reached[y, x] = 0
            y0, y1 = min(y0, y), max(y1, y + 1)
            x0, x1 = min(x0, x), max(x1, x + 1)
        y0, y1 = max(y0 - pad, 0), min(y1 + pad, h)
        x0, x1 = max(x0 - pad, 0), min(x1 + pad, w)
        boxes[k, 0], boxes[k, 1], boxes[k, 2], boxes[k, 3] = y0, x0, y1 - y0, x1 - x0
        end = offsets[k] + (y1 - y0) * (x1 - x0)
        offsets[k + 1] = end
        if end > len(packed):
            larger = np.zeros(2 * end, dtype=np.float32)
            for i in range(offsets[k]):
                larger[i] = packed[i]
            packed = larger
        for i in range(n):
            y, x = queue[i] // w, queue[i] % w
            value = min(image[y, x], image[2 * cy - y, 2 * cx - x])
            packed[offsets[k] + (y - y0) * (x1 - x0) + x - x0] = value / image[cy, cx]
    return boxes, offsets, packed[: offsets[-1]].copy()


@allocating_kernel
def first_components(boxes, offsets, morphologies, centers, psf, level, two_components, shape):
    """Make components of first morphologies: one, two, or the PSF of the model frame.

    boxes (K, 4), offsets (K + 1,) and packed morphologies from first_morphologies; two_components (K,) says which
    sources get the part of the morphology below `level` and the part above as two. A source without a morphology gets
    `psf` (p, q), odd sides, centred on it and cut at the edge of the blend. Returns boxes, offsets, packed morphologies
    with largest value 1, and the source of each component.
    """
    h, w = shape
    p, q = psf.shape
    n_components, n_pixels = 0, 0
    for k in range(len(boxes)):
        size = offsets[k + 1] - offsets[k]
        count = 2 if size > 0 and two_components[k] else 1
        n_components += count
        n_pixels += count * size if size > 0 else p * q
    new_boxes = np.empty((n_components, 4), dtype=np.int64)
    new_offsets = np.empty(n_components + 1, dtype=np.int64)
    new_offsets[0] = 0
    sources = np.empty(n_components, dtype=np.int64)
    packed = np.empty(n_pixels, dtype=np.float32)
    c = 0
    for k in range(len(boxes)):
        start, size = offsets[k], offsets[k + 1] - offsets[k]
        begin = new_offsets[c]
        if size == 0:
            y0, x0 = max(centers[k, 0] - p // 2, 0), max(centers[k, 1] - q // 2, 0)
            y1, x1 = min(centers[k, 0] + p // 2 + 1, h), min(centers[k, 1] + q // 2 + 1, w)
            top = psf[p // 2, q // 2]
            i = begin
            for y in range(y0, y1):
                for x in range(x0, x1):
                    packed[i] = psf[y - centers[k, 0] + p // 2, x - centers[k, 1] + q // 2] / top
                    i += 1
            new_boxes[c, 0], new_boxes[c, 1], new_boxes[c, 2], new_boxes[c, 3] = y0, x0, y1 - y0, x1 - x0
            new_offsets[c + 1] = i
            sources[c] = k
            c += 1
            continue
        for part in range(2 if two_components[k] else 1):
            begin = new_offsets[c]
            for i in range(size):
                value = morphologies[start + i]
                if two_components[k]:
                    value = min(value / level, 1.0) if part == 0 else max(value - level, 0.0) / (1.0 - level)
                packed[begin + i] = value
            for side in range(4):
                new_boxes[c, side] = boxes[k, side]
            new_offsets[c + 1] = begin + size
            sources[c] = k
            c += 1
    return new_boxes, new_offsets, packed[: new_offsets[-1]].copy(), sources
