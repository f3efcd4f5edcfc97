"""Tables in every format: units and descriptions go with them. Pixels of objects as a table."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO, StringIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from astropy import units
from astropy.io import fits
from astropy.table import Column, Table

from kermes.result import Result, StampKind


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


def footprint_bytes(result: Result, kind: StampKind | str, bands: Sequence[str] | None = None) -> bytes:
    """Write the pixels of all objects as a FITS table of lists.

    Parameters
    ----------
    result : Result
    kind, bands
        As in `ObjectHandle.footprint`.

    Returns
    -------
    content : bytes
        One row per object: ``object_id``; ``y``, ``x0`` and ``x1``, row, first column and the column after the last one
        of each run of pixels, in the coordinates of the coadd; and per band the values of all pixels, run by run.
    """
    bands = result.bands if bands is None else tuple(bands)
    ids, spans, values = [], [], []
    for handle in result:
        heavy = handle.footprint(kind, bands)
        ids.append(handle.object_id)
        spans.append(heavy.footprint.spans.astype(np.int32))
        values.append(heavy.values)
    unit = None if result.unit is None else result.unit.to_string("fits")

    def lists(items: list[Any]) -> Any:
        column = np.empty(len(items), dtype=object)
        column[:] = items
        return column

    columns = [fits.Column("object_id", "K", array=np.array(ids, dtype=np.int64))]
    for number, name in enumerate(("y", "x0", "x1")):
        columns.append(fits.Column(name, "PJ()", unit="pix", array=lists([each[:, number] for each in spans])))
    for b, band in enumerate(bands):
        columns.append(fits.Column(f"{band}_{kind}", "PE()", unit=unit, array=lists([each[b] for each in values])))
    buffer = BytesIO()
    fits.HDUList([fits.PrimaryHDU(), fits.BinTableHDU.from_columns(columns, name="FOOTPRINTS")]).writeto(buffer)
    return buffer.getvalue()
