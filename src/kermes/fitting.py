"""The fit of one blend."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kermes.coadd import Blend
from kermes.config import FitConfig
from kermes.constraints import monotonic_weights, table_radius
from kermes.general_fitting import fit_packed_general
from kermes.kernels import fitting as kernels
from kermes.rendering import Convolution, Packed


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fit:
    """What the fit of one blend ended with."""

    packed: Packed
    """Fitted components."""

    losses: NDArray[np.float64]
    """Half the sum of weight * (model - image)^2 at each comparison with the pixels, from the start to the end."""

    iterations: int
    """Number of steps taken."""

    converged: bool
    """Whether the loss stopped falling before the iterations ran out."""


def fit_packed(packed: Packed, blend: Blend, convolution: Convolution, config: FitConfig) -> Fit:
    """Fit spectra and morphologies of all components of a blend together.

    Parameters
    ----------
    packed : Packed
        Where to start; every component lies inside the blend.
    blend : Blend
        Pixels without weight are left out. Must be finite.
    convolution : Convolution
        From the model frame to the pixels of the blend.
    config : FitConfig

    Returns
    -------
    fit : Fit
        Components in the order of `packed`.

    Notes
    -----
    The scheme "amsgrad" runs compiled; the others, soft symmetry and connected morphologies take the general path.
    """
    if config.scheme != "amsgrad" or config.symmetry_strength > 0 or config.connected:
        return fit_packed_general(packed, blend, convolution, config)
    noise = np.nan_to_num(blend.noise_rms, nan=1.0).astype(np.float32)
    radius = table_radius(convolution.shape)
    boxes, offsets, morphologies, spectra, losses, iterations, converged = kernels.fit_components(
        blend.images,
        blend.weights,
        convolution.transforms,
        convolution.width,
        noise,
        packed.boxes,
        packed.offsets,
        np.ascontiguousarray(blend.peaks[packed.sources]),
        packed.morphologies,
        np.maximum(packed.spectra, np.float32(1e-20)),
        monotonic_weights(radius, config.monotonic_weighting, config.min_gradient),
        config.max_iterations,
        config.exact_every,
        config.patience,
        config.tolerance,
        config.spectrum_step,
        config.morphology_step,
        config.background_threshold,
        config.resize_every,
        config.monotonic,
        config.symmetric,
        False,
    )
    fitted = Packed(boxes=boxes, offsets=offsets, morphologies=morphologies, spectra=spectra, sources=packed.sources)
    return Fit(packed=fitted, losses=losses, iterations=int(iterations), converged=bool(converged))
