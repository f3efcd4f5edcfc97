"""Components of sources as rows of a table, and their pixels as whole numbers of a step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kermes.errors import InputError
from kermes.geometry import Box
from kermes.scene import Component, CubeComponent, FactorizedComponent, ProfileComponent, Source

FIELDS = (
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
    ("levels", pa.list_(pa.int32())),
    ("steps", pa.list_(pa.float64())),
    ("morphology", pa.list_(pa.float32())),
    ("center_y", pa.float64()),
    ("center_x", pa.float64()),
    ("radius", pa.float64()),
    ("shear_1", pa.float64()),
    ("shear_2", pa.float64()),
    ("sersic_index", pa.float64()),
    ("sigma", pa.float64()),
)
"""Columns of a table of models."""

KEYS = ("object_id", "blend_id", "peak_y", "peak_x")
"""Columns by which rows are looked for."""

_SPREAD = ("spectrum", "levels", "morphology")  # stored byte by byte, which compresses them better
_BITS = 24  # of a float32
_COARSEST_BITS = 8
_ROWS_PER_GROUP = 256
_PIXELS_PER_GROUP = 1 << 18
_NOTHING = np.zeros(0, dtype=np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Tolerance:
    """How far the pixels of one source may be changed, all its components together."""

    frame: NDArray[np.float64]
    """In the model frame, each pixel in each band [unit], shape (B,)."""

    observed: NDArray[np.float64]
    """As observed, likewise."""


# ---------------------------------------------------------------- pixels as whole numbers


def rounded(planes: NDArray[np.float32], largest_errors: NDArray[np.float64]) -> NDArray[np.float32]:
    """Round pixels to multiples of a power of two, one for each plane.

    Parameters
    ----------
    planes : ndarray, shape (P, h, w)
    largest_errors : ndarray, shape (P,)
        How far a pixel of each plane may be changed.

    Returns
    -------
    rounded : ndarray, shape (P, h, w)
        The powers are as large as the errors allow, but never leave fewer than eight bits to the largest pixel. Planes
        of which the errors ask for more than the bits of a float32 are returned as they are.
    """
    largest = np.abs(planes).max(axis=(1, 2), initial=0.0).astype(np.float64)
    out = planes.copy()
    for plane, top, error in zip(out, largest.tolist(), largest_errors.tolist(), strict=True):
        if top == 0 or not np.isfinite(top) or error <= 0:
            continue
        exponent = math.frexp(top)[1]
        allowed = math.frexp(2 * error)[1] - 1 if math.isfinite(error) else exponent
        power = min(allowed, exponent - _COARSEST_BITS)
        if power > exponent - _BITS:
            step = math.ldexp(1.0, power)
            plane[:] = np.rint(plane / step) * step
    return out


def levels_of(planes: NDArray[np.float32]) -> tuple[NDArray[np.int32], NDArray[np.float64]] | None:
    """Write pixels as whole numbers times a power of two, one for each plane, without changing them.

    Parameters
    ----------
    planes : ndarray, shape (P, h, w)

    Returns
    -------
    levels : ndarray of int32, shape (P, h, w)
    steps : ndarray, shape (P,)
        The largest powers of two with which that goes; None instead of both if it does not go with 24 bits.
    """
    levels = np.zeros(planes.shape, dtype=np.int32)
    steps = np.ones(len(planes))
    for p, plane in enumerate(planes):
        top = float(np.abs(plane).max(initial=0.0))
        if top == 0:
            continue
        if not np.isfinite(top):
            return None
        finest = math.frexp(top)[1] - _BITS
        scaled = np.ldexp(plane.astype(np.float64), -finest)
        whole = scaled.astype(np.int64)
        if (whole != scaled).any():
            return None
        bits = int(np.bitwise_or.reduce(np.abs(whole), axis=None))
        spare = (bits & -bits).bit_length() - 1
        levels[p] = whole >> spare
        steps[p] = math.ldexp(1.0, finest + spare)
    return levels, steps


# ---------------------------------------------------------------- sources to rows


def source_rows(
    source: Source, model_id: int, blend_id: int, origin: tuple[int, int], tolerance: Tolerance | None = None
) -> list[dict[str, Any]]:
    """Turn a source into rows of a table, one per component; one without any gets a row of kind "none".

    With a tolerance, pixels are rounded; without one they are kept to the bit.

    Raises
    ------
    InputError
        If a component is of a kind that has no row.
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
        return [{**row, "component": 0, "kind": "none", **place, "spectrum": _NOTHING, **_pixels(None, None)}]
    n_pictures = sum(not isinstance(component, ProfileComponent) for component in source.components)
    return [
        {
            **row,
            "component": number,
            "y0": component.box.y0 + dy,
            "x0": component.box.x0 + dx,
            "height": component.box.height,
            "width": component.box.width,
            **_component_columns(component, origin, tolerance, n_pictures),
        }
        for number, component in enumerate(source.components)
    ]


def _component_columns(
    component: Component, origin: tuple[int, int], tolerance: Tolerance | None, n_pictures: int
) -> dict[str, Any]:
    """Say what is particular to a kind of component; columns of other kinds are left out."""
    if isinstance(component, FactorizedComponent):
        errors = None
        if tolerance is not None:
            spectrum = np.abs(component.spectrum.astype(np.float64))
            each = np.divide(tolerance.frame, spectrum, out=np.full_like(spectrum, np.inf), where=spectrum > 0)
            errors = each.min(keepdims=True) / n_pictures
        return {
            "kind": "factorized",
            "spectrum": component.spectrum,
            **_pixels(component.morphology[None], errors),
        }
    if isinstance(component, CubeComponent):
        errors = None
        if tolerance is not None:
            errors = (tolerance.observed if component.observed else tolerance.frame) / n_pictures
        kind = "template" if component.observed else "cube"
        return {"kind": kind, "spectrum": _NOTHING, **_pixels(component.cube, errors)}
    if isinstance(component, ProfileComponent):
        return {
            "kind": "profile",
            "spectrum": component.spectrum,
            **_pixels(None, None),
            "center_y": component.center[0] + origin[0],
            "center_x": component.center[1] + origin[1],
            "radius": component.radius,
            "shear_1": component.shear[0],
            "shear_2": component.shear[1],
            "sersic_index": component.index,
            "sigma": component.sigma,
        }
    raise InputError(
        f"components must be factorized, cubes, profiles or templates to be written, got a {type(component).__name__}"
    )


def _pixels(planes: NDArray[np.float32] | None, largest_errors: NDArray[np.float64] | None) -> dict[str, Any]:
    none = {"levels": np.zeros(0, dtype=np.int32), "steps": np.zeros(0), "morphology": _NOTHING}
    if planes is None:
        return none
    if largest_errors is not None:
        planes = rounded(planes, largest_errors)
    whole = levels_of(planes)
    if whole is None:
        return {**none, "morphology": planes}
    return {**none, "levels": whole[0], "steps": whole[1]}


# ---------------------------------------------------------------- rows to sources


def source_of_rows(rows: Sequence[Mapping[str, Any]], origin: tuple[int, int]) -> Source:
    """Make a source from its rows, lists as arrays; what `source_rows` wrote.

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
    if "levels" in row and len(row["steps"]):
        levels = row["levels"].reshape(len(row["steps"]), *box.shape)
        planes = (levels * row["steps"][:, None, None]).astype(np.float32)
    else:
        planes = row["morphology"].reshape(-1, *box.shape)
    if row["kind"] in ("template", "cube"):
        return CubeComponent(cube=planes, box=box, observed=row["kind"] == "template")
    if row["kind"] != "factorized":
        raise ValueError(f"unknown kind of component {row['kind']!r}")
    return FactorizedComponent(spectrum=row["spectrum"], morphology=planes.reshape(box.shape), box=box)


# ---------------------------------------------------------------- rows and Parquet


def writer(
    path: Path, schema: pa.Schema, keys: Iterable[str] | None = None, spread: Iterable[str] = ()
) -> pq.ParquetWriter:
    """Open a Parquet file; statistics of some columns alone, lists of numbers stored byte by byte."""
    spread = tuple(spread)
    return pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        use_dictionary=[name for name in schema.names if name not in spread],
        write_statistics=True if keys is None else list(keys),
        column_encoding={f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in spread} or None,
        write_page_checksum=True,
    )


def arrow_rows(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Put rows together; what a row does not have is null."""
    columns = [
        _lists((row[item.name] for row in rows), item.type)
        if pa.types.is_list(item.type)
        else pa.array([row.get(item.name) for row in rows], type=item.type)
        for item in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _lists(arrays: Iterable[NDArray[Any]], dtype: pa.DataType) -> pa.ListArray:
    arrays = [np.asarray(array).ravel() for array in arrays]
    offsets = np.concatenate([[0], np.cumsum([array.size for array in arrays])]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(arrays), type=dtype.value_type))


class Rows(Sequence[dict[str, Any]]):
    """Rows of a table, lists as arrays."""

    def __init__(self, table: pa.Table) -> None:
        self._length: int = table.num_rows
        self._scalars: dict[str, list[Any]] = {}
        self._places: dict[str, dict[Any, list[int]]] = {}
        self._lists: dict[str, tuple[list[int], NDArray[Any]]] = {}
        for name in table.column_names:
            column = table[name].combine_chunks()
            if isinstance(column, pa.ChunkedArray):
                column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], type=column.type)
            if pa.types.is_list(column.type):
                values = column.values.to_numpy(zero_copy_only=False)
                self._lists[name] = column.offsets.to_pylist(), values
            else:
                self._scalars[name] = column.to_pylist()

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(self._length))]
        row: dict[str, Any] = {name: values[index] for name, values in self._scalars.items()}
        for name, (offsets, values) in self._lists.items():
            row[name] = values[offsets[index] : offsets[index + 1]]
        return row

    def values(self, key: str) -> list[Any]:
        """Values of a column that has no lists."""
        return self._scalars[key]

    def where(self, key: str, value: Any) -> list[dict[str, Any]]:
        """Rows with a value in one of the columns."""
        places = self._places.get(key)
        if places is None:
            places = self._places[key] = {}
            for number, found in enumerate(self._scalars[key]):
                places.setdefault(found, []).append(number)
        return [self[number] for number in places.get(value, ())]


def write_models(
    path: Path,
    sources: Iterable[list[dict[str, Any]]],
    metadata: Mapping[str, str],
) -> list[int]:
    """Write a table of models.

    Parameters
    ----------
    path : path
    sources : iterable of list of dict
        The rows of one source after the other, by `source_rows`.
    metadata : mapping
        Of the file.

    Returns
    -------
    row_groups : list of int
        Where each source is. Row groups end after whole sources, and where they can after whole blends.
    """
    schema = pa.schema(FIELDS, metadata=metadata)
    with writer(path, schema, KEYS, _SPREAD) as file:
        rows: list[dict[str, Any]] = []
        n_pixels = number = 0
        row_groups = []
        for added in sources:
            fullness = max(len(rows) / _ROWS_PER_GROUP, n_pixels / _PIXELS_PER_GROUP)
            if fullness >= (2 if rows and rows[-1]["blend_id"] == added[0]["blend_id"] else 1):
                file.write_table(arrow_rows(rows, schema))
                rows, n_pixels, number = [], 0, number + 1
            row_groups.append(number)
            rows += added
            n_pixels += sum(row["morphology"].size + row["levels"].size for row in added)
        if rows:
            file.write_table(arrow_rows(rows, schema))
    return row_groups
