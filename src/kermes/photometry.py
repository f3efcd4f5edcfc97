"""Measurement on the pixels of one object: apertures, sizes and positions, on any kind of stamp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from astropy.table import Table
from numpy.typing import NDArray

from kermes.catalog import make_measured
from kermes.errors import InputError
from kermes.kernels import photometry as kernels
from kermes.psf import gaussian_fwhm
from kermes.result import ObjectHandle, Result, StampKind

DoubleArray = NDArray[np.float64]

FIRST_SIGMA = 2.355
"""FWHM of a Gaussian over its width."""

LARGEST_MOVE = 2.0
"""Farthest that the centre of the moments may be from that of the model [widths of the PSF]."""


def psf_moments(psf: DoubleArray) -> float:
    """Sum Myy + Mxx of the adaptive moments of a PSF (P, Q) [pix^2]; NaN if they do not converge."""
    sigma = gaussian_fwhm(psf) / FIRST_SIGMA
    y, x = (0.5 * (side - 1) for side in psf.shape)
    found = kernels.adaptive_moments(
        np.ascontiguousarray(psf, dtype=np.float32), np.ones(psf.shape, dtype=np.bool_), y, x, sigma, 2.0 * sigma
    )
    return float(found[2] + found[3]) if found[6] else float("nan")


def _blend_variance(
    handle: ObjectHandle, band: str, margin: int, y: float, x: float, radii: DoubleArray
) -> DoubleArray:
    """Variance of aperture fluxes (R,) from not knowing how the light is divided.

    With m the model of the source and n that of all others: errors that models exchange, dn = -dm, change the share
    m / (m + n) of the light m + n by dm; errors of m by itself change it by dm n / (m + n). Where the others are faint
    only the second kind is left. So what the variance of the flux of m is more than that of m alone is taken times the
    square of 2 n / (m + n), at most of one, and of the part of m in the circle.
    """
    model = np.maximum(handle.stamp(StampKind.MODEL, band, margin).array, 0)
    whole = handle.stamp(StampKind.NEIGHBOR_SUBTRACTED, band, margin)
    assert whole.variance is not None
    assert whole.valid is not None
    flux = float(model.sum(dtype=np.float64))
    squares = np.divide(model**2, whole.variance, out=np.zeros_like(model), where=whole.valid)
    information = float(squares.sum(dtype=np.float64))
    if not flux > 0 or not information > 0:
        return np.zeros(len(radii))
    more = max(float(handle.row[f"{band}_flux_err"]) ** 2 - flux**2 / information, 0.0)
    box = whole.box.shift(-handle.result.origin[0], -handle.result.origin[1])
    total = handle.result.model_image(positive=True)[handle.bands.index(band), box.y, box.x]
    of_others = np.divide((total - model) * model, total, out=np.zeros_like(model), where=total > 0)
    everywhere = np.ones(model.shape, dtype=np.bool_)
    inside, _, _ = kernels.aperture_sums(model, model, everywhere, y, x, radii)
    shared, _, _ = kernels.aperture_sums(of_others, model, everywhere, y, x, radii)
    return np.asarray(more * np.minimum(2 * shared, inside) ** 2 / flux**2)


def measure(
    result: Result,
    kind: StampKind | str = StampKind.NEIGHBOR_SUBTRACTED,
    *,
    radii: Sequence[float] = (3.0, 6.0, 12.0),
    bands: Sequence[str] | None = None,
) -> Table:
    """Measure every object of a result on one kind of stamp.

    Parameters
    ----------
    result : Result
        With its coadd, but for models.
    kind : StampKind or str, optional
        Which pixels to measure on, see `StampKind`.
    radii : sequence of float, optional
        Radii of circular apertures about the centre of the model [pixels].
    bands : sequence of str, optional
        None: all.

    Returns
    -------
    table : Table
        One row per object, in their order, with the columns of `catalog.measured_columns`. NaN for moments that do not
        converge, and for all of an object without a flux in the band.

    Raises
    ------
    InputError
        If the kind or a band is unknown, a radius is not positive, or the result has no coadd.

    Notes
    -----
    Aperture fluxes are sums over circles, pixels on the rim by the part that is inside. Their variance is that of the
    pixels of the stamp, and what not knowing how the light is divided adds: that of the model flux, neighbours and
    shapes free, less that of the model alone, as far as the light in the circle is that of others.

    Centre and second moments are adaptive: weighted with the Gaussian that has the same moments
    (Bernstein & Jarvis 2002). Invalid pixels count as zero in apertures, and as the Gaussian in moments.
    """
    if kind not in list(StampKind):
        raise InputError(f"kind must be one of {', '.join(StampKind)}, got {kind!r}")
    circles = np.array(radii, dtype=np.float64)
    if circles.ndim != 1 or not (circles > 0).all():
        raise InputError(f"radii must be positive numbers of pixels, got {radii!r}")
    names = tuple(result.bands if bands is None else bands)
    numbers = [result._band_index(name) for name in names]
    n_objects = len(result)
    columns: dict[str, Any] = {"object_id": np.asarray(result.objects["object_id"])}
    per_object = {name: np.full((n_objects, len(names)), np.nan) for name in ("y", "x", "yy", "xx", "xy", "size_ratio")}
    sums = np.full((3, n_objects, len(names), len(circles)), np.nan)
    converged = np.zeros((n_objects, len(names)), dtype=np.bool_)
    known: dict[int, list[tuple[float, float]]] = {}
    margin = int(np.ceil(circles.max(initial=0.0)))
    places = np.array([result.objects["y"], result.objects["x"]], dtype=np.float64).T
    fitted = np.array([result.objects["center_y"], result.objects["center_x"]], dtype=np.float64).T
    places = np.where(np.isfinite(fitted), fitted, places)
    has_flux = np.array([np.isfinite(np.asarray(result.objects[f"{name}_flux"])) for name in names]).T
    for row, handle in enumerate(result):
        psfs = result.psfs[int(handle.row["blend_id"])]
        if id(psfs) not in known:
            known[id(psfs)] = [(gaussian_fwhm(psfs[b]), psf_moments(psfs[b])) for b in numbers]
        for b, name in enumerate(names):
            if not has_flux[row, b]:
                continue
            stamp = handle.stamp(kind, name, margin)
            y, x = places[row] - stamp.box.origin
            shape = stamp.array.shape
            variance = np.zeros(shape, dtype=np.float32) if stamp.variance is None else stamp.variance
            valid = np.ones(shape, dtype=np.bool_) if stamp.valid is None else stamp.valid
            array = np.ascontiguousarray(stamp.array)
            variance, valid = np.ascontiguousarray(variance), np.ascontiguousarray(valid)
            sums[:, row, b] = kernels.aperture_sums(array, variance, valid, y, x, circles)
            if stamp.variance is not None:
                sums[1, row, b] += _blend_variance(handle, name, margin, y, x, circles)
            fwhm, of_psf = known[id(psfs)][b]
            sigma = fwhm / FIRST_SIGMA
            found = kernels.adaptive_moments(array, valid, y, x, sigma, LARGEST_MOVE * sigma)
            converged[row, b] = found[6]
            if found[6]:
                moments = (
                    found[0] + stamp.box.y0,
                    found[1] + stamp.box.x0,
                    *found[2:5],
                    (found[2] + found[3]) / of_psf,
                )
                for values, moment in zip(per_object.values(), moments, strict=True):
                    values[row, b] = moment
    for b, name in enumerate(names):
        for r in range(len(circles)):
            columns[f"{name}_aperture_{r}_flux"] = sums[0, :, b, r]
            columns[f"{name}_aperture_{r}_flux_err"] = np.sqrt(sums[1, :, b, r])
            columns[f"{name}_aperture_{r}_coverage"] = sums[2, :, b, r]
        for moment, values in per_object.items():
            columns[f"{name}_moment_{moment}"] = values[:, b]
        columns[f"{name}_moments_converged"] = converged[:, b]
    return make_measured(columns, names, circles.tolist(), result.unit)
