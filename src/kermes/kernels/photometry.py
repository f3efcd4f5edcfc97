"""Sums over circles and adaptive moments of the stamp of one object."""

import numpy as np

from kermes.kernels.decorator import inlined_kernel, kernel

SUBPIXELS = 10
"""Pixels on the rim of a circle are divided into so many parts along each axis."""

MAX_ITERATIONS = 60
SETTLED = 3e-4
"""Moments have converged when none changes by more than this part of the size."""


@inlined_kernel
def part_inside(dy, dx, radius):
    """Part of a pixel, whose centre is (dy, dx) from that of a circle, that lies inside."""
    distance = np.sqrt(dy * dy + dx * dx)
    part = 0.0
    if distance <= radius - 0.7072:
        part = 1.0
    elif distance < radius + 0.7072:
        n = 0
        for i in range(SUBPIXELS):
            for j in range(SUBPIXELS):
                v, u = dy + (i + 0.5) / SUBPIXELS - 0.5, dx + (j + 0.5) / SUBPIXELS - 0.5
                n += v * v + u * u <= radius * radius
        part = n / (SUBPIXELS * SUBPIXELS)
    return part


@kernel
def aperture_sums(image, variance, valid, y, x, radii):
    """Sum an image (h, w) over circles about (y, x). Returns flux, variance and the valid part of the area, each (R,).

    Pixels that are not valid, or outside of the image, count as zero. O(R radius^2).
    """
    flux, noise2, part = np.zeros(len(radii)), np.zeros(len(radii)), np.zeros(len(radii))
    height, width = image.shape
    for r in range(len(radii)):
        radius = radii[r]
        area = 0.0
        for v in range(int(np.floor(y - radius)), int(np.ceil(y + radius)) + 1):
            for u in range(int(np.floor(x - radius)), int(np.ceil(x + radius)) + 1):
                share = part_inside(v - y, u - x, radius)
                area += share
                if share > 0 and 0 <= v < height and 0 <= u < width and valid[v, u]:
                    flux[r] += share * image[v, u]
                    noise2[r] += share * share * variance[v, u]
                    part[r] += share
        part[r] /= area
    return flux, noise2, part


@kernel
def adaptive_moments(image, valid, y, x, sigma, largest_move):
    """Moments of an image (h, w) weighted with the Gaussian that has the same moments.

    From a round one of width sigma at (y, x). Pixels that are not valid, or outside of the image, have the value of the
    Gaussian fitted so far. Returns y, x, Myy, Mxx, Mxy, the flux of the Gaussian, and whether it converged within
    `largest_move` of where it began. O(iterations sigma^2).

    Bernstein and Jarvis (2002), section 3.1; with a weight of covariance W the measured covariance is (1/M + 1/W)^-1,
    which is W / 2 for M = W: twice the measured one is the next weight (Hirata and Seljak 2003, appendix C).
    """
    height, width = image.shape
    cy, cx = y, x
    myy, mxx, mxy = sigma * sigma, sigma * sigma, 0.0
    flux = 0.0
    for _ in range(MAX_ITERATIONS):
        determinant = myy * mxx - mxy * mxy
        if not determinant > 0.01 or not myy + mxx < 2.0 * (height * height + width * width):
            return cy, cx, myy, mxx, mxy, flux, False
        reach_y, reach_x = 4.0 * np.sqrt(myy), 4.0 * np.sqrt(mxx)
        total, square, by_y, by_x, by_yy, by_xx, by_xy = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        for v in range(int(np.floor(cy - reach_y)), int(np.ceil(cy + reach_y)) + 1):
            for u in range(int(np.floor(cx - reach_x)), int(np.ceil(cx + reach_x)) + 1):
                dy, dx = v - cy, u - cx
                exponent = 0.5 * (mxx * dy * dy - 2.0 * mxy * dy * dx + myy * dx * dx) / determinant
                if exponent > 8.0:
                    continue
                weight = np.exp(-exponent)
                square += weight * weight
                value = flux * weight / (2.0 * np.pi * np.sqrt(determinant))
                if 0 <= v < height and 0 <= u < width and valid[v, u]:
                    value = image[v, u]
                value *= weight
                total += value
                by_y += value * dy
                by_x += value * dx
                by_yy += value * dy * dy
                by_xx += value * dx * dx
                by_xy += value * dy * dx
        if not total > 0:
            return cy, cx, myy, mxx, mxy, flux, False
        # Of a Gaussian f w / (2 pi sqrt(det)) the weighted sum is f sum(w^2) / (2 pi sqrt(det)).
        flux = total * 2.0 * np.pi * np.sqrt(determinant) / square
        step_y, step_x = 2.0 * by_y / total, 2.0 * by_x / total
        new_yy, new_xx, new_xy = 2.0 * by_yy / total, 2.0 * by_xx / total, 2.0 * by_xy / total
        size = myy + mxx
        change = max(abs(new_yy - myy), abs(new_xx - mxx), abs(new_xy - mxy)) / size
        cy, cx, myy, mxx, mxy = cy + step_y, cx + step_x, new_yy, new_xx, new_xy
        if max(abs(cy - y), abs(cx - x)) > largest_move:
            return cy, cx, myy, mxx, mxy, flux, False
        if change < SETTLED and max(abs(step_y), abs(step_x)) < SETTLED * np.sqrt(size):
            return cy, cx, myy, mxx, mxy, flux, myy * mxx > mxy * mxy
    return cy, cx, myy, mxx, mxy, flux, False
