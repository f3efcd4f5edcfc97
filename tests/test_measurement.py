"""Fluxes are those of the linear problem, and their errors are as large as the scatter of the fluxes."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage, signal

import kermes
import reference
from blends import KERNELS, TARGET, blend_of, gaussian, observe, observed, source, three_sources
from kermes.coadd import Coadd
from kermes.geometry import Box
from kermes.kernels import detection as kernels_detection
from kermes.measurement import heeded_factors, measure_fluxes, misfit_factors, noise_factors
from kermes.photometry import measure
from kermes.psf import difference_kernels, model_psf
from kermes.rendering import KernelSet, SourceModels, pack
from kermes.result import StampKind
from kermes.scene import FactorizedComponent, Scene, Source
from kermes.simulation import MoffatPsf, render_truth, simulate_scene
from tiles import changed


def neighbours():
    """Make a scene of three overlapping sources of one component each."""
    shape = (30, 34)
    return Scene(
        sources=(
            source(gaussian(14, 12, 2.0, [60, 90, 120], shape)),
            source(gaussian(15, 17, 1.5, [80, 50, 60], shape)),
            source(gaussian(18, 22, 1.0, [90, 70, 90], shape)),
        ),
        box=Box.of_shape(shape),
    )


def flux_of(scene):
    return np.array([s.flux(3) for s in scene.sources])


def test_fluxes_of_a_scene_without_noise_are_recovered():
    scene = three_sources()
    packed, blend = observe(scene)
    fluxes = measure_fluxes(replace(packed, spectra=np.ones_like(packed.spectra)), 3, blend, KernelSet(KERNELS))
    # Sweeps stop at steps of a hundredth of an error; what is left is a few such steps at most.
    assert (abs(fluxes.flux - flux_of(scene)) < 0.05 * fluxes.flux_err).all()


def test_fluxes_are_those_of_the_components_that_are_returned():
    packed, blend = observe(three_sources(), seed=1)
    fluxes = measure_fluxes(packed, 3, blend, KernelSet(KERNELS))
    total = np.zeros((3, 3))
    for k, s in enumerate(packed.sources):
        pixels = fluxes.packed.morphologies[packed.offsets[k] : packed.offsets[k + 1]]
        total[s] += fluxes.packed.spectra[k] * pixels.sum(dtype=float)
    np.testing.assert_allclose(fluxes.flux, total, rtol=1e-6)


def test_flux_errors_are_as_large_as_the_scatter_of_the_fluxes():
    scene, sigma, n = neighbours(), np.array([1.0, 2.0, 0.5]), 400
    packed, blend = observe(scene, sigma)
    rng = np.random.default_rng(1)
    pulls = np.empty((n, 3, 3))
    for i in range(n):
        noise = rng.normal(size=blend.images.shape) * sigma[:, None, None]
        fluxes = measure_fluxes(packed, 3, blend_of(blend.images + noise, blend.peaks, sigma), KernelSet(KERNELS))
        pulls[i] = (fluxes.flux - flux_of(scene)) / fluxes.flux_err
    # The scatter of a standard deviation from n numbers is 1 / sqrt(2 n) = 0.035; four times that, for nine of them.
    assert pulls.std(axis=0) == pytest.approx(np.ones((3, 3)), abs=4 * 0.035)
    assert pulls.mean(axis=0) == pytest.approx(np.zeros((3, 3)), abs=4 / np.sqrt(n))
    # The first and the last overlap with the one between them, and it more with the last.
    for b in range(3):
        expected = np.corrcoef(pulls[:, :, b], rowvar=False)
        np.testing.assert_array_equal(fluxes.neighbor[:, b], [1, 0, 1])
        np.testing.assert_allclose(fluxes.correlation[:, b], expected[range(3), [1, 0, 1]], atol=4 / np.sqrt(n))


def test_the_error_of_a_source_alone_is_that_of_its_matched_filter():
    scene = Scene(sources=neighbours().sources[:1], box=neighbours().box)
    packed, blend = observe(scene, sigma=2.0)
    fluxes = measure_fluxes(packed, 1, blend, KernelSet(KERNELS))
    profile = blend.images / flux_of(scene)[0][:, None, None]
    expected = 2.0 / np.sqrt((profile**2).sum(axis=(1, 2)))
    # The prior is a millionth; the rest is rounding of the image.
    assert fluxes.flux_err[0] == pytest.approx(expected, rel=1e-5)


def test_a_neighbour_makes_an_error_larger():
    scene = neighbours()
    packed, blend = observe(scene)
    alone = observe(Scene(sources=scene.sources[:1], box=scene.box))[0]
    crowded = measure_fluxes(packed, 3, blend, KernelSet(KERNELS)).flux_err[0]
    assert (crowded > measure_fluxes(alone, 1, blend, KernelSet(KERNELS)).flux_err[0]).all()


def test_scaling_image_and_noise_scales_fluxes_and_errors():
    packed, blend = observe(neighbours(), seed=2)
    scaled = replace(blend, images=8 * blend.images, weights=blend.weights / 64, noise_rms=8 * blend.noise_rms)
    here = measure_fluxes(packed, 3, blend, KernelSet(KERNELS))
    there = measure_fluxes(replace(packed, spectra=8 * packed.spectra), 3, scaled, KernelSet(KERNELS))
    # A power of two, so that nothing is rounded differently.
    np.testing.assert_allclose(there.flux, 8 * here.flux, rtol=1e-12)
    np.testing.assert_allclose(there.flux_err, 8 * here.flux_err, rtol=1e-12)


def test_a_band_without_weights_has_no_error_and_leaves_the_others_alone():
    packed, blend = observe(neighbours(), seed=3)
    weights = blend.weights.copy()
    weights[1] = 0
    expected = measure_fluxes(packed, 3, blend, KernelSet(KERNELS))
    fluxes = measure_fluxes(packed, 3, replace(blend, weights=weights), KernelSet(KERNELS))
    assert np.isnan(fluxes.flux_err[:, 1]).all()
    np.testing.assert_array_equal(fluxes.flux[:, [0, 2]], expected.flux[:, [0, 2]])
    np.testing.assert_array_equal(fluxes.flux_err[:, [0, 2]], expected.flux_err[:, [0, 2]])


def test_masked_pixels_make_an_error_larger():
    packed, blend = observe(neighbours(), seed=4)
    weights = blend.weights.copy()
    weights[:, 14:17, 10:13] = 0
    masked = measure_fluxes(packed, 3, replace(blend, weights=weights), KernelSet(KERNELS))
    assert (masked.flux_err[0] > measure_fluxes(packed, 3, blend, KernelSet(KERNELS)).flux_err[0]).all()


def test_a_neighbour_of_a_star_with_a_masked_core_keeps_its_flux():
    psfs = MoffatPsf(fwhm_pix=4.0, beta=2.5).stamp()[None]
    kernels = difference_kernels(psfs, TARGET)
    shape, fluxes = (51, 51), [1e5, 1e3]
    stars = [
        FactorizedComponent(
            spectrum=np.array([flux * TARGET.max()], np.float32),
            morphology=(TARGET / TARGET.max()).astype(np.float32),
            box=Box(18, x - 7, 15, 15),
        )
        for x, flux in zip((20, 33), fluxes, strict=True)
    ]
    packed = pack(Scene(sources=tuple(source(star) for star in stars), box=Box.of_shape(shape)), 1)
    blend = blend_of(observed(packed, shape, kernels), [(25, 20), (25, 33)], psfs=psfs)
    weights, images = blend.weights.copy(), blend.images.copy()
    weights[:, 23:28, 18:23] = images[:, 23:28, 18:23] = 0
    measured = measure_fluxes(packed, 2, replace(blend, weights=weights, images=images), KernelSet(kernels))
    assert (abs(measured.flux[:, 0] - fluxes) < measured.flux_err[:, 0]).all()


def test_a_source_without_components_has_no_flux_and_no_error():
    scene = neighbours()
    packed, blend = observe(scene, seed=5)
    dark = Scene(sources=(Source(peak=(3, 3), components=()), *scene.sources), box=scene.box)
    fluxes = measure_fluxes(
        pack(dark, 3), 4, replace(blend, peaks=np.array([s.peak for s in dark.sources])), KernelSet(KERNELS)
    )
    assert (fluxes.flux[0] == 0).all()
    assert np.isnan(fluxes.flux_err[0]).all()
    np.testing.assert_array_equal(fluxes.flux[1:], measure_fluxes(packed, 3, blend, KernelSet(KERNELS)).flux)


def test_a_source_without_light_has_an_error():
    scene = neighbours()
    packed, blend = observe(scene, seed=6)
    images = blend.images - observe(Scene(sources=scene.sources[:1], box=scene.box))[1].images
    fluxes = measure_fluxes(packed, 3, replace(blend, images=images - 10), KernelSet(KERNELS))
    assert (fluxes.flux[0] == 0).all()
    assert (fluxes.flux_err[0] > 0).all()
    assert np.isfinite(fluxes.flux_err[0]).all()


def test_two_sources_on_one_pixel_keep_their_common_flux_with_large_errors():
    one, box = neighbours().sources[0], neighbours().box
    packed, blend = observe(Scene(sources=(one,), box=box))
    alone = measure_fluxes(packed, 1, blend, KernelSet(KERNELS))
    twice = observe(Scene(sources=(one, one), box=box))[0]
    fluxes = measure_fluxes(twice, 2, replace(blend, peaks=np.repeat(blend.peaks, 2, axis=0)), KernelSet(KERNELS))
    np.testing.assert_allclose(fluxes.flux.sum(axis=0), one.flux(3), rtol=0, atol=0.01 * alone.flux_err.min())
    # How much belongs to which is not known.
    assert np.isfinite(fluxes.flux_err).all()
    assert (fluxes.flux_err > 100 * alone.flux_err).all()


# ---------------------------------------------------------------- what models do not hold


WIDTH = 1.7
AREA = 4 * np.pi * WIDTH**2
SHAPE = (70, 80)


def images_of(sources):
    """Images (S, 2, H, W) of round Gaussians (y, x, sigma, flux), seen in two bands, the second twice as bright."""
    y, x = np.indices(SHAPE)
    images = [
        flux * np.exp(-((y - y0) ** 2 + (x - x0) ** 2) / (2 * sigma**2)) / (2 * np.pi * sigma**2)
        for y0, x0, sigma, flux in sources
    ]
    return np.array([[image, 2 * image] for image in images], dtype=np.float32)


def packed_models(images, boxes):
    pieces = [
        image[(slice(None), *Box(*box).within(Box.of_shape(SHAPE)))] for image, box in zip(images, boxes, strict=True)
    ]
    sizes = [piece[0].size for piece in pieces]
    return SourceModels(
        boxes=np.array(boxes),
        offsets=np.cumsum([0, *sizes]),
        pixels=np.concatenate([piece.reshape(2, -1) for piece in pieces], axis=1),
    )


def structured(rng, image, eta):
    """Make what a model does not hold: eta times the model times a field of variance one, as coherent as a PSF."""
    field = ndimage.gaussian_filter(rng.normal(size=SHAPE), WIDTH, mode="wrap")
    return eta * image * field / np.sqrt(1 / AREA)


def test_misfit_is_that_of_a_slow_twin():
    rng = np.random.default_rng(0)
    images = images_of([(30, 30, 5.0, 4000.0), (34, 40, 2.0, 300.0), (60, 75, 1.7, 200.0)])
    boxes = [(9, 8, 45, 41), (22, 29, 24, 23), (49, 64, 21, 16)]
    weights = rng.uniform(0.5, 2.0, size=(2, *SHAPE)).astype(np.float32)
    weights[:, 35:37, 20:50] = 0
    noise = rng.normal(size=(2, *SHAPE)) / np.sqrt(np.maximum(weights, 0.5))
    residual = (noise + structured(rng, images[0], 0.2)).astype(np.float32)
    cut = np.zeros_like(images)
    for s, box in enumerate(boxes):
        window = (s, slice(None), *Box(*box).within(Box.of_shape(SHAPE)))
        cut[window] = images[window]
    centers = np.array([[30.4, 29.6], [34.0, 40.2], [59.7, 75.0]])
    factors = misfit_factors(residual, weights, packed_models(images, boxes), centers, np.array([WIDTH, 0.9 * WIDTH]))
    areas = [AREA, 0.81 * AREA]
    expected = reference.misfit_factors(residual, weights, cut, [(30, 30), (34, 40), (60, 75)], areas, 0.95 * WIDTH)
    assert expected[:2].min() > 1.5
    np.testing.assert_allclose(factors, expected, rtol=1e-5)


def test_misfit_of_a_galaxy_is_the_scatter_that_its_structure_gives_to_fluxes():
    rng, eta, n = np.random.default_rng(1), 0.15, 200
    images = images_of([(35, 35, 6.0, 30000.0), (40, 41, 1.7, 300.0)])
    models = packed_models(images, [(0, 0, *SHAPE)] * 2)
    weights = np.ones((2, *SHAPE), dtype=np.float32)
    centers = np.array([[35.0, 35.0], [40.0, 41.0]])
    factors, fluxes = np.empty((n, 2, 2)), np.empty((n, 2, 2))
    norm = np.square(images).sum(axis=(2, 3))
    for i in range(n):
        residual = (rng.normal(size=weights.shape) + structured(rng, images[0], eta)).astype(np.float32)
        factors[i] = misfit_factors(residual, weights, models, centers, np.full(2, WIDTH))
        fluxes[i] = (images * residual).sum(axis=(2, 3)) / norm
    # What pixels alone would give is 1 / sqrt(norm). The variance of 200 is known to 10 %, 30 % at three sigma; the
    # neighbour sees residuals of its own where they are large, and then more than there are on average.
    scatter2 = fluxes.var(axis=0) * norm
    assert scatter2.min() > 5
    ratio = np.median(factors, axis=0) / scatter2
    assert ratio[0] == pytest.approx(1.0, abs=0.3)
    assert ratio[1].min() > 0.7
    assert ratio[1].max() < 1.6


def test_noise_is_no_misfit():
    rng = np.random.default_rng(2)
    images = images_of([(35, 35, 4.0, 20000.0), (40, 41, 1.7, 300.0)])
    models = packed_models(images, [(0, 0, *SHAPE)] * 2)
    weights = np.ones((2, *SHAPE), dtype=np.float32)
    centers = np.array([[35.0, 35.0], [40.0, 41.0]])
    factors = [
        misfit_factors(rng.normal(size=weights.shape).astype(np.float32), weights, models, centers, np.full(2, WIDTH))
        for _ in range(50)
    ]
    # Some ten places decide, so that noise gives a few tenths, in half of the cases; not the thousands of that test.
    assert np.median(factors) < 1.1
    assert np.mean(factors) < 2
    assert np.max(factors) < 20
    assert (misfit_factors(0 * weights, weights, models, centers, np.full(2, WIDTH)) == 1).all()
    assert (misfit_factors(weights, weights, models, centers, np.zeros(2)) == 1).all()


def test_misfit_is_the_same_mirrored_and_elsewhere():
    rng = np.random.default_rng(3)
    images = images_of([(30, 32, 4.0, 9000.0), (36, 40, 1.7, 300.0)])
    weights = np.ones((2, *SHAPE), dtype=np.float32)
    residual = (rng.normal(size=weights.shape) + structured(rng, images[0], 0.2)).astype(np.float32)
    boxes = [(10, 10, 41, 45), (25, 29, 23, 23)]
    centers, sigmas = np.array([[30.0, 32.0], [36.0, 40.0]]), np.full(2, WIDTH)
    models = packed_models(images, boxes)
    expected = misfit_factors(residual, weights, models, centers, sigmas)
    assert expected.min() > 1.2
    mirrored = [(SHAPE[0] - y - h, x, h, w) for y, x, h, w in boxes]
    flipped = misfit_factors(
        np.ascontiguousarray(residual[:, ::-1]),
        weights,
        packed_models(images[:, :, ::-1], mirrored),
        np.array([[SHAPE[0] - 1 - y, x] for y, x in centers]),
        sigmas,
    )
    np.testing.assert_allclose(flipped, expected, rtol=1e-5)
    moved = replace(models, boxes=models.boxes + np.array([7, 9, 0, 0]))
    shifted = misfit_factors(np.roll(residual, (7, 9), (1, 2)), weights, moved, centers + [7, 9], sigmas)
    np.testing.assert_allclose(shifted, expected, rtol=1e-6)


def test_fluxes_of_irregular_galaxies_have_errors_that_hold_their_knots():
    pulls, signal_to_noise = [], []
    for seed in range(8):
        scene = simulate_scene(kind="knots", seed=seed)
        objects = kermes.deblend(scene.coadd, peaks=scene.peaks).objects
        listed = scene.truth[np.asarray(scene.truth["peak_index"]) >= 0]
        for band in scene.coadd.bands:
            flux, error = (np.asarray(objects[f"{band}_flux{suffix}"]) for suffix in ("", "_err"))
            pulls.append((flux - np.asarray(listed[f"{band}_flux"])) / error)
            signal_to_noise.append(flux / error)
    bright = np.concatenate(pulls)[np.concatenate(signal_to_noise) > 30]
    assert len(bright) > 100
    # Without what the knots add, 0.29 of them are.
    assert np.mean(np.abs(bright) > 2) < 0.2


# ---------------------------------------------------------------- correlated noise


def noisy_coadd(images, variance=1.0):
    """Coadd of pure noise, seen through a Gaussian PSF."""
    images = np.asarray(images, dtype=np.float32)
    psf = model_psf(1.7, 21)
    return Coadd(images=images, variance=variance, psfs=[psf] * len(images), bands=["g", "r", "i"][: len(images)])


def test_white_noise_has_a_factor_of_one_and_wrong_variance_its_root():
    noise = np.random.default_rng(0).normal(size=(2, 300, 300))
    noise[1] *= 1.5
    factors = noise_factors(noisy_coadd(noise), np.zeros((300, 300), dtype=int))
    # Some 5 000 independent places: the percentiles are known to 0.02.
    np.testing.assert_allclose(factors, [1.0, 1.5], rtol=0.06)
    assert heeded_factors(factors)[0] == 1
    np.testing.assert_allclose(
        heeded_factors([0.7, 0.85, 0.95, 1.1, 1.15, 1.3]), [0.7, 0.9, 1, 1, 1.1, 1.3], rtol=1e-12
    )


def test_correlated_noise_has_the_factor_of_its_correlation():
    white = np.random.default_rng(1).normal(size=(400, 400))
    kernel = model_psf(1.0, 9)
    noise = ndimage.convolve(white, kernel, mode="wrap") / np.sqrt((kernel**2).sum())
    psf = model_psf(1.7, 21)
    # The noise of a sum over the PSF: that of the white noise under the PSF and the kernel together.
    both = signal.convolve(psf, kernel) / np.sqrt((kernel**2).sum())
    expected = np.sqrt((both**2).sum() / (psf**2).sum())
    factor = noise_factors(noisy_coadd(noise[None]), np.zeros(noise.shape, dtype=int))[0]
    assert expected > 2
    assert factor == pytest.approx(expected, rel=0.1)


def test_sources_junk_and_too_few_pixels_do_not_count():
    rng = np.random.default_rng(2)
    noise = rng.normal(size=(1, 200, 200))
    nothing = np.zeros((200, 200), dtype=int)
    footprints = nothing.copy()
    footprints[50:150, 50:150] = 1
    bright = noise.copy()
    bright[0, 60:140, 60:140] += 100
    assert noise_factors(noisy_coadd(bright), footprints) == pytest.approx(1, abs=0.1)
    # Nor do bright sources outside of them, as long as most places have none.
    spotted = noise.copy()
    spotted[0, :, :70] += 50 * rng.exponential(size=(200, 70))
    assert noise_factors(noisy_coadd(spotted), nothing) == pytest.approx(1, abs=0.15)
    assert noise_factors(noisy_coadd(9 * noise), footprints) == 1
    assert noise_factors(noisy_coadd(0 * noise), footprints) == 1
    assert noise_factors(noisy_coadd(2 * noise), np.ones((200, 200), dtype=int)) == 1
    # Nine places weigh less than what is expected.
    footprints[:] = 1
    footprints[90:102, 90:102] = 0
    assert noise_factors(noisy_coadd(2 * noise), footprints) < 1.4


def test_places_are_those_of_a_slow_twin():
    rng = np.random.default_rng(4)
    images = rng.normal(size=(2, 31, 40)).astype(np.float32)
    variance = rng.uniform(0.5, 2.0, size=images.shape).astype(np.float32)
    valid = rng.uniform(size=images.shape) < 0.8
    valid[:, :12, :9] = False
    images[~valid] = variance[~valid] = np.nan
    labels = (rng.uniform(size=images.shape[1:]) < 0.2).astype(np.int64)
    psfs = np.array([model_psf(sigma, 15) for sigma in (1.2, 1.7)])
    half, step = 3, 5
    cores = psfs[:, 7 - half : 8 + half, 7 - half : 8 + half].astype(np.float32)
    found = kernels_detection.points_in_noise(images, variance, valid, labels, cores, step)
    expected = []
    for image, of_pixel, good, core in zip(images, variance, valid, cores, strict=True):
        image, of_pixel = np.nan_to_num(image), np.nan_to_num(of_pixel, nan=1.0)
        # 5 by 7 places, in the middle of 31 by 40 pixels.
        for y in range(5, 26, step):
            for x in range(4, 35, step):
                window = np.s_[y - half : y + half + 1, x - half : x + half + 1]
                p = np.where(good[window], core, 0)
                signal, information = (p * image[window] / of_pixel[window]).sum(), (p**2 / of_pixel[window]).sum()
                known = labels[y, x] == 0 and good[y, x] and information > 0.5 * (core**2).sum() / of_pixel[y, x]
                expected.append(signal / np.sqrt(information) if known else np.nan)
    assert 20 < np.isfinite(expected).sum() < len(expected)
    np.testing.assert_allclose(found.ravel(), expected, rtol=1e-4, atol=1e-5)


def resampled(seed):
    """Make a scene whose noise is that of an image that was resampled."""
    scene = simulate_scene(seed=seed, shape=(160, 160), n_sources=20, bands=("g", "r"))
    coadd, rng = scene.coadd, np.random.default_rng(seed)
    images = np.zeros(coadd.images.shape)
    for k in range(len(scene.truth)):
        light, box = render_truth(scene, k)
        seen = box & coadd.box
        images[:, seen.y, seen.x] += light[(slice(None), *seen.within(box))]
    # Tents, as of a linear interpolation, on noise that is larger so that pixels have their variance.
    kernel = np.outer([0.5, 1, 0.5], [0.5, 1, 0.5])
    noise = [
        ndimage.convolve(rng.normal(size=coadd.shape), kernel / np.sqrt((kernel**2).sum()), mode="wrap")
        for _ in coadd.bands
    ]
    images += np.array(noise) * np.sqrt(coadd.variance)
    return scene, changed(coadd, images=images)


def test_errors_are_those_of_the_noise_that_resampled_images_have():
    pulls, factors = {True: [], False: []}, []
    for seed in range(12):
        scene, coadd = resampled(seed)
        listed = scene.truth[np.asarray(scene.truth["peak_index"]) >= 0]
        for heed, found in pulls.items():
            result = kermes.deblend(coadd, scene.peaks, config=kermes.Config(correlated_noise=heed))
            if heed:
                factors.append(result.noise_factors)
            for band in coadd.bands:
                flux, error = (np.asarray(result.objects[f"{band}_flux{suffix}"]) for suffix in ("", "_err"))
                found.append((flux - np.asarray(listed[f"{band}_flux"]))[flux > 3 * error] / error[flux > 3 * error])
    # Sums over these PSFs have 2.3 times as much noise: the tent has an area of 7 pixels, the PSF one of 36, both
    # together are 5 times as much as one pixel. Nine of ten fluxes would be expected within 1.64 errors.
    assert 2.1 < np.mean(factors) < 2.6
    beyond = {heed: np.mean(np.abs(np.concatenate(found)) > 1.64) for heed, found in pulls.items()}
    assert beyond[False] > 0.4
    assert beyond[True] < 0.16


def test_factors_of_noise_that_are_given_count_for_all_errors_of_fluxes():
    scene = simulate_scene(seed=3, shape=(110, 110), n_sources=8, bands=("g", "r"))
    for model in ("scarlet-lite", "templates"):
        plain, twice = (
            kermes.deblend(changed(scene.coadd, noise_factors=factors), scene.peaks, config=kermes.Config(model=model))
            for factors in (1.0, [2.0, 1.0])
        )
        assert twice.noise_factors.tolist() == [2.0, 1.0]
        for band, factor in (("g", 2.0), ("r", 1.0)):
            for name in ("flux", "flux_err"):
                expected = plain.objects[f"{band}_{name}"] * (factor if name == "flux_err" else 1.0)
                np.testing.assert_allclose(twice.objects[f"{band}_{name}"], expected, rtol=1e-12)
            share = twice.objects[f"{band}_redistributed_flux_err"] / plain.objects[f"{band}_redistributed_flux_err"]
            # But for a flux below its error, of which more is in doubt.
            assert np.count_nonzero(abs(share - factor) > 1e-6) <= 1
        measured = [measure(result, StampKind.REDISTRIBUTED) for result in (plain, twice)]
        for name in ("aperture_3_flux_err", "psf_flux_err", "centroid_y_err"):
            ratio = np.asarray(measured[1][f"g_{name}"] / measured[0][f"g_{name}"])
            assert (abs(ratio[np.isfinite(ratio)] - 2) < 0.01).mean() > 0.5, name
