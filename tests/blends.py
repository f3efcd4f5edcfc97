"""Small blends with known content: round Gaussians, packed and as observed."""

import numpy as np

from kermes.coadd import Blend
from kermes.geometry import Box
from kermes.psf import difference_kernels, model_psf
from kermes.rendering import Convolution, Packed, pack
from kermes.scene import FactorizedComponent, Scene, Source

TARGET = model_psf(0.8)
PSFS = np.stack([model_psf(1.8, 21), model_psf(1.5, 21), model_psf(2.1, 21)])
KERNELS = difference_kernels(PSFS, TARGET)


def gaussian(y, x, sigma, spectrum, shape, reach=8):
    """Make a round Gaussian component, peak one, on the pixels of the image within `reach` of its centre."""
    box = Box.from_bounds(y - reach, y + reach + 1, x - reach, x + reach + 1) & Box.of_shape(shape)
    rows, columns = np.mgrid[box.y, box.x]
    morphology = np.exp(-0.5 * ((rows - y) ** 2 + (columns - x) ** 2) / sigma**2)
    return FactorizedComponent(
        spectrum=np.array(spectrum, dtype=np.float32), morphology=morphology.astype(np.float32), box=box
    )


def source(*components):
    """Make a source with its peak at the brightest pixel of its first component."""
    first = components[0]
    y, x = np.unravel_index(first.morphology.argmax(), first.morphology.shape)
    return Source(peak=(int(y) + first.box.y0, int(x) + first.box.x0), components=components)


def three_sources(shape=(32, 27)):
    """Make a scene of three bands: two sources that overlap, the first of two components, and one apart."""
    return Scene(
        sources=(
            source(gaussian(12, 10, 2.0, [60, 90, 120], shape), gaussian(12, 10, 0.9, [90, 80, 60], shape, reach=5)),
            source(gaussian(15, 15, 1.5, [80, 50, 30], shape)),
            source(gaussian(25, 21, 1.0, [40, 40, 40], shape, reach=6)),
        ),
        box=Box.of_shape(shape),
    )


def convolution_of(blend: Blend, kernels=KERNELS):
    """From the model frame to the pixels of a blend."""
    return Convolution.of(kernels, blend.box.shape)


def observed(packed: Packed, shape, kernels=KERNELS):
    """Image (B, H, W) of packed components, without noise."""
    n_bands = len(kernels)
    model = np.zeros((n_bands, *shape))
    for k, (y0, x0, height, width) in enumerate(packed.boxes):
        morphology = packed.morphologies[packed.offsets[k] : packed.offsets[k + 1]].reshape(height, width)
        model[:, y0 : y0 + height, x0 : x0 + width] += packed.spectra[k][:, None, None] * morphology
    return Convolution.of(kernels, shape).forward(model)


def blend_of(images, peaks, sigma=1.0, psfs=PSFS):
    """Make a blend of images (B, H, W) with the same noise in all pixels of a band."""
    images = np.asarray(images, dtype=np.float32)
    noise = np.broadcast_to(np.asarray(sigma, dtype=np.float32), (len(images),)).copy()
    weights = np.broadcast_to((1 / noise**2)[:, None, None], images.shape).copy()
    return Blend(
        images=images,
        weights=weights,
        noise_rms=noise,
        psfs=psfs,
        box=Box.of_shape(images.shape),
        peaks=np.asarray(peaks, dtype=np.int64).reshape(-1, 2),
    )


def observe(scene: Scene, sigma=1.0, seed=None):
    """Pack a scene of three bands and make the blend that shows it; with a seed, add noise."""
    packed = pack(scene, len(PSFS))
    images = observed(packed, scene.box.shape)
    blend = blend_of(images, [s.peak for s in scene.sources], sigma)
    if seed is None:
        return packed, blend
    noise = np.random.default_rng(seed).normal(size=images.shape) * blend.noise_rms[:, None, None]
    return packed, blend_of(images + noise, blend.peaks, sigma)
