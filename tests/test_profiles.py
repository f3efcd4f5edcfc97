"""Sersic profiles at Fourier modes are what direct integration says, with all their derivatives."""

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kermes.kernels.profiles import (
    AS_EXPONENTIAL,
    AS_POINT,
    AS_TABLE,
    N_COLUMNS,
    evaluate_profile,
    interpolate_index,
)
from kermes.profiles import (
    CELLS,
    LARGEST_EXPONENT,
    LARGEST_INDEX,
    LEAST_EXPONENT,
    LEAST_INDEX,
    frequencies_of,
    intensity,
    profile_table,
)
from kermes.scene import kernel_table
from reference import profile_transform, sersic_transform, transform_of

TABLE_ERROR = 3e-6
"""Largest error of a transform from the table."""


class Shape(NamedTuple):
    """A profile as kernels take it."""

    y: float = 3.2
    x: float = 11.6
    ln_r: float = 0.4
    e1: float = 0.3
    e2: float = -0.2
    ln_n: float = 0.0


def full(side):
    """Lengths of the rows of all modes of a stamp."""
    return np.full(side, side // 2 + 1)


def evaluated(shape, side, lengths=None, *, form=AS_TABLE, n_columns=N_COLUMNS, fill=0.0):
    """Columns (N_COLUMNS, M), complex, of one profile at the modes of a stamp."""
    lengths = full(side) if lengths is None else lengths
    table = kernel_table()
    cells = np.empty((table.values.shape[1] - 1, 6), dtype=np.float32)
    interpolate_index(table.values, table.slopes, table.ln_index, shape.ln_n, cells)
    columns = np.full((N_COLUMNS, 2, lengths.sum()), fill, dtype=np.float32)
    evaluate_profile(form, cells, lengths, frequencies_of(lengths), np.array(shape[:5]), columns[:n_columns])
    return columns[:, 0].astype(float) + 1j * columns[:, 1]


def wave_numbers(side, lengths):
    """Wave numbers (ky, kx) of the modes of a stamp, in their order."""
    rows = np.where(2 * np.arange(side) < side, np.arange(side), np.arange(side) - side)
    k_y = np.repeat(rows, lengths)
    k_x = np.concatenate([np.arange(n) for n in lengths])
    return 2 * np.pi * k_y / side, 2 * np.pi * k_x / side


def twin(shape, side, lengths=None):
    """Transform of the same profile by direct integration, in double precision."""
    k_y, k_x = wave_numbers(side, full(side) if lengths is None else lengths)
    n = np.exp(shape.ln_n)
    transform = transform_of(float(n)) if n in (0.5, 1.0) else lambda square: sersic_transform(np.sqrt(square), n)
    return profile_transform(k_y, k_x, shape.y, shape.x, np.exp(shape.ln_r), shape.e1, shape.e2, transform)


def differences(shape, side, name, step=1e-4):
    """Derivative of the twin by one number of the shape."""
    value = getattr(shape, name)
    above, below = (twin(shape._replace(**{name: value + s}), side) for s in (step, -step))
    return (above - below) / (2 * step)


def circular(ln_r, ln_n, side=16):
    """The transform itself at the wave numbers along y of a stamp: wave numbers times radius, values."""
    lengths = np.zeros(side, dtype=np.int64)
    lengths[: side // 2] = 1
    k_y, _ = wave_numbers(side, lengths)
    values = evaluated(Shape(0, 0, ln_r, 0, 0, ln_n), side, lengths, n_columns=1)[0]
    return np.exp(ln_r) * k_y, values.real


SHAPES = {
    "round": Shape(e1=0, e2=0),
    "nearly round": Shape(e1=1e-5, e2=-2e-5),
    "flat along x": Shape(e1=1.5, e2=0),
    "flat along a diagonal": Shape(e1=0, e2=-1.5, ln_n=0.5),
    "beyond the corner": Shape(y=-2.7, x=25.3, ln_n=-0.4),
    "small": Shape(ln_r=np.log(0.3)),
    "small and peaked": Shape(ln_r=np.log(0.3), ln_n=np.log(6.0)),
    "large": Shape(ln_r=np.log(20.0), ln_n=np.log(4.0)),
    "large and flat": Shape(ln_r=np.log(20.0), e1=-1.2, e2=1.1),
    "Gaussian": Shape(ln_n=np.log(0.5)),
    "most peaked": Shape(ln_n=np.log(6.5)),
}

# ---------------------------------------------------------------- the table


@pytest.mark.parametrize("index", [0.5, 1.0])
def test_direct_integration_agrees_with_the_closed_form(index):
    q = np.geomspace(1e-3, 300, 100)
    np.testing.assert_allclose(sersic_transform(q, index), transform_of(index)(q**2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("index", [0.5, 1.0, 2.7, 6.0])
def test_the_profile_has_flux_one_and_half_of_it_inside_the_radius(index):
    # The profile is smooth in the logarithm of the radius, over which the trapezoidal rule is good to h^2 at its end.
    edges = np.exp([np.linspace(-12, 0, 4001), np.linspace(0, 9, 4001)])
    half = [2 * np.pi * np.trapezoid(r**2 * intensity(r, index), np.log(r)) for r in edges]
    np.testing.assert_allclose(half, 0.5, atol=1e-5)


@pytest.mark.nojit
def test_the_table_agrees_with_the_closed_forms():
    for index in (0.5, 1.0):
        for ln_r in np.linspace(-4, 4, 41):
            q, values = circular(ln_r, np.log(index))
            np.testing.assert_allclose(values, transform_of(index)(q**2), rtol=0, atol=TABLE_ERROR)


@settings(max_examples=60)
@given(st.floats(np.log(0.1), np.log(60)), st.floats(np.log(LEAST_INDEX), np.log(LARGEST_INDEX)))
def test_the_table_agrees_with_integration_at_any_index_and_radius(ln_r, ln_n):
    q, values = circular(ln_r, ln_n)
    np.testing.assert_allclose(values, sersic_transform(q, np.exp(ln_n)), rtol=0, atol=TABLE_ERROR)


def test_the_rows_of_the_table_are_the_transforms():
    table = profile_table()
    exponents = np.arange(LEAST_EXPONENT, LARGEST_EXPONENT)
    edges = np.append(np.outer(2.0**exponents, 1 + np.arange(CELLS) / CELLS).ravel(), 2.0**LARGEST_EXPONENT)
    chosen = np.flatnonzero(edges < 300**2)[::8]
    for row in [0, 8, 16, 24, 32, 40, 47]:
        expected = sersic_transform(np.sqrt(edges[chosen]), np.exp(table.ln_index[row]))
        np.testing.assert_allclose(table.values[row, chosen], expected, rtol=0, atol=1e-7)


def test_transforms_fall_with_the_wave_number():
    # At the edges of the cells: in between, cubics follow.
    assert (np.diff(profile_table().values, axis=1) < 1e-7).all()


def test_the_table_is_made_once():
    assert profile_table() is profile_table()


@pytest.mark.nojit
@pytest.mark.parametrize("ln_r", [-15.0, 20.0])
def test_radii_beyond_the_table_give_finite_values(ln_r):
    _, values = circular(ln_r, np.log(4.0))
    assert np.isfinite(values).all()
    assert (abs(values) < 1.001).all()


@pytest.mark.nojit
def test_cells_join_without_steps():
    table = kernel_table()
    cells = np.empty((table.values.shape[1] - 1, 6), dtype=np.float32)
    interpolate_index(table.values, table.slopes, table.ln_index, 0.77, cells)
    ends = cells[:-1, :4].sum(axis=1, dtype=float)
    np.testing.assert_allclose(ends, cells[1:, 0], rtol=0, atol=3e-7)


# ---------------------------------------------------------------- one profile at the modes of a stamp


@pytest.mark.nojit
@pytest.mark.parametrize("side", [12, 13], ids=["even", "odd"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_amplitude_agrees_with_the_slow_twin(shape, side):
    np.testing.assert_allclose(evaluated(shape, side)[0], twin(shape, side), rtol=0, atol=TABLE_ERROR)


@pytest.mark.nojit
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("column", "name"), list(enumerate(["y", "x", "ln_r", "e1", "e2", "ln_n"], start=1)))
def test_derivatives_are_finite_differences_of_the_slow_twin(shape, column, name):
    expected = differences(shape, 8, name)
    # Between the edges of a cell values are cubics of q^2, and the derivative by ln n a straight line.
    error = 1e-3 if name == "ln_n" else 1e-4
    np.testing.assert_allclose(evaluated(shape, 8)[column], expected, rtol=0, atol=error)


@pytest.mark.nojit
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_an_exponential_is_evaluated_in_closed_form(shape):
    shape = shape._replace(ln_n=0.0)
    columns = evaluated(shape, 12, form=AS_EXPONENTIAL, n_columns=6)
    # Rounding in single precision alone, where the table has an error of its own.
    np.testing.assert_allclose(columns[0], twin(shape, 12), rtol=0, atol=1e-6)
    for column, name in enumerate(["y", "x", "ln_r", "e1", "e2"], start=1):
        np.testing.assert_allclose(columns[column], differences(shape, 12, name), rtol=0, atol=1e-5)


@settings(max_examples=40)
@given(
    st.floats(-30, 60),
    st.floats(-30, 60),
    st.floats(np.log(0.3), np.log(20)),
    st.floats(-1.6, 1.6),
    st.floats(-1.6, 1.6),
    st.floats(np.log(0.5), np.log(6.5)),
)
def test_any_profile_agrees_with_the_slow_twin(y, x, ln_r, e1, e2, ln_n):
    shape = Shape(y, x, ln_r, e1, e2, ln_n)
    # Phases of some 100 radian in single precision add their rounding.
    np.testing.assert_allclose(evaluated(shape, 10)[0], twin(shape, 10), rtol=0, atol=TABLE_ERROR + 1e-5)


@pytest.mark.nojit
def test_a_point_is_a_phase():
    shape = Shape()
    k_y, k_x = wave_numbers(12, full(12))
    expected = np.exp(-1j * (k_y * shape.y + k_x * shape.x))
    columns = evaluated(shape, 12, form=AS_POINT)
    np.testing.assert_allclose(columns[0], expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(columns[1], -1j * k_y * expected, rtol=0, atol=4e-6)
    np.testing.assert_allclose(columns[2], -1j * k_x * expected, rtol=0, atol=4e-6)


@pytest.mark.nojit
def test_a_tiny_profile_is_a_point():
    tiny = Shape(ln_r=np.log(1e-4), ln_n=0.0)
    np.testing.assert_allclose(evaluated(tiny, 12)[0], evaluated(tiny, 12, form=AS_POINT)[0], rtol=0, atol=1e-6)


@pytest.mark.nojit
def test_the_flux_is_one():
    for shape in SHAPES.values():
        assert evaluated(shape, 8)[0, 0] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.nojit
def test_derivatives_vanish_where_the_flux_is_counted():
    for shape in SHAPES.values():
        np.testing.assert_allclose(evaluated(shape, 8)[1:, 0], 0, atol=1e-6)


@pytest.mark.nojit
def test_nearly_round_profiles_join_round_ones():
    # The formula changes at an ellipticity of 1e-4.
    below, above = (evaluated(Shape(e1=e, e2=0, ln_n=0.3), 12) for e in (0.99e-4, 1.01e-4))
    np.testing.assert_allclose(above, below, rtol=0, atol=1e-5)


# ---------------------------------------------------------------- where modes are put


@pytest.mark.nojit
@given(st.lists(st.integers(0, 5), min_size=8, max_size=8))
def test_modes_stand_row_by_row_in_the_order_of_the_lengths(lengths):
    lengths = np.array(lengths)
    columns = evaluated(Shape(ln_n=0.5), 8, lengths)
    chosen = (np.arange(5) < lengths[:, None]).ravel()
    np.testing.assert_array_equal(columns, evaluated(Shape(ln_n=0.5), 8)[:, chosen])


@pytest.mark.nojit
@pytest.mark.parametrize(
    ("n_columns", "form"), [(1, AS_TABLE), (3, AS_TABLE), (N_COLUMNS, AS_EXPONENTIAL), (N_COLUMNS, AS_POINT)]
)
def test_only_the_columns_that_are_asked_for_are_written(n_columns, form):
    written = min(n_columns, {AS_TABLE: N_COLUMNS, AS_EXPONENTIAL: 6, AS_POINT: 3}[form])
    columns = evaluated(Shape(), 8, n_columns=n_columns, form=form, fill=7.0)
    assert (columns[written:] == 7.0 + 7.0j).all()
    expected = evaluated(Shape(), 8, n_columns=6, form=form)
    np.testing.assert_array_equal(columns[:written], expected[:written])
