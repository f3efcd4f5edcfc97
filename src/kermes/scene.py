"""Component kinds, sources and scenes: what a fitted blend consists of. State only, no algorithm."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kermes.geometry import Box

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FactorizedComponent:
    """One spectrum times one free-form morphology, in the model frame."""

    spectrum: FloatArray
    """Flux of the brightest pixel in each band [unit], shape (B,)."""

    morphology: FloatArray
    """Light distribution, shape of `box`; its largest value is 1."""

    box: Box
    """Pixels of `morphology`, as array index of the coadd."""

    def model(self) -> FloatArray:
        """Evaluate the component, shape (B, h, w) [unit]."""
        return self.spectrum[:, None, None] * self.morphology

    def flux(self) -> NDArray[np.float64]:
        """Total flux in each band [unit], shape (B,)."""
        return self.spectrum * self.morphology.sum(dtype=np.float64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Source:
    """What one peak is modelled as: the sum of its components."""

    peak: tuple[int, int]
    """Peak (y, x), array index of the coadd."""

    components: tuple[FactorizedComponent, ...]
    """May be empty: a source without light."""

    @property
    def box(self) -> Box:
        """Smallest box around all components; empty without components."""
        box = Box(*self.peak, 0, 0)
        for component in self.components:
            box = box | component.box
        return box

    def model(self, n_bands: int) -> FloatArray:
        """Evaluate the source on `box` in the model frame, shape (B, h, w) [unit]."""
        box = self.box
        total = np.zeros((n_bands, *box.shape), dtype=np.float32)
        for component in self.components:
            total[(slice(None), *component.box.within(box))] += component.model()
        return total

    def flux(self, n_bands: int) -> NDArray[np.float64]:
        """Total flux in each band [unit], shape (B,); zero without components."""
        total = np.zeros(n_bands)
        for component in self.components:
            total += component.flux()
        return total


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scene:
    """All sources of one blend, in the order of its peaks."""

    sources: tuple[Source, ...]
    """One per peak."""

    box: Box
    """The blend's pixels, as array index of the coadd; every component lies inside."""

    @property
    def components(self) -> tuple[FactorizedComponent, ...]:
        """All components, source by source."""
        return tuple(component for source in self.sources for component in source.components)
