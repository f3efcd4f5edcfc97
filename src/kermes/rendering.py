"""From the model frame to the observed image, and the adjoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from rocket_fft import good_size

from kermes.errors import InputError, ShapeError
from kermes.geometry import Box, box_table
from kermes.kernels import convolution, profile_rendering
from kermes.kernels import flux as kernels_flux
from kermes.kernels import rendering as kernels_rendering
from kermes.psf import cut_error
from kermes.scene import (
    CubeComponent,
    FactorizedComponent,
    Modes,
    ProfileComponent,
    Scene,
    Source,
    frame_modes,
    kernel_table,
    stamp_modes,
)

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
    """Pack the components of a scene, all of them factorized, in pixels of its box."""
    sources = np.repeat(np.arange(len(scene.sources)), [len(s.components) for s in scene.sources])
    return _pack(scene.factorized, sources, scene.box, n_bands)


def _pack(components: Sequence[FactorizedComponent], sources: NDArray[np.int64], box: Box, n_bands: int) -> Packed:
    if not components:
        return Packed(
            boxes=np.zeros((0, 4), dtype=np.int64),
            offsets=np.zeros(1, dtype=np.int64),
            morphologies=np.zeros(0, dtype=np.float32),
            spectra=np.zeros((0, n_bands), dtype=np.float32),
            sources=sources,
        )
    boxes = box_table((component.box for component in components), box.origin)
    offsets = np.concatenate([[0], np.cumsum(boxes[:, 2] * boxes[:, 3])]).astype(np.int64)
    morphologies = np.concatenate([np.empty(0, np.float32), *(c.morphology.ravel() for c in components)])
    spectra = np.array([c.spectrum for c in components], dtype=np.float32).reshape(-1, n_bands)
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

    def replaced(self, rows: Sequence[int], models: SourceModels) -> SourceModels:
        """Give the same models but for those of some rows (ascending), which are replaced by others (one for each)."""
        boxes = self.boxes.copy()
        boxes[rows] = models.boxes
        places = dict(zip(rows, range(len(rows)), strict=True))
        pieces = []
        for s in range(len(boxes)):
            source, k = (models, places[s]) if s in places else (self, s)
            pieces.append(source.pixels[:, source.offsets[k] : source.offsets[k + 1]])
        offsets = np.zeros(len(boxes) + 1, dtype=np.int64)
        np.cumsum([piece.shape[1] for piece in pieces], out=offsets[1:])
        return SourceModels(boxes=boxes, offsets=offsets, pixels=np.concatenate(pieces, axis=1))

    def by_source(self, origin: tuple[int, int] = (0, 0)) -> Iterator[tuple[FloatArray, Box]]:
        """Give the pixels (B, h, w) of one source after the other, and their box moved by `origin`; none if empty."""
        for s in range(len(self.boxes)):
            pixels, box = self.of_source(s, origin)
            if not box.is_empty:
                yield pixels, box

    def of_source(self, s: int, origin: tuple[int, int] = (0, 0)) -> tuple[FloatArray, Box]:
        """Give the pixels (B, h, w) of one source, and their box moved by `origin`."""
        box = Box(*self.boxes[s].tolist())
        pixels = self.pixels[:, self.offsets[s] : self.offsets[s + 1]]
        return pixels.reshape(len(pixels), *box.shape), box.shift(*origin)


@dataclass(frozen=True, slots=True, eq=False)
class KernelSet:
    """Kernels of all bands, with their transforms of every size that was needed so far."""

    given: NDArray[np.float64] | Callable[[], NDArray[np.float64]]
    """Difference kernels, shape (B, P, Q), odd sides, or a function that makes them when they are needed: profiles do
    without."""

    given_psfs: NDArray[np.float64] | Callable[[], NDArray[np.float64]] | None = None
    """Observed PSFs, shape (B, P', Q'), odd sides: what profiles are convolved with, from `psf.continued` to have
    wings; or a function that makes them, as free shapes do without. None: profiles cannot be rendered."""

    _made: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    _known: dict[int, NDArray[np.complex64]] = field(default_factory=dict)
    _known_psfs: dict[int, NDArray[np.complex64]] = field(default_factory=dict)
    _errors: dict[tuple[int, bool], tuple[NDArray[np.float64], NDArray[np.float64]]] = field(default_factory=dict)

    def _array(self, name: str, given: NDArray[np.float64] | Callable[[], NDArray[np.float64]]) -> NDArray[np.float64]:
        if not callable(given):
            return given
        if name not in self._made:
            # Threads that come at the same time make the same.
            self._made[name] = given()
        return self._made[name]

    @property
    def stamps(self) -> NDArray[np.float64]:
        """Difference kernels, shape (B, P, Q), odd sides."""
        return self._array("stamps", self.given)

    @property
    def psfs(self) -> NDArray[np.float64] | None:
        """Observed PSFs, shape (B, P', Q'), odd sides; None: not known."""
        return None if self.given_psfs is None else self._array("psfs", self.given_psfs)

    @property
    def n_bands(self) -> int:
        """Number of bands."""
        for given in (self.given, self.given_psfs):
            if given is not None and not callable(given):
                return len(given)
        return len(self.stamps)

    def cut_error(self, psfs: NDArray[np.float64]) -> NDArray[np.float64]:
        """Table of `psf.cut_error` for the observed PSFs that the kernels lead to."""
        return self._cut_error(psfs, False)

    def psf_cut_error(self, psfs: NDArray[np.float64]) -> NDArray[np.float64]:
        """Table of `psf.cut_error` for the observed PSFs themselves."""
        return self._cut_error(psfs, True)

    def _cut_error(self, psfs: NDArray[np.float64], itself: bool) -> NDArray[np.float64]:
        known = self._errors.get((id(psfs), itself))
        if known is None or known[0] is not psfs:
            table = cut_error(psfs if itself else self.stamps, psfs)
            known = self._errors[id(psfs), itself] = psfs, table
        return known[1]

    def transforms(self, side: int) -> NDArray[np.complex64]:
        """Transforms for planes of (side, side) pixels; see `transform_kernels`."""
        if side not in self._known:
            self._known[side] = convolution.transform_kernels(self.stamps, side, side)
        return self._known[side]

    def psf_transforms(self, side: int) -> NDArray[np.complex64]:
        """Transforms of the observed PSFs for stamps of (side, side) pixels; what does not fit wraps around."""
        if self.psfs is None:
            raise InputError("kernels must hold the observed PSFs to render profiles, got none")
        if side not in self._known_psfs:
            self._known_psfs[side] = convolution.transform_kernels(self.psfs, side, side)
        return self._known_psfs[side]


def render_packed(
    packed: Packed,
    kernels: KernelSet,
    shape: tuple[int, int],
    reach: NDArray[np.int64] | None = None,
    lit_only: bool = False,
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
    lit_only : bool, optional
        Whether bands in which a component has no light are left at zero.
    """
    if not len(packed):
        nothing = np.zeros((kernels.n_bands, 0), dtype=np.float32)
        return Rendered(boxes=packed.boxes, offsets=packed.offsets, pixels=nothing)
    half = max(kernels.stamps.shape[1:]) // 2
    reach = np.full(len(packed), half) if reach is None else np.minimum(reach, half)
    needed = packed.boxes[:, 2:].max(axis=1, initial=0) + 2 * reach
    boxes, offsets = kernels_rendering.rendered_boxes(packed.boxes, reach.astype(np.int64), shape)
    pixels = np.zeros((len(kernels.stamps), offsets[-1]), dtype=np.float32)
    wanted = packed.spectra != 0 if lit_only else np.ones(packed.spectra.shape, dtype=bool)
    # Few different transform sizes, so that the kernels are transformed a few times only.
    sides = np.array([transform_side(side) for side in needed.tolist()], dtype=np.int64)
    sides[packed.boxes[:, 2] * packed.boxes[:, 3] == 0] = 0
    for side in sorted({*sides.tolist()} - {0}):
        kernels_rendering.render_components(
            packed.boxes,
            packed.offsets,
            packed.morphologies,
            wanted,
            kernels.transforms(side),
            np.flatnonzero(sides == side),
            boxes,
            offsets,
            pixels,
        )
    return Rendered(boxes=boxes, offsets=offsets, pixels=pixels)


def transform_side(side: int) -> int:
    """Round a side up to a multiple of an eighth of its power of two, then to a fast length."""
    step = max(1 << max(side - 1, 1).bit_length() >> 4, 4)
    return int(good_size(-(-side // step) * step, real=True))


def combine_sources(packed: Packed, rendered: Rendered, n_sources: int) -> SourceModels:
    """Add up the rendered components of each source, times their spectra."""
    boxes, offsets = kernels_flux.source_boxes(rendered.boxes, packed.sources, n_sources)
    pixels = kernels_flux.combine_components(
        rendered.pixels, rendered.boxes, rendered.offsets, packed.sources, packed.spectra, boxes, offsets
    )
    return SourceModels(boxes=boxes, offsets=offsets, pixels=pixels)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedProfiles:
    """The profile components of a blend in flat arrays, as kernels take them."""

    boxes: NDArray[np.int64]
    """Stamp (y0, x0, side, side) of each component in pixels of the blend, shape (K, 4); may reach beyond it."""

    shapes: NDArray[np.float64]
    """y and x from the first pixel of the stamp, ln r (-inf: a point source), e1, e2, ln n; shape (K, 6)."""

    spectra: FloatArray
    """Total flux in each band, shape (K, B)."""

    sources: NDArray[np.int64]
    """Source that each component belongs to, ascending, shape (K,)."""

    sigmas: tuple[float, ...]
    """Width of the PSF of the model frame [pixels], K numbers."""

    def __len__(self) -> int:
        return len(self.boxes)

    def within(self, shape: tuple[int, int]) -> NDArray[np.int64]:
        """Cut the stamps at the edge of the blend: boxes (K, 4)."""
        first = np.maximum(self.boxes[:, :2], 0)
        sides = np.minimum(self.boxes[:, :2] + self.boxes[:, 2:], shape) - first
        sides[(sides <= 0).any(axis=1)] = 0
        return np.concatenate([first, sides], axis=1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedTemplates:
    """What a scene has of light as it is observed."""

    boxes: NDArray[np.int64]
    """Boxes (K, 4) in pixels of the blend."""

    cubes: tuple[FloatArray, ...]
    """Pixels (B, h, w) of each."""

    sources: NDArray[np.int64]
    """Source that each belongs to, ascending, shape (K,)."""

    def add(self, models: SourceModels) -> None:
        """Add them to the models of their sources, in place."""
        for s, cube, (y0, x0, height, width) in zip(self.sources, self.cubes, self.boxes.tolist(), strict=True):
            box = Box(*models.boxes[s].tolist())
            pixels = models.pixels[:, models.offsets[s] : models.offsets[s + 1]].reshape(-1, *box.shape)
            pixels[:, *Box(y0, x0, height, width).within(box)] += cube


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedScene:
    """The components of a scene, kind by kind, in pixels of its box."""

    factorized: Packed
    """Factorized components and cubes."""

    profiles: PackedProfiles
    templates: PackedTemplates
    n_sources: int
    shape: tuple[int, int]
    """Height and width of the box."""

    def observed(self, kernels: KernelSet) -> SourceModels:
        """Render every source as observed, see `render_scene`."""
        profiles = self.profiles
        models = self._combined(render_packed(self.factorized, kernels, self.shape, lit_only=True))
        for side in np.unique(profiles.boxes[:, 2]).tolist():
            _draw(profiles, profiles.boxes[:, 2] == side, stamp_modes(side), kernels.psf_transforms(side), models)
        return models

    def in_frame(self) -> SourceModels:
        """Evaluate every source in the model frame, see `frame_models`."""
        packed, profiles = self.factorized, self.profiles
        models = self._combined(Rendered(boxes=packed.boxes, offsets=packed.offsets, pixels=packed.morphologies[None]))
        kinds = list(zip(profiles.boxes[:, 2].tolist(), profiles.sigmas, strict=True))
        for side, sigma in sorted(set(kinds)):
            members = np.array([kind == (side, sigma) for kind in kinds])
            without_psf = np.empty((0, side, side // 2 + 1), dtype=np.complex64)
            _draw(profiles, members, frame_modes(side, sigma), without_psf, models)
        return models

    def _combined(self, rendered: Rendered) -> SourceModels:
        """Add up the rendered components and the templates of each source, on pixels that hold its profiles too."""
        packed, profiles, templates = self.factorized, self.profiles, self.templates
        boxes, offsets = kernels_flux.source_boxes(
            np.concatenate([rendered.boxes, profiles.within(self.shape), templates.boxes]),
            np.concatenate([packed.sources, profiles.sources, templates.sources]),
            self.n_sources,
        )
        pixels = kernels_flux.combine_components(
            rendered.pixels, rendered.boxes, rendered.offsets, packed.sources, packed.spectra, boxes, offsets
        )
        models = SourceModels(boxes=boxes, offsets=offsets, pixels=pixels)
        templates.add(models)
        return models


def _planes(component: CubeComponent) -> list[FactorizedComponent]:
    """Write a cube as components that have light in one band each."""
    planes = []
    for b, plane in enumerate(component.cube):
        spectrum = np.zeros(len(component.cube), dtype=np.float32)
        spectrum[b] = np.abs(plane).max(initial=0.0)
        morphology = plane / spectrum[b] if spectrum[b] > 0 else plane
        planes.append(FactorizedComponent(spectrum=spectrum, morphology=morphology, box=component.box))
    return planes


def pack_scene(scene: Scene, n_bands: int) -> PackedScene:
    """Pack the components of a scene, in any mix, in pixels of its box; raises InputError for those of other kinds."""
    factorized: list[FactorizedComponent] = []
    profiles: list[ProfileComponent] = []
    templates: list[CubeComponent] = []
    owners: tuple[list[int], list[int], list[int]] = [], [], []
    for s, source in enumerate(scene.sources):
        for component in source.components:
            if isinstance(component, ProfileComponent):
                profiles.append(component)
                owners[1].append(s)
            elif isinstance(component, FactorizedComponent):
                factorized.append(component)
                owners[0].append(s)
            elif isinstance(component, CubeComponent) and component.observed:
                templates.append(component)
                owners[2].append(s)
            elif isinstance(component, CubeComponent):
                factorized += _planes(component)
                owners[0].extend([s] * len(component.cube))
            else:
                raise InputError(
                    "components must be factorized, cubes, profiles or templates here, "
                    f"got a {type(component).__name__}"
                )
    of_factorized, of_profiles, of_templates = (np.array(numbers, dtype=np.int64) for numbers in owners)
    return PackedScene(
        factorized=_pack(factorized, of_factorized, scene.box, n_bands),
        profiles=PackedProfiles(
            boxes=box_table((component.box for component in profiles), scene.box.origin),
            shapes=np.array([c.shape for c in profiles]).reshape(-1, 6),
            spectra=np.array([c.spectrum for c in profiles], dtype=np.float32).reshape(-1, n_bands),
            sources=of_profiles,
            sigmas=tuple(c.sigma for c in profiles),
        ),
        templates=PackedTemplates(
            boxes=box_table((component.box for component in templates), scene.box.origin),
            cubes=tuple(c.cube for c in templates),
            sources=of_templates,
        ),
        n_sources=len(scene.sources),
        shape=scene.box.shape,
    )


def _draw(
    profiles: PackedProfiles,
    members: NDArray[np.bool_],
    modes: Modes,
    transforms: NDArray[np.complex64],
    to: SourceModels,
) -> None:
    """Add some profiles, all on stamps of one side, to the models of their sources."""
    profile_rendering.add_profiles(
        kernel_table(),
        modes,
        transforms,
        profiles.boxes,
        profiles.shapes,
        profiles.spectra,
        profiles.sources,
        np.flatnonzero(members),
        to.boxes,
        to.offsets,
        to.pixels,
    )


def render_scene(scene: Scene, kernels: KernelSet) -> SourceModels:
    """Render every source as observed.

    Profiles are drawn on their stamps with the observed PSFs themselves, not by way of the model frame.

    Parameters
    ----------
    scene : Scene
        Factorized components, cubes, profiles and templates, in any mix.
    kernels : KernelSet

    Returns
    -------
    models : SourceModels
        In pixels of the scene's box; nothing is rendered outside. Zero below a millionth of the peak of each
        factorized component or stamp, where the transforms are no longer accurate.

    Raises
    ------
    InputError
        If there are components of other kinds, or profiles while the observed PSFs are not given.

    Notes
    -----
    O(B side^2 log side) for a component on a stamp of that side.
    """
    return pack_scene(scene, kernels.n_bands).observed(kernels)


def frame_models(scene: Scene, n_bands: int) -> SourceModels:
    """Evaluate every source in the model frame.

    Parameters, errors and what is returned are as in `render_scene`; profiles are those of
    `ProfileComponent.evaluate`, zero below a millionth of their peak, and templates as observed.
    """
    return pack_scene(scene, n_bands).in_frame()


def outer_box(box: Box, psfs: NDArray[np.float64], image: Box) -> Box:
    """Grow the box of a blend by half its PSFs (B, P, Q), inside the image: the pixels that its models can reach."""
    return box.grow(max(psfs.shape[1:]) // 2) & image


def render_source(source: Source, kernels: KernelSet, within: Box) -> tuple[FloatArray, Box]:
    """Render one source as it is observed.

    Parameters
    ----------
    source : Source
        Factorized components, cubes, profiles and templates, in any mix.
    kernels : KernelSet
    within : Box
        The pixels that its blend can reach, array index; nothing is rendered outside.

    Returns
    -------
    image : ndarray, shape (B, h, w)
        Flux per pixel [unit of the spectra]. The same bits as when the source is rendered with all of its blend.
    box : Box
        Where it lies, inside `within`: the boxes of factorized components grown by half a kernel, and the stamps of
        profiles; empty without components there.

    Raises
    ------
    InputError
        As `render_scene`.
    """
    models = render_scene(Scene(sources=(source,), box=within), kernels)
    y0, x0, height, width = models.boxes[0].tolist()
    if models.offsets[1] == 0:
        return np.zeros((len(models.pixels), 0, 0), dtype=np.float32), Box(*source.peak, 0, 0)
    return models.pixels.reshape(-1, height, width), Box(y0 + within.y0, x0 + within.x0, height, width)
