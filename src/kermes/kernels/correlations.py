"""How the fluxes of sources that were fitted together hang together."""

import numpy as np

from kermes.kernels.decorator import allocating_kernel, kernel

MOST_TURNS = 30
"""Of Jacobi rotations; a handful is enough for the small matrices here."""


@kernel
def rotate(a, p, q):
    """Make element p, q of a symmetric matrix zero by a rotation, in place."""
    theta = (a[q, q] - a[p, p]) / (2.0 * a[p, q])
    t = (1.0 if theta >= 0.0 else -1.0) / (abs(theta) + np.sqrt(theta * theta + 1.0))
    cosine = 1.0 / np.sqrt(t * t + 1.0)
    sine = t * cosine
    for k in range(len(a)):
        one, other = a[k, p], a[k, q]
        a[k, p], a[k, q] = cosine * one - sine * other, sine * one + cosine * other
    for k in range(len(a)):
        one, other = a[p, k], a[q, k]
        a[p, k], a[q, k] = cosine * one - sine * other, sine * one + cosine * other


@kernel
def condition_number(a):
    """Largest over smallest eigenvalue of correlations (n, n), which are lost; infinite unless all are positive.

    Cyclic Jacobi rotations (Golub & Van Loan, Matrix Computations, section 8.5).
    """
    n = len(a)
    for _ in range(MOST_TURNS):
        rest = 0.0
        for p in range(n):
            for q in range(p):
                rest += a[p, q] * a[p, q]
        if rest < 1e-24:
            break
        for p in range(n):
            for q in range(p):
                if a[p, q] != 0.0:
                    rotate(a, p, q)
    least, most = np.inf, -np.inf
    for k in range(n):
        if not a[k, k] > 0.0:
            return np.inf
        least, most = min(least, a[k, k]), max(most, a[k, k])
    return most / least


@allocating_kernel
def correlate_groups(variances, members, offsets, strongest, neighbor, condition):
    """Find how the fluxes of the sources of each group hang together.

    variances: see `kernels.normal_equations.Variances`; members (S,), offsets (G + 1,): group g has members[offsets[g]:
    offsets[g + 1]]. strongest, neighbor (S, B) take the correlation of each flux with that of the member where it is
    largest, and the number of that one; -1 where there is none. condition (S,) takes the condition number of the
    correlations of the group in the worst band. NaN where a variance is not known.
    """
    n_bands = strongest.shape[1]
    for g in range(len(offsets) - 1):
        own = members[offsets[g] : offsets[g + 1]]
        n = len(own)
        matrix = np.empty((n, n))
        worst = 1.0
        for b in range(n_bands):
            for i in range(n):
                strongest[own[i], b], neighbor[own[i], b] = 0.0, -1
                for j in range(n):
                    scale = np.sqrt(variances.cross[own[i], i, b]) * np.sqrt(variances.cross[own[j], j, b])
                    known = i != j and scale > 0.0
                    matrix[i, j] = variances.cross[own[i], j, b] / scale if known else np.float64(i == j)
                    if i != j and abs(matrix[i, j]) > abs(strongest[own[i], b]):
                        strongest[own[i], b], neighbor[own[i], b] = matrix[i, j], own[j]
            worst = max(worst, condition_number(matrix))
        for s in own:
            condition[s] = np.nan
            for b in range(n_bands):
                if np.isnan(variances.flux[s, b]):
                    strongest[s, b] = np.nan
                else:
                    condition[s] = worst
