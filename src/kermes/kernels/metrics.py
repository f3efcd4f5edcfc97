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
        y0, x0, height, width = boxes[s, 0], boxes[s, 1], boxes[s, 2], boxes[s, 3]
        for b in range(n_bands):
            for y in range(height):
                for x in range(width):
                    total[b, y0 + y, x0 + x] += models[b, offsets[s] + y * width + x]
    top = np.empty((len(boxes), n_bands))
    rest = np.empty((len(boxes), n_bands))
    share = np.empty((len(boxes), n_bands))
    blendedness = np.empty((len(boxes), n_bands))
    for s in range(len(boxes)):
        y0, x0, height, width = boxes[s, 0], boxes[s, 1], boxes[s, 2], boxes[s, 3]
        inside = np.zeros((height, width), dtype=np.uint8)
        for b in range(n_bands):
            for y in range(height):
                for x in range(width):
                    if models[b, offsets[s] + y * width + x] > 0:
                        inside[y, x] = 1
        for b in range(n_bands):
            largest, others, flux, self_product, product = 0.0, 0.0, 0.0, 0.0, 0.0
            for y in range(height):
                for x in range(width):
                    m = float(models[b, offsets[s] + y * width + x])
                    a = float(total[b, y0 + y, x0 + x])
                    flux += m
                    self_product += m * m
                    product += a * m
                    if inside[y, x] > 0:
                        largest = max(largest, a - m)
                        others += a - m
            top[s, b] = largest
            rest[s, b] = others
            share[s, b] = others / flux if flux > 0 else 0.0
            blendedness[s, b] = 1.0 - self_product / product if product > 0 else 0.0
    return top, rest, share, blendedness


@kernel
def observed_metrics(total, variance, valid, models, boxes, offsets, least):
    """Overlap of each source with all others as observed, in units of the noise.

    total, variance, valid (B, H, W), total the sum of the positive parts of all models A; models (B, n) on boxes (S, 4)
    of the same pixels. Over the valid pixels F where the model m of the source is above `least` sigma: the maximum of
    (A - m) / sigma, the sum of A - m over that of m, and 1 - sum(m m / V) / sum(A m / V); 0 where there are none.
    Returns three (S, B) float64. Cost O(B n).
    """
    n_bands = len(models)
    top, share, blendedness = (
        np.zeros((len(boxes), n_bands)),
        np.zeros((len(boxes), n_bands)),
        np.zeros((len(boxes), n_bands)),
    )
    for s in range(len(boxes)):
        y0, x0, height, width = boxes[s, 0], boxes[s, 1], boxes[s, 2], boxes[s, 3]
        for b in range(n_bands):
            largest, others, flux, self_product, product = 0.0, 0.0, 0.0, 0.0, 0.0
            for y in range(height):
                for x in range(width):
                    m = float(models[b, offsets[s] + y * width + x])
                    noise2 = float(variance[b, y0 + y, x0 + x])
                    if m > 0 and valid[b, y0 + y, x0 + x] and m * m > least * least * noise2:
                        rest = max(float(total[b, y0 + y, x0 + x]) - m, 0.0)
                        largest = max(largest, rest * rest / noise2)
                        others += rest
                        flux += m
                        self_product += m * m / noise2
                        product += (rest + m) * m / noise2
            if flux > 0:
                top[s, b] = np.sqrt(largest)
                share[s, b] = others / flux
                blendedness[s, b] = 1.0 - self_product / product
    return top, share, blendedness


@kernel
def mean_chi2(residual, weights, boxes):
    """Mean of weight * residual^2 over the used pixels of each box (S, 4), all bands together; NaN if there are none.

    residual, weights (B, H, W).
    """
    out = np.empty(len(boxes))
    for s in range(len(boxes)):
        y0, x0, height, width = boxes[s, 0], boxes[s, 1], boxes[s, 2], boxes[s, 3]
        total, count = 0.0, 0
        for b in range(len(residual)):
            for y in range(y0, y0 + height):
                for x in range(x0, x0 + width):
                    if weights[b, y, x] > 0:
                        total += weights[b, y, x] * residual[b, y, x] * residual[b, y, x]
                        count += 1
        out[s] = total / count if count > 0 else np.nan
    return out
