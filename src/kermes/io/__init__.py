"""Reading coadds and models, and writing them: one file per format."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kermes.coadd import Coadd
from kermes.errors import FileError, InputError
from kermes.geometry import Box
from kermes.io.fits import as_box, read_fits
from kermes.io.manifest import read_manifest
from kermes.io.npz import read_npz, write_npz
from kermes.io.scarlet_results import read_scarlet, write_scarlet

__all__ = ["read", "read_fits", "read_manifest", "read_npz", "read_scarlet", "write_npz", "write_scarlet"]

_FITS_NAME = re.compile(r"\.(fits?|fts)(\.(fz|gz))?(\[.*)?$", re.IGNORECASE)


def read(
    source: Path | str | Sequence[Path | str] | Mapping[str, Path | str],
    *,
    box: Box | tuple[int, int, int, int] | None = None,
    **options: Any,
) -> Coadd:
    """Read a coadd from files.

    Parameters
    ----------
    source : path, sequence of paths, or mapping of band to file
        An ``.npz`` archive (see `read_npz`), a ``.toml`` manifest (see `read_manifest`), one image ``file.fits[HDU]``
        for each band (see `read_fits`), or FITS files that name their bands, which are coadds of lsst.images.
    box : Box, or (y0, x0, height, width), optional
        Pixels to read, in the coordinates of the coadd, cut at the edge of the image; None: all.
    **options
        Of the reader of that form: for an archive ``bands``, ``unit``, ...; for FITS also ``variance`` or ``invvar``,
        ``mask`` and ``psf``.

    Returns
    -------
    coadd : Coadd

    Raises
    ------
    FileError
        If a file is missing or damaged.
    InputError
        If `source` has none of these forms, an option is unknown, the content cannot be used, or `box` has no pixel of
        the image.

    Examples
    --------
    >>> coadd = read("scene.npz", unit="nJy")  # doctest: +SKIP
    >>> coadd = read({"g": "g.fits[1]"}, invvar={"g": "g.fits[2]"}, psf={"g": "psf.fits"})  # doctest: +SKIP
    >>> coadd = read(["deep_coadd_g.fits", "deep_coadd_r.fits"], box=(9000, 4000, 500, 500))  # doctest: +SKIP
    """
    reader, form = _reader_of(source)
    known = [name for name in list(inspect.signature(reader).parameters)[1:] if name != "box"]
    unknown = [option for option in options if option not in known]
    if unknown:
        choices = ", ".join(known) or "none"
        raise InputError(f"options must be those of {form}: {choices}; got {unknown[0]!r}")
    if box is None:
        return reader(source, **options)
    if reader is read_npz:
        return read_npz(source, **options).cutout(as_box(box))  # type: ignore[arg-type]
    return reader(source, box=box, **options)


def _reader_of(source: Any) -> tuple[Callable[..., Coadd], str]:
    """Choose the reader by the form of the source."""
    if isinstance(source, Mapping | list | tuple):
        return read_fits, "FITS files"
    if not isinstance(source, str | Path):
        raise InputError(f"source must be a path, or a mapping of band to file; got {type(source).__name__}")
    suffix = Path(source).suffix
    if suffix == ".npz":
        return read_npz, "an .npz archive"
    if suffix == ".toml":
        return read_manifest, "a manifest"
    if _FITS_NAME.search(str(source)):
        return read_fits, "FITS files"
    if not Path(source).exists():
        raise FileError(f"source must be a readable .npz or .toml file, got {source}: No such file or directory")
    raise InputError(
        f"source must be an .npz archive, a .toml manifest, or a mapping of band to FITS file; got {source}"
    )
