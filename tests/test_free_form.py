"""Free shapes over profiles: given where profiles do not suffice, held by them where they do."""

from dataclasses import replace

import numpy as np
import pytest

import blends
import kermes
from kermes.coadd import Coadd
from kermes.config import FreeFormConfig
from kermes.errors import ConfigError
from kermes.free_form import with_free_form
from kermes.geometry import Box
from kermes.kernels import flux as kernels_flux
from kermes.kernels import free_form as kernels_free_form
from kermes.rendering import Convolution, KernelSet, frame_models, render_scene, transform_side
from kermes.scene import FactorizedComponent, ProfileComponent, Scene, Source

SHAPE = (56, 60)
BOX = Box(100, 200, *SHAPE)
KERNELS = KernelSet(blends.KERNELS, blends.PSFS)
SIGMA = 0.8
SPECTRUM = (400.0, 600.0, 900.0)
"""S/N of about 190 in all bands together for the galaxy, noise of one per pixel."""


def profile(radius=3.0, spectrum=SPECTRUM, center=(127.3, 229.6), **options):
    """Make a round exponential profile, or a point for a radius of 0."""
    y, x = (int(np.floor(value + 0.5)) for value in center)
    return ProfileComponent(
        spectrum=np.array(spectrum, dtype=np.float32),
        center=np.array(center),
        radius=radius,
        shear=np.zeros(2),
        sigma=SIGMA,
        box=Box(y - 24, x - 24, 48, 48),
        **options,
    )


def source(*components):
    """Make a source with its peak at the centre of its first component."""
    y, x = np.floor(components[0].center + 0.5).astype(int).tolist()
    return Source(peak=(y, x), components=components)


def scene(*sources):
    """Make a scene of sources."""
    return Scene(sources=sources, box=BOX)


def knots(spectrum=(30.0, 40.0, 60.0)):
    """Make the light that profiles do not hold: three points of light of the colour of the galaxy."""
    return [profile(0.0, spectrum, center) for center in ((123.0, 231.0), (129.0, 225.4), (130.6, 233.2))]


def drawn(one, kernels=KERNELS):
    """Image of a scene (B, H, W)."""
    models = render_scene(one, kernels)
    image = np.zeros((3, *SHAPE), dtype=np.float32)
    kernels_flux.add_models(image, models.pixels, models.boxes, models.offsets, -1.0)
    return -image


def blend_of(image, peaks, seed=1, masked=None):
    """Make a blend of an image with noise of one per pixel."""
    noisy = image + np.random.default_rng(seed).normal(size=image.shape).astype(np.float32)
    blend = replace(blends.blend_of(noisy, np.array(peaks) - BOX.origin), box=BOX)
    if masked is not None:
        blend = replace(blend, weights=np.where(masked, np.float32(0), blend.weights))
    return blend


def deblended(blend):
    """Deblend the image of a blend."""
    coadd = Coadd(images=blend.images, variance=np.ones_like(blend.images), psfs=blends.PSFS, bands=["g", "r", "i"])
    return kermes.deblend(coadd, peaks=blend.peaks)


def corrected(model, blend, snr=190.0, kernels=KERNELS, **settings):
    """Correct the sources of a model."""
    residual = blend.images - drawn(model, kernels)
    return with_free_form(model, residual, np.full(len(model.sources), snr), blend, kernels, FreeFormConfig(**settings))


def mean_chi2(model, blend, kernels=KERNELS):
    """Mean chi2 within 10 pixels of the first source."""
    y, x = model.sources[0].peak
    window = (slice(None), *Box(y, x, 1, 1).grow(10).within(BOX))
    residual = (blend.images - drawn(model, kernels))[window]
    return np.average(residual**2, weights=blend.weights[window] > 0)


@pytest.fixture(scope="module")
def irregular():
    """A galaxy with knots, its best profile, and the same after correction."""
    model = scene(source(profile()))
    truth = scene(source(profile(), *knots()))
    blend = blend_of(drawn(truth), [model.sources[0].peak])
    return model, truth, blend, corrected(model, blend)


@pytest.mark.parametrize("seed", range(4))
def test_profiles_that_suffice_stay_alone(seed):
    truth = scene(source(profile()))
    blend = blend_of(drawn(truth), [truth.sources[0].peak], seed)
    (model,) = deblended(blend).models.values()
    assert all(isinstance(component, ProfileComponent) for component in model.components)


def test_what_a_profile_cannot_hold_goes_into_the_correction(irregular):
    model, truth, blend, better = irregular
    assert mean_chi2(model, blend) > 1.3
    # Two of a hundred, as much as is allowed beside free shapes alone.
    assert mean_chi2(better, blend) < 1.02 * mean_chi2(truth, blend)


def test_a_correction_comes_closer_to_the_true_light(irregular):
    model, truth, _, better = irregular
    before, after = (np.linalg.norm(drawn(one) - drawn(truth)) for one in (model, better))
    assert after < 0.5 * before


def test_no_light_becomes_negative(irregular):
    _, _, _, better = irregular
    # Of the peak of the galaxy: rounding of the transforms that profiles are drawn with.
    light = better.sources[0].model(3)
    assert light.min() > -1e-5 * light.max()


def test_a_hole_is_no_deeper_than_the_profile():
    model = scene(source(profile()))
    hole = scene(source(profile(), profile(0.0, (-120.0, -180.0, -270.0))))
    better = corrected(model, blend_of(drawn(hole), [model.sources[0].peak]))
    light = better.sources[0].model(3)
    assert len(better.sources[0].components) > 1
    assert light.min() > -1e-5 * light.max()


def test_a_hole_in_a_bright_galaxy_is_no_reason_to_make_it_worse():
    """A profile with a bright middle for a ring: most pixels of the middle are held at no light."""
    model = scene(source(profile(spectrum=(4000.0, 6000.0, 9000.0))))
    outer = profile(6.0, (16000.0, 24000.0, 36000.0))
    truth = scene(source(outer, profile(3.0, (-12000.0, -18000.0, -27000.0))))
    blend = blend_of(drawn(truth), [model.sources[0].peak])
    better = corrected(model, blend, snr=1e4)
    # 0.4; and 1.4, more than without a correction, where such pixels are cut off after one solution.
    assert mean_chi2(better, blend) < 0.6 * mean_chi2(model, blend)


def test_wings_stay_those_of_the_profile(irregular):
    model, *_, better = irregular
    stamp = model.sources[0].components[0].box
    wings = (model.sources[0].components[0].evaluate() < 0.1).all(axis=0)
    change = np.zeros((3, *stamp.shape))
    for component in better.sources[0].components[1:]:
        assert component.box & stamp == component.box
        change[(slice(None), *component.box.within(stamp))] += component.evaluate()
    # The floor is a tenth of the noise; the PSF of the model frame carries a little of the change across it.
    assert np.abs(change[:, wings]).max() < 0.02


def test_a_correction_fades_towards_the_wings(irregular):
    *_, better = irregular
    for component in better.sources[0].components[1:]:
        light = np.abs(component.evaluate())
        edge = max(light[:, 0].max(), light[:, -1].max(), light[:, :, 0].max(), light[:, :, -1].max())
        assert edge < 0.01  # of the noise of a pixel, before it is blurred by the PSF


def test_a_wrong_psf_in_one_band_is_made_good_in_that_band():
    star = scene(source(profile(0.0, (2000.0, 30000.0, 3000.0))))
    wrong = KernelSet(KERNELS.stamps, blends.PSFS * 1.0)
    wrong.psfs[1] = 0.9 * blends.PSFS[1] + 0.1 * blends.PSFS[2]
    blend = blend_of(drawn(star, wrong), [star.sources[0].peak])
    better = corrected(star, blend, snr=3000.0)
    bands = [np.flatnonzero(c.spectrum).tolist() for c in better.sources[0].components[1:]]
    assert [1] in bands
    assert mean_chi2(better, blend) < 0.2 * mean_chi2(star, blend)


def test_faint_sources_keep_their_profile(irregular):
    model, _, blend, _ = irregular
    assert corrected(model, blend, snr=19.0) is model


def test_points_are_corrected_above_a_limit_of_their_own():
    star = scene(source(profile(0.0)))
    blend = blend_of(drawn(scene(source(profile(0.0), *knots()))), [star.sources[0].peak])
    assert corrected(star, blend, snr=299.0) is star
    assert corrected(star, blend, snr=301.0) is not star


def test_sources_of_unknown_signal_to_noise_keep_their_profile(irregular):
    model, _, blend, _ = irregular
    assert corrected(model, blend, snr=np.nan) is model


def test_no_strength_switches_it_off(irregular):
    model, _, blend, _ = irregular
    assert corrected(model, blend, strength=0.0) is model


def test_the_unit_of_flux_does_not_matter(irregular):
    _, _, blend, better = irregular
    unit = np.float32(1e-12)
    scaled = replace(
        blend, images=blend.images * unit, weights=blend.weights / unit**2, noise_rms=blend.noise_rms * unit
    )
    small = scene(source(profile(spectrum=np.array(SPECTRUM) * unit)))
    other = corrected(small, scaled)
    # Float32 sums of a few thousand pixels.
    np.testing.assert_allclose(
        other.sources[0].model(3) / unit, better.sources[0].model(3), atol=1e-3 * better.sources[0].model(3).max()
    )


def test_masked_pixels_do_not_matter(irregular):
    model, truth, _, _ = irregular
    masked = np.zeros((3, *SHAPE), dtype=bool)
    masked[:, 20:24, 26:40] = True
    peaks = [model.sources[0].peak]
    one, other = (blend_of(drawn(truth), peaks, masked=masked) for _ in range(2))
    other.images[masked] += 1000.0
    expected, got = corrected(model, one), corrected(model, other)
    np.testing.assert_array_equal(got.sources[0].model(3), expected.sources[0].model(3))


def test_without_any_weight_nothing_is_corrected(irregular):
    model, _, blend, _ = irregular
    assert corrected(model, replace(blend, weights=np.zeros_like(blend.weights))) is model


def test_a_source_without_components_is_left_alone(irregular):
    model, _, blend, better = irregular
    empty = Source(peak=(110, 210), components=())
    two = scene(*model.sources, empty)
    blend = replace(blend, peaks=np.concatenate([blend.peaks, [[10, 10]]]))
    got = corrected(two, blend)
    assert got.sources[1] is empty
    assert len(got.sources[0].components) == len(better.sources[0].components)


def test_the_order_of_sources_does_not_matter():
    first, second = profile(center=(120.2, 220.1)), profile(2.0, (600.0, 500.0, 300.0), (131.4, 237.7))
    model = scene(source(first), source(second))
    truth = scene(source(first, *knots()), source(second, *knots((40.0, 40.0, 30.0))))
    peaks = [one.peak for one in model.sources]
    image, snr = drawn(truth), np.array([190.0, 150.0])
    forward, backward = blend_of(image, peaks), blend_of(image, peaks[::-1])
    residual, config = forward.images - drawn(model), FreeFormConfig()
    expected = with_free_form(model, residual, snr, forward, KERNELS, config)
    got = with_free_form(scene(*model.sources[::-1]), residual, snr[::-1], backward, KERNELS, config)
    for one, other in zip(expected.sources, got.sources[::-1], strict=True):
        np.testing.assert_array_equal(one.model(3), other.model(3))


@pytest.fixture
def light():
    """Light of two spectra, images of three bands, the spectra, and the transforms of the PSFs."""
    rng = np.random.default_rng(5)
    fields, images = rng.normal(size=(2, 20, 24)).astype(np.float32), rng.normal(size=(3, 20, 24)).astype(np.float32)
    spectra = np.array([[1.0, 2.0, 0.0], [0.5, 0.0, 3.0]], dtype=np.float32)
    side = transform_side(24 + max(blends.PSFS.shape[1:]) // 2)
    return fields, images, spectra, KERNELS.psf_transforms(side)


def test_light_of_spectra_is_seen_as_band_by_band(light):
    fields, images, spectra, transforms = light
    got = np.empty_like(images)
    kernels_free_form.observe(fields, spectra, transforms, got)
    expected = Convolution.of(blends.PSFS, (20, 24)).forward(np.einsum("kb,khw->bhw", spectra, fields))
    np.testing.assert_allclose(got, expected, atol=1e-5)  # float32 transforms


def test_gathering_is_the_adjoint_of_seeing(light):
    fields, images, spectra, transforms = light
    seen, gathered = np.empty_like(images), np.empty_like(fields)
    kernels_free_form.observe(fields, spectra, transforms, seen)
    kernels_free_form.gather(images, spectra, transforms, gathered)
    np.testing.assert_allclose(np.sum(seen * images), np.sum(fields * gathered), rtol=1e-4)


def dense_correction(model, blend, strength, floor):
    """Slow twin: the most probable correction of one profile, from the matrix of all its pixels."""
    (component,) = model.sources[0].components
    image = np.maximum(replace(component, spectrum=np.ones(1, dtype=np.float32)).evaluate()[0].astype(float), 0)
    spectrum = component.spectrum.astype(float)
    envelope = strength * np.maximum(image - floor / spectrum.max(), 0)
    stamp = component.box
    rows, columns = np.nonzero(envelope)
    convolution = Convolution.of(blends.PSFS, SHAPE)
    design = []
    for y, x in zip(rows, columns, strict=True):
        light = np.zeros((3, *SHAPE))
        light[:, y + stamp.y0 - BOX.y0, x + stamp.x0 - BOX.x0] = spectrum * envelope[y, x]
        design.append(convolution.forward(light).ravel())
    design = np.array(design, dtype=float).T
    weights = blend.weights.ravel().astype(float)
    residual = (blend.images - drawn(model)).ravel()
    normal = np.eye(len(rows)) + design.T @ (weights[:, None] * design)
    fields = np.zeros_like(envelope)
    fields[rows, columns] = np.linalg.solve(normal, design.T @ (weights * residual))
    blur = Convolution.of(blends.TARGET[None], envelope.shape)
    return blur.forward((envelope * fields)[None])[0]


@pytest.mark.parametrize("uneven", [1.0, 3.0])
def test_agrees_with_the_slow_twin(uneven):
    model = scene(source(profile(1.5, center=(128.0, 230.0))))
    truth = scene(source(profile(1.5, center=(128.0, 230.0)), *knots((6.0, 9.0, 13.0))))
    blend = blend_of(drawn(truth), [model.sources[0].peak])
    across = np.linspace(1.0, uneven, SHAPE[1], dtype=np.float32)
    blend = replace(blend, weights=blend.weights * across)
    better = corrected(model, blend, strength=0.2, floor=2.0, tolerance=1e-6, max_iterations=300)
    first = better.sources[0].components[1]
    expected = dense_correction(model, blend, 0.2, 2.0)
    got = np.zeros_like(expected)
    stamp = model.sources[0].components[0].box
    got[first.box.within(stamp)] = (first.evaluate()[2] / SPECTRUM[2])[stamp.within(first.box)]
    # Float32 transforms, their wrap-around below a tenth of the noise, and a blur that is cut at four pixels.
    np.testing.assert_allclose(got, expected, atol=0.02 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["min_snr", "point_snr", "strength", "floor", "tolerance", "max_iterations"])
def test_settings_out_of_range_are_refused(name):
    with pytest.raises(ConfigError, match=f"free_form.{name}"):
        FreeFormConfig(**{name: -1})


@pytest.fixture(scope="module")
def result():
    """A deblended coadd with a knotty galaxy and a faint star."""
    truth = scene(source(profile(), *knots()), source(profile(0.0, (60.0, 60.0, 60.0), (142.0, 243.0))))
    blend = blend_of(drawn(truth), [one.peak for one in truth.sources])
    return deblended(blend)


def test_deblending_corrects_what_needs_it(result):
    corrections = [
        sum(isinstance(c, FactorizedComponent) for c in result.models[object_id].components) for object_id in (1, 2)
    ]
    assert corrections[0] > 0
    assert corrections[1] == 0


def test_total_fluxes_are_those_of_the_profiles(result):
    profiles = [c for c in result.models[1].components if isinstance(c, ProfileComponent)]
    expected = sum(c.flux() for c in profiles)
    got = [result.objects[f"{band}_flux"][0] for band in result.bands]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_corrections_count_as_components(result):
    assert result.objects["n_components"][0] == len(result.models[1].components)


def test_residuals_know_of_corrections(result):
    near = (slice(None), slice(15, 40), slice(17, 43))
    # Three bands of 650 pixels scatter by 0.03.
    assert np.mean(result.residual()[near] ** 2) < 1.05


def test_corrections_survive_the_store(result, tmp_path):
    result.write(tmp_path / "out", tolerance=None)
    again = kermes.open(tmp_path / "out")
    np.testing.assert_array_equal(again[1].model("r").array, result[1].model("r").array)


def test_metrics_see_the_corrected_light(result):
    whole = Scene(sources=(result.models[1], result.models[2]), box=Box.of_shape(result.shape))
    models = frame_models(whole, 3)
    assert models.pixels.min() > -1e-5 * models.pixels.max()


def test_expected_gain_is_that_of_independent_pixels(light):
    envelopes, images, spectra, transforms = light
    envelopes, weights = np.abs(envelopes), np.random.default_rng(6).uniform(0.5, 2, images.shape).astype(np.float32)
    squares = np.square(blends.PSFS).sum(axis=(1, 2)).astype(np.float32)
    gradient, information, diagonal = np.empty((3, *envelopes.shape), dtype=np.float32)
    gain, freedom = kernels_free_form.expect_gain(
        images, weights, envelopes, spectra, squares, transforms, gradient, information, diagonal
    )
    by_light, known = np.empty_like(envelopes), np.empty_like(envelopes)
    kernels_free_form.gather(weights * images, spectra, transforms, by_light)
    kernels_free_form.gather(weights, spectra**2 * squares, transforms, known)
    expected = 1 + envelopes**2 * known
    np.testing.assert_allclose(gradient, envelopes * by_light, rtol=1e-6)
    np.testing.assert_allclose(diagonal, expected, rtol=1e-6)
    assert gain == pytest.approx(np.sum((envelopes * by_light) ** 2 / expected, dtype=float), rel=1e-6)
    assert freedom == pytest.approx(np.sum(1 - 1 / expected, dtype=float), rel=1e-6)


@pytest.mark.nojit
def test_the_lit_box_holds_all_pixels_above_a_floor():
    rng = np.random.default_rng(8)
    for n in (0, 1, 2, 5):
        image = np.zeros((9, 7), dtype=np.float32)
        image[rng.integers(0, 9, n), rng.integers(0, 7, n)] = 2.0
        assert Box(*kernels_free_form.lit_box(image, 1.0)) == Box.where(image > 1)
        assert Box(*kernels_free_form.lit_box(image, 3.0)).is_empty
