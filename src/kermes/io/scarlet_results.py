"""Results as models of the LSST pipelines, and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
from astropy import units
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from kermes.catalog import (
    BLEND_COLUMNS,
    PARENT_COLUMNS,
    Flag,
    Model,
    Outcome,
    Reason,
    empty_columns,
    make_blends,
    make_objects,
    make_parents,
    object_columns,
)
from kermes.config import Config
from kermes.errors import FileError, InputError
from kermes.geometry import Box, Footprint, Footprints, box_table
from kermes.io.scarlet import (
    DAMAGE,
    ScarletBlend,
    ScarletComponent,
    ScarletIsolated,
    ScarletModels,
    ScarletParent,
    ScarletSource,
    arrays_of_lists,
    lists_of_arrays,
    pair,
    read_scarlet_models,
    write_scarlet_models,
)
from kermes.io.wcs import header_of_wcs, wcs_of_header
from kermes.psf import model_psf
from kermes.rendering import KernelSet, render_source
from kermes.result import Result
from kermes.scene import Component, CubeComponent, FactorizedComponent, ProfileComponent, Source

_OURS = "kermes"
_FAINTEST = 1e-5
_SAME_PSF = 1e-4


# ---------------------------------------------------------------- models to a result


def _sigma_of(stamp: NDArray[Any], path: str) -> float:
    """Find the width of a model PSF, which must be a Gaussian integrated over pixels."""
    stamp = np.asarray(stamp, dtype=np.float64)
    if stamp.ndim != 2 or stamp.shape[0] != stamp.shape[1] or stamp.shape[0] % 2 == 0:
        raise FileError(f"{path} must have a square model_psf with an odd side, got the shape {stamp.shape}")
    side = stamp.shape[0]
    found: Any = minimize_scalar(
        lambda sigma: float(np.abs(model_psf(sigma, side) - stamp).max()), bounds=(0.2, side / 4), method="bounded"
    )
    sigma = float(round(found.x, 4))
    if np.abs(model_psf(sigma, side) - stamp).max() > _SAME_PSF * stamp.max():
        raise FileError(f"{path} must have a Gaussian as its model_psf, got one that differs from all of them")
    return sigma


class _Fitted(NamedTuple):
    """One blend that was fitted, and where it belongs."""

    parent_id: int
    blend_id: int
    blend: ScarletBlend


def _fitted(models: ScarletModels) -> Iterator[_Fitted]:
    for number, top in models.blends.items():
        yield from _below(number, number, top)


def _below(parent_id: int, number: int, blend: ScarletBlend | ScarletParent) -> Iterator[_Fitted]:
    if isinstance(blend, ScarletBlend):
        yield _Fitted(parent_id, number, blend)
    else:
        for child_id, child in blend.children.items():
            yield from _below(parent_id, child_id, child)


def _components(source: ScarletSource) -> tuple[Component, ...]:
    components: list[Component] = []
    for each in source.components:
        if each.cube is not None:
            components.append(CubeComponent(cube=each.cube, box=Box(*each.origin, *each.cube.shape[-2:])))
        else:
            assert each.morphology is not None
            assert each.spectrum is not None
            box = Box(*each.origin, *each.morphology.shape)
            components.append(FactorizedComponent(spectrum=each.spectrum, morphology=each.morphology, box=box))
    return tuple(components)


def _whole(peak: tuple[float, float]) -> tuple[int, int]:
    return int(np.floor(peak[0] + 0.5)), int(np.floor(peak[1] + 0.5))


def _number_of_bands(models: ScarletModels, fitted: list[_Fitted]) -> int:
    counts = set()
    for each in fitted:
        for source in each.blend.sources.values():
            for component in source.components:
                values = component.spectrum if component.cube is None else component.cube
                assert values is not None
                counts.add(len(values))
    metadata = models.metadata or {}
    counts |= {len(metadata[key]) for key in ("bands", "psf") if key in metadata}
    if len(counts) > 1:
        raise ValueError(f"its models have different numbers of bands: {sorted(counts)}")
    return counts.pop() if counts else 1


def _rest(metadata: Mapping[str, Any] | None, known: Iterable[str]) -> dict[str, Any]:
    """What metadata say that a result has no place for, as JSON."""
    return lists_of_arrays({key: value for key, value in (metadata or {}).items() if key not in known})


def result_of_scarlet(models: ScarletModels, path: str | PathLike[str] = "the file") -> Result:
    """Make a result of models of the LSST pipelines.

    Parameters
    ----------
    models : ScarletModels
    path : path, optional
        What messages call them.

    Returns
    -------
    result : Result
        Numbers are kept: `parent_id` is that of the top of a blend, `blend_id` that of the blend that was fitted, and
        `object_id` the ``id`` of a source, or its number where it has none. An isolated source is an object without a
        model and with its footprint, with the reason "isolated". Coordinates are those of the tract. Fluxes are
        those of the models, their errors are NaN, because the files have none. A band whose PSF is not in the file
        cannot be drawn as observed.

    Raises
    ------
    FileError
        If the model PSF is not a Gaussian, or two objects have the same number.
    """
    try:
        return _result(models, str(path))
    except FileError:
        raise
    except DAMAGE as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        raise FileError(f"{path} must hold models that belong together, but does not: {text}") from None


def _result(models: ScarletModels, path: str) -> Result:
    fitted = list(_fitted(models))
    metadata = models.metadata or {}
    of_blends = [each.blend.metadata or {} for each in fitted]
    n_bands = _number_of_bands(models, fitted)
    named = next((each["bands"] for each in (metadata, *of_blends) if "bands" in each), None)
    bands = tuple(f"b{b}" for b in range(n_bands)) if named is None else tuple(map(str, named))
    sigma = _sigma_of(metadata["model_psf"], path) if "model_psf" in metadata else Config().model_psf_sigma

    missing = np.zeros((n_bands, 1, 1))
    psfs = {
        each.blend_id: np.asarray(own.get("psf", metadata.get("psf", missing)), dtype=np.float64)
        for each, own in zip(fitted, of_blends, strict=True)
    }
    if any(psf.ndim != 3 or len(psf) != n_bands for psf in psfs.values()):
        raise ValueError(f"a psf has another shape than ({n_bands}, height, width)")

    if len(psfs) < len(fitted):
        raise ValueError("two blends have the same number")
    boxes = {each.blend_id: Box(*each.blend.origin, *each.blend.shape) for each in fitted}
    isolated = {number: Box(*each.origin, *each.spans.shape) for number, each in models.isolated.items()}
    outer = Box(0, 0, 0, 0)
    for box in [box.grow(max(psfs[number].shape[1:]) // 2) for number, box in boxes.items()] + [*isolated.values()]:
        outer = outer | box
    ours = metadata.get(_OURS, {})
    if ours:
        outer = Box(*ours["origin"], *ours["shape"])
    dy, dx = outer.origin

    sources: dict[int, Source] = {}
    rows: list[tuple[int, int, int, int]] = []
    notes: dict[str, Any] = {"sources": {}, "blends": {}, "parents": {}, "component_peaks": {}}
    for parent_id, blend_id, blend in fitted:
        rest = _rest(blend.metadata, ("psf", "bands"))
        if rest:
            notes["blends"][str(blend_id)] = rest
        for number, source in blend.sources.items():
            own = source.metadata or {}
            object_id = int(own.get("id", number))
            peaks = [component.peak for component in source.components if component.peak is not None]
            components = _components(source)
            # A source without components has a peak only if we wrote it.
            first = peaks[0] if peaks else components[0].box.origin if components else own.get("peak", blend.origin)
            if object_id in sources:
                raise ValueError(f"two sources have the number {object_id}")
            sources[object_id] = Source(peak=_whole(first), components=components).shift(-dy, -dx)
            rows.append((object_id, parent_id, blend_id, int(own.get("peak_id", -1))))
            if len({_whole(peak) for peak in peaks}) > 1 or len(peaks) < len(components):
                notes["component_peaks"][str(object_id)] = [component.peak for component in source.components]
            rest = _rest(own, ("id", "peak_id", *([] if components else ["peak"])))
            if rest or number != object_id:
                notes["sources"][str(object_id)] = rest | ({"number": number} if number != object_id else {})
    for number, single in models.isolated.items():
        if number in sources:
            raise ValueError(f"two sources have the number {number}")
        sources[number] = Source(peak=_whole((single.peak[0] - dy, single.peak[1] - dx)), components=())
        rows.append((number, number, 0, -1))
        rest = _rest(single.metadata, ())
        if rest:
            notes["sources"][str(number)] = rest
    for number, top in models.blends.items():
        rest = _rest(top.metadata, ("spans", "origin")) if isinstance(top, ScarletParent) else {}
        if rest or isinstance(top, ScarletBlend):
            notes["parents"][str(number)] = rest | ({"is_blend": True} if isinstance(top, ScarletBlend) else {})
    rest = _rest(metadata, ("model_psf", "psf", "bands", _OURS))
    unit = None if ours.get("unit") is None else units.Unit(ours["unit"], parse_strict="silent")
    notes = {key: value for key, value in notes.items() if value} | ({"metadata": rest} if rest else {})

    return Result(
        objects=_objects(rows, sources, models, bands, outer.origin, unit),
        parents=_parents(models, fitted, boxes, isolated),
        blends=_blends(fitted, boxes),
        bands=bands,
        config=Config(model="scarlet-lite", model_psf_sigma=sigma),
        models=sources,
        psfs=psfs,
        shape=outer.shape,
        origin=outer.origin,
        unit=unit,
        zero_point=ours.get("zero_point"),
        noise_factors=ours.get("noise_factors"),
        wcs=wcs_of_header(ours.get("wcs")),
        footprints=_footprints(models).shifted(-dy, -dx),
        inputs={},
        notes={"scarlet": {"version": models.version, **notes}},
        n_peaks=len(rows),
    )


def _footprints(models: ScarletModels) -> Footprints:
    pairs = {}
    for number, top in models.blends.items():
        metadata = top.metadata or {}
        if isinstance(top, ScarletParent) and "spans" in metadata:
            pairs[number] = Footprint.of_mask(np.asarray(metadata["spans"]) != 0, *pair(metadata["origin"]))
    for number, single in models.isolated.items():
        pairs[number] = Footprint.of_mask(single.spans != 0, *single.origin)
    return Footprints.of(pairs)


def _objects(
    rows: list[tuple[int, int, int, int]],
    sources: Mapping[int, Source],
    models: ScarletModels,
    bands: tuple[str, ...],
    origin: tuple[int, int],
    unit: units.UnitBase | None,
) -> Any:
    columns = empty_columns(object_columns(tuple(bands), "scarlet-lite"), len(rows))
    table = np.array(rows, dtype=np.int64).reshape(-1, 4)
    for name, values in zip(("object_id", "parent_id", "blend_id", "peak_index"), table.T, strict=True):
        columns[name][:] = values
    for row, (object_id, *_) in enumerate(rows):
        source = sources[object_id]
        single = models.isolated.get(object_id)
        columns["y"][row], columns["x"][row] = (
            single.peak if single is not None else np.add(source.peak, origin).tolist()
        )
        flux = source.flux(len(bands))
        for b, band in enumerate(bands):
            columns[f"{band}_flux"][row] = np.nan if single is not None else flux[b]
        columns["n_components"][row] = len(source.components)
        columns["outcome"][row] = Outcome.FULL if single is None else Outcome.PEAK
        columns["reason"][row] = Reason.NONE if single is None else Reason.ISOLATED
        columns["model"][row] = Model.FREE_FORM if source.components else ""
        columns["converged"][row] = single is None
        columns[Flag.NULL_MODEL][row] = not flux.any()
    return make_objects(columns, bands, unit, "scarlet-lite")


def _box_columns(columns: Mapping[str, NDArray[Any]], boxes: Iterable[Box]) -> None:
    table = box_table(boxes)
    for name, values in zip(("y0", "x0", "height", "width"), table.T, strict=True):
        columns[name][:] = values


def _parents(
    models: ScarletModels, fitted: list[_Fitted], boxes: Mapping[int, Box], isolated: Mapping[int, Box]
) -> Any:
    ids = [*models.blends, *models.isolated]
    columns = empty_columns(PARENT_COLUMNS, len(ids))
    columns["parent_id"][:] = ids
    footprints = _footprints(models)
    around = {number: Box(0, 0, 0, 0) for number in ids} | dict(isolated)
    for row, number in enumerate(ids):
        own = [each for each in fitted if each.parent_id == number] if number in models.blends else []
        for each in own:
            around[number] = around[number] | boxes[each.blend_id]
        if number in footprints:
            around[number] = around[number] | footprints[number].box
            columns["area"][row] = footprints[number].area
        columns["n_blends"][row] = len(own)
        columns["n_peaks"][row] = sum(len(each.blend.sources) for each in own) if own else 1
    _box_columns(columns, (around[number] for number in ids))
    return make_parents(columns)


def _blends(fitted: list[_Fitted], boxes: Mapping[int, Box]) -> Any:
    columns = empty_columns(BLEND_COLUMNS, len(fitted))
    for row, (parent_id, blend_id, blend) in enumerate(fitted):
        columns["blend_id"][row], columns["parent_id"][row] = blend_id, parent_id
        columns["n_sources"][row] = columns[f"n_{Outcome.FULL}"][row] = len(blend.sources)
        columns["n_components"][row] = sum(len(source.components) for source in blend.sources.values())
    columns["converged"][:] = True
    _box_columns(columns, (boxes[each.blend_id] for each in fitted))
    return make_blends(columns)


def read_scarlet(path: str | PathLike[str]) -> Result:
    """Read a file of models of the LSST pipelines as a result; see `read_scarlet_models` and `result_of_scarlet`."""
    return result_of_scarlet(read_scarlet_models(path), path)


# ---------------------------------------------------------------- a result to models


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Conversion:
    """What became of the models of a result."""

    models: ScarletModels
    """What can be written."""

    n_profiles: int
    """Number of objects with profiles, which were drawn on pixels of the model frame."""

    largest_error: float
    """Largest difference that makes in a pixel of one of them as observed, over its brightest pixel; 0: no profiles."""

    largest_flux_error: float
    """Largest difference of the flux of one of them in a band, over its flux."""


def _as_pixels(component: ProfileComponent) -> ScarletComponent | None:
    """Draw a profile of flux one in the model frame, without the faintest wings."""
    image = ProfileComponent(
        spectrum=np.ones(1, dtype=np.float32),
        center=component.center,
        radius=component.radius,
        shear=component.shear,
        index=component.index,
        sigma=component.sigma,
        box=component.box,
    ).evaluate()[0]
    top = float(image.max())
    lit = Box.where(image > _FAINTEST * top)
    if lit.is_empty:
        return None
    # What is cut off is given back to the rest, so that the flux stays what it is.
    cut = image[lit.y, lit.x]
    scale = top / float(cut.sum(dtype=np.float64))
    return ScarletComponent(
        origin=(component.box.y0 + lit.y0, component.box.x0 + lit.x0),
        peak=None,
        spectrum=(component.spectrum * scale).astype(np.float32),
        morphology=(cut / np.float32(top)).astype(np.float32),
    )


def _scarlet_components(source: Source) -> tuple[ScarletComponent, ...]:
    """Write the components of a source, as array index."""
    found = []
    for each in source.components:
        if isinstance(each, ProfileComponent):
            drawn = _as_pixels(each)
            if drawn is not None:
                found.append(drawn)
        elif isinstance(each, FactorizedComponent):
            found.append(
                ScarletComponent(origin=each.box.origin, peak=None, spectrum=each.spectrum, morphology=each.morphology)
            )
        elif isinstance(each, CubeComponent) and not each.observed:
            found.append(ScarletComponent(origin=each.box.origin, peak=None, cube=each.cube))
        else:
            raise InputError("models of .scarlet files lie in the model frame, and templates are light as observed")
    return tuple(found)


def _loss(result: Result, source: Source, drawn: Source, blend_id: int) -> tuple[float, float]:
    """Compare a source with its picture on pixels: the largest difference as observed, and of a flux."""
    psfs = result.psfs[blend_id]
    kernels: KernelSet = result.kernels(psfs)
    image = Box.of_shape(result.shape).grow(max(psfs.shape[1:]))
    expected, box = render_source(source, kernels, image)
    got, own = render_source(drawn, kernels, image)
    difference = expected.copy()
    difference[(slice(None), *own.within(box))] -= got[(slice(None), *box.within(own))]
    fluxes = source.flux(len(result.bands)), drawn.flux(len(result.bands))
    of_flux = np.abs(fluxes[1] - fluxes[0]).max() / max(float(np.abs(fluxes[0]).max()), 1e-300)
    return float(np.abs(difference).max() / max(float(np.abs(expected).max(initial=0.0)), 1e-300)), float(of_flux)


def scarlet_of_result(result: Result) -> Conversion:
    """Write a result as models of the LSST pipelines.

    Parameters
    ----------
    result : Result
        With profiles, free-form components or cubes.

    Returns
    -------
    conversion : Conversion
        The models and what they lost. Free forms and cubes are kept to the bit, profiles become pixels of the model
        frame. Candidates are left out: the files have no place for them.

    Raises
    ------
    InputError
        If the result has templates, or a parent has the number of an isolated source.

    Notes
    -----
    A parent without a footprint gets the box around its blends.
    """
    notes = result.notes.get("scarlet", {})
    dy, dx = result.origin
    objects = result.objects
    names = ("object_id", "parent_id", "blend_id", "peak_index", "reason", "y", "x")
    columns = [objects[name].tolist() for name in names]
    isolated: dict[int, ScarletIsolated] = {}
    sources: dict[int, dict[int, ScarletSource]] = {}
    reach: dict[int, Box] = {}
    n_profiles, largest, of_flux = 0, 0.0, 0.0
    for object_id, parent_id, blend_id, peak_index, reason, y, x in zip(*columns, strict=True):
        source = result.models[object_id]
        noted = dict(notes.get("sources", {}).get(str(object_id), {}))
        number = noted.pop("number", object_id)
        if reason == Reason.ISOLATED:
            footprint = result.footprints[parent_id].shift(dy, dx)
            isolated[object_id] = ScarletIsolated(
                spans=footprint.mask(footprint.box).astype(np.float32),
                origin=footprint.box.origin,
                peak=(y, x),
                metadata=arrays_of_lists(noted) or None,
            )
            continue
        drawn = _scarlet_components(source)
        if any(isinstance(each, ProfileComponent) for each in source.components):
            n_profiles += 1
            picture = Source(peak=source.peak, components=_components(ScarletSource(components=drawn)))
            error, flux_error = _loss(result, source, picture, blend_id)
            largest, of_flux = max(largest, error), max(of_flux, flux_error)
        peak = (source.peak[0] + dy, source.peak[1] + dx)
        peaks = notes.get("component_peaks", {}).get(str(object_id)) or [peak] * len(drawn)
        placed = [
            ScarletComponent(
                origin=(each.origin[0] + dy, each.origin[1] + dx),
                peak=None if own is None else (own[0], own[1]),
                spectrum=each.spectrum,
                morphology=each.morphology,
                cube=each.cube,
            )
            for each, own in zip(drawn, peaks, strict=True)
        ]
        metadata = (
            {"id": object_id} | ({"peak_id": peak_index} if peak_index >= 0 else {}) | (arrays_of_lists(noted) or {})
        )
        metadata |= {} if placed else {"peak": list(peak)}
        sources.setdefault(blend_id, {})[number] = ScarletSource(components=tuple(placed), metadata=metadata)
        for each in source.components:
            reach[blend_id] = reach.get(blend_id, Box(0, 0, 0, 0)) | each.box.shift(dy, dx)
    return Conversion(
        models=ScarletModels(
            blends=_scarlet_parents(result, sources, reach),
            isolated=isolated,
            metadata=_scarlet_metadata(result),
        ),
        n_profiles=n_profiles,
        largest_error=largest,
        largest_flux_error=of_flux,
    )


def _shared_psf(result: Result) -> NDArray[np.float32] | None:
    """The PSF of all blends, or that of the first if they differ; None without blends."""
    ids = result.blends["blend_id"].tolist()
    return np.asarray(result.psfs[ids[0]], dtype=np.float32) if ids else None


def _scarlet_metadata(result: Result) -> dict[str, Any]:
    notes = result.notes.get("scarlet", {})
    metadata: dict[str, Any] = {"model_psf": model_psf(result.config.model_psf_sigma).astype(np.float32)}
    psf = _shared_psf(result)
    if psf is not None and psf.any():
        metadata["psf"] = psf
    metadata |= {"bands": list(result.bands)} | (arrays_of_lists(notes.get("metadata")) or {})
    if not notes:  # the files have no place for what is said here, and their readers pass over it
        metadata[_OURS] = {
            "origin": list(result.origin),
            "shape": list(result.shape),
            "unit": None if result.unit is None else result.unit.to_string(),
            "zero_point": result.zero_point,
            "noise_factors": result.noise_factors.tolist(),
            "wcs": header_of_wcs(result.wcs),
        }
    return metadata


def _scarlet_parents(
    result: Result, sources: Mapping[int, Mapping[int, ScarletSource]], reach: Mapping[int, Box]
) -> dict[int, ScarletBlend | ScarletParent]:
    notes = result.notes.get("scarlet", {})
    dy, dx = result.origin
    common = _shared_psf(result)
    blends: dict[int, dict[int, ScarletBlend]] = {}
    around: dict[int, Box] = {}
    names = ("blend_id", "parent_id", "y0", "x0", "height", "width")
    for blend_id, parent_id, *box_of in zip(*(result.blends[name].tolist() for name in names), strict=True):
        box = Box(*box_of)
        box = box | reach.get(blend_id, box)
        metadata = arrays_of_lists(notes.get("blends", {}).get(str(blend_id))) or {}
        psf = np.asarray(result.psfs[blend_id], dtype=np.float32)
        if common is None or psf.shape != common.shape or (psf != common).any():
            metadata |= {"psf": psf, "bands": list(result.bands)}
        blends.setdefault(parent_id, {})[blend_id] = ScarletBlend(
            origin=box.origin, shape=box.shape, sources=sources.get(blend_id, {}), metadata=metadata or None
        )
        around[parent_id] = around.get(parent_id, box) | box
    parents: dict[int, ScarletBlend | ScarletParent] = {}
    for parent_id, children in blends.items():
        noted = dict(notes.get("parents", {}).get(str(parent_id), {}))
        if noted.pop("is_blend", False) and len(children) == 1:
            parents[parent_id] = next(iter(children.values()))
            continue
        box = around[parent_id]
        if parent_id in result.footprints:
            footprint = result.footprints[parent_id].shift(dy, dx)
            box = footprint.box
            spans = footprint.mask(box)
        else:
            spans = np.ones(box.shape, dtype=bool)
        metadata = {"spans": spans, "origin": list(box.origin)} | (arrays_of_lists(noted) or {})
        parents[parent_id] = ScarletParent(children=children, metadata=metadata)
    return parents


def write_scarlet(result: Result, path: str | PathLike[str], overwrite: bool = False) -> Conversion:
    """Write a result as a ``.scarlet`` archive; see `scarlet_of_result` and `write_scarlet_models`."""
    conversion = scarlet_of_result(result)
    write_scarlet_models(conversion.models, path, overwrite=overwrite)
    return conversion
