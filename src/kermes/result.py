"""What users hold after deblending: tables, and the pixels of one object at a time."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from itertools import pairwise
from os import PathLike
from typing import Any, get_args

import numpy as np
from astropy import units
from astropy.coordinates import SkyCoord
from astropy.table import Column, Row, Table
from astropy.wcs.utils import proj_plane_pixel_scales
from numpy.typing import NDArray

from kermes.catalog import (
    Model,
    Reason,
    candidate_columns,
    empty_columns,
    in_nanojansky,
    make_candidates,
    with_magnitudes,
)
from kermes.coadd import Coadd
from kermes.config import Config, StrayRule, StrayToPoints
from kermes.errors import DataWarning, InputError
from kermes.flux import (
    LEAST_MODEL,
    claimed,
    redistribute,
    redistribution_covariance,
    replace_neighbors,
    stray_fluxes,
    takes_stray,
)
from kermes.geometry import Box, Footprint, Footprints
from kermes.metrics import registered_metrics
from kermes.psf import continued, difference_kernels, model_psf
from kermes.rendering import KernelSet, frame_models, outer_box, render_scene
from kermes.scene import ProfileComponent, Scene, Source

FloatArray = NDArray[np.float32]


_N_KERNEL_SETS = 16  # PSFs whose kernels are kept; blends that follow each other often share one


_DRAWN_TOGETHER = 32  # sources of a blend whose pixels are in memory at the same time

_MOST_BOXES = 32  # boxes that are drawn by themselves before the whole image is

TOLERANCE = 0.05
"""How far a stored model as observed may be from the one that was fitted, unless asked otherwise [sigma]."""


class StampKind(StrEnum):
    """What the pixels of one object are made from."""

    MODEL = "model"
    """Its model as observed."""

    REDISTRIBUTED = "redistributed"
    """Its share of the image; zero in pixels that belong to nobody."""

    NEIGHBOR_SUBTRACTED = "neighbor_subtracted"
    """The image less the models of all others."""

    NOISE_REPLACED = "noise_replaced"
    """Its share of the image, and noise in place of what belongs to others."""


@dataclass(frozen=True, slots=True, eq=False)
class Stamp:
    """Pixels of one object in one band, and where they lie; or in several bands, (B, h, w) instead of (h, w)."""

    array: FloatArray
    """Flux per pixel [unit of the coadd], shape of `box`."""

    box: Box
    """Pixels of `array`, in the coadd's coordinates."""

    variance: FloatArray | None = None
    """Variance of `array` from the noise of the pixels [unit^2], shape of `box`; errors of models are not in it. None:
    a model, which has no noise."""

    valid: NDArray[np.bool_] | None = None
    """True where the pixel of the image may be used, shape of `box`. None: a model, which has light everywhere."""


@dataclass(frozen=True, slots=True, eq=False)
class HeavyFootprint:
    """The pixels of one object, with values."""

    footprint: Footprint
    """Where they are, in the coadd's coordinates."""

    values: FloatArray
    """Values of all pixels in the order of the footprint [unit of the coadd], shape (B, footprint.area)."""

    bands: tuple[str, ...]
    """Names of the bands."""


@dataclass(frozen=True, eq=False)
class ObjectHandle:
    """One object of a result: its row and its pixels.

    All stamps share one box: that of the model as observed, and a margin if one is asked for. A model without light has
    empty stamps, but for the margin.
    """

    result: Result
    """What it belongs to."""

    object_id: int
    """Number of the object."""

    @property
    def index(self) -> int:
        """Its row in the table of objects."""
        return self.result._index[self.object_id]

    @cached_property
    def blend_id(self) -> int:
        """Number of the blend it was fitted in."""
        return self.result._blend_of(self.object_id)

    @property
    def row(self) -> Row:
        """Its row of the table of objects."""
        return self.result.objects[self.index]

    @property
    def bands(self) -> tuple[str, ...]:
        """Names of the bands."""
        return self.result.bands

    @cached_property
    def source(self) -> Source:
        """Its components, as array index of the coadd (origin not added)."""
        return self.result.models[self.object_id]

    @property
    def peak(self) -> tuple[int, int]:
        """Its peak (y, x), in the coadd's coordinates."""
        return self.source.peak[0] + self.result.origin[0], self.source.peak[1] + self.result.origin[1]

    @cached_property
    def center(self) -> tuple[float, float]:
        """Fitted centre (y, x), in the coadd's coordinates; where none was fitted, its position in the table."""
        y, x = float(self.row["center_y"]), float(self.row["center_x"])
        return (y, x) if np.isfinite(y + x) else (float(self.row["y"]), float(self.row["x"]))

    @property
    def box(self) -> Box:
        """Pixels of its stamps without a margin, in the coadd's coordinates."""
        return self._observed[1].shift(*self.result.origin)

    @cached_property
    def _observed(self) -> tuple[FloatArray, Box]:
        """Convolved model (B, h, w), and its box as array index."""
        return self.result._observe([self.source], self.blend_id)[0]

    @cached_property
    def _observed_point(self) -> tuple[FloatArray, Box]:
        """A point source of flux one at its centre, as observed (B, h, w), and its box as array index."""
        return self.result._observe_points([self], self.blend_id)[0]

    @cached_property
    def _point(self) -> Source:
        """A point source of flux one at its centre."""
        y, x = (value - origin for value, origin in zip(self.center, self.result.origin, strict=True))
        half = max(self.result.psfs[self.blend_id].shape[1:]) // 2 + 1
        point = ProfileComponent(
            spectrum=np.ones(len(self.bands), dtype=np.float32),
            center=np.array([y, x]),
            shear=np.zeros(2),
            sigma=self.result.config.model_psf_sigma,
            box=Box(round(y) - half, round(x) - half, 2 * half, 2 * half),
        )
        return Source(peak=self.source.peak, components=(point,))

    def _box(self, margin: int) -> Box:
        """Pixels of its stamps, as array index."""
        if margin < 0:
            raise InputError(f"margin must be >= 0, got {margin}")
        return self._observed[1].grow(margin) & Box.of_shape(self.result.shape)

    def _noise(self, bands: Sequence[str], box: Box) -> FloatArray:
        """White noise of one; it follows from the object, the band and the offset from the peak, not from the box."""
        y, x = self.source.peak
        number = _outwards(box.shift(-y, -x))
        seeds = (np.random.SeedSequence([self.object_id, *band.encode()]) for band in bands)
        n = number.max(initial=-1) + 1
        return np.stack([np.random.default_rng(seed).standard_normal(n, dtype=np.float32)[number] for seed in seeds])

    def stamps(self, kind: StampKind | str, bands: Sequence[str] | None = None, margin: int = 0) -> dict[str, Stamp]:
        """Cut out one kind of stamp in several bands.

        All is as in `cube`, but that there is a `Stamp` by band.
        """
        return self._by_band(bands, self.cube(kind, bands, margin))

    def _by_band(self, bands: Sequence[str] | None, cube: Stamp) -> dict[str, Stamp]:
        """Take a cube apart."""
        parts: list[Any] = [[None] * len(cube.array) if part is None else part for part in (cube.variance, cube.valid)]
        planes = zip(self.bands if bands is None else bands, cube.array, *parts, strict=True)
        return {band: Stamp(array, cube.box, variance, valid) for band, array, variance, valid in planes}

    def cube(self, kind: StampKind | str, bands: Sequence[str] | None = None, margin: int = 0) -> Stamp:
        """Cut out one kind of stamp in several bands, all in one array.

        Parameters
        ----------
        kind : StampKind or str
            "model": as observed. "redistributed": every valid pixel is divided among all objects of the image in
            proportion to the positive part of their models as observed; over all objects the shares add up to the
            image. "neighbor_subtracted": the image less the models of all other objects. "noise_replaced": the share,
            and noise that brings the variance back to that of the image; where the object has no share of a pixel,
            noise alone. See `kermes.flux` for the formulas.
        bands : sequence of str, optional
            Left out: all.
        margin : int, optional
            Pixels added on each side of the box of the model, so that apertures fit.

        Returns
        -------
        cube : Stamp
            Its arrays have the shape (B, h, w), in the order of `bands`; cut at the edge of the image; new pixels.
            Where all models together stay below `flux.LEAST_MODEL` times the noise, a pixel belongs to nobody:
            "redistributed" is zero and "noise_replaced" is the image there. Invalid pixels are zero in "redistributed";
            in "neighbor_subtracted" and "noise_replaced" they are as in the image, NaN included. The variance is that
            of the image, and the share squared times it for "redistributed".

        Raises
        ------
        InputError
            If the kind or a band is unknown, the margin is negative, or the result has no coadd and the kind is not
            "model".

        Notes
        -----
        The noise is drawn from `object_id`, the name of the band and the offset from the peak: it does not depend on
        the order in which stamps are cut, on other bands or on the margin.
        """
        kind = _checked_kind(kind)
        b, box = self.result.band_indices(bands), self._box(margin)
        model = _on(box, *self._observed)[b]
        in_coadd = box.shift(*self.result.origin)
        if kind is StampKind.MODEL:
            return Stamp(model, in_coadd)
        coadd = self.result.need_coadd(kind)
        images, variance, valid = (_cut(plane, b, box) for plane in (coadd.images, coadd.variance, coadd.valid))
        if kind is StampKind.NEIGHBOR_SUBTRACTED:
            images -= self.result._sum_of_models(box)[b] - model
            return Stamp(images, in_coadd, variance, valid)
        total = self.result._sum_of_models(box, positive=True)[b]
        if kind is StampKind.REDISTRIBUTED:
            images = redistribute(images, variance, valid, model, total)
            variance = redistribution_covariance(variance, valid, model, model, total)
        else:
            noise = self._noise(self.bands if bands is None else bands, box)
            images = replace_neighbors(images, variance, valid, model, total, noise)
        return Stamp(images, in_coadd, variance, valid)

    def stamp(self, kind: StampKind | str, band: str, margin: int = 0) -> Stamp:
        """Cut out one kind of stamp in one band; kind, margin and errors as in `stamps`."""
        return self.stamps(kind, (band,), margin)[band]

    def psf_stamps(self, bands: Sequence[str] | None = None, margin: int = 0) -> dict[str, Stamp]:
        """Draw a point source of flux one at its centre, as its stamps would show it.

        Parameters
        ----------
        bands, margin
            As in `stamps`.

        Returns
        -------
        stamps : dict
            A `Stamp` by band on the pixels of `stamps`; zero in a band without a PSF. Wings reach as far as the stamp
            of the PSF.

        Raises
        ------
        InputError
            If a band is unknown or the margin negative.
        """
        return self._by_band(bands, self.psf_cube(bands, margin))

    def psf_cube(self, bands: Sequence[str] | None = None, margin: int = 0) -> Stamp:
        """Draw a point source of flux one at its centre, all bands in one array; else as `psf_stamps`."""
        b, box = self.result.band_indices(bands), self._box(margin)
        return Stamp(_on(box, *self._observed_point)[b], box.shift(*self.result.origin))

    def model(self, band: str, convolved: bool = True) -> Stamp:
        """Evaluate its model in one band.

        Parameters
        ----------
        band : str
        convolved : bool, optional
            True: as observed. False: in the model frame, on the same pixels.

        Returns
        -------
        stamp : Stamp
            New pixels; cut at the edge of the image.

        Raises
        ------
        InputError
            If the band is unknown.
        """
        stamp = self.stamp(StampKind.MODEL, band)
        if convolved:
            return stamp
        box, source_box = self._observed[1], self.source.box
        model = np.zeros(box.shape, dtype=np.float32)
        b = self.result._band_index(band)
        model[source_box.within(box)] = self.source.model(len(self.bands))[(b, *box.within(source_box))]
        return Stamp(model, stamp.box)

    def redistributed(self, band: str) -> Stamp:
        """Share out the observed flux in one band and return what belongs to this object, as `stamps` says."""
        return self.stamp(StampKind.REDISTRIBUTED, band)

    def neighbor_subtracted(self, band: str) -> Stamp:
        """Subtract the models of all other objects from the image in one band, as `stamps` says."""
        return self.stamp(StampKind.NEIGHBOR_SUBTRACTED, band)

    def noise_replaced(self, band: str) -> Stamp:
        """Replace in one band what belongs to others by noise of the same variance, as `stamps` says."""
        return self.stamp(StampKind.NOISE_REPLACED, band)

    def footprint(
        self, kind: StampKind | str = "model", bands: Sequence[str] | None = None, level: float = LEAST_MODEL
    ) -> HeavyFootprint:
        """List the pixels that its model reaches, and their values.

        Parameters
        ----------
        kind, bands
            What the values are, as in `stamps`.
        level : float, optional
            Pixels are left out where its model is below so many sigma in all bands; without the coadd, where it is
            zero.

        Returns
        -------
        footprint : HeavyFootprint
            The same pixels for all kinds and bands.

        Raises
        ------
        InputError
            As `stamps`.
        """
        model, box = self._observed
        coadd = self.result.coadd
        if coadd is None:
            reached = model != 0
        else:
            window = (slice(None), box.y, box.x)
            valid, variance = coadd.valid[window], coadd.variance[window]
            noise = np.sqrt(variance, where=valid, out=np.zeros_like(variance))
            # Where nothing was observed in a band, its model says nothing of where the object is seen.
            reached = valid & (model > level * noise)
        bands = self.bands if bands is None else tuple(bands)
        mask = reached.any(axis=0)
        stamps = self.stamps(kind, bands)
        values = np.stack([stamps[band].array[mask] for band in bands])
        footprint = Footprint.of_mask(mask, box.y0, box.x0).shift(*self.result.origin)
        return HeavyFootprint(footprint, values, bands)

    def redistribution_covariance(self, object_id: int, band: str) -> Stamp:
        """Find the covariance of its redistributed pixels with those of another object.

        Parameters
        ----------
        object_id : int
            The other object; its own number gives the variance.
        band : str

        Returns
        -------
        covariance : Stamp
            Per pixel [unit^2] on the pixels that both boxes hold; see `kermes.flux.redistribution_covariance`. Its
            `variance` and `valid` are None.

        Raises
        ------
        InputError
            If the object or the band is unknown, or the result has no coadd.
        """
        b = self.result.band_indices([band])
        other = self.result[object_id]
        coadd = self.result.need_coadd("redistribution_covariance")
        box = self._observed[1] & other._observed[1]
        variance, valid = (_cut(plane, b, box) for plane in (coadd.variance, coadd.valid))
        total = self.result._sum_of_models(box, positive=True)[b]
        models = _on(box, *self._observed)[b], _on(box, *other._observed)[b]
        covariance = redistribution_covariance(variance, valid, *models, total)
        return Stamp(covariance[0], box.shift(*self.result.origin))

    def __repr__(self) -> str:
        y, x = self.peak
        return f"<Object {self.object_id}: peak y={y}, x={x}, {self.row['outcome']}, bands {' '.join(self.bands)}>"

    def _repr_html_(self) -> str:
        """Show it in a notebook, with its strip of pictures."""
        from kermes.plots import object_html

        return object_html(self)


def _checked_kind(kind: StampKind | str) -> StampKind:
    try:
        return StampKind(kind)
    except ValueError:
        raise InputError(f"kind must be one of {', '.join(StampKind)}, got {kind!r}") from None


def _whole_numbers(given: int | Iterable[int] | None, name: str) -> NDArray[np.int64]:
    try:
        values: list[Any] = [] if given is None else list(given)  # type: ignore[arg-type]
    except TypeError:
        values = [given]
    numbers = np.asarray(values)
    if numbers.size and numbers.dtype.kind not in "iu":
        raise InputError(f"{name} must be a whole number, or several, got {given!r}")
    return numbers.astype(np.int64)


def _cut(planes: NDArray[Any], b: slice | list[int], box: Box) -> NDArray[Any]:
    """Cut some of the planes (B, H, W) to a box; new pixels."""
    return np.array(planes[b, box.y, box.x])


def _on(box: Box, model: FloatArray, own: Box) -> FloatArray:
    """Place a model (B, h, w), which lies on a box of its own, on the pixels of another one; new pixels."""
    out = np.zeros((len(model), *box.shape), dtype=np.float32)
    out[(slice(None), *own.within(box))] = model[(slice(None), *box.within(own))]
    return out


def _outwards(box: Box) -> NDArray[np.int64]:
    """Number the pixels of a box from the origin of its coordinates outwards, ring by square ring, (h, w)."""
    dy, dx = np.arange(box.y0, box.y1)[:, None], np.arange(box.x0, box.x1)
    ring = np.maximum(np.abs(dy), np.abs(dx))
    # Row by row: the first row of a ring, two pixels of each of the next, the last row.
    between = 2 * ring + 1 + 2 * (dy + ring - 1) + (dx > 0)
    within = np.where(dy == -ring, dx + ring, np.where(dy == ring, 7 * ring - 1 + dx, between))
    return np.asarray((ring > 0) * (2 * ring - 1) ** 2 + within)


class ModelStore(Mapping[int, Source]):
    """Models that are not in memory, and what can be said of them without reading the tables."""

    @abstractmethod
    def blend_of(self, object_id: int) -> int:
        """`blend_id` of an object."""

    @abstractmethod
    def box_of_blend(self, blend_id: int) -> Box:
        """Box of a blend, as array index."""

    @abstractmethod
    def within(self, box: Box) -> dict[int, tuple[int, int]]:
        """Peaks, as array index, of the objects that have theirs in a box, by `object_id`."""


class _Lazy:
    """Field of a dataclass: a table or the like, or what makes it when it is first read.

    A table of a hundred columns takes milliseconds to make, as long as the deblending of a small blend.
    """

    def __init__(self, default: Callable[[Any], Any] | None = None) -> None:
        self._default = default  # makes the value of an instance that was given None

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = "_" + name

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            if self._default is None:
                raise AttributeError  # so the field has no default
            return None
        value = instance.__dict__[self._name]
        if value is None and self._default is not None:
            value = instance.__dict__[self._name] = self._default(instance)
        elif callable(value):
            value = instance.__dict__[self._name] = value()
        return value

    def __set__(self, instance: Any, value: Any) -> None:
        instance.__dict__[self._name] = value


def model_ids(objects: Table, candidates: Table) -> NDArray[np.int64]:
    """Number of the model of each object, and minus that of each candidate, with their blends, shape (2, N)."""
    of_objects = np.array([objects["object_id"], objects["blend_id"]], dtype=np.int64)
    of_candidates = np.array([candidates["candidate_id"], candidates["blend_id"]], dtype=np.int64)
    return np.concatenate([of_objects, of_candidates * [[-1], [1]]], axis=1)


def _together(pairs: NDArray[np.int64]) -> Iterator[tuple[int, list[int]]]:
    """Group keys and blends (N, 2) by blend, a limited number of keys at a time."""
    order = np.argsort(pairs[:, 1], kind="stable")
    keys, blends = pairs[order].T
    bounds = np.append(np.flatnonzero(np.diff(blends, prepend=-1)), len(blends)).tolist()
    for first, end in pairwise(bounds):
        for k in range(first, end, _DRAWN_TOGETHER):
            yield int(blends[first]), keys[k : min(k + _DRAWN_TOGETHER, end)].tolist()


def _no_candidates(result: Result) -> Table:
    columns = candidate_columns(result.bands)
    return make_candidates(empty_columns(columns, 0), result.bands, result.unit)


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """What became of one coadd: tables of objects, parents and blends, and a model of every object.

    ``result[object_id]`` is one object; iterating yields all of them in the order of `objects`.

    Raises
    ------
    InputError
        If the coadd has other bands, another shape or another origin than the result.
    """

    objects: _Lazy = _Lazy()
    """One row per peak. As the other tables, given as a Table or as a function that makes it when it is first read."""

    parents: _Lazy = _Lazy()
    """One row per footprint."""

    blends: _Lazy = _Lazy()
    """One row per blend."""

    candidates: _Lazy = _Lazy(_no_candidates)
    """Sources that were found although nobody had listed them; left out: none."""

    bands: tuple[str, ...]
    """Names of the bands, in the order of the spectra."""

    config: Config
    """The settings it was made with."""

    models: Mapping[int, Source]
    """Model of each object by `object_id`, and of each candidate by minus its `candidate_id`, as array index of the
    coadd (origin not added)."""

    psfs: Mapping[int, NDArray[np.float64]]
    """Observed PSF (B, P, Q) of each blend by `blend_id`."""

    shape: tuple[int, int]
    """Height and width of the image."""

    origin: tuple[int, int] = (0, 0)
    """Coordinates (y, x) of the first pixel of the image."""

    unit: units.UnitBase | None = None
    """Unit of the fluxes; None: not known."""

    zero_point: float | None = None
    """AB magnitude of a flux of 1 `unit`; None: not known."""

    noise_factors: NDArray[np.float64] = None  # type: ignore[assignment]
    """How much more noise sums over the PSF have than if pixels were independent, shape (B,); in the errors of fluxes.
    None: 1 in all bands."""

    wcs: Any = None
    """astropy WCS of pixel index (x, y), counted from 0 at the first pixel of the image; None: no sky."""

    coadd: Coadd | None = None
    """The images it was made from; None: not at hand, and only models can be evaluated."""

    footprints: _Lazy = _Lazy(lambda result: Footprints.of({}))
    """Pixels of each parent by `parent_id`, as array index: a mapping of `Footprint`, or a function that makes it. A
    parent that is a peak outside of every footprint has none, nor has one of what was written by older versions."""

    tolerance: float = 0.0
    """How far models may be from those that were fitted, as observed [sigma]: what a file has rounded. 0: not at
    all."""

    inputs: Mapping[str, str] | None = None
    """Checksums of the images it was made from, as `Coadd.checksums`; None: those of `coadd`."""

    notes: Mapping[str, Any] = field(default_factory=dict)
    """What else came with it, as JSON: for one of another program's models, what kermes has no word for."""

    n_peaks: int | None = None
    """Number of peaks that were asked for; None: not known."""

    timings: _Lazy = _Lazy(lambda result: {})
    """How long it took [s], a mapping by what took it, or a function that makes it; not part of the answer."""

    total: FloatArray | None = None
    """Sum of the positive parts of all convolved models (B, H, W), if it is known already."""

    is_part: bool = False
    """Whether it holds some of the objects only, so that pixels cannot be shared out; see `select`."""

    def __post_init__(self) -> None:
        factors = np.ones(len(self.bands)) if self.noise_factors is None else np.array(self.noise_factors, dtype=float)
        object.__setattr__(self, "noise_factors", factors)
        if self.coadd is None:
            return
        for name in ("bands", "shape", "origin"):
            expected, got = getattr(self, name), getattr(self.coadd, name)
            if got != expected:
                raise InputError(f"coadd must be the one of the result, with {name} {expected}, got {got}")

    @cached_property
    def _index(self) -> dict[int, int]:
        return {int(object_id): index for index, object_id in enumerate(self.objects["object_id"])}

    def __len__(self) -> int:
        return len(self.objects)

    def __iter__(self) -> Iterator[ObjectHandle]:
        return (ObjectHandle(self, object_id) for object_id in self._index)

    def __contains__(self, object_id: object) -> bool:
        if isinstance(self.models, ModelStore):
            return isinstance(object_id, int | np.integer) and int(object_id) >= 0 and object_id in self.models
        return object_id in self._index

    def __getitem__(self, object_id: int) -> ObjectHandle:
        if object_id not in self:
            raise InputError(f"object_id must be one of the {len(self)} in the table of objects, got {object_id!r}")
        return ObjectHandle(self, int(object_id))

    def _band_index(self, band: str) -> int:
        if band not in self.bands:
            raise InputError(f"band must be one of {', '.join(self.bands)}, got {band!r}")
        return self.bands.index(band)

    def band_indices(self, bands: Sequence[str] | None = None) -> slice | list[int]:
        """Give the index of some bands along the first axis of images (B, H, W).

        Parameters
        ----------
        bands : sequence of str, optional
            Left out: all.

        Returns
        -------
        indices : slice or list of int
            A slice for all of them, which needs no copy.

        Raises
        ------
        InputError
            If a band is unknown.
        """
        return slice(None) if bands is None else [self._band_index(band) for band in bands]

    def need_coadd(self, what: str) -> Coadd:
        """Give the coadd; an InputError names what needs it if there is none."""
        if self.coadd is None:
            raise InputError(f"{what} needs the images: open the result with coadd=")
        return self.coadd

    @cached_property
    def _kernel_sets(self) -> OrderedDict[int, tuple[NDArray[np.float64], KernelSet]]:
        """The last PSFs that were asked for, by id, and their kernels."""
        return OrderedDict()

    def kernels(self, psfs: NDArray[np.float64]) -> KernelSet:
        """Make the kernels that lead from the model frame to observed PSFs (B, P, Q); the latest are kept."""
        known = self._kernel_sets.pop(id(psfs), None)
        if known is None or known[0] is not psfs:
            target = model_psf(self.config.model_psf_sigma)
            kernels = KernelSet(difference_kernels(psfs, target, self.config.kernel_regularization), continued(psfs))
            known = psfs, kernels
        self._kernel_sets[id(psfs)] = known
        while len(self._kernel_sets) > _N_KERNEL_SETS:
            self._kernel_sets.popitem(last=False)
        return known[1]

    def model_ids(self) -> NDArray[np.int64]:
        """Keys of `models` and the blends they belong to, shape (2, N): objects in their order, then candidates."""
        return model_ids(self.objects, self.candidates)

    @cached_property
    def _boxes(self) -> dict[int, Box]:
        """Box of each blend by `blend_id`, as array index."""
        columns = ("blend_id", "y0", "x0", "height", "width")
        table = np.array([np.asarray(self.blends[name]) for name in columns]).T.tolist()
        return {row[0]: Box(*row[1:]).shift(-self.origin[0], -self.origin[1]) for row in table}

    def _blend_of(self, object_id: int) -> int:
        if isinstance(self.models, ModelStore):
            return self.models.blend_of(object_id)
        return int(self.objects["blend_id"][self._index[object_id]])

    def box_of_blend(self, blend_id: int) -> Box:
        """Pixels on which a blend was fitted, as array index."""
        models = self.models
        return models.box_of_blend(blend_id) if isinstance(models, ModelStore) else self._boxes[blend_id]

    def outer_box_of_blend(self, blend_id: int) -> Box:
        """Pixels that the models of a blend can reach, as array index."""
        return outer_box(self.box_of_blend(blend_id), self.psfs[blend_id], Box.of_shape(self.shape))

    def near(
        self,
        *,
        y: float | None = None,
        x: float | None = None,
        ra: float | None = None,
        dec: float | None = None,
        radius: float,
    ) -> list[ObjectHandle]:
        """Find the objects whose peaks are near a position, the nearest first.

        Parameters
        ----------
        y, x : float, optional
            Position in the coadd's coordinates.
        ra, dec : float, optional
            Position on the sky instead [deg, ICRS].
        radius : float
            Largest distance: with `y` and `x` in pixels, with `ra` and `dec` in arcsec.

        Returns
        -------
        objects : list of ObjectHandle
            Of a result that was opened, only those parts are read that can hold such objects.

        Raises
        ------
        InputError
            If not exactly one of both pairs is given, the radius is negative, or the sky is asked for without a WCS.
        """
        if not radius >= 0:
            raise InputError(f"radius must be >= 0, got {radius}")
        if y is not None and x is not None and ra is None and dec is None:
            place = (float(y) - self.origin[0], float(x) - self.origin[1])
        elif ra is not None and dec is not None and y is None and x is None:
            if self.wcs is None:
                raise InputError("ra and dec need a WCS, and the result has none: give y and x")
            pixel = self.wcs.world_to_pixel(SkyCoord(ra, dec, unit="deg"))
            place = float(pixel[1]), float(pixel[0])
            radius = radius / (3600 * float(np.mean(proj_plane_pixel_scales(self.wcs.celestial))))
        else:
            raise InputError(f"the position must be y and x or ra and dec, got y={y}, x={x}, ra={ra}, dec={dec}")
        reach = int(np.ceil(radius)) + 1
        center = round(place[0]), round(place[1])
        box = Box(center[0] - reach, center[1] - reach, 2 * reach + 1, 2 * reach + 1)
        found = []
        for object_id, peak in self._peaks_within(box).items():
            distance = np.hypot(peak[0] - place[0], peak[1] - place[1])
            if distance <= radius:
                found.append((distance, object_id))
        return [ObjectHandle(self, object_id) for _, object_id in sorted(found)]

    def _peaks_within(self, box: Box) -> dict[int, tuple[int, int]]:
        if isinstance(self.models, ModelStore):
            return self.models.within(box)
        peaks = {object_id: source.peak for object_id, source in self.models.items() if object_id in self._index}
        return {object_id: peak for object_id, peak in peaks.items() if peak in box}

    def input_checksums(self) -> dict[str, str]:
        """Checksums of the images it was made from; empty if they are not known."""
        if self.inputs is not None:
            return dict(self.inputs)
        return {} if self.coadd is None else self.coadd.checksums()

    def _lights(self, pairs: NDArray[np.int64], convolved: bool = True) -> Iterator[tuple[FloatArray, Box]]:
        """Draw models of keys and blends (N, 2), as observed or in the model frame; those without light are left out.

        Blend by blend, whose models lie together in a file, and some sources at a time: one by one, most of the time
        would go into the calls.
        """
        for blend_id, numbers in _together(pairs):
            sources = [self.models[number] for number in numbers]
            if convolved:
                drawn = self._observe(sources, blend_id)
                yield from ((array, box) for array, box in drawn if not box.is_empty)
                continue
            lit = tuple(source for source in sources if not source.box.is_empty)
            if lit:  # a blend without light may have no PSF
                outer = self.outer_box_of_blend(blend_id)
                yield from frame_models(Scene(sources=lit, box=outer), len(self.bands)).by_source(outer.origin)

    def _observe(
        self, sources: Sequence[Source], blend_id: int, within: Box | None = None
    ) -> list[tuple[FloatArray, Box]]:
        """Draw sources of one blend as observed: pixels (B, h, w) and their box as array index, empty without light.

        within: the pixels that are drawn; None: those that models of the blend can reach.
        """
        drawn = [(np.zeros((len(self.bands), 0, 0), dtype=np.float32), Box(*s.peak, 0, 0)) for s in sources]
        lit = [k for k, source in enumerate(sources) if not source.box.is_empty]
        if lit:  # a blend without light may have no PSF
            box = self.outer_box_of_blend(blend_id) if within is None else within
            scene = Scene(sources=tuple(sources[k] for k in lit), box=box)
            models = render_scene(scene, self.kernels(self.psfs[blend_id]))
            for s, k in enumerate(lit):
                if models.offsets[s + 1] > models.offsets[s]:
                    drawn[k] = models.of_source(s, box.origin)
        return drawn

    def _observe_points(self, handles: Sequence[ObjectHandle], blend_id: int) -> list[tuple[FloatArray, Box]]:
        """Draw a point source of flux one at the centre of objects of one blend, as `_observe` does."""
        points = [handle._point for handle in handles]
        if not self.psfs[blend_id].any():
            points = [Source(peak=point.peak, components=()) for point in points]
        return self._observe(points, blend_id, Box.of_shape(self.shape))

    def by_blend(self) -> Iterator[ObjectHandle]:
        """Yield all objects, those of a blend one after another, with their models drawn.

        For work on the pixels of every object, in whatever order: models and PSFs of some objects of a blend are drawn
        in one go, which takes half as long as one by one.

        Yields
        ------
        handle : ObjectHandle
            As ``result[object_id]``, to the bit; what was drawn is held as long as it is.
        """
        pairs = np.array([self.objects["object_id"], self.objects["blend_id"]], dtype=np.int64).T
        for blend_id, numbers in _together(pairs):
            handles = [ObjectHandle(self, number) for number in numbers]
            models = self._observe([handle.source for handle in handles], blend_id)
            points = self._observe_points(handles, blend_id)
            for handle, model, point in zip(handles, models, points, strict=True):
                vars(handle).update(blend_id=blend_id, _observed=model, _observed_point=point)
                yield handle

    @cached_property
    def _sums(self) -> tuple[FloatArray, FloatArray]:
        """Sum of all convolved models, and of their positive parts, each (B, H, W) and read-only."""
        model = np.zeros((len(self.bands), *self.shape), dtype=np.float32)
        positive = np.zeros_like(model) if self.total is None else self.total
        for array, box in self._lights(self.model_ids().T):
            window = (slice(None), box.y, box.x)
            model[window] += array
            if self.total is None:
                positive[window] += np.maximum(array, 0)
        model.flags.writeable = positive.flags.writeable = False
        return model, positive

    @cached_property
    def _bounds(self) -> NDArray[np.int64]:
        """Number of each blend and bounds (y0, y1, x0, x1) of pixels that hold all that it can reach, shape (K, 5)."""
        psfs = self.psfs
        side = getattr(psfs, "largest_side", None)
        if side is None:
            side = max((max(psf.shape[1:]) for psf in psfs.values()), default=0)
        grown = [(number, box.grow(side // 2)) for number, box in self._boxes.items()]
        rows = [(number, box.y0, box.y1, box.x0, box.x1) for number, box in grown]
        return np.array(rows, dtype=np.int64).reshape(-1, 5)

    def blends_near(self, box: Box) -> NDArray[np.int64]:
        """Find the blends whose models may reach into a box, as array index; a few may not."""
        number, y0, y1, x0, x1 = self._bounds.T
        return np.asarray(number[(y0 < box.y1) & (y1 > box.y0) & (x0 < box.x1) & (x1 > box.x0)])

    def _sum_of_models(self, box: Box, positive: bool = False) -> FloatArray:
        """Add the models of all objects in a box, as array index; the same bits as in `model_image`.

        A few boxes are drawn by themselves, which takes the models around them only; when more are asked for, the whole
        image is drawn, once.
        """
        self._check_whole(positive)
        if positive and self.total is not None:
            return np.asarray(self.total[:, box.y, box.x])
        if "_sums" not in self.__dict__ and self._small_boxes["drawn"] < _MOST_BOXES:
            self._small_boxes["drawn"] += 1
            return self._drawn(box, positive)
        return np.asarray(self._sums[positive][:, box.y, box.x])

    @cached_property
    def _small_boxes(self) -> dict[str, int]:
        """Number of boxes that were drawn by themselves."""
        return {"drawn": 0}

    def forget(self) -> None:
        """Let go of images of all models, which are kept once many boxes were asked for, and begin to count anew."""
        for name in ("_sums", "_small_boxes"):
            self.__dict__.pop(name, None)

    def _drawn(self, box: Box, positive: bool = False, convolved: bool = True) -> FloatArray:
        out = np.zeros((len(self.bands), *box.shape), dtype=np.float32)
        pairs = self.model_ids().T
        for array, own in self._lights(pairs[np.isin(pairs[:, 1], self.blends_near(box))], convolved):
            light = array[(slice(None), *box.within(own))]
            out[(slice(None), *own.within(box))] += np.maximum(light, 0) if positive else light
        return out

    def _check_whole(self, positive: bool) -> None:
        if positive and self.is_part:
            raise InputError("sharing pixels out needs the models of all objects, and this result holds some of them")

    @property
    def is_complete(self) -> bool:
        """Whether all blends were fitted; False for what a run that was stopped has left."""
        return not (np.asarray(self.objects["reason"]) == Reason.INTERRUPTED).any()

    def ledger(self) -> dict[str, Any]:
        """Account for every peak.

        Returns
        -------
        ledger : dict
            ``peaks``, the number asked for (None: not known); ``rows``, the number of objects; ``outcomes`` and
            ``reasons``, how many rows have each; rows of a run that was stopped have the outcome "none".
        """
        counts = {}
        for name, column in (("outcomes", "outcome"), ("reasons", "reason")):
            values, n = np.unique(np.asarray(self.objects[column], dtype=str), return_counts=True)
            counts[name] = {str(value) or "none": int(count) for value, count in zip(values, n, strict=True)}
        return {"peaks": self.n_peaks, "rows": len(self), **counts}

    def model_image(self, positive: bool = False, box: Box | None = None, convolved: bool = True) -> FloatArray:
        """Add the models of all objects.

        Parameters
        ----------
        positive : bool, optional
            True: add their positive parts only; by this sum the observed flux is shared.
        box : Box, optional
            Pixels to draw, in the coadd's coordinates, cut at the edge of the image; None: all. For a few small boxes
            of a large result only the models around them are read and drawn.
        convolved : bool, optional
            True: as observed. False: in the model frame, on the same pixels; always drawn anew.

        Returns
        -------
        image : ndarray, shape (B, H, W)
            Flux per pixel [unit of the coadd], of the image or of the box; that of the image as observed is computed
            once, and read-only.

        Raises
        ------
        InputError
            If the positive parts are asked for and the result holds some of the objects only.
        """
        self._check_whole(positive)
        whole = Box.of_shape(self.shape)
        within = whole if box is None else box.shift(-self.origin[0], -self.origin[1]) & whole
        if not convolved:
            return self._drawn(within, positive, convolved=False)
        if box is not None:
            return self._sum_of_models(within, positive)
        if positive and self.total is not None:
            return self.total
        return self._sums[positive]

    def residual(self) -> FloatArray:
        """Subtract the models of all objects from the images.

        Returns
        -------
        residual : ndarray, shape (B, H, W)
            Flux per pixel [unit of the coadd]; NaN where the image is.

        Raises
        ------
        InputError
            If the result has no coadd.
        """
        return self.need_coadd("residual").images - self.model_image()

    def stamps(
        self, kind: StampKind | str, bands: Sequence[str] | None = None, margin: int = 0
    ) -> Iterator[tuple[int, dict[str, Stamp]]]:
        """Cut out one kind of stamp of every object, one object at a time.

        Parameters
        ----------
        kind, bands, margin
            As in `ObjectHandle.stamps`.

        Returns
        -------
        stamps : iterator of (int, dict)
            `object_id` and its stamps by band, in the order of `objects`. Made when they are asked for and not kept:
            the memory is that of two images and one object.

        Raises
        ------
        InputError
            As `ObjectHandle.stamps`, at once.
        """
        kind = _checked_kind(kind)
        for band in bands or ():
            self._band_index(band)
        if margin < 0:
            raise InputError(f"margin must be >= 0, got {margin}")
        if kind is not StampKind.MODEL:
            self.need_coadd(kind)
        return ((handle.object_id, handle.stamps(kind, bands, margin)) for handle in self)

    def catalog(self, *, magnitudes: bool = False, nanojansky: bool = False) -> Table:
        """Make the table of objects as others want it.

        Parameters
        ----------
        magnitudes : bool, optional
            Add AB magnitudes, their errors, and upper limits of what is too faint for one; see
            `catalog.magnitudes`.
        nanojansky : bool, optional
            Give all fluxes in nanojansky.

        Returns
        -------
        objects : Table
            A new table.

        Raises
        ------
        InputError
            If either is asked for and the zero point of the images is not known.
        """
        table = self.objects.copy(copy_data=False)
        if not magnitudes and not nanojansky:
            return table
        if self.zero_point is None:
            raise InputError(
                "magnitudes and nanojansky need the zero point of the images: give the coadd one, or a unit"
            )
        if magnitudes:
            table = with_magnitudes(table, self.bands, self.zero_point)
        return in_nanojansky(table, self.bands, self.zero_point) if nanojansky else table

    def with_coadd(self, coadd: Coadd, *, stacklevel: int = 2) -> Result:
        """Put the images to a result that came without them.

        Parameters
        ----------
        coadd : Coadd
            The images it was made from.
        stacklevel : int, optional
            Whose line a warning names, as in `warnings.warn`.

        Returns
        -------
        result : Result

        Raises
        ------
        InputError
            If `coadd` has other bands, another shape or another origin.

        Warns
        -----
        DataWarning
            If `coadd` has other pixels than that which it was made from.
        """
        # What is not read yet stays so, which dataclasses.replace would read.
        result = copy(self)
        object.__setattr__(result, "coadd", coadd)
        result.__post_init__()
        if self.inputs and self.inputs != coadd.checksums():
            warnings.warn(
                "coadd must be the one that the result was made from, but its pixels differ",
                DataWarning,
                stacklevel=stacklevel,
            )
        return result

    def select(
        self, *, object_ids: int | Iterable[int] | None = None, blend_ids: int | Iterable[int] | None = None
    ) -> Result:
        """Take some of the objects, with all that belongs to them.

        Parameters
        ----------
        object_ids : int or iterable of int, optional
            Objects to take.
        blend_ids : int or iterable of int, optional
            Blends of which all objects are taken, and all candidates.

        Returns
        -------
        part : Result
            The rows of these objects in their order, with their blends and parents; their models are in memory, so that
            it does not need the file it came from. Pixels cannot be shared out by it, because that takes the models of
            all objects: `stamps` of the kinds "redistributed" and "noise_replaced" raise an InputError.

        Raises
        ------
        InputError
            If neither is given, or one of the numbers is not in the result.
        """
        if object_ids is None and blend_ids is None:
            raise InputError("select needs object_ids or blend_ids, got neither")
        objects, candidates = self.objects, self.candidates
        numbers, blends = np.asarray(objects["object_id"]), np.asarray(objects["blend_id"])
        wanted = {
            name: _whole_numbers(given, name) for name, given in (("object_ids", object_ids), ("blend_ids", blend_ids))
        }
        for name, known in (("object_ids", numbers), ("blend_ids", np.asarray(self.blends["blend_id"]))):
            unknown = wanted[name][~np.isin(wanted[name], known)]
            if len(unknown):
                raise InputError(f"{name} must be those of the result, got {unknown[0]}")
        taken = np.isin(numbers, wanted["object_ids"]) | np.isin(blends, wanted["blend_ids"])
        found = np.isin(candidates["blend_id"], wanted["blend_ids"])
        own_blends = np.unique(blends[taken])
        own_parents = np.unique(np.asarray(objects["parent_id"])[taken])
        model_ids = [*numbers[taken].tolist(), *(-np.asarray(candidates["candidate_id"])[found]).tolist()]
        footprints = self.footprints
        return replace(
            self,
            objects=objects[taken],
            parents=self.parents[np.isin(self.parents["parent_id"], own_parents)],
            blends=self.blends[np.isin(self.blends["blend_id"], own_blends)],
            candidates=candidates[found],
            models={number: self.models[number] for number in model_ids},
            psfs={number: self.psfs[number] for number in own_blends.tolist() if number in self.psfs},
            footprints=Footprints.of((n, footprints[n]) for n in own_parents.tolist() if n in footprints),
            inputs=self.input_checksums(),
            n_peaks=None,
            timings={},
            total=None,
            is_part=True,
        )

    def renumbered(self, first: int) -> Result:
        """Add to all numbers, so that those of several results do not collide.

        Parameters
        ----------
        first : int
            What is added to `object_id`, `parent_id`, `blend_id` and `candidate_id`; numbers begin at 1.

        Returns
        -------
        result : Result
            The same objects with other numbers. Noise in "noise_replaced" stamps, which is drawn from the number, is
            another.

        Raises
        ------
        InputError
            If `first` is negative, or blends were fitted anew, which the notes of the result tell by number.
        """
        if first < 0:
            raise InputError(f"first must be >= 0, got {first}")
        if self.notes:
            raise InputError("a result with notes cannot be renumbered: they name objects by their numbers")
        tables: dict[str, Table] = {}
        for name in ("objects", "parents", "blends", "candidates"):
            tables[name] = getattr(self, name).copy(copy_data=False)
            for column in tables[name].itercols():
                if column.name in ("object_id", "parent_id", "blend_id", "candidate_id"):
                    tables[name][column.name] = column + first
                elif column.name == "correlated_id":
                    tables[name][column.name] = np.where(column > 0, column + first, 0)
        footprints = self.footprints
        return replace(
            self,
            **tables,
            models={number + (first if number > 0 else -first): source for number, source in self.models.items()},
            psfs={number + first: psf for number, psf in self.psfs.items()},
            footprints=Footprints(footprints.numbers + first, footprints.offsets, footprints.spans),
            timings=self.timings,
            total=self.total,
        )

    def registered_metrics(self) -> Table:
        """Measure the metrics that were registered with `metrics.register_metric` on every object.

        Returns
        -------
        table : Table
            ``object_id``, and ``{band}_{name}`` of each metric; NaN for an object without light.

        Raises
        ------
        InputError
            If the result has no coadd.
        """
        coadd = self.need_coadd("registered_metrics")
        metrics = registered_metrics()
        total = self.model_image(positive=True)
        values = {name: np.full((len(self), len(self.bands)), np.nan) for name in metrics}
        for row, handle in enumerate(self):
            model, box = handle._observed
            if box.is_empty:
                continue
            window = (slice(None), box.y, box.x)
            others = np.maximum(total[window] - np.maximum(model, 0), 0)
            for name, (metric, _) in metrics.items():
                values[name][row] = metric(model, others, coadd.variance[window], coadd.valid[window])
        table = Table({"object_id": np.asarray(self.objects["object_id"])})
        for name, (_, description) in metrics.items():
            for b, band in enumerate(self.bands):
                table.add_column(Column(values[name][:, b], name=f"{band}_{name}", description=description))
        return table

    def stray_fluxes(
        self, rule: StrayRule = "r-to-footprint", to_points: StrayToPoints = "necessary", clip: float = 0.001
    ) -> Table:
        """Share the light in footprints that no model claims by the rules of the single-band deblender.

        Of each band the positive valid pixels of a parent where all models together stay below `flux.LEAST_MODEL` times
        the noise, which belong to nobody otherwise: `flux.stray_fluxes` says how they are shared among the objects of
        the parent that claim any pixel of the band. Pixels of pure noise that happen to be positive are among them, so
        that what is given away is positive on average where there is nothing.

        Parameters
        ----------
        rule : str, optional
            "r-to-peak", "r-to-footprint", "nearest-footprint", or "trim" for nobody.
        to_points : str, optional
            When objects with the model "point" get some: "never", "always", or "necessary": if the parent has no
            others.
        clip : float, optional
            Smaller shares of a pixel are left out.

        Returns
        -------
        table : Table
            ``object_id``, ``{band}_stray_flux`` and ``{band}_stray_flux_err`` [unit]: to be added to the redistributed
            flux. Zero outside of footprints and in bands without a model; invalid pixels are nobody's.

        Raises
        ------
        InputError
            If the result has no coadd, a rule is unknown, or clip is not from 0 to 1.
        """
        for name, value, kind in (("rule", rule, StrayRule), ("to_points", to_points, StrayToPoints)):
            if value not in get_args(kind):
                raise InputError(f"{name} must be one of {', '.join(get_args(kind))}, got {value!r}")
        if not 0 <= clip < 1:
            raise InputError(f"clip must be from 0 to below 1, got {clip}")
        self.need_coadd("stray_fluxes")
        found = np.zeros((2, len(self), len(self.bands)))
        parent_ids = np.asarray(self.objects["parent_id"])
        order = np.argsort(parent_ids, kind="stable")
        for parent_id, footprint in self.footprints.items():
            first, last = np.searchsorted(parent_ids[order], [parent_id, parent_id + 1])
            if first < last and footprint.area:
                rows = order[first:last]
                found[:, rows] = self._stray_of_parent(footprint, rows, rule, to_points, clip)
        table = Table({"object_id": np.asarray(self.objects["object_id"])})
        for b, band in enumerate(self.bands):
            what = f"light in the footprint that no model claims, band {band}"
            names = (("stray_flux", f"Share of the {what}"), ("stray_flux_err", f"Standard deviation of the {what}"))
            for values, (name, description) in zip(found[:, :, b], names, strict=True):
                table.add_column(Column(values, name=f"{band}_{name}", description=description, unit=self.unit))
        return table

    def _stray_of_parent(
        self, footprint: Footprint, rows: NDArray[np.intp], rule: StrayRule, to_points: StrayToPoints, clip: float
    ) -> NDArray[np.float64]:
        """What objects get of the light in a footprint that no model claims, and its error, (2, S, B)."""
        coadd, box = self.need_coadd("stray_fluxes"), footprint.box
        window = (slice(None), box.y, box.x)
        images, variance, valid = coadd.images[window], coadd.variance[window], coadd.valid[window]
        taken = claimed(variance, valid, self._sum_of_models(box, positive=True))
        stray = footprint.mask(box) & valid & ~taken & (np.where(valid, images, 0) > 0)
        handles = [self[number] for number in np.asarray(self.objects["object_id"])[rows].tolist()]
        is_point = np.asarray(self.objects["model"])[rows] == Model.POINT.value
        peaks = np.array([handle.source.peak for handle in handles], dtype=np.int64) - np.array(box.origin)
        claims = []
        for model, own in (handle._observed for handle in handles):
            common = own & box
            light = np.maximum(model[(slice(None), *common.within(own))], 0)
            claims.append((light * taken[(slice(None), *common.within(box))], common.shift(-box.y0, -box.x0)))
        found = np.zeros((2, len(rows), len(self.bands)))
        for b in range(len(self.bands)):
            models = [(light[b], own) for light, own in claims]
            takes = takes_stray(np.array([light.any() for light, _ in models]), is_point, to_points)
            found[:, :, b] = stray_fluxes(images[b], variance[b], stray[b], peaks, models, takes, rule, clip)
        return found

    def write(self, path: str | PathLike[str], overwrite: bool = False, tolerance: float | None = TOLERANCE) -> None:
        """Write everything but the images into a directory; `kermes.open` reads it.

        Parameters
        ----------
        path : path
            Directory to make, or with a name that ends in ".kermes" a file. It appears when it is complete, or not at
            all.
        overwrite : bool, optional
            Whether an earlier result of that name may be replaced.
        tolerance : float, optional
            How far the stored model of an object, drawn as observed, may be from that of this result in any pixel
            [sigma of the noise]. None: it is kept to the bit. Fluxes in the tables are never rounded.

        Raises
        ------
        FileError
            If it exists and may not be replaced, or cannot be written.
        InputError
            If `tolerance` is not positive.
        """
        from kermes.store import write_result

        write_result(self, path, overwrite=overwrite, tolerance=tolerance)

    def __repr__(self) -> str:
        objects = (
            f"{len(self)} object{'s' * (len(self) != 1)} in {len(self.blends)} blend{'s' * (len(self.blends) != 1)}"
        )
        height, width = self.shape
        coadd = "" if self.coadd is not None else ", without coadd"
        return f"<Result: {objects}, bands {' '.join(self.bands)}, {height} x {width} pixels{coadd}>"

    def _repr_html_(self) -> str:
        """Show it in a notebook, with a small picture."""
        from kermes.plots import result_html

        return result_html(self)
