"""One coadd to one result: which blends there are, how each is modelled, and how the answers come together."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kermes.catalog import Flag, Outcome, make_blends, make_objects, make_parents
from kermes.coadd import Blend, Coadd, cut_blend, label_image, normalize_peaks
from kermes.config import Config
from kermes.detection import detect, footprints_of_peaks
from kermes.errors import BlendError, InputError
from kermes.fitting import fit_packed
from kermes.flux import shared_fluxes
from kermes.geometry import Box
from kermes.initialization import initialize
from kermes.kernels import flux as kernels_flux
from kermes.kernels import metrics as kernels_metrics
from kermes.measurement import Fluxes, measure_fluxes
from kermes.metrics import BlendMetrics, blend_metrics
from kermes.partition import Parent, partition
from kermes.psf import difference_kernels, model_psf
from kermes.rendering import Packed, SourceModels, combine_sources, unpack
from kermes.result import Result
from kermes.scene import Scene

logger = logging.getLogger(__name__)

DoubleArray = NDArray[np.float64]
FloatArray = NDArray[np.float32]

MARGIN = 10
"""Pixels of background around a footprint that are fitted too, so that the wings of the models are held down."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlendTask:
    """One blend that is to be fitted."""

    index: int
    """Place in the plan."""

    parent: Parent
    """Footprint it belongs to, with its peaks."""

    box: Box
    """Pixels to fit, array index of the coadd."""

    outer: Box
    """Pixels that its models can reach, array index of the coadd."""

    alone: bool
    """Whether no other blend reaches into `outer`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TilePlan:
    """What will be done with one coadd."""

    coadd: Coadd
    config: Config
    peaks: NDArray[np.int64]
    """Peaks (N, 2), array index (y, x)."""

    labels: NDArray[np.int64]
    """Footprint of each pixel, shape (H, W)."""

    background: bool
    """Whether pixels outside all footprints may be used."""

    tasks: tuple[BlendTask, ...]
    """One per blend."""

    @property
    def n_blends(self) -> int:
        """Number of blends."""
        return len(self.tasks)

    @property
    def n_peaks(self) -> int:
        """Number of peaks, and of rows of the result."""
        return len(self.peaks)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlendOutcome:
    """What became of one blend; arrays follow the sources in the order of `members`."""

    index: int
    """Place of the blend in the plan."""

    members: NDArray[np.int64]
    """Row of each source in the list of peaks."""

    outcome: Outcome
    """Rung of the ladder."""

    reason: str
    """Why it is not full; empty when it is."""

    scene: Scene
    psfs: DoubleArray
    flux: DoubleArray
    flux_err: DoubleArray
    metrics: BlendMetrics
    chi2: DoubleArray
    total: FloatArray
    """Sum of the positive parts of the models, on the outer box of the task, shape (B, h, w)."""

    models: SourceModels | None
    """Sources as observed, kept only while other blends share their pixels."""

    shared_flux: DoubleArray | None
    """Re-distributed flux and its error, when no other blend shares the pixels."""

    shared_flux_err: DoubleArray | None
    n_pixels: int
    blend_chi2: float
    iterations: int
    converged: bool
    missing: NDArray[np.bool_]
    """True for the bands without a valid pixel."""

    seconds: float


def plan_tile(
    coadd: Coadd,
    peaks: Any = None,
    footprints: ArrayLike | None = None,
    config: Config | None = None,
) -> TilePlan:
    """Decide which peaks are fitted together on which pixels.

    Parameters and errors are those of `deblend`.
    """
    config = config or Config()
    if isinstance(peaks, str):
        if peaks != "detect":
            raise InputError(f"peaks must be positions, None or 'detect', got {peaks!r}")
    elif peaks is None:
        peaks = coadd.peaks
    if footprints is None:
        footprints = coadd.footprints

    labels = None if footprints is None else label_image(footprints, coadd.shape)
    if peaks is None or isinstance(peaks, str):
        detection = detect(coadd, config.detection)
        positions = detection.peaks
        if labels is not None:
            positions = positions[labels[positions[:, 0], positions[:, 1]] > 0]
        used = detection.footprints if labels is None else labels
    else:
        positions = normalize_peaks(peaks, coadd)
        used = footprints_of_peaks(coadd, positions, config.detection) if labels is None else labels
    parents = partition(used, positions, coadd.shape).parents

    half = max(coadd.psf_at(y=coadd.origin[0], x=coadd.origin[1]).shape[-2:]) // 2
    image_box = Box.of_shape(coadd.shape)
    boxes = [parent.box.grow(MARGIN) & image_box for parent in parents]
    outers = [box.grow(half) & image_box for box in boxes]
    reached = np.zeros(coadd.shape, dtype=np.int32)
    for outer in outers:
        reached[outer.y, outer.x] += 1
    tasks = tuple(
        BlendTask(
            index=index,
            parent=parent,
            box=box,
            outer=outer,
            alone=bool((reached[outer.y, outer.x] == 1).all()),
        )
        for index, (parent, box, outer) in enumerate(zip(parents, boxes, outers, strict=True))
    )
    return TilePlan(
        coadd=coadd,
        config=config,
        peaks=positions,
        labels=used,
        background=labels is None,
        tasks=tasks,
    )


def _usable(plan: TilePlan, task: BlendTask, box: Box) -> NDArray[np.bool_]:
    """Pixels of `box` that the blend may use: its footprint, and background where that is allowed."""
    labels = plan.labels[box.y, box.x]
    usable = (labels == task.parent.label) & (labels > 0)
    if plan.background:
        usable |= labels == 0
    inside = np.zeros(box.shape, dtype=bool)
    inside[task.box.within(box)] = True
    return usable & inside


def _window(blend: Blend, box: Box) -> Blend:
    """Cut a smaller blend out of a blend."""
    window = (slice(None), *box.within(blend.box))
    return replace(
        blend,
        images=np.ascontiguousarray(blend.images[window]),
        weights=np.ascontiguousarray(blend.weights[window]),
        box=box,
        peaks=blend.peaks + np.array(blend.box.origin) - np.array(box.origin),
    )


def _moved(packed: Packed, dy: int, dx: int) -> Packed:
    return replace(packed, boxes=packed.boxes + np.array([dy, dx, 0, 0]))


def _scaled(blend: Blend, unit: float) -> Blend:
    """Express a blend in another unit of flux."""
    factor = np.float32(unit)
    return replace(
        blend,
        images=blend.images / factor,
        weights=blend.weights * factor**2,
        noise_rms=blend.noise_rms / factor,
    )


def _settings(config: Config, rung: Outcome) -> Config:
    """Settings of one rung of the ladder."""
    if rung is Outcome.FULL:
        return config
    components = 1 if rung is Outcome.SINGLE else 0
    iterations = config.fit.max_iterations if rung is Outcome.SINGLE else 0
    return replace(
        config,
        initialization=replace(config.initialization, max_components=components),
        fit=replace(config.fit, max_iterations=iterations),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Modelled:
    fluxes: Fluxes
    iterations: int
    converged: bool


def _model_blend(outer: Blend, box: Box, config: Config) -> _Modelled:
    """Initialize, fit and measure one blend; raises BlendError when the answer is not finite."""
    blend = _window(outer, box)
    target = model_psf(config.model_psf_sigma)
    difference = difference_kernels(blend.psfs, target)
    packed = initialize(blend, difference, target, config.initialization)
    iterations, converged = 0, True
    if config.fit.max_iterations > 0:
        fit = fit_packed(packed, blend, difference, config.fit)
        packed, iterations, converged = fit.packed, len(fit.losses) - 1, fit.converged
    moved = _moved(packed, box.y0 - outer.box.y0, box.x0 - outer.box.x0)
    fluxes = measure_fluxes(moved, len(outer.peaks), outer, difference)
    if not np.isfinite(fluxes.flux).all():
        raise BlendError("the fitted fluxes are not finite")
    return _Modelled(fluxes=fluxes, iterations=iterations, converged=converged)


def fit_blend(plan: TilePlan, task: BlendTask) -> BlendOutcome:
    """Model one blend on the highest rung of the ladder that works.

    Sources are put into the order of their positions first, so that the order of the peaks does not matter.
    """
    start = time.perf_counter()
    coadd, config = plan.coadd, plan.config
    members = np.asarray(task.parent.peaks, dtype=np.int64)
    members = members[np.lexsort((members, plan.peaks[members, 1], plan.peaks[members, 0]))]
    cut = cut_blend(coadd, task.outer, plan.peaks[members], _usable(plan, task, task.outer))
    missing = ~np.isfinite(cut.noise_rms) | ~(cut.weights > 0).any(axis=(1, 2))
    unit = 1.0 if missing.all() else float(np.median(cut.noise_rms[~missing]))
    outer = _scaled(cut, unit)

    reason = ""
    rungs = (Outcome.FULL, Outcome.SINGLE, Outcome.POINT)
    if missing.all():
        rungs, reason = (), "no_data"
    modelled = None
    outcome = Outcome.PEAK
    for rung in rungs:
        try:
            modelled = _model_blend(outer, task.box, _settings(config, rung))
            outcome = rung
            break
        except BlendError as error:
            reason = "not_finite"
            logger.warning("blend %d: %s; trying a simpler model", task.index + 1, error)
    if modelled is None:
        return _without_model(task, members, cut, missing, reason, time.perf_counter() - start)

    fluxes = modelled.fluxes
    packed = replace(fluxes.packed, spectra=fluxes.packed.spectra * np.float32(unit))
    metrics = blend_metrics(packed, len(members), task.outer.shape)
    models = combine_sources(packed, fluxes.rendered, len(members))
    residual = cut.images.copy()
    kernels_flux.subtract_models(residual, models.pixels, models.boxes, models.offsets)
    own_boxes, _ = kernels_flux.source_boxes(packed.boxes, packed.sources, len(members))
    whole = np.array([[0, 0, *task.outer.shape]], dtype=np.int64)
    chi2 = kernels_metrics.mean_chi2(residual, cut.weights, np.concatenate([own_boxes, whole]))
    total = np.zeros(cut.images.shape, dtype=np.float32)
    kernels_flux.add_positive_models(total, models.pixels, models.boxes, models.offsets)
    shared = shared_fluxes(coadd, task.outer, total, models) if task.alone else None
    absent = np.where(missing, np.nan, unit)
    return BlendOutcome(
        index=task.index,
        members=members,
        outcome=outcome,
        reason=reason,
        scene=unpack(packed, cut.peaks, task.outer),
        psfs=cut.psfs,
        flux=fluxes.flux * absent,
        flux_err=fluxes.flux_err * absent,
        metrics=metrics,
        chi2=chi2[:-1],
        total=total,
        models=None if task.alone else models,
        shared_flux=None if shared is None else shared[0],
        shared_flux_err=None if shared is None else shared[1],
        n_pixels=int((cut.weights > 0).sum()),
        blend_chi2=float(chi2[-1]),
        iterations=modelled.iterations,
        converged=modelled.converged,
        missing=missing,
        seconds=time.perf_counter() - start,
    )


def _without_model(
    task: BlendTask, members: NDArray[np.int64], cut: Blend, missing: NDArray[np.bool_], reason: str, seconds: float
) -> BlendOutcome:
    """Outcome of a blend that no rung could model: rows without fluxes."""
    shape = (len(members), len(cut.images))
    unknown = np.full(shape, np.nan)
    empty = np.zeros((0, 4), dtype=np.int64)
    nothing = Packed(
        boxes=empty,
        offsets=np.zeros(1, dtype=np.int64),
        morphologies=np.zeros(0, dtype=np.float32),
        spectra=np.zeros((0, shape[1]), dtype=np.float32),
        sources=np.zeros(0, dtype=np.int64),
    )
    return BlendOutcome(
        index=task.index,
        members=members,
        outcome=Outcome.PEAK,
        reason=reason,
        scene=unpack(nothing, cut.peaks, task.outer),
        psfs=cut.psfs,
        flux=unknown,
        flux_err=unknown,
        metrics=BlendMetrics(
            max_overlap=unknown, flux_overlap=unknown, flux_overlap_fraction=unknown, blendedness=unknown
        ),
        chi2=np.full(shape[0], np.nan),
        total=np.zeros(cut.images.shape, dtype=np.float32),
        models=None,
        shared_flux=unknown,
        shared_flux_err=unknown,
        n_pixels=int((cut.weights > 0).sum()),
        blend_chi2=np.nan,
        iterations=0,
        converged=False,
        missing=missing,
        seconds=seconds,
    )


def fit_blends(plan: TilePlan, workers: int | None = None) -> Iterator[BlendOutcome]:
    """Model all blends, the largest first.

    Parameters
    ----------
    plan : TilePlan
    workers : int, optional
        Number of blends in work at the same time; None: one. The answer does not depend on it.

    Yields
    ------
    BlendOutcome
        One per blend, in the order in which they are done.
    """
    n_workers = 1 if workers is None else int(workers)
    if n_workers < 1:
        raise InputError(f"workers must be at least 1, got {workers}")
    tasks = sorted(plan.tasks, key=lambda task: (-task.box.area * len(task.parent.peaks), task.index))
    if n_workers == 1:
        for task in tasks:
            yield fit_blend(plan, task)
        return
    with ThreadPoolExecutor(n_workers) as pool:
        futures = [pool.submit(fit_blend, plan, task) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()


def collect(plan: TilePlan, outcomes: Iterable[BlendOutcome]) -> Result:
    """Put the outcomes of all blends together.

    Parameters
    ----------
    plan : TilePlan
    outcomes : iterable of BlendOutcome
        One per blend of the plan, in any order.

    Returns
    -------
    result : Result
        One row per peak, in the order of the peaks.
    """
    start = time.perf_counter()
    done = sorted(outcomes, key=lambda outcome: outcome.index)
    assert [outcome.index for outcome in done] == list(range(plan.n_blends)), "one outcome per blend"
    coadd, n_peaks, n_bands = plan.coadd, plan.n_peaks, plan.coadd.n_bands

    total = np.zeros(coadd.images.shape, dtype=np.float32)
    for outcome in done:
        outer = plan.tasks[outcome.index].outer
        total[:, outer.y, outer.x] += outcome.total

    per_band = {
        name: np.full((n_peaks, n_bands), np.nan)
        for name in (
            "flux",
            "flux_err",
            "redistributed_flux",
            "redistributed_flux_err",
            "max_overlap",
            "flux_overlap",
            "flux_overlap_fraction",
            "blendedness",
        )
    }
    rows: dict[str, NDArray[Any]] = {
        "parent_id": np.zeros(n_peaks, dtype=np.int64),
        "blend_id": np.zeros(n_peaks, dtype=np.int64),
        "n_components": np.zeros(n_peaks, dtype=np.int64),
        "chi2": np.full(n_peaks, np.nan),
        "iterations": np.zeros(n_peaks, dtype=np.int64),
        "converged": np.zeros(n_peaks, dtype=bool),
        "outcome": np.full(n_peaks, "", dtype="<U16"),
        "reason": np.full(n_peaks, "", dtype="<U16"),
    }
    flags = {flag: np.zeros(n_peaks, dtype=bool) for flag in Flag}
    models, psfs = {}, {}
    image_box = Box.of_shape(coadd.shape)
    for outcome in done:
        task, members = plan.tasks[outcome.index], outcome.members
        shared = (outcome.shared_flux, outcome.shared_flux_err)
        if outcome.models is not None:
            shared = shared_fluxes(coadd, task.outer, total[:, task.outer.y, task.outer.x], outcome.models)
        per_band["flux"][members] = outcome.flux
        per_band["flux_err"][members] = outcome.flux_err
        per_band["redistributed_flux"][members] = np.where(outcome.missing, np.nan, shared[0])
        per_band["redistributed_flux_err"][members] = np.where(outcome.missing, np.nan, shared[1])
        for name in ("max_overlap", "flux_overlap", "flux_overlap_fraction", "blendedness"):
            per_band[name][members] = np.where(outcome.missing, np.nan, getattr(outcome.metrics, name))
        rows["parent_id"][members] = task.parent.parent_id + 1
        rows["blend_id"][members] = outcome.index + 1
        rows["n_components"][members] = [len(source.components) for source in outcome.scene.sources]
        rows["chi2"][members] = outcome.chi2
        rows["iterations"][members] = outcome.iterations
        rows["converged"][members] = outcome.converged
        rows["outcome"][members] = outcome.outcome.value
        rows["reason"][members] = outcome.reason
        flags[Flag.NOT_CONVERGED][members] = not outcome.converged
        flags[Flag.MISSING_BAND][members] = outcome.missing.any()
        flags[Flag.NO_DATA][members] = outcome.missing.all()
        flags[Flag.NULL_MODEL][members] = ~(np.nan_to_num(outcome.flux) > 0).any(axis=1)
        psfs[outcome.index + 1] = outcome.psfs
        for member, source in zip(members.tolist(), outcome.scene.sources, strict=True):
            models[member + 1] = source
            grown = source.box.grow(1)
            flags[Flag.EDGE][member] = not source.box.is_empty and (grown & image_box) != grown

    y, x = plan.peaks[:, 0], plan.peaks[:, 1]
    _, first, inverse = np.unique(plan.peaks, axis=0, return_index=True, return_inverse=True)
    flags[Flag.DUPLICATE_PEAK][:] = first[inverse.reshape(-1)] != np.arange(n_peaks)
    flags[Flag.MASKED_PEAK][:] = ~coadd.valid[:, y, x].any(axis=0)
    flags[Flag.OUTSIDE_FOOTPRINT][:] = plan.labels[y, x] == 0
    right_ascension, declination = coadd.sky(y=y + coadd.origin[0], x=x + coadd.origin[1])
    objects = make_objects(
        {
            "object_id": np.arange(1, n_peaks + 1),
            "peak_index": np.arange(n_peaks),
            "y": (y + coadd.origin[0]).astype(np.float64),
            "x": (x + coadd.origin[1]).astype(np.float64),
            "ra": right_ascension,
            "dec": declination,
            **{f"{band}_{name}": values[:, b] for name, values in per_band.items() for b, band in enumerate(coadd.bands)},
            **rows,
            **{flag.value: values for flag, values in flags.items()},
        },
        coadd.bands,
        coadd.unit,
    )
    seconds = {outcome.index + 1: outcome.seconds for outcome in done}
    return Result(
        objects=objects,
        parents=_parents_table(plan),
        blends=_blends_table(plan, done),
        bands=coadd.bands,
        config=plan.config,
        models={object_id: models[object_id] for object_id in sorted(models)},
        psfs=psfs,
        shape=coadd.shape,
        origin=coadd.origin,
        unit=coadd.unit,
        zero_point=coadd.zero_point,
        wcs=coadd.wcs,
        coadd=coadd,
        timings={"blends": seconds, "collect": time.perf_counter() - start},
        total=total,
    )


def _parents_table(plan: TilePlan) -> Any:
    parents = [task.parent for task in plan.tasks]
    return make_parents(
        {
            "parent_id": np.array([parent.parent_id + 1 for parent in parents], dtype=np.int64),
            **_box_columns([parent.box for parent in parents], plan.coadd),
            "n_peaks": np.array([len(parent.peaks) for parent in parents], dtype=np.int64),
            "n_blends": np.ones(len(parents), dtype=np.int64),
            "area": np.array(
                [int((plan.labels[p.box.y, p.box.x] == p.label).sum()) if p.label else 0 for p in parents],
                dtype=np.int64,
            ),
        }
    )


def _box_columns(boxes: list[Box], coadd: Coadd) -> dict[str, NDArray[np.int64]]:
    table = np.array([(*box.origin, *box.shape) for box in boxes], dtype=np.int64).reshape(-1, 4)
    return {
        "y0": table[:, 0] + coadd.origin[0],
        "x0": table[:, 1] + coadd.origin[1],
        "height": table[:, 2],
        "width": table[:, 3],
    }


def _blends_table(plan: TilePlan, done: list[BlendOutcome]) -> Any:
    tasks = plan.tasks
    n_sources = np.array([len(outcome.members) for outcome in done], dtype=np.int64)
    chi2 = np.array([outcome.blend_chi2 for outcome in done], dtype=np.float64)
    n_pixels = np.array([outcome.n_pixels for outcome in done], dtype=np.int64)
    return make_blends(
        {
            "blend_id": np.arange(1, len(done) + 1),
            "parent_id": np.array([task.parent.parent_id + 1 for task in tasks], dtype=np.int64),
            **_box_columns([task.box for task in tasks], plan.coadd),
            "n_sources": n_sources,
            "n_components": np.array([len(outcome.scene.components) for outcome in done], dtype=np.int64),
            "n_pixels": n_pixels,
            "chi2": chi2,
            "loss": 0.5 * chi2 * n_pixels,
            "iterations": np.array([outcome.iterations for outcome in done], dtype=np.int64),
            "converged": np.array([outcome.converged for outcome in done], dtype=bool),
            **{
                f"n_{rung.value}": np.where([outcome.outcome is rung for outcome in done], n_sources, 0)
                for rung in Outcome
            },
        }
    )


def deblend(
    coadd: Coadd,
    peaks: ArrayLike | Literal["detect"] | Any = None,
    footprints: ArrayLike | None = None,
    config: Config | None = None,
    workers: int | None = None,
) -> Result:
    """Decide which light of a coadd belongs to which source.

    Parameters
    ----------
    coadd : Coadd
        Images of one field in one or more bands, with variance and PSF.
    peaks : array_like, shape (N, 2), or Table or SkyCoord, optional
        Positions (y, x) of the sources in the coadd's coordinates. None: those that came with the coadd, or
        else detect; "detect": detect in any case.
    footprints : array_like, shape (H, W), optional
        Integer labels; sources on the same label are fitted together, and pixels labelled 0 are not used. None:
        those that came with the coadd, or else the connected regions above the detection threshold.
    config : Config, optional
        All settings; None: the defaults.
    workers : int, optional
        Number of blends in work at the same time; None: one. The answer does not depend on it.

    Returns
    -------
    result : Result
        One row per peak, whatever happened to it: `outcome` says how it was modelled and `reason` why not as
        configured. Sources without a valid pixel have NaN fluxes, as have bands without one.

    Raises
    ------
    InputError
        If peaks, footprints or workers cannot be used.

    Examples
    --------
    >>> from kermes.simulation import simulate_scene
    >>> scene = simulate_scene(n_sources=3, shape=(60, 60), seed=1)
    >>> result = deblend(scene.coadd, peaks=scene.peaks)
    >>> len(result.objects) == len(scene.peaks)
    True
    """
    start = time.perf_counter()
    plan = plan_tile(coadd, peaks, footprints, config)
    result = collect(plan, fit_blends(plan, workers))
    return replace(result, timings={**result.timings, "total": time.perf_counter() - start})
