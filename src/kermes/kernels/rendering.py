"""Rendering of many components: each in its own small box, one band at a time."""

import numpy as np
from rocket_fft import c2r, r2c

from kermes.kernels.convolution import multiply_into
from kermes.kernels.decorator import allocating_kernel, fast_kernel


@allocating_kernel
def rendered_boxes(boxes, reach, shape):
    """Grow every box by its reach (K,), inside the blend. Returns boxes and offsets of the rendered components."""
    h, w = shape
    grown = np.empty((len(boxes), 4), dtype=np.int64)
    offsets = np.empty(len(boxes) + 1, dtype=np.int64)
    offsets[0] = 0
    for k in range(len(boxes)):
        y0, x0, height, width = boxes[k, 0], boxes[k, 1], boxes[k, 2], boxes[k, 3]
        top, left = max(y0 - reach[k], 0), max(x0 - reach[k], 0)
        grown[k, 0] = top
        grown[k, 1] = left
        grown[k, 2] = min(y0 + height + reach[k], h) - top if height > 0 else 0
        grown[k, 3] = min(x0 + width + reach[k], w) - left if width > 0 else 0
        offsets[k + 1] = offsets[k] + grown[k, 2] * grown[k, 3]
    return grown, offsets


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


@allocating_kernel
def render_components(boxes, offsets, morphologies, wanted, kernel_fft, members, grown, grown_offsets, out):
    """Convolve the morphologies of some components with the kernels of the bands that are wanted, wanted (K, B).

    boxes (K, 4), offsets (K + 1,) and morphologies packed; kernel_fft (B, side, side // 2 + 1) from transform_kernels;
    members (n,) the components to render; grown (K, 4) and grown_offsets (K + 1,) the boxes to render them on, none
    wider than `side`. What a kernel has beyond wraps around: the caller sees to it that it is small. Writes the pixels
    for a spectrum of one into out (B, grown_offsets[-1]). Cost O(n B side^2 log side).
    """
    n_bands, side = kernel_fft.shape[:2]
    axes = np.arange(2)
    plane = np.empty((side, side), dtype=np.float32)
    transformed = np.empty((side, side // 2 + 1), dtype=np.complex64)
    product = np.empty((side, side // 2 + 1), dtype=np.complex64)
    for k in members:
        y0, x0, height, width = boxes[k, 0], boxes[k, 1], boxes[k, 2], boxes[k, 3]
        dy, dx = y0 - grown[k, 0], x0 - grown[k, 1]
        plane[:] = 0.0
        for y in range(height):
            for x in range(width):
                plane[dy + y, dx + x] = morphologies[offsets[k] + y * width + x]
        r2c(plane, transformed, axes, True, 1.0, 1)
        for b in range(n_bands):
            if not wanted[k, b]:
                continue
            multiply_into(product, transformed, kernel_fft[b])
            c2r(product, plane, axes, False, 1.0, 1)
            copy_above_rounding(out[b, grown_offsets[k] : grown_offsets[k + 1]], plane, grown[k, 2], grown[k, 3])
