"""Planes of large images in a file that is gone with the program, so that memory holds what is looked at."""

from __future__ import annotations

import mmap
import tempfile
from copy import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kermes.coadd import Coadd
from kermes.errors import FileError

LARGE = 2**28
"""Bytes of all planes of a coadd from which on they are worth a file."""

_PLANES = ("images", "variance", "valid", "mask")


class Pages:
    """Planes of a coadd, in memory if they are small, else mapped from a temporary file.

    Parameters
    ----------
    coadd : Coadd
        Is not changed; who lets go of it frees its memory.
    large : int, optional
        Bytes of all planes from which on they go to a file.

    Raises
    ------
    FileError
        If the file cannot be written.
    """

    def __init__(self, coadd: Coadd, large: int = LARGE) -> None:
        self._maps: list[mmap.mmap] = []
        planes = {name: plane for name in _PLANES if (plane := getattr(coadd, name)) is not None}
        self.coadd = coadd
        """The same coadd."""
        if sum(plane.nbytes for plane in planes.values()) < large:
            return
        self.coadd = copy(coadd)
        for name, plane in planes.items():
            object.__setattr__(self.coadd, name, self._mapped(plane))

    def _mapped(self, plane: NDArray[Any]) -> NDArray[Any]:
        try:
            with tempfile.TemporaryFile() as file:
                np.ascontiguousarray(plane).tofile(file)
                file.flush()
                # A private copy, which is never made: kernels are compiled for arrays that can be written to.
                pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            folder = tempfile.gettempdir()
            raise FileError(f"images cannot be put into a file in {folder}: {error.strerror or error}") from None
        self._maps.append(pages)
        return np.frombuffer(pages, dtype=plane.dtype).reshape(plane.shape)

    def release(self) -> None:
        """Let go of the memory of all pages; they are read again where they are looked at."""
        if hasattr(mmap, "MADV_DONTNEED"):  # not on every system
            for pages in self._maps:
                pages.madvise(mmap.MADV_DONTNEED)
