"""Measurement on the stamps of every object: fluxes, shapes, and how well the models fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from astropy.table import Table
from numpy.typing import NDArray

from kermes.catalog import MeasurementFlag, aperture_name, empty_columns, make_measurements, measurement_columns
from kermes.errors import InputError
from kermes.kernels import photometry as kernels
from kermes.result import ObjectHandle, Result, StampKind
from kermes.scene import ProfileComponent, Source

DoubleArray = NDArray[np.float64]
FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]

APERTURES = (3.0, 6.0, 9.0)
"""Radii of apertures unless others are asked for [pixels]."""

KRON_FACTOR = 2.5
"""Kron radius in units of the first radial moment: holds more than nine tenths of the light of most galaxies."""

_FULL_FIT = 4.0  # the errors of the fit count in full from a blendedness of one over this
_KRON_REACH = 6.0  # the radial moment is taken, and the Kron radius ends, at this many sigma of the object
_WIDTHS = (1.0, 3.0)  # radii of the circles of chi2, in widths of the PSF


def measure(
    result: Result,
    kind: StampKind | str = StampKind.NEIGHBOR_SUBTRACTED,
    bands: Sequence[str] | None = None,
    apertures: Sequence[float] = APERTURES,
) -> Table:
    """Measure every object on one kind of stamp.

    Apertures lie round the centre of the model, the same in all bands; the PSF is not corrected for.

    Parameters
    ----------
    result : Result
        With its coadd.
    kind : StampKind or str, optional
        What is measured on; see `ObjectHandle.stamps`.
    bands : sequence of str, optional
        Left out: all. The Kron radius is found in the mean of these.
    apertures : sequence of float, optional
        Radii of circular apertures [pixels].

    Returns
    -------
    table : Table
        One row per object in the order of `result.objects`, with the columns of `catalog.measurement_columns`, in the
        unit of the coadd. Invalid pixels and those outside the image are left out of every sum, and
        `{band}_flag_incomplete` says so; what cannot be measured is NaN, and flagged. The kind is in the table's
        `meta`.

    Raises
    ------
    InputError
        If the kind or a band is unknown, a radius is not positive, finite and named once, or the result has no coadd.

    Notes
    -----
    *Apertures*: the exact area of each pixel in the circle times its flux.

    *Errors of fluxes*: the variance of the stamp, summed as the flux is, times the square of `Result.noise_factors`, as
    for those of moments; and what the fit adds. With s the error of the model's total flux, m the model and p the part
    of its flux that the same measurement finds on it, that is p^2 times the excess of s^2 over what noise alone makes
    it, sum(m)^2 / sum(m^2 / V) times the same square: the residual of a least-squares fit does not covary with its
    parameters, and the noise of the pixels is counted already. Most of it is the doubt whose light it is, of which
    there is none for a source alone: it is faded in with the blendedness 1 - (m . m) / (A . m) as observed, A the light
    of all models, and counts in full from a quarter. On "model", p s is all there is.

    *Kron flux* (Kron 1980): within `KRON_FACTOR` times the mean radius of the light inside six sigma of the object, in
    the mean of the bands weighted by inverse variance, sigma from its adaptive moments. Not less than the width of
    the PSF.

    *PSF flux*: sum(w I) / sum(w P) with w = P / V, P the PSF at the centre of the model and V the variance of the
    image, and the error that the variance of the stamp gives it. Weights of all kinds of stamps are the same; the
    variance of shared pixels as a weight would hand the flux to the faintest of them.

    *Adaptive moments* (Bernstein and Jarvis 2002; Hirata and Seljak 2003): those of the elliptical Gaussian that is its
    own best weight. `snr` is that of the flux under it, by the noise of the pixels; NaN on "model", which has none.
    Their errors follow from how the noise moves the weight that solves ``M(W) = W / 2``, M the moments under W, as for
    a Gaussian image: the centre by twice its mean under W, W by four times what M changes. Errors of the models of
    neighbours are not in them.

    *chi2*: of the image less the models of all objects, whatever the kind, in circles of one and three widths of the
    PSF (of a Gaussian with the PSF's adaptive moments). From the number of pixels the parameters of the object are
    taken off, those of its shape divided among the bands, in the share of its squared signal-to-noise that lies in
    the circle; of a free form only its flux counts, and of neighbours nothing.

    *Asymmetry*: of the same residual in three widths of the PSF, the mean of (r - r')^2 / (V + V') over pixels and
    those opposite the centre: 1 for noise, more for light that is not where the model has it.
    """
    bands = result.bands if bands is None else tuple(dict.fromkeys(bands))
    if not bands:
        raise InputError(f"bands must be some of {', '.join(result.bands)}, got none")
    radii = _checked_apertures(apertures)
    result.stamps(kind, bands)  # refuses what cannot be cut, before the work begins
    result.need_coadd("measure")
    b = result.band_indices(None if bands == result.bands else bands)
    model_err = np.nan_to_num([np.asarray(result.objects[f"{band}_flux_err"], dtype=float) for band in bands]).T
    psfs, widths = None, _PsfWidths(trace=np.empty(0), fwhm=np.empty(0))
    sums = _Sums.empty(len(result), len(bands), len(radii))
    for handle in result.by_blend():
        own = result.psfs[handle.blend_id]
        if own is not psfs:
            psfs, widths = own, _psf_widths(own[b])
        _sum_up(_cut(handle, StampKind(kind), bands, radii, widths), radii, widths, sums, handle.index)
    columns = empty_columns(measurement_columns(bands, radii), len(result))
    columns["object_id"][:] = result.objects["object_id"]
    noise2 = np.square(result.noise_factors[b])
    # Sums over the object, whose noise is larger than that of independent pixels.
    sums.fluxes[..., 1] *= noise2
    sums.under_moments[..., 6:] *= noise2[:, None]
    found = _columns(sums, radii, model_err, noise2, on_model=StampKind(kind) is StampKind.MODEL)
    for name, values in found.items():
        if values.ndim == 1:
            columns[name] = values
        else:
            columns |= {f"{band}_{name}": values[:, k] for k, band in enumerate(bands)}
    table = make_measurements(columns, bands, radii, result.unit)
    table.meta["kind"] = str(StampKind(kind))
    return table


def _checked_apertures(apertures: Sequence[float]) -> tuple[float, ...]:
    radii = tuple(float(radius) for radius in apertures)
    names = [aperture_name(radius) for radius in radii]
    if not all(0 < radius < np.inf for radius in radii) or len(set(names)) < len(names):
        raise InputError(f"apertures must be different radii > 0 in pixels, got {radii}")
    return radii


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _PsfWidths:
    """Adaptive moments of the PSF of each band, (B,)."""

    trace: DoubleArray
    """Sum of the second moments along y and x [pixels^2]; NaN without a PSF."""

    fwhm: DoubleArray
    """Full width at half maximum of a Gaussian with the determinant of the second moments [pixels]; where there is no
    PSF the mean of the other bands, else 4."""


def _psf_widths(psfs: DoubleArray) -> _PsfWidths:
    stamps = psfs.astype(np.float32)
    states, sums = np.empty((len(psfs), 5)), np.empty((len(psfs), kernels.N_SUMS))
    middle = [float(side // 2) for side in stamps.shape[1:]]
    start = np.full(len(psfs), 1.5)
    found = kernels.adaptive_moments(stamps, stamps, np.ones(stamps.shape, dtype=bool), *middle, start, states, sums)
    states[~found] = np.nan
    _, _, yy, xx, xy = states.T
    fwhm = kernels.FWHM * (yy * xx - xy**2) ** 0.25
    fwhm[~found] = fwhm[found].mean() if found.any() else 4.0
    return _PsfWidths(trace=yy + xx, fwhm=fwhm)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Pixels:
    """What one object is measured on; arrays have the shape (B, h, w)."""

    flux: FloatArray
    """The stamps."""

    flux_variance: FloatArray
    """Their variance; zero for models."""

    usable: BoolArray
    """Which of their pixels can be used."""

    variance: FloatArray
    """Variance of the image."""

    valid: BoolArray
    """Which pixels of the image can be used."""

    residual: FloatArray
    """The image less all models; may be NaN where it is not valid."""

    model: FloatArray
    """The model of the object as observed."""

    light: FloatArray
    """Those of all objects."""

    psf: FloatArray
    """A point source of flux one at the centre."""

    center: tuple[float, float]
    """Centre (y, x), counted from the first pixel."""

    origin: tuple[int, int]
    """First pixel, in the coadd's coordinates."""

    own: tuple[slice, slice]
    """Box of the model."""

    n_parameters: float
    """Parameters of the model per band."""


def _cut(
    handle: ObjectHandle, kind: StampKind, bands: tuple[str, ...], radii: tuple[float, ...], widths: _PsfWidths
) -> _Pixels:
    """Cut out everything on a box that holds the apertures."""
    (y, x), own = handle.center, handle.box
    reach = max([*radii, _WIDTHS[1] * widths.fwhm.max()]) + 1.0
    nearest = min(y - own.y0, own.y1 - 1 - y, x - own.x0, own.x1 - 1 - x)
    margin = max(0, math.ceil(reach - nearest))
    result = handle.result
    coadd, some = result.need_coadd("measure"), None if bands == result.bands else bands
    b = result.band_indices(some)
    cube = handle.cube(kind, some, margin)
    box = cube.box
    in_image = box.shift(-result.origin[0], -result.origin[1])
    window = (b, in_image.y, in_image.x)
    # Kernels are compiled for whole arrays, not for windows of larger ones.
    light = np.ascontiguousarray(result.model_image()[window])
    variance = np.ascontiguousarray(coadd.variance[window])
    valid = np.ascontiguousarray(coadd.valid[window]) if cube.valid is None else cube.valid
    model = cube.array if kind is StampKind.MODEL else handle.cube(StampKind.MODEL, some, margin).array
    return _Pixels(
        flux=cube.array,
        flux_variance=np.zeros_like(cube.array) if cube.variance is None else cube.variance,
        usable=np.ones_like(valid) if cube.valid is None else valid,
        variance=variance,
        valid=valid,
        residual=coadd.images[window] - light,
        model=model,
        light=light,
        psf=handle.psf_cube(some, margin).array,
        center=(y - box.y0, x - box.x0),
        origin=box.origin,
        own=own.within(box),
        n_parameters=_n_parameters(handle.source, len(result.bands)),
    )


def _n_parameters(source: Source, n_bands: int) -> float:
    """Parameters of a model per band: fluxes, and its share of those of the shape, which all bands have in common."""
    profiles = [component for component in source.components if isinstance(component, ProfileComponent)]
    extended = [component for component in profiles if not component.is_point]
    # Centres, of clumps too; radius and shear of each profile, and the index of a Sersic profile.
    n_centers = len({tuple(component.center.tolist()) for component in profiles})
    n_shape = 2 * n_centers + sum(3 + (component.index != 1.0) for component in extended)
    return len(source.components) + n_shape / n_bands


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Sums:
    """What the stamps of N objects are summed up to, in B bands and A apertures; all else follows from it."""

    center: DoubleArray
    """Centre of the model in the coadd's coordinates, (N, 2)."""

    found: BoolArray
    """Whether there are adaptive moments, (N, B)."""

    moments: DoubleArray
    """Centre y, x in the coadd's coordinates, and second moments yy, xx, xy, (N, B, 5); NaN where not found."""

    under_moments: DoubleArray
    """Sums under that Gaussian as in `kernels.photometry.gaussian_sums`, (N, B, N_SUMS); NaN where not found."""

    kron_radius: DoubleArray
    """Kron radius, NaN where there is none, (N,)."""

    flag_kron: BoolArray
    """Whether there is none, or it met a limit, (N,)."""

    fluxes: DoubleArray
    """Flux, variance, norm and flux of the model, in the apertures, the circle of Kron, the box of the model and the
    PSF, (N, A + 3, B, 4)."""

    model: DoubleArray
    """As in `kernels.photometry.model_sums`, (N, B, 4)."""

    residual: DoubleArray
    """As in `kernels.photometry.residual_sums`, (N, B, 10)."""

    has_psf: BoolArray
    """Whether there is a PSF on the stamp, (N, B)."""

    psf_trace: DoubleArray
    """As `_PsfWidths.trace`, (N, B)."""

    n_parameters: DoubleArray
    """Parameters of the model per band, (N,)."""

    @classmethod
    def empty(cls, n: int, n_bands: int, n_apertures: int) -> _Sums:
        """Make arrays to be written."""
        per_band = n, n_bands
        return cls(
            center=np.empty((n, 2)),
            found=np.empty(per_band, dtype=bool),
            moments=np.empty((*per_band, 5)),
            under_moments=np.empty((*per_band, kernels.N_SUMS)),
            kron_radius=np.empty(n),
            flag_kron=np.empty(n, dtype=bool),
            fluxes=np.empty((n, n_apertures + 3, n_bands, 4)),
            model=np.empty((*per_band, 4)),
            residual=np.empty((*per_band, 10)),
            has_psf=np.empty(per_band, dtype=bool),
            psf_trace=np.empty(per_band),
            n_parameters=np.empty(n),
        )


def _sum_up(pixels: _Pixels, radii: tuple[float, ...], widths: _PsfWidths, sums: _Sums, i: int) -> None:
    """Sum up the stamps of one object, the one of row `i`."""
    y, x = pixels.center
    planes = pixels.flux, pixels.flux_variance, pixels.model
    moments, start = sums.moments[i], widths.fwhm / kernels.FWHM
    found = kernels.adaptive_moments(*planes[:2], pixels.usable, y, x, start, moments, sums.under_moments[i])
    sums.found[i] = found
    moments[:, :2] += pixels.origin
    moments[~found] = sums.under_moments[i][~found] = np.nan
    kron, sums.flag_kron[i] = kernels.kron_radius(
        pixels.flux, pixels.variance, pixels.valid, y, x, widths.fwhm.mean(), _KRON_REACH, KRON_FACTOR
    )
    sums.kron_radius[i] = kron
    # A circle of radius zero has no pixel, so its flux is NaN.
    circles = np.array([*radii, 0.0 if math.isnan(kron) else kron])
    rows, columns = pixels.own
    fluxes = sums.fluxes[i]
    fluxes[:-2] = kernels.aperture_sums(*planes, pixels.usable, y, x, circles)
    fluxes[-2] = kernels.box_sums(*planes, pixels.usable, rows.start, rows.stop, columns.start, columns.stop)
    fluxes[-1] = kernels.psf_sums(*planes, pixels.valid, pixels.psf, pixels.variance)
    sums.model[i] = kernels.model_sums(pixels.model, pixels.light, pixels.variance, pixels.valid)
    circles_of_psf = widths.fwhm[:, None] * np.array(_WIDTHS)
    sums.residual[i] = kernels.residual_sums(
        pixels.residual, pixels.variance, pixels.valid, pixels.model, y, x, circles_of_psf
    )
    sums.center[i] = y + pixels.origin[0], x + pixels.origin[1]
    sums.has_psf[i] = pixels.psf.any(axis=(1, 2))
    sums.psf_trace[i] = widths.trace
    sums.n_parameters[i] = pixels.n_parameters


def _columns(
    sums: _Sums, radii: tuple[float, ...], model_err: DoubleArray, noise2: DoubleArray, *, on_model: bool
) -> dict[str, NDArray[Any]]:
    """Find the values of the columns: (N,) for those of the objects, (N, B) for those of the bands.

    model_err (N, B) is the error of the total flux of the model, zero where it is not known; noise2 (B,) the factor by
    which the variance of sums is larger than that of independent pixels, which those of `sums` have.
    """
    y, x, yy, xx, xy = np.moveaxis(sums.moments, 2, 0)
    columns: dict[str, NDArray[Any]] = {
        "y": sums.center[:, 0],
        "x": sums.center[:, 1],
        "kron_radius": sums.kron_radius,
        "flag_kron": sums.flag_kron,
        "centroid_y": y,
        "centroid_x": x,
        "moment_yy": yy,
        "moment_xx": xx,
        "moment_xy": xy,
        "size_ratio": (yy + xx) / sums.psf_trace,
        "snr": _over(sums.under_moments[..., 0], np.sqrt(sums.under_moments[..., 6])),
        MeasurementFlag.MOMENTS: ~sums.found,
    }
    columns |= (
        _fluxes(sums, radii, model_err, noise2, on_model=on_model)
        | _errors_of_moments(sums, on_model)
        | _goodness(sums)
    )
    columns[MeasurementFlag.NO_DATA] = (columns["coverage"] == 0) | ~sums.has_psf
    return columns


def _errors_of_moments(sums: _Sums, on_model: bool) -> dict[str, DoubleArray]:
    """Find the errors of adaptive moments from the noise of the pixels; NaN on models, which have none."""
    flux, noise, of_yy, of_xx, of_xy, of_y4, of_x4, of_y2x2 = np.moveaxis(sums.under_moments, 2, 0)[[0, *range(6, 13)]]
    # Under the weight the moments of a Gaussian image are half its own.
    yy, xx, xy = 0.5 * np.moveaxis(sums.moments[..., 2:], 2, 0)
    var_yy = of_y4 - 2 * yy * of_yy + yy**2 * noise
    var_xx = of_x4 - 2 * xx * of_xx + xx**2 * noise
    both = of_y2x2 - xx * of_yy - yy * of_xx + yy * xx * noise
    scaled = {
        "centroid_y_err": 2 * np.sqrt(of_yy),
        "centroid_x_err": 2 * np.sqrt(of_xx),
        "moment_yy_err": 4 * np.sqrt(np.maximum(var_yy, 0)),
        "moment_xx_err": 4 * np.sqrt(np.maximum(var_xx, 0)),
        "moment_xy_err": 4 * np.sqrt(np.maximum(of_y2x2 - 2 * xy * of_xy + xy**2 * noise, 0)),
        "size_ratio_err": 4 * np.sqrt(np.maximum(var_yy + var_xx + 2 * both, 0)) / sums.psf_trace,
    }
    return {name: np.full_like(flux, np.nan) if on_model else _over(values, flux) for name, values in scaled.items()}


def _over(numerator: DoubleArray, denominator: DoubleArray) -> DoubleArray:
    """Divide; NaN where the denominator is not positive."""
    return np.asarray(np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator > 0))


def _fluxes(
    sums: _Sums, radii: tuple[float, ...], model_err: DoubleArray, noise2: DoubleArray, *, on_model: bool
) -> dict[str, NDArray[Any]]:
    """Find all fluxes, and their errors from the noise of the pixels and from the fit."""
    flux, variance, norm, of_model = np.moveaxis(sums.fluxes, 3, 0).copy()
    for values, power in ((flux, 1), (variance, 2), (of_model, 1)):
        values[:, -1] = _over(values[:, -1], norm[:, -1] ** power)
    error = np.sqrt(variance + _variance_of_fit(sums, of_model, model_err, noise2, on_model=on_model))
    flux[norm <= 0] = error[norm <= 0] = np.nan
    measured: dict[str, NDArray[Any]] = {}
    for k, name in enumerate((*map(aperture_name, radii), "kron", "total", "psf")):
        measured[f"{name}_flux"], measured[f"{name}_flux_err"] = flux[:, k], error[:, k]
    circles = np.concatenate(
        [np.broadcast_to(radii, (len(flux), len(radii))), np.nan_to_num(sums.kron_radius)[:, None]], axis=1
    )
    # Areas are exact but for rounding.
    missing = norm[:, :-2] < (1 - 1e-6) * np.pi * circles[:, :, None] ** 2
    measured[MeasurementFlag.INCOMPLETE] = np.asarray(missing.any(axis=1))
    return measured


def _variance_of_fit(
    sums: _Sums, of_model: DoubleArray, model_err: DoubleArray, noise2: DoubleArray, *, on_model: bool
) -> DoubleArray:
    """Find what the errors of the models add to the variance of fluxes, (N, K, B).

    `of_model` are the same fluxes measured on the model: the error of its total flux is in them in that proportion.
    """
    total, square, overlap, signal = np.moveaxis(sums.model, 2, 0)
    flux = np.broadcast_to(total[:, None], of_model.shape)
    part = np.divide(of_model, flux, out=np.ones_like(of_model), where=flux > 0).clip(0, 1)
    excess = model_err**2
    if not on_model:
        excess -= noise2 * np.divide(total**2, signal, out=np.zeros_like(total), where=signal > 0)
        blendedness = 1 - np.divide(square, overlap, out=np.zeros_like(total), where=overlap > 0)
        excess *= np.clip(_FULL_FIT * blendedness, 0, 1)
    return np.asarray(part**2 * np.maximum(excess, 0)[:, None])


def _goodness(sums: _Sums) -> dict[str, NDArray[Any]]:
    """Find how well the models fit, and how much of the object was seen."""
    columns: dict[str, NDArray[Any]] = {}
    signal, of_residual = sums.model[..., 3], np.moveaxis(sums.residual, 2, 0)
    for circle, name in enumerate(("1fwhm", "3fwhm")):
        chi2, n_pixels, inside = of_residual[3 * circle : 3 * circle + 3]
        share = np.divide(inside, signal, out=np.zeros_like(inside), where=signal > 0)
        dof = n_pixels - sums.n_parameters[:, None] * share
        columns[f"chi2_{name}"], columns[f"dof_{name}"] = _over(chi2, dof), dof
    columns["asymmetry"] = _over(of_residual[6], of_residual[7])
    columns["coverage"] = of_residual[4] / of_residual[9]
    columns["edge_fraction"] = of_residual[8] / of_residual[9]
    return columns
