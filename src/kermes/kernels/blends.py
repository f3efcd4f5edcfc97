"""The pixels of blends."""

import numpy as np

from kermes.kernels.decorator import fast_kernel, kernel


@kernel
def copy_row(image, variance, valid, out, out_variance):
    """Copy a row, with the variance of its valid pixels and zero for that of the others."""
    for x in range(len(image)):
        out[x] = image[x]
        out_variance[x] = variance[x] if valid[x] else np.float32(0.0)


@fast_kernel
def total_noise(variance):
    """Sum of the standard deviation over the pixels of a row that have a variance, and their number."""
    total, n_valid = 0.0, 0
    for x in range(len(variance)):
        total += np.float64(np.sqrt(variance[x]))
        n_valid += variance[x] > 0
    return total, n_valid


@kernel
def weigh_row(usable, image, weights):
    """Turn the variance of the used pixels of a row into weights, and set all others to zero.

    Returns whether there are any.
    """
    used = False
    for x in range(len(image)):
        take = usable[x] and weights[x] > 0
        used = used or take
        image[x] = image[x] if take else np.float32(0.0)
        weights[x] = np.float32(1.0) / weights[x] if take else np.float32(0.0)
    return used


@kernel
def cut_pixels(images, variance, valid, y0, x0, usable, has_psf, out, weights, noise):
    """Copy the pixels of a blend that are used, with their inverse variance, both zero elsewhere; measure the noise.

    images, variance, valid (B, H, W), of which the blend has the pixels from y0, x0 on; usable (h, w), has_psf (B,): a
    pixel is used where all say so. out, weights (B, h, w); noise (B,) takes the mean of the standard deviation of the
    valid pixels of a band, NaN if none is used.
    """
    n_bands, height, width = out.shape
    for b in range(n_bands):
        noise[b] = np.nan
        if not has_psf[b]:
            for y in range(height):
                for x in range(width):
                    out[b, y, x] = weights[b, y, x] = 0.0
            continue
        # All rows first: the memory that they come from is slow, and what is worked out on the way would wait for it.
        for y in range(height):
            row, first, last = y0 + y, x0, x0 + width
            copy_row(
                images[b, row, first:last],
                variance[b, row, first:last],
                valid[b, row, first:last],
                out[b, y],
                weights[b, y],
            )
        total, n_valid, used = 0.0, 0, False
        for y in range(height):
            part, n = total_noise(weights[b, y])
            total += part
            n_valid += n
            # Not the other way round: all rows are to be weighed.
            used = weigh_row(usable[y], out[b, y], weights[b, y]) or used
        if used:
            noise[b] = total / n_valid
