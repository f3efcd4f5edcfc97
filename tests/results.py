"""A small result made by hand: known models, whatever the fit does."""

import numpy as np
from astropy import units
from astropy.wcs import WCS

import kermes
from kermes import catalog
from kermes.geometry import Box
from kermes.psf import model_psf
from kermes.scene import FactorizedComponent, Source

SHAPE = (60, 70)
ORIGIN = (100, -20)
BANDS = ("g", "r")


def blob(y, x, sigma, spectrum, side=15):
    """A round Gaussian component, peak one, centred on a pixel."""
    offsets = np.arange(side) - side // 2
    profile = np.exp(-0.5 * (offsets / sigma) ** 2)
    return FactorizedComponent(
        spectrum=np.array(spectrum, dtype=np.float32),
        morphology=np.outer(profile, profile).astype(np.float32),
        box=Box(y - side // 2, x - side // 2, side, side),
    )


def sources():
    """Four sources by object_id: a pair with two components in one, one at the edge, one without light."""
    pair = blob(30, 30, 2.0, [40, 60]), blob(30, 30, 1.0, [80, 70], side=9)
    return {
        4: Source(peak=(30, 30), components=pair),
        7: Source(peak=(31, 36), components=(blob(31, 36, 1.5, [20, 50]),)),
        8: Source(peak=(2, 66), components=(blob(2, 66, 1.5, [30, 10]),)),
        9: Source(peak=(50, 10), components=()),
    }


def sky():
    """A tangent plane of 0.2 arcsec per pixel."""
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval = [150.1, 2.2]
    wcs.wcs.crpix = [35.5, 30.5]
    wcs.wcs.cdelt = [-0.2 / 3600, 0.2 / 3600]
    wcs.wcs.set()
    return wcs


def psfs():
    """Two round Gaussian PSFs."""
    return np.stack([model_psf(1.8, 21), model_psf(1.6, 21)])


def make_coadd(seed=1):
    """Noise of one around zero, with one NaN pixel in the pair."""
    images = np.random.default_rng(seed).normal(size=(len(BANDS), *SHAPE)).astype(np.float32)
    images[0, 31, 35] = np.nan
    return kermes.Coadd(
        images=images,
        variance=1,
        psfs=psfs(),
        bands=BANDS,
        origin=ORIGIN,
        wcs=sky(),
        unit=units.nJy,
        zero_point=31.4,
    )


def _table(definitions, n_rows, **given):
    columns = {item.name: np.zeros(n_rows, dtype=item.dtype) for item in definitions}
    return columns | given


def make_result(with_coadd=True, **changes):
    """Result of the four sources; the last one is a blend of its own."""
    models = sources()
    ids = list(models)
    coadd = make_coadd()
    objects = _table(
        catalog.object_columns(BANDS),
        4,
        object_id=ids,
        blend_id=[1, 1, 2, 2],
        y=[source.peak[0] + ORIGIN[0] + 0.25 for source in models.values()],
        x=[source.peak[1] + ORIGIN[1] - 0.25 for source in models.values()],
        ra=[150.1, 150.2, np.nan, 0.1],
        g_flux=[source.flux(2)[0] for source in models.values()],
        outcome=["full", "single", "template", "peak"],
        reason=["", "budget", "", "no_data"],
        flag_null_model=[False, False, False, True],
        converged=[True, True, False, False],
    )
    settings = {
        "objects": catalog.make_objects(objects, BANDS, units.nJy),
        "parents": catalog.make_parents(_table(catalog.PARENT_COLUMNS, 1)),
        "blends": catalog.make_blends(_table(catalog.BLEND_COLUMNS, 2, blend_id=[1, 2])),
        "bands": BANDS,
        "config": kermes.Config(),
        "models": models,
        "psfs": dict.fromkeys([1, 2], coadd.psfs),
        "shape": SHAPE,
        "origin": ORIGIN,
        "unit": units.nJy,
        "zero_point": 31.4,
        "wcs": coadd.wcs,
        "coadd": coadd if with_coadd else None,
        "timings": {"fit": 0.5},
    }
    return kermes.Result(**(settings | changes))
