"""Sharing of the observed flux: nothing is lost, nothing hidden decides who gets it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kermes.coadd import Coadd
from kermes.flux import (
    LEAST_MODEL,
    add_positive,
    claimed,
    doubt_of_shares,
    redistribute,
    redistribution_covariance,
    replace_neighbors,
    shared_fluxes,
)
from kermes.geometry import Box
from kermes.kernels import flux as kernels
from kermes.rendering import SourceModels

SHAPE = (2, 9, 11)  # bands, height, width


@st.composite
def pixels(draw):
    """Draw images of either sign, their variance, valid pixels, and models (S, B, H, W) of up to four sources."""
    shape = (2, *draw(hnp.array_shapes(min_dims=2, max_dims=2, max_side=5)))
    images = draw(hnp.arrays(np.float32, shape, elements=st.floats(-1e6, 1e6, width=32)))
    variance = draw(hnp.arrays(np.float32, shape, elements=st.floats(2.0**-10, 2.0**10, width=32)))
    valid = draw(hnp.arrays(bool, shape))
    n_sources = draw(st.integers(1, 4))
    light = st.floats(-1000, 1e6, width=32)
    return images, variance, valid, draw(hnp.arrays(np.float32, (n_sources, *shape), elements=light))


def total_of(models):
    return np.maximum(models, 0).sum(axis=0, dtype=np.float32)


def packed(models, boxes):
    """Pack models (S, B, H, W), each cut to its box."""
    cut = [model[:, box.y, box.x].reshape(len(model), -1) for model, box in zip(models, boxes, strict=True)]
    return SourceModels(
        boxes=np.array([(*box.origin, *box.shape) for box in boxes], dtype=np.int64),
        offsets=np.cumsum([0, *(box.area for box in boxes)]).astype(np.int64),
        pixels=np.concatenate(cut, axis=1).astype(np.float32),
    )


@given(pixels())
def test_flux_is_conserved_in_every_claimed_pixel(given_pixels):
    images, variance, valid, models = given_pixels
    total = total_of(models)
    shares = sum(redistribute(images, variance, valid, model, total).astype(float) for model in models)
    expected = np.where(claimed(variance, valid, total), images, 0)
    # A sum, a division and a product in float32 for each of up to four sources.
    np.testing.assert_allclose(shares, expected, rtol=2e-6, atol=1e-38)


@given(pixels())
def test_pixels_with_a_tenth_of_the_noise_in_the_models_are_claimed_when_they_are_valid(given_pixels):
    _, variance, valid, models = given_pixels
    np.testing.assert_array_equal(
        claimed(variance, valid, total_of(models)) | ~valid | (models.sum(axis=0) <= 0.1 * np.sqrt(variance)), True
    )


@given(pixels())
def test_a_source_without_light_in_a_pixel_gets_nothing_of_it(given_pixels):
    images, variance, valid, models = given_pixels
    share = redistribute(images, variance, valid, models[0], total_of(models))
    assert not share[models[0] <= 0].any()


def test_models_that_add_up_to_the_image_are_returned_unchanged():
    models = np.random.default_rng(0).uniform(0.1, 1.0, (3, *SHAPE)).astype(np.float32)
    images = total_of(models)
    valid = np.ones(SHAPE, dtype=bool)
    for model in models:
        share = redistribute(images, np.ones(SHAPE, np.float32), valid, model, images)
        np.testing.assert_allclose(share, model, rtol=3e-7)  # two roundings


def test_a_pixel_with_next_to_no_light_in_the_models_belongs_to_nobody():
    variance = np.full((1, 1, 2), 4.0, np.float32)
    total = np.array([[[1.9, 2.1]]], np.float32) * LEAST_MODEL
    np.testing.assert_array_equal(claimed(variance, np.ones((1, 1, 2), bool), total), [[[False, True]]])


def test_pixels_that_are_not_numbers_do_not_spread():
    images, variance = np.ones(SHAPE, np.float32), np.ones(SHAPE, np.float32)
    images[0, 2, 3] = variance[0, 2, 3] = np.nan
    variance[1, 1, 1] = -1
    valid = np.isfinite(images) & (variance > 0)
    model = np.ones(SHAPE, np.float32)
    share = redistribute(images, variance, valid, model, model)
    np.testing.assert_array_equal(share, valid.astype(np.float32))


def scene_of_three(seed=4):
    """A coadd with a missing pixel, three models on boxes of their own, and the box of the coadd they lie in."""
    rng = np.random.default_rng(seed)
    box = Box(3, 2, *SHAPE[1:])
    images = rng.normal(size=(2, 20, 18))
    images[0, 6, 7] = np.nan
    coadd = Coadd(
        images=images, variance=rng.uniform(0.5, 2, size=images.shape), psfs=np.ones((2, 3, 3)), bands=["g", "r"]
    )
    boxes = [Box(0, 0, 9, 6), Box(2, 3, 5, 8), Box(8, 10, 1, 1)]
    models = np.zeros((3, *SHAPE))
    for model, own in zip(models, boxes, strict=True):
        model[:, own.y, own.x] = rng.normal(0.5, 1, size=(2, *own.shape))
    return coadd, box, models.astype(np.float32), boxes


def shared(coadd, box, total, models):
    """Share the pixels of a box among models that nobody else disputes; total on the box alone."""
    whole = np.zeros(coadd.images.shape, dtype=np.float32)
    whole[:, box.y, box.x] = total
    return shared_fluxes(coadd, box, whole, models)


def test_shared_fluxes_are_the_sums_of_the_shares():
    coadd, box, models, boxes = scene_of_three()
    window, total = (slice(None), box.y, box.x), total_of(models)
    flux, flux_err, _ = shared(coadd, box, total, packed(models, boxes))
    variance, valid = coadd.variance[window], coadd.valid[window]
    shares = np.array([redistribute(coadd.images[window], variance, valid, model, total) for model in models])
    ratios = np.array([redistribute(np.ones_like(variance), variance, valid, model, total) for model in models])
    # Rows of up to eleven pixels are summed in float32.
    np.testing.assert_allclose(flux, shares.sum(axis=(2, 3), dtype=float), rtol=1e-5, atol=1e-6)
    expected = np.sqrt((ratios**2 * np.where(valid, variance, 0)).sum(axis=(2, 3), dtype=float))
    np.testing.assert_allclose(flux_err, expected, rtol=1e-6)


def test_pixels_of_a_cutout_are_shared_as_those_of_the_whole():
    coadd, box, models, boxes = scene_of_three()
    expected = shared(coadd, box, total_of(models), packed(models, boxes))
    cutout = coadd.cutout(box.grow(1))
    assert not cutout.images.flags.c_contiguous
    found = shared(cutout, Box(1, 1, *box.shape), total_of(models), packed(models, boxes))
    np.testing.assert_array_equal(found, expected)


def test_error_of_a_share_is_the_scatter_of_its_flux():
    coadd, box, models, boxes = scene_of_three()
    models, total = np.abs(models), total_of(np.abs(models))
    rng, n = np.random.default_rng(2), 400
    fluxes = []
    for _ in range(n):
        noisy = Coadd(
            images=rng.normal(size=coadd.images.shape) * np.sqrt(coadd.variance),
            variance=coadd.variance,
            psfs=np.ones((2, 3, 3)),
            bands=["g", "r"],
        )
        flux, flux_err, _ = shared(noisy, box, total, packed(models, boxes))
        fluxes.append(flux)
    # The scatter of a standard deviation from n numbers is 1 / sqrt(2 n) = 0.035; four times that.
    assert np.std(fluxes, axis=0) / flux_err == pytest.approx(np.ones((3, 2)), abs=4 * 0.035)


def test_what_is_contested_is_how_a_flux_follows_its_model():
    coadd, box, models, boxes = scene_of_three()
    models = np.abs(models)
    # Bright enough that which pixels are claimed does not change.
    *_, contested = shared(coadd, box, total_of(models), packed(models, boxes))
    step = 0.01
    for s in range(3):
        fluxes = []
        for sign in (1, -1):
            changed = models.copy()
            changed[s] *= np.exp(np.float32(0.5 * sign * step))
            fluxes.append(shared(coadd, box, total_of(changed), packed(changed, boxes))[0][s])
        # Float32 shares: differences of 1e-2 are known to 1e-4 of the flux.
        np.testing.assert_allclose((fluxes[0] - fluxes[1]) / step, contested[s], rtol=0.01, atol=3e-3)


def test_positive_parts_are_added_where_the_blend_lies():
    _, _, models, boxes = scene_of_three()
    n_bands, height, width = SHAPE
    total = np.random.default_rng(1).uniform(size=(n_bands, height + 5, width + 7)).astype(np.float32)
    expected = total.copy()
    expected[:, 2 : 2 + height, 3 : 3 + width] += np.maximum(models, 0).sum(axis=0)
    add_positive(total, packed(models, boxes), Box(2, 3, height, width))
    np.testing.assert_allclose(total, expected, rtol=1e-6)


@pytest.mark.nojit
def test_sources_are_the_sums_of_their_components():
    rng = np.random.default_rng(5)
    boxes = np.array([[0, 1, 3, 4], [2, 2, 4, 5], [7, 7, 1, 2], [3, 3, 0, 0]])
    offsets = np.concatenate([[0], np.cumsum(boxes[:, 2] * boxes[:, 3])])
    sources, spectra = np.array([0, 0, 2, 2]), rng.normal(size=(4, 2)).astype(np.float32)
    flat = rng.normal(size=(2, offsets[-1])).astype(np.float32)
    expected = np.zeros((3, *SHAPE))
    for k, (y0, x0, height, width) in enumerate(boxes):
        stamp = flat[:, offsets[k] : offsets[k + 1]].reshape(2, height, width)
        expected[sources[k], :, y0 : y0 + height, x0 : x0 + width] += spectra[k][:, None, None] * stamp

    joined, starts = kernels.source_boxes(boxes, sources, 3)
    np.testing.assert_array_equal(joined, [[0, 1, 6, 6], [0, 0, 0, 0], [7, 7, 1, 2]])
    combined = kernels.combine_components(flat, boxes, offsets, sources, spectra, joined, starts)
    residual = np.zeros(SHAPE, dtype=np.float32)
    kernels.add_models(residual, combined, joined, starts, -1.0)
    np.testing.assert_allclose(-residual, expected.sum(axis=0), rtol=1e-6, atol=1e-6)
    for s, box in enumerate(Box(*row) for row in joined.tolist()):
        stamp = combined[:, starts[s] : starts[s + 1]].reshape(2, *box.shape)
        np.testing.assert_allclose(stamp, expected[s][:, box.y, box.x], rtol=1e-6, atol=1e-6)


@given(pixels())
def test_covariance_of_all_shares_adds_up_to_the_variance(given_pixels):
    _, variance, valid, models = given_pixels
    total = total_of(models)
    covariances = sum(
        redistribution_covariance(variance, valid, first, second, total).astype(float)
        for first in models
        for second in models
    )
    # The shares add up to one, so their products do; a few float32 roundings each.
    np.testing.assert_allclose(covariances, np.where(claimed(variance, valid, total), variance, 0), rtol=5e-6)


def test_a_source_alone_keeps_its_pixels():
    rng = np.random.default_rng(3)
    images = rng.normal(size=SHAPE).astype(np.float32)
    images[0, 2, 3] = np.nan
    variance, valid = np.ones(SHAPE, np.float32), np.isfinite(images)
    model = rng.uniform(0.5, 2, SHAPE).astype(np.float32)
    noise = rng.normal(size=SHAPE).astype(np.float32)
    np.testing.assert_array_equal(replace_neighbors(images, variance, valid, model, model, noise), images)


def test_pixels_of_a_neighbour_become_noise_and_what_nobody_claims_stays():
    images, variance = np.full((1, 1, 3), 7.0, np.float32), np.full((1, 1, 3), 4.0, np.float32)
    model, total = np.array([[[0, 0, 1]]], np.float32), np.array([[[5, 0, 2]]], np.float32)
    noise = np.array([[[1, 1, -1]]], np.float32)
    replaced = replace_neighbors(images, variance, np.ones((1, 1, 3), bool), model, total, noise)
    # All noise; the image; half the image, and noise with the three quarters of the variance that are missing.
    np.testing.assert_allclose(replaced, [[[2, 7, 3.5 - np.sqrt(3)]]], rtol=1e-6)


# ---------------------------------------------------------------- doubt of the shares


def realize(distance, fluxes, n=4000):
    """Fit fluxes of two Gaussians to realisations of noise, and share the pixels by the fits.

    Returns the shared fluxes (n, 2) and the standard deviation that is claimed for them.
    """
    y, x = np.mgrid[:31, :41] - 15.0
    unit = np.stack([np.exp(-(y**2 + (x - at) ** 2) / 8) / (8 * np.pi) for at in (5.0, 5.0 + distance)])
    models = np.array(fluxes)[:, None, None] * unit
    ratio, flat = models / models.sum(axis=0), unit.reshape(2, -1)
    covariance = np.linalg.inv(flat @ flat.T)
    images = models.sum(axis=0) + np.random.default_rng(0).normal(size=(n, *y.shape))
    fitted = images.reshape(n, -1) @ flat.T @ covariance
    lights = np.maximum(fitted[:, :, None, None] * unit, 0)
    total = lights.sum(axis=1)
    # As in the images, what nobody claims is nobody's: here the same pixels in all.
    claimed = models.sum(axis=0) > LEAST_MODEL
    shared = np.divide(images * claimed, total, out=np.zeros_like(total), where=total > 0)
    shared = (shared[:, None] * lights).sum(axis=(2, 3))
    noise = (ratio**2 * claimed).sum(axis=(1, 2))
    contested = (models * (1 - ratio) * claimed).sum(axis=(1, 2))
    error = np.sqrt(np.diag(covariance))
    correlation = np.full((1, 2), covariance[0, 1] / error.prod())
    doubt = doubt_of_shares(contested[None], np.array([fluxes]), error[None], correlation, np.array([1, 0]))
    return shared, np.sqrt(noise + doubt[0])


@pytest.mark.parametrize("distance", [1.0, 2.0, 3.0, 5.0, 9.0])
@pytest.mark.parametrize("ratio", [1.0, 0.3])
def test_errors_of_shares_are_the_scatter_of_realisations(distance, ratio):
    shared, error = realize(distance, [2000.0, 2000.0 * ratio])
    # 4000 realisations give the scatter to 1.1 %; shares are not linear in the fluxes.
    np.testing.assert_allclose(error, shared.std(axis=0), rtol=0.06)


def test_sources_apart_have_no_doubt_and_coincident_ones_that_of_their_models():
    fluxes, errors = np.array([[100.0, 50.0]]), np.array([[3.0, 4.0]])
    pair, strongly = np.array([1, 0]), np.full((1, 2), -0.99)
    assert (doubt_of_shares(np.zeros((1, 2)), fluxes, errors, 0 * strongly, pair) == 0).all()
    # All that is contested is known as well as the sum is.
    halves = doubt_of_shares(np.full((1, 2), 25.0), np.full((1, 2), 50.0), np.full((1, 2), 4.0), strongly, pair)
    np.testing.assert_allclose(halves, 16.0 - 0.25 * (16 + 16 - 2 * 0.99 * 16))


@pytest.mark.parametrize("correlation", [0.0, np.nan])
def test_without_a_neighbour_that_is_known_the_doubt_is_that_of_the_own_model(correlation):
    fluxes, errors, contested = np.array([[100.0]]), np.array([[10.0]]), np.array([[20.0]])
    found = doubt_of_shares(contested, fluxes, errors, np.full((1, 1), correlation), np.array([-1]))
    np.testing.assert_allclose(found, 100 * (1 - 0.8**2))


def test_a_source_that_is_lost_in_the_noise_is_as_uncertain_as_its_model():
    fluxes, errors = np.array([[1.0, 100.0], [-5.0, 100.0]]), np.full((2, 2), 10.0)
    found = doubt_of_shares(np.zeros((2, 2)), fluxes, errors, np.full((2, 2), -0.5), np.array([1, 0]))
    np.testing.assert_allclose(found, [[100, 0], [100, 0]])


def test_what_is_not_known_has_no_doubt_that_is_known():
    nothing = np.full((1, 2), np.nan)
    assert np.isnan(doubt_of_shares(np.zeros((1, 2)), nothing, nothing, nothing, np.array([1, 0]))).all()
