"""Tables have the columns they promise."""

import numpy as np
import pytest
from astropy import units

from kermes import catalog
from kermes.catalog import PLANE_FLAGS, Flag, Outcome
from kermes.coadd import PLANE_MEANINGS


def zeros(definitions, n_rows=3):
    """Values of the right type for every column."""
    return {item.name: np.zeros(n_rows, dtype=item.dtype) for item in definitions}


@pytest.fixture
def columns():
    return zeros(catalog.object_columns(("g", "r")))


def test_columns_come_in_the_declared_order_whatever_the_order_of_the_values(columns):
    table = catalog.make_objects(dict(reversed(columns.items())), ["g", "r"], None)
    assert table.colnames == [item.name for item in catalog.object_columns(("g", "r"))]


def test_flux_columns_have_the_unit_of_the_coadd(columns):
    table = catalog.make_objects(columns, ["g", "r"], units.nJy)
    assert table["r_redistributed_flux_err"].unit == units.nJy


def test_flux_columns_of_a_coadd_without_unit_have_none(columns):
    assert catalog.make_objects(columns, ["g", "r"], None)["g_flux"].unit is None


def test_positions_are_double_precision_pixels(columns):
    column = catalog.make_objects(columns, ["g", "r"], None)["y"]
    assert (column.dtype, column.unit) == (np.float64, units.pix)


@pytest.mark.parametrize(
    "definitions",
    [
        catalog.object_columns(("g",)),
        catalog.PARENT_COLUMNS,
        catalog.BLEND_COLUMNS,
        catalog.candidate_columns(("g",)),
        catalog.measurement_columns(["g"], (3, 6.5)),
    ],
    ids=["objects", "parents", "blends", "candidates", "measurements"],
)
def test_every_column_is_named_once_and_described_in_one_line(definitions):
    assert len({item.name for item in definitions}) == len(definitions)
    assert all(item.description and "\n" not in item.description for item in definitions)


def test_every_flag_is_a_column_of_objects(columns):
    table = catalog.make_objects(columns, ["g", "r"], None)
    assert all(table[flag].dtype == bool for flag in Flag)


def test_every_outcome_is_counted_in_blends():
    table = catalog.make_blends(zeros(catalog.BLEND_COLUMNS))
    assert {f"n_{outcome}" for outcome in Outcome} <= set(table.colnames)


def test_outcomes_are_stored_as_their_names(columns):
    columns["outcome"] = [Outcome.FULL, Outcome.TEMPLATE, Outcome.PEAK]
    assert list(catalog.make_objects(columns, ["g", "r"], None)["outcome"]) == ["full", "template", "peak"]


def test_a_missing_column_is_a_bug(columns):
    del columns["chi2"]
    with pytest.raises(AssertionError, match="missing: \\['chi2'\\]"):
        catalog.make_objects(columns, ["g", "r"], None)


def test_an_unknown_column_is_a_bug(columns):
    columns["colour"] = np.zeros(3)
    with pytest.raises(AssertionError, match="unknown: \\['colour'\\]"):
        catalog.make_objects(columns, ["g", "r"], None)


def test_no_peaks_make_an_empty_table_with_all_columns():
    names = [item.name for item in catalog.object_columns(("g",))]
    table = catalog.make_objects({name: [] for name in names}, ["g"], None)
    assert (len(table), table.colnames) == (0, names)


def test_fluxes_of_candidates_have_the_unit_of_the_coadd():
    table = catalog.make_candidates(zeros(catalog.candidate_columns(("g", "r"))), ["g", "r"], units.nJy)
    assert table["r_flux_err"].unit == units.nJy


def test_every_model_and_origin_fits_into_an_unfilled_column():
    columns = catalog.empty_columns([*catalog.object_columns(("g",)), *catalog.candidate_columns(("g",))], 1)
    for name, values in (("model", catalog.Model), ("origin", catalog.Origin)):
        for value in values:
            columns[name][0] = value
            assert columns[name][0] == value


def test_every_meaning_of_a_mask_plane_has_a_flag():
    assert set(PLANE_FLAGS) == set(PLANE_MEANINGS)


# ---------------------------------------------------------------- magnitudes


def test_magnitudes_are_ab_magnitudes_and_faint_fluxes_have_limits():
    flux, error = np.array([1000.0, 100.0, 2.0, -5.0, np.nan, 10.0]), np.array([1.0, 10.0, 1.0, 1.0, 1.0, np.nan])
    mag, mag_err, limit = catalog.magnitudes(flux, error, 31.4)
    np.testing.assert_allclose(mag, [31.4 - 7.5, 31.4 - 5.0, np.nan, np.nan, np.nan, np.nan])
    np.testing.assert_allclose(mag_err[:2], 1.0857362 * np.array([1e-3, 0.1]), rtol=1e-6)
    # Two sigma and three more; nothing and three more.
    np.testing.assert_allclose(limit[2:4], 31.4 - 2.5 * np.log10([5.0, 3.0]))
    np.testing.assert_array_equal(np.isfinite(limit), [False, False, True, True, False, False])


def test_what_is_no_flux_has_no_unit_of_flux():
    columns = catalog.empty_columns(catalog.object_columns(("g",), "templates"), 2)
    table = catalog.in_nanojansky(catalog.make_objects(columns, ["g"], None, "templates"), ["g"], 27.0)
    assert table["g_stray_flux"].unit == table["g_max_overlap"].unit == units.nJy
    assert table["g_has_stray_flux"].unit is None
    assert table["g_has_stray_flux"].dtype == bool


def test_fluxes_in_nanojansky_have_the_same_magnitudes(columns):
    columns = {**columns, "g_flux": np.full(3, 100.0), "g_flux_err": np.full(3, 5.0)}
    table = catalog.make_objects(columns, ["g", "r"], units.Unit("ct"))
    in_njy = catalog.in_nanojansky(table, ["g", "r"], 27.0)
    assert in_njy["g_flux"].unit == units.nJy
    assert in_njy["g_redistributed_flux"].unit == units.nJy
    assert in_njy["g_observed_max_overlap"].unit is None
    np.testing.assert_allclose(in_njy["g_flux"], 100 * 10 ** (0.4 * 4.4))
    assert table["g_flux"][0] == 100
    before, after = catalog.with_magnitudes(table, ["g"], 27.0), catalog.with_magnitudes(in_njy, ["g"], 31.4)
    np.testing.assert_allclose(after["g_mag"], before["g_mag"])
    at = before.colnames.index("g_flux")
    assert before.colnames[at : at + 5] == ["g_flux", "g_flux_err", "g_mag", "g_mag_err", "g_mag_limit"]
