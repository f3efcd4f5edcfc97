"""One blend of a result fitted anew: with other peaks, or other settings; all else stays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from astropy.table import Table
from numpy.typing import ArrayLike, NDArray

from kermes.catalog import Flag, PreferredFlux, make_blends, make_candidates, make_objects, make_parents
from kermes.coadd import Coadd, normalize_peaks
from kermes.config import Config, to_toml
from kermes.errors import InputError
from kermes.geometry import Box
from kermes.rendering import SourceModels, outer_box, render_scene
from kermes.result import Result
from kermes.scene import Scene
from kermes.tile import deblend, shared_columns, shares_of_blend

MARGIN = 15
"""Pixels around a peak that are fitted at least."""

Value = TypeVar("Value")


class _Edited(Mapping[int, Value]):
    """A mapping of which some items are replaced, removed or added; the others are read when they are asked for."""

    def __init__(self, before: Mapping[int, Value], removed: Iterable[int], changed: Mapping[int, Value]) -> None:
        self._before, self._changed = before, dict(changed)
        self._removed = frozenset(removed)

    def __getitem__(self, key: int) -> Value:
        if key in self._changed:
            return self._changed[key]
        if key in self._removed:
            raise KeyError(key)
        return self._before[key]

    def __iter__(self) -> Iterator[int]:
        for key in self._before:
            if key not in self._removed and key not in self._changed:
                yield key
        yield from self._changed

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Renamed:
    """The new fit of a blend, with the numbers of the whole result."""

    fitted: Result
    object_ids: NDArray[np.int64]
    blend_ids: dict[int, int]
    candidate_ids: NDArray[np.int64]
    shift: tuple[int, int]


def refit(
    result: Result,
    blend_id: int,
    *,
    add: ArrayLike = (),
    remove: Iterable[int] = (),
    move: Mapping[int, ArrayLike] | None = None,
    config: Config | None = None,
) -> Result:
    """Fit one blend of a result anew, with peaks added, removed or moved, or with other settings.

    The light of all other blends is taken off the images and stays what it was; how the observed flux is shared is
    found anew wherever the blend reaches.

    Parameters
    ----------
    result : Result
        With its coadd.
    blend_id : int
    add : array_like, shape (N, 2), optional
        Peaks (y, x) to add, in the coadd's coordinates.
    remove : iterable of int, optional
        Objects of the blend to take out. Their light goes to the others, or to nobody.
    move : mapping of int to (y, x), optional
        New peaks of objects of the blend.
    config : Config, optional
        Settings of this fit, such as another model; the width of the model PSF stays that of the result. Left out:
        those of the result.

    Returns
    -------
    result : Result
        A new result; the old one stays as it is, to compare. Objects keep their numbers, new ones get the next. What
        was done is listed under "history" in its `notes`.

    Raises
    ------
    InputError
        If the result has no coadd, the blend or an object is not known, nothing would be left of the blend, a peak lies
        outside of the image, or the settings want templates where the result has other models.

    Notes
    -----
    The fit begins anew from the peaks, not from the models of before, so that the answer does not depend on what was
    tried earlier.
    """
    coadd = result.need_coadd("refit")
    if result.is_part:
        raise InputError("refit needs the models of all objects, and this result holds some of them")
    config = result.config if config is None else config
    if (config.model == "templates") != (result.config.model == "templates"):
        raise InputError(f"config must have a model like that of the result, {result.config.model}, got {config.model}")
    config = replace(config, model_psf_sigma=result.config.model_psf_sigma)
    objects = result.objects
    members = objects["object_id"][np.asarray(objects["blend_id"]) == blend_id].tolist()
    if not members:
        raise InputError(f"blend_id must be that of a blend with objects, got {blend_id}")
    moved = {} if move is None else {int(number): peak for number, peak in move.items()}
    removed = [int(number) for number in remove]
    for name, numbers in (("remove", removed), ("move", moved)):
        foreign = [number for number in numbers if number not in members]
        if foreign:
            raise InputError(f"{name} must name objects of blend {blend_id}, got {foreign[0]}")
    kept = [number for number in members if number not in removed]
    added = normalize_peaks(np.reshape(np.asarray(add), (-1, 2)), coadd) if np.size(add) else np.zeros((0, 2), np.int64)
    if not kept and not len(added):
        raise InputError(f"remove must leave an object in blend {blend_id}, or add must bring one")
    peaks = [
        normalize_peaks(np.reshape(np.asarray(moved[number]), (1, 2)), coadd)[0]
        if number in moved
        else result.models[number].peak
        for number in kept
    ]
    positions = np.concatenate([np.reshape(np.array(peaks, dtype=np.int64), (-1, 2)), added])

    box = result.box_of_blend(blend_id) | Box.around(positions).grow(MARGIN)
    outer = outer_box(box & Box.of_shape(coadd.shape), result.psfs[blend_id], Box.of_shape(coadd.shape))
    own = _models_of_blend(result, blend_id)
    fitted = _fit(result, coadd, positions, box, outer, own, config)
    new = _renamed(result, fitted, blend_id, kept, outer)
    entry: dict[str, Any] = {
        "blend_id": int(blend_id),
        "added": {
            str(number): (np.array(source.peak) + new.shift + coadd.origin).tolist()
            for number, source in zip(new.object_ids.tolist(), fitted.models.values(), strict=False)
            if number not in members
        },
        "removed": removed,
        "moved": {str(number): np.asarray(peak).tolist() for number, peak in moved.items()},
    }
    if config != result.config:
        entry["config"] = to_toml(config)
    return _merged(result, new, blend_id, members, own, entry)


def _models_of_blend(result: Result, blend_id: int) -> SourceModels:
    """Models of a blend and of its candidates as observed, on the pixels that they can reach, in those of the image."""
    ids, blends = result.model_ids()
    sources = tuple(result.models[number] for number in ids[blends == blend_id].tolist())
    outer = result.outer_box_of_blend(blend_id)
    models = render_scene(Scene(sources=sources, box=outer), result.kernels(result.psfs[blend_id]))
    return replace(models, boxes=models.boxes + np.array([*outer.origin, 0, 0]))


def _add(models: SourceModels, image: NDArray[np.float32], sign: int, positive: bool) -> None:
    """Add models to an image of the same coordinates, in place."""
    for pixels, box in models.by_source():
        image[:, box.y, box.x] += sign * (np.maximum(pixels, 0) if positive else pixels)


def _fit(
    result: Result,
    coadd: Coadd,
    positions: NDArray[np.int64],
    box: Box,
    outer: Box,
    own: SourceModels,
    config: Config,
) -> Result:
    """Deblend the pixels of a blend from which the light of all others was taken."""
    others = result.model_image(box=outer.shift(*coadd.origin)).copy()
    _add(replace(own, boxes=own.boxes - np.array([*outer.origin, 0, 0])), others, -1, positive=False)
    cut = coadd.cutout(outer.shift(*coadd.origin))
    window = (slice(None), outer.y, outer.x)
    images = np.where(coadd.valid[window], coadd.images[window] - others, coadd.images[window])
    object.__setattr__(cut, "images", np.ascontiguousarray(images))
    # So few pixels do not tell.
    object.__setattr__(cut, "noise_factors", result.noise_factors)
    labels = np.zeros(outer.shape, dtype=np.int64)
    labels[box.within(outer)] = 1
    return deblend(cut, peaks=positions + coadd.origin, footprints=labels, config=config)


def _renamed(result: Result, fitted: Result, blend_id: int, kept: list[int], outer: Box) -> _Renamed:
    """Give what was fitted the numbers of the result: kept ones keep theirs, others get the next."""
    next_object = int(np.max(result.objects["object_id"])) + 1
    n_added = len(fitted) - len(kept)
    next_blend = int(np.max(result.blends["blend_id"])) + 1
    blends = fitted.blends["blend_id"].tolist()
    next_candidate = int(np.max(result.candidates["candidate_id"], initial=0)) + 1
    return _Renamed(
        fitted=fitted,
        object_ids=np.array([*kept, *range(next_object, next_object + n_added)], dtype=np.int64),
        blend_ids={number: blend_id if k == 0 else next_blend + k - 1 for k, number in enumerate(blends)},
        candidate_ids=np.arange(next_candidate, next_candidate + len(fitted.candidates)),
        shift=outer.origin,
    )


def _at_edge(result: Result, new: _Renamed) -> NDArray[np.bool_]:
    """Whether the boxes of the new fit touch the edge of the image, and not only that of the pixels that were cut."""
    image, found = Box.of_shape(result.shape), []
    for number, flagged in zip(new.fitted.objects["object_id"].tolist(), new.fitted.objects[Flag.EDGE], strict=True):
        box = new.fitted.models[number].box.shift(*new.shift) & image
        touches = box.y0 == 0 or box.x0 == 0 or box.y1 == image.y1 or box.x1 == image.x1
        found.append(bool(flagged) and touches)
    return np.array(found, dtype=bool)


def _joined(before: Table, keep: NDArray[np.bool_], after: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Put the rows that stay and new rows together, column by column; those of old files that lack one know nothing."""
    joined = {}
    for name, values in after.items():
        if name in before.colnames:
            old = np.asarray(before[name])
        else:
            old = np.full(len(before), np.nan if values.dtype.kind == "f" else values.dtype.type())
        joined[name] = np.concatenate([old[keep], values])
    return joined


def _columns(table: Table, changes: Mapping[str, ArrayLike]) -> dict[str, NDArray[Any]]:
    return {name: np.asarray(changes.get(name, table[name])) for name in table.colnames}


def _merged(
    result: Result, new: _Renamed, blend_id: int, members: list[int], own: SourceModels, entry: Mapping[str, Any]
) -> Result:
    """Put the new fit in the place of the old one."""
    fitted, bands, unit = new.fitted, result.bands, result.unit
    old_objects, old_blends, old_candidates = result.objects, result.blends, result.candidates
    parent_id = int(old_blends["parent_id"][np.asarray(old_blends["blend_id"]) == blend_id][0])
    peak_index = dict(zip(old_objects["object_id"].tolist(), old_objects["peak_index"].tolist(), strict=True))
    blend_of = np.array([new.blend_ids[number] for number in fitted.objects["blend_id"].tolist()], dtype=np.int64)
    names_of = dict(zip(fitted.objects["object_id"].tolist(), new.object_ids.tolist(), strict=True))
    correlated = [names_of.get(number, 0) for number in fitted.objects["correlated_id"].tolist()]
    rows = _columns(
        fitted.objects,
        {
            "object_id": new.object_ids,
            "correlated_id": np.array(correlated, dtype=np.int64),
            "blend_id": blend_of,
            "parent_id": np.full(len(fitted), parent_id),
            "peak_index": np.array([peak_index.get(number, -1) for number in new.object_ids.tolist()], dtype=np.int64),
            Flag.EDGE.value: _at_edge(result, new),
        },
    )
    objects = _joined(old_objects, ~np.isin(old_objects["object_id"], members), rows)
    blend_ids = np.array([new.blend_ids[number] for number in fitted.blends["blend_id"].tolist()], dtype=np.int64)
    blends = _joined(
        old_blends,
        np.asarray(old_blends["blend_id"]) != blend_id,
        _columns(fitted.blends, {"blend_id": blend_ids, "parent_id": np.full(len(blend_ids), parent_id)}),
    )
    of_candidates = [new.blend_ids[number] for number in fitted.candidates["blend_id"].tolist()]
    candidates = _joined(
        old_candidates,
        np.asarray(old_candidates["blend_id"]) != blend_id,
        _columns(
            fitted.candidates,
            {"candidate_id": new.candidate_ids, "blend_id": np.array(of_candidates, dtype=np.int64)},
        ),
    )
    parents = {name: np.array(result.parents[name]) for name in result.parents.colnames}
    here = parents["parent_id"] == parent_id
    parents["n_peaks"][here] += len(fitted) - len(members)
    parents["n_blends"][here] += len(blend_ids) - 1

    numbers = [*fitted.objects["object_id"].tolist(), *(-fitted.candidates["candidate_id"]).tolist()]
    names = [*new.object_ids.tolist(), *(-new.candidate_ids).tolist()]
    models = {name: fitted.models[number].shift(*new.shift) for name, number in zip(names, numbers, strict=True)}
    gone = old_candidates["candidate_id"][np.asarray(old_candidates["blend_id"]) == blend_id].tolist()
    psfs = {new.blend_ids[number]: fitted.psfs[number] for number in fitted.blends["blend_id"].tolist()}
    merged = replace(
        result,
        objects=make_objects(objects, bands, unit, result.config.model),
        parents=make_parents(parents),
        blends=make_blends(blends),
        candidates=make_candidates(candidates, bands, unit),
        models=_Edited(result.models, [*members, *(-number for number in gone)], models),
        psfs=_Edited(result.psfs, [blend_id], psfs),
        n_peaks=None if result.n_peaks is None else result.n_peaks + len(fitted) - len(members),
        notes={**result.notes, "history": [*result.notes.get("history", []), dict(entry)]},
        timings={},
    )
    changed = result.outer_box_of_blend(blend_id)
    for number in blend_ids.tolist():
        changed = changed | merged.outer_box_of_blend(number)
    if result.total is None:  # it is drawn where it is asked for
        return _shared_anew(merged, changed)
    total = result.total.copy()
    _add(own, total, -1, positive=True)
    for number in blend_ids.tolist():
        _add(_models_of_blend(merged, number), total, 1, positive=True)
    np.maximum(total, 0, out=total)  # what is left of a difference of equal numbers
    return _shared_anew(replace(merged, total=total), changed)


def _shared_anew(result: Result, changed: Box) -> Result:
    """Fill the columns that rest on the light of all blends, for those that reach into a box."""
    coadd = result.need_coadd("refit")
    objects = {name: np.array(result.objects[name]) for name in result.objects.colnames}
    # As wide as its longest text, which may not be among those of the result.
    objects["preferred_flux"] = objects["preferred_flux"].astype(f"U{max(map(len, PreferredFlux))}")
    outers = {number: result.outer_box_of_blend(number) for number in result.blends_near(changed).tolist()}
    outers = {number: outer for number, outer in outers.items() if not (outer & changed).is_empty}
    total = result.total
    if total is None:
        # Only pixels that these blends reach are looked at, so that only they are drawn.
        reached = Box(0, 0, 0, 0)
        for outer in outers.values():
            reached = reached | outer
        total = np.zeros((len(result.bands), *result.shape), dtype=np.float32)
        total[:, reached.y, reached.x] = result.model_image(positive=True, box=reached.shift(*result.origin))
    rows, shares = [], []
    for blend_id, outer in outers.items():
        rows.append(np.flatnonzero(objects["blend_id"] == blend_id))
        sources = tuple(result.models[number] for number in objects["object_id"][rows[-1]].tolist())
        models = render_scene(Scene(sources=sources, box=outer), result.kernels(result.psfs[blend_id]))
        shares.append(shares_of_blend(coadd, outer, models, total))
    changed_rows = np.concatenate(rows)
    theirs = {name: values[changed_rows] for name, values in objects.items()}
    for name, values in shared_columns(
        theirs, result.bands, np.concatenate(shares, axis=1), result.noise_factors
    ).items():
        objects[name][changed_rows] = values
    table = make_objects(objects, result.bands, result.unit, result.config.model)
    return replace(result, objects=table)
