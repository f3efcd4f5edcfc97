"""Results on disk: a directory of Parquet files that can be read without kermes.

==================  =================================================================================
metadata.json       what the result is: bands, shape, unit, WCS, settings, versions
objects.parquet     table of objects; units and descriptions are metadata of the fields
parents.parquet     table of parents
blends.parquet      table of blends; ``psf_id`` names the PSF of the blend
candidates.parquet  table of candidates
models.parquet      one row per component, in the order of the objects
psfs.parquet        one row per PSF and band; a PSF that blends share is stored once
timings.json        how long it took; the only file that differs from run to run
==================  =================================================================================

All positions are in the coadd's coordinates. Every Parquet file carries metadata.json under the key ``kermes``.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import secrets
import shutil
import tomllib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO, StringIO
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from astropy import units
from astropy.io import fits
from astropy.table import Column, Table
from astropy.wcs import WCS, FITSFixedWarning
from numpy.typing import NDArray

from kermes.coadd import Coadd
from kermes.config import config_from_dict, to_toml
from kermes.errors import FileError, InputError
from kermes.geometry import Box
from kermes.result import Result, model_ids
from kermes.scene import Component, CubeComponent, FactorizedComponent, ProfileComponent, Source

SCHEMA = 2
"""Version of the layout; raised when a reader of the old one would be misled. Version 1 had factorized components
alone, and no candidates; it is still read."""

_FORMAT = "kermes result"
_TABLES = ("objects", "parents", "blends", "candidates")
_ROWS_PER_GROUP = 64
_PIXELS_PER_GROUP = 1 << 15
_MODEL_FIELDS = (
    ("object_id", pa.int64()),
    ("blend_id", pa.int64()),
    ("component", pa.int64()),
    ("kind", pa.string()),
    ("peak_y", pa.int64()),
    ("peak_x", pa.int64()),
    ("y0", pa.int64()),
    ("x0", pa.int64()),
    ("height", pa.int64()),
    ("width", pa.int64()),
    ("spectrum", pa.list_(pa.float32())),
    ("morphology", pa.list_(pa.float32())),
    ("center_y", pa.float64()),
    ("center_x", pa.float64()),
    ("radius", pa.float64()),
    ("shear_1", pa.float64()),
    ("shear_2", pa.float64()),
    ("sersic_index", pa.float64()),
    ("sigma", pa.float64()),
)
_PSF_FIELDS = (
    ("psf_id", pa.int64()),
    ("band", pa.string()),
    ("height", pa.int64()),
    ("width", pa.int64()),
    ("pixels", pa.list_(pa.float64())),
)


# ---------------------------------------------------------------- tables


def to_arrow(table: Table) -> pa.Table:
    """Convert an astropy table of plain columns; units, descriptions and types go into the metadata of the fields."""
    fields, arrays = [], []
    for column in table.itercols():
        values = np.asarray(column)
        array = pa.array(values.astype(values.dtype.newbyteorder("=")))
        metadata = {"dtype": values.dtype.str}
        if column.unit is not None:
            metadata["unit"] = column.unit.to_string()
        if column.description is not None:
            metadata["description"] = column.description
        fields.append(pa.field(column.name, array.type, nullable=False, metadata=metadata))
        arrays.append(array)
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


def from_arrow(table: pa.Table) -> Table:
    """Convert back what `to_arrow` made, exactly; other tables of plain columns are taken as they are."""
    columns = []
    for item, values in zip(table.schema, table.columns, strict=True):
        metadata = {key.decode(): value.decode() for key, value in (item.metadata or {}).items()}
        unit = units.Unit(metadata["unit"], parse_strict="silent") if "unit" in metadata else None
        columns.append(
            Column(
                np.asarray(values.to_numpy(), dtype=metadata.get("dtype")),
                name=item.name,
                unit=unit,
                description=metadata.get("description"),
            )
        )
    return Table(columns, copy=False)


def table_bytes(table: Table, suffix: str) -> bytes:
    """Write a table of plain columns in the format of a file name's suffix: .parquet, .fits, .ecsv, .csv or .vot."""
    buffer = BytesIO()
    if suffix == ".parquet":
        pq.write_table(to_arrow(table), buffer, compression="zstd")
    elif suffix == ".fits":
        plain = table.copy(copy_data=False)
        plain.meta.clear()
        hdu = fits.table_to_hdu(plain)
        for number, column in enumerate(table.itercols(), start=1):
            if column.description:
                hdu.header[f"TCOMM{number}"] = column.description
        fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(buffer)
    elif suffix == ".vot":
        table.write(buffer, format="votable")
    else:
        text = StringIO()
        table.write(text, format={".ecsv": "ascii.ecsv", ".csv": "ascii.csv"}[suffix])
        buffer.write(text.getvalue().encode())
    return buffer.getvalue()


# ---------------------------------------------------------------- writing


def _writer(path: Path, schema: pa.Schema, key: str | None = None, floats: Iterable[str] = ()) -> pq.ParquetWriter:
    """Open a Parquet file; statistics of `key` alone, `floats` stored byte by byte, which compresses them better."""
    plain = [f"{name}.list.element" for name in floats]
    return pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        use_dictionary=[name for name in schema.names if name not in floats],
        write_statistics=[key] if key is not None else True,
        column_encoding=dict.fromkeys(plain, "BYTE_STREAM_SPLIT") or None,
        write_page_checksum=True,
    )


def write_table(table: pa.Table, path: Path, metadata: Mapping[str, str]) -> None:
    """Write one table into one file."""
    schema = table.schema.with_metadata(metadata)
    with _writer(path, schema) as writer:
        writer.write_table(table.cast(schema))


def _lists(arrays: Iterable[NDArray[Any]], dtype: pa.DataType) -> pa.ListArray:
    arrays = [array.ravel() for array in arrays]
    offsets = np.concatenate([[0], np.cumsum([array.size for array in arrays])]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(arrays), type=dtype.value_type))


def rows_of(table: pa.Table, rows: Iterable[int] | None = None) -> list[dict[str, Any]]:
    """Rows of a table of models or PSFs; lists come as arrays. None: all rows."""
    return [
        {
            name: np.array(value.values) if isinstance(value, pa.ListScalar) else value.as_py()
            for name, value in ((name, table[name][int(row)]) for name in table.column_names)
        }
        for row in (range(table.num_rows) if rows is None else rows)
    ]


def _row_group(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    columns = [
        _lists((row[item.name] for row in rows), item.type)
        if pa.types.is_list(item.type)
        else pa.array([row.get(item.name) for row in rows], type=item.type)
        for item in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


_NO_PIXELS = np.zeros(0, dtype=np.float32)


def source_rows(source: Source, model_id: int, blend_id: int, origin: tuple[int, int]) -> list[dict[str, Any]]:
    """Turn a source into rows of models.parquet, one per component; one without any gets a row of kind "none".

    Raises
    ------
    InputError
        If a component is neither factorized nor a profile nor a template.
    """
    dy, dx = origin
    row = {
        "object_id": model_id,
        "blend_id": blend_id,
        "peak_y": source.peak[0] + dy,
        "peak_x": source.peak[1] + dx,
    }
    if not source.components:
        place = {"y0": row["peak_y"], "x0": row["peak_x"], "height": 0, "width": 0}
        return [{**row, "component": 0, "kind": "none", **place, "spectrum": _NO_PIXELS, "morphology": _NO_PIXELS}]
    return [
        {
            **row,
            "component": number,
            "y0": component.box.y0 + dy,
            "x0": component.box.x0 + dx,
            "height": component.box.height,
            "width": component.box.width,
            **_component_columns(component, origin),
        }
        for number, component in enumerate(source.components)
    ]


def source_of_rows(rows: Sequence[Mapping[str, Any]], origin: tuple[int, int]) -> Source:
    """Make a source from its rows of models.parquet, lists as arrays; what `source_rows` wrote.

    Raises
    ------
    KeyError, IndexError, TypeError, ValueError
        If they are not such rows.
    """
    dy, dx = origin
    return Source(
        peak=(rows[0]["peak_y"] - dy, rows[0]["peak_x"] - dx),
        components=tuple(_component_of_row(row, origin) for row in rows if row["kind"] != "none"),
    )


def _component_of_row(row: Mapping[str, Any], origin: tuple[int, int]) -> Component:
    dy, dx = origin
    box = Box(row["y0"], row["x0"], row["height"], row["width"]).shift(-dy, -dx)
    if row["kind"] == "profile":
        return ProfileComponent(
            spectrum=row["spectrum"],
            center=np.array([row["center_y"] - dy, row["center_x"] - dx]),
            radius=row["radius"],
            shear=np.array([row["shear_1"], row["shear_2"]]),
            index=row["sersic_index"],
            sigma=row["sigma"],
            box=box,
        )
    if row["kind"] == "template":
        return CubeComponent(cube=row["morphology"].reshape(-1, *box.shape), box=box, observed=True)
    if row["kind"] != "factorized":
        raise ValueError(f"unknown kind of component {row['kind']!r}")
    return FactorizedComponent(spectrum=row["spectrum"], morphology=row["morphology"].reshape(box.shape), box=box)


def _component_columns(component: Component, origin: tuple[int, int]) -> dict[str, Any]:
    """Say what is particular to a kind of component; columns of other kinds are left out."""
    if isinstance(component, FactorizedComponent):
        return {"kind": "factorized", "spectrum": component.spectrum, "morphology": component.morphology}
    if isinstance(component, CubeComponent) and component.observed:
        return {"kind": "template", "spectrum": _NO_PIXELS, "morphology": component.cube}
    if isinstance(component, ProfileComponent):
        return {
            "kind": "profile",
            "spectrum": component.spectrum,
            "morphology": _NO_PIXELS,
            "center_y": component.center[0] + origin[0],
            "center_x": component.center[1] + origin[1],
            "radius": component.radius,
            "shear_1": component.shear[0],
            "shear_2": component.shear[1],
            "sersic_index": component.index,
            "sigma": component.sigma,
        }
    raise InputError(
        f"components must be factorized, profiles or templates to be written, got a {type(component).__name__}"
    )


def write_models(path: Path, sources: Iterable[list[dict[str, Any]]], metadata: Mapping[str, str]) -> None:
    """Write a file of models, from the rows of one source after the other, by `source_rows`."""
    schema = pa.schema(_MODEL_FIELDS, metadata=metadata)
    with _writer(path, schema, key="object_id", floats=("spectrum", "morphology")) as writer:
        rows: list[dict[str, Any]] = []
        n_pixels = 0
        for added in sources:
            rows += added
            n_pixels += sum(row["morphology"].size for row in added)
            if len(rows) >= _ROWS_PER_GROUP or n_pixels >= _PIXELS_PER_GROUP:
                writer.write_table(_row_group(rows, schema))
                rows, n_pixels = [], 0
        if rows:
            writer.write_table(_row_group(rows, schema))


def _rows_of_models(result: Result) -> Iterator[list[dict[str, Any]]]:
    ids = result.model_ids()
    for model_id, blend_id in ids[:, np.argsort(ids[0])].T.tolist():
        yield source_rows(result.models[model_id], model_id, blend_id, result.origin)


def _write_psfs(result: Result, path: Path, metadata: Mapping[str, str]) -> list[int]:
    """Write each different PSF once, one row group each; return the psf_id of every blend."""
    schema = pa.schema(_PSF_FIELDS, metadata=metadata)
    known: dict[tuple[Any, ...], int] = {}
    psf_ids = []
    with _writer(path, schema, key="psf_id", floats=("pixels",)) as writer:
        for blend_id in result.blends["blend_id"]:
            psfs = np.ascontiguousarray(result.psfs[int(blend_id)], dtype=np.float64)
            key = (psfs.shape, hashlib.sha256(psfs.tobytes()).digest())
            if key not in known:
                known[key] = len(known)
                _, height, width = psfs.shape
                rows = [
                    {"psf_id": known[key], "band": band, "height": height, "width": width, "pixels": psf}
                    for band, psf in zip(result.bands, psfs, strict=True)
                ]
                writer.write_table(_row_group(rows, schema))
            psf_ids.append(known[key])
    return psf_ids


def _metadata(result: Result) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "schema": SCHEMA,
        "bands": list(result.bands),
        "shape": [int(side) for side in result.shape],
        "origin": [int(first) for first in result.origin],
        "unit": None if result.unit is None else result.unit.to_string(),
        "zero_point": result.zero_point,
        "model_psf_sigma": result.config.model_psf_sigma,
        "wcs": result.wcs.to_header_string(relax=True) if isinstance(result.wcs, WCS) else None,
        "config": to_toml(result.config),
        "complete": result.is_complete,
        "ledger": result.ledger(),
        "versions": {name: importlib.metadata.version(name) for name in ("kermes", "numpy", "numba")},
    }


def _write_files(result: Result, folder: Path) -> None:
    description = json.dumps(_metadata(result), indent=1)
    (folder / "metadata.json").write_text(description + "\n")
    metadata = {"kermes": description}
    psf_ids = _write_psfs(result, folder / "psfs.parquet", metadata)
    write_models(folder / "models.parquet", _rows_of_models(result), metadata)
    write_table(to_arrow(result.objects), folder / "objects.parquet", metadata)
    write_table(to_arrow(result.parents), folder / "parents.parquet", metadata)
    write_table(to_arrow(result.candidates), folder / "candidates.parquet", metadata)
    blends = result.blends.copy()
    blends["psf_id"] = Column(np.array(psf_ids, dtype=np.int64), description="Number of its PSF in psfs.parquet")
    write_table(to_arrow(blends), folder / "blends.parquet", metadata)
    (folder / "timings.json").write_text(json.dumps(result.timings, indent=1) + "\n")


def _is_result(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / "metadata.json").read_text())["format"] == _FORMAT)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_output(path: str | PathLike[str], overwrite: bool = False) -> Path:
    """Check that a result can be written to a directory, before the work begins.

    Raises
    ------
    FileError
        If its parent directory is missing, if it exists and `overwrite` is False, unless it is what a run that was
        stopped has left, or if it holds anything but a result of kermes.
    """
    target = Path(path).resolve()
    if not target.parent.is_dir():
        raise FileError(f"output must lie in a directory that exists, got {path}")
    if not os.access(target.parent, os.W_OK):
        raise FileError(f"output must lie in a directory that can be written to, got {path}")
    if not target.exists():
        return target
    if not target.is_dir():
        raise FileError(f"output must be a directory, got the file {path}")
    if any(target.iterdir()):
        if not _is_result(target):
            raise FileError(f"output must be new, or a result of kermes to replace, got {path}, which is neither")
        if not overwrite and _read_metadata(target).get("complete", True):
            raise FileError(f"output must be new, got {path}, which exists; overwrite replaces it")
    return target


def sibling(target: Path) -> Path:
    """Name a new directory beside the target, on the same file system."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}")


def sync(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(folder: Path, target: Path) -> None:
    """Rename a complete directory into place; what was there goes away when the new one is in place."""
    for file in folder.iterdir():
        sync(file)
    sync(folder)
    old = None
    if target.exists():
        old = sibling(target)
        target.rename(old)
    try:
        folder.rename(target)
    except BaseException:
        if old is not None:
            old.rename(target)
        raise
    sync(target.parent)
    if old is not None:
        shutil.rmtree(old)


def write_result(
    result: Result,
    path: str | PathLike[str],
    *,
    overwrite: bool = False,
    extras: Mapping[str, bytes] | None = None,
) -> None:
    """Write a result into a directory.

    Parameters
    ----------
    result : Result
    path : path
        Directory to make. It appears when it is complete, or not at all.
    overwrite : bool, optional
        Whether an earlier result of that name may be replaced, with all that its directory holds.
    extras : mapping of str to bytes, optional
        Further files to put beside the tables, by name.

    Raises
    ------
    FileError
        If it exists and may not be replaced, or cannot be written.

    Notes
    -----
    The same result gives the same bytes, except for timings.json.
    """
    target = check_output(path, overwrite)
    try:
        folder = sibling(target)
        folder.mkdir()
        try:
            _write_files(result, folder)
            for name, content in (extras or {}).items():
                (folder / name).write_bytes(content)
            _publish(folder, target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise FileError(f"output {path} cannot be written: {error.strerror or error}") from error


# ---------------------------------------------------------------- reading


class _GroupedFile:
    """Rows of a Parquet file by a key; the rows of one key lie in one row group, keys increase."""

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.key = key
        with parquet(path) as file:
            self.metadata = file.metadata
        column = self.metadata.schema.to_arrow_schema().get_field_index(key)
        self.last_keys = [
            self.metadata.row_group(group).column(column).statistics.max
            for group in range(self.metadata.num_row_groups)
        ]
        self._latest: tuple[int, pa.Table] | None = None

    def rows(self, key: int) -> list[dict[str, Any]]:
        """Rows of one key; lists come as arrays. The latest row group is kept, so that reading in order is cheap."""
        group = int(np.searchsorted(self.last_keys, key))
        if group == len(self.last_keys):
            return []
        latest = self._latest
        if latest is None or latest[0] != group:
            latest = self._latest = group, self._read(group)
        table = latest[1]
        return rows_of(table, np.flatnonzero(table[self.key].to_numpy() == key))

    def _read(self, group: int) -> pa.Table:
        with parquet(self.path, self.metadata) as file:
            return file.read_row_group(group)


class _StoredModels(Mapping[int, Source]):
    """Models in a file, by object_id; each is read when it is asked for."""

    def __init__(self, path: Path, object_ids: NDArray[np.int64], origin: tuple[int, int]) -> None:
        self._file = _GroupedFile(path, "object_id")
        self._ids = dict.fromkeys(object_ids.tolist())
        self._origin = origin

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[int]:
        return iter(self._ids)

    def __getitem__(self, object_id: int) -> Source:
        if object_id not in self._ids:
            raise KeyError(object_id)
        rows = self._file.rows(object_id)
        try:
            return source_of_rows(rows, self._origin)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise _damaged(self._file.path, error) from None


class _StoredPsfs(Mapping[int, NDArray[np.float64]]):
    """PSFs in a file, by blend_id; each different one is read once."""

    def __init__(self, path: Path, psf_ids: Mapping[int, int]) -> None:
        self._file = _GroupedFile(path, "psf_id")
        self._psf_ids = psf_ids
        self._read: dict[int, NDArray[np.float64]] = {}

    def __len__(self) -> int:
        return len(self._psf_ids)

    def __iter__(self) -> Iterator[int]:
        return iter(self._psf_ids)

    def __getitem__(self, blend_id: int) -> NDArray[np.float64]:
        psf_id = self._psf_ids[blend_id]
        if psf_id not in self._read:
            rows = self._file.rows(psf_id)
            try:
                stamps = [row["pixels"].reshape(row["height"], row["width"]) for row in rows]
                self._read[psf_id] = np.stack(stamps)
            except (KeyError, ValueError) as error:
                raise _damaged(self._file.path, error) from None
        return self._read[psf_id]


def _damaged(path: Path, error: Exception) -> FileError:
    return FileError(f"{path} must be a file of a kermes result, but is damaged: {str(error).splitlines()[0]}")


@contextmanager
def parquet(path: Path, metadata: Any = None) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file; everything that is wrong with it becomes a FileError."""
    try:
        with pq.ParquetFile(path, metadata=metadata, page_checksum_verification=True) as file:
            yield file
    except FileNotFoundError:
        raise FileError(f"{path.parent} must be a complete kermes result, but {path.name} is missing") from None
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, error) from None


def _read_table(path: Path) -> Table:
    with parquet(path) as file:
        return from_arrow(file.read())


def _read_metadata(folder: Path) -> dict[str, Any]:
    if not folder.exists():
        raise FileError(f"path must be the directory of a kermes result, got {folder}, which does not exist")
    if not _is_result(folder):
        raise FileError(f"path must be the directory of a kermes result, got {folder}, which is not one")
    metadata: dict[str, Any] = json.loads((folder / "metadata.json").read_text())
    if metadata.get("schema", 0) > SCHEMA:
        raise FileError(
            f"{folder} was written by a newer kermes: its schema is {metadata['schema']}, "
            f"this one reads up to {SCHEMA}; upgrade kermes"
        )
    return metadata


def _read_wcs(header: str | None) -> WCS | None:
    if header is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FITSFixedWarning)
        return WCS(fits.Header.fromstring(header))


def _ids(tables: Mapping[str, Table]) -> NDArray[np.int64]:
    """Keys of the models; results of older versions have no candidates."""
    if "candidates" in tables:
        ids: NDArray[np.int64] = model_ids(tables["objects"], tables["candidates"])[0]
        return ids
    return np.asarray(tables["objects"]["object_id"], dtype=np.int64)


def open_result(path: str | PathLike[str], coadd: Coadd | None = None) -> Result:
    """Open a result that was written before.

    The tables are read at once, the model of an object when it is asked for: one object costs one small read.

    Parameters
    ----------
    path : path
        Directory of the result.
    coadd : Coadd, optional
        The images it was made from; without them only models can be evaluated.

    Returns
    -------
    result : Result

    Raises
    ------
    FileError
        If it is not a result of kermes, is damaged or incomplete, or was written by a newer version.
    InputError
        If `coadd` has other bands, another shape or another origin.

    Examples
    --------
    >>> result = kermes.open("out", coadd=kermes.read("scene.npz"))  # doctest: +SKIP
    """
    folder = Path(path)
    metadata = _read_metadata(folder)
    known = _TABLES if metadata["schema"] > 1 else _TABLES[:3]
    tables = {name: _read_table(folder / f"{name}.parquet") for name in known}
    try:
        origin = (metadata["origin"][0], metadata["origin"][1])
        blends = tables["blends"]
        psf_ids = dict(zip(blends["blend_id"].tolist(), blends["psf_id"].tolist(), strict=True))
        blends.remove_column("psf_id")
        unit, timings = metadata["unit"], folder / "timings.json"
        return Result(
            **tables,
            bands=tuple(metadata["bands"]),
            config=config_from_dict(tomllib.loads(metadata["config"]), origin=f"config of {folder}"),
            models=_StoredModels(folder / "models.parquet", _ids(tables), origin),
            psfs=_StoredPsfs(folder / "psfs.parquet", psf_ids),
            shape=(metadata["shape"][0], metadata["shape"][1]),
            origin=origin,
            unit=None if unit is None else units.Unit(unit, parse_strict="silent"),
            zero_point=metadata["zero_point"],
            wcs=_read_wcs(metadata["wcs"]),
            coadd=coadd,
            n_peaks=metadata.get("ledger", {}).get("peaks"),
            timings=json.loads(timings.read_text()) if timings.exists() else {},
        )
    except (KeyError, json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise FileError(f"{folder} must be a kermes result, but its metadata are damaged: {error}") from None
