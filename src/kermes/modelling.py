"""One blend, from its pixels to its columns: the ladder of models, and what each leaves."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kermes.catalog import Flag, Model, Origin, Outcome, Reason
from kermes.coadd import PLANE_MEANINGS, Blend, Coadd, cut_blend
from kermes.config import Config, TemplatesConfig
from kermes.errors import BlendError
from kermes.fitting import fit_packed
from kermes.free_form import with_free_form
from kermes.geometry import Box
from kermes.initialization import fit_kernels, initialize
from kermes.kernels import flux as kernels_flux
from kermes.kernels import metrics as kernels_metrics
from kermes.kernels import residuals as kernels_residuals
from kermes.kernels.stamps import DOUBLE, EXPONENTIAL, POINT, SERSIC
from kermes.measurement import Fluxes, measure_fluxes, misfit_factors, point_fluxes
from kermes.metrics import BlendMetrics, blend_metrics, model_metrics
from kermes.planning import BlendTask, TilePlan, footprint_pixels, rungs, usable_pixels
from kermes.profile_fitting import KINDS, Correlations, ProfileFit, fit_profiles, scene_of_fit
from kermes.psf import model_psf
from kermes.rendering import (
    Convolution,
    SourceModels,
    combine_sources,
    frame_models,
    pack_scene,
    render_packed,
    render_scene,
    unpack,
)
from kermes.scene import CubeComponent, ProfileComponent, Scene, Source
from kermes.templates import DECISIONS, SharedBlend, share_blend

logger = logging.getLogger(__name__)

DoubleArray = NDArray[np.float64]
FloatArray = NDArray[np.float32]
LabelArray = NDArray[np.int64]

POOR_CHI2 = 10.0
"""Blends that are left with a larger mean of residual^2 / variance are tried with simpler models, too."""

PEAK_HALF = 12
"""Half the side of the box of a source that is modelled as a PSF at its peak [pixels]."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlendOutcome:
    """What became of one blend; sources are its members, in the order of `task.members`."""

    task: BlendTask
    scene: Scene
    models: SourceModels
    """Sources as observed, in pixels of `task.outer`."""

    claims: SourceModels
    """What the flux of pixels is shared by: the same, and the sources that nobody listed."""

    candidates: tuple[Source, ...]
    """Sources that nobody listed."""

    columns: Mapping[str, ArrayLike]
    """Columns of `objects`, shape (S,), or one value for all sources."""

    candidate_columns: Mapping[str, ArrayLike]
    """Columns of `candidates`, shape (A,); empty without candidates."""

    blend_columns: Mapping[str, ArrayLike]
    """Columns of `blends`."""

    seconds: float
    """How long it took."""

    @property
    def nbytes(self) -> int:
        """Memory that its models take."""
        return self.models.pixels.nbytes + (0 if self.claims is self.models else self.claims.pixels.nbytes)


def _widened(blend: Blend, box: Box) -> Blend:
    """Put unused pixels around a blend, so that it fills a larger box."""
    window = (slice(None), *blend.box.within(box))
    images, weights = np.zeros((2, len(blend.images), *box.shape), dtype=np.float32)
    images[window], weights[window] = blend.images, blend.weights
    shift = np.array(blend.box.origin) - np.array(box.origin)
    return replace(blend, images=images, weights=weights, box=box, peaks=blend.peaks + shift)


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


def _model_blend(blend: Blend, task: BlendTask, config: Config, rung: Outcome) -> _Modelled:
    """Initialize, fit and measure one blend of free shapes; raises BlendError when the answer is not finite."""
    config = _settings(config, rung)
    convolution = Convolution.of(fit_kernels(blend, task.kernels), task.box.shape)
    packed = initialize(blend, task.kernels, convolution, _target(config.model_psf_sigma), config.initialization)
    iterations, converged = 0, True
    if config.fit.max_iterations > 0:
        fit = fit_packed(packed, blend, convolution, config.fit)
        packed, iterations, converged = fit.packed, fit.iterations, fit.converged
    fluxes = measure_fluxes(packed, len(task.rows), blend, task.kernels)
    if not np.isfinite(fluxes.flux).all():
        raise BlendError("the fitted fluxes are not finite")
    return _Modelled(rung=rung, fluxes=fluxes, iterations=iterations, converged=converged)


def _heeding(weights: FloatArray, heeded: DoubleArray) -> FloatArray:
    """Weights (B, H, W) of pixels for sums over the PSF, whose noise is larger by factors (B,) than pixels tell."""
    if (heeded == 1.0).all():
        return weights
    return np.asarray(weights * (heeded**-2).astype(np.float32)[:, None, None])


def _fit_profiles(blend: Blend, task: BlendTask, plan: TilePlan, rung: Outcome) -> ProfileFit:
    """Fit profiles to one blend; raises BlendError when the answer is not finite."""
    most = {Outcome.FULL: DOUBLE, Outcome.SINGLE: EXPONENTIAL, Outcome.POINT: POINT}[rung]
    assert task.bank is not None, "plans for profiles have their modes"
    weights = _heeding(blend.weights, plan.heeded_factors)
    fit = fit_profiles(blend.images, weights, task.bank, blend.peaks.astype(np.float64), plan.config.profiles, most)
    shift = np.array(task.box.origin) - np.array(task.outer.origin)
    for places, corners in ((fit.sources.shapes[:, :2], fit.sources.stamps), (fit.clumps.centers, fit.clumps.stamps)):
        places += shift
        corners[:, 1:3] += shift
    if not np.isfinite(fit.flux).all() or not np.isfinite(fit.sources.shapes).all():
        raise BlendError("the fitted fluxes or shapes are not finite")
    return fit


def fit_blend(plan: TilePlan, task: BlendTask, earlier: Iterable[BlendOutcome] = ()) -> BlendOutcome:
    """Model one blend on the highest rung of the ladder that it can afford and that works.

    Parameters
    ----------
    plan : TilePlan
    task : BlendTask
    earlier : iterable of BlendOutcome, optional
        Blends of lower levels, whose light is taken off before.

    Returns
    -------
    outcome : BlendOutcome
        Of its members alone. Without a single valid pixel they have no light, and NaN for fluxes.
    """
    start = time.perf_counter()
    blend = cut_blend(plan.coadd, task.box, plan.peaks[task.rows], usable_pixels(plan, task), task.psfs)
    _subtract(blend, earlier)
    unit = blend.typical_noise
    outcome = _without_model(plan, task) if np.isnan(unit) else _climb_down(plan, task, blend, unit)
    return replace(outcome, seconds=time.perf_counter() - start)


def _climb_down(plan: TilePlan, task: BlendTask, blend: Blend, unit: float) -> BlendOutcome:
    """Model a blend on the first rung that works; where that fits badly, on the next one that fits better."""
    ladder, of_templates = rungs(plan.config.model), plan.config.model == "templates"
    reason = Reason.NONE if task.rung is ladder[0] else Reason.BUDGET
    best: BlendOutcome | None = None
    for rung in ladder[ladder.index(task.rung) :]:
        try:
            outcome = _on_rung(plan, task, blend, unit, rung, reason)
        except BlendError as error:
            logger.warning("blend %d is not modelled as %s: %s", task.index + 1, rung, error)
            reason = Reason.NOT_FINITE if best is None else reason
            continue
        if best is None or _chi2(outcome) < _chi2(best):
            best = outcome
        if of_templates or _chi2(best) <= POOR_CHI2 or rung in (Outcome.POINT, Outcome.TEMPLATE):
            break
        reason = Reason.POOR_FIT
    assert best is not None, "the last rung always works"
    return best


def _chi2(outcome: BlendOutcome) -> float:
    return float(np.asarray(outcome.blend_columns["chi2"]))


def _on_rung(plan: TilePlan, task: BlendTask, blend: Blend, unit: float, rung: Outcome, reason: Reason) -> BlendOutcome:
    """Model a blend on one rung, in a unit of flux; raises BlendError if that does not work."""
    # All pixels that its models can reach. Those around the blend are not used, and fits need not look at them.
    cut = _widened(blend, task.outer)
    if rung is Outcome.PEAK:
        return _with_peaks(plan, task, cut, reason)
    if rung is Outcome.TEMPLATE or plan.config.model == "templates":
        return _with_templates(plan, task, cut, _scaled(cut, unit), unit, rung, reason)
    scaled = _scaled(blend, unit)
    if plan.config.model == "kermes":
        fit = _fit_profiles(scaled, task, plan, rung)
        return _with_profiles(plan, task, cut, fit, unit, rung, reason)
    return _with_model(plan, task, cut, _model_blend(scaled, task, plan.config, rung), unit, reason)


def _subtract(blend: Blend, earlier: Iterable[BlendOutcome]) -> None:
    """Take the light of other blends off the pixels of a blend that are used, in place."""
    for outcome in earlier:
        if (outcome.task.outer & blend.box).is_empty:
            continue
        dy, dx = np.array(outcome.task.outer.origin) - np.array(blend.box.origin)
        models = outcome.models
        for s, row in enumerate(models.boxes.tolist()):
            box = Box(*row).shift(dy, dx)
            common = box & Box.of_shape(blend.box.shape)
            if common.is_empty:
                continue
            model = models.pixels[:, models.offsets[s] : models.offsets[s + 1]].reshape(-1, *box.shape)
            window = (slice(None), common.y, common.x)
            blend.images[window] -= model[:, *common.within(box)] * (blend.weights[window] > 0)


def _select(models: SourceModels, rows: LabelArray) -> SourceModels:
    """Models of some sources, in their order; the same models if these are all."""
    if len(rows) == len(models.boxes):
        return models
    # Contiguous, always: kernels that are compiled for another layout round differently.
    pieces = [models.pixels[:, models.offsets[s] : models.offsets[s + 1]] for s in rows]
    return SourceModels(
        boxes=models.boxes[rows],
        offsets=np.concatenate([[0], np.cumsum(np.diff(models.offsets)[rows])]),
        pixels=np.concatenate(pieces, axis=1),
    )


def _first(metrics: BlendMetrics, n_sources: int) -> BlendMetrics:
    """Metrics of the first sources."""
    return BlendMetrics(
        max_overlap=metrics.max_overlap[:n_sources],
        flux_overlap=metrics.flux_overlap[:n_sources],
        flux_overlap_fraction=metrics.flux_overlap_fraction[:n_sources],
        blendedness=metrics.blendedness[:n_sources],
    )


def _with_model(
    plan: TilePlan, task: BlendTask, cut: Blend, modelled: _Modelled, unit: float, reason: Reason
) -> BlendOutcome:
    """Describe a blend of free shapes whose fluxes were found, in a unit of flux."""
    fluxes, n_sources, n_fitted = modelled.fluxes, len(task.members), len(task.rows)
    shift = np.array([task.box.y0 - task.outer.y0, task.box.x0 - task.outer.x0, 0, 0])
    packed = replace(fluxes.packed, boxes=fluxes.packed.boxes + shift, spectra=fluxes.packed.spectra * np.float32(unit))
    boxes, _ = kernels_flux.source_boxes(packed.boxes, packed.sources, n_fitted)
    scene = unpack(packed, cut.peaks, task.outer)
    everything = combine_sources(packed, render_packed(packed, task.kernels, task.outer.shape), n_fitted)
    models = _select(everything, np.arange(n_sources))
    n_components = np.bincount(packed.sources, minlength=n_fitted)[:n_sources]
    correlations = Correlations(
        strongest=fluxes.correlation, neighbor=fluxes.neighbor, condition=np.full(n_fitted, np.nan)
    )
    return _describe(
        plan,
        task,
        cut,
        scene=replace(scene, sources=scene.sources[:n_sources]),
        residual=_left_by(everything, cut),
        models=models,
        claims=models,
        candidates=(),
        candidate_columns={},
        boxes=boxes[:n_sources],
        metrics=_first(blend_metrics(packed, n_fitted, task.outer.shape), n_sources),
        flux=fluxes.flux[:n_sources] * unit,
        flux_err=fluxes.flux_err[:n_sources] * plan.noise_factors * unit,
        iterations=modelled.iterations,
        converged=modelled.converged,
        columns={
            "model": Model.FREE_FORM.value,
            "n_components": n_components,
            "outcome": modelled.rung.value,
            "reason": reason.value,
            **_correlation_columns(correlations, task, plan.coadd.bands),
        },
        blend_columns={"n_components": n_components.sum(), f"n_{modelled.rung}": n_sources},
    )


def _with_profiles(
    plan: TilePlan, task: BlendTask, cut: Blend, fit: ProfileFit, unit: float, rung: Outcome, reason: Reason
) -> BlendOutcome:
    """Describe a blend of profiles, in a unit of flux."""
    n_sources, n_fitted = len(task.members), len(task.rows)
    sources = fit.sources
    scene = scene_of_fit(fit, cut.peaks, task.outer, unit, plan.config.model_psf_sigma)
    packed = pack_scene(scene, len(cut.images))
    everything = packed.observed(task.kernels)
    residual = _left_by(everything, cut)
    flux_err = _with_misfit(fit, residual, cut, everything, task, plan)
    corrected = _with_free_form(scene, residual, fit, cut, task, plan.config)
    changed = [s for s, source in enumerate(corrected.sources) if source is not scene.sources[s]]
    if changed:
        scene = corrected
        those = replace(scene, sources=tuple(scene.sources[s] for s in changed))
        everything = everything.replaced(changed, render_scene(those, task.kernels))
        residual, packed = _left_by(everything, cut), pack_scene(scene, len(cut.images))
    found = n_fitted + _own_candidates(sources.shapes[:, :2], n_sources, n_fitted)
    members = np.arange(n_sources)
    models = _select(everything, members)
    kinds, shapes = sources.kinds[:n_sources], sources.shapes[:n_sources]
    double = kinds == DOUBLE
    bulge = double[:, None] & np.isfinite(fit.flux_err[:n_sources])
    n_components = np.array([len(source.components) for source in scene.sources[:n_sources]])
    dy, dx = np.array(task.outer.origin) + np.array(plan.coadd.origin)
    bands = plan.coadd.bands
    return _describe(
        plan,
        task,
        cut,
        scene=replace(scene, sources=scene.sources[:n_sources]),
        residual=residual,
        models=models,
        claims=_select(everything, np.concatenate([members, found])) if len(found) else models,
        candidates=tuple(scene.sources[s] for s in found),
        candidate_columns=_candidate_columns(fit, found, flux_err, (dy, dx), unit, bands) if len(found) else {},
        boxes=models.boxes,
        metrics=_first(model_metrics(_select(packed.in_frame(), np.arange(n_fitted)), task.outer.shape), n_sources),
        flux=fit.flux[:n_sources] * unit,
        flux_err=flux_err[:n_sources] * unit,
        iterations=fit.iterations,
        converged=fit.converged,
        columns={
            **_by_band("bulge_flux", np.where(bulge, sources.fluxes[:n_sources, 1] * unit, np.nan), bands),
            "model": np.array(KINDS)[kinds],
            "center_y": shapes[:, 0] + dy,
            "center_x": shapes[:, 1] + dx,
            "center_y_err": fit.center_err[:n_sources, 0],
            "center_x_err": fit.center_err[:n_sources, 1],
            **_shape_columns(kinds, shapes, fit.variances.shape[:n_sources]),
            **_correlation_columns(fit.correlations, task, bands),
            "bulge_radius": np.where(double, np.exp(shapes[:, 6]), np.nan),
            "bulge_index": np.where(double, np.exp(shapes[:, 9]), np.nan),
            "evidence": fit.evidence[:n_sources],
            "n_components": n_components,
            "outcome": rung.value,
            "reason": reason.value,
        },
        blend_columns={"n_components": n_components.sum(), f"n_{rung}": n_sources},
    )


def _candidate_columns(
    fit: ProfileFit,
    found: LabelArray,
    flux_err: DoubleArray,
    origin: tuple[int, int],
    unit: float,
    bands: Sequence[str],
) -> dict[str, ArrayLike]:
    """Columns of sources that nobody listed, given as rows of the fit, in a unit of flux."""
    sources = fit.sources
    return {
        "y": sources.shapes[found, 0] + origin[0],
        "x": sources.shapes[found, 1] + origin[1],
        "significance": fit.significance[found - fit.n_listed],
        "origin": np.full(len(found), Origin.RESIDUAL.value),
        **_by_band("flux", fit.flux[found] * unit, bands),
        **_by_band("flux_err", flux_err[found] * unit, bands),
    }


def _shape_columns(kinds: LabelArray, shapes: DoubleArray, variances: DoubleArray) -> dict[str, ArrayLike]:
    """Size, shape and index of the profiles of sources (S, N_SHAPE) with their errors; NaN for points."""
    extended, free = kinds != POINT, kinds == SERSIC
    e1, e2 = shapes[:, 3], shapes[:, 4]
    of_radius, of_e1, of_e2, of_index, both = variances[:, 2:].T
    ellipticity = np.hypot(e1, e2)
    # Along the shear, which sets the axis ratio, and across, which sets the angle: not known of round profiles.
    with np.errstate(divide="ignore", invalid="ignore"):
        along = np.sqrt(e1**2 * of_e1 + 2 * e1 * e2 * both + e2**2 * of_e2) / ellipticity
        across = np.sqrt(e2**2 * of_e1 - 2 * e1 * e2 * both + e1**2 * of_e2) / ellipticity
        angle_err = np.degrees(0.5 * across / ellipticity)
    radius, axis_ratio, index = np.exp(shapes[:, 2]), np.exp(-ellipticity), np.exp(shapes[:, 5])
    columns = {
        "radius": radius,
        "radius_err": radius * np.sqrt(of_radius),
        "axis_ratio": axis_ratio,
        "axis_ratio_err": axis_ratio * along,
        "angle": np.degrees(0.5 * np.arctan2(e2, e1)),
        "angle_err": angle_err,
        "sersic_index": np.where(free, index, 1.0),
        "sersic_index_err": np.where(free, index * np.sqrt(of_index), np.nan),
    }
    return {name: np.where(extended, values, np.nan) for name, values in columns.items()}


def _correlation_columns(correlations: Correlations, task: BlendTask, bands: Sequence[str]) -> dict[str, ArrayLike]:
    """How strongly the fluxes of the members of a blend hang together with those of neighbours."""
    n_sources, rows = len(task.members), task.rows
    correlation, neighbor = correlations.strongest[:n_sources], correlations.neighbor[:n_sources]
    strongest = np.argmax(np.where(np.isnan(correlation), 0.0, np.abs(correlation)), axis=1)
    worst = neighbor[np.arange(n_sources), strongest]
    listed = (worst >= 0) & (worst < len(rows))
    return {
        **_by_band("flux_correlation", correlation, bands),
        "correlated_id": np.where(listed, rows[np.where(listed, worst, 0)] + 1, 0),
        "condition": correlations.condition[:n_sources],
    }


def _with_templates(
    plan: TilePlan, task: BlendTask, cut: Blend, scaled: Blend, unit: float, rung: Outcome, reason: Reason
) -> BlendOutcome:
    """Share the light of a blend among templates, made in a unit of flux, and describe it."""
    config, coadd = plan.config.templates, plan.coadd
    footprint = footprint_pixels(plan, task)
    n_sources = len(task.members)
    limits = _limits(footprint, cut.weights > 0, len(task.rows), config)
    of_templates = plan.config.model == "templates"
    if limits["parent_too_big"] or limits["parent_masked"]:
        outcome = _with_peaks(plan, task, cut, Reason.LIMITS)
        return replace(outcome, columns={**outcome.columns, **limits}) if of_templates else outcome
    shared = share_blend(scaled, footprint, coadd.bands, config, _edge(coadd, task.outer))
    sources = []
    for (y, x), row, start, end in zip(
        (cut.peaks + np.array(task.outer.origin)).tolist(),
        shared.models.boxes.tolist(),
        shared.models.offsets[:-1],
        shared.models.offsets[1:],
        strict=True,
    ):
        cube = shared.models.pixels[:, start:end].reshape(coadd.n_bands, *row[2:]) * np.float32(unit)
        box = Box(*row).shift(*task.outer.origin)
        components = () if box.is_empty else (CubeComponent(cube=cube, box=box, observed=True),)
        sources.append(Source(peak=(y, x), components=components))
    scene = Scene(sources=tuple(sources), box=task.outer)
    everything = render_scene(scene, task.kernels)
    models = _select(everything, np.arange(n_sources))
    fitted = shared.fitted[:n_sources]
    decisions = _template_columns(shared, n_sources, unit, coadd, cut.peaks + np.array(task.outer.origin))
    templates = [children.templates for children in shared.children]
    are_points = [t.decided("deblended_as_psf") | t.decided("no_template") for t in templates]
    only_points: NDArray[np.bool_] = np.logical_and.reduce(are_points)
    has_model = np.diff(models.offsets) > 0
    outcomes = np.where(fitted, rung.value, Outcome.PEAK.value)
    without = np.where(shared.is_beyond[:n_sources], Reason.LIMITS.value, Reason.NO_TEMPLATE.value)
    names, counts = np.unique(outcomes, return_counts=True)
    return _describe(
        plan,
        task,
        cut,
        scene=replace(scene, sources=scene.sources[:n_sources]),
        residual=_left_by(everything, cut),
        models=models,
        claims=models,
        candidates=(),
        candidate_columns={},
        boxes=models.boxes,
        metrics=_first(model_metrics(frame_models(scene, coadd.n_bands), task.outer.shape), n_sources),
        flux=shared.flux[:n_sources] * unit,
        flux_err=shared.flux_err[:n_sources] * plan.noise_factors * unit,
        iterations=0,
        converged=True,
        columns={
            "model": np.where(
                has_model, np.where(only_points[:n_sources], Model.POINT.value, Model.TEMPLATE.value), ""
            ),
            "center_y": cut.peaks[:n_sources, 0] + task.outer.y0 + coadd.origin[0],
            "center_x": cut.peaks[:n_sources, 1] + task.outer.x0 + coadd.origin[1],
            "n_components": has_model.astype(np.int64),
            "outcome": outcomes,
            "reason": np.where(fitted, reason.value, without),
            **({**decisions, **limits} if of_templates else {}),
        },
        blend_columns={
            "n_components": int(has_model.sum()),
            **{f"n_{name}": int(count) for name, count in zip(names, counts, strict=True)},
        },
    )


def _limits(
    footprint: NDArray[np.bool_], valid: NDArray[np.bool_], n_peaks: int, config: TemplatesConfig
) -> dict[str, bool]:
    """Say which limits of `templates` a footprint is beyond; valid (B, h, w)."""
    y, x = np.nonzero(footprint)
    too_big, masked = False, False
    if len(y):
        box = Box.where(footprint)
        of_a_pixel = 1 / 12
        minor2, major2 = (np.linalg.eigvalsh(np.cov(np.stack([y, x]), bias=True)) + of_a_pixel).tolist()
        too_big = (
            0 < config.largest_area < len(y)
            or 0 < config.largest_side < max(box.shape)
            or minor2 < config.least_axis_ratio**2 * major2
        )
        masked = float(np.mean(~np.logical_or.reduce(valid)[footprint])) > config.most_masked
    return {
        "parent_too_big": bool(too_big),
        "parent_masked": masked,
        "too_many_peaks": 0 < config.most_peaks < n_peaks,
    }


def _edge(coadd: Coadd, box: Box) -> NDArray[np.bool_]:
    """Pixels of a box at the edge of the image, or that the mask says are at an edge, shape (h, w)."""
    edge = np.ones(box.shape, dtype=np.bool_)
    edge[Box.of_shape(coadd.shape).grow(-1).within(box)] = False
    if coadd.mask is not None and coadd.mask_planes:
        bits = sum(1 << coadd.mask_planes[name] for name in PLANE_MEANINGS["edge"] if name in coadd.mask_planes)
        edge |= (np.bitwise_or.reduce(coadd.mask[:, box.y, box.x], axis=0) & bits) != 0
    return edge


def _template_columns(
    shared: SharedBlend, n_sources: int, unit: float, coadd: Coadd, peaks: LabelArray
) -> dict[str, ArrayLike]:
    """Columns of what was decided about the templates of each band; peaks (K, 2) as array index of the coadd."""
    columns: dict[str, ArrayLike] = {}
    first = slice(n_sources)
    for band, children in zip(coadd.bands, shared.children, strict=True):
        templates = children.templates
        fits = templates.fits[first]
        is_point = templates.decided("deblended_as_psf")[first]
        moved = templates.decided("psf_moved")[first]
        place = np.where(is_point[:, None], peaks[first] + fits[:, 1:3] + np.array(coadd.origin), np.nan)
        values = {
            "stray_flux": children.stray_flux[first] * unit,
            "has_stray_flux": children.has_stray_flux[first],
            "psf_center_y": place[:, 0],
            "psf_center_x": place[:, 1],
            "psf_flux": fits[:, 0] * unit,
            "psf_chi2": np.where(moved, fits[:, 10], fits[:, 6]),
            "psf_dof": np.where(moved, fits[:, 11], fits[:, 7]),
            "psf_n_neighbors": np.nan_to_num(fits[:, 3]).astype(np.int64),
            **{name: templates.decided(name)[first] for name in DECISIONS},
        }
        columns |= {f"{band}_{name}": value for name, value in values.items()}
    return columns


def _own_candidates(positions: DoubleArray, n_sources: int, n_fitted: int) -> LabelArray:
    """Which of the sources that nobody listed are nearest to a member; others are found by another blend."""
    found = positions[n_fitted:]
    if n_fitted == n_sources:
        return np.arange(len(found))
    square = np.square(found[:, None] - positions[:n_fitted]).sum(axis=2)
    return np.flatnonzero(square.argmin(axis=1) < n_sources)


def _left_by(models: SourceModels, cut: Blend) -> FloatArray:
    """What models leave of the pixels of a blend, shape (B, H, W)."""
    residual = cut.images.copy()
    kernels_flux.add_models(residual, models.pixels, models.boxes, models.offsets, -1.0)
    return residual


def _with_misfit(
    fit: ProfileFit, residual: FloatArray, cut: Blend, models: SourceModels, task: BlendTask, plan: TilePlan
) -> DoubleArray:
    """Errors of the fluxes (S, B), with what the structure that profiles do not hold adds to them."""
    assert task.bank is not None, "plans for profiles have their modes"
    weights, centers = _heeding(cut.weights, plan.heeded_factors), fit.sources.shapes[:, :2]
    factors = misfit_factors(residual, weights, models, centers, task.bank.sigmas)
    factors *= np.square(plan.noise_factors / plan.heeded_factors)
    # What lies between the kinds of models is no noise of pixels.
    return np.asarray(np.sqrt((fit.variances.flux - fit.doubt) * factors + fit.doubt))


def _with_free_form(
    scene: Scene, residual: FloatArray, fit: ProfileFit, cut: Blend, task: BlendTask, config: Config
) -> Scene:
    """Correct the profiles of members where they do not suffice; the same scene if all do."""
    # How well the light is seen, whatever it is taken for.
    square = np.square(fit.flux) / (fit.variances.flux - fit.doubt)
    snr = np.sqrt(np.where(np.isnan(square), 0.0, square).sum(axis=1))
    snr[len(task.members) :] = np.nan
    return with_free_form(scene, residual, snr, cut, task.kernels, config.free_form)


def _with_peaks(plan: TilePlan, task: BlendTask, cut: Blend, reason: Reason) -> BlendOutcome:
    """Describe a blend whose sources are PSFs at their peaks, each measured as if it were alone: this always works."""
    n_sources = len(task.members)
    bands = zip(cut.images, cut.weights, cut.psfs, strict=True)
    flux, flux_err = np.stack([point_fluxes(*band, cut.peaks[:n_sources]) for band in bands], axis=2)
    side = 2 * PEAK_HALF
    sources = []
    for (y, x), spectrum in zip((cut.peaks[:n_sources] + np.array(task.outer.origin)).tolist(), flux, strict=True):
        component = ProfileComponent(
            spectrum=np.nan_to_num(spectrum).astype(np.float32),
            center=np.array([y, x], dtype=np.float64),
            radius=0.0,
            shear=np.zeros(2),
            index=1.0,
            sigma=plan.config.model_psf_sigma,
            box=Box(y - PEAK_HALF, x - PEAK_HALF, side, side),
        )
        sources.append(Source(peak=(y, x), components=(component,)))
    scene = Scene(sources=tuple(sources), box=task.outer)
    models = render_scene(scene, task.kernels)
    return _describe(
        plan,
        task,
        cut,
        scene=scene,
        residual=_left_by(models, cut),
        models=models,
        claims=models,
        candidates=(),
        candidate_columns={},
        boxes=models.boxes,
        metrics=model_metrics(frame_models(scene, len(cut.images)), task.outer.shape),
        flux=np.nan_to_num(flux),
        flux_err=flux_err * plan.noise_factors,
        iterations=0,
        converged=True,
        columns={
            "model": Model.POINT.value,
            "center_y": cut.peaks[:n_sources, 0] + task.outer.y0 + plan.coadd.origin[0],
            "center_x": cut.peaks[:n_sources, 1] + task.outer.x0 + plan.coadd.origin[1],
            "n_components": 1,
            "outcome": Outcome.PEAK.value,
            "reason": reason.value,
        },
        blend_columns={"n_components": n_sources, f"n_{Outcome.PEAK}": n_sources},
    )


def _describe(
    plan: TilePlan,
    task: BlendTask,
    cut: Blend,
    *,
    scene: Scene,
    residual: FloatArray,
    models: SourceModels,
    claims: SourceModels,
    candidates: tuple[Source, ...],
    candidate_columns: Mapping[str, ArrayLike],
    boxes: NDArray[np.int64],
    metrics: BlendMetrics,
    flux: DoubleArray,
    flux_err: DoubleArray,
    iterations: int,
    converged: bool,
    columns: Mapping[str, ArrayLike],
    blend_columns: Mapping[str, ArrayLike],
) -> BlendOutcome:
    """Describe a blend with valid pixels that was modelled.

    residual (B, H, W): what all sources leave, with neighbours and those that nobody listed; boxes (S, 4): the pixels
    of its members that chi2 and flags refer to.
    """
    chi2 = kernels_metrics.mean_chi2(residual, cut.weights, boxes)
    total_chi2, n_pixels = kernels_residuals.total_chi2(residual, cut.weights)
    unknown = np.isnan(flux_err)
    top, left = boxes[:, 0] + task.outer.y0, boxes[:, 1] + task.outer.x0
    bottom, right = top + boxes[:, 2], left + boxes[:, 3]
    height, width = plan.coadd.shape
    common = {"iterations": iterations, "converged": converged}
    per_band = {
        "flux": flux,
        "flux_err": flux_err,
        "max_overlap": metrics.max_overlap,
        "flux_overlap": metrics.flux_overlap,
        "flux_overlap_fraction": metrics.flux_overlap_fraction,
        "blendedness": metrics.blendedness,
    }
    of_bands: dict[str, ArrayLike] = {}
    some_unknown = unknown.any()
    for name, values in per_band.items():
        of_bands |= _by_band(name, np.where(unknown, np.nan, values) if some_unknown else values, plan.coadd.bands)
    return BlendOutcome(
        task=task,
        scene=scene,
        models=models,
        claims=claims,
        candidates=candidates,
        columns={
            **of_bands,
            **common,
            "chi2": chi2,
            Flag.MISSING_BAND: unknown.any(axis=1),
            Flag.NO_DATA: unknown.all(axis=1),
            Flag.NOT_CONVERGED: not converged,
            Flag.NULL_MODEL: ~(flux > 0).any(axis=1),
            Flag.DIVIDED_PARENT: task.divided,
            Flag.EDGE: (boxes[:, 2] > 0) & ((top == 0) | (left == 0) | (bottom == height) | (right == width)),
            **columns,
        },
        candidate_columns=candidate_columns,
        blend_columns={
            **common,
            "chi2": total_chi2 / n_pixels,
            "n_pixels": n_pixels,
            "loss": 0.5 * total_chi2,
            **blend_columns,
        },
        seconds=np.nan,
    )


def _by_band(name: str, values: DoubleArray, bands: Sequence[str]) -> dict[str, ArrayLike]:
    """Columns of values (S, B) that each band has."""
    return {f"{band}_{name}": values[:, b] for b, band in enumerate(bands)}


def _without_model(plan: TilePlan, task: BlendTask) -> BlendOutcome:
    """Describe a blend without a single valid pixel: sources without light or fluxes."""
    n_sources, n_bands = len(task.members), plan.coadd.n_bands
    places = plan.peaks[task.members].tolist()
    nothing = SourceModels(
        boxes=np.zeros((n_sources, 4), dtype=np.int64),
        offsets=np.zeros(n_sources + 1, dtype=np.int64),
        pixels=np.zeros((n_bands, 0), dtype=np.float32),
    )
    return BlendOutcome(
        task=task,
        scene=Scene(sources=tuple(Source(peak=(y, x), components=()) for y, x in places), box=task.outer),
        models=nothing,
        claims=nothing,
        candidates=(),
        candidate_columns={},
        columns={
            Flag.MISSING_BAND: True,
            Flag.NO_DATA: True,
            "outcome": Outcome.PEAK.value,
            "reason": Reason.NO_DATA.value,
            Flag.NOT_CONVERGED: True,
            Flag.NULL_MODEL: True,
            Flag.DIVIDED_PARENT: task.divided,
        },
        blend_columns={f"n_{Outcome.PEAK}": n_sources},
        seconds=np.nan,
    )
