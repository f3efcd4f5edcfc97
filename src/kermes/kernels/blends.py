"""The pixels of blends."""

import numpy as np

from kermes.kernels.decorator import kernel


@kernel
def cut_pixels(images, variance, valid, usable, has_psf, out, weights, noise):
    """Copy the pixels of a blend that are used, with their inverse variance, both zero elsewhere; measure the noise.

    images, variance, valid (B, H, W); usable (H, W), has_psf (B,): a pixel is used where all say so. out, weights
    (B, H, W); noise (B,) takes the mean of the standard deviation of the valid pixels of a band, NaN if none is used.
    """
    n_bands, height, width = images.shape
    for b in range(n_bands):
        total, n_valid, used = 0.0, 0, False
        for y in range(height):
            for x in range(width):
                out[b, y, x] = weights[b, y, x] = 0.0
                if has_psf[b] and valid[b, y, x]:
                    total += np.sqrt(variance[b, y, x])
                    n_valid += 1
                    if usable[y, x]:
                        used = True
                        out[b, y, x] = images[b, y, x]
                        weights[b, y, x] = np.float32(1.0) / variance[b, y, x]
        noise[b] = total / n_valid if used else np.nan
