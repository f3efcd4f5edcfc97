"""Small simulated coadds, changed and deblended."""

from functools import cache
from threading import Event

import numpy as np
import pytest

from kermes import modelling
from kermes.coadd import Coadd
from kermes.config import Config
from kermes.simulation import simulate_scene

SCENE_MODELS = ("kermes", "scarlet-lite")
MODELS = (*SCENE_MODELS, "templates")


@cache
def configuration(model):
    """Make the settings of a model, the others at their defaults."""
    return Config(model=model)


for_scene_models = pytest.mark.parametrize("config", SCENE_MODELS, indirect=True, scope="module")
"""Templates are no fit: leave them out."""


@cache
def scene(**options):
    """Simulate a scene once; three bands unless said otherwise."""
    return simulate_scene(**{"bands": ("g", "r", "i"), **options})


def small_scene():
    """Six sources in three blends on 70 x 66 pixels, signal-to-noise 5 to 74."""
    return scene(n_sources=6, shape=(70, 66), seed=0)


def group_scene():
    """Twelve sources in four or five blends, as the model has it, that reach into each other."""
    return scene(n_sources=12, shape=(130, 120), seed=0)


def fit_the_first_last():
    """Make something in the place of `tile.fit_blend` that ends the first blend of a plan when all others are done."""
    others_done, n_done = Event(), 0

    def fit_blend(plan, task, earlier):
        nonlocal n_done
        if task is plan.tasks[0]:
            assert others_done.wait(60), "the other blends are not fitted while the first one is"
        outcome = modelling.fit_blend(plan, task, earlier)
        n_done += 1
        if n_done == plan.n_blends - 1:
            others_done.set()
        return outcome

    return fit_blend


def changed(coadd: Coadd, **changes) -> Coadd:
    """Make the coadd again, with other arrays; no sky."""
    plain = {name: getattr(coadd, name) for name in ("images", "variance", "psfs", "bands", "unit")}
    return Coadd(**(plain | changes))


def values(result, name="flux"):
    """Columns of all bands, shape (N, B), as plain numbers."""
    return (
        np.array([result.objects[f"{band}_{name}"] for band in result.bands], dtype=float)
        .reshape(len(result.bands), -1)
        .T
    )


def shares(result):
    """Sum over all objects of the redistributed stamps, shape (B, H, W), in double precision."""
    total = np.zeros((len(result.bands), *result.shape))
    for handle in result:
        for b, band in enumerate(result.bands):
            stamp = handle.redistributed(band)
            total[(b, *stamp.box.within(result.coadd.box))] += stamp.array
    return total


def same_pixels(result, other):
    """Whether all models and tables but the timings have the same bits."""
    for name in ("objects", "parents", "blends", "candidates"):
        table, twin = getattr(result, name), getattr(other, name)
        if any(np.asarray(table[c]).tobytes() != np.asarray(twin[c]).tobytes() for c in table.colnames):
            return False
    if set(result.models) != set(other.models):
        return False
    n_bands = len(result.bands)
    pairs = [(source, other.models[model_id]) for model_id, source in result.models.items()]
    return all(
        one.box == two.box and one.model(n_bands).tobytes() == two.model(n_bands).tobytes() for one, two in pairs
    )
