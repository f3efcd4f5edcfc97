"""The fit of one blend with factorized components, in one call."""

import numpy as np
from rocket_fft import c2r, r2c

from kermes.kernels.components import add_component, add_gradient, positive_bounds, repack
from kermes.kernels.constraints import brightest_near, make_monotonic, make_symmetric
from kermes.kernels.convolution import multiply_conjugate_into, multiply_into
from kermes.kernels.decorator import allocating_kernel, fast_kernel, kernel

BETA_1 = np.float32(0.9)
BETA_2 = np.float32(0.999)
EPSILON = np.float32(1e-8)
FLOOR = np.float32(1e-20)


@fast_kernel
def weighted_residual(plane, image, weights):
    """Turn a rendered model into weights * (model - image), in place; zero in the padding.

    plane (height, width) with the model in its first (H, W) pixels. Returns the loss
    0.5 * sum(weights * (model - image)^2), rows summed in float32 and their sums in float64.
    """
    h, w = image.shape
    loss = 0.0
    for y in range(h):
        part = np.float32(0.0)
        for x in range(w):
            difference = plane[y, x] - image[y, x]
            weighted = weights[y, x] * difference
            part += weighted * difference
            plane[y, x] = weighted
        for x in range(w, plane.shape[1]):
            plane[y, x] = 0.0
        loss += part
    for y in range(h, plane.shape[0]):
        for x in range(plane.shape[1]):
            plane[y, x] = 0.0
    return 0.5 * loss


@kernel
def amsgrad(state, gradient, start, stop, step):
    """One AMSGrad step, in place, without bias correction (Reddi, Kale and Kumar 2018, algorithm 2).

    state (4, n): the values, the first and second moments of their gradient, and the largest second moment so far;
    gradient (n,); for the values start:stop.
    """
    values, first = state[0, start:stop], state[1, start:stop]
    second, largest = state[2, start:stop], state[3, start:stop]
    slope = gradient[start:stop]
    for i in range(len(values)):
        g = slope[i]
        m = (np.float32(1.0) - BETA_1) * g + BETA_1 * first[i]
        v = (np.float32(1.0) - BETA_2) * g * g + BETA_2 * second[i]
        top = max(largest[i], v)
        first[i] = m
        second[i] = v
        largest[i] = top
        values[i] -= step * m / np.sqrt(max(top, EPSILON))


@fast_kernel
def threshold(morphology, limit):
    """Set to zero what is below `limit`, negative or not finite, in place. Returns the largest value."""
    top = np.float32(0.0)
    for i in range(len(morphology)):
        value = morphology[i]
        if not (value >= limit and value > 0):
            value = np.float32(0.0)
        morphology[i] = value
        top = max(top, value)
    return top


@kernel
def project_morphology(morphology, height, width, cy, cx, limit, monotonic, symmetric, first_wins, weights):
    """Project one morphology (flat), in place, in the order of scarlet lite.

    Monotonic about the brightest pixel next to (cy, cx), symmetric about (cy, cx), above `limit`, positive at the
    centre, largest value 1.
    """
    shape = morphology.reshape((height, width))
    inside = 0 <= cy < height and 0 <= cx < width
    if monotonic and inside:
        by, bx = brightest_near(shape, cy, cx, first_wins)
        make_monotonic(shape, by, bx, weights)
    if symmetric and inside:
        make_symmetric(shape, cy, cx)
    top = threshold(morphology, limit)
    if inside and not shape[cy, cx] >= FLOOR:
        shape[cy, cx] = FLOOR
        top = max(top, FLOOR)
    if top > 0:
        scale = np.float32(1.0) / top
        for i in range(len(morphology)):
            morphology[i] *= scale


@kernel
def background_limit(spectrum, noise, background_threshold):
    """Value of a morphology below which it is fainter than the threshold [sigma] in every band."""
    limit = np.inf
    for b in range(len(spectrum)):
        limit = min(limit, background_threshold * noise[b] / spectrum[b])
    return np.float32(limit)


@allocating_kernel
def resized(morphologies, boxes, offsets, centers, pad, shape):
    """Choose a box for every component: its positive pixels and `pad` more, inside the blend.

    A component without light gets the pixels around its centre. Returns the new boxes and offsets.
    """
    h, w = shape
    new_boxes = np.empty((len(boxes), 4), dtype=np.int64)
    new_offsets = np.empty(len(boxes) + 1, dtype=np.int64)
    new_offsets[0] = 0
    for k in range(len(boxes)):
        height, width = boxes[k, 2], boxes[k, 3]
        y0, y1, x0, x1 = positive_bounds(morphologies[offsets[k] : offsets[k + 1]], height, width)
        if y1 == 0:
            y0 = min(max(centers[k, 0] - boxes[k, 0], 0), height - 1)
            x0 = min(max(centers[k, 1] - boxes[k, 1], 0), width - 1)
            y1, x1 = y0 + 1, x0 + 1
        top = max(boxes[k, 0] + y0 - pad, 0)
        left = max(boxes[k, 1] + x0 - pad, 0)
        new_boxes[k, 0] = top
        new_boxes[k, 1] = left
        new_boxes[k, 2] = min(boxes[k, 0] + y1 + pad, h) - top
        new_boxes[k, 3] = min(boxes[k, 1] + x1 + pad, w) - left
        new_offsets[k + 1] = new_offsets[k] + new_boxes[k, 2] * new_boxes[k, 3]
    return new_boxes, new_offsets


@kernel
def kernel_power(power, kernel_fft, scale):
    """Transform of the kernel's autocorrelation: power = scale * |kernel_fft|^2."""
    for y in range(kernel_fft.shape[0]):
        for x in range(kernel_fft.shape[1]):
            value = kernel_fft[y, x]
            power[y, x] = scale * (value.real * value.real + value.imag * value.imag)


@kernel
def extrapolate_gradient(transformed, reference, gradient, power):
    """transformed = gradient + power * (transformed - reference), in place, element by element."""
    for y in range(transformed.shape[0]):
        for x in range(transformed.shape[1]):
            transformed[y, x] = gradient[y, x] + power[y, x] * (transformed[y, x] - reference[y, x])


@allocating_kernel
def fit_components(
    images,
    weights,
    kernel_fft,
    padded_width,
    noise,
    boxes,
    offsets,
    centers,
    morphologies,
    spectra,
    monotonic_weights,
    max_iterations,
    exact_every,
    patience,
    tolerance,
    spectrum_step,
    morphology_step,
    background_threshold,
    resize_every,
    monotonic,
    symmetric,
    first_wins,
):
    """Fit spectra and morphologies of one blend by adaptive proximal gradient descent.

    AdaProx with the AMSGrad scheme (Melchior, Joseph and Moolekamp 2019, algorithm 1), all components at once, as in
    scarlet lite: spectra first, then morphologies, whose gradient uses the spectra before the step and whose
    projection those after it.

    Every `exact_every`-th iteration the model is compared with the pixels: four transforms per band, and the loss. In
    between the gradient is carried on as if the weight of a band were the same in all pixels,
    g = g_0 + w K^T K (m - m_0), which is exact where it is, and takes two transforms; the next comparison makes good
    what masks, edges and varying weights add. With 1 all are exact.

    images, weights (B, H, W) float32; kernel_fft (B, h, padded_width // 2 + 1) from transform_kernels; noise (B,);
    components packed as in kernels/components.py with centers (K, 2) in pixels of the blend and spectra (K, B).
    `boxes`, `offsets`, `morphologies`, `spectra` are not changed.

    Noise alone leaves a loss of half the number of used pixels. Converged means that over the last `patience`
    iterations (three times as many while the loss is more than 1.2 times that) the best loss fell by less than a
    fraction `tolerance` of itself, or of what noise leaves if that is more.

    Returns (boxes, offsets, morphologies, spectra, losses, n_iterations, converged): the best state seen, the loss at
    each comparison, and the number of steps taken.
    """
    n_bands, h, w = images.shape
    n_components = len(boxes)
    padded_height, half_width = kernel_fft.shape[1], padded_width // 2 + 1
    plane = np.empty((padded_height, padded_width), dtype=np.float32)
    transformed = np.empty((padded_height, half_width), dtype=np.complex64)
    axes = np.arange(2)
    # Model and gradient of the last comparison; when all are exact, of the last band only.
    n_kept = n_bands if exact_every > 1 else 1
    reference = np.empty((n_kept, padded_height, half_width), dtype=np.complex64)
    known = np.empty((n_kept, padded_height, half_width), dtype=np.complex64)
    power = np.empty((n_kept, padded_height, half_width), dtype=np.float32)
    n_pixels = 0
    for b in range(n_bands):
        total, count = 0.0, 0
        for y in range(h):
            for x in range(w):
                if weights[b, y, x] > 0:
                    total += weights[b, y, x]
                    count += 1
        n_pixels += count
        if exact_every > 1:
            mean_weight = np.float32(total / max(count, 1))
            kernel_power(power[b], kernel_fft[b], mean_weight * np.float32(padded_height * padded_width))

    # Values and what AMSGrad knows of their gradients.
    state = np.empty((4, len(morphologies)), dtype=np.float32)
    spectra_state = np.empty((4, n_components * n_bands), dtype=np.float32)
    for m in range(4):
        for i in range(len(morphologies)):
            state[m, i] = morphologies[i] if m == 0 else np.float32(0.0)
        for k in range(n_components):
            for b in range(n_bands):
                spectra_state[m, k * n_bands + b] = spectra[k, b] if m == 0 else np.float32(0.0)
    morphologies = state[0]
    spectra = spectra_state[0].reshape((n_components, n_bands))
    gradient = np.empty(len(morphologies), dtype=np.float32)
    spectra_gradient = np.empty(n_components * n_bands, dtype=np.float32)
    losses = np.empty(max_iterations // exact_every + 2)
    best_losses = np.empty(max_iterations // exact_every + 2)
    best_boxes, best_offsets = boxes, offsets
    best_morphologies, best_spectra = morphologies.copy(), spectra.copy()
    n_patience = max((patience + exact_every - 1) // exact_every, 1)
    n_exact = 0
    converged = False
    n_done = 0

    while True:
        # The last state is compared, too.
        exact = n_done % exact_every == 0 or n_done == max_iterations
        loss = 0.0
        gradient[:] = 0.0
        for b in range(n_bands):
            kept = min(b, n_kept - 1)
            plane[:] = 0.0
            for k in range(n_components):
                add_component(
                    plane,
                    boxes[k, 0],
                    boxes[k, 1],
                    boxes[k, 2],
                    boxes[k, 3],
                    morphologies[offsets[k] : offsets[k + 1]],
                    spectra[k, b],
                )
            r2c(plane, reference[kept] if exact else transformed, axes, True, 1.0, 1)
            if exact:
                multiply_into(transformed, reference[kept], kernel_fft[b])
                c2r(transformed, plane, axes, False, 1.0, 1)
                loss += weighted_residual(plane, images[b], weights[b])
                r2c(plane, transformed, axes, True, 1.0, 1)
                multiply_conjugate_into(known[kept], transformed, kernel_fft[b])
            else:
                extrapolate_gradient(transformed, reference[kept], known[kept], power[b])
            c2r(known[kept] if exact else transformed, plane, axes, False, 1.0, 1)
            for k in range(n_components):
                part = slice(offsets[k], offsets[k + 1])
                spectra_gradient[k * n_bands + b] = add_gradient(
                    plane,
                    boxes[k, 0],
                    boxes[k, 1],
                    boxes[k, 2],
                    boxes[k, 3],
                    morphologies[part],
                    spectra[k, b],
                    gradient[part],
                )
        if exact:
            losses[n_exact] = loss
            if n_exact == 0 or loss < best_losses[n_exact - 1]:
                best_losses[n_exact] = loss
                best_morphologies = morphologies.copy()
                best_spectra = spectra.copy()
                best_boxes, best_offsets = boxes, offsets
            else:
                best_losses[n_exact] = best_losses[n_exact - 1]
            n_exact += 1
            best = best_losses[n_exact - 1]
            # A model that is far from the noise often stands still for a while: it gets more time.
            wait = n_patience if best < 0.6 * n_pixels else 3 * n_patience
            if n_exact > wait:
                enough = tolerance * max(0.5 * n_pixels, best)
                # The first steps can lead uphill: a fit that was far above its best state is not at rest.
                worst = loss
                for i in range(n_exact - wait, n_exact):
                    worst = max(worst, losses[i])
                converged = best_losses[n_exact - 1 - wait] - best < enough and worst - best < 5.0 * enough
            if converged or n_done == max_iterations:
                break

        scale = np.float32(0.1) if n_done == 0 else np.float32(1.0)
        for k in range(n_components):
            mean = np.float32(0.0)
            for b in range(n_bands):
                mean += spectra[k, b] / np.float32(n_bands)
            for b in range(n_bands):
                step = max(noise[b] * np.float32(0.1), np.float32(spectrum_step) * mean)
                place = k * n_bands + b
                amsgrad(spectra_state, spectra_gradient, place, place + 1, scale * step)
                if not spectra[k, b] >= FLOOR:
                    spectra[k, b] = FLOOR
            amsgrad(state, gradient, offsets[k], offsets[k + 1], scale * np.float32(morphology_step))
            project_morphology(
                morphologies[offsets[k] : offsets[k + 1]],
                boxes[k, 2],
                boxes[k, 3],
                centers[k, 0] - boxes[k, 0],
                centers[k, 1] - boxes[k, 1],
                background_limit(spectra[k], noise, background_threshold),
                monotonic,
                symmetric,
                first_wins,
                monotonic_weights,
            )

        if resize_every > 0 and n_done > 0 and n_done % resize_every == 0:
            new_boxes, new_offsets = resized(morphologies, boxes, offsets, centers, 5, (h, w))
            state = repack(state, boxes, offsets, new_boxes, new_offsets)
            morphologies = state[0]
            gradient = np.empty(len(morphologies), dtype=np.float32)
            boxes, offsets = new_boxes, new_offsets
        n_done += 1
    return best_boxes, best_offsets, best_morphologies, best_spectra, losses[:n_exact], n_done, converged
