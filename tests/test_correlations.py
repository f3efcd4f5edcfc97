"""Correlations of fluxes: condition numbers against eigenvalues from LAPACK. Groups are tested with the fits."""

from __future__ import annotations

import numpy as np
import pytest

from kermes.kernels.correlations import condition_number

pytestmark = pytest.mark.nojit


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("seed", range(4))
def test_the_condition_number_is_that_of_the_eigenvalues(n, seed):
    # Fewer degrees of freedom than twice the size: some pairs are nearly degenerate.
    points = np.random.default_rng(seed).normal(size=(n, n + 1))
    matrix = np.corrcoef(points).reshape(n, n)
    values = np.linalg.eigvalsh(matrix)
    assert condition_number(matrix.copy()) == pytest.approx(values[-1] / values[0], rel=1e-8)


def test_two_fluxes_that_are_one_are_singular():
    assert condition_number(np.ones((2, 2))) == np.inf
    assert condition_number(np.array([[1.0, -0.8], [-0.8, 1.0]])) == pytest.approx(9.0)
    assert condition_number(np.array([[1.0, 1.2], [1.2, 1.0]])) == np.inf


def test_what_is_not_a_number_is_singular():
    assert condition_number(np.array([[1.0, np.nan], [np.nan, 1.0]])) == np.inf
