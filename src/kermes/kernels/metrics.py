"""Blending metrics and the goodness of fit of whole sources."""

import numpy as np

from kermes.kernels.decorator import kernel


@kernel
def blend_metrics(models, boxes, offsets, shape):
    """Overlap of each source with all others, in the frame of its packed models (B, n) on boxes (S, 4).

    With m the model of the source, A the sum of all models and F the pixels where m > 0 in any band: the maximum and
    the sum over F of A - m, that sum over the flux of m (0 when it has none), and the blendedness
    1 - (m . m) / (A . m) (0 when it has none). Returns four (S, B) float64. Cost O(B n).
    """
    n_bands = len(models)
    h, w = shape
    total = np.zeros((n_bands, h, w), dtype=np.float32)
    for s in range(len(boxes)):
        y0, x0, height, width = boxes[s]
        for b in range(n_bands):
            for y in range(height):
                for x in range(width):
                    total[b, y0 + y, x0 + x] += models[b, offsets[s] + y * width + x]
    out = np.zeros((4, len(boxes), n_bands))
    for s in range(len(boxes)):
        y0, x0, height, width = boxes[s]
        inside = np.zeros((height, width), dtype=np.bool_)
        for b in range(n_bands):
            for y in range(height):
                for x in range(width):
                    if models[b, offsets[s] + y * width + x] > 0:
                        inside[y, x] = True
        for b in range(n_bands):
            largest, others, flux, self_product, product = 0.0, 0.0, 0.0, 0.0, 0.0
            for y in range(height):
                for x in range(width):
                    if inside[y, x]:
                        m = float(models[b, offsets[s] + y * width + x])
                        a = float(total[b, y0 + y, x0 + x])
                        largest = max(largest, a - m)
                        others += a - m
                        flux += m
                        self_product += m * m
                        product += a * m
            out[0, s, b] = largest
            out[1, s, b] = others
            out[2, s, b] = others / flux if flux > 0 else 0.0
            out[3, s, b] = 1.0 - self_product / product if product > 0 else 0.0
    return out[0], out[1], out[2], out[3]


@kernel
def mean_chi2(residual, weights, boxes):
    """Mean of weight * residual^2 over the used pixels of each box (S, 4), all bands together; NaN if there are none.

    residual, weights (B, H, W).
    """
    out = np.full(len(boxes), np.nan)
    for s in range(len(boxes)):
        y0, x0, height, width = boxes[s]
        total, count = 0.0, 0
        for b in range(len(residual)):
            for y in range(y0, y0 + height):
                for x in range(x0, x0 + width):
                    if weights[b, y, x] > 0:
                        total += weights[b, y, x] * residual[b, y, x] * residual[b, y, x]
                        count += 1
        if count > 0:
            out[s] = total / count
    return out
