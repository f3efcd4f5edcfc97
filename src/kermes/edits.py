"""Lists of refits: kept in a file beside a result, and applied to it again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from kermes.config import changed_config, to_toml
from kermes.errors import FileError, InputError
from kermes.refitting import refit
from kermes.result import Result
from kermes.storage import write_file

_FORMAT = "kermes edits"
_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """One refit of one blend; see `kermes.refit`."""

    blend_id: int
    """The blend."""

    add: tuple[tuple[float, float], ...] = ()
    """Peaks (y, x) to add, in the coadd's coordinates."""

    remove: tuple[int, ...] = ()
    """Objects to take out."""

    move: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    """New peaks of objects."""

    settings: tuple[str, ...] = ()
    """Settings of this fit that differ from those of the result, such as ``model=scarlet-lite``."""

    def apply(self, result: Result) -> Result:
        """Fit the blend anew; what is raised is that of `kermes.refit` and, for settings, of `config.load_config`."""
        config = changed_config(result.config, self.settings) if self.settings else None
        return refit(result, self.blend_id, add=self.add, remove=self.remove, move=self.move, config=config)

    def as_json(self) -> dict[str, Any]:
        """Give it as JSON has it, without what it leaves as it is."""
        content = {
            "add": [list(peak) for peak in self.add],
            "remove": list(self.remove),
            "move": {str(number): list(peak) for number, peak in self.move.items()},
            "settings": list(self.settings),
        }
        return {"blend_id": self.blend_id, **{name: value for name, value in content.items() if value}}

    @classmethod
    def of_json(cls, content: Any) -> Edit:
        """Make one from what `as_json` gives.

        Raises
        ------
        InputError
            If it is something else.
        """
        names = ("blend_id", "add", "remove", "move", "settings")
        if not isinstance(content, dict) or "blend_id" not in content or not set(content) <= {*names}:
            raise InputError(f"an edit must have blend_id, and may have {', '.join(names[1:])}; got {content!r}")
        try:
            return cls(
                blend_id=_whole(content["blend_id"]),
                add=tuple(_peak(peak) for peak in content.get("add", [])),
                remove=tuple(_whole(number) for number in content.get("remove", [])),
                move={int(number): _peak(peak) for number, peak in content.get("move", {}).items()},
                settings=tuple(_text(setting) for setting in content.get("settings", [])),
            )
        except (TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"an edit must have numbers, peaks (y, x) and settings; got {content!r}: {error}"
            ) from None


def _whole(value: Any) -> int:
    if isinstance(value, bool) or int(value) != value:
        raise ValueError(f"{value!r} is no whole number")
    return int(value)


def _peak(value: Any) -> tuple[float, float]:
    y, x = (float(number) for number in value)
    if not np.isfinite(y + x):
        raise ValueError(f"{value!r} is no position")
    return y, x


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no setting")
    return value


def apply_edits(result: Result, edits: Iterable[Edit]) -> Result:
    """Apply edits one after the other; the same ones give the same result.

    Raises
    ------
    InputError
        As `kermes.refit`.
    """
    for edit in edits:
        result = edit.apply(result)
    return result


def _fingerprint(result: Result) -> str:
    """Say which result it is: by its settings, and by numbers and places of its objects."""
    digest = hashlib.sha256(to_toml(result.config).encode())
    for name in ("object_id", "blend_id", "y", "x"):
        digest.update(np.ascontiguousarray(result.objects[name]).tobytes())
    return digest.hexdigest()[:16]


def write_edits(path: str | PathLike[str], edits: Sequence[Edit], result: Result) -> None:
    """Write edits into a file; it appears, or replaces an earlier one, when it is complete.

    Parameters
    ----------
    path : path
    edits : sequence of Edit
    result : Result
        What they are to be applied to, as it was before the first of them.

    Raises
    ------
    FileError
        If it cannot be written.
    """
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "result": _fingerprint(result),
        "edits": [edit.as_json() for edit in edits],
    }
    write_file(path, json.dumps(content, indent=1).encode() + b"\n")


def read_edits(path: str | PathLike[str], result: Result) -> list[Edit]:
    """Read edits of a result.

    Raises
    ------
    FileError
        If there is no such file, or it is damaged.
    InputError
        If the edits were made on another result.
    """
    try:
        content = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise FileError(f"edits must be a readable file, got {os.fspath(path)}: {error.strerror or error}") from None
    except ValueError as error:
        raise FileError(f"edits {os.fspath(path)} is damaged: {error}") from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT or content.get("version") != _VERSION:
        raise FileError(f"edits must be a file of the format {_FORMAT!r}, version {_VERSION}, got {os.fspath(path)}")
    if content.get("result") != _fingerprint(result):
        raise InputError(f"edits must be those of this result, but {os.fspath(path)} was made on another one")
    try:
        return [Edit.of_json(entry) for entry in content["edits"]]
    except (KeyError, TypeError, InputError) as error:
        raise FileError(f"edits {os.fspath(path)} is damaged: {error}") from None
