"""What the benchmarks deblend, and the checks that the answers are answers."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

import kermes
from kermes.simulation import simulate_scene

# Six bands as bright as the survey they stand for; every source is bright enough for a peak of its own.
MAGNITUDES = (19.5, 25.0)
PIXELS_PER_SOURCE = 640


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Case:
    """One coadd to deblend, with peaks and footprints."""

    name: str
    coadd: kermes.Coadd
    peaks: NDArray[np.int64]
    footprints: NDArray[np.int64] | None
    """Labels (H, W), or None: detect."""

    def deblend(self, **options: Any) -> kermes.Result:
        """Deblend it."""
        return kermes.deblend(self.coadd, peaks=self.peaks, footprints=self.footprints, **options)


def config_of(model: str | None) -> kermes.Config:
    """Make the configuration that a benchmark was asked for; None: the default model."""
    return kermes.Config() if model is None else kermes.Config(model=model)  # type: ignore[arg-type]


def load_scorer(shared: Path, name: str) -> ModuleType:
    """Import one of the scorers, shared/arena/NAME.py, from where it lies."""
    path = shared / "arena" / f"{name}.py"
    if not path.exists():
        sys.exit(f"{path} is missing: --shared must name the folder with arena/ and data/")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hsc_case(scorer: ModuleType, path: str) -> Case:
    """Load one HSC blend; what lies outside its footprint may not be used."""
    blend = scorer.load(path)
    coadd = kermes.Coadd(
        images=blend["images"], variance=blend["variance"], psfs=blend["psfs"], bands=tuple(blend["bands"])
    )
    return Case(name=Path(path).name, coadd=coadd, peaks=blend["peaks"], footprints=blend["footprint"].astype(np.int64))


def hsc_cases(scorer: ModuleType) -> Iterator[Case]:
    """Load all HSC blends, one after the other."""
    for path in scorer.paths():
        yield hsc_case(scorer, path)


def arena_case(name: str, scene: dict[str, Any]) -> Case:
    """Wrap one scene of the arena; its footprints are detected."""
    coadd = kermes.Coadd(
        images=scene["images"],
        variance=scene["variance"],
        psfs=scene["psfs"],
        bands=tuple(str(band) for band in scene["bands"]),
    )
    return Case(name=name, coadd=coadd, peaks=scene["peaks"], footprints=None)


def simulated_case(
    n_sources: int, seed: int, *, pixels_per_source: int = PIXELS_PER_SOURCE, one_blend: bool = False
) -> Case:
    """Simulate a square field of a given density [pixels per source] with six bands."""
    side = round(np.sqrt(n_sources * pixels_per_source))
    scene = simulate_scene(n_sources=n_sources, shape=(side, side), seed=seed, magnitudes=MAGNITUDES)
    footprints = np.ones((side, side), dtype=np.int64) if one_blend else None
    return Case(name=f"{n_sources} sources, seed {seed}", coadd=scene.coadd, peaks=scene.peaks, footprints=footprints)


def used_pixels(case: Case) -> NDArray[np.bool_]:
    """Pixels that chi2 is summed over: valid, and inside the footprint if there is one; shape (B, H, W)."""
    valid = case.coadd.valid & (case.coadd.variance > 0)
    return valid if case.footprints is None else valid & (case.footprints > 0)


def reduced_chi2(case: Case, result: kermes.Result) -> float:
    """Mean of (model - image)^2 / variance over all bands and used pixels."""
    used = used_pixels(case)
    residual = (result.model_image()[used] - case.coadd.images[used]).astype(np.float64)
    return float(np.mean(residual**2 / case.coadd.variance[used]))


def check(case: Case, result: kermes.Result, largest_chi2: float = 5.0) -> float:
    """Stop unless every peak has its row, all fluxes are finite and the model looks like the image.

    Returns the reduced chi2.
    """
    objects = result.objects
    if sorted(objects["peak_index"]) != list(range(len(case.peaks))):
        sys.exit(f"{case.name}: {len(objects)} rows for {len(case.peaks)} peaks")
    for band in result.bands:
        for column in ("flux", "flux_err", "redistributed_flux"):
            if not np.isfinite(np.asarray(objects[f"{band}_{column}"], dtype=float)).all():
                sys.exit(f"{case.name}: {band}_{column} is not finite")
    chi2 = reduced_chi2(case, result)
    if not chi2 < largest_chi2:
        sys.exit(f"{case.name}: reduced chi2 {chi2:.3f} is above {largest_chi2}")
    return chi2
