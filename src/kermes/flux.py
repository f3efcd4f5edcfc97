"""Sharing the observed flux among the sources."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kermes.coadd import Coadd, contiguous
from kermes.config import StrayRule, StrayToPoints
from kermes.geometry import Box, box_table
from kermes.kernels import flux as kernels
from kermes.kernels import templates as kernels_templates
from kermes.rendering import SourceModels

FloatArray = NDArray[np.float32]


LEAST_MODEL = 0.05
"""Pixels where all models together stay below this many sigma belong to nobody.

There a source would get noise and next to no light: what it loses, one to three per cent of its flux near the detection
limit, is less than what it would gain in noise.
"""


def claimed(variance: FloatArray, valid: NDArray[np.bool_], total: FloatArray) -> NDArray[np.bool_]:
    """Find the pixels whose light is shared: valid, and with enough light in the models.

    Parameters
    ----------
    variance : ndarray, shape (B, h, w)
        Variance of the observed flux [unit^2].
    valid : ndarray, shape (B, h, w)
        True where the pixel may be used.
    total : ndarray, shape (B, h, w)
        Sum of the positive parts of the models of all sources [unit].
    """
    return np.asarray(valid & (total > LEAST_MODEL * np.sqrt(variance, where=valid, out=np.zeros_like(variance))))


def shares(variance: FloatArray, valid: NDArray[np.bool_], model: FloatArray, total: FloatArray) -> FloatArray:
    """Find what part of each pixel belongs to one source.

    Parameters
    ----------
    variance : ndarray, shape (B, h, w)
        Variance of the observed flux [unit^2].
    valid : ndarray, shape (B, h, w)
        True where the pixel may be used.
    model : ndarray, shape (B, h, w)
        Model of the source as observed [unit]; its negative part claims nothing.
    total : ndarray, shape (B, h, w)
        Sum of the positive parts of the models of all sources [unit].

    Returns
    -------
    share : ndarray, shape (B, h, w)
        From 0 to 1; zero where the pixel is not `claimed`, else the shares of all sources add up to one.
    """
    share = np.zeros_like(model)
    np.divide(model, total, out=share, where=claimed(variance, valid, total) & (model > 0))
    return share


def redistribute(
    images: FloatArray, variance: FloatArray, valid: NDArray[np.bool_], model: FloatArray, total: FloatArray
) -> FloatArray:
    """Give one source its share of the observed flux.

    Parameters
    ----------
    images : ndarray, shape (B, h, w)
        Observed flux per pixel [unit].
    variance, valid, model, total : ndarray, shape (B, h, w)
        As in `shares`.

    Returns
    -------
    flux : ndarray, shape (B, h, w)
        Flux per pixel [unit]; zero where the pixel is not `claimed`. Over all sources it adds up to the image. Its
        variance is the square of the share times that of the pixel.
    """
    share = shares(variance, valid, model, total)
    return np.multiply(share, images, out=share, where=share > 0)


def redistribution_covariance(
    variance: FloatArray, valid: NDArray[np.bool_], first: FloatArray, second: FloatArray, total: FloatArray
) -> FloatArray:
    """Find the covariance of what two sources get of the same pixels.

    Both get a fixed part of one noisy number, so the noise of both goes the same way; different pixels do not covary.
    The covariance of two sums over pixels is the sum of it over the pixels that both have.

    Parameters
    ----------
    variance, valid, total : ndarray, shape (B, h, w)
        As in `shares`.
    first, second : ndarray, shape (B, h, w)
        Models of the two sources as observed [unit]; the same twice gives the variance.

    Returns
    -------
    covariance : ndarray, shape (B, h, w)
        a_1 a_2 V for shares a and the variance V of the pixel [unit^2]; zero where one has no share. The models are
        taken as they are: their own errors are not in it.
    """
    share = shares(variance, valid, first, total)
    product = share * (share if second is first else shares(variance, valid, second, total))
    return np.asarray(np.multiply(product, variance, out=product, where=product > 0))


def replace_neighbors(
    images: FloatArray,
    variance: FloatArray,
    valid: NDArray[np.bool_],
    model: FloatArray,
    total: FloatArray,
    noise: FloatArray,
) -> FloatArray:
    """Leave one source in an image and put noise in the place of all others.

    Parameters
    ----------
    images : ndarray, shape (B, h, w)
        Observed flux per pixel [unit].
    variance, valid, model, total : ndarray, shape (B, h, w)
        As in `shares`.
    noise : ndarray, shape (B, h, w)
        White noise of one.

    Returns
    -------
    replaced : ndarray, shape (B, h, w)
        Flux per pixel [unit]: a I + sqrt((1 - a^2) V) noise where the pixel is `claimed`, for the share a, the image I
        and its variance V; else the image as it is, NaN included.

    Notes
    -----
    A share takes the part a^2 of the variance with it, and the noise fills it up, so that the variance of every pixel
    is V whoever had its light. A source alone keeps its pixels bit by bit. The noise replacer of LSST (Bosch et al.
    2018) has the same aim, but adds no noise to the pixels of the child.
    """
    share = shares(variance, valid, model, total)
    taken = claimed(variance, valid, total)
    missing = np.sqrt(np.maximum(1 - share**2, 0) * np.where(taken, variance, 0))
    return np.where(taken, share * np.where(taken, images, 0) + missing * noise, images)


def add_positive(total: FloatArray, models: SourceModels, box: Box) -> None:
    """Add the positive parts of models, in pixels of a box, to the sum of all of an image (B, H, W), in place."""
    kernels.add_positive_models(total, models.pixels, models.boxes + [box.y0, box.x0, 0, 0], models.offsets)


STRAY_RULES = {
    "trim": kernels_templates.TRIM,
    "r-to-peak": kernels_templates.TO_PEAK,
    "r-to-footprint": kernels_templates.TO_FOOTPRINT,
    "nearest-footprint": kernels_templates.NEAREST,
}
"""Rules of the single-band deblender for light that no model claims, as kernels number them."""


def takes_stray(
    has_light: NDArray[np.bool_], is_point: NDArray[np.bool_], to_points: StrayToPoints
) -> NDArray[np.bool_]:
    """Say which sources get some of the light that no model claims, all (S,).

    Those that have light; points "never", "always", or if "necessary": if there are no others.
    """
    extended = has_light & ~is_point
    if to_points == "never" or (to_points == "necessary" and extended.any()):
        return np.asarray(extended)
    return has_light


def stray_fluxes(
    image: FloatArray,
    variance: FloatArray,
    stray: NDArray[np.bool_],
    peaks: NDArray[np.int64],
    models: Sequence[tuple[FloatArray, Box]],
    takes: NDArray[np.bool_],
    rule: StrayRule,
    clip: float = 0.001,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Share the pixels of one band that no model claims by a rule of the single-band deblender.

    Parameters
    ----------
    image, variance : ndarray, shape (H, W)
    stray : ndarray, shape (H, W)
        The pixels that are shared.
    peaks : ndarray, shape (S, 2)
        Array index (y, x).
    models : sequence of tuple
        The pixels (h, w) of each source, positive where it claims light, and their box inside the image.
    takes : ndarray, shape (S,)
        Which sources may get some.
    rule : str
        "r-to-peak" and "r-to-footprint" share a pixel by 1 / (1 + d^2), d the distance from the peak or from the
        nearest pixel that a source claims; "nearest-footprint" gives it to the nearest source; "trim" to nobody.
    clip : float
        Smaller shares of a pixel are left out.

    Returns
    -------
    flux, flux_err : ndarray, shape (S,)
        What each source gets [unit], and its standard deviation, from the variance of the pixels times the squared
        shares; zero for sources that get nothing. A pixel that is shared must be finite and not zero.

    Notes
    -----
    The rules of the LSST single-band deblender, as in `kermes.templates`. O(M S) for M pixels.
    """
    n_sources = len(models)
    if rule == "trim" or not takes.any():
        return np.zeros(n_sources), np.zeros(n_sources)
    sizes = [model.size for model, _ in models]
    places = np.ascontiguousarray(np.argwhere(stray))
    starts, owners, parts = kernels_templates.share_stray(
        np.ascontiguousarray(image),
        places,
        np.ascontiguousarray(peaks, dtype=np.int64),
        box_table(box for _, box in models),
        np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        np.concatenate([model.ravel() for model, _ in models]).astype(np.float32),
        takes,
        STRAY_RULES[rule],
        float(clip),
    )
    at = tuple(np.repeat(places, np.diff(starts), axis=0).T)
    noise2 = variance[at] * np.square(parts / image[at], dtype=np.float64)
    flux, variance_of_flux = (np.bincount(owners, weights=weights, minlength=n_sources) for weights in (parts, noise2))
    return flux.astype(np.float64), np.sqrt(variance_of_flux)


def shared_fluxes(
    coadd: Coadd, box: Box, total: FloatArray, models: SourceModels
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Sum the share of the observed flux that each source of a blend gets.

    Parameters
    ----------
    coadd : Coadd
    box : Box
        Pixels that the models of the blend can reach, as array index of the coadd.
    total : ndarray, shape (B, H, W)
        Sum of the positive parts of the models of all sources of the coadd [unit].
    models : SourceModels
        Sources of the blend as observed, in pixels of `box`.

    Returns
    -------
    flux, flux_err, contested : ndarray, shape (S, B)
        Sum of `redistribute` over the pixels of each source [unit]; its error from the variance of the pixels, weighted
        with the squared share; and the derivative of that sum by the logarithm of the brightness of the model, the sum
        of the shares a (1 - a) times the image: what of it depends on the models being right [unit].
    """
    planes, (y0, x0) = contiguous((coadd.images, coadd.variance, coadd.valid, total), box)
    flux, noise2, contested = kernels.share_fluxes(
        *planes, models.pixels, models.boxes + [y0, x0, 0, 0], models.offsets, LEAST_MODEL
    )
    return flux, np.sqrt(noise2), contested


def doubt_of_shares(
    contested: NDArray[np.float64],
    flux: NDArray[np.float64],
    flux_err: NDArray[np.float64],
    correlation: NDArray[np.float64],
    neighbor: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Variance that re-distributed fluxes have because the models that share the pixels are fitted to the same pixels.

    Parameters
    ----------
    contested, flux, flux_err : ndarray, shape (B, S)
        What neighbours contest of the share of each source, see `shared_fluxes`, flux of its model and the error of
        that with everything else free [unit].
    correlation : ndarray, shape (B, S)
        Correlation of the flux with that of a neighbour; NaN: not known, like zero.
    neighbor : ndarray, shape (S,)
        Which source that is; -1: none of these.

    Returns
    -------
    ndarray, shape (B, S)
        To be added to the variance of the pixels, weighted with the squared share [unit^2].

    Notes
    -----
    Be w the share of a source of each pixel, and S_l the sum of w times the model of source l for flux one. The model
    fluxes f have covariances C; as estimates of a least-squares fit their covariance with the sum of w times the noise
    is C S. The re-distributed flux of source i changes by the sum of w times the noise, plus df_i, less S df (to first
    order), so that its variance is that of the first, plus C_ii - S^T C S. For shapes that are fitted too, C is the
    covariance with them free. All light that is contested is taken for that of the one neighbour.
    """
    known = flux > flux_err
    contested = np.maximum(contested, 0.0)
    # S_i and S_j times the errors of the two models.
    lost = np.divide(contested, flux, out=np.ones_like(flux), where=known)
    own = (1.0 - np.minimum(lost, 1.0)) * flux_err
    there = known[:, neighbor] & (neighbor >= 0)
    of_neighbor = np.divide(contested, flux[:, neighbor], out=np.zeros_like(flux), where=there)
    other = np.minimum(of_neighbor, 1.0) * np.where(there, flux_err[:, neighbor], 0.0)
    both = np.where(np.isnan(correlation), 0.0, correlation) * own * other
    return np.asarray(np.maximum(flux_err**2 - own**2 - other**2 - 2 * both, 0.0))
