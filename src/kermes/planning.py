"""What will be done with one coadd: which blends there are, on which pixels, in which order, and what each may cost."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kermes.catalog import Outcome
from kermes.coadd import Coadd, label_image, normalize_peaks, psf_of_box
from kermes.config import Config
from kermes.detection import detect, footprints_of_peaks
from kermes.errors import InputError
from kermes.geometry import Box
from kermes.measurement import heeded_factors, noise_factors
from kermes.partition import (
    Parent,
    Part,
    divide,
    in_order,
    is_large,
    join_close,
    measure_lights,
    nearest_peaks,
    partition,
    peak_snr,
)
from kermes.profile_fitting import ModeBank
from kermes.psf import MODEL_PSF_SIGMAS, amplify, continued, difference_kernels, model_psf, widest_sigma
from kermes.rendering import KernelSet, outer_box

logger = logging.getLogger(__name__)

DoubleArray = NDArray[np.float64]
LabelArray = NDArray[np.int64]

MARGIN = 6
"""Pixels of background around a footprint that are fitted too, so that the wings of the models are held down."""

PROFILE_MARGIN = 12
"""The same where the wings of profiles reach farther."""

FARTHEST_MARGIN = 256
"""Largest margin around the peaks of a part of a parent [pixels]."""

LINK = 12.0
"""Footprints that come closer than this [pixels] are fitted together with the model "kermes"."""

LARGE = 0.05
"""Blends that take more than this part of the work are done first."""


def rungs(model: str) -> tuple[Outcome, ...]:
    """Give what is tried for a `Config.model`, one after the other, until one works."""
    if model == "templates":
        return (Outcome.FULL, Outcome.PEAK)
    return (Outcome.FULL, Outcome.SINGLE, Outcome.POINT, Outcome.TEMPLATE, Outcome.PEAK)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What the fit of a blend is predicted to need."""

    operations: float
    """Floating-point operations."""

    bytes: float
    """Memory."""


def predict_cost(n_bands: int, area: int, n_sources: int, rung: Outcome, model: str = "kermes") -> Cost:
    """Predict what a blend needs from its pixels, bands and sources.

    The numbers are those of large blends with the model "kermes", to a factor of two: images, weights, residuals and
    rendered models for every pixel and band, a stamp for every source. Decisions rest on this and never on the clock.
    """
    if rung is Outcome.FULL and model == "templates":
        rung = Outcome.TEMPLATE
    share = {
        Outcome.FULL: 1.0,
        Outcome.SINGLE: 0.4,
        Outcome.POINT: 0.15,
        Outcome.TEMPLATE: 0.05,
        Outcome.PEAK: 0.01,
    }[rung]
    return Cost(
        operations=n_bands * (2e2 * area + 1.5e6 * n_sources) * share,
        bytes=n_bands * (4.0 * 12 * area + 4.0 * 4000 * n_sources),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlendTask:
    """One blend that is to be fitted."""

    index: int
    """Number of the blend, counted from 0."""

    parent: Parent
    """Footprint it belongs to."""

    members: LabelArray
    """Rows of its sources in the list of peaks, shape (S,), in the order of their positions."""

    neighbors: LabelArray
    """Rows of sources of other blends of its parent that are fitted along but reported there, shape (T,)."""

    divided: bool
    """Whether the parent has other blends too, so that only the pixels nearest to its sources are used."""

    level: int
    """Blends of a lower level are fitted before, and their light is held fixed."""

    rung: Outcome
    """The best model within the budget."""

    cost: Cost
    """What that is predicted to need."""

    box: Box
    """Pixels to fit, array index of the coadd."""

    outer: Box
    """Pixels that its models can reach, array index of the coadd."""

    psfs: DoubleArray
    """PSF of each band, shape (B, P, Q); zero in a band that cannot be used."""

    kernels: KernelSet
    """Difference kernels; zero likewise."""

    bank: ModeBank | None
    """Fourier modes of profiles; None: none are fitted."""

    last_neighbor: int
    """Place in the plan of the last blend whose models can reach `outer`, itself included."""

    @property
    def rows(self) -> LabelArray:
        """Rows of all sources that are fitted, members first."""
        return np.concatenate([self.members, self.neighbors])


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

    noise_factors: DoubleArray
    """How much more noise a sum over the PSF has than if pixels were independent, shape (B,)."""

    heeded_factors: DoubleArray
    """As much of that as fits heed, shape (B,)."""

    parents: tuple[Parent, ...]
    """Footprints, or groups of close ones, in the order of their first peaks."""

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


def number_of_workers(workers: int | None) -> int:
    """Check a number of workers; None is one.

    Raises
    ------
    InputError
        If it is not a whole number of at least 1.
    """
    if workers is None:
        return 1
    if not isinstance(workers, int | np.integer) or workers < 1:
        raise InputError(f"workers must be a whole number, at least 1, got {workers!r}")
    return int(workers)


@cache
def _default_config() -> Config:
    """Make the default settings once: checking them all takes a fiftieth of the time of a pair of galaxies."""
    return Config()


def plan_tile(
    coadd: Coadd,
    peaks: Any = None,
    footprints: ArrayLike | None = None,
    config: Config | None = None,
    workers: int | None = None,
) -> TilePlan:
    """Decide which peaks are fitted together on which pixels, and in which order.

    Parameters and errors are those of `deblend`; `workers` is the number of threads that look for peaks and footprints.
    """
    start = time.perf_counter()
    workers = number_of_workers(workers)
    config = _default_config() if config is None else config
    if not isinstance(config, Config):
        raise InputError(f"config must be a kermes.Config, got {type(config).__name__}")
    positions, labels, given = _peaks_and_footprints(coadd, peaks, footprints, config, workers)
    image_box = Box.of_shape(coadd.shape)
    profiles = config.model == "kermes"
    if profiles and not given:
        labels = join_close(labels, LINK)
    parents = partition(labels, positions, coadd.shape).parents
    margin = PROFILE_MARGIN if profiles else MARGIN
    owners, parts, levels = _divide(coadd, parents, positions, labels, config)
    boxes = [_box(parent, part, positions, margin) & image_box for parent, part in zip(owners, parts, strict=True)]
    config = _with_model_psf(config, coadd, boxes)
    psfs = _psfs_of_blends(coadd, boxes, config)
    outers = [outer_box(box, psf, image_box) for box, (psf, _, _) in zip(boxes, psfs, strict=True)]
    rungs, costs = [], []
    for outer, part in zip(outers, parts, strict=True):
        rung, cost = _affordable(coadd.n_bands, outer.area, len(part.members) + len(part.neighbors), config)
        rungs.append(rung)
        costs.append(cost)

    # What decides about the order is the same for peaks in any order.
    operations = [cost.operations for cost in costs]
    first = [positions[part.members[0]].tolist() for part in parts]
    limit = LARGE * sum(operations)
    order = sorted(
        range(len(boxes)),
        key=lambda k: (levels[k], -operations[k] if operations[k] > limit else 0, *boxes[k].origin, *first[k]),
    )
    latest = np.zeros(coadd.shape, dtype=np.int32)
    for place, k in enumerate(order):
        latest[outers[k].y, outers[k].x] = place
    tasks = tuple(
        BlendTask(
            index=k,
            parent=owners[k],
            members=parts[k].members,
            neighbors=parts[k].neighbors,
            divided=parts[k].reach > 0,
            level=levels[k],
            rung=rungs[k],
            cost=costs[k],
            box=boxes[k],
            outer=outers[k],
            psfs=psfs[k][0],
            kernels=psfs[k][1],
            bank=psfs[k][2],
            last_neighbor=int(latest[outers[k].y, outers[k].x].max()),
        )
        for k in order
    )
    # Outside of footprints that were given there may be anything.
    factors = _noise_factors(coadd, None if given else labels, [psf for psf, _, _ in psfs], config)
    return TilePlan(
        coadd=coadd,
        config=config,
        peaks=positions,
        labels=labels,
        background=not given,
        noise_factors=factors,
        heeded_factors=heeded_factors(factors),
        parents=parents,
        tasks=tasks,
        seconds=time.perf_counter() - start,
    )


def _noise_factors(coadd: Coadd, labels: LabelArray | None, psfs: list[DoubleArray], config: Config) -> DoubleArray:
    """Give the factors of the noise that come with the images, or measure them if that is wanted.

    labels: zero in pixels without a source; None: not known. psfs: those of the blends; there may be none in the middle
    of the image.
    """
    if coadd.noise_factors is not None:
        return coadd.noise_factors
    if not config.correlated_noise or labels is None or not psfs:
        return np.ones(coadd.n_bands)
    middle = psf_of_box(coadd, Box.of_shape(coadd.shape))
    return noise_factors(coadd, labels, next((psf for psf in (middle, *psfs) if psf.any()), middle))


def _affordable(n_bands: int, area: int, n_sources: int, config: Config) -> tuple[Outcome, Cost]:
    """Choose the best model whose predicted cost keeps within the budget; the simplest if none does."""
    budget = config.budget
    for rung in rungs(config.model):
        cost = predict_cost(n_bands, area, n_sources, rung, config.model)
        if cost.operations <= budget.operations and cost.bytes <= 1e9 * budget.memory:
            break
    return rung, cost


def _divide(
    coadd: Coadd, parents: Sequence[Parent], peaks: LabelArray, labels: LabelArray, config: Config
) -> tuple[list[Parent], list[Part], list[int]]:
    """Divide large parents; returns the parent of each blend, its sources, and its level.

    Templates cost what their own pixels do and see no light beyond the footprint: with them parents stay whole.
    """
    rows = [in_order(parent.peaks, peaks) for parent in parents]
    if config.model == "templates":
        return list(parents), [Part.whole(own) for own in rows], [0] * len(parents)
    settings = config.partition
    large = [is_large(peaks[own], settings) for own in rows]
    if not any(large) and (len(parents) < 2 or settings.bright_snr == 0):
        return list(parents), [Part.whole(own) for own in rows], [0] * len(parents)
    boxes = [Box.of_shape(coadd.shape), *(parent.box for parent in parents)]
    psfs = next((psf for psf in (psf_of_box(coadd, box) for box in boxes) if psf.any()), np.zeros((1, 1, 1)))
    snr = peak_snr(coadd, peaks, psfs) if psfs.any() else np.zeros(len(peaks))
    owners: list[Parent] = []
    parts: list[Part] = []
    for parent, own, divisible in zip(parents, rows, large, strict=True):
        pieces: tuple[Part, ...] = (Part.whole(own),)
        if divisible:
            lights = measure_lights(coadd, labels, parent, peaks[own], snr[own], psfs, level=config.detection.threshold)
            pieces = divide(own, peaks, lights, settings)
            snr[own] = lights.snr
        owners += [parent] * len(pieces)
        parts += pieces
    level = np.zeros(len(peaks), dtype=np.int64)
    if settings.bright_snr > 0:
        level = 2 - (snr >= settings.bright_snr).astype(np.int64) - (snr >= 10 * settings.bright_snr)
    levels = [int(level[part.members].min()) for part in parts]
    level_of = np.zeros(len(peaks), dtype=np.int64)
    for part, own_level in zip(parts, levels, strict=True):
        level_of[part.members] = own_level
    # Neighbours that are fitted before are not fitted along: their light is known.
    parts = [
        replace(part, neighbors=part.neighbors[level_of[part.neighbors] >= own_level])
        for part, own_level in zip(parts, levels, strict=True)
    ]
    return owners, parts, levels


def _box(parent: Parent, part: Part, peaks: LabelArray, margin: int) -> Box:
    """Pixels to fit."""
    whole = parent.box.grow(margin)
    if part.reach == 0:
        return whole
    rows = np.concatenate([part.members, part.neighbors])
    return Box.around(peaks[rows]).grow(int(np.clip(np.ceil(part.reach), margin, FARTHEST_MARGIN))) & whole


def _peaks_and_footprints(
    coadd: Coadd, peaks: Any, footprints: ArrayLike | None, config: Config, workers: int
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
            return positions, footprints_of_peaks(coadd, positions, config.detection, workers), False
        return positions, labels, True
    detection = detect(coadd, config.detection, workers)
    if labels is None:
        return detection.peaks, detection.footprints, False
    return detection.peaks[labels[detection.peaks[:, 0], detection.peaks[:, 1]] > 0], labels, True


def _with_model_psf(config: Config, coadd: Coadd, boxes: list[Box]) -> Config:
    """Choose the width of the model PSF if that is left to us."""
    if config.model_psf_sigma > 0:
        return config
    psfs = {psf.tobytes(): psf for psf in (psf_of_box(coadd, box) for box in boxes)}
    sigma = min((widest_sigma(psf) for psf in psfs.values()), default=MODEL_PSF_SIGMAS[0])
    return replace(config, model_psf_sigma=sigma)


def _psfs_of_blends(
    coadd: Coadd, boxes: list[Box], config: Config
) -> list[tuple[DoubleArray, KernelSet, ModeBank | None]]:
    """PSFs and difference kernels at the centre of each box; equal PSFs are one array.

    Bands without a PSF there, or with one narrower than that of the model frame, are zero.
    """
    known: dict[bytes, tuple[DoubleArray, KernelSet, ModeBank | None, NDArray[np.bool_]]] = {}
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


@lru_cache(maxsize=1)
def _prepare_psfs(
    content: bytes, shape: tuple[int, int, int], sigma: float, regularization: float, model: str
) -> tuple[DoubleArray, KernelSet, ModeBank | None, NDArray[np.bool_]]:
    """PSFs, difference kernels, Fourier modes, and which bands are too narrow for the model frame.

    Many coadds have the PSFs of the one before; what was transformed for them is kept.
    """
    # A copy, because kernels would be compiled a second time for an array that cannot be written to.
    psfs = np.frombuffer(content, dtype=np.float64).reshape(shape).copy()
    if model == "scarlet-lite":
        kernels, narrow = _usable_kernels(psfs, sigma, regularization)
        psfs = np.where(narrow[:, None, None], 0.0, psfs)
        return psfs, KernelSet(kernels, lambda: continued(psfs)), None, narrow
    # Profiles are seen through the PSF itself, templates as they are; only free shapes need the model frame.
    wide = continued(psfs)
    kernel_set = KernelSet(lambda: _usable_kernels(psfs, sigma, regularization)[0], wide)
    return psfs, kernel_set, ModeBank(wide), np.zeros(len(psfs), dtype=bool)


def _usable_kernels(psfs: DoubleArray, sigma: float, regularization: float) -> tuple[DoubleArray, NDArray[np.bool_]]:
    """Difference kernels (B, P, Q), zero in bands that are too narrow for the model frame, and which are (B,)."""
    kernels = difference_kernels(psfs, model_psf(sigma), regularization)
    narrow = amplify(kernels)
    return np.where(narrow[:, None, None], 0.0, kernels), narrow


def usable_pixels(plan: TilePlan, task: BlendTask) -> NDArray[np.bool_]:
    """Find the pixels of `task.box` that may be fitted, shape (h, w).

    Those of the footprint, and the background where that is allowed; of a parent that was divided, only
    those that are nearer to a source of the blend than to any other of the parent.
    """
    return _pixels(plan, task, background=plan.background)


def footprint_pixels(plan: TilePlan, task: BlendTask) -> NDArray[np.bool_]:
    """Find the pixels of `task.outer` that belong to the footprint, shape (h, w), as in `usable_pixels`."""
    usable = np.zeros(task.outer.shape, dtype=bool)
    usable[task.box.within(task.outer)] = _pixels(plan, task, background=False)
    return usable


def _pixels(plan: TilePlan, task: BlendTask, background: bool) -> NDArray[np.bool_]:
    labels = plan.labels[task.box.y, task.box.x]
    own = (labels == task.parent.label) & (labels > 0)
    if background:
        own |= labels == 0
    if task.divided:
        own &= _nearest_is_fitted(plan, task)
    return np.asarray(own)


def _nearest_is_fitted(plan: TilePlan, task: BlendTask) -> NDArray[np.bool_]:
    """Whether the source of the parent that is nearest to a pixel of the box is fitted in this blend."""
    rows = task.parent.peaks
    y, x = plan.peaks[rows].T
    around = task.box.grow(FARTHEST_MARGIN)
    rows = rows[(y >= around.y0) & (y < around.y1) & (x >= around.x0) & (x < around.x1)]
    fitted = np.isin(rows, task.rows)
    return np.asarray(fitted[nearest_peaks(plan.peaks[rows], task.box)])
