"""One coadd to one result: which blends there are, how each is modelled, and how the answers come together."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kermes import catalog
from kermes.catalog import Flag, Outcome
from kermes.coadd import Blend, Coadd, cut_blend, label_image, normalize_peaks, psf_of_box
from kermes.config import Config
from kermes.detection import detect, footprints_of_peaks
from kermes.errors import BlendError, InputError
from kermes.fitting import fit_packed
from kermes.flux import add_positive, shared_fluxes
from kermes.free_form import with_free_form
from kermes.geometry import Box
from kermes.initialization import fit_kernels, initialize
from kermes.kernels import flux as kernels_flux
from kermes.kernels import metrics as kernels_metrics
from kermes.kernels.profile_fitting import DOUBLE, EXPONENTIAL, POINT, SERSIC
from kermes.measurement import Fluxes, measure_fluxes
from kermes.metrics import BlendMetrics, blend_metrics, model_metrics
from kermes.partition import Parent, join_close, partition
from kermes.profile_fitting import KINDS, ModeBank, ProfileFit, fit_profiles, scene_of_fit
from kermes.psf import MODEL_PSF_SIGMAS, amplify, continued, difference_kernels, model_psf, widest_sigma
from kermes.rendering import (
    Convolution,
    KernelSet,
    SourceModels,
    combine_sources,
    frame_models,
    outer_box,
    render_packed,
    render_scene,
    unpack,
)
from kermes.result import Result
from kermes.scene import Scene, Source

logger = logging.getLogger(__name__)

DoubleArray = NDArray[np.float64]
FloatArray = NDArray[np.float32]
LabelArray = NDArray[np.int64]

MARGIN = 6
"""Pixels of background around a footprint that are fitted too, so that the wings of the models are held down."""

PROFILE_MARGIN = 12
"""The same where the wings of profiles reach farther."""

LINK = 12.0
"""Footprints that come closer than this [pixels] are fitted together with the model "kermes"."""

RUNGS = (Outcome.FULL, Outcome.SINGLE, Outcome.POINT)
"""Models that are tried, one after the other, until one works."""

LARGE = 0.01
"""Blends that take more than this part of the work are done first."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlendTask:
    """One blend that is to be fitted."""

    index: int
    """Number of the blend, counted from 0."""

    parent: Parent
    """Footprint it belongs to."""

    members: LabelArray
    """Rows of its sources in the list of peaks, shape (S,), in the order of their positions."""

    box: Box
    """Pixels to fit, array index of the coadd."""

    outer: Box
    """Pixels that its models can reach, array index of the coadd."""

    psfs: DoubleArray
    """PSF of each band, shape (B, P, Q); zero in a band that cannot be used."""

    kernels: KernelSet
    """Difference kernels; zero likewise."""

    bank: ModeBank
    """Fourier modes of profiles."""

    last_neighbor: int
    """Place in the plan of the last blend whose models can reach `outer`, itself included."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TilePlan:
    """What will be done with one coadd."""

    coadd: Coadd
    config: Config
    peaks: LabelArray
    """Peaks (N, 2), array index (y, x)."""

    labels: LabelArray
    """Footprint of each pixel, shape (H, W)."""

    background: bool
    """Whether pixels outside all footprints may be used."""

    tasks: tuple[BlendTask, ...]
    """One per blend, in the order in which they are done."""

    seconds: float
    """How long it took to make the plan; not part of the answer."""

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
    """What became of one blend; arrays follow the sources in the order of `task.members`."""

    task: BlendTask
    scene: Scene
    models: SourceModels
    """Sources as observed, in pixels of `task.outer`."""

    others: SourceModels | None
    """All sources as observed, with those that nobody listed; None if there are none."""

    candidates: tuple[Source, ...]
    """Sources that nobody listed."""

    per_candidate: Mapping[str, DoubleArray]
    """Their columns: y, x, significance (A,); flux, flux_err (A, B)."""

    unknown: NDArray[np.bool_]
    """True for the bands of a source that no usable pixel tells about, shape (S, B)."""

    per_band: Mapping[str, DoubleArray]
    """Columns of `objects` that each band has, without its name, shape (S, B)."""

    per_source: Mapping[str, ArrayLike]
    """Columns of `objects`, shape (S,), or one value for all sources."""

    per_blend: Mapping[str, ArrayLike]
    """Columns of `blends`."""

    seconds: float
    """How long it took."""


def plan_tile(
    coadd: Coadd,
    peaks: Any = None,
    footprints: ArrayLike | None = None,
    config: Config | None = None,
) -> TilePlan:
    """Decide which peaks are fitted together on which pixels, and in which order.

    Parameters and errors are those of `deblend`.
    """
    start = time.perf_counter()
    config = Config() if config is None else config
    if not isinstance(config, Config):
        raise InputError(f"config must be a kermes.Config, got {type(config).__name__}")
    positions, labels, given = _peaks_and_footprints(coadd, peaks, footprints, config)
    image_box = Box.of_shape(coadd.shape)
    profiles = config.model == "kermes"
    if profiles and not given:
        labels = join_close(labels, LINK)
    parents = partition(labels, positions, coadd.shape).parents
    members = [_by_position(parent.peaks, positions) for parent in parents]
    margin = PROFILE_MARGIN if profiles else MARGIN
    boxes = [parent.box.grow(margin) & image_box for parent in parents]
    config = _with_model_psf(config, coadd, boxes)
    psfs = _psfs_of_blends(coadd, boxes, config)
    outers = [outer_box(box, psf, image_box) for box, (psf, _, _) in zip(boxes, psfs, strict=True)]

    # What decides about the order is the same for peaks in any order.
    costs = [box.area * len(rows) for box, rows in zip(boxes, members, strict=True)]
    first = [positions[rows[0]].tolist() for rows in members]
    limit = LARGE * sum(costs)
    order = sorted(range(len(boxes)), key=lambda k: (-costs[k] if costs[k] > limit else 0, *boxes[k].origin, *first[k]))
    latest = np.zeros(coadd.shape, dtype=np.int32)
    for place, k in enumerate(order):
        latest[outers[k].y, outers[k].x] = place
    tasks = tuple(
        BlendTask(
            index=k,
            parent=parents[k],
            members=members[k],
            box=boxes[k],
            outer=outers[k],
            psfs=psfs[k][0],
            kernels=psfs[k][1],
            bank=psfs[k][2],
            last_neighbor=int(latest[outers[k].y, outers[k].x].max()),
        )
        for k in order
    )
    return TilePlan(
        coadd=coadd,
        config=config,
        peaks=positions,
        labels=labels,
        background=not given,
        tasks=tasks,
        seconds=time.perf_counter() - start,
    )


def _peaks_and_footprints(
    coadd: Coadd, peaks: Any, footprints: ArrayLike | None, config: Config
) -> tuple[LabelArray, LabelArray, bool]:
    """Peaks (N, 2) as array index, footprint labels (H, W), and whether the footprints were given."""
    if isinstance(peaks, str):
        if peaks != "detect":
            raise InputError(f"peaks must be positions, None or 'detect', got {peaks!r}")
    elif peaks is None:
        peaks = coadd.peaks
    if footprints is None:
        footprints = coadd.footprints
    labels = None if footprints is None else label_image(footprints, coadd.shape)
    if peaks is not None and not isinstance(peaks, str):
        positions = normalize_peaks(peaks, coadd)
        if labels is None:
            return positions, footprints_of_peaks(coadd, positions, config.detection), False
        return positions, labels, True
    detection = detect(coadd, config.detection)
    if labels is None:
        return detection.peaks, detection.footprints, False
    return detection.peaks[labels[detection.peaks[:, 0], detection.peaks[:, 1]] > 0], labels, True


def _by_position(rows: LabelArray, peaks: LabelArray) -> LabelArray:
    """Put rows of the list of peaks into the order of y, then x, then their own."""
    return rows[np.lexsort((rows, peaks[rows, 1], peaks[rows, 0]))]


def _with_model_psf(config: Config, coadd: Coadd, boxes: list[Box]) -> Config:
    """Choose the width of the model PSF if that is left to us."""
    if config.model_psf_sigma > 0:
        return config
    psfs = {psf.tobytes(): psf for psf in (psf_of_box(coadd, box) for box in boxes)}
    sigma = min((widest_sigma(psf) for psf in psfs.values()), default=MODEL_PSF_SIGMAS[0])
    return replace(config, model_psf_sigma=sigma)


def _psfs_of_blends(coadd: Coadd, boxes: list[Box], config: Config) -> list[tuple[DoubleArray, KernelSet, ModeBank]]:
    """PSFs and difference kernels at the centre of each box; equal PSFs are one array.

    Bands without a PSF there, or with one narrower than that of the model frame, are zero.
    """
    known: dict[bytes, tuple[DoubleArray, KernelSet, ModeBank, NDArray[np.bool_]]] = {}
    found = []
    for box in boxes:
        psfs = psf_of_box(coadd, box)
        content = psfs.tobytes()
        if content not in known:
            known[content] = _prepare_psfs(
                content, psfs.shape, config.model_psf_sigma, config.kernel_regularization, config.model
            )
        found.append(known[content])
    for b, band in enumerate(coadd.bands):
        n_narrow = sum(narrow[b] for *_, narrow in found)
        n_unusable = sum(not psfs[b].any() for psfs, *_ in found)
        if found and n_narrow == len(found):
            raise InputError(
                "psfs must be wider than the PSF of the model frame, a Gaussian of model_psf_sigma = "
                f"{config.model_psf_sigma:g} pixels; that of band {band!r} is narrower: choose a smaller "
                "model_psf_sigma, 0 for one that fits, or leave the band out"
            )
        if n_unusable:
            logger.warning(
                "%s: band %s is not used in %d of %d blends, %d of them because its PSF is narrower than the model PSF",
                coadd.name,
                band,
                n_unusable,
                len(found),
                n_narrow,
            )
    return [(psfs, kernels, bank) for psfs, kernels, bank, _ in found]


@lru_cache(maxsize=4)
def _prepare_psfs(
    content: bytes, shape: tuple[int, int, int], sigma: float, regularization: float, model: str
) -> tuple[DoubleArray, KernelSet, ModeBank, NDArray[np.bool_]]:
    """PSFs, difference kernels, Fourier modes, and which bands are too narrow for the model frame.

    Many coadds have the PSFs of the one before; what was transformed for them is kept.
    """
    psfs = np.frombuffer(content, dtype=np.float64).reshape(shape)
    kernels = difference_kernels(psfs, model_psf(sigma), regularization)
    narrow = amplify(kernels)
    if narrow.any():
        kernels = np.where(narrow[:, None, None], 0.0, kernels)
        if model == "kermes":
            # Profiles are seen through the PSF itself; only free shapes need the model frame.
            narrow = np.zeros_like(narrow)
        else:
            psfs = np.where(narrow[:, None, None], 0.0, psfs)
    wide = continued(psfs)
    return psfs, KernelSet(kernels, wide), ModeBank(wide), narrow


def _usable(plan: TilePlan, task: BlendTask) -> NDArray[np.bool_]:
    """Pixels of `task.outer` that may be fitted: the footprint, and background where that is allowed."""
    window = task.box.within(task.outer)
    labels = plan.labels[task.box.y, task.box.x]
    usable = np.zeros(task.outer.shape, dtype=bool)
    usable[window] = (labels == task.parent.label) & (labels > 0)
    if plan.background:
        usable[window] |= labels == 0
    return usable


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
    rung: Outcome
    fluxes: Fluxes
    iterations: int
    converged: bool


@lru_cache(maxsize=4)
def _target(sigma: float) -> DoubleArray:
    return model_psf(sigma)


def _model_blend(outer: Blend, task: BlendTask, config: Config, rung: Outcome) -> _Modelled:
    """Initialize, fit and measure one blend; raises BlendError when the answer is not finite."""
    config = _settings(config, rung)
    blend = _window(outer, task.box)
    convolution = Convolution.of(fit_kernels(blend, task.kernels), task.box.shape)
    packed = initialize(blend, task.kernels, convolution, _target(config.model_psf_sigma), config.initialization)
    iterations, converged = 0, True
    if config.fit.max_iterations > 0:
        fit = fit_packed(packed, blend, convolution, config.fit)
        packed, iterations, converged = fit.packed, fit.iterations, fit.converged
    fluxes = measure_fluxes(packed, len(task.members), blend, task.kernels)
    if not np.isfinite(fluxes.flux).all():
        raise BlendError("the fitted fluxes are not finite")
    return _Modelled(rung=rung, fluxes=fluxes, iterations=iterations, converged=converged)


def _fit_profiles(blend: Blend, task: BlendTask, config: Config, rung: Outcome) -> ProfileFit:
    """Fit profiles to one blend; raises BlendError when the answer is not finite."""
    most = {Outcome.FULL: DOUBLE, Outcome.SINGLE: EXPONENTIAL, Outcome.POINT: POINT}[rung]
    # What lies around the box is not used; the fit need not look at it.
    inner = _window(blend, task.box)
    fit = fit_profiles(inner.images, inner.weights, task.bank, inner.peaks.astype(np.float64), config.profiles, most)
    shift = np.array(task.box.origin) - np.array(task.outer.origin)
    fit.sources.shapes[:, :2] += shift
    fit.sources.stamps[:, 1:3] += shift
    if not np.isfinite(fit.sources.fluxes).all() or not np.isfinite(fit.sources.shapes).all():
        raise BlendError("the fitted fluxes or shapes are not finite")
    return fit


def fit_blend(plan: TilePlan, task: BlendTask) -> BlendOutcome:
    """Model one blend on the highest rung of the ladder that works."""
    start = time.perf_counter()
    cut = cut_blend(plan.coadd, task.outer, plan.peaks[task.members], _usable(plan, task), task.psfs)
    missing = np.isnan(cut.noise_rms)
    if missing.all():
        outcome = _without_model(task, cut, "no_data")
    else:
        unit = float(np.median(cut.noise_rms[~missing]))
        scaled = _scaled(cut, unit)
        reason = ""
        for rung in RUNGS:
            try:
                if plan.config.model == "kermes":
                    fit = _fit_profiles(scaled, task, plan.config, rung)
                    outcome = _with_profiles(plan, task, cut, fit, unit, rung, reason)
                else:
                    modelled = _model_blend(scaled, task, plan.config, rung)
                    outcome = _with_model(plan, task, cut, modelled, unit, reason)
            except BlendError as error:
                logger.warning("blend %d is not modelled as %s: %s", task.index + 1, rung, error)
                reason = "not_finite"
            else:
                break
        else:
            outcome = _without_model(task, cut, reason)
    return replace(outcome, seconds=time.perf_counter() - start)


def _with_model(
    plan: TilePlan,
    task: BlendTask,
    cut: Blend,
    modelled: _Modelled,
    unit: float,
    reason: str,
) -> BlendOutcome:
    """Describe a blend of free shapes whose fluxes were found, in a unit of flux."""
    fluxes, n_sources = modelled.fluxes, len(task.members)
    shift = np.array([task.box.y0 - task.outer.y0, task.box.x0 - task.outer.x0, 0, 0])
    packed = replace(fluxes.packed, boxes=fluxes.packed.boxes + shift, spectra=fluxes.packed.spectra * np.float32(unit))
    boxes, _ = kernels_flux.source_boxes(packed.boxes, packed.sources, n_sources)
    return _describe(
        plan,
        task,
        cut,
        scene=unpack(packed, cut.peaks, task.outer),
        models=combine_sources(packed, render_packed(packed, task.kernels, task.outer.shape), n_sources),
        others=None,
        candidates=(),
        per_candidate={},
        boxes=boxes,
        metrics=blend_metrics(packed, n_sources, task.outer.shape),
        flux=fluxes.flux * unit,
        flux_err=fluxes.flux_err * unit,
        iterations=modelled.iterations,
        converged=modelled.converged,
        per_band={},
        per_source={
            "model": "free-form",
            "n_components": np.bincount(packed.sources, minlength=n_sources),
            "outcome": modelled.rung.value,
            "reason": reason,
        },
        per_blend={"n_components": len(packed), f"n_{modelled.rung}": n_sources},
    )


def _with_profiles(
    plan: TilePlan, task: BlendTask, cut: Blend, fit: ProfileFit, unit: float, rung: Outcome, reason: str
) -> BlendOutcome:
    """Describe a blend of profiles, in a unit of flux."""
    n_sources = len(task.members)
    sources = fit.sources
    everything = scene_of_fit(fit, cut.peaks, task.outer, unit, plan.config.model_psf_sigma)
    others = render_scene(everything, task.kernels)
    corrected = _with_free_form(everything, others, fit, cut, task, plan.config)
    if corrected is not everything:
        everything, others = corrected, render_scene(corrected, task.kernels)
    scene = replace(everything, sources=everything.sources[:n_sources])
    models = _first_models(others, n_sources)
    kinds, shapes = sources.kinds[:n_sources], sources.shapes[:n_sources]
    extended, double = kinds != POINT, kinds == DOUBLE
    n_components = np.array([len(source.components) for source in scene.sources])
    return _describe(
        plan,
        task,
        cut,
        scene=scene,
        models=models,
        others=others if len(sources.kinds) > n_sources else None,
        candidates=everything.sources[n_sources:],
        per_candidate={
            "y": sources.shapes[n_sources:, 0] + task.outer.y0 + plan.coadd.origin[0],
            "x": sources.shapes[n_sources:, 1] + task.outer.x0 + plan.coadd.origin[1],
            "significance": fit.significance,
            "flux": sources.fluxes[n_sources:].sum(axis=1) * unit,
            "flux_err": fit.flux_err[n_sources:] * unit,
        },
        boxes=models.boxes,
        metrics=model_metrics(frame_models(scene, len(cut.images)), task.outer.shape),
        flux=sources.fluxes[:n_sources].sum(axis=1) * unit,
        flux_err=fit.flux_err[:n_sources] * unit,
        iterations=fit.iterations,
        converged=fit.converged,
        per_band={"bulge_flux": np.where(double[:, None], sources.fluxes[:n_sources, 1] * unit, np.nan)},
        per_source={
            "model": np.array(KINDS)[kinds],
            "center_y": shapes[:, 0] + task.outer.y0 + plan.coadd.origin[0],
            "center_x": shapes[:, 1] + task.outer.x0 + plan.coadd.origin[1],
            "center_y_err": fit.center_err[:n_sources, 0],
            "center_x_err": fit.center_err[:n_sources, 1],
            "radius": np.where(extended, np.exp(shapes[:, 2]), np.nan),
            "axis_ratio": np.where(extended, np.exp(-np.hypot(shapes[:, 3], shapes[:, 4])), np.nan),
            "angle": np.where(extended, np.degrees(0.5 * np.arctan2(shapes[:, 4], shapes[:, 3])), np.nan),
            "sersic_index": np.where(kinds == SERSIC, np.exp(shapes[:, 5]), np.where(extended, 1.0, np.nan)),
            "bulge_radius": np.where(double, np.exp(shapes[:, 6]), np.nan),
            "bulge_index": np.where(double, np.exp(shapes[:, 9]), np.nan),
            "evidence": fit.evidence[:n_sources],
            "n_components": n_components,
            "outcome": rung.value,
            "reason": reason,
        },
        per_blend={"n_components": n_components.sum(), f"n_{rung}": n_sources},
    )


def _with_free_form(
    scene: Scene, models: SourceModels, fit: ProfileFit, cut: Blend, task: BlendTask, config: Config
) -> Scene:
    """Correct the profiles of listed sources where they do not suffice; the same scene if all do."""
    residual = cut.images.copy()
    kernels_flux.subtract_models(residual, models.pixels, models.boxes, models.offsets)
    flux = fit.sources.fluxes.sum(axis=1)
    snr = np.sqrt(np.nansum(np.square(flux / fit.flux_err), axis=1))
    snr[fit.n_listed :] = np.nan
    return with_free_form(scene, residual, snr, cut, task.kernels, config.free_form)


def _first_models(models: SourceModels, n_sources: int) -> SourceModels:
    """Models of the first sources alone; no pixels are copied."""
    end = models.offsets[n_sources]
    return SourceModels(
        boxes=models.boxes[:n_sources], offsets=models.offsets[: n_sources + 1], pixels=models.pixels[:, :end]
    )


def _describe(
    plan: TilePlan,
    task: BlendTask,
    cut: Blend,
    *,
    scene: Scene,
    models: SourceModels,
    others: SourceModels | None,
    candidates: tuple[Source, ...],
    per_candidate: Mapping[str, DoubleArray],
    boxes: NDArray[np.int64],
    metrics: BlendMetrics,
    flux: DoubleArray,
    flux_err: DoubleArray,
    iterations: int,
    converged: bool,
    per_band: Mapping[str, DoubleArray],
    per_source: Mapping[str, ArrayLike],
    per_blend: Mapping[str, ArrayLike],
) -> BlendOutcome:
    """Describe a blend that was modelled; `boxes` (S, 4) are the pixels of its sources that chi2 and flags refer to."""
    residual = cut.images.copy()
    seen = models if others is None else others
    kernels_flux.subtract_models(residual, seen.pixels, seen.boxes, seen.offsets)
    whole = np.array([[0, 0, *task.outer.shape]], dtype=np.int64)
    chi2 = kernels_metrics.mean_chi2(residual, cut.weights, np.concatenate([boxes, whole]))
    unknown = np.isnan(flux_err)
    top, left = boxes[:, 0] + task.outer.y0, boxes[:, 1] + task.outer.x0
    bottom, right = top + boxes[:, 2], left + boxes[:, 3]
    height, width = plan.coadd.shape
    n_pixels = np.count_nonzero(cut.weights)
    common = {"iterations": iterations, "converged": converged}
    return BlendOutcome(
        task=task,
        scene=scene,
        models=models,
        others=others,
        candidates=candidates,
        per_candidate=per_candidate,
        unknown=unknown,
        per_band={
            "flux": flux,
            "flux_err": flux_err,
            "max_overlap": metrics.max_overlap,
            "flux_overlap": metrics.flux_overlap,
            "flux_overlap_fraction": metrics.flux_overlap_fraction,
            "blendedness": metrics.blendedness,
            **per_band,
        },
        per_source={
            **common,
            "chi2": chi2[:-1],
            Flag.MISSING_BAND: unknown.any(axis=1),
            Flag.NO_DATA: unknown.all(axis=1),
            Flag.NOT_CONVERGED: not converged,
            Flag.NULL_MODEL: ~(flux > 0).any(axis=1),
            Flag.EDGE: (boxes[:, 2] > 0) & ((top == 0) | (left == 0) | (bottom == height) | (right == width)),
            **per_source,
        },
        per_blend={
            **common,
            "chi2": chi2[-1],
            "n_pixels": n_pixels,
            "loss": 0.5 * chi2[-1] * n_pixels,
            **per_blend,
        },
        seconds=np.nan,
    )


def _without_model(task: BlendTask, cut: Blend, reason: str) -> BlendOutcome:
    """Describe a blend that no rung could model: sources without light or fluxes."""
    n_sources, n_bands = len(task.members), len(cut.images)
    missing = np.isnan(cut.noise_rms)
    sources = tuple(Source(peak=(y + task.outer.y0, x + task.outer.x0), components=()) for y, x in cut.peaks.tolist())
    return BlendOutcome(
        task=task,
        scene=Scene(sources=sources, box=task.outer),
        models=SourceModels(
            boxes=np.zeros((n_sources, 4), dtype=np.int64),
            offsets=np.zeros(n_sources + 1, dtype=np.int64),
            pixels=np.zeros((n_bands, 0), dtype=np.float32),
        ),
        others=None,
        candidates=(),
        per_candidate={},
        unknown=np.ones((n_sources, n_bands), dtype=bool),
        per_band={},
        per_source={
            Flag.MISSING_BAND: missing.any(),
            Flag.NO_DATA: missing.all(),
            "outcome": Outcome.PEAK.value,
            "reason": reason,
            Flag.NOT_CONVERGED: True,
            Flag.NULL_MODEL: True,
        },
        per_blend={"n_pixels": np.count_nonzero(cut.weights), f"n_{Outcome.PEAK}": n_sources},
        seconds=np.nan,
    )


def fit_blends(plan: TilePlan, workers: int | None = None) -> Iterator[BlendOutcome]:
    """Model all blends.

    Parameters
    ----------
    plan : TilePlan
    workers : int, optional
        Number of blends in work at the same time; None: one. The answer does not depend on it.

    Returns
    -------
    outcomes : iterator of BlendOutcome
        One per blend, in the order of the plan.

    Raises
    ------
    InputError
        If workers is not a whole number of at least 1.
    """
    n_workers = 1 if workers is None else workers
    if not isinstance(n_workers, int | np.integer) or n_workers < 1:
        raise InputError(f"workers must be a whole number, at least 1, got {workers!r}")
    if n_workers == 1:
        return (fit_blend(plan, task) for task in plan.tasks)
    return _fit_in_threads(plan, int(n_workers))


def _fit_in_threads(plan: TilePlan, n_workers: int) -> Iterator[BlendOutcome]:
    with ThreadPoolExecutor(n_workers) as pool:
        futures = deque(pool.submit(fit_blend, plan, task) for task in plan.tasks)
        try:
            while futures:
                yield futures.popleft().result()
        finally:
            for future in futures:
                future.cancel()


def collect(plan: TilePlan, outcomes: Iterable[BlendOutcome]) -> Result:
    """Put the outcomes of all blends together.

    Pixels are shared among the sources of a blend as soon as all blends that reach into them are there, so that only
    the models of blends that wait for a neighbour are held.

    Parameters
    ----------
    plan : TilePlan
    outcomes : iterable of BlendOutcome
        One per blend, in the order of the plan.

    Returns
    -------
    result : Result
        One row per peak, in the order of the peaks.
    """
    begin = start = time.perf_counter()
    coadd = plan.coadd
    objects = _object_columns(plan)
    blends = _blend_columns(plan)
    models: dict[int, Source] = {}
    total = np.zeros(coadd.images.shape, dtype=np.float32)
    waiting: list[BlendOutcome] = []
    found: list[BlendOutcome] = []
    n_done, blend_seconds, seconds = 0, np.zeros(plan.n_blends), time.perf_counter() - start
    for outcome in outcomes:
        start = time.perf_counter()
        task = outcome.task
        assert task is plan.tasks[n_done], "one outcome per blend, in the order of the plan"
        _fill(objects, outcome, outcome.per_band, coadd.bands)
        for name, values in outcome.per_source.items():
            objects[name][task.members] = values
        for name, value in outcome.per_blend.items():
            blends[name][task.index] = value
        models.update(zip((task.members + 1).tolist(), outcome.scene.sources, strict=True))
        window = (slice(None), task.outer.y, task.outer.x)
        total[window] = add_positive(total[window], outcome.models if outcome.others is None else outcome.others)
        if outcome.candidates:
            found.append(outcome)

        waiting.append(outcome)
        for complete in [waits for waits in waiting if waits.task.last_neighbor <= n_done]:
            outer = complete.task.outer
            flux, flux_err = shared_fluxes(coadd, outer, total[:, outer.y, outer.x], complete.models)
            shared = {"redistributed_flux": flux, "redistributed_flux_err": flux_err}
            _fill(objects, complete, shared, coadd.bands)
        waiting = [waits for waits in waiting if waits.task.last_neighbor > n_done]
        n_done += 1
        blend_seconds[task.index] = outcome.seconds
        seconds += time.perf_counter() - start
    assert n_done == plan.n_blends, "one outcome per blend"

    found.sort(key=lambda outcome: outcome.task.index)
    candidates = _candidate_columns(coadd, found)
    of_candidates = (source for outcome in found for source in outcome.candidates)
    models.update(zip((-candidates["candidate_id"]).tolist(), of_candidates, strict=True))
    return Result(
        objects=partial(catalog.make_objects, objects, coadd.bands, coadd.unit),
        parents=partial(catalog.make_parents, _parent_columns(plan)),
        blends=partial(catalog.make_blends, blends),
        candidates=partial(catalog.make_candidates, candidates, coadd.bands, coadd.unit),
        bands=coadd.bands,
        config=plan.config,
        models={
            model_id: models[model_id] for model_id in sorted(models, key=lambda number: (number < 0, abs(number)))
        },
        psfs={task.index + 1: task.psfs for task in _by_index(plan)},
        shape=coadd.shape,
        origin=coadd.origin,
        unit=coadd.unit,
        zero_point=coadd.zero_point,
        wcs=coadd.wcs,
        coadd=coadd,
        timings={
            "plan": plan.seconds,
            "blends": blend_seconds.tolist(),
            "collect": seconds,
            "total": plan.seconds + time.perf_counter() - begin,
        },
        total=total,
    )


def _fill(
    objects: Mapping[str, NDArray[Any]], outcome: BlendOutcome, values: Mapping[str, DoubleArray], bands: Sequence[str]
) -> None:
    """Write values (S, B) of the sources of a blend into the columns of `objects`, NaN where nothing is known."""
    for name, value in values.items():
        known = np.where(outcome.unknown, np.nan, value)
        for b, band in enumerate(bands):
            objects[f"{band}_{name}"][outcome.task.members] = known[:, b]


def _candidate_columns(coadd: Coadd, found: list[BlendOutcome]) -> dict[str, NDArray[Any]]:
    """Columns of `candidates`, blend by blend."""
    n_candidates = [len(outcome.candidates) for outcome in found]
    columns = catalog.empty_columns(catalog.candidate_columns(coadd.bands), sum(n_candidates))
    columns["candidate_id"][:] = np.arange(1, sum(n_candidates) + 1)
    columns["origin"][:] = catalog.Origin.RESIDUAL.value
    start = 0
    for outcome, n in zip(found, n_candidates, strict=True):
        rows = slice(start, start + n)
        columns["blend_id"][rows] = outcome.task.index + 1
        for name in ("y", "x", "significance"):
            columns[name][rows] = outcome.per_candidate[name]
        for b, band in enumerate(coadd.bands):
            columns[f"{band}_flux"][rows] = outcome.per_candidate["flux"][:, b]
            columns[f"{band}_flux_err"][rows] = outcome.per_candidate["flux_err"][:, b]
        start += n
    return columns


def _by_index(plan: TilePlan) -> list[BlendTask]:
    return sorted(plan.tasks, key=lambda task: task.index)


def _object_columns(plan: TilePlan) -> dict[str, NDArray[Any]]:
    """Columns of `objects`, with what is known of the peaks and the blends before any fit."""
    coadd, (y, x) = plan.coadd, plan.peaks.T
    columns = catalog.empty_columns(catalog.object_columns(coadd.bands), plan.n_peaks)
    columns["object_id"][:] = np.arange(1, plan.n_peaks + 1)
    columns["peak_index"][:] = np.arange(plan.n_peaks)
    columns["y"][:], columns["x"][:] = y + coadd.origin[0], x + coadd.origin[1]
    columns["ra"][:], columns["dec"][:] = coadd.sky(y=columns["y"], x=columns["x"])
    for task in plan.tasks:
        columns["parent_id"][task.members] = task.parent.parent_id + 1
        columns["blend_id"][task.members] = task.index + 1
    _, first, inverse = np.unique(plan.peaks, axis=0, return_index=True, return_inverse=True)
    columns[Flag.DUPLICATE_PEAK][:] = first[inverse.reshape(-1)] != np.arange(plan.n_peaks)
    columns[Flag.MASKED_PEAK][:] = ~coadd.valid[:, y, x].any(axis=0)
    columns[Flag.OUTSIDE_FOOTPRINT][:] = plan.labels[y, x] == 0
    return columns


def _box_columns(boxes: list[Box], coadd: Coadd) -> dict[str, NDArray[np.int64]]:
    table = np.array([(*box.origin, *box.shape) for box in boxes], dtype=np.int64).reshape(-1, 4)
    return {
        "y0": table[:, 0] + coadd.origin[0],
        "x0": table[:, 1] + coadd.origin[1],
        "height": table[:, 2],
        "width": table[:, 3],
    }


def _parent_columns(plan: TilePlan) -> dict[str, NDArray[np.int64]]:
    parents = [task.parent for task in _by_index(plan)]
    return {
        "parent_id": np.arange(1, len(parents) + 1),
        **_box_columns([parent.box for parent in parents], plan.coadd),
        "n_peaks": np.array([len(parent.peaks) for parent in parents], dtype=np.int64),
        "n_blends": np.ones(len(parents), dtype=np.int64),
        "area": np.array([_area(plan, parent) for parent in parents], dtype=np.int64),
    }


def _area(plan: TilePlan, parent: Parent) -> int:
    """Number of pixels of a footprint; 0 for a peak outside."""
    if parent.is_outside:
        return 0
    return int(np.count_nonzero(plan.labels[parent.box.y, parent.box.x] == parent.label))


def _blend_columns(plan: TilePlan) -> dict[str, NDArray[Any]]:
    """Columns of `blends`, with what is known before any fit."""
    tasks = _by_index(plan)
    return {
        **catalog.empty_columns(catalog.BLEND_COLUMNS, len(tasks)),
        "blend_id": np.arange(1, len(tasks) + 1),
        "parent_id": np.array([task.parent.parent_id + 1 for task in tasks], dtype=np.int64),
        **_box_columns([task.box for task in tasks], plan.coadd),
        "n_sources": np.array([len(task.members) for task in tasks], dtype=np.int64),
    }


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
    plan = plan_tile(coadd, peaks, footprints, config)
    result = collect(plan, fit_blends(plan, workers))
    if not plan.config.add_sources or len(result.candidates) == 0:
        return result
    found = np.stack([result.candidates["y"], result.candidates["x"]], axis=1) - np.array(coadd.origin)
    found = np.clip(np.floor(found + 0.5).astype(np.int64), 0, np.array(coadd.shape) - 1)
    everything = np.concatenate([plan.peaks, found]) + np.array(coadd.origin)
    plan = plan_tile(coadd, everything, footprints, config)
    return collect(plan, fit_blends(plan, workers))
