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
        What is measured on; see `ObjectHandle.stamps`. Errors come from the variance of the stamps, and are NaN for
        "model", which has none.
    bands : sequence of str, optional
        Left out: all. The Kron radius is found in the mean of these.
    apertures : sequence of float, optional
        Radii of circular apertures [pixels].

    Returns
    -------
    table : Table
        One row per object in the order of `result.objects`, with the columns of `catalog.measurement_columns`, in the
        unit of the coadd. Invalid pixels and those outside the image are left out of every sum, and
        `{band}_flag_incomplete` says so; what cannot be measured is NaN, and flagged. The kind and the apertures are
        in the table's `meta`.

    Raises
    ------
    InputError
        If the kind or a band is unknown, a radius is not positive, finite and named once, or the result has no coadd.

    Notes
    -----
    *Apertures*: the exact area of each pixel in the circle times its flux.

    *Kron flux* (Kron 1980): within `KRON_FACTOR` times the mean radius of the light inside six sigma of the object, in
    the mean of the bands weighted by inverse variance, sigma from its adaptive moments. Not less than the width of
    the PSF.

    *PSF flux*: sum(w I) / sum(w P) with w = P / V, P the PSF at the centre of the model and V the variance of the
    image, and the error that the variance of the stamp gives it. Weights of all kinds of stamps are the same; the
    variance of shared pixels as a weight would hand the flux to the faintest of them.

    *Adaptive moments* (Bernstein and Jarvis 2002; Hirata and Seljak 2003): those of the elliptical Gaussian that is its
    own best weight. `snr` is that of the flux under it.

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
    columns = empty_columns(measurement_columns(bands, radii), len(result))
    for name in ("object_id", "y", "x"):
        columns[name][:] = result.objects[name]
    b = [result.bands.index(band) for band in bands]
    psfs, widths = None, _PsfWidths(trace=np.empty(0), fwhm=np.empty(0))
    for index, handle in enumerate(result):
        own = result.psfs[int(handle.row["blend_id"])]
        if own is not psfs:
            psfs, widths = own, _psf_widths(own[b])
        of_object, of_bands = _measure_object(_cut(handle, kind, bands, radii, widths), radii, widths)
        for name, value in of_object.items():
            columns[name][index] = value
        for name, values in of_bands.items():
            for band, value in zip(bands, values, strict=True):
                columns[f"{band}_{name}"][index] = value
    table = make_measurements(columns, bands, radii, result.unit)
    table.meta.update(kind=str(StampKind(kind)), apertures=list(radii))
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
    _, _, yy, xx, xy = states.T
    fwhm = _FWHM * (yy * xx - xy**2) ** 0.25
    fwhm[~found] = fwhm[found].mean() if found.any() else 4.0
    return _PsfWidths(trace=np.where(found, yy + xx, np.nan), fwhm=fwhm)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Pixels:
    """What one object is measured on; arrays have the shape (B, h, w)."""

    flux: FloatArray
    """The stamps."""

    flux_variance: FloatArray
    """Their variance; NaN for models."""

    usable: BoolArray
    """Which of their pixels can be used."""

    variance: FloatArray
    """Variance of the image."""

    valid: BoolArray
    """Which pixels of the image can be used."""

    residual: FloatArray
    """The image less all models."""

    model: FloatArray
    """The model of the object."""

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
    reach = max(*radii, _WIDTHS[1] * widths.fwhm.max()) + 1.0
    nearest = min(y - own.y0, own.y1 - 1 - y, x - own.x0, own.x1 - 1 - x)
    margin = max(0, math.ceil(reach - nearest))
    result, stamps = handle.result, handle.stamps(kind, bands, margin)
    coadd, box = result.coadd, stamps[bands[0]].box
    assert coadd is not None
    in_image = box.shift(-result.origin[0], -result.origin[1])
    window = ([result.bands.index(band) for band in bands], in_image.y, in_image.x)
    valid: BoolArray = np.ascontiguousarray(coadd.valid[window])
    flux = _planes(stamps, "array")
    is_model = StampKind(kind) is StampKind.MODEL
    return _Pixels(
        flux=flux,
        flux_variance=np.full_like(flux, np.nan) if is_model else _planes(stamps, "variance"),
        usable=np.ones_like(valid) if is_model else valid,
        variance=np.ascontiguousarray(coadd.variance[window]),
        valid=valid,
        residual=np.ascontiguousarray(coadd.images[window] - result.model_image()[window]),
        model=_planes(handle.stamps(StampKind.MODEL, bands, margin), "array"),
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
    pixels: _Pixels, radii: tuple[float, ...], widths: _PsfWidths
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Measure one object: values of the columns of the object, and (B,) of those of its bands."""
    states, sums = np.empty((len(pixels.flux), 5)), np.empty((len(pixels.flux), 7))
    found = kernels.adaptive_moments(
        pixels.flux, pixels.flux_variance, pixels.usable, *pixels.center, widths.fwhm / _FWHM, states, sums
    )
    states[~found], sums[~found] = np.nan, np.nan
    y, x, yy, xx, xy = states.T
    columns: dict[str, NDArray[Any]] = {
        "centroid_y": y + pixels.origin[0],
        "centroid_x": x + pixels.origin[1],
        "moment_yy": yy,
        "moment_xx": xx,
        "moment_xy": xy,
        "size_ratio": (yy + xx) / widths.trace,
        "snr": sums[:, 0] / np.sqrt(sums[:, 6]),
        MeasurementFlag.MOMENTS: ~found,
    }
    kron_radius, flag_kron = _kron_radius(pixels, widths)
    columns |= _apertures(pixels, radii, kron_radius) | _total_and_psf(pixels) | _goodness(pixels, widths)
    columns[MeasurementFlag.NO_DATA] = (columns["coverage"] == 0) | np.isnan(widths.trace)
    return {"kron_radius": kron_radius, "flag_kron": flag_kron}, columns


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


def _apertures(pixels: _Pixels, radii: tuple[float, ...], kron_radius: float) -> dict[str, NDArray[Any]]:
    names = [aperture_name(radius) for radius in radii]
    all_radii = np.array(radii)
    if np.isfinite(kron_radius):
        names, all_radii = [*names, "kron"], np.append(all_radii, kron_radius)
    sums = kernels.aperture_sums(pixels.flux, pixels.flux_variance, pixels.usable, *pixels.center, all_radii)
    columns: dict[str, NDArray[Any]] = {}
    for name, (flux, noise2, area) in zip(names, np.moveaxis(sums, 2, 1), strict=True):
        columns[f"{name}_flux"] = np.where(area > 0, flux, np.nan)
        columns[f"{name}_flux_err"] = np.where(area > 0, np.sqrt(noise2), np.nan)
    # Areas are exact but for rounding.
    whole = np.pi * all_radii[:, None] ** 2
    columns[MeasurementFlag.INCOMPLETE] = (sums[:, :, 2] < (1 - 1e-6) * whole).any(axis=0)
    return columns


def _total_and_psf(pixels: _Pixels) -> dict[str, NDArray[Any]]:
    rows, columns = pixels.own
    bounds = rows.start, rows.stop, columns.start, columns.stop
    flux, noise2, n_pixels = kernels.box_sums(pixels.flux, pixels.flux_variance, pixels.usable, *bounds).T
    light, light2, norm = kernels.psf_sums(
        pixels.flux, pixels.flux_variance, pixels.variance, pixels.valid, pixels.psf
    ).T
    return {
        "total_flux": np.where(n_pixels > 0, flux, np.nan),
        "total_flux_err": np.where(n_pixels > 0, np.sqrt(noise2), np.nan),
        "psf_flux": _over(light, norm),
        "psf_flux_err": _over(np.sqrt(light2), norm),
    }


def _goodness(pixels: _Pixels, widths: _PsfWidths) -> dict[str, NDArray[Any]]:
    radii = widths.fwhm[:, None] * np.array(_WIDTHS)
    sums = kernels.residual_sums(pixels.residual, pixels.variance, pixels.valid, pixels.model, *pixels.center, radii)
    columns: dict[str, NDArray[Any]] = {}
    signal = sums[:, 6]
    for circle, name in enumerate(("1fwhm", "3fwhm")):
        chi2, n_pixels, inside = sums[:, 3 * circle : 3 * circle + 3].T
        share = np.divide(inside, signal, out=np.zeros_like(inside), where=signal > 0)
        dof = n_pixels - pixels.n_parameters * share
        columns[f"chi2_{name}"], columns[f"dof_{name}"] = _over(chi2, dof), dof
    columns["asymmetry"] = _over(sums[:, 7], sums[:, 8])
    columns["coverage"] = sums[:, 4] / sums[:, 10]
    columns["edge_fraction"] = sums[:, 9] / sums[:, 10]
    return columns
