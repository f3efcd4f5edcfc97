"""Profiles fitted in Fourier modes are those of a slow fit to the pixels, with honest errors, wherever they stand."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.signal
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter, maximum_filter
from scipy.optimize import least_squares

from kermes.config import ProfileConfig
from kermes.kernels.normal_equations import (
    BLOCK,
    RIDGE,
    cholesky,
    clear_equations,
    eliminate_fluxes,
    fill_modes,
    fill_pixels,
    solve_fluxes,
    substitute,
)
from kermes.kernels.profile_fitting import (
    BROKEN,
    EVEN,
    MOST_PIXELS,
    UNEVEN,
    admit_misfit,
    evaluate_group,
    fill_doubt,
    fit_group,
    goes_too_far,
    list_components,
    mean_weight,
    see_column,
    shape_index,
    total_doubt,
    visit_group,
)
from kermes.kernels.profiles import N_COLUMNS
from kermes.kernels.residuals import find_maxima, significance
from kermes.kernels.stamps import DOUBLE, EXPONENTIAL, N_KINDS, N_SHAPE, POINT, SERSIC, draw_sources, plan_stamps
from kermes.point_fitting import fit_points
from kermes.profile_fitting import (
    LEVELS,
    LONGEST_STEP,
    SIDES,
    THRESHOLDS,
    ModeBank,
    _Engine,
    _hosts,
    _is_crowded,
    _new_sources,
    _unknown_variances,
    correlate,
    fit_profiles,
)
from kermes.profiles import frequencies_of
from kermes.psf import continued
from kermes.scene import kernel_table
from kermes.simulation import MoffatPsf, simulate_scene
from reference import profile_images, structure, wrapped

PSFS = np.stack(
    [MoffatPsf(fwhm_pix=w, beta=b, axis_ratio=0.95, angle=0.4).stamp() for w, b in ((4.2, 3.2), (3.6, 4.2))]
)
BANK = ModeBank(PSFS)
DEFAULT = ProfileConfig()
TIGHT = replace(DEFAULT, tolerance=1e-3)
NO_PRIOR = replace(DEFAULT, radius_width=0.0, shear_width=0.0, center_width=0.0, index_width=0.0, center_box=5.0)
PAIR = [(31.3, 30.8, 1.8, 0.3, -0.2, 1.0, (900.0, 1400.0)), (34.1, 36.2, 1.1, -0.1, 0.4, 1.0, (600.0, 500.0))]
"""Two galaxies at S/N 100 and 70 that overlap: y, x, radius, shear, index, fluxes."""


def draw(sources, shape=(64, 64)):
    """Images (2, H, W) without noise; sources as `reference.profile_images` takes them."""
    side, margin = max(shape) + 64, 32
    moved = [(y + margin, x + margin, *rest) for y, x, *rest in sources]
    return profile_images(side, PSFS, moved)[:, margin : margin + shape[0], margin : margin + shape[1]]


def noisy(images, seed=0):
    return images + np.random.default_rng(seed).normal(size=images.shape)


def ones(images):
    return np.ones(images.shape, dtype=np.float32)


def fit(images, peaks, config=DEFAULT, weights=None, bank=BANK, **options):
    """Fit with all choices left to the fit."""
    weights = ones(images) if weights is None else weights.astype(np.float32)
    return fit_profiles(images.astype(np.float32), weights, bank, np.array(peaks, dtype=float), config, **options)


def engine_of(images, peaks, config=DEFAULT, weights=None, kinds=EXPONENTIAL):
    """Make an engine that fits given kinds to the end."""
    weights = ones(images) if weights is None else weights.astype(np.float32)
    config = replace(config, tolerance=1e-9)
    engine = _Engine(images.astype(np.float32), weights, BANK, np.array(peaks, dtype=float), config)
    engine.sources.kinds[:] = kinds
    # Stamps that hold the light of sources as bright as this.
    engine.snr[:] = 100.0
    return engine


def swept(images, peaks, config=DEFAULT, weights=None, kinds=EXPONENTIAL, sweeps=1):
    """Fit given kinds by a number of sweeps; returns the engine with its errors."""
    engine = engine_of(images, peaks, config, weights, kinds)
    for _ in range(sweeps):
        engine.sweep(25)
    engine.sweep(0, errors=True)
    return engine


def total(fitted):
    """Fluxes (S, B) of listed sources."""
    return fitted.flux[: fitted.n_listed]


def width(values):
    """Width of a distribution, robustly."""
    return 1.4826 * np.median(abs(values - np.median(values)))


# ---------------------------------------------------------------- dense twins of the kernels


@pytest.mark.nojit
@settings(max_examples=30)
@given(st.integers(0, 7), st.integers(0, 1000))
def test_cholesky_agrees_with_numpy(n, seed):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(n, n + 3))
    matrix = np.full((8, 8), np.nan)
    matrix[:n, :n] = root @ root.T
    expected = np.linalg.cholesky(matrix[:n, :n])
    assert cholesky(matrix, n)
    np.testing.assert_allclose(np.tril(matrix[:n, :n]), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.nojit
@pytest.mark.parametrize("value", [0.0, -1.0, np.nan])
def test_a_matrix_that_is_not_positive_has_no_factor(value):
    assert not cholesky(np.diag([1.0, value, 1.0]), 3)


@pytest.mark.nojit
@settings(max_examples=30)
@given(st.integers(1, 7), st.booleans(), st.integers(0, 1000))
def test_substitution_solves_the_triangular_systems(n, backward, seed):
    rng = np.random.default_rng(seed)
    factor = np.tril(rng.normal(size=(n, n))) + 3 * np.eye(n)
    vector = rng.normal(size=n)
    expected = np.linalg.solve(factor @ factor.T if backward else factor, vector)
    substitute(factor, n, vector, backward)
    np.testing.assert_allclose(vector, expected, rtol=1e-9, atol=1e-12)


def complex_columns(waves, columns):
    """Transforms of components and their derivatives (C, N_COLUMNS, M) from factors of their waves."""
    turns = np.array([1, -1j, -1j, 1, 1, 1, 1])
    return (waves[:, 0] + 1j * waves[:, 1])[:, None] * columns * turns[:, None]


def problem(kinds, exact, *, uniform=False, seed=0, side=12):
    """Make a group of sources of some kinds with random data and weights, at the modes or pixels of a stamp."""
    rng = np.random.default_rng(seed)
    n = len(kinds)
    positions = rng.uniform(4, 8, (n + 1, 2))
    sources = _new_sources(positions, 2, DEFAULT)
    # The first source is not a member of the group.
    members = np.arange(n, 0, -1)
    sources.kinds[members] = kinds
    sources.shapes[:, 2:] += rng.normal(size=(n + 1, N_SHAPE - 2)) * 0.3
    lengths = np.array([6, 6, 6, 5, 2, 0, 0, 0, 2, 5, 6, 6]) if side == 12 else np.full(side, side // 2 - 1)
    kept = np.arange(side // 2 + 1) < lengths[:, None]
    n_modes = lengths.sum()
    # Off the middle, so that transforms are complex.
    windows = np.fft.rfft2([np.roll(wrapped(psf, side), (1, -1), axis=(0, 1)) for psf in PSFS])[:, kept]
    psf = np.ascontiguousarray(np.stack([windows.real, windows.imag], axis=1), dtype=np.float32)
    if exact:
        power = rng.uniform(0.5, 2.0, (2, side * side)).astype(np.float32)
        # Masked pixels, some of them in cores.
        power[:, rng.integers(0, side * side, 20)] = 0
        if uniform:
            power[:] = [[0.7], [1.6]]
        data = (30 * rng.normal(size=(2, 1, side * side))).astype(np.float32)
    else:
        power = rng.uniform(0.5, 2.0, (2, n_modes)).astype(np.float32)
        data = (30 * rng.normal(size=(2, 2, n_modes))).astype(np.float32)
    owner, part = np.empty((2, 2 * n), dtype=np.int64)
    slots = np.empty((2 * n, N_COLUMNS), dtype=np.int64)
    n_components, n_free = list_components(members, sources.kinds, -1, owner, part, slots)
    waves = np.zeros((n_components, 2, n_modes), dtype=np.float32)
    columns = np.zeros((n_components, N_COLUMNS, n_modes), dtype=np.float32)
    table = kernel_table()
    cells = np.empty((table.values.shape[1] - 1, 6), dtype=np.float32)
    frequencies = frequencies_of(lengths)
    theta, inside = sources.shapes[members], (0, side, 0, side)
    evaluate_group(
        table, lengths, frequencies, side, inside, False, psf, members, sources.kinds, theta, owner, part, slots,
        n_components, True, cells, waves, columns, np.empty((0, 2, side * side), dtype=np.float32),
    )  # fmt: skip
    transforms = np.zeros((n_components, N_COLUMNS, 2, *kept.shape), dtype=complex)
    transforms[..., kept] = complex_columns(waves, columns)[:, :, None] * windows
    pixels = np.fft.irfft2(transforms, (side, side)).reshape(n_components, N_COLUMNS, 2, -1).astype(np.float32)
    images = np.ascontiguousarray(pixels[:, 0])
    return SimpleNamespace(**{name: value for name, value in locals().items() if name != "rng"})


def in_modes(p):
    """Turn a problem at the pixels of a stamp, with uniform weights, into the same at its modes."""
    share = np.broadcast_to(np.where(np.arange(p.side // 2 + 1) == 0, 1, 2) / p.side**2, p.kept.shape)[p.kept]
    weighted = np.fft.rfft2((p.power * p.data[:, 0]).reshape(2, p.side, p.side))[:, p.kept]
    seen = share * p.windows.conj() * weighted
    data = np.ascontiguousarray(np.stack([seen.real, seen.imag], axis=1), dtype=np.float32)
    power = np.ascontiguousarray(p.power[:, :1] * share * abs(p.windows) ** 2, dtype=np.float32)
    return SimpleNamespace(**{**vars(p), "exact": False, "data": data, "power": power})


def both_forms(kinds):
    """Give the same problem at pixels and at modes: bright sources, uniform weights, and shapes to start from."""
    forms = []
    for _ in range(2):
        p, rng = problem(kinds, exact=True, uniform=True), np.random.default_rng(1)
        p.data[:, 0] = 300 * p.pixels[:, 0].sum(axis=0) + rng.normal(size=p.power.shape) / np.sqrt(p.power)
        p.sources.shapes[p.members] += 0.05 * rng.normal(size=p.theta.shape)
        forms.append(p)
    return forms[0], in_modes(forms[1])


def solved(p):
    """Fluxes by the kernel: gain, matrix, fluxes, factors."""
    c = p.n_components
    matrix, factors, fluxes = np.empty((2, c, c)), np.empty((2, c, c)), np.empty((c, 2))
    gain = solve_fluxes(
        p.exact, p.waves, p.columns, p.images, p.data, p.power, c, p.owner, matrix, fluxes, factors
    )  # fmt: skip
    return gain, matrix, fluxes, factors


def normal(p, fluxes, together=2):
    """Normal equations by the kernel: Hessian, gradient, coupling; pixels of so many bands at once."""
    _, _, _, factors = solved(p)
    hessian, gradient = np.empty((p.n_free, p.n_free)), np.empty(p.n_free)
    coupling = np.empty((2, p.n_components, p.n_free))
    clear_equations(hessian, gradient, coupling)
    equations = p.slots, fluxes, hessian, gradient, coupling
    if p.exact:
        for first in range(0, 2, together):
            derivatives = np.ascontiguousarray(p.pixels[:, 1:, first : first + together])
            fill_pixels(first, p.images, derivatives, p.data, p.power, p.n_components, *equations)
    else:
        fill_modes(p.waves, p.columns, p.data, p.power, p.n_components, p.owner, *equations)
    eliminate_fluxes(factors, coupling, hessian)
    return hessian, gradient, coupling


def room(p):
    """Make arrays for a fit to work in."""
    arrays = p.waves, p.columns, p.images, p.pixels[:, 1:]
    return [np.full((2 * p.n, *array.shape[1:]), np.nan, np.float32) for array in arrays]


def fitted_group(p, n_steps):
    """Fit by the kernel: loss, number of steps."""
    unused = _unknown_variances(p.n + 1, 2, p.n)
    return fit_group(
        p.table, p.lengths, p.frequencies, p.side, p.inside, p.exact, p.psf, p.data, p.power, p.members, p.sources, -1,
        LONGEST_STEP, n_steps, 1e-6, np.inf, False, unused, *room(p),
    )  # fmt: skip


def variances(p):
    """Variances of fluxes and shapes by the kernel."""
    found = _unknown_variances(p.n + 1, 2, p.n)
    fitted, (_, _, fluxes, _) = p.sources.fluxes.copy(), solved(p)
    for c in range(p.n_components):
        p.sources.fluxes[p.members[p.owner[c]], p.part[c]] = fluxes[c]
    fit_group(
        p.table, p.lengths, p.frequencies, p.side, p.inside, p.exact, p.psf, p.data, p.power, p.members, p.sources, -1,
        LONGEST_STEP, 0, 1e-6, np.inf, True, found, *room(p),
    )  # fmt: skip
    p.sources.fluxes[:] = fitted
    return found


def dense(p, fluxes):
    """Describe the problem of each band by plain matrices, over its K modes or pixels.

    Amplitudes (B, C, K), derivatives of the model by the free parameters (B, F, K), weights (B, K), weighted data.
    """
    if p.exact:
        flat = p.pixels.astype(float).transpose(2, 0, 1, 3)
        weights = p.power.astype(float)
        data = weights * p.data[:, 0]
    else:
        columns = complex_columns(p.waves.astype(float), p.columns)
        flat = np.stack([np.concatenate([columns.real, columns.imag], axis=-1)] * 2)
        weights = np.concatenate([p.power, p.power], axis=1).astype(float)
        data = p.data.astype(float).reshape(2, -1)
    derivatives = np.zeros((2, p.n_free, flat.shape[-1]))
    for c, j in np.argwhere(p.slots[: p.n_components] >= 0):
        derivatives[:, p.slots[c, j]] += fluxes[c][:, None] * flat[:, c, j]
    return flat[:, :, 0], derivatives, weights, data


def ridged(matrix):
    return matrix + RIDGE * np.diag(np.diag(matrix))


GROUPS = {
    "point": [POINT],
    "exponential": [EXPONENTIAL],
    "Sersic": [SERSIC],
    "double": [DOUBLE],
    "mixed": [DOUBLE, POINT, SERSIC],
    "five": [POINT, EXPONENTIAL, EXPONENTIAL, POINT, SERSIC],
}
every_group = pytest.mark.parametrize("kinds", GROUPS.values(), ids=GROUPS)


both = pytest.mark.parametrize("exact", [False, True], ids=["modes", "pixels"])
transforms_compiled = pytest.mark.parametrize(
    "exact", [pytest.param(False, marks=pytest.mark.nojit), True], ids=["modes", "pixels"]
)
"""Fourier transforms exist in compiled code only."""


@pytest.mark.nojit
@every_group
def test_every_free_parameter_has_one_slot(kinds):
    p = problem(kinds, exact=False)
    free = {POINT: 2, EXPONENTIAL: 5, SERSIC: 6, DOUBLE: 9}
    assert p.n_free == sum(free[kind] for kind in kinds)
    assert p.n_components == sum(1 + (kind == DOUBLE) for kind in kinds)
    own = {
        (p.owner[c], shape_index(p.part[c], j)): p.slots[c, j] for c, j in np.argwhere(p.slots[: p.n_components] >= 0)
    }
    assert sorted(own.values()) == list(range(p.n_free))


@every_group
def test_columns_are_seen_through_the_psf(kinds):
    p = problem(kinds, exact=True)
    for c, q in [*np.argwhere(p.slots[: p.n_components] >= 0), (0, 0)]:
        seen = np.full((2, p.side**2), np.nan, dtype=np.float32)
        see_column(p.columns[c, q], p.waves[c], q, p.lengths, p.psf, p.side, p.inside, seen)
        # A transform in single precision.
        np.testing.assert_allclose(seen, p.pixels[c, q], rtol=0, atol=1e-6 * abs(p.columns).max())
        part = np.full((2, 7 * 4), np.nan, dtype=np.float32)
        see_column(p.columns[c, q], p.waves[c], q, p.lengths, p.psf, p.side, (2, 9, 5, 9), part)
        np.testing.assert_array_equal(part, seen.reshape(2, p.side, p.side)[:, 2:9, 5:9].reshape(2, -1))


@pytest.mark.nojit
@both
@every_group
def test_fluxes_are_those_of_a_dense_linear_fit(kinds, exact):
    p = problem(kinds, exact)
    gain, matrix, fluxes, _ = solved(p)
    expected_gain = 0.0
    for b, (amplitudes, _, weights, data) in enumerate(zip(*dense(p, fluxes), strict=True)):
        normal = amplitudes * weights @ amplitudes.T
        right = amplitudes @ data
        np.testing.assert_allclose(matrix[b], normal, rtol=1e-4)
        expected = np.linalg.solve(ridged(normal), right)
        # Sums are in single precision, and parts of one source resemble each other.
        error = np.sqrt(np.diag(np.linalg.inv(ridged(normal))))
        assert (abs(fluxes[:, b] - expected) < 0.01 * error * np.sqrt(p.n_modes)).all()
        expected_gain += 0.5 * right @ expected
    assert gain == pytest.approx(expected_gain, rel=1e-3)


@pytest.mark.nojit
@both
@every_group
def test_normal_equations_are_those_with_the_fluxes_eliminated(kinds, exact):
    check_normal_equations(problem(kinds, exact))


@pytest.mark.nojit
@every_group
def test_pixels_of_one_band_after_the_other_give_the_same_normal_equations(kinds):
    p = problem(kinds, exact=True)
    _, _, fluxes, _ = solved(p)
    for found, expected in zip(normal(p, fluxes, together=1), normal(p, fluxes), strict=True):
        np.testing.assert_array_equal(found, expected)


@every_group
def test_many_modes_are_summed_block_by_block(kinds):
    p = problem(kinds, exact=False, side=64)
    assert p.n_modes > BLOCK
    assert p.n_modes % BLOCK > 0
    check_normal_equations(p)


def check_normal_equations(p):
    """Compare normal equations, and the fluxes that they take, with those of plain matrices."""
    _, matrix, fluxes, _ = solved(p)
    hessian, gradient, coupling = normal(p, fluxes)
    expected, expected_gradient, scale, size = 0.0, 0.0, 0.0, 0.0
    for b, (amplitudes, j, weights, data) in enumerate(zip(*dense(p, fluxes), strict=True)):
        own = matrix[b]
        cross = amplitudes * weights @ j.T
        full = j * weights @ j.T
        largest = np.sqrt(np.outer(np.diag(own), np.diag(full)))
        assert (abs(coupling[b] - cross) < 1e-4 * largest).all()
        expected = expected + full - cross.T @ np.linalg.solve(ridged(own), cross)
        left = data - weights * (fluxes[:, b] @ amplitudes)
        expected_gradient = expected_gradient + j @ left
        scale = scale + np.sqrt(np.diag(full))
        size += np.linalg.norm(data)
    # Relative to what is subtracted from each other, in single precision.
    np.testing.assert_allclose(hessian / np.outer(scale, scale), expected / np.outer(scale, scale), rtol=0, atol=1e-4)
    assert (abs(gradient - expected_gradient) < 1e-4 * scale * size).all()


@transforms_compiled
@every_group
def test_errors_are_those_of_the_whole_normal_matrix(kinds, exact):
    p = problem(kinds, exact)
    _, matrix, fluxes, _ = solved(p)
    found = variances(p)
    n, c = p.n_free, p.n_components
    whole = np.zeros((n + 2 * c, n + 2 * c))
    for b, (amplitudes, derivatives, weights, _) in enumerate(zip(*dense(p, fluxes), strict=True)):
        own = slice(n + b * c, n + (b + 1) * c)
        whole[:n, :n] += derivatives * weights @ derivatives.T
        whole[:n, own] = derivatives * weights @ amplitudes.T
        whole[own, :n] = whole[:n, own].T
        whole[own, own] = ridged(matrix[b])
    for k, j in np.argwhere(p.slots[:c] >= 0):
        s, place = p.members[p.owner[k]], p.slots[k, j]
        if p.part[k] == 0 or j >= 3:
            whole[place, place] += p.sources.weight[s, shape_index(p.part[k], j)]
    inverse = np.linalg.inv(whole)
    for i, s in enumerate(p.members):
        first = np.flatnonzero(p.owner[:c] == i)[0]
        place = p.slots[first, 1:]
        free = place >= 0
        np.testing.assert_allclose(found.shape[s, :6][free], inverse[place[free], place[free]], rtol=0.02)
        assert np.isnan(found.shape[s, :6][~free]).all()
        if free[4]:
            both = inverse[place[3], place[4]]
            scale = np.sqrt(inverse[place[3], place[3]] * inverse[place[4], place[4]])
            assert found.shape[s, 6] == pytest.approx(both, abs=0.02 * scale)
    together = correlate(found, np.append(p.members, 0), np.array([0, p.n, p.n + 1]))
    condition = np.ones(2)
    for b in range(2):
        sums = np.zeros((p.n, len(whole)))
        sums[p.owner[:c], n + b * c + np.arange(c)] = 1
        covariance = sums @ inverse @ sums.T
        np.testing.assert_allclose(found.flux[p.members, b], np.diag(covariance), rtol=0.02)
        correlation = covariance / np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
        condition[b] = np.linalg.cond(correlation)
        others = correlation - np.eye(p.n)
        worst = abs(others).argmax(axis=1)
        strongest = together.strongest[p.members, b]
        np.testing.assert_allclose(strongest, others[np.arange(p.n), worst], rtol=0, atol=0.01)
        expected = np.where(abs(others).max(axis=1) > 0, p.members[worst], -1)
        # Of two that are nearly as strong, either.
        second = np.sort(abs(others))[:, -2] if p.n > 1 else np.zeros(1)
        sure = abs(others).max(axis=1) > second + 0.02
        np.testing.assert_array_equal(together.neighbor[p.members, b][sure], expected[sure])
    np.testing.assert_allclose(together.condition[p.members], condition.max(), rtol=0.05)
    assert np.isnan(together.condition[0])
    # The first source is not a member.
    assert np.isnan(found.flux[0]).all()


@transforms_compiled
def test_steps_never_raise_the_loss(exact):
    p = problem([EXPONENTIAL, SERSIC], exact)
    losses = [fitted_group(p, 1)[0] for _ in range(5)]
    assert (np.diff(losses) <= 1e-6 * abs(losses[0])).all()


@transforms_compiled
def test_a_step_stays_inside_the_limits(exact):
    p = problem([EXPONENTIAL, SERSIC], exact)
    for _ in range(5):
        fitted_group(p, 3)
    # What is not fitted may stand anywhere.
    inside = (p.sources.shapes >= p.sources.low) & (p.sources.shapes <= p.sources.high)
    assert inside[p.members, :5].all()


# ---------------------------------------------------------------- modes and pixels give the same for uniform weights


@pytest.mark.nojit
@every_group
def test_modes_and_pixels_give_the_same_fluxes(kinds):
    (gain, matrix, fluxes, _), (expected_gain, expected_matrix, expected, _) = (solved(p) for p in both_forms(kinds))
    # Parseval's theorem, in single precision.
    np.testing.assert_allclose(matrix, expected_matrix, rtol=1e-5)
    assert gain == pytest.approx(expected_gain, rel=1e-4)
    errors = np.sqrt([np.diag(np.linalg.inv(ridged(own))) for own in expected_matrix]).T
    assert (abs(fluxes - expected) < 0.01 * errors).all()


@pytest.mark.nojit
@every_group
def test_modes_and_pixels_give_the_same_normal_equations(kinds):
    pixels, modes = both_forms(kinds)
    _, matrix, fluxes, _ = solved(modes)
    hessian, gradient, coupling = normal(pixels, fluxes)
    expected_hessian, expected_gradient, expected_coupling = normal(modes, fluxes)
    _, derivatives, weights, _ = dense(modes, fluxes)
    full = np.einsum("bfk,bk,bfk->bf", derivatives, weights, derivatives)
    largest = np.sqrt(np.einsum("bcc,bf->bcf", matrix, full))
    # Relative to what is summed, in single precision.
    assert (abs(coupling - expected_coupling) < 1e-5 * largest).all()
    scale = np.sqrt(full).sum(axis=0)
    # Fluxes of a disc and a bulge that are alike, eliminated, lose some more digits.
    assert (abs(hessian - expected_hessian) < 1e-4 * np.outer(scale, scale)).all()
    assert (abs(gradient - expected_gradient) < 1e-5 * scale * np.linalg.norm(pixels.data)).all()


@every_group
def test_modes_and_pixels_give_the_same_errors(kinds):
    forms = both_forms(kinds)
    found, expected = (variances(p) for p in forms)
    # Normal matrices of neighbours are worse conditioned by a factor of 1000 than single precision is exact.
    np.testing.assert_allclose(found.flux, expected.flux, rtol=1e-3)
    np.testing.assert_allclose(found.shape[:, :6], expected.shape[:, :6], rtol=1e-3)
    members = forms[0].members
    scale = np.sqrt(expected.flux[members][:, None] * expected.flux[members])
    assert (abs(found.cross - expected.cross)[members] < 1e-3 * scale).all()


@every_group
def test_modes_and_pixels_give_the_same_step(kinds):
    pixels, modes = both_forms(kinds)
    before = modes.sources.shapes.copy()
    (loss, steps), (expected_loss, expected_steps) = fitted_group(pixels, 1), fitted_group(modes, 1)
    assert steps == expected_steps == 1
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    # Derivatives resemble each other, so that a step is less exact than its equations.
    moved = abs(modes.sources.shapes - before).max()
    np.testing.assert_allclose(pixels.sources.shapes, modes.sources.shapes, rtol=0, atol=0.01 * moved)
    errors = np.sqrt(variances(modes)[0][modes.members])
    difference = (pixels.sources.fluxes - modes.sources.fluxes)[modes.members].sum(axis=1)
    assert (abs(difference) < 0.01 * errors).all()


@every_group
def test_modes_and_pixels_end_at_the_same_fit(kinds):
    pixels, modes = both_forms(kinds)
    (loss, _), (expected_loss, _) = fitted_group(pixels, 25), fitted_group(modes, 25)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    found = variances(modes)
    # The loss, of up to 3e4, is not known to more than 0.03: fits end within sqrt(2 x 0.03) of an error of each other.
    flux = (pixels.sources.fluxes - modes.sources.fluxes).sum(axis=1)[modes.members]
    assert (abs(flux) < 0.25 * np.sqrt(found.flux[modes.members])).all()
    center = (pixels.sources.shapes - modes.sources.shapes)[modes.members, :2]
    assert (abs(center) < 0.25 * np.sqrt(found.shape[modes.members, :2])).all()


def visit(engine, *, exact, choose=False, errors=False):
    """Visit all sources as one group: the loss, the steps, whether one visit suffices, and the change."""
    members = np.arange(len(engine.snr))
    stamps, mean = np.empty((1, 4), dtype=np.int64), np.empty(2)
    plan_stamps(engine.sources, members, np.array([0, len(members)]), engine.snr, SIDES, LEVELS, stamps)
    mean_weight(engine.weights, engine.sources, members, mean)
    candidates = engine.candidates() if choose else np.zeros((len(members), N_KINDS), dtype=bool)
    return visit_group(
        engine.residual, engine.weights, engine.table, engine.bank.require(stamps), SIDES, engine.sources, members,
        stamps[0], mean, BROKEN if exact else EVEN, LONGEST_STEP, 25, engine.config.tolerance, candidates,
        engine.penalties, engine.variances, errors,
    )  # fmt: skip


def chosen(*, exact):
    """Visit a bright pair once, with all kinds to choose from: the engine, with errors, the loss and the steps."""
    images = noisy(4 * draw(PAIR)).astype(np.float32)
    engine = _Engine(images, ones(images), BANK, np.rint([s[:2] for s in PAIR]), DEFAULT)
    engine.snr[:] = 400.0
    loss, steps, closed, _ = visit(engine, exact=exact, choose=True)
    visit(engine, exact=exact, errors=True)
    return SimpleNamespace(engine=engine, loss=loss, steps=steps, closed=closed)


@pytest.fixture(scope="module")
def visits():
    return chosen(exact=True), chosen(exact=False)


def test_modes_and_pixels_choose_the_same_kinds(visits):
    pixels, modes = visits
    np.testing.assert_array_equal(pixels.engine.sources.kinds, modes.engine.sources.kinds)
    # Differences of losses that are known to seven digits; fits of kinds that are far worse end a little earlier.
    atol = 1e-6 * abs(modes.loss)
    np.testing.assert_allclose(pixels.engine.sources.evidence, modes.engine.sources.evidence, rtol=1e-4, atol=atol)


def test_modes_and_pixels_reach_the_same_loss(visits):
    pixels, modes = visits
    assert pixels.loss == pytest.approx(modes.loss, rel=1e-6)
    assert pixels.engine.loss() == pytest.approx(modes.engine.loss(), rel=1e-6)
    # Not by the same number of steps: where a kind is given up early, rounding decides when.
    assert pixels.closed
    assert modes.closed


def test_modes_and_pixels_give_the_same_sources(visits):
    one, other = (v.engine for v in visits)
    errors = np.sqrt(other.variances.flux)
    assert (abs(one.sources.fluxes - other.sources.fluxes).sum(axis=1) < 0.01 * errors).all()
    centers = abs(one.sources.shapes - other.sources.shapes)[:, :2]
    assert (centers < 0.01 * np.sqrt(other.variances.shape[:, :2])).all()
    np.testing.assert_allclose(one.variances.flux, other.variances.flux, rtol=1e-3)
    np.testing.assert_allclose(one.variances.shape[:, :2], other.variances.shape[:, :2], rtol=1e-3)


def test_modes_and_pixels_leave_the_same(visits):
    one, other = (v.engine.residual for v in visits)
    # In units of the noise; sources end within a hundredth of their errors.
    np.testing.assert_allclose(one, other, rtol=0, atol=0.01)


def in_the_noise_of_its_photons():
    """A bright galaxy and one on its arm, whose pixels count far less than those around: peaks, images and weights."""
    galaxies = [(48.0, 47.0, 9.0, 0.3, -0.2, 1.0, (4e5, 6e5)), (38.0, 58.0, 3.0, -0.4, 0.3, 1.0, (5e4, 4e4))]
    images = draw(galaxies, shape=(96, 96))
    weights = 1 / (1 + images / 20)
    noise = np.random.default_rng(2).normal(size=images.shape) / np.sqrt(weights)
    return [(48, 47), (38, 58)], images + noise, weights


def test_no_visit_makes_the_fit_worse_whatever_the_weights():
    peaks, images, weights = in_the_noise_of_its_photons()
    assert weights.max() > 100 * weights.min()
    engine = engine_of(images, peaks, weights=weights)
    engine.snr[:] = 3000.0
    losses = [engine.loss()]
    for _ in range(6):
        visit(engine, exact=False)
        losses.append(engine.loss())
    # Each image is drawn on its stamp in float32, and the loss of a million is known to a few units in the last digit.
    assert (np.diff(losses) < 1e-6 * losses[0]).all()


def test_uneven_weights_lead_to_the_fit_that_all_pixels_give():
    peaks, images, weights = in_the_noise_of_its_photons()
    modes, pixels = (engine_of(images, peaks, weights=weights) for _ in range(2))
    modes.snr[:] = pixels.snr[:] = 3000.0
    assert mean_weight(modes.weights, modes.sources, np.arange(2), np.empty(2)) == UNEVEN
    for _ in range(16):
        modes.sweep(25)
        visit(pixels, exact=True)
    # From 1e8, so many sweeps are enough for a tenth of a standard deviation of what is worst known.
    assert modes.loss() == pytest.approx(pixels.loss(), abs=0.1)


@pytest.mark.nojit
@settings(max_examples=40)
@given(
    st.integers(0, 1000), st.integers(-9, 14), st.integers(-9, 16), st.floats(0.1, 3), st.sampled_from([1, 30, np.inf])
)
def test_what_goes_too_far_agrees_with_the_slow_twin(seed, y0, x0, size, most):
    rng = np.random.default_rng(seed)
    residual, change = (rng.normal(size=(2, *shape)).astype(np.float32) for shape in ((15, 17), (8, 8)))
    weights = rng.uniform(0, 3, (2, 15, 17)).astype(np.float32)
    change *= np.float32(size)
    mean = rng.uniform(0.3, 2, 2)
    # The change on the pixels of the image, in a frame that holds both.
    whole = np.zeros((2, 60, 60))
    whole[:, y0 + 20 : y0 + 28, x0 + 20 : x0 + 28] = change
    seen = whole[:, 20:35, 20:37]
    square, bend, slope = (
        (factor * seen).sum(axis=(1, 2), dtype=np.float64) for factor in (seen, weights * seen, weights * residual)
    )
    promised = float((mean * square / 2 - slope).sum())
    rise = float((bend / 2 - slope).sum())
    too_far = rise - promised > 0.9 * abs(promised) + 0.05 or rise > most
    ratio = np.divide(bend, mean * square, out=np.ones(2), where=square > 0)
    expected = mean * np.clip(ratio, 1 if too_far else 0.25, 4)
    assert goes_too_far(residual, weights, change, y0, x0, mean, float(most)) == too_far
    np.testing.assert_allclose(mean, expected, rtol=1e-4)


def weights_near(case):
    """Weights of two bands around a point in the middle of 21 x 21 pixels."""
    weights = np.ones((2, 21, 21), dtype=np.float32)
    weights[1] = 3
    if case == "one bad pixel":
        weights[0, 10, 10] = 0
    elif case == "two bad pixels":
        weights[0, 10, 10:12] = 0
    elif case == "bad pixels elsewhere":
        weights[:, :5] = 0
    elif case == "no band":
        weights[0] = 0
    elif case == "slightly deeper":
        weights[0, :10] = 1.25
    elif case == "deeper":
        weights[0, :10] = 1.4
    return weights


@pytest.mark.nojit
@pytest.mark.parametrize(
    ("case", "evenness"),
    [
        ("uniform", EVEN),
        ("one bad pixel", EVEN),
        ("two bad pixels", BROKEN),
        ("bad pixels elsewhere", EVEN),
        ("no band", EVEN),
        ("slightly deeper", EVEN),
        ("deeper", UNEVEN),
    ],
)
def test_weights_are_uneven_where_some_count_much_more(case, evenness):
    weights = weights_near(case)
    sources = _new_sources(np.array([[10.2, 9.7]]), 2, DEFAULT)
    sources.kinds[:] = POINT
    mean = np.empty(2)
    assert mean_weight(weights, sources, np.array([0]), mean) == evenness
    near = weights[:, 6:15, 6:15]
    expected = [w[w > 0].mean() if w.any() else 0.0 for w in near]
    np.testing.assert_allclose(mean, expected, rtol=1e-6)


@pytest.mark.nojit
def test_weights_at_the_edge_are_broken():
    sources = _new_sources(np.array([[2.2, 9.7]]), 2, DEFAULT)
    sources.kinds[:] = POINT
    mean = np.empty(2)
    assert mean_weight(weights_near("uniform"), sources, np.array([0]), mean) == BROKEN
    np.testing.assert_allclose(mean, [1, 3])


# ---------------------------------------------------------------- what nobody listed and what stands out


@pytest.mark.nojit
def test_what_stands_out_is_the_matched_filter_of_all_bands():
    rng = np.random.default_rng(1)
    images, residual, weights = rng.normal(size=(3, 2, 20, 17)).astype(np.float32)
    weights = np.maximum(weights, 0)
    sigmas = np.array([1.6, 0.9])
    left, seen = np.empty((2, 20, 17), dtype=np.float32)
    significance(images, residual, weights, sigmas, 0.5, left, seen)
    expected = np.zeros((2, 20, 17))
    for b, sigma in enumerate(sigmas):
        reach = int(np.ceil(2.5 * sigma))
        taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
        shape = np.outer(taps, taps)
        norm = scipy.signal.correlate2d(weights[b], shape**2, mode="same")
        for out, plane in zip(expected, (residual[b], images[b] - residual[b]), strict=True):
            signal = scipy.signal.correlate2d(weights[b] * plane, shape, mode="same")
            out += np.maximum(signal, 0) ** 2 / norm
    expected = np.sqrt(expected)
    np.testing.assert_allclose(left, expected[0], rtol=1e-4, atol=1e-5)
    # What the model has is asked for only where most is left.
    asked = (left > 0.5) & (left == maximum_filter(left, 3))
    assert asked.any()
    np.testing.assert_allclose(seen, np.where(asked, expected[1], 0), rtol=1e-4, atol=1e-5)


@pytest.mark.nojit
def test_a_band_without_a_psf_does_not_stand_out():
    images = np.ones((2, 9, 8), dtype=np.float32)
    left, seen = np.empty((2, 9, 8), dtype=np.float32)
    significance(images, images, images, np.zeros(2), 0.5, left, seen)
    assert not left.any()


@pytest.mark.nojit
@settings(max_examples=40)
@given(st.integers(0, 10000), st.floats(0.5, 3.0), st.floats(0, 0.5), st.floats(0, 4))
def test_maxima_agree_with_the_slow_twin(seed, threshold, share, distance):
    rng = np.random.default_rng(seed)
    # Few values, so that some are equal.
    left = rng.integers(0, 6, (11, 9)).astype(np.float32)
    seen = rng.integers(0, 3, (11, 9)).astype(np.float32)
    weights = (rng.uniform(size=(2, 11, 9)) > 0.3).astype(np.float32)
    positions = rng.uniform(0, 9, (2, 2))
    found, values = np.empty((99, 2)), np.empty(99)
    n = find_maxima(left, seen, weights, threshold, share, positions, distance, found, values)
    expected = []
    for y, x in np.ndindex(left.shape):
        if not (0 < y < 10 and 0 < x < 8) or left[y, x] <= threshold + share * seen[y, x]:
            continue
        around = left[max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3]
        before = [
            (p, q)
            for p, q in np.ndindex(left.shape)
            if max(abs(p - y), abs(q - x)) <= 2 and (p, q) < (y, x) and left[p, q] == left[y, x]
        ]
        apart = (np.hypot(*(positions - (y, x)).T) >= distance).all()
        if left[y, x] == around.max() and not before and weights[:, y, x].any() and apart:
            expected.append((y, x))
    np.testing.assert_array_equal(found[:n], np.array(expected).reshape(-1, 2))
    np.testing.assert_array_equal(values[:n], [left[pixel] for pixel in expected])


# ---------------------------------------------------------------- the same answer as a fit to the pixels


def slow_fit(images, weights, peaks, config, stamp, start, *, free_index=False):
    """Least squares over all shapes and fluxes at once, to the pixels of a stamp, periodic, with the same priors.

    start: sources as `draw` takes them. Returns parameters (S, 7 or 8), shapes first as kernels take them, and errors.
    """
    side, (y0, x0) = int(SIDES[stamp[0]]), stamp[1:3]
    # Stamps may reach beyond the image.
    inside = np.s_[:, y0 + 99 : y0 + 99 + side, x0 + 99 : x0 + 99 + side]
    images, weights = (np.pad(a, [(0, 0), (99, 99), (99, 99)])[inside] for a in (images, weights))
    root = np.sqrt(weights)
    n, n_shape = len(start), 6 if free_index else 5
    widths = [config.center_width] * 2 + [config.radius_width] + [config.shear_width] * 2 + [config.index_width]

    def residuals(flat):
        p = flat.reshape(n, -1)
        index = [round(float(np.exp(row[5])), 12) if free_index else 1.0 for row in p]
        sources = [
            (r[0] - y0, r[1] - x0, np.exp(r[2]), r[3], r[4], i, r[n_shape:]) for r, i in zip(p, index, strict=True)
        ]
        left = root * (images - profile_images(side, PSFS, sources))
        parts = [left.ravel()]
        for row, peak in zip(p, peaks, strict=True):
            mean = np.array([*peak, np.log(config.radius), 0, 0, 0])
            parts += [(row[k : k + 1] - mean[k]) / widths[k] for k in range(n_shape) if widths[k] > 0]
        return np.concatenate(parts)

    first = [[y, x, np.log(r), e1, e2] + [np.log(i)] * free_index + list(f) for y, x, r, e1, e2, i, f in start]
    found = least_squares(residuals, np.ravel(first), x_scale="jac", xtol=1e-8, ftol=1e-10, gtol=1e-8)
    errors = np.sqrt(np.diag(np.linalg.inv(found.jac.T @ found.jac)))
    return found.x.reshape(n, -1), errors.reshape(n, -1)


def parameters(engine, free_index=False):
    """The same of a fit in Fourier modes."""
    shapes, fluxes = engine.sources.shapes, engine.sources.fluxes
    return np.concatenate([shapes[:, : 6 if free_index else 5], fluxes[:, 0]], axis=1)


IN_ERRORS = 0.015
"""Faint Fourier modes, where the PSF is below 2e-3, are not fitted: differences in units of the errors."""


@pytest.mark.parametrize("sources", [PAIR[:1], PAIR], ids=["one", "two"])
@pytest.mark.parametrize("config", [DEFAULT, NO_PRIOR], ids=["priors", "no priors"])
def test_modes_and_pixels_give_the_same_fit(sources, config):
    images = noisy(draw(sources))
    peaks = np.rint([s[:2] for s in sources])
    engine = swept(images, peaks, config)
    expected, errors = slow_fit(images, ones(images), peaks, config, engine.sources.stamps[0], sources)
    assert (abs(parameters(engine) - expected) < IN_ERRORS * errors).all()
    np.testing.assert_allclose(np.sqrt(engine.variances.shape[:, :2]), errors[:, :2], rtol=0.01)
    np.testing.assert_allclose(np.sqrt(engine.variances.flux), errors[:, 5:], rtol=0.01)


def test_modes_and_pixels_give_the_same_free_index():
    one = (31.3, 30.8, 2.2, 0.3, -0.2, 1.6, (2000.0, 3000.0))
    images = noisy(draw([one]))
    engine = swept(images, [(31, 31)], kinds=SERSIC)
    expected, errors = slow_fit(
        images, ones(images), [(31, 31)], DEFAULT, engine.sources.stamps[0], [one], free_index=True
    )
    # The index is what the faint modes tell most about.
    assert (abs(parameters(engine, free_index=True) - expected) < 5 * IN_ERRORS * errors).all()
    np.testing.assert_allclose(np.sqrt(engine.variances.flux[0]), errors[0, 6:], rtol=0.01)


def spoilt(sources, masks, seed=1):
    """Images and weights that vary by a factor of three, with masked pixels, given as bands, rows and columns."""
    rng, images = np.random.default_rng(seed), draw(sources)
    weights = rng.uniform(0.5, 1.5, images.shape)
    images += rng.normal(size=images.shape) / np.sqrt(weights)
    for mask in masks:
        weights[mask], images[mask] = 0, 1e3
    return images, weights


EDGE = [(2.3, 30.2, 1.5, 0.1, 0.2, 1.0, (3000.0, 2000.0)), (61.2, 61.7, 1.5, 0.2, 0.1, 1.0, (1000.0, 2000.0))]
"""A galaxy at the edge and one in a corner."""


@pytest.mark.parametrize(
    ("sources", "masks"),
    [
        (PAIR, [np.s_[:, 26:30, 34:37], np.s_[0, 36, 20:40], np.s_[1, 31, 30]]),
        (PAIR[:1], [np.s_[:, 30:33, 30:33]]),
        (PAIR, [np.s_[:, 30:33, 30:33], np.s_[0, 33:36, 35:38]]),
        (EDGE[:1], []),
        (EDGE[1:], []),
    ],
    ids=["wings and rows", "core", "cores", "edge", "corner"],
)
def test_one_visit_reaches_the_fit_to_the_pixels_with_varying_variance_and_masked_pixels(sources, masks):
    images, weights = spoilt(sources, masks)
    peaks = np.rint([s[:2] for s in sources])
    engine = swept(images, peaks, weights=weights)
    expected, errors = slow_fit(images, weights, peaks, DEFAULT, engine.sources.stamps[0], sources)
    assert (abs(parameters(engine) - expected) < IN_ERRORS * errors).all()
    np.testing.assert_allclose(np.sqrt(engine.variances.shape[:, :2]), errors[:, :2], rtol=0.01)
    np.testing.assert_allclose(np.sqrt(engine.variances.flux), errors[:, 5:], rtol=0.01)


def test_visits_in_modes_reach_the_fit_to_the_pixels_with_varying_variance_and_masked_pixels():
    # So are groups fitted whose stamps are too large for products from the pixels.
    images, weights = spoilt(PAIR, [np.s_[:, 26:30, 34:37], np.s_[0, 36, 20:40], np.s_[1, 31, 30]])
    peaks = np.rint([s[:2] for s in PAIR])
    engine = engine_of(images, peaks, weights=weights)
    closed = [visit(engine, exact=False)[-2] for _ in range(15)]
    assert not any(closed)
    visit(engine, exact=False, errors=True)
    expected, errors = slow_fit(images, weights, peaks, DEFAULT, engine.sources.stamps[0], PAIR)
    assert (abs(parameters(engine) - expected) < IN_ERRORS * errors).all()
    # Errors come from the mean weight near the sources.
    np.testing.assert_allclose(np.sqrt(engine.variances.flux), errors[:, 5:], rtol=0.15)


def test_groups_on_large_stamps_are_visited_in_modes():
    images, weights = spoilt(PAIR[:1], [np.s_[:, 30:33, 30:33]])
    small, large = (engine_of(images, [(31, 31)], weights=weights) for _ in range(2))
    large.snr[:], large.sources.shapes[:, 2] = 3000.0, np.log(30.0)
    assert visit(small, exact=True)[-2]
    assert not visit(large, exact=True)[-2]
    assert SIDES[large.sources.stamps[0, 0]] ** 2 > MOST_PIXELS


def test_groups_fitted_in_turn_reach_the_joint_fit():
    images, peaks = noisy(draw(PAIR)), np.rint([s[:2] for s in PAIR])
    joint, apart = (swept(images, peaks, replace(DEFAULT, largest_group=n), sweeps=40) for n in (2, 1))
    errors = np.sqrt(joint.variances.flux)
    # Each stamp is periodic in its own way, and light that leaves it comes back on the other side.
    assert (abs(joint.sources.fluxes[:, 0] - apart.sources.fluxes[:, 0]) < 0.05 * errors).all()


def test_what_is_left_is_data_less_model():
    images, peaks = noisy(draw(PAIR)), np.rint([s[:2] for s in PAIR])
    engine = swept(images, peaks)
    p = parameters(engine)
    model = draw([(r[0], r[1], np.exp(r[2]), r[3], r[4], 1.0, r[5:]) for r in p])
    # Beyond the stamp there is no light; inside faint modes are missing.
    np.testing.assert_allclose(engine.residual, images - model, rtol=0, atol=2e-3 * model.max())


# ---------------------------------------------------------------- recovery


def test_sources_without_noise_are_recovered():
    engine = swept(draw(PAIR), np.rint([s[:2] for s in PAIR]), NO_PRIOR)
    for row, (y, x, radius, e1, e2, _, fluxes) in zip(parameters(engine), PAIR, strict=True):
        np.testing.assert_allclose(row[:5], [y, x, np.log(radius), e1, e2], rtol=0, atol=2e-3)
        np.testing.assert_allclose(row[5:], fluxes, rtol=1e-3)


def test_an_isolated_galaxy_without_noise_is_recovered_with_all_choices():
    fitted = fit(draw(PAIR[:1]), [(31, 31)], NO_PRIOR)
    np.testing.assert_allclose(total(fitted)[0], PAIR[0][-1], rtol=2e-3)


def test_a_prior_of_width_zero_is_switched_off():
    images, peaks = noisy(0.2 * draw(PAIR)), np.rint([s[:2] for s in PAIR])
    free, held = (
        abs(np.subtract(*(parameters(swept(images, peaks, replace(config, radius=r)))[:, 2] for r in (1.4, 2.0))))
        for config in (NO_PRIOR, DEFAULT)
    )
    # In ln r, whose errors are 0.08 and 0.13; with a prior of width 0.5 its mean counts for a thirtieth or more.
    assert free.max() < 3e-3 < 1e-2 < held.max()


def test_whole_numbers_are_settings_like_any_other():
    # Kernels are compiled for floats; for whole numbers they would be compiled once more.
    config = ProfileConfig(link=13, bright_snr=np.float32(300))
    assert (type(config.link), type(config.bright_snr)) == (float, float)
    assert config == ProfileConfig(link=13.0, bright_snr=300.0)


@pytest.mark.parametrize("largest_radius", [1.0, 0.0])
def test_the_cap_of_the_radius_can_be_switched_off(largest_radius):
    large = (31.3, 30.8, 4.0, 0.0, 0.0, 1.0, (2000.0, 3000.0))
    fitted = fit(noisy(draw([large])), [(31, 31)], replace(DEFAULT, largest_radius=largest_radius))
    radius = np.exp(fitted.sources.shapes[0, 2])
    assert radius == pytest.approx(4.0, rel=0.1) if largest_radius == 0 else radius < 3.0


def pulls(sources, n, config=NO_PRIOR):
    """Fit exponential profiles to the same with other noise.

    Pulls of fluxes (n, S, B), centers (n, S, 2) and ln r, e1, e2 (n, S, 3), and correlations as predicted (n, S, B).
    """
    images, peaks = draw(sources, (64, 64)), np.rint([s[:2] for s in sources])
    of_flux, of_center, of_shape, correlation = [], [], [], []
    shapes = np.array([(*s[:2], np.log(s[2]), *s[3:5]) for s in sources])
    for seed in range(n):
        engine = swept(noisy(images, seed), peaks, config)
        of_flux.append((engine.sources.fluxes[:, 0] - [s[-1] for s in sources]) / np.sqrt(engine.variances.flux))
        of_all = (engine.sources.shapes[:, :5] - shapes) / np.sqrt(engine.variances.shape[:, :5])
        of_center.append(of_all[:, :2])
        of_shape.append(of_all[:, 2:])
        correlation.append(correlate(engine.variances, engine.members, engine.offsets).strongest)
    return np.array(of_flux), np.array(of_center), np.array(of_shape), np.array(correlation)


@pytest.fixture(scope="module", params=[PAIR[:1], PAIR], ids=["isolated", "pair"])
def repeats(request):
    return pulls(request.param, 400)


def test_flux_errors_are_as_large_as_the_scatter(repeats):
    # The scatter of 400 pulls, of two bands or sources, which are correlated, is known to 0.03.
    assert 0.9 < repeats[0].std() < 1.15


def test_center_errors_are_as_large_as_the_scatter(repeats):
    assert 0.9 < repeats[1].std() < 1.15


def test_errors_of_shapes_are_as_large_as_the_scatter(repeats):
    # Sizes and shapes are less linear than positions; the width of all is known to 0.02.
    assert 0.9 < repeats[2].std() < 1.15


def test_correlations_of_fluxes_are_those_of_400_fits(repeats):
    of_flux, _, _, correlation = repeats
    if of_flux.shape[1] == 1:
        assert (correlation == 0).all()
        return
    for b in range(2):
        found = np.corrcoef(of_flux[:, 0, b], of_flux[:, 1, b])[0, 1]
        # Known to 0.05 from 400 fits.
        assert np.median(correlation[:, 0, b]) == pytest.approx(found, abs=0.1)
        assert found < -0.15
    np.testing.assert_array_equal(correlation[:, 0], correlation[:, 1])


def test_fluxes_are_unbiased(repeats):
    # The mean of 400 pulls is known to 0.05; fluxes are not linear in shapes, which adds a bias of that order.
    assert abs(repeats[0].mean(axis=0)).max() < 0.2


def test_pulls_of_galaxies_drawn_from_the_priors_are_as_wide_as_one():
    of_flux, of_center = [], []
    for seed in range(150):
        rng = np.random.default_rng(seed)
        center = 24 + 0.3 * rng.normal(size=2)
        radius, shear = 1.4 * np.exp(0.5 * rng.normal()), np.clip(0.4 * rng.normal(size=2), -1.5, 1.5)
        images = draw([(*center, radius, *shear, 1.0, (1.0, 1.0))], (48, 48))
        flux = 50 / np.linalg.norm(images)
        engine = swept(noisy(flux * images, seed), np.rint([center]))
        of_flux.append((engine.sources.fluxes[0, 0] - flux) / np.sqrt(engine.variances.flux[0]))
        of_center.append((engine.sources.shapes[0, :2] - center) / np.sqrt(engine.variances.shape[0, :2]))
    assert np.std(of_flux) == pytest.approx(1.0, abs=0.13)
    assert np.std(of_center) == pytest.approx(1.0, abs=0.13)


def test_errors_know_that_a_galaxy_may_have_been_taken_for_a_point():
    """Small galaxies at S/N 8, of which two in three are taken for points and lose a third of their light."""
    flux = np.array([70.0, 90.0])
    images = draw([(31.3, 30.8, 0.8, 0.3, -0.2, 1.0, flux)])
    fits = [fit(noisy(images, seed), [(31, 31)]) for seed in range(100)]
    assert 0.4 < np.mean([f.sources.kinds[0] == POINT for f in fits]) < 0.85
    pull = np.array([(total(f)[0] - flux) / f.flux_err[0] for f in fits])
    # 1.2, known to 0.1; without what lies between the kinds 1.4.
    assert 0.9 < np.sqrt(np.mean(pull**2)) < 1.3


def test_the_mean_over_point_and_galaxy_is_closer_to_the_truth_than_the_likelier_one():
    """Stars and galaxies of three sizes at S/N 8."""
    errors = {True: [], False: []}
    for radius in (0.0, 0.8, 1.4):
        flux = np.array([70.0, 90.0]) * (1 + 0.4 * radius)
        shape = (radius, 0.3, -0.2, 1.0) if radius > 0 else (1e-3, 0.0, 0.0, 1.0)
        images = draw([(31.3, 30.8, *shape, flux)])
        for seed in range(60):
            for average, found in errors.items():
                fitted = fit(noisy(images, seed), [(31, 31)], replace(DEFAULT, average_kinds=average))
                found.append((total(fitted)[0] - flux) / flux)
    mean, likelier = (np.sqrt(np.mean(np.square(errors[average]))) for average in (True, False))
    # By 6 %, of the same noise.
    assert mean < 0.97 * likelier


def test_the_mean_flux_changes_neither_the_kind_nor_how_well_that_fits():
    images, peaks = noisy(draw([(31.3, 30.8, 0.8, 0.3, -0.2, 1.0, (70.0, 90.0))])).astype(np.float32), [(31, 31)]
    mean, likelier = (fit(images, peaks, replace(DEFAULT, average_kinds=average)) for average in (True, False))
    lean = (total(mean) - total(likelier))[0]
    assert (lean != 0).all()
    np.testing.assert_allclose(lean, mean.sources.lean[0, 0])
    np.testing.assert_array_equal(mean.sources.shapes, likelier.sources.shapes)
    np.testing.assert_array_equal(mean.residual, likelier.residual)
    # The chi2 that errors are scaled with is that of the likelier kind, too.
    np.testing.assert_array_equal(mean.variances.flux, likelier.variances.flux)


def test_doubt_is_the_mean_square_of_the_change_to_the_likely_kinds():
    engine = engine_of(noisy(draw(PAIR)), np.rint([s[:2] for s in PAIR]))
    members, chosen = np.arange(2), EXPONENTIAL
    losses = np.array([12.0, 10.0, np.nan, 9.0])  # a kind with less loss than the chosen one counts as much as that
    noted = np.random.default_rng(1).normal(size=(4, 2, 2))
    engine.sources.doubt[:] = 1.0  # from an earlier choice
    fill_doubt(engine.sources, members, 1, losses, chosen, noted)
    likely = np.exp([-2.0, 0.0, -np.inf, 0.0])
    likely /= likely.sum()
    expected = np.einsum("k,ksb->sb", likely, np.square(noted - noted[chosen]))
    # The mean of point and exponential; the double is an alternative, but none to be averaged with.
    mean = likely[0] * (noted[POINT] - noted[EXPONENTIAL])
    np.testing.assert_array_equal(engine.sources.partners, [[-1] * 5, [0, 1, -1, -1, -1]])
    np.testing.assert_allclose(engine.sources.lean[1, :2], mean)
    np.testing.assert_allclose(engine.sources.doubt[1, :2], expected)
    np.testing.assert_array_equal(engine.sources.doubt[1, 2:], 0.0)
    # Each choice counts once, however often it is made, and both count.
    fill_doubt(engine.sources, members[::-1], 0, losses, chosen, noted)
    doubt, lean = np.empty((2, 2, 2))
    total_doubt(engine.sources, doubt, lean)
    np.testing.assert_allclose(doubt, expected + expected[::-1])
    np.testing.assert_allclose(lean, mean + mean[::-1])


def test_variances_grow_with_the_chi2_of_the_core_and_the_doubt():
    """The first of two sources has a poor model, the second one that suffices; both may be of other kinds."""
    rng = np.random.default_rng(3)
    engine = engine_of(noisy(draw(PAIR)), np.rint([s[:2] for s in PAIR]))
    sources = engine.sources
    sources.kinds[1] = POINT
    sources.partners[:, 0], sources.partners[0, 1] = (0, 1), 1
    sources.doubt[:], sources.lean[:] = rng.random((2, *sources.doubt.shape))
    residual, weights = rng.normal(size=(2, 64, 64)), rng.random((2, 64, 64)) * (rng.random((2, 64, 64)) > 0.1)
    residual[:, :, :34] *= 3
    variances = _unknown_variances(2, 2, DEFAULT.largest_group)
    variances.flux[:], variances.shape[:] = rng.random((2, 2)), rng.random((2, 7))
    variances.shape[1, 2:] = np.nan
    before = variances.flux.copy(), variances.shape.copy()
    doubt, lean = np.empty((2, 2, 2))
    residual, weights = residual.astype(np.float32), weights.astype(np.float32)
    admit_misfit(residual, weights, sources, BANK.width, 0.01, variances, doubt, lean)

    y, x = np.mgrid[:64, :64]
    scale = []
    for s, radius in enumerate((2 * BANK.width + np.exp(sources.shapes[0, 2]), 2 * BANK.width)):
        core = np.hypot(y - sources.shapes[s, 0], x - sources.shapes[s, 1]) <= radius
        used = core & (weights > 0)
        scale.append(max((weights * residual**2)[used].sum() / used.sum(), 1.0))
    assert scale[0] > 1.0
    assert scale[1] == 1.0
    for total, parts in ((doubt, sources.doubt), (lean, sources.lean)):
        np.testing.assert_allclose(total, [parts[0, 0], parts[0, 1] + parts[1, 0]])
    np.testing.assert_allclose(variances.flux, before[0] * np.array(scale)[:, None] + doubt, rtol=1e-5)
    expected = before[1] * np.array(scale)[:, None] + 0.01**2 * (np.arange(7) < 2)
    np.testing.assert_allclose(variances.shape, expected, rtol=1e-5)


def test_who_may_not_choose_keeps_what_is_known_of_its_kind():
    """The group of a pair is visited again for one of its members alone."""
    engine = engine_of(noisy(draw(PAIR)), np.rint([s[:2] for s in PAIR]))
    engine.sweep(5)
    engine.update()
    engine.sweep(5, candidates=engine.candidates())
    noted = engine.sources.evidence, engine.sources.doubt, engine.sources.lean
    kept = [array[1].copy() for array in noted]
    other = engine.sources.doubt[0].copy()
    assert np.isfinite(kept[0]).sum() > 1
    assert (kept[1] > 0).any()
    engine.sweep(5, candidates=engine.candidates(np.array([False, True])))
    for before, array in zip(kept, noted, strict=True):
        np.testing.assert_array_equal(array[1], before)
    # The other compared its kinds once more.
    assert (engine.sources.doubt[0] != other).any()


def test_without_a_choice_there_is_no_doubt():
    fitted = fit(noisy(draw(PAIR)), np.rint([s[:2] for s in PAIR]), most=POINT)
    np.testing.assert_array_equal(fitted.doubt, 0.0)


def simulated(seed=3, n_sources=6, shape=(72, 70), **options):
    """Images in units of the noise, truth and peaks of a simulated scene in two bands."""
    scene = simulate_scene(n_sources=n_sources, shape=shape, seed=seed, bands=("r", "i"), **options)
    sigma = np.sqrt(scene.coadd.variance.mean(axis=(1, 2)))[:, None, None]
    listed = scene.truth[scene.truth["peak_index"] >= 0]
    truth = np.stack([listed["r_flux"], listed["i_flux"]], axis=1) / sigma[:, 0, 0]
    return SimpleNamespace(
        images=(scene.coadd.images / sigma).astype(np.float32),
        truth=np.asarray(truth, dtype=float),
        peaks=scene.peaks.astype(float),
        psfs=scene.coadd.psfs,
        bank=ModeBank(scene.coadd.psfs),
    )


def test_simulated_scenes_are_recovered_within_errors():
    found = []
    for seed in range(12):
        scene = simulated(seed)
        fitted = fit(scene.images, scene.peaks, bank=scene.bank)
        found.append(((total(fitted) - scene.truth) / fitted.flux_err[: fitted.n_listed]).ravel())
    # Faint galaxies that are taken for points, and discs with bulges: wider than one.
    assert width(np.concatenate(found)) < 1.5


# ---------------------------------------------------------------- invariance


@pytest.fixture(scope="module")
def field():
    """Simulate a field, and fit it."""
    scene = simulated()
    return scene, fit(scene.images, scene.peaks, TIGHT, bank=scene.bank)


def assert_close(fluxes, expected, errors):
    """Fluxes agree within a twentieth of their errors: fits end where a step lowers chi2 by less than 2e-3."""
    assert (abs(fluxes - expected) < 0.05 * errors).all()


def test_the_order_of_the_peaks_does_not_matter(field):
    scene, fitted = field
    order = np.random.default_rng(0).permutation(len(scene.peaks))
    permuted = fit(scene.images, scene.peaks[order], TIGHT, bank=scene.bank)
    assert_close(total(permuted), total(fitted)[order], fitted.flux_err[order])


@pytest.mark.parametrize("axis", [0, 1], ids=["y", "x"])
def test_flipping_the_image_flips_the_sources(field, axis):
    scene, fitted = field
    peaks = scene.peaks.copy()
    peaks[:, axis] = scene.images.shape[1 + axis] - 1 - peaks[:, axis]
    bank = ModeBank(np.flip(scene.psfs, 1 + axis))
    flipped = fit(np.flip(scene.images, 1 + axis), peaks, TIGHT, bank=bank)
    assert_close(total(flipped), total(fitted), fitted.flux_err[: len(peaks)])


@pytest.mark.parametrize(("shift", "error"), [((8, 4), 0.0), ((32, 0), 0.05)], ids=["same bits", "rounded"])
def test_shifting_by_whole_pixels_shifts_the_sources(shift, error):
    # Positions keep their bits unless a power of two lies between; where it does, a visit may end a step earlier or
    # later. It ends when half the chi2 falls by less than 1e-3, within 0.045 sigma of the minimum.
    images, peaks = noisy(draw(PAIR, (80, 80))), np.rint([s[:2] for s in PAIR])
    fitted = fit(images, peaks, TIGHT)
    moved = fit(np.roll(images, shift, axis=(1, 2)), peaks + shift, TIGHT)
    np.testing.assert_array_equal(moved.sources.kinds, fitted.sources.kinds)
    assert (abs(total(moved) - total(fitted)) <= error * fitted.flux_err).all()
    centers = moved.sources.shapes[:, :2] - shift
    assert (abs(centers - fitted.sources.shapes[:, :2]) <= error * fitted.center_err + 1e-12).all()


def test_unused_pixels_beyond_the_edge_do_not_matter():
    images = noisy(draw([(2.3, 30.2, 1.5, 0.1, 0.2, 1.0, (3000.0, 2000.0))]))
    fitted = fit(images, [(2, 30)])
    wide = [(0, 0), (8, 0), (4, 0)]
    padded = fit(np.pad(images, wide), [(10, 34)], weights=np.pad(ones(images), wide))
    assert_close(total(padded), total(fitted), fitted.flux_err)


def test_the_same_input_gives_the_same_bits(field):
    scene, fitted = field
    again = fit(scene.images, scene.peaks, TIGHT, bank=ModeBank(scene.psfs))
    for one, other in zip(again.sources, fitted.sources, strict=True):
        assert one.tobytes() == other.tobytes()


def test_scaling_image_and_noise_scales_fluxes(field):
    scene, fitted = field
    scaled = fit(8 * scene.images, scene.peaks, TIGHT, weights=ones(scene.images) / 64, bank=scene.bank)
    np.testing.assert_allclose(scaled.sources.fluxes, 8 * fitted.sources.fluxes, rtol=1e-3, atol=1e-3)


def test_values_of_masked_pixels_do_not_matter(field):
    scene, _ = field
    weights = ones(scene.images)
    weights[:, 20:24, 30:33] = 0
    spoilt = scene.images.copy()
    spoilt[:, 20:24, 30:33] = 1e4
    one, other = (fit(images, scene.peaks, weights=weights, bank=scene.bank) for images in (scene.images, spoilt))
    np.testing.assert_array_equal(one.sources.fluxes, other.sources.fluxes)


def test_far_neighbours_do_not_change_an_isolated_source():
    near, far = PAIR[0], (31.0, 100.4, 1.5, 0.1, 0.2, 1.0, (3000.0, 2000.0))
    noise = noisy(np.zeros((2, 64, 128)))
    alone = fit(draw([near], (64, 128)) + noise, [(31, 31)])
    both = fit(draw([near, far], (64, 128)) + noise, [(31, 31), (31, 100)])
    assert (abs(total(both)[0] - total(alone)[0]) < 0.01 * alone.flux_err[0]).all()


@pytest.mark.parametrize("missing", ["psf", "weights"])
def test_an_unusable_band_leaves_the_others_alone(missing):
    images = noisy(draw(PAIR))
    peaks = np.rint([s[:2] for s in PAIR])
    weights, bank = ones(images), BANK
    if missing == "psf":
        bank = ModeBank(PSFS * np.array([1, 0])[:, None, None])
    else:
        weights[1] = 0
    fitted = fit(images, peaks, weights=weights, bank=bank)
    alone = fit(images[:1], peaks, bank=ModeBank(PSFS[:1]))
    assert np.isnan(fitted.flux_err[:, 1]).all()
    assert_close(total(fitted)[:, 0], total(alone)[:, 0], alone.flux_err[:, 0])


@pytest.mark.parametrize("half", [1, 3, 5])
def test_a_masked_core_gives_finite_fluxes(half):
    images = noisy(draw([(31.3, 30.8, 0.0, 0.0, 0.0, 1.0, (9000.0, 14000.0))]))
    weights = ones(images)
    weights[:, 31 - half : 32 + half, 31 - half : 32 + half] = 0
    fitted = fit(images, [(31, 31)], weights=weights)
    assert np.isfinite(fitted.sources.fluxes).all()


@pytest.mark.parametrize("half", [1, 2])
def test_a_masked_core_does_not_bias_the_flux(half):
    images = noisy(draw([(31.3, 30.8, 0.0, 0.0, 0.0, 1.0, (9000.0, 14000.0))]))
    weights = ones(images)
    weights[:, 31 - half : 32 + half, 31 - half : 32 + half] = 0
    fitted = fit(images, [(31, 31)], weights=weights)
    assert (abs(total(fitted) - (9000.0, 14000.0)) < 4 * fitted.flux_err).all()


def test_sources_at_the_edge_are_fitted():
    sources = [
        (2.3, 30.2, 1.5, 0.1, 0.2, 1.0, (3000.0, 2000.0)),
        (61.2, 61.7, 0.0, 0.0, 0.0, 1.0, (1000.0, 2000.0)),
    ]
    fitted = fit(noisy(draw(sources)), np.rint([s[:2] for s in sources]))
    assert (abs(total(fitted) - [s[-1] for s in sources]) < 4 * fitted.flux_err).all()


def test_two_peaks_in_one_place_share_the_flux():
    fitted = fit(noisy(draw(PAIR[:1])), [(31, 31), (31, 31)])
    np.testing.assert_allclose(total(fitted).sum(axis=0), PAIR[0][-1], rtol=0.05)


# ---------------------------------------------------------------- what a source is taken for


def star_of(snr):
    """Fluxes of a star of some signal-to-noise in both bands together."""
    return snr / np.sqrt(2) / np.sqrt((PSFS**2).sum(axis=(1, 2)))


# Stars that are taken for galaxies: the share of 300 was 0.04 up to 20, 0.03 at 30, 0.01 at 50 and 0 above.
@pytest.mark.parametrize(("snr", "most"), [(5, 9), (10, 9), (20, 9), (50, 4), (200, 1), (1000, 1)])
def test_points_stay_points(snr, most):
    extended, n = 0, 80
    for seed in range(n):
        center = 24 + np.random.default_rng(seed).uniform(-0.5, 0.5, 2)
        images = draw([(*center, 0.0, 0.0, 0.0, 1.0, star_of(snr))], (48, 48))
        extended += fit(noisy(images, seed), [(24, 24)]).sources.kinds[0] != POINT
    print(f"S/N {snr}: {extended} of {n} stars are taken for galaxies")
    assert extended <= most


def test_bright_galaxies_are_no_points():
    assert (fit(noisy(draw(PAIR)), np.rint([s[:2] for s in PAIR])).sources.kinds != POINT).all()


def test_evidence_grows_with_the_signal():
    small, large = (
        fit(noisy(draw([(31.3, 30.8, 1.2, 0, 0, 1.0, star_of(snr))])), [(31, 31)], most=EXPONENTIAL).evidence[0]
        for snr in (60, 200)
    )
    assert large > small > 0


@pytest.mark.parametrize("most", [POINT, EXPONENTIAL, SERSIC])
def test_no_source_is_more_complex_than_allowed(most):
    bright = (31.3, 30.8, 3.0, 0.3, 0.1, 3.0, (2e4, 3e4))
    assert fit(noisy(draw([bright])), [(31, 31)], most=most).sources.kinds[0] <= most


# ---------------------------------------------------------------- sources that nobody listed


@pytest.mark.parametrize("threshold", [DEFAULT.residual_snr, 3.5])
def test_noise_alone_adds_as_many_sources_as_it_has_peaks(threshold):
    config, n, side = replace(DEFAULT, residual_snr=threshold, residual_rounds=1), 60, 48
    found = sum(len(fit(noisy(np.zeros((2, side, side)), s), [(24, 24)], config).significance) for s in range(n))
    # Peaks of the positive signal-to-noise of both bands, squared and summed, in a larger piece of noise.
    total2 = np.zeros((1500, 1500))
    for b, sigma in enumerate(BANK.sigmas):
        filtered = gaussian_filter(np.random.default_rng(b).normal(size=total2.shape), sigma, mode="wrap")
        total2 += np.maximum(filtered / filtered.std(), 0) ** 2
    peaks = (total2 > threshold**2) & (total2 == maximum_filter(total2, 5, mode="wrap"))
    expected = peaks.mean() * n * side**2
    # What is near the listed source and at the edge is less than a fifth.
    assert abs(found - expected) < 0.2 * expected + 3 * np.sqrt(expected + 1)


def test_a_source_that_is_not_listed_is_added():
    images = noisy(draw([*PAIR[:1], (31.0, 45.3, 0.0, 0.0, 0.0, 1.0, star_of(30))]))
    fitted = fit(images, [(31, 31)])
    assert fitted.n_listed == 1
    assert len(fitted.significance) == 1
    np.testing.assert_allclose(fitted.sources.shapes[1, :2], (31.0, 45.3), atol=0.5)
    np.testing.assert_allclose(fitted.sources.fluxes[1].sum(axis=0), star_of(30), rtol=0.25)


def test_sources_are_not_added_in_no_rounds():
    images = noisy(draw([*PAIR[:1], (31.0, 45.3, 0.0, 0.0, 0.0, 1.0, star_of(30))]))
    assert len(fit(images, [(31, 31)], replace(DEFAULT, residual_rounds=0)).significance) == 0


@pytest.mark.parametrize("snr", [30, 300, 3000])
def test_a_lone_star_is_not_torn_apart(snr):
    images = noisy(draw([(31.3, 30.8, 0.0, 0.0, 0.0, 1.0, star_of(snr))]))
    assert len(fit(images, [(31, 31)]).significance) == 0


GALAXY = (31.3, 30.8, 4.0, 0.2, -0.1, 1.0, (1e4, 1.4e4))
"""A large galaxy at S/N 400."""

KNOT = (36.4, 34.3, 0.0, 0.0, 0.0, 1.0, (800.0, 500.0))
"""Something at S/N 70, 1.5 half-light radii from its centre."""


def test_what_stands_out_of_a_galaxy_is_a_clump_of_it():
    fitted = fit(noisy(draw([GALAXY, KNOT])), [(31, 31)])
    assert len(fitted.significance) == 0
    assert len(fitted.sources.kinds) == 1
    assert fitted.clumps.owners.tolist() == [0]
    np.testing.assert_allclose(fitted.clumps.centers, [KNOT[:2]], rtol=0, atol=0.2)
    np.testing.assert_allclose(fitted.clumps.fluxes[0], KNOT[-1], rtol=0.2)
    # Both together, within three of the errors.
    assert (abs(fitted.flux[0] - np.add(GALAXY[-1], KNOT[-1])) < 3 * fitted.flux_err[0]).all()


def test_clumps_have_stamps_of_their_own_that_hold_their_light():
    fitted = fit(noisy(draw([GALAXY, KNOT])), [(31, 31)])
    side, (top, left) = SIDES[fitted.clumps.stamps[0, 0]], fitted.clumps.stamps[0, 1:3]
    assert side < SIDES[fitted.sources.stamps[0, 0]]
    assert abs(top + side / 2 - KNOT[0]) < 2
    assert abs(left + side / 2 - KNOT[1]) < 2


@pytest.mark.parametrize(
    "changes", [{"clump_radius": 1.0}, {"clump_share": 0.05}], ids=["far out", "too bright for a part"]
)
def test_what_is_no_clump_is_a_candidate(changes):
    fitted = fit(noisy(draw([GALAXY, KNOT])), [(31, 31)], replace(DEFAULT, **changes))
    assert len(fitted.clumps.owners) == 0
    assert len(fitted.significance) == 1


def test_a_clump_belongs_to_the_galaxy_that_it_is_deepest_in():
    other = (31.0, 50.0, 4.0, 0.0, 0.0, 1.0, (1e4, 1.4e4))
    engine = engine_of(draw([GALAXY, other], (64, 80)), [GALAXY[:2], other[:2]])
    engine.sources.shapes[:, 2] = np.log(4.0)
    engine.snr[:] = 400.0
    found = np.array([(31.0, 38.0), (31.0, 43.0), (31.0, 79.0), (31.0, 38.0)])
    assert _hosts(found, np.array([50.0, 50.0, 50.0, 200.0]), engine).tolist() == [0, 1, -1, -1]
    engine.sources.kinds[0] = POINT
    assert _hosts(found[:1], np.array([50.0]), engine).tolist() == [1]


def test_the_error_of_a_galaxy_with_clumps_is_that_of_the_sum():
    found = []
    for seed in range(100):
        fitted = fit(noisy(draw([GALAXY, KNOT]), seed), [(31, 31)])
        found.append((fitted.flux[0] - np.add(GALAXY[-1], KNOT[-1])) / fitted.flux_err[0])
    # Of 200 fluxes the width is known to 7 %.
    assert 0.8 < width(np.concatenate(found)) < 1.2


@pytest.mark.parametrize("together", [True, False])
def test_joined_variances_are_those_of_sums(together):
    engine = engine_of(draw([GALAXY, KNOT, PAIR[1]]), [GALAXY[:2], KNOT[:2], PAIR[1][:2]])
    engine.owners[1] = 0
    engine.members, engine.offsets = np.arange(3), np.array([0, 3] if together else [0, 1, 3])
    engine.settled = np.zeros(len(engine.offsets) - 1, dtype=bool)
    rng = np.random.default_rng(0)
    flux, cross = engine.variances.flux, engine.variances.cross
    covariance = np.zeros((3, 3, 2))
    for group in np.split(engine.members, engine.offsets[1:-1]):
        root = rng.normal(size=(2, len(group), len(group)))
        covariance[np.ix_(group, group)] = (root @ root.transpose(0, 2, 1)).transpose(1, 2, 0)
        cross[group, : len(group)] = covariance[np.ix_(group, group)]
    flux[:] = np.einsum("ssb->sb", covariance)
    engine.join_clumps()
    sums = np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    expected = np.einsum("ik,klb,jl->ijb", sums, covariance, sums)
    np.testing.assert_allclose(flux[[0, 2]], [expected[0, 0], expected[1, 1]])
    if together:
        np.testing.assert_allclose(cross[np.ix_([0, 2], [0, 2])], expected)
        assert (cross[1] == 0).all()


def test_neighbours_of_irregular_galaxies_trust_them_less():
    images = noisy(draw([GALAXY, KNOT, (26.0, 27.0, 0.0, 0.0, 0.0, 1.0, (900.0, 1200.0))]))
    engine = engine_of(images, [GALAXY[:2], (8, 54)])
    engine.sweep(20, update=True)
    engine.heed_structure()
    model = np.zeros_like(engine.residual)
    draw_sources(model, engine.table, BANK.modes, SIDES, engine.sources, np.array([0]), 1.0)
    eta2 = structure(engine.residual, engine.weights, model, (31, 31), BANK.width)
    variance = 2 * np.pi * eta2 * (BANK.sigmas**2)[:, None, None] * model**2
    # Single precision.
    np.testing.assert_allclose(engine.soft_weights, 1 / (1 + variance), rtol=1e-3)
    assert engine.soft_weights.min() < 0.5


@pytest.mark.parametrize("sources", [[GALAXY], PAIR, []], ids=["bright", "pair", "nothing"])
def test_smooth_galaxies_are_trusted(sources):
    images = draw(sources) if sources else np.zeros((2, 64, 64))
    engine = engine_of(noisy(images), [(31, 31), (34, 36)])
    engine.sweep(20, update=True)
    engine.heed_structure()
    assert engine.soft_weights.min() > 0.9


# ---------------------------------------------------------------- crowded fields


@pytest.fixture(scope="module")
def crowd():
    return simulated(5, n_sources=60, shape=(72, 72), kind="crowded", magnitudes=(21.0, 26.0))


def test_crowding_follows_from_pixels_per_source(crowd):
    weights, n, fewest, areas = ones(crowd.images), len(crowd.peaks), 30, 5.0
    assert _is_crowded(weights, crowd.bank, n, fewest, areas)
    assert not _is_crowded(weights, crowd.bank, fewest - 1, fewest, areas)
    assert not _is_crowded(np.ones((2, 400, 400)), crowd.bank, n, fewest, areas)
    masked = np.ones((2, 400, 400))
    masked[:, 72:] = 0
    masked[:, :, 72:] = 0
    assert _is_crowded(masked, crowd.bank, n, fewest, areas)


def test_stars_of_a_crowded_field_are_those_of_the_fit_of_points(crowd):
    fitted = fit(crowd.images, crowd.peaks, bank=crowd.bank)
    points = fit_points(crowd.images, ones(crowd.images), crowd.psfs, crowd.peaks)
    same = fitted.sources.kinds[: len(crowd.peaks)] == POINT
    assert same.mean() > 0.9
    far = np.hypot(*(crowd.peaks[:, None] - crowd.peaks[~same]).transpose(2, 0, 1)).min(axis=1, initial=99) > 13
    np.testing.assert_allclose(total(fitted)[same & far], points.flux[same & far], rtol=1e-5)


def test_a_crowded_field_is_recovered(crowd):
    fitted = fit(crowd.images, crowd.peaks, bank=crowd.bank)
    # As for the fit of points: one but for pairs within a pixel.
    assert width((total(fitted) - crowd.truth) / fitted.flux_err) < 1.4


# ---------------------------------------------------------------- modes and wings of PSFs


@pytest.mark.parametrize("side", [24, 32])
def test_modes_are_those_of_the_wrapped_psf(side):
    bank = ModeBank(PSFS)
    k = SIDES.tolist().index(side)
    modes = bank.require(np.array([[k, 0, 0, 2]]))
    expected = np.array([np.fft.rfft2(wrapped(psf, side)) for psf in PSFS])
    kept = np.arange(side // 2 + 1) < modes.lengths[:, None]
    psf = modes.psf.reshape(2, 2, -1)
    np.testing.assert_allclose(psf[:, 0] + 1j * psf[:, 1], expected[:, kept], rtol=0, atol=1e-6)
    # No mode that is left out is strong, but those at the Nyquist frequency.
    out = ~kept
    out[side // 2], out[:, side // 2] = False, False
    assert (abs(expected[:, out]) <= THRESHOLDS[2] + 1e-6).all()


def test_modes_that_are_there_are_not_made_again():
    bank = ModeBank(PSFS)
    first = bank.require(np.array([[0, 0, 0, 0]]))
    assert bank.require(np.array([[0, 9, 9, 0]])) is first
    more = bank.require(np.array([[1, 0, 0, 0]]))
    np.testing.assert_array_equal(more.psf[: len(first.psf)], first.psf)


def moffat(side, beta, core=2.5):
    offsets = np.arange(side) - side // 2
    return (1 + (offsets[:, None] ** 2 + offsets**2) / core**2) ** -beta


@pytest.mark.parametrize("beta", [1.5, 2.0, 3.0])
def test_a_power_law_is_continued(beta):
    wide = moffat(121, beta)
    stamp = wide[40:-40, 40:-40][None]
    result = continued(stamp / stamp.sum())[0]
    assert result.sum() == pytest.approx(1.0, abs=1e-12)
    outside = np.ones_like(wide, dtype=bool)
    outside[40:-40, 40:-40] = False
    # The slope of a Moffat profile still steepens a little beyond the stamp.
    np.testing.assert_allclose(result[outside], (wide / wide.sum())[outside], rtol=0.25)
    np.testing.assert_allclose(result[~outside], (wide / wide.sum())[~outside], rtol=0.03)


def test_a_stamp_with_all_its_light_is_only_padded():
    result = continued(PSFS)
    np.testing.assert_array_equal(result[:, 40:81, 40:81][:, 20, 20] > 0, True)
    inside = np.zeros(result.shape[1:], dtype=bool)
    middle = result.shape[1] // 2
    inside[middle - 20 : middle + 21, middle - 20 : middle + 21] = True
    assert not result[:, ~inside].any()
    np.testing.assert_array_equal(result[:, inside].reshape(PSFS.shape), PSFS)


@pytest.mark.parametrize("side", [1, 3, 5])
def test_tiny_stamps_stay_finite_and_sum_to_one(side):
    stamp = moffat(side, 3.0)[None]
    result = continued(stamp / stamp.sum())
    assert np.isfinite(result).all()
    assert result.sum() == pytest.approx(1.0, abs=1e-12)


def test_negative_wings_are_only_padded():
    stamp = moffat(21, 3.0) - 0.01
    stamp /= stamp.sum()
    result = continued(stamp[None])[0]
    middle = result.shape[0] // 2
    np.testing.assert_array_equal(result[middle - 10 : middle + 11, middle - 10 : middle + 11], stamp)
    assert result.sum() == pytest.approx(stamp.sum())


def test_what_becomes_smaller_is_not_brighter_in_the_middle():
    image = np.zeros((2, 48, 48), dtype=np.float32)
    engine = engine_of(image, np.array([[24.0, 24.0]]), DEFAULT)
    sources = engine.sources
    # Much flux in a source that is far larger than its signal-to-noise permits, as one that fed on a neighbour.
    sources.shapes[0, 2] = np.log(60.0)
    sources.fluxes[0, 0] = 3e3
    engine.place()
    engine.draw(np.arange(1), -1.0)
    before = abs(engine.residual[:, 24, 24])
    engine.update()
    assert np.exp(sources.shapes[0, 2]) < 20
    assert (abs(engine.residual[:, 24, 24]) <= before).all()
