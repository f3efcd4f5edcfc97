"""Files that come with this package and are given to programs of the LSST pipelines by name."""

from importlib.resources import files
from pathlib import Path

_HERE = Path(str(files("kermes.lsst")))

CONFIG_DIR = _HERE / "configs"
"""Folder that tells a Butler of the storage classes, as DAF_BUTLER_CONFIG_PATH or `searchPaths` wants it."""

SEED_CONFIG = CONFIG_DIR / "seed.yaml"
"""Configuration of a new repository that knows the storage classes, for `Butler.makeRepo` or ``butler create``."""

PIPELINE = _HERE / "pipelines" / "deblend.yaml"
"""Pipeline that deblends patches and measures their objects in every band."""

VISIT_PIPELINE = _HERE / "pipelines" / "visits.yaml"
"""Pipeline that deblends single visits."""

BPS_CONFIG = _HERE / "bps" / "local.yaml"
"""Submission of a pipeline to the cores of one machine, for ``bps submit``."""
