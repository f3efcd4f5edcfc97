"""Deblend survey images: decide which part of the light belongs to which star or galaxy."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kermes.coadd import Coadd
    from kermes.config import Config
    from kermes.errors import (
        BlendError,
        ConfigError,
        DataWarning,
        FileError,
        InputError,
        KermesError,
        ShapeError,
    )
    from kermes.forced import forced_photometry, light_curves
    from kermes.geometry import Box
    from kermes.io import read
    from kermes.psf import CellPsf
    from kermes.refitting import refit
    from kermes.result import Result, Stamp
    from kermes.store import open_result as open
    from kermes.tile import deblend

__version__ = importlib.metadata.version("kermes")

__all__ = [
    "BlendError",
    "Box",
    "CellPsf",
    "Coadd",
    "Config",
    "ConfigError",
    "DataWarning",
    "FileError",
    "InputError",
    "KermesError",
    "Result",
    "ShapeError",
    "Stamp",
    "__version__",
    "deblend",
    "forced_photometry",
    "light_curves",
    "open",
    "read",
    "refit",
]

_HOMES = {
    "Box": "geometry",
    "CellPsf": "psf",
    "Coadd": "coadd",
    "Config": "config",
    "Result": "result",
    "Stamp": "result",
    "deblend": "tile",
    "forced_photometry": "forced",
    "light_curves": "forced",
    "read": "io",
    "refit": "refitting",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: the command line starts without numpy, astropy and numba."""
    if name not in __all__:
        raise AttributeError(f"module 'kermes' has no attribute {name!r}")
    if name == "open":
        value = importlib.import_module("kermes.store").open_result
    else:
        value = getattr(importlib.import_module(f"kermes.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
