"""Overlap metrics have their analytic values, and agree with their slow twin."""

import numpy as np
import pytest
from astropy.table import Table
from hypothesis import given
from hypothesis import strategies as st

import reference
from blends import gaussian, source, three_sources
from kermes import metrics
from kermes.coadd import Coadd
from kermes.errors import InputError
from kermes.geometry import Box
from kermes.metrics import blend_metrics, model_metrics, observed_metrics, overlap_fractions
from kermes.rendering import SourceModels, frame_models, pack
from kermes.scene import Scene, Source

pytestmark = pytest.mark.nojit

NAMES = ("max_overlap", "flux_overlap", "flux_overlap_fraction", "blendedness")


def metrics_of(*sources, shape, n_bands=2):
    """All four metrics, shape (4, S, B)."""
    scene = Scene(sources=sources, box=Box.of_shape(shape))
    metrics = blend_metrics(pack(scene, n_bands), len(sources), shape)
    return np.stack([getattr(metrics, name) for name in NAMES])


def whole_models(scene, n_bands):
    """Models of all sources on the whole image, shape (S, B, H, W)."""
    models = np.zeros((len(scene.sources), n_bands, *scene.box.shape))
    for model, one in zip(models, scene.sources, strict=True):
        model[(slice(None), *one.box.within(scene.box))] = one.model(n_bands)
    return models


@pytest.mark.parametrize("distance", [0, 3, 6])
def test_two_gaussians_have_the_overlap_of_their_integrals(distance):
    shape, sigma = (61, 71), 2.0
    a, b = np.array([5.0, 20.0]), np.array([10.0, 1.0])
    sources = [source(gaussian(30, x, sigma, s, shape, reach=29)) for x, s in ((30, a), (30 + distance, b))]
    largest, overlap, fraction, blendedness = metrics_of(*sources, shape=shape)[:, 0]
    # A Gaussian of this width, summed over pixels, is its integral to double precision; the rest is float32.
    product = np.exp(-(distance**2) / (4 * sigma**2))
    np.testing.assert_allclose(largest, b, rtol=1e-6)
    np.testing.assert_allclose(overlap, b * 2 * np.pi * sigma**2, rtol=1e-5)
    np.testing.assert_allclose(fraction, b / a, rtol=1e-5)
    np.testing.assert_allclose(blendedness, 1 - a / (a + b * product), rtol=1e-5)


@given(st.integers(0, 99), st.integers(1, 4))
def test_metrics_agree_with_the_slow_twin(seed, n_sources):
    rng = np.random.default_rng(seed)
    shape = (11, 9)
    sources = tuple(
        source(gaussian(rng.integers(11), rng.integers(9), rng.uniform(1, 3), rng.uniform(0, 9, 2), shape, reach=4))
        for _ in range(n_sources)
    )
    expected = reference.blend_metrics(whole_models(Scene(sources=sources, box=Box.of_shape(shape)), 2))
    # Models and their sum are in single precision, and the sum less one of them loses some of it.
    got = metrics_of(*sources, shape=shape)
    np.testing.assert_allclose(got[0], expected[0], rtol=0, atol=4e-6 * 9)
    np.testing.assert_allclose(got[1], expected[1], rtol=0, atol=81 * 4e-6 * 9)
    np.testing.assert_allclose(got[2], expected[2], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got[3], expected[3], rtol=0, atol=1e-5)


def test_a_source_alone_is_not_blended():
    shape = (32, 27)
    assert (metrics_of(three_sources(shape).sources[0], shape=shape, n_bands=3) == 0).all()


def test_sources_apart_are_not_blended():
    shape = (20, 40)
    sources = [source(gaussian(10, x, 1.5, [5, 8], shape, reach=5)) for x in (8, 30)]
    assert (metrics_of(*sources, shape=shape) == 0).all()


def test_a_source_without_components_is_not_blended():
    shape = (20, 40)
    dark = Source(peak=(10, 10), components=())
    bright = source(gaussian(10, 12, 1.5, [5, 8], shape, reach=5))
    assert (metrics_of(dark, bright, shape=shape) == 0).all()


def test_a_source_without_flux_in_a_band_is_not_blended_there_but_overlapped():
    shape = (20, 40)
    red = source(gaussian(10, 12, 1.5, [0, 8], shape, reach=5))
    blue = source(gaussian(10, 12, 1.5, [3, 3], shape, reach=5))
    largest, overlap, fraction, blendedness = metrics_of(red, blue, shape=shape)[:, 0, 0]
    assert largest == pytest.approx(3)
    assert overlap == pytest.approx(3 * 2 * np.pi * 1.5**2, rel=1e-2)  # cut at 3.3 sigma
    assert fraction == 0
    assert blendedness == 0


@given(st.permutations([0, 1, 2]))
def test_order_of_the_sources_does_not_matter(order):
    shape = (32, 27)
    sources = three_sources(shape).sources
    expected = metrics_of(*sources, shape=shape, n_bands=3)[:, order]
    permuted = metrics_of(*(sources[i] for i in order), shape=shape, n_bands=3)
    # Sums of three models in single precision in another order.
    np.testing.assert_allclose(permuted, expected, rtol=1e-4, atol=1e-6 * expected.max())


def test_metrics_of_models_are_those_of_their_components():
    scene = three_sources()
    got = model_metrics(frame_models(scene, 3), scene.box.shape)
    expected = blend_metrics(pack(scene, 3), 3, scene.box.shape)
    for name in NAMES:
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))


def test_metrics_of_any_models_agree_with_the_slow_twin():
    rng = np.random.default_rng(3)
    boxes = np.array([[2, 1, 9, 8], [5, 4, 7, 7], [9, 8, 3, 3]])
    offsets = np.concatenate([[0], np.cumsum(boxes[:, 2] * boxes[:, 3])])
    pixels = rng.normal(1, 1, (2, offsets[-1])).astype(np.float32)
    whole = np.zeros((3, 2, 13, 12))
    for s, box in enumerate(Box(*row) for row in boxes.tolist()):
        whole[(s, slice(None), box.y, box.x)] = pixels[:, offsets[s] : offsets[s + 1]].reshape(2, *box.shape)
    metrics = model_metrics(SourceModels(boxes=boxes, offsets=offsets, pixels=pixels), (13, 12))
    # Roundings of the sum of all models in single precision.
    for name, expected in zip(NAMES, reference.blend_metrics(whole), strict=True):
        np.testing.assert_allclose(getattr(metrics, name), expected, rtol=1e-5, atol=1e-5, err_msg=name)


# ---------------------------------------------------------------- as observed


def observed_case(seed, n_sources=3):
    """Random models of two bands on an image with noise and invalid pixels; models on the whole image too."""
    rng = np.random.default_rng(seed)
    shape = (12, 10)
    boxes = np.array([[rng.integers(6), rng.integers(5), 6, 5] for _ in range(n_sources)])
    offsets = np.arange(n_sources + 1) * 30
    pixels = rng.normal(1, 2, (2, 30 * n_sources)).astype(np.float32)
    whole = np.zeros((n_sources, 2, *shape))
    for s, (y, x, height, width) in enumerate(boxes):
        whole[s, :, y : y + height, x : x + width] = pixels[:, 30 * s : 30 * s + 30].reshape(2, height, width)
    coadd = Coadd(
        images=rng.normal(size=(2, *shape)),
        variance=np.where(rng.uniform(size=(2, *shape)) < 0.1, 0, rng.uniform(0.5, 2, (2, *shape))),
        psfs=np.ones((2, 3, 3)),
        bands=["g", "r"],
    )
    models = SourceModels(boxes=boxes, offsets=offsets, pixels=pixels)
    return coadd, models, whole


@given(st.integers(0, 999))
def test_observed_metrics_agree_with_their_twin(seed):
    coadd, models, whole = observed_case(seed)
    positive = np.maximum(whole, 0)
    total = positive.sum(axis=0)
    got = observed_metrics(coadd, Box.of_shape(coadd.shape), total.astype(np.float32), models)
    for s in range(len(whole)):
        for b in range(2):
            sigma2 = coadd.variance[b]
            own = coadd.valid[b] & (positive[s, b] > 0.1 * np.sqrt(sigma2))
            m, rest = positive[s, b][own], (total[b] - positive[s, b])[own]
            expected = (
                (np.max(rest / np.sqrt(sigma2[own])), rest.sum() / m.sum())
                + (1 - np.sum(m * m / sigma2[own]) / np.sum((m + rest) * m / sigma2[own]),)
                if own.any()
                else (0, 0, 0)
            )
            found = got.max_overlap[s, b], got.overlap_fraction[s, b], got.blendedness[s, b]
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("distance", [0, 2, 4])
def test_two_gaussians_as_observed_have_the_overlap_of_their_integrals(distance):
    shape, sigma, a, b = (61, 71), 2.5, 4000.0, 1000.0
    y, x = np.indices(shape)
    images = [
        (f * np.exp(-0.5 * ((y - 30) ** 2 + (x - c) ** 2) / sigma**2)).astype(np.float32)
        for f, c in ((a, 30), (b, 30 + distance))
    ]
    models = SourceModels(
        boxes=np.array([[0, 0, *shape]] * 2),
        offsets=np.array([0, y.size, 2 * y.size]),
        pixels=np.concatenate([image.ravel() for image in images])[None],
    )
    coadd = Coadd(images=sum(images)[None], variance=4.0, psfs=np.ones((3, 3)), bands=["r"])
    got = observed_metrics(coadd, Box.of_shape(shape), sum(images)[None], models)
    # The light below a tenth of the noise is left out: 5e-5 of the first source, 2e-4 of the second one.
    product = np.exp(-(distance**2) / (4 * sigma**2))
    assert got.max_overlap[0, 0] == pytest.approx(b / 2, rel=1e-5)
    assert got.blendedness[0, 0] == pytest.approx(1 - a / (a + b * product), abs=1e-3)
    assert got.blendedness[1, 0] == pytest.approx(1 - b / (b + a * product), abs=1e-3)
    assert got.overlap_fraction[0, 0] == pytest.approx(b / a, rel=2e-2)


def overlap_table(**columns):
    """Table of objects with the metrics of one band."""
    names = ("observed_max_overlap", "flux_overlap_fraction", "observed_overlap_fraction")
    names += ("blendedness", "observed_blendedness")
    return Table({"r_flux": np.array([1.0, 1, 1, np.nan]), **{f"r_{n}": np.array(columns[n], float) for n in names}})


def test_fractions_are_those_of_objects_with_a_flux():
    table = overlap_table(
        observed_max_overlap=[2, 0.5, 0, 9],
        flux_overlap_fraction=[0.2, 0.06, 0, 9],
        observed_overlap_fraction=[0.2, 0.04, 0, 9],
        blendedness=[0.01, 0, 0, 1],
        observed_blendedness=[0.1, 0.06, 0, 1],
    )
    fractions = overlap_fractions(table, "r")
    expected = {
        "overlap_above_noise": (1 / 3, 1 / 3),
        "overlap_above_5_percent": (2 / 3, 1 / 3),
        "blendedness_above_5_percent": (0, 2 / 3),
        "any": (2 / 3, 2 / 3),
    }
    for name, pair in expected.items():
        assert fractions[name] == pytest.approx(pair)


def test_fractions_of_an_unknown_band_are_refused():
    table = Table({"r_flux": [1.0], "r_observed_blendedness": [0.0]})
    with pytest.raises(InputError, match="band must be one of r, got 'q'"):
        overlap_fractions(table, "q")


# ---------------------------------------------------------------- metrics of others


@pytest.mark.parametrize(("name", "metric", "message"), [("a b", len, "name must be"), ("a", 3, "metric must be")])
def test_what_is_no_metric_is_refused(name, metric, message):
    with pytest.raises(InputError, match=message):
        metrics.register_metric(name, metric)
