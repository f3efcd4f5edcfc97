"""Finished blends on disk, so that a run that was stopped goes on where it was.

A directory with the fingerprint of the run, ``run.json``, and numbered directories of blends that were finished one
after the other: their columns of the tables of objects, candidates and blends, and their models, in array coordinates.
Each appears when it is complete. How many blends are in one depends on the clock, what is read back does not.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import shutil
import time
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from kermes import catalog, storage, store
from kermes.component_rows import Rows, source_of_rows, source_rows, write_models
from kermes.config import to_toml
from kermes.errors import FileError
from kermes.modelling import BlendOutcome
from kermes.planning import BlendTask, TilePlan
from kermes.rendering import SourceModels, render_scene
from kermes.scene import Scene, Source

SECONDS = 10.0
"""How often finished blends are written."""

MOST_BLENDS = 500
"""Most finished blends that are kept until they are written."""

_RUN = "run.json"
_PARTS = "blends-"


def fingerprint(plan: TilePlan) -> str:
    """Describe everything that the answer depends on in 64 letters."""
    digest = hashlib.sha256()
    coadd = plan.coadd
    version = importlib.metadata.version("kermes")
    texts = [version, to_toml(plan.config), " ".join(coadd.bands), str(coadd.shape), str(plan.background)]
    digest.update("\n".join(texts).encode())
    for array in (coadd.images, coadd.variance, coadd.valid, plan.peaks, plan.labels):
        for plane in array:
            digest.update(np.ascontiguousarray(plane).data)
    known: dict[int, NDArray[np.float64]] = {}
    for task in plan.tasks:
        if id(task.psfs) not in known:
            known[id(task.psfs)] = task.psfs
            digest.update(np.ascontiguousarray(task.psfs).data)
    return digest.hexdigest()


class Checkpoint:
    """Finished blends of one run."""

    def __init__(self, path: str | PathLike[str], plan: TilePlan) -> None:
        """Open the directory if it is there; else it is made when the first blends are written.

        Raises
        ------
        FileError
            If it belongs to another run, or cannot be read.
        """
        self.folder = Path(path)
        self._plan = plan
        self._waiting: list[BlendOutcome] = []
        self._written = time.monotonic()
        self._stored: dict[int, dict[str, Any]] = {}
        self._n_parts = 0
        if self.folder.exists():
            self._read(self._run())

    def _run(self) -> dict[str, str]:
        return {"format": "kermes checkpoint", "fingerprint": fingerprint(self._plan)}

    def _read(self, run: Mapping[str, str]) -> None:
        try:
            found = json.loads((self.folder / _RUN).read_text())
        except (OSError, ValueError):
            found = None
        if found != run:
            raise FileError(
                f"checkpoint must be of a run with the same images, peaks and settings, got {self.folder}, which is "
                f"{'of another run' if isinstance(found, dict) else 'none'}: remove it to begin anew"
            )
        for part in sorted(self.folder.glob(f"{_PARTS}*"), key=lambda part: int(part.name.removeprefix(_PARTS))):
            self._n_parts = int(part.name.removeprefix(_PARTS)) + 1
            self._stored |= _read_part(part)

    def restored(self, task: BlendTask) -> BlendOutcome | None:
        """Give a blend that was finished before; None if it was not.

        Models are rendered anew, which gives the same bits.
        """
        stored = self._stored.get(task.index)
        if stored is None:
            return None
        n_sources = len(task.members)
        scene = Scene(sources=tuple(stored["sources"]), box=task.outer)
        claims = render_scene(scene, task.kernels)
        end = claims.offsets[n_sources]
        return BlendOutcome(
            task=task,
            scene=Scene(sources=scene.sources[:n_sources], box=task.outer),
            models=SourceModels(
                boxes=claims.boxes[:n_sources],
                offsets=claims.offsets[: n_sources + 1],
                pixels=np.ascontiguousarray(claims.pixels[:, :end]),
            ),
            claims=claims,
            candidates=scene.sources[n_sources:],
            columns=stored["objects"],
            candidate_columns=stored["candidates"],
            blend_columns=stored["blends"],
            seconds=np.nan,
        )

    def add(self, outcome: BlendOutcome) -> None:
        """Keep a blend that was finished, unless it is there already."""
        if outcome.task.index in self._stored:
            return
        self._waiting.append(outcome)
        if len(self._waiting) >= MOST_BLENDS or time.monotonic() - self._written > SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the blends that were not written yet.

        Raises
        ------
        FileError
            If that fails.
        """
        if not self._waiting:
            return
        target = self.folder / f"{_PARTS}{self._n_parts}"
        try:
            if not self.folder.exists():
                self.folder.mkdir()
                (self.folder / _RUN).write_text(json.dumps(self._run(), indent=1) + "\n")
                storage.sync(self.folder / _RUN)
            folder = storage.sibling(target)
            folder.mkdir()
            try:
                _write_part(self._waiting, self._plan, folder)
                for file in folder.iterdir():
                    storage.sync(file)
                folder.rename(target)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        except OSError as error:
            raise FileError(f"checkpoint {self.folder} cannot be written: {error.strerror or error}") from error
        self._n_parts += 1
        self._waiting = []
        self._written = time.monotonic()

    def remove(self) -> None:
        """Remove the directory: the run is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _write_part(outcomes: list[BlendOutcome], plan: TilePlan, folder: Path) -> None:
    bands = plan.coadd.bands
    definitions = {
        "objects": catalog.object_columns(bands, plan.config.model),
        "candidates": catalog.candidate_columns(bands),
        "blends": catalog.BLEND_COLUMNS,
    }
    columns = {
        "objects": [(outcome.columns, len(outcome.task.members)) for outcome in outcomes],
        "candidates": [(outcome.candidate_columns, len(outcome.candidates)) for outcome in outcomes],
        "blends": [(outcome.blend_columns, 1) for outcome in outcomes],
    }
    for name, parts in columns.items():
        index = np.repeat([outcome.task.index for outcome in outcomes], [n for _, n in parts])
        table = _stack(parts, definitions[name])
        store.write_table(pa.table({"blend": index.astype(np.int64), **table}), folder / f"{name}.parquet", {})
    sources = (
        source_rows(source, number, outcome.task.index, (0, 0))
        for outcome in outcomes
        for number, source in enumerate((*outcome.scene.sources, *outcome.candidates))
    )
    write_models(folder / "models.parquet", sources, {})


def _stack(
    parts: list[tuple[Mapping[str, ArrayLike], int]], definitions: tuple[catalog.ColumnDefinition, ...]
) -> dict[str, NDArray[Any]]:
    """Put columns of several blends together; what a blend does not have is as in `empty_columns`."""
    names = {str(name) for columns, _ in parts for name in columns}
    table = catalog.empty_columns([item for item in definitions if item.name in names], sum(n for _, n in parts))
    start = 0
    for columns, n in parts:
        for name, values in columns.items():
            table[str(name)][start : start + n] = values
        start += n
    return table


def _read_part(folder: Path) -> dict[int, dict[str, Any]]:
    """Read one directory of blends, by their index."""
    tables = {}
    for name in ("objects", "candidates", "blends", "models"):
        with store.parquet(storage.Folder.of(folder), f"{name}.parquet") as file:
            tables[name] = file.read()
    stored: dict[int, dict[str, Any]] = {int(index): {"sources": []} for index in tables["blends"]["blend"].to_numpy()}
    for name in ("objects", "candidates", "blends"):
        table = tables[name]
        index = table["blend"].to_numpy()
        columns = {column: table[column].to_numpy() for column in table.column_names if column != "blend"}
        edges = np.flatnonzero(np.diff(index, prepend=-1, append=-1))
        for first, last in itertools.pairwise(edges.tolist()):
            stored[int(index[first])][name] = {key: values[first:last] for key, values in columns.items()}
    for blend in stored.values():
        blend.setdefault("objects", {})
        blend.setdefault("candidates", {})
        blend["blends"] = {key: values[0] for key, values in blend["blends"].items()}
    rows: list[dict[str, Any]] = []
    for row in Rows(tables["models"]):
        if rows and (row["blend_id"], row["object_id"]) != (rows[0]["blend_id"], rows[0]["object_id"]):
            _add_source(stored, rows)
            rows = []
        rows.append(row)
    if rows:
        _add_source(stored, rows)
    return stored


def _add_source(stored: dict[int, dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    source: Source = source_of_rows(rows, (0, 0))
    stored[rows[0]["blend_id"]]["sources"].append(source)
