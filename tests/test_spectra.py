"""The linear problem of the fluxes: set up as the dense one, solved as by others, errors included."""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import nnls

import reference
from blends import KERNELS, gaussian, observe, source, three_sources
from kermes.geometry import Box
from kermes.initialization import with_solved_spectra
from kermes.kernels.spectra import (
    marginal_variance,
    normal_equations,
    overlapping_pairs,
    solve_non_negative,
    solve_spectra,
    source_matrix,
)
from kermes.rendering import KernelSet, pack, render_packed
from kermes.scene import Scene

SHAPE = (14, 11)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Components of random pixels in random boxes, an image and its weights."""

    boxes: np.ndarray
    offsets: np.ndarray
    pixels: np.ndarray
    image: np.ndarray
    weights: np.ndarray

    def planes(self):
        """Components on the whole image, shape (K, H, W)."""
        return np.array(
            [
                reference.whole(box, self.pixels[start:end].reshape(box[2:]), SHAPE)
                for box, start, end in zip(self.boxes, self.offsets[:-1], self.offsets[1:], strict=True)
            ]
        ).reshape(-1, *SHAPE)

    def equations(self):
        """Sparse structure (starts, columns), values and right side."""
        starts, columns, mirror = overlapping_pairs(self.boxes)
        values, right = normal_equations(
            self.pixels, self.boxes, self.offsets, starts, columns, mirror, self.image, self.weights
        )
        return starts, columns, values, right


def random_problem(seed, n):
    rng = np.random.default_rng(seed)
    sides = np.stack([rng.integers(2, side + 1, n) for side in SHAPE], axis=1)
    boxes = np.concatenate([rng.integers(0, np.array(SHAPE) - sides + 1), sides], axis=1)
    offsets = np.concatenate([[0], np.cumsum(boxes[:, 2] * boxes[:, 3])])
    return Problem(
        boxes=boxes,
        offsets=offsets,
        pixels=rng.uniform(size=offsets[-1]).astype(np.float32),
        image=rng.normal(1, 2, size=SHAPE).astype(np.float32),
        weights=(rng.uniform(0.5, 2, size=SHAPE) * (rng.uniform(size=SHAPE) > 0.1)).astype(np.float32),
    )


problems = st.builds(random_problem, seed=st.integers(0, 999), n=st.integers(1, 6))


def dense(starts, columns, values):
    """Matrix from its rows."""
    n = len(starts) - 1
    matrix = np.zeros((n, n))
    for i in range(n):
        matrix[i, columns[starts[i] : starts[i + 1]]] = values[starts[i] : starts[i + 1]]
    return matrix


# ---------------------------------------------------------------- equations


@pytest.mark.nojit
@given(problems)
def test_pairs_are_the_components_whose_boxes_overlap(problem):
    starts, columns, _ = overlapping_pairs(problem.boxes)
    boxes = [Box(*box) for box in problem.boxes.tolist()]
    for i, box in enumerate(boxes):
        partners = columns[starts[i] : starts[i + 1]]
        assert partners[0] == i
        assert sorted(partners) == [j for j, other in enumerate(boxes) if not (box & other).is_empty]


@pytest.mark.nojit
def test_many_partners_are_all_listed():
    starts, columns, _ = overlapping_pairs(np.tile(np.array([[0, 0, 3, 3]]), (20, 1)))
    assert (np.diff(starts) == 20).all()
    assert sorted(columns) == sorted(20 * list(range(20)))


@pytest.mark.nojit
@given(problems)
def test_normal_equations_agree_with_the_dense_ones(problem):
    starts, columns, values, right = problem.equations()
    matrix, expected = reference.normal_equations(problem.planes(), problem.image, problem.weights)
    # Rows of up to 11 pixels are summed in float32; the image reaches 9 and the weights 2.
    np.testing.assert_allclose(dense(starts, columns, values), matrix, rtol=1e-5)
    np.testing.assert_allclose(right, expected, rtol=0, atol=1e-5 * matrix.max() * 9)


# ---------------------------------------------------------------- solution


@pytest.mark.nojit
@given(problems)
def test_solution_is_that_of_another_solver(problem):
    starts, columns, values, right = problem.equations()
    solution = np.zeros(len(right))
    solve_non_negative(starts, columns, values, right, solution, 10_000, 1e-12)
    matrix = dense(starts, columns, values)
    usable = matrix.diagonal() > 0
    root = np.linalg.cholesky(matrix[np.ix_(usable, usable)])
    expected = np.zeros(len(right))
    expected[usable] = nnls(root.T, np.linalg.solve(root, right[usable]))[0]
    np.testing.assert_allclose(solution, expected, rtol=0, atol=1e-8)


@pytest.mark.nojit
def test_solver_stops_after_the_sweeps_it_was_given():
    starts, columns = np.array([0, 2, 4]), np.array([0, 1, 1, 0])
    values, right = np.array([1, 0.999, 1, 0.999]), np.array([1.0, 2.0])
    assert solve_non_negative(starts, columns, values, right, np.zeros(2), 3, 1e-12) == 3


@pytest.mark.nojit
def test_component_without_pixels_gets_no_flux():
    starts, columns = np.array([0, 1, 2]), np.array([0, 1])
    solution = np.array([5.0, 5.0])
    solve_non_negative(starts, columns, np.array([0.0, 2.0]), np.array([0.0, 3.0]), solution, 10, 1e-6)
    np.testing.assert_array_equal(solution, [0, 1.5])


def test_spectra_of_a_scene_without_noise_are_recovered():
    packed, blend = observe(three_sources())
    rendered = render_packed(packed, KernelSet(KERNELS), blend.images.shape[1:])
    spectra = np.zeros_like(packed.spectra)
    solve_spectra(rendered.pixels, rendered.boxes, rendered.offsets, blend.images, blend.weights, spectra, 10_000, 1e-6)
    # Rounding of float32; the two components of the first source differ little, which makes more of it.
    np.testing.assert_allclose(spectra, packed.spectra, rtol=1e-5)


def test_true_spectra_stay_as_they_are():
    packed, blend = observe(three_sources())
    solved = with_solved_spectra(packed, blend, KernelSet(KERNELS))
    # The noise is one: kernels may be cut where that stays below a tenth of it.
    np.testing.assert_allclose(solved.spectra, packed.spectra, rtol=0, atol=0.1)


def test_two_equal_components_share_the_flux_of_one():
    shape = (25, 25)
    one = gaussian(12, 12, 1.5, [50, 60, 70], shape)
    _, blend = observe(Scene(sources=(source(one),), box=Box.of_shape(shape)))
    twice = pack(Scene(sources=(source(one), source(one)), box=Box.of_shape(shape)), 3)
    blend = replace(blend, peaks=np.repeat(blend.peaks, 2, axis=0))
    solved = with_solved_spectra(replace(twice, spectra=np.ones_like(twice.spectra)), blend, KernelSet(KERNELS))
    # The error of a flux is about 1 / sqrt(sum(C^2)) = 0.4, and the solution is good to a thousandth of it.
    np.testing.assert_allclose(solved.spectra.sum(axis=0), [50, 60, 70], rtol=0, atol=4e-3)


def test_masked_pixels_have_no_influence():
    packed, blend = observe(three_sources(), seed=1)
    rng = np.random.default_rng(2)
    masked = rng.uniform(size=blend.images.shape) < 0.2
    weights = np.where(masked, 0, blend.weights).astype(np.float32)
    images = np.where(masked, 1e4, blend.images).astype(np.float32)
    expected = with_solved_spectra(packed, replace(blend, weights=weights), KernelSet(KERNELS))
    got = with_solved_spectra(packed, replace(blend, weights=weights, images=images), KernelSet(KERNELS))
    np.testing.assert_array_equal(got.spectra, expected.spectra)


def test_a_band_without_weights_gets_no_flux_and_leaves_the_others_alone():
    packed, blend = observe(three_sources(), seed=1)
    weights = blend.weights.copy()
    weights[1] = 0
    expected = with_solved_spectra(packed, blend, KernelSet(KERNELS)).spectra
    got = with_solved_spectra(packed, replace(blend, weights=weights), KernelSet(KERNELS)).spectra
    np.testing.assert_array_equal(got, expected * [1, 0, 1])


# ---------------------------------------------------------------- errors


def marginal(starts, columns, values, max_neighbours):
    """Variance, strongest correlation and with which component that is, by the kernel."""
    strongest, neighbor = np.empty(len(starts) - 1), np.empty(len(starts) - 1, dtype=np.int64)
    variance = marginal_variance(starts, columns, values, max_neighbours, strongest, neighbor)
    return variance, strongest, neighbor


@pytest.mark.nojit
@given(problems)
def test_marginal_variance_is_the_corner_of_the_inverse_with_all_partners_free(problem):
    starts, columns, values, _ = problem.equations()
    matrix = dense(starts, columns, values)
    matrix += 1e-6 * np.diag(matrix.diagonal())  # the same prior
    expected = np.full(len(matrix), np.inf)
    for i in np.flatnonzero(matrix.diagonal() > 0):
        others = [j for j in columns[starts[i] + 1 : starts[i + 1]] if matrix[j, j] > 0]
        free = [i, *others]
        expected[i] = np.linalg.inv(matrix[np.ix_(free, free)])[0, 0]
    found, strongest, neighbor = marginal(starts, columns, values, len(matrix))
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    if len(columns) == len(matrix) ** 2 and np.isfinite(expected).all():
        inverse = np.linalg.inv(matrix)
        scale = np.sqrt(np.outer(inverse.diagonal(), inverse.diagonal()))
        correlation = np.where(np.eye(len(matrix), dtype=bool), 0.0, inverse / scale)
        rows = np.arange(len(matrix))
        np.testing.assert_allclose(abs(strongest), abs(correlation).max(axis=1), rtol=1e-6, atol=1e-9)
        with_one = neighbor >= 0
        np.testing.assert_allclose(strongest[with_one], correlation[rows, neighbor][with_one], rtol=1e-6, atol=1e-9)


@pytest.mark.nojit
def test_equal_components_have_a_large_but_finite_variance():
    starts, columns = np.array([0, 2, 4]), np.array([0, 1, 1, 0])
    variance, strongest, neighbor = marginal(starts, columns, np.full(4, 2.0), 1)
    np.testing.assert_allclose(strongest, -1, atol=1e-5)
    np.testing.assert_array_equal(neighbor, [1, 0])
    # With the prior, the inverse of [[1 + e, 1], [1, 1 + e]] has 1 / (2 e) on its diagonal.
    np.testing.assert_allclose(variance, 0.5 / 2e-6, rtol=1e-3)


@pytest.mark.nojit
@given(problems)
def test_more_free_neighbours_never_make_an_error_smaller(problem):
    starts, columns, values, _ = problem.equations()
    diagonal = values[starts[:-1]]
    alone = np.divide(1, diagonal, out=np.full(len(diagonal), np.inf), where=diagonal > 0)
    variances = [alone / (1 + 1e-6), *(marginal(starts, columns, values, m)[0] for m in range(7))]
    for fewer, more in pairwise(variances):
        assert (more >= fewer * (1 - 1e-12)).all()


@pytest.mark.nojit
@given(problems, st.data())
def test_matrix_of_sources_is_that_of_their_components_contracted(problem, data):
    starts, columns, values, _ = problem.equations()
    n = len(starts) - 1
    n_sources = data.draw(st.integers(1, n + 1))
    sources = np.sort(data.draw(st.lists(st.integers(0, n_sources - 1), min_size=n, max_size=n)))
    mixture = np.linspace(0.5, 2, n)
    together = source_matrix(starts, columns, values, np.array(sources), n_sources, mixture)
    transform = np.zeros((n, n_sources))
    transform[np.arange(n), sources] = mixture
    expected = transform.T @ dense(starts, columns, values) @ transform
    np.testing.assert_allclose(dense(*together), expected, rtol=1e-12)
