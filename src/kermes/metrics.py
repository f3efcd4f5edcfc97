"""How blended each source is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kermes.kernels import flux as kernels_flux
from kermes.kernels import metrics as kernels
from kermes.rendering import Packed, SourceModels

DoubleArray = NDArray[np.float64]


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
