"""Reports: one HTML file of some objects, with pictures, numbers, flags and settings, that needs nothing else."""

from __future__ import annotations

import base64
import importlib.metadata
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from kermes import plots
from kermes.catalog import ColumnDefinition, object_columns
from kermes.config import Config, to_toml
from kermes.errors import InputError
from kermes.geometry import Box
from kermes.result import ObjectHandle, Result

MOST_OBJECTS = 50
"""Objects that a report may have: each takes a picture of some 100 kB."""

_MARGIN = 15  # pixels around the objects in the picture of all of them
_DPI = 110
_PER_BAND = "{band}_"

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #222; }
h1, h2, h3 { line-height: 1.2; }
h2 { border-top: 1px solid #ccc; padding-top: 1em; }
table { border-collapse: collapse; margin: 0.7em 0; }
th, td { padding: 0.2em 0.7em; text-align: right; border-bottom: 1px solid #e4e4e4; }
td { font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; height: auto; }
pre { background: #f6f6f6; padding: 0.8em; overflow-x: auto; font-size: 13px; }
.flag { background: #fde8c8; border-radius: 0.6em; padding: 0.1em 0.6em; margin-right: 0.4em; white-space: nowrap; }
.lesser { color: #b35900; }
summary { cursor: pointer; }
"""


def worst_objects(result: Result, n: int) -> list[int]:
    """Choose the `n` objects whose models fit worst: those with the largest chi2, the worst first; NaN is left out."""
    if n < 1:
        raise InputError(f"worst must be a number of objects, at least 1, got {n}")
    chi2 = np.asarray(result.objects["chi2"], dtype=np.float64)
    order = np.argsort(np.where(np.isfinite(chi2), -chi2, np.inf), kind="stable")
    order = order[np.isfinite(chi2[order])][:n]
    return [int(number) for number in np.asarray(result.objects["object_id"])[order]]


def area_of(result: Result, object_ids: Iterable[int]) -> Box:
    """Find the pixels around the peaks of objects and around their models, in the coordinates of the coadd."""
    box = Box(0, 0, 0, 0)
    for number in object_ids:
        handle = result[number]
        stamp = handle.box if not handle.box.is_empty else Box(*handle.peak, 1, 1)
        box = box | stamp
    return box.grow(_MARGIN) & Box(*result.origin, *result.shape)


def html_report(result: Result, object_ids: Sequence[int], title: str = "kermes report") -> str:
    """Write a report of some objects.

    Parameters
    ----------
    result : Result
        Without a coadd the pictures have models only.
    object_ids : sequence of int
        Objects, in the order of their sections.
    title : str, optional
        Title of the page.

    Returns
    -------
    html : str
        One page that needs no other file and no network: a picture of the area; for each object a strip of pictures,
        its numbers in all bands, its flags and components; the ledger of the result; and all settings, those that
        differ from the defaults first.

    Raises
    ------
    InputError
        If there is no object, an object is not in the result, or there are more than `MOST_OBJECTS`.
    """
    if not 1 <= len(object_ids) <= MOST_OBJECTS:
        raise InputError(f"a report must have 1 to {MOST_OBJECTS} objects, got {len(object_ids)}")
    handles = [result[int(number)] for number in object_ids]
    ids = [handle.object_id for handle in handles]
    parts = [f"<h1>{escape(title)}</h1>", _summary(result)]
    if result.coadd is not None:
        area = plots.png_bytes(plots.show_region(result, area_of(result, ids), ids), _DPI)
        parts += ["<h2>Area</h2>", _image(area, "image, model and residual around the objects")]
    parts += [object_section(handle) for handle in handles]
    parts += [_settings(result.config)]
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _image(content: bytes, text: str) -> str:
    return f'<img alt="{escape(text)}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["<table>", "<tr>" + "".join(f"<th>{escape(name)}</th>" for name in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    return "\n".join([*lines, "</table>"])


def _number(value: Any) -> str:
    """Write a value as people read it."""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return str(value)
    if isinstance(value, float | np.floating):
        return "-" if not np.isfinite(value) else f"{value:.6g}"
    return escape(str(value)) or "-"


def _summary(result: Result) -> str:
    ledger = result.ledger()
    versions = f"kermes {importlib.metadata.version('kermes')}, model “{escape(result.config.model)}”"
    height, width = result.shape
    text = (
        f"<p>{versions}; bands {escape(' '.join(result.bands))}; {height} × {width} pixels from "
        f"y = {result.origin[0]}, x = {result.origin[1]}; {len(result)} objects in {len(result.blends)} blends.</p>"
    )
    counts = [(escape(name), str(n)) for name, n in ledger["outcomes"].items()]
    reasons = [(escape(name), str(n)) for name, n in ledger["reasons"].items()]
    peaks = "not known" if ledger["peaks"] is None else str(ledger["peaks"])
    lines = [
        text,
        f"<details><summary>Ledger: {peaks} peaks in, {ledger['rows']} rows out</summary>",
        _table(["outcome", "rows"], counts),
        _table(["reason", "rows"], reasons),
        "</details>",
    ]
    return "\n".join(lines)


def object_section(handle: ObjectHandle, picture: str | None = None) -> str:
    """Write what is known of one object: its place and flags, its pictures, and its numbers.

    Parameters
    ----------
    handle : ObjectHandle
    picture : str, optional
        Address of its pictures; None: they are drawn, and are in the page.

    Returns
    -------
    html : str
        Part of a page.
    """
    result, row = handle.result, handle.row
    number = handle.object_id
    place = f"y = {row['y']:.2f}, x = {row['x']:.2f}"
    if np.isfinite(row["ra"]):
        place += f"; ra = {row['ra']:.6f}°, dec = {row['dec']:+.6f}°"
    outcome = escape(str(row["outcome"]) or "none")
    if outcome != "full":
        reason = f" ({escape(str(row['reason']))})" if row["reason"] else ""
        outcome = f'<span class="lesser">{outcome}{reason}</span>'
    names = [name for name in result.objects.colnames if name.startswith("flag_") and row[name]]
    flags = "".join(_flag(result, name) for name in names) or "none"
    text = (
        f"<p>{place}; blend {row['blend_id']}, parent {row['parent_id']}. Outcome: {outcome}. Model: "
        f"{escape(str(row['model'])) or 'none'}, {row['n_components']} components. "
        f"χ² {_number(row['chi2'])}. Flags: {flags}</p>"
    )
    text_of_picture = f"object {number} in pictures"
    if picture is None:
        strip = _image(plots.png_bytes(plots.show_objects(result, [number]), _DPI), text_of_picture)
    else:
        strip = f'<img alt="{text_of_picture}" src="{escape(picture)}">'
    parts = [
        f'<h2 id="object-{number}">Object {number}</h2>',
        text,
        strip,
        _numbers(handle),
    ]
    return "\n".join(parts)


def _flag(result: Result, name: str) -> str:
    meaning = result.objects[name].description or ""
    return f'<span class="flag" title="{escape(meaning)}">{escape(name.removeprefix("flag_"))}</span>'


def _numbers(handle: ObjectHandle) -> str:
    """Tables of what is known of an object: per band, and of all bands together."""
    result, row = handle.result, handle.row
    definitions = object_columns((_PER_BAND[:-1],), result.config.model)
    of_bands = [column for column in definitions if column.name.startswith(_PER_BAND)]
    others = [column for column in definitions if not column.name.startswith((_PER_BAND, "flag_"))]
    columns = result.objects.columns
    rows = []
    for column in of_bands:
        names = [column.name.replace("{band}", band) for band in result.bands]
        if all(name in columns for name in names):
            values = [_number(row[name]) for name in names]
            if set(values) != {"-"}:
                rows.append([_meaning(column, result, names[0]), *values])
    known = [column for column in others if column.name in columns]
    single = [[_meaning(column, result, column.name), _number(row[column.name])] for column in known]
    return (
        _table(["", *result.bands], rows)
        + "\n<details><summary>All other columns</summary>\n"
        + _table(["column", "value"], single)
        + "\n</details>"
    )


def _meaning(column: ColumnDefinition, result: Result, name: str) -> str:
    unit = result.objects[name].unit
    title = column.name.removeprefix(_PER_BAND)
    shown = f"{title} [{unit}]" if unit else title
    return f'<span title="{escape(column.description)}">{escape(shown)}</span>'


def _settings(config: Config) -> str:
    changed = _changes(config) or ["all settings are the defaults"]
    return (
        "<h2>Settings</h2>\n<pre>"
        + escape("\n".join(changed))
        + "</pre>\n<details><summary>All settings</summary>\n<pre>"
        + escape(to_toml(config))
        + "</pre>\n</details>"
    )


def _changes(config: Config) -> list[str]:
    """Settings that differ from the defaults, as assignments."""
    found: list[str] = []

    def compare(value: Mapping[str, Any], default: Mapping[str, Any], prefix: str) -> None:
        for name, content in value.items():
            if isinstance(content, dict):
                compare(content, default[name], f"{prefix}{name}.")
            elif content != default[name]:
                found.append(f"{prefix}{name} = {content!r}")

    compare(tomllib.loads(to_toml(config)), tomllib.loads(to_toml(Config())), "")
    return found
