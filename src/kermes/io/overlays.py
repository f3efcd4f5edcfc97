"""What other viewers show: region files of ds9, footprints of Firefly, and image, model and residual as FITS."""

from __future__ import annotations

import json
from collections.abc import Iterable
from io import BytesIO
from typing import Any

import numpy as np
from astropy.io import fits
from contourpy import contour_generator
from numpy.typing import NDArray

from kermes.catalog import Outcome, outcome_color
from kermes.coadd import Coadd
from kermes.geometry import Box, Footprint
from kermes.result import ObjectHandle, Result
from kermes.scene import ProfileComponent

DoubleArray = NDArray[np.float64]


def ds9_regions(result: Result, object_ids: Iterable[int] | None = None) -> str:
    """Write objects as a region file of ds9: peaks with their numbers, half-light ellipses and footprints.

    Parameters
    ----------
    result : Result
    object_ids : iterable of int, optional
        Objects to write, with the footprints of their parents; None: all.

    Returns
    -------
    text : str
        In physical coordinates counted from 1, which are those of the coadd plus one: they fit images that bring LTV1
        and LTV2, as those of `residual_fits`, and any that begins at the origin. The colour says the outcome; the text
        is the number.

    Raises
    ------
    InputError
        If an object is not in the result.
    """
    handles = [*result] if object_ids is None else [result[number] for number in object_ids]
    lines = [
        "# Region file format: DS9 version 4.1",
        'global color=green dashlist=8 3 width=1 font="helvetica 10 normal roman" select=1 edit=0 move=0 delete=1',
        "physical",
    ]
    parents: dict[int, None] = {}
    for handle in handles:
        row = handle.row
        color = outcome_color(row["outcome"])
        y, x = (value + 1 for value in handle.center)
        lines.append(f"point({x:.3f},{y:.3f}) # point=cross color={color} text={{{handle.object_id}}}")
        lines += [
            f"ellipse({x:.3f},{y:.3f},{a:.3f},{b:.3f},{angle:.2f}) # color={color}" for a, b, angle in _ellipses(handle)
        ]
        parents[int(row["parent_id"])] = None
    footprints = result.footprints
    for parent_id in parents:
        if parent_id not in footprints:
            continue
        for outline in outlines(footprints[parent_id].shift(*result.origin)):
            corners = ",".join(f"{x + 1:.1f},{y + 1:.1f}" for y, x in outline)
            lines.append(f"polygon({corners}) # color=gray text={{parent {parent_id}}}")
    return "\n".join(lines) + "\n"


def _ellipses(handle: ObjectHandle) -> Iterable[tuple[float, float, float]]:
    """Half-light ellipses of the profiles of an object: half axes [pixels], angle of the first from x to y [deg]."""
    for component in handle.source.components:
        if isinstance(component, ProfileComponent) and not component.is_point:
            stretch = float(np.sqrt(component.axis_ratio))
            yield component.radius / stretch, component.radius * stretch, component.angle


def outlines(footprint: Footprint) -> list[DoubleArray]:
    """Trace the edges of a footprint, each a closed line of positions (y, x), halfway between pixels in and out."""
    if not footprint.area:
        return []
    box = footprint.box.grow(1)
    lines = contour_generator(z=footprint.mask(box).astype(np.float64)).lines(0.5)
    return [_corners(np.asarray(line)[:, ::-1]) + box.origin for line in lines]


def _corners(line: DoubleArray) -> DoubleArray:
    """Leave out the points of a closed line that lie on the way from one corner to the next."""
    points = line[:-1]  # the last is the first
    before, after = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
    turns = before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]
    return np.asarray(points[turns])


def firefly_footprints(result: Result, object_ids: Iterable[int] | None = None, box: Box | None = None) -> str:
    """Write footprints as JSON for ``FireflyClient.overlay_footprints``.

    Parameters
    ----------
    result : Result
    object_ids : iterable of int, optional
        Objects whose parents are written; None: all parents.
    box : Box, optional
        Pixels of the image that they are laid over, in the coadd's coordinates, such as that of `residual_fits`; None:
        the whole image.

    Returns
    -------
    text : str
        Of each footprint: its corners, its runs (row, first and last column) and its peaks (x, y), in pixels of the
        image that they are laid over, the first of which is (0, 0); what lies outside of it is kept.
    """
    objects = result.objects
    parents, y, x = (np.asarray(objects[name]) for name in ("parent_id", "y", "x"))
    chosen = parents if object_ids is None else [result[number].row["parent_id"] for number in object_ids]
    y0, x0 = result.origin if box is None else box.origin
    footprints: dict[str, Any] = {}
    for parent_id in dict.fromkeys(int(number) for number in chosen):
        if parent_id not in result.footprints:
            continue
        footprint = result.footprints[parent_id].shift(result.origin[0] - y0, result.origin[1] - x0)
        around, own = footprint.box, parents == parent_id
        left, right, low, high = around.x0, around.x1 - 1, around.y0, around.y1 - 1
        peaks = np.stack([x[own] - x0, y[own] - y0], axis=1)
        footprints[str(parent_id)] = {
            "corners": [[left, low], [right, low], [right, high], [left, high]],
            "spans": [[int(row), int(first), int(end) - 1] for row, first, end in footprint.spans],
            "peaks": peaks.astype(float).tolist(),
        }
    return json.dumps({"feature": "footprints", "pixelsys": "zero-based", "footprints": footprints})


def residual_fits(result: Result, box: Box | None = None) -> bytes:
    """Write image, model and residual of a result as one FITS file.

    Parameters
    ----------
    result : Result
        With its coadd.
    box : Box, optional
        Pixels to write, in the coadd's coordinates; None: all.

    Returns
    -------
    content : bytes
        HDUs ``IMAGE_{band}`` and ``MODEL_{band}`` [unit], ``RESIDUAL_{band}`` [sigma], NaN where a pixel is not valid,
        and ``OUTCOME``, a mask of where objects lie that were not modelled in full, one plane for each outcome (cards
        ``MSKNnnnn`` and ``MSKMnnnn``), with the WCS and the coordinates of the coadd (LTV1, LTV2).

    Raises
    ------
    InputError
        If the result has no coadd, or the box no pixel of the image.
    """
    whole = result.need_coadd("residual_fits")
    coadd = whole if box is None else whole.cutout(box)
    model = result.model_image(box=coadd.box)
    header = _header(coadd)
    hdus: list[Any] = [fits.PrimaryHDU()]
    unit = None if coadd.unit is None else coadd.unit.to_string("fits")
    for b, band in enumerate(coadd.bands):
        sigma = np.sqrt(coadd.variance[b], where=coadd.valid[b], out=np.full(coadd.shape, np.nan, dtype=np.float32))
        planes = {
            "IMAGE": (coadd.images[b], unit),
            "MODEL": (model[b], unit),
            "RESIDUAL": ((coadd.images[b] - model[b]) / sigma, None),
        }
        for name, (pixels, own_unit) in planes.items():
            # Without quantize_level=0 the pixels would be rounded.
            hdu = fits.CompImageHDU(
                np.asarray(pixels, dtype=np.float32), header.copy(), compression_type="GZIP_2", quantize_level=0.0
            )
            hdu.name = f"{name}_{band}"
            hdu.header["BAND"] = band  # names of HDUs are in capitals
            if own_unit is not None:
                hdu.header["BUNIT"] = own_unit
            hdus.append(hdu)
    hdus.append(_outcome_mask(result, coadd, header))
    buffer = BytesIO()
    fits.HDUList(hdus).writeto(buffer)
    return buffer.getvalue()


def _header(coadd: Coadd) -> fits.Header:
    header = fits.Header() if coadd.wcs is None else coadd.wcs.to_header(relax=True)
    header["LTV1"], header["LTV2"] = float(-coadd.origin[1]), float(-coadd.origin[0])
    return header


def _outcome_mask(result: Result, coadd: Coadd, header: fits.Header) -> Any:
    """Pixels in which the model of an object is seen that was not modelled in full."""
    planes = {outcome: bit for bit, outcome in enumerate(tuple(Outcome)[1:])}
    mask = np.zeros(coadd.shape, dtype=np.int32)
    objects = result.objects
    outcomes = np.asarray(objects["outcome"], dtype=str)
    near = result.blends_near(coadd.box.shift(-result.origin[0], -result.origin[1]))
    lesser = np.isin(outcomes, [*planes]) & np.isin(objects["blend_id"], near)
    for row in np.flatnonzero(lesser).tolist():
        footprint = result[int(objects["object_id"][row])].footprint("model").footprint
        mask[footprint.mask(coadd.box)] |= np.int32(1 << planes[Outcome(outcomes[row])])
    hdu = fits.CompImageHDU(mask, header.copy(), compression_type="GZIP_2")
    hdu.name = "OUTCOME"
    for outcome, bit in planes.items():
        hdu.header[f"MSKN{bit:04}"], hdu.header[f"MSKM{bit:04}"] = outcome.upper(), 1 << bit
    return hdu
