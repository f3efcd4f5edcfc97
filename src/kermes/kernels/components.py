"""Components packed into flat buffers: adding them to an image, their gradients, their boxes.

Components k = 0..K-1 have boxes[k] = (y0, x0, height, width) inside the blend (H, W) and their morphologies one
after the other, row by row, in one float32 buffer: component k lies at offsets[k]:offsets[k + 1].
"""

import numpy as np

from kermes.kernels.decorator import allocating_kernel, fast_kernel, kernel


@kernel
def add_component(plane, y0, x0, height, width, morphology, flux):
    """Add flux times one morphology (flat) to a plane that holds its box. Cost O(height width)."""
    for y in range(height):
        row = plane[y0 + y, x0 : x0 + width]
        shape = morphology[y * width : (y + 1) * width]
        for x in range(width):
            row[x] += flux * shape[x]


@fast_kernel
def add_gradient(plane, y0, x0, height, width, morphology, flux, gradient):
    """Back-propagate one band of the image gradient into one component.

    gradient (flat) += flux * plane; returns sum of plane * morphology over the box, rows summed in float32
    and their sums in float64.
    """
    total = 0.0
    for y in range(height):
        row = plane[y0 + y, x0 : x0 + width]
        shape = morphology[y * width : (y + 1) * width]
        out = gradient[y * width : (y + 1) * width]
        part = np.float32(0.0)
        for x in range(width):
            out[x] += flux * row[x]
            part += row[x] * shape[x]
        total += part
    return total


@kernel
def positive_bounds(morphology, height, width):
    """Return the bounds (y0, y1, x0, x1), half open, of the positive pixels; (0, 0, 0, 0) if there are none."""
    y0, y1, x0, x1 = height, 0, width, 0
    for y in range(height):
        row = morphology[y * width : (y + 1) * width]
        first = 0
        while first < width and not row[first] > 0:
            first += 1
        if first == width:
            continue
        last = width - 1
        while not row[last] > 0:
            last -= 1
        y0, y1 = min(y0, y), y + 1
        x0, x1 = min(x0, first), max(x1, last + 1)
    if y1 == 0:
        return 0, 0, 0, 0
    return y0, y1, x0, x1


@allocating_kernel
def repack(state, boxes, offsets, new_boxes, new_offsets):
    """Move flat buffers of component pixels (M, n) to other boxes; what was not covered becomes zero."""
    m_total, n = len(state), new_offsets[-1]
    out = np.empty((m_total, n), dtype=np.float32)
    for m in range(m_total):
        for i in range(n):
            out[m, i] = 0.0
    for k in range(len(boxes)):
        y0 = max(boxes[k, 0], new_boxes[k, 0])
        y1 = min(boxes[k, 0] + boxes[k, 2], new_boxes[k, 0] + new_boxes[k, 2])
        x0 = max(boxes[k, 1], new_boxes[k, 1])
        x1 = min(boxes[k, 1] + boxes[k, 3], new_boxes[k, 1] + new_boxes[k, 3])
        for y in range(y0, y1):
            source = offsets[k] + (y - boxes[k, 0]) * boxes[k, 3] - boxes[k, 1]
            target = new_offsets[k] + (y - new_boxes[k, 0]) * new_boxes[k, 3] - new_boxes[k, 1]
            for x in range(x0, x1):
                for m in range(m_total):
                    out[m, target + x] = state[m, source + x]
    return out
