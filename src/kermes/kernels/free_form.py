"""Corrections of free shape: light of a few spectra seen through the PSFs, the adjoint, and conjugate gradients."""

import numpy as np
from rocket_fft import c2r, r2c

from kermes.kernels.convolution import copy_plane, multiply_conjugate_into, multiply_into, pad_plane
from kermes.kernels.decorator import fast_kernel, kernel


@kernel
def add_transform(out, transformed, factor):
    """Add a flat transform, times a factor."""
    for i in range(len(out)):
        out[i] += factor * transformed[i]


@fast_kernel
def inner_product(one, other):
    """Sum of products of two flat arrays; squares of bright pixels are too large for a float32."""
    total = 0.0
    for i in range(len(one)):
        total += np.float64(one[i]) * np.float64(other[i])
    return total


@kernel
def observe(light, spectra, psf_fft, out):
    """Images (B, h, w) of light (K, h, w) with the spectra (K, B), seen through the PSFs; what lies outside is zero.

    psf_fft (B, side, side // 2 + 1) from transform_kernels, on a side that holds what is followed of the PSFs beyond
    the images. One transform for each k and each band.
    """
    n_bands, side, half = psf_fft.shape
    plane = np.empty((side, side), dtype=np.float32)
    transformed = np.empty((len(light), side, half), dtype=np.complex64)
    seen = np.empty((side, half), dtype=np.complex64)
    axes = np.arange(2)
    for k in range(len(light)):
        pad_plane(plane, light[k])
        r2c(plane, transformed[k], axes, True, 1.0, 1)
    for b in range(n_bands):
        seen[:] = 0.0
        for k in range(len(light)):
            if spectra[k, b] != 0.0:
                add_transform(seen.reshape(-1), transformed[k].reshape(-1), spectra[k, b])
        multiply_into(seen, seen, psf_fft[b])
        c2r(seen, plane, axes, False, 1.0, 1)
        copy_plane(out[b], plane)


@kernel
def gather(images, spectra, psf_fft, out):
    """The adjoint of observe: images (B, h, w) correlated with the PSFs and summed with the spectra, (K, h, w)."""
    n_bands, side, half = psf_fft.shape
    plane = np.empty((side, side), dtype=np.float32)
    transformed = np.empty((side, half), dtype=np.complex64)
    total = np.empty((len(out), side, half), dtype=np.complex64)
    axes = np.arange(2)
    total[:] = 0.0
    for b in range(n_bands):
        pad_plane(plane, images[b])
        r2c(plane, transformed, axes, True, 1.0, 1)
        multiply_conjugate_into(transformed, transformed, psf_fft[b])
        for k in range(len(out)):
            if spectra[k, b] != 0.0:
                add_transform(total[k].reshape(-1), transformed.reshape(-1), spectra[k, b])
    for k in range(len(out)):
        c2r(total[k], plane, axes, False, 1.0, 1)
        copy_plane(out[k], plane)


@kernel
def descend(envelopes, spectra, weights, psf_fft, start, diagonal, enough, max_iterations):
    """Steps of conjugate gradients from a gradient `start` (K, h, w) until they promise not more than is enough.

    The matrix is one plus E S P' W P S E: envelopes (K, h, w), spectra (K, B), PSFs and weights (B, h, w); the diagonal
    (K, h, w) preconditions it, and holds pixels where it is infinite. Returns the fields (K, h, w).
    """
    fields = np.empty(start.shape, dtype=np.float32)
    light, curved = np.empty(start.shape, dtype=np.float32), np.empty(start.shape, dtype=np.float32)
    observed = np.empty(weights.shape, dtype=np.float32)
    envelope, scale, weight = envelopes.reshape(-1), diagonal.reshape(-1), weights.reshape(-1)
    field, lit, seen, curve = fields.reshape(-1), light.reshape(-1), observed.reshape(-1), curved.reshape(-1)
    n = len(field)
    gradient = start.copy().reshape(-1)
    step, direction = np.empty(n, dtype=np.float32), np.empty(n, dtype=np.float32)
    for i in range(n):
        field[i] = 0.0
        step[i] = gradient[i] / scale[i]
        direction[i] = step[i]
    gain = inner_product(gradient, step)
    for _ in range(max_iterations):
        if not gain > enough:
            break
        for i in range(n):
            lit[i] = envelope[i] * direction[i]
        observe(light, spectra, psf_fft, observed)
        for i in range(len(seen)):
            seen[i] *= weight[i]
        gather(observed, spectra, psf_fft, curved)
        for i in range(n):
            curve[i] = direction[i] + envelope[i] * curve[i]
        length = np.float32(gain / inner_product(direction, curve))
        for i in range(n):
            field[i] += length * direction[i]
            gradient[i] -= length * curve[i]
            step[i] = gradient[i] / scale[i]
        before = gain
        gain = inner_product(gradient, step)
        ratio = np.float32(gain / before)
        for i in range(n):
            direction[i] = step[i] + ratio * direction[i]
    return fields
