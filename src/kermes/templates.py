"""The single-band deblender: one symmetric template per peak, and the observed flux shared among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kermes.coadd import Blend
from kermes.config import TemplatesConfig
from kermes.errors import InputError, ShapeError
from kermes.flux import STRAY_RULES, takes_stray
from kermes.geometry import Box
from kermes.kernels import flux as kernels_flux
from kermes.kernels import spectra as kernels_spectra
from kermes.kernels import templates as kernels
from kermes.measurement import point_fluxes
from kermes.psf import gaussian_fwhm
from kermes.rendering import SourceModels

BoolArray = NDArray[np.bool_]
DoubleArray = NDArray[np.float64]
FloatArray = NDArray[np.float32]
LabelArray = NDArray[np.int64]

DECISIONS: Mapping[str, int] = {
    "deblended_as_psf": kernels.POINT,
    "psf_moved": kernels.DECENTERED,
    "psf_big_decenter": kernels.BIG_DECENTER,
    "psf_bad_dof": kernels.BAD_DOF,
    "out_of_bounds": kernels.OUT_OF_BOUNDS,
    "tiny_footprint": kernels.TINY_FOOTPRINT,
    "no_valid_pixels": kernels.NO_VALID_PIXELS,
    "failed_symmetric_template": kernels.FAILED_SYMMETRIC,
    "ramped_template": kernels.RAMPED,
    "patched_template": kernels.PATCHED,
    "degenerate": kernels.DEGENERATE,
    "no_template": kernels.NO_LIGHT,
}
"""What can be decided about a peak, and its bit in `Templates.flags`."""


MAX_SWEEPS = 100
SWEEP_TOLERANCE = 1e-2
"""Amplitudes are settled when none moves by more than this part of its error, or after so many sweeps."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Templates:
    """Templates of the peaks of one footprint in one image, in pixels of that image."""

    boxes: LabelArray
    """Box (y0, x0, height, width) of each, shape (K, 4); the last two are 0 for one without light."""

    offsets: LabelArray
    """Template k has the pixels offsets[k]:offsets[k + 1], shape (K + 1,)."""

    pixels: FloatArray
    """Pixels of all templates, one after the other, row by row [unit]; not negative."""

    flags: LabelArray
    """Bits of `DECISIONS`, shape (K,)."""

    fits: DoubleArray
    """What the test for point sources found, shape (K, 12), see `kernels.templates.N_FIT`; NaN if it was not done."""

    amplitudes: DoubleArray
    """Flux that each stands for, shape (K,): of a point source all of it, of others that of the pixels [unit]."""

    def __len__(self) -> int:
        return len(self.boxes)

    def template(self, k: int) -> tuple[FloatArray, Box]:
        """Pixels of one template, and their box."""
        box = Box(*self.boxes[k].tolist())
        return self.pixels[self.offsets[k] : self.offsets[k + 1]].reshape(box.shape), box

    def decided(self, name: str) -> BoolArray:
        """Whether something of `DECISIONS` holds for each peak, shape (K,)."""
        return np.asarray((self.flags & DECISIONS[name]) != 0)

    @property
    def has_light(self) -> BoolArray:
        """Whether each peak has a template, shape (K,)."""
        return np.diff(self.offsets) > 0

    def scaled(self, factors: DoubleArray) -> Templates:
        """Multiply each template by a factor, shape (K,)."""
        scale = np.repeat(factors, np.diff(self.offsets)).astype(np.float32)
        return replace(self, pixels=self.pixels * scale, amplitudes=self.amplitudes * factors)

    def without(self, dropped: BoolArray) -> Templates:
        """Leave the templates of some peaks (K,) out: they keep their places, without light."""
        keeps = np.repeat(~dropped, np.diff(self.offsets))
        boxes = self.boxes.copy()
        boxes[dropped, 2:] = 0
        return replace(
            self,
            boxes=boxes,
            offsets=np.concatenate([[0], np.cumsum(boxes[:, 2] * boxes[:, 3])]),
            pixels=self.pixels[keeps],
            amplitudes=np.where(dropped, 0.0, self.amplitudes),
        )

    def among(self, rows: LabelArray, n_peaks: int) -> Templates:
        """Give the templates places (K,), ascending, among more peaks, which have none."""
        boxes = np.zeros((n_peaks, 4), dtype=np.int64)
        boxes[rows] = self.boxes
        flags = np.full(n_peaks, kernels.NO_LIGHT, dtype=np.int64)
        flags[rows] = self.flags
        fits = np.full((n_peaks, kernels.N_FIT), np.nan)
        fits[rows] = self.fits
        amplitudes = np.zeros(n_peaks)
        amplitudes[rows] = self.amplitudes
        offsets = np.concatenate([[0], np.cumsum(boxes[:, 2] * boxes[:, 3])])
        return replace(self, boxes=boxes, offsets=offsets, flags=flags, fits=fits, amplitudes=amplitudes)

    def with_points(
        self, psf: DoubleArray, amplitudes: DoubleArray, peaks: LabelArray, shape: tuple[int, int]
    ) -> Templates:
        """Give each peak (K, 2) with a positive amplitude a point source as its template, as far as the image goes."""
        boxes, pixels = self.boxes.copy(), []
        frame, stamp = Box.of_shape(shape), Box.of_shape(psf.shape)
        for k, amplitude in enumerate(amplitudes.tolist()):
            template = self.pixels[self.offsets[k] : self.offsets[k + 1]]
            if amplitude > 0:
                dy, dx = np.nan_to_num(self.fits[k, 1:3]).tolist()
                own = stamp.shift(peaks[k, 0] - stamp.height // 2, peaks[k, 1] - stamp.width // 2)
                box = own & frame
                shifted = kernels.shift_stamp(psf, dy, dx) if dy or dx else psf
                template = (amplitude * np.maximum(shifted[frame.within(own)], 0.0)).astype(np.float32).ravel()
                boxes[k] = (*box.origin, *box.shape) if not box.is_empty else (*peaks[k].tolist(), 0, 0)
            pixels.append(template)
        return replace(
            self,
            boxes=boxes,
            offsets=np.concatenate([[0], np.cumsum(boxes[:, 2] * boxes[:, 3])]),
            pixels=np.concatenate([np.zeros(0, dtype=np.float32), *pixels]),
            amplitudes=np.where(amplitudes > 0, amplitudes, self.amplitudes),
        )

    def total(self, shape: tuple[int, int]) -> FloatArray:
        """Sum of the positive parts of all templates on an image of some shape."""
        total = np.zeros((1, *shape), dtype=np.float32)
        kernels_flux.add_positive_models(total, self.pixels[None], self.boxes, self.offsets)
        return np.asarray(total[0])


@dataclass(frozen=True, eq=False)
class Children:
    """The light of one footprint in one image, shared among its peaks.

    In every valid pixel the children and what is unassigned add up to the image.
    """

    templates: Templates
    """What it was shared by."""

    image: FloatArray
    """Observed flux per pixel [unit], shape (H, W); zero where not valid."""

    variance: FloatArray
    """Its variance [unit^2], shape (H, W); zero where not valid."""

    stray_places: LabelArray
    """Positive pixels (y, x) of the footprint that no template reaches and that were given to somebody, (M, 2)."""

    stray_starts: LabelArray
    """Pixel m was given away in the parts stray_starts[m]:stray_starts[m + 1], shape (M + 1,)."""

    stray_owners: LabelArray
    """Peak that gets each part, shape (E,)."""

    stray_parts: FloatArray
    """Flux of each part [unit], shape (E,)."""

    scale_variance: bool = True
    """Whether the variance of a pixel of a child is that of its share."""

    @cached_property
    def total(self) -> FloatArray:
        """Sum of the positive parts of all templates, shape (H, W)."""
        return self.templates.total((self.image.shape[0], self.image.shape[1]))

    @cached_property
    def _stray_variance(self) -> DoubleArray:
        """Variance of each stray part, shape (E,)."""
        n_parts = np.diff(self.stray_starts)
        at = tuple(np.repeat(self.stray_places, n_parts, axis=0).T)
        if not self.scale_variance:
            return np.asarray(self.variance[at], dtype=np.float64)
        return np.asarray(self.variance[at] * (self.stray_parts / self.image[at]).astype(np.float64) ** 2)

    @cached_property
    def _shares(self) -> tuple[DoubleArray, DoubleArray]:
        """Flux of each child without stray flux, and its variance, each (K,)."""
        of = self.templates
        flux, variance, _ = kernels_flux.share_fluxes(
            self.image[None],
            self.variance[None],
            np.ones((1, *self.image.shape), dtype=np.bool_),
            self.total[None],
            of.pixels[None],
            of.boxes,
            of.offsets,
            0.0,
        )
        if self.scale_variance:
            return flux[:, 0], variance[:, 0]
        own = np.zeros(len(of))
        for k in range(len(of)):
            template, box = of.template(k)
            own[k] = self.variance[box.y, box.x][template > 0].sum(dtype=np.float64)
        return flux[:, 0], own

    @property
    def stray_flux(self) -> DoubleArray:
        """Stray flux that each child gets [unit], shape (K,)."""
        return np.bincount(self.stray_owners, self.stray_parts, len(self.templates)).astype(np.float64)

    @property
    def has_stray_flux(self) -> BoolArray:
        """Whether each child gets stray flux, shape (K,)."""
        return np.bincount(self.stray_owners, minlength=len(self.templates)) > 0

    @property
    def flux(self) -> DoubleArray:
        """Flux of each child, stray flux included [unit], shape (K,)."""
        return self._shares[0] + self.stray_flux

    @property
    def flux_err(self) -> DoubleArray:
        """Its standard deviation from the variance of the pixels [unit], shape (K,)."""
        stray = np.bincount(self.stray_owners, self._stray_variance, len(self.templates))
        return np.asarray(np.sqrt(self._shares[1] + stray))

    def _stray_of(self, k: int) -> tuple[LabelArray, NDArray[np.intp]]:
        """Stray pixels (n, 2) of one child, and which parts they are."""
        parts = np.flatnonzero(self.stray_owners == k)
        rows = np.searchsorted(self.stray_starts, parts, side="right") - 1
        return self.stray_places[rows], parts

    def _share(self, k: int) -> tuple[FloatArray, Box]:
        """Share that one child has of the pixels of its template, and their box."""
        template, box = self.templates.template(k)
        share = np.zeros(box.shape, dtype=np.float32)
        np.divide(template, self.total[box.y, box.x], out=share, where=template > 0)
        return share, box

    def _with_stray(self, k: int, pixels: FloatArray, box: Box, of_stray: NDArray[Any]) -> tuple[FloatArray, Box]:
        """Add the stray parts of one child to its other pixels."""
        places, parts = self._stray_of(k)
        whole = box | Box.around(places)
        child = np.zeros(whole.shape, dtype=np.float32)
        child[box.within(whole)] = pixels
        child[tuple((places - whole.origin).T)] = of_stray[parts]
        return child, whole

    def child(self, k: int) -> tuple[FloatArray, Box]:
        """Observed flux per pixel that belongs to one peak [unit], stray flux included, and its box."""
        share, box = self._share(k)
        return self._with_stray(k, self.image[box.y, box.x] * share, box, self.stray_parts)

    def child_variance(self, k: int) -> tuple[FloatArray, Box]:
        """Variance of the pixels of `child` [unit^2], and its box; zero in pixels it has no part of."""
        share, box = self._share(k)
        factor = share**2 if self.scale_variance else share > 0
        return self._with_stray(k, self.variance[box.y, box.x] * factor, box, self._stray_variance)

    def unassigned(self) -> FloatArray:
        """Flux per pixel that no child got [unit], shape (H, W)."""
        left = np.where(self.total > 0, np.float32(0.0), self.image)
        left[tuple(self.stray_places.T)] = 0.0
        return left


MINIMUM_ERROR = float(np.sqrt(1 - 1 / np.pi))
"""Standard deviation of the smaller one of two numbers with an error of one."""

MEDIAN_ERROR = float(np.sqrt(np.pi / 2))
"""Standard deviation of a median over that of a mean."""


def _settings(config: TemplatesConfig, sigma: float) -> kernels.Settings:
    least = 0.0
    if config.unbiased:
        # Where it is below its own error a template is noise, half of it positive: it would choose positive pixels.
        smooth = MEDIAN_ERROR / (2 * config.median_half + 1) if config.median_half else 1.0
        least = MINIMUM_ERROR * smooth * sigma
    return kernels.Settings(
        find_points=config.find_points,
        chi2_fixed=float(config.point_chi2),
        chi2_derivatives=float(config.point_chi2_derivatives),
        chi2_moved=float(config.point_chi2_moved),
        moves=config.point_moves,
        tiny=config.tiny_footprint,
        unbiased=config.unbiased,
        least=least,
        edges={"clip": kernels.CLIP, "ramp": kernels.RAMP, "patch": kernels.PATCH}[config.edges],
        median_half=config.median_half,
        monotonic=config.monotonic,
    )


def make_templates(
    image: FloatArray,
    variance: FloatArray,
    valid: BoolArray,
    footprint: BoolArray,
    peaks: LabelArray,
    psf: DoubleArray,
    config: TemplatesConfig,
    edge: BoolArray | None = None,
) -> Templates:
    """Make a template for every peak of a footprint.

    Parameters
    ----------
    image, variance : ndarray, shape (H, W)
        Flux per pixel and its variance, float32, finite.
    valid : ndarray, shape (H, W)
        True where the pixel may be used.
    footprint : ndarray, shape (H, W)
        True where the pixel belongs to the parent.
    peaks : ndarray, shape (K, 2)
        Array index (y, x).
    psf : ndarray, shape (P, Q)
        Odd sides, sums to one.
    config : TemplatesConfig
    edge : ndarray, shape (H, W), optional
        Pixels at the edge of the data, for ``edges="patch"``; None: the outermost ones.

    Returns
    -------
    templates : Templates

    Notes
    -----
    The steps of the SDSS deblender (Lupton 2001) as the LSST one has them (Bosch et al. 2018, section 4.5); see
    `docs/templates`. Each template is made on a box that grows until it ends inside.
    """
    if edge is None:
        edge = np.ones(image.shape, dtype=np.bool_)
        edge[1:-1, 1:-1] = False
    inside = Box.where(footprint)
    usable = valid & footprint
    fits = np.full((len(peaks), kernels.N_FIT), np.nan)
    if not usable.any():
        return Templates(
            boxes=np.zeros((len(peaks), 4), dtype=np.int64),
            offsets=np.zeros(len(peaks) + 1, dtype=np.int64),
            pixels=np.zeros(0, dtype=np.float32),
            flags=np.full(len(peaks), kernels.NO_VALID_PIXELS | kernels.NO_LIGHT, dtype=np.int64),
            fits=fits,
            amplitudes=np.zeros(len(peaks)),
        )
    sigma = float(np.sqrt(np.median(variance[usable])))
    boxes, offsets, pixels, flags = kernels.build_templates(
        np.ascontiguousarray(image, dtype=np.float32),
        np.ascontiguousarray(variance, dtype=np.float32),
        np.ascontiguousarray(valid),
        np.ascontiguousarray(footprint),
        np.ascontiguousarray(edge),
        np.array([inside.y0, inside.y1, inside.x0, inside.x1], dtype=np.int64),
        np.ascontiguousarray(peaks, dtype=np.int64),
        np.ascontiguousarray(psf, dtype=np.float64),
        gaussian_fwhm(psf),
        sigma,
        _settings(config, sigma),
        fits,
    )
    sums = np.add.reduceat(np.append(pixels, np.float32(0)), offsets[:-1], dtype=np.float64)
    amplitudes = np.where(flags & kernels.POINT, fits[:, 0], sums)
    amplitudes[np.diff(offsets) == 0] = 0.0
    return Templates(boxes=boxes, offsets=offsets, pixels=pixels, flags=flags, fits=fits, amplitudes=amplitudes)


def template_weights(templates: Templates, image: FloatArray, footprint: BoolArray) -> DoubleArray:
    """Fit the sum of all templates to an image, each times a number.

    Parameters
    ----------
    templates : Templates
    image : ndarray, shape (H, W)
        Taken as zero outside of the footprint.
    footprint : ndarray, shape (H, W)

    Returns
    -------
    weights : ndarray, shape (K,)
        Of the smallest norm if there is a choice; may be negative; 0 for a peak without template.

    Notes
    -----
    Plain least squares, all pixels alike, by LSMR (Fong & Saunders 2011).
    """
    from scipy.sparse import csc_array
    from scipy.sparse.linalg import lsmr

    width = image.shape[1]
    rows = np.empty(len(templates.pixels), dtype=np.int64)
    for k in range(len(templates)):
        y0, x0, height, side = templates.boxes[k].tolist()
        places = (y0 + np.arange(height))[:, None] * width + x0 + np.arange(side)
        rows[templates.offsets[k] : templates.offsets[k + 1]] = places.ravel()
    norms = np.sqrt(np.add.reduceat(np.append(templates.pixels.astype(np.float64) ** 2, 0.0), templates.offsets[:-1]))
    norms[~templates.has_light] = 0.0
    scale = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    columns = templates.pixels * np.repeat(scale, np.diff(templates.offsets))
    matrix = csc_array((columns, rows, templates.offsets), shape=(image.size, len(templates)))
    data = np.where(footprint, image, 0.0).astype(np.float64).ravel()
    return np.asarray(lsmr(matrix, data, atol=1e-9, btol=1e-9, maxiter=10 * len(templates) + 100)[0] * scale)


def _most_similar(templates: Templates, dropped: BoolArray, least: float) -> int | None:
    """Find the first peak, as they are ordered, that is like an earlier one, and say which of both to drop."""
    pairs, ratios = kernels.similar_pairs(templates.boxes, templates.offsets, templates.pixels, float(least))
    keep = ~dropped[pairs].any(axis=1)
    pairs, ratios = pairs[keep], ratios[keep]
    if not len(pairs):
        return None
    first = pairs[:, 0] == pairs[0, 0]
    i, j = pairs[first][np.argmax(ratios[first])].tolist()
    is_point = templates.decided("deblended_as_psf")
    if is_point[i] != is_point[j]:
        return int(i if is_point[i] else j)
    brightest = [templates.template(k)[0].max() for k in (i, j)]
    return int(j if brightest[0] > brightest[1] else i)


def weighted_and_distinct(
    templates: Templates, image: FloatArray, footprint: BoolArray, config: TemplatesConfig
) -> Templates:
    """Weight templates and leave out those that are like others, as set.

    Of two that are alike the one that is no point is kept, else the brighter one. Each time one is left out all
    weights are found anew.
    """
    original = templates
    dropped = np.zeros(len(templates), dtype=np.bool_)
    while True:
        kept = original.without(dropped)
        if config.weight:
            kept = kept.scaled(template_weights(kept, image, footprint))
        worst = _most_similar(kept, dropped, config.largest_similarity) if config.drop_similar else None
        if worst is None:
            return replace(kept, flags=kept.flags | np.where(dropped, kernels.DEGENERATE | kernels.NO_LIGHT, 0))
        dropped[worst] = True


def share_light(
    image: FloatArray,
    variance: FloatArray,
    footprint: BoolArray,
    peaks: LabelArray,
    templates: Templates,
    config: TemplatesConfig,
) -> Children:
    """Share the observed flux of a footprint among its templates.

    Where there is a template, in proportion to their positive parts; positive pixels of the footprint that none
    reaches by `config.stray`.

    Parameters
    ----------
    image, variance : ndarray, shape (H, W)
        Zero where the pixel is not valid.
    footprint : ndarray, shape (H, W)
    peaks : ndarray, shape (K, 2)
        Array index (y, x).
    templates : Templates
    config : TemplatesConfig

    Returns
    -------
    children : Children
    """
    total = templates.total((image.shape[0], image.shape[1]))
    places = np.zeros((0, 2), dtype=np.int64)
    takes = takes_stray(templates.has_light, templates.decided("deblended_as_psf"), config.stray_to_points)
    if config.stray != "trim" and takes.any():
        places = np.ascontiguousarray(np.argwhere(footprint & (total == 0) & (image > 0)))
    starts, owners, parts = kernels.share_stray(
        np.ascontiguousarray(image),
        places,
        np.ascontiguousarray(peaks, dtype=np.int64),
        templates.boxes,
        templates.offsets,
        templates.pixels,
        takes,
        STRAY_RULES[config.stray],
        float(config.stray_clip),
    )
    return Children(
        templates=templates,
        image=np.ascontiguousarray(image),
        variance=np.ascontiguousarray(variance),
        stray_places=places,
        stray_starts=starts,
        stray_owners=owners,
        stray_parts=parts,
        scale_variance=config.scale_variance,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SharedBlend:
    """The light of one blend shared among its peaks in every band."""

    children: tuple[Children, ...]
    """One per band."""

    models: SourceModels
    """Templates of all bands, each source on the pixels that it has in any of them."""

    fitted: BoolArray
    """Whether the peak has a template that was made of the image in some band, shape (K,); else it is a point source
    at its peak, or nothing."""

    is_beyond: BoolArray
    """Whether the peak is not one of the `config.most_peaks` brightest, shape (K,)."""

    flux: DoubleArray
    """Flux of each child, stray flux included [unit], shape (K, B)."""

    flux_err: DoubleArray
    """Its standard deviation from the variance of the pixels [unit], shape (K, B); NaN without valid pixels."""


def _stack(templates: Sequence[Templates]) -> SourceModels:
    """Put the templates of all bands on common pixels."""
    n_peaks, n_bands = len(templates[0]), len(templates)
    boxes = np.concatenate([of_band.boxes for of_band in templates])
    sources = np.tile(np.arange(n_peaks), n_bands)
    joined, joined_offsets = kernels_flux.source_boxes(boxes, sources, n_peaks)
    pixels = kernels_flux.combine_components(
        np.concatenate([of_band.pixels for of_band in templates])[None],
        boxes,
        np.concatenate([[0], np.cumsum(boxes[:, 2] * boxes[:, 3])]),
        sources,
        np.repeat(np.eye(n_bands, dtype=np.float32), n_peaks, axis=0),
        joined,
        joined_offsets,
    )
    return SourceModels(boxes=joined, offsets=joined_offsets, pixels=pixels)


def _amplitudes(models: SourceModels, first: DoubleArray, blend: Blend) -> DoubleArray:
    """Fit all templates jointly to the pixels of each band: flux that each stands for, (K, B), as `first` says now."""
    scale = np.divide(1.0, first, out=np.zeros_like(first), where=first > 0)
    spectra = first.astype(np.float32)
    kernels_spectra.solve_spectra(
        (models.pixels * np.repeat(scale, np.diff(models.offsets), axis=0).T).astype(np.float32),
        models.boxes,
        models.offsets,
        blend.images,
        blend.weights,
        spectra,
        MAX_SWEEPS,
        SWEEP_TOLERANCE,
    )
    return spectra.astype(np.float64)


def _brightest(blend: Blend, n_peaks: int) -> LabelArray:
    """Rows of the most significant peaks, ascending; all for 0."""
    if n_peaks == 0 or n_peaks >= len(blend.peaks):
        return np.arange(len(blend.peaks))
    y, x = blend.peaks.T
    snr = (blend.images[:, y, x] * np.sqrt(blend.weights[:, y, x])).sum(axis=0)
    return np.sort(np.argsort(-snr, kind="stable")[:n_peaks])


def _image_for_all(blend: Blend, bands: Sequence[str], name: str) -> tuple[FloatArray, FloatArray, DoubleArray]:
    """Image that all bands have their templates from, its variance (0: not valid), and its PSF.

    Bands are added up with one weight each, the inverse of their typical variance, as far as they are valid.
    """
    if name != "all":
        if name not in bands:
            raise InputError(f"templates.image must be 'each', 'all' or one of {', '.join(bands)}, got {name!r}")
        b = bands.index(name)
        weights = blend.weights[b]
        return blend.images[b], np.divide(1, weights, out=np.zeros_like(weights), where=weights > 0), blend.psfs[b]
    share = np.nan_to_num(blend.noise_rms.astype(np.float64) ** -2)
    share /= share.sum()
    valid = blend.weights > 0
    used = np.tensordot(share, valid, 1)
    variance = np.divide(1, blend.weights, out=np.zeros_like(blend.weights), where=valid)
    # Where a band is missing the others stand for it.
    factor = np.divide(1.0, used, out=np.zeros_like(used), where=used > 0)
    image = np.tensordot(share, blend.images, 1) * factor
    noise2 = np.tensordot(share**2, variance, 1) * factor**2
    return image.astype(np.float32), noise2.astype(np.float32), np.tensordot(share, blend.psfs, 1)


def share_blend(
    blend: Blend,
    footprint: BoolArray,
    bands: Sequence[str],
    config: TemplatesConfig,
    edge: BoolArray | None = None,
) -> SharedBlend:
    """Share the light of a blend among its peaks, in every band.

    Peaks for which there is no template get a point source at the peak, of the flux that it would have alone; those
    that were left out because they are like others get nothing.

    Parameters
    ----------
    blend : Blend
    footprint : ndarray, shape (H, W)
        True where the pixel belongs to the parent.
    bands : sequence of str
    config : TemplatesConfig
    edge : ndarray, shape (H, W), optional
        As in `make_templates`.

    Returns
    -------
    shared : SharedBlend

    Raises
    ------
    InputError
        If `config.image` is none of the bands.
    """
    shape = (blend.images.shape[1], blend.images.shape[2])
    rows = _brightest(blend, config.most_peaks)
    peaks = blend.peaks[rows]

    def made(image: FloatArray, variance: FloatArray, psf: DoubleArray) -> Templates:
        valid = variance > 0
        templates = make_templates(image, variance, valid, footprint, peaks, psf, config, edge)
        return weighted_and_distinct(templates, image, footprint & valid, config).among(rows, len(blend.peaks))

    variances = np.divide(1, blend.weights, out=np.zeros_like(blend.weights), where=blend.weights > 0)
    if config.image == "each":
        own = [made(*of_band) for of_band in zip(blend.images, variances, blend.psfs, strict=True)]
    else:
        for_all = made(*_image_for_all(blend, bands, config.image))
        points = np.where(for_all.decided("deblended_as_psf") & for_all.has_light, for_all.amplitudes, 0.0)
        own = [for_all.with_points(psf, points, blend.peaks, shape) for psf in blend.psfs]
    fitted = np.any([of_band.has_light for of_band in own], axis=0)
    templates = []
    errors = np.zeros((len(fitted), len(own)))
    for b, (of_band, image, weights, psf) in enumerate(zip(own, blend.images, blend.weights, blend.psfs, strict=True)):
        missing = ~of_band.has_light & ~of_band.decided("degenerate")
        points = np.zeros(len(missing))
        points[missing], errors[missing, b] = point_fluxes(image, weights, psf, blend.peaks[missing])
        templates.append(of_band.with_points(psf, points, blend.peaks, shape) if (points > 0).any() else of_band)
    if config.image != "each":
        # Neighbours of other colours differ in other proportions than in the image that the templates are from.
        first = np.stack([of_band.amplitudes for of_band in templates], axis=1)
        found = _amplitudes(_stack(templates), first, blend)
        factors = np.divide(found, first, out=np.zeros_like(found), where=first > 0)
        templates = [of_band.scaled(factors[:, b]) for b, of_band in enumerate(templates)]
    children = tuple(
        share_light(image, variance, footprint, blend.peaks, of_band, config)
        for image, variance, of_band in zip(blend.images, variances, templates, strict=True)
    )
    flux_err = np.stack([of_band.flux_err for of_band in children], axis=1)
    return SharedBlend(
        children=children,
        models=_stack(templates),
        fitted=fitted,
        is_beyond=~np.isin(np.arange(len(blend.peaks)), rows),
        flux=np.stack([of_band.flux for of_band in children], axis=1),
        flux_err=np.where(flux_err > 0, flux_err, errors),
    )


def deblend_footprint(
    image: ArrayLike,
    variance: ArrayLike,
    footprint: ArrayLike,
    peaks: ArrayLike,
    psf: ArrayLike,
    config: TemplatesConfig | None = None,
    *,
    edge: ArrayLike | None = None,
) -> Children:
    """Share the light of one footprint in one image among its peaks, with one symmetric template for each.

    Parameters
    ----------
    image : array_like, shape (H, W)
        Flux per pixel [any unit].
    variance : array_like, shape (H, W)
        Its variance [unit^2]. Pixels where it is not positive, or where one of both is not finite, are not used.
    footprint : array_like, shape (H, W)
        True where the pixel belongs to the parent.
    peaks : array_like, shape (K, 2)
        Positions (y, x) of the sources, array index, rounded to whole pixels.
    psf : array_like, shape (P, Q)
        Odd sides; is made to sum to one.
    config : TemplatesConfig, optional
        None: the defaults. Its limits on footprints and on peaks are for `kermes.deblend`.
    edge : array_like, shape (H, W), optional
        Pixels at the edge of the data, for ``edges="patch"``; None: the outermost ones.

    Returns
    -------
    children : Children

    Raises
    ------
    ShapeError
        If the arrays do not have the shapes above.
    InputError
        If the PSF has an even side or no positive sum.

    Examples
    --------
    >>> import numpy as np
    >>> from kermes.templates import deblend_footprint
    >>> y, x = np.mgrid[:41, :41]
    >>> psf = np.exp(-0.25 * ((y[:21, :21] - 10) ** 2 + (x[:21, :21] - 10) ** 2))
    >>> image = np.exp(-0.1 * ((y - 20) ** 2 + (x - 14) ** 2)) + np.exp(-0.1 * ((y - 20) ** 2 + (x - 26) ** 2))
    >>> children = deblend_footprint(image, np.full((41, 41), 1e-6), image > 1e-4, [(20, 14), (20, 26)], psf)
    >>> children.flux.round(1)
    array([31.4, 31.4])
    """
    pixels, noise2 = np.asarray(image, dtype=np.float32), np.asarray(variance, dtype=np.float32)
    if pixels.ndim != 2:
        raise ShapeError(f"image must have shape (height, width), got {pixels.shape}")
    inside = np.asarray(footprint, dtype=np.bool_)
    for name, array in (("variance", noise2), ("footprint", inside)):
        if array.shape != pixels.shape:
            raise ShapeError(f"{name} must have the shape of the image {pixels.shape}, got {array.shape}")
    at_edge = None if edge is None else np.asarray(edge, dtype=np.bool_)
    if at_edge is not None and at_edge.shape != pixels.shape:
        raise ShapeError(f"edge must have the shape of the image {pixels.shape}, got {at_edge.shape}")
    positions = np.asarray(peaks, dtype=np.float64)
    if positions.size == 0:
        positions = positions.reshape(0, 2)
    if positions.ndim != 2 or positions.shape[1] != 2:
        raise ShapeError(f"peaks must have shape (peaks, 2), got {positions.shape}")
    stamp = np.asarray(psf, dtype=np.float64)
    if stamp.ndim != 2:
        raise ShapeError(f"psf must have shape (height, width), got {stamp.shape}")
    if stamp.shape[0] % 2 == 0 or stamp.shape[1] % 2 == 0:
        raise InputError(f"psf must have odd sides, got {stamp.shape}")
    if not stamp.sum() > 0:
        raise InputError(f"psf must have a positive sum, got {stamp.sum():g}")
    config = TemplatesConfig() if config is None else config
    valid = np.isfinite(pixels) & np.isfinite(noise2) & (noise2 > 0)
    pixels, noise2 = np.where(valid, pixels, np.float32(0)), np.where(valid, noise2, np.float32(0))
    at = np.rint(positions).astype(np.int64)
    templates = make_templates(pixels, noise2, valid, inside, at, stamp / stamp.sum(), config, at_edge)
    templates = weighted_and_distinct(templates, pixels, inside, config)
    return share_light(pixels, noise2, inside, at, templates, config)
