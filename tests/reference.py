"""Slow twins: the same mathematics as the compiled kernels, written to be obviously right, in double precision.

A component has a box (y0, x0, height, width) inside the blend and a morphology (height, width).
"""

from functools import lru_cache

import numpy as np
import scipy.interpolate
import scipy.signal
import scipy.special


def convolve(image, kernels):
    """Convolve each band of (B, H, W) directly; zero outside."""
    return np.array(
        [scipy.signal.convolve(band, k, mode="same", method="direct") for band, k in zip(image, kernels, strict=True)]
    )


def correlate(image, kernels):
    """Adjoint of convolve."""
    return convolve(image, kernels[:, ::-1, ::-1])


def whole(box, morphology, shape):
    """Place a morphology into an empty image."""
    y0, x0, height, width = box
    image = np.zeros(shape)
    image[y0 : y0 + height, x0 : x0 + width] = morphology
    return image


# ---------------------------------------------------------------- constraints


def make_monotonic(morphology, cy, cx):
    """Weighted monotonicity, pixel by pixel in order of radius."""
    h, w = morphology.shape
    out = np.array(morphology, dtype=float)

    def radius2(y, x):
        return (y - cy) ** 2 + (x - cx) ** 2

    def angle(y, x):
        return 0.0 if (y, x) == (cy, cx) else np.arctan2(y - cy, x - cx)

    for y, x in sorted(np.ndindex(h, w), key=lambda pixel: radius2(*pixel))[1:]:
        around = [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        inner = [pixel for pixel in around if radius2(*pixel) < radius2(y, x)]
        weights = [abs(np.cos(angle(y, x) - angle(*pixel))) for pixel in inner]
        values = [out[p, q] if 0 <= p < h and 0 <= q < w else 0.0 for p, q in inner]
        out[y, x] = min(out[y, x], np.average(values, weights=weights))
    return out


def make_symmetric(morphology, cy, cx):
    """Smaller of each pixel and its mirror; zero without a mirror."""
    h, w = morphology.shape
    out = np.zeros((h, w))
    for y, x in np.ndindex(h, w):
        if 0 <= 2 * cy - y < h and 0 <= 2 * cx - x < w:
            out[y, x] = min(morphology[y, x], morphology[2 * cy - y, 2 * cx - x])
    return out


def falling_pixels(image, cy, cx, limit=0.0):
    """Pixels above `limit` that a path of falling values joins to (cy, cx): spread until nothing changes."""
    h, w = image.shape
    reached = np.zeros((h, w), dtype=bool)
    reached[cy, cx] = True
    while True:
        before = reached.sum()
        for y, x in np.ndindex(h, w):
            for p, q in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if 0 <= p < h and 0 <= q < w and reached[p, q] and limit < image[y, x] <= image[p, q]:
                    reached[y, x] = True
        if reached.sum() == before:
            return reached


# ---------------------------------------------------------------- initialization


def signal_to_noise(images, weights, psfs, cy, cx):
    """Matched filter of all bands at one pixel: sum(I P) / sqrt(sum(P^2 V)) over the usable pixels."""
    delta = np.zeros(images.shape)
    delta[:, cy, cx] = 1
    shape = convolve(delta, psfs)
    usable = weights > 0
    return (images * shape)[usable].sum() / np.sqrt((shape[usable] ** 2 / weights[usable]).sum())


def first_morphology(image, cy, cx, limit):
    """Symmetric, falling part of a detection image above `limit`, largest value 1; None when the peak is not."""
    if not image[cy, cx] > limit:
        return None
    symmetric = make_symmetric(image, cy, cx)
    return np.where(falling_pixels(symmetric, cy, cx, limit), symmetric, 0) / image[cy, cx]


# ---------------------------------------------------------------- fit


def project_morphology(morphology, cy, cx, spectrum, noise, background_threshold):
    """Project one morphology as scarlet lite does: monotonic, above the background, centre positive, peak 1."""
    h, w = morphology.shape
    near = [(y, x) for y, x in np.ndindex(h, w) if max(abs(y - cy), abs(x - cx)) <= 1]
    # Among equals the centre wins.
    by, bx = max(near, key=lambda pixel: (morphology[pixel], pixel == (cy, cx)))
    out = make_monotonic(morphology, by, bx)
    faint = np.all(spectrum[:, None, None] * out < background_threshold * noise[:, None, None], axis=0)
    out[faint | (out < 0)] = 0.0
    out[cy, cx] = max(out[cy, cx], 1e-20)
    return out / out.max()


class AmsGrad:
    """Steps of AMSGrad for one array, without bias correction."""

    def __init__(self, values):
        self.first, self.second, self.largest = np.zeros((3, *values.shape))

    def step(self, gradient):
        """Direction of the next step, to be multiplied by its length."""
        self.first = 0.1 * gradient + 0.9 * self.first
        self.second = 0.001 * gradient**2 + 0.999 * self.second
        self.largest = np.maximum(self.largest, self.second)
        return self.first / np.sqrt(np.maximum(self.largest, 1e-8))


def fit(images, weights, kernels, noise, boxes, centers, morphologies, spectra, n_iterations, background_threshold):
    """AdaProx with AMSGrad, boxes fixed.

    Returns the losses at the start and after each step, and the morphologies and spectra with the smallest one.
    """
    spectra = [np.array(spectrum, dtype=float) for spectrum in spectra]
    morphologies = [np.array(morphology, dtype=float) for morphology in morphologies]
    of_spectra, of_morphologies = [AmsGrad(s) for s in spectra], [AmsGrad(m) for m in morphologies]
    losses = []
    for iteration in range(n_iterations + 1):
        model = np.zeros(images.shape)
        for box, spectrum, morphology in zip(boxes, spectra, morphologies, strict=True):
            model += spectrum[:, None, None] * whole(box, morphology, images.shape[1:])
        residual = convolve(model, kernels) - images
        losses.append(0.5 * np.sum(weights * residual**2))
        if losses[-1] == min(losses):
            best = list(morphologies), list(spectra)
        if iteration == n_iterations:
            return losses, *best
        gradient = correlate(weights * residual, kernels)
        scale = 0.1 if iteration == 0 else 1.0
        for k, ((y0, x0, height, width), (cy, cx)) in enumerate(zip(boxes, centers, strict=True)):
            part = gradient[:, y0 : y0 + height, x0 : x0 + width]
            for_spectrum = np.einsum("bhw,hw->b", part, morphologies[k])
            for_morphology = np.einsum("bhw,b->hw", part, spectra[k])
            length = scale * np.maximum(0.1 * noise, 0.01 * spectra[k].mean())
            spectra[k] = np.maximum(spectra[k] - length * of_spectra[k].step(for_spectrum), 1e-20)
            moved = morphologies[k] - scale * 0.01 * of_morphologies[k].step(for_morphology)
            morphologies[k] = project_morphology(moved, cy - y0, cx - x0, spectra[k], noise, background_threshold)


# ---------------------------------------------------------------- fluxes and metrics


def normal_equations(planes, image, weights):
    """Matrix sum(W C_i C_j) and right side sum(W C_i I) of planes C (K, H, W)."""
    return np.einsum("iyx,jyx,yx->ij", planes, planes, weights), np.einsum("iyx,yx,yx->i", planes, image, weights)


def blend_metrics(models):
    """Overlap metrics of source models (S, B, H, W): four (S, B)."""
    others = models.sum(axis=0) - models
    pixels = (models > 0).any(axis=1, keepdims=True)
    largest = np.where(pixels, others, 0).max(axis=(2, 3))
    overlap = np.where(pixels, others, 0).sum(axis=(2, 3))
    fraction = overlap / models.sum(axis=(2, 3))
    blendedness = 1 - (models**2).sum(axis=(2, 3)) / ((models + others) * models).sum(axis=(2, 3))
    return largest, overlap, fraction, blendedness


# ---------------------------------------------------------------- profiles


def sersic_transform(q, index):
    """Fourier transform of the circular Sersic profile of half-light radius and flux one, by direct integration.

    The Hankel integral of I(r) J0(q r) r; for an index of one or more, where the profile has long wings and J0
    oscillates, the path is turned by a right angle, where J0 becomes K0 and falls exponentially.
    """
    q = np.asarray(q, dtype=float)
    b = scipy.special.gammaincinv(2 * index, 0.5)
    central = b ** (2 * index) / (2 * np.pi * index * scipy.special.gamma(2 * index))
    # All derivatives that matter vanish at both ends of 0 < t < 1, so that the trapezoidal rule is exact to rounding.
    t = np.arange(1, 4000) / 4000
    power = 2 * index + 2
    share, measure = t**power, power * t ** (power - 1) / 4000

    def direct(q):
        reach = (45 / b) ** index
        r = reach * share
        weight = 2 * np.pi * reach * measure * r * central * np.exp(-b * r ** (1 / index))
        return scipy.special.j0(q[:, None] * r) @ weight

    def turned(q):
        s = 45 / q[:, None] * share
        root, angle = b * s ** (1 / index), np.pi / (2 * index)
        light = s * scipy.special.k0(q[:, None] * s) * np.exp(-root * np.cos(angle)) * np.sin(root * np.sin(angle))
        return 4 * central * 45 / q * (light @ measure)

    flat = q.ravel()
    out = np.ones(flat.shape)
    steep = (flat > 0.5) & (index >= 1)
    for way, chosen in ((direct, ~steep), (turned, steep)):
        for few in np.array_split(np.flatnonzero(chosen), 1 + chosen.sum() // 500):
            out[few] = way(flat[few])
    return out.reshape(q.shape)


@lru_cache(maxsize=16)
def transform_of(index):
    """Give the same as a function of q^2: in closed form where there is one, a spline otherwise."""
    if index == 0.5:
        return lambda square: np.exp(-square / (4 * np.log(2)))
    if index == 1.0:
        return lambda square: (1 + square / scipy.special.gammaincinv(2.0, 0.5) ** 2) ** -1.5
    q = np.geomspace(1e-4, 1e3, 800)
    spline = scipy.interpolate.CubicSpline(np.log(q), sersic_transform(q, index))
    return lambda square: spline(0.5 * np.log(np.maximum(square, q[0] ** 2)))


def profile_transform(k_y, k_x, y, x, radius, e1, e2, transform):
    """Transform of one elliptical profile of flux one at wave numbers [rad / pixel]; radius 0: a point."""
    phase = np.exp(-1j * (k_y * y + k_x * x))
    if radius == 0:
        return phase
    # Longer along the major axis by exp(e / 2), shorter across it.
    e, angle = np.hypot(e1, e2), 0.5 * np.arctan2(e2, e1)
    along = k_x * np.cos(angle) + k_y * np.sin(angle)
    across = k_y * np.cos(angle) - k_x * np.sin(angle)
    return transform(radius**2 * (along**2 * np.exp(e) + across**2 * np.exp(-e))) * phase


def profile_images(side, psfs, sources):
    """Periodic images (B, side, side) of sources (y, x, radius, e1, e2, index, fluxes) seen through PSFs (B, P, Q)."""
    k = 2 * np.pi * np.fft.fftfreq(side)
    total = np.zeros((len(psfs), side, side))
    windows = np.array([np.fft.fft2(wrapped(psf, side)) for psf in psfs])
    for y, x, radius, e1, e2, index, fluxes in sources:
        own = profile_transform(k[:, None], k, y, x, radius, e1, e2, transform_of(index))
        total += np.asarray(fluxes)[:, None, None] * np.fft.ifft2(windows * own).real
    return total


def wrapped(psf, side):
    """Wrap a stamp (P, Q), odd sides, onto a periodic plane with its middle at pixel (0, 0)."""
    plane = np.zeros((side, side))
    y, x = np.indices(psf.shape)
    np.add.at(plane, ((y - psf.shape[0] // 2) % side, (x - psf.shape[1] // 2) % side), psf)
    return plane


# ---------------------------------------------------------------- templates


def rounded(value):
    """Nearest integer, halves away from zero."""
    return int(np.copysign(np.floor(abs(value) + 0.5), value))


def symmetric_values(image, inside, y, x, half):
    """Smaller one of each pixel and its mirror, not negative, (2 half + 1)^2 pixels about (y, x); zero without one."""
    out = np.zeros((2 * half + 1, 2 * half + 1))
    for dy, dx in np.ndindex(out.shape):
        pair = [(y + dy - half, x + dx - half), (y - dy + half, x - dx + half)]
        if all(0 <= v < image.shape[0] and 0 <= u < image.shape[1] and inside[v, u] for v, u in pair):
            out[dy, dx] = max(0.0, min(image[pixel] for pixel in pair))
    return out


def cast_shadows(template, rings=5, half_angle=0.3):
    """Ring by ring, side by side: a pixel caps those in a wedge behind it, groups of rings by their first values."""
    out = np.array(template, dtype=float)
    cy, cx = (side // 2 for side in out.shape)
    for first in range(0, max(cy, cx), rings):
        frozen = out.copy()
        for y, x in np.ndindex(out.shape):
            dy, dx = y - cy, x - cx
            ring = max(abs(dy), abs(dx))
            if not first <= ring < first + rings:
                continue
            if ring == 0:
                window = out[max(cy - rings, 0) : cy + rings + 1, max(cx - rings, 0) : cx + rings + 1]
                np.minimum(window, frozen[y, x], out=window)
            for step in range(1, rings + 1) if ring else ():
                for slope, across, forth in (
                    (dy / ring, (1, 0), (0, np.sign(dx))),
                    (dx / ring, (0, 1), (np.sign(dy), 0)),
                ):
                    if max(abs(dy * forth[0]), abs(dx * forth[1])) != ring:
                        continue  # this pixel is on no side of the ring that faces that way
                    for aside in range(rounded(step * (slope - half_angle)), rounded(step * (slope + half_angle)) + 1):
                        v = y + step * int(forth[0]) + aside * across[0]
                        u = x + step * int(forth[1]) + aside * across[1]
                        if 0 <= v < out.shape[0] and 0 <= u < out.shape[1]:
                            out[v, u] = min(out[v, u], frozen[y, x])
    return out


def point_chi2(image, variance, usable, peaks, k, psf, fwhm):
    """chi2 and coefficients of the fits of a point source at peak k, without and with derivatives of the PSF."""
    (y, x), half = peaks[k], len(psf) // 2
    inner, outer = np.ceil(fwhm), np.ceil(1.5 * fwhm)
    rows, columns = np.indices(image.shape)
    distance = np.hypot(rows - y, columns - x)
    ramp = np.clip((outer - distance) / (outer - inner), 0, 1)
    used = usable & (distance <= outer)

    def star(v, u):
        light = np.zeros((image.shape[0] + 4 * half, image.shape[1] + 4 * half))
        light[v + half : v + 3 * half + 1, u + half : u + 3 * half + 1] = psf
        return light[2 * half : -2 * half, 2 * half : -2 * half]

    terms = [star(y, x), np.ones(image.shape), columns - x, rows - y]
    reach = outer + len(psf) / 2
    for j, (v, u) in enumerate(peaks):
        if j != k and np.hypot(v - y, u - x) <= reach and max(abs(v - y), abs(u - x)) <= half + outer:
            terms.append(star(v, u))
    terms += [0.5 * (star(y + 1, x) - star(y - 1, x)), 0.5 * (star(y, x + 1) - star(y, x - 1))]
    root = np.sqrt(ramp[used] / variance[used])
    results = []
    for n in (len(terms) - 2, len(terms)):
        matrix = np.array([term[used] * root for term in terms[:n]]).T
        found = np.linalg.lstsq(matrix, image[used] * root, rcond=None)[0]
        residual = image[used] * root - matrix @ found
        results.append((residual @ residual, ramp[used].sum() - n, found))
    return results


def share_stray(image, places, peaks, templates, takes, rule, clip):
    """Share of every stray pixel (M, K); templates (K, H, W)."""
    shares = np.zeros((len(places), len(peaks)))
    lit = np.asarray(templates) > 0
    # Between the first and the last lit pixel of a row all belong to the footprint.
    footprints = np.logical_or.accumulate(lit, axis=2) & np.logical_or.accumulate(lit[..., ::-1], axis=2)[..., ::-1]
    for m, (y, x) in enumerate(places):
        for k in np.flatnonzero(takes):
            pixels = np.argwhere(footprints[k])
            far = {
                "r-to-peak": np.square(peaks[k] - places[m]).sum(),
                "r-to-footprint": np.square(pixels - places[m]).sum(axis=1).min(initial=1 << 60),
                "nearest-footprint": np.abs(pixels - places[m]).sum(axis=1).min(initial=1 << 60),
            }[rule]
            shares[m, k] = 1 / (1 + far) if rule != "nearest-footprint" else -far
        if rule == "nearest-footprint":
            nearest = np.flatnonzero(takes)[shares[m, takes].argmax()]
            shares[m] = np.arange(len(peaks)) == nearest
        shares[m, shares[m] < clip * shares[m].sum()] = 0
        shares[m] *= image[y, x] / shares[m].sum()
    return shares


# ---------------------------------------------------------------- photometry


def pixel_overlap(y, x, radius, n_strips=2000):
    """Area that the pixel centred on (y, x) shares with a circle round the origin: the sum over strips along y."""
    edges = x - 0.5 + np.arange(n_strips + 1) / n_strips
    half = np.sqrt(np.maximum(radius**2 - edges**2, 0))
    chord = np.maximum(np.minimum(half, y + 0.5) - np.maximum(-half, y - 0.5), 0)
    return float(np.mean(0.5 * (chord[1:] + chord[:-1])))


def aperture_sums(images, variance, model, valid, y, x, radii):
    """Flux, its variance, the area that was summed and the model in circles (A,), band by band (A, B, 4)."""
    sums = []
    for radius in radii:
        area = np.zeros(images.shape[1:])
        for i, j in np.ndindex(area.shape):
            area[i, j] = pixel_overlap(i - y, j - x, radius)
        used = area * valid
        parts = used * images, used**2 * variance, used, used * model
        sums.append([part.sum(axis=(1, 2)) for part in parts])
    return np.moveaxis(np.array(sums), 1, 2)


def gaussian_sums(image, variance, valid, state):
    """Sums of w I and of w^2 V, times powers of dy and dx, under a Gaussian cut at five sigma."""
    y, x, yy, xx, xy = state
    dy, dx = np.indices(image.shape)
    dy, dx = dy - y, dx - x
    square = np.einsum("iyx,ij,jyx->yx", [dy, dx], np.linalg.inv([[yy, xy], [xy, xx]]), [dy, dx])
    weight = np.where((square <= 25) & valid, np.exp(-0.5 * square), 0)
    light = weight * image
    moments = [(light * factor).sum() for factor in (1, dy, dx, dy**2, dx**2, dy * dx)]
    noise = weight**2 * variance
    powers = (1, dy**2, dx**2, dy * dx, dy**4, dx**4, dy**2 * dx**2)
    return np.array([*moments, *((noise * factor).sum() for factor in powers)])


def residual_sums(residual, variance, valid, model, y, x, radii):
    """Chi2, pixels and squared signal in two circles; squared differences of opposite pixels; pixels outside, all."""
    n_bands, height, width = residual.shape
    out = np.zeros((n_bands, 10))
    for b in range(n_bands):
        used = {}
        for i in range(-50, 60):
            for j in range(-50, 60):
                distance = np.hypot(i - y, j - x)
                if distance > radii[b, 1]:
                    continue
                inside = 0 <= i < height and 0 <= j < width
                out[b, 8] += not inside
                out[b, 9] += 1
                if inside and valid[b, i, j]:
                    used[i, j] = float(residual[b, i, j]), float(variance[b, i, j])
                    part = [residual[b, i, j] ** 2 / variance[b, i, j], 1, model[b, i, j] ** 2 / variance[b, i, j]]
                    out[b, 3:6] += part
                    out[b, :3] += np.array(part) * (distance <= radii[b, 0])
        for (i, j), (value, noise2) in used.items():
            opposite = round(2 * y) - i, round(2 * x) - j
            if opposite > (i, j) and 0 <= opposite[0] < height and 0 <= opposite[1] < width and valid[(b, *opposite)]:
                other, other_noise2 = float(residual[(b, *opposite)]), float(variance[(b, *opposite)])
                out[b, 6] += (value - other) ** 2 / (noise2 + other_noise2)
                out[b, 7] += 1
    return out


def structure(residual, weights, model, center, width):
    """Variance of the light of a source relative to its model (B, H, W), zero outside of its box."""
    side = 2 * int(1.25 * width) + 1
    offsets = np.arange(side)
    distance2 = np.subtract.outer(offsets, offsets) ** 2
    coherence = np.exp(-distance2 / (4 * width**2)).mean() ** 2
    y, x = np.indices(residual.shape[1:])
    blocks = 1000 * ((y - center[0] + side // 2) // side) + (x - center[1] + side // 2) // side
    excess, squares = 0.0, 0.0
    for block in np.unique(blocks):
        inside = blocks == block
        for w, r, m in zip(weights, residual, model, strict=True):
            q = (w * m * m)[inside].sum()
            excess += (w * r * m)[inside].sum() ** 2 - q
            squares += q**2
    return max(excess, 0.0) / (coherence * squares)


def misfit_factors(residual, weights, models, centers, areas, width):
    """Models are images (S, B, H, W), zero outside of their boxes."""
    deviation = np.zeros(residual.shape)
    for model, center in zip(models, centers, strict=True):
        deviation = np.maximum(deviation, np.sqrt(structure(residual, weights, model, center, width)) * model)
    factors = np.ones(models.shape[:2])
    for s, b in np.ndindex(factors.shape):
        both = models[s, b] * deviation[b]
        if not both.any():
            continue
        own = both.sum() ** 2 / (both**2).sum()
        area = areas[b] * own / (areas[b] + own)
        factors[s, b] += area * (weights[b] * both**2).sum() / (models[s, b] ** 2).sum()
    return factors
