"""Fluxes of known objects in other images: positions and shapes are held, neighbours are fitted along."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from astropy.table import Table, vstack
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import map_coordinates
from scipy.sparse import csc_array, diags_array
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import splu

from kermes.catalog import forced_columns, make_forced
from kermes.coadd import Coadd, psf_of_box
from kermes.errors import InputError
from kermes.geometry import Box
from kermes.kernels import flux as kernels_flux
from kermes.kernels import metrics as kernels_metrics
from kermes.kernels import spectra as kernels_spectra
from kermes.measurement import MAX_NEIGHBOURS
from kermes.psf import MODEL_PSF_SIGMAS, continued, difference_kernels, gaussian_fwhm, model_psf
from kermes.rendering import KernelSet, SourceModels, render_scene
from kermes.result import Result
from kermes.scene import Component, FactorizedComponent, ProfileComponent, Scene, Source

DoubleArray = NDArray[np.float64]
FloatArray = NDArray[np.float32]

CELL = 256
"""Where the PSF varies, sources in a square of this side have the one in its middle [pixels]."""

RIDGE = 1e-6
"""Part of the diagonal that is added to normal matrices, so that equal sources can be told apart at all."""

MAX_TOGETHER = 100
"""Most models whose normal matrix is inverted as a whole."""

POINT_SIDE = 48
"""Side of the stamp of a point source that stands for what has no model of its own [pixels]."""


# ---------------------------------------------------------------- from one grid to another


@dataclass(frozen=True, slots=True)
class _Grid:
    """How pixels of the result's images map to those of another coadd, array index."""

    result: Result
    coadd: Coadd
    is_same: bool

    @classmethod
    def of(cls, result: Result, coadd: Coadd) -> _Grid:
        """Compare two grids; without a WCS on both they must be the same."""
        same = result.shape == coadd.shape and tuple(result.origin) == tuple(coadd.origin)
        if result.wcs is None or coadd.wcs is None:
            if not same:
                raise InputError(
                    "coadd must have the pixels of the result where one of both has no WCS: shape "
                    f"{result.shape} and origin {result.origin}, got {coadd.shape} and {coadd.origin}"
                )
            return cls(result, coadd, is_same=True)
        grid = cls(result, coadd, is_same=False)
        corners = np.array([[0, 0], [0, result.shape[1] - 1], [result.shape[0] - 1, 0]], dtype=float)
        # Where the sky of one is not on the other at all the mapping is NaN.
        stays = same and bool((np.abs(grid.forward(corners) - corners) <= 1e-3).all())
        return replace(grid, is_same=stays)

    def forward(self, points: DoubleArray) -> DoubleArray:
        """Map points (N, 2), (y, x)."""
        if self.is_same:
            return points
        x, y = self.coadd.wcs.world_to_pixel(self.result.wcs.pixel_to_world(points[:, 1], points[:, 0]))
        return np.stack([y, x], axis=1)

    def backward(self, points: DoubleArray) -> DoubleArray:
        """Map points (N, 2) of the coadd back."""
        x, y = self.result.wcs.world_to_pixel(self.coadd.wcs.pixel_to_world(points[:, 1], points[:, 0]))
        return np.stack([y, x], axis=1)

    def jacobian(self, point: DoubleArray) -> DoubleArray:
        """Derivatives (2, 2) of the mapped (x, y) by (x, y) at a point (y, x)."""
        y, x = point
        ends = self.forward(np.array([(y, x - 0.5), (y, x + 0.5), (y - 0.5, x), (y + 0.5, x)]))
        by_x, by_y = ends[1] - ends[0], ends[3] - ends[2]
        return np.array([[by_x[1], by_y[1]], [by_x[0], by_y[0]]])


def _moved_profile(component: ProfileComponent, grid: _Grid) -> ProfileComponent | None:
    """The same profile on another grid: its ellipse M becomes J M J^T, J the local derivatives of the mapping.

    None where the sky is not on the other grid.
    """
    center = grid.forward(component.center[None])[0]
    jacobian = grid.jacobian(component.center)
    if not np.isfinite(center).all() or not np.isfinite(jacobian).all():
        return None
    scale = float(np.sqrt(abs(np.linalg.det(jacobian))))
    radius, shear = component.radius * scale, np.zeros(2)
    if not component.is_point:
        half, angle = 0.5 * np.hypot(*component.shear), 0.5 * np.arctan2(component.shear[1], component.shear[0])
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        ellipse = jacobian @ turn @ np.diag(np.exp([2 * half, -2 * half])) @ turn.T @ jacobian.T
        values, vectors = np.linalg.eigh(ellipse)
        length, direction = 0.5 * np.log(values[1] / values[0]), np.arctan2(vectors[1, 1], vectors[0, 1])
        shear = length * np.array([np.cos(2 * direction), np.sin(2 * direction)])
    side = 2 * int(np.ceil(0.5 * component.box.height * max(scale, 1.0)))
    y, x = (int(np.floor(value + 0.5)) - side // 2 for value in center)
    return replace(component, center=center, radius=radius, shear=shear, box=Box(y, x, side, side))


def _moved_pixels(component: FactorizedComponent, grid: _Grid) -> FactorizedComponent | None:
    """The same morphology on another grid, by cubic splines, with its sum; None where nothing of it is left."""
    box = component.box
    corners = np.array([(y, x) for y in (box.y0 - 1, box.y1) for x in (box.x0 - 1, box.x1)], dtype=float)
    there = grid.forward(corners)
    if not np.isfinite(there).all():
        return None
    low, high = np.floor(there.min(axis=0)), np.ceil(there.max(axis=0))
    target = Box.from_bounds(low[0], high[0] + 1, low[1], high[1] + 1) & Box.of_shape(grid.coadd.shape)
    if target.is_empty:
        return None
    rows, columns = np.mgrid[target.y, target.x]
    here = grid.backward(np.stack([rows.ravel(), columns.ravel()], axis=1).astype(float)) - np.array(box.origin)
    pixels = map_coordinates(component.morphology.astype(float), here.T, order=3).reshape(target.shape)
    area = abs(np.linalg.det(grid.jacobian(np.array(box.origin, dtype=float))))
    return replace(component, morphology=(pixels / area).astype(np.float32), box=target)


def _moved(component: Component, grid: _Grid, wider: float) -> Component | None:
    """The same component on another grid, where the PSF is so many times wider; None where nothing of it is left."""
    if isinstance(component, ProfileComponent):
        moved = component if grid.is_same else _moved_profile(component, grid)
        return None if moved is None else _on_stamp(moved, wider)
    assert isinstance(component, FactorizedComponent)
    return component if grid.is_same else _moved_pixels(component, grid)


def _on_stamp(component: ProfileComponent, wider: float) -> ProfileComponent:
    """The same profile on a stamp that is so many times larger, for a wider PSF; never on a smaller one."""
    more = int(np.ceil(0.5 * component.box.height * max(wider - 1.0, 0.0)))
    return replace(component, box=component.box.grow(more)) if more else component


# ---------------------------------------------------------------- models of flux one


def _band_weights(result: Result, band: str) -> DoubleArray:
    """What the bands of the result weigh in the shape of each model (N, B), of a flux in some band.

    Where the result has the band it is that one; else the inverse variance of the fluxes.
    """
    ids = result.model_ids()[0]
    weights = np.zeros((len(ids), len(result.bands)))
    if band in result.bands:
        weights[:, result.bands.index(band)] = 1.0
        return weights
    for table, rows in ((result.objects, ids > 0), (result.candidates, ids < 0)):
        errors = np.array([np.asarray(table[f"{name}_flux_err"], dtype=float) for name in result.bands]).T
        weights[rows] = np.nan_to_num(errors.reshape(-1, len(result.bands)) ** -2.0, posinf=0.0)
    return weights


def _unit_source(source: Source, weights: DoubleArray) -> Source:
    """The source with a total flux of one in a single band, its components in the proportions of its own bands.

    The flux is that of the profiles, where there are any; pixels on top of them are part of the shape. What has no
    flux in these bands has the proportions of all of them, or keeps its shape alone.
    """
    is_profile = [isinstance(component, ProfileComponent) for component in source.components]
    counted = np.array(is_profile if any(is_profile) else [True] * len(is_profile), dtype=float)
    spectra = np.array([np.nan_to_num(component.parameters["spectrum"]) for component in source.components])
    sums = np.array(
        [c.morphology.sum(dtype=float) if isinstance(c, FactorizedComponent) else 1.0 for c in source.components]
    )
    for values in (spectra @ weights, spectra.sum(axis=1), counted) if len(counted) else ():
        flux = float((values * sums * counted).sum())
        if flux > 0:
            components = (
                component.updated({"spectrum": np.array([value / flux], dtype=np.float32)})
                for component, value in zip(source.components, values, strict=True)
            )
            return replace(source, components=tuple(components))
    return replace(source, components=())


def _sources_there(result: Result, grid: _Grid) -> list[Source]:
    """All models of a result on the pixels of another coadd; what has no model of its own is a point at its peak."""
    wider = max(_psf_ratio(result, band, grid) for band in grid.coadd.bands)
    sources = []
    for model_id in result.model_ids()[0].tolist():
        source = result.models[model_id]
        usable = [c for c in source.components if isinstance(c, ProfileComponent | FactorizedComponent)]
        components = (_moved(component, grid, wider) for component in usable or [_point(source, result)])
        sources.append(replace(source, components=tuple(c for c in components if c is not None)))
    return sources


def _point(source: Source, result: Result) -> ProfileComponent:
    """A point source at the peak of a source."""
    y, x = source.peak
    return ProfileComponent(
        spectrum=np.ones(len(result.bands), dtype=np.float32),
        center=np.array([y, x], dtype=float),
        shear=np.zeros(2),
        sigma=result.config.model_psf_sigma,
        box=Box(y - POINT_SIDE // 2, x - POINT_SIDE // 2, POINT_SIDE, POINT_SIDE),
    )


def _psf_ratio(result: Result, band: str, grid: _Grid) -> float:
    """Width of the PSF of a band of the coadd over the widest one of the result, both on the pixels of the coadd."""
    blends = result.blends["blend_id"]
    known = [] if not len(blends) else [gaussian_fwhm(psf) for psf in result.psfs[int(blends[0])]]
    here = psf_of_box(grid.coadd, Box.of_shape(grid.coadd.shape))[grid.coadd.bands.index(band)]
    widest = max(known, default=0.0) * _scale(result, grid)
    return gaussian_fwhm(here) / widest if widest > 0 else 1.0


def _centers(sources: Sequence[Source], grid: _Grid) -> DoubleArray:
    """Centre (y, x) of each source on the pixels of the coadd: of its first profile, else of its peak."""
    peaks = grid.forward(np.array([source.peak for source in sources], dtype=float).reshape(-1, 2))
    for row, source in enumerate(sources):
        profile = next((c for c in source.components if isinstance(c, ProfileComponent)), None)
        if profile is not None:
            peaks[row] = profile.center
    return peaks


def _render(
    sources: Sequence[Source], centers: DoubleArray, band: int, coadd: Coadd, sigma: float, regularization: float
) -> SourceModels:
    """Draw all sources in one band of a coadd, in their order, with the PSF of the cell of 256 pixels they are in."""
    whole = Box.of_shape(coadd.shape)
    centers = np.nan_to_num(centers, nan=-1.0)
    cells = (centers // CELL).astype(np.int64) if callable(coadd.psfs) else np.zeros((len(sources), 2), dtype=np.int64)
    boxes = np.zeros((len(sources), 4), dtype=np.int64)
    pieces: list[FloatArray] = [np.zeros(0, dtype=np.float32)] * len(sources)
    for cell in np.unique(cells, axis=0):
        members = np.flatnonzero((cells == cell).all(axis=1)).tolist()
        box = Box(int(cell[0]) * CELL, int(cell[1]) * CELL, CELL, CELL) & whole if callable(coadd.psfs) else whole
        psfs = psf_of_box(coadd, whole if box.is_empty else box)[band : band + 1]
        if not psfs.any():
            continue
        kernels = KernelSet(difference_kernels(psfs, model_psf(sigma), regularization), continued(psfs))
        models = render_scene(Scene(sources=tuple(sources[s] for s in members), box=whole), kernels)
        boxes[members] = models.boxes
        for n, s in enumerate(members):
            pieces[s] = models.pixels[0, models.offsets[n] : models.offsets[n + 1]]
    offsets = np.concatenate([[0], np.cumsum(boxes[:, 2] * boxes[:, 3])])
    return SourceModels(boxes=boxes, offsets=offsets, pixels=np.concatenate([*pieces, np.zeros(0, np.float32)])[None])


# ---------------------------------------------------------------- joint fluxes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class JointFluxes:
    """Fluxes of models that overlap, solved together, each (S,); NaN for a model without a valid pixel."""

    flux: DoubleArray
    """Flux of each, for models of flux one [unit]; may be negative."""

    flux_err: DoubleArray
    """Its standard deviation with the neighbours free [unit]."""

    correlation: DoubleArray
    """Correlation of its flux with that of the neighbour with which it is largest; 0 without one."""

    neighbor: NDArray[np.int64]
    """Which one that is; -1 without one."""


def joint_fluxes(image: FloatArray, weights: FloatArray, models: SourceModels) -> JointFluxes:
    """Fit the fluxes of models to an image by linear least squares.

    Parameters
    ----------
    image : ndarray, shape (H, W)
        Flux per pixel [unit]; finite.
    weights : ndarray, shape (H, W)
        Inverse variance [1 / unit^2]; zero where a pixel is not used.
    models : SourceModels
        As observed, in one band, for a flux of one.

    Returns
    -------
    fluxes : JointFluxes

    Notes
    -----
    The normal equations are sparse, of boxes that overlap, and solved at once. Errors and correlations are those of the
    inverse of the normal matrix, of groups of up to `MAX_TOGETHER` models that overlap; in larger ones each model has
    the inverse of its block with the `measurement.MAX_NEIGHBOURS` that it is most degenerate with. A millionth of the
    diagonal is added, so that equal models share their flux.
    """
    n_models = len(models.boxes)
    zeros = np.zeros((n_models, 1), dtype=np.float32)
    image3, weights3 = (np.ascontiguousarray(plane, dtype=np.float32)[None] for plane in (image, weights))
    starts, columns, values = kernels_spectra.solve_spectra(
        models.pixels, models.boxes, models.offsets, image3, weights3, zeros, 0, 1.0
    )
    right = kernels_flux.project_models(image3 * weights3, models.pixels, models.boxes, models.offsets)[:, 0]
    matrix = csc_array((values[0], columns, starts), shape=(n_models, n_models))
    matrix.sort_indices()
    diagonal = matrix.diagonal()
    known = np.flatnonzero(diagonal > 0)
    flux, flux_err, correlation = np.full((3, n_models), np.nan)
    neighbor = np.full(n_models, -1, dtype=np.int64)
    if not len(known):
        return JointFluxes(flux=flux, flux_err=flux_err, correlation=correlation, neighbor=neighbor)
    scale = np.zeros(n_models)
    scale[known] = diagonal[known] ** -0.5
    # Every flux in units of its error alone: the diagonal is one.
    scaling = diags_array(scale[known])
    reduced = csc_array(scaling @ matrix[known][:, known] @ scaling + diags_array(np.full(len(known), RIDGE)))
    flux[known] = splu(reduced).solve(right[known] * scale[known]) * scale[known]
    for members, own in _blocks(reduced):
        inverse = np.linalg.inv(reduced[members][:, members].toarray())
        error = np.sqrt(np.diag(inverse))
        for n in own:
            k = known[members[n]]
            flux_err[k], correlation[k] = error[n] * scale[k], 0.0
            # Of models that share pixels: others are correlated through them.
            near = np.isin(members, reduced.indices[reduced.indptr[members[n]] : reduced.indptr[members[n] + 1]])
            near[n] = False
            if near.any():
                with_others = np.where(near, inverse[n] / (error[n] * error), 0.0)
                worst = int(np.abs(with_others).argmax())
                correlation[k], neighbor[k] = with_others[worst], known[members[worst]]
    return JointFluxes(flux=flux, flux_err=flux_err, correlation=correlation, neighbor=neighbor)


def _blocks(matrix: csc_array) -> Iterator[tuple[NDArray[np.int64], list[int]]]:
    """Rows of a normal matrix that are inverted together, and for which of them the inverse counts.

    Models that are joined by others, as a whole if they are few; else each with those that it is most degenerate with.
    """
    n_groups, group = connected_components(matrix, directed=False)
    order = np.argsort(group, kind="stable")
    for members in np.split(order, np.cumsum(np.bincount(group, minlength=n_groups))[:-1]):
        if len(members) <= MAX_TOGETHER:
            yield members, list(range(len(members)))
            continue
        for n in members.tolist():
            rows = slice(matrix.indptr[n], matrix.indptr[n + 1])
            partners, strength = matrix.indices[rows], np.abs(matrix.data[rows])
            strongest = partners[np.argsort(-strength, kind="stable")]
            yield np.concatenate([[n], strongest[strongest != n][:MAX_NEIGHBOURS]]), [0]


def forced_photometry(result: Result, coadd: Coadd) -> Table:
    """Measure the objects of a result in other images of the same field: other bands, another epoch, another PSF.

    Positions and shapes are those of the models; only fluxes are fitted, of all objects and candidates together, so
    that neighbours are accounted for. They may be negative.

    Parameters
    ----------
    result : Result
        Of any scene model. Sources that have templates, or nothing, for a model are measured as points at their peaks.
    coadd : Coadd
        On the same pixels, or on others if both have a WCS.

    Returns
    -------
    table : Table
        One row per object, in their order, with the columns of `catalog.forced_columns`. NaN in a band without a valid
        pixel or a PSF there, and for an object outside of the images.

    Raises
    ------
    InputError
        If the pixels differ and there is no WCS to map them.

    Notes
    -----
    A disc and its bulge keep the proportions that they have in the band of the same name, where the result has it, else
    in the inverse-variance mean of its bands. On other pixels the ellipse M of a profile becomes J M J^T, with J the
    derivatives of the mapping at its centre; free shapes are resampled by cubic splines. Weighted linear least squares
    with the inverse variance of the pixels (Lang, Hogg & Mykytyn 2016 call it forced photometry); see `joint_fluxes`.
    Errors are those of the pixels times `Coadd.noise_factors`, if these are known; see `measurement.noise_factors`.
    """
    grid = _Grid.of(result, coadd)
    ids = result.model_ids()[0]
    n_objects = len(result)
    columns: dict[str, ArrayLike] = {"object_id": ids[:n_objects]}
    sigma = _sigma_there(result, grid)
    shapes = _sources_there(result, grid)
    centers = _centers(shapes, grid)
    y, x = centers[:n_objects].T
    columns |= {"y": y + coadd.origin[0], "x": x + coadd.origin[1]}
    columns["ra"], columns["dec"] = coadd.sky(y=columns["y"], x=columns["x"])
    factors = coadd.noise_factors
    if factors is None:
        factors = result.noise_factors if coadd is result.coadd else np.ones(coadd.n_bands)
    height, width = coadd.shape
    columns["flag_outside"] = ~((y > -0.5) & (y < height - 0.5) & (x > -0.5) & (x < width - 0.5))
    for b, band in enumerate(coadd.bands):
        weights_of_bands = _band_weights(result, band)
        sources = [_unit_source(shape, mix) for shape, mix in zip(shapes, weights_of_bands, strict=True)]
        models = _render(sources, centers, b, coadd, sigma, result.config.kernel_regularization)
        valid = coadd.valid[b]
        weights = np.divide(1, coadd.variance[b], out=np.zeros_like(coadd.variance[b]), where=valid)
        image = np.where(valid, coadd.images[b], np.float32(0))
        found = joint_fluxes(image, weights, models)
        residual = image.copy()[None]
        scaled = models.pixels * np.repeat(np.nan_to_num(found.flux), np.diff(models.offsets)).astype(np.float32)
        kernels_flux.add_models(residual, scaled, models.boxes, models.offsets, -1.0)
        chi2 = kernels_metrics.mean_chi2(residual, weights[None], models.boxes)
        coverage = kernels_flux.project_models(
            valid.astype(np.float32)[None], models.pixels, models.boxes, models.offsets
        )[:, 0]
        values: dict[str, Any] = {
            "flux": found.flux,
            "flux_err": found.flux_err * factors[b],
            "correlation": found.correlation,
            "neighbor_id": np.where(found.neighbor >= 0, ids[found.neighbor], 0),
            "chi2": chi2,
            "coverage": coverage,
        }
        columns |= {f"{band}_{name}": value[:n_objects] for name, value in values.items()}
    return make_forced(columns, coadd.bands, coadd.unit)


def _sigma_there(result: Result, grid: _Grid) -> float:
    """Width of the PSF of the model frame in pixels of the other coadd, as far as kernels go."""
    sigma = result.config.model_psf_sigma
    return sigma if grid.is_same else max(sigma * _scale(result, grid), MODEL_PSF_SIGMAS[-1])


def _scale(result: Result, grid: _Grid) -> float:
    """Side of a pixel of the result in pixels of the coadd, in the middle of the image; 1 where it cannot be mapped."""
    if grid.is_same:
        return 1.0
    jacobian = grid.jacobian(0.5 * np.array(result.shape, dtype=float))
    return float(np.sqrt(abs(np.linalg.det(jacobian)))) if np.isfinite(jacobian).all() else 1.0


def light_curves(result: Result, visits: Iterable[tuple[Any, Coadd]]) -> Table:
    """Measure the objects of a result in one image after the other.

    Parameters
    ----------
    result : Result
    visits : iterable of tuple
        Name, number or time of each visit, and its images; they may be read one at a time.

    Returns
    -------
    table : Table
        One row per visit, band and object inside of its images: ``visit``, ``band``, and the columns of
        `forced_photometry` without the name of the band.

    Raises
    ------
    InputError
        If there is no visit, or as `forced_photometry`.
    """
    tables = []
    for name, coadd in visits:
        measured = forced_photometry(result, coadd)
        for band in coadd.bands:
            shared = [item.name for item in forced_columns(()) if item.name in measured.colnames]
            own = [column for column in measured.colnames if column.startswith(f"{band}_")]
            table = measured[[*shared, *own]]
            table.rename_columns(own, [column.removeprefix(f"{band}_") for column in own])
            table.add_column([name] * len(table), name="visit", index=0)
            table.add_column([band] * len(table), name="band", index=1)
            tables.append(table[~table["flag_outside"]])
    if not tables:
        raise InputError("visits must hold at least one image, got none")
    return vstack(tables, metadata_conflicts="silent")
