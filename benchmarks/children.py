"""Children that one source explains: how often they are noticed, and how often real neighbours are taken for such.

Galaxies with a second peak on them that nothing is at, and pairs of a galaxy and a fainter neighbour, at the same
distances, in six bands of white noise. Of the first, one object of the two should have `flag_shredded`; of the second,
none.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from machine import parser, print_header, write
from numpy.typing import NDArray

import kermes
from kermes.geometry import Box
from kermes.psf import continued
from kermes.rendering import KernelSet, render_scene
from kermes.scene import ProfileComponent, Scene, Source
from kermes.simulation import simulate_scene

SHAPE, MIDDLE = (80, 80), 40.0
COLORS = np.array([0.3, 0.7, 1.0, 1.2, 1.3, 1.3])


def component(
    center: NDArray[np.float64], radius: float, shear: NDArray[np.float64], flux: NDArray[np.float64]
) -> ProfileComponent:
    """One exponential galaxy on a stamp of 64 pixels."""
    corner = np.rint(center).astype(int) - 32
    return ProfileComponent(
        spectrum=flux.astype(np.float32),
        center=center,
        radius=radius,
        shear=np.clip(shear, -1.0, 1.0),
        sigma=0.8,
        box=Box(int(corner[0]), int(corner[1]), 64, 64),
    )


def draw(rng: np.random.Generator, kernels: KernelSet, real: bool) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Images of a galaxy and, if `real`, of a neighbour, without noise; and two peaks."""
    snr, radius, distance = 10 ** rng.uniform(1.3, 2.7), rng.uniform(1, 4), rng.uniform(2, 6)
    center = MIDDLE + rng.normal(0, 0.3, 2)
    turn = rng.uniform(0, 2 * np.pi)
    other = center + distance * np.array([np.sin(turn), np.cos(turn)])
    # Of a source that is as wide as PSF and galaxy together, with pixels of unit noise.
    flux = snr * np.sqrt(16 * np.pi + 6 * np.pi * radius**2) * COLORS / np.linalg.norm(COLORS)
    components = [component(center, radius, rng.normal(0, 0.3, 2), flux)]
    if real:
        color = np.exp(rng.normal(0, 0.3) * np.linspace(-1, 1, len(COLORS)))
        fainter = rng.uniform(0.1, 1) * flux * color
        components.append(component(other, rng.uniform(0.3, 2), rng.normal(0, 0.3, 2), fainter))
    sources = tuple(Source(peak=(40, 40), components=(one,)) for one in components)
    models = render_scene(Scene(sources=sources, box=Box.of_shape(SHAPE)), kernels)
    image = np.zeros((len(COLORS), *SHAPE), dtype=np.float32)
    for s, row in enumerate(models.boxes.tolist()):
        box = Box(*row)
        pixels = models.pixels[:, models.offsets[s] : models.offsets[s + 1]].reshape(-1, *box.shape)
        image[:, box.y, box.x] += pixels
    return image, np.rint([center, other]).astype(np.int64)


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--n", type=int, default=300, help="how many of each")
    args = options.parse_args()
    n = 20 if args.quick else args.n
    print_header("children")
    template = simulate_scene(n_sources=1, shape=SHAPE, seed=1).coadd
    psfs = template.psf_at(y=MIDDLE, x=MIDDLE)
    kernels = KernelSet(psfs, continued(psfs))  # the first, for free shapes, are not used
    figures: dict[str, Any] = {}
    for name, real in (("one galaxy, two peaks", False), ("pairs", True)):
        rng = np.random.default_rng(7)
        found = []
        for _ in range(n):
            image, peaks = draw(rng, kernels, real)
            images = image + rng.normal(size=image.shape).astype(np.float32)
            coadd = kermes.Coadd(images=images, variance=1.0, psfs=psfs, bands=template.bands)
            objects = kermes.deblend(coadd, peaks, workers=1).objects
            if len(objects) != 2:
                sys.exit(f"two peaks gave {len(objects)} rows")
            found.append(np.asarray(objects["flag_shredded"]))
        flagged = np.array(found)
        figures[name] = {"any": float(flagged.any(axis=1).mean()), "both": float(flagged.all(axis=1).mean())}
        print(f"{name}: {n}; flagged, one {figures[name]['any']:.3f}, both {figures[name]['both']:.3f}")
    write(args.json, figures)


if __name__ == "__main__":
    main()
