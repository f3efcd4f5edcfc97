"""World coordinates as text."""

from __future__ import annotations

import warnings
from typing import Any

from astropy.io import fits
from astropy.wcs import WCS, FITSFixedWarning


def header_of_wcs(wcs: Any) -> str | None:
    """Write a WCS as a FITS header; None if there is none, or it is of a kind that FITS does not know."""
    return wcs.to_header_string(relax=True) if isinstance(wcs, WCS) else None


def wcs_of_header(header: str | None) -> WCS | None:
    """Read what `header_of_wcs` wrote."""
    if header is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FITSFixedWarning)
        return WCS(fits.Header.fromstring(header))
