"""Sharing the observed flux among the sources."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kermes.coadd import Coadd
from kermes.geometry import Box
from kermes.kernels import flux as kernels
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


def redistribute(
    images: FloatArray, variance: FloatArray, valid: NDArray[np.bool_], model: FloatArray, total: FloatArray
) -> FloatArray:
    """Give one source its share of the observed flux.

    Parameters
    ----------
    images : ndarray, shape (B, h, w)
        Observed flux per pixel [unit].
    variance : ndarray, shape (B, h, w)
        Its variance [unit^2].
    valid : ndarray, shape (B, h, w)
        True where the pixel may be used.
    model : ndarray, shape (B, h, w)
        Model of the source as observed [unit]; its negative part claims nothing.
    total : ndarray, shape (B, h, w)
        Sum of the positive parts of the models of all sources [unit].

    Returns
    -------
    share : ndarray, shape (B, h, w)
        Flux per pixel [unit]; zero where the pixel is not `claimed`. Over all sources the shares add up to the image.
    """
    share = np.zeros_like(images)
    own = claimed(variance, valid, total) & (model > 0)
    np.divide(model, total, out=share, where=own)
    np.multiply(share, images, out=share, where=own)
    return share


def add_positive(total: FloatArray, models: SourceModels) -> FloatArray:
    """Add the positive parts of the models (S sources) to their sum so far, shape (B, h, w), and return the new sum."""
    total = total.copy()
    kernels.add_positive_models(total, models.pixels, models.boxes, models.offsets)
    return total


def shared_fluxes(
    coadd: Coadd, box: Box, total: FloatArray, models: SourceModels
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum the share of the observed flux that each source of a blend gets.

    Parameters
    ----------
    coadd : Coadd
    box : Box
        Pixels of `total`, as array index of the coadd.
    total : ndarray, shape (B, h, w)
        Sum of the positive parts of the models of all sources of the coadd [unit].
    models : SourceModels
        Sources of the blend as observed, in pixels of `box`.

    Returns
    -------
    flux, flux_err : ndarray, shape (S, B)
        Sum of `redistribute` over the pixels of each source [unit], and its error from the variance of the pixels,
        weighted with the squared share.
    """
    window = (slice(None), box.y, box.x)
    flux, noise2 = kernels.share_fluxes(
        np.ascontiguousarray(coadd.images[window]),
        np.ascontiguousarray(coadd.variance[window]),
        claimed(coadd.variance[window], coadd.valid[window], total),
        np.ascontiguousarray(total),
        models.pixels,
        models.boxes,
        models.offsets,
    )
    return flux, np.sqrt(noise2)
