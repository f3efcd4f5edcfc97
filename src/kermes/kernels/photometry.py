"""Measurement on the stamps of one object: circular apertures, adaptive moments, and what the model leaves."""

import numpy as np

from kermes.kernels.decorator import allocating_kernel, fast_allocating_kernel, kernel

MAX_ITERATIONS = 50
TOLERANCE = 1e-4
N_SUMS = 13
"""Sums that are taken under an adaptive Gaussian."""

FWHM = 2.0 * np.sqrt(2.0 * np.log(2.0))  # full width at half maximum of a Gaussian of sigma one


@kernel
def sector_area(ay, ax, by, bx, radius):
    """Signed area of the sector of a circle round the origin from the direction of a to that of b."""
    return 0.5 * radius * radius * np.arctan2(ax * by - ay * bx, ax * bx + ay * by)


@kernel
def triangle_area(ay, ax, by, bx, radius):
    """Signed area that a circle round the origin shares with the triangle of the origin, a and b."""
    dy, dx = by - ay, bx - ax
    square = dy * dy + dx * dx
    half = (ay * dy + ax * dx) / square
    rest = half * half - (ay * ay + ax * ax - radius * radius) / square
    if rest <= 0.0:
        return sector_area(ay, ax, by, bx, radius)
    first, last = max(-half - np.sqrt(rest), 0.0), min(-half + np.sqrt(rest), 1.0)
    if first >= last:
        return sector_area(ay, ax, by, bx, radius)
    py, px, qy, qx = ay + first * dy, ax + first * dx, ay + last * dy, ax + last * dx
    area = 0.5 * (px * qy - py * qx)
    if first > 0.0:
        area += sector_area(ay, ax, py, px, radius)
    if last < 1.0:
        area += sector_area(qy, qx, by, bx, radius)
    return area


@kernel
def pixel_overlap(y, x, radius):
    """Area of the pixel with its centre at (y, x) that lies in a circle round the origin.

    Exact: by Green's theorem it is the sum over the four sides of what the circle shares with the triangle of the
    origin and the side.
    """
    near_y, near_x = max(abs(y) - 0.5, 0.0), max(abs(x) - 0.5, 0.0)
    if near_y * near_y + near_x * near_x >= radius * radius:
        return 0.0
    far_y, far_x = abs(y) + 0.5, abs(x) + 0.5
    if far_y * far_y + far_x * far_x <= radius * radius:
        return 1.0
    area = triangle_area(y - 0.5, x - 0.5, y - 0.5, x + 0.5, radius)
    area += triangle_area(y - 0.5, x + 0.5, y + 0.5, x + 0.5, radius)
    area += triangle_area(y + 0.5, x + 0.5, y + 0.5, x - 0.5, radius)
    area += triangle_area(y + 0.5, x - 0.5, y - 0.5, x - 0.5, radius)
    return area


@allocating_kernel
def aperture_sums(images, variance, model, valid, y, x, radii):
    """Sums of the valid pixels of images (B, h, w) in circles of some radii (A,) round (y, x).

    Returns (A, B, 4): flux, its variance, the area that was summed, and the flux of the model. Cost O(B r^2).
    """
    n_bands, height, width = images.shape
    sums = np.zeros((len(radii), n_bands, 4))
    for a in range(len(radii)):
        radius = radii[a]
        for i in range(max(0, int(np.floor(y - radius))), min(height, int(np.ceil(y + radius)) + 1)):
            for j in range(max(0, int(np.floor(x - radius))), min(width, int(np.ceil(x + radius)) + 1)):
                area = pixel_overlap(i - y, j - x, radius)
                if area == 0.0:
                    continue
                for b in range(n_bands):
                    if valid[b, i, j]:
                        sums[a, b, 0] += area * images[b, i, j]
                        sums[a, b, 1] += area * area * variance[b, i, j]
                        sums[a, b, 2] += area
                        sums[a, b, 3] += area * model[b, i, j]
    return sums


@fast_allocating_kernel
def box_sums(images, variance, model, valid, y0, y1, x0, x1):
    """Sums of the valid pixels of a part of images (B, h, w).

    Returns (B, 4): flux, its variance, the number of pixels, and the flux of the model.
    """
    sums = np.zeros((len(images), 4))
    for b in range(len(images)):
        flux, noise, count, light = 0.0, 0.0, 0.0, 0.0
        for i in range(y0, y1):
            for j in range(x0, x1):
                if valid[b, i, j]:
                    flux += images[b, i, j]
                    noise += variance[b, i, j]
                    count += 1.0
                    light += model[b, i, j]
        sums[b, 0], sums[b, 1], sums[b, 2], sums[b, 3] = flux, noise, count, light
    return sums


@fast_allocating_kernel
def model_sums(model, light, variance, valid):
    """Sums of m, m^2 and A m for a model m and the light A of all models, and of m^2 / V over valid pixels.

    All (B, h, w). Returns (B, 4).
    """
    n_bands, height, width = model.shape
    sums = np.zeros((n_bands, 4))
    for b in range(n_bands):
        flux, square, overlap, signal = 0.0, 0.0, 0.0, 0.0
        for i in range(height):
            for j in range(width):
                m = float(model[b, i, j])
                flux += m
                square += m * m
                overlap += light[b, i, j] * m
                if valid[b, i, j]:
                    signal += m * m / variance[b, i, j]
        sums[b, 0], sums[b, 1], sums[b, 2], sums[b, 3] = flux, square, overlap, signal
    return sums


@fast_allocating_kernel
def psf_sums(images, variance, model, valid, psf, weight_variance):
    """Sums for the flux of a point source, with its image P (B, h, w), over the valid pixels.

    Returns (B, 4), with the weights w = P / V for the variance V of the weights: sum(w I), sum(w^2 variance), sum(w P)
    and sum(w m) for the model m.
    """
    n_bands, height, width = images.shape
    sums = np.zeros((n_bands, 4))
    for b in range(n_bands):
        flux, noise, norm, light = 0.0, 0.0, 0.0, 0.0
        for i in range(height):
            for j in range(width):
                if valid[b, i, j] and psf[b, i, j] != 0.0:
                    weight = float(psf[b, i, j]) / weight_variance[b, i, j]
                    flux += weight * images[b, i, j]
                    noise += weight * weight * variance[b, i, j]
                    norm += weight * psf[b, i, j]
                    light += weight * model[b, i, j]
        sums[b, 0], sums[b, 1], sums[b, 2], sums[b, 3] = flux, noise, norm, light
    return sums


@allocating_kernel
def mean_of_bands(images, variance, valid, mean, used):
    """Mean of images (B, h, w), each weighted with the inverse of its mean variance; mean, used (h, w) are written."""
    n_bands, height, width = images.shape
    weights = np.zeros(n_bands)
    for b in range(n_bands):
        total, count = 0.0, 0
        for i in range(height):
            for j in range(width):
                if valid[b, i, j]:
                    total += variance[b, i, j]
                    count += 1
        if total > 0.0:
            weights[b] = count / total
    for i in range(height):
        for j in range(width):
            light, weight = 0.0, 0.0
            for b in range(n_bands):
                if valid[b, i, j]:
                    light += weights[b] * images[b, i, j]
                    weight += weights[b]
            used[i, j] = weight > 0.0
            mean[i, j] = light / weight if weight > 0.0 else 0.0


@kernel
def radial_sums(image, valid, y, x, radius):
    """Sums of I and r I over the valid pixels of an image (h, w) whose centre lies within a radius of (y, x)."""
    height, width = image.shape
    light, moment = 0.0, 0.0
    for i in range(max(0, int(np.ceil(y - radius))), min(height, int(np.floor(y + radius)) + 1)):
        for j in range(max(0, int(np.ceil(x - radius))), min(width, int(np.floor(x + radius)) + 1)):
            r = np.hypot(i - y, j - x)
            if r < radius and valid[i, j]:
                light += image[i, j]
                moment += r * image[i, j]
    return light, moment


@kernel
def gaussian_sums(image, variance, valid, state, with_noise, sums):
    """Sums of w I times 1, dy, dx, dy^2, dx^2, dy dx over the valid pixels of an image (h, w), and of w^2 V.

    The latter, only `with_noise`, times 1, dy^2, dx^2, dy dx, dy^4, dx^4, dy^2 dx^2. w is a Gaussian of peak one, cut
    at five sigma; state (5,) its centre y, x and its covariance yy, xx, xy; d is counted from the centre. sums
    (N_SUMS,) is written.
    """
    height, width = image.shape
    y, x, yy, xx, xy = state[0], state[1], state[2], state[3], state[4]
    determinant = yy * xx - xy * xy
    narrow = determinant / yy  # variance along x at a given y
    ratio = np.exp(-1.0 / narrow)
    for k in range(N_SUMS):
        sums[k] = 0.0
    reach = 5.0 * np.sqrt(yy)
    for i in range(max(0, int(np.ceil(y - reach))), min(height, int(np.floor(y + reach)) + 1)):
        dy = i - y
        middle, half = dy * xy / yy, np.sqrt(max(narrow * (25.0 - dy * dy / yy), 0.0))
        first = max(0, int(np.ceil(x + middle - half)))
        # A Gaussian from pixel to pixel: the factor to the next one shrinks by the same ratio each time.
        u = first - x - middle
        weight = np.exp(-0.5 * (u * u / narrow + dy * dy / yy))
        factor = np.exp(-(u + 0.5) / narrow)
        light, light_x, light_xx = 0.0, 0.0, 0.0
        noise, noise_x, noise_xx, noise_xxxx = 0.0, 0.0, 0.0, 0.0
        for j in range(first, min(width, int(np.floor(x + middle + half)) + 1)):
            if valid[i, j]:
                part, dx = weight * image[i, j], j - x
                light += part
                light_x += part * dx
                light_xx += part * dx * dx
                if with_noise:
                    part, square = weight * weight * variance[i, j], dx * dx
                    noise += part
                    noise_x += part * dx
                    noise_xx += part * square
                    noise_xxxx += part * square * square
            weight *= factor
            factor *= ratio
        sums[0] += light
        sums[1] += light * dy
        sums[2] += light_x
        sums[3] += light * dy * dy
        sums[4] += light_xx
        sums[5] += light_x * dy
        square = dy * dy
        sums[6] += noise
        sums[7] += noise * square
        sums[8] += noise_xx
        sums[9] += noise_x * dy
        sums[10] += noise * square * square
        sums[11] += noise_xxxx
        sums[12] += noise_xx * square


@kernel
def fit_gaussian(image, variance, valid, state, sums):
    """Adaptive moments: find the Gaussian weight whose moments are those of the image under it.

    Starts from state (5,) as in `gaussian_sums` and writes it, and the sums. With M the covariance under the weight W,
    the next W is (M^-1 - W^-1)^-1, which is exact for a Gaussian image, or 2 M where that is no covariance; the centre
    moves by twice the mean (Hirata and Seljak 2003, section 2.1). Returns whether it converged: not if the light is
    negative, the centre strays by three sigma of the start, or sigma falls below a third of a pixel or exceeds a
    quarter of the image.
    """
    height, width = image.shape
    start_y, start_x, farthest = state[0], state[1], 9.0 * (state[2] + state[3]) / 2.0
    for _ in range(MAX_ITERATIONS):
        gaussian_sums(image, variance, valid, state, False, sums)
        if not sums[0] > 0.0:
            return False
        my, mx = sums[1] / sums[0], sums[2] / sums[0]
        yy = sums[3] / sums[0] - my * my
        xx = sums[4] / sums[0] - mx * mx
        xy = sums[5] / sums[0] - my * mx
        determinant = yy * xx - xy * xy
        if not (determinant > 0.0 and yy > 0.0):
            return False
        weight = state[2] * state[3] - state[4] * state[4]
        # Inverses of both covariances, subtracted.
        inverse_yy = xx / determinant - state[3] / weight
        inverse_xx = yy / determinant - state[2] / weight
        inverse_xy = -xy / determinant + state[4] / weight
        inverse = inverse_yy * inverse_xx - inverse_xy * inverse_xy
        if inverse > 0.0 and inverse_yy > 0.0:
            yy, xx, xy = inverse_xx / inverse, inverse_yy / inverse, -inverse_xy / inverse
        else:
            yy, xx, xy = 2.0 * yy, 2.0 * xx, 2.0 * xy
        change = max(abs(yy - state[2]), abs(xx - state[3]), abs(xy - state[4])) / (yy + xx)
        shift = max(abs(my), abs(mx)) / np.sqrt(yy + xx)
        state[0], state[1], state[2], state[3], state[4] = state[0] + 2.0 * my, state[1] + 2.0 * mx, yy, xx, xy
        if (state[0] - start_y) ** 2 + (state[1] - start_x) ** 2 > farthest:
            return False
        if not (0.01 < yy * xx - xy * xy and max(yy, xx) < (0.25 * max(height, width)) ** 2):
            return False
        if change < TOLERANCE and shift < TOLERANCE:
            gaussian_sums(image, variance, valid, state, True, sums)
            return sums[0] > 0.0
    return False


@allocating_kernel
def adaptive_moments(images, variance, valid, y, x, sigmas, states, sums):
    """`fit_gaussian` in each band, from a round weight of width sigmas (B,) at (y, x).

    states (B, 5) and sums (B, N_SUMS) are written. Returns whether each converged (B,).
    """
    converged = np.zeros(len(images), np.bool_)
    for b in range(len(images)):
        states[b, 0], states[b, 1], states[b, 4] = y, x, 0.0
        states[b, 2] = states[b, 3] = sigmas[b] * sigmas[b]
        converged[b] = fit_gaussian(images[b], variance[b], valid[b], states[b], sums[b])
    return converged


@allocating_kernel
def kron_radius(images, variance, valid, y, x, fwhm, reach, factor):
    """Kron radius in the mean of images (B, h, w), which `mean_of_bands` makes.

    A factor times the mean radius of the light within `reach` sigma of its adaptive moments, which are begun at a width
    fwhm; not less than fwhm and not more than that reach. Returns it, NaN where there are no moments or no light, and
    whether there is none or it met a limit.
    """
    mean, used = np.empty(images.shape[1:], np.float32), np.empty(images.shape[1:], np.bool_)
    mean_of_bands(images, variance, valid, mean, used)
    state, sums = np.array([y, x, (fwhm / FWHM) ** 2, (fwhm / FWHM) ** 2, 0.0]), np.empty(N_SUMS)
    if not fit_gaussian(mean, mean, used, state, sums):
        return np.nan, True
    farthest = reach * np.sqrt(0.5 * (state[2] + state[3]))
    flux, moment = radial_sums(mean, used, y, x, farthest)
    if not (flux > 0.0 and moment > 0.0):
        return np.nan, True
    radius = factor * moment / flux
    return min(max(radius, fwhm), farthest), not fwhm <= radius <= farthest


@allocating_kernel
def residual_sums(residual, variance, valid, model, y, x, radii):
    """What the models leave in two circles round (y, x), the second the larger; radii (B, 2).

    residual, variance, valid and model, that of the object alone, (B, h, w). Returns (B, 10): for each circle chi2, the
    number of valid pixels and the sum of model^2 / variance over them; the sum of (r - r')^2 / (V + V') over pixels of
    the second circle and those opposite, each pair once, and the number of pairs; the number of pixels of the second
    circle outside the stamp, and of all.
    """
    n_bands, height, width = residual.shape
    # The pixel opposite is found to half a pixel.
    twice_y, twice_x = int(np.rint(2.0 * y)), int(np.rint(2.0 * x))
    out = np.zeros((n_bands, 10))
    for b in range(n_bands):
        for i in range(int(np.ceil(y - radii[b, 1])), int(np.floor(y + radii[b, 1])) + 1):
            for j in range(int(np.ceil(x - radii[b, 1])), int(np.floor(x + radii[b, 1])) + 1):
                square = (i - y) ** 2 + (j - x) ** 2
                if square > radii[b, 1] ** 2:
                    continue
                out[b, 9] += 1.0
                if not (0 <= i < height and 0 <= j < width):
                    out[b, 8] += 1.0
                    continue
                if not valid[b, i, j]:
                    continue
                chi2 = residual[b, i, j] * residual[b, i, j] / variance[b, i, j]
                signal = model[b, i, j] * model[b, i, j] / variance[b, i, j]
                out[b, 3] += chi2
                out[b, 4] += 1.0
                out[b, 5] += signal
                if square <= radii[b, 0] ** 2:
                    out[b, 0] += chi2
                    out[b, 1] += 1.0
                    out[b, 2] += signal
                p, q = twice_y - i, twice_x - j
                if (p, q) > (i, j) and 0 <= p < height and 0 <= q < width and valid[b, p, q]:
                    difference = residual[b, i, j] - residual[b, p, q]
                    out[b, 6] += difference * difference / (variance[b, i, j] + variance[b, p, q])
                    out[b, 7] += 1.0
    return out
