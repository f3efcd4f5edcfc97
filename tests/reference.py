"""Slow twins: the same mathematics as the compiled kernels, written to be obviously right, in double precision."""

import numpy as np
import scipy.signal


def convolve(image, kernels):
    """Convolve each band of (B, H, W) directly; zero outside."""
    return np.array([scipy.signal.convolve(band, kernel, mode="same", method="direct") for band, kernel in zip(image, kernels, strict=True)])


def correlate(image, kernels):
    """Adjoint of convolve."""
    return convolve(image, kernels[:, ::-1, ::-1])


def make_monotonic(morphology, cy, cx):
    """Weighted monotonicity, pixel by pixel in order of radius."""
    h, w = morphology.shape
    out = np.array(morphology, dtype=float)
    pixels = sorted(((y - cy) ** 2 + (x - cx) ** 2, y, x) for y in range(h) for x in range(w))

    def angle(y, x):
        return 0.0 if (y, x) == (cy, cx) else np.arctan2(y - cy, x - cx)

    for radius2, y, x in pixels[1:]:
        weights, values = [], []
        for ny in (y - 1, y, y + 1):
            for nx in (x - 1, x, x + 1):
                if (ny - cy) ** 2 + (nx - cx) ** 2 < radius2:
                    weights.append(abs(np.cos(angle(y, x) - angle(ny, nx))))
                    values.append(out[ny, nx] if 0 <= ny < h and 0 <= nx < w else 0.0)
        out[y, x] = min(out[y, x], np.average(values, weights=weights))
    return out


def project_morphology(morphology, cy, cx, spectrum, noise, background_threshold):
    """Project one morphology as scarlet lite does: monotonic, above the background, centre positive, peak 1."""
    h, w = morphology.shape
    _, by, bx = max(
        (morphology[y, x], y == cy and x == cx, (y, x))
        for y in range(max(cy - 1, 0), min(cy + 2, h))
        for x in range(max(cx - 1, 0), min(cx + 2, w))
    )[0], *max(
        ((morphology[y, x], y == cy and x == cx, y, x)
        for y in range(max(cy - 1, 0), min(cy + 2, h))
        for x in range(max(cx - 1, 0), min(cx + 2, w)))
    )[2:]
    out = make_monotonic(morphology, by, bx)
    faint = np.all(spectrum[:, None, None] * out < background_threshold * noise[:, None, None], axis=0)
    out[faint | (out < 0)] = 0.0
    out[cy, cx] = max(out[cy, cx], 1e-20)
    return out / out.max()


def fit(images, weights, kernels, noise, boxes, centers, morphologies, spectra, n_iterations, background_threshold):
    """AdaProx with AMSGrad, boxes fixed; returns losses before each step, morphologies, spectra."""
    spectra = [np.array(s, dtype=float) for s in spectra]
    morphologies = [np.array(m, dtype=float) for m in morphologies]
    moments = [[[np.zeros_like(x) for _ in range(3)] for x in (s, m)] for s, m in zip(spectra, morphologies, strict=True)]
    losses = []

    def step(x, g, state, alpha):
        state[0] = 0.1 * g + 0.9 * state[0]
        state[1] = 0.001 * g**2 + 0.999 * state[1]
        state[2] = np.maximum(state[2], state[1])
        return x - alpha * state[0] / np.sqrt(np.maximum(state[2], 1e-8))

    for iteration in range(n_iterations):
        model = np.zeros_like(images, dtype=float)
        for (y0, x0, h, w), s, m in zip(boxes, spectra, morphologies, strict=True):
            model[:, y0 : y0 + h, x0 : x0 + w] += s[:, None, None] * m
        residual = convolve(model, kernels) - images
        losses.append(0.5 * np.sum(weights * residual**2))
        gradient = correlate(weights * residual, kernels)
        scale = 0.1 if iteration == 0 else 1.0
        for k, ((y0, x0, h, w), (cy, cx)) in enumerate(zip(boxes, centers, strict=True)):
            part = gradient[:, y0 : y0 + h, x0 : x0 + w]
            for_spectrum = np.einsum("bhw,hw->b", part, morphologies[k])
            for_morphology = np.einsum("bhw,b->hw", part, spectra[k])
            alpha = scale * np.maximum(0.1 * noise, 0.01 * spectra[k].mean())
            spectra[k] = np.maximum(step(spectra[k], for_spectrum, moments[k][0], alpha), 1e-20)
            moved = step(morphologies[k], for_morphology, moments[k][1], scale * 0.01)
            morphologies[k] = project_morphology(moved, cy - y0, cx - x0, spectra[k], noise, background_threshold)
    return losses, morphologies, spectra
