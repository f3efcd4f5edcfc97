"""Detection: what is found and what is made up, by both methods, and whether the threshold means what it says.

* Completeness (of the sources that no brighter one is within two pixels of) and purity, by signal-to-noise in all bands
  together, on simulated fields and crowded fields in six bands. A peak belongs to the nearest source within 2.5 pixels.
* Peaks in pure noise, and what `detection.false_peak_density` predicts.
* Time per megapixel.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from machine import parser, print_header, write
from scipy.spatial import cKDTree

import kermes
from kermes.config import DetectionConfig
from kermes.detection import detect, false_peak_density
from kermes.simulation import Kind, MoffatPsf, simulate_scene

METHODS = ("psf", "wavelet")
CUTS = ((5, 7), (7, 10), (10, 20), (20, 100), (100, np.inf))
MATCH_PIX = 2.5
CLOSE_PIX = 2.0


def found_and_made_up(kind: Kind, method: str, n_scenes: int) -> dict[str, Any]:
    """Completeness by signal-to-noise, and the share of peaks that belong to a source."""
    counts = np.zeros((len(CUTS), 2), dtype=int)
    n_peaks = n_true = 0
    shape = (240, 240) if kind == "crowded" else (320, 320)
    for seed in range(n_scenes):
        scene = simulate_scene(kind=kind, seed=5000 + seed, shape=shape, n_sources=400 if kind == "crowded" else 160)
        peaks = detect(scene.coadd, DetectionConfig(method=method)).peaks
        positions = np.stack([scene.truth["y"], scene.truth["x"]], axis=1)
        snr = np.asarray(scene.truth["snr"])
        near = cKDTree(positions).query_ball_point(positions, CLOSE_PIX)
        distinct = np.array([snr[rows].max() <= snr[k] for k, rows in enumerate(near)])
        distance, _ = cKDTree(peaks).query(positions)
        for cut, (low, high) in zip(counts, CUTS, strict=True):
            wanted = distinct & (snr >= low) & (snr < high)
            cut += wanted.sum(), (wanted & (distance < MATCH_PIX)).sum()
        # Sources of three sigma are there, too, if not to be found for sure.
        distance, _ = cKDTree(positions[snr > 3]).query(peaks)
        n_peaks, n_true = n_peaks + len(peaks), n_true + int((distance < MATCH_PIX).sum())
    return {
        "kind": kind,
        "method": method,
        "sources": counts[:, 0].tolist(),
        "complete": (counts[:, 1] / np.maximum(counts[:, 0], 1)).tolist(),
        "peaks": n_peaks,
        "pure": n_true / n_peaks,
    }


def noise_peaks(n_bands: int, sigma: float, method: str, side: int) -> dict[str, Any]:
    """Peaks in pure noise, expected and found."""
    psf = MoffatPsf(fwhm_pix=4.0, beta=3.5).stamp()
    noise = np.random.default_rng(int(10 * sigma) + n_bands).normal(size=(n_bands, side, side)).astype(np.float32)
    coadd = kermes.Coadd(images=noise, variance=1.0, psfs=[psf] * n_bands, bands=[f"b{b}" for b in range(n_bands)])
    config = DetectionConfig(
        method=method, threshold=sigma, peak_threshold=sigma, min_area=1, min_separation=0.0, grow=0
    )
    start = time.perf_counter()
    found = len(detect(coadd, config).peaks)
    seconds = time.perf_counter() - start
    expected = false_peak_density([psf] * n_bands, sigma, method) * side**2
    return {
        "bands": n_bands,
        "sigma": sigma,
        "method": method,
        "found": found,
        "expected": expected,
        "s_per_mpix": seconds / side**2 * 1e6,
    }


def main() -> None:
    """Measure and print."""
    args = parser(__doc__).parse_args()
    print_header("detection")
    fields, noise = [], []
    cuts = "".join(f"{f'{low}-{high:g}':>12s}" for low, high in CUTS)
    print(f"{'complete, S/N':24s}{cuts}   pure")
    for kind, n_scenes in (("field", 20), ("crowded", 6)):
        for method in METHODS:
            row = found_and_made_up(kind, method, 2 if args.quick else n_scenes)
            fields.append(row)
            values = "".join(f"{c:7.1%} {n:4d}" for c, n in zip(row["complete"], row["sources"], strict=True))
            print(f"{kind + ', ' + method:24s}{values}   {row['pure']:.2%} of {row['peaks']}")
    side = 800 if args.quick else 2400
    for method in METHODS:
        for n_bands in (1, 6):
            for sigma in (3.5, 4.0, 4.5, 5.0):
                row = noise_peaks(n_bands, sigma, method, side)
                noise.append(row)
                print(
                    "noise, {method}, {bands} band(s), {sigma} sigma: {found} peaks, {expected:.1f} expected; "
                    "{s_per_mpix:.2f} s per megapixel".format(**row)
                )
    write(args.json, {"fields": fields, "noise": noise})


if __name__ == "__main__":
    main()
