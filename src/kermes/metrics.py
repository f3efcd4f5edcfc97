"""How blended each source is."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from astropy.table import Table
from numpy.typing import ArrayLike, NDArray

from kermes.coadd import Coadd, contiguous
from kermes.errors import InputError
from kermes.geometry import Box
from kermes.kernels import flux as kernels_flux
from kermes.kernels import metrics as kernels
from kermes.rendering import Packed, SourceModels

DoubleArray = NDArray[np.float64]
FloatArray = NDArray[np.float32]

LEAST_MODEL = 0.1
"""As observed, a source has the pixels where its model is above this many sigma."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlendMetrics:
    """Overlap of each source of a blend with all others, in the model frame, each (S, B)."""

    max_overlap: DoubleArray
    """Largest flux of the neighbours in a pixel of the source [unit]."""

    flux_overlap: DoubleArray
    """Flux of the neighbours in all pixels of the source [unit]."""

    flux_overlap_fraction: DoubleArray
    """flux_overlap over the flux of the source; 0 for a source without flux."""

    blendedness: DoubleArray
    """1 - (m . m) / (A . m), m the model of the source and A that of all; 0 alone or without flux."""


def blend_metrics(packed: Packed, n_sources: int, shape: tuple[int, int]) -> BlendMetrics:
    """Measure how much the sources of a blend overlap in the model frame.

    Parameters
    ----------
    packed : Packed
        Components of all sources, all of them factorized; for any mix see `model_metrics`.
    n_sources : int
        Number of sources, with or without components.
    shape : tuple of int
        Height and width of the blend.
    """
    boxes, offsets = kernels_flux.source_boxes(packed.boxes, packed.sources, n_sources)
    pixels = kernels_flux.combine_components(
        packed.morphologies[None], packed.boxes, packed.offsets, packed.sources, packed.spectra, boxes, offsets
    )
    return model_metrics(SourceModels(boxes=boxes, offsets=offsets, pixels=pixels), shape)


def model_metrics(models: SourceModels, shape: tuple[int, int]) -> BlendMetrics:
    """Measure how much the models of the sources of a blend overlap.

    The pixels of a source are those where its model is positive in any band.

    Parameters
    ----------
    models : SourceModels
        In the model frame: from `rendering.frame_models`.
    shape : tuple of int
        Height and width of the blend.

    Notes
    -----
    The metrics of the LSST deblender (Moolekamp et al., meas_extensions_scarlet); blendedness after Bosch et al. 2018,
    section 4.9.11.
    """
    largest, others, fraction, blendedness = kernels.blend_metrics(models.pixels, models.boxes, models.offsets, shape)
    return BlendMetrics(
        max_overlap=largest, flux_overlap=others, flux_overlap_fraction=fraction, blendedness=blendedness
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ObservedMetrics:
    """Overlap of each source of a blend with all others as observed, each (S, B); 0 without a pixel above the noise."""

    max_overlap: DoubleArray
    """Largest light of the neighbours in a pixel of the source [sigma of the pixel]."""

    overlap_fraction: DoubleArray
    """Light of the neighbours in its pixels over its own there."""

    blendedness: DoubleArray
    """1 - (m . m) / (A . m), pixels weighted with the inverse variance."""


def observed_metrics(coadd: Coadd, box: Box, total: FloatArray, models: SourceModels) -> ObservedMetrics:
    """Measure how much the sources of a blend overlap with all others as observed, in units of the noise.

    The pixels of a source are the valid ones where its model is above `LEAST_MODEL` sigma, so that what nobody can see
    does not count.

    Parameters
    ----------
    coadd : Coadd
    box : Box
        Pixels that the models of the blend can reach, as array index of the coadd.
    total : ndarray, shape (B, H, W)
        Sum of the positive parts of the models of all sources of the coadd [unit].
    models : SourceModels
        Sources of the blend as observed, in pixels of `box`.
    """
    planes, (y0, x0) = contiguous((total, coadd.variance, coadd.valid), box)
    largest, fraction, blendedness = kernels.observed_metrics(
        *planes, models.pixels, models.boxes + [y0, x0, 0, 0], models.offsets, LEAST_MODEL
    )
    return ObservedMetrics(max_overlap=largest, overlap_fraction=fraction, blendedness=blendedness)


FRACTIONS = ("overlap_above_noise", "overlap_above_5_percent", "blendedness_above_5_percent", "any")
"""Names of the fractions of `overlap_fractions`."""


def overlap_fractions(objects: Table, band: str) -> dict[str, tuple[float, float]]:
    """Say which fraction of objects overlaps with others, in four ways.

    Parameters
    ----------
    objects : Table
        Of a result.
    band : str
        One of its bands.

    Returns
    -------
    fractions : dict of str to tuple of float
        By `FRACTIONS`: some pixel with more light of neighbours than noise; light of neighbours of at least 5 % of its
        own; blendedness above 0.05; any of these. First with the overlap in the model frame, then with that as
        observed; the first one of the four is the same for both. NaN if no object has a flux in the band.

    Raises
    ------
    InputError
        If the objects have no such band.

    Notes
    -----
    These are the fractions that Moolekamp gave for the Hyper Suprime-Cam (13.8, 7.8, 4.5 and 13.8 % of 1.3 million
    sources in r).
    """
    if f"{band}_observed_blendedness" not in objects.colnames:
        bands = ", ".join(n.removesuffix("_observed_blendedness") for n in objects.colnames if "_observed_bl" in n)
        raise InputError(f"band must be one of {bands or 'a result with metrics as observed'}, got {band!r}")
    known = np.isfinite(np.asarray(objects[f"{band}_flux"], dtype=float))

    def column(name: str) -> DoubleArray:
        return np.asarray(np.asarray(objects[f"{band}_{name}"], dtype=np.float64)[known])

    above = column("observed_max_overlap") > 1
    found = []
    for prefix, share in (("", "flux_overlap_fraction"), ("observed_", "observed_overlap_fraction")):
        much, blended = column(share) >= 0.05, column(f"{prefix}blendedness") > 0.05
        found.append([above, much, blended, above | much | blended])
    means = [[float(np.mean(hit)) if hit.size else np.nan for hit in hits] for hits in found]
    return dict(zip(FRACTIONS, zip(*means, strict=True), strict=True))


# ---------------------------------------------------------------- metrics of others

Metric = Callable[[FloatArray, FloatArray, FloatArray, NDArray[np.bool_]], ArrayLike]
"""A metric of one object: ``metric(model, others, variance, valid)``, each (B, h, w), on the pixels of the object: its
model as observed, the sum of the positive parts of those of all others, and the variance and validity of the pixels.
Returns one number per band, shape (B,)."""

_REGISTERED: dict[str, tuple[Metric, str]] = {}

ENTRY_POINTS = "kermes.metrics"
"""Packages that are installed may bring metrics: entry points of this group, whose names are those of the metrics."""


def register_metric(name: str, metric: Metric, description: str = "") -> None:
    """Add a metric to those that `Result.registered_metrics` measures.

    Parameters
    ----------
    name : str
        Column that it gets in each band, ``{band}_{name}``; an earlier metric of that name is replaced.
    metric : callable
        See `Metric`.
    description : str, optional
        One line; left out, the first one of its docstring.

    Raises
    ------
    InputError
        If the name is no identifier, or the metric cannot be called.

    Examples
    --------
    >>> import numpy as np
    >>> from kermes.metrics import register_metric, registered_metrics
    >>> def brightest_neighbor(model, others, variance, valid):
    ...     "Largest light of all others [sigma]."
    ...     return np.where(valid, others / np.sqrt(variance), 0).max(axis=(1, 2))
    >>> register_metric("brightest_neighbor", brightest_neighbor)
    >>> registered_metrics()["brightest_neighbor"][1]
    'Largest light of all others [sigma].'
    """
    if not name.isidentifier():
        raise InputError(f"name must be an identifier, so that it can name a column, got {name!r}")
    if not callable(metric):
        raise InputError(f"metric must be callable, got {type(metric).__name__}")
    first_line = (metric.__doc__ or "").strip().partition("\n")[0]
    _REGISTERED[name] = metric, description or first_line


def registered_metrics() -> dict[str, tuple[Metric, str]]:
    """List the metrics that were registered, and those of installed packages: function and description by name."""
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        if point.name not in _REGISTERED:
            register_metric(point.name, point.load())
    return dict(_REGISTERED)
