"""A small result made by hand: known models, whatever the fit does."""

import numpy as np
from astropy import units
from astropy.wcs import WCS

import kermes
from kermes import catalog
from kermes.geometry import Box
from kermes.psf import model_psf
from kermes.rendering import render_source
from kermes.scene import FactorizedComponent, ProfileComponent, Source

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


def profile(y, x, spectrum, **shape):
    """A profile, or a point source, on a stamp of 32 pixels."""
    return ProfileComponent(
        spectrum=np.array(spectrum, dtype=np.float32),
        center=np.array([y, x]),
        sigma=0.8,
        box=Box(round(y) - 16, round(x) - 16, 32, 32),
        **({"shear": np.zeros(2)} | shape),
    )


def fitted_sources():
    """The four sources as profiles: a double with a free form on top, a point source, a galaxy at the edge, none."""
    shape = {"shear": np.array([0.3, -0.1 / 3])}
    double = profile(30.1, 29.7, [400, -60], radius=2.1, **shape), profile(30.1, 29.7, [40, 90], index=np.e, **shape)
    return {
        4: Source(peak=(30, 30), components=(*double, blob(30, 30, 1.0, [8, 7], side=9))),
        7: Source(peak=(31, 36), components=(profile(31.2, 35.9, [200, 300]),)),
        8: Source(peak=(2, 66), components=(profile(2.3, 66.4, [300, 500], radius=3.0),)),
        9: Source(peak=(50, 10), components=()),
    }


def candidate_sources():
    """Two point sources that nobody listed, beside the first and the second blend's sources, by minus their number."""
    return {
        -1: Source(peak=(31, 22), components=(profile(31.4, 22.2, [55.5, 40]),)),
        -2: Source(peak=(10, 13), components=(profile(9.9, 12.5, [-3.1, 70]),)),
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
        center_y=[source.peak[0] + ORIGIN[0] + 0.25 for source in models.values()],
        center_x=[source.peak[1] + ORIGIN[1] - 0.25 for source in models.values()],
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
        "blends": catalog.make_blends(
            # The first holds the pair, the second reaches from one corner to the other.
            _table(
                catalog.BLEND_COLUMNS,
                2,
                blend_id=[1, 2],
                y0=[120, 100],
                x0=[0, -20],
                height=[25, 60],
                width=[30, 70],
            )
        ),
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


def fitted_result(with_coadd=True, **changes):
    """Result of the four sources as profiles, and of two candidates."""
    candidates = _table(
        catalog.candidate_columns(BANDS),
        2,
        candidate_id=[1, 2],
        blend_id=[1, 2],
        y=[131.4, 109.9],
        x=[2.2, -7.5],
        g_flux=[55.5, -3.1],
        significance=[9.1, 6.6],
        origin=["image", "residual"],
    )
    settings = {
        "models": fitted_sources() | candidate_sources(),
        "candidates": catalog.make_candidates(candidates, BANDS, units.nJy),
    }
    return make_result(with_coadd, **(settings | changes))


def light_of_candidates(result):
    """Models of the candidates as observed, shape (A, B, H, W)."""
    images = np.zeros((len(result.candidates), len(result.bands), *result.shape), dtype=np.float32)
    for image, row in zip(images, result.candidates, strict=True):
        blend_id = int(row["blend_id"])
        kernels = result.kernels(result.psfs[blend_id])
        pixels, box = render_source(
            result.models[-int(row["candidate_id"])], kernels, result.outer_box_of_blend(blend_id)
        )
        image[:, box.y, box.x] = pixels
    return images
