"""Blending metrics and the goodness of fit of whole sources."""

import numpy as np

from kermes.kernels.decorator import allocating_kernel, fast_kernel, kernel
from kermes.kernels.flux import add_models


@kernel
def mark_positive(inside, model):
    """Mark the pixels of a row where a model is positive."""
    for x in range(len(inside)):
        inside[x] = inside[x] or model[x] > 0


@fast_kernel
def compare_row(model, total, inside, largest):
    """Sums over a row of A - m inside, of m, m m and A m; largest takes the largest A - m inside so far, by pixel.

    One maximum for all pixels would keep the loop from being vectorised.
    """
    others, flux, self_product, product = 0.0, 0.0, 0.0, 0.0
    for x in range(len(model)):
        m, a = np.float64(model[x]), np.float64(total[x])
        rest = a - m if inside[x] else 0.0
        largest[x] = max(largest[x], rest)
        others += rest
        flux += m
        self_product += m * m
        product += a * m
    return others, flux, self_product, product


@kernel
def fill_metrics(models, boxes, offsets, total, largest, inside, top, rest, share, blendedness):
    """Fill what `blend_metrics` returns; largest (W,) and inside (H W,) are room to work in."""
    n_bands = len(models)
    for s in range(len(boxes)):
        y0, x0, height, width = boxes[s, 0], boxes[s, 1], boxes[s, 2], boxes[s, 3]
        here = inside[: height * width]
        for i in range(height * width):
            here[i] = False
        for b in range(n_bands):
            mark_positive(here, models[b, offsets[s] : offsets[s + 1]])
        for b in range(n_bands):
            for x in range(width):
                largest[x] = 0.0
            others, flux, self_product, product = 0.0, 0.0, 0.0, 0.0
            for y in range(height):
                start = offsets[s] + y * width
                of_row = compare_row(
                    models[b, start : start + width],
                    total[b, y0 + y, x0 : x0 + width],
                    here[y * width : (y + 1) * width],
                    largest[:width],
                )
                others += of_row[0]
                flux += of_row[1]
                self_product += of_row[2]
                product += of_row[3]
            top[s, b] = 0.0
            for x in range(width):
                top[s, b] = max(top[s, b], largest[x])
            rest[s, b] = others
            share[s, b] = others / flux if flux > 0 else 0.0
            blendedness[s, b] = 1.0 - self_product / product if product > 0 else 0.0


@allocating_kernel
def blend_metrics(models, boxes, offsets, shape):
    """Overlap of each source with all others, in the frame of its packed models (B, n) on boxes (S, 4).

    With m the model of the source, A the sum of all models and F the pixels where m > 0 in any band: the maximum and
    the sum over F of A - m, that sum over the flux of m (0 when it has none), and the blendedness
    1 - (m . m) / (A . m) (0 when it has none). Returns four (S, B) float64. Cost O(B n).
    """
    n_bands = len(models)
    h, w = shape
    total = np.zeros((n_bands, h, w), dtype=np.float32)
    add_models(total, models, boxes, offsets, 1.0)
    top = np.empty((len(boxes), n_bands))
    rest = np.empty((len(boxes), n_bands))
    share = np.empty((len(boxes), n_bands))
    blendedness = np.empty((len(boxes), n_bands))
    fill_metrics(
        models, boxes, offsets, total, np.empty(w), np.empty(h * w, dtype=np.bool_), top, rest, share, blendedness
    )
    return top, rest, share, blendedness


@fast_kernel
def compare_observed_row(model, total, variance, valid, least, largest):
    """Sums over the pixels of a row where m is above `least` sigma of A - m, m, m m / V and A m / V.

    largest takes the largest (A - m)^2 / V there so far, pixel by pixel.
    """
    others, flux, self_product, product = 0.0, 0.0, 0.0, 0.0
    for x in range(len(model)):
        m, noise2 = np.float64(model[x]), np.float64(variance[x])
        if m > 0 and valid[x] and m * m > least * least * noise2:
            rest = max(np.float64(total[x]) - m, 0.0)
            largest[x] = max(largest[x], rest * rest / noise2)
            others += rest
            flux += m
            self_product += m * m / noise2
            product += (rest + m) * m / noise2
    return others, flux, self_product, product


@kernel
def fill_observed_metrics(
    total, variance, valid, models, boxes, offsets, least, row_of_largest, top, share, blendedness
):
    """Fill what `observed_metrics` returns, zero before; row_of_largest (W,) is room to work in."""
    n_bands = len(models)
    for s in range(len(boxes)):
        y0, x0, height, width = boxes[s, 0], boxes[s, 1], boxes[s, 2], boxes[s, 3]
        for b in range(n_bands):
            for x in range(width):
                row_of_largest[x] = 0.0
            others, flux, self_product, product = 0.0, 0.0, 0.0, 0.0
            for y in range(height):
                start = offsets[s] + y * width
                of_row = compare_observed_row(
                    models[b, start : start + width],
                    total[b, y0 + y, x0 : x0 + width],
                    variance[b, y0 + y, x0 : x0 + width],
                    valid[b, y0 + y, x0 : x0 + width],
                    least,
                    row_of_largest[:width],
                )
                others += of_row[0]
                flux += of_row[1]
                self_product += of_row[2]
                product += of_row[3]
            largest = 0.0
            for x in range(width):
                largest = max(largest, row_of_largest[x])
            if flux > 0:
                top[s, b] = np.sqrt(largest)
                share[s, b] = others / flux
                blendedness[s, b] = 1.0 - self_product / product


@allocating_kernel
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
    room = np.empty(total.shape[2])
    fill_observed_metrics(total, variance, valid, models, boxes, offsets, least, room, top, share, blendedness)
    return top, share, blendedness


@fast_kernel
def weighted_squares(residual, weights):
    """Sum of weight * residual^2 over a row, and the number of pixels with weight."""
    total, count = 0.0, 0
    for x in range(len(residual)):
        used = weights[x] > 0
        total += np.float64(weights[x] * residual[x] * residual[x]) if used else 0.0
        count += used
    return total, count


@kernel
def fill_chi2(residual, weights, boxes, out):
    """Fill what `mean_chi2` returns."""
    for s in range(len(boxes)):
        y0, x0, height, width = boxes[s, 0], boxes[s, 1], boxes[s, 2], boxes[s, 3]
        total, count = 0.0, 0
        for b in range(len(residual)):
            for y in range(y0, y0 + height):
                part, used = weighted_squares(residual[b, y, x0 : x0 + width], weights[b, y, x0 : x0 + width])
                total += part
                count += used
        out[s] = total / count if count > 0 else np.nan


@allocating_kernel
def mean_chi2(residual, weights, boxes):
    """Mean of weight * residual^2 over the used pixels of each box (S, 4), all bands together; NaN if there are none.

    residual, weights (B, H, W).
    """
    out = np.empty(len(boxes))
    fill_chi2(residual, weights, boxes, out)
    return out
