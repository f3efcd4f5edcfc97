"""One coadd to one result: blends are fitted in order, and their answers come together."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from functools import partial
from os import PathLike
from pathlib import Path
from threading import Condition
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kermes import catalog
from kermes.catalog import Flag, Model, PreferredFlux, Reason
from kermes.checkpoint import Checkpoint
from kermes.coadd import Coadd, planes_at
from kermes.config import Config
from kermes.flux import add_positive, doubt_of_shares, shared_fluxes
from kermes.geometry import Box, Footprints, box_table
from kermes.metrics import observed_metrics
from kermes.modelling import BlendOutcome, fit_blend
from kermes.partition import Parent
from kermes.planning import BlendTask, TilePlan, number_of_workers, plan_tile
from kermes.psf import gaussian_fwhm
from kermes.rendering import SourceModels
from kermes.result import Result
from kermes.scene import Source

Watch = Callable[[TilePlan, Iterator[BlendOutcome]], Iterable[BlendOutcome]]
"""What looks on while blends are fitted; see `deblend`."""

POOR_CHI2 = 1.5
"""Objects that are left with a larger mean of residual^2 / variance have a model that does not suffice."""

PREFERRED_CHI2 = 1.2
"""Objects with a larger one have light that their model lacks: the share of the pixels is preferred. Of 2100 simulated
fluxes with such a chi2, most of them in star clusters, it was the closer one in two of three; with less, in fields, in
two of five."""

LEAST_OWN_SNR = 4.0
"""Signal-to-noise, with everything else free, below which a source that neighbours outshine may be a part of them."""

LEAST_CORRELATION = 0.1
"""A source without any light of its own may be a part of a neighbour if their fluxes are correlated more than this."""

QUEUE = 4
"""Most blends for each worker that are in work or waiting for it."""


def fit_blends(
    plan: TilePlan, workers: int | None = None, checkpoint: Checkpoint | None = None
) -> Generator[BlendOutcome]:
    """Model all blends.

    Parameters
    ----------
    plan : TilePlan
    workers : int, optional
        Number of blends in work at the same time, as far as their predicted memory allows; None: one. The answer does
        not depend on it.
    checkpoint : Checkpoint, optional
        Blends that it holds are not fitted again; those that are fitted are added to it.

    Returns
    -------
    outcomes : iterator of BlendOutcome
        One per blend, in the order of the plan.

    Raises
    ------
    InputError
        If workers is not a whole number of at least 1.
    """
    return _fit_levels(plan, number_of_workers(workers), checkpoint)


def _fit_levels(plan: TilePlan, n_workers: int, checkpoint: Checkpoint | None) -> Generator[BlendOutcome]:
    """Fit one level after the other: the light of the earlier ones is known when the next begins."""
    earlier: list[BlendOutcome] = []
    last = plan.tasks[-1].level if plan.tasks else 0
    with ThreadPoolExecutor(n_workers) if n_workers > 1 else nullcontext() as pool:
        for level, tasks in itertools.groupby(plan.tasks, key=lambda task: task.level):
            done = []
            boxes = _bounds([outcome.task.outer for outcome in earlier])
            with closing(_fit_level(plan, tasks, earlier, boxes, pool, n_workers, checkpoint)) as outcomes:
                for outcome in outcomes:
                    if level < last:
                        done.append(outcome)
                    yield outcome
            earlier += done


def _bounds(boxes: list[Box]) -> NDArray[np.int64]:
    return np.array([(box.y0, box.y1, box.x0, box.x1) for box in boxes], dtype=np.int64).reshape(-1, 4)


def _fit_level(
    plan: TilePlan,
    tasks: Iterable[BlendTask],
    earlier: list[BlendOutcome],
    bounds: NDArray[np.int64],
    pool: ThreadPoolExecutor | None,
    n_workers: int,
    checkpoint: Checkpoint | None,
) -> Generator[BlendOutcome]:
    def fit(task: BlendTask) -> BlendOutcome:
        known = None if checkpoint is None else checkpoint.restored(task)
        if known is not None:
            return known
        box = task.outer
        near = (bounds[:, 0] < box.y1) & (bounds[:, 1] > box.y0) & (bounds[:, 2] < box.x1) & (bounds[:, 3] > box.x0)
        return fit_blend(plan, task, [earlier[k] for k in np.flatnonzero(near)])

    def keep(outcome: BlendOutcome) -> None:
        if checkpoint is not None:
            checkpoint.add(outcome)

    one_by_one = (fit(task) for task in tasks)
    with closing(one_by_one if pool is None else _in_threads(plan, tasks, fit, keep, pool, n_workers)) as outcomes:
        for outcome in outcomes:
            keep(outcome)
            yield outcome


def _in_threads(
    plan: TilePlan,
    tasks: Iterable[BlendTask],
    fit: Callable[[BlendTask], BlendOutcome],
    keep: Callable[[BlendOutcome], None],
    pool: ThreadPoolExecutor,
    n_workers: int,
) -> Generator[BlendOutcome]:
    """Yield outcomes in the order of the tasks.

    Those that are done early wait for their turn, so that a slow blend holds up nobody, as far as memory allows. If the
    end comes before their turn, they, and those in work, are given to `keep`.
    """
    ceiling = 1e9 * plan.config.budget.total_memory
    backlog: deque[Future[BlendOutcome]] = deque()
    unfinished, used = 0, 0.0
    changed = Condition()

    def finish(task: BlendTask, future: Future[BlendOutcome]) -> None:
        nonlocal unfinished, used
        kept = 0 if future.cancelled() or future.exception() is not None else future.result().nbytes
        with changed:
            unfinished -= 1
            used += kept - task.cost.bytes
            changed.notify()

    def has_room(task: BlendTask) -> bool:
        return not backlog or (unfinished < QUEUE * n_workers and used + task.cost.bytes <= ceiling)

    def may_go_on(task: BlendTask) -> bool:
        return backlog[0].done() or has_room(task)

    def collected() -> BlendOutcome:
        nonlocal used
        outcome = backlog.popleft().result()
        with changed:
            used -= outcome.nbytes
        return outcome

    try:
        for task in tasks:
            while backlog and (backlog[0].done() or not has_room(task)):
                with changed:
                    changed.wait_for(partial(may_go_on, task))
                if backlog[0].done():
                    yield collected()
            with changed:
                unfinished += 1
                used += task.cost.bytes
            backlog.append(pool.submit(fit, task))
            backlog[-1].add_done_callback(partial(finish, task))
        while backlog:
            yield collected()
    finally:
        for future in [future for future in backlog if not future.cancel()]:
            if future.exception() is None:
                keep(future.result())


def collect(plan: TilePlan, outcomes: Iterable[BlendOutcome]) -> Result:
    """Put the outcomes of all blends together.

    Pixels are shared among the sources of a blend as soon as all blends that reach into them are there, so that only
    the models of blends that wait for a neighbour are held.

    Parameters
    ----------
    plan : TilePlan
    outcomes : iterable of BlendOutcome
        One per blend, in the order of the plan. If it ends early, the rest have rows with the reason "interrupted".

    Returns
    -------
    result : Result
        One row per peak, in the order of the peaks.
    """
    begin = start = time.perf_counter()
    coadd = plan.coadd
    # Blend by blend, so that each has a slice of every column.
    order = np.concatenate([np.zeros(0, dtype=np.int64), *(task.members for task in plan.tasks)])
    offsets = np.cumsum([0, *(len(task.members) for task in plan.tasks)]).tolist()
    objects = _in_order(_object_columns(plan), order)
    blends = _blend_columns(plan)
    models: dict[int, Source] = {}
    total = np.zeros(coadd.images.shape, dtype=np.float32)
    shares = np.full((6, plan.n_peaks, coadd.n_bands), np.nan)
    # Blends that cannot be shared yet, by the number of the last one that they wait for.
    waiting: dict[int, list[tuple[BlendTask, slice, SourceModels]]] = {}
    found: list[_Found] = []
    n_done, blend_seconds, seconds = 0, np.full(plan.n_blends, np.nan), time.perf_counter() - start
    for outcome in outcomes:
        start = time.perf_counter()
        task = outcome.task
        assert task is plan.tasks[n_done], "one outcome per blend, in the order of the plan"
        rows = slice(offsets[n_done], offsets[n_done + 1])
        for name, values in outcome.columns.items():
            objects[name][rows] = values
        for name, value in outcome.blend_columns.items():
            blends[name][task.index] = value
        models.update(zip((task.members + 1).tolist(), outcome.scene.sources, strict=True))
        add_positive(total, outcome.claims, task.outer)
        objects[Flag.POOR_MODEL][rows] = objects["chi2"][rows] > POOR_CHI2
        if outcome.candidates:
            found.append(_Found(task.index, outcome.candidates, outcome.candidate_columns))
            objects[Flag.UNRESOLVED_BLEND][rows] = _near_candidates(outcome, rows, objects)

        waiting.setdefault(max(task.last_neighbor, n_done), []).append((task, rows, outcome.models))
        for complete, its_rows, its_models in waiting.pop(n_done, []):
            shares[:, its_rows] = shares_of_blend(coadd, complete.outer, its_models, total)
        n_done += 1
        blend_seconds[task.index] = outcome.seconds
        seconds += time.perf_counter() - start
    start = time.perf_counter()
    for incomplete, rows, its_models in itertools.chain.from_iterable(waiting.values()):
        shares[:, rows] = shares_of_blend(coadd, incomplete.outer, its_models, total)
    objects["reason"][offsets[n_done] :] = Reason.INTERRUPTED.value
    for task in plan.tasks[n_done:]:
        for row, (y, x) in zip(task.members.tolist(), plan.peaks[task.members].tolist(), strict=True):
            models[row + 1] = Source(peak=(y, x), components=())

    found.sort(key=lambda blend: blend.number)
    candidates = _candidate_columns(coadd, found)
    of_candidates = (source for blend in found for source in blend.sources)
    models.update(zip((-candidates["candidate_id"]).tolist(), of_candidates, strict=True))
    objects = _in_order(
        {**objects, **shared_columns(objects, coadd.bands, shares, plan.noise_factors)}, np.argsort(order)
    )
    seconds += time.perf_counter() - start
    return Result(
        objects=partial(catalog.make_objects, objects, coadd.bands, coadd.unit, plan.config.model),
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
        noise_factors=plan.noise_factors,
        wcs=coadd.wcs,
        coadd=coadd,
        footprints=Footprints.of_labels(
            plan.labels, {parent.label: parent.parent_id + 1 for parent in plan.parents if not parent.is_outside}
        ),
        n_peaks=plan.n_peaks,
        timings={
            "plan": plan.seconds,
            "blends": blend_seconds.tolist(),
            "collect": seconds,
            "total": plan.seconds + time.perf_counter() - begin,
        },
        total=total,
    )


def _in_order(columns: Mapping[str, NDArray[Any]], order: NDArray[np.int64]) -> Mapping[str, NDArray[Any]]:
    """Rows of all columns in another order; the same columns if it is the one that they have."""
    if (order[1:] > order[:-1]).all():
        return columns
    return {name: values[order] for name, values in columns.items()}


def _near_candidates(outcome: BlendOutcome, rows: slice, objects: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_]:
    """Whether a candidate of a blend lies within two widths of the PSF of each of its members, (S,)."""
    widths = [gaussian_fwhm(psf) for psf in outcome.task.psfs if psf.any()]
    square = np.zeros((len(outcome.task.members), len(outcome.candidates)))
    for axis in "yx":
        fitted = objects[f"center_{axis}"][rows]
        own = np.where(np.isfinite(fitted), fitted, objects[axis][rows])
        square += np.square(own[:, None] - np.asarray(outcome.candidate_columns[axis]))
    return np.asarray((square < (2.0 * np.mean(widths)) ** 2).any(axis=1))


def shares_of_blend(coadd: Coadd, outer: Box, models: SourceModels, total: NDArray[np.float32]) -> NDArray[np.float64]:
    """Measure what rests on the light of all blends, for the sources of one of them; see `shared_columns`.

    Parameters
    ----------
    coadd : Coadd
    outer : Box
        Pixels that the models of the blend can reach, as array index.
    models : SourceModels
        Its sources as observed, in pixels of `outer`.
    total : ndarray, shape (B, H, W)
        Sum of the positive parts of the models of all blends.

    Returns
    -------
    ndarray, shape (6, S, B)
        What `shared_fluxes` and `observed_metrics` return.
    """
    overlap = observed_metrics(coadd, outer, total, models)
    return np.stack(
        [
            *shared_fluxes(coadd, outer, total, models),
            overlap.max_overlap,
            overlap.overlap_fraction,
            overlap.blendedness,
        ]
    )


def shared_columns(
    objects: Mapping[str, NDArray[Any]],
    bands: Sequence[str],
    shares: NDArray[np.float64],
    factors: NDArray[np.float64],
) -> dict[str, NDArray[Any]]:
    """Make the columns that rest on the light of all blends; NaN in bands where nothing is known.

    Parameters
    ----------
    objects : mapping of str to ndarray, shape (S,)
        Other columns, of whole blends.
    bands : sequence of str
    shares : ndarray, shape (6, S, B)
        From `shares_of_blend`; NaN of objects whose blends are not fitted.
    factors : ndarray, shape (B,)
        `Result.noise_factors`.

    Returns
    -------
    columns : dict of str to ndarray, shape (S,)
    """
    fluxes, errors, correlation = (
        np.array([objects[f"{band}_{name}"] for band in bands]) for name in ("flux", "flux_err", "flux_correlation")
    )
    flux, flux_err, contested, largest, fraction, blendedness = np.moveaxis(shares, 2, 1)
    doubt2 = doubt_of_shares(contested, fluxes, errors, correlation, _correlated_rows(objects))
    known = np.isfinite(errors)
    columns: dict[str, NDArray[Any]] = {}
    for name, values in {
        "redistributed_flux": flux,
        "redistributed_flux_err": np.sqrt(np.square(factors[:, None] * flux_err) + doubt2),
        "observed_max_overlap": largest,
        "observed_overlap_fraction": fraction,
        "observed_blendedness": blendedness,
    }.items():
        for band, of_band in zip(bands, np.where(known, values, np.nan), strict=True):
            columns[f"{band}_{name}"] = of_band
    snr = np.divide(fluxes, errors, out=np.full_like(fluxes, -np.inf), where=errors > 0)
    of_neighbors = fraction[snr.argmax(axis=0), np.arange(fraction.shape[1])]
    total_snr = np.sqrt(np.square(np.where(np.isfinite(snr), snr, 0.0)).sum(axis=0))
    strongest = np.fmax.reduce(np.abs(correlation), axis=0)
    # One that was left without any light has no pixels in which to compare it.
    robbed = (of_neighbors == 0) & (strongest > LEAST_CORRELATION)
    columns[Flag.NEIGHBOR_DOMINATED] = of_neighbors > 1
    columns[Flag.SHREDDED] = ((of_neighbors > 1) | robbed) & (total_snr < LEAST_OWN_SNR)
    columns["preferred_flux"] = _preferred_flux(objects, fluxes)
    return columns


def _correlated_rows(objects: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
    """Which source of the same blend the flux of each is most correlated with, row (S,); -1: none of them."""
    ids, wanted, blends = objects["object_id"], objects["correlated_id"], objects["blend_id"]
    if not len(ids):
        return np.zeros(0, dtype=np.int64)
    order = np.argsort(ids)
    found = order[np.minimum(np.searchsorted(ids[order], wanted), len(ids) - 1)]
    return np.where((ids[found] == wanted) & (blends[found] == blends), found, -1)


def _preferred_flux(objects: Mapping[str, NDArray[Any]], fluxes: NDArray[np.float64]) -> NDArray[np.str_]:
    """Which flux of each object is likely to be the better one; fluxes (B, S) are those of the models."""
    # Pixels that are masked have no share, but a model has light there; templates are shares already.
    whole = ~(objects[Flag.SATURATED] | objects[Flag.MASKED_PEAK])
    shared = whole & (objects["chi2"] > PREFERRED_CHI2) & (objects["model"] != Model.TEMPLATE.value)
    preferred = np.where(shared, PreferredFlux.REDISTRIBUTED.value, PreferredFlux.MODEL.value)
    return np.where(np.isfinite(fluxes).any(axis=0), preferred, "")


class _Found(NamedTuple):
    """Candidates of one blend."""

    number: int
    sources: tuple[Source, ...]
    columns: Mapping[str, ArrayLike]


def _candidate_columns(coadd: Coadd, found: list[_Found]) -> dict[str, NDArray[Any]]:
    """Columns of `candidates`, blend by blend."""
    n_candidates = [len(blend.sources) for blend in found]
    columns = catalog.empty_columns(catalog.candidate_columns(coadd.bands), sum(n_candidates))
    columns["candidate_id"][:] = np.arange(1, sum(n_candidates) + 1)
    start = 0
    for blend, n in zip(found, n_candidates, strict=True):
        rows = slice(start, start + n)
        columns["blend_id"][rows] = blend.number + 1
        for name, values in blend.columns.items():
            columns[name][rows] = values
        start += n
    return columns


def _by_index(plan: TilePlan) -> list[BlendTask]:
    return sorted(plan.tasks, key=lambda task: task.index)


def _object_columns(plan: TilePlan) -> dict[str, NDArray[Any]]:
    """Columns of `objects`, with what is known of the peaks and the blends before any fit."""
    coadd, (y, x) = plan.coadd, plan.peaks.T
    columns = catalog.empty_columns(catalog.object_columns(coadd.bands, plan.config.model), plan.n_peaks)
    columns["object_id"][:] = np.arange(1, plan.n_peaks + 1)
    columns["peak_index"][:] = np.arange(plan.n_peaks)
    columns["y"][:], columns["x"][:] = y + coadd.origin[0], x + coadd.origin[1]
    columns["ra"][:], columns["dec"][:] = coadd.sky(y=columns["y"], x=columns["x"])
    for task in plan.tasks:
        columns["parent_id"][task.members] = task.parent.parent_id + 1
        columns["blend_id"][task.members] = task.index + 1
    _, first, inverse = np.unique(y * coadd.shape[1] + x, return_index=True, return_inverse=True)
    columns[Flag.DUPLICATE_PEAK][:] = first[inverse] != np.arange(plan.n_peaks)
    columns[Flag.MASKED_PEAK][:] = ~coadd.valid[:, y, x].any(axis=0)
    columns[Flag.OUTSIDE_FOOTPRINT][:] = plan.labels[y, x] == 0
    if coadd.mask is not None and coadd.mask_planes:
        for meaning, found in planes_at(coadd, y, x).items():
            columns[catalog.PLANE_FLAGS[meaning]][:] = found
    return columns


def _box_columns(boxes: Sequence[Box], coadd: Coadd) -> dict[str, NDArray[np.int64]]:
    table = box_table(boxes)
    return {
        "y0": table[:, 0] + coadd.origin[0],
        "x0": table[:, 1] + coadd.origin[1],
        "height": table[:, 2],
        "width": table[:, 3],
    }


def _parent_columns(plan: TilePlan) -> dict[str, NDArray[np.int64]]:
    parents = plan.parents
    n_blends = np.bincount([task.parent.parent_id for task in plan.tasks], minlength=len(parents))
    return {
        "parent_id": np.arange(1, len(parents) + 1),
        **_box_columns([parent.box for parent in parents], plan.coadd),
        "n_peaks": np.array([len(parent.peaks) for parent in parents], dtype=np.int64),
        "n_blends": n_blends.astype(np.int64),
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
        "n_neighbors": np.array([len(task.neighbors) for task in tasks], dtype=np.int64),
    }


def deblend(
    coadd: Coadd,
    peaks: ArrayLike | Literal["detect"] | Any = None,
    footprints: ArrayLike | None = None,
    config: Config | None = None,
    workers: int | None = None,
    *,
    checkpoint: str | PathLike[str] | None = None,
    watch: Watch | None = None,
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
    checkpoint : path, optional
        Directory in which finished blends are kept while the work goes on, and which is removed at its end. If it is
        there from a run of the same coadd and settings that was stopped, its blends are not fitted again; the answer
        is the same to the bit.

    watch : callable, optional
        ``watch(plan, outcomes)`` is given what will be done, and an iterator of what became of each blend, and returns
        what it wants collected: all of it, for example after showing how far the work is, or only the first part to
        stop early.

    Returns
    -------
    result : Result
        One row per peak, whatever happened to it: `outcome` says how it was modelled and `reason` why not as
        configured. Sources without a valid pixel have NaN fluxes, as have bands without one.

    Raises
    ------
    InputError
        If peaks, footprints or workers cannot be used.
    FileError
        If the checkpoint belongs to another run, or cannot be written.

    Examples
    --------
    >>> from kermes.simulation import simulate_scene
    >>> scene = simulate_scene(n_sources=3, shape=(60, 60), seed=1)
    >>> result = deblend(scene.coadd, peaks=scene.peaks)
    >>> len(result.objects) == len(scene.peaks)
    True
    """
    plan = plan_tile(coadd, peaks, footprints, config, workers)
    folder = None if checkpoint is None else Path(checkpoint)
    result = _run(plan, workers, folder, watch)
    if not plan.config.add_sources or len(result.candidates) == 0 or not result.is_complete:
        return result
    plan = plan_tile(coadd, _with_candidates(plan, result), footprints, config, workers)
    return _run(plan, workers, None if folder is None else folder.with_name(f"{folder.name}-2"), watch)


def _run(plan: TilePlan, workers: int | None, folder: Path | None, watch: Watch | None) -> Result:
    """Do what is planned; the checkpoint stays, with all that is finished, if it was not done to the end."""
    checkpoint = None if folder is None else Checkpoint(folder, plan)
    try:
        with closing(fit_blends(plan, workers, checkpoint)) as outcomes:
            result = collect(plan, outcomes if watch is None else watch(plan, outcomes))
    except BaseException:
        if checkpoint is not None:
            checkpoint.flush()
        raise
    if checkpoint is not None:
        if result.is_complete:
            checkpoint.remove()
        else:
            checkpoint.flush()
    return result


def _with_candidates(plan: TilePlan, result: Result) -> NDArray[np.int64]:
    """Peaks of a second run (N, 2), in which candidates are objects too, in the coadd's coordinates."""
    origin = np.array(plan.coadd.origin)
    found = np.stack([result.candidates["y"], result.candidates["x"]], axis=1) - origin
    found = np.clip(np.floor(found + 0.5).astype(np.int64), 0, np.array(plan.coadd.shape) - 1)
    return np.asarray(np.concatenate([plan.peaks, found]) + origin)
