"""Rendering of many components: each in its own small box, one band at a time."""

import numpy as np
from rocket_fft import c2r, r2c

from kermes.kernels.convolution import transform_kernels
from kermes.kernels.decorator import fast_kernel, kernel


@kernel
def rendered_boxes(boxes, reach, shape):
    """Grow every box by its reach (K,), inside the blend. Returns boxes and offsets of the rendered components."""
    h, w = shape
    grown = np.empty_like(boxes)
    offsets = np.zeros(len(boxes) + 1, dtype=np.int64)
    for k in range(len(boxes)):
        y0, x0, height, width = boxes[k]
        top, left = max(y0 - reach[k], 0), max(x0 - reach[k], 0)
        grown[k, 0] = top
        grown[k, 1] = left
        grown[k, 2] = min(y0 + height + reach[k], h) - top if height > 0 else 0
        grown[k, 3] = min(x0 + width + reach[k], w) - left if width > 0 else 0
        offsets[k + 1] = offsets[k] + grown[k, 2] * grown[k, 3]
    return grown, offsets


@fast_kernel
def multiply_into(out, transformed, kernel_fft):
    """out = transformed * kernel_fft, element by element."""
    for y in range(out.shape[0]):
        for x in range(out.shape[1]):
            out[y, x] = transformed[y, x] * kernel_fft[y, x]


@fast_kernel
def copy_above_rounding(out, plane, height, width):
    """Copy the first (height, width) pixels of a plane into a flat buffer.

    What is below a millionth of the largest is rounding of the transforms, and becomes zero.
    """
    top = np.float32(0.0)
    for y in range(height):
        for x in range(width):
            top = max(top, abs(plane[y, x]))
    limit = np.float32(1e-6) * top
    for y in range(height):
        for x in range(width):
            value = plane[y, x]
            out[y * width + x] = value if abs(value) >= limit else np.float32(0.0)


@kernel
def render_components(boxes, offsets, morphologies, stamps, reach, sides, classes, shape):
    """Convolve every morphology with the kernel of every band.

    boxes (K, 4), offsets (K + 1,) and morphologies packed; stamps (B, P, Q) float64, odd sides; reach (K,) how far
    from its box each component is rendered; sides (C,) the square transform sizes in use and classes (K,) which of
    them holds component k and its reach on both sides. What the kernel has beyond the reach wraps around: the caller
    sees to it that it is small. Returns the boxes (K, 4) and offsets (K + 1,) of the rendered components and their
    pixels (B, offsets[-1]) float32 for a spectrum of one. Cost O(K B s^2 log s) for transforms of side s.
    """
    n_bands = len(stamps)
    grown, grown_offsets = rendered_boxes(boxes, reach, shape)
    out = np.zeros((n_bands, grown_offsets[-1]), dtype=np.float32)
    axes = np.arange(2)
    for c in range(len(sides)):
        side = sides[c]
        kernel_fft = transform_kernels(stamps, side, side)
        plane = np.zeros((side, side), dtype=np.float32)
        transformed = np.empty((side, side // 2 + 1), dtype=np.complex64)
        product = np.empty((side, side // 2 + 1), dtype=np.complex64)
        for k in range(len(boxes)):
            if classes[k] != c or offsets[k + 1] == offsets[k]:
                continue
            y0, x0, height, width = boxes[k]
            g0, g1, gh, gw = grown[k]
            dy, dx = y0 - g0, x0 - g1
            plane[:] = 0.0
            for y in range(height):
                for x in range(width):
                    plane[dy + y, dx + x] = morphologies[offsets[k] + y * width + x]
            r2c(plane, transformed, axes, True, 1.0, 1)
            for b in range(n_bands):
                multiply_into(product, transformed, kernel_fft[b])
                c2r(product, plane, axes, False, 1.0, 1)
                copy_above_rounding(out[b, grown_offsets[k] : grown_offsets[k + 1]], plane, gh, gw)
    return grown, grown_offsets, out
