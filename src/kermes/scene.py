"""What a fitted blend consists of: component kinds, sources and scenes, and what a fit asks of a component."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr

from kermes import constraints
from kermes.config import FitConfig
from kermes.errors import InputError
from kermes.geometry import Box
from kermes.kernels import profile_rendering
from kermes.kernels.profiles import N_COLUMNS, Table
from kermes.profiles import LARGEST_INDEX, LEAST_INDEX, frequencies_of, profile_table

FloatArray = NDArray[np.float32]
DoubleArray = NDArray[np.float64]
Parameters = Mapping[str, Any]  # arrays by name

PAD = 5
"""Pixels that a box keeps around the light of its component when it follows it."""

CENTER_STEP = 0.03
"""Step of the centre of a point source [pixels]."""

CENTER_REACH = 2.0
"""How far from its peak a point source or a profile may move, along either axis [pixels]."""

CENTER_UNIT = 2.0**-30
"""Centres of profiles are multiples of this [pixels], so that adding the origin of a coadd to them is exact."""

LEAST_RADIUS = 0.05
"""Smallest half-light radius that a fit gives to a profile [pixels]; less looks like a point source."""

LARGEST_SHEAR = 2.5
"""Largest log-shear that a fit gives to a profile: an axis ratio of 0.08."""

SHAPE_STEP = 0.03
"""Step of ln radius, log-shear and ln index of a profile."""

LEAST_WINDOW = 1e-4
"""Fourier modes that the PSF of the model frame weakens further than this are left out."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FitContext:
    """What a component is told about the fit that it takes part in."""

    noise: FloatArray
    """Noise of a pixel in each band [unit], shape (B,); 1 in a band without valid pixels."""

    peak: tuple[int, int]
    """Peak (y, x) of the source that the component belongs to, array index of the coadd."""

    box: Box
    """The blend's pixels, as array index of the coadd."""

    config: FitConfig
    """Settings of the fit."""


@runtime_checkable
class Component(Protocol):
    """What a fit asks of a component. Whatever has these members can be fitted; nothing has to be inherited.

    A component is a value: no method changes it.
    """

    @property
    def box(self) -> Box:
        """Pixels that it lights, as array index of the coadd; what lies outside the scene is not seen."""
        ...

    @property
    def parameters(self) -> Parameters:
        """Arrays that are fitted, by name. Those over the pixels of `box` have them as their last two axes."""
        ...

    def evaluate(self) -> FloatArray:
        """Evaluate in the model frame, shape (B, h, w) [unit]."""
        ...

    def gradient(self, image_gradient: FloatArray) -> Parameters:
        """Turn the derivatives of the loss by the pixels of `evaluate` (B, h, w) into those by the parameters."""
        ...

    def updated(self, parameters: Parameters) -> Self:
        """Make the same component with other values for some of its parameters."""
        ...

    def projected(self, context: FitContext) -> Self:
        """Make the closest component that is allowed; called after every step."""
        ...

    def steps(self, context: FitContext) -> Mapping[str, ArrayLike]:
        """Choose how far each parameter may move in one iteration; arrays that broadcast to the parameters."""
        ...

    def flux(self) -> DoubleArray:
        """Total flux in each band [unit], shape (B,)."""
        ...


@runtime_checkable
class Resizable(Protocol):
    """A component whose box follows its light, asked for every `FitConfig.resize_every` iterations."""

    def resized(self, context: FitContext) -> Self:
        """Make the same component on another box."""
        ...


@runtime_checkable
class Curved(Protocol):
    """A component that can be fitted with the scheme "fista"."""

    def curvature(self, weights: DoubleArray) -> Mapping[str, ArrayLike]:
        """Bound the second derivatives of sum(weights * evaluate()^2) / 2 by the parameters.

        `weights` (B,) has one value per band [1 / unit^2]; the answers broadcast to the parameters.
        """
        ...


def move_pixels(values: NDArray[Any], old: Box, new: Box) -> NDArray[Any]:
    """Move an array (..., h, w) over the pixels of one box to another box; what was not covered becomes zero."""
    moved = np.zeros((*values.shape[:-2], *new.shape), dtype=values.dtype)
    moved[(..., *old.within(new))] = values[(..., *new.within(old))]
    return moved


def _spectrum_steps(spectrum: FloatArray, pixel_noise: FloatArray, relative: float) -> FloatArray:
    """A share of the mean flux, but not less than a tenth of the noise."""
    return np.asarray(np.maximum(np.float32(0.1) * pixel_noise, np.float32(relative) * spectrum.mean()))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FactorizedComponent:
    """One spectrum times one morphology, in the model frame."""

    spectrum: FloatArray
    """Flux of the brightest pixel in each band [unit], shape (B,)."""

    morphology: FloatArray
    """Light distribution, shape of `box`; its largest value is 1."""

    box: Box
    """Pixels of `morphology`, as array index of the coadd."""

    free_form: bool = False
    """Whether its shape is free, whatever the settings say about monotonic and symmetric ones. The compiled fit knows
    the settings alone."""

    @property
    def parameters(self) -> Parameters:
        """Spectrum and morphology."""
        return {"spectrum": self.spectrum, "morphology": self.morphology}

    def evaluate(self) -> FloatArray:
        """Evaluate the component, shape (B, h, w) [unit]."""
        return self.spectrum[:, None, None] * self.morphology

    def gradient(self, image_gradient: FloatArray) -> Parameters:
        """Gradients of spectrum and morphology."""
        return {
            "spectrum": np.einsum("bhw,hw->b", image_gradient, self.morphology, dtype=np.float64).astype(np.float32),
            "morphology": np.einsum("bhw,b->hw", image_gradient, self.spectrum),
        }

    def updated(self, parameters: Parameters) -> Self:
        """Replace spectrum or morphology."""
        return replace(self, **parameters)

    def projected(self, context: FitContext) -> Self:
        """Apply the constraints of scarlet lite, in its order.

        Spectrum positive; morphology monotonic about the brightest pixel next to the peak, symmetric about the peak,
        above the background, connected, positive at the peak, largest value 1. What refers to the peak is left out
        when the peak lies outside of the box.
        """
        config = context.config
        spectrum = constraints.positive(self.spectrum, constraints.FLOOR)
        morphology = self.morphology
        center = (context.peak[0] - self.box.y0, context.peak[1] - self.box.x0)
        inside = context.peak in self.box
        if inside and not self.free_form:
            if config.monotonic:
                morphology = constraints.monotonic(
                    morphology,
                    constraints.brightest_near(morphology, center),
                    weighting=config.monotonic_weighting,
                    min_gradient=config.min_gradient,
                )
            if config.symmetric:
                morphology = constraints.symmetric(morphology, center)
            elif config.symmetry_strength > 0:
                morphology = constraints.soft_symmetric(morphology, center, config.symmetry_strength)
        morphology = constraints.above_background(morphology, spectrum, context.noise, config.background_threshold)
        if inside:
            if config.connected:
                morphology = constraints.connected(morphology, [constraints.brightest_near(morphology, center)])
            morphology = constraints.centered(morphology, center)
        return replace(self, spectrum=spectrum, morphology=constraints.normalised(morphology))

    def steps(self, context: FitContext) -> Mapping[str, ArrayLike]:
        """Shares of the mean flux and of the peak, as set."""
        return {
            "spectrum": _spectrum_steps(self.spectrum, context.noise, context.config.spectrum_step),
            "morphology": context.config.morphology_step,
        }

    def resized(self, context: FitContext) -> Self:
        """Move to the box of the positive pixels and `PAD` more, inside the blend; without light, that of the peak."""
        lit = Box.where(self.morphology > 0).shift(*self.box.origin)
        if lit.is_empty:
            y = min(max(context.peak[0], self.box.y0), self.box.y1 - 1)
            x = min(max(context.peak[1], self.box.x0), self.box.x1 - 1)
            lit = Box(y, x, 1, 1)
        box = lit.grow(PAD) & context.box
        return replace(self, morphology=move_pixels(self.morphology, self.box, box), box=box)

    def curvature(self, weights: DoubleArray) -> Mapping[str, ArrayLike]:
        """Sums of the squares of the other factor; that of a morphology as if its peak had a S/N of one at least."""
        return {
            "spectrum": weights * np.sum(np.square(self.morphology), dtype=np.float64),
            "morphology": max(float(np.sum(weights * np.square(self.spectrum, dtype=np.float64))), 1.0),
        }

    def flux(self) -> DoubleArray:
        """Total flux in each band [unit], shape (B,)."""
        return np.asarray(self.spectrum * self.morphology.sum(dtype=np.float64))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CubeComponent:
    """A light distribution of its own in each band, positive and otherwise free, in the model frame.

    For light whose colour changes from place to place more than the sum of a few factorized components can say.
    """

    cube: FloatArray
    """Flux per pixel [unit], shape (B, h, w)."""

    box: Box
    """Pixels of `cube`, as array index of the coadd."""

    observed: bool = False
    """Whether it is light as it is observed, that no PSF is applied to: a template. It cannot be fitted."""

    @property
    def parameters(self) -> Parameters:
        """The cube."""
        return {"cube": self.cube}

    def evaluate(self) -> FloatArray:
        """Evaluate the component, shape (B, h, w) [unit]."""
        return self.cube

    def gradient(self, image_gradient: FloatArray) -> Parameters:
        """Gradient of the cube."""
        return {"cube": image_gradient}

    def updated(self, parameters: Parameters) -> Self:
        """Replace the cube."""
        return replace(self, **parameters)

    def projected(self, context: FitContext) -> Self:
        """Make all pixels positive or zero."""
        return replace(self, cube=constraints.positive(self.cube))

    def steps(self, context: FitContext) -> Mapping[str, ArrayLike]:
        """As set for morphologies, times the brightest pixel of the band, but not less than a tenth of the noise."""
        brightest = self.cube.max(axis=(1, 2), initial=0.0)
        step = np.maximum(np.float32(0.1) * context.noise, np.float32(context.config.morphology_step) * brightest)
        return {"cube": step[:, None, None]}

    def curvature(self, weights: DoubleArray) -> Mapping[str, ArrayLike]:
        """That of the pixels."""
        return {"cube": weights[:, None, None]}

    def flux(self) -> DoubleArray:
        """Total flux in each band [unit], shape (B,)."""
        return np.asarray(self.cube.sum(axis=(1, 2), dtype=np.float64))


def _pixel_shares(center: float, start: int, n_pixels: int, sigma: float) -> tuple[DoubleArray, DoubleArray]:
    """Integrate a Gaussian of area one over pixels; returns the integrals and their derivatives by the centre."""
    edges = (np.arange(n_pixels + 1) + (start - 0.5 - center)) / sigma
    density = np.exp(-0.5 * edges**2) / (np.sqrt(2 * np.pi) * sigma)
    return np.diff(ndtr(edges)), -np.diff(density)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PointComponent:
    """A point source at a sub-pixel position: the Gaussian PSF of the model frame, integrated over pixels."""

    spectrum: FloatArray
    """Total flux in each band [unit], shape (B,)."""

    center: DoubleArray
    """Position (y, x), array index of the coadd; an integer is the centre of a pixel."""

    sigma: float
    """Width of the PSF of the model frame [pixels], not fitted."""

    @property
    def box(self) -> Box:
        """Pixels up to six sigma from the centre, outside of which lies 1e-8 of the light."""
        radius = int(np.ceil(6 * self.sigma))
        y, x = (int(np.floor(value + 0.5)) for value in self.center)
        return Box(y - radius, x - radius, 2 * radius + 1, 2 * radius + 1)

    @property
    def parameters(self) -> Parameters:
        """Spectrum and centre."""
        return {"spectrum": self.spectrum, "center": self.center}

    def _profiles(self) -> tuple[DoubleArray, DoubleArray, DoubleArray, DoubleArray]:
        """Shares of the light of rows and columns, and their derivatives by the centre."""
        box = self.box
        along_y, by_y = _pixel_shares(float(self.center[0]), box.y0, box.height, self.sigma)
        along_x, by_x = _pixel_shares(float(self.center[1]), box.x0, box.width, self.sigma)
        return along_y, along_x, by_y, by_x

    def evaluate(self) -> FloatArray:
        """Evaluate the component, shape (B, h, w) [unit]."""
        along_y, along_x, _, _ = self._profiles()
        return self.spectrum[:, None, None] * np.outer(along_y, along_x).astype(np.float32)

    def gradient(self, image_gradient: FloatArray) -> Parameters:
        """Gradients of spectrum and centre."""
        along_y, along_x, by_y, by_x = self._profiles()
        by_center = [
            np.einsum("bhw,b,h,w->", image_gradient, self.spectrum, by_y, along_x),
            np.einsum("bhw,b,h,w->", image_gradient, self.spectrum, along_y, by_x),
        ]
        by_spectrum = np.einsum("bhw,h,w->b", image_gradient, along_y, along_x)
        return {"spectrum": by_spectrum.astype(np.float32), "center": np.array(by_center)}

    def updated(self, parameters: Parameters) -> Self:
        """Replace spectrum or centre."""
        return replace(self, **parameters)

    def projected(self, context: FitContext) -> Self:
        """Keep the spectrum positive and the centre within `CENTER_REACH` of the peak."""
        peak = np.array(context.peak, dtype=np.float64)
        return replace(
            self,
            spectrum=constraints.positive(self.spectrum, constraints.FLOOR),
            center=np.clip(self.center, peak - CENTER_REACH, peak + CENTER_REACH),
        )

    def steps(self, context: FitContext) -> Mapping[str, ArrayLike]:
        """A share of the mean flux, but not less than changes the brightest pixel by a tenth of the noise."""
        area = np.float32(2 * np.pi * self.sigma**2)
        return {
            "spectrum": _spectrum_steps(self.spectrum, area * context.noise, context.config.spectrum_step),
            "center": CENTER_STEP,
        }

    def curvature(self, weights: DoubleArray) -> Mapping[str, ArrayLike]:
        """Sums of squares of the derivatives; that of the centre as if the source had a S/N of one at least."""
        along_y, along_x, by_y, by_x = self._profiles()
        total = np.sum(weights * np.square(self.spectrum, dtype=np.float64))
        by_center = np.array([np.sum(by_y**2) * np.sum(along_x**2), np.sum(along_y**2) * np.sum(by_x**2)])
        return {
            "spectrum": weights * np.sum(along_y**2) * np.sum(along_x**2),
            "center": np.maximum(total * by_center, 1.0),
        }

    def flux(self) -> DoubleArray:
        """Total flux in each band [unit], shape (B,)."""
        return self.spectrum.astype(np.float64)


class Modes(NamedTuple):
    """Fourier modes of a square stamp and how they become those of its pixels; a tuple, so that kernels take it."""

    lengths: NDArray[np.int64]
    """Number of modes of each row of the half plane of pixels of half the side, shape (2 side,)."""

    frequencies: FloatArray
    """Of the modes, along y and x, shape (2, M) [radians per pixel of half the side]."""

    numbers: NDArray[np.int64]
    """Modes, counted row by row, shape (E,)."""

    places: NDArray[np.int64]
    """Where each is added in the half plane (side, side // 2 + 1), which is flat; shape (E,)."""

    weights: FloatArray
    """What its real and its imaginary part are multiplied by, shape (2, E)."""


@lru_cache(maxsize=64)
def stamp_modes(side: int) -> Modes:
    """List the modes of a stamp of even side for a PSF that is given by pixels.

    The modes at the end of the ky axis count as the mean of both their signs; the transform sees to those of kx.
    """
    half = side // 2
    rows = np.fft.ifftshift(np.arange(-side, side))
    lengths = np.where(np.abs(rows) <= half, half + 1, 0)
    rows = np.repeat(rows, lengths)
    weights = np.where(np.abs(rows) == half, np.float32(0.5), np.float32(1.0))
    numbers = np.arange(len(rows))
    places = rows % side * (half + 1) + numbers % (half + 1)
    return Modes(lengths, frequencies_of(lengths), numbers, places, np.stack([weights, weights]))


@lru_cache(maxsize=64)
def frame_modes(side: int, sigma: float) -> Modes:
    """List the modes of a stamp of even side in the model frame, weighted with the transform of its PSF.

    That is a Gaussian integrated over pixels, which has power beyond what pixels sample: modes up to twice as far are
    folded back, so that the images are those of light that falls on pixels.
    """
    half = side // 2
    order = np.fft.ifftshift(np.arange(-side, side))
    window = np.outer(*(_window(numbers / side, sigma) for numbers in (order, np.arange(side + 1))))
    kept = window > LEAST_WINDOW
    rows, columns = order[np.nonzero(kept)[0]], np.nonzero(kept)[1]
    weights = (window[kept] / side**2).astype(np.float32)
    # Half planes leave out the modes whose conjugates they have: what comes back from beyond on kx is one of them.
    direct, conjugate = np.flatnonzero(columns <= half), np.flatnonzero(columns >= half)
    places = (
        rows[direct] % side * (half + 1) + columns[direct],
        -rows[conjugate] % side * (half + 1) + side - columns[conjugate],
    )
    numbers = np.concatenate([direct, conjugate])
    signs = np.repeat(np.array([1, -1], dtype=np.float32), [len(direct), len(conjugate)])
    lengths = kept.sum(axis=1)
    weights = np.stack([weights[numbers], signs * weights[numbers]])
    return Modes(lengths, frequencies_of(lengths), numbers, np.concatenate(places), weights)


def _window(frequency: DoubleArray, sigma: float) -> DoubleArray:
    """Transform of a Gaussian integrated over pixels, at frequencies in turns per pixel."""
    return np.asarray(np.exp(-2 * (np.pi * sigma * frequency) ** 2) * np.sinc(frequency))


@lru_cache(maxsize=1)
def kernel_table() -> Table:
    """Give the table of profiles as kernels take it."""
    table = profile_table()
    ln_index = np.array([table.ln_index[0], table.ln_index[1] - table.ln_index[0]])
    return Table(table.values, table.slopes, ln_index)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ProfileComponent:
    """A point source or an elliptical Sersic profile at a sub-pixel position.

    Raises
    ------
    InputError
        If the box is not square with an even side, or radius or index cannot be.
    """

    spectrum: FloatArray
    """Total flux in each band [unit], shape (B,); may be negative."""

    center: DoubleArray
    """Position (y, x), array index of the coadd, rounded to `CENTER_UNIT`; an integer is the centre of a pixel."""

    radius: float = 0.0
    """Half-light radius, geometric mean of both half-axes [pixels]; 0: a point source."""

    shear: DoubleArray
    """Logarithmic shear (e1, e2) as in `kermes.profiles`, shape (2,); e1 > 0 is longer along x."""

    index: float = 1.0
    """Sersic index, from `profiles.LEAST_INDEX` to `profiles.LARGEST_INDEX`."""

    sigma: float
    """Width of the PSF of the model frame [pixels], not fitted."""

    box: Box
    """Square stamp of even side that it is drawn on, array index of the coadd; may reach beyond the image. Light that
    leaves it comes back on the other side, so that all of the flux is inside."""

    def __post_init__(self) -> None:
        if self.box.height != self.box.width or self.box.height % 2 or self.box.is_empty:
            raise InputError(f"box must be square with an even side, got {self.box.height} x {self.box.width} pixels")
        if not 0 <= self.radius < np.inf:
            raise InputError(f"radius must be positive, or 0 for a point source, got {self.radius}")
        if not LEAST_INDEX <= self.index <= LARGEST_INDEX:
            raise InputError(f"index must lie between {LEAST_INDEX} and {LARGEST_INDEX}, got {self.index}")
        center = np.rint(np.asarray(self.center, dtype=np.float64) / CENTER_UNIT) * CENTER_UNIT
        object.__setattr__(self, "center", center)

    @property
    def is_point(self) -> bool:
        """Whether it is a point source, without radius, shear and index."""
        return self.radius == 0

    @property
    def axis_ratio(self) -> float:
        """Minor over major axis."""
        return float(np.exp(-np.hypot(*self.shear)))

    @property
    def angle(self) -> float:
        """Direction of the major axis, from the x axis towards the y axis [deg], above -90 and up to 90."""
        return float(np.degrees(0.5 * np.arctan2(self.shear[1], self.shear[0])))

    @property
    def shape(self) -> DoubleArray:
        """What kernels call its shape: y and x from the first pixel of the box, ln r, e1, e2 and ln n."""
        (y, x), (e1, e2) = self.center, self.shear
        ln_radius = np.log(self.radius) if self.radius > 0 else -np.inf
        return np.array([y - self.box.y0, x - self.box.x0, ln_radius, e1, e2, np.log(self.index)])

    @property
    def parameters(self) -> Parameters:
        """Spectrum and centre; radius, shear and index if it is no point source."""
        parameters = {"spectrum": self.spectrum, "center": self.center}
        if self.is_point:
            return parameters
        return {**parameters, "radius": np.array(self.radius), "shear": self.shear, "index": np.array(self.index)}

    def _images(self, n_columns: int) -> FloatArray:
        """Draw it with flux one, and its derivatives; see `kernels.profile_rendering.profile_images`."""
        side = self.box.height
        images: FloatArray = profile_rendering.profile_images(
            kernel_table(), frame_modes(side, self.sigma), self.shape, side, n_columns
        )
        return images

    def _derivatives(self) -> tuple[FloatArray, dict[str, FloatArray]]:
        """Draw it with flux one, and its derivatives (..., h, w) by the parameters of shape (...)."""
        images = self._images(N_COLUMNS)
        if self.is_point:
            return images[0], {"center": images[1:3]}
        return images[0], {
            "center": images[1:3],
            "radius": images[3] / np.float32(self.radius),
            "shear": images[4:6],
            "index": images[6] / np.float32(self.index),
        }

    def image(self) -> FloatArray:
        """Draw it with flux one in the model frame, shape (h, w)."""
        return np.asarray(self._images(1)[0])

    def evaluate(self) -> FloatArray:
        """Evaluate the component, shape (B, h, w) [unit].

        It is within 1e-4 of its brightest pixel for `sigma` of 0.7 pixels or more, and within 4e-4 for 0.5.
        """
        return np.asarray(self.spectrum[:, None, None] * self.image())

    def gradient(self, image_gradient: FloatArray) -> Parameters:
        """Gradients of all parameters."""
        profile, derivatives = self._derivatives()
        weighted = np.einsum("bhw,b->hw", image_gradient, self.spectrum)
        by_spectrum = np.einsum("bhw,hw->b", image_gradient, profile, dtype=np.float64)
        by_shape = {
            name: np.asarray(np.sum(weighted * image, axis=(-2, -1), dtype=np.float64))
            for name, image in derivatives.items()
        }
        return {"spectrum": by_spectrum.astype(np.float32), **by_shape}

    def updated(self, parameters: Parameters) -> Self:
        """Replace any of the parameters; radius and index are brought between their limits."""
        limits = {"radius": (LEAST_RADIUS, self.box.height), "index": (LEAST_INDEX, LARGEST_INDEX)}
        numbers = {name: float(np.clip(parameters[name], *limits[name])) for name in limits if name in parameters}
        return replace(self, **{**parameters, **numbers})

    def projected(self, context: FitContext) -> Self:
        """Keep the centre within `CENTER_REACH` of the peak, and the shear below `LARGEST_SHEAR`."""
        peak = np.array(context.peak, dtype=np.float64)
        return replace(
            self,
            center=np.clip(self.center, peak - CENTER_REACH, peak + CENTER_REACH),
            shear=self.shear * (LARGEST_SHEAR / max(float(np.hypot(*self.shear)), LARGEST_SHEAR)),
        )

    def steps(self, context: FitContext) -> Mapping[str, ArrayLike]:
        """As those of a point source; `SHAPE_STEP` for the shape."""
        area = np.float32(2 * np.pi * (self.sigma**2 + self.radius**2))
        spectrum = _spectrum_steps(self.spectrum, area * context.noise, context.config.spectrum_step)
        steps: dict[str, ArrayLike] = {"spectrum": spectrum, "center": CENTER_STEP}
        if self.is_point:
            return steps
        return {**steps, "radius": SHAPE_STEP * self.radius, "shear": SHAPE_STEP, "index": SHAPE_STEP * self.index}

    def curvature(self, weights: DoubleArray) -> Mapping[str, ArrayLike]:
        """Sums of squares of the derivatives; those of the shape as if the source had a S/N of one at least."""
        profile, derivatives = self._derivatives()
        total = np.sum(weights * np.square(self.spectrum, dtype=np.float64))
        by_shape = {
            name: np.maximum(total * np.sum(np.square(image), axis=(-2, -1), dtype=np.float64), 1.0)
            for name, image in derivatives.items()
        }
        return {"spectrum": weights * np.sum(np.square(profile), dtype=np.float64), **by_shape}

    def flux(self) -> DoubleArray:
        """Total flux in each band [unit], shape (B,)."""
        return self.spectrum.astype(np.float64)


def _factorized(components: tuple[Component, ...]) -> tuple[FactorizedComponent, ...]:
    for component in components:
        if not isinstance(component, FactorizedComponent):
            raise InputError(f"components must be factorized here, got a {type(component).__name__}")
    return tuple(component for component in components if isinstance(component, FactorizedComponent))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Source:
    """What one peak is modelled as: the sum of its components."""

    peak: tuple[int, int]
    """Peak (y, x), array index of the coadd."""

    components: tuple[Component, ...]
    """May be empty: a source without light."""

    @property
    def box(self) -> Box:
        """Smallest box around all components; empty without components."""
        box = Box(*self.peak, 0, 0)
        for component in self.components:
            box = box | component.box
        return box

    @property
    def factorized(self) -> tuple[FactorizedComponent, ...]:
        """All components, for what works with factorized ones alone; another kind raises InputError."""
        return _factorized(self.components)

    def shift(self, dy: int, dx: int) -> Source:
        """Move by whole pixels; for components of the built-in kinds."""
        components: list[Component] = []
        for component in self.components:
            moved: dict[str, Any] = {}
            if isinstance(component, PointComponent | ProfileComponent):
                moved["center"] = component.center + [dy, dx]
            if not isinstance(component, PointComponent):  # whose box follows its centre
                moved["box"] = component.box.shift(dy, dx)
            components.append(replace(component, **moved))  # type: ignore[type-var]
        return Source(peak=(self.peak[0] + dy, self.peak[1] + dx), components=tuple(components))

    def model(self, n_bands: int) -> FloatArray:
        """Evaluate the source on `box` in the model frame, shape (B, h, w) [unit]."""
        box = self.box
        total = np.zeros((n_bands, *box.shape), dtype=np.float32)
        for component in self.components:
            total[(slice(None), *component.box.within(box))] += component.evaluate()
        return total

    def flux(self, n_bands: int) -> DoubleArray:
        """Total flux in each band [unit], shape (B,); zero without components."""
        total = np.zeros(n_bands)
        for component in self.components:
            total += component.flux()
        return total


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scene:
    """All sources of one blend, in the order of its peaks."""

    sources: tuple[Source, ...]
    """One per peak."""

    box: Box
    """The blend's pixels, as array index of the coadd; factorized components lie inside, others may reach beyond."""

    @property
    def components(self) -> tuple[Component, ...]:
        """All components, source by source."""
        return tuple(component for source in self.sources for component in source.components)

    @property
    def factorized(self) -> tuple[FactorizedComponent, ...]:
        """All components, for what works with factorized ones alone; another kind raises InputError."""
        return _factorized(self.components)

    def model(self, n_bands: int) -> FloatArray:
        """Evaluate all sources on `box` in the model frame, shape (B, h, w) [unit]."""
        total = np.zeros((n_bands, *self.box.shape), dtype=np.float32)
        for component in self.components:
            shared = component.evaluate()[(slice(None), *self.box.within(component.box))]
            total[(slice(None), *component.box.within(self.box))] += shared
        return total
