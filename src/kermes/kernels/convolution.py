"""Convolution of padded planes by FFT."""

import numpy as np
from rocket_fft import c2r, r2c

from kermes.kernels.decorator import allocating_kernel, kernel


@kernel
def add_values(out, row):
    """Add a row to the first pixels of another that is as long or longer."""
    for x in range(len(row)):
        out[x] += row[x]


@kernel
def add_wrapped(plane, stamp):
    """Add a stamp (P, Q), odd sides, to a plane, its centre at pixel (0, 0); what does not fit wraps onto itself."""
    height, width = plane.shape
    p, q = stamp.shape
    for i in range(p):
        row = plane[(i - p // 2) % height]
        first = 0
        while first < q:
            x = (first - q // 2) % width
            last = min(first + width - x, q)
            add_values(row[x:], stamp[i, first:last])
            first = last


@allocating_kernel
def transform_kernels(stamps, height, width):
    """Transform convolution kernels (B, P, Q), odd sides, to the padded size (height, width).

    Returns (B, height, width // 2 + 1) complex64, with the 1 / (height width) of the inverse transform
    folded in. The centre of a stamp goes to pixel (0, 0).
    """
    n_bands = len(stamps)
    out = np.empty((n_bands, height, width // 2 + 1), dtype=np.complex64)
    plane = np.empty((height, width), dtype=np.float32)
    axes = np.arange(2)
    scale = 1.0 / (height * width)
    for b in range(n_bands):
        plane[:] = 0.0
        add_wrapped(plane, stamps[b])
        r2c(plane, out[b], axes, True, scale, 1)
    return out


@kernel
def multiply_into(out, transformed, kernel_fft):
    """out = transformed * kernel_fft, element by element."""
    for y in range(out.shape[0]):
        for x in range(out.shape[1]):
            out[y, x] = transformed[y, x] * kernel_fft[y, x]


@kernel
def multiply_conjugate_into(out, transformed, kernel_fft):
    """out = transformed * conj(kernel_fft), element by element."""
    for y in range(out.shape[0]):
        for x in range(out.shape[1]):
            out[y, x] = transformed[y, x] * np.conj(kernel_fft[y, x])


@kernel
def convolve_plane(plane, transformed, kernel_fft, adjoint, axes):
    """Convolve one padded plane in place, or apply the adjoint (correlation with the kernel).

    plane (h, w) float32, transformed (h, w // 2 + 1) complex64 work space, kernel_fft from
    transform_kernels. Cost O(h w log(h w)).
    """
    r2c(plane, transformed, axes, True, 1.0, 1)
    if adjoint:
        multiply_conjugate_into(transformed, transformed, kernel_fft)
    else:
        multiply_into(transformed, transformed, kernel_fft)
    c2r(transformed, plane, axes, False, 1.0, 1)


@kernel
def pad_plane(plane, image):
    """Copy an image into the first pixels of a plane; zero in the padding."""
    h, w = image.shape
    for y in range(plane.shape[0]):
        for x in range(plane.shape[1]):
            plane[y, x] = image[y, x] if y < h and x < w else np.float32(0.0)


@kernel
def copy_plane(out, plane):
    """Copy the first pixels of a plane, as many as `out` has."""
    for y in range(out.shape[0]):
        for x in range(out.shape[1]):
            out[y, x] = plane[y, x]


@allocating_kernel
def convolve_bands(images, kernel_fft, width, adjoint):
    """Convolve every band of (B, H, W); what lies outside is zero. Returns (B, H, W) float32.

    kernel_fft (B, height, width // 2 + 1): the padding of `height`, `width` must hold half a kernel.
    """
    n_bands, h, w = images.shape
    height = kernel_fft.shape[1]
    out = np.empty((n_bands, h, w), dtype=np.float32)
    plane = np.empty((height, width), dtype=np.float32)
    transformed = np.empty((height, width // 2 + 1), dtype=np.complex64)
    axes = np.arange(2)
    for b in range(n_bands):
        pad_plane(plane, images[b])
        convolve_plane(plane, transformed, kernel_fft[b], adjoint, axes)
        copy_plane(out[b], plane)
    return out
