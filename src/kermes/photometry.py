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
from kermes.result import ObjectHandle, Result, Stamp, StampKind
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
_FWHM = 2.0 * np.sqrt(2.0 * np.log(2.0))  # full width at half maximum of a Gaussian of sigma one


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

    *Errors of fluxes*: the variance of the stamp, summed as the flux is, and what the fit adds. With s the error of the
    model's total flux, m the model and p the part of its flux that the same measurement finds on it, that is p^2 times
    the excess of s^2 over what noise alone makes it, sum(m)^2 / sum(m^2 / V): the residual of a least-squares fit does
    not covary with its parameters, and the noise of the pixels is counted already. Most of it is the doubt whose light
    it is, of which there is none for a source alone: it is faded in with the blendedness 1 - (m . m) / (A . m) as
    observed, A the light of all models, and counts in full from a quarter. On "model", p s is all there is.

    *Kron flux* (Kron 1980): within `KRON_FACTOR` times the mean radius of the light inside six sigma of the object, in
    the mean of the bands weighted by inverse variance, sigma from its adaptive moments. Not less than the width of
    the PSF.

    *PSF flux*: sum(w I) / sum(w P) with w = P / V, P the PSF at the centre of the model and V the variance of the
    image, and the error that the variance of the stamp gives it. Weights of all kinds of stamps are the same; the
    variance of shared pixels as a weight would hand the flux to the faintest of them.

    *Adaptive moments* (Bernstein and Jarvis 2002; Hirata and Seljak 2003): those of the elliptical Gaussian that is its
    own best weight. `snr` is that of the flux under it, by the noise of the pixels; NaN on "model", which has none.

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
    if result.coadd is None:
        raise InputError("measure needs the images: open the result with coadd=")
    b = [result.bands.index(band) for band in bands]
    model_err = np.nan_to_num([np.asarray(result.objects[f"{band}_flux_err"], dtype=float) for band in bands]).T
    psfs, widths = None, _PsfWidths(trace=np.empty(0), fwhm=np.empty(0))
    rows = []
    for index, handle in enumerate(result):
        own = result.psfs[int(handle.row["blend_id"])]
        if own is not psfs:
            psfs, widths = own, _psf_widths(own[b])
        pixels = _cut(handle, kind, bands, radii, widths)
        y, x = handle.center
        rows.append({"y": y, "x": x} | _measure_object(pixels, radii, widths, model_err[index]))
    columns = empty_columns(measurement_columns(bands, radii), len(result))
    columns["object_id"][:] = result.objects["object_id"]
    for name in rows[0] if rows else ():
        values = np.array([row[name] for row in rows])
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
    states, sums = np.empty((len(psfs), 5)), np.empty((len(psfs), 7))
    middle = [float(side // 2) for side in stamps.shape[1:]]
    start = np.full(len(psfs), 1.5)
    found = kernels.adaptive_moments(stamps, stamps, np.ones(stamps.shape, dtype=bool), *middle, start, states, sums)
    states[~found] = np.nan
    _, _, yy, xx, xy = states.T
    fwhm = _FWHM * (yy * xx - xy**2) ** 0.25
    fwhm[~found] = fwhm[found].mean() if found.any() else 4.0
    return _PsfWidths(trace=yy + xx, fwhm=fwhm)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Pixels:
    """What one object is measured on; arrays have the shape (B, h, w)."""

    flux: FloatArray
    """The stamps."""

    flux_variance: FloatArray
    """Their variance; zero for models."""

    is_model: bool
    """Whether they are models."""

    usable: BoolArray
    """Which of their pixels can be used."""

    variance: FloatArray
    """Variance of the image."""

    valid: BoolArray
    """Which pixels of the image can be used."""

    residual: FloatArray
    """The image less all models; may be NaN where it is not valid."""

    model: FloatArray
    """The model of the object."""

    model_sums: DoubleArray
    """Sums over it, (B, 4); see `kernels.photometry.model_sums`."""

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
    handle: ObjectHandle, kind: StampKind | str, bands: tuple[str, ...], radii: tuple[float, ...], widths: _PsfWidths
) -> _Pixels:
    """Cut out everything on a box that holds the apertures."""
    (y, x), own = handle.center, handle.box
    reach = max([*radii, _WIDTHS[1] * widths.fwhm.max()]) + 1.0
    nearest = min(y - own.y0, own.y1 - 1 - y, x - own.x0, own.x1 - 1 - x)
    margin = max(0, math.ceil(reach - nearest))
    result, stamps = handle.result, handle.stamps(kind, bands, margin)
    coadd, box = result.coadd, stamps[bands[0]].box
    assert coadd is not None
    in_image = box.shift(-result.origin[0], -result.origin[1])
    b = [result.bands.index(band) for band in bands]
    image, variance, light = (
        plane[:, in_image.y, in_image.x][b] for plane in (coadd.images, coadd.variance, result.model_image())
    )
    valid = coadd.valid[:, in_image.y, in_image.x][b]
    model = _planes(handle.stamps(StampKind.MODEL, bands, margin), "array")
    flux = _planes(stamps, "array")
    is_model = StampKind(kind) is StampKind.MODEL
    return _Pixels(
        flux=flux,
        flux_variance=np.zeros_like(flux) if is_model else _planes(stamps, "variance"),
        is_model=is_model,
        usable=np.ones_like(valid) if is_model else valid,
        variance=variance,
        valid=valid,
        residual=image - light,
        model=model,
        model_sums=kernels.model_sums(model, light, variance, valid),
        psf=_planes(handle.psf_stamps(bands, margin), "array"),
        center=(y - box.y0, x - box.x0),
        origin=box.origin,
        own=own.within(box),
        n_parameters=_n_parameters(handle.source, len(result.bands)),
    )


def _planes(stamps: dict[str, Stamp], name: str) -> NDArray[Any]:
    """Stack one array of the stamps of all bands."""
    return np.stack([getattr(stamp, name) for stamp in stamps.values()])


def _n_parameters(source: Source, n_bands: int) -> float:
    """Parameters of a model per band: fluxes, and its share of those of the shape, which all bands have in common."""
    profiles = [component for component in source.components if isinstance(component, ProfileComponent)]
    extended = [component for component in profiles if not component.is_point]
    # The centre; radius and shear of each profile, and the index of a Sersic profile.
    n_shape = 2 * bool(profiles) + sum(3 + (component.index != 1.0) for component in extended)
    return len(source.components) + n_shape / n_bands


def _measure_object(
    pixels: _Pixels, radii: tuple[float, ...], widths: _PsfWidths, model_err: DoubleArray
) -> dict[str, Any]:
    """Measure one object: a value for the columns of the object, (B,) for those of its bands.

    model_err (B,) is the error of the total flux of its model, zero where it is not known.
    """
    states, sums = np.empty((len(pixels.flux), 5)), np.empty((len(pixels.flux), 7))
    found = kernels.adaptive_moments(
        pixels.flux, pixels.flux_variance, pixels.usable, *pixels.center, widths.fwhm / _FWHM, states, sums
    )
    states[~found], sums[~found] = np.nan, np.nan
    y, x, yy, xx, xy = states.T
    kron_radius, flag_kron = _kron_radius(pixels, widths)
    columns: dict[str, Any] = {
        "kron_radius": kron_radius,
        "flag_kron": flag_kron,
        "centroid_y": y + pixels.origin[0],
        "centroid_x": x + pixels.origin[1],
        "moment_yy": yy,
        "moment_xx": xx,
        "moment_xy": xy,
        "size_ratio": (yy + xx) / widths.trace,
        "snr": _over(sums[:, 0], np.sqrt(sums[:, 6])),
        MeasurementFlag.MOMENTS: ~found,
    }
    columns |= _fluxes(pixels, radii, kron_radius, model_err) | _goodness(pixels, widths)
    columns[MeasurementFlag.NO_DATA] = (columns["coverage"] == 0) | ~pixels.psf.any(axis=(1, 2))
    return columns


def _over(numerator: DoubleArray, denominator: DoubleArray) -> DoubleArray:
    """Divide; NaN where the denominator is not positive."""
    return np.asarray(np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator > 0))


def _kron_radius(pixels: _Pixels, widths: _PsfWidths) -> tuple[float, bool]:
    """Find the Kron radius in the mean of the bands; NaN without one, and whether there is none or it met a limit."""
    mean, used = np.empty(pixels.flux.shape[1:], dtype=np.float32), np.empty(pixels.flux.shape[1:], dtype=bool)
    kernels.mean_of_bands(pixels.flux, pixels.variance, pixels.valid, mean, used)
    state, sums = np.empty((1, 5)), np.empty((1, 7))
    fwhm = widths.fwhm.mean()
    start = np.array([fwhm / _FWHM])
    if not kernels.adaptive_moments(mean[None], mean[None], used[None], *pixels.center, start, state, sums)[0]:
        return np.nan, True
    reach = _KRON_REACH * math.sqrt(0.5 * (state[0, 2] + state[0, 3]))
    flux, moment = kernels.radial_sums(mean, used, *pixels.center, reach)
    if not (flux > 0 and moment > 0):
        return np.nan, True
    kron = KRON_FACTOR * moment / flux
    return float(np.clip(kron, fwhm, reach)), not fwhm <= kron <= reach


def _fluxes(
    pixels: _Pixels, radii: tuple[float, ...], kron_radius: float, model_err: DoubleArray
) -> dict[str, NDArray[Any]]:
    """Measure all fluxes, and their errors from the noise of the pixels and from the fit."""
    # A circle of radius zero has no pixel, so its flux is NaN.
    circles = np.array([*radii, np.nan_to_num(kron_radius)])
    planes = pixels.flux, pixels.flux_variance, pixels.model
    rows, columns = pixels.own
    in_circles = kernels.aperture_sums(*planes, pixels.usable, *pixels.center, circles)
    in_box = kernels.box_sums(*planes, pixels.usable, rows.start, rows.stop, columns.start, columns.stop)
    in_psf = kernels.psf_sums(*planes, pixels.valid, pixels.psf, pixels.variance)
    flux, variance, norm, of_model = np.moveaxis(np.concatenate([in_circles, in_box[None], in_psf[None]]), 2, 0)
    for sums, power in ((flux, 1), (variance, 2), (of_model, 1)):
        sums[-1] = _over(sums[-1], norm[-1] ** power)
    error = np.sqrt(variance + _variance_of_fit(pixels, of_model, model_err))
    flux[norm <= 0] = error[norm <= 0] = np.nan
    measured: dict[str, NDArray[Any]] = {}
    for k, name in enumerate((*map(aperture_name, radii), "kron", "total", "psf")):
        measured[f"{name}_flux"], measured[f"{name}_flux_err"] = flux[k], error[k]
    # Areas are exact but for rounding.
    missing = norm[: len(circles)] < (1 - 1e-6) * np.pi * circles[:, None] ** 2
    measured[MeasurementFlag.INCOMPLETE] = np.asarray(missing.any(axis=0))
    return measured


def _variance_of_fit(pixels: _Pixels, of_model: DoubleArray, model_err: DoubleArray) -> DoubleArray:
    """Find what the errors of the models add to the variance of fluxes, (..., B).

    `of_model` are the same fluxes measured on the model: the error of its total flux is in them in that proportion.
    """
    flux, square, overlap, signal = pixels.model_sums.T
    part = np.divide(of_model, flux, out=np.ones_like(of_model), where=flux > 0).clip(0, 1)
    excess = model_err**2
    if not pixels.is_model:
        excess -= np.divide(flux**2, signal, out=np.zeros_like(flux), where=signal > 0)
        blendedness = 1 - np.divide(square, overlap, out=np.zeros_like(flux), where=overlap > 0)
        excess *= np.clip(_FULL_FIT * blendedness, 0, 1)
    return np.asarray(part**2 * np.maximum(excess, 0))


def _goodness(pixels: _Pixels, widths: _PsfWidths) -> dict[str, NDArray[Any]]:
    radii = widths.fwhm[:, None] * np.array(_WIDTHS)
    sums = kernels.residual_sums(pixels.residual, pixels.variance, pixels.valid, pixels.model, *pixels.center, radii)
    columns: dict[str, NDArray[Any]] = {}
    signal = pixels.model_sums[:, 3]
    for circle, name in enumerate(("1fwhm", "3fwhm")):
        chi2, n_pixels, inside = sums[:, 3 * circle : 3 * circle + 3].T
        share = np.divide(inside, signal, out=np.zeros_like(inside), where=signal > 0)
        dof = n_pixels - pixels.n_parameters * share
        columns[f"chi2_{name}"], columns[f"dof_{name}"] = _over(chi2, dof), dof
    columns["asymmetry"] = _over(sums[:, 6], sums[:, 7])
    columns["coverage"] = sums[:, 4] / sums[:, 9]
    columns["edge_fraction"] = sums[:, 8] / sums[:, 9]
    return columns
