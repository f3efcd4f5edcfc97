"""A simulated repository, to try the tasks."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import starlink.Ast as Ast
from astro_metadata_translator import ObservationInfo
from astropy import units
from lsst.daf.butler import Butler, Config, DatasetType
from lsst.images import DetectorFrame, Image, VisitImage
from lsst.images.cameras import (
    CameraFrameSetSerializationModel,
    Detector,
    DetectorAttributes,
    DetectorType,
    Orientation,
)
from lsst.images.psfs import GaussianPointSpreadFunction
from lsst.sphgeom import ConvexPolygon, LonLat, UnitVector3d

from kermes import storage
from kermes.coadd import Coadd
from kermes.errors import FileError, InputError
from kermes.geometry import Box
from kermes.lsst.butler import DETECTOR, PATCH_BAND
from kermes.lsst.images import cell_coadd, lsst_box, lsst_mask, sky_of
from kermes.lsst.paths import SEED_CONFIG
from kermes.psf import gaussian_fwhm
from kermes.simulation import SimulatedPatch, simulate_patch

SKYMAP = "kermes_sim"
INSTRUMENT = "KermesCam"
INPUTS = "kermes/inputs"
"""Sky map, instrument and collection of a simulated repository."""

_VISIT = 1
_TRACT = 0


class _Patch(NamedTuple):
    number: int
    place: tuple[int, int]
    inner: Box
    outer: Box


def make_repository(
    root: str | PathLike[str],
    *,
    patches: tuple[int, int] = (2, 2),
    bands: Sequence[str] = ("g", "r", "i"),
    patch_size: int = 300,
    cell: int = 50,
    visits: bool = True,
    seed: int = 1,
) -> Butler:
    """Simulate a small tract, and make a repository with its coadds.

    Parameters
    ----------
    root : path
        Directory to make.
    patches : (int, int), optional
        Number of rows and columns of patches.
    bands : sequence of str, optional
        Some of u, g, r, i, z, y.
    patch_size : int, optional
        Side of the part of a patch that no other patch has [pixels]; coadds reach one cell further on each side.
    cell : int, optional
        Side of a cell [pixels].
    visits : bool, optional
        Whether to add a single visit, an image of the same sky in the first band.
    seed : int, optional
        The same seed gives the same sky.

    Returns
    -------
    butler : Butler
        Open for writing, to be closed. In its collection "kermes/inputs" are ``deep_coadd`` per patch and band,
        ``deep_coadd_truth``, the simulated sources, per tract, and ``visit_image``.

    Raises
    ------
    FileError
        If the directory exists and is not empty, or cannot be written; it is whole, or not there at all.
    InputError
        If a number lies outside its range.

    Notes
    -----
    The sky is that of `simulate_patch`, with a PSF that varies over it, without large galaxy and masked strip.
    """
    if min(patches) < 1 or cell < 8 or patch_size < cell or patch_size % cell:
        raise InputError(
            f"patches must be >= 1 and patch_size a multiple of cell, which must be >= 8; got {patches}, {patch_size} "
            f"and {cell}"
        )
    if len(set(bands)) != len(bands) or not bands:
        raise InputError(f"bands must be different names, at least one, got {tuple(bands)}")
    folder = Path(root)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileError(f"repository must be a new directory, got {root}, which exists")
    shape = patches[0] * patch_size + 2 * cell, patches[1] * patch_size + 2 * cell
    sky = simulate_patch(
        shape=shape,
        bands=bands,
        seed=seed,
        psf_variation=0.03,
        large_galaxy=False,
        masked_strip=False,
        n_bright_stars=0,
    )
    tiles = _patches(patches, patch_size, cell)
    part = storage.sibling(folder.absolute())
    whole = part / "repository"  # a Butler takes a name with a dot for that of a file
    try:
        part.mkdir()
        Butler.makeRepo(str(whole), config=Config(str(SEED_CONFIG)))
        with Butler.from_config(str(whole), writeable=True, run=INPUTS) as butler:
            _fill(butler, sky, tiles, cell, visit_band=bands[0] if visits else None)
        whole.rename(folder)
    except OSError as error:
        raise FileError(f"repository {root} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Butler.from_config(str(folder), collections=INPUTS, writeable=True)


def _fill(butler: Butler, sky: SimulatedPatch, tiles: Sequence[_Patch], cell: int, visit_band: str | None) -> None:
    """Write the records of everything and the images."""
    bands = sky.coadd.bands
    inputs = [
        ("deep_coadd", PATCH_BAND, "CellCoadd"),
        ("deep_coadd_truth", ("skymap", "tract"), "ArrowAstropy"),
        ("visit_image", DETECTOR, "VisitImage"),
    ]
    for name, dimensions, storage_class in inputs:
        butler.registry.registerDatasetType(DatasetType(name, dimensions, storage_class, universe=butler.dimensions))
    _insert_instrument(butler, bands)
    _insert_sky_map(butler, sky.coadd, tiles)
    for tile in tiles:
        coadd = sky.coadd.cutout(tile.outer)
        for band in bands:
            image = cell_coadd(
                coadd,
                band,
                cell=cell,
                skymap=SKYMAP,
                tract=_TRACT,
                tract_box=sky.coadd.box,
                patch=tile.number,
                patch_place=tile.place,
                inner=tile.inner,
            )
            butler.put(image, "deep_coadd", skymap=SKYMAP, tract=_TRACT, patch=tile.number, band=band)
    truth = sky.truth.copy()
    truth.meta.clear()
    butler.put(truth, "deep_coadd_truth", skymap=SKYMAP, tract=_TRACT)
    if visit_band is not None:
        _put_visit(butler, sky, visit_band)


def _patches(n: tuple[int, int], size: int, border: int) -> list[_Patch]:
    out = []
    for number in range(n[0] * n[1]):
        row, column = divmod(number, n[1])
        inner = Box(border + row * size, border + column * size, size, size)
        out.append(_Patch(number, (row, column), inner, inner.grow(border)))
    return out


def _region(coadd: Coadd, box: Box) -> ConvexPolygon:
    """Region of the sky that a box of pixels covers."""
    y = np.array([box.y0, box.y0, box.y1, box.y1]) - 0.5
    x = np.array([box.x0, box.x1, box.x1, box.x0]) - 0.5
    ra, dec = coadd.sky(y=y, x=x)
    corners = zip(ra.tolist(), dec.tolist(), strict=True)
    return ConvexPolygon([UnitVector3d(LonLat.fromDegrees(*corner)) for corner in corners])


def _insert_sky_map(butler: Butler, coadd: Coadd, tiles: Sequence[_Patch]) -> None:
    """Write the records of sky map, tract and patches."""
    n_y, n_x = tiles[-1].place[0] + 1, tiles[-1].place[1] + 1
    with butler.transaction():
        insert = butler.registry.insertDimensionData
        name_hash = hashlib.sha1(SKYMAP.encode(), usedforsecurity=False).digest()
        insert("skymap", {"name": SKYMAP, "hash": name_hash, "tract_max": 1, "patch_nx_max": n_x, "patch_ny_max": n_y})
        insert("tract", {"skymap": SKYMAP, "id": _TRACT, "region": _region(coadd, coadd.box)})
        for tile in tiles:
            row, column = tile.place
            record: dict[str, Any] = {"skymap": SKYMAP, "tract": _TRACT, "id": tile.number}
            insert("patch", record | {"cell_x": column, "cell_y": row, "region": _region(coadd, tile.outer)})


def _insert_instrument(butler: Butler, bands: Sequence[str]) -> None:
    """Write the records of the instrument, without which a repository knows no bands."""
    with butler.transaction():
        insert = butler.registry.insertDimensionData
        limits = {"visit_max": 10, "exposure_max": 10, "detector_max": 1}
        # No class stands behind the name; it is never imported for what is done here.
        insert("instrument", {"name": INSTRUMENT, "class_name": f"kermes.lsst.{INSTRUMENT}", **limits})
        for band in bands:
            insert("physical_filter", {"instrument": INSTRUMENT, "name": _physical_filter(band), "band": band})
        insert("detector", {"instrument": INSTRUMENT, "id": 0, "full_name": "D0", "purpose": "SCIENCE"})


def _physical_filter(band: str) -> str:
    return f"{INSTRUMENT}-{band}"


# ---------------------------------------------------------------- its visit


def _put_visit(butler: Butler, sky: SimulatedPatch, band: str) -> None:
    """Add one visit: the image of the tract in a band, as one detector saw it."""
    region = _region(sky.coadd, sky.coadd.box)
    with butler.transaction():
        insert = butler.registry.insertDimensionData
        insert("day_obs", {"instrument": INSTRUMENT, "id": 20260101})
        visit = {"instrument": INSTRUMENT, "id": _VISIT, "name": "visit1", "day_obs": 20260101, "exposure_time": 30.0}
        insert("visit", visit | {"physical_filter": _physical_filter(band), "region": region})
        insert("visit_detector_region", {"instrument": INSTRUMENT, "visit": _VISIT, "detector": 0, "region": region})
    butler.put(
        visit_image(sky.coadd, band, instrument=INSTRUMENT, visit=_VISIT, physical_filter=_physical_filter(band)),
        "visit_image",
        instrument=INSTRUMENT,
        visit=_VISIT,
        detector=0,
    )


def visit_image(coadd: Coadd, band: str, *, instrument: str, visit: int, physical_filter: str) -> VisitImage:
    """Make a visit image of one band of a coadd, as if one detector had taken it.

    Its PSF is a Gaussian as wide as that in the middle of the coadd.
    """
    b = coadd.bands.index(band)
    box = lsst_box(coadd.box)
    frame = DetectorFrame(instrument=instrument, detector=0, visit=visit, bbox=box)
    image = Image(
        np.asarray(coadd.images[b]), bbox=box, unit=coadd.unit, sky_projection=sky_of(coadd, frame, coadd.box)
    )
    variance = Image(np.asarray(coadd.variance[b]), bbox=box, unit=coadd.unit**2)  # type: ignore[operator]
    middle = coadd.psf_at(y=coadd.origin[0] + coadd.shape[0] / 2, x=coadd.origin[1] + coadd.shape[1] / 2)[b]
    sigma = gaussian_fwhm(middle) / (2.0 * np.sqrt(2.0 * np.log(2.0)))
    return VisitImage(
        image,
        mask=lsst_mask(coadd, b),
        variance=variance,
        obs_info=ObservationInfo.makeObservationInfo(
            instrument=instrument, physical_filter=physical_filter, visit_id=visit, exposure_id=visit
        ),
        psf=GaussianPointSpreadFunction(sigma=sigma, bounds=box, stamp_size=41),
        detector=_detector(instrument, box, visit),
        band=band,
    )


def _detector(instrument: str, box: Any, visit: int) -> Detector:
    """Make a camera of one detector whose pixels are 0.01 mm and 0.2 arcsec."""
    frames = Ast.FrameSet(Ast.Frame(2, "Ident=FOCAL_PLANE,Unit(1)=mm,Unit(2)=mm"))
    radian_per_mm = (0.2 * units.arcsec).to_value(units.rad) / 0.01
    frames.addframe(1, Ast.ZoomMap(2, radian_per_mm), Ast.Frame(2, "Ident=FIELD_ANGLE,Unit(1)=rad,Unit(2)=rad"))
    frames.addframe(1, Ast.ZoomMap(2, 100.0), Ast.Frame(2, "Ident=DETECTOR_0"))
    camera = CameraFrameSetSerializationModel(instrument=instrument, ast=str(frames)).deserialize(None)
    attributes = DetectorAttributes(
        name="D0",
        id=0,
        type=DetectorType.SCIENCE,
        serial="0",
        bbox=box,
        orientation=Orientation(focal_plane_x=0.0, focal_plane_y=0.0, focal_plane_z=0.0),
        pixel_size=0.01,
        physical_type="simulated",
    )
    return Detector(attributes, [], camera, visit=visit)
