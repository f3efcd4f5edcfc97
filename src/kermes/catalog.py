"""Columns, units, flags and outcomes of the tables: the one place that names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from astropy import units
from astropy.table import Column, Table
from numpy.typing import ArrayLike, DTypeLike, NDArray


class Outcome(StrEnum):
    """What a source was modelled as, from the best to the simplest."""

    FULL = "full"
    """As configured."""

    SINGLE = "single"
    """With one component only."""

    POINT = "point"
    """As a point source, jointly with its neighbours."""

    TEMPLATE = "template"
    """With a template taken from the pixels, band by band."""

    PEAK = "peak"
    """As a PSF at the peak."""


OUTCOME_COLORS: Mapping[str, str] = {
    Outcome.FULL: "green",
    Outcome.SINGLE: "gold",
    Outcome.POINT: "cyan",
    Outcome.TEMPLATE: "orange",
    Outcome.PEAK: "red",
}
"""Colour in which objects of each outcome are marked, by a name that matplotlib and ds9 know."""


def outcome_color(outcome: object) -> str:
    """Say in which colour objects of an outcome are marked; those without one are magenta."""
    return OUTCOME_COLORS.get(str(outcome), "magenta")


class Reason(StrEnum):
    """Why a source was not modelled as configured."""

    NONE = ""
    """It was."""

    BUDGET = "budget"
    """The fit of its blend was predicted to need more than `budget` allows."""

    NOT_FINITE = "not_finite"
    """The fit with the better model ended with values that are not finite."""

    POOR_FIT = "poor_fit"
    """The fit of its blend with the better model left more of the image than that with the simpler one."""

    NO_DATA = "no_data"
    """No band has a valid pixel and a PSF there."""

    NO_TEMPLATE = "no_template"
    """No template could be made for the peak."""

    LIMITS = "limits"
    """Its footprint, or the number of peaks in it, is beyond the limits of `templates`."""

    INTERRUPTED = "interrupted"
    """The run was stopped before its blend was fitted."""

    ISOLATED = "isolated"
    """It comes from a file of models of the LSST pipelines, which have none for a source without neighbours."""


class Model(StrEnum):
    """What was fitted to a source."""

    POINT = "point"
    """A point source."""

    EXPONENTIAL = "exponential"
    """An exponential profile."""

    SERSIC = "sersic"
    """A Sersic profile of free index."""

    DOUBLE = "double"
    """An exponential disc and a Sersic bulge."""

    FREE_FORM = "free-form"
    """Morphologies on pixels."""

    TEMPLATE = "template"
    """A symmetric template."""


class PreferredFlux(StrEnum):
    """Which flux of an object is likely to be the better one, by the name of its columns after that of the band."""

    MODEL = "flux"
    """The total flux of the model."""

    REDISTRIBUTED = "redistributed_flux"
    """The sum of its share of the pixels."""


class Flag(StrEnum):
    """Names of the boolean columns of `objects`."""

    MASKED_PEAK = "flag_masked_peak"
    DUPLICATE_PEAK = "flag_duplicate_peak"
    EDGE = "flag_edge"
    OUTSIDE_FOOTPRINT = "flag_outside_footprint"
    MISSING_BAND = "flag_missing_band"
    NO_DATA = "flag_no_data"
    NOT_CONVERGED = "flag_not_converged"
    NULL_MODEL = "flag_null_model"
    DIVIDED_PARENT = "flag_divided_parent"
    NEIGHBOR_DOMINATED = "flag_neighbor_dominated"
    UNRESOLVED_BLEND = "flag_unresolved_blend"
    SHREDDED = "flag_shredded"
    POOR_MODEL = "flag_poor_model"
    SATURATED = "flag_saturated"
    SUSPECT = "flag_suspect"
    EDGE_PLANE = "flag_edge_plane"
    INTERPOLATED = "flag_interpolated"
    COSMIC_RAY = "flag_cosmic_ray"
    STREAK = "flag_streak"
    CLIPPED = "flag_clipped"
    INEXACT_PSF = "flag_inexact_psf"


FLAG_DESCRIPTIONS: Mapping[Flag, str] = {
    Flag.MASKED_PEAK: "the pixel of the peak is invalid in every band",
    Flag.DUPLICATE_PEAK: "an earlier peak has the same pixel",
    Flag.EDGE: "the box of the source touches the edge of the image",
    Flag.OUTSIDE_FOOTPRINT: "the peak lies in no footprint",
    Flag.MISSING_BAND: "at least one band has no valid pixel or no PSF there",
    Flag.NO_DATA: "no band has a valid pixel and a PSF there",
    Flag.NOT_CONVERGED: "the fit stopped before it converged",
    Flag.NULL_MODEL: "the model has no light",
    Flag.DIVIDED_PARENT: "its parent was too large for one blend and was divided",
    Flag.NEIGHBOR_DOMINATED: "its pixels have more light of neighbours than its own, in the band where it is clearest",
    Flag.UNRESOLVED_BLEND: "a source that nobody listed was found in the residuals within two widths of the PSF",
    Flag.SHREDDED: "its light may be that of neighbours: they outshine it, and it stands out by less than 4 sigma",
    Flag.POOR_MODEL: "what the models leave of its pixels has a chi2 above 1.5",
    Flag.SATURATED: "a pixel near its peak is saturated, as the mask says",
    Flag.SUSPECT: "a pixel near its peak is suspect, as the mask says",
    Flag.EDGE_PLANE: "a pixel near its peak is at the edge of a detector or of the data, as the mask says",
    Flag.INTERPOLATED: "a pixel near its peak is interpolated, as the mask says",
    Flag.COSMIC_RAY: "a pixel near its peak is hit by a cosmic ray, as the mask says",
    Flag.STREAK: "a pixel near its peak is in a streak, as the mask says",
    Flag.CLIPPED: "a pixel near its peak is clipped from, or rejected by, the coadd in part, as the mask says",
    Flag.INEXACT_PSF: "a pixel near its peak is where the PSF is not exact, as the mask says",
}
"""What a flag says when it is True."""


PLANE_FLAGS: Mapping[str, Flag] = {
    "saturated": Flag.SATURATED,
    "suspect": Flag.SUSPECT,
    "edge": Flag.EDGE_PLANE,
    "interpolated": Flag.INTERPOLATED,
    "cosmic_ray": Flag.COSMIC_RAY,
    "streak": Flag.STREAK,
    "clipped": Flag.CLIPPED,
    "inexact_psf": Flag.INEXACT_PSF,
}
"""The flag for each meaning of mask planes, see `kermes.coadd.PLANE_MEANINGS`."""


@dataclass(frozen=True, slots=True)
class ColumnDefinition:
    """Name, type and meaning of one column."""

    name: str
    """Name of the column, the same in every format."""

    dtype: DTypeLike
    """Type of its values."""

    description: str
    """One line."""

    unit: Literal["", "pix", "pix2", "deg", "flux"] = ""
    """Unit; "flux" stands for the unit of the coadd."""


_PER_BAND = (
    ColumnDefinition("flux", np.float64, "Total flux of the model", "flux"),
    ColumnDefinition("flux_err", np.float64, "Standard deviation of the flux, neighbours included", "flux"),
    ColumnDefinition("flux_correlation", np.float32, "Correlation of the flux with that of a neighbour, the largest"),
    ColumnDefinition("bulge_flux", np.float64, "Total flux of the bulge; NaN where the model has none", "flux"),
    ColumnDefinition("redistributed_flux", np.float64, "Sum of the share of the observed pixels", "flux"),
    ColumnDefinition("redistributed_flux_err", np.float64, "Standard deviation of redistributed_flux", "flux"),
    ColumnDefinition("max_overlap", np.float32, "Largest light of the neighbours in a pixel, model frame", "flux"),
    ColumnDefinition("flux_overlap", np.float32, "Light of the neighbours in its pixels, model frame", "flux"),
    ColumnDefinition("flux_overlap_fraction", np.float32, "flux_overlap over the flux of the model"),
    ColumnDefinition("blendedness", np.float32, "1 - (m . m) / (A . m), m its model, A that of all; 0: alone"),
    ColumnDefinition("observed_max_overlap", np.float32, "Largest light of the neighbours in a pixel, in sigma of it"),
    ColumnDefinition("observed_overlap_fraction", np.float32, "Light of the neighbours over its own, as observed"),
    ColumnDefinition("observed_blendedness", np.float32, "blendedness as observed, weighted with the inverse variance"),
)


_MODEL = (
    ColumnDefinition("model", np.str_, f"What was fitted: {', '.join(Model)}; empty without a model"),
    ColumnDefinition("center_y", np.float64, "Row of the fitted centre, in the coordinates of the coadd", "pix"),
    ColumnDefinition("center_x", np.float64, "Column of the fitted centre, in the coordinates of the coadd", "pix"),
    ColumnDefinition("center_y_err", np.float64, "Standard deviation of center_y", "pix"),
    ColumnDefinition("center_x_err", np.float64, "Standard deviation of center_x", "pix"),
    ColumnDefinition("radius", np.float64, "Half-light radius, mean of both half-axes; the disc's of a double", "pix"),
    ColumnDefinition("radius_err", np.float64, "Standard deviation of radius", "pix"),
    ColumnDefinition("axis_ratio", np.float64, "Minor over major axis"),
    ColumnDefinition("axis_ratio_err", np.float64, "Standard deviation of axis_ratio"),
    ColumnDefinition("angle", np.float64, "Direction of the major axis, from +x towards +y", "deg"),
    ColumnDefinition("angle_err", np.float64, "Standard deviation of angle", "deg"),
    ColumnDefinition("sersic_index", np.float64, "Sersic index; the disc's of a double"),
    ColumnDefinition("sersic_index_err", np.float64, "Standard deviation of sersic_index; NaN where it is held"),
    ColumnDefinition("bulge_radius", np.float64, "Half-light radius of the bulge of a double", "pix"),
    ColumnDefinition("bulge_index", np.float64, "Sersic index of the bulge of a double"),
    ColumnDefinition("correlated_id", np.int64, "object_id of the neighbour of the largest flux_correlation; 0: none"),
    ColumnDefinition("condition", np.float64, "Condition number of the correlations of the fluxes fitted together"),
    ColumnDefinition("evidence", np.float64, "Fall of half the penalised chi2 from the best simpler model to this one"),
)


_TEMPLATES = (
    ColumnDefinition("stray_flux", np.float64, "Part of the flux from pixels that no template reaches", "flux"),
    ColumnDefinition("has_stray_flux", np.bool_, "Whether it has stray flux"),
    ColumnDefinition("deblended_as_psf", np.bool_, "Whether its template is the PSF, which fits it"),
    ColumnDefinition("psf_center_y", np.float64, "Row of that point source, in the coordinates of the coadd", "pix"),
    ColumnDefinition("psf_center_x", np.float64, "Column of that point source, in the coordinates of the coadd", "pix"),
    ColumnDefinition("psf_flux", np.float64, "Flux of that point source, neighbours fitted along", "flux"),
    ColumnDefinition("psf_chi2", np.float64, "chi2 of the fit of a point source, the chosen one"),
    ColumnDefinition("psf_dof", np.float64, "Degrees of freedom of that fit"),
    ColumnDefinition("psf_n_neighbors", np.int64, "Number of neighbours fitted along"),
    ColumnDefinition("psf_moved", np.bool_, "Whether the point source was moved from the peak"),
    ColumnDefinition("psf_big_decenter", np.bool_, "Whether it would have to be moved by a pixel or more"),
    ColumnDefinition("psf_bad_dof", np.bool_, "Whether there are too few pixels for that fit"),
    ColumnDefinition("out_of_bounds", np.bool_, "Whether the peak lies outside of the box of the footprint"),
    ColumnDefinition("tiny_footprint", np.bool_, "Whether the footprint is too small for that fit"),
    ColumnDefinition("no_valid_pixels", np.bool_, "Whether no pixel near the peak is valid"),
    ColumnDefinition("failed_symmetric_template", np.bool_, "Whether the peak lies outside of the footprint"),
    ColumnDefinition("ramped_template", np.bool_, "Whether the template was continued beyond the footprint"),
    ColumnDefinition("patched_template", np.bool_, "Whether pixels without a mirror were taken as they are"),
    ColumnDefinition("degenerate", np.bool_, "Whether the template was left out, being like another"),
    ColumnDefinition("no_template", np.bool_, "Whether there is no template"),
)
"""Of each band, with the model "templates"."""


_WITH_TEMPLATES = (
    ColumnDefinition("flux", np.float64, "Share of the observed pixels of the footprint, with stray flux", "flux"),
    ColumnDefinition("flux_err", np.float64, "Standard deviation of the flux, from the noise of the pixels", "flux"),
    *_PER_BAND[2:],
    *_TEMPLATES,
)


_TEMPLATES_OF_PARENT = (
    ColumnDefinition("parent_too_big", np.bool_, "Whether the footprint is beyond the limits of `templates`"),
    ColumnDefinition("parent_masked", np.bool_, "Whether too many pixels of the footprint are invalid"),
    ColumnDefinition("too_many_peaks", np.bool_, "Whether the footprint has more than `templates.most_peaks`"),
)


@lru_cache(maxsize=8)
def object_columns(bands: tuple[str, ...], model: str = "kermes") -> tuple[ColumnDefinition, ...]:
    """Columns of `objects` for these bands and this `Config.model`, in order."""
    per_band, more = (_PER_BAND, ()) if model != "templates" else (_WITH_TEMPLATES, _TEMPLATES_OF_PARENT)
    return (
        ColumnDefinition("object_id", np.int64, "Number of the object"),
        ColumnDefinition("parent_id", np.int64, "Number of its parent (footprint)"),
        ColumnDefinition("blend_id", np.int64, "Number of the blend it was fitted in"),
        ColumnDefinition("peak_index", np.int64, "Row of the peak in the list of peaks"),
        ColumnDefinition("y", np.float64, "Row of the centre, in the coordinates of the coadd", "pix"),
        ColumnDefinition("x", np.float64, "Column of the centre, in the coordinates of the coadd", "pix"),
        ColumnDefinition("ra", np.float64, "Right ascension of the centre (ICRS); NaN without a WCS", "deg"),
        ColumnDefinition("dec", np.float64, "Declination of the centre (ICRS); NaN without a WCS", "deg"),
        *(
            ColumnDefinition(f"{band}_{column.name}", column.dtype, f"{column.description}, band {band}", column.unit)
            for band in bands
            for column in per_band
        ),
        *more,
        *_MODEL,
        ColumnDefinition("n_components", np.int64, "Number of components of the model"),
        ColumnDefinition("chi2", np.float64, "Mean of residual^2 / variance over the valid pixels of the object"),
        ColumnDefinition("preferred_flux", np.str_, f"The better one, {' or '.join(PreferredFlux)}; empty: none"),
        ColumnDefinition("iterations", np.int64, "Iterations of the fit of the blend"),
        ColumnDefinition("converged", np.bool_, "Whether the fit of the blend converged"),
        ColumnDefinition("outcome", np.str_, f"What it was modelled as: {', '.join(Outcome)}"),
        ColumnDefinition(
            "reason", np.str_, f"Why the outcome is not full, else empty: {', '.join(filter(None, Reason))}"
        ),
        *(ColumnDefinition(flag.value, np.bool_, f"True: {FLAG_DESCRIPTIONS[flag]}") for flag in Flag),
    )


_BOX = (
    ColumnDefinition("y0", np.int64, "First row of the box, in the coordinates of the coadd", "pix"),
    ColumnDefinition("x0", np.int64, "First column of the box, in the coordinates of the coadd", "pix"),
    ColumnDefinition("height", np.int64, "Number of rows of the box", "pix"),
    ColumnDefinition("width", np.int64, "Number of columns of the box", "pix"),
)

PARENT_COLUMNS = (
    ColumnDefinition("parent_id", np.int64, "Number of the parent (footprint)"),
    *_BOX,
    ColumnDefinition("n_peaks", np.int64, "Number of its peaks"),
    ColumnDefinition("n_blends", np.int64, "Number of blends it was divided into"),
    ColumnDefinition("area", np.int64, "Number of pixels of the footprint", "pix2"),
)
"""Columns of `parents`, in order."""

BLEND_COLUMNS = (
    ColumnDefinition("blend_id", np.int64, "Number of the blend"),
    ColumnDefinition("parent_id", np.int64, "Number of its parent (footprint)"),
    *_BOX,
    ColumnDefinition("n_sources", np.int64, "Number of sources that belong to it"),
    ColumnDefinition("n_neighbors", np.int64, "Number of sources of other blends that were fitted along"),
    ColumnDefinition("n_components", np.int64, "Number of components of all sources"),
    ColumnDefinition("n_pixels", np.int64, "Number of valid pixels, all bands together"),
    ColumnDefinition("chi2", np.float64, "Mean of residual^2 / variance over the valid pixels"),
    ColumnDefinition("loss", np.float64, "Half the sum of residual^2 / variance at the end of the fit"),
    ColumnDefinition("iterations", np.int64, "Iterations of the fit"),
    ColumnDefinition("converged", np.bool_, "Whether the fit converged"),
    *(ColumnDefinition(f"n_{outcome}", np.int64, f"Number of sources with outcome {outcome}") for outcome in Outcome),
)
"""Columns of `blends`, in order."""


class Origin(StrEnum):
    """Where a candidate was found."""

    IMAGE = "image"
    """In the image."""

    RESIDUAL = "residual"
    """In what the models of the listed sources leave of it."""


@lru_cache(maxsize=8)
def candidate_columns(bands: tuple[str, ...]) -> tuple[ColumnDefinition, ...]:
    """Columns of `candidates` for these bands, in order."""
    return (
        ColumnDefinition("candidate_id", np.int64, "Number of the candidate"),
        ColumnDefinition("blend_id", np.int64, "Number of the blend it was found in"),
        ColumnDefinition("y", np.float64, "Row of the centre, in the coordinates of the coadd", "pix"),
        ColumnDefinition("x", np.float64, "Column of the centre, in the coordinates of the coadd", "pix"),
        *(
            ColumnDefinition(f"{band}_{name}", np.float64, f"{description}, band {band}", "flux")
            for band in bands
            for name, description in (("flux", "Total flux"), ("flux_err", "Standard deviation of the flux"))
        ),
        ColumnDefinition("significance", np.float64, "Significance of the detection [standard deviations]"),
        ColumnDefinition("origin", np.str_, f"Where it was found: {', '.join(Origin)}"),
    )


def forced_columns(bands: Sequence[str]) -> tuple[ColumnDefinition, ...]:
    """Columns of a table of forced photometry for these bands, in order."""
    per_band = (
        ColumnDefinition("flux", np.float64, "Flux of the model, its shape held; may be negative", "flux"),
        ColumnDefinition("flux_err", np.float64, "Standard deviation of the flux, neighbours included", "flux"),
        ColumnDefinition("correlation", np.float64, "Correlation with the neighbour with which it is largest"),
        ColumnDefinition("neighbor_id", np.int64, "object_id of that one, minus the candidate_id; 0: none"),
        ColumnDefinition("chi2", np.float64, "Mean of residual^2 / variance over the valid pixels of its model"),
        ColumnDefinition("coverage", np.float64, "Part of the light of its model on valid pixels"),
    )
    return (
        ColumnDefinition("object_id", np.int64, "Number of the object"),
        ColumnDefinition("y", np.float64, "Row of the centre, in the coordinates of these images", "pix"),
        ColumnDefinition("x", np.float64, "Column of the centre, in the coordinates of these images", "pix"),
        ColumnDefinition("ra", np.float64, "Right ascension of the centre (ICRS); NaN without a WCS", "deg"),
        ColumnDefinition("dec", np.float64, "Declination of the centre (ICRS); NaN without a WCS", "deg"),
        ColumnDefinition("flag_outside", np.bool_, "True: the centre lies outside of these images"),
        *(
            ColumnDefinition(f"{band}_{column.name}", column.dtype, f"{column.description}, band {band}", column.unit)
            for band in bands
            for column in per_band
        ),
    )


class MeasurementFlag(StrEnum):
    """Names of the boolean columns of a band in the table of measurements."""

    NO_DATA = "flag_no_data"
    INCOMPLETE = "flag_incomplete"
    MOMENTS = "flag_moments"


MEASUREMENT_FLAG_DESCRIPTIONS: Mapping[MeasurementFlag, str] = {
    MeasurementFlag.NO_DATA: "no valid pixel within three widths of the PSF, or no PSF",
    MeasurementFlag.INCOMPLETE: "the largest aperture or that of Kron misses pixels, which are left out",
    MeasurementFlag.MOMENTS: "the adaptive moments did not converge",
}
"""What a flag of a measurement says when it is True."""

_MEASURED = (
    ColumnDefinition("total_flux", np.float64, "Sum over the box of the model", "flux"),
    ColumnDefinition("total_flux_err", np.float64, "Standard deviation of total_flux", "flux"),
    ColumnDefinition("kron_flux", np.float64, "Flux within kron_radius", "flux"),
    ColumnDefinition("kron_flux_err", np.float64, "Standard deviation of kron_flux", "flux"),
    ColumnDefinition("psf_flux", np.float64, "Flux of a point source at the centre of the model", "flux"),
    ColumnDefinition("psf_flux_err", np.float64, "Standard deviation of psf_flux", "flux"),
    ColumnDefinition(
        "centroid_y", np.float64, "Row of the centre by adaptive moments, coordinates of the coadd", "pix"
    ),
    ColumnDefinition("centroid_x", np.float64, "Column of the centre by adaptive moments, likewise", "pix"),
    ColumnDefinition("centroid_y_err", np.float64, "Standard deviation of centroid_y", "pix"),
    ColumnDefinition("centroid_x_err", np.float64, "Standard deviation of centroid_x", "pix"),
    ColumnDefinition("moment_yy", np.float64, "Adaptive second moment along y, PSF included", "pix2"),
    ColumnDefinition("moment_xx", np.float64, "Adaptive second moment along x", "pix2"),
    ColumnDefinition("moment_xy", np.float64, "Adaptive mixed second moment", "pix2"),
    ColumnDefinition("moment_yy_err", np.float64, "Standard deviation of moment_yy", "pix2"),
    ColumnDefinition("moment_xx_err", np.float64, "Standard deviation of moment_xx", "pix2"),
    ColumnDefinition("moment_xy_err", np.float64, "Standard deviation of moment_xy", "pix2"),
    ColumnDefinition("size_ratio", np.float64, "moment_yy + moment_xx over that of the PSF; 1: a star"),
    ColumnDefinition("size_ratio_err", np.float64, "Standard deviation of size_ratio"),
    ColumnDefinition("snr", np.float64, "Flux under the adaptive Gaussian over its standard deviation"),
    ColumnDefinition("chi2_1fwhm", np.float64, "chi2 over dof_1fwhm of what all models leave within one PSF width"),
    ColumnDefinition("dof_1fwhm", np.float64, "Degrees of freedom within one width of the PSF"),
    ColumnDefinition("chi2_3fwhm", np.float64, "chi2 over dof_3fwhm of what all models leave within three PSF widths"),
    ColumnDefinition("dof_3fwhm", np.float64, "Degrees of freedom within three widths of the PSF"),
    ColumnDefinition("asymmetry", np.float64, "Residual less its mirror image, squared, over its variance; 1: noise"),
    ColumnDefinition("coverage", np.float64, "Share of valid pixels within three widths of the PSF"),
    ColumnDefinition("edge_fraction", np.float64, "Share of pixels outside the image within three widths of the PSF"),
)


def aperture_name(radius: float) -> str:
    """Name the columns of an aperture: "aperture_3" for a radius of 3 pixels; errors add "_flux_err"."""
    return f"aperture_{radius:g}"


def measurement_columns(bands: Sequence[str], apertures: Sequence[float]) -> tuple[ColumnDefinition, ...]:
    """Columns of the table of measurements for these bands and radii of apertures [pixels], in order."""
    of_apertures = tuple(
        ColumnDefinition(f"{aperture_name(radius)}_flux{suffix}", np.float64, f"{what} {radius:g} pixels", "flux")
        for radius in apertures
        for suffix, what in (("", "Flux within"), ("_err", "Standard deviation of the flux within"))
    )
    return (
        ColumnDefinition("object_id", np.int64, "Number of the object"),
        ColumnDefinition("y", np.float64, "Row of the centre of the model, in the coordinates of the coadd", "pix"),
        ColumnDefinition("x", np.float64, "Column of the centre of the model, in the coordinates of the coadd", "pix"),
        ColumnDefinition("kron_radius", np.float64, "Radius of the Kron aperture, the same in all bands", "pix"),
        *(
            ColumnDefinition(f"{band}_{column.name}", column.dtype, f"{column.description}, band {band}", column.unit)
            for band in bands
            for column in (*of_apertures, *_MEASURED)
        ),
        ColumnDefinition("flag_kron", np.bool_, "True: kron_radius could not be measured, or met a limit"),
        *(
            ColumnDefinition(f"{band}_{flag}", np.bool_, f"True: {MEASUREMENT_FLAG_DESCRIPTIONS[flag]}, band {band}")
            for band in bands
            for flag in MeasurementFlag
        ),
    )


def empty_columns(definitions: Sequence[ColumnDefinition], n_rows: int) -> dict[str, NDArray[Any]]:
    """Make columns that are yet to be filled: NaN, 0, False or empty text (of at most 18 letters)."""
    names_by_type: dict[Any, list[str]] = {}
    for item in definitions:
        names_by_type.setdefault(item.dtype, []).append(item.name)
    columns: dict[str, NDArray[Any]] = {}
    for dtype, names in names_by_type.items():
        # Columns of one type are rows of one array: a hundred arrays take longer to make than a small blend to share.
        block = np.zeros((len(names), n_rows), "U18" if dtype is np.str_ else dtype)
        if block.dtype.kind == "f":
            block.fill(np.nan)
        columns.update(zip(names, block, strict=True))
    return {item.name: columns[item.name] for item in definitions}


def _make_table(
    columns: Mapping[str, ArrayLike], definitions: Sequence[ColumnDefinition], flux_unit: units.UnitBase | None
) -> Table:
    names = [definition.name for definition in definitions]
    assert set(columns) == set(names), (
        f"columns missing: {sorted(set(names) - set(columns))}; unknown: {sorted(set(columns) - set(names))}"
    )
    table = Table({item.name: _values(columns[item.name], item) for item in definitions}, copy=False)
    for item in definitions:
        column = table.columns[item.name]
        column.description = item.description
        column.unit = {"": None, "flux": flux_unit}.get(item.unit, item.unit)
    return table


def _values(values: ArrayLike, definition: ColumnDefinition) -> NDArray[Any]:
    array = np.asarray(values)
    assert array.ndim == 1, f"column {definition.name} has shape {array.shape}"
    return array.astype(definition.dtype, casting="same_kind" if array.size else "unsafe", copy=False)


def make_objects(
    columns: Mapping[str, ArrayLike], bands: Sequence[str], unit: units.UnitBase | None, model: str = "kermes"
) -> Table:
    """Make the table of objects.

    Parameters
    ----------
    columns : mapping of str to array_like, shape (N,)
        Values of every column of `object_columns`, no more and no less.
    bands : sequence of str
    unit : astropy unit or None
        Unit of the fluxes.
    model : str, optional
        `Config.model`: with "templates" there are more columns.

    Returns
    -------
    objects : Table
        Columns in the order of `object_columns`, with units and descriptions.
    """
    return _make_table(columns, object_columns(tuple(bands), model), unit)


def make_parents(columns: Mapping[str, ArrayLike]) -> Table:
    """Make the table of parents from the values of every column of `PARENT_COLUMNS`, each of shape (N,)."""
    return _make_table(columns, PARENT_COLUMNS, None)


def make_blends(columns: Mapping[str, ArrayLike]) -> Table:
    """Make the table of blends from the values of every column of `BLEND_COLUMNS`, each of shape (N,)."""
    return _make_table(columns, BLEND_COLUMNS, None)


def make_forced(columns: Mapping[str, ArrayLike], bands: Sequence[str], unit: units.UnitBase | None) -> Table:
    """Make a table of forced photometry; parameters, and what is returned, as in `make_objects`."""
    return _make_table(columns, forced_columns(bands), unit)


def make_candidates(columns: Mapping[str, ArrayLike], bands: Sequence[str], unit: units.UnitBase | None) -> Table:
    """Make the table of candidates: sources that were found although nobody had listed them.

    Parameters, and what is returned, are as in `make_objects`, with the columns of `candidate_columns`.
    """
    return _make_table(columns, candidate_columns(tuple(bands)), unit)


# ---------------------------------------------------------------- magnitudes and units

MAGNITUDE_OF_NJY = 31.4
"""AB magnitude of a flux of one nanojansky."""

LEAST_SNR = 3.0
"""Fluxes below this many errors have an upper limit for a magnitude."""


def magnitudes(flux: ArrayLike, flux_err: ArrayLike, zero_point: float) -> tuple[NDArray[np.float64], ...]:
    """Turn fluxes into AB magnitudes.

    Parameters
    ----------
    flux, flux_err : array_like, shape (N,)
        Fluxes and their errors [unit].
    zero_point : float
        AB magnitude of a flux of one unit.

    Returns
    -------
    mag, mag_err : ndarray, shape (N,)
        Magnitude and its error, 1.0857 flux_err / flux; NaN where the flux is below `LEAST_SNR` errors, or not known.
    mag_limit : ndarray, shape (N,)
        Where it is below, the magnitude of a flux of max(flux, 0) + `LEAST_SNR` flux_err, than which the object is
        fainter; NaN elsewhere.
    """
    values, errors = np.asarray(flux, dtype=np.float64), np.asarray(flux_err, dtype=np.float64)
    seen = values > LEAST_SNR * errors
    faint = ~seen & (errors > 0) & np.isfinite(values) & np.isfinite(errors)
    mag, mag_err, mag_limit = np.full((3, *values.shape), np.nan)
    mag[seen] = zero_point - 2.5 * np.log10(values[seen])
    mag_err[seen] = 2.5 / np.log(10) * errors[seen] / values[seen]
    mag_limit[faint] = zero_point - 2.5 * np.log10(np.maximum(values[faint], 0) + LEAST_SNR * errors[faint])
    return mag, mag_err, mag_limit


def with_magnitudes(objects: Table, bands: Sequence[str], zero_point: float) -> Table:
    """Add ``{band}_mag``, ``{band}_mag_err`` and ``{band}_mag_limit`` of the model fluxes to a table of objects.

    The columns come after the flux of each band; see `magnitudes`. The table itself is not changed.
    """
    table = objects.copy(copy_data=False)
    descriptions = (
        "AB magnitude of the flux; NaN below three errors",
        "Standard deviation of the magnitude",
        "AB magnitude than which it is fainter, at three errors, where it has none",
    )
    for band in bands:
        found = magnitudes(table[f"{band}_flux"], table[f"{band}_flux_err"], zero_point)
        place = table.colnames.index(f"{band}_flux_err") + 1
        names = (f"{band}_mag", f"{band}_mag_err", f"{band}_mag_limit")
        for n, (name, values, description) in enumerate(zip(names, found, descriptions, strict=True)):
            column = Column(values, name=name, unit=units.mag, description=f"{description}, band {band}")
            table.add_column(column, index=place + n)
    return table


def in_nanojansky(objects: Table, bands: Sequence[str], zero_point: float) -> Table:
    """Give all fluxes of a table of objects in nanojansky.

    Parameters
    ----------
    objects : Table
        Not changed.
    bands : sequence of str
    zero_point : float
        AB magnitude of a flux of one of their units.
    """
    factor = 10 ** (-0.4 * (zero_point - MAGNITUDE_OF_NJY))
    fluxes = {item.name for item in object_columns(tuple(bands), "templates") if item.unit == "flux"}
    table = objects.copy()
    for column in table.itercols():
        if column.name in fluxes:
            column *= column.dtype.type(factor)
            column.unit = units.nJy
    return table


def make_measurements(
    columns: Mapping[str, ArrayLike], bands: Sequence[str], apertures: Sequence[float], unit: units.UnitBase | None
) -> Table:
    """Make the table of measurements.

    Parameters, and what is returned, are as in `make_objects`, with the columns of `measurement_columns`.
    """
    return _make_table(columns, measurement_columns(bands, apertures), unit)
