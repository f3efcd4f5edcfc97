"""Results and scarlet models as datasets of a Butler."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lsst.daf.butler import Butler, DatasetRef, FormatterV2, StorageClassDelegate

from kermes import store
from kermes.coadd import Coadd
from kermes.errors import FileError
from kermes.geometry import Box
from kermes.io.scarlet import ScarletModels, read_scarlet_models, scarlet_bytes, selected
from kermes.io.scarlet_results import result_of_scarlet
from kermes.lsst.images import coadd_of_images, in_order, lsst_box
from kermes.result import Result

PATCH = ("skymap", "tract", "patch")
PATCH_BAND = (*PATCH, "band")
DETECTOR = ("instrument", "visit", "detector")
"""Dimensions of what belongs to a patch, to one band of it, and to one detector of a visit."""

TABLES = ("objects", "parents", "blends", "candidates")
"""Components of a stored result that are tables."""


# ---------------------------------------------------------------- formatters


class ResultFormatter(FormatterV2):
    """Stores a `kermes.result.Result` as one file ``.kermes``.

    Read parameters are `object_id` and `blend_id`, a number or several: a part of the result, see `Result.select`, of
    which only what it needs is read. Components are the tables objects, parents, blends and candidates, and metadata.
    """

    default_extension = ".kermes"
    unsupported_parameters: frozenset[str] = frozenset()
    can_read_from_local_file = True

    def read_from_local_file(self, path: str, component: str | None = None, expected_size: int = -1) -> Any:
        """Read the result, a part of it, or a component."""
        parameters = self.file_descriptor.parameters or {}
        # The file may be one of a cache, which does not keep it: what outlives this call must not need it.
        result = store.open_result(path if parameters or component else Path(path).read_bytes())
        return _component(_part(result, parameters), component)

    def to_bytes(self, in_memory_dataset: Result) -> bytes:
        """Make the content of the file."""
        return store.result_bytes(in_memory_dataset)


class ScarletFormatter(FormatterV2):
    """Stores `kermes.io.scarlet.ScarletModels` as a ``.scarlet`` archive, as the LSST pipelines do.

    The read parameter is `blend_id`, the number of a top-level blend or isolated source, or several. The component
    metadata holds the PSFs and the bands.
    """

    default_extension = ".scarlet"
    unsupported_parameters: frozenset[str] = frozenset()
    can_read_from_local_file = True

    def read_from_local_file(self, path: str, component: str | None = None, expected_size: int = -1) -> Any:
        """Read the models, some of them, or the metadata."""
        wanted = [] if component == "metadata" else _several(self.file_descriptor.parameters, "blend_id")
        models = read_scarlet_models(path, wanted)
        return models.metadata if component == "metadata" else models

    def to_bytes(self, in_memory_dataset: ScarletModels) -> bytes:
        """Make the content of the file."""
        return scarlet_bytes(in_memory_dataset)


class ResultDelegate(StorageClassDelegate):
    """Components and parameters of results in memory."""

    def can_accept(self, inMemoryDataset: Any) -> bool:
        """Whether it is a result."""
        return isinstance(inMemoryDataset, Result)

    def getComponent(self, composite: Any, componentName: str) -> Any:
        """Take a component."""
        return _component(composite, componentName)

    def handleParameters(self, inMemoryDataset: Any, parameters: Mapping[str, Any] | None = None) -> Any:
        """Take a part."""
        return _part(inMemoryDataset, parameters or {})


class ScarletDelegate(StorageClassDelegate):
    """Components and parameters of scarlet models in memory."""

    def can_accept(self, inMemoryDataset: Any) -> bool:
        """Whether it is one."""
        return isinstance(inMemoryDataset, ScarletModels)

    def getComponent(self, composite: Any, componentName: str) -> Any:
        """Take the metadata."""
        if componentName != "metadata":
            raise AttributeError(f"component must be metadata, got {componentName!r}")
        return composite.metadata

    def handleParameters(self, inMemoryDataset: Any, parameters: Mapping[str, Any] | None = None) -> Any:
        """Take some of the models."""
        wanted = _several(parameters, "blend_id")
        return inMemoryDataset if wanted is None else selected(inMemoryDataset, wanted)


def _several(parameters: Mapping[str, Any] | None, name: str) -> list[int] | None:
    value = (parameters or {}).get(name)
    return None if value is None else [int(number) for number in (value if hasattr(value, "__iter__") else [value])]


def _part(result: Result, parameters: Mapping[str, Any]) -> Result:
    object_ids, blend_ids = parameters.get("object_id"), parameters.get("blend_id")
    if object_ids is None and blend_ids is None:
        return result
    return result.select(object_ids=object_ids, blend_ids=blend_ids)


def _component(result: Result, component: str | None) -> Any:
    if component is None:
        return result
    if component in TABLES:
        return getattr(result, component)
    if component == "metadata":
        return store.metadata_of(result)
    raise AttributeError(f"component must be one of {', '.join(TABLES)} or metadata, got {component!r}")


# ---------------------------------------------------------------- reading from a repository


def read_coadd(
    butler: Butler,
    dataset_type: str = "deep_coadd",
    *,
    bands: Sequence[str] | None = None,
    box: Box | None = None,
    collections: Any = None,
    **data_id: Any,
) -> Coadd:
    """Read the coadds of a patch in several bands.

    Parameters
    ----------
    butler : Butler
    dataset_type : str, optional
        Name of coadds with the storage class CellCoadd.
    bands : sequence of str, optional
        Bands to read, in this order; None: all that there are, by wavelength.
    box : Box, optional
        Pixels to read, in the coordinates of the tract; None: all.
    collections : optional
        Where to look; None: the default collections of the Butler.
    **data_id
        ``skymap``, ``tract`` and ``patch``.

    Returns
    -------
    coadd : Coadd

    Raises
    ------
    FileError
        If there is no coadd, one of `bands` is missing, or a file cannot be read.
    InputError
        As `coadd_of_images`, or if `box` has no pixel of the image.
    """
    refs = butler.query_datasets(dataset_type, collections=collections, explain=False, data_id=data_id)
    by_band = {str(ref.dataId["band"]): ref for ref in refs}
    wanted = in_order(by_band) if bands is None else list(bands)
    missing = [band for band in wanted if band not in by_band]
    if missing or not wanted:
        what = f"band {missing[0]!r} of {dataset_type}" if missing else dataset_type
        found = ", ".join(in_order(by_band)) or "none"
        raise FileError(f"{what} is not in the repository for {_named(data_id)}; there are {found}")
    images = {}
    for band in wanted:
        ref = by_band[band]
        images[band] = read_image(partial(butler.get, ref), f"{_named(data_id)}, band {band}", box)
    return coadd_of_images(images, name=f"{dataset_type} of {_named(data_id)}")


def read_image(get: Any, name: str, box: Box | None = None) -> Any:
    """Read an image, or a part of it.

    Parameters
    ----------
    get : callable
        ``get()`` of a deferred dataset, or of a Butler with the dataset bound; takes ``parameters``.
    name : str
        What messages call it.
    box : Box, optional
        Pixels to read; cut at the edge of the image.

    Raises
    ------
    FileError
        If it cannot be read.
    """
    try:
        return get() if box is None else get(parameters={"bbox": lsst_box(box)})
    except Exception as error:  # what libraries below raise on damage has no common name
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise FileError(f"the image of {name} cannot be read: {text}") from error


def read_scarlet_dataset(butler: Butler, ref: DatasetRef, blend_ids: Iterable[int] | None = None) -> Result:
    """Read models of the LSST pipelines, whatever the storage class they have.

    Those that Rubin serves, ``object_scarlet_models``, have a formatter that needs the whole pipelines; this one asks
    the Butler for the file only.

    Parameters
    ----------
    butler : Butler
    ref : DatasetRef
        As ``butler.find_dataset`` returns it.
    blend_ids : iterable of int, optional
        Parents and isolated sources to read; None: all.

    Returns
    -------
    result : Result
        See `kermes.io.scarlet_results.result_of_scarlet`.

    Raises
    ------
    FileError
        If the file cannot be read.
    InputError
        If one of `blend_ids` is not in it.
    """
    with butler.getURI(ref).as_local() as local:
        models = read_scarlet_models(local.ospath, blend_ids)
    return result_of_scarlet(models, _named(ref.dataId))


def _named(data_id: Any) -> str:
    """Say which data are meant."""
    items = data_id.mapping.items() if hasattr(data_id, "mapping") else data_id.items()
    return ", ".join(f"{name} {value}" for name, value in items if name != "skymap")
