"""Forced photometry: are light curves true, and what does a source cost?

* Pairs of ``kermes.simulation``, the fainter one at a blendedness of 0.2 to 0.4, are deblended on a coadd; then visits
  with three times its noise, in which that one varies between nothing and twice its flux: median and robust width of
  (flux - truth) / error, of both. The models are those of the coadd, with their errors.
* Milliseconds per source and band in a field of some 500 sources, one thread.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
from machine import parser, print_header, print_verdict, write

import kermes
from kermes.simulation import render_truth, simulate_scene

BLENDEDNESS = (0.2, 0.4)


def robust(values: Any) -> tuple[float, float]:
    """Median and robust width."""
    values = np.asarray(values)
    middle = float(np.median(values))
    return middle, float(1.4826 * np.median(np.abs(values - middle)))


def pulls(n_pairs: int, n_visits: int) -> dict[str, Any]:
    """Pulls of variable stars and of their neighbours."""
    star_pulls, galaxy_pulls, seed = [], [], 0
    rng = np.random.default_rng(4)
    while len(star_pulls) < n_pairs * n_visits:
        seed += 1
        scene = simulate_scene(kind="pair", n_sources=2, shape=(90, 90), seed=seed, bands=("r",), star_fraction=0.5)
        if len(scene.peaks) != 2:
            continue
        result = kermes.deblend(scene.coadd, peaks=scene.peaks)
        blendedness = np.asarray(result.objects["r_observed_blendedness"])
        variable = int(np.argmin(np.asarray(result.objects["r_flux"])))
        if not BLENDEDNESS[0] < blendedness[variable] < BLENDEDNESS[1]:
            continue
        rows = [int(np.flatnonzero(scene.truth["peak_index"] == k)[0]) for k in range(2)]
        true = np.asarray(scene.truth["r_flux"], dtype=float)[rows]
        clean = []
        for row in rows:
            light, box = render_truth(scene, row)
            plane = np.zeros(scene.coadd.shape)
            common = box & scene.coadd.box
            plane[common.within(scene.coadd.box)] = light[0][common.within(box)]
            clean.append(plane)
        noise = 3 * np.sqrt(float(np.median(scene.coadd.variance)))
        for _ in range(n_visits):
            factor = rng.uniform(0.0, 2.0)
            image = clean[1 - variable] + factor * clean[variable] + rng.normal(0, noise, clean[0].shape)
            visit = replace(scene.coadd, images=image[None].astype(np.float32), variance=noise**2)
            table = kermes.forced_photometry(result, visit)
            expected = true.copy()
            expected[variable] *= factor
            z = (np.asarray(table["r_flux"]) - expected) / np.asarray(table["r_flux_err"])
            star_pulls.append(z[variable])
            galaxy_pulls.append(z[1 - variable])
    return {"pairs": n_pairs, "visits": n_visits, "variable": robust(star_pulls), "neighbour": robust(galaxy_pulls)}


def cost(n_sources: int, repeat: int) -> dict[str, float]:
    """Milliseconds per source and band."""
    side = int(np.sqrt(n_sources * 600))
    scene = simulate_scene(n_sources=n_sources, shape=(side, side), seed=n_sources)
    result = kermes.deblend(scene.coadd, peaks=scene.peaks)
    seconds = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        table = kermes.forced_photometry(result, scene.coadd)
        seconds.append(time.perf_counter() - start)
    assert len(table) == len(result)
    assert np.isfinite(table["r_flux"]).all()
    per_unit = 1e3 / (len(result) * len(scene.coadd.bands))
    return {"sources": len(result), "ms": float(np.median(seconds[1:])) * per_unit}


def main() -> None:
    """Measure and print."""
    args = parser(__doc__).parse_args()
    print_header("forced photometry")
    found = pulls(4, 10) if args.quick else pulls(40, 50)
    for name in ("variable", "neighbour"):
        median, width = found[name]
        print(
            f"pulls of the {name}, {found['pairs']} pairs x {found['visits']} visits: {median:+.2f}, width {width:.2f}"
        )
    field = cost(100 if args.quick else 500, 3)
    print("field of {sources}: {ms:.3f} ms per source and band".format(**field))
    print_verdict("cost", field["ms"], 1.0, unit=" ms")
    write(args.json, {"pulls": found, "field": field})


if __name__ == "__main__":
    main()
