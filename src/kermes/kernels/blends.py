"""The pixels of blends."""

import numpy as np

from kermes.kernels.decorator import fast_kernel, kernel


@fast_kernel
def total_noise(variance, valid):
    """Sum of the standard deviation over the valid pixels of a row, and their number."""
    total, n_valid = 0.0, 0
    for x in range(len(variance)):
        total += np.float64(np.sqrt(variance[x])) if valid[x] else 0.0
        n_valid += valid[x]
    return total, n_valid


@kernel
def cut_row(image, variance, valid, usable, out, weights):
    """Copy the used pixels of a row with their inverse variance, both zero elsewhere; returns whether there are any."""
    used = False
    for x in range(len(image)):
        take = valid[x] and usable[x]
        used = used or take
        out[x] = image[x] if take else np.float32(0.0)
        weights[x] = np.float32(1.0) / variance[x] if take else np.float32(0.0)
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
        total, n_valid, used = 0.0, 0, False
        for y in range(height):
            if not has_psf[b]:
                for x in range(width):
                    out[b, y, x] = weights[b, y, x] = 0.0
                continue
            of_noise, is_valid = variance[b, y0 + y, x0 : x0 + width], valid[b, y0 + y, x0 : x0 + width]
            part, n = total_noise(of_noise, is_valid)
            total += part
            n_valid += n
            # Not the other way round: all rows are to be copied.
            row = images[b, y0 + y, x0 : x0 + width]
            used = cut_row(row, of_noise, is_valid, usable[y], out[b, y], weights[b, y]) or used
        noise[b] = total / n_valid if used else np.nan
