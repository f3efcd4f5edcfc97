"""Planes of image, model and residual as a picture shows them, from near and from afar."""

import numpy as np

from kermes.kernels.decorator import fast_kernel

IMAGE, MODEL, RESIDUAL = 0, 1, 2


@fast_kernel
def bin_planes(layer, images, variance, valid, left, decoded, noise, corner, factor, out):
    """Fill out (B, h, w) with squares of factor x factor pixels of a layer, in units of the noise.

    images, variance, valid (B, H, W); left (B, H, W) holds numbers of entries of `decoded`, the residual in sigma of
    each pixel, and its rows are those of the picture, the last row of the image first; noise (B,); corner (y, x) is the
    first pixel in the picture. Where a pixel is invalid, an image of zero with the typical noise stands for it: images
    and variance are not used there.

    IMAGE: mean of the valid pixels. MODEL: mean of all pixels of the image less what is left. RESIDUAL: sum over the
    root of the number of the valid ones, so that noise keeps a width of one. NaN where there is none. Cost O(B h w
    factor^2).
    """
    n_bands, height, width = out.shape
    rows, columns = left.shape[1], left.shape[2]
    total = np.empty(width, dtype=np.float32)
    n = np.empty(width, dtype=np.float32)
    one, zero = np.float32(1), np.float32(0)
    for b in range(n_bands):
        for y in range(height):
            for x in range(width):
                total[x] = n[x] = zero
            first = corner[0] + y * factor
            for r in range(first, min(first + factor, rows)):
                row = rows - 1 - r
                # All squares at once, a column of each after the other, so that the loops over x vectorise.
                for k in range(corner[1], corner[1] + factor):
                    end = min(width, (columns - k + factor - 1) // factor)
                    if layer == IMAGE:
                        for x in range(end):
                            c = k + x * factor
                            good = valid[b, row, c]
                            total[x] += images[b, row, c] if good else zero
                            n[x] += one if good else zero
                    elif layer == MODEL:
                        for x in range(end):
                            c = k + x * factor
                            good = valid[b, row, c]
                            sigma = np.sqrt(variance[b, row, c]) if good else noise[b]
                            image = images[b, row, c] if good else zero
                            total[x] += image - decoded[left[b, r, c]] * sigma
                            n[x] += one
                    else:
                        for x in range(end):
                            c = k + x * factor
                            good = valid[b, row, c]
                            total[x] += decoded[left[b, r, c]] if good else zero
                            n[x] += one if good else zero
            for x in range(width):
                if n[x] == zero:
                    out[b, y, x] = np.nan
                elif layer == RESIDUAL:
                    out[b, y, x] = total[x] / np.sqrt(n[x])
                else:
                    out[b, y, x] = total[x] / n[x] / noise[b]


@fast_kernel
def mix_channels(images, valid, noise, weights, out):
    """Fill out (3, H, W) with red, green and blue of images (B, H, W) in units of their noise (B,).

    weights (3, B), each row with a sum of one. A channel is the weighted mean of the bands that are valid (B, H, W) in
    a pixel; if it has none, the mean of the channels that have one; NaN where no band is valid. Cost O(B H W).
    """
    n_bands, height, width = images.shape
    covered = np.empty((3, width), dtype=np.float32)
    for y in range(height):
        for c in range(3):
            for x in range(width):
                out[c, y, x] = covered[c, x] = np.float32(0)
        for b in range(n_bands):
            scale = np.float32(1.0 / noise[b])
            for c in range(3):
                weight = np.float32(weights[c, b])
                if weight > 0:
                    for x in range(width):
                        good = valid[b, y, x]
                        out[c, y, x] += images[b, y, x] * scale * weight if good else np.float32(0)
                        covered[c, x] += weight if good else np.float32(0)
        for x in range(width):
            total, n = np.float32(0), 0
            for c in range(3):
                if covered[c, x] > 0:
                    out[c, y, x] /= covered[c, x]
                    total += out[c, y, x]
                    n += 1
            if n < 3:
                for c in range(3):
                    if covered[c, x] <= 0:
                        out[c, y, x] = total / np.float32(n) if n > 0 else np.nan


@fast_kernel
def stretch(channels, gains, black, softening, white, unknown, out):
    """Fill out (H, W, 3) with colours (Lupton et al. 2004, eq. 1 and 2) of channels (3, H, W).

    Brightness, the mean of the channels times their gains (3,), less `black`, goes through asinh(. / softening), so
    that `white` becomes 1; ratios of channels are kept, and a pixel with a channel above 1 is scaled down. Pixels that
    are NaN become `unknown`. Cost O(H W).
    """
    height, width = channels.shape[1], channels.shape[2]
    full = 1.0 / np.arcsinh((white - black) / softening)
    for y in range(height):
        for x in range(width):
            red = channels[0, y, x] * gains[0] - black
            green = channels[1, y, x] * gains[1] - black
            blue = channels[2, y, x] * gains[2] - black
            if np.isnan(red + green + blue):
                out[y, x, 0] = out[y, x, 1] = out[y, x, 2] = unknown
            else:
                brightness = max((red + green + blue) / 3, 1e-6)
                factor = np.arcsinh(brightness / softening) * full / brightness
                red, green, blue = max(red * factor, 0.0), max(green * factor, 0.0), max(blue * factor, 0.0)
                most = 255.0 / max(red, green, blue, 1.0)
                out[y, x, 0], out[y, x, 1], out[y, x, 2] = (
                    np.rint(red * most),
                    np.rint(green * most),
                    np.rint(blue * most),
                )
