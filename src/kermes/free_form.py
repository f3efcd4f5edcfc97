"""Free shapes over profiles, where the data show more than a profile can hold.

A resolved galaxy has arms and knots, and the PSF of a bright star is not known as well as its light is measured. What
profiles leave there is given to corrections with free shapes: pixel by pixel brighter or fainter than the profile, but
never below zero together with it. They reach as far as the profile stands out of the noise in the model frame, and fade
where it fades: the wings stay those of the profile.

A correction is the most probable one if the expected change of a pixel is proportional to the profile there, smoothed
by the PSF of the model frame. First each profile is changed with its own spectrum in all bands together; where what is
left is still significant, for gradients of colour and for PSFs that are wrong in one band, each band is changed on its
own. Both are linear problems, solved by a few steps of conjugate gradients (Hestenes and Stiefel 1952), preconditioned
by the diagonal; what would converge last is noise. The steps are taken as if the weights of a band were all alike, and
what they leave is found with the weights as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from kermes.coadd import Blend
from kermes.config import FreeFormConfig
from kermes.geometry import Box
from kermes.kernels import free_form as kernels_free_form
from kermes.kernels import metrics as kernels_metrics
from kermes.psf import model_psf, sufficient_reach
from kermes.rendering import KernelSet, render_scene, transform_side
from kermes.scene import FactorizedComponent, ProfileComponent, Scene, Source, move_pixels

DoubleArray = NDArray[np.float64]
FloatArray = NDArray[np.float32]
IndexArray = NDArray[np.int64]

BLUR = 4
"""How far the PSF of the model frame is followed [pixels]."""

LEAST_REACH = 4
"""How far observed PSFs are followed at least [pixels]."""

LARGEST = 96
"""Longest side of the pixels of the model frame that are corrected for one source; larger ones have more of wings."""

NEAR = 7
"""Distance from a peak, along each axis [pixels], within which chi2 is looked at first."""

ROUNDS = 4
"""How often the pixels that would lose more light than they have are held, and the others solved again; with two or
three hardly any are left."""

TURNS = 4
"""How often at most the steps are taken anew, where the weights of a band differ from pixel to pixel."""

LEAST_CHI2 = 0.9
"""Mean chi2 there below which a source is not looked at closer."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Window:
    """The pixels that tell about one source."""

    box: Box
    """Array index of the coadd."""

    residual: FloatArray
    """What the models leave of the images [noise of a typical pixel], shape (B, h, w)."""

    weights: FloatArray
    """Inverse variance [same unit], 0 where a pixel is not used, shape (B, h, w)."""

    transforms: NDArray[np.complex64]
    """Of the observed PSFs, on a side that holds the window and what is followed of them."""

    squares: FloatArray
    """Sum of the squares of each PSF, shape (B,)."""


def with_free_form(
    scene: Scene,
    residual: FloatArray,
    snr: DoubleArray,
    blend: Blend,
    kernels: KernelSet,
    config: FreeFormConfig,
) -> Scene:
    """Add corrections of free shape to the sources whose profiles do not suffice, the brightest first.

    Parameters
    ----------
    scene : Scene
        Profiles that were fitted to the blend, on its pixels.
    residual : ndarray, shape (B, H, W)
        What all models leave of the images [unit of the blend].
    snr : ndarray, shape (S,)
        Signal-to-noise of each source, all bands together; NaN: it keeps its profiles.
    blend : Blend
        Finite; pixels without weight are left out.
    kernels : KernelSet
        With the observed PSFs.
    config : FreeFormConfig

    Returns
    -------
    scene : Scene
        Corrected sources have factorized components behind their profiles. Their light may be negative, but where the
        profiles of a source are positive, the sum of all its components in the model frame is positive or zero.

    Notes
    -----
    Corrections are for residuals, re-distribution and pictures. The total flux of the profiles alone is as close to the
    truth as that of the sum, or closer.

    O(B side^2 log side) per step and corrected source; side is the extent of the source and twice that of the PSF.
    """
    if config.strength == 0:
        return scene
    _load_kernels()
    rows = _promising(scene, residual, snr, blend, config)
    if not len(rows):
        return scene
    residual, unit = residual.copy(), np.float32(blend.typical_noise)
    noise: FloatArray = blend.noise_rms / unit
    noise[np.isnan(noise)] = np.inf
    sources = list(scene.sources)
    for s, reach in zip(rows.tolist(), _reach(blend, kernels, rows).tolist(), strict=True):
        profiles = _profiles(sources[s])
        spectra = np.array([np.maximum(profile.spectrum, 0) / unit for profile in profiles], dtype=np.float32)
        images = [_image(profile) for profile in profiles]
        floor = config.floor
        support = _support(profiles, images, _floors(spectra, floor * noise)) & scene.box
        while max(support.shape) > LARGEST:
            floor = 1.5 * floor
            support = _support(profiles, images, _floors(spectra, floor * noise)) & scene.box
        if support.is_empty:
            continue
        window = _window(support, reach, residual, unit, blend, kernels)
        shapes = np.stack([move_pixels(i, p.box, window.box) for i, p in zip(images, profiles, strict=True)])
        spectra, shapes, window = _corrections(spectra, shapes, floor * noise, window, profiles[0].sigma, config)
        residual[(slice(None), *window.box.within(scene.box))] = window.residual * unit
        box = support.grow(BLUR) & window.box
        added = [
            _component(spectrum * unit, shape, window.box, box)
            for spectrum, shape in zip(spectra, shapes, strict=True)
            if shape.any()
        ]
        if added:
            sources[s] = replace(sources[s], components=(*sources[s].components, *added))
    if all(new is old for new, old in zip(sources, scene.sources, strict=True)):
        return scene
    return replace(scene, sources=tuple(sources))


@cache
def _load_kernels() -> None:
    """Load the code that only corrections need, or compile it, with the first blend whether that needs it or not.

    It takes more memory than a blend does, which would be that of some blend in the middle of the work, and while one
    thread compiles all others wait.
    """
    box, ones = Box(0, 0, 8, 8), np.ones((1, 8, 8), dtype=np.float32)
    side = transform_side(8)
    window = _Window(
        box=box,
        residual=100 * ones,
        weights=ones,
        transforms=np.ones((1, side, side // 2 + 1), dtype=np.complex64),
        squares=ones[0, 0, :1].copy(),
    )
    _solve(window, ones[0, :1, :1].copy(), ones, ones, FreeFormConfig())
    component = FactorizedComponent(spectrum=np.ones(1, dtype=np.float32), morphology=ones[0], box=box)
    source = Source(peak=(4, 4), components=(component,))
    render_scene(Scene(sources=(source,), box=box), KernelSet(np.ones((1, 3, 3))))


def _profiles(source: Source) -> list[ProfileComponent]:
    """Give the profiles of a source, but for the clumps of a galaxy, which keep their shape."""
    profiles = [component for component in source.components if isinstance(component, ProfileComponent)]
    return [profile for profile in profiles if not profile.is_point] or profiles[:1]


def _promising(
    scene: Scene, residual: FloatArray, snr: DoubleArray, blend: Blend, config: FreeFormConfig
) -> IndexArray:
    """Rows of sources with profiles that are bright enough and not as close to the data as noise allows, (N,).

    The brightest first.
    """
    rows = []
    order = np.argsort(-snr, kind="stable")
    for s in order[snr[order] >= min(config.point_snr, config.min_snr)].tolist():
        profiles = _profiles(scene.sources[s])
        least = config.point_snr if all(profile.is_point for profile in profiles) else config.min_snr
        if profiles and snr[s] >= least:
            rows.append(s)
    if not rows:
        return np.zeros(0, dtype=np.int64)
    around, image = np.array([scene.sources[s].peak for s in rows]) - scene.box.origin, scene.box.shape
    first, last = np.maximum(around - NEAR, 0), np.minimum(around + NEAR + 1, image)
    boxes = np.concatenate([first, np.maximum(last - first, 0)], axis=1)
    # Mean of chi2 near the peak; NaN where no pixel is used.
    chi2: DoubleArray = kernels_metrics.mean_chi2(residual, blend.weights, boxes)
    return np.asarray(rows, dtype=np.int64)[chi2 > LEAST_CHI2]


def _reach(blend: Blend, kernels: KernelSet, rows: IndexArray) -> IndexArray:
    """How far PSFs are followed so that what is left out is lost in the noise, for the source of each row [pixels]."""
    y, x = blend.peaks[rows].T
    snr = blend.images[:, y, x].T / blend.noise_rms
    # A masked core says nothing: it may be a saturated star's.
    snr[(blend.weights[:, y, x] == 0).T & np.isfinite(blend.noise_rms)] = np.inf
    return np.maximum(sufficient_reach(kernels.psf_cut_error(blend.psfs), snr), LEAST_REACH)


def _image(profile: ProfileComponent) -> FloatArray:
    """Draw a profile of flux one in the model frame on its box, zero where it is negative."""
    return np.maximum(profile.image(), 0)


def _floors(spectra: FloatArray, faintest: FloatArray) -> FloatArray:
    """Find the values (K,) of shapes of given spectra (K, B) that are as faint as allowed (B,) in the best band."""
    return np.asarray(1 / np.maximum(np.max(spectra / faintest, axis=1), 1e-30), dtype=np.float32)


def _support(profiles: list[ProfileComponent], images: list[FloatArray], floors: FloatArray) -> Box:
    """Find the pixels of the coadd where any profile stands out of the noise."""
    support = Box(0, 0, 0, 0)
    for profile, image, floor in zip(profiles, images, floors.tolist(), strict=True):
        support = support | Box(*kernels_free_form.lit_box(image, floor)).shift(*profile.box.origin)
    return support


def _window(
    support: Box, reach: int, residual: FloatArray, unit: np.float32, blend: Blend, kernels: KernelSet
) -> _Window:
    """Cut out what the light of a support reaches, in a unit of flux."""
    box = support.grow(reach) & blend.box
    cut = (slice(None), *box.within(blend.box))
    return _Window(
        box=box,
        residual=residual[cut] / unit,
        weights=blend.weights[cut] * unit**2,
        transforms=kernels.psf_transforms(transform_side(max(support.shape) + 2 * reach)),
        squares=np.square(blend.psfs).sum(axis=(1, 2)).astype(np.float32),
    )


def _corrections(
    spectra: FloatArray, shapes: FloatArray, faintest: FloatArray, window: _Window, sigma: float, config: FreeFormConfig
) -> tuple[FloatArray, FloatArray, _Window]:
    """Correct a source whose profiles have spectra (K, B) and shapes (K, h, w), in each band together and on its own.

    Returns the spectra and shapes of the corrections, and what they leave.
    """
    common, window = _correct(spectra, shapes, faintest, window, sigma, config)
    if common is None:
        return spectra[:0], shapes[:0], window
    model = np.einsum("kb,khw->bhw", spectra, shapes + common)
    bands = np.eye(len(faintest), dtype=np.float32)
    single, window = _correct(bands, model, faintest, window, sigma, config)
    if single is None:
        return spectra, common, window
    return np.concatenate([spectra, bands]), np.concatenate([common, single]), window


def _correct(
    spectra: FloatArray, shapes: FloatArray, faintest: FloatArray, window: _Window, sigma: float, config: FreeFormConfig
) -> tuple[FloatArray | None, _Window]:
    """Find the changes (K, h, w) of shapes of given spectra, None if they are not significant, and what they leave."""
    floors = _floors(spectra, faintest)[:, None, None]
    envelopes = np.float32(config.strength) * np.maximum(shapes - floors, 0)
    # Models of data that are none may be so bright that squares of them are too large for a float32: those stay.
    with np.errstate(over="ignore", invalid="ignore"):
        solved = _solve(window, spectra, envelopes, shapes, config)
    if solved is None or not all(np.isfinite(values).all() for values in solved):
        return None, window
    fields, left = solved
    return np.maximum(_blurred(envelopes * fields, sigma), -shapes), replace(window, residual=left)


def _solve(
    window: _Window, spectra: FloatArray, envelopes: FloatArray, shapes: FloatArray, config: FreeFormConfig
) -> tuple[FloatArray, FloatArray] | None:
    """Find the fields (K, h, w) for which chi2 plus their sum of squares is least, and what they leave (B, h, w).

    None if noise explains as much. A field, of variance one, times its envelope (K, h, w) is the change of the light
    that has the spectrum (K, B). Light may not be taken from a pixel beyond what `shapes` (K, h, w) have there. Pixels
    where the answer would do so are held at that limit while the others are solved again: cut off at the end, they
    would leave the light that made up for what they lost, and in bright galaxies more residuals than without a
    correction.
    """
    weights = window.weights
    gradient, information, diagonal = np.empty((3, *envelopes.shape), dtype=np.float32)
    # Noise alone gains one for each parameter that the data determine and not the prior.
    gain, freedom = kernels_free_form.expect_gain(
        window.residual,
        weights,
        envelopes,
        spectra,
        window.squares,
        window.transforms,
        gradient,
        information,
        diagonal,
    )
    if not gain - freedom > config.significance * math.sqrt(freedom):
        return None
    residual = window.residual.copy()
    lit = np.square(envelopes).max(axis=0)
    mean_weights = np.einsum("bhw,hw->b", weights, lit, dtype=np.float64) / lit.sum(dtype=np.float64)
    # As if the weights of a band were all alike, and the light brighter where they are larger.
    alike = np.maximum((np.square(spectra) * window.squares) @ mean_weights, 1e-30)
    seen_envelopes = envelopes * np.sqrt(information / alike[:, None, None]).astype(np.float32)
    fields = np.zeros_like(envelopes)
    kernels_free_form.descend(
        envelopes,
        seen_envelopes,
        -shapes / np.maximum(envelopes, np.float32(1e-20)),
        spectra,
        weights,
        mean_weights,
        window.transforms,
        diagonal,
        config.tolerance * freedom,
        TURNS,
        ROUNDS,
        config.max_iterations,
        fields,
        residual,
        gradient,
    )
    return fields, residual


def _blurred(images: FloatArray, sigma: float) -> FloatArray:
    """Blur images (K, h, w) with the PSF of the model frame."""
    _, height, width = images.shape
    shares = model_psf(sigma, 2 * BLUR + 1).sum(axis=0).astype(np.float32)
    padded = np.pad(images, ((0, 0), (BLUR, BLUR), (BLUR, BLUR)))
    blurred = np.zeros((len(images), height, width + 2 * BLUR), dtype=np.float32)
    for y, share in enumerate(shares):
        blurred += share * padded[:, y : y + height]
    result = np.zeros_like(images)
    for x, share in enumerate(shares):
        result += share * blurred[:, :, x : x + width]
    return result


def _component(spectrum: FloatArray, shape: FloatArray, window: Box, box: Box) -> FactorizedComponent:
    """Make a component of a correction that is zero outside of a box; its pixel of most light, of either sign, is 1."""
    morphology = shape[box.within(window)]
    peak = morphology.flat[np.argmax(np.abs(morphology))]
    return FactorizedComponent(spectrum=spectrum * peak, morphology=morphology / peak, box=box)
