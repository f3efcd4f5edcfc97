"""Results on disk: a directory of Parquet files that can be read without kermes.

==================  =================================================================================
metadata.json       what the result is: bands, shape, unit, WCS, settings, versions
objects.parquet     table of objects; units and descriptions are metadata of the fields
parents.parquet     table of parents
blends.parquet      table of blends; ``psf_id`` names the PSF of the blend
candidates.parquet  table of candidates
models.parquet      one row per component; those of a blend lie together, and near blends near each other
index.parquet       in which row group of models.parquet each object is, in the order of their numbers
psfs.parquet        one row per PSF and band; a PSF that blends share is stored once
footprints.parquet  one row per parent: the runs of pixels of its footprint
checksums.json      checksums of the files above; what was altered is refused
timings.json        how long it took; the only file that differs from run to run
==================  =================================================================================

All positions are in the coadd's coordinates. Every Parquet file carries metadata.json under the key ``kermes``.
Pixels of morphologies are whole numbers of a step, which is so small that what is drawn from them stays close to what
was fitted: see `write_result`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import tempfile
import tomllib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from astropy import units
from astropy.table import Column, Table
from numpy.typing import NDArray

from kermes import storage
from kermes.coadd import Coadd
from kermes.component_rows import Rows, Tolerance, arrow_rows, source_of_rows, source_rows, write_models, writer
from kermes.config import config_from_dict, to_toml
from kermes.errors import FileError, InputError
from kermes.geometry import Box, Footprint, Footprints
from kermes.io.tables import from_arrow, to_arrow
from kermes.io.wcs import header_of_wcs, wcs_of_header
from kermes.result import TOLERANCE, ModelStore, Result
from kermes.scene import ProfileComponent, Source
from kermes.storage import Folder, damaged

SCHEMA = 3
"""Version of the layout; raised when a reader of the old one would be misled. All earlier ones are still read: version
1 had factorized components alone, and no candidates; version 2 had no steps, checksums and footprints, and its models
were in the order of their objects."""

_FORMAT = "kermes result"
_PSF_BITS = 22
"""Bits that are kept of the brightest pixel of a PSF where models are rounded. A point source of 10^5 sigma in its
brightest pixel is changed by 0.02 sigma at most, and a PSF takes a fifth of the space."""

_TABLES = ("objects", "parents", "blends", "candidates")
_BLENDS_PER_GROUP = 1024
_OBJECTS_PER_GROUP = 4096
_GROUPS_KEPT = 64
_PSFS_KEPT = 64
_PSF_FIELDS = (
    ("psf_id", pa.int64()),
    ("band", pa.string()),
    ("height", pa.int64()),
    ("width", pa.int64()),
    ("pixels", pa.list_(pa.float64())),
)
_FOOTPRINT_FIELDS = (
    ("parent_id", pa.int64()),
    ("y", pa.list_(pa.int32())),
    ("x0", pa.list_(pa.int32())),
    ("x1", pa.list_(pa.int32())),
)


# ---------------------------------------------------------------- writing


def write_table(
    table: pa.Table, path: Path, metadata: Mapping[str, str], keys: Iterable[str] | None = None, rows: int | None = None
) -> None:
    """Write one table into one file, in row groups of so many rows."""
    schema = table.schema.with_metadata(metadata)
    with writer(path, schema, keys) as file:
        file.write_table(table.cast(schema), row_group_size=rows)


def _spread_bits(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Put a zero between all bits of numbers below 2^31."""
    for shift, mask in ((16, 0x0000FFFF0000FFFF), (8, 0x00FF00FF00FF00FF), (4, 0x0F0F0F0F0F0F0F0F)):
        values = (values | values << shift) & mask
    for shift, mask in ((2, 0x3333333333333333), (1, 0x5555555555555555)):
        values = (values | values << shift) & mask
    return values


def _places(result: Result) -> dict[int, int]:
    """Number the blends along a Z-shaped curve (Morton 1966), on which what is near on the sky is mostly near."""
    blends = result.blends
    y, x = (
        2 * (np.asarray(blends[first], dtype=np.int64) - origin) + np.asarray(blends[side], dtype=np.int64)
        for first, side, origin in zip(("y0", "x0"), ("height", "width"), result.origin, strict=True)
    )
    curve = _spread_bits(np.maximum(y, 0)) << 1 | _spread_bits(np.maximum(x, 0))
    return dict(zip(blends["blend_id"].tolist(), curve.tolist(), strict=True))


def _tolerance_of(result: Result, tolerance: float) -> Callable[[Source, int], Tolerance | None]:
    """Make the function that says how far the pixels of a source may be changed, from the images it was made from.

    A pixel of the model that is changed by e changes those around it by no more than e times the sum of the absolute
    values of the kernel, all of them together.
    """
    coadd = result.coadd
    assert coadd is not None

    def of(source: Source, blend_id: int) -> Tolerance | None:
        if all(isinstance(component, ProfileComponent) for component in source.components):
            return None
        psfs = result.psfs[blend_id]
        spread = np.abs(result.kernels(psfs).stamps).sum(axis=(1, 2))
        box = source.box.grow(max(psfs.shape[1:]) // 2) & coadd.box.shift(-coadd.origin[0], -coadd.origin[1])
        window = (slice(None), box.y, box.x)
        variance = np.where(coadd.valid[window], coadd.variance[window], np.inf)
        error = tolerance * np.sqrt(variance.min(axis=(1, 2), initial=np.inf).astype(np.float64))
        frame = np.divide(error, spread, out=np.full_like(error, np.inf), where=spread > 0)
        return Tolerance(frame=frame, observed=error)

    return of


def _write_models(result: Result, folder: Path, metadata: Mapping[str, str], tolerance: float | None) -> None:
    """Write the models of all objects and candidates, and the index of them."""
    places, ids = _places(result), result.model_ids().T.tolist()
    ids.sort(key=lambda pair: (places.get(pair[1], -1), pair[1], pair[0] < 0, abs(pair[0])))
    tolerance_of = None if tolerance is None or result.coadd is None else _tolerance_of(result, tolerance)

    def rows() -> Iterator[list[dict[str, Any]]]:
        for model_id, blend_id in ids:
            source = result.models[model_id]
            allowed = None if tolerance_of is None else tolerance_of(source, blend_id)
            yield source_rows(source, model_id, blend_id, result.origin, allowed)

    row_groups = np.array(write_models(folder / "models.parquet", rows(), metadata), dtype=np.int64)
    model_ids = np.array([model_id for model_id, _ in ids], dtype=np.int64)
    order = np.argsort(model_ids)
    index = pa.table({"object_id": model_ids[order], "row_group": row_groups[order]})
    write_table(index, folder / "index.parquet", metadata, ("object_id",), _OBJECTS_PER_GROUP)


def _rounded_psf(psf: NDArray[np.float64]) -> NDArray[np.float64]:
    """Round a PSF (P, Q) to multiples of a power of two, so that its digits end where they say nothing."""
    top = float(np.abs(psf).max(initial=0.0))
    if not 0 < top < np.inf:
        return psf
    step = math.ldexp(1.0, math.frexp(top)[1] - _PSF_BITS)
    return np.asarray(np.rint(psf / step) * step)


def _write_psfs(result: Result, path: Path, metadata: Mapping[str, str], tolerance: float | None) -> list[int]:
    """Write each different PSF once, one row group each; return the psf_id of every blend."""
    exact = tolerance is None or result.coadd is None
    schema = pa.schema(_PSF_FIELDS, metadata=metadata)
    known: dict[tuple[Any, ...], int] = {}
    psf_ids = []
    with writer(path, schema, ("psf_id",), ("pixels",)) as file:
        for blend_id in result.blends["blend_id"].tolist():
            psfs = np.ascontiguousarray(result.psfs[blend_id], dtype=np.float64)
            key = (psfs.shape, hashlib.sha256(psfs.tobytes()).digest())
            if key not in known:
                known[key] = len(known)
                _, height, width = psfs.shape
                rows = [
                    {
                        "psf_id": known[key],
                        "band": band,
                        "height": height,
                        "width": width,
                        "pixels": psf if exact else _rounded_psf(psf),
                    }
                    for band, psf in zip(result.bands, psfs, strict=True)
                ]
                file.write_table(arrow_rows(rows, schema))
            psf_ids.append(known[key])
    return psf_ids


def _footprint_table(result: Result) -> pa.Table:
    rows = []
    for parent_id, footprint in result.footprints.items():
        y, x0, x1 = footprint.shift(*result.origin).spans.T
        rows.append({"parent_id": parent_id, "y": y, "x0": x0, "x1": x1})
    schema = pa.schema(_FOOTPRINT_FIELDS)
    return arrow_rows(rows, schema) if rows else schema.empty_table()


def _stored_tolerance(result: Result, tolerance: float | None) -> float:
    """Say how far the models will be from those that were fitted; without images they are kept as they are."""
    return result.tolerance if tolerance is None or result.coadd is None else max(result.tolerance, tolerance)


def metadata_of(result: Result, tolerance: float | None = None) -> dict[str, Any]:
    """Say what is stored of a result beside tables and models, as JSON; `tolerance` as in `write_result`."""
    return {
        "format": _FORMAT,
        "schema": SCHEMA,
        "bands": list(result.bands),
        "shape": [int(side) for side in result.shape],
        "origin": [int(first) for first in result.origin],
        "unit": None if result.unit is None else result.unit.to_string(),
        "zero_point": result.zero_point,
        "noise_factors": result.noise_factors.tolist(),
        "model_psf_sigma": result.config.model_psf_sigma,
        "wcs": header_of_wcs(result.wcs),
        "config": to_toml(result.config),
        "complete": result.is_complete,
        "ledger": result.ledger(),
        "tolerance": _stored_tolerance(result, tolerance),
        "inputs": result.input_checksums(),
        "notes": dict(result.notes),
        "part": result.is_part,
        "versions": {name: importlib.metadata.version(name) for name in ("kermes", "numpy", "numba")},
    }


def _write_files(result: Result, folder: Path, tolerance: float | None) -> None:
    description = storage.sealed_json(metadata_of(result, tolerance))
    (folder / "metadata.json").write_text(description)
    metadata = {"kermes": description}
    psf_ids = _write_psfs(result, folder / "psfs.parquet", metadata, tolerance)
    _write_models(result, folder, metadata, tolerance)
    write_table(to_arrow(result.objects), folder / "objects.parquet", metadata, ("object_id", "y", "x", "ra", "dec"))
    write_table(to_arrow(result.parents), folder / "parents.parquet", metadata)
    write_table(to_arrow(result.candidates), folder / "candidates.parquet", metadata)
    write_table(_footprint_table(result), folder / "footprints.parquet", metadata, ("parent_id",))
    blends = result.blends.copy()
    blends["psf_id"] = Column(np.array(psf_ids, dtype=np.int64), description="Number of its PSF in psfs.parquet")
    write_table(to_arrow(blends), folder / "blends.parquet", metadata, ("blend_id",), _BLENDS_PER_GROUP)
    storage.seal(folder, [file.name for file in folder.iterdir()])
    (folder / "timings.json").write_text(storage.sealed_json(result.timings))


def _is_result(folder: Folder) -> bool:
    try:
        return bool(json.loads(storage.current(folder).read("metadata.json"))["format"] == _FORMAT)
    except (FileError, ValueError, KeyError, TypeError):
        return False


def check_output(path: str | PathLike[str], overwrite: bool = False) -> Folder:
    """Check that a result can be written to a directory, before the work begins.

    Raises
    ------
    FileError
        If its parent directory is missing, if it exists and `overwrite` is False, unless it is what a run that was
        stopped has left, or if it holds anything but a result of kermes.
    """
    try:
        folder = Folder.of(path)
    except FileError as error:
        if not Path(path).exists():
            raise
        raise FileError(f"output must be new, or a result of kermes to replace, got {path}: {error}") from None
    if folder.is_local:
        target = Path(folder.root)
        if not target.parent.is_dir():
            raise FileError(f"output must lie in a directory that exists, got {path}")
        if not os.access(target.parent, os.W_OK):
            raise FileError(f"output must lie in a directory that can be written to, got {path}")
        if not folder.is_archive and target.exists() and not target.is_dir():
            raise FileError(f"output must be a directory, got the file {path}")
        if folder.is_archive and target.is_dir():
            raise FileError(f"output must be a file, as its name ends in {storage.ARCHIVE}, got the directory {path}")
    if not folder.exists():
        return folder
    if folder.names():
        if not _is_result(folder):
            raise FileError(f"output must be new, or a result of kermes to replace, got {path}, which is neither")
        if not overwrite and _is_complete(folder):
            raise FileError(f"output must be new, got {path}, which exists; overwrite replaces it")
    return folder


def _is_complete(folder: Folder) -> bool:
    """Whether an earlier result is that of a whole run; a damaged one counts as such, and is not replaced unasked."""
    try:
        return bool(_read_metadata(storage.current(folder)).get("complete", True))
    except FileError:
        return True


def write_result(
    result: Result,
    path: str | PathLike[str],
    *,
    overwrite: bool = False,
    tolerance: float | None = TOLERANCE,
    extras: Mapping[str, bytes] | None = None,
) -> None:
    """Write a result into a directory.

    Parameters
    ----------
    result : Result
    path : path
        Directory to make, of this machine or of any file system that fsspec knows. It appears when it is complete, or
        not at all. A name that ends in ".kermes" is that of one file with the same content.
    overwrite : bool, optional
        Whether an earlier result of that name may be replaced, with all that its directory holds.
    tolerance : float, optional
        How far the stored model of an object, drawn as observed, may be from the one that was fitted, in any pixel and
        band [sigma of the noise in the quietest pixel it reaches]. Pixels of morphologies and templates are rounded to
        multiples of a power of two accordingly, and PSFs to 22 bits of their peak; profiles and fluxes are kept to the
        bit. None: all is. Without the coadd the noise is not known, and models are kept as they are.
    extras : mapping of str to bytes, optional
        Further files to put beside the tables, by name.

    Raises
    ------
    FileError
        If it exists and may not be replaced, or cannot be written.
    InputError
        If `tolerance` is not positive.

    Notes
    -----
    The same result gives the same bytes, except for timings.json.
    """
    _check_tolerance(tolerance)
    target = check_output(path, overwrite)
    try:
        if target.is_local and not target.is_archive:
            _write_local(result, Path(target.root), overwrite, tolerance, extras or {})
            return
        with _written(result, tolerance, extras or {}) as folder:
            if not target.is_archive:
                storage.upload(folder, target)
            elif target.is_local:
                storage.write_file(target.root, storage.archive_of(folder))
            else:
                target.filesystem.pipe_file(target.root, storage.archive_of(folder))
    except OSError as error:
        raise FileError(f"output {path} cannot be written: {error.strerror or error}") from error


def result_bytes(result: Result, tolerance: float | None = TOLERANCE) -> bytes:
    """Write a result as `write_result` writes it into one file, and return the content of the file.

    Raises
    ------
    InputError
        If `tolerance` is not positive.
    """
    _check_tolerance(tolerance)
    with _written(result, tolerance, {}) as folder:
        return storage.archive_of(folder)


def _check_tolerance(tolerance: float | None) -> None:
    if tolerance is not None and not 0 < tolerance < np.inf:
        raise InputError(f"tolerance must be positive, or None for exact models, got {tolerance}")


@contextmanager
def _written(result: Result, tolerance: float | None, extras: Mapping[str, bytes]) -> Iterator[Path]:
    """Write all files of a result into a directory that is gone afterwards."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_files(result, folder, tolerance)
        for extra, content in extras.items():
            (folder / extra).write_bytes(content)
        yield folder


def _write_local(
    result: Result, target: Path, overwrite: bool, tolerance: float | None, extras: Mapping[str, bytes]
) -> None:
    folder = storage.sibling(target)
    folder.mkdir()
    try:
        _write_files(result, folder, tolerance)
        for name, content in extras.items():
            (folder / name).write_bytes(content)
        replace = overwrite or (target.is_dir() and not _is_complete(Folder.of(target)))
        storage.publish(folder, target, replace)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------- reading


@contextmanager
def parquet(folder: Folder, name: str, metadata: Any = None) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file of a directory; everything that is wrong with it becomes a FileError."""
    try:
        source = pa.PythonFile(folder.file(name), mode="r")
        file = pq.ParquetFile(source, metadata=metadata, page_checksum_verification=True, pre_buffer=True)
        yield file
    except FileError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise damaged(folder.name_of(name), error) from None


class _Grouped:
    """Rows of a Parquet file, found by the statistics of its row groups; the latest row groups are kept."""

    def __init__(self, folder: Folder, name: str, columns: Sequence[str] | None = None) -> None:
        self.folder, self.name = folder, name
        self._columns = None if columns is None else list(columns)
        self._groups: OrderedDict[int, Rows] = OrderedDict()
        self._limits: dict[str, NDArray[np.int64]] = {}

    @cached_property
    def _metadata(self) -> Any:
        with parquet(self.folder, self.name) as file:
            return file.metadata

    def limits(self, key: str) -> NDArray[np.int64]:
        """Smallest and largest value of a column of whole numbers in each row group, shape (2, G)."""
        if key not in self._limits:
            metadata, everything = self._metadata, np.iinfo(np.int64)
            number = metadata.schema.names.index(key)
            limits = []
            for group in range(metadata.num_row_groups):
                found = metadata.row_group(group).column(number).statistics
                known = found is not None and found.has_min_max
                limits.append((found.min, found.max) if known else (everything.min, everything.max))
            self._limits[key] = np.array(limits, dtype=np.int64).reshape(-1, 2).T
        return self._limits[key]

    def group(self, number: int) -> Rows:
        """Rows of one row group."""
        rows = self._groups.pop(number, None)
        if rows is None:
            with parquet(self.folder, self.name, self._metadata) as file:
                rows = Rows(file.read_row_group(number, columns=self._columns))
        self._groups[number] = rows
        while len(self._groups) > _GROUPS_KEPT:
            self._groups.popitem(last=False)
        return rows

    def rows(self, key: str, value: int) -> list[dict[str, Any]]:
        """Rows with one value of a column by which the file is sorted."""
        least, most = self.limits(key)
        numbers = np.flatnonzero((least <= value) & (value <= most)).tolist()
        return [row for number in numbers for row in self.group(number).where(key, value)]


class _StoredModels(ModelStore):
    """Models in a file, by object_id; each is read when it is asked for."""

    def __init__(self, folder: Folder, origin: tuple[int, int], schema: int) -> None:
        self._folder, self._origin, self._schema = folder, origin, schema
        self._models = _Grouped(folder, "models.parquet")
        self._index = _Grouped(folder, "index.parquet")
        self._blends = _Grouped(folder, "blends.parquet", ("blend_id", "y0", "x0", "height", "width", "psf_id"))
        self._psfs = _Grouped(folder, "psfs.parquet")
        self._known_psfs: OrderedDict[int, NDArray[np.float64]] = OrderedDict()

    @property
    def bytes_read(self) -> int:
        """How much was read of all files of the result so far."""
        return self._folder.bytes_read

    @cached_property
    def _ids(self) -> dict[int, None]:
        """Keys of the models; results of older versions have no candidates."""
        names = [("objects", "object_id", 1), ("candidates", "candidate_id", -1)][: min(self._schema, 2)]
        ids: list[int] = []
        for name, key, sign in names:
            with parquet(self._folder, f"{name}.parquet") as file:
                ids += (sign * file.read(columns=[key])[key].to_numpy()).tolist()
        return dict.fromkeys(ids)

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[int]:
        return iter(self._ids)

    def _rows(self, object_id: int) -> list[dict[str, Any]]:
        if self._schema < 3:  # had no index, and was in the order of the objects
            return self._models.rows("object_id", object_id)
        groups = [row["row_group"] for row in self._index.rows("object_id", object_id)]
        return self._models.group(groups[0]).where("object_id", object_id) if groups else []

    def __contains__(self, object_id: object) -> bool:
        return isinstance(object_id, int | np.integer) and bool(self._rows(int(object_id)))

    def __getitem__(self, object_id: int) -> Source:
        rows = self._rows(object_id)
        if not rows:
            raise KeyError(object_id)
        try:
            return source_of_rows(rows, self._origin)
        except (KeyError, IndexError, TypeError, ValueError, InputError) as error:
            raise damaged(self._folder.name_of("models.parquet"), error) from None

    def blend_of(self, object_id: int) -> int:
        return int(self._rows(object_id)[0]["blend_id"])

    def box_of_blend(self, blend_id: int) -> Box:
        row = self._blend(blend_id)
        dy, dx = self._origin
        return Box(row["y0"], row["x0"], row["height"], row["width"]).shift(-dy, -dx)

    def _blend(self, blend_id: int) -> dict[str, Any]:
        rows = self._blends.rows("blend_id", blend_id)
        if not rows:
            raise KeyError(blend_id)
        return rows[0]

    def within(self, box: Box) -> dict[int, tuple[int, int]]:
        dy, dx = self._origin
        groups = np.ones(self._models.limits("peak_y").shape[1], dtype=bool)
        for key, low, high in (("peak_y", box.y0 + dy, box.y1 + dy), ("peak_x", box.x0 + dx, box.x1 + dx)):
            least, most = self._models.limits(key)
            groups &= (least < high) & (most >= low)
        found = {}
        for number in np.flatnonzero(groups).tolist():
            rows = self._models.group(number)
            names = ("object_id", "peak_y", "peak_x")
            for object_id, y, x in zip(*(rows.values(name) for name in names), strict=True):
                if object_id >= 0 and (y - dy, x - dx) in box:
                    found[int(object_id)] = (y - dy, x - dx)
        return found

    def largest_psf_side(self) -> int:
        """Largest side of all PSFs [pixels]."""
        with parquet(self._folder, "psfs.parquet") as file:
            sides = file.read(columns=["height", "width"])
        return max((int(number) for column in sides.columns for number in column.to_pylist()), default=0)

    def psfs_of_blend(self, blend_id: int) -> NDArray[np.float64]:
        """Read the PSF of a blend; the latest are kept."""
        psf_id = self._blend(blend_id)["psf_id"]
        psfs = self._known_psfs.pop(psf_id, None)
        if psfs is None:
            try:
                rows = self._psfs.rows("psf_id", psf_id)
                psfs = np.stack([row["pixels"].reshape(row["height"], row["width"]) for row in rows])
            except (KeyError, ValueError) as error:
                raise damaged(self._folder.name_of("psfs.parquet"), error) from None
        self._known_psfs[psf_id] = psfs
        while len(self._known_psfs) > _PSFS_KEPT:
            self._known_psfs.popitem(last=False)
        return psfs


class _StoredPsfs(Mapping[int, NDArray[np.float64]]):
    """PSFs in a file, by blend_id; each is read when it is asked for."""

    def __init__(self, models: _StoredModels, result_blends: Callable[[], Table]) -> None:
        self._models, self._blends = models, result_blends

    @cached_property
    def _ids(self) -> list[int]:
        ids: list[int] = self._blends()["blend_id"].tolist()
        return ids

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[int]:
        return iter(self._ids)

    @cached_property
    def largest_side(self) -> int:
        """Largest side of all of them [pixels], which is known without reading their pixels."""
        return self._models.largest_psf_side()

    def __getitem__(self, blend_id: int) -> NDArray[np.float64]:
        return self._models.psfs_of_blend(blend_id)


def _read_table(folder: Folder, name: str, without: str | None = None) -> Table:
    with parquet(folder, f"{name}.parquet") as file:
        table = from_arrow(file.read())
    if without is not None:
        table.remove_column(without)
    return table


def _read_footprints(folder: Folder, origin: tuple[int, int]) -> Footprints:
    with parquet(folder, "footprints.parquet") as file:
        rows = Rows(file.read())
    try:
        pairs = [
            (row["parent_id"], Footprint(np.stack([row["y"], row["x0"], row["x1"]], axis=1).astype(np.int64)))
            for row in rows
        ]
        return Footprints.of((number, footprint.shift(-origin[0], -origin[1])) for number, footprint in pairs)
    except (KeyError, ValueError) as error:
        raise damaged(folder.name_of("footprints.parquet"), error) from None


def _read_metadata(folder: Folder) -> dict[str, Any]:
    if not folder.exists():
        raise FileError(f"path must be the directory of a kermes result, got {folder.path}, which does not exist")
    if not _is_result(folder):
        raise FileError(f"path must be the directory of a kermes result, got {folder.path}, which is not one")
    text = folder.read("metadata.json")
    metadata: dict[str, Any] = json.loads(text)
    schema = metadata.get("schema")
    if not isinstance(schema, int) or schema < 1:
        raise damaged(folder.name_of("metadata.json"), f"its schema is {schema!r}")
    if schema > SCHEMA:
        raise FileError(
            f"{folder.path} was written by a newer kermes: its schema is {schema}, "
            f"this one reads up to {SCHEMA}; upgrade kermes"
        )
    if schema < 3:  # had no checksums
        return metadata
    try:
        metadata = storage.open_sealed(text)
    except ValueError as error:
        raise damaged(folder.name_of("metadata.json"), error) from None
    # What belongs to another result is refused as well: the checksums are those of this one.
    if folder.checksums is None:
        raise FileError(f"{folder.path} must be a complete kermes result, but {storage.CHECKSUMS} is missing")
    if folder.file("metadata.json").read() != text:
        raise damaged(folder.name_of("metadata.json"), "it is that of another result")
    return metadata


def _read_timings(folder: Folder, schema: int) -> dict[str, Any]:
    if not folder.exists("timings.json"):
        return {}
    text = folder.read("timings.json")
    try:
        timings: dict[str, Any] = storage.open_sealed(text) if schema > 2 else json.loads(text)
    except ValueError as error:
        raise damaged(folder.name_of("timings.json"), error) from None
    return timings


def open_result(path: str | PathLike[str] | bytes, coadd: Coadd | None = None) -> Result:
    """Open a result that was written before.

    Tables and models are read when they are asked for: one object costs one small read.

    Parameters
    ----------
    path : path
        Directory of the result, or the one file ".kermes", on this machine or on any file system that fsspec knows; or
        the content of such a file.
    coadd : Coadd, optional
        The images it was made from; without them only models can be evaluated.

    Returns
    -------
    result : Result

    Raises
    ------
    FileError
        If it is not a result of kermes, is incomplete, or was written by a newer version. What was altered since it was
        written raises it too, here or when it is read.
    InputError
        If `coadd` has other bands, another shape or another origin.

    Warns
    -----
    DataWarning
        If `coadd` has other pixels than that which it was made from.

    Examples
    --------
    >>> result = kermes.open("out", coadd=kermes.read("scene.npz"))  # doctest: +SKIP
    """
    folder = Folder.of_bytes(path) if isinstance(path, bytes) else storage.current(Folder.of(path))
    metadata = _read_metadata(folder)
    schema = metadata["schema"]
    known = _TABLES if schema > 1 else _TABLES[:3]
    files = (*known, "models", "psfs", *(["footprints", "index"] if schema > 2 else []))
    for name in files:
        folder.file(f"{name}.parquet")  # looks whether it is there, and as long as it was
    try:
        origin = (metadata["origin"][0], metadata["origin"][1])
        unit = metadata["unit"]
        models = _StoredModels(folder, origin, schema)
        tables: dict[str, Any] = {name: partial(_read_table, folder, name) for name in known if name != "blends"}
        read_blends = partial(_read_table, folder, "blends", "psf_id")
        result = Result(
            **tables,
            blends=read_blends,
            bands=tuple(metadata["bands"]),
            config=config_from_dict(tomllib.loads(metadata["config"]), origin=f"config of {folder.path}"),
            models=models,
            psfs=_StoredPsfs(models, read_blends),
            shape=(metadata["shape"][0], metadata["shape"][1]),
            origin=origin,
            unit=None if unit is None else units.Unit(unit, parse_strict="silent"),
            zero_point=metadata["zero_point"],
            noise_factors=np.array(metadata.get("noise_factors", [1.0] * len(metadata["bands"]))),
            wcs=wcs_of_header(metadata["wcs"]),
            footprints=partial(_read_footprints, folder, origin) if schema > 2 else Footprints.of({}),
            tolerance=metadata.get("tolerance", 0.0),
            inputs=metadata.get("inputs", {}),
            notes=metadata.get("notes", {}),
            is_part=metadata.get("part", False),
            n_peaks=metadata.get("ledger", {}).get("peaks"),
            timings=partial(_read_timings, folder, schema),
        )
    except (KeyError, IndexError, TypeError, tomllib.TOMLDecodeError) as error:
        raise FileError(f"{folder.path} must be a kermes result, but its metadata are damaged: {error}") from None
    return result if coadd is None else result.with_coadd(coadd, stacklevel=3)
