"""Scenes with known truth: stars and galaxies at the depth of ten years of LSST.

Sources are drawn by their Fourier transforms, which are exact, and share no code with the models that are fitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol, get_args

import numpy as np
import scipy.fft
from astropy import units
from astropy.table import Table, vstack
from astropy.wcs import WCS
from numpy.typing import NDArray
from scipy.spatial import KDTree
from scipy.special import gamma, gammainc, gammaincinv

from kermes.coadd import Coadd
from kermes.errors import InputError
from kermes.geometry import Box

FloatArray = NDArray[np.float64]
Kind = Literal["field", "knots", "pair", "crowded", "bright"]

ZERO_POINT = 31.4
"""AB magnitude of 1 nJy."""

DEPTH: Mapping[str, float] = {"u": 26.1, "g": 27.4, "r": 27.5, "i": 26.8, "z": 26.1, "y": 24.9}
"""AB magnitude of a point source at five sigma after ten years of LSST (Ivezic et al. 2019, table 1)."""

_FWHM_ARCSEC = {"u": 0.88, "g": 0.84, "r": 0.80, "i": 0.76, "z": 0.72, "y": 0.70}
_BETA = {"u": 3.0, "g": 3.3, "r": 3.6, "i": 3.9, "z": 4.3, "y": 4.7}

# Colours [mag] relative to i, from the bluest to the reddest of each kind.
_BLUE_GALAXY = {"u": 0.9, "g": 0.45, "r": 0.2, "i": 0.0, "z": -0.1, "y": -0.15}
_RED_GALAXY = {"u": 4.2, "g": 2.4, "r": 0.9, "i": 0.0, "z": -0.35, "y": -0.5}
_BLUE_STAR = {"u": 1.6, "g": 0.55, "r": 0.12, "i": 0.0, "z": 0.0, "y": 0.0}
_RED_STAR = {"u": 5.3, "g": 2.6, "r": 1.3, "i": 0.0, "z": -0.7, "y": -1.0}
_YOUNG = {"u": 0.2, "g": -0.15, "r": -0.1, "i": 0.0, "z": 0.05, "y": 0.1}  # stars of some 10 Myr, no dust

_DISC, _BULGE = 1.0, 4.0  # Sersic indices
_STAMP_RADIUS = 20  # PSF stamps have 41 pixels on a side; the PSF falls to zero at their edge
_STAMP_SIDES = np.array([48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024])
_FAINTEST = 1e-3  # a stamp ends where the source falls below this many sigma per pixel in every band

_DEFAULTS: Mapping[Kind, tuple[int, tuple[int, int]]] = {
    "field": (40, (160, 160)),
    "knots": (40, (160, 160)),
    "pair": (2, (80, 80)),
    "crowded": (250, (160, 160)),
    "bright": (40, (200, 200)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MoffatPsf:
    """Elliptical Moffat profile that falls smoothly to zero at the edge of its stamp."""

    fwhm_pix: float
    """Full width at half maximum [pixels], geometric mean of the two axes."""

    beta: float
    """Slope of the wings: intensity falls as radius to the power of -2 beta."""

    axis_ratio: float = 1.0
    """Minor over major axis."""

    angle: float = 0.0
    """Direction of the major axis [rad], from +x towards +y."""

    def intensity(self, y: FloatArray, x: FloatArray) -> FloatArray:
        """Evaluate at offsets from the centre [pixels]; not normalised, 1 at the centre, 0 beyond 20 pixels."""
        along = x * np.cos(self.angle) + y * np.sin(self.angle)
        across = y * np.cos(self.angle) - x * np.sin(self.angle)
        scale = 0.5 * self.fwhm_pix / np.sqrt(2.0 ** (1.0 / self.beta) - 1.0)
        square = (along**2 * self.axis_ratio + across**2 / self.axis_ratio) / scale**2
        # The last quarter of the radius falls off as cos^2, so that the stamp holds all the light.
        taper = np.clip((np.hypot(y, x) / _STAMP_RADIUS - 0.75) / 0.25, 0.0, 1.0)
        return np.asarray((1.0 + square) ** -self.beta * np.cos(0.5 * np.pi * taper) ** 2)

    def wings(self, y: FloatArray, x: FloatArray, reach: float) -> FloatArray:
        """Evaluate what `intensity` leaves out beyond 15 pixels: the Moffat profile and an aureole, as far as `reach`.

        In the units of `intensity`, at offsets from the centre [pixels].
        """
        radius = np.hypot(y, x)
        scale = 0.5 * self.fwhm_pix / np.sqrt(2.0 ** (1.0 / self.beta) - 1.0)
        moffat = (1.0 + (radius / scale) ** 2) ** -self.beta
        aureole = _AUREOLE * (np.maximum(radius, 1.0) / _STAMP_RADIUS) ** -2.5
        taper = np.clip((radius / _STAMP_RADIUS - 0.75) / 0.25, 0.0, 1.0)
        return np.asarray((moffat + aureole) * np.sin(0.5 * np.pi * taper) ** 2 * (radius <= reach))

    def stamp(self) -> FloatArray:
        """Integrate over pixels, shape (41, 41), centred, sums to one."""
        side = int(_STAMP_SIDES[0])
        light = scipy.fft.irfft2(_psf_transform(self, side), s=(2 * side, 2 * side))[::2, ::2]
        offsets = np.arange(-_STAMP_RADIUS, _STAMP_RADIUS + 1)
        stamp = light[np.ix_(offsets, offsets)]
        return np.asarray(stamp / stamp.sum())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SimulatedScene:
    """A simulated coadd, with what is in it."""

    coadd: Coadd
    """Images [nJy] with their noise, PSF and WCS; its origin is (0, 0)."""

    peaks: NDArray[np.int64]
    """Nearest pixels (N, 2), (y, x), of the sources that are bright enough, no pixel twice."""

    truth: Table
    """All sources, one row each, also those without a peak. Columns:

    ``y``, ``x``: centre [pixels]; ``peak_index``: row of `peaks`, or -1; ``is_star``; ``sersic_n``: index of the
    component that holds most of the light, 1 or 4, NaN for stars; ``half_light_radius`` of disc and bulge and
    ``disc_radius``, ``bulge_radius`` of its parts [pixels, geometric mean of the axes, before the PSF; 0 for stars];
    ``axis_ratio``; ``angle`` [deg, from +x towards +y]; ``{band}_flux`` [nJy], the total, and ``{band}_bulge_flux``,
    the part in the bulge; ``snr``: of a fit to the source alone, all bands together; ``blendedness``:
    1 - (S . S) / (S . all), with S the source summed over the bands in units of their noise; ``inside``: share of its
    light that falls on the image.
    """

    knots: Table
    """Knots of all sources, one row each; none where `kind` is not "knots". Their flux is part of that of their source.

    ``source``: row of `truth`; ``y``, ``x``: centre [pixels]; ``radius``: half-light radius [pixels, before the PSF];
    ``{band}_flux`` [nJy].
    """

    psfs: tuple[MoffatPsf, ...]
    """PSF of each band."""

    seed: int
    """What the scene was drawn from."""

    kind: Kind
    """What kind of scene it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Light:
    """What is needed to draw one source without its knots, or one knot; a star is a disc and bulge of radius zero."""

    y: float
    x: float
    flux: FloatArray
    bulge_flux: FloatArray
    disc_radius: float
    bulge_radius: float
    axis_ratio: float
    angle: float


class PsfsAt(Protocol):
    """Gives the PSF of every band at a position."""

    def __call__(self, *, y: float, x: float) -> tuple[MoffatPsf, ...]:
        """PSFs at a position [pixels]."""
        ...


@lru_cache(maxsize=4)
def _sersic_table(n: float) -> tuple[FloatArray, FloatArray]:
    """Fourier transform of the circular Sersic profile of half-light radius and flux one: (ln k, transform)."""
    b = gammaincinv(2 * n, 0.5)
    radius = np.logspace(-12, 6, 8192)
    step = np.log(radius[1] / radius[0])
    intensity = b ** (2 * n) / (2 * np.pi * n * gamma(2 * n)) * np.exp(-b * radius ** (1 / n))
    offset = scipy.fft.fhtoffset(step, mu=0)
    k = np.exp(offset) / radius[::-1]
    transform = 2 * np.pi * scipy.fft.fht(radius * intensity, step, mu=0, offset=offset) / k
    used = (k > 1e-5) & (k < 1e5)
    return np.log(k[used]), transform[used]


def _sersic_transform(n: float, k_square: FloatArray) -> FloatArray:
    """Evaluate the Fourier transform of a Sersic profile at squared wave numbers, in units of 1 / half-light radius."""
    if n == 1.0:
        return np.asarray((1.0 + k_square / gammaincinv(2.0, 0.5) ** 2) ** -1.5)
    log_k, transform = _sersic_table(n)
    return np.interp(0.5 * np.log(np.maximum(k_square, 1e-20)), log_k, transform, left=1.0, right=0.0)


def _wave_numbers(side: int) -> tuple[FloatArray, FloatArray]:
    """Wave numbers [rad / pixel] of a grid of `side` pixels, sampled twice per pixel."""
    return 2 * np.pi * scipy.fft.fftfreq(2 * side, 0.5)[:, None], 2 * np.pi * scipy.fft.rfftfreq(2 * side, 0.5)


@lru_cache(maxsize=48)
def _psf_transform(psf: MoffatPsf, side: int) -> FloatArray:
    """Fourier transform of a PSF integrated over pixels, shape (2 side, side + 1); real, as the PSF is even."""
    offsets = scipy.fft.fftfreq(2 * side, 1.0 / side)
    transform = scipy.fft.rfft2(psf.intensity(offsets[:, None], offsets)).real
    k_y, k_x = _wave_numbers(side)
    pixel = np.sinc(k_y / (2 * np.pi)) * np.sinc(k_x / (2 * np.pi))
    return np.asarray(transform / transform[0, 0] * pixel)


def _reach(n: float, radius: float, flux: float, axis_ratio: float) -> float:
    """Major-axis radius [pixels] at which a profile falls below `_FAINTEST` sigma per pixel; `flux` is in sigma.

    Never farther than where 99.9 % of the light lies inside.
    """
    if radius == 0.0 or flux <= 0.0:
        return 0.0
    b = gammaincinv(2 * n, 0.5)
    steps = np.logspace(-1, 2, 200)
    intensity = b ** (2 * n) / (2 * np.pi * n * gamma(2 * n)) * np.exp(-b * steps ** (1 / n)) * flux / radius**2
    beyond = (intensity < _FAINTEST) | (gammainc(2 * n, b * steps ** (1 / n)) > 0.999)
    return float(steps[np.argmax(beyond)] * radius / np.sqrt(axis_ratio))


def _draw(light: _Light, psfs: Sequence[MoffatPsf], sigma: FloatArray) -> tuple[FloatArray, Box]:
    """Draw one light without noise, shape (B, h, w).

    The stamp is periodic: the little light that lies beyond its edge comes back at the other side, so that
    the flux is exact. Sampling twice per pixel keeps PSFs down to 2.5 pixels free of aliasing.
    """
    disc_flux = light.flux - light.bulge_flux
    reach = max(
        _reach(_DISC, light.disc_radius, float((disc_flux / sigma).max()), light.axis_ratio),
        _reach(_BULGE, light.bulge_radius, float((light.bulge_flux / sigma).max()), light.axis_ratio),
    )
    fits = 2 * (_STAMP_RADIUS + 1 + reach) <= _STAMP_SIDES
    side = int(_STAMP_SIDES[np.argmax(fits)] if fits.any() else _STAMP_SIDES[-1])
    y0, x0 = round(light.y) - side // 2, round(light.x) - side // 2
    k_y, k_x = _wave_numbers(side)

    phase = np.exp(-1j * k_y * (light.y - y0)) * np.exp(-1j * k_x * (light.x - x0))
    disc, bulge = phase, np.zeros(())
    if light.disc_radius > 0 or light.bulge_flux.any():
        along = k_x * np.cos(light.angle) + k_y * np.sin(light.angle)
        across = k_y * np.cos(light.angle) - k_x * np.sin(light.angle)
        k_square = along**2 / light.axis_ratio + across**2 * light.axis_ratio
        disc = phase * _sersic_transform(_DISC, k_square * light.disc_radius**2)
        if light.bulge_flux.any():
            bulge = phase * _sersic_transform(_BULGE, k_square * light.bulge_radius**2)
    image = np.empty((len(psfs), side, side))
    for b, psf in enumerate(psfs):
        transform = (disc_flux[b] * disc + light.bulge_flux[b] * bulge) * _psf_transform(psf, side)
        image[b] = 4.0 * scipy.fft.irfft2(transform, s=(2 * side, 2 * side), overwrite_x=True)[::2, ::2]
    return image, Box(y0, x0, side, side)


def _draw_source(lights: Sequence[_Light], psfs: Sequence[MoffatPsf], sigma: FloatArray) -> tuple[FloatArray, Box]:
    """Draw one source with its knots, without noise, shape (B, h, w)."""
    drawn = [_draw(light, psfs, sigma) for light in lights]
    box = drawn[0][1]
    for _, own in drawn[1:]:
        box |= own
    image = np.zeros((len(psfs), *box.shape))
    for light, own in drawn:
        image[(slice(None), *own.within(box))] += light
    return image, box


def _fluxes(
    magnitude: FloatArray,
    redness: FloatArray,
    blue: Mapping[str, float],
    red: Mapping[str, float],
    bands: Sequence[str],
) -> FloatArray:
    """Fluxes [nJy], shape (N, B), of sources with an i-band magnitude and a colour between two extremes."""
    colours = np.array([[blue[band], red[band]] for band in bands])
    offset = colours[:, 0] + redness[:, None] * (colours[:, 1] - colours[:, 0])
    return np.asarray(10.0 ** (-0.4 * (magnitude[:, None] + offset - ZERO_POINT)))


def _half_light_radius(bulge_fraction: FloatArray, disc_radius: FloatArray, bulge_radius: FloatArray) -> FloatArray:
    """Radii that hold half the light of discs and bulges, shape (N,); 0 where the disc has none. By bisection."""
    disc, bulge = np.where(disc_radius > 0, disc_radius, 1.0), np.where(disc_radius > 0, bulge_radius, 1.0)
    low, high = np.minimum(disc, bulge), np.maximum(disc, bulge)
    for _ in range(40):
        radius = 0.5 * (low + high)
        enclosed = (1 - bulge_fraction) * gammainc(2 * _DISC, gammaincinv(2 * _DISC, 0.5) * radius / disc)
        enclosed += bulge_fraction * gammainc(
            2 * _BULGE, gammaincinv(2 * _BULGE, 0.5) * (radius / bulge) ** (1 / _BULGE)
        )
        low, high = np.where(enclosed < 0.5, radius, low), np.where(enclosed < 0.5, high, radius)
    return np.where(disc_radius > 0, 0.5 * (low + high), 0.0)


def _draw_positions(
    kind: Kind, n_sources: int, shape: tuple[int, int], fwhm_pix: float, rng: np.random.Generator
) -> FloatArray:
    """Positions (N, 2), (y, x), inside the image."""
    size = np.array(shape, dtype=float)
    margin = np.minimum(8.0, 0.1 * size)
    positions = rng.uniform(margin, size - 1 - margin, (n_sources, 2))
    if kind == "pair":
        # The second of each pair lies at a random distance from the first; a lone pair stands in the middle.
        first = positions[::2]
        if n_sources == 2:
            first[:] = 0.5 * (size - 1) + rng.uniform(-0.5, 0.5, 2)
        second = positions[1::2]
        distance = fwhm_pix * rng.uniform(0.7, 3.0, len(second))
        direction = rng.uniform(0.0, 2.0 * np.pi, len(second))
        second[:] = first[: len(second)] + distance[:, None] * np.stack([np.sin(direction), np.cos(direction)], axis=1)
    elif kind == "crowded":
        # Plummer sphere seen in projection, a fifth of the sources spread evenly.
        share = rng.uniform(0.0, 0.95, n_sources)
        radius = 0.2 * size.min() * np.sqrt(share / (1.0 - share))
        direction = rng.uniform(0.0, 2.0 * np.pi, n_sources)
        member = 0.5 * (size - 1) + radius[:, None] * np.stack([np.sin(direction), np.cos(direction)], axis=1)
        inside = ((member >= margin) & (member <= size - 1 - margin)).all(axis=1)
        positions = np.where((inside & (rng.uniform(size=n_sources) > 0.2))[:, None], member, positions)
    elif kind == "bright":
        positions[0] = 0.5 * (size - 1) + rng.uniform(-0.1, 0.1, 2) * size
    return np.asarray(np.clip(positions, 0.0, size - 1))


def _draw_truth(
    kind: Kind,
    n_sources: int,
    shape: tuple[int, int],
    bands: Sequence[str],
    star_fraction: float,
    magnitudes: tuple[float, float],
    pixel_scale_arcsec: float,
    fwhm_pix: float,
    rng: np.random.Generator,
) -> tuple[Table, Table]:
    """Draw the sources and their knots: the first columns of `SimulatedScene.truth`, and `SimulatedScene.knots`."""
    positions = _draw_positions(kind, n_sources, shape, fwhm_pix, rng)
    is_star = rng.uniform(size=n_sources) < star_fraction

    # Counts rise as 10^(slope magnitude), less steeply for stars.
    slope = np.where(is_star, 0.15, 0.3)
    brightest, faintest = magnitudes
    share = rng.uniform(size=n_sources)
    span = 10.0 ** (slope * (faintest - brightest)) - 1.0
    magnitude = brightest + np.log10(1.0 + share * span) / slope
    if kind == "bright":
        magnitude[0] = brightest - rng.uniform(1.5, 3.0)
        is_star[0] = rng.uniform() < 0.5

    size_arcsec = 0.4 * 10.0 ** (-0.1 * (magnitude - 24.0) + 0.15 * rng.normal(size=n_sources))
    disc_radius = np.where(is_star, 0.0, np.maximum(size_arcsec, 0.05) / pixel_scale_arcsec)
    bulge_radius = disc_radius * 10.0 ** rng.uniform(-0.6, -0.2, n_sources)
    axis_ratio = np.where(is_star, 1.0, rng.uniform(0.3, 1.0, n_sources))
    angle = rng.uniform(0.0, 180.0, n_sources)
    bulge_share = np.where(is_star, 0.0, rng.beta(0.7, 1.6, n_sources))

    redness = rng.uniform(size=n_sources)
    stars = _fluxes(magnitude, redness**0.7, _BLUE_STAR, _RED_STAR, bands)
    disc = _fluxes(magnitude, 0.6 * redness, _BLUE_GALAXY, _RED_GALAXY, bands)
    bulge = _fluxes(magnitude, 0.4 + 0.6 * rng.uniform(size=n_sources), _BLUE_GALAXY, _RED_GALAXY, bands)
    bulge_flux = bulge_share[:, None] * bulge
    flux = np.where(is_star[:, None], stars, (1.0 - bulge_share[:, None]) * disc + bulge_flux)
    fraction = bulge_flux.sum(axis=1) / flux.sum(axis=1)

    truth = Table()
    truth["y"], truth["x"] = positions.T
    truth["is_star"] = is_star
    truth["sersic_n"] = np.where(is_star, np.nan, np.where(fraction > 0.5, _BULGE, _DISC))
    truth["half_light_radius"] = _half_light_radius(fraction, disc_radius, bulge_radius)
    truth["disc_radius"], truth["bulge_radius"] = disc_radius, bulge_radius
    truth["axis_ratio"] = axis_ratio
    truth["angle"] = angle * units.deg

    irregular = np.flatnonzero(~is_star & (kind == "knots"))
    knots, share = _draw_knots(truth, magnitude, irregular, bands, rng)
    bulge_flux *= 1.0 - share[:, None]
    flux *= 1.0 - share[:, None]
    for b, band in enumerate(bands):
        flux[:, b] += np.bincount(knots["source"], knots[f"{band}_flux"], minlength=n_sources)
    for b, band in enumerate(bands):
        truth[f"{band}_flux"] = flux[:, b] * units.nJy
    for b, band in enumerate(bands):
        truth[f"{band}_bulge_flux"] = bulge_flux[:, b] * units.nJy
    return truth, knots


def _draw_knots(
    truth: Table, magnitude: FloatArray, irregular: NDArray[np.int64], bands: Sequence[str], rng: np.random.Generator
) -> tuple[Table, FloatArray]:
    """Draw the knots of the sources numbered by `irregular`, and the share of the light in i of each source in knots.

    Of the light in i, 0.2 to 0.5 goes into 3 to 8 knots. They lie as the light of the disc does, inside the ellipse of
    90 %. Their fluxes follow the luminosity function of H II regions, of slope -2 (Kennicutt, Edgar & Hodge 1989), over
    a factor of ten; half-light radii are 0.04 to 0.1 arcsec on pixels of 0.2 arcsec, at a redshift of a half 250 to
    600 pc, the size of star-forming complexes. The colour of each lies between young stars and the bluest galaxies.
    """
    source = np.repeat(irregular, rng.integers(3, 9, len(irregular)))
    n_knots = len(source)
    share = np.zeros(len(truth))
    share[irregular] = rng.uniform(0.2, 0.5, len(irregular))
    weight = 1.0 / rng.uniform(0.1, 1.0, n_knots)
    weight /= np.bincount(source, weight, minlength=len(truth))[source]
    knot_magnitude = magnitude[source] - 2.5 * np.log10(share[source] * weight)
    flux = _fluxes(knot_magnitude, rng.uniform(size=n_knots), _YOUNG, _BLUE_GALAXY, bands)

    # Radius and direction where the disc is round, then squeezed and turned onto its ellipse.
    radius = gammaincinv(2 * _DISC, rng.uniform(0.0, 0.9, n_knots)) / gammaincinv(2 * _DISC, 0.5)
    radius *= np.asarray(truth["disc_radius"])[source]
    direction = rng.uniform(0.0, 2.0 * np.pi, n_knots)
    root = np.sqrt(np.asarray(truth["axis_ratio"])[source])
    along, across = radius * np.cos(direction) / root, radius * np.sin(direction) * root
    angle = np.deg2rad(np.asarray(truth["angle"])[source])

    knots = Table()
    knots["source"] = source
    knots["y"] = np.asarray(truth["y"])[source] + along * np.sin(angle) + across * np.cos(angle)
    knots["x"] = np.asarray(truth["x"])[source] + along * np.cos(angle) - across * np.sin(angle)
    knots["radius"] = rng.uniform(0.2, 0.5, n_knots)
    for b, band in enumerate(bands):
        knots[f"{band}_flux"] = flux[:, b] * units.nJy
    return knots, share


def _lights(truth: Table, knots: Table, bands: Sequence[str]) -> list[list[_Light]]:
    """Read what is needed to draw each source back from the tables: the source without its knots, then its knots."""
    knot_flux = np.array([knots[f"{band}_flux"] for band in bands], dtype=float).reshape(len(bands), -1).T
    flux = np.array([truth[f"{band}_flux"] for band in bands], dtype=float).reshape(len(bands), -1).T.copy()
    bulge_flux = np.array([truth[f"{band}_bulge_flux"] for band in bands], dtype=float).reshape(len(bands), -1).T
    np.subtract.at(flux, np.asarray(knots["source"], dtype=np.int64), knot_flux)
    names = ("y", "x", "disc_radius", "bulge_radius", "axis_ratio", "angle")
    columns = [np.asarray(truth[name], dtype=float).tolist() for name in names]
    lights = [
        [
            _Light(
                y=y,
                x=x,
                flux=flux[k],
                bulge_flux=bulge_flux[k],
                disc_radius=disc_radius,
                bulge_radius=bulge_radius,
                axis_ratio=axis_ratio,
                angle=np.deg2rad(angle),
            )
        ]
        for k, (y, x, disc_radius, bulge_radius, axis_ratio, angle) in enumerate(zip(*columns, strict=True))
    ]
    columns = [np.asarray(knots[name]).tolist() for name in ("source", "y", "x", "radius")]
    for j, (source, y, x, radius) in enumerate(zip(*columns, strict=True)):
        lights[source].append(
            _Light(
                y=y,
                x=x,
                flux=knot_flux[j],
                bulge_flux=np.zeros(len(bands)),
                disc_radius=radius,
                bulge_radius=0.0,
                axis_ratio=1.0,
                angle=0.0,
            )
        )
    return lights


def _lights_of(truth: Table, knots: Table, k: int, bands: Sequence[str]) -> list[_Light]:
    """Read what is needed to draw one source."""
    mine = knots[np.flatnonzero(np.asarray(knots["source"]) == k)]
    mine["source"] = np.zeros(len(mine), dtype=np.int64)
    return _lights(truth[k : k + 1], mine, bands)[0]


def _choose_peaks(
    truth: Table, min_snr: float, min_separation_pix: float, seen: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Peaks (N, 2) in the order of the table, and the row of `peaks` or -1 of each source; only of those `seen`."""
    positions = np.stack([truth["y"], truth["x"]], axis=1)
    pixels = np.rint(positions).astype(np.int64)
    snr = np.asarray(truth["snr"])
    able = snr > min_snr
    if seen is not None:
        able &= seen
    near = [[] for _ in snr] if min_separation_pix == 0 else _neighbours(positions, min_separation_pix)
    chosen = np.zeros(len(truth), dtype=bool)
    taken: set[tuple[int, int]] = set()
    for k in np.argsort(-snr, kind="stable").tolist():
        pixel = (int(pixels[k, 0]), int(pixels[k, 1]))
        if able[k] and pixel not in taken and not chosen[near[k]].any():
            chosen[k] = True
            taken.add(pixel)
    peak_index = np.full(len(truth), -1, dtype=np.int64)
    peak_index[chosen] = np.arange(chosen.sum())
    return pixels[chosen], peak_index


def _neighbours(positions: FloatArray, distance: float) -> list[list[int]]:
    """Rows of the positions (N, 2) that lie closer than a distance to each, itself included."""
    tree = KDTree(positions)
    return [tree.query_ball_point(position, np.nextafter(distance, 0.0)) for position in positions]


def _tangent_plane(shape: tuple[int, int], pixel_scale_arcsec: float) -> WCS:
    """North up, east left, the middle of the image near the COSMOS field."""
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval = [150.1, 2.2]
    wcs.wcs.crpix = [0.5 * (shape[1] + 1), 0.5 * (shape[0] + 1)]
    wcs.wcs.cdelt = [-pixel_scale_arcsec / 3600.0, pixel_scale_arcsec / 3600.0]
    wcs.wcs.set()
    return wcs


def _check_drawing(
    shape: tuple[int, int],
    bands: tuple[str, ...],
    depth: Mapping[str, float],
    star_fraction: float,
    magnitudes: tuple[float, float],
    pixel_scale_arcsec: float,
) -> None:
    """Refuse what cannot be drawn."""
    if min(shape) < 1:
        raise InputError(f"shape must have sides >= 1, got {shape}")
    if not bands or not set(bands) <= set(_BETA):
        raise InputError(f"bands must be some of {', '.join(_BETA)}, got {bands}")
    if not set(bands) <= set(depth):
        raise InputError(f"depth must name every band of {bands}, got {tuple(depth)}")
    if not 0 <= star_fraction <= 1:
        raise InputError(f"star_fraction must lie between 0 and 1, got {star_fraction}")
    if not magnitudes[0] < magnitudes[1]:
        raise InputError(f"magnitudes must be (brightest, faintest) with brightest < faintest, got {magnitudes}")
    if not 0.08 <= pixel_scale_arcsec <= 0.25:
        raise InputError(f"pixel_scale_arcsec must lie between 0.08 and 0.25, got {pixel_scale_arcsec}")


def _draw_psfs(bands: Sequence[str], pixel_scale_arcsec: float, rng: np.random.Generator) -> tuple[MoffatPsf, ...]:
    """Draw the PSF of each band: the seeing of LSST within 5 %, and a slight ellipticity."""
    return tuple(
        MoffatPsf(
            fwhm_pix=_FWHM_ARCSEC[band] / pixel_scale_arcsec * rng.uniform(0.95, 1.05),
            beta=_BETA[band],
            axis_ratio=rng.uniform(0.93, 1.0),
            angle=rng.uniform(0.0, np.pi),
        )
        for band in bands
    )


def _sky_noise(bands: Sequence[str], depth: Mapping[str, float], stamps: FloatArray) -> NDArray[Any]:
    """Noise per pixel [nJy] of each band, (B,), that gives point sources with the PSFs `stamps` the depth."""
    flux_error = np.array([10.0 ** (-0.4 * (depth[band] - ZERO_POINT)) / 5.0 for band in bands])
    return np.asarray(flux_error * np.sqrt((stamps**2).sum(axis=(1, 2))))


def simulate_scene(
    *,
    n_sources: int | None = None,
    shape: tuple[int, int] | None = None,
    bands: Sequence[str] = ("u", "g", "r", "i", "z", "y"),
    seed: int = 0,
    star_fraction: float | None = None,
    kind: Kind = "field",
    magnitudes: tuple[float, float] = (19.5, 27.0),
    depth: Mapping[str, float] = DEPTH,
    pixel_scale_arcsec: float = 0.2,
    min_snr: float = 5.0,
    min_separation_pix: float = 0.0,
) -> SimulatedScene:
    """Simulate one scene of stars and galaxies with known truth.

    Galaxies are an exponential disc and a de Vaucouleurs bulge on one ellipse, each with its own colours; stars are
    point sources. Each band has its own slightly elliptical Moffat PSF and the white noise of its depth.

    Parameters
    ----------
    n_sources : int, optional
        Number of sources; None: 40, or what suits the kind. May be 0.
    shape : tuple of int, optional
        Height and width [pixels]; None: (160, 160), or what suits the kind.
    bands : sequence of str, optional
        Some of u, g, r, i, z, y, in any order.
    seed : int, optional
        The same seed gives the same scene.
    star_fraction : float, optional
        Share of stars; None: a quarter, and all of them where `kind` is "crowded".
    kind : {"field", "knots", "pair", "crowded", "bright"}, optional
        "field": spread evenly. "knots": a field of irregular galaxies, a third of whose light lies in compact knots,
        bluer than the rest and scattered over the disc. "pair": two by two, 0.7 to 3 PSF widths apart. "crowded": a
        star cluster. "bright": the first source is several magnitudes brighter than the rest, and as often a star as
        a galaxy.
    magnitudes : tuple of float, optional
        Brightest and faintest AB magnitude in i. Counts rise towards the faint end, sizes shrink.
    depth : mapping of str to float, optional
        AB magnitude of a point source at five sigma, per band.
    pixel_scale_arcsec : float, optional
        Side of a pixel; at 0.2 the PSFs are 3.3 to 4.6 pixels wide.
    min_snr : float, optional
        Sources of this signal-to-noise or less get no peak.
    min_separation_pix : float, optional
        Sources closer than this to a brighter one with a peak get none, as a detection would not tell them apart.

    Returns
    -------
    scene : SimulatedScene

    Raises
    ------
    InputError
        If an argument lies outside its range.

    Notes
    -----
    The noise is that of the sky alone. Time and memory grow linearly with pixels and sources: about 3 ms per source.

    Examples
    --------
    >>> scene = simulate_scene(n_sources=5, shape=(64, 64), bands=("g", "r"), seed=1)
    >>> scene.coadd.images.shape, len(scene.truth)
    ((2, 64, 64), 5)
    """
    if kind not in get_args(Kind):
        raise InputError(
            f"kind must be one of {', '.join(get_args(Kind))}; or, for simulate_patch, {', '.join(PATCH_KINDS)}; "
            f"got {kind!r}"
        )
    n_sources = _DEFAULTS[kind][0] if n_sources is None else int(n_sources)
    height, width = _DEFAULTS[kind][1] if shape is None else (int(shape[0]), int(shape[1]))
    if star_fraction is None:
        star_fraction = 1.0 if kind == "crowded" else 0.25
    bands = tuple(bands)
    if n_sources < 0:
        raise InputError(f"n_sources must be >= 0, got {n_sources}")
    _check_drawing((height, width), bands, depth, star_fraction, magnitudes, pixel_scale_arcsec)
    if not min_snr >= 0:
        raise InputError(f"min_snr must be >= 0, got {min_snr}")
    if not min_separation_pix >= 0:
        raise InputError(f"min_separation_pix must be >= 0, got {min_separation_pix}")

    rng = np.random.default_rng(seed)
    psfs = _draw_psfs(bands, pixel_scale_arcsec, rng)
    stamps = np.array([psf.stamp() for psf in psfs])
    sigma = _sky_noise(bands, depth, stamps)

    truth, knots = _draw_truth(
        kind,
        n_sources,
        (height, width),
        bands,
        star_fraction,
        magnitudes,
        pixel_scale_arcsec,
        float(np.mean([psf.fwhm_pix for psf in psfs])),
        rng,
    )
    images = rng.standard_normal((len(bands), height, width), dtype=np.float32)
    images *= sigma.astype(np.float32)[:, None, None]
    _add_sources(images, truth, knots, psfs, bands, sigma)
    peaks, peak_index = _choose_peaks(truth, min_snr, min_separation_pix)
    truth.add_column(peak_index, name="peak_index", index=2)
    coadd = Coadd(
        images=images,
        variance=sigma**2,
        psfs=stamps,
        bands=bands,
        wcs=_tangent_plane((height, width), pixel_scale_arcsec),
        unit=units.nJy,
        zero_point=ZERO_POINT,
        name=f"simulated {kind}, seed {seed}",
    )
    return SimulatedScene(coadd=coadd, peaks=peaks, truth=truth, knots=knots, psfs=psfs, seed=seed, kind=kind)


def _add_sources(
    images: NDArray[np.float32],
    truth: Table,
    knots: Table,
    psfs: Sequence[MoffatPsf] | PsfsAt,
    bands: Sequence[str],
    sigma: FloatArray,
) -> None:
    """Add every source to `images`, in place; add the columns of `truth` that say how it is seen.

    Each is drawn with `psfs`, or with what they are at its centre.
    """
    image_box = Box.of_shape(images.shape)
    significance = np.zeros(image_box.shape)
    stamps: list[tuple[NDArray[np.float32], tuple[slice, slice]]] = []
    snr, inside = np.zeros(len(truth)), np.zeros(len(truth))
    lights = _lights(truth, knots, bands)
    for k in range(len(truth)):
        own = psfs(y=lights[k][0].y, x=lights[k][0].x) if callable(psfs) else psfs
        stamp, box = _draw_source(lights[k], own, sigma)
        seen = stamp[(slice(None), *image_box.within(box))]
        window = box.within(image_box)
        images[(slice(None), *window)] += seen
        inside[k] = min(1.0, seen.sum() / stamp.sum())
        seen /= sigma[:, None, None]
        snr[k] = np.sqrt((seen**2).sum())
        collapsed = seen.sum(axis=0)
        significance[window] += collapsed
        stamps.append((collapsed.astype(np.float32), window))
    truth["snr"] = snr
    truth["blendedness"] = [
        1.0 - float((stamp.astype(float) ** 2).sum() / max((stamp * significance[window]).sum(), 1e-300))
        for stamp, window in stamps
    ]
    truth["inside"] = inside


def render_truth(scene: SimulatedScene, k: int) -> tuple[NDArray[np.float32], Box]:
    """Render one source as it is in the images, without noise and without the others.

    Parameters
    ----------
    scene : SimulatedScene
    k : int
        Row of `scene.truth`.

    Returns
    -------
    image : ndarray, shape (B, h, w)
        Flux per pixel [nJy]. Not cut at the edge of the image, so that it sums to the flux of the source.
    box : Box
        Where it lies, in the coadd's coordinates; may reach beyond the image.
    """
    image, box = _draw_source(_lights_of(scene.truth, scene.knots, k, scene.coadd.bands), scene.psfs, _noise(scene))
    return image.astype(np.float32), box


def compute_oracle_sigma(scene: SimulatedScene) -> FloatArray:
    """Compute the flux errors that a joint linear fit of the true shapes would have: no method can do better.

    Parameters
    ----------
    scene : SimulatedScene

    Returns
    -------
    sigma : ndarray, shape (N, B)
        Errors of the total fluxes [nJy] of the sources with peaks, in the order of `scene.peaks`.

    Notes
    -----
    The Cramer-Rao bound: in each band the roots of the diagonal of the inverse of F_ij = S_i . S_j / variance, where
    S_i is what the image holds of source i per unit of its total flux, in that band and without noise. A lone source
    inside the image has sqrt(variance / S . S). Sources without a peak are not fitted. The cost grows with the number
    of pairs whose stamps overlap, and with the cube of the number of peaks.

    Examples
    --------
    >>> scene = simulate_scene(n_sources=5, shape=(64, 64), bands=("g", "r"), seed=1)
    >>> compute_oracle_sigma(scene).shape == (len(scene.peaks), 2)
    True
    """
    noise = _noise(scene)
    bands = scene.coadd.bands
    rows = np.flatnonzero(np.asarray(scene.truth["peak_index"]) >= 0)
    shapes: list[tuple[FloatArray, Box]] = []
    lights = _lights(scene.truth, scene.knots, bands)
    for k in rows:
        image, box = _draw_source(lights[k], scene.psfs, noise)
        image /= (image.sum(axis=(1, 2)) * noise)[:, None, None]
        shapes.append((image[(slice(None), *scene.coadd.box.within(box))], box & scene.coadd.box))

    fisher = np.zeros((len(bands), len(rows), len(rows)))
    for i, (first, first_box) in enumerate(shapes):
        for j, (second, second_box) in enumerate(shapes[: i + 1]):
            if not (first_box & second_box).is_empty:
                mine = first[(slice(None), *second_box.within(first_box))]
                other = second[(slice(None), *first_box.within(second_box))]
                fisher[:, i, j] = fisher[:, j, i] = np.einsum("bhw,bhw->b", mine, other)
    # Scaled to a diagonal of one, the matrix is as well conditioned as it can be.
    alone = 1.0 / np.sqrt(np.diagonal(fisher, axis1=1, axis2=2))
    correlation = fisher * alone[:, :, None] * alone[:, None, :]
    joint = np.diagonal(np.linalg.inv(correlation), axis1=1, axis2=2)
    return np.asarray((alone * np.sqrt(joint)).T)


def _noise(scene: SimulatedScene) -> FloatArray:
    """Noise per pixel [nJy] of each band; it is the same in all pixels."""
    return np.asarray(np.sqrt(scene.coadd.variance[:, 0, 0].astype(float)))


# ---------------------------------------------------------------- patches of a survey

PatchKind = Literal["patch", "stars"]
PATCH_KINDS: tuple[PatchKind, ...] = get_args(PatchKind)

SKY_MAGNITUDE: Mapping[str, float] = {"u": 22.95, "g": 22.24, "r": 21.20, "i": 20.47, "z": 19.60, "y": 18.63}
"""Dark sky at the LSST site [AB mag per square arcsec] (Ivezic et al. 2019, table 2)."""

PATCH_PLANES: Mapping[str, int] = {"BAD": 0, "SAT": 1, "INTRP": 2, "EDGE": 3, "NO_DATA": 4}
"""Bits of the mask of a simulated patch; SAT and NO_DATA are used."""

_PATCH_SHAPES: Mapping[PatchKind, tuple[int, int]] = {"patch": (3400, 3400), "stars": (1000, 1000)}
_PATCH_DENSITIES: Mapping[PatchKind, float] = {"patch": 70.0, "stars": 1800.0}
_OUTSIDE = 20  # sources this far [pixels] outside the image still throw light on it
_AUREOLE = 2e-5  # brightness of the aureole 20 pixels from a star, for a peak of one
_WING_FAINTEST = 0.02  # wings end where they fall below this many sigma per pixel ...
_WING_REACH = 600  # ... or this many pixels from the star


@dataclass(frozen=True, slots=True, kw_only=True)
class VaryingPsf:
    """PSFs whose width and ellipticity vary smoothly over an image; a PSF field that a coadd takes as `psfs`."""

    bands: tuple[str, ...]
    """Names of the bands."""

    psfs: tuple[MoffatPsf, ...]
    """PSF of each band where nothing is added."""

    shape: tuple[int, int]
    """Height and width of the image over which it varies [pixels]."""

    variation: float
    """Amplitude: the width varies by this share of itself either way, the two components of ellipticity by as much."""

    def at(self, *, y: float, x: float) -> tuple[MoffatPsf, ...]:
        """Make the PSF of every band at a position; the same outside the image as at its edge."""
        v = 2.0 * min(max(y / self.shape[0], 0.0), 1.0) - 1.0
        u = 2.0 * min(max(x / self.shape[1], 0.0), 1.0) - 1.0
        out = []
        for b, psf in enumerate(self.psfs):
            # Each band varies in its own way, as exposures of other nights went into it.
            turn = 1.3 * b
            width = 1.0 + self.variation * np.sin(2.0 * u + turn) * np.cos(1.5 * v - turn)
            size = (1.0 - psf.axis_ratio) / (1.0 + psf.axis_ratio)
            e1 = size * np.cos(2.0 * psf.angle) + self.variation * np.sin(1.7 * v + turn)
            e2 = size * np.sin(2.0 * psf.angle) + self.variation * np.sin(1.4 * u - turn)
            size = min(float(np.hypot(e1, e2)), 0.5)
            out.append(
                MoffatPsf(
                    fwhm_pix=psf.fwhm_pix * float(width),
                    beta=psf.beta,
                    axis_ratio=(1.0 - size) / (1.0 + size),
                    angle=0.5 * float(np.arctan2(e2, e1)),
                )
            )
        return tuple(out)

    def __call__(self, y: float, x: float, band: str) -> FloatArray:
        """PSF stamp (41, 41) of a band at a position."""
        return self.at(y=y, x=x)[self.bands.index(band)].stamp()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SimulatedPatch:
    """A simulated patch of a survey, with what is in it."""

    coadd: Coadd
    """Images [nJy] with their noise, mask, PSF and WCS; its origin is (0, 0). Without data images are NaN and variances
    infinite; saturated pixels hold the level at which they are full."""

    peaks: NDArray[np.int64]
    """Nearest pixels (N, 2), (y, x), of the sources that are bright enough and lie where there are data in some band,
    no pixel twice."""

    truth: Table
    """All sources, one row each: the large galaxy, the bright stars, the others. Columns as in `SimulatedScene.truth`.

    Flux is that in the PSF stamp; the wings of bright stars beyond it come in addition. ``snr`` and ``blendedness``
    are those for the noise of the sky alone, as if no pixel were saturated or without data.
    """

    knots: Table
    """Knots of the large galaxy, as in `SimulatedScene.knots`. Their flux is part of that of the galaxy."""

    psfs: tuple[MoffatPsf, ...]
    """PSF of each band; where the PSF varies, that without its variation."""

    sigma: FloatArray
    """Noise per pixel of the sky alone [nJy], shape (B,)."""

    saturation: FloatArray
    """Level at which pixels are full [nJy], shape (B,)."""

    seed: int
    """What the patch was drawn from."""

    kind: PatchKind
    """What kind of patch it is."""


def simulate_patch(
    *,
    kind: PatchKind = "patch",
    shape: tuple[int, int] | None = None,
    bands: Sequence[str] = ("u", "g", "r", "i", "z", "y"),
    seed: int = 0,
    density_arcmin2: float | None = None,
    star_fraction: float | None = None,
    n_bright_stars: int | None = None,
    large_galaxy: bool | None = None,
    masked_strip: bool | None = None,
    faint: bool = False,
    magnitudes: tuple[float, float] | None = None,
    saturation_magnitude: float = 17.0,
    psf_variation: float = 0.0,
    depth: Mapping[str, float] = DEPTH,
    pixel_scale_arcsec: float = 0.2,
    min_snr: float = 5.0,
    min_separation_pix: float = 0.0,
) -> SimulatedPatch:
    """Simulate a patch of a survey, with all that makes real ones hard.

    The sources are those of `simulate_scene`. In addition, bright stars saturate and have wings far beyond the PSF
    stamp, bright light has the noise of its photons, one galaxy is large and has spiral arms of knots, and a strip has
    no data, three times as wide in the first band.

    Parameters
    ----------
    kind : {"patch", "stars"}, optional
        "patch": galaxies with some stars. "stars": a dense field of stars, without large galaxy and strip.
    shape : tuple of int, optional
        Height and width [pixels]; None: (3400, 3400) for a patch, (1000, 1000) for stars.
    bands : sequence of str, optional
        Some of u, g, r, i, z, y, in any order.
    seed : int, optional
        The same seed gives the same patch.
    density_arcmin2 : float, optional
        Sources per square arcminute with a signal-to-noise above `min_snr`, to about 5 %, the bright stars and the
        large galaxy not counted; None: 70 for a patch; for stars 1800 of any signal-to-noise, 20,000 in the image.
    star_fraction : float, optional
        Share of stars; None: 0.12 for a patch, 1 for stars.
    n_bright_stars : int, optional
        Stars of magnitude 13.5 to 17 in i; None: one in 10 square arcminutes, at least one.
    large_galaxy : bool, optional
        Whether there is one galaxy with a half-light radius of 5 arcsec; None: in a patch.
    masked_strip : bool, optional
        Whether a strip has no data; None: in a patch.
    faint : bool, optional
        Whether sources too faint to be detected are drawn too, down to the faintest of `magnitudes`. Takes three times
        as long.
    magnitudes : tuple of float, optional
        Brightest and faintest AB magnitude in i of the sources other than bright stars and large galaxy; None: 17.5 and
        28 for a patch, 17.5 and 26 for stars.
    saturation_magnitude : float, optional
        AB magnitude, in every band, of the faintest star whose central pixel is full.
    psf_variation : float, optional
        If above 0, the PSF is a `VaryingPsf` of that amplitude, and each source is drawn with the PSF at its centre.
        Takes twice as long.
    depth : mapping of str to float, optional
        AB magnitude of a point source at five sigma, per band.
    pixel_scale_arcsec : float, optional
        Side of a pixel.
    min_snr : float, optional
        Sources of this signal-to-noise or less get no peak.
    min_separation_pix : float, optional
        Sources closer than this to a brighter one with a peak get none.

    Returns
    -------
    patch : SimulatedPatch

    Raises
    ------
    InputError
        If an argument lies outside its range.

    Notes
    -----
    The variance is that of the sky times one plus the ratio of the light to the sky's, as photons have it. About 2 ms
    per source; the memory is that of the images and the variance twice, and of one stamp per source.

    Examples
    --------
    >>> patch = simulate_patch(shape=(200, 150), bands=("g", "r"), seed=1)
    >>> patch.coadd
    Coadd('simulated patch, seed 1', bands=('g', 'r'), height=200, width=150)
    """
    if kind not in PATCH_KINDS:
        raise InputError(f"kind must be one of {', '.join(PATCH_KINDS)}, got {kind!r}")
    height, width = _PATCH_SHAPES[kind] if shape is None else (int(shape[0]), int(shape[1]))
    density = _PATCH_DENSITIES[kind] if density_arcmin2 is None else float(density_arcmin2)
    area_arcmin2 = height * width * (pixel_scale_arcsec / 60.0) ** 2
    if n_bright_stars is None:
        n_bright_stars = max(1, round(0.1 * area_arcmin2))
    if star_fraction is None:
        star_fraction = 1.0 if kind == "stars" else 0.12
    large_galaxy = kind == "patch" if large_galaxy is None else large_galaxy
    masked_strip = kind == "patch" if masked_strip is None else masked_strip
    if magnitudes is None:
        magnitudes = (17.5, 26.0 if kind == "stars" else 28.0)
    bands = tuple(bands)
    _check_drawing((height, width), bands, depth, star_fraction, magnitudes, pixel_scale_arcsec)
    if not 0 <= density < np.inf:
        raise InputError(f"density_arcmin2 must be >= 0, got {density}")
    if n_bright_stars < 0:
        raise InputError(f"n_bright_stars must be >= 0, got {n_bright_stars}")
    if not 0 <= psf_variation <= 0.2:
        raise InputError(f"psf_variation must lie between 0 and 0.2, got {psf_variation}")
    if not min_snr >= 0:
        raise InputError(f"min_snr must be >= 0, got {min_snr}")
    if not min_separation_pix >= 0:
        raise InputError(f"min_separation_pix must be >= 0, got {min_separation_pix}")

    rng = np.random.default_rng(seed)
    psfs = _draw_psfs(bands, pixel_scale_arcsec, rng)
    stamps = np.array([psf.stamp() for psf in psfs])
    sigma = _sky_noise(bands, depth, stamps)
    field = VaryingPsf(bands=bands, psfs=psfs, shape=(height, width), variation=psf_variation)
    share = stamps.max(axis=(1, 2))
    saturation = share * 10.0 ** (-0.4 * (saturation_magnitude - ZERO_POINT))

    count = density * area_arcmin2 * (1.0 + 2.0 * _OUTSIDE / height) * (1.0 + 2.0 * _OUTSIDE / width)
    draw = _PatchDrawer(shape=(height, width), bands=bands, pixel_scale_arcsec=pixel_scale_arcsec, psfs=psfs, rng=rng)
    tables = [draw.sources(n_bright_stars, 1.0, (13.5, 17.0), inside=True)]
    if kind == "stars":
        tables.append(draw.sources(round(count), star_fraction, magnitudes))
    else:
        tables.append(draw.detected(round(count), star_fraction, magnitudes, min_snr, sigma, keep_faint=faint))
    knots = _no_knots(bands)
    if large_galaxy:
        galaxy, knots = draw.large_galaxy()
        tables.insert(0, galaxy)
    truth = vstack(tables)

    images = np.zeros((len(bands), height, width), dtype=np.float32)
    _add_sources(images, truth, knots, field.at if psf_variation > 0 else psfs, bands, sigma)
    sky = np.array([10.0 ** (-0.4 * (SKY_MAGNITUDE[band] - ZERO_POINT)) for band in bands]) * pixel_scale_arcsec**2
    variance = np.empty_like(images)
    mask = np.zeros(images.shape, dtype=np.uint8)
    _add_wings(images, truth, field.at, bands, sigma)
    for b in range(len(bands)):
        np.maximum(images[b], 0.0, out=variance[b])
        variance[b] *= np.float32(sigma[b] ** 2 / sky[b])
        variance[b] += np.float32(sigma[b] ** 2)
        noise = rng.standard_normal((height, width), dtype=np.float32)
        noise *= np.sqrt(variance[b])
        images[b] += noise
        full = images[b] >= saturation[b]
        images[b][full] = saturation[b]
        mask[b][full] |= np.uint8(1 << PATCH_PLANES["SAT"])
    has_data = np.ones((height, width), dtype=bool)
    if masked_strip:
        half = max(2, round(0.006 * width))
        middle = round(0.62 * width)
        for b in range(len(bands)):
            strip = slice(max(0, middle - (3 * half if b == 0 else half)), middle + (3 * half if b == 0 else half))
            images[b, :, strip], variance[b, :, strip] = np.nan, np.inf
            mask[b, :, strip] = 1 << PATCH_PLANES["NO_DATA"]
        has_data[:] = np.isfinite(images).any(axis=0)

    rows, columns = (np.rint(truth[name]).astype(np.int64) for name in "yx")
    seen = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    seen[seen] = has_data[rows[seen], columns[seen]]
    peaks, peak_index = _choose_peaks(truth, min_snr, min_separation_pix, seen)
    truth.add_column(peak_index, name="peak_index", index=2)
    coadd = Coadd(
        images=images,
        variance=variance,
        psfs=field if psf_variation > 0 else stamps,
        bands=bands,
        mask=mask,
        mask_planes=dict(PATCH_PLANES),
        wcs=_tangent_plane((height, width), pixel_scale_arcsec),
        unit=units.nJy,
        zero_point=ZERO_POINT,
        name=f"simulated {kind}, seed {seed}",
    )
    return SimulatedPatch(
        coadd=coadd,
        peaks=peaks,
        truth=truth,
        knots=knots,
        psfs=psfs,
        sigma=sigma,
        saturation=saturation,
        seed=seed,
        kind=kind,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _PatchDrawer:
    """Draws the tables of the sources of a patch; they have the first columns of `SimulatedScene.truth`."""

    shape: tuple[int, int]
    bands: tuple[str, ...]
    pixel_scale_arcsec: float
    psfs: tuple[MoffatPsf, ...]
    rng: np.random.Generator

    def sources(
        self, n_sources: int, star_fraction: float, magnitudes: tuple[float, float], *, inside: bool = False
    ) -> Table:
        """Sources spread evenly over the image and, unless all are to lie inside, a little beyond."""
        fwhm_pix = float(np.mean([psf.fwhm_pix for psf in self.psfs]))
        table, _ = _draw_truth(
            "field",
            n_sources,
            self.shape,
            self.bands,
            star_fraction,
            magnitudes,
            self.pixel_scale_arcsec,
            fwhm_pix,
            self.rng,
        )
        beyond = -0.5 if inside else _OUTSIDE
        for name, side in zip("yx", self.shape, strict=True):
            table[name] = self.rng.uniform(-beyond, side - 1 + beyond, n_sources)
        return table

    def detected(
        self,
        count: int,
        star_fraction: float,
        magnitudes: tuple[float, float],
        min_snr: float,
        sigma: FloatArray,
        *,
        keep_faint: bool,
    ) -> Table:
        """Sources of which `count` have a signal-to-noise above `min_snr`; the fainter ones are dropped or kept."""
        tables: list[Table] = []
        found = 0
        while not tables or (found < count and len(tables) < 50):
            table = self.sources(max(2 * count, 1), star_fraction, magnitudes)
            bright = self._expected_snr(table, sigma) > min_snr
            total = found + np.cumsum(bright)
            last = int(np.searchsorted(total, count)) + 1 if total[-1] >= count else len(table)
            found = int(total[last - 1])
            table = table[:last]
            tables.append(table if keep_faint else table[bright[:last]])
        return vstack(tables) if count > 0 else tables[0][:0]

    def _expected_snr(self, table: Table, sigma: FloatArray) -> FloatArray:
        """Signal-to-noise of the sources alone, as if they and the PSF were Gaussian."""
        square = np.zeros(len(table))
        for band, psf, noise in zip(self.bands, self.psfs, sigma, strict=True):
            stamp = psf.stamp()
            # Area of white noise that a fit of the source takes in; a Gaussian has half its light in 1.18 sigma.
            area = 1.0 / (stamp**2).sum() + 4.0 * np.pi * (np.asarray(table["half_light_radius"]) / 1.18) ** 2
            square += np.asarray(table[f"{band}_flux"], dtype=float) ** 2 / (noise**2 * area)
        return np.sqrt(square)

    def large_galaxy(self) -> tuple[Table, Table]:
        """Draw a galaxy of magnitude 15.0 with a half-light radius of 5 arcsec and spiral arms, and its knots."""
        galaxy = self.sources(1, 0.0, (15.0, 15.01))
        radius = min(5.0 / self.pixel_scale_arcsec, 0.15 * min(self.shape))
        galaxy["y"], galaxy["x"] = 0.3 * self.shape[0], 0.28 * self.shape[1]
        galaxy["disc_radius"], galaxy["bulge_radius"], galaxy["axis_ratio"] = radius, 0.3 * radius, 0.6
        flux = np.array([galaxy[f"{band}_flux"][0] for band in self.bands], dtype=float)
        i_flux = 10.0 ** (-0.4 * (15.0 - ZERO_POINT))
        colours = (
            _fluxes(np.array([15.0]), np.array([red]), _BLUE_GALAXY, _RED_GALAXY, self.bands)[0] / i_flux
            for red in (0.25, 0.6)
        )
        disc, bulge = colours
        flux, bulge_flux = i_flux * (0.8 * disc + 0.2 * bulge), i_flux * 0.2 * bulge
        fraction = np.array([bulge_flux.sum() / flux.sum()])
        galaxy["half_light_radius"] = _half_light_radius(fraction, np.array([radius]), np.array([0.3 * radius]))
        galaxy["sersic_n"] = _DISC

        # Two logarithmic spirals, knots scattered about them, in the plane of the disc; a tenth of the light in i.
        n_knots = 60
        along_arm = self.rng.uniform(0.4, 2.2, n_knots)
        turn = np.log(along_arm) / np.tan(np.deg2rad(18.0)) + np.pi * self.rng.integers(0, 2, n_knots)
        distance = radius * along_arm * (1.0 + 0.06 * self.rng.normal(size=n_knots))
        root, angle = np.sqrt(0.6), np.deg2rad(float(galaxy["angle"][0]))
        along, across = distance * np.cos(turn) / root, distance * np.sin(turn) * root
        weight = 1.0 / self.rng.uniform(0.1, 1.0, n_knots)
        magnitude = 15.0 - 2.5 * np.log10(0.1 * weight / weight.sum())
        knot_flux = _fluxes(magnitude, self.rng.uniform(size=n_knots), _YOUNG, _BLUE_GALAXY, self.bands)
        knots = Table(
            {
                "source": np.zeros(n_knots, dtype=np.int64),
                "y": float(galaxy["y"][0]) + along * np.sin(angle) + across * np.cos(angle),
                "x": float(galaxy["x"][0]) + along * np.cos(angle) - across * np.sin(angle),
                "radius": self.rng.uniform(0.5, 1.5, n_knots),
                **{f"{band}_flux": knot_flux[:, b] * units.nJy for b, band in enumerate(self.bands)},
            }
        )
        for b, band in enumerate(self.bands):
            galaxy[f"{band}_bulge_flux"] = [bulge_flux[b]] * units.nJy
            galaxy[f"{band}_flux"] = [flux[b] + knot_flux[:, b].sum()] * units.nJy
        return galaxy, knots


def _no_knots(bands: Sequence[str]) -> Table:
    """Make a table of knots without rows."""
    columns = {"source": np.zeros(0, dtype=np.int64), **{name: np.zeros(0) for name in ("y", "x", "radius")}}
    return Table({**columns, **{f"{band}_flux": np.zeros(0) * units.nJy for band in bands}})


def _add_wings(
    images: NDArray[np.float32], truth: Table, psfs_at: PsfsAt, bands: Sequence[str], sigma: FloatArray
) -> None:
    """Add to `images`, in place, what bright stars shed beyond their PSF stamps.

    Beyond 15 pixels the Moffat profile goes on instead of falling to zero, and an aureole joins it that falls as
    radius to the power of -2.5, between King's (1971) -2 and the -3 of a clean mirror.
    """
    image_box = Box.of_shape(images.shape)
    flux = np.array([truth[f"{band}_flux"] for band in bands], dtype=float).T
    bright = np.asarray(truth["is_star"]) & (flux * 0.1 * _AUREOLE > _WING_FAINTEST * sigma).any(axis=1)
    offsets = np.arange(-_STAMP_RADIUS, _STAMP_RADIUS + 1, dtype=float)
    for k in np.flatnonzero(bright):
        y, x = float(truth["y"][k]), float(truth["x"][k])
        for b, psf in enumerate(psfs_at(y=y, x=x)):
            peak = flux[k, b] / psf.intensity(offsets[:, None], offsets).sum()
            reach = _STAMP_RADIUS * (peak * _AUREOLE / (_WING_FAINTEST * sigma[b])) ** 0.4
            if reach <= _STAMP_RADIUS:
                continue
            half = int(min(reach, _WING_REACH))
            box = Box(round(y) - half, round(x) - half, 2 * half + 1, 2 * half + 1) & image_box
            if not box.is_empty:
                dy = np.arange(box.y0, box.y1, dtype=float)[:, None] - y
                dx = np.arange(box.x0, box.x1, dtype=float) - x
                images[b][box.within(image_box)] += (peak * psf.wings(dy, dx, half)).astype(np.float32)
