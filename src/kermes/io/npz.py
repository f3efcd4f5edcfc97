"""Scenes in NumPy archives: ours, the tutorials' HSC blend, HSC blends with injected fakes."""

from __future__ import annotations

import json
import logging
import os
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS, WcsError
from numpy.typing import ArrayLike, NDArray

from kermes.coadd import BAD_PLANES, Coadd, normalize_peaks
from kermes.errors import FileError, InputError

logger = logging.getLogger(__name__)

KEYS = (
    "images",
    "variance",
    "psfs",
    "bands",
    "mask",
    "mask_planes",
    "bad_planes",
    "wcs",
    "origin",
    "unit",
    "zero_point",
    "noise_factors",
    "peaks",
    "footprints",
)
"""What an archive of ours may hold of a coadd; every other key is truth or somebody else's, and is not read."""

OTHER_NAMES = {"filters": "bands", "centers": "peaks", "catalog": "peaks", "footprint": "footprints"}
"""Keys of other people's archives, and what they are here."""

_DAMAGE = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    EOFError,
    SyntaxError,
    MemoryError,
    NotImplementedError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What NumPy raises on files that are not archives, are cut short, or hold Python objects."""


def read_npz(
    path: Path | str,
    *,
    bands: Sequence[str] | None = None,
    psfs: Any = None,
    mask_planes: Mapping[str, int] | None = None,
    bad_planes: Sequence[str] | None = None,
    wcs: Any = None,
    origin: tuple[int, int] | None = None,
    unit: Any = None,
    zero_point: float | None = None,
) -> Coadd:
    """Read a coadd from a NumPy archive.

    Parameters
    ----------
    path : path
        Archive with the arrays ``images`` (B, H, W), ``variance`` and ``psfs`` (B, P, Q), and optionally ``bands`` or
        ``filters``; ``mask`` with ``mask_planes`` (JSON object of names and bit numbers); ``bad_planes``; ``origin``
        (y, x); ``unit``; ``zero_point``; ``noise_factors`` (B,); ``wcs`` (FITS header); ``peaks`` or ``centers``
        (N, 2), (y, x), or ``catalog`` with fields x and y; ``footprints``, labels (H, W); or ``footprint`` (H, W),
        boolean, **True outside** the parent as in the HSC blends with injected fakes.
    bands, psfs, mask_planes, bad_planes, wcs, origin, unit, zero_point : optional
        As in `Coadd`; they win over the file. Without names of bands the bands are called b0, b1, ...

    Returns
    -------
    coadd : Coadd
        With the peaks and footprints of the file attached. A mask without names of its planes is not used.

    Raises
    ------
    FileError
        If the file is missing, damaged, or holds Python objects.
    InputError
        If an array is missing or does not fit.
    """
    path = Path(path)
    content = _load(path)
    given = {
        "bands": bands,
        "psfs": psfs,
        "mask_planes": mask_planes,
        "bad_planes": bad_planes,
        "wcs": wcs,
        "origin": origin,
        "unit": unit,
        "zero_point": zero_point,
    }
    try:
        arguments = {**_interpret(content, path), **{key: value for key, value in given.items() if value is not None}}
        missing = [key for key in ("images", "variance", "psfs") if key not in arguments]
        if missing:
            raise InputError(f"source must hold images, variance and psfs; {', '.join(missing)} missing")
        if "bands" not in arguments:
            shape = np.shape(arguments["images"])
            arguments["bands"] = tuple(f"b{b}" for b in range(shape[0] if len(shape) == 3 else 1))
            logger.info("%s: no names of bands; they are called %s", path.name, ", ".join(arguments["bands"]))
        if "mask" in arguments and "mask_planes" not in arguments and arguments["mask"].dtype != bool:
            arguments["mask_planes"] = {}
            logger.info("%s: mask is not used, because nothing names its planes", path.name)
        return Coadd(name=path.name, **arguments)
    except InputError as error:
        raise type(error)(f"{path}: {error}") from None


def _load(path: Path) -> dict[str, NDArray[Any]]:
    """Read the arrays with a known name."""
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files if key in KEYS or key in OTHER_NAMES}
    except OSError as error:
        raise FileError(f"source must be a readable .npz file, got {path}: {error.strerror or error}") from None
    except _DAMAGE as error:
        raise FileError(f"source must be an undamaged .npz archive of plain arrays, got {path}: {error}") from None


def _interpret(content: Mapping[str, NDArray[Any]], path: Path) -> dict[str, Any]:
    """Turn the arrays of an archive into arguments of Coadd."""
    arguments: dict[str, Any] = {}
    for key, array in content.items():
        name = OTHER_NAMES.get(key, key)
        if name != key and name in content:
            continue
        value: Any = array
        if key == "footprint":
            if array.dtype != bool:
                raise InputError(f"footprint must be boolean, True outside the parent, got dtype {array.dtype}")
            value = ~array
        elif name in ("bands", "bad_planes"):
            value = tuple(str(item) for item in np.atleast_1d(array))
        elif name == "unit":
            value = str(array)
        elif name == "wcs":
            value = _wcs_from_text(str(array))
        elif name == "mask_planes":
            value = _planes_from_text(str(array))
        arguments[name] = value
    logger.debug("%s: read %s", path.name, ", ".join(content))
    return arguments


def _planes_from_text(text: str) -> dict[str, int]:
    try:
        planes = json.loads(text)
    except json.JSONDecodeError:
        planes = None
    if not isinstance(planes, dict):
        raise InputError(f"mask_planes must be a JSON object of names and bit numbers, got {text!r:.80}")
    return planes


def _wcs_from_text(text: str) -> WCS:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on the style of the header
            return WCS(fits.Header.fromstring(text, sep="\n"), relax=True)
    except (ValueError, KeyError, WcsError, fits.VerifyError) as error:
        raise InputError(f"wcs must be a FITS header with a WCS: {error}") from None


def _wcs_to_text(wcs: WCS) -> str:
    """Write a WCS as a FITS header with all digits, one card a line."""
    header = wcs.to_header(relax=True)
    plain = wcs.wcs
    matrix, scale = plain.get_pc(), plain.get_cdelt()
    for i in range(2):
        header[f"CRPIX{i + 1}"], header[f"CRVAL{i + 1}"] = float(plain.crpix[i]), float(plain.crval[i])
        header[f"CDELT{i + 1}"] = float(scale[i])
        for j in range(2):
            header[f"PC{i + 1}_{j + 1}"] = float(matrix[i, j])
    text: str = header.tostring(sep="\n", padding=False)
    return text


def write_npz(path: Path | str, coadd: Coadd, peaks: Any = None, **truth: ArrayLike) -> None:
    """Write a coadd as a NumPy archive that `read_npz` gives back unchanged.

    The file appears under its name only when it is complete.

    Parameters
    ----------
    path : path
        File to write; ends in .npz. Replaced if it exists.
    coadd : Coadd
        Its PSF must be stamps, not a field.
    peaks : as for `normalize_peaks`, optional
        Peaks to store; None: those of the coadd.
    **truth : array_like
        Further arrays, stored under the names given.

    Raises
    ------
    InputError
        If the PSF is a field, or a name of `truth` is one of the coadd's.
    FileError
        If the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise InputError(f"path must end in .npz, got {path}")
    if callable(coadd.psfs):
        raise InputError("coadd must have PSF stamps to be written, got a PSF field")
    taken = sorted(set(truth) & {*KEYS, *OTHER_NAMES, "file", "allow_pickle"})
    if taken:
        raise InputError(f"truth must not use the names of the coadd's own arrays, got {', '.join(taken)}")
    arrays: dict[str, NDArray[Any]] = {
        "images": coadd.images,
        "variance": coadd.variance,
        "psfs": np.asarray(coadd.psfs),
        "bands": np.array(coadd.bands),
        "origin": np.array(coadd.origin),
    }
    if coadd.mask is not None:
        arrays["mask"] = coadd.mask
    if coadd.mask_planes is not None:
        arrays["mask_planes"] = np.array(json.dumps(dict(coadd.mask_planes)))
    if coadd.bad_planes != BAD_PLANES:
        arrays["bad_planes"] = np.array(coadd.bad_planes)
    if coadd.wcs is not None:
        arrays["wcs"] = np.array(_wcs_to_text(coadd.wcs))
    if coadd.unit is not None:
        arrays["unit"] = np.array(coadd.unit.to_string())
    if coadd.zero_point is not None:
        arrays["zero_point"] = np.array(coadd.zero_point)
    if coadd.noise_factors is not None:
        arrays["noise_factors"] = coadd.noise_factors
    if peaks is not None:
        arrays["peaks"] = normalize_peaks(peaks, coadd) + np.array(coadd.origin)
    elif coadd.peaks is not None:
        arrays["peaks"] = coadd.peaks
    if coadd.footprints is not None:
        arrays["footprints"] = coadd.footprints
    for name, values in truth.items():
        arrays[name] = np.asarray(values)
        if arrays[name].dtype.hasobject:
            raise InputError(f"truth must be plain arrays, got dtype {arrays[name].dtype} for {name}")
    _write_atomically(path, arrays)


def _write_atomically(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with open(temporary, "wb") as stream:
                np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise FileError(f"path must be a file that can be written, got {path}: {error.strerror}") from None
