"""What users hold after deblending: tables, and the pixels of one object at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from typing import Any

import numpy as np
from astropy import units
from astropy.table import Column, Row, Table
from numpy.typing import NDArray

from kermes.catalog import (
    Reason,
    candidate_columns,
    empty_columns,
    in_nanojansky,
    make_candidates,
    with_magnitudes,
)
from kermes.coadd import Coadd
from kermes.config import Config
from kermes.errors import InputError
from kermes.flux import redistribute
from kermes.geometry import Box
from kermes.metrics import registered_metrics
from kermes.psf import continued, difference_kernels, model_psf
from kermes.rendering import KernelSet, outer_box, render_source
from kermes.scene import Source

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Stamp:
    """Pixels of one object in one band, and where they lie."""

    array: FloatArray
    """Flux per pixel [unit of the coadd], shape of `box`."""

    box: Box
    """Pixels of `array`, in the coadd's coordinates."""


@dataclass(frozen=True, eq=False)
class ObjectHandle:
    """One object of a result: its row and its pixels.

    All stamps share one box: that of the model as observed. A model without light has empty stamps.
    """

    result: Result
    """What it belongs to."""

    index: int
    """Its row in the table of objects."""

    @property
    def object_id(self) -> int:
        """Number of the object."""
        return int(self.row["object_id"])

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
    def _observed(self) -> tuple[FloatArray, Box]:
        """Convolved model (B, h, w), and its box as array index."""
        if self.source.box.is_empty:
            return np.zeros((len(self.bands), 0, 0), dtype=np.float32), Box(*self.source.peak, 0, 0)
        blend_id = int(self.row["blend_id"])
        kernels = self.result._kernels(self.result.psfs[blend_id])
        return render_source(self.source, kernels, self.result._outer(blend_id))

    def _stamp(self, array: FloatArray) -> Stamp:
        return Stamp(array, self._observed[1].shift(*self.result.origin))

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
        b = self.result._band_index(band)
        convolved_model, box = self._observed
        if convolved:
            return self._stamp(convolved_model[b].copy())
        model = np.zeros(box.shape, dtype=np.float32)
        source_box = self.source.box
        model[source_box.within(box)] = self.source.model(len(self.bands))[(b, *box.within(source_box))]
        return self._stamp(model)

    def redistributed(self, band: str) -> Stamp:
        """Share out the observed flux in one band and return what belongs to this object.

        Every valid pixel is divided among all objects of the image in proportion to the positive part of their
        models as observed; over all objects the shares add up to the image. Where all models together stay below
        `flux.LEAST_MODEL` times the noise, the pixel belongs to nobody.

        Parameters
        ----------
        band : str

        Returns
        -------
        stamp : Stamp
            Zero in invalid pixels.

        Raises
        ------
        InputError
            If the band is unknown, or the result has no coadd.
        """
        b = self.result._band_index(band)
        coadd = self.result._need_coadd("redistributed")
        model, box = self._observed
        window = (slice(b, b + 1), box.y, box.x)
        total = self.result.model_image(positive=True)
        images, variance, valid = coadd.images[window], coadd.variance[window], coadd.valid[window]
        return self._stamp(redistribute(images, variance, valid, model[b : b + 1], total[window])[0])

    def neighbor_subtracted(self, band: str) -> Stamp:
        """Subtract the models of all other objects from the image.

        Parameters
        ----------
        band : str

        Returns
        -------
        stamp : Stamp
            Invalid pixels are as in the image, NaN included.

        Raises
        ------
        InputError
            If the band is unknown, or the result has no coadd.
        """
        b = self.result._band_index(band)
        coadd = self.result._need_coadd("neighbor_subtracted")
        model, box = self._observed
        window = (b, box.y, box.x)
        return self._stamp(coadd.images[window] - (self.result.model_image()[window] - model[b]))

    def __repr__(self) -> str:
        y, x = self.peak
        return f"<Object {self.object_id}: peak y={y}, x={x}, {self.row['outcome']}, bands {' '.join(self.bands)}>"


class _LazyTable:
    """Field of a dataclass: a table, or what makes it when it is first read.

    A table of a hundred columns takes milliseconds to make, as long as the deblending of a small blend.
    """

    def __init__(self, default: Callable[[Any], Table] | None = None) -> None:
        self._default = default  # makes the table of an instance that was given None

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = "_" + name

    def __get__(self, instance: Any, owner: type) -> Table:
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

    def __set__(self, instance: Any, value: Table | Callable[[], Table]) -> None:
        instance.__dict__[self._name] = value


def model_ids(objects: Table, candidates: Table) -> NDArray[np.int64]:
    """Number of the model of each object, and minus that of each candidate, with their blends, shape (2, N)."""
    of_objects = np.array([objects["object_id"], objects["blend_id"]], dtype=np.int64)
    of_candidates = np.array([candidates["candidate_id"], candidates["blend_id"]], dtype=np.int64)
    return np.concatenate([of_objects, of_candidates * [[-1], [1]]], axis=1)


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

    objects: _LazyTable = _LazyTable()
    """One row per peak. As the other tables, given as a Table or as a function that makes it when it is first read."""

    parents: _LazyTable = _LazyTable()
    """One row per footprint."""

    blends: _LazyTable = _LazyTable()
    """One row per blend."""

    candidates: _LazyTable = _LazyTable(_no_candidates)
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

    wcs: Any = None
    """astropy WCS of pixel index (x, y), counted from 0 at the first pixel of the image; None: no sky."""

    coadd: Coadd | None = None
    """The images it was made from; None: not at hand, and only models can be evaluated."""

    n_peaks: int | None = None
    """Number of peaks that were asked for; None: not known."""

    timings: Mapping[str, Any] = field(default_factory=dict)
    """How long it took [s]; not part of the answer."""

    total: FloatArray | None = None
    """Sum of the positive parts of all convolved models (B, H, W), if it is known already."""

    def __post_init__(self) -> None:
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
        return (ObjectHandle(self, index) for index in range(len(self)))

    def __contains__(self, object_id: object) -> bool:
        return object_id in self._index

    def __getitem__(self, object_id: int) -> ObjectHandle:
        if object_id not in self._index:
            raise InputError(f"object_id must be one of the {len(self)} in the table of objects, got {object_id!r}")
        return ObjectHandle(self, self._index[object_id])

    def _band_index(self, band: str) -> int:
        if band not in self.bands:
            raise InputError(f"band must be one of {', '.join(self.bands)}, got {band!r}")
        return self.bands.index(band)

    def _need_coadd(self, what: str) -> Coadd:
        if self.coadd is None:
            raise InputError(f"{what} needs the images: open the result with coadd=")
        return self.coadd

    def _kernels(self, psfs: NDArray[np.float64]) -> KernelSet:
        target = model_psf(self.config.model_psf_sigma)
        return KernelSet(difference_kernels(psfs, target, self.config.kernel_regularization), continued(psfs))

    def model_ids(self) -> NDArray[np.int64]:
        """Keys of `models` and the blends they belong to, shape (2, N): objects in their order, then candidates."""
        return model_ids(self.objects, self.candidates)

    @cached_property
    def _boxes(self) -> dict[int, Box]:
        """Box of each blend by `blend_id`, as array index."""
        columns = ("blend_id", "y0", "x0", "height", "width")
        table = np.array([np.asarray(self.blends[name]) for name in columns]).T.tolist()
        return {row[0]: Box(*row[1:]).shift(-self.origin[0], -self.origin[1]) for row in table}

    def _outer(self, blend_id: int) -> Box:
        """Pixels that the models of a blend can reach, as array index."""
        return outer_box(self._boxes[blend_id], self.psfs[blend_id], Box.of_shape(self.shape))

    @cached_property
    def _sums(self) -> tuple[FloatArray, FloatArray]:
        """Sum of all convolved models, and of their positive parts, each (B, H, W) and read-only."""
        model = np.zeros((len(self.bands), *self.shape), dtype=np.float32)
        positive = np.zeros_like(model) if self.total is None else self.total
        # Blends often share one PSF, the same array: its kernels are made once.
        known: dict[int, tuple[NDArray[np.float64], KernelSet]] = {}
        for model_id, blend_id in self.model_ids().T.tolist():
            source = self.models[model_id]
            if source.box.is_empty:
                continue
            psfs = self.psfs[blend_id]
            if id(psfs) not in known:
                known[id(psfs)] = psfs, self._kernels(psfs)
            array, box = render_source(source, known[id(psfs)][1], self._outer(blend_id))
            window = (slice(None), box.y, box.x)
            model[window] += array
            if self.total is None:
                positive[window] += np.maximum(array, 0)
        model.flags.writeable = positive.flags.writeable = False
        return model, positive

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

    def model_image(self, positive: bool = False) -> FloatArray:
        """Add the models of all objects, as observed.

        Parameters
        ----------
        positive : bool, optional
            True: add their positive parts only; by this sum the observed flux is shared.

        Returns
        -------
        image : ndarray, shape (B, H, W)
            Flux per pixel [unit of the coadd]; computed once, read-only.
        """
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
        return self._need_coadd("residual").images - self.model_image()

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
        if (magnitudes or nanojansky) and self.zero_point is None:
            raise InputError(
                "magnitudes and nanojansky need the zero point of the images: give the coadd one, or a unit"
            )
        if magnitudes:
            table = with_magnitudes(table, self.bands, float(self.zero_point or 0.0))
        return in_nanojansky(table, float(self.zero_point or 0.0)) if nanojansky else table

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
        coadd = self._need_coadd("registered_metrics")
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

    def write(self, path: str | PathLike[str], overwrite: bool = False) -> None:
        """Write everything but the images into a directory; `kermes.open` reads it.

        Parameters
        ----------
        path : path
            Directory to make. It appears when it is complete, or not at all.
        overwrite : bool, optional
            Whether an earlier result of that name may be replaced.

        Raises
        ------
        FileError
            If it exists and may not be replaced, or cannot be written.
        """
        from kermes.store import write_result

        write_result(self, path, overwrite=overwrite)

    def __repr__(self) -> str:
        objects = (
            f"{len(self)} object{'s' * (len(self) != 1)} in {len(self.blends)} blend{'s' * (len(self.blends) != 1)}"
        )
        height, width = self.shape
        coadd = "" if self.coadd is not None else ", without coadd"
        return f"<Result: {objects}, bands {' '.join(self.bands)}, {height} x {width} pixels{coadd}>"
