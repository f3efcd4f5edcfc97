"""Simulated scenes with known truth, as many as are wanted, written as the scorer of the arena reads them.

    python benchmarks/fresh_scenes.py FOLDER                       # ten times what is stored
    python benchmarks/fresh_scenes.py FOLDER --pair 100 --field 0  # other numbers
    python SHARED/arena/arena.py --folder FOLDER --kinds field,knots,pair,bright,crowded

Differences that drown in the noise of the stored scenes show on these. They come from kermes.simulation, which shares
no code with the models that are fitted nor with the stored scenes: other PSFs, colours, shapes and depths, so that
figures can be compared between runs on the same files, not with the stored ones of the peer. Alike, roughly, are the
sides of the images, the number of sources, their signal-to-noise and blendedness, and the share of stars.

Scene n of every kind is drawn from the seed FIRST + n: the same number gives the same file, whatever else is asked for.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from kermes.simulation import Kind, SimulatedScene, compute_oracle_sigma, render_truth, simulate_scene

NUMBERS: dict[Kind, int] = {"field": 80, "knots": 80, "pair": 400, "bright": 60, "crowded": 20}
MIN_SNR = 7.0
MIN_SEPARATION = 2.0
"""A source nearer than this [pixels] to a brighter one is in the images but in no list, as if it were not detected."""

LEAST_INSIDE = 0.99
"""Total fluxes are only asked for where this share falls on the image."""


def draw(kind: Kind, seed: int) -> SimulatedScene:
    """Draw one scene."""
    rng = np.random.default_rng([seed, 1])  # not the numbers that the scene is drawn with
    # The faintest sources fall below the list; they are in the images all the same.
    options: dict[str, Any] = {}
    if kind in ("field", "knots"):
        brightest = 19.0 if kind == "field" else 20.5  # irregular galaxies are not giants
        options = {"n_sources": int(rng.integers(28, 46)), "magnitudes": (brightest, 27.5), "star_fraction": 0.1}
    elif kind == "pair":
        brightest = rng.uniform(20.8, 23.6)
        options = {"magnitudes": (brightest, brightest + 2.8), "star_fraction": 0.0}
    elif kind == "bright":
        options = {"n_sources": int(rng.integers(32, 56)), "magnitudes": (19.5, 27.5), "star_fraction": 0.0}
    else:
        options = {"n_sources": int(rng.integers(400, 440)), "magnitudes": (17.5, 26.0)}
    return simulate_scene(kind=kind, seed=seed, min_snr=MIN_SNR, min_separation_pix=MIN_SEPARATION, **options)


def arrays_of(scene: SimulatedScene) -> dict[str, Any]:
    """Make the arrays that the scorer reads. Flux and oracle are NaN where too little of a source is on the image."""
    coadd = scene.coadd
    rows = np.flatnonzero(np.asarray(scene.truth["peak_index"]) >= 0)
    listed = scene.truth[rows]
    inside = np.empty((len(rows), len(coadd.bands)))
    for n, k in enumerate(rows):
        image, box = render_truth(scene, int(k))
        seen = image[(slice(None), *coadd.box.within(box))]
        inside[n] = seen.sum(axis=(1, 2), dtype=float) / image.sum(axis=(1, 2), dtype=float)
    scored = inside >= LEAST_INSIDE
    flux = np.array([np.asarray(listed[f"{band}_flux"], dtype=float) for band in coadd.bands]).T
    return {
        "images": coadd.images.astype(np.float32),
        "variance": np.ascontiguousarray(coadd.variance, dtype=np.float32),
        "psfs": np.asarray(coadd.psfs, dtype=np.float32),
        "bands": np.array(coadd.bands),
        "peaks": scene.peaks,
        "flux": np.where(scored, flux, np.nan),
        "oracle_sigma": np.where(scored, compute_oracle_sigma(scene), np.nan),
        "snr": np.asarray(listed["snr"], dtype=float),
        "blendedness": np.asarray(listed["blendedness"], dtype=float),
        "is_star": np.asarray(listed["is_star"], dtype=bool),
        "position": np.stack([listed["y"], listed["x"]], axis=1).astype(float),
    }


def main() -> None:
    """Draw and write."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path, help="where to write KIND_NUMBER.npz; made if missing")
    options.add_argument("--seed", type=int, default=1000, help="of the first scene of each kind")
    for kind, number in NUMBERS.items():
        options.add_argument(f"--{kind}", type=int, default=number, help=f"number of scenes; {number} if left out")
    args = options.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for kind in NUMBERS:
        n_sources = 0
        for number in range(getattr(args, kind)):
            arrays = arrays_of(draw(kind, args.seed + number))
            n_sources += len(arrays["peaks"])
            np.savez_compressed(args.folder / f"{kind}_{number:04d}.npz", **arrays)
        print(f"{kind}: {getattr(args, kind)} scenes, {n_sources} sources")


if __name__ == "__main__":
    main()
