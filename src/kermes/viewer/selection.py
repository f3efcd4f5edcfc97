"""Which objects are listed, in which order, and in which colours they are marked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from astropy.table import Table
from matplotlib.colors import LogNorm, Normalize, to_rgb
from numpy.typing import NDArray

from kermes.catalog import OUTCOME_COLORS, Model, outcome_color
from kermes.errors import InputError
from kermes.plots import column_values
from kermes.result import Result

BoolArray = NDArray[np.bool_]
RgbArray = NDArray[np.uint8]

_OPERATORS = (">=", "<=", "!=", ">", "<", "=")
_PERCENTILES = (2.0, 98.0)  # of numbers, between which colours change
_COLOUR_MAP = "viridis"
_SHADES = 254  # of it: with that of what has no value, and none, as many as a picture with a palette has
_LOGARITHMIC = 50.0  # ratio of both from which on colours follow the logarithm, as for fluxes
_OF_MODELS = dict(
    zip(map(str, Model), ("tab:cyan", "tab:blue", "tab:green", "tab:red", "tab:purple", "tab:orange"), strict=True)
)
_WITHOUT_VALUE = (128, 128, 128)
_ON_BLACK = {"green": "lime"}  # what would be too dark on the picture
_YES_AND_NO = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}


def _checked_column(table: Table, name: str, argument: str) -> NDArray[Any]:
    if name not in table.colnames:
        raise InputError(f"{argument} must be a column of the table of objects, got {name!r}")
    values = np.asarray(table[name])
    return values if values.dtype.kind in "biu" else column_values(table, name) if values.dtype.kind == "f" else values


# ---------------------------------------------------------------- rows


def matching(objects: Table, conditions: Mapping[str, str]) -> BoolArray:
    """Find the rows that satisfy all conditions.

    Parameters
    ----------
    objects : Table
    conditions : mapping of str to str
        By column. Numbers: ``> 3``, ``>= 3``, ``< 3``, ``<= 3``, ``= 3`` or ``3``, ``!= 3``, ``1 .. 3`` with both ends,
        ``nan``. Booleans: ``yes`` or ``no``. Words: what they contain, in any case, or ``= word`` and ``!= word``.
        Several with a comma between them: any of them. Empty: none.

    Returns
    -------
    mask : ndarray, shape (N,), bool
        A comparison with NaN is False.

    Raises
    ------
    InputError
        If there is no such column, or a condition cannot be read.
    """
    mask = np.ones(len(objects), dtype=bool)
    for name, text in conditions.items():
        values = _checked_column(objects, name, "filter")
        alternatives = [part.strip() for part in text.split(",") if part.strip()]
        if alternatives:
            mask &= np.any([_satisfied(values, part, name) for part in alternatives], axis=0)
    return mask


def _satisfied(values: NDArray[Any], text: str, name: str) -> BoolArray:
    operator = next((sign for sign in _OPERATORS if text.startswith(sign)), "")
    operand = text.removeprefix(operator).strip()
    if values.dtype.kind == "b":
        if operand.lower() not in _YES_AND_NO or operator not in ("", "=", "!="):
            raise InputError(f"filter of {name} must be yes or no, got {text!r}")
        return np.asarray(values == (_YES_AND_NO[operand.lower()] is (operator != "!=")))
    if values.dtype.kind not in "iuf":
        words = values.astype(str)
        if operator in ("=", "!="):
            return np.asarray((words == operand) == (operator == "="))
        if operator:
            raise InputError(f"filter of {name} must be a word, perhaps after = or !=, got {text!r}")
        return np.asarray(np.char.find(np.char.lower(words), operand.lower()) >= 0)
    if not operator and operand.lower() == "nan":
        return np.isnan(values.astype(np.float64))
    low, dots, high = operand.partition("..")
    try:
        first, last = float(low), float(high) if dots else 0.0
    except ValueError:
        first = np.nan
    if np.isnan(first) or (dots and operator):
        raise InputError(f"filter of {name} must be like > 3, <= 3, = 3, != 3, 1 .. 3 or nan, got {text!r}")
    if dots:
        return np.asarray((values >= first) & (values <= last))
    compare = {">": np.greater, "<": np.less, ">=": np.greater_equal, "<=": np.less_equal, "!=": np.not_equal}
    return np.asarray(compare.get(operator, np.equal)(values, first))


def ordered(objects: Table, rows: NDArray[np.int64], column: str | None, descending: bool = False) -> NDArray[np.int64]:
    """Sort rows by a column; rows without a value come last either way, and equal ones stay in their order."""
    if column is None:
        return rows
    values = _checked_column(objects, column, "sort")[rows]
    if values.dtype.kind == "f":
        missing = np.isnan(values)
        keys = np.where(missing, 0, -values if descending else values)
        return rows[np.lexsort([keys, missing])]
    ranks = np.unique(values, return_inverse=True)[1]
    return rows[np.argsort(-ranks if descending else ranks, kind="stable")]


def as_json(objects: Table, rows: NDArray[np.int64], columns: list[str]) -> list[dict[str, Any]]:
    """Give rows as JSON has them: seven digits of a number, null where there is none."""
    found: list[list[Any]] = []
    for name in columns:
        values = _checked_column(objects, name, "columns")[rows]
        if values.dtype.kind == "f":
            found.append([float(f"{value:.7g}") if np.isfinite(value) else None for value in values.tolist()])
        else:
            found.append(values.tolist())
    return [dict(zip(columns, row, strict=True)) for row in zip(*found, strict=True)]


# ---------------------------------------------------------------- colours


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Colouring:
    """Colours of all objects and footprints by one column."""

    objects: RgbArray
    """Colour of each object, shape (N, 3)."""

    footprints: RgbArray
    """Colour of each footprint, in their order, shape (K, 3): that of the object in it with the largest value or, where
    values are words, of the last one in the legend."""

    legend: Mapping[str, Any]
    """As JSON. Of numbers: ``low``, ``high``, whether colours follow the ``log``, and ``colors``; of others:
    ``entries``, each with ``label``, ``color`` and ``count``."""


def colouring(result: Result, column: str) -> Colouring:
    """Choose the colours of objects and footprints by a column of the table of objects.

    Raises
    ------
    InputError
        If there is no such column.
    """
    objects = result.objects
    values = _checked_column(objects, column, "color")
    if values.dtype.kind in "iuf":
        palette, codes, legend = _numbers(values.astype(np.float64))
    else:
        palette, codes, legend = _words(values.astype(str), column)
    numbers = result.footprints.numbers
    order = np.argsort(numbers, kind="stable")
    highest = np.full(len(numbers), -1)
    if len(numbers):
        parents = np.asarray(objects["parent_id"])
        places = np.minimum(np.searchsorted(numbers, parents, sorter=order), len(numbers) - 1)
        inside = numbers[order[places]] == parents
        np.maximum.at(highest, order[places[inside]], codes[inside])
    unit = objects[column].unit
    title = column + (f" [{unit}]" if unit else "")
    # The last colour is that of what has no value, whose code is -1.
    palette = np.concatenate([palette, np.array([_WITHOUT_VALUE], dtype=np.uint8)])
    return Colouring(objects=palette[codes], footprints=palette[highest], legend={"title": title, **legend})


def _numbers(values: NDArray[np.float64]) -> tuple[RgbArray, NDArray[np.int64], dict[str, Any]]:
    shades = matplotlib.colormaps[_COLOUR_MAP](np.linspace(0, 1, _SHADES))
    palette = np.rint(255 * shades[:, :3]).astype(np.uint8)
    known = np.isfinite(values)
    low, high = (float(edge) for edge in np.percentile(values[known], _PERCENTILES)) if known.any() else (0.0, 1.0)
    norm = LogNorm(low, high, clip=True) if 0 < _LOGARITHMIC * low < high else Normalize(low, high, clip=True)
    share = np.asarray(norm(np.where(known, values, low)))
    codes = np.where(known, np.clip(np.rint((_SHADES - 1) * share), 0, _SHADES - 1), -1).astype(np.int64)
    colors = [_hex(palette[k]) for k in np.linspace(0, _SHADES - 1, 18).round().astype(int)]
    return palette, codes, {"low": low, "high": high, "log": isinstance(norm, LogNorm), "colors": colors}


def _words(values: NDArray[np.str_], column: str) -> tuple[RgbArray, NDArray[np.int64], dict[str, Any]]:
    names, codes = np.unique(values, return_inverse=True)
    known = {"outcome": map(str, OUTCOME_COLORS), "model": _OF_MODELS}
    places = {name: place for place, name in enumerate(known.get(column, ()))}
    order = sorted(range(len(names)), key=lambda k: (places.get(str(names[k]), len(places)), str(names[k])))
    rank = np.empty(len(names), dtype=np.int64)
    rank[order] = np.arange(len(names))
    codes = rank[codes]
    names = names[order]
    shades = [_shade(str(name), column, k) for k, name in enumerate(names)]
    palette = np.rint(255 * np.array([to_rgb(shade) for shade in shades]).reshape(-1, 3)).astype(np.uint8)
    counts = np.bincount(codes, minlength=len(names)).tolist()
    entries = [
        {"label": str(name) or "none", "color": _hex(palette[k]), "count": counts[k]} for k, name in enumerate(names)
    ]
    return palette, codes, {"entries": entries}


def _shade(name: str, column: str, place: int) -> str:
    if name in ("True", "False"):
        return "red" if name == "True" else "silver"
    if column == "outcome":
        return _ON_BLACK.get(outcome_color(name), outcome_color(name))
    return _OF_MODELS.get(name, f"C{place % 10}")


def _hex(colour: RgbArray) -> str:
    return "#" + bytes(colour.tolist()).hex()
