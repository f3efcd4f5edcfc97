"""Planes of image, model and residual as a picture shows them, from near and from afar."""

import numpy as np

from kermes.kernels.decorator import allocating_kernel, kernel

IMAGE, MODEL, RESIDUAL = 0, 1, 2


@allocating_kernel
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


@allocating_kernel
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


@kernel
def stretch(channels, gains, black, softening, white, unknown, out):
    """Fill out (H, W, 3) with colours (Lupton et al. 2004, eq. 1 and 2) of channels (3, H, W).

    Brightness, the mean of the channels times their gains (3,), less `black`, goes through asinh(. / softening), so
    that `white` becomes 1; ratios of channels are kept, and a pixel with a channel above 1 is scaled down. Pixels that
    are NaN become `unknown`. Cost O(H W).
    """
    height, width = channels.shape[1], channels.shape[2]
    # In units of the softening, and 32 bits: eight of them are seen.
    unit = 1 / softening
    red_gain, green_gain = np.float32(gains[0] * unit), np.float32(gains[1] * unit)
    blue_gain = np.float32(gains[2] * unit)
    dark, full = np.float32(black * unit), np.float32(255 / np.arcsinh((white - black) * unit))
    zero, one, third, least = np.float32(0), np.float32(1), np.float32(1 / 3), np.float32(1e-6)
    most, half, small = np.float32(255), np.float32(0.5), np.float32(0.1)
    cubic, quintic = np.float32(1 / 6), np.float32(3 / 40)
    brightest = np.float32(1e18)  # whose square has 32 bits
    for y in range(height):
        for x in range(width):
            red = min(channels[0, y, x] * red_gain - dark, brightest)
            green = min(channels[1, y, x] * green_gain - dark, brightest)
            blue = min(channels[2, y, x] * blue_gain - dark, brightest)
            total = red + green + blue
            if total != total:
                out[y, x, 0] = out[y, x, 1] = out[y, x, 2] = unknown
                continue
            brightness = max(total * third, least)
            square = brightness * brightness
            if brightness < small:  # where the logarithm is not exact enough
                factor = full * (one - square * (cubic - quintic * square))
            else:
                factor = full * np.log(brightness + np.sqrt(square + one)) / brightness
            red, green, blue = max(red * factor, zero), max(green * factor, zero), max(blue * factor, zero)
            down = most / max(max(red, green), max(blue, most))
            out[y, x, 0] = np.uint8(red * down + half)
            out[y, x, 1] = np.uint8(green * down + half)
            out[y, x, 2] = np.uint8(blue * down + half)


@allocating_kernel
def paint_residual(planes, deepest, colours, unknown, out):
    """Fill out (H, W, 3) with colours (256, 3) of residuals (B, H, W) in sigma, all bands together.

    The sum of what is not NaN over the root of its number has the first colour at -`deepest`, the last at `deepest`;
    `unknown` where all are NaN. Cost O(B H W).
    """
    n_bands, height, width = planes.shape
    total = np.empty(width, dtype=np.float32)
    n = np.empty(width, dtype=np.float32)
    zero, one, last = np.float32(0), np.float32(1), np.float32(255)
    slope, middle = np.float32(127.5 / deepest), np.float32(128)  # 127.5, and a half to be rounded
    for y in range(height):
        for x in range(width):
            total[x] = n[x] = zero
        for b in range(n_bands):
            for x in range(width):
                known = planes[b, y, x] == planes[b, y, x]
                total[x] += planes[b, y, x] if known else zero
                n[x] += one if known else zero
        for x in range(width):
            place = total[x] / np.sqrt(max(n[x], one)) * slope + middle
            colour = np.int64(min(max(place, zero), last))
            for c in range(3):
                out[y, x, c] = colours[colour, c] if n[x] > zero else unknown
