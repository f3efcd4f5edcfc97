"""The one place that says how kernels are compiled.

What costs compile time: assigning one array to a slice of another (numba compiles the text of an error with it), so
kernels copy in loops.
"""

from numba import njit

kernel = njit(nogil=True, cache=True, error_model="numpy")
"""Compile a kernel: no GIL, cached on disk, division as in numpy."""

fast_kernel = njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})
"""The same for plain sums and products, which may be reordered so that they vectorise; NaN stays NaN."""
