"""kermes in the pipelines of LSST: images of lsst.images, datasets of a Butler, pipeline tasks.

Needs the packages of the extra ``lsst``, for which Python must be 3.12 or newer. The rest of kermes never imports this.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from kermes.errors import InputError
from kermes.lsst.paths import BPS_CONFIG, CONFIG_DIR, PIPELINE, SEED_CONFIG, VISIT_PIPELINE

if TYPE_CHECKING:
    from kermes.lsst.butler import read_coadd, read_scarlet_dataset
    from kermes.lsst.images import coadd_of_images
    from kermes.lsst.repository import make_repository
    from kermes.lsst.tasks import DeblendPatchTask, DeblendVisitTask, ForcedPatchTask

__all__ = [
    "BPS_CONFIG",
    "CONFIG_DIR",
    "PIPELINE",
    "SEED_CONFIG",
    "VISIT_PIPELINE",
    "DeblendPatchTask",
    "DeblendVisitTask",
    "ForcedPatchTask",
    "coadd_of_images",
    "make_repository",
    "read_coadd",
    "read_scarlet_dataset",
]

_HOMES = {
    "DeblendPatchTask": "tasks",
    "DeblendVisitTask": "tasks",
    "ForcedPatchTask": "tasks",
    "coadd_of_images": "images",
    "make_repository": "repository",
    "read_coadd": "butler",
    "read_scarlet_dataset": "butler",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: a task does not need what makes repositories, nor the other way."""
    if name not in _HOMES:
        raise AttributeError(f"module 'kermes.lsst' has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(f"kermes.lsst.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("lsst", "starlink", "astro_metadata_translator"):
            raise
        raise InputError(
            f"kermes.lsst.{name} needs {error.name}, which is not installed: pip install 'kermes[lsst]', with Python "
            f"3.12 or newer (this is {sys.version_info.major}.{sys.version_info.minor})"
        ) from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
