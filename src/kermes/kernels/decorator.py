"""The one place that says how kernels are compiled.

What costs compile time, roughly in milliseconds: a function 40, and its code once more in each kernel that calls it,
directly or not; a loop, a slice or a call 10 each, an assignment to a whole plane 20, unpacking a row of an array 20;
the first np.empty of each number of dimensions and dtype 40, the first np.zeros 120; assigning one array to a slice of
another more than all of these (numba compiles the text of an error with it), so kernels copy in loops.
"""

from typing import Any

from numba import njit

# No GIL, cached on disk, division as in numpy, and no way in for C: only Python and other kernels call kernels.
_OPTIONS: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy", "no_cfunc_wrapper": True}
_COUNTED, _NOT_COUNTED = {**_OPTIONS, "_nrt": True}, {**_OPTIONS, "_nrt": False}
_REORDERED: dict[str, Any] = {"fastmath": {"reassoc", "contract", "nsz"}}

kernel = njit(**_NOT_COUNTED)
"""Compile a kernel that makes no arrays and returns none.

Numba counts no references in it. Where it does, each slice costs two atomic operations: in loops over short rows that
was a tenth of the time, and threads that share an array wait for each other.
"""

allocating_kernel = njit(**_COUNTED)
"""Compile a kernel that makes arrays or returns one, or a part of one; loops over short rows are better a `kernel`."""

fast_kernel = njit(**_NOT_COUNTED, **_REORDERED)
"""The same as `kernel` for plain sums and products, which may be reordered so that they vectorise; NaN stays NaN.

For sums over an array. What is worked out element by element vectorises without it, and must not have it: a copy of the
kernel in another one may be rounded otherwise, and which copy runs depends on whether the cache had it.
"""

fast_allocating_kernel = njit(**_COUNTED, **_REORDERED)
"""The same for one that makes arrays."""

inlined_kernel = njit(**_OPTIONS, inline="always")
"""A part of a kernel with a name of its own: it is compiled where it is called, as if it stood there.

Pays for parts that one kernel calls; it does not where the kernel that calls them is long already.
"""
