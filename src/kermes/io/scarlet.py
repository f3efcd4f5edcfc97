"""Files of models of the LSST pipelines: ``.scarlet`` archives, and what was written before them.

A file holds blends and isolated sources by number. The top of a blend is a parent with its footprint, below it lie the
blends that were fitted, in them sources, in these components: one spectrum times one morphology ("factorized"), or one
image per band ("cube"), in the frame of a narrow Gaussian PSF. Written is version 1.0.1; read are also 1.0.0, the
single JSON document of pipelines v29, and the archive without metadata that came between.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from os import PathLike
from typing import Any

import fsspec
import numpy as np
from numpy.typing import NDArray

from kermes import storage
from kermes.errors import FileError, InputError

VERSION = "1.0.1"
"""Version of the files that are written."""

_ITEM_VERSION = "1.0.0"
_FIRST_VERSION = "0.0.0"
_NOT_MODELS = ("metadata", "version", "psf", "psf_shape")
DAMAGE = (
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    IndexError,
    OverflowError,
    RecursionError,
    NotImplementedError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What comes of content that is not what it should be."""

FloatArray = NDArray[np.float32]


# ---------------------------------------------------------------- what a file holds


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScarletComponent:
    """One component of a source: factorized, or a cube."""

    origin: tuple[int, int]
    """First pixel (y, x)."""

    peak: tuple[float, float] | None
    """Peak (y, x); None: it has none."""

    spectrum: FloatArray | None = None
    """Flux of a morphology of one in each band, shape (B,); None: a cube."""

    morphology: FloatArray | None = None
    """Light distribution, shape (h, w); None: a cube."""

    cube: FloatArray | None = None
    """Flux per pixel in each band, shape (B, h, w); None: factorized."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScarletSource:
    """The components of one source."""

    components: tuple[ScarletComponent, ...]
    """In their order."""

    metadata: Mapping[str, Any] | None = None
    """Numbers ``id`` and ``peak_id``, and whatever else was put there; arrays as arrays."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScarletBlend:
    """Sources that were fitted together."""

    origin: tuple[int, int]
    """First pixel (y, x)."""

    shape: tuple[int, int]
    """Height and width."""

    sources: Mapping[int, ScarletSource]
    """By number."""

    metadata: Mapping[str, Any] | None = None
    """In old files the observed PSF and the bands."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScarletParent:
    """Blends that were cut out of one footprint."""

    children: Mapping[int, ScarletBlend | ScarletParent]
    """By number."""

    metadata: Mapping[str, Any] | None = None
    """``spans``, the footprint as an image of booleans, and ``origin``, its first pixel (y, x)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScarletIsolated:
    """A source without neighbours, which was not modelled: all light of its footprint is its own."""

    spans: FloatArray
    """Footprint, 1 in its pixels, shape (h, w)."""

    origin: tuple[int, int]
    """First pixel (y, x)."""

    peak: tuple[float, float]
    """Peak (y, x)."""

    metadata: Mapping[str, Any] | None = None
    """Whatever was put there."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScarletModels:
    """All models of a file, or some of them."""

    blends: Mapping[int, ScarletBlend | ScarletParent] = field(default_factory=dict)
    """By number."""

    isolated: Mapping[int, ScarletIsolated] = field(default_factory=dict)
    """By number."""

    metadata: Mapping[str, Any] | None = None
    """``model_psf`` (h, w), the observed ``psf`` (B, P, Q) and ``bands``, as far as they are known."""

    version: str = VERSION
    """Of the file they were read from."""


# ---------------------------------------------------------------- reading


def arrays_of_lists(metadata: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Make the arrays of metadata that were written as lists; `array_keys` names them."""
    if metadata is None:
        return None
    found = dict(metadata)
    for key in found.pop("array_keys", ()):
        dtype = found.pop(f"{key}_dtype", "float32")
        shape = found.pop(f"{key}_shape", None)
        shape = found.pop(f"{key}Shape") if shape is None else shape
        found[key] = np.array(found[key], dtype=dtype).reshape(shape)
    return found


def pair(values: Any) -> tuple[int, int]:
    """Take a position (y, x) out of a list."""
    y, x = values
    return int(y), int(x)


def _peak(values: Any) -> tuple[float, float] | None:
    if values is None:
        return None
    y, x = values
    return y, x


def _singles(values: Any) -> FloatArray:
    return np.array(values, dtype=np.float32)


def _component(content: Mapping[str, Any]) -> ScarletComponent:
    place: dict[str, Any] = {"origin": pair(content["origin"]), "peak": _peak(content["peak"])}
    shape = tuple(content["shape"])
    if "morph" in content:
        morphology = _singles(content["morph"]).reshape(shape)
        return ScarletComponent(**place, spectrum=_singles(content["spectrum"]), morphology=morphology)
    # The shape of a cube is written with its bands or without them.
    return ScarletComponent(**place, cube=_singles(content["model"]).reshape(-1, *shape[-2:]))


def _source(content: Mapping[str, Any]) -> ScarletSource:
    # Old files have two lists, one of cubes.
    components = [*content.get("components", ()), *content.get("factorized", ())]
    metadata = arrays_of_lists(content.get("metadata"))
    if metadata is None and "peak_id" in content:
        metadata = {"peak_id": content["peak_id"]}
    return ScarletSource(components=tuple(map(_component, components)), metadata=metadata)


def _blend(content: Mapping[str, Any]) -> ScarletBlend | ScarletParent:
    metadata = content.get("metadata")
    if content.get("blend_type") == "hierarchical":
        children = {int(number): _blend(child) for number, child in content["children"].items()}
        return ScarletParent(children=children, metadata=arrays_of_lists(metadata))
    if metadata is None and "psf" in content:
        keys = ("psf", "psf_shape", "psf_center", "bands")
        metadata = {key: content[key] for key in keys if key in content} | {"array_keys": ["psf"]}
    return ScarletBlend(
        origin=pair(content["origin"]),
        shape=pair(content["shape"]),
        sources={int(number): _source(source) for number, source in content["sources"].items()},
        metadata=arrays_of_lists(metadata),
    )


def _isolated(content: Mapping[str, Any]) -> ScarletIsolated:
    peak = _peak(content["peak"])
    if peak is None:
        raise ValueError("an isolated source has no peak")
    return ScarletIsolated(
        spans=_singles(content["span_array"]).reshape(content["shape"]),
        origin=pair(content["origin"]),
        peak=peak,
        metadata=arrays_of_lists(content.get("metadata")),
    )


def _checked_version(version: Any) -> str:
    if str(version).split(".")[0] not in ("0", "1"):
        raise ValueError(f"its version is {version}, and versions up to {VERSION} can be read")
    return str(version)


def _read_document(content: Mapping[str, Any]) -> ScarletModels:
    """Make models of one JSON document."""
    if "metadata" in content:
        metadata = arrays_of_lists(content["metadata"])
    else:
        metadata = {"model_psf": _singles(content["psf"]).reshape(content["psfShape"])}
    return ScarletModels(
        blends={int(number): _blend(blend) for number, blend in content["blends"].items()},
        isolated={int(number): _isolated(source) for number, source in content.get("isolated", {}).items()},
        metadata=metadata,
        version=_checked_version(content.get("version", _FIRST_VERSION)),
    )


def _read_archive(file: Any, numbers: Iterable[int] | None) -> ScarletModels:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()

        def load(name: str) -> Any:
            return json.loads(archive.read(name))

        if "metadata" in names:
            metadata = arrays_of_lists(load("metadata"))
        elif "psf" in names:
            metadata = {"model_psf": _singles(load("psf")).reshape(load("psf_shape"))}
        else:
            metadata = None
        version = _checked_version(load("version") if "version" in names else _FIRST_VERSION)
        wanted = [name for name in names if name not in _NOT_MODELS] if numbers is None else map(str, numbers)
        blends: dict[int, ScarletBlend | ScarletParent] = {}
        isolated: dict[int, ScarletIsolated] = {}
        for name in wanted:
            if name not in names:
                raise InputError(f"numbers must be those of blends in the file, got {name}")
            content = load(name)
            if content.get("source_type") == "isolated":
                isolated[int(name)] = _isolated(content)
            else:
                blends[int(name)] = _blend(content)
    return ScarletModels(blends=blends, isolated=isolated, metadata=metadata, version=version)


def read_scarlet_models(path: str | PathLike[str], numbers: Iterable[int] | None = None) -> ScarletModels:
    """Read a file of models of the LSST pipelines.

    Parameters
    ----------
    path : path
        A ``.scarlet`` archive, or a JSON document of pipelines v29; on this machine or where fsspec finds it.
    numbers : iterable of int, optional
        Blends and isolated sources to read; of an archive the others are not touched. None: all.

    Returns
    -------
    models : ScarletModels

    Raises
    ------
    FileError
        If it cannot be read or is no such file.
    InputError
        If one of `numbers` is not in it.
    """
    try:
        with fsspec.open(str(path), "rb") as file:
            if zipfile.is_zipfile(file):
                file.seek(0)
                return _read_archive(file, numbers)
            file.seek(0)
            models = _read_document(json.loads(file.read()))
    except InputError:
        raise
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}") from error
    except DAMAGE as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        raise FileError(f"{path} must be a file of scarlet models (.scarlet or .json), but is not: {text}") from None
    if numbers is None:
        return models
    return selected(models, [int(number) for number in numbers])


def selected(models: ScarletModels, numbers: list[int]) -> ScarletModels:
    """Take some of the blends and isolated sources; an InputError names one that is not there."""
    for number in numbers:
        if number not in models.blends and number not in models.isolated:
            raise InputError(f"numbers must be those of blends in the file, got {number}")
    return ScarletModels(
        blends={number: models.blends[number] for number in numbers if number in models.blends},
        isolated={number: models.isolated[number] for number in numbers if number in models.isolated},
        metadata=models.metadata,
        version=models.version,
    )


# ---------------------------------------------------------------- writing


def _numbers(array: NDArray[Any]) -> list[Any]:
    """List the numbers of an array; a float32 as the shortest decimal that is read back as the same float32."""
    flat = np.asarray(array).ravel()
    if flat.dtype == np.float32:
        flat = flat.astype("U32").astype(np.float64)
    numbers: list[Any] = flat.tolist()
    return numbers


def lists_of_arrays(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Write metadata as JSON has them: arrays as lists, with shape and type; `arrays_of_lists` reads them."""
    written: dict[str, Any] = {}
    keys = []
    for key, value in metadata.items():
        if isinstance(value, np.ndarray):
            written |= {key: _numbers(value), f"{key}_shape": list(value.shape), f"{key}_dtype": str(value.dtype)}
            keys.append(key)
        else:
            written[key] = value
    return written | ({"array_keys": keys} if keys else {})


def _with_metadata(content: dict[str, Any], metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    content["version"] = _ITEM_VERSION
    return content if metadata is None else content | {"metadata": lists_of_arrays(metadata)}


def _component_content(component: ScarletComponent) -> dict[str, Any]:
    pixels = component.morphology if component.cube is None else component.cube
    assert pixels is not None
    content: dict[str, Any] = {
        "origin": list(component.origin),
        "shape": list(pixels.shape),
        "peak": None if component.peak is None else list(component.peak),
    }
    if component.cube is not None:
        content |= {"model": _numbers(pixels), "component_type": "cube"}
    else:
        assert component.spectrum is not None
        spectrum = _numbers(component.spectrum)
        content |= {"spectrum": spectrum, "morph": _numbers(pixels), "component_type": "factorized"}
    return content | {"version": _ITEM_VERSION}


def _source_content(source: ScarletSource) -> dict[str, Any]:
    components = [_component_content(component) for component in source.components]
    return _with_metadata({"source_type": "source", "components": components}, source.metadata)


def _blend_content(blend: ScarletBlend | ScarletParent) -> dict[str, Any]:
    if isinstance(blend, ScarletParent):
        children = {str(number): _blend_content(child) for number, child in blend.children.items()}
        return _with_metadata({"blend_type": "hierarchical", "children": children}, blend.metadata)
    content = {
        "blend_type": "blend",
        "origin": list(blend.origin),
        "shape": list(blend.shape),
        "sources": {str(number): _source_content(source) for number, source in blend.sources.items()},
    }
    return _with_metadata(content, blend.metadata)


def _isolated_content(source: ScarletIsolated) -> dict[str, Any]:
    content = {
        "source_type": "isolated",
        "origin": list(source.origin),
        "shape": list(source.spans.shape),
        "peak": list(source.peak),
        "span_array": _numbers(source.spans),
    }
    return _with_metadata(content, source.metadata)


def write_scarlet_models(models: ScarletModels, path: str | PathLike[str], overwrite: bool = False) -> None:
    """Write models as a ``.scarlet`` archive of version `VERSION`.

    Parameters
    ----------
    models : ScarletModels
    path : path
        On this machine. It appears when it is complete, or not at all.
    overwrite : bool, optional
        Whether an earlier file may be replaced.

    Raises
    ------
    FileError
        If it exists and may not be replaced, or cannot be written.

    Notes
    -----
    The members are compressed, which the pipelines read like those that are not, and every float32 is written as the
    shortest decimal that is read as the same float32: a fifth of the size, and the same models to the bit.
    """
    storage.write_file(path, scarlet_bytes(models), overwrite=overwrite)


def scarlet_bytes(models: ScarletModels) -> bytes:
    """Make the content of the file that `write_scarlet_models` writes."""
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, content in _contents(models):
            # A date of its own would make the same models other bytes.
            archive.writestr(zipfile.ZipInfo(number), json.dumps(content), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _contents(models: ScarletModels) -> Iterator[tuple[str, Any]]:
    for number, blend in models.blends.items():
        yield str(number), _blend_content(blend)
    for number, source in models.isolated.items():
        yield str(number), _isolated_content(source)
    yield "metadata", None if models.metadata is None else lists_of_arrays(models.metadata)
    yield "version", VERSION
