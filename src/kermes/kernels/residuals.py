"""What fits of profiles leave, and how far sources stand out: estimates from images and residuals."""

import numpy as np

from kermes.kernels.decorator import allocating_kernel, kernel
from kermes.kernels.metrics import weighted_squares
from kermes.kernels.stamps import POINT

ROWS_AT_ONCE = 8
"""So many rows of an image, of a filtered one and of what is added stay in the fastest cache."""


@kernel
def signal_to_noise(sources, noise, psf_norm, out):
    """Roughly estimate the signal-to-noise of every source in all bands together; noise, psf_norm (B,)."""
    for s in range(len(out)):
        radius = 0.0 if sources.kinds[s] == POINT else np.exp(sources.shapes[s, 2])
        total = 0.0
        for b in range(len(noise)):
            flux = sources.fluxes[s, 0, b] + sources.fluxes[s, 1, b]
            if flux > 0.0 and noise[b] > 0.0:
                area = 1.0 / (psf_norm[b] * psf_norm[b]) + 6 * np.pi * radius * radius
                total += flux * flux / (noise[b] * noise[b] * area)
        out[s] = np.sqrt(total)


@kernel
def limit_radii(sources, snr, small, largest, above):
    """Set how large sources may be: the brighter, the larger, `largest` at a signal-to-noise of 10 and if `small` (S,).

    above (S,) takes which of them are larger than that.
    """
    for s in range(len(snr)):
        cap = np.log(largest if small[s] else largest * max(snr[s] / 10, 0.8) ** 0.3)
        sources.high[s, 2] = sources.high[s, 6] = cap
        above[s] = sources.shapes[s, 2] > cap or sources.shapes[s, 6] > cap


@kernel
def estimate(sources, noise, psf_norm, small, largest, snr, above):
    """Estimate how far sources stand out, see `signal_to_noise`, and with it how large they may be.

    above (S,) takes which are larger; none is if `largest` is 0. See `limit_radii`.
    """
    signal_to_noise(sources, noise, psf_norm, snr)
    if largest > 0.0:
        limit_radii(sources, snr, small, largest, above)
    else:
        for s in range(len(above)):
            above[s] = False


@kernel
def limit_by_contrast(images, weights, shapes, sigmas, factor, snr):
    """Lower the signal-to-noise (S,) of sources that do not stand out of what is around them.

    At most it is a factor times that of a Gaussian like the PSF on a constant background at the centre of the source.
    """
    n_bands, height, width = images.shape
    for s in range(len(snr)):
        y, x = shapes[s, 0], shapes[s, 1]
        total = 0.0
        for b in range(n_bands):
            reach = 3.0 * sigmas[b]
            sum_w, sum_g, sum_gg, sum_d, sum_gd = 0.0, 0.0, 0.0, 0.0, 0.0
            for i in range(max(int(np.ceil(y - reach)), 0), min(int(y + reach) + 1, height)):
                for j in range(max(int(np.ceil(x - reach)), 0), min(int(x + reach) + 1, width)):
                    square = (i - y) * (i - y) + (j - x) * (j - x)
                    w = weights[b, i, j]
                    if w > 0.0 and square <= reach * reach:
                        g = np.exp(-0.5 * square / (sigmas[b] * sigmas[b]))
                        sum_w += w
                        sum_g += w * g
                        sum_gg += w * g * g
                        sum_d += w * images[b, i, j]
                        sum_gd += w * g * images[b, i, j]
            if sum_w > 0.0:
                norm = sum_gg - sum_g * sum_g / sum_w
                signal = sum_gd - sum_g * sum_d / sum_w
                if norm > 1e-6 * sum_gg and signal > 0.0:
                    total += signal * signal / norm
        snr[s] = min(snr[s], factor * np.sqrt(total))


@kernel
def total_chi2(residual, weights):
    """Sum of weight * residual^2 over all bands (B, H, W), and the number of pixels with weight."""
    total, count = 0.0, 0
    for b in range(len(residual)):
        part, used = weighted_squares(residual[b].reshape(-1), weights[b].reshape(-1))
        total += part
        count += used
    return total, count


@kernel
def core_chi2(residual, weights, sources, radii, out):
    """Mean of the squared residuals [sigma] within a radius of each source, all bands together; 1 without pixels."""
    n_bands, height, width = residual.shape
    for s in range(len(out)):
        y, x, reach = sources.shapes[s, 0], sources.shapes[s, 1], radii[s]
        total, n = 0.0, 0
        for i in range(max(int(np.ceil(y - reach)), 0), min(int(y + reach) + 1, height)):
            for j in range(max(int(np.ceil(x - reach)), 0), min(int(x + reach) + 1, width)):
                if (i - y) * (i - y) + (j - x) * (j - x) > reach * reach:
                    continue
                for b in range(n_bands):
                    if weights[b, i, j] > 0.0:
                        total += weights[b, i, j] * residual[b, i, j] * residual[b, i, j]
                        n += 1
        out[s] = total / n if n > 0 else 1.0


@kernel
def add_mirrored(out, before, after, factor):
    """Add two rows, times a factor, to another."""
    for x in range(len(out)):
        out[x] += factor * (before[x] + after[x])


@kernel
def scale_row(row, factor, out):
    """Set a row to another, times a factor."""
    for x in range(len(out)):
        out[x] = factor * row[x]


@kernel
def blur(plane, taps, work, out):
    """Correlate a plane with a symmetric separable filter, taps (K,) from the middle outwards.

    plane, work (H + 2 (K - 1), W): zero in the first and last K - 1 rows, plane in the last K - 1 columns, too: these
    hold nothing of use in out (H, W). Rows are worked on as one, so many that they stay in the cache.
    """
    height, width = out.shape
    reach = len(taps) - 1
    flat_plane, flat_work, flat_out = plane.reshape(-1), work.reshape(-1), out.reshape(-1)
    for y in range(0, height, ROWS_AT_ONCE):
        n, first = min(ROWS_AT_ONCE, height - y) * width, (reach + y) * width
        target = flat_work[first : first + n]
        scale_row(flat_plane[first:], taps[0], target)
        for k in range(1, len(taps)):
            add_mirrored(target, flat_plane[first - k :], flat_plane[first + k :], taps[k])
    for y in range(0, height, ROWS_AT_ONCE):
        n, first = min(ROWS_AT_ONCE, height - y) * width, (reach + y) * width
        target = flat_out[y * width : y * width + n]
        scale_row(flat_work[first:], taps[0], target)
        for k in range(1, len(taps)):
            add_mirrored(target, flat_work[first - k * width :], flat_work[first + k * width :], taps[k])


@kernel
def filter_taps(sigmas, out):
    """Profiles, from the middle outwards, of Gaussians of given widths (B,), 0 beyond 2.5 of them; out (B, K)."""
    for b in range(len(sigmas)):
        reach = int(np.ceil(2.5 * sigmas[b]))
        for k in range(out.shape[1]):
            out[b, k] = np.exp(-0.5 * (k / sigmas[b]) ** 2) if k <= reach and sigmas[b] > 0.0 else 0.0


@kernel
def matched_filter(images, residual, weights, taps, y, x):
    """Signal-to-noise of a point at one pixel in the model, images - residual (B, H, W), over the bands where positive.

    taps (B, K): see `filter_taps`.
    """
    n_bands, height, width = images.shape
    reach = taps.shape[1] - 1
    total = 0.0
    for b in range(n_bands):
        signal, norm = 0.0, 0.0
        for i in range(max(y - reach, 0), min(y + reach + 1, height)):
            for j in range(max(x - reach, 0), min(x + reach + 1, width)):
                tap = taps[b, abs(i - y)] * taps[b, abs(j - x)]
                signal += tap * weights[b, i, j] * (images[b, i, j] - residual[b, i, j])
                norm += tap * tap * weights[b, i, j]
        if norm > 0.0 and signal > 0.0:
            total += signal * signal / norm
    return np.sqrt(total)


@kernel
def is_highest(plane, y, x):
    """Whether no pixel next to one exceeds it."""
    height, width = plane.shape
    for i in range(max(y - 1, 0), min(y + 2, height)):
        for j in range(max(x - 1, 0), min(x + 2, width)):
            if plane[i, j] > plane[y, x]:
                return False
    return True


@allocating_kernel
def significance(images, residual, weights, sigmas, threshold, left, seen):
    """Signal-to-noise of a point at each pixel, of what is left and of the model, over the bands where it is positive.

    images, residual, weights (B, H, W); sigmas (B,): width of a Gaussian like the PSF, 0 in a band without one. left,
    seen (H, W) take the square root of the sum over the bands of the squares of the positive ones; seen only where left
    exceeds the threshold and is not exceeded by a pixel next to it, and 0 elsewhere.
    """
    n_bands, height, width = residual.shape
    taps = np.empty((n_bands, int(np.ceil(2.5 * sigmas.max())) + 1), np.float32)
    squares = np.empty(taps.shape[1], np.float32)
    reach = taps.shape[1] - 1
    stride = width + reach
    plane, work = np.zeros((height + 2 * reach, stride), np.float32), np.zeros((height + 2 * reach, stride), np.float32)
    signal, norm = np.empty((height, stride), np.float32), np.empty((height, stride), np.float32)
    filter_taps(sigmas, taps)
    for y in range(height):
        for x in range(width):
            left[y, x] = seen[y, x] = 0.0
    for b in range(n_bands):
        if not sigmas[b] > 0.0:
            continue
        for k in range(len(squares)):
            squares[k] = taps[b, k] * taps[b, k]
        for y in range(height):
            row = plane[reach + y]
            for x in range(width):
                row[x] = weights[b, y, x] * residual[b, y, x]
        blur(plane, taps[b], work, signal)
        for y in range(height):
            row = plane[reach + y]
            for x in range(width):
                row[x] = weights[b, y, x]
        blur(plane, squares, work, norm)
        for y in range(height):
            for x in range(width):
                if norm[y, x] > 0.0 and signal[y, x] > 0.0:
                    left[y, x] += signal[y, x] * signal[y, x] / norm[y, x]
    for y in range(height):
        for x in range(width):
            left[y, x] = np.sqrt(left[y, x])
    for y in range(height):
        for x in range(width):
            if left[y, x] > threshold and is_highest(left, y, x):
                seen[y, x] = matched_filter(images, residual, weights, taps, y, x)


@kernel
def find_maxima(left, seen, weights, threshold, share, positions, distance, found, values):
    """Find local maxima of `left` above threshold + share * seen, farther than a distance from all positions.

    positions (S, 2 or more). A maximum is not exceeded by any of the 24 pixels around it; of equal ones the first in
    raster order counts. found (N, 2), values (N,) are filled from the front, the rest of the maxima is dropped when
    they are full. Returns their number.
    """
    height, width = left.shape
    n = 0
    for y in range(1, height - 1):
        for x in range(1, width - 1):
            value = left[y, x]
            if not value > threshold + share * seen[y, x] or n == len(found):
                continue
            highest, valid = True, False
            for i in range(-2, 3):
                for j in range(-2, 3):
                    if 0 <= y + i < height and 0 <= x + j < width and (i != 0 or j != 0):
                        other = left[y + i, x + j]
                        if other > value or (other == value and (i < 0 or (i == 0 and j < 0))):
                            highest = False
            for b in range(len(weights)):
                valid = valid or weights[b, y, x] > 0.0
            if not highest or not valid:
                continue
            for s in range(len(positions)):
                dy, dx = positions[s, 0] - y, positions[s, 1] - x
                if dy * dy + dx * dx < distance * distance:
                    highest = False
            if highest:
                found[n, 0], found[n, 1], values[n] = y, x, value
                n += 1
    return n


@allocating_kernel
def search(images, residual, weights, sigmas, positions, threshold, share, distance, found, values):
    """Find where a point source, with the PSF widths sigmas (B,), stands out of what is left; see `find_maxima`."""
    _, height, width = residual.shape
    left, seen = np.empty((height, width), np.float32), np.empty((height, width), np.float32)
    significance(images, residual, weights, sigmas, threshold, left, seen)
    return find_maxima(left, seen, weights, threshold, share, positions, distance, found, values)


@kernel
def project_row(residual, weights, model, along, square):
    """Add w r m and w m m of a row to `along` and `square`, pixel by pixel."""
    for x in range(len(model)):
        weighted = weights[x] * model[x]
        along[x] += weighted * residual[x]
        square[x] += weighted * model[x]


@kernel
def join_blocks(along, square, first, side):
    """Sums of a^2 - q and q^2 over blocks, a and q the sums of `along` and `square` over `side` pixels of each.

    Both are set to zero. The first block has `first` pixels, or `side` if that is 0, the last one what is left.
    """
    excess, squares = 0.0, 0.0
    left, right = 0, first if first > 0 else side
    while left < len(along):
        a, q = 0.0, 0.0
        for x in range(left, min(right, len(along))):
            a += np.float64(along[x])
            q += np.float64(square[x])
            along[x] = square[x] = 0.0
        excess += a * a - q
        squares += q * q
        left, right = right, right + side
    return excess, squares


@kernel
def structure_of_band(residual, weights, model, row, center_y, center_x, side, along, square):
    """Sums over the blocks of a source (h w,) on its box `row` of a^2 - q and q^2 in one band.

    a = sum(w r m) and q = sum(w m m) of a block; the block in the middle has the center in its middle. along and square
    (W,) are room to work in, zero.
    """
    y0, x0, height, width = row[0], row[1], row[2], row[3]
    # Distances from the first pixel of the box to the first edge of a block in it.
    first_y, first_x = (center_y - side // 2 - y0) % side, (center_x - side // 2 - x0) % side
    excess, squares = 0.0, 0.0
    for y in range(height):
        project_row(
            residual[y0 + y, x0 : x0 + width],
            weights[y0 + y, x0 : x0 + width],
            model[y * width : (y + 1) * width],
            along,
            square,
        )
        if y + 1 == height or (y + 1 - first_y) % side == 0:
            part, part2 = join_blocks(along[:width], square[:width], first_x, side)
            excess += part
            squares += part2
    return excess, squares


@kernel
def mean_coherence(side, width):
    """Mean over all pairs of the pixels of a block of exp(-d^2 / (4 width^2)), d their distance."""
    along = 0.0
    for i in range(side):
        for j in range(side):
            along += np.exp(-(((i - j) / (2 * width)) ** 2))
    return (along / (side * side)) ** 2


@kernel
def fill_structure(residual, weights, models, boxes, offsets, centers, width, along, square, out):
    """Fill the variance of the light of each source relative to its model that residuals tell of, out (S,).

    See `kermes.measurement.misfit_factors`. residual, weights (B, H, W); models (B, n) on boxes (S, 4); centers (S, 2),
    pixels of the image; width: of the PSF; along and square (W,) are room to work in, zero. Zero where residuals are no
    larger than noise makes them.
    """
    side = 2 * int(1.25 * width) + 1
    coherence = mean_coherence(side, width)
    for s in range(len(boxes)):
        excess, squares = 0.0, 0.0
        for b in range(len(residual)):
            part, part2 = structure_of_band(
                residual[b],
                weights[b],
                models[b, offsets[s] : offsets[s + 1]],
                boxes[s],
                centers[s, 0],
                centers[s, 1],
                side,
                along,
                square,
            )
            excess += part
            squares += part2
        out[s] = max(excess, 0.0) / (coherence * squares) if squares > 0.0 else 0.0


@kernel
def raise_to(row, model, factor):
    """Raise the pixels of a row to those of a model, times a factor, where they are below in size."""
    for x in range(len(row)):
        row[x] = max(row[x], factor * abs(model[x]))


@kernel
def compare_with_noise(weights, structure, model):
    """Sums over a row of w (m s)^2, (m s)^2, m s and m^2."""
    relative, both2, both, square = 0.0, 0.0, 0.0, 0.0
    for x in range(len(model)):
        m = np.float64(model[x])
        product = m * structure[x]  # its square may be too large for a float32
        relative += weights[x] * product * product
        both2 += product * product
        both += product
        square += m * m
    return relative, both2, both, square


@kernel
def fill_misfit(weights, models, boxes, offsets, sigmas, structure, deviation, factors):
    """Raise factors (S, B) to what `misfit_factors` returns; structure (S,), deviation (H, W) is room to work in."""
    for b in range(len(models)):
        deviation[:] = 0
        for s in range(len(boxes)):
            if structure[s] > 0.0:
                y0, x0, h, w = boxes[s, 0], boxes[s, 1], boxes[s, 2], boxes[s, 3]
                for y in range(h):
                    start = offsets[s] + y * w
                    row = deviation[y0 + y, x0 : x0 + w]
                    raise_to(row, models[b, start : start + w], np.float32(np.sqrt(structure[s])))
        for s in range(len(boxes)):
            y0, x0, h, w = boxes[s, 0], boxes[s, 1], boxes[s, 2], boxes[s, 3]
            relative, both2, both, square = 0.0, 0.0, 0.0, 0.0
            for y in range(h):
                start = offsets[s] + y * w
                part = compare_with_noise(
                    weights[b, y0 + y, x0 : x0 + w],
                    deviation[y0 + y, x0 : x0 + w],
                    models[b, start : start + w],
                )
                relative += part[0]
                both2 += part[1]
                both += part[2]
                square += part[3]
            area = 4 * np.pi * sigmas[b] * sigmas[b]
            if both2 > 0.0 and area > 0.0:
                own = both * both / both2
                factors[s, b] += relative / square * area * own / (area + own)


@allocating_kernel
def misfit_factors(residual, weights, models, boxes, offsets, centers, sigmas, width):
    """By how much models that do not hold all structure make the variance of each flux larger, (S, B), at least 1.

    See `kermes.measurement.misfit_factors`; sigmas (B,): widths of the PSFs, width: their median.
    """
    structure = np.empty(len(boxes))
    room = np.zeros((2, residual.shape[2]), dtype=np.float32)
    fill_structure(residual, weights, models, boxes, offsets, centers, width, room[0], room[1], structure)
    factors = np.ones((len(boxes), len(residual)))
    if structure.any():
        deviation = np.empty(residual.shape[1:], dtype=np.float32)
        fill_misfit(weights, models, boxes, offsets, sigmas, structure, deviation, factors)
    return factors
