"""From the model frame to the observed image, and the adjoint."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from rocket_fft import good_size

from kermes.errors import ShapeError
from kermes.geometry import Box
from kermes.kernels import convolution
from kermes.kernels import flux as kernels_flux
from kermes.kernels import rendering as kernels_rendering
from kermes.psf import cut_error
from kermes.scene import FactorizedComponent, Scene, Source

FloatArray = NDArray[np.float32]


def padded_side(side: int, stamp_side: int) -> int:
    """Shortest fast length at which the wrap-around of a kernel of odd side never reaches `side` pixels."""
    return int(good_size(side + stamp_side // 2, real=True))


@dataclass(frozen=True, slots=True, eq=False)
class Convolution:
    """Convolution of (B, H, W) images with one kernel per band; what lies outside the image is zero.

    The forward operation and its adjoint cost two transforms of the padded image per band. NaN spreads
    over the whole band.
    """

    transforms: NDArray[np.complex64]
    """Transforms of the kernels at the padded size, shape (B, height, width // 2 + 1)."""

    width: int
    """Padded width [pixels]."""

    shape: tuple[int, int]
    """Height and width of the images."""

    @classmethod
    def of(cls, kernels: ArrayLike, shape: tuple[int, int]) -> Convolution:
        """Prepare the convolution of images of one shape with `kernels` (B, P, Q), odd sides."""
        kernels = np.ascontiguousarray(kernels, dtype=np.float64)
        if kernels.ndim != 3 or kernels.shape[1] % 2 == 0 or kernels.shape[2] % 2 == 0:
            raise ShapeError(f"kernels must have shape (bands, height, width) with odd sides, got {kernels.shape}")
        height = padded_side(shape[0], kernels.shape[1])
        width = padded_side(shape[1], kernels.shape[2])
        return cls(convolution.transform_kernels(kernels, height, width), width, (int(shape[0]), int(shape[1])))

    def _apply(self, images: ArrayLike, adjoint: bool) -> FloatArray:
        images = np.ascontiguousarray(images, dtype=np.float32)
        expected = (len(self.transforms), *self.shape)
        if images.shape != expected:
            raise ShapeError(f"images must have shape (bands, height, width) = {expected}, got {images.shape}")
        result: FloatArray = convolution.convolve_bands(images, self.transforms, self.width, adjoint)
        return result

    def forward(self, model: ArrayLike) -> FloatArray:
        """Convolve a model, shape (B, H, W)."""
        return self._apply(model, False)

    def adjoint(self, residual: ArrayLike) -> FloatArray:
        """Correlate with the kernels: the gradient of <residual, forward(model)> with respect to the model."""
        return self._apply(residual, True)


def convolve(image: ArrayLike, kernels: ArrayLike) -> FloatArray:
    """Convolve each band of an image with its kernel.

    Parameters
    ----------
    image : array_like, shape (B, H, W)
        Zero is assumed outside.
    kernels : array_like, shape (B, P, Q)
        Odd sides.

    Returns
    -------
    convolved : ndarray, shape (B, H, W)
        NaN in one pixel makes its band NaN.

    Raises
    ------
    ShapeError
        If a shape is wrong or the numbers of bands differ.
    """
    image = np.asarray(image, dtype=np.float32)
    if image.ndim != 3:
        raise ShapeError(f"image must have shape (bands, height, width), got {image.shape}")
    return Convolution.of(kernels, (image.shape[1], image.shape[2])).forward(image)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Packed:
    """The factorized components of a blend in flat buffers, as kernels take them."""

    boxes: NDArray[np.int64]
    """Box (y0, x0, height, width) of each component in pixels of the blend, shape (K, 4)."""

    offsets: NDArray[np.int64]
    """Component k has the pixels offsets[k]:offsets[k + 1], shape (K + 1,)."""

    morphologies: FloatArray
    """Pixels of all components, one after the other, row by row; the largest value of each is 1."""

    spectra: FloatArray
    """Flux of the brightest pixel in each band, shape (K, B)."""

    sources: NDArray[np.int64]
    """Source that each component belongs to, ascending, shape (K,)."""

    def __len__(self) -> int:
        return len(self.boxes)


def pack(scene: Scene, n_bands: int) -> Packed:
    """Pack the components of a scene, in pixels of its box."""
    components = scene.factorized
    boxes = np.array([(*c.box.origin, *c.box.shape) for c in components], dtype=np.int64).reshape(-1, 4)
    boxes[:, :2] -= scene.box.origin
    offsets = np.concatenate([[0], np.cumsum(boxes[:, 2] * boxes[:, 3])]).astype(np.int64)
    morphologies = np.concatenate([np.empty(0, np.float32), *(c.morphology.ravel() for c in components)])
    spectra = np.array([c.spectrum for c in components], dtype=np.float32).reshape(-1, n_bands)
    sources = np.repeat(np.arange(len(scene.sources)), [len(s.components) for s in scene.sources])
    return Packed(
        boxes=boxes,
        offsets=offsets,
        morphologies=morphologies.astype(np.float32, copy=False),
        spectra=spectra,
        sources=sources,
    )


def unpack(packed: Packed, peaks: NDArray[np.int64], box: Box) -> Scene:
    """Make a scene of packed components.

    Parameters
    ----------
    packed : Packed
    peaks : ndarray, shape (K, 2)
        Peaks of all sources in pixels of the blend; one without components becomes a source without light.
    box : Box
        The blend, as array index of the coadd.
    """
    components: list[list[FactorizedComponent]] = [[] for _ in peaks]
    for k, (y0, x0, height, width) in enumerate(packed.boxes.tolist()):
        pixels = packed.morphologies[packed.offsets[k] : packed.offsets[k + 1]]
        components[packed.sources[k]].append(
            FactorizedComponent(
                spectrum=packed.spectra[k].copy(),
                morphology=pixels.reshape(height, width).copy(),
                box=Box(y0 + box.y0, x0 + box.x0, height, width),
            )
        )
    sources = tuple(
        Source(peak=(int(y) + box.y0, int(x) + box.x0), components=tuple(own))
        for (y, x), own in zip(peaks, components, strict=True)
    )
    return Scene(sources=sources, box=box)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rendered:
    """Components as observed, each on its own pixels, for a spectrum of one."""

    boxes: NDArray[np.int64]
    """Boxes of the rendered components in pixels of the blend, shape (K, 4)."""

    offsets: NDArray[np.int64]
    """Component k has the pixels offsets[k]:offsets[k + 1] of every band, shape (K + 1,)."""

    pixels: FloatArray
    """Rendered components, shape (B, offsets[-1])."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SourceModels:
    """Whole sources as observed, each on its own pixels."""

    boxes: NDArray[np.int64]
    """Box (y0, x0, height, width) of each source in pixels of the blend, shape (S, 4)."""

    offsets: NDArray[np.int64]
    """Source s has the pixels offsets[s]:offsets[s + 1] of every band, shape (S + 1,)."""

    pixels: FloatArray
    """Models [unit], shape (B, offsets[-1])."""


@dataclass(frozen=True, slots=True, eq=False)
class KernelSet:
    """Kernels of all bands, with their transforms of every size that was needed so far."""

    stamps: NDArray[np.float64]
    """Difference kernels, shape (B, P, Q), odd sides."""

    _known: dict[int, NDArray[np.complex64]] = field(default_factory=dict)
    _errors: dict[int, tuple[NDArray[np.float64], NDArray[np.float64]]] = field(default_factory=dict)

    def cut_error(self, psfs: NDArray[np.float64]) -> NDArray[np.float64]:
        """Table of `psf.cut_error` for the observed PSFs that the kernels lead to."""
        known = self._errors.get(id(psfs))
        if known is None or known[0] is not psfs:
            known = self._errors[id(psfs)] = psfs, cut_error(self.stamps, psfs)
        return known[1]

    def transforms(self, side: int) -> NDArray[np.complex64]:
        """Transforms for planes of (side, side) pixels; see `transform_kernels`."""
        if side not in self._known:
            self._known[side] = convolution.transform_kernels(self.stamps, side, side)
        return self._known[side]


def render_packed(
    packed: Packed, kernels: KernelSet, shape: tuple[int, int], reach: NDArray[np.int64] | None = None
) -> Rendered:
    """Render every component as observed.

    Parameters
    ----------
    packed : Packed
    kernels : KernelSet
    shape : tuple of int
        Height and width of the blend; nothing is rendered outside.
    reach : ndarray, shape (K,), optional
        How far from its box each component is rendered [pixels]; what the kernels have beyond must be negligible. None:
        half the longer side of the kernels.
    """
    half = max(kernels.stamps.shape[1:]) // 2
    reach = np.full(len(packed), half) if reach is None else np.minimum(reach, half)
    needed = packed.boxes[:, 2:].max(axis=1, initial=0) + 2 * reach
    boxes, offsets = kernels_rendering.rendered_boxes(packed.boxes, reach.astype(np.int64), shape)
    pixels = np.zeros((len(kernels.stamps), offsets[-1]), dtype=np.float32)
    # Few different transform sizes, so that the kernels are transformed a few times only.
    sides = np.array([transform_side(side) for side in needed.tolist()], dtype=np.int64)
    sides[packed.boxes[:, 2] * packed.boxes[:, 3] == 0] = 0
    for side in sorted({*sides.tolist()} - {0}):
        kernels_rendering.render_components(
            packed.boxes,
            packed.offsets,
            packed.morphologies,
            kernels.transforms(side),
            np.flatnonzero(sides == side),
            boxes,
            offsets,
            pixels,
        )
    return Rendered(boxes=boxes, offsets=offsets, pixels=pixels)


def transform_side(side: int) -> int:
    """Round a side up to a multiple of an eighth of its power of two, then to a fast length."""
    step = max(1 << (max(side - 1, 1).bit_length() - 4), 4)
    return int(good_size(-(-side // step) * step, real=True))


def combine_sources(packed: Packed, rendered: Rendered, n_sources: int) -> SourceModels:
    """Add up the rendered components of each source, times their spectra."""
    boxes, offsets = kernels_flux.source_boxes(rendered.boxes, packed.sources, n_sources)
    pixels = kernels_flux.combine_components(
        rendered.pixels, rendered.boxes, rendered.offsets, packed.sources, packed.spectra, boxes, offsets
    )
    return SourceModels(boxes=boxes, offsets=offsets, pixels=pixels)


def render_source(source: Source, kernels: KernelSet, within: Box) -> tuple[FloatArray, Box]:
    """Render one source as it is observed.

    Parameters
    ----------
    source : Source
    kernels : KernelSet
    within : Box
        The image, array index; nothing is rendered outside.

    Returns
    -------
    image : ndarray, shape (B, h, w)
        Flux per pixel [unit of the spectra]; zero below a millionth of the peak of each component, where the
        transforms are no longer accurate. The same bits as when the source is rendered with all of its blend.
    box : Box
        Where it lies: the box of the source grown by half a kernel, inside `within`; empty without components.
    """
    n_bands = len(kernels.stamps)
    if source.box.is_empty:
        return np.zeros((n_bands, 0, 0), dtype=np.float32), Box(*source.peak, 0, 0)
    packed = pack(Scene(sources=(source,), box=within), n_bands)
    models = combine_sources(packed, render_packed(packed, kernels, within.shape), 1)
    y0, x0, height, width = models.boxes[0].tolist()
    return models.pixels.reshape(-1, height, width), Box(y0 + within.y0, x0 + within.x0, height, width)
