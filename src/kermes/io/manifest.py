"""TOML manifests: which FITS file holds which plane of which band."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from kermes.coadd import BAD_PLANES, Coadd
from kermes.errors import FileError, InputError
from kermes.geometry import Box
from kermes.io.fits import read_fits


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Content of a manifest; each table maps the name of a band to ``file.fits[HDU]``."""

    image: dict[str, str]
    """Background-subtracted flux per pixel."""

    psf: dict[str, str] = field(default_factory=dict)
    """PSF stamps; left out: those of the images, which must be coadds of lsst.images."""

    variance: dict[str, str] = field(default_factory=dict)
    """Variance of the image."""

    invvar: dict[str, str] = field(default_factory=dict)
    """Inverse variance, for the bands without variance."""

    mask: dict[str, str] = field(default_factory=dict)
    """Mask, for all bands or none."""

    mask_planes: dict[str, int] | None = None
    """Bit number of each plane of the masks; left out: as the headers say."""

    bands: list[str] | None = None
    """Bands to read, in this order; left out: those of `image`."""

    bad_planes: list[str] = field(default_factory=lambda: list(BAD_PLANES))
    """Mask planes whose pixels are not used."""

    origin: tuple[int, int] | None = None
    """Coordinates (y, x) of the first pixel; left out: as the headers say."""

    unit: str | None = None
    """Unit of the images; left out: as the headers say."""

    zero_point: float | None = None
    """AB magnitude of a flux of 1 `unit`; left out: as the headers say."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}


def read_manifest(path: Path | str, *, box: Box | tuple[int, int, int, int] | None = None) -> Coadd:
    """Read a coadd from the FITS files that a TOML manifest names.

    Parameters
    ----------
    path : path
        File with the tables ``[image]``, ``[psf]``, ``[variance]`` or ``[invvar]``, and optionally ``[mask]`` and
        ``[mask_planes]``, and above them optionally ``bands``, ``bad_planes``, ``origin``, ``unit`` and
        ``zero_point``. Files are looked for beside the manifest.
    box : Box, or (y0, x0, height, width), optional
        Pixels to read, in the coadd's coordinates; None: all.

    Returns
    -------
    coadd : Coadd

    Raises
    ------
    FileError
        If the manifest or a file it names is missing or damaged.
    InputError
        If it is not TOML, naming every key that is unknown, missing or of a wrong type; and as `read_fits`.
    """
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"source must be a readable manifest, got {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"source must be a TOML manifest, got {path}: {error}") from None
    manifest = _manifest_from_dict(content, path)

    def beside(files: dict[str, str]) -> dict[str, str]:
        return {band: str(path.parent / file) for band, file in files.items()}

    try:
        return read_fits(
            images=beside(manifest.image),
            variance=beside(manifest.variance),
            invvar=beside(manifest.invvar),
            mask=beside(manifest.mask) if manifest.mask else None,
            psf=beside(manifest.psf) if manifest.psf else None,
            bands=manifest.bands,
            mask_planes=manifest.mask_planes,
            bad_planes=manifest.bad_planes,
            origin=manifest.origin,
            unit=manifest.unit,
            zero_point=manifest.zero_point,
            name=path.name,
            box=box,
        )
    except InputError as error:
        raise type(error)(f"{path}: {error}") from None


def _manifest_from_dict(content: dict[str, Any], path: Path) -> Manifest:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(Manifest).validate_python(content)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise InputError(f"source is not a valid manifest, got {path}: {problems}") from None
