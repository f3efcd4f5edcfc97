"""Whole sources from their rendered components, and the observed pixels shared among them."""

import numpy as np

from kermes.kernels.decorator import allocating_kernel, fast_kernel, kernel


@allocating_kernel
def source_boxes(boxes, sources, n_sources):
    """Join the boxes (K, 4) of the components of each source. Returns boxes (S, 4) and offsets (S + 1,)."""
    joined = np.empty((n_sources, 4), dtype=np.int64)
    for s in range(n_sources):
        for side in range(4):
            joined[s, side] = 0
    offsets = np.empty(n_sources + 1, dtype=np.int64)
    offsets[0] = 0
    for k in range(len(boxes)):
        s = sources[k]
        if boxes[k, 2] == 0 or boxes[k, 3] == 0:
            continue
        if joined[s, 2] == 0:
            for side in range(4):
                joined[s, side] = boxes[k, side]
            continue
        y0, x0 = min(joined[s, 0], boxes[k, 0]), min(joined[s, 1], boxes[k, 1])
        y1 = max(joined[s, 0] + joined[s, 2], boxes[k, 0] + boxes[k, 2])
        x1 = max(joined[s, 1] + joined[s, 3], boxes[k, 1] + boxes[k, 3])
        joined[s, 0], joined[s, 1], joined[s, 2], joined[s, 3] = y0, x0, y1 - y0, x1 - x0
    for s in range(n_sources):
        offsets[s + 1] = offsets[s] + joined[s, 2] * joined[s, 3]
    return joined, offsets


@kernel
def add_scaled(out, values, scale):
    """out += scale * values."""
    for i in range(len(out)):
        out[i] += scale * values[i]


@kernel
def add_components(pixels, boxes, offsets, sources, spectra, joined, joined_offsets, out):
    """Add what `combine_components` returns to `out`."""
    n_bands = spectra.shape[1]
    for k in range(len(boxes)):
        s = sources[k]
        y0, x0, height, width = boxes[k, 0], boxes[k, 1], boxes[k, 2], boxes[k, 3]
        for b in range(n_bands):
            for y in range(height):
                start = joined_offsets[s] + (y0 + y - joined[s, 0]) * joined[s, 3] + x0 - joined[s, 1]
                source = offsets[k] + y * width
                add_scaled(
                    out[b, start : start + width],
                    pixels[min(b, len(pixels) - 1), source : source + width],
                    spectra[k, b],
                )


@allocating_kernel
def combine_components(pixels, boxes, offsets, sources, spectra, joined, joined_offsets):
    """Add up the components of each source: pixels (B, n) times spectra (K, B), on the joined boxes.

    pixels (1, n) serves all bands. Returns (B, joined_offsets[-1]) float32.
    """
    out = np.zeros((spectra.shape[1], joined_offsets[-1]), dtype=np.float32)
    add_components(pixels, boxes, offsets, sources, spectra, joined, joined_offsets, out)
    return out


@kernel
def add_positive(row, model):
    """Add the positive part of a model to a row."""
    for x in range(len(row)):
        row[x] += max(model[x], np.float32(0.0))


@kernel
def add_positive_models(total, models, boxes, offsets):
    """Add the positive parts of all packed models (B, n) to the image `total` (B, H, W)."""
    for s in range(len(boxes)):
        y0, x0, height, width = boxes[s, 0], boxes[s, 1], boxes[s, 2], boxes[s, 3]
        for b in range(len(total)):
            for y in range(height):
                start = offsets[s] + y * width
                add_positive(total[b, y0 + y, x0 : x0 + width], models[b, start : start + width])


@fast_kernel
def share_row(image, variance, valid, total, model, least):
    """Sums over one row of I r, V r^2 and I r (1 - r), r the share max(model, 0) / total, above least sigma."""
    flux, noise2, contested = np.float32(0.0), np.float32(0.0), np.float32(0.0)
    for x in range(len(model)):
        # A variance that is not known limits nothing.
        if valid[x] and model[x] > 0 and not total[x] * total[x] <= least * least * variance[x]:
            ratio = model[x] / total[x]
            flux += image[x] * ratio
            noise2 += variance[x] * ratio * ratio
            contested += image[x] * ratio * (np.float32(1.0) - ratio)
    return flux, noise2, contested


@kernel
def fill_shares(images, variance, valid, total, models, boxes, offsets, least, flux, noise2, contested):
    """Fill the sums of `share_fluxes`."""
    n_bands = len(images)
    for s in range(len(boxes)):
        y0, x0, height, width = boxes[s, 0], boxes[s, 1], boxes[s, 2], boxes[s, 3]
        for b in range(n_bands):
            total_flux, total_noise2, total_contested = 0.0, 0.0, 0.0
            for y in range(height):
                start = offsets[s] + y * width
                part, part2, part3 = share_row(
                    images[b, y0 + y, x0 : x0 + width],
                    variance[b, y0 + y, x0 : x0 + width],
                    valid[b, y0 + y, x0 : x0 + width],
                    total[b, y0 + y, x0 : x0 + width],
                    models[b, start : start + width],
                    least,
                )
                total_flux += part
                total_noise2 += part2
                total_contested += part3
            flux[s, b] = total_flux
            noise2[s, b] = total_noise2
            contested[s, b] = total_contested


@allocating_kernel
def share_fluxes(images, variance, valid, total, models, boxes, offsets, least):
    """Sum what each packed model gets of the observed pixels, its variance, and the part of it that is contested.

    images, variance, valid, total (B, H, W) and models (B, n) on boxes (S, 4) of the same pixels; nothing is shared
    where the total is not above `least` sigma. What is contested is the sum of I r (1 - r), r the share: by how much
    the flux changes if all of the model does, relative to that. Returns three (S, B) float64.
    """
    n_bands = len(images)
    flux = np.empty((len(boxes), n_bands))
    noise2 = np.empty((len(boxes), n_bands))
    contested = np.empty((len(boxes), n_bands))
    fill_shares(images, variance, valid, total, models, boxes, offsets, np.float32(least), flux, noise2, contested)
    return flux, noise2, contested


@allocating_kernel
def project_models(images, models, boxes, offsets):
    """Sum images (B, H, W) times each packed model (B, n) on boxes (S, 4). Returns (S, B) float64."""
    out = np.zeros((len(boxes), len(images)))
    for s in range(len(boxes)):
        y0, x0, height, width = boxes[s, 0], boxes[s, 1], boxes[s, 2], boxes[s, 3]
        for b in range(len(images)):
            for y in range(height):
                total = np.float32(0.0)
                for x in range(width):
                    total += images[b, y0 + y, x0 + x] * models[b, offsets[s] + y * width + x]
                out[s, b] += total
    return out


@kernel
def add_models(image, models, boxes, offsets, factor):
    """Add all packed models (B, n), times a factor, to an image (B, H, W), in place."""
    for s in range(len(boxes)):
        y0, x0, height, width = boxes[s, 0], boxes[s, 1], boxes[s, 2], boxes[s, 3]
        for b in range(len(image)):
            for y in range(height):
                start = offsets[s] + y * width
                add_scaled(image[b, y0 + y, x0 : x0 + width], models[b, start : start + width], np.float32(factor))
