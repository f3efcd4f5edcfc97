"""The scarlet-lite preset gives what lsst.scarlet.lite gives, on the same inputs.

The expected values, of a real blend of seven sources in five bands, were computed in double precision.
"""

import numpy as np
import pytest

from kermes.coadd import Blend
from kermes.config import FitConfig
from kermes.constraints import monotonic_weights
from kermes.geometry import Box
from kermes.kernels.constraints import (
    brightest_near,
    make_monotonic,
    make_symmetric,
    monotone_mask,
)
from kermes.kernels.fitting import fit_components
from kermes.kernels.initialization import first_morphologies, signal_to_noise
from kermes.metrics import blend_metrics
from kermes.psf import difference_kernels, model_psf
from kermes.rendering import Convolution, KernelSet, Packed, render_source, unpack

OF_PEAK = 1e-5
"""Tolerance of pixels, relative to the brightest: a hundred roundings of single precision."""


def load(path):
    with np.load(path) as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def convolution(shared):
    return load(shared / "data" / "conformance" / "convolution.npz")


@pytest.fixture(scope="module")
def fit(shared):
    return load(shared / "data" / "conformance" / "fit.npz")


@pytest.fixture(scope="module")
def constraints(shared):
    return load(shared / "data" / "conformance" / "constraints.npz")


def close_to_peak(got, expected):
    np.testing.assert_allclose(got, expected, rtol=0, atol=OF_PEAK * abs(expected).max())


# ---------------------------------------------------------------- rendering


def test_model_psf(convolution):
    np.testing.assert_allclose(model_psf(0.8), convolution["model_psf"], rtol=0, atol=1e-12)


def test_difference_kernels(convolution):
    expected = convolution["difference_kernel"]
    kernels = difference_kernels(convolution["psfs"], model_psf(0.8))
    np.testing.assert_allclose(kernels, expected, rtol=0, atol=1e-10 * expected.max())


@pytest.fixture(scope="module")
def prepared(convolution):
    return Convolution.of(convolution["difference_kernel"], convolution["model"].shape[1:])


@pytest.mark.parametrize("name", ["convolved_fft", "convolved_real"])
def test_convolution(prepared, convolution, name):
    close_to_peak(prepared.forward(convolution["model"]), convolution[name])


def test_adjoint_of_the_convolution(prepared, convolution):
    close_to_peak(prepared.adjoint(convolution["model"]), convolution["gradient_real"])


# ---------------------------------------------------------------- constraints


@pytest.fixture(params=range(4))
def case(request, constraints):
    """Number of a morphology with noise, its pixels, and its centre."""
    i = request.param
    return i, constraints[f"input_{i}"].astype(np.float32), constraints[f"center_{i}"]


def test_weighted_monotonicity(case, constraints):
    i, morphology, (cy, cx) = case
    make_monotonic(morphology, *brightest_near(morphology, cy, cx, True), monotonic_weights(max(morphology.shape)))
    close_to_peak(morphology, constraints[f"weighted_monotonic_{i}"])


@pytest.mark.parametrize("n_passes", [0, 3])
def test_monotone_mask(case, constraints, n_passes):
    i, image, (cy, cx) = case
    reached = np.empty(image.shape, dtype=np.uint8)
    y0, y1, x0, x1 = monotone_mask(image, cy, cx, n_passes, reached)
    np.testing.assert_array_equal(reached, constraints[f"monotone_mask_valid_{i}_{n_passes}"])
    close_to_peak(image * reached, constraints[f"monotone_mask_{i}_{n_passes}"])
    # Theirs are the last pixels, ours the ones after them.
    np.testing.assert_array_equal([y0, y1 - 1, x0, x1 - 1], constraints[f"monotone_mask_bounds_{i}_{n_passes}"])


def test_symmetry(case, constraints):
    i, morphology, (cy, cx) = case
    make_symmetric(morphology, cy, cx)
    close_to_peak(morphology, constraints[f"symmetric_fill0_{i}"])


# ---------------------------------------------------------------- initialization


@pytest.fixture(scope="module")
def shapes(convolution, fit):
    """Boxes and first morphologies of all sources, from the stored detection image."""
    limit = 0.5 * convolution["noise_rms"].mean()
    boxes, offsets, pixels = first_morphologies(fit["detection_image"], fit["centers"], limit, 4)
    return [
        (box, pixels[start:end].reshape(box[2:]))
        for box, start, end in zip(boxes, offsets[:-1], offsets[1:], strict=True)
    ]


def first_components(fit):
    """Index of the first component of each source."""
    return np.cumsum(fit["n_components"]) - fit["n_components"]


def test_first_boxes(shapes, fit):
    for (box, _), k in zip(shapes, first_components(fit), strict=True):
        np.testing.assert_array_equal(box, fit[f"init_box_{k}"])


def test_first_morphologies(shapes, fit):
    for (_, morphology), k, n_components in zip(shapes, first_components(fit), fit["n_components"], strict=True):
        if n_components == 1:
            close_to_peak(morphology, fit[f"init_morphology_{k}"])
        else:
            # The bulge comes first.
            close_to_peak(np.maximum(morphology - 0.25, 0) / 0.75, fit[f"init_morphology_{k}"])
            close_to_peak(np.minimum(morphology, 0.25) / 0.25, fit[f"init_morphology_{k + 1}"])


def test_signal_to_noise(blend, fit):
    snr = signal_to_noise(blend.images, blend.weights, blend.psfs, blend.peaks)
    # Theirs is rounded down to a whole number, and then to two digits.
    np.testing.assert_allclose(np.floor(snr) / 50, fit["snr_over_min"], rtol=0, atol=1e-9)


# ---------------------------------------------------------------- fit


@pytest.fixture(scope="module")
def blend(convolution, fit):
    return Blend(
        images=convolution["images"].astype(np.float32),
        weights=(1 / convolution["variance"]).astype(np.float32),
        noise_rms=convolution["noise_rms"].astype(np.float32),
        psfs=convolution["psfs"],
        box=Box.of_shape(convolution["images"].shape),
        peaks=fit["centers"],
    )


def stored(fit, stage):
    """Packed components of one stage of the stored fit."""
    n = fit["n_components"].sum()
    boxes = np.array([fit[f"{stage}_box_{k}"] for k in range(n)])
    return Packed(
        boxes=boxes,
        offsets=np.concatenate([[0], np.cumsum(boxes[:, 2] * boxes[:, 3])]),
        morphologies=np.concatenate([fit[f"{stage}_morphology_{k}"].ravel() for k in range(n)]).astype(np.float32),
        spectra=np.array([fit[f"{stage}_spectrum_{k}"] for k in range(n)]).astype(np.float32),
        sources=np.repeat(np.arange(len(fit["n_components"])), fit["n_components"]),
    )


@pytest.fixture(scope="module")
def ten_steps(blend, prepared, fit):
    """Take the steps of the stored fit: the boxes stay, and the first of equal pixels is the brightest."""
    start, settings = stored(fit, "spectra"), FitConfig()
    return fit_components(
        blend.images,
        blend.weights,
        prepared.transforms,
        prepared.width,
        blend.noise_rms,
        start.boxes,
        start.offsets,
        blend.peaks[start.sources],
        start.morphologies,
        start.spectra,
        monotonic_weights(64),
        max_iterations=10,
        exact_every=1,
        patience=1000,
        tolerance=settings.tolerance,
        spectrum_step=settings.spectrum_step,
        morphology_step=settings.morphology_step,
        background_threshold=0.25,
        resize_every=0,
        monotonic=True,
        symmetric=False,
        first_wins=True,
    )


def test_losses_of_ten_steps(ten_steps, fit):
    losses = ten_steps[4]
    # One per cent is asked for; the difference is that of single and double precision.
    np.testing.assert_allclose(losses[:10], -fit["loss10"], rtol=1e-4)


def test_components_after_ten_steps(ten_steps, fit):
    _, _, morphologies, spectra, losses, *_ = ten_steps
    expected = stored(fit, "fit10")
    assert losses.argmin() == 10  # so that the state returned is the last one
    np.testing.assert_allclose(morphologies, expected.morphologies, rtol=0, atol=1e-4)
    np.testing.assert_allclose(spectra, expected.spectra, rtol=1e-4)


# ---------------------------------------------------------------- what comes out


@pytest.mark.parametrize("name", ["max_overlap", "flux_overlap", "flux_overlap_fraction", "blendedness"])
def test_blending_metrics(blend, fit, name):
    metrics = blend_metrics(stored(fit, "fit100"), len(fit["centers"]), blend.box.shape)
    np.testing.assert_allclose(getattr(metrics, name), fit[name], rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def fitted_scene(blend, fit):
    return unpack(stored(fit, "fit100"), blend.peaks, blend.box)


@pytest.fixture(scope="module")
def fitted_model(blend, fitted_scene):
    """Sum of all sources in the model frame."""
    model = np.zeros_like(blend.images)
    for source in fitted_scene.sources:
        model[(slice(None), *source.box.within(blend.box))] += source.model(len(model))
    return model


def test_model_of_the_fitted_scene(fitted_model, fit):
    close_to_peak(fitted_model, fit["model"])


def test_fitted_scene_as_observed(prepared, fitted_model, fit):
    close_to_peak(prepared.forward(fitted_model), fit["convolved"])


def test_reduced_chi2_of_the_fitted_scene(prepared, fitted_model, convolution, fit):
    residual = prepared.forward(fitted_model) - convolution["images"]
    assert np.mean(residual**2 / convolution["variance"]) == pytest.approx(fit["reduced_chi2"], rel=1e-4)


def test_boxes_of_the_sources_as_observed(blend, fitted_scene, convolution, fit):
    for s, source in enumerate(fitted_scene.sources):
        _, box = render_source(source, KernelSet(convolution["difference_kernel"]), blend.box)
        assert box == Box.of_shape(fit[f"redistributed_{s}"].shape, *fit[f"redistributed_origin_{s}"])
